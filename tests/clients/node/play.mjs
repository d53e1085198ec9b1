// Plays steps of a client in the order of the arguments, and prints what came of each as one line of JSON.
//
// A step is a function that returns what it saw. What it throws is told with the class, status and code by which a
// user's program would tell one failure from another; it ends the step and not the program.

const { BASE_URL, API_KEY } = process.env;

/** Where the proxy is, and who calls. */
export const proxy = { baseURL: BASE_URL, apiKey: API_KEY };

/** Play what was asked for, out of these steps. */
export async function play(steps, tell) {
  for (const step of process.argv.slice(2)) {
    let saw;
    try {
      saw = await steps[step]();
    } catch (error) {
      saw = { error: tell(error) };
    }
    process.stdout.write(`${JSON.stringify({ step, ...saw })}\n`);
  }
}
