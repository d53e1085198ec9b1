"""Tables of verdicts: a run in which every promise is kept, and variants of it in which one thing differs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from proxy.torture.answers import Refusal
from proxy.torture.evidence import (
    Amounts,
    CallRow,
    ClientRecord,
    CounterRow,
    Evidence,
    HeldAmount,
    Snapshot,
    UpstreamRecord,
)
from proxy.torture.report import Report
from proxy.torture.verdict import charges_by_window, judge, judge_external

COUNTER = ("user:u", "g/q")
LIMIT = 1000


def held_amount(input_tokens: int, output_tokens: int, *, opened_at: int = 0) -> HeldAmount:
    """An amount held on the one counter there is."""
    return HeldAmount(COUNTER, opened_at, (input_tokens, output_tokens, 1))


def row(tag: str, input_tokens: int, output_tokens: int, **more: Any) -> CallRow:
    """A settled call that was charged this much."""
    fields = {"state": "settled", "outcome": "complete", "held": (held_amount(500, 500),), **more}
    return CallRow(f"req-{tag}", tag, charge=(input_tokens, output_tokens, 1), **fields)


def counter(used: Amounts = (110, 60, 2), held: Amounts = (0, 0, 0)) -> CounterRow:
    """The counter."""
    return CounterRow((*COUNTER, 0), used, held)


def client(tag: str, **more: Any) -> ClientRecord:
    """A call whose client received the complete answer."""
    fields = {"result": "complete", "status": 200, "request_id": f"req-{tag}", "words": 40, **more}
    return ClientRecord(tag, 0, 50, **fields)


def refused(free: int | None = 10, **more: Any) -> ClientRecord:
    """A call that needs 50 tokens and was refused when so many were free."""
    refusal = Refusal(free_tokens=free, window_opened_at=7, resets_at=12)
    fields = {"result": "refused", "status": 429, "refusal": refusal, "answered_s": 0.002, **more}
    return ClientRecord("r", 0, 50, **fields)


def evidence(**more: Any) -> Evidence:
    """A complete call, one whose client disconnected, and a refusal; every promise is kept."""
    disconnected = replace(row("b", 60, 20), outcome="client_left")
    snapshot = Snapshot([row("a", 50, 40), disconnected], [counter()])
    fields = {
        "clients": [client("a", usage=(50, 40)), client("b", result="disconnected", words=15), refused()],
        "upstream": [UpstreamRecord("a", 50, 40, (50, 40)), UpstreamRecord("b", 50, 18, None)],
        "stopped": snapshot,
        "idle": snapshot,
        **more,
    }
    return Evidence(limit=LIMIT, **fields)


def with_rows(*rows: CallRow, used: Amounts | None = None, held: Amounts = (0, 0, 0), **more: Any) -> Evidence:
    """The same with other rows; by default the counter is their sum."""
    ended = [each.charge for each in rows if each.state != "open"]
    total = used or (sum(c[0] for c in ended), sum(c[1] for c in ended), sum(c[2] for c in ended))
    return evidence(stopped=Snapshot(rows, [counter(total, held)]), **more)


def upstream(*records: tuple[str, int, int, tuple[int, int] | None]) -> list[UpstreamRecord]:
    """The upstream's records: tag, input tokens, output tokens, reported usage."""
    return [UpstreamRecord(*record) for record in records]


def test_a_run_in_which_every_promise_is_kept() -> None:
    """The figures count the calls and tokens."""
    report = judge(evidence())
    assert report.broken == []
    assert report["calls"].value == 3
    assert "1 complete, 1 disconnected, 1 refused" in report["calls"].note
    assert report["upstream tokens"].value == 158
    assert "18 of them in answers that were cut" in report["upstream tokens"].note
    assert (report["refusals"].value, report["false refusals"].value) == (1, 0)
    assert report["wasted tokens"].value == 0
    assert report["overshoot"].note == "tokens beyond 1,000; windows: 1, in the fullest 170"
    assert report["refusal p99"].value == 2.0


A, B = row("a", 50, 40), replace(row("b", 60, 20), outcome="client_left")

BROKEN: dict[str, tuple[Evidence, list[str]]] = {
    "no call was complete": (evidence(clients=[refused()]), ["calls"]),
    "the charges of a window exceed its limit": (with_rows(A, replace(B, charge=(900, 70, 1))), ["overshoot"]),
    "the upstream generated more than the limit, and less was charged and reported": (
        with_rows(A, B, upstream=upstream(("a", 50, 990, (50, 990)), ("b", 50, 18, None))),
        ["upstream overshoot"],
    ),
    "a complete answer has no row": (with_rows(B), ["lost"]),
    "a complete answer has another request id": (with_rows(replace(A, request_id="other"), B), ["lost"]),
    "a complete answer is charged less than its client's usage": (with_rows(row("a", 50, 39), B), ["lost"]),
    "a complete answer was released": (with_rows(row("a", 0, 0, state="released"), B), ["lost"]),
    "a stream without usage is charged less than the usage that the proxy received": (
        with_rows(row("a", 49, 40), B, clients=[client("a"), refused()]),
        ["lost"],
    ),
    "an answer without any usage is charged less than its client received": (
        with_rows(row("a", 50, 39), B, clients=[client("a"), refused()], upstream=upstream(("a", 50, 40, None))),
        ["lost"],
    ),
    "an answer whose client disconnected is charged less than it received": (
        with_rows(A, replace(B, charge=(60, 14, 1))),
        ["lost in part"],
    ),
    "an answer whose client disconnected is charged no input": (
        with_rows(A, replace(B, charge=(0, 20, 1))),
        ["lost in part"],
    ),
    "a call that was lost with the proxy has no row": (
        with_rows(A, clients=[client("a"), client("b", result="broken", disturbed=True)]),
        ["lost in part"],
    ),
    "an answer is charged more than its client's usage": (with_rows(row("a", 50, 41), B), ["overcharged"]),
    "an answer that was ended at the limit is charged less than its client received": (
        with_rows(row("a", 50, 39, outcome="at_limit"), B, clients=[client("a")]),
        ["lost"],
    ),
    "an answer that was ended at the limit is charged more than its client's usage": (
        with_rows(row("a", 50, 41, outcome="at_limit"), B, clients=[client("a", usage=(50, 40))]),
        ["overcharged"],
    ),
    "an answer is charged twice": (with_rows(A, replace(A, request_id="again"), B), ["overcharged"]),
    "an answer whose client disconnected is charged as complete, and too much": (
        with_rows(A, row("b", 60, 20), upstream=upstream(("a", 50, 40, (50, 40)), ("b", 50, 18, (50, 18)))),
        ["overcharged"],
    ),
    "a call is open after the last one": (
        evidence(idle=Snapshot([replace(A, state="open")], [counter()])),
        ["leaked"],
    ),
    "tokens are held after the last call": (
        evidence(idle=Snapshot([A, B], [counter(held=(0, 7, 0))])),
        ["leaked"],
    ),
    "a call is open after the stop": (
        with_rows(A, B, row("c", 0, 0, state="open"), held=(500, 500, 1)),
        ["leaked"],
    ),
    "a counter has used less than its calls": (with_rows(A, B, used=(110, 59, 2)), ["unbalanced"]),
    "a counter has one request too many": (with_rows(A, B, used=(110, 60, 3)), ["unbalanced"]),
    "an answer broke off without a fault": (
        evidence(clients=[client("a"), client("b", result="broken", words=15)]),
        ["unexplained failures"],
    ),
    "the proxy failed without a fault": (
        evidence(clients=[client("a"), client("x", result="failed", status=500)]),
        ["unexplained failures"],
    ),
    "the proxy was unreachable without a fault": (
        evidence(clients=[client("a"), client("x", result="unreachable", status=None)]),
        ["unexplained failures"],
    ),
    "the proxy exited by itself": (evidence(crashes=1), ["crashes"]),
    "the one refused call would have fitted": (evidence(clients=[client("a"), refused(free=50)]), ["false refusals"]),
    "one of a hundred refused calls would have fitted": (
        evidence(clients=[client("a"), refused(free=50), *[refused()] * 99]),
        ["false refusals"],
    ),
    "the quota had not reset when it should": (
        evidence(clients=[client("a"), refused(retry_of=Refusal(window_opened_at=7, resets_at=12))]),
        ["false resets"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_broken_promise_is_named(case: str) -> None:
    """That promise, and no other."""
    given, broken = BROKEN[case]
    assert judge(given).broken == broken


KEPT: dict[str, Evidence] = {
    "the charges are exactly the limit": with_rows(A, replace(B, charge=(850, 60, 1))),
    "the upstream generated far more before it noticed the disconnect": with_rows(
        A, B, upstream=upstream(("a", 50, 40, (50, 40)), ("b", 50, 5000, None))
    ),
    "the upstream generated and reported far more of an answer that was ended at the limit": with_rows(
        row("a", 50, 40, outcome="at_limit"),
        B,
        upstream=upstream(("a", 50, 5000, (50, 5000))),
        clients=[client("a")],
    ),
    "the same, and the client's usage is what was charged": with_rows(
        row("a", 50, 40, outcome="at_limit"),
        B,
        upstream=upstream(("a", 50, 5000, (50, 5000))),
        clients=[client("a", usage=(50, 40))],
    ),
    "a call whose client disconnected is charged an estimate": with_rows(A, replace(B, charge=(90, 70, 1))),
    "a call that was lost with the proxy is charged what it held": with_rows(
        A,
        replace(B, state="expired", outcome="lost", charge=(400, 400, 1)),
        clients=[client("a"), client("b", result="complete", usage=(50, 18))],
        kills=1,
    ),
    "a call that was lost with the proxy is charged its progress some time before": with_rows(
        A,
        replace(B, state="expired", outcome="lost", charge=(60, 0, 1)),
        clients=[client("a"), client("b", result="broken", disturbed=True)],
    ),
    "a call whose client disconnected before the first word has no row": with_rows(
        A, clients=[client("a"), ClientRecord("b", 0, 50, "disconnected")]
    ),
    "calls failed during a kill": evidence(
        clients=[
            client("a"),
            *(ClientRecord("x", 0, 50, result, disturbed=True) for result in ("broken", "failed", "unreachable")),
        ]
    ),
    "one of 101 refused calls would have fitted": evidence(
        clients=[client("a"), refused(free=50), *[refused()] * 100]
    ),
    "a refusal does not say what is free": evidence(clients=[client("a"), refused(free=None)]),
    "after the reset the next window was used up as well": evidence(
        clients=[client("a"), refused(retry_of=Refusal(window_opened_at=2, resets_at=7))]
    ),
    "after the reset calls in flight held the tokens": evidence(
        clients=[
            client("a"),
            *[refused()] * 100,
            refused(refusal=Refusal(50, 7, 9), retry_of=Refusal(window_opened_at=7)),
        ]
    ),
    "after the reset no window is open": evidence(
        clients=[client("a"), refused(refusal=Refusal(10, None, 12), retry_of=Refusal(resets_at=12))]
    ),
    "after the reset the call was admitted": evidence(
        clients=[
            client("a"),
            client("b", result="disconnected", words=9, retry_of=Refusal(window_opened_at=7)),
        ]
    ),
    "two windows are each below the limit": with_rows(
        row("a", 500, 400, held=(held_amount(500, 500, opened_at=1),)),
        row("b", 500, 400, held=(held_amount(500, 500, opened_at=2),)),
        used=(0, 0, 0),
        clients=[client("a"), refused()],
        upstream=upstream(("a", 500, 400, (500, 400)), ("b", 500, 400, (500, 400))),
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_no_promise_is_broken(case: str) -> None:
    """Each of these is as the proxy's documentation says."""
    assert judge(KEPT[case]).broken == []


def test_faults_are_reported() -> None:
    """Only those that were injected."""
    faults = ("kills", "pauses", "restarts")
    assert not any(figure.name in faults for figure in judge(evidence()).figures)
    report = judge(evidence(kills=3, pauses=2, restarts=1))
    assert [report[name].value for name in faults] == [3, 2, 1]


def test_tokens_that_were_generated_beyond_a_cut_are_reported() -> None:
    """They are charged to no quota and are no promise, but the upstream bills them."""
    report = judge(evidence(upstream=upstream(("a", 50, 40, (50, 40)), ("b", 50, 70, None))))
    assert (report["wasted tokens"].value, report["wasted tokens"].is_kept) == (50, None)


@pytest.mark.parametrize(
    ("amounts", "charge", "expected"),
    [
        ([(100, 50)], (30, 20), [(30, 20, 1)]),
        ([(100, 50)], (130, 70), [(130, 70, 1)]),  # a single amount takes everything, even more than was held
        ([(100, 50), (0, 30)], (100, 60), [(100, 50, 1), (0, 10, 0)]),
        ([(100, 50), (0, 30)], (90, 40), [(90, 40, 1), (0, 0, 0)]),
        ([(100, 50), (0, 30)], (120, 90), [(100, 50, 1), (20, 40, 0)]),
        ([(100, 50), (0, 30), (0, 30)], (100, 105), [(100, 50, 1), (0, 30, 0), (0, 25, 0)]),
    ],
)
def test_a_call_across_the_end_of_a_window_is_charged_to_its_held_amounts_in_order(
    amounts: list[tuple[int, int]], charge: tuple[int, int], expected: list[Amounts]
) -> None:
    """Each but the last takes at most its own amount; the request counts once, in the first window."""
    held = [held_amount(*amount, opened_at=position) for position, amount in enumerate(amounts)]
    charged = list(charges_by_window(held, (*charge, 1)))
    assert [window[2] for window, _ in charged] == list(range(len(held)))
    assert [share for _, share in charged] == expected


def test_each_counter_is_charged_the_whole_call() -> None:
    """A user's own quota and a shared one don't divide the charge."""
    own, shared = held_amount(10, 5), replace(held_amount(10, 5), counter=("~g", "g/pot"))
    assert [share for _, share in charges_by_window([own, shared], (10, 5, 1))] == [(10, 5, 1), (10, 5, 1)]


# ------------------------------------------------------------------------------------------- a proxy of somebody else


def external(counted: int | None = None, *, windows: int = 1, counters: int = 1, **more: Any) -> Report:
    """Judge the same run without the proxy's database."""
    return judge_external(evidence(**more), windows=windows, counters=counters, counted=counted)


def test_an_external_proxy_can_keep_every_promise() -> None:
    """By the upstream's count, and by its own counter."""
    assert external().broken == []
    assert external(158).broken == []
    assert external(90).broken == []  # only complete answers have to be counted


def _generated(*output_tokens: int) -> list[UpstreamRecord]:
    """Records of one complete call and of others without usage."""
    first, *others = output_tokens
    return upstream(("a", 0, first, (0, first)), *(("b", 0, other, None) for other in others))


EXTERNAL: dict[str, tuple[Callable[[], Report], list[str]]] = {
    "more than the limit was generated": (lambda: external(upstream=_generated(600, 401)), ["upstream overshoot"]),
    "exactly the limit was generated": (lambda: external(upstream=_generated(600, 400)), []),
    "two windows allow twice the limit": (lambda: external(upstream=_generated(600, 600), windows=2), []),
    "the counter has lost an answer": (lambda: external(89), ["lost"]),
    "an answer comes from another upstream": (
        lambda: external(clients=[client("a"), client("z")]),
        ["foreign answers"],
    ),
    "no call was made": (lambda: external(clients=[], upstream=[]), ["calls"]),
    "calls of other clients at the same upstream don't count": (
        lambda: external(upstream=[*_generated(600), UpstreamRecord("?", 900, 0, None)]),
        [],
    ),
    "a refused call would have fitted": (
        lambda: external(clients=[client("a"), refused(free=50)]),
        ["false refusals"],
    ),
}


@pytest.mark.parametrize("case", EXTERNAL)
def test_the_verdict_on_an_external_proxy(case: str) -> None:
    """The upstream's own count does not depend on the proxy."""
    report, broken = EXTERNAL[case]
    assert report().broken == broken


def test_each_user_has_a_counter_of_their_own() -> None:
    """What one user leaves of the limit is not another user's."""
    both = [client("a"), replace(client("b", result="disconnected"), user=1)]
    assert external(clients=both, upstream=_generated(600, 600), counters=2).broken == []
    assert external(clients=both, upstream=_generated(1100, 100), counters=2).broken == ["upstream overshoot"]
