"""Which upstream is asked: by weight, never one that rests while another is awake, and never a call twice."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.policy import Model, Upstream
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


def _places(*weights: int) -> list[Model]:
    """One model at upstreams `0`, `1`, …, with these weights."""
    upstreams = [Upstream(str(number), f"http://{number}.example/v1", None) for number in range(len(weights))]
    return [Model("m", up, f"m-{up.name}", weight=weight) for up, weight in zip(upstreams, weights, strict=True)]


def _fail(rests: Cooldowns, target: Model, times: int = FAILURES_MAX, *, at: int = NOON) -> None:
    for _ in range(times):
        rests.failed(target.upstream, at)


def _shares(rests: Cooldowns, targets: list[Model], *, now: int = NOON, calls: int = 8000) -> dict[str, float]:
    source = random.Random(1)
    drawn = Counter(rests.choose(targets, now, draw=source.getrandbits(64)).upstream.name for _ in range(calls))
    return {name: number / calls for name, number in drawn.items()}


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((1,), {"0": 1}),
        ((0,), {"0": 1}),
        ((3, 1), {"0": 0.75, "1": 0.25}),
        ((1, 0, 1), {"0": 0.5, "2": 0.5}),
        ((0, 0), {"0": 0.5, "1": 0.5}),  # nobody is preferred
    ],
)
def test_each_gets_its_share(weights: tuple[int, ...], shares: dict[str, float]) -> None:
    """As the weights say, on average; one of weight 0 nothing while another has any."""
    assert _shares(Cooldowns(), _places(*weights)) == pytest.approx(shares, abs=0.02)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6))
def test_each_run_of_draws_gives_exactly_the_weights(weights: list[int]) -> None:
    """Of as many numbers in a row as all weights together each upstream gets its own; so there is no favour in it."""
    targets = _places(*weights)
    total = sum(weights)
    drawn = Counter(Cooldowns().choose(targets, NOON, draw=draw).upstream.name for draw in range(total))
    assert drawn == Counter({str(number): weight for number, weight in enumerate(weights)})


def test_one_that_keeps_failing_is_left_alone() -> None:
    """Some failures in a row, not one less; its share goes to the others, also to one that has none of its own."""
    rests, targets = Cooldowns(), _places(3, 0)
    _fail(rests, targets[0], FAILURES_MAX - 1)
    assert _shares(rests, targets) == {"0": 1}
    _fail(rests, targets[0], 1)
    assert _shares(rests, targets) == {"1": 1}
    assert _shares(rests, targets, now=NOON + COOLDOWN_MS - 1) == {"1": 1}


def test_an_answer_makes_good_all_failures() -> None:
    """Only failures in a row count."""
    rests, targets = Cooldowns(), _places(1, 0)
    _fail(rests, targets[0], FAILURES_MAX - 1)
    rests.answered(targets[0].upstream)
    _fail(rests, targets[0], FAILURES_MAX - 1)
    assert _shares(rests, targets) == {"0": 1}
    rests.answered(targets[1].upstream)  # of which there was nothing to make good


def test_after_its_rest_one_call_tries_it() -> None:
    """One alone; the others wait for what becomes of that. A failure is a rest more, an answer the end of it."""
    rests, targets = Cooldowns(), _places(1, 0)
    _fail(rests, targets[0])
    later = NOON + COOLDOWN_MS
    assert [rests.choose(targets, later, draw=0).upstream.name for _ in range(3)] == ["0", "1", "1"]
    rests.failed(targets[0].upstream, later + 500)
    assert rests.choose(targets, later + COOLDOWN_MS, draw=0) is targets[1]
    last = later + 500 + COOLDOWN_MS
    assert rests.choose(targets, last, draw=0) is targets[0]
    rests.answered(targets[0].upstream)
    assert _shares(rests, targets, now=last) == {"0": 1}


def test_a_trial_of_which_nothing_is_heard_is_followed_by_another() -> None:
    """A client that left must not take an upstream out for good."""
    rests, targets = Cooldowns(), _places(1, 0)
    _fail(rests, targets[0])
    assert rests.choose(targets, NOON + COOLDOWN_MS, draw=0) is targets[0]
    assert rests.choose(targets, NOON + 2 * COOLDOWN_MS, draw=0) is targets[0]


@pytest.mark.parametrize(("said_s", "rest_ms"), [(0, 0), (7, 7000), (60, COOLDOWN_MS_MAX), (86_400, COOLDOWN_MS_MAX)])
def test_who_says_when_to_come_back_is_left_alone_until_then(said_s: int, rest_ms: int) -> None:
    """At its first word, but never for long: it may have been a slip."""
    rests, targets = Cooldowns(), _places(1, 0)
    rests.failed(targets[0].upstream, NOON, retry_after_s=said_s)
    if rest_ms:
        assert rests.choose(targets, NOON + rest_ms - 1, draw=0) is targets[1]
    assert rests.choose(targets, NOON + rest_ms, draw=0) is targets[0]


def test_a_clock_that_went_ahead_takes_nobody_out() -> None:
    """A rest that would last longer than any is none."""
    rests, targets = Cooldowns(), _places(1, 0)
    _fail(rests, targets[0], at=NOON + 86_400_000)
    assert rests.choose(targets, NOON, draw=0) is targets[0]


def test_a_shorter_rest_never_ends_a_longer_one() -> None:
    """Calls that were under way come back with older news."""
    rests, targets = Cooldowns(), _places(1, 0)
    rests.failed(targets[0].upstream, NOON, retry_after_s=50)
    _fail(rests, targets[0])
    rests.failed(targets[0].upstream, NOON, retry_after_s=1)
    assert rests.choose(targets, NOON + 49_999, draw=0) is targets[1]


def test_where_all_rest_the_first_to_be_over_is_tried() -> None:
    """A rest puts others first and refuses nobody."""
    rests, targets = Cooldowns(), _places(1, 1, 1)
    for target, said_s in zip(targets, (30, 10, 20), strict=True):
        rests.failed(target.upstream, NOON, retry_after_s=said_s)
    assert rests.choose(targets, NOON, draw=0) is targets[1]
    assert rests.choose([targets[0], targets[2]], NOON, draw=0) is targets[2]


def test_an_upstream_that_was_written_anew_begins_anew() -> None:
    """Its operator may have mended it; one that a reload leaves as it is rests on."""
    rests, targets = Cooldowns(), _places(1, 0)
    _fail(rests, targets[0])
    assert rests.choose(_places(1, 0), NOON, draw=0).upstream.name == "1"
    mended = Model("m", Upstream("0", "http://mended.example/v1", None), "m")
    assert rests.choose([mended, targets[1]], NOON, draw=0) is mended


ACTS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["failed", "answered", "chosen"]), st.none() | st.integers(0, 90)),
    max_size=60,
)


@given(ACTS, st.lists(st.integers(0, 5), min_size=3, max_size=3), st.integers(0, 2**64))
def test_none_that_rests_is_asked_while_another_is_awake(
    acts: list[tuple[int, str, int | None]], weights: list[int], draw: int
) -> None:
    """Whatever has happened: who is asked is awake, or all rest and its rest ends first."""
    rests, targets, now = Cooldowns(), _places(*weights), NOON
    failures, until = [0, 0, 0], [0, 0, 0]
    for number, act, said_s in acts:
        now += 3000
        if act == "failed":
            rests.failed(targets[number].upstream, now, retry_after_s=said_s)
            failures[number] += 1
            said_ms = COOLDOWN_MS if said_s is None else min(said_s * 1000, COOLDOWN_MS_MAX)
            if said_s is not None or failures[number] >= FAILURES_MAX:
                until[number] = max(until[number], now + said_ms)
        elif act == "answered":
            rests.answered(targets[number].upstream)
            failures[number] = until[number] = 0
        else:
            chosen = targets.index(rests.choose(targets, now, draw=draw))
            if min(until) <= now:
                assert until[chosen] <= now
                until[chosen] = until[chosen] and now + COOLDOWN_MS  # one call tries it
            else:
                assert until[chosen] == min(until)


# ------------------------------------------------------------------------------------------------- one call's choice


def _choice(targets: list[Model], *, retry_for_ms: int = 10_000) -> RoutingState:
    return RoutingState(tuple(targets), until=NOON + retry_for_ms)


@pytest.mark.parametrize("pause_ms", [None, 200, 3_600_000])
def test_another_upstream_is_asked_at_once(pause_ms: int | None) -> None:
    """Whenever the one that failed could be asked again."""
    targets = _places(1, 1, 1)
    routing = _choice(targets).after(targets[1], pause_ms=pause_ms, now=NOON)
    assert routing == RoutingState((targets[0], targets[2]), NOON + 10_000)


@pytest.mark.parametrize(
    ("pause_ms", "again"),
    [(None, False), (0, True), (UNREACHED_PAUSE_MS, True), (PAUSE_MS_MAX, True), (PAUSE_MS_MAX + 1, False)],
)
def test_the_same_is_asked_again_after_a_short_pause(pause_ms: int | None, again: bool) -> None:
    """Where none is left, and only for a wait that a client need not hear of."""
    [target] = _places(1)
    routing = _choice([target]).after(target, pause_ms=pause_ms, now=NOON)
    assert (routing is not None) is again
    if routing is not None:
        assert (routing.left, routing.pause_ms) == ((target,), pause_ms)
        assert routing.after(target, pause_ms=pause_ms, now=NOON) is None  # and only once


@pytest.mark.parametrize(
    ("now", "pause_ms", "goes_on"),
    [
        (NOON + 9_999, 0, True),
        (NOON + 10_000, 0, False),
        (NOON + 9_000, 999, True),
        (NOON + 9_000, 1_000, False),
    ],
)
def test_nothing_is_sent_after_the_deadline(now: int, pause_ms: int, goes_on: bool) -> None:
    """Nor would it be after a pause."""
    [target] = _places(1)
    assert (_choice([target]).after(target, pause_ms=pause_ms, now=now) is not None) is goes_on


def test_with_no_time_at_all_each_call_is_sent_once() -> None:
    """`retry_for: 0s`."""
    targets = _places(1, 1)
    assert _choice(targets, retry_for_ms=0).after(targets[0], pause_ms=0, now=NOON) is None


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_a_call_is_sent_as_often_as_it_has_upstreams_and_once_more_at_the_most(
    weights: list[int], data: st.DataObject
) -> None:
    """Whatever they say."""
    targets = _places(*weights)
    routing, asked = _choice(targets), list[Model]()
    while routing is not None:
        asked.append(data.draw(st.sampled_from(routing.left)))
        routing = routing.after(asked[-1], pause_ms=data.draw(st.none() | st.integers(0, 5000)), now=NOON)
    assert {target.upstream.name for target in asked} == {target.upstream.name for target in targets}
    assert len(asked) <= len(targets) + 1


@pytest.mark.parametrize(
    ("elsewhere", "statuses"),
    [
        (True, (401, 402, 429, 500, 502, 503, 520, 529, 599)),
        (False, (200, 204, 301, 400, 403, 404, 422, 600)),
        (False, (408, 504, 524)),  # who gave up waiting does not know whether it runs on
    ],
)
def test_only_what_turned_a_call_away_lets_it_go_elsewhere(elsewhere: bool, statuses: tuple[int, ...]) -> None:
    """What may run is never run twice, and what the user did wrong is wrong everywhere."""
    assert {may_try_another_target(status) for status in statuses} == {elsewhere}


@pytest.mark.parametrize(
    ("said", "seconds"),
    [(None, None), ("", None), ("0", 0), ("7", 7), ("1.5", None), ("-1", None), ("\u0667", None), ("9" * 10, None)],
)
def test_a_retry_after_in_seconds_is_read(said: str | None, seconds: int | None) -> None:
    """A date, or anything else, says nothing."""
    assert seconds_of(said) == seconds
