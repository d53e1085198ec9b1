"""What was checked and priced is what is sent: the fields we decide, the bound on a call, and all else untouched.

wire §1.4 (which field an upstream really reads), §2.2 and §2.3 (asking for usage), §1.7 (what stays closed);
threats T24, T27, T31 to T37.
"""

import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import InvalidRequest, UpstreamError
from proxy.policy import Kind, Model, Upstream
from proxy.quotas import Demand
from proxy.usage import TOKENS_MAX
from proxy.wire import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    ENDPOINTS,
    RESPONSES,
    Call,
    Endpoint,
    demand_of,
    error_event,
    estimated_input,
    forwarded_body,
    parse_call,
)

KINDS = get_args(Kind)
GENERATING = [CHAT, COMPLETIONS, RESPONSES]
HUGE = 10**9


def body(**fields: object) -> bytes:
    """A request's body; the model is there unless the test says otherwise."""
    return json.dumps({"model": "m", **fields}).encode()


def parse(endpoint: Endpoint = CHAT, **fields: object) -> Call:
    """A call with these fields."""
    return parse_call(endpoint, body(**fields))


def refused(endpoint: Endpoint = CHAT, **fields: object) -> InvalidRequest:
    """The error with which these fields are refused."""
    with pytest.raises(InvalidRequest) as caught:
        parse(endpoint, **fields)
    assert caught.value.status == 400
    assert len(caught.value.message) < 300
    return caught.value


def model(kind: Kind = "openai", **known: int) -> Model:
    """A model behind an upstream of this kind, under another name there."""
    upstream = Upstream("up", "http://upstream.example/v1", None, kind)
    return Model("m", upstream, "real-m", **known)


def demand(call: Call, kind: Kind = "openai", **known: int) -> Demand:
    """What the call may use at the most, by the body that would be sent."""
    return demand_of(call, model(kind, **known), len(forwarded_body(call, model(kind))))


def sent(call: Call, kind: Kind = "openai", maximum: int | None = None) -> dict:
    """The document that an upstream of this kind gets."""
    return json.loads(forwarded_body(call, model(kind), maximum=maximum))


def ids(value: object) -> str | None:
    """Endpoints by their names, where a test is run for each."""
    return value.name if isinstance(value, Endpoint) else None


# ------------------------------------------------------------------------------------------------------- what is read


def test_a_call_says_what_was_asked() -> None:
    """The fields on which something is decided, and the document as it was read."""
    call = parse(CHAT, stream=True, n=3, messages=[], unknown={"a": 1})
    assert (call.endpoint, call.model, call.stream, call.choices) == (CHAT, "m", True, 3)
    assert call.document == {"model": "m", "stream": True, "n": 3, "messages": [], "unknown": {"a": 1}}
    plain = parse(EMBEDDINGS, input="x")
    assert (plain.stream, plain.choices) == (False, 1)


def test_the_endpoints_differ_in_two_ways() -> None:
    """All but embeddings generate; only chat and completions have to be asked for a stream's usage."""
    assert [endpoint.generates for endpoint in ENDPOINTS] == [True, True, False, True]
    assert [endpoint.has_usage_option for endpoint in ENDPOINTS] == [True, True, False, False]
    assert [endpoint.path for endpoint in ENDPOINTS] == [
        "/chat/completions",
        "/completions",
        "/embeddings",
        "/responses",
    ]


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=ids)
def test_a_model_must_be_named(endpoint: Endpoint) -> None:
    """Without one no quota can be found (T33)."""
    for missing in ({}, {"model": None}):
        with pytest.raises(InvalidRequest) as caught:
            parse_call(endpoint, json.dumps(missing).encode())
        assert (caught.value.param, caught.value.code) == ("model", "missing_required_parameter")


@pytest.mark.parametrize(
    "name",
    ["", 1, True, ["m"], {"a": "m"}, "m" * 257, "m" * 200_000, "a\nb", "a\rb", "\x1b[31m", "a\u2028b", "\ud800"],
)
def test_a_model_is_a_short_printable_name(name: object) -> None:
    """It goes into messages, logs and metrics: no control characters, no megabytes, no other types (T15, T33)."""
    assert refused(model=name).param == "model"


@pytest.mark.parametrize("name", ["m", "m" * 256, "M", "мodel", "../m", "org/m:tag@1", "模型"])
def test_a_model_is_taken_as_it_is_written(name: str) -> None:
    """No trimming and no folding: permission, price and metrics all use these very characters."""
    assert parse(model=name).model == name


@pytest.mark.parametrize("value", ["true", "false", 1, 0, [], {}, 1.0])
@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=ids)
def test_stream_is_true_or_false(endpoint: Endpoint, value: object) -> None:
    """Some servers read "true" as true and others refuse it (T35)."""
    error = refused(endpoint, stream=value)
    assert (error.param, error.code) == ("stream", "invalid_type")


def test_stream_may_be_left_out_or_null() -> None:
    """Both mean no."""
    assert [parse().stream, parse(stream=None).stream, parse(stream=False).stream] == [False, False, False]


@pytest.mark.parametrize("other", ["MODEL", "Stream", "Max_Tokens", "N", "Best_Of", "N_Predict", "Prompt", "Input"])
def test_a_lone_key_in_another_case_is_refused(other: str) -> None:
    """A server in Go reads `Max_Tokens` as the maximum, of which we would know nothing (T27)."""
    error = refused(**{other: 1})
    assert error.code == "invalid_json"
    assert f'"{other.lower()}" and "{other}"' in error.message


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=ids)
def test_refused_fields_are_refused_in_any_case(endpoint: Endpoint) -> None:
    """A list of closed fields is worth nothing if `API_BASE` gets around it."""
    for name in endpoint.refused:
        assert name in refused(endpoint, **{name.upper(): "x"}).message


# ----------------------------------------------------------------------------------------------------- what is closed


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=ids)
@pytest.mark.parametrize("name", ["api_base", "api_key", "base_url", "custom_host", "extra_headers"])
def test_no_field_changes_where_a_call_goes(endpoint: Endpoint, name: str) -> None:
    """Behind us may be another gateway that reads them (T24, CVE-2024-6587)."""
    for value in ("http://evil.example", {"a": "b"}, "", [], True):
        error = refused(endpoint, **{name: value})
        assert (error.param, error.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("endpoint", "name", "value"),
    [
        (RESPONSES, "background", True),
        (RESPONSES, "background", "true"),
        (RESPONSES, "previous_response_id", "resp_1"),
        (RESPONSES, "conversation", "conv_1"),
        (RESPONSES, "conversation", {"id": "conv_1"}),
        (RESPONSES, "prompt", {"id": "pmpt_1"}),
        (CHAT, "web_search_options", {}),
    ],
    ids=ids,
)
def test_what_costs_more_than_the_request_shows_is_refused(endpoint: Endpoint, name: str, value: object) -> None:
    """Stored history, jobs in the background and hosted tools: a wallet hole until they are metered (T20)."""
    error = refused(endpoint, **{name: value})
    assert (error.param, error.code) == (name, "unsupported_parameter")


def test_a_refused_field_may_say_that_it_is_not_used() -> None:
    """SDKs send null and false for what their user left alone."""
    parse(RESPONSES, background=False, previous_response_id=None, conversation=None, prompt=None)
    parse(CHAT, web_search_options=None)
    parse(CHAT, previous_response_id="mine", conversation="mine", background=True)  # nothing there reads them


@pytest.mark.parametrize(
    "tool", [{"type": "web_search"}, {"type": "mcp", "server_url": "http://x"}, {"type": None}, {}, "function", None]
)
def test_hosted_tools_of_responses_are_refused(tool: object) -> None:
    """They loop at the upstream, and each round costs tokens that nothing here bounds."""
    error = refused(RESPONSES, tools=[{"type": "function", "name": "f"}, tool])
    assert (error.param, error.code) == ("tools", "unsupported_parameter")


def test_tools_that_the_client_runs_are_open() -> None:
    """Functions and custom tools are text in and text out; what is no list is for the upstream to refuse."""
    parse(RESPONSES, tools=[{"type": "function", "name": "f"}, {"type": "custom", "name": "c"}])
    parse(RESPONSES, tools={"type": "web_search"})
    parse(CHAT, tools=[{"type": "function"}])


@pytest.mark.parametrize(
    "item",
    [{"type": "item_reference", "id": "i"}, {"id": "i"}, {"id": "i", "type": None}, {"id": "i", "role": "user"}],
)
def test_references_to_stored_items_are_refused(item: object) -> None:
    """What they stand for is input that the body does not show; their type may be left out."""
    error = refused(RESPONSES, input=[{"role": "user", "content": "hi"}, item])
    assert (error.param, error.code) == ("input", "unsupported_parameter")


def test_items_that_show_their_content_are_open() -> None:
    """Messages, with and without a type, and what a client plays back of an earlier answer."""
    items = [
        {"role": "user", "content": "hi"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "function_call_output", "call_id": "c", "output": "42"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        "no item",
    ]
    for given_input in (items, "hi", None, 7, {"type": "item_reference"}):
        assert parse(RESPONSES, input=given_input).document["input"] == given_input


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens", "n", "n_cmpl"])
@pytest.mark.parametrize("value", [-1, -(2**31), 2**31, 2**63, 10**30, 1.5, 1.0, True, False, "10", [], {}, HUGE + 1])
@pytest.mark.parametrize("endpoint", GENERATING, ids=ids)
def test_a_number_that_makes_no_sense_is_refused(endpoint: Endpoint, name: str, value: object) -> None:
    """T31: whatever another server would make of it, no hold is negative, and none leaves 64 bits."""
    assert refused(endpoint, **{name: value}).param == name


@pytest.mark.parametrize("name", ["n", "n_cmpl"])
def test_the_number_of_answers_is_bounded(name: str) -> None:
    """1 to 128, as OpenAI has it: an unbounded `n` has taken servers down (CVE-2026-34756)."""
    assert parse(**{name: 128}).choices == 128
    assert refused(**{name: 129}).code == "integer_above_max_value"
    assert refused(**{name: 0}).param == name
    assert parse(**{name: None}).choices == 1


def test_best_of_is_bounded_where_it_is_read() -> None:
    """On /completions; elsewhere it is a field that we don't know."""
    assert parse(COMPLETIONS, best_of=128).choices == 128
    for value in (129, 0, -1, True, "2", 1.5):
        assert refused(COMPLETIONS, best_of=value).param == "best_of"
    assert parse(CHAT, best_of="any").choices == 1


@pytest.mark.parametrize("value", [-2, 1.5, "10", True])
def test_n_predict_may_be_minus_one_but_not_less(value: object) -> None:
    """llama.cpp's own field, in which -1 means no end."""
    assert refused(n_predict=value).param == "n_predict"
    assert parse(n_predict=-1).document["n_predict"] == -1


def test_numbers_of_embeddings_are_not_read() -> None:
    """Nothing is generated, so there is nothing to decide, and unknown fields pass."""
    assert parse(EMBEDDINGS, input="x", n="any", max_tokens="any").choices == 1


@pytest.mark.parametrize(
    ("fields", "choices"),
    [
        ({}, 1),
        ({"prompt": None}, 1),
        ({"prompt": ""}, 1),
        ({"prompt": "one"}, 1),
        ({"prompt": []}, 1),
        ({"prompt": ["one"]}, 1),
        ({"prompt": ["one", "two", "three"]}, 3),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3], []]}, 3),
        ({"prompt": ["one", [1, 2]]}, 2),
        ({"prompt": {"prompt_string": "one"}}, 1),
        ({"prompt": "one", "n": 4}, 4),
        ({"prompt": "one", "best_of": 5}, 5),
        ({"prompt": "one", "n": 4, "best_of": 5}, 5),
        ({"prompt": "one", "n": 5, "best_of": 4}, 5),
        ({"prompt": "one", "n": 2, "n_cmpl": 6}, 6),
        ({"prompt": ["a", "b"], "n": 2, "best_of": 3}, 6),
        ({"prompt": [[1], [2]], "n": 3}, 6),
    ],
)
def test_completions_generate_for_each_prompt_the_best_of_several(fields: dict, choices: int) -> None:
    """Prompts × the larger of n and best_of; a list of numbers is one prompt of tokens (wire §1.4)."""
    assert parse(COMPLETIONS, **fields).choices == choices


def test_prompts_count_nowhere_else() -> None:
    """On chat a `prompt` is a field that nobody reads."""
    assert parse(CHAT, prompt=["a", "b"]).choices == 1
    assert parse(CHAT, n=7).choices == 7


# ---------------------------------------------------------------------------------------------------- what it may use

# The fields that each kind of upstream reads, by endpoint; the rest of the maxima it ignores.
READS = {
    ("openai", "chat"): {"max_completion_tokens", "max_tokens"},
    ("openai", "completions"): {"max_tokens"},
    ("openai", "responses"): {"max_output_tokens"},
    ("azure", "chat"): {"max_completion_tokens", "max_tokens"},
    ("azure", "completions"): {"max_tokens"},
    ("azure", "responses"): {"max_output_tokens"},
    ("anthropic", "chat"): {"max_completion_tokens", "max_tokens"},
    ("anthropic", "completions"): {"max_tokens"},
    ("anthropic", "responses"): {"max_output_tokens"},
    ("vllm", "chat"): {"max_completion_tokens", "max_tokens"},
    ("vllm", "completions"): {"max_tokens"},
    ("vllm", "responses"): {"max_output_tokens"},
    ("ollama", "chat"): {"max_tokens"},
    ("ollama", "completions"): {"max_tokens"},
    ("ollama", "responses"): {"max_output_tokens"},
    ("llamacpp", "chat"): {"n_predict", "max_completion_tokens", "max_tokens"},
    ("llamacpp", "completions"): {"n_predict", "max_completion_tokens", "max_tokens"},
    ("llamacpp", "responses"): {"max_output_tokens", "n_predict", "max_completion_tokens", "max_tokens"},
    ("simulator", "chat"): {"max_completion_tokens", "max_tokens"},
    ("simulator", "completions"): {"max_tokens"},
    ("simulator", "responses"): {"max_output_tokens"},
}
# What is written where none of them stands.
WRITES = {
    ("ollama", "chat"): "max_tokens",
    ("anthropic", "chat"): "max_tokens",
    ("llamacpp", "chat"): "n_predict",
    ("llamacpp", "completions"): "n_predict",
}
MAXIMA = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
everywhere = pytest.mark.parametrize(("kind", "endpoint"), [(k, e) for k in KINDS for e in GENERATING], ids=ids)


@everywhere
@pytest.mark.parametrize("name", MAXIMA)
def test_a_maximum_counts_only_where_it_is_read(kind: Kind, endpoint: Endpoint, name: str) -> None:
    """Believing a field that the upstream ignores would bound nothing (wire §1.4)."""
    call = parse(endpoint, **{name: 77})
    expected = 77 if name in READS[kind, endpoint.name] else demand(parse(endpoint), kind).want
    assert demand(call, kind).want == expected


@everywhere
def test_of_several_maxima_the_larger_counts(kind: Kind, endpoint: Endpoint) -> None:
    """Which one wins differs by version, so the careful one holds (T32)."""
    for larger in READS[kind, endpoint.name]:
        stated = dict.fromkeys(READS[kind, endpoint.name], 5) | {larger: 9000}
        assert demand(parse(endpoint, **stated), kind).want == 9000
        assert demand(parse(endpoint, **stated, n=3), kind).want == 27_000


@everywhere
def test_lowering_leaves_no_field_that_says_more(kind: Kind, endpoint: Endpoint) -> None:
    """Each field that this upstream reads says the lower number, and no other field is touched."""
    stated = dict.fromkeys(MAXIMA, 5000)
    lowered = sent(parse(endpoint, **stated), kind, maximum=300)
    assert {name for name in MAXIMA if lowered[name] == 300} == READS[kind, endpoint.name]
    assert {lowered[name] for name in MAXIMA} <= {300, 5000}


@everywhere
def test_lowering_raises_nothing(kind: Kind, endpoint: Endpoint) -> None:
    """Who asked for less in one of the fields keeps it."""
    reads = sorted(READS[kind, endpoint.name])
    stated = {name: 10 + 1000 * position for position, name in enumerate(reads)}
    lowered = sent(parse(endpoint, **stated), kind, maximum=300)
    assert {name: lowered[name] for name in reads} == {name: min(300, value) for name, value in stated.items()}


@everywhere
def test_a_maximum_is_written_where_none_stands(kind: Kind, endpoint: Endpoint) -> None:
    """In the field that this kind of upstream reads, and only when there is something to lower; null is none."""
    name = WRITES.get((kind, endpoint.name), endpoint.maxima[0])
    for call in (parse(endpoint), parse(endpoint, **dict.fromkeys(MAXIMA))):
        assert {field: value for field, value in sent(call, kind, maximum=300).items() if value == 300} == {name: 300}
        assert {field: value for field, value in sent(call, kind).items() if field in MAXIMA and value} == {}


def test_an_endless_maximum_bounds_nothing() -> None:
    """llama.cpp takes n_predict before all others, and -1 for no end; Ollama takes 0 for none too."""
    unstated = demand(parse(), "llamacpp").want
    assert demand(parse(n_predict=-1, max_tokens=1), "llamacpp").want == unstated > 1
    assert sent(parse(n_predict=-1, max_tokens=1), "llamacpp", maximum=300)["n_predict"] == 300
    assert demand(parse(max_tokens=0), "ollama").want == demand(parse(), "ollama").want > 0
    assert sent(parse(max_tokens=0), "ollama", maximum=300)["max_tokens"] == 300
    assert demand(parse(COMPLETIONS, max_tokens=0), "openai") == Demand(
        len(forwarded_body(parse(COMPLETIONS, max_tokens=0), model())), 0, 0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_asked_the_model_decides(kind: Kind) -> None:
    """Its configured maximum, else 4096, else what the upstream itself takes: 16 on OpenAI's /completions."""
    short = 4096 if kind in ("ollama", "llamacpp") else 16
    assert demand(parse(CHAT), kind).want == demand(parse(RESPONSES), kind).want == 4096
    assert demand(parse(COMPLETIONS), kind).want == short
    for endpoint in GENERATING:
        assert demand(parse(endpoint), kind, max_output_tokens=900).want == 900
        assert demand(parse(endpoint, n=3), kind, max_output_tokens=900).want == 2700


def test_null_is_not_the_default_of_completions() -> None:
    """vLLM takes 16 for a field left out, but all that is left of its context for null."""
    assert demand(parse(COMPLETIONS, max_tokens=None), "vllm").want == 4096


@pytest.mark.parametrize(
    ("fields", "want", "smallest"),
    [
        ({"max_tokens": 10}, 10, 10),
        ({"max_tokens": 1024}, 1024, 1024),
        ({"max_tokens": 5000}, 5000, 1024),
        ({"max_tokens": 5000, "n": 3}, 15_000, 3072),
        ({"max_tokens": 10, "n": 3}, 30, 30),
        ({"max_tokens": HUGE, "n": 128}, 128 * HUGE, 128 * 1024),
        ({"max_tokens": 0, "max_completion_tokens": 0}, 0, 0),
    ],
)
def test_the_smallest_answer_is_a_thousand_tokens_or_what_is_asked(fields: dict, want: int, smallest: int) -> None:
    """choices × min(asked, 1024): less than that isn't worth starting."""
    found = demand(parse(CHAT, **fields))
    assert (found.want, found.smallest) == (want, smallest)


def test_no_hold_leaves_64_bits() -> None:
    """Even the largest numbers, for a hundred thousand prompts, stay far inside (T31)."""
    prompts = [""] * 100_000
    found = demand(parse(COMPLETIONS, max_tokens=HUGE, n=128, prompt=prompts))
    assert found.want == TOKENS_MAX
    assert 0 < found.smallest <= found.want


def test_embeddings_want_no_output() -> None:
    """Limits on output alone don't bind them, whatever else the body says."""
    found = demand(parse(EMBEDDINGS, input=["a", "b"], max_tokens=50))
    assert (found.want, found.smallest) == (0, 0)
    assert demand(parse(EMBEDDINGS, input="x"), max_output_tokens=900).want == 0


# -------------------------------------------------------------------------------------------------------------- input


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=6), image=st.booleans()
)
def test_the_input_bound_is_never_less_than_the_bytes_of_the_text(texts: list[str], image: bool) -> None:
    """A token is at least a byte, so as many tokens as there are bytes of text can't be exceeded."""
    text_bytes = sum(len(text.encode()) for text in texts)
    parts = [{"type": "text", "text": text} for text in texts]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 999}}
    messages = [{"role": "user", "content": text} for text in texts]
    for call in (
        parse(CHAT, messages=messages),
        parse(CHAT, messages=[{"role": "user", "content": [*parts, *([picture] if image else [])]}]),
        parse(COMPLETIONS, prompt=texts),
        parse(EMBEDDINGS, input=texts),
        parse(RESPONSES, input=messages, instructions="".join(texts)),
    ):
        assert demand(call).input >= text_bytes + 8 * len(texts) * (call.endpoint in (CHAT, RESPONSES))


@given(tokens=st.lists(st.integers(0, 200_000), max_size=50))
def test_the_input_bound_covers_arrays_of_tokens(tokens: list[int]) -> None:
    """Prompts may come as numbers: one of a digit with its comma is still two bytes."""
    assert demand(parse(COMPLETIONS, prompt=tokens)).input >= len(tokens)
    assert demand(parse(EMBEDDINGS, input=[tokens, tokens])).input >= 2 * len(tokens)


def test_half_a_surrogate_pair_is_bounded_as_it_is_sent() -> None:
    """It can only be sent as an escape of six bytes."""
    assert demand(parse(COMPLETIONS, prompt="\ud800" * 50)).input >= 300


DATA = "data:image/png;base64," + "A" * 100_000


@pytest.mark.parametrize(
    ("call", "pictures"),
    [
        (parse(CHAT, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": DATA}}]}]), 1),
        (parse(CHAT, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": DATA}] * 3}]), 3),
        (parse(RESPONSES, input=[{"role": "user", "content": [{"type": "input_image", "image_url": DATA}]}]), 1),
    ],
)
def test_a_picture_has_a_price_instead_of_its_base64(call: Call, pictures: int) -> None:
    """A hundred thousand characters that no model reads as text: 1500 tokens each."""
    around = len(forwarded_body(call, model())) - pictures * len(DATA)
    assert demand(call).input == around + pictures * 1500


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": DATA},
        {"type": "text", "text": "x", "image_url": {"url": DATA}},
        {"type": "image_url", "image_url": {"url": "data:text/plain;base64," + "A" * 100_000}},
        {"type": "image_url", "image_url": {"url": "https://a.example/" + "A" * 100_000}},
        {"type": "image_url", "image_url": {"url": [DATA]}},
        {"type": "input_audio", "input_audio": {"data": "A" * 100_000}},
        {"image_url": {"url": DATA}},
    ],
)
def test_what_is_no_picture_is_counted_in_full(part: dict) -> None:
    """Nothing gets its price by looking like a picture."""
    call = parse(CHAT, messages=[{"role": "user", "content": [part]}])
    assert demand(call).input >= len(forwarded_body(call, model()))


@pytest.mark.parametrize(
    "messages", [None, 7, "hi", {}, [7, None, "x"], [{"content": None}], [{"content": [None, "x"]}]]
)
def test_messages_of_any_form_are_counted(messages: object) -> None:
    """What is wrong with them is for the upstream to say; here they are bytes (T34)."""
    call = parse(CHAT, messages=messages)
    assert demand(call).input == len(forwarded_body(call, model()))


# ------------------------------------------------------------------------------------------------------- what is sent

asks = pytest.mark.parametrize(
    ("options", "asks_for_usage", "adds_usage", "forwarded"),
    [
        ({}, False, True, {"include_usage": True}),
        ({"stream_options": None}, False, True, {"include_usage": True}),
        ({"stream_options": {}}, False, True, {"include_usage": True}),
        ({"stream_options": {"include_usage": False}}, False, True, {"include_usage": True}),
        ({"stream_options": {"include_usage": None}}, False, True, {"include_usage": True}),
        ({"stream_options": {"include_usage": True}}, True, False, {"include_usage": True}),
        (
            {"stream_options": {"include_obfuscation": False, "x": [1]}},
            False,
            True,
            {"include_obfuscation": False, "x": [1], "include_usage": True},
        ),
        ({"stream_options": "x"}, False, False, "x"),
        ({"stream_options": []}, False, False, []),
        ({"stream_options": 0}, False, False, 0),
        ({"stream_options": False}, False, False, False),
        ({"stream_options": True}, False, False, True),
    ],
)


@asks
@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS], ids=ids)
def test_usage_is_asked_for_where_the_client_did_not(
    endpoint: Endpoint, options: dict, asks_for_usage: bool, adds_usage: bool, forwarded: object
) -> None:
    """The other options stay, and what is no object is for the upstream to refuse (wire §2.3, T35)."""
    call = parse(endpoint, stream=True, **options)
    assert (call.asks_for_usage, call.adds_usage) == (asks_for_usage, adds_usage)
    assert sent(call)["stream_options"] == forwarded
    assert call.document.get("stream_options") == options.get("stream_options")


@asks
@pytest.mark.parametrize(
    ("endpoint", "stream"), [(CHAT, False), (COMPLETIONS, None), (EMBEDDINGS, True), (RESPONSES, True)], ids=ids
)
def test_usage_is_not_asked_for_where_it_comes_anyway(
    endpoint: Endpoint, stream: bool | None, options: dict, asks_for_usage: bool, adds_usage: bool, forwarded: object
) -> None:
    """Without a stream the option is an error at OpenAI, and /responses doesn't know it."""
    call = parse(endpoint, stream=stream, **options)
    assert not call.adds_usage
    document = sent(call)
    assert ("stream_options" in document) == bool(options)
    assert document.get("stream_options") == options.get("stream_options")


@pytest.mark.parametrize(
    "options", [{"include_usage": "false"}, {"include_usage": 7}, {"include_usage": []}, {"Include_Usage": False}]
)
@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS], ids=ids)
def test_whether_usage_is_asked_for_is_beyond_doubt(endpoint: Endpoint, options: dict) -> None:
    """vLLM reads "false" as false and Ollama reads `Include_Usage`: the usage would never come."""
    error = refused(endpoint, stream=True, stream_options={"include_usage": True, **options})
    assert (error.param, error.code) == ("stream_options.include_usage", "invalid_type")


def test_what_responses_make_of_stream_options_is_their_matter() -> None:
    """There it is a field that we don't know (T37)."""
    parse(RESPONSES, stream=True, stream_options={"include_usage": "false"})


def test_a_call_goes_out_under_the_name_of_the_upstream() -> None:
    """An alias is ours alone."""
    assert sent(parse()) == {"model": "real-m"}


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
DECIDED = {"model", "stream", "stream_options", "n", "n_cmpl", "best_of", "tools", "input", *MAXIMA}
unknown = st.dictionaries(
    st.sampled_from(["messages", "temperature", "seed", "user", "logit_bias", "metadata", "x", "y", "é"]), json_values
)
known = st.fixed_dictionaries(
    {},
    optional={
        "stream": st.booleans() | st.none(),
        "stream_options": st.sampled_from([None, {}, {"include_usage": False}, {"include_usage": True, "a": 1}, "x"]),
        "n": st.integers(1, 5),
        "max_tokens": st.integers(0, 5000) | st.none(),
        "max_completion_tokens": st.integers(0, 5000),
        "max_output_tokens": st.integers(0, 5000),
        "n_predict": st.integers(-1, 5000),
    },
)


@given(
    endpoint=st.sampled_from(ENDPOINTS),
    kind=st.sampled_from(KINDS),
    fields=st.tuples(unknown, known),
    maximum=st.none() | st.integers(1, 4000),
)
def test_only_what_we_decide_is_changed(endpoint: Endpoint, kind: Kind, fields: tuple, maximum: int | None) -> None:
    """The body that is sent says what the client's said, but for the model, the usage option and the maxima."""
    document = {**fields[0], **fields[1]}
    call = parse(endpoint, **document)
    forwarded = sent(call, kind, maximum)
    unchanged = {name: value for name, value in forwarded.items() if name not in ("model", "stream_options", *MAXIMA)}
    assert unchanged == {name: value for name, value in document.items() if name in unchanged}
    assert repr(unchanged) == repr({name: document[name] for name in unchanged})
    assert document.keys() <= forwarded.keys()
    if maximum is not None and endpoint.generates:
        stated = [forwarded[name] for name in READS[kind, endpoint.name] if forwarded.get(name) is not None]
        assert stated
        assert all(0 <= value <= maximum for value in stated)
        assert not (kind == "ollama" and 0 in stated)
    else:
        assert all(forwarded.get(name) == document.get(name) for name in MAXIMA)


# -------------------------------------------------------------------------------------------------- errors in streams


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, EMBEDDINGS], ids=ids)
def test_an_error_in_a_stream_of_chunks_is_a_chunk(endpoint: Endpoint) -> None:
    """`data: {"error": …}` makes every SDK raise (wire §2.1); closing early would look like success."""
    error = UpstreamError("It broke\nhalf way.")
    event = error_event(endpoint, error)
    assert event == b"data: " + json.dumps(error.body(), separators=(",", ":")).encode() + b"\n\n"


def test_an_error_in_a_response_has_both_forms() -> None:
    """Older SDKs raise at an `error` member, newer ones at the event's name."""
    error = UpstreamError("It broke\nhalf way.")
    first, second, *rest = error_event(RESPONSES, error).split(b"\n")
    assert (first, rest) == (b"event: error", [b"", b""])
    flat = {"type": "error", "code": "upstream_error", "message": "It broke\nhalf way.", "param": None}
    assert json.loads(second.removeprefix(b"data: ")) == {**flat, **error.body()}


def test_an_estimate_of_the_input_counts_text_by_its_bytes_and_pictures_by_their_price() -> None:
    """Four bytes to a token; the base64 of a picture is not read by the model."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 40_000}}
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": [picture]}]}).encode()
    assert estimated_input(parse_call(CHAT, body), len(body)) == -(-(len(body) - 40_022) // 4) + 1500
    assert estimated_input(parse_call(CHAT, b'{"model": "m"}'), 45) == 12


@pytest.mark.parametrize(
    "part", [{"type": "input_file", "file_id": "file_1"}, {"type": "file", "file": {"file_id": "file_1"}}]
)
@pytest.mark.parametrize(("endpoint", "field"), [(CHAT, "messages"), (RESPONSES, "input")])
def test_stored_files_are_refused(part: dict, endpoint: Endpoint, field: str) -> None:
    """Their tokens are not in the request, and they may be somebody else's."""
    body = json.dumps({"model": "m", field: [{"role": "user", "content": [part]}]}).encode()
    with pytest.raises(InvalidRequest, match="file_id"):
        parse_call(endpoint, body)


def test_pictures_have_their_price_wherever_they_stand() -> None:
    """In the output of a tool, and beside an empty `messages`, which is not this endpoint's field."""
    pictures = [{"type": "input_image", "image_url": "https://x/y.png"}] * 20
    for item in ({"role": "user", "content": pictures}, {"type": "function_call_output", "output": pictures}):
        body = json.dumps({"model": "m", "messages": [], "input": [item]}).encode()
        assert estimated_input(parse_call(RESPONSES, body), 0) == 30_000


def test_a_model_s_name_has_no_blanks_around_it() -> None:
    """A quota would not know it, and some upstreams would."""
    with pytest.raises(InvalidRequest, match="blanks"):
        parse_call(CHAT, b'{"model": " gpt-4o"}')


def test_a_call_lets_go_of_its_body_and_keeps_what_it_says() -> None:
    """Once it is sent: a long answer must not keep megabytes of prompt."""
    call = parse_call(CHAT, b'{"model": "m", "stream": true, "n": 2, "messages": ["long"]}')
    call.forget()
    assert not call.document
    assert (call.model, call.stream, call.choices) == ("m", True, 2)
