"""The maximum that the proxy writes into a request near the end of a quota, and an upstream's answer that rejects it.

A quota that has less left than a call asks for caps the answer. `written_maximum` says whether that needs a maximum
in the forwarded request. Some upstreams reject a maximum that is larger than what the model's context leaves, instead
of lowering it themselves. Then `allowed_maximum` reads from their message how much they accept.

Sources: the published error messages of the vendors, and the source code of vLLM, SGLang and TGI. Pure.
"""

import re

import orjson

from proxy.formats.estimate import stated_maximum
from proxy.formats.kinds import kind_of
from proxy.formats.request import Request
from proxy.policy.catalog import Model

# For a field with a bad value OpenAI and vLLM answer 400, TGI, FastAPI and Mistral 422.
_REJECTION_STATUSES = (400, 422)
# The field in a message: `max_completion_tokens`, `maxOutputTokens` (Google), "the maximum tokens" (Bedrock).
_FIELD = re.compile(r"max(?:imum)?[ _]?(?:completion|output|new)?[ _]?tokens")
_N = r"([0-9][0-9,_]*)"
# The context and the input, which the maximum must fit beside: "(3492 > 2048 - 8)" (vLLM until 0.11), "context limit:
# 188240 + 21333 > 200000" (Anthropic), "`max_new_tokens` must be <= 2048. Given: 8 `inputs` tokens" (TGI, Together).
_CONTEXT_AND_INPUT = (
    re.compile(rf"> (?P<context>{_N}) - (?P<input>{_N})"),
    re.compile(rf"context limit: (?P<input>{_N}) \+ {_N} > (?P<context>{_N})"),
    re.compile(rf"max_new_tokens`? must be <= (?P<context>{_N})\. given: (?P<input>{_N})"),
)
# "maximum context length is 2048 tokens" (OpenAI, Azure, vLLM, OpenRouter), "context length of 2048" (SGLang),
# "context length is only 2048", "max_model_len=max_total_tokens=2048" (vLLM).
_CONTEXT = re.compile(rf"(?:context (?:length|window|size)(?: is| of| only)*|max_model_len[=\w]*=) ?{_N}")
# The input and the maximum together: "requested 3500 tokens (8 in the messages, 3492 in the completion)" (OpenAI),
# "requested about 3500 tokens" (OpenRouter), "requested a total of 3500 tokens" (SGLang), "for a total of 3500
# tokens" (vLLM from 0.12 on).
_TOTAL = re.compile(rf"(?:requested(?: about| a total of)?|for a total of) {_N} tokens")
_INPUT = re.compile(rf"(?:passed|your request has|prompt contains) {_N} input tokens")
# What is accepted at most: "supports at most 16384 completion tokens" (OpenAI), "9999 > 8192, which is the maximum
# allowed number of output tokens" (Anthropic), "`max_tokens` must be less than or equal to `8192`" (Groq), "the valid
# range of max_tokens is [1, 8192]" (DeepSeek), "Range of max_tokens should be [1, 8192]" (Qwen), "expected a value
# <= 12288, but got 32000" (OpenAI, Doubao), "exceeds the model limit of 4096" (Bedrock).
_AT_MOST = (
    re.compile(rf"supports at most {_N}"),
    re.compile(rf"> {_N}, which is the maximum allowed number of output tokens"),
    re.compile(rf"max_\w*tokens\b.{{0,80}}?(?:less than or equal to|at most|no more than|<=) [`'\"\\]*{_N}"),
    re.compile(rf"range of max_\w*tokens (?:is|should be) \[ ?[0-9]+ ?, ?{_N}"),
    re.compile(rf"expected a value <= {_N}"),
    re.compile(rf"exceeds the model limit of {_N}"),
)
# "the supported range is from 1 (inclusive) to 8193 (exclusive)" (Google).
_BELOW = re.compile(rf"supported range is from [0-9]+ \(inclusive\) to {_N} \(exclusive\)")
# SGLang rejects a request that would fill the context to the last token.
_FILLS_CONTEXT = "requested token count exceeds"
# Messages longer than this are no error messages of a model server.
_MESSAGE_BYTES_MAX = 16_384


def written_maximum(
    request: Request,
    model: Model,
    *,
    longest: int,
    held_input: int,
    context: int | None,
    is_output_limited: bool,
) -> int | None:
    """The maximum to write for each choice of a call whose quotas have room for `longest` tokens of output in all.

    None if none has to be written, because the answer can't be longer anyway:

    - the client itself states a smaller one in a field that this target reads;
    - the client states none, and the model's context or its `max_output_tokens` ends each choice before that. With
      3,492 tokens left for the answer, no answer of a model with a context of 2,048 needs a maximum;
    - the client states none, and the input and the answer together can't be more than is held for them. With a
      context of 2,048, 600 tokens held for the input and 1,460 left for the answer, no maximum is needed if only the
      sum is limited. 1,460 would be rejected: beside an input of 600 the context leaves 1,448.

    A written maximum is then at most what the context leaves beside the input, unless the quotas limit output by
    itself or the request has several choices.

    `held_input` is what is held for the input. `context` is the model's, as configured or as its upstream lists it;
    None if it is unknown, or does not end an answer: Ollama and llama.cpp can go on after it, and with hosted tools a
    model runs several times. `is_output_limited`: one of the quotas limits output by itself.
    """
    each, kind = longest // request.choices, kind_of(model.upstream.kind)
    stated = stated_maximum(request, kind)
    if stated is not None:
        return min(each, model.max_output_tokens or each) if stated > each else None
    if model.max_output_tokens and model.max_output_tokens <= each:
        return None
    if context is None:
        return each
    is_sum_held = request.choices == 1 and not is_output_limited and context <= held_input + longest
    # An input has at least one token.
    return None if context - 1 <= each or is_sum_held else each


def is_about_maximum(status: int, body: bytes, *, maximum: int) -> bool:
    """Whether an error answer is about the `maximum` that we wrote: it names the number, or a field for it."""
    if status not in _REJECTION_STATUSES or len(body) > _MESSAGE_BYTES_MAX:
        return False
    text = _plain(body)
    return _FIELD.search(text) is not None or re.search(rf"(?<![0-9]){maximum}(?![0-9])", text) is not None


def allowed_maximum(body: bytes, *, maximum: int, held_input: int) -> int | None:
    """The largest maximum that an error answer says would be accepted instead of `maximum`; None if it says none.

    If it states only the context, that is what the context leaves beside `held_input`, the most that the input can
    have.
    """
    text = _plain(body)
    for pattern in _CONTEXT_AND_INPUT:
        if match := pattern.search(text):
            return _accepted(_number(match["context"]) - _number(match["input"]), maximum)
    if match := _BELOW.search(text):
        return _accepted(_number(match[1]) - 1, maximum)
    context = _CONTEXT.search(text)
    if context is None:
        found = next((match for pattern in _AT_MOST if (match := pattern.search(text))), None)
        return None if found is None else _accepted(_number(found[1]), maximum)
    input_tokens = held_input
    if total := _TOTAL.search(text):
        input_tokens = _number(total[1]) - maximum
    elif stated := _INPUT.search(text):
        input_tokens = _number(stated[1])
    allowed = _number(context[1]) - input_tokens - (_FILLS_CONTEXT in text)
    if allowed == maximum - 1:
        # vLLM counts an input only as far as it must to reject it: this is the least that the input can have.
        allowed = min(allowed, _number(context[1]) - held_input)
    return _accepted(allowed, maximum)


def with_note(body: bytes, note: str) -> bytes:
    """An error body of OpenAI's or Anthropic's shape with a sentence after its message. Others stay as they are."""
    answer = orjson.loads(body)
    error = answer.get("error")
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return body
    message = error["message"].rstrip()
    full_stop = "" if message.endswith((".", "!", "?")) else "."
    return orjson.dumps({**answer, "error": {**error, "message": f"{message}{full_stop}{note}"}})


def _accepted(allowed: int, maximum: int) -> int | None:
    """The number, if it is one that can be written instead of `maximum`."""
    return allowed if 0 < allowed < maximum else None


def _number(text: str) -> int:
    return int(text.replace(",", "").replace("_", ""))


def _plain(body: bytes) -> str:
    """The text of an error answer in lower case. Gateways nest one in another, so all of it is read."""
    text = body[:_MESSAGE_BYTES_MAX].decode("utf-8", "replace").lower().replace("\\u003c", "<")
    return text.replace("\\u003e", ">").replace("\\", "")
