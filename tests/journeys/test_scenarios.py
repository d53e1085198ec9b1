"""The rules of quotas as stories with numbers, told through the whole running proxy.

Nearly all prompts here are so many times "word" on /completions: so many tokens, for tiktoken and for the simulator.
`plain` starts no answer that could be shorter than 10 tokens; `usual` takes 1024 for that, as the rules do.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.calls.disconnect import Disconnects
from proxy.config.loader import load_text
from proxy.ledger.book import Expire, Settle
from proxy.ledger.entry import Entry
from proxy.policy.amounts import Exactly, Tokens
from proxy.simulator.server import Served, Simulator
from tests.bare_upstream import Serve, bare_upstream, stream_head
from tests.builders import DAY, NOON
from tests.stage import UPSTREAM_KEY, Clock, Reply, Stage, key_of, stage, text_of, until

pytestmark = [pytest.mark.every_engine, pytest.mark.journey]

CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS = (
    f"/v1/{name}" for name in ("chat/completions", "completions", "responses", "embeddings")
)
NO_WAIT = {"x-quota-max-wait": "0"}
MIDNIGHT = NOON + DAY // 2

MODELS = """
models:
  plain: {upstream: simulated, model: gpt-4o-mini, smallest_answer: 10}
  usual: {upstream: simulated, model: gpt-4o-mini}
  thinker: {upstream: simulated, model: gpt-4o-mini, reasoning: true}
  vectors: {upstream: simulated, model: text-embedding-3-small}
"""


def _policy(groups: str, *, more: str = "", **users: str) -> str:
    """A policy of these groups; alice and bob are in `staff`, unless `users` says otherwise."""
    listed = {"alice": "staff", "bob": "staff", **users}
    lines = (
        f'  {name}: {{groups: [{own}], keys: ["{key_of(name)}"]}}' for name, own in listed.items() if own != "gone"
    )
    return f"{more}\n{MODELS}\ngroups:\n  {groups}\nusers:\n" + "\n".join(lines) + "\n"


def _daily(limits: str) -> str:
    return _policy(f"staff: {{quotas: {{daily: {{{limits}, per: day}}}}}}")


async def _reload(on: Stage, policy: str, *, kind: str = "simulator") -> None:
    """Put another policy in force, perhaps with an upstream of another kind at the same address."""
    upstream = on.server.policies.current.catalog.upstreams["simulated"]
    text = text_of(
        policy,
        database=on.files.config.settings.database,
        upstream=upstream.base_url,
        kind=kind,
        more=f", on_disconnect: {upstream.on_disconnect}",
    )
    on.files.config = load_text(text)
    assert await on.server.policies.reload()


def _words(count: int) -> str:
    return " ".join(["word"] * count)


def _ask(words: int, simulate: str, *, model: str = "usual", **more: Any) -> dict[str, Any]:
    """A call of /completions with so many tokens of input."""
    return {"model": model, "prompt": _words(words), "metadata": {"simulate": simulate}, **more}


async def _settled(on: Stage, reply: Reply) -> Entry:
    await on.at_rest()
    return await _entry(on, reply.headers["x-request-id"])


async def _entry(on: Stage, call_id: str) -> Entry:
    entry = await on.server.ledger.entry(call_id)
    assert entry is not None
    return entry


async def _level(on: Stage, quota_id: str = "staff/daily", measure: str = "tokens", user: str = "alice") -> list[int]:
    """Limit, used, held and remaining, as `/v1/quota` says."""
    level = (await on.quota(quota_id, user))[measure]
    return [level[name] for name in ("limit", "used", "held", "remaining")]


# --------------------------------------------------------------------------------------- an upstream that pauses


@dataclass
class Pausing:
    """Streams of /completions that say `before` words, wait for `go`, say `after` more, and then their usage.

    The usage says 10 tokens of input; each word, " word", is one token of output and one event.
    """

    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, asked: dict[str, Any], _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One stream."""
        before, after = asked["before"], asked["after"]
        writer.write(stream_head("Connection: close") + _events(before))
        await writer.drain()
        await self.go.wait()
        usage = {"prompt_tokens": 10, "completion_tokens": before + after, "total_tokens": 10 + before + after}
        end = _event({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
        writer.write(_events(after) + end + _event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        await writer.drain()


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def _events(count: int, *, words_each: int = 1) -> bytes:
    return _event({"choices": [{"index": 0, "text": " word" * words_each, "finish_reason": None}]}) * count


def _paused(before: int, after: int, **more: Any) -> dict[str, Any]:
    return {**_ask(10, ""), "metadata": {"before": before, "after": after}, "stream": True, **more}


class Listening:
    """A stream as its client hears it."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.id = response.headers["x-request-id"]
        self.heard = b""
        self._response = response

    async def until_words(self, count: int) -> None:
        """Read until so many words have come."""
        while self.heard.count(b'"text": " word"') < count:
            self.heard += await self._response.content.readany()

    async def to_the_end(self) -> bytes:
        """Read the rest."""
        self.heard += await self._response.read()
        return self.heard


@asynccontextmanager
async def _listening(on: Stage, body: dict[str, Any]) -> AsyncIterator[Listening]:
    sent = {"authorization": f"Bearer {key_of('alice')}"}
    async with on.http.post(on.url + COMPLETIONS, json=body, headers=sent) as response:
        assert response.status == 200
        yield Listening(response)


@asynccontextmanager
async def _pausing_stage(
    policy: str, folder: Path, clock: Clock | None = None
) -> AsyncIterator[tuple[Stage, Pausing]]:
    pausing = Pausing()
    async with (
        bare_upstream(pausing.serve) as upstream,
        stage(policy, folder=folder, upstream=upstream.url, clock=clock) as on,
    ):
        yield on, pausing


# ------------------------------------------------------------------------------------------- groups and quotas

TWO_GROUPS = "small: {quotas: {daily: {tokens: 300, per: day}}}\n  large: {quotas: {daily: {tokens: 1000, per: day}}}"


@asynccontextmanager
async def _held_up(on: Stage) -> AsyncIterator["asyncio.Task[Reply]"]:
    """A call in flight that holds 10 + 250 tokens and has said one word."""
    call = on.begin(COMPLETIONS, _ask(10, "tokens=250 stall=1", max_tokens=250, stream=True))
    await on.simulator.until(lambda: on.simulator.chunks_sent == 1)
    try:
        yield call
    finally:
        await on.hang_up(call)


async def test_a_call_goes_through_the_group_that_calls_in_flight_do_not_hold_up(tmp_path: Path) -> None:
    """any_group: a call in flight holds 260 of the 300 of `small`; one that may need 210 goes through `large`.

    It holds nothing of `small`, which could not carry it; the first one held 260 of `large` too, as a member's quota.
    """
    policy = _policy(TWO_GROUPS, alice="small, large", bob="small")
    async with stage(policy, folder=tmp_path, on_disconnect="stop") as on:
        async with _held_up(on):
            assert await _level(on, "small/daily") == [300, 0, 260, 40]
            assert await _level(on, "large/daily") == [1000, 0, 260, 740]
            reply = await on.post(COMPLETIONS, _ask(10, "tokens=200", max_tokens=200), headers=NO_WAIT)
            assert reply.status == 200
            assert (await _entry(on, reply.headers["x-request-id"])).admitted_via == "large"
            assert await _level(on, "small/daily") == [300, 0, 260, 40]
            assert await _level(on, "large/daily") == [1000, 210, 260, 530]
        await on.at_rest()
        assert await _level(on, "small/daily") == [300, 11, 0, 289]
        assert await _level(on, "large/daily") == [1000, 221, 0, 779]


async def test_every_group_waits_for_the_one_that_is_held_up(tmp_path: Path) -> None:
    """every_group: the same call waits, and is let in when the first one has left with 11 tokens; both pay 221."""
    policy = _policy(TWO_GROUPS, more="combine: every_group", alice="small, large", bob="small")
    async with stage(policy, folder=tmp_path, on_disconnect="stop") as on:
        async with _held_up(on):
            second = on.begin(COMPLETIONS, _ask(10, "tokens=200", max_tokens=200))
            await until(lambda: len(on.server.queue) == 1)
            assert on.simulator.received == 1
        reply = await second
        assert reply.status == 200
        assert (await _settled(on, reply)).admitted_via == "small+large"
        assert await _level(on, "small/daily") == [300, 221, 0, 79]
        assert await _level(on, "large/daily") == [1000, 221, 0, 779]


async def test_a_pot_beside_a_member_s_quota(tmp_path: Path) -> None:
    """A pot of 1000 and 400 for each member in `team`, 100 for each in `staff`; alice is in both, bob in `team`.

    Her 50 go through `staff`: the pot is untouched, her 400 pay along. Her next 90 don't fit there and go through
    `team`: pot 90, hers 140, staff stays at 50. Bob's 50 are on the pot and his own 400; alice sees the pot at 140.
    """
    team = "team: {quotas: {pot: {shared: true, tokens: 1000, per: day}, mine: {tokens: 400, per: day}}}"
    policy = _policy(
        f"staff: {{quotas: {{daily: {{tokens: 100, per: day}}}}}}\n  {team}", alice="staff, team", bob="team"
    )
    async with stage(policy, folder=tmp_path) as on:

        async def used(user: str, *ids: str) -> list[int]:
            return [(await on.used(quota_id, user))[0] for quota_id in ids]

        first = await on.post(COMPLETIONS, _ask(10, "tokens=40", max_tokens=40))
        assert (await _settled(on, first)).admitted_via == "staff"
        assert await used("alice", "staff/daily", "team/pot", "team/mine") == [50, 0, 50]
        second = await on.post(COMPLETIONS, _ask(10, "tokens=80", max_tokens=80))
        assert (await _settled(on, second)).admitted_via == "team"
        assert await used("alice", "staff/daily", "team/pot", "team/mine") == [50, 90, 140]
        third = await on.post(COMPLETIONS, _ask(10, "tokens=40", max_tokens=40), user="bob")
        assert (await _settled(on, third)).admitted_via == "team"
        assert await used("bob", "team/pot", "team/mine") == [140, 50]
        assert await used("alice", "staff/daily", "team/pot", "team/mine") == [50, 140, 140]
        await on.audit()


async def test_unlimited_in_every_group_leaves_the_others_binding(tmp_path: Path) -> None:
    """With 50 of 60 used a call for 50 more is refused under every_group, and let in under any_group."""
    groups = "staff: {quotas: {daily: {tokens: 60, per: day}}}\n  free: {unlimited: true}"
    every = _policy(groups, more="combine: every_group", alice="staff, free")
    body = _ask(10, "tokens=40", max_tokens=40)
    async with stage(every, folder=tmp_path) as on:
        assert (await on.post(COMPLETIONS, body)).status == 200
        refused = await on.post(COMPLETIONS, body)
        assert refused.status == 429
        assert 'Quota "staff/daily" has 10 tokens left and this call may need 50.' in refused.error["message"]
        assert await _level(on) == [60, 50, 0, 10]
        await _reload(on, _policy(groups, alice="staff, free"))
        reply = await on.post(COMPLETIONS, body)
        assert reply.status == 200
        assert (await _settled(on, reply)).admitted_via == "free"
        assert await _level(on) == [60, 50, 0, 10]


async def test_input_and_output_limits_in_one_quota(tmp_path: Path) -> None:
    """100 of input and 50 of output: 30 + 40, then an answer shortened to the 10 that are left, then none at all.

    What generates nothing is not bound by output: 30 more of input go to embeddings, and 20 don't fit any more.
    """
    async with stage(_daily("input_tokens: 100, output_tokens: 50"), folder=tmp_path) as on:
        body = _ask(30, "tokens=40", model="plain", max_tokens=40)
        whole, short, none = [await on.post(COMPLETIONS, body) for _ in range(3)]
        assert "x-quota-capped" not in whole.headers
        assert short.headers["x-quota-capped"] == '10; quota="staff/daily"'
        assert short.json()["usage"]["completion_tokens"] == 10
        assert none.status == 429
        assert "is used up: 50 of 50 output tokens." in none.error["message"]
        assert await _level(on, measure="input_tokens") == [100, 60, 0, 40]
        assert await _level(on, measure="output_tokens") == [50, 50, 0, 0]
        assert (await on.post(EMBEDDINGS, {"model": "vectors", "input": _words(30)})).status == 200
        full = await on.post(EMBEDDINGS, {"model": "vectors", "input": _words(20)})
        assert "has 10 input tokens left and this call may need 20." in full.error["message"]
        assert await _level(on, measure="input_tokens") == [100, 90, 0, 10]
        assert (await on.quota("staff/daily"))["tokens"] is None


async def test_exact_beside_after_beside_shadow(tmp_path: Path) -> None:
    """Calls of 60 tokens on 1000 exact, 100 after and 70 in shadow.

    The second takes `after` to 120 and would have been refused by the shadow, which stays at 60; the third is refused
    by `after`, and nothing changes.
    """
    quotas = (
        "hard: {tokens: 1000, per: day}, soft: {tokens: 100, per: day, enforce: after}, "
        "trial: {tokens: 70, per: day, enforce: shadow}"
    )
    async with stage(_policy(f"staff: {{quotas: {{{quotas}}}}}"), folder=tmp_path) as on:
        body = _ask(10, "tokens=50", max_tokens=50)

        async def levels() -> list[list[int]]:
            return [await _level(on, f"staff/{name}") for name in ("hard", "soft", "trial")]

        first = await _settled(on, await on.post(COMPLETIONS, body))
        assert first.would_refuse == ()
        assert await levels() == [[1000, 60, 0, 940], [100, 60, 0, 40], [70, 60, 0, 10]]
        second = await _settled(on, await on.post(COMPLETIONS, body))
        assert second.would_refuse == ("staff/trial",)
        assert await levels() == [[1000, 120, 0, 880], [100, 120, 0, 0], [70, 60, 0, 10]]
        third = await on.post(COMPLETIONS, body)
        assert third.status == 429
        assert 'Quota "staff/soft" is used up: 120 of 100 tokens.' in third.error["message"]
        assert await levels() == [[1000, 120, 0, 880], [100, 120, 0, 0], [70, 60, 0, 10]]


async def test_requests_only(tmp_path: Path) -> None:
    """Two requests: the upstream's 500 costs none, its 400 one, an answer the other, and the next is refused."""
    async with stage(_daily("requests: 2"), folder=tmp_path) as on:
        after_each = []
        for simulate in ("status=500", "status=400", "tokens=5", "tokens=5"):
            reply = await on.post(COMPLETIONS, _ask(10, simulate))
            after_each.append((reply.status, await _level(on, measure="requests")))
        assert after_each == [
            (500, [2, 0, 0, 2]),
            (400, [2, 1, 0, 1]),
            (200, [2, 2, 0, 0]),
            (429, [2, 2, 0, 0]),
        ]
        assert 'Quota "staff/daily" is used up: 2 of 2 requests.' in reply.error["message"]
        assert on.simulator.received == 3


# ------------------------------------------------------------------------------------------ near the limit


@pytest.mark.parametrize(("limit", "total", "used"), [(700, 600, 700), (702, 602, 700), (703, 603, 703)])
async def test_three_choices_share_what_is_left(limit: int, total: int, used: int, tmp_path: Path) -> None:
    """n=3 with max_tokens 400 on 700: behind 100 of input each choice gets 200, what can't be shared stays over."""
    async with stage(_daily(f"tokens: {limit}"), folder=tmp_path) as on:
        body = _ask(100, "tokens=400", model="plain", n=3, max_tokens=400)
        reply = await on.post(COMPLETIONS, body)
        assert reply.headers["x-quota-capped"] == f'{total}; quota="staff/daily"'
        assert json.loads(on.simulator.requests[-1].body)["max_tokens"] == total // 3
        assert [len(choice["text"].split()) for choice in reply.json()["choices"]] == [total // 3] * 3
        assert {choice["finish_reason"] for choice in reply.json()["choices"]} == {"length"}
        assert await _level(on) == [limit, used, 0, limit - used]


async def test_two_thousand_embedding_inputs_are_one_request(tmp_path: Path) -> None:
    """2,048 inputs of one token are 16 kB, and fit into 5,000 tokens because they are counted: twice, not thrice."""
    async with stage(_daily("tokens: 5000, requests: 10"), folder=tmp_path) as on:
        body = {"model": "vectors", "input": ["river"] * 2048, "dimensions": 1}
        first, second, third = [await on.post(EMBEDDINGS, body) for _ in range(3)]
        assert len(json.dumps(body)) > 3 * 5000
        assert (first.status, second.status, third.status) == (200, 200, 429)
        assert len(first.json()["data"]) == 2048
        assert "has 904 tokens left and this call may need 2048." in third.error["message"]
        assert await _level(on) == [5000, 4096, 0, 904]
        assert await _level(on, measure="requests") == [10, 2, 0, 8]
        given = on.simulator.reported_usage
        assert (given.calls, given.input_tokens, given.output_tokens) == (2, 4096, 0)


async def test_an_overdraft_is_for_answers_that_have_begun(tmp_path: Path) -> None:
    """1000 and an overdraft of 200: with 985 used a call that needs 20 is refused; one that needs 14 may say 211.

    That takes the quota to 1200 of 1000, with 0 and not −200 remaining; the next one is refused.
    """
    async with stage(_daily("tokens: 1000, overdraft: 200"), folder=tmp_path) as on:
        first = await on.post(COMPLETIONS, _ask(10, "tokens=975", model="plain", max_tokens=975))
        assert "x-quota-capped" not in first.headers
        assert await _level(on) == [1000, 985, 0, 15]
        refused = await on.post(COMPLETIONS, _ask(10, "tokens=5", model="plain", max_tokens=100))
        assert "has 15 tokens left and this call may need 20." in refused.error["message"]
        body = _ask(4, "tokens=4000", model="plain", max_tokens=4000, stream=True)
        begun = await on.post(COMPLETIONS, body)
        assert begun.headers["x-quota-capped"] == '211; quota="staff/daily"'
        assert b'"finish_reason":"length"' in begun.body
        assert begun.body.endswith(b"data: [DONE]\n\n")
        assert await _level(on) == [1000, 1200, 0, 0]
        refused = await on.post(COMPLETIONS, _ask(1, "tokens=1", model="plain", max_tokens=1))
        assert "is used up: 1200 of 1000 tokens." in refused.error["message"]


async def test_busy_exhausted_and_never_are_three_sentences(tmp_path: Path) -> None:
    """On 300 tokens: 310 can never fit, 150 must wait for one that holds 210, and are too many when it used them."""
    async with stage(_daily("tokens: 300"), folder=tmp_path, on_disconnect="stop") as on:
        never = await on.post(COMPLETIONS, _ask(10, "tokens=1", max_tokens=300))
        assert (never.status, never.error["code"]) == (400, "context_length_exceeded")
        assert never.error["message"] == (
            'This call can never fit: it needs at least 310 tokens, and quota "staff/daily" allows 300 per day. '
            "Shorten the input or ask for a shorter answer."
        )
        first = on.begin(COMPLETIONS, _ask(10, "tokens=200 stall=200", max_tokens=200, stream=True))
        await on.simulator.until(lambda: on.simulator.chunks_sent == 200)
        body = _ask(10, "tokens=1", max_tokens=140)
        busy = await on.post(COMPLETIONS, body, headers=NO_WAIT)
        assert (busy.status, busy.error["code"]) == (429, "rate_limit_exceeded")
        seconds = busy.headers["retry-after"]
        assert busy.error["message"] == (
            'Quota "staff/daily" is busy: calls in flight hold 210 tokens, and what is left is too little for this '
            f"call until they end. Try again in {seconds} s."
        )
        await on.hang_up(first)
        await on.at_rest()
        exhausted = await on.post(COMPLETIONS, body, headers=NO_WAIT)
        assert (exhausted.status, exhausted.error["code"]) == (429, "insufficient_quota")
        assert exhausted.error["message"] == (
            'Quota "staff/daily" has 90 tokens left and this call may need 150. '
            "Resets at 2026-11-25T00:00:00+00:00 (in 12h)."
        )
        assert on.simulator.received == 1


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
async def test_a_first_call_is_never_refused_because_of_a_guess(path: str, tmp_path: Path) -> None:
    """200 tokens of prompt in 999 bytes, and 50 of answer, fit into a fresh quota of 300: they are counted."""
    text = _words(200)
    asked: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": text}], "max_tokens": 50},
        COMPLETIONS: {"prompt": text, "max_tokens": 50},
        RESPONSES: {"input": text, "max_output_tokens": 50},
    }
    async with stage(_daily("tokens: 300"), folder=tmp_path) as on:
        reply = await on.post(path, {"model": "usual", "metadata": {"simulate": "tokens=50"}, **asked[path]})
        assert len(text) == 999
        assert reply.status == 200
        assert "x-quota-capped" not in reply.headers
        assert 250 <= (await on.used())[0] <= 260


@pytest.mark.parametrize(
    ("limit", "path", "asked"),
    [
        # 1 + 1024 in a body of 51 bytes; 10 + 4900 in one of 150; 17 + 3024 with 2000 for thoughts in one of 200
        (1060, COMPLETIONS, {"prompt": "word", "max_tokens": 1024}),
        (5000, COMPLETIONS, {"prompt": _words(10), "max_tokens": 4900}),
        (
            3100,
            CHAT,
            {
                "messages": [{"role": "user", "content": _words(10)}],
                "max_tokens": 3024,
                "thinking": {"budget_tokens": 2000},
            },
        ),
    ],
)
async def test_what_fits_is_neither_refused_nor_shortened_by_its_bytes(
    limit: int, path: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    """Also where the bytes of an input are a small part of what is left, and its answer is nearly all of that."""
    async with stage(_daily(f"tokens: {limit}"), folder=tmp_path) as on:
        reply = await on.post(path, {"model": "usual", **asked})
        assert reply.status == 200
        assert "x-quota-capped" not in reply.headers
        assert _maxima(json.loads(on.simulator.requests[-1].body)) == {"max_tokens": asked["max_tokens"]}


def _chat(**maxima: int) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [{"role": "user", "content": _words(10)}], **maxima}


def _completion(**maxima: int) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": _words(10), **maxima}


def _response(**maxima: int) -> tuple[str, dict[str, Any]]:
    return RESPONSES, {"input": _words(10), **maxima}


# On 100 tokens: 10 of the text leave 90; the role and the frame of a message take 7 more, of a bare input 6.
@pytest.mark.parametrize(
    ("kind", "asked", "lowered"),
    [
        ("openai", _chat(), {"max_completion_tokens": 83}),
        ("openai", _chat(max_tokens=500), {"max_tokens": 83}),
        ("openai", _chat(max_tokens=500, max_completion_tokens=600), {"max_tokens": 83, "max_completion_tokens": 83}),
        ("openai", _completion(max_tokens=500), {"max_tokens": 90}),
        ("openai", _response(max_output_tokens=500), {"max_output_tokens": 84}),
        ("openai", _response(), {"max_output_tokens": 84}),
        ("vllm", _chat(max_completion_tokens=500), {"max_completion_tokens": 83}),
        ("vllm", _completion(max_tokens=500), {"max_tokens": 90}),
        ("ollama", _chat(max_completion_tokens=500), {"max_tokens": 83}),
        ("ollama", _chat(max_tokens=500), {"max_tokens": 83}),
        ("llamacpp", _chat(), {"n_predict": 83}),
        ("llamacpp", _chat(n_predict=500, max_tokens=50), {"n_predict": 83, "max_tokens": 50}),
        ("llamacpp", _completion(n_predict=-1, max_tokens=500), {"n_predict": 90, "max_tokens": 90}),
        ("llamacpp", _response(max_output_tokens=500, n_predict=500), {"max_output_tokens": 84, "n_predict": 84}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join([*_maxima(value)]) or "unsaid",
)
async def test_the_maximum_is_lowered_in_every_field_that_is_read(
    kind: str, asked: tuple[str, dict[str, Any]], lowered: dict[str, int], tmp_path: Path
) -> None:
    """Near a limit no field that this kind of upstream reads says more than is left; far from it, all is as asked."""
    path, document = asked
    body = {"model": "plain", "metadata": {"simulate": "tokens=5"}, **document}
    async with stage(_daily("tokens: 1M"), folder=tmp_path) as on:

        async def sent(*, is_lowered: bool) -> dict[str, int]:
            reply = await on.post(path, body)
            assert reply.status == 200
            assert ("x-quota-capped" in reply.headers) == is_lowered
            return _maxima(json.loads(on.simulator.requests[-1].body))

        await _reload(on, _daily("tokens: 1M"), kind=kind)
        assert await sent(is_lowered=False) == _maxima(document)
        fresh = _daily("tokens: 100").replace("daily:", "fresh:")  # under a new name nothing is used of it
        await _reload(on, fresh, kind=kind)
        assert await sent(is_lowered=True) == {**_maxima(document), **lowered}


def _maxima(value: Any) -> dict[str, int]:
    """The fields in which a request can state a maximum."""
    document = value[1] if isinstance(value, tuple) else value
    names = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
    return {name: document[name] for name in names if name in document}


async def test_a_thinking_budget_is_part_of_the_smallest_answer(tmp_path: Path) -> None:
    """2000 tokens of thinking and 1024 of answer: beside 107 of input that can never fit into 3100.

    On 3200 the answer is shortened to 3093, and a stream of it holds all that from its beginning.
    """
    message = {"role": "user", "content": _words(100)}
    body = {"model": "usual", "messages": [message], "thinking": {"budget_tokens": 2000}, "max_tokens": 9000}
    async with stage(_daily("tokens: 3100"), folder=tmp_path, on_disconnect="stop") as on:
        reply = await on.post(CHAT, body)
        assert reply.status == 400
        assert "needs at least 3131 tokens" in reply.error["message"]
        await _reload(on, _daily("tokens: 3200"))
        simulate = {"stream": True, "metadata": {"simulate": "stall=1"}}
        call = on.begin(CHAT, {**body, **simulate})
        await on.simulator.until(lambda: on.simulator.chunks_sent == 1)
        assert json.loads(on.simulator.requests[-1].body)["max_tokens"] == 3093
        assert await _level(on) == [3200, 0, 3200, 0]
        await on.hang_up(call)


@pytest.mark.parametrize(("model", "held"), [("usual", 1034), ("thinker", 2010)])
async def test_what_thinks_unseen_holds_everything_at_once(model: str, held: int, tmp_path: Path) -> None:
    """A stream that asks for 2000 holds 1024 to begin with, or, where it hides some of its tokens, all 2000."""
    async with stage(_daily("tokens: 2500"), folder=tmp_path, on_disconnect="stop") as on:
        call = on.begin(COMPLETIONS, _ask(10, "stall=1", model=model, stream=True, max_tokens=2000))
        await on.simulator.until(lambda: on.simulator.chunks_sent == 1)
        assert await _level(on) == [2500, 0, held, 2500 - held]
        await on.hang_up(call)


# --------------------------------------------------------------------------------- while a stream is running


async def test_a_call_over_the_end_of_its_window(tmp_path: Path) -> None:
    """1500 words from one minute before midnight: 10 + 1024 were held before it and are yesterday's, 476 are today's.

    The entry says 1510 in all, and the request is yesterday's.
    """
    clock = Clock(MIDNIGHT - 60_000)
    async with _pausing_stage(_daily("tokens: 1M, requests: 100"), tmp_path, clock) as (on, upstream):
        async with _listening(on, _paused(10, 1490, max_tokens=4000)) as stream:
            await stream.until_words(10)
            yesterday = await on.quota("staff/daily")
            assert yesterday["tokens"]["held"] >= 1034
            clock.ms = MIDNIGHT + 60_000
            assert await on.used() == (0, 0)
            upstream.go.set()
            assert (await stream.to_the_end()).endswith(b"data: [DONE]\n\n")
        await on.at_rest()
        assert await _level(on) == [1_000_000, 476, 0, 999_524]
        assert await _level(on, measure="requests") == [100, 0, 0, 100]
        entry = await _entry(on, stream.id)
        assert entry.usage == Exactly(Tokens(10, 1500))
        assert [line.opened_at for line in entry.held_amounts] == [MIDNIGHT - DAY, MIDNIGHT]
        assert (entry.held_amounts[0].amount.output, entry.held_amounts[1].amount.requests) == (1024, 0)


async def test_settling_after_expiry_books_the_difference_once(tmp_path: Path) -> None:
    """A call that was given up for dead is charged its 510; when it ends after all with 30, it has been 30."""
    async with _pausing_stage(_daily("tokens: 1000, requests: 5"), tmp_path) as (on, upstream):
        async with _listening(on, _paused(5, 15, max_tokens=500)) as stream:
            await stream.until_words(5)
            assert await on.used() == (0, 510)
            await on.server.ledger.end(Expire(stream.id))  # type: ignore[arg-type]
            assert await on.used() == (510, 0)
            assert (await _entry(on, stream.id)).outcome == "lost"
            upstream.go.set()
            await stream.to_the_end()
        await on.at_rest()
        entry = await _entry(on, stream.id)
        assert (entry.state, entry.outcome, entry.usage) == ("settled", "complete", Exactly(Tokens(10, 20)))
        await on.server.ledger.end(Settle(stream.id, Exactly(Tokens(10, 400)), "complete"))
        assert await on.used() == (30, 0)
        assert await _level(on, measure="requests") == [5, 1, 0, 4]
        await on.audit()


async def test_a_limit_lowered_under_a_running_stream(tmp_path: Path) -> None:
    """A stream on 1000 goes on to its 610 though the limit has become 200; then 0 remain, and the next is refused."""
    async with _pausing_stage(_daily("tokens: 1000"), tmp_path) as (on, upstream):
        async with _listening(on, _paused(300, 300, model="plain", max_tokens=800)) as stream:
            await stream.until_words(300)
            await _reload(on, _daily("tokens: 200"))
            assert await _level(on) == [200, 0, 810, 0]
            busy = await on.post(COMPLETIONS, _ask(10, "", max_tokens=10), headers=NO_WAIT)
            assert (busy.status, busy.error["code"]) == (429, "rate_limit_exceeded")
            upstream.go.set()
            assert (await stream.to_the_end()).count(b'" word"') == 600
        await on.at_rest()
        assert await _level(on) == [200, 610, 0, 0]
        assert (await on.quota("staff/daily"))["tokens"]["percent"] == 305.0
        refused = await on.post(COMPLETIONS, _ask(1, "", max_tokens=1))
        assert "is used up: 610 of 200 tokens." in refused.error["message"]
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"


async def test_a_stream_grows_by_the_policy_of_its_call(tmp_path: Path) -> None:
    """Held 1034 of 2500 when the limit became 1000: it still grows to its 1510, and 0 remain."""
    async with _pausing_stage(_daily("tokens: 2500"), tmp_path) as (on, upstream):
        async with _listening(on, _paused(10, 1490, max_tokens=2000)) as stream:
            await stream.until_words(10)
            assert await on.used() == (0, 1034)
            await _reload(on, _daily("tokens: 1000"))
            upstream.go.set()
            assert (await stream.to_the_end()).count(b'" word"') == 1500
        await on.at_rest()
        assert await _level(on) == [1000, 1510, 0, 0]


@pytest.mark.parametrize("becomes", ["gone", "other"])
async def test_a_user_who_is_removed_or_moved_while_a_stream_runs(becomes: str, tmp_path: Path) -> None:
    """The stream ends as it began, and its 30 tokens are on the quota that it was let in through.

    A user who is gone can begin nothing more; one who was moved begins at 0 in the new group.
    """
    groups = "staff: {quotas: {daily: {tokens: 1000, per: day}}}\n  other: {quotas: {daily: {tokens: 500, per: day}}}"
    async with _pausing_stage(_policy(groups), tmp_path) as (on, upstream):
        async with _listening(on, _paused(5, 15, max_tokens=500)) as stream:
            await stream.until_words(5)
            await _reload(on, _policy(groups, alice=becomes))
            if becomes == "gone":
                refused = await on.post(COMPLETIONS, _ask(1, ""))
                assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
            else:
                assert await _level(on, "other/daily") == [500, 0, 0, 500]
            upstream.go.set()
            assert (await stream.to_the_end()).endswith(b"data: [DONE]\n\n")
        await on.at_rest()
        assert (await _entry(on, stream.id)).outcome == "complete"
        if becomes == "other":
            assert [item["id"] for item in (await on.get("/v1/quota")).json()["data"]] == ["other/daily"]
            assert await _level(on, "other/daily") == [500, 0, 0, 500]
        await _reload(on, _policy(groups))
        assert await _level(on, "staff/daily") == [1000, 30, 0, 970]
        await on.audit()


# --------------------------------------------------------------------- streams that come to the end of a quota

# On 300 tokens, of which another call holds 160, a stream begins that may say 250 words.
SHARED_300 = _daily("tokens: 300")


def _other(on: Stage, simulate: str, **more: Any) -> "asyncio.Task[Reply]":
    """The other call: 10 + 150 tokens."""
    return on.begin(COMPLETIONS, _ask(10, simulate, max_tokens=150, **more))


@dataclass
class Heard:
    """What the SDK makes of a stream."""

    text: str = ""
    words: int = 0
    ends: list[str] = field(default_factory=list)
    usage: tuple[int, int] | None = None


async def _hear_chunks(chunks: AsyncIterator[Any], heard: Heard) -> AsyncIterator[Heard]:
    async for chunk in chunks:
        for choice in chunk.choices:
            said = choice.delta.content if hasattr(choice, "delta") else choice.text
            heard.text += said or ""
            heard.words += bool(said)
            heard.ends += [choice.finish_reason] if choice.finish_reason else []
        if chunk.usage:
            heard.usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
        yield heard


async def _hear_events(events: AsyncIterator[Any], heard: Heard) -> AsyncIterator[Heard]:
    async for event in events:
        if event.type == "response.output_text.delta":
            heard.text += event.delta
            heard.words += 1
        elif event.type in ("response.completed", "response.incomplete"):
            assert event.response.output_text == heard.text
            heard.ends += [event.response.status, event.response.incomplete_details.reason]
            heard.usage = (event.response.usage.input_tokens, event.response.usage.output_tokens)
        yield heard


async def _hear(on: Stage, path: str, *, asks_for_usage: bool) -> AsyncIterator[Heard]:
    """A stream that may say 250 words, read by the official SDK; what was heard so far, after each piece."""
    sdk, heard = on.sdk(), Heard()
    more: dict[str, Any] = {"model": "plain", "stream": True, "extra_body": {"metadata": {"simulate": "tokens=250"}}}
    if asks_for_usage and path != RESPONSES:
        more["stream_options"] = {"include_usage": True}
    if path == RESPONSES:
        events = await sdk.responses.create(input=_words(10), max_output_tokens=250, **more)
        return _hear_events(events, heard)
    if path == CHAT:
        message: Any = {"role": "user", "content": _words(10)}
        return _hear_chunks(
            await sdk.chat.completions.create(messages=[message], max_tokens=250, **more),
            heard,
        )
    return _hear_chunks(await sdk.completions.create(prompt=_words(10), max_tokens=250, **more), heard)


@pytest.mark.parametrize(
    ("path", "asks_for_usage", "taken"),
    [(CHAT, False, 17), (CHAT, True, 17), (COMPLETIONS, False, 10), (COMPLETIONS, True, 10), (RESPONSES, True, 16)],
)
async def test_a_stream_at_the_limit_ends_as_its_own_maximum_would_end_it(
    path: str, asks_for_usage: bool, taken: int, tmp_path: Path
) -> None:
    """The other call takes its 160, so after `taken` of input there are 140 − taken words, and the quota is at 300.

    Not over it and not under. The SDK reads a whole answer that was cut by length, with its usage where it asked for
    it; the text is the beginning of what the upstream would have said, and the upstream has stopped.
    """
    served: list[Served] = []
    simulator = Simulator(UPSTREAM_KEY, on_served=served.append)
    # With no room for drains whoever leaves is charged all that was held, at once.
    disconnects = Disconnects(drains_max=0)
    async with stage(SHARED_300, folder=tmp_path, simulator=simulator, disconnects=disconnects) as on:
        other = _other(on, "hang")
        await simulator.until(lambda: simulator.received == 1)
        assert await on.used() == (0, 160)
        async for heard in await _hear(on, path, asks_for_usage=asks_for_usage):
            if heard.words == 140 - taken and not other.done():
                assert await on.used() == (0, 300)
                await on.hang_up(other)
        await on.at_rest()
        assert heard.words == 140 - taken
        assert heard.ends == (["incomplete", "max_output_tokens"] if path == RESPONSES else ["length"])
        assert heard.usage == ((taken, 140 - taken) if asks_for_usage else None)
        assert await _level(on) == [300, 300, 0, 0]
        await simulator.until(lambda: simulator.open_calls == 0)
        said = next(each.answer.choices[0].text for each in served if each.answer.is_streamed)
        assert said.startswith(heard.text)
        assert len(said) > len(heard.text) > 0
        await on.audit()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["lf", "crlf"])
async def test_the_end_at_the_limit_has_the_lines_of_its_stream(path: str, newline: bytes, tmp_path: Path) -> None:
    """On the wire every line ends as the upstream's did, and the last event is the one that ends such a stream."""
    asked: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": _words(10)}], "max_tokens": 250},
        COMPLETIONS: {"prompt": _words(10), "max_tokens": 250},
        RESPONSES: {"input": _words(10), "max_output_tokens": 250},
    }
    simulate = "tokens=250 crlf" if newline == b"\r\n" else "tokens=250"
    body = {"model": "plain", "stream": True, "metadata": {"simulate": simulate}, **asked[path]}
    async with stage(SHARED_300, folder=tmp_path, disconnects=Disconnects(drains_max=0)) as on:
        other = _other(on, "hang")
        await on.simulator.until(lambda: on.simulator.received == 1)
        call = on.begin(path, body)
        await on.simulator.until(lambda: on.simulator.received == 2)
        await on.hang_up(other)
        reply = await call
        events = reply.body.split(2 * newline)
        assert events.pop() == b""
        assert reply.body.count(b"\n") == reply.body.count(newline)
        assert reply.body.count(b"\r") == (reply.body.count(b"\n") if newline == b"\r\n" else 0)
        if path == RESPONSES:
            assert events[-1].startswith(b"event: response.incomplete" + newline)
        else:
            assert events[-1] == b"data: [DONE]"
            assert b'"finish_reason":"length"' in events[-2]
        assert (await _settled(on, reply)).outcome == "at_limit"
        assert await on.used() == (300, 0)


def _say_words_for_ever(words_each: int) -> Serve:
    async def serve(_: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream_head("Connection: close"))
        while not writer.is_closing():
            writer.write(_events(50, words_each=words_each))
            await writer.drain()
            await asyncio.sleep(0)

    return serve


@pytest.mark.parametrize(
    ("words_each", "input_tokens", "passed"), [(1, 100, 4900), (7, 100, 4900), (7, 101, 4893), (7, 106, 4893)]
)
async def test_no_more_than_one_event_is_withheld_at_the_limit(
    words_each: int, input_tokens: int, passed: int, tmp_path: Path
) -> None:
    """An upstream that sends 7 words at a time and knows no end: of 5000 tokens 100 of input leave 4900 for it.

    The event that would go beyond is withheld and the stream ends: all 4900 pass where 7 divide them, as do 4893 of
    4899. The quota is at its limit and not over it: no more than that one event is charged and not seen.
    """

    async with (
        bare_upstream(_say_words_for_ever(words_each)) as upstream,
        stage(_daily("tokens: 5000"), folder=tmp_path, upstream=upstream.url) as on,
    ):
        reply = await on.post(COMPLETIONS, _ask(input_tokens, "", max_tokens=None, stream=True))
        assert "x-quota-capped" not in reply.headers
        assert reply.body.count(b" word") == passed
        assert reply.body.count(b'"finish_reason":"length"') == 1
        assert reply.body.endswith(b"data: [DONE]\n\n")
        assert (await _settled(on, reply)).outcome == "at_limit"
        assert await _level(on) == [5000, 5000, 0, 0]
        await upstream.all_closed()


async def test_a_stream_is_not_ended_short_of_the_limit_because_of_its_bytes(tmp_path: Path) -> None:
    """10 of input in 183 bytes on 5000 tokens: when it comes to the end they are counted, and 4990 words pass."""
    async with (
        bare_upstream(_say_words_for_ever(1)) as upstream,
        stage(_daily("tokens: 5000"), folder=tmp_path, upstream=upstream.url) as on,
    ):
        reply = await on.post(COMPLETIONS, _ask(10, "", max_tokens=None, stream=True))
        assert (await _settled(on, reply)).outcome == "at_limit"
        assert await _level(on) == [5000, 5000, 0, 0]
        assert reply.body.count(b" word") == 4990


@asynccontextmanager
async def _paused_beside_another(
    folder: Path, on_disconnect: str, **more: Any
) -> AsyncIterator[tuple[Stage, "asyncio.Task[Reply]", Callable[..., "asyncio.Task[Reply]"]]]:
    """A stage on which another call has said 10 of 150 words and stalls, and what begins the stream beside it."""
    async with stage(SHARED_300, folder=folder, on_disconnect=on_disconnect, **more) as on:
        other = _other(on, "tokens=150 stall=10", stream=True)
        await on.simulator.until(lambda: on.simulator.chunks_sent == 10)

        def begin(**headers: str) -> "asyncio.Task[Reply]":
            body = _ask(10, "tokens=250", model="plain", max_tokens=250, stream=True)
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            return asyncio.get_running_loop().create_task(on.post(COMPLETIONS, body, headers=sent))

        try:
            yield on, other, begin
        finally:
            await on.hang_up(other)


async def _until_paused(on: Stage) -> None:
    """The stream holds the 130 words that are left beside the other call, and the upstream has said more."""
    while await on.used() != (0, 300):
        pass  # each look is a request: the others go on meanwhile
    await on.simulator.until(lambda: on.simulator.chunks_sent > 10 + 130)


async def test_a_stream_that_others_hold_up_pauses_and_goes_on(tmp_path: Path) -> None:
    """130 words pass, then it waits for the other call, which leaves with 20 of its 160; then all 250 have come."""
    async with _paused_beside_another(tmp_path, "stop") as (on, other, begin):
        call = begin()
        await _until_paused(on)
        await on.hang_up(other)
        reply = await call
        assert reply.body.count(b'"text":"') - reply.body.count(b'"text":""') == 250
        assert b'"finish_reason":"stop"' in reply.body
        assert (await _settled(on, reply)).outcome == "complete"
        assert await _level(on) == [300, 280, 0, 20]


async def test_a_stream_that_may_not_wait_is_ended_where_others_hold_it_up(tmp_path: Path) -> None:
    """X-Quota-Max-Wait: 0 ends it after its 130 words; the other call keeps its 160 and goes on to use them."""
    async with _paused_beside_another(tmp_path, "stop") as (on, _, begin):
        reply = await begin(x_quota_max_wait="0")
        assert reply.body.count(b'"text":"') - reply.body.count(b'"text":""') == 130
        assert b'"finish_reason":"length"' in reply.body
        assert (await _entry(on, reply.headers["x-request-id"])).outcome == "at_limit"
        assert await _level(on) == [300, 140, 160, 0]
        await on.simulator.until(lambda: on.simulator.open_calls == 1)


@pytest.mark.parametrize("on_disconnect", ["stop", "drain"])
async def test_a_client_that_leaves_a_paused_stream_leaves_nothing_held(on_disconnect: str, tmp_path: Path) -> None:
    """It is charged its 10 + 130, nothing of it is held, and only the other call is still open at the upstream."""
    disconnects = Disconnects(drain_s=0.05)
    async with _paused_beside_another(tmp_path, on_disconnect, disconnects=disconnects) as (on, _, begin):
        call = begin()
        await _until_paused(on)
        await on.hang_up(call)
        await on.simulator.until(lambda: on.simulator.open_calls == 1)
        await until(lambda: on.server.calls_in_flight == 1)
        while (level := await _level(on))[1] == 0:
            pass  # on a busy disk the commit may take longer than a call waits for it
        assert level == [300, 140, 160, 0]


# ------------------------------------------------------------------------------------------------ the promise


async def test_many_streams_share_the_end_of_a_quota(tmp_path: Path) -> None:
    """64 clients on 10,000 tokens ask for 4,000 and get 100: never over, though each holds 1,034 to begin with.

    Nobody is refused while a call's worth was free and none flew, and in the end less than that is left.
    """
    worth = 10 + 1024
    body = _ask(10, "tokens=100", max_tokens=4000, stream=True)
    async with stage(_daily("tokens: 10k"), folder=tmp_path) as on:
        refusals: list[dict[str, Any]] = []

        async def client() -> None:
            while True:
                reply = await on.post(COMPLETIONS, body)
                if reply.status != 200:
                    refusals.append(reply.error)
                    return

        await asyncio.gather(*(client() for _ in range(64)))
        await on.at_rest()
        used, held = await on.used()
        calls = on.simulator.reported_usage.calls
        assert held == 0
        assert (
            used
            == 110 * calls
            == on.simulator.reported_usage.input_tokens + on.simulator.reported_usage.output_tokens
        )
        assert 10_000 - worth < used <= 10_000
        assert {refused["code"] for refused in refusals} == {"insufficient_quota"}
        assert all(_left(refused["quotas"]) < worth for refused in refusals)


async def test_streams_that_grow_share_the_end_of_a_quota(tmp_path: Path) -> None:
    """The same on 30,000 tokens with answers of 1,100, which outgrow what they hold: at the limit, or under it.

    Whoever is ended there got a proper end, and is on the books with what passed.
    """
    body = _ask(10, "tokens=1100", max_tokens=4000, stream=True)
    async with stage(_daily("tokens: 30k"), folder=tmp_path) as on:
        replies: list[Reply] = []

        async def client() -> None:
            while not replies or replies[-1].status == 200:
                replies.append(await on.post(COMPLETIONS, body))

        await asyncio.gather(*(client() for _ in range(24)))
        await on.at_rest()
        used, held = await on.used()
        answers = [reply for reply in replies if reply.status == 200]
        assert all(reply.body.endswith(b"data: [DONE]\n\n") for reply in answers)
        assert held == 0
        assert 30_000 - 1034 < used <= 30_000
        assert used == sum(10 + _words_in(reply) for reply in answers)
        await on.audit()


def _left(quotas: Iterable[dict[str, Any]]) -> int:
    tokens = next(item["tokens"] for item in quotas if item["id"] == "staff/daily")
    return int(tokens["limit"] - tokens["used"])


def _words_in(reply: Reply) -> int:
    return reply.body.count(b'"text":"') - reply.body.count(b'"text":""')
