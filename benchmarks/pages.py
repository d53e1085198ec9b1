"""The command `python -m benchmarks.pages [--seconds N]`: what the page of administrators costs while it is open.

Ten thousand users call as often as one process on SQLite can answer: 32 connections always have a call in flight, and
each call has the key of the next user. 500 users are near a limit.

- First the view *Now* is opened in Chromium and closed again in turns, and the processor time of a call in the proxy
  is compared: with the page it should be less than a tenth more.
- Then the view stays open for N seconds (by default 600). Chromium's own metrics are read every 10 s, after a garbage
  collection. Their means in the first and in the last quarter are compared: they should stay flat.

It takes two minutes more than N seconds, and needs Debian's chromium, nginx-light and wrk.
"""

import argparse
import asyncio
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

import sqlalchemy as sa
from playwright.async_api import Browser, CDPSession, Page

from benchmarks import servers
from benchmarks.directory import _fill
from benchmarks.servers import Server, nginx_command
from benchmarks.wrk import Load, short_calls
from proxy.identity.directory import UserId
from proxy.identity.keys import NewKey
from proxy.ledger.schema import counters, crossings
from proxy.policy.quota import user_subject
from proxy.server import store_of, wall_clock_ms
from tests.admin import ADMINS
from tests.pages.browser import Findings, log_in, open_browser, open_windows

_USERS = 10_000
_NEAR = 500
_CONNECTIONS = 32
_ROUNDS = 5
_SLICE_S = 10
_COST_UNDER = 1.1
_FLAT_UNDER = 1.2
_WEEK_MS = 7 * 86_400_000

_POLICY = """
server: {{api: "127.0.0.1:{port}", admin: "127.0.0.1:{admin_port}", shutdown_delay: 0s}}
database: "sqlite:///{folder}/quotas.db"
log: {{calls: none}}
upstreams:
  upstream: {{base_url: "http://127.0.0.1:{upstream}/v1", api_key: sk-upstream, kind: openai}}
models:
  short: {{upstream: upstream, max_output_tokens: 1000}}
groups:
  staff:
    quotas:
      daily: {{tokens: 900_000M, requests: 900M, per: day}}
      weekly: {{tokens: 10M, per: 7d}}
{admins}
"""


@dataclass(frozen=True, slots=True)
class _Slice:
    """What was measured in ten seconds: the load, the proxy's processor time, and what the page has and did."""

    load: Load
    cpu_us: float
    heap_mb: float = 0
    nodes: float = 0
    listeners: float = 0
    busy_percent: float = 0
    script_percent: float = 0

    @property
    def cpu_of_a_call_us(self) -> float:
        """Processor time of a call in the proxy."""
        return self.cpu_us / self.load.calls

    @property
    def calls_per_s(self) -> float:
        """Calls that were answered."""
        return self.load.calls / _SLICE_S


class _Proxy:
    """The proxy under load."""

    def __init__(self, server: Server, admin_port: int, keys: Path) -> None:
        self._server = server
        self._keys = keys
        self._calls = 0
        self.admin_url = f"http://127.0.0.1:{admin_port}"

    async def warm_up(self) -> None:
        """Call until each user has called, because the first call of a user costs more."""
        while self._calls < _USERS:
            await self.load()

    async def load(self) -> _Slice:
        """Call for ten seconds."""
        before = self._server.cpu_us()
        load = await asyncio.to_thread(
            short_calls,
            self._server.port,
            connections=_CONNECTIONS,
            seconds=_SLICE_S,
            keys=self._keys,
            first=self._calls % _USERS,
        )
        self._calls += load.calls
        return _Slice(load, self._server.cpu_us() - before)


class _Metrics:
    """Chromium's own metrics of a page."""

    def __init__(self, session: CDPSession) -> None:
        self._session = session

    @classmethod
    async def of(cls, page: Page) -> "_Metrics":
        """Those of this page, from now on."""
        session = await page.context.new_cdp_session(page)
        await session.send("Performance.enable")
        return cls(session)

    async def read(self) -> dict[str, float]:
        """All of them by their names, after a garbage collection."""
        await self._session.send("HeapProfiler.collectGarbage")
        found = await self._session.send("Performance.getMetrics")
        return {metric["name"]: metric["value"] for metric in found["metrics"]}


def main() -> None:
    """Print both comparisons, or what is missing to measure them."""
    parser = argparse.ArgumentParser(description="What the page of administrators costs while it is open.")
    parser.add_argument("--seconds", type=int, default=600, help="how long it stays open; at least 80")
    seconds = parser.parse_args().seconds
    needed = {"chromium": shutil.which("chromium"), "nginx": nginx_command(), "wrk": shutil.which("wrk")}
    if missing := [name for name, found in needed.items() if not found]:
        print(f"Skipped: needs {' and '.join(missing)} (Debian: apt-get install chromium nginx-light wrk).")
        return
    with TemporaryDirectory(prefix="llm-quota-proxy-bench-") as name:
        asyncio.run(_measure(Path(name), max(8, seconds // _SLICE_S)))


async def _measure(folder: Path, slices: int) -> None:
    database = f"sqlite:///{folder}/quotas.db"
    keys = await _fill(database, _USERS)
    await _bring_near(database, keys[:_NEAR])
    (folder / "keys").write_text("".join(f"{key.text}\n" for key in keys))
    admin_port = servers.free_port()
    findings = Findings()
    with (
        servers.whole_upstream(folder) as upstream,
        servers.proxy(folder, upstream, policy=_POLICY, admin_port=admin_port, admins=ADMINS) as server,
    ):
        proxy = _Proxy(server, admin_port, folder / "keys")
        await proxy.warm_up()
        async with open_browser() as browser:
            await _compare(proxy, browser, findings)
            await _keep_open(proxy, browser, findings, slices)
    for noticed in findings.noticed[:10]:
        print(f"    the page: {noticed}")


async def _bring_near(database: str, keys: list[NewKey]) -> None:
    """Let these users have used 85 % of their week, an hour ago."""
    at = wall_clock_ms() - 3_600_000
    rows = [
        {
            "subject": user_subject(UserId("database", f"user {key.id}").subject),
            **{"quota_id": "staff/weekly", "opened_at": at, "resets_at": at + _WEEK_MS},
        }
        for key in keys
    ]
    amounts = {"used_input": 8_500_000, "used_output": 0, "used_requests": 1000}
    amounts |= {"held_input": 0, "held_output": 0, "held_requests": 0}
    store = store_of(database)
    await store.open()
    async with store.transaction(writes=True) as connection:
        await connection.execute(sa.insert(counters), [row | amounts for row in rows])
        await connection.execute(sa.insert(crossings), [{**row, "level": 80, "crossed_at": at} for row in rows])
    await store.close()


async def _compare(proxy: _Proxy, browser: Browser, findings: Findings) -> None:
    """Load the proxy without and with the page, in turns."""
    without, with_page = [], []
    for _ in range(_ROUNDS):
        without.append(await proxy.load())
        async with open_windows(browser, findings) as open_window:
            await log_in(await open_window(proxy.admin_url), at="/admin/#/now")
            with_page.append(await proxy.load())
    _print("", "without", "with the page", "ratio", "aim", "met")
    a, b = ([each.cpu_of_a_call_us for each in slices] for slices in (without, with_page))
    # Neighbours in time are compared, because other programs make one round slower than another.
    ratio = median(late / early for early, late in zip(a, b, strict=True))
    _print_compared("CPU of a call", "µs", median(a), median(b), ratio=ratio, under=_COST_UNDER)
    a, b = ([each.calls_per_s for each in slices] for slices in (without, with_page))
    _print_compared("calls per second", "", median(a), median(b), ratio=median(b) / median(a))


async def _keep_open(proxy: _Proxy, browser: Browser, findings: Findings, slices: int) -> None:
    """Load the proxy with the page open, and compare the first quarter with the last one."""
    async with open_windows(browser, findings) as open_window:
        page = await open_window(proxy.admin_url)
        await log_in(page, at="/admin/#/now")
        await proxy.load()  # until everything that is shown first is there
        metrics = await _Metrics.of(page)
        measured = [await _with_metrics(proxy, metrics) for _ in range(slices)]
    quarter = slices // 4
    first, last = measured[:quarter], measured[-quarter:]
    print()
    _print(f"page open for {slices * _SLICE_S} s", "first quarter", "last quarter", "ratio", "aim", "met")
    for name, unit, attribute in (
        ("memory of scripts (JSHeapUsedSize)", "MB", "heap_mb"),
        ("nodes (Nodes)", "", "nodes"),
        ("listeners (JSEventListeners)", "", "listeners"),
        ("CPU, main thread (TaskDuration)", "%", "busy_percent"),
        ("CPU of scripts (ScriptDuration)", "%", "script_percent"),
    ):
        early, late = (mean(getattr(each, attribute) for each in part) for part in (first, last))
        # A page without any script would have 0 % in both.
        _print_compared(name, unit, early, late, ratio=late / max(early, 0.01), under=_FLAT_UNDER)
    early, late = (mean(each.cpu_of_a_call_us for each in part) for part in (first, last))
    _print_compared("CPU of a call, in the proxy", "µs", early, late, ratio=late / early)
    early, late = (mean(each.calls_per_s for each in part) for part in (first, last))
    _print_compared("calls per second", "", early, late, ratio=late / early)


async def _with_metrics(proxy: _Proxy, metrics: _Metrics) -> _Slice:
    before, began = await metrics.read(), time.monotonic()
    load = await proxy.load()
    spent_s = time.monotonic() - began
    after = await metrics.read()

    def percent(name: str) -> float:
        return (after[name] - before[name]) / spent_s * 100

    return _Slice(
        load.load,
        load.cpu_us,
        heap_mb=after["JSHeapUsedSize"] / 2**20,
        nodes=after["Nodes"],
        listeners=after["JSEventListeners"],
        busy_percent=percent("TaskDuration"),
        script_percent=percent("ScriptDuration"),
    )


def _print_compared(
    name: str, unit: str, before: float, after: float, *, ratio: float, under: float | None = None
) -> None:
    aim, met = ("", "") if under is None else (f"< {under:g} ×", "yes" if ratio < under else "NO")
    shown = [f"{value:,.{0 if value >= 100 else 2}f} {unit}".strip() for value in (before, after)]
    _print(name, *shown, f"{ratio:.2f} ×", aim, met)


def _print(*cells: str) -> None:
    widths = (40, 16, 16, 10, 10, 5)
    print("".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip(), flush=True)


if __name__ == "__main__":
    main()
