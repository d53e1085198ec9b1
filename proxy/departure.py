"""What becomes of a call whose client has gone before the end.

`stop`: the upstream is closed at once, and what passed is charged (`input + what had arrived`).
`drain`: the answer is read on, because its end tells what it cost; for a bounded time and so many at once. Where
that bound is hit, all that was held is charged, for nobody knows better.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from proxy.client import Client
from proxy.policy import OnDisconnect
from proxy.reservation import Reservation

DRAIN_S = 30.0
DRAINS_MAX = 64


class Departures:
    """Watches the clients of calls in flight. `drain_s` bounds the time of a drain, `drains_max` their number."""

    def __init__(self, *, drain_s: float = DRAIN_S, drains_max: int = DRAINS_MAX) -> None:
        self._drain_s = drain_s
        self._drains_max = drains_max
        self._draining: set[str] = set()

    @asynccontextmanager
    async def watch(
        self, client: Client, reservation: Reservation, on_disconnect: OnDisconnect
    ) -> AsyncIterator[None]:
        """End the block and settle, when the client has gone and there is no more waiting for the answer.

        The block must be the whole of what the running task does with this call.
        """
        task = asyncio.current_task()
        assert task is not None, "a call runs in a task"
        loop = asyncio.get_running_loop()
        deadline: list[asyncio.TimerHandle] = []
        is_at_bound = False

        def cut_off() -> None:
            nonlocal is_at_bound
            is_at_bound = on_disconnect == "drain"
            task.cancel()

        def gone() -> None:
            if on_disconnect == "drain" and len(self._draining) < self._drains_max:
                self._draining.add(client.id)
                deadline.append(loop.call_later(self._drain_s, cut_off))
            else:
                cut_off()

        client.when_gone(gone)
        try:
            yield
        except asyncio.CancelledError:
            usage = reservation.whole_hold if is_at_bound else reservation.meter.usage()
            await reservation.settle(usage, "client_left" if client.is_gone else "stopped")
            if not client.is_gone:
                raise
            task.uncancel()
        finally:
            client.when_gone(None)
            self._draining.discard(client.id)
            for handle in deadline:
                handle.cancel()
