"""A streamed answer on its way to the client: decides which bytes may be sent now and which are kept.

Bytes are kept for two reasons:

- The end of an answer is sent only when the call is settled. It begins with the event from which the meter says
  `is_at_end` (the usage chunk, `[DONE]` or the event that ends a response) and is collected here:

      data: {"choices":[{"delta":{"content":"Hi"}}]}      sent at once
      data: {"choices":[],"usage":{…}}                    kept: it is the beginning of the end
      data: [DONE]                                        kept; after the settlement both are sent

- Only output that the call holds is sent. If 1,000 tokens are held, 999 have passed and the next event has 3, this
  event and all after it wait until more tokens are held, or until the stream is ended at the limit.

Pure: no sockets, no clock.
"""

from dataclasses import replace

from proxy.errors import UpstreamError
from proxy.formats.mask import Mask, PieceMask
from proxy.formats.meter import Meter
from proxy.formats.reported_error import reports_error
from proxy.formats.sse import Event, Piece, Splitter
from proxy.policy.amounts import Tokens

# The most that is kept of an end. The last event of a response contains the whole response with its images, which may
# be megabytes; an end that is longer than this is an error of the upstream.
_END_BYTES_MAX = 16 * 2**20


class Stream:
    """One streamed answer. `meter` counts its events, and `mask` is applied to everything that is sent.

    `is_over` says whether the last event of the answer has arrived, and `is_waiting_for_hold` whether an event waits
    until more tokens are held.
    """

    def __init__(self, meter: Meter, *, mask: Mask) -> None:
        self.is_over = self.is_waiting_for_hold = False
        self._meter = meter
        self._mask = mask
        self._piece_mask: PieceMask | None = None  # of an event that is too large and not at its end
        self._splitter = Splitter()
        self._events: list[Event] = []  # one that exceeds the hold, and those behind it
        self._blocked: bytes | None = None  # the bytes for the client of the first of them
        self._end = bytearray()
        self._newline = b"\n"

    @property
    def is_between_events(self) -> bool:
        """Whether the proxy may write an event of its own now. It may not inside a large event sent in pieces."""
        return not self._splitter.is_inside_large_event

    def feed(self, chunk: bytes, *, covered: int) -> bytes:
        """Take the next bytes from the upstream and return the bytes to send to the client now.

        `covered` is the total of output tokens that may have passed after this. It may grow between two calls;
        `feed(b"", covered=…)` then returns what waited. Raises UpstreamError if the end has more than 16 MiB.
        """
        meter, end = self._meter, self._end
        ready: list[bytes] = []
        events, shown = self._events + self._splitter.feed(chunk), self._blocked
        seen = 0 if shown is None else 1
        while shown is not None or seen < len(events):
            # Each event is counted first and forwarded if the count is covered.
            if shown is None:
                shown = self._see(events[seen])
                seen += 1
            # Events at the end contain no more output, whatever usage they state: a usage chunk of 2,000 tokens after
            # one word needs no hold, it is charged by the settlement.
            if not (meter.is_at_end or meter.output_at_most <= covered or meter.output_seen <= covered):
                break
            self._note_passed(events[seen - 1])
            if meter.is_at_end:
                end += shown
            elif end:  # text after a usage chunk: that was not the end
                ready += (bytes(end), shown)
                end.clear()
            else:
                ready.append(shown)
            shown = None
        self._events, self._blocked = events[seen if shown is None else seen - 1 :], shown
        self.is_over, self.is_waiting_for_hold = meter.is_over, shown is not None
        if len(end) > _END_BYTES_MAX:
            raise UpstreamError("The upstream's answer never ends: more than 16 MiB followed its last text.")
        return b"".join(ready)

    def close(self, *, covered: int) -> None:
        """Handle the end of the upstream's body: an event that lacks its blank line is treated like any other.

        Its bytes are sent with the end, and clients that read line by line understand them. So its text must be
        counted, and it is left out if it exceeds `covered`.
        """
        left = self._splitter.end()
        if left:
            meter, event = self._meter, replace(Splitter().feed(left + b"\n\n")[0], raw=left)
            shown = self._see(event, is_cut=True)
            if meter.is_at_end or meter.output_seen <= covered:
                self._note_passed(event)
                self._end += shown
        self._end += self._mask.anywhere(self._meter.end())

    def end(self) -> bytes:
        """The bytes that were kept until the settlement, and those of an event that was never finished."""
        rest = self._splitter.end()
        if self._piece_mask is not None:
            rest = self._piece_mask.feed(rest) + self._piece_mask.end()
        return bytes(self._end) + rest

    def end_at_limit(self, usage: Tokens) -> bytes:
        """The bytes that end a stream which is stopped here; `usage` is what the call is charged."""
        end = self._meter.ending.at_limit(usage, shows_usage=self._meter.shows_usage, newline=self._newline)
        return self._mask.anywhere(end)  # it repeats the ids and names of the events as they came

    def _note_passed(self, event: Event) -> None:
        meter = self._meter
        if meter.chunk is not None and event.data is not None:
            meter.ending.see(meter.chunk, event.data)
            meter.chunk = None  # of all streams together these would be the most memory

    def _see(self, event: Event, *, is_cut: bool = False) -> bytes:
        if event.raw.endswith(b"\r\n"):
            self._newline = b"\r\n"
        shown = self._meter.see_event(event, is_cut=is_cut)
        if isinstance(event, Piece) or self._piece_mask is not None:
            return self._in_pieces(event, shown)
        # Lines without data are comments, or what a client may show as an error: a line of HTML, `error: …`.
        if event.data is None or reports_error(event.data, self._meter.chunk, name=event.name):
            return self._mask.in_error(shown, is_cut=is_cut)
        return self._mask.anywhere(shown, is_cut=is_cut)

    def _in_pieces(self, event: Event, shown: bytes) -> bytes:
        """A piece of an event that is too large to parse, masked."""
        mask = self._piece_mask = self._piece_mask or PieceMask(self._mask)
        passing = mask.feed(shown)
        if isinstance(event, Piece):
            return passing
        self._piece_mask = None
        return passing + mask.end()
