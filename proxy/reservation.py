"""A call that was let in, until it ends: exactly once, whichever way it is left.

Leaving the block of a reservation that nobody ended settles it with what the meter saw: nothing that a client, an
upstream or a mistake of ours does leaves tokens held.
"""

import asyncio
from collections.abc import Mapping
from types import TracebackType

from proxy.books import Booked, Outcome, Release, Settle
from proxy.ledger import Ledger
from proxy.meter import Meter
from proxy.quotas import Counter, CounterKey
from proxy.usage import AtLeast, Tokens, Usage

# How long the end of an answer waits for its commit. Past that it goes out: the end stays queued, and the
# reservation, which is on the books, covers a crash.
COMMIT_WAIT_S = 2.0


class Reservation:
    """What is held for one call. `entry` is as it was when the call was let in."""

    def __init__(self, ledger: Ledger, booked: Booked, meter: Meter) -> None:
        self.entry = booked.entry
        self.meter = meter
        self.outcome: Outcome | None = None
        self.charged: Usage | None = None
        self.counters: Mapping[CounterKey, Counter] = booked.counters
        self._ledger = ledger

    async def __aenter__(self) -> "Reservation":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.outcome is None:
            await self.settle(self.meter.usage(), "proxy_broke")

    @property
    def whole_hold(self) -> Usage:
        """All that was held."""
        return AtLeast(Tokens(self.entry.hold.input, self.entry.hold.output))

    async def settle(self, usage: Usage, outcome: Outcome, *, wait_s: float = COMMIT_WAIT_S) -> None:
        """Charge this much; returns once it is on the books, or after `wait_s`. Only the first end counts.

        An estimate is never more than what the call was let in for: a guess may not take a quota over its limit.
        """
        if isinstance(usage, AtLeast):
            hold, tokens = self.entry.hold, usage.tokens
            usage = AtLeast(Tokens(min(tokens.input, hold.input), min(tokens.output, hold.output)))
        await self._end(Settle(self.entry.id, usage, outcome), usage, wait_s)

    async def release(self) -> None:
        """Give everything back: the upstream never had this call, or failed with it."""
        await self._end(Release(self.entry.id), None, COMMIT_WAIT_S)

    async def _end(self, act: Settle | Release, usage: Usage | None, wait_s: float) -> None:
        if self.outcome is not None:
            return
        self.outcome, self.charged = act.outcome, usage
        booking = self._ledger.end(act)
        await asyncio.wait([booking], timeout=wait_s)
        if booking.done() and not booking.exception() and isinstance(answer := booking.result(), Booked):
            self.counters = {**self.counters, **answer.counters}
