"""The calls in flight, and the end of one, on both engines."""

import pytest

from proxy.administration.change import NotFound
from proxy.administration.in_flight import CallFilter, calls_in_flight, delete_ended_cuts, end_call
from proxy.administration.pages import Paging
from proxy.identity.directory import Cuts
from proxy.ledger.book import Release
from tests.builders import NOON


@pytest.fixture
async def filled(rows):
    """Three calls in flight and one that has ended."""
    await rows.call("req_2", "bob", through="lab", model="large")
    await rows.call("req_1", "ann", key_id="k1", address="192.0.2.7")
    await rows.call("req_3", "ann", through="lab+staff")
    await rows.call("req_0", "ann", state="settled")
    return rows


async def listed(rows, asked=CallFilter(), paging=Paging()):  # noqa: B008
    async with rows.store.transaction() as connection:
        return await calls_in_flight(connection, asked, paging)


async def test_calls_in_flight_say_who_calls_what_from_where(filled):
    """The oldest first."""
    first, second, third = (await listed(filled)).data
    assert (first.id, first.user, first.key_id, first.model, first.address) == (
        "req_1",
        "ann",
        "k1",
        "small",
        "192.0.2.7",
    )
    assert (first.endpoint, first.upstream, first.group, first.replica) == ("chat", "openai", "staff", "process-1")
    assert (first.held_input, first.held_output, first.began_at) == (100, 400, NOON)
    assert (second.id, second.key_id, second.address, third.id) == ("req_2", None, None, "req_3")


@pytest.mark.parametrize(
    ("asked", "ids"),
    [
        (CallFilter(user="ann"), "13"),
        (CallFilter(group="lab"), "23"),
        (CallFilter(model="large"), "2"),
        (CallFilter(groups=["staff"]), "13"),
        (CallFilter(groups=[]), ""),
        (CallFilter(group="lab", groups=["staff"]), "3"),
    ],
)
async def test_calls_in_flight_are_filtered(filled, asked, ids):
    """A call that several groups have admitted together is of each of them."""
    assert [each.id for each in (await listed(filled, asked)).data] == [f"req_{id}" for id in ids]


async def test_pages_have_every_call_once(filled):
    first = await listed(filled, paging=Paging(limit=2))
    second = await listed(filled, paging=Paging(first.next, limit=2))
    assert [each.id for each in (*first.data, *second.data)] == ["req_1", "req_2", "req_3"]
    assert second.next is None


async def test_a_call_is_ended_by_the_process_that_runs_it(filled, changes):
    """It is told by the next poll of the directory, which sees the version of the change. Twice is no error."""
    for _ in range(2):
        before = await changes.database.version()
        async with changes.begin("call.end", "req_1") as change:
            assert (await end_call(change, "req_1", groups=["staff"], now=lambda: NOON)).user == "ann"
        assert await changes.database.cuts_since(before) == Cuts(call_ids=frozenset({"req_1"}))
    assert not await changes.database.cuts_since(before + 1)


@pytest.mark.parametrize(("id", "groups"), [("req_0", None), ("req_9", None), ("req_2", ["staff"])])
async def test_a_call_that_is_not_in_flight_cannot_be_ended(filled, changes, id, groups):
    """Nor one of another group."""
    with pytest.raises(NotFound):
        async with changes.begin("call.end", id) as change:
            await end_call(change, id, groups=groups, now=lambda: NOON)
    assert not await changes.database.cuts_since(0)


async def test_the_wish_to_end_a_call_is_deleted_when_it_has_ended(filled, changes):
    """Those of calls that run stay."""
    for id in ("req_1", "req_2"):
        async with changes.begin("call.end", id) as change:
            await end_call(change, id, now=lambda: NOON)
    await filled.store.apply([Release("req_1")], NOON)
    await delete_ended_cuts(filled.store)
    assert (await changes.database.cuts_since(0)).call_ids == {"req_2"}
