"""Streams that end too early, at every byte and at every event: what passed is charged once, and nothing stays held.

An upstream on bare sockets sends the first bytes of a recorded answer and closes the connection, cleanly or in the
middle of a chunk; or the client disconnects. The expected charges are computed here from the bytes alone.
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
LARGE = STAFF.replace("tokens: 1M", "tokens: 100M")

# Texts with characters of one to four bytes, and their length in tokens of o200k_base.
PIECES = {"Grüße": 3, " 世界": 1, " 👩‍🚀": 5, " ok": 1}
# The usage that the upstream reports. The proxy's own count differs, so a test sees which of the two was charged.
INPUT_TOKENS, OUTPUT_TOKENS = 77, 55
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Recording:
    """One endpoint's request and answer, event by event. `input_counted` is the proxy's own count of the input."""

    path: str
    fields: Mapping[str, Any]
    input_counted: int
    events: tuple[bytes, ...]

    def request(self, *, asks_for_usage: bool, cut: int) -> dict[str, Any]:
        """The body of the request; `cut` reaches the upstream in its metadata."""
        body = {"model": "fast", "stream": True, **self.fields, "metadata": {"cut": str(cut)}}
        has_option = asks_for_usage and self.path != "/v1/responses"
        return {**body, "stream_options": {"include_usage": True}} if has_option else body

    def on_the_wire(self, *, crlf: bool) -> "Answer":
        """The answer with one of the two kinds of line ends."""
        events = tuple(event.replace(b"\n", b"\r\n") if crlf else event for event in self.events)
        return Answer(events, tuple(accumulate(map(len, events))))


@dataclass(frozen=True, slots=True)
class Answer:
    """The bytes of an answer, and the position at which each of its events ends."""

    events: tuple[bytes, ...]
    ends: tuple[int, ...]

    @property
    def whole(self) -> bytes:
        """All bytes."""
        return b"".join(self.events)

    def whole_events(self, cut: int) -> list[bytes]:
        """The events that are complete within the first `cut` bytes."""
        return [event for event, end in zip(self.events, self.ends, strict=True) if end <= cut]


def _data(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _chunk(**choice: Any) -> bytes:
    return _data({"choices": [{"index": 0, **choice}]})


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\n" + _data({"type": kind, **fields})


_USAGE = _data({"choices": [], "usage": {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS}})
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
            _event(
                "response.completed",
                response={"usage": {"input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS}},
            ),
        ),
    ),
}


def _read(received: bytes) -> tuple[int, bool]:
    """The tokens of the texts in these bytes, and whether they have the usage. Read by lines, as many clients do."""
    tokens, has_usage = 0, False
    for line in received.splitlines():
        try:
            document = json.loads(line.removeprefix(b"data: ").replace(b"[DONE]", b"{}"))
        except ValueError:
            continue  # a line without data, or an incomplete one
        has_usage = has_usage or b'"usage"' in line
        choice = (document.get("choices") or [{}])[0]
        text = document.get("delta") or choice.get("text") or choice.get("delta", {}).get("content")
        tokens += PIECES.get(text, 0)
    return tokens, has_usage


async def _for_each(items: Iterable[int], run: Callable[[int], Awaitable[None]]) -> None:
    """Run this for each item, `AT_ONCE` at the same time."""
    remaining = iter(items)

    async def worker() -> None:
        for item in remaining:
            await run(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(worker())


async def _audited_calls(on: Stage) -> dict[str, dict[str, Any]]:
    """The rows of all calls by their ids, after an audit: nothing is held, no call is open, the sums are right."""
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


async def _check_all_ended(on: Stage, upstream: BareUpstream) -> None:
    await on.all_settled()
    assert on.server.calls_in_flight == 0
    await upstream.all_closed()


# -------------------------------------------------------------------------------------------- cut by the upstream


def _cases() -> Iterator[Any]:
    for endpoint, crlf in product(RECORDINGS, (False, True)):
        for ending, asks in (("closed", True), ("closed", False), ("torn", True)):
            if asks or endpoint != "responses":
                suffix = "" if asks else "-without_usage"
                yield pytest.param(endpoint, crlf, ending, asks, id=f"{endpoint}-{'cr' * crlf}lf-{ending}{suffix}")


def _cuts(answer: Answer, on: Stage) -> list[int]:
    """The positions at which to cut an answer: all of them on SQLite.

    On PostgreSQL every eighth, and those around the end of each event: the database does not see where a stream was
    cut, and all positions on both engines would take 18 s more of one core.
    """
    everywhere = range(len(answer.whole) + 1)
    if on.database.startswith("sqlite"):
        return [*everywhere]
    around_ends = {end + offset for end in answer.ends for offset in (-2, -1, 0, 1)}
    return sorted({*everywhere[::8], *around_ends} & {*everywhere})


@pytest.mark.parametrize(("endpoint", "crlf", "ending", "asks"), [*_cases()])
async def test_a_stream_cut_at_any_byte_is_charged_for_what_passed(
    endpoint: str, crlf: bool, ending: str, asks: bool, tmp_path: Path
) -> None:
    """The client gets the bytes up to the cut, and is charged the texts in them, once.

    `closed` looks like a complete answer, because no header states its length; `torn` ends in the middle of a chunk.
    """
    recording = RECORDINGS[endpoint]
    answer = recording.on_the_wire(crlf=crlf)
    total = len(answer.whole)
    replies: dict[int, Reply] = {}

    async def serve(metadata: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if ending == "closed":
            writer.write(stream_head("Connection: close"))
        else:
            writer.write(stream_head("Transfer-Encoding: chunked") + b"%x\r\n" % total)
        writer.write(answer.whole[: int(metadata["cut"])])

    async with bare_upstream(serve) as upstream, stage(LARGE, folder=tmp_path, upstream=upstream.url) as on:

        async def ask(cut: int) -> None:
            body = recording.request(asks_for_usage=asks, cut=cut)
            replies[cut] = await on.post(recording.path, body)

        cuts = _cuts(answer, on)
        await _for_each(cuts, ask)
        await _check_all_ended(on, upstream)

    calls = await _audited_calls(on)
    assert len(calls) == len(replies) == len(cuts)
    for cut, reply in replies.items():
        call = calls[reply.headers["x-request-id"]]
        sent = answer.whole[:cut]
        whole = answer.whole_events(cut)
        is_torn = ending == "torn" and answer.events[-1] not in whole
        _check_bytes(reply.body, answer, cut, is_torn=is_torn, asks=asks)
        # A response ends with an event that says so. Without it, it is incomplete, however its stream was closed.
        is_unfinished = endpoint == "responses" and answer.events[-1].rstrip() not in sent
        assert call["outcome"] == ("upstream_broke" if is_torn or is_unfinished else "complete"), sent
        passed, has_usage = _read(b"".join(whole) if is_torn else sent)
        counted = (recording.input_counted, passed, "at_least")
        assert _charged(call) == ((INPUT_TOKENS, OUTPUT_TOKENS, "exactly") if has_usage else counted), sent


def _check_bytes(body: bytes, answer: Answer, cut: int, *, is_torn: bool, asks: bool) -> None:
    """After a clean end the client has the same bytes. Else it has the whole events before the end, and the error."""
    if not is_torn:
        assert body == (answer.whole[:cut] if asks else _without_usage(answer, cut))
        return
    passed = b"".join(event for event in answer.whole_events(cut) if b'"usage"' not in event)
    assert body.startswith(passed)
    error = body[len(passed) :]
    assert error.startswith((b"data: ", b"event: error\n"))
    assert b"broke off" in error


def _without_usage(answer: Answer, cut: int) -> bytes:
    """The bytes up to the cut, without the usage event if it is complete: only the proxy asked for it."""
    [usage] = [event for event in answer.events if b'"usage"' in event]
    before, found, after = answer.whole[:cut].partition(usage.rstrip())
    return before + after.lstrip() if found else before


# ---------------------------------------------------------------------------------------------- cut by the client


@pytest.mark.parametrize("on_disconnect", ["stop", "drain"])
@pytest.mark.parametrize("endpoint", RECORDINGS)
async def test_a_client_that_disconnects_after_any_event_is_charged_once(
    endpoint: str, on_disconnect: str, tmp_path: Path
) -> None:
    """`drain` charges the whole answer. `stop` charges what had arrived, or all if only the usage was missing."""
    recording = RECORDINGS[endpoint]
    answer = recording.on_the_wire(crlf=False)
    disconnected = {str(position): asyncio.Event() for position in range(len(answer.events) + 1)}

    def goes_on(position: int) -> bool:
        """Whether the upstream still generates the rest after the client has disconnected."""
        return on_disconnect == "drain" or _is_finished(answer.events[:position])

    async def serve(metadata: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        position = int(metadata["cut"])
        writer.write(stream_head("Connection: close") + b"".join(answer.events[:position]))
        if goes_on(position):
            await disconnected[metadata["cut"]].wait()
            writer.write(b"".join(answer.events[position:]))
        else:
            assert await reader.read() == b""  # sends nothing until the proxy closes the connection

    async with (
        bare_upstream(serve) as upstream,
        stage(LARGE, folder=tmp_path, upstream=upstream.url, on_disconnect=on_disconnect) as on,
    ):
        call_ids: dict[int, str] = {}

        async def disconnect(position: int) -> None:
            body = recording.request(asks_for_usage=True, cut=position)
            # The usage and [DONE] are sent only when the call is settled: this client disconnects before that.
            expected = b"".join(event for event in answer.events[:position] if b'"usage"' not in event)
            call_ids[position] = await _read_and_disconnect(on, recording.path, body, expected.removesuffix(DONE))
            disconnected[str(position)].set()

        await _for_each(range(len(answer.events)), disconnect)
        await _check_all_ended(on, upstream)

    calls = await _audited_calls(on)
    assert len(calls) == len(call_ids)
    for position, call_id in call_ids.items():
        passed, has_usage = _read(b"".join(answer.events[:position]))
        is_exact = goes_on(position) or has_usage
        counted = (recording.input_counted, passed, "at_least")
        expected = (INPUT_TOKENS, OUTPUT_TOKENS, "exactly") if is_exact else counted
        assert _charged(calls[call_id]) == expected, answer.events[:position]
        assert goes_on(position) or calls[call_id]["outcome"] == "client_left"


def _is_finished(events: Iterable[bytes]) -> bool:
    """Whether the text of the answer is complete, so that only its usage can follow."""
    return any(b'"finish_reason"' in event for event in events)


async def _read_and_disconnect(on: Stage, path: str, body: dict[str, Any], expected: bytes) -> str:
    """Read the head and exactly these bytes of a stream, and abort the connection; return the id of the call."""
    sent = {"authorization": f"Bearer {key_of('alice')}"}
    async with on.http.post(on.url + path, json=body, headers=sent) as response:
        assert await response.content.readexactly(len(expected)) == expected
        assert response.connection and response.connection.transport
        response.connection.transport.abort()
        return response.headers["x-request-id"]


# ------------------------------------------------------------------------------------------- a message of Anthropic's

# The first event has the input tokens and the last but one the output tokens, so the input is exact after any cut.
MESSAGE = Recording(
    "/v1/messages",
    {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 100},
    INPUT_TOKENS,
    (
        _event(
            "message_start", message={"content": [], "usage": {"input_tokens": INPUT_TOKENS - 7, "output_tokens": 1}}
        ),
        _event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        _event("ping"),
        *(_event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece}) for piece in PIECES),
        _event("content_block_stop", index=0),
        _event(
            "message_delta",
            delta={"stop_reason": "end_turn"},
            usage={"input_tokens": INPUT_TOKENS - 7, "cache_read_input_tokens": 7, "output_tokens": OUTPUT_TOKENS},
        ),
        _event("message_stop"),
    ),
)


def _charge_of_message(events: Iterable[bytes]) -> tuple[int, int, str]:
    """The charge for these events: the input last reported, and the output reported at the end, else the texts."""
    data = b"".join(events)
    if b"message_delta" in data:
        return INPUT_TOKENS, OUTPUT_TOKENS, "exactly"
    tokens = sum(count for piece, count in PIECES.items() if json.dumps(piece, ensure_ascii=False).encode() in data)
    return INPUT_TOKENS - 7, tokens, "at_least"


@pytest.mark.parametrize("crlf", [False, True], ids=["lf", "crlf"])
@pytest.mark.parametrize("ending", ["closed", "torn"])
async def test_a_message_cut_at_any_event_is_charged_for_what_passed(ending: str, crlf: bool, tmp_path: Path) -> None:
    """The input is the upstream's number from the first event on. The texts that passed are charged once."""
    answer = MESSAGE.on_the_wire(crlf=crlf)
    replies: dict[int, Reply] = {}

    async def serve(metadata: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = b"".join(answer.events[: int(metadata["cut"])])
        if ending == "closed":
            writer.write(stream_head("Connection: close") + sent)
        else:
            writer.write(stream_head("Transfer-Encoding: chunked") + b"%x\r\n" % (len(sent) + 1) + sent)

    async with bare_upstream(serve) as upstream, stage(LARGE, folder=tmp_path, upstream=upstream.url) as on:

        async def ask(cut: int) -> None:
            replies[cut] = await on.post(MESSAGE.path, MESSAGE.request(asks_for_usage=False, cut=cut))

        await _for_each(range(1, len(answer.events) + 1), ask)
        await _check_all_ended(on, upstream)

    calls = await _audited_calls(on)
    assert len(calls) == len(answer.events)
    for cut, reply in replies.items():
        passed = answer.events[:cut]
        is_torn = ending == "torn" and cut < len(answer.events)
        call = calls[reply.headers["x-request-id"]]
        assert _charged(call) == _charge_of_message(passed), passed
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
async def test_a_client_that_disconnects_from_a_message_is_charged_once(on_disconnect: str, tmp_path: Path) -> None:
    """After any event. `drain` charges the whole message; `stop` the reported input and what had arrived."""
    answer = MESSAGE.on_the_wire(crlf=False)
    disconnected = {str(position): asyncio.Event() for position in range(len(answer.events))}

    async def serve(metadata: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        position = int(metadata["cut"])
        writer.write(stream_head("Connection: close") + b"".join(answer.events[:position]))
        if on_disconnect == "drain":
            await disconnected[metadata["cut"]].wait()
            writer.write(b"".join(answer.events[position:]))
        else:
            assert await reader.read() == b""  # sends nothing until the proxy closes the connection

    call_ids: dict[int, str] = {}
    async with (
        bare_upstream(serve) as upstream,
        stage(LARGE, folder=tmp_path, upstream=upstream.url, on_disconnect=on_disconnect) as on,
    ):

        async def disconnect(position: int) -> None:
            shown = b"".join(event for event in answer.events[:position] if b"message_delta" not in event)
            body = MESSAGE.request(asks_for_usage=False, cut=position)
            call_ids[position] = await _read_and_disconnect(on, MESSAGE.path, body, shown)
            disconnected[str(position)].set()

        # Not before the first event, and not after the last two: they are sent only when the call is settled, so a
        # client can't tell that the upstream has sent them.
        await _for_each(range(1, len(answer.events) - 1), disconnect)
        await _check_all_ended(on, upstream)

    calls = await _audited_calls(on)
    for position, call_id in call_ids.items():
        passed = answer.events if on_disconnect == "drain" else answer.events[:position]
        assert _charged(calls[call_id]) == _charge_of_message(passed), position
