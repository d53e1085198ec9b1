import OpenAI, { toFile } from "openai-6";

import { run } from "./openai_session.mjs";

await run(OpenAI, toFile);
