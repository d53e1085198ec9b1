"""What a call may use at the most, before it is sent: the bound on its input, and the answer that it asks for.

The input of a call is bounded by the bytes of the body that is sent. That is four times too much for prose, so near a
limit its tokens are counted instead. What refers to something that the body doesn't show is open: nothing bounds it
but the model's context, if that is known, so as much as is left of that is held beside it.

Pure. What a request means is read in `wire` and `prompt`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from proxy.formats.content import Prompt
from proxy.formats.endpoints import SPEECH
from proxy.formats.request import Request, is_endless, maximum_fields
from proxy.policy.amounts import TOKENS_MAX
from proxy.policy.policy import Kind, Model
from proxy.policy.quota import Demand

# What is held for an answer whose length neither the request nor the model's configuration states.
_ANSWER_TOKENS = 4096
# OpenAI's default for /completions, where nothing else is asked.
_COMPLETION_TOKENS = 16
# No answer is started that could be shorter than this, unless the request asks for less.
SMALLEST_ANSWER = 1024
# OpenAI's models that show every token that they bill, by the beginning of the name; all others think unseen.
_SHOW_ALL = tuple("babbage-002 chatgpt-4o davinci-002 gpt-3.5 gpt-35 gpt-4".split())


def estimate_demand(request: Request, model: Model, prompt: Prompt, *, body_bytes: int) -> Demand:
    """What a call may use at the most; `body_bytes` is the length of the body that is sent."""
    if request.endpoint.charge in ("request", "nothing"):
        return Demand(input=0, output_maximum=0, smallest=0, initial_hold=0)
    bound = prompt.bound(body_bytes)
    hidden_input = _unseen(prompt, model, bound)
    if not request.endpoint.shows_output:
        # Nothing makes it shorter, and nothing can be seen of it before its end.
        output_maximum = _whole_answer(request, model)
        return Demand(
            input=bound,
            output_maximum=output_maximum,
            smallest=output_maximum,
            initial_hold=output_maximum,
            is_estimated=True,
            hidden_input=hidden_input,
        )
    asked = _asked(request, model.upstream.kind)
    known = asked if asked is not None else model.max_output_tokens or _own_default(request, model.upstream.kind)
    each = _ANSWER_TOKENS if known is None else known
    output_maximum = min(each * request.choices, TOKENS_MAX)
    smallest = min(each, _thinking(request.document) + (model.smallest_answer or SMALLEST_ANSWER)) * request.choices
    smallest = min(smallest, output_maximum)
    return Demand(
        input=bound,
        output_maximum=output_maximum,
        smallest=smallest,
        initial_hold=smallest if streams_all_output(request, model) else output_maximum,
        is_unbounded=known is None,
        is_estimated=True,
        hidden_input=hidden_input,
    )


def largest_demand(demands: Sequence[Demand]) -> Demand:
    """What covers each of these: of one call that may go to upstreams which read it differently."""
    return Demand(
        input=max(demand.input for demand in demands),
        output_maximum=max(demand.output_maximum for demand in demands),
        smallest=max(demand.smallest for demand in demands),
        initial_hold=max(demand.initial_hold for demand in demands),
        is_unbounded=any(demand.is_unbounded for demand in demands),
        is_estimated=any(demand.is_estimated for demand in demands),
        hidden_input=max(demand.hidden_input for demand in demands),
    )


def counted(demand: Demand, model: Model, prompt: Prompt, *, text_tokens: int | None, is_guess: bool) -> Demand:
    """The same demand once the text of its input was counted; by its bytes, should that have failed (None).

    `is_guess` where the tokenizer may be another one than the model's, which counts a fifth more or less in most
    languages: half as much again is held, if there is room.
    """
    if text_tokens is None:
        return replace(demand, is_estimated=False)
    tokens = min(demand.input, text_tokens + prompt.overhead)
    more = min(demand.input - tokens, text_tokens // 2) if is_guess else 0
    return replace(demand, input=tokens, is_estimated=False, hidden_input=max(more, _unseen(prompt, model, tokens)))


def _unseen(prompt: Prompt, model: Model, input_tokens: int) -> int:
    """The most that a call may read without showing it: what its context leaves beside the input that is shown."""
    return max(0, (model.context or 0) - input_tokens) if prompt.is_open else 0


def streams_all_output(request: Request, model: Model) -> bool:
    """Whether all the tokens of an answer can be seen as they come, so that its hold may grow with it."""
    hides = (
        _hides(model) or _asks_for_hidden(request.document) or (request.endpoint.is_of_messages and _thinks(request))
    )
    return request.stream and request.endpoint.shows_output and not hides


def _whole_answer(request: Request, model: Model) -> int:
    """What is held for an answer that no field of its request bounds; 0 where it won't say what it cost."""
    says_nothing = request.endpoint is SPEECH and not request.stream
    each = 0 if says_nothing else min(request.endpoint.answer_tokens, model.max_output_tokens or TOKENS_MAX)
    return min(each * request.choices, TOKENS_MAX)


def _hides(model: Model) -> bool:
    """Whether this model thinks in tokens that no answer shows. OpenAI's own do, unless they are known not to."""
    if model.reasoning is not None:
        return model.reasoning
    return model.upstream.kind in ("openai", "azure") and not model.upstream_model.removeprefix("ft:").startswith(
        _SHOW_ALL
    )


def _asks_for_hidden(document: Mapping[str, Any]) -> bool:
    """Whether a request asks for what is billed and not streamed as text: thoughts, predictions, sound.

    Thoughts also where they are to be left out or kept back (fields of vLLM, OpenRouter, Groq and SGLang); and tokens
    that have no text, of which a client may ask for as many as it likes.
    """
    modalities, reasoning = document.get("modalities"), document.get("reasoning")
    speaks = isinstance(modalities, list) and "audio" in modalities
    leaves_out = (
        document.get("include_reasoning") not in (None, True)
        or (isinstance(reasoning, dict) and bool(reasoning.get("exclude")))
        or document.get("reasoning_format") == "hidden"
        or document.get("stream_reasoning") not in (None, True)
    )
    has_no_text = bool(document.get("logit_bias")) or bool(document.get("ignore_eos"))
    return speaks or leaves_out or has_no_text or bool(document.get("prediction")) or _thinking(document) > 0


def _thinks(request: Request) -> bool:
    """Whether a request of Anthropic's asks for thoughts, of which a summary is shown: with a budget, or `adaptive`.

    They are all within `max_tokens`.
    """
    section = request.document.get("thinking")
    return isinstance(section, dict) and section.get("type") != "disabled"


def _thinking(document: Mapping[str, Any]) -> int:
    """The tokens that a request sets aside for thinking: Anthropic's field, and that of OpenRouter."""
    for name, member in (("thinking", "budget_tokens"), ("reasoning", "max_tokens")):
        section = document.get(name)
        budget = section.get(member) if isinstance(section, dict) else None
        if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
            return min(budget, TOKENS_MAX)
    return 0


def _asked(request: Request, kind: Kind) -> int | None:
    """The maximum that the request states in a field which this upstream reads; the larger one counts."""
    stated = [request.document.get(name) for name in maximum_fields(request.endpoint, kind)]
    numbers = [number for number in stated if number is not None]
    if any(is_endless(number, kind) for number in numbers):
        return None
    return max(numbers, default=None)


def _own_default(request: Request, kind: Kind) -> int | None:
    """The maximum that an upstream takes by itself where the request states none."""
    # A field left out means 16, but null means no maximum at all (vLLM).
    short = request.endpoint.name == "completions" and "max_tokens" not in request.document
    return _COMPLETION_TOKENS if short and kind not in ("llamacpp", "ollama") else None
