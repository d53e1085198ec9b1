"""The ledger's entry of one call: a reservation while the call is in flight, its usage record afterwards.

An entry is in one of four states:

    (none) ── reserve ──▶ open ── settle ───▶ settled
                          │ ▲ ├── release ──▶ released
                   extend └─┘ └── expire ───▶ expired ── settle, once ──▶ settled

An entry ends once. An operation on an ended entry changes nothing and returns the entry as it is, so repeating an
operation is harmless.

The one exception is an expired entry. A call expires when the lease of its process has run out, and is charged its
full hold. If the process was only paused, it settles the call later. That settle corrects the charge, once.

This module is pure: no I/O and no clock.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from proxy.policy.amounts import Amount, Usage
from proxy.policy.quota import CounterKey

State = Literal["open", "settled", "released", "expired"]

# How a call ended, as its record says it.
Outcome = Literal[
    "complete",  # the whole answer passed
    "client_left",  # the client disconnected before the end
    "upstream_broke",  # the upstream broke off, or was silent for too long, after the call was sent
    "rejected",  # the upstream rejected the request (4xx)
    "upstream_failed",  # the upstream failed, refused our key, or could not be reached: nothing is charged
    "proxy_broke",  # an error of the proxy ended it
    "at_limit",  # the proxy ended it, because a quota had no more tokens for it
    "stopped",  # the proxy was stopped while the call ran, or an administrator cut off its key or user
    "lost",  # the proxy died, or its lease ran out
]


# The most characters of a label of a call.
_LABEL_MAX = 512


def is_recordable(*texts: str) -> bool:
    """Whether each text can be a label of a call. A zero byte and a lone surrogate are not printable either."""
    return max(map(len, texts)) <= _LABEL_MAX and "".join(texts).isprintable()


class HeldAmount(NamedTuple):
    """What an open call holds in one window of one counter. An ended call was charged to that window of that counter.

    `opened_at` (ms) names the window. A call has two held amounts of one counter if its hold grew in a later window
    than the one in which it was reserved.
    """

    key: CounterKey
    opened_at: int
    amount: Amount


class CallLabels(NamedTuple):
    """Who calls which model, at which endpoint and upstream: the part of an entry that is known before admission.

    `key_id` is the id of the key that the call carried, and `tag` a text for reports. `address` is where the call
    comes from; it is forgotten at its end. Each of these may be empty.
    """

    user: str
    model: str
    endpoint: str
    upstream: str
    key_id: str = ""
    tag: str = ""
    address: str = ""


@dataclass(slots=True)
class Entry:
    """One call in the ledger. Instants are in ms. It is a value, and never changed, like a `Counter`.

    `hold` is what the call may use so far. `maximum` is the largest number of tokens that its answer may have; the
    hold of a stream grows up to it. It is None if no maximum is known. `usage` is what the call used; it is None
    while the call is open, and if it was released.
    """

    id: str
    owner: str  # the process that runs the call
    labels: CallLabels
    admitted_via: str  # the group whose quotas admitted it
    reserved_at: int
    hold: Amount
    maximum: int | None
    held_amounts: tuple[HeldAmount, ...]
    capped_by: str | None = None  # the quota that lowered the maximum
    would_refuse: tuple[str, ...] = ()  # quotas with `enforce: shadow` that had no room for it
    state: State = "open"
    ended_at: int | None = None
    usage: Usage | None = None
    outcome: Outcome | None = None
    response_id: str | None = None  # the id under which the upstream stores the response

    @property
    def open_amounts(self) -> dict[tuple[CounterKey, int], Amount]:
        """What an open call holds, by counter and the instant at which its window opened. Empty after its end."""
        if self.state != "open":
            return {}
        return {(held.key, held.opened_at): held.amount for held in self.held_amounts}


def call_id_prefix(instant: int) -> str:
    """The first part of the id of a call that arrives at this instant (ms).

    The instant is written with twelve hexadecimal digits, so ids sort by time. New rows then go to the right edge of
    the primary key, and old calls are found by id without an index on `reserved_at`. Example: every call before
    24 November 2026 12:00 UTC has an id below `req_01a20d6d5a00`.
    """
    return f"req_{instant:012x}"
