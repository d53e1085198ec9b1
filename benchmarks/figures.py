"""Measure the figures.

Each round measures what the proxy is compared with and then the proxy, so other load on the machine affects all.
"""

import asyncio
import compileall
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import uvloop

from benchmarks import servers
from benchmarks.servers import Server
from benchmarks.streams import open_streams
from benchmarks.wrk import call_once, short_calls

T = TypeVar("T")

ROUNDS = 5

_CONNECTIONS = 32
_CALLS_S = 4
_LATENCY_S = 2
# A long conversation, and fewer connections, because a call takes longer.
_PROMPT_BYTES = 100_000
_LONG_CONNECTIONS = 8

_STREAMS = 100
_TOKENS_PER_S = 30
_CHUNKS_S = 3

_OPEN_STREAMS = 1000
_OPEN_S = 8


@dataclass(frozen=True, slots=True)
class Aim:
    """The upper bound of a figure: a multiple of what it is compared with, or a number in the figure's unit."""

    under: float
    is_ratio: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: its name and unit, and the values of each round, by the name of the server.

    `values` has "proxy", and of the others those that it is compared with: "nginx", and `beside`, which is "relay"
    (ten lines with aiohttp) if it is not another way to run the proxy.
    """

    name: str
    unit: str
    values: Mapping[str, Sequence[float]]
    aim: Aim | None = None
    beside: str = "relay"

    def median(self, server: str) -> float | None:
        """The median of this server's rounds; None if it was not measured."""
        return median(self.values[server]) if server in self.values else None

    def ratio(self, server: str) -> float | None:
        """The proxy's median divided by this server's; None if that was not measured.

        Infinite if it is not positive: what a server adds to the latency can be less than the noise.
        """
        compared, ours = self.median(server), self.median("proxy")
        if compared is None or ours is None:
            return None
        return ours / compared if compared > 0 else inf

    @property
    def is_met(self) -> bool | None:
        """Whether the aim is met; None if the figure has no aim."""
        reached = None if self.aim is None else self.ratio(self.beside) if self.aim.is_ratio else self.median("proxy")
        return None if reached is None or self.aim is None else reached <= self.aim.under


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of call: its upstream, and what one of them costs a server in µs of processor time."""

    upstream: Callable[[], AbstractContextManager[Server]]
    cost: Callable[[Server], float]


def _cost_of_calls(server: Server, *, connections: int, **more: Any) -> float:
    """While every connection always has a call in flight. `more` are parameters of `short_calls`."""
    before = server.cpu_us()
    load = short_calls(server.port, connections=connections, seconds=_CALLS_S, **more)
    return (server.cpu_us() - before) / load.calls


def _cost_of_a_chunk(server: Server) -> float:
    """While all streams are open: no stream begins or ends meanwhile."""

    async def measure() -> float:
        async with open_streams(server.port, _STREAMS, within_s=1) as streams:
            cpu_us, chunks = server.cpu_us(), streams.chunks
            await asyncio.sleep(_CHUNKS_S)
            return (server.cpu_us() - cpu_us) / (streams.chunks - chunks)

    return uvloop.run(measure())


@contextmanager
def _whole_answers() -> Iterator[Server]:
    with TemporaryDirectory(prefix="llm-quota-proxy-bench-") as name, servers.whole_upstream(Path(name)) as upstream:
        yield upstream


KINDS = {
    "a short call": Kind(_whole_answers, partial(_cost_of_calls, connections=_CONNECTIONS)),
    "a prompt of 100 kB": Kind(
        _whole_answers, partial(_cost_of_calls, connections=_LONG_CONNECTIONS, prompt_bytes=_PROMPT_BYTES)
    ),
    "a chunk of 100 streams": Kind(
        partial(servers.stream_upstream, _TOKENS_PER_S, _TOKENS_PER_S * (_CHUNKS_S + 3)), _cost_of_a_chunk
    ),
}


def cost_of_a_call() -> list[Figure]:
    """Processor time of a short call, also beside a proxy that logs no calls."""
    kind = KINDS["a short call"]
    with (
        kind.upstream() as upstream,
        _compared(upstream) as compared,
        proxy_of(upstream, logged_calls="none") as silent,
    ):
        found = in_turn(kind.cost, {**compared, "silent": silent})
    beside_silent = {"proxy": found["proxy"], "silent": found.pop("silent")}
    return [
        Figure(f"CPU of a short call, {_CONNECTIONS} connections", "µs", found, Aim(1.5, is_ratio=True)),
        Figure("the same, beside log: {calls: none}", "µs", beside_silent, beside="silent"),
    ]


def cost_of_a_refusal() -> list[Figure]:
    """Processor time of a call that a used-up quota refuses, beside one that is admitted."""
    admitted = partial(_cost_of_calls, connections=_CONNECTIONS)
    refused = partial(admitted, refused_key=servers.REFUSED_KEY)
    with _whole_answers() as upstream, proxy_of(upstream) as proxy, proxy_of(upstream) as spent:
        call_once(spent.port, servers.REFUSED_KEY)
        costs = {proxy.port: admitted, spent.port: refused}
        found = in_turn(lambda server: costs[server.port](server), {"call": proxy, "proxy": spent})
    name = f"CPU of a refusal, {_CONNECTIONS} connections"
    return [Figure(name, "µs", found, Aim(0.5, is_ratio=True), beside="call")]


def cost_of_two_workers() -> list[Figure]:
    """Processor time of a short call with two workers on one database, beside that with one process."""
    cost = partial(_cost_of_calls, connections=2 * _CONNECTIONS)
    with _whole_answers() as upstream, proxy_of(upstream) as one, proxy_of(upstream, workers=2) as two:
        found = in_turn(cost, {"one": one, "proxy": two})
    name = f"CPU of a call, 2 workers, {2 * _CONNECTIONS} conn."
    return [Figure(name, "µs", found, Aim(1.15, is_ratio=True), beside="one")]


def cost_of_a_long_prompt() -> list[Figure]:
    """Processor time of a call with a prompt of 100 kB."""
    return [
        _cost(
            "a prompt of 100 kB", f"CPU of a 100 kB prompt, {_LONG_CONNECTIONS} connections", Aim(1.8, is_ratio=True)
        )
    ]


def cost_of_a_chunk() -> list[Figure]:
    """Processor time of one chunk of a stream."""
    return [_cost("a chunk of 100 streams", f"CPU of a chunk, {_STREAMS} streams", Aim(1.3, is_ratio=True))]


def _cost(kind: str, name: str, aim: Aim) -> Figure:
    with KINDS[kind].upstream() as upstream, _compared(upstream) as compared:
        return Figure(name, "µs", in_turn(KINDS[kind].cost, compared), aim)


def added_latency() -> list[Figure]:
    """How much longer a call takes than directly to the upstream, one call at a time."""

    def measure(server: Server) -> tuple[int, int]:
        load = short_calls(server.port, connections=1, seconds=_LATENCY_S)
        return load.p50_us, load.p99_us

    with _whole_answers() as upstream, _compared(upstream) as compared:
        found = in_turn(measure, {"direct": upstream, **compared})
    direct = found.pop("direct")

    def added_ms(percentile: int) -> dict[str, list[float]]:
        return {
            name: [
                (latency[percentile] - own[percentile]) / 1000 for latency, own in zip(rounds, direct, strict=True)
            ]
            for name, rounds in found.items()
        }

    p50 = added_ms(0)
    beyond_relay = [ours - its for ours, its in zip(p50["proxy"], p50["relay"], strict=True)]
    return [
        Figure("latency added, p50, 1 connection", "ms", p50),
        Figure("the same, beyond what the relay adds", "ms", {"proxy": beyond_relay}, Aim(1)),
        Figure("latency added, p99, 1 connection", "ms", added_ms(1)),
    ]


def memory_of_streams() -> list[Figure]:
    """Memory before the first call, and the most while many streams are open."""

    async def measure(server: Server) -> tuple[float, float]:
        idle, samples = server.memory_mb("Rss"), []
        async with open_streams(server.port, _OPEN_STREAMS, within_s=2) as streams:
            while not streams.ended:
                samples.append(server.memory_mb("Rss"))
                await asyncio.sleep(0.5)
        return idle, max(samples)

    with servers.stream_upstream(tokens_per_s=1, tokens=_OPEN_S) as upstream, _compared(upstream) as compared:
        found = {name: uvloop.run(measure(server)) for name, server in compared.items()}
    each_kb = {name: [(most - idle) * 1024 / _OPEN_STREAMS] for name, (idle, most) in found.items()}
    return [
        Figure("memory (RSS), idle", "MB", {name: [idle] for name, (idle, _) in found.items()}, Aim(90)),
        Figure(
            f"memory (RSS), {_OPEN_STREAMS:,} open streams", "MB", {name: [most] for name, (_, most) in found.items()}
        ),
        Figure("the same, for each stream", "kB", each_kb, Aim(24)),
    ]


def time_to_start() -> list[Figure]:
    """From the start of the process, with compiled modules and a new database, until it accepts a connection."""
    compileall.compile_dir(servers.HERE / "proxy", quiet=1)

    def measure() -> float:
        began = time.monotonic()
        with proxy_of(upstream):
            return time.monotonic() - began

    with _whole_answers() as upstream:
        return [Figure("start to ready", "s", {"proxy": [measure() for _ in range(ROUNDS)]}, Aim(1))]


ALL: tuple[Callable[[], list[Figure]], ...] = (
    cost_of_a_call,
    cost_of_a_long_prompt,
    cost_of_a_chunk,
    cost_of_a_refusal,
    cost_of_two_workers,
    added_latency,
    memory_of_streams,
    time_to_start,
)


def in_turn(measure: Callable[[Server], T], compared: Mapping[str, Server]) -> dict[str, list[T]]:
    """Measure each server once in each round, after a first one that does not count; return the values of each."""
    for server in compared.values():
        measure(server)
    rounds = [{name: measure(server) for name, server in compared.items()} for _ in range(ROUNDS)]
    return {name: [each[name] for each in rounds] for name in compared}


@contextmanager
def proxy_of(upstream: Server, **more: Any) -> Iterator[Server]:
    """The proxy with a folder of its own. `more` are parameters of `servers.proxy`."""
    with (
        TemporaryDirectory(prefix="llm-quota-proxy-bench-") as name,
        servers.proxy(Path(name), upstream, **more) as server,
    ):
        yield server


@contextmanager
def _compared(upstream: Server) -> Iterator[dict[str, Server]]:
    """The proxy, and what it is compared with, in front of the same upstream."""
    with (
        TemporaryDirectory(prefix="llm-quota-proxy-bench-") as name,
        servers.nginx(Path(name), upstream) as nginx,
        servers.relay(upstream) as relay,
        proxy_of(upstream) as proxy,
    ):
        yield {"nginx": nginx, "relay": relay, "proxy": proxy}
