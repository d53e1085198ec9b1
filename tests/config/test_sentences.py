"""What `check` prints for a valid policy: a sentence for each group."""

import pytest

from proxy.config.loader import load_text
from proxy.config.sentences import quota_sentence, sentences
from tests.builders import quota
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


@pytest.mark.parametrize(
    ("fields", "members", "over", "whose", "end"),
    [
        ({}, 42, 3, "Each of 42 members", "; 3 of them are over now."),
        ({}, 1, 1, "Its one member", "; 1 is over now."),
        ({}, 0, 0, "Its members (none now)", "; none of them is over now."),
        ({}, None, 0, "Each member", "."),
        ({"shared": True}, 9, 0, "All 9 members together", "; they are not over now."),
        ({"shared": True}, 9, 1, "All 9 members together", "; they are over now."),
        ({"shared": True}, None, 0, "All its members together", "."),
        ({"id": "everyone/daily"}, 0, 2, "Every user, whatever the group,", "; 2 of them are over now."),
    ],
)
def test_a_quota_is_described_with_its_members(fields, members, over, whose, end):
    """With `is_trial` as it would be."""
    made = quota(fields.get("id", "staff/daily"), tokens=1000, shared="shared" in fields)
    allows = f"{whose} may use 1,000 tokens a day of any model"
    assert quota_sentence(made, members, over, is_trial=False) == allows + end
    end = end.replace("are not over", "would not be over").replace("are over", "would be over")
    assert quota_sentence(made, members, over, is_trial=True) == allows + end.replace("is over", "would be over")


def test_a_quota_for_some_models_names_them():
    made = quota("staff/daily", tokens=1, requests=5, models=["o*", "gpt-4o"])
    text = "Each member may use 1 token and 5 requests a day of o*, gpt-4o."
    assert quota_sentence(made, None, 0, is_trial=False) == text


def test_the_sentences_are_in_the_order_of_the_file():
    """That order decides through which group a call is admitted."""
    assert [sentence.partition(":")[0] for sentence in printed("groups: {z: {}, a: {}}")] == ["z", "a"]
