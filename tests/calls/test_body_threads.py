"""Large bodies are read in threads, one at a time, so that the event loop goes on (T120)."""

import asyncio
import threading

import pytest

from proxy.calls.body_threads import MEDIUM_BYTES_MAX, SMALL_BYTES_MAX, BodyThreads
from proxy.errors import BodiesWaitTooLong, InvalidRequest


async def test_a_small_body_is_read_at_once_and_a_larger_one_in_a_thread() -> None:
    """A thread would cost a short call a tenth more. Those in between do not wait for the largest."""
    threads = BodyThreads()
    names = [
        await threads.run(threading.current_thread, cost=cost)
        for cost in (0, SMALL_BYTES_MAX, SMALL_BYTES_MAX + 1, MEDIUM_BYTES_MAX, MEDIUM_BYTES_MAX + 1)
    ]
    assert names[0] is names[1] is threading.main_thread()
    assert names[2] is names[3] is not names[4]
    assert threading.main_thread() not in names[2:]
    threads.close()


async def test_one_large_body_is_read_at_a_time_in_order() -> None:
    """The second begins when the first has ended, while the loop and a body in between go on."""
    threads, gate, order = BodyThreads(), threading.Event(), []
    first = asyncio.create_task(threads.run(gate.wait, cost=MEDIUM_BYTES_MAX + 1))
    others = [
        asyncio.create_task(threads.run(lambda number=number: order.append(number), cost=MEDIUM_BYTES_MAX + 1))
        for number in range(3)
    ]
    await threads.run(lambda: order.append("between"), cost=MEDIUM_BYTES_MAX)
    assert order == ["between"]
    gate.set()
    await asyncio.gather(first, *others)
    assert order == ["between", 0, 1, 2]
    threads.close()


async def test_a_body_that_waits_too_long_for_others_is_a_503() -> None:
    """It says when to come back, and is not read later."""
    threads, gate, order = BodyThreads(wait_s=0), threading.Event(), []
    large = MEDIUM_BYTES_MAX + 1
    blocking = asyncio.get_running_loop().run_in_executor(threads._large, gate.wait)
    with pytest.raises(BodiesWaitTooLong) as caught:
        await threads.run(lambda: order.append(1), cost=large)
    assert caught.value.headers == {"retry-after": "5"}
    gate.set()
    await blocking
    threads.close()
    assert order == []


async def test_an_error_of_the_work_is_raised_as_it_is() -> None:
    """A 400 is the same, whether the body is small or large."""
    threads = BodyThreads()

    def refuse() -> None:
        raise InvalidRequest("No.")

    for cost in (0, MEDIUM_BYTES_MAX, MEDIUM_BYTES_MAX + 1):
        with pytest.raises(InvalidRequest, match="No"):
            await threads.run(refuse, cost=cost)
    threads.close()
