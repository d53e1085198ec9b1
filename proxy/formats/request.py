"""Requests in OpenAI's and Anthropic's formats: parse what a client sends, and write what is forwarded.

A `Request` is one metered request after parsing. Fields that the proxy does not know are forwarded unchanged. The few
fields that it decides on are checked (`restrictions`), and the body is written anew from the parsed values, so the
upstream gets exactly what was checked. Which fields an upstream reads is in `kinds`. Sources: OpenAI's and
Anthropic's published API descriptions. Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from proxy.formats.body import RequestBody
from proxy.formats.endpoints import RESPONSES, SPEECH, Endpoint
from proxy.formats.kinds import CHOICE_COUNT_FIELDS, KINDS, Kind, kind_of
from proxy.formats.multipart import Form
from proxy.formats.restrictions import CHECKED_FIELDS, USUAL_FIELDS, check_body, check_form_field, used_fields
from proxy.formats.strict_json import dump, parse_exactly, parse_object
from proxy.policy.catalog import Model

# Fields of forms in which "false" is a text.
_TEXTS_OF_FORMS = ("model", "prompt")
# None of these is a spelling of another one.
_PLAIN_FIELDS = CHECKED_FIELDS | USUAL_FIELDS
# Fields that decide how many answers there are.
_CHOICE_FIELDS = frozenset((*CHOICE_COUNT_FIELDS, "best_of", "prompt", "prompt_embeds"))
# The kinds of upstream with an option for usage on every chunk.
_WITH_RUNNING_USAGE: dict[str, Kind] = {name: kind for name, kind in KINDS.items() if kind.running_usage is not None}


@dataclass(slots=True)
class Request:
    """One metered request: what it asks for, and its parsed body. Nothing changes it.

    `choices` is how many answers the upstream generates in total. `form` is set if the request is multipart.

    `adds_usage` says that the proxy asks for the usage of the stream although the client did not, and removes it
    again. `adds_running_usage` are the kinds of upstream at which the proxy asks for the usage so far on every chunk,
    so that it is exact even if the stream is cut. Only some kinds have an option for it. It is not used for several
    choices, because then a chunk has only the usage of its own choice.
    """

    endpoint: Endpoint
    model: str
    stream: bool
    choices: int
    body: RequestBody
    form: Form | None = None
    previous_response_id: str | None = None
    asks_for_usage: bool = False  # the client asked for the usage of its stream
    adds_usage: bool = False
    adds_running_usage: frozenset[str] = frozenset()
    has_several_prompts: bool = False  # on /completions, each with an input of its own
    is_stored: bool = False  # the upstream may store the response under its id
    is_option_withheld: bool = False  # the upstream rejected the `stream_options` that we added

    @property
    def used_fields(self) -> list[str]:
        """The fields and files that the request uses: all but those that are null, false, [] or ""."""
        return used_fields(self.body) + [file.name for file in (self.form.files if self.form else ())]

    def without_usage_option(self) -> "Request":
        """The same request, to which the proxy adds nothing that asks for usage."""
        return replace(self, adds_usage=False, adds_running_usage=frozenset(), is_option_withheld=True)


def parse_request(
    endpoint: Endpoint, body: bytes | bytearray, *, deployment: str | None = None, cost: int = 0
) -> Request:
    """Parse a request's body. Raises InvalidRequest, which names the field and says what to send instead.

    `deployment` is the model in the path that Azure's clients use. It overrides `model` in the body, as it does at
    Azure. `cost` is the `reading_cost` of the body.
    """
    read = RequestBody(parse_object(body, CHECKED_FIELDS, usual=_PLAIN_FIELDS), cost=cost)
    if read.has_large_floats:  # they may be integers, which must not be rounded
        read = RequestBody(parse_exactly(body), cost=cost)
    return _request(endpoint, read, deployment)


def parse_form_request(endpoint: Endpoint, form: Form, *, deployment: str | None = None) -> Request:
    """Make a request of a form, as `parse_request` does of JSON. Raises InvalidRequest likewise."""
    document: dict[str, Any] = {}
    for field in form.fields:
        name = check_form_field(endpoint, field.name)
        # Of `models[]` and `models[]` the used one counts.
        document[name] = document.get(name) or _field_value(field.name, field.value)
    for file in form.files:
        check_form_field(endpoint, file.name, is_file=True)
    return _request(endpoint, RequestBody(document), deployment, form)


def _request(endpoint: Endpoint, body: RequestBody, deployment: str | None, form: Form | None = None) -> Request:
    document = body.document
    stated_model = document.get("model")
    model: Any = deployment or (endpoint.default_model if stated_model is None else stated_model)
    check_body(endpoint, body, model=model)
    # On /audio/speech `stream` means nothing; `stream_format: "sse"` asks for a stream of events.
    stream = document.get("stream_format") == "sse" if endpoint is SPEECH else bool(document.get("stream"))
    has_choices = endpoint.generates and not _CHOICE_FIELDS.isdisjoint(document)
    choices = _choices(endpoint, document) if has_choices else 1
    options = document.get("stream_options")
    asks_for_usage = isinstance(options, dict) and bool(options.get("include_usage"))
    can_ask = stream and endpoint.has_usage_option
    return Request(
        endpoint=endpoint,
        model=model,
        stream=stream,
        choices=choices,
        body=body,
        form=form,
        previous_response_id=(document.get("previous_response_id") or None) if endpoint.is_of_responses else None,
        asks_for_usage=asks_for_usage,
        adds_usage=can_ask and not asks_for_usage,
        adds_running_usage=frozenset(
            name for name, kind in _WITH_RUNNING_USAGE.items() if not kind.asks_for_running_usage(document)
        )
        if can_ask and choices == 1
        else frozenset(),
        has_several_prompts=endpoint.name == "completions" and _prompt_count(document) > 1,
        is_stored=endpoint.is_of_responses and document.get("store") is not False,
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
    boundary, start = request.form.boundary.encode(), request.form.start
    return start, start, b'--%b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n' % (boundary, name)


def _field_value(name: str, value: str) -> object:
    """The value of a form field, as it is checked. Forms have only texts, and Python's clients write True and False.

    `stream` and `n` get the type that they have in JSON. "false" is false in all fields but texts, so that a refused
    field may be false as in JSON.
    """
    if value in ("false", "False") and name not in _TEXTS_OF_FORMS:
        return False
    if value in ("true", "True") and name == "stream":
        return True
    # isascii: isdigit() also accepts other digits, such as U+0663, which the upstream may not read.
    if name == "n" and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    return value


def forwarded_body(request: Request, model: Model, *, maximum: int | None = None) -> bytes:
    """The body to send: with the upstream's name of the model, the options for usage, and a lowered maximum.

    `maximum` is the most output tokens of one choice. No field that this kind of upstream reads states more in the
    new body; a smaller number in it stays.
    """
    document = {**request.body.document, "model": model.upstream_model}
    if request.endpoint is RESPONSES and not model.allows.store:
        document["store"] = False  # OpenAI stores responses by default
    if request.adds_usage:
        document["stream_options"] = {**(document.get("stream_options") or {}), "include_usage": True}
    kind = kind_of(model.upstream.kind)
    if model.upstream.kind in request.adds_running_usage:
        kind.add_running_usage(document)
    if maximum is not None:
        names = kind.maximum_fields(request.endpoint)
        # Lower the fields that the client stated. If it stated none, write the first.
        for name in [name for name in names if document.get(name) is not None] or names[:1]:
            asked = document.get(name)
            document[name] = (
                maximum if asked is None or kind.is_endless(asked, request.endpoint) else min(asked, maximum)
            )
    return dump(document)


def _choices(endpoint: Endpoint, document: Mapping[str, Any]) -> int:
    """How many answers the upstream generates and bills.

    On /completions that is the larger of `n` and `best_of`, for each prompt: with n = 2, best_of = 5 and two prompts
    the upstream generates 10 answers and returns 4.
    """
    each = max([document.get(name) or 1 for name in CHOICE_COUNT_FIELDS])
    if endpoint.name != "completions":
        return each
    return max(each, document.get("best_of") or 1) * _prompt_count(document)


def _prompt_count(document: Mapping[str, Any]) -> int:
    """How many prompts a request to /completions has. A list that begins with a number is one prompt of tokens."""
    prompt = document.get("prompt")
    is_several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    prompts = len(prompt) if isinstance(prompt, list) and is_several else 1
    # vLLM: prompts as embeddings, which are completed in addition to those in `prompt`.
    embedded = document.get("prompt_embeds")
    return prompts + (len(embedded) if isinstance(embedded, list) else 0)
