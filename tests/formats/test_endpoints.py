"""The list of endpoints is closed, and all that OpenAI publishes is decided in it: metered, answered or refused.

wire §1.1 (all endpoints), §1.7 (what is denied); threats T19, T20.
"""

import re
from pathlib import Path

import anthropic
import openai
import pytest
from openai.lib import azure

from proxy.formats.endpoints import (
    CLOSED,
    METERED,
    PREFIXES,
    RESPONSE_ID,
    STORED_RESPONSE_PATHS,
    Endpoint,
    StoredResponsePath,
    closed,
    is_messages_path,
)

# What the proxy answers by itself.
ANSWERED = {("GET", "/models"), ("GET", "/models/{}")}
# Endpoints that were published and that the SDK has no method for, or no longer.
BESIDE_THE_SDK = """
    GET /realtime
    GET /live/sessions
    POST /threads/{}/runs/{}/steps
    POST /vector_stores/{}/search
    GET /organization/costs
    POST /containers/{}/files
    GET /fine_tuning/jobs/{}/events
    POST /images/variations
"""
_CALLED = re.compile(
    r'self\._(post|get|delete|patch|put|get_api_list)\(\s*(?:path_template\(\s*)?f?"(/[^"?]*)', re.DOTALL
)
_ALL_CALLS = re.compile(r"self\._(?:post|get|delete|patch|put|get_api_list)\(\s*(?![\s)])")


def sdk_source() -> list[str]:
    """The modules of the SDK in which its methods stand."""
    return [path.read_text(encoding="utf-8") for path in (Path(openai.__file__).parent / "resources").rglob("*.py")]


def published() -> list[tuple[str, str]]:
    """Every method and path that the installed SDK can send, and those that we know of beside it."""
    found = {
        ("GET" if method == "get_api_list" else method.upper(), re.sub(r"\{[^}]*\}", "{}", path))
        for text in sdk_source()
        for method, path in _CALLED.findall(text)
    }
    beside = {(method, path) for method, path in map(str.split, BESIDE_THE_SDK.strip().splitlines())}
    return sorted(found | beside)


def is_decided(method: str, path: str) -> bool:
    """Whether the table says what becomes of it."""
    is_metered = method == "POST" and path in {endpoint.path for endpoint in METERED}
    is_kept = (method, path) in {(each.method, each.path("{}")) for each in STORED_RESPONSE_PATHS}
    return is_metered or is_kept or (method, path) in ANSWERED or closed(method, path) is not None


def test_every_path_of_the_sdk_is_decided() -> None:
    """A new release of the SDK that brings a path makes this fail, and name it: decide it in `endpoints`."""
    assert [f"{method} {path}" for method, path in published() if not is_decided(method, path)] == []


def test_the_paths_are_found_in_the_sdk() -> None:
    """The test above would be worth nothing, had the SDK begun to write its paths otherwise."""
    calls = sum(len(_ALL_CALLS.findall(text)) for text in sdk_source())
    read = sum(len(_CALLED.findall(text)) for text in sdk_source())
    assert read == calls > 700
    assert {("POST", "/chat/completions"), ("GET", "/models/{}"), ("POST", "/audio/speech")} <= set(published())


@pytest.mark.parametrize(
    ("method", "path", "says"),
    [
        ("POST", "/realtime/client_secrets", "past every quota"),
        ("POST", "/realtime/calls/call_1/accept", "past every quota"),
        ("POST", "/chatkit/sessions", "past every quota"),
        ("GET", "/organization/usage/completions", "administers"),
        ("DELETE", "/models/ft:gpt-4o:acme", "administers"),
        ("POST", "/batches", "after the answer"),
        ("POST", "/fine_tuning/jobs", "after the answer"),
        ("POST", "/evals/eval_1/runs", "after the answer"),
        ("POST", "/videos", "after the answer"),
        ("GET", "/files", "all users of this proxy share"),
        ("GET", "/files/file-1/content", "all users of this proxy share"),
        ("GET", "/chat/completions", "all users of this proxy share"),
        ("POST", "/threads/thread_1/runs", "all users of this proxy share"),
    ],
)
def test_a_refusal_says_why(method: str, path: str, says: str) -> None:
    """Also behind `/v1` and Azure's prefixes."""
    for prefix in (*PREFIXES, "/openai/deployments/gpt-4o"):
        row = closed(method, prefix + path)
        assert row is not None
        assert says in row.reason


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/tomorrow"),
        ("GET", "/filesystem"),
        ("GET", "/v1files"),
        ("GET", "/v2/files"),
        ("PUT", "/chat/completions"),
        ("POST", "/responses/resp_1"),
        ("POST", "/responses/resp_1/rewind"),
        ("GET", "/chat/completions/a/b"),
        ("GET", "/"),
        ("GET", ""),
    ],
)
def test_what_nobody_has_heard_of_has_no_row(method: str, path: str) -> None:
    """It is not served either, and there is no reason to give."""
    assert closed(method, path) is None


@pytest.mark.parametrize("kept", STORED_RESPONSE_PATHS, ids=lambda kept: f"{kept.method}{kept.of_it}")
def test_what_leads_to_a_users_own_is_not_refused(kept: StoredResponsePath) -> None:
    """By an id that can't lead anywhere else."""
    assert closed(kept.method, kept.path("resp_1")) is None
    assert RESPONSE_ID.fullmatch("resp_0f-A=")
    assert not any(map(RESPONSE_ID.fullmatch, ("", ".", "..", "a/b", "a?b", "a%2fb", "a\n", "é", "a" * 513)))


@pytest.mark.parametrize("endpoint", METERED, ids=lambda endpoint: endpoint.name)
def test_what_is_metered_is_not_refused(endpoint: Endpoint) -> None:
    """And no two have the same name or path."""
    assert closed("POST", endpoint.path) is None
    assert [each.name for each in METERED].count(endpoint.name) == 1
    assert [each.path for each in METERED].count(endpoint.path) == 1


def test_the_endpoints_differ_in_few_ways() -> None:
    """What each makes, whether that is seen as text, and whether a stream has to be asked for its usage."""
    assert {
        each.name: (each.charge, each.generates, each.shows_output, each.has_usage_option, each.is_of_responses)
        for each in METERED
    } == {
        "chat": ("tokens", True, True, True, False),
        "completions": ("tokens", True, True, True, False),
        "embeddings": ("tokens", False, False, False, False),
        "responses": ("tokens", True, True, False, True),
        "compact": ("tokens", True, False, False, True),
        "input_tokens": ("nothing", False, False, False, True),
        "moderations": ("request", False, False, False, False),
        "images": ("tokens_if_said", True, False, False, False),
        "image_edits": ("tokens_if_said", True, False, False, False),
        "image_variations": ("request", False, False, False, False),
        "speech": ("tokens_if_said", True, False, False, False),
        "transcriptions": ("tokens_if_said", True, False, False, False),
        "translations": ("tokens_if_said", True, False, False, False),
        "messages": ("tokens", True, True, False, False),
        "count_tokens": ("nothing", False, False, False, False),
    }


def test_azure_has_deployments_for_what_its_sdk_sends_there() -> None:
    """All else stands beside them."""
    paths = {each.path for each in METERED if each.has_deployments}
    assert paths == azure._deployments_endpoints


def test_every_path_of_anthropic_s_sdk_is_decided() -> None:
    """Likewise: what runs by itself, what is shared and what administers is closed; two are metered."""
    resources = Path(anthropic.__file__).parent / "resources"
    texts = [path.read_text(encoding="utf-8") for path in resources.rglob("*.py")]
    paths = {re.sub(r"\{[^}]*\}", "{}", path) for text in texts for path in re.findall(r'"/v1(/[^"?]+)', text)}
    assert {"/messages", "/messages/count_tokens", "/messages/batches/{}"} <= paths
    own = {endpoint.path for endpoint in METERED if endpoint.is_of_messages} | {path for _, path in ANSWERED}
    assert sorted(path for path in paths - own if closed("POST", path) is None) == []
    assert closed("POST", "/messages") is None


def test_no_row_is_there_twice() -> None:
    """A second reason would never be read."""
    assert len({(row.method, row.pattern) for row in CLOSED}) == len(CLOSED)


@pytest.mark.parametrize(
    ("path", "is_its"),
    [
        ("/messages", True),
        ("/messages/count_tokens", True),
        ("/messages/batches/b/results", True),
        ("/messagesx", False),
        ("/chat/completions", False),
        ("/chat/completions/c/messages", False),
        ("/", False),
    ],
)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_anthropic_s_surface_is_told_by_the_path(prefix: str, path: str, is_its: bool) -> None:
    """Before anything of a request is read, and behind each prefix that is served: also a wrong key is answered in
    its shape."""
    assert is_messages_path(prefix + path) == is_its
