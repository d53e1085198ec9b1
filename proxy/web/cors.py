"""Cross-origin requests: which web pages may call from a browser, and which headers their scripts may read.

Off unless the config names origins. Keys travel in headers, never in cookies, so a page can only use a key that it
was given: the list bounds where keys are typed in, it does not guard them.
"""

import re
from collections.abc import Collection

from aiohttp import hdrs, web

from proxy.web.middleware import Handler

_ALLOWED_METHODS = "GET, POST, OPTIONS"
# `*` would not stand for authorization (Fetch, "CORS protocol"), so each is named.
_ALLOWED_HEADERS = (
    "authorization content-type api-key x-api-key openai-organization openai-project openai-beta anthropic-version "
    "anthropic-beta anthropic-dangerous-direct-browser-access idempotency-key http-referer x-title x-quota-max-wait"
).split()
# SDKs tell of themselves in a dozen of these, and of others from release to release.
_ECHOED = re.compile(r"x-stainless-[a-z0-9-]{1,60}")
_ECHOED_MAX = 40
# Without these a browser's SDK sees neither when to come back nor that it should not.
_EXPOSED_HEADERS = (
    "x-request-id x-upstream-request-id retry-after retry-after-ms x-should-retry "
    "x-ratelimit-limit-requests x-ratelimit-limit-tokens x-ratelimit-remaining-requests "
    "x-ratelimit-remaining-tokens x-ratelimit-reset-requests x-ratelimit-reset-tokens "
    "ratelimit ratelimit-policy x-quota-capped openai-processing-ms openai-version request-id "
    "anthropic-ratelimit-requests-limit anthropic-ratelimit-requests-remaining anthropic-ratelimit-requests-reset "
    "anthropic-ratelimit-tokens-limit anthropic-ratelimit-tokens-remaining anthropic-ratelimit-tokens-reset"
).split()
# Two hours is the most that Chrome keeps.
_MAX_AGE_S = "7200"


class Cors:
    """What pages of these origins may do; "*" stands for all."""

    def __init__(self, origins: Collection[str]) -> None:
        self._origins = frozenset(origins)

    @web.middleware
    async def answer_preflight(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer what a browser asks before it sends a request, which it does without any key."""
        asks = request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
        if not asks or self._allowed(request) is None:
            return await handler(request)
        asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "").lower().split(",")
        echoed = [name for name in map(str.strip, asked) if _ECHOED.fullmatch(name)]
        headers = {
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: _ALLOWED_METHODS,
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: ", ".join([*_ALLOWED_HEADERS, *echoed[:_ECHOED_MAX]]),
            hdrs.ACCESS_CONTROL_MAX_AGE: _MAX_AGE_S,
        }
        return web.Response(status=204, headers=headers)

    async def mark(self, request: web.Request, response: web.StreamResponse) -> None:
        """Say on an answer, whatever it is, who may read it. For `on_response_prepare`, where streams pass too."""
        if self._origins and "*" not in self._origins:
            response.headers[hdrs.VARY] = hdrs.ORIGIN
        if (allowed := self._allowed(request)) is not None:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = allowed
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = ", ".join(_EXPOSED_HEADERS)

    def _allowed(self, request: web.Request) -> str | None:
        """The origin that is let in; None where it is not, or where no browser is asking."""
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or not self._origins:
            return None
        if "*" in self._origins:
            return "*"
        return origin if origin in self._origins else None
