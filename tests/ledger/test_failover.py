"""A failover of PostgreSQL: it is noticed, nothing old is read after it, and what it may lose is made up for.

Two real servers, a primary and a standby; see tests/failover.py. Whole proxies are in journeys/test_failover.py.
"""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import asyncpg
import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from proxy.errors import LedgerUnavailable
from proxy.ledger.book import Accepted, Release, Settle, Unknown
from proxy.ledger.ledger import Ledger
from proxy.ledger.postgres import PostgresStore
from proxy.ledger.primary import Timeouts
from proxy.ledger.schema import owners
from proxy.ledger.store import StoreUnavailable
from proxy.policy.amounts import Amount, AtLeast, Tokens
from proxy.server import wall_clock_ms
from tests.builders import binding, call, entry_in, exactly, extend, quota, reserve
from tests.failover import pair, until
from tests.ledger.test_postgres import LONG, NO_CLOCK, Database, apply, apply_until_done
from tests.postgres import shared

DAILY = quota("staff/daily", tokens=10_000, per=LONG)
ANN = binding([DAILY])
CALL = call(100, 400)
SETTLED = exactly(90, 60)
MINUTE = 60_000
NOTICED = "another server has the database now"


@pytest.fixture
async def servers():
    async with pair() as servers:
        yield servers


@asynccontextmanager
async def opened(url, **timeouts):
    store = PostgresStore(url, timeouts=Timeouts(**timeouts))
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def running(url, *, wait_s=50.0, **timeouts):
    """A ledger of the process `process-1`, to which the calls of `reserve` belong."""
    store = PostgresStore(url, timeouts=Timeouts(**timeouts))
    ledger = Ledger(store, owner="process-1", now=wall_clock_ms, retry_s=0.01, wait_s=lambda: wait_s)
    await ledger.start()
    try:
        yield ledger
    finally:
        await ledger.close()


def noticed(logs):
    """The servers in the lines of the log that say that a failover was noticed."""
    return [(line["before"][:10], line["now"][:10]) for line in logs if line["event"].startswith(NOTICED)]


async def owners_in(store):
    """The owners that a transaction for reports reads."""
    async with store.transaction() as connection:
        return set((await connection.execute(sa.select(owners.c.id))).scalars())


# -------------------------------------------------------------------------------------------------- it is noticed


async def test_a_failover_is_logged_once_with_both_timelines(servers):
    """By a role without rights of an administrator. Batches, reads and transactions go on at the new primary."""
    await servers.primary.run(
        "CREATE ROLE plain LOGIN",
        "GRANT USAGE ON SCHEMA llm_quota_proxy TO plain",
        "GRANT ALL ON ALL TABLES IN SCHEMA llm_quota_proxy TO plain",
    )
    await servers.replicate(is_synchronous=True)
    called = []
    with capture_logs() as logs:
        async with opened(servers.url.replace("postgres:@", "plain:@")) as store:
            store.on_failover(lambda: called.append(1))
            await store.renew("me", NO_CLOCK, lease_ms=MINUTE)
            await apply(store, reserve("1", ANN, CALL))
            assert await store.open_calls("process-1") == ["1"]
            assert await owners_in(store) == {"me"}
            assert noticed(logs) == []
            await servers.fail_over()
            await apply_until_done(store, Settle("1", SETTLED, "complete"))
            await store.renew("me", NO_CLOCK, lease_ms=MINUTE)
            assert await store.open_calls("process-1") == []
            assert await owners_in(store) == {"me"}
    assert noticed(logs) == [("timeline 1", "timeline 2")]
    assert called == [1]
    [[used]] = await servers.standby.run("SELECT used_input + used_output FROM llm_quota_proxy.counters")
    assert used == 150


async def test_connections_to_the_old_primary_are_not_used_after_a_new_one_has_led_elsewhere(servers):
    """The old primary still runs when the address moves. What is written and read there would be lost and old."""
    await servers.replicate(is_synchronous=False)
    async with opened(servers.url, statement_ms=60_000) as store:
        await apply(store, reserve("1", ANN, CALL))
        assert await store.open_calls("process-1") == ["1"]
        assert await owners_in(store) == set()
        assert await servers.primary.run("SELECT pg_switch_wal()")
        await servers.caught_up()
        await servers.standby.promote()
        servers.move(servers.standby)
        await servers.standby.run("INSERT INTO llm_quota_proxy.owners VALUES ('new', 1)")
        # While one read waits at the old primary, another one needs a second connection.
        with capture_logs() as logs:
            async with locked_calls(servers.primary):
                waiting = asyncio.create_task(store.open_calls("process-1"))
                await until(lambda: servers.primary.run("SELECT FROM pg_locks WHERE NOT granted"))
                assert await store.open_calls("process-1") == ["1"]
            assert await waiting == ["1"]
        assert noticed(logs) == [("timeline 1", "timeline 2")]
        assert await owners_in(store) == {"new"}
        await apply(store, Settle("1", SETTLED, "complete"))
        assert await store.open_calls("process-1") == []
    for node, state in ((servers.primary, "open"), (servers.standby, "settled")):
        assert [row[0] for row in await node.run("SELECT state FROM llm_quota_proxy.calls")] == [state]


@asynccontextmanager
async def locked_calls(node):
    """Let every read of `calls` on this server wait until the end of the block."""
    connection = await asyncpg.connect(node.url)
    try:
        await connection.execute("BEGIN; LOCK TABLE llm_quota_proxy.calls")
        yield
    finally:
        await connection.close()


async def test_a_server_that_does_not_answer_when_it_is_asked_for_its_timeline_is_unavailable():
    """As one that is stopped in that moment."""
    database = Database(shared(), await shared().migrated())
    await database.run(
        "CREATE SCHEMA slow",
        """CREATE FUNCTION slow.pg_current_wal_lsn() RETURNS pg_lsn LANGUAGE sql VOLATILE AS
        $$ SELECT pg_sleep(60); SELECT pg_catalog.pg_current_wal_lsn() $$""",
        f"ALTER DATABASE {database.name} SET search_path = slow, pg_catalog, public",
    )
    store = PostgresStore(database.url, timeouts=Timeouts(probe_ms=200))
    with pytest.raises(StoreUnavailable, match="did not answer in time"):
        await store.open()
    await store.close()


async def test_a_server_that_does_not_state_its_timeline_can_be_used():
    """As some managed services: the functions are not allowed."""
    server = shared()
    database = Database(server, await server.migrated())
    role = f"role_{database.name}"
    await database.run(
        f"CREATE ROLE {role} LOGIN",
        f"GRANT USAGE ON SCHEMA llm_quota_proxy TO {role}",
        f"GRANT ALL ON ALL TABLES IN SCHEMA llm_quota_proxy TO {role}",
        "REVOKE EXECUTE ON FUNCTION pg_current_wal_lsn() FROM PUBLIC",
    )
    async with opened(database.url.replace("postgres:@", f"{role}:@")) as store:
        assert await store.renew("me", NO_CLOCK, lease_ms=MINUTE) > 0
        await apply(store, reserve("1", ANN, CALL))
        assert await store.open_calls("process-1") == ["1"]


# ------------------------------------------------------------------------------------- several hosts, and standbys


async def test_a_standby_is_not_used(servers):
    """It can't write, and what is read there may be old. The error says what to do."""
    await servers.replicate(is_synchronous=False)
    store = PostgresStore(servers.standby.url)
    for attempt in (store.open, lambda: store.open_calls("me"), lambda: apply(store, reserve("1", ANN, CALL))):
        with pytest.raises(StoreUnavailable, match=r"this server is a standby; wait until it is promoted, or write"):
            await attempt()
    await store.close()


async def answer_nothing(reader, writer):
    """Until the client gives up."""
    await reader.read()
    writer.close()


async def test_of_several_hosts_the_primary_is_used(servers, tmp_path):
    """Wherever it is in the list; and one that is switched off, so that it does not even refuse, costs a moment."""
    await servers.replicate(is_synchronous=True)
    silent = await asyncio.start_unix_server(answer_nothing, tmp_path / ".s.PGSQL.5432")
    hosts = f"{tmp_path},{servers.standby.folder},{servers.primary.folder}"
    async with opened(f"postgresql://postgres:@/postgres?host={hosts}&port=5432", connect_ms=9000) as store:
        await apply(store, reserve("1", ANN, CALL))
        await servers.primary.stop()
        with pytest.raises(StoreUnavailable) as caught:
            await store.find_response_entry("resp_1")
            await store.find_response_entry("resp_1")
        with capture_logs() as logs:
            await servers.standby.promote()
            await apply_until_done(store, Settle("1", SETTLED, "complete"))
        assert noticed(logs) == [("timeline 1", "timeline 2")]
    silent.close()
    assert "postgres" in str(caught.value)


async def test_if_no_host_is_the_primary_the_error_says_why_of_each(servers, tmp_path):
    """With the addresses, and without the password."""
    await servers.replicate(is_synchronous=False)
    store = PostgresStore(f"postgresql://postgres:sesame@/postgres?host={tmp_path},{servers.standby.folder}")
    with pytest.raises(StoreUnavailable) as caught:
        await store.open()
    text = str(caught.value)
    assert f"{tmp_path}: " in text
    assert f"{servers.standby.folder}: this server is a standby" in text
    assert "sesame" not in text


# --------------------------------------------------------------------------------------- synchronous: nothing is lost


async def test_nothing_is_answered_that_the_synchronous_standby_does_not_have(servers):
    """Without its standby the primary commits nothing, also if the commit is given up and repeated.

    PostgreSQL keeps a commit whose wait was cancelled, on the primary alone. Repeating the batch must not take that
    for an answer.
    """
    await servers.replicate(is_synchronous=True)
    async with running(servers.url, wait_s=4, probe_ms=200, whole_ms=600) as ledger:
        assert isinstance(await ledger.reserve(reserve("1", ANN, CALL)), Accepted)
        await servers.standby.stop()
        with capture_logs():
            with pytest.raises(LedgerUnavailable):
                await ledger.reserve(reserve("2", ANN, CALL))
            end = ledger.end(Settle("1", SETTLED, "complete"))
            await asyncio.wait([end], timeout=2)
            assert not end.done()
            await servers.standby.start()
            assert (await end).entry.state == "settled"


# -------------------------------------------------------------------------------- asynchronous: what is made up for


async def test_what_a_failover_has_lost_of_calls_in_flight_is_made_up_for(servers):
    """Nothing reaches the standby for a while, and then the primary dies.

    A call that was reserved meanwhile is charged when it ends. One whose end was lost is charged its reservation by
    the next sweep. Only one that began and ended meanwhile is not charged.
    """
    await servers.replicate(is_synchronous=False)
    async with running(servers.url) as ledger:
        for id in ("end lost", "in flight"):
            await ledger.reserve(reserve(id, ANN, CALL))
        await servers.caught_up()
        await servers.cut_replication()
        await ledger.end(Settle("end lost", SETTLED, "complete"))
        for id in ("grows", "lost", "lost too", "released", "all lost"):
            await ledger.reserve(reserve(id, ANN, call(100, 400, initial_hold=50)))
        await ledger.end(Settle("all lost", SETTLED, "complete"))
        with capture_logs() as logs:
            await servers.fail_over()
            grown = await ledger.extend(extend("grows", ANN, 400))
            assert (grown.entry.state, grown.entry.hold) == ("open", Amount(100, 400, 1))
            ends = [ledger.end(Settle(id, SETTLED, "complete")) for id in ("lost", "lost too", "grows", "in flight")]
            assert {(await end).entry.state for end in ends} == {"settled"}
            assert await ledger.end(Release("released")) == Unknown("released")
            await ledger.sweep()
        assert sorted(line["call"] for line in logs if "lost a reservation" in line["event"]) == [
            "grows",
            "lost",
            "lost too",
        ]
        assert (await entry_in(ledger, "end lost")).usage == AtLeast(Tokens(100, 400))
        assert await entry_in(ledger, "all lost") is None
        [counter] = (await ledger.counters(ANN.keys())).values()
        assert (counter.used, counter.held) == (Amount(4 * 90 + 100, 4 * 60 + 400, 5), Amount())
    await Database(servers.standby, servers.standby.url).audit()


async def test_a_sweep_leaves_calls_alone_that_are_in_flight():
    """Also those that are being reserved or ended while it runs."""
    database = Database(shared(), await shared().migrated())
    async with running(database.url) as ledger:
        await ledger.reserve(reserve("open", ANN, CALL))

        async def use(number):
            for each in range(20):
                assert isinstance(await ledger.reserve(reserve(f"{number}-{each}", ANN, call(1, 1))), Accepted)
                await ledger.end(Settle(f"{number}-{each}", exactly(1, 1), "complete"))

        with capture_logs() as logs:
            using = asyncio.gather(*(use(number) for number in range(8)))
            while not using.done():
                await ledger.sweep()
            await using
        assert [line for line in logs if line["event"].startswith("the database has lost")] == []
        assert (await entry_in(ledger, "open")).state == "open"
    await database.audit()


async def test_an_end_that_the_database_refuses_is_charged_by_the_next_sweep():
    """Its call is not in flight any more, so its reservation would stay for ever."""
    database = Database(shared(), await shared().migrated())
    async with running(database.url) as ledger:
        await ledger.reserve(reserve("1", ANN, CALL))
        with capture_logs():
            with pytest.raises(LedgerUnavailable):
                await ledger.end(replace(Settle("1", SETTLED, "complete"), upstream="\0"))
            await ledger.sweep()
    assert await database.states() == {"1": "expired"}
    await database.audit()
