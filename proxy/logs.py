"""The log: one event per line, as JSON or as text, written to a stream that may be slow, full or closed.

Logging never blocks the event loop. A log call only queues a line, and a thread writes the queue to the stream. If
too many lines are queued, new ones are dropped and counted. So a pipe that nobody reads can't stall a call, and a
closed one can't make it fail.

Records that libraries send to Python's `logging` become such lines too. An exception is logged as its type and the
place where it was raised, never with its text: aiohttp quotes the bytes that it failed to parse, which may be a key
or a prompt. The same holds for what Python itself would print, see `catch_stray_errors`.
"""

import json
import logging
import os
import queue
import re
import sys
import threading
import warnings
from collections.abc import Iterator, MutableMapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, TextIO

import orjson
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
# A dataclass is logged as its `repr`, which may leave out a secret.
_JSON_OPTIONS = orjson.OPT_UTC_Z | orjson.OPT_PASSTHROUGH_DATACLASS


class LogStream:
    """A logger for structlog that writes each line to a stream, and never blocks and never raises.

    `lines_max` bounds the queue, `dropped` counts the lines that were dropped and are not reported yet, and
    `reported` those that are. `format` is the format of the lines.
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

    def write(self, line: str) -> None:
        """Queue a line, or drop it if the queue is full."""
        if self._lines.qsize() < self._lines_max:
            self._lines.put(line)
        else:
            self.dropped += 1

    debug = info = warning = error = critical = write  # structlog calls the one of the event's level

    def close(self) -> None:
        """Write the queued lines, as far as the stream accepts them within a second.

        Returns at once if the queue is full: then the stream is stuck.
        """
        if self._lines.qsize() < self._lines_max:
            self._lines.put(None)
            self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write(line)
                if self.dropped:
                    lines, self.dropped = self.dropped, 0
                    self.reported += lines
                    event = "log lines were dropped"
                    as_json = f'{{"event":"{event}","lines":{lines},"level":"warning"}}'
                    self._write(as_json if self.format == "json" else f"{event}: {lines}")
            except (OSError, ValueError):  # a full disk, a broken pipe, a closed stream: nowhere to report it
                self.dropped += 1

    def _write(self, line: str) -> None:
        """Write to the descriptor itself if there is one.

        A write that blocks would hold the lock of the stream, and the interpreter, which flushes standard error when
        it ends, would wait for that lock forever.
        """
        if self._descriptor is None:
            self._stream.write(f"{line}\n")
            self._stream.flush()
            return
        data = f"{line}\n".encode("utf-8", "backslashreplace")
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


class _Renderer:
    """Makes the line of an event, in the format of the stream: the one step that structlog takes for each event."""

    def __init__(self, stream: LogStream) -> None:
        self._stream = stream
        self._stamp = structlog.processors.TimeStamper(fmt=None)
        self._as_text = structlog.dev.ConsoleRenderer(colors=stream.is_terminal, pad_event_to=0)

    def __call__(self, logger: object, level: str, event: MutableMapping[str, Any]) -> str:
        event["level"] = level
        if "exc_info" in event:
            error = event.pop("exc_info")
            event.update(describe(error if isinstance(error, BaseException) else None))
        self._stamp(logger, level, event)
        now = datetime.fromtimestamp(event["timestamp"], UTC)
        if self._stream.format == "console":
            event["timestamp"] = f"{now.astimezone():%H:%M:%S}"
            return self._as_text(logger, level, event)
        event["timestamp"] = now
        return _as_json(event)


def _as_json(event: MutableMapping[str, Any]) -> str:
    """The event as JSON in printable ASCII, so that no text can start another line or control a terminal."""
    try:
        text = orjson.dumps(event, _shown, _JSON_OPTIONS).decode()
        if text.isascii() and "\x7f" not in text:
            return text
    except TypeError:
        pass  # a surrogate, or an integer of more than 64 bits
    return json.dumps(event, separators=(",", ":"), default=_shown)


def _shown(value: object) -> str:
    return value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else repr(value)


# The stream of this process's log.
_current: LogStream | None = None


def set_up(stream: LogStream, *, level: int, format: LogFormat = "json") -> None:
    """Send this process's log to `stream`: the proxy's events from `level` up, those of libraries from WARNING up."""
    global _current
    _current = stream
    stream.format = format
    structlog.configure(
        processors=[_Renderer(stream)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: stream,
    )
    logging.basicConfig(handlers=[_LibraryHandler()], level=logging.WARNING, force=True)


def lines_dropped() -> int:
    """How many lines this process has dropped since `set_up`; 0 if it was not called, as in tests."""
    return 0 if _current is None else _current.reported + _current.dropped


def set_format(format: LogFormat) -> None:
    """Change the format of the log from now on. Does nothing if `set_up` was not called, as in tests."""
    if _current is not None:
        _current.format = format
