"""The policy, or a user or key, changes while a call waits for admission, through the whole running proxy.

Bob's call in flight holds 210 of the 300 tokens of a shared quota, and does not end. Alice's call needs 150 of them,
and waits.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.config.loader import load_text
from proxy.formats.strict_json import dump
from proxy.policy.quota import Grant, grants_by_quota
from proxy.simulator.media import TRANSCRIPT
from tests.builders import HOUR, NOON, entry_in, grant
from tests.directory import add_key, add_user, set_key, set_user
from tests.stage import Reply, Stage, key_of, stage, text_of, until

pytestmark = [pytest.mark.every_engine, pytest.mark.journey]

COMPLETIONS = "/v1/completions"

POT = """
models:
  plain: {{upstream: simulated, model: gpt-4o-mini, smallest_answer: 10}}
{more}
groups:
  staff: {{quotas: {{pot: {{tokens: {tokens}, per: day, shared: true}}}}}}
  lab: {{quotas: {{daily: {{tokens: 5000, per: day}}}}}}
users:
  bob: {{groups: [staff], keys: ["{bob}"]}}
{alice}
"""


@pytest.fixture(autouse=True)
def _ask_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that waits asks once a second. Here it asks more often, to keep the tests short."""
    monkeypatch.setattr("proxy.ledger.queue._ASK_EVERY_S", 0.02)


def _policy(*, tokens: int = 300, groups: str = "staff", more: str = "") -> str:
    """The policy with another limit, with alice in other groups (none: she is removed), or with more models."""
    alice = f'  alice: {{groups: [{groups}], keys: ["{key_of("alice")}"]}}' if groups else ""
    return POT.format(tokens=tokens, more=more, bob=key_of("bob"), alice=alice)


async def _reload(on: Stage, policy: str | None = None, grants: tuple[Grant, ...] = ()) -> None:
    """Put another policy in force, or the same with these grants."""
    if policy is not None:
        upstream = on.config.catalog.upstreams["simulated"].base_url
        text = text_of(policy, database=on.database, upstream=upstream, more=", on_disconnect: stop")
        on.config = load_text(text)
    on.config = replace(on.config, policy=replace(on.config.policy, grants=grants_by_quota(grants)))
    assert await on.server.policies.reload()


def _body(simulate: str, max_tokens: int, *, stream: bool = False) -> dict[str, Any]:
    prompt = "word" + " word" * 9
    fields = {"model": "plain", "prompt": prompt, "max_tokens": max_tokens, "stream": stream}
    return {**fields, "metadata": {"simulate": simulate}}


@asynccontextmanager
async def _waiting(folder: Path) -> "AsyncIterator[tuple[Stage, asyncio.Task[Reply]]]":
    """Alice's call waits for bob's. At the end bob's call is stopped."""
    async with stage(_policy(), folder=folder, on_disconnect="stop") as on:
        running = on.begin(COMPLETIONS, _body("tokens=200 stall=200", 200, stream=True), user="bob")
        await on.simulator.until(lambda: on.simulator.chunks_sent == 200)
        waiting = on.begin(COMPLETIONS, _body("tokens=5", 140))
        await until(lambda: len(on.server.queue) == 1)
        yield on, waiting
        await on.hang_up(running)
        await on.all_settled()
        await on.audit()


async def test_a_grant_lets_a_waiting_call_in(tmp_path: Path) -> None:
    """Bob's call still holds its tokens. The answer's headers have the raised limit."""
    async with _waiting(tmp_path) as (on, waiting):
        await _reload(on, grants=(grant("staff/pot", tokens=400, until=NOON + HOUR),))
        reply = await waiting
        assert reply.status == 200
        assert reply.headers["x-ratelimit-limit-tokens"] == "700"
        assert reply.headers["x-ratelimit-remaining-tokens"] == str(700 - 210 - 15)
        shown = await on.quota("staff/pot")
        assert (shown["tokens"]["limit"], shown["grants"][0]["amount"]) == (700, 400)


async def test_a_lowered_limit_refuses_a_waiting_call(tmp_path: Path) -> None:
    """At once, not when it has waited its 30 s: it does not fit into 15 tokens at all."""
    async with _waiting(tmp_path) as (on, waiting):
        await _reload(on, _policy(tokens=15))
        reply = await waiting
        assert (reply.status, reply.error["code"]) == (400, "exceeds_quota")
        assert "allows 15 per day" in reply.error["message"]


async def test_a_waiting_call_goes_through_the_groups_that_its_user_has_now(tmp_path: Path) -> None:
    """Alice is moved to the group `lab`, which has room."""
    async with _waiting(tmp_path) as (on, waiting):
        await _reload(on, _policy(groups="lab"))
        reply = await waiting
        assert reply.status == 200
        entry = await entry_in(on.server.ledger, reply.headers["x-request-id"])
        assert entry is not None
        assert entry.admitted_via == "lab"
        assert (await on.used("lab/daily"))[0] == 15


@pytest.mark.parametrize(
    ("policy", "status", "code"),
    [
        pytest.param(_policy(groups=""), 401, "invalid_api_key", id="the user is removed"),
        pytest.param(_policy().replace("plain:", "other:"), 404, "model_not_found", id="the model is removed"),
    ],
)
async def test_a_waiting_call_that_is_not_possible_any_more_is_refused(
    policy: str, status: int, code: str, tmp_path: Path
) -> None:
    """As a new call would be. Nothing was sent for it."""
    async with _waiting(tmp_path) as (on, waiting):
        await _reload(on, policy)
        reply = await waiting
        assert (reply.status, reply.error["code"]) == (status, code)
        assert on.simulator.received == 1
        assert len(on.server.queue) == 0


async def test_a_waiting_call_goes_to_the_upstream_that_its_model_has_now(tmp_path: Path) -> None:
    """It is prepared as a whole by the policy that admits it."""
    async with _waiting(tmp_path) as (on, waiting):
        policy = _policy(tokens=1000).replace("model: gpt-4o-mini", "model: gpt-4o")
        await _reload(on, policy)
        assert (await waiting).status == 200
        assert b'"model":"gpt-4o"' in on.simulator.requests[-1].body.replace(b" ", b"")


async def test_a_form_that_waits_is_prepared_anew_with_its_file(tmp_path: Path) -> None:
    """Its file is on the disk, and is sent to the upstream as it came."""
    scribe = "  scribe: {upstream: simulated, model: gpt-4o-transcribe}"
    policy = _policy(tokens=10**6, more=scribe).replace("per: day, shared", "requests: 1, per: day, shared")
    async with stage(policy, folder=tmp_path, on_disconnect="stop") as on:
        running = on.begin(COMPLETIONS, _body("tokens=200 stall=200", 200, stream=True), user="bob")
        await on.simulator.until(lambda: on.simulator.chunks_sent == 200)
        file = ("talk.mp3", b"--\r\n\x00--" * 200_000, "audio/mpeg")
        waiting = asyncio.ensure_future(on.sdk().audio.transcriptions.create(model="scribe", file=file))
        await until(lambda: len(on.server.queue) == 1)
        await _reload(on, policy.replace("requests: 1", "requests: 2"))
        assert (await waiting).text == TRANSCRIPT
        assert file[1] in on.simulator.requests[-1].body
        await on.hang_up(running)


@pytest.mark.parametrize("change", ["the user is disabled", "the key is revoked"])
async def test_a_waiting_call_of_a_user_or_key_without_access_is_refused(change: str, tmp_path: Path) -> None:
    """Also if running calls of the user are not to be ended. It is noticed with the next poll of the directory."""
    async with _waiting(tmp_path) as (on, of_alice):
        users = on.server._users
        dora = await add_user(users, "dora")
        key = await add_key(users, dora)
        await on.server.directory.poll()
        sent = {"authorization": f"Bearer {key.text}"}
        waiting = asyncio.ensure_future(on.post(COMPLETIONS, _body("tokens=5", 140), user=None, headers=sent))
        await until(lambda: len(on.server.queue) == 2)
        if change == "the key is revoked":
            await set_key(users, key, revoked_at=NOON)
        else:
            await set_user(users, dora, disabled_at=NOON)
        await on.server.directory.poll()
        reply = await waiting
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert len(on.server.queue) == 1  # alice's call still waits
        await on.hang_up(of_alice)


async def test_a_call_whose_body_arrives_slowly_is_decided_on_by_the_policy_at_its_end(tmp_path: Path) -> None:
    """Its key was looked at before the limit was lowered."""
    body = dump(_body("tokens=5", 140))
    begun = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:20]
        await begun.wait()
        yield body[20:]

    async with stage(_policy(), folder=tmp_path) as on:
        sent = {"authorization": f"Bearer {key_of('alice')}"}
        post = asyncio.ensure_future(on.http.post(on.url + COMPLETIONS, data=slowly(), headers=sent))
        await until(lambda: bool(on.server._api._running))
        await _reload(on, _policy(tokens=15))
        begun.set()
        async with await post as response:
            assert response.status == 400
