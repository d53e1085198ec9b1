// What openai-node is asked to do, whichever of its versions plays.

import { play, proxy } from "./play.mjs";

const MODEL = "gpt-4o-mini";
const hello = [{ role: "user", content: "Say hello" }];
const WEATHER = {
  type: "function",
  function: {
    name: "weather",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};

/** Play with this version; `toFile` is its own way to name a file. */
export async function converse(OpenAI, toFile) {
  const client = new OpenAI({ ...proxy, maxRetries: 0 });
  const { chat, responses } = client;

  async function stream(more, model = MODEL) {
    const chunks = await chat.completions.create({ model, messages: hello, stream: true, ...more });
    let text = "";
    let usage = null;
    let empty = 0;
    for await (const chunk of chunks) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
      empty += chunk.choices.length === 0;
    }
    return { text, usage, empty };
  }

  const steps = {
    async chat() {
      const answer = await chat.completions.create({ model: MODEL, messages: hello });
      return { text: answer.choices[0].message.content, usage: answer.usage };
    },
    stream: () => stream({ stream_options: { include_usage: true } }),
    stream_without_usage: () => stream({}),
    async tools() {
      const answer = await chat.completions.create({ model: "tools", messages: hello, tools: [WEATHER] });
      const { name, arguments: given } = answer.choices[0].message.tool_calls[0].function;
      return { name, arguments: JSON.parse(given), usage: answer.usage };
    },
    async embeddings() {
      const answer = await client.embeddings.create({ model: MODEL, input: ["one two", "three"] });
      return { dimensions: answer.data[0].embedding.length, usage: answer.usage };
    },
    async images() {
      const answer = await client.images.generate({ model: MODEL, prompt: "a bridge" });
      return { bytes: Buffer.from(answer.data[0].b64_json, "base64").length, usage: answer.usage };
    },
    async speech() {
      const answer = await client.audio.speech.create({ model: MODEL, voice: "alloy", input: "one two" });
      return { bytes: (await answer.arrayBuffer()).byteLength };
    },
    async transcription() {
      const file = await toFile(Buffer.alloc(4000), "speech.mp3");
      const answer = await client.audio.transcriptions.create({ model: MODEL, file });
      return { text: answer.text, usage: answer.usage };
    },
    async responses() {
      const answer = await responses.create({ model: MODEL, input: "Say hello" });
      return { text: answer.output_text, usage: answer.usage };
    },
    unauthorized: () => new OpenAI({ ...proxy, apiKey: "no-key", maxRetries: 0 }).models.list(),
    missing: () => chat.completions.create({ model: "missing", messages: hello }),
    broken: () => chat.completions.create({ model: MODEL, messages: hello, metadata: { simulate: "status=503" } }),
    broken_stream: () => stream({ metadata: { simulate: "error=3" } }),
    cut_stream: () => stream({ metadata: { simulate: "cut=3" } }),
    quota: () => chat.completions.create({ model: MODEL, messages: hello, max_tokens: 1_000_000_000 }),
  };
  await play(steps, (error) => ({
    class: error.constructor.name,
    status: error.status ?? null,
    code: error.code ?? null,
    message: error.message,
  }));
}
