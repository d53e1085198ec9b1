"""The ledger: who was answered is on the books, each call ends once, and neither faults nor crashes lose or double.

Real files, the real loop, the clock in the test's hand. The auditor reads the file beside the program.
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
from proxy.ledger.schema import NewerSchema
from proxy.ledger.sqlite import SqliteStore
from proxy.ledger.store import StoreInUse, StoreUnavailable
from proxy.policy.admission import NeedsCount, Verdict
from proxy.policy.amounts import TOKENS_MAX, Amount, AtLeast, Exactly, Tokens, Unspent
from tests.audit import audit, connected, contents, rows, states
from tests.breakage import BrokenBinding, commits, failing_writes, full, locked, moved, read_only, unchecked, writers
from tests.builders import DAY, HOUR, MINUTE, NOON, binding, call, estimated, exactly, extend, quota, reserve

DAILY = quota("staff/daily", tokens=1000)
ANN = binding([DAILY])
ROOMY = binding([quota("staff/daily", tokens=10**9)])
CALL = call(100, 400)
STREAM = call(100, 900, 100, initial_hold=100)
HELD = Amount(100, 400, 1)
NOTHING = Amount()


class Clock:
    """The time, which stands still until a test moves it."""

    def __init__(self, now: int = NOON) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "quotas.db"


@asynccontextmanager
async def running(
    where: Path | SqliteStore, owner: str = "process-1", *, clock: Clock | None = None, wait_s: float = 50
) -> AsyncIterator[Ledger]:
    """A ledger at work, which neither waits for locks nor long before it tries again."""
    store = SqliteStore(where, busy_timeout_s=0) if isinstance(where, Path) else where
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
    """What is used and held of a quota."""
    counter = (await ledger.counters([each.key_for(user)]))[each.key_for(user)]
    return counter.used, counter.held


async def as_it_is(ledger, freed=()):
    """The answer to an act on ann's first call, by what is read afterwards."""
    return Accepted(await ledger.entry("1"), await ledger.counters(ANN.keys()), freed=frozenset(freed))


async def at_once(ledger, *operations):
    """The answers to acts that are queued together, before any of them is begun."""
    queued = [ledger.end(operation) for operation in operations]
    return await asyncio.gather(*queued)


async def left_behind(path, *operations):
    """A file in which a process that is no more has done these acts."""
    store = SqliteStore(path)
    await store.open()
    await store.apply(operations, NOON)
    await store.close()


# ------------------------------------------------------------------------------------------------- the life of a call


async def test_a_call_is_reserved_and_settled(ledger, path):
    """What it did use is charged, the rest given back, and both were on the books when they were answered."""
    booked = await ledger.reserve(reserve("1", ANN, CALL))
    assert states(path) == {"1": "open"}
    assert booked == await as_it_is(ledger)
    assert await levels(ledger) == (NOTHING, HELD)
    settled = await ledger.end(Settle("1", exactly(90, 60), "complete"))
    assert states(path) == {"1": "settled"}
    assert settled == await as_it_is(ledger, freed=ANN.keys())
    assert await levels(ledger) == (Amount(90, 60, 1), NOTHING)


async def test_a_call_is_reserved_and_released(ledger, path):
    """Nothing was generated: as if it had not been, but for its record."""
    await ledger.reserve(reserve("1", ANN, CALL))
    released = await ledger.end(Release("1"))
    assert released == await as_it_is(ledger, freed=ANN.keys())
    assert await levels(ledger) == (NOTHING, NOTHING)
    assert states(path) == {"1": "released"}


async def test_a_refused_call_leaves_no_trace(ledger, path):
    """Whoever is refused learns how things stand."""
    refused = await ledger.reserve(reserve("1", ANN, call(1001)))
    assert isinstance(refused, Refused)
    assert refused.decision.verdict is Verdict.NEVER
    assert (rows(path, "calls"), rows(path, "counters")) == ([], [])


async def test_a_response_is_known_by_the_call_that_made_it(ledger):
    """From the moment its call has ended."""
    booked = await ledger.reserve(reserve("1", ANN, CALL))
    assert await ledger.response_entry("resp_1") is None
    await ledger.end(Settle("1", exactly(90, 60), "complete", response_id="resp_1"))
    found = await ledger.response_entry("resp_1")
    assert (found.id, found.labels, found.usage) == ("1", booked.entry.labels, exactly(90, 60))


async def test_the_clock_decides_windows(ledger, clock):
    """A call of the next day finds a fresh window; one of yesterday that ends today does not touch it."""
    await ledger.reserve(reserve("1", ANN, CALL))
    clock.now += DAY
    await ledger.reserve(reserve("2", ANN, CALL))
    await ledger.end(Settle("1", exactly(90, 60), "complete"))
    assert await levels(ledger) == (NOTHING, HELD)
    assert (await ledger.entry("1")).usage == exactly(90, 60)


async def test_a_stream_holds_more_as_it_grows(ledger, path):
    """What it holds was on the books when that was answered; asking again for as much changes nothing."""
    await ledger.reserve(reserve("1", ANN, STREAM))
    grown = await ledger.extend(extend("1", ANN, 400))
    assert grown == await as_it_is(ledger)
    assert await levels(ledger) == (NOTHING, HELD)
    assert await ledger.extend(extend("1", ANN, 400)) == grown
    stopped = await ledger.extend(extend("1", ANN, 1000, least=901))
    assert (stopped.verdict, stopped.entry.hold) == (Verdict.EXHAUSTED, Amount(100, 900, 1))
    await ledger.end(Settle("1", exactly(90, 60), "complete"))
    assert await levels(ledger) == (Amount(90, 60, 1), NOTHING)
    audit(path)


async def test_a_call_that_is_not_on_the_books_can_not_grow(ledger):
    """Nothing of it is held, so nothing of it may pass on."""
    with pytest.raises(LedgerUnavailable):
        await ledger.extend(extend("1", ANN, 400))


async def test_a_call_that_was_taken_for_lost_learns_it_when_it_grows(ledger):
    """A process that was paused past its lease: its call has been charged, and holds nothing more."""
    await ledger.reserve(replace(reserve("1", ANN, STREAM), owner="process-0"))
    await ledger.expire_orphans()
    answer = await ledger.extend(extend("1", ANN, 400))
    assert (answer.entry.state, answer.entry.hold) == ("expired", Amount(100, 100, 1))


async def test_a_call_that_has_to_be_counted_first_is_told_so(ledger, path):
    """And leaves no trace until it comes again."""
    assert await ledger.reserve(reserve("1", ANN, estimated(CALL))) == NeedsCount()
    assert (rows(path, "calls"), rows(path, "counters")) == ([], [])
    assert isinstance(await ledger.reserve(reserve("1", ANN, CALL)), Accepted)


async def test_who_waits_is_told_of_what_was_given_back(ledger):
    """After the batch, and only of those counters: holding frees nothing, nor does an end of nothing."""
    told = []
    ledger.on_freed(told.append)
    await ledger.reserve(reserve("1", ANN, STREAM))
    await ledger.extend(extend("1", ANN, 500))
    await ledger.end(Settle("unknown", exactly(1), "complete"))
    assert told == []
    await ledger.extend(extend("1", ANN, 500, input_tokens=90))
    assert told == [set(ANN.keys())]
    await ledger.end(Settle("1", exactly(90, 60), "complete"))
    await ledger.end(Settle("1", exactly(90, 60), "complete"))
    assert told == [set(ANN.keys())] * 2


async def test_an_act_that_is_repeated_changes_nothing(ledger, path):
    """Whoever does not know whether it was done asks again."""
    first = await ledger.reserve(reserve("1", ANN, CALL))
    assert await ledger.reserve(reserve("1", ANN, CALL)) == first
    await ledger.end(Settle("1", exactly(90, 60), "complete"))
    settled = await as_it_is(ledger)
    assert await at_once(ledger, Settle("1", exactly(9, 9), "complete"), Release("1")) == [settled, settled]
    audit(path)


# ---------------------------------------------------------------------------------------------- all at once, T60, T61


@pytest.mark.parametrize("room_for", [0, 1, 7, 99])
@pytest.mark.parametrize("who_comes", ["never seen", "with a window of yesterday", "who called today"])
async def test_of_100_calls_at_once_exactly_as_many_are_let_in_as_fit(ledger, clock, path, room_for, who_comes):
    """No call too many, and none too few, also where there was no row to lock."""
    used = 0 if who_comes == "never seen" else 500
    if used:
        clock.now -= DAY if who_comes == "with a window of yesterday" else 0
        await ledger.reserve(reserve("before", ROOMY, call(used)))
        await ledger.end(Settle("before", exactly(used), "complete"))
        clock.now = NOON
    counted = used if who_comes == "who called today" else 0
    who = binding([quota("staff/daily", tokens=room_for * 500 + 499 + counted)])
    answers = await asyncio.gather(*(ledger.reserve(reserve(str(number), who, CALL)) for number in range(100)))
    refused = [answer for answer in answers if isinstance(answer, Refused)]
    assert len(answers) - len(refused) == room_for
    verdict = Verdict.BUSY if room_for else answers[0].decision.verdict
    assert {answer.decision.verdict for answer in refused} == {verdict}
    audit(path)


async def test_those_who_share_a_pot_share_its_room(ledger, path):
    """A hundred users, each for the first time: three fit."""
    pot = quota("team-x/pot", tokens=1500, shared=True)
    whos = [binding([pot], user=f"user {number}") for number in range(100)]
    answers = await asyncio.gather(
        *(ledger.reserve(reserve(str(number), who, CALL)) for number, who in enumerate(whos))
    )
    assert sum(isinstance(answer, Accepted) for answer in answers) == 3
    assert await levels(ledger, pot) == (NOTHING, Amount(300, 1200, 3))


async def test_what_is_given_back_lets_the_next_in(ledger, path):
    """64 clients that come again whenever they were let in: never over, and nothing is left unused for nothing."""
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
async def test_what_is_queued_together_shares_a_commit(ledger, path, operations, transactions):
    """Up to a bound, so that nobody waits long for the rest of a large batch."""
    with commits() as seen:
        answers = await asyncio.gather(
            *(ledger.reserve(reserve(str(number), ROOMY, call(1))) for number in range(operations))
        )
    assert [answer.entry.id for answer in answers] == [str(number) for number in range(operations)]
    assert len(seen) == transactions
    audit(path)


async def until(condition):
    """Wait for what the loop does by itself."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the loop tells nobody
            await asyncio.sleep(0)


class Instant(SqliteStore):
    """A store that answers every batch at once, as if no call were known; it writes nothing."""

    async def apply(self, operations, now):
        await asyncio.sleep(0)
        return [Unknown(operation.id) for operation in operations]


class Gated(SqliteStore):
    """A store on a slow disk: a batch is done when the test opens the gate."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, busy_timeout_s=0)
        self.began = asyncio.Semaphore(0)
        self.gate = asyncio.Semaphore(0)
        self.batches: list[list[Operation]] = []

    async def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        self.batches.append(list(operations))
        self.began.release()
        await self.gate.acquire()
        return await super().apply(operations, now)

    async def begun(self) -> None:
        """A batch has been taken."""
        await self.began.acquire()

    def open_for_good(self) -> None:
        for _ in range(1000):
            self.gate.release()


async def test_what_arrives_during_a_commit_is_the_next_batch(path):
    """The busier, the larger the batches: the cost of a commit is shared by itself."""
    store = Gated(path)
    async with running(store) as ledger:
        first = asyncio.ensure_future(ledger.reserve(reserve("0", ROOMY, call(1))))
        await store.begun()
        others = [
            asyncio.ensure_future(ledger.reserve(reserve(str(number), ROOMY, call(1)))) for number in range(1, 10)
        ]
        await asyncio.sleep(0)
        store.open_for_good()
        await asyncio.gather(first, *others)
        assert [len(batch) for batch in store.batches] == [1, 9]


async def test_within_a_batch_what_gives_back_goes_first(ledger):
    """Nobody is refused for room that is being freed in the same moment, whoever was queued first."""
    await ledger.reserve(reserve("1", ANN, CALL))
    await ledger.reserve(reserve("2", ANN, CALL))
    third = asyncio.ensure_future(ledger.reserve(reserve("3", ANN, CALL)))
    fourth = asyncio.ensure_future(ledger.reserve(reserve("4", ANN, CALL)))
    await asyncio.sleep(0)
    await at_once(ledger, Settle("1", exactly(0, 0), "complete"), Release("2"))
    assert isinstance(await third, Accepted)
    assert isinstance(await fourth, Accepted)


async def test_within_a_batch_calls_in_flight_come_before_those_who_want_in(ledger):
    """Of 800 that are being given back a stream takes what it needs first: an answer that has begun is worth more."""
    await ledger.reserve(reserve("1", ANN, STREAM))
    await ledger.reserve(reserve("2", ANN, call(0, 800)))
    newcomer = asyncio.ensure_future(ledger.reserve(reserve("3", ANN, call(0, 201))))
    growing = asyncio.ensure_future(ledger.extend(extend("1", ANN, 700, least=700)))
    await asyncio.sleep(0)
    await ledger.end(Release("2"))
    assert (await growing).entry.hold.output == 700
    assert isinstance(await newcomer, Refused)


async def test_within_a_batch_first_come_is_first_served(ledger):
    """Among those that want to be let in."""
    answers = await asyncio.gather(*(ledger.reserve(reserve(str(number), ANN, call(300))) for number in range(5)))
    assert [isinstance(answer, Accepted) for answer in answers] == [True, True, True, False, False]


# ------------------------------------------------------------------------------------------------ callers who give up


async def test_who_gave_up_before_the_batch_began_has_nothing_booked(path):
    """A client that hung up while it waited."""
    store = Gated(path)
    async with running(store) as ledger:
        first = asyncio.ensure_future(ledger.reserve(reserve("1", ANN, CALL)))
        await store.begun()
        second = asyncio.ensure_future(ledger.reserve(reserve("2", ANN, CALL)))
        await asyncio.sleep(0)
        second.cancel()
        store.open_for_good()
        await first
        with pytest.raises(asyncio.CancelledError):
            await second
    assert states(path) == {"1": "open"}
    assert [len(batch) for batch in store.batches] == [1]


@pytest.mark.parametrize("demand", [CALL, call(1001)], ids=["let in", "refused"])
async def test_who_gives_up_while_the_batch_is_done_holds_nothing(path, demand):
    """It was too late to stop it, so what was reserved is released."""
    store = Gated(path)
    async with running(store) as ledger:
        given_up = asyncio.ensure_future(ledger.reserve(reserve("1", ANN, demand)))
        await store.begun()
        given_up.cancel()
        store.open_for_good()
        with pytest.raises(asyncio.CancelledError):
            await given_up
    assert states(path) == ({"1": "released"} if demand is CALL else {})
    audit(path)


async def test_who_gives_up_in_the_moment_of_the_answer_holds_nothing(ledger, path):
    """Answered, and cancelled before it could take the answer: the narrowest gap there is."""
    await ledger.reserve(reserve("1", ANN, CALL))
    given_up = asyncio.ensure_future(ledger.reserve(reserve("2", ANN, CALL)))
    await asyncio.sleep(0)
    # Of one batch the end is answered first, so this runs after the reserve was answered, and before its caller does.
    ledger.end(Release("1")).add_done_callback(lambda _: given_up.cancel())
    with pytest.raises(asyncio.CancelledError):
        await given_up
    await ledger.close()
    assert states(path) == {"1": "released", "2": "released"}


async def test_a_growth_whose_caller_gave_up_before_the_batch_began_is_not_booked(path):
    """Nobody is left to pass on what it would hold."""
    store = Gated(path)
    async with running(store) as ledger:
        store.gate.release()
        await ledger.reserve(reserve("1", ANN, STREAM))
        await store.begun()
        first = asyncio.ensure_future(ledger.reserve(reserve("2", ANN, call(1))))
        await store.begun()
        given_up = asyncio.ensure_future(ledger.extend(extend("1", ANN, 400)))
        await asyncio.sleep(0)
        given_up.cancel()
        store.open_for_good()
        await first
        await at_once(ledger, Release("nobody"))
        assert not any(isinstance(operation, Extend) for batch in store.batches for operation in batch)
        assert (await ledger.entry("1")).hold == Amount(100, 100, 1)


async def test_a_growth_whose_caller_gave_up_too_late_is_held_until_the_call_ends(path):
    """It does not end the call: that is for whoever let it in."""
    store = Gated(path)
    async with running(store) as ledger:
        store.gate.release()
        await ledger.reserve(reserve("1", ANN, STREAM))
        await store.begun()
        given_up = asyncio.ensure_future(ledger.extend(extend("1", ANN, 400)))
        await store.begun()
        given_up.cancel()
        store.open_for_good()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        await at_once(ledger, Release("nobody"))
        assert await levels(ledger) == (NOTHING, HELD)
        assert states(path) == {"1": "open"}
        await ledger.end(Release("1"))
        assert await levels(ledger) == (NOTHING, NOTHING)


async def test_an_end_is_booked_also_where_nobody_waits_for_it(ledger, path):
    """A task that was cut off while it settled has settled."""
    await ledger.reserve(reserve("1", ANN, CALL))
    ledger.end(Settle("1", exactly(90, 60), "complete")).cancel()
    await ledger.close()
    assert states(path) == {"1": "settled"}
    audit(path)


# ----------------------------------------------------------------------------------------------------------- bad acts


BAD = {
    "a rule raises": lambda: unchecked(reserve("bad", ROOMY, call(1)), binding=BrokenBinding()),
    "a rule raises at growth": lambda: extend("0", binding([quota("lab/daily", tokens=9)]), 500),
    "the database refuses": lambda: unchecked(reserve("bad", ROOMY, call(1)), owner=None),
    "the driver refuses": lambda: unchecked(Settle("0", exactly(1), "complete"), usage=Exactly(Tokens(2**70, 0))),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("place", [0, 3, 6])
async def test_one_bad_act_never_fails_its_neighbours(ledger, path, kind, place):
    """Theirs are booked as if it were not there; its own caller hears that it was not, and the log says why."""
    await at_once(ledger, *(reserve(str(number), ROOMY, CALL) for number in range(4)))
    operations = [reserve(str(number), ROOMY, CALL) for number in range(4, 7)]
    operations += [Settle("1", exactly(90, 60), "complete"), Release("2"), Expire("3")]
    operations.insert(place, BAD[kind]())
    with capture_logs() as logs:
        answers = await asyncio.gather(*(ledger.end(operation) for operation in operations), return_exceptions=True)
    assert isinstance(answers.pop(place), LedgerUnavailable)
    assert {type(answer) for answer in answers} == {Accepted}
    assert [(line["event"], line["log_level"]) for line in logs] == [("an act could not be booked", "error")]
    assert "".join(state[0] for state in states(path).values()) == "osreooo"
    assert ledger.is_healthy
    audit(path)


async def test_a_bad_act_whose_caller_gave_up_is_only_logged(ledger, path):
    """There is nobody left to be told."""
    with capture_logs() as logs:
        ledger.end(BAD["the driver refuses"]()).cancel()
        await at_once(ledger, reserve("0", ROOMY, CALL))
        ledger.end(BAD["the driver refuses"]()).cancel()
        await at_once(ledger, reserve("1", ROOMY, CALL))
    assert [line["event"] for line in logs] == ["an act could not be booked"]
    assert states(path) == {"0": "open", "1": "open"}


# ----------------------------------------------------------------------------------------- while the database is away


FAULTS = [locked, read_only, full, failing_writes, moved]


def big(number):
    """A call whose row takes most of a page, so that a full disk is noticed by any act."""
    operation = reserve(f"{number:04}", ROOMY, CALL)
    return replace(
        operation, labels=replace(operation.labels, model="m" * 512, endpoint="e" * 512, upstream="u" * 512)
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_while_the_database_is_away_nobody_is_let_in_and_nothing_is_lost(path, fault):
    """Who wants more waits as it likes, who wants in is refused; ends are booked once it is back, each once."""
    calls = 2 * BATCH_MAX + 10
    with writers() as made, capture_logs() as logs:
        async with running(path, wait_s=0.01) as ledger:
            await at_once(ledger, *(big(number) for number in range(calls)))
            with fault(path, made[0]):
                ends = [
                    ledger.end(Settle(f"{number:04}", exactly(90, number), "complete")) for number in range(calls)
                ]
                late = [ledger.reserve(big(calls + number)) for number in range(20)]
                growing = [ledger.extend(extend(f"{number:04}", ROOMY, 500)) for number in range(20)]
                late += [asyncio.wait_for(growth, 0.05) for growth in growing]
                answers = await asyncio.gather(*late, return_exceptions=True)
                assert {type(answer) for answer in answers} == {LedgerUnavailable, TimeoutError}
                assert not ledger.is_healthy
                await until(lambda: bool(logs))  # on a busy machine the waiting ends before the database has said no
                assert not any(end.done() for end in ends)
            await asyncio.gather(*ends)
            assert ledger.is_healthy
            assert await levels(ledger) == (Amount(90 * calls, sum(range(calls)), calls), NOTHING)
            await at_once(ledger, big(calls))
    assert len(states(path)) == calls + 1  # none of those that were refused
    assert "the ledger's database can't be used" in {line["event"] for line in logs}
    audit(path)


async def test_who_wants_in_while_the_database_is_away_waits_for_it(ledger, path):
    """A failover is noticed as a pause: nobody is refused for it."""
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


async def test_who_was_refused_after_its_wait_holds_nothing(path):
    """Its batch was just slow: what it reserved in the end is released, and by nobody's fault but ours."""
    store = Gated(path)
    async with running(store, wait_s=0.01) as ledger:
        with pytest.raises(LedgerUnavailable):
            await ledger.reserve(reserve("1", ANN, CALL))
        store.open_for_good()
    [row] = rows(path, "calls")
    assert (row["state"], row["outcome"]) == ("released", "proxy_broke")
    audit(path)


async def test_a_call_that_gives_up_under_overload_leaves_the_process_ready(path, monkeypatch):
    """5,000 batches are ahead of it, and each is committed: the ledger is overloaded, not unavailable."""
    monkeypatch.setattr("proxy.ledger.ledger.BATCH_MAX", 1)
    async with running(Instant(path), wait_s=0.01) as ledger:
        ends = [ledger.end(Release(f"{number:04}")) for number in range(5000)]
        with pytest.raises(LedgerUnavailable):
            await ledger.reserve(reserve("1", ANN, CALL))
        assert not ends[-1].done()
        assert ledger.is_healthy
        await asyncio.gather(*ends)
    assert states(path) == {}


async def test_a_call_that_gives_up_while_a_batch_hangs_makes_the_process_not_ready(path):
    """Nothing was committed for all of its wait, although the database has reported no error."""
    store = Gated(path)
    async with running(store, wait_s=0.01) as ledger:
        with pytest.raises(LedgerUnavailable):
            await ledger.reserve(reserve("1", ANN, CALL))
        assert not ledger.is_healthy
        store.open_for_good()


async def test_a_process_that_was_paused_says_that_it_is_alive_before_it_books(ledger, clock, path):
    """What it lets in must not look to others like that of a dead process."""
    clock.now += 3 * LEASE_MS
    await ledger.reserve(reserve("1", ANN, CALL))
    assert rows(path, "owners") == [{"id": "process-1", "alive_until": NOON + 4 * LEASE_MS}]


async def test_it_is_known_how_often_the_lease_ran_out(ledger, clock):
    """From the moment in which it does, whether or not it was renewed since; a renewal in time is none."""
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


async def test_sweeping_charges_what_others_left_and_fails_quietly(ledger, path):
    """It is done again and again, so one that fails is only logged."""
    await ledger.reserve(replace(reserve("1", ANN, CALL), owner="process-0"))
    await ledger.sweep()
    assert states(path) == {"1": "expired"}
    with capture_logs() as logs, connected(path) as connection:
        connection.execute("ALTER TABLE calls RENAME TO aside")
        await ledger.sweep()
        connection.execute("ALTER TABLE aside RENAME TO calls")
    assert [line["event"] for line in logs] == ["calls of dead processes could not be looked for"]


async def test_the_lease_tells_that_the_database_is_back(ledger, path):
    """Whoever is told that we can't serve sends no call, so no call would find it out."""
    with connected(path) as other, capture_logs() as logs:
        other.execute("BEGIN IMMEDIATE")
        await ledger.renew_lease()
        assert not ledger.is_healthy
        other.execute("ROLLBACK")
    assert [line["event"] for line in logs] == ["the lease could not be renewed"]
    await ledger.renew_lease()
    assert ledger.is_healthy


async def test_the_lease_is_renewed_from_now(ledger, clock, path):
    """Starting says it for the first time."""
    assert rows(path, "owners") == [{"id": "process-1", "alive_until": NOON + LEASE_MS}]
    clock.now += 1000
    await ledger.renew_lease()
    assert rows(path, "owners") == [{"id": "process-1", "alive_until": NOON + 1000 + LEASE_MS}]


async def test_what_cannot_be_read_is_unavailable(ledger, path):
    """In the words of a call that is answered with it."""
    with connected(path) as other:
        other.execute("DROP TABLE counters")
        other.execute("DROP TABLE calls")
    with pytest.raises(LedgerUnavailable):
        await ledger.counters(ANN.keys())
    with pytest.raises(LedgerUnavailable):
        await ledger.entry("1")
    with pytest.raises(LedgerUnavailable):
        await ledger.response_entry("resp_1")


class Uncertain(SqliteStore):
    """A store whose commits are done, and the answer that they are gets lost while `is_cut_off`."""

    is_cut_off = False

    async def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        answers = await super().apply(operations, now)
        if self.is_cut_off:
            self.is_cut_off = False
            raise StoreUnavailable("the connection broke", is_uncertain=True)
        return answers


async def test_a_reserve_whose_commit_is_uncertain_is_asked_for_again(path):
    """It finds that it was done, and is held once."""
    store = Uncertain(path)
    async with running(store) as ledger:
        store.is_cut_off = True
        assert isinstance(await ledger.reserve(reserve("1", ANN, CALL)), Accepted)
        assert await levels(ledger) == (NOTHING, HELD)
    audit(path)


@pytest.mark.parametrize("gives_up", [True, False], ids=["who gave up", "who was refused"])
async def test_a_reserve_whose_commit_is_uncertain_is_taken_back(path, gives_up):
    """Nobody has an answer for it, so nothing may stay held for it."""
    store = Uncertain(path)
    async with running(store, wait_s=50 if gives_up else 0.01) as ledger:
        store.is_cut_off = True
        asked = asyncio.ensure_future(ledger.reserve(reserve("1", ANN, CALL)))
        with connected(path) as other, capture_logs() as logs:
            await until(lambda: len(logs) > 0)
            other.execute("BEGIN IMMEDIATE")  # so that it is not done again at once
            if gives_up:
                asked.cancel()
            with pytest.raises(asyncio.CancelledError if gives_up else LedgerUnavailable):
                await asked
            other.execute("ROLLBACK")
    assert states(path) == {"1": "released"}
    assert rows(path, "calls")[0]["outcome"] == ("client_left" if gives_up else "proxy_broke")
    audit(path)


async def test_a_growth_whose_commit_is_uncertain_is_held_once(path):
    """It is done again, and finds that it was done; so does whoever asks for it once more."""
    store = Uncertain(path)
    async with running(store) as ledger:
        await ledger.reserve(reserve("1", ANN, STREAM))
        store.is_cut_off = True
        for _ in range(2):
            assert (await ledger.extend(extend("1", ANN, 400))).entry.hold == HELD
        assert await levels(ledger) == (NOTHING, HELD)
    assert states(path) == {"1": "open"}
    audit(path)


async def test_an_end_whose_commit_is_uncertain_is_booked_once(path):
    """It is done again, and finds that it was done."""
    store = Uncertain(path)
    async with running(store) as ledger:
        await at_once(ledger, *(reserve(str(number), ROOMY, CALL) for number in range(3)))
        store.is_cut_off = True
        await at_once(ledger, Settle("0", exactly(90, 60), "complete"), Release("1"))
        assert await levels(ledger) == (Amount(90, 60, 1), HELD)
    audit(path)


# ----------------------------------------------------------------------------------------------- starting and closing


async def test_closing_books_what_is_queued(path):
    """More than one batch of it, and nobody waits any more."""
    async with running(path) as ledger:
        for number in range(BATCH_MAX):
            ledger.end(reserve(str(number), ROOMY, CALL))
        for number in range(BATCH_MAX):
            ledger.end(Release(str(number)))
    assert set(states(path).values()) == {"released"}
    assert len(states(path)) == BATCH_MAX


async def test_closing_while_the_database_is_away_ends(path):
    """What could not be booked is said, and charged by the next start from the reservation: once."""
    async with running(path) as ledger:
        await at_once(ledger, *(reserve(str(number), ROOMY, CALL) for number in range(3)))
        with connected(path) as other, capture_logs() as logs:
            other.execute("BEGIN IMMEDIATE")
            ends = [ledger.end(Settle(str(number), exactly(1), "complete")) for number in range(3)]
            given_up = asyncio.ensure_future(ledger.reserve(reserve("9", ROOMY, CALL)))
            await asyncio.sleep(0)
            await asyncio.wait_for(ledger.close(), 10)
            other.execute("ROLLBACK")
    assert [(line["event"], line["acts"]) for line in logs][-1] == ("closing with ends that could not be booked", 3)
    for unanswered in (given_up, *ends):
        with pytest.raises(LedgerUnavailable):
            await unanswered
    async with running(path, "process-2") as ledger:
        assert await levels(ledger) == (Amount(300, 1200, 3), NOTHING)
    audit(path)


async def test_who_comes_before_the_start_or_after_the_end_is_told(path):
    """Nobody waits for an answer that will never come."""
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


async def test_a_file_in_use_is_not_served_from(ledger, path):
    """The second process says so and goes; the first notices nothing."""
    second = Ledger(SqliteStore(path), owner="process-2", now=Clock())
    with pytest.raises(StoreInUse):
        await second.start()
    await second.close()
    assert isinstance(await ledger.reserve(reserve("1", ANN, CALL)), Accepted)


async def test_a_newer_schema_is_not_served_from(path):
    """Nothing of it is touched, not even by saying that we are alive."""
    await left_behind(path)
    with connected(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    before = contents(path)
    ledger = Ledger(SqliteStore(path), owner="process-1", now=Clock())
    with pytest.raises(NewerSchema):
        await ledger.start()
    await ledger.close()
    assert contents(path) == before


# ------------------------------------------------------------------------------------------------------ after a crash


async def test_what_a_dead_process_left_open_is_charged_once(path):
    """From its reservation; what had ended stays as it was. Any number of starts later it is still once (I9)."""
    operations = [reserve(str(number), ROOMY, CALL) for number in range(5)]
    await left_behind(path, *operations, Settle("0", exactly(1, 1), "complete"), Release("1"), Expire("2"))
    with capture_logs() as logs:
        async with running(path, "process-2") as ledger:
            assert await levels(ledger) == (Amount(301, 1201, 4), NOTHING)
            assert (await ledger.entry("3")).usage == AtLeast(Tokens(100, 400))
            assert (await ledger.entry("3")).outcome == "lost"
    assert [line["calls"] for line in logs] == [2]
    assert list(states(path).values()) == ["settled", "released", "expired", "expired", "expired"]
    audit(path)
    before = [rows(path, "counters"), rows(path, "calls")]
    for number in range(3, 6):
        async with running(path, f"process-{number}", clock=Clock(NOON + DAY)):
            pass
    assert [rows(path, "counters"), rows(path, "calls")] == before


async def test_what_a_dead_process_left_growing_is_charged_as_far_as_it_had_grown(path):
    """Nothing passed on that was not held: that is the most that its client can have seen."""
    await left_behind(path, reserve("1", ANN, STREAM), extend("1", ANN, 700, input_tokens=80))
    async with running(path, "process-2") as ledger:
        assert (await ledger.entry("1")).usage == AtLeast(Tokens(80, 700))
        assert await levels(ledger) == (Amount(80, 700, 1), NOTHING)
    audit(path)


async def test_any_number_of_calls_may_have_been_left_open(path):
    """More than are looked up at once."""
    operations = [reserve(f"{number:04}", ROOMY, call(1)) for number in range(1500)]
    await left_behind(path, *operations)
    async with running(path, "process-2") as ledger:
        assert await levels(ledger) == (Amount(1500, 0, 1500), NOTHING)
    assert set(states(path).values()) == {"expired"}


async def test_calls_of_this_process_are_no_orphans(ledger, path):
    """They are in flight."""
    await ledger.reserve(reserve("1", ANN, CALL))
    await ledger.reserve(replace(reserve("2", ANN, CALL), owner="process-0"))
    assert await ledger.expire_orphans() == 1
    assert await ledger.expire_orphans() == 0
    assert states(path) == {"1": "open", "2": "expired"}


async def test_of_a_worker_that_has_ended_nobody_waits_for_the_lease(ledger, path):
    """Who is told that it has ended charges its calls at once, and those of no other worker."""
    for number in range(2):
        await ledger.reserve(replace(reserve(str(number), ANN, call(1)), owner=f"process-{number}"))
        await ledger._store.renew(f"process-{number}", NOON, lease_ms=LEASE_MS)
    worker = Ledger(SqliteStore(path, lock=ledger._store.hand_over()), owner="process-2", now=lambda: NOON)
    await worker.start(["process-1"])
    assert states(path) == {"0": "open", "1": "expired"}
    await worker.close()


async def test_a_process_that_was_taken_for_dead_books_the_difference(ledger):
    """It was only slow: its settle still counts, in place of what it was charged."""
    await ledger.reserve(replace(reserve("1", ANN, CALL), owner="process-0"))
    await ledger.expire_orphans()
    await ledger.end(Settle("1", exactly(90, 60), "complete"))
    assert await levels(ledger) == (Amount(90, 60, 1), NOTHING)


async def work_until_killed(path: Path, owner: str) -> None:
    """A small load that says on its output what it was told was on the books; to be run in a process of its own."""
    chance, pot = random.Random(owner), quota("staff/pot", tokens=10**9, shared=True)
    ledger = Ledger(SqliteStore(path), owner=owner, now=Clock())
    await ledger.start()

    def say(*words: object) -> None:
        os.write(1, f"{' '.join(map(str, words))}\n".encode())

    async def client(name: int) -> None:
        who = binding([quota("staff/daily", tokens=10**9), pot], user=f"user {name % 3}")
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


def said_until_killed(path, owner, lines):
    """What a process at work said before it was killed: after so many lines, wherever it then stood."""
    command = [sys.executable, "-c", WORK, path, owner]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        said = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()
    return [line.split() for line in said if line.endswith("\n")]


def test_kill_9_loses_nothing_and_doubles_nothing(path):
    """What a client may have seen is on the books, a call in flight is charged from its reservation (T51, I3, I9)."""
    told: dict[str, tuple[str, int]] = {}
    for life in range(5):
        for call_id, state, *used in said_until_killed(path, f"process-{life}", random.randrange(1, 300)):
            told[call_id] = (state, *map(int, used))
        audit(path)
        asyncio.run(started_and_closed(path))
        audit(path)
        before = [rows(path, "counters"), rows(path, "calls")]
        asyncio.run(started_and_closed(path))
        assert [rows(path, "counters"), rows(path, "calls")] == before
    booked = {row["id"]: row for row in rows(path, "calls")}
    for call_id, (state, *tokens) in told.items():
        row = booked[call_id]
        # The last act of a call may have been committed without having been told.
        assert row["state"] == state or state == "open" != row["state"]
        if row["state"] == "expired":
            assert row["input_tokens"] == 100
            assert tokens[0] <= row["output_tokens"] <= tokens[0] + 100
        assert state != "settled" or [row["output_tokens"]] == tokens
    assert {"expired", "settled", "released"} == {row["state"] for row in booked.values()}
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
def test_the_file_says_what_the_rules_say(batches):
    """Any history through loop, thread and SQL gives the answers and rows that the pure rules give in memory."""
    with TemporaryDirectory() as folder:
        asyncio.run(_compare(Path(folder) / "quotas.db", batches))


async def _compare(path: Path, batches: list[tuple[int, list[Operation]]]) -> None:
    books, clock = Book({}, {}, NOON), Clock()
    async with running(path, clock=clock) as ledger:
        for step, operations in batches:
            clock.now += step
            books = Book(books.counters, books.entries, clock.now)
            operations = [
                replace(operation, binding=_own(operation, books)) if isinstance(operation, Extend) else operation
                for operation in operations
            ]
            in_order = sorted(
                operations, key=lambda operation: (isinstance(operation, Reserve), isinstance(operation, Extend))
            )
            expected = [books.apply(operation) for operation in in_order]
            assert await at_once(ledger, *in_order) == expected
            expired = [books.apply(Expire(entry.id)) for entry in list(books.entries.values()) if _is_orphan(entry)]
            assert await ledger.expire_orphans() == len(expired)
        assert await ledger.counters(sorted(books.counters)) == books.counters
        assert {entry_id: await ledger.entry(entry_id) for entry_id in states(path)} == books.entries
        assert len(rows(path, "counters")) == len(books.counters)


def _own(operation, books):
    """The quotas with which a call was reserved, if it was."""
    entry = books.entries.get(operation.id)
    return WHO[entry.labels.user] if entry else operation.binding


def _is_orphan(entry):
    return entry.state == "open" and entry.owner == "process-0"
