"""The files of a SQLite database: their names, the lock, and what to do if one can't be used.

`quotas.db.lock` is locked (flock) while a process serves on the database; see `sqlite`.
"""

import errno
import fcntl
import os
from pathlib import Path

from proxy.ledger.store import StoreInUse, StoreUnavailable

# All files that belong to a database, by what their names have after its own.
SUFFIXES = ("", "-wal", "-shm", "-journal", ".lock", ".turn")
# What the lock file contains until its first database has been made. If that fails, the next start may try again.
MAKING = b"the database is being made\n"
# Descriptors of files whose beginning was read, by device and inode.
_OPEN: dict[tuple[int, int], int] = {}


def lock_file(file: str, path: Path) -> int:
    """Lock the lock file of the database at `path`, and return its descriptor."""
    try:
        descriptor = open_file(file, os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        descriptor = open_file(file)
    else:
        _write_mark(descriptor, file)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreInUse(
            f"Another process is using {path}. Stop it first; to run several, use --workers, or PostgreSQL. If the "
            "parent of --workers was killed, its workers are ending now: try again in a few seconds."
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise StoreUnavailable(
            f"{file} can't be locked ({error.strerror}): use a local disk, not a network file system, or PostgreSQL"
        ) from error
    return descriptor


def _write_mark(descriptor: int, file: str) -> None:
    try:
        os.write(descriptor, MAKING)
    except OSError as error:
        os.close(descriptor)
        os.unlink(file)  # an empty one would show that there was a database
        raise StoreUnavailable(f"{file} can't be written ({error.strerror}): {_os_remedy(error)}") from error


def open_file(file: str, flags: int = 0) -> int:
    """Open a file for reading and writing; one that is made can be used only by its owner.

    Raises StoreUnavailable, and FileExistsError with O_EXCL.
    """
    try:
        return os.open(file, os.O_RDWR | flags, 0o600)
    except FileExistsError:
        raise
    except OSError as error:
        raise StoreUnavailable(f"{file} can't be opened ({error.strerror}): {_os_remedy(error)}") from error


def stat_of(file: str) -> os.stat_result | None:
    """What the system says of a file; None if it can't say it."""
    try:
        return os.stat(file)
    except OSError:  # there is none, or SQLite will say why it can't be used
        return None


def has_content(file: str) -> bool:
    """Whether there is such a file that is not empty."""
    found = stat_of(file)
    return found is not None and found.st_size > 0


def refuse_hard_links(path: Path) -> None:
    """Raise StoreUnavailable if the file has several names.

    SQLite's log and our lock are files beside the name that was given. Two processes that use two names would
    know nothing of each other, and damage the file: https://sqlite.org/howtocorrupt.html, section 2.4.
    """
    found = stat_of(str(path))
    if found is not None and found.st_nlink > 1:
        raise StoreUnavailable(
            f"{path} has {found.st_nlink} names (hard links), and a process that uses another one would "
            f"damage it: delete the others, which `find -inum {found.st_ino}` shows, or use a copy of the file"
        )


def has_foreign_log(path: Path) -> bool:
    """Whether the log (`-wal`) beside the file belongs to another file.

    It remains after a crash, and SQLite writes what is in it into any file that is put in the place of the old one.
    A database that the proxy uses is in WAL mode, so its log can only belong to such a file. A backup of
    `llm-quota-proxy backup` is not in that mode. Bytes 18 and 19 of a file say so: https://sqlite.org/fileformat.html.
    """
    if not has_content(f"{path}-wal"):
        return False
    try:
        return _beginning_of(path)[18:] == b"\1\1"
    except OSError:  # there is none, or SQLite will say why it can't be used
        return False


def _beginning_of(path: Path) -> bytes:
    """The first 20 bytes of a file.

    It stays open until the process ends: closing it would free the locks that SQLite has on the file in this process,
    and another process could then remove the log that is in use: https://sqlite.org/howtocorrupt.html, section 2.2.
    """
    found = os.stat(path)
    file = (found.st_dev, found.st_ino)
    if file not in _OPEN:
        _OPEN[file] = os.open(path, os.O_RDONLY)
    return os.pread(_OPEN[file], 20, 0)


def refuse_foreign_log(path: Path) -> None:
    """Raise StoreUnavailable if the log beside the file belongs to another file."""
    if has_foreign_log(path):
        raise StoreUnavailable(
            f"{path}-wal belongs to another file than {path}, probably to the one that was there before, and SQLite "
            f"would mix them. To restore a backup, run `llm-quota-proxy restore FILE`. Or delete {path}-wal and "
            f"{path}-shm"
        )


def _os_remedy(error: OSError) -> str:
    """What to do about an error of the operating system."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "make its folder, or correct `database`"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _FREE_SPACE
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _permissions()
    return "check its folder and its disk"


def remedy_of(error: BaseException | None) -> str:
    """What to do about an error of SQLite, by the name of its code, such as SQLITE_IOERR_WRITE."""
    name = getattr(error, "sqlite_errorname", None) or ""
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH")):
        return _permissions()
    return next((remedy for prefix, remedy in _REMEDIES.items() if name.startswith(prefix)), _CHANGED)


def _permissions() -> str:
    return f"let the user {os.geteuid()} write it and its folder, on a file system that can be written"


_FREE_SPACE = "free space on its disk"
_REMEDIES = {
    "SQLITE_BUSY": "another program has locked it, such as a backup or a SQLite shell; end its transaction",
    "SQLITE_LOCKED": "another program has locked it; end its transaction",
    "SQLITE_FULL": _FREE_SPACE,
    "SQLITE_IOERR": "check its disk, the space on it, and its mount",
    "SQLITE_NOTADB": "restore a backup, or correct `database`",
    "SQLITE_CORRUPT": "restore a backup, or copy what can still be read with `sqlite3 FILE .recover`",
}
_CHANGED = "another program may have changed its tables; restore a backup, or use a file of its own for the proxy"
