"""Requests in OpenAI's and Anthropic's formats: parse what a client sends, and write what is forwarded.

A `Request` is one metered request after parsing. Fields that the proxy does not know are forwarded unchanged. The few
fields that it decides on are checked, and the body is written anew from the parsed values, so the upstream gets
exactly what was checked. Sources: OpenAI's and Anthropic's published API descriptions, and the vendors' documents for
the fields that their servers really read (`_MAXIMUM_FIELDS`). Pure.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy.errors import InvalidRequest, ProxyError
from proxy.formats.anthropic import error_body
from proxy.formats.content import content_parts
from proxy.formats.endpoints import METERED, RESPONSES, SPEECH, STORED, Endpoint, EndpointName
from proxy.formats.multipart import Form
from proxy.formats.strict_json import dump, parse_object
from proxy.policy.catalog import Kind, Model

_MODEL_CHARACTERS_MAX = 256
# A segment "." or ".." in a model's name. In Azure's path /deployments/{model}/… it would lead to another deployment,
# even if its slashes are percent-encoded.
_DOT_SEGMENT = re.compile(r"(?:^|[/\\])\.\.?(?:$|[/\\])")
# OpenAI's limit for `n` on /chat/completions; used for every number of answers.
_CHOICES_MAX = 128
# More than any answer has, and small enough that products stay far inside 64 bits: 10^9 tokens × 128 answers are less
# than 2^37.
_NUMBER_MAX = 10**9

# The fields that bound an answer, where a kind of upstream reads other ones than the endpoint names; the first is the
# one to write. Ollama's struct has only max_tokens, so lowering max_completion_tokens there would bound nothing. In
# llama.cpp n_predict overrides all others, on each of its endpoints.
_MAXIMUM_FIELDS: dict[tuple[Kind, EndpointName], tuple[str, ...]] = {
    ("ollama", "chat"): ("max_tokens",),
    ("llamacpp", "chat"): ("n_predict", "max_completion_tokens", "max_tokens"),
    ("llamacpp", "completions"): ("n_predict", "max_completion_tokens", "max_tokens"),
    ("llamacpp", "responses"): ("max_output_tokens", "n_predict", "max_completion_tokens", "max_tokens"),
}
# Every field that bounds an answer at some upstream.
_ALL_MAXIMUM_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
# The number of answers to one prompt. `n_cmpl` is llama.cpp's own name, which overrides `n` there.
_CHOICE_COUNT_FIELDS = ("n", "n_cmpl")

# Fields that the proxy decides on. Another spelling of one of them is refused.
_CHECKED_FIELDS = frozenset(
    (
        *_ALL_MAXIMUM_FIELDS,
        *_CHOICE_COUNT_FIELDS,
        *"model stream stream_options stream_format best_of messages input prompt tools voice".split(),
        *"previous_response_id service_tier store web_search_options".split(),
    )
).union(*(endpoint.refused for endpoint in METERED))


class RequestBody:
    """The parsed body of one request. It is freed as soon as the upstream has answered.

    Agents send megabytes, and an answer may stream for minutes: the body must not stay in memory for that long.
    Everything that is needed afterwards is a field of `Request`.
    """

    __slots__ = ("_document",)

    def __init__(self, document: dict[str, Any]) -> None:
        self._document: dict[str, Any] | None = document

    @property
    def document(self) -> dict[str, Any]:
        """The JSON object, or the fields of a form by name. Must not be read after `free`."""
        assert self._document is not None, "the body was freed when the upstream answered"
        return self._document

    def free(self) -> None:
        """Drop the parsed body."""
        self._document = None


@dataclass(frozen=True, slots=True)
class Request:
    """One metered request: what it asks for, and its parsed body.

    `choices` is how many answers the upstream generates in total. `form` is set if the request is multipart.
    `asks_for_continuous_usage` and `asks_for_timings` are vLLM's and llama.cpp's options for usage on every chunk.
    """

    endpoint: Endpoint
    model: str
    stream: bool
    choices: int
    body: RequestBody
    form: Form | None = None
    previous_response_id: str | None = None
    asks_for_usage: bool = False  # the client asked for the usage of its stream
    asks_for_continuous_usage: bool = False
    asks_for_timings: bool = False
    has_several_prompts: bool = False  # on /completions, each with an input of its own
    is_option_withheld: bool = False  # the upstream rejected the `stream_options` that we added

    @property
    def document(self) -> dict[str, Any]:
        """The parsed body, until it is freed when the upstream has answered."""
        return self.body.document

    @property
    def adds_usage(self) -> bool:
        """Whether the proxy asks for the usage of the stream although the client did not, and removes it again."""
        return self._can_ask_for_usage and not self.asks_for_usage

    def adds_running_usage(self, kind: Kind) -> bool:
        """Whether the proxy asks for the usage so far on every chunk, so that it is exact even if the stream is cut.

        vLLM and llama.cpp have an option for it. It is not used for several choices, because then a chunk has only
        the usage of its own choice.
        """
        if not self._can_ask_for_usage or self.choices != 1:
            return False
        match kind:
            case "vllm":
                return not self.asks_for_continuous_usage
            case "llamacpp":
                return not self.asks_for_timings
        return False

    @property
    def _can_ask_for_usage(self) -> bool:
        return self.stream and self.endpoint.has_usage_option and not self.is_option_withheld


def parse_request(endpoint: Endpoint, body: bytes, *, deployment: str | None = None) -> Request:
    """Parse a request's body. Raises InvalidRequest, which names the field and says what to send instead.

    `deployment` is the model in the path that Azure's clients use. It overrides `model` in the body, as it does at
    Azure.
    """
    document = parse_object(body, _CHECKED_FIELDS)
    _refuse_fields(endpoint, document)
    if endpoint.has_usage_option:
        _refuse_unclear_usage_option(document.get("stream_options"))
    model = endpoint.default_model if document.get("model") is None else document["model"]
    return _request(endpoint, deployment or model, document)


def parse_form_request(endpoint: Endpoint, form: Form, *, deployment: str | None = None) -> Request:
    """Make a request of a form, as `parse_request` does of JSON. Raises InvalidRequest likewise."""
    document: dict[str, Any] = {}
    for field in form.fields:
        document[_check_field_name(endpoint, field.name)] = _field_value(field.name, field.value)
    for file in form.files:
        if _check_field_name(endpoint, file.name) in _CHECKED_FIELDS:
            raise InvalidRequest(f'"{file.name}" must be a field and not a file.', param=file.name)
    _refuse_fields(endpoint, document)
    return _request(endpoint, deployment or document.get("model", endpoint.default_model), document, form)


def _request(endpoint: Endpoint, model: object, document: dict[str, Any], form: Form | None = None) -> Request:
    options = document.get("stream_options")
    options = options if isinstance(options, dict) else {}
    return Request(
        endpoint=endpoint,
        model=_model(model),
        stream=_stream(endpoint, document),
        choices=_choices(endpoint, document),
        body=RequestBody(document),
        form=form,
        previous_response_id=(document.get("previous_response_id") or None) if endpoint.is_of_responses else None,
        asks_for_usage=bool(options.get("include_usage")),
        asks_for_continuous_usage=bool(options.get("continuous_usage_stats")),
        asks_for_timings=bool(document.get("timings_per_token")),
        has_several_prompts=endpoint.name == "completions" and _prompt_count(document) > 1,
    )


def forwarded_model(request: Request, model: Model) -> tuple[int, int, bytes]:
    """How to write the upstream's name of the model into a form: replace the bytes from `start` to `end` by these.

    Returns (start, end, bytes). If the form has no `model`, a part with it is inserted before all others.
    """
    assert request.form is not None, "it is a form"
    name = model.upstream_model.encode()
    field = request.form.field("model")
    if field is not None:
        return field.start, field.end, name
    boundary = request.form.boundary.encode()
    return 0, 0, b'--%b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n' % (boundary, name)


def _check_field_name(endpoint: Endpoint, name: str) -> str:
    """Return a form field's name, or that of the refused field it belongs to: `svg[model]` counts as `svg`.

    Raises InvalidRequest for another spelling of a field that the proxy decides on. `model[]` and ` Model` are read
    as `model` by some servers and not by others.
    """
    if "[file_id" in name.lower():
        raise InvalidRequest(f'"file_id" can\'t be used here: {STORED}.', param=name, code="unsupported_parameter")
    base = name.partition("[")[0]
    if base in endpoint.refused:
        return base
    plain = base.strip().casefold()
    if plain in _CHECKED_FIELDS and name != plain:
        raise InvalidRequest(f'Write "{plain}" and not "{name}".', param=plain)
    return name


def _field_value(name: str, value: str) -> object:
    """The value of a form field. `stream` and `n` get the type that they have in JSON, because they are checked."""
    if name == "stream" and value in ("true", "false"):
        return value == "true"
    # isascii: isdigit() also accepts other digits, such as U+0663, which the upstream may not read.
    if name == "n" and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    return value


def forwarded_body(request: Request, model: Model, *, maximum: int | None = None) -> bytes:
    """The body to send: with the upstream's name of the model, the options for usage, and a lowered maximum.

    `maximum` is the most output tokens of one choice. No field that this kind of upstream reads states more in the
    new body; a smaller number in it stays.
    """
    document = {**request.document, "model": model.upstream_model}
    if request.endpoint is RESPONSES and not model.allows.store:
        document["store"] = False  # OpenAI stores responses by default
    if request.adds_usage:
        document["stream_options"] = {**(document.get("stream_options") or {}), "include_usage": True}
    if request.adds_running_usage(model.upstream.kind):
        if model.upstream.kind == "llamacpp":
            document["timings_per_token"] = True
        else:
            document["stream_options"] = {**document["stream_options"], "continuous_usage_stats": True}
    if maximum is not None:
        kind = model.upstream.kind
        names = maximum_fields(request.endpoint, kind)
        # Lower the fields that the client stated. If it stated none, write the first.
        for name in [name for name in names if document.get(name) is not None] or names[:1]:
            asked = document.get(name)
            document[name] = maximum if asked is None or is_endless(asked, kind) else min(asked, maximum)
    return dump(document)


def error_event(endpoint: Endpoint, error: ProxyError) -> bytes:
    """An error inside a stream, in the form at which the SDKs raise an exception.

    On /responses older SDKs look for a member `error` and newer ones for the event's name, so the event has both.
    """
    if endpoint.is_of_messages:
        return b"event: error\ndata: " + dump(error_body(error)) + b"\n\n"
    if not endpoint.is_of_responses:
        return b"data: " + dump(error.body()) + b"\n\n"
    flat = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
    return b"event: error\ndata: " + dump({**flat, **error.body()}) + b"\n\n"


def maximum_fields(endpoint: Endpoint, kind: Kind) -> tuple[str, ...]:
    """The fields that bound an answer at this kind of upstream; the first is the one to write."""
    return _MAXIMUM_FIELDS.get((kind, endpoint.name), endpoint.maxima)


def is_endless(number: int, kind: Kind) -> bool:
    """Whether this kind of upstream reads the number as "no maximum": negative numbers, and 0 at Ollama."""
    return number < (1 if kind == "ollama" else 0)


def _refuse_fields(endpoint: Endpoint, document: Mapping[str, Any]) -> None:
    for name in endpoint.refused:
        if document.get(name) not in (None, False):
            raise InvalidRequest(
                f'"{name}" can\'t be used here: {endpoint.refused[name]}.', param=name, code="unsupported_parameter"
            )
    _refuse_stored_files(document)
    if endpoint.is_of_responses:
        _refuse_stored_items(document.get("input"))
        if not isinstance(document.get("previous_response_id"), str | None):
            raise InvalidRequest('"previous_response_id" must be a string.', param="previous_response_id")
    if isinstance(document.get("voice"), dict):
        raise InvalidRequest(
            '"voice" must name a built-in voice: a custom one is stored in an account that all users share.',
            param="voice",
            code="unsupported_parameter",
        )


def _refuse_unclear_usage_option(options: object) -> None:
    """Refuse `stream_options` if it isn't clear to every server whether usage is asked for.

    vLLM reads the text "false" as false, and Ollama reads `Include_Usage`. llama.cpp ignores options that are not an
    object. In each case the usage would not come although the proxy expects it.
    """
    if not isinstance(options, dict | None):
        raise InvalidRequest('"stream_options" must be an object.', param="stream_options", code="invalid_type")
    for name, value in options.items() if isinstance(options, dict) else ():
        if name.casefold() == "include_usage" and (name != "include_usage" or value not in (None, False, True)):
            raise InvalidRequest(
                '"stream_options.include_usage" must be true or false, and written in lower case.',
                param="stream_options.include_usage",
                code="invalid_type",
            )


def _refuse_stored_files(document: Mapping[str, Any]) -> None:
    for part in content_parts(document):
        # The id is in the part itself, or one level below: {"type": "file", "file": {"file_id": …}}.
        holders = [part, *map(part.get, ("file", "source", "image_url", "input_audio"))]
        if any(_names_a_file(holder) for holder in holders):
            raise InvalidRequest(
                f'"file_id" can\'t be used here: {STORED}.', param="file_id", code="unsupported_parameter"
            )


def _names_a_file(holder: object) -> bool:
    """Whether an object has a `file_id`, in any case: Go's decoder accepts `File_ID` too."""
    return isinstance(holder, dict) and any(key.casefold() == "file_id" and value for key, value in holder.items())


def _refuse_stored_items(items: object) -> None:
    """Refuse items of `input` that refer to stored items: their content is input that the request does not show."""
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and _may_refer_to_stored_item(item):
            raise InvalidRequest(
                'References to stored items can\'t be used here, and generated images only with their "result": '
                f"{STORED}.",
                param="input",
                code="unsupported_parameter",
            )


def _may_refer_to_stored_item(item: Mapping[str, Any]) -> bool:
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


def _model(value: object) -> str:
    if value is None:
        raise InvalidRequest(
            '"model" is missing: name the model to use.', param="model", code="missing_required_parameter"
        )
    if (
        not isinstance(value, str)
        or not 0 < len(value.strip()) == len(value) <= _MODEL_CHARACTERS_MAX
        or not value.isprintable()
        or _DOT_SEGMENT.search(value)
    ):
        raise InvalidRequest(
            f'"model" must be a name of 1 to {_MODEL_CHARACTERS_MAX} printable characters, without blanks around it '
            'and without "." or ".." between slashes.',
            param="model",
        )
    return value


def _stream(endpoint: Endpoint, document: Mapping[str, Any]) -> bool:
    value = document.get("stream")
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest('"stream" must be true or false.', param="stream", code="invalid_type")
    # On /audio/speech `stream` means nothing; `stream_format: "sse"` asks for a stream of events.
    return document.get("stream_format") == "sse" if endpoint is SPEECH else bool(value)


def _choices(endpoint: Endpoint, document: Mapping[str, Any]) -> int:
    """How many answers the upstream generates and bills.

    On /completions that is the larger of `n` and `best_of`, for each prompt: with n = 2, best_of = 5 and two prompts
    the upstream generates 10 answers and returns 4.
    """
    if not endpoint.generates:
        return 1
    for name in _ALL_MAXIMUM_FIELDS:
        _integer(name, document.get(name), least=-1 if name == "n_predict" else 0)
    each = max(_choice_count(name, document) for name in _CHOICE_COUNT_FIELDS)
    if endpoint.is_of_responses and each > 1:
        # llama.cpp reads `n` here too, but its stream reports the usage of one answer only.
        raise InvalidRequest(
            '"n" must be 1 here: send one request for each answer.', param="n", code="unsupported_parameter"
        )
    if endpoint.name != "completions":
        return each
    return max(each, _choice_count("best_of", document)) * _prompt_count(document)


def _prompt_count(document: Mapping[str, Any]) -> int:
    """How many prompts a request to /completions has. A list that begins with a number is one prompt of tokens."""
    prompt = document.get("prompt")
    is_several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    prompts = len(prompt) if isinstance(prompt, list) and is_several else 1
    # vLLM: prompts as embeddings, which are completed in addition to those in `prompt`.
    embedded = document.get("prompt_embeds")
    return prompts + (len(embedded) if isinstance(embedded, list) else 0)


def _choice_count(name: str, document: Mapping[str, Any]) -> int:
    number = _integer(name, document.get(name), least=1) or 1
    if number > _CHOICES_MAX:
        raise InvalidRequest(f'"{name}" must be {_CHOICES_MAX} or less.', param=name, code="integer_above_max_value")
    return number


def _integer(name: str, value: object, *, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f'"{name}" must be a whole number.', param=name, code="invalid_type")
    if not least <= value <= _NUMBER_MAX:
        raise InvalidRequest(f'"{name}" must be between {least} and {_NUMBER_MAX}.', param=name)
    return value
