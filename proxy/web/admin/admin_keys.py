"""Admin keys that are made at run time: `/admin/api/admin-keys`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from proxy.administration.admin_keys import AdminKeyAdministration, AdminKeyRecord
from proxy.config.reload import Policies
from proxy.identity.authentication import Snapshot
from proxy.identity.database import DirectoryDatabase
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
    changes,
    reads,
)


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


class AdminKeys:
    """Makes, lists and revokes admin keys. `now` gives ms since 1970."""

    def __init__(self, policies: Policies[Snapshot], database: DirectoryDatabase, *, now: Callable[[], int]) -> None:
        self._policies = policies
        self._database = database
        self._now = now

    def operations(self) -> list[Operation]:
        """The rows."""
        one = "/admin-keys/{id}"
        return [
            reads("/admin-keys", self._list, "List admin keys.", AdminKeyList, query=PageQuery),
            changes(
                "POST",
                "/admin-keys",
                self._create,
                "Make an admin key. It is shown once.",
                NewKeyAnswer,
                body=NewAdminKey,
                status=201,
                is_repeatable=True,
            ),
            reads(one, self._show, "Show an admin key.", AdminKeyRecord),
            changes("POST", f"{one}/revoke", self._revoke, "Revoke an admin key.", AdminKeyRecord, needs_match=True),
        ]

    def _administration(self, request: AdminRequest[Any, Any]) -> AdminKeyAdministration:
        snapshot = self._policies.current
        made = request.changes(self._database, self._now)
        return AdminKeyAdministration(made, snapshot.admin_keys, tuple(snapshot.policy.groups))

    async def _list(self, request: AdminRequest[PageQuery, None]) -> AdminKeyList:
        page = await self._administration(request).keys(request.query.paging)
        return AdminKeyList(page.data, page.next, tuple(self._policies.current.admin_keys.values()))

    async def _create(self, request: AdminRequest[ChangeQuery, NewAdminKey]) -> NewKeyAnswer:
        body = request.body
        admin = Admin(body.name, body.role, body.groups, body.grant_up_to)
        return NewKeyAnswer.of(await self._administration(request).create(admin, expires_at=body.expires_at), request)

    async def _show(self, request: AdminRequest[NoQuery, None]) -> Answer:
        return _answer(await self._administration(request).key(request.path["id"]))

    async def _revoke(self, request: AdminRequest[ChangeQuery, None]) -> Answer:
        return _answer(await self._administration(request).revoke(request.path["id"]))


def _answer(record: AdminKeyRecord) -> Answer:
    return Answer(record, etag=record.etag)
