"""Brings what was changed in the database into force in this process."""

import asyncio
from collections.abc import Callable

import structlog

from proxy.administration.policy import read_made, read_version
from proxy.config.reload import Policies
from proxy.identity.authentication import Snapshot
from proxy.identity.database import DirectoryDatabase
from proxy.identity.directory import Directory
from proxy.ledger.store import StoreUnavailable

log = structlog.get_logger("administration")


class Refresh:
    """Reads users, keys and policy again if they have changed. `now` gives ms since 1970."""

    def __init__(
        self,
        directory: Directory,
        database: DirectoryDatabase,
        policies: Policies[Snapshot],
        *,
        now: Callable[[], int],
    ) -> None:
        self.policy_version = 0  # of what is in force here
        self._directory = directory
        self._database = database
        self._policies = policies
        self._now = now
        self._seen: int | None = None
        self._lock = asyncio.Lock()

    async def run(self) -> None:
        """To be called once a second, and after each change here. An outage is logged, and changes nothing."""
        async with self._lock:
            await self._directory.poll()
            version = self._directory.version
            if version == self._seen:
                return
            try:
                async with self._database.read() as connection:
                    policy_version = await read_version(connection)
                    if policy_version != self.policy_version:
                        await self._policies.set_made(await read_made(connection, self._now()))
            except StoreUnavailable as error:
                log.warning("what was changed at run time can't be read", reason=str(error))
                return
            self._seen, self.policy_version = version, policy_version
