"""The contract of meters and endings, and what those of all surfaces share.

A `Meter` is fed one answer in order: the events of a stream, or one whole body. For each event it returns the bytes
for the client. These are the bytes that came, unless the proxy asked for usage on the client's behalf: then it
removes exactly what came only because of that, such as the usage chunk:

    data: {"choices":[{"delta":{"content":"Hi"}}],"usage":null}    →  the same without `"usage":null`
    data: {"choices":[],"usage":{"prompt_tokens":11,…}}            →  nothing
    data: [DONE]                                                   →  data: [DONE]

The usage can be read at any time, even if the stream broke off; it is what the call is charged.

If the upstream states no usage, the meter counts the texts of a stream itself, each piece as at least one token,
because no server sends a piece for less than a token. So a word that comes in three pieces is at least three tokens,
although the tokenizer may need only two for the whole word.

An `Ending` watches the same stream as far as it passed to the client, and can end it at a quota's limit.

Each surface has its own meter and its own ending, in a module of its name (`chat`, `responses`, `messages`, `media`).
`surfaces` makes the meter that fits a request. Pure: no sockets, no clock.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import orjson

from proxy.formats.request import Request
from proxy.formats.sse import Event
from proxy.formats.strict_json import dump, walk
from proxy.policy.amounts import AtLeast, Exactly, Tokens, Unspent, Usage, Uses

JSON = dict[str, Any]

# Members of a choice or an item that contain no text of the model: names and ids, reasons, filter results, the same
# text again as single tokens (logprobs), and audio as base64 (data). Counting them would charge a broken stream
# several times too much.
_NOT_TEXT = frozenset(
    "role type id call_id status finish_reason native_finish_reason stop_reason logprobs prompt_logprobs "
    "content_filter_results data signature".split()
)
# An event without data that is larger than this is no comment but a piece of an event that was too large to parse.
_COMMENT_BYTES_MAX = 65_536
_BYTES_PER_TOKEN = 4


class Ending(ABC):
    """Watches one stream, and can write its end if the proxy stops it at a quota's limit.

    At any moment it can write what the upstream would have sent next if its own maximum had ended the answer there.
    So an SDK sees a complete stream that was cut by length, not a broken one. The written events repeat what passed
    (id, model, items). No text is invented or left out. Other modules decide whether a stream is stopped.

    `has_finished` says whether the answer is complete: at most its usage and the end of the stream may follow.
    """

    __slots__ = ("has_finished",)

    def __init__(self) -> None:
        self.has_finished = False

    @abstractmethod
    def see(self, chunk: JSON) -> None:
        """Record one chunk or event that passed. It may be kept, so the caller must not change it afterwards.

        Chunks and events of an unexpected shape are ignored.
        """

    @abstractmethod
    def at_limit(self, usage: Tokens, *, shows_usage: bool, newline: bytes = b"\n") -> bytes:
        """The bytes that end the stream here.

        `usage` is what the call is charged. `shows_usage` is whether the client asked for the usage of the stream.
        `newline` is the line end that the stream uses.
        """


class Meter(ABC):
    """Measures one answer. `count` returns the tokens of a text; it must be fast and must never raise.

    `kind` is the kind of the upstream, for surfaces on which the kinds answer differently.

    Public state, updated by each event:

    - `is_at_end`: this event belongs to the end of the answer. True from the usage chunk, `[DONE]`, or the event that
      ends a response or message.
    - `is_over`: the last event has come.
    - `has_error`: the upstream reported an error inside the answer.
    - `chunk`: the JSON object of the event, None if its data is no object.
    - `response_id`: the id under which the upstream stores the response.
    - `uncounted_texts`: the texts of a whole answer without usage. The caller counts them, as that may take long.

    A surface's meter implements `_new_ending`, `_see_object` for the events of a stream and `_see_answer` for a whole
    answer. It passes on what it finds there with `_report` (a stated usage) and `_count_texts` (pieces of output).
    """

    def __init__(self, request: Request, *, count: Callable[[str], int], kind: str) -> None:
        self.is_at_end = False
        self.is_over = False
        self.has_error = False
        self.shows_usage = request.asks_for_usage
        self.chunk: JSON | None = None
        self.ending = self._new_ending(request)
        self.response_id: str | None = None
        self.uncounted_texts: list[str] = []
        self._count = count
        self._uses = request.endpoint.uses
        # Whether the tokens of an answer can be counted if the upstream does not report them.
        self._generates = request.endpoint.generates and not request.endpoint.by_piece
        self._choices = request.choices
        self._strips_usage = request.adds_usage
        self._reported: Tokens | None = None
        self._is_partial = False  # the reported usage is of the beginning or of one choice, not of the whole answer
        self._counted = 0  # output tokens by our count, in the whole answer
        self._counted_since_report = 0  # the same, since the upstream last reported its usage

    def stop_stripping(self) -> None:
        """Remove nothing from now on: the proxy did not ask for usage after all, so it is meant for the client."""
        self._strips_usage = False

    @property
    def output_seen(self) -> int:
        """The tokens of output that have passed so far; 0 for images and audio, which are known only at their end."""
        if not self._generates:
            return 0
        return self._counted if self._reported is None else self._reported.output + self._counted_since_report

    @property
    def input_reported(self) -> int | None:
        """The tokens of the input, if the upstream has reported them."""
        return None if self._reported is None else self._reported.input

    def see_event(self, event: Event, *, is_cut: bool = False) -> bytes:
        """Measure one event and return the bytes for the client.

        Bytes that are kept for a moment are returned with the next event, or by `flush`. `is_cut` says that the
        stream ended before the event's blank line; then data that can't be parsed is not counted.
        """
        self.chunk = None
        data = event.data
        if data is None:
            if len(event.raw) > _COMMENT_BYTES_MAX:
                self._count_bytes(event.raw)
            return event.raw
        if data.startswith(b"[DONE]"):  # the Python SDK accepts anything that begins with [DONE]
            self.is_at_end = self.is_over = True
            return event.raw
        self.chunk = read_object(data)
        if self.chunk is None:
            # A client may understand data that we can't parse, so it is charged. But no client understands an event
            # that broke off in the middle.
            if not is_cut:
                self._count_bytes(data)
            return event.raw
        return self._see_object(self.chunk, event)

    def flush(self) -> bytes:
        """Return the bytes that were kept; called if no further event comes."""
        return b""

    def see_whole(self, body: bytes) -> None:
        """Measure an answer that is not a stream."""
        self.is_at_end = True
        answer = read_object(body)
        if answer is None:
            self._see_other_body(body)
            return
        self._see_error(answer)
        output = self._see_answer(answer)
        if self._reported is None and self._generates:
            self.uncounted_texts = [*texts_in(output)]

    def usage(self) -> Usage:
        """The usage as far as it is known now. If the answer does not state the input, the input is 0.

        A usage that was reported before the last text covers only what came before it. Examples:

            the usage chunk reported 11 and 5                Exactly(11, 5)
            12 tokens passed by our count, and the stream
            broke off before any report                      AtLeast(0, 12); the caller adds its count of the input
            vLLM had reported 11 and 4 so far, then text
            of 5 tokens by our count came without a report   AtLeast(11, 9)
        """
        match self._uses:
            case Uses.NOTHING:
                return Unspent()
            case Uses.REQUEST:
                return Unspent(requests=1)
        return self._usage_in_tokens()

    # What a surface's meter implements.

    @abstractmethod
    def _new_ending(self, request: Request) -> Ending:
        """The ending of the stream that answers this request."""

    @abstractmethod
    def _see_object(self, chunk: JSON, event: Event) -> bytes:
        """Record an event of a stream, parsed as `chunk`, and return the bytes for the client."""

    @abstractmethod
    def _see_answer(self, answer: JSON) -> object:
        """Record a whole answer, and return the part of it that has the model's texts."""

    # What it may override, and what it calls.

    def _see_other_body(self, body: bytes) -> None:
        """Record a whole answer that is no JSON object. That is an error, but it was generated."""
        self.has_error = True
        self.uncounted_texts = [body.decode("utf-8", "replace")] if self._generates else []

    def _usage_in_tokens(self) -> Usage:
        if self._reported is None:
            return AtLeast(Tokens(0, self._counted if self._generates else 0))
        if self._counted_since_report or self._is_partial:
            return AtLeast(Tokens(self._reported.input, self.output_seen, self._reported.cached))
        return Exactly(self._reported)

    def _see_error(self, answer: JSON) -> None:
        self.has_error = self.has_error or answer.get("error") is not None

    def _report(self, tokens: Tokens | None) -> None:
        """Record a usage that the upstream stated; None if it stated none, or one that makes no sense."""
        if tokens is not None and self._uses is Uses.INPUT:
            # Some servers state only the total of an embedding, which a limit on input must count.
            tokens = replace(tokens, input=tokens.input + tokens.output, output=0, reasoning=0)
        if tokens is not None:
            self._reported, self._counted_since_report = tokens, 0

    def _count_texts(self, part: object) -> None:
        """Count the texts in a piece of the answer, as at least one token if there is any text."""
        tokens = [self._count(text) for text in texts_in(part)]
        if tokens:
            self._add_to_count(max(1, sum(tokens)))

    def _count_bytes(self, data: bytes) -> None:
        """Count data that can't be parsed by its length, at four bytes for a token, rounded up."""
        self._add_to_count(-(-len(data) // _BYTES_PER_TOKEN))

    def _add_to_count(self, tokens: int) -> None:
        self._counted += tokens
        self._counted_since_report += tokens


def read_object(data: bytes) -> JSON | None:
    """Parse the data of an event; None if it is no JSON object.

    NaN, infinities and unpaired surrogates are accepted. They are not JSON, but some clients parse them.
    """
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def write_events(events: Iterable[JSON], newline: bytes = b"\n") -> bytes:
    """Typed events as the bytes of a stream. Each is named after its type, as on /responses and /messages."""
    return b"".join(
        b"event: %b%bdata: %b%b" % (event["type"].encode(), newline, dump(event), newline + newline)
        for event in events
    )


def texts_in(part: object) -> Iterator[str]:
    """The texts in a part of an answer, at any depth: content, refusals, arguments of tool calls."""
    return (value for value in walk(part, _members_with_text) if isinstance(value, str) and value)


def _members_with_text(members: JSON) -> list[object]:
    return [value for name, value in members.items() if name not in _NOT_TEXT]
