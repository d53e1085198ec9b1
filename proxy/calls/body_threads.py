"""Reads and writes large bodies in threads, so that one body does not block the streams of all other users.

A thread of Python gives way to others every 5 ms, so the event loop goes on meanwhile. Single steps do not give way:
orjson takes 10 ms to parse or write 4 MB, and 100 ms for 32 MB with many escapes (measured). The number of values in
a body is bounded, and with it the steps that grow with that number (`formats.strict_json`).

The cost of a body decides, which is its length, or more if it has many values (`strict_json.reading_cost`). Bodies
wait in order of arrival, so no user can overtake another again and again:

    up to 256 KiB     on the event loop, at once: a thread would cost a short call a tenth more
    up to 4 MiB       in one thread, one body at a time: several threads would each take 5 ms from the event loop
    larger            in a second thread, one body at a time, so that those in between do not wait for it
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

from proxy.errors import BodiesWaitTooLong

# Bodies up to this cost are read and written on the event loop.
SMALL_BYTES_MAX = 256 * 1024
# Only one body above this cost is read or written at a time.
MEDIUM_BYTES_MAX = 4 * 2**20
# How long the work on one body may take, with the time that it waits for others.
WAIT_S = 30.0

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class BodyThreads:
    """The two threads. `wait_s` bounds how long a body waits for others, in seconds."""

    def __init__(self, *, wait_s: float = WAIT_S) -> None:
        self._wait_s = wait_s
        self._medium = ThreadPoolExecutor(1, thread_name_prefix="bodies")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="large-bodies")

    async def run(self, work: Callable[[*Ts], T], *arguments: *Ts, cost: int) -> T:
        """The result of `work(*arguments)`, which reads or writes a body of this cost. Raises what it raises.

        Raises BodiesWaitTooLong if that takes too long. A caller that is cancelled leaves the line.
        """
        if cost <= SMALL_BYTES_MAX:
            return work(*arguments)
        pool = self._medium if cost <= MEDIUM_BYTES_MAX else self._large
        try:
            async with asyncio.timeout(self._wait_s):
                return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)
        except TimeoutError:
            raise BodiesWaitTooLong from None

    def close(self) -> None:
        """Stop the threads after what they do now."""
        for pool in (self._medium, self._large):
            pool.shutdown(wait=False, cancel_futures=True)
