"""The log: one event per line, as JSON or as text, written to a stream that may be slow, full or closed.

Logging never blocks the event loop. A log call only queues a line, and a thread writes the queue to the stream. If
too many lines are queued, new ones are dropped and counted. So a pipe that nobody reads can't stall a call, and a
closed one can't make it fail.

Records that libraries send to Python's `logging` become such lines too. An exception is logged as its type and the
place where it was raised, never with its text: aiohttp quotes the bytes that it failed to parse, which may be a key
or a prompt. The same holds for what Python itself would print, see `catch_stray_errors`.
"""

import logging
import os
import queue
import re
import sys
import threading
import warnings
from collections.abc import Iterator, MutableMapping
from types import TracebackType
from typing import Any, Literal, TextIO

import structlog

LogFormat = Literal["json", "console"]
# Which requests get a line in the log of `serve`.
LoggedCalls = Literal["all", "refusals", "none"]

_LINES_MAX = 10_000
_CLOSE_S = 1.0
_TEXT_MAX = 200
# How many of its innermost frames the place of an error has.
_FRAMES_MAX = 8
# Where the fixed words of a text by Python end and a value may begin: "Exception in callback f(b'…')".
_END_OF_WORDS = re.compile(r"[(<\[{=\n]")


class LogStream:
    """A writable stream for structlog that never blocks and never raises.

    `lines_max` bounds the queue, `dropped` counts the lines that were dropped and are not reported yet, and
    `reported` those that are. `format` is the format of the line which reports them.
    """

    def __init__(self, stream: TextIO, *, lines_max: int = _LINES_MAX) -> None:
        self.dropped = self.reported = 0
        self.format: LogFormat = "json"
        self._stream = stream
        self._descriptor = _descriptor_of(stream)
        # Without a bound of its own, because a queue with one takes ten times as long. None ends the thread.
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._lines_max = lines_max
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    @property
    def is_terminal(self) -> bool:
        """Whether the stream is a terminal, which shows colours."""
        return self._stream.isatty()

    def write(self, text: str) -> None:
        """Queue a line, or drop it if the queue is full."""
        if self._lines.qsize() < self._lines_max:
            self._lines.put(text)
        else:
            self.dropped += 1

    def flush(self) -> None:
        """Does nothing; structlog calls it, and the thread flushes after each line."""

    def close(self) -> None:
        """Write the queued lines, as far as the stream accepts them within a second.

        Returns at once if the queue is full: then the stream is stuck.
        """
        if self._lines.qsize() < self._lines_max:
            self._lines.put(None)
            self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (text := self._lines.get()) is not None:
            try:
                self._write(text)
                if self.dropped:
                    lines, self.dropped = self.dropped, 0
                    self.reported += lines
                    event = "log lines were dropped"
                    as_json = f'{{"event": "{event}", "lines": {lines}, "level": "warning"}}\n'
                    self._write(as_json if self.format == "json" else f"{event}: {lines}\n")
            except (OSError, ValueError):  # a full disk, a broken pipe, a closed stream: nowhere to report it
                self.dropped += 1

    def _write(self, text: str) -> None:
        """Write to the descriptor itself if there is one.

        A write that blocks would hold the lock of the stream, and the interpreter, which flushes standard error when
        it ends, would wait for that lock forever.
        """
        if self._descriptor is None:
            self._stream.write(text)
            self._stream.flush()
            return
        data = text.encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(self._descriptor, data) :]


def _descriptor_of(stream: TextIO) -> int | None:
    """The descriptor of a stream; None if it has none, as in tests."""
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


class _LibraryHandler(logging.Handler):
    """Turns a library's log record into a line with the logger's name, the level and the exception.

    The event is the record's template ("Error handling request from %s") without its arguments, which may hold a
    secret as well. asyncio has no templates: it formats a callback with its arguments before it logs.
    """

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        level = "error" if record.levelno >= logging.ERROR else "warning"
        text = str(record.msg)
        event = _words(text) if record.name == "asyncio" else text[:_TEXT_MAX]
        getattr(structlog.get_logger(record.name), level)(event, **describe(error))


def describe(error: BaseException | None) -> dict[str, str]:
    """The members of a line about this exception: its type, with those that caused it, and its place.

    For example {"error": "UpstreamError from ClientOSError", "place": "proxy.calls.relay:81 carry > …"}.
    """
    if error is None:
        return {}
    frames = [
        f"{frame.f_globals.get('__name__', '?')}:{line} {frame.f_code.co_name}"
        for frame, line in _frames(error.__traceback__)
    ]
    names = " from ".join(type(each).__name__ for each in _with_causes(error))
    return {"error": names, "place": " > ".join(frames[-_FRAMES_MAX:])}


def _frames(trace: TracebackType | None) -> "Iterator[tuple[Any, int]]":
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _with_causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, at most four."""
    chain: list[BaseException] = [error]
    while len(chain) < 4:
        last = chain[-1]
        cause = last.__cause__ or (None if last.__suppress_context__ else last.__context__)
        if cause is None:
            break
        chain.append(cause)
    return chain


def _describe_exception(_: object, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace the exception of an event (`exc_info`) by its description."""
    error = line.pop("exc_info", None)
    line.update(describe(error if isinstance(error, BaseException) else None))
    return line


def _words(text: str) -> str:
    return _END_OF_WORDS.split(text, maxsplit=1)[0].strip()[:_TEXT_MAX]


def catch_stray_errors() -> None:
    """Log what Python would otherwise print to standard error, with texts that may quote anything.

    These are warnings, exceptions that end a thread, and exceptions that can't be raised, for example in `__del__`.
    It is meant for a process that serves: the command logs the exception that ends it.
    """
    log = structlog.get_logger("python")

    def on_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        place = f"{os.path.basename(filename)}:{lineno}"
        log.warning("a warning of Python", text=_words(str(message)), warning=category.__name__, place=place)

    def on_thread(ended: threading.ExceptHookArgs) -> None:
        if not issubclass(ended.exc_type, SystemExit):
            log.error("an error ended a thread", thread=ended.thread and ended.thread.name, exc_info=ended.exc_value)

    def on_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
        where = getattr(unraisable.object, "__qualname__", type(unraisable.object).__qualname__)
        log.error("an error could not be raised", where=where, exc_info=unraisable.exc_value)

    warnings.showwarning = on_warning  # type: ignore[assignment] # the other two parameters are not used
    threading.excepthook = on_thread
    sys.unraisablehook = on_unraisable


# What `set_up` was called with last, for `set_format`.
_current: tuple[LogStream, int, LogFormat] | None = None


def set_up(stream: LogStream, *, level: int, format: LogFormat = "json") -> None:
    """Send this process's log to `stream`: the proxy's events from `level` up, those of libraries from WARNING up."""
    global _current
    _current = stream, level, format
    stream.format = format
    always: list[structlog.typing.Processor] = [structlog.processors.add_log_level, _describe_exception]
    as_json: list[structlog.typing.Processor] = [
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.JSONRenderer(),
    ]
    as_text: list[structlog.typing.Processor] = [
        structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
        structlog.dev.ConsoleRenderer(colors=stream.is_terminal, pad_event_to=0),
    ]
    structlog.configure(
        processors=[*always, *(as_json if format == "json" else as_text)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream),  # type: ignore[arg-type]
    )
    logging.basicConfig(handlers=[_LibraryHandler()], level=logging.WARNING, force=True)


def lines_dropped() -> int:
    """How many lines this process has dropped since `set_up`; 0 if it was not called, as in tests."""
    return 0 if _current is None else _current[0].reported + _current[0].dropped


def set_format(format: LogFormat) -> None:
    """Change the format of the log from now on. Does nothing if `set_up` was not called, as in tests."""
    if _current is not None and _current[2] != format:
        stream, level, _ = _current
        set_up(stream, level=level, format=format)
