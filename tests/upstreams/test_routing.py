"""Which upstream a call is sent to: by weight, not to one in cooldown while another is available, and never twice."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.catalog import Model, Upstream
from proxy.upstreams.routing import (
    COOLDOWN_MS,
    COOLDOWN_MS_MAX,
    FAILURES_MAX,
    PAUSE_MS_MAX,
    UNREACHED_PAUSE_MS,
    Cooldowns,
    RoutingState,
    may_try_another_target,
    seconds_of,
)
from tests.builders import NOON


def _targets(*weights: int) -> list[Model]:
    """The targets of one model at upstreams `0`, `1`, …, with these weights."""
    upstreams = [Upstream(str(number), f"http://{number}.example/v1", None) for number in range(len(weights))]
    return [Model("m", up, f"m-{up.name}", weight=weight) for up, weight in zip(upstreams, weights, strict=True)]


def _fail(cooldowns: Cooldowns, target: Model, times: int = FAILURES_MAX, *, at: int = NOON) -> None:
    for _ in range(times):
        cooldowns.failed(target.upstream, at)


def _shares(cooldowns: Cooldowns, targets: list[Model], *, now: int = NOON, calls: int = 8000) -> dict[str, float]:
    source = random.Random(1)
    drawn = Counter(cooldowns.choose(targets, now, draw=source.getrandbits(64)).upstream.name for _ in range(calls))
    return {name: number / calls for name, number in drawn.items()}


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((1,), {"0": 1}),
        ((0,), {"0": 1}),
        ((3, 1), {"0": 0.75, "1": 0.25}),
        ((1, 0, 1), {"0": 0.5, "2": 0.5}),
        ((0, 0), {"0": 0.5, "1": 0.5}),  # none is preferred
    ],
)
def test_each_upstream_gets_its_share(weights: tuple[int, ...], shares: dict[str, float]) -> None:
    """By the weights, on average. An upstream with weight 0 gets nothing while another has a weight."""
    assert _shares(Cooldowns(), _targets(*weights)) == pytest.approx(shares, abs=0.02)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6))
def test_consecutive_draws_give_exactly_the_weights(weights: list[int]) -> None:
    """Of as many consecutive numbers as the sum of the weights, each upstream gets as many as its weight."""
    targets = _targets(*weights)
    total = sum(weights)
    drawn = Counter(Cooldowns().choose(targets, NOON, draw=draw).upstream.name for draw in range(total))
    assert drawn == Counter({str(number): weight for number, weight in enumerate(weights)})


def test_an_upstream_that_keeps_failing_is_in_cooldown() -> None:
    """After FAILURES_MAX failures in a row, not one fewer. Its calls go to the others, even to one with weight 0."""
    cooldowns, targets = Cooldowns(), _targets(3, 0)
    _fail(cooldowns, targets[0], FAILURES_MAX - 1)
    assert _shares(cooldowns, targets) == {"0": 1}
    _fail(cooldowns, targets[0], 1)
    assert _shares(cooldowns, targets) == {"1": 1}
    assert _shares(cooldowns, targets, now=NOON + COOLDOWN_MS - 1) == {"1": 1}


def test_the_upstreams_in_cooldown_are_listed_with_its_end() -> None:
    """Neither one that has failed less often, nor one whose end was set by a clock that was ahead."""
    cooldowns, targets = Cooldowns(), _targets(1, 1, 1)
    _fail(cooldowns, targets[0])
    _fail(cooldowns, targets[1], 1)
    _fail(cooldowns, targets[2], at=NOON + 86_400_000)
    assert cooldowns.until(NOON) == {"0": NOON + COOLDOWN_MS}
    assert cooldowns.until(NOON + COOLDOWN_MS) == {}


def test_an_answer_clears_all_failures() -> None:
    """Only failures in a row count."""
    cooldowns, targets = Cooldowns(), _targets(1, 0)
    _fail(cooldowns, targets[0], FAILURES_MAX - 1)
    cooldowns.answered(targets[0].upstream)
    _fail(cooldowns, targets[0], FAILURES_MAX - 1)
    assert _shares(cooldowns, targets) == {"0": 1}
    cooldowns.answered(targets[1].upstream)  # it has no failures to clear


def test_after_a_cooldown_one_call_tries_the_upstream() -> None:
    """The other calls avoid it until that call has a result. A failure begins a new cooldown, an answer ends it."""
    cooldowns, targets = Cooldowns(), _targets(1, 0)
    _fail(cooldowns, targets[0])
    later = NOON + COOLDOWN_MS
    assert [cooldowns.choose(targets, later, draw=0).upstream.name for _ in range(3)] == ["0", "1", "1"]
    cooldowns.failed(targets[0].upstream, later + 500)
    assert cooldowns.choose(targets, later + COOLDOWN_MS, draw=0) is targets[1]
    last = later + 500 + COOLDOWN_MS
    assert cooldowns.choose(targets, last, draw=0) is targets[0]
    cooldowns.answered(targets[0].upstream)
    assert _shares(cooldowns, targets, now=last) == {"0": 1}


def test_a_trial_without_a_result_is_followed_by_another() -> None:
    """A client that disconnects during the trial must not keep the upstream in cooldown for ever."""
    cooldowns, targets = Cooldowns(), _targets(1, 0)
    _fail(cooldowns, targets[0])
    assert cooldowns.choose(targets, NOON + COOLDOWN_MS, draw=0) is targets[0]
    assert cooldowns.choose(targets, NOON + 2 * COOLDOWN_MS, draw=0) is targets[0]


@pytest.mark.parametrize(
    ("retry_s", "cooldown_ms"), [(0, 0), (7, 7000), (60, COOLDOWN_MS_MAX), (86_400, COOLDOWN_MS_MAX)]
)
def test_a_retry_after_begins_a_cooldown_at_once(retry_s: int, cooldown_ms: int) -> None:
    """At the first failure, but for a limited time, because the value may be a mistake."""
    cooldowns, targets = Cooldowns(), _targets(1, 0)
    cooldowns.failed(targets[0].upstream, NOON, retry_after_s=retry_s)
    if cooldown_ms:
        assert cooldowns.choose(targets, NOON + cooldown_ms - 1, draw=0) is targets[1]
    assert cooldowns.choose(targets, NOON + cooldown_ms, draw=0) is targets[0]


def test_a_cooldown_from_a_clock_that_was_ahead_is_ignored() -> None:
    """It would end later than any cooldown can."""
    cooldowns, targets = Cooldowns(), _targets(1, 0)
    _fail(cooldowns, targets[0], at=NOON + 86_400_000)
    assert cooldowns.choose(targets, NOON, draw=0) is targets[0]


def test_a_shorter_cooldown_never_replaces_a_longer_one() -> None:
    """Calls overlap, so a result may be older than the cooldown."""
    cooldowns, targets = Cooldowns(), _targets(1, 0)
    cooldowns.failed(targets[0].upstream, NOON, retry_after_s=50)
    _fail(cooldowns, targets[0])
    cooldowns.failed(targets[0].upstream, NOON, retry_after_s=1)
    assert cooldowns.choose(targets, NOON + 49_999, draw=0) is targets[1]


def test_if_all_are_in_cooldown_the_one_that_ends_first_is_asked() -> None:
    """A cooldown puts others first, but refuses no call."""
    cooldowns, targets = Cooldowns(), _targets(1, 1, 1)
    for target, retry_s in zip(targets, (30, 10, 20), strict=True):
        cooldowns.failed(target.upstream, NOON, retry_after_s=retry_s)
    assert cooldowns.choose(targets, NOON, draw=0) is targets[1]
    assert cooldowns.choose([targets[0], targets[2]], NOON, draw=0) is targets[2]


def test_an_upstream_with_a_new_configuration_has_no_failures() -> None:
    """Its operator may have fixed it. An upstream that a reload does not change stays in cooldown."""
    cooldowns, targets = Cooldowns(), _targets(1, 0)
    _fail(cooldowns, targets[0])
    assert cooldowns.choose(_targets(1, 0), NOON, draw=0).upstream.name == "1"
    mended = Model("m", Upstream("0", "http://mended.example/v1", None), "m")
    assert cooldowns.choose([mended, targets[1]], NOON, draw=0) is mended


EVENTS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["failed", "answered", "chosen"]), st.none() | st.integers(0, 90)),
    max_size=60,
)


@given(EVENTS, st.lists(st.integers(0, 5), min_size=3, max_size=3), st.integers(0, 2**64))
def test_no_upstream_in_cooldown_is_asked_while_another_is_available(
    events: list[tuple[int, str, int | None]], weights: list[int], draw: int
) -> None:
    """Whatever has happened: the chosen one is available, or all are in cooldown and its cooldown ends first."""
    cooldowns, targets, now = Cooldowns(), _targets(*weights), NOON
    failures, until = [0, 0, 0], [0, 0, 0]
    for number, event, retry_s in events:
        now += 3000
        if event == "failed":
            cooldowns.failed(targets[number].upstream, now, retry_after_s=retry_s)
            failures[number] += 1
            cooldown_ms = COOLDOWN_MS if retry_s is None else min(retry_s * 1000, COOLDOWN_MS_MAX)
            if retry_s is not None or failures[number] >= FAILURES_MAX:
                until[number] = max(until[number], now + cooldown_ms)
        elif event == "answered":
            cooldowns.answered(targets[number].upstream)
            failures[number] = until[number] = 0
        else:
            chosen = targets.index(cooldowns.choose(targets, now, draw=draw))
            if min(until) <= now:
                assert until[chosen] <= now
                until[chosen] = until[chosen] and now + COOLDOWN_MS  # this call tries it
            else:
                assert until[chosen] == min(until)


# ------------------------------------------------------------------------------------------- the attempts of one call


def _state(targets: list[Model], *, retry_for_ms: int = 10_000) -> RoutingState:
    return RoutingState(tuple(targets), deadline=NOON + retry_for_ms)


@pytest.mark.parametrize("pause_ms", [None, 200, 3_600_000])
def test_another_upstream_is_asked_without_a_pause(pause_ms: int | None) -> None:
    """Whatever the time after which the failed one could be asked again."""
    targets = _targets(1, 1, 1)
    routing = _state(targets).after_failure(targets[1], pause_ms=pause_ms, now=NOON)
    assert routing == RoutingState((targets[0], targets[2]), NOON + 10_000)


@pytest.mark.parametrize(
    ("pause_ms", "is_retried"),
    [(None, False), (0, True), (UNREACHED_PAUSE_MS, True), (PAUSE_MS_MAX, True), (PAUSE_MS_MAX + 1, False)],
)
def test_the_same_upstream_is_asked_again_after_a_short_pause(pause_ms: int | None, is_retried: bool) -> None:
    """Only if no other remains, only once, and only if the client need not wait long for it."""
    [target] = _targets(1)
    routing = _state([target]).after_failure(target, pause_ms=pause_ms, now=NOON)
    assert (routing is not None) is is_retried
    if routing is not None:
        assert (routing.remaining, routing.pause_ms) == ((target,), pause_ms)
        assert routing.after_failure(target, pause_ms=pause_ms, now=NOON) is None  # and only once


@pytest.mark.parametrize(
    ("now", "pause_ms", "is_retried"),
    [
        (NOON + 9_999, 0, True),
        (NOON + 10_000, 0, False),
        (NOON + 9_000, 999, True),
        (NOON + 9_000, 1_000, False),
    ],
)
def test_nothing_is_sent_after_the_deadline(now: int, pause_ms: int, is_retried: bool) -> None:
    """A pause that would end after the deadline is not begun."""
    [target] = _targets(1)
    assert (_state([target]).after_failure(target, pause_ms=pause_ms, now=now) is not None) is is_retried


def test_with_retry_for_0s_each_call_is_sent_once() -> None:
    """The deadline has passed when the first attempt fails."""
    targets = _targets(1, 1)
    assert _state(targets, retry_for_ms=0).after_failure(targets[0], pause_ms=0, now=NOON) is None


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_a_call_is_sent_to_each_upstream_and_at_most_once_more(weights: list[int], data: st.DataObject) -> None:
    """Whatever the upstreams answer."""
    targets = _targets(*weights)
    routing, attempts = _state(targets), list[Model]()
    while routing is not None:
        attempts.append(data.draw(st.sampled_from(routing.remaining)))
        routing = routing.after_failure(attempts[-1], pause_ms=data.draw(st.none() | st.integers(0, 5000)), now=NOON)
    assert {target.upstream.name for target in attempts} == {target.upstream.name for target in targets}
    assert len(attempts) <= len(targets) + 1


@pytest.mark.parametrize(
    ("is_allowed", "statuses"),
    [
        (True, (401, 402, 429, 500, 502, 503, 520, 529, 599)),
        (False, (200, 204, 301, 400, 403, 404, 422, 600)),
        (False, (408, 504, 524)),  # after a timeout the call may still run
    ],
)
def test_only_a_status_that_proves_a_refusal_allows_another_attempt(
    is_allowed: bool, statuses: tuple[int, ...]
) -> None:
    """A call that may run is never sent twice, and a bad request is bad at every upstream."""
    assert {may_try_another_target(status) for status in statuses} == {is_allowed}


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, None), ("", None), ("0", 0), ("7", 7), ("1.5", None), ("-1", None), ("\u0667", None), ("9" * 10, None)],
)
def test_a_retry_after_in_seconds_is_read(header: str | None, seconds: int | None) -> None:
    """A date or anything else is ignored."""
    assert seconds_of(header) == seconds
