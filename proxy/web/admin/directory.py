"""Users and keys: `/admin/api/users` and `/admin/api/keys`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from proxy.administration.change import NotFound
from proxy.administration.directory import DirectoryAdministration
from proxy.administration.pages import Page
from proxy.administration.records import Imported, ImportedUser, KeyLimits, KeyRecord, UserRecord
from proxy.config.reload import Policies
from proxy.identity.authentication import Snapshot
from proxy.identity.database import DirectoryDatabase
from proxy.identity.directory import UserId
from proxy.ledger.queries import DAY_MS
from proxy.policy.policy import DEFAULT, EVERYONE
from proxy.web.admin.operations import (
    READERS,
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


class UserQuery(PageQuery):
    """Which users are asked for."""

    text: str = Field("", max_length=300, description="Only users whose id or e-mail address contains this.")
    group: str | None = Field(None, max_length=100, description="Only users in this group.")


class NewUser(Fields):
    """A user of the database that is to be added."""

    id: str = Field(max_length=256)
    groups: tuple[str, ...] = Field((), max_length=1000)
    email: str | None = Field(None, max_length=256)
    is_service: bool = Field(False, description="Whether it is a program and no person.")


class UserChange(Fields):
    """What is to be changed. What is not there stays as it is; an empty e-mail address is removed."""

    groups: tuple[str, ...] | None = Field(None, max_length=1000)
    email: str | None = Field(None, max_length=256)


class Cut(Fields):
    """How what is running ends."""

    cut: bool = Field(False, description="Whether calls in flight end at once. They are charged what has passed.")


class NewIdentity(Fields):
    """The user of a header source."""

    source: str = Field(max_length=100)
    id: str = Field(max_length=256)


class ImportFields(Fields):
    """Users that are to be added or set, all or none."""

    users: tuple["ImportLine", ...] = Field(max_length=10_000)


class ImportLine(Fields):
    """A user of the database. Groups or an address that are null stay as they are."""

    id: str = Field(max_length=256)
    groups: tuple[str, ...] | None = Field(None, max_length=1000)
    email: str | None = Field(None, max_length=256)


class KeyQuery(PageQuery):
    """Which keys are asked for."""

    text: str = Field("", max_length=300, description="Only keys whose id, label or user contains this.")
    user: str | None = Field(None, max_length=400, description="Only keys of this user.")


class NewKeyFields(Fields):
    """A key that is to be made, and what it narrows."""

    label: str = Field("", max_length=100)
    groups: tuple[str, ...] = Field(
        (), max_length=1000, description="Those of the user's groups that admit its calls."
    )
    models: tuple[str, ...] = Field((), max_length=1000, description="Names or patterns.")
    networks: tuple[str, ...] = Field((), max_length=1000, description="Where its requests may come from.")
    expires_at: Instant | None = Field(None, description="When it ends (ms). Default: never.")
    tag: str = Field("", max_length=64)
    takes_tag_header: bool = False


class KeyChange(Fields):
    """What is to be changed. What is not there stays as it is; an empty label and a null instant are removed."""

    label: str | None = Field(None, max_length=100)
    expires_at: Instant | None = None


class Rotation(Fields):
    """How long the old key stays valid beside the new one."""

    overlap_ms: int = Field(DAY_MS, ge=0, le=366 * DAY_MS)


class PastedText(Fields):
    """A text in which keys are to be found, such as a log or a diff. It is not stored."""

    text: str


@dataclass(frozen=True, slots=True)
class UserAnswer:
    """A user. `user` is its name in records, and `linked` are the users of header sources that are this one.

    Instants are in ms since 1970.
    """

    user: str
    source: str
    id: str
    groups: list[str]
    email: str | None
    is_service: bool
    created_at: int | None
    created_by: str | None
    disabled_at: int | None
    forgotten_at: int | None
    linked: list[str]


@dataclass(frozen=True, slots=True)
class KeyAnswer:
    """A key, without its text. Null for groups or models: all of them.

    Instants are in ms since 1970; `used_at` is to the minute. `used_from` is the address of the last use.
    """

    id: str
    user: str
    label: str
    groups: list[str] | None
    models: list[str] | None
    networks: list[str]
    tag: str
    takes_tag_header: bool
    expires_at: int | None
    revoked_at: int | None
    used_at: int | None
    used_from: str | None
    created_at: int | None
    created_by: str | None
    replaced_by: str | None


@dataclass(frozen=True, slots=True)
class FoundKeys:
    """The keys in a text, without their texts."""

    data: tuple[KeyAnswer, ...]


@dataclass(frozen=True, slots=True)
class ForgottenUser:
    """Under which name the records of a user who was forgotten are kept."""

    pseudonym: str


class Users:
    """The users of the file and the database, and their keys. `now` gives ms since 1970."""

    def __init__(self, policies: Policies[Snapshot], database: DirectoryDatabase, *, now: Callable[[], int]) -> None:
        self._policies = policies
        self._database = database
        self._now = now

    def operations(self) -> list[Operation]:
        """The rows."""
        return [*self._user_operations(), *self._key_operations()]

    def _user_operations(self) -> list[Operation]:
        one = "/users/{user}"
        created: dict[str, Any] = {"status": 201, "is_repeatable": True}
        edited: dict[str, Any] = {"needs_match": True}
        return [
            reads(
                "/users",
                self._list,
                "List the users.",
                Page[UserAnswer],
                query=UserQuery,
            ),
            changes("POST", "/users", self._add, "Add a user.", UserAnswer, body=NewUser, **created),
            changes("POST", "/users/import", self._import, "Add or set many users.", Imported, body=ImportFields),
            reads(one, self._show, "Show a user, by its name in records.", UserAnswer),
            changes(
                "PATCH",
                one,
                self._set,
                "Set the groups or the e-mail address of a user.",
                UserAnswer,
                body=UserChange,
                **edited,
            ),
            changes(
                "POST",
                f"{one}/disable",
                self._disable,
                "Refuse further calls of a user.",
                UserAnswer,
                body=Cut,
                **edited,
            ),
            changes("POST", f"{one}/enable", self._enable, "Let a user call again.", UserAnswer, **edited),
            changes(
                "POST",
                f"{one}/forget",
                self._forget,
                "Make the records of a user anonymous.",
                ForgottenUser,
                **edited,
            ),
            changes(
                "POST",
                f"{one}/identities",
                self._link,
                "Let a user of a header source be this user.",
                UserAnswer,
                body=NewIdentity,
                **edited,
            ),
            changes(
                "DELETE",
                "/identities/{identity}",
                self._unlink,
                "Let a user of a header source (SOURCE:ID) be a user of its own again.",
                None,
                status=204,
            ),
        ]

    def _key_operations(self) -> list[Operation]:
        one = "/keys/{id}"
        of_user = "/users/{user}/keys"
        made = NewKeyAnswer
        return [
            reads("/keys", self._keys, "List the keys of the database.", Page[KeyAnswer], query=KeyQuery),
            changes(
                *("POST", "/keys/find", self._find, "Find keys of this proxy in a text.", FoundKeys),
                body=PastedText,
                roles=READERS,
                query=NoQuery,
                is_change=False,
            ),
            changes(
                *("POST", of_user, self._create_key, "Make a key. It is shown once.", made),
                body=NewKeyFields,
                status=201,
                is_repeatable=True,
            ),
            reads(one, self._key, "Show a key.", KeyAnswer),
            changes(
                *("PATCH", one, self._set_key, "Set the label or the expiry of a key.", KeyAnswer),
                body=KeyChange,
                needs_match=True,
            ),
            changes(
                *("POST", f"{one}/rotate", self._rotate, "Replace a key. The new one is shown once.", made),
                body=Rotation,
                status=201,
                is_repeatable=True,
                needs_match=True,
            ),
            changes(
                *("POST", f"{one}/revoke", self._revoke, "Revoke a key.", KeyAnswer),
                body=Cut,
                needs_match=True,
            ),
        ]

    def _administration(self, request: AdminRequest[Any, Any]) -> DirectoryAdministration:
        return administration_of(request, self._policies, self._database, self._now)

    async def _list(self, request: AdminRequest[UserQuery, None]) -> Page[UserAnswer]:
        query = request.query
        page = await self._administration(request).users(query.paging, text=query.text, group=query.group)
        return Page(tuple(map(_user, page.data)), page.next)

    async def _add(self, request: AdminRequest[ChangeQuery, NewUser]) -> Answer:
        body = request.body
        administration = self._administration(request)
        return _user_answer(
            await administration.add_user(body.id, groups=body.groups, email=body.email, is_service=body.is_service)
        )

    async def _import(self, request: AdminRequest[ChangeQuery, ImportFields]) -> Imported:
        lines = (
            ImportedUser(number, each.id, each.groups, each.email)
            for number, each in enumerate(request.body.users, start=1)
        )
        return await self._administration(request).import_users(lines)

    async def _show(self, request: AdminRequest[NoQuery, None]) -> Answer:
        administration = self._administration(request)
        return _user_answer(await administration.user(administration.resolve(request.path["user"])))

    async def _set(self, request: AdminRequest[ChangeQuery, UserChange]) -> Answer:
        administration, body = self._administration(request), request.body
        user = administration.resolve(request.path["user"])
        return _user_answer(await administration.set_user(user, groups=body.groups, email=body.email))

    async def _disable(self, request: AdminRequest[ChangeQuery, Cut]) -> Answer:
        administration = self._administration(request)
        user = administration.resolve(request.path["user"])
        return _user_answer(await administration.disable_user(user, cut=request.body.cut))

    async def _enable(self, request: AdminRequest[ChangeQuery, None]) -> Answer:
        administration = self._administration(request)
        return _user_answer(await administration.enable_user(administration.resolve(request.path["user"])))

    async def _forget(self, request: AdminRequest[ChangeQuery, None]) -> ForgottenUser:
        administration = self._administration(request)
        return ForgottenUser(await administration.forget(administration.resolve(request.path["user"])))

    async def _link(self, request: AdminRequest[ChangeQuery, NewIdentity]) -> Answer:
        administration, body = self._administration(request), request.body
        user = administration.resolve(request.path["user"])
        return _user_answer(await administration.link(UserId(body.source, body.id), user))

    async def _unlink(self, request: AdminRequest[ChangeQuery, None]) -> None:
        await self._administration(request).unlink(UserId.of_subject(request.path["identity"]))

    async def _keys(self, request: AdminRequest[KeyQuery, None]) -> Page[KeyAnswer]:
        query, administration = request.query, self._administration(request)
        paging = query.paging
        [after] = paging.key(str) or [""]
        owner = None if query.user is None else administration.resolve(query.user)
        records = await administration.keys(owner=owner, text=query.text, after=after, limit=paging.size + 1)
        return paging.page(records, lambda record: (record.key.id,), _key)

    async def _find(self, request: AdminRequest[NoQuery, PastedText]) -> FoundKeys:
        return FoundKeys(tuple(map(_key, await self._administration(request).find_keys(request.body.text))))

    async def _create_key(self, request: AdminRequest[ChangeQuery, NewKeyFields]) -> NewKeyAnswer:
        administration = self._administration(request)
        owner = administration.resolve(request.path["user"])
        new = await administration.create_key(owner, KeyLimits(**request.body.model_dump()))
        return NewKeyAnswer.of(new, request)

    async def _key(self, request: AdminRequest[NoQuery, None]) -> Answer:
        return _key_answer(await self._administration(request).key(request.path["id"]))

    async def _set_key(self, request: AdminRequest[ChangeQuery, KeyChange]) -> Answer:
        body = request.body
        record = await self._administration(request).set_key(
            request.path["id"],
            label=body.label,
            expires_at=body.expires_at,
            never_expires="expires_at" in body.model_fields_set and body.expires_at is None,
        )
        return _key_answer(record)

    async def _rotate(self, request: AdminRequest[ChangeQuery, Rotation]) -> NewKeyAnswer:
        administration = self._administration(request)
        new = await administration.rotate_key(request.path["id"], overlap_ms=request.body.overlap_ms)
        return NewKeyAnswer.of(new, request)

    async def _revoke(self, request: AdminRequest[ChangeQuery, Cut]) -> Answer:
        record = await self._administration(request).revoke_key(request.path["id"], cut=request.body.cut)
        return _key_answer(record)


def administration_of(
    request: AdminRequest[Any, Any],
    policies: Policies[Snapshot],
    database: DirectoryDatabase,
    now: Callable[[], int],
) -> DirectoryAdministration:
    """What makes the changes of users and keys of a request. `now` gives ms since 1970."""
    snapshot = policies.current
    return DirectoryAdministration(
        request.changes(database, now),
        snapshot.file,
        group_names=tuple(snapshot.policy.groups),
        source_names=snapshot.source_names,
        file_group_names=tuple(policies.file.policy.groups),
    )


async def visible_user(
    request: AdminRequest[Any, Any], administration: DirectoryAdministration, identity: UserId
) -> UserRecord:
    """This user. Raises NotFound, also if a manager asks for a user of none of its groups, with the same text."""
    if request.groups is None:
        return await administration.user(identity)
    try:
        user = await administration.user(identity)
    except NotFound:
        user = None
    # Whoever manages everyone or default may see all, because they apply without being listed.
    if user is None or {*user.groups, EVERYONE, DEFAULT}.isdisjoint(request.groups):
        raise NotFound("user", f"there is no user {identity.subject} in your groups")
    return user


def _user(record: UserRecord) -> UserAnswer:
    return UserAnswer(**record.as_json())


def _user_answer(record: UserRecord) -> Answer:
    return Answer(_user(record), etag=record.etag)


def _key(record: KeyRecord) -> KeyAnswer:
    return KeyAnswer(**record.as_json())


def _key_answer(record: KeyRecord) -> Answer:
    return Answer(_key(record), etag=record.etag)
