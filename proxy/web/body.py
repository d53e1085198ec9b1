"""The body of a request: invited, read in the time it may take, unpacked, and bounded in what it becomes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import hdrs, web

from proxy.config.loader import ConnectionLimits
from proxy.errors import BodyTooLarge, InvalidRequest, TooSlow, UnsupportedEncoding
from proxy.formats.multipart import Form, FormReader
from proxy.upstreams.spool import Spool
from proxy.web.codings import CODINGS, PIECE_BYTES, Unpacking

# OpenAI takes tens of megabytes (pictures and files as base64); this is after unpacking, and before it too.
REQUEST_BYTES_MAX = 32 * 2**20
# Sounds and pictures, which go to the disk; OpenAI takes no file that is larger.
FORM_BYTES_MAX = 512 * 2**20
_TOO_LARGE = f"The request's body is larger than {REQUEST_BYTES_MAX} bytes."
_ACCEPTED = ", ".join(CODINGS)
# RFC 9110 §8.4.1.3: an older name of the same.
_ALIASES = {"x-gzip": "gzip"}


async def when_it_is_read(request: web.Request) -> None:
    """For routes, as `expect_handler`: `Expect: 100-continue` is answered when the body is read, and not before.

    The server library would invite a body of any size from anybody.
    """


async def read_body(request: web.Request, limits: ConnectionLimits) -> bytes:
    """The whole body, for a client that is known.

    Raises BodyTooLarge, InvalidRequest, TooSlow and UnsupportedEncoding.
    """
    if request.content_type.startswith("multipart/"):
        raise UnsupportedEncoding("This endpoint takes JSON: send `Content-Type: application/json`.")
    unpacking = _unpacking_of(request)
    if request.content_length is not None and request.content_length > REQUEST_BYTES_MAX:
        raise BodyTooLarge(_TOO_LARGE)
    async with _in_time(request, limits) as grant:
        body = await _gather(request, unpacking, grant)
    if unpacking is not None:
        unpacking.end()
    return bytes(body)


async def read_form(request: web.Request, spool: Spool, limits: ConnectionLimits) -> Form:
    """The form in a body, which goes to `spool` as it comes, for a client that is known; raises as `read_body`.

    And NoSpace.
    """
    reader = FormReader(request.headers.get(hdrs.CONTENT_TYPE, ""))
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise UnsupportedEncoding("Send a form without a content coding.")
    too_large = BodyTooLarge(f"The form is larger than {FORM_BYTES_MAX} bytes.")
    if request.content_length is not None and request.content_length > FORM_BYTES_MAX:
        raise too_large
    async with _in_time(request, limits) as grant:
        async for chunk in request.content.iter_any():
            if spool.size + len(chunk) > FORM_BYTES_MAX:
                raise too_large
            reader.feed(chunk)
            await spool.write(chunk)
            grant(spool.size)
    await spool.flush()
    return reader.end()


@asynccontextmanager
async def _in_time(request: web.Request, limits: ConnectionLimits) -> AsyncIterator[Callable[[int], None]]:
    """Invite the body and give it its time, and more for what has arrived, which the yielded function is told."""
    await _invite(request)
    begun_at = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(limits.body_s) as deadline:
            yield lambda arrived: deadline.reschedule(begun_at + limits.body_s + arrived / limits.body_bytes_per_s)
    except TimeoutError:
        raise TooSlow("The request's body came too slowly.") from None
    except web.RequestPayloadError:
        raise InvalidRequest("The body could not be read: it is cut short or badly framed.") from None


async def _gather(request: web.Request, unpacking: Unpacking | None, grant: Callable[[int], None]) -> bytearray:
    """The body, unpacked; `grant` is told how many bytes have arrived, which gives it more time."""
    arrived, body = 0, bytearray()
    # Not `request.read()`, which would keep a second copy for as long as the answer streams.
    async for chunk in request.content.iter_any():
        arrived += len(chunk)
        grant(arrived)
        if arrived > REQUEST_BYTES_MAX:
            raise BodyTooLarge(_TOO_LARGE)
        for piece in (chunk,) if unpacking is None else unpacking.feed(chunk):
            body += piece
            if len(body) > REQUEST_BYTES_MAX:
                raise BodyTooLarge(_TOO_LARGE)
            if len(piece) == PIECE_BYTES:
                await asyncio.sleep(0)  # a few packets can hold all that is allowed: others have their turn
    return body


def _unpacking_of(request: web.Request) -> Unpacking | None:
    """What undoes the body's coding; None where it has none."""
    named = ",".join(request.headers.getall(hdrs.CONTENT_ENCODING, ())).strip().lower()
    coding = _ALIASES.get(named, named)
    if coding in ("", "identity"):
        return None
    if coding not in CODINGS:
        raise UnsupportedEncoding(
            f"The content coding {coding[:40]!r} can't be read here: send one of {_ACCEPTED}, or none.",
            headers={"accept-encoding": _ACCEPTED},  # RFC 9110 §15.5.16
        )
    return Unpacking(coding)


async def _invite(request: web.Request) -> None:
    """Tell a client that asked first that its body is wanted."""
    if request.version == (1, 1) and request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the response itself has not begun
