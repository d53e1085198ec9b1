"""What a client reads out of an answer, whole or cut anywhere."""

import orjson
import pytest

from proxy.simulator.directives import Directives
from proxy.simulator.frames import write_stream, write_whole
from proxy.simulator.text import Generator, Endpoint, Answer
from proxy.torture.answers import Reading, Refusal, is_near_the_end, read_refusal, read_stream, read_whole

HELLO = {"messages": [{"role": "user", "content": "hello"}], "prompt": "hello", "input": "hello"}


def script(endpoint: Endpoint, **asked: object) -> Answer:
    """A call for 12 tokens, or 2 × 12."""
    return Generator(0).answer(endpoint, {"model": "m", **HELLO, **asked}, Directives(tokens=12))


def stream(endpoint: Endpoint, **asked: object) -> list[bytes]:
    """The events of its answer."""
    events = write_stream(script(endpoint, stream=True, **asked), id="x", created=1)
    return [*events.opening, *events.text, *events.closing]


ASKED = {"stream_options": {"include_usage": True}, "n": 2}


@pytest.mark.parametrize(
    ("endpoint", "asked", "reading"),
    [
        (Endpoint.CHAT, {}, Reading(True, (4, 12), 12)),
        (Endpoint.CHAT, {"n": 2}, Reading(True, (4, 24), 24)),
        (Endpoint.COMPLETIONS, {}, Reading(True, (1, 12), 12)),
        (Endpoint.RESPONSES, {}, Reading(True, (1, 12), 12)),
        (Endpoint.EMBEDDINGS, {"input": "hello"}, Reading(True, (1, 0), 0)),
    ],
)
def test_a_whole_answer(endpoint: Endpoint, asked: dict[str, object], reading: Reading) -> None:
    """Its usage, and the words that are in it."""
    body = write_whole(script(endpoint, **asked), id="x", created=1)
    assert read_whole(body) == reading
    assert not read_whole(body[:-1]).is_whole


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": {"message": "no"}}'])
def test_what_is_no_answer(body: bytes) -> None:
    """Is not whole, and has neither usage nor words."""
    assert read_whole(body) == Reading()


@pytest.mark.parametrize(
    ("endpoint", "asked", "usage", "words"),
    [
        (Endpoint.CHAT, {}, None, 12),
        (Endpoint.CHAT, ASKED, (4, 24), 24),
        (Endpoint.COMPLETIONS, {}, None, 12),
        (Endpoint.COMPLETIONS, ASKED, (1, 24), 24),
        (Endpoint.RESPONSES, {}, (1, 12), 12),
        (Endpoint.RESPONSES, {"max_output_tokens": 5}, (1, 5), 5),
    ],
)
def test_a_stream_is_whole_with_its_last_event_and_not_before(
    endpoint: Endpoint, asked: dict[str, object], usage: tuple[int, int] | None, words: int
) -> None:
    """Cut anywhere before, it has the words that came, and is no whole answer."""
    events = stream(endpoint, **asked)
    data = b"".join(events)
    assert read_stream(data) == Reading(True, usage, words)
    assert read_stream(data.replace(b"\n", b"\r\n")) == Reading(True, usage, words)
    assert not read_stream(data[:-1]).is_whole
    assert not read_stream(b"".join(events[:-1])).is_whole
    assert read_stream(b"".join(events[:8])).words < words or words == 5


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES])
def test_the_last_moment_to_leave(endpoint: Endpoint) -> None:
    """When the text is over, and the answer is not."""
    events = stream(endpoint)
    near = [place for place, event in enumerate(events) if is_near_the_end(event)]
    assert near
    assert max(near) < len(events) - 1
    assert read_stream(b"".join(events[: near[0] + 1])).words == 12
    assert not is_near_the_end(b"".join(events))


def refusal(resets_at: int, *free: int) -> bytes:
    """A 429 of ours, of quotas that have so much left."""
    quotas = [
        {"tokens": {"limit": 100, "used": 100 - left}, "window": {"opened_at": left, "resets_at": 60 + left}}
        for left in free
    ]
    calls = {"tokens": None, "requests": {"limit": 1, "used": 1}}
    return orjson.dumps({"error": {"message": "no", "resets_at": resets_at, "quotas": [*quotas, calls]}})


@pytest.mark.parametrize(
    ("body", "read"),
    [
        (refusal(70, 10), Refusal(10, 10, 70)),
        (refusal(70, 30, 10), Refusal(10, 10, 70)),
        (refusal(90, 30, 10), Refusal(10, 10, 90)),
        (refusal(70), Refusal(resets_at=70)),
        (refusal(70, 10).replace(b'"opened_at":10', b'"opened_at":null'), Refusal(10, None, 70)),
        (b'{"error": {"message": "slow down", "type": "requests"}}', Refusal()),
        (b'{"error": "slow down"}', Refusal()),
        (b"slow down", Refusal()),
    ],
)
def test_a_refusal(body: bytes, read: Refusal) -> None:
    """What is free by its own words; the tightest of several; others' refusals say nothing."""
    assert read_refusal(body) == read
