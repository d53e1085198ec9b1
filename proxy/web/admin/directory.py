"""Users and keys: `/admin/api/users` and `/admin/api/keys`."""

from dataclasses import dataclass

from pydantic import Field

from proxy.administration.pages import Page
from proxy.administration.records import Imported, ImportedUser, KeyLimits, KeyRecord, UserRecord
from proxy.identity.directory import UserId
from proxy.ledger.queries import DAY_MS
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
    creates,
    edits,
    reads,
)
from proxy.web.admin.resource import Resource


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

    @classmethod
    def of(cls, record: UserRecord) -> "UserAnswer":
        """The answer for this user."""
        return cls(**record.as_json())


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

    @classmethod
    def of(cls, record: KeyRecord) -> "KeyAnswer":
        """The answer for this key."""
        return cls(**record.as_json())


@dataclass(frozen=True, slots=True)
class FoundKeys:
    """The keys in a text, without their texts."""

    data: tuple[KeyAnswer, ...]


@dataclass(frozen=True, slots=True)
class ForgottenUser:
    """Under which name the records of a user who was forgotten are kept."""

    pseudonym: str


class Users(Resource):
    """The users of the file and the database, and their keys."""

    def operations(self) -> list[Operation]:
        """The rows."""
        one, key = "/users/{user}", "/keys/{id}"
        return [
            reads("/users", self._list, "List the users."),
            creates("/users", self._add, "Add a user."),
            changes("POST", "/users/import", self._import, "Add or set many users."),
            reads(one, self._show, "Show a user, by its name in records."),
            edits("PATCH", one, self._set, "Set the groups or the e-mail address of a user."),
            edits("POST", f"{one}/disable", self._disable, "Refuse further calls of a user."),
            edits("POST", f"{one}/enable", self._enable, "Let a user call again."),
            edits("POST", f"{one}/forget", self._forget, "Make the records of a user anonymous."),
            edits("POST", f"{one}/identities", self._link, "Let a user of a header source be this user."),
            changes(
                "DELETE",
                "/identities/{identity}",
                self._unlink,
                "Let a user of a header source (SOURCE:ID) be a user of its own again.",
                status=204,
            ),
            reads("/keys", self._keys, "List the keys of the database."),
            changes(
                "POST", "/keys/find", self._find, "Find keys of this proxy in a text.", roles=READERS, is_change=False
            ),
            creates(f"{one}/keys", self._create_key, "Make a key. It is shown once."),
            reads(key, self._key, "Show a key."),
            edits("PATCH", key, self._set_key, "Set the label or the expiry of a key."),
            creates(f"{key}/rotate", self._rotate, "Replace a key. The new one is shown once.", needs_match=True),
            edits("POST", f"{key}/revoke", self._revoke, "Revoke a key."),
        ]

    async def _list(self, request: AdminRequest[UserQuery, None]) -> Page[UserAnswer]:
        query = request.query
        page = await self._directory(request).users(query.paging, text=query.text, group=query.group)
        return Page(tuple(map(UserAnswer.of, page.data)), page.next)

    async def _add(self, request: AdminRequest[ChangeQuery, NewUser]) -> Answer[UserAnswer]:
        body = request.body
        return _user(
            await self._directory(request).add_user(
                body.id, groups=body.groups, email=body.email, is_service=body.is_service
            )
        )

    async def _import(self, request: AdminRequest[ChangeQuery, ImportFields]) -> Imported:
        lines = (
            ImportedUser(number, each.id, each.groups, each.email)
            for number, each in enumerate(request.body.users, start=1)
        )
        return await self._directory(request).import_users(lines)

    async def _show(self, request: AdminRequest[NoQuery, None]) -> Answer[UserAnswer]:
        directory, user = self._user_of(request)
        return _user(await directory.user(user))

    async def _set(self, request: AdminRequest[ChangeQuery, UserChange]) -> Answer[UserAnswer]:
        directory, user = self._user_of(request)
        return _user(await directory.set_user(user, groups=request.body.groups, email=request.body.email))

    async def _disable(self, request: AdminRequest[ChangeQuery, Cut]) -> Answer[UserAnswer]:
        directory, user = self._user_of(request)
        return _user(await directory.disable_user(user, cut=request.body.cut))

    async def _enable(self, request: AdminRequest[ChangeQuery, None]) -> Answer[UserAnswer]:
        directory, user = self._user_of(request)
        return _user(await directory.enable_user(user))

    async def _forget(self, request: AdminRequest[ChangeQuery, None]) -> ForgottenUser:
        directory, user = self._user_of(request)
        return ForgottenUser(await directory.forget(user))

    async def _link(self, request: AdminRequest[ChangeQuery, NewIdentity]) -> Answer[UserAnswer]:
        directory, user = self._user_of(request)
        return _user(await directory.link(UserId(request.body.source, request.body.id), user))

    async def _unlink(self, request: AdminRequest[ChangeQuery, None]) -> None:
        await self._directory(request).unlink(UserId.of_subject(request.path["identity"]))

    async def _keys(self, request: AdminRequest[KeyQuery, None]) -> Page[KeyAnswer]:
        query, directory = request.query, self._directory(request)
        paging = query.paging
        [after] = paging.key(str) or [""]
        owner = None if query.user is None else directory.resolve(query.user)
        records = await directory.keys(owner=owner, text=query.text, after=after, limit=paging.size + 1)
        return paging.page(records, lambda record: (record.key.id,), KeyAnswer.of)

    async def _find(self, request: AdminRequest[NoQuery, PastedText]) -> FoundKeys:
        return FoundKeys(tuple(map(KeyAnswer.of, await self._directory(request).find_keys(request.body.text))))

    async def _create_key(self, request: AdminRequest[ChangeQuery, NewKeyFields]) -> NewKeyAnswer:
        directory, owner = self._user_of(request)
        return NewKeyAnswer.of(await directory.create_key(owner, KeyLimits(**request.body.model_dump())), request)

    async def _key(self, request: AdminRequest[NoQuery, None]) -> Answer[KeyAnswer]:
        return _key(await self._directory(request).key(request.path["id"]))

    async def _set_key(self, request: AdminRequest[ChangeQuery, KeyChange]) -> Answer[KeyAnswer]:
        body = request.body
        record = await self._directory(request).set_key(
            request.path["id"],
            label=body.label,
            expires_at=body.expires_at,
            never_expires="expires_at" in body.model_fields_set and body.expires_at is None,
        )
        return _key(record)

    async def _rotate(self, request: AdminRequest[ChangeQuery, Rotation]) -> NewKeyAnswer:
        new = await self._directory(request).rotate_key(request.path["id"], overlap_ms=request.body.overlap_ms)
        return NewKeyAnswer.of(new, request)

    async def _revoke(self, request: AdminRequest[ChangeQuery, Cut]) -> Answer[KeyAnswer]:
        return _key(await self._directory(request).revoke_key(request.path["id"], cut=request.body.cut))


def _user(record: UserRecord) -> Answer[UserAnswer]:
    return Answer(UserAnswer.of(record), etag=record.etag)


def _key(record: KeyRecord) -> Answer[KeyAnswer]:
    return Answer(KeyAnswer.of(record), etag=record.etag)
