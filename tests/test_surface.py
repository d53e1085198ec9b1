"""Whoever changes their base URL finds every method of the SDK either working and counted, or refused with a reason.

wire §1.1, §1.6, §1.7; threats T17, T20.
"""

import json
from pathlib import Path

import aiohttp
import openai
import pytest

from proxy.simulated_media import PICTURE, SOUND
from tests.stage import STAFF, Stage, key_of, stage
from tests.test_endpoints import METERED, published

MODELS = """
models:
  fast: {upstream: simulated, model: gpt-4o-mini}
  omni-moderation-latest: {upstream: simulated}
  painter: {upstream: simulated, model: gpt-image-2}
  dall-e-2: {upstream: simulated}
  voice: {upstream: simulated, model: gpt-4o-mini-tts}
"""
POLICY = MODELS + STAFF[STAFF.index("groups:") :]


async def used(on: Stage) -> tuple[int, int, int]:
    """Tokens and requests of alice, once all is settled, and what is still held, which is nothing."""
    await on.at_rest()
    quota = await on.quota("staff/daily")
    assert (quota["tokens"]["held"], quota["requests"]["held"]) == (0, 0)
    return quota["input_tokens"] or quota["tokens"]["used"], quota["requests"]["used"], on.simulator.received


def sent(on: Stage) -> dict:
    """The document that the upstream got last."""
    return json.loads(on.simulator.requests[-1].body)


async def test_every_path_is_metered_answered_or_refused(tmp_path: Path) -> None:
    """All that the installed SDK can send, with and without `/v1`; nothing that is refused reaches the upstream."""
    metered = {("POST", endpoint.path) for endpoint in METERED}
    async with stage(POLICY, folder=tmp_path) as on:
        for method, pattern in published():
            path = pattern.replace("{}", "x-1")
            for prefix in ("/v1", ""):
                headers = {"authorization": f"Bearer {key_of('alice')}"}
                async with on.http.request(method, on.url + prefix + path, headers=headers, data=b"{}") as response:
                    error = (await response.json()).get("error", {})
                if (method, pattern) in metered:
                    assert response.status in (200, 400, 404), path
                    assert error.get("code") != "endpoint_not_allowed", path
                elif pattern in ("/models", "/models/{}") and method == "GET":
                    assert response.status == (200 if pattern == "/models" else 404), path
                else:
                    assert (response.status, error["code"]) == (404, "endpoint_not_allowed"), path
                    assert "is not open on this proxy: " in error["message"]
        assert {call.path for call in on.simulator.requests} <= {"/v1" + endpoint.path for endpoint in METERED}


async def test_moderations_are_counted_and_cost_no_tokens(tmp_path: Path) -> None:
    """Under their default model where none is named."""
    async with stage(POLICY, folder=tmp_path) as on:
        verdict = await on.sdk().moderations.create(input=["one", "two"])
        assert len(verdict.results) == 2
        assert sent(on)["model"] == "omni-moderation-latest"
        assert await used(on) == (0, 1, 1)


async def test_a_count_of_tokens_costs_nothing(tmp_path: Path) -> None:
    """It is no charge but a number."""
    async with stage(POLICY, folder=tmp_path) as on:
        counted = await on.sdk().responses.input_tokens.count(model="fast", input="three small words")
        assert counted.input_tokens == 3
        assert sent(on)["model"] == "gpt-4o-mini"
        assert await used(on) == (0, 0, 1)


async def test_a_compaction_is_charged_like_a_response(tmp_path: Path) -> None:
    """It is a pass of the model."""
    async with stage(POLICY, folder=tmp_path) as on:
        compacted = await on.sdk().responses.compact(model="fast", input="three small words")
        assert compacted.usage.total_tokens == 15
        assert await used(on) == (15, 1, 1)


async def test_pictures_are_charged_what_they_say(tmp_path: Path) -> None:
    """Whole and streamed, each of several with its own share."""
    async with stage(POLICY, folder=tmp_path) as on:
        images = on.sdk().images
        whole = await images.generate(model="painter", prompt="a red fox", n=2)
        assert [picture.b64_json for picture in whole.data or []] == [PICTURE, PICTURE]
        assert await used(on) == (3 + 544, 1, 1)
        stream = await images.generate(model="painter", prompt="a red fox", stream=True, partial_images=2, n=2)
        kinds = [event.type async for event in stream]
        assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"] * 2
        assert await used(on) == (2 * (3 + 544), 2, 2)


async def test_pictures_that_say_no_tokens_count_as_requests(tmp_path: Path) -> None:
    """Their model is billed by the piece; it is the one that is meant where none is named."""
    async with stage(POLICY, folder=tmp_path) as on:
        await on.sdk().images.generate(prompt="a red fox")
        assert sent(on)["model"] == "dall-e-2"
        assert await used(on) == (0, 1, 1)


async def test_a_stream_of_pictures_that_breaks_off_is_charged_its_hold(tmp_path: Path) -> None:
    """Its upstream bills what it painted, and nobody can see how much that was."""
    async with stage(POLICY, folder=tmp_path) as on:
        wish = {"metadata": {"simulate": "cut=1"}}
        with pytest.raises(openai.APIError):
            stream = await on.sdk().images.generate(
                model="painter", prompt="fox", stream=True, partial_images=2, extra_body=wish
            )
            async for _ in stream:
                pass
        tokens, requests, _ = await used(on)
        assert 8192 <= tokens < 8300
        assert requests == 1


async def test_pictures_that_fail_cost_what_was_asked(tmp_path: Path) -> None:
    """The upstream says in its stream that there is none: what it read is charged, and nothing else."""
    async with stage(POLICY, folder=tmp_path) as on:
        wish = {"metadata": {"simulate": "error=1"}}
        stream = await on.sdk().images.generate(
            model="painter", prompt="fox", stream=True, partial_images=2, extra_body=wish
        )
        with pytest.raises(openai.APIError, match="had an error"):
            async for _ in stream:
                pass
        tokens, requests, _ = await used(on)
        assert 0 < tokens < 100
        assert requests == 1


async def test_sound_passes_unchanged_and_counts_as_a_request(tmp_path: Path) -> None:
    """Its bytes say no tokens."""
    async with stage(POLICY, folder=tmp_path) as on:
        sound = await on.sdk().audio.speech.create(model="voice", input="hello there", voice="alloy")
        assert sound.content == SOUND
        assert sound.response.headers["content-type"] == "audio/mpeg"
        assert await used(on) == (0, 1, 1)


async def test_sound_in_events_is_charged_what_it_says(tmp_path: Path) -> None:
    """The last event of such a stream has the usage."""
    async with stage(POLICY, folder=tmp_path) as on:
        sound = await on.sdk().audio.speech.create(
            model="voice", input="hello there", voice="alloy", stream_format="sse"
        )
        assert sound.content.count(b"speech.audio.delta") == 4
        assert await used(on) == (2 + 40, 1, 1)


async def test_what_does_not_fit_is_refused_before_it_is_painted(tmp_path: Path) -> None:
    """A picture can't be made shorter: what it may cost has to be there."""
    async with stage(POLICY.replace("tokens: 1M", "tokens: 9000"), folder=tmp_path) as on:
        with pytest.raises(openai.BadRequestError, match=r"."):
            await on.sdk().images.generate(model="painter", prompt="a red fox", n=2)
        await on.sdk().images.generate(model="painter", prompt="a red fox")
        assert await used(on) == (3 + 272, 1, 1)
        with pytest.raises(openai.RateLimitError):
            for _ in range(10):
                await on.sdk().images.generate(model="painter", prompt="a red fox")
        assert (await used(on))[0] <= 9000
        await on.sdk().moderations.create(input="still free")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/images/generations", {"model": "painter", "prompt": "x", "svg": {"model": "gpt-6-astra"}}, "svg"),
        ("/audio/speech", {"model": "voice", "input": "x", "voice": {"id": "voice_1"}}, "voice"),
        ("/responses/compact", {"model": "fast", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("/responses/input_tokens", {"model": "fast", "conversation": "conv_1"}, "conversation"),
        ("/responses/compact", {"model": "fast", "input": [{"type": "item_reference", "id": "i"}]}, "input"),
        (
            "/responses",
            {"model": "fast", "input": [{"type": "additional_tools", "tools": [{"type": "web_search"}]}]},
            "tools",
        ),
    ],
)
async def test_what_would_slip_in_by_a_field_is_a_400(path: str, body: dict, param: str, tmp_path: Path) -> None:
    """A second model, things stored in the shared account, tools that run at the upstream."""
    async with stage(POLICY, folder=tmp_path) as on:
        reply = await on.post("/v1" + path, body)
        assert (reply.status, reply.error["param"]) == (400, param)
        assert await used(on) == (0, 0, 0)


@pytest.mark.parametrize("path", ["/v1/responses", "/responses", "/v1/realtime?model=gpt-realtime", "/v1/live", "/"])
async def test_a_websocket_is_refused_at_once(path: str, tmp_path: Path) -> None:
    """With 426 and in OpenAI's shape, so that a client which tries one first (Codex) goes on over HTTP."""
    async with stage(POLICY, folder=tmp_path) as on:
        headers = {"authorization": f"Bearer {key_of('alice')}"}
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await on.http.ws_connect(on.url + path, headers=headers)
        assert caught.value.status == 426
        assert caught.value.headers is not None
        assert caught.value.headers["upgrade"] == "HTTP/1.1"
        assert caught.value.headers["connection"] == "close"
        body = {"model": "fast", "input": "Hi"}
        assert (await on.post("/v1/responses", body)).status == 200
        assert on.simulator.received == 1
