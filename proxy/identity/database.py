"""The users and keys that are made at run time, in the database of the ledger.

The SQL of lookups is here, and that of changes in `administration`.

A user of a header source has a row from the first request on, so that it can be listed, disabled and counted. Every
change raises the version of the directory first (`change`), which makes changes wait for each other and tells every
process that what it remembers may be old. Adding a user who was never seen is no such change: no process can remember
anything of that user.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from ipaddress import ip_network
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.identity.directory import Cuts, KeyUse, OwnedKey, User, UserId
from proxy.ledger.rows import names_of
from proxy.ledger.schema import (
    api_keys,
    call_cuts,
    calls,
    counters,
    crossings,
    directory,
    identities,
    insert_of,
    refusals,
    usage_by_day,
    users,
)
from proxy.ledger.store import Store, StoreUnavailable
from proxy.policy.key import Key
from proxy.policy.quota import Globs, user_subject

# How many keys one transaction notes as used. It has SQLite's one write lock, for which calls wait.
_KEYS_AT_ONCE = 500
_FORGOTTEN_AT_ONCE = 100
# How many rows of a table one transaction changes while a user's records are made anonymous.
_ROWS_AT_ONCE = 1000


def _find_user() -> sa.Select[Any]:
    """One row, with the columns of `users` and the linked user's source and id; they are NULL if there is none.

    It is one statement, so that the link and the user are of one moment.
    """
    asked = sa.select(
        sa.bindparam("asked_source", type_=sa.Text).label("source"),
        sa.bindparam("asked_id", type_=sa.Text).label("id"),
    ).subquery("asked")
    link = sa.and_(identities.c.source == asked.c.source, identities.c.id == asked.c.id)
    user = sa.and_(
        users.c.source == sa.func.coalesce(identities.c.user_source, asked.c.source),
        users.c.id == sa.func.coalesce(identities.c.user_id, asked.c.id),
    )
    joined = asked.outerjoin(identities, link).outerjoin(users, user)
    return sa.select(users, identities.c.user_source, identities.c.user_id).select_from(joined)


# Built once: that takes as long as the query.
_FIND_USER = _find_user()


class DirectoryDatabase:
    """The part of the directory that is in the database. `now` gives ms since 1970.

    Every method raises StoreUnavailable.
    """

    def __init__(self, store: Store, *, now: Callable[[], int]) -> None:
        self._store = store
        self._now = now

    async def version(self) -> int:
        """The number of changes so far."""
        async with self._store.transaction() as connection:
            version: int | None = await connection.scalar(sa.select(directory.c.version))
        if version is None:
            raise StoreUnavailable("the table `directory` of the database has lost its row: restore a backup")
        return version

    async def find_key(self, digest: str) -> OwnedKey | None:
        """The key with this digest."""
        async with self._store.transaction() as connection:
            row = (await connection.execute(sa.select(api_keys).where(api_keys.c.digest == digest))).first()
        return None if row is None else OwnedKey(key_of(row), UserId(row.user_source, row.user_id))

    async def find_user(self, identity: UserId) -> User | None:
        """This user, or the one that it is linked to.

        A user who is linked to one of the file has no row here: then the result has the identity alone.
        """
        asked = {"asked_source": identity.source, "asked_id": identity.id}
        async with self._store.transaction() as connection:
            row = (await connection.execute(_FIND_USER, asked)).one()
        if row.source is not None:
            return user_of(row)
        return None if row.user_source is None else User(UserId(row.user_source, row.user_id))

    async def add_seen_user(self, identity: UserId, email: str | None, *, users_max: int) -> User | None:
        """The user of a header source who is seen for the first time; None if the source has `users_max` already."""
        added = User(identity, email=email)
        of_source = sa.select(sa.func.count()).select_from(users).where(users.c.source == identity.source)
        # Without the lock at first: a source that sends ever new ids must not hold up the calls of others.
        for writes in (False, True):
            async with self._store.transaction(writes=writes) as connection:
                if writes:
                    await _lock(connection)  # one process at a time counts and adds
                row = await find_row(connection, users, identity)
                if row is not None:
                    return user_of(row)
                if (await connection.execute(of_source)).scalar_one() >= users_max:
                    return None
                if writes:
                    await insert_user(connection, added, self._now(), by=identity.source)
        return added

    async def cuts_since(self, version: int) -> Cuts:
        """Which calls were to be ended at once by the changes after this version."""
        async with self._store.transaction() as connection:
            keys = await connection.execute(sa.select(api_keys.c.id).where(api_keys.c.cut_version > version))
            people = await connection.execute(
                sa.select(users.c.source, users.c.id).where(users.c.cut_version > version)
            )
            ended = await connection.execute(sa.select(call_cuts.c.call_id).where(call_cuts.c.version > version))
            return Cuts(
                frozenset(keys.scalars()), frozenset(UserId(*row) for row in people), frozenset(ended.scalars())
            )

    async def note_used(self, used: Mapping[str, KeyUse]) -> None:
        """Record the last uses of keys, by their ids. Of two in one minute, the one that is recorded first stays."""
        statement = sa.update(api_keys).where(api_keys.c.id == sa.bindparam("key_id"))
        later = sa.or_(api_keys.c.used_at.is_(None), api_keys.c.used_at < sa.bindparam("used"))
        values: dict[str, Any] = {"used_at": sa.bindparam("used"), "used_from": sa.bindparam("address")}
        rows = [{"key_id": id, "used": use.at, "address": use.address} for id, use in sorted(used.items())]
        for first in range(0, len(rows), _KEYS_AT_ONCE):
            async with self._store.transaction(writes=True) as connection:
                # Else a change of several keys could wait for one of these rows, and this for one of that change.
                await _lock(connection)
                await connection.execute(statement.where(later).values(values), rows[first : first + _KEYS_AT_ONCE])

    def read(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A transaction that only reads."""
        return self._store.transaction()

    async def make_anonymous(self, subject: str, pseudonym: str) -> None:
        """Give the records of a user another name, in small transactions: there may be a million of them."""
        of_calls = sa.select(calls.c.id).where(calls.c.user_name == subject, calls.c.state != "open")
        await self._change_in_steps(of_calls, sa.update(calls).values(user_name=pseudonym), calls.c.id)
        of_refusals = sa.select(refusals.c.request_id).where(refusals.c.user_name == subject)
        renamed = sa.update(refusals).values(user_name=pseudonym, details=None)
        await self._change_in_steps(of_refusals, renamed, refusals.c.request_id)
        async with self._store.transaction(writes=True) as connection:
            await connection.execute(sa.delete(crossings).where(crossings.c.subject == user_subject(subject)))
        async with self._store.transaction(writes=True) as connection:
            await _lock(connection)  # as for the notes of other processes, which may come after the keys were revoked
            own = is_of_user(api_keys, UserId.of_subject(subject))
            await connection.execute(sa.update(api_keys).where(*own).values(used_from=None))
        while True:
            async with self._store.transaction(writes=True) as connection:
                some_days = sa.select(usage_by_day).where(usage_by_day.c.user_name == subject).limit(_ROWS_AT_ONCE)
                # Locked, because a roll-up of another process may add to them.
                rows = (await connection.execute(some_days.with_for_update())).mappings().all()
                for row in rows:
                    await _rename_day(connection, row, pseudonym)
            if len(rows) < _ROWS_AT_ONCE:
                break

    async def _change_in_steps(self, found: sa.Select[Any], change: sa.Update, id: sa.Column[str]) -> None:
        """Change the rows whose ids are found, until none is."""
        while True:
            async with self._store.transaction(writes=True) as connection:
                ids = list((await connection.execute(found.limit(_ROWS_AT_ONCE))).scalars())
                for first in range(0, len(ids), 500):
                    await connection.execute(change.where(id.in_(ids[first : first + 500])))
            if len(ids) < _ROWS_AT_ONCE:
                return

    async def free_forgotten(self) -> None:
        """Free the names of forgotten users whose windows have ended, and delete their counters and keys.

        Records that were written after a user was forgotten are made anonymous first.
        """
        # Who is forgotten is cut off too: by the index of those, this does not read the whole table.
        is_gone = (users.c.cut_version.is_not(None), users.c.forgotten_at.is_not(None))
        gone = sa.select(users).where(*is_gone).limit(_FORGOTTEN_AT_ONCE)
        async with self._store.transaction() as connection:
            rows = (await connection.execute(gone)).all()
        for row in rows:
            identity = UserId(row.source, row.id)
            await self.make_anonymous(identity.subject, row.pseudonym)
            async with self._store.transaction(writes=True) as connection:
                await _lock(connection)
                own = counters.c.subject == user_subject(identity.subject)
                is_open = sa.select(counters.c.subject).where(own, counters.c.resets_at > self._now()).limit(1)
                records = sa.select(calls.c.id).where(calls.c.user_name == identity.subject).limit(1)
                days = sa.select(usage_by_day.c.day).where(usage_by_day.c.user_name == identity.subject).limit(1)
                still = [await connection.execute(each) for each in (is_open, records, days)]
                if all(each.first() is None for each in still):
                    await connection.execute(sa.delete(counters).where(own))
                    await connection.execute(sa.delete(api_keys).where(*is_of_user(api_keys, identity)))
                    await connection.execute(sa.delete(users).where(*is_row_of(users, identity)))

    @asynccontextmanager
    async def change(self) -> AsyncIterator[tuple[AsyncConnection, int]]:
        """A transaction that changes the directory, and the version that it makes."""
        async with self._store.transaction(writes=True) as connection:
            raised = sa.update(directory).values(version=directory.c.version + 1).returning(directory.c.version)
            yield connection, (await connection.execute(raised)).scalar_one()


async def _rename_day(connection: AsyncConnection, row: Mapping[Any, Any], pseudonym: str) -> None:
    """Give a sum of a day another name, or add it to the one that has this name already.

    A roll-up of another process can make the row with this name at the same moment.
    """
    key = ("day", "user_name", "through", "model")
    renamed = insert_of(connection)(usage_by_day).values({**row, "user_name": pseudonym})
    sums = {name: usage_by_day.c[name] + renamed.excluded[name] for name in row if name not in key}
    await connection.execute(renamed.on_conflict_do_update(index_elements=key, set_=sums))
    await connection.execute(sa.delete(usage_by_day).where(*(usage_by_day.c[name] == row[name] for name in key)))


async def _lock(connection: AsyncConnection) -> None:
    """Wait for changes that are not committed yet, and let none begin before this transaction ends."""
    await connection.execute(sa.select(directory.c.version).with_for_update())


def is_row_of(table: sa.Table, identity: UserId) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    """The conditions for the row of a user in a table with a source and an id."""
    return (table.c.source == identity.source, table.c.id == identity.id)


def is_of_user(table: sa.Table, owner: UserId) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    """The conditions for the rows that belong to a user in a table with a user's source and id."""
    return (table.c.user_source == owner.source, table.c.user_id == owner.id)


async def find_row(connection: AsyncConnection, table: sa.Table, identity: UserId) -> sa.Row[Any] | None:
    """The row of a user in a table with a source and an id; None if there is none."""
    return (await connection.execute(sa.select(table).where(*is_row_of(table, identity)))).first()


async def insert_user(connection: AsyncConnection, user: User, at: int, *, by: str, is_service: bool = False) -> None:
    """Insert the row of a user who is made at this instant (ms). `by` is who makes it."""
    await connection.execute(sa.insert(users).values(**row_of_new(user, at, by=by, is_service=is_service)))


def row_of_new(user: User, at: int, *, by: str, is_service: bool = False) -> dict[str, Any]:
    """The row of a user who is made at this instant (ms). `by` is who makes it."""
    return {
        "source": user.identity.source,
        "id": user.identity.id,
        "groups": orjson.dumps(user.groups).decode(),
        "email": user.email,
        "is_service": is_service,
        "created_at": at,
        "created_by": by,
    }


def user_of(row: sa.Row[Any]) -> User:
    """The user in a row of `users`."""
    is_disabled = row.disabled_at is not None or row.forgotten_at is not None
    return User(UserId(row.source, row.id), names_of(row.groups) or (), row.email, is_disabled)


def key_of(row: sa.Row[Any]) -> Key:
    """The key in a row of `api_keys`."""
    groups, networks, models = (names_of(text) for text in (row.groups, row.networks, row.models))
    return Key(
        id=row.id,
        label=row.label,
        groups=None if groups is None else tuple(groups),
        models=None if models is None else Globs(models),
        networks=tuple(ip_network(network) for network in networks or ()),
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        tag=row.tag or "",
        takes_tag_header=row.takes_tag_header,
    )
