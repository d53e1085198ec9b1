"""The operations of the ledger on plain values: reserve, extend, settle, release and expire.

The store loads the counters and entries that a batch touches into a `Book`, applies the operations in order, and
writes what changed. Each operation is applied as a whole or not at all, and repeating one changes nothing.

A call belongs to the window in which it was reserved: a held amount names that window. If the counter has moved on to
the next window before the call ends, the end is written to the entry only. If an answer grows after the window has
closed, the increase is held in the window that is open then, as a second held amount of the same counter. At the end
each held amount is charged up to what it holds, and the last one the rest. Example:

    11:59  reserve 100 tokens          held in the window that ends at 12:00: 100
    12:01  extend to 150 tokens        held in the next window:                50
    12:02  settle with 130 tokens      charged to the first window: 100, to the second: 30

This module is pure: no I/O and no clock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from proxy.ledger.entry import CallLabels, Entry, HeldAmount, Outcome, State, is_recordable
from proxy.policy.admission import (
    HoldIncrease,
    NeedsCount,
    NotAdmitted,
    Verdict,
    current_counters,
    decide_on,
    increase_hold,
)
from proxy.policy.amounts import NO_AMOUNT, TOKENS_MAX, Amount, AtLeast, Tokens, Usage, charge_of
from proxy.policy.binding import Binding
from proxy.policy.quota import Counter, CounterKey, Demand, Quota, counter_at

# --------------------------------------------------------------------------------------------------------- operations

# Numbers and texts are checked when an operation is built. A batch holds the operations of up to 256 callers in one
# transaction: a number that does not fit into the database's 64 bits, or a zero byte, would fail all of them.
#
# The operations and replies of each call are values, and never changed. They are not declared frozen, because making
# one would take four times as long.


@dataclass(slots=True)
class Reserve:
    """Admit a call if its quotas have room. Repeating it with the same `id` returns the entry that is there.

    Raises ValueError for a demand that is negative or above `TOKENS_MAX`, and for a label that is not recordable.
    """

    id: str
    owner: str
    labels: CallLabels
    binding: Binding
    demand: Demand

    def __post_init__(self) -> None:
        demand, labels = self.demand, self.labels
        if not 0 <= demand.input <= TOKENS_MAX or not 0 <= demand.output_maximum <= TOKENS_MAX:
            raise ValueError(f"a demand of {demand.input} + {demand.output_maximum} tokens is beyond all bounds")
        if not is_recordable(*labels):
            [text, *_] = (text for text in labels if not is_recordable(text))
            raise ValueError(f"not fit for the ledger: {text[:80]!r}")


@dataclass(frozen=True, slots=True)
class Extend:
    """Raise the hold of a call in flight to `output` tokens in total, or to as many as there is room for.

    With less than `least` tokens in total the call cannot continue, and the reply's verdict says why. `input` lowers
    the hold for an input that turned out to be smaller. `binding` is the one with which the call was reserved; its
    grants count as long as they run. All numbers are totals, so repeating an Extend changes nothing. Example at a
    hold of 200 tokens: "extend to 400" applied twice gives 400; "extend by 200" applied twice would give 600.

    Raises ValueError for a number that is negative or above `TOKENS_MAX`, and for a `least` above `output`.
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


@dataclass(slots=True)
class Settle:
    """Charge what a call used, and free the rest of its hold.

    `upstream` is the upstream that had the call; None: the one that the entry names. `response_id` is the id of the
    response that the upstream stored. Raises ValueError for a usage that is negative or above `TOKENS_MAX`.
    """

    id: str
    usage: Usage
    outcome: Outcome
    upstream: str | None = None
    response_id: str | None = None

    def __post_init__(self) -> None:
        charge = charge_of(self.usage)
        if min(charge) < 0 or max(charge) > TOKENS_MAX:
            raise ValueError(f"a usage of {charge.input} + {charge.output} tokens is beyond all bounds")


@dataclass(frozen=True, slots=True)
class Release:
    """Free the whole hold and charge nothing: nothing was generated, and the user is not at fault."""

    id: str
    outcome: Outcome = "upstream_failed"
    upstream: str | None = None


@dataclass(frozen=True, slots=True)
class Expire:
    """Charge the whole hold: the process that ran the call has died, or its lease has run out."""

    id: str


@dataclass(frozen=True, slots=True)
class Restore:
    """Put back an open entry that the database has lost, with what it holds. If the entry is there, nothing changes.

    After a failover with asynchronous replication the reservation of a call in flight may be missing. `counters` are
    those of the call when it was reserved or extended last. A window that is missing too begins with nothing used.
    """

    entry: Entry
    counters: Mapping[CounterKey, Counter]

    @property
    def id(self) -> str:
        """The id of the entry."""
        return self.entry.id


Operation = Reserve | Extend | Settle | Release | Expire | Restore

# ------------------------------------------------------------------------------------------------------------ replies


@dataclass(slots=True)
class Accepted:
    """The entry after the operation, and the counters of its quotas.

    `verdict` is the verdict on an Extend: if less than its `least` is held, it says why. `freed` are the counters on
    which this operation lowered what is held; calls that wait for room on them try again. `decided_at` is the
    instant of the decision (ms), by the clock that decided: the database's, if its processes share one.
    """

    entry: Entry
    counters: Mapping[CounterKey, Counter]
    verdict: Verdict = Verdict.ALLOW
    freed: frozenset[CounterKey] = field(default=frozenset(), compare=False)
    decided_at: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Refused:
    """The call was refused. No entry was made, and no counter was charged.

    `decided_at` is the instant of the decision, as in `Accepted`. What the client is told about the refusal is
    computed for that instant.
    """

    decision: NotAdmitted
    counters: Mapping[CounterKey, Counter]
    decided_at: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """There is no entry with this id: it was never reserved, or was deleted since. Nothing changed."""

    id: str


Reply = Accepted | Refused | NeedsCount | Unknown

# --------------------------------------------------------------------------------------------------------------- book


class Book:
    """The counters and entries that one batch touches.

    It changes the dictionaries that it is given, but none of their values. `counters_changed` and `entries_changed`
    name what has to be written. A counter without a row is missing, or None.
    """

    def __init__(self, counters: dict[CounterKey, Counter | None], entries: dict[str, Entry], now: int) -> None:
        self.counters = counters
        self.entries = entries
        self.counters_changed: dict[CounterKey, Counter] = {}
        self.entries_changed: dict[str, Entry] = {}
        self._now = now

    def apply(self, operation: Operation) -> Reply:
        """Apply one operation, and return the state after it."""
        match operation:
            case Reserve():
                return self._reserve(operation)
            case Settle():
                return self._end(operation, "settled", operation.usage, operation.outcome)
            case Extend():
                return self._extend(operation)
            case Release():
                return self._end(operation, "released", None, operation.outcome)
            case Restore():
                return self._restore(operation)
            case _:
                return self._end(operation, "expired", None, "lost")

    def _reserve(self, operation: Reserve) -> Reply:
        binding, now = operation.binding, self._now
        keys = binding.keys()
        if entry := self.entries.get(operation.id):
            return Accepted(entry, self._counters_of(keys), decided_at=now)
        current = current_counters(binding, self.counters, now)
        # Open windows that `counter_at` has shortened, because they ended later than one that opens now, are stored,
        # also if the call is refused. Otherwise their end would be computed anew for each call, and would be later
        # each time. Example: `per: year` becomes `6h`. The first call after that is refused at 12:00 until 18:00.
        # Without the stored end, a call that is refused at 13:00 would get the reset time 19:00, and one that is
        # refused at 14:00 would get 20:00.
        for key, counter in zip(keys, current, strict=True):
            stored = self.counters.get(key)
            # A window that has ended is not replaced: a call that is refused must not open the next one.
            if counter is not stored and stored is not None and counter.is_open:
                self.counters[key] = self.counters_changed[key] = counter
        decision = decide_on(operation.demand, binding, current, now)
        if isinstance(decision, NeedsCount):
            return decision
        if isinstance(decision, NotAdmitted):
            return Refused(decision, self._counters_of(keys), now)
        held_amounts = []
        for key, _, counter, amount in decision.holds:
            self._put_counter(key, counter, counter.used, counter.held + amount)
            held_amounts.append(HeldAmount(key, counter.window.opened_at, amount))
        entry = Entry(
            operation.id,
            operation.owner,
            operation.labels,
            decision.admitted_via,
            now,
            decision.hold,
            decision.maximum,
            tuple(held_amounts),
            decision.capped_by.id if decision.capped_by else None,
            tuple([quota.id for quota in decision.would_refuse]),
        )
        self.entries[entry.id] = self.entries_changed[entry.id] = entry
        return Accepted(entry, self._counters_of(keys), decided_at=now)

    def _extend(self, operation: Extend) -> Reply:
        entry = self.entries.get(operation.id)
        if entry is None:
            return Unknown(operation.id)
        if entry.state != "open":
            return self._unchanged(entry)
        # The input is lowered first: what it frees is room for the output of the same call.
        lowered = max(0, entry.hold.input - operation.input)
        held_amounts = [
            self._change_held(held, Amount(-min(lowered, held.amount.input))) for held in entry.held_amounts
        ]
        freed = {
            held.key for held, before in zip(held_amounts, entry.held_amounts, strict=True) if held is not before
        }
        binding = operation.binding.at(self._now)
        at = {quota.id: self._counter_of_call(key, quota) for key, quota in _held_quotas(entry, binding).items()}
        increase = increase_hold(
            max(0, operation.output - entry.hold.output),
            max(0, operation.least - entry.hold.output),
            binding,
            admitted_via=entry.admitted_via,
            own={quota_id: _held_in_window(held_amounts, quota_id, counter) for quota_id, counter in at.items()},
            current=at,
        )
        if increase.not_increased:
            held_amounts = self._free_not_increased(held_amounts, increase)
            freed.update(quota.key_for(binding.user) for quota in increase.not_increased)
        self._raise_output(held_amounts, increase)
        hold = entry.hold + Amount(-lowered, increase.output)
        extended = replace(entry, hold=hold, held_amounts=tuple(held_amounts))
        self.entries[extended.id] = self.entries_changed[extended.id] = extended
        return Accepted(extended, self._counters_of(_keys(extended)), increase.verdict, frozenset(freed), self._now)

    def _free_not_increased(self, held_amounts: Sequence[HeldAmount], increase: HoldIncrease) -> list[HeldAmount]:
        """Free what is held of the quotas that cannot carry the increase and that did not admit the call."""
        ids = {quota.id for quota in increase.not_increased}
        kept = []
        for held in held_amounts:
            if held.key[1] in ids:
                self._change_held(held, NO_AMOUNT - held.amount)
            else:
                kept.append(held)
        return kept

    def _raise_output(self, held_amounts: list[HeldAmount], increase: HoldIncrease) -> None:
        """Hold more output, of each counter in the window that is open now."""
        windows = {(held.key, held.opened_at): index for index, held in enumerate(held_amounts)}
        for hold in increase.holds:
            opened_at = hold.counter.window.opened_at
            index = windows.get((hold.key, opened_at))
            if index is not None:
                held_amounts[index] = self._change_held(held_amounts[index], hold.amount)
            elif hold.amount:  # an increase of 0 must not open the next window
                self._put_counter(hold.key, hold.counter, hold.counter.used, hold.counter.held + hold.amount)
                held_amounts.append(HeldAmount(hold.key, opened_at, hold.amount))

    def _change_held(self, held: HeldAmount, change: Amount) -> HeldAmount:
        """Raise or lower a held amount, and its counter too, unless that window has closed."""
        if not change:
            return held
        self._change_counter(held, NO_AMOUNT, NO_AMOUNT - change)
        return HeldAmount(held.key, held.opened_at, held.amount + change)

    def _end(
        self, operation: Settle | Release | Expire, state: State, usage: Usage | None, outcome: Outcome
    ) -> Reply:
        entry = self.entries.get(operation.id)
        if entry is None:
            return Unknown(operation.id)
        is_open = entry.state == "open"
        if not is_open and not (entry.state == "expired" and state == "settled"):
            return self._unchanged(entry)
        if state == "expired":
            usage = AtLeast(Tokens(entry.hold.input, entry.hold.output))
        charge = split_charge(entry.held_amounts, charge_of(usage) if usage is not None else NO_AMOUNT)
        if is_open:
            for held, used in zip(entry.held_amounts, charge, strict=True):
                self._change_counter(held, used, held.amount)
        else:
            self._correct_charge(entry, charge)
        labels = entry.labels
        upstream = None if isinstance(operation, Expire) else operation.upstream
        ended = Entry(
            entry.id,
            entry.owner,
            # The address is forgotten.
            CallLabels(
                *(labels.user, labels.model, labels.endpoint, upstream or labels.upstream, labels.key_id, labels.tag)
            ),
            entry.admitted_via,
            entry.reserved_at,
            entry.hold,
            entry.maximum,
            entry.held_amounts,
            entry.capped_by,
            entry.would_refuse,
            state,
            self._now,
            usage,
            outcome,
            operation.response_id if isinstance(operation, Settle) else None,
        )
        self.entries[ended.id] = self.entries_changed[ended.id] = ended
        keys = _keys(ended)
        return Accepted(ended, self._counters_of(keys), Verdict.ALLOW, frozenset(keys if is_open else ()), self._now)

    def _correct_charge(self, entry: Entry, charge: Sequence[Amount]) -> None:
        """Add the difference to what an expired call was charged.

        Example: it was charged its hold, 100 + 400. Its process comes back and settles 90 + 60, so the counter
        changes by -10 and -340.
        """
        assert entry.usage is not None, "an expired call was charged"
        charged = split_charge(entry.held_amounts, charge_of(entry.usage))
        for held, before, after in zip(entry.held_amounts, charged, charge, strict=True):
            if not self._was_reset_since_end(entry, held):
                self._change_counter(held, after - before, NO_AMOUNT)

    def _restore(self, operation: Restore) -> Reply:
        entry = operation.entry
        if kept := self.entries.get(entry.id):
            return self._unchanged(kept)
        for held in entry.held_amounts:
            current, lost = self.counters.get(held.key), operation.counters.get(held.key)
            is_open = current is not None and current.is_open and current.window.is_open(self._now)
            if not is_open and lost is not None and lost.window.is_open(self._now):
                self.counters[held.key] = self.counters_changed[held.key] = Counter(lost.window)
            self._change_counter(held, NO_AMOUNT, NO_AMOUNT - held.amount)
        self.entries[entry.id] = self.entries_changed[entry.id] = entry
        return self._unchanged(entry)

    def _was_reset_since_end(self, entry: Entry, held: HeldAmount) -> bool:
        """Whether the counter was reset after the call had expired.

        It does not contain the charge any more, so there is nothing to correct. Example: a call expired and was
        charged 500 tokens, and the counter was reset. When the call settles with 150, the counter must not become
        -350.
        """
        counter = self.counters.get(held.key)
        return entry.ended_at is not None and counter is not None and counter.was_reset_since(entry.ended_at)

    def _change_counter(self, of: HeldAmount, used: Amount, freed: Amount) -> None:
        """Add to what the counter of a held amount has used, and subtract from what it holds."""
        counter = self.counters.get(of.key)
        if counter is None:
            return  # an operator has deleted the counter: only the entry has the usage
        if counter.window.opened_at != of.opened_at:
            # The next window has opened, so only the entry has the usage. What the call holds of concurrent
            # quantities was carried into that window.
            used, freed = NO_AMOUNT, freed.concurrent_part()
            if freed == NO_AMOUNT:
                return
        used = counter.used + used
        if min(used) < 0:
            # More can be subtracted than is used if the clock was set back between the end of a call and the reset of
            # its counter: then the charge of an expired call seems to be in the counter still.
            used = used.at_least_0()
        self._put_counter(of.key, counter, used, counter.held - freed)

    def _put_counter(self, key: CounterKey, counter: Counter, used: Amount, held: Amount) -> None:
        """Put this counter with what is used and held of it now."""
        changed = Counter(counter.window, used, held, counter.reset_at)
        self.counters[key] = self.counters_changed[key] = changed

    def _counter_of_call(self, key: CounterKey, quota: Quota) -> Counter:
        """The counter for a call in flight, whose rule may be older than the window.

        So it does not shorten an open one. Example: a call of `per: minute` is in flight when that becomes `year`.
        The next minute another call opens the year. If the answer of the first call grows, the year must not end with
        the minute.
        """
        counter = self.counters.get(key)
        if counter is not None and counter.is_open and counter.window.is_open(self._now):
            return counter
        return counter_at(self._now, quota, counter)

    def _unchanged(self, entry: Entry) -> Accepted:
        """The reply to an operation that changes nothing, or that was the first one of its call."""
        return Accepted(entry, self._counters_of(_keys(entry)), decided_at=self._now)

    def _counters_of(self, keys: Sequence[CounterKey]) -> dict[CounterKey, Counter]:
        found = {}
        for key in keys:
            counter = self.counters.get(key)
            if counter is not None:
                found[key] = counter
        return found


def split_charge(held_amounts: tuple[HeldAmount, ...], charge: Amount) -> list[Amount]:
    """What each held amount is charged. Every counter is charged the whole of `charge` once.

    Of several held amounts of one counter, each is charged up to what it holds, in the order of their windows, and
    the last one the rest. Example: a call holds 100 + 50 tokens of its daily quota, in two windows, and 150 of its
    monthly one. It used 170. The daily windows are charged 100 and 70, the monthly one 170.
    """
    last = {}
    for index, held in enumerate(held_amounts):
        last[held.key] = index
    if len(last) == len(held_amounts):  # almost always: one window of each counter
        return [charge] * len(held_amounts)
    rests: dict[CounterKey, Amount] = {}
    parts = []
    for index, held in enumerate(held_amounts):
        rest = rests.get(held.key, charge)
        part = rest if last[held.key] == index else rest.at_most(held.amount)
        rests[held.key] = rest - part
        parts.append(part)
    return parts


def _keys(entry: Entry) -> list[CounterKey]:
    return [held.key for held in entry.held_amounts]


def _held_quotas(entry: Entry, binding: Binding) -> dict[CounterKey, Quota]:
    """The quotas of which a call holds something, by the keys of their counters."""
    held = set(_keys(entry))
    return {key: quota for quota in binding.quotas if (key := quota.key_for(binding.user)) in held}


def _held_in_window(held_amounts: Sequence[HeldAmount], quota_id: str, counter: Counter) -> Amount:
    """What the call itself holds of a counter in the window that is open now."""
    window = (quota_id, counter.window.opened_at)
    return sum((held.amount for held in held_amounts if (held.key[1], held.opened_at) == window), NO_AMOUNT)
