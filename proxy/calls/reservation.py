"""The reservation of an admitted call. It ends exactly once: settled or released.

A stream that may become long does not hold its whole maximum from the beginning. It starts with a small hold, and the
hold grows with the output that the meter has seen (`grow`). Example, for a request with `max_tokens: 8000`:

    reserved                              hold 1,024     output passes up to 1,024 tokens
    an event brings the output to 1,030   hold 2,054     (1,030 + HOLD_STEP), one commit
    an event brings the output to 2,060   hold 3,084     and so on, but never more than 8,000
    the stream ends at 2,500              settled with 2,500; the other 584 are free again

`relay` ends it on every path, at last with what the meter has seen. So neither a client nor an upstream nor a bug of
ours leaves tokens held.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

import structlog

from proxy.calls.token_count import TokenCount
from proxy.errors import LedgerUnavailable
from proxy.formats.meter import Meter
from proxy.ledger.book import Accepted, Extend, Release, Settle
from proxy.ledger.entry import Outcome
from proxy.ledger.ledger import Ledger
from proxy.ledger.queue import AdmissionQueue
from proxy.policy.admission import Verdict
from proxy.policy.amounts import TOKENS_MAX, AtLeast, Tokens, Unspent, Usage, Uses
from proxy.policy.binding import Binding
from proxy.policy.catalog import Model
from proxy.policy.quota import Counter, CounterKey

# How long the end of an answer waits for the commit of its charge. The end is held back so that a client that has the
# whole answer has been charged for it, even if the proxy is killed in the next moment, unless the database is slower
# than that. A commit takes a few milliseconds. If the database takes longer than 2 s, the end goes out all the same,
# because the client has waited enough and nothing is lost: the charge stays queued until it succeeds, and if the
# proxy crashes first, the reservation, which is already committed, is charged in full. Requests to extend a hold have
# the same limit.
COMMIT_WAIT_S = 2.0
# How many tokens a hold grows by. At 100 tokens a second that is one commit (2 ms) every ten seconds. A smaller step
# costs more commits, a larger one holds more than the answer may need.
HOLD_STEP = 1024
# How far our own count may exceed the maximum that was sent to the upstream if there is no room to hold the excess:
# twice the maximum plus 64 tokens. The upstream is expected to keep to its maximum, but it counts with its own
# tokenizer, and ours may find twice as many tokens in the same text. Example: `max_tokens: 100` was sent, and 100
# tokens are held. Our count says 180 while the upstream has counted 95: the stream goes on. At 265 by our count the
# upstream has evidently ignored the maximum, and the stream is ended. If there is room, the excess is held, because
# no more than the hold is charged if the upstream states no usage: here up to 264 tokens at once, so that an upstream
# that counts differently costs one commit.
_MISCOUNT_FACTOR = 2
_MISCOUNT_TOKENS = 64

log = structlog.get_logger("reservation")


class Reservation:
    """What is reserved for one call. `entry` is its state in the ledger, as of the ledger's last answer.

    `counters` are the quota counters of the call, also as last reported. `meter` and `count` are those of the last
    attempt, and `covered` is how many tokens of output may have passed to the client: before the first attempt there
    are none.
    `outcome` and `charged` are set by its end.
    """

    meter: Meter
    covered: int
    count: TokenCount

    def __init__(self, ledger: Ledger, accepted: Accepted, *, binding: Binding) -> None:
        self.entry = accepted.entry
        self.is_sent = False  # until it is set, the call cannot have used anything
        self.target: Model | None = None  # of the last attempt
        self.outcome: Outcome | None = None
        self.charged: Usage | None = None
        self.counters: Mapping[CounterKey, Counter] = accepted.counters
        self._ledger = ledger
        self._lapses = ledger.lapses
        self._binding = binding
        # Two allowances for output that is not held, in tokens of output in all: while the ledger cannot be written,
        # and beyond the maximum that was sent to the upstream (see _MISCOUNT_FACTOR).
        self._unheld_allowance = 0
        self._miscount_allowance = 0

    def begin_attempt(self, target: Model, meter: Meter, *, count: TokenCount) -> None:
        """Note that the call is about to be sent to this target; `meter` and `count` are for its answer."""
        self.target, self.meter, self.count = target, meter, count
        self.is_sent = True
        self._note_hold()

    async def grow(
        self, queue: AdmissionQueue, *, wait_s: float, is_disconnected: Callable[[], bool] = lambda: False
    ) -> bool:
        """Hold the output that the meter has seen, and HOLD_STEP more. False if there is no room for what was seen.

        If only calls in flight prevent it, it waits for them for up to `wait_s` seconds or until
        `is_disconnected()`; what it got meanwhile is kept.

        While the ledger cannot be written, a running answer goes on: its usage is charged at its end. This no longer
        applies once our lease has run out. Then another process may have charged this reservation and admitted other
        calls in its place, so nothing passes that is not held again.
        """
        seen, maximum = self.meter.output_seen, self.entry.maximum
        is_beyond_maximum = maximum is not None and max(self.covered, seen) > maximum
        try:
            if await self._extend(queue, self._held_input(), wait_s=0):
                return True
            # The input may still be held by its bytes, which is about four times too much for prose. Counting it
            # gives the difference to the answer before the stream is made to wait or is ended.
            held_input = min(self._held_input(), await self.count.input_upper_bound())
            # Beyond the maximum it does not wait: the upstream is expected to end by itself, held or not.
            wait_s = 0 if is_beyond_maximum else wait_s
            if await self._extend(queue, held_input, wait_s=wait_s, is_disconnected=is_disconnected):
                return True
        except LedgerUnavailable:
            if self._has_lease_lapsed:
                return False
            self._unheld_allowance = self._wanted_output()
            self._note_hold()
            return True
        if maximum is None or self.entry.hold.output < maximum:
            return False
        self._miscount_allowance = _MISCOUNT_FACTOR * maximum + _MISCOUNT_TOKENS
        self._note_hold()
        return seen <= self._miscount_allowance

    async def hold_whole_answer(self, queue: AdmissionQueue) -> bool:
        """Hold all of an answer that came whole although a stream was requested. False if there is no room for it.

        Such a call holds as little as a stream does. If its answer passed unchecked, an upstream that does not stream
        would take every quota over its limit.
        """
        hold = self.entry.hold.output
        if hold == self.entry.maximum:
            return True
        usage = await self.usage()
        if usage.tokens.output <= hold:
            return True
        try:
            return await self._extend(queue, self._held_input(), wait_s=0, least=usage.tokens.output)
        except LedgerUnavailable:
            return not self._has_lease_lapsed

    @property
    def _has_lease_lapsed(self) -> bool:
        """Whether our lease has run out since the ledger last confirmed the hold. Then the hold may be charged."""
        return self._ledger.lapses != self._lapses

    def _wanted_output(self) -> int:
        """How much output to hold, in tokens: what was seen and HOLD_STEP.

        If there is a maximum, that is at most the maximum; beyond it, what our count may exceed it by; beyond that,
        any number.
        """
        seen, maximum = self.meter.output_seen, self.entry.maximum
        bounds = () if maximum is None else (maximum, _MISCOUNT_FACTOR * maximum + _MISCOUNT_TOKENS)
        return min(seen + HOLD_STEP, next((bound for bound in bounds if seen <= bound), TOKENS_MAX))

    async def _extend(
        self,
        queue: AdmissionQueue,
        held_input: int,
        *,
        wait_s: float,
        is_disconnected: Callable[[], bool] = lambda: False,
        least: int | None = None,
    ) -> bool:
        # The lapses are read before the ledger answers. A lease that runs out while it answers counts as a lapse.
        seen, lapses = self.meter.output_seen if least is None else least, self._ledger.lapses
        wanted = max(seen, self._wanted_output())
        operation = Extend(self.entry.id, self._binding, input=held_input, output=wanted, least=seen)
        accepted = await queue.extend(operation, wait_s=wait_s, ask_s=COMMIT_WAIT_S, is_disconnected=is_disconnected)
        self.entry, self.counters, self._lapses = accepted.entry, {**self.counters, **accepted.counters}, lapses
        self._note_hold()
        log.debug("hold extended", request=self.entry.id, hold=self.entry.hold.output, verdict=accepted.verdict.word)
        return accepted.verdict is Verdict.ALLOW and accepted.entry.state == "open"

    def _note_hold(self) -> None:
        """Let pass what is held, and let the meter believe a usage within it, even if the call asked for less."""
        self.covered = max(self.entry.hold.output, self._unheld_allowance, self._miscount_allowance)
        self.meter.output_bound = max(self.meter.output_bound, self.entry.hold.output)

    def _held_input(self) -> int:
        """The input to hold, in tokens: what the upstream reported, if it already has, else what is held now."""
        reported = self.meter.input_stated
        return self.entry.hold.input if reported is None else reported

    async def usage(self) -> Usage:
        """What was used, as well as it is known now: what the upstream reported, else what we count.

        An image, speech or transcript without a report is charged the price that the configuration names. If its
        model states tokens and its answer does not, it is charged what is held, because nothing else is known.
        """
        usage = self.meter.usage()
        is_output_stated = not isinstance(usage, Unspent) and usage.tokens.output < TOKENS_MAX
        if not is_output_stated and not self.meter.has_error:
            if self.count.unstated_price is not None:
                return AtLeast(Tokens(0, self.count.unstated_price))
            if self.count.should_state_tokens:
                usage = AtLeast(replace(usage.tokens, output=self.count.demand.output_maximum))
        if not isinstance(usage, AtLeast):
            return usage
        tokens = usage.tokens
        if self.meter.input_stated is None:
            tokens = replace(tokens, input=await self.count.input_tokens())
        if texts := self.meter.uncounted_texts:
            tokens = replace(tokens, output=self.meter.output_with(await self.count.output_tokens(texts)))
        return AtLeast(tokens)

    @property
    def full_hold(self) -> Usage:
        """All that is held, and what passed while the ledger could not be written.

        It has no output beyond the maximum: only our own count sees such output, and it is not held.
        """
        maximum = self.entry.maximum
        unheld = self._unheld_allowance if maximum is None else min(self._unheld_allowance, maximum)
        return AtLeast(Tokens(self.entry.hold.input, max(self.entry.hold.output, unheld)))

    async def end(self, outcome: Outcome, *, charges_full_hold: bool = False) -> None:
        """End the call. The outcome alone decides what is charged:

            complete, client_left, stopped,      the usage as it is known; nothing if the call was not sent
              upstream_broke, proxy_broke
            at_limit                             the usage as it is known, but no more than is held
            rejected                             one request and no tokens; nothing if the call can use nothing
            upstream_failed                      nothing

        `charges_full_hold` is for a call whose cost cannot be derived from what passed: if it was sent, all that
        is held is charged. Returns when the end is committed, or after COMMIT_WAIT_S. Only the first end counts.
        """
        if self.outcome is None:
            await self.settle(await self._charge_for(outcome, charges_full_hold), outcome)

    async def _charge_for(self, outcome: Outcome, charges_full_hold: bool) -> Usage | None:
        match outcome:
            case "upstream_failed":
                return None
            case "rejected":
                return Unspent(requests=0 if self.count.demand.uses is Uses.NOTHING else 1)
            case "at_limit":
                # A usage that the upstream has reported may include an event that was withheld. As AtLeast it is
                # charged only up to the hold. Example: 1,100 tokens are held and passed, and the withheld event says
                # `completion_tokens: 1130`. 1,100 are charged.
                return AtLeast((await self.usage()).tokens)
        if not self.is_sent:
            return None
        return self.full_hold if charges_full_hold else await self.usage()

    async def settle(self, usage: Usage | None, outcome: Outcome, *, wait_s: float = COMMIT_WAIT_S) -> None:
        """Charge this usage and free the rest of the hold; None: charge nothing and free all of it.

        Returns when that is committed, or after `wait_s` seconds. Only the first end counts. An estimate is never
        charged beyond what is held: an error of our count must not take a quota over its limit.
        """
        if self.outcome is not None:
            return
        if isinstance(usage, AtLeast):
            usage = AtLeast(replace(usage.tokens.at_most(self.full_hold.tokens), reasoning=0))
        # Set before the first await: a second end that begins meanwhile must find it set.
        self.outcome, self.charged = outcome, usage
        upstream = None if self.target is None else self.target.upstream.name
        committed = self._ledger.end(
            Release(self.entry.id, outcome, upstream)
            if usage is None
            else Settle(self.entry.id, usage, outcome, upstream=upstream, response_id=self.meter.response_id)
        )
        # When the time is over, the ledger goes on trying to commit.
        with suppress(TimeoutError, LedgerUnavailable):
            async with asyncio.timeout(wait_s):
                reply = await committed
            if isinstance(reply, Accepted):
                self.counters = {**self.counters, **reply.counters}
