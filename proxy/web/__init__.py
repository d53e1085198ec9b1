"""The HTTP server: the API listener for users and the admin listener for operators.

What the package promises:

- Every request gets an answer in the shape of the API that it addresses, OpenAI's or Anthropic's. That includes
  errors that the server library finds, and internal errors of the proxy.
- A request that can be parsed in more than one way is refused, and its connection is closed.
- The key is checked before the body is read, also if the client sends `Expect: 100-continue`.
- Heads, bodies, idle connections and writes have time limits. The number of connections and the size of a body, also
  after decompression, are bounded.
- A client that disconnects is noticed at once, also while nothing is being written to it.

What it never does: it decides nothing about quotas (see `policy` and `ledger`), sends nothing to an upstream (see
`calls`), and never shows a key or the text of an exception to a client.

Begin with `routes`, which has the paths of the API listener and the handlers. In the order in which a request passes
them: `listener` (connections and heads), `middleware` (validation, errors), `cors`, `routes`, `body` (reads what the
client sends), `response` (writes what the client gets). `self_service` and `health` are the remaining paths of that
listener, and `admin` is the other listener. `live` connects what happens in calls with those who watch: `events` has
their streams, and `exchange` what happens in other processes. `gauges` measures for the metrics what nothing else
counts.
"""
