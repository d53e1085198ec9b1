"""Decides whether a call is admitted, what it holds, and how far its hold increases while its answer grows.

A call *demands* input and output tokens. Limits that count nothing of what it can use are left out: a call that uses
nothing is always admitted, and holds nothing. Each other limit is checked separately, with `free = limit - used` and
`available = free - held`. The verdict on a quota is the worst verdict on its limits:

    ALLOW       the hold fits into what is available
    BUSY        it fits into what is free, but calls in flight hold the rest: it helps to wait for them
    EXHAUSTED   not even the smallest answer fits into what is free: it helps to wait for the reset
    NEVER       the smallest answer is larger than the limit: only a smaller call helps

The smallest answer is shorter where limits are small: at most a tenth of the smallest limit on tokens or output among
the quotas that must all have room (`Demand.smallest_within`).

`decide` combines the quotas. Inside one group the worst verdict counts. Across a user's groups the best one counts
(`combine: any_group`) or all groups must have room (`every_group`). The quotas of `everyone` always count.

An admitted call holds tokens of these quotas:

* those of everyone, and those of the group through which it was admitted. They can refuse, delay or shorten it.
* *additional quotas*: the per-member quotas of the user's other groups that can carry the whole hold. They cannot
  refuse it. A user of two groups with 100k and 200k tokens a day thereby gets 200k, the larger one, not the sum. A
  shared quota is never additional: only calls that are admitted through its group count in it.
* quotas in shadow that would not have refused it.

An `overdraft` lets an answer that has begun exceed the limit. It never admits a call.

Pure: no clock, no SQL. Everything here is a value; nothing is changed in place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from proxy.policy.amounts import TOKENS_MAX, Amount, call_amount, totals_of
from proxy.policy.binding import Alternative, Binding, Rule, Rules
from proxy.policy.quota import SMALLEST_PART, Counter, CounterKey, Demand, Limit, Quota, counter_at

# An estimated input is the number of its bytes, about four times its tokens in prose. Far from a limit that is good
# enough, and no text is tokenized. It is counted if the estimate is more than a sixteenth of what is available: with
# 1,600 tokens available, an estimate of 100 is taken as it is and one of 101 is counted.
_COUNTED_PART = 16


class Verdict(IntEnum):
    """How a quota takes a call, from best to worst. The module's docstring defines each."""

    ALLOW = 0
    BUSY = 1
    EXHAUSTED = 2
    NEVER = 3

    @property
    def word(self) -> str:
        """Its name in logs, metrics and answers: allow, busy, exhausted or never."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Block:
    """Why one limit of one quota does not admit a call.

    `needed` is the least that the call takes of the limit, and `input` the part of it that is input.
    """

    quota: Quota
    counter: Counter
    limit: Limit
    verdict: Verdict
    needed: int
    input: int = 0

    @property
    def is_input_too_large(self) -> bool:
        """Whether a call that can never fit would fit with a shorter input: it takes over nine tenths of the limit.

        If not, the answer that the call asks for is too long, for example because it is 128 answers. A tenth is the
        most that an answer needs by itself in a small quota (`Demand.smallest_within`).
        """
        maximum = self.limit.maximum
        return self.needed - self.input <= maximum < self.input + max(1, maximum // SMALLEST_PART)


class Hold(NamedTuple):
    """What an admitted call takes of one counter, which has this key."""

    key: CounterKey
    quota: Quota
    counter: Counter
    amount: Amount


@dataclass(slots=True)
class Admitted:
    """The call may be sent. It is a value, and never changed; it is not declared frozen, because that takes longer.

    `hold` is what it holds at first, and `holds` the same for each counter. `maximum` is the longest answer, in
    tokens, that its quotas have room for; None if neither a quota nor the request bounds the answer. `capped_by` is
    the quota that made `maximum` less than the call asked for. `would_refuse` are the quotas in shadow that would
    have refused.
    """

    admitted_via: str
    hold: Amount
    maximum: int | None
    holds: tuple[Hold, ...]
    capped_by: Quota | None
    would_refuse: tuple[Quota, ...]


@dataclass(frozen=True, slots=True)
class NotAdmitted:
    """The call may not be sent. `blocks` are the limits that caused this, all with this `verdict`.

    `then` is why the call would not be admitted at their reset either, if grants end before that.
    """

    verdict: Verdict
    blocks: tuple[Block, ...]
    then: "NotAdmitted | None" = None

    @property
    def refused_by(self) -> tuple[str, ...]:
        """The ids of the quotas of these blocks, each once."""
        return tuple(dict.fromkeys(block.quota.id for block in self.blocks))

    @property
    def admissible_at(self) -> int | None:
        """When this call would be admitted, in ms; None if no reset helps (busy, never, or a limit of 0).

        The latest reset of the blocks counts: with an hourly quota used up until 13:00 and a daily one until
        midnight, the call is admitted at midnight.
        """
        if self.then is not None:
            return self.then.admissible_at
        if self.verdict is not Verdict.EXHAUSTED or any(block.limit.maximum == 0 for block in self.blocks):
            return None
        return max(block.counter.window.resets_at for block in self.blocks)


@dataclass(frozen=True, slots=True)
class NeedsCount:
    """The estimate of the input is too coarse for what is left: count its tokens and decide again."""


Counters = Mapping[CounterKey, Counter | None]  # None, or missing: nothing was ever used or held


def decide(demand: Demand, binding: Binding, counters: Counters, now: int) -> Admitted | NotAdmitted | NeedsCount:
    """Admit a call and say what it holds of which counter, or refuse it and say why.

    The limits are those of `binding` at `now`, with the grants that run then. The quotas of the decision have them.

    The first alternative (see `Binding.alternatives`) that has room for all that the call asks for is taken. If none
    has, the one whose free tokens allow the longest answer is taken, also if the call has to wait for it.
    """
    return decide_on(demand, binding, current_counters(binding, counters, now), now)


def current_counters(binding: Binding, counters: Counters, now: int) -> list[Counter]:
    """The counters of a binding at `now`, in the order of its quotas."""
    current = []
    for quota, key in zip(binding.quotas, binding.keys(), strict=True):
        current.append(counter_at(now, quota, counters.get(key)))
    return current


def decide_on(
    demand: Demand, binding: Binding, current: Sequence[Counter], now: int
) -> Admitted | NotAdmitted | NeedsCount:
    """`decide`, with the counters that `current_counters` found."""
    raised = binding.at(now) if binding.grants else binding
    rules = raised.common.rules(demand.uses)
    levels = []
    for counter in current:
        levels.append((counter, totals_of(counter.used), totals_of(counter.held)))
    best = _best_assessment(demand, demand.input, rules, levels)
    if demand.is_estimated and _could_count_help(best, demand, rules, levels):
        return NeedsCount()
    if best.verdict is Verdict.ALLOW:
        return _admit(best, demand, rules, levels, raised.keys())
    refused = NotAdmitted(best.verdict, best.worst_blocks())
    reset_at = refused.admissible_at
    if not binding.grants or reset_at is None:
        return refused
    # A grant can end before the reset, and a limit of which something was left is then lower. So the reset is true
    # only if the call would be admitted at it, or would wait for calls in flight. Each later decision is at a later
    # reset, until all grants have ended.
    later = [counter_at(reset_at, quota, counter) for quota, counter in zip(raised.quotas, current, strict=True)]
    then = decide_on(demand, binding, later, reset_at)
    if isinstance(then, NotAdmitted) and then.verdict is not Verdict.BUSY:
        return NotAdmitted(refused.verdict, refused.blocks, then)
    return refused


def hold_of(quota: Quota, whole: Amount) -> Amount:
    """What a call that holds `whole` holds of this quota.

    A quota with `enforce: after` holds no tokens. It holds the request, which keeps its window open: a call that is
    admitted at 11:59 and ends at 12:01 is charged to the window in which it was admitted.
    """
    return Amount(requests=whole.requests) if quota.enforce == "after" else whole


# The counter at a position, and the totals of what is used and held of it.
_Level = tuple[Counter, tuple[int, ...], tuple[int, ...]]


@dataclass(slots=True)
class _Assessment:
    """How one alternative takes a call: `output` is the longest answer that it has room for."""

    alternative: Alternative
    verdict: Verdict
    output: int
    hold: Amount
    blocks: list[Block]
    capped_by: Quota | None

    def rank(self) -> tuple[int, int, int]:
        """The smallest rank is the best: first those that admit the call now or soon, the longest answer first.

        Then EXHAUSTED before NEVER, the earliest reset first, and one without a reset (a limit of 0) last.

        ALLOW and BUSY are ranked together, by what is *free*: a call waits rather than get a shorter answer because
        of calls in flight. Example: a call with 50 tokens of input asks for 4,000. Group `staff` has 300 tokens free,
        group `lab` 400, of which calls in flight hold 300. The call waits for `lab` and 350 tokens of output, and
        does not take the 250 that `staff` allows at once.
        """
        if self.verdict <= Verdict.BUSY:
            return (0, -self.output, self.verdict)
        admissible_at = NotAdmitted(self.verdict, self.worst_blocks()).admissible_at
        return (self.verdict, int(admissible_at is None), admissible_at or 0)

    def worst_blocks(self) -> tuple[Block, ...]:
        """The blocks that decide: those with the worst verdict.

        If the hourly quota is exhausted and the daily one only busy, the refusal names the hourly one and its reset.
        """
        return tuple(block for block in self.blocks if block.verdict is self.verdict)


def _best_assessment(demand: Demand, input_tokens: int, rules: Rules, levels: Sequence[_Level]) -> _Assessment:
    assessments = []
    for alternative in rules.alternatives:
        assessment = _assess(alternative, demand, input_tokens, levels)
        if assessment.verdict is Verdict.ALLOW and assessment.output == demand.output_maximum:
            return assessment  # it admits the call with all that it asks for
        assessments.append(assessment)
    # `min` keeps the first of equals, so the policy's order of groups decides between them.
    return min(assessments, key=_Assessment.rank)


def _assess(alternative: Alternative, demand: Demand, input_tokens: int, levels: Sequence[_Level]) -> _Assessment:
    """How a set of quotas that must all have room takes a call with so many tokens of input."""
    # The answer is cut to the tightest quota first, and the hold for that answer is then checked against each of
    # them. Example: the daily quota has 200 tokens free and the hourly one 300, of which other calls hold 101. A call
    # with 50 tokens of input can have 150 of output, holds 200, and waits for the hourly quota, which has 199
    # available.
    initial_hold, output, capped_by = demand.initial_hold, demand.output_maximum, None
    smallest = demand.smallest_within(alternative.answer_limit)
    # A stream that asks for no more than the usual smallest answer holds all of it at once, as elsewhere.
    if smallest < demand.smallest < output and demand.grows:
        initial_hold = min(initial_hold, smallest)
    for quota, position, measure, ceiling, counts_input in alternative.output_limits:
        # The longest answer that fits into what is free of this limit, up to the overdraft.
        longest = ceiling - levels[position][1][measure] - (input_tokens if counts_input else 0)
        if longest < output:
            output, capped_by = max(0, longest), quota
    hidden_input = demand.hidden_input and _hidden_input_hold(alternative, demand, input_tokens, output, levels)
    hold = call_amount(input_tokens + hidden_input, min(output, initial_hold))
    blocks = _blocks(alternative.rules, levels, input_tokens, smallest, totals_of(hold))
    verdict = max(block.verdict for block in blocks) if blocks else Verdict.ALLOW
    return _Assessment(alternative, verdict, output, hold, blocks, capped_by)


def _hidden_input_hold(
    alternative: Alternative, demand: Demand, input_tokens: int, output: int, levels: Sequence[_Level]
) -> int:
    """How many tokens are held for input that the request does not show, such as stored files.

    Its size is not known, so it only takes what is free after the shown input and the whole answer: it refuses no
    call and shortens no answer. With 1,000 tokens free, 100 of input and 400 of output, up to 500 are held.
    """
    candidates = [demand.hidden_input]
    for rule in alternative.rules:
        used = levels[rule.position][1]
        for limit in rule.input_limits if not rule.is_after else ():
            taken = input_tokens + (output if limit.counts_output else 0)
            candidates.append(limit.maximum - used[limit.measure] - taken)
    return max(0, min(candidates))


def _could_count_help(best: _Assessment, demand: Demand, rules: Rules, levels: Sequence[_Level]) -> bool:
    """Whether the tokens of an estimated input should be counted before the call is decided on.

    They should if the estimate takes a large part of what is available to others, and if the call would be refused,
    delayed or shortened because of it. They should not if that would happen even with no input at all.
    """
    if best.verdict is Verdict.ALLOW and best.output == demand.output_maximum:
        least_available = demand.input * _COUNTED_PART
        for rule in rules.exact:
            _, used, held = levels[rule.position]
            for _, measure, maximum, *_ in rule.input_limits:
                # A quota in which nothing is free is left out. The call is admitted without it, and is not counted
                # in it.
                if 0 < maximum - used[measure] < least_available + held[measure]:
                    return True
        return False
    without_input = _best_assessment(demand, 0, rules, levels)
    return without_input.verdict < best.verdict or without_input.output > best.output


def _blocks(
    rules: Sequence[Rule], levels: Sequence[_Level], input_tokens: int, smallest: int, hold: tuple[int, ...]
) -> list[Block]:
    """The limits that do not admit a call which needs this input and this answer at least, and holds this."""
    needed = totals_of(call_amount(input_tokens, smallest))
    blocks = []
    for quota, position, is_after, limits, _ in rules:
        counter, used, held = levels[position]
        for limit, measure, maximum, ceiling, counts_input, _ in limits:
            least = needed[measure]
            free = maximum - used[measure]
            if is_after:
                if free > 0:
                    continue
                verdict = Verdict.EXHAUSTED
            # NEVER comes first: a call that no reset can admit must not be told to wait for one. A limit of 0 is a
            # switch that is off, not a call that is too large.
            elif least > maximum > 0:
                verdict = Verdict.NEVER
            # The smallest answer must fit below the limit itself. With 1,000 of 1,000 tokens used, a call is refused
            # whatever the overdraft is, even one that takes nothing.
            elif free <= 0 or least > free:
                verdict = Verdict.EXHAUSTED
            # The hold may use the overdraft. With limit 1,000, overdraft 200 and 900 used, a call that needs at least
            # 100 may hold 300.
            elif hold[measure] > ceiling - used[measure] - held[measure]:
                verdict = Verdict.BUSY
            else:
                continue
            blocks.append(Block(quota, counter, limit, verdict, least, input_tokens if counts_input else 0))
    return blocks


def _admit(
    chosen: _Assessment, demand: Demand, rules: Rules, levels: Sequence[_Level], keys: Sequence[CounterKey]
) -> Admitted:
    alternative, hold = chosen.alternative, chosen.hold
    counting = [*alternative.rules]
    would_refuse = []
    if alternative.additional:
        # An additional quota must carry the whole hold below its limit, without the overdraft. That is the hold which
        # the call gets, not what it asked for. Example: a call asks for 4,000 tokens, and the group that admits it
        # has 100 free, so it holds 100. It is also counted in the quota of another group that has 100 available.
        totals = totals_of(hold)
        for rule in alternative.additional:
            if not _blocks((rule,), levels, demand.input, hold.output, totals):
                counting.append(rule)
    for shadow in rules.shadows:
        # A call that a quota in shadow would have refused is reported and not counted in it, so its counter shows
        # what it would be if the quota were enforced. BUSY is no refusal: the call would only have waited.
        if _assess(shadow, demand, demand.input, levels).verdict > Verdict.BUSY:
            would_refuse.append(shadow.rules[0].quota)
        else:
            counting.append(shadow.rules[0])
    holds = []
    for quota, position, is_after, limits, _ in counting:
        if limits:
            held = hold_of(quota, hold) if is_after else hold
            holds.append(Hold(keys[position], quota, levels[position][0], held))
    return Admitted(
        alternative.group,
        hold,
        None if demand.is_unbounded and chosen.capped_by is None else chosen.output,
        tuple(holds),
        chosen.capped_by,
        tuple(would_refuse),
    )


@dataclass(frozen=True, slots=True)
class HoldIncrease:
    """How many more tokens of output a call in flight holds, and of which counters.

    `verdict` is ALLOW if the increase is enough to go on; else BUSY (calls in flight hold the rest) or EXHAUSTED (the
    limit is reached). `not_increased` are the additional quotas that cannot carry the increase: the call frees what
    it holds of them, and goes on.
    """

    output: int
    verdict: Verdict
    holds: tuple[Hold, ...]
    not_increased: tuple[Quota, ...]


def increase_hold(
    wanted: int,
    least: int,
    binding: Binding,
    *,
    admitted_via: str,
    own: Mapping[str, Amount],
    current: Mapping[str, Counter],
) -> HoldIncrease:
    """Increase the output that a call in flight holds by up to `wanted` tokens; it needs `least` of them to go on.

    `current` are the counters of the quotas that the call holds, and `own` what it holds of each itself, both by
    quota id. Only the quotas through which it was admitted limit the increase.
    """
    [alternative] = [each for each in binding.alternatives() if each.group == admitted_via]
    limiting = [quota for quota in alternative.quotas if quota.id in current]
    output = min(
        [wanted, *(_available_output(quota, current[quota.id], current[quota.id].held) for quota in limiting)]
    )
    output, verdict = max(0, output), Verdict.ALLOW
    if output < least:
        # Waiting helps if there would be enough once all other calls have ended and only this one still holds tokens.
        # Limit 1,000, 500 used, 500 held, 200 of them by this call: the others can free 300 tokens at most, so with
        # `least` 300 the increase is BUSY and with 301 it is EXHAUSTED.
        alone = min(_available_output(quota, current[quota.id], own[quota.id]) for quota in limiting)
        verdict = Verdict.BUSY if alone >= least else Verdict.EXHAUSTED
    not_limiting = [quota for quota in binding.quotas if quota.id in current and quota not in limiting]
    # An increase of 0 is one that every quota can take, also one that is over its limit already.
    not_increased = [
        quota
        for quota in not_limiting
        if quota.enforce == "exact"
        and max(0, _available_output(quota, current[quota.id], current[quota.id].held)) < output
    ]
    amount = Amount(output=output)
    increased = [quota for quota in (*limiting, *not_limiting) if quota not in not_increased]
    holds = tuple(
        Hold(quota.key_for(binding.user), quota, current[quota.id], hold_of(quota, amount)) for quota in increased
    )
    return HoldIncrease(output, verdict, holds, tuple(not_increased))


def _available_output(quota: Quota, counter: Counter, held: Amount) -> int:
    """How many tokens of output a quota has left, up to its overdraft, after what is used and `held`."""
    if quota.enforce == "after":
        return TOKENS_MAX
    available = [
        quota.ceiling(limit) - counter.used.of(limit.measure) - held.of(limit.measure)
        for limit in quota.limits
        if limit.measure.counts_output
    ]
    return min(available, default=TOKENS_MAX)
