"""Who stands where, and resets, on both engines."""

import asyncio
from dataclasses import replace

import orjson
import pytest
import sqlalchemy as sa

from proxy.administration.change import ChangeRefused, NotFound
from proxy.administration.counters import CounterFilter, ResetTarget, counters, reset
from proxy.administration.pages import Paging
from proxy.ledger.book import Expire, Reserve, Settle
from proxy.ledger.entry import CallLabels
from proxy.ledger.schema import audit, crossings
from proxy.ledger.schema import counters as table
from proxy.policy.amounts import Measure
from proxy.policy.quota import Grant, grants_by_quota
from tests.builders import HOUR, NOON, binding, call, exactly, group, policy, quota

STAFF = quota("staff/6h", tokens=1000, requests=50, per="6h", models=["small", "gpt-*"])
POT = quota("staff/pot", tokens=5000, shared=True, enforce="after")
LAB = quota("lab/daily", tokens=100)
ALL = quota("everyone/daily", requests=10)
POLICY = policy(group("everyone", ALL), group("staff", STAFF, POT), group("lab", LAB))


async def listed(rows, asked=CounterFilter(), paging=Paging(), *, of=POLICY, now=None):  # noqa: B008
    async with rows.store.transaction() as connection:
        return await counters(connection, of, asked, paging, rows.now if now is None else now)


async def names(rows, **asked) -> list[tuple]:
    return [(each.quota, each.user) for each in (await listed(rows, CounterFilter(**asked))).data]


@pytest.fixture
async def filled(rows):
    """Ann and bob of staff, their pot, and carl of lab, whose window has ended."""
    await rows.counter("user:bob", STAFF.id, 900, held=40, level=80)
    await rows.counter("user:ann", STAFF.id, 100)
    await rows.counter("~staff", POT.id, 5000, held=10, level=100)
    await rows.counter("user:ann", "staff/gone", 77)
    await rows.counter("user:carl", LAB.id, 95, level=80, opened_at=rows.now - HOUR, resets_at=rows.now)
    return rows


async def test_a_counter_is_shown_with_its_window_and_each_limit(filled):
    """Percent is what is used, and remaining what is neither used nor held; but holds do not count with `after`."""
    ann, bob, pot = (await listed(filled)).data
    assert (ann.user, ann.group, ann.quota, ann.models, ann.per) == (
        "ann",
        "staff",
        STAFF.id,
        STAFF.models.texts,
        "6h",
    )
    assert (bob.opened_at, bob.resets_at) == (filled.now - HOUR, filled.now + HOUR)
    tokens, requests = bob.limits
    assert (tokens.measure, tokens.limit, tokens.used, tokens.held, tokens.remaining) == ("tokens", 1000, 900, 40, 60)
    assert (tokens.percent, requests.percent, bob.percent) == (90.0, 2.0, 90.0)
    assert (requests.used, requests.held, requests.remaining) == (1, 1, 48)
    assert (pot.user, pot.shared, pot.enforce, pot.limits[0].remaining, pot.percent) == (
        None,
        True,
        "after",
        0,
        100.0,
    )


async def test_counters_are_filtered(filled):
    """Quotas that are in no group any more are not shown."""
    staff = [(STAFF.id, "ann"), (STAFF.id, "bob")]
    assert await names(filled) == [*staff, (POT.id, None)]
    assert await names(filled, quota=STAFF.id) == staff
    assert await names(filled, group="staff") == [*staff, (POT.id, None)]
    assert await names(filled, group="lab") == []
    assert await names(filled, model="gpt-4o") == [*staff, (POT.id, None)]
    assert await names(filled, model="other") == [(POT.id, None)]
    assert await names(filled, groups=["lab"]) == []
    assert await names(filled, groups=[]) == []
    assert await names(filled, near=80) == [(STAFF.id, "bob"), (POT.id, None)]
    assert await names(filled, near=91) == [(POT.id, None)]
    assert await names(filled, near=80, groups=["lab"]) == []


@pytest.mark.parametrize(
    ("asked", "kind", "field"),
    [
        ({"quota": "staff/gone"}, NotFound, "quota"),
        ({"quota": LAB.id, "groups": ["staff"]}, NotFound, "quota"),
        ({"group": "nowhere"}, NotFound, "group"),
        ({"group": "lab", "groups": ["staff"]}, NotFound, "group"),
        ({"near": 79}, ChangeRefused, "near"),
    ],
)
async def test_what_is_not_there_or_not_noted_is_refused(rows, asked, kind, field):
    """A quota of a group that whoever asks may not see is not there."""
    with pytest.raises(kind) as caught:
        await listed(rows, CounterFilter(**asked))
    assert caught.value.field == field


async def test_what_grants_add_is_in_the_limit(filled):
    """One for each member, one for bob alone, and one that has ended."""
    given = [
        Grant("grt_1", STAFF.id, None, Measure.TOKENS, 100, filled.now + 1),
        Grant("grt_2", STAFF.id, "bob", Measure.TOKENS, 900, filled.now + 1),
        Grant("grt_3", STAFF.id, None, Measure.TOKENS, 7, filled.now),
        Grant("grt_4", POT.id, None, Measure.TOKENS, 5000, filled.now + 1),
    ]
    granted = replace(POLICY, grants=grants_by_quota(given))
    ann, bob, pot = (await listed(filled, of=granted)).data
    assert [(each.limits[0].limit, each.percent) for each in (ann, bob, pot)] == [
        (1100, 9.1),
        (2000, 45.0),
        (10000, 50.0),
    ]
    assert (ann.grants, bob.grants, pot.grants) == (("grt_1",), ("grt_1", "grt_2"), ("grt_4",))
    assert (await listed(filled, CounterFilter(near=80), of=granted)).data == ()
    [of_bob] = (await listed(filled, CounterFilter(user="bob", quota=STAFF.id), of=granted)).data
    assert of_bob == bob


async def test_near_follows_the_limits_in_force_and_the_open_window(filled):
    """A raised limit, and a window that opened since, end it; a page goes on behind what is not near any more."""
    for number in range(5):
        await filled.counter(f"user:a{number}", STAFF.id, 790, level=80)
    await filled.counter("user:old", STAFF.id, 990, level=80)
    async with filled.store.transaction(writes=True) as connection:
        earlier = sa.update(crossings).where(crossings.c.subject == "user:old")
        await connection.execute(earlier.values(opened_at=filled.now - 2 * HOUR))
    first = await listed(filled, CounterFilter(near=80), Paging(limit=1))
    assert [each.user for each in first.data] == ["bob"]
    second = await listed(filled, CounterFilter(near=80), Paging(first.next, limit=1))
    assert ([each.quota for each in second.data], second.next) == ([POT.id], None)
    raised = replace(
        POLICY, groups={**POLICY.groups, "staff": group("staff", quota(STAFF.id, tokens=2000, per="6h"))}
    )
    assert (await listed(filled, CounterFilter(near=80), of=raised)).data == ()


@pytest.mark.parametrize("near", [None, 80])
@pytest.mark.parametrize("limit", [1, 2, 3, 7])
async def test_pages_have_every_counter_once(rows, near, limit):
    """In the order of quotas and subjects."""
    expected = [(each.id, name) for each in (LAB, STAFF) for name in ("a", "b", "c")]
    for id, name in expected:
        await rows.counter(f"user:{name}", id, 1000, level=100)
    await rows.counter("~staff", POT.id, 5000, level=100)
    await rows.counter("user:ann", POT.id, 5000, level=100)  # from before it was shared
    expected.append((POT.id, None))
    found, paging = [], Paging(limit=limit)
    while True:
        page = await listed(rows, CounterFilter(near=near), paging)
        assert len(page.data) <= limit
        found += [(each.quota, each.user) for each in page.data]
        if page.next is None:
            break
        paging = Paging(page.next, limit)
    assert found == expected


async def test_of_one_user_also_quotas_are_shown_that_no_call_has_opened(filled):
    """Those of the user's groups, with their pots, and those in which the user was counted before."""
    carl = await listed(filled, CounterFilter(user="carl", user_groups=["staff"]))
    assert [(each.quota, each.user, each.percent) for each in carl.data] == [
        (ALL.id, "carl", 0.0),
        (LAB.id, "carl", 0.0),  # its window has ended
        (STAFF.id, "carl", 0.0),
        (POT.id, None, 100.0),
    ]
    assert [each.resets_at is None for each in carl.data] == [False, False, True, False]
    assert carl.next is None
    assert await names(filled, user="carl") == [(ALL.id, "carl"), (LAB.id, "carl")]
    assert await names(filled, user="carl", groups=["lab"]) == [(LAB.id, "carl")]
    assert await names(filled, user="bob", near=80) == [(STAFF.id, "bob")]
    assert await names(filled, user="ann", quota=STAFF.id) == [(STAFF.id, "ann")]


# ------------------------------------------------------------------------------------------------------------- resets


async def used_of(rows) -> dict[tuple[str, str], tuple]:
    async with rows.store.transaction() as connection:
        found = (await connection.execute(sa.select(table))).all()
    return {
        (row.subject, row.quota_id): (row.used_input, row.held_input, row.opened_at, row.resets_at) for row in found
    }


@pytest.mark.parametrize(
    ("target", "groups", "emptied"),
    [
        (ResetTarget(user="ann"), None, {("user:ann", STAFF.id)}),
        (ResetTarget(user="bob", quota=STAFF.id), ["staff"], {("user:bob", STAFF.id)}),
        (ResetTarget(user="bob"), ["lab"], set()),
        (ResetTarget(user="zoe"), None, set()),
        (ResetTarget(quota=POT.id), None, {("~staff", POT.id)}),
        (ResetTarget(quota=STAFF.id), None, {("user:ann", STAFF.id), ("user:bob", STAFF.id)}),
        (
            ResetTarget(group="staff"),
            None,
            {("user:ann", STAFF.id), ("user:bob", STAFF.id), ("~staff", POT.id)},
        ),
        (ResetTarget(group="lab"), None, set()),  # its window has ended
    ],
)
async def test_a_reset_empties_what_is_used_and_nothing_else(filled, changes, target, groups, emptied):
    """What is held and the window stay. The audit log has what was used."""
    before = await used_of(filled)
    async with changes.begin("counters.reset", "target") as change:
        done = await reset(change, POLICY, target, groups=groups, now=lambda: NOON)
    after = await used_of(filled)
    assert {key for key in before if after[key] != before[key]} == emptied
    assert all(after[key] == (0, *before[key][1:]) for key in emptied)
    assert done.counters == len(emptied)
    sums = {each.quota: each.used["input"] for each in done.quotas}
    assert sums == {
        id: sum(before[key][0] for key in emptied if key[1] == id) for id in sorted({id for _, id in emptied})
    }
    async with filled.store.transaction() as connection:
        [row] = (await connection.execute(sa.select(audit))).all()
    assert {id: used["input"] for id, used in orjson.loads(row.before)["used"].items()} == sums
    assert orjson.loads(row.after)["counters"] == len(emptied)


@pytest.mark.parametrize(
    ("target", "field"),
    [
        (ResetTarget(), "user"),
        (ResetTarget(user="ann", quota=POT.id), "quota"),
        (ResetTarget(user="ann", quota="staff/gone"), "quota"),
        (ResetTarget(group="nowhere"), "group"),
    ],
)
async def test_a_reset_of_nothing_that_is_there_is_refused(filled, changes, target, field):
    """The pot is no user's own."""
    before = await used_of(filled)
    with pytest.raises(ChangeRefused) as caught:
        async with changes.begin("counters.reset", "target") as change:
            await reset(change, POLICY, target, now=lambda: NOON)
    assert caught.value.field == field
    assert await used_of(filled) == before


async def test_a_trial_of_a_reset_changes_nothing(filled, changes):
    """It says what it would do."""
    before = await used_of(filled)
    async with changes.as_trial().begin("counters.reset", "target") as change:
        assert (await reset(change, POLICY, ResetTarget(group="staff"), now=lambda: NOON)).counters == 3
    assert await used_of(filled) == before


def _reserve(id: str, user: str = "ann", quotas=(STAFF,)) -> Reserve:
    labels = CallLabels(user, "small", "chat", "openai")
    return Reserve(id, "process-1", labels, binding(quotas, user=user), call(100, 400))


async def test_calls_in_flight_settle_into_a_counter_that_was_reset(rows, changes):
    """An answer that settles is charged; one that had expired before the reset has nothing to correct."""
    store, key = rows.store, STAFF.key_for("ann")
    await store.apply([_reserve("1"), _reserve("2"), Expire("2")], NOON)
    [before] = (await store.read_counters([key])).values()
    async with changes.begin("counters.reset", "ann") as change:
        await reset(change, POLICY, ResetTarget(user="ann"), now=lambda: NOON)
    [emptied] = (await store.read_counters([key])).values()
    assert (emptied.used.tokens, emptied.held.tokens, emptied.window) == (0, 500, before.window)
    await store.apply([Settle("2", exactly(90, 60), "complete"), Settle("1", exactly(90, 60), "complete")], NOON)
    [after] = (await store.read_counters([key])).values()
    assert (after.used.tokens, after.held.tokens, after.window) == (150, 0, before.window)


async def test_a_window_in_which_everything_was_reset_keeps_its_end(rows, changes):
    """Headers and refusals have announced it. The next call does not open a new one."""
    store, key = rows.store, STAFF.key_for("ann")
    await store.apply([_reserve("1"), Settle("1", exactly(90, 60), "complete")], NOON)
    [before] = (await store.read_counters([key])).values()
    async with changes.begin("counters.reset", "ann") as change:
        await reset(change, POLICY, ResetTarget(user="ann"), now=lambda: NOON)
    [shown] = (await listed(rows, CounterFilter(user="ann", quota=STAFF.id), now=before.window.opened_at + 1)).data
    assert (shown.opened_at, shown.resets_at, shown.percent) == (
        *(before.window.opened_at, before.window.resets_at),
        0.0,
    )
    await store.apply([_reserve("2")], NOON + 1)
    [after] = (await store.read_counters([key])).values()
    assert (after.window, after.used.tokens, after.held.tokens) == (before.window, 0, 500)


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
async def test_a_reset_locks_counters_in_the_order_in_which_batches_lock_them(rows, changes):
    """By bytes, and not as the locale of the database sorts names. Else the two could wait for each other."""
    names = ["Z", "_", "a", "B", "b", "z", "É", "~x", "9"]
    for name in names:
        await rows.counter(f"user:{name}", STAFF.id, 1)
    ids = sa.select(table.c.subject).with_for_update(skip_locked=True)
    async with rows.store.transaction(writes=True) as other:
        await other.execute(sa.select(table).where(table.c.subject == "user:a").with_for_update())
        resetting = asyncio.create_task(_reset_all(changes))
        await _until_blocked(rows.store)
        async with rows.store.transaction() as third:
            free = set((await third.execute(ids)).scalars())
    assert await resetting == len(names)
    assert free == {f"user:{name}" for name in names if name.encode() > b"a"}


async def _reset_all(changes) -> int:
    async with changes.begin("counters.reset", "staff") as change:
        return (await reset(change, POLICY, ResetTarget(group="staff"), now=lambda: NOON)).counters


async def _until_blocked(store) -> None:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with asyncio.timeout(20):
        while True:
            async with store.transaction() as connection:
                if (await connection.execute(sa.text(waiting))).scalar_one():
                    return
            await asyncio.sleep(0.01)
