"""The log: one JSON object a line, on its way to a stream that may be slow, full or closed.

Whoever logs hands over a line and goes on. A thread of its own writes; when too many lines wait, new ones are
dropped and counted. So a pipe that nobody reads stops no call, and a closed one changes no answer.

What libraries say through Python's `logging` comes as such a line too, without the text of their errors: aiohttp
quotes the bytes that it could not parse, and those may be a key or a prompt.
"""

import logging
import queue
import threading
from typing import TextIO

import structlog

_LINES_MAX = 10_000
_CLOSE_S = 1.0


class LogStream:
    """Something to write lines to that never waits and never raises. `close` gives the thread a second to finish."""

    def __init__(self, stream: TextIO, *, lines_max: int = _LINES_MAX) -> None:
        self.dropped = 0
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(lines_max)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Queue a line, or drop it where too many wait."""
        try:
            self._lines.put_nowait(text)
        except queue.Full:
            self.dropped += 1

    def flush(self) -> None:
        """Nothing to do: the thread flushes what it writes."""

    def close(self) -> None:
        """Write what is queued, as far as the stream takes it within a second."""
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
            except (OSError, ValueError):  # closed, or full: there is nobody to tell
                self.dropped += 1


class _FromLogging(logging.Handler):
    """Passes on what a library logs: who, how grave, the words of its template, and the kind of error."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        level = "error" if record.levelno >= logging.ERROR else "warning"
        getattr(structlog.get_logger(record.name), level)(str(record.msg)[:200], error=error)


def set_up(stream: LogStream, *, level: int) -> None:
    """Send all that is logged in this process, at this level or above, to `stream`."""
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
    logging.basicConfig(handlers=[_FromLogging()], level=logging.WARNING, force=True)
