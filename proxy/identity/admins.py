"""The admin keys that are made at run time, and the logins of the page, in the database of the ledger.

They are read anew for each request: few requests come from admins, and a revoked key ends at once. A login is kept
by the digest of its token, and has no rights of its own: it is looked up with the key by which it was made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from proxy.ledger.rows import names_of
from proxy.ledger.schema import admin_keys, admin_sessions
from proxy.ledger.store import Store
from proxy.policy.admin import GRANT_UP_TO, Admin


@dataclass(frozen=True, slots=True)
class AdminKey:
    """A valid key that was made at run time: whose it is, and when it expires (ms; None: never)."""

    admin: Admin
    expires_at: int | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """A login that has not ended: the digest of its key, when it ends (ms), and the key if that is of the table."""

    key_digest: str
    expires_at: int
    key: AdminKey | None = None


class AdminDatabase:
    """Reads admin keys, and keeps logins. `now` gives ms since 1970. Every method raises StoreUnavailable."""

    def __init__(self, store: Store, *, now: Callable[[], int]) -> None:
        self._store = store
        self._now = now

    async def has_keys(self) -> bool:
        """Whether there is a valid key."""
        some = sa.select(admin_keys.c.id).where(*self._is_valid()).limit(1)
        async with self._store.transaction() as connection:
            return (await connection.execute(some)).first() is not None

    async def find_key(self, digest: str) -> AdminKey | None:
        """The key with this digest, if it is valid."""
        found = sa.select(admin_keys).where(admin_keys.c.digest == digest, *self._is_valid())
        async with self._store.transaction() as connection:
            row = (await connection.execute(found)).first()
        return None if row is None else AdminKey(admin_of(row), row.expires_at)

    async def begin_session(self, digest: str, *, key_digest: str, expires_at: int) -> None:
        """Keep a login by the digest of its token. Those that have ended are deleted."""
        now = self._now()
        async with self._store.transaction(writes=True) as connection:
            await connection.execute(sa.delete(admin_sessions).where(admin_sessions.c.expires_at <= now))
            await connection.execute(
                sa.insert(admin_sessions).values(
                    digest=digest, key_digest=key_digest, created_at=now, expires_at=expires_at
                )
            )

    async def find_session(self, digest: str) -> Session | None:
        """The login with a token of this digest, if it has not ended."""
        key = sa.and_(admin_keys.c.digest == admin_sessions.c.key_digest, *self._is_valid())
        found = (
            sa.select(admin_sessions.c.key_digest, admin_sessions.c.expires_at.label("ends_at"), admin_keys)
            .select_from(admin_sessions.outerjoin(admin_keys, key))
            .where(admin_sessions.c.digest == digest, admin_sessions.c.expires_at > self._now())
        )
        async with self._store.transaction() as connection:
            row = (await connection.execute(found)).first()
        if row is None:
            return None
        return Session(row.key_digest, row.ends_at, None if row.id is None else AdminKey(admin_of(row)))

    async def end_session(self, digest: str) -> None:
        """End the login with a token of this digest."""
        async with self._store.transaction(writes=True) as connection:
            await connection.execute(sa.delete(admin_sessions).where(admin_sessions.c.digest == digest))

    def _is_valid(self) -> tuple[sa.ColumnElement[bool], ...]:
        expires_at = admin_keys.c.expires_at
        return (admin_keys.c.revoked_at.is_(None), sa.or_(expires_at.is_(None), expires_at > self._now()))


def admin_of(row: sa.Row[Any]) -> Admin:
    """The admin in a row of `admin_keys`."""
    share = GRANT_UP_TO if row.grant_up_to is None else row.grant_up_to
    return Admin(row.name, row.role, names_of(row.groups) or (), share)
