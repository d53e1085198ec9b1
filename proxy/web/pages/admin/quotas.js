// Groups and their quotas. Those of the file can only be read.

import { Loaded, pathOf } from "../common/api.js";
import { count, number, per, title } from "../common/format.js";
import { badge, buttonIf, copyButton, empty, h, notice, shown, table } from "../common/parts.js";
import { buttons, change, confirm } from "./actions.js";
import { Editor, isOfPolicy } from "./editor.js";
import { Form, measuresOf } from "./form.js";
import { ModelQuotas } from "./model_quotas.js";

const LABELS = { per: "Window", shared: "One pot for the whole group" };

export class Quotas {
	static title = "Quotas";

	constructor(app) {
		this.app = app;
		this.policy = new Loaded(() => this.#read(), app.update);
	}

	move([tab], { model = "" }) {
		this.byModel = tab === "by-model" ? new ModelQuotas(this.app, model) : null;
		this.policy.load();
	}

	take(name, data) {
		if (isOfPolicy(name, data)) this.policy.load();
		this.byModel?.editor.value?.take(name, data);
	}

	render() {
		const tab = (label, path, isCurrent) =>
			h("a", { href: this.app.href(path), "aria-current": isCurrent ? "page" : null }, label);
		const tabs = [tab("By group", "quotas", !this.byModel), tab("By model", "quotas/by-model", this.byModel)];
		const show = (policy) => (this.byModel ? this.byModel.render(policy, quotaTable) : this.#groups(policy));
		return [h("nav.tabs", { "aria-label": "Quotas" }, tabs), shown(this.policy, show)];
	}

	async #read() {
		const get = async (path) => (await this.app.api.get(path)).data;
		const [groups, quotas] = [await get("/groups"), await get("/quotas")];
		const models = this.app.may.seeAll ? await get("/models") : []; // a manager may not read them
		return { groups, quotas, models, measures: measuresOf(await this.app.schema("SetQuota")) };
	}

	#groups({ groups, quotas, measures }) {
		const create = this.#button("New group", () => this.#editGroup(), { kind: "main" });
		if (!groups.length) return empty(h("p", "There are no groups yet. Make a group first, then its quotas."), create);
		const own = ({ name }) => quotas.filter((each) => each.group === name);
		return [
			h("div.row.spread", h("p.quiet", "Groups are in the order in which they admit calls."), create),
			groups.map((group) => this.#group(group, own(group), measures)),
		];
	}

	#group(group, quotas, measures) {
		const { name, models, unlimited } = group;
		const act = (quota) => [
			this.#button("Edit", () => this.#editQuota(name, quota.name)),
			this.#button("Delete", () => this.#delete(quota), { "aria-label": `Delete ${quota.id}` }),
		];
		const actions = [
			this.app.may.seeAll && h("a.button", { href: this.app.href("users", { group: name }) }, "Members"),
			isMade(group) && this.#button("Edit group", () => this.#editGroup(name)),
			isMade(group) && this.#button("Delete group", () => this.#delete(group)),
			!unlimited && this.#button("New quota", () => this.#editQuota(name)),
		];
		const head = h("div.row", h("h2", name), origin(group), unlimited && badge("unlimited"));
		return h(
			"section",
			{ key: name, "aria-label": name },
			h("div.row.spread", head, h("div.row", actions)),
			models && h("p.quiet", "Only these models: ", h("span.mono", models.join(", "))),
			effect(group),
			quotas.length ? quotaTable(quotas, measures, act) : !unlimited && h("p.quiet", "It has no quotas yet."),
		);
	}

	#button(...parts) {
		return buttonIf(this.app.may.change, ...parts);
	}

	#editGroup(name) {
		const path = name && pathOf("groups", name);
		const [title, method] = name ? [`Group ${name}`, "PUT"] : ["New group", "POST"];
		const fields = { only: ["name", "models", "unlimited"].slice(name ? 1 : 0) };
		change(this.app, { title, path, to: path ?? "/groups", method, schema: "NewGroup", fields, label: "Save" });
	}

	async #editQuota(group, name) {
		const { app } = this;
		const schema = await app.schema(name ? "QuotaFields" : "SetQuota"); // a name can't be changed
		const path = (typed) => pathOf("groups", group, "quotas", name ?? typed);
		const read = async () => {
			const { value, etag } = await app.api.send("GET", path());
			return { values: value.fields, etag };
		};
		const editor = new Editor(app, {
			read: name && read,
			make: (values = { per: "24h" }, changed) => new Form(schema, { values, labels: LABELS, changed }),
			send: ({ value: { name: typed, ...body } }, more) => app.api.send("PUT", path(typed), { body, ...more }),
			isComplete: ({ value }) => value.name !== "" && measuresOf(schema).some((each) => value[each] !== null),
			done: () => app.close(dialog),
		});
		if (!(await app.run(() => editor.open()))) return;
		const dialog = {
			title: name ? `Quota ${group}/${name}` : `New quota of ${group}`,
			render: () => editor.render(h("div.grid", editor.form.render()), buttons(app, "Save")),
			take: editor.take,
		};
		app.open(dialog);
	}

	#delete({ id, group, name, etag: match }) {
		const what = id ? `the quota ${id}` : `the group ${name} with its quotas`;
		const path = id ? pathOf("groups", group, "quotas", name) : pathOf("groups", name);
		const send = (query) => this.app.api.send("DELETE", path, { query, match });
		this.app.run(async () => {
			const { members, warnings } = (await send({ dry_run: true })).value.effects;
			const text = `This touches ${members ? count(members, "user") : "nobody"}. Calls in flight go on.`;
			const content = () => [text, ...warnings].map((each) => h("p", each));
			confirm(this.app, { title: `Delete ${what}?`, content, label: "Delete", action: () => send() });
		});
	}
}

function quotaTable(rows, measures, actions) {
	const limit = (value, measure) =>
		value !== null && h("div.amount", `${number(value)} ${title(measure).toLowerCase()}`);
	return table("Quotas", rows, (quota) => quota.id, {
		Quota: (quota) => [h("strong", quota.id), effect(quota)],
		Limits: ({ fields }) => measures.map((each) => limit(fields[each], each)),
		Window: ({ fields }) => per(fields.per),
		Counts: ({ fields }) => (fields.shared ? "one pot" : "each member"),
		Models: ({ fields }) => h("span.mono", fields.models.join(", ")),
		Enforce: ({ fields }) => fields.enforce,
		From: origin,
		"": (quota) => (isMade(quota) ? actions?.(quota) : copyButton(quota.yaml, "Copy YAML")),
	});
}

function origin(record) {
	return isMade(record) ? badge("made here", "good") : badge("file");
}

function effect({ without_effect: reason }) {
	return reason && notice("warning", `No effect: ${reason}.`);
}

function isMade(record) {
	return record.origin === "database";
}
