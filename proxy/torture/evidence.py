"""The records of a torture run: each call as its client saw it, as the upstream saw it and as the database has it.

A `tag` identifies a call on all three sides (see `plan`). `Tokens` are input and output tokens; `Amounts` are input
tokens, output tokens and requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from proxy.torture.answers import Refusal, Tokens
from proxy.torture.changes import Administration
from proxy.torture.plan import SMALLEST_ANSWER

Amounts = tuple[int, int, int]
CounterKey = tuple[str, str]  # subject, quota
WindowKey = tuple[str, str, int]  # subject, quota, and when the window opened, in ms since 1970

Result = Literal[
    "complete",  # the whole answer arrived
    "disconnected",  # the client disconnected, as planned
    "broken",  # the answer did not arrive, or broke off
    "refused",  # 429
    "failed",  # another status than 200
    "unreachable",  # the connection was not accepted
]


@dataclass(slots=True)
class ClientRecord:
    """One call as its client saw it; filled in while the call runs.

    `tokens_needed`: the fewest tokens that it can be charged.
    `disturbed`: during the call the proxy was killed, paused or down, or it answered 503 while its database was down.
    `retry_of`: the refusal whose reset this call waited for.
    `answered_s`: seconds until the refusal, or until the first byte of a stream.
    `began_at`, `ended_at`: when it was sent, and when its answer had ended (ms since 1970).
    """

    tag: str
    user: int
    tokens_needed: int
    result: Result = "broken"
    status: int | None = None
    request_id: str | None = None
    usage: Tokens | None = None
    words: int = 0
    disturbed: bool = False
    refusal: Refusal | None = None
    retry_of: Refusal | None = None
    answered_s: float | None = None
    began_at: int = 0
    ended_at: int = 0

    @property
    def is_falsely_refused(self) -> bool:
        """Whether it was refused although the tokens that it needed were free.

        The proxy can do that only because calls in flight hold them.
        """
        free_tokens = self.refusal.free_tokens if self.refusal else None
        return free_tokens is not None and self.tokens_needed <= free_tokens


@dataclass(frozen=True, slots=True)
class UpstreamRecord:
    """One call as the upstream saw it: the tokens that it read and generated, and the usage if it was sent."""

    tag: str
    input_tokens: int
    output_tokens: int
    reported: Tokens | None


@dataclass(frozen=True, slots=True)
class HeldAmount:
    """The amount that a call reserved on one counter, in one window. `opened_at` is in ms since 1970."""

    counter: CounterKey
    opened_at: int
    amount: Amounts

    @property
    def window(self) -> WindowKey:
        """The window of the counter."""
        return (*self.counter, self.opened_at)


@dataclass(frozen=True, slots=True)
class CallRow:
    """One call as it is in the database. `user` is the user's name in records; instants are in ms since 1970.

    `maximum` is how many tokens of output its admission allowed; None: no maximum was known.
    """

    request_id: str
    tag: str
    state: str
    outcome: str | None
    charge: Amounts
    held: tuple[HeldAmount, ...]
    user: str = ""
    reserved_at: int = 0
    ended_at: int | None = None
    maximum: int | None = None

    def admitted_output(self, held: int) -> int:
        """How much output it held at its admission at the least, if it holds so much at the end (tokens).

        A stream that is longer by the proxy's own count than its maximum may hold more than that later.
        """
        least = min(held, SMALLEST_ANSWER)
        return least if self.maximum is None else min(least, self.maximum)


@dataclass(frozen=True, slots=True)
class CounterRow:
    """One counter as it is in the database. `reset_at`: when an administrator last emptied it (ms), 0 for never."""

    window: WindowKey
    used: Amounts
    held: Amounts
    reset_at: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The calls and counters in the proxy's database at one instant."""

    calls: Sequence[CallRow] = ()
    counters: Sequence[CounterRow] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """All records of a run. `limit` is in tokens.

    `idle` is the database after the last call had ended, before the proxy was stopped; `stopped` is after that.
    `administration` is what the administrator changed, if there was one.
    `users` has the names of the users in records.
    """

    limit: int
    clients: Sequence[ClientRecord]
    upstream: Sequence[UpstreamRecord]
    stopped: Snapshot = Snapshot()
    idle: Snapshot = Snapshot()
    kills: int = 0
    pauses: int = 0
    restarts: int = 0
    crashes: int = 0
    administration: Administration | None = None
    users: Sequence[str] = ()
