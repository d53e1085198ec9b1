// Follows a stream of server-sent events with `fetch`, which unlike EventSource can send a header and see a status.

const PAUSE_MS = 500;
const PAUSE_MAX_MS = 10_000;
const SILENCE_MS = 40_000; // the server sends a comment every 15 s

/**
 * A stream that connects again by itself, and goes on behind the last event that it has seen. The state is "open",
 * "lost", or "refused": the key may be invalid, or too many are open. It tries again until `stop`. A hidden page has
 * no connection, as all tabs share a few, and begins anew.
 */
export class EventStream {
	#lastId = "";
	#stopped = false;
	#end = () => {};

	constructor(url, { headers, onEvent, onState }) {
		Object.assign(this, { url, headers, onEvent, onState });
	}

	async start() {
		let pause = PAUSE_MS;
		while (!this.#stopped) {
			const began = Date.now();
			const state = document.hidden || (await this.#follow().catch(() => "lost"));
			if (this.#stopped) return;
			if (document.hidden) this.#lastId = "";
			else this.onState(state);
			pause = document.hidden || Date.now() - began > PAUSE_MAX_MS ? PAUSE_MS : Math.min(pause * 2, PAUSE_MAX_MS);
			const wait = pause * (0.5 + Math.random() / 2); // so that not all pages come back at once
			await new Promise((resolve) => setTimeout(resolve, wait));
		}
	}

	stop() {
		this.#stopped = true;
		this.#end();
	}

	/** Follow one connection to its end. Returns the state that it ends in. */
	async #follow() {
		const abort = new AbortController();
		const end = (this.#end = () => abort.abort());
		let watch = setTimeout(end, SILENCE_MS);
		document.addEventListener("visibilitychange", end, { signal: abort.signal });
		try {
			const headers = { ...this.headers?.(), ...(this.#lastId && { "last-event-id": this.#lastId }) };
			const response = await fetch(this.url, { headers, signal: abort.signal });
			if (!response.ok) return "refused";
			this.onState("open");
			const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
			let rest = "";
			for (;;) {
				const { done, value } = await reader.read();
				if (done) return "lost";
				clearTimeout(watch);
				watch = setTimeout(end, SILENCE_MS);
				const blocks = (rest + value).split("\n\n");
				rest = blocks.pop();
				for (const block of blocks) this.#take(block);
			}
		} finally {
			clearTimeout(watch);
			end(); // else the connection may stay open
		}
	}

	#take(block) {
		const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s, 2)));
		if (fields.id) this.#lastId = fields.id;
		try {
			if (fields.event) this.onEvent(fields.event, JSON.parse(fields.data));
		} catch (error) {
			reportError(error); // a mistake of ours must not end the stream
		}
	}
}
