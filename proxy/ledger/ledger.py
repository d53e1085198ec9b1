"""The ledger of one process: callers queue operations, and one loop commits them in batches.

The loop takes up to `BATCH_MAX` queued operations, has the store apply them in one transaction, and answers all
callers. A caller that was answered is committed. The batches share the cost of a commit (group commit): operations
that arrive during one commit are the next batch, so batches grow with the load. With 2 ms for a commit and 100
operations in a batch, one operation costs 0.02 ms of the database's time, and waits at most for two commits.

    reserve ──▶ settle        the call is charged what it used, and the rest of its hold is freed
      │ ▲ ├──▶ release        nothing was generated: the whole hold is freed
   extend └──▶ expire         its process died: the call is charged its whole hold

While the database is unavailable:

- A new call waits up to `wait_s`, so a failover is only a pause. Then it is refused (LedgerUnavailable), because
  nothing may be admitted that is not committed.
- An extend stays queued as long as its caller waits. The caller decides for how long: a running answer may continue
  without it until the lease has run out (see `lapses`).
- A settle or a release stays queued until it is committed. There is at most one for each call in flight.

An operation that cannot be applied fails alone: the batch is repeated with one operation at a time.

After a failover with asynchronous replication the database may have lost what was committed last:

- A reservation is put back as soon as its call is extended or settled.
- The end of a call: the call is open again, though it has ended here. It is charged its hold by the next `sweep`.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from operator import attrgetter

import structlog

from proxy.errors import LedgerUnavailable
from proxy.ledger.book import (
    Accepted,
    Expire,
    Extend,
    Operation,
    Refused,
    Release,
    Reply,
    Reserve,
    Restore,
    Settle,
    Unknown,
)
from proxy.ledger.entry import Entry, Outcome
from proxy.ledger.store import Connection, Store, StoreUnavailable
from proxy.metrics import Metrics
from proxy.policy.admission import NeedsCount
from proxy.policy.quota import Counter, CounterKey
from proxy.tasks import Tasks

# The most operations in one transaction. A larger batch would delay the answer to the first of its callers.
BATCH_MAX = 256
# How long a process counts as alive after it was last heard of. It renews its lease four times in this time.
LEASE_MS = 60_000
# How long a new call waits for a database that is unavailable: long enough for a failover.
WAIT_S = 10.0
# From this difference between the ledger's clock and the process's on, it is logged. Machines that keep their time
# with NTP differ by milliseconds.
CLOCK_OFFSET_LOGGED_MS = 2_000
_ORPHANS_PER_READ = 1000

log = structlog.get_logger("ledger")


# The kinds of operations, in the order in which a batch applies them: no call is refused for tokens that the same
# batch frees, and an answer that has begun is worth more than one that has not.
_END, _EXTEND, _RESERVE = range(3)


@dataclass(slots=True, eq=False)
class _Queued:
    """An operation of this kind and the future of its answer."""

    operation: Operation
    kind: int
    answer: "asyncio.Future[Reply]"
    may_be_committed: bool = False  # a commit of it had an unknown outcome


_kind_of = attrgetter("kind")


class Ledger:
    """The ledger of the process `owner`. `now` returns milliseconds since 1970.

    `lease_ms` is how long the process counts as alive after each renewal, `retry_s` how long the loop pauses after
    the database failed, and `wait_s` returns how long a new call waits for the database. `metrics` count batches,
    failures and expired calls, and state the offset of the ledger's clock; a server sets its own.
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
        self._batch: list[_Queued] = []  # the operations that are being applied
        self._open: dict[str, Accepted] = {}  # calls that this process has begun and not ended
        self._wake = asyncio.Event()
        self._tasks = Tasks()
        self._loop: asyncio.Task[None] | None = None
        self._is_closing = False
        self._uncommitted_ends = 0
        self._on_freed: Callable[[set[CounterKey]], object] = lambda keys: None
        self._on_replies: Callable[[Sequence[Reply]], object] = lambda replies: None
        self.metrics = Metrics()
        self._clock_offset_ms = 0
        self._logged_offset_ms = 0
        self._committed_at = 0.0  # by the event loop's clock
        self.is_healthy = True
        self.commit_ms: float | None = None  # how long the last batch took, with its commit

    def on_freed(self, callback: Callable[[set[CounterKey]], object]) -> None:
        """Call `callback` after each batch that lowered holds, with the keys of the counters they were lowered on."""
        self._on_freed = callback

    def on_replies(self, callback: Callable[[Sequence[Reply]], object]) -> None:
        """Call `callback` with the replies of each batch, in the order in which they were decided.

        A caller may take its reply later than another caller a newer one. So only here the states of a counter come
        in their order.
        """
        self._on_replies = callback

    def now(self) -> int:
        """The time by the clock that decides in which window a call is. Whatever a client is told goes by it.

        It is PostgreSQL's clock on PostgreSQL and the process's on SQLite. Example: the process's clock is 300 s
        ahead of the database's. At 12:00:00 of the database a call is refused until 12:01:00. By the process's clock,
        12:05:00, that would be in the past, and the client would be told to come back after 1 s instead of 60.

        The difference is measured with each batch, and with each renewal of the lease (every 15 s).
        """
        return self._now() + self._clock_offset_ms

    @property
    def lapses(self) -> int:
        """How often the lease of this process has run out so far.

        If this number has changed since a call's last answer from the ledger, other processes may have expired the
        call: charged it its hold and admitted others into the room that was left. It must extend before it passes on
        more. Example with a lease of 60 s that was renewed at 12:00:00: the process is paused from 12:00:10 to
        12:02:00. At 12:01:05 another process expires its calls. When it runs again, `lapses` is higher by one from
        the first moment, before anything was renewed or read.
        """
        return self._lapses + (self._now() >= self._alive_until)

    async def start(self, dead: Iterable[str] = ()) -> None:
        """Open the store, begin the lease, start the loop, and expire the open calls of dead processes.

        `dead` names processes that have certainly ended. Their leases end now. Raises what `Store.open` raises.
        """
        await self._store.open()
        for owner in dead:
            await self._store.renew(owner, self._now(), lease_ms=0)
        await self._renew()
        self._loop = self._tasks.start("ledger", self._run())
        await self.expire_orphans()

    async def reserve(self, operation: Reserve) -> Accepted | Refused | NeedsCount:
        """Admit a call, or say why not. Raises LedgerUnavailable if it was not decided within `wait_s`.

        If the caller is cancelled, what was reserved for it is released.
        """
        queued = self._enqueue(operation, _RESERVE)
        timeout = asyncio.get_running_loop().call_later(self._wait_s(), self._time_out, queued)
        try:
            answer = await queued.answer
        except asyncio.CancelledError:
            if not queued.answer.cancelled():  # the answer was set, and then the caller was cancelled before it ran
                self._enqueue(Release(operation.id, "client_left"), _END)
            raise
        finally:
            timeout.cancel()
        assert isinstance(answer, (Accepted, Refused, NeedsCount))
        return answer

    async def extend(self, operation: Extend) -> Accepted:
        """Raise the hold of a call in flight, as far as there is room. The caller limits how long it waits.

        Raises LedgerUnavailable.
        """
        answer = await self._enqueue(operation, _EXTEND).answer
        if not isinstance(answer, Accepted):
            raise LedgerUnavailable  # the entry does not exist, so nothing is held for this call
        return answer

    def end(self, operation: Settle | Release) -> "asyncio.Future[Reply]":
        """Queue the end of a call. The future is done when it is committed, however long that takes.

        Cancelling the future does not take the operation out of the queue.
        """
        return self._enqueue(operation, _END).answer

    async def expire_orphans(self) -> int:
        """Expire the open calls of dead processes, and return how many there were.

        Raises StoreUnavailable or LedgerUnavailable.
        """
        found = 0
        while ids := await self._store.orphans(self.owner, self._now(), limit=_ORPHANS_PER_READ):
            await asyncio.gather(*(self._enqueue(Expire(call_id), _END).answer for call_id in ids))
            found += len(ids)
        if found:
            self.metrics.expired.inc(found)
            log.warning("calls of a dead process were charged from their reservations", calls=found)
        return found

    async def sweep(self) -> None:
        """Expire the open calls of processes that died since the last sweep. To be called twice in each lease.

        Also those of this process that it has ended: the database has lost their ends.
        """
        try:
            await self.expire_orphans()
            await self._expire_ended()
        except (StoreUnavailable, LedgerUnavailable) as error:
            self.metrics.ledger_failed("sweep")
            log.warning("calls of dead processes could not be looked for", reason=str(error))

    async def _expire_ended(self) -> None:
        ids = await self._store.open_calls(self.owner)
        # What was read is compared with what is known after it. A call whose reserve was committed by then is in the
        # batch or has been answered, and one that has ended since is not changed by an expire.
        known = {*self._open, *(queued.operation.id for queued in (*self._batch, *self._queue))}
        expires = [self._enqueue(Expire(call_id), _END).answer for call_id in ids if call_id not in known]
        replies = await asyncio.gather(*expires)
        lost = sum(isinstance(reply, Accepted) and reply.entry.state == "expired" for reply in replies)
        if lost:
            log.warning(
                "the database has lost the ends of calls, which were charged from their reservations", calls=lost
            )

    async def renew_lease(self) -> None:
        """Extend the lease of this process by `lease_ms` from now. To be called four times in each lease."""
        try:
            await self._renew()
        except StoreUnavailable as error:
            self.is_healthy = False
            self.metrics.ledger_failed("lease")
            log.warning("the lease could not be renewed", reason=str(error))
        else:
            # A process that is not ready gets no calls, so no batch of calls would show that the database is back.
            self.is_healthy = True

    async def counters(self, keys: Sequence[CounterKey]) -> dict[CounterKey, Counter]:
        """The committed counters with these keys, for display. Raises LedgerUnavailable."""
        with _translated_errors():
            return await self._store.read_counters(keys)

    async def response_entry(self, response_id: str) -> Entry | None:
        """The entry of the call that made this response. Raises LedgerUnavailable."""
        with _translated_errors():
            return await self._store.find_response_entry(response_id)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Connection]:
        """A transaction for reports, which only reads. Raises LedgerUnavailable."""
        with _translated_errors():
            async with self._store.transaction() as connection:
                yield connection

    async def close(self, within_s: float | None = None) -> int:
        """Commit what is queued, unless the database is unavailable, and close the store.

        A commit that takes longer than `within_s` seconds is given up, because the database hangs. Returns how many
        calls have ended without their charge being committed. They will be charged what they hold.
        """
        self._is_closing = True
        if self._loop is not None:
            self._wake.set()
            _, unended = await asyncio.wait([self._loop], timeout=within_s)
            if unended:
                self._loop.cancel()
                await asyncio.wait([self._loop])
                self._give_up({*self._batch, *self._queue})  # a batch that has failed before is in both
        await self._store.close()
        return self._uncommitted_ends

    def _give_up(self, operations: Iterable[_Queued]) -> None:
        """Fail those of these operations that are not answered, because the ledger closes.

        The reservations of these calls are committed. The next start expires the calls and charges their holds.
        """
        uncommitted = [queued for queued in operations if queued.answer.cancelled() or not queued.answer.done()]
        self._queue.clear()
        self._uncommitted_ends += sum(queued.kind == _END for queued in uncommitted)
        log.error("closing with ends that could not be booked", calls=self._uncommitted_ends)
        for queued in uncommitted:
            self._fail(queued)

    def _enqueue(self, operation: Operation, kind: int) -> _Queued:
        queued = _Queued(operation, kind, asyncio.get_running_loop().create_future())
        if self._loop is None or self._loop.done():
            self._fail(queued)  # no loop runs that could answer it
        else:
            self._queue.append(queued)
            self._wake.set()
        return queued

    async def _run(self) -> None:
        while self._queue or not self._is_closing:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                if batch := self._next_batch():
                    self._batch = batch
                    await self._process(batch)
                    self._batch = []

    def _next_batch(self) -> list[_Queued]:
        """The next operations, in the order in which they are applied: ends, then extends, then reserves.

        Example with a limit of 1,000: the calls A and B hold 500 each. "Reserve 500 for C" and "settle A with 0" are
        queued, in this order. Applied in this order, C would be busy; applied as sorted here, C is admitted. The sort
        is stable, so each kind stays in order of arrival.

        A reserve or extend whose caller has given up is left out. If it may have been committed before, it is
        released.
        """
        batch: list[_Queued] = []
        for _ in range(min(BATCH_MAX, len(self._queue))):
            queued = self._queue.popleft()
            if queued.kind == _END or not queued.answer.done():
                batch.append(queued)
            elif queued.may_be_committed:
                self._release(queued)
        batch.sort(key=_kind_of)
        return batch

    async def _process(self, batch: list[_Queued]) -> None:
        """Have the store apply a batch, and answer its callers."""
        began_s = asyncio.get_running_loop().time()
        try:
            answers = await self._apply(batch)
        except StoreUnavailable as error:
            await self._requeue(batch, error)
        except Exception as error:  # noqa: BLE001 - an operation with any kind of mistake must not end the loop
            await self._process_one_by_one(batch, error)
        else:
            self._committed_at = asyncio.get_running_loop().time()
            self.commit_ms = round(1000 * (self._committed_at - began_s), 1)
            self.is_healthy = True
            self.metrics.ledger_batch.observe(len(batch))
            self.metrics.ledger_commit_s.observe(self._committed_at - began_s)
            freed: set[CounterKey] = set()
            for queued, answer in zip(batch, answers, strict=True):
                if isinstance(answer, Accepted):
                    freed |= answer.freed
                self._answer(queued, answer)
            if freed:
                self._on_freed(freed)
            self._on_replies(answers)

    async def _process_one_by_one(self, batch: list[_Queued], error: Exception) -> None:
        """Repeat a batch that failed with one operation at a time. Nothing of it was committed."""
        if len(batch) > 1:
            for queued in batch:
                await self._process([queued])
            return
        for queued in batch:
            self.metrics.ledger_failed("operation")
            log.error(
                "an act could not be booked",
                act=type(queued.operation).__name__,
                call=queued.operation.id,
                exc_info=error,
            )
            if queued.kind == _END:
                self._open.pop(queued.operation.id, None)  # then the sweep charges it from its reservation
            self._fail(queued)

    async def _requeue(self, batch: list[_Queued], error: StoreUnavailable) -> None:
        """Put a batch back to the front of the queue, because the database is unavailable, and pause the loop.

        An uncertain commit may have been done, for example if the connection broke between COMMIT and its reply.
        Repeating the batch is right in both cases: an operation that was done finds its entry and changes nothing.
        But a reserve is not repeated after its caller has given up, and then its hold, if it was committed, would
        have no owner. `may_be_committed` marks it, so that `_next_batch` releases it. An extend needs no mark: the
        end of its call frees what it holds.
        """
        self.is_healthy = False
        self.metrics.ledger_failed("batch")
        log.warning("the ledger's database can't be used", reason=str(error), operations=len(batch))
        if error.is_uncertain:
            for queued in batch:
                queued.may_be_committed |= queued.kind == _RESERVE
        self._queue.extendleft(reversed(batch))
        if self._is_closing:
            self._give_up(self._queue)
            return
        await asyncio.sleep(self._retry_s)

    def _answer(self, queued: _Queued, answer: Reply) -> None:
        """Answer a caller. If it has given up and its call was admitted, release the call."""
        operation, accepted = queued.operation, answer if isinstance(answer, Accepted) else None
        if isinstance(answer, Unknown) and isinstance(operation, Extend | Settle) and operation.id in self._open:
            self._restore(queued)
            return
        if accepted is not None and accepted.entry.state == "open":
            self._open[operation.id] = accepted
        elif queued.kind == _END:
            self._open.pop(operation.id, None)
        if not queued.answer.done():
            queued.answer.set_result(answer)
        elif accepted is not None and queued.kind == _RESERVE:
            self._release(queued)

    def _restore(self, queued: _Queued) -> None:
        """Queue the reservation of a call in flight again, which the database has lost, and then the operation."""
        lost = self._open.pop(queued.operation.id)
        log.warning("the database has lost a reservation, which is put back", call=lost.entry.id)
        # In front: the caller may have given up this operation, and have queued the end of the call meanwhile.
        self._queue.appendleft(queued)
        restore = Restore(lost.entry, lost.counters)
        self._queue.appendleft(_Queued(restore, _END, queued.answer.get_loop().create_future()))

    def _release(self, queued: _Queued) -> None:
        """Release a call that was, or may have been, admitted after its caller was cancelled or refused."""
        outcome: Outcome = "client_left" if queued.answer.cancelled() else "proxy_broke"
        self._enqueue(Release(queued.operation.id, outcome), _END)

    def _time_out(self, queued: _Queued) -> None:
        """Refuse a call that has waited for `wait_s`.

        The database is unavailable if no batch was committed in the last half of that time, for example because one
        hangs. If batches were committed, the ledger is only overloaded, and the process stays ready: with a wait of
        10 s and a commit every 0.2 s, thousands of calls in the queue must not make `/readyz` flap.
        """
        if asyncio.get_running_loop().time() - self._committed_at >= self._wait_s() / 2:
            self.is_healthy = False
        self.metrics.ledger_failed("wait")
        self._fail(queued)

    @staticmethod
    def _fail(queued: _Queued) -> None:
        if not queued.answer.done():
            queued.answer.set_exception(LedgerUnavailable())
            # Marks the exception as retrieved. asyncio warns of one that is not, and an end may have no caller that
            # waits.
            queued.answer.exception()

    async def _apply(self, batch: list[_Queued]) -> list[Reply]:
        if self._now() >= self._alive_until:
            # This process was paused for longer than its lease. What it reserves now would look to other processes
            # like the calls of a dead one, and be expired at once.
            await self._renew()
        asked_at = self._now()
        replies = await self._store.apply([queued.operation for queued in batch], asked_at)
        for reply in replies:
            if isinstance(reply, Accepted | Refused):
                self._measure_clock(reply.decided_at, asked_at=asked_at)
                break  # all replies of a batch are decided at the same instant
        return replies

    async def _renew(self) -> None:
        now = self._now()
        renewed_at = await self._store.renew(self.owner, now, lease_ms=self.lease_ms)
        self._lapses = self.lapses
        self._alive_until = now + self.lease_ms
        self._measure_clock(renewed_at, asked_at=now)

    def _measure_clock(self, decided_at: int, *, asked_at: int) -> None:
        """Correct the offset of the ledger's clock by an instant that the database returned.

        The database read its clock between our request and its reply, so each reply bounds the offset. The offset is
        changed only as far as the bounds demand: a reply that took long, because the batch waited for locks, has wide
        bounds and changes nothing. Example: we ask at 12:00:00.000 and get the reply at 12:00:00.004, which says
        12:05:00.001. The database's clock is between 299.997 and 300.001 s ahead. The lower bound also ensures that
        `now` is never earlier than the last decision.
        """
        offset_ms = min(max(self._clock_offset_ms, decided_at - self._now()), decided_at - asked_at)
        if offset_ms == self._clock_offset_ms:
            return
        self._clock_offset_ms = offset_ms
        self.metrics.ledger_clock_differs(offset_ms)
        self._log_offset()

    def _log_offset(self) -> None:
        """Log an offset of some seconds: once, and again only if it changes by as much or is gone."""
        offset_ms = self._clock_offset_ms
        if abs(offset_ms) < CLOCK_OFFSET_LOGGED_MS // 2:
            if self._logged_offset_ms:
                log.info("the database's clock and this machine's agree again", database_ahead_s=offset_ms / 1000)
            self._logged_offset_ms = 0
        elif abs(offset_ms - self._logged_offset_ms) >= CLOCK_OFFSET_LOGGED_MS:
            self._logged_offset_ms = offset_ms
            log.warning(
                "the database's clock and this machine's differ: quotas and what clients are told go by the "
                "database's; check the time synchronization (NTP) of both",
                database_ahead_s=offset_ms / 1000,
            )


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Within the block, a database that can't be read is a LedgerUnavailable."""
    try:
        yield
    except StoreUnavailable as error:
        raise LedgerUnavailable from error
