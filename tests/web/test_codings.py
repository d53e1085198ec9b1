"""Content codings are undone in small pieces, whatever they become; what isn't what it says is a 400.

Threats T29.
"""

import gzip
import os
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial

import brotli
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import InvalidRequest
from proxy.web.body import CONTENT_ENCODINGS, MEMBERS_MAX, PIECE_BYTES, BodyDecoder

TEXT = b'{"model": "fast"}'
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": partial(brotli.compress, quality=1),
    "zstd": zstd.compress,
}


def unpacked(coding: str, *chunks: bytes) -> bytes:
    """What a body in these chunks stands for."""
    unpacking = BodyDecoder(coding)
    pieces = [piece for chunk in chunks for piece in unpacking.feed(chunk)]
    unpacking.end()
    assert all(0 < len(piece) <= PIECE_BYTES for piece in pieces)
    return b"".join(pieces)


def raw_deflate(body: bytes) -> bytes:
    """Deflate without zlib's head and sum."""
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


def test_each_coding_has_its_row() -> None:
    """A coding that is added is tested like the others."""
    assert PACK.keys() == CONTENT_ENCODINGS.keys()


@pytest.mark.parametrize("coding", CONTENT_ENCODINGS)
@given(body=st.binary(max_size=300), step=st.integers(1, 40))
def test_a_body_comes_out_as_it_went_in_however_it_is_cut(coding: str, body: bytes, step: int) -> None:
    """Where the network cut it never matters."""
    packed = PACK[coding](body)
    assert unpacked(coding, *(packed[at : at + step] for at in range(0, len(packed), step))) == body


@pytest.mark.parametrize("coding", CONTENT_ENCODINGS)
@pytest.mark.parametrize("size", [PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
def test_what_is_larger_than_a_piece_is_whole(coding: str, size: int) -> None:
    """Also where a piece ends just where the body does, and where it can't be packed at all."""
    for body in (b"a" * size, os.urandom(size)):
        assert unpacked(coding, PACK[coding](body)) == body


def test_deflate_may_lack_its_head() -> None:
    """There are clients that send it so, and browsers have always taken it."""
    assert unpacked("deflate", raw_deflate(TEXT)) == TEXT


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_members_one_after_the_other_are_one_body(coding: str) -> None:
    """Both formats say so; but each member costs a decoder, so not any number of them."""
    member = PACK[coding](b"ab")
    assert unpacked(coding, member + member[:5], member[5:]) == b"abab"
    with pytest.raises(InvalidRequest, match="more than 1000 members"):
        unpacked(coding, PACK[coding](b"") * (MEMBERS_MAX + 1))


@pytest.mark.parametrize("coding", CONTENT_ENCODINGS)
def test_nothing_is_nothing(coding: str) -> None:
    """An empty body has no coding to be undone."""
    assert unpacked(coding) == unpacked(coding, b"") == b""


@pytest.mark.parametrize("coding", CONTENT_ENCODINGS)
def test_a_body_that_is_not_what_it_says_is_a_400(coding: str) -> None:
    """Plain JSON, a sum that is wrong, a body that is cut off, and one with something behind it."""
    packed = PACK[coding](TEXT)
    for wrong in (TEXT, packed[:-1], packed + b"x", packed + b"\0" * 20):
        with pytest.raises(InvalidRequest, match="can't be unpacked"):
            unpacked(coding, wrong)


def test_a_zstd_frame_may_not_ask_for_a_large_window() -> None:
    """RFC 9659: 8 MiB and no more, whatever the frame says it needs."""

    def frame(window_log: int) -> bytes:
        packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: window_log})
        return packer.compress(TEXT) + packer.flush()

    assert unpacked("zstd", frame(23)) == TEXT
    with pytest.raises(InvalidRequest, match="can't be unpacked"):
        unpacked("zstd", frame(24))


@pytest.mark.parametrize("coding", CONTENT_ENCODINGS)
def test_a_bomb_stays_small_while_nobody_reads_on(coding: str) -> None:
    """What it becomes is made piece by piece: who stops reading at a limit never holds more than that."""
    bomb = PACK[coding](b"\0" * (64 * 2**20))
    tracemalloc.start()
    pieces = BodyDecoder(coding).feed(bomb)
    read = sum(len(next(pieces)) for _ in range(4))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < read <= 4 * PIECE_BYTES
    assert most < 2 * 2**20
