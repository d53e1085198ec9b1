"""Images, audio and moderation results have the fields of OpenAI's API description that the proxy reads."""

from typing import Any

import orjson
import pytest

from proxy.simulator.directives import NO_DIRECTIVES, ApiError, Directives
from proxy.simulator.media import AUDIO, MEDIA, TRANSCRIPT, MediaAnswer, read_multipart, write_media

IMAGES = "/v1/images/generations"
SPEECH = "/v1/audio/speech"
TRANSCRIPTION = "/v1/audio/transcriptions"


def answered(path: str, directives: Directives = NO_DIRECTIVES, **params: Any) -> MediaAnswer:
    """The answer to a request with these parameters."""
    return write_media(MEDIA[path], params, directives)


def body(answer: MediaAnswer) -> Any:
    """A whole answer as JSON."""
    assert answer.content_type == "application/json"
    return orjson.loads(b"".join(answer.pieces))


def events(answer: MediaAnswer) -> list[dict[str, Any]]:
    """The data of a stream's events."""
    assert answer.is_stream
    return [orjson.loads(piece.partition(b"data: ")[2]) for piece in answer.pieces]


def test_moderations_and_token_counts_report_no_usage() -> None:
    """A moderation has one result for each input, a token count one number for all."""
    assert [len(body(answered("/v1/moderations", input=given))["results"]) for given in ("a", ["a", "b"])] == [1, 2]
    count = answered("/v1/responses/input_tokens", input=[{"role": "user", "content": "three small words"}])
    assert (body(count)["input_tokens"], count.usage) == (3, None)


def test_a_compaction_reports_usage_as_a_response_does() -> None:
    """With the details that the SDK requires."""
    compacted = answered("/v1/responses/compact", model="m", input="three small words")
    usage = body(compacted)["usage"]
    assert compacted.usage == (usage["input_tokens"], usage["output_tokens"]) == (3, 12)
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


@pytest.mark.parametrize("number", [1, 3])
def test_images_report_the_same_usage_whole_and_streamed(number: int) -> None:
    """In a stream each image's event reports its share."""
    whole = answered(IMAGES, model="gpt-image-2", prompt="red fox", n=number)
    streamed = answered(IMAGES, model="gpt-image-2", prompt="red fox", n=number, stream=True, partial_images=2)
    assert whole.usage == streamed.usage == (2, 272 * number)
    assert body(whole)["usage"]["total_tokens"] == 2 + 272 * number
    shares = [event["usage"]["total_tokens"] for event in events(streamed) if event["type"].endswith("completed")]
    assert (len(shares), sum(shares)) == (number, 2 + 272 * number)
    assert len(events(streamed)) == 2 + number


def test_a_model_that_is_not_billed_in_tokens_reports_none() -> None:
    """Nor does an answer with the directive `no_usage`."""
    assert "usage" not in body(answered(IMAGES, model="dall-e-2", prompt="x"))
    assert answered(IMAGES, Directives(no_usage=True), model="gpt-image-2", prompt="x", stream=True).usage is None
    assert "usage" not in events(answered(SPEECH, model="tts-1", input="x", stream_format="sse"))[-1]


def test_audio_is_bytes_or_events() -> None:
    """Only the events report usage."""
    audio = answered(SPEECH, model="m", input="hello there")
    assert (audio.content_type, audio.pieces, audio.usage) == ("audio/mpeg", [AUDIO], None)
    *_, done = events(answered(SPEECH, model="m", input="hello there", stream_format="sse"))
    assert (done["type"], done["usage"]["total_tokens"]) == ("speech.audio.done", 42)


def test_a_transcription_is_json_events_or_text() -> None:
    """Billed in tokens or by the second; plain text reports no usage."""
    whole = answered(TRANSCRIPTION, model="gpt-4o-transcribe", file=1600)
    assert whole.usage == (2, 8)
    assert body(whole)["usage"]["total_tokens"] == 10
    *deltas, done = events(answered(TRANSCRIPTION, model="gpt-4o-transcribe", file=1600, stream="true"))
    assert " ".join(delta["delta"] for delta in deltas) == done["text"] == TRANSCRIPT
    assert done["usage"] == body(whole)["usage"]
    assert body(answered(TRANSCRIPTION, model="whisper-1", file=1600, stream="true"))["usage"]["type"] == "duration"
    text = answered(TRANSCRIPTION, model="gpt-4o-transcribe", file=1600, response_format="text")
    assert (text.content_type, text.pieces, text.usage) == (
        "text/plain; charset=utf-8",
        [TRANSCRIPT.encode() + b"\n"],
        None,
    )


def test_edits_and_variations_of_images() -> None:
    """The events of an edit have names of their own; variations report no usage."""
    streamed = answered("/v1/images/edits", model="gpt-image-2", prompt="red fox", image=5, stream="true", n="2")
    assert [event["type"] for event in events(streamed)] == ["image_edit.completed"] * 2
    assert len(body(answered("/v1/images/variations", image=5, n="3"))["data"]) == 3


def test_a_form_is_parsed_into_fields_and_file_sizes() -> None:
    """By the standard library, so a mistake of the proxy's own parser shows."""
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n\x00\xff\r\n'
        b'--b\r\nContent-Disposition: form-data; name="metadata[simulate]"\r\n\r\nhang\r\n--b--'
    )
    params = read_multipart(form, "multipart/form-data; boundary=b")
    assert params == {"file": 2, "metadata[simulate]": "hang", "metadata": {"simulate": "hang"}}


@pytest.mark.parametrize("path", MEDIA)
def test_a_request_without_its_input_is_refused(path: str) -> None:
    """With 400, as OpenAI does."""
    with pytest.raises(ApiError) as caught:
        answered(path)
    assert caught.value.status == 400
