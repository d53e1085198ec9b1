"""Busy calls wait in order, up to a bound, and leave the queue if they are cancelled. The duration estimate."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import LedgerUnavailable, ModelNotFound, ProxyError
from proxy.ledger.book import Accepted, Extend, Refused, Release, Reserve, Settle
from proxy.ledger.ledger import Ledger
from proxy.ledger.queue import RETRY_S_MAX, RETRY_S_MIN, WAITING_OF_A_USER_MAX, AdmissionQueue, DurationEstimate
from proxy.ledger.sqlite import SqliteStore
from proxy.policy.admission import Verdict
from proxy.policy.amounts import Amount, Uses
from proxy.policy.quota import CounterKey, Demand
from tests.audit import connected
from tests.builders import NOON, binding, call, entry_in, estimated, exactly, extend, grant, quota, reserve
from tests.stage import until

SHARED = quota("staff/pot", tokens=1000, shared=True)
ANN = binding([SHARED])


class _CountingLedger(Ledger):
    """A ledger that counts its extends."""

    extends = 0

    async def extend(self, operation: Extend) -> Accepted:
        self.extends += 1
        return await super().extend(operation)


@asynccontextmanager
async def _opened(
    path: Path, ledger_type: type[_CountingLedger] = _CountingLedger
) -> AsyncIterator[tuple[_CountingLedger, AdmissionQueue]]:
    ledger = ledger_type(SqliteStore(path), owner="process-1", now=lambda: NOON)
    await ledger.start()
    try:
        yield ledger, AdmissionQueue(ledger)
    finally:
        await ledger.close()


async def _reserve(queue: AdmissionQueue, operation: Reserve, *, wait_s: float) -> Accepted | Refused:
    """Reserve a call. If its input has to be counted, it has a quarter as many tokens as bytes."""

    async def recount() -> Demand:
        return replace(operation.demand, input=operation.demand.input // 4, is_estimated=False)

    return await queue.reserve(operation, wait_s=wait_s, recount=recount, renew=_unchanged)


async def _unchanged() -> None:
    """The policy has not changed."""


def _call(call_id: str, tokens: int, user: str = "ann") -> Reserve:
    return reserve(call_id, binding([SHARED], user=user), call(0, tokens, 1))


async def _reserving(
    queue: AdmissionQueue, operation: Reserve, wait_s: float = 50
) -> "asyncio.Task[Accepted | Refused]":
    """A call that is being reserved, and that waits in the queue by now or is done."""
    before = len(queue)
    task = asyncio.get_running_loop().create_task(_reserve(queue, operation, wait_s=wait_s))
    await until(lambda: len(queue) > before or task.done())
    return task


async def test_a_busy_call_waits_until_others_free_tokens(path: Path) -> None:
    """Then it is admitted. It was never refused."""
    async with _opened(path) as (ledger, queue):
        await _reserve(queue, _call("1", 900), wait_s=50)
        waiting = await _reserving(queue, _call("2", 500))
        assert not waiting.done()
        await ledger.end(Settle("1", exactly(0, 100), "complete"))
        assert isinstance(await waiting, Accepted)
        assert len(queue) == 0


@pytest.mark.parametrize("wait_s", [0, 0.01])
async def test_a_call_that_has_waited_wait_s_is_refused_as_busy(wait_s: float, path: Path) -> None:
    """At once if `wait_s` is 0."""
    async with _opened(path) as (_, queue):
        await _reserve(queue, _call("1", 900), wait_s=0)
        reply = await _reserve(queue, _call("2", 500), wait_s=wait_s)
        assert isinstance(reply, Refused)
        assert reply.decision.verdict is Verdict.BUSY
        assert len(queue) == 0


async def test_a_call_does_not_wait_for_tokens_that_are_used_up(path: Path) -> None:
    """Of 1000 tokens 500 are used, so a call with an input of 600 does not fit before the reset."""
    async with _opened(path) as (ledger, queue):
        await _reserve(queue, _call("1", 900), wait_s=50)
        await ledger.end(Settle("1", exactly(0, 500), "complete"))
        reply = await _reserve(queue, reserve("2", binding([SHARED]), call(600, 10)), wait_s=50)
        assert isinstance(reply, Refused)
        assert reply.decision.verdict is Verdict.EXHAUSTED


async def test_calls_of_a_user_are_admitted_in_order_of_arrival(path: Path) -> None:
    """A small call does not overtake a large one that came before it."""
    async with _opened(path) as (ledger, queue):
        await _reserve(queue, _call("1", 600), wait_s=50)
        large = await _reserving(queue, _call("2", 500))
        small = await _reserving(queue, _call("3", 10))
        assert not small.done()
        await ledger.end(Settle("1", exactly(0, 1), "complete"))
        assert isinstance(await large, Accepted)
        assert isinstance(await small, Accepted)


async def test_calls_that_use_no_tokens_do_not_wait_for_tokens(path: Path) -> None:
    """A moderation waits for requests alone, and a count of tokens for nothing, with any number of calls waiting."""
    who = binding([quota("staff/pot", tokens=1000, requests=3, shared=True)])
    async with _opened(path) as (ledger, queue):
        await _reserve(queue, reserve("1", who, call(0, 900, 1)), wait_s=50)
        chat = await _reserving(queue, reserve("2", who, call(0, 500, 1)))
        for call_id in ("3", "4"):
            moderation = await _reserve(queue, reserve(call_id, who, call(uses=Uses.REQUEST)), wait_s=50)
            assert isinstance(moderation, Accepted)
        busy = await _reserving(queue, reserve("5", who, call(uses=Uses.REQUEST)))
        assert not chat.done()
        assert not busy.done()
        assert isinstance(await _reserve(queue, reserve("6", who, call(uses=Uses.NOTHING)), wait_s=50), Accepted)
        for call_id in ("1", "3", "4"):
            await ledger.end(Release(call_id))
        assert isinstance(await chat, Accepted)
        assert isinstance(await busy, Accepted)


async def test_the_queue_of_a_user_does_not_delay_other_users(path: Path) -> None:
    """Each user has a queue of their own."""
    async with _opened(path) as (_, queue):
        await _reserve(queue, _call("1", 600), wait_s=50)
        large = await _reserving(queue, _call("2", 500))
        assert isinstance(await _reserve(queue, _call("3", 10, "bob"), wait_s=50), Accepted)
        assert not large.done()
        large.cancel()


async def test_after_a_cancelled_call_the_next_in_the_queue_is_the_first(path: Path) -> None:
    """A client that disconnects leaves the queue."""
    async with _opened(path) as (_, queue):
        await _reserve(queue, _call("1", 600), wait_s=50)
        large, small = await _reserving(queue, _call("2", 500)), await _reserving(queue, _call("3", 10))
        large.cancel()
        assert isinstance(await small, Accepted)
        assert len(queue) == 0


async def test_a_call_that_has_waited_wait_s_asks_from_any_place_in_its_queue(path: Path) -> None:
    """It is behind a large call, and small enough to be admitted."""
    async with _opened(path) as (_, queue):
        await _reserve(queue, _call("1", 600), wait_s=50)
        large = await _reserving(queue, _call("2", 500))
        assert isinstance(await _reserve(queue, _call("3", 10), wait_s=0.01), Accepted)
        large.cancel()


async def test_the_calls_of_a_user_that_may_wait_are_bounded(path: Path) -> None:
    """The next busy call is refused at once: it never enters the queue. A call of another user may wait."""
    async with _opened(path) as (_, queue):
        await _reserve(queue, _call("1", 900), wait_s=50)
        waiting = [await _reserving(queue, _call(f"w{number}", 500)) for number in range(WAITING_OF_A_USER_MAX)]
        beyond = await _reserving(queue, _call("2", 500))
        assert beyond.done()
        assert isinstance(await beyond, Refused)
        assert len(queue) == WAITING_OF_A_USER_MAX
        waiting.append(await _reserving(queue, _call("3", 500, "bob")))
        assert not waiting[-1].done()
        for each in waiting:
            each.cancel()
        await asyncio.wait(waiting)
        assert len(queue) == 0


async def test_the_calls_that_may_wait_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T48: of all users together. The next busy call of any user is refused at once."""
    monkeypatch.setattr("proxy.ledger.queue.WAITING_MAX", 3)
    async with _opened(path) as (_, queue):
        await _reserve(queue, _call("1", 900), wait_s=50)
        waiting = [await _reserving(queue, _call(f"w{user}", 500, user)) for user in "abc"]
        beyond = await _reserving(queue, _call("2", 500, "d"))
        assert beyond.done()
        assert isinstance(await beyond, Refused)
        assert not any(each.done() for each in waiting)
        for each in waiting:
            each.cancel()
        await asyncio.wait(waiting)
        assert len(queue) == 0


async def test_two_calls_that_ask_at_the_same_time_both_wait(path: Path) -> None:
    """The queue was empty when each of them asked. Both are admitted when tokens are freed."""
    async with _opened(path) as (ledger, queue):
        await _reserve(queue, _call("1", 900), wait_s=50)
        both = [asyncio.get_running_loop().create_task(_reserve(queue, _call(name, 500), wait_s=50)) for name in "ab"]
        await until(lambda: len(queue) == 2)
        await ledger.end(Settle("1", exactly(0, 0), "complete"))
        assert [isinstance(reply, Accepted) for reply in await asyncio.gather(*both)] == [True, True]


async def test_an_input_with_too_many_bytes_is_counted(path: Path) -> None:
    """2000 bytes of input are 500 tokens, which fit into 1000. The call holds what was counted."""
    async with _opened(path) as (_, queue):
        reply = await _reserve(queue, reserve("1", ANN, estimated(call(2000, 500))), wait_s=50)
        assert isinstance(reply, Accepted)
        assert reply.entry.hold == Amount(500, 500, 1)


async def test_the_input_of_a_call_that_waits_is_counted_once(path: Path) -> None:
    """From then on the call asks with its 500 tokens instead of its 2000 bytes."""
    async with _opened(path) as (ledger, queue):
        await _reserve(queue, _call("1", 600), wait_s=50)
        counts: list[Demand] = []

        async def recount() -> Demand:
            counts.append(call(500, 9))
            return counts[-1]

        operation = reserve("2", ANN, estimated(call(2000, 9)))
        waiting = asyncio.get_running_loop().create_task(
            queue.reserve(operation, wait_s=50, recount=recount, renew=_unchanged)
        )
        await until(lambda: len(queue) == 1)
        assert isinstance(await _reserve(queue, _call("3", 10, "bob"), wait_s=0), Accepted)
        await ledger.end(Release("3"))
        await ledger.end(Settle("1", exactly(0, 100), "complete"))
        assert isinstance(await waiting, Accepted)
        assert len(counts) == 1


async def test_a_call_that_does_not_fit_with_its_counted_input_is_refused(path: Path) -> None:
    """The refusal states the tokens that it needs, not its bytes."""
    async with _opened(path) as (_, queue):
        reply = await _reserve(queue, reserve("1", ANN, estimated(call(8000, 1))), wait_s=50)
        assert isinstance(reply, Refused)
        assert (reply.decision.verdict, reply.decision.blocks[0].needed) == (Verdict.NEVER, 2001)


# ------------------------------------------------------------------------------------------- changes of the policy


class _Renewed:
    """A call that waits, and is another operation from the next time on that it asks.

    `error` is raised then instead. `asked` is how often the call was renewed.
    """

    def __init__(self) -> None:
        self.operation: Reserve | None = None
        self.error: ProxyError | None = None
        self.asked = 0

    async def __call__(self) -> Reserve | None:
        self.asked += 1
        if self.error is not None:
            raise self.error
        operation, self.operation = self.operation, None
        return operation


async def _renewing(
    queue: AdmissionQueue, operation: Reserve, renewed: _Renewed
) -> "asyncio.Task[Accepted | Refused]":
    """A call that waits in the queue by now, and is renewed before it asks again. Its input is 475 tokens."""

    async def recount() -> Demand:
        return replace(operation.demand, input=475)

    reserving = queue.reserve(operation, wait_s=50, recount=recount, renew=renewed)
    task = asyncio.get_running_loop().create_task(reserving)
    await until(lambda: len(queue) > 0 or task.done())
    for _ in range(2):  # after the first, the ledger has answered; after the second, the task has read the answer
        await queue.ledger.end(Settle("unknown", exactly(0), "complete"))
    return task


async def test_a_grant_lets_a_waiting_call_in(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is freed. The call asks by itself within a second."""
    monkeypatch.setattr("proxy.ledger.queue._ASK_EVERY_S", 0.01)
    async with _opened(path) as (_, queue):
        await _reserve(queue, _call("1", 900), wait_s=50)
        renewed = _Renewed()
        waiting = await _renewing(queue, _call("2", 500), renewed)
        more = binding([SHARED], grants=[grant(SHARED.id, tokens=400, until=NOON + 1)])
        renewed.operation = reserve("2", more, call(0, 500, 1))
        assert isinstance(await waiting, Accepted)
        assert len(queue) == 0


async def test_a_lowered_limit_is_that_of_a_call_that_began_to_wait_before(path: Path) -> None:
    """Room for it is freed by the old limit and not by the new one."""
    async with _opened(path) as (ledger, queue):
        await _reserve(queue, _call("1", 900), wait_s=50)
        renewed = _Renewed()
        waiting = await _renewing(queue, _call("2", 500), renewed)
        lowered = binding([quota(SHARED.id, tokens=300, shared=True)])
        renewed.operation = reserve("2", lowered, call(0, 500, 400))
        await ledger.end(Settle("1", exactly(0, 100), "complete"))
        reply = await waiting
        assert isinstance(reply, Refused)
        [block] = reply.decision.blocks
        assert (reply.decision.verdict, block.limit.maximum) == (Verdict.NEVER, 300)


async def test_a_call_is_decided_on_by_the_policy_at_the_time_at_which_it_asks_first(path: Path) -> None:
    """Its body may have taken long to arrive."""
    async with _opened(path) as (_, queue):
        renewed = _Renewed()
        renewed.operation = reserve("1", binding([quota(SHARED.id, tokens=300, shared=True)]), call(0, 500, 400))
        reply = await (await _renewing(queue, _call("1", 500), renewed))
        assert isinstance(reply, Refused)
        assert renewed.asked == 1


async def test_a_waiting_call_that_is_not_possible_any_more_gets_the_error_of_a_new_one(path: Path) -> None:
    """It leaves the queue, and the next call is the first."""
    async with _opened(path) as (ledger, queue):
        await _reserve(queue, _call("1", 900), wait_s=50)
        renewed = _Renewed()
        waiting = await _renewing(queue, _call("2", 500), renewed)
        small = await _reserving(queue, _call("3", 10))
        renewed.error = ModelNotFound("no quota covers the model", param="model")
        await ledger.end(Settle("1", exactly(0, 0), "complete"))
        with pytest.raises(ModelNotFound):
            await waiting
        assert isinstance(await small, Accepted)


async def test_a_renewed_call_is_woken_by_its_new_quotas(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its user was put into another group while it waited, and tokens of that group's quota are freed."""
    monkeypatch.setattr("proxy.ledger.queue._ASK_EVERY_S", 10_000)
    lab = binding([quota("lab/pot", tokens=1000, shared=True)])
    async with _opened(path) as (ledger, queue):
        for call_id, tokens in (("0", 10), ("1", 890)):
            await _reserve(queue, _call(call_id, tokens), wait_s=50)
        await _reserve(queue, reserve("2", lab, call(0, 900, 1)), wait_s=50)
        renewed = _Renewed()
        waiting = await _renewing(queue, _call("3", 500), renewed)
        renewed.operation = reserve("3", lab, call(0, 500, 1))
        await ledger.end(Release("0"))
        for _ in range(2):  # after the first, the ledger has answered; after the second, the call waits again
            await ledger.end(Settle("unknown", exactly(0), "complete"))
        assert not waiting.done()
        await ledger.end(Release("2"))
        assert isinstance(await waiting, Accepted)


async def test_the_input_of_a_renewed_call_is_counted_again_if_it_is_estimated(path: Path) -> None:
    """The renewed call has another candidate, which may count in another way."""
    async with _opened(path) as (ledger, queue):
        await _reserve(queue, _call("1", 900), wait_s=50)
        renewed = _Renewed()
        waiting = await _renewing(queue, _call("2", 500), renewed)
        renewed.operation = reserve("2", ANN, estimated(call(950, 500, 10)))
        await ledger.end(Release("1"))
        reply = await waiting
        assert isinstance(reply, Accepted)
        assert reply.entry.hold == Amount(475, 500, 1)


# ------------------------------------------------------------------------------------------------------------ streams


def _extend(output: int, *, least: int | None = None) -> Extend:
    return extend("1", ANN, output, least=output if least is None else least)


async def _extending(ledger: _CountingLedger, queue: AdmissionQueue, operation: Extend) -> "asyncio.Task[Accepted]":
    """An extend that the ledger has answered once, and that waits by now or is done."""
    before = ledger.extends
    task = asyncio.get_running_loop().create_task(queue.extend(operation, wait_s=50, ask_s=50))
    await until(lambda: ledger.extends > before)
    for _ in range(2):  # after the first, the ledger has answered; after the second, the task has read the answer
        await ledger.end(Settle("unknown", exactly(0), "complete"))
    return task


@asynccontextmanager
async def _stream(
    path: Path, ledger_type: type[_CountingLedger] = _CountingLedger
) -> AsyncIterator[tuple[_CountingLedger, AdmissionQueue]]:
    """Ann has a stream, call 1, that holds 100 + 100 of 1000 tokens. Bob's call 2 holds the rest."""
    async with _opened(path, ledger_type) as (ledger, queue):
        await _reserve(queue, reserve("1", ANN, call(100, 900, 100, initial_hold=100)), wait_s=0)
        await _reserve(queue, _call("2", 800, "bob"), wait_s=0)
        yield ledger, queue


async def test_a_stream_is_extended_at_once_if_there_is_room(path: Path) -> None:
    """Or if it needs no more than it holds already."""
    async with _stream(path) as (ledger, queue):
        reply = await queue.extend(_extend(400, least=100), wait_s=50, ask_s=50)
        assert (reply.verdict, reply.entry.hold.output) == (Verdict.ALLOW, 100)
        await ledger.end(Settle("2", exactly(0, 0), "complete"))
        reply = await queue.extend(_extend(900), wait_s=50, ask_s=50)
        assert (reply.verdict, reply.entry.hold.output) == (Verdict.ALLOW, 900)


async def test_a_busy_stream_waits_until_others_free_tokens(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is woken then, and does not have to ask again and again."""
    monkeypatch.setattr("proxy.ledger.queue._ASK_EVERY_S", 10_000)
    async with _stream(path) as (ledger, queue):
        waiting = await _extending(ledger, queue, _extend(400))
        assert not waiting.done()
        await ledger.end(Settle("2", exactly(0, 300), "complete"))
        reply = await waiting
        assert (reply.verdict, reply.entry.hold.output) == (Verdict.ALLOW, 400)
        assert len(queue) == 0


async def test_a_stream_holds_what_it_gets_while_it_waits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time others free tokens. It waits until it holds its least."""
    monkeypatch.setattr("proxy.ledger.queue._ASK_EVERY_S", 10_000)
    async with _stream(path) as (ledger, queue):
        await ledger.end(Settle("2", exactly(0, 0), "complete"))
        for call_id in "34":
            await _reserve(queue, _call(call_id, 400, "bob"), wait_s=0)
        waiting = await _extending(ledger, queue, _extend(600))
        await ledger.end(Settle("3", exactly(0, 100), "complete"))
        await ledger.end(Settle("unknown", exactly(0), "complete"))
        assert not waiting.done()
        entry = await entry_in(ledger, "1")
        assert entry is not None
        assert entry.hold.output == 400
        await ledger.end(Settle("4", exactly(0, 100), "complete"))
        assert (await waiting).entry.hold.output == 600


class _SilentLedger(_CountingLedger):
    """A ledger that does not report what was freed, as if another process had freed it."""

    def on_freed(self, callback: Callable[[set[CounterKey]], object]) -> None:
        pass


async def test_calls_that_wait_ask_again_without_being_woken(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Because other processes free tokens too, and are not heard. Here a stream and a new call."""
    monkeypatch.setattr("proxy.ledger.queue._ASK_EVERY_S", 0.01)
    async with _stream(path, _SilentLedger) as (ledger, queue):
        extending = await _extending(ledger, queue, _extend(400))
        reserving = await _reserving(queue, _call("3", 300, "carl"))
        await ledger.end(Settle("2", exactly(0, 0), "complete"))
        assert (await extending).verdict is Verdict.ALLOW
        assert isinstance(await reserving, Accepted)


async def test_a_stream_is_woken_by_a_smaller_input_of_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hold of the other is lowered when its upstream reports the tokens of its input."""
    monkeypatch.setattr("proxy.ledger.queue._ASK_EVERY_S", 10_000)
    async with _stream(path) as (ledger, queue):
        await ledger.end(Settle("2", exactly(0, 0), "complete"))
        await _reserve(queue, reserve("3", binding([SHARED], user="bob"), call(700, 100)), wait_s=0)
        waiting = await _extending(ledger, queue, _extend(400))
        await ledger.extend(extend("3", binding([SHARED], user="bob"), 0, input_tokens=100))
        assert (await waiting).verdict is Verdict.ALLOW


@pytest.mark.parametrize("wait_s", [0, 0.01])
async def test_a_stream_that_has_waited_wait_s_is_busy(wait_s: float, path: Path) -> None:
    """At once if `wait_s` is 0."""
    async with _stream(path) as (_, queue):
        reply = await queue.extend(_extend(400), wait_s=wait_s, ask_s=50)
        assert (reply.verdict, reply.entry.hold.output) == (Verdict.BUSY, 100)


async def test_a_stream_does_not_wait_for_tokens_that_are_used_up(path: Path) -> None:
    """They are not available before the reset."""
    async with _stream(path) as (ledger, queue):
        await ledger.end(Settle("2", exactly(0, 700), "complete"))
        reply = await queue.extend(_extend(400), wait_s=50, ask_s=50)
        assert (reply.verdict, reply.entry.hold.output) == (Verdict.EXHAUSTED, 200)


async def test_a_stream_that_is_cancelled_while_it_waits_gets_no_more(path: Path) -> None:
    """What others free afterwards is not held for it."""
    async with _stream(path) as (ledger, queue):
        waiting = await _extending(ledger, queue, _extend(400))
        waiting.cancel()
        await asyncio.wait([waiting])
        await ledger.end(Settle("2", exactly(0, 0), "complete"))
        entry = await entry_in(ledger, "1")
        assert entry is not None
        assert entry.hold.output == 100


async def test_a_ledger_that_does_not_answer_within_ask_s_is_unavailable(path: Path) -> None:
    """An answer that has begun does not wait for a database that another program has locked."""
    async with _stream(path) as (ledger, queue):
        await ledger.end(Settle("2", exactly(0, 0), "complete"))
        with connected(path) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerUnavailable):
                await queue.extend(_extend(400), wait_s=50, ask_s=0.01)
            other.execute("ROLLBACK")
        reply = await queue.extend(_extend(500), wait_s=50, ask_s=50)
        assert (reply.verdict, reply.entry.hold.output) == (Verdict.ALLOW, 500)


async def test_only_calls_that_wait_for_the_same_counters_are_woken(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of other quotas are freed, and the stream does not ask in vain."""
    monkeypatch.setattr("proxy.ledger.queue._ASK_EVERY_S", 10_000)
    async with _stream(path) as (ledger, queue):
        elsewhere = binding([quota("lab/daily", tokens=9)], user="carl")
        await ledger.reserve(reserve("9", elsewhere, call(1)))
        waiting = await _extending(ledger, queue, _extend(400))
        for call_id in ("9", "unknown"):
            await ledger.end(Settle(call_id, exactly(1), "complete"))
        assert ledger.extends == 1
        await ledger.end(Settle("2", exactly(0, 0), "complete"))
        await waiting
        assert ledger.extends == 2


# -------------------------------------------------------------------------------------------------- duration estimate


def _estimate(durations_s: list[int], began_s_ago: list[int]) -> DurationEstimate:
    """The estimate after calls that took so long, with calls in flight that began so long ago."""
    estimate = DurationEstimate()
    for number, duration in enumerate(durations_s):
        estimate.began(f"ended {number}", NOON)
        estimate.ended(f"ended {number}", NOON + duration * 1000)
    for number, ago in enumerate(began_s_ago):
        estimate.began(f"in flight {number}", NOON - ago * 1000)
    return estimate


@pytest.mark.parametrize(
    ("durations_s", "began_s_ago", "busy_s"),
    [
        pytest.param([], [], 2, id="no calls"),
        pytest.param([], [5], 2, id="no call has ended"),
        pytest.param([20], [], 2, id="no call is in flight"),
        pytest.param([20, 20, 20], [5], 15, id="one in flight"),
        pytest.param([10, 20, 90], [0, 8, 19], 12, id="the medians of both"),
        pytest.param([20], [100], 2, id="one that takes longer than usual may end at any moment"),
        pytest.param([600], [0], 30, id="the upper bound"),
    ],
)
def test_a_busy_call_is_told_the_time_that_calls_in_flight_have_left(
    durations_s: list[int], began_s_ago: list[int], busy_s: int
) -> None:
    """The median of what each has left, if it takes as long as usual; between 2 and 30 seconds."""
    assert _estimate(durations_s, began_s_ago).busy_s(NOON) == busy_s


def test_the_estimate_is_rounded_up() -> None:
    """So a call that comes back then is not too early."""
    estimate = DurationEstimate()
    estimate.began("1", NOON)
    estimate.ended("1", NOON + 5001)
    estimate.began("2", NOON)
    assert estimate.busy_s(NOON) == 6


def test_the_estimate_uses_the_last_100_calls_that_ended() -> None:
    """Earlier ones are forgotten."""
    assert _estimate([25] * 1000 + [10] * 100, [0]).busy_s(NOON) == 10
    assert _estimate([25] * 1000 + [10] * 49, [0]).busy_s(NOON) == 25


@given(st.lists(st.integers(-(10**9), 10**9), max_size=300), st.lists(st.integers(-(10**9), 10**9), max_size=300))
def test_the_estimate_is_always_within_its_bounds(durations: list[int], began_ago: list[int]) -> None:
    """Also if the clock jumps. SDKs wait for so long by themselves."""
    estimate = DurationEstimate()
    for number, duration in enumerate(durations):
        estimate.began(str(number), NOON)
        estimate.ended(str(number), NOON + duration)
    for number, ago in enumerate(began_ago):
        estimate.began(f"in flight {number}", NOON - ago)
    assert RETRY_S_MIN <= estimate.busy_s(NOON) <= RETRY_S_MAX
