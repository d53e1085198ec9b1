"""Calls that are held up only by others wait a moment; fairly, bounded, and gone when their client goes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.errors import LedgerUnavailable
from proxy.ledger.book import Accepted, Extend, Refused, Release, Reserve, Settle
from proxy.ledger.ledger import Ledger
from proxy.ledger.queue import WAITING_OF_A_USER_MAX, AdmissionQueue
from proxy.ledger.sqlite import SqliteStore
from proxy.policy.admission import Verdict
from proxy.policy.amounts import Amount
from proxy.policy.quota import CounterKey, Demand
from tests.audit import connected
from tests.builders import NOON, binding, call, estimated, exactly, extend, quota, reserve
from tests.stage import until

POT = quota("staff/pot", tokens=1000, shared=True)
ANN = binding([POT])


class _Noting(Ledger):
    """A ledger that knows how often it was asked for more."""

    asked = 0

    async def extend(self, operation: Extend) -> Accepted:
        self.asked += 1
        return await super().extend(operation)


@asynccontextmanager
async def _room(folder: Path, kind: "type[_Noting] | None" = None) -> AsyncIterator[tuple["_Noting", AdmissionQueue]]:
    ledger = (kind or _Noting)(SqliteStore(folder / "quotas.db"), owner="process-1", now=lambda: NOON)
    await ledger.start()
    try:
        yield ledger, AdmissionQueue(ledger)
    finally:
        await ledger.close()


async def _reserve(room: AdmissionQueue, operation: Reserve, *, wait_s: float) -> Accepted | Refused:
    """A call whose input, should that have to be counted, has a quarter as many tokens as bytes."""

    async def recount() -> Demand:
        return replace(operation.demand, input=operation.demand.input // 4, is_estimated=False)

    return await room.reserve(operation, wait_s=wait_s, recount=recount)


def _ask(call_id: str, tokens: int, user: str = "ann") -> Reserve:
    return reserve(call_id, binding([POT], user=user), call(0, tokens, 1))


async def _begin(room: AdmissionQueue, operation: Reserve, wait_s: float = 50) -> "asyncio.Task[Accepted | Refused]":
    """A call that has come to where it waits."""
    before = len(room)
    begun = asyncio.get_running_loop().create_task(_reserve(room, operation, wait_s=wait_s))
    await until(lambda: len(room) > before or begun.done())
    return begun


async def test_a_call_waits_until_others_give_back(tmp_path: Path) -> None:
    """It is let in the moment there is room, and was never refused."""
    async with _room(tmp_path) as (ledger, room):
        await _reserve(room, _ask("1", 900), wait_s=50)
        waiting = await _begin(room, _ask("2", 500))
        assert not waiting.done()
        await ledger.end(Settle("1", exactly(0, 100), "complete"))
        assert isinstance(await waiting, Accepted)
        assert len(room) == 0


@pytest.mark.parametrize("wait_s", [0, 0.01])
async def test_who_has_waited_long_enough_is_told_busy(wait_s: float, tmp_path: Path) -> None:
    """Also at once, for who will not wait."""
    async with _room(tmp_path) as (_, room):
        await _reserve(room, _ask("1", 900), wait_s=0)
        reply = await _reserve(room, _ask("2", 500), wait_s=wait_s)
        assert isinstance(reply, Refused)
        assert reply.decision.verdict is Verdict.BUSY
        assert len(room) == 0


async def test_what_is_used_up_does_not_wait(tmp_path: Path) -> None:
    """Waiting helps only against calls in flight: 500 of 1000 are used, and 600 will never come back."""
    async with _room(tmp_path) as (ledger, room):
        await _reserve(room, _ask("1", 900), wait_s=50)
        await ledger.end(Settle("1", exactly(0, 500), "complete"))
        reply = await _reserve(room, reserve("2", binding([POT]), call(600, 10)), wait_s=50)
        assert isinstance(reply, Refused)
        assert reply.decision.verdict is Verdict.EXHAUSTED


async def test_a_users_calls_come_in_in_their_order(tmp_path: Path) -> None:
    """A small call does not slip past a large one that came before it."""
    async with _room(tmp_path) as (ledger, room):
        await _reserve(room, _ask("1", 600), wait_s=50)
        large = await _begin(room, _ask("2", 500))
        small = await _begin(room, _ask("3", 10))
        assert not small.done()
        await ledger.end(Settle("1", exactly(0, 1), "complete"))
        assert isinstance(await large, Accepted)
        assert isinstance(await small, Accepted)


async def test_one_users_queue_holds_up_nobody_else(tmp_path: Path) -> None:
    """Each user has a queue of their own."""
    async with _room(tmp_path) as (_, room):
        await _reserve(room, _ask("1", 600), wait_s=50)
        large = await _begin(room, _ask("2", 500))
        assert isinstance(await _reserve(room, _ask("3", 10, "bob"), wait_s=50), Accepted)
        assert not large.done()
        large.cancel()


async def test_who_gives_up_leaves_the_turn_to_the_next(tmp_path: Path) -> None:
    """A client that goes is gone from the queue, and what waited behind it comes first."""
    async with _room(tmp_path) as (_, room):
        await _reserve(room, _ask("1", 600), wait_s=50)
        large, small = await _begin(room, _ask("2", 500)), await _begin(room, _ask("3", 10))
        large.cancel()
        assert isinstance(await small, Accepted)
        assert len(room) == 0


async def test_a_deadline_behind_another_gets_the_last_word(tmp_path: Path) -> None:
    """Who is not first and has no time left asks once more for itself."""
    async with _room(tmp_path) as (_, room):
        await _reserve(room, _ask("1", 600), wait_s=50)
        large = await _begin(room, _ask("2", 500))
        assert isinstance(await _reserve(room, _ask("3", 10), wait_s=0.01), Accepted)
        large.cancel()


async def test_a_queue_is_bounded(tmp_path: Path) -> None:
    """Past so many of one user's calls the next is refused as busy at once."""
    async with _room(tmp_path) as (_, room):
        await _reserve(room, _ask("1", 900), wait_s=50)
        waiting = [await _begin(room, _ask(f"w{number}", 500)) for number in range(WAITING_OF_A_USER_MAX)]
        assert isinstance(await _reserve(room, _ask("2", 500), wait_s=50), Refused)
        for each in waiting:
            each.cancel()
        await asyncio.wait(waiting)
        assert len(room) == 0


async def test_two_that_find_no_room_at_once_both_wait(tmp_path: Path) -> None:
    """Neither was first in the queue when it asked; the order in which they came decides."""
    async with _room(tmp_path) as (ledger, room):
        await _reserve(room, _ask("1", 900), wait_s=50)
        both = [asyncio.get_running_loop().create_task(_reserve(room, _ask(name, 500), wait_s=50)) for name in "ab"]
        await until(lambda: len(room) == 2)
        await ledger.end(Settle("1", exactly(0, 0), "complete"))
        assert [isinstance(reply, Accepted) for reply in await asyncio.gather(*both)] == [True, True]


async def test_who_has_too_many_bytes_is_counted_and_asks_again(tmp_path: Path) -> None:
    """2000 bytes of input are 500 tokens, which fit into 1000; once let in it holds what was counted."""
    async with _room(tmp_path) as (_, room):
        reply = await _reserve(room, reserve("1", ANN, estimated(call(2000, 500))), wait_s=50)
        assert isinstance(reply, Accepted)
        assert reply.entry.hold == Amount(500, 500, 1)


async def test_who_waits_is_counted_once(tmp_path: Path) -> None:
    """From then on it asks by its tokens: it waits for the 500 that it needs, not for the 2000 bytes that it has."""
    async with _room(tmp_path) as (ledger, room):
        await _reserve(room, _ask("1", 600), wait_s=50)
        counts: list[Demand] = []

        async def recount() -> Demand:
            counts.append(call(500, 9))
            return counts[-1]

        operation = reserve("2", ANN, estimated(call(2000, 9)))
        waiting = asyncio.get_running_loop().create_task(room.reserve(operation, wait_s=50, recount=recount))
        await until(lambda: len(room) == 1)
        assert isinstance(await _reserve(room, _ask("3", 10, "bob"), wait_s=0), Accepted)
        await ledger.end(Release("3"))
        await ledger.end(Settle("1", exactly(0, 100), "complete"))
        assert isinstance(await waiting, Accepted)
        assert len(counts) == 1


async def test_who_can_not_be_let_in_by_its_tokens_either_is_refused(tmp_path: Path) -> None:
    """The refusal says how many tokens it needs, not how many bytes it has."""
    async with _room(tmp_path) as (_, room):
        reply = await _reserve(room, reserve("1", ANN, estimated(call(8000, 1))), wait_s=50)
        assert isinstance(reply, Refused)
        assert (reply.decision.verdict, reply.decision.blocks[0].needed) == (Verdict.NEVER, 2001)


# ---------------------------------------------------------------------------------------------------- holds that grow


def _grow(output: int, *, call_id: str = "1", least: int | None = None) -> Extend:
    return extend(call_id, ANN, output, least=output if least is None else least)


async def _growing(ledger: "_Noting", room: AdmissionQueue, operation: Extend) -> "asyncio.Task[Accepted]":
    """A growth that was asked for once, and waits or is done."""
    before = ledger.asked
    begun = asyncio.get_running_loop().create_task(room.extend(operation, wait_s=50, ask_s=50))
    await until(lambda: ledger.asked > before)
    for _ in range(2):  # after the first the question was answered, after the second the answer was seen
        await ledger.end(Settle("nobody", exactly(0), "complete"))
    return begun


@asynccontextmanager
async def _stream(
    folder: Path, kind: "type[_Noting] | None" = None
) -> AsyncIterator[tuple["_Noting", AdmissionQueue]]:
    """A stream of ann's that holds 100 + 100 of 1000, of which bob holds the rest."""
    async with _room(folder, kind) as (ledger, room):
        await _reserve(room, reserve("1", ANN, call(100, 900, 100, initial_hold=100)), wait_s=0)
        await _reserve(room, _ask("2", 800, "bob"), wait_s=0)
        yield ledger, room


async def test_a_stream_grows_at_once_where_there_is_room(tmp_path: Path) -> None:
    """And where it needs nothing that it does not hold."""
    async with _stream(tmp_path) as (ledger, room):
        reply = await room.extend(_grow(400, least=100), wait_s=50, ask_s=50)
        assert (reply.verdict, reply.entry.hold.output) == (Verdict.ALLOW, 100)
        await ledger.end(Settle("2", exactly(0, 0), "complete"))
        reply = await room.extend(_grow(900), wait_s=50, ask_s=50)
        assert (reply.verdict, reply.entry.hold.output) == (Verdict.ALLOW, 900)


async def test_a_stream_waits_until_others_give_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is woken when they do: it need not ask again and again."""
    monkeypatch.setattr("proxy.ledger.queue._ASK_EVERY_S", 10_000)
    async with _stream(tmp_path) as (ledger, room):
        waiting = await _growing(ledger, room, _grow(400))
        assert not waiting.done()
        await ledger.end(Settle("2", exactly(0, 300), "complete"))
        reply = await waiting
        assert (reply.verdict, reply.entry.hold.output) == (Verdict.ALLOW, 400)
        assert len(room) == 0


async def test_a_stream_takes_what_it_can_get_while_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, as others give back; it goes on once it has the least that it needs."""
    monkeypatch.setattr("proxy.ledger.queue._ASK_EVERY_S", 10_000)
    async with _stream(tmp_path) as (ledger, room):
        await ledger.end(Settle("2", exactly(0, 0), "complete"))
        for call_id in "34":
            await _reserve(room, _ask(call_id, 400, "bob"), wait_s=0)
        waiting = await _growing(ledger, room, _grow(600))
        await ledger.end(Settle("3", exactly(0, 100), "complete"))
        await ledger.end(Settle("nobody", exactly(0), "complete"))
        assert not waiting.done()
        entry = await ledger.entry("1")
        assert entry is not None
        assert entry.hold.output == 400
        await ledger.end(Settle("4", exactly(0, 100), "complete"))
        assert (await waiting).entry.hold.output == 600


class _Silent(_Noting):
    """A ledger of which another process gives back: nobody here is told."""

    def on_freed(self, tell: Callable[[set[CounterKey]], object]) -> None:
        pass


async def test_whoever_waits_asks_now_and_then_without_being_woken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processes give back too, and of that nobody is told: a stream and a call that wants in."""
    monkeypatch.setattr("proxy.ledger.queue._ASK_EVERY_S", 0.01)
    async with _stream(tmp_path, _Silent) as (ledger, room):
        growing, wanting = await _growing(ledger, room, _grow(400)), await _begin(room, _ask("3", 300, "carl"))
        await ledger.end(Settle("2", exactly(0, 0), "complete"))
        assert (await growing).verdict is Verdict.ALLOW
        assert isinstance(await wanting, Accepted)


async def test_a_stream_is_woken_by_an_input_that_turned_out_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another stream's hold shrinks when its upstream says how many tokens it read."""
    monkeypatch.setattr("proxy.ledger.queue._ASK_EVERY_S", 10_000)
    async with _stream(tmp_path) as (ledger, room):
        await ledger.end(Settle("2", exactly(0, 0), "complete"))
        await _reserve(room, reserve("3", binding([POT], user="bob"), call(700, 100)), wait_s=0)
        waiting = await _growing(ledger, room, _grow(400))
        await ledger.extend(extend("3", binding([POT], user="bob"), 0, input_tokens=100))
        assert (await waiting).verdict is Verdict.ALLOW


@pytest.mark.parametrize("wait_s", [0, 0.01])
async def test_a_stream_that_has_waited_long_enough_is_told_busy(wait_s: float, tmp_path: Path) -> None:
    """Also at once, where it may not wait."""
    async with _stream(tmp_path) as (_, room):
        reply = await room.extend(_grow(400), wait_s=wait_s, ask_s=50)
        assert (reply.verdict, reply.entry.hold.output) == (Verdict.BUSY, 100)


async def test_a_stream_does_not_wait_for_what_is_used_up(tmp_path: Path) -> None:
    """Nobody will give that back before the reset."""
    async with _stream(tmp_path) as (ledger, room):
        await ledger.end(Settle("2", exactly(0, 700), "complete"))
        reply = await room.extend(_grow(400), wait_s=50, ask_s=50)
        assert (reply.verdict, reply.entry.hold.output) == (Verdict.EXHAUSTED, 200)


async def test_a_stream_whose_client_goes_while_it_waits_takes_nothing_more(tmp_path: Path) -> None:
    """Cancelled, it has left the room: what others give back is theirs."""
    async with _stream(tmp_path) as (ledger, room):
        waiting = await _growing(ledger, room, _grow(400))
        waiting.cancel()
        await asyncio.wait([waiting])
        await ledger.end(Settle("2", exactly(0, 0), "complete"))
        entry = await ledger.entry("1")
        assert entry is not None
        assert entry.hold.output == 100


async def test_a_ledger_that_takes_too_long_is_as_good_as_none(tmp_path: Path) -> None:
    """An answer that has begun does not stand still because somebody has locked the database."""
    async with _stream(tmp_path) as (ledger, room):
        await ledger.end(Settle("2", exactly(0, 0), "complete"))
        with connected(tmp_path / "quotas.db") as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerUnavailable):
                await room.extend(_grow(400), wait_s=50, ask_s=0.01)
            other.execute("ROLLBACK")
        reply = await room.extend(_grow(500), wait_s=50, ask_s=50)
        assert (reply.verdict, reply.entry.hold.output) == (Verdict.ALLOW, 500)


async def test_an_end_that_is_not_a_streams_own_wakes_only_whom_it_concerns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given back of other quotas lets nobody ask in vain."""
    monkeypatch.setattr("proxy.ledger.queue._ASK_EVERY_S", 10_000)
    async with _stream(tmp_path) as (ledger, room):
        elsewhere = binding([quota("lab/daily", tokens=9)], user="carl")
        await ledger.reserve(reserve("9", elsewhere, call(1)))
        waiting = await _growing(ledger, room, _grow(400))
        for call_id in ("9", "nobody"):
            await ledger.end(Settle(call_id, exactly(1), "complete"))
        assert ledger.asked == 1
        await ledger.end(Settle("2", exactly(0, 0), "complete"))
        await waiting
        assert ledger.asked == 2
