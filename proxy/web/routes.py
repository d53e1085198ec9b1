"""The API listener: the paths of `formats.endpoints`, the list of models and the caller's quotas. Others are a 404.

A request passes these steps in order:

1. `serve` finds metered paths by themselves. In `_answer_request` the request gets its id and is validated.
2. `_metered_call` identifies the user by the key, then reads and parses the body.
3. `_answer` runs the call to its settlement.

If the client disconnects, `listener` cancels the handler, but not while the call runs: then the call is told, and
goes on or stops as the policy says (see `calls.disconnect`).
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import structlog
from aiohttp import hdrs, web

from proxy.calls.call import Call, no_such_model, prepare_call
from proxy.calls.log_line import LogLine
from proxy.calls.recorded_names import OTHER, logged_name
from proxy.calls.relay import Relay, Renew
from proxy.calls.stored_responses import StoredResponseQuery, StoredResponses
from proxy.config.loader import Settings
from proxy.config.reload import Policies
from proxy.errors import (
    ClientLeft,
    DirectoryUnavailable,
    InternalError,
    InvalidKey,
    NotAllowed,
    NotServed,
    NoUpgrade,
    ProxyError,
    drop_frames,
)
from proxy.formats.endpoints import (
    METERED,
    PREFIXES,
    STORED_RESPONSE_PATHS,
    Endpoint,
    StoredResponsePath,
    closed,
    known_beginning,
)
from proxy.formats.request import Request, parse_form_request, parse_request
from proxy.formats.strict_json import reading_cost
from proxy.identity.authentication import Caller, Snapshot
from proxy.identity.client_address import client_address
from proxy.identity.directory import Cuts
from proxy.tasks import Tasks
from proxy.upstreams.models import shows_account
from proxy.upstreams.spool import Spool
from proxy.web.body import defer_continue, read_body, read_form
from proxy.web.body_memory import BodyMemory, BodyShare
from proxy.web.cors import Cors
from proxy.web.events import Events
from proxy.web.health import HEALTH_PATHS, Health
from proxy.web.listener import note_valid_key, when_lost
from proxy.web.middleware import (
    IS_OUTSIDE_PREFIX,
    LOG_LINE,
    Handler,
    add_server_name,
    json_response,
    not_served,
    response_to,
    validate_request,
)
from proxy.web.pages.files import Page
from proxy.web.request_log import RequestLog
from proxy.web.response import WebResponder
from proxy.web.self_service import SelfService, can_name

log = structlog.get_logger("routes")


@dataclass(slots=True)
class _Running:
    """A request whose caller is identified. `call` is the task of its call, once that runs."""

    request: web.Request
    line: LogLine
    call: asyncio.Task[object] | None = None


class _Metered(NamedTuple):
    """A path of a metered call, as the router would find it: `match` is its result, which all requests share.

    `shown` is the path as the log shows it until its caller is identified.
    """

    handler: Handler
    match: web.UrlMappingMatchInfo
    shown: str


class Api:
    """The handlers of the API listener. `calls` has the tasks of the calls in flight.

    `now` returns the time in milliseconds since the epoch, by the ledger's clock.
    """

    def __init__(
        self,
        policies: Policies[Snapshot],
        stored_responses: StoredResponses,
        *,
        relay: Relay,
        settings: Settings,
        request_log: RequestLog,
        now: Callable[[], int],
    ) -> None:
        self.calls = Tasks()
        self._running: dict[str, _Running] = {}  # by the ids of their requests
        self._metered: dict[str, _Metered] = {}  # by their paths
        self._policies = policies
        self._stored_responses = stored_responses
        self._ledger = stored_responses.ledger
        self._model_lists = relay.model_lists
        self._relay = relay
        self._cors = Cors(settings.cors)
        self._trusted_proxies = settings.trusted_proxies
        self._prefix = settings.prefix
        self._limits = settings.connection_limits
        self._memory = BodyMemory(settings.connection_limits.body_memory_bytes)
        self._now = now
        self._request_log = request_log
        self._page = Page(
            "usage", path="/usage", files="/usage", is_served=lambda: policies.current.policy.self_service
        )

    def end_calls_of(self, cuts: Cuts) -> None:
        """End at once what these keys and users have running here, and the calls with these ids.

        A call is settled and charged what it has used, as at a stop; also one whose client has left and whose answer
        is only read to its end. Uploads, and requests for lists and stored responses, have nothing to settle. Then
        the connections are cut: a client sees a stream that breaks off, or a connection that is closed without an
        answer. If it tries again it gets a 401.
        """
        users = {user.subject for user in cuts.users}

        def is_cut(running: _Running) -> bool:
            caller, id = running.line.caller, running.line.request_id
            assert caller is not None, "identified before it is one of these"
            return caller.key.id in cuts.key_ids or caller.user in users or id in cuts.call_ids

        chosen = list(filter(is_cut, self._running.values()))
        for running in chosen:
            if running.call is None:
                _cut_connection(running.request)
            else:
                # Not before it has ended: a client that disconnects may be a reason to read the answer to its end.
                running.call.add_done_callback(partial(_cut_connection, running.request))
                running.call.cancel()
        if chosen:
            log.warning("calls were ended by an administrator", requests=len(chosen))

    def application(self, health: Health, events: Events) -> web.Application:
        """The application, with the paths of `health`. A `Listener` has to serve it with `serve`."""
        self_service = SelfService(self._identify, self._ledger, events=events, now=self._now)
        application = web.Application(middlewares=[self._answer_other])
        application.on_response_prepare.append(add_server_name)
        if self._cors.is_on:
            application.on_response_prepare.append(self._cors.add_headers)
        application.router.add_routes([*health.routes(), *self._page.routes()])
        for endpoint in METERED:
            handler = partial(self._metered_call, endpoint)
            for path in (*(prefix + endpoint.path for prefix in PREFIXES), *endpoint.aliases):
                route = application.router.add_post(path, handler, expect_handler=defer_continue)
                match = web.UrlMappingMatchInfo({}, route)
                match.add_app(application)
                match.freeze()
                self._metered[path] = _Metered(handler, match, shown=f"{hdrs.METH_POST} {path}")
            if endpoint.has_deployments:
                # `.+` also matches slashes, which are in the names of OpenRouter's models.
                path = "/openai/deployments/{deployment:.+}" + endpoint.path
                application.router.add_post(path, handler, expect_handler=defer_continue)
        for prefix in PREFIXES:
            for stored in STORED_RESPONSE_PATHS:
                application.router.add_route(
                    stored.method,
                    prefix + stored.path("{id}"),
                    partial(self._stored_response, stored),
                    expect_handler=defer_continue,
                )
            application.router.add_get(prefix + "/models", self._models)
            application.router.add_get(prefix + "/models/{model:.+}", self._model)
            application.router.add_routes(self_service.routes(prefix))
        # Every other path is a 404 of ours. The library's own would answer `Expect: 100-continue` with 100.
        application.router.add_route("*", "/{anything:.*}", _other_path, expect_handler=defer_continue)
        return application

    async def serve(self, application: Handler, request: web.Request) -> web.StreamResponse:
        """Answer any request. A metered path is found here by one look-up, without the application's router."""
        metered = self._metered.get(request.rel_url.raw_path) if request.method == hdrs.METH_POST else None
        if metered is None:
            return await application(request)
        request._match_info = metered.match  # as the application sets it, for the hooks that add headers
        return await self._answer_request(request, metered.handler, shown=metered.shown, is_served=True)

    @web.middleware
    async def _answer_other(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer a request whose path the router has found, or has not found.

        The log shows its method and path with nothing that a client chose: `GET /v1/responses/{id}`.
        """
        route = request.match_info.route
        resource = None if route.handler is _other_path else route.resource
        method = request.method if request.method in hdrs.METH_ALL else "…"
        path = known_beginning(request.rel_url.raw_path) if resource is None else resource.canonical
        return await self._answer_request(request, handler, shown=f"{method} {path}", is_served=resource is not None)

    async def _answer_request(
        self, request: web.Request, handler: Handler, *, shown: str, is_served: bool
    ) -> web.StreamResponse:
        """Answer a request, also if it has an error, and log it. Every request passes here."""
        address = client_address(request.remote, request.headers, self._trusted_proxies)
        line = request[LOG_LINE] = self._request_log.begin(shown, address=address, headers=request.headers)
        line.is_served = is_served
        response: web.StreamResponse | None = None
        try:
            if request.method == hdrs.METH_OPTIONS:
                response = self._cors.answer_preflight(request)
            if response is None:
                self._check(request)
                response = await handler(request)
        except Exception as error:  # noqa: BLE001 - `response_to` logs those that are no answers of ours
            response = response_to(error, request)
        finally:
            if not line.is_call:
                status = None if response is None else response.status
                if request.path not in HEALTH_PATHS and not self._page.has_served(request, status):
                    await self._note_caller(request, line)
                    self._request_log.write(line, status or line.sent_status or ClientLeft.status)
                self._running.pop(line.request_id, None)  # that of a call ends with the call
        return response

    def _check(self, request: web.Request) -> None:
        """Check what has to be right of every request. Raises BadFraming, NotServed and NoUpgrade."""
        validate_request(request)
        if self._prefix and request.get(IS_OUTSIDE_PREFIX) and request.path not in HEALTH_PATHS:
            raise NotServed(
                f"Nothing is served at this path: all paths of this API begin with {self._prefix}, and the base_url "
                f"of an SDK ends in {self._prefix}/v1."
            )
        # Codex tries a WebSocket first and, on this status (426), sends the call over HTTP.
        upgrade = request.headers.get(hdrs.UPGRADE, "")
        if upgrade and hdrs.SEC_WEBSOCKET_KEY in request.headers and "websocket" in upgrade.lower():
            raise NoUpgrade

    async def _note_caller(self, request: web.Request, line: LogLine) -> None:
        """Find out whose request was answered before its key was looked at, such as one for an unknown path."""
        if line.caller is None and not isinstance(line.error, InvalidKey | DirectoryUnavailable):
            with suppress(ProxyError):
                await self._identify(request)

    async def _identify(self, request: web.Request) -> tuple[Snapshot, Caller]:
        """What is in force, and who is calling. Raises InvalidKey.

        The snapshot is read once, so that the user is one of the same version of the policy.
        """
        snapshot, line = self._policies.current, request[LOG_LINE]
        authentication, changes = snapshot.authentication, None
        directory = authentication.directory
        try:
            # Once more if a key or user was changed meanwhile: what was read may be from before the change, and the
            # calls that the change cuts off were ended before this one could be found.
            while changes != directory.changes:
                changes = directory.changes
                caller = await authentication.identify(request.headers, request.remote, line.address)
        except InvalidKey as error:
            self._relay.metrics.unauthorized(error.reason)
            raise
        line.caller = caller
        note_valid_key(request)
        if line.request_id not in self._running:
            self._running[line.request_id] = _Running(request, line)
        return snapshot, caller

    def _renewal(self, snapshot: Snapshot, request: web.Request, client: WebResponder) -> Renew:
        """Prepares the call of this request anew if the policy, or a user or key, has changed.

        `snapshot` is the one by which its caller was just identified. A call that is not admitted yet is then
        identified and checked like one that comes now.
        """
        seen, changes = snapshot, snapshot.authentication.directory.changes

        async def renew(call: Call) -> Call:
            nonlocal seen, changes
            current = await self._policies.confirmed()
            if current is seen and current.authentication.directory.changes == changes:
                return call
            seen, caller = await self._identify(request)
            changes = seen.authentication.directory.changes
            prepare = partial(prepare_call, call.request, caller, seen, client, spool=call.spool)
            call = await self._relay.threads.run(prepare, cost=call.request.body.cost)
            return await self._stored_responses.with_previous(call)

        return renew

    async def _metered_call(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        snapshot, caller = await self._identify(request)
        line = request[LOG_LINE]
        line.endpoint = endpoint.name
        client = WebResponder(request, line, heartbeat_s=self._limits.heartbeat_s)
        renew = self._renewal(snapshot, request, client)
        deployment = request.match_info.get("deployment")
        check_large = partial(self._relay.refuse_if_closed, endpoint, caller, snapshot, client)
        share = BodyShare(self._memory, caller.user, check_large)
        # A form may have 512 MiB, so it is written to the disk. From here on the spool has to be closed and the share
        # freed on every path: here until the call is prepared, then by `_answer`.
        spool = None if endpoint.form is None else Spool()
        try:
            if spool is None:
                body = await read_body(request, self._limits, share)
                cost = reading_cost(body)
                parse = partial(parse_request, endpoint, body, deployment=deployment, cost=cost)
                del body
            else:
                form, cost = await read_form(request, spool, self._limits, share), 0
                parse = partial(parse_form_request, endpoint, form, deployment=deployment)

            def prepare(parse: Callable[[], Request]) -> Call:
                parsed = parse()
                line.model = logged_name(parsed.model, caller=caller, snapshot=snapshot, lists=self._model_lists)
                line.stream = parsed.stream
                return prepare_call(parsed, caller, snapshot, client, spool=spool)

            call = await self._relay.threads.run(prepare, parse, cost=cost)
            del parse  # which has the body: only its parsed values are needed from here on
            call = await self._stored_responses.with_previous(call)
            if share.size:
                call.request.body.when_freed(share.free)  # by the call, as soon as its upstream has answered
        except BaseException:
            share.free()
            if spool is not None:
                spool.close()
            raise
        return await self._answer(call, client, renew, request)

    async def _stored_response(self, path: StoredResponsePath, request: web.Request) -> web.StreamResponse:
        # Not in a task of its own: it reserves nothing, so there is nothing to settle if it is cancelled.
        snapshot, caller = await self._identify(request)
        client = WebResponder(request, request[LOG_LINE], heartbeat_s=self._limits.heartbeat_s)
        query = StoredResponseQuery(
            path,
            response_id=request.match_info["id"],
            parameters=list(request.query.items()),
            caller=caller,
            catalog=snapshot.catalog,
            zone=snapshot.policy.zone,
        )
        await self._stored_responses.forward(query, client)
        assert client.response is not None, "forward() answers or raises"
        return client.response

    async def _answer(
        self, call: Call, client: WebResponder, renew: Renew, request: web.Request
    ) -> web.StreamResponse:
        """Run the call to its settlement, and log it. Returns its response, or raises the error for its client.

        While it runs, a client that disconnects does not cancel this task: the call is told, and decides.
        """
        line = client.line
        line.is_call = True
        task = asyncio.current_task()  # `request.task` is that of the connection
        assert task is not None, "a call runs in a task"
        client.task = self._running[client.id].call = task
        self.calls.enter(task)
        when_lost(request, client.note_disconnect)
        try:
            await self._relay.carry(call, renew)
        except ProxyError as error:
            line.error = error
        except Exception as error:
            log.error("a call failed", exc_info=error, request=client.id)
            drop_frames(error)
            line.error = InternalError()
            if client.has_begun:
                client.abort()  # a part of the answer was sent, so there can't be a status any more
        finally:
            when_lost(request, None)
            call.request.body.free()
            if call.spool is not None:
                call.spool.close()
            self.calls.leave(task)
            del self._running[client.id]
            self._request_log.write(line, line.sent_status or (line.error or ClientLeft()).status)
            if line.model == OTHER and line.outcome == "complete":
                # It may be one that an upstream lists. Then the line of the next call for it has its name.
                for target in call.model.targets:
                    self._model_lists.refresh(target.upstream)
        if client.response is not None:
            return client.response
        raise line.error or ClientLeft  # without an answer and without an error, the client has disconnected

    async def _models(self, request: web.Request) -> web.StreamResponse:
        snapshot, caller = await self._identify(request)
        catalog = snapshot.catalog
        lists = await asyncio.gather(*map(self._model_lists.of, catalog.open_upstreams))
        configured = (*catalog.names, *snapshot.policy.model_names(caller.groups))
        listed = (name for names in lists for name in names if not shows_account(name))
        names = [name for name in dict.fromkeys((*configured, *listed)) if can_name(snapshot, caller, name)]
        ends = {"has_more": False, "first_id": names[0] if names else None, "last_id": names[-1] if names else None}
        data = [_model(name, request) for name in names]
        return json_response({"object": "list", "data": data, **(ends if _is_anthropic(request) else {})}, request)

    async def _model(self, request: web.Request) -> web.StreamResponse:
        snapshot, caller = await self._identify(request)
        name = request.match_info["model"]
        if not can_name(snapshot, caller, name):
            raise no_such_model(name[:200])
        return json_response(_model(name, request), request)


def _cut_connection(request: web.Request, _: object = None) -> None:
    if request.transport is not None:
        request.transport.abort()  # which cancels the handler


async def _other_path(request: web.Request) -> web.StreamResponse:
    """The handler of every other path: a 404, which for a known endpoint says why it is not served."""
    row = closed(request.method, request.path)
    if row is not None:
        raise NotAllowed(f"{request.method} {row.pattern} is not available on this proxy: {row.reason}.")
    return await not_served(request)


def _is_anthropic(request: web.Request) -> bool:
    """Whether the client is one of Anthropic's API, whose SDKs send this header with every request."""
    return "anthropic-version" in request.headers


def _model(name: str, request: web.Request) -> dict[str, object]:
    """An entry of the list of models. The names of Anthropic's members are added for its clients."""
    model = {"id": name, "object": "model", "created": 0, "owned_by": "llm-quota-proxy"}
    anthropic = {"type": "model", "display_name": name, "created_at": "1970-01-01T00:00:00Z"}
    return {**model, **(anthropic if _is_anthropic(request) else {})}
