"""A call that was let in, until it ends: exactly once, whichever way it is left.

What is held grows with what the meter sees pass (`grow`), so that a stream which may become long need not hold all of
that from its beginning. Leaving the block of a reservation that nobody ended settles it with what the meter saw:
nothing that a client, an upstream or a mistake of ours does leaves tokens held.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType

from proxy.admission import Verdict
from proxy.books import Booked, Extend, Outcome, Release, Settle
from proxy.counting import CallCount
from proxy.errors import LedgerUnavailable
from proxy.ledger import Ledger
from proxy.meter import Meter
from proxy.quotas import Binding, Counter, CounterKey
from proxy.usage import TOKENS_MAX, AtLeast, Tokens, Usage
from proxy.waiting import WaitingRoom

# How long the end of an answer waits for its commit. Past that it goes out: the end stays queued, and the
# reservation, which is on the books, covers a crash.
COMMIT_WAIT_S = 2.0
# By how much a hold grows at a time: at 100 tokens a second every ten seconds, each for one commit of 2 ms.
STEP = 1024
# An upstream that was told a maximum is believed to keep to it, also where our own count differs. One that goes on
# and on did not read it.
_RUNAWAY = 2


class Reservation:
    """What is held for one call. `entry` is it in the books, as it was last told."""

    def __init__(self, ledger: Ledger, booked: Booked, meter: Meter, *, binding: Binding, count: CallCount) -> None:
        self.entry = booked.entry
        self.meter = meter
        self.is_sent = False  # before that nothing can have been used
        self.outcome: Outcome | None = None
        self.charged: Usage | None = None
        self.counters: Mapping[CounterKey, Counter] = booked.counters
        self._ledger = ledger
        self._binding = binding
        self._count = count
        self._let_pass = 0  # so many tokens of output pass on without being held, because the ledger is away

    async def __aenter__(self) -> "Reservation":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.outcome is None and not self.is_sent:
            await self.release("proxy_broke")
        elif self.outcome is None:
            await self.settle(await self.usage(), "proxy_broke")

    @property
    def covered(self) -> int:
        """How many tokens of output may pass on."""
        passing, maximum = max(self.entry.hold.output, self._let_pass), self.entry.maximum
        if maximum is not None and passing >= maximum:
            return _RUNAWAY * passing + STEP
        return passing

    async def grow(self, waiting: WaitingRoom, *, wait_s: float) -> bool:
        """Hold what the meter has seen, and some more; False where no more is to be had.

        Where only calls in flight hold what is left it waits for them, up to `wait_s`. While the ledger can't be
        written a running answer goes on: what it used is charged at its end.
        """
        seen, maximum = self.meter.output_seen, self.entry.maximum
        if maximum is not None and max(self.entry.hold.output, self._let_pass) >= maximum:
            return False
        wanted = min(seen + STEP, TOKENS_MAX if maximum is None else max(seen, maximum))
        act = Extend(self.entry.id, self._binding, input=self._input_tokens(), output=wanted, least=seen)
        try:
            booked = await waiting.extend(act, wait_s=0, ask_s=COMMIT_WAIT_S)
            if booked.verdict is not Verdict.ROOM:
                # What is held for the input by its bytes may be all that is missing.
                input_tokens = min(self._input_tokens(), await self._count.most_of_input())
                act = replace(act, input=input_tokens)
                booked = await waiting.extend(act, wait_s=wait_s, ask_s=COMMIT_WAIT_S)
        except LedgerUnavailable:
            self._let_pass = wanted
            return True
        self.entry, self.counters = booked.entry, {**self.counters, **booked.counters}
        return booked.verdict is Verdict.ROOM and booked.entry.state == "open"

    def _input_tokens(self) -> int:
        """What is to be held for the input, now that the upstream may have said it."""
        reported = self.meter.input_reported
        return self.entry.hold.input if reported is None else min(reported, self.entry.hold.input)

    async def usage(self) -> Usage:
        """What was used, as well as it can be known by now: as the upstream said, else counted."""
        usage = self.meter.usage(input_tokens=0)
        if not isinstance(usage, AtLeast):
            return usage
        tokens = usage.tokens
        input_tokens = tokens.input if self.meter.input_reported is not None else await self._count.of_input()
        output_tokens = tokens.output + await self._count.of_output(self.meter.uncounted)
        return AtLeast(Tokens(input_tokens, output_tokens, tokens.cached))

    @property
    def whole_hold(self) -> Usage:
        """All that is held."""
        return AtLeast(Tokens(self.entry.hold.input, max(self.entry.hold.output, self._let_pass)))

    async def settle(self, usage: Usage, outcome: Outcome, *, wait_s: float = COMMIT_WAIT_S) -> None:
        """Charge this much; returns once it is on the books, or after `wait_s`. Only the first end counts.

        An estimate is never more than what is held: a guess may not take a quota over its limit.
        """
        if isinstance(usage, AtLeast):
            whole, tokens = self.whole_hold.tokens, usage.tokens
            usage = AtLeast(
                Tokens(
                    min(tokens.input, whole.input), min(tokens.output, whole.output), min(tokens.cached, whole.input)
                )
            )
        await self._end(Settle(self.entry.id, usage, outcome), usage, wait_s)

    async def release(self, outcome: Outcome = "upstream_failed") -> None:
        """Give everything back: the upstream never had this call, or failed with it."""
        await self._end(Release(self.entry.id, outcome), None, COMMIT_WAIT_S)

    async def _end(self, act: Settle | Release, usage: Usage | None, wait_s: float) -> None:
        if self.outcome is not None:
            return
        self.outcome, self.charged = act.outcome, usage
        booking = self._ledger.end(act)
        await asyncio.wait([booking], timeout=wait_s)
        if booking.done() and not booking.exception() and isinstance(answer := booking.result(), Booked):
            self.counters = {**self.counters, **answer.counters}
