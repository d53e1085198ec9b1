"""What a torture run brings to light about each call, from three sides: its client, the upstream, the books.

`mark` is the call's own (see `torture_plan`). Tokens of a call are input and output; levels of a counter are input
tokens, output tokens and requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from proxy.torture.answers import Refusal, Tokens

Levels = tuple[int, int, int]
CounterKey = tuple[str, str]  # subject, quota
WindowKey = tuple[str, str, int]  # and when it opened, in ms

End = Literal[
    "complete",  # the whole answer arrived
    "hung_up",  # the client left, as it was to
    "broken",  # it did not arrive, or broke off
    "refused",  # 429
    "failed",  # another status than 200
    "unreached",  # nobody took the connection
]


@dataclass(slots=True)
class Seen:
    """One call as its client saw it; filled in while it lasts. `needed` is the least that it truly takes.

    `disturbed`: the proxy was killed or paused meanwhile, or was down, or it said 503 while its database was.
    `retries` is the refusal whose reset this call waited for.
    `answered_s` is how long the refusal took, or the first byte of a stream.
    """

    mark: str
    user: int
    needed: int
    end: End = "broken"
    status: int | None = None
    id: str | None = None
    usage: Tokens | None = None
    words: int = 0
    disturbed: bool = False
    refusal: Refusal | None = None
    retries: Refusal | None = None
    answered_s: float | None = None

    @property
    def had_room(self) -> bool:
        """Whether it was refused though what it needs was free. So only calls in flight can have been in its way."""
        free = self.refusal.free if self.refusal else None
        return free is not None and self.needed <= free


@dataclass(frozen=True, slots=True)
class Given:
    """One call as the upstream saw it: what it took and made, and the usage that it said, if it came to that."""

    mark: str
    taken: int
    made: int
    reported: Tokens | None


@dataclass(frozen=True, slots=True)
class Line:
    """Which counter a call was reserved on, in which window, and how much of it."""

    counter: CounterKey
    opened_at: int
    amount: Levels

    @property
    def window(self) -> WindowKey:
        """The window of the counter."""
        return (*self.counter, self.opened_at)


@dataclass(frozen=True, slots=True)
class Row:
    """One call as it stands in the books."""

    id: str
    mark: str
    state: str
    outcome: str | None
    charge: Levels
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Level:
    """One counter as it stands in the books."""

    window: WindowKey
    used: Levels
    held: Levels


@dataclass(frozen=True, slots=True)
class Books:
    """What stands in the database."""

    rows: Sequence[Row] = ()
    levels: Sequence[Level] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """All of it. The books `at_rest` are those when all was quiet, before the proxy was stopped."""

    limit: int
    seen: Sequence[Seen]
    given: Sequence[Given]
    books: Books = Books()
    at_rest: Books = Books()
    kills: int = 0
    pauses: int = 0
    restarts: int = 0
    crashes: int = 0
