"""What happens to a call whose client disconnects before the end of the answer.

`stop` (streams only): the connection to the upstream is closed at once, and the input and the output that had arrived
are charged. The upstream stops generating, so this is what its owner pays for. One exception: if the text of the
answer is already complete, the usage follows within moments and is exact, so it is awaited for up to 2 s.

`drain`: the answer is read to its end, because the upstream bills all of it and its end says how much that was. The
time and the number of drains are bounded. At the bound the connection is closed and the call is charged all that it
holds, because nobody knows how long the answer would have been.

A client that leaves a stream after 40 of 900 tokens:

    stop     the upstream generates no more          40 tokens and the input are charged
    drain    the usage at the end says 900           900 tokens and the input are charged
    drain    not finished after 30 s                 the whole hold is charged

Answers that are not streamed are always drained: they are generated and billed whether or not the client waits. If
`stop` applied to them, a client that disconnects just before the end would pay for the input alone.
"""

import asyncio
from collections import Counter

from proxy.calls.call import Call
from proxy.calls.reservation import Reservation

DRAIN_S = 30.0
# How long `stop` waits for the usage after the last text of an answer.
USAGE_WAIT_S = 2.0
# How many calls a process drains at a time, and how many of one user: a user who fills all drains would make the
# calls of others be charged their whole hold.
DRAINS_MAX = 64
DRAINS_PER_USER_MAX = 8


class Disconnects:
    """Watches the clients of the calls in flight. `drain_s` bounds the time of a drain, `drains_max` their number."""

    def __init__(self, *, drain_s: float = DRAIN_S, drains_max: int = DRAINS_MAX) -> None:
        self.drain_s = drain_s
        self._drains_max = drains_max
        self._draining: Counter[str] = Counter()  # by user

    def watch(self, call: Call, reservation: Reservation) -> "Watch":
        """Act on a disconnect of this call's client from now on, until `Watch.stop`.

        If the answer is not to be awaited, the call's task is cancelled, so from now on it must do nothing else.
        """
        return Watch(self, call, reservation)

    def begin_drain(self, user: str) -> bool:
        """Whether one more call of this user may be drained, which counts it."""
        if self._draining.total() >= self._drains_max or self._draining[user] >= DRAINS_PER_USER_MAX:
            return False
        self._draining[user] += 1
        return True

    def end_drain(self, user: str) -> None:
        """Count a drain no longer."""
        self._draining -= Counter([user])  # this also removes users without a drain


class Watch:
    """One call whose client is watched. `is_drain_cut`: its drain was given up, so its cost is not known."""

    __slots__ = ("_call", "_disconnects", "_is_draining", "_reservation", "_timer", "is_drain_cut")

    def __init__(self, disconnects: Disconnects, call: Call, reservation: Reservation) -> None:
        self.is_drain_cut = False
        self._disconnects = disconnects
        self._call = call
        self._reservation = reservation
        self._is_draining = False
        self._timer: asyncio.TimerHandle | None = None
        call.client.on_disconnected(self._on_disconnected)

    def stop(self) -> None:
        """Watch no longer: the call has ended."""
        self._call.client.on_disconnected(None)
        if self._timer is not None:
            self._timer.cancel()
        if self._is_draining:
            self._disconnects.end_drain(self._call.caller.user)

    @property
    def _is_to_drain(self) -> bool:
        """Whether the answer is to be read to its end, as its upstream has it. Whole answers always are."""
        call = self._call
        upstream = (self._reservation.target or call.model).upstream
        return not call.request.stream or upstream.on_disconnect == "drain"

    def _on_disconnected(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._reservation.is_sent:
            self._cancel()
        elif not self._is_to_drain and self._reservation.meter.ending.has_finished:
            self._timer = loop.call_later(USAGE_WAIT_S, self._cancel)
        elif self._is_to_drain and self._disconnects.begin_drain(self._call.caller.user):
            self._is_draining = True
            self._timer = loop.call_later(self._disconnects.drain_s, self._cancel)
        else:
            self._cancel()

    def _cancel(self) -> None:
        self.is_drain_cut = self._is_to_drain
        self._call.client.task.cancel()
