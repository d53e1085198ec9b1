"""One call, from its admission to its settlement.

What the package promises:

- Nothing is sent that is not reserved. Every reservation ends exactly once: it is settled or released, whatever the
  client, the upstream or a bug of ours does.
- The end of an answer is sent only when its charge is committed, or after two seconds.
- The bytes of an answer pass at once and unchanged, as far as the reservation covers them.
- A call that may have run is never sent to an upstream again, unless the operator has set `first_byte_timeout`.

What it never does: it knows no HTTP server (`call.Responder` is its view of the client, implemented by `web`), it
does not decide about quotas (the ledger does) and it does not read wire formats (`formats` does).

Begin with `relay`: `Relay.carry` is the whole path of a call in one function. Then, in the order of that path: `call`
(what is fixed when a call begins), `recorded_names` (under which name its model is recorded), `reservation` (what it
holds, and how it ends), `disconnect` (what happens if the client leaves), `dispatch` (to which upstream it is sent,
and which attempts are retried). `token_count` and `tokenizer` count tokens that no upstream reports.
`stored_responses` serves responses that an upstream stores, and `read_limit` bounds how many requests for them a user
sends. `activity` collects what calls do, for administrators who watch, and no call waits for it.
"""
