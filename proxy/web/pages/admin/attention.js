// The first view: a search, whether all is healthy, and who is blocked, or soon will be.

import { Loaded } from "../common/api.js";
import { ago, count, duration } from "../common/format.js";
import { countdown, empty, field, h, notice, section, shown } from "../common/parts.js";
import { counterTable, whose } from "./counters.js";
import { cutKey, isKey } from "./search.js";

const SOON_MS = 3000; // after an event: within that time refusals are stored
const SILENT_MS = 12_000; // a process writes its status every 5 s
const HELP = "A name, an e-mail address, the id of a key or of a refused request. Then press Enter.";

export class Attention {
	static title = "Attention";
	every = 10;

	constructor(app) {
		this.app = app;
		this.lists = new Loaded(() => app.api.get("/attention"), app.update);
		this.faults = new Loaded(() => readFaults(app), app.update);
		this.load();
	}

	take(name) {
		if (name !== "calls" && name !== "counters") this.soon ??= setTimeout(this.load, SOON_MS);
	}

	close() {
		clearTimeout(this.soon);
	}

	render() {
		const health = shown(this.faults, (faults) => healthLine(faults, this.app.may));
		return [
			this.#search(),
			h("section", { key: "health", "aria-label": "Health" }, health),
			shown(this.lists, (value) => this.#parts(value)),
		];
	}

	load = () => {
		this.soon = null;
		this.lists.load();
		this.faults.load();
	};

	#search() {
		const { app } = this;
		const { seeAll } = app.may;
		const oninput = ({ target }) => (target.value = cutKey(target.value));
		const onsubmit = ({ target }) => {
			const text = target.elements.search.value.trim();
			if (isKey(text)) return;
			if (text.startsWith("req_")) app.go("explain", { request: text });
			else if (!seeAll) app.go("explain", { user: text });
			else app.go("users", { text: text.split(":").pop() }); // of SOURCE:ID the API searches the id
		};
		const input = { id: "search", type: "search", autocomplete: "off", "data-first": true, oninput };
		const label = seeAll ? "Find a user, a key or a request" : "Find a user or a request";
		return h("form.search", { role: "search", onsubmit }, field(label, input, { help: seeAll && HELP }));
	}

	#parts({ refused, near, pots }) {
		const { app } = this;
		if (!refused.length && !near.length && !pots.length) {
			const quotas = h("a", { href: app.href("quotas") }, "Quotas");
			return empty(h("h2", "Nobody is blocked."), h("p", "Limits are set in ", quotas, "."));
		}
		const part = (heading, caption, rows, columns, actions) => {
			const options = { caption, rows, first: { ...whose(app), ...columns }, actions, done: this.load };
			return section(heading, rows.length ? counterTable(app, options) : empty("Nobody is blocked."));
		};
		const often = (row) => [h("div", count(row.count, "time")), ago(row.at, app.now), h("div.quiet", row.model)];
		const runsOut = (row) => (row.runs_out_at > app.now ? countdown(row.runs_out_at, app.now) : "used up");
		const explain = (row) => h("a.button", { href: app.href("explain", { request: row.request_id }) }, "Explain");
		const last = "The last refusal of each user by each quota";
		const ending = "Pots (shared quotas) that run out before their reset";
		return [
			part("Refused in the last hour", last, refused.map(asCounter), { Refused: ["wide", often] }, explain),
			pots.length > 0 && part(ending, "Pots", pots.map(asCounter), { "Runs out": ["wide", runsOut] }),
			near.length > 0 && part("80 % or more used", "Near a limit", near),
		];
	}
}

/** A refusal or a pot as a counter with one limit. */
function asCounter(row) {
	const { limit, used, held = 0 } = row;
	return { ...row, limits: [{ ...row, remaining: Math.max(0, limit - used - held) }] };
}

function healthLine(faults, { seeAll }) {
	if (faults.length) return notice("warning", faults.map((each) => h("p", each)));
	const upstreams = seeAll && ", and no upstream is in cooldown";
	return notice("good", "All is well: the database answers", upstreams, ".");
}

/** What is wrong. A manager sees the process of the stream alone. */
async function readFaults({ api, live, may, now }) {
	const list = may.seeAll ? (await api.get("/replicas")).data : [{ at: now, status: live.health ?? {} }];
	const differs = list.some(({ status }) => status.policy !== list[0].status.policy);
	const other = differs && "The processes have different policies.";
	return [...list.flatMap((each) => faultsOf(each, now)), other].filter(Boolean);
}

function faultsOf({ replica, at, status: { ledger, reload_mistakes: mistakes, upstreams = [] } }, now) {
	const cold = ({ name, cooldown_until_at: until, last_failure: last }) =>
		until > now && `Upstream ${name} is in cooldown for ${duration(until - now)} (${replica}): ${last?.reason}.`;
	return [
		now - at > SILENT_MS && `${replica} wrote no status for ${duration(now - at)}.`,
		ledger === "unavailable" && "The database can't be reached.",
		mistakes > 0 && `The file has ${count(mistakes, "mistake")}, so it was not taken.`,
		...upstreams.map(cold),
	];
}
