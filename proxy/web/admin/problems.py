"""The errors of the admin listener as problem details (RFC 9457), also those that other packages raise.

A problem has a `type`, which stays the same from release to release and is for programs, and a `detail` for people.
If a field of the request is wrong, `field` is its name, with dots between the names of nested fields. `errors` has
all wrong fields if there are several.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import orjson
import structlog
from aiohttp import hdrs, web
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from proxy.administration.change import ChangeRefused, Conflict, NotFound, PreconditionFailed
from proxy.errors import InvalidKey, ProxyError, Unavailable, drop_frames
from proxy.ledger.store import StoreRefused, StoreUnavailable
from proxy.web.middleware import LOG_LINE, Handler

# Problems have paths below this one as their types. They are names and are not served.
TYPES = "/admin/api/problems/"
CONTENT_TYPE = "application/problem+json"

# The end of the type → HTTP status and title.
PROBLEMS: Mapping[str, tuple[int, str]] = {
    "bad-request": (400, "The request can't be read"),
    "key-in-url": (400, "A key is in the URL"),
    "unauthenticated": (401, "A valid admin key is needed"),
    "closed": (403, "The admin API is closed"),
    "forbidden": (403, "This role may not do this"),
    "cross-site": (403, "The request comes from another site"),
    "not-found": (404, "There is no such resource"),
    "method-not-allowed": (405, "This path does not have this method"),
    "timeout": (408, "The request came too slowly"),
    "conflict": (409, "The state of the resource does not allow it"),
    "precondition-failed": (412, "The resource was changed meanwhile"),
    "too-large": (413, "The body is too large"),
    "unsupported-type": (415, "The body has another type than this endpoint takes"),
    "wrong-host": (421, "The request is addressed to another host"),
    "validation": (422, "A field is wrong"),
    "precondition-required": (428, "The version that is to be changed must be named"),
    "too-many-failures": (429, "Too many wrong keys came from this address"),
    "internal": (500, "Internal error"),
    "unavailable": (503, "The database can't be reached"),
    "too-many-streams": (503, "Too many streams of events are open"),
}
# The problems for changes that are refused. Of all others, a field is wrong.
_BY_REFUSAL = {NotFound: "not-found", Conflict: "conflict", PreconditionFailed: "precondition-failed"}
# The problems for other errors of the proxy, which know only their status.
_BY_STATUS = {400: "bad-request", 404: "not-found", 408: "timeout", 413: "too-large", 415: "unsupported-type"}
# What is said instead of pydantic's text.
_MESSAGES = {"extra_forbidden": "there is no such field", "missing": "this is missing"}
_ERRORS_MAX = 20
_NAME_MAX = 100
_RETRY_AFTER_S = 5

log = structlog.get_logger("admin")


@dataclass(frozen=True, slots=True)
class FieldError:
    """What is wrong with one field."""

    field: str
    detail: str


@dataclass(frozen=True, slots=True)
class ProblemDetails:
    """An error, as RFC 9457 defines it. `type` names the kind of problem; `field` is the field that is wrong."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    field: str | None = None
    errors: tuple[FieldError, ...] = ()


class Problem(ProxyError):
    """An error of the admin listener. `code` is a key of `PROBLEMS`."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        field: str | None = None,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail, param=field, headers=headers)
        self.code = code
        self.status, self.title = PROBLEMS[code]
        self.errors = tuple(errors)

    def details(self, request_id: str) -> ProblemDetails:
        """The body of the answer."""
        return ProblemDetails(
            type=f"{TYPES}{self.code}",
            title=self.title,
            status=self.status,
            detail=self.message,
            request_id=request_id,
            field=self.param,
            errors=self.errors,
        )


@web.middleware
async def answer_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Convert every exception of the handler to a problem."""
    try:
        return await handler(request)
    except Exception as error:
        line = request[LOG_LINE]
        if request.writer.output_size > 0:  # a stream has begun, so there can't be another answer: it is cut off
            log.error("an answer was cut off", exc_info=error, request=line.request_id)
            raise
        problem = problem_of(error)
        if problem.code == "internal":
            log.error("a request failed", exc_info=error, request=line.request_id)
        response = web.Response(
            status=problem.status,
            headers={**problem.headers, "content-type": CONTENT_TYPE},
            body=orjson.dumps(problem.details(line.request_id)),
        )
        # As `middleware.response_to` does: it is unknown where the next request begins.
        if (isinstance(error, ProxyError) and error.closes) or hdrs.EXPECT in request.headers:
            response.force_close()
        line.error = error if isinstance(error, InvalidKey) else problem  # which has the reason for the log
        drop_frames(error)
        return response


def problem_of(error: Exception) -> Problem:
    """The problem that an exception is answered with."""
    match error:
        case Problem():
            return error
        case ChangeRefused():
            return Problem(_BY_REFUSAL.get(type(error), "validation"), _sentence(str(error)), field=error.field)
        case ValidationError():
            return invalid("validation", error)
        case StoreRefused():
            return Problem("validation", "The database can't store one of these values.")
        case StoreUnavailable() | TimeoutError() | Unavailable():
            return Problem(
                "unavailable",
                "The database can't be reached right now. Try again in a few seconds.",
                headers={"retry-after": str(_RETRY_AFTER_S)},
            )
        case InvalidKey():
            return Problem("unauthenticated", error.message, headers={"www-authenticate": "Bearer"})
        case web.HTTPMethodNotAllowed():
            return method_not_allowed(error.method, error.allowed_methods)
        case web.HTTPNotFound():
            return Problem("not-found", "There is nothing at this path.")
        case ProxyError() if error.status in _BY_STATUS:
            return Problem(_BY_STATUS[error.status], error.message, headers=error.headers)
    return Problem("internal", "Internal error of the proxy. It has been logged.")


def method_not_allowed(method: str, allowed: Iterable[str]) -> Problem:
    """The 405 of a path that has other methods."""
    names = ", ".join(sorted(allowed))
    return Problem("method-not-allowed", f"This path has {names}.", headers={"allow": names})


def invalid(code: str, error: ValidationError) -> Problem:
    """What pydantic found in a query or body. No value is repeated."""
    found = list(_field_errors(error))
    [first, *others] = found
    shown = f"{first.field}: {first.detail}" if first.field else first.detail
    return Problem(code, _sentence(shown), field=first.field or None, errors=found if others else ())


def _field_errors(error: ValidationError) -> Iterator[FieldError]:
    for detail in error.errors(include_url=False, include_input=False)[:_ERRORS_MAX]:
        yield FieldError(".".join(str(step)[:_NAME_MAX] for step in detail["loc"]), _text(detail))


def _text(detail: ErrorDetails) -> str:
    if detail["type"] == "value_error":  # of one of our own rules
        return str(detail["ctx"]["error"])
    return _MESSAGES.get(detail["type"], detail["msg"])


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."
