// What the stream of events says. Of each kind only so many are kept.

const CALLS_MAX = 100;
const COUNTERS_MAX = 2000;
const MINUTE_MS = 60_000;

export class Live {
	calls = new Map(); // by id
	inFlight = 0; // also those that `calls` has no room for
	counters = new Map(); // by `keyOf`
	health = null;
	#recent = []; // what happened in the last minute

	/** Take an event. Returns whether all lists have to be read again: events are lost, or the file was reloaded. */
	take(name, data, now) {
		const before = this.health?.reloaded_at;
		if (name === "snapshot" || name === "health") this.health = data.health ?? data;
		const mustRead = name === "snapshot" || this.health?.reloaded_at !== before;
		if (mustRead || name === "change") this.counters.clear(); // other limits may be in force
		for (const counter of data.counters ?? []) this.counters.set(keyOf(counter), counter);
		while (this.counters.size > COUNTERS_MAX) this.counters.delete(this.counters.keys().next().value);
		if (name === "calls") this.#takeCalls(data, now);
		if (name === "refusals") this.#count({ refused: data.refusals.length + data.more }, now);
		return mustRead;
	}

	/** The newest state of a counter from a list, which the stream may have changed since. */
	newest(counter, now) {
		const known = this.counters.get(keyOf(counter));
		const isNewer = known && known.opened_at >= counter.opened_at && known.resets_at > now;
		return isNewer ? { ...counter, ...known } : counter;
	}

	lastMinute(measure, now) {
		const recent = this.#recent.filter(({ at }) => at > now - MINUTE_MS);
		return recent.reduce((sum, each) => sum + (each[measure] ?? 0), 0);
	}

	#takeCalls({ begun, begun_more, ended, ended_more, tokens }, now) {
		let others = this.inFlight - this.calls.size + begun_more - ended_more; // without details
		for (const call of begun) {
			if (this.calls.size < CALLS_MAX || this.calls.has(call.id)) this.calls.set(call.id, call);
			else others++;
		}
		for (const { id } of ended) if (!this.calls.delete(id)) others--;
		this.inFlight = this.calls.size + Math.max(0, others);
		if (tokens) this.#count({ tokens: tokens.input + tokens.output }, now);
	}

	#count(what, now) {
		this.#recent = [...this.#recent.filter(({ at }) => at > now - MINUTE_MS), { at: now, ...what }];
	}
}

/** The name of a counter. That of a pot has no user. */
export function keyOf(counter) {
	return `${counter.user ?? ""}\n${counter.quota}`;
}
