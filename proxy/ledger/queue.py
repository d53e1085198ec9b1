"""Calls that wait for tokens which other calls in flight hold, and the estimate of how long that takes.

A call is busy if it fits into what is free, but calls in flight hold a part of that. Such a call waits up to `wait_s`
instead of being refused at once, because calls end all the time and free the rest of their holds.

Each user has one queue for each set of quotas, in order of arrival. Only the first call of a queue asks the ledger,
so a small call cannot overtake a large one again and again. Example with a limit of 1,000 of which 600 are held: a
call that needs 500 waits. Calls of the same user that need 10 each would fit, but wait behind it. Calls of other
users, and of the same user with other quotas, are in other queues and are admitted. Calls that use no tokens have
queues of their own: a moderation does not wait for tokens, and a call that uses nothing waits for nothing.

The first call of a queue asks again whenever the ledger reports that holds were lowered on one of its counters, and
once a second, because other processes lower holds too. A call that has waited `wait_s` asks once more, from any place
in its queue, and gets the ledger's current answer.

A new call is renewed before each time that it asks, so the policy that is in force then decides on it, not the one
with which it began to wait. Example: a call begins to wait at 12:00:00 for a part of 1,000 tokens. At 12:00:05 the
limit is lowered to 500, or a grant raises it to 2,000. From 12:00:06 on, the call asks by the new limit. A stream
that waits keeps the quotas that admitted it.
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
from proxy.policy.amounts import Family
from proxy.policy.quota import CounterKey, Demand

# How many calls may wait, of one user and in total. A busy call beyond that is refused at once.
WAITING_OF_A_USER_MAX = 64
WAITING_MAX = 1024
# How often a call that waits asks the ledger without having been woken, in seconds.
_ASK_EVERY_S = 1.0

_Recount = Callable[[], Awaitable[Demand]]
_Renew = Callable[[], Awaitable[Reserve | None]]
_QueueKey = tuple[str, frozenset[CounterKey], frozenset[Family]]

# ------------------------------------------------------------------------------------------------------ waiting calls


class _Waiter:
    """A call that waits for tokens of these counters. `wake` is set when it should ask again."""

    __slots__ = ("keys", "wake")

    def __init__(self, keys: Iterable[CounterKey]) -> None:
        self.keys = frozenset(keys)
        self.wake = asyncio.Event()


class _Admission:
    """A call that asks for admission. Its input is counted once, if the ledger needs the count.

    In a queue it keeps its place, also if it is renewed with other quotas.
    """

    __slots__ = ("_ledger", "_recount", "_renew", "operation")

    def __init__(self, ledger: Ledger, operation: Reserve, *, recount: _Recount, renew: _Renew) -> None:
        self.operation = operation
        self._ledger = ledger
        self._recount = recount
        self._renew = renew

    @property
    def keys(self) -> frozenset[CounterKey]:
        """The counters of the quotas that it asked for last."""
        return frozenset(self.operation.binding.keys())

    @property
    def queue_key(self) -> _QueueKey:
        """The queue in which it would wait now."""
        return self.operation.labels.user, self.keys, self.operation.demand.uses.families

    async def ask(self) -> Accepted | Refused:
        self.operation = await self._renew() or self.operation
        reply = await self._ledger.reserve(self.operation)
        if isinstance(reply, NeedsCount):
            self.operation = replace(self.operation, demand=await self._recount())
            reply = await self._ledger.reserve(self.operation)
            assert not isinstance(reply, NeedsCount), "the ledger needs no count of an input that was counted"
        return reply


class AdmissionQueue:
    """Admits calls through the ledger; busy calls wait. `len()` is how many wait for admission."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._queues: dict[_QueueKey, deque[_Waiter]] = {}
        self._extending: set[_Waiter] = set()
        self._waiting = 0
        ledger.on_freed(self._wake)

    def __len__(self) -> int:
        return self._waiting

    async def reserve(
        self, operation: Reserve, *, wait_s: float, recount: _Recount, renew: _Renew
    ) -> Accepted | Refused:
        """Admit a call, or say why not. A busy call is refused only after `wait_s`.

        `recount` returns the demand with its input counted. It is called if the number of bytes is too rough a bound.
        `renew` is called before the call asks. It returns the operation by the policy in force, or None if that has
        not changed since the last one. Cancelling removes the call from its queue. Raises LedgerUnavailable, and what
        `renew` raises for a call that is not possible any more.
        """
        admission = _Admission(self.ledger, operation, recount=recount, renew=renew)
        if not self._queues or not self._queues.get(admission.queue_key):
            reply = await admission.ask()
            if not _is_busy(reply) or wait_s <= 0:
                return reply
        if self._waiting >= WAITING_MAX or self._waiting_of(operation.labels.user) >= WAITING_OF_A_USER_MAX:
            return await admission.ask()
        return await self._wait(admission, asyncio.get_running_loop().time() + wait_s)

    async def extend(
        self, operation: Extend, *, wait_s: float, ask_s: float, is_disconnected: Callable[[], bool] = lambda: False
    ) -> Accepted:
        """Raise the hold of a stream. If it is busy, it waits up to `wait_s`, and keeps what it gets meanwhile.

        A stream whose client `is_disconnected` stops waiting within a second. `ask_s` is how long the ledger may take
        for one answer. Raises LedgerUnavailable, also if it takes longer.
        """
        until = asyncio.get_running_loop().time() + wait_s
        waiter = _Waiter(operation.binding.keys())
        self._extending.add(waiter)
        try:
            while True:
                async with asyncio.timeout(ask_s):
                    reply = await self.ledger.extend(operation)
                left = until - asyncio.get_running_loop().time()
                if reply.verdict is not Verdict.BUSY or left <= 0 or is_disconnected():
                    return reply
                await _wait_for(waiter.wake, min(left, _ASK_EVERY_S))
        except TimeoutError:
            raise LedgerUnavailable from None
        finally:
            self._extending.discard(waiter)

    async def _wait(self, admission: _Admission, until: float) -> Accepted | Refused:
        waiter, queue_key = _Waiter(admission.keys), admission.queue_key
        queue = self._queues.setdefault(queue_key, deque())
        queue.append(waiter)
        self._waiting += 1
        try:
            while True:
                left = until - asyncio.get_running_loop().time()
                if queue[0] is waiter or left <= 0:
                    reply = await admission.ask()
                    if not _is_busy(reply) or left <= 0:
                        return reply
                    waiter.keys = admission.keys
                await _wait_for(waiter.wake, min(left, _ASK_EVERY_S))
        finally:
            self._waiting -= 1
            queue.remove(waiter)
            if queue:
                queue[0].wake.set()  # this one may be the first now
            else:
                self._queues.pop(queue_key, None)

    def _waiting_of(self, user: str) -> int:
        return sum(len(queue) for (name, *_), queue in self._queues.items() if name == user)

    def _wake(self, keys: set[CounterKey]) -> None:
        """Wake the streams, and the first call of each queue, that wait for one of these counters."""
        if not self._extending and not self._queues:
            return
        for waiter in (*self._extending, *(queue[0] for queue in self._queues.values())):
            if not waiter.keys.isdisjoint(keys):
                waiter.wake.set()


def _is_busy(reply: Accepted | Refused) -> bool:
    return isinstance(reply, Refused) and reply.decision.verdict is Verdict.BUSY


async def _wait_for(wake: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await wake.wait()
    except TimeoutError:
        pass
    wake.clear()


# -------------------------------------------------------------------------------------------------- duration estimate

# The estimate is taken from this many calls that ended last, and from this many calls in flight.
_CALLS_MAX = 100
# The bounds of the estimate, which a busy call gets as `Retry-After`. SDKs wait for that long by themselves.
RETRY_S_MIN, RETRY_S_MAX = 2, 30


class DurationEstimate:
    """Estimates when the calls in flight of this process will end, from how long earlier calls took.

    Instants are in ms.
    """

    def __init__(self) -> None:
        self._began_at: dict[str, int] = {}
        self._durations: deque[int] = deque(maxlen=_CALLS_MAX)

    def began(self, call_id: str, now: int) -> None:
        """A call was admitted."""
        self._began_at[call_id] = now

    def ended(self, call_id: str, now: int) -> None:
        """A call that began was settled or released."""
        # A clock that was set back must not make a duration negative.
        self._durations.append(max(0, now - self._began_at.pop(call_id)))

    def busy_s(self, now: int) -> int:
        """In how many seconds a busy call should try again.

        This is the median of the time that calls in flight have left, if each takes as long as the median of the
        calls that ended. It is rounded up, so that a call does not come too early. Example: calls took 10, 20 and 90
        s, so the median is 20 s. Three calls in flight began 0, 8 and 19 s ago and have 20, 12 and 1 s left: 12 s.
        """
        if not self._began_at or not self._durations:
            return RETRY_S_MIN
        usual = median(self._durations)
        left = median(max(0, usual - (now - began_at)) for began_at in islice(self._began_at.values(), _CALLS_MAX))
        return min(RETRY_S_MAX, max(RETRY_S_MIN, -int(-left // 1000)))
