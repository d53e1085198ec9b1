"""The report as text and as JSON."""

import json
from dataclasses import replace

from proxy.torture.report import Comparison, Figure, Report

KEPT = Figure("lost", 0, "answers", True)
BROKEN = Figure("overshoot", 1234, "tokens", False)


def test_a_broken_promise_is_marked() -> None:
    """In its row, and in the last line, which names the broken promises only."""
    report = Report((KEPT, BROKEN, Figure("p50", 1.25), Figure("p99", None, "ms")))
    assert report.as_text().splitlines() == [
        "  lost                  0  kept    answers",
        "  overshoot         1,234  BROKEN  tokens",
        "  p50                 1.2",
        "  p99                   –          ms",
        "",
        "Broken: overshoot.",
    ]
    assert (report.is_kept, report.broken) == (False, ["overshoot"])
    assert report["overshoot"] is BROKEN


def test_a_report_without_broken_promises_says_so() -> None:
    """In its last line."""
    report = Report((KEPT, Figure("calls", 7)))
    assert report.is_kept
    assert report.as_text().endswith("\n\nEvery promise was kept.")


def test_the_json_has_every_figure() -> None:
    """By name, with whether its promise was kept; null if it is no promise."""
    parsed = json.loads(Report((KEPT, BROKEN, Figure("p99", None, "ms"))).as_json())
    assert parsed == {
        "kept": False,
        "broken": ["overshoot"],
        "figures": {
            "lost": {"value": 0, "kept": True, "note": "answers"},
            "overshoot": {"value": 1234, "kept": False, "note": "tokens"},
            "p99": {"value": None, "kept": None, "note": "ms"},
        },
    }


def test_a_comparison_has_a_column_for_each_run() -> None:
    """The notes are those of the second run, which alone decides whether every promise was kept."""
    alone = Report((Figure("calls", 7, "of the first"), BROKEN, Figure("p99", None, "ms")))
    behind = Report((Figure("calls", 8, "of the second"), replace(BROKEN, value=0, is_kept=True), Figure("p99", 2.0)))
    comparison = Comparison(alone, behind)
    assert comparison.as_text().splitlines() == [
        "                    alone                  behind",
        "  calls                 7                       8          of the second",
        "  overshoot         1,234  BROKEN               0  kept    tokens",
        "  p99                   –                     2.0",
        "",
        "Alone: Broken: overshoot.",
        "Behind this proxy: Every promise was kept.",
    ]
    assert comparison.is_kept
    assert not Comparison(behind, alone).is_kept


def test_the_json_of_a_comparison_has_both_reports() -> None:
    """Under `alone` and `behind`, each as it is by itself."""
    alone, behind = Report((BROKEN,)), Report((KEPT,))
    assert json.loads(Comparison(alone, behind).as_json()) == {
        "kept": True,
        "alone": json.loads(alone.as_json()),
        "behind": json.loads(behind.as_json()),
    }
