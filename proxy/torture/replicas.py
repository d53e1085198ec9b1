"""The replicas of the proxy under test, and the faults that are injected: kills, pauses, a restart of the database.

At most one replica is killed and one paused at a time. No replica is started while the database is down, because an
operator would not do that either. But a replica may be killed, and the database restarted, while another is paused.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager

from proxy.torture.plan import Plan
from proxy.torture.process import ProxyProcess

_RESTART_S = 60.0


class NotRestarted(Exception):
    """The operator's command did not restart the database."""


class Replicas:
    """Several proxies with one database, or a single proxy. `database_epoch` is odd while the database restarts.

    `outages` has the beginning and the end of each pause and of the restart (ms since 1970, by `now`): in them a
    replica can't hear of a change.
    """

    def __init__(
        self,
        proxies: Sequence[ProxyProcess],
        plan: Plan,
        *,
        restart: str | None = None,
        now: Callable[[], int] = lambda: 0,
    ) -> None:
        self.proxies = proxies
        self.database_epoch = 0
        self.outages: list[tuple[int, int]] = []
        self._now = now
        self._plan = plan
        self._restart_command = restart
        self._rng = random.Random(f"{plan.seed}/replicas")
        self._database_up = asyncio.Lock()

    async def start(self) -> None:
        """Start all at once and wait until they are ready. Raises NotStarted."""
        await asyncio.gather(*(proxy.start() for proxy in self.proxies))

    async def inject_faults(self) -> None:
        """Inject all faults of the plan, each at its time. Raises NotStarted or NotRestarted."""
        try:
            async with asyncio.TaskGroup() as faults:
                faults.create_task(self._kill_replicas())
                faults.create_task(self._pause_replicas())
                faults.create_task(self._restart_database())
        except ExceptionGroup as error:
            raise error.exceptions[0] from None

    async def stop(self) -> None:
        """Stop all as an operator does."""
        await asyncio.gather(*(proxy.stop() for proxy in self.proxies))

    async def kill(self) -> None:
        """Kill those that are still running."""
        await asyncio.gather(*(proxy.kill() for proxy in self.proxies))

    async def _kill_replicas(self) -> None:
        async for _ in _at(self._plan.kills_at_s):
            async with self._database_up:
                await self._running_replica().kill_and_restart()

    async def _pause_replicas(self) -> None:
        async for _ in _at(self._plan.pauses_at_s):
            with self._outage():
                await self._running_replica().pause(self._plan.pause_s)

    def _running_replica(self) -> ProxyProcess:
        """Return a random replica that is up.

        There is one: while a replica is chosen to be killed at most one other is paused, and the reverse; and a
        single proxy is never paused.
        """
        return self._rng.choice([proxy for proxy in self.proxies if proxy.epoch % 2 == 0])

    async def _restart_database(self) -> None:
        if self._restart_command is None:
            return
        await asyncio.sleep(self._plan.restart_at_s)
        async with self._database_up:
            self.database_epoch += 1
            with self._outage():
                await _run(self._restart_command)
            self.database_epoch += 1

    @contextmanager
    def _outage(self) -> Iterator[None]:
        began_at = self._now()
        yield
        self.outages.append((began_at, self._now()))


async def _run(command: str) -> None:
    process = await asyncio.create_subprocess_shell(command, stdin=asyncio.subprocess.DEVNULL)
    try:
        async with asyncio.timeout(_RESTART_S):
            code = await process.wait()
    except TimeoutError:
        process.kill()
        raise NotRestarted(f"The command that restarts the database took over {_RESTART_S:.0f} s.") from None
    if code != 0:
        raise NotRestarted(f"The command that restarts the database failed (exit code {code}).")


async def _at(times: Sequence[float]) -> AsyncIterator[None]:
    """Yield at each of these times, in seconds from now."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    for at_s in times:
        await asyncio.sleep(started + at_s - loop.time())
        yield
