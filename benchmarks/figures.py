"""Measure the four figures.

Each round measures nginx and then the proxy, so other load on the machine affects both.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TypeVar

import uvloop

from benchmarks import servers
from benchmarks.servers import Server
from benchmarks.streams import open_streams
from benchmarks.wrk import short_calls

T = TypeVar("T")

ROUNDS = 5

_CONNECTIONS = 32
_CALLS_S = 4
_LATENCY_S = 2
_WARM_UP_S = 1

_STREAMS = 100
_TOKENS_PER_S = 30
_CHUNKS_S = 3

_OPEN_STREAMS = 1000
_OPEN_S = 8


@dataclass(frozen=True, slots=True)
class Aim:
    """The upper bound of a figure: a multiple of nginx's figure, or a number in the figure's unit."""

    under: float
    is_ratio: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: its name and unit, and the values of each round for the proxy and for nginx."""

    name: str
    unit: str
    proxy: list[float]
    nginx: list[float]
    aim: Aim | None = None

    @property
    def ratio(self) -> float:
        """The proxy's median divided by nginx's.

        Infinite if nginx's is not positive: what nginx adds to the latency can be less than the noise.
        """
        nginx = median(self.nginx)
        return median(self.proxy) / nginx if nginx > 0 else inf

    @property
    def is_met(self) -> bool | None:
        """Whether the aim is met; None if the figure has no aim."""
        if self.aim is None:
            return None
        return (self.ratio if self.aim.is_ratio else median(self.proxy)) < self.aim.under


def cost_of_a_call() -> list[Figure]:
    """Processor time of a short call, while every connection always has a call in flight."""

    def measure(server: Server) -> float:
        before = server.cpu_us()
        load = short_calls(server.port, connections=_CONNECTIONS, seconds=_CALLS_S)
        return (server.cpu_us() - before) / load.calls

    with _whole_answers() as (_, nginx, proxy):
        for server in (nginx, proxy):
            short_calls(server.port, connections=_CONNECTIONS, seconds=_WARM_UP_S)
        by_nginx, by_proxy = _in_turn(measure, nginx, proxy)
    return [
        Figure(f"CPU of a short call, {_CONNECTIONS} connections", "µs", by_proxy, by_nginx, Aim(15, is_ratio=True))
    ]


def added_latency() -> list[Figure]:
    """How much longer a call takes than directly to the upstream, one call at a time."""

    def measure(server: Server) -> tuple[int, int]:
        load = short_calls(server.port, connections=1, seconds=_LATENCY_S)
        return load.p50_us, load.p99_us

    with _whole_answers() as (upstream, nginx, proxy):
        for server in (upstream, nginx, proxy):
            short_calls(server.port, connections=1, seconds=_WARM_UP_S)
        direct, by_nginx, by_proxy = _in_turn(measure, upstream, nginx, proxy)

    def added_ms(through: list[tuple[int, int]], percentile: int) -> list[float]:
        pairs = zip(through, direct, strict=True)
        return [(latency[percentile] - own[percentile]) / 1000 for latency, own in pairs]

    return [
        Figure("latency added, p50, 1 connection", "ms", added_ms(by_proxy, 0), added_ms(by_nginx, 0), Aim(2)),
        Figure("latency added, p99, 1 connection", "ms", added_ms(by_proxy, 1), added_ms(by_nginx, 1)),
    ]


def cost_of_a_chunk() -> list[Figure]:
    """Processor time of one chunk, while all streams are open: no stream begins or ends meanwhile."""

    async def measure(server: Server) -> float:
        async with open_streams(server.port, _STREAMS, within_s=1) as streams:
            cpu_us, chunks = server.cpu_us(), streams.chunks
            await asyncio.sleep(_CHUNKS_S)
            return (server.cpu_us() - cpu_us) / (streams.chunks - chunks)

    with _streams(_TOKENS_PER_S, tokens=_TOKENS_PER_S * (_CHUNKS_S + 3)) as (nginx, proxy):
        by_nginx, by_proxy = _in_turn(lambda server: uvloop.run(measure(server)), nginx, proxy)
    name = f"CPU of a chunk, {_STREAMS} streams"
    return [Figure(name, "µs", by_proxy, by_nginx, Aim(3, is_ratio=True))]


def memory_of_streams() -> list[Figure]:
    """The most memory that is used while many streams are open."""

    async def measure(server: Server) -> tuple[float, float]:
        samples = []
        async with open_streams(server.port, _OPEN_STREAMS, within_s=2) as streams:
            while not streams.ended:
                samples.append((server.memory_mb("Rss"), server.memory_mb("Pss")))
                await asyncio.sleep(0.5)
        return max(samples)

    with _streams(tokens_per_s=1, tokens=_OPEN_S) as (nginx, proxy):
        ((nginx_rss, nginx_pss), (rss, pss)) = (uvloop.run(measure(server)) for server in (nginx, proxy))
    name = f"{_OPEN_STREAMS:,} open streams"
    return [
        Figure(f"memory (RSS), {name}", "MB", [rss], [nginx_rss], Aim(100)),
        Figure(f"memory (PSS), {name}", "MB", [pss], [nginx_pss]),
    ]


ALL: tuple[Callable[[], list[Figure]], ...] = (cost_of_a_call, cost_of_a_chunk, added_latency, memory_of_streams)


def _in_turn(measure: Callable[[Server], T], *compared: Server) -> list[list[T]]:
    """Measure each server once in each round; return the values of each server."""
    rounds = [[measure(server) for server in compared] for _ in range(ROUNDS)]
    return [list(column) for column in zip(*rounds, strict=True)]


@contextmanager
def _whole_answers() -> Iterator[tuple[Server, Server, Server]]:
    with (
        TemporaryDirectory(prefix="llm-quota-proxy-bench-") as name,
        servers.whole_upstream(Path(name)) as upstream,
        servers.nginx(Path(name), upstream) as nginx,
        servers.proxy(Path(name), upstream) as proxy,
    ):
        yield upstream, nginx, proxy


@contextmanager
def _streams(tokens_per_s: float, tokens: int) -> Iterator[tuple[Server, Server]]:
    with (
        TemporaryDirectory(prefix="llm-quota-proxy-bench-") as name,
        servers.stream_upstream(tokens_per_s, tokens) as upstream,
        servers.nginx(Path(name), upstream) as nginx,
        servers.proxy(Path(name), upstream) as proxy,
    ):
        yield nginx, proxy
