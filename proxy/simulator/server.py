"""The simulated upstream as an HTTP server, for the demo, the tests and the benchmarks.

It serves chat, completions, embeddings, responses (which it keeps, see `store`), models and Anthropic's messages, for
any model name, with texts that depend on its seed (see `text`), and answers that are not text (see `media`). Every
request needs its API key. The proxy reaches it through the same code path as a real upstream.

It keeps the latest requests and the sums of the usage that it reported, so a test can compare them with the proxy's
counters. The callback `on_served` gets each call that it answered, with the tokens that it generated, whether or not
they reached the client.

`directives` says how a request asks for a fault. The simulator generates only while its client is connected: when the
client disconnects, it stops at once.
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
    NO_DIRECTIVES,
    ApiError,
    Directives,
    error_for_status,
    hang,
    invalid_key_error,
    read_directives,
)
from proxy.simulator.frames import JSON, EventStream, write_stream, write_whole
from proxy.simulator.media import MEDIA, STREAM_ERROR, MediaWriter, read_multipart, write_media
from proxy.simulator.messages import write_error, write_message, write_message_stream
from proxy.simulator.store import ResponseStore
from proxy.simulator.text import Answer, Endpoint, generator_of, read_json

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
# OpenAI sends these on every answer. They are about the account behind the shared key, so the proxy must not pass
# them to its users.
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
Respond = Callable[[web.Request, JSON, Directives], Awaitable[web.StreamResponse]]
BAD_GATEWAY = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"


@dataclass(slots=True)
class ReportedUsage:
    """The number of answers whose usage was sent, and the sums of that usage."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(slots=True)
class Served:
    """One call that was answered.

    `generated` is the number of output tokens that were generated before the call ended, `reported` the input and
    output tokens in the usage, None if no usage was sent.
    """

    answer: Answer
    generated: int = 0
    reported: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Received:
    """One request as it arrived; `path` is the raw path with its query."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


class Simulator:
    """A stand-in for an OpenAI-compatible server; `directives` lists what a request can ask it to do."""

    def __init__(
        self,
        api_key: str,
        seed: int = 0,
        tokens_per_s: float | None = None,
        *,
        now: Callable[[], float] = lambda: 1_750_000_000.0,
        on_served: Callable[[Served], object] = lambda served: None,
    ) -> None:
        self.reported_usage = ReportedUsage()
        self.requests: deque[Received] = deque(maxlen=REQUESTS_KEPT)
        self.received = 0  # requests since the start
        self.deletions = 0  # those of them that delete a stored response
        self.open_calls = 0
        self.open_streams = 0
        self.chunks_sent = 0  # words of text sent in streams since the start
        self.disconnects = 0  # calls whose client disconnected before the end
        self._api_key = api_key
        self._generator = generator_of(seed)
        self._tokens_per_s = tokens_per_s
        self._now = now
        self._on_served = on_served
        # All ids come from one counter, and each seed has a range of its own, so no two answers have the same id.
        self._numbers = count(1 + seed * 10**6)
        self._store = ResponseStore()
        self._waiting: list[asyncio.Future[None]] = []

    def app(self) -> web.Application:
        """Return the aiohttp application with all routes."""
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        for path, (endpoint, prefix) in PATHS.items():
            app.router.add_post(path, partial(self._handle, partial(self._answer_text, endpoint, prefix)))
        app.router.add_post("/v1/messages/count_tokens", partial(self._handle, self._answer_token_count))
        for path, write in MEDIA.items():
            app.router.add_post(path, partial(self._handle, partial(self._answer_media, write)))
        for path in ("/v1/responses/{id}", "/v1/responses/{id}/{action}"):
            app.router.add_route("*", path, self._handle_stored_response)
        app.router.add_get("/v1/models", self._handle_models)
        app.router.add_get("/v1/models/{model}", self._handle_models)
        app.router.add_route("*", "/{path:.*}", self._handle_unknown)
        return app

    async def until(self, is_reached: Callable[[], bool]) -> None:
        """Wait until a condition on the simulator is true: `until(lambda: simulator.open_streams == 0)`."""
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

    async def _handle(self, respond: Respond, request: web.Request) -> web.StreamResponse:
        self.open_calls += 1
        try:
            body = await self._receive(request)
            return await self._follow_directives(respond, request, body)
        except ApiError as error:
            return self._error_response(error, request)
        except asyncio.CancelledError:
            self.disconnects += 1
            raise
        finally:
            self.open_calls -= 1
            self._changed()

    async def _follow_directives(self, respond: Respond, request: web.Request, body: bytes) -> web.StreamResponse:
        key = self._check_key(request)
        is_form = request.content_type == "multipart/form-data"
        params = read_multipart(body, request.headers["content-type"]) if is_form else read_json(body)
        directives = read_directives(params)
        if directives.hang:
            await hang()
        if directives.delay_s:
            await asyncio.sleep(directives.delay_s)
        if directives.html:
            return web.Response(status=502, body=BAD_GATEWAY, headers=self._headers(directives, HTML_HEADERS))
        if directives.status is not None:
            return self._error_response(
                error_for_status(directives.status, directives.code, key), request, directives
            )
        return await respond(request, params, directives)

    async def _answer_text(
        self, endpoint: Endpoint, prefix: str, request: web.Request, params: JSON, directives: Directives
    ) -> web.StreamResponse:
        answer = self._store.with_previous(self._generator.answer(endpoint, params, directives))
        served = Served(answer)
        id, created = f"{prefix}{next(self._numbers):012d}", int(self._now())
        is_message = endpoint is Endpoint.MESSAGES
        self._store.add(answer, id=id, created=created)
        try:
            if answer.is_streamed:
                stream = write_message_stream(answer, id=id) if is_message else None
                stream = stream or write_stream(answer, id=id, created=created)
                return await self._send_stream(request, served, stream)
            body = write_message(answer, id=id) if is_message else write_whole(answer, id=id, created=created)
            return await self._send_whole(request, served, body)
        finally:
            self._on_served(served)

    async def _answer_token_count(
        self, request: web.Request, params: JSON, directives: Directives
    ) -> web.StreamResponse:
        answer = self._generator.answer(Endpoint.MESSAGES, params, directives)
        return self._json_response({"input_tokens": answer.input_tokens})

    async def _answer_media(
        self, write: MediaWriter, request: web.Request, params: JSON, directives: Directives
    ) -> web.StreamResponse:
        answer = write_media(write, params, directives)
        headers = self._headers(directives, {"content-type": answer.content_type})
        if not answer.is_stream:
            headers["content-length"] = str(sum(map(len, answer.pieces)))
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        for piece in islice(answer.pieces, directives.fault_after if directives.fault else None):
            await asyncio.sleep(0)
            await response.write(piece)
        if directives.fault in ("cut", "stall"):
            await self._break_off(request, directives)
        elif directives.fault:
            await response.write(STREAM_ERROR)
        elif answer.usage is not None:
            self._add_usage(*answer.usage)
        return response

    async def _receive(self, request: web.Request) -> bytes:
        body = await request.read()
        self.received += 1
        self.requests.append(Received(request.method, request.raw_path, request.headers, body))
        self._changed()
        return body

    def _check_key(self, request: web.Request) -> str:
        value = request.headers.get("authorization") or "Bearer " + request.headers.get("x-api-key", "")
        # aiohttp decodes bytes that are not UTF-8 to surrogates; they are replaced here, so that any header can be
        # compared and shown in an error.
        header = value.encode("utf-8", "surrogateescape")
        scheme, _, key = header.decode("utf-8", "replace").partition(" ")
        if scheme != "Bearer" or not compare_digest(key.encode(), self._api_key.encode()):
            raise invalid_key_error(key)
        return key

    async def _handle_models(self, request: web.Request) -> web.Response:
        await self._receive(request)
        name = request.match_info.get("model")
        try:
            self._check_key(request)
            if name is not None and name not in MODELS:
                message = f"The model '{name}' does not exist or you do not have access to it."
                raise ApiError(404, message, code="model_not_found", param="model")
        except ApiError as error:
            return self._error_response(error, request)
        created = int(self._now())
        shown = [
            {"id": model, "object": "model", "created": created, "owned_by": "simulator"}
            for model in MODELS
            if name in (None, model)
        ]
        return self._json_response({"object": "list", "data": shown} if name is None else shown[0])

    async def _handle_stored_response(self, request: web.Request) -> web.Response:
        await self._receive(request)
        self.deletions += request.method == "DELETE"
        try:
            self._check_key(request)
            answer = self._store.handle(request.method, request.path, request.query)
        except ApiError as error:
            return self._error_response(error, request)
        if isinstance(answer, bytes):
            return web.Response(body=answer, headers=self._headers(NO_DIRECTIVES, STREAM_HEADERS))
        return self._json_response(answer)

    async def _handle_unknown(self, request: web.Request) -> web.Response:
        await self._receive(request)
        return self._error_response(ApiError(404, f"Invalid URL ({request.method} {request.path})"), request)

    # -------------------------------------------------------------------------------------------------- answers

    def _headers(self, directives: Directives, kind: Mapping[str, str] = JSON_HEADERS) -> dict[str, str]:
        headers = {**HEADERS, **kind, "x-request-id": f"req_{next(self._numbers):012d}"}
        return headers | {name.lower(): value for name, value in directives.headers}

    def _json_response(self, body: dict[str, object]) -> web.Response:
        return web.Response(body=orjson.dumps(body), headers=self._headers(NO_DIRECTIVES))

    def _error_response(
        self, error: ApiError, request: web.Request, directives: Directives = NO_DIRECTIVES
    ) -> web.Response:
        headers = self._headers(directives)
        if error.error["code"] == "rate_limit_exceeded":
            headers.setdefault("retry-after", "1")
        body = orjson.dumps({"error": error.error})
        if request.path.startswith("/v1/messages"):
            body = write_error(error, id=headers["x-request-id"])
        return web.Response(status=error.status, body=body, headers=headers)

    def _report(self, served: Served) -> None:
        served.reported = served.answer.usage
        self._add_usage(*served.reported)

    def _add_usage(self, input_tokens: int, output_tokens: int) -> None:
        self.reported_usage.calls += 1
        self.reported_usage.input_tokens += input_tokens
        self.reported_usage.output_tokens += output_tokens

    def _s_per_token(self, directives: Directives) -> float:
        tokens_per_s = directives.tokens_per_s or self._tokens_per_s
        return 1 / tokens_per_s if tokens_per_s else 0.0

    async def _send_whole(self, request: web.Request, served: Served, body: bytes) -> web.StreamResponse:
        directives = served.answer.directives
        await self._generate(served)
        headers = self._headers(directives)
        if directives.fault not in ("cut", "stall"):
            if not directives.no_usage:
                self._report(served)
            return web.Response(body=body, headers=headers)
        response = web.StreamResponse(headers={**headers, "content-length": str(len(body))})
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        await self._break_off(request, directives)
        return response

    async def _generate(self, served: Served) -> None:
        """Take as long as the whole answer takes.

        If the client disconnects before, a part of it was generated: 100 tokens at 10 per second, left after 4 s, are
        40 tokens.
        """
        tokens, s_per_token = served.answer.output_tokens, self._s_per_token(served.answer.directives)
        loop = asyncio.get_running_loop()
        ready_at = loop.time() + s_per_token * tokens
        try:
            if s_per_token:
                await asyncio.sleep(s_per_token * tokens)
        except asyncio.CancelledError:
            missing = math.ceil(max(0.0, ready_at - loop.time()) / s_per_token)
            served.generated = max(0, tokens - missing)
            raise
        served.generated = tokens

    async def _send_stream(self, request: web.Request, served: Served, stream: EventStream) -> web.StreamResponse:
        response = web.StreamResponse(headers=self._headers(served.answer.directives, STREAM_HEADERS))
        self.open_streams += 1
        try:
            await response.prepare(request)
            await self._send_events(request, response, served, stream)
        except ConnectionResetError:
            self.disconnects += 1
        finally:
            self.open_streams -= 1
        return response

    async def _send_events(
        self, request: web.Request, response: web.StreamResponse, served: Served, stream: EventStream
    ) -> None:
        directives = served.answer.directives
        s_per_token = self._s_per_token(directives)
        for event in stream.opening:
            await response.write(event)
        for event in islice(stream.text, directives.fault_after if directives.fault else None):
            # Sleep even for 0 s: other calls get their turn, a disconnect is noticed, and each event is a write of
            # its own.
            await asyncio.sleep(s_per_token)
            served.generated += 1
            await response.write(event)
            self.chunks_sent += 1
            self._changed()
        if directives.fault in ("cut", "stall"):
            return await self._break_off(request, directives)
        for position, event in enumerate(stream.error if directives.fault else stream.closing):
            await response.write(event)
            if position == stream.usage_at and not directives.fault:
                self._report(served)

    async def _break_off(self, request: web.Request, directives: Directives) -> None:
        if directives.fault == "stall":
            await hang()
        # `close`, not `abort`: bytes that were written still arrive, and then the connection ends without the last
        # chunk, or before the content length is reached.
        if request.transport is not None:
            request.transport.close()


async def serve(simulator: Simulator, *, host: str = "127.0.0.1", port: int = 0) -> tuple[web.AppRunner, int]:
    """Start serving. Return the runner, whose `cleanup` stops it, and the port. Raises OSError if that is taken."""
    # aiohttp cancels a handler whose client disconnects, so the simulator stops generating at once. On shutdown open
    # calls get 0.1 s, because no real client waits for their end.
    runner = web.AppRunner(simulator.app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError:
        await runner.cleanup()
        raise
    return runner, runner.addresses[0][1]
