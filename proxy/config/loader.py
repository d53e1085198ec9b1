"""The file as a whole: a policy and the settings, or every mistake in one report.

What is wrong with single values and sections comes from `faults`; here are the mistakes of names that point at each
other: a group that doesn't exist, a key that two users have. They are looked for in the plain data, so that one
report names them too when something else is wrong. A file with any mistake gives no policy.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from zoneinfo import ZoneInfo

from proxy.config import values
from proxy.config.document import BYTES_MAX, Diagnostic, Document, KeyPath, read_document
from proxy.config.interpolation import Interpolator, ReadFile
from proxy.config.messages import Finding, did_you_mean, placed, read_file
from proxy.config.schema import Allow as AllowSection
from proxy.config.schema import File
from proxy.config.schema import Group as GroupSection
from proxy.config.schema import Model as ModelSection
from proxy.policy.policy import DEFAULT, EVERYONE, Allow, Group, Keep, Model, Policy, Upstream, User
from proxy.policy.quota import Globs, Quota
from proxy.policy.windows import WEEKDAYS, parse_per

_MISTAKES_SHOWN = 100


class BadConfig(Exception):
    """The file can't be taken. Its text is the whole report, a line for each mistake."""

    def __init__(self, mistakes: Iterable[Diagnostic]) -> None:
        self.mistakes = tuple(sorted(set(mistakes)))
        more = len(self.mistakes) - _MISTAKES_SHOWN
        lines = [str(mistake) for mistake in self.mistakes[:_MISTAKES_SHOWN]]
        super().__init__("\n".join([*lines, f"and {more} more"] if more > 0 else lines))


@dataclass(frozen=True, slots=True)
class Address:
    """Where a listener listens."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How much a listener bears of clients that are slow, or many."""

    connections: int = 4000
    head_s: float = 10.0  # from a head's first byte to its last
    idle_s: float = 75.0  # between two requests, and before the first
    # A body: so long, and a second more for every so many bytes that came. 32 MiB at half a megabit pass.
    body_s: float = 30.0
    body_bytes_per_s: int = 65_536
    heartbeat_s: float = 15.0  # of a stream, until the client is told that the connection is alive


@dataclass(frozen=True, slots=True)
class Settings:
    """What only a restart changes. `admin` is None where that listener is off; `cors` are origins, or "*".

    `lease_ms` is not in the file; None: as usual.
    """

    api: Address
    admin: Address | None
    database: str = field(repr=False)
    cors: tuple[str, ...] = ()
    connection_limits: ConnectionLimits = ConnectionLimits()
    lease_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """A file that was taken: its settings, its policy, and its document, which knows the lines."""

    settings: Settings
    policy: Policy
    document: Document

    @property
    def restart_only(self) -> Mapping[str, object]:
        """The sections that a reload does not change, by name, to be compared with those in force."""
        server = (self.settings.api, self.settings.admin, self.settings.cors, self.settings.connection_limits)
        return {"server": server, "database": self.settings.database}


def load(path: str, environ: Mapping[str, str], read_bytes: ReadFile | None = None) -> Config:
    """The file at `path`; raises BadConfig."""
    read_bytes = read_bytes or read_capped
    try:
        source = read_bytes(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no such name"
        raise BadConfig(
            [Diagnostic(path, 1, f"the file can't be read ({why}); check its name and who may read it")]
        ) from None
    return _load(source, path, Interpolator(environ, read_bytes))


def load_text(
    text: str,
    name: str = "quotas.yaml",
    *,
    environ: Mapping[str, str] | None = None,
    read_bytes: ReadFile | None = None,
) -> Config:
    """The same for a text; `name` stands for the file in the report."""
    source = text.encode("utf-8", "surrogatepass")
    return _load(source, name, Interpolator(environ or {}, read_bytes or read_capped))


def read_capped(path: str) -> bytes:
    """A file's bytes, at most one more than is ever taken: also of one that has no end."""
    with open(path, "rb") as file:
        return file.read(BYTES_MAX + 1)


def _load(source: bytes, name: str, sources: Interpolator) -> Config:
    document = read_document(source, name, sources)
    if document.data is None:
        raise BadConfig(document.mistakes)
    file, faults = read_file(document.data)
    faults = (*faults, *_pointing_nowhere(document.data), *_shared_keys(document.data), *_idle_words(document.data))
    mistakes = [document.mistake(fault.path, fault.text) for fault in faults if not document.is_bad(fault.path)]
    if file is None or mistakes or document.mistakes:
        raise BadConfig([*document.mistakes, *mistakes])
    return Config(_settings(file), _policy(file, _hash(document.data)), document)


# ------------------------------------------------------------------------------------- mistakes across the whole file


def _pointing_nowhere(data: Mapping[str, object]) -> Iterator[Finding]:
    """Names of groups and upstreams that there are not."""
    groups, upstreams = _mapping(data, "groups"), _mapping(data, "upstreams")
    for user in _mapping(data, "users"):
        for path, group in _words(data, "users", user, "groups"):
            if group in (EVERYONE, DEFAULT):
                yield Finding(path, placed(path, f'"{group}" holds for users by itself; leave it out'))
            else:
                yield from _missing("group", path, group, groups)
    yield from _missing("upstream", ("default_upstream",), _word(data.get("default_upstream")), upstreams)
    needs_default = len(upstreams) > 1 and "default_upstream" not in data
    if needs_default and "models" not in data:
        text = f"there are several and no models; write default_upstream: one of {', '.join(upstreams)}"
        yield Finding(("upstreams",), placed(("upstreams",), text))
    for model in _mapping(data, "models"):
        path, section = ("models", model), _mapping(data, "models", model)
        yield from _missing("upstream", (*path, "upstream"), _word(section.get("upstream")), upstreams)
        for place, one in _places(section):
            yield from _missing("upstream", (*path, *place, "upstream"), _word(one.get("upstream")), upstreams)
        if needs_default and not section.keys() & {"upstream", "upstreams"}:
            yield Finding(
                path,
                placed(path, "there are several upstreams; write upstream or upstreams here, or default_upstream"),
            )


def _missing(kind: str, path: KeyPath, name: str, names: Iterable[str]) -> Iterator[Finding]:
    if name in names or not values.NAME.fullmatch(name):
        return
    names = [name for name in names if name not in (EVERYONE, DEFAULT)]
    hint = (
        did_you_mean(name, names) or f"write it below {kind}s, where there is {', '.join(names[:10]) or 'none yet'}"
    )
    yield Finding(path, placed(path, f'there is no {kind} "{name}"; {hint}'))


def _shared_keys(data: Mapping[str, object]) -> Iterator[Finding]:
    """Keys that don't say who is calling, because they stand in two places. The key itself is not shown."""
    keys: list[tuple[str, KeyPath, str]] = [
        ("an admin", ("admin_keys", name), _word(key)) for name, key in _mapping(data, "admin_keys").items()
    ]
    for user in _mapping(data, "users"):
        keys += [(f"user {user}", path, key) for path, key in _words(data, "users", user, "keys")]
    owners: dict[str, str] = {}
    for owner, path, key in keys:
        digest = _digest(key)
        if digest in owners:
            yield Finding(path, placed(path, f"{owners[digest]} has this key already; write another one"))
        elif digest:
            owners[digest] = owner


def _digest(key: str) -> str | None:
    try:
        return values.key_digest(key)
    except ValueError:
        return None


def _idle_words(data: Mapping[str, object]) -> Iterator[Finding]:
    """What stands there and could do nothing."""
    anything = _mapping(data, "models", "*")
    named = [(key,) for key in anything if key not in ("upstream", "upstreams")]
    for step in (*named, *((*place, "model") for place, one in _places(anything) if "model" in one)):
        path: KeyPath = ("models", "*", *step)
        yield Finding(path, placed(path, '"*" says only where names go; leave this out, or name the model'))
    if _mapping(data, "groups", EVERYONE).get("unlimited") in (True, "true"):
        path = ("groups", EVERYONE, "unlimited")
        text = f"{EVERYONE} only adds limits; write unlimited in {DEFAULT}, or unmatched: allow"
        yield Finding(path, placed(path, text))


def _mapping(data: object, *path: str) -> Mapping[str, object]:
    """The mapping at this place; an empty one where there is none, which is another mistake."""
    for step in path:
        data = data.get(step) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def _places(model: Mapping[str, object]) -> Iterator[tuple[KeyPath, Mapping[str, object]]]:
    """The upstreams of a model that has several, each with its place in the model."""
    several = model.get("upstreams")
    for index, one in enumerate(several if isinstance(several, list) else []):
        yield ("upstreams", index), _mapping(one)


def _words(data: Mapping[str, object], *path: str) -> Iterator[tuple[KeyPath, str]]:
    """The items of the list at this place, each with its own place."""
    found = _mapping(data, *path[:-1]).get(path[-1])
    for index, item in enumerate(found if isinstance(found, list) else []):
        yield (*path, index), _word(item)


def _word(value: object) -> str:
    """A name or key as it was written; empty for what can be none, which is another mistake."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


# ------------------------------------------------------------------------------------------- from the file to values


def _settings(file: File) -> Settings:
    admin = file.server.admin
    return Settings(
        api=Address(*values.split_address(file.server.api)),
        admin=None if admin is None else Address(*values.split_address(admin)),
        database=file.database,
        cors=tuple(file.server.cors),
        connection_limits=ConnectionLimits(connections=file.server.connections),
    )


def _policy(file: File, hash: str) -> Policy:
    upstreams = {
        name: Upstream(
            name,
            section.base_url,
            section.api_key,
            kind=section.kind,
            on_disconnect=section.when_client_leaves(),
            api_version=section.api_version,
            allow=_allow(section.allow),
        )
        for name, section in file.upstreams.items()
    }
    default = file.default_upstream or (next(iter(upstreams)) if len(upstreams) == 1 else "")
    zone = ZoneInfo(file.timezone)
    week_starts = WEEKDAYS.index(file.week_starts)
    return Policy(
        groups={name: _group(name, section, zone, week_starts) for name, section in file.groups.items()},
        users={
            name: User(name, tuple(group for group in file.groups if group in section.groups))
            for name, section in file.users.items()
        },
        key_digests={digest: name for name, section in file.users.items() for digest in section.keys},
        upstreams=upstreams,
        models=None if file.models is None else _models(file, upstreams, default),
        default_upstream=upstreams.get(default),
        combine=file.combine,
        unmatched=file.unmatched,
        wait_s=file.wait / 1000,
        ledger_wait_s=file.ledger_wait / 1000,
        retry_for_ms=file.retry_for,
        keep=Keep(calls_ms=file.keep.calls, days_ms=file.keep.days),
        zone=zone,
        help=file.help,
        admin_digests={digest: name for name, digest in file.admin_keys.items()},
        hash=hash,
    )


def _models(file: File, upstreams: Mapping[str, Upstream], default: str) -> dict[str, Model]:
    models = (file.models or {}).items()
    return {name: _model(name, section, upstreams=upstreams, default=default) for name, section in models}


def _model(name: str, section: ModelSection, *, upstreams: Mapping[str, Upstream], default: str) -> Model:
    one = (section.upstream or default, section.model, 1)
    places = [(place.upstream, place.model, place.weight) for place in section.upstreams or ()] or [one]
    first, *others = (
        Model(
            name=name,
            upstream=upstreams[upstream],
            upstream_model=served or name,
            max_output_tokens=section.max_output_tokens,
            context=section.context,
            encoding=section.encoding,
            reasoning=section.reasoning,
            smallest_answer=section.smallest_answer,
            weight=weight,
            allow=None if section.allow is None else _allow(section.allow),
        )
        for upstream, served, weight in places
    )
    return replace(first, others=tuple(others))


def _allow(section: AllowSection) -> Allow:
    tools, tiers, betas = (frozenset(names) for names in (section.tools, section.service_tiers, section.betas))
    return Allow(tools, tiers, betas, section.store)


def _group(name: str, section: GroupSection, zone: ZoneInfo, week_starts: int) -> Group:
    quotas = tuple(
        Quota(
            group=name,
            name=quota_name,
            limits=quota.limits(),
            per=parse_per(quota.per, zone, week_starts),
            models=Globs(quota.models),
            shared=quota.shared,
            enforce=quota.enforce,
            overdraft=quota.overdraft,
        )
        for quota_name, quota in section.quotas.items()
    )
    return Group(name, quotas, Globs(section.models) if section.models else None, section.unlimited)


def _hash(data: Mapping[str, object]) -> str:
    """Twelve digits that are the same wherever the same policy is in force, whatever each server's own settings."""
    effective = {key: value for key, value in data.items() if key not in ("server", "database")}
    return hashlib.sha256(json.dumps(effective).encode()).hexdigest()[:12]
