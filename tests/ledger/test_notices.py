"""Refusals and crossings in the database, on both engines."""

from dataclasses import replace

import pytest
import sqlalchemy as sa
import structlog

from proxy.ledger import notices as module
from proxy.ledger.notices import Crossing, Notices, RefusalRow
from proxy.ledger.schema import crossings, feed, refusals, replicas
from proxy.ledger.store import StoreUnavailable
from tests.builders import DAY, HOUR, MINUTE, NOON

REFUSAL = RefusalRow(
    **{"request_id": "req_1", "at": NOON, "user_name": "ann", "quota_id": "staff/daily", "model": "fast"},
    **{"endpoint": "chat", "verdict": "exhausted", "measure": "tokens", "maximum": 1000, "used": 990, "held": 5},
    **{"needed": 10, "resets_at": NOON + HOUR, "admissible_at": None, "key_id": None, "count": 3, "details": "{}"},
)
CROSSING = Crossing("user:ann", "staff/daily", NOON, NOON + HOUR, 80, NOON + MINUTE)


async def rows(store, table):
    async with store.transaction() as connection:
        found = await connection.execute(sa.select(table).order_by(*table.primary_key))
        return [dict(row) for row in found.mappings()]


async def insert(store, table, *values):
    async with store.transaction(writes=True) as connection:
        await connection.execute(sa.insert(table), list(values))


class Away:
    """A store that is away while `is_away`."""

    def __init__(self, store):
        self.store, self.is_away = store, True

    def transaction(self, **more):
        if self.is_away:
            raise StoreUnavailable("it is away")
        return self.store.transaction(**more)


def notices_of(store, now=NOON, **more):
    return Notices(store, now=lambda: now, pause_s=0, **more)


async def test_a_refusal_is_written_once(store):
    """A repeated write, after a commit of which nobody knows, changes nothing."""
    for _ in range(2):
        notices = notices_of(store)
        notices.add([REFUSAL])
        await notices.write()
        await notices.write()
    assert await rows(store, refusals) == [
        {
            **{"request_id": "req_1", "at": NOON, "user_name": "ann", "quota_id": "staff/daily", "model": "fast"},
            **{"endpoint": "chat", "verdict": "exhausted", "measure": "tokens", "maximum": 1000, "used": 990},
            **{"held": 5, "needed": 10, "resets_at": NOON + HOUR, "admissible_at": None, "key_id": None},
            **{"count": 3, "details": "{}"},
        }
    ]


async def test_many_are_written_in_small_transactions(store, monkeypatch):
    """All of them, whatever one transaction may have."""
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 2)
    notices = notices_of(store)
    notices.add(
        [replace(REFUSAL, request_id=f"req_{number}") for number in range(5)],
        [replace(CROSSING, subject=f"user:{number}") for number in range(5)],
    )
    await notices.write()
    assert len(await rows(store, refusals)) == len(await rows(store, crossings)) == 5


@pytest.mark.parametrize(
    ("later", "stays"),
    [
        (replace(CROSSING, level=100, crossed_at=NOON + HOUR), False),
        (replace(CROSSING, crossed_at=NOON + HOUR), True),
        (replace(CROSSING, opened_at=NOON - 1, level=100), True),
        (replace(CROSSING, opened_at=NOON + 1, level=80), False),
        (replace(CROSSING, resets_at=CROSSING.resets_at - 1), False),
        (replace(CROSSING, resets_at=CROSSING.resets_at + 1), True),
        (replace(CROSSING, opened_at=NOON - 1, resets_at=CROSSING.resets_at - 1), True),
    ],
)
async def test_of_a_counter_the_newest_window_and_its_highest_level_stay(store, later, stays):
    """Whichever process writes last."""
    for each in (CROSSING, later):
        notices = notices_of(store)
        notices.add(crossed=[each])
        await notices.write()
    [row] = await rows(store, crossings)
    assert Crossing(**row) == (CROSSING if stays else later)


async def test_while_the_database_is_away_as_many_as_fit_are_kept(store):
    """The others are counted. Of a counter the newest crossing replaces the one before."""
    away = Away(store)
    notices = notices_of(away, rows_max=2)
    with structlog.testing.capture_logs() as lines:
        for number in range(4):
            notices.add([replace(REFUSAL, request_id=f"req_{number}")])
            notices.add(crossed=[replace(CROSSING, subject=f"user:{number}")])
            await notices.write()
        notices.add(crossed=[replace(CROSSING, subject="user:0", level=100)])
        await notices.write()
    assert [line["event"] for line in lines] == ["refusals and crossings can't be written"]
    assert notices.dropped == 4
    away.is_away = False
    await notices.write()
    assert [row["request_id"] for row in await rows(store, refusals)] == ["req_0", "req_1"]
    assert [(row["subject"], row["level"]) for row in await rows(store, crossings)] == [
        ("user:0", 100),
        ("user:1", 80),
    ]


async def test_a_crossing_that_is_added_during_a_write_is_written_too(store):
    """It is newer than the one that is written."""
    notices = notices_of(store)

    class Adding:
        def transaction(self, **more):
            if not added:
                added.append(True)
                notices.add(crossed=[replace(CROSSING, level=100)])
            return store.transaction(**more)

    added: list[bool] = []
    notices._store = Adding()
    notices.add(crossed=[CROSSING])
    await notices.write()
    assert [row["level"] for row in await rows(store, crossings)] == [100]


async def test_a_value_that_the_database_rejects_drops_only_its_row(store):
    """It would be rejected each time."""
    notices = notices_of(store)
    notices.add(
        [replace(REFUSAL, request_id="req_0"), replace(REFUSAL, user_name=None), replace(REFUSAL, request_id="z")]
    )
    with structlog.testing.capture_logs() as lines:
        await notices.write()
    assert [row["request_id"] for row in await rows(store, refusals)] == ["req_0", "z"]
    assert notices.dropped == 1
    assert [line["event"] for line in lines] == ["the database rejects a refusal or a crossing"]


async def test_what_is_old_is_deleted(store, monkeypatch):
    """Refusals after a week, crossings a day after the end of their window, and what dead processes left."""
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 2)
    notices = notices_of(store)
    notices.add(
        [replace(REFUSAL, request_id=f"req_{age}", at=NOON - age * DAY) for age in range(12)],
        [replace(CROSSING, subject=f"user:{age}", resets_at=NOON - age * HOUR) for age in range(20, 30)],
    )
    await notices.write()
    await insert(
        store,
        replicas,
        *({"owner": str(age), "at": NOON - age * MINUTE, "status": "{}", "watching_until": 0} for age in (1, 10, 11)),
    )
    await insert(
        store, feed, *({"owner": "1", "seq": age, "at": NOON - age * 1000, "body": "{}"} for age in (59, 60, 61, 62))
    )
    await notices.clean()
    assert {row["request_id"] for row in await rows(store, refusals)} == {f"req_{age}" for age in range(8)}
    assert [row["subject"] for row in await rows(store, crossings)] == [f"user:{age}" for age in range(20, 25)]
    assert [row["owner"] for row in await rows(store, replicas)] == ["1", "10"]
    assert [row["seq"] for row in await rows(store, feed)] == [59, 60]


async def test_rows_that_another_process_deletes_are_left_to_it(store):
    """No process waits for another one here. On SQLite there is one lock for all, so there is nothing to skip."""
    notices = notices_of(store, NOON + 8 * DAY)
    notices.add([REFUSAL, replace(REFUSAL, request_id="req_2")])
    await notices.write()
    if type(store).__name__ == "SqliteStore":
        await notices.clean()
        assert await rows(store, refusals) == []
        return
    async with store.transaction(writes=True) as connection:
        await connection.execute(sa.select(refusals).where(refusals.c.request_id == "req_1").with_for_update())
        await notices.clean()
    assert [row["request_id"] for row in await rows(store, refusals)] == ["req_1"]
