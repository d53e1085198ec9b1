"""What a call may use at the most: the bound on its input, the answer that it asks for, and how much of that at once.

wire §1.4 (which field an upstream really reads, and what it takes where none is stated); threats T31, T32, T34.
"""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.content import Prompt, read_prompt
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
from proxy.formats.estimate import SMALLEST_ANSWER, counted, estimate_demand, largest_demand, streams_all_output
from proxy.formats.request import Request, forwarded_body
from proxy.policy.amounts import TOKENS_MAX
from proxy.policy.policy import Kind, Model, Upstream
from proxy.policy.quota import Demand
from tests.formats.test_request import GENERATING, HUGE, KINDS, MAXIMA, READS, ids, parse, targets


def model(kind: Kind = "vllm", name: str = "real-m", **known: Any) -> Model:
    """A model behind an upstream of this kind, which calls it `name`."""
    return Model("m", Upstream("up", "http://upstream.example/v1", None, kind), name, **known)


def demand(request: Request, kind: Kind = "vllm", **known: Any) -> Demand:
    """What the call may use at the most, by the body that would be sent."""
    of = model(kind, **known)
    prompt = read_prompt(request.document, model=of.upstream_model, is_chat=request.endpoint in (CHAT, RESPONSES))
    return estimate_demand(request, of, prompt, body_bytes=len(forwarded_body(request, of)))


def says(text: str) -> list[dict[str, str]]:
    """Messages with this text."""
    return [{"role": "user", "content": text}]


# ------------------------------------------------------------------------------------------- the answer that is asked


@targets
@pytest.mark.parametrize("name", MAXIMA)
def test_a_maximum_counts_only_where_it_is_read(kind: Kind, endpoint: Endpoint, name: str) -> None:
    """Believing a field that the upstream ignores would bound nothing (wire §1.4)."""
    request = parse(endpoint, **{name: 77})
    expected = 77 if name in READS[kind, endpoint.name] else demand(parse(endpoint), kind).output_maximum
    assert demand(request, kind).output_maximum == expected


def answers(endpoint: Endpoint) -> int:
    """As many as may be asked for at once: a response is one."""
    return 1 if endpoint is RESPONSES else 3


@targets
def test_of_several_maxima_the_larger_counts(kind: Kind, endpoint: Endpoint) -> None:
    """Which one wins differs by version, so the careful one holds (T32)."""
    for larger in READS[kind, endpoint.name]:
        stated = dict.fromkeys(READS[kind, endpoint.name], 5) | {larger: 9000}
        assert demand(parse(endpoint, **stated), kind).output_maximum == 9000
        assert demand(parse(endpoint, **stated, n=answers(endpoint)), kind).output_maximum == answers(endpoint) * 9000


@targets
def test_a_maximum_that_is_null_is_none(kind: Kind, endpoint: Endpoint) -> None:
    """SDKs send null for what their user left alone."""
    reads = READS[kind, endpoint.name]
    assert demand(parse(endpoint, **dict.fromkeys(reads)), kind).output_maximum == 4096
    for stated in reads:
        assert demand(parse(endpoint, **dict.fromkeys(reads) | {stated: 9}), kind).output_maximum == 9


@pytest.mark.parametrize(
    ("kind", "endless"),
    [
        ("llamacpp", {"n_predict": -1}),
        ("llamacpp", {"n_predict": -1, "max_tokens": 1}),
        ("ollama", {"max_tokens": 0}),
    ],
)
def test_an_endless_maximum_bounds_nothing(kind: Kind, endless: dict) -> None:
    """llama.cpp takes n_predict before all others, and -1 for no end; Ollama takes 0 for none too."""
    found = demand(parse(**endless), kind)
    assert (found.output_maximum, found.is_unbounded) == (4096, True)
    known = demand(parse(**endless), kind, max_output_tokens=900)
    assert (known.output_maximum, known.is_unbounded) == (900, False)


def test_a_maximum_of_nothing_is_one() -> None:
    """Elsewhere 0 asks for no answer at all."""
    request = parse(COMPLETIONS, max_tokens=0)
    length = len(forwarded_body(request, model()))
    assert demand(request) == Demand(input=length, output_maximum=0, smallest=0, initial_hold=0, is_estimated=True)


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_asked_the_model_decides(kind: Kind) -> None:
    """Its configured maximum, else 4096, else what the upstream itself takes: 16 on OpenAI's /completions."""
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
    """vLLM takes 16 for a field left out, but all that is left of its context for null."""
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
def test_an_answer_is_open_ended_where_nobody_says_how_long_it_may_become(
    sent: Request, known: dict, is_unbounded: bool
) -> None:
    """Neither the request, nor the configuration, nor what the upstream takes by itself."""
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
def test_the_maximum_is_for_each_answer(sent: Request, output_maximum: int) -> None:
    """`n` or `best_of` of them for each prompt, and all are generated and billed."""
    assert demand(sent).output_maximum == output_maximum


def test_no_hold_leaves_64_bits() -> None:
    """Even the largest numbers, for a hundred thousand prompts, stay far inside (T31)."""
    prompts = [""] * 100_000
    found = demand(parse(COMPLETIONS, max_tokens=HUGE, n=128, prompt=prompts))
    assert found.output_maximum == TOKENS_MAX
    assert 0 < found.smallest <= found.output_maximum
    found = demand(parse(COMPLETIONS, max_tokens=HUGE, n=128, prompt=prompts), smallest_answer=HUGE)
    assert found.smallest == found.output_maximum == TOKENS_MAX


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
def test_the_smallest_answer_is_a_thousand_tokens_or_what_is_asked(
    fields: dict, output_maximum: int, smallest: int
) -> None:
    """choices × min(asked, 1024): less than that isn't worth starting."""
    found = demand(parse(CHAT, **fields))
    assert (found.output_maximum, found.smallest) == (output_maximum, smallest)
    assert SMALLEST_ANSWER == 1024


@pytest.mark.parametrize(
    ("fields", "smallest"), [({}, 2000), ({"n": 2}, 4000), ({"max_tokens": 100}, 100), ({"max_tokens": 2001}, 2000)]
)
def test_a_model_may_say_what_its_smallest_answer_is(fields: dict, smallest: int) -> None:
    """Unless less was asked for."""
    assert demand(parse(CHAT, **fields), smallest_answer=2000).smallest == smallest
    assert demand(parse(CHAT), smallest_answer=5).smallest == 5


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
def test_a_budget_for_thinking_comes_before_the_smallest_answer(fields: dict, smallest: int) -> None:
    """Else all of a short answer would be thoughts; never more than what is asked, and what is odd is no budget."""
    assert demand(parse(CHAT, max_tokens=9000, **fields)).smallest == smallest


# -------------------------------------------------------------------------------------------- seen growing, or hidden


@pytest.mark.parametrize("endpoint", [*GENERATING, EMBEDDINGS], ids=ids)
@pytest.mark.parametrize("stream", [True, False, None])
def test_only_a_stream_is_seen_growing(endpoint: Endpoint, stream: bool | None) -> None:
    """A whole answer comes at once, and embeddings generate nothing."""
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
def test_openai_s_models_think_unseen_unless_they_are_known_not_to(kind: Kind, name: str, hides: bool) -> None:
    """A model that is not known yet is the careful case; open models stream their thoughts. The file goes before."""
    request = parse(stream=True)
    assert streams_all_output(request, model(kind, name)) != hides
    assert not streams_all_output(request, model(kind, name, reasoning=True))
    assert streams_all_output(request, model(kind, name, reasoning=False))


def test_a_model_is_known_by_the_name_that_its_upstream_has_for_it() -> None:
    """An alias may say anything."""
    upstream = Upstream("up", "http://upstream.example/v1", None, "openai")
    assert not streams_all_output(parse(stream=True), Model("gpt-4o", upstream, "o4-mini"))
    assert streams_all_output(parse(stream=True), Model("o4-mini", upstream, "gpt-4o"))


@pytest.mark.parametrize(
    ("thinking", "first", "smallest"),
    [
        ({"type": "enabled", "budget_tokens": 2000}, 9000, 3024),
        ({"type": "adaptive"}, 9000, 1024),
        ({"type": "disabled"}, 1024, 1024),
        (None, 1024, 1024),
        ("adaptive", 1024, 1024),
    ],
)
def test_thoughts_of_a_message_are_within_its_maximum(thinking: object, first: int, smallest: int) -> None:
    """Of which a summary is shown: so all of it is held at once, and no more than that."""
    request = parse(MESSAGES, stream=True, max_tokens=9000, thinking=thinking)
    asked = demand(request, "anthropic")
    assert (asked.output_maximum, asked.initial_hold, asked.smallest) == (9000, first, smallest)


@pytest.mark.parametrize(
    ("fields", "is_hidden"),
    [
        ({"modalities": ["text", "audio"]}, True),
        ({"modalities": ["text"]}, False),
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
        ({"reasoning_format": "hidden"}, True),
        ({"reasoning_format": "parsed"}, False),
        ({"stream_reasoning": False}, True),
        ({"stream_reasoning": True}, False),
        ({"logit_bias": {"151644": 100}}, True),
        ({"logit_bias": [[151644, 100]]}, True),
        ({"logit_bias": {}}, False),
        ({"ignore_eos": True}, True),
        ({"ignore_eos": False}, False),
    ],
)
def test_a_request_may_ask_for_what_is_billed_and_not_streamed_as_text(fields: dict, is_hidden: bool) -> None:
    """Sound, predictions that were not taken, thoughts: then all that is wanted is held at once."""
    request = parse(stream=True, max_tokens=9000, **fields)
    for known in ({}, {"reasoning": False}):
        assert streams_all_output(request, model(**known)) != is_hidden
        assert (demand(request, **known).initial_hold == 9000) == is_hidden


def test_what_is_held_first_is_enough_for_the_smallest_answer() -> None:
    """Of each choice, and by what the model says of itself."""
    request = parse(stream=True, max_tokens=9000, n=3)
    assert demand(request).initial_hold == demand(request).smallest == 3 * 1024
    assert demand(request, smallest_answer=50).initial_hold == 150


# --------------------------------------------------------------------------------------------------------- the input


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=6), image=st.booleans()
)
def test_the_input_bound_is_never_less_than_the_bytes_of_the_text(texts: list[str], image: bool) -> None:
    """A token is at least a byte, so as many tokens as there are bytes of text can't be exceeded."""
    text_bytes = sum(len(text.encode()) for text in texts)
    parts = [{"type": "text", "text": text} for text in texts]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 999}}
    messages = [{"role": "user", "content": text} for text in texts]
    for request in (
        parse(CHAT, messages=messages),
        parse(CHAT, messages=[{"role": "user", "content": [*parts, *([picture] if image else [])]}]),
        parse(COMPLETIONS, prompt=texts),
        parse(EMBEDDINGS, input=texts),
        parse(RESPONSES, input=messages, instructions="".join(texts)),
    ):
        assert demand(request).input >= text_bytes + 8 * len(texts) * (request.endpoint in (CHAT, RESPONSES))


@given(tokens=st.lists(st.integers(0, 200_000), max_size=50))
def test_the_input_bound_covers_arrays_of_tokens(tokens: list[int]) -> None:
    """Prompts may come as numbers: one of a digit with its comma is still two bytes."""
    assert demand(parse(COMPLETIONS, prompt=tokens)).input >= len(tokens)
    assert demand(parse(EMBEDDINGS, input=[tokens, tokens])).input >= 2 * len(tokens)


def test_half_a_surrogate_pair_is_bounded_as_it_is_sent() -> None:
    """It can only be sent as an escape of six bytes."""
    assert demand(parse(COMPLETIONS, prompt="\ud800" * 50)).input >= 300


@pytest.mark.parametrize(
    "messages", [None, 7, "hi", {}, [7, None, "x"], [{"content": None}], [{"content": [None, "x"]}]]
)
def test_messages_of_any_form_are_bounded(messages: object) -> None:
    """What is wrong with them is for the upstream to say; here they are bytes (T34)."""
    request = parse(CHAT, messages=messages)
    assert demand(request).input == len(forwarded_body(request, model()))


def test_a_picture_has_a_price_instead_of_its_base64() -> None:
    """A hundred thousand characters that no model reads as text, for the price of one whose size nobody knows."""
    url = "data:image/png;base64," + "A" * 100_000
    request = parse(CHAT, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    assert demand(request).input == len(forwarded_body(request, model())) - len(url) + 85 + 8 * 170


def test_the_largest_list_of_embeddings_wants_its_input_and_no_more() -> None:
    """2,048 texts: limits on output alone don't bind them, whatever else the body says."""
    request = parse(EMBEDDINGS, input=["text"] * 2048, max_tokens=50, stream=True)
    found = demand(request, max_output_tokens=900, smallest_answer=5, reasoning=True)
    length = len(forwarded_body(request, model()))
    assert found == Demand(input=length, output_maximum=0, smallest=0, initial_hold=0, is_estimated=True)
    assert found.input > 2048


# Each reads something that the request doesn't show.
OPEN = [
    {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "https://x/y.mp4"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_data": "data:application/pdf,x"}}]}]},
    {"messages": says("hi"), "chat_template": "{{ '…' * 1000 }}"},
]


@pytest.mark.parametrize("fields", OPEN)
def test_what_an_open_prompt_reads_unseen_is_bounded_by_the_model_s_context(fields: dict) -> None:
    """Beside what it shows, which is bounded as ever; where nobody knows the context, or it is smaller, nothing."""
    request = parse(CHAT, **fields)
    length = len(forwarded_body(request, model()))
    expected = Demand(length, 4096, 1024, 4096, is_unbounded=True, is_estimated=True, hidden_input=128_000 - length)
    assert demand(request, context=128_000) == expected
    assert (demand(request).input, demand(request).hidden_input) == (length, 0)
    assert (demand(request, context=length - 1).input, demand(request, context=length - 1).hidden_input) == (
        length,
        0,
    )


def test_embeddings_may_be_open_too() -> None:
    """A picture that is stored elsewhere costs input, though nothing is generated."""
    request = parse(EMBEDDINGS, input=[{"type": "video_url", "video_url": {"url": "https://x/y.mp4"}}])
    found = demand(request, context=8192)
    assert (found.input + found.hidden_input, found.output_maximum) == (8192, 0)


def test_a_prompt_that_shows_all_has_nothing_unseen() -> None:
    """Its bytes bound it, whatever the context is."""
    request = parse(CHAT, messages=says("hi"))
    found = demand(request, context=128_000)
    assert (found.input, found.hidden_input, found.is_estimated) == (len(forwarded_body(request, model())), 0, True)


# ------------------------------------------------------------------------------------------------- once it is counted

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
        (994, False, 1000, 0),  # the bytes bound it all the same
        (994, True, 1000, 0),
        (None, False, 1000, 0),
        (None, True, 1000, 0),
    ],
)
def test_a_count_takes_the_place_of_the_bytes(
    text_tokens: int | None, is_guess: bool, input_tokens: int, hidden_input: int
) -> None:
    """With what is no text beside it; by a tokenizer that may be another one half as much again, if there is room.

    One that failed leaves the bytes. Either way there is no more to be had, and nothing else changes.
    """
    found = counted(ROUGH, CONTEXT, Prompt(overhead=7), text_tokens=text_tokens, is_guess=is_guess)
    assert found == replace(ROUGH, input=input_tokens, hidden_input=hidden_input, is_estimated=False)


def test_what_covers_several_demands_covers_each() -> None:
    """The most of each number: the call may go to the one that needs it."""
    one = Demand(10, 500, 400, initial_hold=400, hidden_input=3, is_estimated=True)
    other = Demand(20, 300, 200, initial_hold=300, is_unbounded=True, is_estimated=True)
    assert largest_demand([one]) == one
    both = Demand(20, 500, 400, initial_hold=400, is_unbounded=True, is_estimated=True, hidden_input=3)
    assert largest_demand([one, other]) == largest_demand([other, one]) == both


@given(
    text_tokens=st.none() | st.integers(0, TOKENS_MAX),
    overhead=st.integers(0, 10**6),
    is_guess=st.booleans(),
    is_open=st.booleans(),
)
def test_a_count_never_raises_the_bound(
    text_tokens: int | None, overhead: int, is_guess: bool, is_open: bool
) -> None:
    """What is held after it is what was bounded before it, or less: of an open call all that its context leaves."""
    estimated = replace(ROUGH, hidden_input=500 if is_open else 0)
    prompt = Prompt(overhead=overhead, is_open=is_open)
    found = counted(estimated, CONTEXT, prompt, text_tokens=text_tokens, is_guess=is_guess)
    assert 0 <= found.input <= estimated.input
    assert found.input + found.hidden_input <= estimated.input + estimated.hidden_input
    assert found.input + found.hidden_input == 1500 or not is_open
    assert not found.hidden_input or is_open or is_guess
    assert not found.is_estimated


@given(
    endpoint=st.sampled_from(METERED),
    kind=st.sampled_from(KINDS),
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
def test_the_parts_of_a_demand_fit_each_other(endpoint: Endpoint, kind: Kind, fields: dict, known: dict) -> None:
    """The smallest answer fits into what is held first, and that into what is wanted."""
    of_it = {name: value for name, value in fields.items() if name != "n" or not endpoint.is_of_responses}
    found = demand(parse(endpoint, **of_it), kind, **known)
    assert 0 <= found.smallest <= found.initial_hold <= found.output_maximum <= TOKENS_MAX
    assert (found.output_maximum > 0) <= endpoint.generates


# ---------------------------------------------------------------------------------------------------- what is no text


@pytest.mark.parametrize("endpoint", [MODERATIONS, INPUT_TOKENS], ids=ids)
def test_what_costs_no_tokens_holds_none(endpoint: Endpoint) -> None:
    """So that nobody is kept from it by a quota of tokens."""
    assert demand(parse(endpoint, input="long" * 100), context=1000) == Demand(
        input=0, output_maximum=0, smallest=0, initial_hold=0
    )


@pytest.mark.parametrize(
    ("sent", "output_maximum"),
    [
        (parse(IMAGES, prompt="x"), 8192),
        (parse(IMAGES, prompt="x", n=3, stream=True), 3 * 8192),
        (parse(COMPACT, input="x"), 8192),
        (parse(SPEECH, input="x", stream_format="sse"), 6144),
        (parse(SPEECH, input="x"), 0),
    ],
    ids=["picture", "pictures", "compact", "events", "sound"],
)
def test_what_can_t_be_bounded_or_seen_is_held_as_a_whole(sent: Request, output_maximum: int) -> None:
    """No smaller answer is to be had, and none that grows; the model's own maximum may be less."""
    found = demand(sent)
    assert (found.output_maximum, found.smallest, found.initial_hold) == (
        output_maximum,
        output_maximum,
        output_maximum,
    )
    assert (found.is_unbounded, streams_all_output(sent, model())) == (False, False)
    assert found.input > 0
    assert demand(sent, max_output_tokens=100).output_maximum == (100 * sent.choices if output_maximum else 0)
