"""Identifies who sent a request: a user, or an admin.

Keys are known by their SHA-256 only. The digest is looked up as a whole, so the time that this takes says nothing
about the key. All unknown keys get the same answer, so a client that tries keys does not learn that a part of one was
right.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from proxy.config.loader import Config
from proxy.config.values import digest
from proxy.errors import InvalidKey
from proxy.identity.directory import Directory, FileDirectory
from proxy.identity.keys import presented_key
from proxy.logs import LoggedCalls
from proxy.policy.catalog import Catalog
from proxy.policy.policy import Policy

Headers = Iterable[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request: the user's name and groups, and how the user was identified.

    `source` is "key". `key` is the digest of the key that the request carries.
    """

    user: str
    groups: tuple[str, ...]
    key: str = field(repr=False)
    source: str


class Authentication:
    """Finds the user, or the admin, that a request comes from.

    `admin_keys` are the names of the admins by the digests of their keys.
    """

    def __init__(self, directory: Directory, admin_keys: Mapping[str, str]) -> None:
        self._directory = directory
        self._admin_keys = admin_keys

    async def identify(self, headers: Headers, peer: str | None) -> Caller:
        """The user whose key is in these headers. Raises InvalidKey.

        `peer` is the IP address that the connection comes from. Keys are accepted from every address.
        """
        key = digest(presented_key(headers))
        name = await self._directory.key_owner(key)
        user = None if name is None else await self._directory.user(name)
        if user is None:
            raise InvalidKey(
                "This API key is not known here. Use the key you were given for this proxy, not one of the "
                "upstream's."
            )
        return Caller(user.name, user.groups, key, source="key")

    async def identify_admin(self, headers: Headers, peer: str | None) -> str:
        """The name of the admin whose key is in these headers. Raises InvalidKey."""
        name = self._admin_keys.get(digest(presented_key(headers)))
        if name is None:
            raise InvalidKey("This is not an admin key of this proxy. Use a key that is listed under `admin_keys`.")
        return name


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything from one version of the file that a request needs.

    A reload replaces it as a whole. A request reads it once, so it never has a user of the old file and the policy of
    the new one. Example: one edit moves bob from `staff` to `lab` and removes `staff`. The new policy does not have
    the group of the old bob.
    """

    policy: Policy
    catalog: Catalog
    authentication: Authentication
    logged_calls: LoggedCalls = "all"

    @classmethod
    def of(cls, config: Config) -> "Snapshot":
        """The snapshot of a valid file."""
        authentication = Authentication(FileDirectory(config.users), config.admin_keys)
        return cls(config.policy, config.catalog, authentication, config.log.calls)
