// The parts of which the views are made.

import { duration, instant, number, reset, title } from "./format.js";
import { h } from "./render.js";

export { h };

export const NEAR_PERCENT = 80;
const SAID_MS = 6000;

let saying;

// What is typed into a form is sent by its handlers alone, or it would get into the address.
addEventListener("submit", (event) => event.preventDefault());

export function button(label, onclick, { kind, ...properties } = {}) {
	return h("button", { type: "button", class: kind, onclick, ...properties }, label);
}

export function buttonIf(isAllowed, ...rest) {
	return isAllowed ? button(...rest) : null;
}

export function section(name, ...content) {
	return h("section", { key: name }, h("h2", name), content);
}

export function badge(text, kind) {
	return h("span.badge", { class: kind }, text);
}

/** A message in the page. `kind` is "info", "good", "warning" or "error"; an error is read out at once. */
export function notice(kind, ...content) {
	return h("div.notice", { class: kind, role: kind === "error" && "alert" }, content);
}

/** What is shown of something `Loaded`: `show(value)`, or that it is not there yet, or why not. */
export function shown(loaded, show) {
	const { problem, value } = loaded;
	const failed = problem && notice("error", problem.message, " ", button("Try again", () => loaded.load()));
	if (value === null) return failed || h("p.quiet", "Loading …");
	return [failed, show(value)];
}

export function empty(...content) {
	return h("div.empty", content);
}

export function levelOf(level) {
	const { used, held = 0, limit } = level;
	const kind = used >= limit ? "full" : 100 * used >= limit * NEAR_PERCENT && "near";
	const part = (name, value) =>
		h("div", { class: name, style: { width: `${limit ? Math.min(100, (100 * value) / limit) : 100}%` } });
	const words = { full: "used up", near: "nearly used up" }[kind];
	const amount = `${number(used)} of ${number(limit)} ${title(level.measure).toLowerCase()}`;
	const bar = h("div.bar", { class: kind, "aria-hidden": "true" }, part("used", used), part("held", held));
	const more = held > 0 && h("span.quiet", ` · ${number(held)} held by calls in flight`);
	const state = words && [" ", badge(words, kind)];
	return h("div.level", { key: level.measure }, bar, h("span.amount", amount), state, more);
}

export function countdown(resetsAt, now) {
	if (!resetsAt || resetsAt <= now) return h("span.quiet", "begins with the next call");
	return h("span.countdown", `in ${duration(resetsAt - now)} · `, reset(resetsAt, now));
}

/**
 * A table. `cells` has its columns by their titles: `cell(row)`, or `[kind, cell]`. That without a title has actions.
 * On a narrow screen each row is a list, which takes the meaning of a table from the elements: they have it as roles.
 */
export function table(caption, rows, key, cells) {
	const all = Object.entries(cells).map(([title, given]) => {
		const [kind, cell] = Array.isArray(given) ? given : [title ? "" : "actions", given];
		return { title, kind, cell };
	});
	const head = ({ title, kind }) =>
		h("th", { scope: "col", role: "columnheader", class: kind }, title || h("span.hidden", "Actions"));
	const cell = (row) => (column) => {
		// One element, because on a narrow screen the children of a cell are items of a grid.
		const content = column.title ? h("div", column.cell(row)) : column.cell(row);
		return h("td", { role: "cell", class: column.kind, "data-title": column.title }, content);
	};
	const line = (row) => h("tr", { key: key(row), role: "row" }, all.map(cell(row)));
	return h(
		"table",
		{ role: "table" },
		h("caption.hidden", caption),
		h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, all.map(head))),
		h("tbody", { role: "rowgroup" }, rows.map(line)),
	);
}

export function pager(next, href) {
	return next && h("nav.pager", { "aria-label": "Pages" }, h("a", { href: href(next) }, "Next page"));
}

export function field(label, input, { help, error, tag = "input", content } = {}) {
	const [helpId, errorId] = [`${input.id}-help`, `${input.id}-error`];
	const described = [help && helpId, error && errorId].filter(Boolean).join(" ") || null;
	return h(
		"div.field",
		{ class: input.type === "checkbox" && "check", key: input.id },
		h("label", { for: input.id }, label),
		h(tag, { ...input, "aria-describedby": described, "aria-invalid": error ? "true" : null }, content),
		help && h("p.help", { id: helpId }, help),
		error && h("p.wrong", { id: errorId, role: "alert" }, error),
	);
}

export function copyable(text, label) {
	return h("div.copyable", h("pre", { tabindex: "0" }, text), copyButton(text, label));
}

export function copyButton(text, label = "Copy") {
	return button(label, async () => {
		await copyText(text);
		say("Copied.");
	});
}

export function say(text) {
	const status = document.getElementById("status");
	status.textContent = text;
	status.hidePopover();
	status.showPopover(); // above an open dialog
	clearTimeout(saying);
	saying = setTimeout(() => status.hidePopover(), SAID_MS);
}

export function pair(name, ...value) {
	return h("div.pair", { key: name }, h("dt", name), h("dd", value));
}

export function since(word, at, now) {
	return at && [badge(word, "full"), " ", instant(at, now)];
}

async function copyText(text) {
	try {
		return await navigator.clipboard.writeText(text);
	} catch {} // without TLS there is no clipboard, and a browser may forbid it
	const area = document.createElement("textarea");
	area.value = text;
	(document.querySelector("dialog[open]") ?? document.body).append(area);
	area.select();
	document.execCommand("copy");
	area.remove();
}
