"""A line for each request of a user, and few lines for clients without a valid key."""

from collections.abc import Callable
from typing import Any

from structlog.testing import capture_logs

from proxy.calls.log_line import LogLine
from proxy.errors import InvalidKey
from proxy.identity.authentication import Caller
from proxy.logs import LoggedCalls
from proxy.metrics import Metrics
from proxy.policy.key import Key
from proxy.web.request_log import RequestLog
from tests.builders import NOON


class _Clock:
    """Seconds that only the test changes."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _line(request_id: str, now_s: float, *, address: str = "192.0.2.1", user: str | None = None) -> LogLine:
    caller = None if user is None else Caller(user, (), Key("abababab"), source="file")
    error = None if user else InvalidKey("No.")
    return LogLine(
        request_id=request_id,
        endpoint="chat",
        address=address,
        clock=lambda: now_s,
        began_s=now_s,
        caller=caller,
        error=error,
    )


def _log(clock: Callable[[], float], *, setting: LoggedCalls = "all", metrics: Metrics | None = None) -> RequestLog:
    return RequestLog(lambda: setting, metrics=metrics or Metrics(), clock=clock, now=lambda: NOON)


def _written(setting: LoggedCalls, lines: list[tuple[LogLine, int]]) -> list[Any]:
    clock = _Clock()
    log = _log(clock, setting=setting)
    with capture_logs() as logged:
        for line, status in lines:
            clock.now_s = line.began_s
            log.write(line, status)
    return logged


def test_every_request_of_a_user_has_a_line() -> None:
    """However many there are in a second: each is a call that somebody pays for."""
    lines = [(_line(f"req_{number}", 5.0, user="alice"), 200) for number in range(50)]
    assert [line["request"] for line in _written("all", lines)] == [f"req_{number}" for number in range(50)]


def test_ten_requests_a_second_of_an_address_without_a_key_have_a_line() -> None:
    """The next line says how many had none. Another address has lines of its own."""
    flood = [(_line(f"req_{number}", 5.0 + number / 100), 401) for number in range(40)]
    others = [(_line("other", 5.5, address="192.0.2.2"), 401), (_line("later", 6.1), 401), (_line("next", 6.2), 401)]
    written = _written("all", flood + others)
    assert [line["request"] for line in written] == [
        *(f"req_{number}" for number in range(10)),
        "other",
        "later",
        "next",
    ]
    assert [line.get("not_logged") for line in written[-3:]] == [None, 30, None]


def test_many_addresses_without_a_key_have_a_hundred_lines_a_second() -> None:
    """A client with a network of its own has millions of addresses. Only the last ones are remembered.

    A metric counts those without a line, because an address that is forgotten has no next line to say so.
    """
    flood = [(_line(f"req_{number}", 5.5, address=f"2001:db8::{number:x}"), 401) for number in range(3000)]
    metrics = Metrics()
    log = _log(lambda: 5.5, metrics=metrics)
    with capture_logs() as written:
        for line, status in flood:
            log.write(line, status)
    assert len(written) == 100
    assert len(log._addresses) == 1024
    assert b"\nllm_quota_requests_not_logged_total 2900.0\n" in metrics.exposition()


def test_the_setting_says_which_requests_have_a_line() -> None:
    """A refusal is any request that the proxy itself answers with an error."""
    ok, refused = _line("ok", 5.0, user="alice"), _line("refused", 5.0)
    lines = [(ok, 200), (refused, 401)]
    assert [line["request"] for line in _written("all", lines)] == ["ok", "refused"]
    assert [line["request"] for line in _written("refusals", lines)] == ["refused"]
    assert _written("none", lines) == []


def test_a_line_begins_with_the_request() -> None:
    """Its times count from there."""
    clock = _Clock()
    clock.now_s = 7.0
    line = _log(clock).begin("GET /v1/models", address="192.0.2.1")
    clock.now_s = 7.25
    assert line.fields(200)["total_ms"] == 250.0
    assert line.request_id.startswith("req_")
