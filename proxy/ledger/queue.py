"""Calls that would fit but for calls in flight: they wait a moment instead of being refused.

Each user has a queue of their own for each set of quotas, in the order in which the calls came; only its first asks
the ledger, so a small call can't slip past a large one for ever, and no queue holds up another. It asks again
whenever something was given back on a counter that it needs, and now and then without that, since other processes
give back too. Who has waited for long enough gets the ledger's last word, which is "busy".
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from itertools import islice
from statistics import median

from proxy.errors import LedgerUnavailable
from proxy.ledger.book import Accepted, Extend, Refused, Reserve
from proxy.ledger.ledger import Ledger
from proxy.policy.admission import NeedsCount, Verdict
from proxy.policy.quota import CounterKey, Demand

# How many of one user's calls may wait, and how many in all: past that a call is refused as busy at once.
OF_A_USER_MAX = 64
IN_ALL_MAX = 1024
# How often the first of a queue asks without having been woken, in seconds.
_ASK_EVERY_S = 1.0


class _Place:
    """One call's place in its user's queue."""

    __slots__ = ("keys", "wake")

    def __init__(self, keys: Iterable[CounterKey]) -> None:
        self.keys = frozenset(keys)
        self.wake = asyncio.Event()


class _Asking:
    """One call that asks the ledger, again and again; its input is counted if the ledger has to know it better."""

    def __init__(self, ledger: Ledger, operation: Reserve, recount: Callable[[], Awaitable[Demand]]) -> None:
        self.operation = operation
        self.queue = (operation.labels.user, frozenset(operation.binding.keys()))
        self._ledger = ledger
        self._recount = recount

    async def ask(self) -> Accepted | Refused:
        reply = await self._ledger.reserve(self.operation)
        if isinstance(reply, NeedsCount):
            self.operation = replace(self.operation, demand=await self._recount())
            reply = await self._ledger.reserve(self.operation)
            assert not isinstance(reply, NeedsCount), "what was counted is not rough any more"
        return reply


class AdmissionQueue:
    """Lets calls in through the ledger, and has those wait that are only held up by others."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._queues: dict[tuple[str, frozenset[CounterKey]], deque[_Place]] = {}
        self._growing: set[_Place] = set()
        self._waiting = 0
        ledger.on_freed(self._freed)

    def __len__(self) -> int:
        return self._waiting

    async def reserve(
        self, operation: Reserve, *, wait_s: float, recount: Callable[[], Awaitable[Demand]]
    ) -> Accepted | Refused:
        """Let a call in, or say why not; where only calls in flight stand in the way, after up to `wait_s`.

        `recount` gives its demand with the input counted, for when its bytes are too rough a bound. Cancelling gives
        up the place. Raises LedgerUnavailable.
        """
        asking = _Asking(self.ledger, operation, recount)
        if not self._queues.get(asking.queue):
            reply = await asking.ask()
            if not _is_busy(reply) or wait_s <= 0:
                return reply
        if self._waiting >= IN_ALL_MAX or self._waiting_of(operation.labels.user) >= OF_A_USER_MAX:
            return await asking.ask()
        return await self._wait(asking, asyncio.get_running_loop().time() + wait_s)

    async def extend(
        self, operation: Extend, *, wait_s: float, ask_s: float, is_disconnected: Callable[[], bool] = lambda: False
    ) -> Accepted:
        """Hold more for a stream; where only calls in flight stand in the way, after up to `wait_s`.

        Not for a client that has gone meanwhile: that is looked at once a second.

        Raises LedgerUnavailable, also where the ledger takes longer than `ask_s` to answer.
        """
        until = asyncio.get_running_loop().time() + wait_s
        place = _Place(operation.binding.keys())
        self._growing.add(place)
        try:
            while True:
                reply = await self._extend(operation, ask_s)
                left = until - asyncio.get_running_loop().time()
                if reply.verdict is not Verdict.BUSY or left <= 0 or is_disconnected():
                    return reply
                await _woken(place.wake, min(left, _ASK_EVERY_S))
        finally:
            self._growing.discard(place)

    async def _extend(self, operation: Extend, ask_s: float) -> Accepted:
        try:
            async with asyncio.timeout(ask_s):
                return await self.ledger.extend(operation)
        except TimeoutError:
            raise LedgerUnavailable from None

    async def _wait(self, asking: _Asking, until: float) -> Accepted | Refused:
        place, queue = _Place(asking.queue[1]), self._queues.setdefault(asking.queue, deque())
        queue.append(place)
        self._waiting += 1
        try:
            while True:
                left = until - asyncio.get_running_loop().time()
                if queue[0] is place or left <= 0:
                    reply = await asking.ask()
                    if not _is_busy(reply) or left <= 0:
                        return reply
                await _woken(place.wake, min(left, _ASK_EVERY_S))
        finally:
            self._waiting -= 1
            queue.remove(place)
            if queue:
                queue[0].wake.set()  # it may be its turn now
            else:
                self._queues.pop(asking.queue, None)

    def _waiting_of(self, user: str) -> int:
        return sum(len(places) for queue, places in self._queues.items() if queue[0] == user)

    def _freed(self, keys: set[CounterKey]) -> None:
        for place in (*self._growing, *(queue[0] for queue in self._queues.values())):
            if not place.keys.isdisjoint(keys):
                place.wake.set()


def _is_busy(reply: Accepted | Refused) -> bool:
    return isinstance(reply, Refused) and reply.decision.verdict is Verdict.BUSY


async def _woken(wake: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await wake.wait()
    except TimeoutError:
        pass
    wake.clear()


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
