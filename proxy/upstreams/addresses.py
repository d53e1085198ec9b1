"""The path and query of a call at an upstream.

All kinds have OpenAI's paths but Azure, which has a path for each deployment and the version of its API in the query.
Pure.
"""

import re
from urllib.parse import quote

from proxy.formats.endpoints import Endpoint
from proxy.policy.policy import Model, Upstream

# The last dated version that is no preview, for clients that name none.
_AZURE_VERSION = "2024-10-21"
# The first that knows `stream_options` and `max_completion_tokens`: with an older one streams would not say their
# usage, and a maximum of ours would be a 400. What clients of older ones send means the same in it.
_AZURE_OLDEST = "2024-09-01"
_DATED = re.compile(r"20[0-9]{2}-[01][0-9]-[0-3][0-9](?:-preview)?")
# Azure's newer surface at /openai/v1 takes one without a date, or none.
_UNDATED = re.compile(r"v1|preview|latest")


def address_of(endpoint: Endpoint, model: Model, *, api_version: str | None) -> str:
    """Where a call goes, behind the upstream's `base_url`: its path, and at Azure the query.

    `api_version` is what the client asked for. It goes to Azure only, and only where it is one that this surface can
    have and that says the usage of streams; else it is the one of the upstream's configuration.
    """
    # A name is one segment, whatever is in it.
    deployment = f"/deployments/{quote(model.upstream_model, safe='')}" if endpoint.has_deployments else ""
    return address_at(model.upstream, endpoint.path, api_version=api_version, deployment=deployment)


def address_at(upstream: Upstream, path: str, *, api_version: str | None, deployment: str = "") -> str:
    """The same of any path of OpenAI's; Azure has some of them under a `deployment`."""
    if upstream.kind != "azure":
        return path
    if upstream.base_url.endswith("/v1"):
        version = _version(_UNDATED, api_version) or upstream.api_version
        return path + (f"?api-version={version}" if version else "")
    asked = _version(_DATED, api_version)
    version = asked if asked and asked >= _AZURE_OLDEST else upstream.api_version or _AZURE_VERSION
    root = "" if upstream.base_url.endswith("/openai") else "/openai"
    return f"{root}{deployment}{path}?api-version={version}"


def _version(pattern: re.Pattern[str], api_version: str | None) -> str | None:
    return api_version if api_version and pattern.fullmatch(api_version) else None
