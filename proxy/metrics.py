"""All metrics of the proxy, for Prometheus. `docs/metrics.md` says what each means.

The values of labels come only from closed lists: endpoints, outcomes, and the names of groups, quotas, models and
upstreams in the policy. A model name that a client made up is counted as `other`, so a client can't create a time
series.

A call adds to plain numbers (`Counts.new`, `Observations.new`, `calls_in_flight`), which are handed to the library
when somebody asks for the metrics.

With several workers, each counts in files of one folder, and the worker that answers `/metrics` adds them up. The
library decides about that when it is imported, by the environment variable PROMETHEUS_MULTIPROC_DIR, which the parent
sets for its workers. So workers hand over when requests have ended, see `publish`. What every worker knows alike is
not in these files: the one that answers states it (`_Known`).
"""

import asyncio
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from glob import glob
from typing import Generic, Literal, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from proxy import __version__

# How the values of several workers become one.
OfWorkers = Literal["livesum", "livemax", "livemin", "livemostrecent"]
# What failed in the ledger: a batch because of the database, one operation, the wait of a new call, the renewal of
# the lease, or the search for calls of dead processes.
LedgerFailure = Literal["batch", "operation", "wait", "lease", "sweep"]
LEDGER_FAILURES: tuple[LedgerFailure, ...] = ("batch", "operation", "wait", "lease", "sweep")

# Upper bounds of histograms, in seconds. Answers of models take from a tenth of a second to ten minutes.
_ANSWER_S = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)
# From a call that passes through at once to one that waits for others as long as `wait` allows.
_OWN_S = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1, 5, 10, 30)
_COMMIT_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1, 2, 5, 10)
_LAG_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_PUBLISHED_WITHIN_S = 0.1
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Kind = TypeVar("Kind", Counter, Histogram)


class Series(Generic[Kind]):
    """The series of one metric, by the values of its labels."""

    __slots__ = ("_found", "_metric")

    def __init__(self, metric: Kind) -> None:
        self._metric: Kind = metric
        self._found: dict[tuple[object, ...], Kind] = {(): metric}

    def labels(self, *values: object) -> Kind:
        """The series with these values, in the order of the metric's labels.

        The library's own `labels` takes 1 µs each time. This takes 0.1 µs for a series that exists.
        """
        found = self._found.get(values)
        if found is None:
            found = self._found[values] = self._metric.labels(*values)
        return found


class Counts(Series[Counter]):
    """The series of one counter. What was counted since the last `flush` is in `new`, by the values of the labels.

    `counts.new["chat", 200] += 1` takes a tenth of the time of the library's own `inc`.
    """

    __slots__ = ("new",)

    def __init__(self, metric: Counter) -> None:
        super().__init__(metric)
        self.new: defaultdict[tuple[object, ...], int] = defaultdict(int)

    def flush(self) -> None:
        """Hand to the library what is new."""
        for values, number in self.new.items():
            self.labels(*values).inc(number)
        self.new.clear()


class Observations(Series[Histogram]):
    """The series of one histogram, with what was observed since the last `flush`, by the values of the labels.

    The library takes only one value at a time, so its buckets are increased here. They are private, and a test says
    so if another version has others.
    """

    __slots__ = ("_bounds", "new")

    def __init__(self, metric: Histogram, bounds: Sequence[float]) -> None:
        super().__init__(metric)
        self._bounds = bounds
        # For each series how many values each bucket has got, those above all bounds last, and then their sum.
        self.new: dict[tuple[object, ...], list[float]] = {}

    def observe(self, value: float, *labels: object) -> None:
        """Count a value in the series with these labels."""
        found = self.new.get(labels)
        if found is None:
            found = self.new[labels] = [0] * (len(self._bounds) + 2)
        found[bisect_left(self._bounds, value)] += 1
        found[-1] += value

    def flush(self) -> None:
        """Hand to the library what is new."""
        for values, (*numbers, total) in self.new.items():
            series = self.labels(*values)
            series._sum.inc(total)
            for bucket, number in zip(series._buckets, numbers, strict=True):
                if number:
                    bucket.inc(number)
        self.new.clear()


class Metrics:
    """The metrics of one process, in a registry of its own. `folder` is that of all workers, None without workers."""

    def __init__(self, folder: str | None = None) -> None:
        # Without this, each series of a counter or histogram has a second one with the time of its creation.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._folder = folder
        self._is_flush_due = False
        self._counted: list[Counts | Observations] = []
        self._registry = self._exposed = CollectorRegistry()
        if folder is not None:
            # A second registry, which reads the files of all workers and has none of this process's own objects.
            self._exposed = CollectorRegistry()
            MultiProcessCollector(self._exposed, folder)  # type: ignore[no-untyped-call]
        self._known = _Known()
        self._exposed.register(self._known)
        self._exposed.register(_Processes(folder))
        self._add_requests()
        self._add_calls()
        self._add_tokens()
        self._add_upstreams()
        self._add_ledger()
        self._add_process()

    def _add_requests(self) -> None:
        self.requests = self._counter(
            "llm_quota_requests",
            "Requests to the API listener, by the status that the client got",
            "endpoint",
            "status",
        )
        self.first_byte_s = self._histogram(
            "llm_quota_first_byte_seconds",
            "From the request to the first byte of the answer, of calls that an upstream has answered",
            _ANSWER_S,
            *("endpoint", "upstream"),
        )
        self.duration_s = self._histogram(
            "llm_quota_duration_seconds",
            "From the request to the end of the answer, of calls that an upstream has answered",
            _ANSWER_S,
            *("endpoint", "upstream"),
        )
        self.own_s = self._histogram(
            "llm_quota_own_seconds", "The part of a call's time in which no upstream had it", _OWN_S, "endpoint"
        )
        self.unauthorized_requests = self._counter(
            "llm_quota_unauthorized", "Requests without a valid key (401), by the reason that the log gives", "reason"
        )
        self.ignored_headers = self._counter(
            "llm_quota_ignored_identity_headers",
            "Requests with headers of a header source that did not count: with another key, or from another address",
            "reason",
        )

    def _add_calls(self) -> None:
        # Of calls that have ended, by the parameters of `ended`: their number, input, output and hidden tokens.
        self._ended: defaultdict[tuple[str | None, ...], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        self.calls = self._counter(
            "llm_quota_calls", "Admitted calls that have ended, by outcome", "endpoint", "model", "outcome"
        )
        self.group_calls = self._counter(
            "llm_quota_group_calls",
            "Admitted calls that have ended, by the group whose quotas admitted them",
            *("group", "model", "outcome"),
        )
        self.refusals = self._counter(
            "llm_quota_refusals", "Refused calls, by the quota that refused them", "quota", "verdict"
        )
        self.group_refusals = self._counter(
            "llm_quota_group_refusals",
            "Refused calls, by the quota that refused them, its group, and the model",
            *("group", "model", "quota", "verdict"),
        )
        self.shadow_refusals = self._counter(
            "llm_quota_shadow_refusals",
            "Admitted calls that a quota with enforce: shadow would have refused",
            "quota",
        )
        self.calls_in_flight = 0
        self._in_flight = self._gauge(
            "llm_quota_calls_in_flight", "Calls that are admitted and have not ended", "livesum"
        )
        self.waiting = self._gauge("llm_quota_calls_waiting", "Calls that wait for admission", "livesum")

    def _add_tokens(self) -> None:
        self.tokens = self._counter("llm_quota_tokens", "Tokens charged", "model", "direction", "provenance")
        self.group_tokens = self._counter(
            "llm_quota_group_tokens",
            "Tokens charged, by the group whose quotas admitted the call",
            *("group", "model", "direction"),
        )
        self.hidden = self._counter(
            "llm_quota_hidden_tokens", "Tokens that calls used beyond their reservation", "model"
        )
        self.unstated = self._counter(
            "llm_quota_answers_without_usage",
            "Complete answers whose upstream did not state what they used, so that the proxy counted",
            *("upstream", "model"),
        )
        self.compared = self._counter(
            "llm_quota_compared_tokens",
            "Output of one complete stream in 16 by the count of the proxy and by that of the upstream",
            *("upstream", "model", "source"),
        )

    def _add_upstreams(self) -> None:
        self.attempts = self._counter(
            "llm_quota_tries",  # an older word for attempts, kept because dashboards use it
            "Attempts at upstreams, by outcome; a call may need several",
            *("upstream", "outcome"),
        )
        self.token_fetches = self._counter(
            "llm_quota_token_fetches", "Fetches of upstreams' keys that are not fixed", *("upstream", "outcome")
        )
        self._cooldown = self._gauge(
            "llm_quota_upstream_cooldown",
            "1 while the upstream is in cooldown, which means that calls avoid it, else 0",
            "livemax",
            ("upstream",),
        )
        self._upstreams: frozenset[str] = frozenset()
        self.upstream_in_flight = self._gauge(
            "llm_quota_upstream_in_flight", "Calls that an upstream has", "livesum", ("upstream",)
        )
        self.upstream_slots_waiting = self._gauge(
            "llm_quota_upstream_slots_waiting",
            "Calls that wait because an upstream has max_in_flight calls; one that waits for several counts at each",
            "livesum",
            ("upstream",),
        )

    def _add_ledger(self) -> None:
        self.ledger_batch = self._histogram(
            "llm_quota_ledger_batch_operations",
            "Operations that one transaction of the ledger has committed",
            _BATCH,
        )
        self.ledger_commit_s = self._histogram(
            "llm_quota_ledger_commit_seconds",
            "How long one transaction of the ledger took, with its commit",
            _COMMIT_S,
        )
        self.ledger_failures = self._counter(
            "llm_quota_ledger_failures",
            "What failed in the ledger: a batch, an operation, a wait, a lease or a sweep",
            "kind",
        )
        for kind in LEDGER_FAILURES:
            self.ledger_failures.new[kind,] = 0  # from 0 on, so that the first failure is an increase
        self.ledger_healthy = self._gauge(
            "llm_quota_ledger_healthy", "1 if the database could be used when it was last asked, else 0", "livemin"
        )
        self.expired = Counter(
            "llm_quota_reservations_expired",
            "Calls of dead processes that this process has charged from their reservations",
            registry=self._registry,
        )
        self.ledger_failovers = Counter(
            "llm_quota_ledger_failovers",
            "How often another server had the database than before, as this process noticed",
            registry=self._registry,
        )
        self.ledger_clock_offset = self._gauge(
            "llm_quota_ledger_clock_offset_seconds",
            "How far the clock that decides about windows (PostgreSQL's) is ahead of this machine's; 0 on SQLite",
            "livemostrecent",  # workers are on one machine, so they measure the same
        )

    def _add_process(self) -> None:
        self.requests_not_logged = Counter(
            "llm_quota_requests_not_logged",
            "Requests without a valid key that got no line in the log, because there were too many of them",
            registry=self._registry,
        )
        self.log_lines_dropped = Counter(
            "llm_quota_log_lines_dropped",
            "Lines of the log that were dropped, because its stream is too slow, full or closed",
            registry=self._registry,
        )
        self.loop_lag_s = self._histogram(
            "llm_quota_event_loop_lag_seconds",
            "How much later than due a timer of the event loop ran, measured four times a second",
            _LAG_S,
        )
        self.reload_failed = self._gauge(
            "llm_quota_reload_failed", "1 if the last reload failed because the file is invalid, else 0", "livemax"
        )
        self.reloaded_at = self._gauge(
            "llm_quota_policy_loaded_timestamp_seconds",
            "When the policy in force was loaded; with several workers, the earliest of these times",
            "livemin",
        )
        self.directory_entries = self._gauge(
            "llm_quota_directory_entries", "Keys and users of the database that are in memory", "livesum", ("kind",)
        )
        self.directory_age = self._gauge(
            "llm_quota_directory_age_seconds",
            "How long ago the database last said, at the latest poll, whether keys or users have changed",
            "livemax",
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counts:
        counts = Counts(Counter(name, text, labels, registry=self._registry))
        self._counted.append(counts)
        return counts

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...], *labels: str) -> Observations:
        histogram = Histogram(name, text, labels, buckets=bounds, registry=self._registry)
        observations = Observations(histogram, bounds)
        self._counted.append(observations)
        return observations

    def _gauge(self, name: str, text: str, of_workers: OfWorkers, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self._registry, multiprocess_mode=of_workers)

    def ledger_clock_differs(self, offset_ms: int) -> None:
        """Note how far the ledger's clock is ahead of this process's, in ms."""
        self.ledger_clock_offset.set(offset_ms / 1000)

    def key_fetched(self, upstream: str, outcome: str) -> None:
        """Count an attempt to fetch the key of an upstream. `outcome` is fetched or failed."""
        self.token_fetches.new[upstream, outcome] += 1

    def ignored(self, reason: str) -> None:
        """Count a request whose identity headers did not count. `reason` is other_key or other_address."""
        self.ignored_headers.new[reason,] += 1

    def refused(self, quota: str, verdict: str, *, model: str) -> None:
        """Count a refused call for one quota that refused it. `verdict` is busy, exhausted or never.

        `model` has to come from a closed list.
        """
        self.refusals.new[quota, verdict] += 1
        self.group_refusals.new[quota.partition("/")[0], model, quota, verdict] += 1

    def ended(
        self,
        *,
        endpoint: str,
        group: str,
        model: str,
        outcome: str | None,
        would_refuse: Iterable[str] = (),
        charged: tuple[str, int, int, int] | None = None,
    ) -> None:
        """Count an admitted call that has ended.

        `group` admitted it, and `model` has to come from a closed list. `would_refuse` has the ids of the quotas with
        `enforce: shadow` that would have refused the call. `charged` has the provenance of its usage, the tokens of
        input and output, and how many of them were beyond its reservation; None: it was charged nothing.
        """
        provenance, input_tokens, output_tokens, hidden = charged or (None, 0, 0, 0)
        sums = self._ended[endpoint, group, model, outcome, provenance]
        sums[0] += 1
        sums[1] += input_tokens
        sums[2] += output_tokens
        sums[3] += hidden
        for quota_id in would_refuse:
            self.shadow_refusals.new[quota_id,] += 1

    def _count_ended(self) -> None:
        """Count the calls that have ended since the last time in each of their metrics."""
        for (endpoint, group, model, outcome, provenance), sums in self._ended.items():
            calls, input_tokens, output_tokens, hidden = sums
            self.calls.new[endpoint, model, outcome] += calls
            self.group_calls.new[group, model, outcome] += calls
            if provenance is not None:
                self.tokens.new[model, "input", provenance] += input_tokens
                self.tokens.new[model, "output", provenance] += output_tokens
                self.group_tokens.new[group, model, "input"] += input_tokens
                self.group_tokens.new[group, model, "output"] += output_tokens
                self.hidden.new[model,] += hidden
        self._ended.clear()

    def answered(self, upstream: str, model: str, *, is_stated: bool, counted: tuple[int, int] | None) -> None:
        """Count a complete answer that generated tokens. `is_stated`: the upstream has stated its usage.

        `counted` is its output by the proxy's count and by the upstream's, where both are known.
        """
        if not is_stated:
            self.unstated.new[upstream, model] += 1
        if counted is not None:
            ours, theirs = counted
            self.compared.new[upstream, model, "proxy"] += ours
            self.compared.new[upstream, model, "upstream"] += theirs

    def set_upstream_load(self, upstream: str, *, in_flight: int, waiting: int) -> None:
        """Note how many calls an upstream has, and how many wait for a slot of it."""
        self.upstream_in_flight.labels(upstream).set(in_flight)
        self.upstream_slots_waiting.labels(upstream).set(waiting)

    def unauthorized(self, reason: str) -> None:
        """Count a request without a valid key. `reason` has to come from a closed list."""
        self.unauthorized_requests.new[reason,] += 1

    def ledger_failed(self, kind: LedgerFailure) -> None:
        """Count a failure of the ledger."""
        self.ledger_failures.new[kind,] += 1

    def set_cooldowns(self, upstreams: Collection[str], *, in_cooldown: Collection[str]) -> None:
        """Note which of the configured upstreams are in cooldown."""
        for name in upstreams:
            self._cooldown.labels(name).set(name in in_cooldown)
        for name in self._upstreams.difference(upstreams):
            for gauge in (self._cooldown, self.upstream_in_flight, self.upstream_slots_waiting):
                # The library can't remove a series from the files of workers.
                if self._folder is None:
                    gauge.remove(name)
                else:
                    gauge.labels(name).set(0)
        self._upstreams = frozenset(upstreams)

    def directory_polled(self, entries: Mapping[str, int], *, age_s: float) -> None:
        """Note how many entries of each kind are remembered, and how old their confirmation is after a poll."""
        for kind, number in entries.items():
            self.directory_entries.labels(kind).set(number)
        self.directory_age.set(age_s)

    def set_policy_hash(self, hash: str) -> None:
        """Note the hash of the policy in force."""
        self._known.policy_hash = hash

    def set_quotas(
        self,
        *,
        pots: Mapping[tuple[str, str], tuple[int, int, int]] | None = None,
        members: Mapping[tuple[str, int], int] | None = None,
    ) -> None:
        """Replace what is stated of quotas; nothing is stated of what is left out.

        `pots` has the limit, what is used and what is held, by quota and measure. `members` has how many members have
        used that many percent of a limit or more, by quota and percentage.
        """
        self._known.pots, self._known.members = pots or {}, members or {}

    def publish(self) -> None:
        """Show other workers what this one has counted. Does nothing without workers.

        At once if no call is in flight, else within 0.1 s, for all calls that end meanwhile: it takes 0.1 ms.
        """
        if self._folder is None:
            return
        if not self.calls_in_flight:
            self._flush()
        elif not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_later(_PUBLISHED_WITHIN_S, self._flush)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        self._flush()
        return generate_latest(self._exposed)

    def _flush(self) -> None:
        self._is_flush_due = False
        self._count_ended()
        self._in_flight.set(self.calls_in_flight)
        for counted in self._counted:
            if counted.new:
                counted.flush()


class _Known(Collector):
    """What each worker and each replica states alike. It is replaced as a whole, so nothing that is gone stays."""

    def __init__(self) -> None:
        self.policy_hash = ""
        self.pots: Mapping[tuple[str, str], tuple[int, int, int]] = {}
        self.members: Mapping[tuple[str, int], int] = {}

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("llm_quota_build_info", "1, with the version of the proxy", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        policy = GaugeMetricFamily(
            "llm_quota_policy_info", "1, with the hash of the policy in force", labels=["hash"]
        )
        if self.policy_hash:
            policy.add_metric([self.policy_hash], 1)
        yield policy
        for position, (name, text) in enumerate(
            (
                ("llm_quota_pot_limit", "The limit of a shared quota, raised by grants"),
                ("llm_quota_pot_used", "What is used of a shared quota in its window"),
                ("llm_quota_pot_held", "What calls in flight hold of a shared quota"),
            )
        ):
            pots = GaugeMetricFamily(name, text, labels=["quota", "measure"])
            for key, numbers in self.pots.items():
                pots.add_metric(key, numbers[position])
            yield pots
        members = GaugeMetricFamily(
            "llm_quota_members_near_limit",
            "How many members have used this percentage of a limit or more, of quotas that count each member",
            labels=["quota", "percent"],
        )
        for (quota, percent), number in self.members.items():
            members.add_metric([quota, str(percent)], number)
        yield members


class _Processes(Collector):
    """CPU, memory and open files of this process, or of all workers of a folder together.

    The start time is the earliest of the workers.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        if self._folder is None:
            return ProcessCollector(registry=None).collect()
        # Each worker has such a file until it has ended.
        names = glob(os.path.join(self._folder, "gauge_livesum_*.db"))
        pids = [os.path.basename(name).removesuffix(".db").rpartition("_")[2] for name in names]
        summed: dict[str, Metric] = {}
        for metric in (
            each for pid in pids for each in ProcessCollector(pid=_constant(pid), registry=None).collect()
        ):
            if metric.name not in summed:
                summed[metric.name] = metric
                continue
            (so_far,), (more,) = summed[metric.name].samples, metric.samples
            is_start = metric.name == "process_start_time_seconds"
            value = min(so_far.value, more.value) if is_start else so_far.value + more.value
            summed[metric.name].samples = [so_far._replace(value=value)]
        return summed.values()


def _constant(pid: str) -> Callable[[], str]:
    return lambda: pid


def remove_gauges(pid: int, folder: str) -> None:
    """Remove the gauges of a worker that has ended. Its counters stay in the sums, which must never decrease."""
    mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
