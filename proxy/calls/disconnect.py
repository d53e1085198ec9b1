"""What becomes of a call whose client has gone before the end.

`stop`, for streams: the upstream is closed at once, and what passed is charged (`input + what had arrived`); once the
answer itself is whole, its usage is waited for, because it comes in a moment.
`drain`: the answer is read on, because its end tells what it cost; for a bounded time and so many at once. Where
that bound is hit, all that was held is charged, for nobody knows better.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from proxy.calls.call import Call
from proxy.calls.reservation import Reservation

DRAIN_S = 30.0
# How long the usage may take that follows the last word of an answer.
USAGE_S = 2.0
DRAINS_MAX = 64
# So that nobody's departures make others pay their whole hold.
DRAINS_OF_A_USER_MAX = 8


class Disconnects:
    """Watches the clients of calls in flight. `drain_s` bounds the time of a drain, `drains_max` their number."""

    def __init__(self, *, drain_s: float = DRAIN_S, drains_max: int = DRAINS_MAX) -> None:
        self._drain_s = drain_s
        self._drains_max = drains_max
        self._draining: Counter[str] = Counter()

    @asynccontextmanager
    async def watch(self, call: Call, reservation: Reservation) -> AsyncIterator[None]:
        """End the block and settle, when the client has gone and there is no more waiting for the answer.

        The block must be the whole of what the running task does with this call.
        """
        client, user = call.client, call.user.name
        task = asyncio.current_task()
        assert task is not None, "a call runs in a task"
        loop = asyncio.get_running_loop()
        deadline: list[asyncio.TimerHandle] = []
        is_draining = is_at_bound = False

        def cut_off() -> None:
            nonlocal is_at_bound
            is_at_bound = call.at(reservation.model or call.model).on_disconnect == "drain"
            task.cancel()

        def gone() -> None:
            nonlocal is_draining
            on_disconnect = call.at(reservation.model or call.model).on_disconnect
            if not reservation.is_sent:
                cut_off()
            elif on_disconnect == "stop" and reservation.meter.ending.has_finished:
                deadline.append(loop.call_later(USAGE_S, cut_off))
            elif on_disconnect == "drain" and self._has_room_for(user):
                is_draining = True
                self._draining[user] += 1
                deadline.append(loop.call_later(self._drain_s, cut_off))
            else:
                cut_off()

        client.on_disconnected(gone)
        try:
            yield
        except asyncio.CancelledError:
            # A whole answer is generated and billed whether or not its bytes arrive, and nobody saw how long it was.
            is_unknown = is_at_bound or not call.request.stream
            await reservation.end_early("client_left" if client.is_disconnected else "stopped", is_unknown=is_unknown)
            if not client.is_disconnected:
                raise
            task.uncancel()
        finally:
            client.on_disconnected(None)
            for handle in deadline:
                handle.cancel()
            if is_draining:
                self._draining.subtract([user])
            self._draining += Counter()  # keeps only who still has some

    def _has_room_for(self, user: str) -> bool:
        return self._draining.total() < self._drains_max and self._draining[user] < DRAINS_OF_A_USER_MAX
