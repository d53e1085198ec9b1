"""Upstreams with `max_in_flight`: calls that find no free slot go elsewhere, wait by turns, or get a 503."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.calls.disconnect import Disconnects
from proxy.config.loader import load_text
from proxy.simulator.server import Simulator
from proxy.upstreams.slots import Load
from tests.bare_upstream import BareUpstream, bare_upstream, stream_head
from tests.stage import STAFF, UPSTREAM_KEY, Reply, Stage, fast_timers, movable_time, sqlite_in, stage, text_of, until

CHAT = "/v1/chat/completions"
HELLO: Any = [{"role": "user", "content": "Hello"}]
USAGE = b'"usage":{"prompt_tokens":10,"completion_tokens":5,"total_tokens":15}}'
WHOLE_BODY = (
    b'{"id":"c1","choices":[{"index":0,"text":"x","message":{"content":"x"},"finish_reason":"stop"}],' + USAGE
)
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
END = b'data: {"choices":[],' + USAGE + b"\n\ndata: [DONE]\n\n"


def _head(status: int, *more: str, body: bytes) -> bytes:
    lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


WHOLE = _head(200, body=WHOLE_BODY)
FAILED = b'{"error": {"message": "Sorry about that!", "type": "server_error", "param": null, "code": null}}'


class Box:
    """An upstream that answers a call when the test says so. `begun` has the names of the calls, in order.

    A request names its call in `metadata`.
    """

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.upstream: BareUpstream
        self._answers: dict[str, asyncio.Queue[bytes]] = {}

    async def serve(self, metadata: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Write what `answer` gives, until that is empty."""
        answers = self._answers[metadata["call"]] = asyncio.Queue()
        self.begun.append(metadata["call"])
        while piece := await answers.get():
            writer.write(piece)
            await writer.drain()

    def answer(self, call: str, *pieces: bytes, ends: bool = True) -> None:
        """Send these bytes as the answer to a call that has begun."""
        for piece in (*(pieces or (WHOLE,)), *((b"",) if ends else ())):
            self._answers[call].put_nowait(piece)


@asynccontextmanager
async def _box() -> AsyncIterator[Box]:
    box = Box()
    async with bare_upstream(box.serve) as box.upstream:
        yield box


@asynccontextmanager
async def _stage(
    folder: Path, slots: int, policy: str = STAFF, *, disconnects: Disconnects | None = None
) -> AsyncIterator[tuple[Stage, Box]]:
    """A stage in front of a box with so many slots."""
    more = f", max_in_flight: {slots}"
    async with (
        _box() as box,
        stage(policy, folder=folder, upstream=box.upstream.url, more=more, disconnects=disconnects) as on,
    ):
        yield on, box


def _ask(call: str, **more: Any) -> dict[str, Any]:
    return {"model": "fast", "messages": HELLO, "metadata": {"call": call}, **more}


def _loads(on: Stage) -> dict[str, Load]:
    return on.server._relay._dispatcher.slots.loads()


def _load(on: Stage) -> Load:
    """That of the upstream `simulated`."""
    return _loads(on)["simulated"]


async def _begin(
    on: Stage, call: str, *, path: str = CHAT, wait_s: int | None = None, **more: Any
) -> "asyncio.Task[Reply]":
    """A call of the user with whose name its own name begins. It has a slot or waits for one."""
    before = _load(on)
    headers = None if wait_s is None else {"x-quota-max-wait": str(wait_s)}
    posting = on.post(path, _ask(call, **more), user=call.split()[0], headers=headers)
    task = asyncio.get_running_loop().create_task(posting)
    await until(lambda: _load(on) != before or task.done())
    return task


async def test_the_single_call_of_a_user_is_the_next_after_many_of_another(tmp_path: Path) -> None:
    """Alice has 64 streams at an upstream with 16 slots: 48 wait. Bob's call comes last and gets the next slot."""
    async with _stage(tmp_path, 16) as (on, box):
        calls = [await _begin(on, f"alice {n}", stream=True) for n in range(64)]
        calls.append(await _begin(on, "bob 1"))
        await until(lambda: len(box.begun) == 16)
        assert _load(on) == Load(in_flight=16, waiting=49)
        box.answer("alice 5", stream_head() + WORD + END)
        await until(lambda: len(box.begun) == 17)
        assert box.begun[16] == "bob 1"
        box.answer("bob 1")
        for n in range(16):
            if n != 5:
                box.answer(f"alice {n}", stream_head() + WORD + END)
        answered = 16
        while answered < 64:
            await until(lambda: len(box.begun) > answered + 1)  # noqa: B023
            assert box.begun[answered + 1] == f"alice {answered}"
            box.answer(f"alice {answered}", stream_head() + WORD + END)
            answered += 1
        assert {(await call).status for call in calls} == {200}
        await on.all_settled()
        await on.audit()
        assert _load(on) == Load()
        assert await on.used() == (64 * 15, 0)


async def test_a_full_upstream_is_a_503_after_the_wait_and_costs_nothing(tmp_path: Path) -> None:
    """T48: in the shape of the protocol, with a `Retry-After` from the calls in flight."""
    async with _stage(tmp_path, 1) as (on, box):
        first = await _begin(on, "bob 1")
        for path in (CHAT, "/v1/messages"):
            reply = await _begin(on, "alice 1", path=path, wait_s=0, max_tokens=20)
            answer = await reply
            assert answer.status == 503
            assert 2 <= int(answer.headers["retry-after"]) <= 30
            assert "as many calls in flight" in answer.json()["error"]["message"]
            if path == CHAT:
                assert (answer.error["type"], answer.error["code"]) == ("upstream_error", "upstream_full")
            else:
                assert (answer.json()["type"], answer.json()["error"]["type"]) == ("error", "overloaded_error")
        assert _load(on) == Load(in_flight=1)
        box.answer("bob 1")
        assert (await first).status == 200
        await on.all_settled()
        await on.audit()
        calls = [row for row in await on.rows("calls") if row["user_name"] == "alice"]
        assert {(row["state"], row["outcome"]) for row in calls} == {("released", "upstream_failed")}
        assert await on.used() == (0, 0)
        assert (await on.quota("staff/daily"))["requests"]["used"] == 0


POT = """
models:
  plain: {upstream: simulated, model: gpt-4o-mini, smallest_answer: 10}
groups:
  staff: {quotas: {pot: {tokens: 300, per: day, shared: true}}}
users:
  alice: {groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}
  bob: {groups: [staff], keys: ["key-of-bob-0123456789abcdef"]}
"""


async def test_a_call_waits_for_admission_and_for_a_slot_no_longer_than_its_wait(tmp_path: Path) -> None:
    """It may wait 10 s. After 6 s its quota has room and it is admitted; then it waits 4 s for a slot."""

    def plain(call: str, max_tokens: int) -> dict[str, Any]:
        prompt = "word" + " word" * 9  # 10 tokens
        return {"model": "plain", "prompt": prompt, "max_tokens": max_tokens, "metadata": {"call": call}}

    async def begin(call: str, max_tokens: int) -> "asyncio.Task[Reply]":
        headers = {"x-quota-max-wait": "10" if call.startswith("alice") else "600"}
        posting = on.post("/v1/completions", plain(call, max_tokens), user=call.split()[0], headers=headers)
        return asyncio.get_running_loop().create_task(posting)

    async with _stage(tmp_path, 1, POT) as (on, box):
        with movable_time() as move:
            large = await begin("bob large", 200)  # holds 210 tokens and the slot
            await until(lambda: box.begun == ["bob large"])
            small = await begin("bob small", 20)  # holds 30, and gets the next slot
            await until(lambda: _load(on).waiting == 1)
            late = await begin("alice", 100)  # needs 110
            await until(lambda: len(on.server.queue) == 1)
            move(6)
            box.answer("bob large")
            await until(lambda: box.begun == ["bob large", "bob small"] and _load(on).waiting == 1)
            move(3)
            await large
            assert not late.done()
            assert _load(on).waiting == 1
            move(1.5)
            reply = await late
            assert (reply.status, reply.error["code"]) == (503, "upstream_full")
            box.answer("bob small")
            assert (await small).status == 200
        await on.all_settled()
        assert await on.used("staff/pot") == (30, 0)


async def test_a_client_that_leaves_while_its_call_waits_is_charged_nothing(tmp_path: Path) -> None:
    """Its place is free at once, for the call behind it."""
    async with _stage(tmp_path, 1) as (on, box):
        first = await _begin(on, "bob 1")
        leaving = await _begin(on, "alice 1", stream=True)
        staying = await _begin(on, "alice 2")
        await on.hang_up(leaving)
        await until(lambda: _load(on).waiting == 1)
        box.answer("bob 1")
        await until(lambda: box.begun == ["bob 1", "alice 2"])
        box.answer("alice 2")
        assert [(await call).status for call in (first, staying)] == [200, 200]
        await on.all_settled()
        await on.audit()
        [left] = [row for row in await on.rows("calls") if row["outcome"] == "client_left"]
        assert (left["state"], left["user_name"]) == ("released", "alice")
        assert await on.used() == (15, 0)


async def test_a_drained_answer_keeps_its_slot(tmp_path: Path) -> None:
    """The client has left, but the upstream still works on the call."""
    disconnects = Disconnects()
    async with _stage(tmp_path, 1, disconnects=disconnects) as (on, box):
        leaving = await _begin(on, "alice 1", stream=True)
        await until(lambda: box.begun == ["alice 1"])
        box.answer("alice 1", stream_head() + WORD, ends=False)
        await on.hang_up(leaving)
        await until(lambda: disconnects._draining["alice"] == 1)
        waiting = await _begin(on, "bob 1")
        assert _load(on) == Load(in_flight=1, waiting=1)
        box.answer("alice 1", END)
        await until(lambda: len(box.begun) == 2)
        box.answer("bob 1")
        assert (await waiting).status == 200
        await on.all_settled()
        assert await on.used() == (15, 0)


@pytest.mark.parametrize(
    ("simulate", "stream", "status"),
    [
        ("tokens=5", False, 200),
        ("tokens=5", True, 200),
        ("status=500", False, 500),
        ("status=400", True, 400),
        ("html", False, 502),
        ("tokens=50 cut=5", True, 200),
        ("tokens=50 cut=5", False, 502),
    ],
)
async def test_each_end_of_a_call_gives_its_slot_back_once(
    simulate: str, stream: bool, status: int, tmp_path: Path
) -> None:
    """With one slot, the next call is answered too."""
    async with stage(folder=tmp_path, more=", max_in_flight: 1") as on:
        for _ in range(3):
            body = {"model": "fast", "messages": HELLO, "metadata": {"simulate": simulate}, "stream": stream}
            assert (await on.post(CHAT, body)).status == status
            await on.all_settled()
            assert _load(on) == Load()


@pytest.mark.parametrize("on_disconnect", ["stop", "drain"])
async def test_a_client_that_leaves_gives_its_slot_back(on_disconnect: str, tmp_path: Path) -> None:
    """When the connection to the upstream is closed: at once, or at the bound of the drain."""
    disconnects = Disconnects(drain_s=0.05)
    async with stage(
        folder=tmp_path, more=", max_in_flight: 1", on_disconnect=on_disconnect, disconnects=disconnects
    ) as on:
        body = {"model": "fast", "messages": HELLO, "metadata": {"simulate": "tokens=9 stall=5"}, "stream": True}
        call = on.begin(CHAT, body)
        await on.simulator.until(lambda: on.simulator.chunks_sent == 5)
        assert _load(on) == Load(in_flight=1)
        await on.hang_up(call)
        await on.simulator.until(lambda: on.simulator.open_calls == 0)
        await on.all_settled()
        assert _load(on) == Load()


async def test_a_pause_before_another_attempt_holds_no_slot(tmp_path: Path) -> None:
    """The upstream asks alice's call to come again after 2 s. Bob's call has the slot meanwhile."""
    async with _stage(tmp_path, 1) as (on, box):
        with fast_timers(10):
            paused = await _begin(on, "alice 1")
            await until(lambda: box.begun == ["alice 1"])
            box.answer("alice 1", _head(503, "Retry-After: 2", body=FAILED))
            await until(lambda: _load(on) == Load())
            other = await _begin(on, "bob 1")
            await until(lambda: box.begun == ["alice 1", "bob 1"])
            box.answer("bob 1")
            assert (await other).status == 200
            await until(lambda: box.begun == ["alice 1", "bob 1", "alice 1"])
            box.answer("alice 1")
            assert (await paused).status == 200


async def test_requests_that_are_no_calls_take_no_slot(tmp_path: Path) -> None:
    """Lists of models and stored responses are answered while all slots are taken."""
    policy = STAFF.replace("models:", 'models:\n  "*": {upstream: simulated}')
    async with stage(policy, folder=tmp_path, more=", max_in_flight: 1", on_disconnect="stop") as on:
        stored = (await on.post("/v1/responses", {"model": "fast", "input": "Hello"})).json()["id"]
        body = {"model": "fast", "messages": HELLO, "metadata": {"simulate": "tokens=9 stall=5"}, "stream": True}
        call = on.begin(CHAT, body)
        await on.simulator.until(lambda: on.simulator.chunks_sent == 5)
        assert (await on.get(f"/v1/responses/{stored}")).status == 200
        assert "gpt-3.5-turbo-instruct" in (await on.get("/v1/models")).body.decode()
        assert _load(on) == Load(in_flight=1)
        await on.hang_up(call)


async def _reload(on: Stage, folder: Path, more: str) -> None:
    upstream = on.config.catalog.upstreams["simulated"].base_url
    on.config = load_text(text_of(STAFF, database=sqlite_in(folder), upstream=upstream, more=more))
    assert await on.server.policies.reload()


@pytest.mark.parametrize("more", [", max_in_flight: 2, on_disconnect: stop", ""], ids=["raised", "removed"])
async def test_a_reload_that_raises_the_number_sends_calls_that_wait(more: str, tmp_path: Path) -> None:
    """At once. The other settings of the upstream may change too: its slots belong to its name."""
    async with _stage(tmp_path, 1) as (on, box):
        calls = [await _begin(on, "alice 1"), await _begin(on, "bob 1")]
        await _reload(on, tmp_path, more)
        await until(lambda: box.begun == ["alice 1", "bob 1"])
        assert _load(on) == Load(in_flight=2)
        for name in box.begun:
            box.answer(name)
        assert [(await call).status for call in calls] == [200, 200]


async def test_a_reload_that_lowers_the_number_lets_running_calls_end(tmp_path: Path) -> None:
    """The next call begins when fewer run than the new number."""
    async with _stage(tmp_path, 2) as (on, box):
        calls = [await _begin(on, name) for name in ("alice 1", "alice 2")]
        await until(lambda: len(box.begun) == 2)
        await _reload(on, tmp_path, ", max_in_flight: 1")
        calls.append(await _begin(on, "bob 1"))
        box.answer("alice 1")
        assert (await calls[0]).status == 200
        await until(lambda: _load(on) == Load(in_flight=1, waiting=1))
        assert len(box.begun) == 2
        box.answer("alice 2")
        await until(lambda: len(box.begun) == 3)
        box.answer("bob 1")
        assert [(await call).status for call in calls] == [200] * 3


async def test_the_load_of_an_upstream_is_in_the_metrics_and_the_status(tmp_path: Path) -> None:
    """How many calls it has, and how many wait for a slot."""
    async with _stage(tmp_path, 1) as (on, box):
        calls = [await _begin(on, name) for name in ("alice 1", "bob 1", "bob 2")]
        await on.server.gauges.measure_process()
        text = on.server.metrics.exposition().decode()
        assert 'llm_quota_upstream_in_flight{upstream="simulated"} 1.0' in text
        assert 'llm_quota_upstream_slots_waiting{upstream="simulated"} 2.0' in text
        [state] = on.server.live._status.whole()["upstreams"]  # type: ignore[misc, attr-defined]
        assert (state["in_flight"], state["waiting"]) == (1, 2)
        for name in ("alice 1", "bob 1", "bob 2"):
            await until(lambda: name in box.begun)  # noqa: B023
            box.answer(name)
        assert [(await call).status for call in calls] == [200] * 3


# ------------------------------------------------------------------------------------------------- several upstreams

# Calls to `fast` go to the box, and to the simulator only if the box can't be asked.
SEVERAL = """
  box: {{base_url: "{box}", kind: simulator, max_in_flight: 1}}
models:
  fast:
    upstreams: [{{upstream: box}}, {{upstream: simulated, model: gpt-4o-mini, weight: 0}}]
    max_output_tokens: 100
  cloud: {{upstream: simulated, model: gpt-4o-mini}}
groups:
  staff: {{quotas: {{daily: {{tokens: 1M, requests: 100k, per: day}}}}}}
users:
  alice: {{groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}}
  bob: {{groups: [staff], keys: ["key-of-bob-0123456789abcdef"]}}
"""


@asynccontextmanager
async def _two_upstreams(folder: Path, *, more: str = "") -> AsyncIterator[tuple[Stage, Box, "asyncio.Task[Reply]"]]:
    """A stage with both, and a call of bob that has the only slot of the box."""
    async with _box() as box:
        policy = SEVERAL.format(box=box.upstream.url)
        simulator = Simulator(UPSTREAM_KEY)
        async with stage(policy, folder=folder, more=more, simulator=simulator, on_disconnect="stop") as on:
            running = on.begin(CHAT, _ask("bob 1"), user="bob")
            await until(lambda: box.begun == ["bob 1"])
            yield on, box, running


async def test_a_call_that_finds_one_upstream_full_goes_to_another(tmp_path: Path) -> None:
    """At once. A weight of 0 means just this: only if no other can be asked."""
    async with _two_upstreams(tmp_path) as (on, box, running):
        reply = await on.post(CHAT, {"model": "fast", "messages": HELLO, "metadata": {"simulate": "tokens=5"}})
        assert (reply.status, on.simulator.received) == (200, 1)
        box.answer("bob 1")
        assert (await running).status == 200
        await on.all_settled()
        assert {row["upstream"] for row in await on.rows("calls")} == {"box", "simulated"}
        again = on.begin(CHAT, _ask("alice 2"))
        await until(lambda: box.begun == ["bob 1", "alice 2"])
        box.answer("alice 2")
        assert (await again).status == 200


async def _cool_down_simulator(on: Stage) -> None:
    """The simulator answers 429 with a `Retry-After` of 1 s, and the clock of the cooldowns stands still."""
    reply = await on.post(CHAT, {"model": "cloud", "messages": HELLO, "metadata": {"simulate": "status=429"}})
    assert reply.status == 429


async def test_a_call_waits_for_a_full_upstream_rather_than_ask_one_in_cooldown(tmp_path: Path) -> None:
    """The one in cooldown has failed, and would most likely fail again."""
    async with _two_upstreams(tmp_path) as (on, box, running):
        with fast_timers(20):
            await _cool_down_simulator(on)
        asked = on.simulator.received
        waiting = on.begin(CHAT, _ask("alice 1"))
        await until(lambda: _loads(on)["box"].waiting == 1)
        box.answer("bob 1")
        await until(lambda: box.begun == ["bob 1", "alice 1"])
        box.answer("alice 1")
        assert [(await running).status, (await waiting).status] == [200, 200]
        assert on.simulator.received == asked


async def test_an_upstream_in_cooldown_is_asked_rather_than_no_upstream(tmp_path: Path) -> None:
    """When the call can't wait any longer. A cooldown refuses no call."""
    async with _two_upstreams(tmp_path) as (on, box, running):
        with fast_timers(20):
            await _cool_down_simulator(on)
        body = {"model": "fast", "messages": HELLO, "metadata": {"simulate": "tokens=5"}}
        assert (await on.post(CHAT, body, headers={"x-quota-max-wait": "0"})).status == 200
        box.answer("bob 1")
        assert (await running).status == 200


async def test_a_call_waits_for_whichever_upstream_is_free_first(tmp_path: Path) -> None:
    """Both are full. A slot of the other one comes first."""
    async with _two_upstreams(tmp_path, more=", max_in_flight: 1") as (on, box, running):
        simulate = {"simulate": "tokens=9 stall=5"}
        stalled = on.begin(CHAT, {"model": "cloud", "messages": HELLO, "metadata": simulate, "stream": True})
        await on.simulator.until(lambda: on.simulator.chunks_sent == 5)
        waiting = on.begin(CHAT, {"model": "fast", "messages": HELLO, "metadata": {"simulate": "tokens=5"}})
        await until(lambda: _loads(on) == {"box": Load(1, 1), "simulated": Load(1, 1)})
        await on.hang_up(stalled)
        assert (await waiting).status == 200
        assert box.begun == ["bob 1"]
        box.answer("bob 1")
        assert (await running).status == 200
        await on.all_settled()
        assert _loads(on) == {"box": Load(), "simulated": Load()}


async def test_the_wait_for_a_slot_is_no_part_of_retry_for(tmp_path: Path) -> None:
    """The call waits 30 s for the box. When that fails, the call goes on to the other upstream all the same."""
    async with _two_upstreams(tmp_path, more=", max_in_flight: 1") as (on, box, running):
        simulate = {"simulate": "tokens=9 stall=5"}
        stalled = on.begin(CHAT, {"model": "cloud", "messages": HELLO, "metadata": simulate, "stream": True})
        await on.simulator.until(lambda: on.simulator.chunks_sent == 5)
        waiting = on.begin(CHAT, _ask("alice 1"))
        await until(lambda: _loads(on)["box"].waiting == 1)
        on.clock.ms += 30_000
        box.answer("bob 1")
        await until(lambda: box.begun == ["bob 1", "alice 1"])
        await on.hang_up(stalled)
        await until(lambda: _loads(on)["simulated"] == Load())
        box.answer("alice 1", _head(500, body=FAILED))
        assert [(await running).status, (await waiting).status] == [200, 200]
        await on.all_settled()
        assert on.simulator.reported_usage.calls == 1


async def test_the_error_of_an_upstream_is_shown_rather_than_that_the_next_one_is_full(tmp_path: Path) -> None:
    """It says more. Nothing is charged."""
    async with _two_upstreams(tmp_path, more=", max_in_flight: 1") as (on, box, running):
        hanging = {"model": "cloud", "messages": HELLO, "metadata": {"simulate": "hang"}, "stream": True}
        blocking = on.begin(CHAT, hanging)
        await until(lambda: _loads(on)["simulated"].in_flight == 1)
        await on.hang_up(running)
        box.answer("bob 1")
        await until(lambda: _loads(on)["box"] == Load())
        failing = asyncio.get_running_loop().create_task(
            on.post(CHAT, _ask("bob 2"), user="bob", headers={"x-quota-max-wait": "0"})
        )
        await until(lambda: box.begun == ["bob 1", "bob 2"])
        box.answer("bob 2", _head(500, body=FAILED))
        reply = await failing
        assert (reply.status, reply.error["message"]) == (500, "Sorry about that!")
        await on.hang_up(blocking)
        await on.all_settled()
        assert _loads(on) == {"box": Load(), "simulated": Load()}
