"""Errors and usage of Anthropic's API.

Sources: docs/wire.md, sections 1.2 and 1.3 (usage) and 3.6 (the client).
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import InvalidRequest, LedgerUnavailable, Refusal, UpstreamError
from proxy.formats.anthropic import error_body, read_usage, type_of
from proxy.policy.amounts import Tokens


def test_an_error_keeps_the_members_for_programs() -> None:
    """`reset_at` and the like are inside `error`, where the SDK exposes them; the type is Anthropic's."""
    members = {"reset_at": "2026-11-25T00:00:00+01:00", "retry_after": 7}
    error = Refusal("Used up.", type="insufficient_quota", code="insufficient_quota", headers={}, members=members)
    assert error_body(error, "req_1") == {
        "type": "error",
        "error": {"type": "rate_limit_error", "message": "Used up.", "code": "insufficient_quota", **members},
        "request_id": "req_1",
    }


def test_an_error_has_no_empty_members() -> None:
    """OpenAI's shape has nulls, Anthropic's does not. An error inside a stream has no id."""
    body = error_body(InvalidRequest("No.", param="tools"))
    assert body == {"type": "error", "error": {"type": "invalid_request_error", "message": "No.", "param": "tools"}}
    assert error_body(UpstreamError("No."))["error"]["type"] == "api_error"  # type: ignore[index]
    assert error_body(LedgerUnavailable())["error"]["type"] == "overloaded_error"  # type: ignore[index]


@pytest.mark.parametrize(
    ("status", "type"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (408, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
        (529, "overloaded_error"),
    ],
)
def test_the_status_determines_the_error_type(status: int, type: str) -> None:
    """The API description lists these; any other 4xx is a bad request, any other 5xx an API error."""
    assert type_of(status) == type


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"input_tokens": 7, "output_tokens": 5}, Tokens(7, 5)),
        (
            {
                "input_tokens": 7,
                "cache_creation_input_tokens": 100,
                "cache_read_input_tokens": 1000,
                "cache_creation": {"ephemeral_5m_input_tokens": 100},
                "output_tokens": 5,
                "output_tokens_details": {"thinking_tokens": 3},
            },
            Tokens(1107, 5, cached=1000, reasoning=3),
        ),
        (
            {
                "input_tokens": 7,
                "cache_creation_input_tokens": None,
                "cache_read_input_tokens": 0,
                "output_tokens": 5,
            },
            Tokens(7, 5),
        ),
        ({"cache_read_input_tokens": 9, "output_tokens": 5}, Tokens(9, 5, cached=9)),
        ({"input_tokens": 0, "output_tokens": 0}, Tokens(0, 0)),
        ({"input_tokens": 7, "output_tokens": 5, "output_tokens_details": "x"}, Tokens(7, 5)),
        ({"input_tokens": -7, "output_tokens": 5}, None),
        ({"input_tokens": 7, "cache_read_input_tokens": "many", "output_tokens": 5}, None),
        ({"input_tokens": 7, "output_tokens": 2.5}, None),
        ({"output_tokens": 5}, None),
        ({}, None),
    ],
)
def test_the_three_parts_of_the_input_are_added(usage: dict, tokens: Tokens | None) -> None:
    """At OpenAI cached tokens are a part of the input, here they stand beside it; invalid usage gives None."""
    assert read_usage(usage) == tokens


@given(st.tuples(*[st.integers(0, 1_000_000)] * 4))
def test_the_input_is_the_sum_of_its_parts(parts: tuple[int, int, int, int]) -> None:
    """All three parts are charged, and `cached` is the part that was read from the cache."""
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
    assert read_usage(dict(zip(names, parts, strict=True))) == Tokens(sum(parts[:3]), parts[3], cached=parts[2])
