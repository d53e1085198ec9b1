"""Bounds the memory of all large bodies of a process together.

A body counts from before it is read until it is freed: refused, or sent to an upstream that has answered. With a
budget of 256 MB, seven bodies of 32 MiB are in memory at once. The eighth waits: its client gets no `100 Continue`,
or its bytes stay in the buffers of the connection. After `wait_s` it gets a 503 with `Retry-After`.

One user may hold half of the budget, so one user who sends slowly, or whose upstream answers slowly, does not keep
all others waiting. Bodies up to SMALL_BYTES_MAX always pass and are not counted.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable

from proxy.calls.body_threads import SMALL_BYTES_MAX
from proxy.errors import BodyMemoryFull

# The largest body of a request that is kept in memory. OpenAI accepts tens of megabytes (images and files as base64).
# The limit holds before and after decompression.
REQUEST_BYTES_MAX = 32 * 2**20
# How long a body waits for memory. SDKs wait for an answer for minutes, and try again after a 503.
WAIT_S = 10.0


class BodyMemory:
    """The budget, in bytes. `wait_s` bounds how long a body waits for it."""

    def __init__(self, bytes_max: int, *, wait_s: float = WAIT_S) -> None:
        self.bytes_held = 0
        self._bytes_max = bytes_max
        self._user_bytes_max = max(bytes_max // 2, REQUEST_BYTES_MAX)
        self._wait_s = wait_s
        self._held_by_user: Counter[str] = Counter()
        self._waiting: deque[tuple[str, int, asyncio.Future[None]]] = deque()

    async def hold(self, user: str, size: int) -> None:
        """Take `size` bytes for a body of this user, after those that wait already. Raises BodyMemoryFull."""
        if not self._waiting and self.has_room(user, size):
            self._take(user, size)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (user, size, turn)
        self._waiting.append(waiter)
        self._admit_waiting()  # those that wait may wait for other users' memory
        try:
            async with asyncio.timeout(self._wait_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.free(user, size)  # it was its turn at the moment at which it gave up
            else:
                self._waiting.remove(waiter)
                self._admit_waiting()
            if isinstance(error, TimeoutError):
                raise BodyMemoryFull from None
            raise

    def grow(self, user: str, size: int) -> None:
        """Take `size` bytes more for a body that has some. Raises BodyMemoryFull.

        It does not wait: bodies that hold memory and wait for more could wait for each other.
        """
        if not self.has_room(user, size):
            raise BodyMemoryFull
        self._take(user, size)

    def free(self, user: str, size: int) -> None:
        """Give back what was taken."""
        self.bytes_held -= size
        self._held_by_user[user] -= size
        if not self._held_by_user[user]:
            del self._held_by_user[user]
        self._admit_waiting()

    def has_room(self, user: str, size: int) -> bool:
        """Whether this user may take `size` bytes now."""
        return self.bytes_held + size <= self._bytes_max and self._held_by_user[user] + size <= self._user_bytes_max

    def _take(self, user: str, size: int) -> None:
        self.bytes_held += size
        self._held_by_user[user] += size

    def _admit_waiting(self) -> None:
        """Admit those that wait, in order. One that waits for its own user's memory does not hold up the others."""
        for waiter in [*self._waiting]:
            user, size, turn = waiter
            if self.bytes_held + size > self._bytes_max:
                return
            # One that is cancelled removes itself when its task runs next: its time is over, or its client has left.
            if not turn.done() and self.has_room(user, size):
                self._waiting.remove(waiter)
                self._take(user, size)
                turn.set_result(None)


class BodyShare:
    """The memory of one body: `size` bytes are held. `check_large` is called once before a large body is read.

    `free` must be called on every path, and may be called more than once.
    """

    __slots__ = ("_check_large", "_memory", "_user", "size")

    def __init__(self, memory: BodyMemory, user: str, check_large: Callable[[], Awaitable[None]] | None) -> None:
        self._memory = memory
        self._user = user
        self._check_large = check_large
        self.size = 0

    async def check(self, size: int) -> None:
        """Check whether a body of `size` bytes may be read. Raises what `check_large` raises."""
        if size > SMALL_BYTES_MAX and self._check_large is not None:
            check, self._check_large = self._check_large, None
            await check()

    async def hold(self, size: int) -> None:
        """Hold at least `size` bytes in all. Raises BodyMemoryFull, and what `check_large` raises."""
        if size <= SMALL_BYTES_MAX or size <= self.size:
            return
        await self.check(size)
        if self.size:
            # A body whose length is not known grows in steps of a quarter, as its buffer does.
            size = min(size + size // 4, max(size, REQUEST_BYTES_MAX))
            self._memory.grow(self._user, size - self.size)
        else:
            await self._memory.hold(self._user, size)
        self.size = size

    def free(self) -> None:
        """Give the memory back."""
        size, self.size = self.size, 0
        if size:
            self._memory.free(self._user, size)
