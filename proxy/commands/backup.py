"""`migrate`, `backup` and `restore` of a SQLite file, and `copy-database` from one database to an empty one."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from proxy.commands.context import (
    NO,
    WRONG,
    command_options,
    config_option,
    database_url,
    give_up,
    load,
    show,
    show_json,
    show_table,
    time_text,
)
from proxy.config.loader import Config
from proxy.ledger.backup import Backup, FileRefused, new_database_file, restore_backup, write_backup
from proxy.ledger.copy import Comparison, CopyDiffers, TargetNotEmpty, copy_database
from proxy.ledger.schema import NewerSchema
from proxy.ledger.store import StoreInUse, StoreRefused, StoreUnavailable
from proxy.server import public_address, sqlite_path, store_of

_FIXABLE = (FileRefused, StoreInUse, StoreRefused, StoreUnavailable, NewerSchema, TargetNotEmpty, OSError)
# Progress is printed each time so many rows of a table are copied.
_ROWS_SHOWN = 100_000
# The same for pages of a backup: 400 MB.
_PAGES_SHOWN = 100_000


@click.command("migrate")
@config_option
def migrate(path: str) -> None:
    """Migrate the database to this release's schema. One that is gone is made anew, with all quotas unused."""
    config = load(path)
    with _printed_errors():
        asyncio.run(_migrate(config))
    click.echo("The database has this release's schema.")


async def _migrate(config: Config) -> None:
    store = store_of(config.settings.database, may_be_new=True)
    try:
        await store.open()
    finally:
        await store.close()


@click.command("backup")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@command_options
def backup(file: Path, force: bool, path: str, as_json: bool) -> None:
    """Write a copy of the SQLite database to FILE, also while a proxy uses it."""
    config = load(path)
    with _printed_errors():
        made = write_backup(
            _sqlite_file(config, "back it up with pg_dump"), file, overwrite=force, progress=_show_pages
        )
    if as_json:
        show_json(_backup_json(made))
        return
    show(f"{made.path}: {made.size_bytes:,} bytes, {_calls_text(config, made)}.")


@click.command("restore")
@click.argument("file", type=click.Path(path_type=Path))
@command_options
def restore(file: Path, path: str, as_json: bool) -> None:
    """Put the backup FILE in the place of the SQLite database, which is kept under another name.

    No proxy may use the database. What was changed after the backup is undone:
    keys that were revoked since are valid again.
    """
    config = load(path)
    with _printed_errors():
        done = restore_backup(file, _sqlite_file(config, "restore it with pg_restore"), progress=_show_pages)
    if as_json:
        kept = None if done.kept is None else str(done.kept)
        show_json({**_backup_json(done.backup), "kept": kept})
        return
    show(f"{done.backup.path} is the backup now: {_calls_text(config, done.backup)}.")
    if done.kept is not None:
        show(f"The database before it is {done.kept}.")
    show("Keys, users and grants are those of the backup. Revoke again what was revoked after it.")


@click.command("copy-database")
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def copy_database_command(source: str, target: str, as_json: bool) -> None:
    """Copy the database FROM, which no proxy uses, into the empty database TO, and compare the two.

    Both are URLs as in `database` of the config, with ${NAME} and ${file:/path}. Write them in single quotes, so that
    no password is among the arguments.
    """
    source_url, target_url = database_url(source), database_url(target)
    with _printed_errors(), ExitStack() as stack:
        click.echo(f"from {public_address(source_url)}\nto {public_address(target_url)}", err=True)
        if target_url.startswith("sqlite:"):
            temporary = stack.enter_context(new_database_file(sqlite_path(target_url)))
            target_url = f"sqlite:///{temporary}"
        try:
            comparison = asyncio.run(_copy(source_url, target_url))
        except CopyDiffers as error:
            _show_comparison(error.comparison, as_json)
            give_up("The copy differs from the source, so nothing was kept of it: try again.", NO)
    _show_comparison(comparison, as_json)
    if not as_json:
        show("Both have the same rows. Write the new URL in `database` of the config.")


async def _copy(source_url: str, target_url: str) -> Comparison:
    source, target = store_of(source_url), store_of(target_url)
    try:
        return await copy_database(source, target, progress=_show_progress)
    finally:
        await source.close()
        await target.close()


def _show_progress(table: str, rows: int) -> None:
    if rows % _ROWS_SHOWN == 0:
        click.echo(f"{table}: {rows:,} rows", err=True)


def _show_pages(remaining: int, total: int) -> None:
    if (total - remaining) % _PAGES_SHOWN == 0:
        click.echo(f"{total - remaining:,} of {total:,} pages", err=True)


def _show_comparison(comparison: Comparison, as_json: bool) -> None:
    """Print the rows of each table and the sums of its columns, without columns that have no value but 0."""
    if as_json:
        show_json({"equal": comparison.is_equal, **asdict(comparison)})
        return
    rows = []
    for table, source in comparison.source.items():
        target = comparison.target[table]
        rows.append((table, source.rows, target.rows))
        for column, total in source.sums.items():
            if total or target.sums[column]:
                rows.append((f"  {column}", total, target.sums[column]))
    show_table(("TABLE AND COLUMN", "FROM", "TO"), rows)


def _sqlite_file(config: Config, instead: str) -> Path:
    """The SQLite file that the config names. Exits if it names PostgreSQL."""
    database = config.settings.database
    if not database.startswith("sqlite:"):
        give_up(f"{public_address(database)} is in PostgreSQL: {instead}, see docs/backup.md", WRONG)
    return sqlite_path(database)


def _calls_text(config: Config, backup: Backup) -> str:
    last = f", the last one of {time_text(config, backup.last_call_at)}" if backup.calls else ""
    return f"{backup.calls:,} calls, {backup.open_calls:,} of them in flight{last}"


def _backup_json(backup: Backup) -> dict[str, object]:
    return {
        "file": str(backup.path),
        "bytes": backup.size_bytes,
        "calls": backup.calls,
        "open_calls": backup.open_calls,
        "last_call_at": backup.last_call_at,
    }


@contextmanager
def _printed_errors() -> Iterator[None]:
    """Print errors that a person can mend, without a traceback. SIGTERM ends the block as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except _FIXABLE as error:
        give_up(str(error), WRONG)
    finally:
        signal.signal(signal.SIGTERM, before)
