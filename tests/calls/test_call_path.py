"""How long the path of one short call is: a count, not a time, so it is the same on every machine.

What a call costs is the sum of many small things, and each of them is too small to be seen in a measurement. So this
test counts them: the functions of ours that a call enters, and the tasks, futures, timers and context managers that
it makes. Whoever raises one of the numbers below says why in the commit.
"""

import asyncio
import contextlib
import gc
import socket
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import _lru_cache_wrapper
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import orjson
import pytest

import proxy.server
from proxy.administration import refresh
from tests.stage import Stage, key_of, stage

# A whole answer, on SQLite, on connections that are open: how often functions of ours are entered, how many different
# ones these are, and what is made.
FUNCTIONS, DISTINCT = 422, 316
MADE = Counter({"tasks": 1, "futures": 8, "timers": 3, "context managers": 1})
# Of these the shortest one counts, but never the first.
CALLS = 6

OURS = str(Path(proxy.__file__).parent)
SIMULATOR = str(Path(OURS, "simulator"))
CONTEXTS = {
    method.__code__
    for method in (
        contextlib._GeneratorContextManager.__enter__,
        contextlib._AsyncGeneratorContextManager.__aenter__,
        contextlib.ExitStack.__enter__,
        contextlib.AsyncExitStack.__aenter__,
        asyncio.Timeout.__aenter__,
    )
}

BODY = orjson.dumps(
    {"model": "fast", "max_tokens": 50, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
)
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer %b\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
) % (key_of("alice").encode(), len(BODY), BODY)
ANSWER_BODY = orjson.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_750_000_000,
        "model": "gpt-4o-mini",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Paris."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 14, "completion_tokens": 2, "total_tokens": 16},
    }
)
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
    len(ANSWER_BODY),
    ANSWER_BODY,
)


class CallPath:
    """Counts, for one call: `functions` by their names, and what was `made` by its kind."""

    def __init__(self) -> None:
        self.is_counting = False
        self.functions: Counter[str] = Counter()
        self.made: Counter[str] = Counter()
        self._seen: set[FrameType] = set()  # kept, so that no later frame is taken for one of these

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count from 0 within the block."""
        self.functions, self.made, self._seen = Counter(), Counter(), set()
        self.is_counting = True
        try:
            yield
        finally:
            self.is_counting = False

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        """Count a function of ours, or a context manager of ours, that is entered. A coroutine is entered once."""
        if event != "call" or not self.is_counting or frame in self._seen:
            return
        code = frame.f_code
        if _is_ours(code):
            self._seen.add(frame)
            self.functions[f"{Path(code.co_filename).relative_to(OURS)}:{code.co_qualname}"] += 1
        elif code in CONTEXTS and frame.f_back is not None and _is_ours(frame.f_back.f_code):
            self._seen.add(frame)
            self.made["context managers"] += 1

    def watch(self, loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Count what this loop makes."""
        for method, kind in (("create_task", "tasks"), ("create_future", "futures"), ("call_at", "timers")):
            monkeypatch.setattr(loop, method, self._counted(getattr(loop, method), kind))

    def _counted(self, method: Any, kind: str) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.made[kind] += self.is_counting
            return method(*arguments, **named)

        return counted


def _is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(OURS) and not code.co_filename.startswith(SIMULATOR)


@contextmanager
def upstream() -> Iterator[int]:
    """An upstream in a thread, which answers each request with the same bytes. Gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                received = b""
                while data := connection.recv(65_536):
                    received += data
                    if received.endswith(b"}"):  # the end of a body, and of no head
                        received = b""
                        connection.sendall(ANSWER)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]


@asynccontextmanager
async def client(port: int) -> AsyncIterator[Any]:
    """A client in a thread. Gives a function that makes one call and waits for its answer."""
    loop = asyncio.get_running_loop()
    connection = socket.create_connection(("127.0.0.1", port))

    def call(answered: asyncio.Future[bytes]) -> None:
        connection.sendall(REQUEST)
        received = b""
        while not received.endswith(ANSWER_BODY):
            data = connection.recv(65_536)
            if not data:
                break
            received += data
        loop.call_soon_threadsafe(answered.set_result, received)

    try:
        yield lambda answered: threading.Thread(target=call, args=(answered,), daemon=True).start()
    finally:
        connection.close()


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[CallPath]:
    """Counts in this thread and in those that start during the test. No jobs run beside the call.

    No cache holds anything of another test: a key that is equal, but another object, has to be compared.
    """

    async def never(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    for cached in gc.get_objects():
        if isinstance(cached, _lru_cache_wrapper) and cached.__module__.startswith("proxy."):
            cached.cache_clear()
    monkeypatch.setattr(proxy.server, "repeat", never)
    # Without these jobs each call would look for changes by itself, if it came so much later than the last one.
    monkeypatch.setattr(refresh, "_RECENT_S", float("inf"))
    path = CallPath()
    before = sys.getprofile()
    threading.setprofile(path.profile)
    sys.setprofile(path.profile)
    try:
        yield path
    finally:
        sys.setprofile(before)
        threading.setprofile(before)


async def test_the_path_of_a_call_is_not_longer_than_it_was(
    tmp_path: Path, path: CallPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call of a user whom two quotas bind. Raise a number only with a reason."""
    path.watch(asyncio.get_running_loop(), monkeypatch)
    policy = """
models: {fast: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}}
groups:
  staff: {quotas: {daily: {tokens: 1M, requests: 100k, per: day}, hourly: {tokens: 1M, requests: 100k, per: 1h}}}
users: {alice: {groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}}
"""
    with upstream() as port:
        async with stage(policy, folder=tmp_path, upstream=f"http://127.0.0.1:{port}/v1", kind="openai") as on:
            assert on.server.api is not None
            async with client(on.server.api.port) as call:
                counted = [await _counts_of(path, call, on) for _ in range(CALLS)]
    # Sometimes something is due that is no part of the call, such as a look for changed users.
    functions, made = min(counted[1:], key=lambda each: (each[0].total(), each[1].total()))
    listing = "\n".join(f"{count:4} {name}" for name, count in functions.most_common())
    assert functions.total() <= FUNCTIONS, listing
    assert len(functions) <= DISTINCT, listing
    assert made <= MADE, listing


async def _counts_of(path: CallPath, call: Any, on: Stage) -> tuple[Counter[str], Counter[str]]:
    """What one call enters, and what it makes."""
    answered = asyncio.get_running_loop().create_future()
    with path.counting():
        call(answered)
        received = await answered
        await on.all_settled()
    assert received.startswith(b"HTTP/1.1 200 "), received
    return path.functions, path.made
