"""The memory of large bodies is bounded for the process: further ones wait in order, and then get a 503."""

import asyncio

import pytest

from proxy.errors import BodyMemoryFull
from proxy.web.body_memory import REQUEST_BYTES_MAX, BodyMemory, BodyShare

MB = 10**6
BUDGET = 4 * REQUEST_BYTES_MAX


async def _nothing() -> None:
    pass


def _share(memory: BodyMemory, user: str = "ann") -> BodyShare:
    return BodyShare(memory, user, _nothing)


async def _start(memory: BodyMemory, user: str, size: int) -> "asyncio.Task[None]":
    """A body that waits, once it does."""
    task = asyncio.create_task(memory.hold(user, size))
    await asyncio.sleep(0)
    return task


async def test_small_bodies_always_pass_and_do_not_count() -> None:
    """They are nearly all calls, and a full budget must not stop them."""
    memory = BodyMemory(BUDGET)
    memory.grow("ann", BUDGET // 2)
    memory.grow("bob", BUDGET // 2)
    share = _share(memory)
    await share.hold(256 * 1024)
    share.free()
    assert memory.bytes_held == BUDGET


async def test_a_body_counts_until_it_is_freed() -> None:
    """It may be freed twice: by the dispatcher, and at the end of the call."""
    memory = BodyMemory(BUDGET)
    share = _share(memory)
    await share.hold(MB)
    await share.hold(MB // 2)
    assert memory.bytes_held == MB
    share.free()
    share.free()
    assert memory.bytes_held == 0


async def test_a_body_of_unknown_length_counts_as_it_grows() -> None:
    """It takes a quarter more than it has, but never more than a body may have. Without room it is a 503 at once."""
    memory = BodyMemory(BUDGET)
    share = _share(memory)
    for size in (100, MB // 2, MB, REQUEST_BYTES_MAX - 1):
        await share.hold(size)
        assert size <= max(memory.bytes_held, 256 * 1024) <= REQUEST_BYTES_MAX
    memory.grow("bob", BUDGET // 2)
    other = _share(memory, "zoe")
    await other.hold(MB)
    memory.grow("zoe", BUDGET - memory.bytes_held)
    with pytest.raises(BodyMemoryFull):
        await other.hold(2 * MB)


async def test_bodies_wait_in_order_and_one_user_does_not_hold_up_others() -> None:
    """One user holds at most half of the budget. A body that waits for other users' memory is not overtaken."""
    memory = BodyMemory(BUDGET)
    await memory.hold("ann", BUDGET // 2)
    own = await _start(memory, "ann", MB)
    await memory.hold("bob", BUDGET // 2 - MB)
    large = await _start(memory, "zoe", 2 * MB)
    small = await _start(memory, "zoe", MB)
    assert not any(task.done() for task in (own, large, small))
    memory.free("bob", MB)
    await asyncio.gather(large)
    assert not any(task.done() for task in (own, small))
    memory.free("ann", MB)
    await asyncio.gather(own)
    assert not small.done()
    memory.free("bob", MB)
    await asyncio.gather(small)
    assert memory.bytes_held == BUDGET


async def test_a_body_that_waits_too_long_is_a_503_with_a_time_to_come_back() -> None:
    """Nothing stays held, and those behind it go on."""
    memory = BodyMemory(BUDGET, wait_s=0)
    await memory.hold("ann", BUDGET // 2)
    await memory.hold("bob", BUDGET // 2)
    with pytest.raises(BodyMemoryFull) as caught:
        await memory.hold("zoe", MB)
    assert caught.value.headers == {"retry-after": "5"}
    memory.free("ann", BUDGET // 2)
    await memory.hold("zoe", MB)
    assert memory.bytes_held == BUDGET // 2 + MB


async def test_a_client_that_leaves_while_its_body_waits_holds_nothing() -> None:
    """Also if its turn comes at that moment."""
    memory = BodyMemory(BUDGET)
    await memory.hold("ann", BUDGET // 2)
    await memory.hold("bob", BUDGET // 2)
    gone = await _start(memory, "zoe", MB)
    gone.cancel()
    await asyncio.wait([gone])
    late = await _start(memory, "zoe", MB)
    memory.free("bob", BUDGET // 2)
    late.cancel()
    await asyncio.wait([late])
    assert memory.bytes_held == BUDGET // 2


async def test_a_body_that_gives_up_at_the_moment_at_which_there_is_room_takes_none() -> None:
    """Its task is cancelled and has not run yet when another body is freed. Both ended with a 500 before."""
    memory = BodyMemory(BUDGET)
    await memory.hold("ann", BUDGET // 2)
    waiting = await _start(memory, "ann", REQUEST_BYTES_MAX)
    waiting.cancel()
    memory.free("ann", BUDGET // 2)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert memory.bytes_held == 0
    await memory.hold("ann", BUDGET // 2)


async def test_a_large_body_is_checked_once_before_it_is_read() -> None:
    """A user whose quotas are 0 is refused there."""
    checked: list[int] = []

    async def check() -> None:
        checked.append(1)

    share = BodyShare(BodyMemory(BUDGET), "ann", check)
    for size in (100, MB, 2 * MB):
        await share.hold(size)
        await share.check(size)
    assert checked == [1]
    share.free()
