"""Memory: a call that ends gives its body back at once, and large bodies are bounded together.

T121 calls that end with an error, without the garbage collector · T122 the budget of large bodies, and limits of 0
"""

import asyncio
import gc
import json
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.config.loader import ConnectionLimits
from proxy.policy.quota import grants_by_quota
from tests.bare_client import GOOD, KEY, bare_client, post
from tests.bare_upstream import bare_upstream
from tests.breakage import read_only, writers
from tests.builders import HOUR, NOON, grant
from tests.stage import Clock, Stage, fast_timers, stage, until

CHAT = "/v1/chat/completions"
POLICY = """
wait: 0s
models:
  fast: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}
  zero: {upstream: simulated, model: gpt-4o-mini}
  small: {upstream: simulated, model: gpt-4o-mini}
groups:
  staff:
    quotas:
      daily: {models: [fast], tokens: 100M, requests: 100k, per: day}
      none: {models: [zero], requests: 0, per: day}
      little: {models: [small], tokens: 1000, per: day}
users:
  alice: {groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}
"""
# A body is this large, and a call may leave this much behind: leftovers of the HTTP library, and a twentieth of the
# last body, which the thread that read it may still be giving back.
BODY_BYTES = 1_000_000
LEFT_BYTES_MAX = 100_000
CALLS = 20

Once = Callable[[], Awaitable[object]]


def _body(model: str = "fast", **more: Any) -> bytes:
    text = {"type": "text", "text": "Hello " * (BODY_BYTES // 6)}
    return json.dumps({"model": model, "messages": [{"role": "user", "content": [text]}], **more}).encode()


@contextmanager
def _without_collector() -> Iterator[None]:
    """The garbage collector does nothing, so that only what is freed by hand is freed."""
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()
        gc.enable()


async def _left_bytes(on: Stage, once: Once) -> int:
    """How many bytes a call leaves behind, when its connection has gone too if that was closed."""
    await once()  # fills caches
    await on.all_settled()
    with _without_collector():
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(CALLS):
            await once()
        await on.all_settled()

        def left() -> int:
            return (tracemalloc.get_traced_memory()[0] - before) // CALLS

        # A body that was refused unread is in the buffers of its connection until the client has seen the close.
        with suppress(TimeoutError):
            async with asyncio.timeout(10):
                await until(lambda: left() < LEFT_BYTES_MAX)
        return left()


REFUSED = {
    "a quota of 0": (_body("zero"), 429),
    "a quota that is too small": (_body("small"), 400),
    "no such model": (_body("none"), 404),
    "a wrong value": (_body(n="x"), 400),
    "two spellings of a key": (_body()[:-1] + b',"MODEL":"fast"}', 400),
    "a body that is cut": (_body()[:-1], 400),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_refused_call_gives_its_body_back(case: str, tmp_path: Path) -> None:
    """T121: whatever refused it, nothing of its body is left when it was answered."""
    body, status = REFUSED[case]
    async with stage(POLICY, folder=tmp_path) as on:

        async def once() -> None:
            assert (await on.post(CHAT, body)).status == status

        assert await _left_bytes(on, once) < LEFT_BYTES_MAX


async def test_a_call_gives_its_body_back_when_its_upstream_is_away(tmp_path: Path) -> None:
    """The HTTP library's error of a failed connection refers to itself, and to the frames that have the body."""
    async with stage(POLICY, folder=tmp_path, upstream="http://127.0.0.1:1/v1") as on:

        async def once() -> None:
            assert (await on.post(CHAT, _body())).status == 502

        assert await _left_bytes(on, once) < LEFT_BYTES_MAX


async def test_a_call_gives_its_body_back_when_the_ledger_is_away(tmp_path: Path) -> None:
    """A 503, before anything was sent."""
    with writers() as made:
        async with stage("ledger_wait: 1s\n" + POLICY, folder=tmp_path) as on:

            async def once() -> None:
                assert (await on.post(CHAT, _body())).status == 503

            # The listener's limits for slow clients are as much faster, so a higher factor would cut off the body.
            with read_only(tmp_path / "quotas.db", made[-1]), fast_timers(4):
                assert await _left_bytes(on, once) < LEFT_BYTES_MAX


async def _break_off(how: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(BROKEN[how])
    await writer.drain()


BROKEN = {
    "nothing": b"",
    "no HTTP": b"HTPP\r\n\r\n",
    "half of a whole answer": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{}",
    "an error": b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\n{}",
    "a redirect": b"HTTP/1.1 307 No\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("how", BROKEN)
async def test_a_call_gives_its_body_back_when_its_upstream_fails(how: str, tmp_path: Path) -> None:
    """Each way of an upstream to fail raises other errors, on other paths."""
    async with (
        bare_upstream(lambda how, reader, writer: _break_off(str(how), reader, writer)) as upstream,
        stage("retry_for: 0s\n" + POLICY, folder=tmp_path, upstream=upstream.url) as on,
    ):

        async def once() -> None:
            assert (await on.post(CHAT, _body(metadata=how))).status >= 500

        assert await _left_bytes(on, once) < LEFT_BYTES_MAX


async def test_a_call_gives_its_body_back_when_its_client_leaves(tmp_path: Path) -> None:
    """Before the body is complete, and while the call waits for its upstream."""

    async def silence(_: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with (
        bare_upstream(silence) as upstream,
        stage(POLICY, folder=tmp_path, upstream=upstream.url, on_disconnect="stop") as on,
    ):

        async def in_mid_upload() -> None:
            async with bare_client(on.url) as client:
                client.send(post(CHAT, KEY, f"Content-Length: {2 * BODY_BYTES}", body=_body(), length=False))
                await client.writer.drain()
            await until(lambda: not on.connections)

        async def in_mid_call() -> None:
            async with bare_client(on.url) as client:
                client.send(post(CHAT, KEY, body=_body(stream=True, metadata={})))
                await until(lambda: bool(upstream.open))
            await upstream.all_closed()

        assert await _left_bytes(on, in_mid_upload) < LEFT_BYTES_MAX
        assert await _left_bytes(on, in_mid_call) < LEFT_BYTES_MAX


CLOSED = """
groups: {staff: {quotas: {none: {tokens: 0, per: day}}}}
users:
  alice: {groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}
"""
LARGE = f"Content-Length: {30 * BODY_BYTES}"


@pytest.mark.parametrize(
    "path", [CHAT, "/v1/messages", "/v1/audio/transcriptions", "/openai/deployments/x/embeddings"]
)
@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)])
async def test_a_user_with_limits_of_0_is_refused_before_a_large_body_is_read(
    path: str, expect: tuple[str, ...], tmp_path: Path
) -> None:
    """Nothing of it is sent here, and the refusal comes all the same. It is that of a small call, which is read."""
    form = ("Content-Type: multipart/form-data; boundary=x",) if "audio" in path else ()
    async with stage(CLOSED, folder=tmp_path) as on, bare_client(on.url) as client:
        client.send(post(path, KEY, *form, *expect, LARGE, body=b"", length=False))
        reply = await client.reply()
        assert reply.status == 429
        assert 'Quota "staff/none" is switched off' in reply.json()["error"]["message"]
        assert reply.headers["x-should-retry"] == "false"
        small = await on.post(CHAT, {"model": "any", "messages": []})
        if path == CHAT:
            assert {**reply.json()["error"], "quotas": []} == {**small.error, "quotas": []}


@pytest.mark.every_engine
async def test_a_large_body_is_read_for_a_limit_of_0_while_a_grant_runs(tmp_path: Path) -> None:
    """By the ledger's clock, which is PostgreSQL's there. After the end of the grant it is refused unread again."""
    clock = Clock(database_ahead_ms=HOUR)
    async with stage(CLOSED, folder=tmp_path, clock=clock) as on:
        ahead = on.server.ledger.now() - clock.ms
        assert ahead == (0 if on.database.startswith("sqlite") else HOUR)
        given = grant("staff/none", tokens=10**9, until=NOON + ahead + 1000, user="alice")
        on.config = replace(on.config, policy=replace(on.config.policy, grants=grants_by_quota([given])))
        assert await on.server.policies.reload()
        for until_end_ms, status in ((1000, 100), (1, 100), (0, 429)):
            clock.ms = NOON + 1000 - until_end_ms
            async with bare_client(on.url) as client:
                client.send(post(CHAT, KEY, "Expect: 100-continue", LARGE, body=b"", length=False))
                assert (await client.reply()).status == status


async def test_a_large_body_waits_for_its_100_continue_until_there_is_memory(tmp_path: Path) -> None:
    """Alice's half-sent body takes the budget. Bob is asked for his when she has left."""
    limits = ConnectionLimits(body_memory_bytes=34 * BODY_BYTES)
    bob = KEY.replace("alice", "bob")
    async with (
        stage(folder=tmp_path, connection_limits=limits) as on,
        bare_client(on.url) as second,
    ):
        async with bare_client(on.url) as first:
            first.send(post(CHAT, KEY, "Expect: 100-continue", LARGE, body=b"", length=False))
            assert (await first.reply()).status == 100
            second.send(post(CHAT, bob, "Expect: 100-continue", LARGE, body=b"", length=False))
            assert (await on.post(CHAT, GOOD, user="bob")).status == 200  # small ones pass
        assert (await second.reply()).status == 100


@pytest.mark.parametrize(
    ("header", "body"),
    [(LARGE, b"{"), ("Transfer-Encoding: chunked", b"500000\r\n" + b" " * 0x500000)],
    ids=["announced", "as it grows"],
)
async def test_a_large_body_without_memory_is_a_503(header: str, body: bytes, tmp_path: Path) -> None:
    """T122: after 10 s, with the time to come back. A body without a length counts as it grows, and does not wait."""
    limits = ConnectionLimits(body_memory_bytes=34 * BODY_BYTES)
    bob = KEY.replace("alice", "bob")
    async with (
        stage(folder=tmp_path, connection_limits=limits) as on,
        bare_client(on.url) as first,
        bare_client(on.url) as second,
    ):
        first.send(post(CHAT, KEY, "Expect: 100-continue", LARGE, body=b"", length=False))
        assert (await first.reply()).status == 100
        with fast_timers(50):
            second.send(post(CHAT, bob, header, body=body, length=False))
            reply = await second.reply()
        assert (reply.status, reply.headers["retry-after"], reply.error["code"]) == (503, "5", "out_of_memory")
