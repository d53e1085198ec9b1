"""The whole proxy under outages: a ledger that can't be written, a clock astray, a policy that changes, kills.

What holds in all of them: nothing hangs, what a client saw complete is on the books once, and nothing stays held.
"""

import asyncio
import json
import multiprocessing
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop
from structlog.testing import capture_logs

from proxy.calls.tokenizer import Tokenizers
from proxy.config.loader import load_text
from proxy.server import Server, serve
from proxy.simulator.server import Simulator
from proxy.simulator.server import serve as serve_simulator
from tests.audit import audit, rows, states
from tests.bare_upstream import bare_upstream, stream_head
from tests.breakage import failing_writes, full, locked, moved, read_only, replaced, writers
from tests.builders import DAY, HOUR, NOON
from tests.stage import STAFF, UPSTREAM_KEY, Clock, Reply, Stage, key_of, sqlite_in, stage, text_of, until

pytestmark = pytest.mark.journey

CHAT = "/v1/chat/completions"
HELLO: Any = [{"role": "user", "content": "Hello"}]
ALICE = {"authorization": f"Bearer {key_of('alice')}"}
ROOMY = STAFF.replace("tokens: 1M", "tokens: 100M")
HASTY = f"ledger_wait: 1s\n{ROOMY}"
DONE = b"data: [DONE]\n\n"
WORD = b'data: {"choices":[{"index":0,"delta":{"content":" old"}}]}\n\n'
# What the upstream below says of each input.
TAKEN = 10


def _ask(words: int, *, is_held_back: bool = False, **more: Any) -> dict[str, Any]:
    """A stream of so many words; held back, all but the first few of them until the gate is open."""
    metadata = {"words": str(words), "first": str(min(words, 5) if is_held_back else words)}
    return {
        "model": "gpt-4o-mini",
        "messages": HELLO,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": words,
        "metadata": metadata,
        **more,
    }


class Upstream:
    """One that streams as `_ask` says. `begun` counts its calls; `gate` lets those go on that are held back."""

    def __init__(self) -> None:
        self.begun = 0
        self.gate = asyncio.Event()

    async def serve(self, asked: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One call."""
        words, first = int(asked["words"]), int(asked["first"])
        usage = {"choices": [], "usage": {"prompt_tokens": TAKEN, "completion_tokens": words}}
        writer.write(stream_head("Connection: close") + WORD * first)
        self.begun += 1
        if first < words:
            await self.gate.wait()
        writer.write(WORD * (words - first) + b"data: " + json.dumps(usage).encode() + b"\n\n" + DONE)
        await writer.drain()


@asynccontextmanager
async def _gated(
    policy: str = ROOMY, *, folder: Path, clock: Clock | None = None
) -> AsyncIterator[tuple[Stage, Upstream]]:
    """A proxy before such an upstream."""
    upstream = Upstream()
    async with (
        bare_upstream(upstream.serve) as listening,
        stage(policy, folder=folder, upstream=listening.url, clock=clock) as on,
    ):
        try:
            yield on, upstream
        finally:
            upstream.gate.set()
            await listening.all_closed()


async def _begin(on: Stage, upstream: Upstream, *asks: dict[str, Any]) -> list["asyncio.Task[Reply]"]:
    """Begin these calls, one after the other, each until the upstream has it."""
    calls = []
    for ask in asks:
        expected = upstream.begun + 1
        calls.append(on.begin(CHAT, ask))
        await until(lambda: upstream.begun == expected)  # noqa: B023
    return calls


def _is_complete(reply: Reply, words: int) -> bool:
    return reply.status == 200 and reply.body.endswith(DONE) and reply.body.count(WORD) == words


# ------------------------------------------------------------------------------------------- a ledger that is away

FAULTS = [locked, read_only, full, failing_writes, moved, replaced]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_while_the_ledger_is_away_nobody_is_let_in_and_all_streams_end(fault: Any, tmp_path: Path) -> None:
    """New calls get a 503, running streams their end, also beyond what they held; later all is booked, once each."""
    path = tmp_path / "quotas.db"
    with writers() as made, capture_logs():
        async with _gated(HASTY, folder=tmp_path) as (on, upstream):
            words = [3000, 1500, 40]
            calls = await _begin(on, upstream, *(_ask(count, is_held_back=True) for count in words))
            with fault(path, made[0]):
                upstream.gate.set()
                answered, ended = await asyncio.gather(_until_refused(on), asyncio.gather(*calls))
                assert all(_is_complete(reply, count) for reply, count in zip(ended, words, strict=True))
            back = await on.post(CHAT, _ask(7))
            assert _is_complete(back, 7)
            assert (await on.get("/readyz", user=None)).status == 200
            assert (await on.used())[1] == 0
    audit(path)
    assert {row["id"]: _charged(row) for row in rows(path, "calls") if row["state"] == "settled"} == {
        reply.headers["x-request-id"]: (TAKEN, reply.body.count(WORD), "exactly")
        for reply in [*ended, *answered, back]
    }
    # A refusal may have been committed all the same, where it was the commit that failed: then it was taken back.
    others = [(row["state"], row["outcome"]) for row in rows(path, "calls") if row["state"] != "settled"]
    assert set(others) <= {("released", "proxy_broke")}


async def _until_refused(on: Stage) -> list[Reply]:
    """Call until it is refused as it must be; returns the answers before that (a full disk may have a little room).

    Readiness then says so, and liveness doesn't, since a start would help nobody.
    """
    answered: list[Reply] = []
    while (reply := await on.post(CHAT, _ask(3))).status == 200:
        answered.append(reply)
    assert (reply.status, reply.error["code"]) == (503, "ledger_unavailable")
    assert reply.headers["retry-after"] == "5"
    assert (await on.get("/readyz", user=None)).status == 503
    assert (await on.get("/healthz", user=None)).status == 200
    return answered


def _charged(row: dict[str, Any]) -> tuple[int, int, str]:
    return row["input_tokens"], row["output_tokens"], row["provenance"]


@pytest.mark.parametrize("what", ["deleted", "emptied"])
async def test_a_database_that_is_gone_is_not_made_anew(what: str, tmp_path: Path) -> None:
    """Nobody gets a fresh quota because a file was deleted, or replaced by an empty one, under the running proxy."""
    path = tmp_path / "quotas.db"
    with capture_logs():
        async with _gated(HASTY, folder=tmp_path) as (on, upstream):
            [running] = await _begin(on, upstream, _ask(2000, is_held_back=True))
            path.unlink()
            if what == "emptied":
                path.touch()
            for _ in range(3):
                await _until_refused(on)
                shown = await asyncio.gather(*(on.get("/v1/quota") for _ in range(4)))
                assert {reply.status for reply in shown} <= {200, 503}
                assert all(reply.json()["data"][0]["tokens"]["held"] > 0 for reply in shown if reply.status == 200)
            upstream.gate.set()
            assert _is_complete(await running, 2000)
    assert path.exists() == (what == "emptied")
    assert what == "deleted" or path.stat().st_size == 0


# --------------------------------------------------------------------------------------------------- a clock astray

# A call of `_ask(words)` has a bound of 200 bytes or so on its input; these quotas have room for some of them.
ASTRAY = STAFF.replace(
    "{tokens: 1M, requests: 100k, per: day}", "{tokens: 2000, per: day}, rolling: {tokens: 5k, per: 6h}"
)


async def test_a_clock_that_goes_back_and_ahead_resets_no_counter_twice(tmp_path: Path) -> None:
    """Back: nothing is reset. Ahead: one more window. Back again: none. Calls in flight end in all of them."""
    clock = Clock()
    async with _gated(ASTRAY, folder=tmp_path, clock=clock) as (on, upstream):
        used, was_ahead = 0, False
        running = []
        for hours in (0, -1, 24, 0, -1):
            clock.ms = NOON + hours * HOUR
            if hours == 24 and not was_ahead:
                used, was_ahead = 0, True
            running += await _begin(on, upstream, _ask(20, is_held_back=True))
            assert _is_complete(await on.post(CHAT, _ask(90)), 90)
            used += TAKEN + 90
            tokens, held = await on.used()
            assert (tokens, held > 0) == (used, True), hours
        upstream.gate.set()
        assert all(_is_complete(reply, 20) for reply in await asyncio.gather(*running))
        await on.at_rest()
        # The two that began before the window did belong to the one before it, which has closed.
        assert await on.used() == (used + 3 * (TAKEN + 20), 0)
    audit(tmp_path / "quotas.db")
    assert set(states(tmp_path / "quotas.db").values()) == {"settled"}


@pytest.mark.parametrize("quota", ["staff/daily", "staff/rolling"])
@pytest.mark.parametrize("ahead_ms", [DAY, 400 * DAY])
async def test_a_clock_that_was_ahead_locks_nobody_for_longer_than_a_window(
    quota: str, ahead_ms: int, tmp_path: Path
) -> None:
    """Who used up a quota while the clock was wrong waits a window at most, once it is right again."""
    clock = Clock()
    policy = ASTRAY if quota == "staff/daily" else ASTRAY.replace("tokens: 2000", "tokens: 9000")
    async with _gated(policy, folder=tmp_path, clock=clock) as (on, _):
        assert _is_complete(await on.post(CHAT, _ask(90)), 90)
        clock.ms = NOON + ahead_ms
        while (reply := await on.post(CHAT, _ask(500))).status == 200:
            pass
        assert (reply.status, reply.error["code"]) == (429, "insufficient_quota")
        clock.ms = NOON
        refused = await on.post(CHAT, _ask(500))
        assert refused.status == 429
        clock.ms = refused.error["resets_at"] * 1000
        assert clock.ms <= NOON + DAY
        assert (await on.post(CHAT, _ask(500))).status == 200


# ------------------------------------------------------------------------------------ a policy that changes meanwhile

SMALL = STAFF.replace("tokens: 1M", "tokens: 9000")


async def _reload(on: Stage, folder: Path, policy: str, *, upstream_name: str = "simulated") -> None:
    """Put another policy in force, as a changed file does."""
    model = on.server.policies.current.catalog.model("fast")
    assert model is not None
    text = text_of(policy, database=sqlite_in(folder), upstream=model.upstream.base_url)
    on.files.config = load_text(text.replace("simulated", upstream_name))
    assert await on.server.policies.reload()


CHANGES = {
    "lowered below one call": (SMALL.replace("9000", "100"), 400, "context_length_exceeded"),
    "lowered below what is used": (SMALL.replace("9000", "2k"), 429, "insufficient_quota"),
    "raised": (SMALL.replace("9000", "9M"), 200, None),
    "quota renamed": (SMALL.replace("daily", "weekly"), 200, None),
    "group gone": (SMALL.replace("[staff]", "[]").replace("staff:", "other:"), 404, "model_not_found"),
    "user deleted": (SMALL.replace("alice", "carol"), 401, "invalid_api_key"),
    "model gone": (SMALL.replace("  gpt-4o-mini:", "  gpt-4o:"), 404, "model_not_found"),
}


@pytest.mark.parametrize(("changed", "status", "code"), CHANGES.values(), ids=CHANGES)
async def test_a_stream_keeps_the_policy_with_which_it_began(
    changed: str, status: int, code: str | None, tmp_path: Path
) -> None:
    """It grows and ends as if nothing had been, and is booked; the next call follows the new policy."""
    async with _gated(SMALL, folder=tmp_path) as (on, upstream):
        first = await on.post(CHAT, _ask(1500))
        [running] = await _begin(on, upstream, _ask(3000, is_held_back=True))
        await _reload(on, tmp_path, changed)
        upstream.gate.set()
        assert _is_complete(first, 1500)
        assert _is_complete(await running, 3000)
        reply = await on.post(CHAT, _ask(500))
        assert reply.status == status
        assert code is None or reply.error["code"] == code
    path = tmp_path / "quotas.db"
    audit(path)
    [began_with] = [row for row in rows(path, "counters") if row["quota_id"] == "staff/daily"]
    later = reply.status == 200 and "daily" in changed
    assert began_with["used_output"] == 4500 + 500 * later
    assert {row["outcome"] for row in rows(path, "calls")} == {"complete"}


async def test_an_upstream_that_is_struck_out_ends_what_it_began(tmp_path: Path) -> None:
    """The stream goes on over the connection it has; the next call goes to the upstream that is named now."""
    async with _gated(SMALL, folder=tmp_path) as (on, upstream):
        [running] = await _begin(on, upstream, _ask(3000, is_held_back=True))
        await _reload(on, tmp_path, SMALL, upstream_name="another")
        upstream.gate.set()
        assert _is_complete(await running, 3000)
        assert _is_complete(await on.post(CHAT, _ask(9)), 9)
        assert await on.used() == (2 * TAKEN + 3009, 0)
    calls = {row["output_tokens"]: row["upstream"] for row in rows(tmp_path / "quotas.db", "calls")}
    assert calls == {3000: "simulated", 9: "another"}


# ------------------------------------------------------------------------------------------- processes that are ended

LIVES = 20
CLIENTS = 16


class _Hasty(Server):
    """A proxy that gives its calls a moment to end, where production gives them half a minute."""

    async def stop(self, grace_s: float = 0.2) -> None:
        """As ever."""
        await super().stop(grace_s)


def _live(text: str, started: Connection) -> None:
    """A whole life of a proxy, in a process of its own; its port is told through `started`."""
    config = load_text(text)

    def tell(server: Server) -> None:
        assert server.api is not None
        started.send(server.api.port)

    # No tokenizers: reading one would take longer than all else here, and these upstreams count by themselves.
    uvloop.run(serve(_Hasty(config, load=lambda: config, tokenizers=Tokenizers(())), tell))


class Life:
    """One process that serves."""

    # Forked from a process that has imported everything, so that twenty starts don't take a minute.
    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload([__name__])

    def __init__(self, config: str) -> None:
        self._told, started = self._context.Pipe(duplex=False)
        self.process = self._context.Process(target=_live, args=(config, started), daemon=True)
        self.url = ""

    async def __aenter__(self) -> "Life":
        self.process.start()
        self.url = f"http://127.0.0.1:{await asyncio.to_thread(self._told.recv)}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.process.kill()
        await self.ended()
        self._told.close()
        self.process.close()

    async def ended(self) -> int | None:
        """Wait for its end; returns its exit code."""
        await asyncio.to_thread(self.process.join)
        return self.process.exitcode


class Seen:
    """Clients that call all the time, wherever the proxy is; `complete` are the answers that they saw whole."""

    def __init__(self, chance: random.Random) -> None:
        self.complete: dict[str, tuple[int, int]] = {}
        self.broken = 0
        self._chance = chance

    async def call_on(self, http: aiohttp.ClientSession, url: str) -> None:
        """Call until nobody answers any more."""
        while True:
            try:
                await self._call(http, url)
            except (aiohttp.ClientError, ConnectionError):
                self.broken += 1
                return

    async def _call(self, http: aiohttp.ClientSession, url: str) -> None:
        path, body = _some_call(self._chance)
        sent = {"authorization": f"Bearer {key_of(self._chance.choice(['alice', 'bob']))}"}
        async with http.post(url + path, json=body, headers=sent) as response:
            assert response.status == 200
            if self._chance.random() < 0.1:
                await response.content.readany()
                response.close()
                return
            received = await response.read()
        last = json.loads(received.removesuffix(DONE).rpartition(b"data: ")[2])
        usage = (last.get("response") or last)["usage"]
        tokens = [usage.get(f"{old}_tokens", usage.get(f"{new}_tokens")) for old, new in _USAGE_NAMES]
        self.complete[response.headers["x-request-id"]] = (tokens[0], tokens[1])


_USAGE_NAMES = (("prompt", "input"), ("completion", "output"))


def _some_call(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """A call of any kind that takes no time, or some."""
    stream = chance.random() < 0.7
    speed = chance.choice(["", " speed=2000", " speed=500"])
    body = {
        "model": "gpt-4o-mini",
        "stream": stream,
        "metadata": {"simulate": f"tokens={chance.randint(1, 60)}{speed}"},
    }
    match chance.randrange(3):
        case 0:
            return "/v1/responses", {**body, "input": "Hello", "max_output_tokens": 80}
        case kind:
            body |= {"max_tokens": 80} | ({"stream_options": {"include_usage": True}} if stream else {})
            more = {"messages": HELLO} if kind == 1 else {"prompt": "Hello"}
            return CHAT if kind == 1 else "/v1/completions", {**body, **more}


async def test_what_was_seen_complete_is_on_the_books_after_twenty_kills(tmp_path: Path) -> None:
    """Killed at any instant: each whole answer is charged as it said, each call in flight with its hold, once."""
    chance = random.Random(20_261_124)
    simulator = Simulator(UPSTREAM_KEY)
    runner, port = await serve_simulator(simulator)
    text = text_of(ROOMY, database=sqlite_in(tmp_path), upstream=f"http://127.0.0.1:{port}/v1")
    seen = Seen(chance)
    lost: dict[str, tuple[int, int]] = {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        for life in range(LIVES):
            async with Life(text) as proxy, asyncio.TaskGroup() as clients:
                _are_charged(tmp_path / "quotas.db", seen, lost)
                for _ in range(CLIENTS):
                    clients.create_task(seen.call_on(http, proxy.url))
                heard = simulator.chunks_sent + chance.randint(1, 600)
                await simulator.until(lambda: simulator.chunks_sent >= heard)  # noqa: B023
                proxy.process.kill()
            lost |= _in_flight(tmp_path / "quotas.db", tmp_path / f"killed-{life}")
    await runner.cleanup()
    assert seen.broken == LIVES * CLIENTS
    assert len(lost) > LIVES
    assert len(seen.complete) > LIVES
    await _nothing_changes_any_more(text, tmp_path / "quotas.db")
    _are_charged(tmp_path / "quotas.db", seen, lost)


def _in_flight(path: Path, aside: Path) -> dict[str, tuple[int, int]]:
    """The calls that were open when the process died, and what they held; read from a copy, as reading may mend."""
    aside.mkdir()
    for name in (path.name, f"{path.name}-wal"):
        if path.with_name(name).exists():
            shutil.copy(path.with_name(name), aside / name)
    audit(aside / path.name)
    calls = rows(aside / path.name, "calls")
    return {call["id"]: (call["hold_input"], call["hold_output"]) for call in calls if call["state"] == "open"}


def _are_charged(path: Path, seen: Seen, lost: dict[str, tuple[int, int]]) -> None:
    """What was seen whole is charged exactly, what was lost as much as was held, and the counters are the sums."""
    audit(path)
    calls = {call["id"]: call for call in rows(path, "calls")}
    for call_id, tokens in seen.complete.items():
        assert _charged(calls[call_id]) == (*tokens, "exactly")
    for call_id, held in lost.items():
        assert _charged(calls[call_id]) == (*held, "at_least")
        assert (calls[call_id]["state"], calls[call_id]["outcome"]) == ("expired", "lost")
    assert not seen.complete.keys() & lost.keys()
    assert "open" not in {call["state"] for call in calls.values()}


async def _nothing_changes_any_more(config: str, path: Path) -> None:
    """Start again and again, and stop as an operator does: the books stay as they are."""
    async with Life(config):
        before = rows(path, "calls"), rows(path, "counters")
    for _ in range(3):
        async with Life(config) as proxy:
            proxy.process.terminate()
            assert await proxy.ended() == 0
        assert (rows(path, "calls"), rows(path, "counters")) == before


async def test_a_stop_cuts_off_and_books_what_does_not_end_in_time(tmp_path: Path) -> None:
    """Thirty streams in flight at SIGTERM: each is charged what had passed, nothing is held, and it exits with 0."""
    upstream = Upstream()
    async with bare_upstream(upstream.serve) as listening:
        text = text_of(ROOMY, database=sqlite_in(tmp_path), upstream=listening.url)
        async with Life(text) as proxy, aiohttp.ClientSession() as http:
            streams = [
                http.post(f"{proxy.url}{CHAT}", json=_ask(99, is_held_back=True), headers=ALICE) for _ in range(30)
            ]
            answers = await asyncio.gather(*streams)
            begun = await asyncio.gather(*(answer.content.readexactly(5 * len(WORD)) for answer in answers))
            assert begun == [5 * WORD] * 30
            proxy.process.terminate()
            assert await proxy.ended() == 0
            cut_off = await asyncio.gather(*(answer.read() for answer in answers), return_exceptions=True)
            assert all(isinstance(end, aiohttp.ClientPayloadError) for end in cut_off)
        upstream.gate.set()
        await listening.all_closed()
    path = tmp_path / "quotas.db"
    audit(path)
    ended = [
        (call["state"], call["outcome"], call["output_tokens"], call["requests"]) for call in rows(path, "calls")
    ]
    assert ended == [("settled", "stopped", 5, 1)] * 30
    assert all(call["input_tokens"] > 0 for call in rows(path, "calls"))


# ------------------------------------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("on_disconnect", ["stop", "drain"])
async def test_a_thousand_disconnects_leave_nothing_behind(on_disconnect: str, tmp_path: Path) -> None:
    """At random points, fifty at a time: no call, no task, no connection, nothing held; and none of them was free."""
    chance = random.Random(1000)
    hung_up = 0
    async with stage(ROOMY, folder=tmp_path, on_disconnect=on_disconnect) as on:
        left = iter(range(1000))

        async def leave() -> None:
            nonlocal hung_up
            for _ in left:
                call = on.begin(*_some_call(chance), user=chance.choice(["alice", "bob"]))
                for _ in range(chance.randint(1, 120)):
                    await asyncio.sleep(0)
                hung_up += not call.done()
                await on.hang_up(call)

        await asyncio.gather(*(leave() for _ in range(50)))
        await on.at_rest()
        await on.simulator.until(lambda: on.simulator.open_calls == 0)
        assert on.server.calls_in_flight == on.simulator.open_streams == 0
        assert (await on.used())[1] == (await on.used(user="bob"))[1] == 0
        assert "call" not in {task.get_name() for task in asyncio.all_tasks()}
        assert hung_up > 500
    path = tmp_path / "quotas.db"
    audit(path)
    calls = rows(path, "calls")
    settled = [call for call in calls if call["state"] == "settled"]
    assert len(settled) >= on.simulator.received
    assert all(call["input_tokens"] > 0 and call["requests"] == 1 for call in settled)
    assert {call["outcome"] for call in calls if call["state"] != "settled"} <= {"client_left"}
