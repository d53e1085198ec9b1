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
show nothing else. Our key, our account and the secrets in our headers are masked in all of them.
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
from proxy.policy.catalog import Secret, Upstream
from proxy.upstreams.network import proxy_authorization

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
        "budget_exceeded",  # LiteLLM's type, with 422: the budget of our key there, which its message states
    )
)
# Anthropic has no code for it and answers 400 `invalid_request_error` with this message. Nothing may follow it: a
# message that quotes the request may begin with a text of the user ("…: Extra inputs are not permitted").
_NO_CREDIT = re.compile(
    r"Your credit balance is too low(?: to access the \w+ API)?\.?"
    r"(?: Please go to Plans & Billing to upgrade or purchase credits\.)?"
)
# LiteLLM's messages of budgets that the request itself names, in `user` or with its tags.
_REQUEST_BUDGETS = ("ExceededBudget: End User=", "LiteLLM End User:", "Budget has been exceeded! Tag=")
# LiteLLM's type, with 400, if it has no database in which it could look for a key that is not its master key.
_UNKNOWN_KEY = "no_db_connection"
# How deep a message may be nested. Mistral sends {"message": {"detail": [{"msg": "…"}]}}, which has three levels.
_NESTING_MAX = 4
# What may be a secret in the value of a header: a long word. In `Bearer sk-…` that is the key, in `id=…; lang=en` the
# id. Shorter ones are words such as `production`, which answers have for other reasons.
_SECRET = re.compile(r"[^\s;,=\"]{16,}")
# Which values of `Retry-After` are forwarded: whole seconds, but not 0, at which some SDKs retry without a pause.
_SECONDS = re.compile(r"[1-9][0-9]{0,5}")


@dataclass(frozen=True, slots=True)
class _Forwarded:
    """An error answer that is forwarded."""

    status: int
    body: bytes

    def error(self) -> ProxyError:
        """The same error, for an event of a stream whose head has been sent."""
        error = _read_error(self.body)[0] or {}
        message = _message_text(error.get("message")) or f"The upstream failed with status {self.status}."
        found = ProxyError(message, param=_text(error.get("param")))
        found.status, found.code = self.status, _text(error.get("code"))
        found.type = _text(error.get("type")) or found.type
        return found


class Rejected(_Forwarded):
    """The request was at fault: the upstream's answer is forwarded, and the call is charged one request."""


class Failed(_Forwarded):
    """The upstream failed with an error that is forwarded; nothing is charged."""


def failure_of(
    status: int, body: bytes, retry_after: str | None, upstream: Upstream, mask: Mask
) -> Rejected | Failed | ProxyError:
    """What an error answer with this status means. `body` may be incomplete. `mask` is that of the answer.

    A ProxyError is to be raised, and nothing is charged for it.
    """
    error, is_openai_shape = _read_error(body)
    masked = mask.in_error
    if status in (401, 403) or _is_key_unknown(error):
        # Not a 401: a user who saw one would replace the key that works.
        return UpstreamError("The upstream did not accept the proxy's key. The operator of this proxy has to fix it.")
    if status == 402 or _is_account_used_up(error):
        return UpstreamExhausted(
            "The proxy's account at the upstream is used up. The operator of this proxy has to fix it."
        )
    if status == 429:
        return _rate_limited(error, retry_after, mask)
    if status == 408 or 500 <= status <= 599:
        if error is not None and status != 408:
            return Failed(status, masked(body if is_openai_shape else _in_openai_shape(status, error)))
        failure = UpstreamTimeout if status in (408, 504) else UpstreamError
        return failure(f"The upstream failed with status {status}.")
    if 400 <= status <= 499:
        if surface := kind_of(upstream.kind).error_surface:
            return Rejected(status, masked(body) if error is not None else _in_shape_of(surface, status))
        return Rejected(status, masked(body if is_openai_shape else _in_openai_shape(status, error)))
    return UpstreamError(f"The upstream sent an answer that can't be forwarded (status {status}).")


def status_for_routing(status: int, body: bytes) -> int:
    """The status by which another upstream is asked: 401 or 402 if the body says that our key or account is at fault.

    Otherwise it is `status`. A 403 stays one: filters answer it for prompts that they block (OpenRouter, Cloudflare).
    A budget that the request names stays that request's error, because other users' calls do not have it.
    """
    error, _ = _read_error(body)
    if _is_key_unknown(error):
        return 401
    if error is None or not _is_account_used_up(error):
        return status
    return status if _message_text(error.get("message")).startswith(_REQUEST_BUDGETS) else 402


@lru_cache(maxsize=256)
def mask_of(upstream: Upstream, fetched: tuple[Secret, ...] = ()) -> Mask:
    """What masks our key, our account and the secrets in our headers in the answers of this upstream.

    `fetched` are its keys if it has no fixed one.
    """
    keys = (upstream.api_key,) if isinstance(upstream.api_key, Secret) else fetched
    transport = upstream.transport
    # Only a request to http:// has the credentials for the proxy in its own head; with https they are in CONNECT.
    proxy = transport.proxy if upstream.base_url.startswith("http:") else None
    words = (word for _, value in transport.headers for word in _SECRET.findall(value.reveal()))
    authorization = None if proxy is None else proxy_authorization(proxy.reveal())
    credentials = None if authorization is None else authorization.removeprefix("Basic ")
    return Mask(*(key.reveal() for key in keys), *words, credentials)


def _rate_limited(error: dict[str, Any] | None, retry_after: str | None, mask: Mask) -> ProxyError:
    headers = {"retry-after": retry_after} if retry_after and _SECONDS.fullmatch(retry_after) else None
    message = mask.in_error((_message_text(error.get("message")) if error else "").encode()).decode()
    return UpstreamBusy(
        # Masked before it is cut: a key that crossed the edge would leave its first half.
        f"The upstream itself is limiting requests; this is not a quota of this proxy. {message[:500]}".strip(),
        headers=headers,
    )


def _is_key_unknown(error: dict[str, Any] | None) -> bool:
    return error is not None and error.get("type") == _UNKNOWN_KEY


def _is_account_used_up(error: dict[str, Any] | None) -> bool:
    """Whether an error has one of the codes, or is Anthropic's message. Other messages may quote the request."""
    if error is None:
        return False
    if any(isinstance(code := error.get(name), str) and code in _ACCOUNT_CODES for name in ("code", "type")):
        return True
    return _NO_CREDIT.fullmatch(_message_text(error.get("message"))) is not None


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


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


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
