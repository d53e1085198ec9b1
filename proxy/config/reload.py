"""Holds the policy in force and reloads it when quotas.yaml changes, or a file that a `${file:…}` in it names.

A reload takes the whole file or nothing: an invalid file is rejected and reported in the log, and the running policy
stays in force. A call reads `current` once and keeps that policy to its end, so a reload does not change it.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from proxy.config.loader import MISTAKES_SHOWN, BadConfig, Config, Fingerprint
from proxy.metrics import Metrics
from proxy.policy.policy import Policy

log = structlog.get_logger("reload")

Changes = Mapping[str, Fingerprint]
InForce = TypeVar("InForce")


@dataclass(frozen=True, slots=True)
class Reload:
    """A reload: when it ended (ms), and how many mistakes the file had. With mistakes the old policy stayed."""

    at: int
    mistakes: int = 0


class Policies(Generic[InForce]):
    """The policy in force, and the last reload of it. The start counts as one.

    `load` reads the file and raises BadConfig if it is invalid, and `build` makes of a config what requests use.
    `changes` returns the files that have changed since the last load, with their fingerprints. `now` returns the time
    in milliseconds since the epoch.
    """

    def __init__(
        self,
        config: Config,
        *,
        load: Callable[[], Config],
        build: Callable[[Config], InForce],
        changes: Callable[[], Changes],
        metrics: Metrics,
        now: Callable[[], int],
    ) -> None:
        self._config, self._current = config, build(config)
        self._load = load
        self._build = build
        self._changes = changes
        self._checked: Changes = {}  # what the last check found
        # SIGHUP and a changed file can start two reloads at once. The one that reads the file last has to win.
        self._lock = asyncio.Lock()
        self._metrics = metrics
        self._now = now
        self.last_reload = Reload(now())
        metrics.reloaded_at.set(now() / 1000)

    @property
    def current(self) -> InForce:
        """What `build` made of the config in force now."""
        return self._current

    async def reload_if_changed(self) -> None:
        """Reload if a file has changed, and none has changed any more since the previous check.

        An editor may write a file in several steps, and half of a file can be a valid policy that lacks the last
        quotas. With a check every second and a file that is written from 12:00:00.5 to 12:00:01.5, the checks at :01
        and :02 find a new fingerprint each and do nothing; the one at :03 finds that of :02 again, and reloads.

        An invalid file is loaded, and reported, only once until it changes again.
        """
        # In a thread: the files may be on a network, and there may be one for each of 50,000 users.
        previous, self._checked = self._checked, await asyncio.to_thread(self._changes)
        if self._checked and self._checked == previous:
            await self.reload()

    async def reload(self) -> bool:
        """Load the file now. Returns False, and changes nothing, if it is invalid."""
        async with self._lock:
            try:
                # In a thread: a file with 20,000 users takes about two seconds, which would stall every stream.
                new, current = await asyncio.to_thread(self._load_and_build)
            except BadConfig as error:
                self._metrics.reload_failed.set(1)
                self.last_reload = Reload(self._now(), len(error.mistakes))
                log_mistakes(error)
                log.error(
                    "the policy file can't be taken, the old policy stays in force", mistakes=len(error.mistakes)
                )
                return False
            old, self._config, self._current = self._config, new, current
            self._log_changes(old, new)
        self._metrics.reload_failed.set(0)
        self.last_reload = Reload(self._now())
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


def log_mistakes(error: BadConfig) -> None:
    """Log a line for each mistake of a file, up to 100."""
    for mistake in error.mistakes[:MISTAKES_SHOWN]:
        log.error("a mistake in the policy file", path=mistake.file, line=mistake.line, message=mistake.text)


def _quota_ids(policy: Policy) -> set[str]:
    return {quota.id for group in policy.groups.values() for quota in group.quotas}
