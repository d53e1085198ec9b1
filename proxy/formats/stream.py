"""A streamed answer on its way: its bytes go in, what may pass on at once comes out, its end is kept back.

The end of an answer goes to the client only when the call is settled; what the meter says belongs to it, from the
usage chunk or the last event on, is collected here. And nothing passes on that is not covered by what the call holds:
an event that goes beyond waits until more is held, or until the stream is ended there. Pure.
"""

from collections import deque
from dataclasses import replace

from proxy.errors import UpstreamError
from proxy.formats.meter import Meter
from proxy.formats.sse import Event, Splitter
from proxy.policy.amounts import Tokens

# The last event of a response holds all of it, pictures included; more than this is no end.
_END_BYTES_MAX = 16 * 2**20


class Stream:
    """One answer. `meter` watches its events."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._splitter = Splitter()
        self._events: deque[Event] = deque()  # that came and were not looked at yet
        self._waiting: bytes | None = None  # what the client is to see of the one that goes beyond what is held
        self._end = bytearray()
        self._newline = b"\n"

    @property
    def is_over(self) -> bool:
        """Whether its last event has come."""
        return self._meter.is_over

    @property
    def is_held_up(self) -> bool:
        """Whether an event waits for more to be held."""
        return self._waiting is not None

    @property
    def is_between_events(self) -> bool:
        """Whether an event of ours may be written now: not while a large one goes out in pieces."""
        return not self._splitter.is_inside_large_event

    def feed(self, chunk: bytes, *, covered: int) -> bytes:
        """Take the next bytes and return what of them, and of those kept back, may pass on now.

        `covered` is how many tokens of output may have passed with it. Raises UpstreamError where the end goes on and
        on.
        """
        self._events.extend(self._splitter.feed(chunk))
        ready = bytearray()
        while self._is_covered(covered):
            if self._waiting is not None:
                self._pass(self._waiting, ready)
                self._waiting = None
            if not self._events:
                break
            self._waiting = self._meter.see_event(self._note(self._events.popleft()))
        if len(self._end) > _END_BYTES_MAX:
            raise UpstreamError("The upstream sends an end that never ends.")
        return bytes(ready)

    def close(self, *, covered: int) -> None:
        """The upstream has closed: an event that it left without its blank line is read like the others.

        It passes on with the end, and there are clients that read by lines: so it may be neither free nor unseen.
        Beyond what is covered it doesn't pass.
        """
        rest = self._splitter.end()
        if rest:
            event = replace(Splitter().feed(rest + b"\n\n")[0], raw=rest)
            ready = bytearray()
            piece = self._meter.see_event(self._note(event), is_cut=True)
            if self._meter.is_at_end or self._meter.output_seen <= covered:
                self._pass(piece, ready)
            self._end += ready
        self._end += self._meter.rest()

    def end(self) -> bytes:
        """What was kept back, and the rest of an event that was never finished."""
        return bytes(self._end) + self._splitter.end()

    def end_at_limit(self, usage: Tokens) -> bytes:
        """The end of a stream that is stopped here, after what has passed."""
        return self._meter.ending.at_limit(usage, shows_usage=self._meter.shows_usage, newline=self._newline)

    def _is_covered(self, covered: int) -> bool:
        # What ends an answer brings no more of it, whatever it says of its usage.
        return self._waiting is None or self._meter.is_at_end or self._meter.output_seen <= covered

    def _note(self, event: Event) -> Event:
        if event.raw.endswith(b"\r\n"):
            self._newline = b"\r\n"
        return event

    def _pass(self, piece: bytes, ready: bytearray) -> None:
        if self._meter.chunk is not None:
            self._meter.ending.see(self._meter.chunk)
        if self._end and not self._meter.is_at_end:  # what looked like the end was not
            ready += self._end
            self._end.clear()
        (self._end if self._meter.is_at_end else ready).extend(piece)
