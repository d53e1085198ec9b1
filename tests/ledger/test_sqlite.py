"""The SQLite store: batches are written as a whole or not at all, read back equal, and workers take turns.

The tests use real files and real faults: a lock of another program, a full disk, a failing write, a file that was
moved.
"""

import asyncio
import errno
import fcntl
import os
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from proxy.ledger.book import Accepted, Expire, Refused, Release, Settle, Unknown
from proxy.ledger.entry import CallLabels
from proxy.ledger.schema import HEAD, NewerSchema
from proxy.ledger.sqlite import SqliteStore
from proxy.ledger.store import JobResult, StoreInUse, StoreRefused, StoreUnavailable
from proxy.policy.admission import NeedsCount, Verdict
from proxy.policy.amounts import Amount, AtLeast, Exactly, Tokens, Unspent
from tests.audit import audit, connected, contents, rows, states
from tests.breakage import (
    BrokenBinding,
    emptied,
    failing_writes,
    full,
    locked,
    moved,
    read_only,
    replaced,
    statements,
    unchecked,
    without_folder,
    without_index,
    without_lock,
    without_log,
    writers,
)
from tests.builders import (
    DAY,
    HOUR,
    NOON,
    amount,
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
CALL = call(100, 400)
HELD = Amount(100, 400, 1)
SETTLED = Settle("1", exactly(90, 60), "complete")


@pytest.fixture
async def store(path):
    """An open store that does not wait for locks."""
    store = SqliteStore(path, busy_timeout_s=0)
    await store.open()
    yield store
    await store.close()


async def levels(store, each=DAILY, user="ann"):
    """What is used and what is held of a quota."""
    found = await store.read_counters([each.key_for(user)])
    counter = found[each.key_for(user)]
    return counter.used, counter.held


# -------------------------------------------------------------------------------------------- what is written is read


WATCHED = binding(
    [DAILY, quota("staff/6h", output_tokens=500, per="6h")],
    [quota("team-x/pot", tokens=450, shared=True)],
    always=[quota("everyone/calls", requests=2, enforce="after")],
    shadows=[quota("watch/tiny", tokens=1, enforce="shadow")],
)


@pytest.mark.parametrize(
    "ends",
    [
        pytest.param([], id="open"),
        pytest.param([Settle("1", Exactly(Tokens(90, 60, 30, 20)), "complete")], id="exactly"),
        pytest.param([Settle("1", AtLeast(Tokens(90, 6, 1, 2)), "client_left")], id="at least"),
        pytest.param([Settle("1", exactly(0, 0), "complete", response_id="resp_1")], id="an explicit zero"),
        pytest.param([Settle("1", Unspent(1), "rejected")], id="rejected"),
        pytest.param([Settle("1", Unspent(), "upstream_failed")], id="unspent"),
        pytest.param([Release("1")], id="released"),
        pytest.param([Expire("1")], id="expired"),
        pytest.param([Expire("1"), Settle("1", exactly(90, 60), "stopped")], id="expired, then settled"),
        pytest.param([Release("1"), Settle("1", exactly(90, 60), "complete")], id="settled after its end"),
    ],
)
@pytest.mark.parametrize("is_one_batch", [False, True])
async def test_an_entry_is_read_as_it_was_written(store, path, ends, is_one_batch):
    """Equal to the last field, in every state, in one transaction or in several."""
    reserved = reserve("1", WATCHED, call(100, 800, 10))
    if is_one_batch:
        *_, reply = await store.apply([reserved, *ends], NOON)
    else:
        *_, reply = [
            (await store.apply([operation], NOON + later))[0] for later, operation in enumerate([reserved, *ends])
        ]
    assert isinstance(reply, Accepted)
    assert (reply.entry.capped_by, reply.entry.would_refuse) == ("staff/6h", ("watch/tiny",))
    assert await entry_in(store, "1") == reply.entry
    assert await store.read_counters(WATCHED.keys()) == reply.counters
    audit(path)


GROWING = binding(
    [DAILY, quota("staff/6h", output_tokens=500, per="6h")],
    [quota("lab/output", output_tokens=300)],
    always=[quota("everyone/calls", requests=2, enforce="after")],
    shadows=[quota("watch/daily", tokens=200, enforce="shadow")],
)
# When it is extended, and how many held amounts the entry has then.
EXTENDS = [
    (NOON + HOUR, extend("1", GROWING, 200), 5),
    (NOON + 2 * HOUR, extend("1", GROWING, 310, input_tokens=30), 4),  # more than lab/output has room for
    (NOON + 7 * HOUR, extend("1", GROWING, 340), 5),  # the next six hours
    (NOON + DAY, extend("1", GROWING, 390), 8),  # the next day, and six hours more
    (NOON + DAY, extend("1", GROWING, 390), 8),
    (NOON + DAY, extend("1", GROWING, 900, least=900), 8),
]


@pytest.mark.parametrize(
    "ends",
    [
        pytest.param([Settle("1", exactly(30, 20), "complete")], id="less than its first window held"),
        pytest.param([Settle("1", exactly(30, 380), "complete")], id="into its last window"),
        pytest.param([Settle("1", exactly(90, 1200), "complete")], id="more than it held"),
        pytest.param([Release("1")], id="released"),
        pytest.param([Expire("1")], id="expired"),
        pytest.param([Expire("1"), Settle("1", exactly(30, 380), "stopped")], id="expired, then settled"),
    ],
)
async def test_an_extended_entry_is_read_as_it_was_written(store, path, ends):
    """Also with several held amounts of one counter. Each operation starts from what is in the file."""
    [reply] = await store.apply([reserve("1", GROWING, call(100, 400, 50, initial_hold=50))], NOON)
    assert (reply.entry.hold.output, reply.entry.maximum, len(reply.entry.held_amounts)) == (50, 400, 5)
    for now, operation, held_amounts in EXTENDS:
        [reply] = await store.apply([operation], now)
        assert len(reply.entry.held_amounts) == held_amounts
        assert await entry_in(store, "1") == reply.entry
        audit(path)
    assert (reply.verdict, reply.entry.hold) == (Verdict.EXHAUSTED, Amount(30, 840, 1))
    for end in ends:
        [reply] = await store.apply([end], NOON + DAY)
        assert await entry_in(store, "1") == reply.entry
        assert await store.read_counters([held.key for held in reply.entry.held_amounts]) == reply.counters
        audit(path)


async def test_the_maximum_of_an_answer_is_read_as_it_was_written(store):
    """A maximum that is not known is None and not 0."""
    operations = [
        reserve("known", ANN, call(1, 40)),
        reserve("none", ANN, call(1)),
        reserve("unknown", ANN, call(1, 40, is_unbounded=True)),
    ]
    await store.apply(operations, NOON)
    assert [(await entry_in(store, operation.id)).maximum for operation in operations] == [40, 0, None]


async def test_an_extend_sees_a_window_that_another_call_has_opened(store, path):
    """The counters of the binding are loaded, and those of the held amounts."""
    await store.apply([reserve("1", ANN, call(100, 900, 100, initial_hold=100))], NOON)
    await store.apply([reserve("2", ANN, call(700))], NOON + DAY)
    [extended] = await store.apply([extend("1", ANN, 900, least=401)], NOON + DAY)
    assert (extended.verdict, extended.entry.hold.output) == (Verdict.BUSY, 400)
    assert await levels(store) == (Amount(), Amount(700, 300, 1))
    assert await store.apply([extend("3", ANN, 900)], NOON + DAY) == [Unknown("3")]
    audit(path)


async def test_a_call_whose_input_must_be_counted_first_writes_nothing(store, path):
    """It will be reserved again."""
    assert await store.apply([reserve("1", ANN, estimated(call(100, 400)))], NOON) == [NeedsCount()]
    assert (rows(path, "calls"), rows(path, "counters")) == ([], [])


@pytest.mark.parametrize("name", ["Élodie 李", "o'hara", '"', "[]", "\\", "%s ? :x", "~staff", "🦉", "1"])
async def test_a_name_may_have_any_characters(store, path, name):
    """T3: no quoting turns it into another name or into SQL."""
    who = replace(ANN, user=name)
    operation = replace(reserve(name, who, CALL), labels=CallLabels(name, name, name, name))
    await store.apply([operation, *(reserve(f"{name}{number}", ANN, call(1)) for number in range(3))], NOON)
    [reply] = await store.apply([Settle(name, exactly(90, 60), "complete")], NOON)
    assert reply.entry == await entry_in(store, name)
    assert reply.counters == await store.read_counters(who.keys())
    assert reply.counters.keys() == {DAILY.key_for(name)}
    assert await levels(store, user=name) == (Amount(90, 60, 1), Amount())
    audit(path)


async def test_the_newest_of_several_calls_with_one_response_is_found(store):
    """By the time of the call, whichever was settled last."""
    await store.apply([reserve(f"{number}", ANN, call(1)) for number in range(1, 5)], NOON)
    for number in (4, 1, 3, 2):
        await store.apply([Settle(f"{number}", exactly(1, 1), "complete", response_id="resp_1")], NOON)
    found = await store.find_response_entry("resp_1")
    assert found.id == "4"


async def test_a_user_without_calls_has_no_counters_and_an_unknown_call_no_entry(store):
    """An operation on an unknown call replies Unknown."""
    assert await store.read_counters(ANN.keys()) == {}
    assert await store.read_counters([]) == {}
    assert await entry_in(store, "1") is None
    assert await store.apply([Release("1")], NOON) == [Unknown("1")]


async def test_a_response_leads_to_the_call_that_made_it(store):
    """From the commit of the settle on. If an id was used twice, to the newer call, even of another user."""
    bob = replace(ANN, user="bob")
    await store.apply([reserve("1", ANN, CALL), reserve("2", bob, CALL), reserve("3", ANN, CALL)], NOON)
    assert await store.find_response_entry("resp_1") is None
    [first] = await store.apply([Settle("1", exactly(1, 1), "complete", response_id="resp_1")], NOON)
    assert await store.find_response_entry("resp_1") == first.entry
    [_, second] = await store.apply([Expire("2"), Settle("2", exactly(1, 1), "complete", response_id="resp_1")], NOON)
    await store.apply([Settle("3", exactly(1, 1), "complete")], NOON)
    assert await store.find_response_entry("resp_1") == second.entry
    assert await store.find_response_entry("' OR ''='") is None


async def test_the_largest_numbers_are_read_as_they_were_written(store):
    """Milliseconds of a far year and a trillion tokens have more than 32 bits."""
    who, far = binding([quota("staff/daily", tokens=10**13)]), NOON + 200_000 * DAY
    [reply] = await store.apply([reserve("1", who, call(10**12, 10**12))], far)
    assert await entry_in(store, "1") == reply.entry
    assert await levels(store) == (Amount(), Amount(10**12, 10**12, 1))


async def test_a_batch_sees_what_earlier_batches_wrote(store, path):
    """A call is refused because of a call of an earlier batch; a repeated reserve finds its entry."""
    [first] = await store.apply([reserve("1", ANN, CALL)], NOON)
    [full, again] = await store.apply([reserve("2", ANN, call(600)), reserve("1", ANN, CALL)], NOON)
    assert isinstance(full, Refused)
    assert full.counters == first.counters
    assert again == first
    assert states(path) == {"1": "open"}


async def test_a_new_window_replaces_the_one_that_ended(store):
    """There is one row for each subject and quota."""
    await store.apply([reserve("1", ANN, CALL), SETTLED], NOON)
    [reply] = await store.apply([reserve("2", ANN, call(7))], NOON + DAY)
    assert await store.read_counters(ANN.keys()) == reply.counters
    assert await levels(store) == (Amount(), amount(7))


async def test_a_batch_may_touch_any_number_of_counters(store, path):
    """More than a statement may have parameters, so none is missed and taken for unused."""
    many = [quota(f"staff/q{number}", requests=1) for number in range(11_000)]
    who = binding(many)
    await store.apply([reserve("1", who, call(1)), SETTLED], NOON)
    [refused] = await store.apply([reserve("2", who, call(1))], NOON)
    assert isinstance(refused, Refused)
    assert len(refused.decision.blocks) == len(many)
    assert len(await store.read_counters(who.keys())) == len(many)


# ----------------------------------------------------------------------------------------------------- all or nothing


async def test_a_batch_is_one_transaction(faulty, path):
    """However many operations it has, they share the cost of one commit."""
    store, writer = faulty
    operations = [reserve(str(number), ANN, call(1)) for number in range(200)]
    with statements(writer) as seen:
        await store.apply(operations, NOON)
        await store.apply([*(Release(operation.id) for operation in operations), reserve("last", ANN, call(1))], NOON)
    assert seen.count("COMMIT") == 2
    audit(path)


# ---------------------------------------------------------------------------------------------------- what is kept


def reads(seen):
    """The statements that read counters or calls."""
    return [statement for statement in seen if statement.startswith("SELECT")]


async def test_what_a_batch_has_loaded_or_written_is_not_read_again(faulty, path):
    """Its counters, also those that have no row, and its open calls. A new call is looked for, and an ended one."""
    store, writer = faulty
    who = binding([DAILY], [quota("lab/daily", tokens=10)])
    with statements(writer) as seen:
        [first] = await store.apply([reserve("1", who, CALL)], NOON)
        assert len(reads(seen)) == 2
        [again, _] = await store.apply([reserve("1", who, CALL), reserve("2", who, call(10))], NOON)
        assert len(reads(seen)) == 3
        await store.apply([extend("1", who, 450), Settle("2", exactly(1), "complete")], NOON)
        await store.apply([SETTLED], NOON)
        assert len(reads(seen)) == 3
        [repeated] = await store.apply([SETTLED], NOON)
        assert len(reads(seen)) == 4
    assert again.entry == first.entry
    assert repeated.entry.usage == SETTLED.usage
    assert await levels(store) == (Amount(91, 60, 2), Amount())
    audit(path)


@pytest.mark.parametrize("is_worker", [False, True])
async def test_a_change_of_another_connection_is_seen(store, path, is_worker):
    """Another worker has charged the counter, or an operator has edited it and deleted a call."""
    await store.apply([reserve("1", ANN, CALL), reserve("2", ANN, call(10))], NOON)
    if is_worker:
        other = worker_of(path)
        await other.open()
        await other.apply([Settle("1", exactly(700), "complete"), reserve("3", ANN, call(1))], NOON)
        await other.close()
    else:
        with connected(path) as connection:
            connection.execute("UPDATE counters SET used_input = 700, used_requests = 1")
            connection.execute("DELETE FROM calls WHERE id = '1'")
    [ended, refused] = await store.apply([SETTLED, reserve("4", ANN, call(300))], NOON)
    assert isinstance(refused, Refused)
    if is_worker:
        assert ended.entry.usage == exactly(700)
    else:
        assert ended == Unknown("1")
    assert refused.counters == await store.read_counters(ANN.keys())


async def test_a_reset_is_seen_by_the_next_batch(store, path):
    """A command or the admin API makes it on another connection of the same process."""
    await store.apply([reserve("1", ANN, CALL), SETTLED], NOON)
    async with store.transaction(writes=True) as connection:
        await connection.exec_driver_sql("UPDATE counters SET used_input = 0, used_output = 0")
    [reply] = await store.apply([reserve("2", ANN, call(100, 900))], NOON)
    assert isinstance(reply, Accepted)


async def test_after_a_batch_that_failed_nothing_is_kept(faulty, path):
    """What it changed in memory is not in the file: neither after a mistake nor after a commit that failed."""
    store, writer = faulty
    await store.apply([reserve("1", ANN, CALL)], NOON)
    with pytest.raises(ZeroDivisionError):
        await store.apply(
            [SETTLED, reserve("2", ANN, call(1)), unchecked(reserve("3", ANN, CALL), binding=BrokenBinding())], NOON
        )
    with failing_writes(path, writer), pytest.raises(StoreUnavailable):
        await store.apply([SETTLED, reserve("2", ANN, call(1))], NOON)
    with statements(writer) as seen:
        [reply] = await store.apply([extend("1", ANN, 401)], NOON)
    assert len(reads(seen)) == 2
    assert reply.entry == await entry_in(store, "1")
    assert (reply.entry.state, await levels(store)) == ("open", (Amount(), Amount(100, 401, 1)))
    audit(path)


async def test_the_most_recent_counters_and_calls_are_kept(path, monkeypatch):
    """As many as the bounds allow. Those of another batch are read again, with the same result."""
    monkeypatch.setattr("proxy.ledger.sqlite._COUNTERS_KEPT", 2)
    monkeypatch.setattr("proxy.ledger.sqlite._CALLS_KEPT", 2)
    store = SqliteStore(path)
    with writers() as opened:
        await store.open()
    users = [binding([DAILY], user=f"user {number}") for number in range(4)]
    for number, who in enumerate(users):
        await store.apply([reserve(str(number), who, CALL)], NOON)
    with statements(opened[0]) as seen:
        for number in (3, 2, 3, 0):
            await store.apply([extend(str(number), users[number], 401)], NOON)
            assert len(reads(seen)) == (2 if number == 0 else 0)
        await store.apply([extend("3", users[3], 402)], NOON)
        assert len(reads(seen)) == 2
        await store.apply([extend("2", users[2], 402)], NOON)
        assert len(reads(seen)) == 4
    for number, who in enumerate(users):
        [ended] = await store.apply([Settle(str(number), exactly(90, 60), "complete")], NOON)
        assert ended.counters == await store.read_counters(who.keys())
    await store.close()
    audit(path)


async def test_the_connection_that_writes_uses_wal_and_synchronous_full(faulty):
    """WAL allows reads during a write. Only with synchronous=FULL (2) does a commit survive a power failure."""
    _, writer = faulty
    assert writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert writer.execute("PRAGMA synchronous").fetchone() == (2,)


def invalid_ends():
    """Ends of call 1 that pass all our checks and that the driver or the database rejects."""
    return {
        "too large an integer": unchecked(Settle("1", exactly(1), "complete"), usage=Exactly(Tokens(2**70, 0))),
        "no valid text": unchecked(Settle("1", exactly(1), "complete"), outcome="\ud800"),
        "no value of the database": unchecked(Settle("1", exactly(1), "complete"), outcome=object()),
        "no number": unchecked(Settle("1", exactly(1), "complete"), usage=Exactly(Tokens("x", 0))),
    }


@pytest.mark.parametrize("kind", invalid_ends())
async def test_nothing_of_a_batch_with_an_invalid_operation_is_written(store, path, kind):
    """So the others can be repeated and are not applied twice."""
    await store.apply([reserve("1", ANN, CALL)], NOON)
    before = contents(path)
    with pytest.raises(Exception) as raised:
        await store.apply([reserve("2", ANN, call(1)), invalid_ends()[kind], Release("2")], NOON)
    assert not isinstance(raised.value, StoreUnavailable)
    assert contents(path) == before
    await store.apply([reserve("2", ANN, call(1)), SETTLED], NOON)
    audit(path)


async def test_nothing_of_a_batch_in_which_a_rule_raises_is_written(store, path):
    """The exception is raised as it is."""
    before = contents(path)
    with pytest.raises(ZeroDivisionError):
        await store.apply(
            [reserve("1", ANN, CALL), unchecked(reserve("2", ANN, CALL), binding=BrokenBinding())], NOON
        )
    assert contents(path) == before


async def test_a_value_that_the_database_rejects_raises_store_refused(store, path):
    """A value of an unknown type, or a row that violates a constraint, is rejected now and later."""
    await store.apply([reserve("1", ANN, CALL)], NOON)
    with pytest.raises(StoreRefused, match="not supported"):
        await store.apply([invalid_ends()["no value of the database"]], NOON)
    with pytest.raises(StoreRefused, match="NOT NULL"):
        await store.apply([unchecked(reserve("2", ANN, call(1)), owner=None)], NOON)


# --------------------------------------------------------------------------------------------------- writes that fail


REMEDIES = {
    locked: "another program has locked it",
    read_only: "let the user [0-9]+ write it",
    full: "free space on its disk",
    failing_writes: "check its disk, the space on it, and its mount",
    moved: "put it back, or restart",
    replaced: "put it back, or restart",
    emptied: r"quotas\.db was emptied while in use: stop the proxy, put back a backup",
    without_folder: "put it back, or restart",
    without_log: r"quotas\.db-wal was moved, deleted or replaced .* stop the proxy with SIGTERM",
    without_index: r"quotas\.db-shm was moved, deleted or replaced .* stop the proxy with SIGTERM",
    without_lock: r"quotas\.db\.lock was moved, deleted or replaced .* stop the proxy with SIGTERM",
}
FAULTS = list(REMEDIES)
IN_USE = [moved, replaced, emptied, without_folder, without_log, without_index, without_lock]


@pytest.fixture
async def faulty(path):
    """A store, and the driver's connection through which it writes."""
    store = SqliteStore(path, busy_timeout_s=0)
    with writers() as opened:
        await store.open()
    yield store, opened[0]
    await store.close()


def many(first, count):
    """Reserves that need many pages together, so that they show that the disk is full."""
    return [reserve(f"{first + number:09}", binding([DAILY], user=f"user {number}"), CALL) for number in range(count)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_a_database_that_cannot_be_written_is_unavailable(faulty, path, fault):
    """T53, T54, T55: nothing of the batch is written. After the fault, the same operations can be applied."""
    store, writer = faulty
    await store.apply([reserve("1", ANN, CALL)], NOON)
    before = contents(path)
    operations = [SETTLED, *many(1000, 300)]
    with fault(path, writer), pytest.raises(StoreUnavailable, match=REMEDIES[fault]) as raised:
        await store.apply(operations, NOON)
    assert str(path) in str(raised.value)
    assert contents(path) == before
    await store.apply(operations, NOON)
    assert await levels(store) == (Amount(90, 60, 1), Amount())
    assert len(states(path)) == 301
    audit(path)


@pytest.mark.parametrize("fault", [locked, moved, replaced, emptied, without_log], ids=lambda fault: fault.__name__)
async def test_renewing_a_lease_shows_that_nothing_can_be_written(faulty, path, fault):
    """So a process without calls notices it too."""
    store, writer = faulty
    with fault(path, writer), pytest.raises(StoreUnavailable):
        await store.renew("me", NOON, lease_ms=0)
    await store.renew("me", NOON, lease_ms=0)
    assert rows(path, "owners") == [{"id": "me", "alive_until": NOON}]


async def test_a_failure_during_the_commit_is_uncertain(faulty, path):
    """T54: the batch may have been committed. After a failure before the commit it was certainly not."""
    store, writer = faulty
    with failing_writes(path, writer), pytest.raises(StoreUnavailable, match="I/O") as during_commit:
        await store.apply([reserve("1", ANN, CALL)], NOON)
    with locked(path, writer), pytest.raises(StoreUnavailable, match="locked") as before_commit:
        await store.apply([reserve("1", ANN, CALL)], NOON)
    assert during_commit.value.is_uncertain
    assert not before_commit.value.is_uncertain


async def test_a_batch_takes_the_write_lock_before_it_decides(faulty, path):
    """Otherwise it would decide on counters that another process changes before it writes them."""
    store, writer = faulty
    with locked(path, writer), pytest.raises(StoreUnavailable):
        await store.apply([unchecked(reserve("1", ANN, CALL), binding=BrokenBinding())], NOON)


async def test_a_batch_is_decided_at_the_time_at_which_it_has_the_lock(path):
    """A reset that it waited for is then older than what it charges."""
    locked = []

    def now():
        with connected(path) as other, pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        locked.append(True)
        return NOON + 7

    store = SqliteStore(path, now=now)
    await store.open()
    [reply] = await store.apply([reserve("1", ANN, call(10, 40))], NOON)
    await store.close()
    assert (reply.decided_at, reply.entry.reserved_at, locked) == (NOON + 7, NOON + 7, [True])


async def test_a_read_does_not_wait_for_a_write(store, path):
    """It returns what was committed before."""
    await store.apply([reserve("1", ANN, CALL)], NOON)
    with connected(path) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM counters")
        assert await levels(store) == (Amount(), HELD)
        other.execute("ROLLBACK")


async def test_a_read_of_a_table_that_was_dropped_raises_store_unavailable(store, path):
    """The error names the file, the table and the likely cause."""
    with connected(path) as other:
        other.execute("DROP TABLE counters")
        other.execute("DROP TABLE calls")
    with pytest.raises(StoreUnavailable, match=r"quotas\.db can't be used \(no such table.*another program"):
        await store.read_counters(ANN.keys())
    with pytest.raises(StoreUnavailable, match="no such table"):
        await store.find_response_entry("resp_1")
    with pytest.raises(StoreUnavailable, match="no such table"):
        await store.orphans("me", NOON, limit=10)


@pytest.mark.parametrize("fault", IN_USE, ids=lambda fault: fault.__name__)
async def test_a_read_shows_that_a_file_in_use_is_gone_or_empty(faulty, path, fault):
    """T56: it raises StoreUnavailable and makes no file. An empty file would say that nothing was used."""
    store, writer = faulty
    await store.apply([reserve("1", ANN, CALL)], NOON)
    with fault(path, writer):
        before = sorted(path.parent.glob("*"))
        for read in (store.read_counters(ANN.keys()), store.find_response_entry("resp_1")):
            with pytest.raises(StoreUnavailable, match=REMEDIES[fault]):
                await read
        assert sorted(path.parent.glob("*")) == before
    assert await levels(store) == (Amount(), HELD)


async def test_what_was_in_a_log_that_is_gone_is_kept_by_a_stop_in_order(path):
    """As the error says: the store still has the log open, and writes it to the database when it is closed."""
    store = SqliteStore(path)
    await store.open()
    await store.apply([reserve("1", ANN, CALL)], NOON)
    for suffix in ("-wal", "-shm"):
        path.with_name(f"{path.name}{suffix}").unlink()
    with pytest.raises(StoreUnavailable, match="-wal was moved, deleted or replaced"):
        await store.apply([SETTLED], NOON)
    await store.close()
    again = SqliteStore(path)
    await again.open()
    assert await levels(again) == (Amount(), HELD)
    await again.close()


# ---------------------------------------------------------------------------------------------------- leases, orphans


async def test_each_process_has_one_lease(store, path):
    """A renewal moves its end."""
    await store.renew("me", NOON, lease_ms=0)
    await store.renew("you", NOON, lease_ms=1)
    await store.renew("me", NOON + 1, lease_ms=1)
    assert rows(path, "owners") == [{"id": "me", "alive_until": NOON + 2}, {"id": "you", "alive_until": NOON + 1}]


async def test_for_the_only_process_all_open_calls_of_others_are_orphans(store):
    """Not its own calls, not ended calls, and at most `limit`."""
    operations = [replace(reserve(str(number), ANN, call(1)), owner=f"process-{number % 2}") for number in range(8)]
    await store.apply([*operations, Settle("0", exactly(1), "complete"), Release("2"), Expire("1")], NOON)
    assert sorted(await store.orphans("process-0", NOON, limit=10)) == ["3", "5", "7"]
    assert sorted(await store.orphans("process-1", NOON, limit=10)) == ["4", "6"]
    assert sorted(await store.orphans("process-2", NOON, limit=10)) == ["3", "4", "5", "6", "7"]
    assert len(await store.orphans("process-2", NOON, limit=3)) == 3


async def test_for_workers_orphans_are_open_calls_of_processes_whose_lease_has_run_out(store, path):
    """The other workers are alive, and their calls are in flight."""
    operations = [replace(reserve(str(number), ANN, call(1)), owner=f"process-{number}") for number in range(3)]
    await store.apply(operations, NOON)
    worker = SqliteStore(path, lock=store.hand_over())
    await worker.open()
    await worker.renew("process-1", NOON, lease_ms=0)
    await worker.renew("process-2", NOON, lease_ms=1)
    assert sorted(await worker.orphans("me", NOON, limit=10)) == ["0", "1"]  # process-0 has no lease
    assert sorted(await worker.orphans("me", NOON + 1, limit=10)) == ["0", "1", "2"]
    assert sorted(await worker.orphans("process-0", NOON, limit=10)) == ["1"]
    assert sorted(await store.orphans("me", NOON, limit=10)) == [
        "0",
        "1",
        "2",
    ]  # the only process knows that all others are dead
    await worker.close()


# ---------------------------------------------------------------------------------------------------- locks and turns


OPEN = """
import asyncio, pathlib, sys
from proxy.ledger.sqlite import SqliteStore
asyncio.run(SqliteStore(pathlib.Path(sys.argv[1])).open())
print("opened", flush=True)
sys.stdin.read()
"""


async def opened_and_closed(path):
    store = SqliteStore(path)
    try:
        await store.open()
    finally:
        await store.close()


async def opened_and_closed_async(path):
    await asyncio.to_thread(asyncio.run, opened_and_closed(path))


def test_a_second_process_is_refused_until_the_first_has_ended(path):
    """T62: it would expire the calls of the first. A process that is killed frees its lock too."""
    command = [sys.executable, "-c", OPEN, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "opened\n"
        with pytest.raises(
            StoreInUse, match=r"Another process is using .*quotas\.db\. Stop it first.*parent.*was killed"
        ):
            asyncio.run(opened_and_closed(path))
        first.send_signal(signal.SIGKILL)
        first.wait()
    asyncio.run(opened_and_closed(path))


async def test_a_lock_that_was_handed_over_stays_until_all_its_holders_have_closed_it(path):
    """Also after the store that took it is closed. Until then no other process gets the file."""
    parent = SqliteStore(path)
    await parent.open()
    workers = [SqliteStore(path, lock=parent.hand_over()) for _ in range(2)]
    await parent.close()
    for worker in workers:
        await worker.open()
    for worker in workers:
        with pytest.raises(StoreInUse):
            await opened_and_closed_async(path)
        await worker.close()
    await opened_and_closed_async(path)


def worker_of(path):
    """A store of a worker. It does not check whether its parent has really locked the file."""
    return SqliteStore(path, busy_timeout_s=0, lock=os.open(os.devnull, os.O_RDONLY))


async def test_of_several_workers_that_start_at_once_one_creates_the_schema(new_path):
    """On a file that does not exist yet."""
    workers = [worker_of(new_path) for _ in range(4)]
    await asyncio.gather(*(worker.open() for worker in workers))
    operations = [reserve(str(number), ANN, call(100)) for number in range(12)]
    answers = await asyncio.gather(
        *(workers[n % 4].apply([operation], NOON) for n, operation in enumerate(operations))
    )
    assert sum(isinstance(answer, Accepted) for [answer] in answers) == 10
    audit(new_path)
    for worker in workers:
        await worker.close()


async def test_a_worker_writes_only_in_its_turn(path):
    """It waits for its turn, and reads do not. A turn ends also if its batch fails."""
    first, second = worker_of(path), worker_of(path)
    await first.open()
    await second.open()
    turn = os.open(f"{path}.turn", os.O_RDWR)
    fcntl.flock(turn, fcntl.LOCK_EX)
    waiting = asyncio.get_running_loop().create_task(first.apply([reserve("1", ANN, CALL)], NOON))
    for _ in range(20):
        assert await entry_in(first, "1") is None
    assert not waiting.done()
    os.close(turn)
    await waiting
    with pytest.raises(ZeroDivisionError):
        await first.apply([unchecked(reserve("2", ANN, CALL), binding=BrokenBinding())], NOON)
    assert isinstance((await second.apply([SETTLED], NOON))[0], Accepted)
    await first.close()
    await second.close()


async def test_a_file_has_one_lock_under_all_its_names(store, path, tmp_path, monkeypatch):
    """A relative path or a symbolic link does not get around the lock."""
    link = tmp_path / "link.db"
    link.symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for name in (link, tmp_path / "sub" / ".." / "quotas.db", Path("quotas.db")):
        other = SqliteStore(name)
        with pytest.raises(StoreInUse):
            await other.open()
        await other.close()


async def test_a_file_with_several_names_is_refused(path):
    """A hard link would get around the lock, and SQLite would write two logs for one file. The error says what to do,
    and nothing has changed.
    """
    link = path.with_name("link.db")
    link.hardlink_to(path)
    before = path.read_bytes()
    for name in (path, link):
        store = SqliteStore(name)
        with pytest.raises(StoreUnavailable, match=rf"{name} has 2 names .*find -inum {path.stat().st_ino}"):
            await store.open()
        await store.close()
    assert path.read_bytes() == before
    link.unlink()
    await opened(path)


@pytest.mark.parametrize("is_refused", [True, False])
async def test_closing_twice_closes_no_file_of_others(path, tmp_path, is_refused):
    """The system may have given the descriptor of the lock to another file. And closing leaves no file open."""
    first, twice = SqliteStore(path), SqliteStore(path if is_refused else tmp_path / "other.db")
    await first.open()
    before = os.listdir("/dev/fd")
    with pytest.raises(StoreInUse) if is_refused else nullcontext():
        await twice.open()
    await twice.close()
    assert set(os.listdir("/dev/fd")) <= set(before)
    reader, writer = os.pipe()
    await twice.close()
    os.write(writer, b"fine")
    assert os.read(reader, 4) == b"fine"
    os.close(reader)
    os.close(writer)
    await first.apply([reserve("1", ANN, CALL)], NOON)
    await first.close()


async def test_closing_leaves_one_file_and_frees_its_lock(new_path):
    """The write-ahead log is merged into the file, and the next store finds all calls."""
    path = new_path
    store = SqliteStore(path)
    await store.open()
    await store.apply([reserve("1", ANN, CALL)], NOON)
    await store.find_response_entry("resp_1")
    await store.close()
    assert sorted(file.name for file in path.parent.iterdir()) == ["quotas.db", "quotas.db.lock"]
    again = SqliteStore(path)
    await again.open()
    assert states(path) == {"1": "open"}
    await again.close()


async def test_a_newer_schema_is_refused_and_left_alone(path):
    """T56: the store raises NewerSchema, as the migrations do."""
    with connected(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    before = contents(path)
    older = SqliteStore(path)
    with pytest.raises(NewerSchema, match=r"The database /.*quotas\.db has schema 9999"):
        await older.open()
    await older.close()
    assert contents(path) == before


async def test_a_store_that_may_not_migrate_changes_no_schema(new_path):
    """It neither makes a file nor migrates one, and says what to run. This release's schema and the next are used."""

    async def open_and_close():
        store = SqliteStore(new_path, migrates=False)
        try:
            await store.open()
            await store.apply([reserve("1", ANN, call(100, 400))], NOON)
        finally:
            await store.close()

    with pytest.raises(StoreUnavailable, match="is not a database yet: run `llm-quota-proxy migrate`"):
        await open_and_close()
    assert not new_path.exists()
    write_migrated(new_path)
    for revision, text in (
        ("0001", f"has schema 0001, and this release needs {HEAD}: run `llm-quota-proxy migrate`"),
        ("9999", "has schema 9999, which this release does not know: use the release that wrote it, or a newer one"),
    ):
        with connected(new_path) as connection:
            connection.execute("UPDATE alembic_version SET version_num = ?", [revision])
        before = contents(new_path)
        with pytest.raises(StoreUnavailable, match=text):
            await open_and_close()
        assert contents(new_path) == before
    for revision in (HEAD, f"{int(HEAD) + 1:04}"):
        with connected(new_path) as connection:
            connection.execute("UPDATE alembic_version SET version_num = ?", [revision])
        await open_and_close()
    assert states(new_path) == {"1": "open"}


async def test_a_migration_that_fails_leaves_the_file_as_it_was(new_path):
    """A table of another program has the name of one of ours. It is not changed, and no table is added beside it."""
    with connected(new_path) as connection:
        connection.execute("CREATE TABLE calls (who TEXT)")
    before = contents(new_path)
    store = SqliteStore(new_path)
    with pytest.raises(StoreUnavailable, match="calls already exists"):
        await store.open()
    await store.close()
    assert contents(new_path) == before


def truncated(path):
    """As an interrupted copy leaves it."""
    os.truncate(path, 5000)


def not_a_database(path):
    path.write_text("groups: {staff: {unlimited: true}}\n" * 100)


def a_directory(path):
    path.unlink()
    path.mkdir()


def no_folder(path):
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()


def no_folder_but_a_file(path):
    no_folder(path)
    path.parent.touch()


DAMAGES = {
    truncated: "restore a backup, or copy what can still be read",
    not_a_database: "restore a backup, or correct `database`",
    a_directory: "is a folder: write the path of a file",
    no_folder: "No such file or directory.*: make its folder",
    no_folder_but_a_file: "Not a directory.*: make its folder",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
async def test_a_damaged_file_is_unavailable(tmp_path, damage):
    """T56: it is not replaced by an empty one, which would say that nothing was used. The error names the file and
    what to do.
    """
    path = tmp_path / "data" / "quotas.db"
    path.parent.mkdir()
    store = SqliteStore(path)
    await store.open()
    await store.close()
    damage(path)
    store = SqliteStore(path)
    with pytest.raises(StoreUnavailable, match=DAMAGES[damage]) as raised:
        await store.open()
    await store.close()
    assert str(path) in str(raised.value)
    assert not path.exists() or path.is_dir() or path.stat().st_size in (3500, 5000)


# -------------------------------------------------------------------------------------------- new, gone, and modes


NEW = "a new database was made, in which all quotas are unused"


async def opened(path, **options):
    """Open and close a store; the events that it logs."""
    with capture_logs() as logged:
        store = SqliteStore(path, **options)
        try:
            await store.open()
        finally:
            await store.close()
    return [(entry["log_level"], entry["event"], entry.get("database") or entry.get("file")) for entry in logged]


async def test_a_new_database_is_a_warning_with_its_whole_path(new_path, monkeypatch):
    """The folder may be a volume that was not mounted. The second start finds the database, and says nothing."""
    monkeypatch.chdir(new_path.parent)
    assert await opened(Path("quotas.db")) == [("warning", NEW, str(new_path))]
    assert await opened(Path("quotas.db")) == []


def deleted(path):
    path.unlink()


def emptied(path):
    os.truncate(path, 0)


def without_tables(path):
    """Another database without our tables, as a program makes that only opens it."""
    path.unlink()
    with connected(path) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


def deleted_while_in_use(path):
    """The log of the database that is gone is still there, and the lock file is not."""
    path.with_name("quotas.db-wal").write_bytes(path.read_bytes())
    path.with_name("quotas.db.lock").unlink()
    path.unlink()


LOSSES = [deleted, emptied, without_tables, deleted_while_in_use]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
async def test_a_database_that_is_gone_is_not_made_anew(new_path, loss):
    """T56: its lock file shows that there was one. Nothing is changed, so a backup can be put back; with
    `may_be_new` a new database is made, once.
    """
    await opened(new_path)
    backup = new_path.read_bytes()
    loss(new_path)
    before = {file.name: file.read_bytes() for file in new_path.parent.iterdir()}
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=r"quotas\.db is gone or empty.*Put it back.*serve --new-database"):
            await opened(new_path)
    after = {file.name: file.read_bytes() for file in new_path.parent.iterdir()}
    assert {name: after.get(name) for name in before} == before
    assert after.keys() - before.keys() <= {"quotas.db.lock"}
    if loss is not deleted_while_in_use:
        new_path.write_bytes(backup)
        new_path.chmod(0o600)
        assert await opened(new_path) == []
        loss(new_path)
    assert (await opened(new_path, may_be_new=True))[-1] == ("warning", NEW, str(new_path))
    assert await opened(new_path) == []
    audit(new_path)
    loss(new_path)
    with pytest.raises(StoreUnavailable, match="is gone or empty"):
        await opened(new_path)


async def test_a_worker_never_makes_a_database_anew(new_path):
    """Also if its parent's command line, which is its own too, allows that. The file was deleted while they ran."""
    parent = SqliteStore(new_path)
    await parent.open()
    new_path.unlink()
    with pytest.raises(StoreUnavailable, match="is gone or empty"):
        await opened(new_path, lock=parent.hand_over(), may_be_new=True)
    await parent.close()
    assert not new_path.exists()


async def test_a_first_start_that_failed_can_be_repeated(new_path):
    """Its lock file does not show that there was a database. Here another program's table is in the way."""
    with connected(new_path) as connection:
        connection.execute("CREATE TABLE calls (who TEXT)")
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="calls already exists"):
            await opened(new_path)
    new_path.unlink()
    assert await opened(new_path) == [("warning", NEW, str(new_path))]


@pytest.mark.parametrize("umask", [0o022, 0o000, 0o077])
async def test_only_the_owner_can_use_the_files(new_path, umask):
    """Whatever the umask is: they have the names of users, and what they use."""
    before = os.umask(umask)
    try:
        parent = SqliteStore(new_path)
        await parent.open()
        worker = SqliteStore(new_path, lock=parent.hand_over())
        await worker.open()
        await worker.apply([reserve("1", ANN, CALL)], NOON)
        await worker.find_response_entry("resp_1")
        modes = {file.name: oct(stat.S_IMODE(file.stat().st_mode)) for file in new_path.parent.iterdir()}
        await worker.close()
        await parent.close()
    finally:
        os.umask(before)
    names = ("quotas.db", "quotas.db-shm", "quotas.db-wal", "quotas.db.lock", "quotas.db.turn")
    assert modes == dict.fromkeys(names, "0o600")


async def test_files_that_others_could_use_are_restricted(path, monkeypatch):
    """Those of earlier releases, also with what a crash has left. A file system that has no modes is no error."""
    names = ("quotas.db", "quotas.db-wal", "quotas.db-shm", "quotas.db.lock")
    store = SqliteStore(path)
    await store.open()
    for name in names:
        path.with_name(name).chmod(0o644)
    restricted = "others could use a file of the database; now only its owner can"
    worker = {"lock": store.hand_over()}
    assert await opened(path, **worker) == [("warning", restricted, str(path.with_name(name))) for name in names]
    assert {stat.S_IMODE(path.with_name(name).stat().st_mode) for name in names} == {0o600}
    await store.close()
    path.chmod(0o640)

    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.chmod", refuse)
    assert await opened(path) == [("warning", "others can use a file of the database", str(path))]


@contextmanager
def unprivileged(folder):
    """A user who may not write in this folder."""
    folder.chmod(0o500)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)
        folder.chmod(0o700)


async def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(new_path):
    """The user's number is in the error, because in containers it is often not the expected one."""
    with (
        unprivileged(new_path.parent),
        pytest.raises(StoreUnavailable, match=r"quotas\.db\.lock can't be opened \(Permission.*let the user [0-9]+"),
    ):
        await opened(new_path)


async def test_a_disk_that_is_full_at_the_first_start_leaves_no_lock_file(new_path):
    """An empty one would show that there was a database."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(StoreUnavailable, match=r"quotas\.db\.lock can't be written \(File too large\): check"):
            await opened(new_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(new_path.parent.iterdir()) == []
    assert await opened(new_path) == [("warning", NEW, str(new_path))]


async def test_a_file_system_without_locks_is_named_with_the_remedy(new_path, monkeypatch):
    """As some network file systems are. Without a lock, two proxies could admit calls up to the limit each."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(StoreUnavailable, match=r"quotas\.db\.lock can't be locked \(No locks.*use a local disk"):
        await opened(new_path)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "free space"),
        (errno.EROFS, "file system that can be written"),
        (errno.EACCES, "let the user"),
        (errno.EMFILE, "check its folder and its disk"),
    ],
)
async def test_every_error_of_the_system_has_a_remedy(new_path, monkeypatch, number, remedy):
    """And its file."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(StoreUnavailable, match=remedy) as raised:
        await opened(new_path)
    assert os.strerror(number) in str(raised.value)
    assert str(new_path) in str(raised.value)


async def test_a_path_may_have_any_characters(tmp_path):
    """SQLite gets it as a URL, in which some characters have a meaning."""
    path = tmp_path / "a?b #c%20d&mode=memory" / "quotas é.db"
    path.parent.mkdir()
    assert await opened(path) == [("warning", NEW, str(path))]
    assert path.stat().st_size > 0


async def test_a_file_that_is_locked_at_the_start_is_unavailable(path):
    """As it would be later."""
    with connected(path) as other:
        other.execute("BEGIN EXCLUSIVE")
        store = SqliteStore(path, busy_timeout_s=0)
        with pytest.raises(StoreUnavailable, match=r"quotas\.db can't be used .*another program has locked it"):
            await store.open()
        await store.close()


class ThreadRecorder(BrokenBinding):
    """A binding that records in which thread the rules run."""

    def keys(self):
        self.thread = threading.current_thread().name
        return []


async def test_batches_are_applied_in_a_thread_of_their_own(store):
    """So that nothing else in the program waits for a disk."""
    recorder = ThreadRecorder()
    with pytest.raises(AttributeError):
        await store.apply([unchecked(reserve("1", ANN, CALL), binding=recorder)], NOON)
    assert recorder.thread.startswith("ledger")


def test_the_constructor_of_a_store_does_no_io(new_path):
    """Until the store is opened there is no file."""
    SqliteStore(new_path)
    assert list(new_path.parent.iterdir()) == []


# --------------------------------------------------------------------------------------------------- maintenance jobs

TWO_STATEMENTS = ("UPDATE owners SET alive_until = ?1", "DELETE FROM owners WHERE alive_until = ?1")


async def test_a_step_of_a_job_returns_the_rows_of_its_last_statement(faulty, path):
    """Its statements are one transaction."""
    store, writer = faulty
    for owner in ("me", "you"):
        await store.renew(owner, NOON, lease_ms=1)
    with statements(writer) as seen:
        assert await store._run_job(TWO_STATEMENTS, 5) == JobResult(2)
    assert seen.count("COMMIT") == 1
    assert rows(path, "owners") == []


async def test_a_step_of_a_job_that_fails_changes_nothing(store, path):
    """Its first statement is rolled back."""
    await store.renew("me", NOON, lease_ms=1)
    with pytest.raises(StoreUnavailable):
        await store._run_job((TWO_STATEMENTS[0], "SELECT nothing(?1)"), 5)
    assert [row["alive_until"] for row in rows(path, "owners")] == [NOON + 1]
