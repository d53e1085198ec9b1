"""The rate-limit headers can be parsed by programs, and describe the quota that would refuse first."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.limit_headers import anthropic_limit_headers, go_duration, rate_limit_headers
from proxy.policy.admission import Admitted, NotAdmitted, decide
from proxy.policy.amounts import Amount, Measure
from proxy.policy.binding import Binding
from proxy.policy.quota import Counter, CounterKey, Demand, Limit, Quota
from proxy.policy.status import QuotaStatus, quota_statuses, seconds_up
from tests.builders import (
    DAY,
    HOUR,
    NOON,
    binding,
    call,
    counters,
    group_quotas,
    make_requests_concurrent,
    quota,
)
from tests.formats.test_refusal import AFTERNOON, DAILY
from tests.random_rules import bindings, counters_of

# ------------------------------------------------------------------------------------------------- rate-limit headers

STRING = r'"(?:[ !#-\[\]-~]|\\["\\])*"'
PARAMETER = rf";([a-z*][a-z0-9_.*-]*)=(-?[0-9]{{1,15}}|{STRING})"


def headers_of(who: Binding, found: dict[CounterKey, Counter], now: int = NOON) -> dict[str, str]:
    """The rate-limit headers of an answer to this user, with these counters."""
    return rate_limit_headers(who, quota_statuses(who, found, now), now)


def test_an_overdraft_does_not_count_as_remaining():
    """No call is admitted above the limit, so a client that relied on the overdraft would be refused."""
    who = binding([quota("staff/daily", tokens=1000, overdraft=500)])
    for used, remaining in ((0, "1000"), (999, "1"), (1000, "0"), (1400, "0")):
        headers = headers_of(who, counters(who, used={"staff/daily": used}))
        assert (headers["x-ratelimit-limit-tokens"], headers["x-ratelimit-remaining-tokens"]) == ("1000", remaining)


def test_an_answer_has_the_headers_of_openai_and_of_the_draft():
    """With a quota of tokens and a quota of requests all of them are present."""
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


def test_without_a_binding_quota_there_are_no_headers():
    """They would have no true value."""
    assert headers_of(binding(), {}) == {}
    assert headers_of(binding(group_quotas("admins")), {}) == {}


def test_a_measure_without_a_limit_has_no_headers():
    """A quota of tokens has no headers for requests, and a quota of requests none for tokens."""
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
            id="within a group: the quota with the least remaining",
        ),
        pytest.param(
            binding([quota("a/small", tokens=100)], [quota("b/large", tokens=1000)]),
            {"a/small": 10, "b/large": 600},
            ("1000", "400"),
            id="across groups: the most generous group",
        ),
        pytest.param(
            binding([quota("a/small", tokens=100)], [quota("b/large", tokens=1000)]),
            {"a/small": 10, "b/large": 950},
            ("100", "90"),
            id="the most generous group is the one with the most remaining",
        ),
        pytest.param(
            binding(
                [quota("a/x", tokens=1000)], [quota("b/y", tokens=2000)], always=[quota("everyone/z", tokens=70)]
            ),
            {},
            ("70", "70"),
            id="a quota of everyone binds in every group",
        ),
        pytest.param(
            binding([quota("a/x", tokens=100)], [quota("b/y", tokens=50)], combine="every_group"),
            {},
            ("50", "50"),
            id="every group: the least remaining of all",
        ),
        pytest.param(
            binding([quota("a/x", tokens=100)], group_quotas("admins")),
            {},
            None,
            id="a member of an unlimited group is never refused",
        ),
        pytest.param(
            binding([quota("a/x", tokens=100)], group_quotas("admins"), always=[quota("everyone/z", tokens=70)]),
            {},
            ("70", "70"),
            id="unlimited except for a quota of everyone",
        ),
        pytest.param(
            binding([quota("a/x", tokens=100)], group_quotas("admins"), combine="every_group"),
            {},
            ("100", "100"),
            id="every group: the quotas of the other groups bind in spite of an unlimited one",
        ),
        pytest.param(
            binding([quota("a/x", tokens=100)], [quota("b/y", requests=5)]),
            {},
            None,
            id="a group without a limit on tokens never refuses for tokens",
        ),
        pytest.param(
            binding([quota("a/x", tokens=100, input_tokens=40, output_tokens=60)]),
            {"a/x": 30},
            ("40", "10"),
            id="several limits: the one with the least remaining",
        ),
        pytest.param(
            binding([quota("a/x", tokens=100)], shadows=[quota("a/new", tokens=5, enforce="shadow")]),
            {"a/new": 5},
            ("100", "100"),
            id="a shadow quota never refuses",
        ),
    ],
)
def test_the_headers_describe_the_quota_that_would_refuse_first(who, used, shown):
    """In the most generous group, the limit that is reached first; no headers if no limit would ever be reached."""
    headers = headers_of(who, counters(who, used=used))
    names = ("x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens")
    assert (tuple(headers[name] for name in names) if names[0] in headers else None) == shown


@st.composite
def token_bindings(draw: st.DrawFn) -> Binding:
    """Bindings whose quotas limit only tokens and are all exact."""
    numbers = iter(range(100))

    def some(group: str, least: int) -> list[Quota]:
        count = draw(st.integers(least, 2))
        return [quota(f"{group}/q{next(numbers)}", tokens=draw(st.integers(0, 50))) for _ in range(count)]

    alternatives = [some(group, 1) for group in ("a", "b", "c")[: draw(st.integers(0, 3))]]
    unlimited = [group_quotas("admins")] if draw(st.booleans()) else []
    combine = draw(st.sampled_from(["any_group", "every_group"]))
    return binding(*alternatives, *unlimited, always=some("everyone", 0), combine=combine)


@given(who=token_bindings(), data=st.data())
def test_a_call_of_the_remaining_tokens_is_admitted_and_a_larger_one_is_not(who, data):
    """A call of one token more is refused; without the header any call is admitted.

    If 0 remain, every call is refused, because every call has tokens.
    """
    found = data.draw(counters_of(who))
    headers = headers_of(who, found)
    remaining = int(headers.get("x-ratelimit-remaining-tokens", 10**6))
    fits, exceeds = (decide(Demand(tokens, 0, 0), who, found, NOON) for tokens in (remaining, remaining + 1))
    assert isinstance(fits, Admitted) or remaining == 0
    assert isinstance(exceeds, Admitted) is ("x-ratelimit-remaining-tokens" not in headers)


@pytest.mark.parametrize("enforce", ["exact", "after"])
@given(data=st.data())
def test_a_call_is_refused_if_0_remain(enforce, data):
    """The header and the decision agree, also with `enforce: after`, where only used tokens count."""
    limits = {data.draw(st.sampled_from(Measure)): data.draw(st.integers(1, 10))}
    who = binding([quota("staff/daily", enforce=enforce, **limits)])
    counts = st.integers(0, 10)
    used, held = (data.draw(st.builds(Amount, counts, counts, counts)) for _ in range(2))
    held = held if enforce == "exact" else Amount(requests=held.requests)  # `after` holds no tokens
    found = counters(who, used={"staff/daily": used}, held={"staff/daily": held})
    status = quota_statuses(who, found, NOON)["staff/daily"]
    if status.use_of(status.quota.limits[0])["remaining"] == 0:
        assert isinstance(decide(call(1, 1), who, found, NOON), NotAdmitted)


# ------------------------------------------------------------------------------------------- the IETF draft's grammar


def parsed(field: str) -> dict[str, dict[str, int | str]]:
    """Parse a List of String Items with parameters strictly (RFC 9651): item → its parameters."""
    items: dict[str, dict[str, int | str]] = {}
    for member in re.split(r"[ \t]*,[ \t]*", field):
        match = re.fullmatch(rf"({STRING})((?:{PARAMETER})*)", member)
        assert match, member
        pairs = re.findall(PARAMETER, match[2])
        assert len(dict(pairs)) == len(pairs), "a parameter occurs twice"
        assert match[1] not in items, "a policy occurs twice"
        items[match[1]] = {name: value if value.startswith('"') else int(value) for name, value in pairs}
    return items


@given(who=bindings(), data=st.data(), now=st.integers(NOON, NOON + 90_000))
def test_the_headers_follow_the_grammar_of_the_draft(who, data, now):
    """`q` and `r` are integers ≥ 0, `w` is > 0, `t` is the seconds until the reset, and the items are quota ids."""
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
        policy, status = policies[name], statuses[name.strip('"')]
        assert status.quota.enforce != "shadow"
        assert policy.keys() - {"qu"} == {"q", "w"}
        assert level.keys() == {"r", "t"}
        assert policy["q"] == status.tightest.limit.maximum
        unit = "requests" if status.tightest.limit.measure == "requests" else "tokens"
        assert policy.get("qu", '"requests"') == f'"{unit}"'
        assert 0 <= level["r"] <= policy["q"]
        assert policy["w"] > 0
        assert now <= status.counter.window.resets_at <= now + 1000 * level["t"]


def test_limits_on_concurrent_measures_are_in_no_header(monkeypatch):
    """No reset changes what remains of them, so a client would wait for the wrong instant."""
    make_requests_concurrent(monkeypatch)
    both, alone = quota("staff/both", tokens=1000, requests=1), quota("staff/alone", requests=1)
    who = binding([both, alone])
    headers = headers_of(who, counters(who, held={"staff/both": 100, "staff/alone": 100}))
    assert not [name for name in headers if name.endswith("-requests")]
    assert headers["ratelimit"] == '"staff/both";r=900;t=43200'
    assert headers_of(binding([alone]), {}) == {}


def test_the_three_tightest_quotas_are_listed_tightest_first():
    """Of four quotas, those with 0 %, 10 % and 50 % remaining; the unused one is left out."""
    quotas = [quota(f"staff/{name}", tokens=limit) for name, limit in zip("abcd", (10, 1000, 100, 50), strict=True)]
    who = binding(quotas)
    found = counters(who, used={"staff/a": 0, "staff/b": 900, "staff/c": 50, "staff/d": 50})
    assert list(parsed(headers_of(who, found)["ratelimit"])) == ['"staff/d"', '"staff/b"', '"staff/c"']


def test_the_item_of_a_quota_describes_its_tightest_limit():
    """The limit of which the smallest part remains; if the parts are equal, the one with the smaller number."""
    one = quota("staff/daily", tokens=1000, requests=10)
    found = {one.key_for("ann"): Counter(one.per.opening(NOON), Amount(100, 0, 9))}
    headers = headers_of(binding([one]), found)
    assert headers["ratelimit-policy"] == '"staff/daily";q=10;w=86400'
    assert headers["ratelimit"] == '"staff/daily";r=1;t=43200'
    assert QuotaStatus(one, Counter(one.per.opening(NOON))).tightest.limit == Limit("requests", 10)


@given(who=bindings(), data=st.data())
def test_openais_headers_are_complete_and_within_the_limit(who, data):
    """Limit, remaining and reset are present together; 0 ≤ remaining ≤ limit; the reset is a Go duration."""
    headers = headers_of(who, data.draw(counters_of(who)))
    for kind in ("tokens", "requests"):
        three = [headers.get(f"x-ratelimit-{what}-{kind}") for what in ("limit", "remaining", "reset")]
        assert all(three) or three == [None] * 3
        if all(three):
            assert 0 <= int(three[1]) <= int(three[0])
            assert go_seconds(three[2]) >= 0


# ---------------------------------------------------------------------------------------------------- lengths of time


def go_seconds(text: str) -> int:
    """The duration in seconds, as Go's `time.ParseDuration` reads it."""
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
def test_a_duration_is_written_as_go_writes_it(length_ms, text):
    """`6m0s`, as in OpenAI's own headers. There is no unit for days, and no negative duration."""
    assert go_duration(length_ms) == text


@given(length_ms=st.integers(0, 400 * DAY))
def test_a_duration_read_back_is_the_length_rounded_up(length_ms):
    """To whole seconds, so by less than one second."""
    assert go_seconds(go_duration(length_ms)) == seconds_up(length_ms)
    assert 0 <= 1000 * seconds_up(length_ms) - length_ms < 1000


# -------------------------------------------------------------------------------------------------- Anthropic's names


def test_anthropics_headers_have_the_values_of_openais() -> None:
    """The limits and the remaining numbers are the same; the reset is an instant in UTC."""
    who = binding([quota("staff/daily", tokens=1000, requests=10)])
    statuses = quota_statuses(who, counters(who, used={"staff/daily": Amount(300, 50, 4)}), NOON)
    assert anthropic_limit_headers(who, statuses) == {
        "anthropic-ratelimit-tokens-limit": "1000",
        "anthropic-ratelimit-tokens-remaining": "650",
        "anthropic-ratelimit-tokens-reset": "2026-11-25T00:00:00Z",
        "anthropic-ratelimit-requests-limit": "10",
        "anthropic-ratelimit-requests-remaining": "6",
        "anthropic-ratelimit-requests-reset": "2026-11-25T00:00:00Z",
    }
    assert rate_limit_headers(who, statuses, NOON)["x-ratelimit-remaining-tokens"] == "650"


def test_anthropics_headers_cover_only_what_is_limited() -> None:
    """Without a limit on requests there are no headers for requests. A reset in Berlin is stated in UTC."""
    who = binding([quota("staff/daily", tokens=1000, zone="Europe/Berlin")])
    headers = anthropic_limit_headers(who, quota_statuses(who, {}, NOON))
    assert headers.keys() == {f"anthropic-ratelimit-tokens-{name}" for name in ("limit", "remaining", "reset")}
    assert headers["anthropic-ratelimit-tokens-reset"] == "2026-11-24T23:00:00Z"
