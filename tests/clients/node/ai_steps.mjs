// What the Vercel AI SDK is asked to do through its provider for OpenAI-compatible servers, whichever version plays.

import { play, proxy } from "./play.mjs";

const prompt = "Say hello";

/** Play with these versions of `ai` and of the provider; both log to the console what they don't like. */
export async function converse(ai, createOpenAICompatible) {
  globalThis.AI_SDK_LOG_WARNINGS = false;
  const off = { maxRetries: 0, experimental_telemetry: { isEnabled: false } };

  function provider(more) {
    return createOpenAICompatible({ name: "proxy", ...proxy, ...more });
  }

  const asked = provider({ includeUsage: true });
  const model = (name = "gpt-4o-mini") => asked.chatModel(name);

  async function stream(from, simulate) {
    const options = simulate ? { providerOptions: { proxy: { metadata: { simulate } } } } : {};
    const answer = ai.streamText({ model: from, prompt, ...off, ...options, onError() {} });
    let text = "";
    for await (const part of answer.fullStream) {
      if (part.type === "error") throw part.error;
      if (part.type === "text-delta") text += part.text;
    }
    return { text, usage: await answer.usage };
  }

  const steps = {
    async chat() {
      const answer = await ai.generateText({ model: model(), prompt, ...off });
      return { text: answer.text, usage: answer.usage };
    },
    stream: () => stream(model()),
    stream_without_usage: () => stream(provider({}).chatModel("gpt-4o-mini")),
    async tools() {
      const weather = ai.tool({
        inputSchema: ai.jsonSchema({ type: "object", properties: { city: { type: "string" } }, required: ["city"] }),
      });
      const answer = await ai.generateText({ model: model("tools"), prompt, tools: { weather }, ...off });
      const { toolName, input } = answer.toolCalls[0];
      return { name: toolName, arguments: input, usage: answer.usage };
    },
    async embeddings() {
      const answer = await ai.embedMany({
        model: asked.textEmbeddingModel("gpt-4o-mini"), values: ["one two", "three"], ...off,
      });
      return { dimensions: answer.embeddings[0].length, usage: answer.usage };
    },
    async images() {
      const answer = await (ai.generateImage ?? ai.experimental_generateImage)({
        model: asked.imageModel("gpt-4o-mini"), prompt: "a bridge", ...off,
      });
      return { bytes: answer.image.uint8Array.length, usage: answer.usage };
    },
    unauthorized: () => ai.generateText({ model: provider({ apiKey: "no-key" }).chatModel("gpt-4o-mini"), prompt, ...off }),
    missing: () => ai.generateText({ model: model("missing"), prompt, ...off }),
    broken: () => ai.generateText({ model: model(), prompt, ...off, providerOptions: { proxy: { metadata: { simulate: "status=503" } } } }),
    broken_stream: () => stream(model(), "error=3"),
    cut_stream: () => stream(model(), "cut=3"),
    quota: () => ai.generateText({ model: model(), prompt, ...off, maxOutputTokens: 1_000_000_000 }),
  };
  await play(steps, (error) => ({
    class: error.name ?? error.constructor.name,
    status: error.statusCode ?? null,
    code: error.data?.error?.code ?? error.code ?? null,
    message: error.message,
  }));
}
