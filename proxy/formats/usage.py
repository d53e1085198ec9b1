"""Read the usage that an upstream states in its answer, as numbers of tokens.

Servers differ in the names of the members, in how they write a number, and in what they count into which number. One
function reads them all, for every surface. It does not accept a usage that makes no sense: the result is then None,
and the caller counts the tokens itself. docs/threats.md ("What is charged for strange usage") lists the cases. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from proxy.policy.amounts import Tokens

# The largest number that is accepted for one answer, in tokens: twice the largest context of any model. A report
# above it is a mistake of the upstream, and must not use up a user's quota for the rest of a month.
REPORTED_MAX = 20_000_000

_INPUT = ("prompt_tokens", "input_tokens")
_OUTPUT = ("completion_tokens", "output_tokens")
_TOTAL = "total_tokens"
# Tokens that were read from the cache, and that were written to it. They are a part of the input at OpenAI, where
# they are in the details. At Anthropic they are separate.
_CACHE_READ, _CACHE_WRITE = "cache_read_input_tokens", "cache_creation_input_tokens"
# The parts whose sum is the input at Anthropic.
CACHE_PARTS = (_CACHE_WRITE, _CACHE_READ)
INPUT_PARTS = ("input_tokens", *CACHE_PARTS)
_INPUT_DETAILS = ("prompt_tokens_details", "input_tokens_details", "input_token_details")
_OUTPUT_DETAILS = ("completion_tokens_details", "output_tokens_details", "output_token_details")
# Other names for the tokens that were read from the cache: DeepSeek's and Kimi's.
_CACHE_HITS = ("cached_tokens", "prompt_cache_hit_tokens")
_CACHED = ("cached_tokens",)
_CACHED_BESIDE = (*_CACHE_HITS, _CACHE_READ)
# The names in the details of the input for tokens that were written to the cache: OpenRouter's and LiteLLM's.
_CACHE_WRITES = ("cache_write_tokens", "cache_creation_tokens", _CACHE_WRITE)
# Anthropic calls its reasoning thinking.
_REASONING = ("reasoning_tokens", "thinking_tokens")
# The members that have, or may be, a number of cached or of reasoning tokens.
_DETAILED = frozenset((*_INPUT_DETAILS, *_OUTPUT_DETAILS, *_CACHED_BESIDE, *_REASONING))
# The members of llama.cpp's timings.
_TIMINGS = frozenset(("prompt_n", "cache_n", "predicted_n"))
# The members that the proxy reads anyway, so that they can't be counted again as additional output.
STANDARD_FIELDS = frozenset((*_INPUT, *_OUTPUT, _TOTAL, _CACHE_READ, _CACHE_WRITE, *_CACHE_HITS))

# The members of an object that are numbers of tokens.
Counts = dict[str, int]


@dataclass(slots=True)
class Stated:
    """What an upstream states of the tokens of one answer; None for a part that it does not state.

    `cached` is a part of `input` and `reasoning` a part of `output`. `total` is what an object states that states
    nothing else; beside parts from another object it only fills in a missing output. `extra` is output in
    addition to `output`, or to the total.

    What follows from these:

    - `is_only_total`: a total is all that is stated, beside zeros. It is charged as output, and includes the input.
    - `known_input`: the input; 0 if only a total is stated.
    - `output_without_extra`: the output, or else what the total leaves beside the input: a total of 16 beside an
      input of 11 is 5. Zeros take nothing away from a total that another object states.
    - `known_output`: the output with the additional one; None if only the latter is stated.
    - `is_zero`: no part is more than 0.
    """

    input: int | None = None
    output: int | None = None
    cached: int = 0
    reasoning: int = 0
    total: int | None = None
    extra: int = 0
    is_only_total: bool = field(init=False, repr=False, compare=False)
    known_input: int | None = field(init=False, repr=False, compare=False)
    output_without_extra: int | None = field(init=False, repr=False, compare=False)
    known_output: int | None = field(init=False, repr=False, compare=False)
    is_zero: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Derive what a meter asks for again and again."""
        output = self.output if self.output or self.total is None else max(0, self.total - (self.input or 0))
        self.is_only_total = not self.input and not self.output and self.total is not None
        self.known_input = 0 if self.is_only_total else self.input
        self.output_without_extra = output
        self.known_output = None if output is None else output + self.extra
        self.is_zero = not (self.input or output or self.total or self.extra)

    def tokens(self) -> Tokens:
        """The tokens; 0 for a part that is unknown. Cached and reasoning tokens are never more than their whole."""
        input_tokens, output_tokens = self.known_input or 0, self.known_output or 0
        return Tokens(
            input_tokens,
            output_tokens,
            cached=min(self.cached, input_tokens),
            reasoning=min(self.reasoning, output_tokens),
        )

    def largest(self, other: "Stated") -> "Stated":
        """The larger number of each part. So zeros change nothing, and a part that one lacks comes from the other."""
        return Stated(
            _largest(self.input, other.input),
            _largest(self.output, other.output),
            cached=max(self.cached, other.cached),
            reasoning=max(self.reasoning, other.reasoning),
            total=_largest(self.total, other.total),
            extra=max(self.extra, other.extra),
        )

    def contradicts(self, earlier: "Stated") -> bool:
        """Whether the output or the total is smaller than the one stated earlier. Zeros contradict nothing."""
        return 0 < (self.output or 0) < (earlier.output or 0) or 0 < (self.total or 0) < (earlier.total or 0)

    def plus(self, other: "Stated", *, adds_input: bool) -> "Stated":
        """The sum of two usages, such as those of two choices. They have the same input unless `adds_input`.

        A part that one of them lacks is unknown in the sum.
        """
        inputs = (self.known_input, other.known_input)
        return Stated(
            _sum(*inputs) if adds_input else _largest(*inputs),
            _sum(self.output_without_extra, other.output_without_extra),
            cached=self.cached + other.cached if adds_input else max(self.cached, other.cached),
            reasoning=self.reasoning + other.reasoning,
            extra=self.extra + other.extra,
        )

    def with_output_at_most(self, bound: int) -> "Stated":
        """The same with at most so much output, and the additional output beside it."""
        output = self.output_without_extra
        if output is None or output <= bound:
            return self
        return Stated(self.known_input, bound, self.cached, min(self.reasoning, bound), extra=self.extra)


def read_usage(
    usage: object,
    *,
    output_bound: int | None = None,
    total_bound: int | None = None,
    extra: Sequence[str] = (),
    has_separate_cache: bool = False,
) -> Stated | None:
    """What a usage object states; None if it states nothing, or makes no sense.

    Both namings are read: `prompt_tokens`/`completion_tokens` (chat, completions, embeddings) and
    `input_tokens`/`output_tokens` (/responses, /messages, images, audio).

    - `output_bound` is the most output that the call can have used, None if its endpoint generates none. If the total
      is larger than input and output, the surplus is output: if it is exactly the reasoning tokens (xAI), or if the
      output with it is at most `output_bound` (Gemini). A surplus that is exactly the cached tokens is input. Any
      other total that contradicts its parts is ignored: parts 11 and 5 with a total of 9999 are 16 tokens.
    - If only the output is missing, it is the surplus of the total under the same rule: input 11 with a total of 16
      is 11 and 5, and with a total of 9999 the output stays unknown.
    - If both parts are missing, the total is charged as output: `{"total_tokens": 16}` is 16 tokens of output. One of
      more than `total_bound` (None: no bound) is ignored.
    - An input of 0 is not believed by the caller. So a surplus beside it may be the input, and is no output. If the
      output is 0 or missing too, the total is all that is stated.
    - Reasoning tokens that are more than the output can't be a part of it. Unless the total is exactly input and
      output, they are output in addition, if the output with them is at most `output_bound`.
    - `extra` are members that count as output in addition (Perplexity), if the endpoint generates.
    - `has_separate_cache`: the input is the sum of `input_tokens`, `cache_creation_input_tokens` and
      `cache_read_input_tokens` (Anthropic).
    - Text and floats with a whole value are accepted (`"11"`, `11.0`), because some servers write them.
    - A part that is a negative number, a fraction, a boolean or a number over 20 million makes the object unreadable.
      Details of such values are ignored. Null is treated as a missing member.
    """
    if not isinstance(usage, dict):
        return None
    counts = _counts_in(usage)
    stated, total = _parts_of(usage, counts, has_separate_cache=has_separate_cache), counts.get(_TOTAL)
    if stated is None:
        return None
    if stated.output is None:
        # The total says what the output is, and it does not include the additional members.
        stated = _with_surplus(stated, usage, counts, output_bound)
    if output_bound is not None:
        if extra:
            stated = replace(stated, extra=sum(counts.get(name, 0) for name in extra))
        if stated.output is None or total != (stated.input or 0) + stated.output + stated.extra:
            stated = _with_surplus(stated, usage, counts, output_bound)
        if stated.reasoning:
            stated = _with_reasoning(stated, total, output_bound, extra)
    # The output is at least as much as the total leaves beside the input, and as the additional output.
    if max(stated.input or 0, stated.known_output or 0, stated.total or 0, stated.extra) > REPORTED_MAX:
        return None
    is_too_much = stated.is_only_total and total_bound is not None and (stated.total or 0) > total_bound
    return None if is_too_much else stated


def read_timings(timings: object) -> Stated | None:
    """The tokens in the `timings` that llama.cpp adds to the last chunk; None if they don't state the whole input.

    The input is the tokens that were evaluated now (`prompt_n`) and those that were in its cache (`cache_n`):
    `{"cache_n": 4, "prompt_n": 7, "predicted_n": 5}` is an input of 11 and an output of 5. Older versions do not
    send `cache_n`, and their input is unknown.
    """
    if not isinstance(timings, dict):
        return None
    counts = _counts_in(timings)
    if not counts.keys() >= _TIMINGS:
        return None
    return Stated(counts["prompt_n"] + counts["cache_n"], counts["predicted_n"], cached=counts["cache_n"])


def usages_beside(document: dict[str, Any]) -> list[object]:
    """The usages in members of a vendor's own, such as Groq's: `{"x_groq": {"id": …, "usage": {…}}}`."""
    found = []
    for name, value in document.items():
        if name.startswith("x_") and isinstance(value, dict) and value.get("usage") is not None:
            found.append(value["usage"])
    return found


def usages_in_choices(choices: object) -> list[tuple[int, object]]:
    """The usages inside choices, where Kimi writes them, each with the index of its choice.

    They are in the choice itself, or in its delta or message: `[{"index": 0, "delta": {}, "usage": {…}}]`.
    """
    found: list[tuple[int, object]] = []
    for place, choice in enumerate(choices if isinstance(choices, list) else ()):
        if isinstance(choice, dict):
            for part in (choice, choice.get("delta"), choice.get("message")):
                if isinstance(part, dict) and "usage" in part:
                    index = choice.get("index")
                    found.append((index if isinstance(index, int) else place, part["usage"]))
    return found


def without_usages(choices: object) -> object:
    """The choices without the usages inside them, which are no text of the model."""
    if not isinstance(choices, list):
        return choices
    return [
        {
            name: {key: inner for key, inner in value.items() if key != "usage"} if isinstance(value, dict) else value
            for name, value in choice.items()
            if name != "usage"
        }
        if isinstance(choice, dict)
        else choice
        for choice in choices
    ]


def _counts_in(part: dict[str, Any]) -> Counts:
    """The members of an object that are numbers of tokens."""
    counts = {}
    for name, value in part.items():
        count = value if type(value) is int else None if type(value) is dict else _integer(value)
        if count is not None and 0 <= count <= REPORTED_MAX:
            counts[name] = count
    return counts


def _parts_of(usage: dict[str, Any], counts: Counts, *, has_separate_cache: bool) -> Stated | None:
    """What the parts of a usage state, and its total where they state less; None if one of them makes no sense."""
    try:
        input_tokens, output_tokens = _part(usage, counts, _INPUT), _part(usage, counts, _OUTPUT)
        for name in CACHE_PARTS if has_separate_cache else ():
            if (count := _part(usage, counts, (name,))) is not None:
                input_tokens = (input_tokens or 0) + count
    except ValueError:
        return None
    cached = reasoning = 0
    if not _DETAILED.isdisjoint(usage):
        cached = _detail(usage, counts, _INPUT_DETAILS, _CACHED, _CACHED_BESIDE)
        reasoning = _detail(usage, counts, _OUTPUT_DETAILS, _REASONING, _REASONING)
    if input_tokens is None and output_tokens is None:
        return Stated(reasoning=reasoning, total=counts[_TOTAL]) if _TOTAL in counts else None
    return Stated(input_tokens, output_tokens, cached, reasoning)


def _with_reasoning(stated: Stated, total: int | None, output_bound: int, extra: Sequence[str]) -> Stated:
    """The same with the reasoning tokens in the output, if they can't be a part of it and no total says they are.

    A total that contradicts its parts says nothing. If one of their names is in `extra`, they are added there.
    """
    if stated.output is None or stated.output >= stated.reasoning or any(name in extra for name in _REASONING):
        return stated
    surplus = (total or 0) - (stated.input or 0) - stated.output
    output = stated.output + stated.reasoning
    return stated if surplus in (0, stated.extra) or output > output_bound else replace(stated, output=output)


def _with_surplus(stated: Stated, usage: dict[str, Any], counts: Counts, output_bound: int | None) -> Stated:
    """The same with the tokens by which the total is larger than input and output, if it is known what they are.

    An output that is missing is 0 before, and stays missing if the surplus is unknown.
    """
    total, stated_output = counts.get(_TOTAL), stated.output or 0
    if stated.input is None or total is None:
        return stated
    surplus = total - stated.input - stated_output - stated.extra
    if surplus == 0:
        return stated if stated.output is not None else replace(stated, output=0)
    if surplus < 0 or output_bound is None:
        return stated
    # The numbers of cached tokens that a surplus may be: those read, those written, and both.
    written = _detail(usage, counts, _INPUT_DETAILS, _CACHE_WRITES, (_CACHE_WRITE,))
    caches = {stated.cached, written, stated.cached + written} - {0}
    if surplus == stated.reasoning:
        cached, output = 0, surplus
    elif surplus in caches:
        cached, output = surplus, 0
    elif surplus - stated.reasoning in caches:
        cached, output = surplus - stated.reasoning, stated.reasoning
    elif stated_output + surplus <= output_bound:
        if not stated.input:
            return stated if stated_output else Stated(reasoning=stated.reasoning, total=total)
        cached, output = 0, surplus
    else:
        return stated
    return replace(stated, input=stated.input + cached, output=stated_output + output)


def _part(usage: dict[str, Any], counts: Counts, names: Sequence[str]) -> int | None:
    """The largest of these members, None if they are missing or null. Raises ValueError if none makes sense."""
    largest, is_stated = None, False
    for name in names:
        if name in counts:
            largest = counts[name] if largest is None else max(largest, counts[name])
        else:
            is_stated = is_stated or usage.get(name) is not None
    if is_stated and largest is None:
        raise ValueError
    return largest


def _detail(
    usage: dict[str, Any], counts: Counts, sections: Sequence[str], names: Sequence[str], beside: Sequence[str]
) -> int:
    """The largest of some members of the details, and of others beside them; 0 if there is none."""
    largest = 0
    for name in beside:
        largest = max(largest, counts.get(name, 0))
    for section in sections:
        if isinstance(details := usage.get(section), dict):
            of_details = _counts_in(details)
            for name in names:
                largest = max(largest, of_details.get(name, 0))
    return largest


def _largest(first: int | None, second: int | None) -> int | None:
    if first is None or second is None:
        return second if first is None else first
    return max(first, second)


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second


def _integer(value: object) -> int | None:
    """The number in a text or a float, which some servers write; None if it is none, or is not whole."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 12:
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else None
