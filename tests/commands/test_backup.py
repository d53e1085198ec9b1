"""`backup`, `restore` and `copy-database` as commands: what they print and refuse, and what calls get afterwards."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from proxy.cli import main
from tests.audit import audit, rows
from tests.postgres import shared
from tests.sqlite import write_migrated
from tests.stage import Clock, Stage, stage

CONFIG = """
database: {database}
timezone: Europe/Berlin
upstreams: {{up: {{base_url: "http://127.0.0.1:1/v1", kind: simulator}}}}
models: {{fast: {{upstream: up}}}}
"""
USED_UP = """
models: {gpt-4o-mini: {upstream: simulated}}
groups: {staff: {quotas: {daily: {requests: 2, per: 3000d}}}}
users: {alice: {groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}}
"""
CHAT = "/v1/chat/completions"
HELLO = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}


def config(folder: Path, database: str) -> str:
    """The path of a config with this database."""
    (folder / "quotas.yaml").write_text(CONFIG.format(database=database))
    return str(folder / "quotas.yaml")


def run(*arguments: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(each) for each in arguments])


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A config with a database that has the tables and no rows."""
    write_migrated(tmp_path / "quotas.db")
    return config(tmp_path, f"sqlite:///{tmp_path}/quotas.db")


def test_a_backup_is_made_and_restored(file: str, tmp_path: Path) -> None:
    """A key that was revoked after the backup is valid again, and the command says what to do about that."""
    run("users", "add", "bob", "--config", file)
    key = json.loads(run("keys", "create", "bob", "--json", "--config", file).stdout)["id"]
    made = run("backup", tmp_path / "b.db", "--config", file)
    assert (made.exit_code, made.stdout) == (
        0,
        f"{tmp_path}/b.db: {(tmp_path / 'b.db').stat().st_size:,} bytes, 0 calls, 0 of them in flight.\n",
    )
    assert run("keys", "revoke", key, "--config", file).exit_code == 0
    restored = run("restore", tmp_path / "b.db", "--config", file)
    assert restored.exit_code == 0, restored.stderr
    assert f"The database before it is {tmp_path}/quotas.db.replaced-1." in restored.stdout
    assert "Revoke again what was revoked after it" in restored.stdout
    [listed] = json.loads(run("keys", "list", "--json", "--config", file).stdout)
    assert (listed["id"], listed["revoked_at"]) == (key, None)


def test_their_output_for_programs(file: str, tmp_path: Path) -> None:
    """One JSON object."""
    made = json.loads(run("backup", tmp_path / "b.db", "--json", "--config", file).stdout)
    size = (tmp_path / "b.db").stat().st_size
    plain = {"bytes": size, "calls": 0, "open_calls": 0, "last_call_at": None}
    assert made == {"file": f"{tmp_path}/b.db", **plain}
    (tmp_path / "quotas.db").unlink()
    restored = json.loads(run("restore", tmp_path / "b.db", "--json", "--config", file).stdout)
    assert restored == {"file": f"{tmp_path}/quotas.db", **plain, "kept": None}
    text = run("restore", tmp_path / "b.db", "--config", file).stdout
    assert "replaced-1" in text


def test_a_file_that_is_there_is_replaced_only_with_force(file: str, tmp_path: Path) -> None:
    """Exit code 2, and the error on standard error."""
    assert run("backup", tmp_path / "b.db", "--config", file).exit_code == 0
    again = run("backup", tmp_path / "b.db", "--config", file)
    assert (again.exit_code, again.stdout) == (2, "")
    assert "is there already: delete it, or write another name" in again.stderr
    assert run("backup", tmp_path / "b.db", "--force", "--config", file).exit_code == 0


@pytest.mark.parametrize(("command", "text"), [("backup", "pg_dump"), ("restore", "pg_restore")])
def test_postgresql_has_its_own_commands(command: str, text: str, tmp_path: Path) -> None:
    """The error names the right one, and no password."""
    result = run(command, tmp_path / "b.db", "--config", config(tmp_path, "postgresql://u:secret@host/name"))
    assert result.exit_code == 2
    assert result.stderr.startswith("postgresql://host/name is in PostgreSQL: ")
    assert result.stderr.endswith(f" with {text}, see docs/backup.md\n")
    assert "secret" not in result.output


def test_a_call_is_in_the_summary_with_its_time(file: str, tmp_path: Path) -> None:
    """In the time zone of the config."""
    with sqlite3.connect(tmp_path / "quotas.db") as connection:
        connection.execute(
            "INSERT INTO calls (id, owner, state, user_name, model, endpoint, upstream, through, reserved_at, "
            "hold_input, hold_output, lines, would_refuse) "
            "VALUES ('1', 'x', 'open', 'ann', 'm', 'chat', 'u', 's', 0, 1, 1, '[]', '[]')"
        )
    connection.close()
    assert run("backup", tmp_path / "b.db", "--config", file).stdout.endswith(
        "1 calls, 1 of them in flight, the last one of 1970-01-01 01:00 CET.\n"
    )


def test_a_large_backup_says_how_far_it_is(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On standard error."""
    monkeypatch.setattr("proxy.commands.backup._PAGES_SHOWN", 1)
    assert " pages\n" in run("backup", tmp_path / "b.db", "--config", file).stderr


# ------------------------------------------------------------------------------------------------------ copy-database


def test_a_database_moves_to_postgresql_and_back(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The URL may come from the environment. The sums are printed, the progress is on standard error."""
    monkeypatch.setattr("proxy.commands.backup._ROWS_SHOWN", 1)
    run("users", "add", "bob", "--config", file)
    monkeypatch.setenv("TARGET", asyncio.run(shared().fresh()))
    there = run("copy-database", f"sqlite:///{tmp_path}/quotas.db", "${TARGET}")
    assert there.exit_code == 0, there.stderr
    assert "users: 1 rows" in there.stderr
    assert "Both have the same rows" in there.stdout
    assert [line.split() for line in there.stdout.splitlines() if "version" in line] == [["version", "2", "2"]]
    back = run("copy-database", "${TARGET}", f"sqlite:///{tmp_path}/back.db", "--json")
    found = json.loads(back.stdout)
    assert found["equal"] is True
    assert found["source"]["users"] == found["target"]["users"]
    assert found["target"]["users"]["lengths"]["id"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"quotas.db", "back.db", "quotas.yaml"}
    assert rows(tmp_path / "back.db", "users") == rows(tmp_path / "quotas.db", "users")
    audit(tmp_path / "back.db")


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        ("sqlite:///{folder}/quotas.db", "${{NOWHERE}}", "NOWHERE is not set"),
        ("mysql://host/name", "sqlite:///{folder}/new.db", "this is not a database"),
        ("sqlite:///{folder}/quotas.db", "sqlite:///{folder}/quotas.db", "is there already"),
        ("sqlite:///{folder}/nowhere.db", "sqlite:///{folder}/new.db", "is not a database"),
        ("sqlite:///{folder}/quotas.db", "postgresql://u:secret@127.0.0.1:1/name", "127.0.0.1:1"),
    ],
)
def test_a_copy_that_cannot_be_made_leaves_nothing(
    file: str, tmp_path: Path, source: str, target: str, text: str
) -> None:
    """Exit code 2, and an error without the password."""
    before = sorted(tmp_path.iterdir())
    result = run("copy-database", source.format(folder=tmp_path), target.format(folder=tmp_path))
    assert result.exit_code == 2
    assert text in result.stderr
    assert "secret" not in result.output
    assert sorted(tmp_path.iterdir()) == before


def test_a_copy_that_differs_ends_with_1(file: str, tmp_path: Path) -> None:
    """And is not there afterwards. Here a trigger of somebody else changes what is written."""
    run("users", "add", "bob", "--config", file)

    async def target() -> str:
        url = await shared().migrated()
        await shared().run(
            "CREATE FUNCTION wrong() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN NEW.created_at = 5; RETURN NEW; END $$",
            "CREATE TRIGGER wrong BEFORE INSERT ON llm_quota_proxy.users FOR EACH ROW EXECUTE FUNCTION wrong()",
            url=url,
        )
        return url

    url = asyncio.run(target())
    result = run("copy-database", f"sqlite:///{tmp_path}/quotas.db", url)
    assert result.exit_code == 1
    assert "created_at" in result.stdout
    assert "nothing was kept of it" in result.stderr
    assert asyncio.run(shared().run("SELECT * FROM llm_quota_proxy.users", url=url)) == []


STOPPED = """
import os, sys
import proxy.commands.backup as backup
sent = int(sys.argv[1])
backup._show_progress = lambda table, rows: table == "users" and os.kill(os.getpid(), sent)
sys.argv = ["llm-quota-proxy", "copy-database", *sys.argv[2:]]
from proxy.cli import main
main()
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_copy_that_is_stopped_leaves_nothing(file: str, tmp_path: Path, sent: signal.Signals) -> None:
    """By Ctrl-C, or by a job that is deleted."""
    run("users", "add", "bob", "--config", file)
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [
            *(sys.executable, "-c", STOPPED, str(int(sent))),
            *(f"sqlite:///{tmp_path}/quotas.db", f"sqlite:///{tmp_path}/new.db"),
        ],
        capture_output=True,
        timeout=100,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.returncode == 1
    assert b"Aborted!" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


# ---------------------------------------------------------------------------------------------------- with real calls


async def run_outside(*arguments: object) -> str:
    """Run a command in a process of its own, and return what it prints. It must succeed."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", *map(str, arguments)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await child.communicate()
    assert child.returncode == 0, errors
    return output.decode()


async def _refusal(on: Stage) -> object:
    """The members of the 429 that a call gets which say why and until when."""
    reply = await on.post(CHAT, HELLO)
    assert reply.status == 429
    return {name: reply.error[name] for name in ("code", "quota", "resets_at") if name in reply.error}


async def test_a_quota_that_was_used_up_is_used_up_after_the_move(tmp_path: Path) -> None:
    """A real call gets the same 429 from a proxy on PostgreSQL, with the same reset, and again on SQLite."""
    clock = Clock()
    async with stage(USED_UP, folder=tmp_path, clock=clock) as on:
        for _ in range(2):
            assert (await on.post(CHAT, HELLO)).status == 200
        await on.all_settled()
        refusal = await _refusal(on)
    databases = [f"sqlite:///{tmp_path}/quotas.db", await shared().fresh(), f"sqlite:///{tmp_path}/back.db"]
    for source, target in pairwise(databases):
        if source.startswith("postgresql"):
            await shared().run("UPDATE llm_quota_proxy.owners SET alive_until = 0", url=source)
        assert "Both have the same rows" in await run_outside("copy-database", source, target)
        async with stage(USED_UP, folder=tmp_path, clock=clock, database=target) as on:
            assert await _refusal(on) == refusal
            await on.audit()


async def test_calls_that_are_open_in_a_backup_are_charged_when_it_is_served(tmp_path: Path) -> None:
    """Their full reservation. What was used after the backup is free again."""
    (tmp_path / "at").mkdir()
    clock = Clock()
    async with stage(folder=tmp_path, clock=clock) as on:
        assert (await on.post(CHAT, HELLO)).status == 200
        await on.all_settled()
        used, _ = await on.used()
        received = on.simulator.received
        call = on.begin(CHAT, {**HELLO, "max_tokens": 500, "metadata": {"simulate": "hang"}})
        await on.simulator.until(lambda: on.simulator.received > received)
        made = await run_outside("backup", tmp_path / "b.db", "--config", config(tmp_path / "at", on.database))
        assert "2 calls, 1 of them in flight" in made
        [counter] = rows(tmp_path / "b.db", "counters")
        held = counter["held_input"] + counter["held_output"]
        await on.hang_up(call)
    other = config(tmp_path / "at", f"sqlite:///{tmp_path}/at/quotas.db")
    assert "Revoke again" in await run_outside("restore", tmp_path / "b.db", "--config", other)
    async with stage(folder=tmp_path, clock=clock, database=f"sqlite:///{tmp_path}/at/quotas.db") as on:
        assert await on.used() == (used + held, 0)
        await on.audit()
