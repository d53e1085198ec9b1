"""What users call: the paths of `endpoints` behind each of their prefixes; everything else is a 404.

A handler authenticates, reads and checks the request, and hands the call to the relay in a task of its own. Then
it only waits: the server cancels it when the client hangs up, and it passes that on.
"""

import asyncio
import secrets
from collections.abc import Callable
from functools import partial

import structlog
from aiohttp import hdrs, web

from proxy.calls.call import Call, no_such_model, prepare_call
from proxy.calls.relay import Relay
from proxy.calls.stored_responses import StoredResponseQuery, StoredResponses
from proxy.config.loader import Settings
from proxy.config.reload import Policies
from proxy.errors import NotAllowed, NoUpgrade, ProxyError
from proxy.formats.endpoints import METERED, PREFIXES, STORED_RESPONSE_PATHS, Endpoint, StoredResponsePath, closed
from proxy.formats.request import parse_form_request, parse_request
from proxy.formats.strict_json import dump
from proxy.identity.keys import identify
from proxy.ledger.entry import call_id_prefix
from proxy.policy.policy import Policy, User
from proxy.policy.status import quota_statuses
from proxy.tasks import Tasks
from proxy.upstreams.headers import JSON_HEADERS, SERVER_NAME
from proxy.upstreams.spool import Spool
from proxy.web.body import expect_when_read, read_body, read_form
from proxy.web.cors import Cors
from proxy.web.health import Health
from proxy.web.middleware import REQUEST_ID, Handler, answer_errors, not_served, validate_request
from proxy.web.response import WebResponder

log = structlog.get_logger("api")


class Api:
    """The handlers of the API listener. `now` gives milliseconds since 1970."""

    def __init__(
        self,
        policies: Policies,
        stored_responses: StoredResponses,
        *,
        relay: Relay,
        health: Health,
        settings: Settings,
        now: Callable[[], int],
    ) -> None:
        self.calls = Tasks()
        self._policies = policies
        self._stored_responses = stored_responses
        self._ledger = stored_responses.ledger
        self._relay = relay
        self._health = health
        self._cors = Cors(settings.cors)
        self._limits = settings.connection_limits
        self._now = now

    def application(self) -> web.Application:
        """The application, to be served with `handler_cancellation` on."""
        application = web.Application(
            middlewares=[
                self._give_id,
                self._cors.answer_preflight,
                answer_errors,
                validate_request,
                _without_upgrade,
            ]
        )
        application.on_response_prepare.append(self._cors.mark)
        application.router.add_routes(self._health.routes())
        for endpoint in METERED:
            # A deployment may have slashes in its name, as OpenRouter's models have.
            of_deployments = ("/openai/deployments/{deployment:.+}",) if endpoint.has_deployments else ()
            for prefix in (*PREFIXES, *of_deployments):
                application.router.add_post(
                    prefix + endpoint.path, partial(self._metered, endpoint), expect_handler=expect_when_read
                )
        for prefix in PREFIXES:
            for kept in STORED_RESPONSE_PATHS:
                application.router.add_route(
                    kept.method,
                    prefix + kept.path("{id}"),
                    partial(self._kept, kept),
                    expect_handler=expect_when_read,
                )
            application.router.add_get(prefix + "/models", self._models)
            application.router.add_get(prefix + "/models/{model:.+}", self._model)
            application.router.add_get(prefix + "/quota", self._quota)
        # All else is a 404 of ours, which invites no body either.
        application.router.add_route("*", "/{anything:.*}", _not_served, expect_handler=expect_when_read)
        return application

    @web.middleware
    async def _give_id(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        request[REQUEST_ID] = f"{call_id_prefix(self._now())}{secrets.token_hex(10)}"
        return await handler(request)

    async def _metered(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        policy = self._policies.current
        user = identify(request.headers.items(), policy)
        client = WebResponder(request, id=request[REQUEST_ID], heartbeat_s=self._limits.heartbeat_s)
        deployment = request.match_info.get("deployment")
        if endpoint.form is None:
            parsed = parse_request(endpoint, await read_body(request, self._limits), deployment=deployment)
            call = await self._stored_responses.with_previous(prepare_call(parsed, user, policy, client))
            return await self._carried(call, client)
        spool = Spool()
        try:
            form = await read_form(request, spool, self._limits)
            parsed = parse_form_request(endpoint, form, deployment=deployment)
            call = prepare_call(parsed, user, policy, client, spool=spool)
        except BaseException:
            spool.close()
            raise
        return await self._carried(call, client)

    async def _kept(self, kept: StoredResponsePath, request: web.Request) -> web.StreamResponse:
        # Not in a task of its own: nothing is on the books of it, so it may end with its client.
        policy = self._policies.current
        user = identify(request.headers.items(), policy)
        client = WebResponder(request, id=request[REQUEST_ID], heartbeat_s=self._limits.heartbeat_s)
        asked = StoredResponseQuery(kept, request.match_info["id"], list(request.query.items()), user, policy)
        await self._stored_responses.forward(asked, client)
        assert client.response is not None, "what was passed on was answered"
        return client.response

    async def _carried(self, call: Call, client: WebResponder) -> web.StreamResponse:
        carrying = self.calls.start("call", self._carry(call))
        try:
            error = await asyncio.shield(carrying)
        except asyncio.CancelledError:
            client.note_disconnect()
            raise
        if error is not None:
            raise error
        assert client.response is not None, "a call that was carried was answered"
        return client.response

    async def _carry(self, call: Call) -> ProxyError | None:
        # What went wrong is a result here, not an exception: whose client has gone has nobody to raise it to.
        try:
            await self._relay.carry(call)
        except ProxyError as error:
            return error
        except Exception as error:
            log.error("a call failed", exc_info=error, call=call.client.id)
            if not call.client.has_begun:
                return ProxyError("The proxy made a mistake. It has been logged.")
            call.client.abort()
        finally:
            if call.spool is not None:
                call.spool.close()
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
        statuses = quota_statuses(binding, counters, self._now())
        return _json({"object": "list", "data": [each.as_json(policy.zone) for each in statuses.values()]}, request)


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
    return await not_served(request)


def _models_of(user: User, policy: Policy) -> list[str]:
    named = [name for name in policy.models or {} if name != "*"]
    return [name for name in named if policy.serves(user, name)]


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "llm-quota-proxy"}


def _json(value: object, request: web.Request) -> web.Response:
    headers = {**JSON_HEADERS, "x-request-id": request[REQUEST_ID], "server": SERVER_NAME}
    return web.Response(headers=headers, body=dump(value))
