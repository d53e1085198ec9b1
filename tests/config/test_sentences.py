"""What `check` prints for a valid policy: a sentence for each group."""

import pytest

from proxy.config.loader import load_text
from proxy.config.sentences import sentences
from tests.config.test_lint import ADMINS, DAILY, IN_BOTH, UPSTREAM, group


def printed(below: str) -> tuple[str, ...]:
    return sentences(load_text(UPSTREAM + below))


@pytest.mark.parametrize(
    ("below", "sentence"),
    [
        (
            group(
                DAILY + "      frontier: {models: [gpt-4o, 'o*'], tokens: 50k, requests: 100, per: 6h}\n",
                users="a: {groups: [staff]}, b: {groups: [staff]}, c: {groups: [staff]}",
            ),
            "staff: each of 3 members may use 200,000 tokens a day of any model, and on gpt-4o, o*: "
            "50,000 tokens and 100 requests in 6 hours from the first call.",
        ),
        (
            group("      pot: {shared: true, tokens: 5M, per: month}\n" + DAILY, users=IN_BOTH, more=ADMINS),
            "staff: its one member may use 200,000 tokens a day of any model; "
            "its one member may use 5,000,000 tokens a month of any model.",
        ),
        (
            group("      pot: {shared: true, output_tokens: 1, input_tokens: 2, requests: 1, per: 1w}\n").replace(
                "{groups: [staff]}", "{groups: [staff]}, bob: {groups: [staff]}"
            ),
            "staff: all 2 members together may use 2 input tokens, 1 output token and 1 request "
            "in 1 week from the first call of any model.",
        ),
        (
            group("      a: {requests: 5, per: hour, enforce: shadow}\n", users=""),
            "staff: its members (none in this file) may use 5 requests an hour (never refused) of any model.",
        ),
        (
            group("      a: {requests: 5, per: day, enforce: after}\n", name="everyone"),
            "everyone: every user, whatever the group, may use "
            "5 requests a day (counted when calls have ended) of any model.",
        ),
        (
            group("      a: {requests: 5, per: day, shared: true}\n", name="default"),
            "default: all users whose own groups have no quota for the model together may use "
            "5 requests a day of any model.",
        ),
        ("groups: {a: {unlimited: true}}", "a: its members (none in this file) may use any model without limit."),
        (
            "groups: {a: {unlimited: true, models: [x, y]}}",
            "a: its members (none in this file) may use x, y without limit.",
        ),
        ("groups: {a: {models: [x]}}", "a: no quotas; only models x."),
    ],
)
def test_each_group_is_described_in_a_sentence(below, sentence):
    """The operator can compare it with what was meant."""
    if "{groups: [staff]}" in below and ("everyone" in below or "default" in below):
        below = below.replace("{groups: [staff]}", "{}")
    assert printed(below)[0] == sentence


def test_the_sentences_are_in_the_order_of_the_file():
    """That order decides through which group a call is admitted."""
    assert [sentence.partition(":")[0] for sentence in printed("groups: {z: {}, a: {}}")] == ["z", "a"]
