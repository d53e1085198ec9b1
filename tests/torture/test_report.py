"""The report as it is printed, for people and for programs."""

import json

from proxy.torture.report import Figure, Report

KEPT = Figure("lost", 0, "answers", True)
BROKEN = Figure("overshoot", 1234, "tokens", False)


def test_a_promise_that_was_broken_stands_out() -> None:
    """In its line and in the verdict, which names nothing else."""
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


def test_a_good_run_says_so() -> None:
    """In one line at the end."""
    report = Report((KEPT, Figure("calls", 7)))
    assert report.is_kept
    assert report.as_text().endswith("\n\nEvery promise was kept.")


def test_programs_get_every_figure() -> None:
    """By its name, with whether a promise hangs on it."""
    told = json.loads(Report((KEPT, BROKEN, Figure("p99", None, "ms"))).as_json())
    assert told == {
        "kept": False,
        "broken": ["overshoot"],
        "figures": {
            "lost": {"value": 0, "kept": True, "note": "answers"},
            "overshoot": {"value": 1234, "kept": False, "note": "tokens"},
            "p99": {"value": None, "kept": None, "note": "ms"},
        },
    }
