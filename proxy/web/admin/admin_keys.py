"""Admin keys that are made at run time: `/admin/api/admin-keys`."""

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from proxy.administration.admin_keys import AdminKeyAdministration, AdminKeyRecord
from proxy.policy.admin import GRANT_UP_TO, Admin, Role
from proxy.web.admin.operations import (
    AdminRequest,
    Answer,
    ChangeQuery,
    Fields,
    Instant,
    NewKeyAnswer,
    NoQuery,
    Operation,
    PageQuery,
    creates,
    edits,
    reads,
)
from proxy.web.admin.resource import Resource


class NewAdminKey(Fields):
    """An admin key that is to be made."""

    name: str = Field(max_length=100, description="What the log and the audit log call its owner.")
    role: Role = "administrator"
    groups: tuple[str, ...] = Field((), max_length=1000, description="For a manager: the groups that it is for.")
    grant_up_to: int = Field(
        GRANT_UP_TO, ge=0, le=1000, description="For a manager: what grants may add to a limit, in percent of it."
    )
    expires_at: Instant | None = Field(None, description="When it ends (ms). Default: never.")


@dataclass(frozen=True, slots=True)
class AdminKeyList:
    """A page of the keys that were made at run time, and the admins whose keys are in the file."""

    data: tuple[AdminKeyRecord, ...]
    next: str | None
    file: tuple[Admin, ...]


class AdminKeys(Resource):
    """Makes, lists and revokes admin keys."""

    def operations(self) -> list[Operation]:
        """The rows."""
        path, one = "/admin-keys", "/admin-keys/{id}"
        return [
            reads(path, self._list, "List admin keys."),
            creates(path, self._create, "Make an admin key. It is shown once."),
            reads(one, self._show, "Show an admin key."),
            edits("POST", f"{one}/revoke", self._revoke, "Revoke an admin key."),
        ]

    def _administration(self, request: AdminRequest[Any, Any]) -> AdminKeyAdministration:
        snapshot = self._policies.current
        return AdminKeyAdministration(self._changes(request), snapshot.admin_keys, tuple(snapshot.policy.groups))

    async def _list(self, request: AdminRequest[PageQuery, None]) -> AdminKeyList:
        page = await self._administration(request).keys(request.query.paging)
        return AdminKeyList(page.data, page.next, tuple(self._policies.current.admin_keys.values()))

    async def _create(self, request: AdminRequest[ChangeQuery, NewAdminKey]) -> NewKeyAnswer:
        body = request.body
        admin = Admin(body.name, body.role, body.groups, body.grant_up_to)
        return NewKeyAnswer.of(await self._administration(request).create(admin, expires_at=body.expires_at), request)

    async def _show(self, request: AdminRequest[NoQuery, None]) -> Answer[AdminKeyRecord]:
        record = await self._administration(request).key(request.path["id"])
        return Answer(record, etag=record.etag)

    async def _revoke(self, request: AdminRequest[ChangeQuery, None]) -> Answer[AdminKeyRecord]:
        record = await self._administration(request).revoke(request.path["id"])
        return Answer(record, etag=record.etag)
