"""Clients that go before the end: never free, never double, and nothing stays held."""

from pathlib import Path
from typing import Any

import pytest

from proxy.departure import DRAINS_OF_A_USER_MAX, Departures
from proxy.simulator import Simulator
from tests.stage import UPSTREAM_KEY, Stage, stage, until

HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


def _ask(simulate: str, **more: Any) -> dict[str, Any]:
    return {"model": "fast", "messages": HELLO, "metadata": {"simulate": simulate}, **more}


async def _leave_after(on: Stage, body: dict[str, Any], words: int) -> None:
    """Begin a call and hang up once the upstream has sent so many words (0: once it has the request)."""
    call = on.begin(CHAT, body)
    await on.simulator.until(lambda: on.simulator.received > 0 and on.simulator.chunks_sent >= words)
    await on.hang_up(call)


async def test_stop_closes_the_upstream_at_once_and_charges_what_passed(tmp_path: Path) -> None:
    """The upstream's generation ends with its client, also while nothing is being written."""
    async with stage(folder=tmp_path, on_disconnect="stop") as on:
        await _leave_after(on, _ask("tokens=90 stall=5", stream=True), 5)
        await on.simulator.until(lambda: on.simulator.open_calls == 0)
        await on.at_rest()
        used, held = await on.used()
        assert held == 0
        assert 0 < used < 60
        assert (await on.quota("staff/daily"))["requests"]["used"] == 1


async def test_stop_before_the_upstream_answered_charges_the_input(tmp_path: Path) -> None:
    """The call was sent; nobody can say that nothing was done with it."""
    async with stage(folder=tmp_path, on_disconnect="stop") as on:
        await _leave_after(on, _ask("hang", stream=True), 0)
        await on.simulator.until(lambda: on.simulator.open_calls == 0)
        await on.at_rest()
        used, held = await on.used()
        assert held == 0
        assert 0 < used < 60


@pytest.mark.parametrize(("stream", "on_disconnect"), [(True, "drain"), (False, "drain"), (False, "stop")])
async def test_drain_reads_on_and_charges_the_truth(stream: bool, on_disconnect: str, tmp_path: Path) -> None:
    """The client has gone, the answer is paid for all the same, and its end says how much it was.

    A whole answer is always read on: hanging up before its end would be a free ride.
    """
    simulator = Simulator(UPSTREAM_KEY, tokens_per_s=400)
    async with stage(folder=tmp_path, on_disconnect=on_disconnect, simulator=simulator) as on:
        await _leave_after(on, _ask("tokens=60", stream=stream), 3 if stream else 0)
        await on.at_rest()
        assert await on.used() == (simulator.given.input_tokens + simulator.given.output_tokens, 0)
        assert simulator.given.output_tokens == 60


@pytest.mark.parametrize("bound", [{"drain_s": 0.05}, {"drains_max": 0}], ids=["too long", "too many"])
async def test_a_drain_at_its_bound_charges_the_hold(bound: dict[str, Any], tmp_path: Path) -> None:
    """Nobody knows what it cost: all that was held is charged, and the upstream closed.

    In time, and in number at once: drains are no way to pile up connections.
    """
    async with stage(folder=tmp_path, on_disconnect="drain", departures=Departures(**bound)) as on:
        await _leave_after(on, _ask("tokens=90 stall=5", stream=True, max_tokens=500), 5)
        await on.simulator.until(lambda: on.simulator.open_calls == 0)
        await on.at_rest()
        used, held = await on.used()
        assert held == 0
        assert used > 500


async def test_one_user_s_departures_are_not_everybody_s(tmp_path: Path) -> None:
    """Whoever fills the drains with calls that hang pays for them; another user's departure is still drained."""
    async with stage(folder=tmp_path, on_disconnect="drain", departures=Departures(drain_s=5)) as on:
        hanging = [on.begin(CHAT, _ask("hang"), user="bob") for _ in range(DRAINS_OF_A_USER_MAX + 3)]
        await on.simulator.until(lambda: on.simulator.open_calls == len(hanging))
        for call in hanging:
            await on.hang_up(call)
        await until(lambda: on.server.calls_in_flight == DRAINS_OF_A_USER_MAX)
        call = on.begin(CHAT, _ask("tokens=9 speed=50", stream=True, max_tokens=500))
        await on.simulator.until(lambda: on.simulator.chunks_sent >= 2)
        await on.hang_up(call)
        await until(lambda: on.server.calls_in_flight == DRAINS_OF_A_USER_MAX)
        assert await on.used() == (on.simulator.given.input_tokens + 9, 0)
        await on.server.stop(grace_s=0)


async def test_many_that_leave_at_many_points_leave_nothing_behind(tmp_path: Path) -> None:
    """After a hundred of them: nothing held, no call open, each charged once and at least its words."""
    async with stage(folder=tmp_path, on_disconnect="stop") as on:
        for words in range(100):
            before = on.simulator.chunks_sent
            call = on.begin(CHAT, _ask(f"tokens=90 stall={words % 10}", stream=True))
            await on.simulator.until(lambda: on.simulator.chunks_sent >= before + words % 10)  # noqa: B023
            await on.hang_up(call)
        await on.simulator.until(lambda: on.simulator.open_calls == 0)
        await on.at_rest()
        used, held = await on.used()
        assert held == 0
        assert used >= on.simulator.chunks_sent
        assert (await on.quota("staff/daily"))["requests"]["used"] <= 100
