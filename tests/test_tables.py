"""The schema that migrations make is the one that the statements are written for."""

from importlib.resources import files

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from proxy.tables import HEAD, NewerSchema, metadata, migrate
from tests.audit import connected, contents, rows


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


def schema(path):
    """What SQLite remembers of each table and index that is ours, as it was written."""
    query = "SELECT name, sql FROM sqlite_master WHERE name NOT LIKE '%alembic%' ORDER BY name"
    with connected(path) as connection:
        return connection.execute(query).fetchall()


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


def test_migrating_again_changes_nothing(engine, path):
    """Each start does it."""
    migrated(engine)
    with connected(path) as connection:
        connection.execute("INSERT INTO owners VALUES ('me', 1)")
    before = contents(path)
    migrated(engine)
    assert contents(path) == before


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


def test_there_is_one_line_of_migrations(engine, path):
    """Two heads, as two branches leave them when merged, could not be applied to any database."""
    migrated(engine)
    scripts = ScriptDirectory(str(files("proxy") / "migrations"))
    [revision] = rows(path, "alembic_version")
    assert [revision["version_num"]] == scripts.get_heads()


def test_instants_and_amounts_have_64_bits():
    """Milliseconds since 1970 don't fit into the 32 that PostgreSQL gives an Integer; SQLite would not show it."""
    types = {type(column.type) for table in metadata.tables.values() for column in table.columns}
    assert types == {sa.BigInteger, sa.Text}


def test_the_head_is_the_newest_step():
    """A database that has it is taken as it is, without loading what makes steps."""
    assert ScriptDirectory(str(files("proxy") / "migrations")).get_current_head() == HEAD
