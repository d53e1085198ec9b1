"""The calls depend only on the seed, and their tokens are counted as the simulated upstream does."""

from collections import Counter
from itertools import islice
from typing import Any

import pytest

from proxy.simulator.directives import read_directives
from proxy.simulator.text import Endpoint, Generator
from proxy.torture.plan import MODEL_PREFIX, CallGenerator, CallSpec, Disconnect, Plan, PlannedCall, client_of, tag_of

ENDPOINTS = {
    "chat": Endpoint.CHAT,
    "completions": Endpoint.COMPLETIONS,
    "embeddings": Endpoint.EMBEDDINGS,
    "responses": Endpoint.RESPONSES,
}


def planned(count: int = 400, *, seed: int = 0, client: int = 3, model: str | None = None) -> list[PlannedCall]:
    """The first calls of one client."""
    generator = CallGenerator(Plan(seed=seed), client, model)
    return list(islice(iter(generator.next, None), count))


def spec(**more: Any) -> CallSpec:
    """The parameters of a call."""
    usual: dict[str, Any] = {
        "kind": "chat",
        "text": "one two three",
        "answer_tokens": 20,
        "maximum": None,
        "maximum_field": "max_tokens",
        "choices": 1,
        "stream": False,
        "include_usage": False,
        "disconnect": None,
    }
    return CallSpec(**{**usual, **more})


def test_the_same_seed_makes_the_same_calls() -> None:
    """So a run with broken promises can be repeated; another seed or client makes other calls."""
    assert planned() == planned()
    texts = {planned(1, **other)[0].spec.text for other in ({}, {"seed": 1}, {"client": 4})}
    assert len(texts) == 3


@pytest.mark.parametrize("model", [None, "some-model"])
def test_the_upstream_counts_every_call_as_planned(model: str | None) -> None:
    """The input tokens, the length of the answer, whether it is streamed, and the tag."""
    generator = Generator(0)
    for call in planned(model=model):
        body = call.body()
        answer = generator.answer(ENDPOINTS[call.spec.kind], body, read_directives(body))
        assert answer.input_tokens == call.input_tokens
        longest = min(call.spec.answer_tokens, answer.maximum or call.spec.answer_tokens)
        assert answer.output_tokens == longest * call.spec.choices
        assert (answer.is_streamed, answer.is_usage_requested) == (
            call.spec.stream,
            call.spec.stream and call.spec.include_usage,
        )
        assert (tag_of(body), client_of(call.tag)) == (call.tag, 3)
        assert body["model"] == (model or MODEL_PREFIX + call.tag)


def test_the_calls_are_of_every_kind() -> None:
    """Every endpoint, streamed or not, with and without usage and maximum, several choices, all disconnects."""
    calls = planned()
    assert {call.path for call in calls} == {"/chat/completions", "/completions", "/embeddings", "/responses"}
    for field in ("stream", "include_usage", "choices", "maximum_field"):
        assert len({getattr(call.spec, field) for call in calls}) > 1
    assert {None, 4096, 32_000} < {call.spec.maximum for call in calls}
    disconnects = Counter(call.spec.disconnect.when for call in calls if call.spec.disconnect)
    assert disconnects.keys() == {"after_time", "after_chunks", "after_text"}
    assert 40 < disconnects.total() < 120
    lengths = [len(call.spec.text.split()) for call in calls]
    assert min(lengths) < 200
    assert max(lengths) > 2000
    assert 2 < sum(call.spec.stream and call.spec.answer_tokens >= 1500 for call in calls) < 30


@pytest.mark.parametrize(
    ("params", "output"),
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
def test_a_call_needs_its_input_and_the_smallest_answer(params: dict[str, Any], output: int) -> None:
    """As documented: the maximum, at most 1024, for each choice; nothing for an embedding."""
    call = PlannedCall("call-1-1", 0, spec(**params))
    uncounted = {"chat": 5, "responses": 6}.get(call.spec.kind, 0)
    assert call.tokens_needed - call.input_tokens - uncounted == output


def test_a_tag_in_the_prompt_has_more_tokens_than_words() -> None:
    """At most seven for each of the first thousand clients; the simulated upstream counts one."""
    untagged, tagged = (PlannedCall("call-999-99999", 0, spec(), model) for model in (None, "m"))
    assert (tagged.input_tokens - untagged.input_tokens, tagged.tokens_needed - untagged.tokens_needed) == (1, 7)


def test_a_repeated_call_differs_in_its_tag_and_does_not_disconnect() -> None:
    """It checks that a call is admitted after the reset, so its client stays."""
    generator = CallGenerator(Plan(), 0)
    first = PlannedCall("call-0-9", 0, spec(disconnect=Disconnect("after_text")))
    again = generator.repeat(first)
    assert again.tag != first.tag
    assert again.spec == spec()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"model": "gpt-4o-mini"},
        {"input": [1, 2]},
        {"messages": [{"role": "user"}]},
        {"prompt": "hello there"},
        {"input": "call-x-1 hello"},
    ],
)
def test_a_call_of_another_client_has_no_tag(params: dict[str, Any]) -> None:
    """Other traffic at the same upstream counts for no client of the run."""
    assert client_of(tag_of(params)) is None


def test_the_tag_is_found_in_a_list_with_one_prompt() -> None:
    """A proxy may send one in place of a string."""
    assert tag_of({"input": ["call-1-2 hello"]}) == "call-1-2"


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
def test_the_default_limit_is_used_up_in_about_half_of_a_window(given: dict[str, Any], tokens: int) -> None:
    """It depends on the clients, the length of a window, and the number of users that share it."""
    assert Plan(**given).tokens == tokens


@pytest.mark.parametrize(
    ("seconds", "every", "kills"),
    [(60, 10, [10, 20, 30, 40, 50]), (10, 4, [4, 8]), (10, 0, []), (10, 10, []), (10, 20, [])],
)
def test_the_times_of_kills(seconds: float, every: float, kills: list[float]) -> None:
    """There is none at the end of the run: calls follow each kill."""
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
def test_pauses_last_three_leases_and_are_over_after_text(
    given: dict[str, Any], lease_s: float, pauses: list[float]
) -> None:
    """And before the next pause. A single proxy is not paused, because no other one could take it for dead."""
    plan = Plan(**given)
    assert (plan.lease_s, plan.pause_s, plan.pauses_at_s) == (lease_s, 3 * lease_s, pauses)
    assert plan.restart_at_s == plan.seconds / 2


def test_an_invalid_plan_raises() -> None:
    """More users than clients, or an invalid window, before anything starts."""
    with pytest.raises(ValueError, match="3 users need as many clients"):
        Plan(clients=2, users=3)
    with pytest.raises(ValueError, match="month"):
        Plan(per="1M")
    assert (Plan().wait_s, Plan(seconds=30).wait_s, Plan(seconds=1).wait_s) == (30, 15, 10)
