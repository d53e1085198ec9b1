"""Sends one call to one upstream after another until one of them answers it.

The client does not see the failed attempts, and they cost nothing: there is one reservation for all attempts, and it
is charged what the upstream that answered used.

A call that may have run is never sent again:

    could not connect                              sent again
    429, 401, 402, 5xx except 504 and 524          sent again: the status says that the call did not run
    2xx in an unknown compression                  sent to another upstream: nobody can read the answer
    connection closed without an answer            not sent again: it may have run
    no answer in time, 408, 504, 524               not sent again: it may still run
    other 4xx                                      not sent again: every upstream would reject the request
    3xx                                            not sent again: redirects are not followed
    any other 2xx                                  the answer, even if its body breaks off later

An example with two upstreams: `box` answers 503, so the call goes to `openai` at once. If `openai` cannot be reached
either, the client gets the 503 of `box`, because an error answer is more informative than a failed
connection.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Literal

import structlog

from proxy.calls.body_threads import BodyThreads
from proxy.calls.call import Call
from proxy.calls.reservation import Reservation
from proxy.calls.token_count import TokenCount, prompt_of
from proxy.calls.tokenizer import Tokenizers
from proxy.errors import UpstreamError, UpstreamTimeout, UpstreamUnreadable
from proxy.formats.content import Prompt
from proxy.formats.estimate import largest_demand
from proxy.formats.meter import Meter
from proxy.formats.surfaces import meter_of
from proxy.ledger.entry import Entry
from proxy.metrics import Metrics
from proxy.policy.catalog import Model, Upstream
from proxy.policy.quota import Demand
from proxy.upstreams.client import Answer, Upstreams
from proxy.upstreams.models import ModelLists
from proxy.upstreams.routing import UNREACHED_PAUSE_MS, Cooldowns, RoutingState, may_try_another_target, seconds_of
from proxy.upstreams.spool import Spliced
from proxy.upstreams.usage_option import UsageOptionCache, is_about_usage_option

# The result of one attempt, as a label of the metric `llm_quota_tries`.
AttemptOutcome = Literal["answered", "rejected", "limited", "failed", "unreachable", "timed_out", "broke_off"]

log = structlog.get_logger("tries")


class Candidate:
    """A call in the form in which one of its targets gets it, with its own body, token count and meter."""

    def __init__(self, call: Call, tokenizers: Tokenizers, *, prompt: Prompt, keeps_body: bool) -> None:
        body = call.body()
        self.call = call
        self.count = TokenCount(
            tokenizers, call.request, call.model, prompt=prompt, body_bytes=len(body), previous=call.previous
        )
        self._body = body if keeps_body else None

    @property
    def upstream(self) -> Upstream:
        """The upstream of its target."""
        return self.call.model.upstream

    def meter(self) -> Meter:
        """A new meter for its answer."""
        demand = self.count.demand
        return meter_of(
            self.call.request,
            count=self.count.output_counter,
            kind=self.upstream.kind,
            output_bound=demand.output_maximum,
            input_bound=demand.input + demand.hidden_input,
            extra_usage=self.upstream.extra_usage,
        )

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
    """A call in the form in which each target of its model gets it. `demand` is enough for any of them."""

    def __init__(self, call: Call, tokenizers: Tokenizers) -> None:
        self.targets = call.model.targets
        # With several targets the body is written again when it is sent. Otherwise one of 10 MB would be kept once
        # for each target.
        keeps_body, prompt = len(self.targets) == 1, prompt_of(call.request)
        self._candidates = [
            Candidate(call.with_target(target), tokenizers, prompt=prompt, keeps_body=keeps_body)
            for target in self.targets
        ]
        self.demand = largest_demand([candidate.count.demand for candidate in self._candidates])
        self.first = self._candidates[0]

    async def set_contexts(self, lists: ModelLists) -> None:
        """Bound hidden input by the contexts that the upstreams state, where the configuration states none.

        Waits for an upstream's first list, for at most `models.WAIT_S`.
        """
        lacking = [candidate for candidate in self._candidates if candidate.count.lacks_context]
        if not lacking:
            return
        contexts = await asyncio.gather(*(lists.context(candidate.call.model) for candidate in lacking))
        for candidate, context in zip(lacking, contexts, strict=True):
            if context is not None:
                candidate.count.set_context(context)
        self.demand = largest_demand([candidate.count.demand for candidate in self._candidates])

    async def exact_demand(self) -> Demand:
        """The same as `demand`, with the input counted."""
        return largest_demand([await candidate.count.exact_demand() for candidate in self._candidates])

    def for_target(self, target: Model) -> Candidate:
        """The candidate for one of the targets."""
        return next(candidate for candidate in self._candidates if candidate.call.model is target)

    def free_body(self) -> None:
        """Drop all bodies. Only the texts of the input stay, in case they have to be counted."""
        for candidate in self._candidates:
            candidate.free_body()
        self.first.call.request.body.free()


class Dispatcher:
    """Sends calls, and remembers which upstreams are in cooldown and which accept the usage option.

    `now` gives milliseconds since 1970, `draw` random numbers from a range far larger than any sum of weights.
    `threads` read and write large bodies.
    """

    def __init__(
        self,
        upstreams: Upstreams,
        *,
        tokenizers: Tokenizers,
        threads: BodyThreads,
        metrics: Metrics,
        now: Callable[[], int],
        draw: Callable[[], int],
    ) -> None:
        self.model_lists = ModelLists(upstreams, now=now)
        self._upstreams = upstreams
        self._tokenizers = tokenizers
        self.threads = threads
        self.metrics = metrics
        self._now = now
        self._draw = draw
        self.cooldowns = Cooldowns()
        self._usage_options = UsageOptionCache()

    async def candidates(self, call: Call) -> Candidates:
        """The call in the form in which each target gets it. Raises BodiesWaitTooLong if its body is large."""
        candidates = await self.threads.run(partial(Candidates, call, self._tokenizers), cost=call.request.body.cost)
        await candidates.set_contexts(self.model_lists)
        return candidates

    @asynccontextmanager
    async def answer(self, candidates: Candidates, reservation: Reservation) -> AsyncIterator[tuple[Call, Answer]]:
        """Hand out the answer, and the call with the target that gave it.

        This is the first answer that is not to be retried, else the last error answer. Raises UpstreamError if no
        upstream answered, or if the call may have run and gave no answer.
        """
        routing: RoutingState | None = RoutingState(
            candidates.targets, deadline=self._now() + candidates.first.call.policy.retry_for_ms
        )
        last_failure: tuple[Call, Answer] | None = None
        while routing is not None:
            if routing.pause_ms:
                await asyncio.sleep(routing.pause_ms / 1000)
            target = self.cooldowns.choose(routing.remaining, self._now(), draw=self._draw())
            candidate = candidates.for_target(target)
            # The connection of a failed attempt is closed before the next attempt begins.
            async with AsyncExitStack() as connection:
                try:
                    answer = await connection.enter_async_context(self._attempt(candidate, reservation))
                except UpstreamError as error:
                    routing = self._after_error(error, routing, candidate)
                    if routing is None and (error.was_sent or last_failure is None):
                        raise
                    reservation.is_sent = False  # nothing reached the upstream, or nobody can read its answer
                else:
                    routing = self._after_answer(answer, routing, candidate)
                    if routing is None:
                        candidates.free_body()
                        yield candidate.call, answer
                        return
                    # The call did not run. If the client leaves before the next attempt, nothing is charged.
                    reservation.is_sent = False
                    await answer.error_body()  # kept by `answer`, because its connection is closed here
                    last_failure = candidate.call, answer
        assert last_failure is not None, "otherwise the last error was raised"
        reservation.target = last_failure[0].model
        candidates.free_body()
        yield last_failure

    @asynccontextmanager
    async def _attempt(self, candidate: Candidate, reservation: Reservation) -> AsyncIterator[Answer]:
        """Send the call to one target, and once more if the target rejects the usage option that we added.

        The second time counts as the same attempt: the client did not write the option, so a rejection of it is no
        failure of the client's request. Example: the client sends `stream: true`, and we add `stream_options`. An old
        server answers `400 Unknown parameter: 'stream_options'`. Without the option it answers the call, and we count
        its tokens.
        """
        await candidate.count.count_large_input()
        call, meter = candidate.call, candidate.meter()
        if call.adds_usage and not self._usage_options.should_send(call.address, call.model):
            call = call.without_usage_option()
            meter.stop_stripping()
        reservation.begin_attempt(call.model, meter, count=candidate.count)
        call.client.line.mark_sent()
        body = await self._written(partial(candidate.body, call, reservation.entry), call)
        async with self._send(call, body) as answer:
            del body  # a long answer must not keep it in memory
            if not await _is_option_rejected(answer, call):
                if call.adds_usage and answer.status // 100 == 2:
                    self._usage_options.note(call.address, call.model, is_accepted=True)
                yield answer
                return
        call = call.without_usage_option()
        meter.stop_stripping()
        body = await self._written(partial(call.body_for, reservation.entry), call)
        async with self._send(call, body) as answer:
            del body
            if answer.status // 100 == 2:
                log.info(
                    "upstream takes no stream_options",
                    upstream=call.model.upstream.name,
                    model=call.model_label,
                )
                self._usage_options.note(call.address, call.model, is_accepted=False)
            yield answer

    async def _written(self, write: Callable[[], bytes | Spliced], call: Call) -> bytes | Spliced:
        """The body that `write` returns, written in a thread if it is large."""
        return await self.threads.run(write, cost=call.request.body.cost)

    def _send(self, call: Call, body: bytes | Spliced) -> AbstractAsyncContextManager[Answer]:
        return self._upstreams.send(call.model.upstream, call.address, body, call.headers())

    def _after_error(self, error: UpstreamError, routing: RoutingState, candidate: Candidate) -> RoutingState | None:
        """Note a failure without an answer. Returns where the call may go now; None if it ends."""
        self.cooldowns.failed(candidate.upstream, self._now())
        if error.was_sent:
            self._count_attempt(
                candidate, "timed_out" if isinstance(error, UpstreamTimeout) else "broke_off", error.reason
            )
            return None
        if isinstance(error, UpstreamUnreadable):
            self._count_attempt(candidate, "failed", error.reason)
            return self._next_attempt(routing, candidate, pause_ms=None)
        self._count_attempt(candidate, "unreachable", error.reason)
        return self._next_attempt(routing, candidate, pause_ms=UNREACHED_PAUSE_MS)

    def _after_answer(self, answer: Answer, routing: RoutingState, candidate: Candidate) -> RoutingState | None:
        """Note an answer. Returns where the call may go now; None if this answer is final."""
        outcome = _outcome(answer.status)
        self._count_attempt(candidate, outcome, answer.status_reason)
        if outcome in ("answered", "rejected"):
            self.cooldowns.answered(candidate.upstream)
            return None
        retry_after_s = seconds_of(answer.retry_after)
        self.cooldowns.failed(candidate.upstream, self._now(), retry_after_s=retry_after_s)
        if not may_try_another_target(answer.status):
            return None
        return self._next_attempt(
            routing, candidate, pause_ms=None if retry_after_s is None else retry_after_s * 1000
        )

    def _next_attempt(
        self, routing: RoutingState, candidate: Candidate, *, pause_ms: int | None
    ) -> RoutingState | None:
        if candidate.call.client.is_disconnected:
            return None
        return routing.after_failure(candidate.call.model, pause_ms=pause_ms, now=self._now())

    def _count_attempt(self, candidate: Candidate, outcome: AttemptOutcome, reason: str) -> None:
        name, id = candidate.upstream.name, candidate.call.client.id
        self.metrics.attempts.labels(name, outcome).inc()
        log.debug("attempt", upstream=name, outcome=outcome, request=id)
        if outcome not in ("answered", "rejected"):
            log.warning("a try failed", upstream=name, outcome=outcome, request=id, reason=reason)


async def _is_option_rejected(answer: Answer, call: Call) -> bool:
    """Whether the answer is an error about an option that we added to the request, not the client."""
    is_rejection = call.adds_usage and answer.status // 100 == 4
    return is_rejection and is_about_usage_option(answer.status, await answer.error_body())


def _outcome(status: int) -> AttemptOutcome:
    if status == 429:
        return "limited"
    if 200 <= status <= 299:
        return "answered"
    # A rejected request shows that the upstream works, and ends its cooldown. 401 and 402 are about our key and
    # account, and 408 is a timeout, so they show no such thing.
    return "rejected" if 400 <= status <= 499 and status not in (401, 402, 408) else "failed"
