// Editing of what others may edit too: a dry run says what a change would do, and conflicts are shown.

import { Loaded } from "../common/api.js";
import { button, h, notice } from "../common/parts.js";
import { sides } from "./log.js";

const PAUSE_MS = 300; // after typing

export function isOfPolicy(name, data) {
	return name === "snapshot" || (name === "change" && /^(group|quota|policy)/.test(data.action));
}

/**
 * A form, and the version of what it edits. `read()` gives that, as `values` and `etag`; without it, something new is
 * made. `make(values, changed)` makes the form. `send(form, options)` sends it; if it `isComplete(form)`, a dry run
 * is the preview. `done()` is called when it is saved, or gone.
 */
export class Editor {
	#isChanged;
	#base = { etag: null }; // the version that is edited
	#conflict; // the version of somebody else
	#timer;
	#isSaving;

	constructor(app, parts) {
		this.app = app;
		Object.assign(this, parts);
		const dryRun = async () => this.isComplete(this.form) && (await this.#send({ dry_run: true })).value;
		this.preview = new Loaded(dryRun, app.update);
	}

	async open() {
		this.#show(this.read ? await this.read() : this.#base);
	}

	take = (name, data) => {
		if (this.read && isOfPolicy(name, data)) this.app.run(() => this.#compare(data));
	};

	render(content, buttons) {
		if (this.#conflict) return this.#renderConflict(this.#conflict);
		const { value, problem } = this.preview;
		const outcome = h("div.outcome", value && !problem && renderPreview(value), buttons);
		return h("form", { onsubmit: this.#save, key: "edit" }, content, outcome);
	}

	#changed = () => {
		this.#isChanged = true;
		clearTimeout(this.#timer);
		this.#timer = setTimeout(() => this.#try(), PAUSE_MS);
		this.app.update();
	};

	#save = async () => {
		clearTimeout(this.#timer);
		this.#isSaving = true; // its own event is no conflict
		if (await this.app.run(() => this.#send(), this.#failed)) return this.done();
		this.#isSaving = false;
	};

	#send(query) {
		return this.send(this.form, { match: this.#base.etag, query });
	}

	async #try() {
		await this.preview.load();
		this.#failed(this.preview.problem);
	}

	#failed = (problem) => {
		this.form.problem = problem;
		if (problem?.status === 412 && this.read) this.take("snapshot");
	};

	async #compare(event) {
		if (this.#isSaving) return;
		const gone = (error) => (error.status === 404 ? { etag: null } : Promise.reject(error));
		const theirs = await this.read().catch(gone);
		if (theirs.etag === this.#base.etag) return;
		if (theirs.values && !this.#isChanged) this.#show(theirs);
		// A dry run may have found the conflict before the event came that says who it was.
		else this.#conflict = { event: this.#conflict?.event?.actor ? this.#conflict.event : event, ...theirs };
	}

	#show(version) {
		this.form = this.make(version.values, this.#changed);
		this.#isChanged = false;
		this.#keep(version);
	}

	#keep(version) {
		this.#base = version;
		this.#conflict = null;
		this.#try();
	}

	#renderConflict(theirs) {
		const { values, event } = theirs;
		const who = h("strong", event?.actor ?? "Somebody");
		const use = button("Use theirs", () => (values ? this.#show(theirs) : this.done()));
		const keep = button("Keep mine", () => this.#keep(theirs));
		return h(
			"section",
			{ key: "conflict" },
			notice("warning", who, ` ${values ? "changed" : "deleted"} this while you were editing it.`),
			values && sides(this.make(values).value, this.form.value, ["Theirs", "Yours"]),
			h("footer.row", use, keep),
		);
	}
}

function renderPreview({ sentence, sentences, data, effects }) {
	const texts = sentences?.map((each, i) => `${data[i].id}: ${each}`) ?? [sentence];
	const warnings = effects.warnings.map((each) => notice("warning", each));
	return h("div.preview", { key: "preview", "aria-live": "polite" }, texts.map((each) => h("p", each)), warnings);
}
