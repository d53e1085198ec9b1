"""Identifies the user who sent a request; `admins` does so for admins.

Keys are known by their SHA-256 only. The digest is looked up as a whole, so the time that this takes says nothing
about the key. All keys that are not valid get the same answer, so a client that tries keys does not learn that one
was right once, or is right elsewhere. The log says which of these it was.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from proxy.config.loader import Config, HeaderSource
from proxy.config.values import digest, is_email
from proxy.errors import InvalidKey, InvalidRequest
from proxy.identity.client_address import parse_address
from proxy.identity.directory import FILE, Directory, FileDirectory, OwnedKey, User, UserId
from proxy.identity.header_sources import SentUser, is_from, refused, sent_user
from proxy.identity.keys import PREFIX, Headers, id_of, presented_key
from proxy.logs import LoggedCalls
from proxy.policy.admin import Admin
from proxy.policy.amounts import Uses
from proxy.policy.binding import Binding, BoundQuotas
from proxy.policy.catalog import Catalog, MatchedName, Model
from proxy.policy.key import TAG_CHARACTERS_MAX, Key
from proxy.policy.policy import DEFAULT, EVERYONE, Policy


class Caller(NamedTuple):
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
    """Finds the user that a request comes from.

    `file` has the users of the configuration, and `directory` those of the database. `group_names` are the policy's,
    in its order. `sources` say in headers who the user is. `now` gives ms since 1970.
    """

    def __init__(
        self,
        file: FileDirectory,
        directory: Directory,
        *,
        group_names: Iterable[str],
        now: Callable[[], int],
        sources: "HeaderSources | None" = None,
    ) -> None:
        self._file = file
        self.directory = directory
        # Nobody is put into the reserved groups, also by the database: they apply to all.
        self._group_names = tuple(name for name in group_names if name not in (EVERYONE, DEFAULT))
        self._now = now
        self._sources = sources or HeaderSources()

    async def identify(self, headers: Headers, peer: str | None, address: str | None) -> Caller:
        """The user whose key is in these headers, or whom a header source names.

        `peer` is the IP address that the connection comes from, and `address` the client's own: they differ behind a
        trusted proxy. Raises InvalidKey, DirectoryUnavailable, or InvalidRequest for a bad `X-Quota-Tag`.
        """
        text = presented_key(headers)
        hashed = digest(text)
        source = self._sources.with_key(hashed, headers, peer)
        if source is not None:
            return await self._identify_at(source, headers)
        of_file = self._file.key(hashed)
        key, owner = of_file or await self._key_of_database(text, hashed)
        reason = key.why_invalid(self._now(), parse_address(address) if key.networks else None)
        if reason is not None:
            raise _invalid_key(reason)
        user = self._file.user(owner.id) if owner.source == FILE else await self.directory.user(owner)
        if user is None or user.is_disabled:
            raise _invalid_key("no such user" if user is None else "user disabled")
        caller = self._caller(user, key, headers)
        if key.groups is not None and not set(key.groups) & set(caller.groups):
            raise _invalid_key("its user is in none of its groups")
        if of_file is None:
            self.directory.note_used(key, address)
        return caller

    async def _identify_at(self, source: HeaderSource, headers: Headers) -> Caller:
        """The user whom a header source names: a linked user, or one of its own with the groups that it gives."""
        sent = sent_user(source, headers, self._now())
        identity = UserId(source.name, sent.id)
        user = self._linked_in_file(source, sent) or await self._user_of(source, identity, sent)
        if user.is_disabled:
            raise refused("user disabled")
        if user.identity == identity:
            given = sent.groups or ({source.unmapped} if source.unmapped else set())
            user = replace(user, groups=(*user.groups, *given))
        return self._caller(user, source.key, headers)

    def _linked_in_file(self, source: HeaderSource, sent: SentUser) -> User | None:
        """The user of the file that is this one of the source: by an address if it has that form, else by its id.

        An id in the form of an address is none where the source also sends addresses: users may choose their ids.
        """
        sends_email = source.email if source.signed is None else source.signed.email
        if not is_email(sent.id) or sends_email is None:
            by_id = self._file.linked(UserId(source.name, sent.id))
            if by_id is not None:
                return by_id
        if source.emails_verified and sent.email is not None and is_email(sent.email):
            return self._file.linked(UserId(source.name, sent.email))
        return None

    async def _user_of(self, source: HeaderSource, identity: UserId, sent: SentUser) -> User:
        """The user of the database: of the source itself, or the one to whom an administrator linked it."""
        if sent.groups or source.unmapped:
            user = await self.directory.seen_user(identity, sent.email, users_max=source.users_max)
            if user is None:
                raise refused("the source has users_max users")
        else:
            # Only who may call is added. An administrator can have given groups to the user, or have linked it.
            user = await self.directory.user(identity)
            if user is None or (user.identity == identity and not user.groups):
                raise refused("no group of the user is in map")
        if user.identity.source != FILE:
            return user
        of_file = self._file.user(user.identity.id)
        if of_file is None:
            raise refused("no such user")
        return of_file

    def _caller(self, user: User, key: Key, headers: Headers) -> Caller:
        groups = tuple([name for name in self._group_names if name in user.groups])
        tag = _sent_tag(key, headers) if key.takes_tag_header else key.tag
        return Caller(user.identity.subject, groups, key, user.identity.source, tag)

    async def _key_of_database(self, text: str, hashed: str) -> OwnedKey:
        found = None
        if text.startswith(PREFIX):
            # The checksum first: a key with a typing error costs no query.
            if id_of(text) is None:
                raise _invalid_key("malformed")
            found = await self.directory.key(hashed)
        if found is None:
            raise _invalid_key("unknown")
        return found


class HeaderSources:
    """The header sources by their keys. `on_ignored` is told why headers of a source do not count in a request."""

    def __init__(
        self, sources: Iterable[HeaderSource] = (), *, on_ignored: Callable[[str], object] = lambda _: None
    ) -> None:
        self._by_digest = {source.digest: source for source in sources}
        self._header_names = frozenset(name for each in self._by_digest.values() for name in each.header_names)
        self._on_ignored = on_ignored

    def with_key(self, digest: str, headers: Headers, peer: str | None) -> HeaderSource | None:
        """The source with the key of this digest, which sent this request; None if it is the key of somebody else.

        Raises InvalidKey if the request has the key of a source and does not come from its networks.
        """
        found = self._by_digest.get(digest)
        if found is not None and is_from(found, parse_address(peer)):
            return found
        if self._header_names and any(name in headers for name in self._header_names):
            self._on_ignored("other_key" if found is None else "other_address")
        if found is not None:
            # The same answer as for an unknown key: who has the key elsewhere does not learn that it is right.
            raise _invalid_key("wrong network")
        return None


def _sent_tag(key: Key, headers: Headers) -> str:
    """The tag in `X-Quota-Tag`, or that of the key if the request has none."""
    sent = [value.strip(" \t") for value in headers.getall("x-quota-tag", ())]
    if not any(sent):
        return key.tag
    if len(sent) > 1 or len(sent[0]) > TAG_CHARACTERS_MAX or not sent[0].isprintable():
        raise InvalidRequest(
            f"X-Quota-Tag must be sent once, with at most {TAG_CHARACTERS_MAX} printable characters.",
            param="X-Quota-Tag",
        )
    return sent[0]


def _invalid_key(reason: str) -> InvalidKey:
    text = "This API key is not known here. Use the key you were given for this proxy, not one of the upstream's."
    return InvalidKey(text, reason=reason)


class Terms(NamedTuple):
    """What is in force for the calls of one user to one model at one endpoint.

    `bindings` are by what a call is certain to be counted by.
    """

    model: Model
    is_listed: bool
    bindings: dict[Uses, Binding]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything from one version of the file that a request needs.

    A reload replaces it as a whole, and a request takes everything from one, so it never has a user of the old file
    and the policy of the new one. Example: one edit moves bob from `staff` to `lab` and removes `staff`. The new
    policy does not have the group of the old bob. A call that waits for admission is prepared anew from the new one.
    """

    policy: Policy
    catalog: Catalog
    authentication: Authentication
    logged_calls: LoggedCalls = "all"
    # Admins by the digests of their keys, the users of the file, and the names of the header sources.
    admin_keys: Mapping[str, Admin] = field(default_factory=dict, repr=False)
    file: FileDirectory = field(default_factory=lambda: FileDirectory(()), repr=False)
    source_names: tuple[str, ...] = ()
    # Those that `calls` has found so far. They go with the version, so they are never stale.
    terms: dict[Hashable, Terms] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        config: Config,
        directory: Directory,
        now: Callable[[], int],
        on_ignored_headers: Callable[[str], object] = lambda _: None,
    ) -> "Snapshot":
        """The snapshot of a valid file. `on_ignored_headers` is that of `HeaderSources`."""
        file = FileDirectory(config.users)
        authentication = Authentication(
            file,
            directory,
            group_names=config.policy.groups,
            now=now,
            sources=HeaderSources(config.header_sources, on_ignored=on_ignored_headers),
        )
        return cls(
            config.policy,
            config.catalog,
            authentication,
            config.log.calls,
            admin_keys=config.admin_keys,
            file=file,
            source_names=tuple(source.name for source in config.header_sources),
        )

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
