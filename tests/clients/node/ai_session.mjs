// The Vercel AI SDK with its provider for OpenAI-compatible servers. The programs beside this file run it in one
// version each.

import { LOOK_UP, QUESTION, runSteps, usageOf } from "./steps.mjs";

/** Run the steps with these versions of `ai` and of the provider. */
export async function run(ai, createOpenAICompatible) {
  globalThis.AI_SDK_LOG_WARNINGS = false;
  await runSteps(
    ({ baseURL, apiKey }) => sessionOf(ai, createOpenAICompatible, { name: "proxy", baseURL, apiKey }),
    describe,
  );
}

function sessionOf(ai, createOpenAICompatible, settings) {
  const proxy = createOpenAICompatible({ ...settings, includeUsage: true });
  // By default the SDK tries a call again after every 429, three times within six seconds, whatever the headers say.
  const off = { isEnabled: false };
  const quiet = { maxRetries: 0, telemetry: off, experimental_telemetry: off }; // its name in version 7, and in 6
  const tools = {
    [LOOK_UP.name]: ai.tool({ description: LOOK_UP.description, inputSchema: ai.jsonSchema(LOOK_UP.parameters) }),
  };

  function generate(name, more) {
    return ai.generateText({ model: proxy.chatModel(name), prompt: QUESTION, ...quiet, ...more });
  }

  // An error in a stream is one of its parts, also for programs that read only the text and set `onError`.
  async function streamChat(model, more) {
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
      return { text: answer.text, usage: printed(answer.usage) };
    },
    async stream(model) {
      const { answer } = await streamChat(proxy.chatModel(model));
      return { text: await answer.text, usage: printed(await answer.usage) };
    },
    async stream_without_usage(model) {
      const { answer, without_choices } = await streamChat(createOpenAICompatible(settings).chatModel(model));
      const usage = await answer.usage;
      return { text: await answer.text, usage: isReported(usage) ? printed(usage) : null, without_choices };
    },
    async tools(model) {
      const answer = await generate(model, { tools });
      return toolResult(answer.toolCalls, answer.usage);
    },
    async tools_stream(model) {
      const { answer } = await streamChat(proxy.chatModel(model), { tools });
      return toolResult(await answer.toolCalls, await answer.usage);
    },
    async embeddings(model) {
      const answer = await ai.embed({ model: proxy.embeddingModel(model), value: "a river", ...quiet });
      return { dimensions: answer.embedding.length, usage: usageOf(answer.usage.tokens) };
    },
    async images(model) {
      const answer = await ai.generateImage({ model: proxy.imageModel(model), prompt: "a river", ...quiet });
      // Version 6 does not report the usage of an image.
      const usage = isReported(answer.usage) ? printed(answer.usage) : null;
      return { bytes: answer.image.uint8Array.length, usage };
    },
  };
}

function toolResult([call], usage) {
  return { name: call.toolName, arguments: call.input, usage: printed(usage) };
}

function isReported(usage) {
  return usage.inputTokens !== undefined;
}

function printed(usage) {
  return usageOf(usage.inputTokens, usage.outputTokens);
}

// The error of a stream has no status. Version 6 throws the JSON object of the stream, which has no class.
function describe(error) {
  return {
    class: error.name ?? error.constructor.name,
    status: error.statusCode ?? null,
    code: (error.data?.error ?? error).code ?? null,
    ...(error.responseHeaders && { retry_after: error.responseHeaders["retry-after"] }),
  };
}
