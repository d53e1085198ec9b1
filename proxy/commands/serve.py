"""`serve` and `demo`: the proxy itself.

Commands print their errors as text. `serve` logs them, because its standard error is the log, which is JSON from the
first line to the last. Only on a terminal the mistakes in the config are text.
"""

import asyncio
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import click
import structlog
import uvloop

from proxy import __version__, logs
from proxy.calls.tokenizer import Tokenizers, table_folders
from proxy.config.loader import BadConfig, Config, ConfigFile, Settings
from proxy.config.reload import log_mistakes
from proxy.ledger.schema import NewerSchema
from proxy.ledger.store import StoreInUse, StoreUnavailable
from proxy.server import Server, public_address
from proxy.server import serve as serve_until_stopped
from proxy.workers import Command, ControlSocket, NotServing, Parent

_NO, _WRONG = 1, 2
# Errors that the operator can fix.
_FIXABLE = (StoreInUse, StoreUnavailable, NewerSchema, NotServing, OSError)

log = structlog.get_logger("cli")


@click.command("serve")
@click.option(
    "--config", "path", default="quotas.yaml", show_default=True, help="The file with the policy and the settings."
)
@click.option("--host", help="Replaces the host of `server.api`.")
@click.option("--port", type=click.IntRange(0, 65535), help="Replaces the port of `server.api`.")
@click.option("--admin-port", type=click.IntRange(0, 65535), help="Replaces the port of `server.admin`.")
@click.option(
    "--workers", "count", type=click.IntRange(1, 256), default=1, show_default=True, help="The number of processes."
)
# Both names have to stay. On SIGUSR2, a parent of an older release starts this program with the option's old name.
@click.option(
    *("--control-socket", "--tie", "control_number"),
    type=int,
    hidden=True,
    help="Be a worker of the parent that has the other end of this socket. Only the parent gives this option.",
)
@click.option(
    "--new-database", is_flag=True, help="Make the SQLite database anew if it is gone: all quotas are unused."
)
@click.option(
    "--no-migrate",
    is_flag=True,
    help="Only check the schema of the database, which `migrate` brings up to date.",
)
@click.option("--lease", "lease_s", type=click.FloatRange(0.1), hidden=True, help="Seconds. For `torture`.")
def serve(count: int, control_number: int | None, path: str, **options: Any) -> None:
    """Serve until stopped. The policy is reloaded when the file changes, or on SIGHUP.

    SIGTERM stops in order: new calls are taken for `server.shutdown_delay`, and then those that run have 30 s to end.
    SIGINT ends at once.

    With several workers, SIGUSR2 replaces them with new ones that run the program as it is then. No call is lost.
    """
    if options["new_database"] and options["no_migrate"]:
        raise click.UsageError("--new-database makes tables, which --no-migrate forbids: leave one of them out.")
    with _logged_failures():
        control = None if control_number is None else ControlSocket(control_number)
        file = ConfigFile(path, os.environ)
        config = _with_options(file.load(), **options)
        logs.set_format(config.log.format)
        if control is None:
            log.info("starting", version=__version__, workers=count, **_summary(config))
        if control is not None or count == 1:
            uvloop.run(_serve(config, file, control))
        else:
            # The worker's command line is that of the parent, with its options, and the number of its socket behind
            # it. By the option's old name, which every release knows: a SIGUSR2 may also start an older release.
            command = Command((sys.executable, *sys.orig_argv[1:], "--tie"), os.environ)
            parent = Parent(config, count, command=command, load=lambda: _with_options(file.load(), **options))
            uvloop.run(parent.serve(_log_addresses))


@click.command("demo")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True)
@click.option("--admin-port", type=click.IntRange(0, 65535), default=8081, show_default=True)
def demo(port: int, admin_port: int) -> None:
    """Serve a demo with a simulated upstream, and print what to paste."""
    from proxy.demo import run  # imported here because it brings the simulator, which `serve` does not need

    logs.set_format("console")
    # Through a thread, as the log: a pipe that nobody reads must not keep the demo from being stopped.
    with closing(Tokenizers(table_folders(os.environ))) as tokenizers, closing(logs.LogStream(sys.stdout)) as printed:
        try:
            uvloop.run(run(port, admin_port, printed.write, tokenizers))
        except _FIXABLE as error:
            _give_up(str(error), _WRONG)
        except KeyboardInterrupt:
            pass


async def _serve(config: Config, file: ConfigFile, control: ControlSocket | None) -> None:
    """Serve in this process: as a worker if it has a control socket, else alone."""
    with closing(control or ExitStack()), closing(Tokenizers(table_folders(os.environ))) as tokenizers:
        server = Server(
            config,
            load=file.load,
            changes=file.changes,
            tokenizers=tokenizers,
            inherited=None if control is None else control.inherited,
        )
        if control is None:
            await serve_until_stopped(server, _log_addresses)
        else:
            await control.run(serve_until_stopped(server, control.report_serving))


def _with_options(
    config: Config, *, new_database: bool, no_migrate: bool, lease_s: float | None, **listeners: Any
) -> Config:
    """The config with what the command line gives."""
    settings = replace(
        _with_listeners(config.settings, **listeners),
        may_be_new_database=new_database,
        migrates=not no_migrate,
        lease_ms=None if lease_s is None else round(1000 * lease_s),
    )
    return replace(config, settings=settings)


def _with_listeners(settings: Settings, host: str | None, port: int | None, admin_port: int | None) -> Settings:
    """The settings with these parts of the listeners' addresses."""
    api, admin = settings.api, settings.admin
    api = replace(api, host=host or api.host, port=api.port if port is None else port)
    if admin is not None and admin_port is not None:
        admin = replace(admin, port=admin_port)
    return replace(settings, api=api, admin=admin)


@contextmanager
def _logged_failures() -> Iterator[None]:
    """Log whatever ends `serve` within the block, and exit with the code of that. The format is JSON until the config
    is loaded; a person at a terminal gets its mistakes as `check` prints them.
    """
    logs.catch_stray_errors()
    try:
        yield
    except BadConfig as error:
        if sys.stderr.isatty():
            _give_up(str(error), _WRONG)
        log_mistakes(error)
        log.error("the process can't serve", mistakes=len(error.mistakes))
        raise SystemExit(_WRONG) from None
    except _FIXABLE as error:
        log.error("the process can't serve", reason=str(error))
        raise SystemExit(_WRONG) from None
    except (Exception, asyncio.CancelledError) as error:
        log.error("the process ends because of a fault of the proxy", exc_info=error)
        raise SystemExit(_NO) from None
    except KeyboardInterrupt:
        pass


def _summary(config: Config) -> dict[str, object]:
    """What the first line of the log says of a config. The database has no user and no password."""
    return {
        "database": public_address(config.settings.database),
        "policy": config.policy.hash,
        "users": len(config.users),
        "groups": len(config.policy.groups),
    }


def _log_addresses(server: Server | Parent) -> None:
    urls = {
        name: f"http://{address}"
        for name, address in (("api", server.api), ("admin", server.admin))
        if address is not None
    }
    log.info("serving", **urls)
    _tell_systemd(os.environ.get("NOTIFY_SOCKET", ""))


def _tell_systemd(address: str) -> None:
    """Say that the service is ready (`Type=notify`), as sd_notify(3) describes it: a datagram to the socket that
    systemd names. An @ in front stands for the abstract namespace. Without systemd there is no address.
    """
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(b"READY=1", address.replace("@", "\0", 1) if address.startswith("@") else address)
    except OSError as error:
        log.warning("systemd can't be told that the service is ready, and will stop it", reason=str(error))


def _give_up(message: str, code: int) -> NoReturn:
    """Print the message and exit."""
    click.secho(message, fg="red", err=True)
    raise SystemExit(code)
