"""What a client reads in an answer that is complete, or cut anywhere."""

import orjson
import pytest

from proxy.simulator.directives import Directives
from proxy.simulator.frames import write_stream, write_whole
from proxy.simulator.text import Answer, Endpoint, Generator
from proxy.torture.answers import (
    ReceivedAnswer,
    Refusal,
    is_between_text_and_end,
    read_refusal,
    read_stream,
    read_whole,
)

HELLO = {"messages": [{"role": "user", "content": "hello"}], "prompt": "hello", "input": "hello"}


def generated(endpoint: Endpoint, **params: object) -> Answer:
    """An answer of 12 tokens, or of 12 for each choice."""
    return Generator(0).answer(endpoint, {"model": "m", **HELLO, **params}, Directives(tokens=12))


def stream(endpoint: Endpoint, **params: object) -> list[bytes]:
    """The events of a streamed answer."""
    events = write_stream(generated(endpoint, stream=True, **params), id="x", created=1)
    return [*events.opening, *events.text, *events.closing]


WITH_USAGE = {"stream_options": {"include_usage": True}, "n": 2}


@pytest.mark.parametrize(
    ("endpoint", "params", "expected"),
    [
        (Endpoint.CHAT, {}, ReceivedAnswer(True, (4, 12), 12)),
        (Endpoint.CHAT, {"n": 2}, ReceivedAnswer(True, (4, 24), 24)),
        (Endpoint.COMPLETIONS, {}, ReceivedAnswer(True, (1, 12), 12)),
        (Endpoint.RESPONSES, {}, ReceivedAnswer(True, (1, 12), 12)),
        (Endpoint.EMBEDDINGS, {"input": "hello"}, ReceivedAnswer(True, (1, 0), 0)),
    ],
)
def test_a_whole_answer(endpoint: Endpoint, params: dict[str, object], expected: ReceivedAnswer) -> None:
    """Its usage and the number of words are read; with a byte missing it is not complete."""
    body = write_whole(generated(endpoint, **params), id="x", created=1)
    assert read_whole(body) == expected
    assert not read_whole(body[:-1]).is_complete


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": {"message": "no"}}'])
def test_a_body_that_is_not_an_answer(body: bytes) -> None:
    """It is not complete and has neither usage nor words."""
    assert read_whole(body) == ReceivedAnswer()


@pytest.mark.parametrize(
    ("endpoint", "params", "usage", "words"),
    [
        (Endpoint.CHAT, {}, None, 12),
        (Endpoint.CHAT, WITH_USAGE, (4, 24), 24),
        (Endpoint.COMPLETIONS, {}, None, 12),
        (Endpoint.COMPLETIONS, WITH_USAGE, (1, 24), 24),
        (Endpoint.RESPONSES, {}, (1, 12), 12),
        (Endpoint.RESPONSES, {"max_output_tokens": 5}, (1, 5), 5),
    ],
)
def test_a_stream_is_complete_only_with_its_last_event(
    endpoint: Endpoint, params: dict[str, object], usage: tuple[int, int] | None, words: int
) -> None:
    """If it is cut before, it has the words that arrived and is not complete."""
    events = stream(endpoint, **params)
    data = b"".join(events)
    assert read_stream(data) == ReceivedAnswer(True, usage, words)
    assert read_stream(data.replace(b"\n", b"\r\n")) == ReceivedAnswer(True, usage, words)
    assert not read_stream(data[:-1]).is_complete
    assert not read_stream(b"".join(events[:-1])).is_complete
    assert read_stream(b"".join(events[:8])).words < words or words == 5


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES])
def test_the_point_between_the_text_and_the_end_of_a_stream(endpoint: Endpoint) -> None:
    """All words have arrived there, and the last event has not."""
    events = stream(endpoint)
    between = [place for place, event in enumerate(events) if is_between_text_and_end(event)]
    assert between
    assert max(between) < len(events) - 1
    assert read_stream(b"".join(events[: between[0] + 1])).words == 12
    assert not is_between_text_and_end(b"".join(events))


def refusal(resets_at: int, *free: int) -> bytes:
    """The body of the proxy's 429; each quota has so many tokens left."""
    quotas = [
        {"tokens": {"limit": 100, "used": 100 - left}, "window": {"opened_at": left, "resets_at": 60 + left}}
        for left in free
    ]
    calls = {"tokens": None, "requests": {"limit": 1, "used": 1}}
    return orjson.dumps({"error": {"message": "no", "resets_at": resets_at, "quotas": [*quotas, calls]}})


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (refusal(70, 10), Refusal(10, 10, 70)),
        (refusal(70, 30, 10), Refusal(10, 10, 70)),
        (refusal(90, 30, 10), Refusal(10, 10, 90)),
        (refusal(70), Refusal(resets_at=70)),
        (refusal(70, 10).replace(b'"opened_at":10', b'"opened_at":null'), Refusal(10, None, 70)),
        (
            refusal(70, 30, 10).replace(b'{"tokens":{', b'{"id":"g/q","tokens":{'),
            Refusal(10, 10, 70, quota="g/q", limits=(("g/q", 100), ("g/q", 100))),
        ),
        (b'{"error": {"message": "slow down", "type": "requests"}}', Refusal()),
        (b'{"error": "slow down"}', Refusal()),
        (b"slow down", Refusal()),
    ],
)
def test_a_refusal(body: bytes, expected: Refusal) -> None:
    """The free tokens that it states, of the tightest quota. Other proxies' refusals state none."""
    assert read_refusal(body) == expected
