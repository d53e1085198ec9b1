"""The ledger: what a caller was told is committed, each call ends once, and no fault loses or doubles anything.

The tests use real SQLite files, the real loop and a clock that they set. The auditor reads the file with plain SQL.
"""

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from proxy.errors import LedgerUnavailable
from proxy.ledger.book import (
    Accepted,
    Book,
    Expire,
    Extend,
    Operation,
    Refused,
    Release,
    Reply,
    Reserve,
    Settle,
    Unknown,
)
from proxy.ledger.ledger import BATCH_MAX, LEASE_MS, Ledger
from proxy.ledger.queries import oldest_call
from proxy.ledger.schema import NewerSchema
from proxy.ledger.sqlite import SqliteStore
from proxy.ledger.store import StoreInUse, StoreUnavailable
from proxy.metrics import Metrics
from proxy.policy.admission import NeedsCount, Verdict
from proxy.policy.amounts import TOKENS_MAX, Amount, AtLeast, Exactly, Tokens, Unspent
from tests import exposition
from tests.audit import audit, connected, contents, rows, states
from tests.breakage import (
    BrokenBinding,
    failing_writes,
    full,
    locked,
    moved,
    read_only,
    statements,
    unchecked,
    writers,
)
from tests.builders import (
    DAY,
    HOUR,
    MINUTE,
    NOON,
    binding,
    call,
    entry_in,
    estimated,
    exactly,
    extend,
    quota,
    reserve,
)
from tests.sqlite import write_migrated

DAILY = quota("staff/daily", tokens=1000)
ANN = binding([DAILY])
ROOMY = binding([quota("staff/daily", tokens=10**9)])
CALL = call(100, 400)
STREAM = call(100, 900, 100, initial_hold=100)
HELD = Amount(100, 400, 1)
NO_AMOUNT = Amount()


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self, now: int = NOON) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@asynccontextmanager
async def running(
    path_or_store: Path | SqliteStore, owner: str = "process-1", *, clock: Clock | None = None, wait_s: float = 50
) -> AsyncIterator[Ledger]:
    """A ledger that runs. It does not wait for locks, and tries again after a millisecond."""
    is_path = isinstance(path_or_store, Path)
    store = SqliteStore(path_or_store, busy_timeout_s=0) if is_path else path_or_store
    ledger = Ledger(store, owner=owner, now=clock or Clock(), retry_s=0.001, wait_s=lambda: wait_s)
    await ledger.start()
    try:
        yield ledger
    finally:
        await ledger.close()


@pytest.fixture
async def ledger(path: Path, clock: Clock) -> AsyncIterator[Ledger]:
    async with running(path, clock=clock) as ledger:
        yield ledger


async def levels(ledger, each=DAILY, user="ann"):
    """What is used and what is held of a quota."""
    counter = (await ledger.counters([each.key_for(user)]))[each.key_for(user)]
    return counter.used, counter.held


async def current_reply(ledger, freed=()):
    """What an operation on ann's call 1 should reply, by what is stored now."""
    return Accepted(await entry_in(ledger, "1"), await ledger.counters(ANN.keys()), freed=frozenset(freed))


async def apply_together(ledger, *operations):
    """Queue these operations at once, so that they are one batch, and return the replies."""
    queued = [ledger.end(operation) for operation in operations]
    return await asyncio.gather(*queued)


async def apply_and_die(path, *operations):
    """Apply these operations as a process that is dead afterwards."""
    store = SqliteStore(path)
    await store.open()
    await store.apply(operations, NOON)
    await store.close()


# ------------------------------------------------------------------------------------------------- the life of a call


async def test_a_call_is_reserved_and_settled(ledger, path):
    """What it used is charged and the rest is freed. Both operations are committed when they are answered."""
    admitted = await ledger.reserve(reserve("1", ANN, CALL))
    assert states(path) == {"1": "open"}
    assert admitted == await current_reply(ledger)
    assert await levels(ledger) == (NO_AMOUNT, HELD)
    settled = await ledger.end(Settle("1", exactly(90, 60), "complete"))
    assert states(path) == {"1": "settled"}
    assert settled == await current_reply(ledger, freed=ANN.keys())
    assert await levels(ledger) == (Amount(90, 60, 1), NO_AMOUNT)


async def test_a_call_is_reserved_and_released(ledger, path):
    """Nothing was generated, so nothing is charged. The entry stays."""
    await ledger.reserve(reserve("1", ANN, CALL))
    released = await ledger.end(Release("1"))
    assert released == await current_reply(ledger, freed=ANN.keys())
    assert await levels(ledger) == (NO_AMOUNT, NO_AMOUNT)
    assert states(path) == {"1": "released"}


async def test_a_refused_call_writes_nothing(ledger, path):
    """The reply has the verdict."""
    refused = await ledger.reserve(reserve("1", ANN, call(1001)))
    assert isinstance(refused, Refused)
    assert refused.decision.verdict is Verdict.NEVER
    assert (rows(path, "calls"), rows(path, "counters")) == ([], [])


async def test_a_response_leads_to_the_call_that_made_it(ledger):
    """From the moment at which the call is settled."""
    admitted = await ledger.reserve(reserve("1", ANN, CALL))
    assert await ledger.response_entry("resp_1") is None
    await ledger.end(Settle("1", exactly(90, 60), "complete", response_id="resp_1"))
    found = await ledger.response_entry("resp_1")
    assert (found.id, found.labels, found.usage) == ("1", admitted.entry.labels, exactly(90, 60))


async def test_the_clock_decides_windows(ledger, clock):
    """A call on the next day gets a new window. A call of the day before that ends now does not change it."""
    await ledger.reserve(reserve("1", ANN, CALL))
    clock.now += DAY
    await ledger.reserve(reserve("2", ANN, CALL))
    await ledger.end(Settle("1", exactly(90, 60), "complete"))
    assert await levels(ledger) == (NO_AMOUNT, HELD)
    assert (await entry_in(ledger, "1")).usage == exactly(90, 60)


async def test_an_extend_raises_the_hold_of_a_stream(ledger, path):
    """The hold is committed when it is answered. Asking again for the same total changes nothing."""
    await ledger.reserve(reserve("1", ANN, STREAM))
    grown = await ledger.extend(extend("1", ANN, 400))
    assert grown == await current_reply(ledger)
    assert await levels(ledger) == (NO_AMOUNT, HELD)
    assert await ledger.extend(extend("1", ANN, 400)) == grown
    stopped = await ledger.extend(extend("1", ANN, 1000, least=901))
    assert (stopped.verdict, stopped.entry.hold) == (Verdict.EXHAUSTED, Amount(100, 900, 1))
    await ledger.end(Settle("1", exactly(90, 60), "complete"))
    assert await levels(ledger) == (Amount(90, 60, 1), NO_AMOUNT)
    audit(path)


async def test_a_call_without_an_entry_cannot_be_extended(ledger):
    """Nothing is held for it, so nothing of its answer may pass."""
    with pytest.raises(LedgerUnavailable):
        await ledger.extend(extend("1", ANN, 400))


async def test_a_call_that_has_expired_learns_it_when_it_is_extended(ledger):
    """Its process was paused for longer than its lease. The call was charged, and gets no more."""
    await ledger.reserve(replace(reserve("1", ANN, STREAM), owner="process-0"))
    await ledger.expire_orphans()
    reply = await ledger.extend(extend("1", ANN, 400))
    assert (reply.entry.state, reply.entry.hold) == ("expired", Amount(100, 100, 1))


async def test_a_call_whose_input_must_be_counted_first_is_told_so(ledger, path):
    """Nothing is written until it is reserved again."""
    assert await ledger.reserve(reserve("1", ANN, estimated(CALL))) == NeedsCount()
    assert (rows(path, "calls"), rows(path, "counters")) == ([], [])
    assert isinstance(await ledger.reserve(reserve("1", ANN, CALL)), Accepted)


async def test_on_freed_is_called_with_the_counters_on_which_a_hold_was_lowered(ledger):
    """After the batch. A higher hold, or the end of an unknown or ended call, lowers none."""
    freed = []
    ledger.on_freed(freed.append)
    await ledger.reserve(reserve("1", ANN, STREAM))
    await ledger.extend(extend("1", ANN, 500))
    await ledger.end(Settle("unknown", exactly(1), "complete"))
    assert freed == []
    await ledger.extend(extend("1", ANN, 500, input_tokens=90))
    assert freed == [set(ANN.keys())]
    await ledger.end(Settle("1", exactly(90, 60), "complete"))
    await ledger.end(Settle("1", exactly(90, 60), "complete"))
    assert freed == [set(ANN.keys())] * 2


async def test_on_replies_is_called_with_the_replies_of_each_batch_in_their_order(ledger):
    """Whenever the callers take theirs. So the last state of a counter is the newest."""
    found = []
    ledger.on_replies(found.extend)
    assert ledger.commit_ms is None
    first = await ledger.reserve(reserve("1", ANN, CALL))
    refused = await ledger.reserve(reserve("2", ANN, call(10**9)))
    later = await apply_together(ledger, Settle("1", exactly(90, 60), "complete"), Release("unknown"))
    assert found == [first, refused, *later]
    assert ledger.commit_ms is not None


async def test_a_repeated_operation_changes_nothing(ledger, path):
    """So it may be repeated if its outcome is unknown."""
    first = await ledger.reserve(reserve("1", ANN, CALL))
    assert await ledger.reserve(reserve("1", ANN, CALL)) == first
    await ledger.end(Settle("1", exactly(90, 60), "complete"))
    settled = await current_reply(ledger)
    assert await apply_together(ledger, Settle("1", exactly(9, 9), "complete"), Release("1")) == [settled, settled]
    audit(path)


# --------------------------------------------------------------------------------------- many calls at once, T60, T61


@pytest.mark.parametrize("room_for", [0, 1, 7, 99])
@pytest.mark.parametrize("history", ["first call ever", "a window of yesterday", "an open window"])
async def test_of_100_calls_at_once_exactly_as_many_are_admitted_as_fit(ledger, clock, path, room_for, history):
    """T60, T61: not one more and not one less, also if there is no row to lock yet."""
    used = 0 if history == "first call ever" else 500
    if used:
        clock.now -= DAY if history == "a window of yesterday" else 0
        await ledger.reserve(reserve("before", ROOMY, call(used)))
        await ledger.end(Settle("before", exactly(used), "complete"))
        clock.now = NOON
    counted = used if history == "an open window" else 0
    who = binding([quota("staff/daily", tokens=room_for * 500 + 499 + counted)])
    answers = await asyncio.gather(*(ledger.reserve(reserve(str(number), who, CALL)) for number in range(100)))
    refused = [answer for answer in answers if isinstance(answer, Refused)]
    assert len(answers) - len(refused) == room_for
    verdict = Verdict.BUSY if room_for else answers[0].decision.verdict
    assert {answer.decision.verdict for answer in refused} == {verdict}
    audit(path)


async def test_the_members_of_a_group_share_a_shared_quota(ledger, path):
    """Of the first calls of a hundred users, three fit."""
    shared = quota("team-x/pot", tokens=1500, shared=True)
    whos = [binding([shared], user=f"user {number}") for number in range(100)]
    answers = await asyncio.gather(
        *(ledger.reserve(reserve(str(number), who, CALL)) for number, who in enumerate(whos))
    )
    assert sum(isinstance(answer, Accepted) for answer in answers) == 3
    assert await levels(ledger, shared) == (NO_AMOUNT, Amount(300, 1200, 3))


async def test_tokens_that_are_freed_admit_the_next_call(ledger, path):
    """64 clients send one call after the other. The limit is never exceeded, and what fits is not refused."""
    who = binding([quota("staff/daily", tokens=10_000)])
    used = []

    async def client(name):
        for number in range(20):
            operation = reserve(f"{name}-{number}", who, call(10, 50))
            if isinstance(await ledger.reserve(operation), Accepted):
                used.append(10 + number)
                await ledger.end(Settle(operation.id, exactly(10, number), "complete"))

    await asyncio.gather(*(client(name) for name in range(64)))
    assert 10_000 - 60 < sum(used) <= 10_000
    assert (await levels(ledger))[0].tokens == sum(used)
    audit(path)


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    ("operations", "transactions"), [(1, 1), (BATCH_MAX, 1), (BATCH_MAX + 1, 2), (3 * BATCH_MAX, 3)]
)
async def test_operations_that_are_queued_together_share_a_commit(path, operations, transactions):
    """Up to BATCH_MAX of them, so that no caller waits long for the rest of a large batch."""
    with writers() as opened:
        async with running(path) as ledger:
            with statements(opened[0]) as seen:
                answers = await asyncio.gather(
                    *(ledger.reserve(reserve(str(number), ROOMY, call(1))) for number in range(operations))
                )
    assert [answer.entry.id for answer in answers] == [str(number) for number in range(operations)]
    assert seen.count("COMMIT") == transactions
    audit(path)


async def until(condition):
    """Wait until the ledger's loop has made a condition true."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the loop sets no event for tests
            await asyncio.sleep(0)


class InstantStore(SqliteStore):
    """A store that writes nothing, and replies at once that every call is unknown."""

    async def apply(self, operations, now):
        await asyncio.sleep(0)
        return [Unknown(operation.id) for operation in operations]


class GatedStore(SqliteStore):
    """A store on a slow disk: a batch is applied when the test opens the gate."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, busy_timeout_s=0)
        self.started = asyncio.Semaphore(0)
        self.gate = asyncio.Semaphore(0)
        self.batches: list[list[Operation]] = []

    async def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        self.batches.append(list(operations))
        self.started.release()
        await self.gate.acquire()
        return await super().apply(operations, now)

    async def batch_started(self) -> None:
        """Wait until the loop has passed a batch to this store."""
        await self.started.acquire()

    def open_gate(self) -> None:
        """Let this batch and all that follow through."""
        for _ in range(1000):
            self.gate.release()


async def test_operations_that_arrive_during_a_commit_are_the_next_batch(path):
    """So batches grow with the load, and share the cost of a commit."""
    store = GatedStore(path)
    async with running(store) as ledger:
        first = asyncio.ensure_future(ledger.reserve(reserve("0", ROOMY, call(1))))
        await store.batch_started()
        others = [
            asyncio.ensure_future(ledger.reserve(reserve(str(number), ROOMY, call(1)))) for number in range(1, 10)
        ]
        await asyncio.sleep(0)
        store.open_gate()
        await asyncio.gather(first, *others)
        assert [len(batch) for batch in store.batches] == [1, 9]


async def test_ends_are_applied_first_in_a_batch(ledger):
    """No call is refused for tokens that the same batch frees, also if it was queued first."""
    await ledger.reserve(reserve("1", ANN, CALL))
    await ledger.reserve(reserve("2", ANN, CALL))
    third = asyncio.ensure_future(ledger.reserve(reserve("3", ANN, CALL)))
    fourth = asyncio.ensure_future(ledger.reserve(reserve("4", ANN, CALL)))
    await asyncio.sleep(0)
    await apply_together(ledger, Settle("1", exactly(0, 0), "complete"), Release("2"))
    assert isinstance(await third, Accepted)
    assert isinstance(await fourth, Accepted)


async def test_extends_are_applied_before_reserves_in_a_batch(ledger):
    """Of 800 tokens that are freed, a stream gets what it needs first: an answer that has begun is worth more."""
    await ledger.reserve(reserve("1", ANN, STREAM))
    await ledger.reserve(reserve("2", ANN, call(0, 800)))
    new_call = asyncio.ensure_future(ledger.reserve(reserve("3", ANN, call(0, 201))))
    extended = asyncio.ensure_future(ledger.extend(extend("1", ANN, 700, least=700)))
    await asyncio.sleep(0)
    await ledger.end(Release("2"))
    assert (await extended).entry.hold.output == 700
    assert isinstance(await new_call, Refused)


async def test_reserves_are_applied_in_order_of_arrival(ledger):
    """Of five calls that need 300 tokens each, the first three are admitted."""
    answers = await asyncio.gather(*(ledger.reserve(reserve(str(number), ANN, call(300))) for number in range(5)))
    assert [isinstance(answer, Accepted) for answer in answers] == [True, True, True, False, False]


# ----------------------------------------------------------------------------------------------- callers that give up


async def test_a_call_that_is_cancelled_before_its_batch_starts_is_not_reserved(path):
    """Its client disconnected while it waited."""
    store = GatedStore(path)
    async with running(store) as ledger:
        first = asyncio.ensure_future(ledger.reserve(reserve("1", ANN, CALL)))
        await store.batch_started()
        second = asyncio.ensure_future(ledger.reserve(reserve("2", ANN, CALL)))
        await asyncio.sleep(0)
        second.cancel()
        store.open_gate()
        await first
        with pytest.raises(asyncio.CancelledError):
            await second
    assert states(path) == {"1": "open"}
    assert [len(batch) for batch in store.batches] == [1]


@pytest.mark.parametrize("demand", [CALL, call(1001)], ids=["admitted", "refused"])
async def test_a_call_that_is_cancelled_during_its_batch_holds_nothing(path, demand):
    """The batch cannot be stopped, so what was reserved is released."""
    store = GatedStore(path)
    async with running(store) as ledger:
        cancelled = asyncio.ensure_future(ledger.reserve(reserve("1", ANN, demand)))
        await store.batch_started()
        cancelled.cancel()
        store.open_gate()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
    assert states(path) == ({"1": "released"} if demand is CALL else {})
    audit(path)


async def test_a_call_that_is_cancelled_after_its_answer_holds_nothing(ledger, path):
    """The answer was set, and the caller is cancelled before it runs again."""
    await ledger.reserve(reserve("1", ANN, CALL))
    cancelled = asyncio.ensure_future(ledger.reserve(reserve("2", ANN, CALL)))
    await asyncio.sleep(0)
    # The end is answered first in the batch, so its callback runs after the reserve was answered, before its caller.
    ledger.end(Release("1")).add_done_callback(lambda _: cancelled.cancel())
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    await ledger.close()
    assert states(path) == {"1": "released", "2": "released"}


async def test_an_extend_that_is_cancelled_before_its_batch_starts_is_not_applied(path):
    """Its caller would not pass on what it holds."""
    store = GatedStore(path)
    async with running(store) as ledger:
        store.gate.release()
        await ledger.reserve(reserve("1", ANN, STREAM))
        await store.batch_started()
        first = asyncio.ensure_future(ledger.reserve(reserve("2", ANN, call(1))))
        await store.batch_started()
        cancelled = asyncio.ensure_future(ledger.extend(extend("1", ANN, 400)))
        await asyncio.sleep(0)
        cancelled.cancel()
        store.open_gate()
        await first
        await apply_together(ledger, Release("unknown"))
        assert not any(isinstance(operation, Extend) for batch in store.batches for operation in batch)
        assert (await entry_in(ledger, "1")).hold == Amount(100, 100, 1)


async def test_an_extend_that_is_cancelled_during_its_batch_is_held_until_the_call_ends(path):
    """It does not end the call, which is still in flight."""
    store = GatedStore(path)
    async with running(store) as ledger:
        store.gate.release()
        await ledger.reserve(reserve("1", ANN, STREAM))
        await store.batch_started()
        cancelled = asyncio.ensure_future(ledger.extend(extend("1", ANN, 400)))
        await store.batch_started()
        cancelled.cancel()
        store.open_gate()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await apply_together(ledger, Release("unknown"))
        assert await levels(ledger) == (NO_AMOUNT, HELD)
        assert states(path) == {"1": "open"}
        await ledger.end(Release("1"))
        assert await levels(ledger) == (NO_AMOUNT, NO_AMOUNT)


async def test_an_end_is_committed_also_if_its_future_is_cancelled(ledger, path):
    """A task that was cancelled while it settled a call has settled it."""
    await ledger.reserve(reserve("1", ANN, CALL))
    ledger.end(Settle("1", exactly(90, 60), "complete")).cancel()
    await ledger.close()
    assert states(path) == {"1": "settled"}
    audit(path)


# ---------------------------------------------------------------------------------- operations that cannot be applied


INVALID = {
    "a rule raises": lambda: unchecked(reserve("bad", ROOMY, call(1)), binding=BrokenBinding()),
    "a rule raises for an extend": lambda: extend("0", binding([quota("lab/daily", tokens=9)]), 500),
    "the database rejects a value": lambda: unchecked(reserve("bad", ROOMY, call(1)), owner=None),
    "the driver rejects a value": lambda: unchecked(
        Settle("0", exactly(1), "complete"), usage=Exactly(Tokens(2**70, 0))
    ),
}


@pytest.mark.parametrize("kind", INVALID)
@pytest.mark.parametrize("index", [0, 3, 6])
async def test_an_operation_that_cannot_be_applied_fails_alone(ledger, path, kind, index):
    """The others of its batch are applied. Its own caller gets an error, and the log says why."""
    await apply_together(ledger, *(reserve(str(number), ROOMY, CALL) for number in range(4)))
    operations = [reserve(str(number), ROOMY, CALL) for number in range(4, 7)]
    operations += [Settle("1", exactly(90, 60), "complete"), Release("2"), Expire("3")]
    operations.insert(index, INVALID[kind]())
    with capture_logs() as logs:
        answers = await asyncio.gather(*(_asked(ledger, each) for each in operations), return_exceptions=True)
    assert isinstance(answers.pop(index), LedgerUnavailable)
    assert {type(answer) for answer in answers} == {Accepted}
    assert [(line["event"], line["log_level"]) for line in logs] == [("an act could not be booked", "error")]
    assert "".join(state[0] for state in states(path).values()) == "osreooo"
    assert ledger.is_healthy
    audit(path)


async def _asked(ledger: Ledger, operation: Operation) -> Reply:
    """The answer to an operation, which is asked for as calls do it."""
    match operation:
        case Reserve():
            return await ledger.reserve(operation)
        case Extend():
            return await ledger.extend(operation)
    return await ledger.end(operation)


async def test_a_failed_operation_whose_caller_was_cancelled_is_only_logged(ledger, path):
    """There is no caller to raise an error in."""
    with capture_logs() as logs:
        ledger.end(INVALID["the driver rejects a value"]()).cancel()
        await apply_together(ledger, reserve("0", ROOMY, CALL))
        ledger.end(INVALID["the driver rejects a value"]()).cancel()
        await apply_together(ledger, reserve("1", ROOMY, CALL))
    assert [line["event"] for line in logs] == ["an act could not be booked"]
    assert states(path) == {"0": "open", "1": "open"}


# ---------------------------------------------------------------------------------- while the database is unavailable


FAULTS = [locked, read_only, full, failing_writes, moved]


def large(number):
    """A call whose row takes most of a page, so that any operation shows that the disk is full."""
    operation = reserve(f"{number:04}", ROOMY, CALL)
    return replace(
        operation, labels=operation.labels._replace(model="m" * 512, endpoint="e" * 512, upstream="u" * 512)
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_while_the_database_is_unavailable_no_call_is_admitted_and_nothing_is_lost(path, fault):
    """T53, T55: new calls are refused; extends wait as long as their callers do; ends are committed later, once."""
    calls = 2 * BATCH_MAX + 10
    with writers() as opened, capture_logs() as logs:
        async with running(path, wait_s=0.01) as ledger:
            await apply_together(ledger, *(large(number) for number in range(calls)))
            with fault(path, opened[0]):
                ends = [
                    ledger.end(Settle(f"{number:04}", exactly(90, number), "complete")) for number in range(calls)
                ]
                late = [ledger.reserve(large(calls + number)) for number in range(20)]
                extends = [ledger.extend(extend(f"{number:04}", ROOMY, 500)) for number in range(20)]
                late += [asyncio.wait_for(extended, 0.05) for extended in extends]
                answers = await asyncio.gather(*late, return_exceptions=True)
                assert {type(answer) for answer in answers} == {LedgerUnavailable, TimeoutError}
                assert not ledger.is_healthy
                await until(lambda: bool(logs))  # on a busy machine the timeouts may come before the error
                assert not any(end.done() for end in ends)
            await asyncio.gather(*ends)
            assert ledger.is_healthy
            assert await levels(ledger) == (Amount(90 * calls, sum(range(calls)), calls), NO_AMOUNT)
            await apply_together(ledger, large(calls))
    assert len(states(path)) == calls + 1  # no entry of a refused call
    assert "the ledger's database can't be used" in {line["event"] for line in logs}
    audit(path)


async def test_a_lost_reservation_is_put_back_before_the_end_that_was_queued_meanwhile(path):
    """A failover has lost it, and the database is slow: the extend is given up, and its answer ends."""
    is_slow, goes_on = asyncio.Event(), asyncio.Event()

    class Slow(SqliteStore):
        async def apply(self, operations, now):
            replies = await super().apply(operations, now)
            if isinstance(operations[0], Extend) and not goes_on.is_set():
                is_slow.set()
                await goes_on.wait()
            return replies

    async with running(Slow(path, busy_timeout_s=0)) as ledger:
        await ledger.reserve(reserve("1", ANN, STREAM))
        with connected(path) as other:
            other.execute("DELETE FROM calls")
            other.execute("UPDATE counters SET held_input = 0, held_output = 0, held_requests = 0")
        extending = asyncio.create_task(ledger.extend(extend("1", ANN, 300, least=200)))
        await is_slow.wait()
        extending.cancel()
        await asyncio.gather(extending, return_exceptions=True)
        ended = ledger.end(Settle("1", exactly(100, 150), "complete"))
        goes_on.set()
        assert (await ended).entry.state == "settled"
        assert await levels(ledger) == (Amount(100, 150, 1), NO_AMOUNT)
    audit(path)


async def test_a_new_call_waits_for_an_unavailable_database(ledger, path):
    """A failover is only a pause: no call is refused for it."""
    with connected(path) as other, capture_logs() as logs:
        other.execute("BEGIN IMMEDIATE")
        waiting = [asyncio.ensure_future(ledger.reserve(reserve(str(number), ROOMY, CALL))) for number in range(20)]
        await until(lambda: len(logs) > 3)
        assert not any(call.done() for call in waiting)
        assert not ledger.is_healthy
        other.execute("ROLLBACK")
        assert {type(answer) for answer in await asyncio.gather(*waiting)} == {Accepted}
    assert ledger.is_healthy
    audit(path)


async def test_a_call_that_was_refused_after_its_wait_holds_nothing(path):
    """Its batch was only slow. What it reserved in the end is released, with the outcome `proxy_broke`."""
    store = GatedStore(path)
    async with running(store, wait_s=0.01) as ledger:
        with pytest.raises(LedgerUnavailable):
            await ledger.reserve(reserve("1", ANN, CALL))
        store.open_gate()
    [row] = rows(path, "calls")
    assert (row["state"], row["outcome"]) == ("released", "proxy_broke")
    audit(path)


async def test_a_call_that_gives_up_under_overload_leaves_the_process_ready(path, monkeypatch):
    """5,000 batches are ahead of it, and each is committed: the ledger is overloaded, not unavailable."""
    monkeypatch.setattr("proxy.ledger.ledger.BATCH_MAX", 1)
    states_of_health: list[bool] = []

    def record(ledger: Ledger, name: str, value: object) -> None:
        object.__setattr__(ledger, name, value)
        if name == "is_healthy":
            states_of_health.append(bool(value))

    async with running(InstantStore(path), wait_s=0.01) as ledger:
        # The next commit would set it back to True before a test could look, so every change is recorded.
        monkeypatch.setattr(Ledger, "__setattr__", record)
        ends = [ledger.end(Release(f"{number:04}")) for number in range(5000)]
        with pytest.raises(LedgerUnavailable):
            await ledger.reserve(reserve("1", ANN, CALL))
        assert not ends[-1].done()
        await asyncio.gather(*ends)
    assert states_of_health
    assert all(states_of_health)
    assert states(path) == {}


async def test_a_call_that_gives_up_while_a_batch_hangs_makes_the_process_not_ready(path):
    """Nothing was committed for all of its wait, although the database has reported no error."""
    store = GatedStore(path)
    async with running(store, wait_s=0.01) as ledger:
        with pytest.raises(LedgerUnavailable):
            await ledger.reserve(reserve("1", ANN, CALL))
        assert not ledger.is_healthy
        store.open_gate()


async def test_a_process_that_was_paused_renews_its_lease_before_it_applies_a_batch(ledger, clock, path):
    """Other processes must not take the calls that it admits for those of a dead process."""
    clock.now += 3 * LEASE_MS
    await ledger.reserve(reserve("1", ANN, CALL))
    assert rows(path, "owners") == [{"id": "process-1", "alive_until": NOON + 4 * LEASE_MS}]


async def test_lapses_counts_how_often_the_lease_has_run_out(ledger, clock):
    """It counts from the first moment, before the lease is renewed. A renewal in time does not count."""
    at_start = ledger.lapses
    clock.now += LEASE_MS - 1
    await ledger.renew_lease()
    clock.now += LEASE_MS - 1
    assert ledger.lapses == at_start
    clock.now += 1
    assert ledger.lapses == at_start + 1
    await ledger.renew_lease()
    assert ledger.lapses == at_start + 1
    clock.now += LEASE_MS
    assert ledger.lapses == at_start + 2


async def test_a_sweep_expires_calls_of_dead_processes_and_only_logs_a_failure(ledger, path):
    """The next sweep tries again."""
    await ledger.reserve(replace(reserve("1", ANN, CALL), owner="process-0"))
    await ledger.sweep()
    assert states(path) == {"1": "expired"}
    with capture_logs() as logs, connected(path) as connection:
        connection.execute("ALTER TABLE calls RENAME TO aside")
        await ledger.sweep()
        connection.execute("ALTER TABLE aside RENAME TO calls")
    assert [line["event"] for line in logs] == ["calls of dead processes could not be looked for"]


async def test_a_renewal_of_the_lease_shows_that_the_database_is_back(ledger, path):
    """A process that is not ready gets no calls, so no call would show it."""
    with connected(path) as other, capture_logs() as logs:
        other.execute("BEGIN IMMEDIATE")
        await ledger.renew_lease()
        assert not ledger.is_healthy
        other.execute("ROLLBACK")
    assert [line["event"] for line in logs] == ["the lease could not be renewed"]
    await ledger.renew_lease()
    assert ledger.is_healthy


# ------------------------------------------------------------------------------------------- the clock that decides


class ClockOfItsOwn(SqliteStore):
    """A store that decides by its own clock, as PostgreSQL does, and takes its time for a batch."""

    def __init__(self, path: Path, clock: Clock) -> None:
        super().__init__(path)
        self.process = clock
        self.ahead_ms = 0
        self.read_after_ms = 0
        self.replied_after_ms = 0

    def read(self) -> int:
        """Read the store's clock between the request and the reply."""
        self.process.now += self.read_after_ms
        now = self.process.now + self.ahead_ms
        self.process.now += self.replied_after_ms
        return now

    async def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        return await super().apply(operations, self.read())

    async def renew(self, owner: str, now: int, *, lease_ms: int) -> int:
        return await super().renew(owner, self.read(), lease_ms=lease_ms)


async def test_the_time_of_the_ledger_is_that_of_the_clock_that_decides(path, clock):
    """T75: it is measured at the start, with each batch, and with each renewal of the lease."""
    store = ClockOfItsOwn(path, clock)
    store.ahead_ms = 300_000
    async with running(store, clock=clock) as ledger:
        metrics = ledger.metrics
        assert ledger.now() == NOON + 300_000
        clock.now += 1000
        assert ledger.now() == NOON + 301_000
        store.ahead_ms = -300_000
        refused = await ledger.reserve(reserve("1", ANN, call(5000)))
        assert refused.decided_at == ledger.now() == NOON - 299_000
        assert read(metrics).value("llm_quota_ledger_clock_offset_seconds") == -300
        store.ahead_ms = 7
        await ledger.renew_lease()
        assert ledger.now() == NOON + 1007
        store.ahead_ms = 9
        await ledger.reserve(reserve("2", ANN, call(100)))
        assert ledger.now() == NOON + 1009
        await ledger.end(Release("unknown"))  # its reply has no instant
        assert read(metrics).value("llm_quota_ledger_clock_offset_seconds") == 0.009


@pytest.mark.parametrize(
    ("read_after_ms", "replied_after_ms", "offset_ms"),
    [(2, 3, 300_000), (0, 5000, 300_000), (5000, 0, 300_000), (100, 400, 300_000)],
)
async def test_a_slow_reply_does_not_change_the_measured_time(
    path, clock, read_after_ms, replied_after_ms, offset_ms
):
    """T75: a batch that waited for a lock says little about the clock, and the time is never before a decision."""
    store = ClockOfItsOwn(path, clock)
    store.ahead_ms = 300_000
    async with running(store, clock=clock) as ledger:
        store.read_after_ms, store.replied_after_ms = read_after_ms, replied_after_ms
        accepted = await ledger.reserve(reserve("1", ANN, call(100)))
        assert ledger.now() - clock.now == offset_ms
        assert ledger.now() >= accepted.decided_at


async def test_an_offset_of_the_clock_is_logged_once_for_each_change(path, clock):
    """T75: not for each call, not for an offset of milliseconds; and once when the clocks agree again."""
    store = ClockOfItsOwn(path, clock)
    with capture_logs() as logged:
        async with running(store, clock=clock) as ledger:
            for ahead_ms in (1999, -1999, 5, 2000, 2001, 1999, 1001, 3999, -300_000, -300_500, -999, 0, 1500, -2000):
                store.ahead_ms = ahead_ms
                await ledger.renew_lease()
    assert [(line["log_level"], line["database_ahead_s"]) for line in logged] == [
        ("warning", 2.0),
        ("warning", -300.0),
        ("info", -0.999),
        ("warning", -2.0),
    ]


async def test_a_lease_begins_at_the_start_and_is_renewed_from_now(ledger, clock, path):
    """Each time it ends `lease_ms` later."""
    assert rows(path, "owners") == [{"id": "process-1", "alive_until": NOON + LEASE_MS}]
    clock.now += 1000
    await ledger.renew_lease()
    assert rows(path, "owners") == [{"id": "process-1", "alive_until": NOON + 1000 + LEASE_MS}]


async def test_a_read_that_fails_raises_ledger_unavailable(ledger, path):
    """The error with which a call is answered."""
    with connected(path) as other:
        other.execute("DROP TABLE counters")
        other.execute("DROP TABLE calls")
    with pytest.raises(LedgerUnavailable):
        await ledger.counters(ANN.keys())
    with pytest.raises(LedgerUnavailable):
        await ledger.response_entry("resp_1")


class UncertainStore(SqliteStore):
    """A store that commits a batch and then raises an uncertain error, once, if `loses_next_reply` is set."""

    loses_next_reply = False

    async def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        answers = await super().apply(operations, now)
        if self.loses_next_reply:
            self.loses_next_reply = False
            raise StoreUnavailable("the connection broke", is_uncertain=True)
        return answers


async def test_a_reserve_whose_commit_is_uncertain_is_repeated(path):
    """It finds its entry, so its hold is counted once."""
    store = UncertainStore(path)
    async with running(store) as ledger:
        store.loses_next_reply = True
        assert isinstance(await ledger.reserve(reserve("1", ANN, CALL)), Accepted)
        assert await levels(ledger) == (NO_AMOUNT, HELD)
    audit(path)


@pytest.mark.parametrize("is_cancelled", [True, False], ids=["cancelled", "refused"])
async def test_a_reserve_whose_commit_is_uncertain_is_released_if_its_caller_gave_up(path, is_cancelled):
    """Its caller got no admission, so nothing may stay held."""
    store = UncertainStore(path)
    async with running(store, wait_s=50 if is_cancelled else 0.01) as ledger:
        store.loses_next_reply = True
        reserving = asyncio.ensure_future(ledger.reserve(reserve("1", ANN, CALL)))
        with connected(path) as other, capture_logs() as logs:
            await until(lambda: len(logs) > 0)
            other.execute("BEGIN IMMEDIATE")  # so that it cannot be repeated yet
            if is_cancelled:
                reserving.cancel()
            with pytest.raises(asyncio.CancelledError if is_cancelled else LedgerUnavailable):
                await reserving
            other.execute("ROLLBACK")
    assert states(path) == {"1": "released"}
    assert rows(path, "calls")[0]["outcome"] == ("client_left" if is_cancelled else "proxy_broke")
    audit(path)


async def test_an_extend_whose_commit_is_uncertain_is_held_once(path):
    """It is repeated and changes nothing. The same holds if the caller asks for the same total again."""
    store = UncertainStore(path)
    async with running(store) as ledger:
        await ledger.reserve(reserve("1", ANN, STREAM))
        store.loses_next_reply = True
        for _ in range(2):
            assert (await ledger.extend(extend("1", ANN, 400))).entry.hold == HELD
        assert await levels(ledger) == (NO_AMOUNT, HELD)
    assert states(path) == {"1": "open"}
    audit(path)


async def test_an_end_whose_commit_is_uncertain_is_charged_once(path):
    """T54: it is repeated and changes nothing."""
    store = UncertainStore(path)
    async with running(store) as ledger:
        await apply_together(ledger, *(reserve(str(number), ROOMY, CALL) for number in range(3)))
        store.loses_next_reply = True
        await apply_together(ledger, Settle("0", exactly(90, 60), "complete"), Release("1"))
        assert await levels(ledger) == (Amount(90, 60, 1), HELD)
    audit(path)


# ----------------------------------------------------------------------------------------------- starting and closing


async def test_closing_commits_what_is_queued(path):
    """Also if it is more than one batch and no caller waits for it."""
    async with running(path) as ledger:
        for number in range(BATCH_MAX):
            ledger.end(reserve(str(number), ROOMY, CALL))
        for number in range(BATCH_MAX):
            ledger.end(Release(str(number)))
    assert set(states(path).values()) == {"released"}
    assert len(states(path)) == BATCH_MAX


async def test_closing_ends_also_while_the_database_is_unavailable(path):
    """Ends that could not be committed are logged. The next start charges these calls their holds, once."""
    async with running(path) as ledger:
        await apply_together(ledger, *(reserve(str(number), ROOMY, CALL) for number in range(3)))
        with connected(path) as other, capture_logs() as logs:
            other.execute("BEGIN IMMEDIATE")
            ends = [ledger.end(Settle(str(number), exactly(1), "complete")) for number in range(3)]
            new_call = asyncio.ensure_future(ledger.reserve(reserve("9", ROOMY, CALL)))
            await asyncio.sleep(0)
            assert await asyncio.wait_for(ledger.close(), 10) == 3
            other.execute("ROLLBACK")
    assert (logs[-1]["event"], logs[-1]["calls"]) == ("closing with ends that could not be booked", 3)
    for unanswered in (new_call, *ends):
        with pytest.raises(LedgerUnavailable):
            await unanswered
    async with running(path, "process-2") as ledger:
        assert await levels(ledger) == (Amount(300, 1200, 3), NO_AMOUNT)
    audit(path)


class HangingStore(SqliteStore):
    """Does not answer once it `hangs`, like a server whose process is stopped."""

    hangs = False

    async def apply(self, operations, now):
        if self.hangs:
            await asyncio.Event().wait()
        return await super().apply(operations, now)


async def test_closing_gives_up_a_commit_that_takes_too_long(path):
    """Neither the batch nor what waits behind it is committed. The next start charges these calls their holds."""
    store = HangingStore(path)
    async with running(store) as ledger:
        await apply_together(ledger, *(reserve(str(number), ROOMY, CALL) for number in range(3)))
        store.hangs = True
        ends = [ledger.end(Settle("0", exactly(1), "complete"))]
        await asyncio.sleep(0)
        ends += [ledger.end(Settle(str(number), exactly(1), "complete")) for number in (1, 2)]
        assert await ledger.close(within_s=0.01) == 3
    for end in ends:
        with pytest.raises(LedgerUnavailable):
            await end
    async with running(path, "process-2") as ledger:
        assert await levels(ledger) == (Amount(300, 1200, 3), NO_AMOUNT)
    audit(path)


async def test_an_operation_before_the_start_or_after_the_close_fails_at_once(path):
    """No caller waits for an answer that will never come."""
    ledger = Ledger(SqliteStore(path), owner="process-1", now=Clock())
    with pytest.raises(LedgerUnavailable):
        await ledger.reserve(reserve("1", ANN, CALL))
    await ledger.start()
    await ledger.close()
    with pytest.raises(LedgerUnavailable):
        await ledger.reserve(reserve("1", ANN, CALL))
    with pytest.raises(LedgerUnavailable):
        await ledger.end(Release("1"))
    assert states(path) == {}


async def test_a_second_process_on_a_file_in_use_does_not_start(ledger, path):
    """The first one is not affected."""
    second = Ledger(SqliteStore(path), owner="process-2", now=Clock())
    with pytest.raises(StoreInUse):
        await second.start()
    await second.close()
    assert isinstance(await ledger.reserve(reserve("1", ANN, CALL)), Accepted)


async def test_a_ledger_with_a_newer_schema_does_not_start(path):
    """Nothing in the file is changed, not even the lease."""
    await apply_and_die(path)
    with connected(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    before = contents(path)
    ledger = Ledger(SqliteStore(path), owner="process-1", now=Clock())
    with pytest.raises(NewerSchema):
        await ledger.start()
    await ledger.close()
    assert contents(path) == before


# ------------------------------------------------------------------------------------------------------ after a crash


async def test_an_open_call_of_a_dead_process_is_charged_its_hold_once(path):
    """Ended calls stay as they were. After any number of starts it is still charged once (I9)."""
    operations = [reserve(str(number), ROOMY, CALL) for number in range(5)]
    await apply_and_die(path, *operations, Settle("0", exactly(1, 1), "complete"), Release("1"), Expire("2"))
    with capture_logs() as logs:
        async with running(path, "process-2") as ledger:
            assert await levels(ledger) == (Amount(301, 1201, 4), NO_AMOUNT)
            assert (await entry_in(ledger, "3")).usage == AtLeast(Tokens(100, 400))
            assert (await entry_in(ledger, "3")).outcome == "lost"
    assert [line["calls"] for line in logs] == [2]
    assert list(states(path).values()) == ["settled", "released", "expired", "expired", "expired"]
    audit(path)
    before = [rows(path, "counters"), rows(path, "calls")]
    for number in range(3, 6):
        async with running(path, f"process-{number}", clock=Clock(NOON + DAY)):
            pass
    assert [rows(path, "counters"), rows(path, "calls")] == before


async def test_an_open_stream_of_a_dead_process_is_charged_its_hold_as_it_was_extended(path):
    """Nothing passes that is not held, so that is the most that its client can have got."""
    await apply_and_die(path, reserve("1", ANN, STREAM), extend("1", ANN, 700, input_tokens=80))
    async with running(path, "process-2") as ledger:
        assert (await entry_in(ledger, "1")).usage == AtLeast(Tokens(80, 700))
        assert await levels(ledger) == (Amount(80, 700, 1), NO_AMOUNT)
    audit(path)


async def test_any_number_of_open_calls_of_dead_processes_expires(path):
    """Also more than one read returns."""
    operations = [reserve(f"{number:04}", ROOMY, call(1)) for number in range(1500)]
    await apply_and_die(path, *operations)
    async with running(path, "process-2") as ledger:
        assert await levels(ledger) == (Amount(1500, 0, 1500), NO_AMOUNT)
    assert set(states(path).values()) == {"expired"}


async def test_calls_of_this_process_do_not_expire(ledger, path):
    """They are in flight."""
    await ledger.reserve(reserve("1", ANN, CALL))
    await ledger.reserve(replace(reserve("2", ANN, CALL), owner="process-0"))
    assert await ledger.expire_orphans() == 1
    assert await ledger.expire_orphans() == 0
    assert states(path) == {"1": "open", "2": "expired"}


async def test_calls_of_a_worker_that_is_known_to_be_dead_expire_at_once(ledger, path):
    """Although its lease has not run out. Calls of other workers do not expire."""
    for number in range(2):
        await ledger.reserve(replace(reserve(str(number), ANN, call(1)), owner=f"process-{number}"))
        await ledger._store.renew(f"process-{number}", NOON, lease_ms=LEASE_MS)
    worker = Ledger(SqliteStore(path, lock=ledger._store.hand_over()), owner="process-2", now=lambda: NOON)
    await worker.start(["process-1"])
    assert states(path) == {"0": "open", "1": "expired"}
    await worker.close()


async def test_a_settle_corrects_the_charge_of_an_expired_call(ledger):
    """Its process was only paused. The usage replaces the hold that was charged."""
    await ledger.reserve(replace(reserve("1", ANN, CALL), owner="process-0"))
    await ledger.expire_orphans()
    await ledger.end(Settle("1", exactly(90, 60), "complete"))
    assert await levels(ledger) == (Amount(90, 60, 1), NO_AMOUNT)


async def work_until_killed(path: Path, owner: str) -> None:
    """A small load that prints what the ledger told it. It runs in a process of its own."""
    chance, shared = random.Random(owner), quota("staff/pot", tokens=10**9, shared=True)
    ledger = Ledger(SqliteStore(path), owner=owner, now=Clock())
    await ledger.start()

    def say(*words: object) -> None:
        os.write(1, f"{' '.join(map(str, words))}\n".encode())

    async def client(name: int) -> None:
        who = binding([quota("staff/daily", tokens=10**9), shared], user=f"user {name % 3}")
        for number in range(1_000_000):
            operation = reserve(f"{owner}-{name}-{number}", who, call(100, 400, 50, initial_hold=50))
            await ledger.reserve(operation)
            say(operation.id, "open", 50)
            for output in (150, 250)[: chance.randrange(3)]:
                await ledger.extend(extend(operation.id, who, output))
                say(operation.id, "open", output)
            match chance.choice(["settle", "settle", "release", "leave"]):
                case "settle":
                    used = chance.randrange(400)
                    await ledger.end(Settle(operation.id, exactly(90, used), "complete"))
                    say(operation.id, "settled", used)
                case "release":
                    await ledger.end(Release(operation.id))
                    say(operation.id, "released")

    await asyncio.gather(*(client(name) for name in range(8)))


WORK = """
import asyncio, pathlib, sys
from tests.ledger.test_ledger import work_until_killed
asyncio.run(work_until_killed(pathlib.Path(sys.argv[1]), sys.argv[2]))
"""
ROOT = Path(__file__).resolve().parents[2]


def output_until_killed(path, owner, lines):
    """The words of the lines that a process under load printed. It is killed after so many lines, at any point."""
    command = [sys.executable, "-c", WORK, path, owner]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        printed = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        printed += process.stdout.readlines()
    return [line.split() for line in printed if line.endswith("\n")]


def test_kill_9_loses_nothing_and_doubles_nothing(path):
    """What the ledger told is stored, and each call that was in flight is charged its hold once (T51, I3, I9)."""
    told: dict[str, tuple[str, int]] = {}
    for life in range(5):
        for call_id, state, *used in output_until_killed(path, f"process-{life}", random.randrange(1, 300)):
            told[call_id] = (state, *map(int, used))
        audit(path)
        asyncio.run(started_and_closed(path))
        audit(path)
        before = [rows(path, "counters"), rows(path, "calls")]
        asyncio.run(started_and_closed(path))
        assert [rows(path, "counters"), rows(path, "calls")] == before
    stored = {row["id"]: row for row in rows(path, "calls")}
    for call_id, (state, *tokens) in told.items():
        row = stored[call_id]
        # The last operation on a call may have been committed and not printed.
        assert state in (row["state"], "open")
        if row["state"] == "expired":
            assert row["input_tokens"] == 100
            assert tokens[0] <= row["output_tokens"] <= tokens[0] + 100
        assert state != "settled" or [row["output_tokens"]] == tokens
    assert {"expired", "settled", "released"} == {row["state"] for row in stored.values()}
    assert {row["held_requests"] for row in rows(path, "counters")} == {0}


async def started_and_closed(path):
    async with running(path, "the next"):
        pass


# --------------------------------------------------------------------------------------------------- random histories


QUOTAS = {
    "everyone": quota("everyone/calls", requests=30, per="hour"),
    "daily": quota("a/daily", tokens=60),
    "6h": quota("a/6h", output_tokens=40, per="6h"),
    "pot": quota("b/pot", tokens=90, shared=True, per="10s"),
    "after": quota("b/after", input_tokens=20, enforce="after"),
    "watch": quota("watch/tiny", tokens=5, enforce="shadow"),
}
WHO = {
    user: binding(
        *([QUOTAS["daily"], QUOTAS["6h"]], [QUOTAS["pot"], QUOTAS["after"]])[start:],
        always=[QUOTAS["everyone"]],
        shadows=[QUOTAS["watch"]],
        user=user,
    )
    for start, user in enumerate(("ann", "bob"))
}
TOKENS = st.builds(Tokens, st.integers(0, 15), st.integers(0, 15), st.integers(0, 3), st.integers(0, 3))
USAGES = st.one_of(st.builds(Exactly, TOKENS), st.builds(AtLeast, TOKENS), st.builds(Unspent, st.integers(0, 1)))
IDS = st.integers(0, 15).map(str)
RESERVES = st.builds(
    lambda entry_id, user, demand, owner: replace(reserve(entry_id, WHO[user], demand), owner=owner),
    IDS,
    st.sampled_from(sorted(WHO)),
    st.builds(
        call, st.integers(0, 20), st.integers(0, 20), st.integers(0, 5), initial_hold=st.sampled_from([5, TOKENS_MAX])
    ),
    st.sampled_from(["process-1", "process-0"]),
)
ENDS = st.one_of(
    st.builds(Settle, IDS, USAGES, st.sampled_from(["complete", "client_left", "rejected"])),
    st.builds(Release, IDS, st.sampled_from(["upstream_failed", "stopped"])),
    st.builds(Expire, IDS),
)
EXTENDS = st.builds(
    lambda entry_id, user, output, least, held: extend(
        entry_id, WHO[user], output, least=min(output, least), input_tokens=held
    ),
    IDS,
    st.sampled_from(sorted(WHO)),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 20),
)
STEPS = (0, 0, 0, 1, 10_000, MINUTE, HOUR, 6 * HOUR, DAY, -1, -MINUTE, -DAY)
BATCHES = st.lists(
    st.tuples(st.sampled_from(STEPS), st.lists(RESERVES | EXTENDS | ENDS, max_size=8)),
    max_size=12,
)


@settings(max_examples=50)
@given(batches=BATCHES)
def test_the_ledger_replies_and_stores_what_the_book_does_in_memory(batches):
    """Any history through loop, thread and SQL gives the replies and rows that the pure rules give in memory."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "quotas.db"
        write_migrated(path)
        asyncio.run(_compare(path, batches))


async def _compare(path: Path, batches: list[tuple[int, list[Operation]]]) -> None:
    book, clock = Book({}, {}, NOON), Clock()
    async with running(path, clock=clock) as ledger:
        for step, operations in batches:
            clock.now += step
            book = Book(book.counters, book.entries, clock.now)
            operations = [
                replace(operation, binding=_binding_of(operation, book))
                if isinstance(operation, Extend)
                else operation
                for operation in operations
            ]
            in_order = sorted(
                operations, key=lambda operation: (isinstance(operation, Reserve), isinstance(operation, Extend))
            )
            expected = [book.apply(operation) for operation in in_order]
            assert await apply_together(ledger, *in_order) == expected
            expired = [book.apply(Expire(entry.id)) for entry in list(book.entries.values()) if _is_orphan(entry)]
            assert await ledger.expire_orphans() == len(expired)
        assert await ledger.counters(sorted(book.counters)) == book.counters
        assert {entry_id: await entry_in(ledger, entry_id) for entry_id in states(path)} == book.entries
        assert len(rows(path, "counters")) == len(book.counters)


def _binding_of(operation, book):
    """The binding with which a call was reserved, if it was."""
    entry = book.entries.get(operation.id)
    return WHO[entry.labels.user] if entry else operation.binding


def _is_orphan(entry):
    return entry.state == "open" and entry.owner == "process-0"


# ------------------------------------------------------------------------------------------------------------ reports


async def test_reports_are_read_beside_the_batches(ledger, path):
    """Whoever asks for a report gets a 503 while the database is away."""
    await ledger.reserve(reserve("1", ANN, CALL))
    async with ledger.read() as connection:
        assert await oldest_call(connection) == NOON
    with connected(path) as writer, moved(path, writer), pytest.raises(LedgerUnavailable):
        async with ledger.read():
            pass


# ------------------------------------------------------------------------------------------------------------ metrics


def read(metrics: Metrics) -> exposition.Metrics:
    return exposition.Metrics.of(metrics.exposition().decode())


async def test_batches_are_measured(ledger):
    """How many operations each had, and how long it took."""
    metrics = ledger.metrics
    for size in (4, 1):
        await apply_together(ledger, *(reserve(f"{size}-{number}", ROOMY, CALL) for number in range(size)))
    found = read(metrics)
    assert found.value("llm_quota_ledger_batch_operations_sum") == 5
    assert found.value("llm_quota_ledger_batch_operations_count") == 2
    assert found.value("llm_quota_ledger_commit_seconds_count") == 2
    assert found.value("llm_quota_ledger_commit_seconds_sum") > 0


async def test_failures_are_counted_by_what_failed(path):
    """Of the database, of one operation, of the lease, of the sweep, and of calls that have waited too long."""
    async with running(path, wait_s=0.01) as ledger:
        metrics = ledger.metrics
        with connected(path) as other:
            other.execute("BEGIN IMMEDIATE")
            await ledger.renew_lease()
            with pytest.raises(LedgerUnavailable):
                await ledger.reserve(reserve("1", ANN, CALL))
            other.execute("ROLLBACK")
            other.execute("ALTER TABLE calls RENAME TO aside")
            await ledger.sweep()
            other.execute("ALTER TABLE aside RENAME TO calls")
        await ledger.end(reserve("2", ANN, CALL))
        with pytest.raises(LedgerUnavailable):
            await ledger.end(next(iter(INVALID.values()))())
        counted = read(metrics).by("llm_quota_ledger_failures_total", "kind")
    assert counted.pop("batch") >= 1
    assert counted == {"operation": 1, "wait": 1, "lease": 1, "sweep": 1}


async def test_calls_of_dead_processes_are_counted(path, clock):
    """Those that this process has charged from their reservations."""
    async with running(path, clock=clock) as dead:
        await apply_together(dead, *(reserve(str(number), ROOMY, CALL) for number in range(3)))
    ledger = Ledger(SqliteStore(path), owner="process-2", now=clock)
    metrics = ledger.metrics
    await ledger.start()
    await ledger.close()
    assert read(metrics).value("llm_quota_reservations_expired_total") == 3
