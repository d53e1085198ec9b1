"""Every metric in one list, for Prometheus.

Labels come from closed lists only: endpoints, outcomes, and the names of quotas and models in the policy. A model
name that a client made up is counted as "other", so nobody can make a series of their own.

Workers count in files in one folder, and whichever is asked adds them up. The library decides that by the environment
when it is imported (PROMETHEUS_MULTIPROC_DIR), which the workers' parent sets.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead


class Metrics:
    """The counters of one process, in a registry of their own; `folder` is where its siblings count too."""

    def __init__(self, folder: str | None = None) -> None:
        self._registry = self._shown = CollectorRegistry()
        if folder is not None:
            self._shown = CollectorRegistry()
            MultiProcessCollector(self._shown, folder)  # type: ignore[no-untyped-call]
        self.calls = Counter(
            "llm_quota_calls",
            "Calls that were let in, by how they ended",
            ("endpoint", "model", "outcome"),
            registry=self._registry,
        )
        self.tokens = Counter(
            "llm_quota_tokens", "Tokens charged", ("model", "direction", "provenance"), registry=self._registry
        )
        self.hidden = Counter(
            "llm_quota_hidden_tokens", "Tokens that calls used beyond their hold", ("model",), registry=self._registry
        )
        self.refusals = Counter(
            "llm_quota_refusals",
            "Calls that were refused, by the quota",
            ("quota", "verdict"),
            registry=self._registry,
        )
        self.shadow_refusals = Counter(
            "llm_quota_shadow_refusals",
            "Calls that a quota in shadow would have refused",
            ("quota",),
            registry=self._registry,
        )
        self.attempts = Counter(
            "llm_quota_tries",
            "What was sent to an upstream, by what became of it; a call may be sent more than once",
            ("upstream", "outcome"),
            registry=self._registry,
        )
        self.in_flight = Gauge(
            "llm_quota_calls_in_flight",
            "Calls reserved and not ended",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self.reload_failed = Gauge(
            "llm_quota_reload_failed",
            "1 while the policy file can't be taken",
            registry=self._registry,
            multiprocess_mode="livemax",
        )
        self.reloaded_at = Gauge(
            "llm_quota_policy_loaded_timestamp_seconds",
            "When the policy in force was read; of several workers, where it is the oldest",
            registry=self._registry,
            multiprocess_mode="livemin",
        )

    def refused(self, quota: str, verdict: str) -> None:
        """Count a refused call at one of the quotas that refused it; `verdict` is busy, exhausted or never."""
        self.refusals.labels(quota, verdict).inc()

    def ended(self, *, endpoint: str, model: str, outcome: str | None, would_refuse: Iterable[str]) -> None:
        """Count an admitted call that has ended. `model` must come from a closed list.

        `would_refuse` are the ids of the quotas in shadow that would have refused it.
        """
        self.calls.labels(endpoint, model, outcome).inc()
        for quota_id in would_refuse:
            self.shadow_refusals.labels(quota_id).inc()

    def charged(self, *, model: str, input_tokens: int, output_tokens: int, provenance: str, hidden: int) -> None:
        """Count the tokens that a call was charged; `hidden` of them were beyond what it held."""
        self.tokens.labels(model, "input", provenance).inc(input_tokens)
        self.tokens.labels(model, "output", provenance).inc(output_tokens)
        self.hidden.labels(model).inc(hidden)

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._shown)


def forget(pid: int, folder: str) -> None:
    """A worker has ended: what it counted stays counted, what was true only while it lived goes."""
    mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
