"""Calls that are held up only by others wait a moment; fairly, bounded, and gone when their client goes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.admission import Verdict
from proxy.books import Booked, NotBooked, Reserve, Settle
from proxy.ledger import Ledger
from proxy.sqlite import SqliteStore
from proxy.waiting import OF_A_USER_MAX, WaitingRoom
from tests.builders import NOON, binding, call, exactly, quota, reserve
from tests.stage import until

POT = quota("staff/pot", tokens=1000, shared=True)


@asynccontextmanager
async def _room(folder: Path) -> AsyncIterator[tuple[Ledger, WaitingRoom]]:
    ledger = Ledger(SqliteStore(folder / "quotas.db"), owner="process-1", now=lambda: NOON)
    await ledger.start()
    try:
        yield ledger, WaitingRoom(ledger)
    finally:
        await ledger.close()


def _ask(call_id: str, tokens: int, user: str = "ann") -> Reserve:
    return reserve(call_id, binding([POT], user=user), call(0, tokens, 1))


async def _begin(room: WaitingRoom, act: Reserve, wait_s: float = 50) -> "asyncio.Task[Booked | NotBooked]":
    """A call that has come to where it waits."""
    before = len(room)
    begun = asyncio.get_running_loop().create_task(room.reserve(act, wait_s=wait_s))
    await until(lambda: len(room) > before or begun.done())
    return begun


async def test_a_call_waits_until_others_give_back(tmp_path: Path) -> None:
    """It is let in the moment there is room, and was never refused."""
    async with _room(tmp_path) as (ledger, room):
        await room.reserve(_ask("1", 900), wait_s=50)
        waiting = await _begin(room, _ask("2", 500))
        assert not waiting.done()
        await ledger.end(Settle("1", exactly(0, 100), "complete"))
        assert isinstance(await waiting, Booked)
        assert len(room) == 0


@pytest.mark.parametrize("wait_s", [0, 0.01])
async def test_who_has_waited_long_enough_is_told_busy(wait_s: float, tmp_path: Path) -> None:
    """Also at once, for who will not wait."""
    async with _room(tmp_path) as (_, room):
        await room.reserve(_ask("1", 900), wait_s=0)
        reply = await room.reserve(_ask("2", 500), wait_s=wait_s)
        assert isinstance(reply, NotBooked)
        assert reply.refused.verdict is Verdict.BUSY
        assert len(room) == 0


async def test_what_is_used_up_does_not_wait(tmp_path: Path) -> None:
    """Waiting helps only against calls in flight: 500 of 1000 are used, and 600 will never come back."""
    async with _room(tmp_path) as (ledger, room):
        await room.reserve(_ask("1", 900), wait_s=50)
        await ledger.end(Settle("1", exactly(0, 500), "complete"))
        reply = await room.reserve(reserve("2", binding([POT]), call(600, 10)), wait_s=50)
        assert isinstance(reply, NotBooked)
        assert reply.refused.verdict is Verdict.EXHAUSTED


async def test_a_users_calls_come_in_in_their_order(tmp_path: Path) -> None:
    """A small call does not slip past a large one that came before it."""
    async with _room(tmp_path) as (ledger, room):
        await room.reserve(_ask("1", 600), wait_s=50)
        large = await _begin(room, _ask("2", 500))
        small = await _begin(room, _ask("3", 10))
        assert not small.done()
        await ledger.end(Settle("1", exactly(0, 1), "complete"))
        assert isinstance(await large, Booked)
        assert isinstance(await small, Booked)


async def test_one_users_queue_holds_up_nobody_else(tmp_path: Path) -> None:
    """Each user has a queue of their own."""
    async with _room(tmp_path) as (_, room):
        await room.reserve(_ask("1", 600), wait_s=50)
        large = await _begin(room, _ask("2", 500))
        assert isinstance(await room.reserve(_ask("3", 10, "bob"), wait_s=50), Booked)
        assert not large.done()
        large.cancel()


async def test_who_gives_up_leaves_the_turn_to_the_next(tmp_path: Path) -> None:
    """A client that goes is gone from the queue, and what waited behind it comes first."""
    async with _room(tmp_path) as (_, room):
        await room.reserve(_ask("1", 600), wait_s=50)
        large, small = await _begin(room, _ask("2", 500)), await _begin(room, _ask("3", 10))
        large.cancel()
        assert isinstance(await small, Booked)
        assert len(room) == 0


async def test_a_deadline_behind_another_gets_the_last_word(tmp_path: Path) -> None:
    """Who is not first and has no time left asks once more for itself."""
    async with _room(tmp_path) as (_, room):
        await room.reserve(_ask("1", 600), wait_s=50)
        large = await _begin(room, _ask("2", 500))
        assert isinstance(await room.reserve(_ask("3", 10), wait_s=0.01), Booked)
        large.cancel()


async def test_a_queue_is_bounded(tmp_path: Path) -> None:
    """Past so many of one user's calls the next is refused as busy at once."""
    async with _room(tmp_path) as (_, room):
        await room.reserve(_ask("1", 900), wait_s=50)
        waiting = [await _begin(room, _ask(f"w{number}", 500)) for number in range(OF_A_USER_MAX)]
        assert isinstance(await room.reserve(_ask("2", 500), wait_s=50), NotBooked)
        for each in waiting:
            each.cancel()
        await asyncio.wait(waiting)
        assert len(room) == 0


async def test_two_that_find_no_room_at_once_both_wait(tmp_path: Path) -> None:
    """Neither was first in the queue when it asked; the order in which they came decides."""
    async with _room(tmp_path) as (ledger, room):
        await room.reserve(_ask("1", 900), wait_s=50)
        both = [asyncio.get_running_loop().create_task(room.reserve(_ask(name, 500), wait_s=50)) for name in "ab"]
        await until(lambda: len(room) == 2)
        await ledger.end(Settle("1", exactly(0, 0), "complete"))
        assert [isinstance(reply, Booked) for reply in await asyncio.gather(*both)] == [True, True]
