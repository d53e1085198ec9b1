// Charts as SVG. A table beside them says the same, so they are one image for screen readers.

import { h } from "./render.js";

const HEIGHT = 100;
const SHORT = new Intl.NumberFormat(undefined, { notation: "compact" }); // 1234567 → 1.2M

/** Bars of tokens, one for each `step` (ms). `used` has rows of usage by their instants. */
export function tokenChart({ caption, used, since, until, step, labelOf }) {
	const rows = [];
	for (let at = since; at <= until; at += step) {
		const { input_tokens: input = 0, output_tokens: output = 0 } = used.get(at) ?? {};
		rows.push({ input, output });
	}
	const scale = HEIGHT / Math.max(1, ...rows.map((row) => row.input + row.output));
	const part = (name, x, below, value) => {
		const y = HEIGHT - (below + value) * scale;
		return h("rect", { class: name, x: x + 0.1, y, width: 0.8, height: value * scale });
	};
	const bar = ({ input, output }, x) => [part("first", x, 0, input), part("second", x, input, output)];
	const image = { role: "img", "aria-label": caption, viewBox: `0 0 ${rows.length} ${HEIGHT}` };
	return h(
		"figure.chart",
		h("figcaption.legend", h("span", "Input tokens"), h("span", "Output tokens")),
		h("p.scale", SHORT.format(HEIGHT / scale)),
		h("svg", { ...image, preserveAspectRatio: "none" }, rows.map(bar)),
		h("p.scale", h("span", labelOf(since)), h("span", labelOf(until))),
	);
}
