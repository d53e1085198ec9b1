"""Tries an upstream without a call: whether it can be reached, accepts the key, and lists the models of the policy.

It is asked for its list of models by the same client and with the same headers as for calls. So whatever the
configuration says of the way to the upstream and of its key is tried too. The list costs nothing.
"""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from proxy.errors import UpstreamError, UpstreamWithoutKey
from proxy.formats.kinds import kind_of
from proxy.policy.catalog import Upstream
from proxy.upstreams.models import Listed, ModelLists, NotListed, read_list

# For all requests to one upstream. A connection has its own, shorter limit.
TRIAL_S = 15.0
# A longer list is cut, so a name that it lacks means nothing.
_WHOLE_LIST_MAX = 999
_NAMES_SHOWN = 5

# What to do about a connection that was not made, by what the client says of it (`why_unreachable`).
_REMEDIES = (
    ("can't be resolved", "correct the host in base_url, or the DNS of this machine"),
    ("expired", "let its operator renew the certificate"),
    (
        "certificate",
        "name its CA in ca if that is one of your own, or write the host in base_url as the certificate has it",
    ),
    ("no TLS connection", "write http:// in base_url if the server has no TLS, or correct its port"),
    ("refused", "start the server, or correct host and port in base_url"),
    ("no connection within", "check host and port in base_url, and firewalls in between"),
    ("without an answer", "check whether it expects http:// or https://, and its port"),
)


@dataclass(frozen=True, slots=True)
class Trial:
    """How an upstream did, in one sentence without its name. `models` is how many it lists; None: it has no list."""

    upstream: str
    verdict: Literal["ok", "warning", "error"]
    text: str
    models: int | None = None


async def try_upstream(
    lists: ModelLists, upstream: Upstream, names: Collection[str], *, trial_s: float = TRIAL_S
) -> Trial:
    """Try one upstream, for `trial_s` seconds at most. `names` are its names of the models that the policy lists."""
    try:
        async with asyncio.timeout(trial_s):
            return await _try(lists, upstream, names)
    except TimeoutError:
        return _error(upstream, f"it did not answer within {trial_s:g} s; check the server and what is between")
    except UpstreamWithoutKey as error:
        return _error(upstream, f"{error.reason.rstrip('.')}; correct api_key, or what issues the key")
    except UpstreamError as error:
        remedy = next((remedy for text, remedy in _REMEDIES if text in error.reason), "check base_url and the server")
        return _error(upstream, f"{error.reason.rstrip('.')}; {remedy}")


async def _try(lists: ModelLists, upstream: Upstream, names: Collection[str]) -> Trial:
    path = kind_of(upstream.kind).models_path
    try:
        listed = read_list(await lists.read(upstream, path or "/models"))
    except NotListed as error:
        return await _not_listed(lists, upstream, error)
    except ValueError as error:
        return _error(upstream, f"{error}; correct base_url, which usually ends in /v1")
    if path is None:
        return Trial(upstream.name, "ok", "it answers and accepts the key; it does not list deployments")
    reached = f"it answers, and lists {len(listed)} model{'' if len(listed) == 1 else 's'}"
    if upstream.api_key is not None:
        # If anybody gets the list, it says nothing about the key.
        is_checked = await _status_of_list(lists, replace(upstream, api_key=None), path) != 200
        reached += ", with the key" if is_checked else ", also without the key, so the key was not checked"
    if missing := _missing(upstream, names, listed):
        shown = ", ".join(missing[:_NAMES_SHOWN]) + (" and others" if len(missing) > _NAMES_SHOWN else "")
        text = f"{reached}, but not {shown}: calls for them may fail; correct the names under models"
        return Trial(upstream.name, "warning", text, len(listed))
    return Trial(upstream.name, "ok", reached, len(listed))


async def _not_listed(lists: ModelLists, upstream: Upstream, error: NotListed) -> Trial:
    match error.status:
        case 401 | 403 if upstream.api_key is None:
            return _error(upstream, f"it wants a key (status {error.status}); write api_key: ${{NAME}}")
        case 401 | 403:
            text = f"it does not accept the key (status {error.status}); correct api_key, or the rights of the key"
            return _error(upstream, text)
        case 402:
            return _error(upstream, "its account is used up (status 402); pay, or use the key of another account")
        case 429:
            text = "it answers, but limits requests now (status 429), so the key was not checked; try again later"
            return Trial(upstream.name, "warning", text)
        case 404 | 405:
            below = replace(upstream, base_url=f"{upstream.base_url}/v1")
            may_be_below = not upstream.base_url.endswith("/v1")
            if may_be_below and await _status_of_list(lists, below, "/models") in (200, 401, 403):
                return _error(upstream, f"its API is at another address; write base_url: {below.base_url}")
            text = (
                f"it answers, but has no list of models (status {error.status}), so the key was not checked; check "
                "base_url, unless it is known to have none"
            )
            return Trial(upstream.name, "warning", text)
    if 300 <= error.status < 400:
        return _error(upstream, f"{error}, and redirects are not followed; write the address that it leads to")
    return _error(upstream, f"{error}; {'look into its log' if error.status >= 500 else 'check base_url and kind'}")


async def _status_of_list(lists: ModelLists, upstream: Upstream, path: str) -> int | None:
    """The status of the answer to a request for the list; None if there is none, or if it is no list."""
    try:
        await lists.read(upstream, path)
    except NotListed as error:
        return error.status
    except (UpstreamError, ValueError):
        return None
    return 200


def _missing(upstream: Upstream, names: Collection[str], listed: Listed) -> list[str]:
    if kind_of(upstream.kind).ignores_model_names or not 0 < len(listed) <= _WHOLE_LIST_MAX:
        return []
    spellings = {spelling for name in listed for spelling in (name, *upstream.naming.spellings(name))}
    return [name for name in names if not {name, *upstream.naming.spellings(name)} & spellings]


def _error(upstream: Upstream, text: str) -> Trial:
    return Trial(upstream.name, "error", text)
