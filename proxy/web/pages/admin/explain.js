// Why a user is admitted to a model or not, why a request was refused, and what can be done about it.

import { Loaded, pathOf } from "../common/api.js";
import { instant, number, title } from "../common/format.js";
import { countdown, empty, field, h, notice, section, shown } from "../common/parts.js";
import { counterTable, userLink } from "./counters.js";
import { cutKey, isKey } from "./search.js";

const REASONS = {
	exhausted: "not enough left of",
	busy: "calls in flight hold what is left of",
	never: "it needs more than the whole limit of",
};
const BEGIN = "Write a user and a model, or the id of a refused request, from its header x-request-id.";

export class Explain {
	static title = "Explain";
	every = 2; // no event says who is admitted
	#query = {};

	constructor(app) {
		this.app = app;
	}

	move(path, query) {
		this.#query = query;
		this.found = new Loaded(() => this.#read(), this.app.update);
		this.load();
	}

	load = () => this.found.load();

	render() {
		return [this.#form(), shown(this.found, (value) => this.#answer(value))];
	}

	async #read() {
		const { api } = this.app;
		const { user, model, request } = this.#query;
		if (request) return api.get(pathOf("refusals", request));
		if (user && model) return { now: await api.get("/explain", { user, model }) };
		return { quotas: user ? (await api.get("/counters", { user })).data : [] };
	}

	#form() {
		const query = this.#query;
		const input = (name, label, more) => field(label, { id: `explain-${name}`, name, value: query[name], ...more });
		const onsubmit = ({ target }) => {
			const texts = [...new FormData(target)].map(([name, text]) => [name, cutKey(text.trim())]);
			if (texts.some(([name, text]) => name !== "model" && text !== query[name] && isKey(text))) return;
			const { request, ...call } = Object.fromEntries(texts);
			this.app.go("explain", request && request !== query.request ? { request } : call);
		};
		const fields = [
			input("user", "User", { "data-first": !query.user && !query.request }),
			input("model", "Model"),
			input("request", "Or the id of a refused request"),
		];
		const submit = h("div", h("button.main", "Explain"));
		return h("form.card", { key: "form", onsubmit }, h("div.grid", fields), submit);
	}

	#answer({ refusal, now, quotas }) {
		const { app } = this;
		const user = refusal?.user ?? this.#query.user;
		if (!user) return empty(BEGIN);
		const call = (model) => ["A call of ", userLink(app, user), ` to ${model} `];
		const state = now?.admitted ? "is admitted now, if it is small enough for what is left." : "is refused now: ";
		const options = { caption: "Quotas now", done: this.load };
		return [
			refusal && section("The refused request", this.#refusal(refusal, call)),
			section("Now", this.#decision(now ? [call(now.model), state] : BEGIN, now ?? { quotas }, options)),
		];
	}

	#refusal(refusal, call) {
		const { at, model, endpoint, quota, verdict: reason } = refusal;
		const text = [call(`${model} (${endpoint})`), "was refused at ", instant(at, this.app.now), ": "];
		// Without details it is known which quota the error named.
		const then = { refused_by: [quota], blocks: [refusal], ...refusal, ...refusal.details, reason };
		return this.#decision(text, then, { caption: "Quotas at that time" });
	}

	#decision(text, { reason, admitted, blocks = [], alternatives = [], quotas: rows = [], ...more }, options) {
		const measure = (each) => title(each.measure).toLowerCase();
		const needed = (each) => ` It needed at least ${number(each.needed)} ${measure(each)} of ${each.quota}.`;
		const sets = alternatives.map((each) => each.join(" and ")); // "": unlimited
		const kind = reason ? "warning" : admitted ? "good" : "info";
		return [
			notice(kind, text, reason && this.#why(reason, more), blocks.map(needed)),
			sets.length > 0 && sets.every(Boolean) && h("p.quiet", `Enough must be left of ${sets.join(", or of ")}.`),
			rows.length > 0 && counterTable(this.app, { rows, refusedBy: more.refused_by, ...options }),
		];
	}

	#why(reason, { refused_by: quotas, admissible_at: at }) {
		if (!(reason in REASONS)) return `${reason}.`;
		const why = `${REASONS[reason]} ${quotas.join(" and ") || "a quota of another group"}. `;
		if (reason === "busy") return `${why}Such a call is admitted when enough of them have ended.`;
		if (at === null) return `${why}No reset helps: grant more, or change the quota.`;
		if (at <= this.app.now) return `${why}That has reset since.`;
		return [why, "Such a call is admitted ", countdown(at, this.app.now), "."];
	}
}
