"""The users and their keys: those of the file, and those of the database, which are made at run time.

A user is a source and an id. The sources are `file`, `database`, and each trusted header source of the configuration.
Ids of two sources never mean the same user, so nobody becomes somebody else by a name.
"""

import asyncio
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import structlog

from proxy.config.loader import FileUser
from proxy.errors import DirectoryUnavailable
from proxy.ledger.entry import is_recordable
from proxy.ledger.store import StoreUnavailable
from proxy.policy.key import Key
from proxy.tasks import Tasks

FILE, DATABASE = "file", "database"

# What is remembered of the database, in entries of each kind. A user takes about 1 kB.
_ENTRIES_MAX = 10_000
# How long it is remembered that there is no such key, in seconds.
_UNKNOWN_FOR_S = 1.0
# How long users in memory are identified while the database can't be reached, in seconds.
_TRUSTED_FOR_S = 60.0
# How long a lookup waits for the database, in seconds. After it the caller gets a 503.
_ANSWER_S = 5.0
# How many lookups ask the database at a time. The others wait, so that the polls, changes and the reads of the ledger
# find a connection while many unknown keys are tried.
_LOOKUPS_AT_ONCE = 2

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


class OwnedKey(NamedTuple):
    """A key, and whose it is."""

    key: Key
    owner: UserId


class KeyUse(NamedTuple):
    """When a key was used, in ms to the minute, and the client's address; None: it is not known."""

    at: int
    address: str | None


@dataclass(frozen=True, slots=True)
class Cuts:
    """Which calls in flight are to be ended at once: those of these keys, of these users, and with these ids."""

    key_ids: frozenset[str] = frozenset()
    users: frozenset[UserId] = frozenset()
    call_ids: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.key_ids or self.users or self.call_ids)


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
        self._names: list[str] | None = None  # sorted; only administrators ask for it

    def users_after(self, name: str) -> Iterator[User]:
        """The users in the order of their names, beginning behind this one."""
        if self._names is None:
            self._names = sorted(self._users)
        for index in range(bisect_right(self._names, name), len(self._names)):
            yield self._users[self._names[index]]

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
        """Which calls were to be ended at once by the changes after this version."""

    async def note_used(self, used: Mapping[str, KeyUse]) -> None:
        """Record the last uses of keys, by their ids."""


class Directory:
    """The users and keys of the database, as far as they were asked for lately.

    What is remembered is right as long as the version of the database stays the same. `poll`, which runs once a
    second, forgets everything when it has changed. If the database can't be reached, what is remembered is used for a
    minute more, and who is not remembered gets a 503: a caller who is not known is not the same as one who can't be
    looked up.

    Example of what must not happen: a lookup reads a key, the key is revoked, `poll` sees that and forgets
    everything, and then the result of the lookup is remembered. So a lookup that began before `poll` forgot is not
    remembered, and requests that come later do not wait for it but begin one of their own.

    `clock` gives seconds that only grow, and `now` ms since 1970. `on_cut` is called with whose calls are to be
    ended, and `on_change` with the version before some changes and the one after them. `changes` is how often
    everything was forgotten.
    """

    def __init__(
        self,
        store: DirectoryStore,
        *,
        clock: Callable[[], float],
        now: Callable[[], int],
        on_cut: Callable[[Cuts], object] = lambda _: None,
        on_change: Callable[[int, int], object] = lambda old, new: None,
        entries_max: int = _ENTRIES_MAX,
    ) -> None:
        self._store = store
        self._clock = clock
        self._now = now
        self._on_cut = on_cut
        self._on_change = on_change
        self.changes = 0
        self._version: int | None = None
        self._confirmed_s = clock()
        self._is_away = False
        self._keys: _Memory[OwnedKey] = _Memory(entries_max, clock)
        self._users: _Memory[User] = _Memory(entries_max, clock)
        self._full_until_s: dict[str, float] = {}  # by header sources that have all the users that they may have
        self._used: dict[str, KeyUse] = {}
        self._asking = asyncio.Semaphore(_LOOKUPS_AT_ONCE)
        self._lookups = Tasks()

    @property
    def entries(self) -> dict[str, int]:
        """How many keys and users are remembered."""
        return {"keys": len(self._keys.known), "users": len(self._users.known)}

    @property
    def version(self) -> int | None:
        """The version that `poll` read last; None: it has read none yet."""
        return self._version

    @property
    def confirmed_s(self) -> float:
        """When `poll` last read the version, by `clock`."""
        return self._confirmed_s

    async def poll(self) -> bool:
        """Ask the database whether anything has changed. Raises nothing: an outage is logged once.

        Returns whether the database answered.
        """
        began_s = self._clock()
        try:
            # Not one of the lookups, for which it would have to wait if there are many of them.
            async with asyncio.timeout(_ANSWER_S):
                version = await self._store.version()
                if version != self._version:
                    self.forget_all()
                    # At the first poll there are no calls yet that could be cut.
                    # A version that has gone back was lost in a failover. The one that was read may have cut calls.
                    cuts = (
                        Cuts()
                        if self._version is None
                        else await self._store.cuts_since(min(self._version, version - 1))
                    )
                    if cuts:
                        self._on_cut(cuts)
        except (StoreUnavailable, TimeoutError) as error:
            self._note_outage(error)
            return False
        before, self._version, self._confirmed_s = self._version, version, began_s
        if before is not None and before != version:
            self._on_change(before, version)
        if self._is_away:
            self._is_away = False
            log.info("the directory of users can be read again")
        return True

    def forget_all(self) -> None:
        """Forget what is remembered, after a change."""
        self.changes += 1
        self._keys.clear()
        self._users.clear()
        self._full_until_s.clear()

    async def key(self, digest: str) -> OwnedKey | None:
        """The key with this digest; None if there is none. Raises DirectoryUnavailable."""
        return await self._find(self._keys, digest, lambda: self._store.find_key(digest))

    async def user(self, identity: UserId) -> User | None:
        """This user, or the one that it is linked to; None if there is none. Raises DirectoryUnavailable."""
        if not is_recordable(identity.subject):
            return None
        return await self._find(self._users, identity, lambda: self._store.find_user(identity))

    async def seen_user(self, identity: UserId, email: str | None, *, users_max: int) -> User | None:
        """The user of a header source, who is added if this is the first request.

        None if the source has `users_max` users already, or if records can't have this id. Raises
        DirectoryUnavailable.
        """
        user = await self.user(identity)
        if user is not None or not is_recordable(identity.subject):
            return user
        if self._clock() < self._full_until_s.get(identity.source, 0):
            return None
        user = await self._ask(lambda: self._store.add_seen_user(identity, email, users_max=users_max))
        self._users.unknown.pop(identity, None)
        if user is None:
            # Adding takes the database's lock. Users who are too many must not take it again and again.
            self._full_until_s[identity.source] = self._clock() + _UNKNOWN_FOR_S
        return user

    def note_used(self, key: Key, address: str | None) -> None:
        """Note that a key was used now from this address. `write_used` writes it."""
        self._used[key.id] = KeyUse(self._now() // 60_000 * 60_000, address)

    async def write_used(self) -> None:
        """Write the last uses of keys. What can't be written is tried again by the next run."""
        used, self._used = self._used, {}
        try:
            if used:
                await self._store.note_used(used)
        except StoreUnavailable:
            self._used = used | self._used

    async def close(self) -> None:
        """End the lookups."""
        await self._lookups.finish(0)

    async def _find(self, memory: "_Memory[T]", name: Hashable, find: Callable[[], Awaitable[T | None]]) -> T | None:
        if self._clock() - self._confirmed_s <= _TRUSTED_FOR_S:
            found = memory.get(name)
            if found is not None:
                return found.value
        # All who ask for one name at the same time wait for one query.
        lookup = memory.lookups.get(name)
        if lookup is None:
            work = self._look_up(memory, memory.lookups, name=name, find=find)
            lookup = memory.lookups[name] = self._lookups.start("look up", work)
        found = await asyncio.shield(lookup)  # one of them may be cancelled
        if found is None:
            raise DirectoryUnavailable
        return found.value

    async def _look_up(
        self,
        memory: "_Memory[T]",
        lookups: "dict[Hashable, asyncio.Task[_Found[T] | None]]",
        *,
        name: Hashable,
        find: Callable[[], Awaitable[T | None]],
    ) -> "_Found[T] | None":
        """What the database has, which is remembered; None if it can't be reached.

        `lookups` is where this one was entered. `poll` may forget everything before this begins to run, and then the
        memory has others.
        """
        try:
            value = await self._ask(find)
        except DirectoryUnavailable:
            return None
        finally:
            del lookups[name]
        if lookups is memory.lookups:  # else it may be from before the change
            memory.put(name, value)
        return _Found(value)

    async def _ask(self, find: Callable[[], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(_ANSWER_S), self._asking:
                return await find()
        except (StoreUnavailable, TimeoutError) as error:
            self._note_outage(error)
            raise DirectoryUnavailable from None

    def _note_outage(self, error: Exception) -> None:
        if not self._is_away:
            self._is_away = True
            log.warning("the directory of users can't be read", reason=str(error) or "it did not answer in time")


@dataclass(frozen=True, slots=True)
class _Found(Generic[T]):
    """The result of a lookup. None: there is no such key or user."""

    value: T | None


@dataclass(slots=True)
class _Memory(Generic[T]):
    """What was found lately, at most `entries_max`; the one that was used longest ago goes first.

    `unknown` has what was looked up and not found, until when. It is separate, so that wrong keys displace no right
    ones, however many are tried. `lookups` has the running ones since the last `clear`.
    """

    entries_max: int
    clock: Callable[[], float]
    known: OrderedDict[Hashable, T] = field(default_factory=OrderedDict)
    unknown: dict[Hashable, float] = field(default_factory=dict)
    lookups: "dict[Hashable, asyncio.Task[_Found[T] | None]]" = field(default_factory=dict)

    def get(self, name: Hashable) -> _Found[T] | None:
        value = self.known.get(name)
        if value is not None:
            self.known.move_to_end(name)
            return _Found(value)
        return _Found(None) if self.clock() < self.unknown.get(name, 0) else None

    def put(self, name: Hashable, value: T | None) -> None:
        self.known.pop(name, None)
        self.unknown.pop(name, None)
        if value is not None:
            self.known[name] = value
            if len(self.known) > self.entries_max:
                self.known.popitem(last=False)
            return
        self.unknown[name] = self.clock() + _UNKNOWN_FOR_S
        if len(self.unknown) > self.entries_max:
            del self.unknown[next(iter(self.unknown))]  # the oldest

    def clear(self) -> None:
        self.known.clear()
        self.unknown.clear()
        self.lookups = {}
