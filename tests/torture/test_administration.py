"""Tables of verdicts on an administrator's run: one in which every promise is kept, and one change to it each."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from proxy.torture.administration import judge_administration
from proxy.torture.answers import Refusal
from proxy.torture.changes import (
    CHANGING,
    POT,
    Administration,
    AuditRow,
    ChangeRecord,
    Effect,
    EndCall,
    ResetCounters,
    SetLimit,
    SetUser,
)
from proxy.torture.evidence import CallRow, ClientRecord, CounterRow, Evidence, HeldAmount, Snapshot
from proxy.torture.report import Report

ANN = ("user:ann", CHANGING)


def change(action: str, effect: Effect | None, sent_at: int, **more: Any) -> ChangeRecord:
    """A change that was answered after 100 ms."""
    fields = {"status": 200, "request_id": f"req-{sent_at}", **more}
    return ChangeRecord(action, effect, sent_at, sent_at + 100, **fields)


def row(tag: str, reserved_at: int, ended_at: int | None, tokens: int, **more: Any) -> CallRow:
    """A call of ann that held 100 + 900 tokens and was charged so much input."""
    fields: dict[str, Any] = {
        "state": "open" if ended_at is None else "settled",
        "held": (HeldAmount(ANN, 0, (100, 900, 1)),),
        "user": "ann",
        **more,
    }
    charge = (0, 0, 0) if ended_at is None else (tokens, 0, 1)
    return CallRow(
        f"req-{tag}", tag, outcome="complete", charge=charge, reserved_at=reserved_at, ended_at=ended_at, **fields
    )


# A limit of 2,000 at 1 s, a reset at 20 s, a limit of 1,500 at 30 s.
CHANGES = (
    change("quota.set", SetLimit(CHANGING, 2000), 1000),
    change("counters.reset", ResetCounters(CHANGING, "ann", used=1800), 20_000),
    change("quota.set", SetLimit(CHANGING, 1500), 30_000),
)
ROWS = (
    row("call-1-0", 5000, 6000, 900),
    row("call-2-0", 7000, 8000, 900),
    row("call-3-0", 25_000, 26_000, 400),
    row("call-4-0", 40_000, 41_000, 600),
)
COUNTER = CounterRow((*ANN, 0), (1000, 0, 2), (0, 0, 0), reset_at=20_050)


def judged(
    *,
    changes: Sequence[ChangeRecord] = CHANGES,
    rows: Sequence[CallRow] = ROWS,
    counter: CounterRow = COUNTER,
    audit: Sequence[AuditRow] | None = None,
    clients: Sequence[ClientRecord] = (),
    outages: Sequence[tuple[int, int]] = (),
) -> Report:
    """The verdict on this run."""
    if audit is None:
        audit = [AuditRow(each.action, each.request_id, each.sent_at + 50) for each in changes if each.is_made]
    stopped = Snapshot(rows, [counter])
    return Report(
        tuple(
            judge_administration(
                Evidence(
                    1, clients, (), stopped, users=["ann"], administration=Administration(changes, audit, outages)
                )
            )
        )
    )


def with_row(tag: str, *arguments: Any, **more: Any) -> dict[str, Any]:
    """The rows with one more, which is in the counter's sum too if it ended after the reset."""
    added = row(tag, *arguments, **more)
    charged = added.charge if (added.ended_at or 0) > 20_050 and added.held else (0, 0, 0)
    used = tuple(map(sum, zip(COUNTER.used, charged, strict=True)))
    return {"rows": [*ROWS, added], "counter": replace(COUNTER, used=used)}


def test_a_run_without_an_administrator_has_no_such_promises() -> None:
    """Its report is as before."""
    assert judge_administration(Evidence(1, (), ())) == []


def test_every_promise_is_kept() -> None:
    """The figures say of how many."""
    report = judged()
    assert report.broken == []
    assert report["changes"].note == "2 quota.set, 1 counters.reset; 0 without an answer"


def test_a_run_in_which_nothing_was_changed_shows_nothing() -> None:
    """So it is no success."""
    assert judged(changes=(), rows=(), counter=replace(COUNTER, used=(0, 0, 0))).broken == ["changes"]


@pytest.mark.parametrize(
    ("added", "is_beyond"),
    [
        pytest.param(with_row("call-5-0", 28_000, 28_500, 50), False, id="room for it"),
        pytest.param(with_row("call-5-0", 42_000, 43_000, 50), True, id="1,000 used, 1,000 needed, of 1,500"),
        pytest.param(with_row("call-5-0", 40_500, 43_000, 50), True, id="400 used, 1,000 held, 1,000 needed"),
        pytest.param(with_row("call-5-0", 40_000, 43_000, 50), False, id="of two in one ms either was the first"),
        pytest.param(with_row("call-5-0", 32_100, 32_200, 50), False, id="2 s after the answer"),
        pytest.param(with_row("call-5-0", 42_000, 43_000, 50, maximum=400), False, id="more was held than at first"),
        pytest.param(with_row("call-5-0", 42_000, 43_000, 50, maximum=401), True, id="1 more than there is room for"),
        pytest.param(with_row("call-5-0", 42_000, 43_000, 50, held=()), True, id="not counted by the quota"),
        pytest.param(with_row("call-5-8", 42_000, 43_000, 50, held=()), False, id="no call of this quota"),
    ],
)
def test_a_call_that_the_limit_has_no_room_for(added: dict[str, Any], is_beyond: bool) -> None:
    """What was used and held, and what the call needs at the least, is more than any limit that may be in force."""
    assert judged(**added).broken == (["admitted beyond"] if is_beyond else [])


def test_a_limit_that_was_lowered_counts_from_then_on() -> None:
    """1,300 used: a call of 1,000 fits into 2,500, and 2 s after the answer not into 1,500 any more."""
    changes = (replace(CHANGES[0], effect=SetLimit(CHANGING, 2500)), *CHANGES[1:])
    rows = (*ROWS[:2], row("call-3-0", 25_000, 26_000, 1300))
    counter = replace(COUNTER, used=(1320, 0, 2))
    for at, broken in ((32_100, []), (32_101, ["admitted beyond"])):
        more = row("call-4-0", at, at + 10, 20)
        assert judged(changes=changes, rows=(*rows, more), counter=counter).broken == broken


def test_a_reset_frees_what_was_used_and_not_what_is_held() -> None:
    """Without it the third call had no room. A call in flight at the reset still counts."""
    without = judged(changes=(CHANGES[0], CHANGES[2]), counter=replace(COUNTER, used=(2800, 0, 4), reset_at=0))
    assert without.broken == ["admitted beyond"]
    in_flight = row("call-5-0", 19_000, 27_000, 10, held=(HeldAmount(ANN, 0, (1500, 0, 1)),))
    report = judged(rows=[*ROWS, in_flight], counter=replace(COUNTER, used=(1010, 0, 3)))
    assert report["admitted beyond"].value == 2  # the third, and the one in flight itself


@pytest.mark.parametrize(
    ("refusal", "broken"),
    [
        ((CHANGING, 1500), []),
        ((CHANGING, 2000), ["wrong limits"]),
        (("clients/tokens", 7), []),
    ],
)
def test_a_refusal_that_states_a_limit(refusal: tuple[str, int], broken: list[str]) -> None:
    """It has to be one that may be in force between the call and its answer."""
    record = ClientRecord("r", 0, 50, refusal=Refusal(limits=(refusal,)), began_at=33_000, ended_at=33_010)
    assert judged(clients=[record]).broken == broken


@pytest.mark.parametrize("used", [1799, 1801])
def test_a_reset_that_names_another_sum(used: int) -> None:
    """It is the sum of the charges since the reset before."""
    reset = replace(CHANGES[1], effect=ResetCounters(CHANGING, "ann", used=used))
    assert judged(changes=[CHANGES[0], reset, CHANGES[2]]).broken == ["wrong resets"]


def test_a_call_that_ends_during_a_reset_may_be_in_its_sum() -> None:
    """And in the counter's after it, but not in neither."""
    ending = row("call-5-0", 4500, 20_050, 10, held=(HeldAmount(ANN, 0, (10, 0, 1)),))
    rows = [*ROWS[:1], row("call-2-0", 7000, 8000, 890), *ROWS[2:], ending]
    assert judged(rows=rows).broken == []
    assert judged(rows=rows, counter=replace(COUNTER, used=(1010, 0, 3))).broken == []
    assert judged(rows=rows, counter=replace(COUNTER, used=(1011, 0, 3))).broken == ["unbalanced (changed)"]


@pytest.mark.parametrize("counter", [replace(COUNTER, used=(999, 0, 2)), replace(COUNTER, held=(1, 0, 0))])
def test_a_counter_that_is_not_the_sum_of_its_calls(counter: CounterRow) -> None:
    """Of those that ended after its reset."""
    assert judged(counter=counter).broken == ["unbalanced (changed)"]


def test_a_call_that_was_open_during_a_pause_may_have_been_charged_before() -> None:
    """It may have expired in the pause, and its charge of then may have been reset."""
    paused = row("call-5-0", 15_000, 31_000, 10, held=(HeldAmount(ANN, 0, (100, 0, 1)),))
    for used in ((1000, 0, 2), (1010, 0, 3), (1100, 0, 3)):
        report = judged(rows=[*ROWS, paused], counter=replace(COUNTER, used=used), outages=[(16_000, 29_000)])
        assert report.broken == []


def test_an_open_call_holds() -> None:
    """What it holds is in the counter."""
    rows = [*ROWS, row("call-5-0", 33_000, None, 0)]
    report = judged(rows=[*ROWS[:3], rows[-1]], counter=replace(COUNTER, used=(400, 0, 1), held=(100, 900, 1)))
    assert report.broken == []


def test_a_call_of_a_disabled_user() -> None:
    """Admitted more than 2 s after the answer."""
    off = change("user.disable", SetUser("ann", is_enabled=False), 37_000)
    assert judged(changes=[*CHANGES, off]).broken == ["disabled users"]
    late = change("user.disable", SetUser("ann", is_enabled=False), 39_000)
    assert judged(changes=[*CHANGES, late]).broken == []


@pytest.mark.parametrize(
    ("added", "is_wrong"),
    [
        ({"status": 500}, True),
        ({"status": 422}, True),
        ({"status": 404}, True),
        ({"status": 503}, False),
        ({"status": None, "request_id": None}, True),
        ({"status": None, "request_id": None, "disturbed": True}, False),
        ({"status": 404, "action": "call.end"}, False),
        ({"status": 404, "action": "GET /keys"}, False),
        ({"status": 500, "action": "GET /keys"}, True),
    ],
)
def test_an_answer_of_the_admin_api_that_is_wrong(added: dict[str, Any], is_wrong: bool) -> None:
    """503 says that the database is away, and a call may have ended before its end was asked for."""
    more = replace(change("key.create", None, 50_000), **added)
    assert judged(changes=[*CHANGES, more]).broken == (["admin failures"] if is_wrong else [])


def audited(*rows: AuditRow) -> list[AuditRow]:
    """The rows of the changes, and these."""
    return [*(AuditRow(each.action, each.request_id, each.sent_at) for each in CHANGES), *rows]


@pytest.mark.parametrize(
    "audit",
    [
        pytest.param(audited()[1:], id="a row is missing"),
        pytest.param(audited(audited()[0]), id="a row is there twice"),
        pytest.param(audited(AuditRow("quota.set", "req-other", 1050)), id="nobody asked for it"),
        pytest.param([replace(audited()[0], at=1), *audited()[1:]], id="at another time"),
        pytest.param([replace(audited()[0], action="quota.delete"), *audited()[1:]], id="another action"),
    ],
)
def test_an_audit_log_that_is_not_what_was_changed(audit: list[AuditRow]) -> None:
    """Each answered change has one row, and each row is of a change."""
    assert judged(audit=audit).broken == ["audit"]


@pytest.mark.parametrize("rows", [[], [AuditRow("call.end", "req-lost", 50_010)]])
def test_a_change_without_an_answer_may_have_a_row(rows: list[AuditRow]) -> None:
    """One, and none if it was refused."""
    lost = change("call.end", EndCall("req-1"), 50_000, status=None, request_id=None, disturbed=True)
    assert judged(changes=[*CHANGES, lost], audit=audited(*rows)).broken == []
    assert judged(changes=[*CHANGES, lost], audit=audited(*rows, *rows, AuditRow("x", None, 1))).broken == ["audit"]
    refused = replace(lost, status=404, request_id="req-lost")
    assert judged(changes=[*CHANGES, refused], audit=audited(*rows)).broken == (["audit"] if rows else [])


def test_a_reset_of_all_members_and_of_a_pot() -> None:
    """The pot's counter has no user in its name."""
    pot = ("~clients", POT)
    held = (HeldAmount(pot, 0, (100, 0, 1)),)
    changes = [
        change("quota.set", SetLimit(POT, 500), 1000),
        change("counters.reset", ResetCounters(POT, None, 70), 9000),
    ]
    rows = [row("call-1-4", 5000, 6000, 70, held=held), row("call-2-4", 15_000, 16_000, 400, held=held)]
    counter = CounterRow((*pot, 0), (400, 0, 1), (0, 0, 0), reset_at=9050)
    assert judged(changes=changes, rows=rows, counter=counter).broken == []
    late = row("call-3-4", 17_000, 18_000, 0, held=held)
    report = judged(changes=changes, rows=[*rows, late], counter=replace(counter, used=(400, 0, 2)))
    assert report.broken == []
    assert judged(changes=changes[:1], rows=rows, counter=replace(counter, used=(470, 0, 2), reset_at=0)).broken == []
