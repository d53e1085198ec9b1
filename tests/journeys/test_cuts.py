"""Streams that end too early, at every byte and at every event: what passed is charged, once, and nothing is held.

An upstream on bare sockets sends the first bytes of a recorded answer and closes, with a clean end or in the middle
of a chunk; or it is the client that hangs up. What must be on the books is worked out here from the bytes alone.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import pytest

from tests.bare_upstream import BareUpstream, bare_upstream, stream_head
from tests.stage import STAFF, Reply, Stage, key_of, stage

pytestmark = [pytest.mark.every_engine, pytest.mark.journey]

AT_ONCE = 32
ROOMY = STAFF.replace("tokens: 1M", "tokens: 100M")

# Texts of one to four bytes a character, and how many tokens of o200k_base each of them is.
PIECES = {"Grüße": 3, " 世界": 1, " 👩‍🚀": 5, " ok": 1}
# Neither is what we count ourselves, so a test sees whose count is on the books.
TAKEN, GIVEN = 77, 55
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Recording:
    """One endpoint's answer, event by event. `counted` is what the input has by our own count."""

    path: str
    asked: Mapping[str, Any]
    counted: int
    events: tuple[bytes, ...]

    def ask(self, *, asks_for_usage: bool, cut: int) -> dict[str, Any]:
        """The request for it; `cut` reaches the upstream in its metadata."""
        body = {"model": "fast", "stream": True, **self.asked, "metadata": {"cut": str(cut)}}
        has_option = asks_for_usage and self.path != "/v1/responses"
        return {**body, "stream_options": {"include_usage": True}} if has_option else body

    def on_the_wire(self, *, crlf: bool) -> "Recorded":
        """The answer with its lines ended in one of both ways."""
        events = tuple(event.replace(b"\n", b"\r\n") if crlf else event for event in self.events)
        return Recorded(events, tuple(accumulate(map(len, events))))


@dataclass(frozen=True, slots=True)
class Recorded:
    """The bytes of an answer, and where each of its events ends."""

    events: tuple[bytes, ...]
    ends: tuple[int, ...]

    @property
    def whole(self) -> bytes:
        """All of it."""
        return b"".join(self.events)

    def whole_events(self, cut: int) -> list[bytes]:
        """The events that are complete within the first `cut` bytes."""
        return [event for event, end in zip(self.events, self.ends, strict=True) if end <= cut]


def _data(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _chunk(**choice: Any) -> bytes:
    return _data({"choices": [{"index": 0, **choice}]})


def _event(kind: str, **said: Any) -> bytes:
    return b"event: " + kind.encode() + b"\n" + _data({"type": kind, **said})


_USAGE = _data({"choices": [], "usage": {"prompt_tokens": TAKEN, "completion_tokens": GIVEN}})
_FULL_TEXT = "".join(PIECES)

RECORDINGS = {
    "chat": Recording(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hello there"}]},
        9,  # 2 of the text, 1 of the role, 3 of a message, 3 before the answer
        (
            _chunk(delta={"role": "assistant", "content": ""}),
            *(_chunk(delta={"content": piece}) for piece in PIECES),
            _chunk(delta={}, finish_reason="stop"),
            _USAGE,
            DONE,
        ),
    ),
    "completions": Recording(
        "/v1/completions",
        {"prompt": "Hello there"},
        2,
        (*(_chunk(text=piece) for piece in PIECES), _chunk(text="", finish_reason="stop"), _USAGE, DONE),
    ),
    "responses": Recording(
        "/v1/responses",
        {"input": "Hello there"},
        8,  # 2 of the text, 3 of a message, 3 before the answer
        (
            _event("response.created", response={"id": "resp_1", "status": "in_progress"}),
            *(_event("response.output_text.delta", delta=piece) for piece in PIECES),
            _event("response.output_text.done", text=_FULL_TEXT),
            _event("response.completed", response={"usage": {"input_tokens": TAKEN, "output_tokens": GIVEN}}),
        ),
    ),
}


def _read(received: bytes) -> tuple[int, bool]:
    """The tokens of the texts in these bytes, and whether the usage is in them: by lines, as many clients read."""
    tokens, has_usage = 0, False
    for line in received.splitlines():
        try:
            said = json.loads(line.removeprefix(b"data: ").replace(b"[DONE]", b"{}"))
        except ValueError:
            continue  # no data, or not all of it
        has_usage = has_usage or b'"usage"' in line
        choice = (said.get("choices") or [{}])[0]
        text = said.get("delta") or choice.get("text") or choice.get("delta", {}).get("content")
        tokens += PIECES.get(text, 0)
    return tokens, has_usage


async def _each(items: Iterable[int], act: Callable[[int], Awaitable[None]]) -> None:
    """Do this for each, `AT_ONCE` at a time."""
    left = iter(items)

    async def worker() -> None:
        for item in left:
            await act(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(worker())


async def _settled(on: Stage) -> dict[str, dict[str, Any]]:
    """The calls on the books by their ids, after an audit; nothing may be held, and no call be open."""
    await on.audit()
    for counter in await on.rows("counters"):
        assert [counter[f"held_{measure}"] for measure in ("input", "output", "requests")] == [0, 0, 0]
    calls = {call["id"]: call for call in await on.rows("calls")}
    assert {call["state"] for call in calls.values()} == {"settled"}
    [counter] = await on.rows("counters")
    charged = [sum(call[f"{side}_tokens"] for call in calls.values()) for side in ("input", "output")]
    assert [counter["used_input"], counter["used_output"], counter["used_requests"]] == [*charged, len(calls)]
    return calls


def _charged(call: dict[str, Any]) -> tuple[int, int, str]:
    return call["input_tokens"], call["output_tokens"], call["provenance"]


async def _nothing_is_left(on: Stage, upstream: BareUpstream) -> None:
    await on.all_settled()
    assert on.server.calls_in_flight == 0
    await upstream.all_closed()


# -------------------------------------------------------------------------------------------- cut by the upstream


def _cases() -> Iterator[Any]:
    for endpoint, crlf in product(RECORDINGS, (False, True)):
        for ending, asks in (("closed", True), ("closed", False), ("torn", True)):
            if asks or endpoint != "responses":
                said = "" if asks else "-unasked"
                yield pytest.param(endpoint, crlf, ending, asks, id=f"{endpoint}-{'cr' * crlf}lf-{ending}{said}")


@pytest.mark.parametrize(("endpoint", "crlf", "ending", "asks"), [*_cases()])
async def test_a_stream_cut_at_any_byte_is_charged_for_what_passed(
    endpoint: str, crlf: bool, ending: str, asks: bool, tmp_path: Path
) -> None:
    """Wherever the upstream stops, the client has the bytes up to there, and the books have those texts, once.

    `closed` looks like an end, as nothing says how long the answer is; `torn` is the middle of a chunk.
    """
    recording = RECORDINGS[endpoint]
    recorded = recording.on_the_wire(crlf=crlf)
    total = len(recorded.whole)
    replies: dict[int, Reply] = {}

    async def serve(metadata: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if ending == "closed":
            writer.write(stream_head("Connection: close"))
        else:
            writer.write(stream_head("Transfer-Encoding: chunked") + b"%x\r\n" % total)
        writer.write(recorded.whole[: int(metadata["cut"])])

    async with bare_upstream(serve) as upstream, stage(ROOMY, folder=tmp_path, upstream=upstream.url) as on:

        async def ask(cut: int) -> None:
            body = recording.ask(asks_for_usage=asks, cut=cut)
            replies[cut] = await on.post(recording.path, body)

        await _each(range(total + 1), ask)
        await _nothing_is_left(on, upstream)

    calls = await _settled(on)
    assert len(calls) == len(replies) == total + 1
    for cut, reply in replies.items():
        call = calls[reply.headers["x-request-id"]]
        sent = recorded.whole[:cut]
        whole = recorded.whole_events(cut)
        is_torn = ending == "torn" and recorded.events[-1] not in whole
        _check_bytes(reply.body, recorded, cut, is_torn=is_torn, asks=asks)
        assert call["outcome"] == ("upstream_broke" if is_torn else "complete"), sent
        passed, has_usage = _read(b"".join(whole) if is_torn else sent)
        expected = (TAKEN, GIVEN, "exactly") if has_usage else (recording.counted, passed, "at_least")
        assert _charged(call) == expected, sent


def _check_bytes(body: bytes, recorded: Recorded, cut: int, *, is_torn: bool, asks: bool) -> None:
    """A clean end passes on as it came; else what was whole passes, but for an end kept back, and then the error."""
    if not is_torn:
        assert body == (recorded.whole[:cut] if asks else _without_usage(recorded, cut))
        return
    passed = b"".join(event for event in recorded.whole_events(cut) if b'"usage"' not in event)
    assert body.startswith(passed)
    error = body[len(passed) :]
    assert error.startswith((b"data: ", b"event: error\n"))
    assert b"broke off" in error


def _without_usage(recorded: Recorded, cut: int) -> bytes:
    """The bytes as far as they came, without the usage that only we asked for, as soon as it can be read."""
    [usage] = [event for event in recorded.events if b'"usage"' in event]
    before, found, after = recorded.whole[:cut].partition(usage.rstrip())
    return before + after.lstrip() if found else before


# ---------------------------------------------------------------------------------------------- cut by the client


@pytest.mark.parametrize("on_disconnect", ["stop", "drain"])
@pytest.mark.parametrize("endpoint", RECORDINGS)
async def test_a_client_that_leaves_after_any_event_is_charged_once(
    endpoint: str, on_disconnect: str, tmp_path: Path
) -> None:
    """With `stop` for what had arrived, or for all where only the usage was missing; with `drain` always for all."""
    recording = RECORDINGS[endpoint]
    recorded = recording.on_the_wire(crlf=False)
    gone = {str(position): asyncio.Event() for position in range(len(recorded.events) + 1)}

    def goes_on(position: int) -> bool:
        """Whether the rest is still generated once the client has gone."""
        return on_disconnect == "drain" or _is_finished(recorded.events[:position])

    async def serve(metadata: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        position = int(metadata["cut"])
        writer.write(stream_head("Connection: close") + b"".join(recorded.events[:position]))
        if goes_on(position):
            await gone[metadata["cut"]].wait()
            writer.write(b"".join(recorded.events[position:]))
        else:
            assert await reader.read() == b""  # silent, until it is left

    async with (
        bare_upstream(serve) as upstream,
        stage(ROOMY, folder=tmp_path, upstream=upstream.url, on_disconnect=on_disconnect) as on,
    ):
        left: dict[int, str] = {}

        async def leave(position: int) -> None:
            body = recording.ask(asks_for_usage=True, cut=position)
            # What is kept back until all is settled can't be waited for by the one who leaves before that.
            expected = b"".join(event for event in recorded.events[:position] if b'"usage"' not in event)
            left[position] = await _read_and_leave(on, recording.path, body, expected.removesuffix(DONE))
            gone[str(position)].set()

        await _each(range(len(recorded.events)), leave)
        await _nothing_is_left(on, upstream)

    calls = await _settled(on)
    assert len(calls) == len(left)
    for position, call_id in left.items():
        passed, has_usage = _read(b"".join(recorded.events[:position]))
        is_exact = goes_on(position) or has_usage
        expected = (TAKEN, GIVEN, "exactly") if is_exact else (recording.counted, passed, "at_least")
        assert _charged(calls[call_id]) == expected, recorded.events[:position]
        assert goes_on(position) or calls[call_id]["outcome"] == "client_left"


def _is_finished(events: Iterable[bytes]) -> bool:
    """Whether the answer itself is whole, so that only its usage can follow."""
    return any(b'"finish_reason"' in event for event in events)


async def _read_and_leave(on: Stage, path: str, body: dict[str, Any], expected: bytes) -> str:
    """Read the head and exactly these bytes of a stream, and cut the connection; returns the id of the call."""
    sent = {"authorization": f"Bearer {key_of('alice')}"}
    async with on.http.post(on.url + path, json=body, headers=sent) as response:
        assert await response.content.readexactly(len(expected)) == expected
        assert response.connection and response.connection.transport
        response.connection.transport.abort()
        return response.headers["x-request-id"]


# ------------------------------------------------------------------------------------------- a message of Anthropic's

# Its input is said first, and its output last: so a cut changes what is exact, but never the input.
MESSAGE = Recording(
    "/v1/messages",
    {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 100},
    TAKEN,
    (
        _event("message_start", message={"content": [], "usage": {"input_tokens": TAKEN - 7, "output_tokens": 1}}),
        _event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        _event("ping"),
        *(_event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece}) for piece in PIECES),
        _event("content_block_stop", index=0),
        _event(
            "message_delta",
            delta={"stop_reason": "end_turn"},
            usage={"input_tokens": TAKEN - 7, "cache_read_input_tokens": 7, "output_tokens": GIVEN},
        ),
        _event("message_stop"),
    ),
)


def _expected_of_message(events: Iterable[bytes]) -> tuple[int, int, str]:
    """What these events of it cost: the input as last said, the output as said at the end, or else the texts."""
    said = b"".join(events)
    if b"message_delta" in said:
        return TAKEN, GIVEN, "exactly"
    tokens = sum(count for piece, count in PIECES.items() if json.dumps(piece, ensure_ascii=False).encode() in said)
    return TAKEN - 7, tokens, "at_least"


@pytest.mark.parametrize("crlf", [False, True], ids=["lf", "crlf"])
@pytest.mark.parametrize("ending", ["closed", "torn"])
async def test_a_message_cut_at_any_event_is_charged_for_what_passed(ending: str, crlf: bool, tmp_path: Path) -> None:
    """From its first event on the input is the upstream's; what passed of the answer is on the books, once."""
    recorded = MESSAGE.on_the_wire(crlf=crlf)
    replies: dict[int, Reply] = {}

    async def serve(metadata: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = b"".join(recorded.events[: int(metadata["cut"])])
        if ending == "closed":
            writer.write(stream_head("Connection: close") + sent)
        else:
            writer.write(stream_head("Transfer-Encoding: chunked") + b"%x\r\n" % (len(sent) + 1) + sent)

    async with bare_upstream(serve) as upstream, stage(ROOMY, folder=tmp_path, upstream=upstream.url) as on:

        async def ask(cut: int) -> None:
            replies[cut] = await on.post(MESSAGE.path, MESSAGE.ask(asks_for_usage=False, cut=cut))

        await _each(range(1, len(recorded.events) + 1), ask)
        await _nothing_is_left(on, upstream)

    calls = await _settled(on)
    assert len(calls) == len(recorded.events)
    for cut, reply in replies.items():
        passed = recorded.events[:cut]
        is_torn = ending == "torn" and cut < len(recorded.events)
        call = calls[reply.headers["x-request-id"]]
        assert _charged(call) == _expected_of_message(passed), passed
        assert call["outcome"] == ("upstream_broke" if is_torn else "complete")
        shown = b"".join(event for event in passed if not (is_torn and b"message_delta" in event))
        assert reply.body.startswith(shown)
        rest = reply.body[len(shown) :]
        assert (
            rest.startswith(b'event: error\ndata: {"type":"error","error":{"type":"api_error",')
            if is_torn
            else not rest
        )


@pytest.mark.parametrize("on_disconnect", ["stop", "drain"])
async def test_who_leaves_a_message_after_any_event_is_charged_once(on_disconnect: str, tmp_path: Path) -> None:
    """With `drain` for all of it; with `stop` for what had arrived, the input as it was said."""
    recorded = MESSAGE.on_the_wire(crlf=False)
    gone = {str(position): asyncio.Event() for position in range(len(recorded.events))}

    async def serve(metadata: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        position = int(metadata["cut"])
        writer.write(stream_head("Connection: close") + b"".join(recorded.events[:position]))
        if on_disconnect == "drain":
            await gone[metadata["cut"]].wait()
            writer.write(b"".join(recorded.events[position:]))
        else:
            assert await reader.read() == b""  # silent, until it is left

    left: dict[int, str] = {}
    async with (
        bare_upstream(serve) as upstream,
        stage(ROOMY, folder=tmp_path, upstream=upstream.url, on_disconnect=on_disconnect) as on,
    ):

        async def leave(position: int) -> None:
            shown = b"".join(event for event in recorded.events[:position] if b"message_delta" not in event)
            body = MESSAGE.ask(asks_for_usage=False, cut=position)
            left[position] = await _read_and_leave(on, MESSAGE.path, body, shown)
            gone[str(position)].set()

        # Not before its first event, nor behind its end, which is kept back: nobody can tell that it has come.
        await _each(range(1, len(recorded.events) - 1), leave)
        await _nothing_is_left(on, upstream)

    calls = await _settled(on)
    for position, call_id in left.items():
        passed = recorded.events if on_disconnect == "drain" else recorded.events[:position]
        assert _charged(calls[call_id]) == _expected_of_message(passed), position
