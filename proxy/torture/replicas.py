"""What befalls the replicas of a tortured proxy while their clients call: kills, pauses, a restart of the database.

One thing at a time happens to one replica, and none is started while the database is down, as an operator would see
to; but one may be killed, and the database be restarted, while another is paused.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence

from proxy.torture.plan import Plan
from proxy.torture.process import Proxy

_RESTART_S = 60.0


class NotRestarted(Exception):
    """The operator's command did not restart the database."""


class Replicas:
    """Several proxies on one database, or one alone. `database_era` is odd while that is restarted."""

    def __init__(self, proxies: Sequence[Proxy], plan: Plan, *, restart: str | None = None) -> None:
        self.proxies = proxies
        self.database_era = 0
        self._plan = plan
        self._command = restart
        self._chance = random.Random(f"{plan.seed}/replicas")
        self._database_up = asyncio.Lock()

    async def start(self) -> None:
        """Start all at once, and wait until they serve; raises NotStarted."""
        await asyncio.gather(*(proxy.start() for proxy in self.proxies))

    async def befall(self) -> None:
        """All that the plan has for them. Raises NotStarted, or NotRestarted."""
        try:
            async with asyncio.TaskGroup() as together:
                together.create_task(self._kill())
                together.create_task(self._pause())
                together.create_task(self._restart())
        except ExceptionGroup as error:
            raise error.exceptions[0] from None

    async def stop(self) -> None:
        """Stop all as an operator does."""
        await asyncio.gather(*(proxy.stop() for proxy in self.proxies))

    async def end(self) -> None:
        """Kill those that still run."""
        await asyncio.gather(*(proxy.end() for proxy in self.proxies))

    async def _kill(self) -> None:
        async for _ in _at(self._plan.kills_at_s):
            async with self._database_up:
                await self._one().kill_and_restart()

    async def _pause(self) -> None:
        async for _ in _at(self._plan.pauses_at_s):
            await self._one().pause(self._plan.pause_s)

    def _one(self) -> Proxy:
        """Any that is well; there is one, as at most one is killed and one paused, unless it is the only one."""
        return self._chance.choice([proxy for proxy in self.proxies if proxy.era % 2 == 0])

    async def _restart(self) -> None:
        if self._command is None:
            return
        await asyncio.sleep(self._plan.restart_at_s)
        async with self._database_up:
            self.database_era += 1
            await _run(self._command)
            self.database_era += 1


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
    """Go on at each of these times, in seconds from now."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for at_s in times:
        await asyncio.sleep(begun + at_s - loop.time())
        yield
