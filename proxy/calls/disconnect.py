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
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from proxy.calls.call import Call
from proxy.calls.reservation import Reservation
from proxy.policy.catalog import OnDisconnect

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
        self._drain_s = drain_s
        self._drains_max = drains_max
        self._draining: Counter[str] = Counter()  # by user

    @asynccontextmanager
    async def watch(self, call: Call, reservation: Reservation) -> AsyncIterator[None]:
        """Within the block, act on a disconnect: if the answer is not to be awaited, cancel the block and settle.

        The block must be all that the running task does with this call, because the task is cancelled.
        """
        client, user = call.client, call.caller.user
        task = asyncio.current_task()
        assert task is not None, "a call runs in a task"
        loop = asyncio.get_running_loop()
        timers: list[asyncio.TimerHandle] = []
        is_draining = is_drain_cut = False

        def cancel() -> None:
            nonlocal is_drain_cut
            is_drain_cut = _on_disconnect(call, reservation) == "drain"
            task.cancel()

        def disconnected() -> None:
            nonlocal is_draining
            on_disconnect = _on_disconnect(call, reservation)
            if not reservation.is_sent:
                cancel()
            elif on_disconnect == "stop" and reservation.meter.ending.has_finished:
                timers.append(loop.call_later(USAGE_WAIT_S, cancel))
            elif on_disconnect == "drain" and self._may_drain(user):
                is_draining = True
                self._draining[user] += 1
                timers.append(loop.call_later(self._drain_s, cancel))
            else:
                cancel()

        client.on_disconnected(disconnected)
        try:
            yield
        except asyncio.CancelledError:
            # What has arrived says nothing about the cost of a drain that was cut, or of an answer that is not
            # streamed.
            charges_full_hold = is_drain_cut or not call.request.stream
            await reservation.end(
                "client_left" if client.is_disconnected else "stopped", charges_full_hold=charges_full_hold
            )
            if not client.is_disconnected:
                raise  # the server stops
            task.uncancel()
        finally:
            client.on_disconnected(None)
            for timer in timers:
                timer.cancel()
            if is_draining:
                self._draining.subtract([user])
            self._draining += Counter()  # removes users without a drain

    def _may_drain(self, user: str) -> bool:
        return self._draining.total() < self._drains_max and self._draining[user] < DRAINS_PER_USER_MAX


def _on_disconnect(call: Call, reservation: Reservation) -> OnDisconnect:
    """`drain` or `stop`, as the upstream of the last attempt has it."""
    return call.with_target(reservation.target or call.model).on_disconnect
