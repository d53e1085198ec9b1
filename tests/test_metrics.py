"""The metrics are counted with labels from closed lists."""

from proxy.metrics import Metrics


def test_an_ended_call_is_counted_with_what_it_used() -> None:
    """By outcome, by direction and provenance; tokens beyond the hold have a counter of their own."""
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


def test_a_refusal_is_counted_at_the_quota_that_refused() -> None:
    """With its verdict: busy, exhausted and never are three different things to an operator."""
    metrics = Metrics()
    metrics.refused("staff/daily", "never")
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
