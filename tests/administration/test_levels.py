"""How much of the quotas is used, for the metrics, on both engines."""

import random

import pytest

from proxy.administration.counters import status_of
from proxy.administration.levels import PERCENTAGES, levels
from proxy.ledger.queries import read_counters
from proxy.ledger.schema import counters
from proxy.policy.quota import grants_by_quota
from tests.builders import HOUR, grant, group, policy, quota

DAILY = quota("staff/daily", tokens=1000)
BOTH = quota("staff/both", output_tokens=300, requests=10)
OFF = quota("staff/off", tokens=0)
POT = quota("lab/pot", tokens=5000, requests=100, shared=True)
UNUSED = quota("lab/unused", input_tokens=70, shared=True)
POLICY = policy(group("staff", DAILY, BOTH, OFF), group("lab", POT, UNUSED))


async def of(rows, of_policy=POLICY):
    async with rows.store.transaction() as connection:
        return await levels(connection, of_policy, rows.now)


async def test_members_near_a_limit_are_counted_by_quota(rows):
    """Those at 100 % are among those at 80 %. A limit of 0 is a switch that is off, and nobody is near it."""
    for user, used in {"ann": 799, "bob": 800, "cid": 999, "dan": 1000, "eve": 1500}.items():
        await rows.counter(f"user:{user}", DAILY.id, used)
        await rows.counter(f"user:{user}", OFF.id, used)
    assert (await of(rows)).members == {
        (DAILY.id, 80): 4,
        (DAILY.id, 100): 2,
        (BOTH.id, 80): 0,
        (BOTH.id, 100): 0,
        (OFF.id, 80): 0,
        (OFF.id, 100): 0,
    }


async def test_one_of_several_limits_is_enough(rows):
    """And a member who is near two of them counts once."""
    numbers = {"used_input": 5000, "held_input": 0, "held_output": 0, "held_requests": 0}
    window = {"opened_at": rows.now - HOUR, "resets_at": rows.now + HOUR, "quota_id": BOTH.id, **numbers}
    used = {"ann": (240, 1), "bob": (10, 8), "cid": (300, 10), "dan": (239, 7)}
    await rows.insert(
        counters,
        [
            {"subject": f"user:{user}", "used_output": output, "used_requests": requests, **window}
            for user, (output, requests) in used.items()
        ],
    )
    members = (await of(rows)).members
    assert (members[BOTH.id, 80], members[BOTH.id, 100]) == (3, 1)


async def test_windows_that_have_ended_and_other_counters_are_left_out(rows):
    """Those of a quota that is gone, of a pot, and those of the group from when the quota was shared."""
    await rows.counter("user:ann", DAILY.id, 1000, resets_at=rows.now)
    await rows.counter("~staff", DAILY.id, 1000)
    await rows.counter("user:ann", POT.id, 5000)
    await rows.counter("user:ann", "gone/daily", 1000)
    found = await of(rows)
    assert set(found.members.values()) == {0}
    assert found.pots[POT.id, "tokens"] == (5000, 0, 0)


async def test_grants_raise_what_a_member_must_have_used(rows):
    """Those for all and those of one user; one that has ended raises nothing."""
    for user in ("ann", "bob", "cid"):
        await rows.counter(f"user:{user}", DAILY.id, 1000)
    later = rows.now + HOUR
    grants = [
        grant(DAILY.id, until=later, tokens=100),  # for all: 1,100, of which 880 are 80 %
        grant(DAILY.id, until=later, user="ann", id="g2", tokens=400),  # 1,500: 80 % are 1,200
        grant(DAILY.id, until=later, user="bob", id="g3", tokens=150),  # 1,250: 80 % are 1,000
        grant(DAILY.id, until=rows.now, user="cid", id="g4", tokens=9000),
        grant(POT.id, until=later, id="g5", requests=20),
    ]
    found = await of(rows, policy(*POLICY.groups.values(), grants=grants_by_quota(grants)))
    assert (found.members[DAILY.id, 80], found.members[DAILY.id, 100]) == (2, 0)
    assert found.pots[POT.id, "requests"] == (120, 0, 0)


async def test_pots_have_their_limit_and_what_is_used_and_held(rows):
    """One that nobody has used is there with 0."""
    await rows.counter("~lab", POT.id, 300, held=50)
    assert (await of(rows)).pots == {
        (POT.id, "tokens"): (5000, 300, 50),
        (POT.id, "requests"): (100, 1, 1),
        (UNUSED.id, "input_tokens"): (70, 0, 0),
    }


async def test_a_policy_without_quotas_asks_for_nothing(rows):
    found = await of(rows, policy(group("staff", unlimited=True)))
    assert (found.pots, found.members) == ({}, {})


@pytest.mark.parametrize("seed", range(3))
async def test_the_database_counts_what_the_displays_would(rows, seed):
    """For random counters and grants, the same as asking for the status of each member."""
    chance = random.Random(seed)
    users = [f"u{number}" for number in range(60)]
    for user in users:
        for each in (DAILY, BOTH):
            await rows.counter(f"user:{user}", each.id, chance.choice([0, 200, 790, 800, 810, 1000, 1200]))
    until = rows.now + chance.choice([0, HOUR])
    grants = [
        grant(
            DAILY.id, until=until, user=chance.choice([*users, None]), id=f"g{number}", tokens=chance.randint(1, 500)
        )
        for number in range(20)
    ]
    given = policy(*POLICY.groups.values(), grants=grants_by_quota(grants))
    async with rows.store.transaction() as connection:
        found = await read_counters(connection, [each.key_for(user) for each in (DAILY, BOTH) for user in users])
    expected = {
        (each.id, percent): sum(
            any(
                status.counter.used.of(limit.measure) * 100 >= percent * limit.maximum
                for limit in status.quota.limits
            )
            for status in (status_of(given, each, user, found, rows.now) for user in users)
        )
        for each in (DAILY, BOTH)
        for percent in PERCENTAGES
    }
    members = (await of(rows, given)).members
    assert {key: members[key] for key in expected} == expected
