"""The admin listener: the page, the API, metrics and health. Of these, the API listener serves only health."""

from collections.abc import Awaitable, Callable, Sequence

import orjson
from aiohttp import hdrs, web

from proxy.config.loader import Settings
from proxy.errors import ClientLeft
from proxy.identity.client_address import client_address
from proxy.metrics import Metrics
from proxy.web.admin.access import Access
from proxy.web.admin.openapi import document
from proxy.web.admin.operations import ALL_ROLES, JSON, AdminRequest, NoQuery, Operation, Operations, reads
from proxy.web.admin.problems import answer_problems
from proxy.web.health import HEALTH_PATHS, Health
from proxy.web.middleware import LOG_LINE, Handler, add_server_name, validate_request
from proxy.web.pages.files import SAFE_HEADERS, Page
from proxy.web.request_log import RequestLog

METRICS_PATH = "/metrics"
PAGE_PATH = "/admin/"
# What an answer has unless it says otherwise, as the files of the page do.
_HEADERS = {
    **SAFE_HEADERS,
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


class Admin:
    """The handlers of the admin listener. `operations` are the rows of the API, without that of its document."""

    def __init__(
        self,
        metrics: Metrics,
        health: Health,
        *,
        access: Access,
        operations: Sequence[Operation],
        settings: Settings,
        request_log: RequestLog,
    ) -> None:
        self._metrics = metrics
        self._health = health
        self._access = access
        self._settings = settings
        self._request_log = request_log
        self._page = Page("admin", path=PAGE_PATH, files=PAGE_PATH.rstrip("/"))
        self._rows = [
            *operations,
            reads(
                "/openapi.json",
                self._document,
                "Show this OpenAPI document.",
                answer=dict[str, object],
                roles=ALL_ROLES,
            ),
        ]
        self._document_bytes = b""

    def application(self, after_change: Callable[[], Awaitable[object]]) -> web.Application:
        """The application of the listener. `after_change` is that of `Operations`."""
        application = web.Application(
            middlewares=[
                self._assign_id,  # the outermost, because every answer has the id
                answer_problems,  # outside of the following one, whose errors it answers
                self._check_request,
            ]
        )
        application.on_response_prepare.extend([add_server_name, _add_headers])
        api = Operations(
            self._rows,
            access=self._access,
            limits=self._settings.connection_limits,
            after_change=after_change,
        )
        metrics = web.get(METRICS_PATH, self._metrics_page)
        to_page = [web.get(path, _redirect_to_page) for path in ("/", PAGE_PATH.rstrip("/"))]
        pages = [*self._page.routes(), *to_page]
        application.router.add_routes([*self._health.routes(), metrics, *api.routes(), *pages])
        return application

    @web.middleware
    async def _assign_id(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        address = client_address(request.remote, request.headers, self._settings.trusted_proxies)
        line = request[LOG_LINE] = self._request_log.begin(_shown(request), address=address, headers=request.headers)
        status = None
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            is_watched = request.path in HEALTH_PATHS or (request.path == METRICS_PATH and status == 200)
            if not is_watched and not self._page.has_served(request, status):
                status = status or line.sent_status or ClientLeft.status
                self._request_log.write(line, status, is_counted=False)

    @web.middleware
    async def _check_request(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        validate_request(request)
        # Load balancers ask for health by any name.
        if request.path not in HEALTH_PATHS:
            self._access.check_host(request)
        return await handler(request)

    async def _metrics_page(self, request: web.Request) -> web.Response:
        # Prometheus' text format has the version 0.0.4, and wants it in the content type.
        headers = {"content-type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(headers=headers, body=self._metrics.exposition())

    async def _document(self, request: AdminRequest[NoQuery, None]) -> web.Response:
        if not self._document_bytes:
            self._document_bytes = orjson.dumps(document(self._rows))
        return web.Response(headers={"content-type": JSON}, body=self._document_bytes)


async def _redirect_to_page(request: web.Request) -> web.Response:
    # Relative, because a server in front can have put the listener below a path.
    return web.Response(status=302, headers={"location": PAGE_PATH.lstrip("/")})


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Add what every answer has. A streamed one is sent before its handler returns, so this is no middleware."""
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    if LOG_LINE in request:  # not if the library refuses the header Expect
        response.headers["x-request-id"] = request[LOG_LINE].request_id


def _shown(request: web.Request) -> str:
    """The method and the path for the log, with nothing that a client chose: `GET /admin/api/users/{user}`."""
    resource = request.match_info.route.resource
    method = request.method if request.method in hdrs.METH_ALL else "…"
    return f"{method} {'…' if resource is None else resource.canonical}"
