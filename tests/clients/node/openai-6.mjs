import OpenAI, { toFile } from "openai-6";

import { converse } from "./openai_steps.mjs";

await converse(OpenAI, toFile);
