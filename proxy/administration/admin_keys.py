"""Admin keys that are made at run time, beside those of the file."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.administration.change import ChangeRefused, Changes, Conflict, NotFound, as_json, etag_of, valid
from proxy.administration.pages import Page, Paging
from proxy.config import values
from proxy.config.suggestions import did_you_mean
from proxy.identity.keys import NewKey, make_key
from proxy.ledger.rows import names_of
from proxy.ledger.schema import admin_keys
from proxy.policy.admin import GRANT_UP_TO, Admin, Role


@dataclass(frozen=True, slots=True)
class AdminKeyRecord:
    """An admin key as administrators see it. Instants are in ms since 1970.

    `groups` and `grant_up_to` (in percent of a limit) are those of a manager, and None for other roles.
    """

    id: str
    name: str
    role: Role
    groups: tuple[str, ...] | None
    grant_up_to: int | None
    created_at: int
    created_by: str
    expires_at: int | None
    revoked_at: int | None

    @property
    def etag(self) -> str:
        """Changes whenever an administrator changes the key."""
        return etag_of(self)


@dataclass(frozen=True)
class AdminKeyAdministration:
    """Makes, lists and revokes admin keys.

    `of_file` are the admins of the file, by the digests of their keys, and `group_names` the groups of the policy.
    Methods raise ChangeRefused and StoreUnavailable.
    """

    changes: Changes
    of_file: Mapping[str, Admin]
    group_names: Collection[str]

    async def keys(self, paging: Paging) -> Page[AdminKeyRecord]:
        """The keys that were made at run time, also those that have ended, in the order of their ids."""
        found = sa.select(admin_keys).order_by(admin_keys.c.id).limit(paging.size + 1)
        key = paging.key(str)
        if key is not None:
            found = found.where(admin_keys.c.id > key[0])
        async with self.changes.database.read() as connection:
            rows = (await connection.execute(found)).all()
        return paging.page(rows, lambda row: (row.id,), _record)

    async def key(self, id: str) -> AdminKeyRecord:
        """One key, by its id."""
        async with self.changes.database.read() as connection:
            return await self._key(connection, id)

    async def create(self, admin: Admin, *, expires_at: int | None) -> NewKey:
        """Make a key. Its text is in the result and nowhere else; it is empty if this repeats an earlier creation.

        A name belongs to one valid key, so that the audit log says who it was. `groups` and `grant_up_to` of the
        admin count only for a manager, who needs groups.
        """
        self._check(admin)
        async with self.changes.begin("admin_key.create", admin.name) as change:
            if change.repeated is not None:
                return NewKey(change.repeated, "")
            await self._check_name(change.connection, admin.name)
            new = make_key()
            is_manager = admin.role == "manager"
            await change.connection.execute(
                sa.insert(admin_keys).values(
                    id=new.id,
                    digest=new.digest,
                    name=admin.name,
                    role=admin.role,
                    groups=as_json(admin.groups) if is_manager else None,
                    grant_up_to=admin.grant_up_to if is_manager else None,
                    created_at=self.changes.now(),
                    created_by=self.changes.author.actor,
                    expires_at=expires_at,
                )
            )
            change.target = new.id
            made = {"name": admin.name, "role": admin.role, "expires_at": expires_at}
            change.note(None, {**made, **({"groups": list(admin.groups)} if is_manager else {})})
        return new

    async def revoke(self, id: str) -> AdminKeyRecord:
        """Refuse a key, and logins with it, from now on."""
        async with self.changes.begin("admin_key.revoke", id) as change:
            before = await self._key(change.connection, id)
            change.check_match(before.etag)
            at = before.revoked_at or self.changes.now()
            of_id = sa.update(admin_keys).where(admin_keys.c.id == id)
            await change.connection.execute(of_id.values(revoked_at=at))
            change.note({"revoked_at": before.revoked_at}, {"revoked_at": at})
            return await self._key(change.connection, id)

    def _check(self, admin: Admin) -> None:
        valid("name", values.name, admin.name)
        if (admin.role == "manager") != bool(admin.groups):
            text = "a manager needs the groups that it is for" if not admin.groups else "only a manager has groups"
            raise ChangeRefused("groups", text)
        if admin.role != "manager" and admin.grant_up_to != GRANT_UP_TO:
            raise ChangeRefused("grant_up_to", "only a manager's grants are limited")
        for name in admin.groups:
            if name not in self.group_names:
                hint = did_you_mean(name, self.group_names)
                raise ChangeRefused("groups", f'there is no group "{name}"{f"; {hint}" if hint else ""}')

    async def _check_name(self, connection: AsyncConnection, name: str) -> None:
        now = self.changes.now()
        is_valid = (
            admin_keys.c.revoked_at.is_(None),
            sa.or_(admin_keys.c.expires_at.is_(None), admin_keys.c.expires_at > now),
        )
        same = sa.select(admin_keys.c.id).where(admin_keys.c.name == name, *is_valid).limit(1)
        is_of_file = any(admin.name == name for admin in self.of_file.values())
        if is_of_file or (await connection.execute(same)).first() is not None:
            raise Conflict("name", f'there is an admin key "{name}" already; use another name, or revoke that one')

    async def _key(self, connection: AsyncConnection, id: str) -> AdminKeyRecord:
        row = (await connection.execute(sa.select(admin_keys).where(admin_keys.c.id == id))).first()
        if row is None:
            raise NotFound("id", "there is no admin key with this id (those of the file are in the file)")
        return _record(row)


def _record(row: sa.Row[Any]) -> AdminKeyRecord:
    return AdminKeyRecord(
        id=row.id,
        name=row.name,
        role=row.role,
        groups=names_of(row.groups),
        grant_up_to=row.grant_up_to,
        created_at=row.created_at,
        created_by=row.created_by,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
