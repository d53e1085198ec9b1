// What happens now: how much is called and refused, who is near a limit, the calls in flight, and the replicas.

import { Loaded } from "../common/api.js";
import { ago, duration, number, title } from "../common/format.js";
import { NEAR_PERCENT, badge, button, empty, h, section, shown, table } from "../common/parts.js";
import { endCall } from "./actions.js";
import { counterTable, userLink, whose } from "./counters.js";
import { keyOf } from "./live.js";

const SHOWN = 100;

export class Now {
	static title = "Now";
	every = 5;

	constructor(app) {
		this.app = app;
		this.near = new Loaded(async () => (await app.api.get("/attention")).near, app.update);
		this.running = new Loaded(() => this.#read(), app.update);
		this.load();
	}

	take(name) {
		if (name === "snapshot" || name === "change") this.load();
	}

	load() {
		this.near.load();
		this.running.load();
	}

	/** Read the replicas, and the calls, which events change then. */
	async #read() {
		const { api, live, may } = this.app;
		const { data: replicas } = may.seeAll ? await api.get("/replicas") : { data: [] };
		const { data, next } = await api.get("/calls", { limit: SHOWN });
		live.calls = new Map(data.map((call) => [call.id, call]));
		live.inFlight = data.length;
		if (next && may.seeAll) live.inFlight = replicas.reduce((sum, { status }) => sum + status.calls_in_flight, 0);
		return replicas;
	}

	render() {
		return [
			this.#tiles(),
			section("Near or at a limit", shown(this.near, (near) => this.#nearest(near))),
			section("Calls in flight", shown(this.running, () => this.#inFlight())),
			this.app.may.seeAll && section("Replicas", shown(this.running, (list) => this.#health(list))),
		];
	}

	#tiles() {
		const { live, now } = this.app;
		const tile = (name, value) => h("div.tile", name, h("strong", number(value)));
		return h(
			"div.tiles",
			tile("Calls in flight", live.inFlight),
			tile("Tokens a minute", live.lastMinute("tokens", now)),
			tile("Refusals a minute", live.lastMinute("refused", now)),
			h("p.quiet", "Counted in the last minute, while this page was open."),
		);
	}

	#nearest(near) {
		const { live, now } = this.app;
		const known = new Map(live.counters);
		for (const each of near) known.set(keyOf(each), live.newest(each, now));
		const open = [...known.values()].filter((each) => each.resets_at > now && percentOf(each) >= NEAR_PERCENT);
		const rows = open.sort((one, other) => percentOf(other) - percentOf(one)).slice(0, SHOWN);
		if (!rows.length) return empty("Nobody has used 80 % of a limit.");
		return counterTable(this.app, { caption: "Counters near or at a limit", rows, first: whose(this.app) });
	}

	#inFlight() {
		const { app } = this;
		const end = (call) => button("End", () => endCall(app, call), { "aria-label": `End the call of ${call.user}` });
		if (!app.live.calls.size) return empty("No call is in flight.");
		return table("Calls in flight", [...app.live.calls.values()], ({ id }) => id, {
			User: (call) => userLink(app, call.user),
			Model: (call) => call.model,
			For: (call) => duration(app.now - call.began_at),
			"Held tokens": (call) => number(call.held_input + call.held_output),
			...(app.may.change && { "": end }),
		});
	}

	#health(replicas) {
		const { live, now } = this.app;
		const newest = ({ status }) => ({ ...status, ...(status.replica === live.health?.replica && live.health) });
		const state = (until) =>
			until > now ? badge(`cooldown for ${duration(until - now)}`, "near") : badge("available", "good");
		return table("Replicas", replicas.map(newest), ({ replica }) => replica, {
			Replica: (each) => h("span.mono", each.replica),
			Policy: (each) => h("span.mono", each.policy),
			Reload: (each) => ago(each.reloaded_at, now),
			Commit: (each) => `${number(each.commit_ms)} ms`,
			Upstreams: (each) => each.upstreams.map((one) => h("div", one.name, " ", state(one.cooldown_until_at))),
		});
	}
}

// A limit of 0 is a switch, and nobody is near it.
function percentOf(counter) {
	return Math.max(...counter.limits.map((each) => each.limit && each.percent));
}
