"""The rules: who may use how much of which model, and whether a call is admitted.

What the package promises:

- It is pure. No function reads a clock, a socket or a database; every rule takes `now`. A value is never changed in
  place, so each rule can be tested with plain values.
- All numbers are integers: tokens, requests, and instants in milliseconds since 1970 (UTC). Floats are never
  compared.
- An admission never exceeds an `exact` quota: what is used and held stays within the limit, and within the limit plus
  `overdraft` for what a call generates.

What it never does: it does not read YAML (see `config`), know a wire format (see `formats`), store a counter (see
`ledger`) or write a response.

Begin with `quota`: what a quota, a grant, a counter and a call's demand are. `windows` says when a window opens and
resets, `amounts` what is counted and how sure a count is, `binding` which quotas bind a user and how they are
combined. `admission` decides about one call. `policy` has the groups, and finds the quotas that bind their members on
a model. `catalog` has the models and their upstreams. `status` shows a quota to its user.
"""
