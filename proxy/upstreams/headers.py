"""Which headers are forwarded, in either direction. There is one short list for each, and no other header passes.

Towards the upstream, no header passes that carries a key or that names the user, the client's address or the client's
account. Towards the client, no header passes that names the account behind our key or that describes the connection
to the upstream. Sources: RFC 9110 §7.6.1 (hop-by-hop headers), and the headers that the vendors were seen to send.

An example of a header that does not pass: `openai-organization` in a request would bill another organisation, and in
an answer it would name the operator's account to every user.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping

from multidict import CIMultiDict, CIMultiDictProxy

from proxy.formats.kinds import kind_of
from proxy.formats.mask import Mask
from proxy.identity.keys import Headers
from proxy.policy.catalog import KeyCommand, OAuthClient, Secret

NO_HEADERS: Headers = CIMultiDictProxy(CIMultiDict())
# Our value of `Server`. By default the HTTP library would name itself and its version.
SERVER_NAME = "llm-quota-proxy"
# The headers of every JSON answer that the proxy itself writes.
JSON_HEADERS = {"content-type": "application/json", "cache-control": "no-store"}

# What no line of a head may have. A line break would begin another line.
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

_TO_UPSTREAM = (
    "accept",
    "anthropic-version",
    "http-referer",
    "openai-beta",
    "user-agent",
    "x-title",
)
_TO_CLIENT = (
    "content-type",
    "content-language",
    "openai-processing-ms",
    "openai-version",
    "request-id",
    "x-request-id",
)
# W3C Trace Context §3.2: version 00, the id of the trace, that of the caller's span, and flags. Ids of zeros are not
# valid. A later version may have another form, so it is not passed on.
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
# §3.3: a list of `key=value`. A value has printable characters except commas and equals signs.
_TRACESTATE_ITEM = re.compile(r"[a-z0-9][a-z0-9_*/@-]{0,255}=[ -+\--<>-~]{0,255}[!-+\--<>-~]")
# A list has at most 32 members (§3.3.1.1), and every server takes 512 characters (§3.3.1.5).
_TRACESTATE_ITEMS_MAX, _TRACESTATE_CHARACTERS_MAX = 32, 512
# Without these, nginx and other proxies in front of us would buffer a stream.
_EVENT_STREAM = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}


def to_upstream(
    headers: Headers,
    *,
    kind: str,
    content_type: str = "application/json",
    betas: Collection[str] = (),
    is_stream: bool = False,
) -> dict[str, str]:
    """The headers of the forwarded request: a few of the client's, and those of the upstream's kind.

    No compression is asked for. `Upstreams.send` adds our key.

    `betas` are the beta features that the operator allows in addition to the usual ones. Others are
    removed from the header. Clients name a handful in each request, whether or not they use them; a request that does
    use one that was removed is rejected by the upstream itself.
    """
    sent = _passed(headers, _TO_UPSTREAM)
    if "traceparent" in headers:
        sent |= _trace_context(headers)
    sent["content-type"] = content_type
    sent["accept-encoding"] = "identity"
    of = kind_of(kind)
    if of.beta_header is not None:
        requested = _list_items(headers, of.beta_header)
        if allowed_betas := [beta for beta in requested if beta in of.usual_betas or beta in betas]:
            sent[of.beta_header] = ",".join(allowed_betas)
    return {**of.default_headers, **sent, **(of.stream_headers if is_stream else {})}


def idempotency_header(
    headers: Headers, *, user: str, api_key: Secret | KeyCommand | OAuthClient | None
) -> dict[str, str]:
    """The client's `Idempotency-Key`, hashed with the user's name; empty if the client sent none.

    The upstream sees all users as one account, and an upstream with idempotency answers a repeated key from memory.
    If alice and bob both send the key "1", bob would get alice's answer. Hashed, alice's key is the same each time
    she sends it and different from bob's. Our API key is part of the hash, so an upstream cannot find the user by
    hashing likely names. If the key is fetched, what it is fetched with takes its place: the hash must stay the same
    when the key changes.
    """
    client_key = headers.get("idempotency-key")
    if not client_key or not _passed(headers, ("idempotency-key",)):
        return {}
    text = "\0".join((_lasting_secret(api_key), user, client_key))
    return {"idempotency-key": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()}


def _lasting_secret(api_key: Secret | KeyCommand | OAuthClient | None) -> str:
    match api_key:
        case None:
            return ""
        case Secret():
            return api_key.reveal()
        case KeyCommand():
            return "\0".join(api_key.words)
        case OAuthClient():
            return f"{api_key.client_id}\0{api_key.client_secret.reveal()}"


def trace_id(headers: Headers) -> str | None:
    """The id of the trace that the client takes part in; None without a valid `traceparent`."""
    parent = _traceparent(headers)
    return None if parent is None else parent[1]


def _traceparent(headers: Headers) -> re.Match[str] | None:
    """The client's `traceparent`; None if it is not valid or not the only one."""
    parents = headers.getall("traceparent", [])
    return _TRACEPARENT.fullmatch(parents[0].strip(" \t")) if len(parents) == 1 else None


def _trace_context(headers: Headers) -> dict[str, str]:
    """The client's `traceparent` and `tracestate` as far as they are valid, unchanged.

    The proxy has no spans of its own, so the upstream's span is a child of the client's (W3C Trace Context §3.4, a
    proxy that passes on). Without a valid `traceparent` there is no `tracestate` either.
    """
    passed, parent = _passed(headers, ("traceparent", "tracestate")), _traceparent(headers)
    if parent is None or "traceparent" not in passed:
        return {}
    context = {"traceparent": parent[0]}
    items = [item for item in _list_items(headers, "tracestate") if item]
    state = ",".join(items)
    is_bounded = len(items) <= _TRACESTATE_ITEMS_MAX and len(state) <= _TRACESTATE_CHARACTERS_MAX
    if "tracestate" in passed and items and is_bounded and all(map(_TRACESTATE_ITEM.fullmatch, items)):
        context["tracestate"] = state
    return context


def to_client(headers: Headers, *, is_stream: bool, mask: Mask) -> dict[str, str]:
    """The headers of the answer to the client: a few of the upstream's, and ours against caching and buffering.

    The upstream's request id gets the name `x-upstream-request-id`, because `x-request-id` is our own. A value with
    control characters is dropped: it could end the header line and begin another one.

    `mask` masks our key in their values.

    `is_stream` is what the body really is. A content type that says the opposite is replaced, because SDKs choose
    their parser by it.
    """
    passed = {}
    for name, value in _passed(headers, _TO_CLIENT).items():
        if value and value.isprintable():
            # OpenAI's name is x-request-id, Anthropic's request-id.
            is_id = name in ("x-request-id", "request-id")
            passed["x-upstream-request-id" if is_id else name] = mask.in_header(value)
    if passed.get("content-type", "").lower().startswith("text/event-stream") is not is_stream:
        passed["content-type"] = "text/event-stream" if is_stream else "application/json"
    return {**passed, **(_EVENT_STREAM if is_stream else {"cache-control": "no-store"})}


def _passed(headers: Headers, names: Iterable[str]) -> dict[str, str]:
    """The headers with these names, except those that `Connection` lists: they are for one connection.

    Of several headers with one name the last one passes.
    """
    passed = {}
    for name in names:
        values = headers.getall(name, None)
        if values is not None:
            passed[name] = values[-1]
    if "connection" in headers:
        for name in _list_items(headers, "connection"):
            passed.pop(name.lower(), None)
    return passed


def _list_items(headers: Headers, name: str) -> list[str]:
    """The comma-separated items of all headers with this name (RFC 9110 §5.6.1)."""
    return [item.strip() for value in headers.getall(name, []) for item in value.split(",")]


def header_lines(headers: Mapping[str, str]) -> bytes:
    """The lines of these headers. Bytes in a client's header that are not UTF-8 are left out.

    Raises ValueError if one of them has a control character.
    """
    lines = list(map(": ".join, headers.items()))
    if CONTROL.search("".join(lines)):
        raise ValueError("a header has a control character")
    lines.append("")
    return "\r\n".join(lines).encode("utf-8", "ignore")
