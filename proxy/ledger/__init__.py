"""Reservations and usage of all calls, stored durably and counted exactly, in SQLite or PostgreSQL.

What the package promises:

- Reservations never take a quota with `enforce: exact` over its limit, in however many processes. Its counter is
  locked while a batch of operations is decided.
- A caller gets its reply only after the commit. A crash loses nothing of it and charges nothing twice, because every
  operation may be repeated.
- Every reservation ends once: it is settled, released, or expired after its process died. Only an expired call may
  still be settled, once, which corrects its charge.
- An operation with a mistake never fails the others of its batch.

What it never does: it has no rules of its own (they are in `policy`), knows no HTTP and no wire format, and reads no
clock but PostgreSQL's. Every change of a counter belongs to a call and is recorded in the call's entry, except that
an administrator can set what is used to 0 (`administration.counters`).

Begin with `entry`, the life of one call. `book` applies the operations to counters and entries, as pure functions.
`ledger` is the loop that commits them in batches, `store` the interface to a database, `sqlite` and `postgres` its
two engines. Beside them: `queue` lets busy calls wait, `rollup` adds up usage by day, `schema` has the tables, `rows`
converts rows, and `migrations` updates the tables of older releases. `queries` has the reports. `backup` copies a
SQLite file while it is used and puts one back, `copy` moves everything to another database. `notices` and `replicas`
write what is only for display: refusals, counters near a limit, and what processes tell each other.
"""
