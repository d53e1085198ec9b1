"""How long calls take, so that a call which was refused as busy can be told when to come back.

Learned from the calls that ended last; of those in flight it is known since when. Pure: instants come in, in ms.
"""

from collections import deque
from itertools import islice
from statistics import median

# How many ended calls are remembered, and of how many in flight the median is taken.
_LOOKED_AT_MAX = 100
# A call may be told to come back in so many seconds: SDKs sleep through all of them by themselves.
LEAST_S, MOST_S = 2, 30


class DurationEstimate:
    """Watches the calls of one process begin and end."""

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}
        self._lengths: deque[int] = deque(maxlen=_LOOKED_AT_MAX)

    def began(self, call_id: str, now: int) -> None:
        """A call was let in."""
        self._begun[call_id] = now

    def ended(self, call_id: str, now: int) -> None:
        """It was settled or released."""
        self._lengths.append(max(0, now - self._begun.pop(call_id)))

    def busy_s(self, now: int) -> int:
        """In how many seconds to come back: the median of what calls in flight have still before them."""
        if not self._begun or not self._lengths:
            return LEAST_S
        usual = median(self._lengths)
        left = median(max(0, usual - (now - begun)) for begun in islice(self._begun.values(), _LOOKED_AT_MAX))
        return min(MOST_S, max(LEAST_S, -int(-left // 1000)))
