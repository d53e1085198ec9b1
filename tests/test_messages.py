"""Anthropic's surface with its official SDK, whole and streamed: what it reports is charged, what goes wrong raises.

wire §1.3 (its usage), §2.5 (its events), §3.2 and §3.6 (its client).
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from anthropic import AsyncAnthropic

from tests.stage import STAFF, UPSTREAM_KEY, Stage, key_of, stage

pytestmark = pytest.mark.every_engine

HELLO: Any = [{"role": "user", "content": "hello there"}]
TAKEN = 5  # by the simulator's rule: two words and three for the message
SMALL = STAFF.replace("tokens: 1M", "tokens: 200")


@asynccontextmanager
async def claude(on: Stage, user: str = "alice", **more: Any) -> AsyncIterator[AsyncAnthropic]:
    """The SDK with this user's key, without retries."""
    async with AsyncAnthropic(base_url=on.url, api_key=key_of(user), **{"max_retries": 0, **more}) as sdk:
        yield sdk


def asked(simulate: str = "tokens=7", **more: Any) -> dict[str, Any]:
    """A request, which tells the simulator what to do."""
    return {"model": "fast", "max_tokens": 50, "messages": HELLO, "metadata": {"simulate": simulate}, **more}


def anthropic_stage(folder: Path, policy: str = STAFF, *, more: str = "", **settings: Any) -> Any:
    """A stage whose upstream is one of Anthropic's kind."""
    return stage(policy, folder=folder, kind="anthropic", more=more, **settings)


async def test_a_message_is_charged_as_its_usage_says(tmp_path: Path) -> None:
    """What was read from the cache and what was written to it is input beside `input_tokens`."""
    async with anthropic_stage(tmp_path) as on, claude(on) as sdk:
        message = await sdk.messages.create(**asked("tokens=7 cached=3"))
        assert (message.usage.input_tokens, message.usage.output_tokens) == (TAKEN - 3, 7)
        assert (message.usage.cache_creation_input_tokens, message.usage.cache_read_input_tokens) == (2, 1)
        assert await on.used() == (TAKEN + 7, 0)
        [call] = await on.rows("calls")
        assert (call["input_tokens"], call["output_tokens"], call["provenance"]) == (TAKEN, 7, "exactly")
        assert (call["endpoint"], call["outcome"]) == ("messages", "complete")
        assert message._request_id == call["id"]
        await on.audit()
