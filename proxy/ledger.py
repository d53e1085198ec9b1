"""The ledger: one loop, one transaction, many calls.

Whoever wants something booked queues an act and waits for its answer. One loop takes up to `BATCH_MAX` of what is
queued, has the store apply it in one transaction, and answers all: the cost of a commit is shared, and a caller
who was answered is on the books. Within a batch what gives back goes first, so that a call is never refused for
room that is being freed in the same moment.

    reserve ──▶ settle        what the call did use is charged, the rest given back
      │ ▲ ├──▶ release        nothing was generated
   extend └──▶ expire         its process died: charged from the reservation

When the database fails, what takes is refused (LedgerUnavailable), because nothing may be let in that is not on
the books; what gives back stays queued until it works, and there is never more of it than calls in flight. One
act that can't be booked never fails its neighbours: the batch is done again one by one.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from proxy.admission import Uncounted
from proxy.books import Act, Booked, Entry, Expire, Extend, NotBooked, Release, Reply, Reserve, Settle
from proxy.errors import LedgerUnavailable
from proxy.quotas import Counter, CounterKey
from proxy.store import Store, StoreUnavailable
from proxy.tasks import Tasks

BATCH_MAX = 256
LEASE_MS = 60_000
_ORPHANS_AT_ONCE = 1000

T = TypeVar("T")

log = structlog.get_logger("ledger")


@dataclass(slots=True, eq=False)
class _Queued:
    act: Act
    answer: "asyncio.Future[Reply]"


class Ledger:
    """The books of this process. `owner` names the process; `now` gives milliseconds since 1970.

    `retry_s` is how long the loop lets a database that failed alone before it tries again.
    """

    def __init__(self, store: Store, *, owner: str, now: Callable[[], int], retry_s: float = 0.5) -> None:
        self.owner = owner
        self._store = store
        self._now = now
        self._retry_s = retry_s
        self._queue: deque[_Queued] = deque()
        self._wake = asyncio.Event()
        self._tasks = Tasks()
        self._loop: asyncio.Task[None] | None = None
        self._is_closing = False
        self._tell_of_freed: Callable[[set[CounterKey]], object] = lambda keys: None
        self.is_healthy = True

    def when_freed(self, tell: Callable[[set[CounterKey]], object]) -> None:
        """Call `tell` after each batch that gave something back, with the counters that it was given back on."""
        self._tell_of_freed = tell

    async def start(self) -> None:
        """Open the store, say that this process is alive, charge what a dead one left behind, and begin.

        Raises what `Store.open` raises.
        """
        await self._in_thread(self._store.open)
        await self._in_thread(self._store.renew, self.owner, self._now() + LEASE_MS)
        self._loop = self._tasks.start("ledger", self._run())
        await self.expire_orphans()

    async def reserve(self, act: Reserve) -> Booked | NotBooked | Uncounted:
        """Let a call in, or say why not. Raises LedgerUnavailable when nothing can be booked.

        If the caller is cancelled meanwhile, what was reserved is released again.
        """
        queued = self._enqueue(act)
        try:
            answer = await queued
        except asyncio.CancelledError:
            if not queued.cancelled():  # it was answered in the very moment in which its caller was cancelled
                self._enqueue(Release(act.id, "client_left"))
            raise
        assert isinstance(answer, (Booked, NotBooked, Uncounted))
        return answer

    async def extend(self, act: Extend) -> Booked:
        """Hold more for a call in flight, as far as there is room. Raises LedgerUnavailable."""
        answer = await self._enqueue(act)
        if not isinstance(answer, Booked):
            raise LedgerUnavailable  # its entry is not there any more, and so can't hold anything
        return answer

    def end(self, act: Settle | Release) -> "asyncio.Future[Reply]":
        """Queue the end of a call; the future is done when that is committed, however long it takes.

        It is booked also where nobody waits for it any more.
        """
        return self._enqueue(act)

    async def expire_orphans(self) -> int:
        """Charge the open calls of dead processes; returns how many there were."""
        found = 0
        while ids := await self._in_thread(self._store.orphans, self.owner, _ORPHANS_AT_ONCE):
            await asyncio.gather(*(self._enqueue(Expire(call_id)) for call_id in ids))
            found += len(ids)
        if found:
            log.warning("calls of a dead process were charged from their reservations", calls=found)
        return found

    async def renew_lease(self) -> None:
        """Say once more that this process is alive; to be called a few times in each LEASE_MS."""
        try:
            await self._in_thread(self._store.renew, self.owner, self._now() + LEASE_MS)
        except StoreUnavailable as error:
            self.is_healthy = False
            log.warning("the lease could not be renewed", reason=str(error))
        else:
            self.is_healthy = True  # also where no call comes to find it out, because we said that we can't serve

    async def counters(self, keys: Sequence[CounterKey]) -> dict[CounterKey, Counter]:
        """How counters stand, to be shown. Raises LedgerUnavailable."""
        try:
            return await self._store.read_counters(keys)
        except StoreUnavailable as error:
            raise LedgerUnavailable from error

    async def entry(self, call_id: str) -> Entry | None:
        """One call in the books. Raises LedgerUnavailable."""
        try:
            return await self._store.read_entry(call_id)
        except StoreUnavailable as error:
            raise LedgerUnavailable from error

    async def close(self) -> None:
        """Book what is queued, as far as the database lets us, and close the store."""
        self._is_closing = True
        if self._loop is not None:
            self._wake.set()
            await self._loop
        await self._store.close()

    def _enqueue(self, act: Act) -> "asyncio.Future[Reply]":
        queued = _Queued(act, asyncio.get_running_loop().create_future())
        if self._loop is None or self._loop.done():
            self._fail(queued)  # nobody would ever answer it
        else:
            self._queue.append(queued)
            self._wake.set()
        return queued.answer

    async def _run(self) -> None:
        while self._queue or not self._is_closing:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                if batch := self._take():
                    await self._book(batch)

    def _take(self) -> list[_Queued]:
        """The next batch: what gives back first, then those in flight, then those who want in.

        A caller who gave up before we began wants nothing booked.
        """
        taken = [self._queue.popleft() for _ in range(min(BATCH_MAX, len(self._queue)))]
        wanted = [queued for queued in taken if not (_takes(queued) and queued.answer.cancelled())]
        return sorted(wanted, key=_turn)

    async def _book(self, batch: list[_Queued]) -> None:
        try:
            answers = await self._apply(batch)
        except StoreUnavailable as error:
            await self._put_off(batch, error)
        except Exception as error:  # noqa: BLE001 - one bad act, of whatever kind, must not end the loop
            await self._one_by_one(batch, error)
        else:
            self.is_healthy = True
            freed: set[CounterKey] = set()
            for queued, answer in zip(batch, answers, strict=True):
                self._tell(queued, answer)
                if isinstance(answer, Booked):
                    freed |= answer.freed
            if freed:
                self._tell_of_freed(freed)

    async def _one_by_one(self, batch: list[_Queued], error: Exception) -> None:
        if len(batch) > 1:
            for queued in batch:
                await self._book([queued])
            return
        for queued in batch:
            log.error("an act could not be booked", act=type(queued.act).__name__, call=queued.act.id, exc_info=error)
            self._fail(queued)

    async def _put_off(self, batch: list[_Queued], error: StoreUnavailable) -> None:
        """The database is away: refuse whoever wants to hold something, keep what gives back for later."""
        self.is_healthy = False
        log.warning("the ledger's database can't be used", reason=str(error), acts=len(batch))
        waiting = [*batch, *self._queue]
        self._queue = deque(queued for queued in waiting if not _takes(queued))
        for queued in filter(_takes, waiting):
            self._fail(queued)
        for queued in filter(_lets_in, batch if error.is_uncertain else ()):
            self._enqueue(Release(queued.act.id, "proxy_broke"))  # it may have been committed all the same
        if self._is_closing:
            # Their reservations are on the books: the next start charges them as lost.
            log.error("closing with ends that could not be booked", acts=len(self._queue))
            while self._queue:
                self._fail(self._queue.popleft())
            return
        await asyncio.sleep(self._retry_s)

    def _tell(self, queued: _Queued, answer: Reply) -> None:
        if not queued.answer.cancelled():
            queued.answer.set_result(answer)
        elif _lets_in(queued) and isinstance(answer, Booked):
            self._enqueue(Release(queued.act.id, "client_left"))

    @staticmethod
    def _fail(queued: _Queued) -> None:
        if not queued.answer.cancelled():
            queued.answer.set_exception(LedgerUnavailable())
            queued.answer.exception()  # seen: an end that nobody waits for any more must not warn

    async def _apply(self, batch: list[_Queued]) -> list[Reply]:
        return await self._in_thread(self._store.apply, [queued.act for queued in batch], self._now())

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._store.thread, work, *arguments)


def _lets_in(queued: _Queued) -> bool:
    return isinstance(queued.act, Reserve)


def _takes(queued: _Queued) -> bool:
    return isinstance(queued.act, Reserve | Extend)


def _turn(queued: _Queued) -> int:
    return 2 if _lets_in(queued) else int(_takes(queued))
