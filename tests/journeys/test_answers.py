"""Answers of status 200 that are not what they seem.

A stream under another content type, a body that is compressed unasked, and errors that repeat our key.
"""

import asyncio
import gzip
import itertools
import json
import re
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import brotli
import pytest
from backports import zstd

from tests.bare_upstream import connections
from tests.stage import STAFF, UPSTREAM_KEY, Reply, Stage, key_of, stage

pytestmark = pytest.mark.journey

CHAT = "/v1/chat/completions"
HELLO: Any = [{"role": "user", "content": "Hello"}]
POLICY = STAFF.replace("models:\n", "models:\n  voice: {upstream: simulated, model: gpt-4o-mini-tts}\n")
# Calls to `fast` go to `broken` first, and to the simulator if that fails.
TWO = """
  broken: {{base_url: "{broken}", kind: simulator}}
models:
  fast:
    upstreams: [{{upstream: broken}}, {{upstream: simulated, model: gpt-4o-mini, weight: 0}}]
    max_output_tokens: 100
groups:
  staff: {{quotas: {{daily: {{tokens: 1M, requests: 100k, per: day}}}}}}
users:
  alice: {{groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}}
"""

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
CHUNK = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"one two"}}]}\n\n'
FINISH = b'data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE_CHUNK = b'data: {"id":"c","choices":[],"usage":%b}\n\n' % json.dumps(USAGE).encode()
DONE = b"data: [DONE]\n\n"
CHAT_STREAM = CHUNK + FINISH + USAGE_CHUNK + DONE
WHOLE = json.dumps({"id": "c", "choices": [{"message": {"content": "one two"}}], "usage": USAGE}).encode()


def event(members: dict[str, Any]) -> bytes:
    """One typed event of a stream."""
    return f"event: {members['type']}\ndata: {json.dumps(members)}\n\n".encode()


RESPONSE = {"id": "resp_1", "output": [], "usage": {"input_tokens": 9, "output_tokens": 3}}
# For each surface: path, body of the request, a stream that states 9 + 3 tokens, kind of the upstream.
SURFACES: dict[str, tuple[str, dict[str, Any], bytes]] = {
    "chat": (CHAT, {"messages": HELLO}, CHAT_STREAM),
    "completions": ("/v1/completions", {"prompt": "Hello"}, CHAT_STREAM.replace(b'"delta":{', b'"text":"",  "x":{')),
    "responses": (
        "/v1/responses",
        {"input": "Hello"},
        event({"type": "response.output_text.delta", "delta": "one"})
        + event({"type": "response.completed", "response": RESPONSE}),
    ),
    "messages": (
        "/v1/messages",
        {"messages": HELLO, "max_tokens": 20},
        event({"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 1}}})
        + event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "one"}})
        + event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}})
        + event({"type": "message_stop"}),
    ),
    "speech": (
        "/v1/audio/speech",
        {"model": "voice", "input": "Hello", "voice": "alloy", "stream_format": "sse"},
        event({"type": "speech.audio.delta", "audio": "QQ=="})
        + event({"type": "speech.audio.done", "usage": {"input_tokens": 9, "output_tokens": 3}}),
    ),
}


def head(*lines: str, status: int = 200) -> bytes:
    """The head of an answer whose body ends with the connection."""
    return "\r\n".join((f"HTTP/1.1 {status} X", *lines, "Connection: close", "", "")).encode()


def typed(content_type: str) -> bytes:
    """The head of an answer of this content type."""
    return head(f"Content-Type: {content_type}")


@dataclass(slots=True)
class Fixed:
    """An upstream that sends these pieces to each request, and that waits before each of the `gates`."""

    pieces: Sequence[bytes]
    url: str = ""
    received: int = 0
    gates: dict[int, asyncio.Event] = field(default_factory=dict)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        request = await reader.readuntil(b"\r\n\r\n")
        length = int(request.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        await reader.readexactly(length)
        self.received += 1
        for index, piece in enumerate(self.pieces):
            if gate := self.gates.get(index):
                await gate.wait()
            writer.write(piece)
            await writer.drain()


@asynccontextmanager
async def fixed(*pieces: bytes) -> AsyncIterator[Fixed]:
    """Start such an upstream."""
    upstream = Fixed(pieces)
    async with connections(upstream.serve) as port:
        upstream.url = f"http://127.0.0.1:{port}/v1"
        yield upstream


@asynccontextmanager
async def behind(
    upstream: Fixed, folder: Path, *, surface: str = "chat", policy: str = POLICY
) -> AsyncIterator[Stage]:
    """A proxy in front of it."""
    kind = "anthropic" if surface == "messages" else "openai"
    async with stage(policy, folder=folder, upstream=upstream.url, kind=kind) as on:
        yield on


async def ask(on: Stage, surface: str = "chat", **more: Any) -> Reply:
    """Send the request of a surface."""
    path, body, _ = SURFACES[surface]
    streams = {} if surface == "speech" else {"stream": True}
    return await on.post(path, {"model": "fast", **streams, **body, **more})


async def record(on: Stage) -> tuple[Any, ...]:
    """Outcome, tokens of input and of output, and provenance of the only call. Nothing may be held."""
    await on.all_settled()
    await on.audit()
    [row] = await on.rows("calls")
    assert (await on.used())[1] == 0
    return row["outcome"], row["input_tokens"], row["output_tokens"], row["provenance"]


# -------------------------------------------------------------------------------- a stream under another content type


@pytest.mark.parametrize("content_type", ["text/plain", "application/octet-stream", "application/json", "audio/mpeg"])
@pytest.mark.parametrize("surface", SURFACES)
async def test_a_stream_is_one_whatever_its_content_type(surface: str, content_type: str, tmp_path: Path) -> None:
    """T44: its events pass as they come, its usage is charged, and what only the proxy asked for does not pass."""
    stream = SURFACES[surface][2]
    first = stream.index(b"\n\n") + 2
    async with fixed(typed(content_type), stream[:first], stream[first:]) as upstream:
        gate = upstream.gates[2] = asyncio.Event()
        async with behind(upstream, tmp_path, surface=surface) as on:
            path, body, _ = SURFACES[surface]
            streams = {} if surface == "speech" else {"stream": True}
            sent = {"model": "fast", **streams, **body}
            headers = {"authorization": f"Bearer {key_of('alice')}"}
            async with on.http.post(on.url + path, json=sent, headers=headers) as response:
                assert response.headers["content-type"] == "text/event-stream"
                assert response.headers["x-accel-buffering"] == "no"
                assert await response.content.readexactly(first) == stream[:first]
                gate.set()
                rest = await response.read()
            assert rest == stream[first:].replace(USAGE_CHUNK, b"")
            assert await record(on) == ("complete", 9, 3, "exactly")


@pytest.mark.parametrize(
    "stream",
    [
        b"\xef\xbb\xbf" + CHAT_STREAM,
        b"\n\r\n" + CHAT_STREAM,
        b": waiting\n\n: waiting\n\n" + CHAT_STREAM,
        CHAT_STREAM.replace(b"data: {", b"id: 1\ndata: {"),
        b"retry: 3000\n\n" + CHAT_STREAM,
        b"event\n" + CHAT_STREAM,
        b" \n" + CHAT_STREAM,
        b"x: 1\n" + CHAT_STREAM,
        CHAT_STREAM.replace(b"\n", b"\r\n"),
        CHAT_STREAM.replace(b"\n", b"\r"),
    ],
    ids=["bom", "blank", "comments", "id", "retry", "no colon", "a blank", "another field", "crlf", "cr"],
)
async def test_a_stream_is_recognized_by_its_first_line(stream: bytes, tmp_path: Path) -> None:
    """It may begin with anything that the grammar of streams allows, and arrive byte by byte."""
    pieces = [stream[at : at + 1] for at in range(12)] + [stream[12:]]
    async with fixed(typed("text/plain"), *pieces) as upstream, behind(upstream, tmp_path) as on:
        reply = await ask(on)
        assert b'"usage"' not in reply.body
        assert reply.body.startswith(stream[: stream.index(b"data: ") + 4])
        assert await record(on) == ("complete", 9, 3, "exactly")


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "text/event-stream"])
@pytest.mark.parametrize("surface", ["chat", "responses", "messages"])
async def test_a_stream_that_was_not_asked_for_is_measured_as_one(
    surface: str, content_type: str, tmp_path: Path
) -> None:
    """Its first bytes decide here too. Nothing is removed, because the proxy asked for nothing."""
    stream = SURFACES[surface][2]
    async with (
        fixed(typed(content_type), stream[:3], stream[3:]) as upstream,
        behind(upstream, tmp_path, surface=surface) as on,
    ):
        path, body, _ = SURFACES[surface]
        reply = await on.post(path, {"model": "fast", **body})
        assert (reply.headers["content-type"], reply.body) == ("text/event-stream", stream)
        assert await record(on) == ("complete", 9, 3, "exactly")


async def test_an_answer_that_broke_off_after_many_blank_lines_is_counted_by_its_text(tmp_path: Path) -> None:
    """Servers write blank lines while they are busy."""
    body = b"\n" * 400 + WHOLE[: WHOLE.index(b'"usage"')]
    async with fixed(typed("application/json"), body) as upstream, behind(upstream, tmp_path) as on:
        await ask(on, stream=False)
        assert (await record(on))[2] == 2


@pytest.mark.parametrize("of", ["responses", "messages", "chat"])
@pytest.mark.parametrize("surface", ["chat", "responses", "messages"])
async def test_a_stream_in_the_shape_of_another_surface_ends_at_the_limit(
    surface: str, of: str, tmp_path: Path
) -> None:
    """Its words are counted as they pass, as those of the surface itself are."""
    events: dict[str, dict[str, Any]] = {
        "chat": {"id": "c", "choices": [{"index": 0, "delta": {"content": " word"}}]},
        "responses": {"type": "response.output_text.delta", "item_id": "m", "delta": " word"},
        "messages": {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": " word"}},
    }
    policy = POLICY.replace("tokens: 1M", "tokens: 2500").replace("max_output_tokens: 100", "max_output_tokens: 4000")
    raw = b"data: " + json.dumps(events[of]).encode() + b"\n\n"
    async with (
        fixed(typed("text/event-stream"), raw * 20_000) as upstream,
        behind(upstream, tmp_path, policy=policy, surface=surface) as on,
    ):
        path, body, _ = SURFACES[surface]
        maximum = "max_output_tokens" if surface == "responses" else "max_tokens"
        reply = await on.post(path, {"model": "gpt-4o-mini", "stream": True, **body, maximum: 4000})
        assert 2400 < reply.body.count(raw) <= 2 * 2500 + 64  # the upstream is expected to keep to its maximum
        outcome, input_, output, _ = await record(on)
        assert (outcome, input_ + output <= 2500, output > 1000) == ("at_limit", True, True)


@pytest.mark.parametrize("body", [WHOLE, b"\n\n  " + WHOLE], ids=["json", "whitespace before"])
async def test_a_whole_answer_is_none_although_its_header_says_stream(body: bytes, tmp_path: Path) -> None:
    """It is measured as a whole, and its last byte is sent when it is settled."""
    async with fixed(typed("text/event-stream"), body[:1], body[1:]) as upstream, behind(upstream, tmp_path) as on:
        reply = await ask(on)
        assert (reply.status, reply.headers["content-type"], reply.body) == (200, "text/event-stream", body)
        assert await record(on) == ("complete", 9, 3, "exactly")


async def test_a_whole_answer_that_was_asked_for_is_sent_as_one(tmp_path: Path) -> None:
    """Without `stream`, an answer in JSON gets the content type of JSON."""
    async with fixed(typed("text/event-stream"), WHOLE) as upstream, behind(upstream, tmp_path) as on:
        reply = await ask(on, stream=False)
        assert (reply.status, reply.headers["content-type"], reply.body) == (200, "application/json", WHOLE)
        assert await record(on) == ("complete", 9, 3, "exactly")


async def test_a_whole_answer_under_the_header_of_a_stream_is_held(tmp_path: Path) -> None:
    """It does not pass if the quota has no room for it: the client gets an error event."""
    large = WHOLE.replace(b"one two", b"word " * 3000).replace(b'"usage"', b'"used"')
    policy = POLICY.replace("tokens: 1M", "tokens: 1500").replace("max_output_tokens: 100", "max_output_tokens: 4000")
    async with (
        fixed(typed("text/event-stream"), large) as upstream,
        behind(upstream, tmp_path, policy=policy) as on,
    ):
        reply = await ask(on, model="gpt-4o-mini")
        assert b"no room for it. Send the request without `stream`, or with a smaller maximum." in reply.body
        assert b"word" not in reply.body
        assert (await record(on))[0] == "at_limit"


async def test_the_head_of_a_stream_is_sent_before_its_first_byte(tmp_path: Path) -> None:
    """A model that reasons for minutes has sent its header, and the client waits no longer for it."""
    async with fixed(typed("text/event-stream"), CHAT_STREAM) as upstream:
        gate = upstream.gates[1] = asyncio.Event()
        async with behind(upstream, tmp_path) as on:
            headers = {"authorization": f"Bearer {key_of('alice')}"}
            sent = {"model": "fast", "messages": HELLO, "stream": True}
            async with on.http.post(on.url + CHAT, json=sent, headers=headers) as response:
                assert response.status == 200
                gate.set()
                assert (await response.read()).endswith(DONE)


@pytest.mark.parametrize("content_type", ["text/event-stream", "text/plain"])
@pytest.mark.parametrize("body", [b"", b"\n", b"dat"], ids=["empty", "blank", "half a name"])
async def test_an_answer_without_a_first_line_ends(body: bytes, content_type: str, tmp_path: Path) -> None:
    """Then the header decides. The input is charged, because the call ran."""
    async with fixed(typed(content_type), body) as upstream, behind(upstream, tmp_path) as on:
        assert (await ask(on)).body == body
        assert (await record(on))[2] <= 1


# ---------------------------------------------------------------------------------------- compressed although unasked


def raw_deflate(body: bytes) -> bytes:
    """Deflate without the header of zlib."""
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(body) + compressor.flush()


def members(body: bytes) -> bytes:
    """Two members of gzip in a row."""
    return gzip.compress(body[:20]) + gzip.compress(body[20:])


COMPRESSED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("Content-Encoding: gzip", gzip.compress),
    "x-gzip": ("content-encoding: X-GZIP", gzip.compress),
    "zlib": ("Content-Encoding: deflate", zlib.compress),
    "raw deflate": ("Content-Encoding: deflate", raw_deflate),
    "members": ("Content-Encoding: identity, gzip", members),
    "br": ("Content-Encoding: br", brotli.compress),
    "zstd": ("Content-Encoding: zstd", zstd.compress),
}


@pytest.mark.parametrize("encoding", COMPRESSED)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_compressed_answer_is_unpacked(stream: bool, encoding: str, tmp_path: Path) -> None:
    """T44: the client gets what it would have got otherwise, without a Content-Encoding, and the usage is charged."""
    line, compress = COMPRESSED[encoding]
    body = CHAT_STREAM if stream else WHOLE
    content_type = "text/plain" if stream else "application/json"
    packed = compress(body)
    async with (
        fixed(head(f"Content-Type: {content_type}", line), packed[:5], packed[5:]) as upstream,
        behind(upstream, tmp_path) as on,
    ):
        reply = await ask(on, stream=stream)
        assert reply.status == 200
        assert "content-encoding" not in reply.headers
        assert reply.body == body.replace(USAGE_CHUNK, b"")
        assert await record(on) == ("complete", 9, 3, "exactly")


def flushed(encoding: str, first: bytes, rest: bytes) -> tuple[bytes, bytes]:
    """A body in two parts, of which the first was flushed by the server."""
    if encoding == "br":
        packer = brotli.Compressor()
        return packer.process(first) + packer.flush(), packer.process(rest) + packer.finish()
    if encoding == "zstd":
        frame = zstd.ZstdCompressor()
        return frame.compress(first, frame.FLUSH_BLOCK), frame.compress(rest, frame.FLUSH_FRAME)
    gzip_ = zlib.compressobj(wbits=31)
    begun = gzip_.compress(first) + gzip_.flush(zlib.Z_SYNC_FLUSH)
    return begun, gzip_.compress(rest) + gzip_.flush()


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd"])
async def test_events_of_a_compressed_stream_pass_as_they_arrive(encoding: str, tmp_path: Path) -> None:
    """What the upstream has flushed is not kept back."""
    first, rest = flushed(encoding, CHUNK, FINISH + USAGE_CHUNK + DONE)
    lines = ("Content-Type: text/event-stream", f"Content-Encoding: {encoding}")
    async with fixed(head(*lines), first, rest) as upstream:
        gate = upstream.gates[2] = asyncio.Event()
        async with behind(upstream, tmp_path) as on:
            headers = {"authorization": f"Bearer {key_of('alice')}"}
            sent = {"model": "fast", "messages": HELLO, "stream": True}
            async with on.http.post(on.url + CHAT, json=sent, headers=headers) as response:
                assert await response.content.readexactly(len(CHUNK)) == CHUNK
                gate.set()
                assert await response.read() == FINISH + DONE


@pytest.mark.parametrize(
    "packed",
    [gzip.compress(WHOLE)[:-9], gzip.compress(WHOLE)[:9], gzip.compress(WHOLE) + b"x"],
    ids=["cut", "cut head", "more"],
)
async def test_an_answer_that_cannot_be_unpacked_broke_off(packed: bytes, tmp_path: Path) -> None:
    """The call ran, so its input is charged."""
    async with fixed(head("Content-Encoding: gzip"), packed) as upstream, behind(upstream, tmp_path) as on:
        reply = await ask(on, stream=False)
        assert (reply.status, reply.error["code"]) == (502, "upstream_error")
        assert (await record(on))[0] == "upstream_broke"


@pytest.mark.parametrize("status", [400, 500])
async def test_a_compressed_error_is_unpacked(status: int, tmp_path: Path) -> None:
    """Its message helps the user."""
    body = gzip.compress(b'{"error": {"message": "no such voice", "type": "t", "param": null, "code": null}}')
    answer = head("Content-Type: application/json", "Content-Encoding: gzip", status=status)
    async with fixed(answer, body) as upstream, behind(upstream, tmp_path) as on:
        reply = await ask(on)
        assert (reply.status, reply.error["message"]) == (status, "no such voice")


@pytest.mark.parametrize("line", ["compress", "made-up", "gzip, gzip", "deflate\r\nContent-Encoding: gzip"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_an_unknown_encoding_is_free_and_another_upstream_is_asked(
    stream: bool, line: str, tmp_path: Path
) -> None:
    """Nobody can read the answer. The upstream is not asked a second time: it would charge the operator again."""
    answer = head("Content-Type: text/event-stream", f"Content-Encoding: {line}")
    async with fixed(answer, b"xx") as upstream:
        async with behind(upstream, tmp_path) as on:
            reply = await ask(on, stream=stream)
            assert (reply.status, reply.error["code"]) == (502, "upstream_unreadable")
            assert "compressed its answer" in reply.error["message"]
            assert await record(on) == ("upstream_failed", None, None, None)
            assert upstream.received == 1
        await check_another_is_asked(upstream, tmp_path, stream=stream)


async def check_another_is_asked(upstream: Fixed, tmp_path: Path, *, stream: bool) -> None:
    """The same answer, from the first of two upstreams."""
    (tmp_path / "two").mkdir()
    received = upstream.received
    async with stage(TWO.format(broken=upstream.url), folder=tmp_path / "two") as on:
        reply = await ask(on, stream=stream, metadata={"simulate": "tokens=5"})
        assert reply.status == 200
        outcome, _, output, provenance = await record(on)
        assert (outcome, output, provenance) == ("complete", 5, "exactly")
        assert upstream.received == received + 1


NOT_COMPRESSED = {
    "whole": ("gzip", WHOLE),
    "stream": ("x-gzip", CHAT_STREAM),
    "deflate": ("deflate", WHOLE),
    "deflated stream": ("deflate", CHAT_STREAM),
    "other": ("gzip", zlib.compress(WHOLE)),
    "raw": ("gzip", raw_deflate(WHOLE)),
    "gzip": ("deflate", gzip.compress(WHOLE)),
    "head only": ("gzip", gzip.compress(WHOLE)[:10] + b"\xff" * 99),
    "zeros": ("gzip", b"\0" * 20),
}


@pytest.mark.parametrize("name", NOT_COMPRESSED)
@pytest.mark.parametrize("stream", [False, True], ids=["asked whole", "asked stream"])
async def test_a_body_that_is_not_in_its_encoding_is_like_an_unknown_one(
    stream: bool, name: str, tmp_path: Path
) -> None:
    """T44: nothing of it can be read, so it is free and the next upstream is asked."""
    encoding, body = NOT_COMPRESSED[name]
    answer = head("Content-Type: text/event-stream", f"Content-Encoding: {encoding}")
    async with fixed(answer, body) as upstream:
        async with behind(upstream, tmp_path) as on:
            reply = await ask(on, stream=stream)
            assert (reply.status, reply.error["code"]) == (502, "upstream_unreadable")
            assert "compression that it did not use" in reply.error["message"]
            assert await record(on) == ("upstream_failed", None, None, None)
        await check_another_is_asked(upstream, tmp_path, stream=stream)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_zeros_after_a_compressed_answer_are_ignored(stream: bool, tmp_path: Path) -> None:
    """T44: in the same piece and in further ones."""
    body = CHAT_STREAM if stream else WHOLE
    pieces = (gzip.compress(body) + b"\0" * 99, b"\0" * 999)
    async with fixed(head("Content-Encoding: gzip"), *pieces) as upstream, behind(upstream, tmp_path) as on:
        reply = await ask(on, stream=stream)
        assert (reply.status, reply.body) == (200, body.replace(USAGE_CHUNK, b""))
        assert await record(on) == ("complete", 9, 3, "exactly")


@pytest.mark.parametrize("named", ["none", "utf-8", "UTF-8", "identity", "", "aws-chunked", "8bit", "identity, none"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_content_encoding_that_names_no_compression_is_ignored(
    stream: bool, named: str, tmp_path: Path
) -> None:
    """T44: the body is plain."""
    body = CHAT_STREAM if stream else WHOLE
    async with (
        fixed(head("Content-Type: text/event-stream", f"Content-Encoding: {named}"), body) as upstream,
        behind(upstream, tmp_path) as on,
    ):
        reply = await ask(on, stream=stream)
        assert (reply.status, reply.body) == (200, body.replace(USAGE_CHUNK, b""))
        assert "content-encoding" not in reply.headers
        assert await record(on) == ("complete", 9, 3, "exactly")


async def test_the_status_of_an_error_is_enough_if_its_encoding_is_unknown(tmp_path: Path) -> None:
    """The message can't be shown, but what the status says holds."""
    async with fixed(head("Content-Encoding: lzma", status=400), b"xx") as upstream, behind(upstream, tmp_path) as on:
        reply = await ask(on)
        assert (reply.status, reply.error["message"]) == (400, "The upstream refused the request with status 400.")
        assert (await record(on))[0] == "rejected"


# ---------------------------------------------------------------------------------------- errors that repeat our key

ESCAPED_KEY = "".join(f"\\u{ord(letter):04x}" for letter in UPSTREAM_KEY)
ACCOUNT = "org-AbCdEf0123456789"
FORMS = {
    "error": '{"error":{"message":"%s","code":null}}',
    "text": '{"error":"%s"}',
    "typed": '{"type":"error","code":null,"message":"%s"}',
    "failed": '{"type":"response.failed","response":{"id":"resp_1","error":{"message":"%s"}}}',
    "choice": '{"choices":[{"index":0,"delta":{"content":""},"error":{"message":"%s"},"finish_reason":"error"}]}',
    "detail": '{"detail":"%s"}',
    "list": '[{"error":{"message":"%s"}}]',
    "plain": "Incorrect API key: %s",
    "broken": '{"error":{"message":"%s',
}


def shown_key(body: bytes) -> bool:
    """Whether a client can read our key or our account in these bytes."""
    plain = re.sub(rb"\\u00(..)", lambda escape: bytes.fromhex(escape[1].decode()), body).decode()
    return UPSTREAM_KEY[:12] in plain or ACCOUNT in plain


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("surface", SURFACES)
async def test_an_error_in_a_stream_shows_neither_key_nor_account(surface: str, form: str, tmp_path: Path) -> None:
    """T9: in every form and on every surface, at the beginning, in the middle and at a cut end, escaped or not."""
    first = SURFACES[surface][2].partition(b"\n\n")[0] + b"\n\n"
    async with fixed() as upstream, behind(upstream, tmp_path, surface=surface) as on:
        for secret in (UPSTREAM_KEY, ESCAPED_KEY, ACCOUNT):
            error = b"data: " + (FORMS[form] % secret).encode()
            for stream in (first + error + b"\n\n", error + b"\n\n", first + error, first + error[:-8]):
                upstream.pieces = (typed("text/event-stream"), stream)
                reply = await ask(on, surface)
                assert reply.status == 200
                assert not shown_key(reply.body), stream
                assert b"***" in reply.body or stream.endswith(error[:-8])


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("typed", "plain", "broken")])
@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("content_type", ["application/json", "text/event-stream"])
async def test_a_whole_error_shows_neither_key_nor_account(
    surface: str, form: str, content_type: str, tmp_path: Path
) -> None:
    """T9: whether a whole answer was requested or a stream."""
    async with fixed() as upstream, behind(upstream, tmp_path, surface=surface) as on:
        for secret, stream in ((UPSTREAM_KEY, False), (ESCAPED_KEY, True), (ACCOUNT, False)):
            upstream.pieces = (typed(content_type), (FORMS[form] % secret).encode())
            reply = await ask(on, surface, **({} if surface == "speech" else {"stream": stream}))
            assert reply.status == 200
            assert not shown_key(reply.body)
            assert b"***" in reply.body


@pytest.mark.parametrize("form", ["error", "text", "failed"])
async def test_reading_a_response_shows_neither_key_nor_account(form: str, tmp_path: Path) -> None:
    """T9: an upstream may store or report a failure with our key in it."""
    created = WHOLE.replace(b'"c"', b'"resp_1"')
    async with (
        fixed(typed("application/json"), created) as upstream,
        behind(upstream, tmp_path, surface="responses") as on,
    ):
        assert (await ask(on, "responses", stream=False)).status == 200
        for secret, content_type in ((UPSTREAM_KEY, "application/json"), (ESCAPED_KEY, "text/event-stream")):
            error = (FORMS[form] % secret).encode()
            error = b"data: %b\n\n" % error if content_type == "text/event-stream" else error
            upstream.pieces = (typed(content_type), error[:50], error[50:])
            reply = await on.get("/v1/responses/resp_1")
            assert reply.status == 200
            assert not shown_key(reply.body)
            assert b"***" in reply.body


# Forms of an error that no list of errors names, and answers that are no error at all. Each has the key somewhere.
NESTED_KEY = UPSTREAM_KEY.replace("-", "\\\\u002d")
UNLISTED = {
    "x_groq": '{"choices":[{"index":0,"delta":{}}],"x_groq":{"error":"%s"}}',
    "delta": '{"choices":[{"index":0,"delta":{"error":"%s"}}]}',
    "message": '{"choices":[{"index":0,"message":{"error":"%s"}}]}',
    "beside": '{"choices":[{"index":0,"delta":{"content":"x"}}],"detail":"%s"}',
    "native": '{"choices":[{"index":0,"delta":{"content":"%s"},"native_finish_reason":"error"}]}',
    "upper": '{"choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":"ERROR"}]}',
    "MiniMax": '{"choices":null,"base_resp":{"status_code":1004,"status_msg":"%s"}}',
    "Baidu": '{"error_code":110,"error_msg":"%s"}',
    "msg": '{"code":401,"msg":"%s"}',
    "fault": '{"fault":{"faultstring":"%s"}}',
    "exception": '{"exception":"%s","Error":"%s","errorMessage":"%s"}',
    "problem": '{"title":"%s","status":401}',
    "object": '{"message":{"text":"%s"}}',
    "messages": '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"","error":"%s"}}',
    "tool": '{"type":"content_block_start","index":0,"content_block":{"type":"web_search_tool_result",'
    '"content":{"type":"web_search_tool_result_error","error_code":"%s"}}}',
    "incomplete": '{"type":"response.incomplete","response":{"incomplete_details":{"reason":"%s"}}}',
    "completed": '{"type":"response.completed","response":{"id":"r","status":"failed","status_details":"%s"}}',
    "name": '{"choices":[],"%s":1}',
    "HTML": "<html><body>bad key %s</body></html>",
    "text": "bad key %s",
}
LINES = {
    "error line": 'error: {"code":401,"message":"%s"}',
    "HTML": "<html><body>bad key %s</body></html>",
    "text": "bad key %s",
    "comment": ": bad key %s",
    "name": "event: Error\nid: %s",
    "Error": 'event: Error\ndata: {"m":"%s"}',
    "retry": "retry: %s",
}


def with_secret(form: str, secret: str) -> bytes:
    """The form with the secret in each of its places."""
    return form.replace("%s", secret).encode()


def readable(body: bytes) -> bytes:
    """The bytes with all escapes undone, however often they were escaped."""
    return re.sub(rb"\\+u00(..)", lambda escape: bytes.fromhex(escape[1].decode()), body).replace(b"\\/", b"/")


@pytest.mark.parametrize("surface", SURFACES)
async def test_no_part_of_a_stream_shows_the_key(surface: str, tmp_path: Path) -> None:
    """T9: whatever it is, at the beginning, after the first event, and at a cut end."""
    first = SURFACES[surface][2].partition(b"\n\n")[0] + b"\n\n"
    async with fixed() as upstream, behind(upstream, tmp_path, surface=surface) as on:
        for line in (*LINES.values(), *("data: " + form for form in UNLISTED.values())):
            for secret, at in ((UPSTREAM_KEY, 0), (UPSTREAM_KEY, 1), (ESCAPED_KEY, 0), (NESTED_KEY, 1)):
                part = with_secret(line, secret) + b"\n\n"
                stream = (first + part, part + first)[at].rstrip()
                upstream.pieces = (typed("text/event-stream"), stream)
                reply = await ask(on, surface)
                assert reply.status == 200
                assert UPSTREAM_KEY.encode() not in readable(reply.body), stream


@pytest.mark.parametrize("surface", SURFACES)
async def test_no_whole_answer_shows_the_key(surface: str, tmp_path: Path) -> None:
    """T9: whether a whole answer was requested or a stream, and whatever its content type."""
    types = itertools.cycle(("application/json", "text/event-stream", "text/html", "text/plain", "audio/mpeg"))
    async with fixed() as upstream, behind(upstream, tmp_path, surface=surface) as on:
        for form in UNLISTED.values():
            for secret, stream in ((UPSTREAM_KEY, False), (ESCAPED_KEY, True), (NESTED_KEY, False)):
                upstream.pieces = (typed(next(types)), with_secret(form, secret))
                reply = await ask(on, surface, **({} if surface == "speech" else {"stream": stream}))
                assert reply.status == 200
                assert UPSTREAM_KEY.encode() not in readable(reply.body)


async def test_no_stored_response_shows_the_key(tmp_path: Path) -> None:
    """T9: wherever its pieces are cut."""
    created = WHOLE.replace(b'"c"', b'"resp_1"')
    async with (
        fixed(typed("application/json"), created) as upstream,
        behind(upstream, tmp_path, surface="responses") as on,
    ):
        assert (await ask(on, "responses", stream=False)).status == 200
        forms = [*UNLISTED.values(), '{"detail":"%s"}']
        for form, secret in itertools.product(forms, (UPSTREAM_KEY, NESTED_KEY)):
            body = with_secret(form, secret)
            middle = body.index(b"upstream")
            upstream.pieces = (typed("text/html"), body[:middle], body[middle:])
            reply = await on.get("/v1/responses/resp_1")
            assert reply.status == 200
            assert UPSTREAM_KEY.encode() not in readable(reply.body)
            assert b"***" in reply.body


@pytest.mark.parametrize("name", ["openai-version", "x-request-id", "content-language", "content-type"])
async def test_no_header_shows_the_key(name: str, tmp_path: Path) -> None:
    """T9: of a whole answer and of a stream."""
    for stream, body in ((False, WHOLE), (True, CHAT_STREAM)):
        folder = tmp_path / str(stream)
        folder.mkdir()
        async with (
            fixed(head(f"{name}: text/x; {UPSTREAM_KEY}"), body) as upstream,
            behind(upstream, folder) as on,
        ):
            reply = await ask(on, stream=stream)
            assert reply.status == 200
            assert UPSTREAM_KEY not in str(reply.headers)


async def test_the_end_at_a_limit_does_not_show_the_key(tmp_path: Path) -> None:
    """T9: the proxy writes that end itself, with the id and model of the events that passed."""
    choice = {"index": 0, "delta": {"content": "word " * 40}}
    chunk = json.dumps({"id": UPSTREAM_KEY, "model": UPSTREAM_KEY, "choices": [choice]})
    policy = POLICY.replace("tokens: 1M", "tokens: 150")
    async with (
        fixed(typed("text/event-stream"), *[f"data: {chunk}\n\n".encode()] * 9) as upstream,
        behind(upstream, tmp_path, policy=policy) as on,
    ):
        reply = await ask(on)
        assert b'"length"' in reply.body
        assert UPSTREAM_KEY.encode() not in reply.body
