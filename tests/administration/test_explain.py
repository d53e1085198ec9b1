"""Why a user is admitted or not, on both engines and by the clock of the ledger."""

import pytest

from proxy.administration.explain import explain
from proxy.administration.records import UserRecord
from proxy.config.loader import load
from proxy.identity.directory import UserId
from proxy.ledger.schema import counters
from tests.builders import DAY, HOUR, NOON, snapshot_of

CONFIG = b"""
database: sqlite:///quotas.db
upstreams: {up: {kind: openai, base_url: "http://127.0.0.1:1/v1", api_key: none-is-needed-here}}
models: {small: {upstream: up}, large: {upstream: up}, other: {upstream: up}}
groups:
  staff: {models: [small, large], quotas: {hours: {per: 6h, tokens: 1000, models: [small]}}}
  lab: {quotas: {day: {per: 24h, tokens: 1000, models: [small]}}}
  shut: {quotas: {none: {per: day, tokens: 0, models: [small]}}}
"""
BOB = UserId("database", "bob")


@pytest.fixture(scope="module")
def snapshot():
    return snapshot_of(load("quotas.yaml", {}, lambda _: CONFIG))


async def explained(rows, snapshot, model="small", groups=("staff",), **more):
    async with rows.store.transaction() as connection:
        return await explain(connection, snapshot, UserRecord(BOB, groups, **more), model, now=lambda: NOON)


async def test_a_call_is_admitted_within_its_quotas(rows, snapshot):
    """With what is left of them."""
    await rows.counter("user:database:bob", "staff/hours", 900)
    found = await explained(rows, snapshot)
    assert (found.user, found.source, found.groups, found.model) == ("database:bob", "database", ("staff",), "small")
    assert (found.admitted, found.reason, found.refused_by, found.admissible_at) == (True, None, (), None)
    assert [(each.quota, each.limits[0].remaining) for each in found.quotas] == [("staff/hours", 100)]
    assert found.at == pytest.approx(rows.now, abs=60_000)


async def test_a_refusal_says_by_which_quotas_and_until_when(rows, snapshot):
    """By the clock of the ledger, by which the window is open. Of two groups the first reset counts."""
    await rows.counter("user:database:bob", "staff/hours", 1000)
    found = await explained(rows, snapshot)
    assert (found.admitted, found.reason, found.refused_by) == (False, "exhausted", ("staff/hours",))
    assert found.admissible_at == rows.now + HOUR
    await rows.insert(
        counters,
        [
            {
                "subject": "user:database:bob",
                "quota_id": "lab/day",
                "opened_at": rows.now,
                "resets_at": rows.now + DAY,
            }
            | {"used_input": 2000, "used_output": 0, "used_requests": 1}
            | {"held_input": 0, "held_output": 0, "held_requests": 0}
        ],
    )
    both = await explained(rows, snapshot, groups=("lab", "staff"))
    assert (both.refused_by, both.admissible_at) == (("staff/hours",), rows.now + HOUR)
    assert both.alternatives == (("staff/hours",), ("lab/day",))


async def test_of_a_limit_of_0_no_reset_helps(rows, snapshot):
    found = await explained(rows, snapshot, groups=("shut",))
    assert (found.reason, found.refused_by, found.admissible_at) == ("exhausted", ("shut/none",), None)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"disabled_at": NOON}, "disabled"),
        ({"model": "nope"}, "no such model"),
        ({"model": "other"}, "lists of models"),
        ({"model": "large"}, "no quota"),
        ({"groups": ()}, "no quota"),
    ],
)
async def test_what_is_refused_without_a_quota_says_why(rows, snapshot, asked, words):
    found = await explained(rows, snapshot, **asked)
    assert (found.admitted, words in found.reason, found.quotas, found.refused_by) == (False, True, (), ())
