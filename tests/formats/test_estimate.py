"""What a call may use at most: the bound on its input, the output that it asks for, and how much is reserved first.

wire §1.4 (which field an upstream really reads, and its default if none is stated); threats T31, T32, T34.
"""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.content import Prompt, read_prompt, with_images
from proxy.formats.endpoints import (
    CHAT,
    COMPACT,
    COMPLETIONS,
    EMBEDDINGS,
    IMAGES,
    INPUT_TOKENS,
    MESSAGES,
    METERED,
    MODERATIONS,
    RESPONSES,
    SPEECH,
    Endpoint,
)
from proxy.formats.estimate import (
    SMALLEST_ANSWER,
    counted,
    estimate_demand,
    largest_demand,
    streams_all_output,
    with_context,
)
from proxy.formats.request import Request, forwarded_body
from proxy.policy.admission import Admitted, decide
from proxy.policy.amounts import TOKENS_MAX, Uses
from proxy.policy.catalog import Model, Upstream
from proxy.policy.quota import Demand
from tests.builders import NOON, binding, quota
from tests.formats.test_request import GENERATING, HUGE, KINDS, MAXIMA, READS, ids, parse, targets


def model(kind: str = "vllm", name: str = "real-m", **known: Any) -> Model:
    """A model behind an upstream of this kind, which calls it `name`."""
    return Model("m", Upstream("up", "http://upstream.example/v1", None, kind), name, **known)


def demand(request: Request, kind: str = "vllm", **known: Any) -> Demand:
    """The demand of a request, estimated from the body that would be forwarded."""
    of = model(kind, **known)
    prompt = read_prompt(request.body, is_chat=request.endpoint in (CHAT, RESPONSES))
    prompt = with_images(prompt, model=of.upstream_model)
    return estimate_demand(request, of, prompt, body_bytes=len(forwarded_body(request, of)))


def says(text: str) -> list[dict[str, str]]:
    """One message with this text."""
    return [{"role": "user", "content": text}]


# ------------------------------------------------------------------------------------------------- the output maximum


@targets
@pytest.mark.parametrize("name", MAXIMA)
def test_a_maximum_counts_only_where_it_is_read(kind: str, endpoint: Endpoint, name: str) -> None:
    """A field that the upstream ignores bounds nothing (wire §1.4)."""
    request = parse(endpoint, **{name: 77})
    expected = 77 if name in READS[kind, endpoint.name] else demand(parse(endpoint), kind).output_maximum
    assert demand(request, kind).output_maximum == expected


def answers(endpoint: Endpoint) -> int:
    """A number of answers that the endpoint accepts: /responses only one."""
    return 1 if endpoint is RESPONSES else 3


@targets
def test_of_several_maxima_the_largest_counts(kind: str, endpoint: Endpoint) -> None:
    """Which one wins differs by the upstream's version, so the largest is the safe one (T32)."""
    for larger in READS[kind, endpoint.name]:
        stated = dict.fromkeys(READS[kind, endpoint.name], 5) | {larger: 9000}
        assert demand(parse(endpoint, **stated), kind).output_maximum == 9000
        assert demand(parse(endpoint, **stated, n=answers(endpoint)), kind).output_maximum == answers(endpoint) * 9000


@targets
def test_null_is_no_maximum(kind: str, endpoint: Endpoint) -> None:
    """SDKs send null for options that their user did not set."""
    reads = READS[kind, endpoint.name]
    assert demand(parse(endpoint, **dict.fromkeys(reads)), kind).output_maximum == 4096
    for stated in reads:
        assert demand(parse(endpoint, **dict.fromkeys(reads) | {stated: 9}), kind).output_maximum == 9


@pytest.mark.parametrize(
    ("kind", "endless"),
    [
        ("llamacpp", {"n_predict": -1}),
        ("llamacpp", {"n_predict": -1, "max_tokens": 1}),
        ("llamacpp", {"max_tokens": -1}),
        ("llamacpp", {"max_completion_tokens": -1, "max_tokens": 7}),
        ("ollama", {"max_tokens": 0}),
        ("openai", {"max_tokens": 0}),
        ("openai", {"max_completion_tokens": 0, "max_tokens": 5}),
        ("azure", {"max_completion_tokens": 0}),
    ],
)
def test_a_number_that_means_no_maximum_bounds_nothing(kind: str, endless: dict) -> None:
    """In llama.cpp n_predict overrides all others, and -1 means no maximum; at Ollama 0 does too.

    OpenAI refuses 0, and gateways written in Go leave it out: then many whole answers at once would hold nothing.
    """
    found = demand(parse(**endless), kind)
    assert (found.output_maximum, found.is_unbounded) == (4096, True)
    assert found.smallest == (1024 if any(endless.values()) else 1)
    assert demand(parse(**endless, n=3), kind).smallest == 3 * found.smallest
    known = demand(parse(**endless), kind, max_output_tokens=900)
    assert (known.output_maximum, known.is_unbounded) == (900, False)


@pytest.mark.parametrize("kind", ["openai", "vllm", "llamacpp"])
def test_a_maximum_of_0_is_a_maximum(kind: str) -> None:
    """Where a server reads it so, it asks for no output. Limits on output bind the call all the same."""
    assert demand(parse(COMPLETIONS, max_tokens=0), kind).output_maximum == 0
    request = parse(COMPLETIONS, max_tokens=0)
    length = len(forwarded_body(request, model()))
    expected = Demand(input=length, output_maximum=0, smallest=0, initial_hold=0, is_estimated=True, fixed=0, floor=1)
    assert demand(request) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_stated_maximum_the_model_s_or_the_upstream_s_counts(kind: str) -> None:
    """First the configured maximum, then the upstream's default (16 on OpenAI's /completions), then 4096."""
    short = 4096 if kind in ("ollama", "llamacpp") else 16
    assert demand(parse(CHAT), kind).output_maximum == demand(parse(RESPONSES), kind).output_maximum == 4096
    assert demand(parse(COMPLETIONS), kind).output_maximum == short
    for endpoint in GENERATING:
        assert demand(parse(endpoint), kind, max_output_tokens=900).output_maximum == 900
        assert (
            demand(parse(endpoint, n=answers(endpoint)), kind, max_output_tokens=900).output_maximum
            == answers(endpoint) * 900
        )


def test_null_is_not_the_default_of_completions() -> None:
    """vLLM applies 16 if the field is absent, but for null the rest of its context."""
    found = demand(parse(COMPLETIONS, max_tokens=None))
    assert (found.output_maximum, found.is_unbounded) == (4096, True)


@pytest.mark.parametrize(
    ("sent", "known", "is_unbounded"),
    [
        (parse(CHAT), {}, True),
        (parse(CHAT), {"max_output_tokens": 900}, False),
        (parse(CHAT, max_tokens=4096), {}, False),
        (parse(CHAT, max_tokens=0), {}, False),
        (parse(RESPONSES), {}, True),
        (parse(COMPLETIONS), {}, False),
        (parse(EMBEDDINGS, input="x"), {}, False),
    ],
)
def test_an_answer_is_unbounded_if_no_maximum_is_known(sent: Request, known: dict, is_unbounded: bool) -> None:
    """Neither from the request, nor from the configuration, nor from the upstream's default."""
    assert demand(sent, **known).is_unbounded == is_unbounded


@pytest.mark.parametrize(
    ("sent", "output_maximum"),
    [
        (parse(CHAT, max_tokens=10, n=3), 30),
        (parse(COMPLETIONS, max_tokens=10, n=2, best_of=5), 50),
        (parse(COMPLETIONS, max_tokens=10, prompt=["a", "b"]), 20),
        (parse(COMPLETIONS, max_tokens=10, prompt=["a", "b", "c"], n=2, best_of=4), 120),
        (parse(COMPLETIONS, max_tokens=10, prompt=[1, 2, 3]), 10),
        (parse(COMPLETIONS, prompt=["a", "b"]), 32),
        (parse(RESPONSES, max_output_tokens=10), 10),
    ],
)
def test_the_maximum_is_multiplied_by_the_number_of_answers(sent: Request, output_maximum: int) -> None:
    """The larger of `n` and `best_of`, for each prompt: all are generated and billed."""
    assert demand(sent).output_maximum == output_maximum


def test_no_hold_exceeds_64_bits() -> None:
    """Even the largest numbers, for ninety thousand prompts, stay far below (T31)."""
    prompts = [""] * 90_000
    found = demand(parse(COMPLETIONS, max_tokens=HUGE, n=128, prompt=prompts))
    assert found.output_maximum == TOKENS_MAX
    assert 0 < found.smallest <= found.output_maximum
    found = demand(parse(COMPLETIONS, max_tokens=HUGE, n=128, prompt=prompts), smallest_answer=HUGE)
    assert found.smallest == found.output_maximum == TOKENS_MAX


@pytest.mark.parametrize(
    ("fields", "kind", "known", "expected"),
    [
        ({}, "vllm", {"context": 2048}, (2047, False)),
        ({}, "vllm", {"context": 4096}, (4095, False)),
        ({}, "vllm", {"context": 4097}, (4096, True)),
        ({"n": 2}, "vllm", {"context": 2048}, (4094, False)),
        ({}, "vllm", {"context": 2048, "max_output_tokens": 100}, (100, False)),
        ({"max_tokens": 3000}, "vllm", {"context": 2048}, (3000, False)),
        ({}, "ollama", {"context": 2048}, (4096, True)),
        ({}, "llamacpp", {"context": 2048}, (4096, True)),
        ({"chat_template": "{{ '…' * 1000 }}"}, "vllm", {"context": 2048}, (4096, True)),
    ],
)
def test_a_small_context_bounds_an_answer_that_states_no_maximum(
    fields: dict, kind: str, known: dict, expected: tuple[int, bool]
) -> None:
    """At servers that do not go on after it, and if the request shows all of the input."""
    found = demand(parse(CHAT, messages=says("hi"), **fields), kind, **known)
    assert (found.output_maximum, found.is_unbounded) == expected


# ------------------------------------------------------------------------------------------------ the smallest answer


@pytest.mark.parametrize(
    ("fields", "output_maximum", "smallest"),
    [
        ({"max_tokens": 10}, 10, 10),
        ({"max_tokens": 1024}, 1024, 1024),
        ({"max_tokens": 5000}, 5000, 1024),
        ({"max_tokens": 5000, "n": 3}, 15_000, 3072),
        ({"max_tokens": 10, "n": 3}, 30, 30),
        ({"max_tokens": HUGE, "n": 128}, 128 * HUGE, 128 * 1024),
        ({"max_tokens": 0, "max_completion_tokens": 0}, 0, 0),
    ],
)
def test_the_smallest_answer_is_1024_tokens_or_the_stated_maximum(
    fields: dict, output_maximum: int, smallest: int
) -> None:
    """choices × min(stated maximum, 1024): a call is not sent for less."""
    found = demand(parse(CHAT, **fields))
    assert (found.output_maximum, found.smallest) == (output_maximum, smallest)
    assert SMALLEST_ANSWER == 1024


@pytest.mark.parametrize(
    ("fields", "smallest"), [({}, 2000), ({"n": 2}, 4000), ({"max_tokens": 100}, 100), ({"max_tokens": 2001}, 2000)]
)
def test_the_smallest_answer_of_a_model_can_be_configured(fields: dict, smallest: int) -> None:
    """A smaller maximum in the request goes first. It is then the same in every quota."""
    found = demand(parse(CHAT, **fields), smallest_answer=2000)
    assert found.smallest == found.smallest_within(100) == smallest
    assert demand(parse(CHAT), smallest_answer=5).smallest == 5


@pytest.mark.parametrize(
    ("sent", "kind", "within"),
    [
        (parse(CHAT), "vllm", 50),
        (parse(CHAT, max_tokens=20), "vllm", 20),
        (parse(CHAT, n=2), "vllm", 50),
        (parse(CHAT, n=60), "vllm", 60),
        (parse(CHAT, thinking={"budget_tokens": 2000}, max_tokens=9000), "vllm", 2050),
        (parse(CHAT, thinking={"budget_tokens": 2000}, n=60), "vllm", 60 * 2000 + 60),
        (parse(CHAT, max_tokens=0), "ollama", 1),
        (parse(RESPONSES), "openai", 50),
        (parse(IMAGES, prompt="x"), "openai", 8192),
        (parse(EMBEDDINGS, input="x"), "openai", 0),
    ],
)
def test_the_smallest_answer_is_smaller_in_a_small_quota(sent: Request, kind: str, within: int) -> None:
    """With a limit of 500 a tenth of it for all choices, besides a reasoning budget; not that of an image."""
    found = demand(sent, kind)
    assert found.smallest_within(500) == within
    assert found.smallest_within(10**9) == found.smallest


def test_no_smaller_maximum_is_asked_for_than_the_upstream_accepts() -> None:
    """OpenAI's /responses answers 400 to less than 16."""
    assert demand(parse(RESPONSES), "openai").smallest_within(10) == 16
    assert demand(parse(RESPONSES), "vllm").smallest_within(10) == 1
    assert demand(parse(RESPONSES, max_output_tokens=5), "openai").smallest_within(10) == 5


@given(
    endpoint=st.sampled_from(GENERATING),
    kind=st.sampled_from(list(KINDS)),
    stream=st.booleans(),
    measure=st.sampled_from(["tokens", "output_tokens"]),
    limit=st.integers(2, 100) | st.integers(2, 10**8),
    data=st.data(),
)
def test_a_call_without_a_maximum_is_admitted_by_an_unused_quota_of_any_size(
    endpoint: Endpoint, kind: str, stream: bool, measure: str, limit: int, data: st.DataObject
) -> None:
    """If its input leaves a tenth of the limit, and at least as many tokens as the upstream accepts as a maximum."""
    found = demand(parse(endpoint, stream=stream), kind)
    least = max(found.floor, min(limit // 10, SMALLEST_ANSWER))
    if least >= limit:
        return
    shown = data.draw(st.integers(1, max(1, limit - least)))
    who = binding([quota("staff/daily", **{measure: limit})])
    decision = decide(replace(found, input=shown, is_estimated=False), who, {}, NOON)
    assert isinstance(decision, Admitted)
    assert decision.maximum is None or decision.maximum >= min(least, found.output_maximum)


@pytest.mark.parametrize(
    ("fields", "smallest"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, 3024),
        ({"reasoning": {"max_tokens": 2000}}, 3024),
        ({"thinking": {"budget_tokens": 2000}, "reasoning": {"max_tokens": 9}}, 3024),
        ({"thinking": {"budget_tokens": 2000}, "n": 2}, 6048),
        ({"thinking": {"budget_tokens": HUGE}}, 9000),
        ({"thinking": {"budget_tokens": 10**30}}, 9000),
        ({"thinking": {"budget_tokens": 0}}, 1024),
        ({"thinking": {"budget_tokens": -1}}, 1024),
        ({"thinking": {"budget_tokens": True}}, 1024),
        ({"thinking": {"budget_tokens": "2000"}}, 1024),
        ({"thinking": {"budget_tokens": 2000.0}}, 1024),
        ({"thinking": {"type": "disabled"}, "reasoning": {"effort": "low"}}, 1024),
        ({"thinking": "hard", "reasoning": [2000]}, 1024),
        ({"thinking": None, "reasoning": None}, 1024),
    ],
)
def test_a_reasoning_budget_is_added_to_the_smallest_answer(fields: dict, smallest: int) -> None:
    """Otherwise a short answer would be all reasoning. At most the stated maximum; invalid values are no budget."""
    assert demand(parse(CHAT, max_tokens=9000, **fields)).smallest == smallest


# ------------------------------------------------------------------------------------------------- the initial hold


@pytest.mark.parametrize("endpoint", [*GENERATING, EMBEDDINGS], ids=ids)
@pytest.mark.parametrize("stream", [True, False, None])
def test_only_a_stream_starts_with_the_smallest_answer(endpoint: Endpoint, stream: bool | None) -> None:
    """A whole answer can't be counted before its end, and embeddings generate nothing."""
    request = parse(endpoint, stream=stream, max_tokens=9000, max_output_tokens=9000)
    found = demand(request)
    assert streams_all_output(request, model()) == (endpoint is not EMBEDDINGS and stream is True)
    expected = 0 if endpoint is EMBEDDINGS else 1024 if stream else 9000
    assert (found.initial_hold, found.output_maximum) == (expected, 0 if endpoint is EMBEDDINGS else 9000)


@pytest.mark.parametrize(
    ("kind", "name", "hides"),
    [
        ("openai", "gpt-4o", False),
        ("openai", "gpt-4o-mini-2024-07-18", False),
        ("openai", "gpt-4.1-nano", False),
        ("openai", "gpt-4-turbo", False),
        ("openai", "gpt-3.5-turbo-instruct", False),
        ("openai", "chatgpt-4o-latest", False),
        ("openai", "davinci-002", False),
        ("openai", "babbage-002", False),
        ("openai", "ft:gpt-4o-mini-2024-07-18:acme::x", False),
        ("azure", "gpt-35-turbo", False),
        ("azure", "gpt-4o", False),
        ("azure", "our-deployment", True),
        ("openai", "o4-mini", True),
        ("openai", "gpt-5-mini", True),
        ("openai", "ft:o4-mini:acme::x", True),
        ("openai", "what-comes-next", True),
        ("anthropic", "claude-sonnet-4-5", False),
        ("vllm", "o4-mini", False),
        ("ollama", "gpt-oss:20b", False),
        ("llamacpp", "deepseek-r1", False),
        ("simulator", "o4-mini", False),
    ],
)
def test_openai_s_models_hide_reasoning_unless_they_are_known_not_to(kind: str, name: str, hides: bool) -> None:
    """Unknown models are assumed to hide it; open models stream it. `reasoning` in the YAML goes first."""
    request = parse(stream=True)
    assert streams_all_output(request, model(kind, name)) != hides
    assert not streams_all_output(request, model(kind, name, reasoning=True))
    assert streams_all_output(request, model(kind, name, reasoning=False))


def test_the_upstream_s_name_of_a_model_decides_whether_it_hides_reasoning() -> None:
    """The proxy's alias may be any text."""
    upstream = Upstream("up", "http://upstream.example/v1", None, "openai")
    assert not streams_all_output(parse(stream=True), Model("gpt-4o", upstream, "o4-mini"))
    assert streams_all_output(parse(stream=True), Model("o4-mini", upstream, "gpt-4o"))


@pytest.mark.parametrize(
    ("thinking", "initial_hold", "smallest"),
    [
        ({"type": "enabled", "budget_tokens": 2000}, 9000, 3024),
        ({"type": "adaptive"}, 9000, 1024),
        ({"type": "disabled"}, 1024, 1024),
        (None, 1024, 1024),
        ("adaptive", 1024, 1024),
    ],
)
def test_a_message_with_thinking_reserves_its_whole_maximum(
    thinking: object, initial_hold: int, smallest: int
) -> None:
    """Only a summary of the thinking is shown, so it can't be counted. All of it is within max_tokens."""
    request = parse(MESSAGES, stream=True, max_tokens=9000, thinking=thinking)
    asked = demand(request, "anthropic")
    assert (asked.output_maximum, asked.initial_hold, asked.smallest) == (9000, initial_hold, smallest)


@pytest.mark.parametrize(
    ("fields", "is_hidden"),
    [
        ({"modalities": ["text", "audio"]}, True),
        ({"modalities": ["text"]}, False),
        ({"modalities": ["text", "image"]}, True),
        ({"modalities": ["IMAGE"]}, True),
        ({"Modalities": ["audio"]}, True),
        ({"modalities": [None]}, False),
        ({"modalities": "audio"}, False),
        ({"modalities": None}, False),
        ({"prediction": {"type": "content", "content": "x"}}, True),
        ({"prediction": None}, False),
        ({"prediction": {}}, False),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"reasoning": {"max_tokens": 2000}}, True),
        ({"reasoning": {"effort": "high"}}, False),
        ({"reasoning": {"exclude": True}}, True),
        ({"reasoning": {"exclude": False}}, False),
        ({"include_reasoning": False}, True),
        ({"include_reasoning": 0}, True),
        ({"include_reasoning": True}, False),
        ({"include_reasoning": None}, False),
        ({"IncludeReasoning": False}, True),
        ({"include_reasoning": True, "includeReasoning": False}, True),
        ({"Reasoning": {"Exclude": True}}, True),
        ({"reasoningFormat": "Hidden"}, True),
        ({"venice_parameters": {"strip_thinking_response": True}}, True),
        ({"venice_parameters": {"strip_thinking_response": False}}, False),
        ({"reasoning_format": "hidden"}, True),
        ({"reasoning_format": "parsed"}, False),
        ({"stream_reasoning": False}, True),
        ({"stream_reasoning": True}, False),
        ({"logit_bias": {"151644": 100}}, True),
        ({"logit_bias": [[151644, 100]]}, True),
        ({"logit_bias": {}}, False),
        ({"ignore_eos": True}, True),
        ({"ignore_eos": False}, False),
        # vLLM
        ({"allowed_token_ids": [151644]}, True),
        ({"allowed_token_ids": []}, False),
        ({"Allowed_Token_Ids": [151644]}, True),
        ({"allowedTokenIds": [151644]}, True),
        ({"logitBias": {"151644": 100}}, True),
        ({"logit_bias": {}, "logitBias": {"151644": 100}}, True),
        ({"minTokens": 8000, "STOP_TOKEN_IDS": [1, 2, 3]}, True),
        ({"min_length": 8000, "stop_token_ids": [1, 2, 3]}, True),
        ({"min_tokens": 8000, "stop_token_ids": [1, 2, 3]}, True),
        ({"min_tokens": 8000, "stop_token_ids": []}, False),
        ({"min_tokens": 0, "stop_token_ids": [1]}, False),
        ({"min_tokens": 8000}, False),
        ({"stop_token_ids": [1, 2, 3]}, False),
        ({"stop": ["a"], "min_tokens": 5}, False),
        ({"bad_words": ["a", "b"]}, True),
        ({"logits_processors": ["pkg.Processor"]}, True),
        ({"vllm_xargs": {"any": 1}}, True),
        ({"guided_grammar": "root ::= <|im_start|>*"}, True),
        ({"structured_outputs": {"grammar": "start: <[151644]>*"}}, True),
        ({"structured_outputs": {"json": {"type": "object"}}}, False),
        ({"guided_json": {"type": "object"}, "guided_regex": "a*", "guided_choice": ["a"]}, False),
        ({"skip_special_tokens": True}, False),
        ({"skip_special_tokens": False}, False),
        ({"include_stop_str_in_output": False}, False),
        # SGLang
        ({"sampling_params": {"logit_bias": {"1": 100}}}, True),
        ({"ebnf": "root ::= x"}, True),
        ({"sampling_params": {"min_new_tokens": 9, "stop_token_ids": [1]}}, True),
        ({"sampling_params": "none"}, False),
        ({"structuredOutputs": {"Grammar": "root ::= x"}}, True),
        ({"sampling_params": [{"structured_outputs": {"grammar": "root ::= x"}}]}, True),
        ({"options": {"logit_bias": {"1": 100}}, "parameters": {}}, True),
        ({"parameters": {"min_new_tokens": 9, "stop_token_ids": [1]}}, True),
        # llama.cpp
        ({"grammar": "root ::= <[151644]>*"}, True),
        ({"grammar": ""}, False),
        # TensorRT-LLM, Dynamo, Aphrodite, TabbyAPI
        ({"nvext": {"ignore_eos": True}}, True),
        ({"nvext": {"greed_sampling": True}}, False),
        ({"detokenize": False}, True),
        ({"detokenize": True}, False),
        ({"custom_token_bans": [1]}, True),
        ({"grammar_string": "root ::= x"}, True),
        ({"ban_eos_token": True}, True),
        # Formats: a schema produces text only
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({"response_format": {"type": "grammar", "grammar": "root ::= x"}}, True),
        ({"response_format": "grammar"}, False),
        ({"responseFormat": {"Type": "GBNF"}}, True),
        # Fields that change the sampling, not which tokens there are
        ({"temperature": 2, "top_k": 1, "min_p": 0.1, "repetition_penalty": 9, "frequency_penalty": 2}, False),
        ({"dry_multiplier": 1, "xtc_probability": 1, "seed": 1, "n_probs": 5, "return_token_ids": True}, False),
    ],
)
def test_a_request_for_output_that_can_t_be_counted_reserves_its_whole_maximum(fields: dict, is_hidden: bool) -> None:
    """Audio, rejected predictions, hidden reasoning, tokens without text: they are billed but can't be counted."""
    request = parse(stream=True, max_tokens=9000, **fields)
    for known in ({}, {"reasoning": False}):
        assert streams_all_output(request, model(**known)) != is_hidden
        assert (demand(request, **known).initial_hold == 9000) == is_hidden


def test_the_initial_hold_of_a_stream_is_its_smallest_answer() -> None:
    """For all choices together, and as configured for the model."""
    request = parse(stream=True, max_tokens=9000, n=3)
    assert demand(request).initial_hold == demand(request).smallest == 3 * 1024
    assert demand(request, smallest_answer=50).initial_hold == 150


# --------------------------------------------------------------------------------------------------------- the input


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=6), image=st.booleans()
)
def test_the_input_bound_is_never_less_than_the_bytes_of_the_text(texts: list[str], image: bool) -> None:
    """A token is at least one byte, so the tokens can't exceed the bytes."""
    text_bytes = sum(len(text.encode()) for text in texts)
    parts = [{"type": "text", "text": text} for text in texts]
    image_part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 999}}
    messages = [{"role": "user", "content": text} for text in texts]
    for request in (
        parse(CHAT, messages=messages),
        parse(CHAT, messages=[{"role": "user", "content": [*parts, *([image_part] if image else [])]}]),
        parse(COMPLETIONS, prompt=texts),
        parse(EMBEDDINGS, input=texts),
        parse(RESPONSES, input=messages, instructions="".join(texts)),
    ):
        assert demand(request).input >= text_bytes + 8 * len(texts) * (request.endpoint in (CHAT, RESPONSES))


@given(tokens=st.lists(st.integers(0, 200_000), max_size=50))
def test_the_input_bound_covers_arrays_of_tokens(tokens: list[int]) -> None:
    """A prompt may be numbers. Even a single digit is two bytes with its comma."""
    assert demand(parse(COMPLETIONS, prompt=tokens)).input >= len(tokens)
    assert demand(parse(EMBEDDINGS, input=[tokens, tokens])).input >= 2 * len(tokens)


def test_half_a_surrogate_pair_is_bounded_by_its_escape() -> None:
    """It can only be sent as an escape, which is six bytes."""
    assert demand(parse(COMPLETIONS, prompt="\ud800" * 50)).input >= 300


@pytest.mark.parametrize(
    "messages", [None, 7, "hi", {}, [7, None, "x"], [{"content": None}], [{"content": [None, "x"]}]]
)
def test_messages_of_any_shape_are_bounded_by_their_bytes(messages: object) -> None:
    """The upstream reports what is wrong with them (T34)."""
    request = parse(CHAT, messages=messages)
    assert demand(request).input == len(forwarded_body(request, model()))


def test_an_image_is_bounded_by_its_price_and_not_by_its_base64() -> None:
    """100,000 characters of base64 count as one image of unknown size."""
    url = "data:image/png;base64," + "A" * 100_000
    request = parse(CHAT, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    assert demand(request).input == len(forwarded_body(request, model())) - len(url) + 85 + 8 * 170


def test_embeddings_demand_only_input() -> None:
    """2,048 texts, the most that OpenAI embeds in one call. Output is 0, whatever else the body says."""
    request = parse(EMBEDDINGS, input=["text"] * 2048, max_tokens=50, stream=True)
    found = demand(request, max_output_tokens=900, smallest_answer=5, reasoning=True)
    length = len(forwarded_body(request, model()))
    assert found == Demand(length, 0, 0, initial_hold=0, is_estimated=True, uses=Uses.INPUT)
    assert found.input > 2048


# In each the model reads something that the request doesn't show.
OPEN = [
    {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "https://x/y.mp4"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_data": "data:application/pdf,x"}}]}]},
    {"messages": says("hi"), "chat_template": "{{ '…' * 1000 }}"},
]


@pytest.mark.parametrize("fields", OPEN)
def test_hidden_input_is_what_the_model_s_context_leaves_beside_the_visible_input(fields: dict) -> None:
    """It is 0 if the context is not configured, or smaller than the bound of the visible input."""
    request = parse(CHAT, **fields)
    length = len(forwarded_body(request, model()))
    expected = Demand(
        length,
        4096,
        1024,
        4096,
        is_unbounded=True,
        is_estimated=True,
        hidden_input=128_000 - length,
        fixed=0,
        floor=1,
    )
    assert demand(request, context=128_000) == expected
    assert (demand(request).input, demand(request).hidden_input) == (length, 0)
    assert (demand(request, context=length - 1).input, demand(request, context=length - 1).hidden_input) == (
        length,
        0,
    )


@pytest.mark.parametrize("fields", OPEN)
def test_a_context_that_is_known_later_has_the_same_effect(fields: dict) -> None:
    """That of a request without hidden input changes nothing."""
    request = parse(CHAT, **fields)
    prompt = read_prompt(request.body, is_chat=True)
    for context in (128_000, 10):
        assert with_context(demand(request), prompt, context=context) == demand(request, context=context)
    plain = parse(CHAT, messages=says("hi"))
    assert with_context(demand(plain), Prompt(), context=128_000) == demand(plain)


def test_embeddings_may_have_hidden_input_too() -> None:
    """A linked video costs input, although nothing is generated."""
    request = parse(EMBEDDINGS, input=[{"type": "video_url", "video_url": {"url": "https://x/y.mp4"}}])
    found = demand(request, context=8192)
    assert (found.input + found.hidden_input, found.output_maximum) == (8192, 0)


def test_a_prompt_that_is_not_open_has_no_hidden_input() -> None:
    """Its bytes bound it, whatever the model's context is."""
    request = parse(CHAT, messages=says("hi"))
    found = demand(request, context=128_000)
    assert (found.input, found.hidden_input, found.is_estimated) == (len(forwarded_body(request, model())), 0, True)


# -------------------------------------------------------------------------------------------------- the counted input

CONTEXT = model(context=1500)
ROUGH = Demand(input=1000, output_maximum=500, smallest=100, initial_hold=100, is_unbounded=True, is_estimated=True)


@pytest.mark.parametrize(
    ("text_tokens", "is_guess", "input_tokens", "hidden_input"),
    [
        (200, False, 207, 0),
        (200, True, 207, 100),
        (201, True, 208, 100),
        (0, False, 7, 0),
        (0, True, 7, 0),
        (700, True, 707, 293),
        (993, False, 1000, 0),
        (994, False, 1000, 0),  # never more than the bound by bytes
        (994, True, 1000, 0),
        (None, False, 1000, 0),
        (None, True, 1000, 0),
    ],
)
def test_a_count_replaces_the_bound_by_bytes(
    text_tokens: int | None, is_guess: bool, input_tokens: int, hidden_input: int
) -> None:
    """The overhead is added. If the tokenizer is a guess, half as many tokens again are hidden input.

    If counting failed, the bytes stay. In both cases the demand is no longer an estimate, and nothing else changes.
    """
    found = counted(ROUGH, CONTEXT, Prompt(overhead=7), text_tokens=text_tokens, is_guess=is_guess)
    assert found == replace(ROUGH, input=input_tokens, hidden_input=hidden_input, is_estimated=False)


def test_the_largest_demand_covers_each_demand() -> None:
    """It has the largest of each number, because the call may go to any of the upstreams."""
    one = Demand(10, 500, 400, initial_hold=400, hidden_input=3, is_estimated=True, grows=True, fixed=100, floor=1)
    other = Demand(20, 300, 200, initial_hold=300, is_unbounded=True, is_estimated=True, fixed=0, floor=16)
    assert largest_demand([one]) == one
    both = Demand(
        20, 500, 400, initial_hold=400, is_unbounded=True, is_estimated=True, hidden_input=3, fixed=100, floor=16
    )
    assert largest_demand([one, other]) == largest_demand([other, one]) == both


@given(
    text_tokens=st.none() | st.integers(0, TOKENS_MAX),
    overhead=st.integers(0, 10**6),
    is_guess=st.booleans(),
    has_hidden_input=st.booleans(),
)
def test_a_count_never_raises_the_bound(
    text_tokens: int | None, overhead: int, is_guess: bool, has_hidden_input: bool
) -> None:
    """The two inputs together never grow. A call with hidden input still reserves all that its context leaves."""
    estimated = replace(ROUGH, hidden_input=500 if has_hidden_input else 0)
    prompt = Prompt(overhead=overhead, has_hidden_input=has_hidden_input)
    found = counted(estimated, CONTEXT, prompt, text_tokens=text_tokens, is_guess=is_guess)
    assert 0 <= found.input <= estimated.input
    assert found.input + found.hidden_input <= estimated.input + estimated.hidden_input
    assert found.input + found.hidden_input == 1500 or not has_hidden_input
    assert not found.hidden_input or has_hidden_input or is_guess
    assert not found.is_estimated


@given(
    endpoint=st.sampled_from(METERED),
    kind=st.sampled_from(list(KINDS)),
    fields=st.fixed_dictionaries(
        {},
        optional={
            "stream": st.booleans(),
            "n": st.integers(1, 128),
            "max_tokens": st.integers(0, HUGE) | st.none(),
            "max_output_tokens": st.integers(0, HUGE),
            "n_predict": st.integers(-1, HUGE),
            "thinking": st.fixed_dictionaries({"budget_tokens": st.integers(-1, HUGE)}),
        },
    ),
    known=st.fixed_dictionaries(
        {},
        optional={
            "max_output_tokens": st.integers(1, HUGE),
            "smallest_answer": st.integers(1, HUGE),
            "reasoning": st.booleans(),
        },
    ),
)
def test_smallest_answer_initial_hold_and_output_maximum_are_in_this_order(
    endpoint: Endpoint, kind: str, fields: dict, known: dict
) -> None:
    """And the output maximum is 0 for endpoints that generate nothing."""
    accepted = {name: value for name, value in fields.items() if name != "n" or not endpoint.is_of_responses}
    found = demand(parse(endpoint, **accepted), kind, **known)
    assert 0 <= found.smallest <= found.initial_hold <= found.output_maximum <= TOKENS_MAX
    assert (found.output_maximum > 0) <= endpoint.generates


# ---------------------------------------------------------------------------------------------- answers without text


@pytest.mark.parametrize("endpoint", [MODERATIONS, INPUT_TOKENS], ids=ids)
def test_endpoints_that_cost_no_tokens_reserve_none(endpoint: Endpoint) -> None:
    """So a quota of tokens that is used up does not refuse them."""
    assert demand(parse(endpoint, input="long" * 100), context=1000) == Demand(
        input=0, output_maximum=0, smallest=0, initial_hold=0, uses=endpoint.uses
    )


@pytest.mark.parametrize(
    ("sent", "output_maximum"),
    [
        (parse(IMAGES, prompt="x"), 8192),
        (parse(IMAGES, prompt="x", n=3, stream=True), 3 * 8192),
        (parse(COMPACT, input="x"), 8192),
        (parse(SPEECH, input="x", stream_format="sse"), 6144),
    ],
    ids=["image", "images", "compact", "speech events"],
)
def test_answers_that_are_not_text_reserve_their_whole_maximum(sent: Request, output_maximum: int) -> None:
    """No field makes them shorter, and they can't be counted while they stream. The model's maximum may be less."""
    found = demand(sent)
    assert (found.output_maximum, found.smallest, found.initial_hold) == (
        output_maximum,
        output_maximum,
        output_maximum,
    )
    assert (found.is_unbounded, streams_all_output(sent, model())) == (False, False)
    assert found.input > 0
    assert demand(sent, max_output_tokens=100).output_maximum == 100 * sent.choices
