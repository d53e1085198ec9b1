import * as ai from "ai-6";
import { createOpenAICompatible } from "openai-compatible-2";

import { converse } from "./ai_session.mjs";

await converse(ai, createOpenAICompatible);
