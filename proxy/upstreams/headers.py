"""Which headers pass on, in either direction: two short lists; what is not on them stays here.

Towards the upstream nothing passes that names the user, the client's address or account, or carries a key;
towards the client nothing that names the account behind our key or speaks of this connection only.
RFC 9110 §7.6.1 (hop-by-hop), and what was seen of the vendors' headers.
"""

import hashlib
from collections.abc import Collection, Sequence

from proxy.formats.anthropic import USUAL_BETAS, VERSION
from proxy.policy.policy import Kind, Secret

Headers = Sequence[tuple[str, str]]

# What we call ourselves in `Server`: the library would name itself and its version.
SERVER_NAME = "llm-quota-proxy"
# Those of every answer in JSON that is written here.
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
_EVENT_STREAM = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}


def to_upstream(
    headers: Headers,
    *,
    kind: Kind,
    api_key: Secret | None,
    content_type: str = "application/json",
    betas: Collection[str] = (),
    is_stream: bool = False,
) -> dict[str, str]:
    """The headers of the forwarded request: a few of the client's, our key, and no compression to undo.

    `betas` are those of Anthropic's that may be asked for beside the usual ones. Others are left out, and what needs
    them is refused by the upstream itself: clients name a handful with each request, whether or not they use them.
    """
    passing = _TO_UPSTREAM - _of_this_connection(headers)
    sent = {name.lower(): value for name, value in headers if name.lower() in passing}
    sent["content-type"] = content_type
    sent["accept-encoding"] = "identity"
    if kind == "anthropic":
        sent.setdefault("anthropic-version", VERSION)
        if asked := [beta for beta in _listed(headers, "anthropic-beta") if beta in USUAL_BETAS or beta in betas]:
            sent["anthropic-beta"] = ",".join(asked)
    if kind == "llamacpp" and is_stream:
        # It says that it keeps the connection after a stream, and closes it: the next call would go nowhere.
        sent["connection"] = "close"
    return {**sent, **key_header(kind, api_key)}


def idempotency(headers: Headers, *, user: str, api_key: Secret | None) -> dict[str, str]:
    """The client's idempotency key, made its user's own: the same for the same user and no other.

    An upstream that answers a repeated one from memory sees one account, and would hand one user the answer of
    another. Our key is in it, so that nobody finds the user by trying names.
    """
    said = next((value for name, value in headers if name.lower() == "idempotency-key"), "")
    if not said or "idempotency-key" in _of_this_connection(headers):
        return {}
    secret = api_key.reveal() if api_key else ""
    own = hashlib.sha256("\0".join((secret, user, said)).encode("utf-8", "surrogatepass")).hexdigest()
    return {"idempotency-key": own}


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
    # The second name is Anthropic's.
    upstream_id = next((value for name, value in headers if name.lower() in ("x-request-id", "request-id")), "")
    if upstream_id and upstream_id.isprintable():
        passed["x-upstream-request-id"] = upstream_id
    return {**passed, **(_EVENT_STREAM if is_stream else {"cache-control": "no-store"})}


def _of_this_connection(headers: Headers) -> set[str]:
    """The names that `Connection` lists: what they say ends here."""
    return {listed.lower() for listed in _listed(headers, "connection")}


def _listed(headers: Headers, name: str) -> list[str]:
    """What all headers of this name list, between commas."""
    return [part.strip() for header, value in headers if header.lower() == name for part in value.split(",")]
