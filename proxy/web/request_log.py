"""Writes a line to the log for each request, and few lines for requests of clients without a valid key.

Requests to the API listener are also counted here, and calls measured, whether or not they get a line.

A client without a key could fill the disk with lines. So of requests without a user only some are logged: 10 a second
from one address, and 100 a second in all. The others are counted in a metric, and the next line of that address says
how many there were.
"""

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import structlog

from proxy.calls.log_line import LogLine
from proxy.identity.keys import KEY_HEADERS, Headers
from proxy.ledger.entry import call_id_prefix
from proxy.logs import LoggedCalls
from proxy.metrics import Metrics
from proxy.upstreams.headers import NO_HEADERS, trace_id

_LINES_PER_S = 10
_LINES_PER_S_IN_ALL = 100
# A client's id of a request that may be in the log: a UUID, also without its dashes (as nginx writes its ids), or a
# ULID. Any other text may be a name, a key or a prompt.
_CLIENT_REQUEST = re.compile(
    r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}|[0-9A-Fa-f]{32}|[0-7][0-9A-HJKMNP-TV-Z]{25}"
)
# How many addresses are remembered. Behind a load balancer there is one.
_ADDRESSES_MAX = 1024

# What the metrics have instead of a path that is not served. A client without a key could make up any number of them.
_OTHER_PATHS = "other"


@dataclass(slots=True)
class _Budget:
    """How many lines were written in the second that began at `began_s`, and how many requests since had none."""

    began_s: float
    lines: int = 0
    skipped: int = 0

    def takes_line(self, now_s: float, lines_max: int) -> bool:
        """Whether one more line may be written now, which counts it."""
        if now_s - self.began_s >= 1:
            self.began_s, self.lines = now_s, 0
        self.lines += 1
        return self.lines <= lines_max


class RequestLog:
    """Begins and writes the lines. `logged_calls` is the setting in force.

    `clock` gives seconds that only grow, and `now` ms since 1970 by the ledger's clock, with which ids begin.
    """

    def __init__(
        self,
        logged_calls: Callable[[], LoggedCalls],
        *,
        metrics: Metrics,
        clock: Callable[[], float],
        now: Callable[[], int],
    ) -> None:
        self._logged_calls = logged_calls
        self._metrics = metrics
        self._clock = clock
        self._now = now
        self._random = _random_texts()
        self._log = structlog.get_logger("requests").bind()  # once, because it takes longer than to write a line
        self._addresses: OrderedDict[str, _Budget] = OrderedDict()
        self._all = _Budget(0.0)

    def begin(self, endpoint: str, *, address: str, headers: Headers = NO_HEADERS) -> LogLine:
        """The line of a request that begins now, with a new id. `headers` find names in any case."""
        id = call_id_prefix(self._now()) + next(self._random)
        line = LogLine(request_id=id, endpoint=endpoint, address=address, clock=self._clock, began_s=self._clock())
        if "x-request-id" in headers or "traceparent" in headers:
            _note_ids_of_client(line, headers)
        return line

    def write(self, line: LogLine, status: int, *, is_counted: bool = True) -> None:
        """Write the line of a request that was answered with this status, if the setting wants it.

        A refusal is every request that the proxy itself answered with an error. `is_counted` is False for requests to
        the admin listener, which the metrics of users' requests don't have.
        """
        if is_counted:
            self._measure(line, status)
        self._metrics.publish()
        setting = self._logged_calls()
        if setting == "none" or (setting == "refusals" and line.error is None):
            return
        if line.is_identified:
            self._log.info("request", **line.fields(status))
            return
        skipped = self._skipped_before(line)
        if skipped is not None:
            self._log.info("request", **line.fields(status), **({"not_logged": skipped} if skipped else {}))

    def _measure(self, line: LogLine, status: int) -> None:
        metrics = self._metrics
        metrics.requests.new[line.endpoint if line.is_served else _OTHER_PATHS, status] += 1
        if not line.is_call:
            return
        ended_s = self._clock()
        metrics.own_s.observe(line.own_s(ended_s), line.endpoint)
        # An error that comes at once would make an upstream that fails look fast.
        if line.upstream is not None and line.first_byte_s is not None and status < 400:
            metrics.first_byte_s.observe(line.first_byte_s - line.began_s, line.endpoint, line.upstream)
            metrics.duration_s.observe(ended_s - line.began_s, line.endpoint, line.upstream)

    def _skipped_before(self, line: LogLine) -> int | None:
        """How many requests of this address had no line since the last one; None if this one gets no line either."""
        now_s = self._clock()
        budget = self._addresses.pop(line.address, None) or _Budget(now_s)
        self._addresses[line.address] = budget  # the address that was used last is at the end
        if len(self._addresses) > _ADDRESSES_MAX:
            self._addresses.popitem(last=False)
        if not budget.takes_line(now_s, _LINES_PER_S) or not self._all.takes_line(now_s, _LINES_PER_S_IN_ALL):
            budget.skipped += 1
            self._metrics.requests_not_logged.inc()
            return None
        skipped, budget.skipped = budget.skipped, 0
        return skipped


def _random_texts() -> Iterator[str]:
    """Random texts of 80 bits in hex. The system is asked for many at a time, because each question takes a while."""
    while True:
        drawn = os.urandom(2560).hex()
        for start in range(0, len(drawn), 20):
            yield drawn[start : start + 20]


def _note_ids_of_client(line: LogLine, headers: Headers) -> None:
    """Note the client's id of the request and of its trace, if they have the form of one and are not its key."""
    keys = [value for name in KEY_HEADERS if (value := headers.get(name)) is not None]
    trace, id = trace_id(headers), headers.get("x-request-id", "").strip(" \t")
    if trace is not None and not any(trace in key for key in keys):
        line.trace = trace
    if _CLIENT_REQUEST.fullmatch(id) and not any(id in key for key in keys):
        line.client_request = id
