"""A model that generates one story, small enough to be written by a test: 270 kB of GGUF, as llama.cpp loads it.

write_model(tmp_path / "tiny.gguf")

It reads UTF-8 byte by byte. The last byte of a prompt decides with which word of the story the answer begins. Each
word is followed by the next one, and the last word by the end token. So an answer ends by itself, unless its maximum
comes first. The fox emoji consists of four tokens, and no single one of them is a character.
"""

import math
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_WIDTH, _HEADS, _CONTEXT = 64, 2, 8192
# The logit of the next word is so much larger than the others that rounding errors do not change the answer.
_CERTAINTY = 2.0
_NOISE = 0.02

# SentencePiece's character for a space.
_SPACE = "▁"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# No token occurs twice, because the next token depends only on the current one.
_STORY = [
    *(_SPACE + word for word in "Es war einmal ein Fuchs, der hieß".split()),
    *(_BYTES[byte] for byte in "🦊".encode()),
    *(_SPACE + word for word in "und lebte im Wald. Jeden Tag zählte er die 木 bis es dunkel wurde.".split()),
]
_WORDS = [piece for piece in _STORY if piece not in _BYTES]
_VOCABULARY = ["<unk>", "<s>", "</s>", *_BYTES, _SPACE, *_WORDS]
_UNKNOWN, _BEGIN, _END = range(3)

# The prompt ends with the user's last byte.
_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"

# GGUF's numbers for the types of values, and for the types of tokens.
_UINT32, _INT32, _FLOAT32, _STRING, _ARRAY = 4, 5, 6, 8, 9
_NORMAL, _IS_UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_ALIGNMENT = 32

# The shape, with the innermost size first, and the numbers.
Tensor = tuple[tuple[int, ...], list[float]]


def write_model(path: Path) -> None:
    """Write the model. The bytes are the same every time."""
    path.write_bytes(_file(_metadata(), dict(_tensors(random.Random(7)))))


def _next_of(token: int) -> int:
    """The token that follows this one: the story's next word, or for a byte a word that depends on the byte."""
    piece = _VOCABULARY[token]
    if piece not in _STORY:
        return _VOCABULARY.index(_WORDS[token % len(_WORDS)])
    rest = _STORY[_STORY.index(piece) + 1 :]
    return _VOCABULARY.index(rest[0]) if rest else _END


def _tensors(rng: random.Random) -> Iterator[tuple[str, Tensor]]:
    """The tensors with their names.

    Each token has a random direction. The embedding of a token is the direction of the token that follows it, and the
    output matrix has all directions, so the next token has the largest logit. The one layer in between adds only
    noise; it exists so that llama.cpp has a layer to compute.
    """

    size = len(_VOCABULARY)
    directions = [_direction(rng) for _ in range(size)]
    yield "token_embd.weight", ((_WIDTH, size), [x for token in range(size) for x in directions[_next_of(token)]])
    yield "output.weight", ((_WIDTH, size), [_CERTAINTY * x for direction in directions for x in direction])
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        yield f"{name}.weight", ((_WIDTH,), [1.0] * _WIDTH)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        yield f"blk.0.{name}.weight", ((_WIDTH, _WIDTH), [rng.gauss(0, _NOISE) for _ in range(_WIDTH * _WIDTH)])


def _direction(rng: random.Random) -> list[float]:
    vector = [rng.gauss(0, 1) for _ in range(_WIDTH)]
    length = math.hypot(*vector)
    return [x / length for x in vector]


def _metadata() -> dict[str, bytes]:
    """The key-value pairs at the beginning of the file; each value with its type."""
    types = {_UNKNOWN: _IS_UNKNOWN, _BEGIN: _CONTROL, _END: _CONTROL}
    types |= {_VOCABULARY.index(piece): _BYTE for piece in _BYTES}
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
        "tokenizer.ggml.tokens": _typed(_ARRAY, _array(_STRING, [_text(piece) for piece in _VOCABULARY])),
        "tokenizer.ggml.scores": _typed(_ARRAY, _array(_FLOAT32, [struct.pack("<f", -token) for token in tokens])),
        "tokenizer.ggml.token_type": _typed(
            _ARRAY, _array(_INT32, [struct.pack("<i", types.get(token, _NORMAL)) for token in tokens])
        ),
        "tokenizer.chat_template": _typed(_STRING, _text(_TEMPLATE)),
    }


def _file(metadata: Mapping[str, bytes], tensors: Mapping[str, Tensor]) -> bytes:
    """A file in version 3 of GGUF: a header, then the data of the tensors, each at an aligned offset."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_text(name) + value for name, value in metadata.items())
    body = b""
    for name, (shape, numbers) in tensors.items():
        sizes = b"".join(struct.pack("<Q", size) for size in shape)
        head += _text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", 0, len(body))
        body += _aligned(struct.pack(f"<{len(numbers)}f", *numbers))
    return _aligned(head) + body


def _typed(type_number: int, value: bytes) -> bytes:
    return struct.pack("<I", type_number) + value


def _array(type_number: int, values: Sequence[bytes]) -> bytes:
    return struct.pack("<IQ", type_number, len(values)) + b"".join(values)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)
