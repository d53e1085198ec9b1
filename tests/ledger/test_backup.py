"""Backups of a SQLite file while it is written, and putting them back: real files, processes and signals."""

import asyncio
import os
import resource
import shutil
import signal
import stat
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy.ledger.backup import FileRefused, new_database_file, restore_backup, write_backup
from proxy.ledger.book import Settle
from proxy.ledger.sqlite import SqliteStore
from proxy.ledger.store import StoreInUse, StoreUnavailable
from tests.audit import audit, connected, contents, states
from tests.builders import NOON, binding, call, exactly, quota, reserve

ANN = binding([quota("staff/daily", tokens=1_000_000)])
CALL = call(100, 400)

# A backup that stops at its middle until a line comes.
CHILD = """
import sys
from pathlib import Path
from proxy.ledger import backup
backup._PAGES = 1
def wait(remaining, total):
    if remaining == total // 2:
        print("half", flush=True)
        sys.stdin.readline()
backup.write_backup(Path(sys.argv[1]), Path(sys.argv[2]), progress=wait)
"""


@pytest.fixture
async def store(path):
    """An open store, as of a running proxy."""
    store = SqliteStore(path, busy_timeout_s=0)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
def folder(tmp_path):
    """Where backups go."""
    (tmp_path / "backups").mkdir()
    return tmp_path / "backups"


async def reserved(store, *ids):
    """Reserve these calls."""
    await store.apply([reserve(each, ANN, CALL) for each in ids], NOON)


async def settled(store, *ids):
    """Settle them."""
    await store.apply([Settle(each, exactly(90, 60), "complete") for each in ids], NOON + 1)


def crashed(path, folder):
    """The files as a crash leaves them: the newest calls are only in the log."""
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", folder / f"quotas.db{suffix}")
    return folder / "quotas.db"


def files(folder):
    return sorted(file.name for file in folder.iterdir())


# ------------------------------------------------------------------------------------------------------------- backup


async def test_a_backup_has_everything_in_one_file(store, path, folder):
    """Also what is only in SQLite's log so far. Only its owner can read it, and no log can belong to it."""
    await reserved(store, "1", "2")
    await settled(store, "1")
    made = write_backup(path, folder / "b.db")
    assert contents(folder / "b.db") == contents(path)
    assert (made.calls, made.open_calls, made.last_call_at) == (2, 1, NOON)
    assert made.size_bytes == (folder / "b.db").stat().st_size
    assert stat.S_IMODE((folder / "b.db").stat().st_mode) == 0o600
    assert files(folder) == ["b.db"]
    audit(folder / "b.db")


async def test_a_backup_of_a_new_database_has_no_last_call(store, path, folder):
    """There is none."""
    assert write_backup(path, folder / "b.db").last_call_at is None


async def test_a_backup_is_the_database_at_its_beginning(store, path, folder, monkeypatch):
    """Calls are admitted and settled after each page of the copy. It does not begin again, and holds nobody up."""
    monkeypatch.setattr("proxy.ledger.backup._PAGES", 1)
    await reserved(store, *(f"{number:04}" for number in range(100)))
    before = states(path)
    loop, remaining = asyncio.get_running_loop(), []

    async def write(number):
        await reserved(store, f"new {number}")
        await settled(store, f"{number:04}")

    def progress(left, total):
        asyncio.run_coroutine_threadsafe(write(len(remaining)), loop).result(timeout=60)
        remaining.append(left)

    await asyncio.to_thread(write_backup, path, folder / "b.db", progress=progress)
    assert remaining == list(range(len(remaining) - 1, -1, -1))
    assert states(folder / "b.db") == before
    assert len(states(path)) == len(before) + len(remaining) > 130
    for file in (path, folder / "b.db"):
        audit(file)


async def test_a_backup_under_load_has_a_prefix_of_the_history(store, path, folder):
    """As many calls are made as the store can take. Each backup is what one of its commits has left."""
    history, is_over = [{}], threading.Event()

    def back_up():
        for number in range(5):
            first = len(history) - 1
            write_backup(path, folder / f"{number}.db")
            audit(folder / f"{number}.db")
            found.append((first, states(folder / f"{number}.db")))
        is_over.set()

    found: list[tuple[int, dict[str, str]]] = []
    backing_up = asyncio.create_task(asyncio.to_thread(back_up))
    number = 0
    while not is_over.is_set() and not backing_up.done():
        await reserved(store, f"{number:06}")
        history.append({**history[-1], f"{number:06}": "open"})
        await settled(store, f"{number:06}")
        history.append({**history[-1], f"{number:06}": "settled"})
        number += 1
    await backing_up
    for first, backup in found:
        assert backup in history[first:]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
async def test_a_backup_that_is_killed_leaves_the_database_as_it_was(store, path, folder, sent):
    """The proxy goes on, there is no file that looks like a backup, and after Ctrl-C there is nothing at all."""
    await reserved(store, "1")
    command = [sys.executable, "-c", CHILD, str(path), str(folder / "b.db")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    child = await asyncio.create_subprocess_exec(*command, **pipes)
    assert await child.stdout.readline() == b"half\n"
    await settled(store, "1")
    child.send_signal(sent)
    _, errors = await child.communicate()
    assert (b"KeyboardInterrupt" in errors) == (sent == signal.SIGINT)
    assert not (folder / "b.db").exists()
    assert len(files(folder)) == (1 if sent == signal.SIGKILL else 0)
    await reserved(store, "2")
    assert states(path) == {"1": "settled", "2": "open"}
    audit(path)
    assert write_backup(path, folder / "b.db").calls == 2


@contextmanager
def small_files(size):
    """The operating system makes no larger files, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_on_a_full_disk_there_is_no_backup(store, path, folder):
    """The error says where there is too little space, and what was written is deleted."""
    await reserved(store, "1")
    with small_files(8192), pytest.raises(FileRefused, match=r"can't be copied to .*backups.*check its disk"):
        write_backup(path, folder / "b.db")
    assert files(folder) == []
    await settled(store, "1")


async def test_a_file_is_replaced_only_if_that_is_wanted(store, path, folder):
    """And only by a complete one."""
    (folder / "b.db").write_text("precious")
    with pytest.raises(FileRefused, match="is there already"):
        write_backup(path, folder / "b.db")
    with small_files(8192), pytest.raises(FileRefused):
        write_backup(path, folder / "b.db", overwrite=True)
    assert (folder / "b.db").read_text() == "precious"
    write_backup(path, folder / "b.db", overwrite=True)
    audit(folder / "b.db")


async def test_a_file_that_appears_meanwhile_is_not_replaced(store, path, folder):
    """Two backups of the same name: the second one fails."""
    with pytest.raises(FileRefused, match="is there already"):
        write_backup(path, folder / "b.db", progress=lambda *_: (folder / "b.db").write_text("precious"))
    assert files(folder) == ["b.db"]
    assert (folder / "b.db").read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nowhere/b.db", "nowhere is not a folder"),
        ("backups", "backups is a folder"),
        ("quotas.db", "a file of the database itself"),
        ("quotas.db-wal", "a file of the database itself"),
        ("link.db", "a file of the database itself"),
        ("old.db", "old.db-wal belongs to another database"),
        ("pipe", "pipe is no file but a device, a pipe or a socket"),
    ],
)
async def test_a_backup_is_not_written_everywhere(store, path, folder, name, text):
    """Also not with `overwrite`, and nothing is left there."""
    (path.parent / "link.db").symlink_to(path)
    (path.parent / "old.db-wal").write_text("x")
    os.mkfifo(path.parent / "pipe")
    before = files(path.parent)
    with pytest.raises(FileRefused, match=text):
        write_backup(path, path.parent / name, overwrite=True)
    assert files(path.parent) == before


async def test_a_hard_link_of_the_database_is_not_written(store, path, folder):
    """Nor is a database backed up that has one: its log is beside another name, perhaps."""
    os.link(path, folder / "same.db")
    with pytest.raises(StoreUnavailable, match="hard links"):
        write_backup(path, folder / "same.db", overwrite=True)
    os.unlink(folder / "same.db")


async def test_a_lock_file_that_is_named_by_a_link_is_not_written(store, path, folder):
    """A hard link of it, which has the same content."""
    os.link(f"{path}.lock", folder / "same.db")
    with pytest.raises(FileRefused, match="a file of the database itself"):
        write_backup(path, folder / "same.db", overwrite=True)


def test_a_folder_that_cannot_be_written(path, folder, monkeypatch):
    """The operating system's reason is in the error. Tests may run as root, whom no mode keeps out."""

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("proxy.ledger.backup.mkstemp", refused)
    with pytest.raises(FileRefused, match=r"b\.db can't be written \(Permission denied\)"):
        write_backup(path, folder / "b.db")


def test_a_failure_while_a_file_is_renamed(path, folder, monkeypatch):
    """The new file is deleted."""

    def refused(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(FileRefused, match="Input/output error"):
        write_backup(path, folder / "b.db")
    assert files(folder) == []


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "is not a database"), (b"", "is not a database"), (b"text\n" * 9999, "file is not a database")],
)
def test_what_is_no_database_is_not_backed_up(path, folder, content, text):
    """It is missing, empty, or something else."""
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileRefused, match=text):
        write_backup(path, folder / "b.db")
    assert files(folder) == []


def test_the_database_of_another_program_is_not_backed_up(new_path, folder):
    """It has no tables of ours."""
    with connected(new_path) as connection:
        connection.execute("CREATE TABLE calls (id)")
    with pytest.raises(FileRefused, match="not a database of llm-quota-proxy"):
        write_backup(new_path, folder / "b.db")


def damage(path, table="calls_open"):
    """Write over the first page of an index, or over one of the pages with the list of tables."""
    with connected(path) as connection:
        pages = dict(connection.execute("SELECT name, rootpage FROM sqlite_master"))
    content = bytearray(path.read_bytes())
    at = 4096 * (pages[table] - 1) if table in pages else len(content) - 8192
    content[at : at + 4096] = b"\x55" * 4096
    path.write_bytes(content)


@pytest.mark.parametrize("table", ["calls_open", "the list of tables"])
def test_a_damaged_database_has_no_backup(path, folder, table):
    """The copy is checked, so nobody trusts it."""
    damage(path, table)
    with pytest.raises(FileRefused, match="damaged, and so is probably the original"):
        write_backup(path, folder / "b.db")
    assert files(folder) == []


def test_a_new_file_is_deleted_if_its_block_raises(folder):
    """With what SQLite made beside it."""
    with pytest.raises(ZeroDivisionError), new_database_file(folder / "b.db") as file:
        Path(f"{file}-wal").touch()
        raise ZeroDivisionError
    assert files(folder) == []


def test_a_new_file_that_is_no_database_is_deleted(folder):
    """Its block wrote something else."""
    with pytest.raises(FileRefused, match="not a database"), new_database_file(folder / "b.db") as file:
        file.write_text("text\n" * 9999)
    assert files(folder) == []


# ------------------------------------------------------------------------------------------------------------ restore


async def test_a_restored_backup_is_the_database(store, path, folder):
    """After a crash. What was in the log is in the database that is kept, and not in the restored one."""
    await reserved(store, "1")
    write_backup(path, folder / "b.db")
    await settled(store, "1")
    await reserved(store, "2")
    (folder / "at").mkdir()
    database = crashed(path, folder / "at")
    done = restore_backup(folder / "b.db", database)
    assert (done.backup.calls, done.backup.open_calls) == (1, 1)
    assert done.kept == folder / "at" / "quotas.db.replaced-1"
    assert files(folder / "at") == ["quotas.db", "quotas.db.lock", "quotas.db.replaced-1"]
    assert states(done.kept) == {"1": "settled", "2": "open"}
    audit(done.kept)
    again = SqliteStore(database)
    await again.open()
    assert states(database) == {"1": "open"}
    assert await again.orphans("process-2", NOON, limit=9) == ["1"]
    await again.close()
    assert contents(folder / "b.db") == contents(database)
    assert restore_backup(folder / "b.db", database).kept == folder / "at" / "quotas.db.replaced-2"


async def test_a_backup_can_be_restored_where_there_was_no_database(store, path, folder):
    """On a new machine. If it is gone later, the lock file shows that there was one."""
    await reserved(store, "1")
    write_backup(path, folder / "b.db")
    done = restore_backup(folder / "b.db", folder / "quotas.db")
    assert done.kept is None
    assert states(folder / "quotas.db") == {"1": "open"}
    (folder / "quotas.db").unlink()
    with pytest.raises(StoreUnavailable, match="is gone or empty"):
        await SqliteStore(folder / "quotas.db").open()


async def test_a_copy_of_the_files_can_be_restored_too(store, path, folder):
    """With the log that belongs to it, as a snapshot of a volume has it. The files stay as they are."""
    await reserved(store, "1")
    (folder / "at").mkdir()
    copy = crashed(path, folder / "at")
    before = copy.read_bytes()
    restore_backup(copy, folder / "quotas.db")
    assert states(folder / "quotas.db") == {"1": "open"}
    assert copy.read_bytes() == before


async def test_nothing_is_restored_while_a_proxy_uses_the_database(store, path, folder):
    """Nor while any other program does, such as a command or a shell."""
    write_backup(path, folder / "b.db")
    await reserved(store, "1")
    with pytest.raises(StoreInUse):
        restore_backup(folder / "b.db", path)
    assert states(path) == {"1": "open"}
    await store.close()
    with connected(path) as shell:
        shell.execute("BEGIN")
        shell.execute("SELECT * FROM calls").fetchall()
        with pytest.raises(FileRefused, match=r"quotas\.db is in use: another program has locked it"):
            restore_backup(folder / "b.db", path)
        shell.execute("ROLLBACK")
    assert states(path) == {"1": "open"}
    assert not [name for name in files(path.parent) if "replaced" in name or name.startswith(".")]


async def test_a_damaged_database_is_kept_as_it_is(store, path, folder):
    """With its log: somebody may want to recover something from it."""
    await reserved(store, "1")
    write_backup(path, folder / "b.db")
    (folder / "at").mkdir()
    database = crashed(path, folder / "at")
    database.write_bytes(b"no database" * 1000)
    log = database.with_name("quotas.db-wal").read_bytes()
    done = restore_backup(folder / "b.db", database)
    assert done.kept.read_bytes() == b"no database" * 1000
    assert done.kept.with_name(f"{done.kept.name}-wal").read_bytes() == log
    audit(database)


async def test_a_backup_that_was_put_beside_the_log_of_the_old_database_is_refused(store, path, folder):
    """SQLite would mix the two. `restore` puts the log aside."""
    await reserved(store, "1")
    write_backup(path, folder / "b.db")
    await settled(store, "1")
    (folder / "at").mkdir()
    database = crashed(path, folder / "at")
    shutil.copy(folder / "b.db", database)
    before = database.read_bytes()
    for store_at, method in ((SqliteStore(database), "open"), (SqliteStore(database), "attach")):
        with pytest.raises(StoreUnavailable, match=r"quotas\.db-wal belongs to another file"):
            await getattr(store_at, method)()
        await store_at.close()
    with pytest.raises(StoreUnavailable, match="belongs to another file"):
        write_backup(database, folder / "c.db")
    with pytest.raises(StoreUnavailable, match="belongs to another file"):
        restore_backup(database, folder / "d.db")
    assert database.read_bytes() == before
    restore_backup(folder / "b.db", database)
    assert states(database) == {"1": "open"}
    audit(database)


async def test_the_log_of_a_database_that_is_gone_is_put_aside(store, path, folder):
    """It belongs to no restored file."""
    write_backup(path, folder / "b.db")
    await reserved(store, "1")
    (folder / "at").mkdir()
    database = crashed(path, folder / "at")
    database.unlink()
    assert restore_backup(folder / "b.db", database).kept is None
    assert states(database) == {}
    assert "quotas.db.replaced-1-wal" in files(folder / "at")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nowhere.db", "is not there, or empty"),
        ("quotas.db", "is the database itself"),
        ("text.db", "file is not a database"),
        ("other.db", "not a database of llm-quota-proxy"),
        ("damaged.db", "damaged"),
        ("newer.db", "has schema 0999, and this release knows"),
    ],
)
def test_what_is_no_backup_is_not_restored(path, name, text):
    """The database stays, and nothing new is beside it but its lock."""
    (path.parent / "text.db").write_text("text\n" * 9999)
    for other in ("damaged.db", "newer.db"):
        write_backup(path, path.parent / other)
    damage(path.parent / "damaged.db")
    with connected(path.parent / "newer.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0999'")
    with connected(path.parent / "other.db") as connection:
        connection.execute("CREATE TABLE calls (id)")
    before, content = files(path.parent), path.read_bytes()
    with pytest.raises(FileRefused, match=text):
        restore_backup(path.parent / name, path)
    assert set(files(path.parent)) <= {*before, "quotas.db.lock"}
    assert path.read_bytes() == content


def test_a_backup_is_not_restored_into_a_folder_that_is_not_there(path, folder):
    """Its volume is not mounted, perhaps."""
    write_backup(path, folder / "b.db")
    with pytest.raises(FileRefused, match="nowhere is not a folder"):
        restore_backup(folder / "b.db", folder / "nowhere" / "quotas.db")
