// What can be done from several views.

import { Problem, pathOf } from "../common/api.js";
import { title } from "../common/format.js";
import { button, h, notice, say } from "../common/parts.js";
import { Form } from "./form.js";

const DAY_MS = 86_400_000;
const CHANGED = "Somebody has changed this meanwhile. It was loaded again: check it, and repeat.";

const same = (value) => value;

/**
 * Ask before something is done. `content()` describes it. If it shows a `form`, that shows what is
 * wrong. `done` is called after the action.
 */
export function confirm(app, { title, content, form, label, kind = "danger", action, done }) {
	const failed = form ?? {};
	let isRunning = false;
	const onsubmit = async () => {
		if (isRunning) return; // a second click makes no second key
		isRunning = true;
		const isDone = await app.run(action, (problem) => (failed.problem = problem));
		isRunning = false;
		if (!isDone) return;
		app.close(dialog);
		done?.();
	};
	const render = () => {
		const wrong = !form && failed.problem && notice("error", failed.problem.message);
		return h("form", { onsubmit }, content(), wrong, buttons(app, label, kind));
	};
	const dialog = { title, render };
	app.open(dialog);
}

/**
 * Make or change something in a dialog. What is at `path` is read, and only that version of it is changed. The change
 * is sent `to` a path; without a `path` it makes something new there. `schema` names the fields: `fields` are options
 * of their form, `values(value)` is what they have at first, and `body(fields, value)` is what is sent.
 */
export async function change(app, { path, to = path, method = "POST", content, said, done, ...more }) {
	const { schema, fields, values = same, body = same, kind = "main", ...dialog } = more;
	let version = { value: {} };
	let form, answer;
	const read = async () => {
		if (path) version = await app.api.send("GET", path);
		const options = { ...fields, values: values(version.value), changed: app.update };
		if (form) form.set(options.values);
		else if (schema) form = new Form(await app.schema(schema), options);
	};
	if (!(await app.run(read))) return;
	const action = async () => {
		const sent = form ? body(form.value, version.value) : undefined;
		try {
			answer = (await app.api.send(method, to, { match: version.etag, body: sent })).value;
			if (said) say(said);
		} catch (error) {
			if (error.status !== 412) throw error;
			await read();
			throw new Problem(412, CHANGED);
		}
	};
	const render = () => [content && h("p", content), form?.render()];
	confirm(app, { ...dialog, kind, content: render, form, action, done: () => done?.(answer) });
}

export function buttons(app, label, kind = "main") {
	return h("footer", button("Cancel", () => app.close()), h("button", { class: kind }, label));
}

/** Grant more of a quota to the user of a counter, or without one to its pot. `measure` is the first choice. */
export async function grant(app, { done, measure, ...row }) {
	const { quota, user = null } = row;
	let counter;
	// A row may have only one of the limits, and an unused pot is in no list.
	const read = async () => ([counter = row] = (await app.api.get("/counters", { quota, user })).data);
	if (!(await app.run(read))) return;
	const { limits } = counter;
	const level = limits.find((each) => each.measure === measure) ?? limits[0];
	const until = Math.max(counter.resets_at, app.now + DAY_MS);
	change(app, {
		title: "Grant more", label: "Grant", to: "/grants", schema: "NewGrantFields", said: "Granted.", done,
		content: `More of ${quota} for ${user ?? "the whole group, which shares it"}.`,
		fields: {
			only: ["measure", "amount", "until", "reason"],
			labels: { amount: "How much more in each window" },
			help: { until: "", reason: "It is in the log, with your name." },
			options: { measure: limits.map((each) => [each.measure, title(each.measure)]) },
		},
		values: () => ({ measure: level.measure, amount: Math.ceil(level.limit / 4), until }),
		body: (value) => ({ quota, user, ...value }),
	});
}

/** Set what a counter has used to 0. That of a pot has no user. */
export function reset(app, { quota, user, done }) {
	change(app, {
		title: "Reset what is used", label: "Reset", kind: "danger", said: "Reset.", done,
		to: "/counters/reset", schema: "ResetFields", fields: { only: ["reason"] },
		content: `This sets what ${user ?? "the group"} has used of ${quota} to 0. The window stays.`,
		body: (value) => ({ quota, user, ...value }),
	});
}

export function endCall(app, { id, user, model }) {
	const content = `The answer to ${user} (${model}) is cut off. It is charged what has passed.`;
	const sent = { to: pathOf("calls", id, "end"), said: "The call ends." };
	change(app, { title: "End this call?", label: "End the call", kind: "danger", content, ...sent });
}
