"""The operations of the ledger on plain values: reserve, extend, settle, release, expire.

The store loads what a batch touches, applies the operations here, and writes what changed. Each operation is applied
whole or not at all, and repeating one is harmless.

A held amount remembers the window of the counter that it was reserved in; once that window has closed, settling
writes the entry only. An answer that grows past the end of a window holds its increase in the window that is open then,
as a second held amount of the same counter: each is charged up to what it holds, and the last one the rest. Example:
a call reserved at 11:59 holds 100 tokens in the window that ends at 12:00 and, at 12:01, 50 more in the next one. It
used 130 tokens: 100 are charged to the first window, if it is still known, and 30 to the second. Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from proxy.ledger.entry import CallLabels, Entry, HeldAmount, Outcome, State
from proxy.policy.admission import (
    Admitted,
    Hold,
    HoldIncrease,
    NeedsCount,
    NotAdmitted,
    Verdict,
    decide,
    increase_hold,
)
from proxy.policy.amounts import NOTHING, TOKENS_MAX, Amount, AtLeast, Tokens, Usage, charge_of
from proxy.policy.quota import Binding, Counter, CounterKey, Demand, Quota, counter_at


@dataclass(frozen=True, slots=True)
class Reserve:
    """Let a call in if its quotas have room. `id` makes repeating it harmless."""

    id: str
    owner: str
    labels: CallLabels
    binding: Binding
    demand: Demand

    def __post_init__(self) -> None:
        if not 0 <= self.demand.input <= TOKENS_MAX or not 0 <= self.demand.output_maximum <= TOKENS_MAX:
            raise ValueError(
                f"a demand of {self.demand.input} + {self.demand.output_maximum} tokens is beyond all bounds"
            )


@dataclass(frozen=True, slots=True)
class Extend:
    """Hold so much in all for a call in flight: `output` tokens, or as many as there is room for.

    Less than `least` is too little to go on. `input` gives back what was held for an input that turned out smaller.
    `binding` is the one with which it was reserved. Absolute numbers, so repeating it is harmless.
    """

    id: str
    binding: Binding
    input: int
    output: int
    least: int

    def __post_init__(self) -> None:
        if not all(0 <= tokens <= TOKENS_MAX for tokens in (self.input, self.output, self.least)):
            raise ValueError(f"a hold of {self.input} + {self.output} tokens is beyond all bounds")
        if self.least > self.output:
            raise ValueError(f"{self.least} tokens at the least are more than the {self.output} asked for")


@dataclass(frozen=True, slots=True)
class Settle:
    """Charge what a call used, at `upstream` (None: where it was to go), and free the rest; it made `response_id`."""

    id: str
    usage: Usage
    outcome: Outcome
    upstream: str | None = None
    response_id: str | None = None

    def __post_init__(self) -> None:
        charge = charge_of(self.usage)
        if not all(0 <= part <= TOKENS_MAX for part in (charge.input, charge.output, charge.requests)):
            raise ValueError(f"a usage of {charge.input} + {charge.output} tokens is beyond all bounds")


@dataclass(frozen=True, slots=True)
class Release:
    """Give everything back: nothing was generated, and not by the user's fault."""

    id: str
    outcome: Outcome = "upstream_failed"
    upstream: str | None = None


@dataclass(frozen=True, slots=True)
class Expire:
    """Charge all that a call holds: its process is taken to be dead."""

    id: str


Operation = Reserve | Extend | Settle | Release | Expire


@dataclass(frozen=True, slots=True)
class Accepted:
    """The entry after the act, and how the counters stand that it looked at.

    `verdict` says of an Extend why less is held than the least that was asked for. `freed` are the counters on which
    this very act gave back what was held.
    """

    entry: Entry
    counters: Mapping[CounterKey, Counter]
    verdict: Verdict = Verdict.ALLOW
    freed: frozenset[CounterKey] = field(default=frozenset(), compare=False)


@dataclass(frozen=True, slots=True)
class Refused:
    """The call was refused. Nothing changed."""

    decision: NotAdmitted
    counters: Mapping[CounterKey, Counter]


@dataclass(frozen=True, slots=True)
class Unknown:
    """There is no such entry: it was never reserved, or has been deleted since. Nothing changed."""

    id: str


Reply = Accepted | Refused | NeedsCount | Unknown


class Book:
    """The counters and entries that one batch touches. Acts are applied in order, each wholly or not at all.

    `counters_changed` and `entries_changed` name what has to be written.
    """

    def __init__(self, counters: Mapping[CounterKey, Counter], entries: Mapping[str, Entry], now: int) -> None:
        self.counters = dict(counters)
        self.entries = dict(entries)
        self.counters_changed: set[CounterKey] = set()
        self.entries_changed: set[str] = set()
        self._now = now

    def apply(self, operation: Operation) -> Reply:
        """Do one act and say how things stand after it."""
        match operation:
            case Reserve():
                return self._reserve(operation)
            case Extend():
                return self._extend(operation)
            case Settle():
                return self._end(operation, "settled", operation.usage, operation.outcome)
            case Release():
                return self._end(operation, "released", None, operation.outcome)
            case _:
                return self._end(operation, "expired", None, "lost")

    def _reserve(self, operation: Reserve) -> Reply:
        keys = operation.binding.keys()
        if booked := self.entries.get(operation.id):
            return Accepted(booked, self._standing(keys))
        self._date_back(operation.binding)
        decision = decide(operation.demand, operation.binding, self.counters, self._now)
        if isinstance(decision, NeedsCount):
            return decision
        if isinstance(decision, NotAdmitted):
            return Refused(decision, self._standing(keys))
        entry = _opened(operation, decision, self._now)
        for hold in decision.holds:
            self._put(hold.quota.key_for(operation.binding.user), _holding(hold))
        self._note(entry)
        return Accepted(entry, self._standing(keys))

    def _date_back(self, binding: Binding) -> None:
        """Note when windows end that a clock ahead of its time has opened, also for a call that is refused.

        Else who comes again later would be told a later end each time.
        """
        for quota in binding.quotas:
            key = quota.key_for(binding.user)
            counter = self.counters.get(key)
            if counter is not None and self._now < counter.window.opened_at:
                stands = self._at(key, quota)
                if stands.is_open:  # else it has ended, and who is refused opens no other
                    self._put(key, stands)

    def _extend(self, operation: Extend) -> Reply:
        entry = self.entries.get(operation.id)
        if entry is None:
            return Unknown(operation.id)
        if entry.state != "open":
            return Accepted(entry, self._standing(_keys(entry)))
        before, entry = entry, self._shrink(entry, max(0, entry.hold.input - operation.input))
        at = {quota.id: self._at(key, quota) for key, quota in _quotas(entry, operation.binding).items()}
        own = {quota_id: _held(entry, quota_id, counter) for quota_id, counter in at.items()}
        increase = increase_hold(
            max(0, operation.output - entry.hold.output),
            max(0, operation.least - entry.hold.output),
            operation.binding,
            admitted_via=entry.admitted_via,
            own=own,
            current=at,
        )
        freed = {
            held_amount.key
            for held_amount, was in zip(entry.held_amounts, before.held_amounts, strict=True)
            if held_amount != was
        }
        freed.update(quota.key_for(operation.binding.user) for quota in increase.left_alone)
        entry = self._grow(self._leave_alone(entry, increase), operation.binding.user, increase)
        self._note(entry)
        return Accepted(entry, self._standing(_keys(entry)), increase.verdict, frozenset(freed))

    def _shrink(self, entry: Entry, tokens: int) -> Entry:
        """Give back what is held for an input that turned out to be so much smaller."""
        hold = replace(entry.hold, input=entry.hold.input - tokens)
        held_amounts = (
            self._hold(held_amount, Amount(-min(tokens, held_amount.amount.input)))
            for held_amount in entry.held_amounts
        )
        return replace(entry, hold=hold, held_amounts=tuple(held_amounts))

    def _leave_alone(self, entry: Entry, increase: HoldIncrease) -> Entry:
        """Give back what is held of quotas that need not carry this call and can't."""
        ids = {quota.id for quota in increase.left_alone}
        for held_amount in entry.held_amounts:
            if held_amount.key[1] in ids:
                self._hold(held_amount, NOTHING - held_amount.amount)
        return replace(
            entry,
            held_amounts=tuple(held_amount for held_amount in entry.held_amounts if held_amount.key[1] not in ids),
        )

    def _grow(self, entry: Entry, user: str, increase: HoldIncrease) -> Entry:
        """Hold more, each part in the window that is open now."""
        held_amounts = list(entry.held_amounts)
        for hold in increase.holds:
            key, opened_at = hold.quota.key_for(user), hold.counter.window.opened_at
            place = next(
                (
                    n
                    for n, held_amount in enumerate(held_amounts)
                    if (held_amount.key, held_amount.opened_at) == (key, opened_at)
                ),
                None,
            )
            if place is not None:
                held_amounts[place] = self._hold(held_amounts[place], hold.amount)
            elif hold.amount:
                self._put(key, _holding(hold))
                held_amounts.append(HeldAmount(key, opened_at, hold.amount))
        output = entry.hold.output + increase.output
        return replace(entry, hold=replace(entry.hold, output=output), held_amounts=tuple(held_amounts))

    def _hold(self, held_amount: HeldAmount, change: Amount) -> HeldAmount:
        """Let a line hold so much more, or less; its counter too, unless its window has closed."""
        counter = self.counters.get(held_amount.key)
        if change and counter is not None and counter.window.opened_at == held_amount.opened_at:
            self._put(held_amount.key, Counter(counter.window, counter.used, counter.held + change))
        return replace(held_amount, amount=held_amount.amount + change)

    def _at(self, key: CounterKey, quota: Quota) -> Counter:
        return counter_at(self._now, quota, self.counters.get(key))

    def _end(
        self, operation: Settle | Release | Expire, state: State, usage: Usage | None, outcome: Outcome
    ) -> Reply:
        entry = self.entries.get(operation.id)
        if entry is None:
            return Unknown(operation.id)
        if entry.state != "open" and not (entry.state == "expired" and state == "settled"):
            return Accepted(entry, self._standing(_keys(entry)))
        if state == "expired":
            usage = AtLeast(Tokens(entry.hold.input, entry.hold.output))
        was_held = frozenset(_keys(entry)) if entry.state == "open" else frozenset()
        before, after = (shares(entry.held_amounts, charge_of(of) if of else NOTHING) for of in (entry.usage, usage))
        for held_amount, was, now in zip(entry.held_amounts, before, after, strict=True):
            self._charge(held_amount, now - was, held=held_amount.amount if entry.state == "open" else NOTHING)
        if not isinstance(operation, Expire) and operation.upstream is not None:
            entry = replace(entry, labels=replace(entry.labels, upstream=operation.upstream))
        made = operation.response_id if isinstance(operation, Settle) else None
        entry = replace(entry, state=state, ended_at=self._now, usage=usage, outcome=outcome, response_id=made)
        self._note(entry)
        return Accepted(entry, self._standing(_keys(entry)), freed=was_held)

    def _charge(self, held_amount: HeldAmount, used: Amount, *, held: Amount) -> None:
        counter = self.counters.get(held_amount.key)
        if counter is None or counter.window.opened_at != held_amount.opened_at:
            return  # its window has closed, or the counter was reset: the entry keeps the record
        self._put(held_amount.key, Counter(counter.window, counter.used + used, counter.held - held))

    def _note(self, entry: Entry) -> None:
        self.entries[entry.id] = entry
        self.entries_changed.add(entry.id)

    def _put(self, key: CounterKey, counter: Counter) -> None:
        self.counters[key] = counter
        self.counters_changed.add(key)

    def _standing(self, keys: list[CounterKey]) -> dict[CounterKey, Counter]:
        return {key: counter for key in keys if (counter := self.counters.get(key)) is not None}


def shares(held_amounts: tuple[HeldAmount, ...], charge: Amount) -> list[Amount]:
    """What each line is charged of a call's usage: all of it, for each counter.

    Of several for one counter each is charged up to what it holds, in the order of windows, the last one the rest.
    """
    last = {held_amount.key: place for place, held_amount in enumerate(held_amounts)}
    if len(last) == len(held_amounts):
        return [charge] * len(held_amounts)
    left: dict[CounterKey, Amount] = {}
    parts = []
    for place, held_amount in enumerate(held_amounts):
        part = left.get(held_amount.key, charge)
        if last[held_amount.key] != place:
            part = part.at_most(held_amount.amount)
        left[held_amount.key] = left.get(held_amount.key, charge) - part
        parts.append(part)
    return parts


def _opened(operation: Reserve, admitted: Admitted, now: int) -> Entry:
    return Entry(
        id=operation.id,
        owner=operation.owner,
        labels=operation.labels,
        admitted_via=admitted.admitted_via,
        reserved_at=now,
        hold=admitted.hold,
        maximum=admitted.maximum,
        held_amounts=tuple(
            HeldAmount(hold.quota.key_for(operation.binding.user), hold.counter.window.opened_at, hold.amount)
            for hold in admitted.holds
        ),
        capped_by=admitted.capped_by.id if admitted.capped_by else None,
        would_refuse=tuple(quota.id for quota in admitted.would_refuse),
    )


def _holding(hold: Hold) -> Counter:
    return Counter(hold.counter.window, hold.counter.used, hold.counter.held + hold.amount)


def _keys(entry: Entry) -> list[CounterKey]:
    return [held_amount.key for held_amount in entry.held_amounts]


def _quotas(entry: Entry, binding: Binding) -> dict[CounterKey, Quota]:
    """The quotas that a call holds something of, by the keys of their counters."""
    held = set(_keys(entry))
    return {key: quota for quota in binding.quotas if (key := quota.key_for(binding.user)) in held}


def _held(entry: Entry, quota_id: str, counter: Counter) -> Amount:
    """What a call holds itself of a counter, in the window that is open now."""
    where = (quota_id, counter.window.opened_at)
    return sum(
        (
            held_amount.amount
            for held_amount in entry.held_amounts
            if (held_amount.key[1], held_amount.opened_at) == where
        ),
        NOTHING,
    )
