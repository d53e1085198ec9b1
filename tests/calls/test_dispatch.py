"""A call that one upstream fails to answer goes to another. The client does not notice, and it is charged once."""

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
from tests.bare_upstream import connections
from tests.stage import STAFF, Stage, fast_timers, key_of, sqlite_in, stage, text_of, until

CHAT = "/v1/chat/completions"
NOBODY = "http://127.0.0.1:1/v1"
# What an upstream may do or send instead of an answer.
FAILED = b'{"error": {"message": "Sorry about that!", "type": "server_error", "param": null, "code": null}}'
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
HANG, HANG_UP = b"hang", b""

# Calls to `fast` go to `broken` first, and to the simulator if `broken` fails.
POLICY = """
  broken: {{base_url: "{broken}", kind: {kind}}}
retry_for: {retry_for}
models:
  fast:
    upstreams: [{{upstream: broken}}, {{upstream: simulated, model: gpt-4o-mini, weight: 0}}]
    max_output_tokens: 100
  lonely: {{upstream: broken, max_output_tokens: 100}}
groups:
  staff: {{quotas: {{daily: {{tokens: {tokens}, requests: 100k, per: day}}}}}}
users:
  alice: {{groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}}
"""


def _policy(broken: str, *, kind: str = "simulator", retry_for: str = "30s", tokens: str = "1M") -> str:
    return POLICY.format(broken=broken, kind=kind, retry_for=retry_for, tokens=tokens)


def _head(status: int, *more: str, body: bytes = FAILED) -> bytes:
    lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def _ask(simulate: str = "tokens=5", **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "Hello"}
    return {"model": "fast", "messages": [message], "metadata": {"simulate": simulate}, **more}


class BrokenUpstream:
    """An upstream that answers with these bytes in turn, and repeats the last, once its `gate` is open."""

    def __init__(self, *answers: bytes) -> None:
        self.url = ""
        self.bodies: list[bytes] = []
        self.received = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self._answers = list(answers)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one request, and send the next answer."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        self.bodies.append(await reader.readexactly(length))
        self.received.set()
        await self.gate.wait()
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if answer == HANG:
            await reader.read()  # until the proxy closes the connection
        writer.write(answer if answer != HANG else b"")
        writer.close()


@asynccontextmanager
async def _broken_upstream(*answers: bytes | None) -> AsyncIterator[BrokenUpstream]:
    """Start such an upstream. With None as its answer, its address refuses connections."""
    broken = BrokenUpstream(*(answer for answer in answers if answer is not None))
    if None in answers:
        broken.url = NOBODY
        yield broken
        return
    async with connections(broken.serve) as port:
        broken.url = f"http://127.0.0.1:{port}/v1"
        yield broken


async def _record(on: Stage) -> dict[str, Any]:
    """The record of the only call, after all calls are settled. Nothing may be held."""
    await on.all_settled()
    await on.audit()
    [row] = await on.rows("calls")
    assert row["state"] in ("settled", "released")
    assert (await on.used())[1] == 0
    return row


async def _attempts(on: Stage) -> dict[tuple[str, str], int]:
    """The number of attempts by upstream and outcome, from the metrics."""
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
async def test_another_upstream_answers_and_the_call_is_charged_once(
    answer: bytes | None, outcome: str, stream: bool, tmp_path: Path
) -> None:
    """The client gets a normal answer. The ledger has one call, with the upstream that answered it."""
    async with _broken_upstream(answer) as broken, stage(_policy(broken.url), folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask(stream=stream))
        assert reply.status == 200
        row = await _record(on)
        assert (row["upstream"], row["outcome"], row["provenance"]) == ("simulated", "complete", "exactly")
        given = on.simulator.reported_usage
        assert (row["input_tokens"], row["output_tokens"]) == (given.input_tokens, given.output_tokens)
        assert (given.calls, row["requests"], len(broken.bodies)) == (1, 1, 1 if answer else 0)
        assert await _attempts(on) == {("broken", outcome): 1, ("simulated", "answered"): 1}


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
async def test_a_call_that_may_have_run_or_was_rejected_is_sent_once(
    answer: bytes, status: int, outcome: str, tmp_path: Path
) -> None:
    """T49: no call is paid twice, and a bad request is bad at every upstream."""
    async with _broken_upstream(answer) as broken, stage(_policy(broken.url), folder=tmp_path) as on:
        assert (await on.post(CHAT, _ask())).status == status
        assert (await _record(on))["upstream"] == "broken"
        assert (len(broken.bodies), on.simulator.received) == (1, 0)
        assert await _attempts(on) == {("broken", outcome): 1}


@pytest.mark.every_engine
async def test_a_stream_that_broke_after_its_first_byte_is_not_retried(tmp_path: Path) -> None:
    """The client has a part of the answer. It gets an error, and is charged for that part."""
    async with _broken_upstream(STREAM + WORD) as broken, stage(_policy(broken.url), folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask(stream=True))
        assert reply.body.startswith(WORD)
        row = await _record(on)
        assert (row["upstream"], row["provenance"], row["output_tokens"]) == ("broken", "at_least", 1)
        assert on.simulator.received == 0


@pytest.mark.every_engine
@pytest.mark.parametrize(
    ("answer", "simulate", "status", "upstream"),
    [
        (_head(500), "status=503", 503, "simulated"),  # the last one that answered
        (_head(429), "status=401", 502, "simulated"),
        (None, "status=500", 500, "simulated"),
    ],
)
async def test_if_all_upstreams_fail_the_client_gets_the_last_error(
    answer: bytes | None, simulate: str, status: int, upstream: str, tmp_path: Path
) -> None:
    """Nothing is charged, as for a single failure."""
    async with _broken_upstream(answer) as broken, stage(_policy(broken.url), folder=tmp_path) as on:
        assert (await on.post(CHAT, _ask(simulate))).status == status
        row = await _record(on)
        assert (row["state"], row["outcome"], row["upstream"]) == ("released", "upstream_failed", upstream)
        assert await on.used() == (0, 0)


async def test_an_error_answer_is_shown_rather_than_a_refused_connection(tmp_path: Path) -> None:
    """The client learns that the upstream is limiting requests and when to come back."""
    limited = _broken_upstream(_head(429, "Retry-After: 20"))
    async with limited as broken, stage(_policy(broken.url), folder=tmp_path, upstream=NOBODY) as on:
        reply = await on.post(CHAT, _ask())
        assert (reply.status, reply.error["code"]) == (429, "upstream_rate_limited")
        assert reply.headers["retry-after"] == "20"
        assert (await _record(on))["upstream"] == "broken"


async def test_a_call_that_hangs_is_not_sent_elsewhere(tmp_path: Path) -> None:
    """The upstream may be working on it. When the client leaves, it is charged as usual."""
    async with _broken_upstream(HANG) as broken, stage(_policy(broken.url, kind="vllm"), folder=tmp_path) as on:
        call = on.begin(CHAT, _ask(stream=True))
        await broken.received.wait()
        await on.hang_up(call)
        row = await _record(on)
        assert (row["upstream"], row["outcome"], row["provenance"]) == ("broken", "client_left", "at_least")
        assert on.simulator.received == 0


async def test_a_call_whose_client_left_is_not_retried(tmp_path: Path) -> None:
    """The call was drained to learn its cost. The upstream failed, so it cost nothing."""
    async with _broken_upstream(_head(500)) as broken, stage(_policy(broken.url), folder=tmp_path) as on:
        broken.gate.clear()
        call = on.begin(CHAT, _ask())
        await broken.received.wait()
        await on.hang_up(call)
        broken.gate.set()
        assert (await _record(on))["state"] == "released"
        assert on.simulator.received == 0


@pytest.mark.every_engine
async def test_on_disconnect_is_that_of_the_upstream_that_answers(tmp_path: Path) -> None:
    """The first upstream has `stop` (vLLM), the one that answers has `drain`. So the reported usage is charged."""
    async with _broken_upstream(_head(500)) as broken, stage(_policy(broken.url, kind="vllm"), folder=tmp_path) as on:
        call = on.begin(CHAT, _ask("tokens=40 speed=400", stream=True))
        await on.simulator.until(lambda: on.simulator.chunks_sent >= 3)
        await on.hang_up(call)
        row = await _record(on)
        assert (row["outcome"], row["provenance"], row["output_tokens"]) == ("client_left", "exactly", 40)


async def test_each_upstream_gets_a_body_for_its_kind(tmp_path: Path) -> None:
    """With its name of the model, its usage option, and the lowered maximum in the field that it reads."""
    failing = _broken_upstream(_head(500))
    async with failing as broken, stage(_policy(broken.url, kind="llamacpp", tokens="1500"), folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask(n_predict=100, max_tokens=10_000, stream=True))
        assert reply.status == 200
        first, second = json.loads(broken.bodies[0]), json.loads(on.simulator.requests[0].body)
        assert (first["model"], second["model"]) == ("fast", "gpt-4o-mini")
        capped = int(reply.headers["x-quota-capped"].partition(";")[0])
        assert capped < 1500
        assert first["n_predict"] == 100
        assert second["max_tokens"] == capped
        assert (await _record(on))["upstream"] == "simulated"


async def test_only_vllm_is_asked_for_usage_on_every_chunk(tmp_path: Path) -> None:
    """The other upstream gets the option that all kinds know."""
    async with _broken_upstream(_head(500)) as broken, stage(_policy(broken.url, kind="vllm"), folder=tmp_path) as on:
        await on.post(CHAT, _ask(stream=True))
        first, second = json.loads(broken.bodies[0]), json.loads(on.simulator.requests[0].body)
        assert first["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
        assert second["stream_options"] == {"include_usage": True}


async def test_an_upstream_that_keeps_failing_is_in_cooldown_and_then_tried_again(tmp_path: Path) -> None:
    """After the cooldown one call tries it, and goes to the other upstream when it fails again."""
    async with _broken_upstream(_head(500)) as broken, stage(_policy(broken.url), folder=tmp_path) as on:
        for _ in range(FAILURES_MAX + 2):
            assert (await on.post(CHAT, _ask())).status == 200
        assert len(broken.bodies) == FAILURES_MAX
        on.clock.ms += COOLDOWN_MS
        for _ in range(2):
            assert (await on.post(CHAT, _ask())).status == 200
        assert len(broken.bodies) == FAILURES_MAX + 1
        assert on.simulator.reported_usage.calls == FAILURES_MAX + 4


async def test_an_upstream_in_cooldown_is_asked_if_it_is_the_only_one(tmp_path: Path) -> None:
    """A cooldown refuses no call."""
    async with _broken_upstream(_head(500)) as broken, stage(_policy(broken.url), folder=tmp_path) as on:
        for _ in range(FAILURES_MAX + 2):
            assert (await on.post(CHAT, _ask(model="lonely"))).status == 500
        assert len(broken.bodies) == FAILURES_MAX + 2


async def test_the_same_upstream_is_asked_once_more_after_a_short_retry_after(tmp_path: Path) -> None:
    """The client waits that long and does not notice. It is done once for each call."""
    async with (
        _broken_upstream(_head(429, "Retry-After: 0")) as broken,
        stage(_policy(broken.url), folder=tmp_path) as on,
    ):
        assert (await on.post(CHAT, _ask(model="lonely"))).status == 429
        assert len(broken.bodies) == 2
        assert (await _record(on))["state"] == "released"


@pytest.mark.parametrize(
    ("answer", "outcome"), [(_head(429, "Retry-After: 2"), "limited"), (None, "unreachable")], ids=["429", "refused"]
)
async def test_a_client_that_leaves_before_the_next_attempt_is_charged_nothing(
    answer: bytes | None, outcome: str, tmp_path: Path
) -> None:
    """The first attempt was refused and cost nothing, and no other was sent."""
    counted = f'llm_quota_tries_total{{outcome="{outcome}",upstream="broken"}} 1.0'.encode()
    async with _broken_upstream(answer) as broken, stage(_policy(broken.url), folder=tmp_path) as on:
        with fast_timers(0.1):  # slow: the client leaves in the pause before the next attempt, which may be 0.2 s
            call = on.begin(CHAT, _ask(model="lonely"))
            await until(lambda: counted in on.server.metrics.exposition())
            await on.hang_up(call)
            row = await _record(on)
        assert (row["state"], row["outcome"]) == ("released", "client_left")
        assert await _attempts(on) == {("broken", outcome): 1}


async def test_a_form_is_sent_again_unchanged(tmp_path: Path) -> None:
    """It is read from the disk again. Only the model's name is replaced."""
    sound = bytes(range(256)) * 8192  # 2 MiB: more than stays in memory
    async with _broken_upstream(_head(500)) as broken, stage(_policy(broken.url), folder=tmp_path) as on:
        form = aiohttp.FormData()
        form.add_field("model", "fast")
        form.add_field("file", io.BytesIO(sound), filename="speech.mp3")
        headers = {"authorization": f"Bearer {key_of('alice')}"}
        async with on.http.post(f"{on.url}/v1/audio/transcriptions", data=form, headers=headers) as response:
            assert response.status == 200
        first, second = broken.bodies[0], on.simulator.requests[0].body
        is_same_form = first.replace(b"fast", b"gpt-4o-mini", 1) == second
        assert (is_same_form, first.count(sound)) == (True, 1)
        assert (await _record(on))["upstream"] == "simulated"


async def test_an_upstream_that_could_not_be_reached_is_asked_once_more(tmp_path: Path) -> None:
    """Nothing was sent, and it may be restarting."""
    async with stage(_policy(NOBODY), folder=tmp_path) as on:
        assert (await on.post(CHAT, _ask(model="lonely"))).status == 502
        assert await _attempts(on) == {("broken", "unreachable"): 2}
        assert (await _record(on))["state"] == "released"


async def test_with_retry_for_0s_each_call_is_sent_once(tmp_path: Path) -> None:
    """No time is left for another attempt."""
    async with (
        _broken_upstream(_head(500)) as broken,
        stage(_policy(broken.url, retry_for="0s"), folder=tmp_path) as on,
    ):
        assert (await on.post(CHAT, _ask())).status == 500
        assert on.simulator.received == 0


async def test_no_attempt_begins_after_retry_for(tmp_path: Path) -> None:
    """A client that has waited that long gets the error instead of waiting as long again."""
    async with _broken_upstream(_head(500)) as broken, stage(_policy(broken.url), folder=tmp_path) as on:
        broken.gate.clear()
        call = on.begin(CHAT, _ask())
        await broken.received.wait()
        on.clock.ms += 30_000
        broken.gate.set()
        assert (await call).status == 500
        assert on.simulator.received == 0


async def test_a_reload_changes_no_call_between_two_attempts(tmp_path: Path) -> None:
    """A call keeps the upstreams of the policy with which it began. The next call has the new ones."""
    async with _broken_upstream(_head(500)) as broken, stage(_policy(broken.url), folder=tmp_path) as on:
        broken.gate.clear()
        call = on.begin(CHAT, _ask())
        await broken.received.wait()
        text = text_of(STAFF, database=sqlite_in(tmp_path), upstream=broken.url)
        on.config = load_text(text.replace("simulated", "another"))
        assert await on.server.policies.reload()
        broken.gate.set()
        assert (await call).status == 200
        assert (await _record(on))["upstream"] == "simulated"
        assert (await on.post(CHAT, _ask())).status == 500
