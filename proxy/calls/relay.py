"""ONE call's whole journey: reserved, sent, its answer passed on, settled.

`Relay.carry` runs in a task of the program's own, so a client that hangs up can't stop it half way. What a client
saw complete is on the books: the end of an answer goes out when its settle is committed.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog

from proxy.calls.call import Call
from proxy.calls.disconnect import Disconnects
from proxy.calls.dispatch import Candidates, Dispatcher
from proxy.calls.reservation import Reservation
from proxy.calls.tokenizer import Tokenizers
from proxy.errors import ClientLeft, ProxyError, UpstreamError
from proxy.formats.meter import Meter
from proxy.formats.request import error_event
from proxy.formats.stream import Stream
from proxy.ledger.book import Accepted, Refused
from proxy.ledger.entry import Outcome
from proxy.ledger.queue import AdmissionQueue, DurationEstimate
from proxy.metrics import Metrics
from proxy.policy.amounts import AtLeast, Unspent
from proxy.upstreams import headers
from proxy.upstreams.client import Answer
from proxy.upstreams.failures import Rejected, failure_of

# How long a finished stream may take to close, so that its connection can be used again.
_CLOSE_S = 1.0

log = structlog.get_logger("relay")


class Relay:
    """Carries calls. `now` gives milliseconds since 1970."""

    def __init__(
        self,
        queue: AdmissionQueue,
        dispatcher: Dispatcher,
        *,
        tokenizers: Tokenizers,
        metrics: Metrics,
        disconnects: Disconnects,
        now: Callable[[], int],
    ) -> None:
        self._queue = queue
        self._ledger = queue.ledger
        self._dispatcher = dispatcher
        self._tokenizers = tokenizers
        self._metrics = metrics
        self._disconnects = disconnects
        self._now = now
        self._durations = DurationEstimate()

    async def carry(self, call: Call) -> None:
        """Carry one call to the upstream and its answer back.

        Nothing is sent that is not reserved, and every reservation ends exactly once. Raises Refusal where the
        quotas say no, and UpstreamError as long as nothing of an answer has gone out.
        """
        candidates = Candidates(call, self._tokenizers)
        async with (
            self._reserve(call, candidates) as reservation,
            self._disconnects.watch(call, reservation),
            self._blame_upstream(call, reservation),
            self._dispatcher.answer(candidates, reservation) as (asked, answer),
        ):
            if answer.status // 100 != 2:
                await self._pass_on_failure(answer, asked, reservation)
            elif answer.is_stream:
                await self._pass_on_stream(answer, asked, reservation)
            else:
                await self._pass_on_whole(answer, asked, reservation)

    @asynccontextmanager
    async def _reserve(self, call: Call, candidates: Candidates) -> AsyncIterator[Reservation]:
        """Hold what the call may use, and see that it ends; raises Refusal."""
        answer = await self._let_in(call, candidates)
        if isinstance(answer, Refused):
            for block in answer.decision.blocks:
                self._metrics.refused(block.quota.id, block.verdict.name.lower())
            now = self._now()
            raise call.refusal(answer, now, busy_s=self._durations.busy_s(now))
        first = candidates.first
        reservation = Reservation(self._ledger, answer, first.meter(), binding=call.binding, count=first.count)
        self._durations.began(answer.entry.id, self._now())
        try:
            with self._metrics.in_flight.track_inprogress():
                async with reservation:
                    yield reservation
        finally:
            self._durations.ended(answer.entry.id, self._now())
            self._count_end(call, reservation)

    def _count_end(self, call: Call, reservation: Reservation) -> None:
        entry, usage, model = reservation.entry, reservation.charged, call.model_label
        self._metrics.ended(
            endpoint=entry.labels.endpoint, model=model, outcome=reservation.outcome, would_refuse=entry.would_refuse
        )
        if usage is not None:
            self._metrics.charged(
                model=model,
                input_tokens=usage.tokens.input,
                output_tokens=usage.tokens.output,
                provenance=usage.provenance,
                hidden=usage.tokens.beyond(entry.hold),
            )

    async def _let_in(self, call: Call, candidates: Candidates) -> Accepted | Refused:
        """Ask the ledger, and wait for calls in flight if it comes to that, as long as the client does."""
        task = asyncio.current_task()
        assert task is not None, "a call runs in a task"
        call.client.on_disconnected(task.cancel)
        try:
            operation = call.reserve(candidates.demand, owner=self._ledger.owner)
            return await self._queue.reserve(operation, wait_s=call.wait_s, recount=candidates.exact_demand)
        except asyncio.CancelledError:
            if not call.client.is_disconnected:
                raise
            task.uncancel()
            raise ClientLeft from None
        finally:
            call.client.on_disconnected(None)

    @asynccontextmanager
    async def _blame_upstream(self, call: Call, reservation: Reservation) -> AsyncIterator[None]:
        """Settle what an upstream broke, and tell the client: by status, or, once an answer has begun, in band."""
        try:
            yield
        except UpstreamError as error:
            if error.was_sent:
                await reservation.settle(await reservation.usage(), "upstream_broke")
            else:
                await reservation.release()
            upstream = (reservation.model or call.model).upstream
            log.warning("upstream failed", upstream=upstream.name, call=reservation.entry.id, reason=str(error))
            if not call.client.has_begun:
                raise
            await call.client.write(error_event(call.request.endpoint, error))
            await call.client.end()

    async def _pass_on_stream(self, answer: Answer, call: Call, reservation: Reservation) -> None:
        """Each event at once, as far as it is held, and the end when it is settled."""
        client, stream = call.client, Stream(reservation.meter)
        await client.start(answer.status, self._head(answer, call, reservation))
        try:
            with client.heartbeat(lambda: stream.is_between_events):
                async for chunk in answer.chunks():
                    await client.write(stream.feed(chunk, covered=reservation.covered))
                    while stream.is_held_up:
                        if not await reservation.grow(
                            self._queue, wait_s=call.pause_s, is_disconnected=lambda: client.is_disconnected
                        ):
                            return await self._end_at_limit(stream, call, reservation)
                        await client.write(stream.feed(b"", covered=reservation.covered))
                    if stream.is_over:
                        break
        except UpstreamError:
            if not stream.is_between_events:
                client.abort()  # an error event would become a part of the one that broke off
            raise
        stream.close(covered=reservation.covered)
        await reservation.settle(await reservation.usage(), _outcome(call, reservation.meter))
        await client.write(stream.end())
        await client.end()
        await _use_up(answer)

    async def _end_at_limit(self, stream: Stream, call: Call, reservation: Reservation) -> None:
        """No more is to be had: end the answer as its own maximum would have, and leave the upstream."""
        # A usage that was said covers the event that was withheld too, so it counts up to the hold, as guesses do.
        await reservation.settle(AtLeast((await reservation.usage()).tokens), "at_limit")
        assert reservation.charged is not None, "it was settled"
        await call.client.write(stream.end_at_limit(reservation.charged.tokens))
        await call.client.end()

    async def _pass_on_whole(self, answer: Answer, call: Call, reservation: Reservation) -> None:
        body = await answer.whole()
        reservation.meter.see_whole(body)
        if not await reservation.covers_whole(self._queue):
            await reservation.settle(AtLeast((await reservation.usage()).tokens), "at_limit")
            raise UpstreamError(
                "The upstream gave a whole answer where a stream was asked, and no quota has room for it."
            )
        await reservation.settle(await reservation.usage(), _outcome(call, reservation.meter))
        call.client.send(answer.status, self._head(answer, call, reservation), body)

    async def _pass_on_failure(self, answer: Answer, call: Call, reservation: Reservation) -> None:
        """An error instead of an answer: what it means decides what is charged and what the client sees."""
        failure = failure_of(answer.status, await answer.beginning(), answer.retry_after, call.model.upstream)
        if isinstance(failure, Rejected):
            await reservation.settle(Unspent(requests=1), "rejected")
        else:
            await reservation.release()
        if isinstance(failure, ProxyError):
            raise failure
        call.client.send(
            failure.status, {**self._quota_headers(call, reservation), **headers.JSON_HEADERS}, failure.body
        )

    def _head(self, answer: Answer, call: Call, reservation: Reservation) -> dict[str, str]:
        passed = headers.to_client(answer.headers, is_stream=answer.is_stream)
        return {**passed, **self._quota_headers(call, reservation)}

    def _quota_headers(self, call: Call, reservation: Reservation) -> dict[str, str]:
        is_held = reservation.outcome is None
        return call.quota_headers(reservation.entry, reservation.counters, self._now(), is_held=is_held)


def _outcome(call: Call, meter: Meter) -> Outcome:
    if call.client.is_disconnected:
        return "client_left"
    return "upstream_broke" if meter.has_error else "complete"


async def _use_up(answer: Answer) -> None:
    """Read what is left behind the end, so that the connection can carry another call."""
    try:
        async with asyncio.timeout(_CLOSE_S):
            async for _ in answer.chunks():
                pass
    except (UpstreamError, TimeoutError):
        pass  # then it is closed instead
