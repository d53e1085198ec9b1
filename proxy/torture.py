"""Torture: many clients hammer a quota, and what the upstream gave, what they saw and what was counted must agree.

    run             against our own proxy, a process that is killed now and then; its books are read
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
from math import ceil
from pathlib import Path

from proxy.torture_books import count_open, read_books
from proxy.torture_clients import Clients, Target
from proxy.torture_plan import Plan
from proxy.torture_proxy import Proxy
from proxy.torture_records import Evidence
from proxy.torture_report import Report
from proxy.torture_upstream import Accountant
from proxy.torture_verdict import judge, judge_from_outside

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


async def run(plan: Plan, *, now: Callable[[], int], say: Say) -> Report:
    """Torture our own proxy. Raises NotStarted where it does not come up."""
    _raise_file_limit()
    upstream = Accountant(_key(), plan.seed, tokens_per_s=plan.tokens_per_s)
    await upstream.start()
    folder = Path(tempfile.mkdtemp(prefix="llm-quota-proxy-torture-"))
    keys = tuple(_key() for _ in range(plan.users))
    proxy = Proxy(folder, plan, upstream=upstream.url, upstream_key=upstream.key, keys=keys)
    try:
        report = judge(await _evidence(plan, proxy, upstream, now=now, say=say))
    finally:
        await proxy.end()
        await upstream.stop()
    if report.is_kept:
        shutil.rmtree(folder)
    else:
        say(f"The file and the log of the proxy are kept in {folder}")
    return report


async def _evidence(plan: Plan, proxy: Proxy, upstream: Accountant, *, now: Callable[[], int], say: Say) -> Evidence:
    await proxy.start()
    say(f"{_intent(plan)}, {len(plan.kills_at_s)} kills")
    target = Target(f"http://127.0.0.1:{proxy.port}/v1", proxy.keys, era=lambda: proxy.era)
    seen, _ = await asyncio.gather(Clients(target, plan, now=now).run(), _kill(proxy, plan))
    await upstream.at_rest(_QUIET_S)
    await _quiet(proxy.database)
    at_rest = read_books(proxy.database)
    await proxy.stop()
    return Evidence(
        limit=plan.tokens,
        seen=seen,
        given=upstream.given,
        books=read_books(proxy.database),
        at_rest=at_rest,
        kills=proxy.kills,
        crashes=proxy.crashes,
    )


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
        target = Target(outside.url.rstrip("/"), outside.keys, outside.model, free_of=free_of)
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


async def _kill(proxy: Proxy, plan: Plan) -> None:
    """Kill the proxy at the plan's times."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for at_s in plan.kills_at_s:
        await asyncio.sleep(begun + at_s - loop.time())
        await proxy.kill_and_restart()


async def _quiet(database: Path) -> None:
    """Wait until no call is in flight by the books, or until that takes too long."""
    for _ in range(round(_QUIET_S / _LOOK_EVERY_S)):
        if not count_open(database):
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
