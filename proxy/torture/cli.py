"""The command `torture`: its options, and what it says when they do not go together.

Exit codes: 0 if every promise was kept, 1 if one was broken, 2 if the options or the environment are wrong.
"""

import time
from functools import partial
from typing import Any, NoReturn

import click
import uvloop

from proxy.torture.database import NoBooks
from proxy.torture.plan import Plan
from proxy.torture.process import NotStarted
from proxy.torture.replicas import NotRestarted
from proxy.torture.report import Report
from proxy.torture.run import NoCount, Outside, Shared, run, run_outside

_NO, _WRONG = 1, 2


@click.command("torture")
@click.option("--clients", type=click.IntRange(1, 2000), default=64, show_default=True)
@click.option("--seconds", type=click.FloatRange(1), default=60, show_default=True)
@click.option("--users", type=click.IntRange(1), default=8, show_default=True, help="Clients share them out.")
@click.option("--limit", type=click.IntRange(1), help="Tokens of the quota. By default such that it is used up.")
@click.option("--per", default="1h", show_default=True, help="The quota's window.")
@click.option("--shared", is_flag=True, help="One pot for all users instead of a quota for each.")
@click.option("--disconnects", type=click.FloatRange(0, 1), default=0.2, show_default=True, help="Who hang up.")
@click.option("--kill-every", "kill_every_s", type=click.FloatRange(0), default=10, show_default=True)
@click.option("--replicas", type=click.IntRange(1), default=1, show_default=True, help="Processes on one database.")
@click.option(
    "--database", help="Where they share their books: an empty one, as postgresql://user:password@host/name."
)
@click.option("--pause-every", "pause_every_s", type=click.FloatRange(0), default=20, show_default=True)
@click.option("--restart-database", "restart", help="A command that restarts it; run once, in the middle.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--target", help="Another proxy's address with /v1, instead of our own, which is started and killed.")
@click.option("--key", "keys", multiple=True, help="A user's key there; may be given several times.")
@click.option("--model", help="The model to ask it for.")
@click.option("--upstream-port", type=click.IntRange(1, 65535), help="Where the upstream is that it forwards to.")
@click.option("--upstream-key", help="The key that it must send there.")
@click.option("--counter", help="A command that prints how many tokens it has counted.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(as_json: bool, **options: Any) -> None:
    """Hammer a quota from many clients, and hold what was counted against what was given."""
    report = _torture(options)
    click.echo(report.as_json() if as_json else report.as_text())
    if not report.is_kept:
        raise SystemExit(_NO)


def _torture(options: dict[str, Any]) -> Report:
    say = partial(click.echo, err=True)
    outside = {name: options.pop(name) for name in "keys model upstream_port upstream_key counter".split()}
    target = options.pop("target")
    shared = _shared(options["replicas"], options.pop("database"), options.pop("restart"))
    try:
        if target is None:
            return uvloop.run(run(Plan(**options), now=_wall_clock_ms, say=say, shared=shared))
        if options["limit"] is None or not all(outside[name] for name in list(outside)[:4]):
            _give_up("--target needs --key, --model, --limit, --upstream-port and --upstream-key too.", _WRONG)
        plan = Plan(**{**options, "users": len(outside["keys"])})
        return uvloop.run(run_outside(plan, Outside(target, **outside), now=_wall_clock_ms, say=say))
    except (ValueError, OSError, NotStarted, NoBooks, NoCount, NotRestarted) as error:
        _give_up(str(error), _WRONG)


def _shared(replicas: int, database: str | None, restart: str | None) -> Shared | None:
    """The database of all replicas; None: one proxy has a file of its own."""
    if database is None:
        if replicas > 1 or restart is not None:
            _give_up(
                "Several replicas, or a database to restart, need PostgreSQL: "
                "give an empty one with --database postgresql://user:password@host/name.",
                _WRONG,
            )
        return None
    if not database.startswith("postgresql://"):
        _give_up("--database takes a PostgreSQL, as postgresql://user:password@host/name.", _WRONG)
    return Shared(database, restart)


def _wall_clock_ms() -> int:
    """Milliseconds since 1970, by this machine's clock: the proxy's resets are told in it."""
    return time.time_ns() // 1_000_000


def _give_up(message: str, code: int) -> NoReturn:
    click.secho(message, fg="red", err=True)
    raise SystemExit(code)
