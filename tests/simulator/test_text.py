"""Calls are read as OpenAI reads them, and the words of an answer follow from seed and prompt."""

from functools import cache
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.simulator.directives import Complaint, Directions
from proxy.simulator.text import CHOICES_MAX, SCROLL_WORDS, Author, Endpoint, Script, count_tokens, read_json

author = cache(Author)

HELLO = [{"role": "user", "content": "hello there"}]


def chat(seed: int = 0, directions: Directions | None = None, **asked: Any) -> Script:
    """Read a chat call with these fields."""
    call = {"model": "m", "messages": HELLO, **asked}
    return author(seed).script(Endpoint.CHAT, call, directions or Directions())


def ask(endpoint: Endpoint, **asked: Any) -> Script:
    """Read a call with these fields."""
    return author(0).script(endpoint, {"model": "m", **asked})


def test_the_same_seed_and_prompt_give_the_same_words() -> None:
    """Nothing else counts: an answer can be foretold, and another seed or prompt gets another."""
    assert chat().choices == chat(stream=True, temperature=1).choices
    assert chat(seed=1).choices != chat().choices
    assert chat(messages=[{"role": "user", "content": "hello you"}]).choices != chat().choices


def test_an_answer_without_a_maximum_has_20_to_60_tokens() -> None:
    """Long enough to be a stream, short enough for a test, and not always the same."""
    lengths = {chat(seed=seed).output_tokens for seed in range(300)}
    assert min(lengths) >= 20
    assert max(lengths) <= 60
    assert len(lengths) > 20


def test_a_maximum_ends_the_same_answer_early() -> None:
    """The beginning of what it would have been, and the reason says so; one that isn't reached changes nothing."""
    whole = chat().choices[0]
    assert not whole.is_cut_short
    cut = chat(max_tokens=5).choices[0]
    assert (cut.words, cut.finish_reason) == (whole.words[:5], "length")
    for roomy in (len(whole.words), 1000):
        assert chat(max_tokens=roomy).choices[0] == whole


@pytest.mark.parametrize(
    ("endpoint", "asked", "expected"),
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
def test_output_tokens(endpoint: Endpoint, asked: dict[str, Any], expected: int) -> None:
    """Each field that bounds or multiplies an answer does so at the endpoint that has it."""
    assert ask(endpoint, **asked).output_tokens == expected


def test_best_of_is_charged_but_not_shown() -> None:
    """All that was generated counts, as at OpenAI, though only `n` of it comes back."""
    script = ask(Endpoint.COMPLETIONS, prompt="a", n=2, best_of=5, max_tokens=2)
    assert (len(script.choices), script.output_tokens) == (2, 10)


def test_choices_differ() -> None:
    """Each of several choices has words of its own."""
    texts = [choice.text for choice in chat(n=CHOICES_MAX).choices]
    assert len(set(texts)) == CHOICES_MAX


@pytest.mark.parametrize("tokens", [0, 1, 300, SCROLL_WORDS, SCROLL_WORDS + 1, 3 * SCROLL_WORDS + 7])
def test_an_answer_is_as_long_as_directed(tokens: int) -> None:
    """Also far longer than what is kept ready."""
    choice = chat(directions=Directions(tokens=tokens)).choices[0]
    assert len(choice.words) == tokens
    assert len(choice.text.split()) == tokens


@pytest.mark.parametrize(
    ("endpoint", "asked", "expected"),
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
def test_input_tokens(endpoint: Endpoint, asked: dict[str, Any], expected: int) -> None:
    """Words and token ids, and three for each message."""
    assert ask(endpoint, **asked).input_tokens == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**6) | st.text(max_size=20) | st.text(" a\n", max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["content", "text", "role"]), inner, max_size=3)
    ),
    max_leaves=20,
)


@given(content=json_values, messages=st.lists(json_values, min_size=1, max_size=6))
def test_input_never_has_more_tokens_than_the_body_has_bytes(content: Any, messages: list[Any]) -> None:
    """The proxy holds a token for each byte; an upstream that charges more would break its promise for it."""
    for endpoint in Endpoint:
        call = {"model": "m", endpoint.input_field: messages, "instructions": content}
        assert author(0).script(endpoint, call).input_tokens <= len(orjson.dumps(call))
    assert count_tokens(content) <= len(orjson.dumps(content))


def test_zero_is_reported_when_directed() -> None:
    """What is said of the tokens may differ from what they were, as with real servers."""
    assert chat(max_tokens=5).reported == (5, 5)
    assert chat(max_tokens=5, directions=Directions(usage_zero=True)).reported == (0, 0)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (False, False)),
        ({"stream": True}, (True, False)),
        ({"stream": True, "stream_options": {"include_usage": True}}, (True, True)),
        ({"stream": True, "stream_options": {"include_usage": False}}, (True, False)),
        ({"stream": True, "stream_options": "x"}, (True, False)),
        ({"stream": "true"}, (False, False)),
    ],
)
def test_whether_it_is_streamed_and_usage_asked(asked: dict[str, Any], expected: tuple[bool, bool]) -> None:
    """Usage comes in a stream only to those who ask."""
    script = chat(**asked)
    assert (script.is_streamed, script.is_usage_asked) == expected


def test_vectors_follow_from_the_input_too() -> None:
    """One for each input, the same for the same, of the length asked for."""
    script = ask(Endpoint.EMBEDDINGS, input=["a", "b", "a"], dimensions=8, stream=True)
    first, second, third = script.vectors
    assert first == third != second
    assert [len(vector) for vector in script.vectors] == [8, 8, 8]
    assert len(ask(Endpoint.EMBEDDINGS, input="a").vectors[0]) == 1536
    assert not script.is_streamed


@pytest.mark.parametrize(
    ("endpoint", "asked", "param", "code"),
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
def test_a_call_that_openai_would_not_take(
    endpoint: Endpoint, asked: dict[str, Any], param: str, code: str | None
) -> None:
    """It is a 400 that names the field."""
    with pytest.raises(Complaint) as caught:
        author(0).script(endpoint, asked)
    assert (caught.value.status, caught.value.error["param"], caught.value.error["code"]) == (400, param, code)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b'{"a": NaN}', b'"\xff"'])
def test_a_body_that_is_no_json_object(body: bytes) -> None:
    """It is a 400, whatever it is instead."""
    with pytest.raises(Complaint) as caught:
        read_json(body)
    assert caught.value.status == 400
    assert read_json(b'{"a": 1}') == {"a": 1}
