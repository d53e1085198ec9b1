"""A call that one upstream can't take: another does, the client hears of nothing, and it is charged once."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.config.loader import load_text
from proxy.upstreams.routing import COOLDOWN_MS, FAILURES_MAX
from tests.stage import STAFF, Stage, key_of, sqlite_in, stage, text_of, until

CHAT = "/v1/chat/completions"
NOBODY = "http://127.0.0.1:1/v1"
# What an upstream may send instead of an answer.
FAILED = b'{"error": {"message": "Sorry about that!", "type": "server_error", "param": null, "code": null}}'
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
HANG, HANG_UP = b"hang", b""

# `fast` is asked of `poor` first, and of the simulator where that can't.
SEVERAL = """
  poor: {{base_url: "{poor}", kind: {kind}}}
retry_for: {retry_for}
models:
  fast:
    upstreams: [{{upstream: poor}}, {{upstream: simulated, model: gpt-4o-mini, weight: 0}}]
    max_output_tokens: 100
  lonely: {{upstream: poor, max_output_tokens: 100}}
groups:
  staff: {{quotas: {{daily: {{tokens: {tokens}, requests: 100k, per: day}}}}}}
users:
  alice: {{groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}}
"""


def _several(poor: str, *, kind: str = "simulator", retry_for: str = "30s", tokens: str = "1M") -> str:
    return SEVERAL.format(poor=poor, kind=kind, retry_for=retry_for, tokens=tokens)


def _head(status: int, *more: str, body: bytes = FAILED) -> bytes:
    lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def _ask(simulate: str = "tokens=5", **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "Hello"}
    return {"model": "fast", "messages": [message], "metadata": {"simulate": simulate}, **more}


class Poor:
    """An upstream that sends these bytes, one after another, the last again and again, once its `gate` is open."""

    def __init__(self, *answers: bytes) -> None:
        self.url = ""
        self.bodies: list[bytes] = []
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self._answers = list(answers)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take one request, and answer it or not."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        self.bodies.append(await reader.readexactly(length))
        self.asked.set()
        await self.gate.wait()
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if answer == HANG:
            await reader.read()  # until the other end closes
        writer.write(answer if answer != HANG else b"")
        writer.close()


@asynccontextmanager
async def _poor(*answers: bytes | None) -> AsyncIterator[Poor]:
    """Start it; without an answer there is only an address at which nobody listens."""
    poor = Poor(*(answer for answer in answers if answer is not None))
    if None in answers:
        poor.url = NOBODY
        yield poor
        return
    server = await asyncio.start_server(poor.serve, "127.0.0.1", 0)
    poor.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield poor
    finally:
        server.close()
        await server.wait_closed()


async def _record(on: Stage) -> dict[str, Any]:
    """The one call there was, as it is on the books once all is at rest; nothing is held."""
    await on.all_settled()
    await on.audit()
    [row] = await on.rows("calls")
    assert row["state"] in ("settled", "released")
    assert (await on.used())[1] == 0
    return row


async def _tries(on: Stage) -> dict[tuple[str, str], int]:
    """How often what became of a try, by upstream and outcome."""
    async with on.http.get(f"{on.admin_url}/metrics") as response:
        text = await response.text()
    counted = {}
    for line in text.splitlines():
        if line.startswith("llm_quota_tries_total{"):
            labels, _, number = line.partition("{")[2].rpartition("} ")
            outcome, upstream = (label.split("=")[1].strip('"') for label in labels.split(","))
            counted[upstream, outcome] = round(float(number))
    return counted


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (_head(500), "failed"),
        (_head(503, "Retry-After: 3600"), "failed"),
        (_head(502, body=b"<h1>Bad gateway</h1>"), "failed"),
        (_head(429, "Retry-After: 20"), "limited"),
        (_head(401), "failed"),
        (None, "unreachable"),
    ],
    ids=["500", "503", "html", "429", "401", "refused"],
)
async def test_another_upstream_answers_and_is_charged_once(
    answer: bytes | None, outcome: str, stream: bool, tmp_path: Path
) -> None:
    """The client gets an answer like any other; the books have one call, by who answered it."""
    async with _poor(answer) as poor, stage(_several(poor.url), folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask(stream=stream))
        assert reply.status == 200
        row = await _record(on)
        assert (row["upstream"], row["outcome"], row["provenance"]) == ("simulated", "complete", "exactly")
        given = on.simulator.given
        assert (row["input_tokens"], row["output_tokens"]) == (given.input_tokens, given.output_tokens)
        assert (given.calls, row["requests"], len(poor.bodies)) == (1, 1, 1 if answer else 0)
        assert await _tries(on) == {("poor", outcome): 1, ("simulated", "answered"): 1}


@pytest.mark.parametrize(
    ("answer", "status", "outcome"),
    [
        (HANG_UP, 502, "broke_off"),
        (_head(504), 504, "failed"),
        (_head(408), 504, "failed"),
        (_head(400), 400, "rejected"),
        (_head(404), 404, "rejected"),
        (_head(307), 502, "failed"),
    ],
    ids=["no head", "504", "408", "400", "404", "307"],
)
async def test_what_may_have_run_or_is_wrong_everywhere_is_sent_once(
    answer: bytes, status: int, outcome: str, tmp_path: Path
) -> None:
    """Nobody pays the same call twice, and a bad request is no better elsewhere."""
    async with _poor(answer) as poor, stage(_several(poor.url), folder=tmp_path) as on:
        assert (await on.post(CHAT, _ask())).status == status
        assert (await _record(on))["upstream"] == "poor"
        assert (len(poor.bodies), on.simulator.received) == (1, 0)
        assert await _tries(on) == {("poor", outcome): 1}


@pytest.mark.every_engine
async def test_a_stream_that_broke_after_its_first_byte_is_not_begun_anew(tmp_path: Path) -> None:
    """The client has a part of it: it is told, and charged for that part."""
    async with _poor(STREAM + WORD) as poor, stage(_several(poor.url), folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask(stream=True))
        assert reply.body.startswith(WORD)
        row = await _record(on)
        assert (row["upstream"], row["provenance"], row["output_tokens"]) == ("poor", "at_least", 1)
        assert on.simulator.received == 0


@pytest.mark.every_engine
@pytest.mark.parametrize(
    ("answer", "simulate", "status", "upstream"),
    [
        (_head(500), "status=503", 503, "simulated"),  # the last
        (_head(429), "status=401", 502, "simulated"),
        (None, "status=500", 500, "simulated"),
    ],
)
async def test_where_all_fail_the_client_hears_what_the_last_one_said(
    answer: bytes | None, simulate: str, status: int, upstream: str, tmp_path: Path
) -> None:
    """Free, as one failure is."""
    async with _poor(answer) as poor, stage(_several(poor.url), folder=tmp_path) as on:
        assert (await on.post(CHAT, _ask(simulate))).status == status
        row = await _record(on)
        assert (row["state"], row["outcome"], row["upstream"]) == ("released", "upstream_failed", upstream)
        assert await on.used() == (0, 0)


async def test_words_of_one_that_failed_tell_more_than_the_silence_of_another(tmp_path: Path) -> None:
    """The client is told of the limit that it ran into, and when to come back; not that nobody else was there."""
    limited = _poor(_head(429, "Retry-After: 20"))
    async with limited as poor, stage(_several(poor.url), folder=tmp_path, upstream=NOBODY) as on:
        reply = await on.post(CHAT, _ask())
        assert (reply.status, reply.error["code"]) == (429, "upstream_rate_limited")
        assert reply.headers["retry-after"] == "20"
        assert (await _record(on))["upstream"] == "poor"


async def test_one_that_hangs_keeps_its_call(tmp_path: Path) -> None:
    """It may be at work; when the client leaves it is charged as ever, and nobody else was asked."""
    async with _poor(HANG) as poor, stage(_several(poor.url, kind="vllm"), folder=tmp_path) as on:
        call = on.begin(CHAT, _ask(stream=True))
        await poor.asked.wait()
        await on.hang_up(call)
        row = await _record(on)
        assert (row["upstream"], row["outcome"], row["provenance"]) == ("poor", "client_left", "at_least")
        assert on.simulator.received == 0


async def test_nobody_else_is_asked_for_a_client_that_has_left(tmp_path: Path) -> None:
    """Its call was read on to learn what it cost; it cost nothing."""
    async with _poor(_head(500)) as poor, stage(_several(poor.url), folder=tmp_path) as on:
        poor.gate.clear()
        call = on.begin(CHAT, _ask())
        await poor.asked.wait()
        await on.hang_up(call)
        poor.gate.set()
        assert (await _record(on))["state"] == "released"
        assert on.simulator.received == 0


@pytest.mark.every_engine
async def test_what_becomes_of_a_client_s_leaving_is_up_to_the_upstream_that_was_asked(tmp_path: Path) -> None:
    """The first would have been stopped (vLLM); the one that answers is read on, so the truth is charged."""
    async with _poor(_head(500)) as poor, stage(_several(poor.url, kind="vllm"), folder=tmp_path) as on:
        call = on.begin(CHAT, _ask("tokens=40 speed=400", stream=True))
        await on.simulator.until(lambda: on.simulator.chunks_sent >= 3)
        await on.hang_up(call)
        row = await _record(on)
        assert (row["outcome"], row["provenance"], row["output_tokens"]) == ("client_left", "exactly", 40)


async def test_each_upstream_gets_the_body_that_its_kind_reads(tmp_path: Path) -> None:
    """The model's name there, the usage option, and the lowered maximum in the field from which it takes one."""
    failing = _poor(_head(500))
    async with failing as poor, stage(_several(poor.url, kind="llamacpp", tokens="1500"), folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask(n_predict=100, max_tokens=10_000, stream=True))
        assert reply.status == 200
        first, second = json.loads(poor.bodies[0]), json.loads(on.simulator.requests[0].body)
        assert (first["model"], second["model"]) == ("fast", "gpt-4o-mini")
        capped = int(reply.headers["x-quota-capped"].partition(";")[0])
        assert capped < 1500
        assert first["n_predict"] == 100
        assert second["max_tokens"] == capped
        assert (await _record(on))["upstream"] == "simulated"


async def test_vllm_s_running_usage_is_asked_of_vllm_alone(tmp_path: Path) -> None:
    """And only its answers are freed of it."""
    async with _poor(_head(500)) as poor, stage(_several(poor.url, kind="vllm"), folder=tmp_path) as on:
        await on.post(CHAT, _ask(stream=True))
        first, second = json.loads(poor.bodies[0]), json.loads(on.simulator.requests[0].body)
        assert first["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
        assert second["stream_options"] == {"include_usage": True}


async def test_one_that_keeps_failing_is_left_alone_and_tried_again(tmp_path: Path) -> None:
    """Until its rest is over; then one call tries it, which is answered by another if need be."""
    async with _poor(_head(500)) as poor, stage(_several(poor.url), folder=tmp_path) as on:
        for _ in range(FAILURES_MAX + 2):
            assert (await on.post(CHAT, _ask())).status == 200
        assert len(poor.bodies) == FAILURES_MAX
        on.clock.ms += COOLDOWN_MS
        for _ in range(2):
            assert (await on.post(CHAT, _ask())).status == 200
        assert len(poor.bodies) == FAILURES_MAX + 1
        assert on.simulator.given.calls == FAILURES_MAX + 4


async def test_one_that_rests_is_asked_where_it_is_the_only_one(tmp_path: Path) -> None:
    """A rest refuses nobody."""
    async with _poor(_head(500)) as poor, stage(_several(poor.url), folder=tmp_path) as on:
        for _ in range(FAILURES_MAX + 2):
            assert (await on.post(CHAT, _ask(model="lonely"))).status == 500
        assert len(poor.bodies) == FAILURES_MAX + 2


async def test_the_same_is_asked_once_more_when_it_says_so(tmp_path: Path) -> None:
    """Within a wait so short that the client need not hear of it; and only once."""
    async with _poor(_head(429, "Retry-After: 0")) as poor, stage(_several(poor.url), folder=tmp_path) as on:
        assert (await on.post(CHAT, _ask(model="lonely"))).status == 429
        assert len(poor.bodies) == 2
        assert (await _record(on))["state"] == "released"


async def test_a_client_that_leaves_before_it_is_asked_again_owes_nothing(tmp_path: Path) -> None:
    """What was turned away has cost nothing, and nothing else was sent."""
    limited = b'llm_quota_tries_total{outcome="limited",upstream="poor"} 1.0'
    async with _poor(_head(429, "Retry-After: 2")) as poor, stage(_several(poor.url), folder=tmp_path) as on:
        call = on.begin(CHAT, _ask(model="lonely"))
        await until(lambda: limited in on.server.metrics.exposition())
        await on.hang_up(call)
        row = await _record(on)
        assert (row["state"], row["outcome"], len(poor.bodies)) == ("released", "client_left", 1)


async def test_a_form_is_sent_again_as_it_was(tmp_path: Path) -> None:
    """From the disk, whole, and under the name that the model has there."""
    sound = bytes(range(256)) * 8192  # 2 MiB: more than stays in memory
    async with _poor(_head(500)) as poor, stage(_several(poor.url), folder=tmp_path) as on:
        form = aiohttp.FormData()
        form.add_field("model", "fast")
        form.add_field("file", io.BytesIO(sound), filename="speech.mp3")
        headers = {"authorization": f"Bearer {key_of('alice')}"}
        async with on.http.post(f"{on.url}/v1/audio/transcriptions", data=form, headers=headers) as response:
            assert response.status == 200
        first, second = poor.bodies[0], on.simulator.requests[0].body
        is_same = first.replace(b"fast", b"gpt-4o-mini", 1) == second
        assert (is_same, first.count(sound)) == (True, 1)
        assert (await _record(on))["upstream"] == "simulated"


async def test_one_that_could_not_be_reached_is_tried_once_more(tmp_path: Path) -> None:
    """Nothing was sent; it may just be starting."""
    async with stage(_several(NOBODY), folder=tmp_path) as on:
        assert (await on.post(CHAT, _ask(model="lonely"))).status == 502
        assert await _tries(on) == {("poor", "unreachable"): 2}
        assert (await _record(on))["state"] == "released"


async def test_with_no_time_to_try_again_each_call_is_sent_once(tmp_path: Path) -> None:
    """`retry_for: 0s`."""
    async with _poor(_head(500)) as poor, stage(_several(poor.url, retry_for="0s"), folder=tmp_path) as on:
        assert (await on.post(CHAT, _ask())).status == 500
        assert on.simulator.received == 0


async def test_the_time_to_try_again_ends(tmp_path: Path) -> None:
    """Who has waited for long is told, instead of waiting for as long once more."""
    async with _poor(_head(500)) as poor, stage(_several(poor.url), folder=tmp_path) as on:
        poor.gate.clear()
        call = on.begin(CHAT, _ask())
        await poor.asked.wait()
        on.clock.ms += 30_000
        poor.gate.set()
        assert (await call).status == 500
        assert on.simulator.received == 0


async def test_a_reload_changes_no_call_between_two_tries(tmp_path: Path) -> None:
    """It goes to the upstreams of the policy with which it set out; the next one to those that are named now."""
    async with _poor(_head(500)) as poor, stage(_several(poor.url), folder=tmp_path) as on:
        poor.gate.clear()
        call = on.begin(CHAT, _ask())
        await poor.asked.wait()
        text = text_of(STAFF, database=sqlite_in(tmp_path), upstream=poor.url)
        on.config = load_text(text.replace("simulated", "another"))
        assert await on.server.policies.reload()
        poor.gate.set()
        assert (await call).status == 200
        assert (await _record(on))["upstream"] == "simulated"
        assert (await on.post(CHAT, _ask())).status == 500
