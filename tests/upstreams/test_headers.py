"""Only the headers on two lists are forwarded: none that names a user, and none that names the operator's account.

wire §6.2; threats T9 to T11, T14, T44.
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from proxy.formats.kinds import KINDS, kind_of
from proxy.formats.mask import Mask
from proxy.policy.catalog import KeyCommand, OAuthClient, Secret
from proxy.upstreams.headers import NO_HEADERS, idempotency_header, to_client, to_upstream, trace_id

KEY = Secret("sk-of-the-operator")
OURS = {"content-type": "application/json", "accept-encoding": "identity"}
PASSED_UP = [
    "Accept",
    "User-Agent",
    "OpenAI-Beta",
    "anthropic-version",
    "HTTP-Referer",
    "X-Title",
]
PASSED_DOWN = ["Content-Type", "Content-Language", "OpenAI-Processing-MS", "OpenAI-Version"]


def ours(kind: str) -> dict[str, str]:
    """The headers that we send to this kind of upstream, without the key."""
    return {**OURS, "anthropic-version": "2023-06-01"} if kind == "anthropic" else OURS


def up(*headers: tuple[str, str], kind: str = "openai") -> dict[str, str]:
    """The headers that an upstream gets if the client sends these, without our key."""
    return to_upstream(CIMultiDict(headers), kind=kind)


def down(*headers: tuple[str, str], is_stream: bool = False) -> dict[str, str]:
    """The headers that a client gets if the upstream sends these."""
    return to_client(CIMultiDict(headers), is_stream=is_stream, mask=Mask(None))


# ---------------------------------------------------------------------------------------------------- to the upstream

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.mark.parametrize("parent", [PARENT, f"00-{TRACE}-00f067aa0ba902b7-00", f"00-{'0' * 31}1-{'0' * 15}1-ff"])
def test_a_trace_is_passed_on_unchanged(parent: str) -> None:
    """W3C Trace Context: a server without spans of its own passes both headers on."""
    state = "congo=t61rcWkgMzE,a0@b-c_d*/e=00f067aa0ba902b7 x:y"
    expected = {**ours("openai"), "traceparent": parent}
    assert up(("Traceparent", parent)) == expected
    assert up(("Traceparent", parent), ("TraceState", state)) == {**expected, "tracestate": state}
    several = [("tracestate", part) for part in ("", *state.split(","), " ")]
    assert up(("traceparent", parent), *several) == {**expected, "tracestate": state}
    assert trace_id(CIMultiDict({"TraceParent": f" {parent} "})) == parent[3:35]


@pytest.mark.parametrize(
    "parent",
    [
        "",
        TRACE,
        PARENT.upper(),
        PARENT[:-1],
        f"{PARENT}-more",
        f"01{PARENT[2:]}",
        f"ff{PARENT[2:]}",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"{PARENT}, {PARENT}",
        f"{PARENT}\n",
        PARENT.replace("4", "\u0664"),
    ],
)
def test_a_trace_that_is_not_valid_is_dropped_with_its_state(parent: str) -> None:
    """So is one of a version that may have another form."""
    assert up(("traceparent", parent), ("tracestate", "a=b")) == up()
    assert trace_id(CIMultiDict({"traceparent": parent})) is None


def test_two_traces_are_none() -> None:
    """Nobody knows which of them it is."""
    assert up(("traceparent", PARENT), ("Traceparent", PARENT)) == up()
    assert trace_id(CIMultiDict([("traceparent", PARENT)] * 2)) is None
    assert up(("tracestate", "a=b")) == up()
    assert up(("traceparent", PARENT), ("connection", "traceparent"), ("tracestate", "a=b")) == up()


_33_ITEMS = ",".join(f"k{number}=1" for number in range(33))


@pytest.mark.parametrize(
    "state", ["a", "=b", "A=b", "a=b=c", "a=b;\u00e4", "a=\x01", "a=", f"a={'b' * 511}", _33_ITEMS]
)
def test_a_state_that_is_not_valid_is_dropped_alone(state: str) -> None:
    """It may be too long, have other characters, or not be a list of pairs."""
    assert up(("traceparent", PARENT), ("tracestate", state)) == up(("traceparent", PARENT))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("azure", {"api-key": "sk-of-the-operator"}),
        ("anthropic", {"x-api-key": "sk-of-the-operator"}),
        *((kind, {"authorization": "Bearer sk-of-the-operator"}) for kind in tuple(KINDS)[3:]),
        ("openai", {"authorization": "Bearer sk-of-the-operator"}),
    ],
)
def test_each_kind_of_upstream_gets_its_key_in_its_own_header(kind: str, expected: dict[str, str]) -> None:
    """And in no other header: a second one would be rejected or logged."""
    assert kind_of(kind).key_headers(KEY) == expected
    assert up(kind=kind) == ours(kind)


@pytest.mark.parametrize("kind", tuple(KINDS))
def test_an_upstream_without_a_key_gets_none(kind: str) -> None:
    """A server of your own may need no key. The client's key is not sent to it either."""
    client = (("authorization", "Bearer sk-user"), ("api-key", "sk-user"), ("x-api-key", "sk-user"))
    assert kind_of(kind).key_headers(None) == {}
    assert up(*client, kind=kind) == ours(kind)


@pytest.mark.parametrize("kind", tuple(KINDS))
@pytest.mark.parametrize(
    "name",
    [
        "Authorization",
        "API-Key",
        "X-Api-Key",
        "X-Goog-Api-Key",
        "Proxy-Authorization",
        "Cookie",
        "Sec-WebSocket-Protocol",
        "OpenAI-Organization",
        "OpenAI-Project",
        "X-Forwarded-For",
        "X-Forwarded-Host",
        "Forwarded",
        "X-Real-IP",
        "CF-Connecting-IP",
        "Via",
        "Host",
        "Content-Length",
        "Transfer-Encoding",
        "Connection",
        "Keep-Alive",
        "Proxy-Connection",
        "TE",
        "Trailer",
        "Upgrade",
        "Expect",
        "Content-Encoding",
        "Origin",
        "Referer",
        "X-Request-ID",
        "X-Stainless-Retry-Count",
        "X-Quota-Max-Wait",
        "X-Anything",
    ],
)
def test_a_client_s_header_that_is_not_on_the_list_is_not_forwarded(kind: str, name: str) -> None:
    """No user's key, address or account, and nothing about the client's connection (T11, T14)."""
    for spelled in (name, name.lower(), name.upper()):
        assert up((spelled, "sk-user"), kind=kind) == ours(kind)


@pytest.mark.parametrize("name", PASSED_UP)
def test_a_few_of_the_client_s_headers_are_forwarded(name: str) -> None:
    """Whatever their case, they are sent once and in lower case."""
    for spelled in (name, name.lower(), name.upper()):
        assert up((spelled, "value")) == {**OURS, name.lower(): "value"}


@pytest.mark.parametrize("api_key", [KEY, None])
def test_an_idempotency_key_is_different_for_each_user(api_key: Secret | None) -> None:
    """All users share one account upstream. If two send the same key, neither must get the other's answer."""

    def sent(user: str, said: str, *more: tuple[str, str]) -> dict[str, str]:
        assert up(("Idempotency-Key", said), *more) == up()
        return idempotency_header(CIMultiDict([("Idempotency-Key", said), *more]), user=user, api_key=api_key)

    assert sent("alice", "1") == sent("alice", "1")
    owners = [("alice", "1"), ("bob", "1"), ("alice", "2"), ("alice", "\udce4")]
    assert len({"1", *(sent(*owner)["idempotency-key"] for owner in owners)}) == 5
    assert sent("alice", "") == sent("alice", "1", ("Connection", "idempotency-key")) == {}


@pytest.mark.parametrize(
    "source",
    [
        KeyCommand(("print-key", "--for", "me"), 2700),
        OAuthClient("https://issuer.example", "me", Secret("s3cret")),
    ],
)
def test_an_idempotency_key_stays_the_same_when_a_key_is_fetched(source: KeyCommand | OAuthClient) -> None:
    """The hash of a repeated request must not change with the token, and it has the secret in it."""
    headers = CIMultiDict({"Idempotency-Key": "1"})
    sent = idempotency_header(headers, user="alice", api_key=source)
    assert sent == idempotency_header(headers, user="alice", api_key=replace(source))
    assert sent != idempotency_header(headers, user="alice", api_key=None)
    if isinstance(source, OAuthClient):
        other = replace(source, client_secret=Secret("other"))
        assert sent != idempotency_header(headers, user="alice", api_key=other)


@pytest.mark.parametrize("kind", tuple(KINDS))
def test_an_access_token_is_a_bearer_token_at_every_kind(kind: str) -> None:
    """Azure and Anthropic have headers of their own, which are for keys."""
    assert kind_of(kind).key_headers(KEY, is_access_token=True) == {"authorization": "Bearer sk-of-the-operator"}


def test_the_version_of_anthropic_s_api_is_the_client_s_if_it_names_one() -> None:
    """Each SDK names its own. The default is the first one that was published."""
    assert up(("Anthropic-Version", "2026-10-21"), kind="anthropic")["anthropic-version"] == "2026-10-21"
    assert up(kind="anthropic")["anthropic-version"] == "2023-06-01"


@pytest.mark.parametrize(
    ("kind", "allowed", "sent"),
    [
        ("anthropic", ["b", "c"], "b,c"),
        ("anthropic", ["c"], "c"),
        ("anthropic", [], None),
        ("openai", ["a", "b", "c"], None),
    ],
)
def test_a_beta_is_forwarded_if_the_operator_allows_it(kind: str, allowed: list[str], sent: str | None) -> None:
    """All others are removed, from every header that lists betas."""
    headers = [("anthropic-beta", "a, b"), ("Anthropic-Beta", "c")]
    passed = to_upstream(CIMultiDict(headers), kind=kind, betas=allowed)
    assert passed.get("anthropic-beta") == sent


def test_a_beta_that_changes_neither_price_nor_access_is_always_forwarded() -> None:
    """Whatever else the operator allows. Betas that cost more or give access to more are not among them."""
    asked = ("claude-code-20250219", "context-1m-2025-08-07", "context-management-2025-06-27", "fast-mode-2026-02-01")
    headers = [("anthropic-beta", ",".join(asked))]
    sent = to_upstream(CIMultiDict(headers), kind="anthropic")["anthropic-beta"]
    assert sent == "claude-code-20250219,context-management-2025-06-27"
    sent = to_upstream(CIMultiDict(headers), kind="anthropic", betas=["context-1m-2025-08-07"])["anthropic-beta"]
    assert sent == "claude-code-20250219,context-1m-2025-08-07,context-management-2025-06-27"


def test_content_type_and_accept_encoding_are_ours() -> None:
    """We write the body again, and we cannot meter a compressed answer."""
    sent = up(("Content-Type", "application/json; charset=latin-1"), ("Accept-Encoding", "gzip, br"))
    assert sent == OURS


def test_a_header_that_connection_lists_is_not_forwarded() -> None:
    """Even if it is on our list (RFC 9110 §7.6.1, T14)."""
    passing = (("Accept", "a"), ("X-Title", "t"), ("OpenAI-Beta", "b"))
    sent = up(("Connection", "keep-alive, X-Title"), *passing, ("connection", " ACCEPT ,"))
    assert sent == {**OURS, "openai-beta": "b"}


# ------------------------------------------------------------------------------------------------------ to the client


def test_a_whole_answer_must_not_be_cached() -> None:
    """It is one user's text."""
    assert down(("Content-Type", "application/json"), ("Cache-Control", "public")) == {
        "content-type": "application/json",
        "cache-control": "no-store",
    }


def test_a_stream_must_not_be_buffered() -> None:
    """nginx and others would buffer it otherwise."""
    assert down(("Content-Type", "text/event-stream; charset=utf-8"), is_stream=True) == {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache, no-transform",
        "x-accel-buffering": "no",
    }


def test_a_wrong_content_type_is_replaced() -> None:
    """SDKs choose their parser by it."""
    assert down(("Content-Type", "text/plain"), is_stream=True)["content-type"] == "text/event-stream"
    assert down(is_stream=True)["content-type"] == "text/event-stream"
    assert down(("Content-Type", "text/event-stream"))["content-type"] == "application/json"
    assert "content-type" not in down()


@pytest.mark.parametrize(
    "name",
    [
        "Set-Cookie",
        "OpenAI-Organization",
        "OpenAI-Project",
        "X-RateLimit-Limit-Tokens",
        "X-RateLimit-Remaining-Requests",
        "X-Upstream-Key",
        "Authorization",
        "Server",
        "Via",
        "CF-Ray",
        "Alt-Svc",
        "Strict-Transport-Security",
        "Access-Control-Allow-Origin",
        "Access-Control-Expose-Headers",
        "Content-Length",
        "Content-Encoding",
        "Transfer-Encoding",
        "Connection",
        "Keep-Alive",
        "Trailer",
        "Upgrade",
        "Location",
        "WWW-Authenticate",
        "Retry-After",
        "X-Should-Retry",
        "X-LiteLLM-Key-Spend",
    ],
)
@pytest.mark.parametrize("is_stream", [True, False])
def test_an_upstream_s_header_that_is_not_on_the_list_is_not_forwarded(name: str, is_stream: bool) -> None:
    """Nothing names the account behind our key or describes our connection to the upstream (T9, T44)."""
    for spelled in (name, name.lower(), name.upper()):
        assert down((spelled, "1"), is_stream=is_stream) == down(is_stream=is_stream)


def test_a_few_of_the_upstream_s_headers_are_forwarded() -> None:
    """The upstream's request id gets another name, because ours is `x-request-id`."""
    for name in PASSED_DOWN:
        assert down((name, "value")) == {name.lower(): "value", "cache-control": "no-store"}
    assert down(("Request-Id", "req_1")) == down(("X-Request-ID", "req_1"))
    assert down(("X-Request-ID", "req_1")) == {"x-upstream-request-id": "req_1", "cache-control": "no-store"}


@pytest.mark.parametrize("value", ["", "a\r\nSet-Cookie: b", "a\nb", "a\x00b", "\x1b[31m", "a\u2028b", "\udcff"])
def test_a_value_with_control_characters_is_dropped(value: str) -> None:
    """It could end the header line and begin another one, and it could reach a log (T15)."""
    assert down(("X-Request-ID", value)) == {"cache-control": "no-store"}
    if value:
        assert down(("OpenAI-Version", value), ("Content-Type", value)) == {"cache-control": "no-store"}


@pytest.mark.parametrize("kind", tuple(KINDS))
def test_llama_cpp_is_asked_to_close_the_connection_after_a_stream(kind: str) -> None:
    """It closes it in any case but announces `keep-alive`. Connections to other kinds are kept."""
    sent = to_upstream(NO_HEADERS, kind=kind, is_stream=True)
    assert sent == {**ours(kind), **({"connection": "close"} if kind == "llamacpp" else {})}


def test_an_upstream_s_header_that_connection_lists_is_not_forwarded() -> None:
    """The same rule in the other direction."""
    assert down(("Connection", "close, openai-version"), ("OpenAI-Version", "1")) == {"cache-control": "no-store"}


names = st.sampled_from(
    ["Authorization", "accept", "X-API-KEY", "Connection", "content-type", "X-Request-Id", "Cookie"]
)
headers = st.lists(st.tuples(names | st.text(min_size=1, max_size=12), st.text(max_size=20)), max_size=8)


@given(headers=headers, kind=st.sampled_from(tuple(KINDS)), is_stream=st.booleans())
def test_no_input_gets_another_header_through(headers: list[tuple[str, str]], kind: str, is_stream: bool) -> None:
    """Whatever is received, only names on the lists are sent."""
    sent = up(*headers, kind=kind)
    assert sent.keys() - ours(kind).keys() <= {name.lower() for name in PASSED_UP}
    assert {**sent, **OURS} == sent
    passed = to_client(CIMultiDict(headers), is_stream=is_stream, mask=Mask(None))
    added = {"x-upstream-request-id", "cache-control", "x-accel-buffering"}
    assert passed.keys() <= added | {name.lower() for name in PASSED_DOWN}
    assert all(value.isprintable() for value in passed.values())
