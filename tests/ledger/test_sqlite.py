"""One SQLite file as the ledger sees it: what is written is read back, whole or not at all, and in turns.

Real files and real faults: a lock that somebody else holds, a full disk, a failing write, a file that is taken away.
"""

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.ledger.book import Accepted, Expire, Refused, Release, Settle, Unknown
from proxy.ledger.entry import CallLabels
from proxy.ledger.schema import NewerSchema
from proxy.ledger.sqlite import SqliteStore
from proxy.ledger.store import JobResult, StoreInUse, StoreRefused, StoreUnavailable
from proxy.policy.admission import NeedsCount, Verdict
from proxy.policy.amounts import Amount, AtLeast, Exactly, Tokens, Unspent
from tests.audit import audit, connected, contents, rows, states
from tests.breakage import (
    BrokenBinding,
    commits,
    failing_writes,
    full,
    locked,
    moved,
    read_only,
    replaced,
    unchecked,
    writers,
)
from tests.builders import DAY, HOUR, NOON, amount, binding, call, estimated, exactly, extend, quota, reserve

DAILY = quota("staff/daily", tokens=1000)
ANN = binding([DAILY])
CALL = call(100, 400)
HELD = Amount(100, 400, 1)
SETTLED = Settle("1", exactly(90, 60), "complete")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "quotas.db"


@pytest.fixture
async def store(path):
    """An open store that waits for nobody's lock."""
    store = SqliteStore(path, busy_timeout_s=0)
    await store.open()
    yield store
    await store.close()


async def levels(store, each=DAILY, user="ann"):
    """What is used and held of a quota, as it is read for pages."""
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
        pytest.param([Settle("1", Unspent(1), "rejected")], id="a bad request"),
        pytest.param([Settle("1", Unspent(), "upstream_failed")], id="nothing at all"),
        pytest.param([Release("1")], id="released"),
        pytest.param([Expire("1")], id="expired"),
        pytest.param([Expire("1"), Settle("1", exactly(90, 60), "stopped")], id="came back"),
        pytest.param([Release("1"), Settle("1", exactly(90, 60), "complete")], id="ended once"),
    ],
)
@pytest.mark.parametrize("is_one_batch", [False, True])
async def test_a_call_is_read_as_it_was_booked(store, path, ends, is_one_batch):
    """To the last field, through every state, also where the next act is of another transaction."""
    reserved = reserve("1", WATCHED, call(100, 800, 10))
    if is_one_batch:
        *_, booked = await store.apply([reserved, *ends], NOON)
    else:
        *_, booked = [
            (await store.apply([operation], NOON + later))[0] for later, operation in enumerate([reserved, *ends])
        ]
    assert isinstance(booked, Accepted)
    assert (booked.entry.capped_by, booked.entry.would_refuse) == ("staff/6h", ("watch/tiny",))
    assert await store.read_entry("1") == booked.entry
    assert await store.read_counters(WATCHED.keys()) == booked.counters
    audit(path)


GROWING = binding(
    [DAILY, quota("staff/6h", output_tokens=500, per="6h")],
    [quota("lab/output", output_tokens=300)],
    always=[quota("everyone/calls", requests=2, enforce="after")],
    shadows=[quota("watch/daily", tokens=200, enforce="shadow")],
)
GROWTH = [
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
        pytest.param([Expire("1"), Settle("1", exactly(30, 380), "stopped")], id="came back"),
    ],
)
async def test_a_call_that_grows_is_read_as_it_was_booked(store, path, ends):
    """Through windows and with several lines for one counter; what it is in the file decides what comes next."""
    [booked] = await store.apply([reserve("1", GROWING, call(100, 400, 50, initial_hold=50))], NOON)
    assert (booked.entry.hold.output, booked.entry.maximum, len(booked.entry.held_amounts)) == (50, 400, 5)
    for now, operation, lines in GROWTH:
        [booked] = await store.apply([operation], now)
        assert len(booked.entry.held_amounts) == lines
        assert await store.read_entry("1") == booked.entry
        audit(path)
    assert (booked.verdict, booked.entry.hold) == (Verdict.EXHAUSTED, Amount(30, 840, 1))
    for end in ends:
        [booked] = await store.apply([end], NOON + DAY)
        assert await store.read_entry("1") == booked.entry
        assert await store.read_counters([line.key for line in booked.entry.held_amounts]) == booked.counters
        audit(path)


async def test_how_long_an_answer_may_become_is_read_as_it_was_booked(store):
    """Where nobody knows it is nothing, which is not 0."""
    operations = [
        reserve("known", ANN, call(1, 40)),
        reserve("none", ANN, call(1)),
        reserve("unknown", ANN, call(1, 40, open_ended=True)),
    ]
    await store.apply(operations, NOON)
    assert [(await store.read_entry(operation.id)).maximum for operation in operations] == [40, 0, None]


async def test_a_growth_sees_the_counters_of_quotas_that_others_opened(store, path):
    """All of a binding's are loaded, and those of the lines that a call has."""
    await store.apply([reserve("1", ANN, call(100, 900, 100, initial_hold=100))], NOON)
    await store.apply([reserve("2", ANN, call(700))], NOON + DAY)
    [grown] = await store.apply([extend("1", ANN, 900, least=401)], NOON + DAY)
    assert (grown.verdict, grown.entry.hold.output) == (Verdict.BUSY, 400)
    assert await levels(store) == (Amount(), Amount(700, 300, 1))
    assert await store.apply([extend("3", ANN, 900)], NOON + DAY) == [Unknown("3")]
    audit(path)


async def test_a_call_that_has_to_be_counted_leaves_no_trace(store, path):
    """No row, no counter: it comes again."""
    assert await store.apply([reserve("1", ANN, estimated(call(100, 400)))], NOON) == [NeedsCount()]
    assert (rows(path, "calls"), rows(path, "counters")) == ([], [])


@pytest.mark.parametrize("name", ["Élodie 李", "o'hara", '"', "[]", "\\", "%s ? :x", "~staff", "🦉", "1"])
async def test_names_of_any_kind_are_names(store, path, name):
    """No quoting anywhere turns one into another, or into an instruction."""
    who = replace(ANN, user=name)
    operation = replace(reserve(name, who, CALL), labels=CallLabels(name, name, name, name))
    await store.apply([operation, *(reserve(f"{name}{number}", ANN, call(1)) for number in range(3))], NOON)
    [booked] = await store.apply([Settle(name, exactly(90, 60), "complete")], NOON)
    assert booked.entry == await store.read_entry(name)
    assert booked.counters == {DAILY.key_for(name): (await all_of(store, who))[0]}
    assert await levels(store, user=name) == (Amount(90, 60, 1), Amount())
    audit(path)


async def all_of(store, who):
    return list((await store.read_counters(who.keys())).values())


async def test_what_is_not_there_is_not_read(store):
    """A user who never called has no counters; a call that nobody made has no entry."""
    assert await store.read_counters(ANN.keys()) == {}
    assert await store.read_counters([]) == {}
    assert await store.read_entry("1") is None
    assert await store.apply([Release("1")], NOON) == [Unknown("1")]


async def test_a_response_leads_to_the_call_that_made_it(store):
    """Known from the commit of its settle on; of an id that came twice to the newest, whoever made that one."""
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
    [booked] = await store.apply([reserve("1", who, call(10**12, 10**12))], far)
    assert await store.read_entry("1") == booked.entry
    assert await levels(store) == (Amount(), Amount(10**12, 10**12, 1))


async def test_acts_see_what_other_batches_wrote(store, path):
    """A refusal counts what a batch long ago let in; a repeated reserve finds its entry."""
    [first] = await store.apply([reserve("1", ANN, CALL)], NOON)
    [full, again] = await store.apply([reserve("2", ANN, call(600)), reserve("1", ANN, CALL)], NOON)
    assert isinstance(full, Refused)
    assert full.counters == first.counters
    assert again == first
    assert states(path) == {"1": "open"}


async def test_a_new_window_takes_the_place_of_the_old(store):
    """There is one row for each subject and quota: yesterday's is of no more use."""
    await store.apply([reserve("1", ANN, CALL), SETTLED], NOON)
    [booked] = await store.apply([reserve("2", ANN, call(7))], NOON + DAY)
    assert await store.read_counters(ANN.keys()) == booked.counters
    assert await levels(store) == (Amount(), amount(7))


async def test_a_batch_may_touch_any_number_of_counters(store, path):
    """None is taken for never seen because a statement could not name it: that would forget what was used."""
    many = [quota(f"staff/q{number}", requests=1) for number in range(11_000)]
    who = binding(many)
    await store.apply([reserve("1", who, call(1)), SETTLED], NOON)
    [refused] = await store.apply([reserve("2", who, call(1))], NOON)
    assert isinstance(refused, Refused)
    assert len(refused.decision.blocks) == len(many)
    assert len(await store.read_counters(who.keys())) == len(many)


# ------------------------------------------------------------------------------------------------ whole or not at all


async def test_a_batch_is_one_transaction(store, path):
    """However many acts: their answers share the cost of one commit."""
    operations = [reserve(str(number), ANN, call(1)) for number in range(200)]
    with commits() as seen:
        await store.apply(operations, NOON)
        await store.apply([*(Release(operation.id) for operation in operations), reserve("last", ANN, call(1))], NOON)
    assert len(seen) == 2
    audit(path)


async def test_a_commit_is_on_the_disk(faulty):
    """WAL lets readers read meanwhile; only with synchronous=FULL (2) does a commit outlive a power cut."""
    _, writer = faulty
    assert writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert writer.execute("PRAGMA synchronous").fetchone() == (2,)


def endings():
    """Ends of call 1 which neither rules nor types have stopped from reaching the database."""
    return {
        "too large an integer": unchecked(Settle("1", exactly(1), "complete"), usage=Exactly(Tokens(2**70, 0))),
        "no text": unchecked(Settle("1", exactly(1), "complete"), outcome="\ud800"),
        "no value": unchecked(Settle("1", exactly(1), "complete"), outcome=object()),
        "no number": unchecked(Settle("1", exactly(1), "complete"), usage=Exactly(Tokens("x", 0))),
    }


@pytest.mark.parametrize("kind", endings())
async def test_a_bad_act_leaves_nothing_of_its_batch(store, path, kind):
    """The rest of it can be done again without being done twice."""
    await store.apply([reserve("1", ANN, CALL)], NOON)
    before = contents(path)
    with pytest.raises(Exception) as raised:
        await store.apply([reserve("2", ANN, call(1)), endings()[kind], Release("2")], NOON)
    assert not isinstance(raised.value, StoreUnavailable)
    assert contents(path) == before
    await store.apply([reserve("2", ANN, call(1)), SETTLED], NOON)
    audit(path)


async def test_a_rule_that_raises_leaves_nothing_of_its_batch(store, path):
    """Likewise: the error comes through as it is."""
    before = contents(path)
    with pytest.raises(ZeroDivisionError):
        await store.apply(
            [reserve("1", ANN, CALL), unchecked(reserve("2", ANN, CALL), binding=BrokenBinding())], NOON
        )
    assert contents(path) == before


async def test_what_the_database_would_not_take_is_told_from_what_it_could_not(store, path):
    """A value of no type it knows, or a row that breaks a constraint, will never be taken; repeating is no use."""
    await store.apply([reserve("1", ANN, CALL)], NOON)
    with pytest.raises(StoreRefused, match="not supported"):
        await store.apply([endings()["no value"]], NOON)
    with pytest.raises(StoreRefused, match="NOT NULL"):
        await store.apply([unchecked(reserve("2", ANN, call(1)), owner=None)], NOON)


# ------------------------------------------------------------------------------------------------ when it can't write


FAULTS = [locked, read_only, full, failing_writes, moved, replaced]


@pytest.fixture
async def faulty(path):
    """A store, and the driver's connection through which it writes."""
    store = SqliteStore(path, busy_timeout_s=0)
    with writers() as made:
        await store.open()
    yield store, made[0]
    await store.close()


def many(first, count):
    """Reserves that need many pages together, so that a full disk is noticed."""
    return [reserve(f"{first + number:09}", binding([DAILY], user=f"user {number}"), CALL) for number in range(count)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_a_database_that_cannot_be_written_is_unavailable(faulty, path, fault):
    """Nothing is half done, and once the fault has passed the very same acts are done as if nothing had been."""
    store, writer = faulty
    await store.apply([reserve("1", ANN, CALL)], NOON)
    before = contents(path)
    operations = [SETTLED, *many(1000, 300)]
    with fault(path, writer), pytest.raises(StoreUnavailable):
        await store.apply(operations, NOON)
    assert contents(path) == before
    await store.apply(operations, NOON)
    assert await levels(store) == (Amount(90, 60, 1), Amount())
    assert len(states(path)) == 301
    audit(path)


@pytest.mark.parametrize("fault", [locked, moved, replaced], ids=lambda fault: fault.__name__)
async def test_a_lease_is_not_renewed_where_nothing_can_be_written(faulty, path, fault):
    """So a process without calls notices too."""
    store, writer = faulty
    with fault(path, writer), pytest.raises(StoreUnavailable):
        await store.renew("me", NOON, lease_ms=0)
    await store.renew("me", NOON, lease_ms=0)
    assert rows(path, "owners") == [{"id": "me", "alive_until": NOON}]


async def test_a_write_that_failed_while_committing_may_have_been_done(faulty, path):
    """Whoever asked must see for himself; what failed before that was certainly not done."""
    store, writer = faulty
    with failing_writes(path, writer), pytest.raises(StoreUnavailable, match="I/O") as while_committing:
        await store.apply([reserve("1", ANN, CALL)], NOON)
    with locked(path, writer), pytest.raises(StoreUnavailable, match="locked") as before_that:
        await store.apply([reserve("1", ANN, CALL)], NOON)
    assert while_committing.value.is_uncertain
    assert not before_that.value.is_uncertain


async def test_a_lock_is_asked_for_before_anything_is_decided(faulty, path):
    """A transaction that only reads at first would decide on what somebody else is about to change."""
    store, writer = faulty
    with locked(path, writer), pytest.raises(StoreUnavailable):
        await store.apply([unchecked(reserve("1", ANN, CALL), binding=BrokenBinding())], NOON)


async def test_reading_waits_for_no_writer(store, path):
    """A page is shown while somebody writes, as things stood before."""
    await store.apply([reserve("1", ANN, CALL)], NOON)
    with connected(path) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM counters")
        assert await levels(store) == (Amount(), HELD)
        other.execute("ROLLBACK")


async def test_what_cannot_be_read_is_unavailable(store, path):
    """Somebody has laid hands on the schema."""
    with connected(path) as other:
        other.execute("DROP TABLE counters")
        other.execute("DROP TABLE calls")
    with pytest.raises(StoreUnavailable, match="no such table"):
        await store.read_counters(ANN.keys())
    with pytest.raises(StoreUnavailable, match="no such table"):
        await store.read_entry("1")
    with pytest.raises(StoreUnavailable, match="no such table"):
        await store.orphans("me", NOON, limit=10)


async def test_a_file_that_is_gone_is_not_made_anew_by_reading(faulty, path):
    """Who asks then hears that it is gone, and not that nobody has used anything."""
    store, writer = faulty
    await store.apply([reserve("1", ANN, CALL)], NOON)
    with moved(path, writer):
        with pytest.raises(StoreUnavailable, match="was moved, deleted or replaced"):
            await store.read_counters(ANN.keys())
        with pytest.raises(StoreUnavailable, match="was moved, deleted or replaced"):
            await store.read_entry("1")
        assert not path.exists()
    assert await levels(store) == (Amount(), HELD)


# ---------------------------------------------------------------------------------------------------- owners, orphans


async def test_a_lease_is_written_once_for_each_process(store, path):
    """Renewing moves its end."""
    await store.renew("me", NOON, lease_ms=0)
    await store.renew("you", NOON, lease_ms=1)
    await store.renew("me", NOON + 1, lease_ms=1)
    assert rows(path, "owners") == [{"id": "me", "alive_until": NOON + 2}, {"id": "you", "alive_until": NOON + 1}]


async def test_orphans_are_open_calls_of_others(store):
    """Not one's own, and none that has ended; no more at once than asked for."""
    operations = [replace(reserve(str(number), ANN, call(1)), owner=f"process-{number % 2}") for number in range(8)]
    await store.apply([*operations, Settle("0", exactly(1), "complete"), Release("2"), Expire("1")], NOON)
    assert sorted(await store.orphans("process-0", NOON, limit=10)) == ["3", "5", "7"]
    assert sorted(await store.orphans("process-1", NOON, limit=10)) == ["4", "6"]
    assert sorted(await store.orphans("process-2", NOON, limit=10)) == ["3", "4", "5", "6", "7"]
    assert len(await store.orphans("process-2", NOON, limit=3)) == 3


async def test_of_workers_orphans_are_those_whose_lease_has_run_out(store, path):
    """The others are alive and in the middle of their calls."""
    operations = [replace(reserve(str(number), ANN, call(1)), owner=f"process-{number}") for number in range(3)]
    await store.apply(operations, NOON)
    worker = SqliteStore(path, lock=store.hand_over())
    await worker.open()
    await worker.renew("process-1", NOON, lease_ms=0)
    await worker.renew("process-2", NOON, lease_ms=1)
    assert sorted(await worker.orphans("me", NOON, limit=10)) == ["0", "1"]  # of 0 nobody ever said that it lived
    assert sorted(await worker.orphans("me", NOON + 1, limit=10)) == ["0", "1", "2"]
    assert sorted(await worker.orphans("process-0", NOON, limit=10)) == ["1"]
    assert sorted(await store.orphans("me", NOON, limit=10)) == ["0", "1", "2"]  # who is alone knows better
    await worker.close()


# --------------------------------------------------------------------------------------------------- whose file it is


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


def test_a_second_process_is_refused_until_the_first_is_gone(path):
    """Two that don't know of each other would let in twice as much. A process that is killed lets go too."""
    command = [sys.executable, "-c", OPEN, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "opened\n"
        with pytest.raises(StoreInUse, match=r"Another process is using .*quotas\.db\. Stop it first"):
            asyncio.run(opened_and_closed(path))
        first.send_signal(signal.SIGKILL)
        first.wait()
    asyncio.run(opened_and_closed(path))


async def test_a_lock_that_was_handed_over_outlives_its_store(path):
    """Until the last of those that have it is gone nobody else gets the file."""
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
    """A store of a worker; whether its parent has really locked the file is all the same to it."""
    return SqliteStore(path, busy_timeout_s=0, lock=os.open(os.devnull, os.O_RDONLY))


async def test_workers_make_the_schema_once(path):
    """However many begin at once on a file that is not there yet."""
    workers = [worker_of(path) for _ in range(4)]
    await asyncio.gather(*(worker.open() for worker in workers))
    operations = [reserve(str(number), ANN, call(100)) for number in range(12)]
    answers = await asyncio.gather(
        *(workers[n % 4].apply([operation], NOON) for n, operation in enumerate(operations))
    )
    assert sum(isinstance(answer, Accepted) for [answer] in answers) == 10
    audit(path)
    for worker in workers:
        await worker.close()


async def test_workers_take_turns(path):
    """None writes out of turn, however long it waits; and a turn is given back when its batch fails."""
    first, second = worker_of(path), worker_of(path)
    await first.open()
    await second.open()
    turn = os.open(f"{path}.turn", os.O_RDWR)
    fcntl.flock(turn, fcntl.LOCK_EX)
    waiting = asyncio.get_running_loop().create_task(first.apply([reserve("1", ANN, CALL)], NOON))
    for _ in range(20):
        assert await first.read_entry("1") is None
    assert not waiting.done()
    os.close(turn)
    await waiting
    with pytest.raises(ZeroDivisionError):
        await first.apply([unchecked(reserve("2", ANN, CALL), binding=BrokenBinding())], NOON)
    assert isinstance((await second.apply([SETTLED], NOON))[0], Accepted)
    await first.close()
    await second.close()


async def test_a_file_is_the_same_by_any_name(store, path, tmp_path, monkeypatch):
    """A relative path or a link is no way around."""
    link = tmp_path / "link.db"
    link.symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for name in (link, tmp_path / "sub" / ".." / "quotas.db", Path("quotas.db")):
        other = SqliteStore(name)
        with pytest.raises(StoreInUse):
            await other.open()
        await other.close()


@pytest.mark.parametrize("is_refused", [True, False])
async def test_closing_twice_closes_nothing_of_others(path, tmp_path, is_refused):
    """The number that the lock's file had may be anybody's by now; and no file is left open."""
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


async def test_closing_lets_go_of_the_file(path):
    """The next one finds all there, in one file: the log is folded into it."""
    store = SqliteStore(path)
    await store.open()
    await store.apply([reserve("1", ANN, CALL)], NOON)
    await store.read_entry("1")
    await store.close()
    assert sorted(file.name for file in path.parent.iterdir()) == ["quotas.db", "quotas.db.lock"]
    again = SqliteStore(path)
    await again.open()
    assert states(path) == {"1": "open"}
    await again.close()


async def test_a_newer_schema_is_refused_and_left_alone(path):
    """By the store as by the migrations."""
    store = SqliteStore(path)
    await store.open()
    await store.close()
    with connected(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    before = contents(path)
    older = SqliteStore(path)
    with pytest.raises(NewerSchema):
        await older.open()
    await older.close()
    assert contents(path) == before


async def test_a_migration_that_fails_leaves_the_file_as_it_was(path):
    """Somebody else's table has the name of one of ours: it is theirs, and nothing of ours is put beside it."""
    with connected(path) as connection:
        connection.execute("CREATE TABLE calls (who TEXT)")
    before = contents(path)
    store = SqliteStore(path)
    with pytest.raises(StoreUnavailable, match="calls already exists"):
        await store.open()
    await store.close()
    assert contents(path) == before


def cut_off(path):
    """What a copy that was broken off leaves."""
    os.truncate(path, 5000)


def not_a_database(path):
    path.write_text("groups: {staff: {unlimited: true}}\n" * 100)


def a_directory(path):
    path.unlink()
    path.mkdir()


def nowhere(path):
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()


DAMAGES = [cut_off, not_a_database, a_directory, nowhere]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
async def test_what_is_no_database_is_not_served_from(tmp_path, damage):
    """It says so, and is not quietly replaced by an empty one in which nobody has used anything."""
    path = tmp_path / "data" / "quotas.db"
    path.parent.mkdir()
    store = SqliteStore(path)
    await store.open()
    await store.close()
    damage(path)
    store = SqliteStore(path)
    with pytest.raises(StoreUnavailable):
        await store.open()
    await store.close()
    assert not path.exists() or path.is_dir() or path.stat().st_size in (3500, 5000)


async def test_open_waits_for_nobody(path):
    """A file that is locked while we start is unavailable, as it would be while we serve."""
    with connected(path) as other:
        other.execute("BEGIN EXCLUSIVE")
        store = SqliteStore(path, busy_timeout_s=0)
        with pytest.raises(StoreUnavailable, match="locked"):
            await store.open()
        await store.close()


class Watching(BrokenBinding):
    """A binding that notes in which thread the rules run."""

    def keys(self):
        self.thread = threading.current_thread().name
        return []


async def test_its_thread_is_its_own(store):
    """The one in which batches are applied, so that no other work of the program waits for a disk."""
    watching = Watching()
    with pytest.raises(AttributeError):
        await store.apply([unchecked(reserve("1", ANN, CALL), binding=watching)], NOON)
    assert watching.thread.startswith("ledger")


def test_making_a_store_touches_nothing(path):
    """Until it is opened there is no file."""
    SqliteStore(path)
    assert list(path.parent.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- upkeep

FORGET = ("UPDATE owners SET alive_until = ?1", "DELETE FROM owners WHERE alive_until = ?1")


async def test_upkeep_says_how_many_rows_it_was(store, path):
    """Of its last statement; all of them are one transaction, so that nobody sees a half of it."""
    for owner in ("me", "you"):
        await store.renew(owner, NOON, lease_ms=1)
    with commits() as seen:
        assert await store._run_job(FORGET, 5) == JobResult(2)
    assert len(seen) == 1
    assert rows(path, "owners") == []


async def test_upkeep_that_fails_half_way_did_nothing(store, path):
    """Its first statement is taken back."""
    await store.renew("me", NOON, lease_ms=1)
    with pytest.raises(StoreUnavailable):
        await store._run_job((FORGET[0], "SELECT nothing(?1)"), 5)
    assert [row["alive_until"] for row in rows(path, "owners")] == [NOON + 1]
