"""What an upstream's failure means: whose fault it was, what is charged, and what the client gets to see.

    4xx (but those below)   the request's fault      one request, no tokens    passed on as it is
    401, 403                our key's                nothing                   502 that says nothing of the key
    402, or a code of it    our account's            nothing                   503
    429                     the upstream's limit     nothing                   429 marked as the upstream's
    408, 5xx                the upstream's           nothing                   passed on, or 502 / 504
    anything else           the upstream's           nothing                   502

A body passes on as it came where it is an error in OpenAI's shape, or in Anthropic's from such an upstream. Where it
says one in another shape (Ollama, older vLLM, FastAPI) its words are put into OpenAI's, in which SDKs show them.
Never with our key or account in it.
"""

import re
from dataclasses import dataclass
from typing import Any

import orjson

from proxy.errors import InvalidRequest, ProxyError, UpstreamBusy, UpstreamError, UpstreamExhausted, UpstreamTimeout
from proxy.formats import anthropic
from proxy.policy.policy import Upstream

# The codes for an account that is used up: waiting does not help, and it is not the user's account.
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
# Anthropic has no code for it, and calls it a bad request.
_NO_CREDIT = "Your credit balance is too low"
# OpenAI names the organisation or project in the text of a 429; Anthropic the organisation, by a UUID.
_ACCOUNT = re.compile(
    rb"\b(?:(?:org|proj)[-_]|wrkspc_)[A-Za-z0-9]{6,}"
    rb'|\borg(?:anization)?(?: id)?[ :=("]{1,4}[0-9a-f]{8}(?:-[0-9a-f]{4,12}){4}',
    re.IGNORECASE,
)
# {"message": {"detail": [{"msg": "…"}]}} is Mistral's.
_WRAPPINGS_MAX = 4
# What passes on of a `Retry-After`: seconds, and not 0, at which some SDKs hammer.
_SECONDS = re.compile(r"[1-9][0-9]{0,5}")


@dataclass(frozen=True, slots=True)
class Rejected:
    """The request was at fault: the upstream's answer passes on, and the call counts as one request."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """The upstream failed with an error that passes on as it is; nothing is charged."""

    status: int
    body: bytes


def failure_of(
    status: int, body: bytes, retry_after: str | None, upstream: Upstream
) -> Rejected | Failed | ProxyError:
    """What an answer with this status means; `body` as far as it was read."""
    error, is_plain = _error_in(body)
    if status in (401, 403):
        return UpstreamError(
            "The upstream did not accept the proxy's key. The operator of this proxy has to mend it."
        )
    if status == 402 or _is_account_used_up(error):
        return UpstreamExhausted("The account behind this proxy is used up. The operator has to mend it.")
    if status == 429:
        return _limited(error, retry_after, upstream)
    if status == 408 or status >= 500:
        if error is not None and status != 408:
            return Failed(status, masked(body if is_plain else _shaped(status, error), upstream))
        kind = UpstreamTimeout if status in (408, 504) else UpstreamError
        return kind(f"The upstream failed with status {status}.")
    if 400 <= status < 500:
        if upstream.kind == "anthropic":
            return Rejected(status, masked(body, upstream) if error is not None else _wrapped(status))
        return Rejected(status, masked(body if is_plain else _shaped(status, error), upstream))
    return UpstreamError(f"The upstream gave an answer that can't be passed on (status {status}).")


def masked(body: bytes, upstream: Upstream) -> bytes:
    """A body without our key and account, should the upstream have repeated them."""
    key = upstream.api_key.reveal().encode() if upstream.api_key else b""
    return _ACCOUNT.sub(b"***", body.replace(key, b"***") if key else body)


def _limited(error: dict[str, Any] | None, retry_after: str | None, upstream: Upstream) -> ProxyError:
    headers = {"retry-after": retry_after} if retry_after and _SECONDS.fullmatch(retry_after) else None
    said = _words(error.get("message")) if error else ""
    text = masked(said.encode(), upstream).decode()
    return UpstreamBusy(
        f"The upstream itself is limiting requests just now; this is no quota of this proxy. {text[:500]}".strip(),
        headers=headers,
    )


def _is_account_used_up(error: dict[str, Any] | None) -> bool:
    if error is None:
        return False
    said = [word for word in map(error.get, ("code", "type", "message")) if isinstance(word, str)]
    return any(word in _ACCOUNT_CODES or word.startswith(_NO_CREDIT) for word in said)


def _error_in(body: bytes) -> tuple[dict[str, Any] | None, bool]:
    """The members of the error that a body says, if it does, and whether it is in OpenAI's shape as it stands."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None, False
    if not isinstance(answer, dict):
        return None, False
    error = answer.get("error")
    if isinstance(error, dict):
        is_plain = isinstance(error.get("message"), str)
        return error, is_plain and all(isinstance(error.get(name), str | None) for name in ("type", "param", "code"))
    # {"error": "text"}: Ollama. {"object": "error", "message": …}: vLLM until 0.10, Mistral. {"detail": …}: FastAPI.
    said = next((value for name in ("error", "message", "detail") if (value := answer.get(name))), None)
    return ({"message": said, **_rest_of(answer)} if _words(said) else None), False


def _rest_of(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: answer.get(name) for name in ("type", "param", "code")}


def _words(said: object) -> str:
    """What a message says, however it is wrapped; FastAPI lists what is wrong with each field."""
    for _ in range(_WRAPPINGS_MAX):
        if isinstance(said, dict):
            said = said.get("msg") or said.get("message") or said.get("detail")
        elif isinstance(said, list):
            said = said[0] if said else None
    return said.strip() if isinstance(said, str) else ""


def _shaped(status: int, error: dict[str, Any] | None) -> bytes:
    """An error in OpenAI's shape, with what of its members can stand there."""
    error = error or {}
    type_, param, code = (error.get(name) for name in ("type", "param", "code"))
    happened = "refused the request" if status < 500 else "failed"
    shaped = {
        **error,
        "message": _words(error.get("message")) or f"The upstream {happened} with status {status}.",
        "type": type_ if isinstance(type_, str) else "invalid_request_error" if status < 500 else "upstream_error",
        "param": param if isinstance(param, str) else None,
        # vLLM's and llama.cpp's are numbers, at which strict clients stumble.
        "code": str(code) if isinstance(code, str | int) and not isinstance(code, bool) else None,
    }
    return orjson.dumps({"error": shaped})


def _wrapped(status: int) -> bytes:
    error = InvalidRequest(f"The upstream refused the request with status {status}.")
    return orjson.dumps(anthropic.error_body(error))
