// How to point programs at this proxy. The key is never in these texts: they read it from the environment.

import { copyable, h } from "../common/parts.js";

/** For each program: what it needs. `models` are those that the user may use. */
export function setups(models) {
	const base = new URL("v1", location).href;
	const plain = models.filter((each) => /^[\w.:/@+-]+$/.test(each)); // others would have to be quoted
	const claude = plain.find((each) => each.includes("claude")) ?? "MODEL";
	return [
		setup("Python, Node and others", "In a shell. The SDKs of OpenAI read these.",
			`export OPENAI_BASE_URL=${base} OPENAI_API_KEY=$LLM_KEY`),
		setup("Codex", "In ~/.codex/config.toml. Web search would run at the upstream.", `model = "${plain[0] ?? "MODEL"}"
model_provider = "proxy"
web_search = "disabled"
[model_providers.proxy]
name = "proxy"
base_url = "${base}"
env_key = "LLM_KEY"
wire_api = "responses"`),
		setup("Claude Code", "In a shell, before you start claude. It needs models of Anthropic.",
			`export ANTHROPIC_BASE_URL=${base.slice(0, -3)} ANTHROPIC_AUTH_TOKEN=$LLM_KEY
export ANTHROPIC_MODEL=${claude} ANTHROPIC_DEFAULT_HAIKU_MODEL=${claude}`),
	];
}

function setup(program, help, text) {
	return h("details.card", h("summary", program), h("p.help", help), copyable(text, `Copy for ${program}`));
}
