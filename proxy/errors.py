"""Every way a call can end badly: whose fault it is, the HTTP status, OpenAI's code, and safe words.

    ProxyError
    ├── RequestError          the request has to change; the same one again gets the same answer
    │   ├── InvalidRequest        400
    │   ├── BadFraming            400  where the request ends, or what it asks for, can't be told for sure
    │   ├── NeverFits             400  context_length_exceeded: larger than a limit, agents answer by compacting
    │   ├── InvalidKey            401
    │   ├── ModelNotFound         404
    │   ├── ResponseNotFound      404  no response of this user's, whether or not it is somebody else's
    │   │   └── PreviousNotFound      404  the same, of one that a request goes on from
    │   ├── NotServed             404  a path or method that this proxy does not forward
    │   │   └── NotAllowed            404  one that it knows, with the reason
    │   ├── TooSlow               408  the head or the body took longer than it may
    │   ├── NoUpgrade             426  a WebSocket was asked for, which nothing could meter
    │   ├── BodyTooLarge          413
    │   └── UnsupportedEncoding   415
    ├── ClientLeft            499  the client went while its call waited; nobody reads this
    ├── Refusal               429  the user's own quota; waiting until `reset_at` helps
    ├── UpstreamError         502  the upstream failed, or refused our key
    │   ├── UpstreamBusy          429  the upstream's own rate limit, not a quota of ours
    │   ├── UpstreamExhausted     503  the operator's account at the upstream is used up
    │   └── UpstreamTimeout       504
    └── Unavailable           it can't be taken just now; says when to come back
        ├── TooManyConnections    503  more connections than this listener holds
        ├── NoSpace               503  a large body has no room on the disk
        └── LedgerUnavailable     503  the books can't be written, so nothing is let in

The shape of the body is OpenAI's: `{"error": {"message", "type", "param", "code"}}`, all four always present.
Messages are shown to users: no secrets, no hosts, no text of an upstream that could hold our key.
"""

from collections.abc import Mapping
from typing import ClassVar


class ProxyError(Exception):
    """Something that is answered with an HTTP status and OpenAI's error object.

    `headers` go out with the answer, `members` stand beside the four usual ones inside `error`.
    """

    status: ClassVar[int] = 500
    # Whether the connection is of no more use: the rest of the request is unknown, or nobody wants it.
    closes: ClassVar[bool] = False
    type: str = "api_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        self.members = dict(members or {})

    def body(self) -> dict[str, object]:
        """The JSON body, in OpenAI's shape."""
        usual = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": {**usual, **self.members}}


class RequestError(ProxyError):
    """The client's request is at fault: sending it again unchanged is pointless."""

    status = 400
    type = "invalid_request_error"


class InvalidRequest(RequestError):
    """The body or a parameter can't be understood or isn't allowed; `param` names it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        self.code = code


class BadFraming(RequestError):
    """Two readers of this request could see two requests in it, or it is no HTTP at all (RFC 9112 §11.2)."""

    status = 400
    closes = True
    code = "bad_framing"


class NeverFits(RequestError):
    """The smallest form of this call is larger than a limit, so no reset will ever let it in."""

    code = "context_length_exceeded"


class InvalidKey(RequestError):
    """No key, a wrong one, or two different ones."""

    status = 401
    code = "invalid_api_key"


class ModelNotFound(RequestError):
    """The model doesn't exist here, this user may not use it, or no quota of the user covers it."""

    status = 404
    code = "model_not_found"


class ResponseNotFound(RequestError):
    """There is no such response of this user's. One of somebody else's gets the same answer, to the letter."""

    status = 404


class PreviousNotFound(ResponseNotFound):
    """The same of a response from which a request goes on. Agents begin anew at this code."""

    code = "previous_response_not_found"


class NotServed(RequestError):
    """A path or method that is not forwarded (the list of endpoints is closed)."""

    status = 404


class NotAllowed(NotServed):
    """A path that is known and not forwarded: it would leak, or no quota could count it. The message says why."""

    code = "endpoint_not_allowed"


class TooSlow(RequestError):
    """The request did not come in the time that it may take."""

    status = 408
    closes = True
    code = "request_timeout"


class NoUpgrade(RequestError):
    """A WebSocket was asked for. Clients that can do without go on over HTTP when they see this status."""

    status = 426
    closes = True  # what comes behind it are frames, no requests
    code = "upgrade_not_supported"

    def __init__(self, message: str = "No WebSockets here: send the same request over HTTP.") -> None:
        super().__init__(message, headers={"upgrade": "HTTP/1.1"})  # RFC 9110 §15.5.22


class BodyTooLarge(RequestError):
    """The request's body is over the limit; the connection is closed after the answer."""

    status = 413
    closes = True
    code = "request_too_large"


class UnsupportedEncoding(RequestError):
    """A content coding or a media type that can't be read here."""

    status = 415


class ClientLeft(ProxyError):
    """The client went while its call waited for others. Nothing was sent, nothing is held."""

    status = 499
    code = "client_left"

    def __init__(self, message: str = "The client left while its call waited.") -> None:
        super().__init__(message)


class Refusal(ProxyError):
    """The user's own quota says no. Carries when this very call would be let in."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"

    def __init__(
        self,
        message: str,
        *,
        type: str,
        code: str,
        headers: Mapping[str, str],
        members: Mapping[str, object],
    ) -> None:
        super().__init__(message, headers=headers, members=members)
        self.type = type
        self.code = code


class UpstreamError(ProxyError):
    """The upstream could not be reached, broke, or would not take our key. Never the user's fault.

    `was_sent` says whether the call can have reached it, so that it may have cost something.
    """

    status = 502
    type = "upstream_error"
    code = "upstream_error"

    def __init__(self, message: str, *, was_sent: bool = True, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, headers=headers)
        self.was_sent = was_sent


class UpstreamBusy(UpstreamError):
    """The upstream's own 429: marked as such, because no quota of ours was hit."""

    status = 429
    type = "rate_limit_error"
    code = "upstream_rate_limited"


class UpstreamExhausted(UpstreamError):
    """The account behind our key is used up: for the operator to mend, not for the user."""

    status = 503
    code = "upstream_unavailable"


class UpstreamTimeout(UpstreamError):
    """The upstream took the call and did not answer in time."""

    status = 504
    code = "upstream_timeout"


class Unavailable(ProxyError):
    """It can't be taken just now, whoever asks; who comes back in `retry_after_s` may find it otherwise."""

    status = 503
    type = "server_error"
    words: ClassVar[str]
    retry_after_s: ClassVar[int] = 5

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.words, headers={"retry-after": str(self.retry_after_s)})


class TooManyConnections(Unavailable):
    """This listener holds as many connections as it may."""

    closes = True
    code = "too_many_connections"
    words = "There are too many connections. Try again in a few seconds."


class NoSpace(Unavailable):
    """A body that is too large for memory finds no room on the disk."""

    closes = True
    code = "out_of_space"
    words = "There is no room for so large a body just now. Try again later."
    retry_after_s = 30


class LedgerUnavailable(Unavailable):
    """Nothing can be written down, so nothing is let in (fail closed)."""

    code = "ledger_unavailable"
    words = "The quota ledger can't be reached right now. Try again in a few seconds."
