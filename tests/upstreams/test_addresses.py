"""Where a call goes at each kind of upstream, and which of them take the option in which we ask for usage.

wire §2.2 (who rejects `stream_options`), §2.3, §3.5 (Azure).
"""

import pytest

from proxy.formats.endpoints import CHAT, EMBEDDINGS, METERED, RESPONSES, Endpoint
from proxy.policy.policy import Kind, Model, Upstream
from proxy.upstreams.addresses import address_at, address_of

RESOURCE = "https://res.openai.azure.com"


def model(
    name: str = "prod", *, kind: Kind = "azure", base_url: str = RESOURCE, api_version: str | None = None
) -> Model:
    """A model at such an upstream."""
    return Model("m", Upstream("up", base_url, None, kind=kind, api_version=api_version), name)


@pytest.mark.parametrize("endpoint", METERED)
def test_elsewhere_a_path_is_a_path(endpoint: Endpoint) -> None:
    """Nothing of the client's query goes along."""
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
def test_azure_has_a_path_for_each_deployment(endpoint: Endpoint, base_url: str, path: str) -> None:
    """And a version of its own, where nobody names one; what knows no deployments stands beside them."""
    assert address_of(endpoint, model(base_url=base_url), api_version=None) == path + "?api-version=2024-10-21"


@pytest.mark.parametrize(
    ("kind", "base_url", "address"),
    [
        ("openai", "https://api.openai.com/v1", "/responses/resp_1"),
        ("azure", RESOURCE, "/openai/responses/resp_1?api-version=2025-04-01-preview"),
        ("azure", RESOURCE + "/openai/v1", "/responses/resp_1"),
    ],
)
def test_what_an_upstream_keeps_has_its_address_there(kind: Kind, base_url: str, address: str) -> None:
    """By the same rules as calls."""
    upstream = model(kind=kind, base_url=base_url).upstream
    assert address_at(upstream, "/responses/resp_1", api_version="2025-04-01-preview") == address


@pytest.mark.parametrize(
    ("name", "segment"),
    [("a/b", "a%2Fb"), ("a?api-version=1", "a%3Fapi-version%3D1"), ("ü%2f", "%C3%BC%252f"), ("a#b", "a%23b")],
)
def test_a_deployment_is_one_segment(name: str, segment: str) -> None:
    """Whatever a client calls its model, it stays within the path."""
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
        ("2024-08-01-preview", None, "2024-10-21"),  # knows no `stream_options` yet
        ("2023-05-15", "2024-02-01", "2024-02-01"),  # the operator's word
        ("preview", None, "2024-10-21"),  # is for the other surface
        ("2024-10-21&api-key=x", "2024-06-01", "2024-06-01"),
        ("2024-10-21\n", "2024-06-01", "2024-06-01"),
        ("٢٠٢٤-10-21", None, "2024-10-21"),
    ],
)
def test_a_version_is_the_client_s_or_the_configured_one(
    asked: str | None, configured: str | None, sent: str
) -> None:
    """Where the client's is none that this surface can have it isn't sent."""
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
def test_azure_s_newer_surface_is_as_openai_s(asked: str | None, configured: str | None, query: str) -> None:
    """The model is in the body, and a version need not be."""
    newer = model(base_url=RESOURCE + "/openai/v1", api_version=configured)
    assert address_of(CHAT, newer, api_version=asked) == "/chat/completions" + query
