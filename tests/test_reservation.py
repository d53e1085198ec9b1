"""A call that was let in ends exactly once, whichever way it is left."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.books import Booked, Entry
from proxy.ledger import Ledger
from proxy.meter import Meter
from proxy.reservation import Reservation
from proxy.sse import Splitter
from proxy.store import Store
from proxy.usage import AtLeast, Unspent
from proxy.wire import CHAT, parse_call
from tests.builders import NOON, binding, call, exactly, quota, reserve

BODY = b'{"model": "m", "stream": true, "messages": []}'


@asynccontextmanager
async def _reserved(folder: Path) -> AsyncIterator[tuple[Ledger, Reservation]]:
    ledger = Ledger(Store(folder / "quotas.db"), owner="me", now=lambda: NOON)
    await ledger.start()
    try:
        who = binding([quota("staff/daily", tokens=1000)])
        booked = await ledger.reserve(reserve("req_1", who, call(100, 200)))
        assert isinstance(booked, Booked)
        yield ledger, Reservation(ledger, booked, Meter(parse_call(CHAT, BODY), input_estimate=12))
    finally:
        await ledger.close()


async def _entry(ledger: Ledger) -> Entry:
    entry = await ledger.entry("req_1")
    assert entry is not None
    return entry


async def test_leaving_without_an_end_settles_what_was_seen(tmp_path: Path) -> None:
    """A bug in the way of a call leaves nothing held: the meter says what passed."""
    async with _reserved(tmp_path) as (ledger, reservation):
        with pytest.raises(RuntimeError):
            async with reservation:
                for event in Splitter().feed(b'data: {"choices": [{"delta": {"content": "12345678"}}]}\n\n'):
                    reservation.meter.see_event(event)
                raise RuntimeError
        entry = await _entry(ledger)
        assert (entry.state, entry.outcome) == ("settled", "proxy_broke")
        assert isinstance(entry.usage, AtLeast)
        assert entry.usage.tokens.output == 2


async def test_only_the_first_end_counts(tmp_path: Path) -> None:
    """Settled is settled: neither a second settle nor a release changes it, nor leaving the block."""
    async with _reserved(tmp_path) as (ledger, reservation):
        async with reservation:
            await reservation.settle(exactly(10, 20), "complete")
            await reservation.settle(Unspent(), "client_left")
            await reservation.release()
        entry = await _entry(ledger)
        assert (entry.usage, entry.outcome) == (exactly(10, 20), "complete")
        assert [counter.used.tokens for counter in reservation.counters.values()] == [30]


async def test_release_gives_everything_back(tmp_path: Path) -> None:
    """The upstream never had the call: no tokens, no request, and no window opened."""
    async with _reserved(tmp_path) as (ledger, reservation):
        async with reservation:
            await reservation.release()
        assert (await _entry(ledger)).state == "released"
        assert not any(counter.is_open for counter in reservation.counters.values())


async def test_a_ledger_that_hangs_holds_an_end_up_for_a_bounded_time(tmp_path: Path) -> None:
    """Past the wait the answer goes out; the end stays queued, and is booked when the ledger is back."""
    async with _reserved(tmp_path) as (ledger, reservation):
        other = sqlite3.connect(tmp_path / "quotas.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        await reservation.settle(exactly(10, 20), "complete", wait_s=0.01)
        assert (await _entry(ledger)).state == "open"
        other.execute("ROLLBACK")
        other.close()
    reopened = Store(tmp_path / "quotas.db")
    entry = await reopened.read_entry("req_1")
    assert entry is not None
    assert entry.usage == exactly(10, 20)
    await reopened.close()
