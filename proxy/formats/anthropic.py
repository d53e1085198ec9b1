"""What Anthropic's surface (`/v1/messages`) says in words of its own: errors, rate-limit headers, usage.

An error is `{"type": "error", "error": {"type", "message", …}, "request_id"}`. Its type follows from the status; what
we say beside the message (`code`, `reset_at`, …) stays inside `error`, as on OpenAI's surface. Sources: Anthropic's
published API description, and its SDK. Pure.
"""

from collections.abc import Mapping

from proxy.errors import ProxyError
from proxy.formats.usage import read_tokens
from proxy.policy.amounts import Tokens

# What a client that names no version gets: the first that was published, which all servers know.
VERSION = "2023-06-01"
# The betas that pass for everybody: they change neither what a token costs nor what a request reaches. They let a
# request say more (its effort, turns of the system, what of its history to leave out, who shares a cached beginning),
# let a model think between calls of tools, say how much it thought, and name the client. Claude Code asks for all of
# them, and its fields need them. Not so `context-1m-…`, whose long inputs cost more, `fast-mode-…`, `compact-…` and
# `advisor-tool-…`, which do by themselves, nor those of files, servers, skills and the web.
USUAL_BETAS = frozenset(
    (
        "claude-code-20250219",
        "context-management-2025-06-27",
        "effort-2025-11-24",
        "interleaved-thinking-2025-05-14",
        "mid-conversation-system-2026-04-07",
        "prompt-caching-scope-2026-01-05",
        "thinking-token-count-2026-05-13",
    )
)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
# All of these are input; what was read from the cache is not a part of the first, as it is at OpenAI.
_INPUTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


def error_body(error: ProxyError, request_id: str | None = None) -> dict[str, object]:
    """The body of an error, in Anthropic's shape."""
    usual = {"type": type_of(error.status), "message": error.message}
    ours = {name: value for name, value in (("code", error.code), ("param", error.param)) if value is not None}
    named = {} if request_id is None else {"request_id": request_id}
    return {"type": "error", "error": {**usual, **ours, **error.members}, **named}


def type_of(status: int) -> str:
    """The type of an error that is answered with this status."""
    return _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")


def read_usage(usage: Mapping[str, object]) -> Tokens | None:
    """The tokens in a usage of this surface; None where it makes no sense, as `read_tokens` has it."""
    parts = [
        read_tokens({"input_tokens": usage[name], "output_tokens": 0})
        for name in _INPUTS
        if usage.get(name) is not None
    ]
    counts = [part.input for part in parts if part is not None]
    if len(counts) < len(parts):
        return None
    return read_tokens(
        {
            "input_tokens": sum(counts) if counts else None,
            "output_tokens": usage.get("output_tokens"),
            "input_tokens_details": {"cached_tokens": usage.get("cache_read_input_tokens")},
            "output_tokens_details": {"reasoning_tokens": _thinking(usage)},
        }
    )


def _thinking(usage: Mapping[str, object]) -> object:
    details = usage.get("output_tokens_details")
    return details.get("thinking_tokens") if isinstance(details, dict) else None
