"""Decompression in pieces, within bounds (T29)."""

import json
import os
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial
from gzip import compress

import brotli
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.content_encoding import (
    CONTENT_ENCODINGS,
    MEMBERS_MAX,
    PIECE_BYTES,
    BodyDecoder,
    NotDecodable,
    encoding_of,
)

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": compress,
    "deflate": zlib.compress,
    "br": partial(brotli.compress, quality=1),
    "zstd": zstd.compress,
}


@pytest.mark.parametrize(
    ("headers", "encoding"),
    [
        ((), ""),
        (("",), ""),
        (("identity", "IDENTITY, "), ""),
        (("GZip",), "gzip"),
        (("x-gzip",), "gzip"),
        (("identity, gzip",), "gzip"),
        (("gzip, br",), "gzip,br"),
        (("gzip", "gzip"), "gzip,gzip"),
        (("made-up",), "made-up"),
    ],
)
def test_the_header_names_the_encoding(headers: tuple[str, ...], encoding: str) -> None:
    """T29: in any case, with `identity` and empty items left out, over several lines."""
    assert encoding_of(headers) == encoding


def decompressed(encoding: str, *chunks: bytes) -> bytes:
    """The decompressed body that arrives in these chunks."""
    decoder = BodyDecoder(encoding)
    pieces = [piece for chunk in chunks for piece in decoder.feed(chunk)]
    decoder.end()
    assert all(0 < len(piece) <= PIECE_BYTES for piece in pieces)
    return b"".join(pieces)


def raw_deflate(body: bytes) -> bytes:
    """Deflate without the header and the checksum of zlib."""
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(body) + compressor.flush()


TEXT = b'{"model": "fast"}'


def test_every_content_encoding_is_tested() -> None:
    """An encoding that is added needs a compressor here."""
    assert COMPRESS.keys() == CONTENT_ENCODINGS.keys()


@pytest.mark.parametrize("encoding", CONTENT_ENCODINGS)
@given(body=st.binary(max_size=300), step=st.integers(1, 40))
def test_a_body_may_arrive_in_chunks_of_any_size(encoding: str, body: bytes, step: int) -> None:
    """The decompressed body does not depend on how the network splits it."""
    compressed = COMPRESS[encoding](body)
    assert decompressed(encoding, *(compressed[at : at + step] for at in range(0, len(compressed), step))) == body


@pytest.mark.parametrize("encoding", CONTENT_ENCODINGS)
@pytest.mark.parametrize("size", [PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
def test_a_body_of_several_pieces_is_complete(encoding: str, size: int) -> None:
    """Also if a piece ends exactly where the body does, and if the body can't be compressed at all."""
    for body in (b"a" * size, os.urandom(size)):
        assert decompressed(encoding, COMPRESS[encoding](body)) == body


def test_deflate_without_the_zlib_header_is_accepted() -> None:
    """Some clients send it like this, and browsers have always accepted it."""
    assert decompressed("deflate", raw_deflate(TEXT)) == TEXT


@given(st.text("abcdefghij-0123456789XYZ", max_size=300), st.integers(0, 999))
def test_plain_json_is_no_raw_deflate(text: str, number: int) -> None:
    """Nothing of it is taken for compressed data."""
    for body in ({"id": text, "usage": number}, [text, number]):
        with pytest.raises(NotDecodable, match="can't be decompressed"):
            next(BodyDecoder("deflate").feed(json.dumps(body).encode()))


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_several_members_are_one_body_up_to_a_limit(encoding: str) -> None:
    """Both formats allow members in a row. Each costs a decoder, so their number is limited."""
    member = COMPRESS[encoding](b"ab")
    assert decompressed(encoding, member + member[:5], member[5:]) == b"abab"
    with pytest.raises(NotDecodable, match="more than 1000 members"):
        decompressed(encoding, COMPRESS[encoding](b"") * (MEMBERS_MAX + 1))


@pytest.mark.parametrize("encoding", CONTENT_ENCODINGS)
def test_an_empty_body_needs_no_decompression(encoding: str) -> None:
    """It is accepted whatever its Content-Encoding says."""
    assert decompressed(encoding) == decompressed(encoding, b"") == b""


@pytest.mark.parametrize("encoding", CONTENT_ENCODINGS)
def test_a_body_in_another_format_is_refused(encoding: str) -> None:
    """Plain JSON, an incomplete body, and bodies with bytes behind their end."""
    compressed = COMPRESS[encoding](TEXT)
    padded = [] if encoding == "gzip" else [compressed + b"\0" * 20]
    for wrong in (TEXT, compressed[:-1], compressed + b"x", *padded):
        with pytest.raises(NotDecodable, match="can't be decompressed"):
            decompressed(encoding, wrong)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_zeros_after_gzip_are_ignored(step: int) -> None:
    """As gzip(1) does. They may come before another member, but not before the first one."""
    padded = compress(b"ab") + b"\0" * 600 + compress(b"c") + b"\0"
    assert decompressed("gzip", *(padded[at : at + step] for at in range(0, len(padded), step))) == b"abc"
    with pytest.raises(NotDecodable, match="can't be decompressed"):
        decompressed("gzip", b"\0" + padded)
    with pytest.raises(NotDecodable, match="can't be decompressed"):
        decompressed("gzip", compress(b"ab") + b"\0\0x")


def test_a_zstd_frame_may_need_a_window_of_8_mib_and_no_more() -> None:
    """RFC 9659: 8 MiB is 2^23."""

    def frame(window_log: int) -> bytes:
        compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: window_log})
        return compressor.compress(TEXT) + compressor.flush()

    assert decompressed("zstd", frame(23)) == TEXT
    with pytest.raises(NotDecodable, match="can't be decompressed"):
        decompressed("zstd", frame(24))


@pytest.mark.parametrize("encoding", CONTENT_ENCODINGS)
def test_a_bomb_is_decompressed_only_as_far_as_it_is_read(encoding: str) -> None:
    """Four pieces of 64 MiB are read: less than 2 MiB of memory is used."""
    bomb = COMPRESS[encoding](b"\0" * (64 * 2**20))
    tracemalloc.start()
    pieces = BodyDecoder(encoding).feed(bomb)
    read = sum(len(next(pieces)) for _ in range(4))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < read <= 4 * PIECE_BYTES
    assert peak < 2 * 2**20
