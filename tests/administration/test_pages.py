"""Cursors: what a page begins with, and what is refused."""

import pytest

from proxy.administration.change import ChangeRefused
from proxy.administration.pages import Paging, cursor_of


def test_a_cursor_is_the_key_of_the_last_row():
    """The last page has none. Rows of any text survive."""
    rows = [("ü=/+", 1), ("b", 2), ("c", 3)]
    first = Paging(limit=2).page(rows, lambda row: row, lambda row: row[1])
    assert first.data == (1, 2)
    assert first.next == cursor_of(("b", 2))
    assert Paging(first.next).key(str, int) == ("b", 2)
    assert Paging(cursor_of(rows[0])).key(str, int) == rows[0]
    assert Paging(limit=3).page(rows, lambda row: row, lambda row: row[1]).next is None
    assert Paging(limit=3).page([], lambda row: row, lambda row: row).data == ()


@pytest.mark.parametrize(("limit", "size"), [(0, 1), (-5, 1), (7, 7), (1000, 1000), (10**9, 1000)])
def test_a_page_has_from_1_to_1000_rows(limit, size):
    assert Paging(limit=limit).size == size


@pytest.mark.parametrize(
    "after",
    ["", "x", "é", "W10", cursor_of(("a",)), cursor_of((1, "a")), cursor_of(("a", 2, 3)), cursor_of(("a", True))],
)
def test_a_text_that_is_no_cursor_of_the_list_is_refused(after):
    """Also the cursor of another list, whose key has other types."""
    with pytest.raises(ChangeRefused) as caught:
        Paging(after).key(str, int)
    assert caught.value.field == "after"


@pytest.mark.parametrize("number", [2**63, 2**64 - 1, -(2**63), 2**53 + 1])
def test_a_number_that_no_database_compares_is_no_cursor(number):
    """SQLite's driver raises an error for it, which was answered as one of the proxy."""
    with pytest.raises(ChangeRefused, match="no cursor"):
        Paging(cursor_of((number, "a"))).key(int, str)
