"""A streamed answer on its way: its bytes go in, what may pass on at once comes out, its end is kept back.

The end of an answer goes to the client only when the call is settled; what the meter says belongs to it, from the
usage chunk or the last event on, is collected here. Pure.
"""

from proxy.errors import UpstreamError
from proxy.meter import Meter
from proxy.sse import Splitter

# The last event of a response holds all of it, pictures included; more than this is no end.
_END_BYTES_MAX = 16 * 2**20


class Stream:
    """One answer. `meter` watches its events."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._splitter = Splitter()
        self._end = bytearray()

    @property
    def is_over(self) -> bool:
        """Whether its last event has come."""
        return self._meter.is_over

    @property
    def is_between_events(self) -> bool:
        """Whether an event of ours may be written now: not while a large one goes out in pieces."""
        return not self._splitter.is_passing_on

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes and return what of them, and of those kept back, may pass on now.

        Raises UpstreamError where the end goes on and on.
        """
        ready = bytearray()
        for event in self._splitter.feed(chunk):
            piece = self._meter.see_event(event)
            if self._end and not self._meter.is_at_end:  # what looked like the end was not
                ready += self._end
                self._end.clear()
            (self._end if self._meter.is_at_end else ready).extend(piece)
        if len(self._end) > _END_BYTES_MAX:
            raise UpstreamError("The upstream sends an end that never ends.")
        return bytes(ready)

    def end(self) -> bytes:
        """What was kept back, and the rest of an event that was never finished."""
        return bytes(self._end) + self._splitter.end()
