"""Holds the policy in force and reloads it when quotas.yaml changes.

A reload takes the whole file or nothing: an invalid file is rejected and reported in the log, and the running policy
stays in force. A call reads `current` once and keeps that policy to its end, so a reload does not change it.
"""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

import structlog

from proxy.config.loader import BadConfig, Config
from proxy.metrics import Metrics
from proxy.policy.policy import Policy

log = structlog.get_logger("reload")

# Numbers that differ when the file was written or replaced, such as inode, modification time and size. None: no file.
Fingerprint = tuple[int, ...] | None
InForce = TypeVar("InForce")


class Policies(Generic[InForce]):
    """The policy in force.

    `load` reads the file and raises BadConfig if it is invalid, and `build` makes of a config what requests use.
    `fingerprint` returns the file's current fingerprint, and `now` the time in milliseconds since the epoch.
    """

    def __init__(
        self,
        config: Config,
        *,
        load: Callable[[], Config],
        build: Callable[[Config], InForce],
        fingerprint: Callable[[], Fingerprint],
        metrics: Metrics,
        now: Callable[[], int],
    ) -> None:
        self._config, self._current = config, build(config)
        self._load = load
        self._build = build
        self._fingerprint = fingerprint
        # The fingerprint that the last load saw, and the one of the last check.
        self._loaded = self._checked = fingerprint()
        # SIGHUP and a changed file can start two reloads at once. The one that reads the file last has to win.
        self._lock = asyncio.Lock()
        self._metrics = metrics
        self._now = now
        metrics.reloaded_at.set(now() / 1000)

    @property
    def current(self) -> InForce:
        """What `build` made of the config in force now."""
        return self._current

    async def reload_if_changed(self) -> None:
        """Reload if the file has changed, and did not change any more since the previous check.

        An editor may write a file in several steps, and half of a file can be a valid policy that lacks the last
        quotas. With a check every second and a file that is written from 12:00:00.5 to 12:00:01.5, the checks at :01
        and :02 find a new fingerprint each and do nothing; the one at :03 finds that of :02 again, and reloads.

        An invalid file is loaded, and reported, only once until it changes again.
        """
        previous, self._checked = self._checked, self._fingerprint()
        if self._checked == previous != self._loaded:
            # Stored before the load, not after: if the file changes in between, the next checks see a difference.
            self._loaded = previous
            await self.reload()

    async def reload(self) -> bool:
        """Load the file now. Returns False, and changes nothing, if it is invalid."""
        async with self._lock:
            try:
                # In a thread: a file with 20,000 users takes about two seconds, which would stall every stream.
                new, current = await asyncio.to_thread(self._load_and_build)
            except BadConfig as error:
                self._metrics.reload_failed.set(1)
                log.error("the policy file can't be taken, the old policy stays in force", report=str(error))
                return False
            old, self._config, self._current = self._config, new, current
            self._log_changes(old, new)
        self._metrics.reload_failed.set(0)
        self._metrics.reloaded_at.set(self._now() / 1000)
        return True

    def _load_and_build(self) -> tuple[Config, InForce]:
        config = self._load()
        return config, self._build(config)

    @staticmethod
    def _log_changes(old: Config, new: Config) -> None:
        before, after = _quota_ids(old.policy), _quota_ids(new.policy)
        ignored = [name for name, value in new.restart_only.items() if value != old.restart_only[name]]
        if ignored:
            log.warning("these sections change only with a restart", sections=ignored)
        # A counter belongs to a quota's id. A renamed quota is a new one, whose counters start at 0.
        log.info(
            "policy reloaded",
            hash=new.policy.hash,
            counters_start_at_0=sorted(after - before),
            quotas_gone=sorted(before - after),
        )


def _quota_ids(policy: Policy) -> set[str]:
    return {quota.id for group in policy.groups.values() for quota in group.quotas}
