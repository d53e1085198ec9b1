// What was used, by day, hour, user, group, model, key or tag; and when a pot is empty at this pace.

import { Loaded } from "../common/api.js";
import { tokenChart } from "../common/chart.js";
import { count, duration, instant, number, reset, utcDay, wholeInstant } from "../common/format.js";
import { empty, h, levelOf, section, shown, table } from "../common/parts.js";
import { filters } from "./search.js";

const HOUR_MS = 3_600_000;
const STEPS = { day: 24 * HOUR_MS, hour: HOUR_MS };
const DIMENSIONS = { day: "Day", hour: "Hour", group: "Group", user: "User", key: "Key", model: "Model", tag: "Tag" };
const PERIODS = { 1: "24 hours", 7: "7 days", 30: "30 days", 90: "90 days", 365: "a year" };
const DAYS_OF_HOURS_MAX = 7; // more bars can't be told apart
const FILTERS = { group: "Group", user: "User", key: "Key id", model: "Model" };
const ROWS_MAX = 500;
const NUMBERS = {
	calls: "Calls", requests: "Requests", input_tokens: "Input", output_tokens: "Output",
	cached_tokens: "Cached input", reasoning_tokens: "Reasoning", estimated: "Estimated calls",
};

export class Usage {
	static title = "Usage";

	constructor(app) {
		this.app = app;
		this.attention = new Loaded(() => app.api.get("/attention"), app.update);
	}

	move(path, { by = "day", days = "30", ...filters }) {
		this.step = STEPS[by];
		const daysMax = by === "hour" ? DAYS_OF_HOURS_MAX : Infinity;
		this.query = { by, days: String(Math.min(days, daysMax) || 30), ...filters };
		const { api, update } = this.app;
		this.usage = new Loaded(() => api.get("/usage", this.#query()), update);
		this.usage.load();
		this.attention.load();
	}

	render() {
		const usage = shown(this.usage, ({ data }) => this.#usage(data));
		const all = { choices: { by: ["By", DIMENSIONS], days: ["Period", PERIODS] }, texts: FILTERS };
		const fields = filters(this.query, all, (other) => this.app.go("usage", other));
		return [fields, usage, shown(this.attention, ({ pots }) => this.#pots(pots))];
	}

	get #since() {
		const since = this.app.now - this.query.days * STEPS.day;
		return since - (since % (this.step ?? STEPS.day)); // sums are of days or hours of UTC
	}

	#query(more) {
		const { days, ...filters } = this.query;
		return { ...filters, since: this.#since, limit: this.step ? null : ROWS_MAX, ...more };
	}

	#usage(data) {
		if (!data.length) return empty("Nothing was used in this period. A call is here a few seconds after its end.");
		const sum = (name) => data.reduce((total, row) => total + row[name], 0);
		const tokens = number(sum("input_tokens") + sum("output_tokens"));
		const first = data.length === ROWS_MAX && `, in the first ${ROWS_MAX} rows`;
		const href = this.app.api.url("/usage", this.#query({ format: "csv" }));
		const csv = h("a.button", { href, download: `usage-by-${this.query.by}.csv` }, "Download as CSV");
		return [
			h("div.row.spread", h("p", `${tokens} tokens in ${count(sum("calls"), "call")}`, first), csv),
			this.step && this.#chart(data),
			this.#table(this.step ? data.toReversed() : data),
		];
	}

	#chart(data) {
		const used = new Map(data.map((row) => [Date.parse(row.value), row]));
		const labelOf = this.query.by === "day" ? utcDay : wholeInstant;
		const period = { since: this.#since, until: this.app.now, step: this.step };
		return tokenChart({ caption: `Tokens by ${this.query.by}`, used, ...period, labelOf });
	}

	#table(rows) {
		const { app, query } = this;
		const name = ({ value }) => {
			if (query.by === "day") return utcDay(Date.parse(value));
			if (query.by === "hour") return instant(Date.parse(value), app.now);
			if (!value || !(query.by in FILTERS)) return value || "(none)";
			return h("a", { href: app.href("usage", { ...query, by: "day", [query.by]: value }) }, value);
		};
		const numbers = Object.entries(NUMBERS).map(([each, title]) => [title, ["number", (row) => number(row[each])]]);
		const cells = { [DIMENSIONS[query.by]]: name, ...Object.fromEntries(numbers) };
		return table(`Usage by ${query.by}`, rows, (row) => row.value, cells);
	}

	#pots(pots) {
		const chosen = pots.filter((pot) => !this.query.group || pot.group === this.query.group);
		const { now } = this.app;
		const line = (pot) => {
			const empties = [`Empty in ${duration(pot.runs_out_at - now)} at this pace: `, reset(pot.runs_out_at, now)];
			const text = h("p", empties, "; resets ", reset(pot.resets_at, now));
			return h("li.card", { key: pot.quota }, h("h3", pot.quota), levelOf(pot), text);
		};
		return chosen.length > 0 && section("Pots that run out before their reset", h("ul.columns", chosen.map(line)));
	}
}
