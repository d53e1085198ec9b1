"""The contract of meters and endings, and what those of all surfaces share.

A `Meter` is fed one answer in order: the events of a stream, or one whole body. For each event it returns the bytes
for the client. These are the bytes that came, unless the proxy asked for usage on the client's behalf: then it
removes exactly what came only because of that, such as the usage chunk:

    data: {"choices":[{"delta":{"content":"Hi"}}],"usage":null}    →  the same without `"usage":null`
    data: {"choices":[],"usage":{"prompt_tokens":11,…}}            →  nothing
    data: [DONE]                                                   →  data: [DONE]

The usage can be read at any time, even if the stream broke off; it is what the call is charged. An upstream may state
its usage several times in one answer. Each part is then the largest that was stated, so a later zero never makes an
answer free. A zero counts only if no text contradicts it. An input of 0 never counts: no prompt is empty.

If the upstream states no usage, the meter counts the texts of a stream itself, each piece as at least one token,
because no server sends a piece for less than a token. So a word that comes in three pieces is at least three tokens,
although the tokenizer may need only two for the whole word.

Texts are kept, and counted only when the number is needed: most answers state their usage at the end, and until then
the length of the texts in bytes is a bound (`output_at_most`), because a token has at least one byte.

An `Ending` watches the same stream as far as it passed to the client, and can end it at a quota's limit.

Each surface has its own meter and its own ending, in a module of its name (`chat`, `responses`, `messages`, `media`).
`surfaces` makes the meter that fits a request. Pure: no sockets, no clock.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

from proxy.formats.estimate import DEFAULT_ANSWER_TOKENS
from proxy.formats.request import Request
from proxy.formats.sse import Event
from proxy.formats.strict_json import dump
from proxy.formats.texts import (
    is_error,
    read_object,
    texts_in,
    texts_in_other_shape,
    texts_of_body,
)
from proxy.formats.usage import Stated, read_usage, usages_beside, usages_in_choices
from proxy.policy.amounts import AtLeast, Exactly, Tokens, Unspent, Usage, Uses

JSON = dict[str, Any]

# The events that end a response, and the members in which its `.done` events repeat a text as a whole.
RESPONSE_ENDS = frozenset(("response.completed", "response.incomplete", "response.failed", "error"))
_WHOLE_TEXT_MEMBERS = ("text", "refusal", "arguments", "input", "item", "part")
# The members of an item of a response that have the model's text.
_ITEM_TEXT_MEMBERS = ("content", "summary", "arguments", "input", "text")
# An event without data that is larger than this is no comment but a piece of an event that was too large to parse.
_COMMENT_BYTES_MAX = 65_536
_BYTES_PER_TOKEN = 4
# How much text of a stream is kept before it is counted, in bytes and in pieces. To count 1,024 words takes 1.5 ms.
_KEPT_BYTES_MAX = 16_384
_KEPT_PIECES_MAX = 1024


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
    def see(self, chunk: JSON, data: bytes) -> None:
        """Record one chunk or event that passed, and its data in bytes, which take less memory if they are kept.

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
    - `has_error`: the upstream reported an error inside the answer, or a response that it has not finished.
    - `chunk`: the JSON object of the event or of the whole answer, None if its data is no object.
    - `response_id`: the id under which the upstream stores the response.
    - `uncounted_texts`: the texts of a whole answer whose usage does not state its output. The caller counts them, as
      that may take long, and passes the result to `output_with`.

    Set by the caller, and used for usage that is read afterwards (see `usage.read_usage`):

    - `output_bound`: the most output that the call can have used, in tokens: what it asks for, or more if it holds
      more.
    - `input_bound`: the most input that the call can have, in tokens; None if it is unknown.
    - `extra_usage`: the members of a usage that its upstream writes in addition to the output.

    A surface's meter implements `_new_ending`, `_see_object` for the events of a stream and `_see_answer` for a whole
    answer. It passes on what it finds there with `_record` (a usage that `_read` has read) and `_count_texts` (pieces
    of output).
    """

    # Class attributes are the defaults of what few answers need: an object with more than 30 attributes of its own
    # takes 1.3 kB more.
    is_at_end = is_over = has_error = False
    chunk: JSON | None = None
    response_id: str | None = None
    input_bound: int | None = None
    extra_usage: Sequence[str] = ()
    # The tokens of the input, if the upstream has stated them; 0 if it has stated only a total. Otherwise an input of
    # 0 is ignored, because no prompt is empty. Some servers write it if they don't count the input, or if they have
    # read all of it from their cache.
    input_stated: int | None = None
    # `output_seen` or more: texts that are not counted yet are taken for as many tokens as they have bytes.
    output_at_most = 0

    _has_separate_cache = False  # whether cached tokens are not included in the input that a usage states
    _stated: Stated | None = None  # what the upstream has stated so far
    _output_stated = 0  # the output in it, without the additional one
    _extra_output = 0  # the output in addition
    _is_partial = False  # the stated usage is of one choice, not of the whole answer
    _is_contradicted = False  # the upstream stated a smaller output than it had stated before
    _is_doubtful = False  # that, or it states no input: its output is not believed against our own count
    _tokens_counted = 0  # output tokens by our count, in the whole answer, without the pieces that are kept
    _counted_since_stated = 0  # the same, since the upstream last stated its usage
    _pieces_bytes = 0
    _pieces_stated = 0  # so many pieces came before the upstream last stated its usage

    def __init__(self, request: Request, *, count: Callable[[str], int], kind: str) -> None:
        self.shows_usage = request.asks_for_usage
        self.uncounted_texts: list[str] = []
        self.output_bound = DEFAULT_ANSWER_TOKENS * request.choices
        self._request = request
        self._count = count
        self._uses = request.endpoint.uses
        # Whether its texts can be counted if the upstream states no usage.
        self._counts_text = request.endpoint.generates and not request.endpoint.by_piece
        self._choices = request.choices
        self._strips_usage = request.adds_usage
        self._generates = request.endpoint.generates
        self._pieces: list[str] = []  # texts that are kept: each is one token or more

    @cached_property
    def ending(self) -> Ending:
        """The ending of the stream; whole answers need none."""
        return self._new_ending(self._request)

    def stop_stripping(self) -> None:
        """Remove nothing from now on: the proxy did not ask for usage after all, so it is meant for the client."""
        self._strips_usage = False

    @property
    def output_seen(self) -> int:
        """The tokens of output that have passed so far; 0 for images and audio, which are known only at their end."""
        if not self._counts_text:
            return 0
        if len(self._pieces) > self._pieces_stated:
            self._count_pieces()
        seen = self._output_stated + self._counted_since_stated
        return (max(seen, self._counted) if self._is_doubtful else seen) + self._extra_output

    def output_with(self, counted: int) -> int:
        """The tokens of output, with `counted` tokens in `uncounted_texts`."""
        return self.output_seen + counted if self._is_partial else max(self.output_seen, counted + self._extra_output)

    @property
    def counted_and_stated(self) -> tuple[int, int] | None:
        """The tokens of output by our own count and by the upstream's; None unless both are known of the same text.

        Reasoning may be stated that was not shown, so an answer with reasoning cannot be compared. The texts of the
        stream that are still kept are counted for this.
        """
        stated = self._stated
        if stated is None or not stated.output or stated.reasoning or self._is_partial or not self._counted:
            return None
        return self._counted, stated.output

    def see_event(self, event: Event, *, is_cut: bool = False) -> bytes:
        """Measure one event and return the bytes for the client.

        Bytes that are kept for a moment are returned with the next event, or by `end`. `is_cut` says that the
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
            if is_cut:
                return event.raw
            self._count_texts([*texts_of_body(data)])
            return event.raw
        return self._see_object(self.chunk, event)

    def end(self) -> bytes:
        """Note that no further event comes, and return the bytes that were kept."""
        return b""

    def see_whole(self, body: bytes) -> None:
        """Measure an answer that is not a stream."""
        self.is_at_end = True
        answer = self.chunk = read_object(body)
        if answer is None:
            self._see_other_body(body)
            return
        self.has_error = answer.get("error") is not None
        self._see_answer(answer)
        if self._counts_text and (not self._output_stated or (self._is_doubtful and not self._is_partial)):
            output = self._output_of(answer)
            self.uncounted_texts = [*texts_in(output)]
            is_known = any(output) if isinstance(output, list) else bool(output)
            if not is_known and not is_error(answer):
                self.uncounted_texts = [*texts_in_other_shape(answer)]

    def usage(self) -> Usage:
        """The usage as far as it is known now. If the answer does not state the input, the input is 0.

        A usage that was stated before the last text covers only what came before it. Examples:

            the usage chunk stated 11 and 5                  Exactly(11, 5)
            12 tokens passed by our count, and the stream
            broke off before any usage                       AtLeast(0, 12); the caller adds its count of the input
            vLLM had stated 11 and 4 so far, then text
            of 5 tokens by our count came without a usage    AtLeast(11, 9)
            11 and no output were stated, and 12 tokens
            passed by our count                              AtLeast(11, 12)
            20 and 30 were stated, then zeros                Exactly(20, 30)
            only zeros were stated, and there is no text     AtLeast(0, 0); the caller adds its count of the input
        """
        if self._uses is Uses.NOTHING:
            return Unspent()
        return Unspent(requests=1) if self._uses is Uses.REQUEST else self._usage_in_tokens()

    # What a surface's meter implements.

    @abstractmethod
    def _new_ending(self, request: Request) -> Ending:
        """The ending of the stream that answers this request."""

    @abstractmethod
    def _see_object(self, chunk: JSON, event: Event) -> bytes:
        """Record an event of a stream, parsed as `chunk`, and return the bytes for the client."""

    @abstractmethod
    def _see_answer(self, answer: JSON) -> None:
        """Record a whole answer."""

    def _output_of(self, answer: JSON) -> object:
        """The part of a whole answer that has the model's texts, or a list of such parts.

        If they are all empty, the answer has the shape of another API.
        """
        return None

    # What it may override, and what it calls.

    def _see_other_body(self, body: bytes) -> None:
        """Record a whole answer that is no JSON object. That is an error, but it was generated.

        If it is JSON, or was to be, only the texts in it count: a number of 200,000 digits is no text.
        """
        self.has_error = True
        if self._counts_text:
            self.uncounted_texts = [*texts_of_body(body)]

    def _usage_in_tokens(self) -> Usage:
        stated, input_tokens = self._stated, self.input_stated
        output = self.output_seen if self._counts_text else self._output_stated
        if stated is None:
            return AtLeast(Tokens(0, output))
        is_whole = not self._is_partial and not self.uncounted_texts and not self._counted_since_stated
        is_output_stated = stated.known_output == output or not self._counts_text
        if input_tokens is not None and is_whole and is_output_stated:
            return Exactly(stated.tokens())
        input_tokens = input_tokens or 0
        return AtLeast(Tokens(input_tokens, output, min(stated.cached, input_tokens)))

    def _read(self, usage: object) -> Stated | None:
        """What a usage object of this answer states."""
        output_bound = self.output_bound if self._generates else None
        return read_usage(
            usage,
            output_bound=output_bound,
            total_bound=None if self.input_bound is None else self.input_bound + (output_bound or 0),
            extra=self.extra_usage,
            has_separate_cache=self._has_separate_cache,
        )

    def _record(self, stated: Stated | None) -> None:
        """Record a usage that the upstream stated; None if it stated none, or one that makes no sense.

        It covers the text that has passed only if its output is larger than what was stated before, or than what we
        have counted. A server that states 4 tokens on every chunk does not count.
        """
        if stated is None:
            return
        if self._uses is Uses.INPUT:
            # Some servers state only the total of an embedding, which a limit on input must count.
            stated = Stated((stated.known_input or 0) + (stated.known_output or 0), 0, stated.cached)
        before, output = self._output_stated, stated.output_without_extra or 0
        if self._stated is not None and stated.is_zero:
            return  # zeros count only if they are the only usage
        if self._stated is not None and not self._stated.is_zero:
            self._is_contradicted = self._is_contradicted or stated.contradicts(self._stated)
            stated = self._stated.largest(stated)
        if output > before or output >= self._counted:
            self._counted_since_stated = 0
            self._pieces_stated = len(self._pieces)
        self._set_stated(stated)

    def _set_stated(self, stated: Stated) -> None:
        """Take this for all that the upstream has stated so far."""
        self._stated, self._extra_output = stated, stated.extra
        self._output_stated = stated.output_without_extra or 0
        self.input_stated = stated.known_input or (0 if stated.is_only_total and stated.total else None)
        self._is_doubtful = self._is_contradicted or stated.known_input is None
        self._bound_output()

    def _see_usage(self, usage: object) -> None:
        """Record a usage object, if it is one."""
        self._record(self._read(usage))

    def _see_usages_elsewhere(self, document: JSON) -> None:
        """Record the usages that a vendor states in members of its own, or in the choices."""
        for usage in usages_beside(document):
            self._see_usage(usage)
        if usages := usages_in_choices(document.get("choices")):
            self._see_usages_of_choices(usages)

    def _see_usages_of_choices(self, usages: Iterable[tuple[int, object]]) -> None:
        """Record the usages that are stated inside choices (Kimi), each with the index of its choice."""
        for _, usage in usages:
            self._see_usage(usage)

    def _count_texts(self, part: object) -> None:
        """Keep the texts in a piece of the answer, to be counted."""
        self._keep(*texts_in(part))

    def _keep(self, *texts: str) -> None:
        """Keep texts to be counted, each as at least one token. None is empty."""
        for text in texts:
            size = len(text) if text.isascii() else 4 * len(text)  # in bytes, or more
            self._pieces.append(text)
            self._pieces_bytes += size
            self.output_at_most += size
            if self._pieces_bytes > _KEPT_BYTES_MAX or len(self._pieces) > _KEPT_PIECES_MAX:
                self._count_pieces()

    def _count_pieces(self) -> None:
        """Count the texts that are kept."""
        for index, text in enumerate(self._pieces):
            tokens = max(1, self._count(text))
            self._tokens_counted += tokens
            if index >= self._pieces_stated:
                self._counted_since_stated += tokens
        self._pieces.clear()
        self._pieces_bytes = self._pieces_stated = 0
        self._bound_output()

    @property
    def _counted(self) -> int:
        """The output tokens of the whole answer by our count."""
        if self._pieces:
            self._count_pieces()
        return self._tokens_counted

    def _count_missing(self, part: object) -> None:
        """Count a text that an event repeats as a whole, as far as it exceeds what was counted so far.

        Some servers send no deltas, or not all. Example: deltas of 5 tokens, then `output_text.done` with 12: 7 are
        added. Then `content_part.done` and `output_item.done` repeat the same 12, and nothing is added.
        """
        missing = sum(map(self._count, texts_in(part))) - self._counted
        if missing > 0:
            self._add_to_count(missing)

    def _count_response_event(self, kind: str, event: JSON) -> None:
        """Count the texts of an event of /responses, whose type is `kind`."""
        if kind in RESPONSE_ENDS:
            response = event.get("response")
            if isinstance(response, dict) and (not self._output_stated or self._is_doubtful):
                self._count_missing(response.get("output"))
        elif kind.endswith(".delta"):
            self._count_texts(event.get("delta"))
        elif kind.endswith(".added"):
            # It is usually empty. Some servers send the text here, and no deltas.
            item = event.get("item")
            members = [item.get(name) for name in _ITEM_TEXT_MEMBERS] if isinstance(item, dict) else []
            self._count_texts([*members, event.get("part")])
        elif kind.endswith(".done"):
            self._count_missing([event.get(name) for name in _WHOLE_TEXT_MEMBERS])

    def _count_other_shape(self, event: JSON, kind: object) -> None:
        """Count the texts of an event that is none of this surface, such as a chunk of chat on /messages.

        A gateway may pass on what its upstream writes. The client gets the text, so it costs.
        """
        response = event.get("response")
        if not self._counts_text or is_error(event):
            return
        if isinstance(kind, str) and kind.startswith("response."):
            self._count_response_event(kind, event)
        elif isinstance(response, dict):  # it repeats the whole answer
            self._count_missing([*texts_in_other_shape(response)])
        else:
            self._keep(*texts_in_other_shape(event))

    def _count_bytes(self, data: bytes) -> None:
        """Count data that is too large to parse by its length, at four bytes for a token, rounded up."""
        self._add_to_count(-(-len(data) // _BYTES_PER_TOKEN))

    def _add_to_count(self, tokens: int) -> None:
        self._tokens_counted += tokens
        self._counted_since_stated += tokens
        self._bound_output()

    def _bound_output(self) -> None:
        seen = max(self._output_stated + self._counted_since_stated, self._tokens_counted)
        self.output_at_most = seen + self._pieces_bytes + self._extra_output if self._counts_text else 0


def write_events(events: Iterable[JSON], newline: bytes = b"\n") -> bytes:
    """Typed events as the bytes of a stream. Each is named after its type, as on /responses and /messages."""
    return b"".join(
        b"event: %b%bdata: %b%b" % (event["type"].encode(), newline, dump(event), newline + newline)
        for event in events
    )
