"""Several replicas on one PostgreSQL: together they are exact, and each charges the calls of replicas that died.

Two ledgers in one process stand for two replicas. Tests that need a second process are in test_postgres.
"""

import asyncio
import shutil
import subprocess
import tempfile
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from proxy.errors import LedgerUnavailable
from proxy.identity.database import DirectoryDatabase
from proxy.identity.directory import UserId
from proxy.ledger.book import Accepted, Refused, Release, Settle
from proxy.ledger.ledger import LEASE_MS, Ledger
from proxy.ledger.postgres import PostgresStore
from proxy.ledger.primary import Timeouts
from proxy.ledger.schema import users
from proxy.ledger.store import StoreUnavailable
from proxy.policy.amounts import Amount, AtLeast, Tokens
from proxy.server import wall_clock_ms
from tests.builders import NOON, binding, call, entry_in, exactly, extend, quota, reserve
from tests.calls.test_reservation import AdmittedCall
from tests.ledger.test_postgres import LONG, Database, until
from tests.postgres import shared
from tests.stage import STAFF, Clock, stage

pytestmark = pytest.mark.journey

DAILY = quota("staff/daily", tokens=10**9, per=LONG)
SHARED = quota("staff/pot", tokens=20_000, per=LONG, shared=True)
ANN = binding([DAILY])
STREAM = call(100, 900, 100, initial_hold=100)


@pytest.fixture
async def database():
    server = shared()
    return Database(server, await server.fresh())


@asynccontextmanager
async def replica(database, owner, *, wait_s=50.0, now=lambda: 0):
    """A ledger of one replica. Its own clock is wrong, because only the database's clock may matter."""
    url = database.url if isinstance(database, Database) else database
    store = PostgresStore(url, timeouts=Timeouts(idle_ms=1000, lock_ms=1500, statement_ms=2000, whole_ms=2500))
    ledger = Ledger(store, owner=owner, now=now, retry_s=0.01, wait_s=lambda: wait_s)
    await ledger.start()
    try:
        yield ledger
    finally:
        await ledger.close()


def reserve_stream(call_id, ledger):
    """The operation that reserves for a stream through this replica."""
    return replace(reserve(call_id, ANN, STREAM), owner=ledger.owner)


async def expire_lease(database, owner):
    """Set the end of a replica's lease to the past, as if it had died."""
    await database.run(f"UPDATE llm_quota_proxy.owners SET alive_until = 0 WHERE id = '{owner}'")


async def run_clients(ledger, name, *, count, calls):
    """Run clients that each send this many calls through one replica; return the tokens that they used."""
    used = []

    async def client(number):
        bound = binding([DAILY, SHARED], user=f"user {number}")
        for each in range(calls):
            operation = reserve(f"{name}-{number}-{each}", bound, call(10, 50))
            if isinstance(await ledger.reserve(operation), Accepted):
                used.append(10 + each)
                await ledger.end(Settle(operation.id, exactly(10, each), "complete"))

    await asyncio.gather(*(client(number) for number in range(count)))
    return sum(used)


async def test_as_many_calls_are_admitted_as_fit(database):
    """100 users at each of two replicas share an unused quota of 20,000 tokens: 40 calls of 500 fit."""
    async with replica(database, "one") as one, replica(database, "two") as two:
        operations = [
            (ledger, reserve(f"{name}-{number}", binding([SHARED], user=f"user {number}"), call(100, 400)))
            for number in range(100)
            for name, ledger in (("a", one), ("b", two))
        ]
        answers = await asyncio.gather(*(ledger.reserve(operation) for ledger, operation in operations))
    assert sum(isinstance(answer, Accepted) for answer in answers) == 40
    assert sum(isinstance(answer, Refused) for answer in answers) == 160
    await database.audit()


async def test_a_quota_shared_by_two_replicas_is_used_up_and_not_exceeded(database):
    """32 clients at each replica, a counter for each user and one for all of them, and no deadlocks.

    In the end fewer tokens are free than one call needs.
    """
    async with replica(database, "one") as one, replica(database, "two") as two:
        used = await asyncio.gather(*(run_clients(each, each.owner, count=32, calls=25) for each in (one, two)))
        [counter] = (await one.counters([SHARED.key_for("any user")])).values()
    assert 20_000 - 60 < sum(used) <= 20_000
    assert (counter.used.tokens, counter.held) == (sum(used), Amount())
    [[deadlocks]] = await database.run("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    assert deadlocks == 0
    await database.audit()


# ------------------------------------------------------------------------------------------------------------- leases


async def test_calls_of_a_running_replica_do_not_expire(database):
    """However often the replicas sweep."""
    async with replica(database, "one") as one, replica(database, "two") as two:
        await one.reserve(reserve_stream("1", one))
        await asyncio.gather(two.sweep(), two.sweep(), one.sweep())
        assert await database.states() == {"1": "open"}


async def test_calls_of_a_dead_replica_are_charged_once_by_the_others(database):
    """After its lease has ended, by the replica that sweeps first; also if several sweep at the same time."""
    async with replica(database, "one") as one, replica(database, "two") as two:
        async with replica(database, "dead") as dead:
            await dead.reserve(reserve_stream("1", dead))
            await dead.reserve(reserve_stream("2", dead))
            await dead.end(Settle("2", exactly(1, 1), "complete"))
        await one.sweep()
        # Until its lease ends the replica may only be slow.
        assert await database.states() == {"1": "open", "2": "settled"}
        await expire_lease(database, "dead")
        with capture_logs():
            await asyncio.gather(one.sweep(), two.sweep())
        entry = await entry_in(one, "1")
        assert (entry.state, entry.outcome, entry.usage) == ("expired", "lost", AtLeast(Tokens(100, 100)))
        [counter] = (await two.counters(ANN.keys())).values()
    assert (counter.used, counter.held) == (Amount(101, 101, 2), Amount())
    await database.audit()


async def test_a_replica_that_was_paused_charges_each_call_once(database):
    """Another replica expired its calls. It learns this when it extends a hold, and a settle charges the difference.

    A call that it reserves after it has renewed its lease is not expired.
    """
    async with replica(database, "paused") as paused, replica(database, "other") as other:
        for call_id in ("1", "2", "3"):
            await paused.reserve(reserve_stream(call_id, paused))
        await expire_lease(database, "paused")
        with capture_logs():
            await other.sweep()
        extended = await paused.extend(extend("1", ANN, 500))
        assert (extended.entry.state, extended.entry.hold) == ("expired", Amount(100, 100, 1))
        for _ in range(2):
            await paused.end(Settle("1", exactly(90, 60), "at_limit"))
            await paused.end(Release("2"))
            await other.sweep()
        [counter] = (await other.counters(ANN.keys())).values()
        assert (counter.used, counter.held) == (Amount(290, 260, 3), Amount())
        await paused.renew_lease()
        await paused.reserve(reserve_stream("4", paused))
        await other.sweep()
        assert (await entry_in(other, "4")).state == "open"
    await database.audit()


async def test_a_replica_that_was_paused_does_not_exceed_the_quota(database):
    """While it was paused another call took what was free. Its stream is charged its hold, and no more of it passes.

    This holds also if the database is away at the moment at which the stream needs a larger hold.
    """
    now = Clock(0)
    small = quota("staff/small", tokens=1300, per=LONG)
    bound = binding([small])
    async with replica(database, "paused", now=now) as paused, replica(database, "other") as other:
        accepted = await paused.reserve(replace(reserve("1", bound, STREAM), owner="paused"))
        stream = AdmittedCall(paused, accepted, small)
        stream.says("x" * 150)
        await expire_lease(database, "paused")
        now.ms += 3 * LEASE_MS
        with capture_logs():
            await other.sweep()
            assert isinstance(await other.reserve(reserve("2", bound, call(100, 1000))), Accepted)
            await asyncio.to_thread(database.server.stop)
            assert not await stream.grows()
            await asyncio.to_thread(database.server.start)
            assert not await stream.grows()
        await stream.reservation.settle(await stream.reservation.usage(), "at_limit")
        await other.end(Settle("2", exactly(100, 1000), "complete"))
        [counter] = (await other.counters(bound.keys())).values()
    assert (counter.used.output, counter.held) == (1000 + 100, Amount())
    assert counter.used.tokens <= 1300
    await database.audit()


# ------------------------------------------------------------------------------------------------------------ outages


async def test_calls_wait_for_a_restart_of_the_database(database):
    """Two restarts during the calls of two replicas: no call is refused, lost or charged twice."""
    async with replica(database, "one") as one, replica(database, "two") as two:
        settled = []

        async def client(ledger, name):
            for number in range(30):
                operation = reserve(f"{name}-{number}", ANN, call(1, 2))
                assert isinstance(await ledger.reserve(operation), Accepted)
                await ledger.end(Settle(operation.id, exactly(1, 1), "complete"))
                settled.append(operation.id)

        with capture_logs() as logs:
            working = [
                asyncio.create_task(client(ledger, f"{ledger.owner}-{number}"))
                for ledger in (one, two)
                for number in range(8)
            ]
            for mode, after in (("fast", 60), ("immediate", 240)):
                await until(lambda least=after: at_least(settled, least))
                await asyncio.to_thread(database.server.stop, mode)
                assert not await are_healthy(one, two)
                await asyncio.to_thread(database.server.start)
            await asyncio.gather(*working)
        assert "the ledger's database can't be used" in {line["event"] for line in logs}
        assert one.is_healthy
        [counter] = (await one.counters(ANN.keys())).values()
    assert (counter.used, counter.held) == (Amount(480, 480, 480), Amount())
    assert set((await database.states()).values()) == {"settled"}
    await database.audit()


async def at_least(items, least):
    return len(items) >= least


async def are_healthy(*ledgers):
    """Whether all of them are healthy, after each has tried to renew its lease."""
    await asyncio.gather(*(ledger.renew_lease() for ledger in ledgers))
    return all(ledger.is_healthy for ledger in ledgers)


async def test_a_call_that_has_waited_for_the_database_is_refused(database):
    """The end of a call keeps waiting until the database is back."""
    async with replica(database, "one", wait_s=0.05) as ledger:
        ledger.end(reserve_stream("1", ledger))
        await ledger.end(Release("unknown"))
        await asyncio.to_thread(database.server.stop)
        with capture_logs():
            end = ledger.end(Settle("1", exactly(90, 60), "complete"))
            with pytest.raises(LedgerUnavailable):
                await ledger.reserve(reserve_stream("2", ledger))
            with pytest.raises(LedgerUnavailable):
                await ledger.counters(ANN.keys())
            await asyncio.to_thread(database.server.start)
            assert (await end).entry.usage == exactly(90, 60)
    assert await database.states() == {"1": "settled"}
    await database.audit()


# ------------------------------------------------------------------------------------------------------ whole servers


ASK = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "tokens=50"}]}


async def test_two_servers_share_a_user_s_quota(database, tmp_path):
    """They need only PostgreSQL in common: tokens used through one server are visible through the other."""
    now = Clock(wall_clock_ms())
    async with (
        stage(STAFF, folder=tmp_path, clock=now, database=database.url) as one,
        stage(STAFF, folder=tmp_path, clock=now, database=database.url) as two,
    ):
        replies = await asyncio.gather(*(on.post("/v1/chat/completions", ASK) for on in (one, two) * 10))
        assert {reply.status for reply in replies} == {200}
        used = sum(reply.json()["usage"]["total_tokens"] for reply in replies)
        assert await one.used() == await two.used() == (used, 0)
    await database.audit()


async def test_a_server_whose_database_is_away_reports_it(database, tmp_path):
    """Calls get a 503 with Retry-After. It is not ready, so it gets no calls, but alive, so it is not restarted.

    When the database is back, it serves again.
    """
    short_wait = f"ledger_wait: 1s\n{STAFF}"
    async with stage(short_wait, folder=tmp_path, clock=Clock(wall_clock_ms()), database=database.url) as on:
        assert (await on.post("/v1/chat/completions", ASK)).status == 200
        await asyncio.to_thread(database.server.stop)
        with capture_logs():
            reply = await on.post("/v1/chat/completions", ASK)
            assert (reply.status, reply.error["code"]) == (503, "ledger_unavailable")
            assert reply.headers["retry-after"] == "5"
            assert (await on.get("/readyz")).status == 503
            assert (await on.get("/healthz")).status == 200
            await asyncio.to_thread(database.server.start)
            await until(lambda: serves(on))
        assert (await on.get("/readyz")).status == 200


async def serves(on):
    return (await on.post("/v1/chat/completions", ASK)).status == 200


# ---------------------------------------------------------------------------------------------------------- pgbouncer


PGBOUNCER = """
[databases]
* = host={socket} user=postgres
[pgbouncer]
unix_socket_dir = {folder}
listen_port = 6432
auth_type = any
pool_mode = transaction
default_pool_size = 3
"""


@pytest.fixture
def bouncer(database):
    """The URL of the same database through pgbouncer, where each transaction may get another connection."""
    if not (program := shutil.which("pgbouncer")):
        pytest.skip("pgbouncer is not installed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        socket = database.url.partition("host=")[2]
        (folder / "pgbouncer.ini").write_text(PGBOUNCER.format(socket=socket, folder=folder))
        command = [program, "-u", "embedded_postgres", folder / "pgbouncer.ini"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            yield f"postgresql://postgres:@/{database.name}?host={folder}&port=6432"
            process.terminate()


async def test_the_ledger_works_through_pgbouncer_in_transaction_mode(bouncer, database):
    """Migrations, batches, leases and reads of two replicas, on fewer connections than the replicas open."""
    await until(lambda: accepts_connections(bouncer))
    async with replica(bouncer, "one") as one, replica(bouncer, "two") as two:
        used = await asyncio.gather(*(run_clients(each, each.owner, count=16, calls=25) for each in (one, two)))
        counters = await asyncio.gather(*(one.counters([SHARED.key_for("any user")]) for _ in range(20)))
        assert {counter.used.tokens for found in counters for counter in found.values()} == {sum(used)}
        await two.reserve(reserve_stream("open", two))
        await expire_lease(database, "two")
        with capture_logs():
            await one.sweep()
        assert (await entry_in(two, "open")).state == "expired"
    await database.audit()


async def test_the_directory_works_through_pgbouncer_in_transaction_mode(bouncer, database):
    """Changes and lookups of three processes, whose transactions run on whatever connection is free."""
    await until(lambda: accepts_connections(bouncer))
    stores = [PostgresStore(bouncer) for _ in range(3)]
    for store in stores:
        await store.attach()
    directories = [DirectoryDatabase(store, now=lambda: NOON) for store in stores]

    async def use(directory, number):
        async with directory.change() as (connection, _):
            await connection.execute(sa.select(users).where(users.c.id == f"user {number}"))
        await directory.add_seen_user(UserId("webui", f"user {number}"), None, users_max=10**6)
        assert await directory.find_key("none") is None
        return await directory.find_user(UserId("webui", f"user {number}"))

    found = await asyncio.gather(*(use(directories[number % 3], number) for number in range(60)))
    assert [user.identity.id for user in found] == [f"user {number}" for number in range(60)]
    assert {await directory.version() for directory in directories} == {61}
    for store in stores:
        await store.close()


async def accepts_connections(url):
    try:
        await PostgresStore(url).open()
    except StoreUnavailable:
        return False
    return True
