"""What one call takes along: found or refused before anything is reserved."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp.test_utils import make_mocked_request

from proxy.calls.call import Call, prepare_call
from proxy.errors import InvalidRequest, ModelNotFound
from proxy.formats.content import read_prompt
from proxy.formats.endpoints import CHAT, COUNT_TOKENS, MESSAGES, Endpoint
from proxy.formats.estimate import estimate_demand
from proxy.formats.request import forwarded_body, parse_request
from proxy.ledger.book import Accepted, Book
from proxy.ledger.entry import CallLabels
from proxy.policy.policy import Policy
from proxy.web.response import WebResponder
from tests.builders import NOON
from tests.stage import STAFF, config_of


def _policy(folder: Path, policy: str = STAFF) -> Policy:
    return config_of(policy, folder=folder, upstream="http://127.0.0.1:1/v1").policy


def _passage(policy: Policy, model: str = "fast", more: bytes = b"") -> Call:
    request = parse_request(CHAT, b'{"model": "%s", "messages": []%s}' % (model.encode(), more))
    client = WebResponder(make_mocked_request("POST", "/v1/chat/completions"), id="req_1")
    return prepare_call(request, policy.users["alice"], policy, client)


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


def _booked(call: Call) -> Accepted:
    """The passage's call, let in by empty books."""
    prompt = read_prompt(call.request.document, model=call.model.upstream_model, is_chat=True)
    body = forwarded_body(call.request, call.model)
    demand = estimate_demand(call.request, call.model, prompt, body_bytes=len(body))
    booked = Book({}, {}, NOON).apply(call.reserve(replace(demand, is_estimated=False), owner="me"))
    assert isinstance(booked, Accepted)
    return booked


def test_a_call_is_booked_under_its_own_names(tmp_path: Path) -> None:
    """The user's, the model's as the client names it, and the id that the client is told."""
    call = _passage(_policy(tmp_path))
    entry = _booked(call).entry
    assert (entry.id, entry.owner) == ("req_1", "me")
    assert entry.labels == CallLabels("alice", "fast", "chat", "simulated")


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_lowered_maximum_is_shared_by_the_choices(stream: str, tmp_path: Path) -> None:
    """What there is room for is divided: each choice may use its part, and the head says so.

    Of a stream less is held to begin with, but it is told the same.
    """
    policy = _policy(tmp_path, STAFF.replace("tokens: 1M", "tokens: 4k"))
    call = _passage(policy, "gpt-4o-mini", b', "n": 3, "max_tokens": 2000, "stream": %s' % stream.encode())
    booked = _booked(call)
    room = 4000 - booked.entry.hold.input
    assert (booked.entry.maximum, booked.entry.capped_by) == (room, "staff/daily")
    assert booked.entry.hold.output == (3 * 1024 if stream == "true" else room)
    assert json.loads(call.body_for(booked.entry))["max_tokens"] == room // 3
    told = call.quota_headers(booked.entry, booked.counters, NOON, is_held=True)
    assert told["x-quota-capped"] == f'{room}; quota="staff/daily"'
    assert told["x-ratelimit-remaining-tokens"] == "4000"
    held_too = call.quota_headers(booked.entry, booked.counters, NOON, is_held=False)
    assert held_too["x-ratelimit-remaining-tokens"] == str(4000 - booked.entry.hold.tokens)


def test_a_call_that_has_room_is_not_capped(tmp_path: Path) -> None:
    """Then nothing is lowered, and the head says nothing of it; also where nobody knows the maximum."""
    call = _passage(_policy(tmp_path), "gpt-4o-mini")
    booked = _booked(call)
    assert (booked.entry.maximum, booked.entry.capped_by) == (None, None)
    assert "x-quota-capped" not in call.quota_headers(booked.entry, booked.counters, NOON, is_held=True)


def test_labels_come_from_the_policy_only(tmp_path: Path) -> None:
    """A name that a client made up is no label, also where the list is open."""
    open_list = STAFF.replace("models:\n", 'models:\n  "*": {upstream: simulated}\n')
    assert _passage(_policy(tmp_path, open_list), "made-up").model_label == "other"
    assert _passage(_policy(tmp_path), "fast").model_label == "fast"


@pytest.mark.parametrize(
    ("endpoint", "kind", "says"),
    [
        (CHAT, "anthropic", "/v1/messages"),
        (COUNT_TOKENS, "openai", "/v1/chat/completions"),
        (MESSAGES, "openai", "/v1/chat/completions"),
        (MESSAGES, "vllm", "/v1/chat/completions"),
        (MESSAGES, "anthropic", ""),
        (MESSAGES, "simulator", ""),
        (CHAT, "simulator", ""),
        (CHAT, "vllm", ""),
    ],
)
def test_nothing_is_translated(endpoint: Endpoint, kind: str, says: str, tmp_path: Path) -> None:
    """A model that is served on the other surface says where to send it."""
    policy = config_of(STAFF, folder=tmp_path, upstream="http://127.0.0.1:1/v1", kind=kind).policy
    request = parse_request(endpoint, b'{"model": "fast", "messages": [], "max_tokens": 5}')
    client = WebResponder(make_mocked_request("POST", "/v1" + endpoint.path), id="req_1")
    if says:
        with pytest.raises(InvalidRequest, match=f"send it to {says},"):
            prepare_call(request, policy.users["alice"], policy, client)
    else:
        assert prepare_call(request, policy.users["alice"], policy, client).request is request


def test_a_message_is_told_its_quotas_in_anthropic_s_words(tmp_path: Path) -> None:
    """Beside ours, and with the id where its SDK reads it."""
    policy = _policy(tmp_path)
    request = parse_request(MESSAGES, b'{"model": "fast", "messages": [], "max_tokens": 5}')
    client = WebResponder(make_mocked_request("POST", "/v1/messages"), id="req_1")
    call = prepare_call(request, policy.users["alice"], policy, client)
    booked = _booked(call)
    told = call.quota_headers(booked.entry, booked.counters, NOON, is_held=True)
    assert told["anthropic-ratelimit-tokens-remaining"] == told["x-ratelimit-remaining-tokens"] == "1000000"
    assert told["request-id"] == "req_1"
