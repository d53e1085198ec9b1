"""What users are told of their quotas: refusals word for word, headers that programs can read, true resets."""

import json
import re
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import NeverFits, ProxyError, Refusal
from proxy.ledger.book import Accepted, Book, Entry, Settle
from proxy.policy.admission import Admitted, NotAdmitted, decide
from proxy.policy.amounts import MEASURES, NOTHING, Amount
from proxy.policy.quota import Binding, Counter, CounterKey, Demand, Limit, Quota
from proxy.policy.status import (
    QuotaStatus,
    go_duration,
    quota_statuses,
    rate_limit_headers,
    refusal,
    seconds_up,
    spoken,
)
from proxy.policy.windows import Window
from tests.builders import (
    DAY,
    HOUR,
    MINUTE,
    NOON,
    binding,
    call,
    counters,
    exactly,
    extend,
    policy,
    quota,
    reserve,
    route,
)
from tests.random_rules import bindings, counters_of, demands

BERLIN = ZoneInfo("Europe/Berlin")
UTC = ZoneInfo("UTC")
HELP = "https://llm.example/usage"

# The afternoon of the contract's example: in Berlin five hours and twelve minutes before midnight.
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
    statuses = quota_statuses(who, found, now)
    return refusal(decision, statuses, policy=policy(zone=BERLIN, help=help), endpoint=endpoint, now=now, busy_s=2)


def waiting(per: str, wait_ms: int, **limits: int) -> tuple[Binding, dict[CounterKey, Counter]]:
    """A quota that is used up, and how it stands: at NOON it resets in `wait_ms`."""
    one = quota("staff/short", per=per, **limits)
    used = Amount(max(limits.get("tokens", 0), limits.get("input_tokens", 0)), limits.get("output_tokens", 0), 9)
    who = binding([one])
    return who, {one.key_for(who.user): Counter(Window(NOON + wait_ms - one.per.length_ms, NOON + wait_ms), used)}


# -------------------------------------------------------------------------------------------- refusals, word for word


def test_a_used_up_quota_is_refused_as_the_contract_says():
    """The whole answer: status, headers and body, to the letter."""
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
            "reset_at": "2026-11-24T00:00:00+01:00",
            "resets_at": 1795474800,
            "retry_after": 18720,
            "help_url": "https://llm.example/usage",
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
            id="used up, and over",
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
            id="some left, output: not what was wanted but what it starts for",
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
    """Used up, some left but too little, busy: which quota, how much of what, and when (promise 5)."""
    who = binding([quota("staff/daily", **limits)])
    error = refused(who, demand, counters(who, used={"staff/daily": used}, held={"staff/daily": held}), NOON)
    assert error.message == f'Quota "staff/daily" {sentence}'
    assert error.status == 429


@pytest.mark.parametrize(
    ("limits", "demand", "sentence"),
    [
        (
            {"tokens": 1000},
            call(900, 400),
            'it needs at least 1300 tokens, and quota "staff/daily" allows 1000 per 6h.',
        ),
        (
            {"input_tokens": 1000},
            call(1001, 1),
            'it needs at least 1001 input tokens, and quota "staff/daily" allows 1000 per 6h.',
        ),
        (
            {"output_tokens": 1000},
            call(1, 4096),
            'it needs at least 1024 output tokens, and quota "staff/daily" allows 1000 per 6h.',
        ),
    ],
)
@pytest.mark.parametrize("endpoint", ["chat", "responses"])
def test_what_never_fits_is_a_400_that_agents_answer_by_compacting(limits, demand, sentence, endpoint):
    """`context_length_exceeded`, without a time to come back at: no reset would help."""
    who = binding([quota("staff/daily", per="6h", **limits)])
    error = refused(who, demand, {}, NOON, endpoint=endpoint, help=HELP)
    assert isinstance(error, NeverFits)
    assert error.headers == {}
    assert error.body() == {
        "error": {
            "message": f"This call can never fit: {sentence} Shorten the input or ask for a shorter answer. {HELP}",
            "type": "invalid_request_error",
            "param": None,
            "code": "context_length_exceeded",
        }
    }


def test_a_quota_that_is_switched_off_promises_no_reset():
    """A limit of 0 lets nothing in, after the reset neither: no instant is named, and nobody is told to try again."""
    who = binding([quota("staff/off", tokens=0)])
    error = refused(who, call(100, 400), {}, NOON)
    assert "staff/off" in error.message
    assert "Resets at" not in error.message
    assert "Try again" not in error.message
    assert error.status < 429 or error.headers.get("x-should-retry") == "false"
    assert "retry-after" not in error.headers


def test_without_help_nothing_is_appended():
    """The message ends with its last word, and `help_url` is null."""
    who, found = waiting("6h", HOUR, tokens=100)
    error = refused(who, call(1, 1), found, NOON)
    assert error.message.endswith("(in 1h).")
    assert error.members["help_url"] is None


def test_the_quota_that_lasts_longest_is_named():
    """Of an hourly and a weekly one that are both used up, the weekly says when this call would be let in."""
    hourly, weekly = quota("staff/hourly", tokens=10, per="hour"), quota("staff/weekly", tokens=10, per="week")
    for quotas in ([hourly, weekly], [weekly, hourly]):
        who = binding(quotas)
        error = refused(who, call(1, 1), counters(who, used={each.id: 10 for each in quotas}), NOON)
        assert error.message.startswith('Quota "staff/weekly" is used up')
        assert error.members["reset_at"] == "2026-11-30T01:00:00+01:00"
        assert [each["id"] for each in error.members["quotas"]] == [each.id for each in quotas]


def test_a_refusal_shows_all_quotas_that_bind_and_none_that_only_watches():
    """Those of everyone and of each group, as in `/v1/quota`; a quota in shadow refuses nobody, so it has no say."""
    everyone, watching = quota("everyone/calls", requests=5), quota("staff/new", tokens=1, enforce="shadow")
    who = binding([DAILY], [quota("team/pot", tokens=1, shared=True)], always=[everyone], shadows=[watching])
    found = counters(who, used={"everyone/calls": Amount(requests=5), "staff/new": 70})
    error = refused(who, call(1, 1), found, NOON)
    assert [each["id"] for each in error.members["quotas"]] == ["everyone/calls", "staff/daily", "team/pot"]
    assert error.members["quotas"] == [
        quota_statuses(who, found, NOON)[each.id].as_json(BERLIN) for each in who.quotas[:3]
    ]


# ------------------------------------------------------------------------------------ how long, and what it is called


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
        (31 * DAY, "2678400", False),  # beyond 2**31 ms, where timers of openai-js overflow: it must not retry
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
    """Up to a minute SDKs sleep and come back; beyond it they are told not to, and what the user is out of (T72)."""
    who, found = waiting("60d", wait_ms, **limits)
    error = refused(who, call(1, 1), found, NOON, endpoint=endpoint)
    assert isinstance(error, Refusal)
    error.headers.pop("x-codex-promo-message", None)
    assert error.headers == {"retry-after": retry_after} | ({} if is_soon else {"x-should-retry": "false"})
    assert (error.type, error.code) == ((soon, "rate_limit_exceeded") if is_soon else (long, "insufficient_quota"))
    assert error.members["retry_after"] == int(retry_after)
    assert error.members["resets_at"] == seconds_up(NOON + wait_ms)
    assert error.members["reset_at"] == datetime.fromtimestamp(seconds_up(NOON + wait_ms), BERLIN).isoformat()


HELP = "https://llm.example/usage"


@pytest.mark.parametrize(
    ("help", "used", "limit", "said"),
    [
        (HELP, 500, 500, f'Quota "staff/daily" is used up: 500 of 500 tokens ({HELP})'),
        ("", 400, 500, 'Quota "staff/daily" has 100 tokens left and this call may need 320'),
        ("Fragen? Büro 3", 500, 500, 'Quota "staff/daily" is used up: 500 of 500 tokens'),
        ("see\nthere", 500, 500, 'Quota "staff/daily" is used up: 500 of 500 tokens'),
        (HELP, 0, 0, f'Quota "staff/daily" is switched off: it allows 0 tokens ({HELP})'),
    ],
)
def test_codex_tells_its_user_which_quota_it_was(help, used, limit, said):
    """Of all that we say it shows the reset, and this header, which takes no other help than plain characters."""
    who = binding([quota("staff/daily", tokens=limit)])
    found = counters(who, used={"staff/daily": used})
    told = [refused(who, call(20, 300), found, NOON, endpoint=name, help=help) for name in ("responses", "chat")]
    assert [error.headers.get("x-codex-promo-message") for error in told] == [said, None]


@pytest.mark.parametrize(
    ("limits", "held", "type"),
    [
        ({"tokens": 1000}, 1000, "tokens"),
        ({"requests": 1}, Amount(requests=1), "requests"),
    ],
)
@pytest.mark.parametrize("endpoint", ["chat", "responses"])
def test_busy_is_a_rate_limit_whatever_the_window(limits, held, type, endpoint):
    """The reset may be a month away: calls in flight end sooner, so SDKs may try again by themselves in 2 to 30 s."""
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
def test_every_refusal_is_one_that_clients_understand(who, data, now, endpoint):
    """Whatever the quotas: one of the agreed types and codes, a wait of a second or more, and JSON."""
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
def test_whoever_comes_back_when_told_is_let_in(who, data, now):
    """`Retry-After` and `resets_at` are true for this very call while nobody else calls, and rounded to be so."""
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


# ----------------------------------------------------------------------------------------------- an item of /v1/quota


def item(one: Quota, counter: Counter | None = None, now: int = NOON, zone: ZoneInfo = UTC) -> dict:
    """How this quota is shown."""
    who = binding([one])
    return quota_statuses(who, {one.key_for(who.user): counter} if counter else {}, now)[one.id].as_json(zone)


def test_an_item_has_all_members_of_the_contract():
    """Limits that a quota doesn't have are null, so a program need not ask which are there."""
    shown = item(
        quota("team-x/pot", tokens=5000, requests=100, per="month", shared=True, models=("gpt-4o", "o*")),
        Counter(quota("a/b", per="month", tokens=1).per.opening(NOON), Amount(1200, 34, 7), Amount(100, 400, 1)),
    )
    assert shown == {
        "id": "team-x/pot",
        "group": "team-x",
        "models": ["gpt-4o", "o*"],
        "shared": True,
        "enforce": "exact",
        "window": {
            "kind": "calendar",
            "per": "month",
            "opened_at": 1793491200,
            "resets_at": 1796083200,
            "reset_at": "2026-12-01T00:00:00+00:00",
        },
        "tokens": {"limit": 5000, "used": 1234, "held": 500, "remaining": 3266, "percent": 24.7},
        "input_tokens": None,
        "output_tokens": None,
        "requests": {"limit": 100, "used": 7, "held": 1, "remaining": 92, "percent": 7.0},
    }


def test_each_limit_shows_its_own_measure():
    """Input, output, both together and requests, each by itself."""
    one = quota("staff/all", tokens=100, input_tokens=50, output_tokens=60, requests=10)
    shown = item(one, Counter(one.per.opening(NOON), Amount(20, 30, 2), Amount(1, 2, 1)))
    assert {measure: (shown[measure]["used"], shown[measure]["held"]) for measure in MEASURES} == {
        "tokens": (50, 3),
        "input_tokens": (20, 1),
        "output_tokens": (30, 2),
        "requests": (2, 1),
    }


@pytest.mark.parametrize(
    ("limit", "used", "held", "remaining", "percent"),
    [
        (1000, 0, 0, 1000, 0.0),
        (1000, 333, 0, 667, 33.3),
        (1000, 1000, 0, 0, 100.0),
        (1000, 600, 400, 0, 60.0),
        (1000, 1416, 0, 0, 141.6),  # an answer above its hold, or a limit that was lowered below its use (T69)
        (1000, 900, 400, 0, 90.0),
        (0, 0, 0, 0, 100.0),
        (0, 5, 0, 0, 100.0),
        (3, 1, 0, 2, 33.3),
    ],
)
def test_remaining_is_never_negative(limit, used, held, remaining, percent):
    """What is neither used nor held; `percent` is of what was used, so it may say by how much it is over."""
    one = quota("staff/daily", tokens=limit)
    assert item(one, Counter(one.per.opening(NOON), Amount(used), Amount(held)))["tokens"] == {
        "limit": limit,
        "used": used,
        "held": held,
        "remaining": remaining,
        "percent": percent,
    }


LEFT = Counter(Window(NOON - 7 * HOUR, NOON - HOUR), Amount(100, 0, 1))
RUNNING = Counter(Window(NOON - HOUR, NOON + 5 * HOUR), Amount(100, 0, 1))
HOLDING = Counter(Window(NOON - HOUR, NOON + 5 * HOUR), NOTHING, Amount(100, 0, 1))
EMPTIED = Counter(Window(NOON - HOUR, NOON + 5 * HOUR))


@pytest.mark.parametrize("counter", [None, LEFT, EMPTIED], ids=["never used", "reset", "given back"])
def test_a_window_that_no_call_has_opened_has_no_times(counter):
    """It will open with the next call: nulls, not times that would move with each look; and nothing is used."""
    shown = item(quota("staff/six", tokens=1000, per="6h"), counter)
    assert shown["window"] == {
        "kind": "first_call",
        "per": "6h",
        "opened_at": None,
        "resets_at": None,
        "reset_at": None,
    }
    assert (shown["tokens"]["used"], shown["tokens"]["held"], shown["tokens"]["remaining"]) == (0, 0, 1000)


@pytest.mark.parametrize("counter", [RUNNING, HOLDING], ids=["used", "held"])
def test_a_window_that_a_call_has_opened_shows_its_times(counter):
    """Also while that first call is still in flight."""
    assert item(quota("staff/six", tokens=1000, per="6h"), counter, zone=BERLIN)["window"] == {
        "kind": "first_call",
        "per": "6h",
        "opened_at": (NOON - HOUR) // 1000,
        "resets_at": (NOON + 5 * HOUR) // 1000,
        "reset_at": "2026-11-24T18:00:00+01:00",
    }


@pytest.mark.parametrize("counter", [None, Counter(Window(NOON - 2 * DAY, NOON - DAY), Amount(100))])
def test_a_calendar_window_is_always_shown(counter):
    """Everybody knows when the day began and ends, used or not."""
    shown = item(quota("staff/daily", tokens=1000, zone="Europe/Berlin"), counter, zone=BERLIN)
    assert shown["window"]["reset_at"] == "2026-11-25T00:00:00+01:00"
    assert shown["window"]["resets_at"] - shown["window"]["opened_at"] == 86_400
    assert shown["tokens"]["used"] == 0


def test_resets_are_rounded_up_and_openings_down():
    """A window that opened between two seconds: nobody is sent back too early."""
    one = quota("staff/six", tokens=1000, per="6h")
    window = item(one, Counter(one.per.opening(NOON + 500), Amount(1)), NOON + 600)["window"]
    assert window["opened_at"] == NOON // 1000
    assert window["resets_at"] == (NOON + 6 * HOUR) // 1000 + 1


def test_a_running_window_keeps_its_end_when_per_changes():
    """What is shown is the window that counts, whatever the quota says now."""
    shown = item(quota("staff/daily", tokens=1000, per="7d"), RUNNING)
    assert shown["window"]["per"] == "7d"
    assert shown["window"]["resets_at"] == (NOON + 5 * HOUR) // 1000


# ----------------------------------------------------------------------------------------- a call's own hold left out


def reserved(who: Binding, demand: Demand, found: dict[CounterKey, Counter], now: int) -> tuple[Book, Entry]:
    """The books after a call was let in, and its entry."""
    books = Book(found, {}, now)
    answer = books.apply(reserve("call-1", who, demand))
    assert isinstance(answer, Accepted)
    return books, answer.entry


def test_a_calls_own_hold_is_left_out_and_those_of_others_are_not():
    """The headers say what remains beside this call: 1000 − 100 used − 200 that another one holds."""
    who = binding([quota("staff/daily", tokens=1000, requests=10)])
    found = counters(who, used={"staff/daily": 100}, held={"staff/daily": Amount(100, 100, 1)})
    books, entry = reserved(who, call(100, 400), found, NOON)
    assert (
        rate_limit_headers(who, quota_statuses(who, books.counters, NOON), NOON)["x-ratelimit-remaining-tokens"]
        == "200"
    )
    headers = rate_limit_headers(who, quota_statuses(who, books.counters, NOON, without=entry), NOON)
    assert headers["x-ratelimit-remaining-tokens"] == "700"
    assert headers["x-ratelimit-remaining-requests"] == "8"


def test_a_call_that_has_ended_holds_nothing_to_leave_out():
    """After it was settled its charge counts like any other."""
    who = binding([quota("staff/daily", tokens=1000)])
    books, entry = reserved(who, call(100, 400), {}, NOON)
    settled = books.apply(Settle(entry.id, exactly(100, 50), "complete"))
    assert isinstance(settled, Accepted)
    statuses = quota_statuses(who, books.counters, NOON, without=settled.entry)
    assert statuses["staff/daily"].counter.held == NOTHING
    assert rate_limit_headers(who, statuses, NOON)["x-ratelimit-remaining-tokens"] == "850"


@pytest.mark.parametrize("per", ["minute", "90s"])
def test_a_hold_of_a_closed_window_is_not_left_out_of_the_next(per):
    """A call that outlives its window holds nothing of the new one, so no more than the limit can remain (T77)."""
    who = binding([quota("staff/short", tokens=1000, requests=5, per=per)])
    books, entry = reserved(who, call(100, 400), {}, NOON)
    later = NOON + 2 * MINUTE
    statuses = quota_statuses(who, books.counters, later, without=entry)
    assert statuses["staff/short"].counter.held == NOTHING
    headers = rate_limit_headers(who, statuses, later)
    assert headers["x-ratelimit-remaining-tokens"] == "1000"
    assert headers["x-ratelimit-remaining-requests"] == "5"


@pytest.mark.parametrize("per", ["minute", "90s"])
def test_a_hold_of_a_closed_window_is_not_left_out_of_what_others_hold_in_the_next(per):
    """Nor does it hide what another call holds there."""
    one = quota("staff/short", tokens=1000, per=per)
    who = binding([one])
    _, entry = reserved(who, call(100, 400), {}, NOON)
    later = NOON + 2 * MINUTE
    other = Counter(one.per.opening(later), NOTHING, Amount(50, 50, 1))
    statuses = quota_statuses(who, {one.key_for(who.user): other}, later, without=entry)
    assert statuses["staff/short"].counter.held == Amount(50, 50, 1)


def test_of_a_call_that_grew_into_the_next_window_what_it_holds_there_is_left_out():
    """Its 100 + 100 stay with the hour in which it began; in the next it holds 300, and another call 50."""
    hourly = quota("staff/hourly", tokens=1000, per="hour")
    who = binding([hourly])
    books, _ = reserved(who, call(100, 900, 100, first=100), {}, NOON)
    later = Book(books.counters, books.entries, NOON + HOUR)
    later.apply(reserve("call-2", who, call(50)))
    grown = later.apply(extend("call-1", who, 400))
    assert isinstance(grown, Accepted)
    statuses = quota_statuses(who, later.counters, NOON + HOUR, without=grown.entry)
    assert statuses[hourly.id].counter.held == Amount(50, 0, 1)
    assert rate_limit_headers(who, statuses, NOON + HOUR)["x-ratelimit-remaining-tokens"] == "950"


@given(who=bindings(), data=st.data())
def test_without_itself_things_stand_as_before_it_came(who, data):
    """Leaving out a call's own hold gives back what was held before, in every quota that it touched."""
    found, demand = data.draw(counters_of(who)), data.draw(demands())
    if isinstance(decide(demand, who, found, NOON), NotAdmitted):
        return
    books, entry = reserved(who, demand, found, NOON)
    before, after = quota_statuses(who, found, NOON), quota_statuses(who, books.counters, NOON, without=entry)
    assert {name: each.counter.held for name, each in after.items()} == {
        name: each.counter.held for name, each in before.items()
    }


# ------------------------------------------------------------------------------------------------- rate-limit headers


def headers_of(who: Binding, found: dict[CounterKey, Counter], now: int = NOON) -> dict[str, str]:
    """The headers of an answer."""
    return rate_limit_headers(who, quota_statuses(who, found, now), now)


def test_an_overdraft_is_nothing_that_remains():
    """Nobody is let in above the limit, so who would count on it would be refused."""
    who = binding([quota("staff/daily", tokens=1000, overdraft=500)])
    for used, remaining in ((0, "1000"), (999, "1"), (1000, "0"), (1400, "0")):
        headers = headers_of(who, counters(who, used={"staff/daily": used}))
        assert (headers["x-ratelimit-limit-tokens"], headers["x-ratelimit-remaining-tokens"]) == ("1000", remaining)


def test_the_headers_of_an_answer_are_openais_and_the_drafts():
    """All of them, for a quota of tokens and one of requests."""
    who = binding([DAILY], always=[quota("everyone/calls", requests=5000, per="24h")])
    found = counters(who, used={DAILY.id: 50_000, "everyone/calls": Amount(requests=12)}, opened=AFTERNOON)
    assert headers_of(who, found, AFTERNOON + 500) == {
        "x-ratelimit-limit-tokens": "200000",
        "x-ratelimit-remaining-tokens": "150000",
        "x-ratelimit-reset-tokens": "5h12m0s",
        "x-ratelimit-limit-requests": "5000",
        "x-ratelimit-remaining-requests": "4988",
        "x-ratelimit-reset-requests": "24h0m0s",
        "ratelimit-policy": '"staff/daily";q=200000;w=86400;qu="tokens", "everyone/calls";q=5000;w=86400',
        "ratelimit": '"staff/daily";r=150000;t=18720, "everyone/calls";r=4988;t=86400',
    }


def test_who_is_bound_by_nothing_gets_no_headers():
    """There is nothing true to say."""
    assert headers_of(binding(), {}) == {}
    assert headers_of(binding(route("admins")), {}) == {}


def test_a_measure_without_a_limit_has_no_headers():
    """A quota of tokens says nothing about requests, nor the other way round."""
    tokens, requests = binding([quota("a/b", tokens=5)]), binding([quota("a/b", requests=5)])
    assert {name for name in headers_of(tokens, {}) if name.endswith("-requests")} == set()
    assert {name for name in headers_of(requests, {}) if name.endswith("-tokens")} == set()


@pytest.mark.parametrize(
    ("who", "used", "shown"),
    [
        pytest.param(
            binding([quota("a/hourly", tokens=100, per="hour"), quota("a/daily", tokens=1000)]),
            {"a/daily": 950, "a/hourly": 0},
            ("1000", "50"),
            id="inside a group the one with least left",
        ),
        pytest.param(
            binding([quota("a/small", tokens=100)], [quota("b/large", tokens=1000)]),
            {"a/small": 10, "b/large": 600},
            ("1000", "400"),
            id="across groups the most generous",
        ),
        pytest.param(
            binding([quota("a/small", tokens=100)], [quota("b/large", tokens=1000)]),
            {"a/small": 10, "b/large": 950},
            ("100", "90"),
            id="the most generous is the one with most left",
        ),
        pytest.param(
            binding(
                [quota("a/x", tokens=1000)], [quota("b/y", tokens=2000)], always=[quota("everyone/z", tokens=70)]
            ),
            {},
            ("70", "70"),
            id="everyone's binds whatever the group",
        ),
        pytest.param(
            binding([quota("a/x", tokens=100)], [quota("b/y", tokens=50)], combine="every_group"),
            {},
            ("50", "50"),
            id="every group: the least of all",
        ),
        pytest.param(
            binding([quota("a/x", tokens=100)], route("admins")), {}, None, id="an unlimited group is never refused"
        ),
        pytest.param(
            binding([quota("a/x", tokens=100)], route("admins"), always=[quota("everyone/z", tokens=70)]),
            {},
            ("70", "70"),
            id="unlimited, but for what binds everyone",
        ),
        pytest.param(
            binding([quota("a/x", tokens=100)], route("admins"), combine="every_group"),
            {},
            ("100", "100"),
            id="every group: an unlimited one always has room, the others still bind",
        ),
        pytest.param(
            binding([quota("a/x", tokens=100)], [quota("b/y", requests=5)]),
            {},
            None,
            id="a way without a limit on tokens is never refused for tokens",
        ),
        pytest.param(
            binding([quota("a/x", tokens=100, input_tokens=40, output_tokens=60)]),
            {"a/x": 30},
            ("40", "10"),
            id="of several limits the one with least left",
        ),
        pytest.param(
            binding([quota("a/x", tokens=100)], shadows=[quota("a/new", tokens=5, enforce="shadow")]),
            {"a/new": 5},
            ("100", "100"),
            id="shadow never refuses",
        ),
    ],
)
def test_the_headers_speak_of_the_quota_that_would_refuse_first(who, used, shown):
    """Through the most generous way in, the limit that stops first; none where no reset would ever be waited for."""
    headers = headers_of(who, counters(who, used=used))
    names = ("x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens")
    assert (tuple(headers[name] for name in names) if names[0] in headers else None) == shown


@st.composite
def token_bindings(draw: st.DrawFn) -> Binding:
    """Bindings whose quotas limit tokens and nothing else, all of them exact."""
    numbers = iter(range(100))

    def some(group: str, least: int) -> list[Quota]:
        count = draw(st.integers(least, 2))
        return [quota(f"{group}/q{next(numbers)}", tokens=draw(st.integers(0, 50))) for _ in range(count)]

    alternatives = [some(group, 1) for group in ("a", "b", "c")[: draw(st.integers(0, 3))]]
    unlimited = [route("admins")] if draw(st.booleans()) else []
    combine = draw(st.sampled_from(["any_group", "every_group"]))
    return binding(*alternatives, *unlimited, always=some("everyone", 0), combine=combine)


@given(who=token_bindings(), data=st.data())
def test_what_is_said_to_remain_is_what_would_be_let_in(who, data):
    """A call of as many tokens as the header says is let in, one of one more is not; without a header any is.

    So whoever is shown 0 is refused, for no call has no tokens at all.
    """
    found = data.draw(counters_of(who))
    headers = headers_of(who, found)
    remaining = int(headers.get("x-ratelimit-remaining-tokens", 10**6))
    fits, exceeds = (decide(Demand(tokens, 0, 0), who, found, NOON) for tokens in (remaining, remaining + 1))
    assert isinstance(fits, Admitted) or remaining == 0
    assert isinstance(exceeds, Admitted) is ("x-ratelimit-remaining-tokens" not in headers)


@pytest.mark.parametrize("enforce", ["exact", "after"])
@given(data=st.data())
def test_whoever_is_shown_0_remaining_is_refused(enforce, data):
    """At the limit means out, and what is shown and what is done agree: also where only what was used counts."""
    limits = {data.draw(st.sampled_from(MEASURES)): data.draw(st.integers(1, 10))}
    who = binding([quota("staff/daily", enforce=enforce, **limits)])
    counts = st.integers(0, 10)
    used, held = (data.draw(st.builds(Amount, counts, counts, counts)) for _ in range(2))
    held = held if enforce == "exact" else Amount(requests=held.requests)  # `after` holds no tokens
    found = counters(who, used={"staff/daily": used}, held={"staff/daily": held})
    statuses = quota_statuses(who, found, NOON)["staff/daily"]
    if statuses.remaining(statuses.quota.limits[0]) == 0:
        assert isinstance(decide(call(1, 1), who, found, NOON), NotAdmitted)


# ------------------------------------------------------------------------------------------- the IETF draft's grammar

STRING = r'"(?:[ !#-\[\]-~]|\\["\\])*"'
PARAMETER = rf";([a-z*][a-z0-9_.*-]*)=(-?[0-9]{{1,15}}|{STRING})"


def parsed(field: str) -> dict[str, dict[str, int | str]]:
    """A List of String Items with parameters (RFC 9651), read strictly: name → its parameters."""
    items: dict[str, dict[str, int | str]] = {}
    for member in re.split(r"[ \t]*,[ \t]*", field):
        match = re.fullmatch(rf"({STRING})((?:{PARAMETER})*)", member)
        assert match, member
        pairs = re.findall(PARAMETER, match[2])
        assert len(dict(pairs)) == len(pairs), "a parameter stands twice"
        assert match[1] not in items, "a policy stands twice"
        items[match[1]] = {name: value if value.startswith('"') else int(value) for name, value in pairs}
    return items


@given(who=bindings(), data=st.data(), now=st.integers(NOON, NOON + 90_000))
def test_the_headers_can_be_read_by_any_parser_of_the_draft(who, data, now):
    """`q` and `r` are integers of 0 or more, `w` more than 0, `t` the seconds to the reset, names those of quotas."""
    found = data.draw(counters_of(who))
    statuses = quota_statuses(who, found, now)
    headers = rate_limit_headers(who, statuses, now)
    binding_ids = [name for name, each in statuses.items() if each.quota.enforce != "shadow"]
    assert ("ratelimit" in headers) is ("ratelimit-policy" in headers) is bool(binding_ids)
    if not binding_ids:
        return
    policies, levels = parsed(headers["ratelimit-policy"]), parsed(headers["ratelimit"])
    assert list(policies) == list(levels)
    assert len(levels) == min(3, len(binding_ids))
    for name, level in levels.items():
        policy, standing = policies[name], statuses[name.strip('"')]
        assert standing.quota.enforce != "shadow"
        assert policy.keys() - {"qu"} == {"q", "w"}
        assert level.keys() == {"r", "t"}
        assert policy["q"] == standing.tightest().maximum
        unit = "requests" if standing.tightest().measure == "requests" else "tokens"
        assert policy.get("qu", '"requests"') == f'"{unit}"'
        assert 0 <= level["r"] <= policy["q"]
        assert policy["w"] > 0
        assert now <= standing.counter.window.resets_at <= now + 1000 * level["t"]


def test_the_three_tightest_quotas_are_named_tightest_first():
    """Of four, by the part that remains: 0 %, 10 %, 50 %; the one that is untouched is left out."""
    quotas = [quota(f"staff/{name}", tokens=limit) for name, limit in zip("abcd", (10, 1000, 100, 50), strict=True)]
    who = binding(quotas)
    found = counters(who, used={"staff/a": 0, "staff/b": 900, "staff/c": 50, "staff/d": 50})
    assert list(parsed(headers_of(who, found)["ratelimit"])) == ['"staff/d"', '"staff/b"', '"staff/c"']


def test_a_quota_speaks_of_its_tightest_limit():
    """Of a quota's limits the one of which the smallest part remains; of equal parts the smaller number."""
    one = quota("staff/daily", tokens=1000, requests=10)
    found = {one.key_for("ann"): Counter(one.per.opening(NOON), Amount(100, 0, 9))}
    headers = headers_of(binding([one]), found)
    assert headers["ratelimit-policy"] == '"staff/daily";q=10;w=86400'
    assert headers["ratelimit"] == '"staff/daily";r=1;t=43200'
    assert QuotaStatus(one, Counter(one.per.opening(NOON))).tightest() == Limit("requests", 10)


@given(who=bindings(), data=st.data())
def test_openais_headers_are_whole_and_within_the_limit(who, data):
    """Limit, remaining and reset come together; 0 ≤ remaining ≤ limit; the reset is a Go duration."""
    headers = headers_of(who, data.draw(counters_of(who)))
    for kind in ("tokens", "requests"):
        three = [headers.get(f"x-ratelimit-{what}-{kind}") for what in ("limit", "remaining", "reset")]
        assert all(three) or three == [None] * 3
        if all(three):
            assert 0 <= int(three[1]) <= int(three[0])
            assert go_seconds(three[2]) >= 0


# ---------------------------------------------------------------------------------------------------- lengths of time


def go_seconds(text: str) -> int:
    """What Go's time.ParseDuration makes of it, in seconds."""
    assert re.fullmatch(r"(\d+h)?(\d+m)?(\d+s)?", text) and text
    return sum(int(count) * {"h": 3600, "m": 60, "s": 1}[unit] for count, unit in re.findall(r"(\d+)([hms])", text))


@pytest.mark.parametrize(
    ("length_ms", "text"),
    [
        (-5000, "0s"),
        (0, "0s"),
        (1, "1s"),
        (1000, "1s"),
        (59_001, "1m0s"),
        (360_000, "6m0s"),
        (HOUR, "1h0m0s"),
        (HOUR + 30_000, "1h0m30s"),
        (31 * DAY, "744h0m0s"),
    ],
)
def test_a_go_duration_is_written_as_go_writes_it(length_ms, text):
    """`6m0s`, as in OpenAI's own headers; Go knows no days; nothing is negative."""
    assert go_duration(length_ms) == text


@given(length_ms=st.integers(0, 400 * DAY))
def test_a_go_duration_is_read_back_as_what_was_meant(length_ms):
    """Whole seconds, rounded up."""
    assert go_seconds(go_duration(length_ms)) == seconds_up(length_ms)
    assert 0 <= 1000 * seconds_up(length_ms) - length_ms < 1000


@pytest.mark.parametrize(
    ("length_ms", "text"),
    [
        (-1, "0s"),
        (0, "0s"),
        (1, "1s"),
        (45_000, "45s"),
        (60_000, "1m"),
        (61_000, "1m 1s"),
        (59 * MINUTE + 59_001, "1h"),
        (5 * HOUR + 12 * MINUTE, "5h 12m"),
        (5 * HOUR + 12 * MINUTE + 59_000, "5h 12m"),
        (DAY, "1d"),
        (3 * DAY + 4 * HOUR + 5 * MINUTE, "3d 4h"),
        (31 * DAY, "31d"),
    ],
)
def test_a_length_of_time_is_told_to_two_places(length_ms, text):
    """Short enough to be read at a glance; what is zero is not said."""
    assert spoken(length_ms) == text
