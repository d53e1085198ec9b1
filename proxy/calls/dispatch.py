"""One call, sent to one upstream after another until one of them takes it.

Nothing of this is seen by the client, and nothing of it costs: there is one reservation, which is charged what the
upstream that answered used. A call that may have run is never sent again: only one that provably reached nobody, or
was turned away with a head that says so. Once a head of an answer is handed out there is no other try.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Literal

import structlog

from proxy.calls.call import Call
from proxy.calls.reservation import Reservation
from proxy.calls.token_count import TokenCount
from proxy.calls.tokenizer import Tokenizers
from proxy.errors import UpstreamError, UpstreamTimeout
from proxy.formats.estimate import largest_demand
from proxy.formats.meter import Meter
from proxy.ledger.entry import Entry
from proxy.metrics import Metrics
from proxy.policy.policy import Model, Upstream
from proxy.policy.quota import Demand
from proxy.upstreams.client import Answer, Upstreams
from proxy.upstreams.routing import UNREACHED_PAUSE_MS, Cooldowns, RoutingState, may_try_another_target, seconds_of
from proxy.upstreams.spool import Spliced
from proxy.upstreams.usage_option import UsageOptionCache, is_about_usage_option

# What became of one try, as it is counted.
AttemptOutcome = Literal["answered", "rejected", "limited", "failed", "unreachable", "timed_out", "broke_off"]

log = structlog.get_logger("tries")


class Candidate:
    """A call as one of its targets is to receive it: with a body, a token count and a meter of its own."""

    def __init__(self, call: Call, tokenizers: Tokenizers, *, keeps_body: bool) -> None:
        body = call.body()
        self.call = call
        self.count = TokenCount(tokenizers, call.request, call.model, body_bytes=len(body), previous=call.previous)
        self._body = body if keeps_body else None

    @property
    def upstream(self) -> Upstream:
        """The upstream of its target."""
        return self.call.model.upstream

    def meter(self) -> Meter:
        """A new meter for its answer."""
        return Meter(self.call.request, count=self.count.piece, kind=self.upstream.kind)

    def body(self, call: Call, entry: Entry) -> bytes | Spliced:
        """The body to send for `call`, which is this candidate's or the same without the usage option.

        The maximum in it is lowered if less is left of the quota than the call asks for.
        """
        if self._body is None or entry.capped_by or call is not self.call:
            return call.body_for(entry)
        return self._body

    def free_body(self) -> None:
        """Drop the body that was written in advance."""
        self._body = None


class Candidates:
    """A call as each target of its model is to receive it; `demand` covers all of them."""

    def __init__(self, call: Call, tokenizers: Tokenizers) -> None:
        self.targets = call.model.targets
        # With several targets each body is written when it is sent, so that a large one is not kept for each.
        keeps_body = len(self.targets) == 1
        self._candidates = [Candidate(call.at(target), tokenizers, keeps_body=keeps_body) for target in self.targets]
        self.demand = largest_demand([candidate.count.demand for candidate in self._candidates])
        self.first = self._candidates[0]

    async def exact_demand(self) -> Demand:
        """The same with the input counted."""
        return largest_demand([await candidate.count.exact_demand() for candidate in self._candidates])

    def to(self, target: Model) -> Candidate:
        """The candidate for one of the targets."""
        return next(candidate for candidate in self._candidates if candidate.call.model is target)

    def free_body(self) -> None:
        """Drop all that was to be sent. The texts stay, in case they have to be counted."""
        for candidate in self._candidates:
            candidate.free_body()
        self.first.call.request.body.free()


class Dispatcher:
    """Sends calls. `now` gives milliseconds since 1970, `draw` random numbers far larger than any sum of weights."""

    def __init__(
        self, upstreams: Upstreams, *, metrics: Metrics, now: Callable[[], int], draw: Callable[[], int]
    ) -> None:
        self._upstreams = upstreams
        self._metrics = metrics
        self._now = now
        self._draw = draw
        self._cooldowns = Cooldowns()
        self._usage_options = UsageOptionCache()

    @asynccontextmanager
    async def answer(self, candidates: Candidates, reservation: Reservation) -> AsyncIterator[tuple[Call, Answer]]:
        """Hand out the answer, and the passage to who gave it: the first that is one, else the last failure in words.

        Raises UpstreamError where no upstream said anything, or where the call may have run without an answer.
        """
        routing: RoutingState | None = RoutingState(
            candidates.targets, until=self._now() + candidates.first.call.policy.retry_for_ms
        )
        told: tuple[Call, Answer] | None = None
        while routing is not None:
            if routing.pause_ms:
                await asyncio.sleep(routing.pause_ms / 1000)
            candidate = candidates.to(self._cooldowns.choose(routing.left, self._now(), draw=self._draw()))
            async with AsyncExitStack() as connection:
                try:
                    answer = await connection.enter_async_context(self._ask(candidate, reservation))
                except UpstreamError as error:
                    routing = self._after_error(error, routing, candidate)
                    if routing is None and (error.was_sent or told is None):
                        raise
                    reservation.is_sent = False
                else:
                    routing = self._after_answer(answer, routing, candidate)
                    if routing is None:
                        candidates.free_body()
                        yield candidate.call, answer
                        return
                    reservation.is_sent = False  # it was turned away: whoever leaves now owes nothing
                    await answer.beginning()
                    told = candidate.call, answer
        assert told is not None, "else the last error was raised"
        reservation.model = told[0].model
        candidates.free_body()
        yield told

    @asynccontextmanager
    async def _ask(self, candidate: Candidate, reservation: Reservation) -> AsyncIterator[Answer]:
        """Send it; once more where it would be taken but for the option by which we ask for the usage of a stream."""
        await candidate.count.before_it_is_sent()
        call, meter = candidate.call, candidate.meter()
        if call.adds_usage and not self._usage_options.may_ask(call.address, call.model):
            call = call.without_option()
            meter.stop_stripping()
        reservation.ask(call.model, meter, count=candidate.count)
        async with self._send(call, candidate.body(call, reservation.entry)) as answer:
            if not await _is_option_refused(answer, call):
                if call.adds_usage and answer.status // 100 == 2:
                    self._usage_options.note(call.address, call.model, is_taken=True)
                yield answer
                return
        call = call.without_option()
        meter.stop_stripping()
        async with self._send(call, call.body_for(reservation.entry)) as answer:
            if answer.status // 100 == 2:
                log.info(
                    "upstream takes no stream_options",
                    upstream=call.model.upstream.name,
                    model=call.model_label,
                )
                self._usage_options.note(call.address, call.model, is_taken=False)
            yield answer

    def _send(self, call: Call, body: bytes | Spliced) -> AbstractAsyncContextManager[Answer]:
        return self._upstreams.send(call.model.upstream, call.address, body, call.headers())

    def _after_error(self, error: UpstreamError, routing: RoutingState, candidate: Candidate) -> RoutingState | None:
        self._cooldowns.failed(candidate.upstream, self._now())
        if error.was_sent:
            self._count(candidate, "timed_out" if isinstance(error, UpstreamTimeout) else "broke_off")
            return None
        self._count(candidate, "unreachable")
        return self._next(routing, candidate, pause_ms=UNREACHED_PAUSE_MS)

    def _after_answer(self, answer: Answer, routing: RoutingState, candidate: Candidate) -> RoutingState | None:
        outcome = _outcome(answer.status)
        self._count(candidate, outcome)
        if outcome in ("answered", "rejected"):
            self._cooldowns.answered(candidate.upstream)
            return None
        retry_after_s = seconds_of(answer.retry_after)
        self._cooldowns.failed(candidate.upstream, self._now(), retry_after_s=retry_after_s)
        if not may_try_another_target(answer.status):
            return None
        return self._next(routing, candidate, pause_ms=None if retry_after_s is None else retry_after_s * 1000)

    def _next(self, routing: RoutingState, candidate: Candidate, *, pause_ms: int | None) -> RoutingState | None:
        if candidate.call.client.is_disconnected:
            return None
        return routing.after(candidate.call.model, pause_ms=pause_ms, now=self._now())

    def _count(self, candidate: Candidate, outcome: AttemptOutcome) -> None:
        self._metrics.attempts.labels(candidate.upstream.name, outcome).inc()
        if outcome not in ("answered", "rejected"):
            log.warning(
                "a try failed", upstream=candidate.upstream.name, outcome=outcome, call=candidate.call.client.id
            )


async def _is_option_refused(answer: Answer, call: Call) -> bool:
    """Whether this is an error about what we wrote into the request, and not the client."""
    is_refusal = call.adds_usage and answer.status // 100 == 4
    return is_refusal and is_about_usage_option(answer.status, await answer.beginning())


def _outcome(status: int) -> AttemptOutcome:
    if status == 429:
        return "limited"
    if 200 <= status <= 299:
        return "answered"
    # 401 and 402 speak of us, and 408 of the time: none of them says that the upstream does what it is there for.
    return "rejected" if 400 <= status <= 499 and status not in (401, 402, 408) else "failed"
