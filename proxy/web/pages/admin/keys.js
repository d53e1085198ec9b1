// The keys of a user that were made at run time. A new key is shown once.

import { pathOf } from "../common/api.js";
import { ago, instant } from "../common/format.js";
import { buttonIf, copyable, empty, h, notice, since, table } from "../common/parts.js";
import { change } from "./actions.js";

const HELP = { expires_at: "Empty: never." };
const OVERLAPS = { 0: "at once", 3_600_000: "after an hour", 86_400_000: "after a day", 604_800_000: "after a week" };

export const CUT = { kind: "danger", schema: "Cut", fields: { labels: { cut: "End calls in flight at once" } } };

/** A function that asks, and then changes what is at `path`: "Revoke" is sent to its /revoke. */
export function asking(app, path, name, done) {
	return (label, more) =>
		change(app, { title: `${label} ${name}`, label, path, to: `${path}/${label.toLowerCase()}`, done, ...more });
}

export function keysOf(app, { user, keys }, load) {
	const limits = (key) => [key.groups, key.models, key.networks, key.tag].flat().filter(Boolean).join(", ") || "–";
	const mayChange = app.may.change && !user.forgotten_at;
	const list = table("Keys", keys, ({ id }) => id, {
		Key: (key) => [h("span.mono", key.id), " ", key.label],
		"Only for": limits,
		Valid: (key) => [validity(key, app.now), key.replaced_by && `, now ${key.replaced_by}`],
		"Last used": (key) => [ago(key.used_at, app.now), key.used_from && ` from ${key.used_from}`],
		"": (key) => actions(app, key, mayChange && !key.revoked_at, load),
	});
	const create = buttonIf(mayChange, "New key", () => createKey(app, user, load), { kind: "main" });
	const head = h("div.row.spread", h("h2", "Keys"), create);
	return h("section", head, keys.length ? list : empty("No key was made here."));
}

function validity({ revoked_at: revokedAt, expires_at: at }, now) {
	if (revokedAt || !at) return since("revoked", revokedAt, now) ?? "until revoked";
	return at > now ? ["until ", instant(at, now)] : since("expired", at, now);
}

function actions(app, { id, replaced_by: next }, mayChange, done) {
	const path = pathOf("keys", id);
	const ask = asking(app, path, `key ${id}`, done);
	const save = () => {
		// The field has no seconds: an instant that nobody has changed stays as it was.
		const exact = (at, before) => (at === before - (before % 60_000) ? before : at);
		const body = (now, old) => ({ label: now.label ?? "", expires_at: exact(now.expires_at, old.expires_at) });
		ask("Change", { label: "Save", to: path, method: "PATCH", schema: "KeyChange", fields: { help: HELP }, body });
	};
	const rotate = () => {
		const fields = { labels: { overlap_ms: "The old key ends" }, options: { overlap_ms: Object.entries(OVERLAPS) } };
		const values = () => ({ overlap_ms: 86_400_000 });
		ask("Rotate", { schema: "Rotation", fields, values, done: (made) => showKey(app, made, done) });
	};
	const revoke = () => ask("Revoke", { content: "Further calls are refused. This can't be undone.", ...CUT });
	return [
		h("a.button", { href: app.href("usage", { key: id }) }, "Usage"),
		buttonIf(mayChange, "Change", save),
		buttonIf(mayChange && !next, "Rotate", rotate),
		buttonIf(mayChange, "Revoke", revoke),
	];
}

function createKey(app, { user }, load) {
	const fields = { help: HELP };
	const done = (made) => showKey(app, made, load);
	const to = pathOf("users", user, "keys");
	change(app, { title: `New key for ${user}`, label: "Create", to, schema: "NewKeyFields", fields, done });
}

function showKey(app, { id, key }, closed) {
	const { api_url: url, api_port: port } = app.session;
	const base = url ?? `${location.protocol}//${location.hostname}:${port}/v1`;
	const content = [
		notice("warning", "Copy the key now. It is not shown again."),
		copyable(key, "Copy the key"),
		h("h3", "For SDKs and tools"),
		copyable(`export OPENAI_BASE_URL=${base} OPENAI_API_KEY=${key}`),
		h("h3", "In Python"),
		copyable(`from openai import OpenAI\nclient = OpenAI(base_url="${base}", api_key="${key}")`),
	];
	app.open({ title: `New key ${id}`, render: () => h("section", content), closed });
}
