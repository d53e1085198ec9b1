"""When a process looks for changes: once a second, and before a call is admitted if that is late."""

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from proxy.administration.refresh import Refresh


@dataclass
class Directory:
    """A directory that never changes, and counts its polls. `answers` holds a poll back, and `is_away` fails it."""

    polls: int = 0
    version: int = 0
    is_away: bool = False
    answers: asyncio.Event = field(default_factory=asyncio.Event)

    async def poll(self) -> bool:
        self.polls += 1
        await self.answers.wait()
        return not self.is_away


class Clock:
    """Seconds that a test moves."""

    s = 100.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
async def directory() -> Directory:
    directory = Directory()
    directory.answers.set()
    return directory


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def refresh(directory: Directory, clock: Clock) -> Refresh:
    """One that has run at 100 s."""
    nothing: Any = SimpleNamespace()
    found: Any = directory
    refresh = Refresh(found, nothing, nothing, clock=clock, now=lambda: 0)
    refresh._seen = (0, directory.version)
    await refresh.run()
    return refresh


async def test_a_call_looks_for_changes_only_if_the_last_look_is_long_ago(
    refresh: Refresh, directory: Directory, clock: Clock
) -> None:
    """1.5 s: the process was stopped, or had no processor."""
    clock.s += 1.5
    await refresh.ensure_recent()
    assert directory.polls == 1
    clock.s += 0.1
    await refresh.ensure_recent()
    await refresh.ensure_recent()
    assert directory.polls == 2


async def test_calls_wait_for_one_look_together(refresh: Refresh, directory: Directory, clock: Clock) -> None:
    """It goes on if the call that began it is cancelled."""
    clock.s += 2
    directory.answers.clear()
    calls = [asyncio.ensure_future(refresh.ensure_recent()) for _ in range(5)]
    await asyncio.sleep(0)
    calls[0].cancel()
    await asyncio.sleep(0)
    assert not any(call.done() for call in calls[1:])
    directory.answers.set()
    await asyncio.gather(*calls[1:])
    assert directory.polls == 2


async def test_while_the_database_is_away_calls_do_not_ask_it(
    refresh: Refresh, directory: Directory, clock: Clock
) -> None:
    """The run once a second does. When it is back, calls ask again."""
    clock.s += 2
    directory.is_away = True
    await refresh.ensure_recent()
    await refresh.ensure_recent()
    assert directory.polls == 2
    directory.is_away = False
    await refresh.run()
    clock.s += 2
    await refresh.ensure_recent()
    assert directory.polls == 4


async def test_closing_ends_what_is_running(refresh: Refresh, directory: Directory, clock: Clock) -> None:
    """The calls that wait for it end too."""
    clock.s += 2
    directory.answers.clear()
    call = asyncio.ensure_future(refresh.ensure_recent())
    await asyncio.sleep(0)
    await refresh.close()
    with pytest.raises(asyncio.CancelledError):
        await call
