"""Tasks of the program's own, which outlive the request that started them.

The event loop keeps only a weak reference to a task, so one that nobody holds may vanish half way; and an error
in one would be seen by nobody. Both are mended here, once.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

T = TypeVar("T")

log = structlog.get_logger("tasks")


class Tasks:
    """Starts tasks, holds them until they end, and logs what they died of."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, name: str, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Begin `work` as a task of its own."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def all_ended(self) -> None:
        """Wait until none is running."""
        while self._running:
            await asyncio.wait(self._running)

    async def finish(self, grace_s: float) -> int:
        """Wait until all have ended, at most `grace_s`; cancel the rest and return how many those were."""
        running = set(self._running)
        if running:
            await asyncio.wait(running, timeout=grace_s)
        late = [task for task in self._running if not task.done()]
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return len(late)

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("task failed", task=task.get_name(), exc_info=error)
