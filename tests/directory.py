"""Users and keys in a database, made and changed as the commands do: each in one change of the directory.

users = DirectoryDatabase(store, now=clock)
dora = await add_user(users, "dora", groups=["staff"])
key = await add_key(users, dora)                          # `key.text` is what a client sends
await set_key(users, key, revoked_at=NOON, is_cut=True)
"""

from collections.abc import Iterable, Mapping
from typing import Any

import orjson
import sqlalchemy as sa

from proxy.identity.database import DirectoryDatabase
from proxy.identity.directory import UserId
from proxy.identity.keys import NewKey, make_key
from proxy.ledger.schema import api_keys, users
from tests.builders import NOON


def user_row(identity: UserId, **more: Any) -> dict[str, Any]:
    """A row of `users`, of a user without groups unless `more` has them as JSON."""
    row = {"source": identity.source, "id": identity.id, "groups": "[]", "is_service": False}
    return row | {"created_at": NOON, "created_by": "cli:root"} | more


def key_row(id: str, owner: UserId, **more: Any) -> dict[str, Any]:
    """A row of `api_keys`, of a key that nothing narrows."""
    row = {"id": id, "digest": f"digest of {id}", "user_source": owner.source, "user_id": owner.id, "label": ""}
    return row | {"takes_tag_header": False, "created_at": NOON, "created_by": "cli:root"} | more


async def insert(database: DirectoryDatabase, table: sa.Table, **values: Any) -> int:
    """Insert a row in a change, and return its version."""
    async with database.change() as (connection, version):
        await connection.execute(sa.insert(table), values)
        return version


async def add_user(
    database: DirectoryDatabase, id: str, *, groups: Iterable[str] = ("staff",), source: str = "database"
) -> UserId:
    """A new user in these groups."""
    identity = UserId(source, id)
    await insert(database, users, **user_row(identity, groups=orjson.dumps(list(groups)).decode()))
    return identity


async def add_key(database: DirectoryDatabase, owner: UserId, **more: Any) -> NewKey:
    """A new key of this user."""
    key = make_key()
    await insert(database, api_keys, **key_row(key.id, owner, digest=key.digest, **more))
    return key


async def set_key(database: DirectoryDatabase, key: NewKey, *, is_cut: bool = False, **values: Any) -> None:
    """Change a key; with `is_cut` its calls in flight are to be ended at once."""
    await _set(database, sa.update(api_keys).where(api_keys.c.id == key.id), values, is_cut=is_cut)


async def set_user(database: DirectoryDatabase, user: UserId, *, is_cut: bool = False, **values: Any) -> None:
    """Change a user; with `is_cut` the user's calls in flight are to be ended at once."""
    is_user = (users.c.source == user.source, users.c.id == user.id)
    await _set(database, sa.update(users).where(*is_user), values, is_cut=is_cut)


async def _set(database: DirectoryDatabase, update: sa.Update, values: Mapping[str, Any], *, is_cut: bool) -> None:
    async with database.change() as (connection, version):
        cut = {"cut_version": version} if is_cut else {}
        await connection.execute(update.values({**values, **cut}))
