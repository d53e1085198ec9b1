"""The rules: what a quota is, how a counter stands at an instant, and whether a call may be let in.

A call *demands* input and output tokens. For each limit by itself `free = limit - used` and
`available = free - held`; the verdict on a quota is the worst of its limits:

    ROOM        the hold fits into what is available
    BUSY        it fits into what is free, but calls in flight hold the rest: waiting a moment helps
    EXHAUSTED   not even the smallest answer fits into what is free: waiting for the reset helps
    NEVER       the smallest answer is larger than the limit: nothing helps but a smaller call

`decide` combines quotas: inside one group the worst verdict counts, across a user's groups the best
(`any_group`), and those of `everyone` count always. What an admitted call holds: the quotas of everyone, those
of the group through which it came in, and the per-member quotas of the user's other groups that can carry the
whole hold too. A shared pot is touched only by calls admitted through its group.

Pure: no clock, no SQL. Everything here is a value; nothing is changed in place.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from fnmatch import translate
from typing import Literal

from proxy.usage import NOTHING, Amount, Measure
from proxy.windows import Per, Window

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
    # Asked for a dozen times in every decision, so it is put together once.
    id: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.group}/{self.name}")

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


def standing_at(now: int, quota: Quota, counter: Counter | None) -> Counter:
    """The counter as it stands at `now`: itself while its window is open, else a fresh one.

    A running window keeps its end when `per` changes. A clock that jumps back resets nothing, because a window
    is left only when its end has passed. A window is known by when it opened, so a new one never opens before, or
    together with, one that calls in flight may still belong to: not after a change of `per` (the hour and the day
    that begin at midnight), and not after a clock that went ahead and came back.
    """
    if counter is None:
        return Counter(quota.per.opening(now))
    last = counter.window
    if last.is_open(now) and (counter.is_open or now < last.opened_at):
        return counter
    opening = quota.per.opening(now)
    not_before = last.opened_at if last.is_open(now) else last.resets_at
    return Counter(Window(max(opening.opened_at, not_before), opening.resets_at))


@dataclass(frozen=True, slots=True)
class Demand:
    """What a call asks for, in tokens: a bound on its input, the answer wanted, and the least worth starting for.

    `want` and `smallest` are totals over all choices; both are 0 for calls that generate nothing (embeddings),
    which limits on output alone don't bind.
    """

    input: int
    want: int
    smallest: int

    def bounds(self, limit: Limit) -> bool:
        """Whether this limit can bind this call at all."""
        return limit.measure != "output_tokens" or self.want > 0

    def least(self, measure: Measure) -> int:
        """The least that this call takes of a measure."""
        return Amount(self.input, self.smallest, 1).of(measure)


class Verdict(IntEnum):
    """From best to worst; see the module's text."""

    ROOM = 0
    BUSY = 1
    EXHAUSTED = 2
    NEVER = 3


@dataclass(frozen=True, slots=True)
class Block:
    """Why one limit of one quota stands in the way."""

    quota: Quota
    counter: Counter
    limit: Limit
    verdict: Verdict
    needed: int


@dataclass(frozen=True, slots=True)
class Route:
    """One of a user's groups, as a way in: its quotas for this model. None of them: unlimited."""

    group: str
    quotas: tuple[Quota, ...]


@dataclass(frozen=True, slots=True)
class Binding:
    """Which quotas bind one user on one model.

    `always` are those of everyone. `routes` are the user's groups that have a say, in the policy's order.
    `shadows` only watch: they never refuse and give no group a say.
    """

    user: str
    always: tuple[Quota, ...] = ()
    routes: tuple[Route, ...] = ()
    shadows: tuple[Quota, ...] = ()
    combine: Combine = "any_group"

    @property
    def quotas(self) -> tuple[Quota, ...]:
        """All of them, each once."""
        return self.always + tuple(quota for route in self.routes for quota in route.quotas) + self.shadows

    def keys(self) -> list[CounterKey]:
        """The counters that a decision looks at."""
        return [quota.key_for(self.user) for quota in self.quotas]

    def ways(self) -> list[Route]:
        """Sets of quotas of which one has to have room as a whole: one for each group, or all together."""
        if self.combine == "every_group" and self.routes:
            together = tuple(quota for route in self.routes for quota in route.quotas)
            return [Route("+".join(route.group for route in self.routes), self.always + together)]
        own = [Route(route.group, self.always + route.quotas) for route in self.routes]
        return own or [Route("everyone", self.always)]


@dataclass(frozen=True, slots=True)
class Hold:
    """What an admitted call takes of one counter."""

    quota: Quota
    counter: Counter
    amount: Amount


@dataclass(frozen=True, slots=True)
class Admitted:
    """The call may be sent. `hold` is the most it may use; `capped_by` says why that is less than it wanted."""

    through: str
    hold: Amount
    holds: tuple[Hold, ...]
    capped_by: Quota | None
    would_refuse: tuple[Quota, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """The call may not be sent, and what stands in its way."""

    verdict: Verdict
    blocks: tuple[Block, ...]

    @property
    def let_in_at(self) -> int | None:
        """The instant at which this call would be let in, in ms; None where no reset will do (busy, never, a 0)."""
        if self.verdict is not Verdict.EXHAUSTED or any(block.limit.maximum == 0 for block in self.blocks):
            return None
        return max(block.counter.window.resets_at for block in self.blocks)


Counters = Mapping[CounterKey, Counter]


def decide(demand: Demand, binding: Binding, counters: Counters, now: int) -> Admitted | Refused:
    """Let a call in, and say what it holds of which counter; or refuse it, and say why.

    Of the ways that have room for all that the call wants the first one is taken. If there is none, the one
    that can carry the most: by what is free, so that nobody gets a shorter answer because of calls in flight.
    """
    at = {quota.id: standing_at(now, quota, counters.get(quota.key_for(binding.user))) for quota in binding.quotas}
    ways = [_assess(way, demand, at) for way in binding.ways()]
    whole = (way for way in ways if way.verdict is Verdict.ROOM and way.output == demand.want)
    best = next(whole, None) or min(ways, key=_Way.rank)
    if best.verdict is not Verdict.ROOM:
        return Refused(best.verdict, best.telling())
    return _admit(best, demand, binding, at)


def hold_of(quota: Quota, whole: Amount) -> Amount:
    """What a call that holds `whole` holds of this quota.

    `after` holds no tokens; the one request marks that its window is open, so that the call is charged to the
    window in which it was let in.
    """
    return Amount(requests=whole.requests) if quota.enforce == "after" else whole


@dataclass(frozen=True, slots=True)
class _Way:
    route: Route
    verdict: Verdict
    output: int
    blocks: tuple[Block, ...]
    capped_by: Quota | None

    def rank(self) -> tuple[int, int, int]:
        """Smaller is better: any that may be let in now or soon, by the most it carries; then the soonest reset."""
        if self.verdict <= Verdict.BUSY:
            return (0, -self.output, self.verdict)
        let_in_at = Refused(self.verdict, self.telling()).let_in_at
        return (self.verdict, int(let_in_at is None), let_in_at or 0)

    def telling(self) -> tuple[Block, ...]:
        """The blocks that decide: the worst of them."""
        return tuple(block for block in self.blocks if block.verdict is self.verdict)


def _assess(route: Route, demand: Demand, at: Mapping[str, Counter]) -> _Way:
    """How a set of quotas, all of which must have room, takes this call."""
    output, capped_by = demand.want, None
    for quota in route.quotas:
        carried = _carried(quota, at[quota.id], demand)
        if carried < output:
            output, capped_by = carried, quota
    hold = Amount(demand.input, output, 1)
    blocks = tuple(block for quota in route.quotas for block in _blocks(quota, at[quota.id], demand, hold))
    verdict = max((block.verdict for block in blocks), default=Verdict.ROOM)
    return _Way(route, verdict, output, blocks, capped_by)


def _carried(quota: Quota, counter: Counter, demand: Demand) -> int:
    """The longest answer that what is free of this quota has room for."""
    if quota.enforce == "after":
        return demand.want
    room = [demand.want]
    for limit in quota.limits:
        if limit.measure in ("tokens", "output_tokens") and demand.bounds(limit):
            taken = demand.input if limit.measure == "tokens" else 0
            room.append(limit.maximum - counter.used.of(limit.measure) - taken)
    return max(0, min(room))


def _blocks(quota: Quota, counter: Counter, demand: Demand, hold: Amount) -> list[Block]:
    verdicts = (
        (limit, _verdict(quota, limit, counter, demand.least(limit.measure), hold.of(limit.measure)))
        for limit in quota.limits
        if demand.bounds(limit)
    )
    return [
        Block(quota, counter, limit, verdict, demand.least(limit.measure))
        for limit, verdict in verdicts
        if verdict is not Verdict.ROOM
    ]


def _verdict(quota: Quota, limit: Limit, counter: Counter, least: int, hold: int) -> Verdict:
    free = limit.maximum - counter.used.of(limit.measure)
    if quota.enforce == "after":
        return Verdict.ROOM if free > 0 else Verdict.EXHAUSTED
    if least > limit.maximum > 0:  # a limit of 0 is a switch that is off, not a call that is too large
        return Verdict.NEVER
    if free <= 0 or least > free:
        return Verdict.EXHAUSTED
    return Verdict.BUSY if hold > free - counter.held.of(limit.measure) else Verdict.ROOM


def _admit(way: _Way, demand: Demand, binding: Binding, at: Mapping[str, Counter]) -> Admitted:
    hold = Amount(demand.input, way.output, 1)
    wanted = replace(demand, want=way.output, smallest=way.output)
    through = {quota.id for quota in way.route.quotas}
    beside = [
        quota
        for route in binding.routes
        for quota in route.quotas
        if quota.id not in through and not quota.shared and not _blocks(quota, at[quota.id], wanted, hold)
    ]
    refusing = [quota for quota in binding.shadows if _would_refuse(quota, at[quota.id], demand)]
    watching = [quota for quota in binding.shadows if quota not in refusing]
    return Admitted(
        through=way.route.group,
        hold=hold,
        holds=tuple(
            Hold(quota, at[quota.id], hold_of(quota, hold))
            for quota in (*way.route.quotas, *beside, *watching)
            if any(demand.bounds(limit) for limit in quota.limits)
        ),
        capped_by=way.capped_by,
        would_refuse=tuple(refusing),
    )


def _would_refuse(quota: Quota, counter: Counter, demand: Demand) -> bool:
    """Whether a quota in shadow would have refused: what it would only have delayed it would have let in."""
    return _assess(Route(quota.group, (quota,)), demand, {quota.id: counter}).verdict > Verdict.BUSY
