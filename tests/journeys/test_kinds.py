"""Streams as each kind of upstream writes them, cut at every byte: what its client sees is what it would have seen
without us, and what is charged is what the upstream said, as far as it said it.

The recordings are made from the descriptions in wire §2.2 and §2.3, with usage asked for by us and not by the client.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from proxy.formats.endpoints import CHAT, COMPLETIONS, Endpoint
from proxy.formats.meter import Meter
from proxy.formats.request import Request, parse_request
from proxy.formats.stream import Stream
from proxy.policy.amounts import TOKENS_MAX, AtLeast, Exactly, Tokens, Usage
from proxy.policy.catalog import Kind
from tests.stage import STAFF, stage

pytestmark = pytest.mark.journey


@dataclass(frozen=True, slots=True)
class Piece:
    """An event as it comes, and what its client is to see; in place of the last event, where it `replaces` it."""

    raw: bytes
    shown: bytes
    replaces: bool = False


@dataclass(frozen=True, slots=True)
class Recording:
    """A stream of an upstream of this kind, and what it says that it used."""

    kind: Kind
    pieces: tuple[Piece, ...]
    usage: Usage
    endpoint: Endpoint = CHAT
    has_error: bool = False

    @property
    def raw(self) -> bytes:
        """All of it, as it comes."""
        return b"".join(piece.raw for piece in self.pieces)

    def shown(self, events: int) -> bytes:
        """What a client has seen after so many whole events."""
        seen: list[bytes] = []
        for piece in self.pieces[:events]:
            if piece.replaces:
                seen.pop()
            seen.append(piece.shown)
        return b"".join(seen)


def _data(value: Any, *, end: bytes = b"\n\n") -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + end


def _chunk(content: str | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    return {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


def _text(text: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "text": text, "finish_reason": finish}], **more}


def _as_is(*raws: bytes) -> list[Piece]:
    return [Piece(raw, raw) for raw in raws]


def _without(name: str, *chunks: dict[str, Any]) -> list[Piece]:
    """Chunks that lose one member, which came only because we asked."""
    lost = [{key: value for key, value in chunk.items() if key != name} for chunk in chunks]
    return [Piece(_data(chunk), _data(rest)) for chunk, rest in zip(chunks, lost, strict=True)]


def _dropped(chunk: dict[str, Any]) -> Piece:
    return Piece(_data(chunk), b"")


USAGE = {"prompt_tokens": 40, "completion_tokens": 7, "total_tokens": 47}
ZEROS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
SAID = Exactly(Tokens(40, 7))
END: dict[str, Any] = {"id": "c", "choices": []}
DONE = _as_is(b"data: [DONE]\n\n")
TEXTS = ("Grüße", " 世界", ' "usage":null ')
TIMINGS = {"cache_n": 30, "prompt_n": 10, "prompt_ms": 12.5, "predicted_n": 7}
_LAST = _data(_chunk(finish="stop"))


def _running(output: int) -> dict[str, int]:
    return {"prompt_tokens": 40, "total_tokens": 40 + output, "completion_tokens": output}


RECORDINGS = {
    "openai": Recording(
        "openai",
        (
            *_without("usage", *(_chunk(text, usage=None, obfuscation="aB3") for text in TEXTS)),
            *_without("usage", _chunk(finish="stop", usage=None, obfuscation="")),
            _dropped({**END, "usage": USAGE, "obfuscation": "x"}),
            *DONE,
        ),
        SAID,
    ),
    # The verdict on the prompt comes first, without a choice; a filter beside the answer sends more without text.
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
            *_as_is(_data({**END, "prompt_annotations": [{"prompt_index": 0}]})),
            *_without("usage", *(_chunk(text, usage=None) for text in TEXTS)),
            *_as_is(_data({"id": "", "choices": [{"index": 0, "content_filter_offsets": {"check_offset": 44}}]})),
            *_without("usage", _chunk(finish="stop", usage=None)),
            _dropped({**END, "usage": USAGE}),
            *DONE,
        ),
        SAID,
    ),
    "vllm": Recording(
        "vllm",
        (
            *_without("usage", *(_chunk(text, usage=_running(2 + at)) for at, text in enumerate(TEXTS))),
            *_without("usage", _chunk(finish="stop", usage=_running(7))),
            _dropped({**END, "usage": USAGE}),
            *DONE,
        ),
        SAID,
    ),
    "vllm-null": Recording(
        "vllm",
        (
            *_as_is(_data(_chunk("ok")), _LAST),
            _dropped({**END, "usage": {"prompt_tokens": 40, "total_tokens": 47, "completion_tokens": None}}),
            *DONE,
        ),
        SAID,
    ),
    "vllm-breaks": Recording(
        "vllm",
        (
            *_without("usage", *(_chunk(text, usage=_running(2 + at)) for at, text in enumerate(TEXTS))),
            *_as_is(_data({"error": {"message": "Engine died.", "type": "InternalServerError", "code": 500}})),
            *DONE,
        ),
        Exactly(Tokens(40, 4)),
        has_error=True,
    ),
    "ollama": Recording(
        "ollama",
        (*_as_is(*(_data(_chunk(text)) for text in TEXTS), _LAST), _dropped({**END, "usage": USAGE}), *DONE),
        SAID,
    ),
    "ollama-completions": Recording(
        "ollama",
        (
            *_without("usage", *(_text(text, usage=ZEROS) for text in TEXTS), _text("", "stop", usage=ZEROS)),
            _dropped({**END, "usage": USAGE}),
            *DONE,
        ),
        SAID,
        endpoint=COMPLETIONS,
    ),
    # Unasked its timings stand on the last chunk that has a choice.
    "llamacpp": Recording(
        "llamacpp",
        (
            *_as_is(*(_data(_chunk(text)) for text in TEXTS), _LAST),
            Piece(
                _data({**END, "usage": USAGE, "timings": TIMINGS}),
                _data(_chunk(finish="stop", timings=TIMINGS)),
                replaces=True,
            ),
            *DONE,
        ),
        SAID,
    ),
    # It says them on every chunk, as we ask.
    "llamacpp-running": Recording(
        "llamacpp",
        (
            *_without(
                "timings", *(_chunk(text, timings={**TIMINGS, "predicted_n": n}) for n, text in enumerate(TEXTS))
            ),
            *_as_is(_LAST),
            Piece(
                _data({**END, "usage": USAGE, "timings": TIMINGS}),
                _data(_chunk(finish="stop", timings=TIMINGS)),
                replaces=True,
            ),
            *DONE,
        ),
        SAID,
    ),
    "llamacpp-silent": Recording(
        "llamacpp",
        (*_as_is(*map(_data, map(_chunk, TEXTS)), _data(_chunk(finish="stop", timings=TIMINGS))), *DONE),
        Exactly(Tokens(40, 7, cached=30)),
    ),
    "llamacpp-completions": Recording(
        "llamacpp",
        (*_as_is(*map(_data, map(_text, TEXTS)), _data(_text("", "stop", usage=USAGE, timings=TIMINGS))), *DONE),
        SAID,
        endpoint=COMPLETIONS,
    ),
    "openrouter": Recording(
        "openai",
        (
            *_as_is(b": OPENROUTER PROCESSING\n\n", b": OPENROUTER PROCESSING\n\n"),
            *_as_is(*(_data(_chunk(text, provider="P")) for text in TEXTS)),
            *_as_is(_data(_chunk("", "stop", native_finish_reason="STOP"))),
            # Beside a choice it comes unasked.
            *_as_is(
                _data(_chunk("", usage={**USAGE, "cost": 0.01, "cost_details": {"upstream_inference_cost": None}}))
            ),
            *DONE,
        ),
        SAID,
    ),
    "openrouter-breaks": Recording(
        "openai",
        (
            *_as_is(b": OPENROUTER PROCESSING\n\n", _data(_chunk("Hello"))),
            *_as_is(_data(_chunk("", "error", error={"code": "server_error", "message": "Provider disconnected"}))),
            *DONE,
        ),
        AtLeast(Tokens(0, 5)),
        has_error=True,
    ),
    "litellm": Recording(
        "openai",
        (
            *_as_is(*(_data(_chunk(text, citations=None)) for text in TEXTS), _LAST),
            _dropped({**END, "usage": {**USAGE, "completion_tokens_details": None}}),
            *DONE,
        ),
        SAID,
    ),
}


def _call(of: Endpoint) -> Request:
    said = {"prompt": "Hi"} if of is COMPLETIONS else {"messages": [{"role": "user", "content": "Hi"}]}
    return parse_request(of, json.dumps({"model": "fast", "stream": True, **said}).encode())


def _watched(recording: Recording, pieces: Iterator[bytes] | list[bytes]) -> tuple[Meter, bytes]:
    """Let these bytes go by and end; return the meter, and all that the client is shown."""
    call = _call(recording.endpoint)
    meter = Meter(call, count=lambda text: len(text), kind=recording.kind)
    stream = Stream(meter)
    shown = b"".join(stream.feed(piece, covered=TOKENS_MAX) for piece in pieces)
    stream.close(covered=TOKENS_MAX)
    return meter, shown + stream.end()


def _expected(recording: Recording, cut: int) -> bytes:
    """What a client sees of the first `cut` bytes: whole events as they are to be shown, and the rest as it came.

    An event that lacks no more than line ends is as good as whole.
    """
    done, start = 0, 0
    while done < len(recording.pieces) and start + len(recording.pieces[done].raw) <= cut:
        start += len(recording.pieces[done].raw)
        done += 1
    rest = recording.raw[start:cut]
    if done == len(recording.pieces) or rest.rstrip(b"\n") != recording.pieces[done].raw.rstrip(b"\n"):
        return recording.shown(done) + rest
    return recording.shown(done + 1)


@pytest.mark.parametrize("recording", RECORDINGS.values(), ids=RECORDINGS)
def test_a_stream_cut_anywhere_loses_nothing_and_gains_nothing(recording: Recording) -> None:
    """Exactly what we asked for is taken out, wherever the stream ends."""
    for cut in range(len(recording.raw) + 1):
        _, shown = _watched(recording, [recording.raw[:cut]])
        expected = _expected(recording, cut)
        assert shown == expected or shown.rstrip(b"\n") == expected.rstrip(b"\n"), recording.raw[:cut]


@pytest.mark.parametrize("recording", RECORDINGS.values(), ids=RECORDINGS)
def test_a_stream_in_any_pieces_is_the_same_stream(recording: Recording) -> None:
    """Split into two at every byte, and into single bytes; and what it said is what is charged."""
    raw, whole = recording.raw, recording.shown(len(recording.pieces))
    splits = [[raw[:at], raw[at:]] for at in range(len(raw))]
    for pieces in [*splits, [raw[at : at + 1] for at in range(len(raw))]]:
        meter, shown = _watched(recording, pieces)
        assert shown == whole
        assert meter.usage() == recording.usage
        assert meter.has_error is recording.has_error


@pytest.mark.parametrize("recording", RECORDINGS.values(), ids=RECORDINGS)
async def test_a_stream_of_each_kind_passes_through_the_proxy(recording: Recording, tmp_path: Path) -> None:
    """With that kind in the YAML: asked for usage where it has to be, the same bytes, the same charge."""
    asked: list[dict[str, Any]] = []
    secret = {"x-litellm-key-spend": "7", "x-generation-id": "gen-1", "x-litellm-model-api-base": "http://10.0.0.7"}

    async def answer(request: web.Request) -> web.Response:
        asked.append(json.loads(await request.read()))
        return web.Response(body=recording.raw, headers={"content-type": "text/event-stream", **secret})

    application = web.Application()
    application.router.add_post("/{anything:.*}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        async with stage(STAFF, folder=tmp_path, upstream=url, kind=recording.kind) as on:
            reply = await on.post("/v1" + recording.endpoint.path, _call(recording.endpoint).document)
            assert reply.body == recording.shown(len(recording.pieces))
            assert not secret.keys() & {name.lower() for name in reply.headers}
            await on.at_rest()
            [call] = await on.rows("calls")
            assert call["provenance"] == recording.usage.provenance
            assert call["outcome"] == ("upstream_broke" if recording.has_error else "complete")
            if recording.usage == SAID:
                assert (call["input_tokens"], call["output_tokens"]) == (40, 7)
    finally:
        await runner.cleanup()
    [document] = asked
    assert document.get("timings_per_token", False) is (recording.kind == "llamacpp")
    options = {"include_usage": True, **({"continuous_usage_stats": True} if recording.kind == "vllm" else {})}
    assert document["stream_options"] == options
