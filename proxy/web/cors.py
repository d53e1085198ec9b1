"""CORS: the web pages that may call the API from a browser, and the headers that their scripts may read.

Off unless `server.cors` lists origins. Keys are sent in headers and never in cookies, so a page can use only a key
that its user gave it. The list therefore limits the pages into which users may type their keys; it does not protect
the keys.

A browser sends a preflight request (OPTIONS, without a key) before the real one. If the answer does not allow the
origin, the browser sends nothing more.
"""

import re
from collections.abc import Collection

from aiohttp import hdrs, web

_ALLOWED_METHODS = "GET, POST, DELETE, OPTIONS"
# The headers that the browser asks for are echoed one by one, because `*` does not include `authorization` (Fetch
# Standard, "CORS protocol"). Any name of a header (RFC 9110 §5.6.2) may be among them: SDKs send a dozen of their
# own, each release adds more, and the proxy ignores those that it does not know.
_HEADER_NAME = re.compile(r"[a-z0-9!#$%&'+.^_`|~-]{1,80}")
_ECHOED_MAX = 100
# A script can read no other headers. Without `retry-after` and `x-should-retry` in this list, an SDK in a browser
# would retry a call that is refused until the end of the month.
_EXPOSED_HEADERS = (
    "x-request-id x-upstream-request-id retry-after retry-after-ms x-should-retry "
    "x-ratelimit-limit-requests x-ratelimit-limit-tokens x-ratelimit-remaining-requests "
    "x-ratelimit-remaining-tokens x-ratelimit-reset-requests x-ratelimit-reset-tokens "
    "ratelimit ratelimit-policy x-quota-capped x-quota-warning openai-processing-ms openai-version request-id "
    "anthropic-ratelimit-requests-limit anthropic-ratelimit-requests-remaining anthropic-ratelimit-requests-reset "
    "anthropic-ratelimit-tokens-limit anthropic-ratelimit-tokens-remaining anthropic-ratelimit-tokens-reset"
).split()
# How long a browser caches the answer to a preflight. Chrome limits it to two hours.
_MAX_AGE_S = "7200"


class Cors:
    """The CORS headers for pages of the given origins; "*" allows all origins. It `is_on` if there are any."""

    def __init__(self, origins: Collection[str]) -> None:
        self._origins = frozenset(origins)
        self.is_on = bool(origins)

    def answer_preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a request with OPTIONS that is a preflight of an allowed origin; None for any other."""
        if hdrs.ACCESS_CONTROL_REQUEST_METHOD not in request.headers or self._allowed(request) is None:
            return None
        requested = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "").lower().split(",")
        echoed = [name for name in map(str.strip, requested) if _HEADER_NAME.fullmatch(name)]
        headers = {hdrs.ACCESS_CONTROL_ALLOW_METHODS: _ALLOWED_METHODS, hdrs.ACCESS_CONTROL_MAX_AGE: _MAX_AGE_S}
        if echoed:
            headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = ", ".join(echoed[:_ECHOED_MAX])
        return web.Response(status=204, headers=headers)

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Add the CORS headers to a response, whatever its status.

        It is a signal handler of `on_response_prepare`: a streamed response is sent before the handler returns it.
        """
        if "*" not in self._origins:
            # The headers depend on the origin, so a cache must not give this response to a page of another origin.
            response.headers[hdrs.VARY] = hdrs.ORIGIN
        if (allowed := self._allowed(request)) is not None:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = allowed
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = ", ".join(_EXPOSED_HEADERS)

    def _allowed(self, request: web.Request) -> str | None:
        """The value of Access-Control-Allow-Origin; None if the origin is not allowed or the request has none."""
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and "*" in self._origins:
            return "*"
        return origin if origin in self._origins else None
