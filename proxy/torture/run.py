"""Torture: many clients hammer a quota, and what the upstream gave, what they saw and what was counted must agree.

    run             against our own proxy, one process or several replicas, which are killed now and then; its books
                    are read
    run_outside     against any OpenAI-compatible proxy that forwards to the upstream that is served here

What is judged, and how, stands in `torture_verdict`.
"""

import asyncio
import re
import resource
import secrets
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path

from proxy.torture.clients import Clients, Door, Target
from proxy.torture.database import count_open, need_none, read_books, remove_books
from proxy.torture.evidence import Evidence
from proxy.torture.plan import Plan
from proxy.torture.process import Proxy
from proxy.torture.replicas import Replicas
from proxy.torture.report import Report
from proxy.torture.upstream import Accountant
from proxy.torture.verdict import judge, judge_from_outside

# How long calls whose clients have gone may take to end: a drain takes 30 s at the most.
_QUIET_S = 40.0
_LOOK_EVERY_S = 0.1
_COUNTER_S = 30.0

Say = Callable[[str], object]


class NoCount(Exception):
    """The command that reads the counter failed, or printed no number."""


@dataclass(frozen=True, slots=True)
class Outside:
    """A proxy that is not ours to start, and how it is set up. `counter` is a command that prints what it counted."""

    url: str
    keys: tuple[str, ...]
    model: str
    upstream_port: int
    upstream_key: str
    counter: str | None = None


@dataclass(frozen=True, slots=True)
class Shared:
    """The PostgreSQL database of all replicas, by its URL, and the command that restarts it, if it is to be."""

    url: str
    restart: str | None = None


async def run(plan: Plan, *, now: Callable[[], int], say: Say, shared: Shared | None = None) -> Report:
    """Torture our own proxy: one process on a file, or replicas on a database.

    Raises NotStarted where one does not come up, NoBooks and NotRestarted.
    """
    _raise_file_limit()
    if shared is not None:
        await need_none(shared.url)
    upstream = Accountant(_key(), plan.seed, tokens_per_s=plan.tokens_per_s)
    await upstream.start()
    folder = Path(tempfile.mkdtemp(prefix="llm-quota-proxy-torture-"))
    keys = tuple(_key() for _ in range(plan.users))
    proxies = _proxies(plan, folder, shared, upstream=upstream, keys=keys)
    replicas = Replicas(proxies, plan, restart=shared.restart if shared else None)
    try:
        report = judge(await _evidence(plan, replicas, upstream, now=now, say=say))
    finally:
        await replicas.end()
        await upstream.stop()
    if report.is_kept:
        shutil.rmtree(folder)
        if shared is not None:
            await remove_books(shared.url)
    else:
        say(f"The books are kept {'in the database' if shared else 'beside the logs'}, the logs in {folder}")
    return report


def _proxies(
    plan: Plan, folder: Path, shared: Shared | None, *, upstream: Accountant, keys: tuple[str, ...]
) -> list[Proxy]:
    """As many as the plan says, each with a folder of its own."""
    proxies = []
    for number in range(plan.replicas):
        home = folder / f"replica-{number}"
        home.mkdir()
        database = shared.url if shared else None
        proxies.append(
            Proxy(home, plan, upstream=upstream.url, upstream_key=upstream.key, keys=keys, database=database)
        )
    return proxies


async def _evidence(
    plan: Plan, replicas: Replicas, upstream: Accountant, *, now: Callable[[], int], say: Say
) -> Evidence:
    await replicas.start()
    proxies = replicas.proxies
    database = proxies[0].database
    say(f"{_intent(plan)}, {len(plan.kills_at_s)} kills, {len(plan.pauses_at_s)} pauses, {len(proxies)} replicas")
    doors = [Door(f"http://127.0.0.1:{proxy.port}/v1", partial(_era, proxy)) for proxy in proxies]
    target = Target(doors, proxies[0].keys, database_era=lambda: replicas.database_era)
    seen, _ = await asyncio.gather(Clients(target, plan, now=now).run(), replicas.befall())
    await upstream.at_rest(_QUIET_S)
    await _quiet(database)
    at_rest = await read_books(database)
    await replicas.stop()
    return Evidence(
        limit=plan.tokens,
        seen=seen,
        given=upstream.given,
        books=await read_books(database),
        at_rest=at_rest,
        kills=sum(proxy.kills for proxy in proxies),
        pauses=sum(proxy.pauses for proxy in proxies),
        restarts=replicas.database_era // 2,
        crashes=sum(proxy.crashes for proxy in proxies),
    )


def _era(proxy: Proxy) -> int:
    return proxy.era


async def run_outside(plan: Plan, outside: Outside, *, now: Callable[[], int], say: Say) -> Report:
    """Torture a proxy that is up. Raises NoCount, or OSError where the upstream's port is taken."""
    _raise_file_limit()
    upstream = Accountant(outside.upstream_key, plan.seed, tokens_per_s=plan.tokens_per_s)
    await upstream.start(outside.upstream_port)
    loop = asyncio.get_running_loop()
    is_one_window = plan.window_s > plan.seconds

    def free_of(user: int) -> int | None:
        """What is left by the upstream's count; nobody outside knows when windows begin, if there are several."""
        return plan.tokens - upstream.tokens_of(user % plan.pots, plan.pots) if is_one_window else None

    try:
        say(f"The upstream is {upstream.url} with the key {upstream.key}; the proxy must forward to it.")
        say(_intent(plan))
        before = await _count(outside.counter)
        begun = loop.time()
        target = Target([Door(outside.url.rstrip("/"))], outside.keys, outside.model, free_of=free_of)
        seen = await Clients(target, plan, now=now).run()
        await upstream.at_rest(_QUIET_S)
        lasted_s = loop.time() - begun
        after = await _count(outside.counter)
    finally:
        await upstream.stop()
    return judge_from_outside(
        Evidence(limit=plan.tokens, seen=seen, given=upstream.given),
        windows=1 if is_one_window else ceil(lasted_s / plan.window_s) + 1,
        pots=plan.pots,
        counted=None if after is None or before is None else after - before,
    )


def _intent(plan: Plan) -> str:
    whose = f"{plan.users} users share" if plan.shared else f"{plan.users} users have each"
    quota = f"{whose} {plan.tokens:,} tokens per {plan.per}"
    return f"{plan.clients} clients for {plan.seconds:g} s; {quota}; seed {plan.seed}"


async def _quiet(database: str) -> None:
    """Wait until no call is in flight by the books, also of those that died, or until that takes too long."""
    for _ in range(round(_QUIET_S / _LOOK_EVERY_S)):
        if not await count_open(database):
            return
        await asyncio.sleep(_LOOK_EVERY_S)


async def _count(command: str | None) -> int | None:
    """What the proxy's own counter says: the last number that the command prints."""
    if command is None:
        return None
    process = await asyncio.create_subprocess_shell(command, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(_COUNTER_S):
            printed, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        raise NoCount(f"The counter's command took longer than {_COUNTER_S:.0f} s.") from None
    numbers = re.findall(rb"[0-9]+", printed)
    if process.returncode != 0 or not numbers:
        raise NoCount(f"The counter's command printed no number (exit code {process.returncode}).")
    return int(numbers[-1])


def _raise_file_limit() -> None:
    """A call takes two descriptors here, its client's and its upstream's, and the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _key() -> str:
    return f"sk-torture-{secrets.token_urlsafe(24)}"
