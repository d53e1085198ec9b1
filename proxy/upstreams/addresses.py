"""The path and query of a call at an upstream.

All kinds of upstream have OpenAI's paths. Only Azure differs: it has one path for each deployment, and the version of
its API in the query. Example, for the deployment `prod`:

    openai   /chat/completions
    azure    /openai/deployments/prod/chat/completions?api-version=2024-10-21

The paths are built in `formats.kinds` (`Kind.address`). Pure.
"""

from urllib.parse import quote

from proxy.formats.endpoints import Endpoint
from proxy.formats.kinds import kind_of
from proxy.policy.catalog import Model, Upstream


def address_of(endpoint: Endpoint, model: Model, *, api_version: str | None) -> str:
    """The path of a call and, at Azure, the query; both are appended to the upstream's `base_url`.

    `api_version` is the client's. It is sent only to Azure, and only if that API has such versions and streams report
    their usage in it. Otherwise the version in the upstream's configuration is sent.
    """
    # Every character is quoted, so that a name such as "../x" stays one path segment.
    deployment = f"/deployments/{quote(model.upstream_model, safe='')}" if endpoint.has_deployments else ""
    return address_at(model.upstream, endpoint.path, api_version=api_version, deployment=deployment)


def address_at(upstream: Upstream, path: str, *, api_version: str | None, deployment: str = "") -> str:
    """The same for any of OpenAI's paths; Azure has some of them below a `deployment`."""
    return kind_of(upstream.kind).address(upstream, path, deployment=deployment, api_version=api_version)
