"""What is refused whatever the policy says, and what the operator adds. Messages say what to change."""

import json
from itertools import product

import pytest

from proxy.errors import InvalidRequest
from proxy.formats.allowance import check_allowance
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
    RESPONSES,
    SPEECH,
    TRANSCRIPTIONS,
    Endpoint,
)
from proxy.formats.kinds import KINDS, MAXIMUM_FIELDS, kind_of
from proxy.formats.model_names import check_model_name, check_name_form
from proxy.formats.request import parse_form_request, parse_request
from proxy.formats.restrictions import (
    CHECKED_FIELDS,
    USUAL_FIELDS,
    check_negative_maxima,
    check_refused_fields,
    negative_maxima,
    refused_fields,
    used_fields,
)
from proxy.formats.strict_json import DEPTH_MAX, plain_name
from proxy.policy.catalog import Allow
from tests.formats.test_request import GENERATING, HUGE, form, parse

OF_RESPONSES = [RESPONSES, COMPACT, INPUT_TOKENS]


def ids(value: object) -> str | None:
    """Names endpoints in the ids of tests."""
    return value.name if isinstance(value, Endpoint) else None


def refused(endpoint: Endpoint = CHAT, **fields: object) -> InvalidRequest:
    """The error with which these fields are refused."""
    with pytest.raises(InvalidRequest) as caught:
        parse(endpoint, **fields)
    assert caught.value.status == 400
    assert len(caught.value.message) < 300
    return caught.value


# --------------------------------------------------------------------------------- the model, and fields of one type


@pytest.mark.parametrize("endpoint", [each for each in METERED if each.default_model is None], ids=ids)
def test_a_model_must_be_named(endpoint: Endpoint) -> None:
    """Without a model no quota can be found (T33)."""
    for missing in ({}, {"model": None}):
        with pytest.raises(InvalidRequest) as caught:
            parse_request(endpoint, json.dumps(missing).encode())
        assert (caught.value.param, caught.value.code) == ("model", "missing_required_parameter")


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


def test_a_model_s_name_must_not_have_blanks_around_it() -> None:
    """No quota would match it, but some upstreams would accept it."""
    with pytest.raises(InvalidRequest, match="blanks"):
        parse_request(CHAT, b'{"model": " gpt-4o"}')


@pytest.mark.parametrize("name", [".", "..", "mine/../yours", " x", "x\n", ""])
def test_a_deployment_must_be_a_valid_model_name(name: str) -> None:
    """The same rules hold in the path and in the body; a name must not lead to another path."""
    with pytest.raises(InvalidRequest):
        parse_request(CHAT, b"{}", deployment=name)
    assert refused(model=name).param == "model"


@pytest.mark.parametrize("value", ["true", "false", 1, 0, [], {}, 1.0])
@pytest.mark.parametrize("endpoint", METERED, ids=ids)
def test_stream_must_be_true_or_false(endpoint: Endpoint, value: object) -> None:
    """Some servers read the text "true" as true, and others refuse it (T35)."""
    error = refused(endpoint, stream=value)
    assert (error.param, error.code) == ("stream", "invalid_type")


@pytest.mark.parametrize("other", ["MODEL", "Stream", "Max_Tokens", "N", "Best_Of", "N_Predict", "Prompt", "Input"])
def test_a_single_key_in_another_case_is_refused(other: str) -> None:
    """A server in Go reads `Max_Tokens` as the maximum, which the proxy would not know (T27)."""
    error = refused(**{other: 1})
    assert error.code == "invalid_json"
    assert f'"{other.lower()}" and "{other}"' in error.message


@pytest.mark.parametrize("endpoint", METERED, ids=ids)
def test_refused_fields_are_refused_in_any_case(endpoint: Endpoint) -> None:
    """`API_BASE` must not bypass the list of refused fields."""
    for name in refused_fields(endpoint):
        assert name in refused(endpoint, **{name.upper(): "x"}).message


# ------------------------------------------------------------------------------------------------------------- depth


def nested(levels: int, inner: bytes = b"1") -> bytes:
    """An object with nested arrays, `levels` deep in total."""
    return b'{"model":"m","a":' + b"[" * (levels - 1) + inner + b"]" * (levels - 1) + b"}"


def too_deep(body: bytes) -> str:
    """The message with which this body is refused."""
    with pytest.raises(InvalidRequest) as caught:
        parse_request(CHAT, body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    return caught.value.message


def test_64_levels_are_read_and_65_are_refused() -> None:
    """Objects and arrays both count as a level."""
    assert parse_request(CHAT, nested(DEPTH_MAX)).body.document == json.loads(nested(DEPTH_MAX))
    assert f"more than {DEPTH_MAX} levels" in too_deep(nested(DEPTH_MAX + 1))
    assert f"more than {DEPTH_MAX} levels" in too_deep(nested(DEPTH_MAX, b"{}"))


@pytest.mark.parametrize("field", [b"messages", b"input"])
@pytest.mark.parametrize("turn", [b'{"role":"user","content":%b}', b'{"type":"text","x":%b,"y":1}', b"[[],%b]"])
def test_turns_are_levels_too(field: bytes, turn: bytes) -> None:
    """The body is the first, the list of turns the second, a turn the third. Plain turns beside it change nothing."""
    for plain in (b'{"role":"user","content":"Hi"}', b'"Hi"'):
        for spaces in (b"", b" "):
            body = b'{"model":"m",%b"%b":[%b,%b,%b]}' % (spaces, field, plain, turn, plain)
            fits = body % (b"[" * (DEPTH_MAX - 3) + b"]" * (DEPTH_MAX - 3))
            assert parse_request(MESSAGES, fits).body.document == json.loads(fits)
            assert "levels deep" in too_deep(body % (b"[" * (DEPTH_MAX - 2) + b"]" * (DEPTH_MAX - 2)))


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
@pytest.mark.parametrize("levels", [500, 100_000])
def test_no_depth_overflows_a_stack(opening: bytes, closing: bytes, levels: int) -> None:
    """100,000 levels are a 400 too, closed or not. An uncaught RecursionError would be a 500 (T26)."""
    assert "levels deep" in too_deep(b'{"a":' + opening * levels + b"1" + closing * levels + b"}")
    assert "not valid JSON" in too_deep(b'{"a":' + opening * levels)


# ------------------------------------------------------------------------------------ fields that are always refused


# Fields that some server or gateway reads on one of its surfaces, and that are refused on all of ours.
ROUTING = (
    "api_base api_key base_url custom_host extra_body extra_headers fallbacks context_window_fallbacks models preset "
    "content_policy_fallbacks context_window_fallback_dict custom_llm_provider deployment_id model_list user_config "
    "kv_transfer_params organization region_name tenant_id client_id client_secret litellm_credential_name headers "
    "lora_path lora_request lora adapter_id bootstrap_host bootstrap_port bootstrap_room routed_dp_rank agent_id "
    "aws_bedrock_runtime_endpoint aws_access_key_id aws_sts_endpoint azure_ad_token azure_username vertex_project "
    "vertex_ai_location vertex_credentials watsonx_region_name s3_endpoint_url gcs_bucket_name route models "
    "mock_testing_fallbacks fallback_models fastest_response compound_custom model_id model_name engine deployment "
    "openai_api_key xai_api_base endpoint_url secret_key vertex_access_token hf_api_token".split()
)
COSTS = (
    "conversation mcp_servers request_id rid vector_store_ids deferred prompt_id data_sources plugins "
    "enable_search connectors web_search search_options file_ids container conversation_id cached_content thread_id "
    "session_params webhook svg draft_model safety_model inference_geo additional_drop_params "
    "custom_logit_processor anthropic_beta betas performanceConfig enable_code_interpreter code_interpreter "
    "file_search x_search url_context mcp retrieval".split()
)


@pytest.mark.parametrize("endpoint", METERED, ids=ids)
@pytest.mark.parametrize("name", ROUTING)
def test_no_field_changes_where_a_call_goes(endpoint: Endpoint, name: str) -> None:
    """The upstream may be another gateway that reads them (T24, CVE-2024-6587)."""
    for value in ("http://evil.example", {"a": "b"}, ["x"], {}, True, 1, 0):
        error = refused(endpoint, **{name: value})
        assert (error.param, error.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize("endpoint", METERED, ids=ids)
@pytest.mark.parametrize("name", COSTS)
def test_fields_that_cost_more_than_the_request_shows_are_refused_everywhere(endpoint: Endpoint, name: str) -> None:
    """Stored history, searches and background jobs cost tokens that no quota would count (T20).

    A gateway reads them on any surface, whichever vendor invented them.
    """
    for value in (True, "true", {"id": "x"}, ["x"], {}):
        error = refused(endpoint, **{name: value})
        assert (error.param, error.code) == (name, "unsupported_parameter")


def test_no_usual_field_is_another_spelling() -> None:
    """A body that has only these gets no closer look: two of them would have to be one field to some server."""
    fields = CHECKED_FIELDS | USUAL_FIELDS
    assert len({plain_name(name) for name in fields}) == len(fields)
    for endpoint in METERED:
        for name in refused_fields(endpoint):
            assert plain_name(name) not in map(plain_name, USUAL_FIELDS - {name})


@pytest.mark.parametrize(
    "name",
    [
        "VERTEX_PROJECT",
        "vertexProject",
        "vertex-project",
        "Aws_Region_Name",
        "aws_a field with blanks\n",
        "aws_" + "x" * 10_000,
        "apiBase",
        "mcpServers",
        "vectorStoreIds",
        "dataSources",
        "conver\u017fation",
        "openaiApiKey",
        "AnthropicBeta",
        "enableCodeInterpreter",
    ],
)
def test_a_refused_field_has_no_other_spelling(name: str) -> None:
    """Go's decoder ignores case, and protobuf's JSON has each name in camel case (T27)."""
    assert "can't be used" in refused(CHAT, **{name: "x"}).message


@pytest.mark.parametrize("endpoint", METERED, ids=ids)
def test_fields_with_another_meaning_are_refused_only_elsewhere(endpoint: Endpoint) -> None:
    """`background` of an image, `previous_response_id` on /responses, and `prompt` where it is a text."""
    if endpoint.name in ("images", "image_edits"):
        parse(endpoint, prompt="x", background="transparent")
    else:
        assert refused(endpoint, background=True).param == "background"
    if endpoint.name == "speech":
        parse(endpoint, speed=1.25)
    else:
        assert refused(endpoint, speed="fast").param == "speed"
        parse(endpoint, speed="standard")
    if endpoint in OF_RESPONSES:
        assert refused(endpoint, prompt="pmpt_1").param == "prompt"
    else:
        assert refused(endpoint, previous_response_id="resp_1").param == "previous_response_id"
        parse(endpoint, prompt="a text")
    for stored in ({"id": "pmpt_1"}, {"ID": "pmpt_1"}, [{"id": "pmpt_1"}], [[{"id": "pmpt_1"}]]):
        assert refused(endpoint, prompt=stored).param == "prompt"


def test_the_first_refused_field_of_a_body_is_named() -> None:
    """The same one each time."""
    assert refused(CHAT, mcp_servers=["x"], vertex_project="x", api_base="x").param == "mcp_servers"
    assert refused(CHAT, api_base=None, vertex_project="x", mcp_servers=["x"]).param == "vertex_project"


def test_a_prompt_of_completions_may_be_an_object_without_an_id() -> None:
    """llama.cpp has prompts with images: the request shows all that the model reads."""
    assert parse(COMPLETIONS, prompt={"prompt_string": "one"}).choices == 1


@pytest.mark.parametrize("endpoint", METERED, ids=ids)
def test_a_refused_field_may_be_null_false_or_empty(endpoint: Endpoint) -> None:
    """SDKs send them for options that their user did not set. An empty text or list names nothing."""
    for name in refused_fields(endpoint):
        for unused in (None, False, [], ""):
            assert parse(endpoint, **{name: unused}).body.document[name] == unused
        for used in ({}, [{}], [None]):
            assert refused(endpoint, **{name: used}).param == name if (name, used) != ("prompt", {}) else True
    assert parse(RESPONSES, previous_response_id="").previous_response_id is None


@pytest.mark.parametrize("endpoint", METERED, ids=ids)
def test_two_objects_are_no_use_of_their_field(endpoint: Endpoint) -> None:
    """OpenAI's SDK sends the one for a prompt that is not set, and the other tells xAI not to search."""
    parse(endpoint, prompt={})
    parse(endpoint, search_parameters={"mode": "off"})
    for searching in ({}, {"mode": "on"}, {"mode": "auto"}, {"Mode": "off"}, {"mode": "off", "MODE": "on"}, ["off"]):
        assert refused(endpoint, search_parameters=searching).param == "search_parameters"


@pytest.mark.parametrize(
    "options",
    [
        {"vllm_xargs": {"kv_transfer_params": {"remote_host": "x"}}},
        {"providerOptions": {"gateway": {"models": ["o3"]}}},
        {"google": {"cached_content": "cachedContents/1"}},
        {"google": [{"cachedContent": "cachedContents/1"}]},
        {"gateway": {"models": ["o3"]}},
        {"nvext": {"models": ["o3"]}},
        {"nvext": {"backend_instance_id": 0}},
        {"nvext": {"token_data": [1, 2]}},
        {"venice_parameters": {"enable_web_search": "auto"}},
        {"venice_parameters": {"enable_web_scraping": True}},
        {"venice_parameters": {"character_slug": "alan-watts"}},
        {"google": {"candidate_count": 8}},
        {"google": {"thinking_config": {"CandidateCount": 8}}},
        {"providerOptions": {"openai": {"previousResponseId": "resp_1"}}},
        {"generationConfig": {"candidateCount": 8}},
        {"additionalModelRequestFields": {"anthropic_beta": ["context-1m-2025-08-07"]}},
        {"model_kwargs": {"lora_path": "x"}},
        {"parameters": {"num_return_sequences": 8}},
        {"sampling_params": {"best_of": 8}},
        {"options": [{"api_base": "x"}]},
    ],
)
def test_options_that_are_passed_on_have_no_refused_members(options: dict) -> None:
    """Gateways pass them on as a whole; their other members are the vendor's."""
    assert refused(CHAT, **options).param == next(iter(options))
    parse(CHAT, **{name: {"thinking_config": {"include_thoughts": True}} for name in options})
    parse(CHAT, venice_parameters={"enable_web_search": "off", "enable_web_scraping": False, "character_slug": ""})
    parse(CHAT, gateway={"order": ["azure"]}, nvext={"agent_hints": {"priority": 5}, "extra_fields": ["timing"]})


@pytest.mark.parametrize("endpoint", METERED, ids=ids)
def test_fields_that_steer_a_gateway_are_refused(endpoint: Endpoint) -> None:
    """LiteLLM reads them in the body: where its reports go, what it repeats, searches, costs, and makes up."""
    names = (
        "langfuse_host langfuseHost langfuse_secret_key langsmith_base_url dd_agent_host posthog_api_url callbacks "
        "success_callback failure_callback service_callback logger_fn no-log litellm_disabled_callbacks num_retries "
        "max_retries retry_policy input_cost_per_token outputCostPerToken cache_read_input_token_cost tiered_pricing "
        "mock_response mock_tool_calls mockResponse mock_timeout ssl_verify proxy silent_model base_model azure "
        "auto_router_default_model token_exchange_endpoint preset_cache_key enable_web_search google_search "
        "token_data"
    ).split()
    for name in names:
        for value in ("https://evil.example", ["x"], 0, True, {}):
            assert refused(endpoint, **{name: value}).code == "unsupported_parameter"
        parse(endpoint, **{name: None})
    parse(endpoint, enable_web_search="off", tags=["a"], cost="x", costume="x", dd="x", ttl=60, timeout=30)


def test_metadata_do_not_redirect_reports() -> None:
    """LiteLLM reads them there too. All else in metadata is the user's own, and so are tags."""
    for field in ("metadata", "litellm_metadata"):
        for name in ("langfuse_host", "langfuse_secret_key", "arize_api_key", "posthog_api_url"):
            assert refused(CHAT, **{field: {name: "https://evil.example"}}).param == "metadata"
            parse(CHAT, **{field: {name: ""}})
        own = {"langfuse_session_id": "s", "tags": ["a"], "route": "x", "conversation_id": "c", "host": "h"}
        parse(CHAT, **{field: own})


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


def test_a_custom_voice_is_refused() -> None:
    """It is stored in the account that all users share, and belongs to one of them."""
    for voice in ({"id": "voice_1"}, [{"id": "voice_1"}], {}):
        assert refused(SPEECH, input="x", voice=voice).param == "voice"
        for name in ("voice", "Voice"):
            assert refused(CHAT, audio={name: voice, "format": "wav"}).param == "audio.voice"
            assert refused(CHAT, audio=[{name: voice}]).param == "audio.voice"
    parse(CHAT, audio={"voice": "alloy", "format": "wav"})
    assert parse(SPEECH, input="x", voice="alloy").body.document["voice"] == "alloy"


# ----------------------------------------------------------------------------------------------------- stored things


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
    for given_input in ([{"role": "user", "content": "hi"}, item], [[item]], item):
        error = refused(RESPONSES, input=given_input)
        assert (error.param, error.code) == ("input", "unsupported_parameter")


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, MESSAGES], ids=ids)
@pytest.mark.parametrize("name", ["Type", "TYPE", "Tools", "tool\u017f"])
def test_the_type_of_an_item_has_one_spelling(endpoint: Endpoint, name: str) -> None:
    """A server in Go reads the last of them, so a message could be a reference or offer tools."""
    item = {"type": "message", "role": "user", "content": [{"type": "text", "text": "hi"}], name: "item_reference"}
    for field in ("messages", "input"):
        for shape in ([item], item, [[item]]):
            assert refused(endpoint, **{field: shape}).code == "invalid_json"


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
    for given_input in (items, "hi", None, 7, items[0], items[:2]):
        assert parse(RESPONSES, input=given_input).body.document["input"] == given_input


@pytest.mark.parametrize("endpoint", [RESPONSES, COMPACT, INPUT_TOKENS], ids=ids)
def test_previous_response_id_must_be_a_string(endpoint: Endpoint) -> None:
    """It is looked up in the ledger, which knows the owner of the response."""
    assert parse(endpoint, previous_response_id="resp_1").previous_response_id == "resp_1"
    for strange in (["resp_1"], {"id": "resp_1"}, 1, False):
        assert refused(endpoint, previous_response_id=strange).param == "previous_response_id"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_file", "file_id": "file_1"},
        {"type": "file", "file": {"file_id": "file_1"}},
        {"type": "image_url", "image_url": {"file_id": "file_1"}},
        {"type": "input_file", "file_id": None, "File_ID": "file_1"},
        {"type": "file", "FILE": {"file_id": "file_1"}},
        {"type": "file", "file": {"FILE_ID": "file_1"}},
        {"type": "file", "File": {"fileId": "file_1"}},
        {"type": "file", "file": [{"file_id": "file_1"}]},
        {"type": "video_url", "video_url": {"file_id": "file_1"}},
        {"type": "image", "SOURCE": {"type": "file", "file_id": "file_1"}},
        {"type": "image", "source": [{"type": "file", "file_id": "file_1"}]},
        {"type": "image_url", "IMAGE_URL": {"file_id": "file_1"}},
        {"type": "tool_result", "Content": {"source": {"file_id": "file_1"}}},
        {"attachments": [{"file_id": "file_1"}]},
        [{"type": "input_file", "file_id": "file_1"}],
    ],
)
@pytest.mark.parametrize(("endpoint", "field"), [(CHAT, "messages"), (RESPONSES, "input")])
def test_stored_files_are_refused(part: object, endpoint: Endpoint, field: str) -> None:
    """Their tokens are not in the request, and they may be another user's. No shape and no spelling hides them."""
    for member in ("content", "Content"):
        for content in ([part], part):
            turn = {"role": "user", member: content}
            for turns in ([turn], turn, [[turn]]):
                assert refused(endpoint, **{field: turns}).param == "file_id"


def test_files_of_the_user_s_own_functions_are_no_stored_files() -> None:
    """An argument of a function may have any name, and so may a property in its schema. Citations are repeated."""
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {"file_id": "mine"}}
    cited = {"type": "output_text", "text": "x", "annotations": [{"type": "file_citation", "file_id": "file_1"}]}
    parse(MESSAGES, messages=[{"role": "assistant", "content": [call]}])
    parse(RESPONSES, input=[{"type": "message", "role": "assistant", "content": [cited]}])
    schema = {"type": "object", "properties": {"file_id": {"type": "string"}}}
    parse(RESPONSES, input=[{"type": "additional_tools", "tools": [{"type": "function", "parameters": schema}]}])
    parse(CHAT, messages=[{"role": "user", "content": [{"type": "text", "text": "x", "file_id": None}]}])
    parse(CHAT, metadata={"file_id": "mine"}, tools=[{"type": "function", "function": {"parameters": schema}}])


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


@pytest.mark.parametrize("kind", ["image", "document"])
def test_stored_files_in_messages_are_found_at_any_depth(kind: str) -> None:
    """In a block, in a tool result, and in a document that is made of blocks."""
    stored = {"type": kind, "source": {"type": "file", "file_id": "file_1"}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [stored]}
    document = {"type": "document", "source": {"type": "content", "content": [stored]}}
    for block in (stored, result, document):
        assert refused(MESSAGES, messages=[{"role": "user", "content": [block]}]).param == "file_id"


def test_stored_files_are_found_in_the_text_of_a_system_message() -> None:
    """DashScope reads them there, without any field of its own."""
    text = "fileid://file-fe-1,fileid://file-fe-2"
    for content in (text, [{"type": "text", "text": text}]):
        turn = {"role": "system", "content": content}
        for turns in ([{"role": "user", "content": "hi"}, turn], turn, [{**turn, "name": "n"}]):
            assert refused(CHAT, messages=turns).param == "messages"
        for role in ("System", "DEVELOPER"):
            assert refused(CHAT, messages=[{"role": role, "content": content}]).param == "messages"
        parse(CHAT, messages=[{"role": "user", "content": content}, {"role": "user", "content": "system"}])


@pytest.mark.parametrize("endpoint", METERED, ids=ids)
def test_stored_files_are_found_in_fields_beside_the_messages(endpoint: Endpoint) -> None:
    """A gateway may read them there, as the vendors' other APIs do."""
    for name in ("attachments", "documents", "file", "files", "image", "image_url", "reference_images"):
        for value in ({"file_id": "file_1"}, [{"fileId": "file_1"}], [{"source": {"FILE_ID": "file_1"}}]):
            assert refused(endpoint, **{name: value}).param == "file_id"
    parse(endpoint, documents=[{"title": "t", "text": "x"}], files=[{"type": "file", "id": "f"}])


@pytest.mark.parametrize("kind", ["bash_code_execution_output", "code_execution_output"])
def test_files_that_an_offered_tool_has_made_may_be_repeated(kind: str) -> None:
    """The second turn of a conversation with Anthropic's code execution has them. The tool needs permission."""
    result = {"type": "bash_code_execution_result", "stdout": "", "content": [{"type": kind, "file_id": "file_1"}]}
    block = {"type": "bash_code_execution_tool_result", "tool_use_id": "t", "content": result}
    messages = [{"role": "assistant", "content": [block]}]
    tools = [{"type": "code_execution_20250825", "name": "code_execution"}]
    body = parse(MESSAGES, messages=messages, tools=tools).body
    check_allowance(MESSAGES, body, Allow(frozenset(["code_execution_20250825"])))
    with pytest.raises(InvalidRequest) as caught:
        check_allowance(MESSAGES, body, Allow())
    assert caught.value.param == "tools"
    assert refused(MESSAGES, messages=messages).param == "file_id"
    assert refused(MESSAGES, messages=messages, tools=[{"name": "code_execution_x", "input_schema": {}}])
    assert refused(CHAT, messages=messages, tools=tools).param == "file_id"
    for other in ({"type": "container_upload", "file_id": "file_1"}, {"type": kind, "file_id": "f", "source": {}}):
        result["content"] = [other]
        assert refused(MESSAGES, messages=messages, tools=tools).param == "file_id"


# ----------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens", "n", "n_cmpl"])
@pytest.mark.parametrize("value", [-2, -(2**31), 2**31, 2**63, 10**30, 1.5, 1.0, True, False, "10", [], {}, HUGE + 1])
@pytest.mark.parametrize("endpoint", GENERATING, ids=ids)
def test_a_number_that_makes_no_sense_is_refused(endpoint: Endpoint, name: str, value: object) -> None:
    """T31: no hold is negative, and none exceeds 64 bits."""
    assert refused(endpoint, **{name: value}).param == name


def test_a_negative_maximum_is_none_only_at_llama_cpp() -> None:
    """Elsewhere the error says what to do instead. `n_predict` is an unknown field there, which passes."""
    for endpoint, name in product((CHAT, COMPLETIONS, RESPONSES), MAXIMUM_FIELDS):
        negative = negative_maxima(endpoint, parse(endpoint, **{name: -1}).body.document)
        assert negative == [name]
        check_negative_maxima(negative, kind_of("llamacpp"), model="m")
        for kind in KINDS.keys() - {"llamacpp"} if name != "n_predict" else ():
            with pytest.raises(InvalidRequest, match=f'"{name}" must be between 0 and .* leave it out') as caught:
                check_negative_maxima(negative, kind_of(kind), model="m")
            assert caught.value.param == name
    assert negative_maxima(CHAT, parse(max_tokens=0, max_completion_tokens=None).body.document) == []
    assert negative_maxima(EMBEDDINGS, parse(EMBEDDINGS, input="x", max_tokens="any").body.document) == []
    assert "between 0 and" in refused(max_tokens=-5).message
    assert "between -1 and" in refused(n_predict=-5).message


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
    """It counts as a number of answers."""
    assert parse(COMPLETIONS, best_of=128).choices == 128
    for value in (129, 0, -1, True, "2", 1.5):
        assert refused(COMPLETIONS, best_of=value).param == "best_of"


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, MESSAGES, COMPLETIONS, IMAGE_EDITS], ids=ids)
@pytest.mark.parametrize(
    "name",
    "best_of num_return_sequences candidate_count candidateCount n_samples num_images_per_prompt max_images".split(),
)
def test_other_names_for_a_number_of_answers_are_refused_above_one(endpoint: Endpoint, name: str) -> None:
    """Older vLLM read `best_of` on chat: 20 answers are generated, and the usage of one is stated."""
    if (endpoint, name) != (COMPLETIONS, "best_of"):
        for value in (2, 20, 1.5, "20", [1], {}):
            assert refused(endpoint, **{name: value}).param in (name, "candidate_count")
        for value in (0, 1, "1", None, "", False):
            parse(endpoint, **{name: value})


def test_a_series_of_images_is_refused() -> None:
    """Volcengine's field makes up to 15 images of one request."""
    for used in ("auto", "AUTO", {}, True):
        assert refused(IMAGES, sequential_image_generation=used).param == "sequential_image_generation"
    for unused in ("disabled", None, ""):
        parse(IMAGES, sequential_image_generation=unused)
    assert refused(IMAGES, sequential_image_generation_options={"max_images": 15}).code == "unsupported_parameter"
    parse(IMAGES, sequential_image_generation_options={"max_images": 1})


def test_best_of_of_whisper_is_no_number_of_answers() -> None:
    """It asks for one transcript, the best of several attempts, which servers of Whisper make by default."""
    assert parse_form_request(TRANSCRIPTIONS, form("model=m", "best_of=5")).choices == 1


@pytest.mark.parametrize("value", [-2, 1.5, "10", True])
def test_n_predict_may_be_minus_one_but_not_less(value: object) -> None:
    """In llama.cpp's own field -1 means "no maximum"."""
    assert refused(n_predict=value).param == "n_predict"
    assert parse(n_predict=-1).body.document["n_predict"] == -1


def test_maxima_of_embeddings_are_not_checked() -> None:
    """Embeddings generate nothing, so these are unknown fields, which are forwarded."""
    assert parse(EMBEDDINGS, input="x", n="any", max_tokens="any").choices == 1


# ---------------------------------------------------------------------------------------------- the option for usage


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
    assert parse(RESPONSES, stream_options=options).body.document["stream_options"] == options


def test_stream_options_are_not_checked_on_responses() -> None:
    """There `include_usage` is an unknown field (T37)."""
    parse(RESPONSES, stream=True, stream_options={"include_usage": "false"})


# ------------------------------------------------------------------------------------------------------------- forms


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
        (("model=m", "stream=TRUE"), ("file",), "stream"),
        (("model=m", "models[]=", "models[]=o3", "models[]="), ("file",), "models"),
        (("model=m", "models="), ("models",), "models"),
        (("model=m", "background=true"), ("file",), "background"),
        (("model=m", "num_images=2"), ("image",), "num_images"),
        (("model=m", "n=x"), ("image",), "n"),
        (("model=m", "n=\u0663"), ("image",), "n"),
        (("model=m", "n=0"), ("image",), "n"),
        (("model=m", "n=1000000000000"), ("image",), "n"),
        (("model=m", "svg[model]=big"), ("image",), "svg"),
        (("model=m", "api_base=http://evil.example"), ("image",), "api_base"),
        (("model=m", "API_Base=http://evil.example"), ("image",), "api_base"),
        (("model=m", "vertex_project=x"), ("file",), "vertex_project"),
        (("model=m", " mcp_servers[][url]=x"), ("file",), "mcp_servers"),
        (("model=m",), ("api_base",), "api_base"),
        (("model=m", "images[][fileId]=file_1"), ("image",), "images[][fileId]"),
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
            IMAGE_EDITS if param in ("n", "svg", "api_base", "num_images") else TRANSCRIPTIONS,
            form(*parts, files=files),
        )
    assert caught.value.param == param


def test_a_refused_field_of_a_form_may_be_false_or_empty() -> None:
    """Forms have neither null nor false nor [], so clients write a text. Python writes False."""
    parts = "background=false webhook=False models= models[]= vector_store_ids= api_base= deferred=false".split()
    request = parse_form_request(TRANSCRIPTIONS, form("model=m", *parts, "stream=True"))
    assert (request.stream, request.used_fields) == (True, ["model", "stream", "file"])
    assert parse_form_request(TRANSCRIPTIONS, form("model=m", "stream=False")).stream is False
    request = parse_form_request(IMAGE_EDITS, form("model=false", "prompt=False", "num_images=1"))
    assert (request.model, request.body.document["prompt"]) == ("false", "False")


# --------------------------------------------------------------------------------------- what the operator refuses


@pytest.mark.parametrize("name", ["provider", "Provider", "PROVIDER", "pro-vider", "provider[order][]"])
def test_fields_that_the_operator_refuses(name: str) -> None:
    """In every spelling, and also in forms. Null, false and an empty list are no use of a field."""
    with pytest.raises(InvalidRequest) as caught:
        check_refused_fields([name], ["provider"], model="m")
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")
    assert "operator" in caught.value.message
    check_refused_fields([name, "other"], [], model="m")
    check_refused_fields(["other", "providers"], ["provider"], model="m")


def test_the_fields_that_a_request_uses() -> None:
    """0 is a value."""
    request = parse(CHAT, a=None, b=False, c=[], d={}, e=0, f="", g=True)
    assert used_fields(request.body) == ["model", "d", "e", "g"]


# ----------------------------------------------------------------------------------------- names of unlisted models


@pytest.mark.parametrize(
    "name",
    "@preset/x openai/gpt-4o@preset/x @PRESET/x gpt-4o:online gpt-4o:ONLINE gpt-4o:free:online gpt-4o:online:free "
    "openrouter/auto OpenRouter/Auto openrouter/auto:nitro openrouter/fusion openrouter/fusion-flash "
    "openrouter/openrouter/free openrouter/pareto-code auto kilo/auto auto:fast ~openai/gpt-4o openrouter/~x/y a|b "
    "gpt-4o:surfing gpt-4o,o3 model#deployment http://evil.example/m @openai-backup/gpt-4o @OpenAI/o3 dynamic/route "
    "Dynamic/x".split(),
)
def test_a_name_asks_for_nothing_that_is_refused_as_a_field(name: str) -> None:
    """Presets, searches, other models, deployments and addresses."""
    with pytest.raises(InvalidRequest) as caught:
        check_model_name(name)
    assert (caught.value.param, caught.value.code) == ("model", "unsupported_parameter")
    assert "list a model" in caught.value.message


@pytest.mark.parametrize(
    "name",
    "gpt-4o gpt-4o-2024-08-06 ft:gpt-4o:acme::x openai/gpt-4o:free llama3:latest @cf/meta/llama-3 sonar-small-online "
    "hf.co/a/b:Q4_K_M openai/gpt-4o:nitro onlinemodel:onlinex x@presets autocoder "
    "org/auto-1 openrouter/sonoma-sky-alpha x~y claude-3-5-sonnet@20240620 @hf/x/y @CF/meta/llama-3 org/dynamic/x "
    "dynamic-1".split(),
)
def test_other_names_are_names(name: str) -> None:
    """Tags, snapshots, variants and namespaces."""
    check_model_name(name)


@pytest.mark.parametrize("name", ["gpt-4o", "openai/gpt-4o", "llama3:8b", "*", "modèle", "a" * 256])
def test_a_name_that_a_call_may_have_passes_alone(name: str) -> None:
    """The list of models checks names as calls do."""
    check_name_form(name)
    assert parse(CHAT, model=name).model == name


@pytest.mark.parametrize("name", ["", " gpt-4o", "gpt-4o\n", "../../x", "a/../b", "..", "a\\..\\b", "a" * 257])
def test_a_name_that_no_call_may_have_is_refused_alone(name: str) -> None:
    """With the same error as in a call."""
    with pytest.raises(InvalidRequest) as alone:
        check_name_form(name)
    assert (alone.value.message, alone.value.param) == (refused(model=name).message, "model")


# ------------------------------------------------------------------------------------------------------ real clients

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
FUNCTION = {"type": "function", "function": {"name": "web_search", "parameters": {"type": "object"}}}
CLIENTS: dict[str, tuple[Endpoint, dict]] = {
    "Open WebUI": (
        CHAT,
        {
            "stream": True,
            "stream_options": {"include_usage": True},
            "chat_id": "c",
            "session_id": "s",
            "id": "m",
            "features": {"image_generation": False, "web_search": False, "code_interpreter": False},
            "params": {},
            "files": [{"type": "file", "id": "f"}],
            "tool_ids": [],
            "tool_servers": [],
            "filter_ids": [],
            "variables": {"{{USER_NAME}}": "A"},
            "model_item": {"id": "m", "info": {"base_model_id": None}},
            "background_tasks": {"title_generation": True, "tags_generation": True},
            "metadata": {"chat_id": "c", "session_id": "s", "files": []},
        },
    ),
    "LibreChat": (
        CHAT,
        {
            "stream": True,
            "user": "u",
            "include_reasoning": True,
            "reasoning": {"effort": "low"},
            "plugins": [],
            "presence_penalty": 0,
            "stop": [],
            "tools": [FUNCTION],
            "tool_choice": "auto",
        },
    ),
    "Cline and Roo": (
        CHAT,
        {
            "stream": True,
            "temperature": 0,
            "transforms": ["middle-out"],
            "provider": {"order": ["azure"], "allow_fallbacks": False, "data_collection": "deny"},
            "include_reasoning": True,
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "tools": [FUNCTION],
            "parallel_tool_calls": False,
            "prompt_cache_key": "task",
        },
    ),
    "Continue": (COMPLETIONS, {"prompt": "a", "suffix": "b", "stop": ["\n"], "max_tokens": 64, "best_of": None}),
    "aider": (CHAT, {"stream": True, "temperature": 0, "extra_headers": None, "extra_body": None}),
    "LangChain": (
        CHAT,
        {"n": 1, "logit_bias": {}, "response_format": {"type": "text"}, "extra_headers": None, "metadata": None},
    ),
    "LangChain's completions": (COMPLETIONS, {"prompt": ["a"], "best_of": 1, "n": 1, "logit_bias": {}}),
    "LlamaIndex": (
        CHAT,
        {"temperature": 0.1, "stream": False, "tools": [], "functions": None, "service_tier": "auto"},
    ),
    "n8n": (CHAT, {"frequency_penalty": 0, "presence_penalty": 0, "top_p": 1, "n": 1, "timeout": 60000}),
    "SillyTavern": (
        CHAT,
        {
            "stream": True,
            "transforms": ["middle-out"],
            "plugins": [],
            "include_reasoning": False,
            "provider": {"allow_fallbacks": True, "order": []},
            "top_k": 0,
            "top_a": 0,
            "min_p": 0,
            "repetition_penalty": 1,
            "logit_bias": {},
            "stop": [],
            "user": "",
        },
    ),
    "SillyTavern's completions": (
        COMPLETIONS,
        {
            "prompt": "a",
            "num_beams": 1,
            "sampler_order": [6, 0],
            "grammar_string": "",
            "negative_prompt": "",
            "guidance_scale": 1,
            "custom_token_bans": "",
            "dynatemp_range": 0,
            "n": 1,
        },
    ),
    "Dify": (CHAT, {"stream": True, "user": "u", "stop": [], "enable_thinking": False, "enable_search": False}),
    "Zed": (
        CHAT,
        {"stream": True, "stop": [], "max_completion_tokens": 8, "prompt_cache_key": "t", "reasoning_effort": None},
    ),
    "JetBrains": (CHAT, {"stream": True, "n": 1, "functions": [], "temperature": 0.2, "store": False}),
    "OpenAI's SDK for .NET": (RESPONSES, {"background": False, "prompt": {}, "conversation": None, "tools": []}),
    "LM Studio": (CHAT, {"stream": True, "ttl": 300, "reasoning_effort": "low"}),
    "Zhipu's SDK": (CHAT, {"request_id": None, "do_sample": True, "sensitive_word_check": None, "extra": None}),
    "an empty text for what is not set": (CHAT, {"organization": "", "conversation_id": "", "api_base": ""}),
}


@pytest.mark.parametrize("client", CLIENTS)
def test_fields_of_real_clients_pass(client: str) -> None:
    """What these programs send for options that are not set, and fields of their own that no server reads."""
    endpoint, fields = CLIENTS[client]
    turns = {} if "prompt" in fields and endpoint is COMPLETIONS else {"messages": HELLO}
    if endpoint is RESPONSES:
        turns = {"input": HELLO}
    request = parse(endpoint, **turns, **fields)
    assert request.choices == 1
    check_allowance(endpoint, request.body, Allow())
