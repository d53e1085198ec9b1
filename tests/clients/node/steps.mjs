// Runs the steps of a Node client: `runSteps(sessionOf, describe)`. `tests/clients/sessions.py` documents the output.
//
// `sessionOf` takes `baseURL`, `apiKey` and perhaps `maxRetries`. It returns one function for each step, which takes
// the name of the model and returns the result. `describe` returns the public attributes of an error.

import net from "node:net";

const UNKNOWN_KEY = "no-key-of-anyone-0123456789";
// Steps for which the SDK keeps its default number of retries. It must not retry, because our answer tells it so.
const WITH_RETRIES = ["used_up"];
// The method for each step that must fail.
const METHODS = {
  unknown_key: "chat",
  unknown_model: "chat",
  used_up: "chat",
  failing: "chat",
  broken_stream: "stream",
  cut_stream: "stream",
};

export const QUESTION = "Which river is the longest?";
export const LOOK_UP = {
  name: "look_up",
  description: "Look a term up.",
  parameters: { type: "object", properties: { term: { type: "string" } }, required: ["term"] },
};
export const AUDIO = Buffer.concat([Buffer.from("ID3\x04"), Buffer.alloc(4000)]);

/** Run the steps of the command line in their order, and print one line for each. */
export async function runSteps(sessionOf, describe) {
  refuseOtherHosts();
  const { BASE_URL, API_KEY } = process.env;
  for (const step of process.argv.slice(2)) {
    const session = sessionOf({
      baseURL: `${BASE_URL}/v1`,
      apiKey: step === "unknown_key" ? UNKNOWN_KEY : API_KEY,
      ...(!WITH_RETRIES.includes(step) && { maxRetries: 0 }),
    });
    let result;
    try {
      result = await session[METHODS[step] ?? step](step);
    } catch (error) {
      result = { error: { message: error.message, ...describe(error) } };
    }
    process.stdout.write(`${JSON.stringify({ step, ...result })}\n`);
  }
}

/** The usage that an SDK reports for a call, in the form in which it is printed. */
export function usageOf(input, output = 0) {
  if (input === undefined) throw new Error("the SDK reports no usage");
  return { input, output };
}

/** End the process if an SDK connects to another machine, for example for telemetry. */
function refuseOtherHosts() {
  const { connect } = net.Socket.prototype;
  net.Socket.prototype.connect = function (...args) {
    const { host } = args.flat()[0];
    if (host !== "127.0.0.1") {
      process.stderr.write(`The SDK tried to connect to ${host}.\n`);
      process.exit(3); // the SDK would catch an exception
    }
    return connect.apply(this, args);
  };
}
