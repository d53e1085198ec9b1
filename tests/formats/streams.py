"""What the tests of meters and endings share: requests, the events of streams, and ways to feed them.

The true usage of an answer is 11 tokens of input and 5 of output, as in docs/threats.md, "What is charged for strange
usage".
"""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from itertools import pairwise
from typing import Any

from aiohttp import web
from hypothesis import strategies as st
from openai import AsyncOpenAI

from proxy.formats.endpoints import CHAT, METERED, Endpoint, EndpointName
from proxy.formats.meter import JSON, Ending, Meter
from proxy.formats.request import Request, parse_request
from proxy.formats.sse import Splitter
from proxy.formats.surfaces import meter_of
from proxy.policy.amounts import AtLeast, Exactly, Tokens, Usage
from proxy.simulator.directives import Directives
from proxy.simulator.frames import EventStream, write_stream
from proxy.simulator.text import Endpoint as Simulated
from proxy.simulator.text import Generator

HONEST = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
RESPONSE_USAGE = {"input_tokens": 11, "output_tokens": 5, "total_tokens": 16}
ZEROS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
DONE = b"data: [DONE]\n\n"


def request(endpoint: Endpoint = CHAT, **fields: object) -> Request:
    """A streamed request. It does not ask for usage unless `fields` do."""
    return parse_request(endpoint, json.dumps({"model": "m", "stream": True, **fields}).encode())


UNASKED = request()
ASKED = request(stream_options={"include_usage": True})


def count(text: str) -> int:
    """A simple tokenizer: one token for each byte."""
    return len(text.encode("utf-8", "surrogatepass"))


def new(of: Request = UNASKED, *, kind: str = "openai") -> Meter:
    """A new meter."""
    return meter_of(of, count=count, kind=kind)


def watch(
    stream: bytes, of: Request = UNASKED, cuts: list[int] | None = None, *, kind: str = "openai"
) -> tuple[Meter, bytes]:
    """Feed a whole stream, cut at these offsets; return the meter and the bytes for the client."""
    meter, splitter = new(of, kind=kind), Splitter()
    offsets = [0, *sorted(min(cut, len(stream)) for cut in cuts or []), len(stream)]
    shown = b"".join(
        meter.see_event(event) for start, end in pairwise(offsets) for event in splitter.feed(stream[start:end])
    )
    return meter, shown + splitter.end()


def usage_of(stream: bytes, of: Request = UNASKED) -> Usage:
    """The usage of a stream."""
    return watch(stream, of)[0].usage()


def whole(body: bytes | dict, endpoint: Endpoint = CHAT) -> Meter:
    """A meter that has seen this whole answer."""
    meter = new(request(endpoint, stream=False))
    meter.see_whole(body if isinstance(body, bytes) else json.dumps(body).encode())
    return meter


def event(document: object, spaced: bool = False) -> bytes:
    """An event with this JSON, without spaces unless `spaced`."""
    separators = (", ", ": ") if spaced else (",", ":")
    return b"data: " + json.dumps(document, separators=separators, ensure_ascii=spaced).encode() + b"\n\n"


def chunk(content: str | None = None, finish: str | None = None, **more: object) -> dict:
    """A chunk of a chat stream with one choice."""
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **more}


def usage_chunk(usage: object = None, **more: object) -> dict:
    """The chunk that is sent only if usage is requested."""
    return {**chunk(), "choices": [], "usage": HONEST if usage is None else usage, **more}


TEXT = event(chunk("Hello")) + event(chunk(" world!"))  # two chunks, 12 bytes
FINISH = event(chunk(finish="stop"))
COUNTED = AtLeast(Tokens(0, 12))
REPORTED = Exactly(Tokens(11, 5))
UNCOUNTED = AtLeast(Tokens(0, 0))  # a whole answer without usage: the caller counts its texts


def message(content: str, **more: object) -> dict:
    """A choice of a whole chat answer."""
    return {"message": {"role": "assistant", "content": content, **more.pop("members", {})}, **more}


# ------------------------------------------------------------------------------------------- streams that are stopped


USED = Tokens(11, 5, cached=3, reasoning=2)
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
NAMES: dict[Simulated, EndpointName] = {
    Simulated.CHAT: "chat",
    Simulated.COMPLETIONS: "completions",
    Simulated.RESPONSES: "responses",
}
MAXIMUM = {
    Simulated.CHAT: "max_completion_tokens",
    Simulated.COMPLETIONS: "max_tokens",
    Simulated.RESPONSES: "max_output_tokens",
}
GREETING: Any = [{"role": "user", "content": "hello there"}]
# Any JSON.
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)

generator = cache(Generator)


def content_of(endpoint: Simulated) -> Any:
    return GREETING if endpoint is Simulated.CHAT else "hello there"


def simulated(endpoint: Simulated, *, crlf: bool = False, **fields: Any) -> EventStream:
    """An answer of the simulated upstream to a request with these fields."""
    request = {"model": "m", endpoint.input_field: content_of(endpoint), "stream": True, **fields}
    return write_stream(generator(0).answer(endpoint, request, Directives(crlf=crlf)), id="x1", created=7)


def beginning(stream: EventStream, words: int, closing: int = 0) -> bytes:
    """The first bytes of an answer: its opening, `words` of its text events and `closing` of its closing events."""
    return b"".join([*stream.opening, *(event for event, _ in zip(stream.text, range(words), strict=False))]) + (
        b"".join(stream.closing[:closing])
    )


def parsed(raw: bytes) -> list[JSON]:
    """The JSON of each event except `[DONE]`. Every event must be complete, and its name, if any, its type."""
    splitter = Splitter()
    parsed = []
    for event in splitter.feed(raw):
        if event.data != b"[DONE]":
            piece = json.loads(event.data or b"")
            assert event.name in (None, piece.get("type"))
            parsed.append(piece)
    assert splitter.end() == b""
    return parsed


def ending_of(endpoint: EndpointName, passed: Sequence[JSON], *, choices: int = 1) -> Ending:
    """An ending that has recorded these chunks."""
    [of] = [each for each in METERED if each.name == endpoint]
    ending = new(request(of, **({"n": choices} if choices > 1 else {}))).ending
    for chunk in passed:
        ending.see(chunk, json.dumps(chunk).encode())
    return ending


def end_of(
    endpoint: EndpointName,
    passed: Sequence[JSON],
    *,
    choices: int = 1,
    shows_usage: bool = False,
    used: Tokens = USED,
) -> list[JSON]:
    """The chunks that are written after these."""
    return parsed(ending_of(endpoint, passed, choices=choices).at_limit(used, shows_usage=shows_usage))


def stopped(
    endpoint: Simulated, passed: bytes, *, choices: int = 1, shows_usage: bool = False, newline: bytes = b"\n"
) -> bytes:
    """The bytes that a client gets: those that passed, and then the proxy's end."""
    ending = ending_of(NAMES[endpoint], parsed(passed), choices=choices)
    return passed + ending.at_limit(USED, shows_usage=shows_usage, newline=newline)


@asynccontextmanager
async def sdk_reading(body: bytes) -> AsyncIterator[AsyncOpenAI]:
    """The official SDK, connected to a server that answers every request with this stream."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type="text/event-stream")

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        async with AsyncOpenAI(base_url=url, api_key="key", max_retries=0) as sdk:
            yield sdk
    finally:
        await runner.cleanup()
