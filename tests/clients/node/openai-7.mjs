import OpenAI, { toFile } from "openai-7";

import { converse } from "./openai_steps.mjs";

await converse(OpenAI, toFile);
