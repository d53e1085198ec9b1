"""Server-sent events: bytes in, events out, and no byte lost or changed on the way.

A splitter is fed chunks as they come off the wire and gives back every event that is complete, each with the very
bytes it came in. All `raw`s in order, and then what `end` returns, are the input byte for byte, so whoever passes on
`raw` is transparent, whatever was (or was not) understood of it. Where the stream was cut into chunks never matters.

What ends an event is a blank line, and a line ends with LF, CRLF or CR (WHATWG, HTML section 9.2.6). A CR may be half
of a CRLF, so one that makes a blank line has to wait for the byte after it, with one exception: after a line that
ended in a CR by itself the stream is taken for one of bare CRs, and its event goes out at once. (Should a LF follow
all the same, it is the first byte of the next event, and means nothing there.)

Nothing is held without bound: an event of more than `event_bytes_max` is given out in pieces without data.

Pure: no sockets, no clock. What the data mean is read elsewhere.
"""

import re
from dataclasses import dataclass

EVENT_BYTES_MAX = 8 << 20  # a terminal event of /responses embeds its images as base64: megabytes are honest

BOM = b"\xef\xbb\xbf"
LF = 0x0A

# The end of one line and then a blank one. Before "\n" there may be a CR: CRLF ends in LF just as well.
# A match needs three bytes at most, hence the two that are looked at again when more arrive.
BLANK_LINE = re.compile(rb"\n(?:\n|\r(?:\n|(?=[^\n])))|\r\r")
LOOK_AGAIN = 2

# A blank line where an event would begin; and the same after a bare CR, where a LF belongs to that CR.
BLANK_START = re.compile(rb"\n|\r(?:\n|(?=[^\n]))")
BLANK_START_AFTER_CR = re.compile(rb"\r|\n(?:\n|\r(?:\n|(?=[^\n])))")


@dataclass(frozen=True, slots=True)
class Event:
    """One event as it came, terminator and comments included.

    `data` is None where there was no data line at all (comments, an extra blank line) and in a piece of an event that
    was too large; an empty data line is `b""`. `name` is None without an `event` line, or where that is empty, which
    the grammar takes as the same.
    """

    raw: bytes
    name: str | None
    data: bytes | None


class Splitter:
    """Cuts one stream into its events; see the module for the promises."""

    __slots__ = ("_event_bytes_max", "_held", "_is_after_cr", "_is_passing_on", "_is_plain", "_is_started")

    def __init__(self, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._event_bytes_max = max(event_bytes_max, LOOK_AGAIN)
        self._held = bytearray()
        self._is_started = False  # past the first event, before which there may be a byte order mark
        self._is_after_cr = False  # the last event ended in a bare CR
        self._is_passing_on = False
        self._is_plain = False  # between two events, the last of which ended in LF

    @property
    def is_passing_on(self) -> bool:
        """An event too large to hold is going out in pieces: nothing may be written between them."""
        return self._is_passing_on

    def feed(self, chunk: bytes) -> list[Event]:
        """Take the next bytes of the stream and return the events that they complete."""
        # What nearly every chunk of nearly every upstream is: some whole events, lines ended by LF.
        if self._is_plain and chunk[-2:] == b"\n\n" and b"\r" not in chunk and len(chunk) <= self._event_bytes_max:
            if chunk.find(b"\n\n") == len(chunk) - 2 and chunk[0] != LF:
                return [_read_event(chunk)]
            if chunk[0] != LF and b"\n\n\n" not in chunk:
                return [_read_event(body + b"\n\n") for body in chunk[:-2].split(b"\n\n")]
        return self._scan(chunk)

    def end(self) -> bytes:
        """Return the bytes after the last event: the beginning of one that the stream didn't finish."""
        rest = bytes(self._held)
        self._held.clear()
        return rest

    def _scan(self, chunk: bytes) -> list[Event]:
        held = self._held
        hidden_input = max(0, len(held) - LOOK_AGAIN)
        held += chunk
        events: list[Event] = []
        start = 0
        while end := self._find_end(start, max(start, hidden_input)):
            events.append(self._finish(bytes(held[start:end])))
            start = end
        del held[:start]
        if len(held) > (LOOK_AGAIN if self._is_passing_on else self._event_bytes_max):
            # The last bytes stay: they may be the first half of the event's end.
            self._is_passing_on = True
            events.append(Event(bytes(held[:-LOOK_AGAIN]), None, None))
            del held[:-LOOK_AGAIN]
        self._is_plain = self._is_started and not held and not self._is_after_cr and not self._is_passing_on
        return events

    def _find_end(self, start: int, hidden_input: int) -> int:
        """Return where the event that begins at `start` ends, or 0 while that is not known."""
        held = self._held
        if not self._is_passing_on:
            first = start
            if not self._is_started and held.startswith(BOM):
                first += len(BOM)
            blank_start = BLANK_START_AFTER_CR if self._is_after_cr else BLANK_START
            if blank := blank_start.match(held, first):
                return blank.end()
            if self._is_after_cr and held[first : first + 1] == b"\n":
                first += 1
            hidden_input = max(hidden_input, first)
        found = BLANK_LINE.search(held, hidden_input)
        return found.end() if found else 0

    def _finish(self, raw: bytes) -> Event:
        is_too_large = self._is_passing_on or len(raw) > self._event_bytes_max
        is_first = not self._is_started
        self._is_started = True
        self._is_passing_on = False
        self._is_after_cr = raw.endswith(b"\r")
        if is_too_large:
            return Event(raw, None, None)
        if is_first and raw.startswith(BOM):
            return Event(raw, *_read_lines(raw[len(BOM) :]))
        return _read_event(raw)


def _read_event(raw: bytes) -> Event:
    if raw.startswith(b"data: ") and raw.find(b"\n") == len(raw) - 2 and b"\r" not in raw:
        return Event(raw, None, raw[6:-2])
    return Event(raw, *_read_lines(raw))


def _read_lines(text: bytes) -> tuple[str | None, bytes | None]:
    """Return the name and the data that the lines of one event say."""
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
