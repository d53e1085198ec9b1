"""A call is prepared, or refused, before anything is reserved."""

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from aiohttp.test_utils import make_mocked_request

from proxy.calls.call import Call, prepare_call
from proxy.errors import InvalidRequest, ModelNotFound
from proxy.formats.content import read_prompt
from proxy.formats.endpoints import CHAT, COUNT_TOKENS, MESSAGES, Endpoint
from proxy.formats.estimate import estimate_demand
from proxy.formats.request import forwarded_body, parse_request
from proxy.identity.authentication import Caller, Snapshot
from proxy.ledger.book import Accepted, Book
from proxy.ledger.entry import CallLabels
from proxy.policy.key import Key
from proxy.policy.quota import Demand
from proxy.web.response import WebResponder
from tests.builders import NOON, log_line, snapshot_of
from tests.stage import STAFF, config_of

ALICE = Caller("alice", ("staff",), Key("0123abcd"), source="file")


def _snapshot(folder: Path, policy: str = STAFF, *, kind: str = "simulator") -> Snapshot:
    return snapshot_of(config_of(policy, folder=folder, upstream="http://127.0.0.1:1/v1", kind=kind))


def _call(snapshot: Snapshot, model: str = "fast", more: bytes = b"") -> Call:
    request = parse_request(CHAT, b'{"model": "%s", "messages": []%s}' % (model.encode(), more))
    client = WebResponder(make_mocked_request("POST", "/v1/chat/completions"), log_line())
    return prepare_call(request, ALICE, snapshot, client)


@pytest.mark.parametrize(
    ("change", "model", "remedy"),
    [
        (("", ""), "gpt-9", "GET /v1/models"),
        (("staff: {", "staff: {models: [gpt-4o-mini], "), "fast", "you may not use it"),
        (("daily: {", "daily: {models: [gpt-4o-mini], "), "fast", "unmatched: allow"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_with_a_remedy(
    change: tuple[str, str], model: str, remedy: str, tmp_path: Path
) -> None:
    """The model is unknown, not allowed, or covered by no quota. The code is the same, the remedies differ."""
    with pytest.raises(ModelNotFound, match=remedy):
        _call(_snapshot(tmp_path, STAFF.replace(*change)), model)


def _admit(call: Call) -> Accepted:
    """The call, admitted by an empty ledger."""
    prompt = read_prompt(call.request.body, is_chat=True)
    body = forwarded_body(call.request, call.model)
    demand = estimate_demand(call.request, call.model, prompt, body_bytes=len(body))
    operation = call.reserve(replace(demand, is_estimated=False), owner="me", recorded_model=call.model.name)
    accepted = Book({}, {}, NOON).apply(operation)
    assert isinstance(accepted, Accepted)
    return accepted


def test_a_call_is_reserved_under_its_labels(tmp_path: Path) -> None:
    """The model's name is the client's, and the id is the one that the client gets."""
    call = _call(_snapshot(tmp_path))
    entry = _admit(call).entry
    assert (entry.id, entry.owner) == ("req_1", "me")
    assert entry.labels == CallLabels("alice", "fast", "chat", "simulated", "0123abcd", address="192.0.2.1")


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_lowered_maximum_is_shared_by_the_choices(stream: str, tmp_path: Path) -> None:
    """Each choice may use its part of what is free, and the header `x-quota-capped` says how much that is in all.

    A stream holds less at the beginning, but its maximum is lowered to the same number.
    """
    snapshot = _snapshot(tmp_path, STAFF.replace("tokens: 1M", "tokens: 4k"))
    call = _call(snapshot, "gpt-4o-mini", b', "n": 3, "max_tokens": 2000, "stream": %s' % stream.encode())
    accepted = _admit(call)
    free = 4000 - accepted.entry.hold.input
    assert (accepted.entry.maximum, accepted.entry.capped_by) == (free, "staff/daily")
    assert accepted.entry.hold.output == (400 if stream == "true" else free)  # a tenth of the quota
    capped = call.capped(accepted.entry, context=None)
    assert json.loads(capped.body())["max_tokens"] == free // 3
    headers = capped.quota_headers(accepted.entry, accepted.counters, NOON, is_held=True)
    assert headers["x-quota-capped"] == f'{free // 3 * 3}; quota="staff/daily"'
    assert headers["x-ratelimit-remaining-tokens"] == "4000"
    with_own_hold = capped.quota_headers(accepted.entry, accepted.counters, NOON, is_held=False)
    assert with_own_hold["x-ratelimit-remaining-tokens"] == str(4000 - accepted.entry.hold.tokens)


def test_a_call_that_fits_is_not_capped(tmp_path: Path) -> None:
    """No maximum is lowered and the header is missing, also if nobody knows the maximum."""
    call = _call(_snapshot(tmp_path), "gpt-4o-mini")
    accepted = _admit(call)
    assert (accepted.entry.maximum, accepted.entry.capped_by) == (None, None)
    assert "x-quota-capped" not in call.quota_headers(accepted.entry, accepted.counters, NOON, is_held=True)


def test_the_model_label_comes_from_the_snapshot(tmp_path: Path) -> None:
    """T92: a name that a client made up is no label, also if the list of models is open."""
    open_list = STAFF.replace("models:\n", 'models:\n  "*": {upstream: simulated}\n')
    assert _call(_snapshot(tmp_path, open_list), "made-up").model_label == "other"
    assert _call(_snapshot(tmp_path), "fast").model_label == "fast"


@pytest.mark.parametrize(
    ("endpoint", "kind", "remedy"),
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
def test_nothing_is_translated_between_the_two_apis(
    endpoint: Endpoint, kind: str, remedy: str, tmp_path: Path
) -> None:
    """A request for a model of the other API is refused, and the error names the path to use."""
    snapshot = _snapshot(tmp_path, kind=kind)
    request = parse_request(endpoint, b'{"model": "fast", "messages": [], "max_tokens": 5}')
    client = WebResponder(make_mocked_request("POST", "/v1" + endpoint.path), log_line())
    if remedy:
        with pytest.raises(InvalidRequest, match=f"send it to {remedy},"):
            prepare_call(request, ALICE, snapshot, client)
    else:
        assert prepare_call(request, ALICE, snapshot, client).request is request


def test_an_answer_of_v1_messages_has_anthropic_s_limit_headers(tmp_path: Path) -> None:
    """In addition to ours, and with the id in the header that Anthropic's SDK reads."""
    snapshot = _snapshot(tmp_path)
    request = parse_request(MESSAGES, b'{"model": "fast", "messages": [], "max_tokens": 5}')
    client = WebResponder(make_mocked_request("POST", "/v1/messages"), log_line())
    call = prepare_call(request, ALICE, snapshot, client)
    accepted = _admit(call)
    headers = call.quota_headers(accepted.entry, accepted.counters, NOON, is_held=True)
    assert headers["anthropic-ratelimit-tokens-remaining"] == headers["x-ratelimit-remaining-tokens"] == "1000000"
    assert headers["request-id"] == "req_1"


OPEN = STAFF.replace(
    "models:\n", 'models:\n  "*": {upstream: simulated}\n  online: {upstream: simulated, model: "x:online"}\n'
)


@pytest.mark.parametrize("name", ["@preset/x", "fast@preset/x", "gpt-4o:online", "GPT-4o:Online", "a,b"])
def test_an_unlisted_name_asks_for_nothing_that_is_refused_as_a_field(name: str, tmp_path: Path) -> None:
    """The operator may list a model with any name at its upstream. Of a closed list nobody learns a name."""
    with pytest.raises(InvalidRequest, match="list a model"):
        _call(_snapshot(tmp_path, OPEN), name)
    assert _call(_snapshot(tmp_path, OPEN), "online").model.upstream_model == "x:online"
    assert _call(_snapshot(tmp_path, OPEN), "fast:free").model.name == "fast:free"
    with pytest.raises(ModelNotFound):
        _call(_snapshot(tmp_path), name)


def test_fields_that_any_target_refuses_are_refused(tmp_path: Path) -> None:
    """Which upstream gets the call is not known before it is sent. Other models may use the field."""
    other = '}\n  other: {base_url: "http://127.0.0.1:1/v1", refuse: [provider, n]'
    policy = OPEN.replace(
        "  fast: {", "  both: {upstreams: [{upstream: simulated}, {upstream: other, weight: 0}]}\n  fast: {"
    )
    config = config_of(policy, folder=tmp_path, upstream="http://127.0.0.1:1/v1", more=other)
    for field, value in (("provider", "{}"), ("Provider", "0"), ("n", "1"), ("PROVIDER", '"x"')):
        used = b', "%s": %s' % (field.encode(), value.encode())
        with pytest.raises(InvalidRequest, match="the operator of this proxy refuses it") as caught:
            _call(snapshot_of(config), "both", used)
        assert (caught.value.param, caught.value.code) == (field, "unsupported_parameter")
        _call(snapshot_of(config), "fast", used)
    _call(snapshot_of(config), "both", b', "provider": "", "n": null, "providers": 1')


@pytest.mark.parametrize("name", ["llama3", "LLAMA3", "llama3:latest", "library/Llama3"])
def test_ollama_takes_a_name_in_any_spelling(name: str, tmp_path: Path) -> None:
    """A quota on any of them binds, the record has the shortest, and the upstream gets what the client wrote."""
    for pattern in ("llama3", "Llama3:latest", "LLAMA*"):
        policy = OPEN.replace("daily: {", f"llama: {{models: ['{pattern}'], tokens: 5, per: day}}, daily: {{")
        call = _call(_snapshot(tmp_path, policy, kind="ollama"), name)
        assert "staff/llama" in [quota.id for quota in call.binding.quotas]
        assert _labels(call).model == "llama3"
        assert json.loads(call.body())["model"] == name
        other = _call(_snapshot(tmp_path, policy, kind="vllm"), name)
        assert ("staff/llama" in [quota.id for quota in other.binding.quotas]) == fnmatchcase(name, pattern)
        assert _labels(other).model == name


def test_a_listed_model_is_meant_by_its_other_spellings(tmp_path: Path) -> None:
    """With its maximum and its label."""
    policy = OPEN.replace("model: gpt-4o-mini, max", "max")
    call = _call(_snapshot(tmp_path, policy, kind="azure"), "FAST")
    assert (call.model.name, call.model.max_output_tokens, call.model_label) == ("fast", 100, "fast")
    assert _call(_snapshot(tmp_path, policy, kind="openai"), "FAST").model_label == "other"


def _labels(call: Call) -> CallLabels:
    return call.reserve(Demand(1, 1, 1), owner="me", recorded_model=call.model.name).labels
