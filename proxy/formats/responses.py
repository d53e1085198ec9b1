"""Answers of /responses and /responses/compact: a response object, or a stream of the events that build it.

    event: response.created             data: {"type":"response.created","response":{"id":"resp_1",…}}
    event: response.output_text.delta   data: {"type":"response.output_text.delta","delta":"Hi",…}
    event: response.completed           data: {"type":"response.completed","response":{…,"usage":{…}}}

A stream always states its usage in its last event, so the proxy adds no option and removes nothing. Pure.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import StringIO

from proxy.errors import ProxyError
from proxy.formats.endpoints import RESPONSE_ID
from proxy.formats.meter import JSON, RESPONSE_ENDS, Ending, Meter, write_events
from proxy.formats.request import Request
from proxy.formats.sse import Event
from proxy.formats.usage import without_usages
from proxy.policy.amounts import Tokens

# The states of a response that is all there is; None: it states none. Of one in any other state (`queued`,
# `in_progress`, `failed`, `cancelled`, or one that we don't know) the rest could be read later, or never comes.
_FINISHED = (None, "completed", "incomplete")
# Used if a stream is stopped before any event of it passed. The id is not random, because this module is pure, and an
# id that looks real would mislead: no answer can be found by it.
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


def error_event(error: ProxyError) -> bytes:
    """An error inside a stream, at which the SDKs raise an exception.

    Older SDKs look for a member `error` and newer ones for the event's name, so the event has both.
    """
    flat = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
    return write_events([{**flat, **error.body()}])


class ResponsesMeter(Meter):
    """Measures a response. All bytes are forwarded unchanged."""

    _has_ended = False  # the event that ends the response has come

    def _new_ending(self, request: Request) -> Ending:
        return ResponsesEnding()

    def end(self) -> bytes:
        """Note that a stream that ends without its last event broke off, even if it ended regularly or by `[DONE]`.

        Such a response may go on at the upstream, so it must not be read there.
        """
        self.has_error = self.has_error or not self._has_ended
        return b""

    def _see_answer(self, answer: JSON) -> None:
        self._see_response(answer)
        self.has_error = self.has_error or answer.get("status") not in _FINISHED

    def _output_of(self, answer: JSON) -> object:
        # A gateway may answer in chat's shape. Its text is delivered, so it counts.
        return [without_usages(answer.get("choices")), answer.get("output")]

    def _see_object(self, chunk: JSON, event: Event) -> bytes:
        self.has_error = self.has_error or chunk.get("error") is not None
        # Clients that go by the name of the event need no type.
        kind, response = chunk.get("type") or event.name, chunk.get("response")
        if isinstance(response, dict):
            self._see_response(response)
        kind = kind if isinstance(kind, str) and (kind in RESPONSE_ENDS or kind.startswith("response.")) else None
        if kind is None:
            self._count_other_shape(chunk, None)
        # Some gateways state the usage beside the response, or in members of their own.
        self._see_usage(chunk.get("usage"))
        self._see_usages_elsewhere(chunk)
        if kind in RESPONSE_ENDS:
            self.is_at_end = self.is_over = self._has_ended = True
            is_finished = not isinstance(response, dict) or response.get("status") in _FINISHED
            self.has_error = self.has_error or kind in ("error", "response.failed") or not is_finished
        if kind is not None:
            self._count_response_event(kind, chunk)
        return event.raw

    def _see_response(self, response: JSON) -> None:
        """Record the id of a response, and its usage if it has one."""
        name, tools = response.get("id"), response.get("tool_usage")
        # Counting the input tokens (`input_tokens`) stores no response, whatever its answer contains.
        if self._counts_text and isinstance(name, str) and RESPONSE_ID.fullmatch(name):
            self.response_id = name
        stated = self._read(response.get("usage"))
        # The image tool states its tokens separately; they are not included in `usage`.
        drawn = self._read(tools.get("image_gen")) if isinstance(tools, dict) else None
        if stated and drawn:
            stated = stated.plus(drawn, adds_input=True)
        self._record(stated)
        self._see_usages_elsewhere(response)


# ------------------------------------------------------------------------------------------------- the end at a limit


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
        # Parts that the item had when it was added stay, unless an event had the same index.
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


class ResponsesEnding(Ending):
    """Assembles a response from its events, and can write its end.

    That is the missing `.done` events, then `response.incomplete` with the whole output so far.
    """

    __slots__ = ("_head", "_items", "_number")

    def __init__(self) -> None:
        super().__init__()
        self._head: JSON = {}  # the response object from the last lifecycle event
        self._items: dict[int, _Item] = {}  # by output index
        self._number = -1  # the last sequence_number

    def see(self, chunk: JSON, data: bytes) -> None:
        """Record one event that passed."""
        kind = chunk.get("type")
        if not isinstance(kind, str):
            return
        number = chunk.get("sequence_number")
        if isinstance(number, int):
            self._number = number
        if text_kind := _KIND_OF_DELTA.get(kind):
            if text := self._text(text_kind, chunk):
                text.append(chunk.get("delta"))
        elif text_kind := _KIND_OF_DONE.get(kind):
            if text := self._text(text_kind, chunk):
                text.replace(chunk.get(text_kind.member))
                text.is_text_done = True
        else:
            self._see_structure(kind, chunk)

    def at_limit(self, usage: Tokens, *, shows_usage: bool, newline: bytes = b"\n") -> bytes:
        """The bytes that end the response here; empty if the upstream has ended it. It always states its usage."""
        return write_events(self._missing_events(usage), newline)

    def _missing_events(self, usage: Tokens) -> list[JSON]:
        """The events that end the response here; none if the upstream has ended it.

        Example, stopped after the delta "Hello": `output_text.done`, `content_part.done`, `output_item.done`, and
        `response.incomplete`, numbered on from the last event.
        """
        if self.has_finished:
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
            self.has_finished = True

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
