"""What may be in force at an instant, by the changes before it."""

from typing import Any

import pytest

from proxy.torture.changes import (
    CHANGING,
    Administration,
    ChangeRecord,
    CutKey,
    Effect,
    EndCall,
    EndGrant,
    GiveGrant,
    ResetCounters,
    SetLimit,
    SetUser,
    Timeline,
)

LOST: dict[str, Any] = {"status": None}
FAR = 100_000


def change(effect: Effect, sent_at: int, ended_at: int, **more: Any) -> ChangeRecord:
    """A change that was made between these instants."""
    return ChangeRecord("any", effect, sent_at, ended_at, **{"status": 200, **more})


def timeline(*changes: ChangeRecord, outages: tuple[tuple[int, int], ...] = ()) -> Timeline:
    """What may be in force by these changes."""
    return Timeline(Administration(changes, (), outages))


def limits(timeline: Timeline, at: int, user: str = "ann") -> set[int | None]:
    """The limits of the quota that may be in force at an instant."""
    return timeline.limits(CHANGING, user, at, at)


FIRST = change(SetLimit(CHANGING, 500), 1000, 1100)


@pytest.mark.parametrize(
    ("at", "possible"),
    [
        pytest.param(999, {None}, id="before the request"),
        pytest.param(1000, {None, 500}, id="at the request"),
        pytest.param(3100, {None, 500}, id="2 s after the answer"),
        pytest.param(3101, {500}, id="after that"),
        pytest.param(9999, {500}, id="before the next request"),
        pytest.param(10_000, {500, 200}, id="at the next request"),
        pytest.param(12_101, {200}, id="2 s after the next answer"),
    ],
)
def test_in_between_either_limit_may_be_in_force(at: int, possible: set[int | None]) -> None:
    """From the request until 2 s after its answer."""
    assert limits(timeline(FIRST, change(SetLimit(CHANGING, 200), 10_000, 10_100)), at) == possible


def test_an_interval_has_all_limits_of_its_instants() -> None:
    """A call whose answer took long may have been refused by an earlier limit."""
    changed = timeline(FIRST, change(SetLimit(CHANGING, 200), 10_000, 10_100))
    assert changed.limits(CHANGING, "ann", 9000, 20_000) == {500, 200}


def test_a_change_without_an_answer_may_be_made_until_the_next_one() -> None:
    """One that was refused is not made."""
    changed = timeline(
        FIRST,
        change(SetLimit(CHANGING, 200), 10_000, 10_100, **LOST),
        change(SetLimit(CHANGING, 300), 20_000, 20_100, status=503),
        change(SetLimit(CHANGING, 400), 30_000, 30_100, status=422),
        change(SetLimit(CHANGING, None), 40_000, 40_100),
    )
    assert limits(changed, 15_000) == {500, 200}
    assert limits(changed, 35_000) == {500, 200, 300}
    assert limits(changed, 43_000) == {None}


def test_a_replica_that_is_paused_hears_of_a_change_after_it() -> None:
    """The 2 s begin at the end of the pause, also if another outage follows at once."""
    changed = timeline(FIRST, outages=((1500, 5000), (6000, 9000), (20_000, 21_000)))
    assert limits(changed, 11_000) == {None, 500}
    assert limits(changed, 11_001) == {500}


GRANT = GiveGrant(CHANGING, "ann", 50, until=20_000)
GIVEN = change(GRANT, 10_000, 10_100, status=201)


def test_a_grant_adds_its_amount_until_its_instant() -> None:
    """For its user only; it ends by the clock, and everywhere at once."""
    changed = timeline(FIRST, GIVEN)
    assert [limits(changed, at) for at in (9999, 10_000, 12_100, 19_999, 20_000)] == [
        {500},
        {500, 550},
        {550},
        {550},
        {500},
    ]
    assert limits(changed, 15_000, "bob") == {500}


def test_grants_add_up() -> None:
    """One for all members beside that of a user; one whose answer was lost may count or not."""
    to_all, lost = GiveGrant(CHANGING, None, 7, FAR), GiveGrant(CHANGING, None, 1000, FAR)
    changed = timeline(FIRST, GIVEN, change(to_all, 11_000, 11_100, status=201), change(lost, 11_000, 11_100, **LOST))
    assert limits(changed, 15_000) == {557, 1557}
    assert limits(changed, 15_000, "bob") == {507, 1507}


@pytest.mark.parametrize(
    ("status", "later"), [pytest.param(200, {500}, id="answered"), pytest.param(None, {500, 550}, id="lost")]
)
def test_a_grant_that_is_ended(status: int | None, later: set[int]) -> None:
    """It may count until 2 s after the answer."""
    changed = timeline(FIRST, GIVEN, change(EndGrant(GRANT), 14_000, 14_100, status=status))
    assert limits(changed, 13_999) == {550}
    assert limits(changed, 16_100) == {500, 550}
    assert limits(changed, 16_101) == later


def test_a_user_who_is_disabled_and_enabled() -> None:
    """In between its calls are refused; and they are cut if that was asked for."""
    off, on = SetUser("ann", is_enabled=False, cut=True), SetUser("ann", is_enabled=True)
    changed = timeline(change(off, 1000, 1100), change(on, 9000, 9100))
    enabled = [changed.may_be_enabled("ann", at, at) for at in (999, 3100, 3101, 8999, 9000)]
    assert enabled == [True, True, False, False, True]
    refused = [changed.may_be_refused("ann", at, at) for at in (999, 1000, 11_100, 11_101)]
    assert refused == [False, True, True, False]
    assert changed.may_be_cut("ann", None, 0, 1000)
    assert not changed.may_be_cut("ann", None, 3101, 4000)
    assert changed.may_be_enabled("bob", 5000, 5000)


def test_a_key_and_a_call_that_are_cut() -> None:
    """The key's user is refused while the cut may come into force; of calls only the one that was ended is cut."""
    changed = timeline(change(CutKey("ann"), 1000, 1100), change(EndCall("req_1"), 1000, 1100))
    assert [changed.may_be_refused("ann", at, at) for at in (999, 1000, 3100, 3101)] == [False, True, True, False]
    assert changed.may_be_cut("ann", None, 0, 1500)
    assert changed.may_be_cut("bob", "req_1", 0, 1500)
    assert not changed.may_be_cut("bob", "req_2", 0, 1500)
    assert not changed.may_be_cut("bob", None, 0, 1500)


def test_a_reset_changes_no_limit() -> None:
    """It is judged by what was used."""
    assert limits(timeline(FIRST, change(ResetCounters(CHANGING, None, 5), 5000, 5100)), 9000) == {500}
