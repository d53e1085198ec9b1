"""Counters and what concerns them: attention, refusals, calls in flight, explanations."""

from collections.abc import Callable, Collection
from typing import Any

from pydantic import Field

from proxy.administration.attention import Attention, attention
from proxy.administration.change import REASON_CHARACTERS_MAX, NotFound
from proxy.administration.counters import (
    RESETS_SHOWN_MAX,
    CounterFilter,
    CounterRecord,
    Reset,
    ResetTarget,
    counters,
    make_reset,
    reset_since,
)
from proxy.administration.explain import ExplainedRefusal, Explanation, explain
from proxy.administration.in_flight import CallFilter, CallInFlight, calls_in_flight, end_call
from proxy.administration.pages import Page
from proxy.administration.records import UserRecord
from proxy.administration.refusals import RefusalCount, RefusalFilter, refusal, refusals
from proxy.calls.activity import Activity
from proxy.config.reload import Policies
from proxy.identity.authentication import Snapshot
from proxy.identity.database import DirectoryDatabase
from proxy.identity.directory import UserId
from proxy.ledger.store import StoreUnavailable
from proxy.web.admin.operations import (
    ALL_ROLES,
    MANAGERS,
    AdminRequest,
    ChangeQuery,
    Fields,
    Instant,
    NoQuery,
    Operation,
    PageQuery,
    changes,
    reads,
)
from proxy.web.admin.resource import Resource

_CLOCK_TOLERANCE_MS = 1_000


class CounterQuery(PageQuery):
    """Which counters are asked for."""

    quota: str | None = Field(None, max_length=201, description="Only counters of the quota of this id.")
    user: str | None = Field(None, max_length=400, description="Only those of this user, also unused ones, and pots.")
    group: str | None = Field(None, max_length=100, description="Only counters of quotas of this group.")
    model: str | None = Field(None, max_length=200, description="Only counters of quotas that count this model.")
    near: int | None = Field(None, ge=80, le=1000, description="Only those with so many percent used, from 80 on.")


class ResetFields(Fields):
    """Whose counters are reset: a user's, those of a group's quotas, or those of one quota."""

    user: str | None = Field(None, max_length=400)
    group: str | None = Field(None, max_length=100)
    quota: str | None = Field(None, max_length=201)
    reason: str = Field("", max_length=REASON_CHARACTERS_MAX, description="Why. It is in the audit log.")


class RefusalQuery(PageQuery):
    """Which refusals are asked for."""

    user: str | None = Field(None, max_length=400, description="Only refusals of this user.")
    quota: str | None = Field(None, max_length=201, description="Only refusals by the quota of this id.")
    since: Instant | None = Field(None, description="From this instant on (ms).")
    until: Instant | None = Field(None, description="Before this instant (ms).")


class CallQuery(PageQuery):
    """Which calls are asked for."""

    user: str | None = Field(None, max_length=400, description="Only calls of this user.")
    group: str | None = Field(None, max_length=100, description="Only calls that this group admitted.")
    model: str | None = Field(None, max_length=200, description="Only calls of this model.")


class ExplainQuery(Fields):
    """Whose call is explained: one of a user to a model."""

    user: str = Field(max_length=400)
    model: str = Field(min_length=1, max_length=200)


class Counters(Resource):
    """Shows counters, refusals and calls in flight, resets counters, and ends calls."""

    def __init__(
        self,
        policies: Policies[Snapshot],
        database: DirectoryDatabase,
        *,
        activity: Activity,
        now: Callable[[], int],
    ) -> None:
        super().__init__(policies, database, now=now)
        self._activity = activity

    def operations(self) -> list[Operation]:
        """The rows."""
        seen: dict[str, Any] = {"roles": ALL_ROLES}
        return [
            reads(
                "/attention",
                self._attention,
                "Show who was refused, who is near a limit, and which pots run out.",
                **seen,
            ),
            reads("/counters", self._counters, "List counters: what is used and left.", **seen),
            changes(
                "POST", "/counters/reset", self._reset, "Reset counters: what is used becomes 0.", roles=MANAGERS
            ),
            reads("/refusals", self._refusals, "List refusals by user, quota and minute.", **seen),
            reads("/refusals/{request}", self._refusal, "Show why a request was refused.", **seen),
            reads("/calls", self._calls, "List the calls in flight.", **seen),
            changes(
                "POST", "/calls/{id}/end", self._end_call, "End a call in flight. It is charged what has passed."
            ),
            reads(
                "/explain", self._explain, "Show whether a call of a user to a model is admitted, and why.", **seen
            ),
        ]

    async def _attention(self, request: AdminRequest[NoQuery, None]) -> Attention:
        policy = self._policies.current.policy
        async with self._database.read() as connection:
            return await attention(connection, policy, groups=request.groups, now=self._now())

    async def _counters(self, request: AdminRequest[CounterQuery, None]) -> Page[CounterRecord]:
        query, snapshot = request.query, self._policies.current
        user = None if query.user is None else await self._user(request, query.user)
        model = None if query.model is None else snapshot.catalog.model(query.model)
        asked = CounterFilter(
            quota=query.quota,
            group=query.group,
            model=query.model if model is None else model.matched_name,
            near=query.near,
            groups=request.groups,
            user=None if user is None else user.identity.subject,
            user_groups=() if user is None else user.groups,
        )
        async with self._database.read() as connection:
            return await counters(connection, snapshot.policy, asked, query.paging, self._now())

    async def _reset(self, request: AdminRequest[ChangeQuery, ResetFields]) -> Reset:
        body = request.body
        user = None if body.user is None else (await self._user(request, body.user)).identity.subject
        target = ResetTarget(user, body.group, body.quota)
        policy, began_at = self._policies.current.policy, self._now()
        done = await make_reset(self._changes(request), policy, target, groups=request.groups, reason=body.reason)
        if done.quotas and not request.conditions.is_trial:
            # This process's measure of the database's clock can be wrong by some milliseconds.
            await self._show_reset(target, request.groups, began_at - _CLOCK_TOLERANCE_MS)
        return done

    async def _show_reset(self, target: ResetTarget, groups: Collection[str] | None, since: int) -> None:
        """Tell the streams of events, which else would show a counter only with its next call."""
        policy, at = self._policies.current.policy, self._now()
        try:
            async with self._database.read() as connection:
                found = await reset_since(connection, policy, target, groups=groups, since=since)
        except StoreUnavailable:
            return  # the reset is made, and its answer has to say so
        self._activity.counters_changed(found, at)
        if len(found) == RESETS_SHOWN_MAX:
            self._activity.note_incomplete()

    async def _refusals(self, request: AdminRequest[RefusalQuery, None]) -> Page[RefusalCount]:
        query = request.query
        user = None if query.user is None else self._subject(request, query.user)
        asked = RefusalFilter(user, query.quota, query.since, query.until, request.groups)
        async with self._database.read() as connection:
            return await refusals(connection, asked, query.paging)

    async def _refusal(self, request: AdminRequest[NoQuery, None]) -> ExplainedRefusal:
        async with self._database.read() as connection:
            found = await refusal(connection, request.path["request"], groups=request.groups)
        try:
            user = await self._visible(request, UserId.of_subject(found.user))
        except NotFound:
            return ExplainedRefusal(found, None)
        return ExplainedRefusal(found, await self._explained(request, user, found.model))

    async def _calls(self, request: AdminRequest[CallQuery, None]) -> Page[CallInFlight]:
        query = request.query
        user = None if query.user is None else self._subject(request, query.user)
        asked = CallFilter(user, query.group, query.model, request.groups)
        async with self._database.read() as connection:
            return await calls_in_flight(connection, asked, query.paging)

    async def _end_call(self, request: AdminRequest[ChangeQuery, None]) -> CallInFlight:
        id = request.path["id"]
        async with self._changes(request).begin("call.end", id) as change:
            return await end_call(change, id, groups=request.groups, now=self._now)

    async def _explain(self, request: AdminRequest[ExplainQuery, None]) -> Explanation:
        user = await self._user(request, request.query.user)
        return await self._explained(request, user, request.query.model)

    async def _explained(self, request: AdminRequest[Any, Any], user: UserRecord, model: str) -> Explanation:
        async with self._database.read() as connection:
            found = await explain(connection, self._policies.current, user, model, now=self._now)
        return found if request.groups is None else found.shown_to(request.groups)

    def _subject(self, request: AdminRequest[Any, Any], name: str) -> str:
        return self._directory(request).resolve(name).subject

    async def _user(self, request: AdminRequest[Any, Any], name: str) -> UserRecord:
        """The user of this name. Raises NotFound."""
        return await self._visible(request, self._directory(request).resolve(name))
