"""The tables of the ledger, and the migration of a database to them.

A row of `calls` is a reservation while its state is "open", and the usage record of the call afterwards. Counters
have no foreign keys, so the call of a user who was deleted meanwhile can still be settled. `reset_at` is when an
administrator last set what a counter has used to 0; 0: never. Instants are milliseconds since 1970 (UTC), amounts are
tokens and requests, and all of them are 64-bit integers.

The migrations make all tables on PostgreSQL, and change them on both; a new SQLite file is made from this module. So
what is said of indexes here is only for SQLite.

From the first release on, migrations only add, and a release has at most one migration. So a release also runs on the
schema of the next one: replicas can be replaced one by one, and an old one that dies meanwhile can start again.

A hundred million calls in the table slow nothing down, for these reasons:

* Ids of calls begin with the time (`entry.call_id_prefix`). So new rows are added at the right edge of the primary
  key, which is in the cache, and old rows are found by the primary key. There is no index on `reserved_at`, which
  each call would have to update.
* The indexes `calls_open` and `calls_uncounted` are partial: they contain only the calls in flight, and the calls
  that the next roll-up counts.
* `counted_as` is the state in which a call was counted into `usage_by_day`. It is set in the transaction that adds
  the call to the sums, so a call is counted once, even if a process dies in the middle. Example: a call expires and
  is counted with its hold of 100 + 400 tokens (`counted_as` = "expired"). Its process was only paused and settles it
  with 90 + 60 (`state` = "settled"). The two differ, so the next roll-up adds -10 and -340 and sets `counted_as` to
  "settled". Only the roll-up writes this column.
* `response_id` is the id under which the upstream stores the response of a call to /responses. It is written with the
  settle. Only calls that have one are in `calls_by_response`. Some upstreams use an id more than once; then the
  response belongs to the user of the newest call.

A row of `usage_by_day` has the sums of one UTC day, by user, group (`through`) and model. `day` is the first
millisecond of the day in which the calls were reserved. It is not a day in the policy's time zone, because that may
be changed, and sums of days cannot be divided again.

`key_id` and `tag` of a call are for reports only: the id of the key that the call carried, and a text of the client's
or the key's. Calls of releases before them have NULL.

The directory (`identity.database`) has the users and keys that are made at run time. A user is a row of `users`, by
the source that says who it is and the id that it has there. `identities` links a (source, id) to another user, whose
counters it then uses. `groups`, `networks` and `models` are JSON lists. An instant that is NULL has not happened. The
one row of `directory` has a version that each change raises, in the same transaction and before anything else. So
changes are serialized, and a process sees by one number that what it remembers may be old. `cut_version` is the
version of the change that was to end the calls in flight of this user or key at once; processes that see a newer
version than before end those of rows with a version in between. Rows of `audit` say who changed what; `before` and
`after` are JSON objects with the members that differ. `idempotency_key` and `fingerprint` are those of the request
that created something, so that a repeated request finds what it made.

`groups`, `quotas` and `grants` are what administrators make beside the file (`administration`); `document` of a quota
has its fields as the file would have them. A change of these raises `policy_version` of `directory` too. `user_name`
of a grant is NULL if it is for each member, or for the pot, of its quota. `admin_sessions` are logins of the page.

Other tables are for display. A row of `refusals` is the first refusal of a user by a quota in one second, and `count`
how many there were. A row of `crossings` is written when a counter reaches 80 % or 100 % of a limit in its window.
`replicas` has the last status of each process, and until when it shows events to somebody. While one does, the others
write theirs to `feed`, whose rows stay for some seconds. A row of `call_cuts` asks for the end of one call in flight,
by the `version` of the directory.
"""

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, Boolean, Column, Connection, Index, Integer, MetaData, Table, Text
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import SchemaItem
from sqlalchemy.types import TypeEngine

from proxy.ledger.store import StoreUnavailable
from proxy.policy.amounts import QUANTITIES

metadata = MetaData()

# The newest revision in `migrations`.
HEAD = "0008"
# That of the next release, on whose schema this one runs too.
NEXT = f"{int(HEAD) + 1:04}"
# The PostgreSQL schema that contains our tables, so that they can share a database with others.
SCHEMA = "llm_quota_proxy"

# Calls that have ended and were not counted into their day in their present state.
UNCOUNTED = "state <> 'open' AND (counted_as IS NULL OR counted_as <> state)"

# Users and keys whose calls in flight were once to be ended at once.
CUT = "cut_version IS NOT NULL"

# What a call adds to the sums of its day. `was` is the state in which it was counted before, or NULL. A call is
# counted again only if it had expired. It was then counted as one request that used its hold, which is subtracted
# again.
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
# Rows are sorted, so that two processes that add to the same days lock them in the same order and cannot deadlock.
ADDED_TO_DAYS = f"""
    SELECT reserved_at / 86400000 * 86400000, user_name, through, model,
    {", ".join(f"CAST(sum({each}) AS bigint)" for each in DAY_SUMS.values())}
"""
UPSERT_DAYS = f"""
    GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4 ON CONFLICT ({DAY_KEY}) DO UPDATE SET
    {", ".join(f"{each} = usage_by_day.{each} + excluded.{each}" for each in DAY_SUMS)}
"""


def _required(type_: type[TypeEngine[Any]], names: str) -> list[Column[Any]]:
    """Columns of one type, by their names. Each row has a value in them."""
    return [Column(name, type_, nullable=False) for name in names.split()]


def _optional(type_: type[TypeEngine[Any]], names: str) -> list[Column[Any]]:
    """The same, where a value may be NULL."""
    return [Column(name, type_) for name in names.split()]


def _table(name: str, *items: SchemaItem) -> Table:
    """A table that SQLite keeps in the order of its primary key."""
    return Table(name, metadata, *items, sqlite_with_rowid=False)


counters = _table(
    "counters",
    Column("subject", Text, primary_key=True),
    Column("quota_id", Text, primary_key=True),
    *_required(BigInteger, "opened_at resets_at"),
    # A later quantity needs server_default="0" here and in its migration, because the release before inserts counters
    # without its columns.
    *(
        Column(f"{side}_{quantity}", BigInteger, nullable=False)
        for side in ("used", "held")
        for quantity in QUANTITIES
    ),
    Column("reset_at", BigInteger, nullable=False, server_default="0"),
    Index("counters_by_quota", "quota_id", "subject"),
)

calls = _table(
    "calls",
    Column("id", Text, primary_key=True),
    *_required(Text, "owner state user_name model endpoint upstream through"),
    *_required(BigInteger, "reserved_at"),
    *_optional(BigInteger, "ended_at"),
    *_required(BigInteger, "hold_input hold_output"),
    *_optional(BigInteger, "maximum"),
    *_required(Text, "lines"),
    *_optional(Text, "capped_by"),
    *_required(Text, "would_refuse"),
    *_optional(BigInteger, "input_tokens output_tokens cached_tokens reasoning_tokens requests"),
    *_optional(Text, "provenance outcome counted_as response_id key_id tag address"),
    Index("calls_open", "owner", sqlite_where=sa.text("state = 'open'")),
    Index("calls_by_user", "user_name", "reserved_at"),
    Index("calls_uncounted", "id", sqlite_where=sa.text(UNCOUNTED)),
    Index(
        *("calls_by_response", "response_id", "id"),
        sqlite_where=sa.text("response_id IS NOT NULL"),
    ),
)

owners = Table(
    "owners",
    metadata,
    Column("id", Text, primary_key=True),
    *_required(BigInteger, "alive_until"),
)

usage_by_day = _table(
    "usage_by_day",
    Column("day", BigInteger, primary_key=True, autoincrement=False),
    Column("user_name", Text, primary_key=True),
    Column("through", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    *_required(BigInteger, "calls requests input_tokens output_tokens cached_tokens reasoning_tokens estimated"),
    Index("usage_by_day_of_user", "user_name", "day"),
    Index("usage_by_day_of_group", "through", "day"),
)

users = _table(
    "users",
    Column("source", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    *_required(Text, "groups"),
    *_optional(Text, "email"),
    *_required(Boolean, "is_service"),
    *_required(BigInteger, "created_at"),
    *_required(Text, "created_by"),
    *_optional(BigInteger, "disabled_at cut_version forgotten_at"),
    *_optional(Text, "pseudonym"),
    Index("users_cut", "cut_version", sqlite_where=sa.text(CUT)),
)

identities = _table(
    "identities",
    Column("source", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    *_required(Text, "user_source user_id"),
    Index("identities_of_user", "user_source", "user_id"),
)

api_keys = _table(
    "api_keys",
    Column("id", Text, primary_key=True),
    Column("digest", Text, nullable=False, unique=True),
    *_required(Text, "user_source user_id label"),
    *_optional(Text, "groups networks models tag"),
    *_required(Boolean, "takes_tag_header"),
    *_required(BigInteger, "created_at"),
    *_required(Text, "created_by"),
    *_optional(BigInteger, "expires_at revoked_at cut_version used_at"),
    *_optional(Text, "used_from replaced_by"),
    Index("api_keys_of_user", "user_source", "user_id"),
    Index("api_keys_cut", "cut_version", sqlite_where=sa.text(CUT)),
)

audit = _table(
    "audit",
    Column("id", Text, primary_key=True),
    *_required(BigInteger, "at"),
    *_required(Text, "actor action target"),
    *_optional(Text, "before after address request_id idempotency_key fingerprint"),
    Index(
        *("audit_by_idempotency_key", "actor", "idempotency_key"),
        unique=True,
        sqlite_where=sa.text("idempotency_key IS NOT NULL"),
    ),
    Index("audit_at", "at", "id", "target", "action"),
    *(Index(f"audit_of_{name}", name, "at") for name in ("target", "actor", "action")),
)

directory = Table(
    "directory",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    *_required(BigInteger, "version"),
    Column("policy_version", BigInteger, nullable=False, server_default="0"),
)


groups = _table(
    "groups",
    Column("name", Text, primary_key=True),
    *_required(BigInteger, "position"),
    *_optional(Text, "models"),
    *_required(Boolean, "unlimited"),
    *_required(BigInteger, "created_at"),
    *_required(Text, "created_by"),
)

quotas = _table(
    "quotas",
    Column("group_name", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    *_required(BigInteger, "position"),
    *_required(Text, "document"),
    *_required(BigInteger, "created_at"),
    *_required(Text, "created_by"),
)

grants = _table(
    "grants",
    Column("id", Text, primary_key=True),
    *_required(Text, "quota_id"),
    *_optional(Text, "user_name"),
    *_required(Text, "measure"),
    *_required(BigInteger, "amount until"),
    *_required(Text, "reason"),
    *_required(BigInteger, "created_at"),
    *_required(Text, "created_by"),
    *_optional(BigInteger, "ended_at"),
)

admin_keys = _table(
    "admin_keys",
    Column("id", Text, primary_key=True),
    Column("digest", Text, nullable=False, unique=True),
    *_required(Text, "name role"),
    *_optional(Text, "groups"),
    *_optional(BigInteger, "grant_up_to"),
    *_required(BigInteger, "created_at"),
    *_required(Text, "created_by"),
    *_optional(BigInteger, "expires_at revoked_at"),
)

admin_sessions = _table(
    "admin_sessions",
    Column("digest", Text, primary_key=True),
    *_required(Text, "key_digest"),
    *_required(BigInteger, "created_at expires_at"),
)

refusals = _table(
    "refusals",
    Column("request_id", Text, primary_key=True),
    *_required(BigInteger, "at"),
    *_required(Text, "user_name quota_id model endpoint verdict measure"),
    *_required(BigInteger, "maximum used held needed"),
    *_optional(BigInteger, "resets_at admissible_at"),
    *_optional(Text, "key_id"),
    *_required(BigInteger, "count"),
    *_optional(Text, "details"),
    Index("refusals_at", "at", "quota_id"),
    Index("refusals_of_quota", "quota_id", "at"),
    Index("refusals_of_user", "user_name", "at"),
)

crossings = _table(
    "crossings",
    Column("subject", Text, primary_key=True),
    Column("quota_id", Text, primary_key=True),
    *_required(BigInteger, "opened_at resets_at level crossed_at"),
    Index("crossings_open", "resets_at"),
    Index("crossings_latest", "level", "crossed_at"),
)

replicas = _table(
    "replicas",
    Column("owner", Text, primary_key=True),
    *_required(BigInteger, "at"),
    *_required(Text, "status"),
    *_required(BigInteger, "watching_until"),
)

feed = _table(
    "feed",
    Column("owner", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    *_required(BigInteger, "at"),
    *_required(Text, "body"),
)

call_cuts = _table(
    "call_cuts",
    Column("call_id", Text, primary_key=True),
    *_required(BigInteger, "version at"),
)

# Where alembic stores the revision of the schema.
_revisions = Table(
    "alembic_version",
    MetaData(),
    Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)


_UNKNOWN = "which this release does not know: use the release that wrote it, or a newer one"


class NewerSchema(Exception):
    """A newer release has migrated this database. This release could lose data that the newer one stores."""


def migrate(connection: Connection, name: str = "The database") -> None:
    """Migrate the database to this release's schema. The schema of the next release is left as it is.

    A new SQLite file gets the tables of this module, which are those that the migrations make: a sidecar has a new
    file at each start, and alembic takes 0.1 s and 8 MB.

    Raises NewerSchema for the schema of any later release, before anything is changed. Its text begins with `name`.
    """
    revision = _revision(connection)
    if revision in (HEAD, NEXT):
        return
    if revision is None and connection.dialect.name == "sqlite":
        metadata.create_all(connection, checkfirst=False)  # a table of another program is an error
        _revisions.create(connection, checkfirst=False)
        connection.execute(directory.insert().values(id=1, version=1))
        connection.execute(_revisions.insert().values(version_num=HEAD))
        return
    # Imported only if there is a migration to run.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(files("proxy.ledger") / "migrations"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if revision is not None and revision not in known:
        raise NewerSchema(f"{name} has schema {revision}, {_UNKNOWN}.")
    command.upgrade(config, "head")


def insert_of(connection: AsyncConnection) -> Callable[[Table], Any]:
    """The `insert` of the connection's database, which knows ON CONFLICT."""
    if connection.dialect.name == "sqlite":
        return sqlite.insert
    from sqlalchemy.dialects import postgresql  # imported here, because SQLite does not need its 2 MB

    return postgresql.insert


def has_schema(connection: Connection) -> bool:
    """Whether the database has a schema of ours, of any release. If not, `migrate` makes it from nothing."""
    return _revision(connection) is not None


def check_schema(connection: Connection, name: str, *, exactly: bool = False) -> None:
    """Raise StoreUnavailable unless the database has this release's schema, or that of the next release.

    With `exactly` the latter is an error too: a copy would lose what this release does not know.
    """
    revision = _revision(connection)
    if revision == HEAD or (revision == NEXT and not exactly):
        return
    if revision == NEXT:
        raise StoreUnavailable(
            f"{name} has schema {revision} of a newer release, and this release has {HEAD}: use the newer release"
        )
    if revision is not None and revision > HEAD:  # four digits
        raise StoreUnavailable(f"{name} has schema {revision}, {_UNKNOWN}")
    found = "no schema of ours" if revision is None else f"schema {revision}"
    raise StoreUnavailable(f"{name} has {found}, and this release needs {HEAD}: run `llm-quota-proxy migrate`")


def _revision(connection: Connection) -> str | None:
    """The revision of the database's schema, which alembic stores; None for an empty database."""
    if not sa.inspect(connection).has_table(_revisions.name):
        return None
    return connection.execute(sa.select(_revisions.c.version_num)).scalar()
