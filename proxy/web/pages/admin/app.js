// The page of administrators: login, navigation, and the view that the part of the address after # names.
//
// A view is a class with a static `title`, `render()`, and perhaps `move(path, query)` for each address,
// `take(name, data)` for each event, `close()`, and `load()`: each `every` seconds, if it shows what time changes.

import { Api, Problem, withQuery } from "../common/api.js";
import { EventStream } from "../common/events.js";
import { setPolicyZone } from "../common/format.js";
import { button, field, notice, say } from "../common/parts.js";
import { h, patch } from "../common/render.js";
import { Attention } from "./attention.js";
import { Explain } from "./explain.js";
import { Live } from "./live.js";
import { Log } from "./log.js";
import { Now } from "./now.js";
import { Quotas } from "./quotas.js";
import { LOOKS_LIKE_KEY, PART_OF_OWN_KEY } from "./search.js";
import { Usage } from "./usage.js";
import { Users } from "./users.js";

const VIEWS = {
	attention: Attention, now: Now, quotas: Quotas, users: Users, usage: Usage, explain: Explain, log: Log,
};
const TICK_MS = 1000;
const PAUSE_MS = 400; // between renderings: the stream may tell thousands of calls a second
const LOST = "The connection to the proxy is lost, so this may be old. Trying again …";
const HELP = "It is in quotas.yaml under admin_keys, or made by: llm-quota-proxy admin-keys create NAME";

class App {
	api = new Api("api");
	live = new Live();
	session = null; // who has logged in; null: nobody
	connection = "open";
	#view;
	#name = "";
	#dialog;
	#element = document.getElementById("dialog");
	#loginNotice;
	#stream;
	#schema;
	#isWaiting = false;
	#pause;
	#ticks = 0;

	async start() {
		addEventListener("hashchange", () => this.#move());
		// The event comes later, when another dialog may be open.
		this.#element.addEventListener("close", () => this.#element.open || this.close());
		setInterval(() => this.#tick(), TICK_MS);
		document.addEventListener("visibilitychange", this.update);
		this.api.refused = ({ message }) => this.session && this.#leave(message);
		try {
			this.#enter(await this.api.get("/session"));
		} catch (error) {
			this.#leave(error.status === 401 ? null : error.message);
		}
	}

	get may() {
		const { role } = this.session;
		return { change: role === "administrator", grant: role !== "viewer", seeAll: role !== "manager" };
	}

	get now() {
		return this.api.now();
	}

	href(path, query) {
		return withQuery(`#/${path}`, query);
	}

	/** Go to another address. With `replace`, Back does not lead to this one. */
	go(path, query, { replace = false } = {}) {
		const href = this.href(path, query);
		if (PART_OF_OWN_KEY.test(href)) return say(LOOKS_LIKE_KEY);
		history[replace || href === location.hash ? "replaceState" : "pushState"](null, "", href);
		this.#move();
	}

	/** Render once before the next frame, but not while the page is hidden. */
	update = () => {
		if (this.#isWaiting || document.hidden) return;
		this.#isWaiting = true;
		requestAnimationFrame(() => {
			this.#isWaiting = false;
			this.#render();
		});
	};

	open(dialog) {
		this.#dialog = dialog;
		this.#renderDialog();
		if (!this.#element.open) this.#element.showModal();
		this.#element.querySelector("input, select")?.focus(); // not the button that closes it
	}

	/** Close the open dialog, if it is this one. */
	close(dialog = this.#dialog) {
		if (dialog !== this.#dialog) return;
		this.#dialog = null;
		if (this.#element.open) this.#element.close();
		patch(this.#element, []); // a new key must not stay in the page
		dialog?.closed?.();
		this.update();
	}

	/** Run an action. Returns whether it was done; a problem is shown, or given to `failed`. */
	async run(action, failed = (problem) => this.session && say(problem.message)) {
		try {
			await action();
			return true;
		} catch (error) {
			if (!(error instanceof Problem)) throw error;
			failed(error);
			return false;
		} finally {
			this.update();
		}
	}

	async schema(name) {
		this.#schema ??= await this.api.get("/openapi.json");
		return this.#schema.components.schemas[name];
	}

	#tick() {
		const every = this.#view?.every;
		if (every) this.update();
		if (document.hidden || this.connection !== "open") return;
		if (++this.#ticks % every === 0) this.#view.load();
	}

	#enter(session) {
		this.session = session;
		this.connection = "open";
		setPolicyZone(session.timezone);
		const follow = { onEvent: (name, data) => this.#take(name, data), onState: (state) => this.#connected(state) };
		this.#stream = new EventStream("api/events", follow);
		this.#stream.start();
		this.#move();
	}

	#leave(message, kind = "error") {
		this.#stream?.stop();
		this.#view?.close?.();
		this.session = this.#stream = this.#view = null;
		this.live = new Live();
		this.#loginNotice = message && notice(kind, message);
		this.close();
	}

	#logIn() {
		const input = document.getElementById("admin-key");
		const body = { key: input.value };
		input.value = "";
		const enter = async () => this.#enter((await this.api.send("POST", "/session", { body })).value);
		this.run(enter, (problem) => this.#leave(problem.message));
	}

	async #logOut() {
		const isDone = await this.run(() => this.api.send("DELETE", "/session"));
		if (isDone) this.#leave("You have logged out.", "info");
	}

	#connected(state) {
		if (state === "refused") this.run(() => this.api.get("/session"), () => {});
		if (state !== this.connection) say(state === "open" ? "The connection is back." : "The connection is lost.");
		this.connection = state;
		this.update();
	}

	#take(name, data) {
		const known = this.live.take(name, data, this.now) ? "snapshot" : name;
		this.#view?.take?.(known, data);
		this.#dialog?.take?.(known, data);
		if (this.#view?.every) this.#pause ??= setTimeout(() => {
			this.#pause = null;
			this.update();
		}, PAUSE_MS);
	}

	#move() {
		if (!this.session) return;
		const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
		const [asked, ...rest] = path.split("/");
		const name = Object.hasOwn(VIEWS, asked) ? asked : "attention";
		const isOther = name !== this.#name || !this.#view;
		this.close();
		if (isOther) {
			this.#view?.close?.();
			this.#view = new VIEWS[name](this);
			this.#name = name;
			scrollTo(0, 0);
		}
		this.#view.move?.(rest, Object.fromEntries(new URLSearchParams(query)));
		this.#render();
		const isLost = document.activeElement === document.body; // what had the focus is gone
		if (isOther || isLost) (document.querySelector("[data-first]") ?? document.querySelector("h1")).focus();
	}

	#render() {
		const title = this.session ? VIEWS[this.#name].title : "Log in";
		document.title = `${title} · llm-quota-proxy`;
		patch(document.getElementById("app"), this.session ? this.#page(title) : this.#login());
		if (this.#dialog) this.#renderDialog();
	}

	#renderDialog() {
		const close = button("✕", () => this.close(), { "aria-label": "Close" });
		const head = h("header", h("h2", { id: "dialog-title" }, this.#dialog.title), close);
		patch(this.#element, [head, this.#dialog.render()]);
	}

	#page(title) {
		const { name, role } = this.session;
		const views = Object.keys(VIEWS).filter((each) => this.may.seeAll || each !== "users");
		const current = (each) => (each === this.#name ? "page" : null);
		const link = (each) => h("a", { href: this.href(each), "aria-current": current(each) }, VIEWS[each].title);
		const who = h("div.who", h("p", name, h("span.quiet", `, ${role}`)), button("Log out", () => this.#logOut()));
		const nav = h("nav", { "aria-label": "Views" }, views.map(link));
		const side = h("header.side", h("p.brand", "llm-quota-proxy"), nav, who);
		const lost = this.connection !== "open" && notice("warning", LOST);
		const main = h("main", lost, h("h1", { tabindex: "-1" }, title), this.#view.render());
		return h("div.layout", { key: "page" }, side, main);
	}

	#login() {
		const input = { id: "admin-key", type: "password", autocomplete: "current-password", required: true };
		const fields = [field("Admin key", input, { help: HELP }), this.#loginNotice, h("button.main", "Log in")];
		const form = h("form", { onsubmit: () => this.#logIn() }, fields);
		const about = h("p", "Log in to see who uses what, and to change quotas.");
		return h("main.login", { key: "login" }, h("h1", "llm-quota-proxy"), about, form);
	}
}

new App().start();
