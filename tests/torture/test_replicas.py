"""Several replicas and their faults: each fault hits one replica, never one that is already down."""

import asyncio
from pathlib import Path

import pytest

from proxy.torture.plan import Plan
from proxy.torture.process import NotStarted, ProxyProcess, UpstreamSettings
from proxy.torture.replicas import NotRestarted, Replicas

PLAN = Plan(clients=1, users=1, seconds=1, kill_every_s=0.02, pause_every_s=0, replicas=2)


class FakeProxy(ProxyProcess):
    """A replica without a process: each fault takes 10 ms and is noted."""

    def __init__(self, folder: Path, events: list[str], *, restarts: bool = True) -> None:
        upstream = UpstreamSettings("http://127.0.0.1:9/v1", "sk-upstream")
        super().__init__(folder, PLAN, upstream=upstream, keys=("key",))
        self.note: Path | None = None
        self._events = events
        self._restarts = restarts

    async def kill_and_restart(self) -> None:
        """Go down for a moment."""
        if not self._restarts:
            raise NotStarted("no")
        await self._go_down("killed")

    async def pause(self, seconds: float) -> None:
        """Go down for a moment."""
        await self._go_down("paused")

    async def _go_down(self, how: str) -> None:
        assert self.epoch % 2 == 0, "it was up"
        self.epoch += 1
        self._events.append(how)
        if self.note:
            with self.note.open("a") as note:
                note.write(f"{how}\n")
        await asyncio.sleep(0.01)
        self.epoch += 1


def replicas(folder: Path, events: list[str], plan: Plan = PLAN, *, restart: str | None = None) -> Replicas:
    """As many replicas as the plan says."""
    return Replicas([FakeProxy(folder, events) for _ in range(plan.replicas)], plan, restart=restart)


class OftenPaused(Plan):
    """A plan with as many pauses as kills, at the same times."""

    @property
    def pauses_at_s(self) -> list[float]:
        """The times of the kills."""
        return self.kills_at_s


async def test_one_is_killed_and_another_paused_at_a_time(tmp_path: Path) -> None:
    """The replicas are chosen at random, and never one that is down already."""
    events: list[str] = []
    plan = OftenPaused(clients=1, users=1, seconds=0.5, kill_every_s=0.01, replicas=2)
    group = replicas(tmp_path, events, plan)
    await group.inject_faults()
    assert (events.count("killed"), events.count("paused")) == (len(plan.kills_at_s),) * 2
    assert all(proxy.epoch > 0 for proxy in group.proxies)
    assert {proxy.epoch % 2 for proxy in group.proxies} == {0}


async def test_the_database_is_restarted_once(tmp_path: Path) -> None:
    """By the operator's shell command; no replica is restarted meanwhile."""
    log = tmp_path / "log"
    group = replicas(tmp_path, [], restart=f"echo down >> '{log}'; sleep 0.1; echo up >> '{log}'")
    for proxy in group.proxies:
        assert isinstance(proxy, FakeProxy)
        proxy.note = log
    await group.inject_faults()
    assert group.database_epoch == 2
    lines = log.read_text().split()
    assert lines[lines.index("down") + 1] == "up"
    assert (lines.count("down"), lines.count("killed")) == (1, len(PLAN.kills_at_s))


async def test_a_command_that_fails_ends_the_run(tmp_path: Path) -> None:
    """A verdict without the restart would not be about what was asked for."""
    with pytest.raises(NotRestarted, match="exit code 7"):
        await replicas(tmp_path, [], restart="exit 7").inject_faults()


async def test_a_replica_that_does_not_restart_ends_the_run(tmp_path: Path) -> None:
    """With its own error, not with an exception group."""
    group = Replicas([FakeProxy(tmp_path, [], restarts=False)], PLAN)
    with pytest.raises(NotStarted, match="no"):
        await group.inject_faults()
