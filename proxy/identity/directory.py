"""The users: which groups a user is in, and which user a key belongs to.

A directory is asked for one user at a time, and never lists all of them. Its methods are async because users can also
be in a database.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from proxy.config.loader import FileUser


@dataclass(frozen=True, slots=True)
class User:
    """A user. `groups` are in the policy's order, without `everyone` and `default`."""

    name: str
    groups: tuple[str, ...] = ()


class Directory(Protocol):
    """Where users are found."""

    async def user(self, name: str) -> User | None:
        """The user of this name; None if there is none."""

    async def key_owner(self, digest: str) -> str | None:
        """The name of the user whose key has this digest; None if there is no such key."""


class FileDirectory:
    """The users of quotas.yaml."""

    def __init__(self, users: Iterable[FileUser]) -> None:
        self._users: dict[str, User] = {}
        self._owners: dict[str, str] = {}
        for user in users:
            self._users[user.name] = User(user.name, user.groups)
            self._owners.update(dict.fromkeys(user.key_digests, user.name))

    async def user(self, name: str) -> User | None:
        """The user of this name; None if there is none."""
        return self._users.get(name)

    async def key_owner(self, digest: str) -> str | None:
        """The name of the user whose key has this digest; None if there is no such key."""
        return self._owners.get(digest)
