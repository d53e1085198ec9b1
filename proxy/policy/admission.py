"""The decisions: whether a call may be let in, what it holds, and how much more it may hold as its answer grows.

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

An `overdraft` is room beyond the limit for answers that have begun, never for letting a call in.

Pure: no clock, no SQL. Everything here is a value; nothing is changed in place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum

from proxy.policy.amounts import TOKENS_MAX, Amount
from proxy.policy.quota import Binding, Counter, CounterKey, Demand, GroupQuotas, Limit, Quota, counter_at

# An input that was only bounded by its bytes is counted where the bound is more than this part of what is available,
# or stands in the way of the call itself. Far from a limit nothing is counted; near it nobody is refused by a guess.
_ROUGH_PART = 16


class Verdict(IntEnum):
    """From best to worst; see the module's text."""

    ALLOW = 0
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
class Hold:
    """What an admitted call takes of one counter."""

    quota: Quota
    counter: Counter
    amount: Amount


@dataclass(frozen=True, slots=True)
class Admitted:
    """The call may be sent. `hold` is what it holds to begin with, `maximum` the longest answer there is room for.

    `capped_by` says why that is less than it wanted. None: nobody knows how long the answer may become.
    """

    admitted_via: str
    hold: Amount
    maximum: int | None
    holds: tuple[Hold, ...]
    capped_by: Quota | None
    would_refuse: tuple[Quota, ...]


@dataclass(frozen=True, slots=True)
class NotAdmitted:
    """The call may not be sent, and what stands in its way."""

    verdict: Verdict
    blocks: tuple[Block, ...]

    @property
    def admissible_at(self) -> int | None:
        """The instant at which this call would be let in, in ms; None where no reset will do (busy, never, a 0)."""
        if self.verdict is not Verdict.EXHAUSTED or any(block.limit.maximum == 0 for block in self.blocks):
            return None
        return max(block.counter.window.resets_at for block in self.blocks)


@dataclass(frozen=True, slots=True)
class NeedsCount:
    """So little is left that the bytes of the input are too rough a bound: count its tokens, and ask again."""


Counters = Mapping[CounterKey, Counter]


def decide(demand: Demand, binding: Binding, counters: Counters, now: int) -> Admitted | NotAdmitted | NeedsCount:
    """Let a call in, and say what it holds of which counter; or refuse it, and say why.

    Of the ways that have room for all that the call wants the first one is taken. If there is none, the one
    that can carry the most: by what is free, so that nobody gets a shorter answer because of calls in flight.
    """
    current = {
        quota.id: counter_at(now, quota, counters.get(quota.key_for(binding.user))) for quota in binding.quotas
    }
    best = _best(demand, binding, current)
    if demand.is_estimated and _could_be_better(best, demand, binding, current):
        return NeedsCount()
    if best.verdict is not Verdict.ALLOW:
        return NotAdmitted(best.verdict, best.telling())
    return _admit(best, demand, binding, current)


def hold_of(quota: Quota, whole: Amount) -> Amount:
    """What a call that holds `whole` holds of this quota.

    `after` holds no tokens; the one request marks that its window is open, so that the call is charged to the
    window in which it was let in.
    """
    return Amount(requests=whole.requests) if quota.enforce == "after" else whole


@dataclass(frozen=True, slots=True)
class _Assessment:
    route: GroupQuotas
    verdict: Verdict
    output: int
    hold: Amount
    blocks: tuple[Block, ...]
    capped_by: Quota | None

    def is_whole(self, demand: Demand) -> bool:
        """Whether it lets the call in with all that it wants."""
        return self.verdict is Verdict.ALLOW and self.output == demand.output_maximum

    def rank(self) -> tuple[int, int, int]:
        """Smaller is better: any that may be let in now or soon, by the most it carries; then the soonest reset."""
        if self.verdict <= Verdict.BUSY:
            return (0, -self.output, self.verdict)
        admissible_at = NotAdmitted(self.verdict, self.telling()).admissible_at
        return (self.verdict, int(admissible_at is None), admissible_at or 0)

    def telling(self) -> tuple[Block, ...]:
        """The blocks that decide: the worst of them."""
        return tuple(block for block in self.blocks if block.verdict is self.verdict)


def _best(demand: Demand, binding: Binding, current: Mapping[str, Counter]) -> _Assessment:
    alternatives = [_assess(way, demand, current) for way in binding.alternatives()]
    return next((way for way in alternatives if way.is_whole(demand)), None) or min(
        alternatives, key=_Assessment.rank
    )


def _assess(route: GroupQuotas, demand: Demand, current: Mapping[str, Counter]) -> _Assessment:
    """How a set of quotas, all of which must have room, takes this call."""
    output, capped_by = demand.output_maximum, None
    for quota in route.quotas:
        carried = _carried(quota, current[quota.id], demand)
        if carried < output:
            output, capped_by = carried, quota
    hold = Amount(demand.input + _unseen(route, demand, current, output), min(output, demand.initial_hold), 1)
    blocks = tuple(block for quota in route.quotas for block in _blocks(quota, current[quota.id], demand, hold))
    verdict = max((block.verdict for block in blocks), default=Verdict.ALLOW)
    return _Assessment(route, verdict, output, hold, blocks, capped_by)


def _carried(quota: Quota, counter: Counter, demand: Demand) -> int:
    """The longest answer that what is free of this quota has room for."""
    if quota.enforce == "after":
        return demand.output_maximum
    room = [demand.output_maximum]
    for limit in quota.limits:
        if limit.measure in ("tokens", "output_tokens") and demand.bounds(limit):
            taken = demand.input if limit.measure == "tokens" else 0
            room.append(quota.ceiling(limit) - counter.used.of(limit.measure) - taken)
    return max(0, min(room))


def _unseen(route: GroupQuotas, demand: Demand, current: Mapping[str, Counter], output: int) -> int:
    """How much is held of what the call may read without showing it: as much as is free beside the rest."""
    room = [demand.hidden_input]
    for quota in route.quotas if demand.hidden_input else ():
        for limit in quota.limits if quota.enforce != "after" else ():
            if limit.measure in ("tokens", "input_tokens"):
                taken = demand.input + (output if limit.measure == "tokens" else 0)
                room.append(limit.maximum - current[quota.id].used.of(limit.measure) - taken)
    return max(0, min(room))


def _could_be_better(best: _Assessment, demand: Demand, binding: Binding, current: Mapping[str, Counter]) -> bool:
    """Whether an input that was only bounded by its bytes should be counted before anything is decided.

    It should where the call would be refused, delayed or shortened, unless it would be so without any input; and
    where its bound takes a large part of what others may want.
    """
    if best.is_whole(demand):
        return any(_is_large(quota, current[quota.id], demand) for quota in binding.quotas)
    relieved = _best(replace(demand, input=0), binding, current)
    return relieved.verdict < best.verdict or relieved.output > best.output


def _is_large(quota: Quota, counter: Counter, demand: Demand) -> bool:
    much = demand.input * _ROUGH_PART
    return quota.enforce == "exact" and any(
        0 < limit.maximum - counter.used.of(limit.measure) < much + counter.held.of(limit.measure)
        for limit in quota.limits
        if limit.measure in ("tokens", "input_tokens")
    )


def _blocks(quota: Quota, counter: Counter, demand: Demand, hold: Amount) -> list[Block]:
    verdicts = (
        (limit, _verdict(quota, limit, counter, demand.least(limit.measure), hold.of(limit.measure)))
        for limit in quota.limits
        if demand.bounds(limit)
    )
    return [
        Block(quota, counter, limit, verdict, demand.least(limit.measure))
        for limit, verdict in verdicts
        if verdict is not Verdict.ALLOW
    ]


def _verdict(quota: Quota, limit: Limit, counter: Counter, least: int, hold: int) -> Verdict:
    free = limit.maximum - counter.used.of(limit.measure)
    if quota.enforce == "after":
        return Verdict.ALLOW if free > 0 else Verdict.EXHAUSTED
    if least > limit.maximum > 0:  # a limit of 0 is a switch that is off, not a call that is too large
        return Verdict.NEVER
    if free <= 0 or least > free:
        return Verdict.EXHAUSTED
    room = quota.ceiling(limit) - counter.used.of(limit.measure) - counter.held.of(limit.measure)
    return Verdict.BUSY if hold > room else Verdict.ALLOW


def _admit(way: _Assessment, demand: Demand, binding: Binding, current: Mapping[str, Counter]) -> Admitted:
    hold = way.hold
    wanted = replace(demand, smallest=hold.output)
    admitted_via = {quota.id for quota in way.route.quotas}
    beside = [
        quota
        for route in binding.groups
        for quota in route.quotas
        if quota.id not in admitted_via and not quota.shared and not _blocks(quota, current[quota.id], wanted, hold)
    ]
    refusing = [quota for quota in binding.shadows if _would_refuse(quota, current[quota.id], demand)]
    watching = [quota for quota in binding.shadows if quota not in refusing]
    return Admitted(
        admitted_via=way.route.group,
        hold=hold,
        maximum=None if demand.is_unbounded and way.capped_by is None else way.output,
        holds=tuple(
            Hold(quota, current[quota.id], hold_of(quota, hold))
            for quota in (*way.route.quotas, *beside, *watching)
            if any(demand.bounds(limit) for limit in quota.limits)
        ),
        capped_by=way.capped_by,
        would_refuse=tuple(refusing),
    )


def _would_refuse(quota: Quota, counter: Counter, demand: Demand) -> bool:
    """Whether a quota in shadow would have refused: what it would only have delayed it would have let in."""
    return _assess(GroupQuotas(quota.group, (quota,)), demand, {quota.id: counter}).verdict > Verdict.BUSY


@dataclass(frozen=True, slots=True)
class HoldIncrease:
    """How many more tokens of output a call in flight holds, and of which counters.

    `verdict` is ROOM where that is enough to go on; else whether calls in flight (BUSY) or the limit (EXHAUSTED)
    stand in the way. `left_alone` are quotas that the call did not come in through and that can't carry the growth.
    """

    output: int
    verdict: Verdict
    holds: tuple[Hold, ...]
    left_alone: tuple[Quota, ...]


def increase_hold(
    wanted: int,
    least: int,
    binding: Binding,
    *,
    admitted_via: str,
    own: Mapping[str, Amount],
    current: Mapping[str, Counter],
) -> HoldIncrease:
    """Let a call in flight hold more, as far as there is room.

    `current` is how the counters of the quotas stand that the call holds, by the quotas' ids, and `own` what it holds of
    them itself. Only the way through which it was let in can stop it.
    """
    [way] = [way for way in binding.alternatives() if way.group == admitted_via]
    stopping = [quota for quota in way.quotas if quota.id in current]
    output = min([wanted, *(_room(quota, current[quota.id], current[quota.id].held) for quota in stopping)])
    output, verdict = max(0, output), Verdict.ALLOW
    if output < least:
        alone = min(_room(quota, current[quota.id], own[quota.id]) for quota in stopping)
        verdict = Verdict.BUSY if alone >= least else Verdict.EXHAUSTED
    beside = [quota for quota in binding.quotas if quota.id in current and quota not in stopping]
    left_alone = [
        quota
        for quota in beside
        if quota.enforce == "exact" and _room(quota, current[quota.id], current[quota.id].held) < output
    ]
    amount = Amount(output=output)
    growing = [quota for quota in (*stopping, *beside) if quota not in left_alone]
    holds = tuple(Hold(quota, current[quota.id], hold_of(quota, amount)) for quota in growing)
    return HoldIncrease(output, verdict, holds, tuple(left_alone))


def _room(quota: Quota, counter: Counter, held: Amount) -> int:
    """How much output a quota has room for, beside what is held."""
    if quota.enforce == "after":
        return TOKENS_MAX
    room = [
        quota.ceiling(limit) - counter.used.of(limit.measure) - held.of(limit.measure)
        for limit in quota.limits
        if limit.measure in ("tokens", "output_tokens")
    ]
    return min(room, default=TOKENS_MAX)
