"""One PostgreSQL database as several ledgers share it: exact, whole or not at all, and by its own clock.

A real server, and real faults: a restart, a connection that is cut off, a server that may not write, a process that
stops in the middle of a batch.
"""

import asyncio
import os
import random
import re
import signal
import struct
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from proxy.ledger.book import Accepted, Expire, Refused, Release, Settle, Unknown
from proxy.ledger.entry import CallLabels
from proxy.ledger.postgres import PostgresStore, Timeouts, begin
from proxy.ledger.schema import HEAD, NewerSchema, metadata
from proxy.ledger.store import JobResult, StoreRefused, StoreUnavailable
from proxy.policy.admission import NeedsCount, Verdict
from proxy.policy.amounts import Amount, AtLeast, Exactly, Tokens, Unspent
from tests.audit import balance
from tests.breakage import BrokenBinding, unchecked
from tests.builders import amount, binding, call, estimated, exactly, extend, quota, reserve
from tests.postgres import shared

ROOT = Path(__file__).resolve().parents[2]
LONG = "365d"  # no window closes while a test runs
DAILY = quota("staff/daily", tokens=1000, per=LONG)
ANN = binding([DAILY])
CALL = call(100, 400)
HELD = Amount(100, 400, 1)
SETTLED = Settle("1", exactly(90, 60), "complete")
MINUTE = 60_000
NO_CLOCK = -1  # of the process: the database has its own
IMPATIENT = Timeouts(connect_ms=600, probe_ms=200, idle_ms=300, lock_ms=600, statement_ms=700, whole_ms=1000)


@pytest.fixture(scope="session")
def server():
    return shared()


@pytest.fixture
async def url(server):
    return await server.fresh()


@asynccontextmanager
async def opened(url, timeouts=None):
    store = PostgresStore(url, timeouts=timeouts)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
async def store(url):
    async with opened(url) as store:
        yield store


class Database:
    """The tables as an auditor reads them, and what an operator does to them."""

    def __init__(self, server, url):
        self.server, self.url = server, url
        self.name = url.partition("?")[0].rpartition("/")[2]

    async def run(self, *statements):
        return await self.server.run(*statements, url=self.url)

    async def rows(self, table):
        return [dict(row) for row in await self.run(f"SELECT * FROM llm_quota_proxy.{table} ORDER BY 1, 2")]

    async def states(self):
        return {row["id"]: row["state"] for row in await self.rows("calls")}

    async def contents(self):
        return [await self.rows(table) for table in ("counters", "calls", "owners")]

    async def audit(self):
        balance(await self.rows("calls"), await self.rows("counters"))

    async def cut_off(self):
        """Break all connections but our own, as a failover does."""
        await self.run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


@pytest.fixture
def database(server, url):
    return Database(server, url)


async def levels(store, each=DAILY, user="ann"):
    """What is used and held of a quota."""
    counter = (await store.read_counters([each.key_for(user)]))[each.key_for(user)]
    return counter.used, counter.held


async def apply(store, *operations):
    return await store.apply(operations, NO_CLOCK)


async def until(condition):
    """Wait for something that comes by itself."""
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 - it is another process that does it
            await asyncio.sleep(0.01)


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
        pytest.param([Settle("1", AtLeast(Tokens(90, 6, 1, 2)), "client_left", response_id="resp_1")], id="at least"),
        pytest.param([Settle("1", Unspent(1), "rejected")], id="a bad request"),
        pytest.param([Release("1")], id="released"),
        pytest.param([extend("1", WATCHED, 850, input_tokens=20), Expire("1")], id="expired"),
        pytest.param([Expire("1"), Settle("1", exactly(90, 60), "stopped")], id="came back"),
    ],
)
@pytest.mark.parametrize("is_one_batch", [False, True])
async def test_a_call_is_read_as_it_was_booked(store, database, ends, is_one_batch):
    """To the last field, through every state, also where the next act is of another transaction."""
    operations = [reserve("1", WATCHED, call(100, 800, 10)), *ends]
    if is_one_batch:
        *_, booked = await apply(store, *operations)
    else:
        *_, booked = [(await apply(store, operation))[0] for operation in operations]
    assert isinstance(booked, Accepted)
    assert (booked.entry.capped_by, booked.entry.would_refuse) == ("staff/6h", ("watch/tiny",))
    assert await store.read_entry("1") == booked.entry
    assert (await store.read_counters(WATCHED.keys())).items() >= booked.counters.items()
    await database.audit()


@pytest.mark.parametrize("name", ["Élodie 李", "o'hara", '"', "[]", "\\", "%s ? :x $1", "~staff", "🦉", "{}", "NULL"])
async def test_names_of_any_kind_are_names(store, database, name):
    """No quoting anywhere turns one into another, or into an instruction."""
    who = replace(ANN, user=name)
    operation = replace(reserve(name, who, CALL), labels=CallLabels(name, name, name, name))
    await apply(store, operation, *(reserve(f"{name}{number}", ANN, call(1)) for number in range(3)))
    [booked] = await apply(store, Settle(name, exactly(90, 60), "complete"))
    assert booked.entry == await store.read_entry(name)
    assert booked.counters == await store.read_counters(who.keys())
    assert await levels(store, user=name) == (Amount(90, 60, 1), Amount())
    await database.audit()


async def test_a_response_leads_to_the_call_that_made_it(store):
    """Known from the commit of its settle on; of an id that came twice to the newest, whoever made that one."""
    bob = replace(ANN, user="bob")
    await apply(store, reserve("1", ANN, CALL), reserve("2", bob, CALL))
    assert await store.find_response_entry("resp_1") is None
    [first] = await apply(store, Settle("1", exactly(1, 1), "complete", response_id="resp_1"))
    assert await store.find_response_entry("resp_1") == first.entry
    [_, second] = await apply(store, Expire("2"), Settle("2", exactly(1, 1), "complete", response_id="resp_1"))
    assert await store.find_response_entry("resp_1") == second.entry
    assert await store.find_response_entry("' OR ''='") is None


async def test_what_is_not_there_is_not_read(store):
    """A user who never called has no counters; a call that nobody made has no entry."""
    assert await store.read_counters(ANN.keys()) == {}
    assert await store.read_counters([]) == {}
    assert await store.read_entry("1") is None
    assert await apply(store, Release("1")) == [Unknown("1")]
    assert await apply(store, extend("1", ANN, 5)) == [Unknown("1")]


async def test_a_refusal_leaves_no_window(store, database):
    """The row that was made to be locked is no counter."""
    [refused] = await apply(store, reserve("1", ANN, call(1001)))
    assert (refused.decision.verdict, refused.counters) == (Verdict.NEVER, {})
    assert await apply(store, reserve("1", ANN, estimated(call(100, 400)))) == [NeedsCount()]
    assert await store.read_counters(ANN.keys()) == {}
    [row] = await database.rows("counters")
    assert set(row.values()) == {"user:ann", "staff/daily", 0}
    assert await database.rows("calls") == []


async def test_acts_see_what_other_processes_wrote(store, url, database):
    """A refusal counts what another let in; a repeated reserve finds its entry."""
    async with opened(url) as other:
        [first] = await apply(other, reserve("1", ANN, CALL))
        [full, again] = await apply(store, reserve("2", ANN, call(600)), reserve("1", ANN, CALL))
    assert isinstance(full, Refused)
    assert full.counters == first.counters
    assert again == first
    assert await database.states() == {"1": "open"}


async def test_the_database_tells_the_time(store, database):
    """Whatever clock a process has: windows, calls and leases go by the one that all share."""
    before = (await database.run("SELECT extract(epoch FROM clock_timestamp()) * 1000"))[0][0]
    [booked] = await store.apply([reserve("1", binding([quota("a/b", tokens=1000, per="6h")]), CALL)], 12345)
    await store.renew("me", 12345, lease_ms=MINUTE)
    after = (await database.run("SELECT extract(epoch FROM clock_timestamp()) * 1000"))[0][0]
    [counter] = booked.counters.values()
    assert before - 1 <= booked.entry.reserved_at == counter.window.opened_at <= after
    [owner] = await database.rows("owners")
    assert before - 1 <= owner["alive_until"] - MINUTE <= after
    [unlimited] = await apply(store, reserve("2", binding(), call(1)))  # where there is no counter to be locked
    assert unlimited.entry.reserved_at >= booked.entry.reserved_at


async def test_a_window_that_is_over_gives_way_to_the_next(store, database):
    """There is one row for each subject and quota: yesterday's is of no more use."""
    await apply(store, reserve("1", ANN, CALL), SETTLED)
    await database.run("UPDATE llm_quota_proxy.counters SET opened_at = 1000, resets_at = 2000")
    [booked] = await apply(store, reserve("2", ANN, call(7)))
    assert await store.read_counters(ANN.keys()) == booked.counters
    assert await levels(store) == (Amount(), amount(7))


async def test_a_batch_may_touch_any_number_of_counters(store):
    """None is taken for never seen because a statement could not name it."""
    many = [quota(f"staff/q{number}", requests=1, per=LONG) for number in range(11_000)]
    who = binding(many)
    await apply(store, reserve("1", who, call(1)), SETTLED)
    [refused] = await apply(store, reserve("2", who, call(1)))
    assert isinstance(refused, Refused)
    assert len(refused.decision.blocks) == len(many)
    assert len(await store.read_counters(who.keys())) == len(many)


async def test_no_batch_walks_through_a_table(url, database):
    """Not even where the server has learned how large it is, and takes walking for cheaper than it is."""
    await PostgresStore(url).open()
    await database.run(
        "INSERT INTO llm_quota_proxy.counters SELECT 'user:' || i, 'staff/daily', 1, 2, 0, 0, 0, 0, 0, 0 "
        "FROM generate_series(1, 20000) AS i",
        "ANALYZE llm_quota_proxy.counters",
    )
    before = await walks(database)
    async with opened(url) as other:  # what a connection has done is told when it ends
        await apply(other, *(reserve(str(each), replace(ANN, user=str(each)), CALL) for each in range(64)))
        await apply(other, *(Settle(str(each), exactly(90, 60), "complete") for each in range(64)))
        await other.read_counters([DAILY.key_for(str(each)) for each in range(64)])
    await until(lambda: all_ended(database))
    assert await walks(database) == before


async def walks(database):
    [[found]] = await database.run("SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'counters'")
    return found


async def all_ended(database):
    [[found]] = await database.run("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
    return found == 1  # our own


# ------------------------------------------------------------------------------------------------ whole or not at all


async def test_a_batch_is_one_transaction(store, database):
    """However many acts: their answers share the cost of one commit."""
    operations = [reserve(str(number), ANN, call(1)) for number in range(200)]
    await apply(store, *operations, *(Release(operation.id) for operation in operations[:100]))
    writers = await database.run(
        "SELECT DISTINCT xmin::text FROM llm_quota_proxy.calls UNION SELECT xmin::text FROM llm_quota_proxy.counters"
    )
    assert len(writers) == 1
    await database.audit()


def endings():
    """Ends of call 1 which neither rules nor types have stopped from reaching the database."""
    return {
        "too large an integer": unchecked(Settle("1", exactly(1), "complete"), usage=Exactly(Tokens(2**70, 0))),
        "no text": unchecked(Settle("1", exactly(1), "complete"), outcome="\ud800"),
        "a zero byte": unchecked(Settle("1", exactly(1), "complete"), outcome="\0"),
        "no value": unchecked(Settle("1", exactly(1), "complete"), outcome=object()),
        "no number": unchecked(Settle("1", exactly(1), "complete"), usage=Exactly(Tokens("x", 0))),
    }


@pytest.mark.parametrize("kind", endings())
async def test_a_bad_act_leaves_nothing_of_its_batch(store, database, kind):
    """The rest of it can be done again without being done twice."""
    await apply(store, reserve("1", ANN, CALL))
    before = await database.contents()
    with pytest.raises(Exception) as raised:
        await apply(store, reserve("2", ANN, call(1)), endings()[kind], Release("2"))
    assert not isinstance(raised.value, StoreUnavailable)
    assert await database.contents() == before
    await apply(store, reserve("2", ANN, call(1)), SETTLED)
    await database.audit()


async def test_a_rule_that_raises_leaves_nothing_of_its_batch(store, database):
    """Likewise: the error comes through as it is, and no lock stays behind."""
    before = await database.contents()
    with pytest.raises(ZeroDivisionError):
        await apply(store, reserve("1", ANN, CALL), unchecked(reserve("2", ANN, CALL), binding=BrokenBinding()))
    assert await database.contents() == before
    assert await locks(database) == 0


async def locks(database):
    """How many connections are in a transaction, beside our own."""
    [[found]] = await database.run(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in trans%'"
    )
    return found


async def test_what_the_database_would_not_take_is_told_from_what_it_could_not(store):
    """A value of no type it knows, or a row that breaks a constraint, will never be taken; repeating is no use."""
    await apply(store, reserve("1", ANN, CALL))
    with pytest.raises(StoreRefused):
        await apply(store, endings()["no value"])
    with pytest.raises(StoreRefused, match="null value"):
        await apply(store, unchecked(reserve("2", ANN, call(1)), owner=None))


# ------------------------------------------------------------------------------------------------------- many at once


async def test_two_processes_share_a_pot_exactly(url, database):
    """A hundred calls through each, for one pot that nobody has touched: as many are let in as fit."""
    pot = binding([quota("team-x/pot", tokens=37 * 500 + 499, shared=True, per=LONG)])
    async with opened(url) as one, opened(url) as other:
        batches = [
            store.apply([reserve(f"{name}-{batch}-{number}", pot, CALL) for number in range(10)], NO_CLOCK)
            for batch in range(10)
            for name, store in (("a", one), ("b", other))
        ]
        answers = [answer for batch in await asyncio.gather(*batches) for answer in batch]
    assert sum(isinstance(answer, Accepted) for answer in answers) == 37
    await database.audit()


async def test_many_processes_with_many_members_never_deadlock(server, url, database):
    """Members' counters and pots in any mixture, first calls and later ones, reserved, grown, settled and expired."""
    quotas = [
        quota(f"g{number % 3}/q{number}", tokens=10**6, per=LONG, shared=number % 2 == 0) for number in range(8)
    ]
    chance = random.Random(7)

    def some():
        return binding(chance.sample(quotas, 3), user=f"user {chance.randrange(6)}")

    async def work(store, name):
        live = []
        for batch in range(40):
            fresh = [(f"{name}-{batch}-{number}", some()) for number in range(5)]
            ends = [Settle(call_id, exactly(1, 2), "complete") for call_id, _ in live[:3]]
            grown = [extend(call_id, who, 30) for call_id, who in live[3:]]
            await apply(store, *ends, *grown, *(reserve(call_id, who, call(5, 10)) for call_id, who in fresh))
            live = [*live[3:], *fresh]
            others = await store.orphans(name, NO_CLOCK, limit=3)
            await apply(store, *(Expire(call_id) for call_id in others))

    stores = [PostgresStore(url) for _ in range(4)]
    await asyncio.gather(*(store.open() for store in stores))
    await asyncio.gather(*(work(store, str(number)) for number, store in enumerate(stores)))
    await asyncio.gather(*(store.close() for store in stores))
    [[deadlocks]] = await database.run(f"SELECT deadlocks FROM pg_stat_database WHERE datname = '{database.name}'")
    assert deadlocks == 0
    assert {state for state in (await database.states()).values()} == {"open", "settled", "expired"}
    await database.audit()


async def test_a_batch_that_collides_is_done_again(url, database):
    """Somebody locks our rows the other way round, and the server breaks our batch off: nobody notices."""
    who = binding([DAILY, quota("staff/other", tokens=10**6, per=LONG)])
    async with opened(url, Timeouts(idle_ms=5000)) as store:
        await apply(store, reserve("1", who, CALL))
        connections = [await connect(database), await connect(database)]
        other = connections[0]
        await other.execute("SET deadlock_timeout = '10s'; BEGIN")  # so that it is our batch that is broken off
        await other.execute("SELECT FROM llm_quota_proxy.calls WHERE id = '1' FOR UPDATE")
        batch = asyncio.create_task(apply(store, SETTLED))
        await until(lambda: is_blocked(connections[1]))
        locking = asyncio.create_task(other.execute("SELECT FROM llm_quota_proxy.counters FOR UPDATE; COMMIT"))
        [booked] = await batch
        await locking
        for connection in connections:
            await connection.close()
    assert booked.entry.state == "settled"
    [[deadlocks]] = await database.run(
        "SELECT pg_stat_clear_snapshot()",
        f"SELECT deadlocks FROM pg_stat_database WHERE datname = '{database.name}'",
    )
    assert deadlocks >= 1
    await database.audit()


async def connect(database):
    return await asyncpg.connect(database.url)


async def is_blocked(connection):
    [[found]] = await connection.fetch(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return found > 0


async def test_a_lock_that_nobody_lets_go_makes_it_unavailable(url, database):
    """After several tries; it was certainly not done."""
    async with opened(url, Timeouts(lock_ms=20)) as store:
        await apply(store, reserve("1", ANN, CALL))
        other = await connect(database)
        await other.execute("BEGIN; SELECT FROM llm_quota_proxy.counters FOR UPDATE")
        with pytest.raises(StoreUnavailable, match="lock timeout") as raised:
            await apply(store, SETTLED)
        assert not raised.value.is_uncertain
        await other.close()
        await apply(store, SETTLED)
    await database.audit()


# ------------------------------------------------------------------------------------------------------ when it fails


async def test_a_connection_that_was_cut_off_is_made_anew(store, database):
    """A batch begins by asking whether it still is there, so nobody notices."""
    await apply(store, reserve("1", ANN, CALL))
    await store.read_entry("1")
    await database.cut_off()
    await apply(store, SETTLED)
    await until(lambda: can_read(store))
    assert await levels(store) == (Amount(90, 60, 1), Amount())


async def can_read(store):
    try:
        return await store.read_entry("1") is not None
    except StoreUnavailable:
        return False


async def test_a_restart_of_the_server_loses_and_doubles_nothing(server, url, database):
    """Pulled out under running batches; what was answered is there, and all else is done again."""
    async with opened(url, IMPATIENT) as one, opened(url, IMPATIENT) as other:
        who, asked = binding([quota("a/b", tokens=10**9, per=LONG)]), []

        async def work(store, name):
            for number in range(400):
                call_id = f"{name}-{number}"
                asked.append(call_id)
                await surely(store, reserve(call_id, who, call(1, 2)))
                await surely(store, Settle(call_id, exactly(1, 1), "complete"))

        working = [asyncio.create_task(work(one, "a")), asyncio.create_task(work(other, "b"))]
        for mode in ("fast", "immediate"):
            before = len(asked)
            await until(lambda least=before + 50: enough(asked, least))
            await asyncio.to_thread(server.stop, mode)
            await asyncio.sleep(0)
            await asyncio.to_thread(server.start)
        await asyncio.gather(*working)
        [counter] = (await one.read_counters(who.keys())).values()
    assert (counter.used, counter.held) == (Amount(800, 800, 800), Amount())
    assert len(await database.rows("calls")) == 800
    await database.audit()


async def enough(asked, least):
    return len(asked) >= least


async def surely(store, operation):
    """As the ledger does: every act may be repeated."""
    while True:
        try:
            return await apply(store, operation)
        except StoreUnavailable:
            await asyncio.sleep(0.01)


async def test_a_server_that_may_not_write_is_unavailable_until_it_may(store, database):
    """As after a failover: the connection is to the one that is no longer the first, so it is made anew each time."""
    await apply(store, reserve("1", ANN, CALL))
    await database.run(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    await database.cut_off()
    with pytest.raises(StoreUnavailable, match="read-only transaction"):
        await apply(store, SETTLED)
    with pytest.raises(StoreUnavailable, match="read-only transaction"):
        await store.renew("me", NO_CLOCK, lease_ms=MINUTE)
    await database.run(
        "SET default_transaction_read_only = off",
        f"ALTER DATABASE {database.name} RESET default_transaction_read_only",
    )
    await apply(store, SETTLED)
    await database.audit()


async def test_a_server_without_a_connection_to_spare_is_unavailable_until_it_has_one(url, database):
    """Others have taken all that it, or our role, may have; it is asked again each time."""
    role = f"role_{database.name}"
    await database.run(f"CREATE ROLE {role} LOGIN", f"CREATE SCHEMA llm_quota_proxy AUTHORIZATION {role}")
    async with opened(url.replace("postgres:@", f"{role}:@")) as store:
        await apply(store, reserve("1", ANN, CALL))
        await database.run(f"ALTER ROLE {role} CONNECTION LIMIT 0")
        await database.cut_off()
        with pytest.raises(StoreUnavailable, match="too many connections"):
            await apply(store, SETTLED)
        with pytest.raises(StoreUnavailable, match="too many connections"):
            await store.read_entry("1")
        await database.run(f"ALTER ROLE {role} CONNECTION LIMIT -1")
        await apply(store, SETTLED)
    await database.audit()


async def test_a_commit_that_is_not_answered_is_uncertain(server, url, database):
    """Here it was done, and waits for a standby that is not there; asking again finds it done."""
    async with opened(url, IMPATIENT) as store:
        await apply(store, reserve("1", ANN, CALL))
        await server.run("ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()")
        try:
            await until(lambda: waits_for_standby(database))
            with pytest.raises(StoreUnavailable, match="did not answer in time") as raised:
                await apply(store, SETTLED)
            assert raised.value.is_uncertain
        finally:
            await server.run("ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()")
        [booked] = await surely(store, SETTLED)
    assert booked.entry.usage == exactly(90, 60)
    await database.audit()


async def waits_for_standby(database):
    [[names]] = await database.run("SHOW synchronous_standby_names")
    return names == "nobody"


async def test_a_connection_that_breaks_while_committing_is_uncertain(store, database):
    """Here it was not done; asking again does it."""
    await apply(store, reserve("1", ANN, CALL))
    await database.run(
        "CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$",
        "CREATE CONSTRAINT TRIGGER cut AFTER UPDATE ON llm_quota_proxy.calls "
        "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION cut()",
    )
    with pytest.raises(StoreUnavailable) as raised:
        await apply(store, SETTLED)
    assert raised.value.is_uncertain
    assert await database.states() == {"1": "open"}
    await database.run("DROP TRIGGER cut ON llm_quota_proxy.calls")
    await apply(store, SETTLED)
    assert await database.states() == {"1": "settled"}
    await database.audit()


async def test_who_is_cancelled_in_a_batch_leaves_no_lock(store, url, database):
    """Its connection goes with it, and the next batch has one of its own."""
    await apply(store, reserve("1", ANN, CALL))
    other = await connect(database)
    await other.execute("BEGIN; SELECT FROM llm_quota_proxy.counters FOR UPDATE")
    watching = await connect(database)
    batch = asyncio.create_task(apply(store, SETTLED))
    await until(lambda: is_blocked(watching))
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    await other.close()
    await watching.close()
    await apply(store, SETTLED)
    await database.audit()


STOPPED = """
import asyncio, os, signal, sys
from proxy.ledger.postgres import PostgresStore, Timeouts
from tests.ledger.test_postgres import ANN, CALL, NO_CLOCK
from tests.builders import reserve

class Stopping:
    # A binding whose reading stops the process in the middle of its transaction.
    def __init__(self): self.asked = 0
    def __getattr__(self, name): return getattr(ANN, name)
    def keys(self):
        self.asked += 1
        if self.asked == 2:
            print("stopping", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        return ANN.keys()

async def main():
    store = PostgresStore(sys.argv[1], timeouts=Timeouts(idle_ms=300))
    await store.open()
    act = reserve("stopped", ANN, CALL)
    object.__setattr__(act, "binding", Stopping())
    try:
        await store.apply([act], NO_CLOCK)
    except Exception as error:
        print(type(error).__name__, flush=True)
    print("tried again", flush=True)
    await store.apply([reserve("stopped", ANN, CALL)], NO_CLOCK)
    await store.close()

asyncio.run(main())
"""


async def test_a_process_that_stops_in_half_a_statement_holds_nobody_up(url, database):
    """To the server it is not idle, as it has begun to ask; the time of its batch runs out, from PostgreSQL 17 on."""
    [[version]] = await database.run("SELECT current_setting('server_version_num')::int")
    if version < 170_000:
        pytest.skip("this server does not know the setting")
    timeouts = Timeouts(lock_ms=20_000, statement_ms=20_000, whole_ms=20_000, batch_ms=300)
    async with opened(url, Timeouts(lock_ms=20_000, statement_ms=20_000, whole_ms=20_000)) as store:
        await apply(store, reserve("1", ANN, CALL))
        stopped = await HalfStatement.begun(url, timeouts)
        await apply(store, SETTLED)
        assert b"transaction timeout" in await stopped.read()
    await database.audit()


class HalfStatement:
    """A client of our own making: it holds locks in a batch, and then sends the first part of a statement only."""

    def __init__(self, reader, writer):
        self._reader, self._writer = reader, writer

    @classmethod
    async def begun(cls, url, timeouts):
        name, folder = re.fullmatch(r".*/(\w+)\?host=(.*)", url).groups()
        it = cls(*await asyncio.open_unix_connection(f"{folder}/.s.PGSQL.5432"))
        start = struct.pack("!I", 0x3_0000) + f"user\0postgres\0database\0{name}\0\0".encode()
        it._writer.write(struct.pack("!I", len(start) + 4) + start)
        await it._ready()
        for query in (begin(timeouts), "SELECT FROM llm_quota_proxy.counters FOR UPDATE"):
            it._send(b"Q", query.encode() + b"\0")
            await it._ready()
        it._send(b"P", b"\0SELECT 1\0\0\0")
        return it

    def _send(self, kind, body):
        self._writer.write(kind + struct.pack("!I", len(body) + 4) + body)

    async def _ready(self):
        kind = b""
        while kind != b"Z":
            kind = await self._reader.readexactly(1)
            await self._reader.readexactly(struct.unpack("!I", await self._reader.readexactly(4))[0] - 4)

    async def read(self):
        """What the server says before it hangs up."""
        try:
            return await self._reader.read()
        finally:
            self._writer.close()


async def test_a_process_that_stops_in_a_batch_holds_nobody_up(store, url, database):
    """Its transaction is broken off by the server; when it goes on it finds that nothing was done, and repeats."""
    command = [sys.executable, "-c", STOPPED, url]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, cwd=ROOT)
    assert await process.stdout.readline() == b"stopping\n"
    await apply(store, reserve("1", ANN, CALL))
    assert await database.states() == {"1": "open"}
    process.send_signal(signal.SIGCONT)
    said = (await process.communicate())[0].split()
    assert said == [b"StoreUnavailable", b"tried", b"again"]
    assert await database.states() == {"1": "open", "stopped": "open"}
    await database.audit()


async def test_what_cannot_be_reached_is_unavailable(url, database):
    """At the start and while serving; its password is never in the words."""
    nowhere = PostgresStore("postgresql://u:sesame@/db?host=/nowhere")
    for ask in (
        nowhere.open(),
        apply(nowhere, Release("1")),
        nowhere.read_entry("1"),
        nowhere.renew("x", 0, lease_ms=1),
    ):
        with pytest.raises(StoreUnavailable) as raised:
            await ask
        assert "sesame" not in str(raised.value)
    await nowhere.close()


@pytest.mark.parametrize("bad", ["?port=sesame", "?sslmode=sesame", "?host=a,b&port=1,2,3"])
async def test_a_url_that_the_driver_cannot_read_is_unavailable(bad):
    """By the start as by a batch; and is not shown."""
    store = PostgresStore(f"postgresql://u:secret@h/db{bad}")
    for ask in (store.open(), apply(store, Release("1"))):
        with pytest.raises(StoreUnavailable) as raised:
            await ask
        assert "secret" not in str(raised.value)
    await store.close()


class Stopped:
    """The server's side of our connections stands still, as where the network is gone and nobody says so."""

    def __init__(self, pids):
        self.pids = pids

    @classmethod
    async def all_of(cls, database):
        found = await database.run(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return cls([row[0] for row in found])

    def __enter__(self):
        for pid in self.pids:
            os.kill(pid, signal.SIGSTOP)

    def __exit__(self, *error):
        for pid in self.pids:
            os.kill(pid, signal.SIGCONT)


async def test_a_connection_that_is_half_open_is_made_anew(url, database):
    """A batch waits only a moment for one that says nothing; nothing was asked of it, so it is done on another."""
    async with opened(url, IMPATIENT) as store:
        await apply(store, reserve("1", ANN, CALL))
        await store.read_entry("1")
        with await Stopped.all_of(database):
            await apply(store, SETTLED)
            with pytest.raises(StoreUnavailable, match="did not answer in time"):
                await store.read_entry("1")
            assert (await store.read_entry("1")).state == "settled"


async def test_closing_waits_only_a_moment_for_one_that_says_nothing(url, database):
    """A stop of the proxy must not hang."""
    async with opened(url, IMPATIENT) as store:
        await apply(store, reserve("1", ANN, CALL))
        with await Stopped.all_of(database):
            await store.close()


async def test_a_rule_that_raises_while_the_connection_is_gone_is_still_what_is_told(url, database):
    """What it had locked goes with the connection."""
    async with opened(url, IMPATIENT) as store:
        await apply(store, reserve("1", ANN, CALL))
        stopped = await Stopped.all_of(database)

        class Breaking(BrokenBinding):
            def keys(self):
                stopped.__enter__()
                return super().keys()

        with pytest.raises(ZeroDivisionError):
            await apply(store, unchecked(reserve("2", ANN, CALL), binding=Breaking()))
        stopped.__exit__()
        await apply(store, SETTLED)
    await database.audit()


async def test_what_cannot_be_read_is_unavailable(store, database):
    """Somebody has laid hands on the schema."""
    await apply(store, reserve("1", ANN, CALL))
    await database.run("DROP SCHEMA llm_quota_proxy CASCADE")
    for ask in (
        store.read_counters(ANN.keys()),
        store.read_entry("1"),
        store.orphans("me", NO_CLOCK, limit=1),
        apply(store, SETTLED),
    ):
        with pytest.raises(StoreUnavailable, match="does not exist"):
            await ask


async def test_a_database_without_our_schema_is_unavailable(url):
    """One that nobody has migrated, or the wrong one."""
    store = PostgresStore(url)
    with pytest.raises(StoreUnavailable, match="does not exist"):
        await apply(store, Release("1"))
    await store.close()


async def test_a_migration_that_fails_leaves_the_database_as_it_was(url, database):
    """Somebody else's table has the name of one of ours: it is theirs, and nothing of ours is put beside it."""
    await database.run("CREATE SCHEMA llm_quota_proxy", "CREATE TABLE llm_quota_proxy.calls (who text)")
    with pytest.raises(StoreUnavailable, match="already exists"):
        await PostgresStore(url).open()
    found = await database.run(
        "SELECT table_name FROM information_schema.tables WHERE table_schema = 'llm_quota_proxy'"
    )
    assert [row[0] for row in found] == ["calls"]


async def test_closing_twice_is_closing_once(store):
    """And what is closed can be opened again by the next batch."""
    await apply(store, reserve("1", ANN, CALL))
    await store.read_entry("1")
    await store.close()
    await store.close()


# ---------------------------------------------------------------------------------------------------- owners, orphans


async def test_orphans_are_open_calls_of_those_whose_lease_has_run_out(store, database):
    """By the database's clock; not one's own, none that has ended, no more at once than asked for."""
    operations = [replace(reserve(str(number), ANN, call(1)), owner=f"process-{number % 4}") for number in range(12)]
    await apply(store, *operations, Settle("0", exactly(1), "complete"), Release("5"), Expire("2"))
    await store.renew("process-0", NO_CLOCK, lease_ms=MINUTE)
    await store.renew("process-1", NO_CLOCK, lease_ms=-1)
    await store.renew("process-2", NO_CLOCK, lease_ms=-1)
    await store.renew("process-2", NO_CLOCK, lease_ms=MINUTE)
    assert await store.orphans("me", NO_CLOCK, limit=10) == ["1", "11", "3", "7", "9"]  # 3 never said that it lived
    assert await store.orphans("process-1", NO_CLOCK, limit=10) == ["11", "3", "7"]
    assert await store.orphans("me", NO_CLOCK, limit=2) == ["1", "11"]


async def test_a_process_that_is_long_dead_is_forgotten(store, database):
    """There is a new name for each start, so the list would only grow."""
    await store.renew("long ago", NO_CLOCK, lease_ms=-8 * 86_400_000)
    await store.renew("yesterday", NO_CLOCK, lease_ms=-86_400_000)
    await store.renew("me", NO_CLOCK, lease_ms=MINUTE)
    assert [row["id"] for row in await database.rows("owners")] == ["me", "yesterday"]


# --------------------------------------------------------------------------------------------------------- the schema


async def test_of_many_that_start_at_once_one_makes_the_schema(url, database):
    """The others wait for it."""
    stores = [PostgresStore(url) for _ in range(4)]
    await asyncio.gather(*(store.open() for store in stores))
    assert await versions(database) == [HEAD]
    await asyncio.gather(*(apply(store, reserve(str(n), ANN, call(1))) for n, store in enumerate(stores)))
    await asyncio.gather(*(store.close() for store in stores))
    await database.audit()


async def test_all_of_ours_is_in_a_schema_of_its_own(store, database):
    """So it can live in a database that has other things in it, under the same names."""
    found = await database.run(
        "SELECT DISTINCT table_schema FROM information_schema.tables "
        "WHERE table_schema NOT IN ('pg_catalog', 'information_schema')"
    )
    assert [row[0] for row in found] == ["llm_quota_proxy"]


async def test_a_newer_schema_is_refused_and_left_alone(store, url, database):
    """After going back to an older release."""
    await database.run("UPDATE llm_quota_proxy.alembic_version SET version_num = '9999'")
    with pytest.raises(NewerSchema):
        await PostgresStore(url).open()
    assert await versions(database) == ["9999"]


async def versions(database):
    return [row["version_num"] for row in await database.run("SELECT * FROM llm_quota_proxy.alembic_version")]


async def test_columns_of_a_later_release_are_no_hindrance(store, database):
    """While replicas are replaced one by one, those of this release run on the schema of the next."""
    await database.run(
        "ALTER TABLE llm_quota_proxy.counters ADD COLUMN used_cost bigint NOT NULL DEFAULT 0",
        "ALTER TABLE llm_quota_proxy.calls ADD COLUMN note text",
        "ALTER TABLE llm_quota_proxy.owners ADD COLUMN host text",
        f"UPDATE llm_quota_proxy.alembic_version SET version_num = '{int(HEAD) + 1:04}'",
    )
    await store.close()
    await store.open()  # as one that died meanwhile, and starts again
    await apply(store, reserve("1", ANN, CALL), SETTLED)
    await store.renew("me", NO_CLOCK, lease_ms=1)
    assert (await store.read_entry("1")).usage == exactly(90, 60)


async def test_who_may_not_make_a_schema_can_be_given_one(server, url, database):
    """An operator makes it, and its owner is the proxy's own user."""
    role = f"role_{database.name}"
    await database.run(f"CREATE ROLE {role} LOGIN", f"CREATE SCHEMA llm_quota_proxy AUTHORIZATION {role}")
    async with opened(url.replace("postgres:@", f"{role}:@")) as store:
        await apply(store, reserve("1", ANN, CALL))
    await database.audit()


async def test_migrations_make_the_tables_that_we_use(store, database):
    """The same columns as the statements are written for."""
    found = await database.run(
        "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns "
        "WHERE table_schema = 'llm_quota_proxy' AND table_name <> 'alembic_version'"
    )
    assert {tuple(row) for row in found} == {
        (table.name, column.name, str(column.type).lower(), "YES" if column.nullable else "NO")
        for table in metadata.tables.values()
        for column in table.columns
    }


async def test_upkeep_is_one_statement_that_says_how_many_rows_it_was(store, database):
    """Beside the batches, on a connection that reads for pages otherwise."""
    await store.renew("me", NO_CLOCK, lease_ms=MINUTE)
    job = (
        "WITH gone AS (DELETE FROM llm_quota_proxy.owners WHERE id = $1::text RETURNING id) "
        "SELECT count(*), max(id) FROM gone"
    )
    done = [await store._run_job(job, who) for who in ("you", "me", "me")]
    assert done == [JobResult(0), JobResult(1, "me"), JobResult(0)]
    assert await database.rows("owners") == []


async def test_upkeep_that_fails_did_nothing(store, database):
    """Its transaction goes with its connection, and the next one is done on another."""
    await store.renew("me", NO_CLOCK, lease_ms=MINUTE)
    gone = "WITH gone AS (DELETE FROM llm_quota_proxy.owners RETURNING 1) SELECT 1 / (count(*) - 1), NULL FROM gone"
    with pytest.raises(StoreUnavailable, match="division by zero"):
        await store._run_job(gone)
    assert len(await database.rows("owners")) == 1
    assert await store._run_job("SELECT 5, NULL") == JobResult(5)
