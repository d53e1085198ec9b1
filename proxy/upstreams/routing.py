"""Which upstream a call is sent to if several serve its model, and which upstreams are in cooldown.

Each upstream gets a share of the calls by its weight. An upstream that keeps failing, or that sent `Retry-After`, is
in cooldown: it is asked only if all upstreams that could be asked are in cooldown. When the cooldown is over, one
call tries the upstream, and the others keep avoiding it until that call is answered. So a cooldown never refuses a
call, and a client that provokes failures cannot lock others out.

    12:00:00  the fifth failure in a row         cooldown until 12:00:30
    12:00:30  one call is sent to it             cooldown until 12:01:00, for all other calls
    12:00:31  that call is answered              the cooldown is over
              or it fails                        cooldown until 12:01:01
              or its client left, and no result  at 12:01:00 another call tries it

The module also says what a call may still do after a failed attempt. A call must never run twice, so only a call that
was provably refused, or whose upstream failed with a status that says so, may be sent again. After a timeout the
call may still run.

Pure: times (in ms) and random numbers are passed in. Failures are remembered by the upstream as it is configured, so
an upstream whose configuration changes starts without failures.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from proxy.policy.catalog import Model, Upstream

# So many failures in a row are no coincidence: one failure in ten calls would give five in a row once in 100,000
# times.
FAILURES_MAX = 5
COOLDOWN_MS = 30_000
# The longest `Retry-After` that is believed. An upstream that says 86400 by mistake must not be avoided for a day.
COOLDOWN_MS_MAX = 60_000
# The longest pause before the same upstream is asked again. The client waits meanwhile and sees nothing of it.
PAUSE_MS_MAX = 2_000
# The pause before an upstream that could not be reached is asked again: it may be restarting.
UNREACHED_PAUSE_MS = 200
# The upstream, or a proxy in front of it, gave up waiting, so the call may still run (524 is Cloudflare's).
_TIMEOUT_STATUSES = frozenset((408, 504, 524))
# This upstream refuses our key, our account is used up, or its own limit is reached. Another upstream may answer.
_ACCOUNT_STATUSES = frozenset((401, 402, 429))


@dataclass(frozen=True, slots=True)
class _Failures:
    """The failures of an upstream since it last answered, and the end of its cooldown (0: no cooldown)."""

    count: int
    cooldown_until: int


@dataclass(frozen=True, slots=True)
class LastFailure:
    """The last failure of an upstream: when (ms), what kind of outcome, and the reason that the log has."""

    at: int
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class RoutingState:
    """The targets that one call may still be sent to, until the time `deadline` (ms).

    `pause_ms` is the pause before the next attempt. `has_paused` is set once a target is asked a second time, which
    happens at most once for each call.
    """

    remaining: tuple[Model, ...]
    deadline: int
    pause_ms: int = 0
    has_paused: bool = False

    def after_failure(self, target: Model, *, pause_ms: int | None, now: int) -> "RoutingState | None":
        """The state after a failed attempt at `target`; None if the call may not be sent again.

        `pause_ms` is the time after which the same upstream may be asked again (None: never). Other targets are asked
        first, without a pause.
        """
        remaining = tuple(other for other in self.remaining if other is not target)
        if now >= self.deadline:
            return None
        if remaining:
            return replace(self, remaining=remaining, pause_ms=0)
        if pause_ms is None or pause_ms > PAUSE_MS_MAX or now + pause_ms >= self.deadline or self.has_paused:
            return None
        return replace(self, remaining=(target,), pause_ms=pause_ms, has_paused=True)


@dataclass(slots=True)
class Cooldowns:
    """Which upstreams are in cooldown, as one process has seen it."""

    _failures: dict[Upstream, _Failures] = field(default_factory=dict)
    last: dict[str, LastFailure] = field(default_factory=dict)  # by the names of upstreams

    def choose(self, targets: Sequence[Model], now: int, *, draw: int) -> Model:
        """One of these targets. `draw` is a random number ≥ 0 from a range far larger than any sum of weights.

        Choosing an upstream whose cooldown is over makes this call the one that tries it.
        """
        if not self._failures:
            return _by_weight(targets, draw)
        available = self.available(targets, now)
        if not available:
            return min(targets, key=self._cooldown_until)
        chosen = _by_weight(available, draw)
        failures = self._failures.get(chosen.upstream)
        if failures is not None and failures.cooldown_until:
            # The other calls avoid the upstream for one more cooldown. If no result of this call is ever noted,
            # because its client left, another call tries the upstream then.
            self._failures[chosen.upstream] = replace(failures, cooldown_until=now + COOLDOWN_MS)
        return chosen

    def available(self, targets: Sequence[Model], now: int) -> list[Model]:
        """Those of these targets that are not in cooldown."""
        # A cooldown that ends later than any cooldown can was written while the clock was ahead; it is ignored.
        return [target for target in targets if not now < self._cooldown_until(target) <= now + COOLDOWN_MS_MAX]

    def answered(self, upstream: Upstream) -> None:
        """Note that it answered: its failures are forgotten."""
        if self._failures:
            self._failures.pop(upstream, None)

    def failed(self, upstream: Upstream, now: int, *, retry_after_s: int | None = None) -> None:
        """Note that it failed or refused because it was busy; `retry_after_s` is the value of its `Retry-After`."""
        before = self._failures.get(upstream, _Failures(0, 0))
        count, cooldown_until = before.count + 1, before.cooldown_until
        # `max`: calls overlap, and a result that comes late must not shorten a cooldown.
        if retry_after_s is not None:
            cooldown_until = max(cooldown_until, now + min(retry_after_s * 1000, COOLDOWN_MS_MAX))
        elif count >= FAILURES_MAX:
            cooldown_until = max(cooldown_until, now + COOLDOWN_MS)
        self._failures[upstream] = _Failures(count, cooldown_until)

    def until(self, now: int) -> dict[str, int]:
        """The upstreams that are in cooldown, by their names, and when it ends (ms)."""
        ends = {upstream.name: failures.cooldown_until for upstream, failures in self._failures.items()}
        return {name: end for name, end in ends.items() if now < end <= now + COOLDOWN_MS_MAX}

    def _cooldown_until(self, target: Model) -> int:
        failures = self._failures.get(target.upstream)
        return failures.cooldown_until if failures is not None else 0


def seconds_of(retry_after: str | None) -> int | None:
    """The seconds in a `Retry-After` header; None if it has a date or anything else, or is missing."""
    return int(retry_after) if retry_after and re.fullmatch(r"[0-9]{1,9}", retry_after) else None


def may_try_another_target(status: int) -> bool:
    """Whether a call that was answered with this status certainly did not run, so that another upstream may get it.

    Not for other 4xx: the request itself is at fault, and every upstream would refuse it.
    """
    return status in _ACCOUNT_STATUSES or (500 <= status <= 599 and status not in _TIMEOUT_STATUSES)


def _by_weight(targets: Sequence[Model], draw: int) -> Model:
    """One of the targets, each as often as its weight says; if all weights are 0, each equally often.

    Example: with weights 3 and 1 the edges are 3 and 4. `draw % 4` is 0, 1 or 2 for the first target, 3 for the
    second.
    """
    if len(targets) == 1:
        return targets[0]
    edges = list(accumulate(target.weight for target in targets))
    if edges[-1] == 0:
        return targets[draw % len(targets)]
    return targets[bisect_right(edges, draw % edges[-1])]
