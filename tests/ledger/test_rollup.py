"""Usage by day: each call is in the sums of its day once, whatever happens, and old records are deleted.

The tests run on a real SQLite file and on a real PostgreSQL, whose clock shows what the test sets.
"""

import asyncio
import sys
from contextlib import asynccontextmanager
from operator import add, itemgetter

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from proxy.ledger import sqlite
from proxy.ledger.book import Accepted, Expire, Release, Reserve, Settle
from proxy.ledger.entry import CallLabels, call_id_prefix
from proxy.ledger.rollup import Rollup
from proxy.ledger.store import StoreUnavailable
from proxy.policy.amounts import AtLeast, Exactly, Tokens, Unspent
from proxy.policy.policy import Keep
from proxy.server import store_of
from tests.audit import connected, rows
from tests.builders import DAY, NOON, binding, call, quota
from tests.postgres import shared
from tests.sqlite import write_migrated

SUMS = "calls requests input_tokens output_tokens cached_tokens reasoning_tokens estimated".split()
MIDNIGHT = NOON - DAY // 2
LARGE = quota("staff/daily", tokens=10**9)
ENGINES = pytest.mark.parametrize("engine", ["sqlite", "postgresql"])


class Database:
    """A database, its time, and each call that was ever made in it, as the last reply described it."""

    def __init__(self, url, auditor=None):
        self.url = url
        self.store = store_of(url)
        self.now = NOON
        self.set_clock = lambda now: None
        self.entries = {}
        self._auditor = auditor  # a connection to PostgreSQL

    async def apply(self, *operations):
        self.set_clock(self.now)
        for reply in await self.store.apply(operations, self.now):
            if isinstance(reply, Accepted):
                self.entries[reply.entry.id] = reply.entry

    async def reserve(self, *numbers, user="ann", model="small"):
        """Reserve calls that arrive now, and return their ids."""
        ids = [f"{call_id_prefix(self.now)}{number:020x}" for number in numbers]
        labels, who = CallLabels(user, model, "chat", "openai"), binding([LARGE], user=user)
        await self.apply(*(Reserve(entry_id, "process-1", labels, who, call(100, 400)) for entry_id in ids))
        return ids

    async def reserve_and_settle(self, *numbers, **labels):
        """Reserve calls that arrive now, settle them with 90 and 60 tokens, and return their ids."""
        ids = await self.reserve(*numbers, **labels)
        await self.apply(*(Settle(each, Exactly(Tokens(90, 60, 30, 20)), "complete") for each in ids))
        return ids

    async def rows(self, table):
        if self._auditor is None:
            return rows(self.url.removeprefix("sqlite:///"), table)
        return [dict(row) for row in await self._auditor.fetch(f"SELECT * FROM llm_quota_proxy.{table}")]

    async def run(self, statement):
        """Run a statement as an operator would."""
        if self._auditor is None:
            with connected(self.url.removeprefix("sqlite:///")) as connection:
                connection.execute(statement)
        else:
            await self._auditor.execute(f"SET search_path = llm_quota_proxy; {statement}; RESET search_path")

    async def clear(self):
        """Delete all rows and set the time back to noon."""
        for table in ("counters", "calls", "owners", "usage_by_day"):
            await self.run(f"DELETE FROM {table}")
        self.entries, self.now = {}, NOON

    async def days(self):
        """The sums, by day, user, group and model."""
        keys = itemgetter("day", "user_name", "through", "model")
        return {keys(row): [row[name] for name in SUMS] for row in await self.rows("usage_by_day")}

    async def sums(self):
        """The sums, with what the next roll-up has to add to them."""
        sums = await self.days()
        for row in await self.rows("calls"):
            if row["state"] == "open" or row["counted_as"] == row["state"]:
                continue
            used = [row[name] or 0 for name in SUMS[1:-1]]
            more = [1, *used, row["provenance"] == "at_least"]
            if row["counted_as"]:
                assert row["counted_as"] == "expired"
                charged = (1, 1, row["hold_input"], row["hold_output"], 0, 0, 1)
                more = [now - before for now, before in zip(more, charged, strict=True)]
            key = (row["reserved_at"] // DAY * DAY, row["user_name"], row["through"], row["model"])
            sums[key] = [*map(add, sums.get(key, [0] * 7), more)]
        return sums

    async def count(self, limit=100):
        """Count all calls that have ended."""
        while (await self.store.roll_up(limit, None)).rows == limit:
            pass

    async def delete_calls(self, before, limit=100):
        return (await self.store.delete_calls(limit, None, before=before)).rows

    def expected(self):
        """The sums of all ended calls, from the replies."""
        sums = {}
        for entry in self.entries.values():
            if entry.state == "open":
                continue
            tokens = entry.usage.tokens if entry.usage else Tokens(0, 0)
            requests = 0 if entry.usage is None else getattr(entry.usage, "requests", 1)
            used = [tokens.input, tokens.output, tokens.cached, tokens.reasoning, isinstance(entry.usage, AtLeast)]
            key = (entry.reserved_at // DAY * DAY, entry.labels.user, entry.admitted_via, entry.labels.model)
            sums[key] = [a + b for a, b in zip(sums.get(key, [0] * 7), [1, requests, *used], strict=True)]
        return sums


@asynccontextmanager
async def opened(engine, folder):
    """An empty database with our schema, and its open store."""
    if engine == "sqlite":
        write_migrated(folder / "quotas.db")
        database = Database(f"sqlite:///{folder}/quotas.db")
    else:
        clocks = []
        url = await shared().timed(clocks.append)
        database = Database(url, await asyncpg.connect(url))
        [database.set_clock] = clocks
    database.set_clock(database.now)
    await database.store.open()
    try:
        yield database
    finally:
        await database.store.close()
        if database._auditor is not None:
            await database._auditor.close()


@pytest.fixture
async def database(engine, tmp_path):
    async with opened(engine, tmp_path) as database:
        yield database


def rollup(database, **keep):
    return Rollup(database.store, now=lambda: database.now, keep=lambda: Keep(**keep), pause_s=0)


ENDS = st.sampled_from(
    [
        *(
            lambda i: Settle(i, Exactly(Tokens(90, 60, 30, 20)), "complete"),
            lambda i: Settle(i, Unspent(1), "rejected"),
        ),
        *(lambda i: Settle(i, AtLeast(Tokens(90, 6)), "client_left"), Release, Expire, Expire),
    ]
)
STEPS = st.one_of(
    st.tuples(st.just("reserve"), st.sampled_from(["ann", "bob"]), st.sampled_from(["small", "large"])),
    st.tuples(st.just("end"), st.integers(0, 30), ENDS),
    st.tuples(st.just("later"), st.integers(1, 2 * DAY)),
    st.tuples(st.just("count"), st.integers(1, 4)),
    st.tuples(st.just("delete"), st.integers(0, 3 * DAY)),
)


async def play(database, history):
    """Run a history. After each step no call is missing from the sums, and none is in them twice."""
    await database.clear()
    for step, *arguments in history:
        if step == "reserve":
            await database.reserve(len(database.entries), user=arguments[0], model=arguments[1])
        elif step == "end" and database.entries:
            await database.apply(arguments[1](sorted(database.entries)[arguments[0] % len(database.entries)]))
        elif step == "later":
            database.now += arguments[0]
        elif step == "count":
            await database.store.roll_up(arguments[0], None)
        elif step == "delete":
            await database.delete_calls(database.now - arguments[0], limit=3)
        if step in ("end", "count", "delete"):
            assert await database.sums() == database.expected()
    await database.count()
    assert await database.days() == database.expected()


@pytest.fixture
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def one_database(runner, engine, tmp_path):
    """A database for all examples of a test: making one takes longer than a history."""
    opening = opened(engine, tmp_path)
    yield runner.run(opening.__aenter__())
    runner.run(opening.__aexit__(None, None, None))


@ENGINES
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(STEPS, min_size=10, max_size=60))
def test_the_sums_are_those_of_all_calls_ever_made(runner, one_database, history):
    """Whenever and however often calls end, are counted and are deleted."""
    runner.run(play(one_database, history))


@ENGINES
async def test_a_call_belongs_to_the_day_in_which_it_was_reserved(database):
    """To the day in UTC, also if it ends days later. A day begins at midnight."""
    database.now = MIDNIGHT - 1
    [last] = await database.reserve(1)
    database.now = MIDNIGHT
    await database.reserve_and_settle(2, user="bob", model="large")
    database.now += 3 * DAY
    await database.apply(Settle(last, Exactly(Tokens(90, 60)), "complete"))
    await database.count()
    assert await database.days() == {
        (MIDNIGHT - DAY, "ann", "staff", "small"): [1, 1, 90, 60, 0, 0, 0],
        (MIDNIGHT, "bob", "staff", "large"): [1, 1, 90, 60, 30, 20, 0],
    }


@ENGINES
async def test_an_expired_call_that_is_settled_later_is_corrected(database):
    """It was counted with its hold. The roll-up adds the difference, once, and it is no estimate any more."""
    [lost] = await database.reserve(1)
    await database.apply(Expire(lost))
    await database.count()
    assert await database.days() == {(MIDNIGHT, "ann", "staff", "small"): [1, 1, 100, 400, 0, 0, 1]}
    database.now += 5 * DAY
    await database.apply(Settle(lost, Exactly(Tokens(90, 60, 30, 20)), "complete"))
    for _ in range(2):
        await database.count()
        assert await database.days() == {(MIDNIGHT, "ann", "staff", "small"): [1, 1, 90, 60, 30, 20, 0]}


@ENGINES
async def test_several_roll_ups_at_once_count_each_call_once(database):
    """As replicas run them, on connections of their own."""
    await database.reserve_and_settle(*range(60))
    await database.reserve_and_settle(*range(60, 90), user="bob")
    other = store_of(database.url) if database.url.startswith("postgresql") else database.store
    counted = await asyncio.gather(*(store.roll_up(20, None) for store in [database.store, other] * 4))
    await database.count()
    assert sum(result.rows for result in counted) <= 90
    assert await database.days() == database.expected()
    if other is not database.store:
        await other.close()


@ENGINES
async def test_a_roll_up_that_fails_between_adding_and_marking_does_neither(database):
    """The sums were written and the marks were not, so both are rolled back. The next roll-up counts the calls."""
    await database.reserve_and_settle(*range(3))
    if database.url.startswith("sqlite"):
        breaking = "CREATE TRIGGER broken BEFORE UPDATE ON calls BEGIN SELECT RAISE(ABORT, 'broken'); END"
        mending = "DROP TRIGGER broken"
    else:
        breaking = "ALTER TABLE usage_by_day ADD CONSTRAINT broken CHECK (calls < 0)"
        mending = "ALTER TABLE usage_by_day DROP CONSTRAINT broken"
    await database.run(breaking)
    with pytest.raises(Exception, match="broken"):
        await database.count()
    assert await database.days() == {}
    assert {row["counted_as"] for row in await database.rows("calls")} == {None}
    await database.run(mending)
    await database.count()
    assert await database.days() == database.expected()


COUNTING = """
import asyncio, sys
from proxy.server import store_of

async def count():
    store = store_of(sys.argv[1])
    await store.open()
    while True:
        print((await store.roll_up(1, None)).rows, flush=True)

asyncio.run(count())
"""


@ENGINES
async def test_a_process_that_is_killed_while_it_counts_loses_and_repeats_nothing(engine, tmp_path):
    """It is killed with SIGKILL at any moment. The next process continues."""
    async with opened(engine, tmp_path) as database:
        await database.reserve_and_settle(*range(200))
        await database.store.close()  # a SQLite file is for one process
        program = (sys.executable, "-c", COUNTING, database.url)
        counting = await asyncio.create_subprocess_exec(*program, stdout=asyncio.subprocess.PIPE)
        for _ in range(20):
            assert await counting.stdout.readline() == b"1\n"
        counting.kill()
        await counting.wait()
        database.store = store_of(database.url)
        await database.store.open()
        await database.count()
        assert await database.days() == database.expected()


async def test_a_roll_up_whose_connection_breaks_counts_nothing(tmp_path):
    """It waits for a day that another client has locked, and its connection is broken then."""
    async with opened("postgresql", tmp_path) as database:
        await database.reserve_and_settle(*range(3))
        await database.count()
        await database.reserve_and_settle(*range(3, 6))
        waiting = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        connection = await database.store._primary.connect()
        await connection.execute("BEGIN; SELECT FROM llm_quota_proxy.usage_by_day FOR UPDATE")
        counting = asyncio.create_task(database.count())
        while not await connection.fetchval(f"SELECT count(*) {waiting}"):
            pass
        await connection.execute(f"SELECT pg_terminate_backend(pid) {waiting}; COMMIT")
        with pytest.raises(StoreUnavailable):
            await counting
        await connection.close()
        assert [each[0] for each in (await database.days()).values()] == [3]
        await database.count()
        assert await database.days() == database.expected()


@ENGINES
async def test_old_calls_are_deleted_after_they_were_counted(database):
    """In steps. Calls that are open, newer, or not counted yet are kept, and counters do not change."""
    old = await database.reserve_and_settle(*range(5))
    still_open = await database.reserve(5)
    database.now += DAY
    new = await database.reserve_and_settle(6)
    before = database.now - DAY // 2
    counters = await database.rows("counters")
    assert await database.delete_calls(before) == 0
    await database.count()
    assert [await database.delete_calls(before, limit=2) for _ in range(4)] == [2, 2, 1, 0]
    kept = {row["id"] for row in await database.rows("calls")}
    assert kept == {*still_open, *new}
    assert kept.isdisjoint(old)
    assert await database.days() == database.expected()
    assert await database.rows("counters") == counters


@ENGINES
async def test_a_deleted_call_cannot_end_again(database):
    """A process that was paused for so long finds no entry, and nothing is charged."""
    [lost] = await database.reserve(1)
    await database.apply(Expire(lost))
    await database.count()
    await database.delete_calls(database.now + DAY)
    await database.apply(Settle(lost, Exactly(Tokens(9, 6)), "complete"))
    await database.count()
    assert await database.days() == {(MIDNIGHT, "ann", "staff", "small"): [1, 1, 100, 400, 0, 0, 1]}


@ENGINES
async def test_a_run_counts_and_deletes_until_nothing_is_left_to_do(database, monkeypatch):
    """A day is deleted when its end is older than `keep.days`."""
    monkeypatch.setattr("proxy.ledger.rollup._STEP", 2)
    await database.reserve_and_settle(*range(5))
    job = rollup(database, calls_ms=2 * DAY, days_ms=4 * DAY)
    database.now += DAY
    await job.run()
    assert (len(await database.rows("calls")), len(await database.days())) == (5, 1)
    database.now += DAY + 1
    await job.run()
    assert (len(await database.rows("calls")), await database.days()) == (0, database.expected())
    database.now = MIDNIGHT + 5 * DAY
    await job.run()
    assert len(await database.days()) == 1
    database.now += 1
    await job.run()
    assert await database.days() == {}


class RecordingStore:
    """A store that records after which key each step of a job started, and how many rows it touched."""

    def __init__(self, store):
        self.store = store
        self.steps = []

    async def roll_up(self, limit, after):
        return self._record(after, await self.store.roll_up(limit, after))

    async def delete_calls(self, limit, after, *, before):
        return self._record(after, await self.store.delete_calls(limit, after, before=before))

    async def delete_days(self, limit, after, *, before):
        return self._record(after, await self.store.delete_days(limit, after, before=before))

    def _record(self, after, result):
        self.steps.append((after, result.rows))
        return result


async def test_a_step_starts_after_the_last_key_of_the_one_before(tmp_path, monkeypatch):
    """PostgreSQL keeps dead rows in its indexes for a while, and a step from the beginning would read all of them."""
    monkeypatch.setattr("proxy.ledger.rollup._STEP", 2)
    async with opened("postgresql", tmp_path) as database:
        ids = await database.reserve_and_settle(*range(5))
        recording = RecordingStore(database.store)
        database.now += 3 * DAY
        keep = Keep(calls_ms=DAY, days_ms=DAY)
        await Rollup(recording, now=lambda: database.now, keep=lambda: keep, pause_s=0).run()
        steps = [(None, 2), (ids[1], 2), (ids[3], 1)]
        assert recording.steps == [*steps, *steps, (None, 1)]


async def test_a_step_of_days_starts_with_the_day_that_the_last_one_reached(tmp_path):
    """That day may have more rows than one step deletes."""
    async with opened("postgresql", tmp_path) as database:
        for number in range(4):
            await database.reserve_and_settle(number, user=f"user-{number}")
            database.now += DAY * (number == 0)
        await database.count()
        result = await database.store.delete_days(2, None, before=MIDNIGHT + 2 * DAY)
        assert (result.rows, result.last) == (2, str(MIDNIGHT + DAY))
        assert (await database.store.delete_days(9, result.last, before=MIDNIGHT + 2 * DAY)).rows == 2


@ENGINES
async def test_records_that_are_kept_for_ever_are_not_deleted(database):
    """Neither calls nor days, a century later."""
    await database.reserve_and_settle(1)
    database.now += 36_500 * DAY
    await rollup(database, calls_ms=None, days_ms=None).run()
    assert len(await database.rows("calls")) == len(await database.days()) == 1


@ENGINES
async def test_days_are_deleted_in_steps(database):
    """A transaction deletes at most `limit` rows."""
    for number in range(3):
        await database.reserve_and_settle(number, user=f"user-{number}")
    await database.count()
    assert [(await database.store.delete_days(2, None, before=MIDNIGHT + 1)).rows for _ in range(3)] == [2, 1, 0]


async def test_a_run_on_an_unavailable_database_is_only_logged(tmp_path):
    """The next run tries again."""
    async with opened("sqlite", tmp_path) as database:
        (tmp_path / "quotas.db").rename(tmp_path / "elsewhere.db")
        with capture_logs() as logged:
            await rollup(database).run()
        assert [line["event"] for line in logged] == ["the records could not be tended"]


async def test_no_step_scans_a_table(tmp_path):
    """Each reads an index in its order, as SQLite's query plan shows."""
    async with opened("sqlite", tmp_path) as database:
        with connected(database.url.removeprefix("sqlite:///")) as connection:
            for job, parameters in (
                (sqlite.ROLL_UP, (9, None)),
                (sqlite.DELETE_CALLS, (9, None, 1, "req_1")),
                (sqlite.DELETE_DAYS, (9, None, 1)),
            ):
                for statement in job:
                    plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
                    scans = [line for line in plan if line.startswith(("SCAN calls", "SCAN usage_by_day"))]
                    assert [line for line in scans if "calls_uncounted" not in line] == []
