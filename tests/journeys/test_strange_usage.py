"""What a user is charged through the proxy for usage that vendors state in their own ways.

The readings themselves are tested in `tests/formats`. Here the whole path is: the configuration, what the call could
have used, the hold, and the counter of the quota.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.bare_upstream import bare_upstream, stream_head
from tests.stage import STAFF, stage

CHAT = "/v1/chat/completions"
TEXT = {"choices": [{"index": 0, "delta": {"content": "Hello"}, "finish_reason": None}]}
END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


async def _serve(metadata: dict[str, Any], _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with what the request asks for: a whole answer, or the events of a stream."""
    if "whole" in metadata:
        body = metadata["whole"].encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
    else:
        events = b"".join(b"data: %b\n\n" % line.encode() for line in metadata["stream"].split("\n"))
        writer.write(stream_head() + events + b"data: [DONE]\n\n")
    await writer.drain()


def usage(*numbers: int, **more: Any) -> dict[str, Any]:
    """An input, an output and a total."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {**dict(zip(names, numbers, strict=False)), **more}


@pytest.mark.parametrize(
    ("stated", "charged"),
    [
        (usage(32, 9, 135, completion_tokens_details={"reasoning_tokens": 94}), 135),
        (usage(10, 5, 105), 105),  # within the 100 tokens that the model can give
        (usage(10, 5, 215), 15),  # beyond them
        (usage(10, 5, 415, completion_tokens_details={"reasoning_tokens": 400}), 415),
        (usage(33, 7, 40, citation_tokens=20, reasoning_tokens=30), 90),
    ],
)
async def test_tokens_beside_the_output_are_charged(tmp_path: Path, stated: dict, charged: int) -> None:
    """Whole and streamed; `extra_usage` of the upstream names Perplexity's members."""
    answer = {"choices": [{"message": {"content": "Hello"}}], "usage": stated}
    events = [TEXT, END, {"choices": [], "usage": stated}]
    async with (
        bare_upstream(_serve) as upstream,
        stage(
            folder=tmp_path,
            upstream=upstream.url,
            kind="openai",
            more=", extra_usage: [citation_tokens, reasoning_tokens]",
        ) as on,
    ):
        for metadata in ({"whole": json.dumps(answer)}, {"stream": "\n".join(map(json.dumps, events))}):
            before, _ = await on.used()
            more = {} if "whole" in metadata else {"stream": True}
            reply = await on.post(CHAT, {"model": "fast", "messages": [], "metadata": metadata, **more})
            assert reply.status == 200
            await on.all_settled()
            assert await on.used() == (before + charged, 0)


@pytest.mark.parametrize("place", ["choice", "x_groq"])
async def test_usage_in_a_place_of_the_vendor_is_charged_and_passes(tmp_path: Path, place: str) -> None:
    """The client gets the bytes that came; only the usage chunk for which the proxy asked is removed."""
    stated = usage(19, 21, 40)
    end = (
        {**END, "x_groq": {"usage": stated}}
        if place == "x_groq"
        else {"choices": [{**END["choices"][0], "usage": stated}]}
    )
    events = [TEXT, end, {"choices": [], "usage": usage(0, 0, 0)}]
    metadata = {"stream": "\n".join(map(json.dumps, events))}
    async with bare_upstream(_serve) as upstream, stage(folder=tmp_path, upstream=upstream.url, kind="openai") as on:
        reply = await on.post(CHAT, {"model": "fast", "messages": [], "metadata": metadata, "stream": True})
        expected = b"".join(b"data: %b\n\n" % json.dumps(each).encode() for each in events[:2])
        assert reply.body == expected + b"data: [DONE]\n\n"
        await on.all_settled()
        assert await on.used() == (40, 0)


@pytest.mark.parametrize(
    ("events", "more", "charged"),
    [
        ([TEXT, END, END, *[{"choices": [], "usage": usage(19, 21, 40)}] * 2], {"n": 2}, 40),
        (
            [TEXT, END, {"choices": [], "usage": {"total_tokens": 40}}, {"choices": [], "usage": usage(0, 0, 0)}],
            {},
            40,
        ),
        ([{**TEXT, "usage": usage(19, 1, citation_tokens=20)}, END, {"choices": [], "usage": usage(19, 21)}], {}, 60),
    ],
    ids=["repeated for two choices", "zeros after a total", "additional tokens of an earlier usage"],
)
async def test_a_later_usage_takes_nothing_away_and_adds_nothing_twice(
    tmp_path: Path, events: list, more: dict, charged: int
) -> None:
    """Of each part the largest that was stated counts."""
    metadata = {"stream": "\n".join(map(json.dumps, events))}
    async with (
        bare_upstream(_serve) as upstream,
        stage(folder=tmp_path, upstream=upstream.url, kind="openai", more=", extra_usage: [citation_tokens]") as on,
    ):
        await on.post(CHAT, {"model": "fast", "messages": [], "metadata": metadata, "stream": True, **more})
        await on.all_settled()
        assert await on.used() == (charged, 0)


@pytest.mark.parametrize(
    "body",
    [
        '{"choices":[{"message":{"content":"Hello"}}],"created":' + "9" * 200_000 + "}",
        '{"choices":[{"message":{"content":"Hello"}}],"logprobs":"' + "a" * 20_000,
        '{"choices":[{"message":{"content":"Hello"}}],"usage":"' + "1" * 20_000 + '"}',
    ],
    ids=["digits", "broken", "usage is text"],
)
async def test_of_an_unreadable_answer_only_the_text_is_charged(tmp_path: Path, body: str) -> None:
    """Not the JSON around it, which would be thousands of tokens."""
    message = [{"role": "user", "content": "Hi"}]
    policy = STAFF.replace("max_output_tokens: 100", "max_output_tokens: 10000")
    async with (
        bare_upstream(_serve) as upstream,
        stage(policy, folder=tmp_path, upstream=upstream.url, kind="openai") as on,
    ):
        await on.post(CHAT, {"model": "fast", "messages": message, "metadata": {"whole": body}})
        await on.all_settled()
        used, held = await on.used()
        assert 0 < used < 20
        assert held == 0
