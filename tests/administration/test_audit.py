"""The audit log and the replicas, on both engines."""

from functools import partial

import pytest
import sqlalchemy as sa

from proxy.administration.audit import AuditFilter, audit, delete_old_audit
from proxy.administration.change import Author, Changes
from proxy.administration.pages import Paging
from proxy.administration.replicas import ReplicaRecord, replicas
from proxy.administration.upkeep import delete_old
from proxy.ledger.schema import owners
from proxy.ledger.schema import replicas as replicas_table
from proxy.policy.policy import Keep
from tests.builders import HOUR, NOON


@pytest.fixture
async def filled(rows, changes):
    """One change in each hour from noon on."""
    for number, (actor, action, target) in enumerate(
        [
            ("admin:ops", "quota.set", "staff/6h"),
            ("cli:ann", "user.add", "database:bob"),
            ("admin:ops", "group.set", "staff"),
            ("admin:ops", "quota.set", "staff2/day"),
        ]
    ):
        author = Author(actor, "192.0.2.1", f"req_{number}")
        made = Changes(changes.database, author, partial(int, NOON + number * HOUR))
        async with made.begin(action, target) as change:
            change.note(None if number % 2 else {"n": number - 1}, {"n": number})
    return rows


async def listed(rows, asked=AuditFilter(), paging=Paging()):  # noqa: B008
    async with rows.store.transaction() as connection:
        return await audit(connection, asked, paging)


async def test_the_audit_log_says_who_did_what_when_and_from_where(filled):
    """The newest first, with the members that differ."""
    page = await listed(filled)
    assert [(each.at - NOON) // HOUR for each in page.data] == [3, 2, 1, 0]
    group_set, user_add = page.data[1:3]
    assert (group_set.actor, group_set.action, group_set.target) == ("admin:ops", "group.set", "staff")
    assert (group_set.before, group_set.after) == ({"n": 1}, {"n": 2})
    assert (user_add.before, user_add.address, user_add.request_id) == (None, "192.0.2.1", "req_1")
    assert user_add.id == f"aud_{3:016x}"


@pytest.mark.parametrize(
    ("asked", "hours"),
    [
        (AuditFilter(since=NOON + HOUR), [3, 2, 1]),
        (AuditFilter(until=NOON + HOUR), [0]),
        (AuditFilter(actor="cli:ann"), [1]),
        (AuditFilter(target="staff"), [2]),
        (AuditFilter(action="quota.set"), [3, 0]),
        (AuditFilter(groups=["staff"]), [2, 0]),
        (AuditFilter(groups=[]), []),
    ],
)
async def test_the_audit_log_is_filtered(filled, asked, hours):
    assert [(each.at - NOON) // HOUR for each in (await listed(filled, asked)).data] == hours


async def test_pages_have_every_change_once(filled):
    found, paging = [], Paging(limit=3)
    while True:
        page = await listed(filled, paging=paging)
        found += [(each.at - NOON) // HOUR for each in page.data]
        if page.next is None:
            break
        paging = Paging(page.next, limit=3)
    assert found == [3, 2, 1, 0]


async def test_old_changes_are_deleted_in_steps(filled, monkeypatch):
    """Those at the instant stay."""
    monkeypatch.setattr("proxy.administration.audit._DELETED_AT_ONCE", 1)
    await delete_old_audit(filled.store, before=NOON + 2 * HOUR)
    assert [(each.at - NOON) // HOUR for each in (await listed(filled)).data] == [3, 2]
    await delete_old_audit(filled.store, before=NOON + 2 * HOUR)
    assert len((await listed(filled)).data) == 2


@pytest.mark.parametrize(("audit_ms", "hours"), [(HOUR, [3, 2]), (None, [3, 2, 1, 0])])
async def test_the_audit_log_is_kept_as_long_as_the_policy_says(filled, audit_ms, hours):
    """None: for ever."""
    await delete_old(filled.store, Keep(audit_ms=audit_ms), now=NOON + 3 * HOUR)
    assert [(each.at - NOON) // HOUR for each in (await listed(filled)).data] == hours


async def test_replicas_are_those_that_have_written_their_status_lately(rows):
    """With the lease of each. One that has died is shown for 30 s."""
    statuses = [("a", 29_999, '{"policy": "1f"}'), ("b", 30_000, "{}"), ("c", 0, "{}")]
    await rows.insert(
        replicas_table,
        [{"owner": owner, "at": NOON - age, "status": text, "watching_until": 0} for owner, age, text in statuses],
    )
    await rows.insert(owners, [{"id": "a", "alive_until": NOON + 5}])
    async with rows.store.transaction() as connection:
        assert await replicas(connection, NOON) == (
            ReplicaRecord("a", NOON - 29_999, NOON + 5, {"policy": "1f"}),
            ReplicaRecord("c", NOON, None, {}),
        )
        assert (await connection.execute(sa.select(sa.func.count()).select_from(replicas_table))).scalar_one() == 3


@pytest.mark.parametrize(
    ("action", "target"),
    [
        ("quotas.set_for_model", "staff/fast"),
        ("quotas.set_for_model", "staff"),
        ("call.end", "staff"),
        ("key.set", "staff"),
    ],
)
async def test_a_manager_sees_no_change_of_what_is_only_called_like_the_group(changes, rows, action, target):
    async with changes.begin(action, target) as change:
        change.note(None, {"lab/daily": 5})
    assert (await listed(rows, AuditFilter(groups=["staff"]))).data == ()
