"""The errors that the proxy answers with: whose fault each is, its HTTP status and code, a message safe to show.

    ProxyError
    ├── RequestError          the request has to change; sent again unchanged, it gets the same answer
    │   ├── InvalidRequest        400
    │   ├── BadFraming            400  two parsers could read the request differently, or it is not HTTP
    │   ├── NeverFits             400  context_length_exceeded: larger than a limit; agents shorten their input
    │   ├── ExceedsQuota          400  exceeds_quota: the answer that it asks for is larger than a limit
    │   ├── InvalidKey            401
    │   ├── ModelNotFound         404
    │   ├── ResponseNotFound      404  the user has no such response, also if another user has it
    │   │   └── PreviousNotFound      404  the same for the response that a request continues
    │   ├── NotServed             404  a path or method that this proxy does not forward
    │   │   └── NotAllowed            404  an endpoint that it knows and does not forward, with the reason
    │   ├── TooSlow               408  the head or the body of the request took too long
    │   ├── NoUpgrade             426  the client asked for a WebSocket, which the proxy cannot meter
    │   ├── BodyTooLarge          413
    │   └── UnsupportedEncoding   415
    ├── ClientLeft            499  the client disconnected while its call waited, so nobody reads this
    ├── Refusal               429  the user's own quota; it helps to wait until `reset_at`
    ├── TooManyReads          429  the user reads stored responses too often; no quota is involved
    ├── UpstreamError         502  the upstream failed, or refused the proxy's key
    │   ├── UpstreamBusy          429  the upstream's own rate limit, not a quota of the proxy
    │   ├── UpstreamExhausted     503  the operator's account at the upstream is used up
    │   ├── UpstreamWithoutKey    503  the proxy's key for the upstream could not be fetched yet
    │   ├── UpstreamFull          503  the upstream has `max_in_flight` calls already; it helps to wait
    │   ├── UpstreamTimeout       504
    │   └── UpstreamUnreadable    502  it compressed its answer in an unknown way; another one may be asked
    ├── InternalError         500  a fault of the proxy itself; only the log says which
    └── Unavailable           the proxy cannot take the call now; `Retry-After` says when to try again
        ├── TooManyConnections    503  the listener has as many connections as it may have
        ├── TooManyStreams        503  as many streams of events are open as may be
        ├── NoSpace               503  the disk has no space for a large body
        ├── BodyMemoryFull        503  the memory for large bodies is taken by others
        ├── BodiesWaitTooLong     503  too many large bodies are being read at the same time
        ├── LedgerUnavailable     503  the ledger cannot be written, so no call is admitted
        └── DirectoryUnavailable  503  the users cannot be read, and the key is not in memory

The body has OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`; all four members are always present.
Users see the messages: they contain no secrets, no hosts, and no text of an upstream that could contain the proxy's
key.
"""

from collections.abc import Mapping
from typing import ClassVar


class ProxyError(Exception):
    """An error that is answered with an HTTP status and OpenAI's error object.

    `headers` are added to the response, and `members` to the four usual members of `error`.
    """

    status: int = 500
    # Whether the connection is closed after the response, because the rest of the request cannot or will not be read.
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
        """The JSON body in OpenAI's shape."""
        usual = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": {**usual, **self.members}}


class InternalError(ProxyError):
    """A fault of the proxy itself. The text of an exception may contain anything, so only the log has it."""

    def __init__(self, message: str = "Internal error of the proxy. It has been logged.") -> None:
        super().__init__(message)


class RequestError(ProxyError):
    """The request is at fault: sending it again unchanged gets the same answer."""

    status = 400
    type = "invalid_request_error"


class InvalidRequest(RequestError):
    """The body or a parameter is invalid or not allowed; `param` names it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        self.code = code


class BadFraming(RequestError):
    """Two parsers could read two different requests here (RFC 9112 §11.2), or it is not HTTP at all."""

    status = 400
    closes = True
    code = "bad_framing"


class NeverFits(RequestError):
    """The smallest form of this call is larger than a limit because of its input, so no reset helps."""

    code = "context_length_exceeded"


class ExceedsQuota(RequestError):
    """The same because of the answer that it asks for; `param` names the field. A shorter input would not help."""

    code = "exceeds_quota"


class InvalidKey(RequestError):
    """No key, an unknown key, one that is not valid now, or two different keys.

    `reason` is for the log. The message does not say it, so that keys cannot be probed.
    """

    status = 401
    code = "invalid_api_key"

    def __init__(self, message: str, *, reason: str = "unknown") -> None:
        super().__init__(message)
        self.reason = reason


class ModelNotFound(RequestError):
    """The model does not exist here, the user may not use it, or no quota of the user covers it."""

    status = 404
    code = "model_not_found"


class ResponseNotFound(RequestError):
    """The user has no such response. If another user has it, the answer is the same, so that ids cannot be probed."""

    status = 404


class PreviousNotFound(ResponseNotFound):
    """The response that a request continues is not found. Agents start a new conversation at this code."""

    code = "previous_response_not_found"


class NotServed(RequestError):
    """A path or method that is not forwarded: the list of endpoints is closed."""

    status = 404


class NotAllowed(NotServed):
    """A known endpoint that is not forwarded: it would leak data, or no quota can count it. The message says why."""

    code = "endpoint_not_allowed"


class TooSlow(RequestError):
    """The request did not arrive in the time that it may take."""

    status = 408
    closes = True
    code = "request_timeout"


class NoUpgrade(RequestError):
    """The client asked for a WebSocket. Clients that can do without one (Codex) continue over HTTP at this status."""

    status = 426
    closes = True  # the client could send WebSocket frames next, which are not HTTP requests
    code = "upgrade_not_supported"

    def __init__(self, message: str = "WebSockets are not supported. Send the same request over HTTP.") -> None:
        super().__init__(message, headers={"upgrade": "HTTP/1.1"})  # RFC 9110 §15.5.22


class BodyTooLarge(RequestError):
    """The body of the request is larger than allowed. The connection is closed after the response."""

    status = 413
    closes = True
    code = "request_too_large"


class UnsupportedEncoding(RequestError):
    """A content encoding or a media type that the proxy cannot read."""

    status = 415


class ClientLeft(ProxyError):
    """The client disconnected while its call waited for other calls. Nothing was sent and nothing is held."""

    status = 499
    code = "client_left"

    def __init__(self, message: str = "The client disconnected while its call waited.") -> None:
        super().__init__(message)


class Refusal(ProxyError):
    """A quota of the user refuses the call. `headers` and `members` say when this call would be admitted."""

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


class TooManyReads(ProxyError):
    """The user reads stored responses too often. `Retry-After` says in how many seconds the next read is possible."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"


class UpstreamError(ProxyError):
    """The upstream could not be reached, failed, or refused the proxy's key. It is never the user's fault.

    `was_sent` says whether the call may have reached the upstream, and so may have cost something. `may_be_moved`
    says that nothing of an answer came within the operator's `first_byte_timeout`: the call may still run, but the
    operator wants another upstream to get it. `reason` is for the log: it may name hosts, which the message must not.
    By default it is the message.
    """

    status = 502
    type = "upstream_error"
    code = "upstream_error"
    may_be_moved: bool = False

    def __init__(
        self,
        message: str,
        *,
        was_sent: bool = True,
        headers: Mapping[str, str] | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message, headers=headers)
        self.was_sent = was_sent
        self.reason = reason or message


class UpstreamBusy(UpstreamError):
    """The upstream's own 429. The code says so, because no quota of the proxy refused the call."""

    status = 429
    type = "rate_limit_error"
    code = "upstream_rate_limited"


class UpstreamExhausted(UpstreamError):
    """The account of the proxy's key is used up: only the operator can change that, not the user."""

    status = 503
    code = "upstream_unavailable"


class UpstreamWithoutKey(UpstreamError):
    """The proxy's key for the upstream has to be fetched, and no attempt has succeeded yet. Nothing was sent."""

    status = 503
    code = "upstream_key_unavailable"


class UpstreamFull(UpstreamError):
    """Every upstream of the model has as many calls as it may have, and none ended while the call could wait."""

    status = 503
    code = "upstream_full"


class UpstreamTimeout(UpstreamError):
    """The upstream took the call and did not answer in time."""

    status = 504
    code = "upstream_timeout"


class UpstreamUnreadable(UpstreamError):
    """The upstream's answer can't be decompressed from its beginning on, so nobody gets it.

    It is raised with `was_sent=False`: the call is free, and another upstream may answer it.
    """

    code = "upstream_unreadable"


class Unavailable(ProxyError):
    """The proxy cannot take the call of any user now. It may help to try again after `retry_after_s` seconds."""

    status = 503
    type = "server_error"
    default_message: ClassVar[str]
    retry_after_s: ClassVar[int] = 5

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.default_message, headers={"retry-after": str(self.retry_after_s)})


class TooManyConnections(Unavailable):
    """This listener has as many connections as it may have."""

    closes = True
    code = "too_many_connections"
    default_message = "There are too many connections. Try again in a few seconds."


class TooManyStreams(Unavailable):
    """As many streams of events are open as this process may have."""

    code = "too_many_streams"
    default_message = "There are too many open streams of events. Try again in a few seconds."


class NoSpace(Unavailable):
    """A body that is too large for memory does not fit on the disk either."""

    closes = True
    code = "out_of_space"
    default_message = "The proxy has no disk space left for a body of this size. Try again later."
    retry_after_s = 30


class BodyMemoryFull(Unavailable):
    """The large bodies of calls in flight take all of the memory that is set aside for them."""

    closes = True
    code = "out_of_memory"
    default_message = (
        "The proxy has no memory left for a body of this size while other large calls are in flight. "
        "Try again in a few seconds, or send a shorter body."
    )


class BodiesWaitTooLong(Unavailable):
    """Large bodies are read one after another, and too many of them wait."""

    code = "too_many_large_bodies"
    default_message = (
        "The proxy is reading too many large bodies. Try again in a few seconds, or send a shorter body."
    )


class LedgerUnavailable(Unavailable):
    """Nothing can be written to the ledger, so no call is admitted (fail closed)."""

    code = "ledger_unavailable"
    default_message = "The quota ledger can't be reached right now. Try again in a few seconds."


class DirectoryUnavailable(Unavailable):
    """The directory of users can't be read, and the key of this request is not in memory."""

    code = "directory_unavailable"
    default_message = "The users can't be looked up right now. Try again in a few seconds."


def drop_frames(error: BaseException) -> None:
    """Drop the tracebacks of an error that has been handled, and of the errors that led to it.

    A traceback refers to the frames that the error passed, and a frame to its variables: a request's body, say. If
    one of the variables is the error itself, only the garbage collector frees that cycle. The HTTP library has such
    variables, and an error of a connection has the error of the socket among its `args`.
    """
    pending: list[object] = [error]
    seen: set[int] = set()
    while pending:
        found = pending.pop()
        if isinstance(found, BaseException) and id(found) not in seen:
            seen.add(id(found))
            pending += (found.__cause__, found.__context__, *found.args)
            found.__traceback__ = found.__cause__ = found.__context__ = None
