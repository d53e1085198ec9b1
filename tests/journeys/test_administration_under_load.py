"""A limit lowered, a grant given, a counter reset: while 64 clients of eight users use three replicas on PostgreSQL.

The quotas limit requests, so what is admitted can be counted by the rows of the database, and exactly.
"""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count

import pytest

from proxy.server import wall_clock_ms
from tests.admin import ADMINS, ask
from tests.ledger.test_postgres import Database, until
from tests.postgres import shared
from tests.stage import key_of, stage

pytestmark = [pytest.mark.journey, pytest.mark.slow]

USERS = [f"user-{number}" for number in range(8)]
POLICY = (
    """
models:
  fast: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}
groups:
  staff: {quotas: {daily: {tokens: 100M, per: day}}}
users:
"""
    + "".join(f'  {user}: {{groups: [staff], keys: ["{key_of(user)}"]}}\n' for user in USERS)
    + ADMINS
)
QUOTA = "/groups/staff/quotas/load"
CLIENTS = 64
IN_FORCE_MS = 2000


class Load:
    """Three replicas, and clients that call them. `database` is theirs."""

    def __init__(self, database, replicas):
        self.database = database
        self.replicas = replicas
        self._numbers = count()

    async def set_limit(self, requests, *, shared=True):
        """Make the quota or change it, at one of the replicas. Returns when that was answered (ms)."""
        replica = self._replica()
        found = await ask(replica, "GET", QUOTA)
        match = {"if-match": found.headers["etag"]} if found.status == 200 else {"if-none-match": "*"}
        reply = await ask(
            *(replica, "PUT", QUOTA),
            admin="ops",
            headers=match,
            json={"requests": requests, "per": "1h", "shared": shared},
        )
        assert reply.status == 200, reply.json()
        return wall_clock_ms()

    async def grant(self, amount, *, user=None):
        """Grant so many requests more. Returns the grant's id."""
        body = {"quota": "staff/load", "user": user, "measure": "requests", "amount": amount, "reason": "a deadline"}
        reply = await ask(self._replica(), "POST", "/grants", json={**body, "until": wall_clock_ms() + 600_000})
        assert reply.status == 201, reply.json()
        return reply.json()["id"]

    async def end_grant(self, id):
        """End a grant."""
        assert (await ask(self._replica(), "DELETE", f"/grants/{id}")).status == 200

    async def reset(self):
        """Reset the quota's counters. Returns the number of requests that they had used."""
        reply = await ask(self._replica(), "POST", "/counters/reset", json={"quota": "staff/load"})
        assert reply.status == 200, reply.json()
        return sum(each["used"]["requests"] for each in reply.json()["quotas"])

    async def is_in_force(self):
        """Wait until every replica has what was changed last, which takes 2 s at the most."""
        [[version]] = await self.database.run("SELECT policy_version FROM llm_quota_proxy.directory")
        began_at = wall_clock_ms()
        for replica in self.replicas:
            while replica.server.refresh.policy_version < version:  # noqa: ASYNC110 - another replica sets no event
                await asyncio.sleep(0.01)
        assert wall_clock_ms() - began_at < IN_FORCE_MS

    async def use_up(self, simulate="tokens=5"):
        """Let all clients call until each is refused."""
        await asyncio.gather(*(self._client(number, simulate) for number in range(CLIENTS)))

    async def call(self, user, simulate="tokens=5"):
        """The status of one call."""
        body = {"model": "fast", "messages": [{"role": "user", "content": "Hi"}], "metadata": {"simulate": simulate}}
        return (await self._replica().post("/v1/chat/completions", body, user=user)).status

    async def admitted(self):
        """The calls that were admitted, in their order."""
        return sorted(await self.database.rows("calls"), key=lambda row: row["reserved_at"])

    async def admitted_of(self, user):
        """How many calls of a user were admitted."""
        return sum(row["user_name"] == user for row in await self.admitted())

    async def at_least(self, number):
        """Whether so many calls were admitted."""
        return len(await self.admitted()) >= number

    async def used(self):
        """What the quota's counters have used and hold together, in requests."""
        [found] = await self.database.run(
            "SELECT sum(used_requests), sum(held_requests) FROM llm_quota_proxy.counters "
            "WHERE quota_id = 'staff/load'"
        )
        return tuple(map(int, found))

    async def _client(self, number, simulate):
        # On a busy machine a call can wait too long in the queue of the ledger. Its 503 costs nothing: call again.
        user = USERS[number % len(USERS)]
        while (status := await self.call(user, simulate)) in (200, 503):
            pass
        assert status == 429

    def _replica(self):
        return self.replicas[next(self._numbers) % len(self.replicas)]


@pytest.fixture
async def load(tmp_path):
    """The replicas, without the quota."""
    database = Database(shared(), await shared().migrated())
    async with replicas(database, tmp_path) as started:
        yield Load(database, started)


@asynccontextmanager
async def replicas(database, folder):
    """Three servers with a database in common, by the real clock."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(stage(POLICY, folder=folder, clock=wall_clock_ms, database=database.url))
            for _ in range(3)
        ]


async def test_a_limit_is_lowered_and_raised(load):
    """After 2 s no replica admits more than the new limit: calls up to it, or none if it is exceeded already.

    Raised again by 50, exactly 50 more are admitted.
    """
    await load.set_limit(100_000)
    await load.is_in_force()
    using = asyncio.create_task(load.use_up())
    await until(lambda: load.at_least(150))
    answered_at = await load.set_limit(100)
    await using
    admitted = await load.admitted()
    late = [row for row in admitted[100:] if row["reserved_at"] > answered_at + IN_FORCE_MS]
    assert late == []
    assert {row["owner"] for row in admitted} == {replica.server.ledger.owner for replica in load.replicas}
    assert await load.used() == (len(admitted), 0)

    await load.set_limit(len(admitted) + 50)
    await load.is_in_force()
    await load.use_up()
    assert len(await load.admitted()) == len(admitted) + 50
    assert await load.used() == (len(admitted) + 50, 0)


async def test_a_limit_that_is_not_reached_yet_is_lowered(load):
    """Exactly as many calls are admitted as it allows then. 64 clients make at most 213 calls in a second here."""
    await load.set_limit(100_000)
    await load.is_in_force()
    using = asyncio.create_task(load.use_up("tokens=5 delay=0.3"))
    await until(lambda: load.at_least(20))
    await load.set_limit(700)
    await using
    assert len(await load.admitted()) == 700
    assert await load.used() == (700, 0)


async def test_a_grant_to_a_pot(load):
    """It adds exactly its amount, and after its end nothing more is admitted."""
    await load.set_limit(120)
    await load.is_in_force()
    using = asyncio.create_task(load.use_up())
    await until(lambda: load.at_least(60))
    id = await load.grant(45)
    await using
    await load.is_in_force()
    await load.use_up()
    assert len(await load.admitted()) == 165
    await load.end_grant(id)
    await load.is_in_force()
    await load.use_up()
    assert len(await load.admitted()) == 165
    # What was used of the grant stays used: a limit of 165 is exhausted too.
    await load.set_limit(170)
    await load.is_in_force()
    await load.use_up()
    assert len(await load.admitted()) == 170
    assert await load.used() == (170, 0)


async def test_a_grant_to_a_user_and_to_a_group(load):
    """The user gets both, and each other member that of the group."""
    await load.set_limit(10, shared=False)
    await load.is_in_force()
    using = asyncio.create_task(load.use_up())
    await until(lambda: load.at_least(20))
    of_user, of_group = await load.grant(7, user=USERS[0]), await load.grant(5)
    await using
    await load.is_in_force()
    await load.use_up()
    assert [await load.admitted_of(user) for user in USERS] == [22, *[15] * 7]
    for id in (of_user, of_group):
        await load.end_grant(id)
    await load.set_limit(16, shared=False)
    await load.is_in_force()
    await load.use_up()
    assert [await load.admitted_of(user) for user in USERS] == [22, *[16] * 7]
    assert await load.used() == (22 + 7 * 16, 0)


async def test_a_counter_is_reset(load):
    """Exactly the limit more is admitted, beside what had been used until then: at no replica more or less."""
    await load.set_limit(150)
    await load.is_in_force()
    using = asyncio.create_task(load.use_up())
    await until(lambda: load.at_least(70))
    used = await load.reset()
    await using
    await load.use_up()
    assert used >= 1
    assert len(await load.admitted()) == used + 150
    assert await load.used() == (150, 0)


async def test_calls_in_flight_settle_into_a_counter_that_was_reset(load):
    """Ten are in flight at the reset. They count in what is admitted after it."""
    await load.set_limit(40)
    await load.is_in_force()
    slow = [asyncio.create_task(load.call(USERS[number % 8], "tokens=5 delay=8")) for number in range(10)]
    await until(lambda: load.at_least(10))
    assert [await load.call(USERS[0]) for _ in range(30)] == [200] * 30
    assert await load.used() == (30, 10)
    assert await load.reset() == 30
    assert await load.used() == (0, 10)
    await load.use_up()
    assert [await call for call in slow] == [200] * 10
    assert await load.used() == (40, 0)
    assert len(await load.admitted()) == 70
