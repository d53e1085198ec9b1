"""Sends one call to one upstream after another until one of them answers it.

The client does not see the failed attempts, and they cost nothing: there is one reservation for all attempts, and it
is charged what the upstream that answered used.

A call that may have run is never sent again:

    could not connect                              sent again
    429, 401, 402, 5xx except 504 and 524          sent again: the status says that the call did not run
    401, and our key was fetched                   first sent once more with a new key, if there is another one
    2xx in an unknown compression                  sent to another upstream: nobody can read the answer
    connection closed without an answer            not sent again: it may have run
    no answer in time, 408, 504, 524               not sent again: it may still run
    nothing of an answer in `first_byte_timeout`   sent to another upstream, if the operator has set it: see below
    an error whose body is about our key, account  as with 401 and 402, whatever its status (LiteLLM: 400, 422)
    other 4xx                                      not sent again: every upstream would reject the request
    3xx                                            not sent again: redirects are not followed
    2xx, but its whole body is an error            as the status says that the error states
    any other 2xx                                  the answer, even if its body breaks off later

An example with two upstreams: `box` answers 503, so the call goes to `openai` at once. If `openai` cannot be reached
either, the client gets the 503 of `box`, because an error answer is more informative than a failed
connection.

`first_byte_timeout` is the one exception: a call that may still run is sent to another upstream. The attempt is
closed and costs the user nothing, and the metric counts it as `abandoned`, because its upstream may bill it. The
answer has not begun until the first byte of its body is there, since many servers send the head of a stream at once.
A call that stores something at the upstream, or has tools run there, is not moved: both upstreams would do it.

Each attempt has a slot of its upstream (`max_in_flight`) until its connection is closed. An upstream without a free
slot is not asked while another can be. If none can, the call waits for a slot, for as long as it may wait for calls
in flight, then it is a 503.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Literal, TypeVar

import structlog

from proxy.calls.body_threads import BodyThreads
from proxy.calls.call import Call
from proxy.calls.reservation import Reservation
from proxy.calls.token_count import TokenCount, prompt_of
from proxy.calls.tokenizer import Tokenizers
from proxy.errors import UpstreamError, UpstreamFull, UpstreamTimeout, UpstreamUnreadable, UpstreamWithoutKey
from proxy.formats.content import Prompt
from proxy.formats.estimate import largest_demand, stated_maximum
from proxy.formats.kinds import kind_of
from proxy.formats.meter import Meter
from proxy.formats.reported_error import status_of_error
from proxy.formats.surfaces import meter_of
from proxy.ledger.queue import DurationEstimate
from proxy.metrics import Metrics
from proxy.policy.catalog import FETCHED_KEYS, Catalog, Model
from proxy.policy.quota import Demand
from proxy.upstreams.client import Answer, Upstreams
from proxy.upstreams.failures import status_for_routing
from proxy.upstreams.models import ModelLists
from proxy.upstreams.routing import (
    UNREACHED_PAUSE_MS,
    Cooldowns,
    LastFailure,
    RoutingState,
    may_try_another_target,
    seconds_of,
)
from proxy.upstreams.slots import Slots
from proxy.upstreams.spool import Spliced
from proxy.upstreams.usage_option import UsageOptionCache, is_about_usage_option

# The result of one attempt, as a label of the metric `llm_quota_tries`.
AttemptOutcome = Literal[
    "answered", "rejected", "limited", "failed", "unreachable", "timed_out", "broke_off", "abandoned"
]

# How much of the reason of an upstream's last failure is kept, in characters.
_REASON_MAX = 300

T = TypeVar("T")
# Sends the head of a stream to the client.
Start = Callable[[Call, Reservation], Awaitable[None]]


class Candidate:
    """A call in the form in which one of its targets gets it, with its own body and token count.

    `sent` is the call as it was sent last, and `answer` the answer to that. An attempt without an answer leaves both.
    `has_slot` says that a slot of its upstream was taken for it. `written` is the body, if it was written in advance.
    """

    __slots__ = ("_slots", "answer", "call", "count", "has_slot", "sent", "upstream", "written")

    def __init__(self, call: Call, tokenizers: Tokenizers, slots: Slots, *, prompt: Prompt, keeps_body: bool) -> None:
        body = call.body()
        self.call = self.sent = call
        self.answer: Answer | None = None
        self.upstream = call.model.upstream
        self.count = TokenCount(
            tokenizers, call.request, call.model, prompt=prompt, body_bytes=len(body), previous=call.previous
        )
        self.has_slot = False
        self._slots = slots
        self.written = body if keeps_body else None

    def meter(self) -> Meter:
        """A new meter for its answer."""
        demand = self.count.demand
        return meter_of(
            self.call.request,
            count=self.count.count_output,
            kind=self.upstream.kind,
            output_bound=demand.output_maximum,
            input_bound=demand.input + demand.hidden_input,
            extra_usage=self.upstream.extra_usage,
        )

    def body(self, call: Call) -> bytes | Spliced:
        """The body to send for `call`: this candidate's, or the same without the usage option or with a maximum."""
        return call.body() if self.written is None or call is not self.call else self.written

    def close(self) -> None:
        """Close the connection, or keep it for another call, and give the slot back. More than once is harmless."""
        if self.answer is not None:
            self.answer.close()
        if self.has_slot:
            self.has_slot = False
            self._slots.give_back(self.upstream.name, self.call.caller.user)


class Candidates:
    """A call in the form in which each target of its model gets it. `demand` is enough for any of them.

    `wait_s` is how long it may still wait for calls in flight, in seconds.
    """

    __slots__ = ("_candidates", "demand", "first", "targets", "wait_s")

    def __init__(self, call: Call, tokenizers: Tokenizers, slots: Slots) -> None:
        self.wait_s = call.wait_s
        self.targets = call.model.targets
        # With several targets the body is written again when it is sent. Otherwise one of 10 MB would be kept once
        # for each target.
        keeps_body, prompt = len(self.targets) == 1, prompt_of(call.request)
        self._candidates = [
            Candidate(call.with_target(target), tokenizers, slots, prompt=prompt, keeps_body=keeps_body)
            for target in self.targets
        ]
        self.first = self._candidates[0]
        self.demand = self.first.count.demand
        if len(self.targets) > 1:
            self.demand = largest_demand([candidate.count.demand for candidate in self._candidates])

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
        for candidate in self._candidates:
            if candidate.call.model is target:
                return candidate
        raise AssertionError("the target is none of this call")

    def free_body(self) -> None:
        """Drop all bodies. Only the texts of the input stay, in case they have to be counted."""
        for candidate in self._candidates:
            candidate.written = None
        self.first.call.request.body.free()


class Dispatcher:
    """Sends calls, and remembers which upstreams are in cooldown and which accept the usage option.

    `now` gives milliseconds since 1970, `draw` random numbers from a range far larger than any sum of weights.
    `threads` read and write large bodies. `durations` is told by the relay how long calls take.
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
        self.slots = Slots()
        self.durations = DurationEstimate()
        self._usage_options = UsageOptionCache()
        self._log = structlog.get_logger("tries").bind()  # once, because that takes longer than to skip a line

    def set_catalog(self, catalog: Catalog) -> None:
        """Take the numbers of slots from this catalog, also for calls that wait for one."""
        self.slots.set_limits({upstream.name: upstream.max_in_flight for upstream in catalog.upstreams.values()})

    async def candidates(self, call: Call) -> Candidates:
        """The call in the form in which each target gets it. Raises BodiesWaitTooLong if its body is large."""
        cost = call.request.body.cost
        candidates = await self.threads.run(Candidates, call, self._tokenizers, self.slots, cost=cost)
        await candidates.set_contexts(self.model_lists)
        return candidates

    async def answer(self, candidates: Candidates, reservation: Reservation, *, start: Start) -> Candidate:
        """The candidate whose answer is for the client. The caller closes it.

        It has the first answer that is not to be retried, else the last error answer. Raises UpstreamError if no
        upstream answered, or if the call may have run and gave no answer, and UpstreamFull if it got no slot in time.

        `start` sends the head of the stream, if the upstream has a `heartbeat` and is silent for so long.
        """
        routing: RoutingState | None = RoutingState(
            candidates.targets, deadline=self._now() + candidates.first.call.policy.retry_for_ms
        )
        last_failure: Candidate | None = None
        while routing is not None:
            target, state = await self._next_target(candidates, routing)
            if target is None:
                break
            candidate = candidates.for_target(target)
            candidate.has_slot = True
            is_final = False
            try:
                answer = await self._attempt(candidate, reservation, start)
                status = answer.status
                if len(state.remaining) > 1 or status // 100 != 2:
                    status = await _status_from_body(answer, candidate.sent, reservation, start)
                routing = self._after_answer(answer, status, state, candidate)
                is_final = routing is None
                if is_final:
                    candidates.free_body()
                    return candidate
                # The call did not run. If the client leaves before the next attempt, nothing is charged.
                reservation.is_sent = False
                if answer.status // 100 != 2:  # otherwise its whole body has been read
                    await answer.error_body()  # kept by `answer`, whose connection is closed now
                last_failure = candidate
            except UpstreamError as error:
                routing = self._after_error(error, state, candidate)
                if routing is None and (error.was_sent or last_failure is None):
                    raise
                # Nothing reached the upstream, nobody can read its answer, or the attempt was abandoned.
                reservation.is_sent = False
            finally:
                if not is_final:
                    candidate.close()
        if last_failure is None:
            raise self._full()
        reservation.target = last_failure.call.model
        candidates.free_body()
        return last_failure

    def _take_free(self, targets: Sequence[Model], candidates: Candidates) -> Model | None:
        """One of these targets, with a slot of its upstream; None if one of their upstreams is full."""
        for target in targets:
            if self.slots.is_full(target.upstream.name):
                return None
        target = self.cooldowns.choose(targets, self._now(), draw=self._draw())
        self.slots.take(target.upstream.name, candidates.first.call.caller.user)
        return target

    async def _next_target(self, candidates: Candidates, routing: RoutingState) -> tuple[Model | None, RoutingState]:
        """The target of the next attempt, with a slot of its upstream, and the state from then on.

        Waits for the pause before the attempt, and for a slot; the deadline of the state is later by that wait. A
        full upstream is not asked, like one in cooldown. If no other can be asked, the call waits for those that are
        only full. When it can't wait any longer, an upstream in cooldown is better than none. There is no target if
        the call got no slot in time.
        """
        if routing.pause_ms:
            await asyncio.sleep(routing.pause_ms / 1000)
        targets = routing.remaining
        target = self._take_free(targets, candidates)
        if target is not None:
            return target, routing
        began = self._now()
        free, available = self._free(targets), self.cooldowns.available(targets, began)
        ready = self._free(available)
        if not ready and (available or not free):
            name = await self._wait_for_slot(candidates, available or targets)
            # `retry_for` is the time since the first attempt, without that in which the call waited for slots.
            routing = replace(routing, deadline=routing.deadline + max(0, self._now() - began))
            if name is not None:
                there = [target for target in targets if target.upstream.name == name]
                return self.cooldowns.choose(there, self._now(), draw=self._draw()), routing
        free = ready or self._free(targets)
        return self._take_free(free, candidates) if free else None, routing

    def _free(self, targets: Sequence[Model]) -> list[Model]:
        return [target for target in targets if not self.slots.is_full(target.upstream.name)]

    async def _wait_for_slot(self, candidates: Candidates, targets: Sequence[Model]) -> str | None:
        """The upstream of one of these targets, with a slot of it; None if there is none while the call may wait."""
        if candidates.wait_s <= 0:
            return None
        call, time = candidates.first.call, asyncio.get_running_loop().time
        began_s = time()
        # The head of the stream may have been sent during an earlier attempt.
        with call.client.heartbeat(lambda: True) if call.client.has_begun else nullcontext():
            names = [target.upstream.name for target in targets]
            name = await self.slots.wait(names, call.caller.user, wait_s=candidates.wait_s)
        candidates.wait_s -= time() - began_s
        return name

    async def _attempt(self, candidate: Candidate, reservation: Reservation, start: Start) -> Answer:
        """Send the call to one target, and once more if the target rejects something that we wrote into it.

        Returns the answer to the call as it was sent last. The second time counts as the same attempt: the client did
        not write what was rejected, so this is no failure of the client's request. See `_amended`.
        """
        await candidate.count.count_large_input()
        # Before the attempt begins, so that a client that leaves while it waits is charged nothing.
        if isinstance(candidate.upstream.api_key, FETCHED_KEYS):
            await self._upstreams.credentials.keys(candidate.upstream)
        call, meter = candidate.call, candidate.meter()
        if call.adds_usage and not self._usage_options.should_send(call.address, call.model):
            call = call.without_usage_option()
        if reservation.entry.capped_by:
            call = call.capped(reservation.entry, context=await self._context(candidate))
        if call.request.stream:
            # Its pieces may have to be counted. The upstream reads the prompt meanwhile.
            self._tokenizers.begin_to_load(candidate.count.encoding.name)
        reservation.begin_attempt(call.model, meter, count=candidate.count)
        line = call.client.line
        line.mark_sent()
        line.capped_by = None if call.maximum is None else reservation.entry.capped_by
        asked = call
        while True:
            if call.request.is_option_withheld:
                meter.stop_stripping()
            body = await self.threads.run(candidate.body, call, cost=call.request.body.cost)
            sending = self._upstreams.send(call.model.upstream, call.address, body, call.headers())
            del body  # a long answer must not keep it in memory
            answer = await with_heartbeat(sending, call, reservation, start)
            candidate.sent, candidate.answer = call, answer
            amended = None
            if answer.status // 100 == 4:
                amended = await self._amended(call, answer, held_input=reservation.entry.hold.input)
            if amended is None:
                if asked.adds_usage and answer.status // 100 == 2:
                    self._note_usage_option(call)
                return answer
            answer.close()
            call = amended

    async def _amended(self, call: Call, answer: Answer, *, held_input: int) -> Call | None:
        """The call as it is sent once more after a 4xx; None if that is final, or if nobody would read the next one.

        Example: the client sends `stream: true`, and we add `stream_options`. An old server answers `400 Unknown
        parameter: 'stream_options'`. Without the option it answers the call, and we count its tokens.
        """
        if call.client.is_disconnected:
            return None
        if call.adds_usage and is_about_usage_option(answer.status, await answer.error_body()):
            return call.without_usage_option()
        if call.maximum is not None:
            smaller = call.with_smaller_maximum(answer.status, await answer.error_body(), held_input=held_input)
            if smaller is not None:
                return smaller
        key = answer.fetched_key if answer.status == 401 else None
        if key is None or call.has_new_key:
            return None
        # The 401 has begun the fetch of another key, which is waited for.
        is_replaced = await self._upstreams.credentials.is_replaced(call.model.upstream, key)
        return replace(call, has_new_key=True) if is_replaced else None

    async def _context(self, candidate: Candidate) -> int | None:
        """The context by which an answer ends at this target, in tokens; None if unknown, or if it is not needed."""
        request, model = candidate.call.request, candidate.call.model
        kind = kind_of(model.upstream.kind)
        if not kind.ends_at_context or candidate.count.has_hidden_input or stated_maximum(request, kind) is not None:
            return None
        return model.context or await self.model_lists.context(model)

    def _note_usage_option(self, sent: Call) -> None:
        """Remember whether the target has accepted the usage option, or answered only without it, as it was sent."""
        if not sent.adds_usage:
            self._log.info(
                "upstream takes no stream_options", upstream=sent.model.upstream.name, model=sent.model_label
            )
        self._usage_options.note(sent.address, sent.model, is_accepted=sent.adds_usage)

    def _full(self) -> UpstreamFull:
        retry_s = self.durations.busy_s(self._now())
        return UpstreamFull(
            "The model has as many calls in flight as it can work on, and none of them ended while this call waited. "
            f"Try again in {retry_s} s.",
            was_sent=False,
            headers={"retry-after": str(retry_s)},
        )

    def _after_error(self, error: UpstreamError, routing: RoutingState, candidate: Candidate) -> RoutingState | None:
        """Note a failure without an answer. Returns where the call may go now; None if it ends."""
        self.cooldowns.failed(candidate.upstream, self._now())
        if error.may_be_moved and candidate.call.may_run_twice:
            elsewhere = self._next_attempt(routing, candidate, pause_ms=None)
            if elsewhere is not None:
                self._note_failed(candidate, "abandoned", error.reason)
                return elsewhere
        outcome: AttemptOutcome = "failed" if isinstance(error, UpstreamUnreadable) else "unreachable"
        if error.was_sent:
            outcome = "timed_out" if isinstance(error, UpstreamTimeout) else "broke_off"
        self._note_failed(candidate, outcome, error.reason)
        if error.was_sent:
            return None
        # A key was already waited for.
        pause_ms = None if isinstance(error, UpstreamUnreadable | UpstreamWithoutKey) else UNREACHED_PAUSE_MS
        return self._next_attempt(routing, candidate, pause_ms=pause_ms)

    def _after_answer(
        self, answer: Answer, status: int, routing: RoutingState, candidate: Candidate
    ) -> RoutingState | None:
        """Note an answer. Returns where the call may go now; None if this answer is final.

        `status` is that of the answer, or what its body states instead (see `_status_from_body`).
        """
        outcome = _outcome(status)
        if outcome in ("answered", "rejected"):
            self._count_attempt(candidate, outcome)
            self.cooldowns.answered(candidate.upstream)
            return None
        reason = answer.status_reason
        if status != answer.status:
            reason = f"status {status} in the body of an answer with {reason}"
        self._note_failed(candidate, outcome, reason)
        retry_after_s = seconds_of(answer.retry_after)
        self.cooldowns.failed(candidate.upstream, self._now(), retry_after_s=retry_after_s)
        if not may_try_another_target(status):
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

    def _count_attempt(self, candidate: Candidate, outcome: AttemptOutcome) -> None:
        name = candidate.upstream.name
        self.metrics.attempts.new[name, outcome] += 1
        self._log.debug("attempt", upstream=name, outcome=outcome, request=candidate.call.client.id)

    def _note_failed(self, candidate: Candidate, outcome: AttemptOutcome, reason: str) -> None:
        self._count_attempt(candidate, outcome)
        name, client = candidate.upstream.name, candidate.call.client
        client.line.mark_failed(name)
        self.cooldowns.last[name] = LastFailure(self._now(), outcome, reason[:_REASON_MAX])
        self._log.warning("a try failed", upstream=name, outcome=outcome, request=client.id, reason=reason)


async def _status_from_body(answer: Answer, call: Call, reservation: Reservation, start: Start) -> int:
    """The status that decides whether another upstream is asked: the answer's, or what an error in its body means.

    Waits for the first byte of an answer that must begin in time. The body of a successful answer is looked at unless
    it is a stream of events: those pass on as they arrive. Raises what `Answer.wait_for_body` raises.
    """
    status, body = answer.status, None
    if status // 100 == 2:
        body = await with_heartbeat(_error_instead(answer), call, reservation, start)
        stated = None if body is None else status_of_error(body)
        if stated is None:
            return status
        status = stated
    if may_try_another_target(status):
        return status
    return status_for_routing(status, await answer.error_body() if body is None else body)


async def _error_instead(answer: Answer) -> bytes | None:
    """The body of a successful answer if it is an error instead. Waits for its first byte if that has a limit."""
    if answer.must_begin_in_time:
        await answer.wait_for_body()
    return None if answer.is_event_stream else await answer.error_in_body()


async def with_heartbeat(waiting: Awaitable[T], call: Call, reservation: Reservation, start: Start) -> T:
    """Wait for an upstream. If that has a `heartbeat`, the client of a stream gets comments meanwhile."""
    every_s = call.model.upstream.heartbeat_s
    if every_s is None or not call.request.stream:
        return await waiting
    async with call.client.heartbeat_before_answer(every_s, partial(start, call, reservation)):
        return await waiting


def _outcome(status: int) -> AttemptOutcome:
    if status == 429:
        return "limited"
    if 200 <= status <= 299:
        return "answered"
    # A rejected request shows that the upstream works, and ends its cooldown. 401 and 402 are about our key and
    # account, and 408 is a timeout, so they show no such thing.
    return "rejected" if 400 <= status <= 499 and status not in (401, 402, 408) else "failed"
