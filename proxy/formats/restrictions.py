"""What refuses a body whatever the policy says: one table of rows for both APIs.

A row of `ROWS` refuses one thing whatever the policy says: a field that would change where a call goes, a value that
servers read in different ways, a reference to something stored in the upstream account that all users share. The rows
are checked when a request is parsed (`check_body`). A refused field is refused on every endpoint on which it has no
other meaning: a gateway may read it anywhere, whichever API it belongs to. It is refused in every spelling.

`check_refused_fields` refuses what the operator adds with `refuse`. Names of models are in `model_names`, and what
only the policy may allow is in `allowance`.

Bytes that are no unambiguous JSON are refused before, in `strict_json` and `multipart`. Pure.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from operator import attrgetter
from typing import Any, NamedTuple

from proxy.errors import InvalidRequest
from proxy.formats.body import (
    CONTENT_FIELDS,
    FILE_ID_TEXT,
    RequestBody,
    content_objects,
    is_system_role,
    unusual_turns,
)
from proxy.formats.endpoints import CHAT, IMAGES, METERED, SPEECH, Endpoint, EndpointName
from proxy.formats.kinds import CHOICE_COUNT_FIELDS, LEAST_MAXIMUM, MAXIMUM_FIELDS, Kind
from proxy.formats.model_names import check_name_form
from proxy.formats.strict_json import DEPTH_MAX, plain_name, walk

# OpenAI's limit for `n` on /chat/completions; used for every number of answers.
_CHOICES_MAX = 128
# More than any answer has, and small enough that products stay far inside 64 bits: 10^9 tokens × 128 answers are less
# than 2^37.
_NUMBER_MAX = 10**9
# The maximum that no other API has. -1 in it passes to every kind of upstream, as unknown fields do.
_ONLY_OF_LLAMA_CPP = "n_predict"
# Messages repeat at most this many characters of the client's values.
SHOWN_CHARACTERS = 40
# Fields in which a gateway may find options of its own.
_METADATA = frozenset(("metadata", "litellm_metadata"))
# Fields whose objects are checked, beside the messages and items.
_WITH_OBJECTS = CONTENT_FIELDS | _METADATA
# Members of a turn or part that name a stored file.
_FILE_IDS = ("fileid", "fileids")
# Files that a tool of Anthropic's has made. The history repeats their ids, and nothing is read from them.
_MADE_FILES = ("bash_code_execution_output", "code_execution_output")
# Members of an item that decide what it is. Another spelling of them is refused.
MEMBERS_OF_ITEMS = ("type", "tools")
# Keys of turns and parts that are no spelling of those. Nearly all have no others, and need no closer look.
_KEYS_OF_PARTS = frozenset(
    "type text role content name id call_id output status summary arguments tool_call_id tool_calls tool_use_id "
    "input is_error cache_control image_url url detail input_audio data format media_type thinking signature title "
    "encrypted_content file_data filename annotations logprobs refusal phase file source tools function".split()
)

STORED = (
    "it refers to things stored at the upstream, in an account that all users share, and the request does not show "
    "their tokens. Send their content instead"
)
_ROUTES = "it would change where this call goes or which key it uses, and the proxy decides that"
_SEARCHES = "the upstream would search with it, and no setting of this proxy allows that. Send the content instead"
_ARISES_LATER = "its cost would arise after the answer. Leave it out, and stream the answer if it is long"
_REPORTS = "the upstream would send prompts and answers elsewhere with it, or hide the call from its operator"
_PRICES = "it would change what the upstream records as the cost of the call"
_COSTS_MORE = "it changes the price of the call. Leave it out"
_RUNS_TOOLS = "the upstream would run a tool with it, and the operator can allow only what is in `tools`"
_SEVERAL = 'it asks for several answers. Use "n" where the endpoint has it, else send one request for each answer'
_CUSTOM_VOICE = '"voice" must name a built-in voice: a custom one is stored in an account that all users share.'


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that is refused.

    `is_refused` gets the value of `field`, and is not asked if that is absent or null. Without a field it gets the
    whole `Checked`, and is not asked if the body has no objects to look at. `param` names what to change; by default
    the field. `where` says which endpoints it applies to. With `is_field_refused` the field is refused in every
    spelling.
    """

    field: str | None
    is_refused: Callable[[Any], bool]
    message: str
    param: str | None = None
    code: str | None = "unsupported_parameter"
    where: Callable[[Endpoint], bool] = lambda endpoint: True
    is_field_refused: bool = False


class Checked(NamedTuple):
    """A request's body while it is checked."""

    endpoint: Endpoint
    body: RequestBody


# Which endpoints a row applies to.
_RESPONSES = attrgetter("is_of_responses")
_GENERATES = attrgetter("generates")
_HAS_USAGE_OPTION = attrgetter("has_usage_option")


def _on(*names: str) -> Callable[[Endpoint], bool]:
    """These endpoints alone."""
    return lambda endpoint: endpoint.name in names


def _not_on(*names: str) -> Callable[[Endpoint], bool]:
    """All endpoints but these, on which the field has another meaning."""
    return lambda endpoint: endpoint.name not in names


# --------------------------------------------------------------------------------------------------- what is refused


def is_used(value: object) -> bool:
    """Whether a field is used. SDKs send null, false, [] and "" for options that their user did not set.

    An empty object is a use: `web_search_options: {}` asks for a search. So is 0, which may number a server.
    """
    return not (value is None or value is False or value == [] or value == "")


def _is_used_unless(unused: object) -> Callable[[object], bool]:
    """Whether a field is used, if this very value is not a use of it."""
    return lambda value: is_used(value) and value != unused


def _is_more_than_one(value: object) -> bool:
    """Whether a number of answers is above 1, or none. Forms have texts."""
    return is_used(value) and value not in ("0", "1") and not (isinstance(value, int | float) and value <= 1)


def _names_stored_prompt(prompt: object) -> bool:
    """Whether a prompt refers to one that is stored at the upstream: {"id": "pmpt_1"}, also in a list."""
    parts = prompt if isinstance(prompt, list) else [prompt]
    inner = [each for part in parts if isinstance(part, list) for each in part if isinstance(each, dict)]
    return any(plain_name(name) in ("id", "promptid") for part in [*parts, *inner] for name, _ in _members(part))


def _has_custom_voice(value: object) -> bool:
    """Whether the options of audio name a voice by an object. Built-in voices are named by a text."""
    voices = (inner for part in walk(value) for name, inner in _members(part) if plain_name(name) == "voice")
    return any(map(_is_custom_voice, voices))


def _is_custom_voice(voice: object) -> bool:
    return isinstance(voice, dict | list) and voice != []


def _has_refused_members(of: Endpoint) -> Callable[[object], bool]:
    """Whether a field that this endpoint refuses is inside an object of options, at any depth."""
    return lambda value: any(
        _is_refused_member(of, name, inner) for part in walk(value) for name, inner in _members(part)
    )


def _redirects_reports(checked: Checked) -> bool:
    """Whether the metadata say where LiteLLM sends its reports of the call. Other metadata are the user's own."""
    return any(
        is_used(value) and _REPORT_PREFIX.match(name) and _REPORT_TARGET.search(name)
        for field in _METADATA
        for name, value in _members(checked.body.document.get(field))
    )


def _members(value: object) -> Iterable[tuple[str, object]]:
    return value.items() if isinstance(value, dict) else ()


def _has_stored_files(checked: Checked) -> bool:
    """Whether a turn or part has a `file_id`, in any spelling and at any place where a server could look for it."""
    return any(
        plain_name(name) in _FILE_IDS and is_used(value)
        for part in content_objects(checked.body)
        if not (_KEYS_OF_PARTS.issuperset(part) or _repeats_made_file(part, checked))
        for name, value in part.items()
    )


def _repeats_made_file(part: dict[str, Any], checked: Checked) -> bool:
    """Whether a part repeats the id of a file that a tool of Anthropic's has made, and the request offers that tool.

    A tool that is offered needs permission (`check_allowance`), so without permission the id is refused.
    """
    return (
        checked.endpoint.is_of_messages
        and part.get("type") in _MADE_FILES
        and part.keys() == {"type", "file_id"}
        and any(
            isinstance(tool, dict) and str(tool.get("type")).startswith("code_execution_")
            for tool in checked.body.tools
        )
    )


def _has_files_in_text(checked: Checked) -> bool:
    """Whether the text of a system message names stored files, as DashScope reads it."""
    messages = checked.body.turns.get("messages")
    return (messages is not None and messages.names_files) or any(
        isinstance(text, str) and FILE_ID_TEXT in text
        for turn in unusual_turns(checked.body, ["messages"])
        if is_system_role(turn.get("role"))
        for text in walk(turn)
    )


def _has_other_spelling(checked: Checked) -> bool:
    """Whether a turn has `Type` or `Tools`: Go's decoder accepts them for `type` and `tools`, even beside these."""
    return any(
        name not in MEMBERS_OF_ITEMS and plain_name(name) in MEMBERS_OF_ITEMS
        for turn in checked.body.unusual
        if not _KEYS_OF_PARTS.issuperset(turn)
        for name in turn
    )


def _has_stored_items(checked: Checked) -> bool:
    """Whether items of `input` refer to stored ones: their content is input that the request does not show."""
    return any(map(_may_refer_to_stored_item, unusual_turns(checked.body, ["input"])))


def _may_refer_to_stored_item(item: dict[str, Any]) -> bool:
    """Whether the upstream could read an item as a reference, which need not state its type.

    The only items without a type that are not references are messages, and these have `content`. An image that a tool
    generated may come back with its id alone.

    This is stricter than `content._refers_to_stored_turn`, which also sees chats: a chat message such as
    {"role": "assistant", "refusal": "No."} has no `content`, and the same item could be read as a reference here.
    """
    kind = item.get("type")
    if kind == "image_generation_call":
        return not item.get("result")
    return kind == "item_reference" or (kind is None and "content" not in item)


def _has_unclear_usage_option(options: dict[str, Any]) -> bool:
    """Whether it isn't clear to every server that usage is asked for, or that it is not.

    vLLM reads the text "false" as false, and Ollama reads `Include_Usage`. In both cases the usage would not come
    although the proxy expects it.
    """
    return any(
        name.casefold() == "include_usage" and (name != "include_usage" or value not in (None, False, True))
        for name, value in options.items()
    )


def _is_not(type_: type) -> Callable[[object], bool]:
    return lambda value: not isinstance(value, type_)


def _is_no_integer(value: object) -> bool:
    return isinstance(value, bool) or not isinstance(value, int)


def _is_above(most: int) -> Callable[[int], bool]:
    return lambda number: number > most


def _refused_fields(
    names: str,
    reason: str,
    where: Callable[[Endpoint], bool] = lambda endpoint: True,
    is_refused: Callable[[Any], bool] = is_used,
) -> tuple[Row, ...]:
    """A row for each of these fields, which are refused in every spelling unless they are null, false, [] or ""."""
    return tuple(_refused_field(name, reason, where=where, is_refused=is_refused) for name in names.split())


def _refused_field(
    name: str,
    reason: str,
    *,
    where: Callable[[Endpoint], bool] = lambda endpoint: True,
    is_refused: Callable[[Any], bool] = is_used,
) -> Row:
    return Row(name, is_refused, f'"{name}" can\'t be used here: {reason}.', where=where, is_field_refused=True)


def _number(
    name: str, least: int, where: Callable[[Endpoint], bool] = _GENERATES, *, shown: int | None = None
) -> tuple[Row, ...]:
    """The rows for a field that must be a whole number from `least` to 10^9. The error shows `shown` instead."""
    text = f'"{name}" must be between {least if shown is None else shown} and {_NUMBER_MAX}.'
    return (
        Row(name, _is_no_integer, f'"{name}" must be a whole number.', code="invalid_type", where=where),
        Row(name, lambda number: not least <= number <= _NUMBER_MAX, text, code=None, where=where),
    )


def _choice_count(name: str, where: Callable[[Endpoint], bool] = _GENERATES) -> tuple[Row, ...]:
    """The rows for a number of answers: 1 to 128."""
    text = f'"{name}" must be {_CHOICES_MAX} or less.'
    code = "integer_above_max_value"
    return (*_number(name, 1, where), Row(name, _is_above(_CHOICES_MAX), text, code=code, where=where))


ROWS: tuple[Row, ...] = (
    # Fields that change where a call goes. LiteLLM's fallbacks and OpenRouter's models and presets name other models
    # than the one that is allowed and counted. The servers in kv_transfer_params (vLLM) and bootstrap_… (SGLang) hold
    # the cache of another call. Adapters (lora…) are other models under the name of their base. LiteLLM takes the
    # credentials of each vendor from the body: those with a prefix are in `_REFUSED_PREFIX`. Its `proxy…` and `ssl_…`
    # open the connection to others, its routers choose the model, and `backend_instance_id` and its like are Dynamo's
    # servers. OpenRouter's `route: "fallback"` also without `models` may take another model. Amazon's `model_id`, in
    # LiteLLM, and `engine`, the older name of `deployment`, are the model that is called.
    *_refused_fields(
        "adapter_id adapter_source agent_id allowed_model_region api_base api_key api_token api_type api_version "
        "azure backend_instance_id base_model base_url chatgpt_auth_file client_id client_secret compound_custom "
        "configurable_clientside_auth_params content_policy_fallbacks context_window_fallback_dict "
        "context_window_fallbacks custom_host custom_llm_provider data_parallel_rank decode_worker_id "
        "default_headers deployment deployment_id deployment_url disagg_prefill_dp_rank dp_rank ec_transfer_params "
        "engine extra_body extra_headers extra_query fallback_depth fallback_model fallback_models fallbacks "
        "fastest_response headers hf_model_name kv_transfer_params litellm_credential_name "
        "litellm_embedding_config litellm_params lora lora_id lora_name lora_path lora_request max_fallbacks "
        "model_alias_map model_group_alias model_id model_info model_list model_name models organization "
        "prefill_worker_id preset project_id provider_specific_header proxies proxy region_name route routed_dp_rank "
        "router_config_override router_settings_override routing_strategy session_control silent_model space_id "
        "specific_deployment ssl_verify switchyard_router_config tenant_id use_litellm_proxy use_xai_oauth "
        "user_config",
        _ROUTES,
    ),
    # Azure searches `data_sources` with the rights of its operator. The others search the web: `plugins` are
    # OpenRouter's, `search_parameters` xAI's, `connectors` Cohere's, `enable_search` and its options Alibaba's,
    # `web_search` Baidu's and DeepInfra's, `use_search` and `search_settings` Kimi's and Groq's, `google_search` is
    # Gemini's, `search_tool_name` LiteLLM's. Venice has the next ones, whose "off" is no search.
    *_refused_fields(
        "connectors data_sources enable_search forced_search google_search google_search_retrieval plugins "
        "search_options search_settings search_tool_name use_search use_web_search web_search web_search_enabled",
        _SEARCHES,
    ),
    *_refused_fields(
        "enable_web_scraping enable_web_search enable_x_search", _SEARCHES, is_refused=_is_used_unless("off")
    ),
    *_refused_fields("max_agentic_loops", "the upstream would call models and tools by itself"),
    # Alibaba's `enable_code_interpreter`, and what other vendors have as tools.
    *_refused_fields(
        "code_execution code_interpreter computer_use enable_code_interpreter file_search google_maps mcp retrieval "
        "url_context web_browser web_fetch x_search",
        _RUNS_TOOLS,
    ),
    *_refused_fields("search_parameters", _SEARCHES, is_refused=_is_used_unless({"mode": "off"})),
    # `background` of an image is its background. xAI keeps a deferred answer until it is fetched.
    *_refused_fields("background", _ARISES_LATER, _not_on("images", "image_edits")),
    *_refused_fields("callback_url deferred webhook webhook_url", _ARISES_LATER),
    # Things that OpenAI, Anthropic and Mistral store, Gemini's `cached_content`, Volcengine's `context_id`, Cohere's
    # `conversation_id`, SGLang's sessions, Venice's characters, and LiteLLM's cached answers by their keys.
    *_refused_fields(
        "assistant_id cache_key cached_content character_slug container container_id context_id conversation "
        "conversation_id file_id file_ids knowledge_base_id knowledge_base_ids model_file_id_mapping "
        "preset_cache_key prompt_id session_params skill_id thread_id tool_resources vector_store_id "
        "vector_store_ids",
        STORED,
    ),
    # On other endpoints `prompt` is a text.
    *_refused_fields("prompt", STORED, _RESPONSES, is_refused=_is_used_unless({})),
    Row(
        "prompt",
        _names_stored_prompt,
        f'"prompt" can\'t be used here: {STORED}.',
        where=lambda endpoint: not endpoint.is_of_responses,
    ),
    *_refused_fields(
        "previous_response_id",
        "it continues a stored response, which works on /v1/responses only. Send the earlier messages instead",
        lambda endpoint: not endpoint.is_of_responses,
    ),
    # vLLM and SGLang use it as the id of the answer. A client could take the id of another user's response.
    *_refused_fields("request_id rid", "the upstream chooses the ids of answers. Leave it out"),
    *_refused_fields(
        "draft_model safety_model svg", "it names a second model, which no quota would count. Leave it out"
    ),
    # Dynamo reads these tokens instead of the messages, which the proxy has counted.
    *_refused_fields("token_data", "its tokens would be read instead of the messages. Send the messages"),
    # LiteLLM sends a report of each call to these, for all later calls too, or to none of those that its operator has
    # set. Those with a vendor's prefix are in `_REPORT_PREFIX`. Dynamo uploads to `metadata_upload`.
    *_refused_fields(
        "callbacks disable_global_guardrail disable_global_guardrails failure_callback input_callback "
        "litellm_disabled_callbacks logger_fn metadata_upload no-log opted_out_global_guardrails service_callback "
        "slack_webhook_url success_callback",
        _REPORTS,
    ),
    Row(None, _redirects_reports, f'"metadata" has a member that can\'t be used here: {_REPORTS}.', param="metadata"),
    # LiteLLM repeats a failed call as often as the request says, and each attempt may cost.
    *_refused_fields(
        "cooldown_time max_retries num_retries retry_policy retry_strategy",
        "the upstream would repeat the call, and only one of the calls would be counted",
    ),
    *_refused_fields("tiered_pricing", _PRICES),
    # Other names of `n`: Gemini, Cohere, Hugging Face, and vLLM and TensorRT-LLM also on chat; servers of images.
    # Whisper's servers have a `best_of` that asks for no answer.
    *_refused_fields(
        "best_of",
        _SEVERAL,
        lambda endpoint: endpoint.generates and endpoint.name != "completions" and endpoint.form != "audio",
        is_refused=_is_more_than_one,
    ),
    *_refused_fields(
        "batch_count batch_size candidate_count image_count images_per_prompt max_images n_images n_iter n_samples "
        "num_choices num_completions num_generations num_images num_images_per_prompt num_outputs "
        "num_return_sequences num_samples number_of_images sample_count",
        _SEVERAL,
        _GENERATES,
        is_refused=_is_more_than_one,
    ),
    # Volcengine's makes up to 15 images.
    *_refused_fields("sequential_image_generation", _SEVERAL, is_refused=_is_used_unless("disabled")),
    # LiteLLM removes the fields that it names, such as the maximum that the proxy has lowered.
    *_refused_fields(
        "additional_drop_params", "it can remove the fields that bound the answer. Leave it out, and those fields too"
    ),
    # SGLang unpickles it and runs it.
    *_refused_fields("custom_logit_processor", "the upstream would run its code. Leave it out"),
    # Anthropic's betas are controlled by `allow: {betas: […]}`, through the header `anthropic-beta`. Amazon's and
    # Google's servers of its models, and gateways, read them in the body too.
    *_refused_fields("anthropic_beta betas", "betas are named in the header `anthropic-beta`. Leave it out"),
    # Fields of betas, and Amazon's. Gateways add the header of the beta by themselves.
    *_refused_fields("inference_geo", _COSTS_MORE),
    *_refused_fields("speed", _COSTS_MORE, _not_on("speech"), is_refused=_is_used_unless("standard")),
    *_refused_fields("performanceConfig", _COSTS_MORE, is_refused=_is_used_unless({"latency": "standard"})),
    *_refused_fields(
        "mcp_servers",
        "the upstream would call these servers, and their results are input that the body does not show",
    ),
    # Options that are passed on: vLLM's to its connectors, Vercel's, Gemini's and Amazon's to a vendor, others to the
    # model. Those of Dynamo and Venice have fields of their own. The previous response of a member belongs to nobody,
    # so it is refused on /responses too.
    *(
        Row(name, _has_refused_members(of), f'"{name}" has a member that is refused as a field too.', where=where)
        for of, where in (
            (CHAT, _not_on("images", "image_edits", "speech")),
            (IMAGES, _on("images", "image_edits")),
            (SPEECH, _on("speech")),
        )
        for name in (
            "additionalModelRequestFields",
            "custom_params",
            "gateway",
            "generationConfig",
            "google",
            "model_kwargs",
            "nvext",
            "options",
            "parameters",
            "providerOptions",
            "sampling_params",
            "sequential_image_generation_options",
            "venice_parameters",
            "vllm_xargs",
        )
    ),
    # Stored things inside of turns.
    Row(None, _has_stored_files, f'"file_id" can\'t be used here: {STORED}.', param="file_id"),
    Row(None, _has_files_in_text, f'"{FILE_ID_TEXT}" can\'t be used here: {STORED}.', param="messages"),
    Row(
        None,
        _has_other_spelling,
        'Write "type" and "tools" in lower case in messages and items.',
        code="invalid_json",
    ),
    Row(
        None,
        _has_stored_items,
        f'References to stored items can\'t be used here, and generated images only with their "result": {STORED}.',
        param="input",
        where=_RESPONSES,
    ),
    # It is looked up in the ledger, which knows the owner of the response.
    Row(
        "previous_response_id",
        _is_not(str),
        '"previous_response_id" must be a string.',
        code=None,
        where=_RESPONSES,
    ),
    Row("voice", _is_custom_voice, _CUSTOM_VOICE),
    Row("audio", _has_custom_voice, _CUSTOM_VOICE, param="audio.voice"),
    # llama.cpp ignores options that are not an object, and would then send no usage.
    Row(
        "stream_options",
        _is_not(dict),
        '"stream_options" must be an object.',
        code="invalid_type",
        where=_HAS_USAGE_OPTION,
    ),
    Row(
        "stream_options",
        _has_unclear_usage_option,
        '"stream_options.include_usage" must be true or false, and written in lower case.',
        param="stream_options.include_usage",
        code="invalid_type",
        where=_HAS_USAGE_OPTION,
    ),
    # Some servers read the text "true" as true, and others refuse it.
    Row("stream", _is_not(bool), '"stream" must be true or false.', code="invalid_type"),
    # Which kinds of upstream take -1 is checked with the model, by `check_negative_maxima`.
    *(
        row
        for name in MAXIMUM_FIELDS
        for row in _number(name, LEAST_MAXIMUM[name], shown=-1 if name == _ONLY_OF_LLAMA_CPP else 0)
    ),
    *(row for name in CHOICE_COUNT_FIELDS for row in _choice_count(name)),
    # llama.cpp reads `n` on /responses too, but its stream reports the usage of one answer only.
    *(
        Row(
            name,
            _is_above(1),
            '"n" must be 1 here: send one request for each answer.',
            param="n",
            where=lambda endpoint: endpoint.is_of_responses and endpoint.generates,
        )
        for name in CHOICE_COUNT_FIELDS
    ),
    *_choice_count("best_of", lambda endpoint: endpoint.name == "completions"),
)

# LiteLLM reads the address, the account and the credentials of each vendor from fields with these prefixes, and
# SGLang the server that prepares a call (`bootstrap_host`). `vertexProject` is a spelling of `vertex_project`. With
# `mock_…` LiteLLM makes up an answer or an error, and an error closes the model to all users for a while.
_REFUSED_PREFIX = re.compile(
    r"(?i:anthropic_?(?:federation|identity|issuer|keycloak|organization|service)|aws|azure|bedrock|bootstrap"
    r"|(?:adaptive|auto|complexity|quality)_?router|databricks|gcs|gigachat|github_?copilot|mock|oci"
    r"|openai_?(?:identity|service)|s3|sagemaker|snowflake|token_?exchange|vertex(?:_?ai)?|watsonx|wx)"
    r"(?:[_-]|[A-Z])"
)
# Where LiteLLM sends its reports of a call, and with which keys.
_REPORT_PREFIX = re.compile(
    r"(?i:arize|braintrust|dd|humanloop|langfuse|langsmith|lunary|newrelic|phoenix|posthog|signoz|wandb|weave)"
    r"(?:[_-]|[A-Z])"
)
_REPORT_TARGET = re.compile(r"(?:host|port|url|endpoint|site|key|secret)$", re.IGNORECASE)
# LiteLLM's prices: `input_cost_per_token`, `cache_read_input_token_cost` and many more.
_PRICE = re.compile(r"(?i:cost_per_|(?:token|image)_cost)|[cC]ostPer[A-Z]")
# The ends of the plain names of addresses and credentials, whichever vendor's they are: `xai_api_key`.
_ADDRESSES_AND_KEYS = ("apikey", "apibase", "apitoken", "baseurl", "accesstoken", "secretkey", "endpointurl")

# The refused fields of each endpoint by their plain names, and its other rows by their fields.
_REFUSED_OF = {
    endpoint.name: {
        plain_name(row.field): row for row in ROWS if row.is_field_refused and row.field and row.where(endpoint)
    }
    for endpoint in METERED
}
_CHECKED_OF: dict[EndpointName, dict[str | None, list[Row]]] = {endpoint.name: {} for endpoint in METERED}
for _row, _endpoint in product(ROWS, METERED):
    if not _row.is_field_refused and _row.where(_endpoint):
        _CHECKED_OF[_endpoint.name].setdefault(_row.field, []).append(_row)

# Fields whose values the proxy decides on. Another spelling of one of them is refused.
CHECKED_FIELDS = frozenset(row.field for row in ROWS if row.field is not None and not row.is_field_refused).union(
    "model stream_format messages input tools service_tier store web_search_options".split()
)
# Fields that most requests have. They are no spelling of a refused field, so they need no closer look.
USUAL_FIELDS = frozenset(
    "model messages input stream stream_options temperature top_p n user tools tool_choice metadata store stop seed "
    "parallel_tool_calls response_format reasoning reasoning_effort include text truncation system thinking".split()
).union(MAXIMUM_FIELDS)
# What an error may name as its `param`, other than a field that its client made up.
PARAMETERS = CHECKED_FIELDS.union(
    USUAL_FIELDS,
    (row.field for row in ROWS if row.field is not None),
    (row.param for row in ROWS if row.param is not None),
    "audio.voice file_id previous_response_id stream_options.include_usage".split(),
    "X-Quota-Max-Wait X-Quota-Tag by since".split(),
)
_CHECKED_BY_PLAIN_NAME = {plain_name(field): field for field in CHECKED_FIELDS}


def refused_fields(endpoint: Endpoint) -> Collection[str]:
    """The fields that this endpoint refuses unless they are null, false, [] or "", in the order of the table."""
    return [row.field for row in _REFUSED_OF[endpoint.name].values() if row.field is not None]


def _refusing_row(endpoint: Endpoint, name: str) -> Row | None:
    """The row that refuses a field of this name, in any spelling."""
    return _REFUSED_OF[endpoint.name].get(plain_name(name)) or _row_of_pattern(name)


def _row_of_pattern(name: str) -> Row | None:
    """The row that refuses a field because of how its name begins, or what is in it."""
    if _REFUSED_PREFIX.match(name) or plain_name(name).endswith(_ADDRESSES_AND_KEYS):
        return _refused_field(name[:SHOWN_CHARACTERS], _ROUTES)
    if _REPORT_PREFIX.match(name):
        return _refused_field(name[:SHOWN_CHARACTERS], _REPORTS)
    if _PRICE.search(name):
        return _refused_field(name[:SHOWN_CHARACTERS], _PRICES)
    return None


def _is_refused_member(endpoint: Endpoint, name: str, value: object) -> bool:
    """Whether a member of an object of options is refused as a field on this endpoint, or asks for more answers."""
    row = _refusing_row(endpoint, name)
    return row.is_refused(value) if row is not None else name in CHOICE_COUNT_FIELDS and _is_more_than_one(value)


def check_body(endpoint: Endpoint, body: RequestBody, *, model: object) -> None:
    """Raise InvalidRequest for the first field that is refused, else for what is wrong in the whole body.

    Only what the body contains is looked at. `model` is the model that the path, the body or the endpoint's default
    names.
    """
    rows_of_fields, document = _CHECKED_OF[endpoint.name], body.document
    if not USUAL_FIELDS.issuperset(document):
        _check_unusual_fields(endpoint, document)
    if body.is_too_deep:
        raise InvalidRequest(f"The body is nested more than {DEPTH_MAX} levels deep.", code="invalid_json")
    messages = body.turns.get("messages")
    if body.unusual or not _WITH_OBJECTS.isdisjoint(document) or (messages is not None and messages.names_files):
        checked = Checked(endpoint, body)
        for row in rows_of_fields[None]:
            if row.is_refused(checked):
                raise _refused(row)
    check_name_form(model)
    for name, value in document.items():
        if name in rows_of_fields and value is not None:
            for row in rows_of_fields[name]:
                if row.is_refused(value):
                    raise _refused(row)


def _check_unusual_fields(endpoint: Endpoint, document: Mapping[str, Any]) -> None:
    for name, value in document.items():
        if name not in USUAL_FIELDS and (row := _refusing_row(endpoint, name)) is not None and row.is_refused(value):
            raise _refused(row)


def _refused(row: Row) -> InvalidRequest:
    return InvalidRequest(row.message, param=row.param or row.field, code=row.code)


def check_form_field(endpoint: Endpoint, name: str, *, is_file: bool = False) -> str:
    """Return a form field's name, or that of the refused field it belongs to: `svg[model]` counts as `svg`.

    Raises InvalidRequest for another spelling of a field that the proxy decides on. `model[]` and ` Model` are read
    as `model` by some servers and not by others.
    """
    if "[fileid" in plain_name(name):
        raise InvalidRequest(f'"file_id" can\'t be used here: {STORED}.', param=name, code="unsupported_parameter")
    base = form_field_base(name)
    refusing = _refusing_row(endpoint, base)
    field = name if refusing is None else refusing.field or base
    plain = _CHECKED_BY_PLAIN_NAME.get(plain_name(base), name)
    if refusing is None and name != plain:
        raise InvalidRequest(f'Write "{plain}" and not "{name}".', param=plain)
    if is_file and (refusing is not None or field in CHECKED_FIELDS):
        raise InvalidRequest(f'"{name}" must be a field and not a file.', param=field)
    return field


def form_field_base(name: str) -> str:
    """The field that a part of a form belongs to: `svg` of ` svg[model]`."""
    return name.partition("[")[0].strip()


def negative_maxima(endpoint: Endpoint, document: Mapping[str, Any]) -> list[str]:
    """The fields of a checked request that bound its answer by a negative number. Few requests have one."""
    found = []
    if endpoint.generates:
        for name in MAXIMUM_FIELDS:
            if type(number := document.get(name)) is int and number < 0:
                found.append(name)
    return found


def check_negative_maxima(names: Iterable[str], kind: Kind, *, model: str) -> None:
    """Raise InvalidRequest for a negative maximum that is not "no maximum" at this kind of upstream.

    `names` are those of `negative_maxima`.
    """
    for name in names:
        if name != _ONLY_OF_LLAMA_CPP and name not in kind.least_maximum:
            raise InvalidRequest(
                f'"{name}" must be between 0 and {_NUMBER_MAX} for the model "{model}". For an answer without a '
                "maximum, leave it out.",
                param=name,
            )


def check_refused_fields(names: Iterable[str], refused: Collection[str], *, model: str) -> None:
    """Raise InvalidRequest for a used field that the operator refuses for a model, in any spelling.

    `names` are the fields that the request uses, and `refused` those in `refuse` of an upstream of the model.
    """
    refused_names = set(map(plain_name, refused))
    for name in names:
        if plain_name(form_field_base(name)) in refused_names:
            shown = name[:SHOWN_CHARACTERS]
            raise InvalidRequest(
                f'"{shown}" can\'t be used with the model "{model}": the operator of this proxy refuses it. '
                "Leave it out.",
                param=shown,
                code="unsupported_parameter",
            )


def used_fields(body: RequestBody) -> list[str]:
    """The fields of a body, or of a form, that are neither null nor false nor [] nor ""."""
    return [name for name, value in body.document.items() if is_used(value)]
