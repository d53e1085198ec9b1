"""The verdict on a run in which an administrator changed things: promises beside those in `verdict`.

    admin failures         answers of the admin API that are wrong: 5xx other than 503, and refused changes
    audit                  changes without exactly one row in the audit log, and rows without a change
    admitted beyond        calls that were admitted although what was used and held left no room in any limit that may
                           have been in force, or that no quota counted although one was in force
    wrong limits           refusals that state a limit which can't have been in force
    wrong resets           resets that name another sum than what the calls before them were charged
    unbalanced (changed)   counters that differ from the sum of the calls that ended after their last reset
    disabled users         calls that were admitted although their user was disabled

Instants of the database and of this machine are compared, so both must have the same clock. Two events in the same
ms have no order: each figure takes the order that is right for the proxy. What a call held when it was admitted is
not stored, because its hold may have grown; so each call counts with its input and at most the smallest answer.

A call that was open during a whole pause may have expired and been settled later, which changes its charge. When that
happened is not stored, so it may count or not.

Pure: takes records, returns figures.
"""

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from proxy.torture.changes import (
    DIGITS,
    POT,
    ChangeRecord,
    ResetCounters,
    Timeline,
)
from proxy.torture.evidence import Amounts, CallRow, CounterKey, CounterRow, Evidence
from proxy.torture.report import Figure
from proxy.torture.verdict import charges_by_window, percentiles, promise

# An id of a call can be read and the call be gone when its end is asked for.
_MAY_BE_MISSING = "call.end"


def judge_administration(evidence: Evidence) -> list[Figure]:
    """Judge what followed from the administrator's changes; nothing if there was no administrator."""
    if evidence.administration is None:
        return []
    changes = [each for each in evidence.administration.changes if not each.action.startswith("GET ")]
    judged = _Judged(evidence)
    beyond, late = judged.admitted_beyond(), judged.wrong_limits()
    resets = [each for each in changes if isinstance(each.effect, ResetCounters) and each.is_made]
    return [
        Figure("changes", len(changes), _kinds(changes), None if changes else False),
        *percentiles("change", [(each.ended_at - each.sent_at) / 1000 for each in changes if each.is_made]),
        promise("admin failures", *_failures(evidence.administration.changes)),
        promise("audit", *_audit(evidence)),
        promise("admitted beyond", len(beyond), _of(len(evidence.stopped.calls), "calls", beyond)),
        promise("wrong limits", len(late), _of(judged.limits_told, "limits in refusals", late)),
        promise("wrong resets", sum(map(judged.is_wrong, resets)), f"of {len(resets):,} resets"),
        promise("unbalanced (changed)", judged.unbalanced(), "counters of the quotas that were changed"),
        promise("disabled users", judged.admitted_disabled(), "calls of users who were disabled"),
    ]


def _kinds(changes: Sequence[ChangeRecord]) -> str:
    kinds = Counter(each.action for each in changes if each.is_made)
    lost = sum(each.status is None for each in changes)
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common()) + f"; {lost:,} without an answer"


def _of(number: int, what: str, examples: Sequence[str]) -> str:
    return f"of {number:,} {what}" + "".join(f"; {each}" for each in examples[:3])


def _failures(changes: Sequence[ChangeRecord]) -> tuple[int, str]:
    """The answers that can't be explained, and a note with them."""

    def is_right(each: ChangeRecord) -> bool:
        if each.status is None:
            return each.disturbed
        return each.status < 400 or each.status == 503 or (each.status == 404 and _may_be_missing(each))

    wrong = Counter(f"{each.action} {each.status}" for each in changes if not is_right(each))
    away = sum(each.status == 503 for each in changes)
    note = f"of {len(changes):,} answers, {away:,} of them 503"
    return wrong.total(), note + "".join(f"; {count} {kind}" for kind, count in wrong.items())


def _may_be_missing(change: ChangeRecord) -> bool:
    return change.action == _MAY_BE_MISSING or change.action.startswith("GET ")


def _audit(evidence: Evidence) -> tuple[int, str]:
    """How many changes and rows have no counterpart. A change without an answer may have a row."""
    assert evidence.administration is not None
    changes = [each for each in evidence.administration.changes if not each.action.startswith("GET ")]
    rows = Counter((row.request_id, row.action) for row in evidence.administration.audit)
    answered = {(each.request_id, each.action): each for each in changes if each.status not in (None, 503)}
    missing = sum(each.is_made and rows[key] != 1 for key, each in answered.items())
    uncertain = [each for each in changes if each.status in (None, 503)]
    foreign = 0
    for row in evidence.administration.audit:
        change = answered.get((row.request_id, row.action))
        if change is not None:
            foreign += not change.is_made or not change.sent_at <= row.at <= change.ended_at
            continue
        made = [each for each in uncertain if each.action == row.action and each.sent_at <= row.at <= each.ended_at]
        foreign += not made
        uncertain = [each for each in uncertain if each is not next(iter(made), None)]
    return missing + foreign, f"{missing} changes without their row and {foreign} rows without their change"


@dataclass(frozen=True, slots=True)
class _Share:
    """What one call held and was charged of one counter: input, output and requests."""

    row: CallRow
    held: Amounts
    charge: Amounts
    is_certain: bool

    @property
    def ended_at(self) -> float:
        return float("inf") if self.row.ended_at is None else self.row.ended_at

    @property
    def charged_tokens(self) -> int:
        """The tokens that are charged for certain."""
        return self.charge[0] + self.charge[1] if self.is_certain and self.row.state != "open" else 0

    @property
    def held_tokens(self) -> int:
        """The tokens that it held from its admission on, at the least."""
        return self.held[0] + self.row.admitted_output(self.held[1])


class _History:
    """The calls of one counter, and the sums of them at an instant, which are never too high."""

    def __init__(self, shares: Sequence[_Share]) -> None:
        self.shares = shares
        certain = [each for each in shares if each.is_certain]
        ended = sorted(certain, key=lambda each: each.ended_at)
        begun = sorted(certain, key=lambda each: each.row.reserved_at)
        self._ended_at = [each.ended_at for each in ended]
        self._begun_at = [each.row.reserved_at for each in begun]
        self._charged = [0, *accumulate(each.charged_tokens for each in ended)]
        self._ended_held = [0, *accumulate(each.held_tokens for each in ended)]
        self._begun_held = [0, *accumulate(each.held_tokens for each in begun)]

    def used(self, after: float, before: float) -> int:
        """What the calls are charged that ended between these instants."""
        first, last = bisect_right(self._ended_at, after), bisect_left(self._ended_at, before)
        return self._charged[last] - self._charged[first] if last > first else 0

    def held(self, at: int) -> int:
        """What the calls held that had been admitted before this ms and had not ended in it."""
        return self._begun_held[bisect_left(self._begun_at, at)] - self._ended_held[bisect_right(self._ended_at, at)]


class _Judged:
    """The records of a run, by the counters of the quotas that were changed."""

    def __init__(self, evidence: Evidence) -> None:
        assert evidence.administration is not None
        self.limits_told = 0
        self._evidence = evidence
        self._timeline = Timeline(evidence.administration)
        self._resets = [
            each
            for each in evidence.administration.changes
            if isinstance(each.effect, ResetCounters) and each.may_be_made
        ]
        shares: dict[CounterKey, list[_Share]] = defaultdict(list)
        for row in evidence.stopped.calls:
            parts = charges_by_window(row.held, row.charge)
            for held, (_, charge) in zip(row.held, parts, strict=True):
                if held.counter[1] in DIGITS:
                    shares[held.counter].append(_Share(row, held.amount, charge, self._is_certain(row)))
        self._histories = {key: _History(each) for key, each in shares.items()}

    def admitted_beyond(self) -> list[str]:
        """What is wrong with each call that should not have been admitted, or not without being counted."""
        return [text for row in self._evidence.stopped.calls for text in self._wrong_of(row)]

    def wrong_limits(self) -> list[str]:
        """Each limit in a refusal that can't have been in force between the call and its answer."""
        wrong = []
        for record in self._evidence.clients:
            if record.refusal is None:
                continue
            user = self._evidence.users[record.user]
            for quota, limit in record.refusal.limits:
                if quota in DIGITS:
                    possible = self._timeline.limits(quota, user, record.began_at, record.ended_at)
                    self.limits_told += 1
                    if limit not in possible:
                        wrong.append(f"{record.tag} {quota} {limit:,} at {record.ended_at}")
        return wrong

    def is_wrong(self, reset: ChangeRecord) -> bool:
        """Whether the sum that a reset names is not what the calls since the reset before were charged."""
        effect = reset.effect
        assert isinstance(effect, ResetCounters)
        least = most = 0
        for key, history in self._histories.items():
            if not _is_of(effect, key):
                continue
            before = [each for each in self._resets if each.sent_at < reset.sent_at and _is_of(each.effect, key)]
            after = max((each.ended_at for each in before), default=float("-inf"))
            made = [each.sent_at for each in before if each.is_made]
            least += history.used(after, reset.sent_at)
            most += _most_used(history, max(made, default=float("-inf")), reset.ended_at)
        return not least <= (effect.used or 0) <= most

    def unbalanced(self) -> int:
        """The counters that differ from the sum of the calls that ended after their reset."""
        counters = self._evidence.stopped.counters
        return sum(not self._is_balanced(each) for each in counters if each.window[1] in DIGITS)

    def admitted_disabled(self) -> int:
        """The calls that were admitted when their user was disabled for certain."""
        return sum(
            not self._timeline.may_be_enabled(row.user, row.reserved_at, row.reserved_at)
            for row in self._evidence.stopped.calls
        )

    def _is_certain(self, row: CallRow) -> bool:
        """Whether its charge was never corrected: it was not open during a whole pause."""
        assert self._evidence.administration is not None
        ended_at = float("inf") if row.ended_at is None else row.ended_at
        return not any(
            row.reserved_at <= begin + 1000 and end <= ended_at
            for begin, end in self._evidence.administration.outages
        )

    def _wrong_of(self, row: CallRow) -> Iterator[str]:
        at = row.reserved_at
        held = {each.counter[1]: each for each in reversed(row.held)}
        for quota, digits in DIGITS.items():
            possible = self._timeline.limits(quota, row.user, at, at)
            if quota not in held:
                if row.tag[-1:] in digits and None not in possible:
                    yield f"{row.tag} at {at}: not counted by {quota}"
                continue
            limit = max((each for each in possible if each is not None), default=-1)
            own = held[quota].amount[0] + row.admitted_output(held[quota].amount[1])
            before = self._before(held[quota].counter, at)
            if before + own > limit:
                yield f"{row.tag} at {at}: {before:,} + {own:,} of {limit:,} of {quota}"

    def _before(self, key: CounterKey, at: int) -> int:
        """What was used and held of a counter before this ms, at the least."""
        resets = [each.ended_at for each in self._resets if each.sent_at <= at and _is_of(each.effect, key)]
        history = self._histories[key]
        return history.used(max(resets, default=float("-inf")), at) + history.held(at)

    def _is_balanced(self, counter: CounterRow) -> bool:
        history = self._histories.get((counter.window[0], counter.window[1]))
        shares = history.shares if history else ()
        for position in range(3):
            least = most = held = 0
            for each in shares:
                if each.row.state == "open":
                    held += each.held[position]
                    continue
                amount = each.charge[position]
                most += max(amount, each.held[position]) if not each.is_certain else 0
                least += amount if each.is_certain and each.ended_at > counter.reset_at else 0
                most += amount if each.is_certain and each.ended_at >= counter.reset_at else 0
            if not least <= counter.used[position] <= most or counter.held[position] != held:
                return False
        return True


def _is_of(effect: object, key: CounterKey) -> bool:
    """Whether a reset empties this counter."""
    if not isinstance(effect, ResetCounters) or effect.quota != key[1]:
        return False
    return effect.user is None or effect.quota == POT or key[0] == f"user:{effect.user}"


def _most_used(history: _History, after: float, before: float) -> int:
    """The most that the calls can have been charged that ended between these instants, both included."""
    certain = sum(each.charged_tokens for each in history.shares if after <= each.ended_at <= before)
    uncertain = (each for each in history.shares if not each.is_certain and each.row.reserved_at <= before)
    return certain + sum(max(sum(each.charge[:2]), sum(each.held[:2])) for each in uncertain)
