"""Run a load test: start the upstream, the proxies and the clients, inject faults, and collect the records.

    run             tests this proxy, as one process or as several replicas, which are killed and paused; its database
                    is read
    run_external    tests any OpenAI-compatible proxy that forwards to the upstream that is served here
    compare         tests such a proxy twice: alone, and behind this proxy

`verdict` says what is judged, and how.
"""

import asyncio
import re
import resource
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path

from proxy.torture.administration import judge_administration
from proxy.torture.administrator import Administrator
from proxy.torture.changes import Administration
from proxy.torture.clients import Address, Clients, ProxyUnderTest, bearer
from proxy.torture.database import count_open_calls, drop_schema, read_audit, read_snapshot, require_empty
from proxy.torture.evidence import Evidence
from proxy.torture.plan import Plan
from proxy.torture.process import ADMIN_NAME, FRONT_KEY, USER_HEADER, ProxyProcess, UpstreamSettings
from proxy.torture.replicas import Replicas
from proxy.torture.report import Comparison, Report
from proxy.torture.upstream import RecordingUpstream
from proxy.torture.verdict import judge, judge_external

# How long calls whose clients have disconnected may take to end: the proxy drains an answer for at most 30 s.
_IDLE_S = 40.0
_LOOK_EVERY_S = 0.1
_COUNTER_S = 30.0
# Users are of the file, of a user interface in front, or of the database.
_SOURCES = 3

Print = Callable[[str], object]


class CounterUnreadable(Exception):
    """The command that reads the proxy's counter failed or printed no number."""


@dataclass(frozen=True, slots=True)
class ExternalProxy:
    """A proxy that somebody else has started, and its configuration.

    `counter` is a shell command that prints how many tokens the proxy has counted.
    """

    url: str
    keys: tuple[str, ...]
    model: str
    upstream_port: int
    upstream_key: str
    counter: str | None = None


@dataclass(frozen=True, slots=True)
class SharedDatabase:
    """The URL of the replicas' PostgreSQL database, and a shell command that restarts it, None for no restart."""

    url: str
    restart: str | None = None


async def run(plan: Plan, *, now: Callable[[], int], say: Print, shared: SharedDatabase | None = None) -> Report:
    """Test this proxy: one process with an SQLite file, or replicas with a shared database.

    `now` returns ms since 1970. Raises NotStarted if a proxy does not start, DatabaseUnusable and NotRestarted.
    """
    _raise_file_limit()
    if shared is not None:
        await require_empty(shared.url)
    upstream = RecordingUpstream(_key(), plan.seed, tokens_per_s=plan.tokens_per_s)
    await upstream.start()
    folder = Path(tempfile.mkdtemp(prefix="llm-quota-proxy-torture-"))
    proxies = _proxies(plan, folder, shared, upstream=upstream)
    replicas = Replicas(proxies, plan, restart=shared.restart if shared else None, now=now)
    try:
        evidence = await _collect_evidence(plan, replicas, upstream, now=now, say=say)
        report = Report((*judge(evidence).figures, *judge_administration(evidence)))
    finally:
        await replicas.kill()
        await upstream.stop()
    if report.is_kept:
        shutil.rmtree(folder)
        if shared is not None:
            await drop_schema(shared.url)
    elif shared is not None:
        say(f"The data is kept in the database for inspection, the logs in {folder}")
    else:
        say(f"The database and the logs are kept for inspection in {folder}")
    return report


def _proxies(
    plan: Plan, folder: Path, shared: SharedDatabase | None, *, upstream: RecordingUpstream
) -> list[ProxyProcess]:
    """Return as many proxies as the plan says, each with a folder of its own."""
    proxies = []
    keys = tuple(_key() for user in range(plan.users) if user % _SOURCES == 0)
    for number in range(plan.replicas):
        home = folder / f"replica-{number}"
        home.mkdir()
        proxies.append(
            ProxyProcess(
                *(home, plan),
                upstream=UpstreamSettings(upstream.url, upstream.key),
                keys=keys,
                database=shared.url if shared else None,
            )
        )
    return proxies


async def _credentials(plan: Plan, proxy: ProxyProcess) -> list[Mapping[str, str]]:
    """The headers of each user: in turn one of the file, of a user interface in front, and of the database."""
    made = await proxy.add_users(len(range(2, plan.users, _SOURCES)))

    def headers_of(user: int) -> dict[str, str]:
        number, source = divmod(user, _SOURCES)
        if source == 1:
            return {**bearer(FRONT_KEY), USER_HEADER: f"user-{number}"}
        return bearer((proxy.keys if source == 0 else made)[number])

    return [headers_of(user) for user in range(plan.users)]


def _user_names(plan: Plan) -> list[str]:
    """The name of each user in records."""
    prefixes = ("", "front:", "database:")
    return [f"{prefixes[user % _SOURCES]}user-{user // _SOURCES}" for user in range(plan.users)]


async def _administer(administrator: Administrator | None, plan: Plan) -> None:
    if administrator is not None:
        await administrator.run(plan.seconds)


async def _collect_evidence(
    plan: Plan, replicas: Replicas, upstream: RecordingUpstream, *, now: Callable[[], int], say: Print
) -> Evidence:
    await replicas.start()
    proxies = replicas.proxies
    database = proxies[0].database
    faults = f"{len(plan.kills_at_s)} kills, {len(plan.pauses_at_s)} pauses"
    say(f"{_summary(plan)}, {faults}, {len(proxies)} replicas")
    addresses = [Address(f"http://127.0.0.1:{proxy.port}/v1", partial(_epoch, proxy)) for proxy in proxies]
    credentials = await _credentials(plan, proxies[0])
    under_test = ProxyUnderTest(addresses, credentials, database_epoch=lambda: replicas.database_epoch)
    users, administrator = _user_names(plan), None
    if plan.administrator:
        apis = [
            Address(f"http://127.0.0.1:{proxy.admin_port}/admin/api", partial(_epoch, proxy)) for proxy in proxies
        ]
        administrator = Administrator(apis, credentials, users, seed=plan.seed, now=now)
    records, _, _ = await asyncio.gather(
        Clients(under_test, plan, now=now).run(), replicas.inject_faults(), _administer(administrator, plan)
    )
    await upstream.wait_until_idle(_IDLE_S)
    await _wait_until_settled(database)
    # Read twice: a call that is still open or held now is leaked. The stop of the proxy must not hide that by
    # settling it, and must not leave anything open or held either.
    idle = await read_snapshot(database)
    await replicas.stop()
    return Evidence(
        limit=plan.tokens,
        clients=records,
        upstream=upstream.records,
        stopped=await read_snapshot(database),
        idle=idle,
        kills=sum(proxy.kills for proxy in proxies),
        pauses=sum(proxy.pauses for proxy in proxies),
        restarts=replicas.database_epoch // 2,
        crashes=sum(proxy.crashes for proxy in proxies),
        administration=None
        if administrator is None
        else Administration(
            administrator.changes, await read_audit(database, f"admin:{ADMIN_NAME}"), replicas.outages
        ),
        users=users,
    )


def _epoch(proxy: ProxyProcess) -> int:
    return proxy.epoch


async def run_external(plan: Plan, external: ExternalProxy, *, now: Callable[[], int], say: Print) -> Report:
    """Test a proxy that is running. Raises CounterUnreadable, or OSError if the upstream's port is taken."""
    _raise_file_limit()
    upstream = RecordingUpstream(external.upstream_key, plan.seed, tokens_per_s=plan.tokens_per_s)
    await upstream.start(external.upstream_port)
    loop = asyncio.get_running_loop()
    is_one_window = plan.window_s > plan.seconds

    def free_tokens(user: int) -> int | None:
        """Return what the upstream's count leaves of the limit.

        With several windows, their beginnings are not known from outside, so None.
        """
        if not is_one_window:
            return None
        return plan.tokens - upstream.tokens_of(user % plan.counters, plan.counters)

    try:
        say(f"The upstream is {upstream.url} with the key {upstream.key}; the proxy must forward to it.")
        say(_summary(plan))
        before = await _read_counter(external.counter)
        started = loop.time()
        address = Address(external.url.rstrip("/"))
        under_test = ProxyUnderTest(
            *([address], [bearer(key) for key in external.keys], external.model), free_tokens=free_tokens
        )
        records = await Clients(under_test, plan, now=now).run()
        await upstream.wait_until_idle(_IDLE_S)
        lasted_s = loop.time() - started
        after = await _read_counter(external.counter)
    finally:
        await upstream.stop()
    return judge_external(
        Evidence(limit=plan.tokens, clients=records, upstream=upstream.records),
        # A run of 10 s can touch three windows of 5 s, if it begins in the middle of one: 10 / 5 + 1.
        windows=1 if is_one_window else ceil(lasted_s / plan.window_s) + 1,
        counters=plan.counters,
        counted=None if after is None or before is None else after - before,
    )


async def compare(
    plan: Plan, external: ExternalProxy, *, unlimited_key: str, now: Callable[[], int], say: Print
) -> Comparison:
    """Test a proxy that is running twice with the same calls: alone, and behind this proxy with the same limit.

    This proxy is started for the second run, and calls the other one with `unlimited_key`. Raises NotStarted beside
    what `run_external` raises.
    """
    alone = await run_external(plan, external, now=now, say=say)
    say("The same calls again, with this proxy in front of it.")
    folder = Path(tempfile.mkdtemp(prefix="llm-quota-proxy-torture-"))
    keys = tuple(_key() for _ in external.keys)
    upstream = UpstreamSettings(external.url, unlimited_key, kind="openai")
    proxy = ProxyProcess(folder, plan, upstream=upstream, keys=keys)
    try:
        await proxy.start()
        in_front = replace(external, url=f"http://127.0.0.1:{proxy.port}/v1", keys=keys)
        behind = await run_external(plan, in_front, now=now, say=say)
        await proxy.stop()
    finally:
        await proxy.kill()
    if behind.is_kept:
        shutil.rmtree(folder)
    else:
        say(f"The database and the log of this proxy are kept for inspection in {folder}")
    return Comparison(alone, behind)


def _summary(plan: Plan) -> str:
    subject = f"{plan.users} users share" if plan.shared else f"{plan.users} users have each"
    quota = f"{subject} {plan.tokens:,} tokens per {plan.per}"
    return f"{plan.clients} clients for {plan.seconds:g} s; {quota}; seed {plan.seed}"


async def _wait_until_settled(database: str) -> None:
    """Wait until no call is open in the database, including those of killed replicas, or until the time is over."""
    for _ in range(round(_IDLE_S / _LOOK_EVERY_S)):
        if not await count_open_calls(database):
            return
        await asyncio.sleep(_LOOK_EVERY_S)


async def _read_counter(command: str | None) -> int | None:
    """Return the last number that the command prints: how many tokens the proxy has counted."""
    if command is None:
        return None
    process = await asyncio.create_subprocess_shell(command, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(_COUNTER_S):
            printed, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        raise CounterUnreadable(f"The counter's command took longer than {_COUNTER_S:.0f} s.") from None
    numbers = re.findall(rb"[0-9]+", printed)
    if process.returncode != 0 or not numbers:
        raise CounterUnreadable(f"The counter's command printed no number (exit code {process.returncode}).")
    return int(numbers[-1])


def _raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard one.

    A call needs two descriptors in this process, its client's and its upstream's, and the usual soft limit is 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _key() -> str:
    return f"sk-torture-{secrets.token_urlsafe(24)}"
