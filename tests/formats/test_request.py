"""The upstream gets what was checked: the fields that the proxy decides on, and all other fields unchanged.

wire §1.4 (which field an upstream really reads), §2.2 and §2.3 (asking for usage), §1.7 (what is refused);
threats T24, T27, T31 to T37.
"""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.endpoints import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    IMAGE_EDITS,
    IMAGES,
    MESSAGES,
    METERED,
    MODERATIONS,
    RESPONSES,
    SPEECH,
    TRANSCRIPTIONS,
    Endpoint,
)
from proxy.formats.kinds import KINDS, kind_of
from proxy.formats.multipart import Form, FormReader
from proxy.formats.request import (
    Request,
    forwarded_body,
    forwarded_model,
    parse_form_request,
    parse_request,
)
from proxy.policy.catalog import Allow, Model, Upstream

GENERATING = [CHAT, COMPLETIONS, RESPONSES, MESSAGES]
HUGE = 10**9


def body(**fields: object) -> bytes:
    """A request's body with these fields; the model is "m" by default."""
    return json.dumps({"model": "m", **fields}).encode()


def parse(endpoint: Endpoint = CHAT, **fields: object) -> Request:
    """A parsed request with these fields."""
    return parse_request(endpoint, body(**fields))


def model(kind: str = "openai") -> Model:
    """A model at an upstream of this kind, which calls it "real-m"."""
    return Model("m", Upstream("up", "http://upstream.example/v1", None, kind), "real-m")


def sent(request: Request, kind: str = "openai", maximum: int | None = None) -> dict:
    """The document that an upstream of this kind receives."""
    return json.loads(forwarded_body(request, model(kind), maximum=maximum))


def ids(value: object) -> str | None:
    """Names endpoints in the ids of tests."""
    return value.name if isinstance(value, Endpoint) else None


# ----------------------------------------------------------------------------------------------------------- parsing


def test_a_request_has_the_checked_fields_and_the_whole_document() -> None:
    """The document is as it was parsed, with unknown fields."""
    request = parse(CHAT, stream=True, n=3, messages=[], unknown={"a": 1})
    assert (request.endpoint, request.model, request.stream, request.choices) == (CHAT, "m", True, 3)
    assert request.body.document == {"model": "m", "stream": True, "n": 3, "messages": [], "unknown": {"a": 1}}
    plain = parse(EMBEDDINGS, input="x")
    assert (plain.stream, plain.choices) == (False, 1)


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


def test_stream_may_be_absent_or_null() -> None:
    """Both mean false."""
    assert [parse().stream, parse(stream=None).stream, parse(stream=False).stream] == [False, False, False]


def test_store_false_is_written_if_the_operator_forbids_storing() -> None:
    """OpenAI stores a response unless the request says `store: false`."""
    forbidden = replace(model(), allow=Allow(store=False))
    for said, may, sent_on in ((None, False, False), (False, False, False), (None, True, None), (True, True, True)):
        document = {} if said is None else {"store": said}
        forwarded = forwarded_body(parse(RESPONSES, **document), model() if may else forbidden)
        assert json.loads(forwarded).get("store") is sent_on
    assert "store" not in sent(parse(CHAT))


# ------------------------------------------------------------------------------------------------ numbers of answers


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


# -------------------------------------------------------------------------------------------------------- the maxima

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
def test_every_maximum_field_that_the_upstream_reads_is_lowered(kind: str, endpoint: Endpoint) -> None:
    """No other field is changed."""
    stated = dict.fromkeys(MAXIMA, 5000)
    lowered = sent(parse(endpoint, **stated), kind, maximum=300)
    assert {name for name in MAXIMA if lowered[name] == 300} == READS[kind, endpoint.name]
    assert {lowered[name] for name in MAXIMA} <= {300, 5000}


@targets
def test_a_maximum_that_is_already_lower_stays(kind: str, endpoint: Endpoint) -> None:
    """Each field is compared by itself."""
    reads = sorted(READS[kind, endpoint.name])
    stated = {name: 10 + 1000 * position for position, name in enumerate(reads)}
    lowered = sent(parse(endpoint, **stated), kind, maximum=300)
    assert {name: lowered[name] for name in reads} == {name: min(300, value) for name, value in stated.items()}


@targets
def test_a_maximum_is_written_if_the_client_stated_none(kind: str, endpoint: Endpoint) -> None:
    """T64: in the first field that this kind of upstream reads, if there is a maximum to write. Null is none."""
    name = WRITES.get((kind, endpoint.name), endpoint.maxima[0])
    for request in (parse(endpoint), parse(endpoint, **dict.fromkeys(MAXIMA))):
        assert {field: value for field, value in sent(request, kind, maximum=300).items() if value == 300} == {
            name: 300
        }
        assert {field: value for field, value in sent(request, kind).items() if field in MAXIMA and value} == {}


def test_a_number_that_means_no_maximum_is_replaced_by_one() -> None:
    """-1 at llama.cpp and 0 at Ollama are the smaller numbers, but they ask for more."""
    lowered = sent(parse(n_predict=-1, max_tokens=1), "llamacpp", maximum=300)
    assert (lowered["n_predict"], lowered["max_tokens"]) == (300, 1)
    assert sent(parse(max_tokens=-1), "llamacpp", maximum=300)["max_tokens"] == 300
    assert sent(parse(max_tokens=-1), "llamacpp")["max_tokens"] == -1
    assert sent(parse(max_tokens=0), "ollama", maximum=300)["max_tokens"] == 300
    assert sent(parse(max_tokens=0), "openai", maximum=300)["max_tokens"] == 300
    assert sent(parse(max_tokens=0), "vllm", maximum=300)["max_tokens"] == 0
    assert sent(parse(COMPLETIONS, max_tokens=0), "openai", maximum=300)["max_tokens"] == 0


def test_no_maximum_is_written_for_embeddings() -> None:
    """They generate nothing, so no field of theirs is a maximum."""
    for kind in KINDS:
        assert kind_of(kind).maximum_fields(EMBEDDINGS) == ()
        assert sent(parse(EMBEDDINGS, input="x", max_tokens=5000), kind, maximum=300)["max_tokens"] == 5000


# ------------------------------------------------------------------------------------------------ the forwarded body

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
    assert request.body.document.get("stream_options") == options.get("stream_options")


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
    assert ("vllm" in request.adds_running_usage) == is_added
    forwarded, own = sent(request, "vllm")["stream_options"], options.get("stream_options")
    if is_added:
        assert forwarded == {**(own or {}), "include_usage": True, "continuous_usage_stats": True}
    else:
        assert forwarded == ({**(own or {}), "include_usage": True} if request.adds_usage else own)
    assert request.body.document.get("stream_options") == own


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
    assert ("llamacpp" in request.adds_running_usage) == is_added
    assert sent(request, "llamacpp").get("timings_per_token") == (
        True if is_added else fields.get("timings_per_token")
    )
    assert "continuous_usage_stats" not in str(sent(request, "llamacpp"))


@pytest.mark.parametrize("endpoint", [RESPONSES, EMBEDDINGS], ids=ids)
def test_llama_cpp_is_not_asked_on_responses_and_embeddings(endpoint: Endpoint) -> None:
    """There the usage comes without asking."""
    assert not parse(endpoint, stream=True).adds_running_usage


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("vllm", "llamacpp")])
def test_other_kinds_are_not_asked_for_the_usage_so_far(kind: str) -> None:
    """The option is vLLM's own. If a client wrote it itself, it is forwarded."""
    assert kind not in parse(stream=True).adds_running_usage
    assert sent(parse(stream=True), kind)["stream_options"] == {"include_usage": True}
    own = {"include_usage": True, "continuous_usage_stats": True}
    assert sent(parse(stream=True, stream_options=own), kind)["stream_options"] == own


@pytest.mark.parametrize(
    ("endpoint", "stream"), [(CHAT, False), (COMPLETIONS, None), (EMBEDDINGS, True), (RESPONSES, True)], ids=ids
)
def test_the_usage_so_far_is_asked_for_only_in_streams_of_chunks(endpoint: Endpoint, stream: bool | None) -> None:
    """Whole answers, embeddings and responses are requested from vLLM without the option."""
    request = parse(endpoint, stream=stream)
    assert "vllm" not in request.adds_running_usage
    assert "stream_options" not in sent(request, "vllm")


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
    kind=st.sampled_from(list(KINDS)),
    fields=st.tuples(unknown, known),
    maximum=st.none() | st.integers(1, 4000),
)
def test_only_the_proxy_s_own_fields_are_changed(
    endpoint: Endpoint, kind: str, fields: tuple, maximum: int | None
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


def test_a_request_keeps_its_properties_when_its_body_is_freed() -> None:
    """A long stream must not keep megabytes of prompt in memory after the upstream has answered.

    All properties stay the same; only the body itself may no longer be read.
    """
    body = b"""{"model": "m", "stream": true, "n": 2, "messages": ["long"],
        "stream_options": {"include_usage": true, "continuous_usage_stats": true}, "timings_per_token": true}"""
    request, freed = parse_request(CHAT, body), parse_request(CHAT, body)
    freed.body.free()
    freed.body.free()
    with pytest.raises(AttributeError):
        _ = freed.body.document
    assert (freed.model, freed.stream, freed.choices) == ("m", True, 2)
    for one in (request, freed):
        assert one.asks_for_usage
        assert not one.adds_usage
        assert not one.adds_running_usage


# ------------------------------------------------------------------------------------------------------------- forms


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
    assert request.body.document == {"model": "m", "n": 3, "stream": True, "prompt": "a fox", "size": "auto"}
    assert parse_form_request(TRANSCRIPTIONS, form("model=m", "stream=false")).stream is False
    assert parse_form_request(IMAGE_EDITS, form("prompt=x")).model == "dall-e-2"


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


# ----------------------------------------------------------------------------------------------- Azure's deployments


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


def test_numbers_and_equal_keys_are_sent_as_they_were_read() -> None:
    """Integers beyond 64 bits are not rounded. Of equal keys the last is decided on and sent (T27)."""
    sent_body = forwarded_body(
        parse_request(CHAT, b'{"model":"x","seed":18446744073709551616,"messages":[],"n":5,"n":1,"top_p":1e300}'),
        model(),
    )
    assert b'"seed":18446744073709551616' in sent_body
    assert sent_body.count(b'"n":') == 1
    assert (json.loads(sent_body)["n"], json.loads(sent_body)["top_p"]) == (1, 1e300)
    assert parse_request(CHAT, b'{"model":"x","n":5,"n":1,"messages":[]}').choices == 1


def test_a_withheld_usage_option_is_not_written() -> None:
    """The client's own options stay."""
    for options, sent in ((None, None), ({"include_obfuscation": False}, {"include_obfuscation": False})):
        of = parse(stream=True, stream_options=options).without_usage_option()
        assert of.is_option_withheld
        assert not of.adds_usage
        assert not of.adds_running_usage
        assert json.loads(forwarded_body(of, model()))["stream_options"] == sent


# ---------------------------------------------------------------------------------------------- Anthropic's messages


def test_a_user_s_own_tool_is_accepted_on_messages() -> None:
    """With and without a type. Unknown fields are forwarded."""
    tools = [{"name": "f", "input_schema": {}}, {"type": "custom", "name": "g", "input_schema": {}}]
    request = parse(MESSAGES, tools=tools, max_tokens=5, thinking={"type": "adaptive"}, what_comes_next=1)
    assert sent(request, "anthropic") == {**request.body.document, "model": "real-m"}


def test_the_model_is_inserted_behind_an_empty_line_at_the_start() -> None:
    """The empty line stays before the first boundary. Before it, it would become a part of the model's name."""
    _, body = form_and_body(("prompt=p",), ("image",))
    body = b"\r\n" + body
    reader = FormReader("multipart/form-data; boundary=b")
    reader.feed(body)
    start, end, part = forwarded_model(parse_form_request(IMAGE_EDITS, reader.end()), model())
    written = FormReader("multipart/form-data; boundary=b")
    written.feed(body[:start] + part + body[end:])
    found = written.end()
    assert [(field.name, field.value) for field in found.fields] == [("model", "real-m"), ("prompt", "p")]
    assert [file.name for file in found.files] == ["image"]
