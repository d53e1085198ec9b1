"""Identifies who sent a request: a user, or an admin.

Keys are known by their SHA-256 only. The digest is looked up as a whole, so the time that this takes says nothing
about the key. All keys that are not valid get the same answer, so a client that tries keys does not learn that one
was right once, or is right elsewhere. The log says which of these it was.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from proxy.config.loader import Config
from proxy.config.values import digest
from proxy.errors import InvalidKey
from proxy.identity.directory import FILE, Directory, FileDirectory, OwnedKey, User, UserId
from proxy.identity.keys import PREFIX, id_of, presented_key
from proxy.logs import LoggedCalls
from proxy.policy.amounts import Uses
from proxy.policy.catalog import Catalog, MatchedName
from proxy.policy.key import Key
from proxy.policy.policy import Policy
from proxy.policy.quota import BoundQuotas

Headers = Iterable[tuple[str, str]]
IpAddress = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request: the user, the user's groups, and the key that the request carries.

    `user` is the subject under which counters and records know the user, and `source` says who identified it.
    `groups` are in the policy's order, without `everyone` and `default`. `tag` is recorded with each call.
    """

    user: str
    groups: tuple[str, ...]
    key: Key
    source: str
    tag: str = ""


class Authentication:
    """Finds the user, or the admin, that a request comes from.

    `file` has the users of the configuration, and `directory` those of the database. `group_names` are the policy's,
    in its order. `admin_keys` are the names of the admins by the digests of their keys. `now` gives ms since 1970.
    """

    def __init__(
        self,
        file: FileDirectory,
        directory: Directory,
        *,
        group_names: Iterable[str],
        admin_keys: Mapping[str, str],
        now: Callable[[], int],
    ) -> None:
        self._file = file
        self._directory = directory
        self._group_names = tuple(group_names)
        self._admin_keys = admin_keys
        self._now = now

    @property
    def changes(self) -> int:
        """How often the directory has noticed a change so far."""
        return self._directory.changes

    async def identify(self, headers: Headers, peer: str | None, address: str | None) -> Caller:
        """The user whose key is in these headers. Raises InvalidKey or DirectoryUnavailable.

        `peer` is the IP address that the connection comes from, and `address` the client's own: they differ behind a
        trusted proxy.
        """
        text = presented_key(headers)
        owned = await self._find_key(text)
        reason = owned.key.why_invalid(self._now(), _address_of(address))
        if reason is not None:
            raise _invalid_key(reason)
        user = await self._find_user(owned.owner)
        if user is None or user.is_disabled:
            raise _invalid_key("no such user" if user is None else "user disabled")
        groups = self._in_order(user.groups)
        if owned.key.groups is not None and not set(owned.key.groups) & set(groups):
            raise _invalid_key("its user is in none of its groups")
        if owned.owner.source != FILE or self._file.key(digest(text)) is None:
            self._directory.note_used(owned.key)
        return Caller(user.identity.subject, groups, owned.key, user.identity.source, owned.key.tag)

    async def identify_admin(self, headers: Headers, peer: str | None) -> str:
        """The name of the admin whose key is in these headers. Raises InvalidKey."""
        name = self._admin_keys.get(digest(presented_key(headers)))
        if name is None:
            text = "This is not an admin key of this proxy. Use a key that is listed under `admin_keys`."
            raise InvalidKey(text, reason="no admin key")
        return name

    async def _find_key(self, text: str) -> OwnedKey:
        hashed = digest(text)
        found = self._file.key(hashed)
        if found is None and text.startswith(PREFIX):
            # The checksum first: a key with a typing error costs no query.
            if id_of(text) is None:
                raise _invalid_key("malformed")
            found = await self._directory.key(hashed)
        if found is None:
            raise _invalid_key("unknown")
        return found

    async def _find_user(self, identity: UserId) -> User | None:
        return self._file.user(identity.id) if identity.source == FILE else await self._directory.user(identity)

    def _in_order(self, groups: Iterable[str]) -> tuple[str, ...]:
        """Those of the groups that the policy has, in its order."""
        return tuple(name for name in self._group_names if name in groups)


def _invalid_key(reason: str) -> InvalidKey:
    text = "This API key is not known here. Use the key you were given for this proxy, not one of the upstream's."
    return InvalidKey(text, reason=reason)


def _address_of(text: str | None) -> IpAddress | None:
    try:
        # Without the zone of a link-local address, as in fe80::1%eth0.
        return None if text is None else ip_address(text.partition("%")[0])
    except ValueError:
        return None


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
    def of(cls, config: Config, directory: Directory, now: Callable[[], int]) -> "Snapshot":
        """The snapshot of a valid file."""
        authentication = Authentication(
            FileDirectory(config.users),
            directory,
            group_names=config.policy.groups,
            admin_keys=config.admin_keys,
            now=now,
        )
        return cls(config.policy, config.catalog, authentication, config.log.calls)

    def may_use(self, caller: Caller, model: MatchedName) -> bool:
        """Whether the caller may use this model: the user may, and the key does not exclude it."""
        key = caller.key
        if key.models is not None and not key.models.match(model):
            return False
        # Both: the groups of the key alone may have no list of models, where the user's other groups have one.
        narrowed = key.groups is None or self.policy.may_use(narrowed_groups(caller), model)
        return narrowed and self.policy.may_use(caller.groups, model)

    def binding(
        self, caller: Caller, model: MatchedName, certain: Uses = Uses.INPUT_AND_OUTPUT
    ) -> BoundQuotas | None:
        """The quotas that bind the caller on this model; None if none of the groups that count covers it.

        They are found by all groups of the user, and then the key narrows them. If only the groups of the key were
        looked at, `default` could apply to a model that another group of the user limits.
        """
        bound = self.policy.binding(caller.groups, model, certain)
        return bound if bound is None or caller.key.groups is None else bound.narrowed(narrowed_groups(caller))

    def serves(self, caller: Caller, model: str) -> bool:
        """Whether the caller can call this model: it exists, the caller may use it, and a binding covers it."""
        found = self.catalog.model(model)
        if found is None or not self.may_use(caller, found.matched_name):
            return False
        return self.binding(caller, found.matched_name) is not None


def narrowed_groups(caller: Caller) -> tuple[str, ...]:
    """The groups of the user that may admit calls with this key."""
    only = caller.key.groups
    return caller.groups if only is None else tuple(name for name in caller.groups if name in only)
