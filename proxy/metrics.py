"""All metrics of the proxy, for Prometheus.

The values of labels come only from closed lists: endpoints, outcomes, and the names of quotas and models in the
policy. A model name that a client made up is counted as `other`, so a client can't create a time series.

With several workers, each counts in files of one folder, and the worker that answers `/metrics` adds them up. The
library decides about that when it is imported, by the environment variable PROMETHEUS_MULTIPROC_DIR, which the parent
sets for its workers.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

# How the values of several workers become one.
OfWorkers = Literal["livesum", "livemax", "livemin", "livemostrecent"]


class Metrics:
    """The metrics of one process, in a registry of its own. `folder` is that of all workers, None without workers."""

    def __init__(self, folder: str | None = None) -> None:
        self._registry = self._exposed = CollectorRegistry()
        if folder is not None:
            # A second registry, which reads the files of all workers and has none of this process's own objects.
            self._exposed = CollectorRegistry()
            MultiProcessCollector(self._exposed, folder)  # type: ignore[no-untyped-call]
        self.calls = Counter(
            "llm_quota_calls",
            "Admitted calls that have ended, by outcome",
            ("endpoint", "model", "outcome"),
            registry=self._registry,
        )
        self.tokens = Counter(
            "llm_quota_tokens", "Tokens charged", ("model", "direction", "provenance"), registry=self._registry
        )
        self.hidden = Counter(
            "llm_quota_hidden_tokens",
            "Tokens that calls used beyond their reservation",
            ("model",),
            registry=self._registry,
        )
        self.refusals = Counter(
            "llm_quota_refusals",
            "Refused calls, by the quota that refused them",
            ("quota", "verdict"),
            registry=self._registry,
        )
        self.shadow_refusals = Counter(
            "llm_quota_shadow_refusals",
            "Admitted calls that a quota with enforce: shadow would have refused",
            ("quota",),
            registry=self._registry,
        )
        self.ignored_headers = Counter(
            "llm_quota_ignored_identity_headers",
            "Requests with headers of a header source that did not count: with another key, or from another address",
            ("reason",),
            registry=self._registry,
        )
        self.attempts = Counter(
            "llm_quota_tries",  # an older word for attempts, kept because dashboards use it
            "Attempts at upstreams, by outcome; a call may need several",
            ("upstream", "outcome"),
            registry=self._registry,
        )
        self.requests_not_logged = Counter(
            "llm_quota_requests_not_logged",
            "Requests without a valid key that got no line in the log, because there were too many of them",
            registry=self._registry,
        )
        self.in_flight = self._gauge(
            "llm_quota_calls_in_flight", "Calls that are admitted and have not ended", "livesum"
        )
        self.reload_failed = self._gauge(
            "llm_quota_reload_failed", "1 if the last reload failed because the file is invalid, else 0", "livemax"
        )
        self.reloaded_at = self._gauge(
            "llm_quota_policy_loaded_timestamp_seconds",
            "When the policy in force was loaded; with several workers, the earliest of these times",
            "livemin",
        )
        self.ledger_clock_offset = self._gauge(
            "llm_quota_ledger_clock_offset_seconds",
            "How far the clock that decides about windows (PostgreSQL's) is ahead of this machine's; 0 on SQLite",
            "livemostrecent",  # workers are on one machine, so they measure the same
        )
        self.unauthorized_requests = Counter(
            "llm_quota_unauthorized",
            "Requests without a valid key (401), by the reason that the log gives",
            ("reason",),
            registry=self._registry,
        )
        self.directory_entries = self._gauge(
            "llm_quota_directory_entries", "Keys and users of the database that are in memory", "livesum", ("kind",)
        )
        self.directory_age = self._gauge(
            "llm_quota_directory_age_seconds",
            "How long ago the database last said, at the latest poll, whether keys or users have changed",
            "livemax",
        )

    def _gauge(self, name: str, text: str, of_workers: OfWorkers, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self._registry, multiprocess_mode=of_workers)

    def ledger_clock_differs(self, offset_ms: int) -> None:
        """Note how far the ledger's clock is ahead of this process's, in ms."""
        self.ledger_clock_offset.set(offset_ms / 1000)

    def ignored(self, reason: str) -> None:
        """Count a request whose identity headers did not count. `reason` is other_key or other_address."""
        self.ignored_headers.labels(reason).inc()

    def refused(self, quota: str, verdict: str) -> None:
        """Count a refused call for one quota that refused it. `verdict` is busy, exhausted or never."""
        self.refusals.labels(quota, verdict).inc()

    def ended(self, *, endpoint: str, model: str, outcome: str | None, would_refuse: Iterable[str]) -> None:
        """Count an admitted call that has ended.

        `model` has to come from a closed list. `would_refuse` has the ids of the quotas with `enforce: shadow` that
        would have refused the call.
        """
        self.calls.labels(endpoint, model, outcome).inc()
        for quota_id in would_refuse:
            self.shadow_refusals.labels(quota_id).inc()

    def charged(self, *, model: str, input_tokens: int, output_tokens: int, provenance: str, hidden: int) -> None:
        """Count the tokens that a call was charged. `hidden` of them were beyond its reservation."""
        self.tokens.labels(model, "input", provenance).inc(input_tokens)
        self.tokens.labels(model, "output", provenance).inc(output_tokens)
        self.hidden.labels(model).inc(hidden)

    def unauthorized(self, reason: str) -> None:
        """Count a request without a valid key. `reason` has to come from a closed list."""
        self.unauthorized_requests.labels(reason).inc()

    def directory_polled(self, entries: Mapping[str, int], *, age_s: float) -> None:
        """Note how many entries of each kind are remembered, and how old their confirmation is after a poll."""
        for kind, number in entries.items():
            self.directory_entries.labels(kind).set(number)
        self.directory_age.set(age_s)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._exposed)


def remove_gauges(pid: int, folder: str) -> None:
    """Remove the gauges of a worker that has ended. Its counters stay in the sums, which must never decrease."""
    mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
