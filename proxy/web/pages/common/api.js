// Requests to the JSON APIs.

/** An error that the API answered with. `errors` are the fields that are wrong, each with its `detail`. */
export class Problem extends Error {
	constructor(status, detail, errors = []) {
		super(detail);
		Object.assign(this, { status, errors });
	}
}

/** A client of the API below `base`, with `headers()`. `refused(problem)` is called if the key or login is wrong. */
export class Api {
	#clockOffset = 0; // ms by which the server's clock is ahead of this one

	constructor(base, headers) {
		this.base = base;
		this.headers = headers;
	}

	url(path, query) {
		return this.base + withQuery(path, query);
	}

	async get(path, query) {
		return (await this.send("GET", path, { query })).value;
	}

	/**
	 * Send a request. Returns `{value, etag}`, and throws a Problem.
	 *
	 * `match` is the ETag of the version that is to be changed; null says that there must be none yet.
	 */
	async send(method, path, { query, body, match } = {}) {
		const headers = { ...this.headers?.(), ...(body && { "content-type": "application/json" }) };
		if (match !== undefined) headers[match === null ? "if-none-match" : "if-match"] = match ?? "*";
		let response, value;
		try {
			response = await fetch(this.url(path, query), { method, headers, body: body && JSON.stringify(body) });
			const text = await response.text();
			const isJson = /json/.test(response.headers.get("content-type"));
			value = isJson ? JSON.parse(text) : null;
			if (!value && response.ok && response.status !== 204) throw text; // of a server in between
		} catch {
			throw new Problem(0, "The proxy can't be reached. Check the connection and try again.");
		}
		// The header has whole seconds, so a smaller difference is none.
		const offset = Date.parse(response.headers.get("date")) - Date.now();
		this.#clockOffset = Math.abs(offset) > 2000 ? offset : 0;
		if (response.ok) return { value, etag: response.headers.get("etag") };
		const problem = problemOf(response.status, value ?? {});
		if (problem.status === 401) this.refused?.(problem);
		throw problem;
	}

	now() {
		return Date.now() + this.#clockOffset;
	}
}

export function withQuery(path, query = {}) {
	const given = Object.entries(query).filter(([, value]) => value || value === 0);
	return given.length ? `${path}?${new URLSearchParams(given)}` : path;
}

export function pathOf(...segments) {
	return segments.map((each) => `/${encodeURIComponent(each)}`).join("");
}

/** What was read from the API. `update` is called when it has changed. No answer replaces a newer one. */
export class Loaded {
	value = null;
	problem = null;
	#asked = 0;
	#shown = 0;

	constructor(read, update) {
		this.read = read;
		this.update = update;
	}

	async load() {
		const number = ++this.#asked;
		const found = await this.read().then((value) => ({ value, problem: null }), (problem) => ({ problem }));
		if (number <= this.#shown) return;
		this.#shown = number;
		Object.assign(this, found);
		this.update();
		if (this.problem && !(this.problem instanceof Problem)) throw this.problem;
	}
}

// The admin API answers with problem details, the API listener with errors in OpenAI's form.
function problemOf(status, { error, detail = error?.message, field, errors = [] }) {
	const wrong = errors.length || !field ? errors : [{ field, detail }];
	return new Problem(status, detail ?? `The server answered with status ${status}.`, wrong);
}
