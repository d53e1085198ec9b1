// The official SDK of OpenAI for JavaScript; the programs beside this file play it in one version each.

import { LOOK_UP, play, QUESTION, SOUND, used } from "./play.mjs";

const messages = [{ role: "user", content: QUESTION }];
const tools = [{ type: "function", function: LOOK_UP }];
const WITH_USAGE = { stream_options: { include_usage: true } };

/** Play with this version; `toFile` is its way to give bytes a name. */
export async function converse(OpenAI, toFile) {
  await play((settings) => session(new OpenAI(settings), toFile), describe);
}

function session(sdk, toFile) {
  const { completions } = sdk.chat;

  async function stream(model, more) {
    const chunks = [];
    const answer = await completions.create({ model, messages, stream: true, ...more });
    for await (const chunk of answer) chunks.push(chunk);
    return { text: chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), chunks };
  }

  return {
    async chat(model) {
      const answer = await completions.create({ model, messages });
      return { text: answer.choices[0].message.content, usage: usedBy(answer.usage) };
    },
    async stream(model) {
      const { text, chunks } = await stream(model, WITH_USAGE);
      return { text, usage: usedBy(chunks.at(-1).usage) };
    },
    async stream_unasked(model) {
      const { text, chunks } = await stream(model, {});
      const usage = chunks.find((chunk) => chunk.usage)?.usage;
      const without_choices = chunks.filter((chunk) => chunk.choices.length === 0).length;
      return { text, usage: usage ? usedBy(usage) : null, without_choices };
    },
    async tools(model) {
      return called(await completions.create({ model, messages, tools }));
    },
    async tools_stream(model) {
      const stream = completions.stream({ model, messages, tools, ...WITH_USAGE });
      return called(await stream.finalChatCompletion());
    },
    async responses(model) {
      const answer = await sdk.responses.create({ model, input: QUESTION });
      return { text: answer.output_text, usage: usedBy(answer.usage) };
    },
    async responses_stream(model) {
      const answer = await sdk.responses.stream({ model, input: QUESTION }).finalResponse();
      return { text: answer.output_text, usage: usedBy(answer.usage) };
    },
    async embeddings(model) {
      const answer = await sdk.embeddings.create({ model, input: "a river" });
      return { dimensions: answer.data[0].embedding.length, usage: usedBy(answer.usage) };
    },
    async images(model) {
      const answer = await sdk.images.generate({ model, prompt: "a river" });
      return { bytes: Buffer.from(answer.data[0].b64_json, "base64").length, usage: usedBy(answer.usage) };
    },
    async speech(model) {
      const answer = await sdk.audio.speech.create({ model, voice: "alloy", input: "a river" });
      return { bytes: (await answer.arrayBuffer()).byteLength };
    },
    async transcription(model) {
      const file = await toFile(SOUND, "speech.mp3");
      const answer = await sdk.audio.transcriptions.create({ model, file });
      return { text: answer.text, usage: usedBy(answer.usage) };
    },
  };
}

function called(answer) {
  const { name, arguments: given } = answer.choices[0].message.tool_calls[0].function;
  return { name, arguments: JSON.parse(given), usage: usedBy(answer.usage) };
}

function usedBy(usage) {
  return used(usage.prompt_tokens ?? usage.input_tokens, usage.completion_tokens ?? usage.output_tokens);
}

function describe(error) {
  const retry_after = error.headers?.get("retry-after");
  return {
    class: error.constructor.name,
    status: error.status ?? null,
    code: error.code ?? null,
    ...(error.status && { retry_after }),
  };
}
