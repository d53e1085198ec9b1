"""The path and query of a call at each kind of upstream. wire §2.3, §3.5 (Azure)."""

import pytest

from proxy.formats.endpoints import CHAT, EMBEDDINGS, METERED, RESPONSES, Endpoint
from proxy.formats.kinds import kind_of
from proxy.policy.catalog import Model, Upstream

RESOURCE = "https://res.openai.azure.com"


def model(
    name: str = "prod", *, kind: str = "azure", base_url: str = RESOURCE, api_version: str | None = None
) -> Model:
    """A model at an upstream of this kind."""
    return Model("m", Upstream("up", base_url, None, kind=kind, api_version=api_version), name)


def address_of(endpoint: Endpoint, model: Model, *, api_version: str | None) -> str:
    """The path and query of a call at this kind of upstream."""
    deployment = model.upstream_model if endpoint.has_deployments else None
    kind = kind_of(model.upstream.kind)
    return kind.address(model.upstream, endpoint.path, deployment=deployment, api_version=api_version)


@pytest.mark.parametrize("endpoint", METERED)
def test_other_kinds_than_azure_have_the_path_of_the_endpoint(endpoint: Endpoint) -> None:
    """Nothing from the client's query is added."""
    vllm = model(kind="vllm", base_url="http://box/v1", api_version=None)
    assert address_of(endpoint, vllm, api_version="2024-10-21") == endpoint.path


@pytest.mark.parametrize(
    ("endpoint", "base_url", "path"),
    [
        (CHAT, RESOURCE, "/openai/deployments/prod/chat/completions"),
        (CHAT, RESOURCE + "/openai", "/deployments/prod/chat/completions"),
        (EMBEDDINGS, RESOURCE, "/openai/deployments/prod/embeddings"),
        (RESPONSES, RESOURCE, "/openai/responses"),
    ],
)
def test_azure_has_one_path_for_each_deployment(endpoint: Endpoint, base_url: str, path: str) -> None:
    """A default version is added if none is named. /responses has no deployment in its path."""
    assert address_of(endpoint, model(base_url=base_url), api_version=None) == path + "?api-version=2024-10-21"


@pytest.mark.parametrize(
    ("kind", "base_url", "address"),
    [
        ("openai", "https://api.openai.com/v1", "/responses/resp_1"),
        ("azure", RESOURCE, "/openai/responses/resp_1?api-version=2025-04-01-preview"),
        ("azure", RESOURCE + "/openai/v1", "/responses/resp_1"),
    ],
)
def test_the_address_of_a_stored_response_follows_the_same_rules(kind: str, base_url: str, address: str) -> None:
    """OpenAI's path is used, and at Azure the version is added."""
    upstream = model(kind=kind, base_url=base_url).upstream
    assert kind_of(kind).address(upstream, "/responses/resp_1", api_version="2025-04-01-preview") == address


@pytest.mark.parametrize(
    ("name", "segment"),
    [("a/b", "a%2Fb"), ("a?api-version=1", "a%3Fapi-version%3D1"), ("ü%2f", "%C3%BC%252f"), ("a#b", "a%23b")],
)
def test_a_deployment_is_one_path_segment(name: str, segment: str) -> None:
    """Whatever characters a model's name has, it cannot lead to another path or add a query."""
    assert address_of(CHAT, model(name), api_version=None).startswith(
        f"/openai/deployments/{segment}/chat/completions?"
    )


@pytest.mark.parametrize(
    ("asked", "configured", "sent"),
    [
        ("2025-04-01-preview", "2024-06-01", "2025-04-01-preview"),
        (None, "2024-06-01", "2024-06-01"),
        (None, None, "2024-10-21"),
        ("", None, "2024-10-21"),
        ("2024-09-01-preview", None, "2024-09-01-preview"),
        ("2024-08-01-preview", None, "2024-10-21"),  # has no `stream_options` yet
        ("2023-05-15", "2024-02-01", "2024-02-01"),  # the operator may configure an old one
        ("preview", None, "2024-10-21"),  # a version of the newer API
        ("2024-10-21&api-key=x", "2024-06-01", "2024-06-01"),
        ("2024-10-21\n", "2024-06-01", "2024-06-01"),
        ("٢٠٢٤-10-21", None, "2024-10-21"),
    ],
)
def test_the_version_is_the_client_s_or_the_configured_one(
    asked: str | None, configured: str | None, sent: str
) -> None:
    """The client's is not sent if this API cannot have it."""
    address = address_of(CHAT, model(api_version=configured), api_version=asked)
    assert address == f"/openai/deployments/prod/chat/completions?api-version={sent}"


@pytest.mark.parametrize(
    ("asked", "configured", "query"),
    [
        (None, None, ""),
        ("2024-10-21", None, ""),
        ("preview", "v1", "?api-version=preview"),
        (None, "preview", "?api-version=preview"),
    ],
)
def test_azure_s_newer_api_has_openai_s_paths(asked: str | None, configured: str | None, query: str) -> None:
    """The model is in the body, and the version is optional."""
    newer = model(base_url=RESOURCE + "/openai/v1", api_version=configured)
    assert address_of(CHAT, newer, api_version=asked) == "/chat/completions" + query
