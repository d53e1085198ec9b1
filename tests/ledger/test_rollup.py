"""The records of what was used: each call is in the sums of its day once, whatever happens, and what is old is gone.

On a real SQLite file and a real PostgreSQL, whose clock shows what the test says.
"""

import asyncio
import sys
from contextlib import asynccontextmanager
from operator import add, itemgetter

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

SUMS = "calls requests input_tokens output_tokens cached_tokens reasoning_tokens estimated".split()
MIDNIGHT = NOON - DAY // 2
PLENTY = quota("staff/daily", tokens=10**9)
ENGINES = pytest.mark.parametrize("engine", ["sqlite", "postgresql"])


class Place:
    """A database, the instant that it is there, and every call that was ever made in it as it was last seen."""

    def __init__(self, url):
        self.url = url
        self.store = store_of(url)
        self.now = NOON
        self.tell = lambda now: None
        self.seen = {}

    async def apply(self, *operations):
        self.tell(self.now)
        for answer in await self.store.apply(operations, self.now):
            if isinstance(answer, Accepted):
                self.seen[answer.entry.id] = answer.entry

    async def reserve(self, number, *, user="ann", model="small"):
        """A call that came just now; its id."""
        entry_id = f"{call_id_prefix(self.now)}{number:020x}"
        labels = CallLabels(user, model, "chat", "openai")
        await self.apply(Reserve(entry_id, "process-1", labels, binding([PLENTY], user=user), call(100, 400)))
        return entry_id

    async def ended(self, numbers, **who):
        """Calls that came just now and have used 90 and 60 tokens."""
        ids = [await self.reserve(number, **who) for number in numbers]
        await self.apply(*(Settle(each, Exactly(Tokens(90, 60, 30, 20)), "complete") for each in ids))
        return ids

    async def rows(self, table):
        if self.url.startswith("sqlite"):
            return rows(self.url.removeprefix("sqlite:///"), table)
        return [dict(row) for row in await shared().run(f"SELECT * FROM llm_quota_proxy.{table}", url=self.url)]

    async def run(self, statement):
        """As an operator would."""
        if self.url.startswith("sqlite"):
            with connected(self.url.removeprefix("sqlite:///")) as connection:
                connection.execute(statement)
        else:
            await shared().run("SET search_path = llm_quota_proxy", statement, url=self.url)

    async def days(self):
        """The sums, by day, user, group and model."""
        keys = itemgetter("day", "user_name", "through", "model")
        return {keys(row): [row[name] for name in SUMS] for row in await self.rows("usage_by_day")}

    async def accounted(self):
        """The sums as they are, with what the calls say that were not counted yet as what they are now."""
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
        while (await self.store.roll_up(limit, None)).rows == limit:
            pass

    async def delete(self, before, limit=100):
        return (await self.store.delete_calls(limit, None, before=before)).rows

    def expected(self):
        """The sums as they follow from what the ledger said of each call."""
        sums = {}
        for entry in self.seen.values():
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
    """An empty database."""
    tellers = []
    url = f"sqlite:///{folder}/quotas.db" if engine == "sqlite" else await shared().timed(tellers.append)
    place = Place(url)
    place.tell = tellers[0] if tellers else place.tell
    place.tell(place.now)
    await place.store.open()
    try:
        yield place
    finally:
        await place.store.close()


@pytest.fixture
async def place(engine, tmp_path):
    async with opened(engine, tmp_path) as place:
        yield place


def records(place, **keep):
    return Rollup(place.store, now=lambda: place.now, keep=lambda: Keep(**keep), pause_s=0)


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
    st.tuples(st.just("begin"), st.sampled_from(["ann", "bob"]), st.sampled_from(["small", "large"])),
    st.tuples(st.just("end"), st.integers(0, 30), ENDS),
    st.tuples(st.just("later"), st.integers(1, 2 * DAY)),
    st.tuples(st.just("count"), st.integers(1, 4)),
    st.tuples(st.just("delete"), st.integers(0, 3 * DAY)),
)


async def play(place, history):
    """Live through it, and count what is left; at every moment nothing is missing, and nothing there twice."""
    for what, *how in history:
        if what == "begin":
            await place.reserve(len(place.seen), user=how[0], model=how[1])
        elif what == "end" and place.seen:
            await place.apply(how[1](sorted(place.seen)[how[0] % len(place.seen)]))
        elif what == "later":
            place.now += how[0]
        elif what == "count":
            await place.store.roll_up(how[0], None)
        elif what == "delete":
            await place.delete(place.now - how[0], limit=3)
        if what in ("end", "count", "delete"):
            assert await place.accounted() == place.expected()
    await place.count()


@ENGINES
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(STEPS, min_size=10, max_size=60))
def test_the_sums_are_those_of_all_calls_ever_made(engine, tmp_path_factory, history):
    """Whatever ends when and how often, and however it is counted and deleted meanwhile."""

    async def played():
        async with opened(engine, tmp_path_factory.mktemp("history")) as place:
            await play(place, history)
            assert await place.days() == place.expected()

    asyncio.run(played())


@ENGINES
async def test_a_call_is_of_the_day_in_which_it_was_reserved(place):
    """In UTC, also where it ends days later; a day begins at midnight."""
    place.now = MIDNIGHT - 1
    last = await place.reserve(1)
    place.now = MIDNIGHT
    await place.ended([2], user="bob", model="large")
    place.now += 3 * DAY
    await place.apply(Settle(last, Exactly(Tokens(90, 60)), "complete"))
    await place.count()
    assert await place.days() == {
        (MIDNIGHT - DAY, "ann", "staff", "small"): [1, 1, 90, 60, 0, 0, 0],
        (MIDNIGHT, "bob", "staff", "large"): [1, 1, 90, 60, 30, 20, 0],
    }


@ENGINES
async def test_a_lost_call_that_is_settled_after_all_is_put_right(place):
    """It was counted as what it held; the difference is booked, once, and it is no estimate any more."""
    lost = await place.reserve(1)
    await place.apply(Expire(lost))
    await place.count()
    assert await place.days() == {(MIDNIGHT, "ann", "staff", "small"): [1, 1, 100, 400, 0, 0, 1]}
    place.now += 5 * DAY
    await place.apply(Settle(lost, Exactly(Tokens(90, 60, 30, 20)), "complete"))
    for _ in range(2):
        await place.count()
        assert await place.days() == {(MIDNIGHT, "ann", "staff", "small"): [1, 1, 90, 60, 30, 20, 0]}


@ENGINES
async def test_two_who_count_at_once_count_each_call_once(place):
    """As replicas do, on connections of their own."""
    await place.ended(range(60))
    await place.ended(range(60, 90), user="bob")
    other = store_of(place.url) if place.url.startswith("postgresql") else place.store
    counted = await asyncio.gather(*(store.roll_up(20, None) for store in [place.store, other] * 4))
    await place.count()
    assert sum(done.rows for done in counted) <= 90
    assert await place.days() == place.expected()
    if other is not place.store:
        await other.close()


@ENGINES
async def test_who_is_stopped_between_adding_and_marking_has_done_neither(place):
    """The sums were written, the marks could not be: after that all is as before, and the next one counts."""
    await place.ended(range(3))
    if place.url.startswith("sqlite"):
        broken = "CREATE TRIGGER broken BEFORE UPDATE ON calls BEGIN SELECT RAISE(ABORT, 'broken'); END"
        mended = "DROP TRIGGER broken"
    else:
        broken = "ALTER TABLE usage_by_day ADD CONSTRAINT broken CHECK (calls < 0)"
        mended = "ALTER TABLE usage_by_day DROP CONSTRAINT broken"
    await place.run(broken)
    with pytest.raises(Exception, match="broken"):
        await place.count()
    assert await place.days() == {}
    assert {row["counted_as"] for row in await place.rows("calls")} == {None}
    await place.run(mended)
    await place.count()
    assert await place.days() == place.expected()


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
async def test_a_process_that_is_killed_while_it_counts_loses_nothing_and_repeats_nothing(engine, tmp_path):
    """kill -9, in whatever moment that is; the next one goes on."""
    async with opened(engine, tmp_path) as place:
        await place.ended(range(200))
        await place.store.close()  # a file is for one process
        program = (sys.executable, "-c", COUNTING, place.url)
        counting = await asyncio.create_subprocess_exec(*program, stdout=asyncio.subprocess.PIPE)
        for _ in range(20):
            assert await counting.stdout.readline() == b"1\n"
        counting.kill()
        await counting.wait()
        place.store = store_of(place.url)
        await place.store.open()
        await place.count()
        assert await place.days() == place.expected()


async def test_a_connection_that_breaks_while_counting_counts_nothing(tmp_path):
    """As of a process that is killed: it waits for a day that somebody else has locked, and is cut off."""
    async with opened("postgresql", tmp_path) as place:
        await place.ended(range(3))
        await place.count()
        await place.ended(range(3, 6))
        waiting = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        connection = await place.store._connect()
        await connection.execute("BEGIN; SELECT FROM llm_quota_proxy.usage_by_day FOR UPDATE")
        counting = asyncio.create_task(place.count())
        while not await connection.fetchval(f"SELECT count(*) {waiting}"):
            pass
        await connection.execute(f"SELECT pg_terminate_backend(pid) {waiting}; COMMIT")
        with pytest.raises(StoreUnavailable):
            await counting
        await connection.close()
        assert [each[0] for each in (await place.days()).values()] == [3]
        await place.count()
        assert await place.days() == place.expected()


@ENGINES
async def test_what_is_old_is_deleted_once_it_was_counted(place):
    """In steps; not what is open, nor what came later, nor what nobody has counted yet. Counters stay."""
    old = await place.ended(range(5))
    still_open = await place.reserve(5)
    place.now += DAY
    new = await place.ended([6])
    before = place.now - DAY // 2
    counters = await place.rows("counters")
    assert await place.delete(before) == 0
    await place.count()
    assert [await place.delete(before, limit=2) for _ in range(4)] == [2, 2, 1, 0]
    assert {row["id"] for row in await place.rows("calls")} == {still_open, *new}
    assert old[0] not in {still_open, *new}
    assert await place.days() == place.expected()
    assert await place.rows("counters") == counters


@ENGINES
async def test_a_deleted_call_can_not_be_ended_again(place):
    """A process that was paused for so long finds nothing, and books nothing."""
    lost = await place.reserve(1)
    await place.apply(Expire(lost))
    await place.count()
    await place.delete(place.now + DAY)
    await place.apply(Settle(lost, Exactly(Tokens(9, 6)), "complete"))
    await place.count()
    assert await place.days() == {(MIDNIGHT, "ann", "staff", "small"): [1, 1, 100, 400, 0, 0, 1]}


@ENGINES
async def test_the_chore_does_all_of_it(place, monkeypatch):
    """Counts and deletes until nothing is left to do; days go when they are whole and old enough."""
    monkeypatch.setattr("proxy.ledger.rollup._STEP", 2)
    await place.ended(range(5))
    tended = records(place, calls_ms=2 * DAY, days_ms=4 * DAY)
    place.now += DAY
    await tended.run()
    assert (len(await place.rows("calls")), len(await place.days())) == (5, 1)
    place.now += DAY + 1
    await tended.run()
    assert (len(await place.rows("calls")), await place.days()) == (0, place.expected())
    place.now = MIDNIGHT + 5 * DAY
    await tended.run()
    assert len(await place.days()) == 1
    place.now += 1
    await tended.run()
    assert await place.days() == {}


class Watched:
    """A store, and after which key each piece of upkeep was to begin."""

    def __init__(self, store):
        self.store = store
        self.began = []

    async def roll_up(self, limit, after):
        return self._noted(after, await self.store.roll_up(limit, after))

    async def delete_calls(self, limit, after, *, before):
        return self._noted(after, await self.store.delete_calls(limit, after, before=before))

    async def delete_days(self, limit, after, *, before):
        return self._noted(after, await self.store.delete_days(limit, after, before=before))

    def _noted(self, after, done):
        self.began.append((after, done.rows))
        return done


async def test_a_step_begins_where_the_last_one_ended(tmp_path, monkeypatch):
    """What was done stays in PostgreSQL's indexes for a while: else each step walks over that of all before it."""
    monkeypatch.setattr("proxy.ledger.rollup._STEP", 2)
    async with opened("postgresql", tmp_path) as place:
        ids = await place.ended(range(5))
        watched = Watched(place.store)
        place.now += 3 * DAY
        keep = Keep(calls_ms=DAY, days_ms=DAY)
        await Rollup(watched, now=lambda: place.now, keep=lambda: keep, pause_s=0).run()
        steps = [(None, 2), (ids[1], 2), (ids[3], 1)]
        assert watched.began == [*steps, *steps, (None, 1)]


async def test_days_are_deleted_on_from_the_day_that_was_reached(tmp_path):
    """Which may have more rows than one step deletes."""
    async with opened("postgresql", tmp_path) as place:
        for number in range(4):
            await place.ended([number], user=f"user-{number}")
            place.now += DAY * (number == 0)
        await place.count()
        done = await place.store.delete_days(2, None, before=MIDNIGHT + 2 * DAY)
        assert (done.rows, done.last) == (2, str(MIDNIGHT + DAY))
        assert (await place.store.delete_days(9, done.last, before=MIDNIGHT + 2 * DAY)).rows == 2


@ENGINES
async def test_what_is_kept_for_ever_is_not_deleted(place):
    """Neither the calls nor the days, a century later."""
    await place.ended([1])
    place.now += 36_500 * DAY
    await records(place, calls_ms=None, days_ms=None).run()
    assert len(await place.rows("calls")) == len(await place.days()) == 1


@ENGINES
async def test_many_days_are_deleted_in_steps(place):
    """No more than so many rows in one transaction."""
    for number in range(3):
        await place.ended([number], user=f"user-{number}")
    await place.count()
    assert [(await place.store.delete_days(2, None, before=MIDNIGHT + 1)).rows for _ in range(3)] == [2, 1, 0]


async def test_a_database_that_is_away_is_tended_later(tmp_path):
    """A line in the log, and nothing that stops the chore."""
    async with opened("sqlite", tmp_path) as place:
        (tmp_path / "quotas.db").rename(tmp_path / "elsewhere.db")
        with capture_logs() as logged:
            await records(place).run()
        assert [line["event"] for line in logged] == ["the records could not be tended"]


async def test_no_step_walks_through_the_calls(tmp_path):
    """What is next is found by an index, in its order; SQLite says how it would go about it."""
    async with opened("sqlite", tmp_path) as place:
        with connected(place.url.removeprefix("sqlite:///")) as connection:
            for job, given_values in (
                (sqlite.ROLL_UP, (9, None)),
                (sqlite.DELETE_CALLS, (9, None, 1, "req_1")),
                (sqlite.DELETE_DAYS, (9, None, 1)),
            ):
                for statement in job:
                    plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", given_values)]
                    walks = [line for line in plan if line.startswith(("SCAN calls", "SCAN usage_by_day"))]
                    assert [line for line in walks if "calls_uncounted" not in line] == []
