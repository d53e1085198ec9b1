"""A large body waits on the disk, and is sent from there with its model's name replaced."""

import shutil
import tempfile
from pathlib import Path

import pytest

from proxy.errors import NoSpace
from proxy.upstreams.spool import Spliced, Spool, has_room

BODY = bytes(range(256)) * 8192  # 2 MB: more than is kept in memory


async def spooled(body: bytes) -> Spool:
    """A spool with this body."""
    spool = Spool()
    for start in range(0, len(body), 65_536):
        await spool.write(body[start : start + 65_536])
    await spool.flush()
    return spool


async def sent(body: Spliced) -> bytes:
    """All that is sent."""
    return b"".join([piece async for piece in body.pieces()])


@pytest.mark.parametrize("body", [b"", b"small", BODY], ids=len)
async def test_what_was_written_is_read(body: bytes) -> None:
    """In memory or on the disk, as often as you like, and any part of it."""
    spool = await spooled(body)
    try:
        assert spool.size == len(body)
        for start, end in ((0, len(body)), (len(body) // 3, len(body) // 2), (0, 0)):
            assert b"".join([piece async for piece in spool.read(start, end)]) == body[start:end]
    finally:
        spool.close()


@pytest.mark.parametrize(
    ("start", "end", "patch"),
    [(0, 0, b""), (0, 0, b"new"), (1_000_000, 1_000_005, b"longer name"), (len(BODY) - 3, len(BODY), b"")],
)
async def test_one_place_is_replaced(start: int, end: int, patch: bytes) -> None:
    """And the length is told beforehand."""
    spool = await spooled(BODY)
    try:
        body = Spliced(spool, start=start, end=end, patch=patch)
        expected = BODY[:start] + patch + BODY[end:]
        assert len(body) == len(expected)
        assert await sent(body) == expected
        assert await sent(body) == expected
    finally:
        spool.close()


async def test_no_piece_is_large() -> None:
    """However large the body is."""
    spool = await spooled(BODY)
    try:
        assert max([len(piece) async for piece in spool.read(0, spool.size)]) <= 2**18
    finally:
        spool.close()


@pytest.mark.parametrize(
    ("total", "free", "expected"),
    [
        (2**40, 2**31, True),
        (2**40, 2**30, False),
        (2**40, 0, False),
        (100_000_000, 10_000_001, True),  # a small disk in memory, as containers have it
        (100_000_000, 10_000_000, False),
    ],
)
def test_uploads_leave_room_for_the_books(total: int, free: int, expected: bool) -> None:
    """Which may stand on the same disk: whoever fills it with uploads would lock everybody out."""
    assert has_room(total, total - free, free) is expected


async def test_a_disk_that_is_nearly_full_takes_no_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the system would still let us write there; what is small needs no disk."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (2**40, 2**40 - 1, 1))
    (await spooled(b"small")).close()
    spool = Spool()
    with pytest.raises(NoSpace):
        await spool.write(BODY)
    spool.close()


async def test_a_disk_without_room_is_no_mistake_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who uploads is told to come back, and small bodies need no disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    (await spooled(b"small")).close()
    spool = Spool()
    with pytest.raises(NoSpace) as caught:
        await spool.write(BODY)
    spool.close()
    assert (caught.value.status, caught.value.headers, caught.value.closes) == (503, {"retry-after": "30"}, True)
