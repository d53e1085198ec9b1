"""Commands of the database go on without secrets that can't be read, and stop where they need them."""

import json
import time
from pathlib import Path

import jwt
import pytest
from click.testing import CliRunner, Result

from proxy.cli import main
from tests.sqlite import write_migrated

POLICY = """
database: {database}
upstreams:
  up:
    base_url: https://${{HOST_NOT_SET}}:${{PORT_NOT_SET}}/v1
    api_key: ${{file:/nonexistent/api_key}}
    headers: {{X-Tenant: "${{TENANT_NOT_SET}}"}}
    ca: /nonexistent/ca.pem
models: {{fast: {{upstream: up}}}}
admin_keys: {{ops: "${{ADMIN_NOT_SET}}", boss: {{key: "${{BOSS_NOT_SET}}"}}}}
users:
  alice: {{keys: ["${{ALICE_NOT_SET}}", {{key: "sha256:${{DIGEST_NOT_SET}}"}}]}}
  carl: {{keys: ["${{CARL_NOT_SET}}"]}}
identity:
  headers:
    - {{name: webui, key: "{source_key}", from: [127.0.0.1], unmapped: staff,
       signed: {{header: X-Jwt, secret: "${{SECRET_NOT_SET}}", issuer: webui}}}}
groups: {{staff: {{quotas: {{daily: {{requests: {limit}, per: day}}}}}}}}
"""
SOURCE_KEY = "key-of-the-webui-0123456789"
KEYS = ("ALICE_NOT_SET", "DIGEST_NOT_SET", "CARL_NOT_SET", "SOURCE_NOT_SET", "SECRET_NOT_SET")


def written(folder: Path, *, database: str | None = None, limit: str = "2", source: str = "${SOURCE_NOT_SET}") -> str:
    """The path of a config in which nearly nothing can be read."""
    write_migrated(folder / "quotas.db")
    text = POLICY.format(database=database or f"sqlite:///{folder}/quotas.db", limit=limit, source_key=source)
    (folder / "quotas.yaml").write_text(text)
    return str(folder / "quotas.yaml")


def run(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=input)


def test_one_warning_names_all_that_is_not_read(tmp_path: Path) -> None:
    """In the order of the file, the first ten of them. Keys of two users that are not known are not equal."""
    done = run("users", "list", "--config", written(tmp_path))
    names = (
        "HOST_NOT_SET",
        "PORT_NOT_SET",
        "/nonexistent/api_key",
        "TENANT_NOT_SET",
        "ADMIN_NOT_SET",
        "BOSS_NOT_SET",
    )
    shown = ", ".join((*names, *KEYS[:4]))
    assert done.stderr == f"warning: not read: {shown} and 1 more; this command does not need them\n"
    assert (done.exit_code, "alice" in done.stdout, "carl" in done.stdout) == (0, True, True)


@pytest.mark.parametrize(
    ("change", "place"), [({"database": "${URL_NOT_SET}"}, "database"), ({"limit": '"${URL_NOT_SET}"'}, "limit")]
)
@pytest.mark.parametrize("command", [("users", "list"), ("backup", "b.db"), ("restore", "b.db"), ("migrate",)])
def test_the_database_and_the_policy_are_needed(
    tmp_path: Path, command: tuple[str, ...], change: dict[str, str], place: str
) -> None:
    """The only mistake is what is needed, with its line."""
    file = written(tmp_path, **change)
    lines = Path(file).read_text().splitlines()
    line = next(number for number, text in enumerate(lines, start=1) if "URL_NOT_SET" in text)
    done = run(*command, "--config", file)
    expected = (
        f"{file}:{line}: URL_NOT_SET is not set in the environment; set it, or write ${{URL_NOT_SET:-default}}\n"
    )
    assert (done.exit_code, done.stderr) == (2, expected)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("${ALICE_NOT_SET}", "${ALICE NOT SET}", "is not a name"),
        ("requests: 2", "request: 2", "did you mean"),
        ("fast: {upstream: up}", "fast: {upstream: ap}", "no upstream"),
        ("ca: /nonexistent/ca.pem", "kind: ${KIND_NOT_SET}", "KIND_NOT_SET is not set"),
        ("database:", "databases:", "database"),
        ("upstreams:", "upstreams: [", "not YAML"),
        ("upstreams:", "model_list:", "LiteLLM"),
    ],
)
def test_other_mistakes_stop_every_command(tmp_path: Path, old: str, new: str, text: str) -> None:
    """A value in which something else is wrong too, and one for which nothing can stand in."""
    file = Path(written(tmp_path))
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    done = run("users", "list", "--config", str(file))
    assert (done.exit_code, text in done.stderr, "ADMIN_NOT_SET" in done.stderr) == (2, True, False), done.stderr


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """As before."""
    done = run("users", "list", "--config", str(tmp_path / "no.yaml"))
    assert (done.exit_code, "can't be read" in done.stderr) == (2, True)


def test_whose_a_key_is_can_be_said_only_of_known_keys(tmp_path: Path) -> None:
    """Keys of the database are known. Any other one may be one of the file."""
    file = written(tmp_path)
    run("users", "add", "bob", "--group", "staff", "--config", file)
    key = json.loads(run("keys", "create", "bob", "--json", "--config", file).stdout)
    for command in (("whoami",), ("keys", "find")):
        known = run(*command, "--config", file, input=key["key"])
        assert ("bob" in known.stdout, "CARL_NOT_SET" in known.stderr) == (True, command != ("whoami",))
        other = run(*command, "--config", file, input="sk-carl-0123456789abcdefghijklmnop")
        assert (other.exit_code, other.stdout) == (2, "")
        assert f"{', '.join(KEYS)} can't be read" in other.stderr
        assert not any(name in other.stderr.splitlines()[0] for name in KEYS), "it does need them"
    found = run("keys", "find", key["key"], "--config", file)
    assert (found.exit_code, key["id"] in found.stdout) == (0, True)
    run("keys", "revoke", key["id"], "--config", file)
    revoked = run("whoami", "--config", file, input=key["key"])
    assert (revoked.exit_code, "Nobody: revoked." in revoked.stderr) == (1, True)


def test_a_token_can_be_checked_only_with_its_secret(tmp_path: Path) -> None:
    """The source's own key is known here, and the secret of its tokens is not."""
    file = written(tmp_path, source=SOURCE_KEY)
    now = int(time.time())
    claims = {"sub": "7", "iss": "webui", "iat": now, "exp": now + 300}
    token = jwt.encode(claims, "secret-of-the-webui-0123456789-0123456789", algorithm="HS256")
    done = run("whoami", "--config", file, input=f"Authorization: Bearer {SOURCE_KEY}\nX-Jwt: {token}\n")
    assert (done.exit_code, "SECRET_NOT_SET can't be read" in done.stderr) == (2, True)
