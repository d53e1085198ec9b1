"""The path of one call: reserve, send, forward the answer, settle.

`Relay.carry` is the whole path in one function. It runs in the task of the HTTP request. A client that disconnects
does not cancel that task; the call is told, and decides.

The end of an answer is sent only when its charge is committed, or after `reservation.COMMIT_WAIT_S`. So unless the
database is slower than that, a client that has a complete answer has been charged for it, even if the proxy is killed
in the next moment.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count

import structlog

from proxy.calls.activity import Activity
from proxy.calls.call import Call, Responder, closed_refusal
from proxy.calls.disconnect import Disconnects
from proxy.calls.dispatch import Candidates, Dispatcher, with_heartbeat
from proxy.calls.recorded_names import OTHER, RecordedNames
from proxy.calls.reservation import Reservation
from proxy.calls.stored_responses import StoredResponses
from proxy.errors import ClientLeft, ProxyError, UpstreamError
from proxy.formats.endpoints import Endpoint
from proxy.formats.mask import Mask
from proxy.formats.maximum import with_note
from proxy.formats.meter import Meter
from proxy.formats.reported_error import is_only_error, reports_error, status_of_error
from proxy.formats.stream import Stream
from proxy.formats.strict_json import reading_cost
from proxy.formats.surfaces import error_event
from proxy.identity.authentication import Caller, Snapshot
from proxy.ledger.book import Accepted, Refused, Reserve
from proxy.ledger.entry import Outcome
from proxy.ledger.queue import AdmissionQueue
from proxy.policy.admission import Verdict
from proxy.upstreams import headers
from proxy.upstreams.client import Answer
from proxy.upstreams.failures import Failed, Rejected, failure_of

# One complete answer of so many is counted although its usage is stated, to compare the two counts.
_COMPARED = 16
# How long to wait for the end of the body after the last event of a stream, to reuse the connection.
_READ_TO_END_S = 1.0

# The ids of requests at all vendors. A longer or other text may be an error's.
_UPSTREAM_REQUEST = re.compile(r"[A-Za-z0-9._-]{8,80}")

# Returns a call as it is by the policy in force: itself if nothing has changed since it was prepared. Raises what the
# preparation raises.
Renew = Callable[[Call], Awaitable[Call]]

log = structlog.get_logger("relay")


class Relay:
    """Takes calls to an upstream and back. `threads` and `model_lists` are those of the dispatcher.

    `activity` is told what the calls do, for whoever watches, and `metrics` are those of the dispatcher.
    `now` gives milliseconds since 1970. Only durations are taken from it: what a client is told goes by the ledger's
    clock.
    """

    def __init__(
        self,
        queue: AdmissionQueue,
        dispatcher: Dispatcher,
        *,
        stored_responses: StoredResponses,
        activity: Activity,
        disconnects: Disconnects,
        now: Callable[[], int],
    ) -> None:
        self.threads = dispatcher.threads
        self.model_lists = dispatcher.model_lists
        self._queue = queue
        self._ledger = queue.ledger
        self._dispatcher = dispatcher
        self._stored_responses = stored_responses
        self.metrics = dispatcher.metrics
        self._activity = activity
        self._disconnects = disconnects
        self._now = now
        self._durations = dispatcher.durations
        self._recorded_names = RecordedNames()
        self._answered = count()

    async def carry(self, call: Call, renew: Renew) -> None:
        """Take one call to an upstream, and its answer to the client.

        Nothing is sent that is not reserved, and every reservation ends exactly once: the first end counts. Until the
        quotas admit the call, `renew` replaces it when the policy changes; from then on it stays as it is.

        Raises Refusal if a quota refuses the call, what `renew` raises, ClientLeft, LedgerUnavailable, and
        UpstreamError as long as nothing of an answer has been sent. After that an error is sent as an event of the
        stream, also if only the head was sent, because the upstream was silent for longer than its `heartbeat`.
        """
        reply, call, candidates = await self._admit(call, renew)
        client = call.client
        if isinstance(reply, Refused):
            raise self._refusal(call, reply)
        reservation = self._begin(call, reply)
        watch = self._disconnects.watch(call, reservation)
        try:
            try:
                chosen = await self._dispatcher.answer(candidates, reservation, start=self._start_stream)
                assert chosen.answer is not None, "a candidate that was returned has an answer"
                try:
                    await self._forward(chosen.answer, chosen.sent, reservation)
                finally:
                    chosen.close()
            except ProxyError as error:  # the client may leave while it is told
                await self._end_failed(error, call, reservation)
        except asyncio.CancelledError:  # by `watch`, or because the server stops
            # What has arrived says nothing about the cost of a drain that was cut, or of an answer that is not
            # streamed.
            charges_full_hold = watch.is_drain_cut or not call.request.stream
            outcome: Outcome = "client_left" if client.is_disconnected else "stopped"
            await reservation.end(outcome, charges_full_hold=charges_full_hold)
            if not client.is_disconnected:
                raise
            client.task.uncancel()
        finally:
            watch.stop()
            try:
                await reservation.end("proxy_broke")  # unless it has ended, as it should have
            finally:
                self._note_end(call, reservation)

    async def refuse_if_closed(
        self, endpoint: Endpoint, caller: Caller, snapshot: Snapshot, client: Responder
    ) -> None:
        """Raise the Refusal of a user whom limits of 0 admit to no model, whatever the request is."""
        policy, now = snapshot.policy, self._ledger.now()
        closing = policy.closing(
            caller.groups,
            snapshot.catalog,
            endpoint.uses,
            user=caller.user,
            now=now,
            by_piece=endpoint.by_piece,
        )
        if not closing:
            return
        binding = policy.bound(*closing).for_user(caller.user)
        counters = await self._ledger.counters(binding.keys())
        for quota in closing:
            self.metrics.refused(quota.id, Verdict.EXHAUSTED.word, model=OTHER)  # the body was not read
        refused, error = closed_refusal(binding, counters, now, policy=policy, endpoint=endpoint, id=client.id)
        self._activity.refused(client.line, refused, binding)
        raise error

    def _refusal(self, call: Call, refused: Refused) -> ProxyError:
        """Note a refusal. Returns the error that tells the client."""
        line = call.client.line
        line.refused_by = [block.quota.id for block in refused.decision.blocks]
        line.verdict = refused.decision.verdict.word
        for quota_id in line.refused_by:
            self.metrics.refused(quota_id, line.verdict, model=call.model_label)
        self._activity.refused(line, refused, call.binding)
        return call.refusal(refused, busy_s=self._durations.busy_s(self._now()))

    def _begin(self, call: Call, accepted: Accepted) -> Reservation:
        """Note an admitted call."""
        call.client.line.mark_admitted(accepted.entry)
        self._durations.began(accepted.entry.id, self._now())
        self._activity.began(call.client.line)
        self.metrics.calls_in_flight += 1
        return Reservation(self._ledger, accepted, binding=call.binding)

    def _note_end(self, call: Call, reservation: Reservation) -> None:
        """Note the end of an admitted call: in the log, the metrics, and for whoever watches."""
        line, entry, usage, target = call.client.line, reservation.entry, reservation.charged, reservation.target
        outcome, model = reservation.outcome, call.model_label
        self.metrics.calls_in_flight -= 1
        self._durations.ended(entry.id, self._now())
        line.outcome, line.usage = outcome, usage
        if target is not None:
            line.upstream = target.upstream.name
            if call.is_listed:  # of an unlisted model the name at the upstream is what the client wrote
                line.upstream_model = target.upstream_model
        self._activity.ended(line)
        self._stored_responses.delete_unless_complete(call, reservation)
        charged = None
        if usage is not None:
            tokens = usage.tokens
            # Beyond the hold is input that the request did not show, or an upstream that ignored its maximum.
            charged = usage.provenance, tokens.input, tokens.output, tokens.beyond(entry.hold)
            if target is not None and outcome == "complete" and usage.provenance != "unspent":
                self.metrics.answered(
                    target.upstream.name,
                    model,
                    is_stated=usage.provenance == "exactly",
                    counted=reservation.meter.counted_and_stated if next(self._answered) % _COMPARED == 0 else None,
                )
        self.metrics.ended(
            endpoint=entry.labels.endpoint,
            group=entry.admitted_via,
            model=model,
            outcome=outcome,
            would_refuse=entry.would_refuse,
            charged=charged,
        )

    async def _admit(self, call: Call, renew: Renew) -> tuple[Accepted | Refused, Call, Candidates]:
        """Ask the ledger, and if only calls in flight prevent it, wait for them. Raises ClientLeft.

        Returns the reply, and the call and its candidates by the policy that decided. Nothing is sent and nothing is
        held while the call waits, so a disconnect simply cancels it.
        """
        client = call.client
        client.on_disconnected(client.task.cancel)
        try:
            candidates = await self._dispatcher.candidates(call)

            def operation() -> Reserve:
                recorded_model = self._recorded_names.name_of(call, self._now())
                return call.reserve(candidates.demand, owner=self._ledger.owner, recorded_model=recorded_model)

            async def renewed() -> Reserve | None:
                nonlocal call, candidates
                latest = await renew(call)
                if latest is call:
                    return None
                call, candidates = latest, await self._dispatcher.candidates(latest)
                return operation()

            client.line.asked_s = client.line.clock()
            time = asyncio.get_running_loop().time
            began_s = time()
            reply = await self._queue.reserve(
                operation(),
                wait_s=call.wait_s,
                recount=lambda: candidates.exact_demand(),  # of the latest candidates
                renew=renewed,
            )
            candidates.wait_s -= time() - began_s  # the rest is for a slot of an upstream
            return reply, call, candidates
        except asyncio.CancelledError:
            if not client.is_disconnected:
                raise  # the server stops
            client.task.uncancel()
            raise ClientLeft from None

    async def _end_failed(self, error: ProxyError, call: Call, reservation: Reservation) -> None:
        """End a call whose upstream failed. Raises the error, or sends it as an event if the answer has begun."""
        call.client.line.error = error
        if isinstance(error, UpstreamError):
            # An error answer has ended the call already (its status says what is charged): the first end counts.
            await reservation.end("upstream_broke" if error.was_sent else "upstream_failed")
            upstream = (reservation.target or call.model).upstream
            log.warning("upstream failed", upstream=upstream.name, request=call.client.id, reason=error.reason)
        if not call.client.has_begun:
            raise error
        # The status 200 is sent already. A stream that just stopped would look complete to an SDK.
        await call.client.write(error_event(call.request.endpoint, error))
        await call.client.end()

    async def _forward(self, answer: Answer, call: Call, reservation: Reservation) -> None:
        """Forward an answer to the client, and end the call."""
        call.client.line.upstream_request = _logged_id(answer)
        if answer.status // 100 != 2:
            await self._forward_error(answer, call, reservation)
        elif await self._begins_stream(answer, call, reservation):
            await self._forward_stream(answer, call, reservation)
        else:
            await self._forward_whole(answer, call, reservation)

    async def _begins_stream(self, answer: Answer, call: Call, reservation: Reservation) -> bool:
        """Whether the answer is a stream. Its first bytes decide, because headers are sometimes wrong in either way.

        If a stream was requested and the header says that it comes, the head is sent at once: a model may reason for
        minutes before its first byte, and heartbeats keep the connection to the client open meanwhile.
        """
        # Text and audio are answers of their own, and a transcript may begin like a stream.
        is_json = call.request.endpoint.surface != "media"
        if not (call.request.stream or answer.is_event_stream or is_json):
            return False
        if not (call.client.has_begun or (call.request.stream and answer.is_event_stream)):
            return await with_heartbeat(answer.carries_events(), call, reservation, self._start_stream)
        await self._start_stream(call, reservation, answer)
        with call.client.heartbeat(lambda: True):
            return await answer.carries_events()

    async def _start_stream(self, call: Call, reservation: Reservation, answer: Answer | None = None) -> None:
        """Send the head of a stream, unless it was sent already. Without an `answer` it has only our own headers."""
        if not call.client.has_begun:
            status = 200 if answer is None else answer.status
            await call.client.start(status, self._answer_headers(answer, call, reservation, is_stream=True))

    async def _forward_stream(self, answer: Answer, call: Call, reservation: Reservation) -> None:
        """Forward each event at once if the hold covers it, and the end when it is settled.

        An event that is not covered waits until the hold has grown. If it cannot grow, the stream is ended before it.
        """
        client = call.client
        stream = Stream(reservation.meter, mask=answer.mask)
        await self._start_stream(call, reservation, answer)
        await reservation.count.ready()  # only the first stream of a process has to wait

        def forward(chunk: bytes) -> bool:
            """Send what may pass of it. Returns whether more may be taken at once."""
            keeps_up = client.write_now(stream.feed(chunk, covered=reservation.covered))
            return keeps_up and not (stream.is_waiting_for_hold or stream.is_over)

        try:
            with client.heartbeat(lambda: stream.is_between_events):
                while await answer.pass_on(forward):
                    await client.drain()
                    while stream.is_waiting_for_hold:
                        if not await reservation.grow(
                            self._queue, wait_s=call.extend_wait_s, is_disconnected=lambda: client.is_disconnected
                        ):
                            return await self._end_at_limit(stream, call, reservation)
                        # The event that waited passes now, and those after it as far as they are covered.
                        await client.write(stream.feed(b"", covered=reservation.covered))
                    if stream.is_over:
                        break
        except UpstreamError:
            if not stream.is_between_events:
                client.abort()  # an error event would end up inside the event that broke off
            raise
        client.line.mark_answered()
        stream.close(covered=reservation.covered)
        await reservation.end(_outcome(call, reservation.meter))
        await client.write(stream.end())
        await client.end()
        # The rest of the body after the last event, usually nothing, so that the connection can be used again.
        with suppress(UpstreamError, TimeoutError):
            async with asyncio.timeout(_READ_TO_END_S):
                await answer.pass_on(lambda _: True)

    async def _end_at_limit(self, stream: Stream, call: Call, reservation: Reservation) -> None:
        """End the answer because no more can be held.

        The client gets the end that the upstream would have sent at its own maximum (`finish_reason: "length"`), so
        an SDK takes the answer for complete but cut. Leaving the block closes the connection to the upstream.
        """
        await reservation.end("at_limit")
        assert reservation.charged is not None, "set by settle"
        await call.client.write(stream.end_at_limit(reservation.charged.tokens))
        await call.client.end()

    async def _forward_whole(self, answer: Answer, call: Call, reservation: Reservation) -> None:
        """Forward an answer that is not a stream, after it is settled.

        The head of a stream may be sent already: its header has promised one, or the upstream was silent for longer
        than its `heartbeat`. Then the body follows as it is, but an error as an event, because SDKs ignore JSON that
        is in no event, and would take the stream for an empty answer.
        """
        body, meter = await answer.read(), reservation.meter
        call.client.line.mark_answered()
        await self.threads.run(meter.see_whole, body, cost=reading_cost(body))
        if not await reservation.hold_whole_answer(self._queue):
            await reservation.end("at_limit")
            raise UpstreamError(
                "The upstream sent a whole answer where a stream was requested, and your quotas have no room for it. "
                "Send the request without `stream`, or with a smaller maximum."
            )
        await reservation.end(_outcome(call, meter))
        mask = answer.mask
        # Without `has_error`, a body that is no JSON is audio or subtitles.
        is_error = meter.has_error or reports_error(body, meter.chunk or {})
        body = (mask.in_error if is_error else mask.anywhere)(body, is_cut=meter.chunk is None)
        if call.client.has_begun:
            if is_error and meter.chunk is not None and is_only_error(meter.chunk):
                raise Failed(status_of_error(body) or UpstreamError.status, body).error()
            await call.client.write(body)
            await call.client.end()
        else:
            headers_ = self._answer_headers(answer, call, reservation, is_stream=False)
            call.client.send(answer.status, headers_, body)

    async def _forward_error(self, answer: Answer, call: Call, reservation: Reservation) -> None:
        """Forward an error answer. Its meaning decides what is charged and what the client sees."""
        upstream, body = call.model.upstream, await answer.error_body()
        failure = failure_of(answer.status, body, answer.retry_after, upstream, answer.mask)
        if isinstance(failure, UpstreamError):
            failure.reason = answer.status_reason
        await reservation.end("rejected" if isinstance(failure, Rejected) else "upstream_failed")
        if isinstance(failure, ProxyError):
            raise failure
        shown = failure.body
        if call.is_about_maximum(answer.status, body):
            shown = with_note(
                shown,
                f" The maximum of {call.maximum} tokens was written by this proxy, because quota "
                f'"{reservation.entry.capped_by}" has no more left for this answer.',
            )
        if call.client.has_begun:
            raise replace(failure, body=shown).error()
        call.client.send(failure.status, {**self._quota_headers(call, reservation), **headers.JSON_HEADERS}, shown)

    def _answer_headers(
        self, answer: Answer | None, call: Call, reservation: Reservation, *, is_stream: bool
    ) -> dict[str, str]:
        # There is no answer at the head of a stream that the upstream has not begun yet.
        received, mask = (headers.NO_HEADERS, Mask()) if answer is None else (answer.headers, answer.mask)
        return headers.to_client(received, is_stream=is_stream, mask=mask) | self._quota_headers(call, reservation)

    def _quota_headers(self, call: Call, reservation: Reservation) -> dict[str, str]:
        is_held = reservation.outcome is None
        return call.quota_headers(reservation.entry, reservation.counters, self._ledger.now(), is_held=is_held)


def _logged_id(answer: Answer) -> str | None:
    """The upstream's id of the request, for the log. A text that may be something else is left out."""
    id = answer.headers.get("x-request-id") or answer.headers.get("request-id")  # OpenAI's name, and Anthropic's
    if id is None or not _UPSTREAM_REQUEST.fullmatch(id):
        return None
    return id if answer.mask.in_header(id) == id else None


def _outcome(call: Call, meter: Meter) -> Outcome:
    if call.client.is_disconnected:
        return "client_left"
    return "upstream_broke" if meter.has_error else "complete"
