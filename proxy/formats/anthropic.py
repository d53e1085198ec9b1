"""The parts of Anthropic's API (`/v1/messages`) that differ from OpenAI's: versions, betas, errors and usage.

An error is `{"type": "error", "error": {"type", "message", …}, "request_id"}`. Its type follows from the HTTP status.
The members that the proxy adds (`code`, `param`, `reset_at`, …) are inside `error`, as in an OpenAI error. Sources:
Anthropic's published API description and its SDK. Pure.
"""

from collections.abc import Mapping

from proxy.errors import ProxyError
from proxy.formats.usage import read_tokens
from proxy.policy.amounts import Tokens

# The `anthropic-version` that is sent for a client that names none: the first that was published, because every
# compatible server knows it.
VERSION = "2023-06-01"
# The values of `anthropic-beta` that are forwarded for every user. They change neither the price of a token nor what
# a request can reach. They add request fields (effort, system messages between turns, which parts of the history to
# leave out, the scope of a cached prefix), allow thinking between tool calls, report the thinking tokens, and name
# the client. Claude Code 2.1 sends all of them, and the fields of its requests need them.
# Not in the list: `context-1m-…`, whose long inputs cost more; `fast-mode-…`, `compact-…` and `advisor-tool-…`, which
# cost more by themselves; and the betas for files, servers (MCP), skills and the web, which reach other systems.
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
# The input is the sum of these three. At OpenAI the cached tokens are a part of the input; here they stand beside it.
# Example: input_tokens 7, cache_creation_input_tokens 100 and cache_read_input_tokens 1000 are an input of 1107.
_INPUT_PARTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


def error_body(error: ProxyError, request_id: str | None = None) -> dict[str, object]:
    """The JSON body of an error in Anthropic's shape. Members without a value are left out.

    An error event inside a stream has no `request_id`.
    """
    standard = {"type": type_of(error.status), "message": error.message}
    added = {name: value for name, value in (("code", error.code), ("param", error.param)) if value is not None}
    id_member = {} if request_id is None else {"request_id": request_id}
    return {"type": "error", "error": {**standard, **added, **error.members}, **id_member}


def type_of(status: int) -> str:
    """Anthropic's error type for an HTTP status."""
    return _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")


def read_usage(usage: Mapping[str, object]) -> Tokens | None:
    """The tokens in an Anthropic usage object; None if it makes no sense, by the rules of `read_tokens`."""
    # Each part is read by `read_tokens` itself, so that "many" or -7 makes the whole object unreadable.
    parts = [
        read_tokens({"input_tokens": usage[name], "output_tokens": 0})
        for name in _INPUT_PARTS
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
            "output_tokens_details": {"reasoning_tokens": _thinking_tokens(usage)},
        }
    )


def _thinking_tokens(usage: Mapping[str, object]) -> object:
    details = usage.get("output_tokens_details")
    return details.get("thinking_tokens") if isinstance(details, dict) else None
