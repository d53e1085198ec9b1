"""What the processes of one database tell each other, on both engines."""

import sqlalchemy as sa

from proxy.ledger import replicas as module
from proxy.ledger.replicas import AuditedChange, FeedRow, Replicas
from proxy.ledger.schema import audit, feed, replicas
from tests.builders import NOON


class Time:
    def __init__(self):
        self.now = NOON


def of(store, owner, time=None):
    return Replicas(store, owner=owner, now=lambda: (time or Time()).now)


async def test_a_process_writes_its_status_again_and_again(store):
    """The newest one stays."""
    one, time = Time(), Time()
    mine = of(store, "one", time)
    await mine.write_status('{"a": 1}', watching_until=0)
    time.now += 5000
    await mine.write_status('{"a": 2}', watching_until=NOON + 9000)
    await of(store, "two", one).write_status("{}", watching_until=0)
    async with store.transaction() as connection:
        found = (await connection.execute(sa.select(replicas).order_by(replicas.c.owner))).all()
    assert [tuple(row) for row in found] == [
        ("one", NOON + 5000, '{"a": 2}', NOON + 9000),
        ("two", NOON, "{}", 0),
    ]


async def test_a_process_is_watched_by_others_and_not_by_itself(store):
    """Until the time that they have written, so also if they die."""
    time = Time()
    one, two = of(store, "one", time), of(store, "two", time)
    assert not await one.is_watched()
    await one.write_status("{}", watching_until=NOON + 1000)
    assert not await one.is_watched()
    assert await two.is_watched()
    time.now += 1000
    assert not await two.is_watched()


async def test_each_reads_what_the_others_wrote_after_its_position(store):
    """In order, and all of a process that is new."""
    one, two, three = (of(store, owner) for owner in ("one", "two", "three"))
    await two.publish("a")
    assert await one.positions() == {"two": 1}
    assert await two.positions() == {}
    await one.publish("mine")
    for text in ("b", "c"):
        await two.publish(text)
    await three.publish("d")
    assert await one.read({"two": 1}) == [FeedRow("three", 1, "d"), FeedRow("two", 2, "b"), FeedRow("two", 3, "c")]
    assert await one.read({"two": 3, "three": 1}) == []
    assert [row.body for row in await two.read({})] == ["mine", "d"]


async def test_a_process_deletes_its_own_old_rows(store):
    """In the transaction of the next one, so the feed stays small."""
    time = Time()
    one, two = of(store, "one", time), of(store, "two", time)
    await two.publish("theirs")
    for _ in range(4):
        await one.publish("mine")
        time.now += module._FEED_KEPT_MS // 2
    async with store.transaction() as connection:
        kept = (
            await connection.execute(sa.select(feed.c.owner, feed.c.seq).order_by(feed.c.owner, feed.c.seq))
        ).all()
    assert [tuple(row) for row in kept] == [("one", 2), ("one", 3), ("one", 4), ("two", 1)]


async def test_changes_are_read_by_the_versions_that_they_made(store, monkeypatch):
    """Of many the newest."""
    async with store.transaction(writes=True) as connection:
        for version in range(1, 20):
            await connection.execute(
                sa.insert(audit).values(
                    **{"id": f"aud_{version:016x}", "at": NOON + version, "actor": "eve", "action": "change"},
                    target=f"staff/{version}",
                )
            )
    one = of(store, "one")
    assert await one.changes(14, 16) == [
        AuditedChange(NOON + 15, "eve", "change", "staff/15"),
        AuditedChange(NOON + 16, "eve", "change", "staff/16"),
    ]
    assert await one.changes(19, 20) == []
    monkeypatch.setattr(module, "_CHANGES_MAX", 3)
    assert [each.target for each in await one.changes(0, 19)] == ["staff/17", "staff/18", "staff/19"]
