"""The simulator's pictures, sounds and verdicts are those of OpenAI's API description, as far as they are read."""

from typing import Any

import orjson
import pytest

from proxy.simulator.directives import NO_DIRECTIONS, Complaint, Directions
from proxy.simulator.media import HEARD, MEDIA, SOUND, Medium, read_form, write_medium

PICTURES = "/v1/images/generations"
SPEECH = "/v1/audio/speech"
HEARING = "/v1/audio/transcriptions"


def made(path: str, directions: Directions = NO_DIRECTIONS, **asked: Any) -> Medium:
    """The answer to this request."""
    return write_medium(MEDIA[path], asked, directions)


def body(medium: Medium) -> Any:
    """A whole answer as JSON."""
    assert medium.content_type == "application/json"
    return orjson.loads(b"".join(medium.pieces))


def said(medium: Medium) -> list[dict[str, Any]]:
    """What the events of a stream say."""
    assert medium.is_stream
    return [orjson.loads(piece.partition(b"data: ")[2]) for piece in medium.pieces]


def test_verdicts_and_counts_say_no_usage() -> None:
    """One verdict for each input; one number for all."""
    assert [len(body(made("/v1/moderations", input=asked))["results"]) for asked in ("a", ["a", "b"])] == [1, 2]
    count = made("/v1/responses/input_tokens", input=[{"role": "user", "content": "three small words"}])
    assert (body(count)["input_tokens"], count.usage) == (3, None)


def test_a_compaction_says_its_usage_as_a_response_does() -> None:
    """With the details that the SDK requires."""
    compacted = made("/v1/responses/compact", model="m", input="three small words")
    usage = body(compacted)["usage"]
    assert compacted.usage == (usage["input_tokens"], usage["output_tokens"]) == (3, 12)
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


@pytest.mark.parametrize("number", [1, 3])
def test_pictures_say_the_same_whole_and_streamed(number: int) -> None:
    """Streamed, each says its share."""
    whole = made(PICTURES, model="gpt-image-2", prompt="red fox", n=number)
    streamed = made(PICTURES, model="gpt-image-2", prompt="red fox", n=number, stream=True, partial_images=2)
    assert whole.usage == streamed.usage == (2, 272 * number)
    assert body(whole)["usage"]["total_tokens"] == 2 + 272 * number
    shares = [event["usage"]["total_tokens"] for event in said(streamed) if event["type"].endswith("completed")]
    assert (len(shares), sum(shares)) == (number, 2 + 272 * number)
    assert len(said(streamed)) == 2 + number


def test_a_model_that_is_billed_by_the_piece_says_no_tokens() -> None:
    """Nor does one that was asked not to."""
    assert "usage" not in body(made(PICTURES, model="dall-e-2", prompt="x"))
    assert made(PICTURES, Directions(no_usage=True), model="gpt-image-2", prompt="x", stream=True).usage is None
    assert "usage" not in said(made(SPEECH, model="tts-1", input="x", stream_format="sse"))[-1]


def test_sound_is_bytes_or_events() -> None:
    """Only the events say what it cost."""
    sound = made(SPEECH, model="m", input="hello there")
    assert (sound.content_type, sound.pieces, sound.usage) == ("audio/mpeg", [SOUND], None)
    *_, done = said(made(SPEECH, model="m", input="hello there", stream_format="sse"))
    assert (done["type"], done["usage"]["total_tokens"]) == ("speech.audio.done", 42)


def test_what_was_heard_comes_in_three_forms() -> None:
    """Billed in tokens, or by the second; as text it says nothing."""
    whole = made(HEARING, model="gpt-4o-transcribe", file=1600)
    assert whole.usage == (2, 8)
    assert body(whole)["usage"]["total_tokens"] == 10
    *deltas, done = said(made(HEARING, model="gpt-4o-transcribe", file=1600, stream="true"))
    assert " ".join(delta["delta"] for delta in deltas) == done["text"] == HEARD
    assert done["usage"] == body(whole)["usage"]
    assert body(made(HEARING, model="whisper-1", file=1600, stream="true"))["usage"]["type"] == "duration"
    text = made(HEARING, model="gpt-4o-transcribe", file=1600, response_format="text")
    assert (text.content_type, text.pieces, text.usage) == (
        "text/plain; charset=utf-8",
        [HEARD.encode() + b"\n"],
        None,
    )


def test_pictures_are_made_from_others() -> None:
    """Edits with the events' own names; variations without usage."""
    streamed = made("/v1/images/edits", model="gpt-image-2", prompt="red fox", image=5, stream="true", n="2")
    assert [event["type"] for event in said(streamed)] == ["image_edit.completed"] * 2
    assert len(body(made("/v1/images/variations", image=5, n="3"))["data"]) == 3


def test_a_form_is_read_into_fields_and_sizes() -> None:
    """By the standard library, so that no mistake of the proxy's own reader is hidden."""
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n\x00\xff\r\n'
        b'--b\r\nContent-Disposition: form-data; name="metadata[simulate]"\r\n\r\nhang\r\n--b--'
    )
    asked = read_form(form, "multipart/form-data; boundary=b")
    assert asked == {"file": 2, "metadata[simulate]": "hang", "metadata": {"simulate": "hang"}}


@pytest.mark.parametrize("path", MEDIA)
def test_what_misses_its_input_is_refused(path: str) -> None:
    """As OpenAI does."""
    with pytest.raises(Complaint) as caught:
        made(path)
    assert caught.value.status == 400
