"""The end of a streamed answer that the proxy stops at a quota's limit, in the format of each endpoint.

An `Ending` watches the chunks or events of one stream. At any moment it can write what the upstream would have sent
next if its own maximum had ended the answer there:

    chat, completions   `finish_reason: "length"` for every choice without a finish reason, usage if requested,
    `[DONE]` /responses          the missing `.done` events, then `response.incomplete` with the whole output so far
    /v1/messages        `stop_reason: "max_tokens"`; see `message_ending`

So an SDK sees a complete stream that was cut by length, not a broken one. The written events repeat what passed (id,
model, items). No text is invented or left out.

Pure: no sockets, no clock. Other modules decide whether a stream is stopped, and what it has used.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from proxy.formats.endpoints import EndpointName
from proxy.formats.message_ending import MessageEnding
from proxy.formats.strict_json import dump
from proxy.policy.amounts import Tokens

JSON = dict[str, Any]

# The events that end a response.
RESPONSE_ENDS = frozenset(("response.completed", "response.incomplete", "response.failed", "error"))

# The members that all chunks of an answer share.
_HEAD_MEMBERS = ("id", "object", "created", "model", "system_fingerprint", "service_tier")
# Used if a stream is stopped before any chunk of it passed. The id is not random, because this module is pure, and an
# id that looks real would mislead: no answer can be found by it.
_UNKNOWN_CHAT: JSON = {"id": "chatcmpl-unknown", "object": "chat.completion.chunk", "created": 0, "model": ""}
_UNKNOWN_COMPLETION: JSON = {"id": "cmpl-unknown", "object": "text_completion", "created": 0, "model": ""}
_UNKNOWN_RESPONSE: JSON = {
    "id": "resp_unknown",
    "object": "response",
    "created_at": 0,
    "status": "in_progress",
    "error": None,
    "incomplete_details": None,
    "model": "",
    "output": [],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "usage": None,
}


class Ending:
    """Watches one stream and can write its end. `choices` is the number of answers that the request asks for."""

    __slots__ = ("_begun", "_choices", "_event_ending", "_finished", "_first", "_is_chat", "_last")

    def __init__(self, endpoint: EndpointName, *, choices: int) -> None:
        self._is_chat = endpoint == "chat"
        self._choices = choices
        # The endpoints whose streams consist of typed events. They have no chunks and no choices.
        self._event_ending: _Response | MessageEnding | None = None
        if endpoint in ("responses", "messages"):
            self._event_ending = _Response() if endpoint == "responses" else MessageEnding()
        self._first: JSON = {}
        self._last: JSON = {}  # the last chunk with a choice
        self._begun: set[int] = set()  # indices of the choices that have had a chunk
        self._finished: set[int] = set()  # indices of the choices that have a finish_reason

    def see(self, chunk: JSON) -> None:
        """Record one chunk or event that passed. It is kept, so the caller must not change it afterwards.

        Chunks of an unexpected shape are ignored.
        """
        if self._event_ending is not None:
            self._event_ending.see(chunk)
            return
        choices = chunk.get("choices")
        if isinstance(choices, list) and choices:
            self._last = chunk
            for choice in choices:
                index = choice.get("index", 0) if isinstance(choice, dict) else None
                # A choice that was not requested gets no end. It is not recorded either, because an upstream could
                # fill the memory with indices.
                if isinstance(index, int) and 0 <= index < self._choices:
                    self._begun.add(index)
                    if choice.get("finish_reason"):  # some servers write "" instead of null
                        self._finished.add(index)
        if not self._first:
            self._first = chunk

    @property
    def has_finished(self) -> bool:
        """Whether the answer is complete: only the usage chunk and `[DONE]` may follow, or nothing."""
        if self._event_ending is not None:
            return self._event_ending.is_over
        return len(self._finished) >= self._choices

    def at_limit(self, usage: Tokens, *, shows_usage: bool, newline: bytes = b"\n") -> bytes:
        """The bytes that end the stream here; empty if the upstream has already ended the response or message.

        `usage` is what the call is charged. `shows_usage` is whether the client asked for the usage of the stream;
        /responses and /v1/messages always state it. `newline` is the line end that the stream uses.
        """
        if self._event_ending is not None:
            events = self._event_ending.missing_events(usage)
            lines = [b"event: %b%bdata: %b" % (event["type"].encode(), newline, dump(event)) for event in events]
        else:
            chunks = [dump(chunk) for chunk in self._missing_chunks(usage, shows_usage)]
            lines = [b"data: " + data for data in (*chunks, b"[DONE]")]
        return b"".join(line + newline + newline for line in lines)

    def _missing_chunks(self, usage: Tokens, shows_usage: bool) -> Iterator[JSON]:
        # Azure's first chunk is `{"id":"","model":"","created":0,"choices":[],…}`, so the last chunk overrides it.
        passed = {**self._first, **self._last}
        head = {name: passed[name] for name in _HEAD_MEMBERS if name in passed}
        head = head or (_UNKNOWN_CHAT if self._is_chat else _UNKNOWN_COMPLETION)
        # If usage is requested, OpenAI writes `"usage": null` on all chunks but the last; vLLM and Ollama do not.
        null_usage = {"usage": None} if shows_usage and self._last.get("usage", 0) is None else {}
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


# ------------------------------------------------------------------------------------------------------ /responses


@dataclass(frozen=True, slots=True)
class _TextKind:
    """One kind of text in a response: the names of its events, and its place in an item.

    The text of an output item is either in one of its parts, `item.content[2].text`, or in a member of the item
    itself, `item.arguments`.
    """

    events: str  # the common part of the event names, before ".delta" and ".done"
    member: str  # the member with the text, in the part or in the item
    list_member: str = ""  # the member of the item that is the list of parts; "" if the item itself has the text
    index_member: str = ""  # the member of an event that has the part's index in that list
    empty_part: JSON = field(default_factory=dict)  # a part without text


_EMPTY_OUTPUT_TEXT: JSON = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
# The texts that a model writes itself. Items of tools that run at the upstream are closed without their texts.
_TEXT_KINDS = (
    _TextKind("response.output_text", "text", "content", "content_index", _EMPTY_OUTPUT_TEXT),
    _TextKind("response.refusal", "refusal", "content", "content_index", {"type": "refusal"}),
    _TextKind("response.reasoning_text", "text", "content", "content_index", {"type": "reasoning_text"}),
    _TextKind("response.reasoning_summary_text", "text", "summary", "summary_index", {"type": "summary_text"}),
    _TextKind("response.function_call_arguments", "arguments"),
    _TextKind("response.custom_tool_call_input", "input"),
)
_KIND_OF_DELTA = {f"{kind.events}.delta": kind for kind in _TEXT_KINDS}
_KIND_OF_DONE = {f"{kind.events}.done": kind for kind in _TEXT_KINDS}
_KIND_OF_PART = {kind.empty_part["type"]: kind for kind in _TEXT_KINDS if kind.list_member}
_PART_EVENTS = {"content": "response.content_part", "summary": "response.reasoning_summary_part"}
_PARTS_ADDED = frozenset(f"{events}.added" for events in _PART_EVENTS.values())
_PARTS_DONE = frozenset(f"{events}.done" for events in _PART_EVENTS.values())
_LIFECYCLE = frozenset(("response.created", "response.queued", "response.in_progress"))


class _Text:
    """One text while it is streamed: a part of an item, or the input of a tool call."""

    __slots__ = ("_written", "is_part_done", "is_text_done", "kind", "part")

    def __init__(self, kind: _TextKind, beginning: object) -> None:
        self.kind = kind
        self.part: JSON | None = None  # the part, from the event that added it or ended it
        self.is_text_done = False  # the text's `.done` event passed
        self.is_part_done = False  # the part's `.done` event passed
        # Not a list of pieces: 100,000 words take 6.4 MB as separate strings and 0.7 MB here.
        self._written = StringIO()
        self.append(beginning)

    def replace(self, text: object) -> None:
        """Set the whole text; a value that is no text is ignored."""
        if isinstance(text, str):
            self._written = StringIO()
            self._written.write(text)

    def append(self, delta: object) -> None:
        """Add a piece; a value that is no text is ignored."""
        if isinstance(delta, str):
            self._written.write(delta)

    @property
    def text(self) -> str:
        """The text so far."""
        return self._written.getvalue()

    def as_part(self) -> JSON:
        """The part with the text so far."""
        return {**(self.kind.empty_part if self.part is None else self.part), self.kind.member: self.text}

    def missing_events(self, location: JSON) -> Iterator[JSON]:
        """The events that the part still lacks. `location` are the members that say which part it is."""
        kind = self.kind
        if not self.is_text_done:
            logprobs: JSON = {"logprobs": []} if "logprobs" in kind.empty_part else {}
            yield {"type": f"{kind.events}.done", **location, **logprobs, kind.member: self.text}
        # A part that was never added gets no `.done` event: some servers send deltas without `content_part.added`.
        if self.part is not None and not self.is_part_done:
            # Only parts of a reasoning summary have a status, which says that they were interrupted.
            status = {"status": "incomplete"} if kind.list_member == "summary" and not self.is_text_done else {}
            yield {"type": f"{_PART_EVENTS[kind.list_member]}.done", **location, "part": self.as_part(), **status}


class _Item:
    """One item of the output. `value` is the item from the event that added it or ended it."""

    __slots__ = ("_texts", "_value", "is_done")

    def __init__(self, value: JSON, *, is_done: bool) -> None:
        self.is_done = is_done
        self._value = value
        self._texts: dict[tuple[str, int], _Text] = {}  # by the list that the part is in, and its index there

    def text(self, kind: _TextKind, index: int) -> _Text:
        """The text at this place, created if there is none."""
        text = self._texts.get((kind.list_member, index))
        if text is None:
            text = _Text(kind, None if kind.list_member else self._value.get(kind.member))
            self._texts[kind.list_member, index] = text
        return text

    def as_json(self) -> JSON:
        """The item with its texts so far; its status is `incomplete` unless the upstream ended it."""
        if self.is_done:
            return self._value
        item = {**self._value, "status": "incomplete"}
        parts: dict[str, dict[int, JSON]] = {}
        for (list_member, index), text in self._texts.items():
            if list_member:
                parts.setdefault(list_member, {})[index] = text.as_part()
            else:
                item[text.kind.member] = text.text
        # Parts that the item had when it was added stay, unless an event spoke of the same index.
        for list_member, streamed in parts.items():
            initial = item.get(list_member)
            merged = {**dict(enumerate(initial if isinstance(initial, list) else ())), **streamed}
            item[list_member] = [merged[index] for index in sorted(merged)]
        return item

    def missing_events(self, output_index: int) -> Iterator[JSON]:
        """The events that end the item.

        There is no `.done` event for the input of a tool call: it would say that the input is final, and a client
        may then run the tool. For example, `rm -r` may be the beginning of `rm -r build`. The item itself ends with
        the status `incomplete`, as OpenAI's do.
        """
        location = {"item_id": self._value.get("id"), "output_index": output_index}
        for (list_member, index), text in self._texts.items():
            if list_member:
                yield from text.missing_events({**location, text.kind.index_member: index})
        yield {"type": "response.output_item.done", "output_index": output_index, "item": self.as_json()}


class _Response:
    """One response, assembled from its events."""

    __slots__ = ("_head", "_items", "_number", "is_over")

    def __init__(self) -> None:
        self.is_over = False
        self._head: JSON = {}  # the response object from the last lifecycle event
        self._items: dict[int, _Item] = {}  # by output index
        self._number = -1  # the last sequence_number

    def see(self, event: JSON) -> None:
        """Record one event; an event of an unexpected shape is ignored."""
        kind = event.get("type")
        if not isinstance(kind, str):
            return
        number = event.get("sequence_number")
        if isinstance(number, int):
            self._number = number
        if text_kind := _KIND_OF_DELTA.get(kind):
            if text := self._text(text_kind, event):
                text.append(event.get("delta"))
        elif text_kind := _KIND_OF_DONE.get(kind):
            if text := self._text(text_kind, event):
                text.replace(event.get(text_kind.member))
                text.is_text_done = True
        else:
            self._see_structure(kind, event)

    def missing_events(self, usage: Tokens) -> list[JSON]:
        """The events that end the response here; none if the upstream has ended it.

        Example, stopped after the delta "Hello": `output_text.done`, `content_part.done`, `output_item.done`, and
        `response.incomplete`, numbered on from the last event.
        """
        if self.is_over:
            return []
        # SDKs accept no event of a response before `response.created`.
        events: list[JSON] = [] if self._head else [{"type": "response.created", "response": _UNKNOWN_RESPONSE}]
        items = sorted(self._items.items())
        for index, item in items:
            if not item.is_done:
                events += item.missing_events(index)
        response = {
            **(self._head or _UNKNOWN_RESPONSE),
            "status": "incomplete",
            "incomplete_details": {"reason": "max_output_tokens"},
            "output": [item.as_json() for _, item in items],
            "usage": _response_usage(usage),
        }
        events.append({"type": "response.incomplete", "response": response})
        return _numbered(events, self._number + 1)

    def _see_structure(self, kind: str, event: JSON) -> None:
        """Record an event that carries no text: it adds or ends a part, an item or the response."""
        if kind in _PARTS_ADDED:
            self._see_part(event, is_done=False)
        elif kind in _PARTS_DONE:
            self._see_part(event, is_done=True)
        elif kind in ("response.output_item.added", "response.output_item.done"):
            index, item = event.get("output_index"), event.get("item")
            if isinstance(index, int) and isinstance(item, dict):
                self._items[index] = _Item(item, is_done=kind.endswith(".done"))
        elif kind in _LIFECYCLE:
            response = event.get("response")
            self._head = response if isinstance(response, dict) else self._head
        elif kind in RESPONSE_ENDS:
            self.is_over = True

    def _see_part(self, event: JSON, *, is_done: bool) -> None:
        part = event.get("part")
        if not isinstance(part, dict):
            return
        text_kind = _KIND_OF_PART.get(str(part.get("type")))
        if text_kind and (text := self._text(text_kind, event)):
            text.part = part
            text.is_text_done = text.is_part_done = is_done
            text.replace(part.get(text_kind.member))

    def _text(self, kind: _TextKind, event: JSON) -> _Text | None:
        """The text that an event belongs to; None if there is no such item or the event lacks an index.

        The text of an item that is done may still be returned. It changes nothing: `_Item.as_json` then returns the
        item as the upstream ended it.
        """
        output_index = event.get("output_index")
        item = self._items.get(output_index) if isinstance(output_index, int) else None
        if item is None:
            return None
        index = event.get(kind.index_member) if kind.list_member else 0
        return item.text(kind, index) if isinstance(index, int) else None


def _numbered(events: Iterable[JSON], first: int) -> list[JSON]:
    return [{"type": event["type"], "sequence_number": number, **event} for number, event in enumerate(events, first)]


def _response_usage(usage: Tokens) -> JSON:
    return {
        "input_tokens": usage.input,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.output,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.input + usage.output,
    }
