"""The users and their keys: those of the file, and those of the database, which are made at run time.

A user is a source and an id. The sources are `file`, `database`, and each trusted header source of the configuration.
Ids of two sources never mean the same user, so nobody becomes somebody else by a name.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import structlog

from proxy.config.loader import FileUser
from proxy.errors import DirectoryUnavailable
from proxy.ledger.store import StoreUnavailable
from proxy.policy.key import Key

FILE, DATABASE = "file", "database"

# What is remembered of the database, in entries of each kind. A user takes about 1 kB.
_ENTRIES_MAX = 10_000
# How long it is remembered that there is no such key, in seconds.
_UNKNOWN_FOR_S = 1.0
# How long users in memory are identified while the database can't be reached, in seconds.
_TRUSTED_FOR_S = 60.0

log = structlog.get_logger("directory")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class UserId:
    """Who a user is: the source that says so, and the id that the user has there."""

    source: str
    id: str

    @property
    def subject(self) -> str:
        """The name of the user in counters and records.

        Names of users of the file have no colon, and neither do names of sources. So no two users have one subject.
        """
        return self.id if self.source == FILE else f"{self.source}:{self.id}"

    @classmethod
    def of_subject(cls, subject: str) -> "UserId":
        """The user with this subject."""
        source, colon, id = subject.partition(":")
        return cls(source, id) if colon else cls(FILE, subject)


@dataclass(frozen=True, slots=True)
class User:
    """A user. `groups` are names of groups, without `everyone` and `default`; the policy may not have all of them."""

    identity: UserId
    groups: tuple[str, ...] = ()
    email: str | None = None
    is_disabled: bool = False


@dataclass(frozen=True, slots=True)
class OwnedKey:
    """A key, and whose it is."""

    key: Key
    owner: UserId


@dataclass(frozen=True, slots=True)
class Cuts:
    """Whose calls in flight are to be ended at once: those of these keys and of these users."""

    key_ids: frozenset[str] = frozenset()
    users: frozenset[UserId] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.key_ids or self.users)


class FileDirectory:
    """The users of quotas.yaml. It is in memory, so its methods do not wait."""

    def __init__(self, users: Iterable[FileUser]) -> None:
        self._users: dict[str, User] = {}
        self._keys: dict[str, OwnedKey] = {}
        self._linked: dict[UserId, User] = {}
        for user in users:
            owner = UserId(FILE, user.name)
            self._users[user.name] = User(owner, user.groups)
            self._linked.update({UserId(*identity): self._users[user.name] for identity in user.identities})
            self._keys.update({digest: OwnedKey(key, owner) for digest, key in user.keys.items()})

    def user(self, name: str) -> User | None:
        """The user of this name; None if there is none."""
        return self._users.get(name)

    def key(self, digest: str) -> OwnedKey | None:
        """The key with this digest; None if there is none."""
        return self._keys.get(digest)

    def linked(self, identity: UserId) -> User | None:
        """The user who is also this user of another source; None if there is none."""
        return self._linked.get(identity)


class DirectoryStore(Protocol):
    """The part of the directory that is in a database; see `identity.database`. Methods raise StoreUnavailable."""

    async def version(self) -> int:
        """The number of changes so far."""

    async def find_key(self, digest: str) -> OwnedKey | None:
        """The key with this digest."""

    async def find_user(self, identity: UserId) -> User | None:
        """This user, or the one that it is linked to."""

    async def add_seen_user(self, identity: UserId, email: str | None, *, users_max: int) -> User | None:
        """The user of a header source who is seen for the first time; None if the source has `users_max` already."""

    async def cuts_since(self, version: int) -> Cuts:
        """Whose calls were to be ended at once by the changes after this version."""

    async def note_used(self, used: Mapping[str, int]) -> None:
        """Record when keys were last used (ms), by their ids."""


class Directory:
    """The users and keys of the database, as far as they were asked for lately.

    What is remembered is right as long as the version of the database stays the same. `poll`, which runs once a
    second, forgets everything when it has changed. If the database can't be reached, what is remembered is used for a
    minute more, and who is not remembered gets a 503: a caller who is not known is not the same as one who can't be
    looked up.

    `clock` gives seconds that only grow, and `now` ms since 1970.
    """

    def __init__(
        self,
        store: DirectoryStore,
        *,
        clock: Callable[[], float],
        now: Callable[[], int],
        on_cut: Callable[[Cuts], object] = lambda _: None,
        entries_max: int = _ENTRIES_MAX,
    ) -> None:
        self._store = store
        self._clock = clock
        self._now = now
        self._on_cut = on_cut
        self._version: int | None = None
        self._confirmed_s = clock()
        self._keys: _Memory[OwnedKey] = _Memory(entries_max, clock)
        self._users: _Memory[User] = _Memory(entries_max, clock)
        self._used: dict[str, int] = {}

    async def poll(self) -> None:
        """Ask the database whether anything has changed. Raises nothing: an outage is logged once."""
        try:
            version = await self._store.version()
            if version != self._version:
                self.forget_all()
                # At the first poll there are no calls yet that could be cut.
                cuts = Cuts() if self._version is None else await self._store.cuts_since(self._version)
                if cuts:
                    self._on_cut(cuts)
        except StoreUnavailable as error:
            log.warning("the directory of users can't be read", reason=str(error))
            return
        self._version, self._confirmed_s = version, self._clock()

    def forget_all(self) -> None:
        """Forget what is remembered, after a change."""
        self._keys.clear()
        self._users.clear()

    async def key(self, digest: str) -> OwnedKey | None:
        """The key with this digest; None if there is none. Raises DirectoryUnavailable."""
        return await self._find(self._keys, digest, lambda: self._store.find_key(digest))

    async def user(self, identity: UserId) -> User | None:
        """This user, or the one that it is linked to; None if there is none. Raises DirectoryUnavailable."""
        return await self._find(self._users, identity, lambda: self._store.find_user(identity))

    async def seen_user(self, identity: UserId, email: str | None, *, users_max: int) -> User | None:
        """The user of a header source, who is added if this is the first request.

        None if the source has `users_max` users already. Raises DirectoryUnavailable.
        """
        user = await self.user(identity)
        if user is None:
            user = await self._ask(lambda: self._store.add_seen_user(identity, email, users_max=users_max))
            self._users.drop(identity)
        return user

    def note_used(self, key: Key) -> None:
        """Note that a key was used now. `write_used` writes it."""
        self._used[key.id] = self._now() // 60_000 * 60_000

    async def write_used(self) -> None:
        """Write when keys were last used, to the minute. What can't be written is tried again by the next run."""
        used, self._used = self._used, {}
        try:
            if used:
                await self._store.note_used(used)
        except StoreUnavailable:
            self._used = used | self._used

    async def _find(self, memory: "_Memory[T]", name: Hashable, find: Callable[[], Awaitable[T | None]]) -> T | None:
        if self._clock() - self._confirmed_s <= _TRUSTED_FOR_S:
            found = memory.get(name)
            if found is not None:
                return found.value
        generation = memory.generation
        value = await self._ask(find)
        if memory.generation == generation:  # else it may be from before the change
            memory.put(name, value)
        return value

    async def _ask(self, find: Callable[[], Awaitable[T]]) -> T:
        try:
            return await find()
        except StoreUnavailable as error:
            log.warning("the directory of users can't be read", reason=str(error))
            raise DirectoryUnavailable from None


@dataclass(slots=True)
class _Remembered(Generic[T]):
    """What was found. Nothing (None) is remembered until `until_s`."""

    value: T | None
    until_s: float


@dataclass(slots=True)
class _Memory(Generic[T]):
    """What was found lately, at most `entries_max`; the one that was used longest ago goes first."""

    entries_max: int
    clock: Callable[[], float]
    generation: int = 0
    found: OrderedDict[Hashable, _Remembered[T]] = field(default_factory=OrderedDict)

    def get(self, name: Hashable) -> _Remembered[T] | None:
        remembered = self.found.get(name)
        if remembered is None or (remembered.value is None and remembered.until_s <= self.clock()):
            return None
        self.found.move_to_end(name)
        return remembered

    def put(self, name: Hashable, value: T | None) -> None:
        self.found[name] = _Remembered(value, self.clock() + _UNKNOWN_FOR_S)
        self.found.move_to_end(name)
        if len(self.found) > self.entries_max:
            self.found.popitem(last=False)

    def drop(self, name: Hashable) -> None:
        self.found.pop(name, None)

    def clear(self) -> None:
        self.generation += 1
        self.found.clear()
