"""Verdicts by tables: a run in which all went well, and what becomes of it when one thing did not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from proxy.torture.answers import Refusal
from proxy.torture.evidence import Books, Evidence, Given, Level, Levels, Line, Row, Seen
from proxy.torture.report import Report
from proxy.torture.verdict import judge, judge_from_outside, shares

POT = ("user:u", "g/q")
LIMIT = 1000


def line(taken: int, made: int, *, opened_at: int = 0) -> Line:
    """A line on the one counter there is."""
    return Line(POT, opened_at, (taken, made, 1))


def row(mark: str, taken: int, made: int, **more: Any) -> Row:
    """A call that ended, and was charged this much."""
    whole = {"state": "settled", "outcome": "complete", "lines": (line(500, 500),), **more}
    return Row(f"req-{mark}", mark, charge=(taken, made, 1), **whole)


def level(used: Levels = (110, 60, 2), held: Levels = (0, 0, 0)) -> Level:
    """The counter."""
    return Level((*POT, 0), used, held)


def seen(mark: str, **more: Any) -> Seen:
    """A call that its client saw complete."""
    whole = {"end": "complete", "status": 200, "id": f"req-{mark}", "words": 40, **more}
    return Seen(mark, 0, 50, **whole)


def refused(free: int | None = 10, **more: Any) -> Seen:
    """A call that needs 50 tokens and was refused for want of them."""
    refusal = Refusal(free=free, window=7, resets_at=12)
    return Seen("r", 0, 50, **{"end": "refused", "status": 429, "refusal": refusal, "answered_s": 0.002, **more})


def evidence(**more: Any) -> Evidence:
    """Two calls, one that its client saw to its end and one that it left, and a refusal; all is as it should be."""
    left = replace(row("b", 60, 20), outcome="client_left")
    books = Books([row("a", 50, 40), left], [level()])
    good = {
        "seen": [seen("a", usage=(50, 40)), seen("b", end="hung_up", words=15), refused()],
        "given": [Given("a", 50, 40, (50, 40)), Given("b", 50, 18, None)],
        "books": books,
        "at_rest": books,
        **more,
    }
    return Evidence(limit=LIMIT, **good)


def with_rows(*rows: Row, used: Levels | None = None, held: Levels = (0, 0, 0), **more: Any) -> Evidence:
    """The same with other rows, on a counter that is their sum unless it is said."""
    ended = [each.charge for each in rows if each.state != "open"]
    total = used or (sum(c[0] for c in ended), sum(c[1] for c in ended), sum(c[2] for c in ended))
    return evidence(books=Books(rows, [level(total, held)]), **more)


def test_a_run_in_which_all_went_well() -> None:
    """Every promise is kept, and the figures say how much there was."""
    report = judge(evidence())
    assert report.broken == []
    assert report["calls"].value == 3
    assert "1 complete, 1 hung up, 1 refused" in report["calls"].note
    assert report["tokens given"].value == 158
    assert "18 of them for answers that were cut" in report["tokens given"].note
    assert (report["refusals"].value, report["false refusals"].value) == (1, 0)
    assert report["made in vain"].value == 0
    assert report["overshoot"].note == "tokens beyond 1,000; windows: 1, in the fullest 170"
    assert report["refusal p99"].value == 2.0


A, B = row("a", 50, 40), replace(row("b", 60, 20), outcome="client_left")

BROKEN: dict[str, tuple[Evidence, list[str]]] = {
    "nobody got an answer": (evidence(seen=[refused()]), ["calls"]),
    "the charges of a window are over its limit": (with_rows(A, replace(B, charge=(900, 70, 1))), ["overshoot"]),
    "the upstream gave more than the limit, and charged and told was less": (
        with_rows(A, B, given=[Given("a", 50, 990, (50, 990)), Given("b", 50, 18, None)]),
        ["overshoot given"],
    ),
    "a complete answer has no row": (with_rows(B), ["lost"]),
    "a complete answer stands under another id": (with_rows(replace(A, id="other"), B), ["lost"]),
    "a complete answer is charged less than its client was told": (with_rows(row("a", 50, 39), B), ["lost"]),
    "a complete answer was given back": (with_rows(row("a", 0, 0, state="released"), B), ["lost"]),
    "a stream without usage is charged less than the upstream told the proxy": (
        with_rows(row("a", 49, 40), B, seen=[seen("a"), refused()]),
        ["lost"],
    ),
    "an answer that nobody counted is charged less than its client saw": (
        with_rows(row("a", 50, 39), B, seen=[seen("a"), refused()], given=[Given("a", 50, 40, None)]),
        ["lost"],
    ),
    "an answer that its client left is charged less than it saw": (
        with_rows(A, replace(B, charge=(60, 14, 1))),
        ["lost in part"],
    ),
    "an answer that its client left is charged no input": (
        with_rows(A, replace(B, charge=(0, 20, 1))),
        ["lost in part"],
    ),
    "a call that was lost with the proxy was forgotten": (
        with_rows(A, seen=[seen("a"), seen("b", end="broken", disturbed=True)]),
        ["lost in part"],
    ),
    "an answer is charged more than its client was told": (with_rows(row("a", 50, 41), B), ["overcharged"]),
    "an answer that was ended at the limit is charged less than its client saw": (
        with_rows(row("a", 50, 39, outcome="at_limit"), B, seen=[seen("a")]),
        ["lost"],
    ),
    "or more than its client was told": (
        with_rows(row("a", 50, 41, outcome="at_limit"), B, seen=[seen("a", usage=(50, 40))]),
        ["overcharged"],
    ),
    "an answer is charged twice": (with_rows(A, replace(A, id="again"), B), ["overcharged"]),
    "an answer that was left is charged as whole, and too much": (
        with_rows(A, row("b", 60, 20), given=[Given("a", 50, 40, (50, 40)), Given("b", 50, 18, (50, 18))]),
        ["overcharged"],
    ),
    "a call is in flight though all is quiet": (
        evidence(at_rest=Books([replace(A, state="open")], [level()])),
        ["leaked"],
    ),
    "tokens are held though all is quiet": (evidence(at_rest=Books([A, B], [level(held=(0, 7, 0))])), ["leaked"]),
    "a call is in flight after the stop": (
        with_rows(A, B, row("c", 0, 0, state="open"), held=(500, 500, 1)),
        ["leaked"],
    ),
    "a counter has used less than its calls": (with_rows(A, B, used=(110, 59, 2)), ["unbalanced"]),
    "a counter has a request too many": (with_rows(A, B, used=(110, 60, 3)), ["unbalanced"]),
    "an answer broke off for no reason": (
        evidence(seen=[seen("a"), seen("b", end="broken", words=15)]),
        ["broken off"],
    ),
    "the proxy made a mistake": (evidence(seen=[seen("a"), seen("x", end="failed", status=500)]), ["broken off"]),
    "nobody was there": (evidence(seen=[seen("a"), seen("x", end="unreached", status=None)]), ["broken off"]),
    "the proxy fell over": (evidence(crashes=1), ["crashes"]),
    "a call was refused though there was room": (evidence(seen=[seen("a"), refused(free=50)]), ["false refusals"]),
    "one of a hundred was refused though there was room": (
        evidence(seen=[seen("a"), refused(free=50), *[refused()] * 99]),
        ["false refusals"],
    ),
    "a reset was not true": (
        evidence(seen=[seen("a"), refused(retries=Refusal(window=7, resets_at=12))]),
        ["false resets"],
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_each_promise_that_is_broken_is_named(what: str) -> None:
    """That one, and no other."""
    told, broken = BROKEN[what]
    assert judge(told).broken == broken


KEPT: dict[str, Evidence] = {
    "exactly at the limit": with_rows(A, replace(B, charge=(850, 60, 1))),
    "what was made after the proxy had hung up is nobody's to know": with_rows(
        A, B, given=[Given("a", 50, 40, (50, 40)), Given("b", 50, 5000, None)]
    ),
    "nor what it had made, and said, of an answer that the proxy ended at the limit": with_rows(
        row("a", 50, 40, outcome="at_limit"), B, given=[Given("a", 50, 5000, (50, 5000))], seen=[seen("a")]
    ),
    "which its client was told as it was charged": with_rows(
        row("a", 50, 40, outcome="at_limit"),
        B,
        given=[Given("a", 50, 5000, (50, 5000))],
        seen=[seen("a", usage=(50, 40))],
    ),
    "a call that was left may be charged by an estimate": with_rows(A, replace(B, charge=(90, 70, 1))),
    "one that was lost with the proxy is charged what it held": with_rows(
        A,
        replace(B, state="expired", outcome="lost", charge=(400, 400, 1)),
        seen=[seen("a"), seen("b", end="complete", usage=(50, 18))],
        kills=1,
    ),
    "or how far it had got a while before": with_rows(
        A,
        replace(B, state="expired", outcome="lost", charge=(60, 0, 1)),
        seen=[seen("a"), seen("b", end="broken", disturbed=True)],
    ),
    "who left before the first word need not be on the books": with_rows(
        A, seen=[seen("a"), Seen("b", 0, 50, "hung_up")]
    ),
    "what broke in a kill is no fault": evidence(
        seen=[seen("a"), *(Seen("x", 0, 50, end, disturbed=True) for end in ("broken", "failed", "unreached"))]
    ),
    "one false refusal in a hundred and one": evidence(seen=[seen("a"), refused(free=50), *[refused()] * 100]),
    "a refusal that does not say what is free": evidence(seen=[seen("a"), refused(free=None)]),
    "the next window was used up as well": evidence(
        seen=[seen("a"), refused(retries=Refusal(window=2, resets_at=7))]
    ),
    "after the reset it was held up by calls in flight": evidence(
        seen=[
            seen("a"),
            *[refused()] * 100,
            refused(refusal=Refusal(50, 7, 9), retries=Refusal(window=7)),
        ]
    ),
    "after the reset no window is open": evidence(
        seen=[seen("a"), refused(refusal=Refusal(10, None, 12), retries=Refusal(resets_at=12))]
    ),
    "after the reset it was let in": evidence(
        seen=[seen("a"), seen("b", end="hung_up", words=9, retries=Refusal(window=7))]
    ),
    "windows are judged one by one": with_rows(
        row("a", 500, 400, lines=(line(500, 500, opened_at=1),)),
        row("b", 500, 400, lines=(line(500, 500, opened_at=2),)),
        used=(0, 0, 0),
        seen=[seen("a"), refused()],
        given=[Given("a", 500, 400, (500, 400)), Given("b", 500, 400, (500, 400))],
    ),
}


@pytest.mark.parametrize("what", KEPT)
def test_what_breaks_no_promise(what: str) -> None:
    """Each of these is as the README says it."""
    assert judge(KEPT[what]).broken == []


def test_what_befell_the_proxy_is_shown() -> None:
    """As far as anything did."""
    befell = ("kills", "pauses", "restarts")
    assert not any(figure.name in befell for figure in judge(evidence()).figures)
    told = judge(evidence(kills=3, pauses=2, restarts=1))
    assert [told[name].value for name in befell] == [3, 2, 1]


def test_what_was_made_ahead_of_a_cut_is_shown() -> None:
    """Nobody is charged for it, and no promise hangs on it, but somebody pays for it."""
    told = judge(evidence(given=[Given("a", 50, 40, (50, 40)), Given("b", 50, 70, None)]))
    assert (told["made in vain"].value, told["made in vain"].is_kept) == (50, None)


@pytest.mark.parametrize(
    ("amounts", "charge", "shared"),
    [
        ([(100, 50)], (30, 20), [(30, 20, 1)]),
        ([(100, 50)], (130, 70), [(130, 70, 1)]),  # by itself it takes all, also what is beyond its hold
        ([(100, 50), (0, 30)], (100, 60), [(100, 50, 1), (0, 10, 0)]),
        ([(100, 50), (0, 30)], (90, 40), [(90, 40, 1), (0, 0, 0)]),
        ([(100, 50), (0, 30)], (120, 90), [(100, 50, 1), (20, 40, 0)]),
        ([(100, 50), (0, 30), (0, 30)], (100, 105), [(100, 50, 1), (0, 30, 0), (0, 25, 0)]),
    ],
)
def test_a_call_over_a_windows_end_is_charged_to_its_lines_in_order(
    amounts: list[tuple[int, int]], charge: tuple[int, int], shared: list[Levels]
) -> None:
    """Each but the last takes at most its own amount; the request counts once, where the call began."""
    lines = [line(*amount, opened_at=place) for place, amount in enumerate(amounts)]
    told = list(shares(lines, (*charge, 1)))
    assert [window[2] for window, _ in told] == list(range(len(lines)))
    assert [share for _, share in told] == shared


def test_each_counter_is_charged_the_whole_call() -> None:
    """A user's own quota and the pot beside it: lines of different counters don't share."""
    own, pot = line(10, 5), replace(line(10, 5), counter=("~g", "g/pot"))
    assert [share for _, share in shares([own, pot], (10, 5, 1))] == [(10, 5, 1), (10, 5, 1)]


# ------------------------------------------------------------------------------------------------------ from outside


def outside(counted: int | None = None, *, windows: int = 1, pots: int = 1, **more: Any) -> Report:
    """Judge the same run without its books."""
    return judge_from_outside(evidence(**more), windows=windows, pots=pots, counted=counted)


def test_from_outside_all_may_be_well_too() -> None:
    """By the upstream's count, and by a counter that says all that was given."""
    assert outside().broken == []
    assert outside(158).broken == []
    assert outside(90).broken == []  # an answer that was left may be charged as one likes


def _given(*made: int) -> list[Given]:
    return [Given("a", 0, made[0], (0, made[0])), *(Given("b", 0, more, None) for more in made[1:])]


OUTSIDE: dict[str, tuple[Callable[[], Report], list[str]]] = {
    "more was given than the limit": (lambda: outside(given=_given(600, 401)), ["overshoot given"]),
    "just the limit was given": (lambda: outside(given=_given(600, 400)), []),
    "two windows allow as much again": (lambda: outside(given=_given(600, 600), windows=2), []),
    "the counter has lost an answer": (lambda: outside(89), ["lost"]),
    "an answer comes from elsewhere": (lambda: outside(seen=[seen("a"), seen("z")]), ["strange answers"]),
    "nothing came at all": (lambda: outside(seen=[], given=[]), ["calls"]),
    "others who use the same upstream don't count": (
        lambda: outside(given=[*_given(600), Given("?", 900, 0, None)]),
        [],
    ),
    "a call was refused though there was room": (
        lambda: outside(seen=[seen("a"), refused(free=50)]),
        ["false refusals"],
    ),
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_what_can_be_seen_from_outside(what: str) -> None:
    """The upstream's own count is a witness that no proxy can bribe."""
    report, broken = OUTSIDE[what]
    assert report().broken == broken


def test_each_user_has_a_pot_of_their_own() -> None:
    """What one leaves is not the other's to take."""
    both = [seen("a"), replace(seen("b", end="hung_up"), user=1)]
    assert outside(seen=both, given=_given(600, 600), pots=2).broken == []
    assert outside(seen=both, given=_given(1100, 100), pots=2).broken == ["overshoot given"]
