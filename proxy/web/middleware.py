"""What every request passes: it must be readable in one way only, and every error becomes a response.

This is the one place that turns an error into a response, in the shape of the surface that was asked: OpenAI's, or
Anthropic's on the paths that are its own. That includes what the server library itself refuses.

A request whose framing others in front of us could read differently is refused and its connection closed, so that no
byte behind it is taken for another request (RFC 9112 section 11.2). The library refuses most of it while it reads (two
lengths, a length and a transfer coding, lines that are no HTTP); `validate_request` refuses what it accepts.
"""

import re
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import hdrs, web

from proxy.errors import BadFraming, NotServed, ProxyError
from proxy.formats import messages
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
        body = messages.error_body(error, id)
    return web.Response(status=error.status, headers=headers, body=dump(body))


def _no_such_path(request: web.Request) -> NotServed:
    # As it was sent: decoded, `/v1%2fmodels` would look like a path that is served.
    return NotServed(f"Invalid URL ({request.method} {request.rel_url.raw_path[:200]})")


# RFC 9110 §7.2: a name or an address and perhaps a port; a slash in it could be taken for the beginning of a path.
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]*)(?::[0-9]{0,5})?")


@web.middleware
async def validate_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Handle the request if it can be read in one way only; raises BadFraming."""
    # The target is a path of ours: no other server's URL, and no fragment, which the library would drop.
    if not request.raw_path.startswith("/") and request.raw_path != "*":
        raise BadFraming("Send the path alone in the request line: this is no forward proxy.")
    if "#" in request.raw_path:
        raise BadFraming("The path holds a fragment (#…), which is not for servers.")
    if request.version not in ((1, 0), (1, 1)):
        raise BadFraming("Speak HTTP/1.1 or HTTP/1.0.")
    if not _HOST.fullmatch(request.headers.get(hdrs.HOST, "")):
        raise BadFraming("The Host header names no host.")
    codings = request.headers.getall(hdrs.TRANSFER_ENCODING, [])
    if codings and ([coding.lower() for coding in codings] != ["chunked"] or request.version < (1, 1)):
        raise BadFraming("Transfer-Encoding must be chunked and nothing else, in HTTP/1.1.")
    return await handler(request)
