"""The path and query of a call at an upstream.

All kinds of upstream have OpenAI's paths. Only Azure differs: it has one path for each deployment, and the version of
its API in the query. Example, for the deployment `prod`:

    openai   /chat/completions
    azure    /openai/deployments/prod/chat/completions?api-version=2024-10-21

Pure.
"""

import re
from urllib.parse import quote

from proxy.formats.endpoints import Endpoint
from proxy.policy.catalog import Model, Upstream

# The latest dated version that is not a preview. It is sent if neither the client nor the configuration names one.
_AZURE_VERSION = "2024-10-21"
# The first version with `stream_options` and `max_completion_tokens`. With an older one, streams would not report
# their usage, and a maximum that we write would be answered with 400. Requests of older clients mean the same in this
# one.
_AZURE_OLDEST = "2024-09-01"
_DATED = re.compile(r"20[0-9]{2}-[01][0-9]-[0-3][0-9](?:-preview)?")
# Azure's newer API at /openai/v1 takes one of these versions, or none.
_UNDATED = re.compile(r"v1|preview|latest")


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
    if upstream.kind != "azure":
        return path
    if upstream.base_url.endswith("/v1"):
        version = _matching(_UNDATED, api_version) or upstream.api_version
        return path + (f"?api-version={version}" if version else "")
    requested = _matching(_DATED, api_version)
    # Versions are ISO dates, so they compare as texts: "2024-08-01-preview" < "2024-09-01".
    is_new_enough = requested is not None and requested >= _AZURE_OLDEST
    version = requested if is_new_enough else upstream.api_version or _AZURE_VERSION
    root = "" if upstream.base_url.endswith("/openai") else "/openai"
    return f"{root}{deployment}{path}?api-version={version}"


def _matching(pattern: re.Pattern[str], api_version: str | None) -> str | None:
    return api_version if api_version and pattern.fullmatch(api_version) else None
