"""An upstream of our own that behaves like the real ones, for the demo, the tests and the benchmarks.

It serves chat, completions, embeddings, responses (which it keeps, see `simulated_memory`), models and Anthropic's
messages to whoever has its key, for any name of a model, with texts that follow from its seed (see `simulated_text`),
and what is no text (see `simulated_media`). It is reached through the same code path as a real upstream.
It remembers what it was sent and what it reported, so that the books can be held against it; `watch` is told of each
call that it answered, with what it generated, taken or not.

How a request can ask it to behave stands in `simulated_faults`. It generates only while somebody listens: when the
client goes, it stops at once.
"""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from hmac import compare_digest
from itertools import count, islice

import orjson
from aiohttp import web

from proxy.simulator.directives import (
    NO_DIRECTIONS,
    Complaint,
    Directions,
    complaint_of,
    hang,
    read_directions,
    wrong_key,
)
from proxy.simulator.frames import JSON, Stream, write_stream, write_whole
from proxy.simulator.media import ERROR, MEDIA, Write, read_form, write_medium
from proxy.simulator.messages import write_complaint, write_message, write_message_stream
from proxy.simulator.store import Memory
from proxy.simulator.text import Author, Endpoint, Script, read_json

MODELS = ("gpt-4o", "gpt-4o-mini", "o4-mini", "gpt-3.5-turbo-instruct", "text-embedding-3-small")
PATHS = {
    "/v1/chat/completions": (Endpoint.CHAT, "chatcmpl-"),
    "/v1/completions": (Endpoint.COMPLETIONS, "cmpl-"),
    "/v1/embeddings": (Endpoint.EMBEDDINGS, "embd-"),
    "/v1/responses": (Endpoint.RESPONSES, "resp_"),
    "/v1/messages": (Endpoint.MESSAGES, "msg_"),
}
REQUESTS_KEPT = 100
BODY_BYTES_MAX = 64 << 20
# What the real one says of its own affairs on every answer. Nothing of it is for the users of a shared key.
HEADERS = {
    "openai-organization": "org-simulated",
    "openai-processing-ms": "1",
    "openai-version": "2020-10-01",
    "x-ratelimit-limit-requests": "30000",
    "x-ratelimit-limit-tokens": "150000000",
    "x-ratelimit-remaining-requests": "29999",
    "x-ratelimit-remaining-tokens": "149999976",
    "x-ratelimit-reset-requests": "2ms",
    "x-ratelimit-reset-tokens": "9ms",
    "set-cookie": "__cf_bm=simulated; path=/; HttpOnly",
}
JSON_HEADERS = {"content-type": "application/json"}
HTML_HEADERS = {"content-type": "text/html"}
STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
Respond = Callable[[web.Request, JSON, Directions], Awaitable[web.StreamResponse]]
BAD_GATEWAY = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"


@dataclass(slots=True)
class Given:
    """What was reported: the answers whose usage was sent, and the sums of that usage."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(slots=True)
class Served:
    """One call that was answered: what is said to it, how much of that was generated, and the usage it was told."""

    script: Script
    generated: int = 0
    reported: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Received:
    """One request as it arrived; the path as on the wire, with its query."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


class Simulator:
    """A stand-in for an OpenAI-compatible server; see the module for what it can be asked."""

    def __init__(
        self,
        api_key: str,
        seed: int = 0,
        tokens_per_s: float | None = None,
        *,
        now: Callable[[], float] = lambda: 1_750_000_000.0,
        watch: Callable[[Served], object] = lambda served: None,
    ) -> None:
        self.given = Given()
        self.requests: deque[Received] = deque(maxlen=REQUESTS_KEPT)
        self.received = 0  # requests ever
        self.open_calls = 0
        self.open_streams = 0
        self.chunks_sent = 0  # words of text ever sent in streams
        self.clients_gone = 0  # calls whose client went before the end
        self._api_key = api_key
        self._author = Author(seed)
        self._tokens_per_s = tokens_per_s
        self._now = now
        self._watch = watch
        self._numbers = count(1 + seed * 10**6)  # of all ids, so that no two are the same
        self._memory = Memory()
        self._waiting: list[asyncio.Future[None]] = []

    def app(self) -> web.Application:
        """Return the application that serves it."""
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        for path, (endpoint, prefix) in PATHS.items():
            app.router.add_post(path, partial(self._call, partial(self._say, endpoint, prefix)))
        app.router.add_post("/v1/messages/count_tokens", partial(self._call, self._count))
        for path, write in MEDIA.items():
            app.router.add_post(path, partial(self._call, partial(self._make, write)))
        for path in ("/v1/responses/{id}", "/v1/responses/{id}/{of_it}"):
            app.router.add_route("*", path, self._remember)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model}", self._models)
        app.router.add_route("*", "/{path:.*}", self._unknown)
        return app

    async def until(self, is_reached: Callable[[], bool]) -> None:
        """Wait until this is true of the simulator: `until(lambda: simulator.open_streams == 0)`."""
        while not is_reached():
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            await waiting

    def _changed(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                if not each.done():
                    each.set_result(None)

    # ------------------------------------------------------------------------------------------------- requests

    async def _call(self, answer: Respond, request: web.Request) -> web.StreamResponse:
        self.open_calls += 1
        try:
            body = await self._receive(request)
            return await self._answer(answer, request, body)
        except Complaint as complaint:
            return self._complain(complaint, request)
        except asyncio.CancelledError:
            self.clients_gone += 1
            raise
        finally:
            self.open_calls -= 1
            self._changed()

    async def _answer(self, answer: Respond, request: web.Request, body: bytes) -> web.StreamResponse:
        key = self._check_key(request)
        is_form = request.content_type == "multipart/form-data"
        asked = read_form(body, request.headers["content-type"]) if is_form else read_json(body)
        directions = read_directions(asked)
        if directions.hang:
            await hang()
        if directions.delay_s:
            await asyncio.sleep(directions.delay_s)
        if directions.html:
            return web.Response(status=502, body=BAD_GATEWAY, headers=self._headers(directions, HTML_HEADERS))
        if directions.status is not None:
            return self._complain(complaint_of(directions.status, directions.code, key), request, directions)
        return await answer(request, asked, directions)

    async def _say(
        self, endpoint: Endpoint, prefix: str, request: web.Request, asked: JSON, directions: Directions
    ) -> web.StreamResponse:
        script = self._memory.going_on(self._author.script(endpoint, asked, directions))
        served = Served(script)
        id, created = f"{prefix}{next(self._numbers):012d}", int(self._now())
        is_message = endpoint is Endpoint.MESSAGES
        self._memory.keep(script, id=id, created=created)
        try:
            if script.is_streamed:
                stream = write_message_stream(script, id=id) if is_message else None
                stream = stream or write_stream(script, id=id, created=created)
                return await self._stream(request, served, stream)
            body = write_message(script, id=id) if is_message else write_whole(script, id=id, created=created)
            return await self._whole(request, served, body)
        finally:
            self._watch(served)

    async def _count(self, request: web.Request, asked: JSON, directions: Directions) -> web.StreamResponse:
        script = self._author.script(Endpoint.MESSAGES, asked, directions)
        return self._json({"input_tokens": script.input_tokens})

    async def _make(
        self, write: Write, request: web.Request, asked: JSON, directions: Directions
    ) -> web.StreamResponse:
        medium = write_medium(write, asked, directions)
        headers = self._headers(directions, {"content-type": medium.content_type})
        if not medium.is_stream:
            headers["content-length"] = str(sum(map(len, medium.pieces)))
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        for piece in islice(medium.pieces, directions.fault_after if directions.fault else None):
            await asyncio.sleep(0)
            await response.write(piece)
        if directions.fault in ("cut", "stall"):
            await self._break_off(request, directions)
        elif directions.fault:
            await response.write(ERROR)
        elif medium.usage is not None:
            self._take_down(*medium.usage)
        return response

    async def _receive(self, request: web.Request) -> bytes:
        body = await request.read()
        self.received += 1
        self.requests.append(Received(request.method, request.raw_path, request.headers, body))
        self._changed()
        return body

    def _check_key(self, request: web.Request) -> str:
        sent = request.headers.get("authorization") or "Bearer " + request.headers.get("x-api-key", "")
        header = sent.encode("utf-8", "surrogateescape")
        scheme, _, key = header.decode("utf-8", "replace").partition(" ")
        if scheme != "Bearer" or not compare_digest(key.encode(), self._api_key.encode()):
            raise wrong_key(key)
        return key

    async def _models(self, request: web.Request) -> web.Response:
        await self._receive(request)
        name = request.match_info.get("model")
        try:
            self._check_key(request)
            if name is not None and name not in MODELS:
                message = f"The model '{name}' does not exist or you do not have access to it."
                raise Complaint(404, message, code="model_not_found", param="model")
        except Complaint as complaint:
            return self._complain(complaint, request)
        created = int(self._now())
        shown = [
            {"id": model, "object": "model", "created": created, "owned_by": "simulator"}
            for model in MODELS
            if name in (None, model)
        ]
        return self._json({"object": "list", "data": shown} if name is None else shown[0])

    async def _remember(self, request: web.Request) -> web.Response:
        await self._receive(request)
        try:
            self._check_key(request)
            answer = self._memory.answer(request.method, request.path, request.query)
        except Complaint as complaint:
            return self._complain(complaint, request)
        if isinstance(answer, bytes):
            return web.Response(body=answer, headers=self._headers(NO_DIRECTIONS, STREAM_HEADERS))
        return self._json(answer)

    async def _unknown(self, request: web.Request) -> web.Response:
        await self._receive(request)
        return self._complain(Complaint(404, f"Invalid URL ({request.method} {request.path})"), request)

    # -------------------------------------------------------------------------------------------------- answers

    def _headers(self, directions: Directions, kind: Mapping[str, str] = JSON_HEADERS) -> dict[str, str]:
        headers = {**HEADERS, **kind, "x-request-id": f"req_{next(self._numbers):012d}"}
        return headers | {name.lower(): value for name, value in directions.headers}

    def _json(self, answer: dict[str, object]) -> web.Response:
        return web.Response(body=orjson.dumps(answer), headers=self._headers(NO_DIRECTIONS))

    def _complain(
        self, complaint: Complaint, request: web.Request, directions: Directions = NO_DIRECTIONS
    ) -> web.Response:
        headers = self._headers(directions)
        if complaint.error["code"] == "rate_limit_exceeded":
            headers.setdefault("retry-after", "1")
        body = orjson.dumps({"error": complaint.error})
        if request.path.startswith("/v1/messages"):
            body = write_complaint(complaint, id=headers["x-request-id"])
        return web.Response(status=complaint.status, body=body, headers=headers)

    def _report(self, served: Served) -> None:
        served.reported = served.script.reported
        self._take_down(*served.reported)

    def _take_down(self, taken: int, given: int) -> None:
        self.given.calls += 1
        self.given.input_tokens += taken
        self.given.output_tokens += given

    def _pause_s(self, directions: Directions) -> float:
        tokens_per_s = directions.tokens_per_s or self._tokens_per_s
        return 1 / tokens_per_s if tokens_per_s else 0.0

    async def _whole(self, request: web.Request, served: Served, body: bytes) -> web.StreamResponse:
        directions = served.script.directions
        await self._generate(served)
        headers = self._headers(directions)
        if directions.fault not in ("cut", "stall"):
            if not directions.no_usage:
                self._report(served)
            return web.Response(body=body, headers=headers)
        half = web.StreamResponse(headers={**headers, "content-length": str(len(body))})
        await half.prepare(request)
        await half.write(body[: len(body) // 2])
        await self._break_off(request, directions)
        return half

    async def _generate(self, served: Served) -> None:
        """Take as long as the whole answer takes; who goes before has had a part of it made."""
        tokens, pause_s = served.script.output_tokens, self._pause_s(served.script.directions)
        loop = asyncio.get_running_loop()
        ready_at = loop.time() + pause_s * tokens
        try:
            if pause_s:
                await asyncio.sleep(pause_s * tokens)
        except asyncio.CancelledError:
            missing = math.ceil(max(0.0, ready_at - loop.time()) / pause_s)
            served.generated = max(0, tokens - missing)
            raise
        served.generated = tokens

    async def _stream(self, request: web.Request, served: Served, stream: Stream) -> web.StreamResponse:
        response = web.StreamResponse(headers=self._headers(served.script.directions, STREAM_HEADERS))
        self.open_streams += 1
        try:
            await response.prepare(request)
            await self._play(request, response, served, stream)
        except ConnectionResetError:
            self.clients_gone += 1
        finally:
            self.open_streams -= 1
        return response

    async def _play(self, request: web.Request, response: web.StreamResponse, served: Served, stream: Stream) -> None:
        directions = served.script.directions
        pause_s = self._pause_s(directions)
        for event in stream.opening:
            await response.write(event)
        for event in islice(stream.text, directions.fault_after if directions.fault else None):
            # Also without a speed: so others go on, a client that has gone is noticed, each event is sent by itself.
            await asyncio.sleep(pause_s)
            served.generated += 1
            await response.write(event)
            self.chunks_sent += 1
            self._changed()
        if directions.fault in ("cut", "stall"):
            return await self._break_off(request, directions)
        for position, event in enumerate(stream.error if directions.fault else stream.closing):
            await response.write(event)
            if position == stream.usage_at and not directions.fault:
                self._report(served)

    async def _break_off(self, request: web.Request, directions: Directions) -> None:
        if directions.fault == "stall":
            await hang()
        # Closed, not aborted: what was written does arrive, and then nothing says that it was all.
        if request.transport is not None:
            request.transport.close()


async def serve(simulator: Simulator, *, host: str = "127.0.0.1", port: int = 0) -> tuple[web.AppRunner, int]:
    """Serve it, as tests, demo and benchmarks all do, and return what to `cleanup` and the port that it has."""
    # Cancelled when the client goes: that is how it notices at once. Nobody is owed a graceful end by a stand-in.
    runner = web.AppRunner(simulator.app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError:
        await runner.cleanup()
        raise
    return runner, runner.addresses[0][1]
