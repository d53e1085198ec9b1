"""What a quota is, how its counter stands at an instant, what a call demands, and which quotas bind a user.

Whether they let a call in is decided in `admission`. Pure: no clock, no SQL. Everything here is a value; nothing is
changed in place.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import translate
from typing import Literal

from proxy.policy.amounts import NOTHING, TOKENS_MAX, Amount, Measure
from proxy.policy.windows import Per, Window

Enforce = Literal["exact", "after", "shadow"]
Combine = Literal["any_group", "every_group"]
CounterKey = tuple[str, str]


class Globs:
    """Patterns for model names: `*`, `?` and `[…]`, case-sensitive, the whole name."""

    __slots__ = ("_pattern", "texts")

    def __init__(self, texts: Iterable[str] = ("*",)) -> None:
        self.texts = tuple(texts)
        self._pattern = re.compile("|".join(translate(text) for text in self.texts))

    def match(self, model: str) -> bool:
        """Whether any of the patterns covers this model name."""
        return bool(self.texts) and self._pattern.match(model) is not None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Globs) and self.texts == other.texts

    def __hash__(self) -> int:
        return hash(self.texts)

    def __repr__(self) -> str:
        return f"Globs({self.texts!r})"


ALL_MODELS = Globs()


@dataclass(frozen=True, slots=True)
class Limit:
    """One number of a quota."""

    measure: Measure
    maximum: int


@dataclass(frozen=True, slots=True)
class Quota:
    """One named rule of a group. Its id, `group/name`, is what its counters belong to."""

    group: str
    name: str
    limits: tuple[Limit, ...]
    per: Per
    models: Globs = ALL_MODELS
    shared: bool = False
    enforce: Enforce = "exact"
    # How far an answer that has begun may take the quota over its limit, in tokens. Nobody is let in above the limit.
    overdraft: int = 0
    # Asked for a dozen times in every decision, so it is put together once.
    id: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.group}/{self.name}")

    def ceiling(self, limit: Limit) -> int:
        """How far calls may take a limit that they were let in under: the overdraft is for what they generate."""
        return limit.maximum + (self.overdraft if limit.measure in ("tokens", "output_tokens") else 0)

    def key_for(self, user: str) -> CounterKey:
        """Whose counter this is: the member's own, or the group's one pot.

        The subject comes first and a pot's begins with "~", so that sorted keys put members' rows before pots:
        the order in which rows are locked, which keeps a hot pot locked for the shortest time.
        """
        return (f"~{self.group}" if self.shared else f"user:{user}", self.id)


@dataclass(frozen=True, slots=True)
class Counter:
    """What one subject has used and holds of one quota in its window."""

    window: Window
    used: Amount = NOTHING
    held: Amount = NOTHING

    @property
    def is_open(self) -> bool:
        """A window in which nothing was used and nothing is held is not open."""
        return bool(self.used or self.held)


def counter_at(now: int, quota: Quota, counter: Counter | None) -> Counter:
    """The counter as it stands at `now`: itself while its window is open, else a fresh one.

    A running window keeps its end when `per` changes. A clock that jumps back resets nothing, because a window
    is left only when its end has passed. A window is known by when it opened, so a new one never opens before, or
    together with, one that calls in flight may still belong to: not after a change of `per` (the hour and the day
    that begin at midnight), and not after a clock that went ahead and came back.
    """
    if counter is None:
        return Counter(quota.per.opening(now))
    last, opening = counter.window, quota.per.opening(now)
    if last.is_open(now) and now < last.opened_at:
        # What a clock that was ahead has opened counts on, but for no longer than a window that opens now.
        return replace(counter, window=Window(last.opened_at, min(last.resets_at, opening.resets_at)))
    if last.is_open(now) and counter.is_open:
        return counter
    not_before = last.opened_at if last.is_open(now) else max(last.resets_at, last.opened_at + 1)
    return Counter(Window(max(opening.opened_at, not_before), opening.resets_at))


@dataclass(frozen=True, slots=True)
class Demand:
    """What a call asks for, in tokens: a bound on its input, the answer wanted, and the least worth starting for.

    `output_maximum`, `smallest` and `first` are totals over all choices; all are 0 for calls that generate nothing
    (embeddings), which limits on output alone don't bind. Of the answer no more than `first` is held to begin with: a
    stream whose tokens can be seen holds more as it grows. `is_unbounded` where nobody says how long the answer may
    become, so that `output_maximum` is only what is usual. `is_estimated` where the input was bounded by its bytes, of which four
    make a token. `hidden_input` is what it may read beside its input without showing it (stored files, earlier answers): so
    much is held of it as is free, since nobody knows.
    """

    input: int
    output_maximum: int
    smallest: int
    initial_hold: int = TOKENS_MAX
    is_unbounded: bool = False
    is_estimated: bool = False
    hidden_input: int = 0

    def bounds(self, limit: Limit) -> bool:
        """Whether this limit can bind this call at all."""
        return limit.measure != "output_tokens" or self.output_maximum > 0

    def least(self, measure: Measure) -> int:
        """The least that this call takes of a measure."""
        return Amount(self.input, self.smallest, 1).of(measure)


@dataclass(frozen=True, slots=True)
class GroupQuotas:
    """One of a user's groups, as a way in: its quotas for this model. None of them: unlimited."""

    group: str
    quotas: tuple[Quota, ...]


@dataclass(frozen=True, slots=True)
class Binding:
    """Which quotas bind one user on one model.

    `always` are those of everyone. `groups` are the user's groups that have a say, in the policy's order.
    `shadows` only watch: they never refuse and give no group a say.
    """

    user: str
    always: tuple[Quota, ...] = ()
    groups: tuple[GroupQuotas, ...] = ()
    shadows: tuple[Quota, ...] = ()
    combine: Combine = "any_group"

    @property
    def quotas(self) -> tuple[Quota, ...]:
        """All of them, each once."""
        return self.always + tuple(quota for route in self.groups for quota in route.quotas) + self.shadows

    def keys(self) -> list[CounterKey]:
        """The counters that a decision looks at."""
        return [quota.key_for(self.user) for quota in self.quotas]

    def alternatives(self) -> list[GroupQuotas]:
        """Sets of quotas of which one has to have room as a whole: one for each group, or all together."""
        if self.combine == "every_group" and self.groups:
            together = tuple(quota for route in self.groups for quota in route.quotas)
            return [GroupQuotas("+".join(route.group for route in self.groups), self.always + together)]
        own = [GroupQuotas(route.group, self.always + route.quotas) for route in self.groups]
        return own or [GroupQuotas("everyone", self.always)]
