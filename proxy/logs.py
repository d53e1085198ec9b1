"""The log: one JSON object per line, written to a stream that may be slow, full or closed.

Logging never blocks the event loop. A log call only queues a line, and a thread writes the queue to the stream. If
too many lines are queued, new ones are dropped and counted. So a pipe that nobody reads can't stall a call, and a
closed one can't make it fail.

Records that libraries send to Python's `logging` become such lines too, but without the text of their exceptions:
aiohttp quotes the bytes that it failed to parse, which may be a key or a prompt.
"""

import logging
import queue
import threading
from typing import TextIO

import structlog

_LINES_MAX = 10_000
_CLOSE_S = 1.0


class LogStream:
    """A writable stream for structlog that never blocks and never raises.

    `lines_max` bounds the queue, `dropped` counts the lines that were dropped and are not reported yet.
    """

    def __init__(self, stream: TextIO, *, lines_max: int = _LINES_MAX) -> None:
        self.dropped = 0
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(lines_max)  # None ends the thread
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Queue a line, or drop it if the queue is full."""
        try:
            self._lines.put_nowait(text)
        except queue.Full:
            self.dropped += 1

    def flush(self) -> None:
        """Does nothing; structlog calls it, and the thread flushes after each line."""

    def close(self) -> None:
        """Write the queued lines, as far as the stream accepts them within a second.

        Returns at once if the queue is full: then the stream is stuck, and no end mark fits into the queue.
        """
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (text := self._lines.get()) is not None:
            try:
                self._stream.write(text)
                if self.dropped:
                    lines, self.dropped = self.dropped, 0
                    self._stream.write(f'{{"event": "log lines were dropped", "lines": {lines}}}\n')
                self._stream.flush()
            except (OSError, ValueError):  # a full disk, a broken pipe, a closed stream: nowhere to report it
                self.dropped += 1


class _LibraryHandler(logging.Handler):
    """Turns a library's log record into a line with the logger's name, the level and the exception's type.

    The event is the record's template ("Error handling request from %s") without its arguments, which may hold a
    secret as well.
    """

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        level = "error" if record.levelno >= logging.ERROR else "warning"
        getattr(structlog.get_logger(record.name), level)(str(record.msg)[:200], error=error)


def set_up(stream: LogStream, *, level: int) -> None:
    """Send this process's log to `stream`: the proxy's events from `level` up, those of libraries from WARNING up."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream),  # type: ignore[arg-type]
    )
    logging.basicConfig(handlers=[_LibraryHandler()], level=logging.WARNING, force=True)
