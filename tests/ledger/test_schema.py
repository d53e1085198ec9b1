"""The schema that migrations make is the one that the statements are written for."""

from importlib.resources import files

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from proxy.ledger.book import Settle
from proxy.ledger.schema import HEAD, NewerSchema, metadata, migrate
from proxy.ledger.sqlite import SqliteStore
from proxy.policy.amounts import Amount
from tests.audit import audit, connected, contents, rows
from tests.builders import NOON, binding, call, exactly, quota, reserve


@pytest.fixture
def path(tmp_path):
    return tmp_path / "quotas.db"


@pytest.fixture
def engine(path):
    engine = sa.create_engine(f"sqlite:///{path}")
    yield engine
    engine.dispose()


def migrated(engine):
    with engine.begin() as connection:
        migrate(connection)


def stopped_at(engine, revision):
    """A database as a release left it whose newest step that was."""
    config = Config()
    config.set_main_option("script_location", str(files("proxy.ledger") / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def schema(path):
    """What SQLite knows of our tables and their indexes.

    Not their text, nor in which order the columns stand: altering a table writes it otherwise than making it.
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


def test_migrations_make_exactly_the_tables_that_we_use(engine, path, tmp_path):
    """To the letter, so also WITHOUT ROWID and partial indexes, which the comparing tool doesn't see."""
    migrated(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    straight = tmp_path / "straight.db"
    made = sa.create_engine(f"sqlite:///{straight}")
    metadata.create_all(made)
    made.dispose()
    assert schema(path) == schema(straight)
    tables, columns, indexes = schema(path)
    assert [name for name, *_ in tables] == list(columns) == sorted(metadata.tables)
    assert {name for _, name, _ in indexes} >= {"calls_open", "calls_by_user"}


def test_migrating_again_changes_nothing(engine, path):
    """Each start does it."""
    migrated(engine)
    with connected(path) as connection:
        connection.execute("INSERT INTO owners VALUES ('me', 1)")
    before = contents(path)
    migrated(engine)
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


def test_calls_that_a_release_left_behind_go_on_in_the_next(engine, path):
    """Holds did not grow then, so what is held is the longest that an answer may become; nothing else changes."""
    stopped_at(engine, "0001")
    with connected(path) as connection:
        connection.executescript(FIRST_CALLS)
    before = {table: rows(path, table) for table in ("counters", "calls")}
    assert [row["state"] for row in before["calls"]] == ["settled", "open"]
    migrated(engine)
    assert rows(path, "counters") == before["counters"]
    for was, now in zip(before["calls"], rows(path, "calls"), strict=True):
        added = {"maximum": 400, "counted_as": None, "response_id": None}
        assert now == added | {name: was[name] for name in was.keys() - {"lost_input", "lost_output"}}
    audit(path)


async def test_an_open_call_of_the_release_before_is_settled_by_this_one(engine, path):
    """It is read as if it had been booked today."""
    stopped_at(engine, "0001")
    with connected(path) as connection:
        connection.executescript(FIRST_CALLS)
    store = SqliteStore(path)
    await store.open()
    assert await store.orphans("process-2", NOON, limit=9) == ["2"]
    [booked] = await store.apply([Settle("2", exactly(80, 40), "complete")], NOON)
    assert booked.entry == await store.read_entry("2")
    assert (booked.entry.hold, booked.entry.maximum) == (Amount(100, 400, 1), 400)
    [counter] = booked.counters.values()
    assert (counter.used, counter.held) == (Amount(170, 100, 2), Amount())
    await store.close()
    audit(path)


def test_a_newer_schema_is_refused_and_left_alone(engine, path):
    """After going back to an older release, which would not keep what the newer one stores."""
    migrated(engine)
    with connected(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.execute("ALTER TABLE counters ADD COLUMN used_cost BIGINT")
    before = contents(path)
    with pytest.raises(NewerSchema, match=r"schema 9999.*use the release that wrote it"):
        migrated(engine)
    assert contents(path) == before


async def test_a_release_runs_on_the_schema_of_the_next(engine, path):
    """Migrations only add, so who is replaced last, or must start once more, goes on with what it knows."""
    migrated(engine)
    with connected(path) as connection:
        connection.execute(f"UPDATE alembic_version SET version_num = '{int(HEAD) + 1:04}'")
        connection.execute("ALTER TABLE counters ADD COLUMN used_cost BIGINT NOT NULL DEFAULT 0")
        connection.execute("ALTER TABLE calls ADD COLUMN note TEXT")
    store = SqliteStore(path)
    await store.open()
    await store.apply([reserve("1", binding([quota("staff/daily", tokens=1000)]), call(100, 400))], NOON)
    [booked] = await store.apply([Settle("1", exactly(80, 40), "complete")], NOON)
    assert booked.entry == await store.read_entry("1")
    await store.close()
    audit(path)


def test_there_is_one_line_of_migrations(engine, path):
    """Two heads, as two branches leave them when merged, could not be applied to any database."""
    migrated(engine)
    scripts = ScriptDirectory(str(files("proxy.ledger") / "migrations"))
    [revision] = rows(path, "alembic_version")
    assert [revision["version_num"]] == scripts.get_heads()


def test_instants_and_amounts_have_64_bits():
    """Milliseconds since 1970 don't fit into the 32 that PostgreSQL gives an Integer; SQLite would not show it."""
    types = {type(column.type) for table in metadata.tables.values() for column in table.columns}
    assert types == {sa.BigInteger, sa.Text}


def test_the_head_is_the_newest_step():
    """A database that has it is taken as it is, without loading what makes steps."""
    assert ScriptDirectory(str(files("proxy.ledger") / "migrations")).get_current_head() == HEAD
