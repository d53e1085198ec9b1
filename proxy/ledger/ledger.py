"""The ledger: one loop, one transaction, many calls.

Whoever wants something booked queues an act and waits for its answer. One loop takes up to `BATCH_MAX` of what is
queued, has the store apply it in one transaction, and answers all: the cost of a commit is shared, and a caller
who was answered is on the books. Within a batch what gives back goes first, so that a call is never refused for
room that is being freed in the same moment.

    reserve ──▶ settle        what the call did use is charged, the rest given back
      │ ▲ ├──▶ release        nothing was generated
   extend └──▶ expire         its process died: charged from the reservation

While the database is away nothing may be let in that is not on the books: who wants in waits, for a failover to
pass, and is then refused (LedgerUnavailable). Who wants to hold more is told so at once, since a running answer goes
on without it, until our lease has run out (`lapses`). What gives back stays queued until it works, and there is never
more of it than calls in flight. One act that can't be booked never fails its neighbours: the batch is done again one
by one.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import structlog

from proxy.errors import LedgerUnavailable
from proxy.ledger.book import Accepted, Expire, Extend, Operation, Refused, Release, Reply, Reserve, Settle
from proxy.ledger.entry import Entry
from proxy.ledger.store import Store, StoreUnavailable
from proxy.policy.admission import NeedsCount
from proxy.policy.quota import Counter, CounterKey
from proxy.tasks import Tasks

BATCH_MAX = 256
LEASE_MS = 60_000
# How long a call waits for a database that is away: a failover.
WAIT_S = 10.0
_ORPHANS_AT_ONCE = 1000

log = structlog.get_logger("ledger")


@dataclass(slots=True, eq=False)
class _Queued:
    """An operation and its answer. `may_be_booked` is set once the outcome of its commit is unknown."""

    operation: Operation
    answer: "asyncio.Future[Reply]"
    may_be_booked: bool = False


class Ledger:
    """The books of this process. `owner` names the process; `now` gives milliseconds since 1970.

    `lease_ms` is how long it is taken to be alive without a sign of it, `retry_s` how long the loop lets a database
    that failed alone before it tries again, `wait_s` how long a call that wants in waits for it.
    """

    def __init__(
        self,
        store: Store,
        *,
        owner: str,
        now: Callable[[], int],
        lease_ms: int = LEASE_MS,
        retry_s: float = 0.5,
        wait_s: Callable[[], float] = lambda: WAIT_S,
    ) -> None:
        self.owner = owner
        self.lease_ms = lease_ms
        self._store = store
        self._now = now
        self._retry_s = retry_s
        self._wait_s = wait_s
        self._alive_until = 0
        self._lapses = 0
        self._queue: deque[_Queued] = deque()
        self._wake = asyncio.Event()
        self._tasks = Tasks()
        self._loop: asyncio.Task[None] | None = None
        self._is_closing = False
        self._tell_of_freed: Callable[[set[CounterKey]], object] = lambda keys: None
        self._committed_at = 0.0  # by the event loop's clock
        self.is_healthy = True

    def on_freed(self, tell: Callable[[set[CounterKey]], object]) -> None:
        """Call `tell` after each batch that gave something back, with the counters that it was given back on."""
        self._tell_of_freed = tell

    @property
    def lapses(self) -> int:
        """How often the lease has run out so far: then others may have charged all that was in flight here."""
        return self._lapses + (self._now() >= self._alive_until)

    async def start(self, dead: Iterable[str] = ()) -> None:
        """Open the store, say that this process is alive, charge what dead ones left behind, and begin.

        `dead` are owners that have certainly ended, whatever is left of their leases.
        Raises what `Store.open` raises.
        """
        await self._store.open()
        for owner in dead:
            await self._store.renew(owner, self._now(), lease_ms=0)
        await self._renew()
        self._loop = self._tasks.start("ledger", self._run())
        await self.expire_orphans()

    async def reserve(self, operation: Reserve) -> Accepted | Refused | NeedsCount:
        """Let a call in, or say why not. Raises LedgerUnavailable when nothing can be booked for as long as it waits.

        If the caller is cancelled meanwhile, what was reserved is released again.
        """
        queued = self._enqueue(operation)
        patience = asyncio.get_running_loop().call_later(self._wait_s(), self._give_up, queued)
        try:
            answer = await queued.answer
        except asyncio.CancelledError:
            if not queued.answer.cancelled():  # it was answered in the very moment in which its caller was cancelled
                self._enqueue(Release(operation.id, "client_left"))
            raise
        finally:
            patience.cancel()
        assert isinstance(answer, (Accepted, Refused, NeedsCount))
        return answer

    async def extend(self, operation: Extend) -> Accepted:
        """Hold more for a call in flight, as far as there is room; whoever asks says how long it waits.

        Raises LedgerUnavailable.
        """
        answer = await self._enqueue(operation).answer
        if not isinstance(answer, Accepted):
            raise LedgerUnavailable  # its entry is not there any more, and so can't hold anything
        return answer

    def end(self, operation: Settle | Release) -> "asyncio.Future[Reply]":
        """Queue the end of a call; the future is done when that is committed, however long it takes.

        It is booked also where nobody waits for it any more.
        """
        return self._enqueue(operation).answer

    async def expire_orphans(self) -> int:
        """Charge the open calls of dead processes; returns how many there were."""
        found = 0
        while ids := await self._store.orphans(self.owner, self._now(), limit=_ORPHANS_AT_ONCE):
            await asyncio.gather(*(self._enqueue(Expire(call_id)).answer for call_id in ids))
            found += len(ids)
        if found:
            log.warning("calls of a dead process were charged from their reservations", calls=found)
        return found

    async def sweep(self) -> None:
        """Charge what other processes left behind since the start; to be called now and then."""
        try:
            await self.expire_orphans()
        except (StoreUnavailable, LedgerUnavailable) as error:
            log.warning("calls of dead processes could not be looked for", reason=str(error))

    async def renew_lease(self) -> None:
        """Say once more that this process is alive; to be called a few times in each lease."""
        try:
            await self._renew()
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

    async def response_entry(self, response_id: str) -> Entry | None:
        """The call that made a response. Raises LedgerUnavailable."""
        try:
            return await self._store.find_response_entry(response_id)
        except StoreUnavailable as error:
            raise LedgerUnavailable from error

    async def close(self) -> None:
        """Book what is queued, as far as the database lets us, and close the store."""
        self._is_closing = True
        if self._loop is not None:
            self._wake.set()
            await self._loop
        await self._store.close()

    def _enqueue(self, operation: Operation) -> _Queued:
        queued = _Queued(operation, asyncio.get_running_loop().create_future())
        if self._loop is None or self._loop.done():
            self._fail(queued)  # nobody would ever answer it
        else:
            self._queue.append(queued)
            self._wake.set()
        return queued

    async def _run(self) -> None:
        while self._queue or not self._is_closing:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                if batch := self._take():
                    await self._book(batch)

    def _take(self) -> list[_Queued]:
        """The next batch: what gives back first, then those in flight, then those who want in.

        A caller who gave up before we began wants nothing booked, and what may have been booked all the same is
        released.
        """
        batch: list[_Queued] = []
        for _ in range(min(BATCH_MAX, len(self._queue))):
            queued = self._queue.popleft()
            if not (_takes(queued) and queued.answer.done()):
                batch.append(queued)
            elif queued.may_be_booked:
                self._enqueue(_taking_back(queued))
        return sorted(batch, key=_turn)

    async def _book(self, batch: list[_Queued]) -> None:
        try:
            answers = await self._apply(batch)
        except StoreUnavailable as error:
            await self._put_off(batch, error)
        except Exception as error:  # noqa: BLE001 - one bad act, of whatever kind, must not end the loop
            await self._one_by_one(batch, error)
        else:
            self._committed_at = asyncio.get_running_loop().time()
            self.is_healthy = True
            freed: set[CounterKey] = set()
            for queued, answer in zip(batch, answers, strict=True):
                self._tell(queued, answer)
                if isinstance(answer, Accepted):
                    freed |= answer.freed
            if freed:
                self._tell_of_freed(freed)

    async def _one_by_one(self, batch: list[_Queued], error: Exception) -> None:
        if len(batch) > 1:
            for queued in batch:
                await self._book([queued])
            return
        for queued in batch:
            log.error(
                "an act could not be booked",
                act=type(queued.operation).__name__,
                call=queued.operation.id,
                exc_info=error,
            )
            self._fail(queued)

    async def _put_off(self, batch: list[_Queued], error: StoreUnavailable) -> None:
        """The database is away: keep all for later, as long as anybody waits for it."""
        self.is_healthy = False
        log.warning("the ledger's database can't be used", reason=str(error), acts=len(batch))
        for queued in filter(_lets_in, batch if error.is_uncertain else ()):
            queued.may_be_booked = True
        self._queue.extendleft(reversed(batch))
        if self._is_closing:
            # Their reservations are on the books: they are charged as lost.
            ends = sum(not _takes(queued) for queued in self._queue)
            log.error("closing with ends that could not be booked", acts=ends)
            while self._queue:
                self._fail(self._queue.popleft())
            return
        await asyncio.sleep(self._retry_s)

    def _tell(self, queued: _Queued, answer: Reply) -> None:
        if not queued.answer.done():
            queued.answer.set_result(answer)
        elif _lets_in(queued) and isinstance(answer, Accepted):
            self._enqueue(_taking_back(queued))

    def _give_up(self, queued: _Queued) -> None:
        """Refuse a call that has waited for as long as it may.

        The database is unavailable if no batch was committed in the last half of that time, for example because one
        hangs. If batches were committed, the ledger is only overloaded, and the process stays ready: with a wait of
        10 s and a commit every 0.2 s, thousands of calls in the queue must not make `/readyz` flap.
        """
        if asyncio.get_running_loop().time() - self._committed_at >= self._wait_s() / 2:
            self.is_healthy = False
        self._fail(queued)

    @staticmethod
    def _fail(queued: _Queued) -> None:
        if not queued.answer.done():
            queued.answer.set_exception(LedgerUnavailable())
            queued.answer.exception()  # seen: an end that nobody waits for any more must not warn

    async def _apply(self, batch: list[_Queued]) -> list[Reply]:
        if self._now() >= self._alive_until:
            await self._renew()  # we have been paused: what we book now must not look like that of a dead process
        return await self._store.apply([queued.operation for queued in batch], self._now())

    async def _renew(self) -> None:
        now = self._now()
        await self._store.renew(self.owner, now, lease_ms=self.lease_ms)
        self._lapses = self.lapses
        self._alive_until = now + self.lease_ms


def _lets_in(queued: _Queued) -> bool:
    return isinstance(queued.operation, Reserve)


def _takes(queued: _Queued) -> bool:
    return isinstance(queued.operation, Reserve | Extend)


def _taking_back(queued: _Queued) -> Release:
    """What ends a call that was let in after its caller had gone, or had been told that it can't be."""
    return Release(queued.operation.id, "client_left" if queued.answer.cancelled() else "proxy_broke")


def _turn(queued: _Queued) -> int:
    return 2 if _lets_in(queued) else int(_takes(queued))
