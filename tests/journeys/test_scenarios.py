"""The rules of quotas as examples with numbers, tested through the whole running proxy.

Nearly all prompts repeat "word" on /completions. "word word word" is three tokens for tiktoken and for the simulator.
The model `plain` has a smallest answer of 10 tokens, and the model `usual` one of 1024, in quotas of every size.
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
from tests.builders import DAY, NOON, entry_in
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
  usual: {upstream: simulated, model: gpt-4o-mini, smallest_answer: 1024}
  thinker: {upstream: simulated, model: gpt-4o-mini, reasoning: true}
  vectors: {upstream: simulated, model: text-embedding-3-small}
"""


def _policy(groups: str, *, more: str = "", **users: str) -> str:
    """A policy with these groups. Alice and bob are in `staff`, unless `users` names other groups, or "removed"."""
    groups_of = {"alice": "staff", "bob": "staff", **users}
    listed = (
        f'  {name}: {{groups: [{own}], keys: ["{key_of(name)}"]}}'
        for name, own in groups_of.items()
        if own != "removed"
    )
    return f"{more}\n{MODELS}\ngroups:\n  {groups}\nusers:\n" + "\n".join(listed) + "\n"


def _daily(limits: str) -> str:
    return _policy(f"staff: {{quotas: {{daily: {{{limits}, per: day}}}}}}")


async def _reload(on: Stage, policy: str, *, kind: str = "simulator") -> None:
    """Reload with another policy, and with an upstream of this kind at the same address."""
    upstream = on.server.policies.current.catalog.upstreams["simulated"]
    text = text_of(
        policy,
        database=on.config.settings.database,
        upstream=upstream.base_url,
        kind=kind,
        more=f", on_disconnect: {upstream.on_disconnect}",
    )
    on.config = load_text(text)
    assert await on.server.policies.reload()


def _words(count: int) -> str:
    return " ".join(["word"] * count)


def _body(words: int, simulate: str, *, model: str = "usual", **more: Any) -> dict[str, Any]:
    """The body of a call to /completions with this many input tokens and these directives for the simulator."""
    return {"model": model, "prompt": _words(words), "metadata": {"simulate": simulate}, **more}


async def _settled_entry(on: Stage, reply: Reply) -> Entry:
    await on.all_settled()
    return await _entry(on, reply.headers["x-request-id"])


async def _entry(on: Stage, call_id: str) -> Entry:
    entry = await entry_in(on.server.ledger, call_id)
    assert entry is not None
    return entry


async def _status(
    on: Stage, quota_id: str = "staff/daily", measure: str = "tokens", user: str = "alice"
) -> list[int]:
    """Limit, used, held and remaining of a quota, as `/v1/quota` reports them."""
    status = (await on.quota(quota_id, user))[measure]
    return [status[name] for name in ("limit", "used", "held", "remaining")]


# --------------------------------------------------------------------------------------- an upstream that pauses


@dataclass
class PausingUpstream:
    """Streams of /completions that send `before` words, wait for `resume`, send `after` more words, and the usage.

    The usage reports 10 input tokens. Each word, " word", is one output token and one event.
    """

    resume: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, metadata: dict[str, Any], _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one call."""
        before, after = metadata["before"], metadata["after"]
        writer.write(stream_head("Connection: close") + _events(before))
        await writer.drain()
        await self.resume.wait()
        usage = {"prompt_tokens": 10, "completion_tokens": before + after, "total_tokens": 10 + before + after}
        end = _event({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
        writer.write(_events(after) + end + _event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        await writer.drain()


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def _events(count: int, *, words_each: int = 1) -> bytes:
    return _event({"choices": [{"index": 0, "text": " word" * words_each, "finish_reason": None}]}) * count


def _pausing_body(before: int, after: int, **more: Any) -> dict[str, Any]:
    return {**_body(10, ""), "metadata": {"before": before, "after": after}, "stream": True, **more}


class StreamReader:
    """Reads a stream step by step, as its client."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.id = response.headers["x-request-id"]
        self.received = b""
        self._response = response

    async def read_words(self, count: int) -> None:
        """Read until this many words have been received."""
        while self.received.count(b'"text": " word"') < count:
            self.received += await self._response.content.readany()

    async def read_all(self) -> bytes:
        """Read to the end; return all bytes of the stream."""
        self.received += await self._response.read()
        return self.received


@asynccontextmanager
async def _open_stream(on: Stage, body: dict[str, Any]) -> AsyncIterator[StreamReader]:
    sent = {"authorization": f"Bearer {key_of('alice')}"}
    async with on.http.post(on.url + COMPLETIONS, json=body, headers=sent) as response:
        assert response.status == 200
        yield StreamReader(response)


@asynccontextmanager
async def _pausing_stage(
    policy: str, folder: Path, clock: Clock | None = None
) -> AsyncIterator[tuple[Stage, PausingUpstream]]:
    pausing = PausingUpstream()
    async with (
        bare_upstream(pausing.serve) as upstream,
        stage(policy, folder=folder, upstream=upstream.url, clock=clock) as on,
    ):
        yield on, pausing


# ------------------------------------------------------------------------------------------- groups and quotas

TWO_GROUPS = "small: {quotas: {daily: {tokens: 300, per: day}}}\n  large: {quotas: {daily: {tokens: 1000, per: day}}}"


@asynccontextmanager
async def _call_in_flight(on: Stage) -> AsyncIterator["asyncio.Task[Reply]"]:
    """A call in flight that holds 10 + 250 tokens and has sent one word."""
    call = on.begin(COMPLETIONS, _body(10, "tokens=250 stall=1", max_tokens=250, stream=True))
    await on.simulator.until(lambda: on.simulator.chunks_sent == 1)
    try:
        yield call
    finally:
        await on.hang_up(call)


async def test_a_call_is_admitted_through_the_group_that_has_tokens_available(tmp_path: Path) -> None:
    """any_group: a call in flight holds 260 of the 300 of `small`; one that may need 210 is admitted through `large`.

    The second call holds nothing of `small`, which can't carry it. The first call holds 260 of `large` too, because
    the quotas of a user's other groups are charged as well if they can carry the whole reservation.
    """
    policy = _policy(TWO_GROUPS, alice="small, large", bob="small")
    async with stage(policy, folder=tmp_path, on_disconnect="stop") as on:
        async with _call_in_flight(on):
            assert await _status(on, "small/daily") == [300, 0, 260, 40]
            assert await _status(on, "large/daily") == [1000, 0, 260, 740]
            reply = await on.post(COMPLETIONS, _body(10, "tokens=200", max_tokens=200), headers=NO_WAIT)
            assert reply.status == 200
            assert (await _entry(on, reply.headers["x-request-id"])).admitted_via == "large"
            assert await _status(on, "small/daily") == [300, 0, 260, 40]
            assert await _status(on, "large/daily") == [1000, 210, 260, 530]
        await on.all_settled()
        assert await _status(on, "small/daily") == [300, 11, 0, 289]
        assert await _status(on, "large/daily") == [1000, 221, 0, 779]


async def test_with_every_group_a_call_waits_for_the_group_that_is_busy(tmp_path: Path) -> None:
    """The same call waits until the first one has ended with 11 tokens. Both groups' quotas are charged 221."""
    policy = _policy(TWO_GROUPS, more="combine: every_group", alice="small, large", bob="small")
    async with stage(policy, folder=tmp_path, on_disconnect="stop") as on:
        async with _call_in_flight(on):
            second = on.begin(COMPLETIONS, _body(10, "tokens=200", max_tokens=200))
            await until(lambda: len(on.server.queue) == 1)
            assert on.simulator.received == 1
        reply = await second
        assert reply.status == 200
        assert (await _settled_entry(on, reply)).admitted_via == "small+large"
        assert await _status(on, "small/daily") == [300, 221, 0, 79]
        assert await _status(on, "large/daily") == [1000, 221, 0, 779]


async def test_a_shared_quota_beside_a_quota_for_each_member(tmp_path: Path) -> None:
    """`team` has 1000 for all together and 400 for each member, `staff` has 100 for each. Alice is in both groups.

    Her first 50 go through `staff`: the shared quota is not charged, and her 400 are charged too. Her next 90 don't
    fit there and go through `team`: the shared quota is at 90, her 400 at 140, and `staff` stays at 50. Bob is in
    `team`: his 50 are charged to the shared quota and to his own 400. Alice then sees the shared quota at 140.
    """
    team = "team: {quotas: {pot: {shared: true, tokens: 1000, per: day}, mine: {tokens: 400, per: day}}}"
    policy = _policy(
        f"staff: {{quotas: {{daily: {{tokens: 100, per: day}}}}}}\n  {team}", alice="staff, team", bob="team"
    )
    async with stage(policy, folder=tmp_path) as on:

        async def used(user: str, *ids: str) -> list[int]:
            return [(await on.used(quota_id, user))[0] for quota_id in ids]

        first = await on.post(COMPLETIONS, _body(10, "tokens=40", max_tokens=40))
        assert (await _settled_entry(on, first)).admitted_via == "staff"
        assert await used("alice", "staff/daily", "team/pot", "team/mine") == [50, 0, 50]
        second = await on.post(COMPLETIONS, _body(10, "tokens=80", max_tokens=80))
        assert (await _settled_entry(on, second)).admitted_via == "team"
        assert await used("alice", "staff/daily", "team/pot", "team/mine") == [50, 90, 140]
        third = await on.post(COMPLETIONS, _body(10, "tokens=40", max_tokens=40), user="bob")
        assert (await _settled_entry(on, third)).admitted_via == "team"
        assert await used("bob", "team/pot", "team/mine") == [140, 50]
        assert await used("alice", "staff/daily", "team/pot", "team/mine") == [50, 140, 140]
        await on.audit()


async def test_with_every_group_an_unlimited_group_does_not_override_a_quota(tmp_path: Path) -> None:
    """With 50 of 60 used, a call that needs 50 is refused under every_group, and admitted under any_group."""
    groups = "staff: {quotas: {daily: {tokens: 60, per: day}}}\n  free: {unlimited: true}"
    every = _policy(groups, more="combine: every_group", alice="staff, free")
    body = _body(10, "tokens=40", max_tokens=40)
    async with stage(every, folder=tmp_path) as on:
        assert (await on.post(COMPLETIONS, body)).status == 200
        refused = await on.post(COMPLETIONS, body)
        assert refused.status == 429
        assert 'Quota "staff/daily" has 10 tokens left and this call may need 50.' in refused.error["message"]
        assert await _status(on) == [60, 50, 0, 10]
        await _reload(on, _policy(groups, alice="staff, free"))
        reply = await on.post(COMPLETIONS, body)
        assert reply.status == 200
        assert (await _settled_entry(on, reply)).admitted_via == "free"
        assert await _status(on) == [60, 50, 0, 10]


async def test_input_and_output_limits_in_one_quota(tmp_path: Path) -> None:
    """100 of input and 50 of output: a call of 30 + 40, then an answer shortened to the free 10, then a refusal.

    Embeddings generate no output, so the output limit does not bind them: 30 more of input fit, and then 20 don't.
    """
    async with stage(_daily("input_tokens: 100, output_tokens: 50"), folder=tmp_path) as on:
        body = _body(30, "tokens=40", model="plain", max_tokens=40)
        whole, short, refused = [await on.post(COMPLETIONS, body) for _ in range(3)]
        assert "x-quota-capped" not in whole.headers
        assert short.headers["x-quota-capped"] == '10; quota="staff/daily"'
        assert short.json()["usage"]["completion_tokens"] == 10
        assert refused.status == 429
        assert "is used up: 50 of 50 output tokens." in refused.error["message"]
        assert await _status(on, measure="input_tokens") == [100, 60, 0, 40]
        assert await _status(on, measure="output_tokens") == [50, 50, 0, 0]
        assert (await on.post(EMBEDDINGS, {"model": "vectors", "input": _words(30)})).status == 200
        full = await on.post(EMBEDDINGS, {"model": "vectors", "input": _words(20)})
        assert "has 10 input tokens left and this call may need 20." in full.error["message"]
        assert await _status(on, measure="input_tokens") == [100, 90, 0, 10]
        assert (await on.quota("staff/daily"))["tokens"] is None


async def test_exact_after_and_shadow_quotas_in_one_group(tmp_path: Path) -> None:
    """Calls of 60 tokens with quotas of 1000 (`exact`), 100 (`after`) and 70 (`shadow`).

    The second call takes `after` to 120. `shadow` would have refused it, so it stays at 60. The third call is refused
    by `after`, and no quota changes.
    """
    quotas = (
        "hard: {tokens: 1000, per: day}, soft: {tokens: 100, per: day, enforce: after}, "
        "trial: {tokens: 70, per: day, enforce: shadow}"
    )
    async with stage(_policy(f"staff: {{quotas: {{{quotas}}}}}"), folder=tmp_path) as on:
        body = _body(10, "tokens=50", max_tokens=50)

        async def statuses() -> list[list[int]]:
            return [await _status(on, f"staff/{name}") for name in ("hard", "soft", "trial")]

        first = await _settled_entry(on, await on.post(COMPLETIONS, body))
        assert first.would_refuse == ()
        assert await statuses() == [[1000, 60, 0, 940], [100, 60, 0, 40], [70, 60, 0, 10]]
        second = await _settled_entry(on, await on.post(COMPLETIONS, body))
        assert second.would_refuse == ("staff/trial",)
        assert await statuses() == [[1000, 120, 0, 880], [100, 120, 0, 0], [70, 60, 0, 10]]
        third = await on.post(COMPLETIONS, body)
        assert third.status == 429
        assert 'Quota "staff/soft" is used up: 120 of 100 tokens.' in third.error["message"]
        assert await statuses() == [[1000, 120, 0, 880], [100, 120, 0, 0], [70, 60, 0, 10]]


async def test_a_quota_of_requests_only(tmp_path: Path) -> None:
    """Two requests: a 500 from the upstream costs none, a 400 costs one, an answer one, and the next is refused."""
    async with stage(_daily("requests: 2"), folder=tmp_path) as on:
        after_each = []
        for simulate in ("status=500", "status=400", "tokens=5", "tokens=5"):
            reply = await on.post(COMPLETIONS, _body(10, simulate))
            after_each.append((reply.status, await _status(on, measure="requests")))
        assert after_each == [
            (500, [2, 0, 0, 2]),
            (400, [2, 1, 0, 1]),
            (200, [2, 2, 0, 0]),
            (429, [2, 2, 0, 0]),
        ]
        assert 'Quota "staff/daily" is used up: 2 of 2 requests.' in reply.error["message"]
        assert on.simulator.received == 3


# ------------------------------------------------------------------------------------------ near the limit


@pytest.mark.parametrize(("limit", "total", "used"), [(700, 600, 700), (702, 600, 700), (703, 603, 703)])
async def test_three_choices_share_what_is_free(limit: int, total: int, used: int, tmp_path: Path) -> None:
    """n=3 with max_tokens 400 on 700: after 100 of input each choice gets 200. A remainder of 1 or 2 stays unused."""
    async with stage(_daily(f"tokens: {limit}"), folder=tmp_path) as on:
        body = _body(100, "tokens=400", model="plain", n=3, max_tokens=400)
        reply = await on.post(COMPLETIONS, body)
        assert reply.headers["x-quota-capped"] == f'{total}; quota="staff/daily"'
        assert json.loads(on.simulator.requests[-1].body)["max_tokens"] == total // 3
        assert [len(choice["text"].split()) for choice in reply.json()["choices"]] == [total // 3] * 3
        assert {choice["finish_reason"] for choice in reply.json()["choices"]} == {"length"}
        assert await _status(on) == [limit, used, 0, limit - used]


async def test_two_thousand_embedding_inputs_are_one_request(tmp_path: Path) -> None:
    """2,048 inputs of one token have 16 kB. They fit twice into 5,000 tokens, because the tokens are counted."""
    async with stage(_daily("tokens: 5000, requests: 10"), folder=tmp_path) as on:
        body = {"model": "vectors", "input": ["river"] * 2048, "dimensions": 1}
        first, second, third = [await on.post(EMBEDDINGS, body) for _ in range(3)]
        assert len(json.dumps(body)) > 3 * 5000
        assert (first.status, second.status, third.status) == (200, 200, 429)
        assert len(first.json()["data"]) == 2048
        assert "has 904 tokens left and this call may need 2048." in third.error["message"]
        assert await _status(on) == [5000, 4096, 0, 904]
        assert await _status(on, measure="requests") == [10, 2, 0, 8]
        given = on.simulator.reported_usage
        assert (given.calls, given.input_tokens, given.output_tokens) == (2, 4096, 0)


async def test_an_overdraft_admits_no_call_beyond_the_limit(tmp_path: Path) -> None:
    """1000 and an overdraft of 200, with 985 used: a call that needs 20 is refused; one that needs 14 is admitted.

    Its answer may have 211 tokens. They take the quota to 1200 of 1000, with 0 and not −200 remaining. The next call
    is refused.
    """
    async with stage(_daily("tokens: 1000, overdraft: 200"), folder=tmp_path) as on:
        first = await on.post(COMPLETIONS, _body(10, "tokens=975", model="plain", max_tokens=975))
        assert "x-quota-capped" not in first.headers
        assert await _status(on) == [1000, 985, 0, 15]
        refused = await on.post(COMPLETIONS, _body(10, "tokens=5", model="plain", max_tokens=100))
        assert "has 15 tokens left and this call may need 20." in refused.error["message"]
        body = _body(4, "tokens=4000", model="plain", max_tokens=4000, stream=True)
        begun = await on.post(COMPLETIONS, body)
        assert begun.headers["x-quota-capped"] == '211; quota="staff/daily"'
        assert b'"finish_reason":"length"' in begun.body
        assert begun.body.endswith(b"data: [DONE]\n\n")
        assert await _status(on) == [1000, 1200, 0, 0]
        refused = await on.post(COMPLETIONS, _body(1, "tokens=1", model="plain", max_tokens=1))
        assert "is used up: 1200 of 1000 tokens." in refused.error["message"]


async def test_busy_exhausted_and_never_have_different_messages(tmp_path: Path) -> None:
    """T63: on 300 tokens: 310 can never fit; 150 wait while a call holds 210, and don't fit after it used 210."""
    async with stage(_daily("tokens: 300"), folder=tmp_path, on_disconnect="stop") as on:
        never = await on.post(COMPLETIONS, _body(10, "tokens=1", max_tokens=300))
        assert (never.status, never.error["code"], never.error["param"]) == (400, "exceeds_quota", "max_tokens")
        assert never.error["message"] == (
            'This call can never fit: it needs at least 310 tokens, and quota "staff/daily" allows 300 per day. '
            "Set max_tokens to a smaller number."
        )
        first = on.begin(COMPLETIONS, _body(10, "tokens=200 stall=200", max_tokens=200, stream=True))
        await on.simulator.until(lambda: on.simulator.chunks_sent == 200)
        body = _body(10, "tokens=1", max_tokens=140)
        busy = await on.post(COMPLETIONS, body, headers=NO_WAIT)
        assert (busy.status, busy.error["code"]) == (429, "rate_limit_exceeded")
        seconds = busy.headers["retry-after"]
        assert busy.error["message"] == (
            'Quota "staff/daily" is busy: calls in flight hold 210 tokens, and what is left is too little for this '
            f"call until they end. Try again in {seconds} s."
        )
        await on.hang_up(first)
        await on.all_settled()
        exhausted = await on.post(COMPLETIONS, body, headers=NO_WAIT)
        assert (exhausted.status, exhausted.error["code"]) == (429, "insufficient_quota")
        assert exhausted.error["message"] == (
            'Quota "staff/daily" has 90 tokens left and this call may need 150. '
            "Resets at 2026-11-25T00:00:00+00:00 (in 12h)."
        )
        assert on.simulator.received == 1


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
async def test_a_call_that_fits_is_not_refused_because_of_an_estimate(path: str, tmp_path: Path) -> None:
    """A prompt of 200 tokens has 999 bytes. With an answer of 50 it fits into 300 tokens, because it is counted."""
    text = _words(200)
    fields: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": text}], "max_tokens": 50},
        COMPLETIONS: {"prompt": text, "max_tokens": 50},
        RESPONSES: {"input": text, "max_output_tokens": 50},
    }
    async with stage(_daily("tokens: 300"), folder=tmp_path) as on:
        reply = await on.post(path, {"model": "usual", "metadata": {"simulate": "tokens=50"}, **fields[path]})
        assert len(text) == 999
        assert reply.status == 200
        assert "x-quota-capped" not in reply.headers
        assert 250 <= (await on.used())[0] <= 260


@pytest.mark.parametrize(
    ("limit", "path", "fields"),
    [
        # 1 + 1024 tokens in a body of 51 bytes; 10 + 4900 in 150 bytes; 17 + 3024, 2000 of them reasoning, in 200.
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
async def test_a_call_that_fits_is_neither_refused_nor_shortened_because_of_its_bytes(
    limit: int, path: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Also if the bytes of the input are a small part of what is free, and the answer needs nearly all of it."""
    async with stage(_daily(f"tokens: {limit}"), folder=tmp_path) as on:
        reply = await on.post(path, {"model": "usual", **fields})
        assert reply.status == 200
        assert "x-quota-capped" not in reply.headers
        assert _maxima(json.loads(on.simulator.requests[-1].body)) == {"max_tokens": fields["max_tokens"]}


def _chat(**maxima: int) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [{"role": "user", "content": _words(10)}], **maxima}


def _completion(**maxima: int) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": _words(10), **maxima}


def _response(**maxima: int) -> tuple[str, dict[str, Any]]:
    return RESPONSES, {"input": _words(10), **maxima}


# On 100 tokens: a text of 10 leaves 90. The role and the template of a message take 7 more, those of an input 6.
LOWERED: list[tuple[str, tuple[str, dict[str, Any]], dict[str, int]]] = [
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
]


async def test_the_maximum_is_lowered_in_every_field_that_the_upstream_reads(tmp_path: Path) -> None:
    """Near a limit no field that this kind of upstream reads exceeds what is free. Far from it all are unchanged."""
    async with stage(_daily("tokens: 1M"), folder=tmp_path) as on:

        async def sent(path: str, body: dict[str, Any], *, is_lowered: bool) -> dict[str, int]:
            reply = await on.post(path, body)
            assert reply.status == 200
            assert ("x-quota-capped" in reply.headers) == is_lowered
            return _maxima(json.loads(on.simulator.requests[-1].body))

        for number, (kind, (path, document), lowered) in enumerate(LOWERED):
            body = {"model": "plain", "metadata": {"simulate": "tokens=5"}, **document}
            await _reload(on, _daily("tokens: 1M"), kind=kind)
            assert await sent(path, body, is_lowered=False) == _maxima(document), (kind, document)
            # Under a new name nothing of the quota is used.
            await _reload(on, _daily("tokens: 100").replace("daily:", f"fresh-{number}:"), kind=kind)
            assert await sent(path, body, is_lowered=True) == {**_maxima(document), **lowered}, (kind, document)


def _maxima(document: dict[str, Any]) -> dict[str, int]:
    """The fields of a request that state a maximum."""
    names = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
    return {name: document[name] for name in names if name in document}


async def test_a_thinking_budget_is_part_of_the_smallest_answer(tmp_path: Path) -> None:
    """A thinking budget of 2000 and the smallest answer of 1024 can never fit into 3100 with 107 of input.

    On 3200 the answer is shortened to 3093, and a stream holds all 3200 from its beginning.
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
        assert await _status(on) == [3200, 0, 3200, 0]
        await on.hang_up(call)


@pytest.mark.parametrize(("model", "held"), [("usual", 1034), ("thinker", 2010)])
async def test_a_stream_with_hidden_reasoning_holds_its_maximum_at_once(
    model: str, held: int, tmp_path: Path
) -> None:
    """A stream with a maximum of 2000 holds 1024 at first, or all 2000 if the model reasons without showing it."""
    async with stage(_daily("tokens: 2500"), folder=tmp_path, on_disconnect="stop") as on:
        call = on.begin(COMPLETIONS, _body(10, "stall=1", model=model, stream=True, max_tokens=2000))
        await on.simulator.until(lambda: on.simulator.chunks_sent == 1)
        assert await _status(on) == [2500, 0, held, 2500 - held]
        await on.hang_up(call)


# --------------------------------------------------------------------------------- while a stream is running


async def test_a_stream_over_the_end_of_its_window(tmp_path: Path) -> None:
    """1500 words from 23:59 on: the 10 + 1024 held before midnight are charged to yesterday, the other 476 to today.

    The entry's usage is 1510 tokens in all, and the request is charged to yesterday.
    """
    clock = Clock(MIDNIGHT - 60_000)
    async with _pausing_stage(_daily("tokens: 1M, requests: 100"), tmp_path, clock) as (on, upstream):
        async with _open_stream(on, _pausing_body(10, 1490, max_tokens=4000)) as stream:
            await stream.read_words(10)
            yesterday = await on.quota("staff/daily")
            assert yesterday["tokens"]["held"] >= 1034
            clock.ms = MIDNIGHT + 60_000
            assert await on.used() == (0, 0)
            upstream.resume.set()
            assert (await stream.read_all()).endswith(b"data: [DONE]\n\n")
        await on.all_settled()
        assert await _status(on) == [1_000_000, 476, 0, 999_524]
        assert await _status(on, measure="requests") == [100, 0, 0, 100]
        entry = await _entry(on, stream.id)
        assert entry.usage == Exactly(Tokens(10, 1500))
        assert [held.opened_at for held in entry.held_amounts] == [MIDNIGHT - DAY, MIDNIGHT]
        assert (entry.held_amounts[0].amount.output, entry.held_amounts[1].amount.requests) == (1024, 0)


async def test_settling_after_expiry_charges_the_difference_once(tmp_path: Path) -> None:
    """An expired call is charged its hold of 510. When it ends after all with 30, the charge becomes 30."""
    async with _pausing_stage(_daily("tokens: 1000, requests: 5"), tmp_path) as (on, upstream):
        async with _open_stream(on, _pausing_body(5, 15, max_tokens=500)) as stream:
            await stream.read_words(5)
            assert await on.used() == (0, 510)
            await on.server.ledger.end(Expire(stream.id))  # type: ignore[arg-type]
            assert await on.used() == (510, 0)
            assert (await _entry(on, stream.id)).outcome == "lost"
            upstream.resume.set()
            await stream.read_all()
        await on.all_settled()
        entry = await _entry(on, stream.id)
        assert (entry.state, entry.outcome, entry.usage) == ("settled", "complete", Exactly(Tokens(10, 20)))
        await on.server.ledger.end(Settle(stream.id, Exactly(Tokens(10, 400)), "complete"))
        assert await on.used() == (30, 0)
        assert await _status(on, measure="requests") == [5, 1, 0, 4]
        await on.audit()


async def test_a_limit_lowered_during_a_stream(tmp_path: Path) -> None:
    """T69: a stream admitted on 1000 uses 610 although the limit is now 200. 0 remain; the next call is refused."""
    async with _pausing_stage(_daily("tokens: 1000"), tmp_path) as (on, upstream):
        async with _open_stream(on, _pausing_body(300, 300, model="plain", max_tokens=800)) as stream:
            await stream.read_words(300)
            await _reload(on, _daily("tokens: 200"))
            assert await _status(on) == [200, 0, 810, 0]
            busy = await on.post(COMPLETIONS, _body(10, "", max_tokens=10), headers=NO_WAIT)
            assert (busy.status, busy.error["code"]) == (429, "rate_limit_exceeded")
            upstream.resume.set()
            assert (await stream.read_all()).count(b'" word"') == 600
        await on.all_settled()
        assert await _status(on) == [200, 610, 0, 0]
        assert (await on.quota("staff/daily"))["tokens"]["percent"] == 305.0
        refused = await on.post(COMPLETIONS, _body(1, "", max_tokens=1))
        assert "is used up: 610 of 200 tokens." in refused.error["message"]
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"


async def test_a_shorter_window_after_a_reload(tmp_path: Path) -> None:
    """A year became a minute: 429 until the end of the minute of the first call after that, not until January.

    The status of the quota says the same, before that call and after it, and the end is stored by the refusal.
    """
    async with stage(_policy("staff: {quotas: {daily: {requests: 1, per: year}}}"), folder=tmp_path) as on:
        body = _body(3, "tokens=1")
        assert (await on.post(COMPLETIONS, body)).status == 200
        assert (await on.post(COMPLETIONS, body)).headers["x-should-retry"] == "false"
        await _reload(on, _policy("staff: {quotas: {daily: {requests: 1, per: minute}}}"))
        on.clock.ms = NOON + DAY + 20_000
        end_s = NOON // 1000 + 86_400 + 60
        assert (await on.quota("staff/daily"))["window"]["resets_at"] == end_s
        refused = await on.post(COMPLETIONS, body)
        assert (refused.status, refused.headers["retry-after"], refused.error["resets_at"]) == (429, "40", end_s)
        assert [row["resets_at"] for row in await on.rows("counters")] == [end_s * 1000]
        assert (await on.quota("staff/daily"))["requests"]["used"] == 1
        on.clock.ms = end_s * 1000
        assert (await on.post(COMPLETIONS, body)).status == 200


async def test_a_stream_reserves_more_by_the_policy_of_its_call(tmp_path: Path) -> None:
    """A stream holds 1034 of 2500 when the limit becomes 1000. It still reserves its 1510, and 0 remain."""
    async with _pausing_stage(_daily("tokens: 2500"), tmp_path) as (on, upstream):
        async with _open_stream(on, _pausing_body(10, 1490, max_tokens=2000)) as stream:
            await stream.read_words(10)
            assert await on.used() == (0, 1034)
            await _reload(on, _daily("tokens: 1000"))
            upstream.resume.set()
            assert (await stream.read_all()).count(b'" word"') == 1500
        await on.all_settled()
        assert await _status(on) == [1000, 1510, 0, 0]


@pytest.mark.parametrize("becomes", ["removed", "other"])
async def test_a_user_who_is_removed_or_moved_during_a_stream(becomes: str, tmp_path: Path) -> None:
    """T6, T70: the stream completes, and its 30 tokens are charged to the quota of the group that admitted it.

    A removed user can't send another call. A user who was moved starts at 0 in the new group.
    """
    groups = "staff: {quotas: {daily: {tokens: 1000, per: day}}}\n  other: {quotas: {daily: {tokens: 500, per: day}}}"
    async with _pausing_stage(_policy(groups), tmp_path) as (on, upstream):
        async with _open_stream(on, _pausing_body(5, 15, max_tokens=500)) as stream:
            await stream.read_words(5)
            await _reload(on, _policy(groups, alice=becomes))
            if becomes == "removed":
                refused = await on.post(COMPLETIONS, _body(1, ""))
                assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
            else:
                assert await _status(on, "other/daily") == [500, 0, 0, 500]
            upstream.resume.set()
            assert (await stream.read_all()).endswith(b"data: [DONE]\n\n")
        await on.all_settled()
        assert (await _entry(on, stream.id)).outcome == "complete"
        if becomes == "other":
            assert [item["id"] for item in (await on.get("/v1/quota")).json()["data"]] == ["other/daily"]
            assert await _status(on, "other/daily") == [500, 0, 0, 500]
        await _reload(on, _policy(groups))
        assert await _status(on, "staff/daily") == [1000, 30, 0, 970]
        await on.audit()


# --------------------------------------------------------------------- streams that reach the end of a quota

# On 300 tokens, of which another call holds 160, a stream begins with a maximum of 250 words.
LIMIT_300 = _daily("tokens: 300")


def _begin_other(on: Stage, simulate: str, **more: Any) -> "asyncio.Task[Reply]":
    """The other call, which holds 10 + 150 tokens."""
    return on.begin(COMPLETIONS, _body(10, simulate, max_tokens=150, **more))


@dataclass
class StreamSoFar:
    """What an SDK has read of a stream."""

    text: str = ""
    words: int = 0
    ends: list[str] = field(default_factory=list)
    usage: tuple[int, int] | None = None


async def _read_chunks(chunks: AsyncIterator[Any], so_far: StreamSoFar) -> AsyncIterator[StreamSoFar]:
    async for chunk in chunks:
        for choice in chunk.choices:
            text = choice.delta.content if hasattr(choice, "delta") else choice.text
            so_far.text += text or ""
            so_far.words += bool(text)
            so_far.ends += [choice.finish_reason] if choice.finish_reason else []
        if chunk.usage:
            so_far.usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
        yield so_far


async def _read_events(events: AsyncIterator[Any], so_far: StreamSoFar) -> AsyncIterator[StreamSoFar]:
    async for event in events:
        if event.type == "response.output_text.delta":
            so_far.text += event.delta
            so_far.words += 1
        elif event.type in ("response.completed", "response.incomplete"):
            assert event.response.output_text == so_far.text
            so_far.ends += [event.response.status, event.response.incomplete_details.reason]
            so_far.usage = (event.response.usage.input_tokens, event.response.usage.output_tokens)
        yield so_far


async def _read_with_sdk(on: Stage, path: str, *, asks_for_usage: bool) -> AsyncIterator[StreamSoFar]:
    """Read a stream with a maximum of 250 words with the official SDK; yield what was read after each chunk."""
    sdk, so_far = on.sdk(), StreamSoFar()
    more: dict[str, Any] = {"model": "plain", "stream": True, "extra_body": {"metadata": {"simulate": "tokens=250"}}}
    if asks_for_usage and path != RESPONSES:
        more["stream_options"] = {"include_usage": True}
    if path == RESPONSES:
        events = await sdk.responses.create(input=_words(10), max_output_tokens=250, **more)
        return _read_events(events, so_far)
    if path == CHAT:
        message: Any = {"role": "user", "content": _words(10)}
        return _read_chunks(
            await sdk.chat.completions.create(messages=[message], max_tokens=250, **more),
            so_far,
        )
    return _read_chunks(await sdk.completions.create(prompt=_words(10), max_tokens=250, **more), so_far)


@pytest.mark.parametrize(
    ("path", "asks_for_usage", "input_tokens"),
    [(CHAT, False, 17), (CHAT, True, 17), (COMPLETIONS, False, 10), (COMPLETIONS, True, 10), (RESPONSES, True, 16)],
)
async def test_a_stream_at_the_limit_ends_as_its_own_maximum_would_end_it(
    path: str, asks_for_usage: bool, input_tokens: int, tmp_path: Path
) -> None:
    """The other call is charged its 160, so this stream gets 140 − `input_tokens` words, and the quota ends at 300.

    The SDK reads a complete answer with the finish reason "length", and with its usage if it asked for it. The text
    is the beginning of the upstream's whole text, and the proxy has closed the connection to the upstream.
    """
    served: list[Served] = []
    simulator = Simulator(UPSTREAM_KEY, on_served=served.append)
    # Without drains a call whose client disconnects is charged its whole hold at once.
    disconnects = Disconnects(drains_max=0)
    async with stage(LIMIT_300, folder=tmp_path, simulator=simulator, disconnects=disconnects) as on:
        other = _begin_other(on, "hang")
        await simulator.until(lambda: simulator.received == 1)
        assert await on.used() == (0, 160)
        words = 140 - input_tokens
        async for so_far in await _read_with_sdk(on, path, asks_for_usage=asks_for_usage):
            if so_far.words == words and not other.done():
                assert await on.used() == (0, 300)
                await on.hang_up(other)
        await on.all_settled()
        assert so_far.words == words
        assert so_far.ends == (["incomplete", "max_output_tokens"] if path == RESPONSES else ["length"])
        assert so_far.usage == ((input_tokens, words) if asks_for_usage else None)
        assert await _status(on) == [300, 300, 0, 0]
        await simulator.until(lambda: simulator.open_calls == 0)
        whole_text = next(each.answer.choices[0].text for each in served if each.answer.is_streamed)
        assert whole_text.startswith(so_far.text)
        assert len(whole_text) > len(so_far.text) > 0
        await on.audit()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["lf", "crlf"])
async def test_the_events_that_end_a_stream_have_the_upstream_s_line_ends(
    path: str, newline: bytes, tmp_path: Path
) -> None:
    """All lines have the same line end, and the last event is the usual last event of a stream of this endpoint."""
    fields: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": _words(10)}], "max_tokens": 250},
        COMPLETIONS: {"prompt": _words(10), "max_tokens": 250},
        RESPONSES: {"input": _words(10), "max_output_tokens": 250},
    }
    simulate = "tokens=250 crlf" if newline == b"\r\n" else "tokens=250"
    body = {"model": "plain", "stream": True, "metadata": {"simulate": simulate}, **fields[path]}
    async with stage(LIMIT_300, folder=tmp_path, disconnects=Disconnects(drains_max=0)) as on:
        other = _begin_other(on, "hang")
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
        assert (await _settled_entry(on, reply)).outcome == "at_limit"
        assert await on.used() == (300, 0)


def _endless_words(words_each: int) -> Serve:
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
    """An upstream sends 7 words per event without end: of 5000 tokens an input of 100 leaves 4900.

    The event that would exceed the limit is withheld, and the stream ends: all 4900 words pass, because 7 divides
    4900, but only 4893 of 4899. The quota ends at its limit: at most the words of that one event are charged and not
    passed on.
    """

    async with (
        bare_upstream(_endless_words(words_each)) as upstream,
        stage(_daily("tokens: 5000"), folder=tmp_path, upstream=upstream.url) as on,
    ):
        reply = await on.post(COMPLETIONS, _body(input_tokens, "", max_tokens=None, stream=True))
        assert "x-quota-capped" not in reply.headers
        assert reply.body.count(b" word") == passed
        assert reply.body.count(b'"finish_reason":"length"') == 1
        assert reply.body.endswith(b"data: [DONE]\n\n")
        assert (await _settled_entry(on, reply)).outcome == "at_limit"
        assert await _status(on) == [5000, 5000, 0, 0]
        await upstream.all_closed()


async def test_a_stream_is_not_ended_early_because_of_its_bytes(tmp_path: Path) -> None:
    """An input of 10 tokens has 183 bytes. Near the limit of 5000 it is counted, so 4990 words pass."""
    async with (
        bare_upstream(_endless_words(1)) as upstream,
        stage(_daily("tokens: 5000"), folder=tmp_path, upstream=upstream.url) as on,
    ):
        reply = await on.post(COMPLETIONS, _body(10, "", max_tokens=None, stream=True))
        assert (await _settled_entry(on, reply)).outcome == "at_limit"
        assert await _status(on) == [5000, 5000, 0, 0]
        assert reply.body.count(b" word") == 4990


@asynccontextmanager
async def _stage_with_a_stalled_call(
    folder: Path, on_disconnect: str, **more: Any
) -> AsyncIterator[tuple[Stage, "asyncio.Task[Reply]", Callable[..., "asyncio.Task[Reply]"]]]:
    """A stage, a call that has sent 10 of 150 words and stalls, and a function that begins the stream under test."""
    async with stage(LIMIT_300, folder=folder, on_disconnect=on_disconnect, **more) as on:
        other = _begin_other(on, "tokens=150 stall=10", stream=True)
        await on.simulator.until(lambda: on.simulator.chunks_sent == 10)

        def begin(**headers: str) -> "asyncio.Task[Reply]":
            body = _body(10, "tokens=250", model="plain", max_tokens=250, stream=True)
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            return asyncio.get_running_loop().create_task(on.post(COMPLETIONS, body, headers=sent))

        try:
            yield on, other, begin
        finally:
            await on.hang_up(other)


async def _until_paused(on: Stage) -> None:
    """Wait until the stream holds the 130 words beside the other call, and the upstream has sent more than those."""
    while await on.used() != (0, 300):
        pass  # each `used()` is a request, so the other tasks run meanwhile
    await on.simulator.until(lambda: on.simulator.chunks_sent > 10 + 130)


async def test_a_stream_pauses_while_another_call_holds_what_it_needs(tmp_path: Path) -> None:
    """After 130 words it waits for the other call, which ends with 20 of its 160 tokens. Then all 250 words pass."""
    async with _stage_with_a_stalled_call(tmp_path, "stop") as (on, other, begin):
        call = begin()
        await _until_paused(on)
        await on.hang_up(other)
        reply = await call
        assert reply.body.count(b'"text":"') - reply.body.count(b'"text":""') == 250
        assert b'"finish_reason":"stop"' in reply.body
        assert (await _settled_entry(on, reply)).outcome == "complete"
        assert await _status(on) == [300, 280, 0, 20]


async def test_a_stream_that_may_not_wait_is_ended_instead_of_paused(tmp_path: Path) -> None:
    """`X-Quota-Max-Wait: 0` ends it after its 130 words. The other call keeps its hold of 160 and stays open."""
    async with _stage_with_a_stalled_call(tmp_path, "stop") as (on, _, begin):
        reply = await begin(x_quota_max_wait="0")
        assert reply.body.count(b'"text":"') - reply.body.count(b'"text":""') == 130
        assert b'"finish_reason":"length"' in reply.body
        assert (await _entry(on, reply.headers["x-request-id"])).outcome == "at_limit"
        assert await _status(on) == [300, 140, 160, 0]
        await on.simulator.until(lambda: on.simulator.open_calls == 1)


@pytest.mark.parametrize("on_disconnect", ["stop", "drain"])
async def test_a_paused_stream_whose_client_disconnects_holds_nothing(on_disconnect: str, tmp_path: Path) -> None:
    """It is charged its 10 + 130 and holds nothing. Only the other call is still open at the upstream."""
    disconnects = Disconnects(drain_s=0.05)
    async with _stage_with_a_stalled_call(tmp_path, on_disconnect, disconnects=disconnects) as (on, _, begin):
        call = begin()
        await _until_paused(on)
        await on.hang_up(call)
        await on.simulator.until(lambda: on.simulator.open_calls == 1)
        await until(lambda: on.server.calls_in_flight == 1)
        while (status := await _status(on))[1] == 0:
            pass  # on a busy disk the commit may take longer than a call waits for it
        assert status == [300, 140, 160, 0]


# ------------------------------------------------------------------------------------- many calls at the same time


async def test_many_streams_share_the_end_of_a_quota(tmp_path: Path) -> None:
    """64 clients share 10,000 tokens. Each stream has a maximum of 4,000, holds 1,034 at first, and uses 110.

    The quota is not exceeded. A call is refused only if less than a call needs was free, and in the end less is free.
    """
    needed = 10 + 1024
    body = _body(10, "tokens=100", max_tokens=4000, stream=True)
    async with stage(_daily("tokens: 10k"), folder=tmp_path) as on:
        refusals: list[dict[str, Any]] = []

        async def client() -> None:
            while True:
                reply = await on.post(COMPLETIONS, body)
                if reply.status != 200:
                    refusals.append(reply.error)
                    return

        await asyncio.gather(*(client() for _ in range(64)))
        await on.all_settled()
        used, held = await on.used()
        calls = on.simulator.reported_usage.calls
        assert held == 0
        assert (
            used
            == 110 * calls
            == on.simulator.reported_usage.input_tokens + on.simulator.reported_usage.output_tokens
        )
        assert 10_000 - needed < used <= 10_000
        assert {refused["code"] for refused in refusals} == {"insufficient_quota"}
        assert all(_free(refused["quotas"]) < needed for refused in refusals)


async def test_streams_that_reserve_more_share_the_end_of_a_quota(tmp_path: Path) -> None:
    """The same on 15,000 tokens with answers of 1,100 tokens, which need a larger hold than their first one.

    Usage ends at the limit or below it. A stream that is ended there has a proper end, and is charged what passed.
    """
    body = _body(10, "tokens=1100", max_tokens=4000, stream=True)
    async with stage(_daily("tokens: 15k"), folder=tmp_path) as on:
        replies: list[Reply] = []

        async def client() -> None:
            while not replies or replies[-1].status == 200:
                replies.append(await on.post(COMPLETIONS, body))

        await asyncio.gather(*(client() for _ in range(24)))
        await on.all_settled()
        used, held = await on.used()
        answers = [reply for reply in replies if reply.status == 200]
        assert all(reply.body.endswith(b"data: [DONE]\n\n") for reply in answers)
        assert held == 0
        assert 15_000 - 1034 < used <= 15_000
        assert used == sum(10 + _words_in(reply) for reply in answers)
        await on.audit()


def _free(quotas: Iterable[dict[str, Any]]) -> int:
    tokens = next(item["tokens"] for item in quotas if item["id"] == "staff/daily")
    return int(tokens["limit"] - tokens["used"])


def _words_in(reply: Reply) -> int:
    return reply.body.count(b'"text":"') - reply.body.count(b'"text":""')
