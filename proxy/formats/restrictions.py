"""Everything that refuses a body: one table of rows for both APIs, and what only the policy may allow.

A row of `ROWS` refuses one thing whatever the policy says: a field that would change where a call goes, a value that
servers read in different ways, a reference to something stored in the upstream account that all users share. The rows
are checked when a request is parsed (`check_body`), in the order of the table.

`check_allowance` refuses what costs or reaches more than quotas can see, unless the policy allows it (`allow` in
quotas.yaml). Tools that run at the upstream repeat model calls there, with the operator's key. Anthropic's own tools
add input that the request does not show. A service tier changes the price. The message says which setting allows it.
References to stored things stay refused inside tools that are allowed.

Bytes that are no unambiguous JSON are refused before, in `strict_json` and `multipart`. Pure.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from proxy.errors import InvalidRequest
from proxy.formats.body import RequestBody, content_parts, is_run_by_client, offered_tools
from proxy.formats.endpoints import CHAT, METERED, Endpoint
from proxy.formats.kinds import CHOICE_COUNT_FIELDS, LEAST_MAXIMUM, MAXIMUM_FIELDS
from proxy.formats.strict_json import DEPTH_MAX, is_within_depth, walk
from proxy.policy.catalog import Allow

_MODEL_CHARACTERS_MAX = 256
# A segment "." or ".." in a model's name. In Azure's path /deployments/{model}/… it would lead to another deployment,
# even if its slashes are percent-encoded.
_DOT_SEGMENT = re.compile(r"(?:^|[/\\])\.\.?(?:$|[/\\])")
# OpenAI's limit for `n` on /chat/completions; used for every number of answers.
_CHOICES_MAX = 128
# More than any answer has, and small enough that products stay far inside 64 bits: 10^9 tokens × 128 answers are less
# than 2^37.
_NUMBER_MAX = 10**9
# Tiers at the usual price; null means the default. OpenAI has `auto` and `default`, Anthropic `auto` and
# `standard_only`.
_USUAL_TIERS = (None, "auto", "default", "standard_only")
# Members of a tool that name things which any user may have stored in the upstream account.
_STORED_THING_FIELDS = frozenset("container_id file_id file_ids skill_id vector_store_id vector_store_ids".split())
# Messages repeat at most this many characters of the client's values.
_SHOWN_CHARACTERS = 40
# Where the id of a stored file may be: in the part itself, or one level below it, as in
# {"type": "file", "file": {"file_id": …}}.
_FILE_HOLDERS = frozenset(("file", "source", "image_url", "input_audio"))
# Keys of parts that are no spelling of `file_id`. Nearly all parts have no others, and need no closer look.
_KEYS_OF_PARTS = frozenset(
    "type text role content name id call_id output status summary arguments tool_call_id tool_calls tool_use_id "
    "input is_error cache_control image_url url detail input_audio data format media_type thinking signature title "
    "encrypted_content file_data filename annotations logprobs refusal phase".split()
)

_STORED = (
    "it refers to things stored at the upstream, in an account that all users share, and the request does not show "
    "their tokens. Send their content instead"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that is refused.

    `is_refused` gets the value of `field`, and is not asked if that is absent or null. Without a field it gets the
    whole `Checked`. `param` names what to change; by default the field. `where` says which endpoints it applies to.
    """

    field: str | None
    is_refused: Callable[[Any], bool]
    message: str
    param: str | None = None
    code: str | None = "unsupported_parameter"
    where: Callable[[Endpoint], bool] = lambda endpoint: True


@dataclass(frozen=True, slots=True)
class Checked:
    """A request's body while it is checked. `model` is as the body or the path names it; it may be of any type."""

    endpoint: Endpoint
    body: RequestBody
    model: object


# Which endpoints a row applies to.
_RESPONSES = attrgetter("is_of_responses")
_MESSAGES = attrgetter("is_of_messages")
_GENERATES = attrgetter("generates")
_HAS_USAGE_OPTION = attrgetter("has_usage_option")

# --------------------------------------------------------------------------------------------------- what is refused


def _is_used(value: object) -> bool:
    """Whether a field is used. SDKs send null and false for options that their user did not set."""
    return value not in (None, False)


def _is_too_deep(checked: Checked) -> bool:
    # The body is level 1. A list of turns is level 2, and its turns are level 3. A plain turn has no level below it.
    document, turns = checked.body.document, checked.body.turns
    fields = [value for name, value in document.items() if name not in turns]
    unusual = [turn for field in turns.values() for turn in field.unusual]
    return not (is_within_depth(fields, DEPTH_MAX - 1) and is_within_depth(unusual, DEPTH_MAX - 2))


def _has_stored_files(checked: Checked) -> bool:
    for part in content_parts(checked.body):
        if not _KEYS_OF_PARTS.issuperset(part) and _names_file(part):
            return True
        if not _FILE_HOLDERS.isdisjoint(part) and any(_names_file(part.get(name)) for name in _FILE_HOLDERS):
            return True
    return False


def _names_file(holder: object) -> bool:
    """Whether an object has a `file_id`, in any case: Go's decoder accepts `File_ID` too."""
    return isinstance(holder, dict) and any(key.casefold() == "file_id" and value for key, value in holder.items())


def _has_stored_items(checked: Checked) -> bool:
    """Whether items of `input` refer to stored ones: their content is input that the request does not show."""
    items = checked.body.turns.get("input")
    return items is not None and any(map(_may_refer_to_stored_item, items.unusual))


def _may_refer_to_stored_item(item: object) -> bool:
    """Whether the upstream could read an item as a reference, which need not state its type.

    The only items without a type that are not references are messages, and these have `content`. An image that a tool
    generated may come back with its id alone.

    This is stricter than `content._refers_to_stored_turn`, which also sees chats: a chat message such as
    {"role": "assistant", "refusal": "No."} has no `content`, and the same item could be read as a reference here.
    """
    if not isinstance(item, dict):
        return False
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


def _is_bad_name(checked: Checked) -> bool:
    value = checked.model
    return (
        not isinstance(value, str)
        or not 0 < len(value.strip()) == len(value) <= _MODEL_CHARACTERS_MAX
        or not value.isprintable()
        or _DOT_SEGMENT.search(value) is not None
    )


def _is_not(type_: type) -> Callable[[object], bool]:
    return lambda value: not isinstance(value, type_)


def _is_no_integer(value: object) -> bool:
    return isinstance(value, bool) or not isinstance(value, int)


def _is_above(most: int) -> Callable[[int], bool]:
    return lambda number: number > most


def _refused_fields(
    names: str, reason: str, where: Callable[[Endpoint], bool] = lambda endpoint: True
) -> tuple[Row, ...]:
    """A row for each of these fields, which are refused unless they are null or false."""
    return tuple(
        Row(name, _is_used, f'"{name}" can\'t be used here: {reason}.', where=where) for name in names.split()
    )


def _number(name: str, least: int, where: Callable[[Endpoint], bool] = _GENERATES) -> tuple[Row, ...]:
    """The rows for a field that must be a whole number from `least` to 10^9."""
    text = f'"{name}" must be between {least} and {_NUMBER_MAX}.'
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
    Row(None, _is_too_deep, f"The body is nested more than {DEPTH_MAX} levels deep.", code="invalid_json"),
    # Fields that change where a call goes. LiteLLM's fallbacks and OpenRouter's models and presets name other models
    # than the one that is allowed and counted. vLLM's kv_transfer_params name a server from which it fetches the
    # cache of another call.
    *_refused_fields(
        "api_base api_key base_url content_policy_fallbacks context_window_fallback_dict context_window_fallbacks "
        "custom_host custom_llm_provider deployment_id extra_body extra_headers fallbacks kv_transfer_params "
        "model_list models preset user_config",
        "it would change where this call goes or which key it uses, and the proxy decides that",
    ),
    # Azure searches `data_sources` with the rights of its operator. The others search the web: `plugins` are
    # OpenRouter's (on all of its endpoints), `search_parameters` xAI's, `enable_search` Alibaba's.
    *_refused_fields(
        "data_sources plugins search_parameters enable_search",
        "the upstream would search with it, and no setting of this proxy allows that. Send the content instead",
    ),
    *_refused_fields(
        "background",
        "its cost would arise after the answer. Leave it out, and stream the answer if it is long",
        _RESPONSES,
    ),
    *_refused_fields("conversation prompt", _STORED, _RESPONSES),
    # vLLM uses it as the id of the response. A client could take the id of another user's response.
    *_refused_fields("request_id", "the upstream chooses the ids of responses. Leave it out", _RESPONSES),
    *_refused_fields(
        "svg",
        "it names a second model, which no quota would count. Leave it out",
        lambda endpoint: endpoint.name in ("images", "image_edits"),
    ),
    # Anthropic's betas that need no field are controlled by `allow: {betas: […]}`, through the header
    # `anthropic-beta`. These are fields of betas.
    *_refused_fields("container", _STORED, _MESSAGES),
    *_refused_fields("inference_geo", "it changes the price of the call. Leave it out", _MESSAGES),
    *_refused_fields(
        "mcp_servers",
        "the upstream would call these servers, and their results are input that the body does not show",
        _MESSAGES,
    ),
    # Stored things inside of turns.
    Row(None, _has_stored_files, f'"file_id" can\'t be used here: {_STORED}.', param="file_id"),
    Row(
        None,
        _has_stored_items,
        f'References to stored items can\'t be used here, and generated images only with their "result": {_STORED}.',
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
    Row(
        "voice",
        lambda voice: isinstance(voice, dict),
        '"voice" must name a built-in voice: a custom one is stored in an account that all users share.',
    ),
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
    Row(
        None,
        lambda checked: checked.model is None,
        '"model" is missing: name the model to use.',
        param="model",
        code="missing_required_parameter",
    ),
    Row(
        None,
        _is_bad_name,
        f'"model" must be a name of 1 to {_MODEL_CHARACTERS_MAX} printable characters, without blanks around it '
        'and without "." or ".." between slashes.',
        param="model",
        code=None,
    ),
    # Some servers read the text "true" as true, and others refuse it.
    Row("stream", _is_not(bool), '"stream" must be true or false.', code="invalid_type"),
    *(row for name in MAXIMUM_FIELDS for row in _number(name, LEAST_MAXIMUM[name])),
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

# Those about the name of the model.
_MODEL_ROWS = tuple(row for row in ROWS if row.field is None and row.param == "model")
_ROWS_OF = {endpoint.name: tuple(row for row in ROWS if row.where(endpoint)) for endpoint in METERED}
_REFUSED_FIELDS_OF = {
    name: {row.field: row for row in rows if row.is_refused is _is_used and row.field is not None}
    for name, rows in _ROWS_OF.items()
}

# Fields that the proxy decides on. Another spelling of one of them is refused.
CHECKED_FIELDS = frozenset(row.field for row in ROWS if row.field is not None).union(
    "model stream_format messages input tools service_tier store web_search_options prompt".split()
)


def refused_fields(endpoint: Endpoint) -> Collection[str]:
    """The fields that this endpoint refuses unless they are null or false, in the order of the table."""
    return _REFUSED_FIELDS_OF[endpoint.name].keys()


def check_model_name(name: str) -> None:
    """Raise InvalidRequest if no call can name a model so, whatever its endpoint."""
    checked = Checked(CHAT, RequestBody({}), name)
    for row in _MODEL_ROWS:
        if row.is_refused(checked):
            raise InvalidRequest(row.message, param=row.param, code=row.code)


def check_body(endpoint: Endpoint, body: RequestBody, *, model: object) -> None:
    """Raise InvalidRequest for the first row of the table that refuses this body.

    `model` is the model that the path, the body or the endpoint's default names.
    """
    checked, document = Checked(endpoint, body, model), body.document
    for row in _ROWS_OF[endpoint.name]:
        value = checked if row.field is None else document.get(row.field)
        if value is not None and row.is_refused(value):
            raise InvalidRequest(row.message, param=row.param or row.field, code=row.code)


def check_form_field(endpoint: Endpoint, name: str, *, is_file: bool = False) -> str:
    """Return a form field's name, or that of the refused field it belongs to: `svg[model]` counts as `svg`.

    Raises InvalidRequest for another spelling of a field that the proxy decides on. `model[]` and ` Model` are read
    as `model` by some servers and not by others.
    """
    if "[file_id" in name.lower():
        raise InvalidRequest(f'"file_id" can\'t be used here: {_STORED}.', param=name, code="unsupported_parameter")
    base = name.partition("[")[0]
    field = base if base in refused_fields(endpoint) else name
    plain = base.strip().casefold()
    if field == name and plain in CHECKED_FIELDS and name != plain:
        raise InvalidRequest(f'Write "{plain}" and not "{name}".', param=plain)
    if is_file and field in CHECKED_FIELDS:
        raise InvalidRequest(f'"{name}" must be a field and not a file.', param=name)
    return field


# ----------------------------------------------------------------------------------------------- what may be allowed


def check_allowance(endpoint: Endpoint, body: RequestBody, allow: Allow) -> None:
    """Raise InvalidRequest if a call uses something that is not allowed for its model."""
    document = body.document
    for tool in offered_tools(body):
        _refuse_other_case(tool)
        if not _runs_at_client(tool, endpoint):
            _check_tool(tool, allow)
    if document.get("web_search_options") not in (None, False):
        _check_type("web_search", allow, param="web_search_options")
    tier = document.get("service_tier")
    if tier not in _USUAL_TIERS and not (isinstance(tier, str) and tier in allow.service_tiers):
        shown = str(tier)[:_SHOWN_CHARACTERS]
        raise _not_allowed(f'"service_tier": "{shown}"', f"service_tiers: [{shown}]", param="service_tier")
    if document.get("store") not in (None, False) and not allow.store:
        raise _not_allowed('"store"', "store: true", param="store")


def _runs_at_client(tool: object, endpoint: Endpoint) -> bool:
    """Whether the client runs this tool. A tool without a type is one only on /messages, where it means `custom`."""
    has_type = isinstance(tool, dict) and tool.get("type") is not None
    return is_run_by_client(tool) and (has_type or endpoint.is_of_messages)


def _refuse_other_case(tool: object) -> None:
    """Refuse `Type` and `Tools`: Go's decoder accepts them for `type` and `tools`, even beside these.

    A gateway in Go would read {"type": "function", "Type": "web_search"} as a web search.
    """
    for name in tool if isinstance(tool, dict) else ():
        if name != (plain := name.casefold()) and plain in ("type", "tools"):
            raise InvalidRequest(f'Write "{plain}" and not "{name}" in a tool.', param="tools")


def _check_tool(tool: object, allow: Allow) -> None:
    if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
        text = 'Each tool must be an object with a "type", such as "function".'
        raise InvalidRequest(text, param="tools", code="unsupported_parameter")
    _check_type(tool["type"], allow, param="tools")
    # The tools of a group are checked one by one (`offered_tools`). They are left out here, because the parameters of
    # a function may have any name, such as "file_id".
    own = {name: value for name, value in tool.items() if name != "tools"}
    for value in walk(own):
        if isinstance(value, dict):
            _check_members(value)


def _check_type(type_: str, allow: Allow, *, param: str) -> None:
    if type_ not in allow.tools:
        shown = type_[:_SHOWN_CHARACTERS]
        raise _not_allowed(f'A tool of type "{shown}", which the upstream defines,', f"tools: [{shown}]", param=param)


def _check_members(part: Mapping[str, Any]) -> None:
    """Refuse names of stored things. A container must be a new one, `{"type": "auto"}`: any other may be shared."""
    for name, value in part.items():
        is_stored = name in _STORED_THING_FIELDS and value not in (None, [])
        if is_stored or (name == "container" and value not in (None, {"type": "auto"})):
            raise InvalidRequest(
                f'"{name}" can\'t be used in tools here: {_STORED}.', param="tools", code="unsupported_parameter"
            )


def _not_allowed(what: str, setting: str, *, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{what} can't be used here. The operator of this proxy can allow it for a model or an upstream, with "
        f'"allow: {{{setting}}}".',
        param=param,
        code="unsupported_parameter",
    )
