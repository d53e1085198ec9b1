// Forms that are made from the JSON Schema of the API, so that a new field of the API needs no new page.

import { per, title } from "../common/format.js";
import { field, h, notice } from "../common/parts.js";

const DURATIONS = ["1h", "6h", "24h", "7d"];
const INTERVALS = ["minute", "hour", "day", "week", "month", "quarter", "year"];
const CUSTOM = "custom";

let forms = 0;

/**
 * The fields of a form, what is typed into them, and the `problem` with them. `only` has their names (default: all of
 * the schema), `values` what they have at first, `labels` and `help` other texts than the schema. `options` are pairs
 * of value and text. `changed()` is called when the viewer has changed something.
 */
export class Form {
	constructor(schema, { values = {}, only, labels = {}, help = {}, options = {}, changed }) {
		this.names = only ?? Object.keys(schema.properties);
		Object.assign(this, { schema, labels, help, options, changed });
		this.set(values);
	}

	set(values) {
		this.texts = Object.fromEntries(this.names.map((name) => [name, textOf(this.#kind(name), values[name])]));
		this.isCustomWindow = undefined;
		this.problem = null;
		this.id = `form${++forms}`; // new elements, which have no text of the viewer
	}

	get value() {
		const values = this.names.map((name) => [name, valueOf(this.#kind(name), this.texts[name])]);
		return Object.fromEntries(values.filter(([, value]) => value !== undefined));
	}

	/** The fields, or those of `names`. What is wrong with none of them is above the first. */
	render(names = this.names) {
		const isOfField = this.problem?.errors.some((each) => this.names.includes(fieldOf(each)));
		const isAbove = this.problem && !isOfField && names[0] === this.names[0];
		return [isAbove && notice("error", this.problem.message), names.map((name) => this.#field(name))];
	}

	#label(name) {
		return this.labels[name] ?? title(name);
	}

	#field(name) {
		const kind = this.#kind(name);
		const text = this.texts[name];
		const help = this.help[name] ?? this.schema.properties[name].description;
		const error = this.problem?.errors.find((each) => fieldOf(each) === name)?.detail;
		const oninput = ({ target }) => this.#type(name, kind.type === "boolean" ? target.checked : target.value);
		const input = { id: `${this.id}-${name}`, oninput };
		if (name === "per") return this.#windowField(input, { help, error });
		if (kind.options) {
			const content = kind.options.map(([value, shown]) => h("option", { value, selected: value === text }, shown));
			return field(this.#label(name), input, { help, error, tag: "select", content });
		}
		const state = kind.type === "boolean" ? { checked: text } : { value: text };
		const required = this.schema.required?.includes(name);
		return field(this.#label(name), { ...input, ...kind.input, ...state, required }, { help, error });
	}

	#type(name, text) {
		this.texts[name] = text;
		this.changed();
	}

	#windowField({ id, oninput }, more) {
		const text = this.texts.per;
		const isCustom = this.isCustomWindow ?? (text !== "" && ![...DURATIONS, ...INTERVALS].includes(text));
		const option = (value) => h("option", { value, selected: !isCustom && value === text }, per(value));
		const choose = ({ target }) => {
			this.isCustomWindow = target.value === CUSTOM;
			this.#type("per", this.isCustomWindow ? "" : target.value);
		};
		const content = [
			h("optgroup", { label: "From the first call on" }, DURATIONS.map(option)),
			h("optgroup", { label: "By the calendar" }, INTERVALS.map(option)),
			h("option", { value: CUSTOM, selected: isCustom }, "Custom duration"),
		];
		const input = { id: `${id}-custom`, value: text, oninput, placeholder: "90m" };
		const custom = isCustom && field("Duration", input, { help: "90s, 15m, 6h, 7d or 2w, from the first call on." });
		return [field(this.#label("per"), { id, oninput: choose }, { ...more, tag: "select", content }), custom];
	}

	#kind(name) {
		const kind = kindOf(this.schema.properties[name]);
		return { ...kind, options: this.options[name] ?? kind.options };
	}
}

export function measuresOf(schema) {
	return Object.keys(schema.properties).filter((name) => "x-measure" in schema.properties[name]);
}

function localTime(ms) {
	return new Date(ms - new Date(ms).getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
}

function fieldOf(error) {
	return error.field.split(".").pop();
}

function kindOf(schema) {
	const branches = (schema.anyOf ?? [schema]).flatMap((each) => each.anyOf ?? [each]);
	const isNullable = branches.some((each) => each.type === "null");
	const branch = branches.find((each) => each.type !== "null");
	if (branch.enum) {
		const options = branch.enum.map((each) => [each, each]);
		return { type: "string", isNullable, options, initial: schema.default ?? branch.default };
	}
	if (branch.type === "boolean") return { type: "boolean", input: { type: "checkbox" } };
	if (branch.type === "array") return { type: "array", isNullable, input: { placeholder: "any" } };
	if (branch.format === "epoch-ms") return { type: "instant", isNullable, input: { type: "datetime-local" } };
	if (branches.some((each) => each.type === "string")) return { type: "string", isNullable };
	return { type: "integer", isNullable, input: { inputmode: "numeric" } };
}

function textOf({ type, initial }, value) {
	if (type === "boolean") return value ?? false;
	if (value === null || value === undefined) return initial ?? "";
	if (type === "array") return value.join(", ");
	return type === "instant" ? localTime(value) : String(value);
}

function valueOf({ type, isNullable }, text) {
	if (type === "boolean") return text;
	const given = text.trim();
	if (given === "") return isNullable ? null : { array: [], string: "" }[type];
	if (type === "array") return given.split(/[\s,]+/);
	if (type === "instant") return Date.parse(given);
	// What is no number is sent as it is, and the API says so.
	return type === "integer" && /^-?\d{1,15}$/.test(given) ? Number(given) : given;
}
