// The quotas for one model, of all groups: a row for each, saved as a whole.

import { Loaded } from "../common/api.js";
import { title } from "../common/format.js";
import { empty, field, h, notice, say, shown, table } from "../common/parts.js";
import { Editor } from "./editor.js";
import { Form, measuresOf } from "./form.js";

const LABELS = { per: "Window", requests: "Uses (requests)", shared: "One pot" };
const HELP =
	"Each limit is for each member, not shared, unless it is one pot. A token is about four characters. " +
	"A row without a limit is no quota.";

export class ModelQuotas {
	constructor(app, model) {
		this.app = app;
		this.model = model;
		this.editor = new Loaded(() => this.#open(), app.update);
		if (model && app.may.change) this.editor.load();
	}

	render({ quotas, models, measures }, quotaTable) {
		const { app, model } = this;
		const mayChange = app.may.change;
		const onchange = ({ target }) => app.go("quotas/by-model", { model: target.value.trim() });
		const input = { id: "model", value: model, list: "models", onchange, placeholder: "gpt-4o*" };
		const own = quotas.filter((each) => each.fields.models.join() === model);
		const fixed = own.filter((each) => !mayChange || each.origin === "file");
		const save = h("p", h("button.main", "Save all"));
		const form = (editor) => editor.render([h("p.quiet", HELP), editor.form.render()], save);
		return [
			h(
				"div.row.spread",
				h("h2", model ? `Quotas for ${model} alone` : "Quotas for one model"),
				field("Model, or a pattern of names", input),
				h("datalist", { id: "models" }, models.map(({ name }) => h("option", { value: name }))),
			),
			!model && empty("Choose a model to see and set how much of it each group may use."),
			fixed.length > 0 && quotaTable(fixed, measures),
			model && mayChange && shown(this.editor, form),
		];
	}

	async #open() {
		const { model } = this;
		const { api } = this.app;
		const schema = await this.app.schema("SetModelQuota");
		const groups = (await api.get("/groups")).data.filter((each) => !each.unlimited).map((each) => each.name);
		const editor = new Editor(this.app, {
			read: async () => {
				const { value, etag } = await api.send("GET", "/quotas", { query: { model } });
				return { values: value.data.filter((each) => each.origin === "database"), etag };
			},
			make: (quotas, changed) => new Rows(schema, groups, quotas, changed),
			send: ({ quotas }, more) => api.send("PUT", "/quotas", { body: { model, quotas }, ...more }),
			isComplete: ({ quotas }) => quotas.length > 0,
			done: () => {
				say("Saved.");
				this.editor.load();
			},
		});
		await editor.open();
		return editor;
	}
}

class Rows {
	problem = null; // it names a field as in the body: quotas.1.tokens

	constructor(schema, groups, quotas, changed) {
		this.measures = measuresOf(schema);
		const others = groups.filter((group) => !quotas.some((each) => each.group === group));
		const row = (values) => new Form(schema, { values, labels: LABELS, changed });
		const made = quotas.map(({ group, name, fields }) => row({ ...fields, group, name }));
		this.rows = [...made, ...others.map((group) => row({ group, per: "24h" }))];
	}

	get #filled() {
		return this.rows.filter(({ value }) => this.measures.some((name) => value[name] !== null));
	}

	get quotas() {
		return this.#filled.map((row) => row.value);
	}

	get value() {
		return { quotas: Object.fromEntries(this.quotas.map((each) => [`${each.group}/${each.name ?? "new"}`, each])) };
	}

	render() {
		const errors = (i) => this.problem?.errors.filter((each) => each.field.startsWith(`quotas.${i}.`)) ?? [];
		const filled = this.#filled;
		for (const row of this.rows) row.problem = { errors: errors(filled.indexOf(row)) };
		const column = (name) => [LABELS[name] ?? title(name), (row) => row.render([name])];
		const cells = Object.fromEntries([...this.measures, "per", "shared"].map(column));
		const group = { Group: ["wide", (row) => h("strong", row.value.group)] };
		const rows = table("Quotas of the groups", this.rows, (row) => row.id, { ...group, ...cells });
		return [this.problem && notice("error", this.problem.message), h("div.cells", rows)];
	}
}
