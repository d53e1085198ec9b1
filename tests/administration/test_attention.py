"""Refusals that were stored, and what needs attention, on both engines."""

import orjson
import pytest

from proxy.administration.attention import attention
from proxy.administration.change import ChangeRefused, NotFound
from proxy.administration.pages import Paging, cursor_of
from proxy.administration.refusals import RefusalFilter, refusal, refusals
from tests.builders import HOUR, MINUTE, NOON, group, policy, quota

STAFF = quota("staff/6h", tokens=1000, per="6h")
POT = quota("staff/pot", tokens=5000, requests=100, shared=True, per="24h")
LAB_POT = quota("lab/pot", tokens=100, shared=True, per="6h")
SHADOW = quota("lab/shadow", tokens=10, shared=True, enforce="shadow")
POLICY = policy(group("staff", STAFF, POT), group("lab", LAB_POT, SHADOW))


async def listed(rows, asked=RefusalFilter(), paging=Paging()):  # noqa: B008
    async with rows.store.transaction() as connection:
        return await refusals(connection, asked, paging)


async def of(rows, *, groups=None, now=None):
    async with rows.store.transaction() as connection:
        return await attention(connection, POLICY, groups=groups, now=now or rows.now)


# ----------------------------------------------------------------------------------------------------------- refusals


async def test_refusals_are_counted_by_user_quota_and_minute(rows):
    """The newest minute first. What was not stored of a second is in the count of its first."""
    await rows.refusal(1, "ann", STAFF.id, NOON, count=3)
    last = await rows.refusal(2, "ann", STAFF.id, NOON + 59_999, count=4)
    await rows.refusal(3, "ann", POT.id, NOON + 1)
    await rows.refusal(4, "bob", STAFF.id, NOON + MINUTE)
    found = [(each.minute_at, each.user, each.quota, each.count) for each in (await listed(rows)).data]
    assert found == [
        (NOON + MINUTE, "bob", STAFF.id, 1),
        (NOON, "ann", STAFF.id, 7),
        (NOON, "ann", POT.id, 1),
    ]
    counted = (await listed(rows)).data[1]
    assert (counted.last_at, counted.last_request_id) == (NOON + 59_999, last)


@pytest.mark.parametrize(
    ("asked", "users"),
    [
        (RefusalFilter(user="ann"), "a a"),
        (RefusalFilter(quota=POT.id), "b"),
        (RefusalFilter(since=NOON + MINUTE), "b a"),
        (RefusalFilter(until=NOON + MINUTE), "a"),
        (RefusalFilter(groups=["staff"]), "b a a"),
        (RefusalFilter(groups=["sta_f", "lab"]), ""),
        (RefusalFilter(groups=[]), ""),
    ],
)
async def test_refusals_are_filtered(rows, asked, users):
    await rows.refusal(1, "ann", STAFF.id, NOON)
    await rows.refusal(2, "ann", STAFF.id, NOON + MINUTE)
    await rows.refusal(3, "bob", POT.id, NOON + 2 * MINUTE)
    assert [each.user[0] for each in (await listed(rows, asked)).data] == users.split()


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
@pytest.mark.parametrize("asked", [RefusalFilter(), RefusalFilter(user="u1"), RefusalFilter(groups=["staff"])])
async def test_pages_have_every_minute_once(rows, limit, asked):
    """Also if a user was refused in each second of several minutes."""
    expected = []
    for minute in range(3):
        for number, user in enumerate(("u1", "u2", "u3")):
            for second in range(0, 60, 2):
                at = NOON + minute * MINUTE + second * 1000
                await rows.refusal(number, user, STAFF.id if user != "u3" else POT.id, at, count=2)
            expected.append((NOON + minute * MINUTE, user, 60))
    expected = [
        each for each in sorted(expected, key=lambda each: (-each[0], each[1])) if asked.user in (None, each[1])
    ]
    found, paging = [], Paging(limit=limit)
    while True:
        page = await listed(rows, asked, paging)
        assert len(page.data) <= limit
        found += [(each.minute_at, each.user, each.count) for each in page.data]
        if page.next is None:
            break
        paging = Paging(page.next, limit)
    assert found == expected


async def test_a_cursor_of_another_list_is_refused(rows):
    with pytest.raises(ChangeRefused):
        await listed(rows, paging=Paging(cursor_of(("ann",))))


async def test_a_refusal_is_found_by_its_request(rows):
    """With what it needed, and what was explained of it."""
    noted = {"refused_by": [STAFF.id], "blocks": [], "alternatives": [[STAFF.id]], "quotas": [{"quota": STAFF.id}]}
    id = await rows.refusal(1, "ann", STAFF.id, NOON, count=3, key_id="k1", details=orjson.dumps(noted).decode())
    async with rows.store.transaction() as connection:
        found = await refusal(connection, id, groups=["staff"])
        assert (found.request_id, found.at, found.user, found.quota, found.model) == (
            id,
            NOON,
            "ann",
            STAFF.id,
            "small",
        )
        assert (found.measure, found.limit, found.used, found.held, found.needed) == ("tokens", 1000, 1000, 0, 10)
        assert (found.resets_at, found.admissible_at, found.key_id, found.count) == (
            NOON + HOUR,
            NOON + HOUR,
            "k1",
            3,
        )
        assert found.details == noted
        for asked, groups in ((id, ["lab"]), ("req_0", None)):
            with pytest.raises(NotFound):
                await refusal(connection, asked, groups=groups)


# ---------------------------------------------------------------------------------------------------------- attention


async def test_who_was_refused_in_the_last_hour_needs_attention(rows):
    """Once for each quota, with the last refusal and how many there were; the latest first."""
    now = NOON + HOUR
    await rows.refusal(1, "old", STAFF.id, NOON - 1)
    await rows.refusal(2, "ann", STAFF.id, NOON, used=990)
    last = await rows.refusal(3, "ann", STAFF.id, NOON + 9, used=995, count=5)
    await rows.refusal(4, "ann", POT.id, NOON + 1)
    await rows.refusal(5, "bob", LAB_POT.id, NOON + 5)
    found = await of(rows, now=now)
    assert [(each.user, each.quota, each.count) for each in found.refused] == [
        ("ann", STAFF.id, 6),
        ("bob", LAB_POT.id, 1),
        ("ann", POT.id, 1),
    ]
    assert (found.refused[0].request_id, found.refused[0].used, found.refused[0].at) == (last, 995, NOON + 9)
    assert [each.user for each in (await of(rows, now=now, groups=["lab"])).refused] == ["bob"]


async def test_who_is_near_a_limit_needs_attention(rows):
    """Also pots."""
    await rows.counter("user:ann", STAFF.id, 800, level=80)
    await rows.counter("user:bob", STAFF.id, 799, level=80)
    await rows.counter("~staff", POT.id, 5100, level=100)
    assert [(each.user, each.percent) for each in (await of(rows)).near] == [(None, 102.0), ("ann", 80.0)]
    assert (await of(rows, groups=["lab"])).near == ()


@pytest.mark.parametrize(
    ("used", "runs_out_in"),
    [
        pytest.param(2500, None, id="at this pace it is reached at the reset"),
        pytest.param(2501, HOUR - 2879, id="a little faster"),
        pytest.param(4000, HOUR // 4, id="80 % in the first of two hours: in a quarter of an hour"),
        pytest.param(5000, 0, id="it is used up now"),
        pytest.param(6000, 0, id="more than the limit is used"),
        pytest.param(0, None, id="nothing is used"),
    ],
)
async def test_a_pot_that_runs_out_before_its_reset_needs_attention(rows, used, runs_out_in):
    """Its window lasts from an hour ago to an hour from now."""
    await rows.counter("~staff", POT.id, used)
    found = [(each.quota, each.measure, each.runs_out_at - rows.now) for each in (await of(rows)).pots]
    assert found == ([] if runs_out_in is None else [(POT.id, "tokens", runs_out_in)])


async def test_pots_are_shown_in_the_order_in_which_they_run_out(rows):
    """Not those in shadow, which refuse nobody, and not those whose window has ended."""
    await rows.counter("~staff", POT.id, 4000)
    await rows.counter("~lab", LAB_POT.id, 95)
    await rows.counter("~lab", SHADOW.id, 10)
    assert [each.quota for each in (await of(rows)).pots] == [LAB_POT.id, POT.id]
    assert [each.quota for each in (await of(rows, groups=["staff"])).pots] == [POT.id]
    assert (await of(rows, now=rows.now + HOUR)).pots == ()


async def test_after_a_reset_the_pace_is_that_since_the_reset(rows):
    """1,000 of 5,000 tokens in 20 minutes: 4,000 more take 80 minutes, which is after the reset."""
    await rows.counter("~staff", POT.id, 1000, reset_at=rows.now - HOUR // 3)
    assert (await of(rows)).pots == ()
    await rows.counter("~lab", LAB_POT.id, 50, reset_at=rows.now - HOUR // 3)
    assert [(each.quota, each.runs_out_at - rows.now) for each in (await of(rows)).pots] == [(LAB_POT.id, HOUR // 3)]
