"""The whole proxy under outages: a database that fails, a wrong clock, a policy that changes, killed processes.

In all of them no call hangs, an answer that a client received completely is charged once, and no tokens stay held.
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
from tests.stage import (
    STAFF,
    UPSTREAM_KEY,
    Clock,
    Reply,
    Stage,
    fast_timers,
    key_of,
    sqlite_in,
    stage,
    text_of,
    until,
)

pytestmark = pytest.mark.journey

CHAT = "/v1/chat/completions"
HELLO: Any = [{"role": "user", "content": "Hello"}]
ALICE = {"authorization": f"Bearer {key_of('alice')}"}
LARGE = STAFF.replace("tokens: 1M", "tokens: 100M")
SHORT_WAIT = f"ledger_wait: 1s\n{LARGE}"
DONE = b"data: [DONE]\n\n"
WORD = b'data: {"choices":[{"index":0,"delta":{"content":" old"}}]}\n\n'
# The input tokens that the upstream below reports for each call.
INPUT_TOKENS = 10


def _ask(words: int, *, is_held_back: bool = False, **more: Any) -> dict[str, Any]:
    """A stream of this many words. If it is held back, only the first five are sent until the gate is open."""
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
    """An upstream that streams as `_ask` says. `begun` counts its calls; `gate` opens for those held back."""

    def __init__(self) -> None:
        self.begun = 0
        self.gate = asyncio.Event()

    async def serve(self, asked: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one call."""
        words, first = int(asked["words"]), int(asked["first"])
        usage = {"choices": [], "usage": {"prompt_tokens": INPUT_TOKENS, "completion_tokens": words}}
        writer.write(stream_head("Connection: close") + WORD * first)
        self.begun += 1
        if first < words:
            await self.gate.wait()
        writer.write(WORD * (words - first) + b"data: " + json.dumps(usage).encode() + b"\n\n" + DONE)
        await writer.drain()


@asynccontextmanager
async def _gated(
    policy: str = LARGE, *, folder: Path, clock: Clock | None = None
) -> AsyncIterator[tuple[Stage, Upstream]]:
    """A stage with such an upstream."""
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
    """Begin these calls one after the other; return when the upstream has received all of them."""
    calls = []
    for ask in asks:
        expected = upstream.begun + 1
        calls.append(on.begin(CHAT, ask))
        await until(lambda: upstream.begun == expected)  # noqa: B023
    return calls


def _is_complete(reply: Reply, words: int) -> bool:
    return reply.status == 200 and reply.body.endswith(DONE) and reply.body.count(WORD) == words


# --------------------------------------------------------------------------------------- a database that is away

FAULTS = [locked, read_only, full, failing_writes, moved, replaced]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_while_the_database_is_away_new_calls_are_refused_and_streams_end(fault: Any, tmp_path: Path) -> None:
    """New calls get a 503. Running streams complete, also beyond their hold. Each is charged once, later."""
    path = tmp_path / "quotas.db"
    with writers() as made, capture_logs():
        async with _gated(SHORT_WAIT, folder=tmp_path) as (on, upstream):
            words = [3000, 1500, 40]
            calls = await _begin(on, upstream, *(_ask(count, is_held_back=True) for count in words))
            with fault(path, made[0]), fast_timers():
                upstream.gate.set()
                answered, ended = await asyncio.gather(_until_refused(on), asyncio.gather(*calls))
                assert all(_is_complete(reply, count) for reply, count in zip(ended, words, strict=True))
            afterwards = await on.post(CHAT, _ask(7))
            assert _is_complete(afterwards, 7)
            assert (await on.get("/readyz", user=None)).status == 200
            assert (await on.used())[1] == 0
    audit(path)
    assert {row["id"]: _charged(row) for row in rows(path, "calls") if row["state"] == "settled"} == {
        reply.headers["x-request-id"]: (INPUT_TOKENS, reply.body.count(WORD), "exactly")
        for reply in [*ended, *answered, afterwards]
    }
    # If only the commit reported a failure, a refused call's reservation may be stored all the same: it was released.
    others = [(row["state"], row["outcome"]) for row in rows(path, "calls") if row["state"] != "settled"]
    assert set(others) <= {("released", "proxy_broke")}


async def _until_refused(on: Stage) -> list[Reply]:
    """Send calls until one gets the 503; return the answers before it. A full disk may have room for a few calls.

    `/readyz` then reports it. `/healthz` does not, because a restart would not help.
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
async def test_a_deleted_database_is_not_created_again(what: str, tmp_path: Path) -> None:
    """T56: no user gets a fresh quota if the file is deleted, or replaced by an empty one, while the proxy runs."""
    path = tmp_path / "quotas.db"
    with capture_logs():
        async with _gated(SHORT_WAIT, folder=tmp_path) as (on, upstream):
            [running] = await _begin(on, upstream, _ask(2000, is_held_back=True))
            path.unlink()
            if what == "emptied":
                path.touch()
            with fast_timers():
                for _ in range(3):
                    await _until_refused(on)
                    shown = await asyncio.gather(*(on.get("/v1/quota") for _ in range(4)))
                    assert {reply.status for reply in shown} <= {200, 503}
                    tokens = [reply.json()["data"][0]["tokens"] for reply in shown if reply.status == 200]
                    assert all(each["held"] > 0 for each in tokens)
                upstream.gate.set()
                assert _is_complete(await running, 2000)
    assert path.exists() == (what == "emptied")
    assert what == "deleted" or path.stat().st_size == 0


# --------------------------------------------------------------------------------------------------- a wrong clock

# The input bound of a call of `_ask(words)` is about 200 bytes, so these quotas have room for several calls.
TWO_WINDOWS = STAFF.replace(
    "{tokens: 1M, requests: 100k, per: day}", "{tokens: 2000, per: day}, rolling: {tokens: 5k, per: 6h}"
)


async def test_a_clock_that_goes_back_and_ahead_resets_no_counter_twice(tmp_path: Path) -> None:
    """One hour back: no reset. One day ahead: one reset. Back again: no reset. Calls in flight complete each time."""
    clock = Clock()
    async with _gated(TWO_WINDOWS, folder=tmp_path, clock=clock) as (on, upstream):
        used, was_ahead = 0, False
        running = []
        for hours in (0, -1, 24, 0, -1):
            clock.ms = NOON + hours * HOUR
            if hours == 24 and not was_ahead:
                used, was_ahead = 0, True
            running += await _begin(on, upstream, _ask(20, is_held_back=True))
            assert _is_complete(await on.post(CHAT, _ask(90)), 90)
            used += INPUT_TOKENS + 90
            tokens, held = await on.used()
            assert (tokens, held > 0) == (used, True), hours
        upstream.gate.set()
        assert all(_is_complete(reply, 20) for reply in await asyncio.gather(*running))
        await on.all_settled()
        # The first two streams belong to the window of the first day, which has closed.
        assert await on.used() == (used + 3 * (INPUT_TOKENS + 20), 0)
    audit(tmp_path / "quotas.db")
    assert set(states(tmp_path / "quotas.db").values()) == {"settled"}


@pytest.mark.parametrize("quota", ["staff/daily", "staff/rolling"])
@pytest.mark.parametrize("ahead_ms", [DAY, 400 * DAY])
async def test_a_clock_that_was_ahead_blocks_a_user_for_at_most_one_window(
    quota: str, ahead_ms: int, tmp_path: Path
) -> None:
    """A quota is used up while the clock is ahead. Once the clock is right, the user waits for one window at most."""
    clock = Clock()
    policy = TWO_WINDOWS if quota == "staff/daily" else TWO_WINDOWS.replace("tokens: 2000", "tokens: 9000")
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
    """Reload with another policy, as if the file had changed."""
    model = on.server.policies.current.catalog.model("fast")
    assert model is not None
    text = text_of(policy, database=sqlite_in(folder), upstream=model.upstream.base_url)
    on.config = load_text(text.replace("simulated", upstream_name))
    assert await on.server.policies.reload()


CHANGES = {
    "lowered below one call": (SMALL.replace("9000", "5"), 400, "context_length_exceeded"),
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
    """It reserves more, ends and is charged as if the policy were unchanged. The next call follows the new policy."""
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
    [counter] = [row for row in rows(path, "counters") if row["quota_id"] == "staff/daily"]
    is_charged = reply.status == 200 and "daily" in changed
    assert counter["used_output"] == 4500 + 500 * is_charged
    assert {row["outcome"] for row in rows(path, "calls")} == {"complete"}


async def test_a_running_stream_of_a_removed_upstream_completes(tmp_path: Path) -> None:
    """T80: the stream continues over its connection. The next call goes to the upstream of the new policy."""
    async with _gated(SMALL, folder=tmp_path) as (on, upstream):
        [running] = await _begin(on, upstream, _ask(3000, is_held_back=True))
        await _reload(on, tmp_path, SMALL, upstream_name="another")
        upstream.gate.set()
        assert _is_complete(await running, 3000)
        assert _is_complete(await on.post(CHAT, _ask(9)), 9)
        assert await on.used() == (2 * INPUT_TOKENS + 3009, 0)
    calls = {row["output_tokens"]: row["upstream"] for row in rows(tmp_path / "quotas.db", "calls")}
    assert calls == {3000: "simulated", 9: "another"}


# ------------------------------------------------------------------------------------------------- killed processes

KILLS = 10
CLIENTS = 16


def _run_proxy(text: str, started: Connection) -> None:
    """Run a proxy with this YAML until it is stopped or killed, and send its port through `started`."""
    config = load_text(text)

    def send_port(server: Server) -> None:
        assert server.api is not None
        started.send(server.api.port)

    # No tokenizers: to read one takes longer than the rest of a start, and these upstreams report their usage.
    server = Server(config, load=lambda: config, tokenizers=Tokenizers(()))
    uvloop.run(serve(server, send_port, grace_s=0.2))


class ProxyProcess:
    """A proxy in a process of its own."""

    # Forked from a process that has imported everything, because ten cold starts would take half a minute.
    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload([__name__])

    def __init__(self, config: str) -> None:
        self._port, started = self._context.Pipe(duplex=False)
        self.process = self._context.Process(target=_run_proxy, args=(config, started), daemon=True)
        self.url = ""

    async def __aenter__(self) -> "ProxyProcess":
        self.process.start()
        self.url = f"http://127.0.0.1:{await asyncio.to_thread(self._port.recv)}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.process.kill()
        await self.ended()
        self._port.close()
        self.process.close()

    async def ended(self) -> int | None:
        """Wait until the process has ended; return its exit code."""
        await asyncio.to_thread(self.process.join)
        return self.process.exitcode


class Clients:
    """Clients that call one proxy after the other. `complete` has the usage of the answers received completely."""

    def __init__(self, rng: random.Random) -> None:
        self.complete: dict[str, tuple[int, int]] = {}
        self.broken = 0
        self._rng = rng

    async def call_until_broken(self, http: aiohttp.ClientSession, url: str) -> None:
        """Send calls until a connection breaks."""
        while True:
            try:
                await self._call(http, url)
            except (aiohttp.ClientError, ConnectionError):
                self.broken += 1
                return

    async def _call(self, http: aiohttp.ClientSession, url: str) -> None:
        path, body = _random_call(self._rng)
        sent = {"authorization": f"Bearer {key_of(self._rng.choice(['alice', 'bob']))}"}
        async with http.post(url + path, json=body, headers=sent) as response:
            assert response.status == 200
            if self._rng.random() < 0.1:
                await response.content.readany()
                response.close()
                return
            received = await response.read()
        last = json.loads(received.removesuffix(DONE).rpartition(b"data: ")[2])
        usage = (last.get("response") or last)["usage"]
        tokens = [usage.get(f"{old}_tokens", usage.get(f"{new}_tokens")) for old, new in _USAGE_NAMES]
        self.complete[response.headers["x-request-id"]] = (tokens[0], tokens[1])


_USAGE_NAMES = (("prompt", "input"), ("completion", "output"))


def _random_call(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A call to a random endpoint, streamed or not, at a random speed."""
    stream = rng.random() < 0.7
    speed = rng.choice(["", " speed=2000", " speed=500"])
    body = {
        "model": "gpt-4o-mini",
        "stream": stream,
        "metadata": {"simulate": f"tokens={rng.randint(1, 60)}{speed}"},
    }
    match rng.randrange(3):
        case 0:
            return "/v1/responses", {**body, "input": "Hello", "max_output_tokens": 80}
        case kind:
            body |= {"max_tokens": 80} | ({"stream_options": {"include_usage": True}} if stream else {})
            more = {"messages": HELLO} if kind == 1 else {"prompt": "Hello"}
            return CHAT if kind == 1 else "/v1/completions", {**body, **more}


async def test_complete_answers_are_charged_exactly_after_ten_kills(tmp_path: Path) -> None:
    """Killed at random times: a complete answer is charged its usage, a call in flight its hold, each once."""
    rng = random.Random(20_261_124)
    simulator = Simulator(UPSTREAM_KEY)
    runner, port = await serve_simulator(simulator)
    text = text_of(LARGE, database=sqlite_in(tmp_path), upstream=f"http://127.0.0.1:{port}/v1")
    clients = Clients(rng)
    lost: dict[str, tuple[int, int]] = {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        for number in range(KILLS):
            async with ProxyProcess(text) as proxy, asyncio.TaskGroup() as tasks:
                _check_charges(tmp_path / "quotas.db", clients, lost)
                for _ in range(CLIENTS):
                    tasks.create_task(clients.call_until_broken(http, proxy.url))
                chunks = simulator.chunks_sent + rng.randint(1, 600)
                await simulator.until(lambda: simulator.chunks_sent >= chunks)  # noqa: B023
                await until(lambda: len(clients.complete) > number + 1)  # noqa: B023 - slower than the simulator
                proxy.process.kill()
            lost |= _in_flight(tmp_path / "quotas.db", tmp_path / f"killed-{number}")
    await runner.cleanup()
    assert clients.broken == KILLS * CLIENTS
    assert len(lost) > KILLS
    assert len(clients.complete) > KILLS
    await _check_that_restarts_change_nothing(text, tmp_path / "quotas.db")
    _check_charges(tmp_path / "quotas.db", clients, lost)


def _in_flight(path: Path, aside: Path) -> dict[str, tuple[int, int]]:
    """The holds of the calls that were open when the process died.

    They are read from a copy, because SQLite may recover the file and its log when it is opened.
    """
    aside.mkdir()
    for name in (path.name, f"{path.name}-wal"):
        if path.with_name(name).exists():
            shutil.copy(path.with_name(name), aside / name)
    audit(aside / path.name)
    calls = rows(aside / path.name, "calls")
    return {call["id"]: (call["hold_input"], call["hold_output"]) for call in calls if call["state"] == "open"}


def _check_charges(path: Path, clients: Clients, lost: dict[str, tuple[int, int]]) -> None:
    """Complete answers are charged exactly, lost calls their hold, and each counter is the sum of its calls."""
    audit(path)
    calls = {call["id"]: call for call in rows(path, "calls")}
    for call_id, tokens in clients.complete.items():
        assert _charged(calls[call_id]) == (*tokens, "exactly")
    for call_id, held in lost.items():
        assert _charged(calls[call_id]) == (*held, "at_least")
        assert (calls[call_id]["state"], calls[call_id]["outcome"]) == ("expired", "lost")
    assert not clients.complete.keys() & lost.keys()
    assert "open" not in {call["state"] for call in calls.values()}


async def _check_that_restarts_change_nothing(config: str, path: Path) -> None:
    """Start it four times and stop it three times with SIGTERM: calls and counters stay the same."""
    async with ProxyProcess(config):
        before = rows(path, "calls"), rows(path, "counters")
    for _ in range(3):
        async with ProxyProcess(config) as proxy:
            proxy.process.terminate()
            assert await proxy.ended() == 0
        assert (rows(path, "calls"), rows(path, "counters")) == before


async def test_a_stop_cuts_off_and_charges_streams_that_do_not_end_in_time(tmp_path: Path) -> None:
    """T52: 30 streams are in flight at SIGTERM: each is charged what had passed, none is held, and it exits 0."""
    upstream = Upstream()
    async with bare_upstream(upstream.serve) as listening:
        text = text_of(LARGE, database=sqlite_in(tmp_path), upstream=listening.url)
        async with ProxyProcess(text) as proxy, aiohttp.ClientSession() as http:
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


# -------------------------------------------------------------------------------------------- clients that disconnect


@pytest.mark.parametrize("on_disconnect", ["stop", "drain"])
async def test_five_hundred_disconnects_leave_nothing_behind(on_disconnect: str, tmp_path: Path) -> None:
    """T46: at random times, 50 at once: no call, task, connection or hold remains, and each sent call is charged."""
    rng = random.Random(1000)
    hung_up = 0
    async with stage(LARGE, folder=tmp_path, on_disconnect=on_disconnect) as on:
        calls_left = iter(range(500))

        async def disconnect() -> None:
            nonlocal hung_up
            for _ in calls_left:
                call = on.begin(*_random_call(rng), user=rng.choice(["alice", "bob"]))
                for _ in range(rng.randint(1, 120)):
                    await asyncio.sleep(0)
                hung_up += not call.done()
                await on.hang_up(call)

        await asyncio.gather(*(disconnect() for _ in range(50)))
        await on.all_settled()
        await on.simulator.until(lambda: on.simulator.open_calls == 0)
        assert on.server.calls_in_flight == on.simulator.open_streams == 0
        assert (await on.used())[1] == (await on.used(user="bob"))[1] == 0
        assert "call" not in {task.get_name() for task in asyncio.all_tasks()}
        assert hung_up > 250
    path = tmp_path / "quotas.db"
    audit(path)
    calls = rows(path, "calls")
    settled = [call for call in calls if call["state"] == "settled"]
    # Responses whose clients left are deleted at the upstream, which is no call.
    assert len(settled) >= on.simulator.received - on.simulator.deletions > 0
    assert on.simulator.deletions > 0
    assert all(call["input_tokens"] > 0 and call["requests"] == 1 for call in settled)
    assert {call["outcome"] for call in calls if call["state"] != "settled"} <= {"client_left"}
