"""The commands `quotas`, `grant`, `grants`, `reset` and `audit`, and what other commands know of their changes."""

import csv
import io
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proxy.config.schema import Quota as QuotaSection
from proxy.policy.amounts import Measure
from proxy.server import wall_clock_ms
from tests.commands.test_commands import FILE_KEY, POLICY, Run, as_json, run  # noqa: F401 - a fixture

MADE = ("quotas", "set", "staff/hourly")


def use(folder: Path, subject: str, quota: str, used: int) -> None:
    """Note that so many input tokens are used in a window that is open."""
    now = wall_clock_ms()
    with sqlite3.connect(folder / "quotas.db") as connection:
        connection.execute(
            "INSERT INTO counters (subject, quota_id, opened_at, resets_at, used_input, used_output, used_requests, "
            "held_input, held_output, held_requests) VALUES (?, ?, ?, ?, ?, 0, 1, 0, 0, 0)",
            (subject, quota, now - 1000, now + 10**8, used),
        )


def fields_of(run: Run, id: str = "staff/hourly") -> dict[str, Any]:  # noqa: F811
    """The fields of a quota that are not as they are by default."""
    [found] = [each for each in listed(run) if each["id"] == id]
    defaults = {name: info.default for name, info in QuotaSection.named_fields().items()}
    return {name: value for name, value in found["fields"].items() if value != defaults[name]}


def listed(run: Run) -> list[dict[str, Any]]:  # noqa: F811
    found: Any = as_json(run("quotas", "list", "--json"))
    return list(found)


def test_a_quota_is_made_changed_and_deleted(run: Run) -> None:  # noqa: F811
    """What is not given stays, and an empty value removes a limit."""
    made = run(*MADE, "--tokens", "200k", "--requests", "50", "--per", "1h", "--models", "fast", "--shared")
    assert made.exit_code == 0, made.stderr
    assert "200000 tokens, 50 requests" in made.stdout
    assert "shared=true" in made.stdout
    assert "Users of the groups: 1." in made.stderr
    assert run(*MADE, "--requests", "", "--no-shared", "--overdraft", "1k").exit_code == 0
    assert fields_of(run) == {"models": ["fast"], "tokens": 200_000, "per": "1h", "overdraft": 1000}
    assert run(*MADE, "--models", "", "--tokens", "100").exit_code == 0
    assert fields_of(run) == {"tokens": 100, "per": "1h", "overdraft": 1000}
    assert [each["id"] for each in listed(run)] == ["staff/daily", "staff/hourly", "none/closed"]
    as_yaml = run("quotas", "list", "--group", "staff", "--yaml").stdout
    assert "hourly: {tokens: 100, per: 1h, overdraft: 1000}" in as_yaml
    assert run("quotas", "delete", "staff/hourly").exit_code == 0
    assert run("quotas", "delete", "staff/hourly").exit_code == 1
    assert len(listed(run)) == 2


def test_each_field_of_a_quota_is_an_option(run: Run) -> None:  # noqa: F811
    """And each measure one of `grant`, so a new kind of limit appears by itself."""
    for command, names in ((("quotas", "set"), QuotaSection.named_fields()), (("grant",), [*Measure])):
        shown = run(*command, "--help").stdout
        assert [name for name in names if f"--{str(name).replace('_', '-')}" not in shown] == []


def test_a_dry_run_changes_nothing_and_says_who_is_over(run: Run, tmp_path: Path) -> None:  # noqa: F811
    """Of a quota, a grant, a reset and an import."""
    assert run(*MADE, "--tokens", "1k", "--per", "day").exit_code == 0
    use(tmp_path, "user:alice", "staff/hourly", 500)
    tried = as_json(run(*MADE, "--tokens", "400", "--dry-run", "--json"))
    assert (tried["effects"]["members"], tried["effects"]["members_over"]) == (1, 1)  # type: ignore[index,call-overload]
    warned = run("quotas", "set", "default/x", "--tokens", "0", "--per", "day", "--dry-run")
    assert warned.exit_code == 1  # there is no such group
    granted = run(
        *("grant", "alice", "--quota", "staff/hourly", "--tokens", "1", "--until", "1h"), "--reason", "x", "--dry-run"
    )
    assert "Nothing is changed" in granted.stderr
    assert "hourly" in run("reset", "alice", "--dry-run").stdout
    assert "Would be taken over" in run("quotas", "import", str(tmp_path / "quotas.yaml"), "--dry-run").stdout
    assert "would be deleted" in run("quotas", "delete", "staff/hourly", "--dry-run").stdout
    assert fields_of(run)["tokens"] == 1000
    [change] = as_json(run("audit", "--json"))  # type: ignore[misc]
    assert change["action"] == "quota.set"
    assert as_json(run("grants", "list", "--ended", "--json")) == []


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ((*MADE, "--requests", "x", "--per", "day"), 1, "--requests: "),
        ((*MADE, "--requests", "1"), 1, "--per: "),
        ((*MADE, "--per", "day"), 1, "limits nothing"),
        (MADE, 2, "say what to set"),
        (("quotas", "set", "staff", "--requests", "1"), 2, "GROUP/NAME"),
        (("quotas", "set", "staff/daily", "--requests", "1"), 1, "quota of the file"),
        (("quotas", "set", "nobody/daily", "--requests", "1", "--per", "day"), 1, "no group"),
        (("quotas", "list", "--group", "stuff"), 1, "did you mean"),
        (("grant", "--quota", "staff/daily", "--tokens", "1", "--until", "1h", "--reason", "x"), 2, "for whom"),
        (("grant", "alice", "--quota", "staff/daily", "--until", "1h", "--reason", "x"), 2, "--input-tokens"),
        (
            ("grant", "alice", "--quota", "staff/daily", "--tokens", "x", "--until", "1h", "--reason", "x"),
            *(2, "for --tokens"),
        ),
        (
            ("grant", "alice", "--quota", "staff/daily", "--requests", "1", "--until", "1h", "--reason", "x"),
            *(1, "does not limit requests"),
        ),
        (
            ("grant", "alice", "--quota", "staff/daily", "--tokens", "1", "--until", "2020-01-01", "--reason", "x"),
            *(1, "in the past"),
        ),
        (
            ("grant", "--group", "none", "--quota", "staff/daily", "--tokens", "1", "--until", "1h", "--reason", "x"),
            *(2, "no quota of none"),
        ),
        (("grants", "end", "nope"), 1, "no grant"),
        (("reset",), 1, "say whose"),
        (("reset", "zoe"), 1, "no user"),
        (("audit", "--since", "ever"), 2, "not a duration"),
        (("explain", "alice"), 2, "name a model"),
        (("explain", "req_1"), 1, "no refusal"),
    ],
)
def test_a_mistake_says_what_to_do(run: Run, arguments: tuple[str, ...], code: int, text: str) -> None:  # noqa: F811
    """And nothing is changed."""
    result = run(*arguments)
    assert (result.exit_code, text in result.stderr, result.stdout) == (code, True, ""), result.stderr
    assert as_json(run("audit", "--json")) == []


def test_somebody_elses_change_of_a_quota_is_not_undone(run: Run, tmp_path: Path) -> None:  # noqa: F811
    """The command sends the version that it read. Here another one writes between the two."""
    assert run(*MADE, "--tokens", "1k", "--per", "day").exit_code == 0
    with sqlite3.connect(tmp_path / "quotas.db") as connection:
        # When the version is raised, which is how a change begins, the quota is another one already.
        connection.execute(
            "CREATE TRIGGER meanwhile AFTER UPDATE OF version ON directory BEGIN "
            """UPDATE quotas SET document = '{"tokens": 7, "per": "day"}'; END"""
        )
    result = run(*MADE, "--requests", "5")
    assert (result.exit_code, "was changed since" in result.stderr) == (1, True)


def test_a_grant_is_made_listed_and_ended(run: Run) -> None:  # noqa: F811
    """For a user and for a group; `explain` knows the limit with it."""
    grant = ("grant", "alice", "--quota", "staff/daily", "--tokens", "3k", "--until", "24h", "--reason", "a deadline")
    [own] = as_json(run(*grant, "--json"))  # type: ignore[misc]
    of_all = ("grant", "--group", "staff", "--quota", "staff/daily", "--tokens", "1k", "--until", "2100-01-01")
    assert "at most a year" in run(*of_all, "--reason", "x").stderr
    assert run(*of_all[:-1], "36h", "--reason", "x").exit_code == 0
    [level] = as_json(run("explain", "alice", "fast", "--json"))["quotas"][0]["limits"]  # type: ignore[index,call-overload]
    assert level["limit"] == 6000
    shown = run("grants", "list").stdout
    assert ("(all)" in shown, "a deadline" in shown, "3000 tokens" in shown) == (True, True, True)
    [first] = as_json(run("grants", "list", "--user", "alice", "--json"))  # type: ignore[misc]
    assert first["id"] == own["id"]
    assert "--after" in run("grants", "list", "--limit", "1").stderr
    assert as_json(run("grants", "end", own["id"], "--json"))[0]["ended_at"] is not None  # type: ignore[index]
    assert len(as_json(run("grants", "list", "--json"))) == 1  # type: ignore[arg-type]
    assert len(as_json(run("grants", "list", "--ended", "--json"))) == 2  # type: ignore[arg-type]


def test_a_reset_empties_what_was_used(run: Run, tmp_path: Path) -> None:  # noqa: F811
    """Of a user, of a group, and of one of its quotas."""
    for subject in ("user:alice", "user:carl"):
        use(tmp_path, subject, "staff/daily", 1500)
    assert as_json(run("reset", "alice", "--json"))["quotas"][0]["counters"] == 1  # type: ignore[index,call-overload]
    assert "0 counters are reset" in run("reset", "--group", "none").stderr
    done = run("reset", "--group", "staff", "--quota", "staff/daily")
    assert "1500" in done.stdout
    assert "1 counters are reset" in done.stderr
    [level] = as_json(run("explain", "alice", "fast", "--json"))["quotas"][0]["limits"]  # type: ignore[index,call-overload]
    assert level["used"] == 0


def test_the_audit_log_has_what_commands_did(run: Run) -> None:  # noqa: F811
    """More than a page of it, as a table, as JSON and as CSV; filtered."""
    run(*MADE, "--tokens", "1k", "--per", "day")
    run(*MADE, "--tokens", "2k")
    run("users", "add", "bob")
    found: Any = as_json(run("audit", "--json"))
    assert [each["action"] for each in found] == ["user.add", "quota.set", "quota.set"]
    assert found[0]["actor"].startswith("cli:")
    assert found[1]["after"] == {"tokens": 2000, "per": "day"}
    table = run("audit", "--target", "staff/hourly", "--since", "1h").stdout
    assert "tokens: 1000 → 2000" in table
    assert "user.add" not in table
    assert as_json(run("audit", "--action", "quota.delete", "--json")) == []
    assert as_json(run("audit", "--actor", "admin:ops", "--json")) == []
    rows = list(csv.DictReader(io.StringIO(run("audit", "--csv", "--action", "quota.set").stdout)))
    assert json.loads(rows[0]["before"]) == {"tokens": 1000, "per": "day"}
    assert rows[1]["before"] == ""


def test_all_pages_of_the_audit_log_are_printed(run: Run, tmp_path: Path) -> None:  # noqa: F811
    """1,200 changes are more than one page."""
    now = wall_clock_ms()
    with sqlite3.connect(tmp_path / "quotas.db") as connection:
        connection.executemany(
            "INSERT INTO audit (id, at, actor, action, target) VALUES (?, ?, 'admin:ops', 'x', 'y')",
            [(f"aud_{number:05}", now - number // 3) for number in range(1200)],
        )
    found: Any = as_json(run("audit", "--json"))
    assert len({each["id"] for each in found}) == len(found) == 1200


def test_a_file_is_taken_over_and_its_parts_removed_from_it(run: Run, tmp_path: Path) -> None:  # noqa: F811
    """It says what to remove. After that everything is as before, the usage included, and can be changed."""
    file = tmp_path / "quotas.yaml"
    use(tmp_path, "user:alice", "staff/daily", 1500)
    result = run("quotas", "import", str(file))
    assert result.exit_code == 0, result.stderr
    for text in (
        *("2 groups, 2 quotas, the groups of 1 users", "- the groups none"),
        *("- only the quotas of staff: `identity`", "- `groups` of the users alice"),
    ):
        assert text in result.stdout
    before = as_json(run("explain", "alice", "fast", "--json"))
    lines = [line for line in file.read_text().splitlines() if not line.startswith("  none: ")]
    text = "\n".join(lines).replace("quotas: {daily: {tokens: 2k, per: day, models: [fast]}}", "")
    file.write_text(text.replace("alice: {groups: [staff], ", "alice: {"))
    checked = run("check")
    assert checked.exit_code == 0, checked.stderr
    after: Any = as_json(run("explain", "alice", "fast", "--json"))
    assert {**after, "at": 0} == {**before, "at": 0}  # type: ignore[dict-item]
    assert after["quotas"][0]["limits"][0]["used"] == 1500
    assert "daily" in run("quotas", "set", "staff/daily", "--tokens", "5k").stdout
    [staff, _] = listed(run)
    assert (staff["fields"]["tokens"], staff["origin"], staff["without_effect"]) == (5000, "database", None)


def test_a_key_for_some_groups_keeps_them_in_the_file(run: Run, tmp_path: Path) -> None:  # noqa: F811
    """Otherwise the file would have a mistake."""
    file = tmp_path / "quotas.yaml"
    keys = f"[{{key: {FILE_KEY}, groups: [none]}}]"
    file.write_text(
        POLICY.replace("{folder}", str(tmp_path)).replace(f"[staff], keys: [{FILE_KEY}]", f"[none], keys: {keys}")
    )
    left: Any = as_json(run("quotas", "import", str(file), "--json"))
    assert left["remove"] == {"groups": [], "quotas_of": ["staff", "none"], "groups_of_users": []}


def test_other_commands_know_what_was_made_at_run_time(run: Run, tmp_path: Path) -> None:  # noqa: F811
    """A group that was taken over from another file, and its quotas. `check` is about the file alone."""
    other = tmp_path / "other.yaml"
    other.write_text(POLICY.replace("{folder}", str(tmp_path)).replace("staff", "lab").replace("none", "club"))
    assert run("users", "add", "eve", "--group", "lab").exit_code == 1
    assert run("quotas", "import", str(other)).exit_code == 0
    assert run("users", "add", "eve", "--group", "lab").exit_code == 0
    assert run("keys", "create", "eve", "--group", "lab").exit_code == 0
    found: Any = as_json(run("explain", "eve", "fast", "--json"))
    assert (found["groups"], found["quotas"][0]["quota"]) == (["lab"], "lab/daily")
    assert as_json(run("users", "show", "alice", "--json"))[0]["groups"] == ["staff", "lab"]  # type: ignore[index]
    assert run("reset", "--group", "lab").exit_code == 0
    assert "lab" not in run("check").stdout


def test_a_stored_refusal_is_explained(run: Run, tmp_path: Path) -> None:  # noqa: F811
    """As it was decided, and what would be decided now."""
    details = {
        "quotas": [
            {
                "quota": "staff/daily",
                "limits": [{"measure": "tokens", "limit": 2000, "used": 1900, "held": 50, "remaining": 50}],
            }
        ]
    }
    row = ("req_7", wall_clock_ms(), "alice", "staff/daily", "fast", "/v1/chat/completions", "exhausted", "tokens")
    with sqlite3.connect(tmp_path / "quotas.db") as connection:
        connection.execute(
            "INSERT INTO refusals (request_id, at, user_name, quota_id, model, endpoint, verdict, measure, maximum, "
            "used, held, needed, count, details) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 2000, 1900, 50, 300, 4, ?)",
            (*row, json.dumps(details)),
        )
    result = run("explain", "req_7")
    assert result.exit_code == 0
    for text in ("by staff/daily", "needed 300", "1900 used and 50 held of 2000", "4 calls", "admitted now"):
        assert text in result.stdout, text
    found: Any = as_json(run("explain", "req_7", "--json"))
    assert (found["refusal"]["count"], found["now"]["admitted"]) == (4, True)
    with sqlite3.connect(tmp_path / "quotas.db") as connection:
        connection.execute("UPDATE refusals SET user_name = 'zoe', details = NULL")
    assert "not there any more" in run("explain", "req_7").stdout


def test_a_closed_standard_output_aborts_no_command(run: Run, tmp_path: Path) -> None:  # noqa: F811
    """`>&-` of a shell: the change is made."""
    arguments = ["users", "add", "bob", "--config", str(tmp_path / "quotas.yaml")]
    line = ["sh", "-c", 'exec "$@" >&- 2>&- <&-', "sh", sys.executable, "-m", "proxy", *arguments]
    assert subprocess.run(line, check=False).returncode == 0
    assert "database:bob" in run("users", "list").stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_has_no_traceback(run: Run, tmp_path: Path) -> None:  # noqa: F811
    """The command could not say what it found."""
    line = [sys.executable, "-m", "proxy", "users", "list", "--config", str(tmp_path / "quotas.yaml")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "the output can't be written: [Errno 28] No space left on device\n")
