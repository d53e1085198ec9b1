"""Images, speech, transcripts and moderations: the output is known only at the end of the answer. It may be no JSON.

An answer that states its tokens is charged these. One that states none is one request for the meter: what it costs
is stated in `pieces`. A stream consists of typed events, of which the last of each choice may have the usage:

    data: {"type":"image_generation.partial_image","b64_json":…}
    data: {"type":"image_generation.completed","b64_json":…,"usage":{"input_tokens":11,…}}

Pure.
"""

from collections.abc import Callable
from dataclasses import replace

from proxy.formats.endpoints import TRANSCRIPTIONS, TRANSLATIONS
from proxy.formats.meter import JSON, Ending, Meter
from proxy.formats.request import Request
from proxy.formats.sse import Event
from proxy.formats.usage import Stated, usages_beside
from proxy.policy.amounts import TOKENS_MAX, AtLeast, Exactly, Tokens, Unspent, Usage, Uses

# The last event of a stream of images, speech or a transcript.
_STREAM_ENDS = (
    "image_generation.completed",
    "image_edit.completed",
    "speech.audio.done",
    "transcript.text.done",
    "error",
)


class MediaMeter(Meter):
    """Measures images, speech, a transcript or a moderation. All bytes are forwarded unchanged."""

    def __init__(self, request: Request, *, count: Callable[[str], int], kind: str) -> None:
        super().__init__(request, count=count, kind=kind)
        self._completed = 0  # how many images, or speech or transcript streams, have ended
        self._unstated = 0  # how many of these stated no usage
        self._is_transcript = request.endpoint in (TRANSCRIPTIONS, TRANSLATIONS)

    def _new_ending(self, request: Request) -> Ending:
        return MediaEnding()

    def _see_object(self, chunk: JSON, event: Event) -> bytes:
        """Record an event of a stream. Each choice has its own last event, with its own usage."""
        kind = chunk.get("type")
        self.has_error = self.has_error or kind == "error" or chunk.get("error") is not None
        if kind in _STREAM_ENDS:
            self._completed += 1
            self._add_usage(chunk)
        self.is_at_end = self.is_over = self.is_over or self.has_error or self._completed >= self._choices
        return event.raw

    def _see_answer(self, answer: JSON) -> None:
        self._add_usage(answer)

    def _see_other_body(self, body: bytes) -> None:
        # Audio and subtitles are not JSON. Moderations always are.
        if self._uses is Uses.REQUEST:
            super()._see_other_body(body)

    def _add_usage(self, answer: JSON) -> None:
        """Add the usage that an answer states. An SVG image also states, in `svg_usage`, that of its text model."""
        usages = [self._stated_by(answer, answer.get(name)) for name in ("usage", "svg_usage")]
        if not any(usages):
            usages = [self._stated_by(answer, usage) for usage in usages_beside(answer)]
        is_repeated = self._completed > self._choices  # more ends than were asked for: not another image
        self._unstated += not is_repeated and not self.has_error and not any(usages)
        for stated in usages:
            before = self._stated
            if stated is not None and before is not None:
                stated = before.largest(stated) if is_repeated else before.plus(stated, adds_input=True)
            if stated is not None:
                self._set_stated(stated)

    def _stated_by(self, answer: JSON, usage: object) -> Stated | None:
        """What this usage states; None for zeros, which gateways such as LiteLLM write if the vendor states none.

        Nor does an output of 0 state the output, because every image and all speech has some. A transcript may have
        none. If it has text, that is counted.
        """
        stated = self._read(usage)
        if stated is None or stated.is_zero:
            return None
        text = answer.get("text") if self._is_transcript else None
        if not stated.known_output and isinstance(text, str):
            self.uncounted_texts += [text] if text else []
        elif stated.output == 0:
            return replace(stated, output=None)
        return stated

    def _usage_in_tokens(self) -> Usage:
        """The stated tokens if there are any, else one request.

        A stream that broke off has not stated what it cost. TOKENS_MAX then stands for the whole reservation,
        because an estimate is never charged beyond it. An error generated nothing, but its input was read.
        """
        if self._stated is not None and self.is_at_end:
            tokens = self._stated.tokens()
            if self.uncounted_texts:
                return AtLeast(tokens)
            # Without an output, or without the usage of one of several images, only a part of the cost is stated.
            if self._stated.known_output is None or self._unstated:
                return AtLeast(Tokens(tokens.input, TOKENS_MAX))
            return AtLeast(tokens) if self.input_stated is None else Exactly(tokens)
        if self.has_error:
            return AtLeast(Tokens(0, 0))
        if self.is_at_end:
            return Unspent(requests=1)
        return AtLeast(Tokens(0, TOKENS_MAX))


class MediaEnding(Ending):
    """The ending of a stream that is never stopped at a limit, because its whole output is held before it begins."""

    __slots__ = ()

    def see(self, chunk: JSON, data: bytes) -> None:
        """Record nothing: an event may have megabytes of an image."""

    def at_limit(self, usage: Tokens, *, shows_usage: bool, newline: bytes = b"\n") -> bytes:
        """Nothing."""
        return b""
