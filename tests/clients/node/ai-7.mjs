import * as ai from "ai-7";
import { createOpenAICompatible } from "openai-compatible-3";

import { converse } from "./ai_session.mjs";

await converse(ai, createOpenAICompatible);
