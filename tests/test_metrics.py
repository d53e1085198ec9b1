"""What is counted, with labels from closed lists."""

from proxy.ledger.book import Accepted, Book, Refused
from proxy.metrics import Metrics
from tests.builders import NOON, binding, call, exactly, quota, reserve


def test_an_ended_call_is_counted_with_what_it_used() -> None:
    """By outcome, by direction and provenance; what went beyond the hold by itself."""
    booked = Book({}, {}, NOON).apply(reserve("1", binding([quota("staff/daily", tokens=1000)]), call(100, 200)))
    assert isinstance(booked, Accepted)
    metrics = Metrics()
    metrics.ended(booked.entry, exactly(130, 205), "complete", model="fast")
    metrics.ended(booked.entry, None, "upstream_failed", model="fast")
    text = metrics.exposition().decode()
    assert 'llm_quota_calls_total{endpoint="chat",model="fast",outcome="complete"} 1.0' in text
    assert 'llm_quota_calls_total{endpoint="chat",model="fast",outcome="upstream_failed"} 1.0' in text
    assert 'llm_quota_tokens_total{direction="input",model="fast",provenance="exactly"} 130.0' in text
    assert 'llm_quota_hidden_tokens_total{model="fast"} 35.0' in text


def test_a_refusal_is_counted_at_the_quota_that_refused() -> None:
    """With its verdict: busy, exhausted and never are three different things to an operator."""
    answer = Book({}, {}, NOON).apply(reserve("1", binding([quota("staff/daily", tokens=100)]), call(200, 10)))
    assert isinstance(answer, Refused)
    metrics = Metrics()
    metrics.refused(answer.refused)
    assert 'llm_quota_refusals_total{quota="staff/daily",verdict="never"} 1.0' in metrics.exposition().decode()


def test_tries_are_counted_by_upstream() -> None:
    """More than calls, where one upstream can't take what another then does."""
    metrics = Metrics()
    metrics.attempts.labels("box", "limited").inc()
    assert 'llm_quota_tries_total{outcome="limited",upstream="box"} 1.0' in metrics.exposition().decode()


def test_two_processes_in_one_do_not_share_counts() -> None:
    """The registry is the object's own, so importing or building twice registers nothing twice."""
    first, second = Metrics(), Metrics()
    first.in_flight.inc()
    assert b"llm_quota_calls_in_flight 1.0" in first.exposition()
    assert b"llm_quota_calls_in_flight 0.0" in second.exposition()
