"""The end that a streamed answer gets when we stop it at a quota's limit, in each endpoint's own form.

An ending watches one stream go by, chunk by chunk, and can write at any moment what the upstream would have sent
next, had its own maximum ended the answer there: `finish_reason: "length"` for every choice that has none yet, or
`response.incomplete` with all that was said so far, or `stop_reason: "max_tokens"`. So an SDK takes the stream for a
whole one that was cut by length, not for a broken one. What is written repeats what passed (id, model, items); no
text is made up or left out.

Pure: no sockets, no clock. Whether a stream is to be stopped, and what it has used by then, is decided elsewhere.
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

# With one of these a response has ended by itself.
RESPONSE_ENDS = frozenset(("response.completed", "response.incomplete", "response.failed", "error"))

# What all chunks of an answer have in common.
_HEAD = ("id", "object", "created", "model", "system_fingerprint", "service_tier")
# For a stream that is stopped before anything of it passed. An id can't be drawn here (the ground is pure), and one
# that looks real would be a lie: nobody could find the answer by it.
_UNSEEN_CHAT: JSON = {"id": "chatcmpl-unknown", "object": "chat.completion.chunk", "created": 0, "model": ""}
_UNSEEN_COMPLETION: JSON = {"id": "cmpl-unknown", "object": "text_completion", "created": 0, "model": ""}
_UNSEEN_RESPONSE: JSON = {
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
    """The end of one stream. `choices` is how many answers its call asked for."""

    __slots__ = ("_begun", "_choices", "_finished", "_first", "_is_chat", "_last", "_of_events")

    def __init__(self, endpoint: EndpointName, *, choices: int) -> None:
        self._is_chat = endpoint == "chat"
        self._choices = choices
        # Where events have names: they are no chunks, and there are no choices.
        self._of_events: _Response | MessageEnding | None = None
        if endpoint in ("responses", "messages"):
            self._of_events = _Response() if endpoint == "responses" else MessageEnding()
        self._first: JSON = {}
        self._last: JSON = {}  # that had a choice
        self._begun: set[int] = set()
        self._finished: set[int] = set()

    def see(self, chunk: JSON) -> None:
        """Take note of one chunk or event that passed. It is kept, so it may not be changed afterwards.

        What has an odd shape is passed over, as if it had not been there.
        """
        if self._of_events is not None:
            self._of_events.see(chunk)
            return
        choices = chunk.get("choices")
        if isinstance(choices, list) and choices:
            self._last = chunk
            for choice in choices:
                index = choice.get("index", 0) if isinstance(choice, dict) else None
                # One that wasn't asked for is not ours to end, and no upstream may fill our memory with such.
                if isinstance(index, int) and 0 <= index < self._choices:
                    self._begun.add(index)
                    if choice.get("finish_reason"):  # some servers write "" for null
                        self._finished.add(index)
        if not self._first:
            self._first = chunk

    @property
    def has_finished(self) -> bool:
        """Whether nothing of the answer itself can follow: only the usage chunk and `[DONE]`, or nothing at all."""
        if self._of_events is not None:
            return self._of_events.is_over
        return len(self._finished) >= self._choices

    def at_limit(self, usage: Tokens, *, shows_usage: bool, newline: bytes = b"\n") -> bytes:
        """The bytes that end the stream here. `newline` is how its lines end.

        `shows_usage` is whether the client asked for the usage of its stream; a response always says it. After an
        event that ended a response there is nothing to write.
        """
        if self._of_events is not None:
            events = self._of_events.closing(usage)
            lines = [b"event: %b%bdata: %b" % (event["type"].encode(), newline, dump(event)) for event in events]
        else:
            lines = [b"data: " + dump(chunk) for chunk in self._closing(usage, shows_usage)] + [b"data: [DONE]"]
        return b"".join(line + newline + newline for line in lines)

    def _closing(self, usage: Tokens, shows_usage: bool) -> Iterator[JSON]:
        # Azure's first chunk has an empty id and no choice: the last one knows better.
        seen = {**self._first, **self._last}
        head = {name: seen[name] for name in _HEAD if name in seen}
        head = head or (_UNSEEN_CHAT if self._is_chat else _UNSEEN_COMPLETION)
        # OpenAI says null on every other chunk when usage is asked for; vLLM and Ollama leave it out.
        null = {"usage": None} if shows_usage and self._last.get("usage", 0) is None else {}
        for index in range(self._choices):
            if index not in self._finished:
                yield {**head, "choices": [self._cut_choice(index)], **null}
        if shows_usage:
            yield {**head, "choices": [], "usage": _chunk_usage(usage)}

    def _cut_choice(self, index: int) -> JSON:
        said: JSON = {"text": ""}
        if self._is_chat:
            # A choice whose first chunk this is has to say whose message it is, or SDKs build one without a role.
            said = {"delta": {} if index in self._begun else {"role": "assistant", "content": ""}}
        return {"index": index, **said, "logprobs": None, "finish_reason": "length"}


def _chunk_usage(usage: Tokens) -> JSON:
    return {
        "prompt_tokens": usage.input,
        "completion_tokens": usage.output,
        "total_tokens": usage.input + usage.output,
    }


# ------------------------------------------------------------------------------------------------------ /responses


@dataclass(frozen=True, slots=True)
class _Form:
    """One kind of text in a response: what its events are called, and where in its item it stands."""

    events: str  # they are this and ".delta" or ".done"
    member: str  # of its part, or of the item itself: the text
    place: str = ""  # the member of the item that is the list of its parts; "" where the item itself has the text
    index: str = ""  # the member of an event that says which of the parts it means
    empty: JSON = field(default_factory=dict)  # a part before anything was said


_NO_TEXT: JSON = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
# What a model writes itself. The items of tools that run at the upstream are closed without their texts.
_FORMS = (
    _Form("response.output_text", "text", "content", "content_index", _NO_TEXT),
    _Form("response.refusal", "refusal", "content", "content_index", {"type": "refusal"}),
    _Form("response.reasoning_text", "text", "content", "content_index", {"type": "reasoning_text"}),
    _Form("response.reasoning_summary_text", "text", "summary", "summary_index", {"type": "summary_text"}),
    _Form("response.function_call_arguments", "arguments"),
    _Form("response.custom_tool_call_input", "input"),
)
_DELTAS = {f"{form.events}.delta": form for form in _FORMS}
_TEXTS_DONE = {f"{form.events}.done": form for form in _FORMS}
_FORMS_OF_PARTS = {form.empty["type"]: form for form in _FORMS if form.place}
_PART_EVENTS = {"content": "response.content_part", "summary": "response.reasoning_summary_part"}
_PARTS_ADDED = frozenset(f"{events}.added" for events in _PART_EVENTS.values())
_PARTS_DONE = frozenset(f"{events}.done" for events in _PART_EVENTS.values())
_LIFECYCLE = frozenset(("response.created", "response.queued", "response.in_progress"))


class _Text:
    """One text as it grows: a part of an item, or what a tool is called with."""

    __slots__ = ("_written", "form", "is_closed", "is_said", "part")

    def __init__(self, form: _Form, begun: object) -> None:
        self.form = form
        self.part: JSON | None = None  # as the event that opened or closed it gave it
        self.is_said = False
        self.is_closed = False
        # Not a list of pieces: a hundred thousand words are 6.4 MB as strings of their own and 0.7 MB in here.
        self._written = StringIO()
        self.add(begun)

    def put(self, text: object) -> None:
        """Let it be this, if it is a text at all."""
        if isinstance(text, str):
            self._written = StringIO()
            self._written.write(text)

    def add(self, delta: object) -> None:
        """Let it grow."""
        if isinstance(delta, str):
            self._written.write(delta)

    @property
    def now(self) -> str:
        """What was said so far."""
        return self._written.getvalue()

    def as_part(self) -> JSON:
        """The part that it is, as far as it came."""
        return {**(self.form.empty if self.part is None else self.part), self.form.member: self.now}

    def closing(self, where: JSON) -> Iterator[JSON]:
        """The events that are still missing of a part."""
        form = self.form
        if not self.is_said:
            logprobs: JSON = {"logprobs": []} if "logprobs" in form.empty else {}
            yield {"type": f"{form.events}.done", **where, **logprobs, form.member: self.now}
        if self.part is not None and not self.is_closed:
            # Of all parts only a summary's can say that it was interrupted.
            status = {"status": "incomplete"} if form.place == "summary" and not self.is_said else {}
            yield {"type": f"{_PART_EVENTS[form.place]}.done", **where, "part": self.as_part(), **status}


class _Item:
    """One item of the output. `value` is it as the event that began or ended it gave it."""

    __slots__ = ("_texts", "_value", "is_done")

    def __init__(self, value: JSON, *, is_done: bool) -> None:
        self.is_done = is_done
        self._value = value
        self._texts: dict[tuple[str, int], _Text] = {}

    def text(self, form: _Form, index: int) -> _Text:
        """The text that stands there; a new one where none does."""
        text = self._texts.get((form.place, index))
        if text is None:
            text = _Text(form, None if form.place else self._value.get(form.member))
            self._texts[form.place, index] = text
        return text

    def now(self) -> JSON:
        """The item as far as it came."""
        if self.is_done:
            return self._value
        item = {**self._value, "status": "incomplete"}
        parts: dict[str, dict[int, JSON]] = {}
        for (place, index), text in self._texts.items():
            if place:
                parts.setdefault(place, {})[index] = text.as_part()
            else:
                item[text.form.member] = text.now
        for place, new in parts.items():
            old = item.get(place)
            both = {**dict(enumerate(old if isinstance(old, list) else ())), **new}
            item[place] = [both[index] for index in sorted(both)]
        return item

    def closing(self, output_index: int) -> Iterator[JSON]:
        """The events that end it here.

        No `.done` for what a tool was to be called with: that would say it is final, and a client may run it. The
        item itself ends, as OpenAI's do, with a status that says it is not whole.
        """
        where = {"item_id": self._value.get("id"), "output_index": output_index}
        for (place, index), text in self._texts.items():
            if place:
                yield from text.closing({**where, text.form.index: index})
        yield {"type": "response.output_item.done", "output_index": output_index, "item": self.now()}


class _Response:
    """One response as its events tell it."""

    __slots__ = ("_head", "_items", "_number", "is_over")

    def __init__(self) -> None:
        self.is_over = False
        self._head: JSON = {}
        self._items: dict[int, _Item] = {}
        self._number = -1

    def see(self, event: JSON) -> None:
        """Take note of one event."""
        kind = event.get("type")
        if not isinstance(kind, str):
            return
        number = event.get("sequence_number")
        if isinstance(number, int):
            self._number = number
        if form := _DELTAS.get(kind):
            if text := self._text(form, event):
                text.add(event.get("delta"))
        elif form := _TEXTS_DONE.get(kind):
            if text := self._text(form, event):
                text.put(event.get(form.member))
                text.is_said = True
        else:
            self._see_step(kind, event)

    def closing(self, usage: Tokens) -> list[JSON]:
        """The events that end it here; none where it has ended by itself."""
        if self.is_over:
            return []
        # SDKs take no event of a response that was not created.
        events: list[JSON] = [] if self._head else [{"type": "response.created", "response": _UNSEEN_RESPONSE}]
        items = sorted(self._items.items())
        for index, item in items:
            if not item.is_done:
                events += item.closing(index)
        response = {
            **(self._head or _UNSEEN_RESPONSE),
            "status": "incomplete",
            "incomplete_details": {"reason": "max_output_tokens"},
            "output": [item.now() for _, item in items],
            "usage": _response_usage(usage),
        }
        events.append({"type": "response.incomplete", "response": response})
        return _numbered(events, self._number + 1)

    def _see_step(self, kind: str, event: JSON) -> None:
        """Take note of an event that is no text: what opens and closes the response, an item or a part of one."""
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
        form = _FORMS_OF_PARTS.get(str(part.get("type")))
        if form and (text := self._text(form, event)):
            text.part = part
            text.is_said = text.is_closed = is_done
            text.put(part.get(form.member))

    def _text(self, form: _Form, event: JSON) -> _Text | None:
        """The text that an event speaks of; None where there is no such item. One that is done has said its last."""
        output_index = event.get("output_index")
        item = self._items.get(output_index) if isinstance(output_index, int) else None
        if item is None:
            return None
        index = event.get(form.index) if form.place else 0
        return item.text(form, index) if isinstance(index, int) else None


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
