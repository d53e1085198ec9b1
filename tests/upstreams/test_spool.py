"""A large body is kept on the disk, and sent from there with the name of its model replaced."""

import shutil
import tempfile
from pathlib import Path

import pytest

from proxy.errors import NoSpace
from proxy.upstreams.spool import Spliced, Spool, has_room

BODY = bytes(range(256)) * 8192  # 2 MiB: more than is kept in memory


async def spooled(body: bytes) -> Spool:
    """A spool with this body."""
    spool = Spool()
    for start in range(0, len(body), 65_536):
        await spool.write(body[start : start + 65_536])
    await spool.flush()
    return spool


async def sent(body: Spliced) -> bytes:
    """The whole body as it is sent."""
    return b"".join([chunk async for chunk in body.chunks()])


@pytest.mark.parametrize("body", [b"", b"small", BODY], ids=len)
async def test_a_body_is_read_as_it_was_written(body: bytes) -> None:
    """From memory or from the disk, several times, and any part of it."""
    spool = await spooled(body)
    try:
        assert spool.size == len(body)
        for start, end in ((0, len(body)), (len(body) // 3, len(body) // 2), (0, 0)):
            assert b"".join([chunk async for chunk in spool.read(start, end)]) == body[start:end]
    finally:
        spool.close()


@pytest.mark.parametrize(
    ("start", "end", "patch"),
    [(0, 0, b""), (0, 0, b"new"), (1_000_000, 1_000_005, b"longer name"), (len(BODY) - 3, len(BODY), b"")],
)
async def test_one_range_of_bytes_is_replaced(start: int, end: int, patch: bytes) -> None:
    """The length of the result is known before it is sent."""
    spool = await spooled(BODY)
    try:
        body = Spliced(spool, start=start, end=end, patch=patch)
        expected = BODY[:start] + patch + BODY[end:]
        assert len(body) == len(expected)
        assert await sent(body) == expected
        assert await sent(body) == expected
    finally:
        spool.close()


async def test_chunks_are_small() -> None:
    """However large the body is."""
    spool = await spooled(BODY)
    try:
        assert max([len(chunk) async for chunk in spool.read(0, spool.size)]) <= 2**18
    finally:
        spool.close()


@pytest.mark.parametrize(
    ("total", "free", "expected"),
    [
        (2**40, 2**31, True),
        (2**40, 2**30, False),
        (2**40, 0, False),
        (100_000_000, 10_000_001, True),  # a small disk in memory, as in containers
        (100_000_000, 10_000_000, False),
    ],
)
def test_uploads_leave_room_for_the_database(total: int, free: int, expected: bool) -> None:
    """The database may be on the same disk. If uploads filled it, no call could be admitted."""
    assert has_room(total, total - free, free) is expected


async def test_a_nearly_full_disk_takes_no_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the system still allowed the write. A small body needs no disk."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (2**40, 2**40 - 1, 1))
    (await spooled(b"small")).close()
    spool = Spool()
    with pytest.raises(NoSpace):
        await spool.write(BODY)
    spool.close()


async def test_a_disk_without_room_is_a_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is told when to come back. A small body needs no disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    (await spooled(b"small")).close()
    spool = Spool()
    with pytest.raises(NoSpace) as caught:
        await spool.write(BODY)
    spool.close()
    assert (caught.value.status, caught.value.headers, caught.value.closes) == (503, {"retry-after": "30"}, True)
