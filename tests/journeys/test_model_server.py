"""The proxy in front of a real model server, llama.cpp's own, which counts its tokens itself.

The usage that it reports for a call is what is charged, and the bytes that it sends are what the client gets. Where
it reports too little, its metrics state how many tokens it generated, and no less is charged.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.model_server import ModelServer, model_server
from tests.stage import STAFF, Reply, Stage, key_of, stage

pytestmark = pytest.mark.journey

POLICY = "models: {tiny: {upstream: simulated}}\n" + STAFF[STAFF.index("groups:") :]
POLICY += f"  carol: {{groups: [staff], keys: [{key_of('carol')}]}}\n"
# The last byte of a prompt decides how long the answer is, see tiny_model.
PROMPTS = ("Hallo", "Wer lebt im Wald?", "Größe: 木 und 🦊", "a\nb\tc" * 90)
# Parts that differ between two answers to the same request: ids, times and durations.
_VARYING = (
    (re.compile(rb"(chatcmpl|resp|msg|rs)([-_])\w{32}"), rb"\1\2#"),
    (re.compile(rb'"(created|created_at|completed_at)":\d+'), rb'"\1":#'),
    (re.compile(rb'"(\w+_(?:ms|second))":[-+.e\d]+'), rb'"\1":#'),
)
_NOTHING = re.compile(rb"(?!)")
_TIMINGS = re.compile(rb',"timings":\{[^}]*\}')


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """One server for all tests of this module that run in the same process."""
    with model_server(tmp_path_factory.mktemp("model-server")) as server:
        yield server


def llama_stage(
    server: ModelServer, folder: Path, *, policy: str = POLICY, **more: Any
) -> AbstractAsyncContextManager[Stage]:
    """A stage with that server as its upstream."""
    return stage(policy, folder=folder, **{"upstream": server.url, "kind": "llamacpp", **more})


def chat(prompt: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """The path and the body of a chat."""
    return "/v1/chat/completions", _body(messages=[{"role": "user", "content": prompt}], **more)


def completion(prompt: str | list[str], **more: Any) -> tuple[str, dict[str, Any]]:
    """The path and the body of a completion."""
    return "/v1/completions", _body(prompt=prompt, **more)


def response(prompt: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """The path and the body of a response."""
    if "max_tokens" in more:
        more["max_output_tokens"] = more.pop("max_tokens")
    return "/v1/responses", _body(input=prompt, **more)


def _body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "temperature": 0, **fields}


def normalized(answer: bytes) -> bytes:
    """An answer without the parts that differ between two answers to the same request."""
    for pattern, replacement in _VARYING:
        answer = pattern.sub(replacement, answer)
    return answer


def reported_usage(answer: bytes) -> tuple[int, int]:
    """The input and output tokens that an answer reports, streamed or not. It uses none of the proxy's own code."""
    data = answer.replace(b"\ndata: ", b"\n").removeprefix(b"data: ")
    found: dict[str, int] = {}
    for line in data.splitlines():
        if line.startswith(b"{"):
            found |= _numbers(json.loads(line))
    if "prompt_tokens" in found:
        return found["prompt_tokens"], found["completion_tokens"]
    if "input_tokens" in found:
        return found["input_tokens"] + found.get("cache_read_input_tokens", 0), found["output_tokens"]
    return found["prompt_n"] + found["cache_n"], found["predicted_n"]


def _prompt_tokens(answer: bytes) -> int:
    return int(json.loads(answer)["usage"]["prompt_tokens"])


def _numbers(value: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            found |= _numbers(inner)
        elif isinstance(inner, int):
            found[name] = inner
    return found


async def settled_row(on: Stage, reply: Reply) -> dict[str, Any]:
    """The row of a call, after all calls are settled and audited."""
    await on.all_settled()
    await on.audit()
    return next(row for row in await on.rows("calls") if row["id"] == reply.headers["x-request-id"])


async def check_same_as_direct(
    on: Stage, server: ModelServer, path: str, body: dict[str, Any], *, ignore: re.Pattern[bytes] = _NOTHING
) -> None:
    """Send a request to the server and to the proxy: the answers are the same, and the reported usage is charged."""
    await server.ask(on.http, path, body)  # fills its cache, so the next two answers read the same part from it
    direct = await server.ask(on.http, path, body)
    reply = await on.post(path, body)
    assert reply.status == 200
    assert ignore.sub(b"", normalized(reply.body)) == ignore.sub(b"", normalized(direct))
    row = await settled_row(on, reply)
    assert (row["input_tokens"], row["output_tokens"]) == reported_usage(direct)
    assert (row["provenance"], row["outcome"]) == ("exactly", "complete")


USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
# Not streamed, streamed, and streamed with the usage for the client.
FORMS: tuple[dict[str, Any], ...] = ({}, {"stream": True}, USAGE)


@pytest.mark.parametrize("request_of", [chat, completion, response])
async def test_the_reported_usage_is_charged_and_the_bytes_are_unchanged(
    request_of: Any, server: ModelServer, tmp_path: Path
) -> None:
    """The client gets the same bytes as without the proxy, whether or not it asked for the usage."""
    maxima: tuple[dict[str, int], ...] = ({}, {"max_tokens": 3})
    async with llama_stage(server, tmp_path) as on:
        for prompt, form, maximum in product(PROMPTS, FORMS, maxima):
            await check_same_as_direct(on, server, *request_of(prompt, **form, **maximum))


@pytest.mark.parametrize(
    "option",
    [
        {"timings_per_token": True},
        {"return_progress": True},
        {"logprobs": True, "top_logprobs": 2},
        {"n_probs": 2},
        {"cache_prompt": False},
    ],
    ids=str,
)
async def test_llama_cpp_s_own_options_are_passed_on(
    option: dict[str, Any], server: ModelServer, tmp_path: Path
) -> None:
    """Their effect on an answer reaches the client. The proxy removes only what it asked for itself."""
    async with llama_stage(server, tmp_path) as on:
        for request_of, form in product((chat, completion), FORMS):
            await check_same_as_direct(on, server, *request_of(PROMPTS[2], **form, **option))


async def test_a_stop_word_costs_what_was_generated(server: ModelServer, tmp_path: Path) -> None:
    """The server then sends its timings on the chunk with the last text too; the client gets them on the last chunk.

    So the comparison ignores the timings.
    """
    async with llama_stage(server, tmp_path) as on:
        for request_of, form in product((chat, completion), FORMS):
            await check_same_as_direct(on, server, *request_of(PROMPTS[2], stop=["木"], **form), ignore=_TIMINGS)


async def test_the_official_sdk_reads_the_usage_that_is_charged(server: ModelServer, tmp_path: Path) -> None:
    """A stream and a whole answer have the same text, and the sum of their usage is charged."""
    async with llama_stage(server, tmp_path) as on:
        _, body = chat(PROMPTS[0])
        whole = await on.sdk().chat.completions.create(**body)
        stream = await on.sdk().chat.completions.create(**body, **USAGE)
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert whole.usage is not None
        assert chunks[-1].usage is not None
        await on.all_settled()
        assert await on.used() == (whole.usage.total_tokens + chunks[-1].usage.total_tokens, 0)


async def test_embeddings_are_charged_the_reported_usage(server: ModelServer, tmp_path: Path) -> None:
    """For several texts in one request. All numbers of the vectors are unchanged."""
    async with llama_stage(server, tmp_path, upstream=server.embeddings_url) as on:
        body = {"model": "tiny", "input": list(PROMPTS[:3])}
        direct = await server.ask(on.http, "/v1/embeddings", body, embeds=True)
        reply = await on.post("/v1/embeddings", body)
        assert normalized(reply.body) == normalized(direct)
        row = await settled_row(on, reply)
        assert (row["input_tokens"], row["output_tokens"], row["provenance"]) == (
            _prompt_tokens(direct),
            0,
            "exactly",
        )


async def test_messages_are_charged_the_reported_usage(server: ModelServer, tmp_path: Path) -> None:
    """On Anthropic's endpoint, which the server has too. Tokens that it read from its cache count as input."""
    async with llama_stage(server, tmp_path, kind="anthropic") as on:
        for prompt, form in product(PROMPTS, FORMS[:2]):
            _, body = chat(prompt, max_tokens=12, **form)
            await check_same_as_direct(on, server, "/v1/messages", body)


async def test_a_prompt_that_is_too_long_costs_nothing(server: ModelServer, tmp_path: Path) -> None:
    """The server's message is passed on, in an error object for which SDKs raise an exception."""
    async with llama_stage(server, tmp_path) as on:
        for request_of, form in product((chat, completion, response), FORMS):
            reply = await on.post(*request_of("a" * 9000, **form))
            assert reply.status == 400
            assert "exceeds the available context size" in reply.error["message"]
            row = await settled_row(on, reply)
            assert (row["input_tokens"], row["output_tokens"]) == (0, 0)


@pytest.mark.parametrize("request_of", [chat, completion, response])
async def test_an_endless_answer_ends_at_the_limit(request_of: Any, server: ModelServer, tmp_path: Path) -> None:
    """T42: the server stops where the quota has no more tokens, and all tokens that it generated are charged."""
    policy = POLICY.replace("tokens: 1M", "output_tokens: 30").replace(
        "simulated}", "simulated, smallest_answer: 10}"
    )
    async with llama_stage(server, tmp_path, policy=policy) as on:
        for user, form in zip(("alice", "bob", "carol"), FORMS, strict=True):
            generated_before = await server.generated(on.http)
            reply = await on.post(*request_of("Hallo", ignore_eos=True, **form), user=user)
            assert reply.status == 200
            row = await settled_row(on, reply)
            assert row["output_tokens"] == await server.generated(on.http) - generated_before == 30


async def test_all_choices_are_charged(server: ModelServer, tmp_path: Path) -> None:
    """The server reports the usage of one choice only. At least what it generated for all of them is charged."""
    several = (
        chat("Hallo", n=3),
        chat("Hallo", n_cmpl=3),
        completion(["Hallo", "Wer bist du?", "木"]),
        completion("Hallo", n=2),
    )
    async with llama_stage(server, tmp_path) as on:
        for (path, body), form in product(several, FORMS):
            generated_before = await server.generated(on.http)
            reply = await on.post(path, {**body, **form})
            assert reply.status == 200
            generated = await server.generated(on.http) - generated_before
            row = await settled_row(on, reply)
            assert row["output_tokens"] >= generated > 20


@pytest.mark.parametrize("on_disconnect", ["stop", "drain"])
@pytest.mark.parametrize("request_of", [chat, completion, response])
async def test_a_client_that_disconnects_is_charged_what_was_generated(
    request_of: Any, on_disconnect: str, server: ModelServer, tmp_path: Path
) -> None:
    """`stop` charges what had arrived. `drain` charges exactly what the server generated to the end of the answer."""
    # With `stop` the answer is so long that it has not ended when the client disconnects. With `drain` it must end
    # soon.
    maximum = 7000 if on_disconnect == "stop" else 400
    path, body = request_of("Hallo", stream=True, max_tokens=maximum, ignore_eos=True)
    async with llama_stage(server, tmp_path, on_disconnect=on_disconnect) as on:
        input_tokens, _ = reported_usage(await server.ask(on.http, *request_of("Hallo", max_tokens=1)))
        generated_before = await server.generated(on.http)
        received = b""
        headers = {"authorization": f"Bearer {key_of('alice')}"}
        async with on.http.post(on.url + path, json=body, headers=headers) as stream:
            while received.count(b"\n\n") < 60:
                received += await stream.content.readany()
        await on.all_settled()
        [row] = await on.rows("calls")
        generated = await server.generated(on.http) - generated_before
        if on_disconnect == "drain":
            charged = row["input_tokens"], row["output_tokens"], row["provenance"]
            assert charged == (input_tokens, generated, "exactly")
            return
        assert row["outcome"] == "client_left"
        assert 7000 > row["output_tokens"] >= sum(map(is_text, received.split(b"\n\n")))
        if request_of is not response:  # a response reports no usage before its end
            assert (row["input_tokens"], row["provenance"]) == (input_tokens, "exactly")
            assert row["output_tokens"] <= generated


def is_text(event: bytes) -> bool:
    """Whether an event contains generated text."""
    return bool(re.search(rb'"(content|text|delta)":"[^"]', event))
