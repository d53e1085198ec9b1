"""Parse a call as OpenAI does, and generate the answer to it.

An answer depends only on the seed and the prompt. The same question gets the same words, streamed or not, and a
smaller output maximum cuts the same words short. One word is one output token.

The input is counted by a simple rule: each word of its texts (`content`, `text`, `instructions`) is one token, each
token id is one token, and each message costs three more. So an input never has more tokens than its JSON body has
bytes, which is what the proxy reserves if it cannot count them.

No sockets, no clock. Nothing is shared with the modules of the proxy that read answers, so a mistake of theirs shows.
"""

import random
import zlib
from array import array
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import orjson

from proxy.simulator.directives import NO_DIRECTIVES, ApiError, Directives

JSON = dict[str, Any]

VOCABULARY = (
    b"the a an of to in and or but with from over under between before after while until because so each every one "
    b"two small large quiet bright early late old new green river mountain window garden letter station bridge lamp "
    b"paper table morning evening winter summer train boat road field stone bird cloud music story answer question "
    b"moves waits opens closes carries follows turns remains begins ends shows finds keeps gives counts reads writes"
).split()
CORPUS_WORDS = 4096

TOKENS_PER_MESSAGE = 3
CHOICES_MAX = 128
COMPLETIONS_MAXIMUM = 16  # OpenAI's default for `max_tokens` of /completions
DIMENSIONS = 1536


class Endpoint(Enum):
    """An endpoint, with the field of its input and the fields that can limit its output."""

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
    """The words of one choice, and whether the output maximum cut it short."""

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
    """A tool that the answer calls. The words of the choice become the value of its one argument."""

    name: str
    argument: str

    @property
    def opening(self) -> str:
        """The JSON of the arguments before the words: `{"term":"`."""
        return orjson.dumps({self.argument: ""}).decode().removesuffix(self.closing)

    @property
    def closing(self) -> str:
        """The JSON of the arguments after the words."""
        return '"}'

    def arguments(self, choice: Choice) -> str:
        """The JSON of the arguments."""
        return self.opening + choice.text + self.closing


@dataclass(frozen=True, slots=True)
class Answer:
    """One call, and the whole answer to it.

    `params` are the parameters of the request. `maximum` is the output maximum of one choice, in tokens; None is no
    maximum. `vectors` has one embedding for each input. `output_tokens` includes choices that were generated for
    `best_of` and are not shown.
    """

    endpoint: Endpoint
    params: JSON
    directives: Directives
    maximum: int | None
    choices: tuple[Choice, ...]
    vectors: "tuple[array[float], ...]"
    input_tokens: int
    output_tokens: int

    @property
    def usage(self) -> tuple[int, int]:
        """Input and output tokens as the answer reports them."""
        return (0, 0) if self.directives.usage_zero else (self.input_tokens, self.output_tokens)

    @property
    def is_streamed(self) -> bool:
        return self.params.get("stream") is True and self.endpoint is not Endpoint.EMBEDDINGS

    @property
    def tool(self) -> Tool | None:
        """The tool that the answer calls, if the directive `tool` is set: the first one offered."""
        offered = self.params.get("tools")
        if not self.directives.tool or not offered:
            return None
        tool = offered[0].get("function", offered[0])  # /chat/completions nests it, /responses and /messages don't
        schema = tool.get("parameters") or tool.get("input_schema") or {}
        return Tool(tool["name"], next(iter(schema.get("properties", ())), "text"))

    @property
    def is_usage_requested(self) -> bool:
        options = self.params.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True


def read_json(body: bytes) -> JSON:
    """Return the JSON object in the body of a request. Raises ApiError if it is not one."""
    try:
        params = orjson.loads(body)
    except orjson.JSONDecodeError:
        params = None
    if not isinstance(params, dict):
        raise ApiError(400, "We could not parse the JSON body of your request.")
    return params


def count_tokens(content: object) -> int:
    """Return the number of words and token ids in a prompt, an input or the content of messages."""
    tokens = 0
    remaining = [content]
    while remaining:
        item = remaining.pop()
        if isinstance(item, str):
            tokens += len(item.split())
        elif isinstance(item, int):
            tokens += 1
        elif isinstance(item, list):
            remaining += item
        elif isinstance(item, dict):
            remaining += [item.get("content"), item.get("text")]
    return tokens


def _count_messages(content: object) -> int:
    return sum(isinstance(item, dict) for item in content) if isinstance(content, list) else 0


def _prompts(endpoint: Endpoint, content: object) -> list[object]:
    """Return the prompts that are answered separately.

    A list can be several prompts, `["one two", "three"]` or `[[5, 6], [7]]`, but a list of token ids, `[5, 6, 7]`, is
    one prompt. A list of messages is one prompt too.
    """
    is_conversation = endpoint in (Endpoint.CHAT, Endpoint.RESPONSES, Endpoint.MESSAGES)
    if is_conversation or not isinstance(content, list) or isinstance(content[0], int):
        return [content]
    return content


def _positive_integer(params: JSON, field: str, largest: int | None = None) -> int | None:
    number = params.get(field)
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int):
        raise ApiError(400, f"Invalid type for '{field}': expected an integer.", code="invalid_type", param=field)
    if number < 1 or (largest is not None and number > largest):
        message = f"Invalid '{field}': {number} is out of range."
        raise ApiError(400, message, code="integer_out_of_range", param=field)
    return number


def _output_maximum(endpoint: Endpoint, params: JSON) -> int | None:
    """Return the largest number of tokens in a choice; if two fields limit it, the smaller one."""
    maxima = [number for field in endpoint.maximum_fields if (number := _positive_integer(params, field))]
    if not maxima and endpoint is Endpoint.COMPLETIONS:
        return COMPLETIONS_MAXIMUM
    return min(maxima, default=None)


def _choice_counts(endpoint: Endpoint, params: JSON) -> tuple[int, int]:
    """Return how many choices are shown, and how many are generated and charged."""
    if endpoint in (Endpoint.RESPONSES, Endpoint.MESSAGES):
        return 1, 1
    shown = _positive_integer(params, "n", CHOICES_MAX) or 1
    best_of = _positive_integer(params, "best_of", CHOICES_MAX) if endpoint is Endpoint.COMPLETIONS else None
    return shown, max(shown, best_of or 1)


def _validate(endpoint: Endpoint, params: JSON) -> None:
    for field in ("model", endpoint.input_field):
        if params.get(field) in (None, [], {}):
            message = f"Missing required parameter: '{field}'."
            raise ApiError(400, message, code="missing_required_parameter", param=field)
    if not isinstance(params["model"], str):
        raise ApiError(400, "Invalid type for 'model': expected a string.", code="invalid_type", param="model")
    if endpoint.input_field == "messages" and not isinstance(params["messages"], list):
        raise ApiError(400, "Invalid type for 'messages': expected an array.", code="invalid_type", param="messages")
    if params.get("stream_options") is not None and params.get("stream") is not True:
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise ApiError(400, message, param="stream_options")


@cache
def generator_of(seed: int) -> "Generator":
    """The generator of a seed. It is made once in a process: that takes 8 ms, and the tests start many simulators."""
    return Generator(seed)


class Generator:
    """Generates the answers of one seed. It does not change.

    A choice is a run of words out of a corpus of `CORPUS_WORDS` random words; a hash of the prompt says where in the
    corpus it starts. So an answer of any length costs one slice.
    """

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        corpus = rng.choices(VOCABULARY, k=CORPUS_WORDS)
        # Twice, because a choice may start at the last word, 4095, and still need 4096 words.
        self._corpus = corpus * 2
        self._start = zlib.crc32(str(seed).encode())
        # Multiples of 2^-11 are exact both as float32 and in JSON, so the two encodings of a vector agree.
        self._numbers = array("f", (rng.randint(-200, 200) / 2048 for _ in range(2 * CORPUS_WORDS)))

    def answer(self, endpoint: Endpoint, params: JSON, directives: Directives = NO_DIRECTIVES) -> Answer:
        """Validate a call and generate the whole answer. Raises ApiError, a 400, if a parameter is wrong."""
        _validate(endpoint, params)
        content = params[endpoint.input_field]
        input_tokens = count_tokens(content)
        if endpoint is Endpoint.EMBEDDINGS:
            dimensions = _positive_integer(params, "dimensions", CORPUS_WORDS) or DIMENSIONS
            vectors = tuple(self._embed(prompt, dimensions) for prompt in _prompts(endpoint, content))
            return Answer(endpoint, params, directives, None, (), vectors, input_tokens, 0)
        if endpoint is not Endpoint.COMPLETIONS:
            instructions = [params.get("instructions"), params.get("system")]
            input_tokens += TOKENS_PER_MESSAGE * _count_messages(content) + count_tokens(instructions)
        maximum = _output_maximum(endpoint, params)
        shown, generated = _choice_counts(endpoint, params)
        choices: list[Choice] = []
        output_tokens = 0
        for prompt in _prompts(endpoint, content):
            candidates = self._write(prompt, generated, maximum, directives.tokens)
            choices += candidates[:shown]
            output_tokens += sum(len(choice.words) for choice in candidates)
        return Answer(endpoint, params, directives, maximum, tuple(choices), (), input_tokens, output_tokens)

    def _write(self, prompt: object, choices: int, maximum: int | None, tokens: int | None) -> list[Choice]:
        offset = zlib.crc32(orjson.dumps(prompt), self._start)
        written = []
        for index in range(choices):
            # A stride that is prime to the corpus's size starts each of up to 4096 choices at another word.
            start = (offset + 7919 * index) % CORPUS_WORDS
            length = 20 + start % 41 if tokens is None else tokens  # by default 20 to 60 words
            shown = length if maximum is None else min(length, maximum)
            written.append(Choice(self._words(start, shown), shown < length))
        return written

    def _words(self, start: int, count: int) -> list[bytes]:
        if count <= CORPUS_WORDS:
            return self._corpus[start : start + count]
        # One copy of the doubled corpus (8192 words) for each 4096 words begun: 8000 words from start 4000 end at
        # 12000, so they need two copies, 16384 words.
        return (self._corpus * (count // CORPUS_WORDS + 1))[start : start + count]

    def _embed(self, prompt: object, dimensions: int) -> "array[float]":
        start = zlib.crc32(orjson.dumps(prompt), self._start) % CORPUS_WORDS
        return self._numbers[start : start + dimensions]
