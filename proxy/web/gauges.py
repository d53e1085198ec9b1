"""Measures for the metrics what nothing else counts: the queue, upstreams, the event loop, and the use of quotas.

Nothing is measured while Prometheus asks: the use of quotas is a query over all counters, and whoever can reach
`/metrics` could otherwise run it at will.
"""

import asyncio
from collections.abc import Callable

import structlog

from proxy.administration.levels import levels
from proxy.calls.dispatch import Dispatcher
from proxy.config.reload import Policies
from proxy.errors import LedgerUnavailable
from proxy.identity.authentication import Snapshot
from proxy.ledger.queue import AdmissionQueue
from proxy.logs import lines_dropped
from proxy.web.live import Job

_PROCESS_EVERY_S = 1.0
_LOOP_EVERY_S = 0.25
_QUOTAS_EVERY_S = 30.0
# How long the database may take for the use of quotas. With 100,000 counters it takes a tenth of a second.
_QUOTAS_S = 5.0

log = structlog.get_logger("gauges")


class Gauges:
    """Measures one process into its metrics. `now` is the clock of the cooldowns, in ms since 1970."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        queue: AdmissionQueue,
        policies: Policies[Snapshot],
        *,
        now: Callable[[], int],
    ) -> None:
        self._metrics = dispatcher.metrics
        self._cooldowns = dispatcher.cooldowns
        self._slots = dispatcher.slots
        self._queue = queue
        self._policies = policies
        self._now = now
        self._dropped = lines_dropped()
        self._slept_at: float | None = None
        self._is_unavailable = False

    def jobs(self) -> tuple[Job, ...]:
        """What has to be run again and again."""
        return (
            Job("measure process", self.measure_process, _PROCESS_EVERY_S),
            Job("measure event loop", self._measure_loop, _LOOP_EVERY_S),
            Job("measure quotas", self.measure_quotas, _QUOTAS_EVERY_S),
        )

    async def measure_process(self) -> None:
        """Measure what this process knows."""
        metrics, ledger = self._metrics, self._queue.ledger
        metrics.waiting.set(len(self._queue))
        metrics.ledger_healthy.set(ledger.is_healthy)
        upstreams = self._policies.current.catalog.upstreams
        metrics.set_cooldowns(upstreams, in_cooldown=self._cooldowns.until(self._now()))
        for name, load in self._slots.loads().items():
            if name in upstreams:
                metrics.set_upstream_load(name, in_flight=load.in_flight, waiting=load.waiting)
        dropped = max(self._dropped, lines_dropped())
        metrics.log_lines_dropped.inc(dropped - self._dropped)
        self._dropped = dropped
        metrics.publish()

    async def _measure_loop(self) -> None:
        # The job is run _LOOP_EVERY_S after it last ended. What it took longer is how late the loop was.
        now_s = asyncio.get_running_loop().time()
        if self._slept_at is not None:
            self._metrics.loop_lag_s.observe(max(0.0, now_s - self._slept_at - _LOOP_EVERY_S))
        self._slept_at = now_s

    async def measure_quotas(self) -> None:
        """Measure the use of the quotas of the policy in force. If the database can't be asked, nothing is stated."""
        ledger, policy = self._queue.ledger, self._policies.current.policy
        try:
            async with asyncio.timeout(_QUOTAS_S), ledger.read() as connection:
                found = await levels(connection, policy, ledger.now())
        except (LedgerUnavailable, TimeoutError) as error:
            self._metrics.set_quotas()
            if not self._is_unavailable:
                log.warning("the use of quotas can't be measured", error=type(error).__name__)
            self._is_unavailable = True
        else:
            self._metrics.set_quotas(pots=found.pots, members=found.members)
            self._is_unavailable = False
