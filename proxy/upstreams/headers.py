"""Which headers are forwarded, in either direction. There is one short list for each, and no other header passes.

Towards the upstream, no header passes that carries a key or that names the user, the client's address or the client's
account. Towards the client, no header passes that names the account behind our key or that describes the connection
to the upstream. Sources: RFC 9110 §7.6.1 (hop-by-hop headers), and the headers that the vendors were seen to send.

An example of a header that does not pass: `openai-organization` in a request would bill another organisation, and in
an answer it would name the operator's account to every user.
"""

import hashlib
from collections.abc import Collection, Sequence

from proxy.formats.kinds import kind_of
from proxy.formats.mask import Mask
from proxy.policy.catalog import Secret

Headers = Sequence[tuple[str, str]]

# Our value of `Server`. By default the HTTP library would name itself and its version.
SERVER_NAME = "llm-quota-proxy"
# The headers of every JSON answer that the proxy itself writes.
JSON_HEADERS = {"content-type": "application/json", "cache-control": "no-store"}

_TO_UPSTREAM = frozenset(
    (
        "accept",
        "anthropic-version",
        "http-referer",
        "openai-beta",
        "user-agent",
        "x-title",
    )
)
_TO_CLIENT = frozenset(("content-type", "content-language", "openai-processing-ms", "openai-version"))
# Without these, nginx and other proxies in front of us would buffer a stream.
_EVENT_STREAM = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}


def to_upstream(
    headers: Headers,
    *,
    kind: str,
    api_key: Secret | None,
    content_type: str = "application/json",
    betas: Collection[str] = (),
    is_stream: bool = False,
) -> dict[str, str]:
    """The headers of the forwarded request: a few of the client's, our key, and those of the upstream's kind.

    No compression is asked for.

    `betas` are the beta features that the operator allows in addition to the usual ones. Others are
    removed from the header. Clients name a handful in each request, whether or not they use them; a request that does
    use one that was removed is rejected by the upstream itself.
    """
    allowed = _TO_UPSTREAM - _hop_by_hop(headers)
    sent = {name.lower(): value for name, value in headers if name.lower() in allowed}
    sent["content-type"] = content_type
    sent["accept-encoding"] = "identity"
    of = kind_of(kind)
    if of.beta_header is not None:
        requested = _list_items(headers, of.beta_header)
        if allowed_betas := [beta for beta in requested if beta in of.usual_betas or beta in betas]:
            sent[of.beta_header] = ",".join(allowed_betas)
    return {**of.default_headers, **sent, **(of.stream_headers if is_stream else {}), **of.key_headers(api_key)}


def idempotency_header(headers: Headers, *, user: str, api_key: Secret | None) -> dict[str, str]:
    """The client's `Idempotency-Key`, hashed with the user's name; empty if the client sent none.

    The upstream sees all users as one account, and an upstream with idempotency answers a repeated key from memory.
    If alice and bob both send the key "1", bob would get alice's answer. Hashed, alice's key is the same each time
    she sends it and different from bob's. Our API key is part of the hash, so an upstream cannot find the user by
    hashing likely names.
    """
    client_key = next((value for name, value in headers if name.lower() == "idempotency-key"), "")
    if not client_key or "idempotency-key" in _hop_by_hop(headers):
        return {}
    secret = api_key.reveal() if api_key else ""
    digest = hashlib.sha256("\0".join((secret, user, client_key)).encode("utf-8", "surrogatepass")).hexdigest()
    return {"idempotency-key": digest}


def to_client(headers: Headers, *, is_stream: bool, mask: Mask) -> dict[str, str]:
    """The headers of the answer to the client: a few of the upstream's, and ours against caching and buffering.

    The upstream's request id gets the name `x-upstream-request-id`, because `x-request-id` is our own. A value with
    control characters is dropped: it could end the header line and begin another one.

    `mask` masks our key in their values.

    `is_stream` is what the body really is. A content type that says the opposite is replaced, because SDKs choose
    their parser by it.
    """
    allowed = _TO_CLIENT - _hop_by_hop(headers)
    passed = {name.lower(): value for name, value in headers if name.lower() in allowed and value.isprintable()}
    # OpenAI's name is x-request-id, Anthropic's request-id.
    upstream_id = next((value for name, value in headers if name.lower() in ("x-request-id", "request-id")), "")
    if upstream_id and upstream_id.isprintable():
        passed["x-upstream-request-id"] = upstream_id
    if passed.get("content-type", "").lower().startswith("text/event-stream") is not is_stream:
        passed |= {"content-type": "text/event-stream"} if is_stream else {"content-type": "application/json"}
    passed = {name: mask.in_header(value) for name, value in passed.items()}
    return {**passed, **(_EVENT_STREAM if is_stream else {"cache-control": "no-store"})}


def _hop_by_hop(headers: Headers) -> set[str]:
    """The header names that `Connection` lists. They are meant for this connection only and are not forwarded."""
    return {name.lower() for name in _list_items(headers, "connection")}


def _list_items(headers: Headers, name: str) -> list[str]:
    """The comma-separated items of all headers with this name (RFC 9110 §5.6.1)."""
    return [item.strip() for header, value in headers if header.lower() == name for item in value.split(",")]
