"""Calls whose clients disconnect before the end are charged once, and nothing stays held."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.calls import disconnect as module
from proxy.calls.call import Call
from proxy.calls.disconnect import DRAINS_PER_USER_MAX, Disconnects, Watch
from proxy.calls.reservation import Reservation
from proxy.calls.tokenizer import Tokenizers
from proxy.config.loader import load_text
from proxy.policy.amounts import AtLeast, Exactly, Tokens, Usage
from proxy.simulator.server import Simulator
from proxy.web.response import WebResponder
from tests.bare_upstream import bare_upstream, connections
from tests.builders import entry_in
from tests.stage import STAFF, UPSTREAM_KEY, Stage, key_of, sqlite_in, stage, text_of, until

pytestmark = [pytest.mark.every_engine, pytest.mark.journey]

HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


def _ask(simulate: str, **more: Any) -> dict[str, Any]:
    return {"model": "fast", "messages": HELLO, "metadata": {"simulate": simulate}, **more}


async def _leave_after(on: Stage, body: dict[str, Any], words: int) -> None:
    """Begin a call, and hang up when the upstream has sent so many words (0: when it has the request)."""
    call = on.begin(CHAT, body)
    await on.simulator.until(lambda: on.simulator.received > 0 and on.simulator.chunks_sent >= words)
    await on.hang_up(call)


async def test_stop_closes_the_connection_at_once_and_charges_what_passed(tmp_path: Path) -> None:
    """The upstream stops generating when the client disconnects, also while nothing is being written."""
    async with stage(folder=tmp_path, on_disconnect="stop") as on:
        await _leave_after(on, _ask("tokens=90 stall=5", stream=True), 5)
        await on.simulator.until(lambda: on.simulator.open_calls == 0)
        await on.all_settled()
        used, held = await on.used()
        assert held == 0
        assert 0 < used < 60
        assert (await on.quota("staff/daily"))["requests"]["used"] == 1


async def test_stop_before_the_upstream_answered_charges_the_input(tmp_path: Path) -> None:
    """T47: the call was sent, so the upstream may have read the input."""
    async with stage(folder=tmp_path, on_disconnect="stop") as on:
        await _leave_after(on, _ask("hang", stream=True), 0)
        await on.simulator.until(lambda: on.simulator.open_calls == 0)
        await on.all_settled()
        used, held = await on.used()
        assert held == 0
        assert 0 < used < 60


@pytest.mark.parametrize(("stream", "on_disconnect"), [(True, "drain"), (False, "drain"), (False, "stop")])
async def test_drain_reads_to_the_end_and_charges_the_reported_usage(
    stream: bool, on_disconnect: str, tmp_path: Path
) -> None:
    """The upstream bills the whole answer, and its end says how much that is.

    An answer that is not streamed is always drained: otherwise hanging up before its end would make it almost free.
    """
    simulator = Simulator(UPSTREAM_KEY, tokens_per_s=400)
    async with stage(folder=tmp_path, on_disconnect=on_disconnect, simulator=simulator) as on:
        await _leave_after(on, _ask("tokens=60", stream=stream), 3 if stream else 0)
        await on.all_settled()
        assert await on.used() == (simulator.reported_usage.input_tokens + simulator.reported_usage.output_tokens, 0)
        assert simulator.reported_usage.output_tokens == 60


async def test_a_drained_call_is_not_sent_once_more(tmp_path: Path) -> None:
    """The upstream rejects the option that we added. Nobody would read the answer to a call without it."""
    begun, go_on, requests = asyncio.Event(), asyncio.Event(), 0
    body = b'{"error": {"message": "Unknown parameter", "code": "unknown_parameter", "param": "stream_options"}}'

    async def serve(metadata: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        requests += 1
        begun.set()
        await go_on.wait()
        writer.write(b"HTTP/1.1 400 X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        await writer.drain()

    async with (
        bare_upstream(serve) as upstream,
        stage(folder=tmp_path, upstream=upstream.url, on_disconnect="drain") as on,
    ):
        call = on.begin(CHAT, _ask("", stream=True))
        await begun.wait()
        await on.hang_up(call)
        await until(lambda: on.connections == 0)
        go_on.set()
        await on.all_settled()
        assert requests == 1
        assert await on.used() == (0, 0)


async def test_a_drain_that_has_ended_makes_room_for_the_next(tmp_path: Path) -> None:
    """With one drain at a time, two that follow each other are both charged exactly, and none is left counted."""
    simulator, disconnects = Simulator(UPSTREAM_KEY, tokens_per_s=400), Disconnects(drains_max=1)
    async with stage(folder=tmp_path, on_disconnect="drain", simulator=simulator, disconnects=disconnects) as on:
        for calls in (1, 2):
            await _leave_after(on, _ask("tokens=60", stream=True, max_tokens=500), simulator.chunks_sent + 3)
            await on.all_settled()
            usage = simulator.reported_usage  # of all calls so far
            assert usage.output_tokens == calls * 60
            assert await on.used() == (usage.input_tokens + usage.output_tokens, 0)
            assert not disconnects._draining


@pytest.mark.parametrize("bound", [{"drain_s": 0.05}, {"drains_max": 0}], ids=["too long", "too many"])
async def test_a_drain_at_its_bound_charges_the_hold(bound: dict[str, Any], tmp_path: Path) -> None:
    """If a drain takes too long, or too many run, the connection is closed and all that was held is charged.

    The cost is unknown then. Without these bounds, disconnecting would be a way to pile up connections.
    """
    async with stage(folder=tmp_path, on_disconnect="drain", disconnects=Disconnects(**bound)) as on:
        await _leave_after(on, _ask("tokens=90 stall=5", stream=True, max_tokens=500), 5)
        await on.simulator.until(lambda: on.simulator.open_calls == 0)
        await on.all_settled()
        used, held = await on.used()
        assert held == 0
        assert used > 500


async def test_one_user_cannot_take_the_drains_of_others(tmp_path: Path) -> None:
    """Bob's calls that hang fill his share of the drains, and the rest is charged. Alice's call is still drained."""
    async with stage(folder=tmp_path, on_disconnect="drain", disconnects=Disconnects(drain_s=5)) as on:
        hanging = [on.begin(CHAT, _ask("hang"), user="bob") for _ in range(DRAINS_PER_USER_MAX + 3)]
        await on.simulator.until(lambda: on.simulator.open_calls == len(hanging))
        for call in hanging:
            await on.hang_up(call)
        await until(lambda: on.server.calls_in_flight == DRAINS_PER_USER_MAX)
        call = on.begin(CHAT, _ask("tokens=9 speed=50", stream=True, max_tokens=500))
        await on.simulator.until(lambda: on.simulator.chunks_sent >= 2)
        await on.hang_up(call)
        await until(lambda: on.server.calls_in_flight == DRAINS_PER_USER_MAX)
        assert await on.used() == (on.simulator.reported_usage.input_tokens + 9, 0)
        await on.server.stop(grace_s=0)


async def test_a_hundred_disconnects_leave_nothing_held(tmp_path: Path) -> None:
    """T46: after disconnects at different points no call is open, nothing is held, each call is charged its words."""
    async with stage(folder=tmp_path, on_disconnect="stop") as on:
        for words in range(100):
            before = on.simulator.chunks_sent
            call = on.begin(CHAT, _ask(f"tokens=90 stall={words % 10}", stream=True))
            await on.simulator.until(lambda: on.simulator.chunks_sent >= before + words % 10)  # noqa: B023
            await on.hang_up(call)
        await on.simulator.until(lambda: on.simulator.open_calls == 0)
        await on.all_settled()
        used, held = await on.used()
        assert held == 0
        assert used >= on.simulator.chunks_sent
        assert (await on.quota("staff/daily"))["requests"]["used"] <= 100


# ------------------------------------------------------------------------------- an upstream that pauses in a stream


class PausingUpstream:
    """An upstream that streams the bytes `first` and, once `go_on` is set, the bytes `rest`."""

    def __init__(self, first: bytes, rest: bytes) -> None:
        self.go_on = asyncio.Event()
        self.is_closed = asyncio.Event()
        self.url = ""
        self.asked: dict[str, Any] = {}
        self._first, self._rest = first, rest

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One call."""
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split()[0])
        self.asked = json.loads(await reader.readexactly(length))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + self._first)
        going_on = asyncio.ensure_future(self.go_on.wait())
        leaving = asyncio.ensure_future(reader.read())
        await asyncio.wait([going_on, leaving], return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            self.is_closed.set()
        else:
            writer.write(self._rest)
        going_on.cancel()
        leaving.cancel()
        writer.close()


class WatchedDisconnects(Disconnects):
    """Disconnects that remember the client of the last call."""

    client: WebResponder

    def watch(self, call: Call, reservation: Reservation) -> Watch:
        self.client = call.client
        return super().watch(call, reservation)


@asynccontextmanager
async def _pausing_upstream(
    folder: Path, first: bytes, rest: bytes = b"", *, kind: str = "simulator"
) -> AsyncIterator[tuple[Stage, PausingUpstream, WatchedDisconnects]]:
    """A stage in front of a pausing upstream of this kind, with `on_disconnect: stop`."""
    upstream, disconnects = PausingUpstream(first, rest), WatchedDisconnects()
    async with connections(upstream.serve) as port:
        upstream.url = f"http://127.0.0.1:{port}/v1"
        async with stage(folder=folder, disconnects=disconnects, upstream=upstream.url, on_disconnect="stop") as on:
            text = text_of(
                STAFF, database=sqlite_in(folder), upstream=upstream.url, kind=kind, more=", on_disconnect: stop"
            )
            on.config = load_text(text)
            assert await on.server.policies.reload()
            yield on, upstream, disconnects


async def _read_and_leave(on: Stage, disconnects: WatchedDisconnects, length: int, **more: Any) -> tuple[str, bytes]:
    """Read so many bytes of a stream and hang up. Returns the call's id and the bytes once the proxy has noticed."""
    headers = {"authorization": f"Bearer {key_of('alice')}"}
    body = _ask("", stream=True, **more)
    async with on.http.post(on.url + CHAT, json=body, headers=headers) as response:
        seen = await response.content.readexactly(length)
        response.close()
    await until(lambda: disconnects.client.is_disconnected)
    return response.headers["x-request-id"], seen


async def _charged(on: Stage, call_id: str) -> Usage:
    """The charge of a call whose client left, after its end. The quota has the same usage and holds nothing."""
    await on.all_settled()
    entry = await entry_in(on.server.ledger, call_id)
    assert entry is not None and entry.usage is not None
    assert entry.outcome == "client_left"
    assert await on.used() == (entry.usage.tokens.input + entry.usage.tokens.output, 0)
    return entry.usage


def _chunk(index: int = 0, content: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": index, "delta": {} if content is None else {"content": content}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **more}, separators=(",", ":")).encode() + b"\n\n"


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"
FINISHED = _chunk(content="Hi") + _chunk(finish="stop")


async def test_stop_waits_for_the_usage_once_the_text_is_complete(tmp_path: Path) -> None:
    """The usage follows within moments and is exact, so no estimate is charged."""
    async with _pausing_upstream(tmp_path, FINISHED, USAGE + DONE) as (on, upstream, disconnects):
        call_id, _ = await _read_and_leave(on, disconnects, len(FINISHED))
        upstream.go_on.set()
        assert await _charged(on, call_id) == Exactly(Tokens(5, 2))


async def test_stop_waits_for_the_usage_for_a_limited_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After that the connection is closed and what passed is charged."""
    monkeypatch.setattr(module, "USAGE_WAIT_S", 0.05)
    async with _pausing_upstream(tmp_path, FINISHED) as (on, upstream, disconnects):
        call_id, _ = await _read_and_leave(on, disconnects, len(FINISHED))
        usage = await _charged(on, call_id)
        assert isinstance(usage, AtLeast)
        assert usage.tokens.output == 1
        await upstream.is_closed.wait()


async def test_stop_does_not_wait_while_another_choice_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is complete only when all choices have finished."""
    monkeypatch.setattr(module, "USAGE_WAIT_S", 10**6)
    first = _chunk(0, content="Hi") + _chunk(1, content="Hi") + _chunk(0, finish="stop")
    async with _pausing_upstream(tmp_path, first) as (on, upstream, disconnects):
        call_id, _ = await _read_and_leave(on, disconnects, len(first), n=2)
        await upstream.is_closed.wait()
        usage = await _charged(on, call_id)
        assert isinstance(usage, AtLeast)
        assert usage.tokens.output == 2


async def test_an_abandoned_stream_of_vllm_is_charged_exactly(tmp_path: Path) -> None:
    """We ask for the usage so far on every chunk, and remove it for a client that did not ask."""

    def so_far(output: int) -> dict[str, int]:
        return {"prompt_tokens": 11, "total_tokens": 11 + output, "completion_tokens": output}

    running = _chunk(content="", usage=so_far(0)) + _chunk(content="A long word", usage=so_far(7))
    plain = _chunk(content="") + _chunk(content="A long word")
    async with _pausing_upstream(tmp_path, running, kind="vllm") as (on, upstream, disconnects):
        call_id, seen = await _read_and_leave(on, disconnects, len(plain))
        await upstream.is_closed.wait()
        assert seen == plain
        assert upstream.asked["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
        assert await _charged(on, call_id) == Exactly(Tokens(11, 7))


class EndlessTokenizers(Tokenizers):
    """A tokenizer that never finishes."""

    def __init__(self) -> None:
        super().__init__(())
        self.is_asked = asyncio.Event()

    async def count_all(self, texts: Sequence[str], encoding: str, *, timeout_s: float = 10) -> int | None:
        self.is_asked.set()
        await asyncio.Event().wait()
        return None


@pytest.mark.parametrize("stream", [True, False])
async def test_a_disconnect_before_the_call_was_sent_costs_nothing(stream: bool, tmp_path: Path) -> None:
    """T47: a large input is still being counted, so the upstream has nothing of the call. The hold is freed."""
    disconnects = WatchedDisconnects(drain_s=10**6)  # no drain: a call that was not sent has no answer
    tokenizers = EndlessTokenizers()
    policy = STAFF.replace("tokens: 1M", "tokens: 1_000M")
    async with stage(policy, folder=tmp_path, disconnects=disconnects, tokenizers=tokenizers) as on:
        body = _ask("tokens=1", stream=stream)
        body["messages"] = [{"role": "user", "content": "a " * 2**20}]
        call = on.begin(CHAT, io.BytesIO(json.dumps(body).encode()))
        await tokenizers.is_asked.wait()
        assert (await on.used())[1] > 2**21
        await on.hang_up(call)
        await until(lambda: disconnects.client.is_disconnected)
        await on.all_settled()
        assert await on.used() == (0, 0)
        assert on.simulator.received == 0
        entry = await entry_in(on.server.ledger, disconnects.client.id)
        assert entry is not None
        assert (entry.state, entry.outcome) == ("released", "client_left")
