"""Changes of users and keys at run time. Each is one transaction with its row in the audit log.

Users and keys of the file are read-only here: the error says where to change them.
"""

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.administration.change import Change, ChangeRefused, Changes, Conflict, NotFound, as_json, valid
from proxy.administration.pages import Page, Paging
from proxy.administration.policy_rows import set_groups_of_file_user
from proxy.administration.records import (
    Imported,
    ImportedUser,
    KeyLimits,
    KeyRecord,
    UserRecord,
    audit_name,
    key_record,
    user_record,
)
from proxy.administration.search import contains
from proxy.administration.words import words
from proxy.config import values
from proxy.config.suggestions import did_you_mean
from proxy.identity.database import (
    find_row,
    insert_user,
    is_of_user,
    is_row_of,
    row_of_new,
)
from proxy.identity.directory import DATABASE, FILE, FileDirectory, User, UserId
from proxy.identity.keys import KEY_PATTERN, NewKey, make_key, random_id
from proxy.ledger.schema import api_keys, audit, calls, grants, identities, usage_by_day, users
from proxy.policy.key import Network
from proxy.policy.policy import DEFAULT, EVERYONE
from proxy.policy.quota import Globs

LISTED_MAX = 1000
# How many ids one statement names.
_IDS_AT_ONCE = 500
# Sets the groups and the address of users of the source `database`.
_SET_IMPORTED = (
    sa.update(users)
    .where(users.c.source == DATABASE, users.c.id == sa.bindparam("of_id"))
    .values(groups=sa.bindparam("new_groups"), email=sa.bindparam("new_email"))
)
# The source of pseudonyms. `values.source_name` refuses this name for a source of the configuration.
_FORGOTTEN = "forgotten"


@dataclass(frozen=True)
class DirectoryAdministration:
    """The changes and lists of users and keys.

    `file` has the users of the configuration, `group_names` the groups of the policy, of which `file_group_names` are
    the file's, and `source_names` the header sources. Methods raise ChangeRefused and StoreUnavailable. With
    `Conditions.is_trial` they do nothing and return what they would.
    """

    changes: Changes
    file: FileDirectory
    group_names: Collection[str]
    source_names: Collection[str] = ()
    file_group_names: Collection[str] = ()

    # Users

    def resolve(self, name: str) -> UserId:
        """The user whom a name means: a user of the file, else of the database, unless it is `SOURCE:ID`."""
        if ":" in name:
            return UserId.of_subject(name)
        return UserId(FILE if self.file.user(name) is not None else DATABASE, name)

    async def user(self, identity: UserId) -> UserRecord:
        """One user."""
        async with self.changes.database.read() as connection:
            return await self._user(connection, identity)

    async def users(self, paging: Paging, *, text: str = "", group: str | None = None) -> Page[UserRecord]:
        """The users of the file by name, then those of the database by source and id.

        Only those whose id or e-mail address has this text, and who are in this group. Groups that a header source
        sends come with each request, and are not known here.
        """
        after = paging.key(int, str, str)
        found: list[UserRecord] = []
        if after is None or not after[0]:
            name = "" if after is None else after[2]
            wanted = (user for user in self.file.users_after(name) if _matches(user, text, group))
            found = [UserRecord(user.identity, user.groups) for user in islice(wanted, paging.size + 1)]
        async with self.changes.database.read() as connection:
            if len(found) <= paging.size:
                key = after[1:] if after is not None and after[0] else None
                listed = _listed_users(key, group).limit(paging.size + 1)
                if text:
                    listed = listed.where(contains(connection, (users.c.id, users.c.email), text))
                rows = await connection.execute(listed)
                found += [user_record(row) for row in rows if not self._is_in_file(row)]
            records = await _with_links(connection, found[: paging.size + 1])
        return paging.page(records, lambda record: self.place(record.identity), lambda record: record)

    def _is_in_file(self, row: sa.Row[Any]) -> bool:
        return row.source == FILE and self.file.user(row.id) is not None

    def place(self, identity: UserId) -> tuple[int, str, str]:
        """The place of a user in the list, as a cursor has it."""
        is_of_file = identity.source == FILE and self.file.user(identity.id) is not None
        return (0 if is_of_file else 1, identity.source, identity.id)

    async def add_user(
        self, id: str, *, groups: Sequence[str] = (), email: str | None = None, is_service: bool = False
    ) -> UserRecord:
        """Add a user of the source `database`."""
        async with self.changes.begin("user.add", audit_name(UserId(DATABASE, id))) as change:
            if change.repeated is not None:
                return await self._user(change.connection, UserId(DATABASE, id))
            await self._add_user(change, id, groups=groups, email=email, is_service=is_service)
            return await self._user(change.connection, UserId(DATABASE, id))

    async def set_user(
        self, identity: UserId, *, groups: Sequence[str] | None = None, email: str | None = None
    ) -> UserRecord:
        """Set the groups or the e-mail address of a user; None leaves them as they are. An empty text removes it."""
        async with self.changes.begin("user.set", audit_name(identity)) as change:
            before = await self._changeable(change, identity)
            await self._set_user(change, before, groups=groups, email=email)
            return await self._user(change.connection, identity)

    async def set_member(self, group: str, identity: UserId, *, is_member: bool) -> UserRecord:
        """Put a user into a group, or take it out. Doing it again changes nothing.

        A user of the file can be put into groups that were made at run time, and into no others.
        """
        [name] = self._groups([group])
        action = "member.add" if is_member else "member.remove"
        is_of_file = identity.source == FILE
        async with self.changes.begin(action, audit_name(identity), is_of_policy=is_of_file) as change:
            if is_of_file:
                before = await self._user(change.connection, identity)
                if name in self.file_group_names:
                    raise ChangeRefused(
                        "group", f"{name} is a group of the file, and so are its users: change the file"
                    )
            else:
                before = await self._changeable(change, identity)
            wanted = {*before.groups, name} if is_member else {*before.groups} - {name}
            # Groups that the policy does not have now are kept: the file may have them again.
            known = [each for each in self.group_names if each in wanted]
            after = [*known, *(each for each in before.groups if each in wanted and each not in known)]
            if is_of_file:
                made = [each for each in after if each not in self.file_group_names]
                at, by = self.changes.now(), self.changes.author.actor
                await set_groups_of_file_user(change.connection, identity.id, made, at=at, by=by)
            else:
                await _update(change, identity, groups=as_json(after))
            change.note({"groups": list(before.groups)}, {"groups": after})
            record = await self._user(change.connection, identity)
            return replace(record, groups=tuple(after)) if is_of_file else record

    async def disable_user(self, identity: UserId, *, cut: bool = False) -> UserRecord:
        """Refuse further calls of a user. With `cut`, running calls end at once."""
        async with self.changes.begin("user.disable", audit_name(identity)) as change:
            before = await self._changeable(change, identity)
            at = before.disabled_at or self.changes.now()
            cut_now = {"cut_version": change.version} if cut else {}
            await _update(change, identity, disabled_at=at, **cut_now)
            change.note({"disabled_at": before.disabled_at}, {"disabled_at": at, **({"cut": True} if cut else {})})
            return await self._user(change.connection, identity)

    async def enable_user(self, identity: UserId) -> UserRecord:
        """Let a disabled user call again."""
        async with self.changes.begin("user.enable", audit_name(identity)) as change:
            before = await self._changeable(change, identity)
            await _update(change, identity, disabled_at=None)
            change.note({"disabled_at": before.disabled_at}, {"disabled_at": None})
            return await self._user(change.connection, identity)

    async def link(self, identity: UserId, user: UserId) -> UserRecord:
        """Let the user whom a header source knows as `identity` be another user, whose counters it then uses."""
        if identity.source not in self.source_names:
            raise ChangeRefused("identity", f'"{identity.source}" is no header source of the configuration')
        valid("identity", values.outside_id, identity.id)
        async with self.changes.begin("user.link", audit_name(user)) as change:
            record = await self._user(change.connection, user)
            change.check_match(record.etag)
            if record.forgotten_at is not None:
                raise Conflict("user", f"{user.subject} was forgotten")
            owner = await _linked_user(change.connection, identity)
            if owner is not None:
                text = f"{identity.subject} is linked to {owner.subject} already; unlink it first"
                raise Conflict("identity", text)
            await change.connection.execute(
                sa.insert(identities).values(
                    source=identity.source, id=identity.id, user_source=user.source, user_id=user.id
                )
            )
            change.note(None, {"identity": identity.subject})
            return await self._user(change.connection, user)

    async def unlink(self, identity: UserId) -> None:
        """Let the user whom a header source knows as `identity` be one of its own again."""
        async with self.changes.begin("user.unlink", audit_name(identity)) as change:
            gone = await change.connection.execute(sa.delete(identities).where(*is_row_of(identities, identity)))
            if not gone.rowcount:
                raise NotFound("identity", f"{identity.subject} is not linked to a user")
            change.note({"identity": identity.subject}, None)

    async def import_users(self, lines: Iterable[ImportedUser]) -> Imported:
        """Add these users of the source `database`, or set the groups and e-mail addresses of those that are there.

        All or none. Doing it again changes nothing.
        """
        lists: dict[str, list[str]] = {"added": [], "changed": [], "unchanged": []}
        # Checked before, and written with few statements, because calls wait for SQLite's write lock.
        checked = await asyncio.to_thread(self._checked_lines, lines)
        async with self.changes.begin("user.import", f"{DATABASE}:") as change:
            before = await _rows_of(change.connection, [line.id for line in checked])
            new, changed = [], []
            at, by = self.changes.now(), self.changes.author.actor
            for line in checked:
                row = before.get(line.id)
                if row is None:
                    user = User(UserId(DATABASE, line.id), line.groups or (), line.email or None)
                    new.append(row_of_new(user, at, by=by))
                    lists["added"].append(line.id)
                    continue
                groups, email = self._imported(line, row)
                if (list(groups), email) == (orjson.loads(row.groups), row.email):
                    lists["unchanged"].append(line.id)
                    continue
                changed.append({"of_id": line.id, "new_groups": as_json(groups), "new_email": email})
                lists["changed"].append(line.id)
            if new:
                await change.connection.execute(sa.insert(users), new)
            if changed:
                await change.connection.execute(_SET_IMPORTED, changed)
            change.note(None, {"added": lists["added"], "changed": lists["changed"]})
        return Imported(**{name: tuple(ids) for name, ids in lists.items()})

    def _checked_lines(self, lines: Iterable[ImportedUser]) -> list[ImportedUser]:
        """The lines with their groups in the policy's order. Raises ChangeRefused with the number of the line."""
        checked: dict[str, ImportedUser] = {}
        for line in lines:
            try:
                if line.id in checked:
                    raise ChangeRefused("id", f"{line.id} is in the file twice")
                valid("id", values.outside_id, line.id)
                groups = None if line.groups is None else tuple(self._groups(line.groups))
                email = line.email if line.email is None else _email(line.email) or ""
            except ChangeRefused as error:
                raise _in_line(line, error) from None
            checked[line.id] = replace(line, groups=groups, email=email)
        return list(checked.values())

    def _imported(self, line: ImportedUser, row: sa.Row[Any]) -> tuple[Sequence[str], str | None]:
        """The groups and the address of a user who is there, after the import. Raises ChangeRefused."""
        identity = UserId(DATABASE, line.id)
        of_file = self.file.linked(identity)
        if of_file is not None:
            text = f"{identity.subject} is the user {of_file.identity.subject} by a link: change that one"
            raise _in_line(line, ChangeRefused("user", text))
        if row.forgotten_at is not None:
            raise _in_line(line, _forgotten(identity))
        groups = orjson.loads(row.groups) if line.groups is None else line.groups
        return groups, row.email if line.email is None else line.email or None

    async def forget(self, identity: UserId) -> str:
        """Make the records of a user anonymous, end its calls and revoke its keys. Returns the pseudonym.

        The name stays taken until the windows of its counters have ended, so that nobody gets a fresh quota by being
        forgotten; `DirectoryDatabase.free_forgotten` frees it then. The audit log keeps what happened, without the
        name. Doing it again makes records anonymous that were written meanwhile.
        """
        # The grants of the user end, which are part of the policy.
        async with self.changes.begin("user.forget", "", is_of_policy=True) as change:
            if identity.source == FILE:
                # A user who was taken out of the file may still have records.
                if self.file.user(identity.id) is not None:
                    raise _of_file(identity)
                await self._ensure_row(change, identity)
            row = await find_row(change.connection, users, identity)
            if row is None:
                raise self._no_user(identity)
            change.check_match((await self._user(change.connection, identity)).etag)
            pseudonym: str = row.pseudonym or f"{_FORGOTTEN}:{random_id()}"
            now = self.changes.now()
            await _update(
                change,
                identity,
                groups="[]",
                email=None,
                disabled_at=row.disabled_at or now,
                forgotten_at=row.forgotten_at or now,
                pseudonym=pseudonym,
                cut_version=change.version,
            )
            await self._revoke_all(change, identity, pseudonym)
            change.target = pseudonym
        if not self.changes.conditions.is_trial:
            await self.changes.database.make_anonymous(identity.subject, pseudonym)
        return pseudonym

    # Keys

    async def keys(
        self, *, owner: UserId | None = None, text: str = "", after: str = "", limit: int = 100
    ) -> list[KeyRecord]:
        """The keys of the database: of one user, or whose id, label or user has this text, in the order of ids."""
        found = (
            sa.select(api_keys).where(api_keys.c.id > after).order_by(api_keys.c.id).limit(min(limit, LISTED_MAX + 1))
        )
        if owner is not None:
            found = found.where(*is_of_user(api_keys, owner))
        async with self.changes.database.read() as connection:
            if text:
                found = found.where(contains(connection, (api_keys.c.id, api_keys.c.label, api_keys.c.user_id), text))
            return [key_record(row) for row in await connection.execute(found)]

    async def key(self, id: str) -> KeyRecord:
        """One key, by its id."""
        async with self.changes.database.read() as connection:
            return await self._key(connection, id)

    async def find_keys(self, text: str) -> list[KeyRecord]:
        """The keys in a text, such as a log or a diff; of the file also those that the text has as a whole word.

        Nothing of the text is stored or sent. A key that is not known here is not in the result, also if it has the
        id of one that is: a person who reads ids could have the keys of others revoked.
        """
        digests = [values.digest(key) for key in dict.fromkeys(match[0] for match in KEY_PATTERN.finditer(text))]
        found: list[KeyRecord] = []
        async with self.changes.database.read() as connection:
            for first in range(0, len(digests), 500):
                is_one = api_keys.c.digest.in_(digests[first : first + 500])
                some = sa.select(api_keys).where(is_one).order_by(api_keys.c.id)
                found += [key_record(row) for row in await connection.execute(some)]
        for word in dict.fromkeys(words(text)):
            owned = self.file.key(values.digest(word))
            if owned is not None:
                found.append(KeyRecord(owned.key, owned.owner))
        return found

    async def create_key(self, owner: UserId, limits: KeyLimits) -> NewKey:
        """Make a key. Its text is in the result and nowhere else; it is empty if this repeats an earlier creation."""
        async with self.changes.begin("key.create", audit_name(owner)) as change:
            if change.repeated is not None:
                return NewKey(change.repeated, "")
            user = await self._user(change.connection, owner)
            if user.forgotten_at is not None:
                raise Conflict("user", f"{owner.subject} was forgotten")
            new = make_key()
            row = self._key_row(new, user, limits)
            await change.connection.execute(sa.insert(api_keys).values(**row))
            record = await self._key(change.connection, new.id)
            change.target = new.id
            change.note(None, _audited(record))
        return new

    async def set_key(
        self, id: str, *, label: str | None = None, expires_at: int | None = None, never_expires: bool = False
    ) -> KeyRecord:
        """Set the label of a key, or when it expires (ms); None leaves them. With `never_expires` it does not."""
        async with self.changes.begin("key.set", id) as change:
            before = await self._key(change.connection, id)
            change.check_match(before.etag)
            if before.key.revoked_at is not None:
                raise Conflict("key", f"the key {id} is revoked; make a new one")
            changed: dict[str, Any] = {}
            if label is not None:
                changed["label"] = valid("label", values.label, label) if label else ""
            if expires_at is not None or never_expires:
                changed["expires_at"] = expires_at
            if changed:
                of_id = sa.update(api_keys).where(api_keys.c.id == id)
                await change.connection.execute(of_id.values(**changed))
            was = before.as_json()
            change.note({name: was[name] for name in changed}, changed)
            return await self._key(change.connection, id)

    async def revoke_key(self, id: str, *, cut: bool = False) -> KeyRecord:
        """Refuse a key from now on. With `cut`, running calls with it end at once."""
        async with self.changes.begin("key.revoke", id) as change:
            before = await self._key(change.connection, id)
            change.check_match(before.etag)
            at = before.key.revoked_at or self.changes.now()
            cut_now = {"cut_version": change.version} if cut else {}
            of_id = sa.update(api_keys).where(api_keys.c.id == id)
            await change.connection.execute(of_id.values(revoked_at=at, **cut_now))
            change.note({"revoked_at": before.key.revoked_at}, {"revoked_at": at, **({"cut": True} if cut else {})})
            return await self._key(change.connection, id)

    async def rotate_key(self, id: str, *, overlap_ms: int) -> NewKey:
        """Make a key with the same limits. The old one stays valid for `overlap_ms`, unless it expires before."""
        async with self.changes.begin("key.rotate", id) as change:
            if change.repeated is not None:
                return NewKey((await self._key(change.connection, id)).replaced_by or "", "")
            before = await self._key(change.connection, id)
            change.check_match(before.etag)
            now = self.changes.now()
            if before.key.revoked_at is not None or (before.key.expires_at or now + 1) <= now:
                raise Conflict("key", f"the key {id} is not valid any more; make a new one with `keys create`")
            if before.replaced_by is not None:
                raise Conflict("key", f"the key {id} was replaced by {before.replaced_by}; rotate that one")
            new = make_key()
            copied = sa.select(api_keys).where(api_keys.c.id == id)
            row = dict((await change.connection.execute(copied)).mappings().one())
            made = {"id": new.id, "digest": new.digest, "created_at": now, "created_by": self.changes.author.actor}
            unused = {"used_at": None, "used_from": None, "cut_version": None, "replaced_by": None}
            await change.connection.execute(sa.insert(api_keys).values(**{**row, **made, **unused}))
            ends = min(now + overlap_ms, before.key.expires_at or now + overlap_ms)
            of_id = sa.update(api_keys).where(api_keys.c.id == id)
            await change.connection.execute(of_id.values(expires_at=ends, replaced_by=new.id))
            change.note(
                {"expires_at": before.key.expires_at, "replaced_by": None},
                {"expires_at": ends, "replaced_by": new.id},
            )
        return new

    # Parts

    async def _user(self, connection: AsyncConnection, identity: UserId) -> UserRecord:
        if identity.source == FILE and (of_file := self.file.user(identity.id)) is not None:
            [record] = await _with_links(connection, [UserRecord(identity, of_file.groups)])
            return record
        row = await find_row(connection, users, identity)
        if row is None:
            raise self._no_user(identity)
        [record] = await _with_links(connection, [user_record(row)])
        return record

    async def _changeable(self, change: Change, identity: UserId) -> UserRecord:
        """A user who can be changed here, as the client read it (`If-Match`).

        Raises ChangeRefused for one of the file, a forgotten one, and one that is another user by a link: a change of
        it would have no effect.
        """
        if identity.source == FILE:
            raise _of_file(identity)
        of_file = self.file.linked(identity)
        owner = await _linked_user(change.connection, identity) if of_file is None else of_file.identity
        if owner is not None:
            raise ChangeRefused("user", f"{identity.subject} is the user {owner.subject} by a link: change that one")
        record = await self._user(change.connection, identity)
        change.check_match(record.etag)
        if record.forgotten_at is not None:
            raise _forgotten(identity)
        return record

    async def _add_user(
        self, change: Change, id: str, *, groups: Sequence[str], email: str | None, is_service: bool
    ) -> None:
        identity = UserId(DATABASE, id)
        valid("id", values.outside_id, id)
        row = await find_row(change.connection, users, identity)
        if row is not None:
            text = f"there is a user {identity.subject} already; change it with `users set`"
            if row.forgotten_at is not None:
                text = f"{identity.subject} was forgotten, and its name is free only when its windows have ended"
            raise Conflict("id", text)
        checked = self._groups(groups)
        user = User(identity, tuple(checked), _email(email))
        await insert_user(
            change.connection, user, self.changes.now(), by=self.changes.author.actor, is_service=is_service
        )
        change.note(None, {"groups": checked, "is_service": is_service})

    async def _ensure_row(self, change: Change, identity: UserId) -> None:
        """A row for a user who is in no file any more and has records, so that the name stays taken."""
        if await find_row(change.connection, users, identity) is not None:
            return
        records = sa.select(calls.c.id).where(calls.c.user_name == identity.subject).limit(1)
        days = sa.select(usage_by_day.c.model).where(usage_by_day.c.user_name == identity.subject).limit(1)
        found = [await change.connection.scalar(each) for each in (records, days)]
        if found == [None, None]:
            raise self._no_user(identity)
        await insert_user(change.connection, User(identity), self.changes.now(), by=self.changes.author.actor)

    async def _set_user(
        self, change: Change, before: UserRecord, *, groups: Sequence[str] | None, email: str | None
    ) -> None:
        """Set what is not None. The audit log does not keep e-mail addresses."""
        checked = list(before.groups) if groups is None else self._groups(groups)
        address = before.email if email is None else _email(email)
        await _update(change, before.identity, groups=as_json(checked), email=address)
        is_changed = {"email": "changed"} if address != before.email else {}
        change.note({"groups": list(before.groups)}, {"groups": checked, **is_changed})

    async def _key(self, connection: AsyncConnection, id: str) -> KeyRecord:
        row = (await connection.execute(sa.select(api_keys).where(api_keys.c.id == id))).first()
        if row is None:
            # It is not repeated, because it may be the whole key.
            raise NotFound(
                "key",
                "the database has no key with this id; write the ID of lqp_ID_… alone, as `keys list` shows it "
                "(keys of the file are in the file)",
            )
        return key_record(row)

    def _key_row(self, new: NewKey, user: UserRecord, limits: KeyLimits) -> dict[str, Any]:
        groups = self._groups(limits.groups)
        missing = [name for name in groups if name not in user.groups]
        if missing:
            own = ", ".join(user.groups) or "no group"
            raise ChangeRefused("groups", f"{user.identity.subject} is not in {missing[0]}, but in {own}")
        networks: list[Network] = [valid("networks", values.network, text) for text in limits.networks]
        models = [valid("models", values.glob, text) for text in limits.models]
        return {
            "id": new.id,
            "digest": new.digest,
            "user_source": user.identity.source,
            "user_id": user.identity.id,
            "label": valid("label", values.label, limits.label) if limits.label else "",
            "groups": as_json(groups) if groups else None,
            "networks": as_json([str(network) for network in networks]) if networks else None,
            "models": as_json(list(Globs(models).texts)) if models else None,
            "tag": valid("tag", values.tag, limits.tag) if limits.tag else None,
            "takes_tag_header": limits.takes_tag_header,
            "created_at": self.changes.now(),
            "created_by": self.changes.author.actor,
            "expires_at": limits.expires_at,
        }

    async def _revoke_all(self, change: Change, identity: UserId, pseudonym: str) -> None:
        """Revoke the keys of a user who is forgotten, and take its name out of links and of the audit log."""
        own = is_of_user(api_keys, identity)
        ids = list((await change.connection.execute(sa.select(api_keys.c.id).where(*own))).scalars())
        at = sa.func.coalesce(api_keys.c.revoked_at, self.changes.now())
        await change.connection.execute(sa.update(api_keys).where(*own).values(revoked_at=at, label=""))
        await change.connection.execute(sa.delete(identities).where(*is_of_user(identities, identity)))
        await change.connection.execute(sa.delete(identities).where(*is_row_of(identities, identity)))
        of_user = sa.update(audit).where(audit.c.target == audit_name(identity))
        await change.connection.execute(of_user.values(target=pseudonym, before=None, after=None))
        if identity.source == DATABASE:
            await _rename_in_imports(change.connection, identity.id, pseudonym)
        is_granted = grants.c.user_name == identity.subject
        ids += (await change.connection.execute(sa.select(grants.c.id).where(is_granted))).scalars()
        await change.connection.execute(sa.update(grants).where(is_granted).values(user_name=pseudonym, reason=""))
        for first in range(0, len(ids), 500):
            of_made = sa.update(audit).where(audit.c.target.in_(ids[first : first + 500]))
            await change.connection.execute(of_made.values(before=None, after=None))

    def _no_user(self, identity: UserId) -> NotFound:
        # A source that was removed from the configuration can still have users.
        if identity.source not in (FILE, DATABASE, *self.source_names):
            known = ", ".join((FILE, DATABASE, *self.source_names))
            return NotFound("user", f'there is no source "{identity.source}"; write one of {known}, or an id')
        return NotFound("user", f"there is no user {identity.subject}; `users list` lists them")

    def _groups(self, names: Iterable[str]) -> list[str]:
        """These groups, each once, in the policy's order. Raises ChangeRefused for one that is not in the policy."""
        wanted = set(names)
        for name in sorted(wanted):
            if name in (EVERYONE, DEFAULT):
                raise ChangeRefused("groups", f'"{name}" applies to users without being listed; leave it out')
            if name not in self.group_names:
                known = [group for group in self.group_names if group not in (EVERYONE, DEFAULT)]
                hint = did_you_mean(name, known) or f"the file has {', '.join(known) or 'none'}"
                raise ChangeRefused("groups", f'there is no group "{name}"; {hint}')
        return [name for name in self.group_names if name in wanted]


def _matches(user: User, text: str, group: str | None) -> bool:
    """Whether a user of the file has this text in its name, and is in this group."""
    return text.lower() in user.identity.id.lower() and (group is None or group in user.groups)


def _listed_users(after: tuple[str, str] | None, group: str | None) -> sa.Select[Any]:
    key = (users.c.source, users.c.id)
    found = sa.select(users).where(sa.or_(users.c.source != FILE, users.c.forgotten_at.is_not(None))).order_by(*key)
    if after is not None:
        found = found.where(sa.tuple_(*key) > after)
    if group is not None:
        found = found.where(users.c.groups.contains(as_json(group), autoescape=True))
    return found


async def _update(change: Change, identity: UserId, **changed: object) -> None:
    """Change the row of a user."""
    await change.connection.execute(sa.update(users).where(*is_row_of(users, identity)).values(**changed))


async def _linked_user(connection: AsyncConnection, identity: UserId) -> UserId | None:
    """The user whom an administrator linked this one of a header source to; None if there is none."""
    row = await find_row(connection, identities, identity)
    return None if row is None else UserId(row.user_source, row.user_id)


async def _with_links(connection: AsyncConnection, records: Sequence[UserRecord]) -> list[UserRecord]:
    """The same records with the identities that are linked to them."""
    owner = (identities.c.user_source, identities.c.user_id)
    is_asked = sa.tuple_(*owner).in_([(record.identity.source, record.identity.id) for record in records])
    links = sa.select(identities).where(is_asked).order_by(identities.c.source, identities.c.id)
    linked: dict[UserId, list[UserId]] = {}
    for row in await connection.execute(links):
        linked.setdefault(UserId(row.user_source, row.user_id), []).append(UserId(row.source, row.id))
    return [replace(record, linked=tuple(linked.get(record.identity, ()))) for record in records]


async def _rename_in_imports(connection: AsyncConnection, id: str, pseudonym: str) -> None:
    """Give a user another name in the lists of imports, which the audit log keeps."""
    has_it = (audit.c.action == "user.import", audit.c.after.contains(as_json(id), autoescape=True))
    for row in (await connection.execute(sa.select(audit.c.id, audit.c.after).where(*has_it))).all():
        lists = {
            name: [pseudonym if each == id else each for each in ids] for name, ids in orjson.loads(row.after).items()
        }
        await connection.execute(sa.update(audit).where(audit.c.id == row.id).values(after=as_json(lists)))


def _audited(record: KeyRecord) -> dict[str, Any]:
    """What the audit log keeps of a new key."""
    kept = ("user", "label", "groups", "models", "networks", "tag", "expires_at")
    return {name: value for name, value in record.as_json().items() if name in kept and value}


def _forgotten(identity: UserId) -> Conflict:
    return Conflict("user", f"{identity.subject} was forgotten; its name is free when its windows end")


def _in_line(line: ImportedUser, error: ChangeRefused) -> ChangeRefused:
    """The error with the number of the line that it is about."""
    return type(error)(error.field, f"line {line.line}: {error}")


async def _rows_of(connection: AsyncConnection, ids: Sequence[str]) -> dict[str, sa.Row[Any]]:
    """The rows of users of the source `database`, by their ids."""
    found: dict[str, sa.Row[Any]] = {}
    for first in range(0, len(ids), _IDS_AT_ONCE):
        some = sa.select(users).where(users.c.source == DATABASE, users.c.id.in_(ids[first : first + _IDS_AT_ONCE]))
        found |= {row.id: row for row in await connection.execute(some)}
    return found


def _email(text: str | None) -> str | None:
    if not text:
        return None
    if values.why_no_id(text) is not None or not values.is_email(text):
        raise ChangeRefused("email", "this is not an e-mail address; write one such as ann@example.org")
    return text


def _of_file(identity: UserId) -> ChangeRefused:
    return ChangeRefused("user", f"{identity.id} is a user of the file: change the file")
