"""How long a busy call is told to wait."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.ledger.queue import RETRY_S_MAX, RETRY_S_MIN, DurationEstimate
from tests.builders import NOON


def _pace(lengths_s: list[int], begun_s_ago: list[int]) -> DurationEstimate:
    """Calls that took so long, and calls in flight that began so long ago."""
    pace = DurationEstimate()
    for number, length in enumerate(lengths_s):
        pace.began(f"ended {number}", NOON)
        pace.ended(f"ended {number}", NOON + length * 1000)
    for number, ago in enumerate(begun_s_ago):
        pace.began(f"in flight {number}", NOON - ago * 1000)
    return pace


@pytest.mark.parametrize(
    ("lengths_s", "begun_s_ago", "busy_s"),
    [
        ([], [], 2),
        ([], [5], 2),  # nothing is known yet
        ([20], [], 2),  # nothing is in flight
        ([20, 20, 20], [5], 15),
        ([10, 20, 90], [0, 8, 19], 12),  # the median of both
        ([20], [100], 2),  # it takes longer than usual: any moment
        ([600], [0], 30),
    ],
)
def test_it_is_what_calls_in_flight_have_still_before_them(
    lengths_s: list[int], begun_s_ago: list[int], busy_s: int
) -> None:
    """The median of the usual length less what has passed, between 2 and 30 seconds."""
    assert _pace(lengths_s, begun_s_ago).busy_s(NOON) == busy_s


def test_it_is_rounded_up() -> None:
    """Who comes back when told is not too early."""
    pace = DurationEstimate()
    pace.began("1", NOON)
    pace.ended("1", NOON + 5001)
    pace.began("2", NOON)
    assert pace.busy_s(NOON) == 6


@given(st.lists(st.integers(-(10**9), 10**9), max_size=300), st.lists(st.integers(-(10**9), 10**9), max_size=300))
def test_it_is_always_a_wait_that_sdks_sleep_through(lengths: list[int], begun: list[int]) -> None:
    """Also with a clock that jumps; and only so many lengths are remembered."""
    pace = DurationEstimate()
    for number, length in enumerate(lengths):
        pace.began(str(number), NOON)
        pace.ended(str(number), NOON + length)
    for number, ago in enumerate(begun):
        pace.began(f"in flight {number}", NOON - ago)
    assert RETRY_S_MIN <= pace.busy_s(NOON) <= RETRY_S_MAX
