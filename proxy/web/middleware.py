"""The steps that every request passes: validation of its framing, and the conversion of every error to a response.

`response_to` is the place that converts every error of a request to a response, in the shape of the API that was
addressed: OpenAI's, or Anthropic's on Anthropic's paths. That includes errors that the server library raises.
`listener` uses `error_response` too, for requests that never reach a handler.

`validate_request` refuses a request that a server in front of the proxy could parse differently, and closes its
connection, so that no byte behind it is taken for another request (RFC 9112 §11.2). The library itself refuses most
of them while it parses: two lengths, a length and a transfer coding, lines that are not HTTP. `validate_request`
refuses those that the library accepts.
"""

import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import structlog
from aiohttp import hdrs, web

from proxy.calls.log_line import LogLine
from proxy.errors import BadFraming, InternalError, NotServed, ProxyError, drop_frames
from proxy.formats import messages
from proxy.formats.endpoints import is_messages_path, served_instead
from proxy.formats.strict_json import dump
from proxy.upstreams.headers import JSON_HEADERS, SERVER_NAME
from proxy.web.response import whole_answer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# What the log will say of a request, with the id that the proxy gives to it. It is set before any other step.
LOG_LINE = web.RequestKey("log_line", LogLine)
# Set by the listener: `server.prefix`, if the path began with it, and that it did not.
PREFIX = web.RequestKey("prefix", str)
IS_OUTSIDE_PREFIX = web.RequestKey("is_outside_prefix", bool)

# RFC 9110 §7.2: a name or an address, and optionally a port. With a slash in it (`Host: proxy/v1/models?`), a server
# that joins host and path to one URL would see another path than this proxy.
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]*)(?::[0-9]{0,5})?")

log = structlog.get_logger("middleware")


# --------------------------------------------------------------------------------------------------------- validation


def validate_request(request: web.Request) -> None:
    """Check that there is only one way to parse the request. Raises BadFraming.

    For example `Transfer-Encoding: gzip, chunked`: the library parses the body as chunked. A server in front that
    compares the value with `chunked` finds no match and may take the body to be empty. The two would disagree about
    where the next request begins, and a client could hide a second request in the body of the first.
    """
    # The target has to be a path of this server. An absolute URL would name another host than the Host header may.
    if not request.raw_path.startswith("/") and request.raw_path != "*":
        raise BadFraming("Send the path alone in the request line: this is no forward proxy.")
    # The library drops a fragment: `/v1/models#/../x` would be served as `/v1/models`, others may resolve the rest.
    if "#" in request.raw_path:
        raise BadFraming("The path has a fragment (#…). Remove it: fragments are not sent to servers.")
    if request.version not in ((1, 0), (1, 1)):
        raise BadFraming("Use HTTP/1.1 or HTTP/1.0.")
    if not _HOST.fullmatch(request.headers.get(hdrs.HOST, "")):
        raise BadFraming("The Host header is not a host name or an address with an optional port.")
    codings = request.headers.getall(hdrs.TRANSFER_ENCODING, [])
    if codings and ([coding.lower() for coding in codings] != ["chunked"] or request.version < (1, 1)):
        raise BadFraming("Transfer-Encoding must be chunked and nothing else, in HTTP/1.1.")


# ------------------------------------------------------------------------------------------------------------- errors


def response_to(error: Exception, request: web.Request) -> web.StreamResponse:
    """The response to an exception of the handler, in the shape of the API that was addressed."""
    match error:
        case ProxyError():
            response = error_response(error, request)
            # The connection is closed if it is unknown where the next request begins. That is so for errors of
            # framing (`closes`), and after `Expect: 100-continue`: a client that gets a final status instead of the
            # 100 may send its body all the same, or leave it out (RFC 9110 §10.1.1).
            if error.closes or hdrs.EXPECT in request.headers:
                response.force_close()
        case web.HTTPNotFound() | web.HTTPMethodNotAllowed():
            response = error_response(_not_served(request), request)
        case _:
            log.error("a request failed", exc_info=error, request=request[LOG_LINE].request_id)
            response = error_response(InternalError(), request)
    drop_frames(error)
    return response


async def add_server_name(request: web.Request, response: web.StreamResponse) -> None:
    """Name this proxy in an answer. The library has already written its name and Python's, with their versions."""
    response.headers["server"] = SERVER_NAME


async def not_served(request: web.Request) -> web.StreamResponse:
    """The handler of every path that is not served: a 404."""
    raise _not_served(request)


def error_response(error: ProxyError, request: web.BaseRequest) -> web.StreamResponse:
    """The response for an error, which the request's line in the log will name."""
    line = request[LOG_LINE]
    line.error = error
    # `add_server_name` is not called for what the listener answers by itself.
    headers = {**JSON_HEADERS, "server": SERVER_NAME, **error.headers, "x-request-id": line.request_id}
    body = error.body()
    if is_messages_path(request.path):
        # Anthropic's SDK reads the id from `request-id`, OpenAI's from `x-request-id`.
        headers["request-id"] = line.request_id
        body = messages.error_body(error, line.request_id)
    return whole_answer(request, error.status, headers, dump(body))


def json_response(value: object, request: web.Request) -> web.StreamResponse:
    """A JSON body with status 200."""
    headers = {**JSON_HEADERS, "x-request-id": request[LOG_LINE].request_id}
    return whole_answer(request, HTTPStatus.OK, headers, dump(value))


def _not_served(request: web.Request) -> NotServed:
    # The path as the client sent it: decoded, `/v1%2fmodels` would look like `/v1/models`, which is served.
    path, prefix = request.rel_url.raw_path, request.get(PREFIX, "")
    instead = served_instead(request.method, path)
    hint = "" if instead is None else f". Use {instead.replace(' /', f' {prefix}/', 1)}."
    return NotServed(f"Invalid URL ({request.method} {prefix}{path[:200]}){hint}")
