"""The commands `admin-keys`."""

from pathlib import Path

import pytest

from tests.commands.test_commands import Run, as_json, run  # noqa: F401 - a fixture


def test_an_admin_key_is_made_listed_and_revoked(run: Run) -> None:  # noqa: F811
    """Its text is printed once, and alone on standard output."""
    result = run("admin-keys", "create", "ann", "--expires", "90d")
    assert result.exit_code == 0
    id = result.stdout.strip().split("_")[1]
    assert f"This is the admin key {id}." in result.stderr
    manager = ["admin-keys", "create", "max", "--role", "manager", "--group", "staff", "--grant-up-to", "50%"]
    made = as_json(run(*manager, "--json"))
    assert made["key"].startswith(f"lqp_{made['id']}_")  # type: ignore[index,call-overload]
    found = {each["name"]: each for each in as_json(run("admin-keys", "list", "--json"))}  # type: ignore[attr-defined]
    assert (found["ann"]["role"], found["ann"]["groups"], found["ann"]["grant_up_to"]) == (
        "administrator",
        None,
        None,
    )
    assert (found["max"]["role"], found["max"]["groups"], found["max"]["grant_up_to"]) == ("manager", ["staff"], 50)
    assert "50%" in run("admin-keys", "list").stdout
    first = run("admin-keys", "list", "--limit", "1")
    cursor = first.stderr.split("--after ")[1].strip()
    assert len(run("admin-keys", "list", "--after", cursor).stdout.splitlines()) == 2
    assert as_json(run("admin-keys", "revoke", id, "--json"))[0]["revoked_at"] is not None  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["create", "a b"], 1),
        (["create", "max", "--role", "manager"], 1),
        (["create", "max", "--role", "manager", "--group", "nobody"], 1),
        (["create", "ann", "--grant-up-to", "half"], 2),
        (["create", "ann", "--role", "root"], 2),
        (["revoke", "nothing"], 1),
    ],
)
def test_what_is_wrong_is_refused(run: Run, arguments: list[str], code: int, tmp_path: Path) -> None:  # noqa: F811
    """With the exit code of other commands, and nothing is made."""
    assert run("admin-keys", *arguments).exit_code == code
    assert as_json(run("admin-keys", "list", "--json")) == []
