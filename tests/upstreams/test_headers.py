"""What is not on the two lists stays here: nothing that names a user goes up, nothing of the account comes down.

wire §6.2; threats T9 to T11, T14, T44.
"""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.policy import Kind, Secret
from proxy.upstreams.headers import idempotency, key_header, to_client, to_upstream

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


def ours(kind: Kind) -> dict[str, str]:
    """What an upstream of this kind gets from us alone, but for the key."""
    return {**OURS, "anthropic-version": "2023-06-01"} if kind == "anthropic" else OURS


def up(*headers: tuple[str, str], kind: Kind = "openai", api_key: Secret | None = KEY) -> dict[str, str]:
    """What an upstream gets of a client's headers."""
    return to_upstream(headers, kind=kind, api_key=api_key)


def down(*headers: tuple[str, str], is_stream: bool = False) -> dict[str, str]:
    """What a client gets of an upstream's headers."""
    return to_client(headers, is_stream=is_stream)


# ---------------------------------------------------------------------------------------------------- to the upstream


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("azure", {"api-key": "sk-of-the-operator"}),
        ("anthropic", {"x-api-key": "sk-of-the-operator"}),
        *((kind, {"authorization": "Bearer sk-of-the-operator"}) for kind in get_args(Kind)[3:]),
        ("openai", {"authorization": "Bearer sk-of-the-operator"}),
    ],
)
def test_each_kind_of_upstream_gets_its_key_in_its_own_header(kind: Kind, expected: dict[str, str]) -> None:
    """And in no other: a second one would be refused or logged."""
    assert key_header(kind, KEY) == expected
    assert up(kind=kind) == {**ours(kind), **expected}


@pytest.mark.parametrize("kind", get_args(Kind))
def test_an_upstream_without_a_key_gets_none(kind: Kind) -> None:
    """A server of one's own may be open; the client's key is not for it either."""
    client = (("authorization", "Bearer sk-user"), ("api-key", "sk-user"), ("x-api-key", "sk-user"))
    assert key_header(kind, None) == {}
    assert up(*client, kind=kind, api_key=None) == ours(kind)


@pytest.mark.parametrize("kind", get_args(Kind))
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
def test_a_client_s_header_that_is_not_on_the_list_stays_here(kind: Kind, name: str) -> None:
    """No key of a user, no address, no account, nothing of this connection (T11, T14)."""
    for spelled in (name, name.lower(), name.upper()):
        assert up((spelled, "sk-user"), kind=kind) == {**ours(kind), **key_header(kind, KEY)}


@pytest.mark.parametrize("name", PASSED_UP)
def test_a_few_of_the_client_s_headers_mean_something_upstream(name: str) -> None:
    """In whatever case they come: they are sent in lower case, once."""
    for spelled in (name, name.lower(), name.upper()):
        assert up((spelled, "value")) == {**OURS, **key_header("openai", KEY), name.lower(): "value"}


@pytest.mark.parametrize("api_key", [KEY, None])
def test_an_idempotency_key_is_its_user_s_own(api_key: Secret | None) -> None:
    """All users are one account upstream: a repeated key must not bring one of them the answer of another."""

    def sent(user: str, said: str, *more: tuple[str, str]) -> dict[str, str]:
        assert up(("Idempotency-Key", said), *more, api_key=api_key) == up(api_key=api_key)
        return idempotency([("Idempotency-Key", said), *more], user=user, api_key=api_key)

    assert sent("alice", "1") == sent("alice", "1")
    owners = [("alice", "1"), ("bob", "1"), ("alice", "2"), ("alice", "\udce4")]
    assert len({"1", *(sent(*owner)["idempotency-key"] for owner in owners)}) == 5
    assert sent("alice", "") == sent("alice", "1", ("Connection", "idempotency-key")) == {}


def test_a_version_of_anthropic_s_is_the_client_s_where_it_names_one() -> None:
    """Each SDK speaks its own; the first that was published is for who says nothing."""
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
def test_a_beta_is_asked_for_where_the_operator_lets_it_pass(
    kind: Kind, allowed: list[str], sent: str | None
) -> None:
    """All others are left out, in whichever of the headers they stand."""
    headers = [("anthropic-beta", "a, b"), ("Anthropic-Beta", "c")]
    passed = to_upstream(headers, kind=kind, api_key=KEY, betas=allowed)
    assert passed.get("anthropic-beta") == sent


def test_a_beta_that_changes_neither_price_nor_reach_is_asked_for() -> None:
    """Whatever the operator lists beside it; what costs more or reaches further is not among them."""
    asked = ("claude-code-20250219", "context-1m-2025-08-07", "context-management-2025-06-27", "fast-mode-2026-02-01")
    headers = [("anthropic-beta", ",".join(asked))]
    sent = to_upstream(headers, kind="anthropic", api_key=KEY)["anthropic-beta"]
    assert sent == "claude-code-20250219,context-management-2025-06-27"
    sent = to_upstream(headers, kind="anthropic", api_key=KEY, betas=["context-1m-2025-08-07"])["anthropic-beta"]
    assert sent == "claude-code-20250219,context-1m-2025-08-07,context-management-2025-06-27"


def test_the_body_is_ours_and_the_answer_is_not_to_be_compressed() -> None:
    """Whatever the client said of its own body and of what it takes."""
    sent = up(("Content-Type", "application/json; charset=latin-1"), ("Accept-Encoding", "gzip, br"))
    assert sent == {**OURS, **key_header("openai", KEY)}


def test_what_connection_names_ends_here() -> None:
    """Also a header that would pass otherwise (RFC 9110 §7.6.1, T14)."""
    passing = (("Accept", "a"), ("X-Title", "t"), ("OpenAI-Beta", "b"))
    sent = up(("Connection", "keep-alive, X-Title"), *passing, ("connection", " ACCEPT ,"))
    assert sent == {**OURS, **key_header("openai", KEY), "openai-beta": "b"}


# ------------------------------------------------------------------------------------------------------ to the client


def test_a_whole_answer_is_not_to_be_stored() -> None:
    """It holds somebody's text."""
    assert down(("Content-Type", "application/json"), ("Cache-Control", "public")) == {
        "content-type": "application/json",
        "cache-control": "no-store",
    }


def test_a_stream_is_not_to_be_delayed() -> None:
    """nginx and others would collect it otherwise."""
    assert down(("Content-Type", "text/event-stream; charset=utf-8"), is_stream=True) == {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache, no-transform",
        "x-accel-buffering": "no",
    }


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
def test_an_upstream_s_header_that_is_not_on_the_list_stays_here(name: str, is_stream: bool) -> None:
    """Neither the account behind our key nor what speaks of another connection (T9, T44)."""
    for spelled in (name, name.lower(), name.upper()):
        assert down((spelled, "1"), is_stream=is_stream) == down(is_stream=is_stream)


def test_a_few_of_the_upstream_s_headers_pass() -> None:
    """Its own id for the request gets another name, since ours has that one."""
    for name in PASSED_DOWN:
        assert down((name, "value")) == {name.lower(): "value", "cache-control": "no-store"}
    assert down(("Request-Id", "req_1")) == down(("X-Request-ID", "req_1"))
    assert down(("X-Request-ID", "req_1")) == {"x-upstream-request-id": "req_1", "cache-control": "no-store"}


@pytest.mark.parametrize("value", ["", "a\r\nSet-Cookie: b", "a\nb", "a\x00b", "\x1b[31m", "a\u2028b", "\udcff"])
def test_a_value_that_could_become_a_line_of_its_own_is_dropped(value: str) -> None:
    """No control bytes of an upstream in our headers or logs (T15)."""
    assert down(("X-Request-ID", value)) == {"cache-control": "no-store"}
    if value:
        assert down(("OpenAI-Version", value), ("Content-Type", value)) == {"cache-control": "no-store"}


@pytest.mark.parametrize("kind", get_args(Kind))
def test_llama_cpp_is_asked_to_close_the_connection_behind_a_stream(kind: Kind) -> None:
    """It does so anyway and says the contrary; all others keep theirs."""
    sent = to_upstream((), kind=kind, api_key=None, is_stream=True)
    assert sent == {**ours(kind), **({"connection": "close"} if kind == "llamacpp" else {})}


def test_what_an_upstream_s_connection_names_ends_here() -> None:
    """The same rule in the other direction."""
    assert down(("Connection", "close, openai-version"), ("OpenAI-Version", "1")) == {"cache-control": "no-store"}


names = st.sampled_from(
    ["Authorization", "accept", "X-API-KEY", "Connection", "content-type", "X-Request-Id", "Cookie"]
)
headers = st.lists(st.tuples(names | st.text(min_size=1, max_size=12), st.text(max_size=20)), max_size=8)


@given(headers=headers, kind=st.sampled_from(get_args(Kind)), is_stream=st.booleans())
def test_no_headers_let_anything_else_through(headers: list[tuple[str, str]], kind: Kind, is_stream: bool) -> None:
    """Whatever comes, the names that go out are of the lists, and the key is ours."""
    sent = up(*headers, kind=kind)
    assert sent.keys() - key_header(kind, KEY).keys() - ours(kind).keys() <= {name.lower() for name in PASSED_UP}
    assert {**sent, **OURS, **key_header(kind, KEY)} == sent
    passed = to_client(headers, is_stream=is_stream)
    added = {"x-upstream-request-id", "cache-control", "x-accel-buffering"}
    assert passed.keys() <= added | {name.lower() for name in PASSED_DOWN}
    assert all(value.isprintable() for value in passed.values())
