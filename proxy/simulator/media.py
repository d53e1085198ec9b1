"""What the simulated upstream answers where the answer is no text: pictures, sound, verdicts, summaries and counts.

One word of an input is one token here too, a picture has 272 and a word spoken has 20. A model whose name begins with
`dall-e`, `whisper` or `tts` is billed by the piece, as OpenAI's own of these names are, and says no tokens.

Pure: takes what was asked, gives bytes; `simulator` sends them. Shares nothing with the modules that read them.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass, replace
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

import orjson

from proxy.simulator.directives import Complaint, Directions
from proxy.simulator.text import count_tokens

JSON = dict[str, Any]

TOKENS_PER_PICTURE = 272
TOKENS_PER_WORD_SPOKEN = 20
COMPACTED_TOKENS = 12
HEARD = "the quiet river moves under the old bridge"
BYTES_PER_TOKEN_HEARD = 800
# No JSON, no UTF-8, and not one of its bytes may be changed on the way.
SOUND = b"ID3\x04" + bytes(range(256)) * 8
PICTURE = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(range(64))).decode()
BY_THE_PIECE = ("dall-e", "whisper", "tts")
EVENT_STREAM = "text/event-stream; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Medium:
    """An answer: its bytes, in as many pieces as they are sent in, and the tokens that it says, if it says any."""

    content_type: str
    pieces: list[bytes]
    usage: tuple[int, int] | None

    @property
    def is_stream(self) -> bool:
        """Whether the pieces are the events of a stream."""
        return self.content_type == EVENT_STREAM


def moderation(asked: JSON, directions: Directions) -> Medium:
    """One verdict for each input. Nobody is billed for it."""
    del directions
    inputs = asked["input"] if isinstance(asked["input"], list) else [asked["input"]]
    verdict = {"flagged": False, "categories": {}, "category_scores": {}, "category_applied_input_types": {}}
    model = asked.get("model", "omni-moderation-latest")
    return _whole({"id": "modr-simulated", "model": model, "results": [verdict] * len(inputs)}, None)


def input_tokens(asked: JSON, directions: Directions) -> Medium:
    """How many tokens an input has. A count, for which nothing is billed."""
    del directions
    return _whole({"object": "response.input_tokens", "input_tokens": count_tokens(asked["input"])}, None)


def compaction(asked: JSON, directions: Directions) -> Medium:
    """A conversation in few tokens, which nobody can read but the model."""
    usage = (count_tokens(asked["input"]), COMPACTED_TOKENS)
    answer = {
        "id": "resp_simulated",
        "object": "response.compaction",
        "created_at": 0,
        "output": [{"id": "cmp_1", "type": "compaction", "encrypted_content": "c2ltdWxhdGVk"}],
    }
    return _whole(answer, _said(asked, directions, usage), named=_response_usage)


def pictures(asked: JSON, directions: Directions) -> Medium:
    """`n` pictures; streamed, `partial_images` of the first and then each as a whole."""
    number = asked.get("n") or 1
    usage = _said(asked, directions, (count_tokens(asked["prompt"]), TOKENS_PER_PICTURE * number))
    if not asked.get("stream"):
        return _whole({"created": 0, "data": [{"b64_json": PICTURE}] * number}, usage)
    head = {"b64_json": PICTURE, "created_at": 0, "output_format": "png", "quality": "low", "size": "1024x1024"}
    head["background"] = "opaque"
    partial = [
        _event({"type": "image_generation.partial_image", "partial_image_index": index, **head})
        for index in range(asked.get("partial_images") or 0)
    ]
    # Each says its own share; the input is the first one's.
    shares = [usage and (usage[0] if index == 0 else 0, TOKENS_PER_PICTURE) for index in range(number)]
    whole = [_event({"type": "image_generation.completed", **head, **_usage(share)}) for share in shares]
    return Medium(EVENT_STREAM, [*partial, *whole], usage)


def speech(asked: JSON, directions: Directions) -> Medium:
    """Sound as bytes; or as events, of which the last says the usage."""
    words = count_tokens(asked["input"])
    if asked.get("stream_format") != "sse":
        return Medium("audio/mpeg", [SOUND], None)
    usage = _said(asked, directions, (words, TOKENS_PER_WORD_SPOKEN * words))
    delta = _event({"type": "speech.audio.delta", "audio": base64.b64encode(SOUND).decode()})
    return Medium(EVENT_STREAM, [delta, delta, _event({"type": "speech.audio.done", **_usage(usage)})], usage)


def edits(asked: JSON, directions: Directions) -> Medium:
    """Pictures made from others, for each of which it reads as much as one has."""
    medium = pictures(
        {**asked, "prompt": asked["prompt"], "n": int(asked.get("n", 1)), "stream": asked.get("stream") == "true"},
        directions,
    )
    return replace(medium, pieces=[piece.replace(b"image_generation.", b"image_edit.") for piece in medium.pieces])


def variations(asked: JSON, directions: Directions) -> Medium:
    """Pictures like another. Only a model that is billed by the piece does it."""
    del directions
    number = int(asked.get("n", 1)) if asked["image"] else 0
    return _whole({"created": 0, "data": [{"b64_json": PICTURE}] * number}, None)


def transcription(asked: JSON, directions: Directions) -> Medium:
    """What was said: as JSON, as plain text, or as events."""
    usage = _said(asked, directions, (-(-asked["file"] // BYTES_PER_TOKEN_HEARD), len(HEARD.split())))
    if asked.get("stream") == "true" and usage is not None:
        deltas = [_event({"type": "transcript.text.delta", "delta": word}) for word in HEARD.split()]
        done = {"type": "transcript.text.done", "text": HEARD, **_transcription_usage(usage)}
        return Medium(EVENT_STREAM, [*deltas, _event(done)], usage)
    if asked.get("response_format") in ("text", "srt", "vtt"):
        return Medium("text/plain; charset=utf-8", [HEARD.encode() + b"\n"], None)
    return _whole({"text": HEARD}, usage, named=_transcription_usage)


def read_form(body: bytes, content_type: str) -> JSON:
    """Return the fields of a form, and of its files the sizes; `metadata[simulate]` as JSON would have it."""
    head = b"MIME-Version: 1.0\r\nContent-Type: " + content_type.encode() + b"\r\n\r\n"
    asked: JSON = {}
    for part in BytesParser(policy=HTTP).parsebytes(head + body).iter_parts():
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        if isinstance(content, bytes):
            asked[str(name)] = len(content) if part.get_filename() else content.decode()
    if "metadata[simulate]" in asked:
        asked["metadata"] = {"simulate": asked["metadata[simulate]"]}
    return asked


Write = Callable[[JSON, Directions], Medium]
MEDIA: dict[str, Write] = {
    "/v1/moderations": moderation,
    "/v1/responses/input_tokens": input_tokens,
    "/v1/responses/compact": compaction,
    "/v1/images/generations": pictures,
    "/v1/images/edits": edits,
    "/v1/images/variations": variations,
    "/v1/audio/speech": speech,
    "/v1/audio/transcriptions": transcription,
    "/v1/audio/translations": transcription,
}


def write_medium(write: Write, asked: JSON, directions: Directions) -> Medium:
    """Return the answer; raises Complaint where what it needs is missing or odd."""
    try:
        return write(asked, directions)
    except (KeyError, TypeError) as error:
        raise Complaint(400, f"Your request misses something, or has it in an odd shape: {error}.") from None


def _said(asked: JSON, directions: Directions, usage: tuple[int, int]) -> tuple[int, int] | None:
    if directions.no_usage or str(asked.get("model")).startswith(BY_THE_PIECE):
        return None
    return usage


def _whole(answer: JSON, usage: tuple[int, int] | None, *, named: Callable[..., JSON] | None = None) -> Medium:
    return Medium("application/json", [orjson.dumps({**answer, **(named or _usage)(usage)})], usage)


def _usage(usage: tuple[int, int] | None) -> JSON:
    if usage is None:
        return {}
    taken, given = usage
    details = {"text_tokens": taken, "image_tokens": 0}
    said = {"input_tokens": taken, "output_tokens": given, "total_tokens": taken + given}
    return {"usage": {**said, "input_tokens_details": details}}


def _transcription_usage(usage: tuple[int, int] | None) -> JSON:
    if usage is None:
        return {"usage": {"type": "duration", "seconds": 3}}
    taken, given = usage
    said = {"type": "tokens", "input_tokens": taken, "output_tokens": given, "total_tokens": taken + given}
    return {"usage": {**said, "input_token_details": {"text_tokens": 0, "audio_tokens": taken}}}


def _response_usage(usage: tuple[int, int] | None) -> JSON:
    if usage is None:
        return {}
    details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    return {"usage": {**_usage(usage)["usage"], **details}}


def _event(said: JSON) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (said["type"].encode(), orjson.dumps(said))


ERROR = _event({"type": "error", "error": {"message": "The server had an error.", "type": "server_error"}})
