// What may be sent of a text to search for, and filters: no key may get into an address.

import { field, h, say } from "../common/parts.js";

const OWN_KEY = /lqp_([2-9a-hjkmnp-z]{10})_[A-Za-z0-9]{38}(?![A-Za-z0-9])/;
export const PART_OF_OWN_KEY = /lqp_\w{10}_/;
const KEY_LENGTH_MIN = 24; // of the keys that people choose for the file
const NO_KEY = /^(req_[0-9a-f]+|[\w.:+-]+@[\w.-]+\.[a-z]+)$/i;

export const LOOKS_LIKE_KEY =
	"This looks like a key, so it was not sent. Type at most 23 characters of a longer name.";

/** A text, or the id of a key that is in it. */
export function cutKey(text) {
	return OWN_KEY.exec(text)?.[1] ?? text;
}

export function looksLikeKey(text) {
	const isLong = (word) => word.length >= KEY_LENGTH_MIN && !NO_KEY.test(word);
	return PART_OF_OWN_KEY.test(text) || text.split(/\s+/).some(isLong);
}

export function isKey(text) {
	const isFound = looksLikeKey(text);
	if (isFound) say(LOOKS_LIKE_KEY);
	return isFound;
}

/** The filters of a view: `choices` have texts by their values, `texts` labels. `go(query)` leads to others. */
export function filters(query, { choices, texts }, go, ...more) {
	const input = (name) => ({
		id: `filter-${name}`,
		onchange: ({ target }) => {
			const text = (target.value = cutKey(target.value.trim()));
			// Other fields may have long names.
			if (name !== "key" || !isKey(text)) go({ ...query, after: null, [name]: text });
		},
	});
	const choice = ([name, [label, options]]) => {
		const option = ([value, text]) => h("option", { value, selected: value === (query[name] ?? "") }, text);
		return field(label, input(name), { tag: "select", content: Object.entries(options).map(option) });
	};
	const text = ([name, label]) => field(label, { ...input(name), value: query[name], placeholder: "all" });
	const fields = [Object.entries(choices).map(choice), Object.entries(texts).map(text), more];
	return h("form.filters", fields);
}
