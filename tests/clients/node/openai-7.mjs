import OpenAI, { toFile } from "openai-7";

import { run } from "./openai_session.mjs";

await run(OpenAI, toFile);
