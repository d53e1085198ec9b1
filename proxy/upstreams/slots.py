"""The slots of upstreams with `max_in_flight`: which calls have one, and which call that waits gets the next.

A call has a slot from before it is sent to an upstream until its connection is closed or free for another call. If
all slots are taken, calls wait, and users take turns: a free slot goes to the user whose last turn at this upstream
is the longest ago, and there to the call that has waited longest. A slot that was free at once is a turn too. So a
user who waits gets a slot before any other user gets two. Example with 2 slots:

    ann sends four calls    two have the slots, two wait
    bob sends one           it waits
    a call of ann ends      bob's is sent: his last turn is longer ago (he had none)
    a call of ann ends      ann's third is sent

Slots belong to the name of an upstream, so a reload that changes its settings changes nothing for the calls in
flight. If `max_in_flight` is raised, calls that wait get the new slots at once. If it is lowered, calls in flight go
on, and the next one is sent when there are fewer of them than the new number. Calls of upstreams without
`max_in_flight` are counted too, so that a reload can set it.

No sockets and no clock but that of the event loop, for the time that a call may wait.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


class _Waiter:
    """A call of this user that waits for a slot of one of these upstreams. `slot` gets the upstream's name."""

    __slots__ = ("names", "slot", "user")

    def __init__(self, names: Iterable[str], user: str) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.user = user
        self.slot: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def has_slot(self) -> bool:
        return self.slot.done() and not self.slot.cancelled()


@dataclass(slots=True)
class _Upstream:
    """The slots of one upstream; a `limit` of None is no limit.

    `held` has the calls in flight by user. `turns` has the number of the last turn of each user with a call in flight
    and, while calls wait, of those who had a turn meanwhile. `queues` has the calls that wait, by user; none is
    empty.
    """

    limit: int | None = None
    in_flight: int = 0
    waiting: int = 0
    held: dict[str, int] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    queues: dict[str, deque[_Waiter]] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        return self.limit is not None and self.in_flight >= self.limit

    def next_waiter(self) -> _Waiter | None:
        """The call that gets the next slot.

        A call that was cancelled is in its queue until its task runs, but must not get a slot.
        """
        first_of_users = (
            next((waiter for waiter in queue if not waiter.slot.done()), None) for queue in self.queues.values()
        )
        # `min` takes the first of several users without a turn: the one who has waited longest.
        return min(
            (waiter for waiter in first_of_users if waiter is not None),
            key=lambda waiter: self.turns.get(waiter.user, 0),
            default=None,
        )

    def forget_turns(self) -> None:
        """Forget the turns of users without calls in flight. Nobody may wait."""
        self.turns = {user: turn for user, turn in self.turns.items() if user in self.held}


@dataclass(frozen=True, slots=True)
class Load:
    """How many calls an upstream has in flight, and how many wait for a slot of it."""

    in_flight: int = 0
    waiting: int = 0


class Slots:
    """The slots of all upstreams of one process, by the names of upstreams."""

    def __init__(self) -> None:
        self._upstreams: defaultdict[str, _Upstream] = defaultdict(_Upstream)
        self._turns = 0

    def set_limits(self, limits: Mapping[str, int | None]) -> None:
        """Set the number of slots of each upstream; None is no limit. An upstream that is not named keeps its own."""
        for name, limit in limits.items():
            self._upstreams[name].limit = limit
            self._hand_out(name)

    def is_full(self, name: str) -> bool:
        """Whether no slot of this upstream is free."""
        return self._upstreams[name].is_full

    def loads(self) -> dict[str, Load]:
        """The calls of each upstream."""
        return {name: Load(found.in_flight, found.waiting) for name, found in self._upstreams.items()}

    def take(self, name: str, user: str) -> None:
        """Take a slot for a call of this user. The upstream must not be full."""
        self._begin(self._upstreams[name], user)

    async def wait(self, names: Iterable[str], user: str, *, wait_s: float) -> str | None:
        """Take the next slot of any of these upstreams for a call of this user. All of them must be full.

        Returns the upstream's name, or None if `wait_s` seconds were not enough. Cancelling leaves the queue.
        """
        waiter = _Waiter(names, user)
        self._join(waiter)
        try:
            async with asyncio.timeout(wait_s):
                await waiter.slot
        except TimeoutError:
            pass  # the call may have got a slot in the same moment
        except asyncio.CancelledError:
            if waiter.has_slot:
                self.give_back(waiter.slot.result(), user)
            raise
        finally:
            self._leave(waiter)
        return waiter.slot.result() if waiter.has_slot else None

    def give_back(self, name: str, user: str) -> None:
        """Give the slot of an ended call back, or to a call that waits."""
        found = self._upstreams[name]
        found.in_flight -= 1
        if found.held[user] > 1:
            found.held[user] -= 1
        else:
            del found.held[user]
            if not found.queues:
                del found.turns[user]
        if found.queues:
            self._hand_out(name)

    def _begin(self, found: _Upstream, user: str) -> None:
        self._turns += 1
        found.in_flight += 1
        found.held[user] = found.held.get(user, 0) + 1
        found.turns[user] = self._turns

    def _hand_out(self, name: str) -> None:
        """Give free slots to calls that wait."""
        found = self._upstreams[name]
        while found.queues and not found.is_full and (waiter := found.next_waiter()) is not None:
            self._begin(found, waiter.user)
            self._leave(waiter)
            waiter.slot.set_result(name)

    def _join(self, waiter: _Waiter) -> None:
        for name in waiter.names:
            found = self._upstreams[name]
            found.queues.setdefault(waiter.user, deque()).append(waiter)
            found.waiting += 1

    def _leave(self, waiter: _Waiter) -> None:
        """Take a call out of all queues. Does nothing the second time."""
        names, waiter.names = waiter.names, ()
        for name in names:
            found = self._upstreams[name]
            queue = found.queues[waiter.user]
            queue.remove(waiter)
            found.waiting -= 1
            if not queue:
                del found.queues[waiter.user]
            if not found.queues:
                found.forget_turns()
