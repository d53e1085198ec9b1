"""Metrics and their labels."""

from proxy.metrics import Metrics


def test_an_ended_call_is_counted_with_the_tokens_that_it_was_charged() -> None:
    """By outcome, direction and provenance. Tokens beyond the reservation have a counter of their own."""
    metrics = Metrics()
    metrics.ended(endpoint="chat", model="fast", outcome="complete", would_refuse=["staff/trial"])
    metrics.charged(model="fast", input_tokens=130, output_tokens=205, provenance="exactly", hidden=35)
    metrics.ended(endpoint="chat", model="fast", outcome="upstream_failed", would_refuse=())
    text = metrics.exposition().decode()
    assert 'llm_quota_calls_total{endpoint="chat",model="fast",outcome="complete"} 1.0' in text
    assert 'llm_quota_calls_total{endpoint="chat",model="fast",outcome="upstream_failed"} 1.0' in text
    assert 'llm_quota_tokens_total{direction="input",model="fast",provenance="exactly"} 130.0' in text
    assert 'llm_quota_tokens_total{direction="output",model="fast",provenance="exactly"} 205.0' in text
    assert 'llm_quota_hidden_tokens_total{model="fast"} 35.0' in text
    assert 'llm_quota_shadow_refusals_total{quota="staff/trial"} 1.0' in text


def test_a_refusal_is_counted_for_the_quota_that_refused() -> None:
    """With its verdict, because an operator reacts differently to busy, exhausted and never."""
    metrics = Metrics()
    metrics.refused("staff/daily", "never")
    assert 'llm_quota_refusals_total{quota="staff/daily",verdict="never"} 1.0' in metrics.exposition().decode()


def test_identity_headers_that_do_not_count_are_counted() -> None:
    """By the reason: somebody tries them with another key, or the key of a source is used elsewhere."""
    metrics = Metrics()
    metrics.ignored("other_key")
    assert 'llm_quota_ignored_identity_headers_total{reason="other_key"} 1.0' in metrics.exposition().decode()


def test_attempts_are_counted_by_upstream() -> None:
    """There are more attempts than calls, if one upstream fails and another takes the call."""
    metrics = Metrics()
    metrics.attempts.labels("box", "limited").inc()
    assert 'llm_quota_tries_total{outcome="limited",upstream="box"} 1.0' in metrics.exposition().decode()


def test_two_sets_of_metrics_in_one_process_are_separate() -> None:
    """Each has a registry of its own, so nothing is registered twice."""
    first, second = Metrics(), Metrics()
    first.in_flight.inc()
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
