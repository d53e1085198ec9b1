"""The command `python -m benchmarks.sidecar`: what the proxy costs beside an app, in one pod with it.

It prints the memory of one process after its start and under each kind of load, and how much longer a call takes than
directly to the upstream. docs/kubernetes.md has the figures, and derives the requests and limits of the manifests in
config/kubernetes from them. It takes a minute and a half, and needs wrk and nginx.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import aiohttp
import uvloop

from benchmarks import servers
from benchmarks.figures import ROUNDS, in_turn
from benchmarks.servers import KEY, Server
from benchmarks.streams import open_streams
from benchmarks.wrk import short_calls

# What the manifests set. The rest of the file is that of the other benchmarks, with the same tokenizer.
_BODY_MEMORY = "64M"
_POLICY = servers.POLICY.replace("admin: null", f'admin: "127.0.0.1:0", body_memory: {_BODY_MEMORY}')

_CONNECTIONS = 32
_CALLS_S = 10
_LATENCY_S = 2
_STREAMS = 100
_TOKENS = 5  # of a stream, one each second
_BODIES = 32
_BODY_BYTES = 4_000_000


def main() -> None:
    """Print the figures, each as soon as it is measured."""
    with TemporaryDirectory(prefix="llm-quota-proxy-bench-") as name, servers.whole_upstream(Path(name)) as upstream:
        began = time.monotonic()
        with servers.proxy(Path(name), upstream, policy=_POLICY) as proxy:
            started = time.monotonic() - began, proxy.cpu_us() / 1e6
            print("serves after {:.2f} s, of which {:.2f} s are processor time".format(*started), flush=True)
            _print("after the start", proxy, lambda: time.sleep(2))
            _print(f"{_CONNECTIONS} calls at a time, {_CALLS_S} s", proxy, lambda: _calls(proxy))
            _print_latency(upstream, proxy)
    with (
        TemporaryDirectory(prefix="llm-quota-proxy-bench-") as name,
        servers.stream_upstream(1, _TOKENS) as upstream,
        servers.proxy(Path(name), upstream, policy=_POLICY) as proxy,
    ):
        _print(f"{_STREAMS} streams open", proxy, lambda: uvloop.run(_streams(proxy)))
        _print(f"{_BODIES} bodies of 4 MB at a time", proxy, lambda: uvloop.run(_large_bodies(proxy)))


def _print(what: str, proxy: Server, load: Callable[[], object]) -> None:
    with _peak(proxy) as peak:
        load()
    after = proxy.memory_mb("Rss"), proxy.memory_mb("Pss")
    print(
        f"{what:<34} at most {peak[0]:6.0f} MB RSS, {peak[1]:4.0f} MB PSS; "
        f"then {after[0]:4.0f} and {after[1]:4.0f} MB",
        flush=True,
    )


@contextmanager
def _peak(proxy: Server) -> Iterator[list[float]]:
    """The most memory (RSS, PSS) during the block, in MB, looked at ten times a second. Complete after the block."""
    most, ended = [0.0, 0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            most[0] = max(most[0], proxy.memory_mb("Rss"))
            most[1] = max(most[1], proxy.memory_mb("Pss"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        ended.set()
        watcher.join()


def _calls(proxy: Server) -> None:
    before = proxy.cpu_us()
    load = short_calls(proxy.port, connections=_CONNECTIONS, seconds=_CALLS_S)
    spent = (proxy.cpu_us() - before) / load.calls
    print(f"CPU of a call                                 {spent:8.0f} µs, {load.calls / _CALLS_S:.0f} calls/s")


def _print_latency(upstream: Server, proxy: Server) -> None:
    def measure(server: Server) -> tuple[int, int]:
        load = short_calls(server.port, connections=1, seconds=_LATENCY_S)
        return load.p50_us, load.p99_us

    found = in_turn(measure, {"direct": upstream, "proxy": proxy})
    for index, name in enumerate(("p50", "p99")):
        pairs = zip(found["direct"], found["proxy"], strict=True)
        added = [(there[index] - here[index]) / 1000 for here, there in pairs]
        print(
            f"latency added, {name}, one call at a time     {median(added):8.2f} ms "
            f"({min(added):.2f}–{max(added):.2f} in {ROUNDS} rounds)",
            flush=True,
        )


async def _streams(proxy: Server) -> None:
    async with open_streams(proxy.port, _STREAMS, within_s=1):
        pass


async def _large_bodies(proxy: Server) -> None:
    """Calls with large prompts, all at once. Those for which there is no room wait, and may get a 503."""
    text = "All work and no play makes Jack a dull boy. " * (_BODY_BYTES // 44)
    body = {"model": "long", "stream": True, "max_tokens": 100, "messages": [{"role": "user", "content": text}]}
    statuses: list[int] = []

    async def call(http: aiohttp.ClientSession) -> None:
        url, headers = f"http://127.0.0.1:{proxy.port}/v1/chat/completions", {"authorization": f"Bearer {KEY}"}
        async with http.post(url, json=body, headers=headers) as response:
            await response.read()
            statuses.append(response.status)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as http:
        await asyncio.gather(*(call(http) for _ in range(_BODIES)))
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    print(f"{_BODIES} bodies of 4 MB: answers by status {counts}", flush=True)


if __name__ == "__main__":
    main()
