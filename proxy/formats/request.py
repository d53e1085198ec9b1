"""The requests of OpenAI's format and Anthropic's: what a call to one of our endpoints says, and what is sent on.

A `Request` is one metered request as we read it. Fields that we don't know are passed on untouched; the few on which
something is decided are checked, and what was checked is what is sent: the body is written anew from what was
read. Sources: OpenAI's published API description, and the vendors' documents for the fields that their servers
really read (`_MAXIMUM_FIELDS`).
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
from proxy.policy.policy import Kind, Model

_MODEL_CHARACTERS_MAX = 256
# In the path of a deployment they would lead to another one, also with their slashes encoded.
_LEADS_ELSEWHERE = re.compile(r"(?:^|[/\\])\.\.?(?:$|[/\\])")
_ANSWERS_MAX = 128
# Beyond any answer, and small enough that no product of such numbers leaves 64 bits.
_NUMBER_MAX = 10**9

# The fields from which a kind of upstream takes its maximum, the one that is written first. Ollama has no other
# than max_tokens in its struct; llama.cpp lets n_predict win over all, on each of its endpoints.
_MAXIMUM_FIELDS: dict[tuple[Kind, EndpointName], tuple[str, ...]] = {
    ("ollama", "chat"): ("max_tokens",),
    ("llamacpp", "chat"): ("n_predict", "max_completion_tokens", "max_tokens"),
    ("llamacpp", "completions"): ("n_predict", "max_completion_tokens", "max_tokens"),
    ("llamacpp", "responses"): ("max_output_tokens", "n_predict", "max_completion_tokens", "max_tokens"),
}
_MAXIMA = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
# How many answers to one prompt; the second is llama.cpp's own name, which wins there.
_ANSWER_COUNTS = ("n", "n_cmpl")

_KNOWN = frozenset(
    (
        *_MAXIMA,
        *_ANSWER_COUNTS,
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
        """The JSON object, or the fields of a form by name. It must not be asked for after `free`."""
        assert self._document is not None, "the body was freed when the upstream answered"
        return self._document

    def free(self) -> None:
        """Drop the parsed body."""
        self._document = None


@dataclass(frozen=True, slots=True)
class Request:
    """One metered request: what it asks for, and its parsed body, which is freed before the rest.

    `choices` is how many answers the upstream generates in all. `form` is set if the request is multipart.
    `asks_for_continuous_usage` and `asks_for_timings` are vLLM's and llama.cpp's options for usage on every chunk.
    """

    endpoint: Endpoint
    model: str
    stream: bool
    choices: int
    body: RequestBody
    form: Form | None = None
    previous_response_id: str | None = None
    asks_for_usage: bool = False  # the client itself wants to see the usage of a stream
    asks_for_continuous_usage: bool = False
    asks_for_timings: bool = False
    has_several_prompts: bool = False  # several texts to complete, each with an input of its own
    is_option_withheld: bool = False  # the upstream rejected the `stream_options` that we added

    @property
    def document(self) -> dict[str, Any]:
        """The parsed body; only until the upstream has answered."""
        return self.body.document

    @property
    def adds_usage(self) -> bool:
        """Whether we ask for the usage of the stream although the client did not, and remove it from the answer."""
        return self._may_ask and not self.asks_for_usage

    def adds_running_usage(self, kind: Kind) -> bool:
        """Whether we ask for the usage so far on every chunk: vLLM and llama.cpp give it, and then a cut is exact.

        Not for several choices: there each chunk has the usage of its own choice.
        """
        if not self._may_ask or self.choices != 1:
            return False
        match kind:
            case "vllm":
                return not self.asks_for_continuous_usage
            case "llamacpp":
                return not self.asks_for_timings
        return False

    @property
    def _may_ask(self) -> bool:
        return self.stream and self.endpoint.has_usage_option and not self.is_option_withheld


def parse_request(endpoint: Endpoint, body: bytes, *, deployment: str | None = None) -> Request:
    """Read a request's body; raises InvalidRequest that names the field and says what to write instead.

    A `deployment`, in the path of Azure's clients, is the model, whatever the body says: so Azure reads it too.
    """
    document = parse_object(body, _KNOWN)
    _refuse_fields(endpoint, document)
    if endpoint.has_usage_option:
        _refuse_unclear_usage_option(document.get("stream_options"))
    model = endpoint.default_model if document.get("model") is None else document["model"]
    return _request(endpoint, deployment or model, document)


def parse_form_request(endpoint: Endpoint, form: Form, *, deployment: str | None = None) -> Request:
    """Read a form as `parse_request` reads JSON; raises InvalidRequest likewise."""
    document: dict[str, Any] = {}
    for field in form.fields:
        document[_plain_name(endpoint, field.name)] = _read_field(field.name, field.value)
    for file in form.files:
        if _plain_name(endpoint, file.name) in _KNOWN:
            raise InvalidRequest(f'"{file.name}" is no file.', param=file.name)
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
        has_several_prompts=endpoint.name == "completions" and _prompts(document) > 1,
    )


def forwarded_model(request: Request, model: Model) -> tuple[int, int, bytes]:
    """What to replace in a form that is sent: from where to where, and by which bytes, so that it names the model.

    Where it names none, a part that does is put before all others.
    """
    assert request.form is not None, "it is a form"
    name = model.upstream_model.encode()
    field = request.form.field("model")
    if field is not None:
        return field.start, field.end, name
    boundary = request.form.boundary.encode()
    return 0, 0, b'--%b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n' % (boundary, name)


def _plain_name(endpoint: Endpoint, name: str) -> str:
    """A field's name; raises InvalidRequest where it is one of those that decide, written so that others overlook it.

    A member of a field that is refused (`svg[model]`) counts as that field.
    """
    if "[file_id" in name.lower():
        raise InvalidRequest(f'"file_id" can\'t be used here: {STORED}.', param=name, code="unsupported_parameter")
    base = name.partition("[")[0]
    if base in endpoint.refused:
        return base
    plain = base.strip().casefold()
    if plain in _KNOWN and name != plain:
        raise InvalidRequest(f'Write "{plain}" and not "{name}".', param=plain)
    return name


def _read_field(name: str, value: str) -> object:
    """The value of a form's field as JSON would have it, where something is decided on it."""
    if name == "stream" and value in ("true", "false"):
        return value == "true"
    if name == "n" and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    return value


def forwarded_body(request: Request, model: Model, *, maximum: int | None = None) -> bytes:
    """The body to send: under the upstream's name of the model, usage asked for, and the maximum lowered.

    `maximum` is the output of one choice in tokens; no field that this kind of upstream reads says more after it.
    """
    document = {**request.document, "model": model.upstream_model}
    if request.endpoint is RESPONSES and not model.allows.store:
        document["store"] = False  # else OpenAI's keeps it
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
        for name in [name for name in names if document.get(name) is not None] or names[:1]:
            asked = document.get(name)
            document[name] = maximum if asked is None or is_endless(asked, kind) else min(asked, maximum)
    return dump(document)


def error_event(endpoint: Endpoint, error: ProxyError) -> bytes:
    """An error in the middle of a stream, in the form at which the SDKs raise.

    For /responses the older SDKs raise only at an `error` member, the newer ones at the event's name: it has both.
    """
    if endpoint.is_of_messages:
        return b"event: error\ndata: " + dump(error_body(error)) + b"\n\n"
    if not endpoint.is_of_responses:
        return b"data: " + dump(error.body()) + b"\n\n"
    flat = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
    return b"event: error\ndata: " + dump({**flat, **error.body()}) + b"\n\n"


def maximum_fields(endpoint: Endpoint, kind: Kind) -> tuple[str, ...]:
    """The fields from which this kind of upstream takes its maximum; the first is the one to write."""
    return _MAXIMUM_FIELDS.get((kind, endpoint.name), endpoint.maxima)


def is_endless(number: int, kind: Kind) -> bool:
    """Whether this upstream takes the number for no maximum at all: what is negative, and at Ollama 0 too."""
    return number < (1 if kind == "ollama" else 0)


def _refuse_fields(endpoint: Endpoint, document: Mapping[str, Any]) -> None:
    for name in endpoint.refused:
        if document.get(name) not in (None, False):
            raise InvalidRequest(
                f'"{name}" can\'t be used here: {endpoint.refused[name]}.', param=name, code="unsupported_parameter"
            )
    _refuse_stored_files(document)
    if endpoint.is_of_responses:
        _refuse_references(document.get("input"))
        if not isinstance(document.get("previous_response_id"), str | None):
            raise InvalidRequest('"previous_response_id" must be a text.', param="previous_response_id")
    if isinstance(document.get("voice"), dict):
        raise InvalidRequest(
            '"voice" must be the name of a public voice here: one of your own would be stored in an account that all '
            "users share.",
            param="voice",
            code="unsupported_parameter",
        )


def _refuse_unclear_usage_option(options: object) -> None:
    """Refuse what leaves in doubt whether usage is asked for: some servers read "false" and `Include_Usage` too.

    And what is no object: a server that passes over it would pass over our asking too.
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
        holders = [part, *map(part.get, ("file", "source", "image_url", "input_audio"))]
        if any(_names_a_file(holder) for holder in holders):
            raise InvalidRequest(
                f'"file_id" can\'t be used here: {STORED}.', param="file_id", code="unsupported_parameter"
            )


def _names_a_file(holder: object) -> bool:
    """Whether it does, in whatever case: Go's decoder takes all."""
    return isinstance(holder, dict) and any(key.casefold() == "file_id" and value for key, value in holder.items())


def _refuse_references(items: object) -> None:
    """Refuse items that stand for stored ones."""
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and _is_reference(item):
            raise InvalidRequest(
                f'References to items can\'t be used here, and pictures only with their "result": {STORED}.',
                param="input",
                code="unsupported_parameter",
            )


def _is_reference(item: Mapping[str, Any]) -> bool:
    """A reference need not say its type; what else does without one is a message, and has content.

    A picture that a tool has drawn may come back by its id alone. Stricter than what `prompt` takes for a reference:
    what may be let in as a turn of a chat could be read as an id here.
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
        or _LEADS_ELSEWHERE.search(value)
    ):
        raise InvalidRequest(
            f'"model" must be a name of 1 to {_MODEL_CHARACTERS_MAX} printable characters, without blanks around it '
            "and without dots between slashes.",
            param="model",
        )
    return value


def _stream(endpoint: Endpoint, document: Mapping[str, Any]) -> bool:
    value = document.get("stream")
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest('"stream" must be true or false.', param="stream", code="invalid_type")
    # Speech has a field of its own for it.
    return document.get("stream_format") == "sse" if endpoint is SPEECH else bool(value)


def _choices(endpoint: Endpoint, document: Mapping[str, Any]) -> int:
    """How many answers the upstream generates: `n` or `best_of` of them, for each prompt."""
    if not endpoint.generates:
        return 1
    for name in _MAXIMA:
        _whole(name, document.get(name), least=-1 if name == "n_predict" else 0)
    each = max(_answers(name, document) for name in _ANSWER_COUNTS)
    if endpoint.is_of_responses and each > 1:
        # llama.cpp takes it there too, and says of a stream what one of them used.
        raise InvalidRequest('"n" must be 1 here: send a request for each.', param="n", code="unsupported_parameter")
    if endpoint.name != "completions":
        return each
    return max(each, _answers("best_of", document)) * _prompts(document)


def _prompts(document: Mapping[str, Any]) -> int:
    """How many texts are to be completed; a list that begins with a number is one of tokens."""
    prompt = document.get("prompt")
    is_several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    prompts = len(prompt) if isinstance(prompt, list) and is_several else 1
    # vLLM's, which are answered beside those of `prompt`.
    embedded = document.get("prompt_embeds")
    return prompts + (len(embedded) if isinstance(embedded, list) else 0)


def _answers(name: str, document: Mapping[str, Any]) -> int:
    number = _whole(name, document.get(name), least=1) or 1
    if number > _ANSWERS_MAX:
        raise InvalidRequest(f'"{name}" must be {_ANSWERS_MAX} or less.', param=name, code="integer_above_max_value")
    return number


def _whole(name: str, value: object, *, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f'"{name}" must be a whole number.', param=name, code="invalid_type")
    if not least <= value <= _NUMBER_MAX:
        raise InvalidRequest(f'"{name}" must be between {least} and {_NUMBER_MAX}.', param=name)
    return value
