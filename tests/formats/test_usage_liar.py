"""An upstream that lies about its usage in any way is charged within bounds.

The usage has any shape, numbers and types, comes in any order, place and number, with text before, after and between.
The rules are written here anew, from what was sent, and share no code with the product.
"""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.formats.endpoints import CHAT, MESSAGES, RESPONSES, Endpoint
from proxy.formats.sse import Splitter
from proxy.formats.surfaces import meter_of
from proxy.policy.amounts import AtLeast, Exactly, Tokens
from tests.formats.streams import DONE, count, event, request

BOUND = 100  # what the call could have used
LARGEST = 20_000_000

counts = st.integers(0, 60) | st.sampled_from([BOUND - 1, BOUND, BOUND + 1, 5000, LARGEST])
strange = (
    st.none()
    | st.booleans()
    | st.integers(-3, -1)
    | st.sampled_from(
        [LARGEST + 1, 2**63, 10**30, 1.5, -0.0, 1e30, "", "-5", " 5", "five", "5", "12", 7.0, [], {}, [5]]
    )
)
numbers = counts | counts | counts | strange
details = st.dictionaries(st.sampled_from(["cached_tokens", "reasoning_tokens", "x"]), numbers, max_size=3) | strange
NAMES = ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "total_tokens")
DETAILS = ("prompt_tokens_details", "completion_tokens_details", "input_tokens_details", "output_tokens_details")
anything = st.dictionaries(st.sampled_from(NAMES), numbers, max_size=5).flatmap(
    lambda plain: st.dictionaries(st.sampled_from(DETAILS), details, max_size=2).map(lambda more: {**plain, **more})
)


@st.composite
def plausible(draw: st.DrawFn) -> dict:
    """A usage as a vendor could write it, in one of the two namings, with or without a total that fits."""
    first, second = draw(st.sampled_from([("prompt", "completion"), ("input", "output")]))
    stated, beside = draw(st.tuples(counts, counts)), draw(st.sampled_from([0, 0, 1, 40, 9000]))
    usage: dict[str, Any] = {f"{first}_tokens": stated[0], f"{second}_tokens": stated[1]}
    if draw(st.booleans()):
        usage["total_tokens"] = sum(stated) + beside
    if draw(st.booleans()):
        usage[f"{second}_tokens_details"] = {"reasoning_tokens": beside}
    return usage


usages = plausible() | plausible() | anything | strange
texts = st.integers(1, 40).map("x".__mul__)
steps = st.lists(texts | st.tuples(st.integers(0, 3), usages), max_size=6)


# --------------------------------------------------------------------------------------------- what was sent, in JSON


def chat_events(step: Any) -> Any:
    """A chunk with text, or with a usage in one of four places."""
    choice: dict[str, Any] = {"index": 0, "delta": {}}
    if isinstance(step, str):
        return {"choices": [{**choice, "delta": {"content": step}}]}
    place, usage = step
    return (
        {"choices": [], "usage": usage},
        {"choices": [choice], "usage": usage},
        {"choices": [{**choice, "usage": usage}]},
        {"choices": [choice], "x_groq": {"id": "1", "usage": usage}},
    )[place]


def response_events(step: Any) -> Any:
    """An event with text, or with a usage in the response or beside it."""
    if isinstance(step, str):
        return {"type": "response.output_text.delta", "delta": step}
    place, usage = step
    return (
        {"type": "response.in_progress", "response": {"usage": usage}},
        {"type": "response.completed", "response": {"usage": usage}},
        {"type": "response.in_progress", "usage": usage},
        {"type": "response.in_progress", "response": {"x_vendor": {"usage": usage}}},
    )[place]


def message_events(step: Any) -> Any:
    """An event with text, or with a usage."""
    if isinstance(step, str):
        return {"type": "content_block_delta", "delta": {"type": "text_delta", "text": step}}
    return {"type": "message_delta", "delta": {}, "usage": step[1]}


EVENTS = {CHAT: chat_events, RESPONSES: response_events, MESSAGES: message_events}


def whole_of(endpoint: Endpoint, text: str, first: object, second: object) -> dict:
    """A whole answer with two usages; on /messages with the first alone."""
    if endpoint is CHAT:
        return {"choices": [{"message": {"content": text}, "usage": second}], "usage": first}
    if endpoint is RESPONSES:
        return {"output": [{"content": [{"text": text}]}], "usage": first, "x_vendor": {"usage": second}}
    return {"content": [{"type": "text", "text": text}], "usage": first}


# ------------------------------------------------------------------------------------------------------- the rules


def number(value: object) -> int | None:
    """A count: a whole number from 0 to 20 million, also as a float or as digits."""
    if type(value) is str and value.isdecimal() and value.isascii():
        value = int(value)
    if type(value) is float and value == value // 1:
        value = int(value)
    return value if type(value) is int and 0 <= value <= LARGEST else None


@dataclass
class Plain:
    """What a usage says plainly: the largest and the smallest reading of its output, and the largest of its input."""

    output: int | None
    output_max: int
    input_max: int
    is_readable: bool
    output_top: int = 0  # the same as `output_max`, also if a surplus in the total is not explained
    is_total: bool = False  # a total is all that it says, beside zeros
    says_nothing: bool = True  # no output, neither as a number nor in a total that is believed


def plain(usage: object) -> Plain:
    """Read a usage anew. A part is readable if one of its two names has a count, or both are missing or null."""
    unreadable = Plain(None, 0, 0, is_readable=False)
    if type(usage) is not dict:
        return unreadable
    parts = []
    for names in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")):
        values = [usage[name] for name in names if usage.get(name) is not None]
        found = [each for each in map(number, values) if each is not None]
        if values and not found:
            return unreadable
        parts.append(max(found, default=None))
    (stated_input, stated_output), total = parts, number(usage.get("total_tokens"))
    sections = [usage.get(name) for name in DETAILS]
    inner = [number(each) for section in sections if type(section) is dict for each in section.values()]
    explained = sum(each for each in inner if each)  # reasoning and cached tokens, whichever section they are in
    output_max, surplus = stated_output or 0, (total or 0) - (stated_output or 0) - (stated_input or 0)
    is_total_all = stated_input is None and stated_output is None
    if is_total_all or surplus <= explained:
        output_max = max(output_max, (total or 0) - (stated_input or 0))
    is_ignored = not is_total_all and surplus > max(explained, BOUND - (stated_output or 0))
    input_max = (stated_input or 0) + explained
    says_nothing = not stated_output and (surplus <= 0 or is_ignored)
    top = max(output_max, (total or 0) - (stated_input or 0))
    # Reasoning that is more than the output is no part of it, if no total says otherwise.
    reasoned = max(
        (number(each.get("reasoning_tokens")) or 0 for each in sections[1::2] if type(each) is dict), default=0
    )
    if total is None and stated_output is not None and stated_output < reasoned <= BOUND - stated_output:
        top, says_nothing = max(top, stated_output + reasoned), False
    is_total = bool(total) and not stated_input and not stated_output
    return Plain(
        stated_output, output_max, input_max, True, output_top=top, says_nothing=says_nothing, is_total=is_total
    )


def check(charged: Tokens, *, is_exact: bool, counted: int, stated: list[Plain], contradicts: bool) -> None:
    """The rules for a charge; `counted` are the tokens of the text, which has passed."""
    assert all(type(each) is int and each >= 0 for each in (charged.input, charged.output))
    assert charged.cached <= charged.input
    assert charged.reasoning <= charged.output
    # Never above what the call could have used, unless a larger number was stated plainly. An estimate adds text that
    # came after the usage; it is charged only up to the hold.
    most = max([BOUND, *(each.output_max for each in stated)])
    assert charged.output <= (most if is_exact else most + counted)
    assert charged.input <= max((each.input_max for each in stated), default=0)
    # Never below what has passed, if that is contradicted.
    outputs = [each.output for each in stated if each.is_readable and each.output]
    if all(each.says_nothing for each in stated):
        assert charged.output == counted
    if contradicts:
        assert charged.output >= counted
    # Never below the largest that was stated.
    assert charged.output >= max(outputs, default=0)
    # No prompt is empty.
    assert not is_exact or charged.input or any(each.is_total for each in stated)
    if is_exact and not charged.output:
        assert counted == 0


def falls(stated: list[Plain]) -> bool:
    """Whether a later output is smaller than an earlier one, however the total is read."""
    said = [each for each in stated if each.output]
    return any(later.output_top < max(each.output or 0 for each in said[:at]) for at, later in enumerate(said) if at)


@pytest.mark.parametrize("endpoint", EVENTS, ids=lambda endpoint: endpoint.name)
@settings(max_examples=max(200, settings().max_examples))
@example(steps=["abc", (2, {"prompt_tokens": 9, "output_tokens": 2}), (2, {"prompt_tokens": 9, "output_tokens": 1})])
@given(steps=steps)
def test_a_stream_that_lies_is_charged_within_bounds(endpoint: Endpoint, steps: list) -> None:
    """Whatever it states, at every moment. Its text is counted as it passes."""
    meter = meter_of(request(endpoint), count=count, output_bound=BOUND)
    counted, stated = 0, []
    for step in steps:
        raw = event(EVENTS[endpoint](step))
        for each in Splitter().feed(raw):
            meter.see_event(each)
        if isinstance(step, str):
            counted += len(step)
        else:
            stated.append(plain(step[1]))
        usage = meter.usage()
        assert meter.output_seen == usage.tokens.output
        check(
            usage.tokens,
            is_exact=isinstance(usage, Exactly),
            counted=counted,
            stated=[] if endpoint is MESSAGES and not any(each.is_readable for each in stated) else stated,
            contradicts=falls(stated),
        )
        assert isinstance(usage, Exactly | AtLeast)
    for each in Splitter().feed(DONE):
        meter.see_event(each)


def charge(endpoint: Endpoint, steps: list) -> tuple[int, int]:
    """The input and output that a stream of these steps is charged."""
    meter = meter_of(request(endpoint), count=count, output_bound=BOUND)
    for step in steps:
        for each in Splitter().feed(event(EVENTS[endpoint](step))):
            meter.see_event(each)
    tokens = meter.usage().tokens
    return tokens.input, tokens.output


@pytest.mark.parametrize("endpoint", EVENTS, ids=lambda endpoint: endpoint.name)
@example(steps=["x", (0, {"total_tokens": 9})], at=2, place=0)
@example(steps=["xxx", (0, {"completion_tokens": 2})], at=0, place=0)
@given(steps=steps, at=st.integers(0, 6), place=st.integers(0, 3))
def test_zeros_and_repeats_change_no_charge(endpoint: Endpoint, steps: list, at: int, place: int) -> None:
    """Zeros anywhere among the others, and each usage twice in a row."""
    charged = charge(endpoint, steps)
    zeros = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), 0)
    assert charge(endpoint, [*steps[:at], (place, zeros), *steps[at:]]) == charged
    twice = [again for step in steps for again in ([step] if isinstance(step, str) else [step, step])]
    assert charge(endpoint, twice) == charged


@pytest.mark.parametrize("endpoint", EVENTS, ids=lambda endpoint: endpoint.name)
@settings(max_examples=max(200, settings().max_examples))
@given(text=st.just("") | texts, first=usages, second=usages)
def test_a_whole_answer_that_lies_is_charged_within_bounds(
    endpoint: Endpoint, text: str, first: object, second: object
) -> None:
    """Its text is counted by the caller, unless the usage is believed."""
    meter = meter_of(request(endpoint, stream=False), count=count, output_bound=BOUND)
    meter.see_whole(json.dumps(whole_of(endpoint, text, first, second)).encode())
    usage, left = meter.usage(), meter.uncounted_texts
    assert left in ([], [text])
    tokens = usage.tokens
    output = meter.output_with(len(text)) if left else tokens.output
    stated = [plain(each) for each in ((first,) if endpoint is MESSAGES else (first, second))]
    check(
        Tokens(tokens.input, output, tokens.cached, tokens.reasoning),
        is_exact=isinstance(usage, Exactly),
        counted=len(text),
        stated=stated,
        contradicts=falls(stated),
    )


@given(body=st.binary(max_size=60) | st.text(alphabet='{}[]",:\\ncontext"0x', max_size=60).map(str.encode))
def test_any_bytes_are_charged_at_most_their_length(body: bytes) -> None:
    """As a whole answer and as an event. Nothing is raised, and no byte is charged twice."""
    meter = meter_of(request(stream=False), count=count, output_bound=BOUND)
    meter.see_whole(body)
    assert meter.output_seen + sum(map(count, meter.uncounted_texts)) <= 3 * len(body)  # U+FFFD has three bytes
    line = body.replace(b"\n", b"").replace(b"\r", b"")
    meter = meter_of(request(), count=count, output_bound=BOUND)
    for each in Splitter().feed(b"data: " + line + b"\n\n"):
        meter.see_event(each)
    assert meter.output_seen <= 3 * len(line) + 1
