"""The error of a refused call, word for word: its reset is true, and clients can act on it."""

import json
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ExceedsQuota, NeverFits, ProxyError, Refusal
from proxy.formats.endpoints import (
    CHAT,
    COMPACT,
    COMPLETIONS,
    IMAGES,
    MESSAGES,
    RESPONSES,
    SPEECH,
    Endpoint,
)
from proxy.formats.refusal import never_fits, refusal
from proxy.formats.request import parse_request
from proxy.policy.admission import Admitted, NotAdmitted, Verdict, decide
from proxy.policy.amounts import Amount
from proxy.policy.binding import Binding
from proxy.policy.catalog import Model, Upstream
from proxy.policy.quota import Counter, CounterKey, Demand
from proxy.policy.status import quota_statuses, seconds_up
from proxy.policy.windows import Window
from tests.builders import (
    DAY,
    HOUR,
    MINUTE,
    NOON,
    binding,
    call,
    counters,
    policy,
    quota,
)
from tests.random_rules import bindings, counters_of, demands

BERLIN = ZoneInfo("Europe/Berlin")
HELP = "https://llm.example/usage"
MODEL = Model("m", Upstream("up", "http://upstream.example/v1", None), "m")

# Five hours and twelve minutes before midnight in Berlin.
AFTERNOON = round(datetime.fromisoformat("2026-11-23T18:48:00+01:00").timestamp() * 1000)
DAILY = quota("staff/daily", tokens=200_000, zone="Europe/Berlin")


def refused(
    who: Binding,
    demand: Demand,
    found: dict[CounterKey, Counter],
    now: int,
    *,
    endpoint: str = "chat",
    help: str = "",
) -> ProxyError:
    """The error that this call gets."""
    decision = decide(demand, who, found, now)
    assert isinstance(decision, NotAdmitted)
    if decision.verdict is Verdict.NEVER:
        return never_fits(decision, parse_request(CHAT, b'{"model": "m", "messages": []}'), MODEL, help=help)
    statuses = quota_statuses(who, found, now)
    return refusal(decision, statuses, policy=policy(zone=BERLIN, help=help), endpoint=endpoint, now=now, busy_s=2)


def used_up(per: str, wait_ms: int, **limits: int) -> tuple[Binding, dict[CounterKey, Counter]]:
    """A quota that is used up at NOON and resets `wait_ms` later, with its counter."""
    one = quota("staff/short", per=per, **limits)
    used = Amount(max(limits.get("tokens", 0), limits.get("input_tokens", 0)), limits.get("output_tokens", 0), 9)
    who = binding([one])
    return who, {one.key_for(who.user): Counter(Window(NOON + wait_ms - one.per.length_ms, NOON + wait_ms), used)}


# -------------------------------------------------------------------------------------------- refusals, word for word


def test_the_whole_refusal_of_a_used_up_quota():
    """Status, headers and body, to the letter."""
    who = binding([DAILY])
    error = refused(
        who, call(100, 400), counters(who, used={DAILY.id: 200_000}, opened=AFTERNOON), AFTERNOON, help=HELP
    )
    assert isinstance(error, Refusal)
    assert error.status == 429
    assert error.headers == {"retry-after": "18720", "x-should-retry": "false"}
    assert error.body() == {
        "error": {
            "message": 'Quota "staff/daily" is used up: 200000 of 200000 tokens. '
            "Resets at 2026-11-24T00:00:00+01:00 (in 5h 12m). https://llm.example/usage",
            "type": "insufficient_quota",
            "param": None,
            "code": "insufficient_quota",
            "quota": "staff/daily",
            "help": "https://llm.example/usage",
            "help_url": "https://llm.example/usage",
            "reset_at": "2026-11-24T00:00:00+01:00",
            "resets_at": 1795474800,
            "retry_after": 18720,
            "quotas": [
                {
                    "id": "staff/daily",
                    "group": "staff",
                    "models": ["*"],
                    "shared": False,
                    "enforce": "exact",
                    "window": {
                        "kind": "calendar",
                        "per": "day",
                        "opened_at": 1795388400,
                        "resets_at": 1795474800,
                        "reset_at": "2026-11-24T00:00:00+01:00",
                    },
                    "tokens": {"limit": 200_000, "used": 200_000, "held": 0, "remaining": 0, "percent": 100.0},
                    "input_tokens": None,
                    "output_tokens": None,
                    "requests": None,
                    "near": True,
                    "grants": [],
                }
            ],
        }
    }
    assert json.loads(json.dumps(error.body())) == error.body()


@pytest.mark.parametrize(
    ("limits", "used", "held", "demand", "sentence"),
    [
        pytest.param(
            {"tokens": 1000},
            1000,
            0,
            call(100, 400),
            "is used up: 1000 of 1000 tokens. Resets at 2026-11-25T01:00:00+01:00 (in 12h).",
            id="used up",
        ),
        pytest.param(
            {"tokens": 1000},
            1416,
            0,
            call(100, 400),
            "is used up: 1416 of 1000 tokens. Resets at 2026-11-25T01:00:00+01:00 (in 12h).",
            id="used up, and above the limit",
        ),
        pytest.param(
            {"requests": 3},
            Amount(requests=3),
            0,
            call(100, 400),
            "is used up: 3 of 3 requests. Resets at 2026-11-25T01:00:00+01:00 (in 12h).",
            id="used up, requests",
        ),
        pytest.param(
            {"tokens": 1000},
            700,
            0,
            call(100, 316),
            "has 300 tokens left and this call may need 416. Resets at 2026-11-25T01:00:00+01:00 (in 12h).",
            id="some left",
        ),
        pytest.param(
            {"input_tokens": 1000},
            950,
            0,
            call(100, 400),
            "has 50 input tokens left and this call may need 100. Resets at 2026-11-25T01:00:00+01:00 (in 12h).",
            id="some left, input",
        ),
        pytest.param(
            {"output_tokens": 2000},
            Amount(0, 1500, 1),
            0,
            call(100, 4096),
            "has 500 output tokens left and this call may need 1024. Resets at 2026-11-25T01:00:00+01:00 (in 12h).",
            id="some left, output: the smallest answer is needed, not the largest",
        ),
        pytest.param(
            {"tokens": 1000},
            300,
            416,
            call(100, 316),
            "is busy: calls in flight hold 416 tokens, and what is left is too little for this call until they end. "
            "Try again in 2 s.",
            id="busy",
        ),
        pytest.param(
            {"requests": 3},
            Amount(requests=1),
            Amount(requests=2),
            call(100, 316),
            "is busy: calls in flight hold 2 requests, and what is left is too little for this call until they end. "
            "Try again in 2 s.",
            id="busy, requests",
        ),
    ],
)
def test_each_kind_of_refusal_has_its_own_sentence(limits, used, held, demand, sentence):
    """Used up, some left but too little, busy: each names the quota, the amounts, and when to come back."""
    who = binding([quota("staff/daily", **limits)])
    error = refused(who, demand, counters(who, used={"staff/daily": used}, held={"staff/daily": held}), NOON)
    assert error.message == f'Quota "staff/daily" {sentence}'
    assert error.status == 429


@pytest.mark.parametrize(
    ("limits", "demand", "sentence"),
    [
        (
            {"tokens": 1000},
            call(901, 400),
            'it needs at least 1301 tokens, and quota "staff/daily" allows 1000 per 6h.',
        ),
        (
            {"input_tokens": 1000},
            call(1001, 1),
            'it needs at least 1001 input tokens, and quota "staff/daily" allows 1000 per 6h.',
        ),
    ],
)
@pytest.mark.parametrize("endpoint", ["chat", "responses"])
def test_a_call_that_never_fits_is_a_400_that_makes_agents_compact(limits, demand, sentence, endpoint):
    """The code is `context_length_exceeded`. There is no time to come back at, because no reset would help."""
    who = binding([quota("staff/daily", per="6h", **limits)])
    error = refused(who, demand, {}, NOON, endpoint=endpoint, help=HELP)
    assert isinstance(error, NeverFits)
    assert error.headers == {}
    assert error.body() == {
        "error": {
            "message": f"This call can never fit: {sentence} Shorten the input. {HELP}",
            "type": "invalid_request_error",
            "param": None,
            "code": "context_length_exceeded",
            "quota": "staff/daily",
            "help": HELP,
            "help_url": HELP,
        }
    }


NEEDS = 'it needs at least {} tokens, and quota "staff/daily" allows 1000 per 6h.'
MAY_TAKE = '{} may take {} tokens, and quota "staff/daily" allows 1000 per 6h.'


@pytest.mark.parametrize(
    ("endpoint", "fields", "answer", "param", "sentence"),
    [
        (CHAT, {}, 2000, "max_completion_tokens", f"{NEEDS} Set max_completion_tokens to a smaller number."),
        (CHAT, {"max_tokens": 2000}, 2000, "max_tokens", f"{NEEDS} Set max_tokens to a smaller number."),
        (COMPLETIONS, {"max_tokens": 2000}, 2000, "max_tokens", f"{NEEDS} Set max_tokens to a smaller number."),
        (RESPONSES, {}, 2000, "max_output_tokens", f"{NEEDS} Set max_output_tokens to a smaller number."),
        (MESSAGES, {"max_tokens": 2000}, 2000, "max_tokens", f"{NEEDS} Set max_tokens to a smaller number."),
        (CHAT, {"n": 4}, 2000, "n", f"{NEEDS} Ask for fewer answers with n."),
        (CHAT, {"n": 2}, 2000, "max_completion_tokens", f"{NEEDS} Set max_completion_tokens to a smaller number."),
        (COMPLETIONS, {"n": 2, "best_of": 4}, 2000, "best_of", f"{NEEDS} Ask for fewer answers with best_of."),
        (COMPLETIONS, {"prompt": ["a"] * 9}, 1800, "prompt", f"{NEEDS} Ask for fewer answers with prompt."),
        (
            MESSAGES,
            {"max_tokens": 3000, "thinking": {"type": "enabled", "budget_tokens": 2000}},
            2100,
            "thinking.budget_tokens",
            f"{NEEDS} Lower thinking.budget_tokens.",
        ),
        (
            CHAT,
            {"reasoning": {"max_tokens": 2000}},
            2100,
            "reasoning.max_tokens",
            f"{NEEDS} Lower reasoning.max_tokens.",
        ),
        (IMAGES, {"n": 3}, 2100, "n", MAY_TAKE.replace("{}", "3 images", 1) + " Ask for fewer images with n."),
        (
            IMAGES,
            {"n": 3},
            24_576,
            "model",
            MAY_TAKE.replace("{}", "3 images", 1) + " No field of the request makes it smaller. Use another model.",
        ),
        (
            IMAGES,
            {},
            8192,
            "model",
            MAY_TAKE.replace("{}", "an image", 1) + " No field of the request makes it smaller. Use another model.",
        ),
        (
            SPEECH,
            {"voice": "alloy"},
            6144,
            "model",
            MAY_TAKE.replace("{}", "its answer", 1) + " No field of the request makes it smaller. Use another model.",
        ),
        (
            COMPACT,
            {},
            8192,
            "model",
            MAY_TAKE.replace("{}", "its answer", 1) + " No field of the request makes it smaller. Use another model.",
        ),
    ],
)
def test_a_call_whose_answer_never_fits_is_a_400_that_names_the_field(
    endpoint: Endpoint, fields: dict[str, object], answer: int, param: str, sentence: str
) -> None:
    """The code is `exceeds_quota`, at which agents do not shorten their input, because that would be in vain."""
    content = {"messages": [], "input": "x"} | ({} if endpoint.is_of_responses else {"prompt": "x"})
    request = parse_request(endpoint, json.dumps({"model": "m", **content, **fields}).encode())
    decision = decide(call(10, answer, answer), binding([quota("staff/daily", per="6h", tokens=1000)]), {}, NOON)
    assert isinstance(decision, NotAdmitted)
    error = never_fits(decision, request, MODEL, help=HELP)
    needed = answer + 10 if sentence.startswith("it needs") else answer
    assert isinstance(error, ExceedsQuota)
    assert (error.status, error.headers) == (400, {})
    assert error.body() == {
        "error": {
            "message": f"This call can never fit: {sentence.format(needed)} {HELP}",
            "type": "invalid_request_error",
            "param": param,
            "code": "exceeds_quota",
            "quota": "staff/daily",
            "help": HELP,
            "help_url": HELP,
        }
    }


def test_an_answer_that_is_too_long_goes_before_an_input_that_was_not_counted() -> None:
    """The bytes of the input are more than a limit, but they are only counted if that could make a difference."""
    who = binding([quota("staff/daily", tokens=1000, output_tokens=500)])
    error = refused(who, call(960, 600, 600), {}, NOON)
    assert isinstance(error, ExceedsQuota)
    assert error.message.startswith("This call can never fit: it needs at least 600 output tokens")


def test_a_quota_that_is_switched_off_promises_no_reset():
    """A limit of 0 admits nothing after its reset either, so no instant is stated and no retry is suggested."""
    who = binding([quota("staff/off", tokens=0)])
    error = refused(who, call(100, 400), {}, NOON)
    assert "staff/off" in error.message
    assert "Resets at" not in error.message
    assert "Try again" not in error.message
    assert error.status == 429
    assert error.headers["x-should-retry"] == "false"
    assert "retry-after" not in error.headers


def test_without_help_nothing_is_appended():
    """The message ends with the sentence, and `help` and `help_url` are null."""
    who, found = used_up("6h", HOUR, tokens=100)
    error = refused(who, call(1, 1), found, NOON)
    assert error.message.endswith("(in 1h).")
    assert (error.members["help"], error.members["help_url"]) == (None, None)


@pytest.mark.parametrize(
    ("help", "link"),
    [
        ("https://llm.example/usage", "https://llm.example/usage"),
        ("https://llm.example/usage · #llm-help", "https://llm.example/usage"),
        ("See HTTPS://llm.example/a?b=c#d.", "HTTPS://llm.example/a?b=c#d"),
        ("Ask here (http://wiki/llm), or call 12345!", "http://wiki/llm"),
        ('<a href="https://llm.example/">help</a>', "https://llm.example/"),
        ("This is the demo: restart it for fresh quotas.", None),
        ("Ask #llm-help, or ftp://old.example/x", None),
        ("https://", None),
    ],
)
@pytest.mark.parametrize("tokens", [1000, 2000])
def test_help_is_the_text_and_help_url_the_link_in_it(help, link, tokens):
    """For a quota that is used up (429), and for a call that can never fit (400)."""
    who = binding([quota("staff/daily", tokens=tokens)])
    error = refused(who, call(1500, 1), counters(who, used={"staff/daily": 1000}), NOON, help=help)
    assert error.status == (400 if tokens == 1000 else 429)
    assert error.message.endswith(f" {help}")
    assert (error.members["quota"], error.members["help"], error.members["help_url"]) == ("staff/daily", help, link)


def test_the_quota_that_lasts_longest_is_named():
    """If an hourly and a weekly quota are both used up, the weekly one decides when this call would be admitted."""
    hourly, weekly = quota("staff/hourly", tokens=10, per="hour"), quota("staff/weekly", tokens=10, per="week")
    for quotas in ([hourly, weekly], [weekly, hourly]):
        who = binding(quotas)
        error = refused(who, call(1, 1), counters(who, used={each.id: 10 for each in quotas}), NOON)
        assert error.message.startswith('Quota "staff/weekly" is used up')
        assert error.members["quota"] == "staff/weekly"
        assert error.members["reset_at"] == "2026-11-30T01:00:00+01:00"
        assert [each["id"] for each in error.members["quotas"]] == [each.id for each in quotas]


def test_a_refusal_lists_all_quotas_except_shadow_quotas():
    """Those of everyone and of each group, as in `/v1/quota`. A shadow quota refuses nothing, so it is left out."""
    everyone, shadow = quota("everyone/calls", requests=5), quota("staff/new", tokens=1, enforce="shadow")
    who = binding([DAILY], [quota("team/pot", tokens=1, shared=True)], always=[everyone], shadows=[shadow])
    found = counters(who, used={"everyone/calls": Amount(requests=5), "staff/new": 70})
    error = refused(who, call(1, 1), found, NOON)
    assert [each["id"] for each in error.members["quotas"]] == ["everyone/calls", "staff/daily", "team/pot"]
    assert error.members["quotas"] == [
        quota_statuses(who, found, NOON)[each.id].as_json(BERLIN) for each in who.quotas[:3]
    ]


# ---------------------------------------------------------------- the wait, and the type and code that follow from it


@pytest.mark.parametrize(
    ("wait_ms", "retry_after", "is_soon"),
    [
        (1, "1", True),
        (999, "1", True),
        (1000, "1", True),
        (1001, "2", True),
        (18_642, "19", True),
        (59_000, "59", True),
        (59_001, "60", True),
        (60_000, "60", True),
        (60_001, "61", False),
        (61_000, "61", False),
        (5 * HOUR + 12 * MINUTE, "18720", False),
        (31 * DAY, "2678400", False),  # above 2**31 ms the timers of openai-js overflow, so it must not retry
    ],
)
@pytest.mark.parametrize(
    ("endpoint", "limits", "soon", "long"),
    [
        ("chat", {"tokens": 100}, "tokens", "insufficient_quota"),
        ("completions", {"input_tokens": 100}, "tokens", "insufficient_quota"),
        ("chat", {"output_tokens": 100}, "tokens", "insufficient_quota"),
        ("embeddings", {"requests": 9}, "requests", "insufficient_quota"),
        ("responses", {"tokens": 100}, "tokens", "usage_limit_reached"),
        ("responses", {"requests": 9}, "requests", "usage_limit_reached"),
    ],
)
def test_type_and_code_follow_the_length_of_the_wait(wait_ms, retry_after, is_soon, endpoint, limits, soon, long):
    """Up to a minute SDKs sleep and retry. For a longer wait they are told not to retry (T72)."""
    who, found = used_up("60d", wait_ms, **limits)
    error = refused(who, call(1, 1), found, NOON, endpoint=endpoint)
    assert isinstance(error, Refusal)
    error.headers.pop("x-codex-promo-message", None)
    assert error.headers == {"retry-after": retry_after} | ({} if is_soon else {"x-should-retry": "false"})
    assert (error.type, error.code) == ((soon, "rate_limit_exceeded") if is_soon else (long, "insufficient_quota"))
    assert error.members["retry_after"] == int(retry_after)
    assert error.members["resets_at"] == seconds_up(NOON + wait_ms)
    assert error.members["reset_at"] == datetime.fromtimestamp(seconds_up(NOON + wait_ms), BERLIN).isoformat()


@pytest.mark.parametrize(
    ("help", "used", "limit", "text"),
    [
        (HELP, 500, 500, f'Quota "staff/daily" is used up: 500 of 500 tokens ({HELP})'),
        ("", 400, 500, 'Quota "staff/daily" has 100 tokens left and this call may need 320'),
        ("Fragen? Büro 3", 500, 500, 'Quota "staff/daily" is used up: 500 of 500 tokens'),
        ("see\nthere", 500, 500, 'Quota "staff/daily" is used up: 500 of 500 tokens'),
        (HELP, 0, 0, f'Quota "staff/daily" is switched off: it allows 0 tokens ({HELP})'),
    ],
)
def test_codex_gets_the_reason_in_a_header(help, used, limit, text):
    """It shows only the reset and this header. The help text is appended if it is printable ASCII."""
    who = binding([quota("staff/daily", tokens=limit)])
    found = counters(who, used={"staff/daily": used})
    errors = [refused(who, call(20, 300), found, NOON, endpoint=name, help=help) for name in ("responses", "chat")]
    assert [error.headers.get("x-codex-promo-message") for error in errors] == [text, None]


@pytest.mark.parametrize(
    ("limits", "held", "type"),
    [
        ({"tokens": 1000}, 1000, "tokens"),
        ({"requests": 1}, Amount(requests=1), "requests"),
    ],
)
@pytest.mark.parametrize("endpoint", ["chat", "responses"])
def test_busy_is_a_rate_limit_whatever_the_window(limits, held, type, endpoint):
    """Even if the reset is a month away, calls in flight end sooner, so SDKs may retry by themselves in 2 to 30 s."""
    who = binding([quota("staff/daily", per="month", **limits)])
    error = refused(who, call(1, 1), counters(who, held={"staff/daily": held}), NOON, endpoint=endpoint)
    assert (error.status, error.type, error.code) == (429, type, "rate_limit_exceeded")
    assert 2 <= int(error.headers["retry-after"]) <= 30
    assert "x-should-retry" not in error.headers
    assert error.members["retry_after"] == int(error.headers["retry-after"])
    assert error.members["resets_at"] == seconds_up(NOON) + error.members["retry_after"]


@given(
    who=bindings(),
    data=st.data(),
    now=st.integers(NOON, NOON + 5000),
    endpoint=st.sampled_from(["chat", "responses"]),
)
def test_every_refusal_has_a_known_type_and_code(who, data, now, endpoint):
    """Whatever the quotas are, the wait is at least a second and the body is JSON."""
    found, demand = data.draw(counters_of(who)), data.draw(demands())
    decision = decide(demand, who, found, now)
    if isinstance(decision, Admitted):
        return
    error = refused(who, demand, found, now, endpoint=endpoint)
    json.dumps(error.body())
    if not isinstance(error, Refusal):
        assert error.status < 429
        return
    assert (error.type, error.code) in {
        ("tokens", "rate_limit_exceeded"),
        ("requests", "rate_limit_exceeded"),
        ("usage_limit_reached" if endpoint == "responses" else "insufficient_quota", "insufficient_quota"),
    }
    if "retry-after" in error.headers:
        wait_s = int(error.headers["retry-after"])
        assert wait_s >= 1
        assert ("x-should-retry" in error.headers) is (wait_s > 60) is (error.code == "insufficient_quota")


@given(who=bindings(), data=st.data(), now=st.integers(NOON, NOON + 5000))
def test_a_call_is_admitted_at_the_time_that_its_refusal_states(who, data, now):
    """`Retry-After` and `resets_at` are true for this very call if there are no other calls, also after rounding."""
    found, demand = data.draw(counters_of(who, held=False)), data.draw(demands())
    if isinstance(decide(demand, who, found, now), Admitted):
        return
    error = refused(who, demand, found, now)
    if "retry-after" not in error.headers:
        return
    assert isinstance(decide(demand, who, found, now + 1000 * int(error.headers["retry-after"])), Admitted)
    assert isinstance(decide(demand, who, found, 1000 * error.members["resets_at"]), Admitted)
    reset_at = datetime.fromisoformat(error.members["reset_at"])
    assert reset_at.timestamp() == error.members["resets_at"]
