"""Reservations and usage of all calls, stored durably and counted exactly, in SQLite or PostgreSQL.

What the package promises:

- No quota that is enforced exactly is exceeded by what is reserved, in however many processes: counters are locked
  while a batch of operations is decided.
- A caller that was answered is committed. A crash loses nothing that was answered, and charges nothing twice: every
  operation may be repeated.
- Every reservation ends once: it is settled, released, or expired after its process died. Only an expired call may
  still be settled, once, which corrects its charge.
- One operation with a mistake never fails the others of its batch.

What it never does: it does not decide by itself (the rules are in `policy`), knows no HTTP and no wire format, reads no
clock except PostgreSQL's, and does not change a counter without the call that justifies it.

Begin with `entry`, the life of one call. `book` applies the operations to counters and entries, as pure functions.
`ledger` is the loop that commits them in batches, `store` the interface to a database, `sqlite` and `postgres` its two
engines. Beside them: `queue` lets busy calls wait, `rollup` adds up usage by day, `schema` has the tables, `rows`
converts rows, and `migrations` brings old databases up to date.
"""
