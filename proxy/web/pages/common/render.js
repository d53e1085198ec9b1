// Makes the DOM equal to a description of it: a text, or what `h` returns. Texts become text nodes and nothing is
// parsed as HTML, so no name can become markup. Nodes that stay are changed in place, so they keep their focus.

const DESCRIPTION = Symbol("description");
const SVG = "http://www.w3.org/2000/svg";
// Set when their description changes, so an update does not undo what the viewer has typed.
const STATES = new Set(["value", "checked", "selected"]);

/**
 * Describe an element: `h("p.quiet.small", { id: "a" }, "text", h("b", "more"))`. Properties can be omitted. They are
 * attributes, but `key` names the element among its siblings, `on…` are event handlers, and `style` is an object, as
 * the policy forbids style attributes. True is an empty attribute; false, null and undefined are none.
 */
export function h(name, properties, ...children) {
	const [tag, ...classes] = name.split(".");
	const hasNone = properties?.constructor !== Object || "tag" in properties;
	const given = hasNone ? {} : properties;
	const all = classes.length ? { ...given, class: [...classes, given.class].filter(Boolean).join(" ") } : given;
	return { tag, key: given.key, properties: all, children: flat(hasNone ? [properties, children] : children) };
}

/** Make the children of `parent` equal to one description or a list of them. */
export function patch(parent, wanted) {
	const list = flat([wanted]);
	const keys = new Set(list.map((each) => each.key).filter((key) => key !== undefined));
	const keyed = new Map();
	for (const node of [...parent.childNodes]) {
		const key = node[DESCRIPTION]?.key;
		if (key === undefined) continue;
		if (keys.has(key) && !keyed.has(key)) keyed.set(key, node);
		else node.remove(); // first, so that the others need not be moved
	}
	let next = parent.firstChild;
	for (const description of list) {
		const found = description.key === undefined ? next : keyed.get(description.key);
		const node = isOf(found, description) ? found : create(parent, description);
		if (typeof description !== "string") update(node, description);
		else if (node.data !== description) node.data = description;
		if (node === next) next = next.nextSibling;
		// Unlike insertBefore, moveBefore keeps the focus of a node that is already in the document.
		else parent[node.isConnected && parent.moveBefore ? "moveBefore" : "insertBefore"](node, next);
	}
	while (next) {
		const after = next.nextSibling;
		next.remove();
		next = after;
	}
}

function flat(children) {
	const isShown = (each) => each || each === 0;
	return children.flat(Infinity).filter(isShown).map((each) => (typeof each === "object" ? each : String(each)));
}

function isOf(node, description) {
	if (typeof description === "string") return node?.nodeType === Node.TEXT_NODE;
	const known = node?.[DESCRIPTION];
	return known?.tag === description.tag && known.key === description.key;
}

function create(parent, description) {
	if (typeof description === "string") return document.createTextNode(description);
	const isSvg = description.tag === "svg" || parent.namespaceURI === SVG;
	return document.createElementNS(isSvg ? SVG : "http://www.w3.org/1999/xhtml", description.tag);
}

function update(element, description) {
	const before = element[DESCRIPTION]?.properties ?? {};
	const { properties, children } = description;
	element[DESCRIPTION] = description;
	for (const name in before) if (!(name in properties)) set(element, name, undefined, before[name]);
	patch(element, children); // before the properties: the value of a select is one of its options
	for (const name in properties) set(element, name, properties[name], before[name]);
}

function set(element, name, value, before) {
	if (name === "key" || value === before) return;
	if (name === "style") Object.assign(element.style, value);
	else if (name.startsWith("on")) element[name] = value ?? null;
	else if (STATES.has(name)) element[name] = value ?? "";
	else if (value === undefined || value === null || value === false) element.removeAttribute(name);
	else element.setAttribute(name, value === true ? "" : value);
}
