// The list of users, searched by name, e-mail or key.

import { Loaded } from "../common/api.js";
import { buttonIf, empty, field, h, notice, pager, shown, table } from "../common/parts.js";
import { change } from "./actions.js";
import { LOOKS_LIKE_KEY, cutKey, looksLikeKey } from "./search.js";
import { UserPage, stateOf } from "./user.js";

const PAUSE_MS = 250; // after typing

export class Users {
	static title = "Users and keys";
	every = 10; // as windows end
	#typed = "";
	#timer = 0;
	#user = null; // the page of a user, or null: the list

	constructor(app) {
		this.app = app;
		this.loaded = new Loaded(() => this.#read(), app.update);
	}

	move(path, query) {
		this.close(); // a search that waits would lead back to the list
		this.query = query;
		this.#typed = cutKey(query.text ?? "");
		if (query.user !== this.#user?.name) {
			this.#user = query.user ? new UserPage(this.app, query.user) : null;
			scrollTo(0, 0);
		}
		this.load();
	}

	take(name) {
		if (name === "snapshot" || name === "change") this.load();
	}

	load() {
		if (this.#user) this.#user.load();
		else if (!looksLikeKey(this.#typed)) this.loaded.load();
	}

	close() {
		clearTimeout(this.#timer);
	}

	render() {
		if (this.#user) return this.#user.render();
		return [this.#filters(), shown(this.loaded, (value) => this.#found(value))];
	}

	async #read() {
		const { api } = this.app;
		const { group, after } = this.query;
		const text = this.#typed.trim();
		const keys = text.length === 10 ? (await api.get("/keys", { text })).data : []; // as a key id
		const users = await api.get("/users", { text, group, after, limit: 50 });
		return { users, key: keys.find(({ id }) => id === text) };
	}

	#filters() {
		const { app, query } = this;
		const isKey = () => looksLikeKey(this.#typed);
		const filter = (group) => isKey() || app.go("users", { text: this.#typed, group }, { replace: true });
		const type = ({ target }) => {
			this.#typed = target.value = cutKey(target.value);
			this.close();
			this.#timer = setTimeout(filter, PAUSE_MS, query.group);
			app.update();
		};
		const text = { id: "users-text", type: "search", autocomplete: "off", "data-first": true, value: this.#typed };
		const search = { ...text, placeholder: "Name, e-mail, key id or pasted key", oninput: type };
		const onchange = ({ target }) => filter(target.value.trim());
		return h(
			"form.filters",
			{ role: "search" },
			field("Search", search, { error: isKey() && LOOKS_LIKE_KEY }),
			field("Group", { id: "users-group", value: query.group, placeholder: "all", onchange }),
			buttonIf(app.may.change, "New user", () => this.#create(), { kind: "main" }),
		);
	}

	#found({ users, key }) {
		const { href, now } = this.app;
		const link = ({ user }) => h("a", { href: href("users", { user }) }, user);
		if (key) return notice("info", "The key ", h("code", key.id), " belongs to ", link(key));
		const first = "There are no users yet. Make one with “New user”, or write it in the file.";
		if (!users.data.length) return empty(this.query.text || this.query.group ? "No user is found." : first);
		const list = table("Users", users.data, ({ user }) => user, {
			Name: link,
			"E-mail": (user) => user.email ?? "–",
			Groups: (user) => user.groups.join(", ") || "–",
			State: (user) => stateOf(user, now),
		});
		return [list, pager(users.next, (after) => href("users", { ...this.query, after }))];
	}

	#create() {
		const labels = { id: "Name", email: "E-mail", is_service: "A program, not a person" };
		const fields = { labels, help: { is_service: "" } };
		const done = ({ user }) => this.app.go("users", { user });
		change(this.app, { title: "New user", label: "Create", to: "/users", schema: "NewUser", fields, done });
	}
}
