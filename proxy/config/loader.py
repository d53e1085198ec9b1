"""Loads quotas.yaml into a policy and settings, or raises one report of every mistake.

A file is checked in two phases. Phase 1, `document`, parses the YAML and goes on after a mistake wherever it can.
Phase 2 checks the plain data twice: `messages` validates the shape of each section, and the functions below check
names and keys across sections (a group that does not exist, a key that two users have).

The second check reads the plain data and not the validated `File`, because there is no `File` if any value is wrong:
a typing error in one quota would hide a user's misspelled group until the next run.

A value with a mistake in phase 1 gets none in phase 2. For `tokens: no`, phase 1 says that some parsers read `no` as
false; that it is not a number either would be a second text about the same error.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from zoneinfo import ZoneInfo

from proxy.config import values
from proxy.config.catalog import catalog_of
from proxy.config.document import BYTES_MAX, Diagnostic, Document, Finding, KeyPath, Node, read_document
from proxy.config.interpolation import Interpolator, ReadFile
from proxy.config.messages import finding_at, foreign_file, read_file
from proxy.config.schema import AdminKey as AdminKeySection
from proxy.config.schema import File, MappedGroup, UserKey
from proxy.config.schema import Group as GroupSection
from proxy.config.schema import HeaderSource as HeaderSourceSection
from proxy.config.schema import Quota as QuotaSection
from proxy.config.schema import SignedHeader as SignedHeaderSection
from proxy.config.schema import User as UserSection
from proxy.config.suggestions import did_you_mean
from proxy.logs import LogFormat, LoggedCalls
from proxy.policy.admin import GRANT_UP_TO, Admin
from proxy.policy.catalog import Catalog, Secret
from proxy.policy.key import Key, Network
from proxy.policy.policy import DEFAULT, EVERYONE, Group, Keep, Policy
from proxy.policy.quota import Globs, Quota
from proxy.policy.windows import WEEKDAYS, parse_per

# The id of a key of the file is the beginning of its digest: 32 of 256 bits of a hash reveal nothing.
_KEY_ID_DIGITS = 8
_REFUSE = "refuse"  # the value of `unmapped` that is no group
MISTAKES_SHOWN = 100
_NAMES_SHOWN = 10
_UNVERIFIED = (
    "this is an e-mail address, and whoever can enter another one at the source would be somebody else; {what}, or "
    "emails_verified: true if the source verifies them"
)
_ONLY_A_ROUTE = '"*" only says which upstream other names go to; remove this, or list the model by its name'


class BadConfig(Exception):
    """The file has mistakes. The exception's text is the report: a line for each of the first 100, sorted by line."""

    def __init__(self, mistakes: Iterable[Diagnostic]) -> None:
        self.mistakes = tuple(sorted(set(mistakes)))
        more = len(self.mistakes) - MISTAKES_SHOWN
        lines = [str(mistake) for mistake in self.mistakes[:MISTAKES_SHOWN]]
        super().__init__("\n".join([*lines, f"and {more} more"] if more > 0 else lines))


@dataclass(frozen=True, slots=True)
class Address:
    """Where a listener listens. An IPv6 host has no brackets; port 0 lets the system choose one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many connections a listener keeps open, and how long it waits for slow clients."""

    connections: int = 4000
    connections_per_address: int | None = None  # of one client address; None: as many as `connections`
    head_s: float = 10.0  # from the first to the last byte of a request's head
    idle_s: float = 75.0  # between two requests, and before the first
    # A body may take body_s, and a second more for every body_bytes_per_s bytes that have arrived. So a body of
    # 32 MiB has 30 + 512 = 542 s, just enough for a client that sends half a megabit per second (537 s).
    body_s: float = 30.0
    body_bytes_per_s: int = 65_536
    # An answer, or what is left of it, of which a client reads less than 16 KiB in this time is given up. For a
    # streamed answer, `web.response` has the same limit for each write.
    unread_s: float = 60.0
    # A stream without output sends a heartbeat after this time. Load balancers close idle connections after 60 s.
    heartbeat_s: float = 15.0
    # For all large bodies of a process together; see `web.body_memory`.
    body_memory_bytes: int = 256_000_000


@dataclass(frozen=True, slots=True)
class Settings:
    """What takes effect only at a restart. `admin` is None if that listener is off; `cors` has origins, or "*".

    `api_url` and `admin_url` are the origins at which clients reach the listeners; `admin_hosts` are further names of
    the admin listener. `prefix` is what all paths of the API begin with, such as /llm; empty: nothing.

    Three are options of `serve` instead. The hidden `--lease` sets `lease_ms`; None means the ledger's default.
    `--new-database` sets `may_be_new_database`: a database that is gone is made anew. `--no-migrate` clears
    `migrates`: the schema is only checked.
    """

    api: Address
    admin: Address | None
    database: str = field(repr=False)
    cors: tuple[str, ...] = ()
    connection_limits: ConnectionLimits = ConnectionLimits()
    trusted_proxies: tuple[Network, ...] = ()
    api_url: str | None = None
    admin_url: str | None = None
    admin_hosts: tuple[str, ...] = ()
    prefix: str = ""
    shutdown_delay_s: float = 5.0
    lease_ms: int | None = None
    may_be_new_database: bool = False
    migrates: bool = True


@dataclass(frozen=True, slots=True)
class LogSettings:
    """The format of the log, and which requests get a line in it."""

    format: LogFormat = "json"
    calls: LoggedCalls = "all"


@dataclass(frozen=True, slots=True)
class FileUser:
    """A user of the file. `groups` are in the order of the file's groups, without `everyone` and `default`.

    That order, and not the one in which the user lists them, decides through which group a call is admitted.
    `identities` are the users of header sources who are this user, each as its source and its id there.
    """

    name: str
    groups: tuple[str, ...] = ()
    keys: Mapping[str, Key] = field(default_factory=dict, repr=False)  # by their digests
    identities: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class SignedHeader:
    """A header with a signed token; `user`, `email` and `groups` are the claims to read (None: there is none)."""

    header: str
    secret: Secret
    issuer: str
    user: str = "sub"
    email: str = "email"
    groups: str | None = None


@dataclass(frozen=True, slots=True)
class HeaderSource:
    """A user interface or proxy in front that says in headers who the user is.

    Its requests carry its own `key`, which has its name, and come from `networks`; none: from everywhere. `user`,
    `email` and `groups` are names of headers, in lower case. `map` has the policy's group for each group of the
    source, or e-mail address, that counts. `unmapped` is the group of users to whom no entry applies; None: they are
    refused.
    """

    key: Key
    digest: str = field(repr=False)  # of the key
    networks: tuple[Network, ...] = ()
    user: str | None = None
    email: str | None = None
    groups: str | None = None
    map: Mapping[str, str] = field(default_factory=dict)
    unmapped: str | None = None
    users_max: int = 1000
    emails_verified: bool = False
    signed: SignedHeader | None = None

    @property
    def name(self) -> str:
        """The source of its users, in `UserId` and in the log."""
        return self.key.id

    @property
    def header_names(self) -> tuple[str, ...]:
        """The headers that it may send, in lower case."""
        signed = self.signed.header if self.signed else None
        return tuple(name for name in (self.user, self.email, self.groups, signed) if name is not None)

    @property
    def mapped_groups(self) -> tuple[str, ...]:
        """The groups in which its users can be by what it sends, each once."""
        unmapped = () if self.unmapped is None else (self.unmapped,)
        return tuple(dict.fromkeys((*self.map.values(), *unmapped)))


@dataclass(frozen=True, slots=True)
class Config:
    """A valid file: what each of its sections says, and the document, which knows the line of each value.

    `admin_keys` are the admins by the digests of their keys. Weeks start on `week_starts` (0 is Monday).
    """

    settings: Settings
    policy: Policy
    catalog: Catalog
    users: tuple[FileUser, ...]
    admin_keys: Mapping[str, Admin] = field(repr=False)
    document: Document
    log: LogSettings = LogSettings()
    header_sources: tuple[HeaderSource, ...] = ()
    week_starts: int = 0

    @property
    def restart_only(self) -> Mapping[str, object]:
        """The sections that a reload does not change, by name, for comparison with those in force."""
        settings = self.settings
        server = replace(settings, database="", lease_ms=None, may_be_new_database=False, migrates=True)
        return {"server": server, "database": settings.database}


def load(path: str, environ: Mapping[str, str], read_bytes: ReadFile | None = None) -> Config:
    """Load the file at `path`, with `${NAME}` from `environ`. Raises BadConfig."""
    read_bytes = read_bytes or read_capped
    return _load(read_source(path, read_bytes), path, Interpolator(environ, read_bytes))


def read_source(path: str, read_bytes: ReadFile) -> bytes:
    """The bytes of the file at `path`. Raises BadConfig."""
    try:
        return read_bytes(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a valid path"
        text = f"the file can't be read ({reason}); check its path and its permissions"
        raise BadConfig([Diagnostic(path, 1, text)]) from None


def load_text(
    text: str,
    name: str = "quotas.yaml",
    *,
    environ: Mapping[str, str] | None = None,
    read_bytes: ReadFile | None = None,
) -> Config:
    """Load YAML from a string. `name` is the file name in the report. Raises BadConfig."""
    source = text.encode("utf-8", "surrogatepass")
    return _load(source, name, Interpolator(environ or {}, read_bytes or read_capped))


def read_capped(path: str) -> bytes:
    """A file's content, at most BYTES_MAX + 1 bytes, so that a device such as /dev/zero ends as too large."""
    with open(path, "rb") as file:
        return file.read(BYTES_MAX + 1)


# Numbers that differ when a file was written or replaced. None: there is no file.
Fingerprint = tuple[int, ...] | None


class ConfigFile:
    """The file at `path` and those that its `${file:…}` and `ca` name. Knows which have changed since the last load.

    A path is looked up anew each time. So a symbolic link that now leads to another file is a change, also one in the
    middle of the path: this is how Kubernetes replaces the files of a mounted secret.
    """

    def __init__(self, path: str, environ: Mapping[str, str]) -> None:
        self._path = path
        self._environ = environ
        self._loaded: Mapping[str, Fingerprint] = {}

    def load(self) -> Config:
        """Load the file. Raises BadConfig."""
        loaded: dict[str, Fingerprint] = {}

        def read(path: str) -> bytes:
            # Before the file is read, and for a file that is named twice before it is read for the first time. So a
            # change in between is found by the next check.
            if path not in loaded:
                loaded[path] = _fingerprint(path)
            return read_capped(path)

        try:
            return load(self._path, self._environ, read)
        finally:
            self._loaded = loaded

    def changes(self) -> Mapping[str, Fingerprint]:
        """The files that have changed since the last load, valid or not, and their fingerprints now."""
        loaded = self._loaded  # a load in another thread may replace it meanwhile
        found = {path: _fingerprint(path) for path in loaded}
        return {path: now for path, now in found.items() if now != loaded[path]}


def _fingerprint(path: str) -> Fingerprint:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a path that can't exist
        return None
    # The time of the last change of the inode differs even if a tool sets the time of modification to an old one.
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)


def _load(source: bytes, name: str, interpolator: Interpolator) -> Config:
    document = read_document(source, name, interpolator)
    if document.data is None:
        raise BadConfig(document.mistakes)
    if foreign := foreign_file(document.data):
        raise BadConfig([document.locate(foreign)])
    file, findings = checked(document, document.data)
    mistakes = [document.locate(finding) for finding in findings if not document.is_bad(finding.path)]
    if file is None or mistakes or document.mistakes:
        raise BadConfig([*document.mistakes, *mistakes])
    return config_of(file, document, document.data)


def checked(document: Document, data: Mapping[str, object]) -> tuple[File | None, tuple[Finding, ...]]:
    """The validated file, None if its shape has mistakes, and the mistakes of this data of a document."""
    file, findings = read_file(data, document.interpolator.outside)
    return file, (*findings, *_cross_section_findings(document, data))


def config_of(file: File, document: Document, data: Mapping[str, object]) -> Config:
    """The config of a file without mistakes."""
    return Config(
        settings=_settings(file),
        policy=_policy(file, _hash(data)),
        catalog=catalog_of(
            file.upstreams,
            file.models,
            file.default_upstream,
            smallest_answer=file.smallest_answer,
            outside=document.interpolator.outside,
        ),
        users=tuple(_user(name, section, file) for name, section in file.users.items()),
        admin_keys=dict(_admin(name, section) for name, section in file.admin_keys.items()),
        document=document,
        log=LogSettings(file.log.format, file.log.calls),
        header_sources=tuple(_header_source(section) for section in file.identity.headers),
        week_starts=WEEKDAYS.index(file.week_starts),
    )


# ---------------------------------------------------------------------------------------- mistakes across sections


def _cross_section_findings(document: Document, data: Mapping[str, object]) -> Iterator[Finding]:
    nodes = tuple(document.walk())
    yield from _unknown_names(nodes, data)
    yield from _missing_default_upstream(data)
    yield from _duplicate_keys(nodes)
    yield from _keys_without_effect(nodes)
    yield from _foreign_groups_of_keys(data)
    yield from _links(nodes, data)
    yield from _header_sources(data)


def _unknown_names(nodes: Iterable[tuple[KeyPath, Node]], data: Mapping[str, object]) -> Iterator[Finding]:
    """Groups of users, and upstreams of models, that do not exist."""
    groups, upstreams = _mapping(data, "groups"), _mapping(data, "upstreams")
    for path, node in nodes:
        name = _name_or_key(node.value)
        match path:
            case _ if _names_a_group(path) and name in (EVERYONE, DEFAULT):
                remedy = "remove it" if path[0] == "users" else "write another group"
                yield finding_at(path, f'"{name}" applies to users without being listed; {remedy}')
            case _ if _names_a_group(path):
                yield from _unknown("group", path, name, groups)
            case (
                ("default_upstream",)
                | ("models", str(), "upstream")
                | ("models", str(), "upstreams", int(), "upstream")
            ):
                yield from _unknown("upstream", path, name, upstreams)


def _names_a_group(path: KeyPath) -> bool:
    """Whether the value at this path is the name of a group in which users are, or may be."""
    match path:
        case ("users", str(), "groups", int()) | ("users", str(), "keys", int(), "groups", int()):
            return True
        case ("identity", "headers", int(), "map", str()) | ("identity", "headers", int(), "map", str(), "group"):
            return True
        case ("identity", "headers", int(), "unmapped"):
            return True
    return False


def _unknown(kind: str, path: KeyPath, name: str, known: Iterable[str]) -> Iterator[Finding]:
    # A text that can't be a name is already a mistake of its shape, and `refuse` stands for no group.
    if name in known or not values.NAME.fullmatch(name) or (path[-1], name) == ("unmapped", _REFUSE):
        return
    known = [name for name in known if name not in (EVERYONE, DEFAULT)]
    shown = ", ".join(known[:_NAMES_SHOWN])
    hint = did_you_mean(name, known) or f"add it below {kind}s{f', or write one of {shown}' if shown else ''}"
    yield finding_at(path, f'there is no {kind} "{name}"; {hint}')


def _missing_default_upstream(data: Mapping[str, object]) -> Iterator[Finding]:
    """With several upstreams and no default, every model has to say where it goes."""
    upstreams = _mapping(data, "upstreams")
    if len(upstreams) < 2 or "default_upstream" in data:
        return
    if "models" not in data:
        text = f"there are several and no models; write default_upstream: one of {', '.join(upstreams)}"
        yield finding_at(("upstreams",), text)
    for model, section in _mapping(data, "models").items():
        if not _mapping(section).keys() & {"upstream", "upstreams"}:
            text = "there are several upstreams; write upstream or upstreams here, or default_upstream"
            yield finding_at(("models", model), text)


def _duplicate_keys(nodes: Iterable[tuple[KeyPath, Node]]) -> Iterator[Finding]:
    """Keys that two owners have, which would not say who is calling. The key itself is not shown."""
    keys: list[tuple[str, KeyPath, str]] = []
    for path, node in nodes:
        match path:
            case ("admin_keys", str()) | ("admin_keys", str(), "key"):
                keys.append(("an admin", path, _name_or_key(node.value)))
            case ("users", str() as user, "keys", int()) | ("users", str() as user, "keys", int(), "key"):
                keys.append((f"user {user}", path, _name_or_key(node.value)))
            case ("identity", "headers", int(), "key"):
                keys.append(("a header source", path, _name_or_key(node.value)))
    # Admins first and sources last, wherever they are in the file: if an admin and a user have the same key, the
    # user's has to change, and if a user and a source have it, the source's.
    keys.sort(key=lambda item: ("admin_keys", "users", "identity").index(str(item[1][0])))
    owners: dict[str, str] = {}
    for owner, path, key in keys:
        digest = _digest(key)
        if digest in owners:
            yield finding_at(path, f"{owners[digest]} already has this key; write another one")
        elif digest:
            owners[digest] = owner


def _digest(key: str) -> str | None:
    """The digest of a valid key. Digests are compared, so `sha256:…` and the same key in plain text are equal."""
    try:
        return values.key_digest(key)
    except ValueError:
        return None


def _keys_without_effect(nodes: Iterable[tuple[KeyPath, Node]]) -> Iterator[Finding]:
    """Keys that have a valid value and could do nothing."""
    for path, node in nodes:
        match path:
            # "*" covers models of different sizes and names, so only their upstream can be the same for all of them.
            case ("models", "*", str() as key) if key not in ("upstream", "upstreams"):
                yield finding_at(path, _ONLY_A_ROUTE)
            case ("models", "*", "upstreams", int(), "model"):
                yield finding_at(path, _ONLY_A_ROUTE)
            # The quotas of everyone apply in addition to those of other groups, so it can't remove a limit.
            case ("groups", group, "unlimited") if group == EVERYONE and node.value in (True, "true"):
                yield finding_at(
                    path, f"{EVERYONE} only adds limits; write unlimited in {DEFAULT}, or unmatched: allow"
                )


def _foreign_groups_of_keys(data: Mapping[str, object]) -> Iterator[Finding]:
    """Groups of a key in which its owner is not. The key would not admit the owner's calls by them."""
    groups = _mapping(data, "groups")
    for user, section in _mapping(data, "users").items():
        own = [_name_or_key(name) for name in _list(section, "groups")]
        for number, key in enumerate(_list(section, "keys")):
            for index, name in enumerate(map(_name_or_key, _list(key, "groups"))):
                if name in groups and name not in own and name not in (EVERYONE, DEFAULT):
                    path: KeyPath = ("users", user, "keys", number, "groups", index)
                    text = f'{user} is not in "{name}", and a key is only for groups of its owner'
                    shown = ", ".join(own[:_NAMES_SHOWN])
                    yield finding_at(path, f"{text}; {f'write one of {shown}' if shown else 'remove groups'}")


def _links(nodes: Iterable[tuple[KeyPath, Node]], data: Mapping[str, object]) -> Iterator[Finding]:
    """Identities of users in a source that does not exist, by an address that nobody verified, or of two users."""
    sources = {_name_or_key(_mapping(each).get("name")): each for each in _header_sections(data)}
    owners: dict[tuple[str, str], str] = {}
    for path, node in nodes:
        match path:
            case ("users", str() as user, "identities", int()):
                link = _mapping(node.plain())
                source, id = (_name_or_key(link.get(key)) for key in ("source", "id"))
                if source and source not in sources:
                    hint = did_you_mean(source, sources) or "add it to identity.headers"
                    yield finding_at((*path, "source"), f'there is no source "{source}"; {hint}')
                elif source and values.is_email(id) and not _is_true(sources[source], "emails_verified"):
                    yield finding_at((*path, "id"), _UNVERIFIED.format(what="write the user's id there"))
                if (source, id) in owners:
                    text = f"user {owners[source, id]} already has this identity; remove one of the two"
                    yield finding_at(path, text)
                elif source and id:
                    owners[source, id] = user


def _header_sources(data: Mapping[str, object]) -> Iterator[Finding]:
    """Header sources whose name is taken, or that would let in whom nobody meant."""
    names: set[str] = set()
    for number, section in enumerate(_header_sections(data)):
        path: KeyPath = ("identity", "headers", number)
        name = _name_or_key(_mapping(section).get("name"))
        if name and name in names:
            yield finding_at((*path, "name"), f'there is already a source "{name}"; write another name')
        names.add(name)
        if _is_unlimited(data, unmapped := _name_or_key(_mapping(section).get("unmapped"))):
            text = f'"{unmapped}" is unlimited, and all users who are in no other group would be in it'
            yield finding_at((*path, "unmapped"), f"{text}; write another group")
        for outside, group in _mapping(section, "map").items():
            yield from _map_entry((*path, "map", outside), group, section=section, data=data)


def _map_entry(path: KeyPath, entry: object, *, section: object, data: Mapping[str, object]) -> Iterator[Finding]:
    outside = str(path[-1])
    group = _name_or_key(_mapping(entry).get("group") if isinstance(entry, dict) else entry)
    if values.is_email(outside) and not _is_true(section, "emails_verified"):
        yield finding_at(path, _UNVERIFIED.format(what="write a group there"))
    if "," in outside and "signed" not in _mapping(section):
        yield finding_at(path, "the header separates groups by commas, so none can have one; map the group's id")
    if _is_unlimited(data, group) and not _is_true(entry, "allow_unlimited"):
        text = f'"{group}" is unlimited; write {{group: {group}, allow_unlimited: true}} if that is meant'
        yield finding_at(path, text)


def _header_sections(data: Mapping[str, object]) -> list[object]:
    return _list(data.get("identity"), "headers")


def _is_unlimited(data: Mapping[str, object], group: str) -> bool:
    return _is_true(_mapping(data, "groups").get(group), "unlimited")


def _is_true(section: object, key: str) -> bool:
    return _mapping(section).get(key) in (True, "true")


def _list(data: object, key: str) -> list[object]:
    """The list at this key. Empty if there is none, which is another mistake."""
    found = _mapping(data).get(key)
    return found if isinstance(found, list) else []


def _mapping(data: object, *path: str) -> Mapping[str, object]:
    """The mapping at this path. Empty if there is none, which is another mistake."""
    for step in path:
        data = data.get(step) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def _name_or_key(value: object) -> str:
    """A scalar as the text of a name or key. Empty for a value that can be neither, which is another mistake."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


# ----------------------------------------------------------------------------- from the validated file to a policy


def _settings(file: File) -> Settings:
    admin = file.server.admin
    return Settings(
        api=Address(*values.split_address(file.server.api)),
        admin=None if admin is None else Address(*values.split_address(admin)),
        database=file.database,
        cors=tuple(file.server.cors),
        connection_limits=ConnectionLimits(
            connections=file.server.connections,
            connections_per_address=file.server.connections_per_address,
            body_memory_bytes=file.server.body_memory,
        ),
        trusted_proxies=tuple(file.server.trusted_proxies),
        api_url=file.server.api_url,
        admin_url=file.server.admin_url,
        admin_hosts=tuple(file.server.admin_hosts),
        prefix=file.server.prefix or "",
        shutdown_delay_s=file.server.shutdown_delay / 1000,
    )


def _policy(file: File, hash: str) -> Policy:
    zone = ZoneInfo(file.timezone)
    week_starts = WEEKDAYS.index(file.week_starts)
    return Policy(
        groups={name: _group(name, section, zone, week_starts) for name, section in file.groups.items()},
        combine=file.combine,
        unmatched=file.unmatched,
        wait_s=file.wait / 1000,
        ledger_wait_s=file.ledger_wait / 1000,
        retry_for_ms=file.retry_for,
        keep=Keep(calls_ms=file.keep.calls, days_ms=file.keep.days, audit_ms=file.keep.audit),
        zone=zone,
        help=file.help,
        self_service=file.self_service,
        hash=hash,
    )


def _admin(name: str, section: str | AdminKeySection) -> tuple[str, Admin]:
    """The digest of an admin key, and whose it is."""
    if isinstance(section, str):
        return section, Admin(name)
    share = GRANT_UP_TO if section.grant_up_to is None else section.grant_up_to
    return section.key, Admin(name, section.role, tuple(section.groups or ()), share)


def _user(name: str, section: UserSection, file: File) -> FileUser:
    groups = tuple(group for group in file.groups if group in section.groups)
    keys = dict(_key(key, ZoneInfo(file.timezone)) for key in section.keys)
    return FileUser(name, groups, keys, tuple((link.source, link.id) for link in section.identities))


def _key(section: str | UserKey, zone: ZoneInfo) -> tuple[str, Key]:
    """The digest of a key, and what it is limited to."""
    if isinstance(section, str):
        return section, Key(section[:_KEY_ID_DIGITS])
    return section.key, Key(
        section.key[:_KEY_ID_DIGITS],
        label=section.label,
        groups=None if section.groups is None else tuple(section.groups),
        models=None if section.models is None else Globs(section.models),
        networks=tuple(section.networks),
        expires_at=None if section.expires is None else values.expiry_ms(section.expires, zone),
        tag=section.tag,
        takes_tag_header=section.tag_header,
    )


def _header_source(section: HeaderSourceSection) -> HeaderSource:
    user, email, groups = (name and name.lower() for name in (section.user, section.email, section.groups))
    signed = section.signed
    return HeaderSource(
        Key(section.name, section.name, tag=section.tag, takes_tag_header=section.tag_header),
        digest=section.key,
        networks=tuple(section.networks),
        user=user,
        email=email,
        groups=groups,
        map={outside: to.group if isinstance(to, MappedGroup) else to for outside, to in section.map.items()},
        unmapped=None if section.unmapped == _REFUSE else section.unmapped,
        users_max=section.users_max,
        emails_verified=section.emails_verified,
        signed=None if signed is None else _signed_header(signed),
    )


def _signed_header(section: SignedHeaderSection) -> SignedHeader:
    return SignedHeader(
        section.header.lower(),
        section.secret,
        section.issuer,
        user=section.user,
        email=section.email,
        groups=section.groups,
    )


def _group(name: str, section: GroupSection, zone: ZoneInfo, week_starts: int) -> Group:
    quotas = tuple(
        quota_of(name, quota_name, quota, zone=zone, week_starts=week_starts)
        for quota_name, quota in section.quotas.items()
    )
    return Group(name, quotas, Globs(section.models) if section.models else None, section.unlimited)


def quota_of(group: str, name: str, section: QuotaSection, *, zone: ZoneInfo, week_starts: int) -> Quota:
    """The quota of a valid section. Weeks start on `week_starts` (0 is Monday)."""
    return Quota(
        group=group,
        name=name,
        limits=section.limits(),
        per=parse_per(section.per, zone, week_starts),
        models=Globs(section.models),
        shared=section.shared,
        enforce=section.enforce,
        overdraft=section.overdraft,
    )


def _hash(data: Mapping[str, object]) -> str:
    """Twelve hex digits that identify the policy.

    They are equal on all replicas with the same policy: each replica's own `server`, `database` and `log` are left
    out, and so are comments and layout. Interpolated values count, so a new key gives a new hash.
    """
    policy = {key: value for key, value in data.items() if key not in ("server", "database", "log")}
    return hashlib.sha256(json.dumps(policy).encode()).hexdigest()[:12]
