"""Images, speech and transcripts: what their answers are charged. They are never stopped at a limit.

Sources: docs/wire.md, section 2.3 (usage in streams).
"""

import json

import pytest

from proxy.formats.endpoints import (
    IMAGES,
    SPEECH,
    TRANSCRIPTIONS,
    Endpoint,
)
from proxy.policy.amounts import TOKENS_MAX, AtLeast, Exactly, Tokens, Unspent
from tests.formats.streams import (
    DONE,
    RESPONSE_USAGE,
    USED,
    new,
    request,
    usage_of,
    watch,
    whole,
)


def media_stream(*documents: dict) -> bytes:
    """A stream of these events."""
    return b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in documents)


@pytest.mark.parametrize("endpoint", [IMAGES, SPEECH])
def test_images_and_audio_are_charged_the_tokens_that_they_report(endpoint: Endpoint) -> None:
    """Without a report the answer counts as one request, whether it is JSON or audio. An error costs its input."""
    assert whole({"usage": RESPONSE_USAGE}, endpoint).usage() == Exactly(Tokens(11, 5))
    assert whole({"data": []}, endpoint).usage() == Unspent(requests=1)
    assert whole({"usage": {"type": "duration", "seconds": 7}}, endpoint).usage() == Unspent(requests=1)
    sound = whole(b"ID3\xff", endpoint)
    assert (sound.usage(), sound.has_error, sound.uncounted_texts) == (Unspent(requests=1), False, [])
    assert whole({"error": {"message": "no"}}, endpoint).usage() == AtLeast(Tokens(0, 0))


@pytest.mark.parametrize("endpoint", [IMAGES, TRANSCRIPTIONS])
def test_a_usage_in_a_member_of_a_vendor_is_read(endpoint: Endpoint) -> None:
    """Unless the answer states one at the usual place: both are of the same tokens."""
    beside = {"x_groq": {"id": "req_1", "usage": RESPONSE_USAGE}}
    assert whole(beside, endpoint).usage() == Exactly(Tokens(11, 5))
    assert whole({"usage": RESPONSE_USAGE, **beside}, endpoint).usage() == Exactly(Tokens(11, 5))


def test_the_separate_usage_of_an_svg_image_is_added() -> None:
    """Both usages are billed."""
    drawing = {
        "usage": RESPONSE_USAGE,
        "svg_usage": {"model": "m", "input_tokens": 100, "output_tokens": 50, "total_tokens": 150},
    }
    assert whole(drawing, IMAGES).usage() == Exactly(Tokens(111, 55))
    assert whole({"svg_usage": RESPONSE_USAGE}, IMAGES).usage() == Exactly(Tokens(11, 5))


@pytest.mark.parametrize(
    ("endpoint", "step", "end"),
    [
        (IMAGES, "image_generation.partial_image", "image_generation.completed"),
        (SPEECH, "speech.audio.delta", "speech.audio.done"),
    ],
)
def test_a_stream_of_images_or_audio_reports_its_usage_at_its_end(endpoint: Endpoint, step: str, end: str) -> None:
    """Every event is forwarded unchanged. If the stream breaks off before its end, the whole hold is charged."""
    of = request(endpoint)
    begun = media_stream({"type": step, "b64_json": "AAAA"})
    done = media_stream({"type": end, "usage": RESPONSE_USAGE})
    meter, shown = watch(begun, of)
    assert (shown, meter.output_seen, meter.is_over) == (begun, 0, False)
    assert meter.usage() == AtLeast(Tokens(0, TOKENS_MAX))
    meter, shown = watch(begun + done, of)
    assert (shown, meter.output_seen, meter.is_at_end, meter.is_over) == (begun + done, 0, True, True)
    assert meter.usage() == Exactly(Tokens(11, 5))
    assert usage_of(begun + media_stream({"type": end}), of) == Unspent(requests=1)
    assert usage_of(begun + DONE, of) == Unspent(requests=1)


def test_the_usages_of_several_images_in_a_stream_add_up() -> None:
    """A stream that ends after the first image has not reported the second, so the whole hold is charged."""
    first = media_stream({"type": "image_generation.completed", "usage": RESPONSE_USAGE})
    assert usage_of(first + first, request(IMAGES, n=2)) == Exactly(Tokens(22, 10))
    assert usage_of(first, request(IMAGES, n=2)) == AtLeast(Tokens(0, TOKENS_MAX))


def test_an_end_that_is_repeated_is_no_other_image() -> None:
    """Of its usages the largest counts, so zeros take nothing away."""
    zeros = {"input_tokens": 0, "output_tokens": 0}
    ends = [
        {"type": "image_generation.completed", "usage": usage} for usage in (RESPONSE_USAGE, zeros, RESPONSE_USAGE)
    ]
    assert usage_of(media_stream(*ends), request(IMAGES)) == Exactly(Tokens(11, 5))


def test_a_usage_without_an_output_states_only_a_part_of_the_cost() -> None:
    """The rest is unknown, so the whole hold is charged. Without an input the caller counts it."""
    for usage in ({"input_tokens": 11}, {"input_tokens": 11, "output_tokens": None}):
        assert whole({"usage": usage}, IMAGES).usage() == AtLeast(Tokens(11, TOKENS_MAX))
    some = [
        {"type": "image_generation.completed", "usage": usage} for usage in (RESPONSE_USAGE, {"input_tokens": 11})
    ]
    assert usage_of(media_stream(*some), request(IMAGES, n=2)) == AtLeast(Tokens(22, TOKENS_MAX))
    without_input = whole({"usage": {"output_tokens": 5}}, IMAGES)
    assert (without_input.usage(), without_input.input_stated) == (AtLeast(Tokens(0, 5)), None)


ZEROS = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}


def test_a_usage_of_zeros_states_nothing() -> None:
    """LiteLLM writes it if the vendor states none. No image is free."""
    for usage in (ZEROS, {"total_tokens": 0}, {"input_tokens": 0}, {"output_tokens": 0}):
        for name in ("usage", "svg_usage"):
            meter = whole({name: usage}, IMAGES)
            assert (meter.usage(), meter.input_stated) == (Unspent(requests=1), None)
        end = {"type": "image_generation.completed", "usage": usage}
        assert usage_of(media_stream(end), request(IMAGES)) == Unspent(requests=1)
    assert whole({"usage": RESPONSE_USAGE, "svg_usage": ZEROS}, IMAGES).usage() == Exactly(Tokens(11, 5))
    assert whole({"usage": {**ZEROS, "output_tokens": 5}}, IMAGES).usage() == AtLeast(Tokens(0, 5))


def test_an_output_of_0_is_none_of_an_image_or_of_speech() -> None:
    """Each has some. So it is charged like one that is not stated."""
    usage = {"input_tokens": 5, "output_tokens": 0, "total_tokens": 5}
    for endpoint in (IMAGES, SPEECH):
        assert whole({"usage": usage}, endpoint).usage() == AtLeast(Tokens(5, TOKENS_MAX))


def test_the_text_of_a_transcript_is_counted_if_its_output_is_not_stated() -> None:
    """Silence has none."""
    for usage in ({"input_tokens": 5, "output_tokens": 0, "total_tokens": 5}, {"input_tokens": 5}):
        meter = whole({"text": "hello there", "usage": usage}, TRANSCRIPTIONS)
        assert (meter.usage(), meter.uncounted_texts) == (AtLeast(Tokens(5, 0)), ["hello there"])
        done = media_stream({"type": "transcript.text.done", "text": "hello there", "usage": usage})
        meter, _ = watch(done, request(TRANSCRIPTIONS))
        assert (meter.usage(), meter.uncounted_texts) == (AtLeast(Tokens(5, 0)), ["hello there"])
    silence = {"text": "", "usage": {"input_tokens": 5, "output_tokens": 0}}
    assert whole(silence, TRANSCRIPTIONS).usage() == Exactly(Tokens(5, 0))
    assert whole({"text": "", "usage": {"input_tokens": 5}}, TRANSCRIPTIONS).usage() == AtLeast(Tokens(5, TOKENS_MAX))
    assert whole({"text": "hello there", "usage": ZEROS}, TRANSCRIPTIONS).usage() == Unspent(requests=1)


@pytest.mark.parametrize(
    "order", [(RESPONSE_USAGE, None), (None, RESPONSE_USAGE), (RESPONSE_USAGE, {"input_tokens": 0})]
)
def test_an_image_without_a_usage_beside_one_with_it_is_not_free(order: tuple) -> None:
    """Its cost is unknown, so the whole hold is charged."""
    ends = [{"type": "image_generation.completed", "usage": usage} for usage in order]
    assert usage_of(media_stream(*ends), request(IMAGES, n=2)) == AtLeast(Tokens(11, TOKENS_MAX))
    assert usage_of(media_stream({**ends[0], "usage": RESPONSE_USAGE}, ends[1]), request(IMAGES)) == Exactly(
        Tokens(11, 5)
    )


def test_tokens_beside_the_output_of_an_image_are_not_free() -> None:
    """As on every endpoint that generates."""
    usage = {"input_tokens": 11, "output_tokens": 5, "total_tokens": 116}
    assert whole({"usage": usage}, IMAGES).usage() == Exactly(Tokens(11, 105))


@pytest.mark.parametrize("error", [{"type": "error", "message": "no"}, {"error": {"message": "no"}}])
def test_a_stream_of_images_with_an_error_has_no_output(error: dict) -> None:
    """Only its input is charged, which the caller adds."""
    meter, _ = watch(media_stream(error), request(IMAGES))
    assert (meter.is_over, meter.has_error, meter.usage()) == (True, True, AtLeast(Tokens(0, 0)))


def test_a_stream_of_images_is_never_stopped() -> None:
    """Its whole output is held before it begins, so its ending writes nothing and keeps no event."""
    ending = new(request(IMAGES)).ending
    ending.see({"type": "image_generation.partial_image", "b64_json": "AAAA"}, b"")
    assert ending.at_limit(USED, shows_usage=True) == b""
    assert not ending.has_finished
