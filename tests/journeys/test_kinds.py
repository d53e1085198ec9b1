"""Streams as each kind of upstream writes them, cut at every byte.

The client gets the same bytes as without the proxy, and is charged the usage that the upstream reported before the
cut. The recordings follow docs/wire.md §2.2 and §2.3. In all of them the proxy asks for the usage, and the client
does not.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from proxy.formats.endpoints import CHAT, COMPLETIONS, Endpoint
from proxy.formats.mask import Mask
from proxy.formats.meter import Meter
from proxy.formats.request import Request, parse_request
from proxy.formats.stream import Stream
from proxy.formats.surfaces import meter_of
from proxy.policy.amounts import TOKENS_MAX, AtLeast, Exactly, Tokens, Usage
from tests.stage import STAFF, stage

pytestmark = pytest.mark.journey


@dataclass(frozen=True, slots=True)
class Piece:
    """An event from the upstream, and the bytes that the client gets for it.

    If it `replaces`, they take the place of the bytes for the event before it, which the proxy still holds back.
    """

    raw: bytes
    shown: bytes
    replaces: bool = False


@dataclass(frozen=True, slots=True)
class Recording:
    """A stream of an upstream of this kind, and the usage that it reports."""

    kind: str
    pieces: tuple[Piece, ...]
    usage: Usage
    endpoint: Endpoint = CHAT
    has_error: bool = False

    @property
    def raw(self) -> bytes:
        """All bytes from the upstream."""
        return b"".join(piece.raw for piece in self.pieces)

    def shown(self, events: int) -> bytes:
        """The bytes that a client has got after this many whole events."""
        shown: list[bytes] = []
        for piece in self.pieces[:events]:
            if piece.replaces:
                shown.pop()
            shown.append(piece.shown)
        return b"".join(shown)


def _data(value: Any, *, end: bytes = b"\n\n") -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + end


def _chunk(content: str | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    return {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


def _text(text: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "text": text, "finish_reason": finish}], **more}


def _unchanged(*raws: bytes) -> list[Piece]:
    return [Piece(raw, raw) for raw in raws]


def _without(name: str, *chunks: dict[str, Any]) -> list[Piece]:
    """Chunks from which the proxy removes one member, which the upstream sent only because the proxy asked for it."""
    shown = [{key: value for key, value in chunk.items() if key != name} for chunk in chunks]
    return [Piece(_data(chunk), _data(rest)) for chunk, rest in zip(chunks, shown, strict=True)]


def _removed(chunk: dict[str, Any]) -> Piece:
    return Piece(_data(chunk), b"")


USAGE = {"prompt_tokens": 40, "completion_tokens": 7, "total_tokens": 47}
ZEROS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
REPORTED = Exactly(Tokens(40, 7))
END: dict[str, Any] = {"id": "c", "choices": []}
DONE = _unchanged(b"data: [DONE]\n\n")
TEXTS = ("Grüße", " 世界", ' "usage":null ')
TIMINGS = {"cache_n": 30, "prompt_n": 10, "prompt_ms": 12.5, "predicted_n": 7}
_LAST = _data(_chunk(finish="stop"))


def _usage_so_far(output: int) -> dict[str, int]:
    return {"prompt_tokens": 40, "total_tokens": 40 + output, "completion_tokens": output}


RECORDINGS = {
    "openai": Recording(
        "openai",
        (
            *_without("usage", *(_chunk(text, usage=None, obfuscation="aB3") for text in TEXTS)),
            *_without("usage", _chunk(finish="stop", usage=None, obfuscation="")),
            _removed({**END, "usage": USAGE, "obfuscation": "x"}),
            *DONE,
        ),
        REPORTED,
    ),
    # The filter's result for the prompt comes first, without a choice. A filter that runs beside the answer sends
    # more chunks without text.
    "azure": Recording(
        "azure",
        (
            *_without(
                "usage",
                {
                    "choices": [],
                    "created": 0,
                    "id": "",
                    "model": "",
                    "object": "",
                    "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": {}}],
                    "usage": None,
                },
            ),
            *_unchanged(_data({**END, "prompt_annotations": [{"prompt_index": 0}]})),
            *_without("usage", *(_chunk(text, usage=None) for text in TEXTS)),
            *_unchanged(_data({"id": "", "choices": [{"index": 0, "content_filter_offsets": {"check_offset": 44}}]})),
            *_without("usage", _chunk(finish="stop", usage=None)),
            _removed({**END, "usage": USAGE}),
            *DONE,
        ),
        REPORTED,
    ),
    "vllm": Recording(
        "vllm",
        (
            *_without("usage", *(_chunk(text, usage=_usage_so_far(2 + at)) for at, text in enumerate(TEXTS))),
            *_without("usage", _chunk(finish="stop", usage=_usage_so_far(7))),
            _removed({**END, "usage": USAGE}),
            *DONE,
        ),
        REPORTED,
    ),
    "vllm-null": Recording(
        "vllm",
        (
            *_unchanged(_data(_chunk("ok")), _LAST),
            _removed({**END, "usage": {"prompt_tokens": 40, "total_tokens": 47, "completion_tokens": None}}),
            *DONE,
        ),
        REPORTED,
    ),
    "vllm-breaks": Recording(
        "vllm",
        (
            *_without("usage", *(_chunk(text, usage=_usage_so_far(2 + at)) for at, text in enumerate(TEXTS))),
            *_unchanged(_data({"error": {"message": "Engine died.", "type": "InternalServerError", "code": 500}})),
            *DONE,
        ),
        Exactly(Tokens(40, 4)),
        has_error=True,
    ),
    "ollama": Recording(
        "ollama",
        (*_unchanged(*(_data(_chunk(text)) for text in TEXTS), _LAST), _removed({**END, "usage": USAGE}), *DONE),
        REPORTED,
    ),
    "ollama-completions": Recording(
        "ollama",
        (
            *_without("usage", *(_text(text, usage=ZEROS) for text in TEXTS), _text("", "stop", usage=ZEROS)),
            _removed({**END, "usage": USAGE}),
            *DONE,
        ),
        REPORTED,
        endpoint=COMPLETIONS,
    ),
    # Without `include_usage` the timings are on the last chunk that has a choice, so they are moved there.
    "llamacpp": Recording(
        "llamacpp",
        (
            *_unchanged(*(_data(_chunk(text)) for text in TEXTS), _LAST),
            Piece(
                _data({**END, "usage": USAGE, "timings": TIMINGS}),
                _data(_chunk(finish="stop", timings=TIMINGS)),
                replaces=True,
            ),
            *DONE,
        ),
        REPORTED,
    ),
    # Timings on every chunk, because the proxy sends `timings_per_token`.
    "llamacpp-every-chunk": Recording(
        "llamacpp",
        (
            *_without(
                "timings", *(_chunk(text, timings={**TIMINGS, "predicted_n": n}) for n, text in enumerate(TEXTS))
            ),
            *_unchanged(_LAST),
            Piece(
                _data({**END, "usage": USAGE, "timings": TIMINGS}),
                _data(_chunk(finish="stop", timings=TIMINGS)),
                replaces=True,
            ),
            *DONE,
        ),
        Exactly(Tokens(40, 7, cached=30)),
    ),
    "llamacpp-only-timings": Recording(
        "llamacpp",
        (*_unchanged(*map(_data, map(_chunk, TEXTS)), _data(_chunk(finish="stop", timings=TIMINGS))), *DONE),
        Exactly(Tokens(40, 7, cached=30)),
    ),
    "llamacpp-completions": Recording(
        "llamacpp",
        (*_unchanged(*map(_data, map(_text, TEXTS)), _data(_text("", "stop", usage=USAGE, timings=TIMINGS))), *DONE),
        REPORTED,
        endpoint=COMPLETIONS,
    ),
    "openrouter": Recording(
        "openai",
        (
            *_unchanged(b": OPENROUTER PROCESSING\n\n", b": OPENROUTER PROCESSING\n\n"),
            *_unchanged(*(_data(_chunk(text, provider="P")) for text in TEXTS)),
            *_unchanged(_data(_chunk("", "stop", native_finish_reason="STOP"))),
            # A usage on a chunk with a choice is sent without `include_usage` too, so it stays.
            *_unchanged(
                _data(_chunk("", usage={**USAGE, "cost": 0.01, "cost_details": {"upstream_inference_cost": None}}))
            ),
            *DONE,
        ),
        REPORTED,
    ),
    "openrouter-breaks": Recording(
        "openai",
        (
            *_unchanged(b": OPENROUTER PROCESSING\n\n", _data(_chunk("Hello"))),
            *_unchanged(
                _data(_chunk("", "error", error={"code": "server_error", "message": "Provider disconnected"}))
            ),
            *DONE,
        ),
        AtLeast(Tokens(0, 5)),
        has_error=True,
    ),
    "litellm": Recording(
        "openai",
        (
            *_unchanged(*(_data(_chunk(text, citations=None)) for text in TEXTS), _LAST),
            _removed({**END, "usage": {**USAGE, "completion_tokens_details": None}}),
            *DONE,
        ),
        REPORTED,
    ),
}


def _request(endpoint: Endpoint) -> Request:
    fields = {"prompt": "Hi"} if endpoint is COMPLETIONS else {"messages": [{"role": "user", "content": "Hi"}]}
    return parse_request(endpoint, json.dumps({"model": "fast", "stream": True, **fields}).encode())


def _metered(recording: Recording, pieces: Iterator[bytes] | list[bytes]) -> tuple[Meter, bytes]:
    """Feed these bytes to a meter and end the stream; return the meter and all bytes that the client gets."""
    request = _request(recording.endpoint)
    meter = meter_of(request, count=lambda text: len(text), kind=recording.kind)
    stream = Stream(meter, mask=Mask(None))
    shown = b"".join(stream.feed(piece, covered=TOKENS_MAX) for piece in pieces)
    stream.close(covered=TOKENS_MAX)
    return meter, shown + stream.end()


def _expected(recording: Recording, cut: int) -> bytes:
    """What a client gets of the first `cut` bytes: the bytes for the whole events, and an incomplete event unchanged.

    An event that lacks only its line ends counts as whole.
    """
    events, start = 0, 0
    while events < len(recording.pieces) and start + len(recording.pieces[events].raw) <= cut:
        start += len(recording.pieces[events].raw)
        events += 1
    rest = recording.raw[start:cut]
    if events == len(recording.pieces) or rest.rstrip(b"\n") != recording.pieces[events].raw.rstrip(b"\n"):
        return recording.shown(events) + rest
    return recording.shown(events + 1)


@pytest.mark.parametrize("recording", RECORDINGS.values(), ids=RECORDINGS)
def test_only_what_the_proxy_asked_for_is_removed_from_a_cut_stream(recording: Recording) -> None:
    """For a cut at every byte: the client gets all other bytes, and no additional ones."""
    for cut in range(len(recording.raw) + 1):
        _, shown = _metered(recording, [recording.raw[:cut]])
        expected = _expected(recording, cut)
        assert shown == expected or shown.rstrip(b"\n") == expected.rstrip(b"\n"), recording.raw[:cut]


@pytest.mark.parametrize("recording", RECORDINGS.values(), ids=RECORDINGS)
def test_a_stream_in_any_pieces_gives_the_same_bytes_and_usage(recording: Recording) -> None:
    """Split into two at every byte, and into single bytes."""
    raw, whole = recording.raw, recording.shown(len(recording.pieces))
    splits = [[raw[:at], raw[at:]] for at in range(len(raw))]
    for pieces in [*splits, [raw[at : at + 1] for at in range(len(raw))]]:
        meter, shown = _metered(recording, pieces)
        assert shown == whole
        assert meter.usage() == recording.usage
        assert meter.has_error is recording.has_error


@pytest.mark.parametrize("recording", RECORDINGS.values(), ids=RECORDINGS)
async def test_a_stream_of_each_kind_passes_through_the_proxy(recording: Recording, tmp_path: Path) -> None:
    """With that kind in the YAML: the options for usage are sent, and the bytes and the charge are the same."""
    documents: list[dict[str, Any]] = []
    private = {"x-litellm-key-spend": "7", "x-generation-id": "gen-1", "x-litellm-model-api-base": "http://10.0.0.7"}

    async def answer(request: web.Request) -> web.Response:
        documents.append(json.loads(await request.read()))
        return web.Response(body=recording.raw, headers={"content-type": "text/event-stream", **private})

    application = web.Application()
    application.router.add_post("/{anything:.*}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        async with stage(STAFF, folder=tmp_path, upstream=url, kind=recording.kind) as on:
            reply = await on.post("/v1" + recording.endpoint.path, _request(recording.endpoint).body.document)
            assert reply.body == recording.shown(len(recording.pieces))
            assert not private.keys() & {name.lower() for name in reply.headers}
            await on.all_settled()
            [call] = await on.rows("calls")
            assert call["provenance"] == recording.usage.provenance
            assert call["outcome"] == ("upstream_broke" if recording.has_error else "complete")
            if recording.usage == REPORTED:
                assert (call["input_tokens"], call["output_tokens"]) == (40, 7)
    finally:
        await runner.cleanup()
    [document] = documents
    assert document.get("timings_per_token", False) is (recording.kind == "llamacpp")
    options = {"include_usage": True, **({"continuous_usage_stats": True} if recording.kind == "vllm" else {})}
    assert document["stream_options"] == options
