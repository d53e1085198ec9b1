"""The login of the page: `/admin/api/session`."""

from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web
from pydantic import Field

from proxy.config.loader import Settings
from proxy.config.reload import Policies
from proxy.identity.authentication import Snapshot
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

    A page also needs to know: `timezone` is that of calendar windows; `api_url` is the base URL of the API for SDKs,
    null if the file says neither it nor a prefix. Then it is that of this host with `api_port`.
    """

    name: str
    role: Role
    groups: tuple[str, ...] | None
    grant_up_to: int | None
    expires_at: int | None
    timezone: str
    api_url: str | None
    api_port: int


class Sessions:
    """Begins, shows and ends the login of a browser. `api_port` gives the port of the API listener."""

    def __init__(
        self,
        access: Access,
        policies: Policies[Snapshot],
        *,
        settings: Settings,
        api_port: Callable[[], int],
    ) -> None:
        self._access = access
        self._policies = policies
        self._settings = settings
        self._api_port = api_port

    def operations(self) -> list[Operation]:
        """The rows."""
        path = "/session"
        return [
            reads(path, self._show, "Show who is asking.", roles=ALL_ROLES),
            changes(
                *("POST", path, self._begin, "Log in with an admin key. The answer sets a cookie."),
                roles=ANYBODY,
                body_bytes_max=_BODY_BYTES_MAX,
                status=201,
                is_change=False,
            ),
            changes("DELETE", path, self._end, "Log out.", roles=ALL_ROLES, status=204, is_change=False),
        ]

    async def _show(self, request: AdminRequest[NoQuery, None]) -> SessionAnswer:
        return self._answer(request.login, request.raw)

    async def _begin(self, request: AdminRequest[NoQuery, Credentials]) -> Answer[SessionAnswer]:
        login, cookie = await self._access.log_in(request.raw, request.body.key)
        return Answer(self._answer(login, request.raw), headers={"set-cookie": cookie})

    async def _end(self, request: AdminRequest[NoQuery, None]) -> Answer[None]:
        return Answer(None, headers={"set-cookie": await self._access.log_out(request.raw)})

    def _answer(self, login: Login, request: web.Request) -> SessionAnswer:
        admin = login.admin
        return SessionAnswer(
            admin.name,
            admin.role,
            admin.restricted_to,
            grant_up_to=admin.grant_up_to if admin.role == "manager" else None,
            expires_at=login.expires_at,
            timezone=str(self._policies.current.policy.zone),
            api_url=self._api_url(request),
            api_port=self._api_port(),
        )

    def _api_url(self, request: web.Request) -> str | None:
        settings = self._settings
        if settings.api_url is not None:
            return f"{settings.api_url}{settings.prefix}/v1"
        if not settings.prefix:
            return None
        # The host and the scheme with which the browser addresses this listener; without a prefix the page does it.
        is_tls = settings.admin_url is not None and settings.admin_url.startswith("https:")
        url = request.url.origin().with_scheme("https" if is_tls else "http").with_port(self._api_port())
        return f"{url}{settings.prefix}/v1"
