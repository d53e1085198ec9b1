"""Who is at fault if an upstream fails, what is charged, and that nothing about our key or account is shown.

The table of the module's docstring; contract "A refusal"; threats T9, T10, T38, T44.
"""

import json
from base64 import b64encode
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ProxyError, UpstreamBusy, UpstreamError, UpstreamExhausted, UpstreamTimeout
from proxy.formats.mask import PieceMask
from proxy.policy.catalog import KeyCommand, Secret, Transport, Upstream
from proxy.upstreams.failures import Failed, Rejected, failure_of, mask_of

KEY = "sk-of-the-operator-0123456789"
UPSTREAM = Upstream("up", "http://upstream.example/v1", Secret(KEY))
OPEN = Upstream("up", "http://upstream.example/v1", None)
HTML = b"<html><h1>502 Bad Gateway</h1></html>"


def error(message: object = "It can't be done.", **more: object) -> bytes:
    """A body with an error in OpenAI's shape."""
    return json.dumps(
        {"error": {"message": message, "type": "some_error", "param": None, "code": None, **more}}
    ).encode()


def meaning(status: int, body: bytes, retry_after: str | None, upstream: Upstream) -> Rejected | Failed | ProxyError:
    """What an error answer of this upstream means."""
    return failure_of(status, body, retry_after, upstream, mask_of(upstream))


def failure(status: int, body: bytes = HTML, retry_after: str | None = None) -> Rejected | Failed | ProxyError:
    """What an error answer of an upstream with a key means."""
    return meaning(status, body, retry_after, UPSTREAM)


# ------------------------------------------------------------------------------------------------ the request's fault


@pytest.mark.parametrize("status", [400, 404, 405, 409, 413, 415, 422, 424, 451, 499])
def test_a_rejected_request_is_forwarded_and_costs_one_request(status: int) -> None:
    """The upstream's message helps the user, and a client that repeats a bad request is counted."""
    body = error(code="context_length_exceeded", param="messages")
    assert failure(status, body) == Rejected(status, body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        HTML,
        b"null",
        b"[]",
        b"7",
        b'{"error":""}',
        b'{"error":null}',
        b'{"error":[]}',
        b'{"detail":{"a":"b"}}',
        b'{"detail":[]}',
        b'{"message":[[[[["too deep"]]]]]}',
        b'{"error":{"message":NaN}}',
        b'{"error":{"message":"cut',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_body_without_an_error_is_replaced(body: bytes) -> None:
    """SDKs do not show HTML, and it may contain anything."""
    rejected = failure(400, body)
    assert isinstance(rejected, Rejected)
    assert json.loads(rejected.body) == {
        "error": {
            "message": "The upstream refused the request with status 400.",
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        }
    }
    assert isinstance(failure(500, body), UpstreamError)


# ----------------------------------------------------------------------------------------------- our key, our account


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    "body", [error(f"Incorrect API key provided: {KEY}."), error(code="insufficient_quota"), HTML]
)
def test_our_key_is_not_the_user_s_fault(status: int, body: bytes) -> None:
    """It is a 502, because at a 401 users would change their own keys. The upstream's message is not shown (T9)."""
    failed = failure(status, body)
    assert type(failed) is UpstreamError
    assert (failed.status, failed.code) == (502, "upstream_error")
    assert "key" in failed.message and "sk-" not in failed.message


def test_a_gateway_that_does_not_know_our_key_is_not_the_user_s_fault() -> None:
    """LiteLLM without a database answers 400."""
    failed = failure(400, error("No connected db.", type="no_db_connection", code="400"))
    assert (type(failed), failed.status, failed.code) == (UpstreamError, 502, "upstream_error")
    assert "key" in failed.message


@pytest.mark.parametrize(
    "code",
    [
        "insufficient_quota",
        "credit_balance_exhausted",
        "billing_hard_limit_reached",
        "organization_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "project_spend_limit_exceeded",
        "budget_exceeded",
    ],
)
@pytest.mark.parametrize("status", [400, 422, 429, 500])
def test_a_used_up_account_is_a_503(code: str, status: int) -> None:
    """Whatever status and member say it. A user who saw `insufficient_quota` would look at the wrong quota."""
    for body in (error("You, org-123, exceeded it.", code=code), error("You, org-123, exceeded it.", type=code)):
        failed = failure(status, body, retry_after="5")
        assert type(failed) is UpstreamExhausted
        assert (failed.status, failed.code, failed.headers) == (503, "upstream_unavailable", {})
        assert "org-123" not in failed.message


@pytest.mark.parametrize("body", [error("Insufficient credits. Buy more at https://x.example."), HTML, b""])
def test_payment_required_is_a_503(body: bytes) -> None:
    """402 (OpenRouter, DeepSeek) is about the account too. The user cannot pay it and is not charged for it."""
    failed = failure(402, body)
    assert type(failed) is UpstreamExhausted
    assert "https" not in failed.message


# ------------------------------------------------------------------------------- the upstream's own limits and errors


def test_the_upstream_s_own_limit_is_marked_as_such() -> None:
    """A 429 that is not about a quota of ours keeps its status, message and `Retry-After`, but gets another code."""
    failed = failure(429, error("Rate limit reached.", code="rate_limit_exceeded", type="tokens"), retry_after="7")
    assert type(failed) is UpstreamBusy
    assert (failed.status, failed.type, failed.code) == (429, "rate_limit_error", "upstream_rate_limited")
    assert failed.headers == {"retry-after": "7"}
    assert failed.message == (
        "The upstream itself is limiting requests; this is not a quota of this proxy. Rate limit reached."
    )


@pytest.mark.parametrize("body", [HTML, b"", b'{"error":7}', error(None), error({"a": 1}), error(""), error(7)])
def test_a_limit_without_a_message_has_ours(body: bytes) -> None:
    """And it never contains `None`."""
    failed = failure(429, body)
    assert isinstance(failed, UpstreamBusy)
    assert failed.message == "The upstream itself is limiting requests; this is not a quota of this proxy."


@pytest.mark.parametrize("code", [None, 429, {}, [], ["insufficient_quota"], {"insufficient_quota": 1}, True, 1.5])
def test_codes_of_any_type_are_handled(code: object) -> None:
    """Strict clients do not accept the numbers of vLLM and llama.cpp. A code that is not hashable must not raise."""
    body = error("x", code=code, type=code, more="y")
    assert isinstance(failure(429, body), UpstreamBusy)
    text = "429" if code == 429 else None
    for status, kind in ((400, "invalid_request_error"), (500, "upstream_error")):
        result = failure(status, body)
        assert isinstance(result, Rejected | Failed)
        members = {
            "message": "x",
            "type": kind if code is not None else None,
            "param": None,
            "code": text,
            "more": "y",
        }
        assert json.loads(result.body) == {"error": members}
        assert code is not None or result.body == body


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        (b'{"error":"model \'x\' not found"}', "model 'x' not found", None),  # Ollama
        (
            b'{"object":"error","message":"It is too long.","type":"BadRequestError","param":null,"code":400}',
            "It is too long.",
            "400",
        ),  # vLLM until 0.10
        (b'{"error":{"message":"It is too long.","type":"BadRequestError","code":400}}', "It is too long.", "400"),
        (b'{"error":{"code":400,"message":"Bad.","type":"invalid_request_error"}}', "Bad.", "400"),  # llama.cpp
        (b'{"error":{"code":429,"message":"Bad.","metadata":{"raw":"r"}}}', "Bad.", "429"),  # OpenRouter
        (b'{"statusCode":404,"message":"Resource not found"}', "Resource not found", None),  # in front of Azure
        (b'{"detail":"Not Found"}', "Not Found", None),  # FastAPI
        (b'{"detail":[{"loc":["body","n"],"msg":"Not a number.","type":"int"}]}', "Not a number.", None),
        (b'{"object":"error","message":{"detail":[{"msg":"Extra."}]},"code":null}', "Extra.", None),  # Mistral
        (b'{"message":{"msg":"Bad."}}', "Bad.", None),
        (b'{"error":{"message":{"message":"Bad."}}}', "Bad.", None),
    ],
)
def test_an_error_in_another_shape_is_put_into_openai_s_shape(body: bytes, message: str, code: str | None) -> None:
    """So SDKs show the upstream's message, whether the request or the upstream was at fault."""
    for status in (404, 500):
        result = failure(status, body)
        assert isinstance(result, Rejected | Failed)
        shown = json.loads(result.body)["error"]
        assert (shown["message"], shown["param"], shown["code"]) == (message, None, code)
        assert isinstance(shown["type"], str)
    busy = failure(429, body)
    assert isinstance(busy, UpstreamBusy)
    assert busy.message.endswith(message)


def test_other_members_of_an_error_are_kept() -> None:
    """OpenRouter puts the provider's message there."""
    result = failure(400, b'{"error":{"code":400,"message":"Bad.","metadata":{"raw":"r"}}}')
    assert isinstance(result, Rejected)
    assert json.loads(result.body)["error"]["metadata"] == {"raw": "r"}


@pytest.mark.parametrize("status", [400, 503])
def test_an_error_without_a_message_gets_ours(status: int) -> None:
    """Every error has a message."""
    result = failure(status, b'{"error":{"code":1}}')
    assert isinstance(result, Rejected | Failed)
    assert json.loads(result.body)["error"]["message"].endswith(f"with status {status}.")


@pytest.mark.parametrize(
    "retry_after", [None, "", "soon", "1.5", "-1", "7\r\nx: y", "\u0667", "Wed, 21 Oct 2026 07:28:00 GMT"]
)
def test_only_a_retry_after_in_whole_seconds_is_forwarded(retry_after: str | None) -> None:
    """Any other value is dropped."""
    failed = failure(429, error(), retry_after)
    assert isinstance(failed, UpstreamBusy)
    assert failed.headers == {}


def test_the_message_of_a_limit_is_cut_and_has_no_key() -> None:
    """The key is masked before the message is cut, so no part of it stays at the edge (T9)."""
    for position in range(480, 505):
        failed = failure(429, error("x" * position + KEY + "y" * 9999))
        assert isinstance(failed, UpstreamBusy)
        assert "sk-" not in failed.message
        assert len(failed.message) < 700


@pytest.mark.parametrize("status", [500, 502, 503, 504, 529, 599])
def test_an_error_of_the_upstream_is_forwarded_and_costs_nothing(status: int) -> None:
    """It is forwarded unchanged if it has OpenAI's shape."""
    assert failure(status, error()) == Failed(status, error())


@pytest.mark.parametrize("status", [500, 501, 502, 503, 529])
def test_a_failure_without_an_error_body_is_a_502(status: int) -> None:
    """The message is ours and names the status."""
    failed = failure(status)
    assert type(failed) is UpstreamError
    assert (failed.status, failed.message) == (502, f"The upstream failed with status {status}.")


@pytest.mark.parametrize(("status", "body"), [(408, HTML), (408, error()), (504, HTML)])
def test_a_timeout_of_the_upstream_is_a_504(status: int, body: bytes) -> None:
    """A 408 is about our connection to the upstream, so it is never forwarded."""
    failed = failure(status, body)
    assert type(failed) is UpstreamTimeout
    assert failed.status == 504


@pytest.mark.parametrize("status", [99, 100, 101, 199, 300, 301, 302, 304, 307, 308, 600, 999])
def test_a_status_that_cannot_be_forwarded_is_a_502(status: int) -> None:
    """Redirects are neither followed nor forwarded, because they name hosts (T44)."""
    failed = failure(status, error())
    assert type(failed) is UpstreamError
    assert failed.message == f"The upstream sent an answer that can't be forwarded (status {status})."


# ------------------------------------------------------------------------------------------------------------ the key


def test_our_key_is_masked_in_every_forwarded_body() -> None:
    """An upstream that repeats the request's headers must not reveal the key (T9)."""
    body = error(f"You sent Bearer {KEY}. Yes, {KEY}!", param=KEY)
    clean = body.replace(KEY.encode(), b"***")
    assert clean.count(b"***") == 3
    assert failure(400, body) == Rejected(400, clean)
    assert failure(500, body) == Failed(500, clean)
    assert mask_of(UPSTREAM).in_error(body) == clean


@pytest.mark.parametrize(
    "mention",
    [
        "for organization org-AbCdEf123 on tokens",
        "in project proj_AbCdEf123 on tokens",
        "(org: 4f0c2f9e-1111-4222-8333-123456789abc, model: m)",
        "your organization (4f0c2f9e-1111-4222-8333-123456789abc) exceeded",
        "Organization ID: 4f0c2f9e-1111-4222-8333-123456789abc",
        "workspace wrkspc_AbCdEf123",
    ],
)
def test_our_account_is_masked_too(mention: str) -> None:
    """OpenAI and Anthropic name it when it reaches a limit. The id of the request stays, for questions to them."""
    busy = failure(429, error(f"{mention}, request 9d0c2f9e-1111-4222-8333-123456789abc"))
    assert isinstance(busy, UpstreamBusy)
    assert "***" in busy.message
    assert "AbCdEf123" not in busy.message and "4f0c2f9e" not in busy.message
    assert "9d0c2f9e" in busy.message


@pytest.mark.parametrize(
    "spelled",
    [
        KEY.replace("-", "\\u002d"),
        KEY.replace("-", "\\u002D"),
        "".join(f"\\u{ord(letter):04x}" for letter in KEY),
        KEY[:5] + f"\\u{ord(KEY[5]):04x}" + KEY[6:],
    ],
)
def test_our_key_is_masked_however_json_spells_it(spelled: str) -> None:
    """An upstream may escape any character of a string (RFC 8259 §7). The rest of the body keeps its meaning."""
    body = b'{"error": {"message": "a \\"quoted\\" \\u00e9\\\\u0073 %b", "type": null}}' % spelled.encode()
    shown = mask_of(UPSTREAM).in_error(body)
    assert json.loads(shown)["error"]["message"] == 'a "quoted" é\\u0073 ***'
    assert json.loads(mask_of(replace(UPSTREAM, api_key=Secret("a/b/c"))).in_error(body)) == json.loads(body)
    rejected = failure(400, body)
    assert isinstance(rejected, Rejected)
    assert KEY not in json.loads(rejected.body)["error"]["message"]


def test_both_keys_are_masked_if_they_are_fetched() -> None:
    """The one that is sent now, and the one before it."""
    upstream = replace(UPSTREAM, api_key=KeyCommand(("print-key",), 2700))
    mask = mask_of(upstream, (Secret("ya29.second-0123456789"), Secret("ya29.first-0123456789")))
    assert mask.in_error(b"ya29.first-0123456789, ya29.second-0123456789") == b"***, ***"
    assert mask.anywhere(b"ya29.first-0123456789, ya29.second-0123456789") == b"***, ***"
    with_header = replace(upstream, transport=Transport(headers=(("x-one", Secret("Bearer tenant-0123456789")),)))
    mask = mask_of(with_header, (Secret("ya29.second-0123456789"), Secret("ya29.first-0123456789")))
    assert mask.anywhere(b"ya29.first-0123456789, tenant-0123456789, ya29.second-0123456789") == b"***, ***, ***"


def test_a_key_with_a_slash_is_masked() -> None:
    """PHP and others escape a slash."""
    upstream = replace(UPSTREAM, api_key=Secret("ab/cd/0123456789"))
    assert mask_of(upstream).in_error(b'{"error": "ab\\/cd\\/0123456789"}') == b'{"error": "***"}'


@pytest.mark.parametrize(
    ("value", "secret"),
    [
        ("tenant-secret-0123456789", "tenant-secret-0123456789"),
        ("Bearer eyJhbGciOi.0123456789", "eyJhbGciOi.0123456789"),
        ("lang=en; session=0123456789abcdef==", "0123456789abcdef"),
        ("a-word-of-15-ch", None),
        ("a sentence of several words", None),
    ],
)
def test_secrets_in_our_headers_are_masked_too(value: str, secret: str | None) -> None:
    """Words of 16 characters or more, in ordinary answers as well. Shorter ones are words such as `production`."""
    masked = replace(UPSTREAM, transport=Transport(headers=(("x-one", Secret("abc")), ("x-two", Secret(value)))))
    mask, body = mask_of(masked), f"you sent {value} and {KEY}".encode()
    shown = body.replace(KEY.encode(), b"***").replace(
        (secret or value).encode(), b"***" if secret else value.encode()
    )
    assert mask.anywhere(body) == mask.in_error(body) == mask.in_header(body.decode()).encode() == shown
    for cut in range(len(value)):
        pieces = PieceMask(mask)
        middle = len(b"you sent ") + cut
        assert pieces.feed(body[:middle]) + pieces.feed(body[middle:]) + pieces.end() == shown
    if secret is not None:
        assert mask.anywhere(f"x {secret[:-1]}".encode(), is_cut=True) == b"x ***"
        assert mask.in_error(f"x {secret[:-1]}".encode(), is_cut=True) == b"x ***"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_credentials_for_a_proxy_are_masked(scheme: str) -> None:
    """A request to http:// has them in its head, which a proxy or an upstream may repeat."""
    transport = Transport(proxy=Secret("http://user:pass%2Fword@proxy.example:3128"))
    upstream = replace(UPSTREAM, base_url=f"{scheme}://upstream.example/v1", transport=transport)
    sent = b64encode(b"user:pass/word")
    body = error(f"You sent Proxy-Authorization: Basic {sent.decode()}.")
    shown = body.replace(sent, b"***") if scheme == "http" else body
    assert mask_of(upstream).in_error(body) == mask_of(upstream).anywhere(body) == shown


def test_a_body_that_needs_no_mask_is_unchanged() -> None:
    """With all its escapes."""
    body = b'{"error": "a\\/b \\u0041 \\n"}'
    assert mask_of(UPSTREAM).in_error(body) == body
    assert mask_of(UPSTREAM).in_error(b"the org-chart of the project") == b"the org-chart of the project"


def test_a_key_that_breaks_off_is_masked() -> None:
    """Its beginning is a secret too, if it is long enough to be one."""
    body = b"data: " + KEY.encode()
    for end in range(len(body)):
        shown = mask_of(UPSTREAM).in_error(body[:end], is_cut=True)
        assert shown == (body[:end] if end < 14 else b"data: ***")
    assert mask_of(UPSTREAM).in_error(body[:-1]) == body[:-1]
    escaped = b"".join(b"\\u%04x" % letter for letter in KEY.encode())
    for end in range(6 * 8, len(escaped)):
        assert mask_of(UPSTREAM).in_error(escaped[:end], is_cut=True) == b"***"


def test_without_a_key_nothing_is_masked() -> None:
    """An empty key masks nothing either, although it is part of every text."""
    empty = Upstream("up", "http://upstream.example/v1", Secret(""))
    for upstream in (OPEN, empty):
        assert mask_of(upstream).in_error(b"abc") == b"abc"
        assert meaning(400, error(), None, upstream) == Rejected(400, error())


bodies = st.binary(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.just(KEY),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["error", "message", "type", "code", "x"]), inner, max_size=3)
    ),
).map(lambda value: json.dumps(value).encode())


@given(status=st.integers(100, 599), body=bodies, retry_after=st.none() | st.text(max_size=9))
def test_every_error_answer_has_a_meaning(status: int, body: bytes, retry_after: str | None) -> None:
    """Nothing is raised, the key is never shown, and the type of the result alone says what is charged."""
    meant = failure(status, body, retry_after)
    if isinstance(meant, ProxyError):
        assert isinstance(meant, UpstreamError)
        assert KEY not in json.dumps(meant.body()) + str(meant.headers)
        return
    assert KEY.encode() not in meant.body
    assert isinstance(json.loads(meant.body)["error"], dict)
    assert isinstance(meant, Rejected if status < 500 else Failed)


# ------------------------------------------------------------------------------------------------- Anthropic's errors

CLAUDE = Upstream("up", "http://upstream.example/v1", Secret(KEY), "anthropic")


def anthropic_error(type: str, message: str = "It can't be done.") -> bytes:
    """A body with an error in Anthropic's shape."""
    return json.dumps({"type": "error", "error": {"type": type, "message": message}, "request_id": "r"}).encode()


@pytest.mark.parametrize("status", [400, 404, 413])
def test_a_request_rejected_by_anthropic_is_forwarded(status: int) -> None:
    """With Anthropic's message, or if there is none, with ours in Anthropic's shape."""
    body = anthropic_error("invalid_request_error")
    assert meaning(status, body, None, CLAUDE) == Rejected(status, body)
    wrapped = meaning(status, HTML, None, CLAUDE)
    assert isinstance(wrapped, Rejected)
    result = json.loads(wrapped.body)
    assert (result["type"], result["error"]["type"]) == ("error", "invalid_request_error")
    assert str(status) in result["error"]["message"]


def test_an_overload_of_anthropic_is_forwarded() -> None:
    """With the status that its SDK knows. Nothing is charged."""
    body = anthropic_error("overloaded_error", f"Overloaded, {KEY}")
    assert meaning(529, body, None, CLAUDE) == Failed(529, body.replace(KEY.encode(), b"***"))


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (
            400,
            anthropic_error("invalid_request_error", "Your credit balance is too low to access the Anthropic API."),
        ),
        (403, anthropic_error("billing_error")),
        (402, anthropic_error("billing_error")),
    ],
)
def test_a_used_up_account_at_anthropic_is_not_the_user_s_fault(status: int, body: bytes) -> None:
    """Anthropic has no code for it and may answer 400. The user is charged nothing."""
    failed = meaning(status, body, None, CLAUDE)
    assert isinstance(failed, UpstreamError)
    assert isinstance(failed, UpstreamExhausted) == (status != 403)
