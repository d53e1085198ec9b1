"""What users can see of themselves with their own keys: their quotas, also live, and what they have used.

`self_service: false` turns it off: its paths are then not served.
"""

import re
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, date, datetime

from aiohttp import web

from proxy.errors import DirectoryUnavailable, InvalidKey, InvalidRequest
from proxy.formats.model_names import check_model_name, check_name_form
from proxy.identity.authentication import Caller, Snapshot, narrowed_groups
from proxy.ledger.ledger import Ledger
from proxy.ledger.queries import DAY_MS, Asked, Dimension, by_time_or_tokens, usage
from proxy.policy.policy import DEFAULT
from proxy.policy.quota import sample_name
from proxy.policy.status import quota_statuses
from proxy.web.events import Events, Filter
from proxy.web.middleware import json_response, not_served

_DAYS = re.compile(r"([1-9][0-9]{0,3})d")
_DAYS_MAX = 3660
_DIMENSIONS: dict[str, Dimension] = {"day": "day", "model": "model"}

Identify = Callable[[web.Request], Awaitable[tuple[Snapshot, Caller]]]


class SelfService:
    """The handlers of `/quota` and of what is below it. `now` gives ms since 1970, by the ledger's clock."""

    def __init__(self, identify: Identify, ledger: Ledger, *, events: Events, now: Callable[[], int]) -> None:
        self._identify = identify
        self._ledger = ledger
        self._events = events
        self._now = now

    def routes(self, prefix: str) -> list[web.RouteDef]:
        """The routes below a prefix such as `/v1`."""
        return [
            web.get(f"{prefix}/quota", self._quota),
            web.get(f"{prefix}/quota/usage", self._usage),
            # A stream has no end that HEAD could tell of.
            web.get(f"{prefix}/quota/events", self._stream, allow_head=False),
        ]

    async def _served(self, request: web.Request) -> tuple[Snapshot, Caller]:
        """What is in force, and who is asking. Raises NotServed if users may not see this."""
        snapshot, caller = await self._identify(request)
        if not snapshot.policy.self_service:
            await not_served(request)
        return snapshot, caller

    async def _quota(self, request: web.Request) -> web.StreamResponse:
        snapshot, caller = await self._served(request)
        policy = snapshot.policy
        binding = policy.all_quotas(caller.groups).for_user(caller.user)
        counters = await self._ledger.counters(binding.keys())
        statuses = quota_statuses(binding, counters, self._now())
        return json_response(
            {
                "object": "list",
                "user": caller.user,
                "groups": list(caller.groups),
                "models": _models(snapshot, caller),
                "timezone": policy.zone.key,
                "unlimited": _is_unlimited(snapshot, caller),
                "data": [each.as_json(policy.zone) for each in statuses.values()],
            },
            request,
        )

    async def _usage(self, request: web.Request) -> web.StreamResponse:
        _, caller = await self._served(request)
        by, since = request.query.get("by", "day"), _since(request.query.get("since", "30d"), self._now())
        if by not in _DIMENSIONS:
            raise InvalidRequest("`by` must be day or model.", param="by")
        async with self._ledger.read() as connection:
            found = await usage(connection, _DIMENSIONS[by], Asked(since, where={"user": caller.user}))
        data = [
            {by: _day(value) if isinstance(value, int) else value, **asdict(used)}
            for value, used in sorted(found.items(), key=by_time_or_tokens)
        ]
        return json_response({"object": "list", "by": by, "since": _day(since), "data": data}, request)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        """The states of the caller's own counters, and of those that its groups share, as they change."""
        snapshot, caller = await self._served(request)
        sees = _own(snapshot, caller)

        async def sees_now() -> Filter | None:
            """What the caller may see now; None if the key has ended, or is another user's now."""
            try:
                snapshot, caller = await self._identify(request)
            except InvalidKey:
                return None
            except DirectoryUnavailable:
                return sees
            found = _own(snapshot, caller)
            return found if snapshot.policy.self_service and found.user == sees.user else None

        return await self._events.stream(request, sees, check=sees_now)


def can_name(snapshot: Snapshot, caller: Caller, model: str) -> bool:
    """Whether a call of this user may name this model."""
    found = snapshot.catalog.model(model)
    try:
        check_name_form(model)
        if found is not None and not snapshot.catalog.lists(found.name):
            check_model_name(model)
    except InvalidRequest:
        return False
    return snapshot.serves(caller, model)


def _models(snapshot: Snapshot, caller: Caller) -> list[str]:
    """The names in the policy that the caller may call. If the list of models is open, the patterns of others follow.

    They end with `*` if every other name may be called.
    """
    policy, of_key = snapshot.policy, caller.key.models
    names = dict.fromkeys((*snapshot.catalog.names, *policy.model_names(caller.groups)))
    found = [name for name in names if can_name(snapshot, caller, name)]
    if not snapshot.catalog.open_upstreams:
        return found
    patterns = dict.fromkeys((*policy.model_patterns(caller.groups), *(of_key.patterns if of_key else ())))
    callable_ones = [text for text in patterns if snapshot.serves(caller, sample_name(text))]
    return found + (["*"] if "*" in callable_ones else callable_ones)


def _is_unlimited(snapshot: Snapshot, caller: Caller) -> bool:
    """Whether a group that may admit the caller's calls with this key has no quotas, but any number of them."""
    groups = narrowed_groups(caller) if caller.groups else (DEFAULT,)
    return any(name in snapshot.policy.groups and snapshot.policy.groups[name].unlimited for name in groups)


def _own(snapshot: Snapshot, caller: Caller) -> Filter:
    """The counters that bind the caller."""
    quotas = snapshot.policy.all_quotas(caller.groups).quotas
    return Filter.of_user(caller.user, {quota.group for quota in quotas})


def _since(text: str, now: int) -> int:
    """The instant (ms) from whose UTC day on usage is shown: so many days ago, or a day."""
    if (match := _DAYS.fullmatch(text)) and int(match[1]) <= _DAYS_MAX:
        return max(0, now - int(match[1]) * DAY_MS)
    try:
        day = date.fromisoformat(text)
        return max(0, round(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 1000)
    except (ValueError, OverflowError):
        raise InvalidRequest(
            "`since` must be a number of days such as 30d, or a day such as 2026-11-01.", param="since"
        ) from None


def _day(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%d")
