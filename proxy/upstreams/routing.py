"""Which upstream a call is sent to, where several serve its model, and which of them are left alone for a while.

Each gets its share by its weight. One that keeps failing, or that said when to come back, rests: it is asked only
where all that could be asked are resting too. When its rest is over one call is sent to try it, and it rests on until
that call was answered. So a rest never refuses a call, and nobody can bring one about that would.

What one call may still do after a try that failed is said here too: asking again must never run it twice, so only
what refused it provably, or failed with a head that says so, lets it go elsewhere. A time that ran out does not.

Pure: instants in ms and random numbers come in. Failures are remembered of upstreams as the policy has them, so one
that is written anew begins anew.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from proxy.policy.policy import Model, Upstream

# So many calls in a row that an upstream fails are no coincidence; then it is left alone for so long.
FAILURES_MAX = 5
COOLDOWN_MS = 30_000
# What it says itself is believed up to here: a slip of an upstream must not take it out for a day.
COOLDOWN_MS_MAX = 60_000
# A wait that its client need not hear of, once for each call.
PAUSE_MS_MAX = 2_000
# Before an upstream is asked again that could not be reached: it may be starting anew.
UNREACHED_PAUSE_MS = 200
# An upstream, or what stands before it, that gave up waiting: the call may be running on (524 is Cloudflare's).
_TIMES_OUT = frozenset((408, 504, 524))
# Our key or our account is of no use there, or its own limit is reached; whatever is asked.
_NOT_HERE = frozenset((401, 402, 429))


@dataclass(frozen=True, slots=True)
class _Failing:
    """What is remembered of an upstream since it last answered."""

    failures: int
    cooldown_until: int


@dataclass(frozen=True, slots=True)
class RoutingState:
    """One call's choice among the places that serve its model: those `left`, and when none is sent to any more.

    `pause_ms` passes before the next one. `has_paused`: no place is asked a second time but once.
    """

    left: tuple[Model, ...]
    until: int
    pause_ms: int = 0
    has_paused: bool = False

    def after(self, tried: Model, *, pause_ms: int | None, now: int) -> "RoutingState | None":
        """What is left after a failed try; None where nothing is.

        `pause_ms` is when the same upstream might be asked again (None: never).
        """
        left = tuple(target for target in self.left if target is not tried)
        if now >= self.until:
            return None
        if left:
            return replace(self, left=left, pause_ms=0)
        is_short = pause_ms is not None and pause_ms <= PAUSE_MS_MAX and now + pause_ms < self.until
        if pause_ms is None or not is_short or self.has_paused:
            return None
        return replace(self, left=(tried,), pause_ms=pause_ms, has_paused=True)


@dataclass(slots=True)
class Cooldowns:
    """Which upstreams are left alone, as one process sees it."""

    _failing: dict[Upstream, _Failing] = field(default_factory=dict)

    def choose(self, targets: Sequence[Model], now: int, *, draw: int) -> Model:
        """One of these places. `draw` is a random number from 0 on, far larger than any sum of weights."""
        # The end of a rest that is further away than any rest was written by a clock that went ahead.
        awake = [target for target in targets if not now < self._rests_until(target) <= now + COOLDOWN_MS_MAX]
        if not awake:
            return min(targets, key=self._rests_until)
        chosen = _drawn(awake, draw)
        failing = self._failing.get(chosen.upstream)
        if failing is not None and failing.cooldown_until:
            # This call is the one that tries it. Should nothing be heard of it, another one will.
            self._failing[chosen.upstream] = replace(failing, cooldown_until=now + COOLDOWN_MS)
        return chosen

    def answered(self, upstream: Upstream) -> None:
        """It did what it is there for."""
        self._failing.pop(upstream, None)

    def failed(self, upstream: Upstream, now: int, *, retry_after_s: int | None = None) -> None:
        """It failed, or was too busy; `retry_after_s` as it said."""
        before = self._failing.get(upstream, _Failing(0, 0))
        failures, cooldown_until = before.failures + 1, before.cooldown_until
        if retry_after_s is not None:
            cooldown_until = max(cooldown_until, now + min(retry_after_s * 1000, COOLDOWN_MS_MAX))
        elif failures >= FAILURES_MAX:
            cooldown_until = max(cooldown_until, now + COOLDOWN_MS)
        self._failing[upstream] = _Failing(failures, cooldown_until)

    def _rests_until(self, target: Model) -> int:
        failing = self._failing.get(target.upstream)
        return failing.cooldown_until if failing is not None else 0


def seconds_of(retry_after: str | None) -> int | None:
    """The whole seconds that a `Retry-After` says; None where it says a date, or nothing."""
    return int(retry_after) if retry_after and re.fullmatch(r"[0-9]{1,9}", retry_after) else None


def may_try_another_target(status: int) -> bool:
    """Whether an answer with this status leaves no doubt that another upstream may be asked."""
    return status in _NOT_HERE or (500 <= status <= 599 and status not in _TIMES_OUT)


def _drawn(targets: Sequence[Model], draw: int) -> Model:
    """One of them, each as often as its weight says; where none has any, all alike."""
    edges = list(accumulate(target.weight for target in targets))
    if edges[-1] == 0:
        return targets[draw % len(targets)]
    return targets[bisect_right(edges, draw % edges[-1])]
