"""Agents that share one quota: long prompts that grow, large maxima, short answers. They can use nearly all of it.

Each call has a maximum of 32,000 tokens and uses 300. A proxy that held the full maximum would admit only a handful
of calls at a time, and would refuse all agents long before the quota is used up.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.stage import Reply, Stage, key_of, stage

pytestmark = [pytest.mark.every_engine, pytest.mark.journey]

AGENTS = ("ann", "ben", "cleo", "dan", "eve", "finn")
LIMIT = 1_000_000
PROMPT, TURN, ANSWER = 25_000, 1_500, 300
SPEED = 60 * 50  # words per second: 50 times the 60 of a real model


def _policy(groups: str, members: Mapping[str, str]) -> str:
    users = "\n".join(f'  {name}: {{groups: [{own}], keys: ["{key_of(name)}"]}}' for name, own in members.items())
    return f"models:\n  gpt-4o-mini: {{upstream: simulated}}\ngroups: {groups}\nusers:\n{users}\n"


@dataclass
class Session:
    """The results of all calls of the agents on one quota."""

    quota_id: str
    answers: int = 0
    refusals: list[dict[str, Any]] = field(default_factory=list)

    def used_at_refusals(self) -> list[int]:
        """The quota's used tokens at each refusal, in the order of the refusals."""
        statuses = (item for error in self.refusals for item in error["quotas"] if item["id"] == self.quota_id)
        return [item["tokens"]["used"] for item in statuses]

    async def run(self, on: Stage, user: str) -> None:
        """Run one agent: one turn after the other until a call is refused."""
        tokens = PROMPT
        while True:
            reply = await _turn(on, user, tokens)
            if reply.status != 200:
                assert reply.status == 429
                self.refusals.append(reply.error)
                return
            assert reply.body.count(b'"content":"') == 1 + ANSWER  # no answer was ended early
            assert b'"finish_reason":"stop"' in reply.body
            self.answers += 1
            tokens += TURN


async def _turn(on: Stage, user: str, tokens: int) -> Reply:
    body = {
        "model": "gpt-4o-mini",
        "messages": [{"role": "user", "content": " ".join(["word"] * tokens)}],
        "max_tokens": 32_000,
        "stream": True,
        "metadata": {"simulate": f"tokens={ANSWER} speed={SPEED}"},
    }
    return await on.post("/v1/chat/completions", body, user=user)


async def test_six_agents_use_up_a_shared_quota(tmp_path: Path) -> None:
    """A shared quota of 1M: no call is refused before 90 % of it is used, usage never exceeds it, and is exact."""
    policy = _policy(
        f"{{team: {{quotas: {{pot: {{shared: true, tokens: {LIMIT}, per: day}}}}}}}}", dict.fromkeys(AGENTS, "team")
    )
    async with stage(policy, folder=tmp_path) as on:
        session = Session("team/pot")
        await asyncio.gather(*(session.run(on, name) for name in AGENTS))
        await on.all_settled()
        used, held = await on.used("team/pot", "ann")
        given = on.simulator.reported_usage
        assert session.used_at_refusals()[0] >= LIMIT * 9 // 10
        assert {error["code"] for error in session.refusals} == {"insufficient_quota"}
        assert (used, held) == (given.input_tokens + given.output_tokens, 0)
        assert used <= LIMIT
        assert given.calls == session.answers >= 28
        await on.audit()


async def test_six_agents_with_one_key_do_not_affect_another_member(tmp_path: Path) -> None:
    """All six agents use ann's key and her own 1M as a member: the same holds for her quota.

    Meanwhile all of bob's small calls are admitted. They are charged to his quota and not to hers.
    """
    quotas = f"{{daily: {{tokens: {LIMIT}, per: day}}, calls: {{requests: 500, per: day}}}}"
    async with stage(
        _policy(f"{{staff: {{quotas: {quotas}}}}}", {"ann": "staff", "bob": "staff"}), folder=tmp_path
    ) as on:
        session, agents_ended = Session("staff/daily"), asyncio.Event()
        tokens_of_bob: list[int] = []

        async def bob() -> None:
            body = {
                "model": "gpt-4o-mini",
                "messages": [{"role": "user", "content": "word"}],
                "metadata": {"simulate": "tokens=20 delay=0.05"},
            }
            while not agents_ended.is_set():
                reply = await on.post("/v1/chat/completions", body, user="bob", headers={"x-quota-max-wait": "0"})
                assert reply.status == 200
                tokens_of_bob.append(reply.json()["usage"]["total_tokens"])

        async def agents() -> None:
            await asyncio.gather(*(session.run(on, "ann") for _ in AGENTS))
            agents_ended.set()

        await asyncio.gather(bob(), agents())
        await on.all_settled()
        used, held = await on.used("staff/daily", "ann")
        given = on.simulator.reported_usage
        assert session.used_at_refusals()[0] >= LIMIT * 9 // 10
        assert used <= LIMIT
        assert len(tokens_of_bob) > 10
        assert (used + sum(tokens_of_bob), held) == (given.input_tokens + given.output_tokens, 0)
        assert await on.used("staff/daily", "bob") == (sum(tokens_of_bob), 0)
        assert given.calls == session.answers + len(tokens_of_bob)
        await on.audit()
