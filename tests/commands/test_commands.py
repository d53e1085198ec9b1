"""The commands for users, keys and reports: what they print, what they refuse, and their exit codes."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from proxy.cli import main
from tests.sqlite import write_migrated

FILE_KEY = "sk-alice-0123456789abcdefghijklmnop"
COLON_KEY = "sk:carl-0123456789abcdefghijklmnop"
POLICY = f"""
server: {{admin: null}}
database: sqlite:///{{folder}}/quotas.db
timezone: Europe/Berlin
upstreams: {{up: {{base_url: "http://127.0.0.1:1/v1", kind: simulator}}}}
models: {{fast: {{upstream: up}}, slow: {{upstream: up}}}}
groups:
  staff: {{quotas: {{daily: {{tokens: 2k, per: day, models: [fast]}}}}}}
  none: {{quotas: {{closed: {{tokens: 0, per: day}}}}}}
users: {{alice: {{groups: [staff], keys: [{FILE_KEY}]}}, carl: {{keys: ["{COLON_KEY}"]}}}}
identity:
  headers:
    - {{name: webui, key: key-of-the-webui-0123456789, from: [127.0.0.1], user: X-User, groups: X-Groups,
       map: {{g1: staff}}}}
"""

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a command on the database of a config; `--config` is added."""
    write_migrated(tmp_path / "quotas.db")
    file = tmp_path / "quotas.yaml"
    file.write_text(POLICY.replace("{folder}", str(tmp_path)))

    def run(*arguments: str, input: str | None = None) -> Result:
        return CliRunner().invoke(main, [*arguments, "--config", str(file)], input=input)

    return run


def as_json(result: Result) -> object:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def made(run: Run, *options: str) -> str:
    """A new key of bob, who is added for it."""
    run("users", "add", "bob", "--group", "staff")
    result = run("keys", "create", "bob", *options)
    assert result.exit_code == 0, result.stderr
    assert "shown only now" in result.stderr
    return result.stdout.strip()


def test_a_key_is_made_listed_found_rotated_and_revoked(run: Run) -> None:
    """The text of a key is on standard output only when it is made, so it can be piped into a secret store."""
    key = made(
        run, "--label", "ci", "--expires", "90d", "--from", "10.0.0.0/8", "--model", "fast", "--tag", "nightly"
    )
    id = key.split("_")[1]
    [listed] = as_json(run("keys", "list", "--json"))
    assert (listed["id"], listed["user"], listed["label"], listed["networks"]) == (
        *(id, "database:bob"),
        *("ci", ["10.0.0.0/8"]),
    )
    shown = run("keys", "show", id).stdout
    assert "models=fast from=10.0.0.0/8 tag=nightly" in shown
    assert key not in shown
    assert id in run("keys", "find", input=f'{{"authorization": "Bearer {key}"}}').stdout
    assert "alice" in run("keys", "find", input=f"-api_key={FILE_KEY}").stdout
    assert id in run("keys", "find", "CI").stdout
    new = as_json(run("keys", "rotate", id, "--overlap", "1h", "--json"))
    assert as_json(run("keys", "list", "--user", "bob", "--text", new["id"], "--json"))[0]["tag"] == "nightly"
    assert as_json(run("keys", "revoke", id, "--cut", "--json"))[0]["revoked_at"] is not None
    for wrong in (("keys", "show", "nope"), ("keys", "revoke", "nope"), ("keys", "rotate", id)):
        assert (run(*wrong).exit_code, run(*wrong).stdout) == (1, "")
    assert run("keys", "find", input="nothing").exit_code == 1


@pytest.mark.parametrize("expires", ["2027-01-01", "2027-01-01T12:00Z", "36h"])
def test_a_key_can_expire_at_a_day_an_instant_or_after_a_while(run: Run, expires: str) -> None:
    """As in the file."""
    made(run, "--expires", expires)
    assert as_json(run("keys", "list", "--json"))[0]["expires_at"] > 1_790_000_000_000


def test_a_key_is_also_found_as_an_argument(run: Run) -> None:
    """It should not be there, but "no such key" would be a wrong answer."""
    for key in (made(run, "--label", "leaked"), FILE_KEY):
        assert run("keys", "find", key).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("keys", "create", "bob", "--expires", "tomorrow"), 2, "not a day or an instant"),
        (("keys", "create", "zoe"), 1, "no user database:zoe"),
        (("keys", "create", "nowhere:zoe"), 1, "no source"),
        (("keys", "create", "alice", "--group", "none"), 1, "not in none"),
        (("keys", "create", "alice", "--from", "10.0.0.1/8"), 1, "10.0.0.0/8"),
        (("keys", "rotate", "x", "--overlap", "day"), 2, "not a duration"),
        (("users", "add", "eve", "--group", "stuff"), 1, "did you mean"),
        (("users", "disable", "alice"), 1, "user of the file"),
        (("users", "set", "alice"), 2, "say what to change"),
        (("users", "set", "alice", "--group", "staff", "--no-groups"), 2, "contradict"),
        (("users", "show", "zoe"), 1, "no user"),
        (("usage", "--since", "never"), 2, "not a duration"),
        (("explain", "zoe", "fast"), 1, "no user"),
    ],
)
def test_a_mistake_says_what_to_do(run: Run, arguments: tuple[str, ...], code: int, text: str) -> None:
    """On standard error, with exit code 1 if the answer is no and 2 if the command is wrong."""
    result = run(*arguments)
    assert (result.exit_code, text in result.stderr, result.stdout) == (code, True, "")


def test_users_are_added_changed_and_forgotten(run: Run) -> None:
    """Those of the file are shown but not changed."""
    assert "database:bob" in run("users", "add", "bob", "--service", "--email", "bob@example.org").stdout
    assert as_json(run("users", "set", "bob", "--group", "staff", "--json"))[0]["groups"] == ["staff"]
    assert as_json(run("users", "set", "bob", "--no-groups", "--identity", "webui:7", "--json"))[0]["linked"] == [
        "webui:7"
    ]
    assert as_json(run("users", "set", "bob", "--remove-identity", "webui:7", "--json"))[0]["linked"] == []
    assert "disabled" in run("users", "disable", "bob").stdout
    assert "service" in run("users", "enable", "bob").stdout
    assert as_json(run("users", "show", "alice", "--json"))[0]["groups"] == ["staff"]
    assert as_json(run("users", "list", "--text", "EXAMPLE", "--json"))[0]["id"] == "bob"
    assert "forgotten:" in as_json(run("users", "forget", "bob", "--json"))["pseudonym"]
    assert "forgotten" in run("users", "list").stdout


def test_a_file_without_a_column_leaves_it_as_it_is(run: Run, tmp_path: Path) -> None:
    """A list of addresses takes nobody's groups away; an empty cell does."""
    run("users", "add", "bob", "--group", "staff")
    for text, groups in (("id,email\r\nbob,bob@example.org\r\n", ["staff"]), ("id,groups\nbob,\n", [])):
        (tmp_path / "users.csv").write_bytes(text.encode())
        assert run("users", "import", str(tmp_path / "users.csv")).exit_code == 0
        [shown] = as_json(run("users", "show", "bob", "--json"))
        assert (shown["groups"], shown["email"]) == (groups, "bob@example.org")


def test_a_file_of_users_is_imported_with_keys(run: Run, tmp_path: Path) -> None:
    """A dry run changes nothing, and a second import nothing more."""
    file = tmp_path / "users.csv"
    file.write_text("\ufeffid,email,groups\nann,ann@example.org,staff;none\n=cmd,,\n", "utf-8")
    assert "2 would be added" in run("users", "import", str(file), "--dry-run").stderr
    assert "database:" not in run("users", "list").stdout  # only users of the file
    result = run("users", "import", str(file), "--keys")
    lines = result.stdout.splitlines()
    assert (lines[0], lines[1].split(",")[0], lines[2].split(",")[0]) == ("user,key_id,key", "ann", "'=cmd")
    again = as_json(run("users", "import", str(file), "--json"))
    assert (again["unchanged"], again["keys"]) == (["ann", "=cmd"], [])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("name\nann\n", 2),
        ("id,role\nann,admin\n", 2),
        ("id,email\nann\n", 2),
        ("id\nann,x\n", 2),
        ("", 2),
        ("id,groups\nann,stuff\n", 1),
        ("id\nann\nann\n", 1),
        (b"id\n\xff\xfe\n", 2),
        ('id\n"an\nna"\n', 1),
        ('id\n"ann\nbob\n', 2),
        ("id,groups,groups\nann,staff,none\n", 2),
        (f"id\n{'a' * 200_000}\n", 2),
        ("id\na\0b\n", 1),
    ],
)
def test_a_file_with_a_mistake_is_not_imported(run: Run, tmp_path: Path, text: str | bytes, code: int) -> None:
    """As a whole, with the line."""
    file = tmp_path / "users.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run("users", "import", str(file))
    assert result.exit_code == code
    assert result.stderr
    assert "database:" not in run("users", "list").stdout  # only users of the file


def test_whoami_says_who_it_is_and_why_not(run: Run) -> None:
    """Of a key, and of the headers of a request."""
    key = made(run, "--from", "10.0.0.0/8")
    assert "alice, of the source file, in staff" in run("whoami", input=FILE_KEY).stdout
    assert as_json(run("whoami", "--json", "--peer", "10.1.2.3", input=key))["user"] == "database:bob"
    for text, reason in ((key, "wrong network"), (f"{key}x", "malformed"), ("x" * 30, "unknown")):
        result = run("whoami", input=text)
        assert (result.exit_code, reason in result.stderr) == (1, True)
    headers = "Authorization: Bearer key-of-the-webui-0123456789\nX-User: 7\nX-Groups: g1\n"
    found = as_json(run("whoami", "--json", input=headers))
    assert (found["user"], found["source"], found["groups"]) == ("webui:7", "webui", ["staff"])
    assert run("whoami", "--json", input="Authorization: Bearer key-of-the-webui-0123456789\n").exit_code == 1
    assert "webui:7" not in run("users", "list").stdout  # the question makes nobody
    assert "carl" in run("whoami", input=COLON_KEY).stdout
    assert "carl" in run("whoami", input=f"api-key: {COLON_KEY}").stdout
    assert "carl" in run("whoami", input=f"api-key:{COLON_KEY}").stdout


def test_explain_says_what_binds_and_when_it_is_admitted(run: Run) -> None:
    """Exit code 1 if a small call would be refused, or the model is not covered."""
    admitted = run("explain", "alice", "fast")
    assert (admitted.exit_code, "staff/daily" in admitted.stdout) == (0, True)
    assert "alice is in staff (by the file)" in admitted.stdout
    run("users", "add", "eve", "--group", "none")
    refused = run("explain", "eve", "fast", "--json")
    assert (refused.exit_code, json.loads(refused.stdout)["reason"]) == (1, "exhausted")
    assert "no reset helps" in run("explain", "eve", "fast").stderr
    assert "no quota" in run("explain", "alice", "slow").stderr
    assert "no such model" in run("explain", "alice", "nope").stderr
    run("users", "disable", "eve")
    assert "disabled" in run("explain", "eve", "fast").stderr


def test_usage_is_printed_as_a_table_as_csv_and_as_json(run: Run, tmp_path: Path) -> None:
    """A name that a spreadsheet would take for a formula is guarded."""
    with sqlite3.connect(tmp_path / "quotas.db") as connection:
        connection.execute(
            "INSERT INTO usage_by_day VALUES (strftime('%s', 'now') / 86400 * 86400000, '=ann', 'staff', 'fast', "
            "2, 2, 30, 12, 0, 0, 1)"
        )
    assert "=ann  2" in run("usage").stdout
    assert "'=ann,2,2,30,12,0,0,1" in run("usage", "--csv").stdout
    [row] = as_json(run("usage", "--by", "day", "--json"))
    assert (row["calls"], row["input_tokens"]) == (2, 30)
    assert len(row["day"]) == len("2026-11-29")
    assert as_json(run("usage", "--user", "alice", "--json")) == []
    assert as_json(run("usage", "--by", "key", "--json")) == []


def test_without_a_database_the_error_says_what_to_do(run: Run, tmp_path: Path) -> None:
    """No command makes one."""
    (tmp_path / "quotas.db").unlink()
    result = run("users", "list")
    assert (result.exit_code, "is not a database" in result.stderr) == (2, True)
    assert not (tmp_path / "quotas.db").exists()
