"""What was checked is what is sent: the fields on which something is decided, and all else untouched.

wire §1.4 (which field an upstream really reads), §2.2 and §2.3 (asking for usage), §1.7 (what stays closed);
threats T24, T27, T31 to T37.
"""

import json
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import InvalidRequest, UpstreamError
from proxy.formats.endpoints import (
    CHAT,
    COMPACT,
    COMPLETIONS,
    COUNT_TOKENS,
    EMBEDDINGS,
    IMAGE_EDITS,
    IMAGES,
    INPUT_TOKENS,
    MESSAGES,
    METERED,
    MODERATIONS,
    RESPONSES,
    SPEECH,
    TRANSCRIPTIONS,
    Endpoint,
)
from proxy.formats.multipart import Form, FormReader
from proxy.formats.request import (
    Request,
    error_event,
    forwarded_body,
    forwarded_model,
    is_endless,
    maximum_fields,
    parse_form_request,
    parse_request,
)
from proxy.policy.policy import Allow, Kind, Model, Upstream

KINDS = get_args(Kind)
GENERATING = [CHAT, COMPLETIONS, RESPONSES, MESSAGES]
HUGE = 10**9


def body(**fields: object) -> bytes:
    """A request's body; the model is there unless the test says otherwise."""
    return json.dumps({"model": "m", **fields}).encode()


def parse(endpoint: Endpoint = CHAT, **fields: object) -> Request:
    """A call with these fields."""
    return parse_request(endpoint, body(**fields))


def refused(endpoint: Endpoint = CHAT, **fields: object) -> InvalidRequest:
    """The error with which these fields are refused."""
    with pytest.raises(InvalidRequest) as caught:
        parse(endpoint, **fields)
    assert caught.value.status == 400
    assert len(caught.value.message) < 300
    return caught.value


def model(kind: Kind = "openai") -> Model:
    """A model behind an upstream of this kind, under another name there."""
    return Model("m", Upstream("up", "http://upstream.example/v1", None, kind), "real-m")


def sent(request: Request, kind: Kind = "openai", maximum: int | None = None) -> dict:
    """The document that an upstream of this kind gets."""
    return json.loads(forwarded_body(request, model(kind), maximum=maximum))


def ids(value: object) -> str | None:
    """Endpoints by their names, where a test is run for each."""
    return value.name if isinstance(value, Endpoint) else None


# ------------------------------------------------------------------------------------------------------- what is read


def test_a_call_says_what_was_asked() -> None:
    """The fields on which something is decided, and the document as it was read."""
    request = parse(CHAT, stream=True, n=3, messages=[], unknown={"a": 1})
    assert (request.endpoint, request.model, request.stream, request.choices) == (CHAT, "m", True, 3)
    assert request.document == {"model": "m", "stream": True, "n": 3, "messages": [], "unknown": {"a": 1}}
    plain = parse(EMBEDDINGS, input="x")
    assert (plain.stream, plain.choices) == (False, 1)


@pytest.mark.parametrize("endpoint", [each for each in METERED if each.default_model is None], ids=ids)
def test_a_model_must_be_named(endpoint: Endpoint) -> None:
    """Without one no quota can be found (T33)."""
    for missing in ({}, {"model": None}):
        with pytest.raises(InvalidRequest) as caught:
            parse_request(endpoint, json.dumps(missing).encode())
        assert (caught.value.param, caught.value.code) == ("model", "missing_required_parameter")


@pytest.mark.parametrize("endpoint", [MODERATIONS, IMAGES], ids=ids)
def test_where_none_is_named_the_upstream_s_own_is_meant(endpoint: Endpoint) -> None:
    """And it is the one that is sent, so that what was decided on is what is used."""
    for missing in ({}, {"model": None}):
        request = parse_request(endpoint, json.dumps(missing).encode())
        assert request.model == endpoint.default_model
        assert sent(request)["model"] == "real-m"
    assert parse(endpoint).model == "m"


@pytest.mark.parametrize(
    ("fields", "is_streamed"),
    [
        ({}, False),
        ({"stream": True}, False),
        ({"stream_format": "audio"}, False),
        ({"stream_format": "sse"}, True),
        ({"stream_format": ["sse"]}, False),
    ],
)
def test_speech_says_otherwise_that_it_is_to_be_streamed(fields: dict, is_streamed: bool) -> None:
    """`stream` means nothing to it."""
    assert parse(SPEECH, **fields).stream is is_streamed


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../m",
        "m/..",
        "gpt-4o/../o3",
        "a/./b",
        "m\\..\\x",
        1,
        True,
        ["m"],
        {"a": "m"},
        "m" * 257,
        "m" * 200_000,
        "a\nb",
        "a\rb",
        "\x1b[31m",
        "a\u2028b",
        "\ud800",
    ],
)
def test_a_model_is_a_short_printable_name(name: object) -> None:
    """It goes into messages, logs and metrics: no control characters, no megabytes, no other types (T15, T33)."""
    assert refused(model=name).param == "model"


@pytest.mark.parametrize("name", ["m", "m" * 256, "M", "мodel", "..m", "m..", "org/.m", "org/m:tag@1", "模型"])
def test_a_model_is_taken_as_it_is_written(name: str) -> None:
    """No trimming and no folding: permission, price and metrics all use these very characters."""
    assert parse(model=name).model == name


@pytest.mark.parametrize("value", ["true", "false", 1, 0, [], {}, 1.0])
@pytest.mark.parametrize("endpoint", METERED, ids=ids)
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


@pytest.mark.parametrize("endpoint", METERED, ids=ids)
def test_refused_fields_are_refused_in_any_case(endpoint: Endpoint) -> None:
    """A list of closed fields is worth nothing if `API_BASE` gets around it."""
    for name in endpoint.refused:
        assert name in refused(endpoint, **{name.upper(): "x"}).message


# ----------------------------------------------------------------------------------------------------- what is closed


@pytest.mark.parametrize("endpoint", METERED, ids=ids)
@pytest.mark.parametrize(
    "name",
    "api_base api_key base_url custom_host extra_body extra_headers fallbacks context_window_fallbacks models preset "
    "content_policy_fallbacks context_window_fallback_dict custom_llm_provider deployment_id model_list "
    "user_config kv_transfer_params".split(),
)
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
        (RESPONSES, "conversation", "conv_1"),
        (RESPONSES, "conversation", {"id": "conv_1"}),
        (RESPONSES, "prompt", {"id": "pmpt_1"}),
        (CHAT, "data_sources", [{"type": "azure_search"}]),
        (CHAT, "plugins", [{"id": "web"}]),
        (CHAT, "search_parameters", {"mode": "on"}),
        *((endpoint, "plugins", [{"id": "web"}]) for endpoint in (RESPONSES, COMPLETIONS, MESSAGES, EMBEDDINGS)),
        (CHAT, "enable_search", True),
        (RESPONSES, "request_id", "resp_of_somebody_else"),
        (COMPACT, "request_id", "resp_of_somebody_else"),
    ],
    ids=ids,
)
def test_what_costs_more_than_the_request_shows_is_refused(endpoint: Endpoint, name: str, value: object) -> None:
    """Stored history and jobs in the background: a wallet hole until they are metered (T20)."""
    error = refused(endpoint, **{name: value})
    assert (error.param, error.code) == (name, "unsupported_parameter")


def test_a_refused_field_may_say_that_it_is_not_used() -> None:
    """SDKs send null and false for what their user left alone."""
    parse(RESPONSES, background=False, previous_response_id=None, conversation=None, prompt=None)
    assert parse(RESPONSES, previous_response_id="").previous_response_id is None
    parse(CHAT, previous_response_id="mine", conversation="mine", background=True)  # nothing there reads them


@pytest.mark.parametrize(
    "item",
    [
        {"type": "item_reference", "id": "i"},
        {"id": "i"},
        {"id": "i", "type": None},
        {"id": "i", "role": "user"},
        {"type": "image_generation_call", "id": "ig_1"},
        {"type": "image_generation_call", "id": "ig_1", "result": None},
    ],
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
        {"type": "image_generation_call", "id": "ig_1", "status": "completed", "result": "iVBORw0KGgo="},
        "no item",
    ]
    for given_input in (items, "hi", None, 7, {"type": "item_reference"}):
        assert parse(RESPONSES, input=given_input).document["input"] == given_input


@pytest.mark.parametrize("endpoint", [RESPONSES, COMPACT, INPUT_TOKENS], ids=ids)
def test_what_a_call_goes_on_from_is_a_name(endpoint: Endpoint) -> None:
    """It is looked up, so it is nothing else; whose it is, is decided where the books are."""
    assert parse(endpoint, previous_response_id="resp_1").previous_response_id == "resp_1"
    assert parse(CHAT, previous_response_id="resp_1").previous_response_id is None
    for strange in (["resp_1"], {"id": "resp_1"}, 1, False):
        assert refused(endpoint, previous_response_id=strange).param == "previous_response_id"


def test_an_upstream_keeps_responses_only_where_it_may() -> None:
    """OpenAI's keeps them unless it is told not to."""
    forbidden = replace(model(), allow=Allow(store=False))
    for said, may, sent_on in ((None, False, False), (False, False, False), (None, True, None), (True, True, True)):
        document = {} if said is None else {"store": said}
        forwarded = forwarded_body(parse(RESPONSES, **document), model() if may else forbidden)
        assert json.loads(forwarded).get("store") is sent_on
    assert "store" not in sent(parse(CHAT))


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


@pytest.mark.parametrize("name", ["n", "n_cmpl"])
def test_a_response_is_one_answer(name: str) -> None:
    """llama.cpp writes several, and says of a stream what one of them used."""
    assert parse(RESPONSES, input="x", **{name: 1}).choices == 1
    assert refused(RESPONSES, input="x", **{name: 2}).code == "unsupported_parameter"


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
    request = parse(COMPLETIONS, **fields)
    assert request.choices == choices
    prompt = fields.get("prompt")
    assert request.has_several_prompts is (isinstance(prompt, list) and len(prompt) > 1 and prompt[0] != 1)


def test_prompts_may_come_as_what_models_make_of_them() -> None:
    """vLLM answers each of them, beside those that are texts."""
    for embedded, choices in (("one", 1), (["one", "two"], 3), ([], 1), (None, 1)):
        request = parse(COMPLETIONS, prompt="three", prompt_embeds=embedded)
        assert (request.choices, request.has_several_prompts) == (choices, choices > 1)


def test_prompts_count_nowhere_else() -> None:
    """On chat a `prompt` is a field that nobody reads."""
    assert parse(CHAT, prompt=["a", "b"]).choices == 1
    assert not parse(CHAT, prompt=["a", "b"]).has_several_prompts
    assert parse(CHAT, n=7).choices == 7


# --------------------------------------------------------------------------------------------------------- the maxima

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
    **{(kind, "messages"): {"max_tokens"} for kind in KINDS},
}
# What is written where none of them stands.
WRITES = {
    ("ollama", "chat"): "max_tokens",
    ("llamacpp", "chat"): "n_predict",
    ("llamacpp", "completions"): "n_predict",
}
MAXIMA = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
targets = pytest.mark.parametrize(("kind", "endpoint"), [(k, e) for k in KINDS for e in GENERATING], ids=ids)


@targets
def test_lowering_leaves_no_field_that_says_more(kind: Kind, endpoint: Endpoint) -> None:
    """Each field that this upstream reads says the lower number, and no other field is touched."""
    stated = dict.fromkeys(MAXIMA, 5000)
    lowered = sent(parse(endpoint, **stated), kind, maximum=300)
    assert {name for name in MAXIMA if lowered[name] == 300} == READS[kind, endpoint.name]
    assert {lowered[name] for name in MAXIMA} <= {300, 5000}


@targets
def test_lowering_raises_nothing(kind: Kind, endpoint: Endpoint) -> None:
    """Who asked for less in one of the fields keeps it."""
    reads = sorted(READS[kind, endpoint.name])
    stated = {name: 10 + 1000 * position for position, name in enumerate(reads)}
    lowered = sent(parse(endpoint, **stated), kind, maximum=300)
    assert {name: lowered[name] for name in reads} == {name: min(300, value) for name, value in stated.items()}


@targets
def test_a_maximum_is_written_where_none_stands(kind: Kind, endpoint: Endpoint) -> None:
    """In the field that this kind of upstream reads, and only when there is something to lower; null is none."""
    name = WRITES.get((kind, endpoint.name), endpoint.maxima[0])
    for request in (parse(endpoint), parse(endpoint, **dict.fromkeys(MAXIMA))):
        assert {field: value for field, value in sent(request, kind, maximum=300).items() if value == 300} == {
            name: 300
        }
        assert {field: value for field, value in sent(request, kind).items() if field in MAXIMA and value} == {}


@targets
def test_the_fields_that_are_read_are_named(kind: Kind, endpoint: Endpoint) -> None:
    """So that whoever asks what a call may use believes no others; the first is the one that is written."""
    fields = maximum_fields(endpoint, kind)
    assert set(fields) == READS[kind, endpoint.name]
    assert fields[0] == WRITES.get((kind, endpoint.name), endpoint.maxima[0])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_maximum_is_lowered_too(kind: Kind) -> None:
    """-1 has no end anywhere, and 0 none at Ollama; elsewhere 0 is the least that one can ask for."""
    assert is_endless(-1, kind)
    assert is_endless(0, kind) == (kind == "ollama")
    assert not is_endless(1, kind)


def test_an_endless_maximum_becomes_one() -> None:
    """llama.cpp takes -1 for no end and Ollama 0: the smaller number would be the larger one."""
    lowered = sent(parse(n_predict=-1, max_tokens=1), "llamacpp", maximum=300)
    assert (lowered["n_predict"], lowered["max_tokens"]) == (300, 1)
    assert sent(parse(max_tokens=0), "ollama", maximum=300)["max_tokens"] == 300
    assert sent(parse(max_tokens=0), "openai", maximum=300)["max_tokens"] == 0


def test_nothing_is_lowered_where_nothing_is_generated() -> None:
    """Embeddings have no maximum."""
    for kind in KINDS:
        assert maximum_fields(EMBEDDINGS, kind) == ()
        assert sent(parse(EMBEDDINGS, input="x", max_tokens=5000), kind, maximum=300)["max_tokens"] == 5000


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
    ],
)


@asks
@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS], ids=ids)
def test_usage_is_asked_for_where_the_client_did_not(
    endpoint: Endpoint, options: dict, asks_for_usage: bool, adds_usage: bool, forwarded: object
) -> None:
    """The other options stay (wire §2.3)."""
    request = parse(endpoint, stream=True, **options)
    assert (request.asks_for_usage, request.adds_usage) == (asks_for_usage, adds_usage)
    assert sent(request)["stream_options"] == forwarded
    assert request.document.get("stream_options") == options.get("stream_options")


@asks
@pytest.mark.parametrize(
    ("endpoint", "stream"), [(CHAT, False), (COMPLETIONS, None), (EMBEDDINGS, True), (RESPONSES, True)], ids=ids
)
def test_usage_is_not_asked_for_where_it_comes_anyway(
    endpoint: Endpoint, stream: bool | None, options: dict, asks_for_usage: bool, adds_usage: bool, forwarded: object
) -> None:
    """Without a stream the option is an error at OpenAI, and /responses doesn't know it."""
    request = parse(endpoint, stream=stream, **options)
    assert not request.adds_usage
    document = sent(request)
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


@pytest.mark.parametrize("options", ["x", [], 0, False, True])
@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS], ids=ids)
def test_what_asks_for_usage_is_an_object(endpoint: Endpoint, options: object) -> None:
    """llama.cpp passes over what is none, and so would we over the usage (T35)."""
    error = refused(endpoint, stream=True, stream_options=options)
    assert (error.param, error.code) == ("stream_options", "invalid_type")
    assert parse(RESPONSES, stream_options=options).document["stream_options"] == options


@pytest.mark.parametrize(
    ("options", "is_added"),
    [
        ({}, True),
        ({"stream_options": None}, True),
        ({"stream_options": {"include_usage": False}}, True),
        ({"stream_options": {"include_usage": True}}, True),
        ({"stream_options": {"include_usage": True, "continuous_usage_stats": False}}, True),
        ({"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, False),
        ({"stream_options": {"continuous_usage_stats": True}}, False),
        ({"n": 1}, True),
        ({"n": 2}, False),
        ({"prompt": ["a", "b"]}, None),
    ],
)
@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS], ids=ids)
def test_vllm_is_asked_for_the_usage_so_far(endpoint: Endpoint, options: dict, is_added: bool | None) -> None:
    """On every chunk, so that a stream which is cut is known to the token.

    Of several choices each chunk has the usage of its own, so that would tell less than nothing. (`prompt` makes
    several only on /completions.)
    """
    request = parse(endpoint, stream=True, **options)
    is_added = endpoint is CHAT if is_added is None else is_added
    assert request.adds_running_usage("vllm") == is_added
    forwarded, own = sent(request, "vllm")["stream_options"], options.get("stream_options")
    if is_added:
        assert forwarded == {**(own or {}), "include_usage": True, "continuous_usage_stats": True}
    else:
        assert forwarded == ({**(own or {}), "include_usage": True} if request.adds_usage else own)
    assert request.document.get("stream_options") == own


@pytest.mark.parametrize(
    ("fields", "is_added"),
    [
        ({}, True),
        ({"timings_per_token": None}, True),
        ({"timings_per_token": False}, True),
        ({"timings_per_token": True}, False),
        ({"stream_options": {"include_usage": True}}, True),
        ({"n": 2}, False),
        ({"stream": False}, False),
    ],
)
@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS], ids=ids)
def test_llama_cpp_is_asked_for_its_timings_so_far(endpoint: Endpoint, fields: dict, is_added: bool) -> None:
    """They say the tokens of the input and the output, as vLLM's usage so far does."""
    request = parse(endpoint, **{"stream": True, **fields})
    assert request.adds_running_usage("llamacpp") == is_added
    assert sent(request, "llamacpp").get("timings_per_token") == (
        True if is_added else fields.get("timings_per_token")
    )
    assert "continuous_usage_stats" not in str(sent(request, "llamacpp"))


@pytest.mark.parametrize("endpoint", [RESPONSES, EMBEDDINGS], ids=ids)
def test_elsewhere_llama_cpp_is_not_asked(endpoint: Endpoint) -> None:
    """There the usage comes by itself."""
    assert not parse(endpoint, stream=True).adds_running_usage("llamacpp")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("vllm", "llamacpp")])
def test_nobody_else_is_asked_for_it(kind: Kind) -> None:
    """The option is vLLM's own; what a client wrote by itself is for the upstream to judge."""
    assert not parse(stream=True).adds_running_usage(kind)
    assert sent(parse(stream=True), kind)["stream_options"] == {"include_usage": True}
    own = {"include_usage": True, "continuous_usage_stats": True}
    assert sent(parse(stream=True, stream_options=own), kind)["stream_options"] == own


@pytest.mark.parametrize(
    ("endpoint", "stream"), [(CHAT, False), (COMPLETIONS, None), (EMBEDDINGS, True), (RESPONSES, True)], ids=ids
)
def test_there_is_no_usage_so_far_of_what_is_no_stream_of_chunks(endpoint: Endpoint, stream: bool | None) -> None:
    """Whole answers, embeddings and responses go to vLLM without the option."""
    request = parse(endpoint, stream=stream)
    assert not request.adds_running_usage("vllm")
    assert "stream_options" not in sent(request, "vllm")


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
unknown = st.dictionaries(
    st.sampled_from(["messages", "temperature", "seed", "user", "logit_bias", "metadata", "x", "y", "é"]), json_values
)
known = st.fixed_dictionaries(
    {},
    optional={
        "stream": st.booleans() | st.none(),
        "stream_options": st.sampled_from([None, {}, {"include_usage": False}, {"include_usage": True, "a": 1}]),
        "n": st.integers(1, 5),
        "max_tokens": st.integers(0, 5000) | st.none(),
        "max_completion_tokens": st.integers(0, 5000),
        "max_output_tokens": st.integers(0, 5000),
        "n_predict": st.integers(-1, 5000),
    },
)


@given(
    endpoint=st.sampled_from(METERED),
    kind=st.sampled_from(KINDS),
    fields=st.tuples(unknown, known),
    maximum=st.none() | st.integers(1, 4000),
)
def test_only_what_we_decide_is_changed(endpoint: Endpoint, kind: Kind, fields: tuple, maximum: int | None) -> None:
    """The body that is sent says what the client's said, but for the model, the usage option and the maxima."""
    document = {**fields[0], **fields[1]}
    if endpoint.is_of_responses:
        document.pop("n", None)  # one answer, or it is refused
    request = parse(endpoint, **document)
    forwarded = sent(request, kind, maximum)
    ours = ("model", "stream_options", "timings_per_token", *MAXIMA)
    unchanged = {name: value for name, value in forwarded.items() if name not in ours}
    assert unchanged == {name: value for name, value in document.items() if name in unchanged}
    assert repr(unchanged) == repr({name: document[name] for name in unchanged})
    assert document.keys() <= forwarded.keys()
    if maximum is not None and endpoint.shows_output:
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


def test_a_voice_is_one_that_everybody_has() -> None:
    """One of the account's own is somebody's."""
    assert refused(SPEECH, input="x", voice={"id": "voice_1"}).param == "voice"
    assert parse(SPEECH, input="x", voice="alloy").document["voice"] == "alloy"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_file", "file_id": "file_1"},
        {"type": "file", "file": {"file_id": "file_1"}},
        {"type": "image_url", "image_url": {"file_id": "file_1"}},
        {"type": "input_file", "file_id": None, "File_ID": "file_1"},
    ],
)
@pytest.mark.parametrize(("endpoint", "field"), [(CHAT, "messages"), (RESPONSES, "input")])
def test_stored_files_are_refused(part: dict, endpoint: Endpoint, field: str) -> None:
    """Their tokens are not in the request, and they may be somebody else's."""
    body = json.dumps({"model": "m", field: [{"role": "user", "content": [part]}]}).encode()
    with pytest.raises(InvalidRequest, match="file_id"):
        parse_request(endpoint, body)


@pytest.mark.parametrize(
    "item",
    [
        {"type": "computer_call_output", "output": {"type": "computer_screenshot", "file_id": "file_1"}},
        {"type": "function_call_output", "output": [{"type": "input_image", "file_id": "file_1"}]},
        {"type": "input_image", "file_id": "file_1"},
        {"role": "user", "content": {"type": "input_file", "file_id": "file_1"}},
    ],
)
def test_stored_files_are_found_where_no_list_is_around_them(item: dict) -> None:
    """A picture of a screen, and what some servers take without a message."""
    assert refused(RESPONSES, input=[item]).param == "file_id"
    assert refused(RESPONSES, input=item).param == "file_id"


def test_a_model_s_name_has_no_blanks_around_it() -> None:
    """A quota would not know it, and some upstreams would."""
    with pytest.raises(InvalidRequest, match="blanks"):
        parse_request(CHAT, b'{"model": " gpt-4o"}')


def test_a_body_is_freed_and_what_it_said_stays() -> None:
    """After the upstream has answered, a long stream must not keep megabytes of prompt in memory.

    Every answer that a request gives stays the same; only the body itself may no longer be asked for.
    """
    body = b"""{"model": "m", "stream": true, "n": 2, "messages": ["long"],
        "stream_options": {"include_usage": true, "continuous_usage_stats": true}, "timings_per_token": true}"""
    request, freed = parse_request(CHAT, body), parse_request(CHAT, body)
    freed.body.free()
    with pytest.raises(AssertionError, match="freed"):
        _ = freed.document
    assert (freed.model, freed.stream, freed.choices) == ("m", True, 2)
    for one in (request, freed):
        assert one.asks_for_usage
        assert one.asks_for_continuous_usage
        assert one.asks_for_timings
        assert not one.adds_usage
        assert not one.adds_running_usage("vllm")


# -------------------------------------------------------------------------------------------------------------- forms


def form(*parts: str, files: tuple[str, ...] = ("file",)) -> Form:
    """A form with these fields, each as "name=value", and with these files."""
    return form_and_body(parts, files)[0]


def form_and_body(parts: tuple[str, ...], files: tuple[str, ...]) -> tuple[Form, bytes]:
    """The same, and its bytes."""
    heads = [(f'name="{name}"; filename="f"', "sound") for name in files]
    heads += [(f'name="{name}"', value) for name, _, value in (part.partition("=") for part in parts)]
    body = (
        "".join(f"--b\r\nContent-Disposition: form-data; {head}\r\n\r\n{value}\r\n" for head, value in heads)
        + "--b--"
    )
    reader = FormReader("multipart/form-data; boundary=b")
    reader.feed(body.encode())
    return reader.end(), body.encode()


def test_a_form_says_what_json_would() -> None:
    """The fields on which something is decided, in the types that JSON has for them."""
    request = parse_form_request(
        IMAGE_EDITS, form("model=m", "n=3", "stream=true", "prompt=a fox", "size=auto", files=("image[]",))
    )
    assert (request.model, request.stream, request.choices) == ("m", True, 3)
    assert request.document == {"model": "m", "n": 3, "stream": True, "prompt": "a fox", "size": "auto"}
    assert parse_form_request(TRANSCRIPTIONS, form("model=m", "stream=false")).stream is False
    assert parse_form_request(IMAGE_EDITS, form("prompt=x")).model == "dall-e-2"


@pytest.mark.parametrize(
    ("parts", "files", "param"),
    [
        ((), ("file",), "model"),
        (("model= m",), ("file",), "model"),
        (("model=m", "model[]=big"), ("file",), "model"),
        (("model=m", "Model=big"), ("file",), "model"),
        (("model=m", "MODEL[x]=big"), ("file",), "model"),
        (("model=m", " model=big"), ("file",), "model"),
        (("model=m", "model [x]=big"), ("file",), "model"),
        (("model=m",), ("model",), "model"),
        (("model=m",), ("Stream",), "stream"),
        (("model=m", "stream=1"), ("file",), "stream"),
        (("model=m", "stream=True"), ("file",), "stream"),
        (("model=m", "n=x"), ("image",), "n"),
        (("model=m", "n=\u0663"), ("image",), "n"),
        (("model=m", "n=0"), ("image",), "n"),
        (("model=m", "n=1000000000000"), ("image",), "n"),
        (("model=m", "svg[model]=big"), ("image",), "svg"),
        (("model=m", "api_base=http://evil.example"), ("image",), "api_base"),
        (("model=m", "images[][file_id]=file_1"), ("image",), "images[][file_id]"),
        (("model=m", "mask[FILE_ID]=file_1"), ("image",), "mask[FILE_ID]"),
    ],
)
def test_a_form_has_no_second_way_to_say_it(parts: tuple[str, ...], files: tuple[str, ...], param: str) -> None:
    """Some servers read `model[]` as `model`, and others don't: what decides is written plainly or refused."""
    with pytest.raises(InvalidRequest) as caught:
        parse_form_request(
            IMAGE_EDITS if param in ("n", "svg", "api_base") else TRANSCRIPTIONS, form(*parts, files=files)
        )
    assert caught.value.param == param


def test_a_form_is_sent_with_the_upstream_s_name_of_the_model() -> None:
    """In its place; before all others where there is none."""
    read, body = form_and_body(("a=1", "model=m", "b=2"), ("file",))
    start, end, name = forwarded_model(parse_form_request(TRANSCRIPTIONS, read), model())
    assert body[:start] + name + body[end:] == body.replace(b"\r\nm\r\n", b"\r\nreal-m\r\n")
    read, body = form_and_body(("prompt=x",), ("image",))
    start, end, part = forwarded_model(parse_form_request(IMAGE_EDITS, read), model())
    again = FormReader("multipart/form-data; boundary=b")
    again.feed(body[:start] + part + body[end:])
    assert [(field.name, field.value) for field in again.end().fields] == [("model", "real-m"), ("prompt", "x")]


# ------------------------------------------------------------------------------------------------ Azure's deployments


@pytest.mark.parametrize("said", [{"model": "other"}, {"model": None}, {"model": 7}, {}])
def test_a_deployment_in_the_path_is_the_model(said: dict) -> None:
    """Whatever the body says, which is written over: what is counted is what is sent."""
    of = parse_request(CHAT, json.dumps({"messages": [], **said}).encode(), deployment="mine")
    assert of.model == "mine"
    assert json.loads(forwarded_body(of, model()))["model"] == "real-m"


def test_a_deployment_is_the_model_of_a_form() -> None:
    """As of JSON, also where it names none."""
    for parts in (("model=other",), ()):
        assert parse_form_request(TRANSCRIPTIONS, form(*parts), deployment="mine").model == "mine"


@pytest.mark.parametrize("name", [".", "..", "mine/../yours", " x", "x\n", ""])
def test_a_deployment_is_a_name(name: str) -> None:
    """As a model in a body is; what leads elsewhere in a path is none."""
    with pytest.raises(InvalidRequest):
        parse_request(CHAT, b"{}", deployment=name)
    assert refused(model=name).param == "model"


def test_an_option_that_is_withheld_is_not_written() -> None:
    """The client's own stays."""
    for options, sent in ((None, None), ({"include_obfuscation": False}, {"include_obfuscation": False})):
        of = replace(parse(stream=True, stream_options=options), is_option_withheld=True)
        assert not of.adds_usage
        assert not of.adds_running_usage("vllm")
        assert json.loads(forwarded_body(of, model()))["stream_options"] == sent


# ----------------------------------------------------------------------------------------------- Anthropic's messages


@pytest.mark.parametrize("endpoint", [MESSAGES, COUNT_TOKENS], ids=ids)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"container": "container_1"}, "container"),
        ({"mcp_servers": [{"type": "url", "url": "https://mcp.example"}]}, "mcp_servers"),
        ({"inference_geo": "us"}, "inference_geo"),
        ({"messages": [{"role": "user", "content": [{"type": "container_upload", "file_id": "file_1"}]}]}, "file_id"),
    ],
)
def test_what_a_message_does_not_show_is_refused(endpoint: Endpoint, fields: dict, param: str) -> None:
    """Containers, servers and tools that the upstream runs: input that nobody could bound (T20)."""
    error = refused(endpoint, **fields)
    assert (error.param, error.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize("kind", ["image", "document"])
def test_files_of_a_message_are_found_at_any_depth(kind: str) -> None:
    """In a block, in what a tool gave back, and in a document that is made of blocks."""
    stored = {"type": kind, "source": {"type": "file", "file_id": "file_1"}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [stored]}
    document = {"type": "document", "source": {"type": "content", "content": [stored]}}
    for block in (stored, result, document):
        assert refused(MESSAGES, messages=[{"role": "user", "content": [block]}]).param == "file_id"


def test_a_tool_of_one_s_own_is_open_on_messages() -> None:
    """Whether or not it says its type; and what we don't know passes."""
    tools = [{"name": "f", "input_schema": {}}, {"type": "custom", "name": "g", "input_schema": {}}]
    request = parse(MESSAGES, tools=tools, max_tokens=5, thinking={"type": "adaptive"}, what_comes_next=1)
    assert sent(request, "anthropic") == {**request.document, "model": "real-m"}


def test_an_error_in_a_stream_of_a_message_is_an_event_of_anthropic_s() -> None:
    """Its SDK raises at the event's name, and reads `error`."""
    event = error_event(MESSAGES, UpstreamError("It broke."))
    head, data = event.split(b"\n", 1)
    assert head == b"event: error"
    error = {"type": "api_error", "message": "It broke.", "code": "upstream_error"}
    assert json.loads(data.removeprefix(b"data: ")) == {"type": "error", "error": error}
