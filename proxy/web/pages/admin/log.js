// The audit log: who changed what, with what it was before and after side by side.

import { Loaded } from "../common/api.js";
import { instant, number, title, wholeInstant } from "../common/format.js";
import { empty, h, pager, shown } from "../common/parts.js";
import { filters } from "./search.js";

const HOUR_MS = 3_600_000;
const FILTERS = { actor: "By whom", target: "What was changed", action: "Kind of change" };
const HOURS = { "": "Any time", 1: "The last hour", 24: "The last 24 hours", 168: "The last 7 days" };

export class Log {
	static title = "Log";

	constructor(app) {
		this.app = app;
	}

	move(path, query) {
		this.query = query;
		const { api, update } = this.app;
		this.page = new Loaded(() => api.get("/audit", this.#query({ limit: 50 })), update);
		this.page.load();
	}

	take(name) {
		if (name === "change" || name === "snapshot") this.page.load();
	}

	render() {
		return [this.#filters(), shown(this.page, (page) => this.#list(page))];
	}

	#query(more) {
		const { hours, ...given } = this.query;
		return { ...given, since: hours ? this.app.now - hours * HOUR_MS : null, ...more };
	}

	#filters() {
		const { app, query } = this;
		const href = app.api.url("/audit", this.#query({ format: "csv", after: null }));
		const csv = h("p", h("a.button", { href, download: "audit.csv" }, "Download as CSV"));
		const all = { choices: { hours: ["When", HOURS] }, texts: FILTERS };
		return filters(query, all, (other) => app.go("log", other), csv);
	}

	#list({ data, next }) {
		const isFiltered = Object.values(this.query).some(Boolean);
		if (!data.length) return empty(isFiltered ? "No change matches." : "Nobody has changed anything yet.");
		const list = h("ol.log", data.map((entry) => this.#entry(entry)));
		return [list, pager(next, (after) => this.app.href("log", { ...this.query, after }))];
	}

	#entry({ id, at, actor, action, target, address, before, after }) {
		const what = h("span", h("strong", title(action.replaceAll(".", " "))), " ", h("span.mono", target));
		const who = h("span.quiet", actor, address && ` from ${address}`, " · ", instant(at, this.app.now));
		return h("li.card", { key: id }, h("p.row.spread", what, who), sides(before, after));
	}
}

/** What was before and what is after, side by side: only what differs, each with its name. */
export function sides(before, after, captions = ["Before", "After"]) {
	if (!before && !after) return null;
	const [old, now] = [flat(before), flat(after)];
	const differing = [...new Set([...old.keys(), ...now.keys()])].filter((name) => old.get(name) !== now.get(name));
	if (!differing.length) return h("p.quiet", "Nothing is different.");
	const line = (name, tag, value) => h("p", { key: name }, `${name}: `, value === undefined ? "–" : h(tag, value));
	const side = (caption, tag, values) =>
		h("div", h("p.quiet", caption), differing.map((name) => line(name, tag, values.get(name))));
	return h("div.sides", side(captions[0], "del", old), side(captions[1], "ins", now));
}

/** The values of nested objects, by their names: "Used · staff/daily · input" → "12". */
function flat(value, name = "", found = new Map()) {
	if (Array.isArray(value)) found.set(name, value.join(", "));
	else if (typeof value === "number") found.set(name, / at$|until$/i.test(name) ? wholeInstant(value) : number(value));
	else if (typeof value !== "object") found.set(name, String(value));
	else for (const key in value) flat(value[key], name ? `${name} · ${key}` : title(key), found);
	return found;
}
