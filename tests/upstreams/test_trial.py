"""Trying an upstream without a call: what is wrong with it, and what to do."""

import asyncio
import json
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.formats.kinds import kind_of
from proxy.policy.catalog import KeyCommand, Secret, Upstream
from proxy.upstreams.models import ModelLists
from proxy.upstreams.trial import Trial, try_upstream
from tests.bare_upstream import connections, opened
from tests.stage import fast_timers

KEY = "sk-upstream-secret-0123456789"
# A self-signed certificate for localhost, and its key, which protects nothing.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgEHjdyD0q3j8/kOy8
kWSxqrpYd+xPspLsL+dQIRxIGdGhRANCAAQcRa6zggLWn7jpUH32oUYLWSHR6bOd
W1GpozC+wzDT+obsLfQ30ivbEnVBobgo0HfPpxXhysBz5v1PEPRB4+Dd
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBlTCCATugAwIBAgIUJNyGgLBLYJpXiklrc7gs6OhtJgQwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyOTIwNDQwOVoYDzIxMjYxMTA1
MjA0NDA5WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAQcRa6zggLWn7jpUH32oUYLWSHR6bOdW1GpozC+wzDT+obsLfQ30ivb
EnVBobgo0HfPpxXhysBz5v1PEPRB4+Ddo2kwZzAdBgNVHQ4EFgQUgbacHqaezRug
1Bv+pTgPAxTxYnMwHwYDVR0jBBgwFoAUgbacHqaezRug1Bv+pTgPAxTxYnMwDwYD
VR0TAQH/BAUwAwEB/zAUBgNVHREEDTALgglsb2NhbGhvc3QwCgYIKoZIzj0EAwID
SAAwRQIhAJHfSsOc9bEtFsXcYelMvQeSVYWE37wNHwXOFXZP5BV/AiAUe0SKN9Pm
o2Z72GpbNAX8XzyuqF7zHhwfk5hS+LkeKg==
-----END CERTIFICATE-----
"""


class ListServer:
    """A server with a list of models at one path, for those with the key if there is one; `status` for the others."""

    def __init__(
        self,
        names: Collection[str] = ("gpt-4o", "o3"),
        *,
        key: str | None = KEY,
        path: str = "/v1/models",
        status: int = 401,
    ) -> None:
        self.names = names
        self.key = key
        self.path = path
        self.status = status
        self.asked: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        self.asked.append(path)
        status, body = 200, json.dumps({"data": [{"id": name} for name in self.names]})
        if path.partition("?")[0] != self.path:
            status, body = 404, "not found"
        elif self.key is not None and self.key not in head:
            status, body = self.status, "no"
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(f"{head}{body}".encode())
        await writer.drain()


async def tried(upstream: Upstream, *names: str, trial_s: float = 15.0) -> Trial:
    """The trial of this upstream by a client of its own."""
    async with opened() as upstreams:
        return await try_upstream(ModelLists(upstreams, now=lambda: 0), upstream, names, trial_s=trial_s)


@asynccontextmanager
async def serving(
    server: ListServer, *, base: str = "/v1", key: str | None = KEY, kind: str = "openai"
) -> AsyncIterator[Upstream]:
    """An upstream at this server."""
    async with connections(server.serve) as port:
        secret = None if key is None else Secret(key)
        yield Upstream("up", f"http://127.0.0.1:{port}{base}", secret, kind=kind, naming=kind_of(kind).naming)


@pytest.mark.parametrize(
    ("server", "key", "text"),
    [
        (ListServer(), KEY, "it answers, and lists 2 models, with the key"),
        (ListServer(["m"], key=None), None, "it answers, and lists 1 model"),
        (
            ListServer(key=None),
            KEY,
            "it answers, and lists 2 models, also without the key, so the key was not checked",
        ),
    ],
)
async def test_an_upstream_that_answers(server: ListServer, key: str | None, text: str) -> None:
    """It says whether its list depends on the key: if not, the key was not checked."""
    async with serving(server, key=key) as upstream:
        found = await tried(upstream, "o3")
    expected = (
        text
        if "o3" in server.names
        else f"{text}, but not o3: calls for them may fail; correct the names under models"
    )
    assert (found.text, found.models) == (expected, len(server.names))
    assert found.verdict == ("ok" if "o3" in server.names else "warning")


@pytest.mark.parametrize(
    ("kind", "listed", "names", "missing"),
    [
        ("openai", ["gpt-4o"], ["gpt-4o", "gpt-5", "o9"], "gpt-5, o9"),
        ("openai", ["gpt-4o"], [*"abcdefg"], "a, b, c, d, e and others"),
        ("openai", ["gpt-4o"], ["GPT-4o"], "GPT-4o"),
        ("openai", [], ["gpt-4o"], None),
        ("openai", [f"m{number}" for number in range(1001)], ["gpt-4o"], None),  # more than are read
        ("ollama", ["llama3:latest"], ["LLAMA3", "library/llama3"], None),
        ("llamacpp", ["model.gguf"], ["gpt-4o"], None),  # it serves its one model under any name
    ],
)
async def test_models_that_it_does_not_list_are_a_warning(
    kind: str, listed: list[str], names: list[str], missing: str | None
) -> None:
    """No mistake: aliases work without being listed. Names are compared as its kind of server does."""
    async with serving(ListServer(listed), kind=kind) as upstream:
        found = await tried(upstream, *names)
    assert found.verdict == ("ok" if missing is None else "warning")
    assert (f"but not {missing}: calls for them may fail" in found.text) is (missing is not None)


async def test_azure_lists_no_deployments() -> None:
    """But it checks the key on the way."""
    async with serving(ListServer(path="/openai/models"), base="", kind="azure") as upstream:
        found = await tried(upstream, "my-deployment")
        refused = await tried(Upstream("up", upstream.base_url, Secret("wrong"), kind="azure"))
    assert found == Trial("up", "ok", "it answers and accepts the key; it does not list deployments")
    assert refused.text == "it does not accept the key (status 401); correct api_key, or the rights of the key"


@pytest.mark.parametrize(
    ("server", "base", "key", "verdict", "text"),
    [
        (
            ListServer(),
            "/v1",
            "sk-other",
            "error",
            "it does not accept the key (status 401); correct api_key, or the rights of the key",
        ),
        (ListServer(), "/v1", None, "error", "it wants a key (status 401); write api_key: ${NAME}"),
        (
            ListServer(status=402),
            "/v1",
            "sk-other",
            "error",
            "its account is used up (status 402); pay, or use the key of another account",
        ),
        (
            ListServer(status=429),
            "/v1",
            "sk-other",
            "warning",
            "it answers, but limits requests now (status 429), so the key was not checked; try again later",
        ),
        (ListServer(status=503), "/v1", None, "error", "the upstream answered with status 503; look into its log"),
        (
            ListServer(status=400),
            "/v1",
            None,
            "error",
            "the upstream answered with status 400; check base_url and kind",
        ),
        (
            ListServer(status=302),
            "/v1",
            None,
            "error",
            "the upstream answered with status 302, and redirects are not followed; write the address that it leads "
            "to",
        ),
        (ListServer(), "", KEY, "error", "its API is at another address; write base_url: {url}/v1"),
        (ListServer(), "", "sk-other", "error", "its API is at another address; write base_url: {url}/v1"),
        (
            ListServer(path="/nowhere"),
            "",
            KEY,
            "warning",
            "it answers, but has no list of models (status 404), so the key was not checked; check base_url, unless "
            "it is known to have none",
        ),
    ],
)
async def test_what_is_wrong_comes_with_what_to_do(
    server: ListServer, base: str, key: str | None, verdict: str, text: str
) -> None:
    """By the status of the answer."""
    async with serving(server, base=base, key=key) as upstream:
        found = await tried(upstream)
        assert (found.verdict, found.text) == (verdict, text.replace("{url}", upstream.base_url))
    assert "sk-other" not in found.text


async def test_what_is_no_list_is_a_wrong_address() -> None:
    """A page of a browser, for example."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>")
        await writer.drain()

    async with connections(serve) as port:
        found = await tried(Upstream("up", f"http://127.0.0.1:{port}", None))
    assert found == Trial("up", "error", "the list is no JSON; correct base_url, which usually ends in /v1")


async def test_a_key_is_fetched_first() -> None:
    """If that fails, there is no other request."""
    server = ListServer()
    async with serving(server) as upstream:
        fetched = replace(upstream, api_key=KeyCommand((sys.executable, "-c", f"print({KEY!r})"), 2700))
        found = await tried(fetched, "o3")
        assert (found.verdict, found.text) == ("ok", "it answers, and lists 2 models, with the key")
        server.asked.clear()
        found = await tried(replace(upstream, api_key=KeyCommand(("/no/such/program", KEY), 2700)))
    assert (found.verdict, found.text) == (
        "error",
        "its key could not be fetched: /no/such/program can't be started: No such file or directory; correct "
        "api_key, or what issues the key",
    )
    assert server.asked == []


async def test_an_upstream_that_cannot_be_reached() -> None:
    """Its name, its port, its certificate, and http where it should be https or the other way round."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    found = await tried(Upstream("up", f"http://127.0.0.1:{port}/v1", None))
    assert found.text == (
        f"127.0.0.1:{port}: Connection refused; start the server, or correct host and port in base_url"
    )
    found = await tried(Upstream("up", "https://no-such-host.invalid/v1", None))
    assert found.text == (
        "no-such-host.invalid:443: the name of its host can't be resolved; correct the host in base_url, or the DNS "
        "of this machine"
    )

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    async with connections(plain) as port:
        found = await tried(Upstream("up", f"https://127.0.0.1:{port}/v1", None))
    assert "no TLS connection" in found.text
    assert found.text.endswith("; write http:// in base_url if the server has no TLS, or correct its port")


async def test_a_certificate_that_is_not_valid(tmp_path: Path) -> None:
    """Its own reason is named."""
    (tmp_path / "server.pem").write_text(CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    server = await asyncio.start_server(ListServer().serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    try:
        found = await tried(Upstream("up", f"https://localhost:{port}/v1", None))
    finally:
        server.close()
        await server.wait_closed()
    assert found.text == (
        f"localhost:{port}: its certificate is not valid: self-signed certificate; name its CA in ca if that is one "
        "of your own, or write the host in base_url as the certificate has it"
    )


async def test_an_upstream_that_never_answers_takes_bounded_time() -> None:
    """However it delays."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.read()

    async with connections(serve) as port:
        with fast_timers():
            found = await tried(Upstream("up", f"http://127.0.0.1:{port}/v1", None), trial_s=2)
    assert found == Trial("up", "error", "it did not answer within 2 s; check the server and what is between")
