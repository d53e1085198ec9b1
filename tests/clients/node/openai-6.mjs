import OpenAI, { toFile } from "openai-6";

import { converse } from "./openai_session.mjs";

await converse(OpenAI, toFile);
