import OpenAI, { toFile } from "openai-7";

import { converse } from "./openai_session.mjs";

await converse(OpenAI, toFile);
