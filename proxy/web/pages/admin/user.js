// One user: who it is, what it has used of its quotas, and its keys.

import { Loaded, pathOf } from "../common/api.js";
import { buttonIf, empty, h, pair, say, section, shown, since } from "../common/parts.js";
import { counterTable } from "./counters.js";
import { CUT, asking, keysOf } from "./keys.js";

export function stateOf(user, now) {
	return since("forgotten", user.forgotten_at, now) ?? since("disabled", user.disabled_at, now) ?? "active";
}

export class UserPage {
	constructor(app, name) {
		this.app = app;
		this.name = name;
		this.path = pathOf("users", name);
		this.loaded = new Loaded(() => this.#read(), app.update);
		this.ask = asking(app, this.path, name, this.load);
	}

	load = () => this.loaded.load();

	async #read() {
		const { api } = this.app;
		const list = async (path) => (await api.get(path, { user: this.name, limit: 1000 })).data;
		const [user, counters, keys] = await Promise.all([api.get(this.path), list("/counters"), list("/keys")]);
		return { user, counters, keys };
	}

	render() {
		const { app, path, load } = this;
		const show = (value) => [this.#who(value), section("Quotas now", this.#quotas(value)), keysOf(app, value, load)];
		return [h("p", { key: path }, h("a", { href: app.href("users") }, "All users")), shown(this.loaded, show)];
	}

	#who({ user }) {
		const { may, now } = this.app;
		const isOfFile = user.source === "file";
		const act = (isPossible, label, more) =>
			buttonIf(may.change && !isOfFile && !user.forgotten_at && isPossible, label, () => this.ask(label, more()));
		return h(
			"section.card",
			h("h2", user.user),
			h(
				"dl",
				pair("Origin", isOfFile ? "quotas.yaml, where it is changed" : user.source, user.is_service && ", a program"),
				pair("Groups", user.groups.join(", ") || "–"),
				pair("E-mail", user.email ?? "–"),
				user.linked.length > 0 && pair("Linked identities", user.linked.join(", ")),
				pair("State", stateOf(user, now)),
			),
			h(
				"div.row",
				act(true, "Change", () => this.#change()),
				act(!user.disabled_at, "Disable", () => ({ content: "Calls with its keys are then refused.", ...CUT })),
				act(user.disabled_at, "Enable", () => ({ content: "Calls with its keys are then accepted." })),
				act(true, "Forget", () => this.#forget()),
			),
		);
	}

	#quotas({ counters: rows }) {
		const { app, name: user } = this;
		const link = (view, text) => h("a", { href: app.href(view, { user }) }, text);
		return [
			rows.length ? counterTable(app, { caption: "Quotas now", rows, done: this.load }) : empty("There are none."),
			h("p.row", link("explain", "Explain which quotas bind a call"), link("usage", "What was used by day")),
		];
	}

	#change() {
		const fields = { labels: { email: "E-mail" } };
		const body = ({ groups, email }) => ({ groups: groups ?? [], email: email ?? "" }); // null would change nothing
		return { label: "Save", to: this.path, method: "PATCH", schema: "UserChange", fields, body };
	}

	#forget() {
		const content = "Its records get a pseudonym, its keys are revoked, and its calls end. This can't be undone.";
		const done = ({ pseudonym }) => {
			say(`The records now have the name ${pseudonym}.`);
			this.app.go("users");
		};
		return { label: "Forget for ever", content, kind: "danger", done };
	}
}
