"""The list of endpoints is closed: every path that OpenAI or Anthropic publishes is metered, answered or refused.

wire §1.1 (all endpoints), §1.7 (refused endpoints); threats T19, T20.
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
    served_instead,
)
from proxy.policy.amounts import Uses

# The proxy answers these itself.
ANSWERED = {("GET", "/models"), ("GET", "/models/{}")}
# Published endpoints for which the SDK has no method, or no longer has one.
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
    """The source of the SDK's modules that call the API."""
    return [path.read_text(encoding="utf-8") for path in (Path(openai.__file__).parent / "resources").rglob("*.py")]


def published() -> list[tuple[str, str]]:
    """Every method and path that the installed SDK can send, and the known ones beside it."""
    found = {
        ("GET" if method == "get_api_list" else method.upper(), re.sub(r"\{[^}]*\}", "{}", path))
        for text in sdk_source()
        for method, path in _CALLED.findall(text)
    }
    beside = {(method, path) for method, path in map(str.split, BESIDE_THE_SDK.strip().splitlines())}
    return sorted(found | beside)


def is_listed(method: str, path: str) -> bool:
    """Whether the list of endpoints contains this path."""
    is_metered = method == "POST" and path in {endpoint.path for endpoint in METERED}
    is_stored = (method, path) in {(each.method, each.path("{}")) for each in STORED_RESPONSE_PATHS}
    return is_metered or is_stored or (method, path) in ANSWERED or closed(method, path) is not None


def test_every_path_of_openai_s_sdk_is_listed() -> None:
    """A new release of the SDK with a new path fails here, with the path: add it to the list in `endpoints`."""
    assert [f"{method} {path}" for method, path in published() if not is_listed(method, path)] == []


def test_the_paths_are_found_in_the_sdk() -> None:
    """If the SDK wrote its paths in another form, the test above would find none and pass."""
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
def test_a_refused_path_has_its_reason(method: str, path: str, says: str) -> None:
    """Behind every prefix: `/v1`, none, and Azure's."""
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
def test_an_unknown_path_has_no_row(method: str, path: str) -> None:
    """It is not served either, but without a reason."""
    assert closed(method, path) is None


@pytest.mark.parametrize("stored", STORED_RESPONSE_PATHS, ids=lambda stored: f"{stored.method}{stored.suffix}")
def test_paths_to_stored_responses_are_not_refused(stored: StoredResponsePath) -> None:
    """The id in the path can't lead to another path."""
    assert closed(stored.method, stored.path("resp_1")) is None
    assert RESPONSE_ID.fullmatch("resp_0f-A=")
    assert not any(map(RESPONSE_ID.fullmatch, ("", ".", "..", "a/b", "a?b", "a%2fb", "a\n", "é", "a" * 513)))


@pytest.mark.parametrize("endpoint", METERED, ids=lambda endpoint: endpoint.name)
def test_a_metered_path_is_not_refused(endpoint: Endpoint) -> None:
    """And no two endpoints have the same name or path."""
    assert closed("POST", endpoint.path) is None
    assert [each.name for each in METERED].count(endpoint.name) == 1
    assert [each.path for each in METERED].count(endpoint.path) == 1
    assert all(closed("POST", path) is None for path in endpoint.aliases)


def test_the_properties_of_all_endpoints() -> None:
    """What a call can use, whether some of its models are billed by the piece, whether its output is text, …"""
    assert {
        each.name: (each.uses, each.by_piece, each.shows_output, each.has_usage_option, each.is_of_responses)
        for each in METERED
    } == {
        "chat": (Uses.INPUT_AND_OUTPUT, False, True, True, False),
        "completions": (Uses.INPUT_AND_OUTPUT, False, True, True, False),
        "embeddings": (Uses.INPUT, False, False, False, False),
        "rerank": (Uses.INPUT, False, False, False, False),
        "score": (Uses.INPUT, False, False, False, False),
        "responses": (Uses.INPUT_AND_OUTPUT, False, True, False, True),
        "compact": (Uses.INPUT_AND_OUTPUT, False, False, False, True),
        "input_tokens": (Uses.NOTHING, False, False, False, True),
        "moderations": (Uses.REQUEST, False, False, False, False),
        "images": (Uses.INPUT_AND_OUTPUT, True, False, False, False),
        "image_edits": (Uses.INPUT_AND_OUTPUT, True, False, False, False),
        "image_variations": (Uses.INPUT_AND_OUTPUT, True, False, False, False),
        "speech": (Uses.INPUT_AND_OUTPUT, True, False, False, False),
        "transcriptions": (Uses.INPUT_AND_OUTPUT, True, False, False, False),
        "translations": (Uses.INPUT_AND_OUTPUT, True, False, False, False),
        "messages": (Uses.INPUT_AND_OUTPUT, False, True, False, False),
        "count_tokens": (Uses.NOTHING, False, False, False, False),
    }


def test_azure_has_deployments_for_the_paths_that_its_sdk_sends_there() -> None:
    """All other paths come without a deployment."""
    paths = {each.path for each in METERED if each.has_deployments}
    assert paths == azure._deployments_endpoints


def test_every_path_of_anthropic_s_sdk_is_listed() -> None:
    """Two paths are metered. Those that run later, reach shared data or administer the account are refused."""
    resources = Path(anthropic.__file__).parent / "resources"
    texts = [path.read_text(encoding="utf-8") for path in resources.rglob("*.py")]
    paths = {re.sub(r"\{[^}]*\}", "{}", path) for text in texts for path in re.findall(r'"/v1(/[^"?]+)', text)}
    assert {"/messages", "/messages/count_tokens", "/messages/batches/{}"} <= paths
    own = {endpoint.path for endpoint in METERED if endpoint.is_of_messages} | {path for _, path in ANSWERED}
    assert sorted(path for path in paths - own if closed("POST", path) is None) == []
    assert closed("POST", "/messages") is None


def test_no_path_is_refused_twice() -> None:
    """A second row for the same path would never be used."""
    assert len({(row.method, row.pattern) for row in CLOSED}) == len(CLOSED)


@pytest.mark.parametrize(
    ("path", "is_anthropic"),
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
def test_anthropic_s_api_is_recognised_by_the_path(prefix: str, path: str, is_anthropic: bool) -> None:
    """Behind every prefix, and before the body is read: an invalid key is answered with Anthropic's error too."""
    assert is_messages_path(prefix + path) == is_anthropic


_NO_SLASH = "remove the slash at the end of the client's base_url"


@pytest.mark.parametrize(
    ("request_line", "instead"),
    [
        ("POST /v1//chat/completions", f"POST /v1/chat/completions: {_NO_SLASH}"),
        ("POST //v1/embeddings", f"POST /v1/embeddings: {_NO_SLASH}"),
        ("POST /openai/v1//responses", f"POST /openai/v1/responses: {_NO_SLASH}"),
        ("POST /v1/v1/chat/completions", "POST /v1/chat/completions: remove /v1 from the client's base_url"),
        ("POST /v1/v1/messages", "POST /v1/messages: remove /v1 from the client's base_url"),
        ("POST /api/v1//responses", "POST /v1/responses: remove /api from the client's base_url"),
        ("POST /v2/chat/completions", "POST /v1/chat/completions: write /v1 instead of /v2 in the client's base_url"),
        ("POST /v1/chat/completions/", "POST /v1/chat/completions, without the slash at the end"),
        ("POST /chat/completions/", "POST /chat/completions, without the slash at the end"),
        ("GET /v1/models/", "GET /v1/models, without the slash at the end"),
        ("POST /V1/chat/Completions", "POST /v1/chat/completions, in lower case"),
        ("GET /v1/responses/resp_A/Input_items", "GET /v1/responses/{id}/input_items, in lower case"),
        ("GET /v1/responses//resp_A", f"GET /v1/responses/{{id}}: {_NO_SLASH}"),
        (
            "POST /openai/deployments/GPT/chat/completions/",
            "POST /openai/deployments/GPT/chat/completions, without the slash at the end",
        ),
        ("GET /v1/embeddings", "POST /v1/embeddings"),
        ("POST /v1/quota", "GET /v1/quota"),
        ("POST /v1/embeddings", None),
        ("GET /v1/quota", None),
        ("POST /v1/embedding", None),
        ("POST /v1%2fembeddings", None),
        ("POST /", None),
        ("POST /v1/", None),
        ("GET /" + "/" * 60_000, None),
    ],
)
def test_an_unknown_path_that_is_like_a_served_one_is_answered_with_that_one(
    request_line: str, instead: str | None
) -> None:
    """What a base_url with one part too much, or a client of another spelling, leads to."""
    method, path = request_line.split(" ")
    assert served_instead(method, path) == instead


def test_every_path_that_is_served_is_found_behind_a_wrong_base() -> None:
    """Also those of stored responses, and of the proxy's own."""
    metered = [("POST", each.path) for each in METERED]
    stored = [(each.method, each.path("{id}")) for each in STORED_RESPONSE_PATHS]
    own = [("GET", path) for path in ("/models", "/quota", "/quota/usage", "/quota/events")]
    for method, path in [*metered, *stored, *own]:
        found = served_instead(method, f"/{'x' * 200}/v1{path}")
        assert found is not None
        assert found.startswith(f"{method} /v1{path}: remove /xxx")
        assert len(found) < 200
