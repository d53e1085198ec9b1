"""Which headers pass on, in either direction: two short lists; what is not on them stays here.

Towards the upstream nothing passes that names the user, the client's address or account, or carries a key;
towards the client nothing that names the account behind our key or speaks of this connection only.
RFC 9110 §7.6.1 (hop-by-hop), and what was seen of the vendors' headers.
"""

from collections.abc import Sequence

from proxy.policy import Kind, Secret

Headers = Sequence[tuple[str, str]]

# What we call ourselves in `Server`: the library would name itself and its version.
NAME = "llm-quota-proxy"

_TO_UPSTREAM = frozenset(
    (
        "accept",
        "anthropic-beta",
        "anthropic-version",
        "http-referer",
        "idempotency-key",
        "openai-beta",
        "user-agent",
        "x-title",
    )
)
_TO_CLIENT = frozenset(("content-type", "content-language", "openai-processing-ms", "openai-version"))
_EVENT_STREAM = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}


def to_upstream(
    headers: Headers, *, kind: Kind, api_key: Secret | None, content_type: str = "application/json"
) -> dict[str, str]:
    """The headers of the forwarded request: a few of the client's, our key, and no compression to undo."""
    passing = _TO_UPSTREAM - _of_this_connection(headers)
    sent = {name.lower(): value for name, value in headers if name.lower() in passing}
    sent["content-type"] = content_type
    sent["accept-encoding"] = "identity"
    return {**sent, **key_header(kind, api_key)}


def key_header(kind: Kind, api_key: Secret | None) -> dict[str, str]:
    """The header in which this kind of upstream wants its key."""
    if api_key is None:
        return {}
    match kind:
        case "azure":
            return {"api-key": api_key.reveal()}
        case "anthropic":
            return {"x-api-key": api_key.reveal()}
        case _:
            return {"authorization": f"Bearer {api_key.reveal()}"}


def to_client(headers: Headers, *, is_stream: bool) -> dict[str, str]:
    """The headers of an answer that pass on, with what keeps others from storing or delaying it."""
    passing = _TO_CLIENT - _of_this_connection(headers)
    passed = {name.lower(): value for name, value in headers if name.lower() in passing and value.isprintable()}
    upstream_id = next((value for name, value in headers if name.lower() == "x-request-id"), "")
    if upstream_id and upstream_id.isprintable():
        passed["x-upstream-request-id"] = upstream_id
    return {**passed, **(_EVENT_STREAM if is_stream else {"cache-control": "no-store"})}


def _of_this_connection(headers: Headers) -> set[str]:
    """The names that `Connection` lists: what they say ends here."""
    lists = (value for name, value in headers if name.lower() == "connection")
    return {listed.strip().lower() for value in lists for listed in value.split(",")}
