"""Whoever changes their base URL finds every method of the SDK either working and counted, or refused with a reason.

wire §1.1, §1.6, §1.7; threats T17, T20.
"""

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import openai
import pytest

from proxy.simulator.media import HEARD, PICTURE, SOUND
from tests.formats.test_endpoints import METERED, published
from tests.stage import STAFF, Stage, key_of, stage

pytestmark = pytest.mark.journey

MODELS = """
models:
  fast: {upstream: simulated, model: gpt-4o-mini}
  omni-moderation-latest: {upstream: simulated}
  painter: {upstream: simulated, model: gpt-image-2}
  dall-e-2: {upstream: simulated}
  voice: {upstream: simulated, model: gpt-4o-mini-tts}
  scribe: {upstream: simulated, model: gpt-4o-transcribe}
  whisper-1: {upstream: simulated}
"""
POLICY = MODELS + STAFF[STAFF.index("groups:") :]


async def used(on: Stage) -> tuple[int, int, int]:
    """Tokens and requests of alice, once all is settled, and what is still held, which is nothing."""
    await on.all_settled()
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
                    assert response.status in (400, 404, 415), path
                    assert error.get("code") != "endpoint_not_allowed", path
                elif pattern.startswith("/responses/{}"):
                    assert (response.status, error["message"]) == (404, "Response with id 'x-1' not found."), path
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


FILE = ("talk.mp3", b"--\r\n\x00--" * 200_000, "audio/mpeg")  # 1.4 MB, more than is kept in memory


async def test_what_was_said_is_charged_what_the_answer_says(tmp_path: Path) -> None:
    """In tokens; whole and streamed."""
    async with stage(POLICY, folder=tmp_path) as on:
        heard = await on.sdk().audio.transcriptions.create(model="scribe", file=FILE)
        assert heard.text == HEARD
        assert await used(on) == (1750 + 8, 1, 1)
        stream = await on.sdk().audio.transcriptions.create(model="scribe", file=FILE, stream=True)
        assert [event.type async for event in stream][-1] == "transcript.text.done"
        assert await used(on) == (2 * (1750 + 8), 2, 2)


async def test_what_is_billed_by_the_second_counts_as_a_request(tmp_path: Path) -> None:
    """And so does what is no JSON, and says nothing."""
    async with stage(POLICY, folder=tmp_path) as on:
        audio = on.sdk().audio
        assert (await audio.transcriptions.create(model="whisper-1", file=FILE)).text == HEARD
        assert await audio.transcriptions.create(model="scribe", file=FILE, response_format="text") == HEARD + "\n"
        with pytest.deprecated_call():
            assert (await audio.translations.create(model="whisper-1", file=FILE)).text == HEARD
        assert await used(on) == (0, 3, 3)


async def test_pictures_are_edited_and_varied(tmp_path: Path) -> None:
    """Forms with several files; an edit says its tokens, a variation is billed by the piece."""
    async with stage(POLICY, folder=tmp_path) as on:
        images, file = on.sdk().images, ("a.png", b"\x89PNG", "image/png")
        await images.edit(model="painter", image=[file, file], mask=file, prompt="a red fox", n=2)
        assert await used(on) == (3 + 544, 1, 1)
        stream = await images.edit(model="painter", image=file, prompt="a red fox", stream=True)
        assert [event.type async for event in stream] == ["image_edit.completed"]
        assert await used(on) == (2 * 3 + 3 * 272, 2, 2)
        with pytest.deprecated_call():
            await images.create_variation(image=file, n=2)
        assert await used(on) == (2 * 3 + 3 * 272, 3, 3)
        assert b'name="model"\r\n\r\ndall-e-2\r\n' in on.simulator.requests[-1].body


@pytest.mark.parametrize("order", [0, 1, 2])
async def test_a_form_is_sent_on_as_it_came_but_for_the_model(order: int, tmp_path: Path) -> None:
    """Wherever the part with its name stands, before the file or behind it; boundary and bytes are the client's."""
    parts = [b'Content-Disposition: form-data; name="language"\r\n\r\nde']
    parts.append(b'Content-Disposition: form-data; name="file"; filename="a.mp3"\r\n\r\n' + bytes(range(256)) * 5000)
    parts.insert(order, b'Content-Disposition: form-data; name="model"\r\n\r\nscribe')
    body = b"".join(b"--xYz\r\n" + part + b"\r\n" for part in parts) + b"--xYz--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=xYz", "expect": "100-continue"}
    async with stage(POLICY, folder=tmp_path) as on:
        reply = await on.post("/v1/audio/transcriptions", io.BytesIO(body), headers=headers)
        assert reply.json()["text"] == HEARD
        received = on.simulator.requests[-1]
        assert received.body == body.replace(b"scribe", b"gpt-4o-transcribe")
        assert received.headers["content-type"] == headers["content-type"]
        assert received.headers["content-length"] == str(len(received.body))
        assert "transfer-encoding" not in received.headers


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("multipart/form-data; boundary=b", b"--b\r\n", 400),
        ("multipart/form-data; boundary=b", b"--b--", 400),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nno\r\n--b--',
            404,
        ),
        ("multipart/form-data", b"--b--", 415),
        ("application/json", b'{"model": "scribe"}', 415),
        ("multipart/mixed; boundary=b", b"--b--", 415),
    ],
)
async def test_a_form_that_is_none_costs_nothing(content_type: str, body: bytes, status: int, tmp_path: Path) -> None:
    """It is the client's mistake, and nothing of it is left on the disk."""
    async with stage(POLICY, folder=tmp_path) as on:
        headers = {"content-type": content_type}
        assert (await on.post("/v1/audio/transcriptions", body, headers=headers)).status == status
        assert await used(on) == (0, 0, 0)


async def test_a_form_that_is_too_large_or_packed_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Announced or not."""
    monkeypatch.setattr("proxy.web.body.FORM_BYTES_MAX", 5000)
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + b"x" * 5000
    async with stage(POLICY, folder=tmp_path) as on:
        path, headers = "/v1/audio/transcriptions", {"content-type": "multipart/form-data; boundary=b"}
        assert (await on.post(path, body, headers=headers)).status == 413

        async def unannounced() -> AsyncIterator[bytes]:
            yield body

        chunked = {**headers, "authorization": f"Bearer {key_of('alice')}"}
        async with on.http.post(on.url + path, data=unannounced(), headers=chunked) as response:
            assert response.status == 413
        packed = {**headers, "content-encoding": "gzip"}
        assert (await on.post(path, gzip.compress(b"x"), headers=packed)).status == 415
        assert await used(on) == (0, 0, 0)


async def test_a_form_whose_client_leaves_is_read_on_and_charged(tmp_path: Path) -> None:
    """Its body stays on the disk for as long as the call needs it, and its answer is billed whoever waits for it."""
    async with stage(POLICY, folder=tmp_path) as on:
        transcriptions, wish = on.sdk().audio.transcriptions, {"metadata": {"simulate": "delay=0.05"}}
        call = asyncio.ensure_future(transcriptions.create(model="scribe", file=FILE, extra_body=wish))
        await on.simulator.until(lambda: on.simulator.received == 1)
        call.cancel()
        await asyncio.wait([call])
        assert await used(on) == (1750 + 8, 1, 1)


async def test_a_form_whose_upstream_breaks_off_is_charged_its_hold(tmp_path: Path) -> None:
    """What it heard is billed, whether or not anybody reads it."""
    async with stage(POLICY, folder=tmp_path) as on:
        wish = {"metadata": {"simulate": "cut=0"}}
        with pytest.raises(openai.APIError):
            await on.sdk().audio.transcriptions.create(model="scribe", file=FILE, extra_body=wish)
        tokens, requests, _ = await used(on)
        assert 4096 + 14_000 <= tokens < 4096 + 14_600
        assert requests == 1


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
        ("/responses/compact", {"model": "fast", "previous_response_id": ["resp_1"]}, "previous_response_id"),
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
