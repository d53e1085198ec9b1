// A table of counters: what is used and left of each quota, when it resets, and what can be done about it.

import { number } from "../common/format.js";
import { badge, buttonIf, countdown, h, levelOf, table } from "../common/parts.js";
import { grant, reset } from "./actions.js";
import { keyOf } from "./live.js";

/** `first` are further columns, `actions(row)` replace Reset. Without `done` rows stay as given, without buttons. */
export function counterTable(app, { caption, rows, first, refusedBy = [], actions, done }) {
	const act = (row) => [
		buttonIf(app.may.grant, "Grant", () => grant(app, { ...row, done })),
		actions ? actions(row) : buttonIf(app.may.grant, "Reset", () => reset(app, { ...row, done })),
	];
	const badges = (row) => [
		refusedBy.includes(row.quota) && badge("refuses", "full"),
		row.shared && badge("shared by the group"),
		row.grants?.length > 0 && badge("with a grant"),
		row.enforce === "shadow" && badge("shadow: refuses nobody"),
	];
	const level = (each) => [levelOf(each), h("div.quiet", `${number(each.remaining)} left`)];
	const newest = rows.map((each) => (done ? app.live.newest(each, app.now) : each));
	return table(caption, newest, (row) => `${keyOf(row)} ${row.measure}`, {
		...first,
		Quota: ["wide", (row) => [row.quota, badges(row).map((each) => each && [" ", each])]],
		Used: (row) => row.limits.map(level),
		Resets: ["wide", (row) => countdown(row.resets_at, app.now)],
		...(done && { "": act }),
	});
}

/** A column: whose counter it is. */
export function whose(app) {
	return { User: ["wide", (row) => (row.user ? userLink(app, row.user) : `all of ${row.group}`)] };
}

export function userLink({ href, may }, user) {
	return may.seeAll ? h("a", { href: href("users", { user }) }, user) : user;
}
