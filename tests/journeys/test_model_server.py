"""The proxy before a server that none of us wrote: llama.cpp's own, which counts by itself.

What it says of a call is what stands on the books, and what it sends is what the client gets. Where it says too
little its metrics tell what it generated, and no less is charged.
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
# The last byte decides how long the answer is.
PROMPTS = ("Hallo", "Wer lebt im Wald?", "Größe: 木 und 🦊", "a\nb\tc" * 90)
# What differs between two answers to the same: names, times, and how long it took.
_VARYING = (
    (re.compile(rb"(chatcmpl|resp|msg|rs)([-_])\w{32}"), rb"\1\2#"),
    (re.compile(rb'"(created|created_at|completed_at)":\d+'), rb'"\1":#'),
    (re.compile(rb'"(\w+_(?:ms|second))":[-+.e\d]+'), rb'"\1":#'),
)
_NOTHING = re.compile(rb"(?!)")
_TIMINGS = re.compile(rb',"timings":\{[^}]*\}')


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """One for all of these tests that run in this process."""
    with model_server(tmp_path_factory.mktemp("model-server")) as server:
        yield server


def before(
    server: ModelServer, folder: Path, *, policy: str = POLICY, **more: Any
) -> AbstractAsyncContextManager[Stage]:
    """The proxy before that server."""
    return stage(policy, folder=folder, **{"upstream": server.url, "kind": "llamacpp", **more})


def chat(prompt: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """Where to ask for a chat, and how."""
    return "/v1/chat/completions", _asked(messages=[{"role": "user", "content": prompt}], **more)


def completion(prompt: str | list[str], **more: Any) -> tuple[str, dict[str, Any]]:
    """The same for a completion."""
    return "/v1/completions", _asked(prompt=prompt, **more)


def response(prompt: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """The same for a response."""
    if "max_tokens" in more:
        more["max_output_tokens"] = more.pop("max_tokens")
    return "/v1/responses", _asked(input=prompt, **more)


def _asked(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "temperature": 0, **fields}


def alike(answer: bytes) -> bytes:
    """An answer without what differs from one to the next."""
    for pattern, replacement in _VARYING:
        answer = pattern.sub(replacement, answer)
    return answer


def said(answer: bytes) -> tuple[int, int]:
    """The tokens of input and output that an answer says, whole or as a stream; as read by nothing of the proxy's."""
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


async def booked(on: Stage, reply: Reply) -> dict[str, Any]:
    """The row of a call, once all is settled."""
    await on.all_settled()
    await on.audit()
    return next(row for row in await on.rows("calls") if row["id"] == reply.headers["x-request-id"])


async def same_as_without_us(
    on: Stage, server: ModelServer, path: str, body: dict[str, Any], *, but: re.Pattern[bytes] = _NOTHING
) -> None:
    """Ask the server and ask the proxy: the same answer `but` for this, and on the books what it says."""
    await server.ask(on.http, path, body)  # from now on the same of it is in the cache
    direct = await server.ask(on.http, path, body)
    reply = await on.post(path, body)
    assert reply.status == 200
    assert but.sub(b"", alike(reply.body)) == but.sub(b"", alike(direct))
    row = await booked(on, reply)
    assert (row["input_tokens"], row["output_tokens"]) == said(direct)
    assert (row["provenance"], row["outcome"]) == ("exactly", "complete")


USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
# Whole, as a stream, and as one whose client wants to see the usage.
FORMS: tuple[dict[str, Any], ...] = ({}, {"stream": True}, USAGE)


@pytest.mark.parametrize("ask", [chat, completion, response])
async def test_what_it_says_is_charged_and_what_it_sends_passes(
    ask: Any, server: ModelServer, tmp_path: Path
) -> None:
    """Byte for byte as without us, whether or not the client asked for the usage; and charged what it said."""
    maxima: tuple[dict[str, int], ...] = ({}, {"max_tokens": 3})
    async with before(server, tmp_path) as on:
        for prompt, form, maximum in product(PROMPTS, FORMS, maxima):
            await same_as_without_us(on, server, *ask(prompt, **form, **maximum))


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
async def test_its_own_options_pass(option: dict[str, Any], server: ModelServer, tmp_path: Path) -> None:
    """What they change in an answer is in the client's, and nothing of it is taken for what we asked."""
    async with before(server, tmp_path) as on:
        for ask, form in product((chat, completion), FORMS):
            await same_as_without_us(on, server, *ask(PROMPTS[2], **form, **option))


async def test_a_stop_word_costs_what_was_generated(server: ModelServer, tmp_path: Path) -> None:
    """There its timings come with the last of the text too, unasked; the client gets them on the last chunk alone."""
    async with before(server, tmp_path) as on:
        for ask, form in product((chat, completion), FORMS):
            await same_as_without_us(on, server, *ask(PROMPTS[2], stop=["木"], **form), but=_TIMINGS)


async def test_the_official_sdk_reads_what_it_would_read_without_us(server: ModelServer, tmp_path: Path) -> None:
    """A stream and a whole answer: their usage is what stands on the books, in sum."""
    async with before(server, tmp_path) as on:
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


async def test_embeddings_are_charged_what_it_says(server: ModelServer, tmp_path: Path) -> None:
    """Of several texts too; and each number comes through."""
    async with before(server, tmp_path, upstream=server.embeddings_url) as on:
        body = {"model": "tiny", "input": list(PROMPTS[:3])}
        direct = await server.ask(on.http, "/v1/embeddings", body, embeds=True)
        reply = await on.post("/v1/embeddings", body)
        assert alike(reply.body) == alike(direct)
        row = await booked(on, reply)
        assert (row["input_tokens"], row["output_tokens"], row["provenance"]) == (
            _prompt_tokens(direct),
            0,
            "exactly",
        )


async def test_messages_are_charged_what_it_says(server: ModelServer, tmp_path: Path) -> None:
    """On Anthropic's surface, which it has too: what it took from its cache is input like the rest."""
    async with before(server, tmp_path, kind="anthropic") as on:
        for prompt, form in product(PROMPTS, FORMS[:2]):
            _, body = chat(prompt, max_tokens=12, **form)
            await same_as_without_us(on, server, "/v1/messages", body)


async def test_a_prompt_that_is_too_long_costs_nothing(server: ModelServer, tmp_path: Path) -> None:
    """Its own words about it come through, in the form at which SDKs raise."""
    async with before(server, tmp_path) as on:
        for ask, form in product((chat, completion, response), FORMS):
            reply = await on.post(*ask("a" * 9000, **form))
            assert reply.status == 400
            assert "exceeds the available context size" in reply.error["message"]
            row = await booked(on, reply)
            assert (row["input_tokens"], row["output_tokens"]) == (0, 0)


@pytest.mark.parametrize("ask", [chat, completion, response])
async def test_it_keeps_to_what_is_left(ask: Any, server: ModelServer, tmp_path: Path) -> None:
    """An answer that would go on for ever ends where the quota does, and all that was generated is charged."""
    policy = POLICY.replace("tokens: 1M", "output_tokens: 30").replace(
        "simulated}", "simulated, smallest_answer: 10}"
    )
    async with before(server, tmp_path, policy=policy) as on:
        for user, form in zip(("alice", "bob", "carol"), FORMS, strict=True):
            made = await server.generated(on.http)
            reply = await on.post(*ask("Hallo", ignore_eos=True, **form), user=user)
            assert reply.status == 200
            row = await booked(on, reply)
            assert row["output_tokens"] == await server.generated(on.http) - made == 30


async def test_all_choices_are_charged(server: ModelServer, tmp_path: Path) -> None:
    """It says the usage of one of them alone; what it generated for all of them is on the books."""
    several = (
        chat("Hallo", n=3),
        chat("Hallo", n_cmpl=3),
        completion(["Hallo", "Wer bist du?", "木"]),
        completion("Hallo", n=2),
    )
    async with before(server, tmp_path) as on:
        for (path, body), form in product(several, FORMS):
            made = await server.generated(on.http)
            reply = await on.post(path, {**body, **form})
            assert reply.status == 200
            made = await server.generated(on.http) - made
            row = await booked(on, reply)
            assert row["output_tokens"] >= made > 20


@pytest.mark.parametrize("on_disconnect", ["stop", "drain"])
@pytest.mark.parametrize("ask", [chat, completion, response])
async def test_who_hangs_up_pays_for_what_was_generated(
    ask: Any, on_disconnect: str, server: ModelServer, tmp_path: Path
) -> None:
    """All that came until then; where the answer is read on, exactly what the server made of it to its end."""
    # So long that it has not ended when the client goes; what is read on has to be over soon.
    path, body = ask("Hallo", stream=True, max_tokens=7000 if on_disconnect == "stop" else 400, ignore_eos=True)
    async with before(server, tmp_path, on_disconnect=on_disconnect) as on:
        taken, _ = said(await server.ask(on.http, *ask("Hallo", max_tokens=1)))
        made = await server.generated(on.http)
        seen = b""
        headers = {"authorization": f"Bearer {key_of('alice')}"}
        async with on.http.post(on.url + path, json=body, headers=headers) as stream:
            while seen.count(b"\n\n") < 60:
                seen += await stream.content.readany()
        await on.all_settled()
        [row] = await on.rows("calls")
        made = await server.generated(on.http) - made
        if on_disconnect == "drain":
            assert (row["input_tokens"], row["output_tokens"], row["provenance"]) == (taken, made, "exactly")
            return
        assert row["outcome"] == "client_left"
        assert 7000 > row["output_tokens"] >= sum(map(is_text, seen.split(b"\n\n")))
        if ask is not response:  # which says nothing before its end
            assert (row["input_tokens"], row["provenance"]) == (taken, "exactly")
            assert row["output_tokens"] <= made


def is_text(event: bytes) -> bool:
    """Whether an event brings something that was generated."""
    return bool(re.search(rb'"(content|text|delta)":"[^"]', event))
