"""Background tasks are not garbage-collected, their exceptions are logged, and a shutdown waits for them."""

import asyncio
import gc
import weakref

import pytest
from structlog.testing import capture_logs

from proxy.tasks import Tasks, first_of


async def answer(value):
    return value


async def fail():
    raise RuntimeError("half way")


async def until(event):
    await event.wait()


async def test_a_started_task_has_a_name_and_can_be_awaited():
    """When it has ended, `Tasks` no longer refers to it."""
    tasks = Tasks()
    task = tasks.start("answering", answer(42))
    assert (task.get_name(), len(tasks)) == ("answering", 1)
    assert await task == 42
    assert await tasks.finish(1) == 0
    assert len(tasks) == 0


async def test_a_waiting_task_is_not_garbage_collected():
    """The event loop's own reference is weak, so only `Tasks` keeps this task alive."""
    waiting = []

    async def wait():
        future = asyncio.get_running_loop().create_future()
        waiting.append(weakref.ref(future))  # weak: only the task that awaits the future keeps it alive
        return await future

    tasks = Tasks()
    tasks.start("waiting", wait())
    await asyncio.sleep(0)
    gc.collect()
    waiting[0]().set_result(None)
    assert await tasks.finish(1) == 0


async def test_the_exception_of_a_task_is_logged_with_its_name():
    """Once. asyncio's own "Task exception was never retrieved" would be a second report, and fail this test."""
    tasks = Tasks()
    with capture_logs() as logs:
        tasks.start("failing", fail())
        await tasks.finish(1)
        gc.collect()
    [line] = logs
    assert (line["event"], line["log_level"], line["task"]) == ("task failed", "error", "failing")
    assert str(line["exc_info"]) == "half way"


async def test_a_cancelled_task_is_not_logged():
    """Cancellation is not a failure."""
    tasks = Tasks()
    with capture_logs() as logs:
        tasks.start("waiting", until(asyncio.Event())).cancel()
        assert await tasks.finish(1) == 0
    assert logs == []


async def test_finish_without_tasks_returns_at_once():
    """It does not wait for the grace period."""
    assert await asyncio.wait_for(Tasks().finish(1000), 1) == 0


async def test_finish_waits_for_tasks_that_end_within_the_grace_period():
    """Such a task is not cancelled."""
    tasks, ended = Tasks(), []

    async def end_soon():
        await asyncio.sleep(0)
        ended.append("soon")

    tasks.start("ending soon", end_soon())
    assert await tasks.finish(1000) == 0
    assert ended == ["soon"]


async def test_finish_cancels_and_counts_late_tasks():
    """It waits for their cleanup. An exception during cleanup is logged and does not stop it."""
    tasks, tidied = Tasks(), []

    async def tidy_up():
        try:
            await until(asyncio.Event())
        finally:
            await asyncio.sleep(0)
            tidied.append("up")

    async def tidy_up_badly():
        try:
            await until(asyncio.Event())
        finally:
            raise RuntimeError("while tidying up")

    tasks.start("tidying", tidy_up())
    tasks.start("failing to", tidy_up_badly())
    tasks.start("ending", answer(42))
    await asyncio.sleep(0)
    with capture_logs() as logs:
        assert await tasks.finish(0) == 2
    assert tidied == ["up"]
    assert [line["task"] for line in logs] == ["failing to"]
    assert len(tasks) == 0


async def test_finish_also_cancels_tasks_that_start_meanwhile():
    """Otherwise they would use parts of the program that are closed by then."""
    tasks = Tasks()

    async def start_another():
        tasks.start("another", until(asyncio.Event()))

    tasks.start("starting", start_another())
    assert await tasks.finish(1) == 1
    assert len(tasks) == 0


async def test_all_ended_waits_for_tasks_that_start_meanwhile() -> None:
    """One task may start another one."""
    tasks = Tasks()
    done: list[str] = []

    async def second() -> None:
        done.append("second")

    async def first() -> None:
        tasks.start("second", second())
        done.append("first")

    tasks.start("first", first())
    await tasks.all_ended()
    await tasks.all_ended()
    assert done == ["first", "second"]


async def test_the_tasks_that_were_started_are_counted():
    """Also those that have ended."""
    tasks = Tasks()
    await asyncio.gather(*(tasks.start("answering", answer(number)) for number in range(3)))
    assert (tasks.started, len(tasks)) == (3, 0)


async def test_the_first_to_end_ends_the_wait_and_the_others_are_cancelled():
    """Or the end of the time. What the first one raises is raised."""
    never = asyncio.Event()
    for works in ([until(never), answer(1)], [until(never), until(never)]):
        others = asyncio.all_tasks()
        await first_of(*works, timeout_s=60 if len({work.__name__ for work in works}) == 2 else 0)
        assert asyncio.all_tasks() == others
    with pytest.raises(RuntimeError, match="half way"):
        await first_of(fail(), until(never), timeout_s=60)


async def test_a_task_that_entered_counts_until_it_leaves():
    """A request becomes a call and ends as a request again: what comes after the call is not waited for."""
    tasks, left, go_on, done = Tasks(), asyncio.Event(), asyncio.Event(), []

    async def request():
        tasks.enter(running)
        await go_on.wait()
        tasks.leave(running)
        left.set()
        await asyncio.sleep(0)
        done.append(True)

    running = asyncio.ensure_future(request())
    await asyncio.sleep(0)
    assert (len(tasks), tasks.started) == (1, 1)
    go_on.set()
    await left.wait()
    assert (len(tasks), await tasks.finish(0)) == (0, 0)
    await running
    assert done == [True]


async def test_finish_cancels_a_task_that_entered():
    """As one that was started."""
    tasks, ended = Tasks(), []

    async def request():
        tasks.enter(running)
        try:
            await asyncio.Event().wait()
        finally:
            tasks.leave(running)
            ended.append(True)

    running = asyncio.ensure_future(request())
    await asyncio.sleep(0)
    assert await tasks.finish(0) == 1
    assert (ended, running.cancelled(), len(tasks)) == ([True], True, 0)
