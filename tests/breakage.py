"""Ways in which a ledger's file fails, as they happen outside: each a block inside of which it is so.

with locked(path, writer):     # `writer` is the driver's connection through which the store writes
    ...                        # nothing can be written
...                            # all is well again
"""

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
    """Somebody else is in a transaction: a backup tool, a shell that was left open."""
    with connected(path) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextmanager
def read_only(path: Path, writer: Connection) -> Iterator[None]:
    """The file system went read-only."""
    writer.execute("PRAGMA query_only = ON")
    yield
    writer.execute("PRAGMA query_only = OFF")


@contextmanager
def full(path: Path, writer: Connection) -> Iterator[None]:
    """There is no room for one page more."""
    [pages] = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count = {pages}")
    yield
    writer.execute(f"PRAGMA max_page_count = {2**30}")


@contextmanager
def failing_writes(path: Path, writer: Connection) -> Iterator[None]:
    """The operating system takes no further byte of the database's log, which shows while committing."""
    size = path.with_name(f"{path.name}-wal").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def moved(path: Path, writer: Connection) -> Iterator[None]:
    """The file has been given another name."""
    aside = path.with_name("aside.db")
    path.rename(aside)
    yield
    aside.rename(path)


@contextmanager
def replaced(path: Path, writer: Connection) -> Iterator[None]:
    """Another file has been put in its place, such as a backup; then the true one comes back."""
    with moved(path, writer):
        path.touch()
        yield
        path.unlink()


@contextmanager
def writers() -> Iterator[list[Connection]]:
    """The driver's connections that stores make for writing meanwhile."""
    made: list[Connection] = []

    def note(connection: Any, _: object) -> None:
        if isinstance(connection, Connection):  # the one for reading goes through aiosqlite
            made.append(connection)

    with _noting("connect", note):
        yield made


@contextmanager
def commits() -> Iterator[list[object]]:
    """One item for each transaction that is committed meanwhile."""
    seen: list[object] = []

    def note(connection: object) -> None:
        seen.append(connection)

    with _noting("commit", note):
        yield seen


@contextmanager
def _noting(what: str, note: Any) -> Iterator[None]:
    sa.event.listen(sa.Engine, what, note)
    try:
        yield
    finally:
        sa.event.remove(sa.Engine, what, note)


def unfit(operation: T, **values: object) -> T:
    """The same act with values that its own checks would not have let through."""
    for name, value in values.items():
        object.__setattr__(operation, name, value)
    return operation


class BrokenBinding:
    """A binding that can't be asked, as a rule with a bug."""

    def keys(self) -> list[tuple[str, str]]:
        raise ZeroDivisionError
