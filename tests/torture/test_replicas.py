"""Several replicas, and what befalls them: one at a time, and never one that is already down."""

import asyncio
from pathlib import Path

import pytest

from proxy.torture.plan import Plan
from proxy.torture.process import NotStarted, Proxy
from proxy.torture.replicas import NotRestarted, Replicas

PLAN = Plan(clients=1, users=1, seconds=1, kill_every_s=0.02, pause_every_s=0, replicas=2)


class Quick(Proxy):
    """A replica of which nothing is started: each thing takes a moment, and all that happens is noted."""

    def __init__(self, folder: Path, told: list[str], *, comes_back: bool = True) -> None:
        super().__init__(folder, PLAN, upstream="http://127.0.0.1:9/v1", upstream_key="sk-upstream", keys=("key",))
        self.note: Path | None = None
        self._told = told
        self._comes_back = comes_back

    async def kill_and_restart(self) -> None:
        """It is down for a moment."""
        if not self._comes_back:
            raise NotStarted("no")
        await self._be_down("killed")

    async def pause(self, seconds: float) -> None:
        """It stands still for a moment."""
        await self._be_down("paused")

    async def _be_down(self, how: str) -> None:
        assert self.era % 2 == 0, "it was well"
        self.era += 1
        self._told.append(how)
        if self.note:
            with self.note.open("a") as note:
                note.write(f"{how}\n")
        await asyncio.sleep(0.01)
        self.era += 1


def replicas(folder: Path, told: list[str], plan: Plan = PLAN, *, restart: str | None = None) -> Replicas:
    """As many as the plan says."""
    return Replicas([Quick(folder, told) for _ in range(plan.replicas)], plan, restart=restart)


class OftenPaused(Plan):
    """Pauses as often as kills come, and at the same times."""

    @property
    def pauses_at_s(self) -> list[float]:
        """The times of the kills."""
        return self.kills_at_s


async def test_one_is_killed_and_another_paused_at_a_time(tmp_path: Path) -> None:
    """At random, each of them comes to it, and none that is down already."""
    told: list[str] = []
    plan = OftenPaused(clients=1, users=1, seconds=0.5, kill_every_s=0.01, replicas=2)
    crowd = replicas(tmp_path, told, plan)
    await crowd.befall()
    assert (told.count("killed"), told.count("paused")) == (len(plan.kills_at_s),) * 2
    assert all(proxy.era > 0 for proxy in crowd.proxies)
    assert {proxy.era % 2 for proxy in crowd.proxies} == {0}


async def test_the_database_is_restarted_once(tmp_path: Path) -> None:
    """By the operator's own command, with whatever stands in it; and nobody is started meanwhile."""
    told = tmp_path / "told"
    crowd = replicas(tmp_path, [], restart=f"echo down >> '{told}'; sleep 0.1; echo up >> '{told}'")
    for proxy in crowd.proxies:
        assert isinstance(proxy, Quick)
        proxy.note = told
    await crowd.befall()
    assert crowd.database_era == 2
    lines = told.read_text().split()
    assert lines[lines.index("down") + 1] == "up"
    assert (lines.count("down"), lines.count("killed")) == (1, len(PLAN.kills_at_s))


async def test_a_command_that_fails_ends_the_run(tmp_path: Path) -> None:
    """A verdict on a database that was not restarted would be one on nothing."""
    with pytest.raises(NotRestarted, match="exit code 7"):
        await replicas(tmp_path, [], restart="exit 7").befall()


async def test_one_that_does_not_come_back_ends_the_run(tmp_path: Path) -> None:
    """In its own words, not in a group of them."""
    crowd = Replicas([Quick(tmp_path, [], comes_back=False)], PLAN)
    with pytest.raises(NotStarted, match="no"):
        await crowd.befall()
