"""The PostgreSQL store: batches of several processes are exact, all or nothing, and decided by the database's clock.

The tests use a real server and real faults: a restart, a broken connection, a read-only server, a process that stops
in the middle of a batch.
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
from importlib import import_module
from pathlib import Path

import asyncpg
import pytest
from structlog.testing import capture_logs

from proxy.config.loader import load_text
from proxy.ledger.book import Accepted, Expire, Refused, Release, Settle, Unknown
from proxy.ledger.entry import CallLabels
from proxy.ledger.postgres import (
    READ_COUNTERS,
    READ_ORPHANS,
    READ_RESPONSE_CALL,
    WRITER_STATEMENTS,
    PostgresStore,
    begin,
)
from proxy.ledger.primary import Timeouts
from proxy.ledger.rows import CHANGING
from proxy.ledger.schema import HEAD, NewerSchema, metadata
from proxy.ledger.store import JobResult, StoreRefused, StoreUnavailable
from proxy.policy.admission import NeedsCount, Verdict
from proxy.policy.amounts import Amount, AtLeast, Exactly, Tokens, Unspent
from tests.audit import balance
from tests.breakage import BrokenBinding, unchecked
from tests.builders import amount, binding, call, entry_in, estimated, exactly, extend, quota, reserve
from tests.postgres import shared, url_name

ROOT = Path(__file__).resolve().parents[2]
LONG = "365d"  # no such window closes while a test runs
DAILY = quota("staff/daily", tokens=1000, per=LONG)
ANN = binding([DAILY])
CALL = call(100, 400)
HELD = Amount(100, 400, 1)
SETTLED = Settle("1", exactly(90, 60), "complete")
MINUTE = 60_000
NO_CLOCK = -1  # the database has a clock, so the process passes none
SHORT = Timeouts(connect_ms=600, probe_ms=200, idle_ms=300, lock_ms=600, statement_ms=700, whole_ms=1000)


@pytest.fixture(scope="session")
def server():
    return shared()


@pytest.fixture
async def url(server):
    """A database with our schema."""
    return await server.migrated()


@pytest.fixture
async def empty_url(server):
    """An empty database, for tests of the migrations."""
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
    """What an auditor reads from a database, and what an operator does to it."""

    def __init__(self, server, url):
        self.server, self.url = server, url
        self.name = url_name(url)

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

    async def break_connections(self):
        """Break all other connections to this database, as a failover does."""
        await self.run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    async def has_no_connections(self):
        """Whether no other connection is open. What a connection adds to the statistics is complete when it ends."""
        [[found]] = await self.run("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
        return found == 1  # our own


@pytest.fixture
def database(server, url):
    return Database(server, url)


@pytest.fixture
def empty_database(server, empty_url):
    return Database(server, empty_url)


async def levels(store, each=DAILY, user="ann"):
    """What is used and what is held of a quota."""
    counter = (await store.read_counters([each.key_for(user)]))[each.key_for(user)]
    return counter.used, counter.held


async def apply(store, *operations):
    return await store.apply(operations, NO_CLOCK)


async def until(condition):
    """Wait until another process or task has made a condition true."""
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 - another process sets no event
            await asyncio.sleep(0.01)


# --------------------------------------------------------------------------------------------------------- statements


@pytest.mark.parametrize("statement", [*WRITER_STATEMENTS.values(), READ_COUNTERS, READ_RESPONSE_CALL, READ_ORPHANS])
async def test_each_statement_fits_the_migrated_tables(database, statement):
    """The server finds all tables, columns and types, whatever its search path is."""
    async with connected(database) as connection:
        await connection.execute("SET search_path TO nowhere")
        await connection.prepare(statement)


async def test_a_transaction_begins_with_its_settings_and_they_end_with_it(database):
    """Behind a connection pool the next transaction belongs to another program."""
    names = ("idle_in_transaction_session_timeout", "lock_timeout", "statement_timeout", "enable_seqscan")

    async def settings():
        return [await connection.fetchval(f"SHOW {name}") for name in names]

    async with connected(database) as connection:
        before = await settings()
        await connection.execute(begin(Timeouts(idle_ms=1001, lock_ms=1002, statement_ms=1003)))
        assert await settings() == ["1001ms", "1002ms", "1003ms", "off"]
        await connection.execute("COMMIT")
        assert await settings() == before


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
        pytest.param([Settle("1", Unspent(1), "rejected")], id="rejected"),
        pytest.param([Release("1")], id="released"),
        pytest.param([extend("1", WATCHED, 850, input_tokens=20), Expire("1")], id="expired"),
        pytest.param([Expire("1"), Settle("1", exactly(90, 60), "stopped")], id="expired, then settled"),
    ],
)
@pytest.mark.parametrize("is_one_batch", [False, True])
async def test_an_entry_is_read_as_it_was_written(store, database, ends, is_one_batch):
    """Equal to the last field, in every state, in one transaction or in several."""
    operations = [reserve("1", WATCHED, call(100, 800, 10)), *ends]
    if is_one_batch:
        *_, reply = await apply(store, *operations)
    else:
        *_, reply = [(await apply(store, operation))[0] for operation in operations]
    assert isinstance(reply, Accepted)
    assert (reply.entry.capped_by, reply.entry.would_refuse) == ("staff/6h", ("watch/tiny",))
    assert await entry_in(store, "1") == reply.entry
    assert (await store.read_counters(WATCHED.keys())).items() >= reply.counters.items()
    await database.audit()


@pytest.mark.parametrize("name", ["Élodie 李", "o'hara", '"', "[]", "\\", "%s ? :x $1", "~staff", "🦉", "{}", "NULL"])
async def test_a_name_may_have_any_characters(store, database, name):
    """No quoting turns it into another name or into SQL."""
    who = replace(ANN, user=name)
    operation = replace(reserve(name, who, CALL), labels=CallLabels(name, name, name, name))
    await apply(store, operation, *(reserve(f"{name}{number}", ANN, call(1)) for number in range(3)))
    [reply] = await apply(store, Settle(name, exactly(90, 60), "complete"))
    assert reply.entry == await entry_in(store, name)
    assert reply.counters == await store.read_counters(who.keys())
    assert await levels(store, user=name) == (Amount(90, 60, 1), Amount())
    await database.audit()


async def test_a_response_leads_to_the_call_that_made_it(store):
    """From the commit of the settle on. If an id was used twice, to the newer call, even of another user."""
    bob = replace(ANN, user="bob")
    await apply(store, reserve("1", ANN, CALL), reserve("2", bob, CALL))
    assert await store.find_response_entry("resp_1") is None
    [first] = await apply(store, Settle("1", exactly(1, 1), "complete", response_id="resp_1"))
    assert await store.find_response_entry("resp_1") == first.entry
    [_, second] = await apply(store, Expire("2"), Settle("2", exactly(1, 1), "complete", response_id="resp_1"))
    assert await store.find_response_entry("resp_1") == second.entry
    assert await store.find_response_entry("' OR ''='") is None


async def test_the_newest_of_several_calls_with_one_response_is_found_by_its_index(store, database):
    """By the time of the call, whichever was settled last. One row is read, however many there are."""
    await apply(store, *(reserve(f"{number}", ANN, call(1)) for number in range(1, 5)))
    for number in (4, 1, 3, 2):
        await apply(store, Settle(f"{number}", exactly(1, 1), "complete", response_id="resp_1"))
    found = await store.find_response_entry("resp_1")
    assert found.id == "4"
    async with connected(database) as connection:
        await connection.execute("SET enable_seqscan TO off; SET enable_sort TO off")
        assert len(await connection.fetch(READ_RESPONSE_CALL, "resp_1")) == 1
        plan = [row[0] for row in await connection.fetch(f"EXPLAIN {READ_RESPONSE_CALL}", "resp_1")]
    assert "Limit" in plan[0]
    assert "Index Scan Backward using calls_by_response" in plan[1]


async def test_a_user_without_calls_has_no_counters_and_an_unknown_call_no_entry(store):
    """Operations on an unknown call reply Unknown."""
    assert await store.read_counters(ANN.keys()) == {}
    assert await store.read_counters([]) == {}
    assert await entry_in(store, "1") is None
    assert await apply(store, Release("1")) == [Unknown("1")]
    assert await apply(store, extend("1", ANN, 5)) == [Unknown("1")]


async def test_a_refused_call_opens_no_window(store, database):
    """The row that was made to be locked does not count as a counter."""
    [refused] = await apply(store, reserve("1", ANN, call(1001)))
    assert (refused.decision.verdict, refused.counters) == (Verdict.NEVER, {})
    assert await apply(store, reserve("1", ANN, estimated(call(100, 400)))) == [NeedsCount()]
    assert await store.read_counters(ANN.keys()) == {}
    [row] = await database.rows("counters")
    assert set(row.values()) == {"user:ann", "staff/daily", 0}
    assert await database.rows("calls") == []


async def test_a_batch_sees_what_other_processes_wrote(store, url, database):
    """A call is refused because of what another process admitted; a repeated reserve finds its entry."""
    async with opened(url) as other:
        [first] = await apply(other, reserve("1", ANN, CALL))
        [full, again] = await apply(store, reserve("2", ANN, call(600)), reserve("1", ANN, CALL))
    assert isinstance(full, Refused)
    assert full.counters == first.counters
    assert again == first
    assert await database.states() == {"1": "open"}


async def test_the_clock_of_the_database_decides(store, database):
    """Whatever `now` a process passes."""
    before = (await database.run("SELECT extract(epoch FROM clock_timestamp()) * 1000"))[0][0]
    [reply] = await store.apply([reserve("1", binding([quota("a/b", tokens=1000, per="6h")]), CALL)], 12345)
    renewed_at = await store.renew("me", 12345, lease_ms=MINUTE)
    after = (await database.run("SELECT extract(epoch FROM clock_timestamp()) * 1000"))[0][0]
    [counter] = reply.counters.values()
    assert before - 1 <= reply.entry.reserved_at == counter.window.opened_at <= after
    [owner] = await database.rows("owners")
    assert before - 1 <= owner["alive_until"] - MINUTE == renewed_at <= after
    assert reply.decided_at == reply.entry.reserved_at
    [unlimited] = await apply(store, reserve("2", binding(), call(1)))  # no counter has to be locked
    assert unlimited.entry.reserved_at >= reply.entry.reserved_at


async def test_a_new_window_replaces_the_one_that_ended(store, database):
    """There is one row for each subject and quota."""
    await apply(store, reserve("1", ANN, CALL), SETTLED)
    await database.run("UPDATE llm_quota_proxy.counters SET opened_at = 1000, resets_at = 2000")
    [reply] = await apply(store, reserve("2", ANN, call(7)))
    assert await store.read_counters(ANN.keys()) == reply.counters
    assert await levels(store) == (Amount(), amount(7))


async def test_a_batch_may_touch_any_number_of_counters(url):
    """More than a statement may have parameters, so none is missed and taken for unused."""
    many = [quota(f"staff/q{number}", requests=1, per=LONG) for number in range(11_000)]
    who = binding(many)
    minute = 60_000  # on a busy machine the rules alone take seconds, for which the server waits
    long = Timeouts(idle_ms=minute, lock_ms=minute, statement_ms=minute, batch_ms=minute, whole_ms=minute)
    async with opened(url, long) as store:
        await apply(store, reserve("1", who, call(1)), SETTLED)
        [refused] = await apply(store, reserve("2", who, call(1)))
        assert isinstance(refused, Refused)
        assert len(refused.decision.blocks) == len(many)
        assert len(await store.read_counters(who.keys())) == len(many)


async def test_no_batch_scans_a_table(url, database):
    """Also after an analysis of the table, with which the planner would prefer a scan."""
    await database.run(
        "INSERT INTO llm_quota_proxy.counters SELECT 'user:' || i, 'staff/daily', 1, 2, 0, 0, 0, 0, 0, 0 "
        "FROM generate_series(1, 20000) AS i",
        "ANALYZE llm_quota_proxy.counters",
    )
    before = await scans(database)
    async with opened(url) as other:
        await apply(other, *(reserve(str(each), replace(ANN, user=str(each)), CALL) for each in range(64)))
        await apply(other, *(Settle(str(each), exactly(90, 60), "complete") for each in range(64)))
        await other.read_counters([DAILY.key_for(str(each)) for each in range(64)])
    await until(database.has_no_connections)
    assert await scans(database) == before


async def scans(database):
    [[found]] = await database.run("SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'counters'")
    return found


# ----------------------------------------------------------------------------------------------------- all or nothing


async def test_a_batch_is_one_transaction(store, database):
    """However many operations it has, they share the cost of one commit."""
    operations = [reserve(str(number), ANN, call(1)) for number in range(200)]
    await apply(store, *operations, *(Release(operation.id) for operation in operations[:100]))
    writers = await database.run(
        "SELECT DISTINCT xmin::text FROM llm_quota_proxy.calls UNION SELECT xmin::text FROM llm_quota_proxy.counters"
    )
    assert len(writers) == 1
    await database.audit()


def invalid_ends():
    """Ends of call 1 that pass all our checks and that the driver or the server rejects."""
    return {
        "too large an integer": unchecked(Settle("1", exactly(1), "complete"), usage=Exactly(Tokens(2**70, 0))),
        "no valid text": unchecked(Settle("1", exactly(1), "complete"), outcome="\ud800"),
        "a zero byte": unchecked(Settle("1", exactly(1), "complete"), outcome="\0"),
        "no value of the database": unchecked(Settle("1", exactly(1), "complete"), outcome=object()),
        "no number": unchecked(Settle("1", exactly(1), "complete"), usage=Exactly(Tokens("x", 0))),
    }


@pytest.mark.parametrize("kind", invalid_ends())
async def test_nothing_of_a_batch_with_an_invalid_operation_is_written(store, database, kind):
    """So the others can be repeated and are not applied twice."""
    await apply(store, reserve("1", ANN, CALL))
    before = await database.contents()
    with pytest.raises(Exception) as raised:
        await apply(store, reserve("2", ANN, call(1)), invalid_ends()[kind], Release("2"))
    assert not isinstance(raised.value, StoreUnavailable)
    assert await database.contents() == before
    await apply(store, reserve("2", ANN, call(1)), SETTLED)
    await database.audit()


async def test_nothing_of_a_batch_in_which_a_rule_raises_is_written(store, database):
    """The exception is raised as it is, and no lock is left."""
    before = await database.contents()
    with pytest.raises(ZeroDivisionError):
        await apply(store, reserve("1", ANN, CALL), unchecked(reserve("2", ANN, CALL), binding=BrokenBinding()))
    assert await database.contents() == before
    assert await open_transactions(database) == 0


async def open_transactions(database):
    """How many other connections are in a transaction."""
    [[found]] = await database.run(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in trans%'"
    )
    return found


async def test_a_value_that_the_database_rejects_raises_store_refused(store):
    """A value of an unknown type, or a row that violates a constraint, is rejected now and later."""
    await apply(store, reserve("1", ANN, CALL))
    with pytest.raises(StoreRefused):
        await apply(store, invalid_ends()["no value of the database"])
    with pytest.raises(StoreRefused, match="null value"):
        await apply(store, unchecked(reserve("2", ANN, call(1)), owner=None))


# --------------------------------------------------------------------------------------------- many processes at once


async def test_two_processes_admit_exactly_as_many_calls_as_fit_into_a_shared_quota(url, database):
    """T62: a hundred calls through each of them, for a quota that was not used before."""
    who = binding([quota("team-x/pot", tokens=37 * 500 + 499, shared=True, per=LONG)])
    async with opened(url) as one, opened(url) as other:
        batches = [
            store.apply([reserve(f"{name}-{batch}-{number}", who, CALL) for number in range(10)], NO_CLOCK)
            for batch in range(10)
            for name, store in (("a", one), ("b", other))
        ]
        answers = [answer for batch in await asyncio.gather(*batches) for answer in batch]
    assert sum(isinstance(answer, Accepted) for answer in answers) == 37
    await database.audit()


async def test_many_processes_with_many_members_never_deadlock(server, url, database):
    """T59: counters of members and of groups in any mixture; first and later calls; every operation."""
    quotas = [
        quota(f"g{number % 3}/q{number}", tokens=10**6, per=LONG, shared=number % 2 == 0) for number in range(8)
    ]
    chance = random.Random(7)

    def some():
        return binding(chance.sample(quotas, 3), user=f"user {chance.randrange(6)}")

    async def work(store, name):
        in_flight = []
        for batch in range(40):
            fresh = [(f"{name}-{batch}-{number}", some()) for number in range(5)]
            ends = [Settle(call_id, exactly(1, 2), "complete") for call_id, _ in in_flight[:3]]
            extends = [extend(call_id, who, 30) for call_id, who in in_flight[3:]]
            await apply(store, *ends, *extends, *(reserve(call_id, who, call(5, 10)) for call_id, who in fresh))
            in_flight = [*in_flight[3:], *fresh]
            others = await store.orphans(name, NO_CLOCK, limit=3)
            await apply(store, *(Expire(call_id) for call_id in others))

    stores = [PostgresStore(url) for _ in range(4)]
    await asyncio.gather(*(store.open() for store in stores))
    await asyncio.gather(*(work(store, str(number)) for number, store in enumerate(stores)))
    await asyncio.gather(*(store.close() for store in stores))
    await until(database.has_no_connections)
    [[deadlocks]] = await database.run(f"SELECT deadlocks FROM pg_stat_database WHERE datname = '{database.name}'")
    assert deadlocks == 0
    assert {state for state in (await database.states()).values()} == {"open", "settled", "expired"}
    await database.audit()


async def test_a_batch_that_is_a_victim_of_a_deadlock_is_repeated(url, database):
    """T59: another client locks our rows in the opposite order, and the server cancels our batch. It is run again."""
    who = binding([DAILY, quota("staff/other", tokens=10**6, per=LONG)])
    async with (
        opened(url, Timeouts(idle_ms=5000)) as store,
        connected(database) as other,
        connected(database) as watching,
    ):
        await apply(store, reserve("1", who, CALL))
        await other.execute(
            "SET deadlock_timeout = '10s'; BEGIN"
        )  # so that the server cancels our batch and not this
        await other.execute("SELECT FROM llm_quota_proxy.calls WHERE id = '1' FOR UPDATE")
        batch = asyncio.create_task(apply(store, SETTLED))
        await until(lambda: is_blocked(watching))
        locking = asyncio.create_task(other.execute("SELECT FROM llm_quota_proxy.counters FOR UPDATE; COMMIT"))
        [reply] = await batch
        await locking
    assert reply.entry.state == "settled"
    await until(database.has_no_connections)
    [[deadlocks]] = await database.run(
        "SELECT pg_stat_clear_snapshot()",
        f"SELECT deadlocks FROM pg_stat_database WHERE datname = '{database.name}'",
    )
    assert deadlocks >= 1
    await database.audit()


@asynccontextmanager
async def connected(database):
    connection = await asyncpg.connect(database.url)
    try:
        yield connection
    finally:
        await connection.close()


async def is_blocked(connection):
    [[found]] = await connection.fetch(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return found > 0


async def test_a_lock_that_is_never_freed_raises_store_unavailable(url, database):
    """After several runs. The error is not uncertain: nothing was committed."""
    async with opened(url, Timeouts(lock_ms=20)) as store:
        await apply(store, reserve("1", ANN, CALL))
        async with connected(database) as other:
            await other.execute("BEGIN; SELECT FROM llm_quota_proxy.counters FOR UPDATE")
            with pytest.raises(StoreUnavailable, match="lock timeout") as raised:
                await apply(store, SETTLED)
            assert not raised.value.is_uncertain
        await apply(store, SETTLED)
    await database.audit()


# ----------------------------------------------------------------------------------------------------------- failures


async def test_a_connection_that_has_broken_is_replaced(store, database):
    """T58: a batch notices it when it begins, so its caller sees no error."""
    await apply(store, reserve("1", ANN, CALL))
    await store.find_response_entry("resp_1")
    await database.break_connections()
    await apply(store, SETTLED)
    await until(lambda: can_read(store))
    assert await levels(store) == (Amount(90, 60, 1), Amount())


async def can_read(store):
    try:
        return bool(await store.read_counters(ANN.keys()))
    except StoreUnavailable:
        return False


async def test_a_restart_of_the_server_loses_and_doubles_nothing(server, url, database):
    """T58: the server stops during batches, twice. What was answered is stored, and everything else is repeated."""
    async with opened(url, SHORT) as one, opened(url, SHORT) as other:
        who, begun = binding([quota("a/b", tokens=10**9, per=LONG)]), []

        async def work(store, name):
            for number in range(400):
                call_id = f"{name}-{number}"
                begun.append(call_id)
                await apply_until_done(store, reserve(call_id, who, call(1, 2)))
                await apply_until_done(store, Settle(call_id, exactly(1, 1), "complete"))

        working = [asyncio.create_task(work(one, "a")), asyncio.create_task(work(other, "b"))]
        for mode in ("fast", "immediate"):
            before = len(begun)
            await until(lambda least=before + 50: has_reached(begun, least))
            await asyncio.to_thread(server.stop, mode)
            await asyncio.sleep(0)
            await asyncio.to_thread(server.start)
        await asyncio.gather(*working)
        [counter] = (await one.read_counters(who.keys())).values()
    assert (counter.used, counter.held) == (Amount(800, 800, 800), Amount())
    assert len(await database.rows("calls")) == 800
    await database.audit()


async def has_reached(items, least):
    return len(items) >= least


async def apply_until_done(store, operation):
    """Repeat an operation while the database is unavailable, as the ledger does."""
    while True:
        try:
            return await apply(store, operation)
        except StoreUnavailable:
            await asyncio.sleep(0.01)


async def test_a_read_only_server_is_unavailable_until_it_may_write(store, database):
    """As after a failover, when a connection leads to the old primary: each batch makes a new connection."""
    await apply(store, reserve("1", ANN, CALL))
    await database.run(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    await database.break_connections()
    with pytest.raises(StoreUnavailable, match=r"read-only transaction.*write the host of the primary"):
        await apply(store, SETTLED)
    with pytest.raises(StoreUnavailable, match="read-only transaction"):
        await store.renew("me", NO_CLOCK, lease_ms=MINUTE)
    await database.run(
        "SET default_transaction_read_only = off",
        f"ALTER DATABASE {database.name} RESET default_transaction_read_only",
    )
    await apply(store, SETTLED)
    await database.audit()


async def test_a_server_without_a_free_connection_is_unavailable_until_it_has_one(empty_url, empty_database):
    """T58: others use all connections that the server, or our role, may have. Each batch tries again."""
    database = empty_database
    role = f"role_{database.name}"
    await database.run(f"CREATE ROLE {role} LOGIN", f"CREATE SCHEMA llm_quota_proxy AUTHORIZATION {role}")
    async with opened(empty_url.replace("postgres:@", f"{role}:@")) as store:
        await apply(store, reserve("1", ANN, CALL))
        await database.run(f"ALTER ROLE {role} CONNECTION LIMIT 0")
        await database.break_connections()
        with pytest.raises(StoreUnavailable, match=r"too many connections.*raise max_connections"):
            await apply(store, SETTLED)
        with pytest.raises(StoreUnavailable, match="too many connections"):
            await store.find_response_entry("resp_1")
        await database.run(f"ALTER ROLE {role} CONNECTION LIMIT -1")
        await apply(store, SETTLED)
    await database.audit()


async def test_a_commit_without_a_reply_is_uncertain(server, url, database):
    """It was done, but the server waits for a standby that does not exist. Repeating it changes nothing."""
    async with opened(url, SHORT) as store:
        await apply(store, reserve("1", ANN, CALL))
        await server.run("ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()")
        try:
            await until(lambda: waits_for_standby(database))
            with pytest.raises(StoreUnavailable, match="did not answer in time") as raised:
                await apply(store, SETTLED)
            assert raised.value.is_uncertain
        finally:
            await server.run("ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()")
        [reply] = await apply_until_done(store, SETTLED)
    assert reply.entry.usage == exactly(90, 60)
    await database.audit()


async def waits_for_standby(database):
    [[names]] = await database.run("SHOW synchronous_standby_names")
    return names == "nobody"


async def test_a_connection_that_breaks_during_the_commit_is_uncertain(store, database):
    """The commit was not done. Repeating it does it."""
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


async def test_a_batch_that_is_cancelled_leaves_no_lock(store, url, database):
    """Its connection is closed, and the next batch makes a new one."""
    await apply(store, reserve("1", ANN, CALL))
    async with connected(database) as other, connected(database) as watching:
        await other.execute("BEGIN; SELECT FROM llm_quota_proxy.counters FOR UPDATE")
        batch = asyncio.create_task(apply(store, SETTLED))
        await until(lambda: is_blocked(watching))
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
    await apply(store, SETTLED)
    await database.audit()


STOPPED = """
import asyncio, os, signal, sys
from proxy.ledger.postgres import PostgresStore
from proxy.ledger.primary import Timeouts
from proxy.ledger.rows import CHANGING
from tests.ledger.test_postgres import ANN, CALL, NO_CLOCK
from tests.builders import reserve

class Stopping:
    # A binding that stops the process in the middle of its transaction, when it is read for the second time.
    def __init__(self): self.reads = 0
    def __getattr__(self, name): return getattr(ANN, name)
    def keys(self):
        self.reads += 1
        if self.reads == 2:
            print("stopping", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        return ANN.keys()

async def main():
    store = PostgresStore(sys.argv[1], timeouts=Timeouts(idle_ms=300))
    await store.open()
    operation = reserve("stopped", ANN, CALL)
    object.__setattr__(operation, "binding", Stopping())
    try:
        await store.apply([operation], NO_CLOCK)
    except Exception as error:
        print(type(error).__name__, flush=True)
    print("repeated", flush=True)
    await store.apply([reserve("stopped", ANN, CALL)], NO_CLOCK)
    await store.close()

asyncio.run(main())
"""


async def test_a_process_that_stops_in_the_middle_of_a_statement_loses_its_locks(url, database):
    """The server is then reading and not idle, so only the timeout of the transaction ends it (PostgreSQL 17)."""
    [[version]] = await database.run("SELECT current_setting('server_version_num')::int")
    if version < 170_000:
        pytest.skip("this server has no transaction_timeout")
    timeouts = Timeouts(lock_ms=20_000, statement_ms=20_000, whole_ms=20_000, batch_ms=300)
    async with opened(url, Timeouts(lock_ms=20_000, statement_ms=20_000, whole_ms=20_000)) as store:
        await apply(store, reserve("1", ANN, CALL))
        stopped = await HalfStatement.sent(url, timeouts)
        await apply(store, SETTLED)
        assert b"transaction timeout" in await stopped.read()
    await database.audit()


class HalfStatement:
    """A client that locks counters in a transaction and then sends only the first part of a statement."""

    def __init__(self, reader, writer):
        self._reader, self._writer = reader, writer

    @classmethod
    async def sent(cls, url, timeouts):
        name, folder = re.fullmatch(r".*/(\w+)\?host=(.*)", url).groups()
        client = cls(*await asyncio.open_unix_connection(f"{folder}/.s.PGSQL.5432"))
        start = struct.pack("!I", 0x3_0000) + f"user\0postgres\0database\0{name}\0\0".encode()
        client._writer.write(struct.pack("!I", len(start) + 4) + start)
        await client._ready()
        for query in (begin(timeouts), "SELECT FROM llm_quota_proxy.counters FOR UPDATE"):
            client._send(b"Q", query.encode() + b"\0")
            await client._ready()
        client._send(b"P", b"\0SELECT 1\0\0\0")  # a Parse message, without the Sync that must follow
        return client

    def _send(self, kind, body):
        self._writer.write(kind + struct.pack("!I", len(body) + 4) + body)

    async def _ready(self):
        kind = b""
        while kind != b"Z":
            kind = await self._reader.readexactly(1)
            await self._reader.readexactly(struct.unpack("!I", await self._reader.readexactly(4))[0] - 4)

    async def read(self):
        """What the server sends before it closes the connection."""
        try:
            return await self._reader.read()
        finally:
            self._writer.transport.abort()


async def test_a_process_that_stops_in_the_middle_of_a_batch_loses_its_locks(store, url, database):
    """The server ends its transaction. When the process continues, it gets an error and repeats the batch."""
    command = [sys.executable, "-c", STOPPED, url]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, cwd=ROOT)
    assert await process.stdout.readline() == b"stopping\n"
    await apply(store, reserve("1", ANN, CALL))
    assert await database.states() == {"1": "open"}
    process.send_signal(signal.SIGCONT)
    printed = (await process.communicate())[0].split()
    assert printed == [b"StoreUnavailable", b"repeated"]
    assert await database.states() == {"1": "open", "stopped": "open"}
    await database.audit()


async def test_a_server_that_cannot_be_reached_is_unavailable():
    """At the start and later. The password is never in the message."""
    nowhere = PostgresStore("postgresql://u:sesame@/db?host=/nowhere")
    for attempt in (
        nowhere.open(),
        apply(nowhere, Release("1")),
        nowhere.find_response_entry("resp_1"),
        nowhere.renew("x", 0, lease_ms=1),
    ):
        with pytest.raises(StoreUnavailable) as raised:
            await attempt
        assert "sesame" not in str(raised.value)
    await nowhere.close()


@pytest.mark.parametrize("bad", ["?port=sesame", "?sslmode=sesame", "?host=a,b&port=1,2,3"])
async def test_a_url_that_the_driver_cannot_read_raises_store_unavailable(bad):
    """At the start and in a batch. The password is not in the message."""
    store = PostgresStore(f"postgresql://u:secret@h/db{bad}")
    for attempt in (store.open(), apply(store, Release("1"))):
        with pytest.raises(StoreUnavailable) as raised:
            await attempt
        assert "secret" not in str(raised.value)
    await store.close()


class StoppedBackends:
    """Stops the server's processes behind our connections, as if the network lost all packets."""

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


async def test_a_connection_that_does_not_answer_is_replaced(url, database):
    """T58: a batch waits `probe_ms` for the reply to its BEGIN. Nothing was sent before, so it may run on another."""
    async with opened(url, SHORT) as store:
        await apply(store, reserve("1", ANN, CALL))
        await store.find_response_entry("resp_1")
        with await StoppedBackends.all_of(database):
            await apply(store, SETTLED)
            with pytest.raises(StoreUnavailable, match="did not answer in time"):
                await store.find_response_entry("resp_1")
            assert (await entry_in(store, "1")).state == "settled"


async def test_closing_waits_only_probe_ms_for_a_connection_that_does_not_answer(url, database):
    """So that a stop of the proxy does not hang. The connection is closed all the same."""
    async with opened(url, SHORT) as store:
        await apply(store, reserve("1", ANN, CALL))
        connection = store._writer.connection
        with await StoppedBackends.all_of(database):
            async with asyncio.timeout(5):  # probe_ms is 200; without it the close would wait until the backend runs
                await store.close()
            assert connection.is_closed()
    await until(database.has_no_connections)


async def test_a_rule_that_raises_while_the_connection_does_not_answer_is_what_the_caller_gets(url, database):
    """The rollback fails, so the connection is dropped, and its locks with it."""
    async with opened(url, SHORT) as store:
        await apply(store, reserve("1", ANN, CALL))
        stopped = await StoppedBackends.all_of(database)

        class StoppingBinding(BrokenBinding):
            def keys(self):
                stopped.__enter__()
                return super().keys()

        with pytest.raises(ZeroDivisionError):
            await apply(store, unchecked(reserve("2", ANN, CALL), binding=StoppingBinding()))
        stopped.__exit__()
        await apply(store, SETTLED)
    await database.audit()


async def test_a_schema_that_was_dropped_makes_the_store_unavailable(store, database):
    """For reads and for batches."""
    await apply(store, reserve("1", ANN, CALL))
    await database.run("DROP SCHEMA llm_quota_proxy CASCADE")
    for attempt in (
        store.read_counters(ANN.keys()),
        store.find_response_entry("resp_1"),
        store.orphans("me", NO_CLOCK, limit=1),
        apply(store, SETTLED),
    ):
        with pytest.raises(StoreUnavailable, match="does not exist"):
            await attempt


async def test_a_database_without_our_schema_is_unavailable(empty_url):
    """It was not migrated, or it is the wrong database."""
    store = PostgresStore(empty_url)
    with pytest.raises(StoreUnavailable, match="does not exist"):
        await apply(store, Release("1"))
    await store.close()


async def test_a_new_database_is_a_warning_with_its_name(empty_url):
    """All quotas are unused then, also if an older schema was dropped. The next process says nothing."""
    with capture_logs() as logged:
        for _ in range(2):
            async with opened(empty_url):
                pass
    [entry] = [entry for entry in logged if entry["log_level"] == "warning"]
    assert entry["event"] == "a new database was made, in which all quotas are unused"
    assert entry["database"].endswith(f"/{url_name(empty_url)}")


async def error_of(url):
    store = PostgresStore(url, timeouts=SHORT)
    with pytest.raises(StoreUnavailable) as raised:
        await store.open()
    await store.close()
    return str(raised.value)


async def test_an_error_at_the_start_names_the_database_and_what_to_do(server, empty_url, empty_database):
    """It never has the password, nor a user's name, which has the password if a colon is missing."""
    role, socket = f"role_{empty_database.name}", empty_url.partition("?host=")[2]
    await empty_database.run(f"CREATE ROLE {role} LOGIN")
    missing = await error_of(f"postgresql://postgres:sesame@/missing?host={socket}")
    assert re.fullmatch(
        f"PostgreSQL can't be used at {socket}/missing: .* does not exist; create the database, .*", missing
    )
    unknown = await error_of(f"postgresql://u%3Asesame@/{empty_database.name}?host={socket}")
    assert re.search("the server does not accept this user with this password; check both in `database`", unknown)
    no_right = await error_of(f"postgresql://{role}:sesame@/{empty_database.name}?host={socket}")
    assert re.search("permission denied .*; give the user this right, for example with GRANT CREATE", no_right)
    unreachable = await error_of("postgresql://u:sesame@127.0.0.1:1/db?user=x&password=sesame")
    assert unreachable.startswith("PostgreSQL can't be used at 127.0.0.1:1/db: ")
    assert unreachable.endswith("check that the server runs, and the host, the port and sslmode in `database`")
    assert "127.0.0.1:1: Connection refused; " in unreachable
    of_ipv6 = await error_of("postgresql://u:sesame@[::1]:1/db")
    assert re.match(r"PostgreSQL can't be used at \[::1\]:1/db: \[::1\]:1: [A-Z][a-z ]+; check", of_ipv6)
    unreadable = await error_of("postgresql://u:sesame@h/db?sslmode=sesame")
    assert unreadable == "the driver can't read the database's URL (host and name: h/db): correct `database`"
    cut = await error_of("postgresql://u:1/sesame@127.0.0.1:1/db?sslmode=wrong")
    assert "127.0.0.1:1/db" in cut
    for text in (missing, unknown, no_right, unreachable, unreadable, cut):
        assert "sesame" not in text


async def test_a_name_of_any_characters_reaches_the_server(server, empty_url, empty_database):
    """`${…}` in the user and the password is percent-encoded, and the driver decodes it."""
    name = "p@ss/w:ord%25 #?&+é"
    await empty_database.run(f'CREATE ROLE "{name}{empty_database.name}" LOGIN')
    socket = empty_url.partition("?host=")[2]
    written = f"database: postgresql://${{NAME}}{empty_database.name}:${{NAME}}@/postgres?host={socket}\n"
    environ = {"NAME": name}
    config = load_text(f"{written}upstreams: {{box: {{base_url: http://box/v1}}}}\n", environ=environ)
    [row] = await server.run("SELECT current_user", url=config.settings.database)
    assert row[0] == f"{name}{empty_database.name}"


async def test_a_migration_that_fails_leaves_the_database_as_it_was(empty_url, empty_database):
    """A table of another program has the name of one of ours. It is not changed, and no table is added beside it."""
    database = empty_database
    await database.run("CREATE SCHEMA llm_quota_proxy", "CREATE TABLE llm_quota_proxy.calls (who text)")
    with pytest.raises(StoreUnavailable, match="already exists"):
        await PostgresStore(empty_url).open()
    found = await database.run(
        "SELECT table_name FROM information_schema.tables WHERE table_schema = 'llm_quota_proxy'"
    )
    assert [row[0] for row in found] == ["calls"]


async def test_a_store_may_be_closed_twice_and_used_again(store, database):
    """Closing leaves no connection open. The next batch and the next read make new ones."""
    await apply(store, reserve("1", ANN, CALL))
    await store.find_response_entry("resp_1")
    await store.close()
    await store.close()
    await until(database.has_no_connections)
    [settled] = await apply(store, SETTLED)
    assert await entry_in(store, "1") == settled.entry


# ---------------------------------------------------------------------------------------------------- leases, orphans


async def test_orphans_are_open_calls_of_processes_whose_lease_has_run_out(store, database):
    """By the database's clock. Not calls of the process that asks, not ended calls, and at most `limit`."""
    operations = [replace(reserve(str(number), ANN, call(1)), owner=f"process-{number % 4}") for number in range(12)]
    await apply(store, *operations, Settle("0", exactly(1), "complete"), Release("5"), Expire("2"))
    await store.renew("process-0", NO_CLOCK, lease_ms=MINUTE)
    await store.renew("process-1", NO_CLOCK, lease_ms=-1)
    await store.renew("process-2", NO_CLOCK, lease_ms=-1)
    await store.renew("process-2", NO_CLOCK, lease_ms=MINUTE)
    assert await store.orphans("me", NO_CLOCK, limit=10) == ["1", "11", "3", "7", "9"]  # process-3 has no lease
    assert await store.orphans("process-1", NO_CLOCK, limit=10) == ["11", "3", "7"]
    assert await store.orphans("me", NO_CLOCK, limit=2) == ["1", "11"]


async def test_the_lease_of_a_process_that_died_a_week_ago_is_deleted(store, database):
    """Each start has a new name, so old leases would add up."""
    await store.renew("long ago", NO_CLOCK, lease_ms=-8 * 86_400_000)
    await store.renew("yesterday", NO_CLOCK, lease_ms=-86_400_000)
    await store.renew("me", NO_CLOCK, lease_ms=MINUTE)
    assert [row["id"] for row in await database.rows("owners")] == ["me", "yesterday"]


# --------------------------------------------------------------------------------------------------------- the schema


async def test_of_several_processes_that_start_at_once_one_migrates(empty_url, empty_database):
    """The others wait for it."""
    database = empty_database
    stores = [PostgresStore(empty_url) for _ in range(4)]
    await asyncio.gather(*(store.open() for store in stores))
    assert await versions(database) == [HEAD]
    await asyncio.gather(*(apply(store, reserve(str(n), ANN, call(1))) for n, store in enumerate(stores)))
    await asyncio.gather(*(store.close() for store in stores))
    await database.audit()


async def test_all_our_tables_are_in_a_schema_of_their_own(empty_url, empty_database):
    """So the database may contain tables of other programs with the same names."""
    database = empty_database
    async with opened(empty_url):
        pass
    found = await database.run(
        "SELECT DISTINCT table_schema FROM information_schema.tables "
        "WHERE table_schema NOT IN ('pg_catalog', 'information_schema')"
    )
    assert [row[0] for row in found] == ["llm_quota_proxy"]


async def test_a_newer_schema_is_refused_and_left_alone(store, url, database):
    """The proxy went back to an older release."""
    await database.run("UPDATE llm_quota_proxy.alembic_version SET version_num = '9999'")
    with pytest.raises(NewerSchema):
        await PostgresStore(url).open()
    assert await versions(database) == ["9999"]


async def test_a_store_that_may_not_migrate_makes_no_schema(empty_url, server):
    """It says what to run. After that it opens."""
    store = PostgresStore(empty_url, migrates=False)
    with pytest.raises(StoreUnavailable, match=f"has no schema of ours, and this release needs {HEAD}: run"):
        await store.open()
    assert await server.run("SELECT to_regnamespace('llm_quota_proxy')::oid", url=empty_url) == [(None,)]
    async with opened(empty_url):
        await store.open()
    await store.close()


async def versions(database):
    return [row["version_num"] for row in await database.run("SELECT * FROM llm_quota_proxy.alembic_version")]


async def test_a_release_runs_on_the_schema_of_the_next(store, database):
    """Replicas are replaced one by one, so this release meets the columns of the next."""
    await database.run(
        "ALTER TABLE llm_quota_proxy.counters ADD COLUMN used_cost bigint NOT NULL DEFAULT 0",
        "ALTER TABLE llm_quota_proxy.calls ADD COLUMN note text",
        "ALTER TABLE llm_quota_proxy.owners ADD COLUMN host text",
        f"UPDATE llm_quota_proxy.alembic_version SET version_num = '{int(HEAD) + 1:04}'",
    )
    await store.close()
    await store.open()  # as a replica that died meanwhile and starts again
    await apply(store, reserve("1", ANN, CALL), SETTLED)
    await store.renew("me", NO_CLOCK, lease_ms=1)
    assert (await entry_in(store, "1")).usage == exactly(90, 60)


async def test_a_user_without_the_right_to_create_a_schema_may_be_given_one(empty_url, empty_database):
    """An operator creates it, with the user of the proxy as its owner."""
    database = empty_database
    role = f"role_{database.name}"
    await database.run(f"CREATE ROLE {role} LOGIN", f"CREATE SCHEMA llm_quota_proxy AUTHORIZATION {role}")
    async with opened(empty_url.replace("postgres:@", f"{role}:@")) as store:
        await apply(store, reserve("1", ANN, CALL))
    await database.audit()


async def test_the_migrations_create_the_tables_of_schema_py(empty_url, empty_database):
    """With the same columns, types and nullability."""
    database = empty_database
    async with opened(empty_url):
        pass
    found = await database.run(
        "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns "
        "WHERE table_schema = 'llm_quota_proxy' AND table_name <> 'alembic_version'"
    )
    assert {tuple(row) for row in found} == {
        (table.name, column.name, str(column.type).lower(), "YES" if column.nullable else "NO")
        for table in metadata.tables.values()
        for column in table.columns
    }


async def test_what_begins_a_batch_returns_the_columns_of_schema_py(store, database):
    """In their order: the functions are in a migration, and a later one may have added columns."""
    async with connected(database) as connection:
        statement = await connection.prepare(WRITER_STATEMENTS["begin_batch"])
        found = [each.name for each in statement.get_attributes()]
    assert found == [
        "locked_at",
        *metadata.tables["counters"].columns.keys(),
        *metadata.tables["calls"].columns.keys(),
    ]


def test_what_ends_a_batch_writes_the_columns_of_its_rows():
    """In the order of their values: most are texts or numbers, so another order would not be an error."""
    functions = import_module("proxy.ledger.migrations.versions.0008_batches")
    found = [[column.split()[0] for column in text.split(",")] for text in (functions._COUNTER, functions._CALL)]
    assert found == [metadata.tables[name].columns.keys() for name in ("counters", "calls")]
    assert [column.split()[0] for column in functions._CHANGED.split(",")] == [*CHANGING, "id"]


async def test_a_step_of_a_job_returns_its_rows_and_the_last_key(store, database):
    """It is one statement, on a connection that is otherwise for reads."""
    await store.renew("me", NO_CLOCK, lease_ms=MINUTE)
    job = (
        "WITH gone AS (DELETE FROM llm_quota_proxy.owners WHERE id = $1::text RETURNING id) "
        "SELECT count(*), max(id) FROM gone"
    )
    results = [await store._run_job(job, owner) for owner in ("you", "me", "me")]
    assert results == [JobResult(0), JobResult(1, "me"), JobResult(0)]
    assert await database.rows("owners") == []


async def test_a_step_of_a_job_that_fails_changes_nothing(store, database):
    """Its connection is closed, and its transaction with it. The next step makes a new connection."""
    await store.renew("me", NO_CLOCK, lease_ms=MINUTE)
    job = "WITH gone AS (DELETE FROM llm_quota_proxy.owners RETURNING 1) SELECT 1 / (count(*) - 1), NULL FROM gone"
    with pytest.raises(StoreUnavailable, match="division by zero"):
        await store._run_job(job)
    assert len(await database.rows("owners")) == 1
    assert await store._run_job("SELECT 5, NULL") == JobResult(5)
