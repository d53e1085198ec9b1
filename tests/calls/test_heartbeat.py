"""Upstreams with `heartbeat`: a client that waits for a silent upstream gets the head of its stream and comments."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from proxy.calls.call import Call
from proxy.calls.disconnect import Disconnects, Watch
from proxy.calls.reservation import Reservation
from proxy.config.loader import ConnectionLimits
from proxy.web.response import HEARTBEAT, WebResponder
from tests.bare_upstream import bare_upstream, stream_head
from tests.stage import Stage, fast_timers, key_of, stage, until

CHAT = "/v1/chat/completions"
HELLO: Any = [{"role": "user", "content": "Hello"}]
USAGE = b'"usage":{"prompt_tokens":10,"completion_tokens":5,"total_tokens":15}}'
EVENTS = (
    b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    b'data: {"choices":[],' + USAGE + b"\n\ndata: [DONE]\n\n"
)
STREAM = stream_head("x-request-id: up_1", "openai-version: 2020-10-01") + EVENTS

# Calls to `fast` go to the silent upstream, and to the simulator if that one fails.
POLICY = """
  silent: {{base_url: "{url}", kind: {kind}, on_disconnect: stop{more}}}
models:
  fast:
    upstreams: [{{upstream: silent}}, {{upstream: simulated, model: gpt-4o-mini, weight: 0}}]
    max_output_tokens: 100
  lonely: {{upstream: silent, max_output_tokens: 5000, reasoning: true}}
  cloud: {{upstream: simulated, model: gpt-4o-mini}}
groups:
  staff: {{quotas: {{daily: {{tokens: {tokens}, requests: 100k, per: day}}}}}}
users:
  alice: {{groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}}
  bob: {{groups: [staff], keys: ["key-of-bob-0123456789abcdef"]}}
"""


class WatchedDisconnects(Disconnects):
    """Disconnects that remember the clients of calls, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.clients: list[WebResponder] = []

    def watch(self, call: Call, reservation: Reservation) -> Watch:
        assert isinstance(call.client, WebResponder)
        self.clients.append(call.client)
        return super().watch(call, reservation)


class Silent:
    """An upstream that sends nothing but `head` until `go_on` is set, and then these bytes."""

    def __init__(self, answer: bytes, *, head: bytes = b"") -> None:
        self.url = ""
        self.requests = 0
        self.go_on = asyncio.Event()
        self.clients: list[WebResponder] = []
        self._head = head
        self._answer = answer

    async def serve(self, metadata: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One call."""
        self.requests += 1
        writer.write(self._head)
        await self.go_on.wait()
        writer.write(self._answer)
        await writer.drain()

    async def go_on_after_head(self) -> None:
        """Answer when the client of the last call has the head of its stream."""
        await until(lambda: bool(self.clients) and self.clients[-1].has_begun)
        self.go_on.set()


@asynccontextmanager
async def _silent(
    folder: Path,
    answer: bytes = STREAM,
    *,
    head: bytes = b"",
    kind: str = "simulator",
    tokens: str = "1M",
    more: str = ", heartbeat: 1s",
    simulator: str = "",
) -> AsyncIterator[tuple[Stage, Silent]]:
    """A stage with both upstreams, and timers that are twenty times as fast."""
    silent, disconnects = Silent(answer, head=head), WatchedDisconnects()
    silent.clients = disconnects.clients
    async with bare_upstream(silent.serve) as upstream:
        policy = POLICY.format(url=upstream.url, kind=kind, tokens=tokens, more=more)
        limits = ConnectionLimits(heartbeat_s=1)
        async with stage(
            policy, folder=folder, disconnects=disconnects, connection_limits=limits, more=simulator
        ) as on:
            with fast_timers(20):
                yield on, silent


def _ask(**more: Any) -> dict[str, Any]:
    asked = {"model": "fast", "messages": HELLO, "metadata": {}, "stream": True}
    return {**asked, "stream_options": {"include_usage": True}, **more}


@asynccontextmanager
async def _stream(on: Stage, body: Any, path: str = CHAT, **headers: str) -> AsyncIterator[aiohttp.ClientResponse]:
    sent = {"authorization": f"Bearer {key_of('alice')}", **headers}
    async with on.http.post(on.url + path, json=body, headers=sent) as response:
        yield response


async def _read(response: aiohttp.ClientResponse, silent: Silent, *, comments: int = 2) -> bytes:
    """The whole body. The upstream answers after so many comments."""
    seen = bytearray()
    async for data in response.content.iter_any():
        seen += data
        if seen.count(HEARTBEAT) >= comments:
            silent.go_on.set()
    return bytes(seen)


def _events(seen: bytes) -> Iterator[Any]:
    """The data of the events, without comments."""
    for line in seen.splitlines():
        if line.startswith(b"data: ") and line != b"data: [DONE]":
            yield json.loads(line.removeprefix(b"data: "))


async def _record(on: Stage) -> dict[str, Any]:
    """The record of alice's call."""
    await on.all_settled()
    await on.audit()
    [row] = [row for row in await on.rows("calls") if row["user_name"] == "alice"]
    return row


async def test_a_silent_upstream_does_not_leave_its_client_without_a_byte(tmp_path: Path) -> None:
    """The head has our own headers, and the comments come until the upstream's answer, which passes unchanged."""
    async with _silent(tmp_path) as (on, silent), _stream(on, _ask()) as response:
        assert response.status == 200
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["cache-control"] == "no-cache, no-transform"
        assert response.headers["x-ratelimit-limit-tokens"] == "1000000"
        assert response.headers["x-request-id"].startswith("req_")
        assert not {"x-upstream-request-id", "openai-version"} & response.headers.keys()
        seen = await _read(response, silent)
        assert seen.startswith(HEARTBEAT * 2)
        assert seen.replace(HEARTBEAT, b"") == EVENTS
        row = await _record(on)
        assert (row["outcome"], row["upstream"], row["provenance"]) == ("complete", "silent", "exactly")
        assert await on.used() == (15, 0)


async def test_a_lowered_maximum_is_in_the_head(tmp_path: Path) -> None:
    """As in a head that is sent when the upstream has answered."""
    async with _silent(tmp_path, tokens="1500") as (on, silent), _stream(on, _ask(model="lonely")) as response:
        maximum, _, quota = response.headers["x-quota-capped"].partition("; ")
        assert quota == 'quota="staff/daily"'
        assert 0 < int(maximum) < 1500
        await _read(response, silent)


@pytest.mark.parametrize(
    ("more", "stream"), [("", True), (", heartbeat: 1s", False)], ids=["without heartbeat", "not streamed"]
)
async def test_nothing_is_sent_early_otherwise(more: str, stream: bool, tmp_path: Path) -> None:
    """The client of a call that is not streamed could not take a comment, and the default is none."""
    body = b'{"choices": [], ' + USAGE
    whole = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nx-request-id: up_1\r\nContent-Length: %d\r\n\r\n"
    answer = STREAM if stream else whole % len(body) + body
    async with _silent(tmp_path, answer, more=more) as (on, silent):
        ask = _ask() if stream else {"model": "fast", "messages": HELLO, "metadata": {}}
        call = on.begin(CHAT, ask)
        await until(lambda: silent.requests == 1)
        asyncio.get_running_loop().call_later(3, silent.go_on.set)
        reply = await call
        assert reply.headers["x-upstream-request-id"] == "up_1"
        assert HEARTBEAT not in reply.body
        assert reply.status == 200


def _failed(status: int, *more: str) -> bytes:
    body = b'{"error": {"message": "It failed", "type": "some_error", "param": "n", "code": "some_code"}}'
    lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def test_another_upstream_answers_behind_the_head(tmp_path: Path) -> None:
    """The client sees comments and then the answer. It is charged for that answer alone."""
    async with _silent(tmp_path, _failed(503)) as (on, silent):
        async with _stream(on, _ask(metadata={"simulate": "tokens=7"})) as response:
            seen = await _read(response, silent)
        assert seen.startswith(HEARTBEAT * 2)
        assert seen.endswith(b"data: [DONE]\n\n")
        assert not any("error" in event for event in _events(seen))
        row = await _record(on)
        assert (row["upstream"], row["outcome"], row["output_tokens"]) == ("simulated", "complete", 7)
        given = on.simulator.reported_usage
        assert await on.used() == (given.input_tokens + 7, 0)


@pytest.mark.parametrize(
    ("status", "outcome", "requests", "error"),
    [
        (400, "rejected", 1, ("It failed", "some_error", "some_code", "n")),
        (500, "upstream_failed", 0, ("It failed", "some_error", "some_code", "n")),
        (401, "upstream_failed", 0, (None, "upstream_error", "upstream_error", None)),
        (429, "upstream_failed", 0, (None, "rate_limit_error", "upstream_rate_limited", None)),
    ],
)
async def test_an_error_after_the_head_is_an_event(
    status: int, outcome: str, requests: int, error: tuple[Any, ...], tmp_path: Path
) -> None:
    """With the members that it would have as an answer of its own. The stream ends with it."""
    async with _silent(tmp_path, _failed(status)) as (on, silent):
        async with _stream(on, _ask(model="lonely")) as response:
            assert response.status == 200
            seen = await _read(response, silent)
        [event] = _events(seen)
        message, *members = error
        assert message in (None, event["error"]["message"])
        assert [event["error"][name] for name in ("type", "code", "param")] == members
        assert (await _record(on))["outcome"] == outcome
        assert await on.used() == (0, 0)
        assert (await on.quota("staff/daily"))["requests"]["used"] == requests


@pytest.mark.parametrize("answer", [b"", stream_head()], ids=["no answer", "no event"])
async def test_an_upstream_that_breaks_off_after_the_head_is_an_event(answer: bytes, tmp_path: Path) -> None:
    """It is charged as without heartbeats: the call was sent, so it may have been read."""
    answer = answer.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n")
    async with _silent(tmp_path, answer) as (on, silent):
        async with _stream(on, _ask()) as response:
            seen = await _read(response, silent)
        [event] = _events(seen)
        assert event["error"]["code"] == "upstream_error"
        row = await _record(on)
        assert (row["outcome"], row["provenance"]) == ("upstream_broke", "at_least")
        assert on.simulator.received == 0


@pytest.mark.parametrize("status", [400, 500])
async def test_the_sdks_read_comments_and_raise_at_the_event(status: int, tmp_path: Path) -> None:
    """Those of OpenAI and of Anthropic, for each of the three formats of streams."""
    async with _silent(tmp_path, _failed(status)) as (on, silent):
        sdk = on.sdk()
        for create in (
            sdk.chat.completions.create(model="lonely", messages=HELLO, stream=True, metadata={}),
            sdk.responses.create(model="lonely", input="Hi", stream=True, metadata={}),
        ):
            silent.go_on.clear()
            stream = await create
            with pytest.raises(openai.APIError, match="It failed"):
                await asyncio.gather(_all_of(stream), silent.go_on_after_head())
    (tmp_path / "messages").mkdir()
    async with (
        _silent(tmp_path / "messages", _failed(status), kind="anthropic") as (on, silent),
        anthropic.AsyncAnthropic(base_url=on.url, api_key=key_of("alice"), max_retries=0) as claude,
    ):
        message = await claude.messages.create(model="lonely", max_tokens=9, messages=HELLO, stream=True, metadata={})
        with pytest.raises(anthropic.APIStatusError, match="It failed"):
            await asyncio.gather(_all_of(message), silent.go_on_after_head())


async def _all_of(stream: AsyncIterator[Any]) -> list[Any]:
    return [each async for each in stream]


async def test_the_sdk_reads_a_stream_that_begins_with_comments(tmp_path: Path) -> None:
    """It sees the chunks alone."""
    async with _silent(tmp_path) as (on, silent):
        stream = await on.sdk().chat.completions.create(model="fast", messages=HELLO, stream=True, metadata={})
        chunks, _ = await asyncio.gather(_all_of(stream), silent.go_on_after_head())
        assert [chunk.choices[0].delta.content for chunk in chunks] == ["x", None]


async def test_a_client_that_waits_for_the_body_of_an_error_gets_no_heartbeat(tmp_path: Path) -> None:
    """The head of a stream would take the status of the error from it."""
    head = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    async with _silent(tmp_path, head=head) as (on, _), _stream(on, _ask()) as response:
        assert response.status == 400


async def test_a_whole_answer_after_the_head_follows_as_it_is(tmp_path: Path) -> None:
    """As after the head of an upstream that promised a stream. It is charged by its usage."""
    body = b'{"choices": [], ' + USAGE
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    async with _silent(tmp_path, answer) as (on, silent):
        async with _stream(on, _ask()) as response:
            assert (await _read(response, silent)).replace(HEARTBEAT, b"") == body
        await on.all_settled()
        assert await on.used() == (15, 0)


@pytest.mark.parametrize("model", ["lonely", "fast"])
async def test_a_head_that_promises_no_stream_does_not_end_the_heartbeats(model: str, tmp_path: Path) -> None:
    """Its body may still be one, and may take minutes to begin. With one upstream of the model, and with two."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    async with _silent(tmp_path, EVENTS, head=head) as (on, silent):
        async with _stream(on, _ask(model=model)) as response:
            seen = await _read(response, silent)
            assert seen.startswith(HEARTBEAT * 2)
            assert seen.replace(HEARTBEAT, b"") == EVENTS
        await on.all_settled()
        assert await on.used() == (15, 0)


@pytest.mark.parametrize("more", [", heartbeat: 1s", ""], ids=["heartbeat", "promised"])
async def test_an_error_as_a_whole_answer_after_the_head_is_an_event(more: str, tmp_path: Path) -> None:
    """OpenRouter states it with status 200. In no event, SDKs would take the stream for an empty answer."""
    body = b'{"error": {"code": 429, "message": "The provider is busy", "metadata": {"id": "org-AbCdEf123"}}}'
    kind = b"application/json" if more else b"text/event-stream"
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (kind, len(body)) + body
    async with _silent(tmp_path, answer, more=more) as (on, silent):
        sdk = on.sdk()
        stream = asyncio.create_task(
            sdk.chat.completions.create(model="lonely", messages=HELLO, stream=True, metadata={})
        )
        await (silent.go_on_after_head() if more else until(lambda: silent.requests == 1))
        silent.go_on.set()
        with pytest.raises(openai.APIError, match="The provider is busy"):
            await _all_of(await stream)
        row = await _record(on)
        assert (row["outcome"], row["output_tokens"]) == ("upstream_broke", 0)


async def test_a_client_that_leaves_after_the_head_is_charged_as_always(tmp_path: Path) -> None:
    """With `stop`: the connection to the upstream is closed, and the input is charged."""
    async with _silent(tmp_path) as (on, silent):
        call = on.begin(CHAT, _ask())
        await until(lambda: bool(silent.clients) and silent.clients[-1].has_begun)
        await on.hang_up(call)
        row = await _record(on)
        assert (row["outcome"], row["provenance"]) == ("client_left", "at_least")
        used, held = await on.used()
        assert held == 0
        assert 0 < used < 60


async def test_a_call_that_waits_for_a_slot_gets_no_heartbeat(tmp_path: Path) -> None:
    """So it can still be refused by a status."""
    async with _silent(tmp_path, more=", heartbeat: 1s, max_in_flight: 1") as (on, silent):
        first = on.begin(CHAT, _ask(model="lonely"), user="bob")
        await until(lambda: silent.requests == 1)
        async with _stream(on, _ask(model="lonely"), **{"x-quota-max-wait": "5"}) as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "upstream_full"
        silent.go_on.set()
        assert (await first).status == 200


async def test_comments_go_on_while_the_call_waits_for_another_upstream(tmp_path: Path) -> None:
    """The head was sent during the first attempt. The second upstream is full, and the wait ends."""
    async with _silent(tmp_path, _failed(503), simulator=", max_in_flight: 1") as (on, silent):
        hanging = {"model": "cloud", "messages": HELLO, "metadata": {"simulate": "hang"}, "stream": True}
        blocking = on.begin(CHAT, hanging, user="bob")
        await on.simulator.until(lambda: on.simulator.open_calls == 1)
        async with _stream(on, _ask(), **{"x-quota-max-wait": "5"}) as response:
            seen = await _read(response, silent, comments=1)
        assert seen.count(HEARTBEAT) >= 3
        [event] = _events(seen)
        assert event["error"]["message"] == "It failed"
        await on.hang_up(blocking)
