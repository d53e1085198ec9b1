"""A line for each request of a user, and few lines for clients without a valid key."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from multidict import CIMultiDict
from structlog.testing import capture_logs
from yarl import URL

from proxy.calls.log_line import LogLine
from proxy.errors import InvalidKey
from proxy.identity.authentication import Caller
from proxy.logs import LoggedCalls
from proxy.metrics import Metrics
from proxy.policy.key import Key
from proxy.web.request_log import RequestLog
from tests import exposition
from tests.builders import NOON
from tests.stage import STAFF, stage


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


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
UUID, ULID = "4f1c7f6e-8b1d-4B62-9d5e-0d5a6f7b8c9d", "01ARZ3NDEKTSV4RRFFQ69G5FAV"


def _ids(*headers: tuple[str, str]) -> tuple[str | None, str | None]:
    """The trace and the client's id in the line of a request with these headers."""
    line = _log(_Clock()).begin("chat", address="192.0.2.1", headers=CIMultiDict(headers))
    return line.trace, line.client_request


@pytest.mark.parametrize("id", [UUID, UUID.lower(), ULID, UUID.replace("-", "")])
def test_a_client_s_id_of_the_request_is_in_the_line(id: str) -> None:
    """If it has the form of an id, so that a client's log and this one can be joined."""
    assert _ids(("x-request-ID", id)) == (None, id)
    fields = _log(_Clock()).begin("chat", address="192.0.2.1", headers=CIMultiDict({"x-request-id": id})).fields(200)
    assert (fields["client_request"], fields["request"][:4]) == (id, "req_")


@pytest.mark.parametrize(
    "id",
    [
        "",
        "1234",
        "sk-proj-abcdefghijklmnop",
        "llmq_0123456789abcdefghij",
        "the words of a prompt",
        f"{UUID}{UUID}",
        f"{UUID}\n",
        "AKIAIOSFODNN7EXAMPLE",
        "alice@example.com",
        "../../etc/passwd",
        ULID.lower(),
        "81ARZ3NDEKTSV4RRFFQ69G5FAV",
        "\u0660" * 32,
    ],
)
def test_any_other_text_in_the_place_of_an_id_is_not_in_the_line(id: str) -> None:
    """It may be a name, a key or a prompt."""
    assert _ids(("x-request-id", id)) == (None, None)


@pytest.mark.parametrize("header", ["authorization", "api-key", "x-api-key"])
def test_a_key_that_looks_like_an_id_is_not_in_the_line(header: str) -> None:
    """Azure's keys have 32 hexadecimal digits, as ids have."""
    parent = f"00-{TRACE}-00f067aa0ba902b7-01"
    assert _ids(("x-request-id", TRACE), ("traceparent", parent)) == (TRACE, TRACE)
    assert _ids(("x-request-id", TRACE), ("traceparent", parent), (header, f"Bearer {TRACE}")) == (None, None)


def test_only_the_id_of_a_valid_trace_is_in_the_line() -> None:
    """Not the rest of the header, and not what has another form."""
    assert _ids(("TraceParent", f"00-{TRACE}-00f067aa0ba902b7-01"), ("tracestate", "a=b")) == (TRACE, None)
    for parent in (TRACE, f"00-{TRACE}-{'0' * 16}-01", f"00-{'0' * 32}-00f067aa0ba902b7-01"):
        assert _ids(("traceparent", parent)) == (None, None)


async def test_the_line_of_a_call_whose_client_left_says_when(tmp_path: Path) -> None:
    """The call itself goes on, because its upstream bills it."""
    message = {"role": "user", "content": "Hello"}
    ask = {"model": "fast", "messages": [message], "stream": True, "metadata": {"simulate": "tokens=40 speed=400"}}
    async with stage(folder=tmp_path) as on:
        with capture_logs() as logged:
            call = on.begin("/v1/chat/completions", ask)
            await on.simulator.until(lambda: on.simulator.chunks_sent >= 3)
            await on.hang_up(call)
            await on.all_settled()
        (line,) = [each for each in logged if each["event"] == "request"]
        assert (line["outcome"], line["status"], line["attempts"]) == ("client_left", 200, 1)
        assert line["first_byte_ms"] < line["left_ms"] <= line["total_ms"]


async def test_a_refused_call_says_how_long_it_waited_and_has_no_upstream(tmp_path: Path) -> None:
    """And no time at which it was admitted."""
    async with stage(STAFF.replace("requests: 100k", "requests: 0"), folder=tmp_path) as on:
        with capture_logs() as logged:
            assert (await on.post("/v1/chat/completions", {"model": "fast", "messages": []})).status == 429
        (line,) = [each for each in logged if each["event"] == "request"]
        assert line["waited_ms"] >= 0
        assert (line["stream"], line["model"]) == (False, "fast")
        assert not {"attempts", "upstream", "admitted_ms", "held_tokens"} & line.keys()


def test_every_request_is_counted_by_endpoint_and_status() -> None:
    """Whether it has a line or not. Requests to the admin listener are not among those of users."""
    metrics = Metrics()
    log = _log(lambda: 5.5, setting="none", metrics=metrics)
    for number in range(30):
        log.write(_line(f"req_{number}", 5.0), 401)
    log.write(_line("ok", 5.0, user="alice"), 200)
    log.write(_line("admin", 5.0), 401, is_counted=False)
    found = exposition.Metrics.of(metrics.exposition().decode())
    assert found.by("llm_quota_requests_total", "endpoint", "status") == {("chat", "401"): 30, ("chat", "200"): 1}


async def test_paths_that_are_not_served_have_one_series(tmp_path: Path) -> None:
    """Known words can be put together in any number of ways, also by a client without a key."""
    paths = ["/v1/models/models", *("/" * length + "v1/models" for length in range(2, 9)), "/v1" * 500, "/v1/files/x"]
    async with stage(folder=tmp_path) as on:
        with capture_logs() as logged:
            for path in paths:
                async with on.http.get(URL(on.url + path, encoded=True)):
                    pass
        metrics = exposition.Metrics.of(on.server.metrics.exposition().decode())
    assert metrics.by("llm_quota_requests_total", "endpoint") == {"GET /v1/models/{model}": 1, "other": 9}
    assert max(len(line["endpoint"]) for line in logged if line["event"] == "request") < 40


def test_the_times_of_a_call_are_measured() -> None:
    """Of an error, which may come at once, only the proxy's own part. Nothing of a request that is no call."""
    clock, metrics = _Clock(), Metrics()
    log = _log(clock, metrics=metrics)
    for status in (200, 502):
        clock.now_s = 100.0
        line = log.begin("chat", address="192.0.2.1")
        line.is_call, line.upstream = True, "box"
        clock.now_s = 100.25
        line.mark_sent()
        clock.now_s = 103.0
        line.mark_first_byte(status)
        clock.now_s = 104.5
        line.mark_answered()
        clock.now_s = 105.0
        log.write(line, status)
    log.write(log.begin("GET /v1/models", address="192.0.2.1"), 200)
    found = exposition.Metrics.of(metrics.exposition().decode())
    assert found.by("llm_quota_first_byte_seconds_sum", "endpoint", "upstream") == {("chat", "box"): 3.0}
    assert found.by("llm_quota_duration_seconds_sum", "endpoint", "upstream") == {("chat", "box"): 5.0}
    assert found.by("llm_quota_own_seconds_sum", "endpoint") == {"chat": 1.5}
    assert found.by("llm_quota_own_seconds_count", "endpoint") == {"chat": 2}
