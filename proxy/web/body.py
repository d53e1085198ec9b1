"""Reads the body of a request: asks for it, bounds its time and its size, and decompresses it.

A body is read only for a client whose key is known. Its size is bounded as it was sent and as it is after
decompression: half a megabyte of gzip can become 512 MB, and no more of it is ever made than the limit allows.

The server library could decompress bodies too. It is not used for that, because it leaves the header Content-Encoding
on a body that it has decompressed, and passes other encodings (`x-gzip`, several in a row) on without an error.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import hdrs, web

from proxy.calls.body_threads import SMALL_BYTES_MAX
from proxy.config.loader import ConnectionLimits
from proxy.errors import BodyTooLarge, InvalidRequest, TooSlow, UnsupportedEncoding
from proxy.formats.content_encoding import CONTENT_ENCODINGS, PIECE_BYTES, BodyDecoder, NotDecodable, encoding_of
from proxy.formats.multipart import Form, FormReader
from proxy.upstreams.spool import Spool
from proxy.web.body_memory import REQUEST_BYTES_MAX, BodyShare

# Uploads of audio and images, which go to the disk. OpenAI accepts no larger file.
FORM_BYTES_MAX = 512 * 2**20
# How long a body may pause. A client that stops in the middle would otherwise hold memory for as long as what it has
# sent allows: half of 32 MiB is worth five minutes.
_PAUSE_S = 30.0


async def defer_continue(request: web.Request) -> None:
    """The `expect_handler` of every route. It does nothing: `read_body` and `read_form` answer the header instead.

    With `Expect: 100-continue` a client sends the head alone and waits for a status. On 100 it sends the body, on a
    final status it does not. The library's own handler answers 100 before any middleware or handler runs, so a client
    with a wrong key would send its 50 MB and get the 401 afterwards.
    """


async def read_body(
    request: web.Request, limits: ConnectionLimits, share: BodyShare, *, bytes_max: int = REQUEST_BYTES_MAX
) -> bytes | bytearray:
    """The whole body, decompressed, in the memory of `share`. Call it only when the client's key has been checked.

    It has at most `bytes_max` bytes, before and after decompression.

    A body in pieces is not copied into `bytes`, because that blocks the event loop for 10 ms if it is large.

    Raises BodyTooLarge, InvalidRequest, TooSlow and UnsupportedEncoding, and what `share.hold` raises.
    """
    if request.headers.get(hdrs.CONTENT_TYPE, "").strip().lower().startswith("multipart/"):
        raise UnsupportedEncoding("This endpoint takes JSON: send `Content-Type: application/json`.")
    decoder = _decoder_for(request) if hdrs.CONTENT_ENCODING in request.headers else None
    length = request.content_length or 0
    if length > bytes_max:
        raise _too_large(bytes_max)
    if length > SMALL_BYTES_MAX:
        await share.hold(length)
    if length and decoder is None and request.content.is_eof():  # it has come with its head
        return request.content.read_nowait()
    try:
        async with _receiving(request, limits) as on_received:
            body = await _read_decoded(request, decoder, share, bytes_max=bytes_max, on_received=on_received)
        if decoder is not None:
            decoder.end()
    except NotDecodable as error:
        raise InvalidRequest(str(error)) from None
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
    request: web.Request,
    decoder: BodyDecoder | None,
    share: BodyShare,
    *,
    bytes_max: int,
    on_received: Callable[[int], None],
) -> bytearray:
    """Receive and decompress the body. Raises BodyTooLarge if it exceeds the limit before or after decompression."""
    received, body = 0, bytearray()
    # Not `request.read()`: the request object would keep a second copy for as long as the answer streams.
    async for chunk in request.content.iter_any():
        received += len(chunk)
        on_received(received)
        if received > bytes_max:
            raise _too_large(bytes_max)
        for piece in (chunk,) if decoder is None else decoder.feed(chunk):
            if len(body) + len(piece) > bytes_max:
                raise _too_large(bytes_max)
            await share.hold(len(body) + len(piece))
            body += piece
            if len(piece) == PIECE_BYTES:
                # One packet can decompress to 32 MiB. Other tasks get their turn after every 256 KiB.
                await asyncio.sleep(0)
    return body


def _too_large(bytes_max: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request's body is larger than {bytes_max} bytes.")


def _decoder_for(request: web.Request) -> BodyDecoder | None:
    """The decoder of the body's content encoding; None if it has none. Raises UnsupportedEncoding."""
    encoding = encoding_of(request.headers.getall(hdrs.CONTENT_ENCODING, ()))
    if not encoding:
        return None
    # Several encodings in a row ("gzip, zstd") are refused like an unknown one: each could multiply the size again.
    if encoding not in CONTENT_ENCODINGS:
        supported = ", ".join(CONTENT_ENCODINGS)
        raise UnsupportedEncoding(
            f"The content encoding {encoding[:40]!r} is not supported: send one of {supported}, or none.",
            headers={"accept-encoding": supported},  # RFC 9110 §15.5.16
        )
    return BodyDecoder(encoding)
