import * as ai from "ai-6";
import { createOpenAICompatible } from "openai-compatible-2";

import { converse } from "./ai_steps.mjs";

await converse(ai, createOpenAICompatible);
