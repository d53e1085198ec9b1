"""Grants are one row each, part of the policy, and bounded for managers."""

from dataclasses import replace

import pytest

from proxy.administration.change import Author, ChangeRefused, Changes, Conditions, NotFound
from proxy.administration.grants import GrantAdministration, NewGrant
from proxy.administration.pages import Paging
from proxy.administration.policy import PolicyAdministration
from proxy.config.loader import load_text
from proxy.identity.database import DirectoryDatabase
from proxy.policy.quota import Grant
from tests.builders import DAY, HOUR, NOON

CONFIG = load_text("""
upstreams: {simulated: {base_url: "http://127.0.0.1:9"}}
groups:
  staff: {quotas: {daily: {tokens: 200k, per: day}, calls: {requests: 10, tokens: 100, per: day}}}
  team: {quotas: {pot: {shared: true, tokens: 5M, per: month}}}
""")


@pytest.fixture
def admin(store):
    changes = Changes(DirectoryDatabase(store, now=lambda: NOON), Author("cli:ops"), lambda: NOON)
    return GrantAdministration(changes, CONFIG)


def new(**changed) -> NewGrant:
    made = NewGrant("staff/daily", "alice", "tokens", 50_000, NOON + HOUR, "a talk tomorrow")
    return replace(made, **changed)


def at(admin, now):
    return replace(admin, changes=replace(admin.changes, now=lambda: now))


async def running(admin) -> tuple[Grant, ...]:
    """The grants that are part of the policy in force."""
    return (await PolicyAdministration(admin.changes, CONFIG).made()).grants


async def test_a_grant_is_part_of_the_policy_until_it_ends_by_the_clock(admin):
    record = await admin.create(new())
    [grant] = await running(admin)
    assert (grant.id, grant.user, grant.amount, grant.until) == (record.id, "alice", 50_000, NOON + HOUR)
    assert await running(at(admin, NOON + HOUR)) == ()
    assert (await admin.grants(paging=Paging())).data == (record,)
    assert (await at(admin, NOON + HOUR).grants(paging=Paging())).data == ()
    assert (await at(admin, NOON + HOUR).grants(ended=True, paging=Paging())).data == (record,)


async def test_a_grant_for_each_member_and_one_for_a_pot_are_one_row(admin):
    await admin.create(new(user=None))
    await admin.create(new(quota="team/pot", user=None))
    assert sorted((each.quota_id, each.user) for each in await running(admin)) == [
        ("staff/daily", None),
        ("team/pot", None),
    ]


async def test_a_grant_is_ended_once(admin):
    record = await admin.create(new())
    ended = await at(admin, NOON + 5).end(record.id)
    assert ended.ended_at == NOON + 5
    assert (await at(admin, NOON + 9).end(record.id)).ended_at == NOON + 5
    assert await running(admin) == ()


@pytest.mark.parametrize(
    ("changed", "error", "field"),
    [
        ({"quota": "staff/dayly"}, NotFound, "quota"),
        ({"measure": "euros"}, ChangeRefused, "measure"),
        ({"measure": "requests"}, ChangeRefused, "measure"),
        ({"amount": 0}, ChangeRefused, "amount"),
        ({"amount": 2**62}, ChangeRefused, "amount"),
        ({"until": NOON}, ChangeRefused, "until"),
        ({"until": NOON + 400 * DAY}, ChangeRefused, "until"),
        ({"reason": " "}, ChangeRefused, "reason"),
        ({"reason": "a\nb"}, ChangeRefused, "reason"),
        ({"quota": "team/pot"}, ChangeRefused, "user"),
    ],
)
async def test_a_grant_without_effect_is_refused(admin, changed, error, field):
    with pytest.raises(error) as refused:
        await admin.create(new(**changed))
    assert refused.value.field == field
    assert await running(admin) == ()


async def test_a_repeated_creation_finds_the_first(admin):
    once = replace(admin, changes=replace(admin.changes, conditions=Conditions(idempotency_key="k", fingerprint="f")))
    assert await once.create(new()) == await once.create(new())
    assert len(await running(admin)) == 1


async def test_a_manager_grants_up_to_a_part_of_the_limit_over_all_running_grants(admin):
    """50 % of 200,000: a grant to the group counts for each user."""
    manager = replace(admin, up_to_percent=50)
    await manager.create(new(amount=60_000))
    with pytest.raises(ChangeRefused, match="of which 40000 are left") as refused:
        await manager.create(new(amount=40_001))
    assert refused.value.field == "amount"
    await manager.create(new(amount=40_000, user="bob"))
    with pytest.raises(ChangeRefused, match="of which 40000 are left"):
        await manager.create(new(amount=40_001, user=None))
    await manager.create(new(amount=40_000, user=None))
    with pytest.raises(ChangeRefused, match="of which 0 are left"):
        await manager.create(new(amount=1))
    await at(manager, NOON + HOUR).create(new(amount=100_000, until=NOON + 2 * HOUR))


async def test_the_list_is_filtered_and_paged(admin):
    made = [await admin.create(new(user=user)) for user in ("alice", "bob", "carl")]
    await admin.create(new(quota="team/pot", user=None))
    found, cursor = [], None
    while True:
        page = await replace(admin, groups=["staff"]).grants(paging=Paging(cursor, 2))
        found += page.data
        cursor = page.next
        if cursor is None:
            break
    assert sorted(each.id for each in found) == sorted(each.id for each in made)
    assert [each.user for each in (await admin.grants(user="bob", paging=Paging())).data] == ["bob"]
    assert [each.quota for each in (await admin.grants(quota="team/pot", paging=Paging())).data] == ["team/pot"]
    assert (await replace(admin, groups=[]).grants(paging=Paging())).data == ()
    with pytest.raises(NotFound):
        await admin.grant("grt_nope")


async def test_grants_on_quotas_of_other_groups_are_not_found(admin):
    """A manager neither sees nor ends them, and makes none."""
    other = await admin.create(new(quota="team/pot", user=None))
    manager = replace(admin, groups=["staff"])
    for refused in (manager.grant(other.id), manager.end(other.id), manager.create(new(quota="team/pot", user=None))):
        with pytest.raises(NotFound):
            await refused
    assert (await admin.grant(other.id)).ended_at is None
