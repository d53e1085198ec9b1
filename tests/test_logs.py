"""The log never blocks a call, never makes one fail, and contains no secret of one."""

import asyncio
import contextlib
import gc
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest
import structlog
import uvloop

from proxy.logs import LogFormat, LogStream, catch_stray_errors, lines_dropped, set_format, set_up


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def _lines(written: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_every_event_is_one_line_of_json() -> None:
    """T94: line ends and control characters that a client sent can't start another line."""
    written = io.StringIO()
    stream = LogStream(written)
    set_up(stream, level=logging.INFO)
    structlog.get_logger("x").info("hello\nworld", user="a\u2028b\x1b[31m")
    structlog.get_logger("x").debug("not at this level")
    stream.close()
    (line,) = _lines(written)
    assert (line["event"], line["user"], line["level"]) == ("hello\nworld", "a\u2028b\x1b[31m", "info")


def test_records_of_libraries_have_no_texts_and_no_arguments() -> None:
    """aiohttp quotes the bytes that it failed to parse, which may be a key or a prompt."""
    written = io.StringIO()
    stream = LogStream(written)
    set_up(stream, level=logging.INFO)
    try:
        raise ValueError("Bearer sk-secret")
    except ValueError as error:
        assert error.__traceback__
        raised_at = error.__traceback__.tb_lineno
        logging.getLogger("aiohttp.server").exception("Error handling request from %s", "sk-secret")
    logging.getLogger("other").warning("beware")
    logging.getLogger("other").info("chatter")
    stream.close()
    assert "secret" not in written.getvalue()
    first, second = _lines(written)
    assert (first["event"], first["error"], first["level"]) == (
        "Error handling request from %s",
        "ValueError",
        "error",
    )
    assert first["place"] == f"{__name__}:{raised_at} test_records_of_libraries_have_no_texts_and_no_arguments"
    assert (second["event"], second["level"]) == ("beware", "warning")
    assert "error" not in second


def test_an_event_has_no_text_of_an_exception() -> None:
    """Neither in JSON nor in text, and neither of the exception itself nor of one that caused it."""
    written = io.StringIO()
    stream = LogStream(written)
    set_up(stream, level=logging.INFO)
    formats: tuple[LogFormat, ...] = ("json", "console")
    for format in formats:
        set_format(format)
        try:
            try:
                json.loads("{secret")
            except ValueError as cause:
                raise KeyError("secret") from cause
        except KeyError as error:
            structlog.get_logger("x").error("a call failed", exc_info=error, request="req_1")
    stream.close()
    assert "secret" not in written.getvalue()
    as_json, text = written.getvalue().splitlines()
    line = json.loads(as_json)
    assert (line["error"], line["request"]) == ("KeyError from JSONDecodeError", "req_1")
    assert line["place"].endswith("test_an_event_has_no_text_of_an_exception")
    assert "error='KeyError from JSONDecodeError'" in text


class Unraisable:
    """Its `__del__` raises, which Python can only print."""

    def __del__(self) -> None:
        raise ValueError("secret")


def test_what_python_would_print_is_logged_without_its_text() -> None:
    """T93: warnings, and exceptions in a thread, in `__del__`, and in a callback or a task of the event loop."""

    def fail(*_: object) -> None:
        raise ValueError("secret")

    async def leave() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(fail, b"secret")
        forgotten = loop.create_task(asyncio.to_thread(fail))
        await asyncio.wait([forgotten])

    written = io.StringIO()
    stream = LogStream(written)
    set_up(stream, level=logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        catch_stray_errors()
        warnings.warn("unclosed <socket of 'secret'>", ResourceWarning, stacklevel=1)
    thread = threading.Thread(target=fail, name="worker")
    thread.start()
    thread.join()
    quiet = threading.Thread(target=sys.exit)
    quiet.start()
    quiet.join()
    Unraisable()
    for run in (asyncio.run, uvloop.run):
        run(leave())
        gc.collect()
    stream.close()
    assert "secret" not in written.getvalue()
    lines = _lines(written)
    assert [line["event"] for line in lines[:3]] == [
        "a warning of Python",
        "an error ended a thread",
        "an error could not be raised",
    ]
    assert (lines[0]["text"], lines[0]["warning"]) == ("unclosed", "ResourceWarning")
    assert (lines[1]["thread"], lines[2]["where"]) == ("worker", "Unraisable.__del__")
    assert all(line["error"] == "ValueError" and " fail" in str(line["place"]) for line in (lines[1], *lines[3:]))
    events = [str(line["event"]) for line in lines[3:]]
    assert sum(event.startswith("Exception in callback") for event in events) == 2
    assert events.count("Task exception was never retrieved") == 2


def test_the_format_can_change_while_the_process_runs() -> None:
    """Text for people has the same members, and no control characters of a client."""
    written = io.StringIO()
    stream = LogStream(written)
    set_up(stream, level=logging.INFO)
    set_format("console")
    structlog.get_logger("x").info("request", user="a\nb\x1b[31m", status=200)
    set_format("json")
    structlog.get_logger("x").info("request", status=201)
    stream.close()
    text, as_json = written.getvalue().splitlines()
    assert "request" in text
    assert "status=200" in text
    assert "\x1b" not in text
    assert json.loads(as_json)["status"] == 201


def test_dropped_lines_are_reported_in_the_format_of_the_log() -> None:
    """The line that reports them is text if the others are."""
    written = io.StringIO()
    stream = LogStream(written)
    stream.format, stream.dropped = "console", 3
    stream.write("hello")
    stream.close()
    assert written.getvalue() == "hello\nlog lines were dropped: 3\n"
    assert (stream.dropped, stream.reported) == (0, 3)


def test_dropped_lines_are_counted_whether_or_not_they_are_reported() -> None:
    """0 in a process that has set up no log."""
    stream = LogStream(io.StringIO())
    set_up(stream, level=logging.INFO)
    stream.dropped, stream.reported = 2, 5
    assert lines_dropped() == 7
    stream.close()


def test_a_full_pipe_blocks_no_call() -> None:
    """T93: lines are dropped when the queue is full, and their number is logged when the pipe is read again."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"before\n" * 500)
    os.set_blocking(writing, True)
    with os.fdopen(writing, "w") as pipe, os.fdopen(reading) as end:
        stream = LogStream(pipe, lines_max=10)
        for _ in range(500):
            stream.write("x" * 1000)
        assert stream.dropped > 400
        stream.close()  # returns at once, because the queue is full
        seen = ""
        while "dropped" not in seen:
            seen = end.readline()
        assert json.loads(seen)["lines"] > 400
        rest = threading.Thread(target=end.read)
        rest.start()
        stream.close()
        pipe.close()
        rest.join()


def test_a_process_ends_also_if_nobody_reads_its_log() -> None:
    """Its log is stuck in a full pipe. The interpreter must not wait for it when the process ends."""
    program = (
        "import sys, logging, structlog\n"
        "from proxy.logs import LogStream, set_up\n"
        "stream = LogStream(sys.stderr)\n"
        "set_up(stream, level=logging.INFO)\n"
        "for _ in range(3000): structlog.get_logger().info('x' * 100)\n"
        "stream.close()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


def test_a_closed_stream_raises_no_error() -> None:
    """T93: the line is dropped and counted."""
    written = io.StringIO()
    written.close()
    stream = LogStream(written)
    stream.write("hello")
    stream.close()
    assert stream.dropped == 1


class Secretive:
    """A value that JSON does not have."""

    def __repr__(self) -> str:
        return "<é>"


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"status": 200, "waited_ms": 0.3, "stream": False, "user": "alice", "refused_by": ["a/b", "c/d"]},
        {"user": 'a"b\\c\n\r\t\x00\x1b\x7f', "key": None, "lines": 2**63, "nested": {"a": [1, {"b": "<&>"}]}},
        {"user": "Zoë", "model": "\u2028\u202e", "emoji": "\U0001f600", "surrogate": "\udc80"},
        {"lines": 2**70, "value": Secretive(), "tuple": (1, "é")},
    ],
)
def test_a_line_is_what_structlog_s_own_processors_would_write(members: dict[str, object]) -> None:
    """The same members in the same order and with the same escapes. Only the spaces between them are missing."""
    written = io.StringIO()
    stream = LogStream(written)
    set_up(stream, level=logging.INFO)
    error = KeyError("secret")
    structlog.get_logger("x").info("request", **members)
    structlog.get_logger("x").error("failed", **members, exc_info=error)
    stream.close()
    for line, (level, event, described) in zip(
        written.getvalue().splitlines(),
        [("info", "request", {}), ("error", "failed", {"error": "KeyError", "place": ""})],
        strict=True,
    ):
        event_dict: dict[str, object] = {**members, "event": event}
        event_dict = dict(structlog.processors.add_log_level(None, level, event_dict))
        event_dict |= {**described, "timestamp": json.loads(line)["timestamp"]}
        assert line == structlog.processors.JSONRenderer(separators=(",", ":"))(None, level, event_dict)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z", str(event_dict["timestamp"]))
