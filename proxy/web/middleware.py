"""The one place that turns an error into a response: OpenAI's shape for everything, also for what the server
library itself says no to, and Anthropic's on the paths that are its own."""

from collections.abc import Awaitable, Callable

import structlog
from aiohttp import hdrs, web

from proxy.errors import NotServed, ProxyError
from proxy.formats import anthropic
from proxy.formats.endpoints import is_messages_path
from proxy.formats.strict_json import dump
from proxy.upstreams.headers import JSON_HEADERS, SERVER_NAME

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REQUEST_ID = web.RequestKey("request_id", str)

log = structlog.get_logger("answering")


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error in the shape of the surface that was asked, with the request's id."""
    try:
        return await handler(request)
    except ProxyError as error:
        response = error_response(error, request)
        if error.closes or hdrs.EXPECT in request.headers:
            # The rest of the request is unknown; also of a client that asked before it sent its body, and may not.
            response.force_close()
        return response
    except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
        return error_response(_no_such_path(request), request)
    except Exception as error:
        log.error("a request failed", exc_info=error, request=request.get(REQUEST_ID))
        return error_response(ProxyError("The proxy made a mistake. It has been logged."), request)


async def not_served(request: web.Request) -> web.StreamResponse:
    """The handler of every path that is not served."""
    raise _no_such_path(request)


def error_response(error: ProxyError, request: web.BaseRequest) -> web.Response:
    """The answer that an error is."""
    headers = {**JSON_HEADERS, "server": SERVER_NAME, **error.headers}
    id = request.get(REQUEST_ID)
    if id is not None:
        headers["x-request-id"] = id
    body = error.body()
    if is_messages_path(request.path):
        headers |= {} if id is None else {"request-id": id}
        body = anthropic.error_body(error, id)
    return web.Response(status=error.status, headers=headers, body=dump(body))


def _no_such_path(request: web.Request) -> NotServed:
    # As it was sent: decoded, `/v1%2fmodels` would look like a path that is served.
    return NotServed(f"Invalid URL ({request.method} {request.rel_url.raw_path[:200]})")
