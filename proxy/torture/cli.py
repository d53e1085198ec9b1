"""The command `torture`: its options, and the errors for options that can't be combined.

Exit codes: 0 if every promise was kept, 1 if one was broken, 2 if the options or the environment are wrong.
"""

import time
from functools import partial
from typing import Any, NoReturn

import click
import uvloop

from proxy.torture.database import DatabaseUnusable
from proxy.torture.plan import Plan
from proxy.torture.process import NotStarted
from proxy.torture.replicas import NotRestarted
from proxy.torture.report import Comparison, Report
from proxy.torture.run import CounterUnreadable, ExternalProxy, SharedDatabase, compare, run, run_external

_NO, _WRONG = 1, 2


@click.command("torture")
@click.option("--clients", type=click.IntRange(1, 2000), default=64, show_default=True)
@click.option("--seconds", type=click.FloatRange(1), default=60, show_default=True)
@click.option(
    "--users", type=click.IntRange(1), default=8, show_default=True, help="The clients are divided among them."
)
@click.option(
    "--limit", type=click.IntRange(1), help="Tokens of the quota. Default: about half of what the clients use."
)
@click.option("--per", default="1h", show_default=True, help="The quota's window.")
@click.option("--shared", is_flag=True, help="One quota shared by all users instead of one for each.")
@click.option(
    "--disconnects",
    type=click.FloatRange(0, 1),
    default=0.2,
    show_default=True,
    help="The part of the calls whose client disconnects.",
)
@click.option(
    "--kill-every",
    "kill_every_s",
    type=click.FloatRange(0),
    default=10,
    show_default=True,
    help="Seconds between kills (SIGKILL) of a proxy; 0 for none.",
)
@click.option(
    "--replicas",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Proxy processes that share one database.",
)
@click.option("--database", help="The replicas' database: an empty one, as postgresql://user:password@host/name.")
@click.option(
    "--pause-every",
    "pause_every_s",
    type=click.FloatRange(0),
    default=20,
    show_default=True,
    help="Seconds between pauses (SIGSTOP) of a replica; 0 for none.",
)
@click.option(
    "--restart-database",
    "restart",
    help="A command that restarts the database; it runs once, in the middle of the run.",
)
@click.option(
    "--administrator",
    is_flag=True,
    help="Change quotas, grants, counters, users and keys through the admin API all the time.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed makes the same calls.")
@click.option("--target", help="Test another proxy, at this address with /v1. It is not started or killed.")
@click.option(
    "--key",
    "keys",
    multiple=True,
    envvar="TORTURE_KEYS",
    show_envvar=True,
    help="With --target: a user's API key. May be repeated; the variable has them with spaces between.",
)
@click.option("--model", help="With --target: the model to request.")
@click.option(
    "--upstream-port",
    type=click.IntRange(1, 65535),
    help="With --target: the port of 127.0.0.1 to which that proxy forwards.",
)
@click.option(
    "--upstream-key",
    envvar="TORTURE_UPSTREAM_KEY",
    show_envvar=True,
    help="With --target: the API key with which that proxy calls its upstream.",
)
@click.option(
    "--behind",
    metavar="KEY",
    envvar="TORTURE_BEHIND",
    show_envvar=True,
    help="With --target: make the same calls again with this proxy in front of that one, and print both runs. This "
    "proxy calls that one with KEY, which should have no limits there.",
)
@click.option("--counter", help="With --target: a command that prints how many tokens that proxy has counted.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(as_json: bool, **options: Any) -> None:
    """Use up a quota from many clients, inject faults, and check every charge."""
    report = _torture(options)
    click.echo(report.as_json() if as_json else report.as_text())
    if not report.is_kept:
        raise SystemExit(_NO)


def _torture(options: dict[str, Any]) -> Report | Comparison:
    say = partial(click.echo, err=True)
    external = {name: options.pop(name) for name in "keys model upstream_port upstream_key counter".split()}
    target, behind = options.pop("target"), options.pop("behind")
    shared = _shared_database(options["replicas"], options.pop("database"), options.pop("restart"))
    if target is not None and options["administrator"]:
        _give_up("--administrator tests only this proxy: leave out --target.", _WRONG)
    if target is None and behind is not None:
        _give_up("--behind compares another proxy: it needs --target.", _WRONG)
    try:
        if target is None:
            return uvloop.run(run(Plan(**options), now=_wall_clock_ms, say=say, shared=shared))
        required = (*(external[name] for name in "keys model upstream_port upstream_key".split()), options["limit"])
        if not all(required):
            _give_up("--target needs --key, --model, --limit, --upstream-port and --upstream-key too.", _WRONG)
        plan = Plan(**{**options, "users": len(external["keys"])})
        proxy = ExternalProxy(target, **external)
        if behind is not None:
            return uvloop.run(compare(plan, proxy, unlimited_key=behind, now=_wall_clock_ms, say=say))
        return uvloop.run(run_external(plan, proxy, now=_wall_clock_ms, say=say))
    except (ValueError, OSError, NotStarted, DatabaseUnusable, CounterUnreadable, NotRestarted) as error:
        _give_up(str(error), _WRONG)


def _shared_database(replicas: int, url: str | None, restart: str | None) -> SharedDatabase | None:
    """Return the replicas' database, None if one proxy uses an SQLite file of its own."""
    if url is None:
        if replicas > 1 or restart is not None:
            _give_up(
                "Several replicas, or a database to restart, need PostgreSQL: "
                "give an empty database with --database postgresql://user:password@host/name.",
                _WRONG,
            )
        return None
    if not url.startswith("postgresql://"):
        _give_up("--database takes a PostgreSQL URL: postgresql://user:password@host/name.", _WRONG)
    return SharedDatabase(url, restart)


def _wall_clock_ms() -> int:
    """Return ms since 1970 by this machine's clock, which the resets that the proxy names refer to."""
    return time.time_ns() // 1_000_000


def _give_up(message: str, code: int) -> NoReturn:
    click.secho(message, fg="red", err=True)
    raise SystemExit(code)
