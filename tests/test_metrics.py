"""Metrics and their labels."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from proxy.metrics import _OWN_S, LEDGER_FAILURES, Metrics, remove_gauges
from tests import exposition

DOCS = Path(__file__).parent.parent / "docs" / "metrics.md"


def read(metrics: Metrics) -> exposition.Metrics:
    return exposition.Metrics.of(metrics.exposition().decode())


def test_an_ended_call_is_counted_with_the_tokens_that_it_was_charged() -> None:
    """By outcome, direction and provenance. Tokens beyond the reservation have a counter of their own."""
    metrics = Metrics()
    call = {"endpoint": "chat", "group": "staff", "model": "fast"}
    charged = ("exactly", 130, 205, 35)
    metrics.ended(**call, outcome="complete", would_refuse=["staff/trial"], charged=charged)
    metrics.ended(**call, outcome="upstream_failed")
    text = metrics.exposition().decode()
    assert 'llm_quota_calls_total{endpoint="chat",model="fast",outcome="complete"} 1.0' in text
    assert 'llm_quota_calls_total{endpoint="chat",model="fast",outcome="upstream_failed"} 1.0' in text
    assert 'llm_quota_tokens_total{direction="input",model="fast",provenance="exactly"} 130.0' in text
    assert 'llm_quota_tokens_total{direction="output",model="fast",provenance="exactly"} 205.0' in text
    assert 'llm_quota_hidden_tokens_total{model="fast"} 35.0' in text
    assert 'llm_quota_shadow_refusals_total{quota="staff/trial"} 1.0' in text
    found = read(metrics)
    assert found.by("llm_quota_group_calls_total", "group", "model", "outcome") == {
        ("staff", "fast", "complete"): 1,
        ("staff", "fast", "upstream_failed"): 1,
    }
    assert found.by("llm_quota_group_tokens_total", "group", "model", "direction") == {
        ("staff", "fast", "input"): 130,
        ("staff", "fast", "output"): 205,
    }


def test_fetches_of_keys_are_counted_by_upstream() -> None:
    """An issuer that fails can be alerted on before the old key ends."""
    metrics = Metrics()
    metrics.key_fetched("azure", "failed")
    shown = 'llm_quota_token_fetches_total{outcome="failed",upstream="azure"} 1.0'
    assert shown in metrics.exposition().decode()


def test_a_refusal_is_counted_for_the_quota_that_refused() -> None:
    """With its verdict, because an operator reacts differently to busy, exhausted and never."""
    metrics = Metrics()
    metrics.refused("staff/daily", "never", model="fast")
    assert 'llm_quota_refusals_total{quota="staff/daily",verdict="never"} 1.0' in metrics.exposition().decode()
    labels = {"group": "staff", "model": "fast", "quota": "staff/daily", "verdict": "never"}
    assert read(metrics).value("llm_quota_group_refusals_total", **labels) == 1


def test_identity_headers_that_do_not_count_are_counted() -> None:
    """By the reason: somebody tries them with another key, or the key of a source is used elsewhere."""
    metrics = Metrics()
    metrics.ignored("other_key")
    assert 'llm_quota_ignored_identity_headers_total{reason="other_key"} 1.0' in metrics.exposition().decode()


def test_attempts_are_counted_by_upstream() -> None:
    """There are more attempts than calls, if one upstream fails and another takes the call."""
    metrics = Metrics()
    metrics.attempts.new["box", "limited"] += 1
    assert 'llm_quota_tries_total{outcome="limited",upstream="box"} 1.0' in metrics.exposition().decode()


def test_two_sets_of_metrics_in_one_process_are_separate() -> None:
    """Each has a registry of its own, so nothing is registered twice."""
    first, second = Metrics(), Metrics()
    first.calls_in_flight += 1
    assert b"llm_quota_calls_in_flight 1.0" in first.exposition()
    assert b"llm_quota_calls_in_flight 0.0" in second.exposition()


def test_requests_without_a_valid_key_are_counted_by_reason() -> None:
    """The reasons are those of the log, from a closed list."""
    metrics = Metrics()
    metrics.unauthorized("expired")
    metrics.unauthorized("unknown")
    metrics.unauthorized("unknown")
    text = metrics.exposition().decode()
    assert 'llm_quota_unauthorized_total{reason="expired"} 1.0' in text
    assert 'llm_quota_unauthorized_total{reason="unknown"} 2.0' in text


def test_the_directory_shows_its_size_and_its_age() -> None:
    """An age of more than a minute means that nobody of the database is identified."""
    metrics = Metrics()
    metrics.directory_polled({"keys": 3, "users": 2}, age_s=61.5)
    text = metrics.exposition().decode()
    assert 'llm_quota_directory_entries{kind="keys"} 3.0' in text
    assert 'llm_quota_directory_entries{kind="users"} 2.0' in text
    assert "llm_quota_directory_age_seconds 61.5" in text


def test_a_complete_answer_says_how_well_it_is_counted() -> None:
    """Whether the upstream stated its usage; and both counts of its output, where both are known."""
    metrics = Metrics()
    metrics.answered("box", "fast", is_stated=True, counted=(48, 50))
    metrics.answered("box", "fast", is_stated=True, counted=None)
    metrics.answered("old", "fast", is_stated=False, counted=None)
    found = read(metrics)
    assert found.by("llm_quota_answers_without_usage_total", "upstream") == {"old": 1}
    assert found.by("llm_quota_compared_tokens_total", "upstream", "source") == {
        ("box", "proxy"): 48,
        ("box", "upstream"): 50,
    }


def test_no_series_says_when_another_was_created() -> None:
    """They would double the number of series of counters, for nothing that an operator asks."""
    metrics = Metrics()
    metrics.refused("staff/daily", "never", model="fast")
    metrics.own_s.observe(0.01, "chat")
    assert b"_created" not in metrics.exposition()


def test_a_histogram_has_what_the_library_would_have_counted() -> None:
    """Its buckets are increased by the proxy. A value that is a bound is in the bucket of that bound."""
    values = [0, 0.001, 0.0010001, 0.5, 29.9, 30, 31, 1e9]
    metrics, registry = Metrics(), CollectorRegistry()
    theirs = Histogram("llm_quota_own_seconds", "", ["endpoint"], buckets=_OWN_S, registry=registry)
    for _ in range(2):  # what was handed over once is not handed over again
        for number, value in enumerate(values):
            metrics.own_s.observe(value, "chat" if number % 2 else "embeddings")
            theirs.labels("chat" if number % 2 else "embeddings").observe(value)
        expected = exposition.Metrics.of(generate_latest(registry).decode()).series
        found = {key: value for key, value in read(metrics).series.items() if key in expected}
        assert found == {key: value for key, value in expected.items() if not key[0].endswith("_created")}


def test_what_is_gone_from_the_policy_has_no_gauge() -> None:
    """A pot, a quota, an upstream or a hash that no longer exists would be shown for ever."""
    metrics = Metrics()
    metrics.set_policy_hash("aaaa")
    metrics.set_cooldowns(["box", "old"], in_cooldown={"old": 5})
    metrics.set_upstream_load("old", in_flight=2, waiting=1)
    metrics.set_quotas(pots={("lab/pot", "tokens"): (1000, 300, 20)}, members={("staff/daily", 80): 3})
    found = read(metrics)
    pots = [
        found.value(f"llm_quota_pot_{each}", quota="lab/pot", measure="tokens") for each in ("limit", "used", "held")
    ]
    assert pots == [1000, 300, 20]
    assert found.value("llm_quota_members_near_limit", quota="staff/daily", percent="80") == 3
    assert found.value("llm_quota_upstream_cooldown", upstream="old") == 1
    assert found.value("llm_quota_upstream_cooldown", upstream="box") == 0
    metrics.set_policy_hash("bbbb")
    metrics.set_cooldowns(["box"], in_cooldown=())
    metrics.set_quotas(members={("staff/daily", 80): 0})
    found = read(metrics)
    assert found.by("llm_quota_policy_info", "hash") == {"bbbb": 1}
    gone = {"llm_quota_pot_limit", "llm_quota_pot_used", "llm_quota_pot_held"}
    assert not gone & found.names
    assert found.value("llm_quota_members_near_limit", quota="staff/daily", percent="80") == 0
    assert not [name for name, labels in found.series if ("upstream", "old") in labels]


def test_failures_of_the_ledger_are_stated_before_the_first() -> None:
    """Prometheus sees no increase in a series that begins with 1."""
    metrics = Metrics()
    assert all(read(metrics).value("llm_quota_ledger_failures_total", kind=kind) == 0 for kind in LEDGER_FAILURES)
    metrics.ledger_failed("batch")
    assert read(metrics).by("llm_quota_ledger_failures_total", "kind") == {"batch": 1}


# What each of several workers does; the library decides when it is imported whether it counts in files.
WORKER = """
import os, sys
from proxy.metrics import Metrics
metrics = Metrics(sys.argv[1])
for endpoint in ("chat", "chat", "embeddings"):
    metrics.ended(endpoint=endpoint, group="staff", model="fast", outcome="complete", would_refuse=())
metrics.duration_s.observe(float(sys.argv[2]), "chat", "box")
metrics.ledger_batch.observe(3)
metrics.calls_in_flight += 1
metrics.ledger_healthy.set(float(sys.argv[2]) > 1)
metrics.set_cooldowns(["box", sys.argv[3]], in_cooldown=[sys.argv[3]])
metrics.set_cooldowns(["box"], in_cooldown=[])
metrics.set_policy_hash("aaaa")
metrics.set_quotas(pots={("lab/pot", "tokens"): (1000, 300, 20)}, members={("staff/daily", 80): 3})
print(os.getpid())
sys.stdout.write(metrics.exposition().decode())
"""


def test_the_metrics_of_workers_are_added_up(tmp_path: Path) -> None:
    """Counters and histograms of all; gauges of those that run; what all state alike, once."""
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    pids, texts = [], []
    for arguments in (("0.2", "one"), ("3", "two"), ("45", "three")):
        done = subprocess.run(
            [sys.executable, "-c", WORKER, str(tmp_path), *arguments],
            env=environ,
            check=True,
            capture_output=True,
            text=True,
        )
        pid, _, text = done.stdout.partition("\n")
        pids.append(int(pid))
        texts.append(text)
        if len(pids) == 1:
            remove_gauges(
                pids[0], str(tmp_path)
            )  # it has ended; the second one still runs, as far as the folder says
    assert "_created" not in texts[-1]
    found = exposition.Metrics.of(texts[-1])
    assert found.by("llm_quota_calls_total", "endpoint") == {"chat": 6, "embeddings": 3}
    assert found.by("llm_quota_group_calls_total", "group") == {"staff": 9}
    assert found.value("llm_quota_calls_in_flight") == 2
    assert found.value("llm_quota_ledger_healthy") == 1
    buckets = {
        le: found.value("llm_quota_duration_seconds_bucket", endpoint="chat", upstream="box", le=le)
        for le in ("0.1", "0.25", "4.0", "60.0", "+Inf")
    }
    assert buckets == {"0.1": 0, "0.25": 1, "4.0": 2, "60.0": 3, "+Inf": 3}
    assert found.value("llm_quota_duration_seconds_sum", endpoint="chat", upstream="box") == pytest.approx(48.2)
    assert found.value("llm_quota_ledger_batch_operations_sum") == 9
    assert found.by("llm_quota_upstream_cooldown", "upstream") == {}
    assert found.value("llm_quota_pot_used", quota="lab/pot", measure="tokens") == 300
    assert found.value("llm_quota_members_near_limit", quota="staff/daily", percent="80") == 3
    assert found.by("llm_quota_policy_info", "hash") == {"aaaa": 1}
    # The process that answered is the only one that still ran.
    assert 10e6 < found.value("process_resident_memory_bytes") < 1e9
    assert found.value("process_open_fds") > 2


def documented() -> dict[str, str]:
    """The metrics of the docs and their types."""
    rows = re.findall(r"^\| (`[a-z`_, ]+`) \| (\w+) \|", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: kind for names, kind in rows for name in re.findall(r"`(\w+)`", names)}


def test_every_metric_is_documented_with_its_type() -> None:
    """And the docs name none that does not exist."""
    assert documented() == read(Metrics()).types


def test_the_load_of_each_upstream_is_shown() -> None:
    """How many calls it has, and how many wait for a slot of it."""
    metrics = Metrics()
    metrics.set_upstream_load("box", in_flight=16, waiting=3)
    metrics.set_upstream_load("box", in_flight=15, waiting=0)
    text = metrics.exposition().decode()
    assert 'llm_quota_upstream_in_flight{upstream="box"} 15.0' in text
    assert 'llm_quota_upstream_slots_waiting{upstream="box"} 0.0' in text
