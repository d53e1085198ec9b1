"""Backups of a SQLite database while it is used, and putting one back.

A backup is one complete file without a log beside it. It is written under another name, checked, flushed to the disk,
and then renamed. So a file with the name of a backup is always a whole one.

SQLite's online backup (https://sqlite.org/backup.html) begins again whenever another process writes. A transaction
that reads prevents that: in WAL mode it sees the database as it was when it began, and holds up no writer. Meanwhile
SQLite's log grows, because what the transaction may still read is not removed from it.

Nothing here writes to the database that a proxy uses.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import mkstemp
from urllib.parse import quote

from proxy.ledger.schema import HEAD, NEXT
from proxy.ledger.sqlite_files import (
    SUFFIXES,
    has_content,
    has_foreign_log,
    lock_file,
    refuse_foreign_log,
    refuse_hard_links,
    remedy_of,
)

# Pages of 4 KiB that are copied between two looks at signals, so that Ctrl-C has an effect at once.
_PAGES = 1000
# Is told how many pages are still to be copied, and of how many.
Progress = Callable[[int, int], object]
# How long to wait for a lock of another program, in seconds.
_BUSY_TIMEOUT_S = 5.0


class FileRefused(Exception):
    """A file can't be written, read or restored. The text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Backup:
    """A complete copy of a database in the file `path`, of `size_bytes`.

    `calls` is the number of rows in `calls`, `open_calls` of those in flight, and `last_call_at` when the last one
    was reserved (ms since 1970).
    """

    path: Path
    size_bytes: int
    calls: int
    open_calls: int
    last_call_at: int | None


@dataclass(frozen=True, slots=True)
class Restored:
    """The backup that is the database now, and the name under which the database before it was kept, if any."""

    backup: Backup
    kept: Path | None


def write_backup(
    database: Path, path: Path, *, overwrite: bool = False, progress: Progress = lambda remaining, total: None
) -> Backup:
    """Copy the database at `database`, which may be in use, to the file `path`.

    Raises FileRefused, or StoreUnavailable if a file beside the database shows that reading it could damage it.
    """
    database = database.resolve()
    if not has_content(str(database)):
        raise FileRefused(f"{database} is not a database: correct `database` in the config")
    refuse_hard_links(database)
    refuse_foreign_log(database)
    for suffix in SUFFIXES:
        own = Path(f"{database}{suffix}")
        if path.resolve() == own or (path.exists() and own.exists() and path.samefile(own)):
            raise FileRefused(f"{path} is a file of the database itself: write another name")
    with new_database_file(path, overwrite=overwrite) as temporary:
        _copy(database, temporary, mode="rw", progress=progress)
    return _described(path)


def restore_backup(file: Path, database: Path, *, progress: Progress = lambda remaining, total: None) -> Restored:
    """Put a copy of the backup `file` in the place of the database, which is kept under another name.

    Raises FileRefused, or StoreInUse if a proxy uses the database. Then the database is what it was.
    """
    database = database.resolve()
    if not has_content(str(file)):
        raise FileRefused(f"{file} is not there, or empty: write the name of a backup")
    if database.exists() and file.samefile(database):
        raise FileRefused(f"{file} is the database itself: write the name of a backup")
    refuse_foreign_log(file)
    if not database.parent.is_dir():
        raise FileRefused(f"{database.parent} is not a folder: make it, or correct `database` in the config")
    lock = lock_file(f"{database}.lock", database)
    try:
        with _new_file(database) as temporary:
            # Without a log beside it the file is read as it is, and nothing is written beside it.
            mode = "ro" if has_content(f"{file}-wal") else "ro&immutable=1"
            _copy(file, temporary, mode=mode, progress=progress)
            _make_one_file(temporary)
            if (revision := _revision(temporary)) > NEXT:
                raise FileRefused(
                    f"{file} has schema {revision}, and this release knows {HEAD}: use the release that wrote it"
                )
            os.ftruncate(lock, 0)  # from now on it shows that there is a database, also if this is interrupted
            kept = _set_aside(database)
            os.rename(temporary, database)
            _flush_folder(database.parent)
    finally:
        os.close(lock)
    return Restored(_described(database), kept)


@contextmanager
def new_database_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty file to write a database into, which gets the name `path` when the block has ended.

    If the block raises, or the file is no intact database then, it is deleted. Raises FileRefused.
    """
    _refuse_target(path, overwrite=overwrite)
    with _new_file(path) as temporary:
        yield temporary
        _make_one_file(temporary)
        _refuse_target(path, overwrite=overwrite)
        os.rename(temporary, path)
        _flush_folder(path.parent)


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A new empty file in the folder of `path`, which is deleted with all that SQLite makes beside it."""
    name = None
    try:
        descriptor, name = mkstemp(".new", f".{path.name}.", path.parent)  # only its owner can read it
        os.close(descriptor)
        yield Path(name)
    except OSError as error:
        raise FileRefused(f"{path} can't be written ({error.strerror}): check its folder and its disk") from error
    finally:
        for suffix in SUFFIXES if name else ():
            Path(f"{name}{suffix}").unlink(missing_ok=True)


def _refuse_target(path: Path, *, overwrite: bool) -> None:
    """Raise FileRefused if nothing may be written to this path."""
    if path.is_dir():
        raise FileRefused(f"{path} is a folder: write the name of a file in it")
    if path.exists() and not path.is_file():
        raise FileRefused(f"{path} is no file but a device, a pipe or a socket: write another name")
    if not path.parent.is_dir():
        raise FileRefused(f"{path.parent} is not a folder: make it, or write another name")
    if os.path.lexists(path) and not overwrite:
        raise FileRefused(f"{path} is there already: delete it, or write another name")
    for suffix in ("-wal", "-journal"):
        if has_content(f"{path}{suffix}"):
            raise FileRefused(f"{path}{suffix} belongs to another database: delete it, or write another name")


def _copy(source: Path, target: Path, *, mode: str, progress: Progress) -> None:
    """Copy a database as it is at this moment. `target` is an empty file."""
    with (
        _translated(f"{source} can't be copied to {target.parent}"),
        closing(_connect(source, mode)) as reader,
        closing(_connect(target)) as writer,
    ):
        # The file is flushed once, as a whole, and thrown away if the copy fails.
        writer.execute("PRAGMA synchronous=OFF")
        writer.execute("PRAGMA journal_mode=OFF")
        reader.execute("BEGIN")
        if not _is_ours(reader):
            raise FileRefused(f"{source} is not a database of llm-quota-proxy: write the name of another file")
        reader.backup(writer, pages=_PAGES, progress=lambda _, *pages: progress(*pages))


def _make_one_file(path: Path) -> None:
    """Check a new database, and leave all of it in one file on the disk.

    Its journal mode is what shows `refuse_foreign_log` that no log can belong to it. `serve` changes it back to WAL.
    """
    with _translated(f"{path.parent} can't take the copy"), closing(_connect(path)) as connection:
        found = _check(connection)
    if found != "ok":
        raise FileRefused(
            f"The copy is damaged, and so is probably the original ({found}): restore an older backup, or copy what "
            "can still be read with `sqlite3 FILE .recover`"
        )
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _check(connection: sqlite3.Connection) -> str:
    """Leave the journal mode WAL, and check the database: "ok", or the first thing that is wrong."""
    try:
        connection.execute("PRAGMA journal_mode=DELETE")
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CORRUPT:
            raise
        return str(error)


def _set_aside(database: Path) -> Path | None:
    """Give the database and what is beside it another name. Returns that name; None if there was no database."""
    _move_log_into(database)
    kept = next(
        path
        for number in count(1)
        if not os.path.lexists(path := database.with_name(f"{database.name}.replaced-{number}"))
    )
    # The database first: if this is interrupted, the proxy finds no database, and does not start. With a database
    # without its log it would.
    was_there = os.path.lexists(database)
    for suffix in ("", "-wal", "-journal"):
        with suppress(FileNotFoundError):
            os.rename(f"{database}{suffix}", f"{kept}{suffix}")
    with suppress(FileNotFoundError):
        os.unlink(f"{database}-shm")
    return kept if was_there else None


def _move_log_into(database: Path) -> None:
    """Move what a crash has left in SQLite's log into the database, and check that no command uses it.

    A command that closes the database later would delete the log of the restored one, by its name.
    """
    if has_foreign_log(database) or not has_content(str(database)):
        return
    try:
        with closing(_connect(database)) as connection:
            connection.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.Error as error:
        if (getattr(error, "sqlite_errorname", "") or "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise FileRefused(f"{database} is in use: {remedy_of(error)}, and try again") from error
        # It is damaged, which is why a backup is put in its place: it is kept as it is.


def _described(path: Path) -> Backup:
    with _translated(f"{path} can't be read"), closing(_connect(path, "ro&immutable=1")) as connection:
        [calls] = connection.execute("SELECT count(*) FROM calls").fetchone()
        [open_calls] = connection.execute("SELECT count(*) FROM calls WHERE state = 'open'").fetchone()
        # Ids begin with the time; see `entry.call_id_prefix`.
        last = connection.execute("SELECT reserved_at FROM calls ORDER BY id DESC LIMIT 1").fetchone()
    return Backup(path, path.stat().st_size, calls, open_calls, last and last[0])


def _is_ours(connection: sqlite3.Connection) -> bool:
    """Whether the database has tables of any release. It is read here, so its transaction begins."""
    found = connection.execute("SELECT name FROM sqlite_master WHERE name IN ('alembic_version', 'calls')").fetchall()
    return len(found) == 2


def _revision(path: Path) -> str:
    with closing(_connect(path)) as connection:
        [revision] = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return str(revision)


def _connect(path: Path, mode: str = "rw") -> sqlite3.Connection:
    """A connection to a file that exists. It begins and commits only if told to."""
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode={mode}", uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None
    )


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn SQLite's errors into FileRefused."""
    try:
        yield
    except sqlite3.Error as error:
        raise FileRefused(f"{what} ({error}): {remedy_of(error)}") from error


def _flush_folder(folder: Path) -> None:
    """Write the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
