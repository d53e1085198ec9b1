"""Every method of OpenAI's SDK either works through the proxy and is charged, or is refused with a reason.

docs/wire.md §1.1, §1.6 and §1.7 list the endpoints; docs/threats.md T 17 and T 20 say what must be refused.
"""

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar

import aiohttp
import openai
import pytest

from proxy.simulator.media import AUDIO, IMAGE, TRANSCRIPT
from proxy.upstreams.spool import Spool
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
    """Alice's used tokens and requests, and the number of calls at the upstream, once all calls are settled.

    Nothing may be held then.
    """
    await on.all_settled()
    quota = await on.quota("staff/daily")
    assert (quota["tokens"]["held"], quota["requests"]["held"]) == (0, 0)
    return quota["input_tokens"] or quota["tokens"]["used"], quota["requests"]["used"], on.simulator.received


def last_document(on: Stage) -> dict:
    """The JSON body of the last request that the upstream received."""
    return json.loads(on.simulator.requests[-1].body)


async def test_every_path_is_metered_answered_or_refused(tmp_path: Path) -> None:
    """Every path of the installed SDK, with and without `/v1`. A refused request does not reach the upstream."""
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
                    assert "is not available on this proxy: " in error["message"]
        assert {call.path for call in on.simulator.requests} <= {"/v1" + endpoint.path for endpoint in METERED}


async def test_moderations_are_counted_and_cost_no_tokens(tmp_path: Path) -> None:
    """A request without a model is charged to OpenAI's default model."""
    async with stage(POLICY, folder=tmp_path) as on:
        verdict = await on.sdk().moderations.create(input=["one", "two"])
        assert len(verdict.results) == 2
        assert last_document(on)["model"] == "omni-moderation-latest"
        assert await used(on) == (0, 1, 1)


async def test_a_count_of_tokens_costs_nothing(tmp_path: Path) -> None:
    """Neither tokens nor a request."""
    async with stage(POLICY, folder=tmp_path) as on:
        counted = await on.sdk().responses.input_tokens.count(model="fast", input="three small words")
        assert counted.input_tokens == 3
        assert last_document(on)["model"] == "gpt-4o-mini"
        assert await used(on) == (0, 0, 1)


async def test_a_compaction_is_charged_like_a_response(tmp_path: Path) -> None:
    """Because the model runs for it."""
    async with stage(POLICY, folder=tmp_path) as on:
        compacted = await on.sdk().responses.compact(model="fast", input="three small words")
        assert compacted.usage.total_tokens == 15
        assert await used(on) == (15, 1, 1)


async def test_images_are_charged_the_reported_usage(tmp_path: Path) -> None:
    """Streamed or not. In a stream of two images each one reports its share of the tokens."""
    async with stage(POLICY, folder=tmp_path) as on:
        images = on.sdk().images
        whole = await images.generate(model="painter", prompt="a red fox", n=2)
        assert [image.b64_json for image in whole.data or []] == [IMAGE, IMAGE]
        assert await used(on) == (3 + 544, 1, 1)
        stream = await images.generate(model="painter", prompt="a red fox", stream=True, partial_images=2, n=2)
        kinds = [event.type async for event in stream]
        assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"] * 2
        assert await used(on) == (2 * (3 + 544), 2, 2)


async def test_images_without_tokens_count_as_requests(tmp_path: Path) -> None:
    """dall-e-2 is billed per image. It is the model of a request that names none."""
    async with stage(POLICY, folder=tmp_path) as on:
        await on.sdk().images.generate(prompt="a red fox")
        assert last_document(on)["model"] == "dall-e-2"
        assert await used(on) == (0, 1, 1)


async def test_a_stream_of_images_that_breaks_off_is_charged_its_hold(tmp_path: Path) -> None:
    """The upstream bills the images that it generated, and the proxy can't see how many tokens that was."""
    async with stage(POLICY, folder=tmp_path) as on:
        directives = {"metadata": {"simulate": "cut=1"}}
        with pytest.raises(openai.APIError):
            stream = await on.sdk().images.generate(
                model="painter", prompt="fox", stream=True, partial_images=2, extra_body=directives
            )
            async for _ in stream:
                pass
        tokens, requests, _ = await used(on)
        assert 8192 <= tokens < 8300
        assert requests == 1


async def test_an_error_in_a_stream_of_images_costs_only_the_input(tmp_path: Path) -> None:
    """The upstream reports in the stream that it generated no image: only the prompt is charged."""
    async with stage(POLICY, folder=tmp_path) as on:
        directives = {"metadata": {"simulate": "error=1"}}
        stream = await on.sdk().images.generate(
            model="painter", prompt="fox", stream=True, partial_images=2, extra_body=directives
        )
        with pytest.raises(openai.APIError, match="had an error"):
            async for _ in stream:
                pass
        tokens, requests, _ = await used(on)
        assert 0 < tokens < 100
        assert requests == 1


async def test_speech_passes_unchanged_and_counts_as_a_request(tmp_path: Path) -> None:
    """Audio bytes report no tokens."""
    async with stage(POLICY, folder=tmp_path) as on:
        speech = await on.sdk().audio.speech.create(model="voice", input="hello there", voice="alloy")
        assert speech.content == AUDIO
        assert speech.response.headers["content-type"] == "audio/mpeg"
        assert await used(on) == (0, 1, 1)


async def test_speech_as_events_is_charged_the_reported_usage(tmp_path: Path) -> None:
    """The last event of such a stream has the usage."""
    async with stage(POLICY, folder=tmp_path) as on:
        speech = await on.sdk().audio.speech.create(
            model="voice", input="hello there", voice="alloy", stream_format="sse"
        )
        assert speech.content.count(b"speech.audio.delta") == 4
        assert await used(on) == (2 + 40, 1, 1)


FILE = ("talk.mp3", b"--\r\n\x00--" * 200_000, "audio/mpeg")  # 1.4 MB, more than the proxy keeps in memory


async def test_a_transcription_is_charged_the_reported_usage(tmp_path: Path) -> None:
    """In tokens, streamed or not."""
    async with stage(POLICY, folder=tmp_path) as on:
        transcription = await on.sdk().audio.transcriptions.create(model="scribe", file=FILE)
        assert transcription.text == TRANSCRIPT
        assert await used(on) == (1750 + 8, 1, 1)
        stream = await on.sdk().audio.transcriptions.create(model="scribe", file=FILE, stream=True)
        assert [event.type async for event in stream][-1] == "transcript.text.done"
        assert await used(on) == (2 * (1750 + 8), 2, 2)


async def test_a_transcription_without_tokens_counts_as_a_request(tmp_path: Path) -> None:
    """whisper-1 is billed by the second, and a plain-text answer has no usage."""
    async with stage(POLICY, folder=tmp_path) as on:
        audio = on.sdk().audio
        assert (await audio.transcriptions.create(model="whisper-1", file=FILE)).text == TRANSCRIPT
        text = await audio.transcriptions.create(model="scribe", file=FILE, response_format="text")
        assert text == TRANSCRIPT + "\n"
        with pytest.deprecated_call():
            assert (await audio.translations.create(model="whisper-1", file=FILE)).text == TRANSCRIPT
        assert await used(on) == (0, 3, 3)


async def test_edits_and_variations_of_images_are_charged(tmp_path: Path) -> None:
    """Multipart requests with several files. An edit reports its tokens; a variation is billed per image."""
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
async def test_only_the_model_of_a_multipart_body_is_changed(order: int, tmp_path: Path) -> None:
    """The part `model` may be before or after the file. The boundary and all other bytes are the client's."""
    parts = [b'Content-Disposition: form-data; name="language"\r\n\r\nde']
    parts.append(b'Content-Disposition: form-data; name="file"; filename="a.mp3"\r\n\r\n' + bytes(range(256)) * 5000)
    parts.insert(order, b'Content-Disposition: form-data; name="model"\r\n\r\nscribe')
    body = b"".join(b"--xYz\r\n" + part + b"\r\n" for part in parts) + b"--xYz--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=xYz", "expect": "100-continue"}
    async with stage(POLICY, folder=tmp_path) as on:
        reply = await on.post("/v1/audio/transcriptions", io.BytesIO(body), headers=headers)
        assert reply.json()["text"] == TRANSCRIPT
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
async def test_an_invalid_multipart_body_costs_nothing(
    content_type: str, body: bytes, status: int, tmp_path: Path
) -> None:
    """It is the client's mistake: a 4xx, and nothing is charged or sent to the upstream."""
    async with stage(POLICY, folder=tmp_path) as on:
        headers = {"content-type": content_type}
        assert (await on.post("/v1/audio/transcriptions", body, headers=headers)).status == status
        assert await used(on) == (0, 0, 0)


class _KeptSpool(Spool):
    """A spool that stays referenced, so that only `close` closes its file and not the garbage collection."""

    made: ClassVar[list[Spool]] = []

    def __init__(self) -> None:
        super().__init__()
        self.made.append(self)


@pytest.mark.parametrize(
    ("model", "simulate", "status"),
    [("scribe", None, 200), ("no-such-model", None, 404), ("scribe", "status=400", 400), ("scribe", "cut=0", 502)],
)
async def test_the_file_of_a_multipart_body_is_closed(
    model: str, simulate: str | None, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I8: whether the call is answered, refused before it is prepared, or fails at the upstream."""
    monkeypatch.setattr(_KeptSpool, "made", [])
    monkeypatch.setattr("proxy.web.routes.Spool", _KeptSpool)
    async with stage(POLICY, folder=tmp_path) as on:
        directives = {"metadata": {"simulate": simulate}} if simulate else {}
        try:
            await on.sdk().audio.transcriptions.create(model=model, file=FILE, extra_body=directives)
            seen = 200
        except openai.APIStatusError as error:
            seen = error.status_code
        await on.all_settled()
    assert seen == status
    [spool] = _KeptSpool.made
    assert spool._file.closed


async def test_a_multipart_body_that_is_too_large_or_compressed_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Too large: with a Content-Length that says so, and without one."""
    monkeypatch.setattr("proxy.web.body.FORM_BYTES_MAX", 5000)
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + b"x" * 5000
    async with stage(POLICY, folder=tmp_path) as on:
        path, headers = "/v1/audio/transcriptions", {"content-type": "multipart/form-data; boundary=b"}
        assert (await on.post(path, body, headers=headers)).status == 413

        async def without_length() -> AsyncIterator[bytes]:
            yield body

        chunked = {**headers, "authorization": f"Bearer {key_of('alice')}"}
        async with on.http.post(on.url + path, data=without_length(), headers=chunked) as response:
            assert response.status == 413
        compressed = {**headers, "content-encoding": "gzip"}
        assert (await on.post(path, gzip.compress(b"x"), headers=compressed)).status == 415
        assert await used(on) == (0, 0, 0)


async def test_a_multipart_call_whose_client_disconnects_is_completed_and_charged(tmp_path: Path) -> None:
    """The spooled body is kept until the call ends, because the upstream bills the answer even if no client waits."""
    async with stage(POLICY, folder=tmp_path) as on:
        transcriptions, directives = on.sdk().audio.transcriptions, {"metadata": {"simulate": "delay=0.05"}}
        call = asyncio.ensure_future(transcriptions.create(model="scribe", file=FILE, extra_body=directives))
        await on.simulator.until(lambda: on.simulator.received == 1)
        call.cancel()
        await asyncio.wait([call])
        assert await used(on) == (1750 + 8, 1, 1)


async def test_a_transcription_whose_upstream_breaks_off_is_charged_its_hold(tmp_path: Path) -> None:
    """The upstream bills the audio that it transcribed, although the answer is lost."""
    async with stage(POLICY, folder=tmp_path) as on:
        directives = {"metadata": {"simulate": "cut=0"}}
        with pytest.raises(openai.APIError):
            await on.sdk().audio.transcriptions.create(model="scribe", file=FILE, extra_body=directives)
        tokens, requests, _ = await used(on)
        assert 4096 + 14_000 <= tokens < 4096 + 14_600
        assert requests == 1


async def test_images_that_do_not_fit_are_refused_before_they_are_generated(tmp_path: Path) -> None:
    """An image can't be shortened, so its maximum must be free."""
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
async def test_a_field_that_evades_the_quota_is_a_400(path: str, body: dict, param: str, tmp_path: Path) -> None:
    """A second model, data stored in the shared account, and tools that run at the upstream."""
    async with stage(POLICY, folder=tmp_path) as on:
        reply = await on.post("/v1" + path, body)
        assert (reply.status, reply.error["param"]) == (400, param)
        assert await used(on) == (0, 0, 0)


@pytest.mark.parametrize("path", ["/v1/responses", "/responses", "/v1/realtime?model=gpt-realtime", "/v1/live", "/"])
async def test_a_websocket_is_refused_at_once(path: str, tmp_path: Path) -> None:
    """With a 426, so a client that tries a WebSocket first, such as Codex, continues over HTTP."""
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
