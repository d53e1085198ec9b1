"""Answers of /chat/completions and /completions, and of the endpoints whose answers have the same shape.

A stream consists of chunks with choices, and ends with `[DONE]`:

    data: {"id":"c","choices":[{"index":0,"delta":{"content":"Hi"}}]}
    data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}
    data: {"id":"c","choices":[],"usage":{"prompt_tokens":11,…}}                   only if usage is requested
    data: [DONE]

The proxy asks for usage on the client's behalf (`formats.request`), so the upstream adds members to chunks. They are
cut out of the bytes, and all other bytes stay the same: numbers, escapes, spaces and line ends. Example:

    data: {"id":"c","x":1.50,"choices":[…],"usage":null}     from the upstream
    data: {"id":"c","x":1.50,"choices":[…]}                  to the client

If a member cannot be cut out safely, because it has an unusual spelling or another member looks like it, the chunk is
serialized anew from the parsed object. Pure.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import reduce

from proxy.errors import ProxyError
from proxy.formats.kinds import kind_of
from proxy.formats.meter import JSON, Ending, Meter
from proxy.formats.request import Request
from proxy.formats.sse import Event
from proxy.formats.strict_json import dump
from proxy.formats.texts import plain_text, read_object, texts_in
from proxy.formats.usage import Stated, read_timings, without_usages
from proxy.policy.amounts import Tokens

# Members that any chunk may have. A chunk without choices that has no others was sent only because usage was
# requested.
_COMMON_KEYS = frozenset(
    ("id", "object", "created", "model", "system_fingerprint", "service_tier", "choices", "usage", "obfuscation")
)
# The spellings of "no usage yet" on a chunk, with the comma that has to be removed too: a comma before the member, or
# behind it if the member is the first.
_NULLS = (b',"usage":null', b', "usage": null', b'"usage":null,', b'"usage": null, ')
# The members that all chunks of an answer share.
_HEAD_MEMBERS = ("id", "object", "created", "model", "system_fingerprint", "service_tier")
# Used if a stream is stopped before any chunk of it passed. The id is not random, because this module is pure, and an
# id that looks real would mislead: no answer can be found by it.
_UNKNOWN_CHAT: JSON = {"id": "chatcmpl-unknown", "object": "chat.completion.chunk", "created": 0, "model": ""}
_UNKNOWN_COMPLETION: JSON = {"id": "cmpl-unknown", "object": "text_completion", "created": 0, "model": ""}


def error_event(error: ProxyError) -> bytes:
    """An error inside a stream: a chunk with `error`, at which the SDKs raise an exception."""
    return b"data: " + dump(error.body()) + b"\n\n"


class ChatMeter(Meter):
    """Measures an answer of chunks and choices; also of embeddings, which have `usage` and no text.

    The proxy asks vLLM and llama.cpp for the usage so far on every chunk, which moves or adds members. They are
    removed or put back, so that the client gets what it would have got otherwise.
    """

    _usage_chunks: Stated | None = None  # the sum of the usage chunks behind finish chunks
    _has_finish = False  # one of several choices has finished since the last of these usage chunks

    def __init__(self, request: Request, *, count: Callable[[str], int], kind: str) -> None:
        super().__init__(request, count=count, kind=kind)
        running_usage = kind_of(kind).running_usage
        self._states_first_choice_only = kind_of(kind).states_first_choice_only
        self._stripped_running_usage = running_usage if kind in request.adds_running_usage else None
        self._has_several_prompts = request.has_several_prompts
        self._usage_of_choices: dict[int, Stated] = {}  # the usages inside choices, by the index of the choice

    def stop_stripping(self) -> None:
        """Remove nothing from now on, and move no timings."""
        super().stop_stripping()
        self._stripped_running_usage = None

    def _new_ending(self, request: Request) -> Ending:
        return ChatEnding(is_chat=request.endpoint.name == "chat", choices=request.choices)

    def _see_answer(self, answer: JSON) -> None:
        self._record(self._read(answer.get("usage")))
        self._see_usages_elsewhere(answer)
        if self._states_first_choice_only:
            self._keep_other_choices(without_usages(answer.get("choices")))

    def _output_of(self, answer: JSON) -> object:
        # A gateway may answer in the shape of /responses. Its text is delivered, so it counts.
        return [without_usages(answer.get("choices")), answer.get("output")]

    def _keep_other_choices(self, choices: object) -> None:
        """Keep the texts of all choices but the first. llama.cpp states the usage of the first only."""
        if isinstance(choices, list) and len(choices) > 1 and self._stated is not None:
            self.uncounted_texts = list(texts_in(choices[1:]))
            self._is_partial = True
            if self._has_several_prompts:  # the stated input is that of the first prompt only
                self._set_stated(replace(self._stated, input=None, cached=0))
                self.input_stated = None

    def _see_object(self, chunk: JSON, event: Event) -> bytes:
        raw, choices = event.raw, chunk.get("choices")
        if chunk.get("error") is not None:
            self.has_error = True
        # The bytes are searched, because this is the path of every chunk and hardly any has such members.
        has_usage = raw.count(b'"usage"') > ("usage" in chunk)
        if choices:
            self.is_at_end = self.is_over  # text follows, so a usage chunk before it was not the end
            if self._choices > 1:
                self._has_finish = self._has_finish or _has_finish(choices)
            text = plain_text(choices)
            if text:
                self._keep(text)
            elif text is None:
                self._count_texts(without_usages(choices) if has_usage else choices)
        elif not isinstance(chunk.get("usage"), dict):
            self._count_other_shape(chunk, chunk.get("type") or event.name)
        if has_usage or b'"x_' in raw:
            self._see_usages_elsewhere(chunk)
        if "usage" in chunk:
            return self._see_usage_beside(choices, chunk, event)
        if "timings" in chunk:
            self._see_running_usage(read_timings(chunk["timings"]))
            return self._without_running_timings(chunk, event)
        return raw

    def _see_usage_beside(self, choices: object, chunk: JSON, event: Event) -> bytes:
        """Record the usage that a chunk states beside its choices, and return the chunk as it would come unasked.

        OpenAI writes null on every chunk before the last. Ollama's /completions writes three zeros; beside a choice
        they state no usage either. Without a choice they are one, and `usage` decides what they count.
        """
        usage = chunk["usage"]
        if isinstance(usage, dict):
            if not choices:
                return self._see_usage_chunk(chunk, event)
            if any(usage.values()):
                self._see_running_usage(self._read(usage))
                return without_usage(event, chunk) if self._stripped_running_usage == "usage" else event.raw
        is_placeholder = usage is None or isinstance(usage, dict)
        return without_usage(event, chunk) if is_placeholder and self._strips_usage else event.raw

    def _see_usage_chunk(self, chunk: JSON, event: Event) -> bytes:
        """Return the usage chunk as it would have come unasked: not at all, unless it has other members too."""
        # With several choices llama.cpp sends a usage chunk for each, behind its finish chunk. So only [DONE] is the
        # end, and the outputs are added; the input is that of the one prompt each time:
        #     {"prompt_tokens":11,"completion_tokens":5} + {"prompt_tokens":11,"completion_tokens":7}  →  11 and 12
        # A usage chunk that follows no finish chunk states all choices, perhaps once more.
        self.is_at_end = self.is_at_end or self._choices == 1
        stated, before = self._read(chunk["usage"]), self._usage_chunks
        if stated and self._has_finish:
            stated = self._usage_chunks = self._added([before, stated]) if before else stated
            self._has_finish = False
        self._record(stated)
        if not self._strips_usage:
            return event.raw
        return without_usage(event, chunk) if extra_members(chunk) else b""

    def _see_running_usage(self, stated: Stated | None) -> None:
        """Record the usage so far that a chunk states beside its choice.

        With several choices it is the usage of that one choice, so it is ignored.
        """
        if self._choices == 1:
            self._record(stated)

    def _see_usages_of_choices(self, usages: Iterable[tuple[int, object]]) -> None:
        """Record the usages that are stated inside choices, each with the index of its choice.

        Those of several choices are added, as soon as each has stated one. Until then the texts are counted.
        """
        for index, usage in usages:
            stated = self._read(usage)
            if self._choices == 1:
                self._record(stated)
            elif stated is not None and 0 <= index < self._choices:
                before = self._usage_of_choices.get(index, stated)
                if stated.contradicts(before):
                    self._is_contradicted = self._is_doubtful = True
                self._usage_of_choices[index] = stated.largest(before)
                if len(self._usage_of_choices) == self._choices:
                    self._record(self._added([*self._usage_of_choices.values()]))

    def _added(self, usages: Sequence[Stated]) -> Stated:
        """The usages of several choices with the same input as one.

        Some servers state the usage of all choices each time. So the sum is at most what the call can have used,
        unless one of them alone is larger.
        """
        total = reduce(lambda sum, stated: sum.plus(stated, adds_input=False), usages)
        return total.with_output_at_most(
            max(self.output_bound, *(stated.output_without_extra or 0 for stated in usages))
        )

    def _without_running_timings(self, chunk: JSON, event: Event) -> bytes:
        """Return the chunk without the timings so far. The timings of the finish chunk stay: they come unasked.

        If a stop word ends the answer, llama.cpp sends timings with the last text too; those are removed, and it
        repeats them on the next chunk.
        """
        is_running = self._stripped_running_usage == "timings"
        return without_timings(event, chunk) if is_running and not is_finish_chunk(chunk) else event.raw


class LlamaCppMeter(ChatMeter):
    """Measures a stream of llama.cpp with one choice, of which the proxy requests the usage."""

    # The finish chunk, kept for one event because it may get the timings: its bytes, and its JSON without usage.
    _finish_chunk: tuple[bytes, JSON] | None = None

    def see_event(self, event: Event, *, is_cut: bool = False) -> bytes:
        """Measure one event and return the bytes for the client; a finish chunk may be kept for one event."""
        shown = super().see_event(event, is_cut=is_cut)
        if not self._strips_usage:
            return shown
        # If no usage is requested, llama.cpp writes `timings` on the last chunk that has a choice. Because the proxy
        # requests usage, they come on the usage chunk instead, which the client must not see:
        #     data: {"choices":[{"delta":{},"finish_reason":"stop"}]}
        #     data: {"choices":[],"usage":{…},"timings":{…}}
        # So the finish chunk is kept until the next event, and gets the timings if that is the usage chunk.
        kept, self._finish_chunk = self._finish_chunk, None
        chunk = self.chunk or {}
        # If the usage chunk has other members too, it is sent with all of them: it is unknown on which chunk those
        # would have come without our option.
        if kept and shown and not chunk.get("choices") and extra_members(chunk) == {"timings"}:
            return with_timings(*kept, event, chunk)
        if is_finish_chunk(chunk) and "timings" not in chunk:
            without_null = chunk if chunk.get("usage") else _without(chunk, "usage")
            self._finish_chunk, shown = (shown, without_null), b""
        return (kept[0] if kept else b"") + shown

    def end(self) -> bytes:
        """Note that no further event comes, and return the finish chunk if one is kept."""
        kept, self._finish_chunk = self._finish_chunk, None
        return kept[0] if kept else b""


def chat_meter(request: Request, *, count: Callable[[str], int], kind: str) -> ChatMeter:
    """A new meter for the answer to this request."""
    has_timings = kind_of(kind).running_usage == "timings" and request.adds_usage and request.choices == 1
    return (LlamaCppMeter if has_timings else ChatMeter)(request, count=count, kind=kind)


class ChatEnding(Ending):
    """Watches a stream of chunks, and can write its end.

    That is `finish_reason: "length"` for every choice without a finish reason, the usage if requested, and `[DONE]`.
    `is_chat` tells /chat/completions from /completions; `choices` is how many answers the request asks for.
    """

    __slots__ = ("_begun", "_choices", "_finished", "_first", "_is_chat", "_last")

    def __init__(self, *, is_chat: bool, choices: int) -> None:
        super().__init__()
        self._is_chat = is_chat
        self._choices = choices
        self._first = self._last = b""  # the first chunk, and the last one with a choice
        self._begun: set[int] = set()  # indices of the choices that have had a chunk
        self._finished: set[int] = set()  # indices of the choices that have a finish_reason

    def see(self, chunk: JSON, data: bytes) -> None:
        """Record one chunk that passed."""
        choices = chunk.get("choices")
        if isinstance(choices, list) and choices:
            self._last = data
            for choice in choices:
                index = choice.get("index", 0) if isinstance(choice, dict) else None
                # A choice that was not requested gets no end. It is not recorded either, because an upstream could
                # fill the memory with indices.
                if isinstance(index, int) and 0 <= index < self._choices:
                    self._begun.add(index)
                    if choice.get("finish_reason"):  # some servers write "" instead of null
                        self._finished.add(index)
        if not self._first and chunk:
            self._first = data
        self.has_finished = len(self._finished) >= self._choices

    def at_limit(self, usage: Tokens, *, shows_usage: bool, newline: bytes = b"\n") -> bytes:
        """The bytes that end the stream here."""
        chunks = (dump(chunk) for chunk in self._missing_chunks(usage, shows_usage))
        return b"".join(b"data: " + data + newline + newline for data in (*chunks, b"[DONE]"))

    def _missing_chunks(self, usage: Tokens, shows_usage: bool) -> Iterator[JSON]:
        # Azure's first chunk is `{"id":"","model":"","created":0,"choices":[],…}`, so the last chunk overrides it.
        last = read_object(self._last) or {}
        passed = {**(read_object(self._first) or {}), **last}
        head = {name: passed[name] for name in _HEAD_MEMBERS if name in passed}
        head = head or (_UNKNOWN_CHAT if self._is_chat else _UNKNOWN_COMPLETION)
        # If usage is requested, OpenAI writes `"usage": null` on all chunks but the last; vLLM and Ollama do not.
        null_usage = {"usage": None} if shows_usage and last.get("usage", 0) is None else {}
        for index in range(self._choices):
            if index not in self._finished:
                yield {**head, "choices": [self._cut_choice(index)], **null_usage}
        if shows_usage:
            yield {**head, "choices": [], "usage": _chunk_usage(usage)}

    def _cut_choice(self, index: int) -> JSON:
        content: JSON = {"text": ""}
        if self._is_chat:
            # If this is the first chunk of the choice, it must state the role, or SDKs build a message without one.
            content = {"delta": {} if index in self._begun else {"role": "assistant", "content": ""}}
        return {"index": index, **content, "logprobs": None, "finish_reason": "length"}


def _chunk_usage(usage: Tokens) -> JSON:
    return {
        "prompt_tokens": usage.input,
        "completion_tokens": usage.output,
        "total_tokens": usage.input + usage.output,
    }


# -------------------------------------------------------------------------------- chunks without what the proxy added


def extra_members(chunk: JSON) -> set[str]:
    """The names of members with a value, beyond those that any chunk may have."""
    return {key for key, value in chunk.items() if value is not None and key not in _COMMON_KEYS}


def is_finish_chunk(chunk: JSON) -> bool:
    """Whether the chunk has exactly one choice and states its `finish_reason`."""
    match chunk.get("choices"):
        case [{"finish_reason": str()}]:
            return True
    return False


def _has_finish(choices: object) -> bool:
    found = choices if isinstance(choices, list) else []
    return any(isinstance(choice, dict) and choice.get("finish_reason") for choice in found)


def with_timings(raw: bytes, chunk: JSON, usage_event: Event, usage_chunk: JSON) -> bytes:
    """The finish chunk (`raw`, parsed as `chunk`) with the `timings` of the usage chunk as its last member.

    That is where llama.cpp writes them if no usage is requested.
    """
    expected = {**chunk, "timings": usage_chunk["timings"]}
    # In the usage chunk the timings are the last member too: `…,"timings":{…}}`. Everything between the name and the
    # last brace is copied in front of the last brace of the finish chunk.
    insert_at = raw.rfind(b"}")
    start, end = usage_event.raw.rfind(b'"timings":'), usage_event.raw.rfind(b"}")
    moved = raw[:insert_at] + b"," + usage_event.raw[start:end] + raw[insert_at:]
    return moved if start >= 0 and _parses_to(moved, expected) else _serialize(expected)


def without_timings(event: Event, chunk: JSON) -> bytes:
    """The event without `timings`, which llama.cpp writes on every chunk if `timings_per_token` is set."""
    raw, expected = event.raw, _without(chunk, "timings")
    start = raw.rfind(b',"timings":{')
    cut = raw[:start] + raw[raw.find(b"}", start) + 1 :]  # timings contain only numbers, so the first } ends them
    return cut if start >= 0 and _parses_to(cut, expected) else _serialize(expected)


def without_usage(event: Event, chunk: JSON) -> bytes:
    """The event without `usage`, which is there only because the proxy asked for it."""
    raw, usage = event.raw, chunk["usage"]
    # Quotes inside a string are escaped, so `"usage"` with plain quotes is a name or a whole string. If it occurs
    # once, it is the member. Otherwise it may also be a string (`"note":"usage"`) or the member of an inner object
    # (`{"a":{"x":1,"usage":null},"usage":null}`), so each place where it could be cut is checked by parsing the
    # result.
    is_only_one = raw.count(b'"usage"') == 1
    for member in _NULLS if usage is None else (b',"usage":' + dump(usage),):
        before, found, after = raw.partition(member)
        while found:
            if is_only_one or _parses_to(before + after, _without(chunk, "usage")):
                return before + after
            skipped, found, after = after.partition(member)
            before += member + skipped
    return _serialize(_without(chunk, "usage"))


def _without(chunk: JSON, member: str) -> JSON:
    return {name: value for name, value in chunk.items() if name != member}


def _parses_to(raw: bytes, chunk: JSON) -> bool:
    return read_object(raw[raw.find(b"{") : raw.rfind(b"}") + 1]) == chunk


def _serialize(chunk: JSON) -> bytes:
    return b"data: " + dump(chunk) + b"\n\n"
