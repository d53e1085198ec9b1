"""What of a request the model reads: its texts, and what costs tokens without being text.

A `Prompt` is told from the document alone, without counting a single token. Texts are handed on to be counted;
pictures and sounds have the set prices of OpenAI's documents, since their base64 is not read as text: a megabyte of
it would count as 680,000 tokens. Nothing here refuses anything, and no value of JSON is too strange for it: what we
don't know is taken for text, so that it is counted too high, not too low.

Sources: OpenAI's cookbook for what is added to each message, its documents of 2025 on vision and sound for the
prices. Neither is a promise; the upstream's own count goes before ours wherever there is one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from proxy.formats.images import Patches, Tiles, base64_start, image_price, image_size, price_by_area
from proxy.formats.strict_json import dump

# What the cookbook's chat format adds to each message, to a name, and once for the beginning of the answer.
_PER_MESSAGE = 3
_PER_NAME = 1
_PRIMING = 3
# What is not shown as text (encrypted reasoning, files) is estimated as prose would be.
_CHARACTERS_PER_TOKEN = 4
# One token is 100 ms of sound, and the leanest MP3 has 8 kbit/s: so no sound has fewer than 100 bytes to a token.
_SOUND_BYTES_PER_TOKEN = 100
# The context of gpt-4o-transcribe, which cuts a file of up to 25 MB into pieces: no sound has more to its piece.
_SOUND_TOKENS_MAX = 16_000
# A picture to be edited, at the highest fidelity: 6,240 tokens for what is kept of it, beside its tiles.
_FILED_PICTURE_TOKENS = 8192

_TEXT_FIELDS = ("system", "messages", "input", "prompt", "suffix", "instructions")
# What a model doesn't read. All other fields templates may write out, as JSON or about so: tools, schemas, documents,
# and what we have never heard of.
_UNREAD_FIELDS = frozenset(
    "model stream stream_options n n_cmpl best_of max_tokens max_completion_tokens max_output_tokens n_predict "
    "temperature top_p top_k min_p frequency_penalty presence_penalty repetition_penalty stop seed user metadata "
    "store safety_identifier logprobs top_logprobs logit_bias parallel_tool_calls tool_choice service_tier audio "
    "modalities encoding_format dimensions echo truncation include reasoning reasoning_effort thinking verbosity "
    "prediction prompt_cache_key background stop_sequences cache_control previous_response_id".split()
).union(_TEXT_FIELDS)
# No API's own names are longer, so one that is says something.
_NAME_CHARACTERS_MAX = 40
# Fields that stand for tokens which are not in the request. A template of the client's own may write any number, and
# vLLM makes pictures as large as it is told.
_OPEN_FIELDS = ("conversation", "web_search_options", "chat_template", "mm_processor_kwargs", "media_io_kwargs")
# Whose type may be left out at some servers.
_RUN_BY_CLIENT = ("function", "custom", None)
_CONTENTS = ("content", "output")
_UNREAD_IN_A_TURN = ("type", "id", "status")
_SAYS_SOMETHING = frozenset(("content", "tool_calls", "function_call", "refusal"))

# The kinds of parts that are not text, and the member by which some servers know them where `type` is left out.
_PICTURES = ("image_url", "input_image")
_SOUNDS = ("input_audio",)
_FILES = ("file", "input_file")
# Anthropic's blocks, of which none is known by a member: each says its type.
_BLOCKS = ("image", "document", "tool_result", "tool_use", "thinking", "redacted_thinking", "search_result")
# Those that have parts, into which no more than one level is read: no depth overflows the stack.
_HAS_PARTS = ("document", "tool_result", "tool_use", "search_result")
_UNSHOWN = ("signature", "data")
_UNREAD_IN_A_BLOCK = ("type", "cache_control", "citations", "is_error")
# What Anthropic tells its models about tools where a request has any: 159 to 804 tokens, by model.
_TOOLS_PROMPT = 804
_OPEN_PARTS = ("audio_url", "video_url", "input_video")
_MEMBERS = (*_PICTURES, *_SOUNDS, *_FILES, *_OPEN_PARTS)
_MEDIA = (*_MEMBERS, *_BLOCKS)
_NO_TEXT = frozenset(_MEMBERS)

# In so many pictures of a request the size is looked for behind more than the first bytes: decoding those takes 13 ms
# at worst, for which nobody else is served.
_JPEGS_MAX = 32


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model reads of one request, in texts and in tokens that are not text.

    `overhead` are tokens beside those of the texts: what is added to messages, tokens that came as numbers, media.
    `media_tokens` is the part of it that no text shows: the price of pictures and sounds, what a vendor says of
    tools, what is gone on from. `opaque_bytes` is what these take of the JSON. Where it `is_open` the model reads
    something that the request does not show, so nothing bounds it.
    """

    texts: tuple[str, ...] = ()
    overhead: int = 0
    opaque_bytes: int = 0
    media_tokens: int = 0
    is_open: bool = False

    def bound(self, body_bytes: int) -> int:
        """The most that the input can be, unless it is open, in a body of so many bytes.

        One token is at least one byte, and the JSON around a message outweighs what chat templates add.
        """
        return body_bytes - self.opaque_bytes + self.media_tokens


def read_prompt(document: Mapping[str, Any], *, model: str, is_chat: bool) -> Prompt:
    """What the upstream's `model` reads of a request. `is_chat`: as messages (/chat/completions, /responses)."""
    reading = _Reading(image_price(model))
    for name in _TEXT_FIELDS:
        reading.see_field(document.get(name), is_chat=is_chat)
    if any(isinstance(tool, dict) and "input_schema" in tool for tool in _list(document.get("tools"))):
        reading.price(_TOOLS_PROMPT)
    for name, value in document.items():
        if name not in _UNREAD_FIELDS:
            reading.see_json({name: value} if len(name) > _NAME_CHARACTERS_MAX else value)
    return Prompt(
        texts=tuple(reading.texts),
        overhead=reading.overhead + (_PRIMING if is_chat else 0),
        opaque_bytes=reading.opaque_bytes,
        media_tokens=reading.media_tokens,
        is_open=reading.is_open or _is_open(document),
    )


def with_files(prompt: Prompt, sizes: Sequence[int], *, are_audio: bool, context: int | None) -> Prompt:
    """The prompt of a form with files of these sizes: their bytes say nothing of pictures, and much of sounds."""
    if are_audio:
        tokens = sum(min(-(-size // _SOUND_BYTES_PER_TOKEN), context or _SOUND_TOKENS_MAX) for size in sizes)
    else:
        tokens = _FILED_PICTURE_TOKENS * len(sizes)
    return replace(
        prompt,
        overhead=prompt.overhead + tokens,
        opaque_bytes=prompt.opaque_bytes + sum(sizes),
        media_tokens=prompt.media_tokens + tokens,
    )


def with_previous(prompt: Prompt, tokens: int | None) -> Prompt:
    """The prompt of a request that goes on from a response of so many tokens in all; None: nobody knows how many."""
    if tokens is None:
        return replace(prompt, is_open=True)
    return replace(prompt, overhead=prompt.overhead + tokens, media_tokens=prompt.media_tokens + tokens)


def parts_of(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of all messages of a request, and of what tools gave back: texts, pictures, files.

    And the parts within these, at whatever depth; also where one stands alone, in no list or in no message.
    """
    found = [
        turn for name in ("messages", "input") for turn in _several(document.get(name)) if isinstance(turn, dict)
    ]
    for part in found:  # which grows meanwhile
        within = [*map(part.get, _CONTENTS), _member(part.get("source"), "content")]
        found += [inner for value in within for inner in _several(value) if isinstance(inner, dict)]
    return found


def _several(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def tools_of(document: Mapping[str, Any]) -> list[Any]:
    """The tools that a request offers: its own, those that come in by an item, and those within either."""
    found = _list(document.get("tools"))[:]
    for item in _list(document.get("input")):
        # The tools of `mcp_list_tools` are no offer but what a server once listed.
        found += _list(_member(item, "tools")) if _member(item, "type") != "mcp_list_tools" else ()
    for tool in found:  # which grows meanwhile
        found += _list(_member(tool, "tools"))
    return found


def is_run_by_client(tool: object) -> bool:
    """Whether the client runs a tool itself, and the request shows all that the model reads of it.

    So it is with a search among tools that the client makes; one that the upstream makes reads what it likes. A
    namespace only names a group of others, each of which is asked for by itself.
    """
    kind = _member(tool, "type")
    is_search = kind == "tool_search" and _member(tool, "execution") == "client"
    is_group = kind == "namespace" and isinstance(_member(tool, "tools"), list)
    return isinstance(tool, dict) and (kind in _RUN_BY_CLIENT or is_search or is_group)


def _member(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None


def _is_open(document: Mapping[str, Any]) -> bool:
    if any(document.get(name) not in (None, False) for name in _OPEN_FIELDS):
        return True
    if isinstance(document.get("prompt"), dict):  # a template that is stored at the upstream
        return True
    return not all(map(is_run_by_client, tools_of(document)))


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


class _Reading:
    """What has been found so far, while a request is walked through."""

    def __init__(self, pictures: Tiles | Patches) -> None:
        self.texts: list[str] = []
        self.overhead = self.opaque_bytes = self.media_tokens = 0
        self.is_open = False
        self._pictures = pictures
        self._pictures_seen = 0

    def see_field(self, value: object, *, is_chat: bool) -> None:
        """Read a field of texts: one of them, or a list of texts, of messages, or of tokens as numbers."""
        if not isinstance(value, list):
            self.see(value)
            self.overhead += _PER_MESSAGE if is_chat and value is not None else 0
            return
        self.overhead += _numbers_in(value)
        for turn in value:
            if isinstance(turn, dict):
                self._see_turn(turn)
            else:
                self.see(turn)

    def see_json(self, value: object) -> None:
        """Read a value that the model gets to see as JSON."""
        if value:
            self.texts.append(dump(value).decode())

    def see(self, value: object) -> None:
        """Take every string in it for text, and every whole number in a list for a token."""
        waiting = [value]  # not recursive: no depth overflows the stack
        while waiting:
            value = waiting.pop()
            if isinstance(value, str):
                if value:
                    self.texts.append(value)
            elif isinstance(value, list):
                self.overhead += _numbers_in(value)
                waiting += reversed(value)
            elif isinstance(value, dict):
                waiting += [_as_text(key, inner) for key, inner in reversed(value.items()) if key != "type"]
                self.texts += [key for key in value if len(key) > _NAME_CHARACTERS_MAX]

    def _see_turn(self, turn: dict[str, Any]) -> None:
        """Read a message, or another item of a conversation: a call of a tool, what it gave back."""
        if _kind(turn) in _MEDIA:
            self._see_part(turn)
            return
        self.overhead += _PER_MESSAGE + (_PER_NAME if isinstance(turn.get("name"), str) else 0)
        self.is_open = self.is_open or _is_reference(turn)
        for key, value in turn.items():
            if key in _CONTENTS:
                for part in value if isinstance(value, list) else [value]:
                    self._see_part(part)
            elif key == "encrypted_content":
                self._see_unshown(value)
            elif key not in _UNREAD_IN_A_TURN:
                # The ids of tool calls are read: some templates write them out.
                self.see(_as_text(key, value))

    def _see_part(self, part: object) -> None:
        kind = _kind(part) if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind not in _MEDIA:
            self.see(part)
        elif kind in _PICTURES:
            self._see_picture(part)
        elif kind in _SOUNDS:
            self._see_sound(part)
        elif kind in _FILES:
            self._see_file(part)
        elif kind in _BLOCKS:
            self._see_block(part)
        else:
            self.is_open = True
            self._see_unshown(part)

    def _see_picture(self, part: dict[str, Any]) -> None:
        inner = part.get("image_url")
        image = inner if isinstance(inner, dict) else {"url": inner, "detail": part.get("detail")}
        url, size = image.get("url"), None
        if not isinstance(url, str):
            self.see(inner)
        elif start := base64_start(url):
            self._pictures_seen += 1
            size = image_size(url, start, is_searched=self._pictures_seen <= _JPEGS_MAX)
            self._leave_out(url, part)
        self.price(self._pictures.price(size, is_low=image.get("detail") == "low"))
        self.is_open = self.is_open or bool(part.get("file_id"))

    def _see_sound(self, part: dict[str, Any]) -> None:
        data = _member(part.get("input_audio"), "data")
        if not isinstance(data, str):
            self.see(part)
            return
        self.price(-(-len(data) * 3 // (4 * _SOUND_BYTES_PER_TOKEN)))
        self._leave_out(data, part)

    def _see_file(self, part: dict[str, Any]) -> None:
        """Read a file: of one that is no plain text the model gets pictures of its pages too, so it is open."""
        inner = part.get("file")
        file = inner if isinstance(inner, dict) else part
        for key, value in file.items():
            if key == "file_data":
                self._see_unshown(value)
            elif key not in ("type", "file_url"):
                self.see(value)
        data = file.get("file_data")
        is_plain = isinstance(data, str) and data.startswith("data:text/") and not file.get("file_url")
        self.is_open = self.is_open or not is_plain or bool(file.get("file_id"))

    def _see_block(self, block: dict[str, Any]) -> None:
        """Read one of Anthropic's blocks, and what is within it; what is within that is taken for text."""
        source = block.get("source")
        for key, value in block.items():
            if key == "source" and isinstance(value, dict):
                self._see_source(block, value)
            elif key == "content":
                self._see_inner(value)
            elif key == "input":
                self.see_json(value)
            elif key in _UNSHOWN:
                self._see_unshown(value)
            elif key not in _UNREAD_IN_A_BLOCK:
                self.see(value)
        # A picture that we know nothing of is as large as there are any.
        if block["type"] == "image" and not isinstance(source, dict):
            self.price(price_by_area(None))

    def _see_source(self, block: Mapping[str, Any], source: Mapping[str, Any]) -> None:
        """Read a picture, or a document: of one that is no plain text the model gets pictures of its pages too."""
        data, kind = source.get("data"), source.get("type")
        if block["type"] == "image":
            self._pictures_seen += 1
            is_searched = self._pictures_seen <= _JPEGS_MAX
            size = image_size(data, 0, is_searched=is_searched) if isinstance(data, str) else None
            self.price(price_by_area(size))
            self._leave_out(data if isinstance(data, str) else "", block)
        elif kind == "text":
            self.see(data)
        elif kind == "content":
            self._see_inner(source.get("content"))
        else:
            self._see_unshown(data)
            self.is_open = True
        self.is_open = self.is_open or bool(source.get("file_id"))

    def _see_inner(self, content: object) -> None:
        for part in content if isinstance(content, list) else [content]:
            is_plain = isinstance(part, dict) and _kind(part) in _HAS_PARTS
            self.see(part) if is_plain else self._see_part(part)

    def _see_unshown(self, value: object) -> None:
        """Estimate what is in the request but not as the model reads it. Its bytes stay part of the bound."""
        self.overhead += -(-_characters_in(value) // _CHARACTERS_PER_TOKEN)

    def _leave_out(self, base64: str, part: Mapping[str, Any]) -> None:
        """Don't count base64 as text, where the part leaves no doubt that it is none."""
        if part.get("type") is not None:
            self.opaque_bytes += len(base64)

    def price(self, tokens: int) -> None:
        """Add what costs so many tokens without being text."""
        self.overhead += tokens
        self.media_tokens += tokens


def _kind(part: Mapping[str, Any]) -> object:
    kind = part.get("type")
    if kind is not None or _NO_TEXT.isdisjoint(part):
        return kind
    return next(member for member in _MEMBERS if member in part)


def _is_reference(turn: Mapping[str, Any]) -> bool:
    """Whether a turn stands for one that is stored at the upstream. A reference need not say its type."""
    kind, sound = turn.get("type"), turn.get("audio")
    is_bare = kind is None and _SAYS_SOMETHING.isdisjoint(turn)
    return is_bare or kind == "item_reference" or (isinstance(sound, dict) and "id" in sound)


def _as_text(key: str, value: object) -> object:
    """Arguments of a tool call that came as an object: templates write them out as JSON."""
    return dump(value).decode() if key == "arguments" and not isinstance(value, str) else value


def _numbers_in(value: list[Any]) -> int:
    return sum(type(inner) is int for inner in value)


def _characters_in(value: object) -> int:
    if value is None:
        return 0
    return len(value) if isinstance(value, str) else len(dump(value))
