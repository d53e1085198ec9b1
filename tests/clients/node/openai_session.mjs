// The official SDK of OpenAI for JavaScript. The programs beside this file run it in one version each.

import { AUDIO, LOOK_UP, QUESTION, runSteps, usageOf } from "./steps.mjs";

const messages = [{ role: "user", content: QUESTION }];
const tools = [{ type: "function", function: LOOK_UP }];
const WITH_USAGE = { stream_options: { include_usage: true } };

/** Run the steps with this version of the SDK. `toFile` is its function that gives bytes a file name. */
export async function run(OpenAI, toFile) {
  await runSteps((settings) => sessionOf(new OpenAI(settings), toFile), describe);
}

function sessionOf(sdk, toFile) {
  const { completions } = sdk.chat;

  async function streamChat(model, more) {
    const chunks = [];
    const answer = await completions.create({ model, messages, stream: true, ...more });
    for await (const chunk of answer) chunks.push(chunk);
    return { text: chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), chunks };
  }

  return {
    async chat(model) {
      const answer = await completions.create({ model, messages });
      return { text: answer.choices[0].message.content, usage: printed(answer.usage) };
    },
    async stream(model) {
      const { text, chunks } = await streamChat(model, WITH_USAGE);
      return { text, usage: printed(chunks.at(-1).usage) };
    },
    async stream_without_usage(model) {
      const { text, chunks } = await streamChat(model, {});
      const usage = chunks.find((chunk) => chunk.usage)?.usage;
      const without_choices = chunks.filter((chunk) => chunk.choices.length === 0).length;
      return { text, usage: usage ? printed(usage) : null, without_choices };
    },
    async tools(model) {
      return toolResult(await completions.create({ model, messages, tools }));
    },
    async tools_stream(model) {
      const stream = completions.stream({ model, messages, tools, ...WITH_USAGE });
      return toolResult(await stream.finalChatCompletion());
    },
    async responses(model) {
      const answer = await sdk.responses.create({ model, input: QUESTION });
      return { text: answer.output_text, usage: printed(answer.usage) };
    },
    async responses_stream(model) {
      const answer = await sdk.responses.stream({ model, input: QUESTION }).finalResponse();
      return { text: answer.output_text, usage: printed(answer.usage) };
    },
    async embeddings(model) {
      const answer = await sdk.embeddings.create({ model, input: "a river" });
      return { dimensions: answer.data[0].embedding.length, usage: printed(answer.usage) };
    },
    async images(model) {
      const answer = await sdk.images.generate({ model, prompt: "a river" });
      return { bytes: Buffer.from(answer.data[0].b64_json, "base64").length, usage: printed(answer.usage) };
    },
    async speech(model) {
      const answer = await sdk.audio.speech.create({ model, voice: "alloy", input: "a river" });
      return { bytes: (await answer.arrayBuffer()).byteLength };
    },
    async transcription(model) {
      const file = await toFile(AUDIO, "speech.mp3");
      const answer = await sdk.audio.transcriptions.create({ model, file });
      return { text: answer.text, usage: printed(answer.usage) };
    },
  };
}

function toolResult(answer) {
  const { name, arguments: json } = answer.choices[0].message.tool_calls[0].function;
  return { name, arguments: JSON.parse(json), usage: printed(answer.usage) };
}

function printed(usage) {
  return usageOf(usage.prompt_tokens ?? usage.input_tokens, usage.completion_tokens ?? usage.output_tokens);
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
