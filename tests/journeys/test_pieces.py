"""Images, speech and transcripts that report no tokens are counted by a quota of requests, or by a price in tokens.

Calls that cost no tokens are not refused when tokens are used up. docs/threats.md T110, T111.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.bare_upstream import bare_upstream, stream_head
from tests.stage import STAFF, Reply, Stage, stage

pytestmark = pytest.mark.journey

MODELS = """
models:
  chat: {upstream: simulated, model: gpt-4o-mini}
  tts-1-hd: {upstream: simulated}
  dall-e-3: {upstream: simulated}
  dall-e-2: {upstream: simulated}
  whisper-1: {upstream: simulated}
  pictures: {upstream: simulated, model: gpt-image-1}
  gpt-image-1: {upstream: simulated, model: dall-e-3}
  unknown: {upstream: simulated, model: flux}
  voice: {upstream: simulated, model: gpt-4o-mini-tts}
  scribe: {upstream: simulated, model: gpt-4o-transcribe}
  both: {upstreams: [{upstream: simulated, model: gpt-image-1}, {upstream: simulated, model: dall-e-3, weight: 0}]}
  poster: {upstream: simulated, model: dall-e-3, tokens_per_image: 1000, tokens_per_request: 200}
  cut: {upstream: simulated, model: dall-e-3+cut=0, tokens_per_image: 1000}
  failing: {upstream: simulated, model: dall-e-3+status=500, tokens_per_image: 1000}
  rejected: {upstream: simulated, model: dall-e-3+status=400, tokens_per_image: 1000}
  slow: {upstream: simulated, model: dall-e-3+delay=0.05, tokens_per_image: 1000}
  priced: {upstream: simulated, model: flux, tokens_per_image: 200}
  silent-priced: {upstream: simulated, model: flux+no_usage, tokens_per_image: 200}
  silent: {upstream: simulated, model: gpt-image-1+no_usage}
  omni-moderation-latest: {upstream: simulated}
"""
QUOTA = "daily: {tokens: 1M, requests: 100k, per: day}"
POLICY = MODELS + STAFF[STAFF.index("groups:") :]


def policy(limits: str = "tokens: 50k", more: str = "") -> str:
    """The policy with these limits of staff/daily, and `more` at the top of the file."""
    return more + POLICY.replace(QUOTA, f"daily: {{{limits}, per: day}}")


SPEECH = ("/v1/audio/speech", {"model": "tts-1-hd", "input": "hello there", "voice": "alloy"})
IMAGE = ("/v1/images/generations", {"model": "dall-e-3", "prompt": "a red fox"})


async def form(on: Stage, path: str, **fields: str) -> Reply:
    """POST a form with these fields and a file."""
    boundary, name = b"b0undary", "file" if "audio" in path else "image"
    parts = [
        b'Content-Disposition: form-data; name="%b"\r\n\r\n%b' % (key.encode(), value.encode())
        for key, value in fields.items()
    ]
    parts.append(
        b'Content-Disposition: form-data; name="%b"; filename="a.bin"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n12345" % name.encode()
    )
    body = b"".join(b"--%b\r\n%b\r\n" % (boundary, part) for part in parts) + b"--%b--\r\n" % boundary
    return await on.post(path, body, headers={"content-type": "multipart/form-data; boundary=b0undary"})


async def image(on: Stage, model: str, **more: Any) -> Reply:
    """Ask for an image."""
    return await on.post(IMAGE[0], {**IMAGE[1], "model": model, **more})


def answer_of(body: bytes) -> bytes:
    """A whole answer with this body, in JSON."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def usage(on: Stage) -> tuple[int, int]:
    """Tokens and requests that staff/daily has used, when nothing is in flight."""
    await on.all_settled()
    await on.audit()
    quota = await on.quota("staff/daily")
    levels = [quota[measure] or {"used": 0, "held": 0} for measure in ("tokens", "requests")]
    assert [level["held"] for level in levels] == [0, 0]
    return levels[0]["used"], levels[1]["used"]


async def test_speech_and_images_are_not_free_under_a_quota_of_tokens(tmp_path: Path) -> None:
    """T110: 31 times speech, three images: each is a 404 that says why and what would help; nothing is sent."""
    async with stage(policy(), folder=tmp_path) as on:
        for path, body in [SPEECH] * 31 + [IMAGE] * 3:
            reply = await on.post(path, body)
            assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")
            for text in (body["model"], "report no tokens", "`requests`", "`tokens_per_request`", "unmatched: allow"):
                assert text in reply.error["message"]
        assert (await usage(on), on.simulator.received) == ((0, 0), 0)


async def test_with_a_limit_on_requests_they_are_counted(tmp_path: Path) -> None:
    """At the limit they are refused, and not before; tokens that are used up do not refuse them."""
    async with stage(policy("tokens: 100, requests: 34"), folder=tmp_path) as on:
        for path, body in [SPEECH] * 31 + [IMAGE] * 3:
            assert (await on.post(path, body)).status == 200
        assert await usage(on) == (0, 34)
        refused = await on.post(*SPEECH)
        assert refused.status == 429
        assert "34 of 34 requests" in refused.error["message"]


@pytest.mark.parametrize(
    ("groups", "status"),
    [
        (
            "everyone: {quotas: {calls: {requests: 9, per: day}}}, staff: {quotas: {daily: {tokens: 1M, per: day}}}",
            200,
        ),
        (
            "default: {quotas: {calls: {requests: 9, per: day}}}, staff: {quotas: {daily: {tokens: 1M, per: day}}}",
            200,
        ),
        ("staff: {quotas: {daily: {requests: 9, per: day, enforce: after}}}", 200),
        ("staff: {quotas: {daily: {requests: 9, per: day, enforce: shadow}}}", 404),
        ("staff: {quotas: {daily: {input_tokens: 9, output_tokens: 9, per: day}}}", 404),
        ("staff: {quotas: {daily: {tokens: 9, per: day}, other: {requests: 9, per: day, models: [x]}}}", 404),
        ("staff: {quotas: {daily: {tokens: 9, per: day}}}, default: {unlimited: true}", 200),
        ("staff: {unlimited: true}", 200),
    ],
)
async def test_what_counts_as_a_quota_that_can_count_them(groups: str, status: int, tmp_path: Path) -> None:
    """An enforced limit on requests that binds this user on this model, or an unlimited group."""
    text = MODELS + f"groups: {{{groups}}}\n" + STAFF[STAFF.index("users:") :]
    async with stage(text, folder=tmp_path) as on:
        assert [(await on.post(path, body)).status for path, body in (SPEECH, IMAGE)] == [status] * 2


async def test_a_group_with_tokens_admits_none_past_the_exhausted_requests_of_another(tmp_path: Path) -> None:
    """It has no say in such a call, as if its quota were for another model."""
    groups = (
        "groups: {lab: {quotas: {daily: {tokens: 1M, per: day}}}, "
        "staff: {quotas: {daily: {requests: 2, per: day}}}}\n"
    )
    text = MODELS + groups + STAFF[STAFF.index("users:") :].replace("[staff]", "[lab, staff]")
    async with stage(text, folder=tmp_path) as on:
        assert [(await image(on, "dall-e-3")).status for _ in range(3)] == [200, 200, 429]
        assert await usage(on) == (0, 2)


async def test_unmatched_allow_admits_what_no_quota_can_count(tmp_path: Path) -> None:
    """The operator has said so."""
    async with stage(policy(more="unmatched: allow\n"), folder=tmp_path) as on:
        assert [(await on.post(*each)).status for each in (SPEECH, IMAGE)] == [200, 200]
        assert await usage(on) == (0, 0)


async def test_the_upstream_s_name_of_the_model_decides(tmp_path: Path) -> None:
    """Not the alias. If one of several upstreams reports no tokens, the call needs a quota of requests."""
    async with stage(policy(), folder=tmp_path) as on:
        statuses = {name: (await image(on, name)).status for name in ("pictures", "gpt-image-1", "unknown", "both")}
        assert statuses == {"pictures": 200, "gpt-image-1": 404, "unknown": 404, "both": 404}
        assert await usage(on) == (3 + 272, 0)


async def test_the_format_of_the_answer_decides_too(tmp_path: Path) -> None:
    """Speech reports tokens only as events, and a transcript only as JSON."""
    async with stage(policy(), folder=tmp_path) as on:
        speech = {**SPEECH[1], "model": "voice"}
        assert (await on.post(SPEECH[0], speech)).status == 404
        assert (await on.post(SPEECH[0], {**SPEECH[1], "stream_format": "sse"})).status == 404
        assert (await on.post(SPEECH[0], {**speech, "stream_format": "sse"})).status == 200
        spoken = await usage(on)
        assert spoken[0] > 0
        for response_format, status in (("json", 200), ("text", 404), ("srt", 404), ("vtt", 404)):
            reply = await form(on, "/v1/audio/transcriptions", model="scribe", response_format=response_format)
            assert reply.status == status
        assert (await form(on, "/v1/audio/transcriptions", model="whisper-1")).status == 404
        assert (await form(on, "/v1/audio/translations", model="whisper-1")).status == 404
        assert (await form(on, "/v1/images/variations")).status == 404
        assert (await usage(on))[0] > spoken[0]


async def test_a_model_that_should_report_tokens_and_does_not_is_charged_its_hold(tmp_path: Path) -> None:
    """A quota of tokens must count it. The answer is 200, because the image was made."""
    async with stage(policy(), folder=tmp_path) as on:
        assert (await image(on, "silent", n=2)).status == 200
        tokens, _ = await usage(on)
        assert 2 * 8192 <= tokens < 2 * 8192 + 100


@pytest.mark.parametrize("stream", [False, True])
async def test_a_usage_of_zeros_makes_no_image_free(stream: bool, tmp_path: Path) -> None:
    """Gateways such as LiteLLM write it if the vendor states none: a price, a reservation, or one request."""
    usage_ = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    document = {"type": "image_generation.completed", "b64_json": "AAAA", "usage": usage_}

    async def serve(metadata: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = json.dumps(document).encode()
        writer.write(stream_head("Connection: close") + b"data: " + body + b"\n\n" if stream else answer_of(body))
        await writer.drain()

    async with (
        bare_upstream(serve) as upstream,
        stage(policy("tokens: 50k, requests: 9"), folder=tmp_path, upstream=upstream.url, kind="openai") as on,
    ):
        used = []
        for model in ("poster", "gpt-image-1", "unknown", "pictures"):
            assert (await image(on, model, stream=stream, metadata={})).status == 200
            used.append(await usage(on))
        assert used[:3] == [(1200, 1), (1200, 2), (1200, 3)]
        assert (8192 < used[3][0] - 1200 < 8192 + 100, used[3][1]) == (True, 4)


# ------------------------------------------------------------------------------------------------------------- prices


async def test_a_price_is_held_and_charged_as_output(tmp_path: Path) -> None:
    """Whole and streamed, for each image. A quota of tokens then counts it, and refuses what does not fit."""
    async with stage(policy("tokens: 5k, output_tokens: 5k"), folder=tmp_path) as on:
        assert (await image(on, "poster", n=2)).status == 200
        assert await usage(on) == (2200, 0)
        assert (await image(on, "poster", stream=True)).status == 200
        assert await usage(on) == (3400, 0)
        refused = await image(on, "poster", n=2)
        assert (refused.status, "may need 2200" in refused.error["message"]) == (429, True)
        assert (await form(on, "/v1/images/variations", model="poster")).status == 200
        assert await usage(on) == (4600, 0)
        calls = [(call["input_tokens"], call["output_tokens"], call["hold_input"]) for call in await on.rows("calls")]
        assert sorted(calls) == [(0, 1200, 0), (0, 1200, 0), (0, 2200, 0)]


async def test_tokens_that_an_unknown_model_states_never_exceed_what_it_reserved(tmp_path: Path) -> None:
    """If they come they are charged, and else the price. Reserved is what covers both."""
    async with stage(policy("tokens: 9k"), folder=tmp_path) as on:
        assert (await image(on, "priced")).status == 200
        assert await usage(on) == (3 + 272, 0)
        assert (await image(on, "priced", n=2)).status == 400
        assert (await image(on, "silent-priced")).status == 200
        assert await usage(on) == (3 + 272 + 200, 0)


async def test_a_price_covers_calls_only_of_quotas_that_count_output(tmp_path: Path) -> None:
    """A limit on input counts nothing of it. A price for images does not cover speech."""
    async with stage(policy("input_tokens: 5k"), folder=tmp_path) as on:
        assert (await image(on, "poster")).status == 404
    async with stage(policy(), folder=tmp_path) as on:
        assert (await on.post(SPEECH[0], {**SPEECH[1], "model": "slow"})).status == 404


@pytest.mark.parametrize(
    ("model", "stream", "status", "charge"),
    [("cut", True, 200, 1000), ("cut", False, 502, 1000), ("failing", False, 500, 0), ("rejected", False, 400, 0)],
)
async def test_an_answer_that_fails_costs_its_price_if_it_may_have_run(
    model: str, stream: bool, status: int, charge: int, tmp_path: Path
) -> None:
    """One that broke off was made; one that the upstream refused or failed was not."""
    async with stage(policy("tokens: 50k, requests: 9"), folder=tmp_path) as on:
        assert (await image(on, model, stream=stream)).status == status
        assert await usage(on) == (charge, 0 if model == "failing" else 1)


async def test_a_client_that_leaves_pays_the_price(tmp_path: Path) -> None:
    """The upstream bills the image in any case."""
    async with stage(policy(), folder=tmp_path) as on:
        call = on.begin(IMAGE[0], {**IMAGE[1], "model": "slow"})
        await on.simulator.until(lambda: on.simulator.received == 1)
        await on.hang_up(call)
        assert await usage(on) == (1000, 0)


# ------------------------------------------------------------------------------------------ calls that cost no tokens

CHAT = {"model": "chat", "messages": [{"role": "user", "content": "Hello"}]}
USED_UP = "tokens: 100, input_tokens: 100, output_tokens: 1"


@pytest.mark.parametrize("limits", [USED_UP, f"{USED_UP}, requests: 1"])
async def test_what_costs_nothing_is_never_refused_and_charged_nothing(limits: str, tmp_path: Path) -> None:
    """Also if the upstream rejects or fails it. It opens no window and shows what is left."""
    async with stage(policy(limits), folder=tmp_path) as on:
        count = {"model": "chat", "messages": CHAT["messages"]}
        inputs = {"model": "chat", "input": "three small words"}
        for directive, status in ((None, 200), ("status=400", 400), ("status=500", 500), ("status=429", 429)):
            metadata = {"metadata": {"simulate": directive}} if directive else {}
            for path, body in (("/v1/messages/count_tokens", count), ("/v1/responses/input_tokens", inputs)):
                assert (await on.post(path, {**body, **metadata})).status == status
        await on.all_settled()
        assert await on.rows("counters") == []
        assert (await on.post("/v1/chat/completions", {**CHAT, "max_tokens": 1})).status == 200
        assert (await on.post("/v1/chat/completions", CHAT)).status in (400, 429)
        before = await on.quota("staff/daily")
        for path, body in (("/v1/messages/count_tokens", count), ("/v1/responses/input_tokens", inputs)):
            for _ in range(3):
                assert (await on.post(path, body)).status == 200
        await on.all_settled()
        assert await on.quota("staff/daily") == before


async def test_moderations_are_refused_for_requests_and_not_for_tokens(tmp_path: Path) -> None:
    """They cost a request."""
    async with stage(policy("tokens: 0, requests: 2"), folder=tmp_path) as on:
        statuses = [(await on.post("/v1/moderations", {"input": "x"})).status for _ in range(3)]
        assert (statuses, await usage(on)) == ([200, 200, 429], (0, 2))
    async with stage(policy("tokens: 0"), folder=tmp_path) as on:
        assert (await on.post("/v1/moderations", {"input": "x"})).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_maximum_of_0_is_bound_by_limits_on_output_and_charged_to_them(stream: bool, tmp_path: Path) -> None:
    """T111: an upstream may generate all the same, as llama.cpp does."""
    answer = {
        "choices": [{"index": 0, "message": {"content": "x"}, "delta": {"content": "x"}}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25},
    }

    async def serve(metadata: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = json.dumps(answer).encode()
        events = stream_head("Connection: close") + b"data: " + body + b"\n\ndata: [DONE]\n\n"
        writer.write(events if stream else answer_of(body))
        await writer.drain()

    async with (
        bare_upstream(serve) as upstream,
        stage(policy("output_tokens: 20"), folder=tmp_path, upstream=upstream.url, kind="openai") as on,
    ):
        body = {**CHAT, "max_tokens": 0, "stream": stream, "metadata": {}}
        assert [(await on.post("/v1/chat/completions", body)).status for _ in range(2)] == [200, 429]
        assert (await on.quota("staff/daily"))["output_tokens"]["used"] == 20
        embedding = await on.post("/v1/embeddings", {"model": "chat", "input": "x", "metadata": {}})
        assert embedding.status == 200 or stream
        assert (await on.quota("staff/daily"))["output_tokens"]["used"] == 20
