"""HTTP to the upstreams: send one call, hand back its answer as it arrives.

What goes wrong is told apart by whether the call can have reached the upstream: `UpstreamError` with
`was_sent = False` is provably free, everything else may have cost something. The library's defaults that are wrong
for this job are set here, each with its reason.
"""

import asyncio
import io
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from proxy.errors import UpstreamError, UpstreamTimeout
from proxy.policy.policy import Upstream
from proxy.upstreams.spool import Spliced

# SDKs wait ten minutes for an answer, and bill a retry again; giving up earlier would only cost more.
_SILENCE_S = 600
_CONNECT_S = 5
# The largest answer that is taken whole (a stream may be of any length).
WHOLE_BYTES_MAX = 64 * 2**20
_AT_ONCE_BYTES_MAX = 2**20
_ERROR_BYTES_MAX = 2**20
_ERROR_S = 5.0


class Answer:
    """What the upstream sends back: the status and headers at once, the body as it comes."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers = list(response.headers.items())
        self.retry_after = response.headers.get("retry-after")
        self.is_stream = response.content_type == "text/event-stream"
        self._beginning: bytes | None = None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body's bytes as they arrive; raises UpstreamError where it breaks, UpstreamTimeout where it stalls."""
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except TimeoutError:
            raise UpstreamTimeout("The upstream fell silent in the middle of its answer.") from None
        except (aiohttp.ClientError, ConnectionError):
            raise UpstreamError("The upstream broke off in the middle of its answer.") from None

    async def whole(self) -> bytes:
        """The whole body; raises as `chunks`, and UpstreamError where it is over WHOLE_BYTES_MAX."""
        body = bytearray()
        async for chunk in self.chunks():
            body += chunk
            if len(body) > WHOLE_BYTES_MAX:
                raise UpstreamError(f"The upstream's answer is larger than {WHOLE_BYTES_MAX} bytes.")
        return bytes(body)

    async def beginning(self) -> bytes:
        """The body of an error as far as it comes within bounds; never raises, for the status says enough.

        It is read once, and can be asked for again when the connection is closed.
        """
        if self._beginning is not None:
            return self._beginning
        body = bytearray()
        try:
            async with asyncio.timeout(_ERROR_S):
                async for chunk in self.chunks():
                    body += chunk
                    if len(body) > _ERROR_BYTES_MAX:
                        break
        except (UpstreamError, TimeoutError):
            pass
        self._beginning = bytes(body)
        return self._beginning


class Upstreams:
    """Connections to all upstreams, kept and reused. `open()` before use, `close()` after."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        """Make the session; has to be called where the event loop runs."""
        self._session = aiohttp.ClientSession(
            # No total time limit: long generations are honest. No limit of connections: quotas bound the calls,
            # and a queue in here would be silent.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S),
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60),
            # A shared cookie jar would replay one user's Cloudflare cookie for another.
            cookie_jar=aiohttp.DummyCookieJar(),
            # A megabyte that unpacks to 400 MB would be ours to carry; `identity` is asked for instead.
            auto_decompress=False,
        )

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    @asynccontextmanager
    async def send(
        self,
        upstream: Upstream,
        path: str,
        body: bytes | Spliced,
        headers: Mapping[str, str],
        *,
        method: str = "POST",
    ) -> AsyncIterator[Answer]:
        """Send `body` and hand out the answer; leaving closes or returns the connection.

        Raises UpstreamError where no answer came, UpstreamTimeout where it did not come in time.
        """
        assert self._session is not None, "open() first"
        data = _data(body)
        # Redirects are not followed: the library would carry `api-key` headers to wherever they point.
        request = self._session.request(
            method,
            URL(upstream.base_url + path, encoded=True),
            data=data,
            # Not chunked, which some servers don't take for a form.
            headers={**headers, "content-length": str(len(body))},
            allow_redirects=False,
        )
        try:
            response = await request
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            raise UpstreamError(
                f'The upstream "{upstream.name}" can\'t be reached.', was_sent=False, headers={"retry-after": "2"}
            ) from None
        except TimeoutError:
            raise UpstreamTimeout("The upstream did not answer in time.") from None
        except (aiohttp.ClientError, OSError):
            was_sent = not isinstance(data, _AtOnce) or data.was_written
            raise UpstreamError("The upstream closed the connection without an answer.", was_sent=was_sent) from None
        finally:
            del body, data  # sent: a long answer must not keep it
        async with response:
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise UpstreamError("The upstream compressed its answer although it was asked not to.")
            yield Answer(response)


class _AtOnce(aiohttp.BytesPayload):
    """A body that is written in one go, together with the head, so that it is known whether anything of it was.

    A kept connection may be closed by the upstream in the moment at which it is taken up again.
    """

    was_written = False

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        await super().write_with_length(writer, content_length)
        self.was_written = True


def _data(body: bytes | Spliced) -> object:
    """The body as the library is to send it."""
    if isinstance(body, Spliced):
        return body.pieces()
    # As a file where it is large: the library would write a megabyte of bytes in one go, and warns of it.
    return io.BytesIO(body) if len(body) > _AT_ONCE_BYTES_MAX else _AtOnce(body)
