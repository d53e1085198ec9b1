"""What the simulated upstream will say to a call: the call read the way OpenAI reads it, and the words of the answer.

An answer follows from the seed and the prompt alone: the same question gets the same words, whole or streamed, and a
smaller maximum gets the beginning of them. One word is one token, so the words of an answer are its output tokens.
The input is counted by a rule as plain: every word of its texts (`content`, `text`, `instructions`) is a token, so is
every token id, and a message costs three more. So an input never has more tokens than the JSON body has bytes.

Pure: no sockets, no clock. It stands in for other people's servers, so it shares nothing with the modules that read
their answers, and can't hide a mistake of theirs.
"""

import random
import zlib
from array import array
from dataclasses import dataclass
from enum import Enum
from typing import Any

import orjson

from proxy.simulator.directives import NO_DIRECTIONS, Complaint, Directions

JSON = dict[str, Any]

VOCABULARY = (
    b"the a an of to in and or but with from over under between before after while until because so each every one "
    b"two small large quiet bright early late old new green river mountain window garden letter station bridge lamp "
    b"paper table morning evening winter summer train boat road field stone bird cloud music story answer question "
    b"moves waits opens closes carries follows turns remains begins ends shows finds keeps gives counts reads writes"
).split()
SCROLL_WORDS = 4096

TOKENS_PER_MESSAGE = 3
CHOICES_MAX = 128
COMPLETIONS_MAXIMUM = 16  # what OpenAI takes where a call to /completions says nothing
DIMENSIONS = 1536


class Endpoint(Enum):
    """What can be asked, with the field of its input and those of its maximum."""

    CHAT = ("messages", ("max_completion_tokens", "max_tokens"))
    COMPLETIONS = ("prompt", ("max_tokens",))
    RESPONSES = ("input", ("max_output_tokens",))
    EMBEDDINGS = ("input", ())
    MESSAGES = ("messages", ("max_tokens",))

    def __init__(self, input_field: str, maximum_fields: tuple[str, ...]) -> None:
        self.input_field = input_field
        self.maximum_fields = maximum_fields


@dataclass(frozen=True, slots=True)
class Choice:
    """The words of one choice, and whether the maximum ended it."""

    words: list[bytes]
    is_cut_short: bool

    @property
    def text(self) -> str:
        return b" ".join(self.words).decode()

    @property
    def finish_reason(self) -> str:
        return "length" if self.is_cut_short else "stop"


@dataclass(frozen=True, slots=True)
class Tool:
    """What an answer may call in place of saying its words, which are then the one argument."""

    name: str
    argument: str

    @property
    def opening(self) -> str:
        """The JSON of the arguments, as far as the words."""
        return orjson.dumps({self.argument: ""}).decode().removesuffix(self.closing)

    @property
    def closing(self) -> str:
        """And what comes after them."""
        return '"}'

    def arguments(self, choice: Choice) -> str:
        """The whole of it."""
        return self.opening + choice.text + self.closing


@dataclass(frozen=True, slots=True)
class Script:
    """One call as read, and all that will be said to it."""

    endpoint: Endpoint
    asked: JSON
    directions: Directions
    maximum: int | None
    choices: tuple[Choice, ...]
    vectors: "tuple[array[float], ...]"
    input_tokens: int
    output_tokens: int

    @property
    def reported(self) -> tuple[int, int]:
        """Input and output tokens as the usage will say them."""
        return (0, 0) if self.directions.usage_zero else (self.input_tokens, self.output_tokens)

    @property
    def is_streamed(self) -> bool:
        return self.asked.get("stream") is True and self.endpoint is not Endpoint.EMBEDDINGS

    @property
    def tool(self) -> Tool | None:
        """What the answer calls where it is directed to: the first tool that was offered."""
        offered = self.asked.get("tools")
        if not self.directions.tool or not offered:
            return None
        tool = offered[0].get("function", offered[0])
        shape = tool.get("parameters") or tool.get("input_schema") or {}
        return Tool(tool["name"], next(iter(shape.get("properties", ())), "text"))

    @property
    def is_usage_asked(self) -> bool:
        options = self.asked.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True


def read_json(body: bytes) -> JSON:
    """Return the request's JSON object."""
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError:
        asked = None
    if not isinstance(asked, dict):
        raise Complaint(400, "We could not parse the JSON body of your request.")
    return asked


def count_tokens(content: object) -> int:
    """Return the words and token ids in a prompt, in an input or in the content of messages."""
    tokens = 0
    left = [content]
    while left:
        item = left.pop()
        if isinstance(item, str):
            tokens += len(item.split())
        elif isinstance(item, int):
            tokens += 1
        elif isinstance(item, list):
            left += item
        elif isinstance(item, dict):
            left += [item.get("content"), item.get("text")]
    return tokens


def _count_messages(content: object) -> int:
    return sum(isinstance(item, dict) for item in content) if isinstance(content, list) else 0


def _prompts(endpoint: Endpoint, content: object) -> list[object]:
    """Return what is answered one by one: a list may be several prompts, but a list of token ids is one."""
    is_one = endpoint in (Endpoint.CHAT, Endpoint.RESPONSES, Endpoint.MESSAGES)
    if is_one or not isinstance(content, list) or isinstance(content[0], int):
        return [content]
    return content


def _whole_number(asked: JSON, field: str, largest: int | None = None) -> int | None:
    number = asked.get(field)
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int):
        raise Complaint(400, f"Invalid type for '{field}': expected an integer.", code="invalid_type", param=field)
    if number < 1 or (largest is not None and number > largest):
        message = f"Invalid '{field}': {number} is out of range."
        raise Complaint(400, message, code="integer_out_of_range", param=field)
    return number


def _maximum(endpoint: Endpoint, asked: JSON) -> int | None:
    """Return the most tokens a choice may have: the smallest where two fields say so."""
    said = [number for field in endpoint.maximum_fields if (number := _whole_number(asked, field))]
    if not said and endpoint is Endpoint.COMPLETIONS:
        return COMPLETIONS_MAXIMUM
    return min(said, default=None)


def _wanted(endpoint: Endpoint, asked: JSON) -> tuple[int, int]:
    """Return how many choices are shown, and how many are generated and charged."""
    if endpoint in (Endpoint.RESPONSES, Endpoint.MESSAGES):
        return 1, 1
    wanted = _whole_number(asked, "n", CHOICES_MAX) or 1
    best_of = _whole_number(asked, "best_of", CHOICES_MAX) if endpoint is Endpoint.COMPLETIONS else None
    return wanted, max(wanted, best_of or 1)


def _check(endpoint: Endpoint, asked: JSON) -> None:
    for field in ("model", endpoint.input_field):
        if asked.get(field) in (None, [], {}):
            message = f"Missing required parameter: '{field}'."
            raise Complaint(400, message, code="missing_required_parameter", param=field)
    if not isinstance(asked["model"], str):
        raise Complaint(400, "Invalid type for 'model': expected a string.", code="invalid_type", param="model")
    if endpoint.input_field == "messages" and not isinstance(asked["messages"], list):
        raise Complaint(400, "Invalid type for 'messages': expected an array.", code="invalid_type", param="messages")
    if asked.get("stream_options") is not None and asked.get("stream") is not True:
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise Complaint(400, message, param="stream_options")


class Author:
    """Writes the answers of one seed."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        scroll = chance.choices(VOCABULARY, k=SCROLL_WORDS)
        self._scroll = scroll * 2  # so that SCROLL_WORDS can be read from any place of the first half
        self._start = zlib.crc32(str(seed).encode())
        # Multiples of 2^-11 are the same number as float32 and as JSON, so both encodings of a vector agree.
        self._numbers = array("f", (chance.randint(-200, 200) / 2048 for _ in range(2 * SCROLL_WORDS)))

    def script(self, endpoint: Endpoint, asked: JSON, directions: Directions = NO_DIRECTIONS) -> Script:
        """Read a call and write down all that will be said to it."""
        _check(endpoint, asked)
        content = asked[endpoint.input_field]
        input_tokens = count_tokens(content)
        if endpoint is Endpoint.EMBEDDINGS:
            dimensions = _whole_number(asked, "dimensions", SCROLL_WORDS) or DIMENSIONS
            vectors = tuple(self._embed(each, dimensions) for each in _prompts(endpoint, content))
            return Script(endpoint, asked, directions, None, (), vectors, input_tokens, 0)
        if endpoint is not Endpoint.COMPLETIONS:
            instructions = [asked.get("instructions"), asked.get("system")]
            input_tokens += TOKENS_PER_MESSAGE * _count_messages(content) + count_tokens(instructions)
        maximum = _maximum(endpoint, asked)
        wanted, tried = _wanted(endpoint, asked)
        choices: list[Choice] = []
        output_tokens = 0
        for prompt in _prompts(endpoint, content):
            written = self._write(prompt, tried, maximum, directions.tokens)
            choices += written[:wanted]
            output_tokens += sum(len(choice.words) for choice in written)
        return Script(endpoint, asked, directions, maximum, tuple(choices), (), input_tokens, output_tokens)

    def _write(self, prompt: object, choices: int, maximum: int | None, tokens: int | None) -> list[Choice]:
        place = zlib.crc32(orjson.dumps(prompt), self._start)
        written = []
        for index in range(choices):
            start = (place + 7919 * index) % SCROLL_WORDS  # a prime stride, so that choices differ
            length = 20 + start % 41 if tokens is None else tokens
            shown = length if maximum is None else min(length, maximum)
            written.append(Choice(self._read(start, shown), shown < length))
        return written

    def _read(self, start: int, words: int) -> list[bytes]:
        if words <= SCROLL_WORDS:
            return self._scroll[start : start + words]
        return (self._scroll * (words // SCROLL_WORDS))[start : start + words]

    def _embed(self, prompt: object, dimensions: int) -> "array[float]":
        start = zlib.crc32(orjson.dumps(prompt), self._start) % SCROLL_WORDS
        return self._numbers[start : start + dimensions]
