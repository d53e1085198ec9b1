"""Reads the body of a request: asks for it, bounds its time and its size, and decompresses it.

A body is read only for a client whose key is known. Its size is bounded as it was sent and as it is after
decompression: half a megabyte of gzip can become 512 MB, and no more of it is ever made than the limit allows.

The server library could decompress bodies too. It is not used for that, because it leaves the header Content-Encoding
on a body that it has decompressed, and passes other encodings (`x-gzip`, several in a row) on without an error.
"""

import asyncio
import sys
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Protocol

import brotli
from aiohttp import hdrs, web

from proxy.config.loader import ConnectionLimits
from proxy.errors import BodyTooLarge, InvalidRequest, TooSlow, UnsupportedEncoding
from proxy.formats.multipart import Form, FormReader
from proxy.upstreams.spool import Spool
from proxy.web.body_memory import REQUEST_BYTES_MAX, BodyShare

if sys.version_info >= (3, 14):  # pragma: no cover
    from compression import zstd
else:
    from backports import zstd

# Uploads of audio and images, which go to the disk. OpenAI accepts no larger file.
FORM_BYTES_MAX = 512 * 2**20
# Decompressed data is produced in pieces of at most this size. Nearly every body is smaller and comes in one piece.
PIECE_BYTES = 256 * 1024
# gzip and zstd allow several members (frames) in a row; a real body has one. Each costs a new decoder, and an empty
# zstd frame has only nine bytes, so 32 MiB could ask for 3.7 million decoders.
MEMBERS_MAX = 1000
# How long a body may pause. A client that stops in the middle would otherwise hold memory for as long as what it has
# sent allows: half of 32 MiB is worth five minutes.
_PAUSE_S = 30.0
# RFC 9659: a zstd body may need a window of at most 8 MiB (2^23). Without the limit a frame could ask for 128 MiB.
_ZSTD_WINDOW_LOG_MAX = 23
# RFC 9110 §8.4.1.3: x-gzip is an older name of gzip.
_ALIASES = {"x-gzip": "gzip"}
_TOO_LARGE = f"The request's body is larger than {REQUEST_BYTES_MAX} bytes."


async def defer_continue(request: web.Request) -> None:
    """The `expect_handler` of every route. It does nothing: `read_body` and `read_form` answer the header instead.

    With `Expect: 100-continue` a client sends the head alone and waits for a status. On 100 it sends the body, on a
    final status it does not. The library's own handler answers 100 before any middleware or handler runs, so a client
    with a wrong key would send its 50 MB and get the 401 afterwards.
    """


async def read_body(request: web.Request, limits: ConnectionLimits, share: BodyShare) -> bytearray:
    """The whole body, decompressed, in the memory of `share`. Call it only when the client's key has been checked.

    It is not copied into `bytes`, because that blocks the event loop for 10 ms if the body is large.

    Raises BodyTooLarge, InvalidRequest, TooSlow and UnsupportedEncoding, and what `share.hold` raises.
    """
    if request.content_type.startswith("multipart/"):
        raise UnsupportedEncoding("This endpoint takes JSON: send `Content-Type: application/json`.")
    decoder = _decoder_for(request)
    if request.content_length is not None and request.content_length > REQUEST_BYTES_MAX:
        raise BodyTooLarge(_TOO_LARGE)
    await share.hold(request.content_length or 0)
    async with _receiving(request, limits) as on_received:
        body = await _read_decoded(request, decoder, share, on_received)
    if decoder is not None:
        decoder.end()
    return body


async def read_form(request: web.Request, spool: Spool, limits: ConnectionLimits, share: BodyShare) -> Form:
    """The form in a multipart body, which is written to `spool` while it arrives.

    Call it only when the client's key has been checked. Raises what `read_body` raises, and NoSpace. It takes no
    memory of `share`, because it goes to the disk.
    """
    reader = FormReader(request.headers.get(hdrs.CONTENT_TYPE, ""))
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise UnsupportedEncoding("Send the form without a Content-Encoding.")
    too_large = BodyTooLarge(f"The form is larger than {FORM_BYTES_MAX} bytes.")
    if request.content_length is not None and request.content_length > FORM_BYTES_MAX:
        raise too_large
    await share.check(request.content_length or 0)
    async with _receiving(request, limits) as on_received:
        async for chunk in request.content.iter_any():
            if spool.size + len(chunk) > FORM_BYTES_MAX:
                raise too_large
            await share.check(spool.size + len(chunk))
            reader.feed(chunk)
            await spool.write(chunk)
            on_received(spool.size)
    await spool.flush()
    return reader.end()


@asynccontextmanager
async def _receiving(request: web.Request, limits: ConnectionLimits) -> AsyncIterator[Callable[[int], None]]:
    """Ask for the body and bound the time of the block that receives it. Raises TooSlow and InvalidRequest.

    The block calls the yielded function with the number of bytes received so far, which moves the deadline:

        deadline = begin + body_s + received / body_bytes_per_s, but at most 30 s from now

    With the defaults (30 s, 64 KiB/s), a client that has sent 640 KiB has 30 + 10 = 40 s in all. A client that sends
    at 64 KiB/s or more never reaches its deadline; one that sends a byte per second is cut off after 30 s.
    """
    await _send_continue(request)
    loop = asyncio.get_running_loop()
    begun_at = loop.time()
    try:
        async with asyncio.timeout(limits.body_s) as deadline:

            def on_received(received: int) -> None:
                until = begun_at + limits.body_s + received / limits.body_bytes_per_s
                deadline.reschedule(min(until, loop.time() + _PAUSE_S))

            yield on_received
    except TimeoutError:
        raise TooSlow("The request's body came too slowly.") from None
    except web.RequestPayloadError:
        raise InvalidRequest("The body could not be read: it is incomplete, or its framing is invalid.") from None


async def _send_continue(request: web.Request) -> None:
    """Answer `Expect: 100-continue` with 100, so that the client sends its body.

    In HTTP/1.0 the header has no meaning (RFC 9110 §10.1.1).
    """
    if request.version == (1, 1) and request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # The library takes a size above 0 to mean that the response has begun. Then an error could not be answered.
        request.writer.output_size = 0


async def _read_decoded(
    request: web.Request, decoder: "BodyDecoder | None", share: BodyShare, on_received: Callable[[int], None]
) -> bytearray:
    """Receive and decompress the body. Raises BodyTooLarge if it exceeds the limit before or after decompression."""
    received, body = 0, bytearray()
    # Not `request.read()`: the request object would keep a second copy for as long as the answer streams.
    async for chunk in request.content.iter_any():
        received += len(chunk)
        on_received(received)
        if received > REQUEST_BYTES_MAX:
            raise BodyTooLarge(_TOO_LARGE)
        for piece in (chunk,) if decoder is None else decoder.feed(chunk):
            if len(body) + len(piece) > REQUEST_BYTES_MAX:
                raise BodyTooLarge(_TOO_LARGE)
            await share.hold(len(body) + len(piece))
            body += piece
            if len(piece) == PIECE_BYTES:
                # One packet can decompress to 32 MiB. Other tasks get their turn after every 256 KiB.
                await asyncio.sleep(0)
    return body


# -------------------------------------------------------------------------------------------------- content encodings


def _decoder_for(request: web.Request) -> "BodyDecoder | None":
    """The decoder of the body's content encoding; None if it has none. Raises UnsupportedEncoding."""
    named = ",".join(request.headers.getall(hdrs.CONTENT_ENCODING, ())).strip().lower()
    encoding = _ALIASES.get(named, named)
    if encoding in ("", "identity"):
        return None
    # Several encodings in a row ("gzip, zstd") are refused like an unknown one: each could multiply the size again.
    if encoding not in CONTENT_ENCODINGS:
        supported = ", ".join(CONTENT_ENCODINGS)
        raise UnsupportedEncoding(
            f"The content encoding {encoding[:40]!r} is not supported: send one of {supported}, or none.",
            headers={"accept-encoding": supported},  # RFC 9110 §15.5.16
        )
    return BodyDecoder(encoding)


class BodyDecoder:
    """Decompresses one body in one of CONTENT_ENCODINGS, piece by piece.

    Both methods raise InvalidRequest if the body is not in the format of its encoding.
    """

    def __init__(self, encoding: str) -> None:
        self._new_member = CONTENT_ENCODINGS[encoding]
        self._member: _Decoder | None = None
        self._members = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The decompressed bytes of `data`, in pieces of at most PIECE_BYTES.

        A piece is made only when the iterator is asked for it, so a caller that stops at a limit never holds more.
        """
        try:
            yield from self._pieces(data)
        except (zlib.error, brotli.error, zstd.ZstdError):
            raise InvalidRequest(
                "The body can't be decompressed: it is not in the format that its Content-Encoding names."
            ) from None

    def end(self) -> None:
        """Check that the body is complete."""
        if self._member is not None and not self._member.eof:
            raise InvalidRequest("The body can't be decompressed: its end is missing.")

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        # Goes on without data while the current member has output left that did not fit into the last piece.
        while data or not (self._member is None or self._member.needs_input or self._member.eof):
            if self._member is None or self._member.eof:
                self._members += 1
                if self._members > MEMBERS_MAX:
                    raise InvalidRequest(f"The body can't be decompressed: it has more than {MEMBERS_MAX} members.")
                self._member = self._new_member(data)
            if piece := self._member.decompress(data, PIECE_BYTES):
                yield piece
            data = self._member.unused_data if self._member.eof else b""


class _Decoder(Protocol):
    """Decompresses one member. This is the interface of ZstdDecompressor; the classes below adapt zlib and brotli.

    `eof` is true after the member's last byte; `unused_data` is what follows it. While `needs_input` is false, more
    output can be had with an empty `data`.
    """

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _ZlibDecoder:
    def __init__(self, wbits: int) -> None:
        self._inflate = zlib.decompressobj(wbits)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        piece = self._inflate.decompress(self._inflate.unconsumed_tail + data, max_length)
        # After a full piece zlib may have more output inside, even if it has consumed all input.
        self.needs_input = len(piece) < max_length
        return piece


class _BrotliDecoder:
    unused_data = b""  # brotli itself raises an error if bytes follow its end

    def __init__(self) -> None:
        self._decoder = brotli.Decompressor()
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return bool(self._decoder.is_finished())

    def decompress(self, data: bytes, max_length: int) -> bytes:
        # brotli checks the limit only when a buffer is full, and each buffer is up to four times as large as the one
        # before. With a quarter of the length as its limit, the output never exceeds the length.
        piece = bytes(self._decoder.process(data, output_buffer_limit=max_length // 4))
        # brotli notices its end only when it is asked again after the last byte of output.
        self.needs_input = not piece and bool(self._decoder.can_accept_more_data())
        return piece


def _gzip(_: bytes) -> _Decoder:
    return _ZlibDecoder(16 + zlib.MAX_WBITS)  # 16 selects gzip's header and checksum


def _deflate(data: bytes) -> _Decoder:
    # RFC 9110 §8.4.1.2: the encoding is the zlib format, but some clients send raw deflate without the header of two
    # bytes. The first byte tells them apart: its low four bits are 8 in a zlib header. In raw deflate they are 8
    # only if a padding bit is set, which encoders leave 0 (RFC 1951 §3.2.4).
    return _ZlibDecoder(zlib.MAX_WBITS if data[0] & 0x0F == zlib.DEFLATED else -zlib.MAX_WBITS)


def _br(_: bytes) -> _Decoder:
    return _BrotliDecoder()


def _zstd(_: bytes) -> _Decoder:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG_MAX})


# Each encoding with the function that creates a decoder for a member that begins with the given bytes.
CONTENT_ENCODINGS: Mapping[str, Callable[[bytes], _Decoder]] = {
    "gzip": _gzip,
    "deflate": _deflate,
    "br": _br,
    "zstd": _zstd,
}
