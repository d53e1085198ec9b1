"""A model that knows one story, so small that a test writes it in no time: 270 kB of GGUF, as llama.cpp loads it.

write_model(tmp_path / "tiny.gguf")

It reads UTF-8 byte by byte, and the last byte of a prompt decides with which word it begins; each word leads to the
next and the last one to the end. So an answer ends by itself, unless its maximum comes first. The fox is written in
four pieces, none of which is a character by itself.
"""

import math
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_WIDTH, _HEADS, _CONTEXT = 64, 2, 8192
# The right word is so far ahead of all others that nothing hangs on the last digit of a sum.
_CERTAINTY = 2.0
_NOISE = 0.02

# How SentencePiece writes a blank.
_BLANK = "▁"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# No piece stands there twice: each knows only what comes after it.
_STORY = [
    *(_BLANK + word for word in "Es war einmal ein Fuchs, der hieß".split()),
    *(_BYTES[byte] for byte in "🦊".encode()),
    *(_BLANK + word for word in "und lebte im Wald. Jeden Tag zählte er die 木 bis es dunkel wurde.".split()),
]
_WORDS = [piece for piece in _STORY if piece not in _BYTES]
_VOCABULARY = ["<unk>", "<s>", "</s>", *_BYTES, _BLANK, *_WORDS]
_UNKNOWN, _BEGIN, _END = range(3)

# The prompt ends with the user's last byte.
_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"

# How GGUF numbers types of values, and kinds of tokens.
_UINT32, _INT32, _FLOAT32, _STRING, _ARRAY = 4, 5, 6, 8, 9
_NORMAL, _IS_UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_ALIGNMENT = 32

# Its shape, the innermost size first, and its numbers.
Tensor = tuple[tuple[int, ...], list[float]]


def write_model(path: Path) -> None:
    """Write it; always the same bytes."""
    path.write_bytes(_file(_settings(), dict(_tensors(random.Random(7)))))


def _next_of(token: int) -> int:
    """Which token comes after this one."""
    piece = _VOCABULARY[token]
    if piece not in _STORY:
        return _VOCABULARY.index(_WORDS[token % len(_WORDS)])
    rest = _STORY[_STORY.index(piece) + 1 :]
    return _VOCABULARY.index(rest[0]) if rest else _END


def _tensors(chance: random.Random) -> Iterator[tuple[str, Tensor]]:
    """Each by its name.

    A token is embedded as the direction of what comes next, which the output finds again. What the layer between them
    does is noise: it is there to be run through.
    """

    size = len(_VOCABULARY)
    ways = [_direction(chance) for _ in range(size)]
    yield "token_embd.weight", ((_WIDTH, size), [x for token in range(size) for x in ways[_next_of(token)]])
    yield "output.weight", ((_WIDTH, size), [_CERTAINTY * x for way in ways for x in way])
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        yield f"{name}.weight", ((_WIDTH,), [1.0] * _WIDTH)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        yield f"blk.0.{name}.weight", ((_WIDTH, _WIDTH), [chance.gauss(0, _NOISE) for _ in range(_WIDTH * _WIDTH)])


def _direction(chance: random.Random) -> list[float]:
    drawn = [chance.gauss(0, 1) for _ in range(_WIDTH)]
    length = math.hypot(*drawn)
    return [x / length for x in drawn]


def _settings() -> dict[str, bytes]:
    """What the file says before the tensors: values with their type."""
    kinds = {_UNKNOWN: _IS_UNKNOWN, _BEGIN: _CONTROL, _END: _CONTROL}
    kinds |= {_VOCABULARY.index(piece): _BYTE for piece in _BYTES}
    tokens = range(len(_VOCABULARY))
    numbers = {
        "llama.context_length": _CONTEXT,
        "llama.embedding_length": _WIDTH,
        "llama.feed_forward_length": _WIDTH,
        "llama.block_count": 1,
        "llama.attention.head_count": _HEADS,
        "llama.rope.dimension_count": _WIDTH // _HEADS,
        "tokenizer.ggml.unknown_token_id": _UNKNOWN,
        "tokenizer.ggml.bos_token_id": _BEGIN,
        "tokenizer.ggml.eos_token_id": _END,
    }
    return {
        "general.architecture": _typed(_STRING, _text("llama")),
        **{name: _typed(_UINT32, struct.pack("<I", number)) for name, number in numbers.items()},
        "llama.attention.layer_norm_rms_epsilon": _typed(_FLOAT32, struct.pack("<f", 1e-5)),
        "tokenizer.ggml.model": _typed(_STRING, _text("llama")),
        "tokenizer.ggml.tokens": _typed(_ARRAY, _many(_STRING, [_text(piece) for piece in _VOCABULARY])),
        "tokenizer.ggml.scores": _typed(_ARRAY, _many(_FLOAT32, [struct.pack("<f", -token) for token in tokens])),
        "tokenizer.ggml.token_type": _typed(
            _ARRAY, _many(_INT32, [struct.pack("<i", kinds.get(token, _NORMAL)) for token in tokens])
        ),
        "tokenizer.chat_template": _typed(_STRING, _text(_TEMPLATE)),
    }


def _file(settings: Mapping[str, bytes], tensors: Mapping[str, Tensor]) -> bytes:
    """The third version of GGUF: a head, then the tensors, each at an aligned place."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings))
    head += b"".join(_text(name) + value for name, value in settings.items())
    body = b""
    for name, (shape, numbers) in tensors.items():
        sizes = b"".join(struct.pack("<Q", size) for size in shape)
        head += _text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", 0, len(body))
        body += _aligned(struct.pack(f"<{len(numbers)}f", *numbers))
    return _aligned(head) + body


def _typed(kind: int, value: bytes) -> bytes:
    return struct.pack("<I", kind) + value


def _many(kind: int, values: Sequence[bytes]) -> bytes:
    return struct.pack("<IQ", kind, len(values)) + b"".join(values)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)
