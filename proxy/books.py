"""The four acts of the ledger on plain values: reserve, settle, release, expire.

Each call has one entry in the books. While the call is in flight the entry is its reservation; afterwards it is
its usage record. So a reservation ends exactly once by construction, and a repeated act finds that it was done:

    (none) ── reserve ──▶ open ── settle ───▶ settled
                           ├──── release ──▶ released
                           └──── expire ───▶ expired ── settle, once ──▶ settled

Expired means that the process which held it was given up for dead: it is charged what was to be charged if it
was lost. Should that process come back, settling books the difference. Any other act on an ended entry changes
nothing and answers with the entry as it is.

A line of an entry remembers the window of the counter it was reserved in; once that window has closed, settling
writes the entry only. Pure: the ledger loads what a batch touches, applies it here, and writes what changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from proxy.quotas import Admitted, Binding, Counter, CounterKey, Demand, Refused, decide
from proxy.usage import NOTHING, TOKENS_MAX, Amount, AtLeast, Tokens, Usage, charge_of

State = Literal["open", "settled", "released", "expired"]

# How a call ended, as its record says it.
Outcome = Literal[
    "complete",  # the whole answer went by
    "client_left",  # the client went before the end
    "upstream_broke",  # the upstream broke or fell silent after the call was sent
    "rejected",  # the upstream called the request bad (4xx)
    "upstream_failed",  # the upstream failed, refused our key, or could not be reached: nothing is charged
    "proxy_broke",  # a mistake of ours ended it
    "stopped",  # the proxy was stopped while it ran
    "lost",  # the proxy died, or was taken to be dead
]


@dataclass(frozen=True, slots=True)
class Line:
    """What a call holds of one counter, while open; which counter it was charged to, afterwards."""

    key: CounterKey
    opened_at: int
    amount: Amount


@dataclass(frozen=True, slots=True)
class Facts:
    """Who called what: the part of an entry that is known before it is let in."""

    user: str
    model: str
    endpoint: str
    upstream: str

    def __post_init__(self) -> None:
        for text in (self.user, self.model, self.endpoint, self.upstream):
            if len(text) > 512 or "\0" in text or not text.isprintable():
                raise ValueError(f"not fit for the books: {text[:80]!r}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One call in the books. Instants in ms; `hold` is the most it may use; `tokens` what it did use."""

    id: str
    owner: str
    facts: Facts
    through: str
    reserved_at: int
    hold: Amount
    charge_if_lost: Tokens
    lines: tuple[Line, ...]
    capped_by: str | None = None
    would_refuse: tuple[str, ...] = ()
    state: State = "open"
    ended_at: int | None = None
    usage: Usage | None = None
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Reserve:
    """Let a call in if its quotas have room. `id` makes repeating it harmless."""

    id: str
    owner: str
    facts: Facts
    binding: Binding
    demand: Demand

    def __post_init__(self) -> None:
        if not 0 <= self.demand.input <= TOKENS_MAX or not 0 <= self.demand.want <= TOKENS_MAX:
            raise ValueError(f"a demand of {self.demand.input} + {self.demand.want} tokens is beyond all bounds")


@dataclass(frozen=True, slots=True)
class Settle:
    """Charge what a call did use and give the rest back."""

    id: str
    usage: Usage
    outcome: Outcome

    def __post_init__(self) -> None:
        charge = charge_of(self.usage)
        if not all(0 <= part <= TOKENS_MAX for part in (charge.input, charge.output, charge.requests)):
            raise ValueError(f"a usage of {charge.input} + {charge.output} tokens is beyond all bounds")


@dataclass(frozen=True, slots=True)
class Release:
    """Give everything back: nothing was generated, and not by the user's fault."""

    id: str
    outcome: Outcome = "upstream_failed"


@dataclass(frozen=True, slots=True)
class Expire:
    """Charge what a lost call is charged: its process is taken to be dead."""

    id: str


Act = Reserve | Settle | Release | Expire


@dataclass(frozen=True, slots=True)
class Booked:
    """The entry after the act, and how the counters stand that it looked at."""

    entry: Entry
    counters: Mapping[CounterKey, Counter]


@dataclass(frozen=True, slots=True)
class NotBooked:
    """The call was refused. Nothing changed."""

    refused: Refused
    counters: Mapping[CounterKey, Counter]


@dataclass(frozen=True, slots=True)
class Unknown:
    """There is no such entry: it was never reserved, or has been deleted since. Nothing changed."""

    id: str


Reply = Booked | NotBooked | Unknown


class Books:
    """The counters and entries that one batch touches. Acts are applied in order, each wholly or not at all.

    `counters_changed` and `entries_changed` name what has to be written.
    """

    def __init__(self, counters: Mapping[CounterKey, Counter], entries: Mapping[str, Entry], now: int) -> None:
        self.counters = dict(counters)
        self.entries = dict(entries)
        self.counters_changed: set[CounterKey] = set()
        self.entries_changed: set[str] = set()
        self._now = now

    def apply(self, act: Act) -> Reply:
        """Do one act and say how things stand after it."""
        match act:
            case Reserve():
                return self._reserve(act)
            case Settle():
                return self._end(act.id, "settled", act.usage, act.outcome)
            case Release():
                return self._end(act.id, "released", None, act.outcome)
            case _:
                return self._end(act.id, "expired", None, "lost")

    def _reserve(self, act: Reserve) -> Reply:
        keys = act.binding.keys()
        if booked := self.entries.get(act.id):
            return Booked(booked, self._standing(keys))
        decision = decide(act.demand, act.binding, self.counters, self._now)
        if isinstance(decision, Refused):
            return NotBooked(decision, self._standing(keys))
        entry = _opened(act, decision, self._now)
        for hold in decision.holds:
            held = replace(hold.counter, held=hold.counter.held + hold.amount)
            self._put(hold.quota.key_for(act.binding.user), held)
        self.entries[act.id] = entry
        self.entries_changed.add(act.id)
        return Booked(entry, self._standing(keys))

    def _end(self, entry_id: str, state: State, usage: Usage | None, outcome: Outcome) -> Reply:
        entry = self.entries.get(entry_id)
        if entry is None:
            return Unknown(entry_id)
        keys = [line.key for line in entry.lines]
        if entry.state != "open" and not (entry.state == "expired" and state == "settled"):
            return Booked(entry, self._standing(keys))
        if state == "expired":
            usage = AtLeast(entry.charge_if_lost)
        ended = replace(entry, state=state, ended_at=self._now, usage=usage, outcome=outcome)
        for line in entry.lines:
            self._give_back(line, was=entry.usage, held=entry.state == "open", now_used=usage)
        self.entries[entry_id] = ended
        self.entries_changed.add(entry_id)
        return Booked(ended, self._standing(keys))

    def _give_back(self, line: Line, *, was: Usage | None, held: bool, now_used: Usage | None) -> None:
        counter = self.counters.get(line.key)
        if counter is None or counter.window.opened_at != line.opened_at:
            return  # its window has closed, or the counter was reset: the entry keeps the record
        if held:
            counter = replace(counter, held=counter.held - line.amount)
        charged = _charged(now_used) - _charged(was)
        self._put(line.key, replace(counter, used=counter.used + charged))

    def _put(self, key: CounterKey, counter: Counter) -> None:
        self.counters[key] = counter
        self.counters_changed.add(key)

    def _standing(self, keys: list[CounterKey]) -> dict[CounterKey, Counter]:
        return {key: counter for key in keys if (counter := self.counters.get(key)) is not None}


def _opened(act: Reserve, admitted: Admitted, now: int) -> Entry:
    # Until a call can say how far it got, the whole of its hold is what it may have cost.
    lost = Tokens(admitted.hold.input, admitted.hold.output)
    return Entry(
        id=act.id,
        owner=act.owner,
        facts=act.facts,
        through=admitted.through,
        reserved_at=now,
        hold=admitted.hold,
        charge_if_lost=lost,
        lines=tuple(
            Line(hold.quota.key_for(act.binding.user), hold.counter.window.opened_at, hold.amount)
            for hold in admitted.holds
        ),
        capped_by=admitted.capped_by.id if admitted.capped_by else None,
        would_refuse=tuple(quota.id for quota in admitted.would_refuse),
    )


def _charged(usage: Usage | None) -> Amount:
    return charge_of(usage) if usage else NOTHING
