"""Users and keys as administrators see them, and as they write them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from proxy.administration.change import etag_of
from proxy.identity.database import key_of, user_of
from proxy.identity.directory import UserId
from proxy.policy.key import Key


@dataclass(frozen=True, slots=True)
class UserRecord:
    """A user as administrators see it. `linked` are the identities of other sources that are this user."""

    identity: UserId
    groups: tuple[str, ...]
    email: str | None = None
    is_service: bool = False
    created_at: int | None = None
    created_by: str | None = None
    disabled_at: int | None = None
    forgotten_at: int | None = None
    linked: tuple[UserId, ...] = ()

    @property
    def etag(self) -> str:
        """Changes whenever an administrator changes the user."""
        return etag_of(self.as_json())

    def as_json(self) -> dict[str, Any]:
        """The members, for output. Instants are in ms since 1970."""
        return {
            "user": self.identity.subject,
            "source": self.identity.source,
            "id": self.identity.id,
            "groups": list(self.groups),
            "email": self.email,
            "is_service": self.is_service,
            "created_at": self.created_at,
            "created_by": self.created_by,
            "disabled_at": self.disabled_at,
            "forgotten_at": self.forgotten_at,
            "linked": [identity.subject for identity in self.linked],
        }


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as administrators see it.

    `used_at` is when it was last used, to the minute, and `used_from` the client's address; None: never, or unknown.
    """

    key: Key
    owner: UserId
    created_at: int | None = None
    created_by: str | None = None
    used_at: int | None = None
    replaced_by: str | None = None
    used_from: str | None = None

    @property
    def etag(self) -> str:
        """Changes whenever an administrator changes the key, and not when it is used."""
        members = {**self.as_json(), "used_at": None}
        del members["used_from"]  # an older release, which has none, must make the same
        return etag_of(members)

    def as_json(self) -> dict[str, Any]:
        """The members, for output. Instants are in ms since 1970."""
        key = self.key
        return {
            "id": key.id,
            "user": self.owner.subject,
            "label": key.label,
            "groups": None if key.groups is None else list(key.groups),
            "models": None if key.models is None else list(key.models.texts),
            "networks": [str(network) for network in key.networks],
            "tag": key.tag,
            "takes_tag_header": key.takes_tag_header,
            "expires_at": key.expires_at,
            "revoked_at": key.revoked_at,
            "used_at": self.used_at,
            "used_from": self.used_from,
            "created_at": self.created_at,
            "created_by": self.created_by,
            "replaced_by": self.replaced_by,
        }


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a new key is to narrow, as a person writes it; see `policy.key.Key`."""

    label: str = ""
    groups: Sequence[str] = ()
    models: Sequence[str] = ()
    networks: Sequence[str] = ()
    expires_at: int | None = None
    tag: str = ""
    takes_tag_header: bool = False


@dataclass(frozen=True, slots=True)
class ImportedUser:
    """One line of an import. `line` is its number in the file.

    None leaves the groups or the e-mail address of a user who is there as they are, and an empty one removes them.
    """

    line: int
    id: str
    groups: tuple[str, ...] | None = None
    email: str | None = None


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did, or would do: the ids of users who were added, changed, and already as they should be."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()


def audit_name(identity: UserId) -> str:
    """The name of a user in the audit log: always with the source, because a group can have the name of a user."""
    return f"{identity.source}:{identity.id}"


def user_record(row: sa.Row[Any]) -> UserRecord:
    """The user in a row of `users`, without its links."""
    user = user_of(row)
    return UserRecord(
        identity=user.identity,
        groups=user.groups,
        email=row.email,
        is_service=row.is_service,
        created_at=row.created_at,
        created_by=row.created_by,
        disabled_at=row.disabled_at,
        forgotten_at=row.forgotten_at,
    )


def key_record(row: sa.Row[Any]) -> KeyRecord:
    """The key in a row of `api_keys`."""
    owner = UserId(row.user_source, row.user_id)
    made = (row.created_at, row.created_by)
    return KeyRecord(key_of(row), owner, *made, row.used_at, row.replaced_by, row.used_from)
