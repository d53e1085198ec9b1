"""The log never stops, changes or betrays a call."""

import contextlib
import io
import json
import logging
import os
import threading
from collections.abc import Iterator

import pytest
import structlog

from proxy.logs import LogStream, set_up


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def _lines(written: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_a_line_is_one_json_object_whatever_stands_in_it() -> None:
    """Line ends and escapes of a client can't begin a line of their own."""
    written = io.StringIO()
    stream = LogStream(written)
    set_up(stream, level=logging.INFO)
    structlog.get_logger("x").info("hello\nworld", user="a\u2028b\x1b[31m")
    structlog.get_logger("x").debug("not at this level")
    stream.close()
    (line,) = _lines(written)
    assert (line["event"], line["user"], line["level"]) == ("hello\nworld", "a\u2028b\x1b[31m", "info")


def test_what_libraries_log_comes_without_the_text_of_their_errors() -> None:
    """aiohttp quotes the bytes that it could not parse: a key, or a prompt."""
    written = io.StringIO()
    stream = LogStream(written)
    set_up(stream, level=logging.INFO)
    try:
        raise ValueError("Bearer sk-secret")
    except ValueError:
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
    assert (second["event"], second["error"], second["level"]) == ("beware", None, "warning")


def test_a_pipe_that_nobody_reads_holds_nobody_up() -> None:
    """Lines that find no room are dropped, and counted where somebody reads again."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"before\n" * 500)
    os.set_blocking(writing, True)
    with os.fdopen(writing, "w") as pipe, os.fdopen(reading) as end:
        stream = LogStream(pipe, lines_max=10)
        for _ in range(500):
            stream.write("x" * 1000 + "\n")
        assert stream.dropped > 400
        stream.close()  # the queue is full: it goes without waiting
        seen = ""
        while "dropped" not in seen:
            seen = end.readline()
        assert json.loads(seen)["lines"] > 400
        rest = threading.Thread(target=end.read)
        rest.start()
        stream.close()
        pipe.close()
        rest.join()


def test_a_closed_stream_is_no_error() -> None:
    """Nobody hears it, and nobody is hurt."""
    written = io.StringIO()
    written.close()
    stream = LogStream(written)
    stream.write("hello\n")
    stream.flush()
    stream.close()
    assert stream.dropped == 1
