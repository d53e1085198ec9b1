// The page of a user: the own quotas and use, and how to point programs at this proxy.
//
// The key is only in `sessionStorage` and headers. The page asks for one if the API does: a trusted header may do.

import { Api, Loaded } from "../common/api.js";
import { tokenChart } from "../common/chart.js";
import { EventStream } from "../common/events.js";
import { number, per, setPolicyZone, title, utcDay } from "../common/format.js";
import {
	badge, button, countdown, empty, field, levelOf, notice, pair, section, shown, table,
} from "../common/parts.js";
import { h, patch } from "../common/render.js";
import { setups } from "./setups.js";

const STORED = "llm-quota-proxy key";
const TICK_MS = 1000;
const SOON_MS = 150; // after an event, because more may come
const EVERY_MS = 10_000;
const DAY_MS = 86_400_000;
const LOST = "The connection to the proxy is lost. Trying again …";

const key = sessionStorage.getItem(STORED);
const headers = () => (key ? { authorization: `Bearer ${key}` } : {});
const api = new Api("v1", headers);
const quota = new Loaded(() => api.get("/quota"), update);
const [days, models] = ["day", "model"].map((by) => new Loaded(() => api.get("/quota/usage", { by }), update));
let problem = null; // while a key is asked for: what is wrong with the one that was given, or ""
let isLost = false;
let stream;
let soon = 0;

async function loadQuota() {
	soon = 0;
	await quota.load();
	setPolicyZone(quota.value?.timezone);
}

async function load() {
	if (document.hidden || isLost || problem !== null) return;
	await loadQuota();
	if (quota.problem) return;
	days.load();
	models.load();
	if (stream) return;
	stream = new EventStream("v1/quota/events", { headers, onEvent, onState });
	stream.start();
}

function onEvent() {
	soon ||= setTimeout(loadQuota, SOON_MS);
}

function onState(state) {
	isLost = state === "lost";
	if (state === "refused") load(); // which asks for a key if it is no longer valid
	update();
}

function ask(message) {
	sessionStorage.removeItem(STORED);
	stream?.stop();
	problem = message;
	update();
	document.getElementById("api-key").focus();
}

function use(text) {
	sessionStorage.setItem(STORED, text);
	location.reload();
}

function update() {
	patch(document.getElementById("app"), problem === null ? page() : form());
}

function form() {
	const pattern = "\\s*[\\x21-\\x7e]+\\s*"; // a header can have no other characters
	const input = { id: "api-key", type: "password", autocomplete: "off", required: true, pattern };
	const help = "It stays in this tab of your browser and is sent only to this proxy.";
	const content = [field("Your API key", input, { help, error: problem }), h("button.main", "Show my usage")];
	const onsubmit = () => use(document.getElementById("api-key").value.trim());
	return h("main.login", { key: "login" }, h("h1", "Your usage"), h("form", { onsubmit }, content));
}

function page() {
	const head = [h("p.brand", "llm-quota-proxy"), key && button("Forget this key", () => use(""))];
	const content = [isLost && notice("error", LOST), h("h1", "Your usage"), shown(quota, parts)];
	return h("div.own", { key: "page" }, h("header.row", head), h("main", content));
}

function parts({ user, groups, models: names, unlimited, data }) {
	const first = "Put your key into the environment variable LLM_KEY.";
	const own = [pair("You are", user), pair("Your groups", groups.join(", ") || "none", unlimited && " (unlimited)")];
	return [
		h("dl.card", own, pair("Your models", names.join(", ") || "none")),
		section("Your quotas", data.length ? h("ul.columns", data.map(card)) : empty("You have no quotas.")),
		section("Use by day", shown(days, byDay)),
		section("Use by model", shown(models, ({ data: rows }) => usageTable("Model", rows, ({ model }) => model))),
		section("Use it in your programs", h("p", first), setups(names)),
	];
}

function card({ id, models: names, shared, enforce, window, ...more }) {
	const limit = ([measure, use]) => {
		const left = `${number(use.remaining)} ${title(measure).toLowerCase()} remaining`;
		return h("div", h("strong", left), levelOf({ measure, ...use }));
	};
	const isLimit = ([, use]) => use?.limit >= 0;
	const about = `Window: ${per(window.per)}. Models: ${names.join(", ").replace(/^\*$/, "all")}.`;
	const badges = [shared && badge("shared by the group"), enforce === "shadow" && badge("shadow")];
	const resets = h("p", "Resets: ", countdown(window.resets_at * 1000, api.now()));
	const limits = Object.entries(more).filter(isLimit).map(limit);
	return h("li.card", { key: id }, h("div.row", h("h3", id), badges), limits, resets, h("p.quiet", about));
}

function byDay({ since, data }) {
	const used = new Map(data.map((each) => [Date.parse(each.day), each]));
	const more = { since: Date.parse(since), until: api.now(), step: DAY_MS, labelOf: utcDay };
	const chart = tokenChart({ caption: "Tokens by day (UTC)", used, ...more });
	const list = usageTable("Day", data.toReversed(), (each) => utcDay(Date.parse(each.day)));
	return data.length ? [chart, h("details", h("summary", "As a table"), list)] : list;
}

function usageTable(name, rows, cell) {
	if (!rows.length) return empty("You have made no calls in the last 30 days. Below is how to make the first.");
	const amount = (field) => [title(field), ["number", (each) => number(each[field])]];
	const amounts = Object.fromEntries(["calls", "input_tokens", "output_tokens"].map(amount));
	return table(`Use by ${name.toLowerCase()} in the last 30 days`, rows, cell, { [name]: cell, ...amounts });
}

api.refused = ({ message }) => ask(key ? message : "");
setInterval(update, TICK_MS);
setInterval(load, EVERY_MS);
load();
