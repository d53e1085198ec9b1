"""Which upstream a call goes to, and the HTTP to get it there and back.

What the package promises:

- `UpstreamError.was_sent` is False only if the upstream provably received nothing of the call, or if nobody can read
  its answer, so that the call is free and may be sent again.
- A header passes only if it is on a list, in either direction. No key of a user reaches an upstream, and nothing
  about the operator's key or account reaches a user.
- The meaning of an error answer (who is at fault, what is charged, what the client sees) is decided in one place.

What it never does: it does not send a call twice by itself (`calls.dispatch` decides that), it knows no quotas, and
it interprets no body of an answer except those of errors and lists of models.

Begin with `client`, which sends one request and hands out its answer, and `sending`, which has the bytes of both.
`network` has what connections need beside HTTP, and `credentials` fetches the keys that are not fixed. `headers`
says what is sent in either direction, and `spool` keeps bodies that are too large for memory. `routing` chooses among
several upstreams and keeps their cooldowns, and `slots` bounds the calls that an upstream has at a time. `failures`
explains error answers, `usage_option` remembers which upstreams report the usage of a stream on request, and
`models` has the models that the upstreams list. `trial` asks an upstream for them to see whether it can be used.
"""
