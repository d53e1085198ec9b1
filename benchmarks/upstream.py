"""The command `python -m benchmarks.upstream PORT TOKENS_PER_S TOKENS`: the upstream of streams.

It parses as little as possible and writes prepared bytes, so it leaves more of the processor to the server that is
measured than the simulator would. On the wire it is like OpenAI: each event is one chunk of the transfer coding, each
token is one event, and each event has `"usage": null` if usage was requested. The proxy requests it and removes it.
"""

import asyncio
import re
import sys
from functools import partial
from typing import cast

import orjson
import uvloop

_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"x-request-id: req_0123456789abcdef\r\nopenai-processing-ms: 9\r\ntransfer-encoding: chunked\r\n\r\n"
)
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class Events:
    """The events of an answer, each as a chunk of the transfer coding."""

    def __init__(self, *, with_usage: bool) -> None:
        null: dict[str, object] = {"usage": None} if with_usage else {}
        self.token = _event([_choice({"content": " token"}, None)], **null)
        end = _event([_choice({}, "length")], **null)
        if with_usage:
            end += _event([], usage={"prompt_tokens": 20, "completion_tokens": 30, "total_tokens": 50})
        self.end = end + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Upstream(asyncio.Protocol):
    """One connection: reads a request, streams the answer at the given speed, and waits for the next request."""

    def __init__(self, tokens_per_s: float, tokens: int, *, plain: Events, with_usage: Events) -> None:
        self._plain, self._with_usage = plain, with_usage
        self._pause_s = 1 / tokens_per_s
        self._tokens = tokens
        self._left = 0
        self._received = b""
        self._answer = plain
        self._next: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._next is not None:
            self._next.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not blank or length is None or len(body) < int(length[1]):
            return
        self._received = b""
        self._answer = self._with_usage if b'"include_usage":true' in body else self._plain
        self._left = self._tokens
        self._transport.write(_HEAD)
        self._write()

    def _write(self) -> None:
        if self._left:
            self._left -= 1
            self._transport.write(self._answer.token)
            self._next = asyncio.get_running_loop().call_later(self._pause_s, self._write)
        else:
            self._transport.write(self._answer.end)


def _choice(delta: dict[str, str], finish: str | None) -> dict[str, object]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


def _event(choices: list[dict[str, object]], **more: object) -> bytes:
    head = {"id": "chatcmpl-0123456789", "object": "chat.completion.chunk", "created": 1_750_000_000, "model": "long"}
    event = {**head, "service_tier": "default", "system_fingerprint": "fp_0123456789", "choices": choices, **more}
    return _chunk(b"data: " + orjson.dumps(event) + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _serve(port: int, tokens_per_s: float, tokens: int) -> None:
    loop = asyncio.get_running_loop()
    connected = partial(
        Upstream, tokens_per_s, tokens, plain=Events(with_usage=False), with_usage=Events(with_usage=True)
    )
    server = await loop.create_server(connected, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
