"""`check`: its exit codes, its JSON, the folder of the database, and trials of the upstreams."""

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from proxy.cli import main
from tests.bare_upstream import connections
from tests.upstreams.test_trial import KEY, ListServer

POLICY = """\
database: {database}
upstreams:
  up: {{base_url: "{url}", api_key: "${{UP_KEY}}"}}
models: {{gpt-4o: {{max_output_tokens: 16k}}}}
groups:
  staff: {{quotas: {{daily: {{tokens: 200k, per: day}}}}}}
users: {{alice: {{groups: [staff]}}}}
"""
IDLE = "  idle: {quotas: {daily: {tokens: 1k, per: day, models: [x]}}}\nusers"


def policy(folder: Path, *, url: str = "http://127.0.0.1:1/v1", database: str | None = None) -> Path:
    """A valid file without warnings."""
    file = folder / "quotas.yaml"
    file.write_text(POLICY.format(database=database or f"sqlite:///{folder}/quotas.db", url=url))
    return file


def run(file: Path, *options: str, key: str = KEY) -> Result:
    return CliRunner().invoke(main, ["check", "--config", str(file), *options], env={"UP_KEY": key})


async def run_beside(file: Path, *options: str, key: str = KEY) -> Result:
    """The same while an upstream of the test is served."""
    return await asyncio.to_thread(partial(run, file, *options, key=key))


def test_strict_makes_a_warning_fail(tmp_path: Path) -> None:
    """Exit code 1 as for a mistake, which CI needs. The warning itself stays one."""
    file = policy(tmp_path)
    assert run(file, "--strict").exit_code == 0
    file.write_text(file.read_text().replace("users", IDLE))
    lax, strict = run(file), run(file, "--strict")
    assert (lax.exit_code, strict.exit_code) == (0, 1)
    assert lax.stderr == strict.stderr
    assert "warning: " in strict.stderr and 'group "idle" has no members' in strict.stderr


def test_json_has_findings_and_sentences(tmp_path: Path) -> None:
    """For a valid file with a warning, and for one with mistakes; one about the syntax has no path."""
    file = policy(tmp_path)
    file.write_text(file.read_text().replace("users", IDLE))
    result = run(file, "--json")
    report: Any = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    assert report.keys() == {"ok", "findings", "database", "sentences", "upstreams"}
    first = report["findings"][0]
    assert first == {
        "file": str(file),
        "line": 7,
        "path": "groups.idle",
        "severity": "warning",
        "text": 'group "idle" has no members in this file',
    }
    assert (report["ok"], report["upstreams"]) == (True, None)
    assert report["database"] == f"{tmp_path}/quotas.db"
    assert report["sentences"][0] == "staff: its one member may use 200,000 tokens a day of any model."
    assert json.loads(run(file, "--json", "--strict").stdout)["ok"] is False

    file.write_text(file.read_text().replace("200k", "200K").replace("gpt-4o:", "a: no\n  gpt-4o:"))
    result = run(file, "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["ok"], report["sentences"], report["database"]) == (1, False, [], None)
    file.write_text(POLICY.format(database="sqlite:///q.db", url="http://a/v1").replace("16k", "16K") + "x: no\n")
    found = json.loads(run(file, "--json").stdout)["findings"]
    assert [(each["line"], each.get("path"), each["severity"]) for each in found] == [
        (4, "models.gpt-4o.max_output_tokens", "error"),
        (8, None, "error"),
    ]


def test_the_folder_of_the_database_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path begins at the working directory, which is named."""
    monkeypatch.chdir(tmp_path)
    result = run(policy(tmp_path, database="sqlite:///quotas.db"))
    assert result.stderr == ""
    where = f"{tmp_path}/quotas.db, relative to the working directory {tmp_path}"
    assert result.stdout.splitlines()[0] == f"The database is {where}."
    result = run(policy(tmp_path, database="sqlite:///data/quotas.db"))
    assert result.exit_code == 0
    assert result.stderr == (
        f"warning: {tmp_path}/quotas.yaml:1: database: the folder {tmp_path}/data does not exist, relative to the "
        f"working directory {tmp_path}; create it, or write another path\n"
    )
    result = run(policy(tmp_path, database="sqlite:////no/where/quotas.db"))
    assert "the folder /no/where does not exist; create it" in result.stderr


def test_the_program_of_a_key_must_exist(tmp_path: Path) -> None:
    """On this machine, which is usually the one that runs the proxy."""
    file = policy(tmp_path)
    file.write_text(file.read_text().replace('"${UP_KEY}"', "{command: [no-such-program, an-argument]}"))
    result = run(file)
    assert result.exit_code == 0
    assert result.stderr == (
        f"warning: {file}:3: upstreams.up.api_key.command[0]: this machine has no such program; install it, or write "
        "its whole path\n"
    )


def test_postgresql_is_shown_without_its_password(tmp_path: Path) -> None:
    """With the host, also if that is an address of IPv6 or in the query."""
    for url, shown in (
        ("postgresql://u:sesame@[::1]:5432/db", "postgresql://[::1]:5432/db"),
        ("postgresql://u:sesame@/db?host=fd00::1&port=5433", "postgresql://[fd00::1]:5433/db"),
    ):
        result = run(policy(tmp_path, database=f'"{url}"'))
        assert result.stdout.splitlines()[0] == f"The database is {shown}."
        assert "sesame" not in result.stdout


async def test_connect_tries_each_upstream(tmp_path: Path) -> None:
    """One line each. One that cannot be used is a mistake at its place in the file."""
    async with connections(ListServer(["gpt-4o"]).serve) as port:
        file = policy(tmp_path, url=f"http://127.0.0.1:{port}/v1")
        good = await run_beside(file, "--connect")
        wrong = await run_beside(file, "--connect", key="sk-a-wrong-key")
        shown = await run_beside(file, "--connect", "--json")
    unreachable = await run_beside(file, "--connect")
    assert (good.exit_code, good.stderr) == (0, "")
    assert "upstream up: it answers, and lists 1 model, with the key.\n" in good.stdout
    assert wrong.exit_code == 1
    assert wrong.stderr == (
        f"{file}:3: upstreams.up: it does not accept the key (status 401); correct api_key, or the rights of the "
        "key\n"
    )
    assert "staff: its one member" in wrong.stdout
    text = "it answers, and lists 1 model, with the key"
    assert json.loads(shown.stdout)["upstreams"] == [{"upstream": "up", "ok": True, "models": 1, "text": text}]
    assert unreachable.exit_code == 1
    assert f"127.0.0.1:{port}: Connection refused; start the server" in unreachable.stderr


async def test_a_model_that_the_upstream_does_not_list_is_a_warning(tmp_path: Path) -> None:
    """So it fails only with --strict."""
    async with connections(ListServer(["o3"]).serve) as port:
        file = policy(tmp_path, url=f"http://127.0.0.1:{port}/v1")
        lax = await run_beside(file, "--connect")
        strict = await run_beside(file, "--connect", "--strict")
    assert (lax.exit_code, strict.exit_code) == (0, 1)
    assert "upstreams.up: it answers, and lists 1 model, with the key, but not gpt-4o" in lax.stderr


def test_connect_needs_a_valid_file(tmp_path: Path) -> None:
    """Nothing is asked for with a wrong one."""
    file = policy(tmp_path)
    file.write_text(file.read_text().replace("200k", "200K"))
    result = run(file, "--connect", "--json")
    assert (result.exit_code, json.loads(result.stdout)["upstreams"]) == (1, None)
