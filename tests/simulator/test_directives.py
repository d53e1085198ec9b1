"""Directives are parsed, an invalid one is an error, and error responses are worded as OpenAI's."""

import pytest

from proxy.simulator.directives import (
    TOKENS_MAX,
    ApiError,
    Directives,
    error_for_status,
    invalid_key_error,
    read_directives,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Directives()),
        ("  ", Directives()),
        ("tokens=300", Directives(tokens=300)),
        ("tokens=0", Directives(tokens=0)),
        ("speed=100", Directives(tokens_per_s=100.0)),
        ("delay=0.5 speed=2.5", Directives(delay_s=0.5, tokens_per_s=2.5)),
        ("status=429 code=insufficient_quota", Directives(status=429, code="insufficient_quota")),
        ("cut=5", Directives(fault="cut", fault_after=5)),
        ("error=3 no_done", Directives(fault="error", fault_after=3, no_done=True)),
        ("stall=0", Directives(fault="stall", fault_after=0)),
        ("no_usage crlf", Directives(no_usage=True, crlf=True)),
        ("usage_early", Directives(usage_early=True)),
        ("usage_zero", Directives(usage_zero=True)),
        ("hang html", Directives(hang=True, html=True)),
        ("header=X-A:1 header=X-B:a:b", Directives(headers=(("X-A", "1"), ("X-B", "a:b")))),
    ],
)
def test_each_directive_sets_its_field(text: str, expected: Directives) -> None:
    """Several directives are separated by spaces."""
    assert read_directives({"metadata": {"simulate": text}}) == expected


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"model": "gpt-4o-mini+tokens=300+cut=5"}, Directives(tokens=300, fault="cut", fault_after=5)),
        ({"model": "m+tool", "metadata": {"user_id": "7"}}, Directives(tool=True)),
        ({"model": "m+tool", "metadata": {"simulate": "tokens=3"}}, Directives(tokens=3)),
        ({"model": "gpt-4o-mini"}, Directives()),
        ({"model": None}, Directives()),
    ],
)
def test_directives_after_the_model_name(params: dict[str, object], expected: Directives) -> None:
    """For clients that send no metadata, or metadata without `simulate`. `metadata.simulate` takes precedence."""
    assert read_directives(params) == expected


@pytest.mark.parametrize("params", [{}, {"metadata": None}, {"metadata": "x"}, {"metadata": {"trace": "7"}}])
def test_a_request_without_directives(params: dict[str, object]) -> None:
    """It gets an ordinary answer; other metadata is ignored."""
    assert read_directives(params) == Directives()


@pytest.mark.parametrize(
    "text",
    [
        *(
            "cutt=5",
            "cut",
            "cut=",
            "cut=x",
            "cut=-1",
            "tokens=1.5",
            f"tokens={TOKENS_MAX + 1}",
            "speed=0",
            "speed=nan",
        ),
        *("status=99", "status=600", "no_done=1", "nonsense", "header=X-A", "delay=-1", 5, ["cut=5"], None),
    ],
)
def test_an_invalid_directive_is_an_error(text: object) -> None:
    """A misspelt fault must not be answered as if there were no fault."""
    with pytest.raises(ApiError) as caught:
        read_directives({"metadata": {"simulate": text}})
    with pytest.raises(ApiError):
        read_directives({"model": f"gpt-4o-mini+{text or 'cutt'}"})
    assert (caught.value.status, caught.value.error["param"]) == (400, "metadata")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, None, ("invalid_request_error", None)),
        (400, "context_length_exceeded", ("invalid_request_error", "context_length_exceeded")),
        (401, None, ("invalid_request_error", "invalid_api_key")),
        (403, "unsupported_country", ("invalid_request_error", "unsupported_country")),
        (429, None, ("requests", "rate_limit_exceeded")),
        (429, "slow_down", ("requests", "slow_down")),
        (429, "insufficient_quota", ("insufficient_quota", "insufficient_quota")),
        (500, None, ("server_error", None)),
        (503, "overloaded", ("server_error", "overloaded")),
    ],
)
def test_errors_have_the_type_and_code_of_openai(
    status: int, code: str | None, expected: tuple[str, str | None]
) -> None:
    """Clients decide by type and code whether to retry, so these are the real ones."""
    error = error_for_status(status, code, "sk-some-key-of-the-proxy")
    assert error.status == status
    assert (error.error["type"], error.error["code"]) == expected
    assert list(error.error) == ["message", "type", "param", "code"]


def test_the_error_for_an_invalid_key_shows_part_of_the_key() -> None:
    """As OpenAI's does, so tests can check that the proxy does not pass it on. It never shows the whole key."""
    key = "sk-upstream-0123456789"
    message = invalid_key_error(key).error["message"]
    assert key[:8] in message
    assert key[-4:] in message
    assert key not in message
    assert "ab***" in invalid_key_error("abcdef").error["message"]
    assert invalid_key_error("").error["code"] is None
