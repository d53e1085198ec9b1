"""Brings what was changed in the database into force in this process."""

import asyncio
from collections.abc import Callable

import structlog

from proxy.administration.policy_rows import read_made, read_version
from proxy.config.reload import Policies
from proxy.identity.authentication import Snapshot
from proxy.identity.database import DirectoryDatabase
from proxy.identity.directory import Directory
from proxy.ledger.store import StoreUnavailable
from proxy.tasks import Tasks

log = structlog.get_logger("administration")


# How long ago changes may have been looked for when a call asks for admission, in seconds. A change is to be in force
# after two seconds, and the ledger takes a while to decide.
_RECENT_S = 1.5


class Refresh:
    """Reads users, keys and policy again if they have changed.

    `clock` gives seconds that only grow, and `now` ms since 1970.
    """

    def __init__(
        self,
        directory: Directory,
        database: DirectoryDatabase,
        policies: Policies[Snapshot],
        *,
        clock: Callable[[], float],
        now: Callable[[], int],
    ) -> None:
        self.policy_version = 0  # of what is in force here
        self._directory = directory
        self._database = database
        self._policies = policies
        self._clock = clock
        self._now = now
        # Which version was brought into force, and after how many failovers. A failover may lose changes; then the
        # next ones get the same numbers again.
        self._failovers = 0
        self._seen: tuple[int, int | None] | None = None
        self._began_s = clock()  # the last time that changes were looked for and could be read
        self._is_away = False
        self._lock = asyncio.Lock()
        self._tasks = Tasks()
        self._task: asyncio.Task[None] | None = None

    async def ensure_recent(self) -> None:
        """To be called when a call asks for admission: if changes were last looked for too long ago, look now.

        The run once a second is late if the process was stopped, or gets too little of the processor. Then a call
        could be admitted by what was in force long before. While the database can't be reached, what is known stays
        in force.
        """
        if self._is_away or self._clock() - self._began_s <= _RECENT_S:
            return
        if self._task is None or self._task.done():
            self._task = self._tasks.start("refresh", self.run())
        await asyncio.shield(self._task)  # a call may be cancelled, and others wait for the same

    def read_again(self) -> None:
        """Forget what was read before a failover. To be called when another server has the database."""
        self._failovers += 1
        self._directory.forget_all()

    async def close(self) -> None:
        """End what is running."""
        await self._tasks.finish(0)

    async def run(self) -> None:
        """To be called once a second, and after each change here. An outage is logged, and changes nothing."""
        async with self._lock:
            began_s = self._clock()
            self._is_away = not await self._directory.poll() or not await self._read_policy()
            if not self._is_away:
                self._began_s = began_s

    async def _read_policy(self) -> bool:
        """Bring the policy into force if anything has changed. Whether the database could be read."""
        version = (self._failovers, self._directory.version)
        if version != self._seen:
            has_failed_over = self._seen is not None and version[0] != self._seen[0]
            try:
                async with self._database.read() as connection:
                    policy_version = await read_version(connection)
                    if policy_version != self.policy_version or has_failed_over:
                        await self._policies.set_made(await read_made(connection, self._now()))
            except StoreUnavailable as error:
                log.warning("what was changed at run time can't be read", reason=str(error))
                return False
            self._seen, self.policy_version = version, policy_version
        return True
