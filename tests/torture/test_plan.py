"""What is asked follows from the seed, and is counted as the simulated upstream counts it."""

from collections import Counter
from itertools import islice
from typing import Any

import pytest

from proxy.simulator.directives import read_directives
from proxy.simulator.text import Generator, Endpoint
from proxy.torture.plan import MODEL_PREFIX, Ask, Asker, Leave, Plan, Wish, client_of, mark_of

ENDPOINTS = {
    "chat": Endpoint.CHAT,
    "completions": Endpoint.COMPLETIONS,
    "embeddings": Endpoint.EMBEDDINGS,
    "responses": Endpoint.RESPONSES,
}


def asks(count: int = 400, *, seed: int = 0, client: int = 3, model: str | None = None) -> list[Ask]:
    """One client's first calls."""
    asker = Asker(Plan(seed=seed), client, model)
    return list(islice(iter(asker.next, None), count))


def wish(**more: Any) -> Wish:
    """A call for an answer."""
    usual: dict[str, Any] = {
        "kind": "chat",
        "text": "one two three",
        "tokens": 20,
        "maximum": None,
        "maximum_field": "max_tokens",
        "choices": 1,
        "stream": False,
        "usage": False,
        "leave": None,
    }
    return Wish(**{**usual, **more})


def test_the_same_seed_asks_the_same() -> None:
    """So a run that went wrong can be made again; another seed or client asks something else."""
    assert asks() == asks()
    texts = {asks(1, **other)[0].wish.text for other in ({}, {"seed": 1}, {"client": 4})}
    assert len(texts) == 3


@pytest.mark.parametrize("model", [None, "some-model"])
def test_the_upstream_understands_and_counts_every_call_as_it_was_meant(model: str | None) -> None:
    """All of them: its input to the token, its answer no longer than asked, streamed or not, and its mark."""
    generator = Generator(0)
    for ask in asks(model=model):
        body = ask.body()
        answer = generator.answer(ENDPOINTS[ask.wish.kind], body, read_directives(body))
        assert answer.input_tokens == ask.input_tokens
        longest = min(ask.wish.tokens, answer.maximum or ask.wish.tokens)
        assert answer.output_tokens == longest * ask.wish.choices
        assert (answer.is_streamed, answer.is_usage_requested) == (
            ask.wish.stream,
            ask.wish.stream and ask.wish.usage,
        )
        assert (mark_of(body), client_of(ask.mark)) == (ask.mark, 3)
        assert body["model"] == (model or MODEL_PREFIX + ask.mark)


def test_there_is_some_of_everything() -> None:
    """Every kind, streamed and whole, with and without usage and maximum, several answers, all three ways to go."""
    calls = asks()
    assert {ask.path for ask in calls} == {"/chat/completions", "/completions", "/embeddings", "/responses"}
    for of in ("stream", "usage", "choices", "maximum_field"):
        assert len({getattr(ask.wish, of) for ask in calls}) > 1
    assert {None, 4096, 32_000} < {ask.wish.maximum for ask in calls}
    left = Counter(ask.wish.leave.when for ask in calls if ask.wish.leave)
    assert left.keys() == {"after_a_time", "after_some_chunks", "before_the_end"}
    assert 40 < left.total() < 120
    lengths = [len(ask.wish.text.split()) for ask in calls]
    assert min(lengths) < 200
    assert max(lengths) > 2000
    assert 2 < sum(ask.wish.stream and ask.wish.tokens >= 1500 for ask in calls) < 30


@pytest.mark.parametrize(
    ("asked", "output"),
    [
        ({}, 1024),
        ({"maximum": 5}, 5),
        ({"maximum": 32_000}, 1024),
        ({"maximum": 5, "choices": 3}, 15),
        ({"kind": "completions"}, 16),
        ({"kind": "completions", "maximum": 100}, 100),
        ({"kind": "embeddings"}, 0),
        ({"kind": "responses"}, 1024),
    ],
)
def test_what_a_call_needs_is_its_input_and_the_smallest_answer(asked: dict[str, Any], output: int) -> None:
    """As the README says it: what was asked, at most 1024, for each choice; nothing where nothing is generated."""
    ask = Ask("call-1-1", 0, wish(**asked))
    uncounted = {"chat": 5, "responses": 6}.get(ask.wish.kind, 0)
    assert ask.needed - ask.input_tokens - uncounted == output


def test_a_mark_in_the_prompt_takes_more_tokens_than_words() -> None:
    """Seven at the most for any of the first thousand clients' calls, of which the upstream counts one."""
    bare, marked = (Ask("call-999-99999", 0, wish(), model) for model in (None, "m"))
    assert (marked.input_tokens - bare.input_tokens, marked.needed - bare.needed) == (1, 7)


def test_a_call_that_is_made_again_is_the_same_but_for_its_mark() -> None:
    """It is to be let in after the reset, so it does not leave before."""
    asker = Asker(Plan(), 0)
    first = Ask("call-0-9", 0, wish(leave=Leave("before_the_end")))
    again = asker.again(first)
    assert again.mark != first.mark
    assert again.wish == wish()


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"model": "gpt-4o-mini"},
        {"input": [1, 2]},
        {"messages": [{"role": "user"}]},
        {"prompt": "hello there"},
        {"input": "call-x-1 hello"},
    ],
)
def test_a_call_of_somebody_else_has_no_mark(asked: dict[str, Any]) -> None:
    """Other traffic on the same upstream is nobody's client."""
    assert client_of(mark_of(asked)) is None


def test_a_proxy_may_make_a_list_of_a_prompt() -> None:
    """The mark is still found."""
    assert mark_of({"input": ["call-1-2 hello"]}) == "call-1-2"


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({"limit": 5000}, 5000),
        ({}, 480_000),
        ({"shared": True}, 3_840_000),
        ({"replicas": 3}, 240_000),
        ({"per": "5s"}, 40_000),
        ({"per": "minute", "seconds": 600}, 480_000),
    ],
)
def test_without_a_limit_the_quota_is_used_up_about_half_way(given: dict[str, Any], tokens: int) -> None:
    """By the clients, the length of a window, and how many share it."""
    assert Plan(**given).tokens == tokens


@pytest.mark.parametrize(
    ("seconds", "every", "kills"),
    [(60, 10, [10, 20, 30, 40, 50]), (10, 4, [4, 8]), (10, 0, []), (10, 10, []), (10, 20, [])],
)
def test_kills_come_at_their_times_and_not_at_the_end(seconds: float, every: float, kills: list[float]) -> None:
    """After the last one there are still calls."""
    assert Plan(seconds=seconds, kill_every_s=every).kills_at_s == kills


@pytest.mark.parametrize(
    ("given", "lease_s", "pauses"),
    [
        ({}, 5, []),
        ({"replicas": 3}, 5, [20, 40]),
        ({"replicas": 3, "pause_every_s": 0}, 5, []),
        ({"replicas": 3, "pause_every_s": 1}, 5, [15, 30]),
        ({"replicas": 2, "seconds": 8, "pause_every_s": 3}, 1, [3]),
        ({"replicas": 2, "seconds": 8, "pause_every_s": 5}, 1, []),
    ],
)
def test_pauses_last_three_leases_and_are_over_before_the_end(
    given: dict[str, Any], lease_s: float, pauses: list[float]
) -> None:
    """And before the next one; of a proxy that is alone there are none, as nobody could take it for dead."""
    plan = Plan(**given)
    assert (plan.lease_s, plan.pause_s, plan.pauses_at_s) == (lease_s, 3 * lease_s, pauses)
    assert plan.restart_at_s == plan.seconds / 2


def test_a_plan_that_cannot_be() -> None:
    """More users than clients, or a window that is none: said before anything starts."""
    with pytest.raises(ValueError, match="3 users need as many clients"):
        Plan(clients=2, users=3)
    with pytest.raises(ValueError, match="month"):
        Plan(per="1M")
    assert (Plan().wait_s, Plan(seconds=30).wait_s, Plan(seconds=1).wait_s) == (30, 15, 10)
