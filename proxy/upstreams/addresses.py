"""Where a call goes at an upstream, and which of them take the option in which we ask for the usage of a stream.

Azure has a path for each deployment and the version of its API in the query. Where a stream tells its usage only when
it is asked to, we ask in the client's place; an upstream that knows no such option says so with a 400, gets the call
again without it, and is not asked for a while. Pure.
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

# What we write into the request to hear the usage of a stream. Whoever does not take it names one of these.
_OPTION = (b"stream_options", b"include_usage", b"continuous_usage_stats", b"timings_per_token")
# OpenAI's and vLLM's status for a field that is not known or not allowed, and FastAPI's and Mistral's.
_NOT_TAKEN = (400, 422)
# So many calls go without the option before it is tried again. Azure is said to refuse it beside pictures: one
# such call must not leave all others uncounted for good.
_CALLS_WITHOUT = 100
_ADDRESSES_KEPT = 4096


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


def is_about_usage_option(status: int, body: bytes) -> bool:
    """Whether an answer says that the option in which we ask for the usage of a stream is not taken."""
    return status in _NOT_TAKEN and any(name in body for name in _OPTION)


class UsageOptionCache:
    """Which addresses take the option in which we ask for usage, learned as calls go by."""

    def __init__(self) -> None:
        # By the upstream's base_url, the address there, and the model.
        self._taken: set[tuple[str, str, str]] = set()
        self._calls_without: dict[tuple[str, str, str], int] = {}

    def may_ask(self, address: str, model: Model) -> bool:
        """Whether a call that is sent there now may ask; one that may not is one of the hundred that go without."""
        key = _key(address, model)
        left = self._calls_without.pop(key, 0)
        if left:
            self._calls_without[key] = left - 1
        return not left

    def note(self, address: str, model: Model, *, is_taken: bool) -> None:
        """Take note that a call was let through with the option, or only without it.

        Where it was taken once a refusal speaks of that one request.
        """
        key = _key(address, model)
        # With an open list of models there is no end of names.
        if len(self._taken) + len(self._calls_without) >= _ADDRESSES_KEPT:
            self._taken.clear()
            self._calls_without.clear()
        if is_taken:
            self._taken.add(key)
        elif key not in self._taken:
            self._calls_without[key] = _CALLS_WITHOUT


def _key(address: str, model: Model) -> tuple[str, str, str]:
    return model.upstream.base_url, address, model.upstream_model


def _version(pattern: re.Pattern[str], api_version: str | None) -> str | None:
    return api_version if api_version and pattern.fullmatch(api_version) else None
