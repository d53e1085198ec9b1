"""A call that was let in, until it ends: exactly once, whichever way it is left.

What is held grows with what the meter sees pass (`grow`), so that a stream which may become long need not hold all of
that from its beginning. Leaving the block of a reservation that nobody ended settles it with what the meter saw:
nothing that a client, an upstream or a mistake of ours does leaves tokens held.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType

from proxy.calls.token_count import TokenCount
from proxy.errors import LedgerUnavailable
from proxy.formats.meter import Meter
from proxy.ledger.book import Accepted, Extend, Release, Settle
from proxy.ledger.entry import Outcome
from proxy.ledger.ledger import Ledger
from proxy.ledger.queue import AdmissionQueue
from proxy.policy.admission import Verdict
from proxy.policy.amounts import TOKENS_MAX, AtLeast, Tokens, Usage
from proxy.policy.policy import Model
from proxy.policy.quota import Binding, Counter, CounterKey

# How long the end of an answer waits for its commit. Past that it goes out: the end stays queued, and the
# reservation, which is on the books, covers a crash.
COMMIT_WAIT_S = 2.0
# By how much a hold grows at a time: at 100 tokens a second every ten seconds, each for one commit of 2 ms.
STEP = 1024
# An upstream that was told a maximum is believed to keep to it, also where our own count differs: by another
# tokenizer than its own it may come out at twice as much. One that goes on and on did not read it.
_RUNAWAY = 2
_TOLERANCE = 64


class Reservation:
    """What is held for one call. `entry` is it in the books, as it was last told."""

    def __init__(
        self, ledger: Ledger, booked: Accepted, meter: Meter, *, binding: Binding, count: TokenCount
    ) -> None:
        self.entry = booked.entry
        self.meter = meter
        self.is_sent = False  # before that nothing can have been used
        self.model: Model | None = None  # at the upstream that was asked last
        self.outcome: Outcome | None = None
        self.charged: Usage | None = None
        self.counters: Mapping[CounterKey, Counter] = booked.counters
        self._ledger = ledger
        self._lapses = ledger.lapses
        self._binding = binding
        self._count = count
        self._let_pass = 0  # so many tokens of output pass on without being held, because the ledger is away
        self._trusted = 0  # so many pass on by our count, because the upstream was told less and counts otherwise

    async def __aenter__(self) -> "Reservation":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.end_early("proxy_broke")

    def ask(self, model: Model, meter: Meter, *, count: TokenCount) -> None:
        """The call is sent to this upstream from now on; `meter` and `count` are as its answer needs them."""
        self.model, self.meter, self._count = model, meter, count
        self.is_sent = True

    @property
    def covered(self) -> int:
        """How many tokens of output may pass on."""
        return max(self.entry.hold.output, self._let_pass, self._trusted)

    async def grow(
        self, queue: AdmissionQueue, *, wait_s: float, is_disconnected: Callable[[], bool] = lambda: False
    ) -> bool:
        """Hold what the meter has seen, and some more; False where no more is to be had.

        Where only calls in flight hold what is left it waits for them, up to `wait_s` or until the client `is_disconnected`,
        and keeps meanwhile what it got. While the ledger can't be written a running answer goes on: what it used is
        charged at its end. But not once our lease has run out: then others may have charged what is held, and let in
        whom there is room for, so nothing more passes on.
        """
        seen, maximum = self.meter.output_seen, self.entry.maximum
        is_beyond = maximum is not None and max(self.covered, seen) > maximum
        try:
            if await self._extend(queue, self._input_tokens(), wait_s=0):
                return True
            # What is held for the input by its bytes may be all that is missing.
            input_tokens = min(self._input_tokens(), await self._count.most_of_input())
            if await self._extend(
                queue, input_tokens, wait_s=0 if is_beyond else wait_s, is_disconnected=is_disconnected
            ):
                return True
        except LedgerUnavailable:
            if self._may_be_lost:
                return False
            self._let_pass = self._wanted()
            return True
        if maximum is None or self.entry.hold.output < maximum:
            return False
        self._trusted = _RUNAWAY * maximum + _TOLERANCE
        return seen <= self._trusted

    async def covers_whole(self, queue: AdmissionQueue) -> bool:
        """Whether all of an answer is held that came whole where a stream was asked; it is, if there is room."""
        hold = self.entry.hold.output
        usage = self.meter.usage() if hold == self.entry.maximum else await self.usage()
        if hold == self.entry.maximum or usage.tokens.output <= hold:
            return True
        try:
            return await self._extend(queue, self._input_tokens(), wait_s=0, least=usage.tokens.output)
        except LedgerUnavailable:
            return not self._may_be_lost

    @property
    def _may_be_lost(self) -> bool:
        """Whether others may have taken us for dead since we last heard of what is held."""
        return self._ledger.lapses != self._lapses

    def _wanted(self) -> int:
        seen, maximum = self.meter.output_seen, self.entry.maximum
        if maximum is None:
            return min(seen + STEP, TOKENS_MAX)
        return min(seen + STEP, maximum) if seen <= maximum else seen + _TOLERANCE

    async def _extend(
        self,
        queue: AdmissionQueue,
        input_tokens: int,
        *,
        wait_s: float,
        is_disconnected: Callable[[], bool] = lambda: False,
        least: int | None = None,
    ) -> bool:
        seen, lapses = self.meter.output_seen if least is None else least, self._ledger.lapses
        wanted = max(seen, self._wanted())
        operation = Extend(self.entry.id, self._binding, input=input_tokens, output=wanted, least=seen)
        booked = await queue.extend(operation, wait_s=wait_s, ask_s=COMMIT_WAIT_S, is_disconnected=is_disconnected)
        self.entry, self.counters, self._lapses = booked.entry, {**self.counters, **booked.counters}, lapses
        return booked.verdict is Verdict.ALLOW and booked.entry.state == "open"

    def _input_tokens(self) -> int:
        """What is to be held for the input, now that the upstream may have said it."""
        reported = self.meter.input_reported
        return self.entry.hold.input if reported is None else reported

    async def usage(self) -> Usage:
        """What was used, as well as it can be known by now: as the upstream said, else counted."""
        usage = self.meter.usage()
        if not isinstance(usage, AtLeast):
            return usage
        tokens = usage.tokens
        if self.meter.input_reported is None:
            tokens = replace(tokens, input=await self._count.of_input())
        counted = await self._count.of_output(self.meter.uncounted_texts)
        return AtLeast(replace(tokens, output=tokens.output + counted))

    @property
    def whole_hold(self) -> Usage:
        """All that is held, and what passed because the ledger was away; never what passed beyond the maximum."""
        maximum = self.entry.maximum
        let_pass = self._let_pass if maximum is None else min(self._let_pass, maximum)
        return AtLeast(Tokens(self.entry.hold.input, max(self.entry.hold.output, let_pass)))

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
        settle = Settle(self.entry.id, usage, outcome, upstream=self._upstream, response_id=self.meter.response_id)
        await self._end(settle, usage, wait_s)

    async def end_early(self, outcome: Outcome, *, is_unknown: bool = False) -> None:
        """End a call that goes no further: free if it was never sent, else charged as well as it can be known.

        `is_unknown` where what passed says nothing of what it cost: then it is all that is held.
        """
        if self.outcome is not None:
            return
        if not self.is_sent:
            await self.release(outcome)
        else:
            await self.settle(self.whole_hold if is_unknown else await self.usage(), outcome)

    async def release(self, outcome: Outcome = "upstream_failed") -> None:
        """Give everything back: the upstream never had this call, or failed with it."""
        await self._end(Release(self.entry.id, outcome, self._upstream), None, COMMIT_WAIT_S)

    @property
    def _upstream(self) -> str | None:
        return None if self.model is None else self.model.upstream.name

    async def _end(self, operation: Settle | Release, usage: Usage | None, wait_s: float) -> None:
        if self.outcome is not None:
            return
        self.outcome, self.charged = operation.outcome, usage
        booking = self._ledger.end(operation)
        await asyncio.wait([booking], timeout=wait_s)
        if booking.done() and not booking.exception() and isinstance(answer := booking.result(), Accepted):
            self.counters = {**self.counters, **answer.counters}
