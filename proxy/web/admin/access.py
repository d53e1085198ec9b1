"""Who is asking on the admin listener, and whether a request may have any effect.

An admin shows a key in `Authorization: Bearer` or `x-api-key`, or the cookie of a login. A key is one of the file or
of the table `admin_keys`. Headers of trusted sources never count. A login lasts 12 h at most, and ends with its key:
the key is looked up again with each request.

A browser adds the cookie by itself, also to requests that other pages cause. `SameSite=Strict` keeps it from requests
of other sites, but a page on another port of the same host is of the same site. So a change needs
`Sec-Fetch-Site: same-origin`, which pages can't set, or from older browsers an `Origin` that is this listener's own.
A page can't put a key into the header of a request to another origin, so requests with a key need neither.
"""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from proxy.config.loader import Settings
from proxy.config.reload import Policies
from proxy.config.values import KEY_CHARACTERS_MIN, digest
from proxy.errors import InvalidKey
from proxy.identity.admins import AdminDatabase
from proxy.identity.authentication import Snapshot
from proxy.identity.client_address import parse_address
from proxy.identity.keys import KEY_HEADERS, KEY_PATTERN, PREFIX, id_of, presented_key
from proxy.metrics import Metrics
from proxy.policy.admin import Admin
from proxy.web.admin.failures import Failures
from proxy.web.admin.problems import Problem
from proxy.web.listener import note_valid_key
from proxy.web.middleware import LOG_LINE

COOKIE = "lqp_admin"
COOKIE_PATH = "/admin"
SESSION_MS = 12 * 3_600_000
_TOKEN = re.compile(r"lqps_[A-Za-z0-9_-]{43}")
# How many lookups of keys and logins ask the database at a time, and for how long, in seconds.
_LOOKUPS_AT_ONCE = 2
_ANSWER_S = 5.0
# Names of query parameters in which other programs take keys.
_KEY_PARAMETERS = frozenset(
    "key api_key api-key apikey x-api-key admin_key token access_token auth authorization bearer password secret "
    f"session {COOKIE}".split()
)
_CLOSED = (
    "There is no admin key yet, so this API is closed. Write one to quotas.yaml, as in "
    'admin_keys: {ops: "${ADMIN_KEY}"}, or make one with: llm-quota-proxy admin-keys create NAME'
)
_SITE_HEADER = "Sec-Fetch-Site"


@dataclass(frozen=True, slots=True)
class Login:
    """Who is asking. `expires_at` is when the login ends, in ms; None: the request carries the key itself."""

    admin: Admin
    expires_at: int | None = None


class Access:
    """Identifies admins. `now` gives ms since 1970, and `clock` seconds that only grow."""

    def __init__(
        self,
        policies: Policies[Snapshot],
        database: AdminDatabase,
        *,
        settings: Settings,
        metrics: Metrics,
        now: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._policies = policies
        self._database = database
        self._metrics = metrics
        self._now = now
        self._url = settings.admin_url
        own_name = urlsplit(settings.admin_url).hostname if settings.admin_url else None
        self._names = {"localhost", *settings.admin_hosts, *((own_name,) if own_name else ())}
        self._failures = Failures(clock)
        self._asking = asyncio.Semaphore(_LOOKUPS_AT_ONCE)

    # Where a request is from

    def check_host(self, request: web.Request) -> None:
        """Raise Problem unless the request is addressed to an IP address, or to a name of this listener.

        A page of another site can let its own name lead to this listener, and is then of the same origin for the
        browser. But its name is in `Host`.
        """
        host = host_of(request)
        if host in self._names or parse_address(host) is not None:
            return
        raise Problem(
            "wrong-host",
            "This is not a name of the admin listener. Use its IP address, or add the name to server.admin_hosts.",
        )

    def check_same_origin(self, request: web.Request) -> None:
        """Raise Problem unless a page of this listener, or no page at all, has caused this request."""
        sites = request.headers.getall(_SITE_HEADER, [])
        if sites == ["same-origin"]:
            return
        origins = request.headers.getall(hdrs.ORIGIN, [])
        own = {f"{request.scheme}://{request.headers.get(hdrs.HOST, '').lower()}", self._url}
        if not sites and len(origins) == 1 and origins[0].lower() in own:
            return
        raise Problem(
            "cross-site",
            "A change with the cookie of a login must come from a page of this listener: its header Sec-Fetch-Site "
            "must be same-origin, or its Origin the listener's own. Programs send the admin key in Authorization.",
        )

    def check_url(self, request: web.Request, *, is_known: bool) -> None:
        """Raise Problem if a key is in the URL, where servers on the way log it.

        Before the client `is_known`, only names and forms count: else the answer would tell whether a key is valid.
        """
        query = request.query
        texts = [*query, *query.values(), *request.path.split("/")]
        is_key = any(KEY_PATTERN.search(text) or _TOKEN.search(text) for text in texts)
        # An id, as in `key=7k2mq9xw4b`, is shorter than a key.
        is_key = is_key or any(
            name.lower() in _KEY_PARAMETERS and len(value) >= KEY_CHARACTERS_MIN for name, value in query.items()
        )
        if is_key or (is_known and any(map(self._is_key_of_file, texts))):
            raise Problem(
                "key-in-url",
                "Send keys in the header Authorization, and never in the URL. This one may be in the logs of servers "
                "on the way: replace it.",
            )

    def _is_key_of_file(self, text: str) -> bool:
        if len(text) < KEY_CHARACTERS_MIN:
            return False
        snapshot, hashed = self._policies.current, digest(text)
        return hashed in snapshot.admin_keys or snapshot.file.key(hashed) is not None

    # Who is asking

    async def identify(self, request: web.Request) -> Login:
        """Who is asking. Raises InvalidKey, Problem and StoreUnavailable."""
        await self._check_open(request)
        if _has_key(request) or COOKIE not in request.headers.get(hdrs.COOKIE, ""):
            admin, _, _ = await self._by_key(request, presented_key(request.headers))
            login = Login(admin)
        else:
            login = await self._by_cookie(request)
        self._note(request, login)
        self.check_url(request, is_known=True)
        return login

    async def log_in(self, request: web.Request, key: str | None) -> tuple[Login, str]:
        """Begin a login with the key in the header, or with one from the body. Raises as `identify` does.

        Returns the login, and the `Set-Cookie` that begins it.
        """
        await self._check_open(request)
        if key is None or _has_key(request):
            key = presented_key(request.headers)
        else:
            # Else a page could log its visitor in as somebody else, and see what that visitor then enters.
            self.check_same_origin(request)
        admin, key_digest, key_expires_at = await self._by_key(request, key)
        token = f"lqps_{secrets.token_urlsafe(32)}"
        expires_at = min(self._now() + SESSION_MS, key_expires_at or self._now() + SESSION_MS)
        async with asyncio.timeout(_ANSWER_S):
            await self._database.begin_session(digest(token), key_digest=key_digest, expires_at=expires_at)
        login = Login(admin, expires_at)
        self._note(request, login)
        return login, self._cookie(token, (expires_at - self._now()) // 1000)

    async def log_out(self, request: web.Request) -> str:
        """End the login of this request, if it has one. Returns the `Set-Cookie` that removes the cookie."""
        token = _token_of(request)
        if token is not None:
            async with asyncio.timeout(_ANSWER_S):
                await self._database.end_session(digest(token))
        return self._cookie("", 0)

    async def _check_open(self, request: web.Request) -> None:
        """Raise Problem if there is no admin key yet, or one is in the URL."""
        self.check_url(request, is_known=False)
        if self._policies.current.admin_keys:
            return
        async with self._lookup():
            if not await self._database.has_keys():
                raise Problem("closed", _CLOSED)

    async def _by_key(self, request: web.Request, key: str) -> tuple[Admin, str, int | None]:
        """Whose key this is, its digest, and when it expires (ms)."""
        address = request[LOG_LINE].address
        self._check_pace(address)
        hashed = digest(key)
        admin = self._policies.current.admin_keys.get(hashed)
        if admin is not None:
            return admin, hashed, None
        # The checksum first: a key that was not made here costs no query.
        if key.startswith(PREFIX) and id_of(key) is not None:
            async with self._lookup():
                self._check_pace(address)  # others of this address may have failed while this one waited
                found = await self._database.find_key(hashed)
            if found is not None:
                return found.admin, hashed, found.expires_at
        self._failures.note(address)
        self._metrics.unauthorized("no admin key")
        raise InvalidKey("This is not a valid admin key of this proxy.", reason="no admin key")

    async def _by_cookie(self, request: web.Request) -> Login:
        """Whose login this is. A wrong token is no attempt to find a key: it has 256 random bits, and it ends."""
        token = _token_of(request)
        session = None
        if token is not None:
            async with self._lookup():
                session = await self._database.find_session(digest(token))
        if session is not None:
            admin = self._policies.current.admin_keys.get(session.key_digest)
            if admin is None and session.key is not None:
                admin = session.key.admin
            if admin is not None:
                return Login(admin, session.expires_at)
        self._metrics.unauthorized("no admin session")
        raise InvalidKey("This login has ended. Log in again.", reason="no admin session")

    def _check_pace(self, address: str) -> None:
        wait_s = self._failures.wait_s(address)
        if wait_s:
            raise Problem(
                "too-many-failures",
                "Too many wrong keys came from this address. Try again later.",
                headers={"retry-after": str(wait_s)},
            )

    @asynccontextmanager
    async def _lookup(self) -> AsyncIterator[None]:
        """A lookup in the database, of which few run at a time: clients without a key cause them too."""
        async with asyncio.timeout(_ANSWER_S), self._asking:
            yield

    def _note(self, request: web.Request, login: Login) -> None:
        request[LOG_LINE].admin = login.admin.name
        note_valid_key(request)

    def _cookie(self, value: str, age_s: int) -> str:
        is_secure = self._url is not None and self._url.startswith("https:")
        attributes = f"Path={COOKIE_PATH}; Max-Age={age_s}; HttpOnly; SameSite=Strict"
        return f"{COOKIE}={value}; {attributes}{'; Secure' if is_secure else ''}"


def host_of(request: web.Request) -> str:
    """The name or address in `Host`, in lower case, without the port, brackets and a dot at the end."""
    values = request.headers.getall(hdrs.HOST, [])
    if len(values) != 1:
        return ""
    host = values[0].lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].removesuffix(".")


def _has_key(request: web.Request) -> bool:
    return any(name in request.headers for name in KEY_HEADERS)


def _token_of(request: web.Request) -> str | None:
    """The token in the cookie; None if there is none, or more than one.

    Another server of the same host can set a second cookie of this name, with a longer path, to replace the login by
    another one.
    """
    pairs = ";".join(request.headers.getall(hdrs.COOKIE, [])).split(";")
    tokens = [value.strip() for name, _, value in (pair.partition("=") for pair in pairs) if name.strip() == COOKIE]
    return tokens[0] if len(tokens) == 1 and _TOKEN.fullmatch(tokens[0]) else None
