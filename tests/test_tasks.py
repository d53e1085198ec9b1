"""Tasks outlive whoever started them, are held, and do not fail in silence."""

import asyncio
import gc
import weakref

from structlog.testing import capture_logs

from proxy.tasks import Tasks


async def answer(value):
    return value


async def fail():
    raise RuntimeError("half way")


async def until(event):
    await event.wait()


async def test_a_task_has_its_name_and_its_answer():
    """Whoever wants to may wait for it; when it has ended it is let go of."""
    tasks = Tasks()
    task = tasks.start("answering", answer(42))
    assert (task.get_name(), len(tasks)) == ("answering", 1)
    assert await task == 42
    assert await tasks.finish(1) == 0
    assert len(tasks) == 0


async def test_a_task_that_nobody_else_holds_does_not_vanish():
    """The loop's own reference is weak: without us the garbage collector would take a waiting task away."""
    waiting = []

    async def wait():
        future = asyncio.get_running_loop().create_future()
        waiting.append(weakref.ref(future))  # so that the future is held by the task that waits for it, and only so
        return await future

    tasks = Tasks()
    tasks.start("waiting", wait())
    await asyncio.sleep(0)
    gc.collect()
    waiting[0]().set_result(None)
    assert await tasks.finish(1) == 0


async def test_what_a_task_died_of_is_logged_with_its_name():
    """Once, and by us alone: the loop's own complaint about an error that nobody fetched would be a warning here."""
    tasks = Tasks()
    with capture_logs() as logs:
        tasks.start("failing", fail())
        await tasks.finish(1)
        gc.collect()
    [line] = logs
    assert (line["event"], line["log_level"], line["task"]) == ("task failed", "error", "failing")
    assert str(line["exc_info"]) == "half way"


async def test_a_cancelled_task_is_no_failure():
    """It was asked to end."""
    tasks = Tasks()
    with capture_logs() as logs:
        tasks.start("waiting", until(asyncio.Event())).cancel()
        assert await tasks.finish(1) == 0
    assert logs == []


async def test_nothing_to_finish_takes_no_time():
    """A program that did nothing stops at once, however long the grace."""
    assert await asyncio.wait_for(Tasks().finish(1000), 1) == 0


async def test_finishing_waits_for_those_that_end_in_time():
    """Nobody is cut off who needs less than the grace."""
    tasks, ended = Tasks(), []

    async def end_soon():
        await asyncio.sleep(0)
        ended.append("soon")

    tasks.start("ending soon", end_soon())
    assert await tasks.finish(1000) == 0
    assert ended == ["soon"]


async def test_those_that_are_late_are_cancelled_and_counted():
    """They may still tidy up, and are waited for while they do; what goes wrong there is no reason not to stop."""
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


async def test_what_a_task_starts_while_we_finish_is_finished_too():
    """Else it would run on into a program whose parts are closed."""
    tasks = Tasks()

    async def start_another():
        tasks.start("another", until(asyncio.Event()))

    tasks.start("starting", start_another())
    assert await tasks.finish(1) == 1
    assert len(tasks) == 0


async def test_all_ended_waits_for_those_that_begin_meanwhile() -> None:
    """One task may start another; only then is nothing running."""
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
