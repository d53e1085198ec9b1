"""Faults of a ledger's SQLite file, as they happen in operation. Each is a block; the fault lasts while it runs.

with locked(path, writer):     # `writer` is the driver's connection through which the store writes
    ...                        # nothing can be written
...                            # the fault has passed
"""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import Connection
from typing import Any, TypeVar

import sqlalchemy as sa

from tests.audit import connected

T = TypeVar("T")


@contextmanager
def locked(path: Path, writer: Connection) -> Iterator[None]:
    """Another program is in a transaction: a backup tool, or a shell that was left open."""
    with connected(path) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextmanager
def read_only(path: Path, writer: Connection) -> Iterator[None]:
    """The file system has become read-only."""
    writer.execute("PRAGMA query_only = ON")
    yield
    writer.execute("PRAGMA query_only = OFF")


@contextmanager
def full(path: Path, writer: Connection) -> Iterator[None]:
    """The disk has no space for one more page."""
    [pages] = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count = {pages}")
    yield
    writer.execute(f"PRAGMA max_page_count = {2**30}")


@contextmanager
def failing_writes(path: Path, writer: Connection) -> Iterator[None]:
    """The operating system accepts no more bytes for the database's log. This shows only in the commit."""
    size = path.with_name(f"{path.name}-wal").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def moved(path: Path, writer: Connection) -> Iterator[None]:
    """The file has been renamed."""
    aside = path.with_name("aside.db")
    path.rename(aside)
    yield
    aside.rename(path)


@contextmanager
def replaced(path: Path, writer: Connection) -> Iterator[None]:
    """Another file, such as a backup, has taken its place. Afterwards the original is back."""
    with moved(path, writer):
        path.touch()
        yield
        path.unlink()


@contextmanager
def emptied(path: Path, writer: Connection) -> Iterator[None]:
    """A script has written over the file, and failed: the same file has no bytes. Afterwards they are back."""
    before = path.read_bytes()
    os.truncate(path, 0)
    yield
    path.write_bytes(before)


@contextmanager
def without_folder(path: Path, writer: Connection) -> Iterator[None]:
    """The folder with all files has been renamed, or its volume unmounted."""
    aside = path.parent.with_name("aside")
    path.parent.rename(aside)
    yield
    aside.rename(path.parent)


@contextmanager
def without_log(path: Path, writer: Connection) -> Iterator[None]:
    """Somebody has tidied up: SQLite's log beside the file is gone."""
    with moved(path.with_name(f"{path.name}-wal"), writer):
        yield


@contextmanager
def without_index(path: Path, writer: Connection) -> Iterator[None]:
    """The same for the index of the log, which has the locks of SQLite."""
    with moved(path.with_name(f"{path.name}-shm"), writer):
        yield


@contextmanager
def without_lock(path: Path, writer: Connection) -> Iterator[None]:
    """The same for our lock file: another process could lock a new one."""
    with moved(path.with_name(f"{path.name}.lock"), writer):
        yield


@contextmanager
def writers() -> Iterator[list[Connection]]:
    """The driver's connections that stores open for writing during the block."""
    opened: list[Connection] = []

    def on_connect(connection: Any, _: object) -> None:
        if isinstance(connection, Connection):  # connections for reading are aiosqlite's
            opened.append(connection)

    sa.event.listen(sa.Engine, "connect", on_connect)
    try:
        yield opened
    finally:
        sa.event.remove(sa.Engine, "connect", on_connect)


@contextmanager
def statements(writer: Connection) -> Iterator[list[str]]:
    """The statements that a store runs during the block on the connection through which it writes."""
    seen: list[str] = []
    writer.set_trace_callback(seen.append)
    try:
        yield seen
    finally:
        writer.set_trace_callback(None)


def unchecked(operation: T, **values: object) -> T:
    """The same operation, with values that the checks of its constructor reject."""
    for name, value in values.items():
        object.__setattr__(operation, name, value)
    return operation


class BrokenBinding:
    """A binding that raises when it is used, as a rule with a bug would."""

    def keys(self) -> list[tuple[str, str]]:
        raise ZeroDivisionError
