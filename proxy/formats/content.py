"""What the model reads of a request: the texts, and the input that costs tokens but is not text.

`read_prompt` finds both from the parsed body, without counting a token. Texts are returned for the tokenizer. Images
and audio are priced by the vendors' published rules, because their base64 is not read as text: a megabyte of it would
count as 680,000 tokens. Nothing is refused here, and a value of any shape is accepted: what the proxy does not know
is taken as text, so it is counted too high and not too low.

Sources: OpenAI's cookbook ("How to count tokens with tiktoken") for the tokens around messages; OpenAI's and
Anthropic's documents of 2025 on vision and audio for prices. Neither is a promise, so the upstream's own count is
used instead wherever there is one. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from proxy.formats.body import RequestBody, Turns, is_run_by_client
from proxy.formats.images import base64_start, image_price, image_size, price_by_area
from proxy.formats.kinds import CHOICE_COUNT_FIELDS, MAXIMUM_FIELDS
from proxy.formats.strict_json import dump, plain_name
from proxy.policy.amounts import TOKENS_MAX

# The cookbook's tokens around a chat: for each message, for each name, and once for the beginning of the answer.
# One user message "Hi" is 3 + role (1) + text (1) + 3 = 8 tokens.
_PER_MESSAGE = 3
_PER_NAME = 1
_REPLY_PRIMING = 3
# Encrypted reasoning and files are not in the request as the model reads them. They are estimated like English prose.
_CHARACTERS_PER_TOKEN = 4
# One token of audio is 100 ms. The leanest MP3 has 8 kbit/s, which is 100 bytes in 100 ms. Every other file has more
# bytes for a token, so its size divided by 100 is never too low.
_AUDIO_BYTES_PER_TOKEN = 100
# An uploaded recording is at most 25 MB, which would be 250,000 tokens by its size. gpt-4o-transcribe cuts a
# recording into pieces that fit its context of 16,000 tokens, so no more than this is reserved for a file.
_AUDIO_FILE_TOKENS_MAX = 16_000
# An uploaded image that is edited with the highest fidelity costs 6,240 tokens and its tiles (OpenAI, gpt-image-1).
_UPLOADED_IMAGE_TOKENS = 8192
# Anthropic adds a system prompt if a request has tools: 159 to 804 tokens, by model. It has no bytes in the request.
_ANTHROPIC_TOOLS_PROMPT_TOKENS = 804

# Fields whose values are texts, messages or lists of token numbers.
_TEXT_FIELDS = ("system", "messages", "input", "prompt", "suffix", "instructions")
# Fields that the model does not read.
_OPTIONS = frozenset(
    "model stream stream_options best_of "
    "temperature top_p top_k min_p frequency_penalty presence_penalty repetition_penalty stop seed user metadata "
    "store safety_identifier logprobs top_logprobs logit_bias parallel_tool_calls tool_choice service_tier audio "
    "modalities encoding_format dimensions echo truncation include reasoning reasoning_effort thinking verbosity "
    "prediction prompt_cache_key background stop_sequences cache_control previous_response_id".split()
).union(MAXIMUM_FIELDS, CHOICE_COUNT_FIELDS)
# Those, and the fields above. Every other field is counted as JSON, because a chat template may print it: tools,
# schemas, documents, and fields that the proxy does not know.
_NOT_PRINTED = _OPTIONS.union(_TEXT_FIELDS)
# Texts and lists of /rerank and /score that the model does not read. Numbers and flags are never read.
_OPTIONS_OF_PAIRS = _OPTIONS.union(("rank_fields", "truncate", "truncation_direction", "truncation_side"))
# Names of queries. Several parts of one are read with each document.
_QUERIES = ("query", "queries", "data1", "text1")
# Around each pair of a query and a document: `<s> query </s></s> document </s>`.
_PER_PAIR = 4
# A key that is longer than any name in the vendors' APIs is counted as text: a prompt can also be written into keys.
_KEY_CHARACTERS_MAX = 40
# Fields that stand for input which is not in the request. A client's own `chat_template` can print any number of
# tokens; vLLM's other two fields set the size of images and the number of video frames.
_HIDDEN_INPUT_FIELDS = frozenset(
    "conversation web_search_options chat_template mm_processor_kwargs media_io_kwargs".split()
)
_FIELDS_WITH_HIDDEN_INPUT = _HIDDEN_INPUT_FIELDS | {"prompt"}
# Messages, and items of /responses. An id of a tool call is read: some chat templates print it.
_CONTENT_FIELDS = ("content", "output")
_MESSAGE_FIELDS_NOT_READ = ("type", "id", "status")
# Members of messages and items that are no other spelling of those.
_USUAL_MESSAGE_FIELDS = frozenset(
    "role content output name type id status tool_calls tool_call_id call_id arguments refusal summary phase "
    "encrypted_content".split()
)
# The members of a part that is plain text.
_KEYS_OF_TEXTS = {"type", "text"}
# A message without a type and without any of these has nothing but an id: it refers to a stored one.
_MESSAGE_BODY_FIELDS = frozenset(("content", "tool_calls", "function_call", "refusal"))

# Types of parts that are not plain text.
_IMAGE_TYPES = ("image_url", "input_image")
_AUDIO_TYPES = ("input_audio",)
_FILE_TYPES = ("file", "input_file")
# Links to audio and video of any length.
_LINKED_TYPES = ("audio_url", "video_url", "input_video")
# Some servers accept a part of these types without `type`, if it has a member of that name:
# {"image_url": {"url": …}}.
_TYPES_BY_MEMBER = (*_IMAGE_TYPES, *_AUDIO_TYPES, *_FILE_TYPES, *_LINKED_TYPES)
_MEMBERS_OF_TYPES = frozenset(_TYPES_BY_MEMBER)
# Anthropic's content blocks always state their type.
_BLOCK_TYPES = ("image", "document", "tool_result", "tool_use", "thinking", "redacted_thinking", "search_result")
_SPECIAL_TYPES = frozenset((*_TYPES_BY_MEMBER, *_BLOCK_TYPES))
# Blocks that contain other blocks. One level is read block by block, and everything below as text. So the functions
# here call each other to a fixed depth, and no input overflows the stack.
_BLOCKS_WITH_PARTS = ("document", "tool_result", "tool_use", "search_result")
# A signature and the data of `redacted_thinking` contain encrypted reasoning.
_ENCRYPTED_BLOCK_FIELDS = ("signature", "data")
_BLOCK_FIELDS_NOT_READ = ("type", "cache_control", "citations", "is_error")

# Members that decide what a part is. Below another spelling of them a server may find content that is not text.
_NAMES_OF_PARTS = frozenset((*_TYPES_BY_MEMBER, "type", "source", "content"))
_PLAIN_NAMES_OF_PARTS = frozenset(map(plain_name, _NAMES_OF_PARTS))

# This many images of a request may be decoded beyond their first bytes to find their size. All of them together block
# the event loop for 13 ms at worst.
_SEARCHED_IMAGES_MAX = 32


@dataclass(slots=True)
class Prompt:
    """What the model reads of one request: texts, and tokens that are not text. Nothing changes it.

    `overhead` is all tokens beside those of the texts: those around messages, tokens that came as numbers, media.
    `media_tokens` is the part of `overhead` that has no text in the request: images, audio, Anthropic's system prompt
    for tools, the previous response. `opaque_bytes` is how many bytes of the JSON are base64 of these images and
    audio. If `has_hidden_input`, the model reads something that the request does not show, so nothing bounds the
    input. `images` are those whose price depends on the model and is not in `overhead` yet: their width and height if
    known, and whether `detail` is low. `repeated` are those of the texts that the model reads `repeats` more times: a
    query, which it reads with each of the documents.
    """

    texts: tuple[str, ...] = ()
    overhead: int = 0
    opaque_bytes: int = 0
    media_tokens: int = 0
    has_hidden_input: bool = False
    images: tuple[tuple[tuple[int, int] | None, bool], ...] = ()
    repeated: tuple[str, ...] = ()
    repeats: int = 0

    def text_bytes(self, body_bytes: int) -> int:
        """How many bytes the model reads as text, at most, of a body of `body_bytes` bytes."""
        repeated = sum(len(text.encode("utf-8", "surrogatepass")) for text in self.repeated) if self.repeats else 0
        return body_bytes - self.opaque_bytes + self.repeats * repeated

    def bound(self, body_bytes: int) -> int:
        """The most tokens that the visible input can have, in a body of `body_bytes` bytes.

        One token is at least one byte of text, and the JSON around a message (`{"role":"user","content":""}`, 28
        bytes) is longer than what chat templates add to it. Base64 is exchanged for the price of its image: a body of
        1,000,300 bytes, of which 1,000,000 are an image of 1024 × 1024 for gpt-4o, has at most 300 + 765 tokens.
        """
        return min(self.text_bytes(body_bytes) + self.media_tokens, TOKENS_MAX)


def read_prompt(body: RequestBody, *, is_chat: bool) -> Prompt:
    """Find what a model reads of a request's body. The images are not priced: see `with_images`.

    `is_chat`: the input is messages (/chat/completions, /responses, /messages), which have tokens of their own around
    them.
    """
    reader = _PromptReader()
    document, turns = body.document, body.turns
    for name in _TEXT_FIELDS:
        if name in turns:
            reader.read_turns(turns[name])
        elif name in document:
            reader.read_field(document[name], is_chat=is_chat)
    if body.tools or not _FIELDS_WITH_HIDDEN_INPUT.isdisjoint(document):
        reader.has_hidden_input |= _has_hidden_input(body)
        # Tools with an `input_schema` are Anthropic's; OpenAI's have `parameters`.
        if any(isinstance(tool, dict) and "input_schema" in tool for tool in body.tools):
            reader.add_media_tokens(_ANTHROPIC_TOOLS_PROMPT_TOKENS)
    if not _NOT_PRINTED.issuperset(document):
        for name, value in document.items():
            if name not in _NOT_PRINTED:
                reader.add_json({name: value} if len(name) > _KEY_CHARACTERS_MAX else value)
    return Prompt(
        texts=tuple(reader.texts),
        overhead=reader.overhead + (_REPLY_PRIMING if is_chat else 0),
        opaque_bytes=reader.opaque_bytes,
        media_tokens=reader.media_tokens,
        has_hidden_input=reader.has_hidden_input,
        images=tuple(reader.images),
    )


def read_pairs(body: RequestBody) -> Prompt:
    """Find what a model reads of a request to rerank or to score: each document together with the query.

    Vendors have many names for both (`documents`, `texts`, `text_2`, `items`; `query`, `text_1`, `queries`), and more
    come. So a list of several values is taken for documents, whatever its name, and every other text for one that is
    read with each of them. Two lists of the same length are pairs, of which each value is read once:

        {"query": "a b", "documents": ["c", "d", "e"]}      "a b" three times, c, d and e
        {"text_1": ["a", "b"], "text_2": ["c", "d"]}        a, b, c and d
    """
    once, again, pairs = _PromptReader(), _PromptReader(), 1
    for name, value in body.document.items():
        if name in _OPTIONS_OF_PAIRS:
            continue
        if plain_name(name) not in _QUERIES and isinstance(value, dict) and isinstance(value.get("content"), list):
            value = value["content"]  # vLLM: `documents` as one message, each part of which may be a document
        values = _as_list(value)
        pairs = max(pairs, len(values))
        reader = again if len(values) == 1 else once
        if len(name) > _KEY_CHARACTERS_MAX:
            again.add_texts(name)
        for each in values:
            reader.read_document(each)
    tokens = _PER_PAIR * pairs
    return Prompt(
        texts=(*again.texts, *once.texts),
        overhead=once.overhead + pairs * again.overhead + tokens,
        opaque_bytes=once.opaque_bytes + again.opaque_bytes,
        media_tokens=once.media_tokens + pairs * again.media_tokens + tokens,
        # A picture in a query is read with each document. It is priced once, so the rest is hidden.
        has_hidden_input=once.has_hidden_input
        or again.has_hidden_input
        or bool(again.images and pairs > 1)
        or _has_hidden_input(body),
        images=(*again.images, *once.images),
        repeated=tuple(again.texts),
        repeats=pairs - 1,
    )


def with_images(prompt: Prompt, *, model: str) -> Prompt:
    """The prompt with the prices of its images at this model, which is the upstream's name of it.

    A request is read once, and priced for each model that it may be sent to.
    """
    price = image_price(model).price
    tokens = sum(price(size, is_low=is_low) for size, is_low in prompt.images)
    return replace(prompt, images=(), overhead=prompt.overhead + tokens, media_tokens=prompt.media_tokens + tokens)


def with_files(prompt: Prompt, sizes: Sequence[int], *, are_audio: bool, context: int | None) -> Prompt:
    """The prompt of a form, with its uploaded files added; `sizes` are in bytes, `context` is the model's in tokens.

    The size of an image file says nothing about its price, so each costs the same. Audio is priced by its size:
    1,000,001 bytes are 10,001 tokens.
    """
    if are_audio:
        tokens = sum(min(-(-size // _AUDIO_BYTES_PER_TOKEN), context or _AUDIO_FILE_TOKENS_MAX) for size in sizes)
    else:
        tokens = _UPLOADED_IMAGE_TOKENS * len(sizes)
    return replace(
        prompt,
        overhead=prompt.overhead + tokens,
        opaque_bytes=prompt.opaque_bytes + sum(sizes),
        media_tokens=prompt.media_tokens + tokens,
    )


def with_previous(prompt: Prompt, tokens: int | None) -> Prompt:
    """The prompt of a request with `previous_response_id`, whose previous response used `tokens` in total.

    None: the total is unknown, so nothing bounds the input.
    """
    if tokens is None:
        return replace(prompt, has_hidden_input=True)
    return replace(prompt, overhead=prompt.overhead + tokens, media_tokens=prompt.media_tokens + tokens)


def _has_hidden_input(body: RequestBody) -> bool:
    """Whether a field or a tool makes the model read something that the request does not show."""
    document = body.document
    return (
        any(document.get(name) not in (None, False) for name in _HIDDEN_INPUT_FIELDS)
        or isinstance(document.get("prompt"), dict)  # a prompt template that is stored at the upstream
        or not all(map(is_run_by_client, body.tools))
    )


class _PromptReader:
    """Collects the values of a `Prompt` while a request is read; the attributes mean the same as there.

    The methods `read_…` know the shape of a field, a message, a part or a block. The methods `add_…` add a value.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.images: list[tuple[tuple[int, int] | None, bool]] = []
        self.overhead = self.opaque_bytes = self.media_tokens = 0
        self.has_hidden_input = False
        self._images_sized = 0

    def read_field(self, value: object, *, is_chat: bool) -> None:
        """Read a field of texts: a single text, or a list of texts, of messages, or of token numbers."""
        if isinstance(value, dict) and is_chat:  # a message that is not in a list
            self._read_message(value)
            return
        if not isinstance(value, list):
            self.add_texts(value)
            # A single text is a message of its own on /responses, and so are its instructions.
            self.overhead += _PER_MESSAGE if is_chat and value is not None else 0
            return
        self.overhead += _integers_in(value)
        for turn in value:
            if isinstance(turn, dict):
                self._read_message(turn)
            else:
                self.add_texts(turn)

    def read_turns(self, turns: Turns) -> None:
        """Read a list of messages or items; the same as `read_field`, after the walk over them."""
        self.overhead += _PER_MESSAGE * turns.plain
        if not turns.unusual:
            self.texts += turns.reading  # type: ignore[arg-type]  # they are all texts then
            return
        self.overhead += _integers_in(turns.unusual)
        for value in turns.reading:
            if type(value) is str:
                self.texts.append(value)
            elif type(value) is dict:
                self._read_message(value)
            elif type(value) is list:
                # Lenient servers may find messages in a list within the list. Numbers are tokens of embeddings.
                self.add_texts(value)
                self.has_hidden_input |= any(isinstance(inner, dict | list) for inner in value)

    def read_document(self, value: object) -> None:
        """Read a document or a query: a text, or an object with texts, with parts, or with an image."""
        if not isinstance(value, dict):
            self.add_texts(value)
        elif "content" in value:
            self._read_message(value)
        else:
            self._read_part(value)
            self.has_hidden_input |= "image" in value  # Jina: a link or base64, of any size

    def add_json(self, value: object) -> None:
        """Add a value that the model sees as JSON."""
        if value:
            self.texts.append(dump(value).decode())

    def add_texts(self, value: object) -> None:
        """Take every string below a value as text, and every integer in a list as one token."""
        pending = [value]
        while pending:  # not recursive, so no depth overflows the stack
            value = pending.pop()
            if isinstance(value, str):
                if value:
                    self.texts.append(value)
            elif isinstance(value, list):
                self.overhead += _integers_in(value)
                pending += reversed(value)
            elif isinstance(value, dict):
                inside = []
                for key, inner in value.items():
                    if len(key) > _KEY_CHARACTERS_MAX:
                        self.texts.append(key)
                    if key != "type":
                        inside.append(inner if key != "arguments" else _as_printed(key, inner))
                pending += reversed(inside)

    def add_media_tokens(self, tokens: int) -> None:
        """Add tokens of something that has no text in the request."""
        self.overhead += tokens
        self.media_tokens += tokens

    def _add_encoded(self, value: object) -> None:
        """Estimate content that the model reads in another form. Its bytes stay part of the bound."""
        self.overhead += -(-_characters_in(value) // _CHARACTERS_PER_TOKEN)

    def _exclude_base64(self, base64: str, part: Mapping[str, Any]) -> None:
        """Take base64 out of the byte bound, but only if the part states its type.

        A server that requires a type would read a part without one as text.
        """
        if part.get("type") is not None:
            self.opaque_bytes += len(base64)

    def _read_message(self, turn: dict[str, Any]) -> None:
        """Read a message, or another item of /responses such as a tool call or its output."""
        if _is_special(_part_type(turn)):  # a part that is not inside a message
            self._read_part(turn)
            return
        self.overhead += _PER_MESSAGE + (_PER_NAME if isinstance(turn.get("name"), str) else 0)
        self.has_hidden_input = self.has_hidden_input or _refers_to_stored_turn(turn)
        for key, value in turn.items():
            if key not in _USUAL_MESSAGE_FIELDS:  # `Content`, which some servers read
                self.has_hidden_input |= plain_name(key) in _CONTENT_FIELDS
            if key in _MESSAGE_FIELDS_NOT_READ:
                continue
            if key == "encrypted_content":
                self._add_encoded(value)
            elif type(value) is str:
                if value:
                    self.texts.append(value)
            elif key in _CONTENT_FIELDS:
                self._read_content(value)
            else:
                self.add_texts(_as_printed(key, value))

    def _read_content(self, content: object) -> None:
        for part in _as_list(content):
            if type(part) is dict and part.get("type") == "text" and part.keys() == _KEYS_OF_TEXTS:
                self.add_texts(part["text"])  # most parts, without a closer look
            else:
                self._read_part(part)

    def _read_part(self, part: object) -> None:
        kind = _part_type(part) if isinstance(part, dict) else None
        if not isinstance(part, dict):
            self.add_texts(part)
            self.has_hidden_input |= isinstance(part, list)
        elif not _is_special(kind):
            self.add_texts(part)
            self.has_hidden_input |= any(_is_other_spelling(key) for key in part)
        elif kind in _IMAGE_TYPES:
            self._read_image(part)
        elif kind in _AUDIO_TYPES:
            self._read_audio(part)
        elif kind in _FILE_TYPES:
            self._read_file(part)
        elif kind in _BLOCK_TYPES:
            self._read_block(part)
        else:
            self.has_hidden_input = True
            self._add_encoded(part)

    def _read_image(self, part: dict[str, Any]) -> None:
        # Chat has {"image_url": {"url": …, "detail": …}}, /responses has both in the part itself.
        inner = part.get("image_url")
        image = inner if isinstance(inner, dict) else {"url": inner, "detail": part.get("detail")}
        url, size = image.get("url"), None
        if not isinstance(url, str):
            self.add_texts(inner)
        elif start := base64_start(url):
            size = self._image_size(url, start)
            self._exclude_base64(url, part)
        # An image behind a link has the highest price. The proxy never fetches it.
        self.images.append((size, image.get("detail") == "low"))
        # Of a list nothing says how many images a server finds in it.
        self.has_hidden_input = self.has_hidden_input or bool(part.get("file_id")) or isinstance(inner, list)

    def _read_audio(self, part: dict[str, Any]) -> None:
        data = _get(part.get("input_audio"), "data")
        if not isinstance(data, str):
            self.add_texts(part)
            self.has_hidden_input |= isinstance(part.get("input_audio"), list)
            return
        # Four characters of base64 are three bytes: 40,000 characters are 30,000 bytes and 300 tokens.
        self.add_media_tokens(-(-len(data) * 3 // (4 * _AUDIO_BYTES_PER_TOKEN)))
        self._exclude_base64(data, part)

    def _read_file(self, part: dict[str, Any]) -> None:
        """Read a file. If it is not plain text, the model also sees its pages as images, so nothing bounds it."""
        inner = part.get("file")
        file = inner if isinstance(inner, dict) else part
        for key, value in file.items():
            if key == "file_data":
                self._add_encoded(value)
            elif key not in ("type", "file_url"):
                self.add_texts(value)
        data = file.get("file_data")
        is_plain_text = isinstance(data, str) and data.startswith("data:text/") and not file.get("file_url")
        self.has_hidden_input = self.has_hidden_input or not is_plain_text or bool(file.get("file_id"))

    def _read_block(self, block: dict[str, Any]) -> None:
        """Read one of Anthropic's content blocks and the blocks inside it."""
        source = block.get("source")
        for key, value in block.items():
            if key == "source" and isinstance(value, dict):
                self._read_source(block, value)
            elif key == "content":
                self._read_inner_parts(value)
            elif key == "input":
                self.add_json(value)
            elif key in _ENCRYPTED_BLOCK_FIELDS:
                self._add_encoded(value)
            elif key not in _BLOCK_FIELDS_NOT_READ:
                self.add_texts(value)
        if block["type"] == "image" and not isinstance(source, dict):
            self.add_media_tokens(price_by_area(None))
        self.has_hidden_input |= isinstance(source, list) or any(_is_other_spelling(key) for key in block)

    def _read_source(self, block: Mapping[str, Any], source: Mapping[str, Any]) -> None:
        """Read the source of an image or a document. If a document is not plain text, nothing bounds it."""
        data, kind = source.get("data"), source.get("type")
        if block["type"] == "image":
            base64 = data if isinstance(data, str) else ""
            self.add_media_tokens(price_by_area(self._image_size(base64, 0)))
            self._exclude_base64(base64, block)
        elif kind == "text":
            self.add_texts(data)
        elif kind == "content":
            self._read_inner_parts(source.get("content"))
        else:
            self._add_encoded(data)
            self.has_hidden_input = True
        self.has_hidden_input = self.has_hidden_input or bool(source.get("file_id"))

    def _read_inner_parts(self, content: object) -> None:
        for part in _as_list(content):
            # See _BLOCKS_WITH_PARTS: a block inside a block is text from here on.
            is_container = isinstance(part, dict) and _part_type(part) in _BLOCKS_WITH_PARTS
            self.add_texts(part) if is_container else self._read_part(part)

    def _image_size(self, data: str, start: int) -> tuple[int, int] | None:
        self._images_sized += 1
        return image_size(data, start, is_searched=self._images_sized <= _SEARCHED_IMAGES_MAX)


def _part_type(part: Mapping[str, Any]) -> object:
    """The type of a part: as stated, else by the member that some servers recognise it by, else None."""
    kind = part.get("type")
    if kind is not None or _MEMBERS_OF_TYPES.isdisjoint(part):
        return kind
    return next(member for member in _TYPES_BY_MEMBER if member in part)


def _is_other_spelling(key: str) -> bool:
    """Whether a server that ignores case may find a part's type or its content below this key."""
    return key not in _NAMES_OF_PARTS and plain_name(key) in _PLAIN_NAMES_OF_PARTS


def _is_special(kind: object) -> bool:
    return isinstance(kind, str) and kind in _SPECIAL_TYPES  # a list or an object as type can't be looked up in a set


def _refers_to_stored_turn(turn: Mapping[str, Any]) -> bool:
    """Whether a message or item refers to one that is stored at the upstream. A reference need not state its type.

    Examples: {"id": "msg_1"}; {"type": "item_reference", "id": "msg_1"}; a chat message with
    {"audio": {"id": "audio_1"}}, which refers to an earlier answer in audio.
    """
    kind, audio = turn.get("type"), turn.get("audio")
    is_bare = kind is None and _MESSAGE_BODY_FIELDS.isdisjoint(turn)
    return is_bare or kind == "item_reference" or (isinstance(audio, dict) and "id" in audio)


def _as_printed(key: str, value: object) -> object:
    """Arguments of a tool call that a client sent as an object become JSON, as chat templates print them."""
    return dump(value).decode() if key == "arguments" and not isinstance(value, str) else value


def _get(value: object, name: str) -> object:
    """The member of an object; None for any other value."""
    return value.get(name) if isinstance(value, dict) else None


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _integers_in(value: list[Any]) -> int:
    return list(map(type, value)).count(int)  # not isinstance: true and false are no tokens


def _characters_in(value: object) -> int:
    if value is None:
        return 0
    return len(value) if isinstance(value, str) else len(dump(value))
