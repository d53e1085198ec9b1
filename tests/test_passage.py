"""What one call takes along: found or refused before anything is reserved."""

from pathlib import Path

import pytest
from aiohttp.test_utils import make_mocked_request

from proxy.books import Booked, Books
from proxy.client import Client
from proxy.errors import ModelNotFound
from proxy.passage import Passage, passage_for
from proxy.policy import Policy
from proxy.wire import CHAT, forwarded_body, parse_call
from tests.builders import NOON
from tests.stage import STAFF, config_of


def _policy(folder: Path, policy: str = STAFF) -> Policy:
    return config_of(policy, folder=folder, upstream="http://127.0.0.1:1/v1").policy


def _passage(policy: Policy, model: str = "fast", more: bytes = b"") -> Passage:
    call = parse_call(CHAT, b'{"model": "%s", "messages": []%s}' % (model.encode(), more))
    client = Client(make_mocked_request("POST", "/v1/chat/completions"), id="req_1")
    return passage_for(call, policy.users["alice"], policy, client)


@pytest.mark.parametrize(
    ("change", "model", "says"),
    [
        (("", ""), "gpt-9", "GET /v1/models"),
        (("staff: {", "staff: {models: [gpt-4o-mini], "), "fast", "you may not use it"),
        (("daily: {", "daily: {models: [gpt-4o-mini], "), "fast", "unmatched: allow"),
    ],
)
def test_a_model_that_is_not_there_says_what_would_help(
    change: tuple[str, str], model: str, says: str, tmp_path: Path
) -> None:
    """Unknown, not allowed, not covered: three causes, one code, each with its remedy."""
    with pytest.raises(ModelNotFound, match=says):
        _passage(_policy(tmp_path, STAFF.replace(*change)), model)


def test_a_lowered_maximum_is_shared_by_the_choices(tmp_path: Path) -> None:
    """What is held for the whole call is divided: each choice may use its part, and the head says so."""
    policy = _policy(tmp_path, STAFF.replace("tokens: 1M", "tokens: 4k"))
    passage = _passage(policy, "gpt-4o-mini", b', "n": 3, "max_tokens": 2000')
    body = forwarded_body(passage.call, passage.model)
    act = passage.reserve(len(body), owner="me")
    booked = Books({}, {}, NOON).apply(act)
    assert isinstance(booked, Booked)
    assert booked.entry.hold.tokens == 4000
    each = booked.entry.hold.output // 3
    assert b'"max_tokens":%d' % each in passage.lowered_body(booked.entry)
    told = passage.quota_headers(booked.entry, booked.counters, NOON, is_held=True)
    assert told["x-quota-capped"] == f'{booked.entry.hold.output}; quota="staff/daily"'
    assert told["x-ratelimit-remaining-tokens"] == "4000"
    held = passage.quota_headers(booked.entry, booked.counters, NOON, is_held=False)
    assert held["x-ratelimit-remaining-tokens"] == "0"


def test_labels_come_from_the_policy_only(tmp_path: Path) -> None:
    """A name that a client made up is no label, also where the list is open."""
    open_list = STAFF.replace("models:\n", 'models:\n  "*": {upstream: simulated}\n')
    assert _passage(_policy(tmp_path, open_list), "made-up").model_label == "other"
    assert _passage(_policy(tmp_path), "fast").model_label == "fast"
