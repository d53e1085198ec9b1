"""The schema: counters, calls, owners, usage by day; and how a database is brought up to it.

A row of `calls` is a reservation while its state is "open" and the usage record of the call afterwards. Counters
have no foreign keys: the call of a user who was deleted meanwhile still settles. Instants are milliseconds since
1970 in UTC; amounts are tokens and requests; all of them 64-bit integers. From the first release on migrations only
add, and a release has one step at the most, so that a release runs on the schema of the next: replicas are replaced
one by one, and one of the old that dies meanwhile starts again.

How a hundred million calls slow nothing:

* Ids of calls begin with the time (`entry.call_id_prefix`), so new rows go to the right edge of the key and of its cache,
  and what is oldest is found by the key: there is no index by `reserved_at` that each call would have to pay for.
* `calls_open` and `calls_uncounted` are partial: they have what is in flight, and what the next roll-up will count.
* `counted_as` is the state in which a call was counted into `usage_by_day`. It is set in the transaction that adds
  the call's sums, so a call is counted once, whoever dies; when an expired call is settled after all, the two differ
  and the difference is booked. The ledger never writes it.
* `response_id` is the id by which the upstream keeps what a call to /responses made, written with the settle; only
  such calls are in `calls_by_response`. Several may have one id, at upstreams that are careless with theirs: then
  it belongs to the user of the newest.

A row of `usage_by_day` is of the day, in UTC, in which its calls were reserved: its first millisecond. The policy's
time zone may change; days that were added up can't be taken apart again. `admitted_via` is the group.
"""

from importlib.resources import files

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Connection, Index, MetaData, Table, Text

from proxy.policy.amounts import QUANTITIES

metadata = MetaData()

# The newest step of `migrations`.
HEAD = "0004"
# Where PostgreSQL has our tables.
SCHEMA = "llm_quota_proxy"

# Calls that have ended and were not counted into their day as what they are now.
UNCOUNTED = "state <> 'open' AND (counted_as IS NULL OR counted_as <> state)"

# How a call is added to its day. A call that was counted before (`was` is then the state in which it was) had expired:
# it was added as one call that is charged its hold. That is subtracted, and what it really used is added.
_AGAIN = "CASE WHEN was IS NULL THEN 0 ELSE 1 END"
DAY_SUMS = {
    "calls": f"1 - {_AGAIN}",
    "requests": f"coalesce(requests, 0) - {_AGAIN}",
    "input_tokens": f"coalesce(input_tokens, 0) - hold_input * {_AGAIN}",
    "output_tokens": f"coalesce(output_tokens, 0) - hold_output * {_AGAIN}",
    "cached_tokens": "coalesce(cached_tokens, 0)",
    "reasoning_tokens": "coalesce(reasoning_tokens, 0)",
    "estimated": f"CASE WHEN provenance = 'at_least' THEN 1 ELSE 0 END - {_AGAIN}",
}
DAY_KEY = "day, user_name, through, model"
DAY_COLUMNS = f"{DAY_KEY}, {', '.join(DAY_SUMS)}"
# Grouped by day and sorted in one order, so that two processes that add to the same days can't deadlock.
ADDED_TO_DAYS = f"""
    SELECT reserved_at / 86400000 * 86400000, user_name, through, model,
    {", ".join(f"CAST(sum({each}) AS bigint)" for each in DAY_SUMS.values())}
"""
UPSERT_DAYS = f"""
    GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4 ON CONFLICT ({DAY_KEY}) DO UPDATE SET
    {", ".join(f"{each} = usage_by_day.{each} + excluded.{each}" for each in DAY_SUMS)}
"""

counters = Table(
    "counters",
    metadata,
    Column("subject", Text, primary_key=True),
    Column("quota_id", Text, primary_key=True),
    Column("opened_at", BigInteger, nullable=False),
    Column("resets_at", BigInteger, nullable=False),
    *(
        Column(f"{side}_{quantity}", BigInteger, nullable=False)
        for side in ("used", "held")
        for quantity in QUANTITIES
    ),
    sqlite_with_rowid=False,
)

calls = Table(
    "calls",
    metadata,
    Column("id", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("user_name", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("upstream", Text, nullable=False),
    Column("through", Text, nullable=False),
    Column("reserved_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    Column("hold_input", BigInteger, nullable=False),
    Column("hold_output", BigInteger, nullable=False),
    Column("maximum", BigInteger),
    Column("lines", Text, nullable=False),
    Column("capped_by", Text),
    Column("would_refuse", Text, nullable=False),
    Column("input_tokens", BigInteger),
    Column("output_tokens", BigInteger),
    Column("cached_tokens", BigInteger),
    Column("reasoning_tokens", BigInteger),
    Column("requests", BigInteger),
    Column("provenance", Text),
    Column("outcome", Text),
    Column("counted_as", Text),
    Column("response_id", Text),
    Index("calls_open", "owner", sqlite_where=sa.text("state = 'open'"), postgresql_where=sa.text("state = 'open'")),
    Index("calls_by_user", "user_name", "reserved_at"),
    Index("calls_uncounted", "id", sqlite_where=sa.text(UNCOUNTED), postgresql_where=sa.text(UNCOUNTED)),
    Index(
        *("calls_by_response", "response_id", "id"),
        sqlite_where=sa.text("response_id IS NOT NULL"),
        postgresql_where=sa.text("response_id IS NOT NULL"),
    ),
    sqlite_with_rowid=False,
)

owners = Table(
    "owners",
    metadata,
    Column("id", Text, primary_key=True),
    Column("alive_until", BigInteger, nullable=False),
)

usage_by_day = Table(
    "usage_by_day",
    metadata,
    Column("day", BigInteger, primary_key=True, autoincrement=False),
    Column("user_name", Text, primary_key=True),
    Column("through", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("calls", BigInteger, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("estimated", BigInteger, nullable=False),
    Index("usage_by_day_of_user", "user_name", "day"),
    Index("usage_by_day_of_group", "through", "day"),
    sqlite_with_rowid=False,
)


class NewerSchema(Exception):
    """The database was written by a newer release; serving from it could lose what that one stores."""


def migrate(connection: Connection) -> None:
    """Bring the database up to this release's schema; that of the next release is left as it is.

    Raises NewerSchema rather than touch one from later.
    """
    found = _revision(connection)
    if found in (HEAD, f"{int(HEAD) + 1:04}"):
        return
    # Only where there is something to do: its import takes 10 MB that nothing else needs.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(files("proxy.ledger") / "migrations"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise NewerSchema(
            f"The database has schema {found}, which this release does not know: "
            "use the release that wrote it, or a newer one."
        )
    command.upgrade(config, "head")


def _revision(connection: Connection) -> str | None:
    """The schema that the database has, as alembic noted it; None for an empty one."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    return revision
