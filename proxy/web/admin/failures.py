"""Slows down clients that guess admin keys: five wrong ones a minute from one address."""

from collections import OrderedDict, deque
from collections.abc import Callable
from math import ceil

from proxy.identity.client_address import shared_address

FAILURES_MAX = 5
WITHIN_S = 60.0
# The one that failed longest ago is forgotten first. A client with more addresses has five attempts with each.
_ADDRESSES_MAX = 1024


class Failures:
    """When wrong keys came from which address, of the last minute. `clock` gives seconds that only grow.

    A right key from the same address is refused too while the address has to wait. Otherwise the client could go on
    guessing. Logins that have begun are not affected.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at_s: OrderedDict[str, deque[float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._at_s)

    def wait_s(self, address: str) -> int:
        """How many seconds this address has to wait; 0 if its next key is looked at."""
        failed = self._at_s.get(shared_address(address))
        if failed is None or len(failed) < FAILURES_MAX:
            return 0
        return max(0, ceil(failed[0] + WITHIN_S - self._clock()))

    def note(self, address: str) -> None:
        """A wrong key came from this address."""
        name = shared_address(address)
        failed = self._at_s.pop(name, None) or deque(maxlen=FAILURES_MAX)
        failed.append(self._clock())
        self._at_s[name] = failed
        if len(self._at_s) > _ADDRESSES_MAX:
            self._at_s.popitem(last=False)
