// The Vercel AI SDK with its provider for OpenAI-compatible servers; the programs beside this file play it in one
// version each.

import { LOOK_UP, play, QUESTION, used } from "./play.mjs";

/** Play with these versions of `ai` and of the provider. */
export async function converse(ai, createOpenAICompatible) {
  globalThis.AI_SDK_LOG_WARNINGS = false;
  await play(
    ({ baseURL, apiKey }) => session(ai, createOpenAICompatible, { name: "proxy", baseURL, apiKey }),
    describe,
  );
}

function session(ai, createOpenAICompatible, settings) {
  const proxy = createOpenAICompatible({ ...settings, includeUsage: true });
  // By itself it tries any 429 three times within six seconds, whatever our answer says.
  const off = { isEnabled: false };
  const quiet = { maxRetries: 0, telemetry: off, experimental_telemetry: off }; // its name in 7, and in 6
  const tools = {
    [LOOK_UP.name]: ai.tool({ description: LOOK_UP.description, inputSchema: ai.jsonSchema(LOOK_UP.parameters) }),
  };

  function generate(name, more) {
    return ai.generateText({ model: proxy.chatModel(name), prompt: QUESTION, ...quiet, ...more });
  }

  // An error in the stream is a part of it, also for whoever wants only the text and is told by `onError`.
  async function stream(model, more) {
    const answer = ai.streamText({
      model, prompt: QUESTION, includeRawChunks: true, onError() {}, ...quiet, ...more,
    });
    let without_choices = 0;
    for await (const part of answer.fullStream) {
      if (part.type === "error") throw part.error;
      if (part.type === "raw" && part.rawValue.choices?.length === 0) without_choices += 1;
    }
    return { answer, without_choices };
  }

  return {
    async chat(model) {
      const answer = await generate(model);
      return { text: answer.text, usage: usedBy(answer.usage) };
    },
    async stream(model) {
      const { answer } = await stream(proxy.chatModel(model));
      return { text: await answer.text, usage: usedBy(await answer.usage) };
    },
    async stream_unasked(model) {
      const { answer, without_choices } = await stream(createOpenAICompatible(settings).chatModel(model));
      const usage = await answer.usage;
      return { text: await answer.text, usage: isSaid(usage) ? usedBy(usage) : null, without_choices };
    },
    async tools(model) {
      const answer = await generate(model, { tools });
      return called(answer.toolCalls, answer.usage);
    },
    async tools_stream(model) {
      const { answer } = await stream(proxy.chatModel(model), { tools });
      return called(await answer.toolCalls, await answer.usage);
    },
    async embeddings(model) {
      const answer = await ai.embed({ model: proxy.embeddingModel(model), value: "a river", ...quiet });
      return { dimensions: answer.embedding.length, usage: used(answer.usage.tokens) };
    },
    async images(model) {
      const answer = await ai.generateImage({ model: proxy.imageModel(model), prompt: "a river", ...quiet });
      // Version 6 keeps the usage of a picture to itself.
      return { bytes: answer.image.uint8Array.length, usage: isSaid(answer.usage) ? usedBy(answer.usage) : null };
    },
  };
}

function called([call], usage) {
  return { name: call.toolName, arguments: call.input, usage: usedBy(usage) };
}

function isSaid(usage) {
  return usage.inputTokens !== undefined;
}

function usedBy(usage) {
  return used(usage.inputTokens, usage.outputTokens);
}

// What a stream breaks with has no status; version 6 hands out the error as it came, an object of no class.
function describe(error) {
  return {
    class: error.name ?? error.constructor.name,
    status: error.statusCode ?? null,
    code: (error.data?.error ?? error).code ?? null,
    ...(error.responseHeaders && { retry_after: error.responseHeaders["retry-after"] }),
  };
}
