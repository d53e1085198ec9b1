"""One request to an upstream on its way: from its settings to the head of its answer.

Errors are distinguished by whether the upstream can have received the call. A request that got no connection, also
because a proxy refused one, is provably free. The times of connecting, of writing the body and of waiting for the
head are limited one after another, each from its own beginning.
"""

import asyncio
import io
import os
import ssl
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from proxy.errors import UpstreamError, UpstreamTimeout, drop_frames
from proxy.policy.catalog import Transport, Upstream
from proxy.upstreams.network import proxy_authorization, proxy_server
from proxy.upstreams.spool import Spliced

# A large body may take longer to send: with 64 KiB/s, one of 512 MB has two hours and a quarter more.
_SENT_BYTES_PER_S = 64 * 1024
# The largest body that is sent with one write. The HTTP library warns of larger ones.
_ONE_WRITE_BYTES_MAX = 2**20


@dataclass(frozen=True, slots=True)
class Settings:
    """An upstream's `transport` as the HTTP library takes it.

    `headers` are sent to the upstream with each request. `proxy` has no password, which is in `proxy_headers`. The
    library sends these with CONNECT alone.
    """

    transport: Transport
    timeout: aiohttp.ClientTimeout
    headers: Mapping[str, str]
    tls: ssl.SSLContext | bool
    proxy: URL | None
    proxy_headers: Mapping[str, str] | None
    idle_s: float
    first_byte_s: float | None

    def fit(self, upstream: Upstream) -> bool:
        """Whether they are those of this upstream, whose configuration may have changed."""
        return self.transport is upstream.transport or self.transport == upstream.transport


def settings_of(transport: Transport, tls: ssl.SSLContext | bool) -> Settings:
    """The settings for this `transport`. `tls` is True if only the system's certificates are trusted."""
    connect_s, idle_s = transport.connect_timeout_ms / 1000, transport.idle_timeout_ms / 1000
    first_byte_s = (transport.first_byte_timeout_ms or inf) / 1000
    proxy = "" if transport.proxy is None else transport.proxy.reveal()
    authorization = proxy_authorization(proxy)
    return Settings(
        transport,
        # No total time limit, because a long answer is no failure. The library's limit of a silence does not notice
        # every one, so `Sending` and `_Watch` have their own.
        timeout=aiohttp.ClientTimeout(total=None, connect=connect_s, sock_connect=connect_s, sock_read=None),
        headers={name: value.reveal() for name, value in transport.headers},
        tls=tls,
        proxy=URL(proxy_server(proxy)) if proxy else None,
        proxy_headers={"proxy-authorization": authorization} if authorization else None,
        idle_s=idle_s,
        # Only one that is shorter than the other limit has an effect.
        first_byte_s=first_byte_s if first_byte_s < idle_s else None,
    )


class Sending:
    """One request on its way: how much of it is written, and until when the head of its answer has to come.

    The time begins with the body. The library limits the time before, which it takes to make a connection.
    """

    __slots__ = ("_body_bytes", "_settings", "first_byte_until", "has_begun", "limit", "may_have_arrived")

    def __init__(self, settings: Settings, *, body_bytes: int) -> None:
        self.has_begun = False  # a connection was made, and the body is being written
        self.may_have_arrived = False  # the upstream may have received the call
        self.first_byte_until: float | None = None  # by the event loop's clock
        self.limit: asyncio.Timeout | None = None  # None as soon as the head has come
        self._settings = settings
        self._body_bytes = body_bytes

    def note_begin(self, *, may_arrive: bool) -> None:
        """A connection was made, and the body is being written. `may_arrive`: a part of it may arrive alone."""
        self.has_begun = True
        self.may_have_arrived = may_arrive
        # For body and head together: an upstream may send one line of it every minute, or 103 again and again.
        self._end_at(asyncio.get_running_loop().time() + self._settings.idle_s + self._body_bytes / _SENT_BYTES_PER_S)

    def note_written(self) -> None:
        """The whole body is written."""
        self.may_have_arrived = True
        if self._settings.first_byte_s is not None:
            self.first_byte_until = asyncio.get_running_loop().time() + self._settings.first_byte_s
            self._end_at(self.first_byte_until)

    def _end_at(self, time: float) -> None:
        if self.limit is not None and not self.limit.expired():
            self.limit.reschedule(time)


async def head_of(
    request: Coroutine[Any, Any, aiohttp.ClientResponse], upstream: Upstream, settings: Settings, sending: Sending
) -> aiohttp.ClientResponse:
    """Await the head of the answer. Raises UpstreamError and UpstreamTimeout."""
    try:
        async with asyncio.timeout(None) as sending.limit:
            response = await request
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.ClientHttpProxyError) as error:
        drop_frames(error)  # the library's frames have the body
        raise _unreachable(upstream, why_unreachable(error, settings)) from None
    except TimeoutError as error:
        drop_frames(error)
        if sending.first_byte_until is not None:
            raise no_first_byte() from None
        raise UpstreamTimeout("The upstream did not answer in time.") from None
    except (aiohttp.ClientError, OSError) as error:
        drop_frames(error)
        if settings.proxy is not None and not sending.has_begun:
            raise _unreachable(upstream, f"the proxy {settings.proxy.authority}: it closed the connection") from None
        raise UpstreamError(
            "The upstream closed the connection without an answer.", was_sent=sending.may_have_arrived
        ) from None
    finally:
        sending.limit = None
    # With https the proxy only passes bytes on, so the status is the upstream's.
    if response.status == 407 and settings.proxy is not None and upstream.base_url.startswith("http:"):
        response.close()
        raise _unreachable(upstream, _refused_by_proxy(settings, 407))
    return response


def no_first_byte() -> UpstreamTimeout:
    """The error for an answer that did not begin within `first_byte_timeout`."""
    error = UpstreamTimeout("The upstream did not begin its answer in time.")
    error.may_be_moved = True
    return error


def _unreachable(upstream: Upstream, reason: str) -> UpstreamError:
    text = f'The upstream "{upstream.name}" can\'t be reached.'
    return UpstreamError(text, was_sent=False, headers={"retry-after": "2"}, reason=reason)


def why_unreachable(error: aiohttp.ClientError, settings: Settings) -> str:
    """Why no connection was made, for the log: the address, and what is wrong with it or with its certificate.

    If connections are made through a proxy, it is named, and whether it is the proxy that failed.
    """
    proxy = settings.proxy
    through = "" if proxy is None else f" (through the proxy {proxy.authority})"
    match error:
        case aiohttp.ClientHttpProxyError():
            return _refused_by_proxy(settings, error.status)
        case aiohttp.ClientConnectorCertificateError():
            certificate = error.certificate_error
            why = f"its certificate is not valid: {getattr(certificate, 'verify_message', None) or certificate}"
        case aiohttp.ClientConnectorSSLError():
            why = f"no TLS connection: {error.os_error.strerror or error.os_error}"
        case aiohttp.ClientConnectorDNSError():
            why = "the name of its host can't be resolved"
        case aiohttp.ClientConnectorError():
            # The library's own text does not say "refused". There is no number if several addresses were tried.
            why = os.strerror(error.os_error.errno) if error.os_error.errno else str(error.os_error)
        case _:
            return f"no connection within {settings.timeout.connect:g} s{through}"
    if proxy is not None and (error.host, error.port) == (proxy.raw_host, proxy.port):
        return f"the proxy {proxy.authority}: {why}"
    host = f"[{error.host}]" if ":" in error.host else error.host
    return f"{host}:{error.port}: {why}{through}"


def _refused_by_proxy(settings: Settings, status: int) -> str:
    what = "it does not take our user and password" if status == 407 else "it makes no connection"
    return f"the proxy {settings.proxy.authority if settings.proxy else ''}: {what} (status {status})"


class _NotedPayload(aiohttp.Payload):
    """A body that tells its `Sending` when the library begins to write it, and when it has written all of it."""

    # Whether the upstream may have a part of the request before all of it is written.
    is_written_in_pieces: ClassVar[bool] = True

    def __init__(self, body: Any, sending: Sending) -> None:
        super().__init__(body)
        self._sending = sending

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        self._sending.note_begin(may_arrive=self.is_written_in_pieces)
        await super().write_with_length(writer, content_length)
        self._sending.note_written()


class _OneWritePayload(_NotedPayload, aiohttp.BytesPayload):
    """A body that is written together with the head, in one write.

    An upstream may close a kept connection at the moment at which we use it again. If nothing was written, the call
    was not sent and may go elsewhere. If head and body were written separately, the upstream could have the head
    alone.
    """

    is_written_in_pieces = False


class _LargePayload(_NotedPayload, aiohttp.BytesIOPayload):
    """Bytes that are written in pieces."""


class _SplicedPayload(_NotedPayload, aiohttp.AsyncIterablePayload):
    """The pieces of a body on the disk."""


def payload_of(body: bytes | Spliced, sending: Sending) -> _NotedPayload:
    """The body in the form in which the HTTP library is to send it."""
    if isinstance(body, Spliced):
        return _SplicedPayload(body.chunks(), sending)
    if len(body) > _ONE_WRITE_BYTES_MAX:
        return _LargePayload(io.BytesIO(body), sending)
    return _OneWritePayload(body, sending)
