"""An upstream that stops without saying so: in each of these ways and phases, the call ends and nothing stays behind.

The upstream is a bare socket. It sends a part of a stream, breaks HTTP in one of the ways, and closes, resets or
keeps the connection. The proxy's limit of a silence is three seconds here: all calls of a test run at once, and on a
busy machine an upstream that is not silent can need one.
"""

import asyncio
import os
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.bare_upstream import connections
from tests.stage import STAFF, Reply, Stage, stage

pytestmark = pytest.mark.journey

SILENCE_S = 3.0
# What a call may take: the silence, and a second for the rest of the body after its last event. The machine is busy.
CALL_S = 20.0
CHAT = "/v1/chat/completions"
LARGE = STAFF.replace("tokens: 1M", "tokens: 100M")

WORD = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"one two"}}]}\n\n'
FINISH = b'data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,"total_tokens":12}}\n\n'
DONE = b"data: [DONE]\n\n"
# The parts of the stream that have been sent when it breaks. "head": not even the whole head.
PHASES: dict[str, tuple[bytes, ...]] = {
    "head": (),
    "after the head": (),
    "after an event": (WORD,),
    "in an event": (WORD, WORD[:40]),
    "after the finish": (WORD, FINISH),
    "after the usage": (WORD, FINISH, USAGE),
    "after the end": (WORD, FINISH, USAGE, DONE),
}


def chunk(data: bytes) -> bytes:
    """One chunk (RFC 9112 §7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass(frozen=True, slots=True)
class Way:
    """How an upstream breaks: header lines of the answer, how it frames its parts, what it sends next, and the end.

    `fin` closes the connection, `half` closes its own direction only, `rst` resets the connection, and `stall` keeps
    it open. `is_complete` says that HTTP is not broken: the body just ends.
    """

    framing: bytes
    frame: Callable[[bytes], bytes]
    next: bytes
    end: Literal["fin", "half", "rst", "stall"]
    is_complete: bool = False


CHUNKED = b"Transfer-Encoding: chunked\r\n"
LONG = b"Content-Length: 100000\r\n"
STRAY = b'{"stray": 1}'
SECOND = b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n" + STRAY
WAYS = {
    # In chunks.
    "closed": Way(CHUNKED, chunk, b"", "fin"),
    "half closed": Way(CHUNKED, chunk, b"", "half"),
    "reset": Way(CHUNKED, chunk, b"", "rst"),
    "silent": Way(CHUNKED, chunk, b"", "stall"),
    "bad size, closed": Way(CHUNKED, chunk, b"zz\r\nxx\r\n", "fin"),
    "bad size, reset": Way(CHUNKED, chunk, b"zz\r\nxx\r\n", "rst"),
    "bad size, silent": Way(CHUNKED, chunk, b"zz\r\nxx\r\n", "stall"),
    "negative size": Way(CHUNKED, chunk, b"-5\r\nabcde\r\n", "stall"),
    "huge size": Way(CHUNKED, chunk, b"fffffffffffffffff\r\nabcde\r\n", "stall"),
    "half a size": Way(CHUNKED, chunk, b"1", "stall"),
    "endless size": Way(CHUNKED, chunk, b"0" * 100_000, "stall"),
    "endless extension": Way(CHUNKED, chunk, b"1;" + b"x" * 100_000, "stall"),
    "half a chunk, closed": Way(CHUNKED, chunk, b"64\r\nabc", "fin"),
    "half a chunk, silent": Way(CHUNKED, chunk, b"64\r\nabc", "stall"),
    "chunk larger than its size": Way(CHUNKED, chunk, b"3\r\nabcdef\r\n", "stall"),
    "chunk without its line end": Way(CHUNKED, chunk, b"3\r\nabc3\r\nabc\r\n", "fin"),
    "zero bytes": Way(CHUNKED, chunk, b"\0" * 50, "stall"),
    "another answer instead of a chunk": Way(CHUNKED, chunk, SECOND, "stall"),
    "last chunk without its end": Way(CHUNKED, chunk, b"0\r\n", "stall"),
    "bad trailer": Way(CHUNKED, chunk, b"0\r\nno\0trailer\r\n\r\n", "stall"),
    "endless trailer": Way(CHUNKED, chunk, b"0\r\n" + b"X-T: 1\r\n" * 10_000, "stall"),
    "last chunk": Way(CHUNKED, chunk, b"0\r\n\r\n", "stall", is_complete=True),
    "garbage after the last chunk": Way(CHUNKED, chunk, b"0\r\n\r\nzz\r\n\r\n", "stall", is_complete=True),
    "another answer after the last chunk": Way(CHUNKED, chunk, b"0\r\n\r\n" + SECOND, "stall", is_complete=True),
    # With a length.
    "length too long, closed": Way(LONG, bytes, b"", "fin"),
    "length too long, reset": Way(LONG, bytes, b"", "rst"),
    "length too long, silent": Way(LONG, bytes, b"", "stall"),
    # Up to the end of the connection.
    "until closed": Way(b"", bytes, b"", "fin", is_complete=True),
    "until reset": Way(b"", bytes, b"", "rst"),
    "until silent": Way(b"", bytes, b"", "stall"),
}


class BreakingUpstream:
    """Serves each request by the way and the phase that its metadata name."""

    def __init__(self) -> None:
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read requests, and answer each with a part of a stream that breaks."""
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            name, phase = (re.findall(rb'"%b":"([^"]*)"' % key, body)[0].decode() for key in (b"way", b"phase"))
            way = WAYS[name]
            answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            writer.write(answer if phase == "head" else answer + way.framing + b"\r\n")
            for part in PHASES[phase]:
                writer.write(way.frame(part))
                # The parts arrive one by one: the library finds an error within a chunk that it has passed on
                # otherwise.
                await writer.drain()
                await asyncio.sleep(0.002)
            writer.write(way.next)
            await writer.drain()
            if way.end == "half":
                writer.write_eof()
            if way.end == "rst":
                reset: socket.socket = writer.get_extra_info("socket")
                reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if way.end in ("fin", "rst"):
                return


@asynccontextmanager
async def breaking(folder: Path, *, silence_s: float = SILENCE_S) -> AsyncIterator[Stage]:
    """A proxy in front of such an upstream."""
    upstream = BreakingUpstream()
    async with connections(upstream.serve) as port:
        url = f"http://127.0.0.1:{port}/v1"
        idle = f", idle_timeout: {silence_s:.0f}s"
        async with stage(LARGE, folder=folder, upstream=url, kind="openai", more=idle) as on:
            yield on


async def ask(on: Stage, way: str, phase: str, **more: Any) -> Reply:
    """Send a call whose upstream breaks in this way."""
    message = {"role": "user", "content": "Hello"}
    body = {"model": "fast", "messages": [message], "stream": True, "metadata": {"way": way, "phase": phase}, **more}
    async with asyncio.timeout(CALL_S):
        return await on.post(CHAT, body)


def check(way: str, phase: str, reply: Reply) -> None:
    """The client learns of the break, unless HTTP says that the answer is complete, or all of it has arrived."""
    if phase == "head":
        assert reply.status in (502, 504), (way, phase, reply.status)
        return
    if phase == "after the head" and reply.status in (502, 504):
        return  # the error arrived together with the head, or this machine was busy for three seconds
    assert reply.status == 200, (way, phase, reply.status)
    is_over = phase == "after the end"
    has_error = b"upstream_error" in reply.body or b"upstream_timeout" in reply.body
    assert has_error is not (WAYS[way].is_complete or is_over), (way, phase, reply.body)
    assert reply.body.endswith(DONE) is is_over
    assert (WORD in reply.body) is (phase != "after the head")


def descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


async def test_a_call_whose_connection_is_gone_ends_at_once(tmp_path: Path) -> None:
    """T39: also if the library's parser found an error before. It does not wait for the limit of a silence."""
    async with breaking(tmp_path, silence_s=600) as on:
        for way in ("bad size, closed", "bad size, silent", "bad size, reset", "reset", "until reset", "zero bytes"):
            check(way, "after an event", await ask(on, way, "after an event"))


@pytest.mark.parametrize("phase", PHASES)
async def test_a_call_ends_however_its_upstream_breaks(phase: str, tmp_path: Path) -> None:
    """T39: in each way, with the text that had arrived charged, or the usage if it had, and nothing held."""
    async with breaking(tmp_path) as on:
        replies = await asyncio.gather(*(ask(on, way, phase) for way in WAYS))
        for way, reply in zip(WAYS, replies, strict=True):
            check(way, phase, reply)
        await asyncio.wait_for(on.all_settled(), CALL_S)
        await on.audit()
        assert on.server.calls_in_flight == 0
        assert (await on.used())[1] == 0
        for row in await on.rows("calls"):
            if phase in ("after the usage", "after the end"):
                assert (row["input_tokens"], row["output_tokens"], row["provenance"]) == (9, 3, "exactly")
            elif phase != "head":
                assert row["outcome"] in ("complete", "upstream_broke")
                assert row["output_tokens"] <= 4


@pytest.mark.slow
async def test_a_thousand_breaks_leave_nothing_behind(tmp_path: Path) -> None:
    """T39: held 0, in flight 0, and as many descriptors as after the first rounds."""
    rounds = [(way, phase) for phase in PHASES for way in WAYS]
    async with breaking(tmp_path) as on:
        open_after = []
        for _ in range(-(-1000 // len(rounds))):
            replies = await asyncio.gather(*(ask(on, way, phase) for way, phase in rounds))
            # On a busy machine any of them may have been silent for too long. No client gets another one's answer.
            assert {reply.status for reply in replies} <= {200, 502, 504}
            assert not any(reply.body == STRAY for reply in replies)
            await asyncio.wait_for(on.all_settled(), CALL_S)
            open_after.append(descriptors())
        assert on.server.calls_in_flight == 0
        assert (await on.used())[1] == 0
        await on.audit()
        assert max(open_after[1:]) <= open_after[0] + 20, open_after
