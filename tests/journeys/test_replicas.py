"""Several processes on one PostgreSQL: exact together, and each sees to what the others leave behind.

Two ledgers in one process stand for two replicas; what only a second process can show is in test_postgres.
"""

import asyncio
import shutil
import subprocess
import tempfile
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from proxy.errors import LedgerUnavailable
from proxy.ledger.book import Accepted, Refused, Release, Settle
from proxy.ledger.ledger import LEASE_MS, Ledger
from proxy.ledger.postgres import PostgresStore, Timeouts
from proxy.ledger.store import StoreUnavailable
from proxy.policy.amounts import Amount, AtLeast, Tokens
from proxy.server import wall_clock_ms
from tests.builders import binding, call, exactly, extend, quota, reserve
from tests.calls.test_reservation import Call
from tests.ledger.test_postgres import LONG, Database, until
from tests.postgres import shared
from tests.stage import STAFF, Clock, stage

pytestmark = pytest.mark.journey

DAILY = quota("staff/daily", tokens=10**9, per=LONG)
POT = quota("staff/pot", tokens=20_000, per=LONG, shared=True)
ANN = binding([DAILY])
STREAM = call(100, 900, 100, initial_hold=100)


@pytest.fixture
async def database():
    server = shared()
    return Database(server, await server.fresh())


@asynccontextmanager
async def replica(where, owner, *, wait_s=50.0, now=lambda: 0):
    """A ledger as each process has one; its own clock is wrong, because the database's is what counts."""
    url = where.url if isinstance(where, Database) else where
    store = PostgresStore(url, timeouts=Timeouts(idle_ms=1000, lock_ms=1500, statement_ms=2000, whole_ms=2500))
    ledger = Ledger(store, owner=owner, now=now, retry_s=0.01, wait_s=lambda: wait_s)
    await ledger.start()
    try:
        yield ledger
    finally:
        await ledger.close()


def stream(call_id, ledger):
    """What lets a stream in through this replica."""
    return replace(reserve(call_id, ANN, STREAM), owner=ledger.owner)


async def let_die(database, owner):
    """The time of its lease goes by without a sign of it."""
    await database.run(f"UPDATE llm_quota_proxy.owners SET alive_until = 0 WHERE id = '{owner}'")


async def clients(ledger, name, *, count, calls):
    """Clients of one replica who come again whenever they were let in; what they used."""
    used = []

    async def client(number):
        who = binding([DAILY, POT], user=f"user {number}")
        for each in range(calls):
            operation = reserve(f"{name}-{number}-{each}", who, call(10, 50))
            if isinstance(await ledger.reserve(operation), Accepted):
                used.append(10 + each)
                await ledger.end(Settle(operation.id, exactly(10, each), "complete"))

    await asyncio.gather(*(client(number) for number in range(count)))
    return sum(used)


async def test_of_all_that_come_through_any_as_many_are_let_in_as_fit(database):
    """A hundred users at each of two replicas, for one pot that nobody has touched: 40 fit."""
    async with replica(database, "one") as one, replica(database, "two") as two:
        operations = [
            (ledger, reserve(f"{name}-{number}", binding([POT], user=f"user {number}"), call(100, 400)))
            for number in range(100)
            for name, ledger in (("a", one), ("b", two))
        ]
        answers = await asyncio.gather(*(ledger.reserve(operation) for ledger, operation in operations))
    assert sum(isinstance(answer, Accepted) for answer in answers) == 40
    assert sum(isinstance(answer, Refused) for answer in answers) == 160
    await database.audit()


async def test_a_pot_that_two_hammer_is_used_up_and_never_over(database):
    """32 clients each, a counter for each user and one pot for all: never over, and nothing is left for nothing."""
    async with replica(database, "one") as one, replica(database, "two") as two:
        used = await asyncio.gather(*(clients(each, each.owner, count=32, calls=25) for each in (one, two)))
        [counter] = (await one.counters([POT.key_for("anybody")])).values()
    assert 20_000 - 60 < sum(used) <= 20_000
    assert (counter.used.tokens, counter.held) == (sum(used), Amount())
    [[deadlocks]] = await database.run("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    assert deadlocks == 0
    await database.audit()


# ------------------------------------------------------------------------------------------------------------- leases


async def test_calls_of_one_that_lives_are_left_alone(database):
    """However often the others look."""
    async with replica(database, "one") as one, replica(database, "two") as two:
        await one.reserve(stream("1", one))
        await asyncio.gather(two.sweep(), two.sweep(), one.sweep())
        assert await database.states() == {"1": "open"}


async def test_calls_of_one_that_died_are_charged_once_by_the_others(database):
    """When its lease has run out, and whoever looks first; also where several look at once."""
    async with replica(database, "one") as one, replica(database, "two") as two:
        async with replica(database, "dead") as dead:
            await dead.reserve(stream("1", dead))
            await dead.reserve(stream("2", dead))
            await dead.end(Settle("2", exactly(1, 1), "complete"))
        await one.sweep()
        assert await database.states() == {"1": "open", "2": "settled"}  # it may only be slow
        await let_die(database, "dead")
        with capture_logs():
            await asyncio.gather(one.sweep(), two.sweep())
        entry = await one.entry("1")
        assert (entry.state, entry.outcome, entry.usage) == ("expired", "lost", AtLeast(Tokens(100, 100)))
        [counter] = (await two.counters(ANN.keys())).values()
    assert (counter.used, counter.held) == (Amount(101, 101, 2), Amount())
    await database.audit()


async def test_one_that_was_paused_does_no_harm(database):
    """Taken for dead, it learns it when its stream grows; its settle books the difference, once."""
    async with replica(database, "paused") as paused, replica(database, "other") as other:
        for call_id in ("1", "2", "3"):
            await paused.reserve(stream(call_id, paused))
        await let_die(database, "paused")
        with capture_logs():
            await other.sweep()
        grown = await paused.extend(extend("1", ANN, 500))
        assert (grown.entry.state, grown.entry.hold) == ("expired", Amount(100, 100, 1))
        for _ in range(2):
            await paused.end(Settle("1", exactly(90, 60), "at_limit"))
            await paused.end(Release("2"))
            await other.sweep()
        [counter] = (await other.counters(ANN.keys())).values()
        assert (counter.used, counter.held) == (Amount(290, 260, 3), Amount())
        await paused.renew_lease()
        await paused.reserve(stream("4", paused))
        await other.sweep()
        assert (await other.entry("4")).state == "open"
    await database.audit()


async def test_one_that_was_paused_gives_nobodys_room_away(database):
    """The pot is full again before it comes back; what its stream held is on the books, and no more passes on.

    Also where its database goes away in the very moment in which it would hold more.
    """
    now = Clock(0)
    small = quota("staff/small", tokens=1300, per=LONG)
    who = binding([small])
    async with replica(database, "paused", now=now) as paused, replica(database, "other") as other:
        booked = await paused.reserve(replace(reserve("1", who, STREAM), owner="paused"))
        it = Call(paused, booked, small)
        it.says("x" * 150)
        await let_die(database, "paused")
        now.ms += 3 * LEASE_MS
        with capture_logs():
            await other.sweep()
            assert isinstance(await other.reserve(reserve("2", who, call(100, 1000))), Accepted)
            await asyncio.to_thread(database.server.stop)
            assert not await it.grows()
            await asyncio.to_thread(database.server.start)
            assert not await it.grows()
        await it.reservation.end("at_limit")
        await other.end(Settle("2", exactly(100, 1000), "complete"))
        [counter] = (await other.counters(who.keys())).values()
    assert (counter.used.output, counter.held) == (1000 + 100, Amount())
    assert counter.used.tokens <= 1300
    await database.audit()


# ------------------------------------------------------------------------------------------------------------ outages


async def test_a_restart_of_the_database_is_a_pause(database):
    """Under the calls of two replicas, twice: nobody is refused, nothing is lost or doubled."""
    async with replica(database, "one") as one, replica(database, "two") as two:
        done = []

        async def client(ledger, name):
            for number in range(30):
                operation = reserve(f"{name}-{number}", ANN, call(1, 2))
                assert isinstance(await ledger.reserve(operation), Accepted)
                await ledger.end(Settle(operation.id, exactly(1, 1), "complete"))
                done.append(operation.id)

        with capture_logs() as logs:
            working = [
                asyncio.create_task(client(ledger, f"{ledger.owner}-{number}"))
                for ledger in (one, two)
                for number in range(8)
            ]
            for mode, after in (("fast", 60), ("immediate", 240)):
                await until(lambda least=after: at_least(done, least))
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


async def at_least(done, least):
    return len(done) >= least


async def are_healthy(*ledgers):
    """Whether they would serve; each finds it out by its lease, if not by a call."""
    await asyncio.gather(*(ledger.renew_lease() for ledger in ledgers))
    return all(ledger.is_healthy for ledger in ledgers)


async def test_who_has_waited_long_enough_for_the_database_is_told(database):
    """And an end waits on, until it is back."""
    async with replica(database, "one", wait_s=0.05) as ledger:
        ledger.end(stream("1", ledger))
        await ledger.end(Release("unknown"))
        await asyncio.to_thread(database.server.stop)
        with capture_logs():
            end = ledger.end(Settle("1", exactly(90, 60), "complete"))
            with pytest.raises(LedgerUnavailable):
                await ledger.reserve(stream("2", ledger))
            with pytest.raises(LedgerUnavailable):
                await ledger.counters(ANN.keys())
            await asyncio.to_thread(database.server.start)
            assert (await end).entry.usage == exactly(90, 60)
    assert await database.states() == {"1": "settled"}
    await database.audit()


# ------------------------------------------------------------------------------------------------------ whole servers


ASK = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "tokens=50"}]}


async def test_two_servers_share_what_a_user_has(database, tmp_path):
    """Nothing to run beside PostgreSQL: what is used through one is seen through the other."""
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


async def test_a_server_whose_database_is_away_says_so(database, tmp_path):
    """503 and when to come again; not ready, so it gets no calls; alive, so nobody kills it; then all is well."""
    hasty = f"ledger_wait: 1s\n{STAFF}"
    async with stage(hasty, folder=tmp_path, clock=Clock(wall_clock_ms()), database=database.url) as on:
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
    """The same database through pgbouncer, where each transaction may get another connection."""
    if not (program := shutil.which("pgbouncer")):
        pytest.skip("there is no pgbouncer here")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        socket = database.url.partition("host=")[2]
        (folder / "pgbouncer.ini").write_text(PGBOUNCER.format(socket=socket, folder=folder))
        command = [program, "-u", "embedded_postgres", folder / "pgbouncer.ini"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            yield f"postgresql://postgres:@/{database.name}?host={folder}&port=6432"
            process.terminate()


async def test_all_goes_through_pgbouncer_in_transaction_mode(bouncer, database):
    """Migrations, batches, leases and reads of two replicas, on fewer connections than they think they have."""
    await until(lambda: answers(bouncer))
    async with replica(bouncer, "one") as one, replica(bouncer, "two") as two:
        used = await asyncio.gather(*(clients(each, each.owner, count=16, calls=25) for each in (one, two)))
        counters = await asyncio.gather(*(one.counters([POT.key_for("anybody")]) for _ in range(20)))
        assert {counter.used.tokens for found in counters for counter in found.values()} == {sum(used)}
        await two.reserve(stream("left", two))
        await let_die(database, "two")
        with capture_logs():
            await one.sweep()
        assert (await two.entry("left")).state == "expired"
    await database.audit()


async def answers(url):
    try:
        await PostgresStore(url).open()
    except StoreUnavailable:
        return False
    return True
