"""The upstream gets what was checked: the fields that the proxy decides on, and all other fields unchanged.

wire §1.4 (which field an upstream really reads), §2.2 and §2.3 (asking for usage), §1.7 (what is refused);
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
from proxy.policy.catalog import Allow, Kind, Model, Upstream

KINDS = get_args(Kind)
GENERATING = [CHAT, COMPLETIONS, RESPONSES, MESSAGES]
HUGE = 10**9


def body(**fields: object) -> bytes:
    """A request's body with these fields; the model is "m" by default."""
    return json.dumps({"model": "m", **fields}).encode()


def parse(endpoint: Endpoint = CHAT, **fields: object) -> Request:
    """A parsed request with these fields."""
    return parse_request(endpoint, body(**fields))


def refused(endpoint: Endpoint = CHAT, **fields: object) -> InvalidRequest:
    """The error with which these fields are refused."""
    with pytest.raises(InvalidRequest) as caught:
        parse(endpoint, **fields)
    assert caught.value.status == 400
    assert len(caught.value.message) < 300
    return caught.value


def model(kind: Kind = "openai") -> Model:
    """A model at an upstream of this kind, which calls it "real-m"."""
    return Model("m", Upstream("up", "http://upstream.example/v1", None, kind), "real-m")


def sent(request: Request, kind: Kind = "openai", maximum: int | None = None) -> dict:
    """The document that an upstream of this kind receives."""
    return json.loads(forwarded_body(request, model(kind), maximum=maximum))


def ids(value: object) -> str | None:
    """Names endpoints in the ids of tests."""
    return value.name if isinstance(value, Endpoint) else None


# ------------------------------------------------------------------------------------------------------------ parsing


def test_a_request_has_the_checked_fields_and_the_whole_document() -> None:
    """The document is as it was parsed, with unknown fields."""
    request = parse(CHAT, stream=True, n=3, messages=[], unknown={"a": 1})
    assert (request.endpoint, request.model, request.stream, request.choices) == (CHAT, "m", True, 3)
    assert request.document == {"model": "m", "stream": True, "n": 3, "messages": [], "unknown": {"a": 1}}
    plain = parse(EMBEDDINGS, input="x")
    assert (plain.stream, plain.choices) == (False, 1)


@pytest.mark.parametrize("endpoint", [each for each in METERED if each.default_model is None], ids=ids)
def test_a_model_must_be_named(endpoint: Endpoint) -> None:
    """Without a model no quota can be found (T33)."""
    for missing in ({}, {"model": None}):
        with pytest.raises(InvalidRequest) as caught:
            parse_request(endpoint, json.dumps(missing).encode())
        assert (caught.value.param, caught.value.code) == ("model", "missing_required_parameter")


@pytest.mark.parametrize("endpoint", [MODERATIONS, IMAGES], ids=ids)
def test_without_a_model_the_upstream_s_default_is_used(endpoint: Endpoint) -> None:
    """It is written into the forwarded body, so the model that was checked is the model that answers."""
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
def test_speech_is_streamed_if_stream_format_is_sse(fields: dict, is_streamed: bool) -> None:
    """`stream` has no meaning on /audio/speech."""
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
def test_a_model_must_be_a_short_printable_name(name: object) -> None:
    """It appears in messages, logs and metrics: no control characters, no megabytes, no other types (T15, T33)."""
    assert refused(model=name).param == "model"


@pytest.mark.parametrize("name", ["m", "m" * 256, "M", "мodel", "..m", "m..", "org/.m", "org/m:tag@1", "模型"])
def test_a_model_s_name_is_not_changed(name: str) -> None:
    """It is neither trimmed nor casefolded: permission, quotas and metrics all use exactly these characters."""
    assert parse(model=name).model == name


@pytest.mark.parametrize("value", ["true", "false", 1, 0, [], {}, 1.0])
@pytest.mark.parametrize("endpoint", METERED, ids=ids)
def test_stream_must_be_true_or_false(endpoint: Endpoint, value: object) -> None:
    """Some servers read the text "true" as true, and others refuse it (T35)."""
    error = refused(endpoint, stream=value)
    assert (error.param, error.code) == ("stream", "invalid_type")


def test_stream_may_be_absent_or_null() -> None:
    """Both mean false."""
    assert [parse().stream, parse(stream=None).stream, parse(stream=False).stream] == [False, False, False]


@pytest.mark.parametrize("other", ["MODEL", "Stream", "Max_Tokens", "N", "Best_Of", "N_Predict", "Prompt", "Input"])
def test_a_single_key_in_another_case_is_refused(other: str) -> None:
    """A server in Go reads `Max_Tokens` as the maximum, which the proxy would not know (T27)."""
    error = refused(**{other: 1})
    assert error.code == "invalid_json"
    assert f'"{other.lower()}" and "{other}"' in error.message


@pytest.mark.parametrize("endpoint", METERED, ids=ids)
def test_refused_fields_are_refused_in_any_case(endpoint: Endpoint) -> None:
    """`API_BASE` must not bypass the list of refused fields."""
    for name in endpoint.refused:
        assert name in refused(endpoint, **{name.upper(): "x"}).message


# ----------------------------------------------------------------------------------------------------- refused fields


@pytest.mark.parametrize("endpoint", METERED, ids=ids)
@pytest.mark.parametrize(
    "name",
    "api_base api_key base_url custom_host extra_body extra_headers fallbacks context_window_fallbacks models preset "
    "content_policy_fallbacks context_window_fallback_dict custom_llm_provider deployment_id model_list "
    "user_config kv_transfer_params".split(),
)
def test_no_field_changes_where_a_call_goes(endpoint: Endpoint, name: str) -> None:
    """The upstream may be another gateway that reads them (T24, CVE-2024-6587)."""
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
def test_fields_that_cost_more_than_the_request_shows_are_refused(
    endpoint: Endpoint, name: str, value: object
) -> None:
    """Stored history, searches and background jobs cost tokens that no quota would count (T20)."""
    error = refused(endpoint, **{name: value})
    assert (error.param, error.code) == (name, "unsupported_parameter")


def test_a_refused_field_may_be_null_or_false() -> None:
    """SDKs send null and false for options that their user did not set."""
    parse(RESPONSES, background=False, previous_response_id=None, conversation=None, prompt=None)
    assert parse(RESPONSES, previous_response_id="").previous_response_id is None
    parse(CHAT, previous_response_id="mine", conversation="mine", background=True)  # unknown fields on chat


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
    """Their content is input that the body does not show. Their type may be absent."""
    error = refused(RESPONSES, input=[{"role": "user", "content": "hi"}, item])
    assert (error.param, error.code) == ("input", "unsupported_parameter")


def test_items_that_show_their_content_are_accepted() -> None:
    """Messages, with and without a type, and items of an earlier answer that a client sends back."""
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
def test_previous_response_id_must_be_a_string(endpoint: Endpoint) -> None:
    """It is looked up in the ledger, which knows the owner of the response."""
    assert parse(endpoint, previous_response_id="resp_1").previous_response_id == "resp_1"
    assert parse(CHAT, previous_response_id="resp_1").previous_response_id is None
    for strange in (["resp_1"], {"id": "resp_1"}, 1, False):
        assert refused(endpoint, previous_response_id=strange).param == "previous_response_id"


def test_store_false_is_written_if_the_operator_forbids_storing() -> None:
    """OpenAI stores a response unless the request says `store: false`."""
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
    """T31: no hold is negative, and none exceeds 64 bits."""
    assert refused(endpoint, **{name: value}).param == name


@pytest.mark.parametrize("name", ["n", "n_cmpl"])
def test_the_number_of_answers_is_1_to_128(name: str) -> None:
    """As at OpenAI. An unbounded `n` has crashed servers (CVE-2026-34756)."""
    assert parse(**{name: 128}).choices == 128
    assert refused(**{name: 129}).code == "integer_above_max_value"
    assert refused(**{name: 0}).param == name
    assert parse(**{name: None}).choices == 1


@pytest.mark.parametrize("name", ["n", "n_cmpl"])
def test_a_request_to_responses_has_one_answer(name: str) -> None:
    """llama.cpp generates several, but its stream reports the usage of one."""
    assert parse(RESPONSES, input="x", **{name: 1}).choices == 1
    assert refused(RESPONSES, input="x", **{name: 2}).code == "unsupported_parameter"


def test_best_of_is_bounded_on_completions() -> None:
    """On other endpoints it is an unknown field."""
    assert parse(COMPLETIONS, best_of=128).choices == 128
    for value in (129, 0, -1, True, "2", 1.5):
        assert refused(COMPLETIONS, best_of=value).param == "best_of"
    assert parse(CHAT, best_of="any").choices == 1


@pytest.mark.parametrize("value", [-2, 1.5, "10", True])
def test_n_predict_may_be_minus_one_but_not_less(value: object) -> None:
    """In llama.cpp's own field -1 means "no maximum"."""
    assert refused(n_predict=value).param == "n_predict"
    assert parse(n_predict=-1).document["n_predict"] == -1


def test_maxima_of_embeddings_are_not_checked() -> None:
    """Embeddings generate nothing, so these are unknown fields, which are forwarded."""
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
def test_completions_generate_the_larger_of_n_and_best_of_for_each_prompt(fields: dict, choices: int) -> None:
    """A list of numbers is one prompt of tokens (wire §1.4)."""
    request = parse(COMPLETIONS, **fields)
    assert request.choices == choices
    prompt = fields.get("prompt")
    assert request.has_several_prompts is (isinstance(prompt, list) and len(prompt) > 1 and prompt[0] != 1)


def test_prompts_may_be_embeddings() -> None:
    """vLLM completes each of them in addition to those that are texts."""
    for embedded, choices in (("one", 1), (["one", "two"], 3), ([], 1), (None, 1)):
        request = parse(COMPLETIONS, prompt="three", prompt_embeds=embedded)
        assert (request.choices, request.has_several_prompts) == (choices, choices > 1)


def test_prompts_count_only_on_completions() -> None:
    """On chat `prompt` is an unknown field."""
    assert parse(CHAT, prompt=["a", "b"]).choices == 1
    assert not parse(CHAT, prompt=["a", "b"]).has_several_prompts
    assert parse(CHAT, n=7).choices == 7


# --------------------------------------------------------------------------------------------------------- the maxima

# The maximum fields that each kind of upstream reads, by endpoint. It ignores the others.
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
# The field that is written if the client stated none, where it is not the endpoint's first.
WRITES = {
    ("ollama", "chat"): "max_tokens",
    ("llamacpp", "chat"): "n_predict",
    ("llamacpp", "completions"): "n_predict",
}
MAXIMA = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
targets = pytest.mark.parametrize(("kind", "endpoint"), [(k, e) for k in KINDS for e in GENERATING], ids=ids)


@targets
def test_every_maximum_field_that_the_upstream_reads_is_lowered(kind: Kind, endpoint: Endpoint) -> None:
    """No other field is changed."""
    stated = dict.fromkeys(MAXIMA, 5000)
    lowered = sent(parse(endpoint, **stated), kind, maximum=300)
    assert {name for name in MAXIMA if lowered[name] == 300} == READS[kind, endpoint.name]
    assert {lowered[name] for name in MAXIMA} <= {300, 5000}


@targets
def test_a_maximum_that_is_already_lower_stays(kind: Kind, endpoint: Endpoint) -> None:
    """Each field is compared by itself."""
    reads = sorted(READS[kind, endpoint.name])
    stated = {name: 10 + 1000 * position for position, name in enumerate(reads)}
    lowered = sent(parse(endpoint, **stated), kind, maximum=300)
    assert {name: lowered[name] for name in reads} == {name: min(300, value) for name, value in stated.items()}


@targets
def test_a_maximum_is_written_if_the_client_stated_none(kind: Kind, endpoint: Endpoint) -> None:
    """In the first field that this kind of upstream reads, and only if there is a maximum to write. Null is none."""
    name = WRITES.get((kind, endpoint.name), endpoint.maxima[0])
    for request in (parse(endpoint), parse(endpoint, **dict.fromkeys(MAXIMA))):
        assert {field: value for field, value in sent(request, kind, maximum=300).items() if value == 300} == {
            name: 300
        }
        assert {field: value for field, value in sent(request, kind).items() if field in MAXIMA and value} == {}


@targets
def test_maximum_fields_are_those_that_the_upstream_reads(kind: Kind, endpoint: Endpoint) -> None:
    """The estimate believes only these fields. The first is the one that is written."""
    fields = maximum_fields(endpoint, kind)
    assert set(fields) == READS[kind, endpoint.name]
    assert fields[0] == WRITES.get((kind, endpoint.name), endpoint.maxima[0])


@pytest.mark.parametrize("kind", KINDS)
def test_minus_one_means_no_maximum_and_so_does_0_at_ollama(kind: Kind) -> None:
    """At other upstreams 0 is the smallest maximum."""
    assert is_endless(-1, kind)
    assert is_endless(0, kind) == (kind == "ollama")
    assert not is_endless(1, kind)


def test_a_number_that_means_no_maximum_is_replaced_by_one() -> None:
    """-1 at llama.cpp and 0 at Ollama are the smaller numbers, but they ask for more."""
    lowered = sent(parse(n_predict=-1, max_tokens=1), "llamacpp", maximum=300)
    assert (lowered["n_predict"], lowered["max_tokens"]) == (300, 1)
    assert sent(parse(max_tokens=0), "ollama", maximum=300)["max_tokens"] == 300
    assert sent(parse(max_tokens=0), "openai", maximum=300)["max_tokens"] == 0


def test_no_maximum_is_written_for_embeddings() -> None:
    """They generate nothing, so no field of theirs is a maximum."""
    for kind in KINDS:
        assert maximum_fields(EMBEDDINGS, kind) == ()
        assert sent(parse(EMBEDDINGS, input="x", max_tokens=5000), kind, maximum=300)["max_tokens"] == 5000


# ------------------------------------------------------------------------------------------------- the forwarded body

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
def test_usage_of_a_stream_is_asked_for_if_the_client_did_not(
    endpoint: Endpoint, options: dict, asks_for_usage: bool, adds_usage: bool, forwarded: object
) -> None:
    """The client's other options stay (wire §2.3)."""
    request = parse(endpoint, stream=True, **options)
    assert (request.asks_for_usage, request.adds_usage) == (asks_for_usage, adds_usage)
    assert sent(request)["stream_options"] == forwarded
    assert request.document.get("stream_options") == options.get("stream_options")


@asks
@pytest.mark.parametrize(
    ("endpoint", "stream"), [(CHAT, False), (COMPLETIONS, None), (EMBEDDINGS, True), (RESPONSES, True)], ids=ids
)
def test_usage_is_not_asked_for_if_it_comes_without(
    endpoint: Endpoint, stream: bool | None, options: dict, asks_for_usage: bool, adds_usage: bool, forwarded: object
) -> None:
    """Without a stream the option is an error at OpenAI, and /responses doesn't have it."""
    request = parse(endpoint, stream=stream, **options)
    assert not request.adds_usage
    document = sent(request)
    assert ("stream_options" in document) == bool(options)
    assert document.get("stream_options") == options.get("stream_options")


@pytest.mark.parametrize(
    "options", [{"include_usage": "false"}, {"include_usage": 7}, {"include_usage": []}, {"Include_Usage": False}]
)
@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS], ids=ids)
def test_include_usage_must_be_clear_to_every_server(endpoint: Endpoint, options: dict) -> None:
    """vLLM reads the text "false" as false, and Ollama reads `Include_Usage`: the usage would never come."""
    error = refused(endpoint, stream=True, stream_options={"include_usage": True, **options})
    assert (error.param, error.code) == ("stream_options.include_usage", "invalid_type")


@pytest.mark.parametrize("options", ["x", [], 0, False, True])
@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS], ids=ids)
def test_stream_options_must_be_an_object(endpoint: Endpoint, options: object) -> None:
    """llama.cpp ignores options of another type, and would then send no usage (T35)."""
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
    """On every chunk, so the usage is exact even if the stream is cut.

    With several choices a chunk has only the usage of its own choice, so the option is not added. (Several prompts
    make several choices only on /completions.)
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
    """They state the tokens of the input and the output, like vLLM's usage so far."""
    request = parse(endpoint, **{"stream": True, **fields})
    assert request.adds_running_usage("llamacpp") == is_added
    assert sent(request, "llamacpp").get("timings_per_token") == (
        True if is_added else fields.get("timings_per_token")
    )
    assert "continuous_usage_stats" not in str(sent(request, "llamacpp"))


@pytest.mark.parametrize("endpoint", [RESPONSES, EMBEDDINGS], ids=ids)
def test_llama_cpp_is_not_asked_on_responses_and_embeddings(endpoint: Endpoint) -> None:
    """There the usage comes without asking."""
    assert not parse(endpoint, stream=True).adds_running_usage("llamacpp")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("vllm", "llamacpp")])
def test_other_kinds_are_not_asked_for_the_usage_so_far(kind: Kind) -> None:
    """The option is vLLM's own. If a client wrote it itself, it is forwarded."""
    assert not parse(stream=True).adds_running_usage(kind)
    assert sent(parse(stream=True), kind)["stream_options"] == {"include_usage": True}
    own = {"include_usage": True, "continuous_usage_stats": True}
    assert sent(parse(stream=True, stream_options=own), kind)["stream_options"] == own


@pytest.mark.parametrize(
    ("endpoint", "stream"), [(CHAT, False), (COMPLETIONS, None), (EMBEDDINGS, True), (RESPONSES, True)], ids=ids
)
def test_the_usage_so_far_is_asked_for_only_in_streams_of_chunks(endpoint: Endpoint, stream: bool | None) -> None:
    """Whole answers, embeddings and responses are requested from vLLM without the option."""
    request = parse(endpoint, stream=stream)
    assert not request.adds_running_usage("vllm")
    assert "stream_options" not in sent(request, "vllm")


def test_stream_options_are_not_checked_on_responses() -> None:
    """There `include_usage` is an unknown field (T37)."""
    parse(RESPONSES, stream=True, stream_options={"include_usage": "false"})


def test_a_request_is_forwarded_with_the_upstream_s_name_of_the_model() -> None:
    """The upstream does not know the proxy's aliases."""
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
def test_only_the_proxy_s_own_fields_are_changed(
    endpoint: Endpoint, kind: Kind, fields: tuple, maximum: int | None
) -> None:
    """The forwarded body equals the client's, except for the model, the usage options and the maxima."""
    document = {**fields[0], **fields[1]}
    if endpoint.is_of_responses:
        document.pop("n", None)  # more than one answer is refused there
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
    """`data: {"error": …}` makes every SDK raise (wire §2.1). A stream that ends early would look like success."""
    error = UpstreamError("It broke\nhalf way.")
    event = error_event(endpoint, error)
    assert event == b"data: " + json.dumps(error.body(), separators=(",", ":")).encode() + b"\n\n"


def test_an_error_in_a_stream_of_responses_has_both_forms() -> None:
    """Older SDKs raise if there is a member `error`, newer ones if the event has that name."""
    error = UpstreamError("It broke\nhalf way.")
    first, second, *rest = error_event(RESPONSES, error).split(b"\n")
    assert (first, rest) == (b"event: error", [b"", b""])
    flat = {"type": "error", "code": "upstream_error", "message": "It broke\nhalf way.", "param": None}
    assert json.loads(second.removeprefix(b"data: ")) == {**flat, **error.body()}


def test_a_custom_voice_is_refused() -> None:
    """It is stored in the account that all users share, and belongs to one of them."""
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
    """Their tokens are not in the request, and they may be another user's."""
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
def test_stored_files_are_found_outside_of_lists(item: dict) -> None:
    """A screenshot, and parts that some servers accept without a message or a list around them."""
    assert refused(RESPONSES, input=[item]).param == "file_id"
    assert refused(RESPONSES, input=item).param == "file_id"


def test_a_model_s_name_must_not_have_blanks_around_it() -> None:
    """No quota would match it, but some upstreams would accept it."""
    with pytest.raises(InvalidRequest, match="blanks"):
        parse_request(CHAT, b'{"model": " gpt-4o"}')


def test_a_request_keeps_its_properties_when_its_body_is_freed() -> None:
    """A long stream must not keep megabytes of prompt in memory after the upstream has answered.

    All properties stay the same; only the body itself may no longer be read.
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
    """The same form, and its bytes."""
    heads = [(f'name="{name}"; filename="f"', "sound") for name in files]
    heads += [(f'name="{name}"', value) for name, _, value in (part.partition("=") for part in parts)]
    body = (
        "".join(f"--b\r\nContent-Disposition: form-data; {head}\r\n\r\n{value}\r\n" for head, value in heads)
        + "--b--"
    )
    reader = FormReader("multipart/form-data; boundary=b")
    reader.feed(body.encode())
    return reader.end(), body.encode()


def test_a_form_is_parsed_like_json() -> None:
    """The checked fields get the types that they have in JSON."""
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
def test_a_form_with_an_ambiguous_field_is_refused(
    parts: tuple[str, ...], files: tuple[str, ...], param: str
) -> None:
    """Some servers read `model[]` as `model`, and others don't: a checked field has exactly one spelling."""
    with pytest.raises(InvalidRequest) as caught:
        parse_form_request(
            IMAGE_EDITS if param in ("n", "svg", "api_base") else TRANSCRIPTIONS, form(*parts, files=files)
        )
    assert caught.value.param == param


def test_a_form_is_forwarded_with_the_upstream_s_name_of_the_model() -> None:
    """It replaces the client's; if there is none, a part with it is inserted before all others."""
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
def test_a_deployment_in_the_path_overrides_the_model_in_the_body(said: dict) -> None:
    """The body is forwarded with it too, so the model that is counted is the model that answers."""
    of = parse_request(CHAT, json.dumps({"messages": [], **said}).encode(), deployment="mine")
    assert of.model == "mine"
    assert json.loads(forwarded_body(of, model()))["model"] == "real-m"


def test_a_deployment_in_the_path_overrides_the_model_in_a_form() -> None:
    """Also if the form names none."""
    for parts in (("model=other",), ()):
        assert parse_form_request(TRANSCRIPTIONS, form(*parts), deployment="mine").model == "mine"


@pytest.mark.parametrize("name", [".", "..", "mine/../yours", " x", "x\n", ""])
def test_a_deployment_must_be_a_valid_model_name(name: str) -> None:
    """The same rules hold in the path and in the body; a name must not lead to another path."""
    with pytest.raises(InvalidRequest):
        parse_request(CHAT, b"{}", deployment=name)
    assert refused(model=name).param == "model"


def test_a_withheld_usage_option_is_not_written() -> None:
    """The client's own options stay."""
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
def test_hidden_input_of_messages_is_refused(endpoint: Endpoint, fields: dict, param: str) -> None:
    """Containers, MCP servers and stored files: input that the request does not show and nothing bounds (T20)."""
    error = refused(endpoint, **fields)
    assert (error.param, error.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize("kind", ["image", "document"])
def test_stored_files_in_messages_are_found_at_any_depth(kind: str) -> None:
    """In a block, in a tool result, and in a document that is made of blocks."""
    stored = {"type": kind, "source": {"type": "file", "file_id": "file_1"}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [stored]}
    document = {"type": "document", "source": {"type": "content", "content": [stored]}}
    for block in (stored, result, document):
        assert refused(MESSAGES, messages=[{"role": "user", "content": [block]}]).param == "file_id"


def test_a_user_s_own_tool_is_accepted_on_messages() -> None:
    """With and without a type. Unknown fields are forwarded."""
    tools = [{"name": "f", "input_schema": {}}, {"type": "custom", "name": "g", "input_schema": {}}]
    request = parse(MESSAGES, tools=tools, max_tokens=5, thinking={"type": "adaptive"}, what_comes_next=1)
    assert sent(request, "anthropic") == {**request.document, "model": "real-m"}


def test_an_error_in_a_stream_of_messages_is_anthropic_s_error_event() -> None:
    """Anthropic's SDK raises if the event is named `error`, and reads its member `error`."""
    event = error_event(MESSAGES, UpstreamError("It broke."))
    head, data = event.split(b"\n", 1)
    assert head == b"event: error"
    error = {"type": "api_error", "message": "It broke.", "code": "upstream_error"}
    assert json.loads(data.removeprefix(b"data: ")) == {"type": "error", "error": error}
