"""The commands: their exit codes and what they print."""

import json
import os
import pty
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from proxy.cli import main
from proxy.config.values import digest

GOOD = """
database: "sqlite:///{folder}/quotas.db"
upstreams: {{openai: {{base_url: "https://api.openai.com/v1", api_key: "${{TEST_KEY:-sk-0123456789}}"}}}}
groups:
  staff: {{quotas: {{daily: {{tokens: 200k, per: day}}}}}}
users: {{alice: {{groups: [staff], keys: ["sha256:{digest}"]}}}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config without mistakes."""
    path = tmp_path / "quotas.yaml"
    path.write_text(GOOD.format(folder=tmp_path, digest=digest("key-of-alice-0123456789abcdef")))
    return path


def _run(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=input)


def test_check_prints_what_each_group_may_do(file: Path) -> None:
    """For a valid file: one sentence for each group, and exit code 0."""
    result = _run("check", "--config", str(file))
    assert result.exit_code == 0
    assert "staff" in result.output
    assert "200,000 tokens" in result.output


def test_check_prints_every_mistake_with_its_line(file: Path) -> None:
    """All mistakes at once, and exit code 1, so that an operator can correct all of them at once."""
    text = file.read_text().replace("{tokens: 200k", "{token: 200k")
    file.write_text(text.replace("groups: [staff]", "groups: [stuff]"))
    result = _run("check", "--config", str(file))
    assert result.exit_code == 1
    assert re.search(r"quotas\.yaml:5: .*token", result.stderr)
    assert re.search(r"quotas\.yaml:6: .*stuff", result.stderr)


def test_a_warning_does_not_change_the_exit_code(file: Path) -> None:
    """A group without users is valid, but probably a mistake."""
    file.write_text(
        file.read_text().replace("  staff:", "  idle: {quotas: {daily: {tokens: 1, per: day}}}\n  staff:")
    )
    result = _run("check", "--config", str(file))
    assert result.exit_code == 0
    assert "warning: " in result.stderr
    assert "idle" in result.stderr


def test_check_warns_of_a_program_that_is_not_there(file: Path) -> None:
    """It prints the key of an upstream. On the machine of `serve` it may be there, so this is no mistake."""
    file.write_text(re.sub(r"api_key: [^,}]+}\"", "api_key: {command: [/no/such/program]}", file.read_text()))
    result = _run("check", "--config", str(file))
    assert result.exit_code == 0
    assert "api_key.command[0]: this machine has no such program" in result.stderr


@pytest.mark.parametrize("command", ["serve", "migrate"])
def test_other_commands_end_with_2_if_the_config_is_invalid(command: str, tmp_path: Path) -> None:
    """They do nothing else. The log of `serve` is JSON, and not for a person: a line for each mistake."""
    result = _run(command, "--config", str(tmp_path / "nowhere.yaml"))
    assert result.exit_code == 2
    if command == "migrate":
        assert "nowhere.yaml:1: the file can't be read" in result.stderr
    else:
        mistake, end = map(json.loads, result.stderr.splitlines())
        assert (mistake["path"], mistake["line"]) == (str(tmp_path / "nowhere.yaml"), 1)
        assert mistake["message"].startswith("the file can't be read")
        assert (end["event"], end["mistakes"], end["level"]) == ("the process can't serve", 1, "error")


def test_on_a_terminal_serve_prints_the_mistakes_of_the_config_as_check_does(file: Path) -> None:
    """Each with its line, and nothing else."""
    file.write_text(file.read_text().replace("{tokens: 200k", "{token: 200k").replace("[staff]", "[stuff]"))
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-m", "proxy", "serve", "--config", str(file)], stderr=theirs) as process:
        assert process.wait(timeout=30) == 2
    os.close(theirs)
    with os.fdopen(ours, "rb") as terminal:
        first, second = re.sub(r"\x1b\[\d+m", "", terminal.read1().decode()).strip().splitlines()
    assert re.search(r"quotas\.yaml:5: .*token", first)
    assert re.search(r"quotas\.yaml:6: .*stuff", second)


def test_a_fault_of_the_proxy_ends_serve_with_a_line_without_its_text(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, and no traceback among the lines of JSON."""

    def fail(*_: object) -> str:
        raise KeyError("secret")

    monkeypatch.setattr("proxy.commands.serve.public_address", fail)
    result = _run("serve", "--config", str(file))
    (line,) = map(json.loads, result.stderr.splitlines())
    assert (result.exit_code, line["error"], line["level"]) == (1, "KeyError", "error")
    assert line["place"].endswith("fail")
    assert "secret" not in result.stderr


def test_schema_is_a_json_schema() -> None:
    """For editors. `config/quotas.schema.json` is a copy of it."""
    schema = json.loads(_run("schema").output)
    assert "groups" in schema["properties"]
    copy = Path(__file__).parent.parent / "config" / "quotas.schema.json"
    assert copy.read_text() == _run("schema").output


def test_migrate_creates_the_schema_and_may_run_twice(file: Path, tmp_path: Path) -> None:
    """For operators who migrate the database before they replace the program."""
    for _ in range(2):
        result = _run("migrate", "--config", str(file))
        assert result.exit_code == 0
        assert "this release's schema" in result.output
    assert (tmp_path / "quotas.db").exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_serve_makes_no_database_where_there_was_one(workers: str, file: Path, tmp_path: Path) -> None:
    """T56: only `migrate`, or the option. All quotas would be unused again. Here the port is in use, which is checked
    later, so `serve` ends.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        serve = ("serve", "--config", str(file), "--workers", workers, "--port", port)
        assert _run("migrate", "--config", str(file)).exit_code == 0
        database = tmp_path / "quotas.db"
        database.unlink()
        result = _run(*serve)
        assert (result.exit_code, database.exists()) == (2, False)
        assert f"{database} is gone or empty" in result.stderr
        result = _run(*serve, "--new-database")
        assert (result.exit_code, database.exists()) == (2, True)
        assert "in use" in result.stderr
        assert f'"database":"{database}"' in result.stderr
        database.unlink()
        assert _run("migrate", "--config", str(file)).exit_code == 0
        assert "in use" in _run(*serve).stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_serve_without_migrations_says_what_to_run(workers: str, file: Path, tmp_path: Path) -> None:
    """It does not start, and makes no database. It also refuses the option that makes one."""
    serve = ("serve", "--config", str(file), "--workers", workers, "--no-migrate")
    result = _run(*serve)
    assert (result.exit_code, (tmp_path / "quotas.db").exists()) == (2, False)
    assert "is not a database yet: run `llm-quota-proxy migrate`" in result.stderr
    result = _run(*serve, "--new-database")
    assert (result.exit_code, "leave one of them out" in result.stderr) == (2, True)


def test_keys_hash_prints_the_hash_for_the_config() -> None:
    """Of a key in an argument or at the prompt. A short key is refused."""
    key = "key-of-alice-0123456789abcdef"
    assert _run("keys", "hash", key).output.strip() == f"sha256:{digest(key)}"
    assert f"sha256:{digest(key)}" in _run("keys", "hash", input=f"{key}\n").output
    short = _run("keys", "hash", "short")
    assert (short.exit_code, "24 characters" in short.stderr) == (2, True)


def test_a_port_in_use_is_an_error_without_a_traceback(file: Path) -> None:
    """With exit code 2."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = _run("serve", "--config", str(file), "--port", port, "--admin-port", "0", "--host", "127.0.0.1")
    assert result.exit_code == 2
    (error,) = (line for line in map(json.loads, result.stderr.splitlines()) if line["level"] == "error")
    assert error["reason"] == (
        f"server.api can't listen on 127.0.0.1:{port}: address already in use; stop the program that has it, or "
        "write another port there or as --port"
    )


@pytest.mark.parametrize("option", ["--control-socket", "--tie"])
def test_a_control_socket_that_is_no_socket_is_an_error(option: str, file: Path) -> None:
    """Only a parent gives this option. A parent of an older release gives it as `--tie`."""
    result = _run("serve", "--config", str(file), option, "999")
    (line,) = map(json.loads, result.stderr.splitlines())
    assert (result.exit_code, line["reason"]) == (2, "[Errno 9] Bad file descriptor")


def test_a_port_in_use_is_an_error_of_the_parent_too(file: Path) -> None:
    """Before it has started any worker."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = _run("serve", "--workers", "2", "--config", str(file), "--admin-port", port, "--port", "0")
    assert result.exit_code == 2
    assert f"server.admin can't listen on 127.0.0.1:{port}: address already in use; " in result.stderr
    assert "or write another port there or as --admin-port" in result.stderr


@pytest.mark.parametrize("command", ["serve", "migrate"])
@pytest.mark.parametrize("is_installed", [True, False])
def test_a_postgresql_that_cannot_be_used_is_an_error_without_a_traceback(
    command: str, is_installed: bool, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server can't be reached, or the driver is missing: then the message says what to install. The password is
    never printed.
    """
    if not is_installed:
        monkeypatch.setitem(sys.modules, "asyncpg", None)
        monkeypatch.delitem(sys.modules, "proxy.ledger.postgres", raising=False)
    url = "database: postgresql://u:sesame@127.0.0.1:1/db"
    file.write_text("\n".join(url if "sqlite" in line else line for line in file.read_text().splitlines()))
    result = _run(command, "--config", str(file))
    assert result.exit_code == 2
    assert ("pip install '.[postgres]'" in result.stderr) is not is_installed
    assert ("PostgreSQL can't be used" in result.stderr) is is_installed
    assert "sesame" not in result.stderr


def test_serve_imports_only_what_it_needs() -> None:
    """A fresh process shows what `serve` brings: neither other commands, nor what only they or migrations use."""
    code = "import sys, proxy.commands.serve; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = done.stdout.split()
    assert "proxy.commands.serve" in imported
    others = ("proxy.commands.", "proxy.demo", "proxy.simulator", "proxy.torture", "alembic", "asyncpg", "tiktoken")
    assert [name for name in imported if name.startswith(others)] == ["proxy.commands.serve"]


def test_help_lists_every_command() -> None:
    """Also those that are imported only when they are named, such as `torture`, with their first lines."""
    result = _run("--help")
    listed = result.output.partition("Commands:\n")[2].splitlines()
    names = (
        "admin-keys audit backup check copy-database demo events explain grant grants keys migrate quotas reset "
        "restore schema serve torture usage"
    )
    assert [line.split()[0] for line in listed] == [*names.split(), "users", "whoami"]
    assert "Use up a quota from many clients" in next(line for line in listed if "torture" in line)


def test_the_version_is_printed() -> None:
    """It is that of the package, for bug reports."""
    assert re.search(r"\d+\.\d+\.\d+", _run("--version").output)
