"""A key has leaked: the commands find it beside a running server, print what it used, and cut it off."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.stage import STAFF, Stage, stage

pytestmark = pytest.mark.journey

CHAT = "/v1/chat/completions"
SHORT: dict[str, Any] = {"model": "gpt-4o-mini", "metadata": {"simulate": "tokens=5"}}
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


async def command(config: Path, *arguments: str, input: str = "") -> Any:
    """What a command prints as JSON, run beside the server as an operator runs it."""
    program = [sys.executable, "-m", "proxy", *arguments, "--config", str(config), "--json"]
    process = await asyncio.create_subprocess_exec(
        *program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate(input.encode())
    assert process.returncode == 0, err.decode()
    return json.loads(out)


async def call(on: Stage, key: str, body: dict[str, Any]) -> int:
    headers = {"authorization": f"Bearer {key}"}
    return (await on.post(CHAT, body | HELLO, user=None, headers=headers)).status


async def made(config: Path, user: str, label: str) -> tuple[str, str]:
    """The id and the text of a new key."""
    new = await command(config, "keys", "create", user, "--label", label)
    return new["id"], new["key"]


@pytest.mark.parametrize("leak", ["log", "git history"])
async def test_a_leaked_key_is_found_reported_and_cut(tmp_path: Path, leak: str) -> None:
    """The owner's other key goes on, and so do its running calls."""
    config = tmp_path / "commands.yaml"
    config.write_text(
        f"database: sqlite:///{tmp_path / 'quotas.db'}\nupstreams: {{simulated: {{base_url: http://up/v1}}}}\n{STAFF}"
    )
    async with stage(folder=tmp_path) as on:
        await command(config, "users", "add", "dora", "--group", "staff")
        leaked, leaked_key = await made(config, "dora", "ci")
        _, other_key = await made(config, "dora", "laptop")
        for _ in range(3):
            assert await call(on, leaked_key, SHORT) == 200
        assert await call(on, other_key, SHORT) == 200
        await on.all_settled()
        text = {
            "log": f'POST /x 200 {{"authorization": "Bearer {leaked_key}", "model": "x"}}\n' * 3,
            "git history": f"+++ b/.env\n+OPENAI_API_KEY='{leaked_key}'\n-OPENAI_API_KEY=sk-other-{'x' * 40}\n",
        }[leak]
        [found] = await command(config, "keys", "find", input=text)
        assert (found["id"], found["user"], found["label"]) == (leaked, "database:dora", "ci")
        [used] = await command(config, "usage", "--key", found["id"], "--by", "model", "--since", "3650d")
        assert (used["model"], used["calls"], used["output_tokens"]) == ("gpt-4o-mini", 3, 15)
        by_key = await command(config, "usage", "--by", "key", "--since", "3650d")
        assert sum(each["calls"] for each in by_key) == 4
        [revoked] = await command(config, "keys", "revoke", leaked, "--cut")
        assert revoked["revoked_at"] is not None
        await on.server.directory.poll()
        assert await call(on, leaked_key, SHORT) == 401
        assert await call(on, other_key, SHORT) == 200
