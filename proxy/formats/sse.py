"""Server-sent events: bytes in, events out, and no byte lost or changed.

A `Splitter` is fed the chunks of a stream as they arrive and returns every event that is complete, each with the
exact bytes in which it came. All `raw`s in order, followed by what `end` returns, are the input byte for byte. So a
proxy that forwards `raw` is transparent, even for an event that it could not parse. The result does not depend on
where the network cut the stream into chunks.

A blank line ends an event, and LF, CRLF or CR ends a line (WHATWG HTML, section 9.2.6). A CR may be the first half
of a CRLF, so after `data: 1\\n\\r` the splitter waits for the next byte: an LF would belong to the same event. There
is one exception. After a line that ended in a CR without LF, the stream is taken for one that uses bare CRs, and its
event is returned at once: `data: 1\\r\\r` is complete. If an LF follows after all, it becomes the first byte of the
next event, where it has no meaning.

Memory is bounded: an event of more than `event_bytes_max` is returned in pieces without data.

Pure: no sockets, no clock. The meaning of the data is read elsewhere.
"""

import re
from dataclasses import dataclass

# 8 MiB: the last event of /responses contains the whole response with its images as base64, which is megabytes.
EVENT_BYTES_MAX = 8 << 20

BOM = b"\xef\xbb\xbf"
LF = 0x0A

# The end of a line and then a blank line. Before the first "\n" there may be a CR: CRLF ends in LF as well.
# `(?=[^\n])` is the wait for the byte after a CR: "\n\r" alone does not match, "\n\rd" does.
BLANK_LINE = re.compile(rb"\n(?:\n|\r(?:\n|(?=[^\n])))|\r\r")
# A match is at most three bytes long. So when more bytes arrive, the last two of the old ones are searched again.
OVERLAP = 2

# A blank line at the place where an event would begin. After a bare CR an LF belongs to that CR (`data: 1\r\r`, then
# `\n`), so there a blank line is a CR, or an LF with one more line end behind it.
BLANK_START = re.compile(rb"\n|\r(?:\n|(?=[^\n]))")
BLANK_START_AFTER_CR = re.compile(rb"\r|\n(?:\n|\r(?:\n|(?=[^\n])))")

# What may precede the first line of a stream, and the fields that may begin it. A line of a field may lack the colon.
BEFORE_FIRST_LINE = re.compile(rb"(?:\xef\xbb\xbf)?[\r\n]*")
FIRST_LINE = re.compile(rb"(?:data|event|id|retry)[:\r\n]|:")
# Lines that a parser ignores: blanks, and fields of other names. JSON, HTML and audio do not begin with such a line.
IGNORED_LINE = re.compile(rb"[ \t]*+(?:[A-Za-z][\w.-]*+:[^\r\n]*+)?[\r\n]")
# A line that may become one of them or a field, because its end has not come.
UNDECIDED_LINE = re.compile(rb"[ \t]*+(?:[A-Za-z][\w.-]*+(?::[^\r\n]*+)?)?\Z")


@dataclass(slots=True)  # not frozen, because that makes one for each piece of a stream three times as slow
class Event:
    """One event with its exact bytes: the blank line that ends it and the comments before it are included.

    `data` is None if there was no data line (only comments, or an extra blank line), and in a piece of an event that
    was too large. An empty data line is `b""`. `name` is None without an `event` line, or if that line is empty: the
    grammar treats both alike.
    """

    raw: bytes
    name: str | None
    data: bytes | None


class Piece(Event):
    """A piece of an event that is too large, whose rest is still to come."""

    __slots__ = ()


class Splitter:
    """Splits one stream into its events; see the module docstring."""

    __slots__ = ("_buffer", "_event_bytes_max", "_is_after_cr", "_is_inside_large_event", "_is_plain", "_is_started")

    def __init__(self, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._event_bytes_max = max(event_bytes_max, OVERLAP)
        self._buffer = bytearray()  # bytes of the event that is not complete yet
        self._is_started = False  # the first event, before which a byte order mark may come, is complete
        self._is_after_cr = False  # the last event ended in a bare CR
        self._is_inside_large_event = False
        self._is_plain = False  # the buffer is empty and the last event ended in LF

    @property
    def is_inside_large_event(self) -> bool:
        """Whether a part of an event was returned and its rest is still to come."""
        return self._is_inside_large_event

    def feed(self, chunk: bytes) -> list[Event]:
        """Take the next bytes of the stream and return the events that they complete."""
        # The fast path. Nearly all chunks of nearly all upstreams are a few whole events with LF as line end.
        if self._is_plain and chunk[-2:] == b"\n\n" and b"\r" not in chunk and len(chunk) <= self._event_bytes_max:
            if chunk.startswith(b"data: ") and chunk.find(b"\n") == len(chunk) - 2:
                return [Event(chunk, None, chunk[6:-2])]
            if chunk[0] != LF and b"\n\n\n" not in chunk:
                return [_parse_event(body + b"\n\n") for body in chunk[:-2].split(b"\n\n")]
        return self._scan(chunk)

    def end(self) -> bytes:
        """Return the bytes after the last complete event: the beginning of one that the stream left unfinished."""
        left = bytes(self._buffer)
        self._buffer.clear()
        return left

    def _scan(self, chunk: bytes) -> list[Event]:
        buffer = self._buffer
        search_from = max(0, len(buffer) - OVERLAP)
        buffer += chunk
        events: list[Event] = []
        start = 0
        while end := self._find_end(start, max(start, search_from)):
            events.append(self._finish(bytes(buffer[start:end])))
            start = end
        del buffer[:start]
        if len(buffer) > (OVERLAP if self._is_inside_large_event else self._event_bytes_max):
            # Keep the last two bytes: they may be the first part of the blank line that ends the event.
            self._is_inside_large_event = True
            events.append(Piece(bytes(buffer[:-OVERLAP]), None, None))
            del buffer[:-OVERLAP]
        self._is_plain = self._is_started and not buffer and not self._is_after_cr and not self._is_inside_large_event
        return events

    def _find_end(self, start: int, search_from: int) -> int:
        """Return the index after the event that begins at `start`, or 0 as long as its end has not arrived."""
        buffer = self._buffer
        if not self._is_inside_large_event:
            first = start
            if not self._is_started and buffer.startswith(BOM):
                first += len(BOM)
            blank_start = BLANK_START_AFTER_CR if self._is_after_cr else BLANK_START
            if blank := blank_start.match(buffer, first):
                return blank.end()
            if self._is_after_cr and buffer[first : first + 1] == b"\n":
                first += 1
            search_from = max(search_from, first)
        found = BLANK_LINE.search(buffer, search_from)
        return found.end() if found else 0

    def _finish(self, raw: bytes) -> Event:
        # The size decides, not how the event arrived: one that is too large in a single chunk is not parsed either.
        is_too_large = self._is_inside_large_event or len(raw) > self._event_bytes_max
        is_first = not self._is_started
        self._is_started = True
        self._is_inside_large_event = False
        self._is_after_cr = raw.endswith(b"\r")
        if is_too_large:
            return Event(raw, None, None)
        if is_first and raw.startswith(BOM):
            return Event(raw, *_parse_lines(raw[len(BOM) :]))
        return _parse_event(raw)


def begins_with_event(body: bytes | bytearray) -> bool | None:
    """Whether a body that begins with these bytes is a stream of events; None as long as they may be either.

    b'\\n\\ndata: {'      True
    b': waiting'         True: a comment
    b'x: 1\\ndata: {'     True: a field of another name is ignored
    b'{"choices"'        False
    b'\\nda'              None
    """
    if body[:1] == b"{":  # of almost every whole answer
        return False
    begin = BEFORE_FIRST_LINE.match(body)
    start = begin.end() if begin else 0
    while not FIRST_LINE.match(body, start):
        ignored = IGNORED_LINE.match(body, start)
        if ignored is None:
            rest = body[start:]
            is_undecided = UNDECIDED_LINE.match(rest) or BOM.startswith(body)
            return None if is_undecided else False
        start = ignored.end()
    return True


def is_cut_off_event(body: bytes | bytearray) -> bool:
    """Whether a whole body is blank, or only the beginning of an event's first line: `dat`."""
    text = bytes(body).strip(BOM + b" \t\r\n")
    return any(name.startswith(text) for name in (b"data:", b"event:", b"id:", b"retry:"))


def _parse_event(raw: bytes) -> Event:
    # The fast path for `data: {…}\n\n`, one line: no need to split it.
    if raw.startswith(b"data: ") and raw.find(b"\n") == len(raw) - 2 and b"\r" not in raw:
        return Event(raw, None, raw[6:-2])
    return Event(raw, *_parse_lines(raw))


def _parse_lines(text: bytes) -> tuple[str | None, bytes | None]:
    """Return the name and the data of an event, from its lines."""
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    name: str | None = None
    data: list[bytes] = []
    for line in text.split(b"\n"):
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ").decode("utf-8", "replace") or None
    return name, b"\n".join(data) if data else None
