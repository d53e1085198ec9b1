"""The policy in force: read whole and swapped whole, or the old one stays and the report says why.

A call takes `current` once and keeps it to its end, so a reload never changes a running call.
"""

import asyncio
from collections.abc import Callable

import structlog

from proxy.config.loader import BadConfig, Config
from proxy.metrics import Metrics
from proxy.policy.policy import Policy

log = structlog.get_logger("reload")

# What a file looks like from outside: it has changed when this differs.
Fingerprint = tuple[int, ...] | None


class Policies:
    """Holds the policy in force. `load` reads the file, `look` says whether it changed; `now` is in ms."""

    def __init__(
        self,
        config: Config,
        *,
        load: Callable[[], Config],
        fingerprint: Callable[[], Fingerprint],
        metrics: Metrics,
        now: Callable[[], int],
    ) -> None:
        self._config = config
        self._load = load
        self._fingerprint = fingerprint
        self._loaded = self._previous = fingerprint()
        # A signal and a changed file may come together; the file that is read last must win.
        self._one_at_a_time = asyncio.Lock()
        self._metrics = metrics
        self._now = now
        metrics.reloaded_at.set(now() / 1000)

    @property
    def current(self) -> Policy:
        """The policy in force now."""
        return self._config.policy

    async def reload_if_changed(self) -> None:
        """Reload when the file looks different from last time, and has come to rest.

        A file that is being written looks different at each look; taken half way, it could be a policy without
        its last quotas.
        """
        before, self._previous = self._previous, self._fingerprint()
        if self._previous == before != self._loaded:
            self._loaded = before
            await self.reload()

    async def reload(self) -> bool:
        """Take the file as it is now; returns False, and changes nothing, where it can't be taken."""
        async with self._one_at_a_time:
            try:
                # In a thread: a file with hundreds of users takes long enough to be felt by the streams.
                new = await asyncio.to_thread(self._load)
            except BadConfig as error:
                self._metrics.reload_failed.set(1)
                log.error("the policy file can't be taken, the old policy stays in force", report=str(error))
                return False
            old, self._config = self._config, new
            self._report(old, new)
        self._metrics.reload_failed.set(0)
        self._metrics.reloaded_at.set(self._now() / 1000)
        return True

    @staticmethod
    def _report(old: Config, new: Config) -> None:
        before, after = _quota_ids(old.policy), _quota_ids(new.policy)
        ignored = [name for name, value in new.restart_only.items() if value != old.restart_only[name]]
        if ignored:
            log.warning("these sections change only with a restart", sections=ignored)
        log.info(
            "policy reloaded",
            hash=new.policy.hash,
            counters_start_at_0=sorted(after - before),
            quotas_gone=sorted(before - after),
        )


def _quota_ids(policy: Policy) -> set[str]:
    return {quota.id for group in policy.groups.values() for quota in group.quotas}
