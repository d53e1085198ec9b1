"""A request says how the simulator is to answer or to fail, and is told when it can't be understood."""

import pytest

from proxy.simulator.directives import TOKENS_MAX, Complaint, Directions, complaint_of, read_directions, wrong_key


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("", Directions()),
        ("  ", Directions()),
        ("tokens=300", Directions(tokens=300)),
        ("tokens=0", Directions(tokens=0)),
        ("speed=100", Directions(tokens_per_s=100.0)),
        ("delay=0.5 speed=2.5", Directions(delay_s=0.5, tokens_per_s=2.5)),
        ("status=429 code=insufficient_quota", Directions(status=429, code="insufficient_quota")),
        ("cut=5", Directions(fault="cut", fault_after=5)),
        ("error=3 no_done", Directions(fault="error", fault_after=3, no_done=True)),
        ("stall=0", Directions(fault="stall", fault_after=0)),
        ("no_usage crlf", Directions(no_usage=True, crlf=True)),
        ("usage_early", Directions(usage_early=True)),
        ("usage_zero", Directions(usage_zero=True)),
        ("hang html", Directions(hang=True, html=True)),
        ("header=X-A:1 header=X-B:a:b", Directions(headers=(("X-A", "1"), ("X-B", "a:b")))),
    ],
)
def test_directives(wish: str, expected: Directions) -> None:
    """Each directive means one thing, and several stand beside each other."""
    assert read_directions({"metadata": {"simulate": wish}}) == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"model": "gpt-4o-mini+tokens=300+cut=5"}, Directions(tokens=300, fault="cut", fault_after=5)),
        ({"model": "m+tool", "metadata": {"user_id": "7"}}, Directions(tool=True)),
        ({"model": "m+tool", "metadata": {"simulate": "tokens=3"}}, Directions(tokens=3)),
        ({"model": "gpt-4o-mini"}, Directions()),
        ({"model": None}, Directions()),
    ],
)
def test_directives_behind_a_model_s_name(asked: dict[str, object], expected: Directions) -> None:
    """For clients that send no metadata, or whose metadata are others; what these say goes first."""
    assert read_directions(asked) == expected


@pytest.mark.parametrize("asked", [{}, {"metadata": None}, {"metadata": "x"}, {"metadata": {"trace": "7"}}])
def test_no_directives(asked: dict[str, object]) -> None:
    """A request that says nothing of the kind gets an ordinary answer; other metadata are its own affair."""
    assert read_directions(asked) == Directions()


@pytest.mark.parametrize(
    "wish",
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
def test_what_is_no_directive_is_an_error(wish: object) -> None:
    """A misspelt fault must not pass as an answer without one."""
    with pytest.raises(Complaint) as caught:
        read_directions({"metadata": {"simulate": wish}})
    with pytest.raises(Complaint):
        read_directions({"model": f"gpt-4o-mini+{wish or 'cutt'}"})
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
    """What tells clients whether to try again is the type and the code, so these are the real ones."""
    complaint = complaint_of(status, code, "sk-some-key-of-the-proxy")
    assert complaint.status == status
    assert (complaint.error["type"], complaint.error["code"]) == expected
    assert list(complaint.error) == ["message", "type", "param", "code"]


def test_the_error_for_a_wrong_key_shows_part_of_it() -> None:
    """As OpenAI's does, so it can be seen that the proxy passes nothing of that on; the whole key it never shows."""
    key = "sk-upstream-0123456789"
    message = wrong_key(key).error["message"]
    assert key[:8] in message
    assert key[-4:] in message
    assert key not in message
    assert "ab***" in wrong_key("abcdef").error["message"]
    assert wrong_key("").error["code"] is None
