// Numbers in the viewer's locale, and times in the viewer's time zone.

import { h } from "./render.js";

const WHOLE = new Intl.NumberFormat();
const CLOCK = { hour: "2-digit", minute: "2-digit" };
const DAY = { day: "numeric", month: "short" };
const VIEWER_ZONE = Intl.DateTimeFormat().resolvedOptions().timeZone;
const UNITS = { d: 86_400, h: 3_600, m: 60, s: 1 };

const formatters = new Map(); // by their options

let policyZone = null;

/** The time zone of calendar windows is shown where it differs from the viewer's. */
export function setPolicyZone(zone) {
	policyZone = zone && zone !== VIEWER_ZONE ? zone : null;
}

export function number(value) {
	return WHOLE.format(value);
}

export function count(value, noun) {
	return `${number(value)} ${noun}${value === 1 ? "" : "s"}`;
}

/** 7384 s → 2h 3m. A part of a second counts as a second. */
export function duration(ms) {
	let seconds = Math.max(0, Math.ceil(ms / 1000));
	const parts = [];
	for (const [unit, size] of Object.entries(UNITS)) {
		const value = Math.floor(seconds / size);
		seconds -= value * size;
		if (value || (unit === "s" && !parts.length)) parts.push(`${value}${unit}`);
		else if (parts.length) break;
	}
	return parts.slice(0, 2).join(" ");
}

/** An instant (ms): the time of day, with the day if it is not today. */
export function instant(ms, now = Date.now()) {
	if (!ms) return "–";
	const more = policyZone ? ` (${policyZone}: ${inZone(ms, now, policyZone)})` : "";
	return timeElement(ms, inZone(ms, now), more);
}

/** The same with the policy's zone always shown, for resets of calendar windows. */
export function reset(ms, now) {
	if (!policyZone || !ms) return instant(ms, now);
	return [instant(ms, now), h("span.zone", ` ${policyZone}: ${inZone(ms, now, policyZone)}`)];
}

export function ago(ms, now) {
	if (!ms) return "never";
	if (now - ms < 1000) return "now";
	return timeElement(ms, `${duration(now - ms).split(" ")[0]} ago`);
}

export function wholeInstant(ms) {
	return inForm({ dateStyle: "medium", timeStyle: "medium" }, ms);
}

export function utcDay(ms) {
	return inForm({ dateStyle: "medium", timeZone: "UTC" }, ms);
}

/** The names of a window: "day" → "a day", "6h" → "6 hours". */
export function per(text) {
	const match = /^(\d+)([smhdw])$/.exec(text);
	if (!match) return `a ${text}`;
	const unit = { s: "second", m: "minute", h: "hour", d: "day", w: "week" }[match[2]];
	return count(Number(match[1]), unit);
}

export function title(name) {
	const words = name.replaceAll("_", " ");
	return words[0].toUpperCase() + words.slice(1);
}

function timeElement(ms, text, more = "") {
	return h("time", { datetime: new Date(ms).toISOString(), title: wholeInstant(ms) + more }, text);
}

function inZone(ms, now, timeZone) {
	const isToday = inForm({ dateStyle: "short", timeZone }, ms) === inForm({ dateStyle: "short", timeZone }, now);
	const isThisYear = new Date(ms).getFullYear() === new Date(now).getFullYear();
	const day = isToday ? {} : isThisYear ? DAY : { ...DAY, year: "numeric" };
	return inForm({ ...day, ...CLOCK, timeZone }, ms);
}

/** An instant (ms) in a form of Intl. To make a formatter takes long, so they are kept. */
function inForm(options, ms) {
	const name = JSON.stringify(options);
	if (!formatters.has(name)) formatters.set(name, new Intl.DateTimeFormat(undefined, options));
	return formatters.get(name).format(ms);
}
