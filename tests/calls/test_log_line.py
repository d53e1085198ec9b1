"""What the log says of a request: never a key, and nothing that a client may have written at length."""

import inspect
import re
from dataclasses import dataclass, replace
from pathlib import Path

from proxy.calls.log_line import LogLine
from proxy.errors import InvalidRequest, Refusal
from proxy.formats.restrictions import PARAMETERS
from proxy.identity.authentication import Caller
from proxy.ledger.entry import CallLabels, Entry
from proxy.policy.amounts import Amount, Exactly, Tokens
from proxy.policy.key import Key
from tests.builders import log_line

ROOT = Path(__file__).resolve().parents[2]
ENTRY = Entry("req_7", "p1", CallLabels("alice", "fast", "chat", "openai"), "staff", 0, Amount(30, 10), None, ())


@dataclass
class Clock:
    """Seconds that only the test changes."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def _call() -> tuple[LogLine, Clock]:
    clock = Clock(100.0)
    line = log_line("req_7", clock=clock)
    line.endpoint, line.model = "chat", "fast"
    line.caller = Caller("alice", ("staff",), Key("01234567"), source="file")
    return line, clock


def test_a_call_has_its_tokens_and_its_times() -> None:
    """The time in which an upstream had the call is not the proxy's own."""
    line, clock = _call()
    clock.now_s = 100.004
    line.asked_s = clock.now_s
    clock.now_s = 100.010
    line.mark_admitted(ENTRY)
    line.mark_sent()
    line.mark_failed("azure")
    clock.now_s = 100.300
    line.mark_sent()  # a second attempt: the time of the first one counts
    line.mark_failed("box")
    clock.now_s = 100.400
    line.mark_first_byte(200)
    clock.now_s = 100.500
    line.mark_first_byte(200)
    clock.now_s = 101.000
    line.mark_answered()
    clock.now_s = 101.005
    line.upstream, line.outcome, line.stream = "openai", "complete", True
    line.usage = Exactly(Tokens(11, 5, cached=8, reasoning=2))
    assert line.fields(200) == {
        "request": "req_7",
        "endpoint": "chat",
        "status": 200,
        "user": "alice",
        "key": "01234567",
        "source": "file",
        "group": "staff",
        "model": "fast",
        "stream": True,
        "upstream": "openai",
        "attempts": 2,
        "failed_first": "azure",
        "outcome": "complete",
        "input_tokens": 11,
        "output_tokens": 5,
        "cached_tokens": 8,
        "reasoning_tokens": 2,
        "provenance": "exactly",
        "held_tokens": 40,
        "total_ms": 1005.0,
        "admitted_ms": 10.0,
        "waited_ms": 6.0,
        "first_byte_ms": 400.0,
        "own_ms": 15.0,
    }


def test_an_upstream_that_did_not_end_its_answer_had_the_call_to_the_end() -> None:
    """So the time until the request ended is not counted as the proxy's own."""
    line, clock = _call()
    clock.now_s = 100.002
    line.mark_sent()
    clock.now_s = 130.0
    assert line.fields(502)["own_ms"] == 2.0


def test_a_refusal_names_the_quotas_and_says_when_to_come_back() -> None:
    """The verdict tells a used-up quota from one that calls in flight hold."""
    line, _ = _call()
    line.refused_by, line.verdict = ["staff/daily"], "exhausted"
    line.error = Refusal(
        "Quota …", type="tokens", code="rate_limit_exceeded", headers={"retry-after": "7"}, members={}
    )
    fields = line.fields(429)
    assert (fields["refused_by"], fields["verdict"]) == (["staff/daily"], "exhausted")
    assert (fields["code"], fields["retry_after"]) == ("rate_limit_exceeded", "7")


def test_a_client_that_left_has_the_time_and_how_long_its_call_had_waited() -> None:
    """A call that was never decided has waited until it ended."""
    line, clock = _call()
    clock.now_s = 100.5
    line.asked_s = clock.now_s
    clock.now_s = 102.0
    line.mark_left()
    clock.now_s = 102.25
    line.mark_left()  # what is done about it comes later
    fields = line.fields(499)
    assert (fields["left_ms"], fields["waited_ms"], fields["total_ms"]) == (2000.0, 1750.0, 2250.0)
    assert not {"attempts", "admitted_ms", "upstream", "held_tokens"} & fields.keys()


def test_the_model_s_name_at_the_upstream_is_there_if_it_is_another() -> None:
    """Most are the same."""
    line, _ = _call()
    line.upstream_model = "fast"
    assert "upstream_model" not in line.fields(200)
    line.upstream_model, line.entry = "gpt-4o-mini", replace(ENTRY, would_refuse=("staff/trial",))
    fields = line.fields(200)
    assert (fields["upstream_model"], fields["would_refuse"]) == ("gpt-4o-mini", ["staff/trial"])


def test_the_documentation_describes_each_member() -> None:
    """And none that no line has."""
    (members,) = re.findall(r"members = \{(.*?)\n        \}", inspect.getsource(LogLine.fields), re.DOTALL)
    written = set(re.findall(r'^ +"(\w+)":', members, re.MULTILINE))
    assert {"request", "address", "own_ms", "trace"} <= written
    _, _, logs = (ROOT / "docs" / "running.md").read_text(encoding="utf-8").partition("\n## Logs\n")
    table = [line for line in logs.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    described = [name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(described) == sorted({*written, "not_logged"})


def test_a_request_without_a_user_has_its_address() -> None:
    """It has no key: one that is not known here may be valid elsewhere."""
    fields = log_line("req_8").fields(401)
    assert fields["address"] == "192.0.2.1"
    assert not {"user", "key", "group", "model"} & fields.keys()
    assert "address" not in _call()[0].fields(200)


def test_texts_of_a_client_are_left_out() -> None:
    """The message of an error repeats them, and a parameter may be the name of a field that a client made up."""
    line, _ = _call()
    line.error = InvalidRequest('Write "x" and not "my secret".', param="my secret [0]")
    fields = line.fields(400)
    assert "param" not in fields
    assert "secret" not in str(fields)
    line.error = InvalidRequest("…", param="mock_sk-abcdefghijklmnop")
    assert "param" not in line.fields(400)
    line.error = InvalidRequest("…", param="stream_options.include_usage", code="invalid_type")
    assert line.fields(400)["param"] == "stream_options.include_usage"


def test_every_parameter_that_the_proxy_names_may_be_shown() -> None:
    """The list is closed, so one that is missing would never be in the log."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "proxy").rglob("*.py")]
    named = {name for text in sources for name in re.findall(r'\bparam="([^"{]*)"', text)}
    assert not named - PARAMETERS
