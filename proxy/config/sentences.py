"""Sentences for each group of a policy, which say what the group may use, for each source of users, and for a quota.

staff: each of 3 members may use 200,000 tokens a day of any model.
sso: with its key, from 10.0.3.8, x-forwarded-user names the user: in staff by /staff; all others may not call.
"""

from collections.abc import Iterable

from proxy.config.loader import Config, FileUser, HeaderSource
from proxy.policy.policy import DEFAULT, EVERYONE, Group
from proxy.policy.quota import Globs, Limit, Quota
from proxy.policy.windows import Calendar

_NAMES_SHOWN = 5
_UNITS = {"s": "second", "m": "minute", "h": "hour", "d": "day", "w": "week"}
_RESERVED_GROUPS = {EVERYONE: ", whatever the group,", DEFAULT: " whose own groups have no quota for the model"}
_FEW_MEMBERS = {0: "its members (none in this file)", 1: "its one member"}
_NO_MEMBERS_NOW = "its members (none now)"
_ENFORCE_NOTES = {"exact": "", "after": " (counted when calls have ended)", "shadow": " (never refused)"}


def sentences(config: Config) -> tuple[str, ...]:
    """What each group may use, in one sentence each, in the policy's order; then who gets in by which source."""
    members = members_of(config)
    of_groups = [_sentence(group, len(members[group.name])) for group in config.policy.groups.values()]
    return (*of_groups, *(_source_sentence(source, config.users) for source in config.header_sources))


def members_of(config: Config) -> dict[str, list[FileUser]]:
    """The users in each group. All users are in `everyone` and `default`."""
    members: dict[str, list[FileUser]] = {name: [] for name in config.policy.groups}
    for user in config.users:
        for group in user.groups:
            members[group].append(user)
    return members | {name: list(config.users) for name in (EVERYONE, DEFAULT) if name in members}


def matches_all(globs: Globs | None) -> bool:
    """Whether these patterns match every model; None is no pattern, and does."""
    return globs is None or "*" in globs.texts


def quota_sentence(quota: Quota, members: int | None, over: int, *, is_trial: bool) -> str:
    """What one quota allows, and how many have reached a limit of it: of its members, or its pot (0 or 1).

    `members` None: nothing is known of them. If this `is_trial`, the quota is not in force.
    """
    whose = _all_members if quota.shared else _each_member
    who = _NO_MEMBERS_NOW if members == 0 and quota.group not in _RESERVED_GROUPS else whose(quota.group, members)
    models = "any model" if matches_all(quota.models) else ", ".join(quota.models.texts)
    text = f"{who[0].upper()}{who[1:]} may use {_amount_text(quota)} of {models}"
    if members is None:
        return f"{text}."
    if quota.shared:
        are, are_not = ("would be", "would not be") if is_trial else ("are", "are not")
        return f"{text}; they {are if over else are_not} over now."
    are = "would be" if is_trial else "are" if over > 1 else "is"
    return f"{text}; {over or 'none'}{'' if members == 1 else ' of them'} {are} over now."


def _sentence(group: Group, members: int) -> str:
    if group.unlimited:
        models = ", ".join(group.models.texts) if group.models else "any model"
        return f"{group.name}: {_each_member(group.name, members)} may use {models} without limit."
    models = f"; only models {', '.join(group.models.texts)}" if group.models else ""
    per_member = [_quota_text(quota) for quota in group.quotas if not quota.shared]
    shared = [_quota_text(quota) for quota in group.quotas if quota.shared]
    parts = [f"{_each_member(group.name, members)} may use {', and '.join(per_member)}"] if per_member else []
    parts += [f"{_all_members(group.name, members)} may use {', and '.join(shared)}"] if shared else []
    return f"{group.name}: {'; '.join(parts) or 'no quotas'}{models}."


def _source_sentence(source: HeaderSource, users: Iterable[FileUser]) -> str:
    networks = [str(each).removesuffix(f"/{each.max_prefixlen}") for each in source.networks]
    where = f"from {shown(networks)}" if networks else "from anywhere"
    header = f"the signed {source.signed.header}" if source.signed else source.user
    by_group: dict[str, list[str]] = {}
    for outside, group in source.map.items():
        by_group.setdefault(group, []).append(outside)
    parts = [f"in {group} by {shown(names)}" for group, names in by_group.items()]
    others = f"in {source.unmapped}" if source.unmapped else "may not call"
    parts.append(f"all others {others}" if parts else f"all {others}")
    linked = [user.name for user in users for name, _ in user.identities if name == source.name]
    if linked:
        parts.append(f"{shown(dict.fromkeys(linked))} of this file by identities")
    start = f"{source.name}: with its key, {where}, {header} names the user"
    return f"{start}: {'; '.join(parts)}; at most {source.users_max:,} users."


def shown(names: Iterable[str]) -> str:
    """The first five names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _NAMES_SHOWN} more" if len(listed) > _NAMES_SHOWN else ""
    return ", ".join(listed[:_NAMES_SHOWN]) + more


def _each_member(group: str, members: int | None) -> str:
    if group in _RESERVED_GROUPS:
        return f"every user{_RESERVED_GROUPS[group]}"
    if members is None:
        return "each member"
    return _FEW_MEMBERS.get(members, f"each of {members:,} members")


def _all_members(group: str, members: int | None) -> str:
    if group in _RESERVED_GROUPS:
        return f"all users{_RESERVED_GROUPS[group]} together"
    if members is None:
        return "all its members together"
    return _FEW_MEMBERS.get(members, f"all {members:,} members together")


def _amount_text(quota: Quota) -> str:
    *others, last = [limit_text(limit) for limit in quota.limits]
    limits = f"{', '.join(others)} and {last}" if others else last
    return f"{limits} {_window_text(quota)}{_ENFORCE_NOTES[quota.enforce]}"


def _quota_text(quota: Quota) -> str:
    amount = _amount_text(quota)
    return f"{amount} of any model" if matches_all(quota.models) else f"on {', '.join(quota.models.texts)}: {amount}"


def limit_text(limit: Limit) -> str:
    """A limit in words: "200,000 tokens"."""
    return f"{limit.maximum:,} {limit.measure.singular if limit.maximum == 1 else limit.measure.unit}"


def _window_text(quota: Quota) -> str:
    if isinstance(quota.per, Calendar):
        return "an hour" if quota.per.text == "hour" else f"a {quota.per.text}"
    number, unit = quota.per.text[:-1], _UNITS[quota.per.text[-1]]
    return f"in {number} {unit}{'' if number == '1' else 's'} from the first call"
