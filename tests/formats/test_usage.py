"""A valid usage object is read exactly; an invalid one gives None.

The cases named u-… are those of docs/threats.md, "What is charged for strange usage". The true usage there is 11
tokens of input and 5 of output.
"""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.usage import (
    REPORTED_MAX,
    Stated,
    read_timings,
    read_usage,
    usages_beside,
    usages_in_choices,
    without_usages,
)
from proxy.policy.amounts import Amount, Exactly, Tokens, charge_of

NAMES = [
    *("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "total_tokens"),
    *("prompt_tokens_details", "completion_tokens_details", "input_tokens_details", "output_tokens_details"),
    *("cached_tokens", "reasoning_tokens"),
]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 100)
    | st.floats()
    | st.text(max_size=5)
    | st.from_regex(r"[0-9]{1,15}", fullmatch=True)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner), max_leaves=12
)
reported = st.integers(0, REPORTED_MAX)


def read_tokens(usage: object) -> Tokens | None:
    """The tokens that a usage of an endpoint that generates states."""
    stated = read_usage(usage, output_bound=4096)
    return None if stated is None else stated.tokens()


def chat(input_tokens: object = 11, output_tokens: object = 5, **more: object) -> dict[str, object]:
    """The usage of a chat completion."""
    return {"prompt_tokens": input_tokens, "completion_tokens": output_tokens, "total_tokens": 16, **more}


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        pytest.param(chat(), Tokens(11, 5), id="u-ok"),
        pytest.param(
            {
                "input_tokens": 11,
                "output_tokens": 5,
                "total_tokens": 16,
                "input_tokens_details": {"cached_tokens": 8},
                "output_tokens_details": {"reasoning_tokens": 4},
            },
            Tokens(11, 5, cached=8, reasoning=4),
            id="responses",
        ),
        pytest.param(
            chat(prompt_tokens_details={"cached_tokens": 8}, completion_tokens_details={"reasoning_tokens": 4}),
            Tokens(11, 5, cached=8, reasoning=4),
            id="u-cached",
        ),
        pytest.param(
            chat(completion_tokens_details={"reasoning_tokens": 4000}, prompt_tokens_details={"cached_tokens": 4000}),
            Tokens(11, 5, cached=11, reasoning=5),
            id="a part is never more than the whole",
        ),
        pytest.param(chat(prompt_tokens_details=None, completion_tokens_details=[1]), Tokens(11, 5), id="no details"),
        pytest.param(
            chat(prompt_tokens_details={"cached_tokens": -1}, completion_tokens_details={"reasoning_tokens": "x"}),
            Tokens(11, 5),
            id="invalid details are ignored",
        ),
        pytest.param({"prompt_tokens": 8, "total_tokens": 8}, Tokens(8, 0), id="embeddings"),
        pytest.param(
            {"prompt_tokens": 8, "completion_tokens": None, "total_tokens": 8}, Tokens(8, 0), id="vllm null"
        ),
        pytest.param({"prompt_tokens": 11, "completion_tokens": 5}, Tokens(11, 5), id="no total"),
        pytest.param(chat(total_tokens=0), Tokens(11, 5), id="total 0"),
        pytest.param(chat(0, 0, total_tokens=0), Tokens(0, 0), id="u-zero"),
        pytest.param(chat(11, 0, total_tokens=11), Tokens(11, 0), id="zero output"),
        pytest.param(chat(11, 0), Tokens(11, 5), id="zero output, but in the total"),
        pytest.param({"total_tokens": 0}, Tokens(0, 0), id="u-zero, total only"),
        pytest.param({"total_tokens": 16}, Tokens(0, 16), id="u-partial"),
        pytest.param(chat(None, None), Tokens(0, 16), id="u-partial, the parts null"),
        pytest.param(chat(total_tokens=9999), Tokens(11, 5), id="u-mismatch"),
        pytest.param(chat(total_tokens=-16), Tokens(11, 5), id="u-neg-total: a total never counts against its parts"),
        pytest.param(chat("11", "5"), Tokens(11, 5), id="u-str"),
        pytest.param(chat(11.0, 5.0), Tokens(11, 5), id="whole floats"),
        pytest.param(chat(1_000_000, 5), Tokens(1_000_000, 5), id="u-1e6"),
        pytest.param(chat(1e6, 5), Tokens(1_000_000, 5), id="u-1e6 as a float"),
        pytest.param(chat(20_000_000, 20_000_000), Tokens(20_000_000, 20_000_000), id="the largest accepted number"),
        pytest.param({**chat(), "cost": 0.1, "queue_time": "x"}, Tokens(11, 5), id="members of other servers"),
        pytest.param(
            {**chat(), "input_tokens": 0, "output_tokens": 0}, Tokens(11, 5), id="both namings, one with zeros"
        ),
    ],
)
def test_a_valid_usage_is_read(usage, tokens):
    """An explicit zero is a zero, details are parts and not extras, and a total without parts is charged in full."""
    assert read_tokens(usage) == tokens


@pytest.mark.parametrize(
    "usage",
    [
        pytest.param(None, id="u-null"),
        pytest.param([11, 5], id="u-list"),
        pytest.param("16", id="text"),
        pytest.param(16, id="number"),
        pytest.param(True, id="true"),
        pytest.param({}, id="empty"),
        pytest.param({"unknown": 16}, id="another shape"),
        pytest.param(chat(None, None, total_tokens=None), id="u-nullfields"),
        pytest.param(chat(-11, 5), id="u-neg"),
        pytest.param(chat(11, -5), id="u-neg output"),
        pytest.param(chat(-11, -5), id="u-neg both, with a total"),
        pytest.param({"total_tokens": -16}, id="u-neg-total"),
        pytest.param(chat(True, False), id="u-bool"),
        pytest.param(chat(11, True), id="u-bool output"),
        pytest.param({"total_tokens": True}, id="u-bool total"),
        pytest.param(chat([11], [5]), id="u-list in a field"),
        pytest.param(chat({"value": 11}, 5), id="an object in a field"),
        pytest.param(chat(11.7, 5.0), id="u-float"),
        pytest.param(chat(11, 5.2), id="u-float output"),
        pytest.param(chat(float("nan"), 5), id="u-nan"),
        pytest.param(chat(11, float("nan")), id="u-nan output"),
        pytest.param(chat(float("inf"), 5), id="infinite"),
        pytest.param(chat(10**30, 5), id="u-huge"),
        pytest.param(chat(11, 10**30), id="u-huge output"),
        pytest.param(chat(1e30, 5), id="u-huge as a float"),
        pytest.param(chat(2**63, 5), id="u-2e63"),
        pytest.param(chat(11, 20_000_001), id="one more than the largest accepted number"),
        pytest.param({"total_tokens": 2**63}, id="u-2e63 total only"),
        pytest.param(chat("9" * 200_000, 5), id="long-int"),
        pytest.param(chat("eleven", "five"), id="words"),
        pytest.param(chat("", ""), id="empty text"),
        pytest.param(chat("-11", "5"), id="negative text"),
        pytest.param(chat(" 11", "5"), id="text with a blank"),
        pytest.param(chat("१२", "५"), id="digits of another script"),
        pytest.param(chat("²", "5"), id="a digit that is no number"),
    ],
)
def test_an_invalid_usage_gives_none(usage):
    """There is no exception and no guess. The caller counts itself, so one absurd answer uses up no quota."""
    assert read_tokens(usage) is None


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 11, "total_tokens": 16},
        {"prompt_tokens": 11, "completion_tokens": None, "total_tokens": 16},
        {"input_tokens": 11, "output_tokens": None, "total_tokens": 16},
    ],
)
def test_output_that_only_the_total_includes_is_not_free(usage):
    """The total is 16 and the input 11, so 5 were generated: the result has 16 tokens or is None, never 11."""
    assert read_tokens(usage) == Tokens(11, 5)
    assert read_usage(usage) == Stated(11, None)  # nothing is generated
    extra = ["citation_tokens"]
    assert read_usage({**usage, "citation_tokens": 4}, output_bound=10, extra=extra) == Stated(11, 5, extra=4)
    assert read_usage(usage, output_bound=4) == Stated(11, None)


@pytest.mark.parametrize(
    ("usage", "stated"),
    [
        ({"prompt_tokens": 11}, Stated(11, None)),
        ({"prompt_tokens": 11, "completion_tokens": None}, Stated(11, None)),
        ({"prompt_tokens": 11, "completion_tokens": None, "total_tokens": None}, Stated(11, None)),
        ({"prompt_tokens": 11, "total_tokens": 5}, Stated(11, None)),
        ({"prompt_tokens": 11, "total_tokens": 9999}, Stated(11, None)),
        ({"prompt_tokens": 11, "completion_tokens": None, "total_tokens": 4108}, Stated(11, None)),
        ({"prompt_tokens": 11, "total_tokens": 11}, Stated(11, 0)),
        ({"prompt_tokens": 11, "completion_tokens": 0}, Stated(11, 0)),
        ({"completion_tokens": 5}, Stated(None, 5)),
        ({"prompt_tokens": None, "completion_tokens": 5, "total_tokens": 16}, Stated(None, 5)),
        ({"output_tokens": 5}, Stated(None, 5)),
        ({"total_tokens": 16}, Stated(total=16)),
    ],
)
def test_a_part_that_is_not_stated_is_unknown_and_not_zero(usage, stated):
    """The meter counts the part that is missing. An explicit zero is a number."""
    assert read_usage(usage) == read_usage(usage, output_bound=4096) == stated


REASONED = {"completion_tokens_details": {"reasoning_tokens": 94}}
REASONING = {"completion_tokens_details": {"reasoning_tokens": 9000}}
CACHED = {"prompt_tokens_details": {"cached_tokens": 200}}


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        pytest.param(chat(32, 9, total_tokens=135, **REASONED), Tokens(32, 103, reasoning=94), id="xAI"),
        pytest.param(chat(10, 5, total_tokens=215), Tokens(10, 205), id="Gemini"),
        pytest.param(
            {
                "input_tokens": 32,
                "output_tokens": 9,
                "total_tokens": 135,
                "output_tokens_details": {"reasoning_tokens": 94},
            },
            Tokens(32, 103, reasoning=94),
            id="responses",
        ),
        pytest.param(
            chat(10, 5, total_tokens=15, completion_tokens_details={"reasoning_tokens": 3}),
            Tokens(10, 5, reasoning=3),
            id="reasoning inside the output",
        ),
        pytest.param(
            chat(500, 500, total_tokens=1000, completion_tokens_details={"reasoning_tokens": 200}),
            Tokens(500, 500, reasoning=200),
            id="more reasoning inside the output",
        ),
        pytest.param(
            chat(10, 5, total_tokens=9015, completion_tokens_details={"reasoning_tokens": 9000}),
            Tokens(10, 9005, reasoning=9000),
            id="reasoning beyond the bound, to the token",
        ),
        pytest.param(
            chat(10, 5, total_tokens=9014, completion_tokens_details={"reasoning_tokens": 9000}),
            Tokens(10, 5, reasoning=5),
            id="a surplus beyond the bound that nothing explains",
        ),
        pytest.param(
            {"prompt_tokens": 10, "total_tokens": 9010, **REASONING}, Tokens(10, 9000, reasoning=9000), id="no output"
        ),
        pytest.param(chat(10, 96, total_tokens=4106), Tokens(10, 4096), id="as much as the call can use"),
        pytest.param(chat(10, 96, total_tokens=4107), Tokens(10, 96), id="one more than the call can use"),
        pytest.param(chat(100, 50, total_tokens=350, **CACHED), Tokens(300, 50, cached=200), id="cached beside"),
        pytest.param(chat(300, 50, total_tokens=350, **CACHED), Tokens(300, 50, cached=200), id="cached inside"),
        pytest.param(
            chat(100, 50, total_tokens=444, **CACHED, **REASONED),
            Tokens(300, 144, cached=200, reasoning=94),
            id="both beside",
        ),
        pytest.param(
            chat(7, 5, total_tokens=1112, cache_read_input_tokens=1000, cache_creation_input_tokens=100),
            Tokens(1107, 5, cached=1000),
            id="Anthropic's cache beside an OpenAI usage",
        ),
        pytest.param(
            chat(7, 5, total_tokens=112, cache_creation_input_tokens=100), Tokens(107, 5), id="cache written"
        ),
        pytest.param(
            chat(7, 5, total_tokens=112, prompt_tokens_details={"cache_write_tokens": 100}),
            Tokens(107, 5),
            id="cache written, OpenRouter",
        ),
        pytest.param(
            chat(7, 5, total_tokens=132, prompt_tokens_details={"cached_tokens": 20, "cache_creation_tokens": 100}),
            Tokens(127, 5, cached=20),
            id="cache read and written, LiteLLM",
        ),
        pytest.param(
            chat(10, 5, total_tokens=15, reasoning_tokens=3),
            Tokens(10, 5, reasoning=3),
            id="SGLang: a part",
        ),
        pytest.param(
            chat(10, 5, total_tokens=18, reasoning_tokens=3),
            Tokens(10, 8, reasoning=3),
            id="reasoning at the top",
        ),
    ],
)
def test_tokens_beside_the_output_are_not_free(usage, tokens):
    """What the total includes beyond input and output is output, or input if it is exactly the cached tokens."""
    assert read_tokens(usage) == tokens
    stated_output = usage.get("completion_tokens", usage.get("output_tokens"))
    assert read_usage(usage) == replace(read_usage(usage), output=stated_output)


def test_additional_members_of_an_upstream_are_output():
    """Perplexity writes them beside the total. If a server includes them in it, they are not charged twice."""
    extra = ("reasoning_tokens", "citation_tokens", "missing")
    usage = chat(33, 700, total_tokens=733, citation_tokens=200, reasoning_tokens=1000)
    assert read_usage(usage, output_bound=4096) == Stated(33, 700, reasoning=1000)
    for total in (733, 1933, 1733):
        read = read_usage({**usage, "total_tokens": total}, output_bound=1, extra=extra)
        assert (read, read.known_output) == (Stated(33, 700, reasoning=1000, extra=1200), 1900)
    assert read_usage(usage, extra=extra) == Stated(33, 700, reasoning=1000)  # nothing is generated
    assert read_usage({**usage, "citation_tokens": "many"}, output_bound=1, extra=extra) == Stated(
        33, 700, reasoning=1000, extra=1000
    )
    assert read_usage({"total_tokens": 16, "citation_tokens": 4}, output_bound=1, extra=extra) == Stated(
        total=16, extra=4
    )
    assert read_usage({"prompt_tokens": 16, "citation_tokens": 4}, output_bound=1, extra=extra) == Stated(
        16, None, extra=4
    )
    assert read_usage({**usage, "citation_tokens": REPORTED_MAX}, output_bound=1, extra=extra) is None


@pytest.mark.parametrize(
    ("usage", "stated"),
    [
        ({"input_tokens": 7, "output_tokens": 5}, Stated(7, 5)),
        (
            {
                "input_tokens": 7,
                "cache_creation_input_tokens": 100,
                "cache_read_input_tokens": 1000,
                "cache_creation": {"ephemeral_5m_input_tokens": 100},
                "output_tokens": 5,
                "output_tokens_details": {"thinking_tokens": 3},
            },
            Stated(1107, 5, cached=1000, reasoning=3),
        ),
        (
            {
                "input_tokens": 7,
                "cache_creation_input_tokens": None,
                "cache_read_input_tokens": 0,
                "output_tokens": 5,
            },
            Stated(7, 5),
        ),
        ({"cache_read_input_tokens": 9, "output_tokens": 5}, Stated(9, 5, cached=9)),
        ({"input_tokens": 0, "output_tokens": 0}, Stated(0, 0)),
        ({"input_tokens": 7, "output_tokens": 5, "output_tokens_details": "x"}, Stated(7, 5)),
        ({"input_tokens": -7, "output_tokens": 5}, None),
        ({"input_tokens": 7, "cache_read_input_tokens": "many", "output_tokens": 5}, None),
        ({"input_tokens": 7, "cache_creation_input_tokens": -1, "output_tokens": 5}, None),
        ({"input_tokens": 7, "output_tokens": 2.5}, None),
        ({"output_tokens": 5}, Stated(None, 5)),
        ({}, None),
    ],
)
def test_a_separate_cache_is_added_to_the_input(usage, stated):
    """At OpenAI cached tokens are a part of the input, at Anthropic they are separate."""
    assert read_usage(usage, output_bound=4096, has_separate_cache=True) == stated


@given(st.tuples(*[st.integers(0, 1_000_000)] * 4))
def test_the_input_is_the_sum_of_its_parts(parts):
    """All three parts are charged, and `cached` is the part that was read from the cache."""
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
    read = read_usage(dict(zip(names, parts, strict=True)), output_bound=4096, has_separate_cache=True)
    assert read == Stated(sum(parts[:3]), parts[3], cached=parts[2])


@pytest.mark.parametrize(
    ("first", "second", "largest"),
    [
        (Stated(20, 30), Stated(0, 0), Tokens(20, 30)),
        (Stated(20, 30), Stated(25, 10), Tokens(25, 30)),
        (Stated(11, None), Stated(None, 5), Tokens(11, 5)),
        (Stated(11, None), Stated(total=16), Tokens(11, 5)),
        (Stated(11, 5), Stated(total=16), Tokens(11, 5)),
        (Stated(total=16), Stated(total=20), Tokens(0, 20)),
        (Stated(total=16), Stated(0, 0), Tokens(0, 16)),
        (Stated(total=16), Stated(11, 0), Tokens(11, 5)),
        (Stated(total=16), Stated(0, 5), Tokens(0, 5)),
        (Stated(11, 5, cached=3), Stated(11, 5, reasoning=2), Tokens(11, 5, cached=3, reasoning=2)),
        (Stated(33, 1, extra=20), Stated(33, 700), Tokens(33, 720)),
        (Stated(33, extra=20), Stated(33, 700, extra=9), Tokens(33, 720)),
    ],
)
def test_of_two_usages_each_part_is_the_largest(first, second, largest):
    """In either order. So a later usage never takes away what an earlier one stated."""
    assert first.largest(second).tokens() == second.largest(first).tokens() == largest


@pytest.mark.parametrize(
    ("later", "earlier", "contradicts"),
    [
        (Stated(11, 5), Stated(11, 7), True),
        (Stated(11, 7), Stated(11, 5), False),
        (Stated(11, 0), Stated(11, 7), False),
        (Stated(11), Stated(11, 7), False),
        (Stated(total=16), Stated(total=18), True),
        (Stated(total=0), Stated(total=18), False),
        (Stated(11, 5), Stated(total=18), False),  # the total includes the input
    ],
)
def test_a_usage_that_falls_contradicts_the_earlier_one(later, earlier, contradicts):
    """The output or the total; each is compared with its own kind."""
    assert later.contradicts(earlier) is contradicts


def test_usages_of_several_choices_or_images_are_added():
    """Choices have the same input, images each their own. A part that one of them lacks is unknown in the sum."""
    first, second = Stated(11, 5, cached=3, reasoning=1), Stated(11, 7, cached=3, reasoning=2)
    assert first.plus(second, adds_input=False) == Stated(11, 12, cached=3, reasoning=3)
    assert first.plus(second, adds_input=True) == Stated(22, 12, cached=6, reasoning=3)
    assert first.plus(Stated(total=16), adds_input=False) == Stated(11, 21, cached=3, reasoning=1)
    assert first.plus(Stated(11), adds_input=True) == Stated(22, None, cached=3, reasoning=1)
    assert first.with_output_at_most(4) == Stated(11, 4, cached=3, reasoning=1)
    assert first.with_output_at_most(5) is first
    assert Stated(33, 5, extra=20).plus(Stated(33, 7, extra=9), adds_input=False) == Stated(33, 12, extra=29)
    assert Stated(33, 5, extra=20).with_output_at_most(4) == Stated(33, 4, extra=20)


def test_a_usage_is_found_beside_the_usual_place():
    """In a choice (Kimi), or in a member of the vendor (Groq)."""
    usage = chat()
    groq = {"usage": {}, "x_groq": {"id": "req_1", "usage": usage}, "x_other": "usage", "x_none": {"usage": None}}
    assert list(usages_beside(groq)) == [usage]
    choices: list = [{"usage": usage}, {"index": 5, "delta": {"usage": "x", "a": 1}}, 7, {"message": {"usage": None}}]
    assert usages_in_choices(choices) == [(0, usage), (5, "x"), (3, None)]
    assert without_usages(choices) == [{}, {"index": 5, "delta": {"a": 1}}, 7, {"message": {}}]
    for index in ("0", None, 0.0):  # then its place decides
        assert usages_in_choices([{"index": index, "usage": usage}]) == [(0, usage)]
    for other in (None, "usage", {"usage": usage}, [{"delta": "usage"}]):
        assert usages_in_choices(other) == []
    assert without_usages("text") == "text"


@given(usage=st.dictionaries(st.sampled_from(NAMES), values) | values)
def test_any_usage_gives_bounded_integers_or_none(usage):
    """Counts are integers from 0 to the accepted maximum, parts are at most their wholes, nothing is raised (T43)."""
    tokens = read_tokens(usage)
    if tokens is None:
        return
    for count in (tokens.input, tokens.output, tokens.cached, tokens.reasoning):
        assert type(count) is int
        assert 0 <= count <= REPORTED_MAX
    assert tokens.cached <= tokens.input
    assert tokens.reasoning <= tokens.output


@given(
    input_tokens=reported,
    output_tokens=reported,
    naming=st.sampled_from([("prompt", "completion"), ("input", "output")]),
)
def test_an_honest_usage_is_charged_exactly(input_tokens, output_tokens, naming):
    """The usage that clients see is the usage that is charged (I5), in either naming, after encoding as JSON."""
    first, second = naming
    usage = {
        f"{first}_tokens": input_tokens,
        f"{second}_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
    }
    tokens = read_tokens(json.loads(json.dumps(usage)))
    assert tokens == Tokens(input_tokens, output_tokens)
    assert charge_of(Exactly(tokens)) == Amount(input_tokens, output_tokens, 1)


@pytest.mark.parametrize(
    ("timings", "tokens"),
    [
        ({"prompt_n": 7, "cache_n": 4, "predicted_n": 5, "prompt_ms": 1.5}, Tokens(11, 5, cached=4)),
        ({"prompt_n": 7, "cache_n": 0, "predicted_n": 0}, Tokens(7, 0)),
        ({"prompt_n": 7, "predicted_n": 5}, None),  # older versions do not send cache_n
        ({"prompt_n": -7, "cache_n": 4, "predicted_n": 5}, None),
        ({"prompt_n": True, "cache_n": 4, "predicted_n": 5}, None),
        ({}, None),
        (None, None),
        ([7, 4, 5], None),
    ],
)
def test_complete_timings_of_llama_cpp_are_a_usage(timings, tokens):
    """The input is the sum of the tokens evaluated now and those in the cache."""
    stated = read_timings(timings)
    assert (None if stated is None else stated.tokens()) == tokens


@pytest.mark.parametrize(
    ("usage", "stated"),
    [
        (chat(11, 9, total_tokens=None, reasoning_tokens=94), Stated(11, 103, reasoning=94)),
        (chat(11, 9, total_tokens=None, reasoning_tokens=9), Stated(11, 9, reasoning=9)),
        (chat(11, 9, total_tokens=None, reasoning_tokens=4088), Stated(11, 9, reasoning=4088)),
        (chat(11, 5, total_tokens=16, reasoning_tokens=4000), Stated(11, 5, reasoning=4000)),
        (chat(32, 9, total_tokens=0, reasoning_tokens=94), Stated(32, 103, reasoning=94)),
        (chat(32, 9, total_tokens=40, reasoning_tokens=94), Stated(32, 103, reasoning=94)),
        (chat(32, 9, total_tokens=9999, reasoning_tokens=94), Stated(32, 103, reasoning=94)),
        (chat(32, 9, total_tokens=91, reasoning_tokens=94), Stated(32, 59, reasoning=94)),
    ],
)
def test_reasoning_that_is_more_than_the_output_is_no_part_of_it(usage, stated):
    """Unless a total says so, or it is more than the call could have used. A total that is wrong says nothing."""
    assert read_usage(usage, output_bound=4096) == stated


@pytest.mark.parametrize(
    ("usage", "stated"),
    [
        (chat(0, 5, total_tokens=16), Stated(0, 5)),
        (chat(0, 5, total_tokens=99, reasoning_tokens=94), Stated(0, 99, reasoning=94)),
        (chat(0, 0, total_tokens=16), Stated(total=16)),
        (chat(0, None, total_tokens=16), Stated(total=16)),
    ],
)
def test_a_total_beside_an_input_of_0_may_be_the_input(usage, stated):
    """The caller counts an input of 0, so the surplus is not charged again as output."""
    assert read_usage(usage, output_bound=4096) == stated


def test_a_total_alone_is_bounded():
    """By what the caller knows of the input and the output."""
    assert read_usage({"total_tokens": 60}, output_bound=50, total_bound=60) == Stated(total=60)
    assert read_usage({"total_tokens": 61}, output_bound=50, total_bound=60) is None
