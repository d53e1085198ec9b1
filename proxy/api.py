"""The OpenAI surface: the paths of `endpoints`, each with and without `/v1`; everything else is a 404.

A handler authenticates, reads and checks the request, and hands the call to the relay in a task of its own. Then
it only waits: the server cancels it when the client hangs up, and it passes that on.
"""

import asyncio
import secrets
from collections.abc import Callable
from functools import partial

import structlog
from aiohttp import hdrs, web

from proxy.answering import REQUEST_ID, Handler, in_openai_shape
from proxy.auth import identify
from proxy.client import Client
from proxy.endpoints import METERED, Endpoint, closed
from proxy.errors import (
    BodyTooLarge,
    InvalidRequest,
    NotAllowed,
    NotServed,
    NoUpgrade,
    ProxyError,
    UnsupportedEncoding,
)
from proxy.forms import Form, FormReader
from proxy.headers import NAME
from proxy.health import Health
from proxy.ledger import Ledger
from proxy.passage import Passage, no_such_model, passage_for
from proxy.policy import Policy, User
from proxy.relay import Relay
from proxy.reload import Policies
from proxy.spool import Spool
from proxy.standing import standings
from proxy.strict_json import dump
from proxy.tasks import Tasks
from proxy.wire import parse_call, parse_form

log = structlog.get_logger("api")

# OpenAI takes tens of megabytes (pictures and files as base64); this is after decoding.
REQUEST_BYTES_MAX = 32 * 2**20
# Sounds and pictures, which go to the disk; OpenAI takes no file that is larger.
FORM_BYTES_MAX = 512 * 2**20
_TOO_LARGE = f"The request's body is larger than {REQUEST_BYTES_MAX} bytes."


class Api:
    """The handlers of the API listener. `now` gives milliseconds since 1970."""

    def __init__(
        self, policies: Policies, ledger: Ledger, *, relay: Relay, health: Health, now: Callable[[], int]
    ) -> None:
        self.calls = Tasks()
        self._policies = policies
        self._ledger = ledger
        self._relay = relay
        self._health = health
        self._now = now

    def application(self) -> web.Application:
        """The application, to be served with `handler_cancellation` on."""
        application = web.Application(middlewares=[self._give_id, in_openai_shape, _without_upgrade])
        application.router.add_routes(self._health.routes())
        for prefix in ("/v1", ""):
            for endpoint in METERED:
                application.router.add_post(prefix + endpoint.path, partial(self._metered, endpoint))
            application.router.add_get(prefix + "/models", self._models)
            application.router.add_get(prefix + "/models/{model:.+}", self._model)
            application.router.add_get(prefix + "/quota", self._quota)
        application.router.add_route("*", "/{path:.*}", _not_served)
        return application

    @web.middleware
    async def _give_id(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        # Begins with the time, so that new rows go to the end of the ledger's index.
        request[REQUEST_ID] = f"req_{self._now():012x}{secrets.token_hex(10)}"
        return await handler(request)

    async def _metered(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        policy = self._policies.current
        user = identify(request.headers.items(), policy)
        client = Client(request, id=request[REQUEST_ID])
        if endpoint.form is None:
            passage = passage_for(parse_call(endpoint, await _read(request)), user, policy, client)
            return await self._carried(passage)
        spool = Spool()
        try:
            call = parse_form(endpoint, await _read_form(request, spool))
            passage = passage_for(call, user, policy, client, spool=spool)
        except BaseException:
            spool.close()
            raise
        return await self._carried(passage)

    async def _carried(self, passage: Passage) -> web.StreamResponse:
        client = passage.client
        carrying = self.calls.start("call", self._carry(passage))
        try:
            error = await asyncio.shield(carrying)
        except asyncio.CancelledError:
            client.leave()
            raise
        if error is not None:
            raise error
        assert client.response is not None, "a call that was carried was answered"
        return client.response

    async def _carry(self, passage: Passage) -> ProxyError | None:
        # What went wrong is a result here, not an exception: whose client has gone has nobody to raise it to.
        try:
            await self._relay.carry(passage)
        except ProxyError as error:
            return error
        except Exception as error:
            log.error("a call failed", exc_info=error, call=passage.client.id)
            if passage.client.response is None:
                return ProxyError("The proxy made a mistake. It has been logged.")
            passage.client.abort()
        finally:
            if passage.spool is not None:
                passage.spool.close()
        return None

    async def _models(self, request: web.Request) -> web.Response:
        policy = self._policies.current
        user = identify(request.headers.items(), policy)
        return _json({"object": "list", "data": [_model(name) for name in _models_of(user, policy)]}, request)

    async def _model(self, request: web.Request) -> web.Response:
        policy = self._policies.current
        user = identify(request.headers.items(), policy)
        name = request.match_info["model"]
        if not policy.serves(user, name):
            raise no_such_model(name[:200])
        return _json(_model(name), request)

    async def _quota(self, request: web.Request) -> web.Response:
        policy = self._policies.current
        binding = policy.all_quotas(identify(request.headers.items(), policy))
        counters = await self._ledger.counters(binding.keys())
        stand = standings(binding, counters, self._now())
        return _json({"object": "list", "data": [each.as_json(policy.zone) for each in stand.values()]}, request)


@web.middleware
async def _without_upgrade(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Say no to WebSockets at once, so that a client which tries them first goes on over HTTP (Codex does)."""
    if hdrs.SEC_WEBSOCKET_KEY in request.headers and "websocket" in request.headers.get(hdrs.UPGRADE, "").lower():
        raise NoUpgrade
    return await handler(request)


async def _not_served(request: web.Request) -> web.StreamResponse:
    """The handler of every path that is not served; one that is known is refused with its reason."""
    row = closed(request.method, request.path)
    if row is not None:
        raise NotAllowed(f"{request.method} {row.pattern} is not open on this proxy: {row.reason}.")
    raise NotServed(f"Invalid URL ({request.method} {request.path[:200]})")


def _models_of(user: User, policy: Policy) -> list[str]:
    named = [name for name in policy.models or {} if name != "*"]
    return [name for name in named if policy.serves(user, name)]


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "llm-quota-proxy"}


def _json(value: object, request: web.Request) -> web.Response:
    headers = {
        "content-type": "application/json",
        "cache-control": "no-store",
        "x-request-id": request[REQUEST_ID],
        "server": NAME,
    }
    return web.Response(headers=headers, body=dump(value))


async def _read(request: web.Request) -> bytes:
    """The body, decoded and bounded."""
    if request.content_type.startswith("multipart/"):
        raise UnsupportedEncoding("This endpoint takes JSON: send `Content-Type: application/json`.")
    coding = request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower()
    if coding not in ("identity", "gzip", "deflate"):
        raise UnsupportedEncoding(f"The content coding {coding[:40]!r} can't be read here: send gzip or none.")
    if request.content_length is not None and request.content_length > REQUEST_BYTES_MAX:
        raise BodyTooLarge(_TOO_LARGE)
    body = bytearray()
    try:
        # Not `request.read()`, which would keep a second copy for as long as the answer streams.
        async for chunk in request.content.iter_any():
            body += chunk
            if len(body) > REQUEST_BYTES_MAX:
                raise BodyTooLarge(_TOO_LARGE)
    except web.RequestPayloadError:
        raise InvalidRequest("The body could not be read: it is cut short or badly encoded.") from None
    return bytes(body)


async def _read_form(request: web.Request, spool: Spool) -> Form:
    """The form in a body, which goes to `spool` as it comes."""
    reader = FormReader(request.headers.get(hdrs.CONTENT_TYPE, ""))
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise UnsupportedEncoding("Send a form without a content coding.")
    too_large = BodyTooLarge(f"The form is larger than {FORM_BYTES_MAX} bytes.")
    if request.content_length is not None and request.content_length > FORM_BYTES_MAX:
        raise too_large
    try:
        async for chunk in request.content.iter_any():
            if spool.size + len(chunk) > FORM_BYTES_MAX:
                raise too_large
            reader.feed(chunk)
            await spool.write(chunk)
    except web.RequestPayloadError:
        raise InvalidRequest("The body could not be read: it is cut short or badly encoded.") from None
    await spool.flush()
    return reader.end()
