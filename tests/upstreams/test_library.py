"""What the client uses of the HTTP library without a documented contract: an upgrade that changes it fails here."""

import asyncio
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest, ConnectionKey
from aiohttp.connector import BaseConnector, Connection
from aiohttp.http import HttpResponseParser, RawResponseMessage
from yarl import URL

from proxy.policy.catalog import Secret, Transport, Upstream
from proxy.upstreams import sending
from tests.library import gone, unlisted

# The minor version of aiohttp in which every sentence of INTERNALS was checked.
CHECKED = "3.14"

INTERNALS = {
    (
        aiohttp.TCPConnector,
        "connect",
    ): "gives a connection that nobody else has, new or kept; raises what _connect maps",
    (
        aiohttp.TCPConnector,
        "_get",
    ): "gives a kept connection or None, does not wait, and is what connect() asks first",
    (aiohttp.TCPConnector, "_release"): "keeps a connection, or closes it if should_close; is called once for each",
    (aiohttp.TCPConnector, "_factory"): "is called without arguments for the protocol of each new connection",
    (aiohttp.TCPConnector, "_loop"): "the event loop",
    (Connection, "protocol"): "the protocol of the connection",
    (Connection, "release"): "calls _release of the connector, once",
    (Connection, "close"): "calls _release of the connector with should_close, once",
    (ResponseHandler, "set_response_params"): "creates the parser, which gets what has arrived before",
    (
        ResponseHandler,
        "_parser",
    ): "parses what arrives; None: what arrives is kept, and should_close is true from then on",
    (
        ResponseHandler,
        "data_received",
    ): "parses what arrives, and feeds the reader of the body; without data what was left while reading was paused",
    (ResponseHandler, "connection_lost"): "ends the body of an answer, and calls set_exception",
    (
        ResponseHandler,
        "resume_reading",
    ): "undoes pause_reading, as the reader of a body wants it after each read",
    (ResponseHandler, "_reading_paused"): "is true from pause_reading until resume_reading",
    (ResponseHandler, "read"): "waits for the next head, 1xx included, and gives it with the reader of its body",
    (ResponseHandler, "should_close"): "is true unless the last answer is complete and nothing has come after it",
    (
        ResponseHandler,
        "set_exception",
    ): "wakes read(); is called if the parser fails, and when the connection is lost",
    (ResponseHandler, "exception"): "what set_exception was given; a ServerDisconnectedError unless it was reset",
    (ResponseHandler, "abort"): "closes the connection without sending what is not sent yet",
    (ResponseHandler, "transport"): "the connection, None when it is lost or closed",
    (
        ResponseHandler,
        "_drain_helper",
    ): "waits while more than 64 KiB are not sent yet; raises OSError without a connection",
    (HttpResponseParser, "feed_eof"): "gives a head that has begun, or raises, unless it is between two answers",
    (ClientRequest, "connection_key"): "differs by host, port, TLS context, proxy and headers for the proxy",
    (ClientRequest, "proxy"): "the proxy that the connector goes through",
}
# What connect() reads of a request that is never sent. All of it is set by the constructor.
READ_BY_CONNECT = (
    "connection_key headers host is_ssl port proxy proxy_auth proxy_headers request_info server_hostname ssl url"
)
PARAMETERS = {
    aiohttp.TCPConnector.connect: "self req traces timeout",
    ResponseHandler.set_response_params: (
        "self timer skip_payload read_until_eof auto_decompress read_timeout read_bufsize timeout_ceil_threshold "
        "max_line_size max_field_size max_headers"
    ),
}
# What sending.py adds to aiohttp's classes.
ADDED = {ResponseHandler: ["on_change"]}
SUBCLASSES = {aiohttp.TCPConnector: sending.Connector, ResponseHandler: sending._Protocol}
ADVICE = (
    "Look into aiohttp's connector.py, client_proto.py and client_reqrep.py, and run tests/upstreams/test_wire.py."
)


async def test_aiohttp_has_every_internal_that_the_client_uses() -> None:
    """An upgrade of aiohttp fails here and names what to check, instead of mixing up answers without an error."""
    loop = asyncio.get_running_loop()
    protocol = ResponseHandler(loop)
    request = ClientRequest("GET", URL("https://llm.example/v1"), proxy=URL("http://proxy:3128"))
    async with aiohttp.TCPConnector() as connector:
        objects: dict[type, Any] = {
            aiohttp.TCPConnector: connector,
            Connection: Connection(connector, request.connection_key, protocol, loop),
            ResponseHandler: protocol,
            HttpResponseParser: HttpResponseParser(protocol, loop, 2**16),
            ClientRequest: request,
        }
        problems = [*_changes(objects), *_unlisted()]
        problems += [
            f"ClientRequest.{name} is gone." for name in READ_BY_CONNECT.split() if not hasattr(request, name)
        ]
        objects[Connection].close()
    head = ("code", "headers", "chunked")
    problems += [f"RawResponseMessage.{name} is gone." for name in head if not hasattr(RawResponseMessage, name)]
    if not aiohttp.__version__.startswith(f"{CHECKED}."):
        problems.append("This is another minor version: check every sentence of INTERNALS, then change CHECKED.")
    if problems:
        pytest.fail("\n".join([f"aiohttp {aiohttp.__version__}:", *problems, ADVICE]), pytrace=False)


def _changes(objects: dict[type, Any]) -> Iterator[str]:
    """What aiohttp no longer has, has with other parameters, or now has under a name of ours."""
    yield from gone(INTERNALS, objects, "sending.py")
    for function, expected in PARAMETERS.items():
        if (found := " ".join(inspect.signature(function).parameters)) != expected:
            yield f"{function.__qualname__} has other parameters: {found}."
    for name in ("_get", "_release"):
        ours, theirs = (
            inspect.signature(getattr(owner, name)).parameters for owner in (sending.Connector, BaseConnector)
        )
        if list(ours) != list(theirs):
            yield f"BaseConnector.{name} has other parameters: {', '.join(theirs)}."
    for base, names in ADDED.items():
        yield from (f"{base.__name__} has its own {name}: rename ours." for name in names if hasattr(base, name))


def _unlisted() -> Iterator[str]:
    """What sending.py overrides or reads and INTERNALS does not list."""
    source = Path(sending.__file__).read_text(encoding="utf-8")
    ours = {name for owner in (sending.Route, sending.Exchange) for name in vars(owner)}
    ours |= set(re.findall(r"self\.(_\w+)(?::[^\n]*)? = ", source)) - {"_factory"}
    yield from unlisted(INTERNALS, SUBCLASSES, sending, ours=ours)


async def test_the_key_of_kept_connections_stays_the_same() -> None:
    """Also after the library has added to the headers for a proxy, which are a part of it."""
    transport = Transport(proxy=Secret("http://me:secret@proxy:3128"))
    route = sending.Route(Upstream("up", "https://llm.example/v1", None, transport=transport), True)
    async with sending.Connector() as connector:
        connector._update_proxy_auth_header_and_build_proxy_req(route.destination)
    assert isinstance(route.key, ConnectionKey)
    assert route.destination.connection_key == route.key
