"""The migrations create the tables of `schema.py`, and keep the data of older releases."""

import subprocess
import sys
from dataclasses import replace
from importlib.resources import files

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from proxy.ledger.book import Settle
from proxy.ledger.entry import CallLabels
from proxy.ledger.schema import HEAD, NewerSchema, metadata, migrate
from proxy.ledger.sqlite import SqliteStore
from proxy.policy.amounts import Amount
from tests.audit import audit, connected, contents, rows
from tests.builders import NOON, binding, call, entry_in, exactly, quota, reserve


@pytest.fixture
def path(new_path):
    """Where a database may be created: these tests run the migrations."""
    return new_path


@pytest.fixture
def engine(path):
    engine = sa.create_engine(f"sqlite:///{path}")
    yield engine
    engine.dispose()


def run_migrations(engine):
    with engine.begin() as connection:
        migrate(connection)


def migrate_to(engine, revision):
    """Leave the database as a release did whose newest revision this was."""
    config = Config()
    config.set_main_option("script_location", str(files("proxy.ledger") / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def schema(path):
    """Our tables, their columns and their indexes, as SQLite describes them.

    Neither the text of CREATE TABLE nor the order of columns, which differ after an ALTER TABLE.
    """
    with connected(path) as connection:
        tables = connection.execute("SELECT name, type, wr, strict FROM pragma_table_list WHERE schema = 'main'")
        ours = sorted(row for row in tables if not row[0].startswith(("sqlite_", "alembic_")))
        columns = {
            name: sorted(
                connection.execute(
                    'SELECT name, type, "notnull", dflt_value, pk, hidden FROM pragma_table_xinfo(?)', [name]
                )
            )
            for name, *_ in ours
        }
        indexes = connection.execute(
            "SELECT tbl_name, name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name NOT LIKE 'alembic%'"
        )
        return ours, columns, sorted(indexes, key=str)


def test_a_new_file_is_exactly_what_the_migrations_make(engine, path, tmp_path):
    """Also WITHOUT ROWID and partial indexes, which alembic's comparison does not see, and the rows."""
    migrate_to(engine, "head")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    new_path = tmp_path / "new.db"
    new = sa.create_engine(f"sqlite:///{new_path}")
    run_migrations(new)
    new.dispose()
    assert schema(path) == schema(new_path)
    assert revision_table(path) == revision_table(new_path)
    tables, columns, indexes = schema(path)
    assert [name for name, *_ in tables] == list(columns) == sorted(metadata.tables)
    assert {name for _, name, _ in indexes} >= {"calls_open", "calls_by_user"}
    assert all(rows(path, name) == rows(new_path, name) for name in (*metadata.tables, "alembic_version"))


def revision_table(path):
    with connected(path) as connection:
        [(sql,)] = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'alembic_version'")
        return "".join(sql.split())


def test_a_new_file_needs_no_migration(path):
    """A sidecar makes one at each start, and alembic takes 8 MB."""
    code = (
        "import asyncio, sys; from pathlib import Path; from proxy.ledger.sqlite import SqliteStore\n"
        f"asyncio.run(SqliteStore(Path({str(path)!r})).open())\n"
        "print(*{'alembic', 'sqlalchemy.dialects.postgresql', 'sqlite3'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1:] == ["sqlite3"]


def test_migrating_again_changes_nothing(engine, path):
    """Each start runs the migrations."""
    run_migrations(engine)
    with connected(path) as connection:
        connection.execute("INSERT INTO owners VALUES ('me', 1)")
    before = contents(path)
    run_migrations(engine)
    assert contents(path) == before


FIRST_CALLS = """
INSERT INTO counters VALUES ('user:ann', 'staff/daily', 1795478400000, 1795564800000, 90, 60, 1, 100, 400, 1);
INSERT INTO calls VALUES ('1', 'process-1', 'settled', 'ann', 'gpt-4o-mini', 'chat', 'openai', 'staff',
    1795521600000, 1795521601000, 100, 400, 100, 400,
    '[[["user:ann","staff/daily"],1795478400000,[100,400,1]]]', NULL, '[]', 90, 60, 0, 0, 1, 'exactly', 'complete');
INSERT INTO calls VALUES ('2', 'process-1', 'open', 'ann', 'gpt-4o-mini', 'chat', 'openai', 'staff',
    1795521600000, NULL, 100, 400, 100, 400,
    '[[["user:ann","staff/daily"],1795478400000,[100,400,1]]]', NULL, '[]', NULL, NULL, NULL, NULL, NULL, NULL, NULL);
"""


def test_the_calls_of_the_first_release_are_kept(engine, path):
    """Holds did not grow then, so the maximum of an open call is its hold. Nothing else changes."""
    migrate_to(engine, "0001")
    with connected(path) as connection:
        connection.executescript(FIRST_CALLS)
    before = {table: rows(path, table) for table in ("counters", "calls")}
    assert [row["state"] for row in before["calls"]] == ["settled", "open"]
    run_migrations(engine)
    assert rows(path, "counters") == [{**row, "reset_at": 0} for row in before["counters"]]
    for was, now in zip(before["calls"], rows(path, "calls"), strict=True):
        added = {
            "maximum": 400,
            "counted_as": None,
            "response_id": None,
            "key_id": None,
            "tag": None,
            "address": None,
        }
        assert now == added | {name: was[name] for name in was.keys() - {"lost_input", "lost_output"}}
    audit(path)


async def test_an_open_call_of_the_first_release_can_be_settled(engine, path):
    """It is read as if this release had reserved it."""
    migrate_to(engine, "0001")
    with connected(path) as connection:
        connection.executescript(FIRST_CALLS)
    store = SqliteStore(path)
    await store.open()
    assert await store.orphans("process-2", NOON, limit=9) == ["2"]
    [reply] = await store.apply([Settle("2", exactly(80, 40), "complete")], NOON)
    assert reply.entry == await entry_in(store, "2")
    assert (reply.entry.hold, reply.entry.maximum) == (Amount(100, 400, 1), 400)
    [counter] = reply.counters.values()
    assert (counter.used, counter.held) == (Amount(170, 100, 2), Amount())
    await store.close()
    audit(path)


COUNTER = "('user:ann', 'staff/daily', 1795478400000, 1795564800000, 90, 60, 1, 100, 400, 1)"
FOURTH_COLUMNS = """
    id, owner, state, user_name, model, endpoint, upstream, through, reserved_at, ended_at, hold_input, hold_output,
    maximum, lines, would_refuse, input_tokens, output_tokens, cached_tokens, reasoning_tokens, requests, provenance,
    outcome, counted_as, response_id
"""
HELD_LINE = '[[["user:ann","staff/daily"],1795478400000,[100,400,1]]]'
FOURTH_CALL = f"""
INSERT INTO calls ({FOURTH_COLUMNS}) VALUES ('req_1', 'process-1', 'settled', 'ann', 'gpt-4o-mini', 'chat', 'openai',
    'staff', 1795521600000, 1795521601000, 100, 400, 400, '{HELD_LINE}', '[]', 90, 60, 0, 0, 1, 'exactly', 'complete',
    'settled', 'resp_1');
"""
FOURTH_OPEN_CALL = f"""
INSERT INTO calls ({FOURTH_COLUMNS}) VALUES ('req_2', 'process-1', 'open', 'ann', 'gpt-4o-mini', 'chat', 'openai',
    'staff', 1795521600000, NULL, 100, 400, 400, '{HELD_LINE}', '[]', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    NULL);
"""


async def test_the_calls_of_a_release_without_a_directory_are_kept_and_settled(engine, path):
    """They have no key and no tag. The new tables are empty, but for the version of the directory."""
    migrate_to(engine, "0004")
    with connected(path) as connection:
        connection.executescript(f"INSERT INTO counters VALUES {COUNTER}; {FOURTH_CALL} {FOURTH_OPEN_CALL}")
    before = rows(path, "calls")
    run_migrations(engine)
    assert rows(path, "calls") == [row | {"key_id": None, "tag": None, "address": None} for row in before]
    assert rows(path, "directory") == [{"id": 1, "version": 1, "policy_version": 0}]
    assert [rows(path, table) for table in ("users", "identities", "api_keys", "audit")] == [[], [], [], []]
    store = SqliteStore(path)
    await store.open()
    [reply] = await store.apply([Settle("req_2", exactly(80, 40), "complete")], NOON)
    assert (reply.entry.labels.key_id, reply.entry.labels.tag) == ("", "")
    await store.close()
    audit(path)


async def test_the_release_before_works_on_the_tables_of_the_directory(engine, path):
    """It inserts calls without a key and a tag, reads what this release wrote, and keeps its key when it settles."""
    run_migrations(engine)
    store = SqliteStore(path)
    await store.open()
    labels = CallLabels("ann", "gpt-4o-mini", "chat", "openai", key_id="testtest22", tag="nightly")
    ann = binding([quota("staff/daily", tokens=1000)])
    await store.apply([replace(reserve("req_3", ann, call(100, 400)), labels=labels)], NOON)
    with connected(path) as connection:
        # As the statements of the release before name their columns.
        connection.executescript(FOURTH_OPEN_CALL)
        [read] = connection.execute(f"SELECT {FOURTH_COLUMNS} FROM calls WHERE id = 'req_3'").fetchall()
        connection.execute("UPDATE calls SET state = 'released', ended_at = 1, lines = '[]' WHERE id = 'req_3'")
    assert read[:5] == ("req_3", "process-1", "open", "ann", "gpt-4o-mini")
    assert (await entry_in(store, "req_3")).labels == labels
    assert (await entry_in(store, "req_2")).labels == CallLabels("ann", "gpt-4o-mini", "chat", "openai")
    await store.close()


KEY_COLUMNS = "id, digest, user_source, user_id, label, takes_tag_header, created_at, created_by, used_at"


def test_the_keys_of_the_release_before_are_kept_and_it_works_on(engine, path):
    """It neither writes nor reads from where they were used."""
    migrate_to(engine, "0006")
    with connected(path) as connection:
        connection.execute(
            f"INSERT INTO api_keys ({KEY_COLUMNS}) VALUES ('one', 'd1', 'file', 'ann', '', 0, 1, 'x', 2)"
        )
    [before] = rows(path, "api_keys")
    run_migrations(engine)
    assert rows(path, "api_keys") == [before | {"used_from": None}]
    with connected(path) as connection:
        connection.execute(
            f"INSERT INTO api_keys ({KEY_COLUMNS}) VALUES ('two', 'd2', 'file', 'ann', '', 0, 1, 'x', 2)"
        )
        connection.execute("UPDATE api_keys SET used_at = 3 WHERE id = 'one'")
    assert [(row["used_at"], row["used_from"]) for row in rows(path, "api_keys")] == [(3, None), (2, None)]


def test_a_newer_schema_is_refused_and_left_alone(engine, path):
    """The proxy went back to an older release, which would lose what the newer one stores."""
    run_migrations(engine)
    with connected(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.execute("ALTER TABLE counters ADD COLUMN used_cost BIGINT")
    before = contents(path)
    with pytest.raises(NewerSchema, match=r"schema 9999.*use the release that wrote it"):
        run_migrations(engine)
    assert contents(path) == before


async def test_a_release_runs_on_the_schema_of_the_next(engine, path):
    """Migrations only add. So a replica that is replaced last, or starts once more, works on."""
    run_migrations(engine)
    with connected(path) as connection:
        connection.execute(f"UPDATE alembic_version SET version_num = '{int(HEAD) + 1:04}'")
        connection.execute("ALTER TABLE counters ADD COLUMN used_cost BIGINT NOT NULL DEFAULT 0")
        connection.execute("ALTER TABLE calls ADD COLUMN note TEXT")
    store = SqliteStore(path)
    await store.open()
    await store.apply([reserve("1", binding([quota("staff/daily", tokens=1000)]), call(100, 400))], NOON)
    [reply] = await store.apply([Settle("1", exactly(80, 40), "complete")], NOON)
    assert reply.entry == await entry_in(store, "1")
    await store.close()
    audit(path)


def test_the_migrations_have_one_head(engine, path):
    """Two heads, as after a merge of two branches, could not be applied to a database."""
    run_migrations(engine)
    scripts = ScriptDirectory(str(files("proxy.ledger") / "migrations"))
    [revision] = rows(path, "alembic_version")
    assert [revision["version_num"]] == scripts.get_heads()


def test_instants_and_amounts_have_64_bits():
    """Milliseconds since 1970 do not fit into the 32 bits of PostgreSQL's INTEGER. SQLite would not show that."""
    columns = [column for table in metadata.tables.values() for column in table.columns]
    narrow = {str(column) for column in columns if type(column.type) not in (sa.BigInteger, sa.Text)}
    assert narrow == {"users.is_service", "api_keys.takes_tag_header", "directory.id", "groups.unlimited"}


def test_head_is_the_newest_revision():
    """A database that has it is not migrated, and alembic is not loaded."""
    assert ScriptDirectory(str(files("proxy.ledger") / "migrations")).get_current_head() == HEAD
