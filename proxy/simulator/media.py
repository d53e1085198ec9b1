"""Answers that are not text: moderation results, scores of documents, token counts, compactions, images and audio.

One word of an input is one token, as in `text`; an image is 272 tokens and a spoken word 20. A model whose name
begins with `dall-e`, `whisper` or `tts` is billed per image, second or character, as OpenAI's models of these names
are, and reports no tokens.

Pure: takes the request's parameters, returns bytes; `server` sends them. Nothing is shared with the modules of the
proxy that read these answers.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass, replace
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

import orjson

from proxy.simulator.directives import ApiError, Directives
from proxy.simulator.text import count_tokens

JSON = dict[str, Any]

TOKENS_PER_IMAGE = 272
TOKENS_PER_SPOKEN_WORD = 20
COMPACTED_TOKENS = 12
TRANSCRIPT = "the quiet river moves under the old bridge"
AUDIO_BYTES_PER_TOKEN = 800
# Neither JSON nor UTF-8, with every byte value, so a test notices if the proxy changes a byte on the way.
AUDIO = b"ID3\x04" + bytes(range(256)) * 8
IMAGE = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(range(64))).decode()
NOT_BILLED_IN_TOKENS = ("dall-e", "whisper", "tts")
EVENT_STREAM = "text/event-stream; charset=utf-8"


@dataclass(frozen=True, slots=True)
class MediaAnswer:
    """An answer: its body, split into the pieces that are sent, and the input and output tokens that it reports."""

    content_type: str
    pieces: list[bytes]
    usage: tuple[int, int] | None

    @property
    def is_stream(self) -> bool:
        """Whether the pieces are the events of a stream."""
        return self.content_type == EVENT_STREAM


def moderation(params: JSON, directives: Directives) -> MediaAnswer:
    """One result for each input. Moderation is free, so no usage is reported."""
    del directives
    inputs = params["input"] if isinstance(params["input"], list) else [params["input"]]
    result = {"flagged": False, "categories": {}, "category_scores": {}, "category_applied_input_types": {}}
    model = params.get("model", "omni-moderation-latest")
    return _json_answer({"id": "modr-simulated", "model": model, "results": [result] * len(inputs)}, None)


def token_count(params: JSON, directives: Directives) -> MediaAnswer:
    """The number of tokens in an input. Counting is free, so no usage is reported."""
    del directives
    return _json_answer({"object": "response.input_tokens", "input_tokens": count_tokens(params["input"])}, None)


def compaction(params: JSON, directives: Directives) -> MediaAnswer:
    """A conversation, compacted and encrypted: only the model can read it."""
    usage = (count_tokens(params["input"]), COMPACTED_TOKENS)
    body = {
        "id": "resp_simulated",
        "object": "response.compaction",
        "created_at": 0,
        "output": [{"id": "cmp_1", "type": "compaction", "encrypted_content": "c2ltdWxhdGVk"}],
    }
    return _json_answer(body, _reported(params, directives, usage), write_usage=_response_usage)


def rerank(params: JSON, directives: Directives) -> MediaAnswer:
    """The documents in the order of how many words of the query they have. Each is read together with the query."""
    query, documents = params["query"], params["texts"] if "texts" in params else params["documents"]
    usage = _reported(params, directives, (sum(count_tokens([query, each]) for each in documents), 0))
    scores = [(_score(query, each), index) for index, each in enumerate(documents)]
    best = sorted(scores, key=lambda each: -each[0])[: params.get("top_n")]
    results = [{"index": index, "relevance_score": score} for score, index in best]
    body = {"id": "rerank-simulated", "model": params["model"], "results": results}
    return _json_answer(body, usage, write_usage=_pairs_usage)


def score(params: JSON, directives: Directives) -> MediaAnswer:
    """The scores of pairs, in their order. One text is compared with each of the others."""
    first, second = ([each] if isinstance(each, str) else each for each in (params["text_1"], params["text_2"]))
    pairs = list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))
    usage = _reported(params, directives, (sum(count_tokens([*pair]) for pair in pairs), 0))
    data = [{"index": index, "object": "score", "score": _score(*pair)} for index, pair in enumerate(pairs)]
    body = {"id": "score-simulated", "object": "list", "created": 0, "model": params["model"], "data": data}
    return _json_answer(body, usage, write_usage=_pairs_usage)


def _score(query: object, document: object) -> float:
    """The part of the words of the query that a document has."""
    texts = (each.get("text") if isinstance(each, dict) else each for each in (query, document))
    words, found = (set(str(text).lower().split()) for text in texts)
    return round(len(words & found) / max(1, len(words)), 3)


def images(params: JSON, directives: Directives) -> MediaAnswer:
    """`n` images. A stream has `partial_images` previews of the first one, and then one event for each image."""
    number = params.get("n") or 1
    usage = _reported(params, directives, (count_tokens(params["prompt"]), TOKENS_PER_IMAGE * number))
    if not params.get("stream"):
        return _json_answer({"created": 0, "data": [{"b64_json": IMAGE}] * number}, usage)
    head = {"b64_json": IMAGE, "created_at": 0, "output_format": "png", "quality": "low", "size": "1024x1024"}
    head["background"] = "opaque"
    partial = [
        _event({"type": "image_generation.partial_image", "partial_image_index": index, **head})
        for index in range(params.get("partial_images") or 0)
    ]
    # Each event reports its own image; the input counts with the first one. Two images for 2 words of input report
    # (2, 272) and (0, 272), so a client has to add them up.
    shares = [usage and (usage[0] if index == 0 else 0, TOKENS_PER_IMAGE) for index in range(number)]
    completed = [_event({"type": "image_generation.completed", **head, **_usage(share)}) for share in shares]
    return MediaAnswer(EVENT_STREAM, [*partial, *completed], usage)


def speech(params: JSON, directives: Directives) -> MediaAnswer:
    """Audio as bytes, without usage; or as events, the last of which reports the usage."""
    words = count_tokens(params["input"])
    if params.get("stream_format") != "sse":
        return MediaAnswer("audio/mpeg", [AUDIO], None)
    usage = _reported(params, directives, (words, TOKENS_PER_SPOKEN_WORD * words))
    delta = _event({"type": "speech.audio.delta", "audio": base64.b64encode(AUDIO).decode()})
    done = _event({"type": "speech.audio.done", **_usage(usage)})
    return MediaAnswer(EVENT_STREAM, [delta, delta, done], usage)


def edits(params: JSON, directives: Directives) -> MediaAnswer:
    """Images made from other images. The parameters come from a form, so all of them are strings."""
    answer = images(
        {
            **params,
            "prompt": params["prompt"],
            "n": int(params.get("n", 1)),
            "stream": params.get("stream") == "true",
        },
        directives,
    )
    return replace(answer, pieces=[piece.replace(b"image_generation.", b"image_edit.") for piece in answer.pieces])


def variations(params: JSON, directives: Directives) -> MediaAnswer:
    """Images similar to another one. OpenAI offers it only for a model that is billed per image, so without usage."""
    del directives
    number = int(params.get("n", 1)) if params["image"] else 0
    return _json_answer({"created": 0, "data": [{"b64_json": IMAGE}] * number}, None)


def transcription(params: JSON, directives: Directives) -> MediaAnswer:
    """The text of a recording: as JSON, as plain text, or as events. `file` is the size of the recording in bytes."""
    input_tokens = -(-params["file"] // AUDIO_BYTES_PER_TOKEN)  # rounded up
    usage = _reported(params, directives, (input_tokens, len(TRANSCRIPT.split())))
    if params.get("stream") == "true" and usage is not None:
        deltas = [_event({"type": "transcript.text.delta", "delta": word}) for word in TRANSCRIPT.split()]
        done = {"type": "transcript.text.done", "text": TRANSCRIPT, **_transcription_usage(usage)}
        return MediaAnswer(EVENT_STREAM, [*deltas, _event(done)], usage)
    if params.get("response_format") in ("text", "srt", "vtt"):
        return MediaAnswer("text/plain; charset=utf-8", [TRANSCRIPT.encode() + b"\n"], None)
    return _json_answer({"text": TRANSCRIPT}, usage, write_usage=_transcription_usage)


def read_multipart(body: bytes, content_type: str) -> JSON:
    """Return the fields of a form, with the size in bytes for each file.

    `metadata[simulate]` is returned as `metadata: {simulate: …}`, as a JSON body has it.
    """
    head = b"MIME-Version: 1.0\r\nContent-Type: " + content_type.encode() + b"\r\n\r\n"
    params: JSON = {}
    for part in BytesParser(policy=HTTP).parsebytes(head + body).iter_parts():
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        if isinstance(content, bytes):
            params[str(name)] = len(content) if part.get_filename() else content.decode()
    if "metadata[simulate]" in params:
        params["metadata"] = {"simulate": params["metadata[simulate]"]}
    return params


MediaWriter = Callable[[JSON, Directives], MediaAnswer]
MEDIA: dict[str, MediaWriter] = {
    "/v1/moderations": moderation,
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), rerank),
    **dict.fromkeys(("/v1/score", "/score"), score),
    "/v1/responses/input_tokens": token_count,
    "/v1/responses/compact": compaction,
    "/v1/images/generations": images,
    "/v1/images/edits": edits,
    "/v1/images/variations": variations,
    "/v1/audio/speech": speech,
    "/v1/audio/transcriptions": transcription,
    "/v1/audio/translations": transcription,
}


def write_media(write: MediaWriter, params: JSON, directives: Directives) -> MediaAnswer:
    """Return the answer. Raises ApiError, a 400, if a required parameter is missing or has the wrong type."""
    try:
        return write(params, directives)
    except (KeyError, TypeError) as error:
        raise ApiError(400, f"A parameter is missing or has the wrong type: {error}.") from None


def _reported(params: JSON, directives: Directives, usage: tuple[int, int]) -> tuple[int, int] | None:
    if directives.no_usage or str(params.get("model")).startswith(NOT_BILLED_IN_TOKENS):
        return None
    return usage


def _json_answer(
    body: JSON, usage: tuple[int, int] | None, *, write_usage: Callable[..., JSON] | None = None
) -> MediaAnswer:
    return MediaAnswer("application/json", [orjson.dumps({**body, **(write_usage or _usage)(usage)})], usage)


def _usage(usage: tuple[int, int] | None) -> JSON:
    if usage is None:
        return {}
    input_tokens, output_tokens = usage
    details = {"text_tokens": input_tokens, "image_tokens": 0}
    totals = {"input_tokens": input_tokens, "output_tokens": output_tokens, "total_tokens": sum(usage)}
    return {"usage": {**totals, "input_tokens_details": details}}


def _pairs_usage(usage: tuple[int, int] | None) -> JSON:
    return {} if usage is None else {"usage": {"prompt_tokens": usage[0], "total_tokens": usage[0]}}


def _transcription_usage(usage: tuple[int, int] | None) -> JSON:
    if usage is None:
        return {"usage": {"type": "duration", "seconds": 3}}
    input_tokens, output_tokens = usage
    totals = {"input_tokens": input_tokens, "output_tokens": output_tokens, "total_tokens": sum(usage)}
    details = {"text_tokens": 0, "audio_tokens": input_tokens}
    return {"usage": {"type": "tokens", **totals, "input_token_details": details}}


def _response_usage(usage: tuple[int, int] | None) -> JSON:
    if usage is None:
        return {}
    details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    return {"usage": {**_usage(usage)["usage"], **details}}


def _event(fields: JSON) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (fields["type"].encode(), orjson.dumps(fields))


STREAM_ERROR = _event({"type": "error", "error": {"message": "The server had an error.", "type": "server_error"}})
