"""One call in the book: its reservation while it is in flight, its usage record afterwards.

So a call ends exactly once by construction, and a repeated operation finds that it was done:

    (none) ── reserve ──▶ open ── settle ───▶ settled
                          │ ▲ ├── release ──▶ released
                   extend └─┘ └── expire ───▶ expired ── settle, once ──▶ settled

Expired means that the process which held the reservation was taken for dead: the call is charged all that it held. If
that process comes back after all, its settle books the difference. Any other operation on an ended entry changes
nothing and is answered with the entry as it is. Pure.
"""

from dataclasses import dataclass
from typing import Literal

from proxy.policy.amounts import Amount, Usage
from proxy.policy.quota import CounterKey

State = Literal["open", "settled", "released", "expired"]

# How a call ended, as its record says it.
Outcome = Literal[
    "complete",  # the whole answer went by
    "client_left",  # the client went before the end
    "upstream_broke",  # the upstream broke or fell silent after the call was sent
    "rejected",  # the upstream called the request bad (4xx)
    "upstream_failed",  # the upstream failed, refused our key, or could not be reached: nothing is charged
    "proxy_broke",  # a mistake of ours ended it
    "at_limit",  # the proxy ended it, because no more of a quota was to be had
    "stopped",  # the proxy was stopped while it ran
    "lost",  # the proxy died, or was taken to be dead
]


@dataclass(frozen=True, slots=True)
class HeldAmount:
    """What a call holds of one counter, while open; which counter it was charged to, afterwards."""

    key: CounterKey
    opened_at: int
    amount: Amount


@dataclass(frozen=True, slots=True)
class CallLabels:
    """Who called what: the part of an entry that is known before it is let in."""

    user: str
    model: str
    endpoint: str
    upstream: str

    def __post_init__(self) -> None:
        for text in (self.user, self.model, self.endpoint, self.upstream):
            if len(text) > 512 or not text.isprintable():  # which "\0" is not either
                raise ValueError(f"not fit for the books: {text[:80]!r}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One call in the books. Instants in ms; `hold` is what it may use so far, `usage` what it did use.

    `maximum` is how many tokens its answer may come to have, where that is known: a stream's hold grows up to it.
    """

    id: str
    owner: str
    labels: CallLabels
    admitted_via: str
    reserved_at: int
    hold: Amount
    maximum: int | None
    held_amounts: tuple[HeldAmount, ...]
    capped_by: str | None = None
    would_refuse: tuple[str, ...] = ()
    state: State = "open"
    ended_at: int | None = None
    usage: Usage | None = None
    outcome: Outcome | None = None
    response_id: str | None = None  # by which its upstream keeps what it made

    @property
    def open_amounts(self) -> dict[tuple[CounterKey, int], Amount]:
        """What an open call holds, by counter and the instant at which its window opened; nothing once it has ended."""
        if self.state != "open":
            return {}
        return {(held.key, held.opened_at): held.amount for held in self.held_amounts}


def call_id_prefix(instant: int) -> str:
    """The beginning of the id of a call that arrives at this instant (ms), so that ids sort by time."""
    return f"req_{instant:012x}"
