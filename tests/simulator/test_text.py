"""Calls are parsed as OpenAI does, and the words of an answer depend only on the seed and the prompt."""

from functools import cache
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.simulator.directives import ApiError, Directives
from proxy.simulator.text import CHOICES_MAX, CORPUS_WORDS, Answer, Endpoint, Generator, count_tokens, read_json

generator = cache(Generator)

HELLO = [{"role": "user", "content": "hello there"}]


def chat(seed: int = 0, directives: Directives | None = None, **params: Any) -> Answer:
    """The answer to a chat call with these parameters."""
    call = {"model": "m", "messages": HELLO, **params}
    return generator(seed).answer(Endpoint.CHAT, call, directives or Directives())


def generated(endpoint: Endpoint, **params: Any) -> Answer:
    """The answer to a call with these parameters."""
    return generator(0).answer(endpoint, {"model": "m", **params})


def test_the_same_seed_and_prompt_give_the_same_words() -> None:
    """Other parameters change nothing, so an answer is predictable; another seed or prompt gets another answer."""
    assert chat().choices == chat(stream=True, temperature=1).choices
    assert chat(seed=1).choices != chat().choices
    assert chat(messages=[{"role": "user", "content": "hello you"}]).choices != chat().choices


def test_an_answer_without_a_maximum_has_20_to_60_tokens() -> None:
    """Long enough to stream, short enough for a test, and of different lengths."""
    lengths = {chat(seed=seed).output_tokens for seed in range(300)}
    assert min(lengths) >= 20
    assert max(lengths) <= 60
    assert len(lengths) > 20


def test_a_maximum_cuts_the_same_answer_short() -> None:
    """The answer is the beginning of the whole one with another finish reason. A larger maximum changes nothing."""
    whole = chat().choices[0]
    assert not whole.is_cut_short
    cut = chat(max_tokens=5).choices[0]
    assert (cut.words, cut.finish_reason) == (whole.words[:5], "length")
    for larger in (len(whole.words), 1000):
        assert chat(max_tokens=larger).choices[0] == whole


@pytest.mark.parametrize(
    ("endpoint", "params", "expected"),
    [
        (Endpoint.CHAT, {"messages": HELLO, "max_tokens": 3}, 3),
        (Endpoint.CHAT, {"messages": HELLO, "max_completion_tokens": 4}, 4),
        (Endpoint.CHAT, {"messages": HELLO, "max_completion_tokens": 9, "max_tokens": 2}, 2),
        (Endpoint.CHAT, {"messages": HELLO, "n": 3, "max_tokens": 3}, 9),
        (Endpoint.COMPLETIONS, {"prompt": "hello", "max_tokens": 2}, 2),
        (Endpoint.COMPLETIONS, {"prompt": "hello"}, 16),
        (Endpoint.COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "max_tokens": 2}, 8),
        (Endpoint.COMPLETIONS, {"prompt": "a", "n": 2, "best_of": 5, "max_tokens": 2}, 10),
        (Endpoint.COMPLETIONS, {"prompt": [5, 6, 7], "max_tokens": 2}, 2),
        (Endpoint.COMPLETIONS, {"prompt": [[5, 6], [7]], "max_tokens": 2}, 4),
        (Endpoint.RESPONSES, {"input": "hello", "max_output_tokens": 2}, 2),
        (Endpoint.RESPONSES, {"input": "hello", "n": 4, "max_output_tokens": 2}, 2),
        (Endpoint.EMBEDDINGS, {"input": "hello"}, 0),
    ],
)
def test_output_tokens(endpoint: Endpoint, params: dict[str, Any], expected: int) -> None:
    """Each parameter that limits or multiplies an answer applies at the endpoints that have it."""
    assert generated(endpoint, **params).output_tokens == expected


def test_best_of_is_charged_but_not_shown() -> None:
    """All generated choices count, as at OpenAI, although only `n` are returned."""
    answer = generated(Endpoint.COMPLETIONS, prompt="a", n=2, best_of=5, max_tokens=2)
    assert (len(answer.choices), answer.output_tokens) == (2, 10)


def test_choices_differ() -> None:
    """Each choice starts at another word of the corpus."""
    texts = [choice.text for choice in chat(n=CHOICES_MAX).choices]
    assert len(set(texts)) == CHOICES_MAX


@pytest.mark.parametrize(
    "tokens", [0, 1, 300, CORPUS_WORDS, CORPUS_WORDS + 1, 2 * CORPUS_WORDS - 1, 3 * CORPUS_WORDS + 7]
)
def test_an_answer_is_as_long_as_directed(tokens: int) -> None:
    """Also if it is several times as long as the corpus."""
    choice = chat(directives=Directives(tokens=tokens)).choices[0]
    assert len(choice.words) == tokens
    assert len(choice.text.split()) == tokens


@pytest.mark.parametrize(
    ("endpoint", "params", "expected"),
    [
        (Endpoint.CHAT, {"messages": HELLO}, 5),
        (Endpoint.CHAT, {"messages": [*HELLO, *HELLO]}, 10),
        (Endpoint.CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a b"}, {"x": 1}]}]}, 5),
        (Endpoint.CHAT, {"messages": [{"role": "assistant", "content": None}]}, 3),
        (Endpoint.COMPLETIONS, {"prompt": "one two  three\n"}, 3),
        (Endpoint.COMPLETIONS, {"prompt": ["one two", "three"]}, 3),
        (Endpoint.COMPLETIONS, {"prompt": [[1, 2], [3]]}, 3),
        (Endpoint.RESPONSES, {"input": "one two", "instructions": "be brief"}, 4),
        (Endpoint.RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a b"}]}]}, 5),
        (Endpoint.EMBEDDINGS, {"input": ["one two", "three"]}, 3),
        (Endpoint.EMBEDDINGS, {"input": [1, 2, 3, 4]}, 4),
    ],
)
def test_input_tokens(endpoint: Endpoint, params: dict[str, Any], expected: int) -> None:
    """Words and token ids, and three tokens for each message."""
    assert generated(endpoint, **params).input_tokens == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**6) | st.text(max_size=20) | st.text(" a\n", max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["content", "text", "role"]), inner, max_size=3)
    ),
    max_leaves=20,
)


@given(content=json_values, messages=st.lists(json_values, min_size=1, max_size=6))
def test_input_never_has_more_tokens_than_the_body_has_bytes(content: Any, messages: list[Any]) -> None:
    """The proxy reserves one token for each byte of an input; more input tokens would overdraw a quota."""
    for endpoint in Endpoint:
        call = {"model": "m", endpoint.input_field: messages, "instructions": content}
        assert generator(0).answer(endpoint, call).input_tokens <= len(orjson.dumps(call))
    assert count_tokens(content) <= len(orjson.dumps(content))


def test_usage_of_zero_is_reported_if_directed() -> None:
    """Some real servers report a usage that differs from the tokens of the answer."""
    assert chat(max_tokens=5).usage == (5, 5)
    assert chat(max_tokens=5, directives=Directives(usage_zero=True)).usage == (0, 0)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, (False, False)),
        ({"stream": True}, (True, False)),
        ({"stream": True, "stream_options": {"include_usage": True}}, (True, True)),
        ({"stream": True, "stream_options": {"include_usage": False}}, (True, False)),
        ({"stream": True, "stream_options": "x"}, (True, False)),
        ({"stream": "true"}, (False, False)),
    ],
)
def test_whether_the_answer_is_streamed_and_usage_requested(
    params: dict[str, Any], expected: tuple[bool, bool]
) -> None:
    """A stream reports usage only if `stream_options.include_usage` is true."""
    answer = chat(**params)
    assert (answer.is_streamed, answer.is_usage_requested) == expected


def test_an_embedding_depends_only_on_its_input() -> None:
    """One vector for each input, equal for equal inputs, with the requested dimensions."""
    answer = generated(Endpoint.EMBEDDINGS, input=["a", "b", "a"], dimensions=8, stream=True)
    first, second, third = answer.vectors
    assert first == third != second
    assert [len(vector) for vector in answer.vectors] == [8, 8, 8]
    assert len(generated(Endpoint.EMBEDDINGS, input="a").vectors[0]) == 1536
    assert not answer.is_streamed


@pytest.mark.parametrize(
    ("endpoint", "params", "param", "code"),
    [
        (Endpoint.CHAT, {"model": "m"}, "messages", "missing_required_parameter"),
        (Endpoint.CHAT, {"model": "m", "messages": []}, "messages", "missing_required_parameter"),
        (Endpoint.CHAT, {"model": "m", "messages": "hi"}, "messages", "invalid_type"),
        (Endpoint.CHAT, {"messages": HELLO}, "model", "missing_required_parameter"),
        (Endpoint.CHAT, {"model": 5, "messages": HELLO}, "model", "invalid_type"),
        (Endpoint.CHAT, {"model": "m", "messages": HELLO, "max_tokens": "9"}, "max_tokens", "invalid_type"),
        (Endpoint.CHAT, {"model": "m", "messages": HELLO, "max_tokens": True}, "max_tokens", "invalid_type"),
        (Endpoint.CHAT, {"model": "m", "messages": HELLO, "max_tokens": 0}, "max_tokens", "integer_out_of_range"),
        (Endpoint.CHAT, {"model": "m", "messages": HELLO, "n": 129}, "n", "integer_out_of_range"),
        (Endpoint.CHAT, {"model": "m", "messages": HELLO, "stream_options": {}}, "stream_options", None),
        (Endpoint.COMPLETIONS, {"model": "m"}, "prompt", "missing_required_parameter"),
        (Endpoint.EMBEDDINGS, {"model": "m", "input": "a", "dimensions": 0}, "dimensions", "integer_out_of_range"),
    ],
)
def test_an_invalid_call_is_an_error(
    endpoint: Endpoint, params: dict[str, Any], param: str, code: str | None
) -> None:
    """A 400 that names the parameter, as OpenAI's."""
    with pytest.raises(ApiError) as caught:
        generator(0).answer(endpoint, params)
    assert (caught.value.status, caught.value.error["param"], caught.value.error["code"]) == (400, param, code)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b'{"a": NaN}', b'"\xff"'])
def test_a_body_that_is_not_a_json_object_is_an_error(body: bytes) -> None:
    """A 400, whatever the body is."""
    with pytest.raises(ApiError) as caught:
        read_json(body)
    assert caught.value.status == 400
    assert read_json(b'{"a": 1}') == {"a": 1}
