import * as ai from "ai-6";
import { createOpenAICompatible } from "openai-compatible-2";

import { run } from "./ai_session.mjs";

await run(ai, createOpenAICompatible);
