"""A valid usage object is read exactly; an invalid one gives None.

The cases named u-… are those of docs/threats.md, "What is charged for strange usage". The true usage there is 11
tokens of input and 5 of output.
"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.usage import REPORTED_MAX, read_timings, read_tokens
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
        pytest.param(chat(11, 0), Tokens(11, 0), id="zero output"),
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
        pytest.param({"completion_tokens": 5}, id="no input"),
        pytest.param({"prompt_tokens": None, "completion_tokens": 5, "total_tokens": 16}, id="input null"),
        pytest.param({"output_tokens": 5}, id="no input, responses"),
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
    tokens = read_tokens(usage)
    assert tokens is None or tokens.input + tokens.output == 16


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
    assert read_timings(timings) == tokens
