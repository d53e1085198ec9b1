"""Holds the policy in force. It is replaced when quotas.yaml changes, or a file that a `${file:…}` in it names.

It is also replaced when administrators have changed something at run time.

A reload takes the whole file or nothing: an invalid file is rejected and reported in the log, and the running policy
stays in force. A call that was admitted keeps its policy to its end, so a reload does not change it. One that waits
for admission is decided on by the policy that is `current` when it asks again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import structlog

from proxy.config.loader import MISTAKES_SHOWN, BadConfig, Config, Fingerprint
from proxy.config.overlay import MadePolicy, Overlaid, WithoutEffect, overlaid
from proxy.metrics import Metrics

log = structlog.get_logger("reload")

Changes = Mapping[str, Fingerprint]
InForce = TypeVar("InForce")


@dataclass(frozen=True, slots=True)
class Reload:
    """What the last load of the file did, at `at` (ms). `mistakes` are those of a file that was not taken.

    `ignored` are sections that change only with a restart. `without_effect` is what was made at run time and does not
    count with this file, with the reasons.
    """

    at: int
    mistakes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    quotas_gone: tuple[str, ...] = ()
    counters_start_at_0: tuple[str, ...] = ()
    without_effect: tuple[WithoutEffect, ...] = ()


class Policies(Generic[InForce]):
    """The policy in force: the file, and what administrators have made at run time.

    `load` reads the file and raises BadConfig if it is invalid, and `build` makes of a config what requests use.
    `changes` returns the files that have changed since the last load, with their fingerprints. `now` returns the time
    in milliseconds since the epoch.

    `file` is the file alone, `config` with what was made at run time, and `current` what `build` made of that.
    `last_reload` is what the last load did.
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
        self.file, self.config, self.current = config, config, build(config)
        self.last_reload = Reload(now())
        self._made = MadePolicy()
        self._load = load
        self._build = build
        self._changes = changes
        self._checked: Changes = {}  # what the last check found
        # SIGHUP, a changed file and a change at run time can start at once. The one that reads last has to win.
        self._lock = asyncio.Lock()
        self._metrics = metrics
        self._now = now
        self._confirm: Callable[[], Awaitable[object]] = _nothing
        self._on_replaced: Callable[[InForce], object] = lambda in_force: None
        metrics.reloaded_at.set(now() / 1000)
        metrics.set_policy_hash(config.policy.hash)

    def confirm_with(self, confirm: Callable[[], Awaitable[object]]) -> None:
        """Await `confirm` whenever a call asks for admission; it may bring what was changed into force."""
        self._confirm = confirm

    def on_replaced(self, notify: Callable[[InForce], object]) -> None:
        """Call `notify` with what is in force, now and whenever it is replaced."""
        self._on_replaced = notify
        notify(self.current)

    async def confirmed(self) -> InForce:
        """What is in force for a call that asks for admission now."""
        await self._confirm()
        return self.current

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
                new = await asyncio.to_thread(self._load)
            except BadConfig as error:
                self._metrics.reload_failed.set(1)
                self.last_reload = Reload(self._now(), mistakes=tuple(map(str, error.mistakes[:MISTAKES_SHOWN])))
                log_mistakes(error)
                log.error(
                    "the policy file can't be taken, the old policy stays in force", mistakes=len(error.mistakes)
                )
                return False
            await self._replace(new, self._made)
        self._metrics.reload_failed.set(0)
        self._metrics.reloaded_at.set(self._now() / 1000)
        return True

    async def set_made(self, made: MadePolicy) -> None:
        """Take what administrators have made at run time, in place of what was taken before."""
        async with self._lock:
            if made != self._made:
                await self._replace(self.file, made)

    async def _replace(self, file: Config, made: MadePolicy) -> None:
        found, current = await asyncio.to_thread(self._overlaid_and_built, file, made)
        was_file, was = self.file, self.config
        self.file, self._made, self.config, self.current = file, made, found.config, current
        self._metrics.set_policy_hash(found.config.policy.hash)
        self._on_replaced(current)
        before, after = was.policy.quotas, found.config.policy.quotas
        ignored = [name for name, value in file.restart_only.items() if value != was_file.restart_only[name]]
        if ignored:
            log.warning("these sections change only with a restart", sections=ignored)
        # A counter belongs to a quota's id, and to a member or to the group. So the counters of a renamed quota start
        # at 0, and so do those of one whose `shared` has changed.
        starting = [
            id for id, quota in sorted(after.items()) if id not in before or before[id].shared != quota.shared
        ]
        gone = sorted(before.keys() - after.keys())
        if file is was_file:
            self.last_reload = replace(self.last_reload, without_effect=found.without_effect)
        else:
            self.last_reload = Reload(
                self._now(), (), tuple(ignored), tuple(gone), tuple(starting), found.without_effect
            )
        log.info(
            "policy reloaded" if file is not was_file else "policy changed at run time",
            hash=found.config.policy.hash,
            counters_start_at_0=starting,
            quotas_gone=gone,
            without_effect={each.id: each.reason for each in found.without_effect},
        )

    def _overlaid_and_built(self, file: Config, made: MadePolicy) -> tuple[Overlaid, InForce]:
        found = overlaid(file, made)
        return found, self._build(found.config)


def log_mistakes(error: BadConfig) -> None:
    """Log a line for each mistake of a file, up to 100."""
    for mistake in error.mistakes[:MISTAKES_SHOWN]:
        log.error("a mistake in the policy file", path=mistake.file, line=mistake.line, message=mistake.text)


async def _nothing() -> None:
    pass
