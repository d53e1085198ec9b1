"""What a call may use at most, estimated before it is sent: a bound on its input, and the answer that it asks for.

The input is bounded by the bytes of the forwarded body, because one token is at least one byte. For prose this bound
is four times too high, so near a limit the texts are tokenized instead (`counted`). If the model reads something that
the body does not show, only the model's context bounds the input: what it leaves beside the visible input is the
hidden input, of which as much is reserved as is free.

Pure. What a request asks for is parsed in `request`, and what the model reads of it in `content`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

from proxy.formats.content import Prompt
from proxy.formats.kinds import Kind, kind_of
from proxy.formats.pieces import price_of, uses_of
from proxy.formats.request import Request
from proxy.formats.strict_json import plain_name, walk
from proxy.policy.amounts import TOKENS_MAX, Uses
from proxy.policy.catalog import Model
from proxy.policy.quota import Demand

# The output reserved for an answer if neither the request nor the model's configuration states a maximum.
DEFAULT_ANSWER_TOKENS = 4096
# The least that must be available for an answer before a call is sent, unless the request itself asks for less. With
# 800 of 1M tokens left, a call with max_tokens: 5000 waits or is refused, because an answer cut at 800 tokens is of
# little use and its input is charged all the same. A call with max_tokens: 500 is sent. In a quota of less than
# 10,240 tokens it is a tenth of the limit (`Demand.smallest_within`).
SMALLEST_ANSWER = 1024

# Fields that choose which tokens are generated, by their ids or by a program. With each of them an answer can consist
# of tokens that have no text, such as <|im_start|>, which servers leave out of the answer and bill. The last lines
# are grammars, which may name tokens: `<[151644]>*` in llama.cpp's and llguidance's.
_TOKEN_CHOICES = frozenset(
    plain_name(name)
    for name in (
        "logit_bias ignore_eos "  # OpenAI; vLLM, SGLang, llama.cpp
        "allowed_token_ids bad_words logits_processors vllm_xargs "  # vLLM
        "custom_logit_processor custom_params "  # SGLang
        "bad bad_token_ids embedding_bias end_id "  # TensorRT-LLM
        "ban_eos_token bypass_eos_token banned_tokens custom_token_bans "  # Aphrodite, KoboldCpp, TabbyAPI
        "suppress_tokens begin_suppress_tokens bad_words_ids force_words_ids forced_decoder_ids "  # transformers
        "grammar grammar_string guided_grammar structural_tag ebnf"
    ).split()
)
_MINIMA = frozenset(map(plain_name, ("min_tokens", "min_new_tokens", "min_completion_tokens", "min_length")))
_STOPS = frozenset(map(plain_name, ("stop_token_ids", "stop_tokens", "eos_token_id")))
# Objects of a request that may hold the same fields, at any depth: NVIDIA's `nvext`, Venice's, vLLM's and SGLang's,
# and options that gateways pass on.
_SECTIONS = frozenset(
    plain_name(name)
    for name in (
        "additionalModelRequestFields generationConfig model_kwargs nvext options parameters sampling_params "
        "structured_outputs venice_parameters"
    ).split()
)
# Fields that most requests have, which are none of these: they need no closer look.
_USUAL_FIELDS = frozenset(
    "model messages input stream stream_options temperature top_p n user tools tool_choice metadata store stop seed "
    "system max_tokens max_completion_tokens max_output_tokens parallel_tool_calls prompt".split()
)
# Where a request states a budget for reasoning: in a member of a field.
REASONING_BUDGETS = (("thinking", "budget_tokens"), ("reasoning", "max_tokens"))
_BUDGET_FIELDS = frozenset(name for name, _ in REASONING_BUDGETS)
# Formats of `response_format` that are grammars. A JSON Schema produces text only.
_GRAMMAR_FORMATS = ("grammar", "gbnf", "ebnf", "lark_grammar", "structural_tag")


def estimate_demand(request: Request, model: Model, prompt: Prompt, *, body_bytes: int) -> Demand:
    """What a call may use at most, in tokens. `body_bytes` is the length of the forwarded body.

    A stream with max_tokens: 5000 and n: 3 has an output maximum of 15,000 tokens. Its smallest answer is 3 × 1,024 =
    3,072 tokens. If all of its output can be counted while it streams, these 3,072 are reserved first, and more as it
    grows; otherwise all 15,000.
    """
    endpoint, uses, price = request.endpoint, request.endpoint.uses, 0
    if endpoint.by_piece:
        uses, price = uses_of(request, model), price_of(request, model)
    if uses is Uses.NOTHING or uses is Uses.REQUEST:
        return Demand(input=0, output_maximum=0, smallest=0, initial_hold=0, uses=uses)
    if uses is Uses.OUTPUT:
        return Demand(input=0, output_maximum=price, smallest=price, initial_hold=price, uses=uses)
    bound = prompt.bound(body_bytes)
    hidden_input = _hidden_input(prompt, model, bound) if prompt.has_hidden_input else 0
    if not endpoint.shows_output:
        # No field makes such an answer shorter, and its tokens are known only at its end. So all of it is reserved.
        # An answer that may state its tokens, and does not, costs its price.
        output_maximum = max(_unbounded_answer(request, model), price)
        return Demand(
            input=bound,
            output_maximum=output_maximum,
            smallest=output_maximum,
            initial_hold=output_maximum,
            is_estimated=True,
            hidden_input=hidden_input,
            uses=uses,
        )
    kind = kind_of(model.upstream.kind)
    stated = stated_maximum(request, kind)
    known = stated if stated is not None else model.max_output_tokens or _upstream_default(request, kind)
    if known is None and model.context is not None and kind.ends_at_context and not prompt.has_hidden_input:
        # An input has at least one token. With hosted tools a model runs several times, each time in a context of its
        # own, so the context bounds nothing if input is hidden.
        known = model.context - 1 if model.context <= DEFAULT_ANSWER_TOKENS else None
    each = DEFAULT_ANSWER_TOKENS if known is None else known
    output_maximum = min(each * request.choices, TOKENS_MAX)
    # The reasoning budget comes on top, because a short answer would otherwise be all reasoning and no text.
    document = request.body.document
    budget = 0 if _BUDGET_FIELDS.isdisjoint(document) else reasoning_budget(document)
    least = budget + (model.smallest_answer or SMALLEST_ANSWER)
    # If 0 may mean no maximum, the least that can be sent instead is 1.
    least = 1 if not stated and _asks_for_0(request, kind) else least
    smallest = min(min(each, least) * request.choices, output_maximum)
    grows = request.stream and streams_all_output(request, model)
    return Demand(
        input=bound,
        output_maximum=output_maximum,
        smallest=smallest,
        initial_hold=smallest if grows else output_maximum,
        is_unbounded=known is None,
        is_estimated=True,
        hidden_input=hidden_input,
        uses=uses,
        grows=grows,
        fixed=min(budget * request.choices, TOKENS_MAX) if model.smallest_answer is None else TOKENS_MAX,
        floor=min(kind.least_written(endpoint) * request.choices, TOKENS_MAX),
    )


def largest_demand(demands: Sequence[Demand]) -> Demand:
    """A demand that covers each of these. They are of one call, which several upstreams read differently.

    Each number is the largest of the demands, because the call may go to any of the upstreams: one may ignore the
    field in which the client stated its maximum, and another may price images higher.
    """
    if len(demands) == 1:
        return demands[0]
    return Demand(
        input=max(demand.input for demand in demands),
        output_maximum=max(demand.output_maximum for demand in demands),
        smallest=max(demand.smallest for demand in demands),
        initial_hold=max(demand.initial_hold for demand in demands),
        is_unbounded=any(demand.is_unbounded for demand in demands),
        is_estimated=any(demand.is_estimated for demand in demands),
        hidden_input=max(demand.hidden_input for demand in demands),
        uses=reduce(or_, (demand.uses for demand in demands)),
        grows=all(demand.grows for demand in demands),
        fixed=max(demand.fixed for demand in demands),
        floor=max(demand.floor for demand in demands),
    )


def counted(demand: Demand, model: Model, prompt: Prompt, *, text_tokens: int | None, is_guess: bool) -> Demand:
    """The same demand with the input counted: `text_tokens` is the count of the texts, None if counting failed.

    If it failed, the bound by bytes stays, and is not counted again. A demand that is no estimate stays as it is.
    `is_guess`: the tokenizer may not be the model's own. Two tokenizers differ by a fifth in most languages, so half
    as many tokens again are reserved as far as they are free: for a bound of 1,000 bytes, 200 counted tokens and an
    overhead of 7, the input is 207 and the hidden input 100.
    """
    if text_tokens is None or not demand.is_estimated:
        return replace(demand, is_estimated=False)
    tokens = min(demand.input, text_tokens + prompt.overhead)
    more = min(demand.input - tokens, text_tokens // 2) if is_guess else 0
    hidden_input = max(more, _hidden_input(prompt, model, tokens))
    return replace(demand, input=tokens, is_estimated=False, hidden_input=hidden_input)


def with_context(demand: Demand, prompt: Prompt, *, context: int) -> Demand:
    """The same demand for a model with this context, in tokens, which was not known when it was estimated."""
    return replace(demand, hidden_input=max(0, context - demand.input) if prompt.has_hidden_input else 0)


def _hidden_input(prompt: Prompt, model: Model, input_tokens: int) -> int:
    """The most input that the request does not show: what the model's context leaves beside the visible input.

    0 if the context is not configured: then nothing is known that could be reserved.
    """
    return max(0, (model.context or 0) - input_tokens) if prompt.has_hidden_input else 0


def streams_all_output(request: Request, model: Model) -> bool:
    """Whether all tokens of an answer can be counted while it streams, so that its hold may grow with it."""
    if not (request.stream and request.endpoint.shows_output) or _hides_reasoning(model):
        return False
    asks_for_thinking = request.endpoint.is_of_messages and _asks_for_thinking(request.body.document)
    return not (asks_for_thinking or _asks_for_hidden_output(request.body.document))


def _unbounded_answer(request: Request, model: Model) -> int:
    """The output reserved for answers that no field of the request bounds."""
    each = min(request.endpoint.answer_tokens, model.max_output_tokens or TOKENS_MAX)
    return min(each * request.choices, TOKENS_MAX)


def _hides_reasoning(model: Model) -> bool:
    """Whether this model reasons in tokens that the answer does not show: as configured, else by kind and name."""
    if model.reasoning is not None:
        return model.reasoning
    return kind_of(model.upstream.kind).hides_reasoning(model.upstream_model)


def _asks_for_hidden_output(document: Mapping[str, Any]) -> bool:
    """Whether a request asks for output that is billed but can't be counted as streamed text.

    That is: audio and images; a prediction, whose rejected tokens are billed; reasoning with a budget; reasoning that
    is left out of the answer; tokens without text. Some servers accept the names in any case, or in camel case.
    """
    if _USUAL_FIELDS.issuperset(document):
        return False
    fields = _plain_fields(document)
    sections = [
        _plain_fields(inner)
        for name, value in fields
        if name in _SECTIONS
        for inner in walk(value)
        if isinstance(inner, dict)
    ]
    return reasoning_budget(document) > 0 or any(map(_hides_output, [fields, *sections]))


def _plain_fields(document: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The unusual fields by their plain names. A name may be there twice, in two spellings."""
    return [(plain_name(name), value) for name, value in document.items() if name not in _USUAL_FIELDS]


def _hides_output(fields: Sequence[tuple[str, Any]]) -> bool:
    return any(_asks_for_no_text(name, value) for name, value in fields) or _may_lack_text(fields)


def _asks_for_no_text(name: str, value: object) -> bool:
    """Whether this field asks for something else than text, or leaves reasoning out of the answer.

    The fields that leave it out are those of vLLM, OpenRouter, Groq, SGLang and Venice.
    """
    match name:
        case "modalities" | "responsemodalities":
            return isinstance(value, list) and any(
                isinstance(each, str) and each.casefold() != "text" for each in value
            )
        case "includereasoning" | "streamreasoning":
            return value not in (None, True)
        case "reasoning":
            return isinstance(value, dict) and any(name == "exclude" and on for name, on in _plain_fields(value))
        case "reasoningformat":
            return isinstance(value, str) and value.casefold() == "hidden"
        case "prediction" | "stripthinkingresponse":
            return bool(value)
    return False


def _may_lack_text(fields: Sequence[tuple[str, Any]]) -> bool:
    """Whether these fields of a request can make a model generate any number of tokens that have no text.

    `min_tokens` does so together with `stop_token_ids`: until the minimum is reached, tokens that would stop the
    answer are not generated. If these are all that have text, only the others are left. Either of the two alone
    cannot choose the tokens. `detokenize: false` leaves the text out.
    """
    used = {name for name, value in fields if value}
    return (
        not used.isdisjoint(_TOKEN_CHOICES)
        or not (used.isdisjoint(_MINIMA) or used.isdisjoint(_STOPS))
        or any(name == "detokenize" and value not in (None, True) for name, value in fields)
        or any(name == "responseformat" and _is_grammar(value) for name, value in fields)
    )


def _is_grammar(format_: object) -> bool:
    types = (value for name, value in _plain_fields(format_) if name == "type") if isinstance(format_, dict) else ()
    return any(isinstance(type_, str) and type_.casefold() in _GRAMMAR_FORMATS for type_ in types)


def _asks_for_thinking(document: Mapping[str, Any]) -> bool:
    """Whether a request to /messages asks for thinking, with a budget or `adaptive`.

    The answer shows only a summary of it. All of it is within `max_tokens`.
    """
    section = document.get("thinking")
    return isinstance(section, dict) and section.get("type") != "disabled"


def reasoning_budget(document: Mapping[str, Any]) -> int:
    """The tokens that a request sets aside for reasoning: in Anthropic's field or in OpenRouter's; 0 if in none."""
    for name, member in REASONING_BUDGETS:
        section = document.get(name)
        budget = section.get(member) if isinstance(section, dict) else None
        if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
            return min(budget, TOKENS_MAX)
    return 0


def stated_maximum(request: Request, kind: Kind) -> int | None:
    """The maximum that the request states in the fields which this kind of upstream reads; None for no maximum.

    Of several fields the largest counts: which one wins differs by the upstream's version. -1 in one of them is no
    maximum, whatever the others say.
    """
    endpoint, document = request.endpoint, request.body.document
    largest = None
    for name in kind.maximum_fields(endpoint):
        number = document.get(name)
        if number is not None:
            if kind.is_endless(number, endpoint):
                return None
            largest = number if largest is None else max(largest, number)
    return largest


def _asks_for_0(request: Request, kind: Kind) -> bool:
    """Whether all fields that bound an answer at this kind of upstream, of those that the request states, say 0."""
    values = map(request.body.document.get, kind.maximum_fields(request.endpoint))
    numbers = [number for number in values if number is not None]
    return bool(numbers) and not any(numbers)


def _upstream_default(request: Request, kind: Kind) -> int | None:
    """The maximum that the upstream itself applies if the request states none; None for no maximum.

    Only /completions has one, if the field is absent. For null vLLM applies none.
    """
    has_default = request.endpoint.name == "completions" and "max_tokens" not in request.body.document
    return kind.completions_default if has_default else None
