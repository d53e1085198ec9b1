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
from proxy.policy.amounts import TOKENS_MAX, Uses
from proxy.policy.catalog import Model
from proxy.policy.quota import Demand

# The output reserved for an answer if neither the request nor the model's configuration states a maximum.
DEFAULT_ANSWER_TOKENS = 4096
# The least that must be available for an answer before a call is sent, unless the request itself asks for less. With
# 800 tokens left, a call with max_tokens: 5000 waits or is refused, because an answer cut at 800 tokens is of little
# use and its input is charged all the same. A call with max_tokens: 500 is sent.
SMALLEST_ANSWER = 1024

# Fields that choose which tokens are generated, by their ids or by a program. With each of them an answer can consist
# of tokens that have no text, such as <|im_start|>, which servers leave out of the answer and bill. The last lines
# are grammars, which may name tokens: `<[151644]>*` in llama.cpp's and llguidance's.
_TOKEN_CHOICES = frozenset(
    "logit_bias ignore_eos "  # OpenAI; vLLM, SGLang, llama.cpp
    "allowed_token_ids bad_words logits_processors vllm_xargs "  # vLLM
    "custom_logit_processor custom_params "  # SGLang
    "bad bad_token_ids embedding_bias end_id "  # TensorRT-LLM
    "ban_eos_token bypass_eos_token banned_tokens custom_token_bans "  # Aphrodite, KoboldCpp, TabbyAPI
    "suppress_tokens begin_suppress_tokens bad_words_ids force_words_ids forced_decoder_ids "  # transformers
    "grammar guided_grammar structural_tag ebnf".split()
)
# Objects of a request that may hold the same fields: NVIDIA's `nvext`, vLLM's and SGLang's.
_TOKEN_CHOICE_SECTIONS = ("nvext", "sampling_params", "structured_outputs")
# Formats of `response_format` that are grammars. A JSON Schema produces text only.
_GRAMMAR_FORMATS = ("grammar", "gbnf", "ebnf", "lark_grammar", "structural_tag")


def estimate_demand(request: Request, model: Model, prompt: Prompt, *, body_bytes: int) -> Demand:
    """What a call may use at most, in tokens. `body_bytes` is the length of the forwarded body.

    A stream with max_tokens: 5000 and n: 3 has an output maximum of 15,000 tokens. Its smallest answer is 3 × 1,024 =
    3,072 tokens. If all of its output can be counted while it streams, these 3,072 are reserved first, and more as it
    grows; otherwise all 15,000.
    """
    uses, price = uses_of(request, model), price_of(request, model)
    if uses in (Uses.NOTHING, Uses.REQUEST):
        return Demand(input=0, output_maximum=0, smallest=0, initial_hold=0, uses=uses)
    if uses is Uses.OUTPUT:
        return Demand(input=0, output_maximum=price, smallest=price, initial_hold=price, uses=uses)
    bound = prompt.bound(body_bytes)
    hidden_input = _hidden_input(prompt, model, bound)
    if not request.endpoint.shows_output:
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
    stated = _stated_maximum(request, kind)
    known = stated if stated is not None else model.max_output_tokens or _upstream_default(request, kind)
    each = DEFAULT_ANSWER_TOKENS if known is None else known
    output_maximum = min(each * request.choices, TOKENS_MAX)
    # The reasoning budget comes on top, because a short answer would otherwise be all reasoning and no text.
    least = _reasoning_budget(request.document) + (model.smallest_answer or SMALLEST_ANSWER)
    smallest = min(min(each, least) * request.choices, output_maximum)
    return Demand(
        input=bound,
        output_maximum=output_maximum,
        smallest=smallest,
        initial_hold=smallest if streams_all_output(request, model) else output_maximum,
        is_unbounded=known is None,
        is_estimated=True,
        hidden_input=hidden_input,
        uses=uses,
    )


def largest_demand(demands: Sequence[Demand]) -> Demand:
    """A demand that covers each of these. They are of one call, which several upstreams read differently.

    Each number is the largest of the demands, because the call may go to any of the upstreams: one may ignore the
    field in which the client stated its maximum, and another may price images higher.
    """
    return Demand(
        input=max(demand.input for demand in demands),
        output_maximum=max(demand.output_maximum for demand in demands),
        smallest=max(demand.smallest for demand in demands),
        initial_hold=max(demand.initial_hold for demand in demands),
        is_unbounded=any(demand.is_unbounded for demand in demands),
        is_estimated=any(demand.is_estimated for demand in demands),
        hidden_input=max(demand.hidden_input for demand in demands),
        uses=reduce(or_, (demand.uses for demand in demands)),
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
    has_hidden_output = (
        _hides_reasoning(model)
        or _asks_for_hidden_output(request.document)
        or (request.endpoint.is_of_messages and _asks_for_thinking(request.document))
    )
    return request.stream and request.endpoint.shows_output and not has_hidden_output


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

    That is: audio; a prediction, whose rejected tokens are billed; reasoning with a budget; reasoning that is left
    out of the answer (`include_reasoning`, `reasoning.exclude`, `reasoning_format`, `stream_reasoning`: fields of
    vLLM, OpenRouter, Groq and SGLang); tokens without text.
    """
    modalities, reasoning = document.get("modalities"), document.get("reasoning")
    asks_for_audio = isinstance(modalities, list) and "audio" in modalities
    leaves_out = (
        document.get("include_reasoning") not in (None, True)
        or (isinstance(reasoning, dict) and bool(reasoning.get("exclude")))
        or document.get("reasoning_format") == "hidden"
        or document.get("stream_reasoning") not in (None, True)
    )
    has_budget = _reasoning_budget(document) > 0
    return (
        asks_for_audio
        or leaves_out
        or bool(document.get("prediction"))
        or has_budget
        or _may_lack_text(document)
        or any(_may_lack_text(section) for section in map(document.get, _TOKEN_CHOICE_SECTIONS))
    )


def _may_lack_text(fields: object) -> bool:
    """Whether these fields of a request can make a model generate any number of tokens that have no text.

    `min_tokens` does so together with `stop_token_ids`: until the minimum is reached, tokens that would stop the
    answer are not generated. If these are all that have text, only the others are left. Either of the two alone
    cannot choose the tokens. `detokenize: false` leaves the text out.
    """
    if not isinstance(fields, Mapping):
        return False
    # Servers written in Go or with aliases accept names in any case.
    used = {name.casefold() for name, value in fields.items() if value}
    has_minimum = not used.isdisjoint(("min_tokens", "min_new_tokens", "min_completion_tokens"))
    has_stops = not used.isdisjoint(("stop_token_ids", "stop_tokens", "eos_token_id"))
    format_ = fields.get("response_format")
    return (
        not used.isdisjoint(_TOKEN_CHOICES)
        or (has_minimum and has_stops)
        or fields.get("detokenize") not in (None, True)
        or (isinstance(format_, dict) and format_.get("type") in _GRAMMAR_FORMATS)
    )


def _asks_for_thinking(document: Mapping[str, Any]) -> bool:
    """Whether a request to /messages asks for thinking, with a budget or `adaptive`.

    The answer shows only a summary of it. All of it is within `max_tokens`.
    """
    section = document.get("thinking")
    return isinstance(section, dict) and section.get("type") != "disabled"


def _reasoning_budget(document: Mapping[str, Any]) -> int:
    """The tokens that a request sets aside for reasoning: in Anthropic's field or in OpenRouter's; 0 if in none."""
    for name, member in (("thinking", "budget_tokens"), ("reasoning", "max_tokens")):
        section = document.get(name)
        budget = section.get(member) if isinstance(section, dict) else None
        if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
            return min(budget, TOKENS_MAX)
    return 0


def _stated_maximum(request: Request, kind: Kind) -> int | None:
    """The maximum that the request states in the fields which this kind of upstream reads; None for no maximum.

    Of several fields the largest counts: which one wins differs by the upstream's version. -1 in one of them is no
    maximum, whatever the others say.
    """
    values = [request.document.get(name) for name in kind.maximum_fields(request.endpoint)]
    numbers = [number for number in values if number is not None]
    if any(kind.is_endless(number) for number in numbers):
        return None
    return max(numbers, default=None)


def _upstream_default(request: Request, kind: Kind) -> int | None:
    """The maximum that the upstream itself applies if the request states none; None for no maximum.

    Only /completions has one, if the field is absent. For null vLLM applies none.
    """
    has_default = request.endpoint.name == "completions" and "max_tokens" not in request.document
    return kind.completions_default if has_default else None
