"""The maximum that the proxy writes near the end of a quota, and what upstreams say about one that is too large."""

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.endpoints import CHAT
from proxy.formats.maximum import allowed_maximum, is_about_maximum, with_note, written_maximum
from proxy.formats.request import Request, parse_request
from proxy.policy.catalog import Model, Upstream
from tests.rejections import INPUT, REJECTIONS, Rejection


def _request(**fields: object) -> Request:
    return parse_request(CHAT, json.dumps({"model": "m", "messages": [], **fields}).encode())


def _model(kind: str = "openai", **known: int) -> Model:
    return Model("m", Upstream("up", "http://upstream.example/v1", None, kind), "m", **known)


def _written(
    request: Request | None = None,
    model: Model | None = None,
    *,
    longest: int = 1000,
    held_input: int = 50,
    context: int | None = None,
    is_output_limited: bool = False,
) -> int | None:
    return written_maximum(
        request or _request(),
        model or _model(),
        longest=longest,
        held_input=held_input,
        context=context,
        is_output_limited=is_output_limited,
    )


@pytest.mark.parametrize(
    ("fields", "known", "expected"),
    [
        ({"max_tokens": 5000}, {}, 1000),
        ({"max_tokens": 5000}, {"max_output_tokens": 700}, 700),
        ({"max_tokens": 1001, "n": 2}, {}, 500),
        ({"max_tokens": 1000}, {}, None),
        ({"max_tokens": 0}, {}, 1000),
        ({}, {}, 1000),
        ({"n": 3}, {}, 333),
        ({}, {"max_output_tokens": 1000}, None),
        ({}, {"max_output_tokens": 1001}, 1000),
    ],
)
def test_a_maximum_is_written_only_if_the_answer_could_be_longer(
    fields: dict[str, object], known: dict[str, int], expected: int | None
) -> None:
    """It is what the quotas have left for each choice, and never more than the model's longest answer."""
    assert _written(_request(**fields), _model(**known)) == expected


@pytest.mark.parametrize(
    ("context", "fields", "is_output_limited", "expected"),
    [
        (1001, {}, True, None),  # an input has one token or more
        (1002, {}, True, 1000),
        (1050, {}, False, None),  # 50 + 1000 are held: the whole context
        (1051, {}, False, 1000),
        (1050, {}, True, 1000),  # the input may have 1 token and the answer 1049
        (1050, {"n": 2}, False, 500),
        (501, {"n": 2}, True, None),
        (1001, {"max_tokens": 5000}, True, 1000),  # the client's own maximum is lowered in any case
    ],
)
def test_no_maximum_is_written_if_the_context_ends_the_answer_before(
    context: int, fields: dict[str, object], is_output_limited: bool, expected: int | None
) -> None:
    """Then the upstream could reject it, and it would bound nothing."""
    found = _written(_request(**fields), context=context, is_output_limited=is_output_limited)
    assert found == expected


@given(
    longest=st.integers(1, 500),
    context=st.integers(1, 500),
    held_input=st.integers(1, 200),
    input_tokens=st.integers(1, 200),
    choices=st.integers(1, 3),
    is_output_limited=st.booleans(),
)
def test_what_is_written_is_enough_for_the_quotas_and_accepted_by_the_upstream(
    longest: int, context: int, held_input: int, input_tokens: int, choices: int, is_output_limited: bool
) -> None:
    """The longest answer that the upstream can then give exceeds nothing that is held.

    And if one choice is asked for and only the sum is limited, the context leaves room for what is written.
    """
    longest = max(longest, choices)
    input_tokens = min(input_tokens, held_input, context)
    written = _written(
        _request(n=choices),
        longest=longest,
        held_input=held_input,
        context=context,
        is_output_limited=is_output_limited,
    )
    left = context - input_tokens
    each = left if written is None else min(written, left)
    if is_output_limited:
        assert each * choices <= longest
    assert input_tokens + each * choices <= held_input + longest
    if written is not None and choices == 1 and not is_output_limited:
        assert written <= left


@pytest.mark.parametrize("rejection", REJECTIONS, ids=lambda each: each.vendor)
def test_each_vendor_s_message_says_what_would_be_accepted(rejection: Rejection) -> None:
    """The context without the input, or the model's longest answer."""
    body = rejection.body(rejection.sent)
    assert is_about_maximum(rejection.status, body, maximum=rejection.sent)
    assert allowed_maximum(body, maximum=rejection.sent, held_input=INPUT) == rejection.allowed


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 2048 tokens. However, your messages resulted in 4238 tokens.",
        "The input (8391 tokens) is longer than the model's context length (8192 tokens).",
        "Prompt contains 300000 tokens, too large for model with 131072 maximum context length",
        "Unknown parameter: 'logit_bias'. 134920 is no answer.",
    ],
)
def test_an_error_about_something_else_is_not_about_the_maximum(message: str) -> None:
    """It names neither the number that was written nor a field for it. So it is passed on unchanged."""
    body = json.dumps({"error": {"message": message}}).encode()
    assert not is_about_maximum(400, body, maximum=3492)


@pytest.mark.parametrize("status", [401, 404, 413, 429, 500])
def test_only_a_400_and_a_422_are_about_a_field(status: int) -> None:
    """A rate limit may name the maximum too."""
    body = b'{"error": {"message": "3492 tokens are more than your limit for each minute"}}'
    assert not is_about_maximum(status, body, maximum=3492)
    assert is_about_maximum(400, body, maximum=3492)


@pytest.mark.parametrize(
    "message",
    [
        "max_tokens is too large",
        "max_tokens must be at least 16",
        "max_tokens is too large: 3492. This model supports at most 4096 completion tokens",
        "This model's maximum context length is 2048 tokens. However, you requested 5540 tokens (2048 in the "
        "messages, 3492 in the completion).",
        "max_tokens=3492 cannot be greater than max_model_len=40",  # with 50 of input nothing is left
    ],
)
def test_no_number_is_better_than_one_that_cannot_be_sent(message: str) -> None:
    """There is none, or it is not smaller than what was sent, or it leaves no room for an answer."""
    assert allowed_maximum(json.dumps({"error": message}).encode(), maximum=3492, held_input=50) is None


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode), st.integers(1, 10**6), st.integers(0, 10**6))
def test_whatever_an_upstream_says_the_maximum_becomes_smaller(body: bytes, maximum: int, held_input: int) -> None:
    """So what is sent once more never exceeds what is held."""
    found = allowed_maximum(b"maximum context length is " + body, maximum=maximum, held_input=held_input)
    assert found is None or 0 < found < maximum


@pytest.mark.parametrize(
    ("body", "noted"),
    [
        ({"error": {"message": "No.", "code": "x"}}, {"error": {"message": "No. Ours.", "code": "x"}}),
        (
            {"type": "error", "error": {"type": "invalid_request_error", "message": "No."}},
            {"type": "error", "error": {"type": "invalid_request_error", "message": "No. Ours."}},
        ),
        ({"error": "No."}, {"error": "No."}),
    ],
)
def test_a_note_is_added_to_the_message(body: dict[str, object], noted: dict[str, object]) -> None:
    """Of OpenAI's and Anthropic's errors; another shape has no place for it."""
    assert orjson.loads(with_note(orjson.dumps(body), " Ours.")) == noted
