"""The streams of events: bounded, resumable, and nothing about others in them; over replicas within a second."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa
from aiohttp import web

from proxy.calls.activity import COUNTERS_AT_ONCE, DETAILS_MAX, Batch, Details
from proxy.errors import TooManyStreams
from proxy.ledger.replicas import AuditedChange, Replicas
from proxy.ledger.schema import audit, feed, replicas
from proxy.ledger.store import StoreUnavailable
from proxy.policy.amounts import Amount
from proxy.policy.quota import Counter
from proxy.policy.windows import Window
from proxy.web import events as module
from proxy.web.events import LINGER_MS, Bounds, Events, Filter
from proxy.web.exchange import Exchange
from proxy.web.middleware import LOG_LINE
from tests.builders import HOUR, NOON, amount, binding, log_line, quota
from tests.calls.test_activity import Process, refuse
from tests.events import Reader
from tests.stage import stage

EVERYTHING = Filter()
DAILY = quota("staff/daily", tokens=1_000_000)
POT = quota("staff/pot", tokens=1_000_000, shared=True)
LAB = quota("lab/daily", tokens=1_000_000)


def window() -> Window:
    return Window(NOON, NOON + HOUR)


class Proxy:
    """A process whose calls, clock and ticks a test moves."""

    def __init__(self, *quotas: Any, owner: str = "one", bounds: Bounds | None = None) -> None:
        self.process = Process(*(quotas or (DAILY, POT, LAB)))
        self.health: dict[str, object] = {"ledger": "ok"}
        self.events = Events(
            self.process.activity,
            owner=owner,
            now=lambda: self.process.now,
            health=lambda: self.health,
            bounds=bounds,
        )
        self.sees = EVERYTHING
        self.check: Callable[[], Awaitable[Filter | None]] = self._see
        self.ended = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        request[LOG_LINE] = log_line()
        try:
            return await self.events.stream(request, self.sees, check=self.check)
        except TooManyStreams:
            return web.Response(status=503)
        finally:
            self.ended.set()

    async def _see(self) -> Filter | None:
        return self.sees

    def use(self, user: str, tokens: int, *, at: Any = DAILY) -> None:
        """A counter of this user has another state."""
        self.process.activity.counters_changed(
            {at.key_for(user): Counter(window(), amount(tokens))}, self.process.now
        )


@asynccontextmanager
async def served(proxy: Proxy) -> AsyncIterator[Callable[..., Awaitable[Reader]]]:
    """Serve the streams of a proxy, and give the function that opens one."""
    application = web.Application()
    application.router.add_get("/", proxy.handle)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    # Each client gets all that was sent at once, so a test does not depend on how fast it reads.
    async with aiohttp.ClientSession(read_bufsize=2**26) as http:

        async def open_(last_id: str = "", sees: Filter = EVERYTHING) -> Reader:
            proxy.sees = sees
            response = await http.get(url, headers={"last-event-id": last_id} if last_id else {})
            assert response.status == 200
            return Reader(response)

        open_.url, open_.http = url, http  # type: ignore[attr-defined]
        try:
            yield open_
        finally:
            proxy.events.close()
            await runner.cleanup()


# ------------------------------------------------------------------------------------------------------------- events


async def test_a_stream_begins_with_a_snapshot_and_tells_what_happens() -> None:
    """Calls, counters, refusals, changes and health, with the types that the documentation names."""
    proxy = Proxy()
    who = binding([DAILY])
    proxy.process.begin("req_0", who)
    async with served(proxy) as open_:
        reader = await open_()
        assert reader.response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert reader.response.headers["cache-control"] == "no-store"
        name, data = await reader.next()
        assert (name, data["replica"], data["health"]) == ("snapshot", "one", {"ledger": "ok"})
        assert [call["id"] for call in data["calls"]] == ["req_0"]
        proxy.process.begin("req_1", who)
        proxy.process.end("req_0", 70)
        refuse(proxy.process, "req_2", who, 2_000_000)
        proxy.events.changed([AuditedChange(NOON, "eve", "quota.set", "staff/daily")])
        proxy.health["ledger"] = "unavailable"
        proxy.events.tick()
        found = dict([await reader.next() for _ in range(5)])
        assert [call["id"] for call in found["calls"]["begun"]] == ["req_1"]
        assert [call["id"] for call in found["calls"]["ended"]] == ["req_0"]
        assert (found["calls"]["begun_more"], found["calls"]["ended_more"]) == (0, 0)
        assert found["calls"]["tokens"] == {"input": 70, "output": 0}
        assert [state["limits"][0]["used"] for state in found["counters"]["counters"]] == [70]
        assert [each["request_id"] for each in found["refusals"]["refusals"]] == ["req_2"]
        assert found["change"] == {"at": NOON, "actor": "eve", "action": "quota.set", "target": "staff/daily"}
        assert found["health"] == {"ledger": "unavailable"}
        assert reader.last_id == "one:1"


async def test_a_stream_resumes_exactly_after_the_last_event() -> None:
    """As long as the ring has what came after it, also if nobody has watched for a moment."""
    proxy = Proxy()
    async with served(proxy) as open_:
        reader = await open_()
        await reader.next()
        for tokens in range(1, 4):
            proxy.use("ann", tokens)
            proxy.events.tick()
        first = await reader.until("counters")
        assert first["counters"][0]["limits"][0]["used"] == 1
        reader.response.close()
        await proxy.ended.wait()
        proxy.use("ann", 4)
        proxy.events.tick()
        again = await open_("one:1")
        used = [(await again.next())[1]["counters"][0]["limits"][0]["used"] for _ in range(3)]
        assert used == [2, 3, 4]
        assert again.last_id == "one:4"


@pytest.mark.parametrize("last_id", ["two:1", "one:9", "one:x", "one:-1", "one", ":", "one:²", "one:" + "9" * 40])
async def test_an_unknown_id_gets_a_snapshot(last_id: str) -> None:
    """That of another process or of a process that has started again, and what is no id."""
    proxy = Proxy()
    async with served(proxy) as open_:
        await (await open_()).next()
        proxy.events.tick()
        assert (await (await open_(last_id)).next())[0] == "snapshot"


async def test_events_are_not_kept_for_nobody() -> None:
    """Some time after the last stream has ended; whoever comes back then gets a snapshot."""
    proxy = Proxy()
    async with served(proxy) as open_:
        reader = await open_()
        await reader.next()
        proxy.use("ann", 1)
        proxy.events.tick()
        reader.response.close()
        await proxy.ended.wait()
        proxy.process.now += LINGER_MS - 1
        proxy.events.tick()
        assert proxy.events.is_watched and len(proxy.events._ring) == 1
        proxy.process.now += 1
        proxy.events.tick()
        assert not proxy.events.is_watched and not proxy.process.activity.is_watched
        assert (proxy.events._ring, proxy.events._bytes) == ([], 0)
        proxy.use("ann", 2)
        proxy.events.tick()
        assert (await (await open_("one:1")).next())[0] == "snapshot"


async def test_a_silent_stream_sends_comments() -> None:
    """Load balancers close a connection without traffic."""
    async with served(Proxy(bounds=Bounds(heartbeat_s=0.01))) as open_:
        reader = await open_()
        await reader.next()
        for _ in range(2):
            assert await reader.response.content.readline() == b": keep-alive\n"
            assert await reader.response.content.readline() == b"\n"


async def test_only_so_many_streams_are_open() -> None:
    """T96: and none after the server has begun to stop."""
    proxy = Proxy(bounds=Bounds(streams=1))
    async with served(proxy) as open_:
        reader = await open_()
        async with open_.http.get(open_.url) as response:  # type: ignore[attr-defined]
            assert response.status == 503
        reader.response.close()
        while proxy.events.streams:  # noqa: ASYNC110 - nothing here would set an event for a test
            await asyncio.sleep(0)
        reader = await open_()
        assert (await reader.next())[0] == "snapshot"
        proxy.events.close()
        with pytest.raises(EOFError):
            await reader.next()
        async with open_.http.get(open_.url) as response:  # type: ignore[attr-defined]
            assert response.status == 503


async def test_a_stream_ends_when_its_reader_may_no_longer_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key has ended, or it sees other groups now."""
    monkeypatch.setattr(module, "_CHECK_S", 0.0)
    proxy = Proxy()
    answers: list[Filter | None] = [EVERYTHING, Filter.of_groups(["lab"]), None]

    async def check() -> Filter | None:
        return answers.pop(0) if len(answers) > 1 else answers[0]

    proxy.check = check
    async with served(proxy) as open_:
        reader = await open_()
        assert (await reader.next())[0] == "snapshot"
        with pytest.raises(EOFError):
            while True:
                proxy.use("ann", 1)
                proxy.events.tick()
                assert (await reader.next())[1].get("counters", []) == []


# ------------------------------------------------------------------------------------------------------------- bounds


async def test_a_client_that_does_not_read_is_disconnected_and_holds_no_memory() -> None:
    """T96: 20,000 counters change meanwhile. A client that reads gets the newest state of each."""
    bounds = Bounds(bytes=1_000_000, write_s=0.2)
    proxy = Proxy(bounds=bounds)
    async with served(proxy) as open_:
        slow = socket.create_connection(("127.0.0.1", int(open_.url.split(":")[-1][:-1])))  # type: ignore[attr-defined]
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while not proxy.events.streams:  # noqa: ASYNC110 - nothing here would set an event for a test
            await asyncio.sleep(0)
        reader = await open_()
        await reader.next()
        newest: dict[str, int] = {}

        async def read() -> None:
            while len(newest) < 20_000 or set(newest.values()) != {3}:
                name, data = await reader.next()
                assert name == "counters"
                newest.update({each["user"]: each["limits"][0]["used"] for each in data["counters"]})

        reading = asyncio.get_running_loop().create_task(read())
        for tokens in (1, 2, 3):
            for user in range(20_000):
                proxy.use(f"user-{user}", tokens)
            for _ in range(20_000 // COUNTERS_AT_ONCE):
                proxy.events.tick()
                assert proxy.events._bytes <= bounds.bytes
                while reader.last_id != f"one:{proxy.events._number}":  # noqa: ASYNC110 - nothing else is awaited
                    await asyncio.sleep(0)
        await reading
        # The slow one is gone, and the other one still reads.
        while proxy.events.streams > 1:  # noqa: ASYNC110 - the timeout of its write is due
            await asyncio.sleep(0.01)
        slow.close()


async def test_a_reader_that_fell_behind_gets_one_snapshot_and_goes_on() -> None:
    """It loses what happened meanwhile, and not how things stand."""
    proxy = Proxy(bounds=Bounds(entries=2))
    async with served(proxy) as open_:
        reader = await open_()
        await reader.next()
        for tokens in range(1, 6):
            proxy.use("ann", tokens)
            proxy.events.tick()  # the stream does not run between these
        name, data = await reader.next()
        assert (name, data["counters"][0]["limits"][0]["used"]) == ("snapshot", 5)
        assert reader.last_id == "one:5"
        proxy.use("ann", 6)
        proxy.events.tick()
        name, data = await reader.next()
        assert (name, data["counters"][0]["limits"][0]["used"]) == ("counters", 6)


async def test_when_counters_were_left_out_each_reader_gets_a_snapshot() -> None:
    """So it reads again what it has read before."""
    proxy = Proxy()
    proxy.process.activity._changed_max = 1
    async with served(proxy) as open_:
        reader = await open_()
        await reader.next()
        proxy.use("ann", 1)
        proxy.use("bob", 1)
        proxy.events.tick()
        assert (await reader.next())[0] == "snapshot"


async def test_two_thousand_calls_a_second() -> None:
    """Five seconds of them: the batches are bounded, all calls are counted, the counters are right at the end."""
    proxy = Proxy(quota("staff/daily", tokens=10**12), bounds=Bounds(bytes=2_000_000))
    users = [f"user-{number}" for number in range(50)]
    bound = {user: binding([quota("staff/daily", tokens=10**12)], user=user) for user in users}
    begun = ended = used = 0
    newest: dict[str, int] = {}
    async with served(proxy) as open_:
        reader = await open_()
        await reader.next()
        for tick in range(25):
            for number in range(400):
                user = users[number % 50]
                proxy.process.begin(f"req_{tick}_{number}", bound[user], 10, 10)
                if number >= 10:
                    proxy.process.end(f"req_{tick}_{number}", 15)
            proxy.process.now += 200
            proxy.events.tick()
            assert proxy.events._bytes <= 2_000_000
            calls, counters = await reader.until("calls"), await reader.until("counters")
            assert len(calls["begun"]) == len(calls["ended"]) == DETAILS_MAX
            begun += len(calls["begun"]) + calls["begun_more"]
            ended += len(calls["ended"]) + calls["ended_more"]
            used += calls["tokens"]["input"] + calls["tokens"]["output"]
            newest.update({each["user"]: each["limits"][0]["used"] for each in counters["counters"]})
    assert (begun, ended, len(proxy.process.activity.calls)) == (10_000, 9_750, 250)
    assert newest == {
        key[0].removeprefix("user:"): counter.used.tokens for key, counter in proxy.process.counters.items()
    }
    assert sum(newest.values()) == used == 15 * 9_750


# ------------------------------------------------------------------------------------------------------------ filters


async def all_events(sees: Filter) -> list[tuple[str, Any]]:
    """What a stream shows of the calls, refusals, counters and changes of ann (staff) and zoe (lab)."""
    proxy = Proxy()
    ann, zoe = binding([DAILY, POT]), binding([LAB], user="zoe")
    both = binding([DAILY], [LAB], combine="every_group", user="tom")
    proxy.process.begin("req_before", zoe)
    proxy.use("zoe", 5, at=LAB)
    proxy.use("ann", 5)
    async with served(proxy) as open_:
        reader = await open_(sees=sees)
        found = [await reader.next()]
        again = await open_()
        await again.next()
        for request_id, who in (("req_of_ann", ann), ("req_of_zoe", zoe), ("req_of_both", both)):
            proxy.process.begin(request_id, who)
            proxy.process.end(request_id, 50)
            refuse(proxy.process, f"{request_id}_refused", who, 2_000_000)
        proxy.process.activity._ended.more["lab"] = 7
        targets = ("staff/daily", "lab/daily", "zoe", "lab", "proxy-header:lab/x")
        proxy.events.changed(AuditedChange(NOON, "eve", "quota.set", target) for target in targets)
        proxy.health["ledger"] = "unavailable"
        proxy.events.tick()
        await again.until("health")
        found.append(await reader.next())
        while found[-1][0] != "health" and sees.user is None:
            found.append(await reader.next())
        # A later snapshot has what is known by now.
        found.append(await (await open_(sees=sees)).next())
    return found


async def test_a_manager_sees_the_groups_calls_refusals_counters_and_quotas() -> None:
    """T160: nothing of another group, in no event and no snapshot, and no count of it either."""
    found = await all_events(Filter.of_groups(["staff"]))
    assert [name for name, _ in found] == [
        "snapshot",
        "calls",
        "counters",
        "refusals",
        "change",
        "health",
        "snapshot",
    ]
    text = json.dumps(found)
    assert "req_of_ann" in text
    assert "zoe" not in text
    assert "req_before" not in text
    calls = found[1][1]
    # Both of tom's groups have admitted his call together.
    assert [call["id"] for call in calls["begun"]] == ["req_of_ann", "req_of_both"]
    assert calls["ended_more"] == 0
    assert calls["tokens"] == {"input": 100, "output": 0}
    assert {each["quota"] for _, data in found for each in data.get("counters", ())} == {"staff/daily", "staff/pot"}
    assert [data["target"] for name, data in found if name == "change"] == ["staff/daily"]


async def test_an_administrator_sees_all() -> None:
    """Of each kind."""
    found = await all_events(EVERYTHING)
    assert [name for name, _ in found].count("change") == 5
    calls = found[1][1]
    assert [call["id"] for call in calls["ended"]] == ["req_of_ann", "req_of_zoe", "req_of_both"]
    assert calls["ended_more"] == 7
    assert calls["tokens"] == {"input": 150, "output": 0}
    assert [call["id"] for call in found[0][1]["calls"]] == ["req_before"]


async def test_a_user_sees_own_counters_and_those_that_the_groups_share() -> None:
    """T160: no calls, refusals, changes or states of the process, and nothing of others: not even who they are."""
    found = await all_events(Filter.of_user("ann", ["staff"]))
    assert [name for name, _ in found] == ["snapshot", "counters", "snapshot"]
    assert all(data.keys() == {"counters"} for _, data in found)
    assert {(each["user"], each["quota"]) for _, data in found[1:] for each in data["counters"]} == {
        ("ann", "staff/daily"),
        (None, "staff/pot"),
    }
    text = json.dumps(found)
    assert "req_" not in text
    assert "zoe" not in text
    assert "tom" not in text
    [(_, of_zoe)] = (await all_events(Filter.of_user("zoe", ["lab"])))[1:2]
    assert [each["quota"] for each in of_zoe["counters"]] == ["lab/daily"]


def test_a_user_sees_what_everyone_shares_and_no_user_of_a_strange_name_sees_more() -> None:
    """A user called `~staff` has the counter `user:~staff`."""
    ann = Filter.of_user("ann", ["staff"])
    assert ann.shows_counter(("~everyone", "everyone/pot"))
    assert not ann.shows_counter(("~lab", "lab/pot"))
    assert not ann.shows_counter(("user:anne", "staff/daily"))
    assert not Filter.of_user("~staff", []).shows_counter(("~staff", "staff/pot"))
    assert Filter.of_groups(["everyone"]).shows_counter(("user:zoe", "everyone/daily"))


# ----------------------------------------------------------------------------------------------------------- replicas


class Replica(Proxy):
    """A process that exchanges events with the others of its database."""

    def __init__(self, store: Any, owner: str) -> None:
        super().__init__(owner=owner)
        self.exchange = Exchange(
            self.events,
            Replicas(store, owner=owner, now=lambda: self.process.now),
            now=lambda: self.process.now,
            status=lambda: {"calls_in_flight": len(self.process.activity.calls)},
        )

    async def pass_ms(self, ms: int) -> None:
        """Let time pass, with a tick every 200 ms and an exchange every 250 ms, in steps of 50 ms."""
        for _ in range(0, ms, 50):
            self.process.now += 50
            since = self.process.now - NOON
            if since % 200 == 0:
                self.events.tick()
            if since % 250 == 0:
                await self.exchange.run()


async def count(store: Any, table: Any) -> int:
    async with store.transaction() as connection:
        return int(await connection.scalar(sa.select(sa.func.count()).select_from(table)))


async def test_each_process_sees_the_others_within_a_second(store: Any) -> None:
    """Whenever it happens, and its own at once. Two processes on one database."""
    one, two = Replica(store, "one"), Replica(store, "two")
    who = binding([DAILY])
    async with served(one) as open_:
        reader = await open_()
        await reader.next()
        for _ in range(30):
            await one.pass_ms(50)
            await two.pass_ms(50)
        seen: dict[str, int] = {}
        begun: dict[str, int] = {}
        for step in range(60):
            if step < 40:
                request_id = f"req_{step}"
                begun[request_id] = two.process.now
                two.process.begin(request_id, who, 10)
            await two.pass_ms(50)
            await one.pass_ms(50)
            for entry in one.events._ring:
                for part in entry.parts:
                    for _, data in part.batch.begun.items:
                        seen.setdefault(json.loads(data)["id"], one.process.now)
        assert seen.keys() == begun.keys()
        assert max(seen[request_id] - at for request_id, at in begun.items()) <= 1000
        name, data = await reader.next()
        assert (name, data["replica"]) == ("calls", "two")
        held = [
            json.loads(state.data)["limits"][0]["held"]
            for entry in one.events._ring
            for part in entry.parts
            for state in part.batch.counters.values()
        ]
        assert held[-1] == 400
        rows = await count(store, feed)
    assert rows <= 10


async def test_nothing_is_written_to_the_feed_while_nobody_else_watches(store: Any) -> None:
    """Also not by a single process whose events somebody reads."""
    one = Replica(store, "one")
    async with served(one) as open_:
        for watched in (False, True):
            if watched:
                await (await open_()).next()
            for number in range(10):
                one.process.begin(f"req_{watched}_{number}", binding([DAILY]), 10)
                await one.pass_ms(500)
        await one.pass_ms(500)
        async with store.transaction() as connection:
            [row] = (await connection.execute(sa.select(replicas))).all()
        assert row.watching_until > one.process.now
        assert json.loads(row.status) == {"calls_in_flight": 20}
        one.events.close()
        await one.ended.wait()
        await one.pass_ms(LINGER_MS + 1000)
        async with store.transaction() as connection:
            assert await connection.scalar(sa.select(replicas.c.watching_until)) == 0
    assert await count(store, feed) == 0


async def test_the_state_that_was_decided_last_is_shown(store: Any) -> None:
    """Whichever process has told its state first."""
    one = Proxy()
    one.events._begin_collecting()
    one.process.now += 10
    one.use("ann", 20)
    one.events.tick()
    late, later = Proxy(owner="two"), Proxy(owner="two")
    for other, at, tokens in ((late, NOON + 9, 10), (later, NOON + 11, 30)):
        other.process.activity.is_watched = True
        other.process.now = at
        other.use("ann", tokens)
        one.events.receive("two", other.process.activity.take())
        one.events.tick()
    shown = [
        json.loads(state.data)["limits"][0]["used"]
        for entry in one.events._ring
        for part in entry.parts
        for state in part.batch.counters.values()
    ]
    assert shown == [20, 30]


async def test_a_change_is_told_where_somebody_watches(store: Any) -> None:
    """As the audit log has it. If nobody watches, nothing is read."""
    one = Replica(store, "one")
    async with store.transaction(writes=True) as connection:
        for version in (2, 3, 4):
            row = {"id": f"aud_{version:016x}", "at": NOON, "actor": "eve", "action": "set", "target": f"a/{version}"}
            await connection.execute(sa.insert(audit), row)
    one.exchange.note_change(1, 2)
    await one.exchange.run()
    async with served(one) as open_:
        reader = await open_()
        await reader.next()
        one.exchange.note_change(2, 3)
        one.exchange.note_change(3, 4)
        await one.exchange.run()
        one.events.tick()
        assert [(await reader.until("change"))["target"] for _ in range(2)] == ["a/3", "a/4"]


class Away:
    """A store whose transactions fail while `is_away`."""

    def __init__(self, store: Any) -> None:
        self.store, self.is_away = store, False

    def transaction(self, **more: Any) -> Any:
        if self.is_away:
            raise StoreUnavailable("it is away")
        return self.store.transaction(**more)


async def test_what_happens_while_the_database_is_away_is_told_later(store: Any) -> None:
    """The newest states, and as many details as fit."""
    away = Away(store)
    one, two = Replica(store, "one"), Replica(away, "two")
    one.events._begin_collecting()
    await one.pass_ms(1500)
    await two.pass_ms(1500)
    assert two.events.is_watched_elsewhere
    away.is_away = True
    for number in range(DETAILS_MAX + 20):
        two.process.begin(f"req_{number}", binding([DAILY]), 10)
        two.process.end(f"req_{number}", 7)
        await two.pass_ms(50)
    away.is_away = False
    await two.pass_ms(1000)
    one.process.now = two.process.now
    await one.pass_ms(1000)
    [batch] = [part.batch for entry in one.events._ring for part in entry.parts if part.batch.begun]
    assert len(batch.begun.items) == DETAILS_MAX
    assert batch.begun.more == {"staff": 20}
    assert batch.tokens == {"staff": Amount(7 * (DETAILS_MAX + 20))}
    assert json.loads(batch.counters["user:ann", "staff/daily"].data)["limits"][0]["used"] == 7 * (DETAILS_MAX + 20)


async def test_what_another_release_writes_is_left_out(store: Any) -> None:
    """Replicas are replaced one by one. What an older one does not write, such as tokens, is not known."""
    one, two = Replica(store, "one"), Replicas(store, owner="two", now=lambda: NOON)
    one.events._begin_collecting()
    await one.exchange.run()
    for body in ("{}", "[]", "no JSON", '{"is_incomplete": false, "counters": [1]}'):
        await two.publish(body)
    await two.publish(
        '{"is_incomplete": false, "counters": [], "new": 1, "begun": {"items": [["a", {}]], "more": {}}}'
    )
    await one.exchange.run()
    one.events.tick()
    [entry] = one.events._ring
    assert [part.batch.begun.items for part in entry.parts] == [[("a", b"{}")]]
    assert b'"begun_more"' in entry.whole
    assert b'"tokens"' not in entry.whole


async def test_what_waits_between_processes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of others that come faster than ticks, and counters that are not told yet: who watches reads again."""
    monkeypatch.setattr(module, "WAITING_MAX", 3)
    monkeypatch.setattr("proxy.web.exchange._WAITING_MAX", 3)
    one = Proxy()
    one.events._begin_collecting()
    for number in range(5):
        one.events.receive("two", Batch(begun=Details([("staff", b"{}")])))
        one.events.changed([AuditedChange(NOON, "eve", "set", str(number))])
    assert [part.batch.is_incomplete for part in one.events._incoming] == [False, False, True]
    assert [change.target for change in one.events._changes] == ["2", "3", "4"]
    one.events.tick()
    assert (one.events._ring, one.events._bytes) == ([], 0)  # so that everybody gets a snapshot
    two = Replica(None, "two")
    two.events.is_watched_elsewhere = two.process.activity.is_watched = True
    for number in range(5):
        two.use(f"user-{number}", 1)
    two.events.tick()
    assert [subject for subject, _ in two.exchange._outgoing.counters] == [
        "user:user-2",
        "user:user-3",
        "user:user-4",
    ]
    assert two.exchange._outgoing.is_incomplete


# -------------------------------------------------------------------------------------------------------------- stage


@pytest.mark.every_engine
@pytest.mark.journey
async def test_a_call_of_an_sdk_is_shown_refused_and_noted(tmp_path: Path) -> None:
    """A whole server on real sockets: its beginning, its end and its counter, and then a refusal."""
    policy = """
models:
  fast: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}
groups:
  staff: {quotas: {daily: {requests: 1, per: day}}}
users:
  alice: {groups: [staff], keys: [{key: "key-of-alice-0123456789abcdef", label: laptop}]}
"""
    async with stage(policy, folder=tmp_path) as on:
        proxy = Proxy()
        proxy.events = on.server.live.events
        async with served(proxy) as open_:
            reader = await open_()
            assert (await reader.next())[0] == "snapshot"
            messages: Any = [{"role": "user", "content": "Hello"}]
            answer = await on.sdk().chat.completions.with_raw_response.create(model="fast", messages=messages)
            call_id = answer.headers["x-request-id"]
            begun: list[Any] = []
            ended: list[Any] = []
            states: list[Any] = []
            # The counter may change twice: with the admission, and with the end.
            while not ended or not states or not states[-1]["limits"][0]["used"]:
                name, data = await reader.next()
                if name == "calls":
                    begun, ended = begun + data["begun"], ended + data["ended"]
                if name == "counters":
                    states += data["counters"]
            assert [(call["id"], call["user"], call["key"], call["model"]) for call in begun] == [
                (call_id, "alice", "laptop", "fast")
            ]
            assert [(call["id"], call["outcome"]) for call in ended] == [(call_id, "complete")]
            assert states[-1]["limits"][0] | {"held": 0} == {
                **{"measure": "requests", "limit": 1, "used": 1, "held": 0, "remaining": 0, "percent": 100.0}
            }
            refused = await on.post("/v1/chat/completions", {"model": "fast", "messages": messages})
            assert refused.status == 429
            data = await reader.until("refusals")
            assert [each["request_id"] for each in data["refusals"]] == [refused.headers["x-request-id"]]
        await on.server.live.close()
        [row] = await on.rows("refusals")
        assert (row["request_id"], row["quota_id"], row["count"]) == (
            refused.headers["x-request-id"],
            "staff/daily",
            1,
        )
        [row] = await on.rows("crossings")
        assert (row["subject"], row["level"]) == ("user:alice", 100)
