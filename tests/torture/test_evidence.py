"""The records of a torture run."""

import pytest

from proxy.torture.answers import Refusal
from proxy.torture.evidence import ClientRecord, HeldAmount


def test_a_held_amount_names_its_window() -> None:
    """The same counter has another sum in another window."""
    held = HeldAmount(("user:u", "g/q"), 5, (1, 2, 1))
    assert held.window == ("user:u", "g/q", 5)


@pytest.mark.parametrize(
    ("refusal", "is_falsely_refused"),
    [
        (None, False),
        (Refusal(), False),
        (Refusal(free_tokens=49), False),
        (Refusal(free_tokens=50), True),
    ],
)
def test_a_refusal_is_false_if_the_needed_tokens_were_free(refusal: Refusal | None, is_falsely_refused: bool) -> None:
    """Exactly to the token. A refusal that does not say what was free is not false."""
    assert ClientRecord("a", 0, 50, refusal=refusal).is_falsely_refused == is_falsely_refused
