"""Adds what administrators have made at run time to a file: groups, quotas, grants, and groups of the file's users.

Groups made at run time come after the file's, in their own order. Quotas made at run time may also belong to a group
of the file, and then come after that group's own. The file wins: what has the id of something in the file has no
effect as long as that is there, and comes back when it goes. The same holds for what does not fit the file, such as a
quota of a group that is gone. `Overlaid.without_effect` says so.

This module is pure.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from zoneinfo import ZoneInfo

import orjson

from proxy.config.loader import Config, FileUser, quota_of
from proxy.config.messages import read_quota
from proxy.policy.policy import DEFAULT, EVERYONE, Group
from proxy.policy.quota import Globs, Grant, Quota, grants_by_quota


@dataclass(frozen=True, slots=True)
class MadeGroup:
    """A group that was made at run time. `models` None: it has no list of models. `created_at` is in ms."""

    name: str
    models: tuple[str, ...] | None = None
    unlimited: bool = False
    created_at: int = 0
    created_by: str = ""


@dataclass(frozen=True, slots=True)
class MadeQuota:
    """A quota that was made at run time. `document` has its fields as the file would have them."""

    group: str
    name: str
    document: Mapping[str, object]
    created_at: int = 0
    created_by: str = ""

    @property
    def id(self) -> str:
        """`group/name`, under which its counters are."""
        return f"{self.group}/{self.name}"


@dataclass(frozen=True, slots=True)
class MadePolicy:
    """All that was made at run time, in order. `groups_of` has groups of users of the file, by their names."""

    groups: tuple[MadeGroup, ...] = ()
    quotas: tuple[MadeQuota, ...] = ()
    grants: tuple[Grant, ...] = ()
    groups_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.groups or self.quotas or self.grants or self.groups_of)


@dataclass(frozen=True, slots=True)
class WithoutEffect:
    """A group or quota that was made at run time and has no effect now, and why."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Overlaid:
    """A file with what was made at run time."""

    config: Config
    without_effect: tuple[WithoutEffect, ...] = ()


def overlaid(file: Config, made: MadePolicy) -> Overlaid:
    """The config that is in force: the file, and what was made at run time behind it."""
    if not made:
        return Overlaid(file)
    problems: list[WithoutEffect] = []
    groups = dict(file.policy.groups)
    for each in made.groups:
        if each.name in groups:
            problems.append(WithoutEffect(each.name, "the file has a group of this name, which wins"))
        else:
            groups[each.name] = Group(each.name, (), Globs(each.models) if each.models else None, each.unlimited)
    added: dict[str, dict[str, Quota]] = {}
    for quota in made.quotas:
        of_group = added.setdefault(quota.group, {})
        found = _quota(quota, file, groups)
        if isinstance(found, WithoutEffect):
            problems.append(found)
        else:
            of_group[quota.name] = found
    for name, quotas in added.items():
        if quotas:
            groups[name] = replace(groups[name], quotas=(*groups[name].quotas, *quotas.values()))
    policy = replace(
        file.policy, groups=groups, grants=grants_by_quota(made.grants), hash=_hash(file.policy.hash, made)
    )
    users = tuple(_users(file.users, made, groups)) if made.groups_of else file.users
    return Overlaid(replace(file, policy=policy, users=users), tuple(problems))


def _quota(made: MadeQuota, file: Config, groups: Mapping[str, Group]) -> Quota | WithoutEffect:
    group = groups.get(made.group)
    if group is None:
        return WithoutEffect(made.id, f'there is no group "{made.group}"')
    if group.unlimited:
        return WithoutEffect(made.id, f'the group "{made.group}" is unlimited')
    if any(quota.name == made.name for quota in group.quotas):
        return WithoutEffect(made.id, "the file has a quota of this id, which wins")
    document = orjson.dumps(dict(made.document), option=orjson.OPT_SORT_KEYS)
    found = _parsed(made.group, made.name, document, file.policy.zone, file.week_starts)
    return found if isinstance(found, Quota) else WithoutEffect(made.id, f"this release does not accept it: {found}")


# All quotas are looked at again whenever one has changed, so those of before are remembered. One takes about 2 kB.
@lru_cache(maxsize=20_000)
def _parsed(group: str, name: str, document: bytes, zone: ZoneInfo, week_starts: int) -> Quota | str:
    """The quota of a document, or why it is none."""
    section, findings = read_quota(orjson.loads(document))
    if section is None:
        return findings[0].text
    return quota_of(group, name, section, zone=zone, week_starts=week_starts)


def _users(users: Iterable[FileUser], made: MadePolicy, groups: Mapping[str, Group]) -> Iterator[FileUser]:
    for user in users:
        added = made.groups_of.get(user.name, ())
        wanted = {*user.groups, *added} - {EVERYONE, DEFAULT}
        yield replace(user, groups=tuple(name for name in groups if name in wanted)) if added else user


def _hash(of_file: str, made: MadePolicy) -> str:
    """The hash of the policy in force: equal on all replicas that have the same file and the same additions.

    Grants are left out. They end by the clock, and a process that starts later does not load those that have ended.
    """
    content = {
        "file": of_file,
        "groups": [[each.name, each.models, each.unlimited] for each in made.groups],
        "quotas": [[each.id, dict(each.document)] for each in made.quotas],
        "groups_of": {user: list(names) for user, names in sorted(made.groups_of.items())},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
