"""The one place that turns an error into a response: OpenAI's shape for everything, also for what the server
library itself says no to."""

from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web

from proxy.errors import BodyTooLarge, NotServed, NoUpgrade, ProxyError
from proxy.headers import NAME
from proxy.strict_json import dump

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REQUEST_ID = web.RequestKey("request_id", str)

log = structlog.get_logger("answering")


@web.middleware
async def in_openai_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error as `{"error": {…}}`, with the request's id."""
    try:
        return await handler(request)
    except ProxyError as error:
        response = error_response(error, request)
        if isinstance(error, (BodyTooLarge, NoUpgrade)):
            response.force_close()  # the rest is no request: a body that nobody wants, or frames of a WebSocket
        return response
    except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
        return error_response(NotServed(f"Invalid URL ({request.method} {request.path[:200]})"), request)
    except Exception as error:
        log.error("a request failed", exc_info=error, request=request.get(REQUEST_ID))
        return error_response(ProxyError("The proxy made a mistake. It has been logged."), request)


def error_response(error: ProxyError, request: web.Request) -> web.Response:
    """The answer that an error is."""
    headers = {"content-type": "application/json", "cache-control": "no-store", "server": NAME, **error.headers}
    if REQUEST_ID in request:
        headers["x-request-id"] = request[REQUEST_ID]
    return web.Response(status=error.status, headers=headers, body=dump(error.body()))
