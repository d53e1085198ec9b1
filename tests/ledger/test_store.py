"""The words in which every engine says that it can't."""

import pytest

from proxy.ledger.store import StoreUnavailable


@pytest.mark.parametrize("is_uncertain", [True, False])
def test_whether_it_may_have_been_done_is_told(is_uncertain):
    """Whoever asked must know whether to take it back."""
    error = StoreUnavailable("the connection broke", is_uncertain=is_uncertain)
    assert (str(error), error.is_uncertain) == ("the connection broke", is_uncertain)
