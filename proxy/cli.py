"""The program `llm-quota-proxy`. Its commands are in `commands`, and `torture` in `torture.cli`.

Exit codes: 0 for success, 1 if a check failed (`check` found mistakes) or the proxy has a fault, 2 if the command,
the config or the environment is wrong.
"""

import gc
import logging
import os
import sys
from importlib import import_module

import click

from proxy import __version__, logs

# Where each command is. Its module is imported when `--help` or a command line names it.
_COMMANDS = {
    "admin-keys": ("proxy.commands.admin_keys", "admin_keys"),
    "audit": ("proxy.commands.reports", "audit"),
    "backup": ("proxy.commands.backup", "backup"),
    "check": ("proxy.commands.check", "check"),
    "copy-database": ("proxy.commands.backup", "copy_database_command"),
    "demo": ("proxy.commands.serve", "demo"),
    "events": ("proxy.commands.events", "events"),
    "explain": ("proxy.commands.reports", "explain"),
    "grant": ("proxy.commands.counters", "grant"),
    "grants": ("proxy.commands.counters", "grants"),
    "keys": ("proxy.commands.directory", "keys"),
    "migrate": ("proxy.commands.backup", "migrate"),
    "quotas": ("proxy.commands.quotas", "quotas"),
    "reset": ("proxy.commands.counters", "reset"),
    "restore": ("proxy.commands.backup", "restore"),
    "schema": ("proxy.commands.check", "schema"),
    "serve": ("proxy.commands.serve", "serve"),
    "torture": ("proxy.torture.cli", "command"),
    "usage": ("proxy.commands.reports", "usage"),
    "users": ("proxy.commands.directory", "users"),
    "whoami": ("proxy.commands.directory", "whoami"),
}


class _Commands(click.Group):
    """The commands of `_COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, as `--help` lists them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name; None if there is none."""
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name]
        # Imports make much that stays. By default the collector walks over it again and again, for 0.1 s.
        gc.set_threshold(50_000)
        command: click.Command = getattr(import_module(module), name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--verbose", is_flag=True, help="Also log each attempt at an upstream and each change of a hold.")
def main(verbose: bool) -> None:
    """An OpenAI-compatible reverse proxy that enforces group quotas on LLM use."""
    _open_closed_streams()
    stream = logs.LogStream(sys.stderr)
    click.get_current_context().call_on_close(stream.close)
    logs.set_up(stream, level=logging.DEBUG if verbose else logging.INFO)


def _open_closed_streams() -> None:
    """Open the standard streams that the shell has closed (`>&-`), on nothing.

    Otherwise the next file or socket would get the number of one, and libuv aborts when it closes such a file.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
