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
from structlog.testing import capture_logs

from proxy.config.loader import load_text
from proxy.upstreams.routing import COOLDOWN_MS, FAILURES_MAX
from tests.bare_upstream import connections
from tests.stage import STAFF, UPSTREAM_KEY, Stage, fast_timers, key_of, sqlite_in, stage, text_of, until

CHAT = "/v1/chat/completions"
NOBODY = "http://127.0.0.1:1/v1"
# What an upstream may do or send instead of an answer.
FAILED = b'{"error": {"message": "Sorry about that!", "type": "server_error", "param": null, "code": null}}'
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
HANG, HANG_UP = b"hang", b""

# Calls to `fast` go to `broken` first, and to the simulator if `broken` fails.
POLICY = """
  broken: {{base_url: "{broken}", kind: {kind}{more}}}
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


def _policy(
    broken: str, *, kind: str = "simulator", retry_for: str = "30s", tokens: str = "1M", more: str = ""
) -> str:
    return POLICY.format(broken=broken, kind=kind, retry_for=retry_for, tokens=tokens, more=more)


def _head(status: int, *more: str, body: bytes = FAILED) -> bytes:
    lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def _error(message: str, **members: str) -> bytes:
    error = {"message": message, "type": "invalid_request_error", "param": None, **members}
    return json.dumps({"error": error}).encode()


# LiteLLM's answers to a key that it does not know, and for a budget of our key that is used up, and Anthropic's for
# an empty account. By their statuses (400, 422) the request would be at fault.
WRONG_KEY = _error("No connected db.", type="no_db_connection", code="400")
NO_BUDGET = _error("Budget has been exceeded! Current cost: 2, Max budget: 1", type="budget_exceeded", code="422")
NO_CREDIT = _error(
    "Your credit balance is too low to access the Anthropic API. "
    "Please go to Plans & Billing to upgrade or purchase credits."
)


def _ask(simulate: str = "tokens=5", **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "Hello"}
    return {"model": "fast", "messages": [message], "metadata": {"simulate": simulate}, **more}


class BrokenUpstream:
    """An upstream that answers with these bytes in turn, and repeats the last, once its `gate` is open."""

    def __init__(self, *answers: bytes) -> None:
        self.url = ""
        self.bodies: list[bytes] = []
        self.abandoned = 0  # how many answers hung until the proxy closed the connection
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
        writer.write(answer.removesuffix(HANG))
        if answer.endswith(HANG):
            await reader.read()  # until the proxy closes the connection
            self.abandoned += 1
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
        (_head(400, body=WRONG_KEY), "failed"),
        (_head(422, body=NO_BUDGET), "failed"),
        (_head(400, body=NO_CREDIT), "failed"),
        (_head(200, body=NO_BUDGET), "failed"),
        (None, "unreachable"),
    ],
    ids=["500", "503", "html", "429", "401", "400 key", "422 budget", "400 credit", "200 budget", "refused"],
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
        (_head(600), 502, "failed"),
        (_head(999), 502, "failed"),
        (_head(42), 502, "broke_off"),
        (_head(1000), 502, "broke_off"),
    ],
    ids=["no head", "504", "408", "400", "404", "307", "600", "999", "42", "1000"],
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


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("status", "body", "shown"),
    [(401, FAILED, 502), (400, WRONG_KEY, 502), (422, NO_BUDGET, 503), (400, NO_CREDIT, 503)],
    ids=["401", "400 key", "422 budget", "400 credit"],
)
async def test_an_error_about_our_key_or_account_leads_to_a_cooldown(
    status: int, body: bytes, shown: int, stream: bool, tmp_path: Path
) -> None:
    """Whatever its status. If there is no other upstream, the client gets an error, and it costs nothing."""
    async with (
        _broken_upstream(_head(status, body=body)) as broken,
        stage(_policy(broken.url), folder=tmp_path) as on,
    ):
        assert (await on.post(CHAT, _ask(model="lonely", stream=stream))).status == shown
        row = await _record(on)
        assert (row["outcome"], row["state"], await on.used()) == ("upstream_failed", "released", (0, 0))
        for _ in range(FAILURES_MAX + 1):
            assert (await on.post(CHAT, _ask(stream=stream))).status == 200
        assert len(broken.bodies) == FAILURES_MAX
        counted = {("broken", "failed"): FAILURES_MAX, ("simulated", "answered"): FAILURES_MAX + 1}
        assert await _attempts(on) == counted


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("status", "body", "shown"),
    [
        (400, _error("no_db_connection"), 400),
        (422, _error("budget_exceeded"), 422),
        (400, _error("budget_exceeded is not a valid model ID", param="no_db_connection"), 400),
        (400, _error("Your credit balance is too low: Extra inputs are not permitted"), 400),
        (400, _error("Your credit balance is too low to access the x API is not a valid model ID"), 400),
        (
            422,
            b'{"detail": [{"type": "missing", "msg": "budget_exceeded", "input": {"type": "no_db_connection"}}]}',
            422,
        ),
        (422, _error("ExceededBudget: End User=me over budget. Spend=2, Budget=1", type="budget_exceeded"), 503),
        (422, _error("Budget has been exceeded! Tag=mine Current cost: 2", type="budget_exceeded"), 503),
        (403, _error("Your prompt was flagged: budget_exceeded"), 502),
    ],
)
async def test_no_user_can_put_an_upstream_in_cooldown(
    status: int, body: bytes, shown: int, stream: bool, tmp_path: Path
) -> None:
    """An error that quotes the request, or is about a budget that the request names, is that request's alone."""
    async with (
        _broken_upstream(_head(status, body=body)) as broken,
        stage(_policy(broken.url), folder=tmp_path) as on,
    ):
        for _ in range(FAILURES_MAX + 1):
            assert (await on.post(CHAT, _ask(stream=stream))).status == shown
        assert (len(broken.bodies), on.simulator.received) == (FAILURES_MAX + 1, 0)
        assert await _attempts(on) == {("broken", "rejected"): FAILURES_MAX + 1}


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


# ---------------------------------------------------------------------------------------------- first_byte_timeout

FIRST_BYTE = ", first_byte_timeout: 2s"


@pytest.mark.every_engine
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "answer", [HANG, STREAM + HANG, _head(200, body=b"")[:-2] + HANG], ids=["no head", "no event", "half a head"]
)
async def test_an_answer_that_does_not_begin_moves_the_call_and_costs_nothing(
    answer: bytes, stream: bool, tmp_path: Path
) -> None:
    """After 2 s the attempt is closed, also if its head has come, and the user is charged for the other answer."""
    loop = asyncio.get_running_loop()
    async with (
        _broken_upstream(answer) as broken,
        stage(_policy(broken.url, more=FIRST_BYTE), folder=tmp_path) as on,
    ):
        with fast_timers(20):
            begun = loop.time()
            reply = await on.post(CHAT, _ask(stream=stream))
            assert loop.time() - begun >= 2
        assert (reply.status, broken.abandoned) == (200, 1)
        row = await _record(on)
        assert (row["upstream"], row["outcome"], row["provenance"]) == ("simulated", "complete", "exactly")
        given = on.simulator.reported_usage
        assert await on.used() == (given.input_tokens + given.output_tokens, 0)
        assert row["requests"] == 1
        assert await _attempts(on) == {("broken", "abandoned"): 1, ("simulated", "answered"): 1}


async def test_an_answer_that_has_begun_is_not_abandoned(tmp_path: Path) -> None:
    """Its first byte is what counts, and not how long it takes."""
    later = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(STREAM + b": a comment\n\n")
        await later.wait()
        writer.write(WORD + b"data: [DONE]\n\n")
        writer.close()

    async with connections(serve) as port:
        policy = _policy(f"http://127.0.0.1:{port}/v1", more=FIRST_BYTE)
        async with stage(policy, folder=tmp_path) as on:
            with fast_timers(4):  # so that even on a busy machine the first byte comes in time
                asyncio.get_running_loop().call_later(4, later.set)
                reply = await on.post(CHAT, _ask(stream=True))
            assert WORD in reply.body
            assert on.simulator.received == 0
            assert await _attempts(on) == {("broken", "answered"): 1}


@pytest.mark.parametrize(
    ("model", "more", "retry_for"),
    [("lonely", {}, "30s"), ("fast", {}, "0s"), ("fast", {"store": True}, "30s")],
    ids=["no other upstream", "retry_for is over", "stored"],
)
async def test_an_answer_that_does_not_begin_is_a_timeout_if_the_call_cannot_be_moved(
    model: str, more: dict[str, Any], retry_for: str, tmp_path: Path
) -> None:
    """The upstream may be working on it, so its input is charged. What is stored must not be stored twice."""
    async with (
        _broken_upstream(HANG) as broken,
        stage(_policy(broken.url, more=FIRST_BYTE, retry_for=retry_for), folder=tmp_path) as on,
    ):
        with fast_timers(20):
            reply = await on.post(CHAT, _ask(model=model, **more))
        assert (reply.status, reply.error["code"]) == (504, "upstream_timeout")
        row = await _record(on)
        assert (row["upstream"], row["outcome"], row["provenance"]) == ("broken", "upstream_broke", "at_least")
        assert row["input_tokens"] > 0
        assert on.simulator.received == 0
        assert await _attempts(on) == {("broken", "timed_out"): 1}


@pytest.mark.parametrize(
    ("fields", "is_moved"),
    [({}, False), ({"store": False}, True), ({"store": False, "tools": [{"type": "web_search"}]}, False)],
    ids=["stored by default", "not stored", "with a tool of the upstream"],
)
async def test_a_response_is_moved_only_if_it_is_not_stored_and_runs_no_tool(
    fields: dict[str, Any], is_moved: bool, tmp_path: Path
) -> None:
    """Nobody could find or delete what the first upstream stores later, and a tool may act twice."""
    allowed = ", allow: {tools: [web_search]}"
    async with (
        _broken_upstream(HANG) as broken,
        stage(_policy(broken.url, more=FIRST_BYTE + allowed), folder=tmp_path, more=allowed) as on,
    ):
        with fast_timers(20):
            reply = await on.post("/v1/responses", {"model": "fast", "input": "Hello", **fields})
        assert reply.status == (200 if is_moved else 504)
        assert await _attempts(on) == (
            {("broken", "abandoned"): 1, ("simulated", "answered"): 1} if is_moved else {("broken", "timed_out"): 1}
        )


async def test_a_stream_that_cannot_be_moved_ends_with_an_error_event(tmp_path: Path) -> None:
    """Its head has passed already, so that heartbeats keep the connection open."""
    async with (
        _broken_upstream(STREAM + HANG) as broken,
        stage(_policy(broken.url, more=FIRST_BYTE), folder=tmp_path) as on,
    ):
        with fast_timers(20):
            reply = await on.post(CHAT, _ask(model="lonely", stream=True))
        assert (reply.status, b"upstream_timeout" in reply.body) == (200, True)
        assert (await _record(on))["outcome"] == "upstream_broke"


async def test_if_all_upstreams_stay_silent_the_last_one_is_charged(tmp_path: Path) -> None:
    """The last attempt is the timeout of a call that is not moved."""
    policy = """
  broken: {{base_url: "{url}", first_byte_timeout: 2s}}
models:
  fast:
    upstreams: [{{upstream: broken}}, {{upstream: broken, model: other, weight: 0}}]
groups:
  staff: {{quotas: {{daily: {{tokens: 1M, per: day}}}}}}
users:
  alice: {{groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}}
"""
    async with _broken_upstream(HANG) as broken, stage(policy.format(url=broken.url), folder=tmp_path) as on:
        with fast_timers(20):
            assert (await on.post(CHAT, _ask())).status == 504
        row = await _record(on)
        assert (row["outcome"], row["input_tokens"] > 0) == ("upstream_broke", True)
        assert await _attempts(on) == {("broken", "abandoned"): 1, ("broken", "timed_out"): 1}


# OpenRouter's answer if the provider that it chose does not take the call.
def _in_200(code: object, *more: str, kind: str = "application/json") -> bytes:
    body = json.dumps({"error": {"message": "Provider returned error", "code": code}, "user_id": "u"}).encode()
    lines = ["HTTP/1.1 200 OK", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("code", "outcome"), [(429, "limited"), (502, "failed"), ("503", "failed"), (402, "failed")])
async def test_an_error_in_a_successful_answer_goes_to_the_next_upstream(
    code: object, outcome: str, stream: bool, tmp_path: Path
) -> None:
    """It has no choices, and its status says that the call did not run. Nothing is charged for it."""
    async with _broken_upstream(_in_200(code)) as broken, stage(_policy(broken.url), folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask(stream=stream))
        assert reply.status == 200
        assert b"error" not in reply.body
        row = await _record(on)
        assert (row["upstream"], row["outcome"], row["requests"]) == ("simulated", "complete", 1)
        assert row["output_tokens"] == on.simulator.reported_usage.output_tokens == 5
        assert await _attempts(on) == {("broken", outcome): 1, ("simulated", "answered"): 1}


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [(_in_200(400), "rejected"), (_in_200(504), "failed"), (_in_200("odd"), "answered"), (_in_200(1008), "answered")],
    ids=["400", "504", "a word", "no status"],
)
async def test_another_error_in_a_successful_answer_is_the_answer(
    answer: bytes, outcome: str, tmp_path: Path
) -> None:
    """It is bad everywhere, or the call may have run."""
    async with _broken_upstream(answer) as broken, stage(_policy(broken.url), folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask())
        assert (reply.status, "error" in reply.json()) == (200, True)
        assert on.simulator.received == 0
        assert (await _record(on))["outcome"] == "upstream_broke"
        assert await _attempts(on) == {("broken", outcome): 1}


async def test_an_error_in_a_successful_answer_is_shown_if_no_other_upstream_answers(tmp_path: Path) -> None:
    """The call did not run, so nothing is charged."""
    async with (
        _broken_upstream(_in_200(503)) as broken,
        stage(_policy(broken.url), folder=tmp_path, upstream=NOBODY) as on,
    ):
        reply = await on.post(CHAT, _ask())
        assert (reply.status, reply.json()["error"]["code"]) == (200, 503)
        row = await _record(on)
        assert (row["upstream"], row["state"]) == ("broken", "released")


@pytest.mark.parametrize("size", [100, 2**17])
async def test_an_answer_of_one_of_several_upstreams_is_unchanged(size: int, tmp_path: Path) -> None:
    """It is looked at for an error, which changes nothing of it, be it short or long."""
    choice = {"index": 0, "message": {"role": "assistant", "content": '"error"' * size}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    body = json.dumps({"choices": [choice], "usage": usage}).encode()
    async with _broken_upstream(_head(200, body=body)) as broken, stage(_policy(broken.url), folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask())
        assert (reply.status, reply.body) == (200, body)
        assert (await _record(on))["output_tokens"] == 2


async def test_an_answer_that_breaks_off_while_it_is_looked_at_is_not_sent_elsewhere(tmp_path: Path) -> None:
    """It may have run."""
    answer = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"error": {"code": 503'
    async with _broken_upstream(answer) as broken, stage(_policy(broken.url), folder=tmp_path) as on:
        assert (await on.post(CHAT, _ask())).status == 502
        assert (await _record(on))["outcome"] == "upstream_broke"
        assert on.simulator.received == 0


async def test_the_log_says_which_upstream_failed_first_and_how_many_attempts_there_were(tmp_path: Path) -> None:
    """With the model's name there, what the call held, and the ids that others gave to it."""
    trace, id = "4bf92f3577b34da6a3ce929d0e0e4736", "4f1c7f6e-8b1d-4b62-9d5e-0d5a6f7b8c9d"
    sent = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "x-request-id": id}
    async with _broken_upstream(_head(500)) as broken, stage(_policy(broken.url), folder=tmp_path) as on:
        with capture_logs() as logged:
            reply = await on.post(CHAT, _ask(stream=True), headers=sent)
            await on.all_settled()
        (line,) = [each for each in logged if each["event"] == "request"]
        assert (line["trace"], line["client_request"]) == (trace, id)
        assert (line["attempts"], line["failed_first"], line["upstream"]) == (2, "broken", "simulated")
        assert (line["model"], line["upstream_model"], line["stream"]) == ("fast", "gpt-4o-mini", True)
        assert line["upstream_request"] == reply.headers["x-upstream-request-id"]
        assert line["held_tokens"] >= line["input_tokens"] + line["output_tokens"]
        assert 0 <= line["waited_ms"] <= line["admitted_ms"]
        assert on.simulator.requests[0].headers["traceparent"] == sent["traceparent"]


@pytest.mark.parametrize(
    ("header", "logged_id"),
    [
        ("X-Request-Id: req_0123456789abcdef", "req_0123456789abcdef"),
        ("Request-Id: req_011CSHoEeqs5C35K2UUqR7Fy", "req_011CSHoEeqs5C35K2UUqR7Fy"),
        ("X-Request-Id: the words of a prompt", None),
        (f"X-Request-Id: req_{UPSTREAM_KEY}", None),
        (f"X-Request-Id: {'x' * 81}", None),
        ("X-Request-Id: ", None),
        ("X-Other: req_0123456789abcdef", None),
    ],
)
@pytest.mark.parametrize("status", [200, 400])
async def test_the_log_has_the_upstream_s_id_of_the_request(
    header: str, logged_id: str | None, status: int, tmp_path: Path
) -> None:
    """Without it, an upstream's support finds nothing. Any other text, and our key, are left out."""
    async with _broken_upstream(_head(status, header)) as broken, stage(folder=tmp_path, upstream=broken.url) as on:
        with capture_logs() as logged:
            await on.post(CHAT, _ask())
            await on.all_settled()
        (line,) = [each for each in logged if each["event"] == "request"]
        assert (line.get("upstream_request"), line["attempts"]) == (logged_id, 1)
