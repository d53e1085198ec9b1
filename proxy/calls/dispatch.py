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

from proxy.calls.call import Passage
from proxy.calls.reservation import Reservation
from proxy.calls.token_count import CallCount
from proxy.calls.tokenizer import Tokenizers
from proxy.errors import UpstreamError, UpstreamTimeout
from proxy.formats.estimate import most_of
from proxy.formats.meter import Meter
from proxy.ledger.book import Entry
from proxy.metrics import Metrics
from proxy.policy.policy import Model, Upstream
from proxy.policy.quota import Demand
from proxy.upstreams.addresses import Habits, is_about_usage_option
from proxy.upstreams.client import Answer, Upstreams
from proxy.upstreams.routing import UNREACHED_PAUSE_MS, Choice, Rests, may_go_elsewhere, seconds_of
from proxy.upstreams.spool import Spliced

# What became of one try, as it is counted.
TryOutcome = Literal["answered", "rejected", "limited", "failed", "unreachable", "timed_out", "broke_off"]

log = structlog.get_logger("tries")


class Way:
    """A call as one of the upstreams is to get it: there it has a body, a count and a meter of its own."""

    def __init__(self, passage: Passage, tokenizers: Tokenizers, *, keeps_body: bool) -> None:
        body = passage.body()
        self.passage = passage
        self.count = CallCount(
            tokenizers, passage.call, passage.model, body_bytes=len(body), previous=passage.previous
        )
        self._body = body if keeps_body else None

    @property
    def upstream(self) -> Upstream:
        """Who would get it."""
        return self.passage.model.upstream

    def meter(self) -> Meter:
        """What watches its answer."""
        return Meter(self.passage.call, count=self.count.piece, kind=self.upstream.kind)

    def body(self, entry: Entry) -> bytes | Spliced:
        """What is sent, with its maximum lowered where less is left than it wants."""
        return self.passage.body_for(entry) if self._body is None or entry.capped_by else self._body


class Ways:
    """A call as each of the upstreams that serve its model is to get it; `demand` covers all of them."""

    def __init__(self, passage: Passage, tokenizers: Tokenizers) -> None:
        self.places = passage.model.everywhere
        # Of several the bodies are written when they are sent: a large one need not be kept for each.
        keeps_body = len(self.places) == 1
        self._ways = [Way(passage.at(place), tokenizers, keeps_body=keeps_body) for place in self.places]
        self.demand = most_of([way.count.demand for way in self._ways])
        self.first = self._ways[0]
        self._call = passage.call

    async def exact_demand(self) -> Demand:
        """The same with the input counted."""
        return most_of([await way.count.exact_demand() for way in self._ways])

    def to(self, place: Model) -> Way:
        """The way to one of the places."""
        return next(way for way in self._ways if way.passage.model is place)

    def forget(self) -> None:
        """Let go of what was to be sent: there is an answer, and a long one must not keep it."""
        self._ways = []
        del self.first
        self._call.forget()


class Tries:
    """Sends calls. `now` gives milliseconds since 1970, `draw` random numbers far larger than any sum of weights."""

    def __init__(
        self, upstreams: Upstreams, *, metrics: Metrics, now: Callable[[], int], draw: Callable[[], int]
    ) -> None:
        self._upstreams = upstreams
        self._metrics = metrics
        self._now = now
        self._draw = draw
        self._rests = Rests()
        self._habits = Habits()

    @asynccontextmanager
    async def answer(self, ways: Ways, reservation: Reservation) -> AsyncIterator[tuple[Passage, Answer]]:
        """Hand out the answer, and the passage to who gave it: the first that is one, else the last failure in words.

        Raises UpstreamError where no upstream said anything, or where the call may have run without an answer.
        """
        choice: Choice | None = Choice(ways.places, until=self._now() + ways.first.passage.policy.retry_for_ms)
        told: tuple[Passage, Answer] | None = None
        while choice is not None:
            if choice.pause_ms:
                await asyncio.sleep(choice.pause_ms / 1000)
            way = ways.to(self._rests.choose(choice.left, self._now(), draw=self._draw()))
            async with AsyncExitStack() as connection:
                try:
                    answer = await connection.enter_async_context(self._ask(way, reservation))
                except UpstreamError as error:
                    choice = self._after_error(error, choice, way)
                    if choice is None and (error.was_sent or told is None):
                        raise
                    reservation.is_sent = False
                else:
                    choice = self._after_answer(answer, choice, way)
                    if choice is None:
                        passage = way.passage
                        del way
                        yield passage, answer
                        return
                    reservation.is_sent = False  # it was turned away: whoever leaves now owes nothing
                    await answer.beginning()
                    told = way.passage, answer
        assert told is not None, "else the last error was raised"
        reservation.model = told[0].model
        yield told

    @asynccontextmanager
    async def _ask(self, way: Way, reservation: Reservation) -> AsyncIterator[Answer]:
        """Send it; once more where it would be taken but for the option by which we ask for the usage of a stream."""
        await way.count.before_it_is_sent()
        passage, meter = way.passage, way.meter()
        if passage.adds_usage and not self._habits.may_ask(passage.address, passage.model):
            passage = passage.without_option()
            meter.did_not_ask()
        body = way.body(reservation.entry) if passage is way.passage else passage.body_for(reservation.entry)
        reservation.ask(passage.model, meter, count=way.count)
        del way  # with its body, which a long answer must not keep
        async with self._send(passage, body) as answer:
            del body
            if not await _is_option_refused(answer, passage):
                if passage.adds_usage and answer.status // 100 == 2:
                    self._habits.note(passage.address, passage.model, is_taken=True)
                yield answer
                return
        passage = passage.without_option()
        meter.did_not_ask()
        async with self._send(passage, passage.body_for(reservation.entry)) as answer:
            if answer.status // 100 == 2:
                log.info(
                    "upstream takes no stream_options",
                    upstream=passage.model.upstream.name,
                    model=passage.model_label,
                )
                self._habits.note(passage.address, passage.model, is_taken=False)
            yield answer

    def _send(self, passage: Passage, body: bytes | Spliced) -> AbstractAsyncContextManager[Answer]:
        return self._upstreams.send(passage.model.upstream, passage.address, body, passage.headers())

    def _after_error(self, error: UpstreamError, choice: Choice, way: Way) -> Choice | None:
        self._rests.failed(way.upstream, self._now())
        if error.was_sent:
            self._count(way, "timed_out" if isinstance(error, UpstreamTimeout) else "broke_off")
            return None
        self._count(way, "unreachable")
        return self._next(choice, way, pause_ms=UNREACHED_PAUSE_MS)

    def _after_answer(self, answer: Answer, choice: Choice, way: Way) -> Choice | None:
        outcome = _outcome(answer.status)
        self._count(way, outcome)
        if outcome in ("answered", "rejected"):
            self._rests.answered(way.upstream)
            return None
        retry_after_s = seconds_of(answer.retry_after)
        self._rests.failed(way.upstream, self._now(), retry_after_s=retry_after_s)
        if not may_go_elsewhere(answer.status):
            return None
        return self._next(choice, way, pause_ms=None if retry_after_s is None else retry_after_s * 1000)

    def _next(self, choice: Choice, way: Way, *, pause_ms: int | None) -> Choice | None:
        if way.passage.client.is_gone:
            return None
        return choice.after(way.passage.model, pause_ms=pause_ms, now=self._now())

    def _count(self, way: Way, outcome: TryOutcome) -> None:
        self._metrics.tries.labels(way.upstream.name, outcome).inc()
        if outcome not in ("answered", "rejected"):
            log.warning("a try failed", upstream=way.upstream.name, outcome=outcome, call=way.passage.client.id)


async def _is_option_refused(answer: Answer, passage: Passage) -> bool:
    """Whether this is an error about what we wrote into the request, and not the client."""
    is_refusal = passage.adds_usage and answer.status // 100 == 4
    return is_refusal and is_about_usage_option(answer.status, await answer.beginning())


def _outcome(status: int) -> TryOutcome:
    if status == 429:
        return "limited"
    if 200 <= status <= 299:
        return "answered"
    # 401 and 402 speak of us, and 408 of the time: none of them says that the upstream does what it is there for.
    return "rejected" if 400 <= status <= 499 and status not in (401, 402, 408) else "failed"
