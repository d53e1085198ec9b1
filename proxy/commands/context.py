"""What the commands share: the policy in force, the database, and the forms of their output."""

import getpass
import io
import json
import os
import re
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn, TypeVar
from zoneinfo import ZoneInfo

import click
import uvloop

from proxy.administration.change import Author, ChangeRefused, Changes
from proxy.administration.csv import write_csv
from proxy.administration.directory import DirectoryAdministration
from proxy.administration.policy_rows import read_made
from proxy.administration.records import UserRecord
from proxy.config import values
from proxy.config.document import KeyPath
from proxy.config.interpolation import Interpolator
from proxy.config.loader import BadConfig, Config, ConfigFile, read_capped
from proxy.config.overlay import overlaid
from proxy.config.unresolved import load_without_secrets
from proxy.identity.authentication import Snapshot
from proxy.identity.database import DirectoryDatabase
from proxy.identity.directory import Directory, FileDirectory, User, UserId
from proxy.ledger.schema import NewerSchema
from proxy.ledger.store import Store, StoreRefused, StoreUnavailable
from proxy.policy.windows import Duration, parse_per
from proxy.server import store_of, wall_clock_ms

NO, WRONG = 1, 2
_NAMES_SHOWN = 10

T = TypeVar("T")
Command = Callable[..., Any]


@dataclass(frozen=True)
class Context:
    """The policy in force, the database, and what the commands do with them.

    `config` is the file with what was made at run time, `file` is the file alone. `unread_keys` are the variables and
    files with keys of users or header sources that could not be read, so those keys are not known.
    """

    config: Config
    file: Config
    store: Store
    administration: DirectoryAdministration
    snapshot: Snapshot
    unread_keys: tuple[str, ...] = ()

    @property
    def changes(self) -> Changes:
        """Makes changes in the name of the user who runs the command."""
        return self.administration.changes

    async def user(self, name: str) -> UserRecord:
        """The user whom a name means. Raises NotFound."""
        return await self.administration.user(self.administration.resolve(name))


config_option = click.option(
    "--config", "path", default="quotas.yaml", show_default=True, help="The file with the policy and the settings."
)


def command_options(command: Command) -> Command:
    """The options that every one of these commands has."""
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)
    return click.option(
        "--config", "path", default="quotas.yaml", show_default=True, help="The file that names the database."
    )(command)


def dry_run_option(command: Command) -> Command:
    """The option of a change that only says what it would do."""
    return click.option("--dry-run", is_flag=True, help="Only say what would change.")(command)


def run(path: str, work: Callable[[Context], Coroutine[Any, Any, T]], *, asks_keys: bool = False) -> T:
    """Run a command on the database of the config at `path`. Errors that a person can mend have no traceback.

    A command that asks whose a key is has to say itself when `unread_keys` keep it from an answer.
    """
    file, unread = _loaded(path)
    keys = _names(names for at, names in unread.items() if at[0] in ("users", "identity"))
    _warn_of_unread([each for each in _names(unread.values()) if not asks_keys or each not in keys])
    try:
        return uvloop.run(_with_context(file, keys, work))
    except ChangeRefused as error:
        give_up(str(error), NO)
    except (StoreUnavailable, StoreRefused, NewerSchema, OSError) as error:
        give_up(str(error), WRONG)


def config_file(path: str) -> ConfigFile:
    """The file at `path`, with the variables of this process."""
    return ConfigFile(path, os.environ)


def load(path: str) -> Config:
    """The config in the file at `path`, for a command that calls no upstream. Exits with its mistakes.

    Secrets that can't be read do not matter then: standard error says which these are.
    """
    config, unread = _loaded(path)
    _warn_of_unread(_names(unread.values()))
    return config


def _loaded(path: str) -> tuple[Config, Mapping[KeyPath, tuple[str, ...]]]:
    try:
        return load_without_secrets(path, os.environ)
    except BadConfig as error:
        give_up(str(error), WRONG)


def _names(unread: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in unread for name in names))


def _warn_of_unread(names: Sequence[str]) -> None:
    if names:
        text = f"warning: not read: {names_text(names)}; this command does not need them"
        click.secho(text, fg="yellow", err=True)


def names_text(names: Sequence[str]) -> str:
    """The first of these names, and how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def database_url(text: str) -> str:
    """A database's URL as in the config, with `${NAME}` and `${file:/path}`. Raises click.BadParameter."""
    interpolator = Interpolator(os.environ, read_capped)
    found = interpolator.interpolate(text)
    if found.mistakes:
        raise click.BadParameter("; ".join(found.mistakes))
    try:
        return values.database(found.text)
    except ValueError as error:
        raise click.BadParameter(interpolator.redact(str(error))) from None


async def _with_context(
    file: Config, unread_keys: tuple[str, ...], work: Callable[[Context], Coroutine[Any, Any, T]]
) -> T:
    store = store_of(file.settings.database)
    try:
        await store.attach()
        database = DirectoryDatabase(store, now=wall_clock_ms)
        async with database.read() as connection:
            config = overlaid(file, await read_made(connection, wall_clock_ms())).config
        administration = DirectoryAdministration(
            Changes(database, Author(f"cli:{_os_user()}"), wall_clock_ms),
            FileDirectory(config.users),
            group_names=tuple(config.policy.groups),
            source_names=tuple(source.name for source in config.header_sources),
            file_group_names=tuple(file.policy.groups),
        )
        directory = Directory(_Unchanged(store, now=wall_clock_ms), clock=lambda: 0.0, now=wall_clock_ms)
        snapshot = Snapshot.of(config, directory, wall_clock_ms)
        return await work(Context(config, file, store, administration, snapshot, unread_keys))
    finally:
        await store.close()


class _Unchanged(DirectoryDatabase):
    """A directory to ask who somebody is: it adds nobody whom a header source names."""

    async def add_seen_user(self, identity: UserId, email: str | None, *, users_max: int) -> User | None:
        """The user who would be added."""
        return User(identity, email=email)


def _os_user() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in a container
        name = str(os.getuid())
    return name if name.isprintable() else str(os.getuid())


# ------------------------------------------------------------------------------------------------------------- output


def show_json(value: object) -> None:
    """Print a value as JSON."""
    show(json.dumps(value, indent=2, ensure_ascii=False))


def show(text: str, *, ends_line: bool = True) -> None:
    """Print a text. A closed pipe, as that of `head`, is no error."""
    try:
        click.echo(text, nl=ends_line)
    except OSError as error:
        # Python would complain once more when it flushes standard output at its end.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(0) from None
        give_up(f"the output can't be written: {error}", WRONG)  # the disk is full


def show_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows below their heads, in columns."""
    texts = [tuple(heads), *(tuple("" if cell is None else str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[index]) for row in texts) for index in range(len(heads))]
    for row in texts:
        show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_csv(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows as CSV, in which no text is a formula for a spreadsheet."""
    buffer = io.StringIO()
    write_csv(buffer, heads, rows)
    show(buffer.getvalue(), ends_line=False)


def give_up(message: str, code: int) -> NoReturn:
    """Print the message on standard error and exit."""
    click.secho(message, fg="red", err=True)
    raise SystemExit(code)


def time_text(config: Config, at: int | None) -> str:
    """An instant (ms) in the policy's time zone, to the minute; empty for None."""
    return "" if at is None else datetime.fromtimestamp(at / 1000, config.policy.zone).strftime("%Y-%m-%d %H:%M %Z")


# -------------------------------------------------------------------------------------------------------------- input


def duration_ms(text: str) -> int:
    """A duration such as 24h or 90d, in ms. Raises click.BadParameter."""
    try:
        found = parse_per(text, ZoneInfo("UTC")) if not text.isalpha() else None
    except ValueError:
        found = None
    if not isinstance(found, Duration):
        raise click.BadParameter(f'"{text}" is not a duration; write one such as 24h or 90d')
    return found.length_ms


def until_ms(config: Config, text: str | None) -> int | None:
    """When a key expires (ms): after a duration such as 90d, at the beginning of a day, or at an instant."""
    if text is None:
        return None
    if re.fullmatch(r"[0-9]+[smhd]", text):
        return wall_clock_ms() + duration_ms(text)
    try:
        found = values.expiry(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}; or a duration such as 90d") from None
    return values.expiry_ms(found, config.policy.zone)


def read_input() -> str:
    """What comes on standard input. A person at a terminal is asked for a key, which is not shown."""
    if sys.stdin.isatty():
        answer: str = click.prompt("Key", hide_input=True)
        return answer
    return sys.stdin.buffer.read().decode("utf-8", "replace")


def admin_key() -> str:
    """The admin key, from the environment or from standard input. Arguments are no place for it: others see them."""
    key = (os.environ.get("LLM_QUOTA_ADMIN_KEY") or read_input()).strip()
    if not key or not key.isascii() or not key.isprintable():
        give_up("there is no admin key in LLM_QUOTA_ADMIN_KEY or on standard input", WRONG)
    return key
