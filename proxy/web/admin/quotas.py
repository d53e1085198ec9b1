"""Groups, their quotas and members, and grants: `/admin/api/groups`, `/quotas` and `/grants`.

The fields of a quota are made from the model of the file, so a new kind of limit appears here by itself. They are
checked by the code that checks the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from aiohttp import hdrs
from pydantic import Field, WithJsonSchema, create_model

from proxy.administration.change import ChangeRefused, NotFound
from proxy.administration.effects import Effects
from proxy.administration.grants import GrantAdministration, GrantRecord, NewGrant
from proxy.administration.pages import Page
from proxy.administration.policy import GroupRecord, ModelQuota, PolicyAdministration, QuotaRecord, QuotaSet
from proxy.config.json_schema import field_schemas
from proxy.config.schema import Quota as QuotaSection
from proxy.identity.directory import DATABASE, FILE
from proxy.web.admin.directory import UserAnswer
from proxy.web.admin.operations import (
    ALL_ROLES,
    MANAGERS,
    AdminRequest,
    Answer,
    ChangeQuery,
    Fields,
    Instant,
    NoQuery,
    Operation,
    PageQuery,
    changes,
    creates,
    edits,
    reads,
)
from proxy.web.admin.problems import Problem
from proxy.web.admin.resource import Resource


def _quota_fields() -> dict[str, Any]:
    """A field for each of the file's, which takes what the file takes, and null for none."""
    made: dict[str, Any] = {}
    for name, schema in field_schemas(QuotaSection).items():
        description = schema.pop("description", None)
        marks = {key: schema.pop(key) for key in list(schema) if key.startswith("x-")}
        taken = {"anyOf": [schema, {"type": "null"}], **marks}
        made[name] = (Annotated[Any, WithJsonSchema(taken)], Field(None, description=description))
    return made


QuotaFields: type[Fields] = create_model("QuotaFields", __base__=Fields, **_quota_fields())
QuotaFields.__doc__ = "The fields of a quota, as in the file. One that is not there, or null, has its default."

_SetQuota: type[Fields] = create_model(
    "SetQuota", __base__=Fields, name=(str, Field(max_length=100)), **_quota_fields()
)
_SetModelQuota: type[Fields] = create_model(
    "SetModelQuota",
    __base__=Fields,
    group=(str, Field(max_length=100)),
    name=(str | None, Field(None, max_length=100, description="Default: derived from the model's name.")),
    **{name: field for name, field in _quota_fields().items() if name != "models"},
)
QuotaSetFields: type[Fields] = create_model(
    "QuotaSetFields", __base__=Fields, quotas=(tuple[_SetQuota, ...], Field(max_length=1000))
)
ModelQuotaFields: type[Fields] = create_model(
    "ModelQuotaFields",
    __base__=Fields,
    model=(str, Field(max_length=200)),
    quotas=(tuple[_SetModelQuota, ...], Field(max_length=1000)),
)


class QuotaQuery(Fields):
    """Which quotas are asked for."""

    group: str | None = Field(None, max_length=100, description="Only quotas of this group.")
    model: str | None = Field(None, max_length=200, description="Only quotas whose models are this name alone.")


class GroupFields(Fields):
    """What can be set of a group."""

    models: tuple[str, ...] | None = Field(
        None, max_length=1000, description="The models that its members may use, by name or pattern. Null: no list."
    )
    unlimited: bool = Field(False, description="Whether its members have no limits, except those of everyone.")


class NewGroup(GroupFields):
    """A group that is to be made."""

    name: str = Field(max_length=100)


class GroupOrder(Fields):
    """The groups that were made at run time, each once, in the order in which they admit calls."""

    names: tuple[str, ...] = Field(max_length=1000)


class GrantQuery(PageQuery):
    """Which grants are asked for."""

    quota: str | None = Field(None, max_length=201, description="Only grants on the quota of this id.")
    user: str | None = Field(None, max_length=400, description="Only grants for this user.")
    ended: bool = Field(False, description="Whether grants that have ended are listed too.")


class NewGrantFields(Fields):
    """So much more of a quota, until an instant."""

    quota: str = Field(max_length=201, description="The quota's id, such as staff/daily.")
    user: str | None = Field(
        None, max_length=400, description="Whose limit it raises. Null: that of each member, or of the pot."
    )
    measure: str = Field(max_length=100, description="What it is of: a measure that the quota limits.")
    amount: int = Field(ge=1, le=2**53)
    until: Instant = Field(description="When it ends (ms).")
    reason: str = Field(min_length=1, max_length=500)


@dataclass(frozen=True, slots=True)
class QuotaAnswer:
    """A quota after a change, and what the change does. `sentence` says what the quota allows whom."""

    quota: QuotaRecord
    effects: Effects
    sentence: str


@dataclass(frozen=True, slots=True)
class QuotaSetAnswer:
    """Quotas after a change of all of them, and what the change does. `sentences` has one for each of `data`."""

    data: tuple[QuotaRecord, ...]
    effects: Effects
    sentences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GroupAnswer:
    """A group after a change, and what the change does."""

    group: GroupRecord
    effects: Effects


@dataclass(frozen=True, slots=True)
class GroupListAnswer:
    """The groups after a change of their order, and what the change does."""

    data: tuple[GroupRecord, ...]
    effects: Effects


@dataclass(frozen=True, slots=True)
class GroupList:
    """The groups, in the order in which they admit calls."""

    data: tuple[GroupRecord, ...]


@dataclass(frozen=True, slots=True)
class QuotaList:
    """Quotas, in the order of the policy."""

    data: tuple[QuotaRecord, ...]


@dataclass(frozen=True, slots=True)
class EffectsAnswer:
    """What a change does."""

    effects: Effects


class Quotas(Resource):
    """The groups, quotas and grants."""

    def operations(self) -> list[Operation]:
        """The rows."""
        group, quota, grant = "/groups/{group}", "/groups/{group}/quotas/{name}", "/grants/{id}"
        quotas, member = f"{group}/quotas", f"{group}/members/{{user}}"
        seen: dict[str, Any] = {"roles": ALL_ROLES}
        return [
            reads("/groups", self._groups, "List the groups, in the order in which they admit calls.", **seen),
            creates("/groups", self._create_group, "Make a group, behind the others."),
            edits("PUT", "/groups", self._order, "Set the order of the groups that were made at run time."),
            reads(group, self._group, "Show a group.", **seen),
            edits("PUT", group, self._set_group, "Change a group."),
            edits("DELETE", group, self._delete_group, "Delete a group with its quotas."),
            reads(f"{group}/members", self._members, "List the members of a group.", **seen),
            changes("PUT", member, self._set_member, "Put a user into a group."),
            changes("DELETE", member, self._set_member, "Take a user out of a group."),
            reads("/quotas", self._quotas, "List the quotas.", **seen),
            edits(
                *("PUT", "/quotas", self._set_model, "Replace the quotas for one model, in all groups."),
                body=ModelQuotaFields,
            ),
            reads(quotas, self._of_group, "List the quotas of a group.", **seen),
            edits("PUT", quotas, self._set_all, "Replace all quotas of a group.", body=QuotaSetFields),
            reads(quota, self._quota, "Show a quota.", **seen),
            edits(
                *("PUT", quota, self._set, "Make or change a quota. Its usage stays."),
                body=QuotaFields,
                may_create=True,
            ),
            edits("DELETE", quota, self._delete, "Delete a quota."),
            reads("/grants", self._grants, "List grants.", **seen),
            creates("/grants", self._create_grant, "Grant more of a quota, until an instant.", roles=MANAGERS),
            reads(grant, self._grant, "Show a grant.", **seen),
            changes("DELETE", grant, self._end_grant, "End a grant now.", roles=MANAGERS),
        ]

    def _policy(self, request: AdminRequest[Any, Any]) -> PolicyAdministration:
        return PolicyAdministration(self._changes(request), self._policies.file)

    def _granting(self, request: AdminRequest[Any, Any]) -> GrantAdministration:
        admin = request.login.admin
        up_to = admin.grant_up_to if admin.role == "manager" else None
        return GrantAdministration(self._changes(request), self._policies.config, up_to, request.groups)

    # Groups

    async def _groups(self, request: AdminRequest[NoQuery, None]) -> Answer[GroupList]:
        records = await self._policy(request).groups()
        shown = tuple(each for each in records if _sees(request, each.name))
        return Answer(GroupList(shown), etag=PolicyAdministration.order_etag(records))

    async def _group(self, request: AdminRequest[NoQuery, None]) -> Answer[GroupRecord]:
        record = await self._policy(request).group(_group_of(request))
        return Answer(record, etag=record.etag)

    async def _create_group(self, request: AdminRequest[ChangeQuery, NewGroup]) -> Answer[GroupAnswer]:
        body = request.body
        record, effects = await self._policy(request).create_group(
            body.name, models=body.models, unlimited=body.unlimited
        )
        return Answer(GroupAnswer(record, effects), etag=record.etag)

    async def _set_group(self, request: AdminRequest[ChangeQuery, GroupFields]) -> Answer[GroupAnswer]:
        body = request.body
        record, effects = await self._policy(request).set_group(
            _group_of(request), models=body.models, unlimited=body.unlimited
        )
        return Answer(GroupAnswer(record, effects), etag=record.etag)

    async def _delete_group(self, request: AdminRequest[ChangeQuery, None]) -> EffectsAnswer:
        return EffectsAnswer(await self._policy(request).delete_group(_group_of(request)))

    async def _order(self, request: AdminRequest[ChangeQuery, GroupOrder]) -> Answer[GroupListAnswer]:
        records, effects = await self._policy(request).order_groups(request.body.names)
        return Answer(GroupListAnswer(records, effects), etag=PolicyAdministration.order_etag(records))

    async def _members(self, request: AdminRequest[PageQuery, None]) -> Page[UserAnswer]:
        page = await self._directory(request).users(request.query.paging, group=_group_of(request))
        return Page(tuple(map(UserAnswer.of, page.data)), page.next)

    async def _set_member(self, request: AdminRequest[ChangeQuery, None]) -> UserAnswer:
        directory, user = self._user_of(request)
        is_member = request.raw.method == hdrs.METH_PUT  # else DELETE
        return UserAnswer.of(await directory.set_member(request.path["group"], user, is_member=is_member))

    # Quotas

    async def _quotas(self, request: AdminRequest[QuotaQuery, None]) -> Answer[QuotaList]:
        query = request.query
        return _list(request, await self._policy(request).quotas(group=query.group, model=query.model))

    async def _of_group(self, request: AdminRequest[NoQuery, None]) -> Answer[QuotaList]:
        return _list(request, await self._policy(request).quotas(group=_group_of(request)))

    async def _quota(self, request: AdminRequest[NoQuery, None]) -> Answer[QuotaRecord]:
        record = await self._policy(request).quota(_group_of(request), request.path["name"])
        return Answer(record, etag=record.etag)

    async def _set(self, request: AdminRequest[ChangeQuery, Any]) -> Answer[QuotaAnswer]:
        record, effects, sentence = await self._policy(request).set_quota(
            request.path["group"], request.path["name"], _given(request.body)
        )
        return Answer(QuotaAnswer(record, effects, sentence), etag=record.etag)

    async def _delete(self, request: AdminRequest[ChangeQuery, None]) -> EffectsAnswer:
        return EffectsAnswer(await self._policy(request).delete_quota(request.path["group"], request.path["name"]))

    async def _set_all(self, request: AdminRequest[ChangeQuery, Any]) -> Answer[QuotaSetAnswer]:
        wanted: dict[str, Mapping[str, object]] = {}
        for number, each in enumerate(request.body.quotas):
            if each.name in wanted:
                text = f"{each.name} is there twice; give each quota its own name"
                raise ChangeRefused(f"quotas.{number}.name", text)
            wanted[each.name] = _given(each, "name")
        found, effects, sentences = await self._policy(request).set_quotas(request.path["group"], wanted)
        return Answer(QuotaSetAnswer(found.data, effects, tuple(sentences)), etag=found.etag)

    async def _set_model(self, request: AdminRequest[ChangeQuery, Any]) -> Answer[QuotaSetAnswer]:
        body = request.body
        wanted = [ModelQuota(each.group, _given(each, "group", "name"), each.name) for each in body.quotas]
        found, effects, sentences = await self._policy(request).set_model_quotas(body.model, wanted)
        return Answer(QuotaSetAnswer(found.data, effects, tuple(sentences)), etag=found.etag)

    # Grants

    async def _grants(self, request: AdminRequest[GrantQuery, None]) -> Page[GrantRecord]:
        query = request.query
        granting = self._granting(request)
        return await granting.grants(quota=query.quota, user=query.user, ended=query.ended, paging=query.paging)

    async def _grant(self, request: AdminRequest[NoQuery, None]) -> GrantRecord:
        return await self._granting(request).grant(request.path["id"])

    async def _create_grant(self, request: AdminRequest[ChangeQuery, NewGrantFields]) -> GrantRecord:
        body = request.body
        user = body.user
        if user is not None:
            directory = self._directory(request)
            identity = directory.resolve(user)
            # The groups that a header source sends come with each request, so anyone may be a member.
            is_listed = identity.source in (FILE, DATABASE)
            found = await (self._visible(request, identity) if is_listed else directory.user(identity))
            user = found.identity.subject
        return await self._granting(request).create(
            NewGrant(body.quota, user, body.measure, body.amount, body.until, body.reason)
        )

    async def _end_grant(self, request: AdminRequest[ChangeQuery, None]) -> GrantRecord:
        granting, id = self._granting(request), request.path["id"]
        if request.groups is not None and (await granting.grant(id)).created_by != request.author.actor:
            raise Problem("forbidden", "A manager may end only grants of its own: ask an administrator.")
        return await granting.end(id)


def _sees(request: AdminRequest[Any, Any], group: str) -> bool:
    return request.groups is None or group in request.groups


def _group_of(request: AdminRequest[Any, Any]) -> str:
    """The group in the path. Raises NotFound if the admin sees nothing of it."""
    name = request.path["group"]
    if not _sees(request, name):
        raise NotFound("group", f'there is no group "{name}"; list them to see their names')
    return name


def _list(request: AdminRequest[Any, Any], found: QuotaSet) -> Answer[QuotaList]:
    shown = tuple(each for each in found.data if _sees(request, each.group))
    return Answer(QuotaList(shown), etag=found.etag)


def _given(body: Fields, *without: str) -> dict[str, object]:
    """The fields of a quota that are there."""
    return {name: value for name, value in body.model_dump(exclude_unset=True).items() if name not in without}
