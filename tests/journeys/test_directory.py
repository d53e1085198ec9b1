"""Users and keys of the database: a change is in force on every replica, also while the database is away.

Whole servers, on real sockets and both engines. The changes are made in the database, as by a command beside them.
"""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from proxy.identity.database import DirectoryDatabase
from proxy.identity.directory import UserId
from proxy.identity.keys import make_key
from proxy.server import store_of, wall_clock_ms
from tests.builders import HOUR, NOON
from tests.directory import add_key, add_user, set_key, set_user
from tests.postgres import shared
from tests.stage import STAFF, Clock, Reply, Stage, stage, until

pytestmark = pytest.mark.journey

CHAT = "/v1/chat/completions"
SHORT_WAIT = f"ledger_wait: 1s\n{STAFF}"


def ask(simulate: str, **more: Any) -> dict[str, Any]:
    content = [{"role": "user", "content": "Hello"}]
    return {"model": "gpt-4o-mini", "messages": content, "metadata": {"simulate": simulate}, **more}


@asynccontextmanager
async def users_of(database: str) -> AsyncIterator[DirectoryDatabase]:
    """The users in this database, as a command beside the servers changes them."""
    store = store_of(database)
    await store.attach()
    try:
        yield DirectoryDatabase(store, now=lambda: NOON)
    finally:
        await store.close()


async def get(on: Stage, key: str, path: str = "/v1/models") -> Reply:
    """GET with this key."""
    async with on.http.get(on.url + path, headers={"authorization": f"Bearer {key}"}) as response:
        return Reply(response.status, response.headers.copy(), await response.read())


async def post(on: Stage, key: str, body: Any, path: str = CHAT) -> Reply:
    """POST with this key."""
    return await on.post(path, body, user=None, headers={"authorization": f"Bearer {key}"})


async def statuses(on: Stage, key: str) -> tuple[int, int]:
    """The statuses of a list of models and of a call."""
    return (await get(on, key)).status, (await post(on, key, ask("tokens=1"))).status


async def noticed(*stages: Stage) -> None:
    """Poll once everywhere, as every server does once a second."""
    for on in stages:
        await on.server.directory.poll()


# -------------------------------------------------------------------------------------------------------- replicas


async def test_a_revoked_key_is_refused_on_every_replica_within_two_polls(tmp_path: Path) -> None:
    """T6: clients hammer three replicas. Whatever arrives after the next poll has ended, within 2 s, gets a 401.

    Streams that run go on to their end, as they were reserved. The key of another user is not affected.
    """
    database = await shared().fresh()
    clock = Clock(wall_clock_ms())
    async with AsyncExitStack() as stack:
        folders = [tmp_path / name for name in ("one", "two", "three")]
        for folder in folders:
            folder.mkdir()
        on = [
            await stack.enter_async_context(stage(STAFF, folder=folder, clock=clock, database=database))
            for folder in folders
        ]
        users = await stack.enter_async_context(users_of(database))
        key = await add_key(users, await add_user(users, "dora"))
        other = await add_key(users, await add_user(users, "emil"))
        await noticed(*on)
        streams = [asyncio.ensure_future(post(each, key.text, ask("tokens=60 speed=20", stream=True))) for each in on]
        for each in on:
            await each.simulator.until(lambda: each.simulator.chunks_sent > 2)  # noqa: B023
        polls = [_Polls(each) for each in on]
        seen: list[tuple[int, int]] = []  # how many polls had begun when a request was sent, and its status

        async def hammer(number: int) -> None:
            while polls[number].begun < 4:
                begun = polls[number].begun
                seen.append((begun, (await get(on[number], key.text)).status))
                assert (await get(on[number], other.text)).status == 200

        hammering = [asyncio.ensure_future(hammer(number)) for number in (0, 1, 2) * 2]
        await until(lambda: len(seen) > 60)
        assert {status for _, status in seen} == {200}
        await set_key(users, key, revoked_at=clock.ms)
        for each in polls:
            each.begun = 0
        await asyncio.gather(*hammering)
        # When the second poll begins, the first one that began after the change has ended.
        assert {status for begun, status in seen if begun >= 2} == {401}
        replies = await asyncio.gather(*streams)
        assert [reply.status for reply in replies] == [200] * 3
        assert all(reply.body.endswith(b"data: [DONE]\n\n") for reply in replies)
        await asyncio.gather(*(each.all_settled() for each in on))
        rows = {(row["outcome"], row["output_tokens"], row["key_id"]) for row in await on[0].rows("calls")}
        assert rows == {("complete", 60, key.id)}


class _Polls:
    """Counts the polls of a server that have begun. They are a second apart."""

    def __init__(self, on: Stage) -> None:
        self.begun = 0
        database = on.server.directory._store
        read_version = database.version

        async def version() -> int:
            self.begun += 1
            return await read_version()

        database.version = version  # type: ignore[method-assign]


@pytest.mark.every_engine
async def test_a_change_is_in_force_after_the_next_poll(tmp_path: Path) -> None:
    """T6: a key revoked, a user disabled and enabled again, a group taken away, a new key."""
    async with stage(folder=tmp_path) as on, users_of(on.database) as users:
        dora = await add_user(users, "dora")
        key = await add_key(users, dora)
        await noticed(on)
        assert await statuses(on, key.text) == (200, 200)
        await set_user(users, dora, disabled_at=NOON)
        await noticed(on)
        assert await statuses(on, key.text) == (401, 401)
        await set_user(users, dora, disabled_at=None)
        await noticed(on)
        assert await statuses(on, key.text) == (200, 200)
        await set_user(users, dora, groups="[]")
        await noticed(on)
        reply = await post(on, key.text, ask("tokens=1"))
        assert (reply.status, "No quota of yours covers" in reply.error["message"]) == (404, True)
        await set_user(users, dora, groups='["staff"]')
        second = await add_key(users, dora)
        await set_key(users, key, revoked_at=NOON)
        await noticed(on)
        assert (await statuses(on, key.text), await statuses(on, second.text)) == ((401, 401), (200, 200))
        calls = await on.rows("calls")
        assert {row["user_name"] for row in calls} == {"database:dora"}
        assert Counter(row["key_id"] for row in calls) == {key.id: 2, second.id: 1}


async def test_a_key_expires_and_a_rotated_one_overlaps(tmp_path: Path) -> None:
    """T6: the clock alone ends a key, without a poll. Until then both keys of a rotation are valid."""
    clock = Clock()
    async with stage(folder=tmp_path, clock=clock) as on, users_of(on.database) as users:
        dora = await add_user(users, "dora")
        old = await add_key(users, dora, expires_at=NOON + 24 * HOUR)  # rotated with an overlap of 24 hours
        new = await add_key(users, dora, expires_at=NOON + 48 * HOUR)
        await noticed(on)
        assert (await statuses(on, old.text), await statuses(on, new.text)) == ((200, 200), (200, 200))
        clock.ms = NOON + 24 * HOUR - 1
        assert await statuses(on, old.text) == (200, 200)
        clock.ms += 1
        assert (await statuses(on, old.text), await statuses(on, new.text)) == ((401, 401), (200, 200))
        clock.ms = NOON + 48 * HOUR
        assert await statuses(on, new.text) == (401, 401)
        metrics = (await on.http.get(f"{on.admin_url}/metrics")).content
        text = (await metrics.read()).decode()
        assert 'llm_quota_unauthorized_total{reason="expired"} 4.0' in text
        assert 'llm_quota_directory_entries{kind="keys"}' in text
        assert "llm_quota_directory_age_seconds" in text


REVOKE = """
import asyncio, sys
from pathlib import Path
from proxy.identity.database import DirectoryDatabase
from proxy.ledger.schema import api_keys
from proxy.ledger.sqlite import SqliteStore
async def main():
    store = SqliteStore(Path(sys.argv[1]))
    await store.attach()
    async with DirectoryDatabase(store, now=lambda: 0).change() as (connection, _):
        await connection.execute(api_keys.update().values(revoked_at=1))
    await store.close()
asyncio.run(main())
"""


async def test_another_process_may_change_the_sqlite_file_of_a_running_server(tmp_path: Path) -> None:
    """It takes neither the server's lock nor its place, and calls go on meanwhile."""
    async with stage(folder=tmp_path) as on, users_of(on.database) as users:
        keys = [await add_key(users, await add_user(users, f"user {number}")) for number in range(3)]
        await noticed(on)
        calls = [on.begin(CHAT, ask("tokens=5")) for _ in range(20)]
        command = [sys.executable, "-c", REVOKE, on.database.removeprefix("sqlite:///")]
        await asyncio.to_thread(subprocess.run, command, check=True)
        assert {(await call).status for call in calls} == {200}
        await noticed(on)
        assert {await statuses(on, key.text) for key in keys} == {(401, 401)}
        assert await statuses(on, "key-of-alice-0123456789abcdef") == (200, 200)


# ------------------------------------------------------------------------------------------------------------- cuts


@pytest.mark.every_engine
@pytest.mark.parametrize("what", ["key", "user"])
async def test_a_cut_ends_what_is_running_at_once_and_charges_it(what: str, tmp_path: Path) -> None:
    """T6: a stream, an answer that is not streamed, an upload, and a call that is only read to its end.

    The stream breaks off, and clients that have no answer yet find their connection closed. What others have running
    is not affected.
    """
    async with stage(folder=tmp_path, on_disconnect="drain") as on, users_of(on.database) as users:
        dora, emil = await add_user(users, "dora"), await add_user(users, "emil")
        key, spared = await add_key(users, dora), await add_key(users, emil)
        await noticed(on)
        begin = asyncio.ensure_future
        stream = begin(post(on, key.text, ask("tokens=50 stall=7", stream=True, max_tokens=50)))
        await on.simulator.until(lambda: on.simulator.chunks_sent == 7)
        whole = begin(post(on, key.text, ask("hang", max_tokens=30)))
        drained = begin(post(on, key.text, ask("tokens=50 stall=5", stream=True, max_tokens=50)))
        await until(lambda: on.simulator.chunks_sent == 12 and on.simulator.open_calls == 3)
        await on.hang_up(drained)
        other = begin(post(on, spared.text, ask("tokens=40 speed=40", stream=True)))
        await until(lambda: on.simulator.open_calls == 4)
        upload = begin(_upload_without_end(on, key.text))
        await until(lambda: len(on.server._api._running) == 5)
        if what == "key":
            await set_key(users, key, revoked_at=NOON, is_cut=True)
        else:
            await set_user(users, dora, disabled_at=NOON, is_cut=True)
        with capture_logs() as logs:
            await noticed(on)
            ended = await asyncio.gather(stream, whole, upload, return_exceptions=True)
        assert [isinstance(each, aiohttp.ClientError) for each in ended] == [True] * 3, ended
        assert [line["requests"] for line in logs if "were ended" in line["event"]] == [4]
        reply = await other
        assert (reply.status, reply.body.count(b'"content"') >= 40) == (200, True)
        await on.all_settled()
        assert on.server._api._running == {}
        calls = [row for row in await on.rows("calls") if row["key_id"] == key.id]
        assert {row["state"] for row in calls} == {"settled"}
        by_outcome = {(row["outcome"], row["output_tokens"]) for row in calls}
        # An answer that is not streamed, and one that is only read to its end, may have cost all that they hold.
        assert ("stopped", 7) in by_outcome
        assert ("stopped", 30) in by_outcome
        assert len(by_outcome) == 3
        assert await statuses(on, key.text) == (401, 401)
        await on.audit()


async def _upload_without_end(on: Stage, key: str) -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield b'{"model": "gpt-4o-mini", '
        await asyncio.Event().wait()

    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    async with on.http.post(on.url + CHAT, headers=headers, data=parts()):
        pass


async def test_a_request_that_is_being_identified_during_a_cut_is_refused(tmp_path: Path) -> None:
    """T150: its key was read before the change, and its user is read after it.

    Nothing of it could be ended by the cut, because it was not known yet whose request it is.
    """
    async with stage(folder=tmp_path) as on, users_of(on.database) as users:
        key = await add_key(users, await add_user(users, "dora"))
        await noticed(on)
        database = on.server.directory._store
        find_user = database.find_user
        is_asked, may_answer = asyncio.Event(), asyncio.Event()

        async def slow(identity: UserId) -> Any:
            is_asked.set()
            await may_answer.wait()
            return await find_user(identity)

        database.find_user = slow  # type: ignore[method-assign]
        call = asyncio.ensure_future(post(on, key.text, ask("tokens=1")))
        await is_asked.wait()
        await set_key(users, key, revoked_at=NOON, is_cut=True)
        await noticed(on)
        may_answer.set()
        assert (await call).status == 401
        assert await on.rows("calls") == []


async def test_a_call_that_waits_for_its_quota_is_cut(tmp_path: Path) -> None:
    """It holds nothing, so nothing is charged."""
    policy = STAFF.replace("tokens: 1M", "tokens: 200")
    async with stage(policy, folder=tmp_path) as on, users_of(on.database) as users:
        key = await add_key(users, await add_user(users, "dora"))
        await noticed(on)
        first = asyncio.ensure_future(post(on, key.text, ask("tokens=50 stall=7", stream=True, max_tokens=100)))
        await on.simulator.until(lambda: on.simulator.chunks_sent == 7)
        second = asyncio.ensure_future(post(on, key.text, ask("tokens=50", max_tokens=100)))
        await until(lambda: on.server.calls_in_flight == 2)
        await set_key(users, key, revoked_at=NOON, is_cut=True)
        await noticed(on)
        ended = await asyncio.gather(first, second, return_exceptions=True)
        assert [isinstance(each, aiohttp.ClientError) for each in ended] == [True, True]
        await on.all_settled()
        assert [(row["outcome"], row["output_tokens"]) for row in await on.rows("calls")] == [("stopped", 7)]
        await on.audit()


# ---------------------------------------------------------------------------------------------------------- outages


async def test_while_the_database_is_away_only_who_is_remembered_is_identified(tmp_path: Path) -> None:
    """T151: a caller who is not remembered gets a 503, not a 401: its key may be right. A wrong key is still wrong.

    A call needs the ledger and gets its 503. When the database is back, all is as before.
    """
    server = shared()
    database = await server.fresh()
    async with (
        stage(SHORT_WAIT, folder=tmp_path, clock=Clock(wall_clock_ms()), database=database) as on,
        users_of(database) as users,
    ):
        dora = await add_user(users, "dora")
        key, unseen = await add_key(users, dora), await add_key(users, dora)
        await noticed(on)
        assert await statuses(on, key.text) == (200, 200)
        await asyncio.to_thread(server.stop)
        with capture_logs() as logs:
            for _ in range(3):
                await noticed(on)
                assert (await get(on, key.text)).status == 200
                reply = await get(on, unseen.text)
                assert (reply.status, reply.error["code"]) == (503, "directory_unavailable")
                assert reply.headers["retry-after"]
                for wrong in (f"{unseen.text}x", "lqp_", "key-of-nobody-0123456789abcdef"):
                    assert (await get(on, wrong)).status == 401
            assert (await get(on, "key-of-alice-0123456789abcdef")).status == 200
            reply = await post(on, key.text, ask("tokens=1"))
            assert (reply.status, reply.error["code"]) == (503, "ledger_unavailable")
            reply = await post(on, unseen.text, ask("tokens=1"))
            assert (reply.status, reply.error["code"]) == (503, "directory_unavailable")
            await asyncio.to_thread(server.start)
            await noticed(on)
        assert await statuses(on, unseen.text) == (200, 200)
        told = [line["event"] for line in logs if "directory" in line["event"]]
        assert told == ["the directory of users can't be read", "the directory of users can be read again"]


# ------------------------------------------------------------------------------------------------- names and attacks

NAMES = ["Åsa", "A\u030asa", "asa", "Asa", "山田/花子", "a/b/../c", "Ελένη", "😀", "x" * 500, "a b", "%2F"]


@pytest.mark.every_engine
async def test_each_name_is_a_user_of_its_own(tmp_path: Path) -> None:
    """In other alphabets, with slashes, long, and equal but for case or Unicode's normal form."""
    async with stage(folder=tmp_path) as on, users_of(on.database) as users:
        keys = {name: await add_key(users, await add_user(users, name)) for name in NAMES}
        await noticed(on)
        for tokens, name in enumerate(NAMES, 1):
            assert (await post(on, keys[name].text, ask(f"tokens={tokens}"))).status == 200
        for tokens, name in enumerate(NAMES, 1):
            listed = (await get(on, keys[name].text, "/v1/quota")).json()["data"]
            [daily] = [item for item in listed if item["id"] == "staff/daily"]
            assert daily["requests"]["used"] == 1
            own = [row for row in await on.rows("calls") if row["user_name"] == f"database:{name}"]
            assert [row["output_tokens"] for row in own] == [tokens]
        await on.audit()


async def test_a_name_that_records_can_t_have_is_refused(tmp_path: Path) -> None:
    """T153: a row that was inserted by hand. It is a 401, not an error of the ledger."""
    async with stage(folder=tmp_path) as on, users_of(on.database) as users:
        for name in ("n" * 600, "line\nend"):
            key = await add_key(users, await add_user(users, name))
            await noticed(on)
            assert await statuses(on, key.text) == (401, 401)


async def test_wrong_keys_in_great_numbers_disturb_nobody(tmp_path: Path) -> None:
    """T5: well-formed ones, which have to be looked up, and others. The memory for users stays theirs."""
    async with stage(folder=tmp_path) as on, users_of(on.database) as users:
        key = await add_key(users, await add_user(users, "dora"))
        await noticed(on)
        assert await statuses(on, key.text) == (200, 200)
        asked: list[UserId | str] = []
        find_key = on.server.directory._store.find_key

        async def counted(digest: str) -> Any:
            asked.append(digest)
            return await find_key(digest)

        on.server.directory._store.find_key = counted  # type: ignore[method-assign]
        wrong = [make_key().text for _ in range(500)] + [f"lqp_{number}" for number in range(500)]
        with capture_logs():
            for first in range(0, len(wrong), 50):
                replies = await asyncio.gather(*(get(on, each) for each in wrong[first : first + 50]))
                assert {reply.status for reply in replies} == {401}
                assert {json.dumps(reply.error) for reply in replies} == {json.dumps(replies[0].error)}
                assert await statuses(on, key.text) == (200, 200)
        assert len(asked) == 500
