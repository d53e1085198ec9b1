"""The login of the page: `/admin/api/session`."""

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from proxy.policy.admin import Role
from proxy.web.admin.access import Access, Login
from proxy.web.admin.operations import (
    ALL_ROLES,
    ANYBODY,
    AdminRequest,
    Answer,
    Fields,
    NoQuery,
    Operation,
    changes,
    reads,
)

_BODY_BYTES_MAX = 32_768


class Credentials(Fields):
    """What a login is made with. Without a key in the body, the one in the header is used."""

    key: str | None = Field(None, min_length=1, max_length=16_384, description="An admin key.", repr=False)


@dataclass(frozen=True, slots=True)
class SessionAnswer:
    """Who is asking.

    `groups` are those of a manager, null for other roles. `grant_up_to` is in percent of a limit. `expires_at` is
    when the login ends (ms), null if the request carries the key itself.
    """

    name: str
    role: Role
    groups: tuple[str, ...] | None
    grant_up_to: int | None
    expires_at: int | None


class Sessions:
    """Begins, shows and ends the login of a browser."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def operations(self) -> list[Operation]:
        """The rows."""
        path = "/session"
        return [
            reads(path, self._show, "Show who is asking.", SessionAnswer, roles=ALL_ROLES),
            changes(
                "POST",
                path,
                self._begin,
                "Log in with an admin key. The answer sets a cookie.",
                SessionAnswer,
                roles=ANYBODY,
                query=NoQuery,
                body=Credentials,
                body_bytes_max=_BODY_BYTES_MAX,
                status=201,
                is_change=False,
            ),
            changes(
                "DELETE",
                path,
                self._end,
                "Log out.",
                None,
                roles=ALL_ROLES,
                query=NoQuery,
                status=204,
                is_change=False,
            ),
        ]

    async def _show(self, request: AdminRequest[NoQuery, None]) -> SessionAnswer:
        return _answer(request.login)

    async def _begin(self, request: AdminRequest[NoQuery, Credentials]) -> Answer:
        new = await self._access.log_in(request.raw, request.body.key)
        return Answer(_answer(new.login), headers={"set-cookie": new.cookie})

    async def _end(self, request: AdminRequest[NoQuery, Any]) -> Answer:
        return Answer(None, headers={"set-cookie": await self._access.log_out(request.raw)})


def _answer(login: Login) -> SessionAnswer:
    admin = login.admin
    share = admin.grant_up_to if admin.role == "manager" else None
    groups = admin.restricted_to
    return SessionAnswer(admin.name, admin.role, groups, share, login.expires_at)
