import * as ai from "ai-7";
import { createOpenAICompatible } from "openai-compatible-3";

import { run } from "./ai_session.mjs";

await run(ai, createOpenAICompatible);
