// How a program for Node plays its steps: `play(sessionOf, describe)`. See `tests/clients/sessions.py`.
//
// `sessionOf` is given `baseURL`, `apiKey` and perhaps `maxRetries`, and returns a function for each step, which takes
// the name of the model and returns what came of it. `describe` says what an error shows to whoever catches it.

import net from "node:net";

const WRONG_KEY = "no-key-of-anyone-0123456789";
const RETRIED = ["used_up"]; // as often as the SDK thinks right by itself: not at all, since our answer says so
// What goes wrong is asked for in one of two ways.
const ASKED_AS = {
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
export const SOUND = Buffer.concat([Buffer.from("ID3\x04"), Buffer.alloc(4000)]);

/** Play what the command line names, in its order, and print a line for each. */
export async function play(sessionOf, describe) {
  stayHere();
  const { BASE_URL, API_KEY } = process.env;
  for (const step of process.argv.slice(2)) {
    const session = sessionOf({
      baseURL: `${BASE_URL}/v1`,
      apiKey: step === "unknown_key" ? WRONG_KEY : API_KEY,
      ...(!RETRIED.includes(step) && { maxRetries: 0 }),
    });
    let said;
    try {
      said = await session[ASKED_AS[step] ?? step](step);
    } catch (error) {
      said = { error: { message: error.message, ...describe(error) } };
    }
    process.stdout.write(`${JSON.stringify({ step, ...said })}\n`);
  }
}

/** What an SDK says that a call has used. */
export function used(input, output = 0) {
  if (input === undefined) throw new Error("it says no usage");
  return { input, output };
}

/** No SDK gets beyond this machine, whatever it would report or look up at home. */
function stayHere() {
  const { connect } = net.Socket.prototype;
  net.Socket.prototype.connect = function (...args) {
    const { host } = args.flat()[0];
    if (host !== "127.0.0.1") {
      process.stderr.write(`wanted to connect to ${host}\n`);
      process.exit(3);
    }
    return connect.apply(this, args);
  };
}
