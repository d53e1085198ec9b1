"""What an upstream's error answer means: who is at fault, what is charged, and what the client gets to see.

    status                          fault                  charged                  the client gets
    4xx except those below          the request's          one request, no tokens   the same answer
    401, 403                        our key's              nothing                  502, with nothing about the key
    402, or a code that means it    our account's          nothing                  503
    429                             the upstream's limit   nothing                  429, marked as the upstream's
    408, 5xx                        the upstream's         nothing                  the same answer, or 502 / 504
    anything else                   the upstream's         nothing                  502

A body is forwarded unchanged if it is an error in OpenAI's shape, or from a kind of upstream with errors of its own
shape (Anthropic). An error in another shape (Ollama, older vLLM, FastAPI) is put into OpenAI's shape, because SDKs
show nothing else. Our key and account are masked in all of them.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

from proxy.errors import InvalidRequest, ProxyError, UpstreamBusy, UpstreamError, UpstreamExhausted, UpstreamTimeout
from proxy.formats.endpoints import SurfaceName
from proxy.formats.kinds import kind_of
from proxy.formats.mask import Mask
from proxy.formats.surfaces import SURFACES
from proxy.policy.catalog import Upstream

# The codes of an account that is used up. Waiting does not help, and the account is not the user's.
_ACCOUNT_CODES = frozenset(
    (
        "insufficient_quota",
        "credit_balance_exhausted",
        "billing_hard_limit_reached",
        "organization_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "project_spend_limit_exceeded",
        "billing_error",  # Anthropic's type
    )
)
# Anthropic has no code for it and answers 400 `invalid_request_error` with a message that begins with this text.
_NO_CREDIT = "Your credit balance is too low"
# How deep a message may be nested. Mistral sends {"message": {"detail": [{"msg": "…"}]}}, which has three levels.
_NESTING_MAX = 4
# Which values of `Retry-After` are forwarded: whole seconds, but not 0, at which some SDKs retry without a pause.
_SECONDS = re.compile(r"[1-9][0-9]{0,5}")


@dataclass(frozen=True, slots=True)
class Rejected:
    """The request was at fault: the upstream's answer is forwarded, and the call is charged one request."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """The upstream failed with an error that is forwarded; nothing is charged."""

    status: int
    body: bytes


def failure_of(
    status: int, body: bytes, retry_after: str | None, upstream: Upstream
) -> Rejected | Failed | ProxyError:
    """What an error answer with this status means. `body` may be incomplete.

    A ProxyError is to be raised, and nothing is charged for it.
    """
    error, is_openai_shape = _read_error(body)
    masked = mask_of(upstream).in_error
    if status in (401, 403):
        # Not a 401: a user who saw one would replace the key that works.
        return UpstreamError("The upstream did not accept the proxy's key. The operator of this proxy has to fix it.")
    if status == 402 or _is_account_used_up(error):
        return UpstreamExhausted(
            "The proxy's account at the upstream is used up. The operator of this proxy has to fix it."
        )
    if status == 429:
        return _rate_limited(error, retry_after, upstream)
    if status == 408 or status >= 500:
        if error is not None and status != 408:
            return Failed(status, masked(body if is_openai_shape else _in_openai_shape(status, error)))
        failure = UpstreamTimeout if status in (408, 504) else UpstreamError
        return failure(f"The upstream failed with status {status}.")
    if 400 <= status < 500:
        if surface := kind_of(upstream.kind).error_surface:
            return Rejected(status, masked(body) if error is not None else _in_shape_of(surface, status))
        return Rejected(status, masked(body if is_openai_shape else _in_openai_shape(status, error)))
    return UpstreamError(f"The upstream sent an answer that can't be forwarded (status {status}).")


def mask_of(upstream: Upstream) -> Mask:
    """What masks our key and account in the answers of this upstream."""
    return _mask_of(upstream.api_key.reveal() if upstream.api_key else "")


@lru_cache(maxsize=256)
def _mask_of(key: str) -> Mask:
    return Mask(key)


def _rate_limited(error: dict[str, Any] | None, retry_after: str | None, upstream: Upstream) -> ProxyError:
    headers = {"retry-after": retry_after} if retry_after and _SECONDS.fullmatch(retry_after) else None
    message = mask_of(upstream).in_error((_message_text(error.get("message")) if error else "").encode()).decode()
    return UpstreamBusy(
        # Masked before it is cut: a key that crossed the edge would leave its first half.
        f"The upstream itself is limiting requests; this is not a quota of this proxy. {message[:500]}".strip(),
        headers=headers,
    )


def _is_account_used_up(error: dict[str, Any] | None) -> bool:
    if error is None:
        return False
    texts = [value for value in map(error.get, ("code", "type", "message")) if isinstance(value, str)]
    return any(text in _ACCOUNT_CODES or text.startswith(_NO_CREDIT) for text in texts)


def _read_error(body: bytes) -> tuple[dict[str, Any] | None, bool]:
    """The members of the error in a body (None: there is no error), and whether it already has OpenAI's shape."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None, False
    if not isinstance(answer, dict):
        return None, False
    error = answer.get("error")
    if isinstance(error, dict):
        has_text = isinstance(error.get("message"), str)
        return error, has_text and all(isinstance(error.get(name), str | None) for name in ("type", "param", "code"))
    # {"error": "text"}: Ollama. {"object": "error", "message": …}: vLLM until 0.10, Mistral. {"detail": …}: FastAPI.
    message = next((value for name in ("error", "message", "detail") if (value := answer.get(name))), None)
    if not _message_text(message):
        return None, False
    return {"message": message, **{name: answer.get(name) for name in ("type", "param", "code")}}, False


def _message_text(message: object) -> str:
    """The text of a message that may be nested. FastAPI sends a list with one entry for each bad field: the first."""
    for _ in range(_NESTING_MAX):
        if isinstance(message, dict):
            message = message.get("msg") or message.get("message") or message.get("detail")
        elif isinstance(message, list):
            message = message[0] if message else None
    return message.strip() if isinstance(message, str) else ""


def _in_openai_shape(status: int, error: dict[str, Any] | None) -> bytes:
    """The error in OpenAI's shape; members that OpenAI does not have are kept."""
    error = error or {}
    type_, param, code = (error.get(name) for name in ("type", "param", "code"))
    event = "refused the request" if status < 500 else "failed"
    shaped = {
        **error,
        "message": _message_text(error.get("message")) or f"The upstream {event} with status {status}.",
        "type": type_ if isinstance(type_, str) else "invalid_request_error" if status < 500 else "upstream_error",
        "param": param if isinstance(param, str) else None,
        # vLLM and llama.cpp send numbers, which strict clients do not accept.
        "code": str(code) if isinstance(code, str | int) and not isinstance(code, bool) else None,
    }
    return orjson.dumps({"error": shaped})


def _in_shape_of(surface: SurfaceName, status: int) -> bytes:
    error = InvalidRequest(f"The upstream refused the request with status {status}.")
    return orjson.dumps(SURFACES[surface].error_body(error))
