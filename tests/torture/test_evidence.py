"""The records of a torture run."""

import pytest

from proxy.torture.answers import Refusal
from proxy.torture.evidence import Line, Seen


def test_a_line_names_the_window_that_it_counts_in() -> None:
    """The same counter in another window is another sum."""
    line = Line(("user:u", "g/q"), 5, (1, 2, 1))
    assert line.window == ("user:u", "g/q", 5)


@pytest.mark.parametrize(
    ("refusal", "had_room"), [(None, False), (Refusal(), False), (Refusal(free=49), False), (Refusal(free=50), True)]
)
def test_a_call_had_room_where_what_it_needs_was_free(refusal: Refusal | None, had_room: bool) -> None:
    """To the token; where nobody says what was free, nothing can be said."""
    assert Seen("a", 0, 50, refusal=refusal).had_room == had_room
