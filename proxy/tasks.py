"""Background tasks that outlive the request that started them.

asyncio keeps only a weak reference to a task. A task that nobody else refers to can be garbage-collected before it
has ended, and nobody sees the exception of a task that nobody awaits. `Tasks` keeps the reference and logs the
exception.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

T = TypeVar("T")

log = structlog.get_logger("tasks")


class Tasks:
    """A set of running tasks. `len()` is how many are running."""

    def __init__(self) -> None:
        self.started = 0  # how many there were so far, those included that have ended
        self._running: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, name: str, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Run `work` in a new task. An exception is logged as "task failed" with this name."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.started += 1
        self._running.add(task)
        task.add_done_callback(self._on_done)
        return task

    def enter(self, task: "asyncio.Task[Any]") -> None:
        """Count a running task as one of these until `leave`."""
        self.started += 1
        self._running.add(task)

    def leave(self, task: "asyncio.Task[Any]") -> None:
        """Count the task no longer."""
        self._running.discard(task)

    async def all_ended(self) -> None:
        """Wait until no task is running, those included that start while it waits."""
        while self._running:
            await asyncio.wait(self._running)

    async def finish(self, grace_s: float) -> int:
        """Wait at most `grace_s` seconds for the running tasks, cancel the rest, and return how many those were.

        Tasks that start while it waits are cancelled too. A cancelled task may still clean up: it is awaited.
        """
        running = set(self._running)
        if running:
            await asyncio.wait(running, timeout=grace_s)
        late = [task for task in self._running if not task.done()]
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return len(late)

    def _on_done(self, task: "asyncio.Task[Any]") -> None:
        self._running.discard(task)
        # Reading the exception also stops asyncio from logging "Task exception was never retrieved".
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("task failed", task=task.get_name(), exc_info=error)


async def first_of(*works: Coroutine[Any, Any, object], timeout_s: float | None = None) -> None:
    """Wait until one of these has ended, at most `timeout_s` seconds if it is given, and cancel the others.

    Raises what the one that ended first has raised.
    """
    tasks = [asyncio.get_running_loop().create_task(work) for work in works]
    try:
        ended, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
