"""Pages of lists. The cursor of a page is the key of its last row, so a deep page costs no more than the first.

Rows that are added or deleted meanwhile move no other row to another page, as they would with offsets.
"""

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import orjson

from proxy.administration.change import ChangeRefused

LIMIT, LIMIT_MAX = 100, 1000
_NUMBER_MAX = 2**53

T = TypeVar("T")
Row = TypeVar("Row")
Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some rows of a list. `next` is the cursor of the page after this one; None: this is the last one."""

    data: tuple[T, ...]
    next: str | None = None


@dataclass(frozen=True, slots=True)
class Paging:
    """Which page of a list is asked for: at most `limit` rows after the cursor `after`, which `Page.next` was."""

    after: str | None = None
    limit: int = LIMIT

    @property
    def size(self) -> int:
        """How many rows the page has at most: from 1 to 1,000."""
        return max(1, min(self.limit, LIMIT_MAX))

    def key(self, *types: type[str] | type[int]) -> Any:
        """The key in the cursor, a tuple of these types; None: the list begins with its first row.

        Raises ChangeRefused if the cursor is not one of such a list.
        """
        if self.after is None:
            return None
        try:
            found = orjson.loads(base64.urlsafe_b64decode(f"{self.after}=="))
        except (binascii.Error, ValueError):  # also orjson's error, and one of a text that is not ASCII
            found = None
        is_key = isinstance(found, list) and [type(each) for each in found] == list(types)
        # Larger numbers are no instants, and SQLite can't compare them.
        if not is_key or any(type(each) is int and abs(each) > _NUMBER_MAX for each in found):
            raise ChangeRefused("after", "this is no cursor of this list; use the `next` of a page as it is")
        return tuple(found)

    def page(self, rows: Sequence[Row], key: Callable[[Row], Key], make: Callable[[Row], T]) -> Page[T]:
        """The page of these rows. If they are more than its size, another page follows."""
        shown = rows[: self.size]
        return Page(tuple(map(make, shown)), cursor_of(key(shown[-1])) if len(rows) > len(shown) else None)


def cursor_of(key: Key) -> str:
    """The cursor of the page that begins after the row with this key."""
    return base64.urlsafe_b64encode(orjson.dumps(key)).decode().rstrip("=")
