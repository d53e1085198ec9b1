"""Warnings about a valid policy that probably does not do what it seems to, and a sentence for each group.

A warning is never wrong. It is given only if the file alone decides it (a quota that can never refuse a call, a group
without members), and left out if it depends on the calls.

An example of what is left out: a quota of 60k in 6h beside one of 50k in 7d looks as if it could never refuse. But
both windows open with their first call, so 6 hours can overlap two of those weeks: from a 6h window that opened on
Sunday at 21:00, 50k may be used before a 7d window ends at midnight and 10k after it, and the quota of 60k refuses.
"""

from collections.abc import Iterator
from ipaddress import ip_address
from urllib.parse import parse_qsl, urlsplit

from proxy.config.document import Diagnostic, Finding, KeyPath
from proxy.config.loader import Config, FileUser
from proxy.config.messages import finding_at
from proxy.formats.estimate import SMALLEST_ANSWER
from proxy.formats.kinds import kind_of
from proxy.policy.catalog import Catalog, Model
from proxy.policy.policy import DEFAULT, EVERYONE, Group, Policy, enforced
from proxy.policy.quota import Globs, Limit, Quota
from proxy.policy.windows import Calendar

Warnings = Iterator[Finding]

_NAMES_SHOWN = 5

# For each calendar window those in which it always lies as a whole. A week can lie in two months, quarters or years.
_CONTAINING = {
    "minute": ("minute", "hour", "day", "week", "month", "quarter", "year"),
    "hour": ("hour", "day", "week", "month", "quarter", "year"),
    "day": ("day", "week", "month", "quarter", "year"),
    "week": ("week",),
    "month": ("month", "quarter", "year"),
    "quarter": ("quarter", "year"),
    "year": ("year",),
}
_UNITS = {"s": "second", "m": "minute", "h": "hour", "d": "day", "w": "week"}
_RESERVED_GROUPS = {EVERYONE: ", whatever the group,", DEFAULT: " whose own groups have no quota for the model"}
_FEW_MEMBERS = {0: "its members (none in this file)", 1: "its one member"}
_ENFORCE_NOTES = {"exact": "", "after": " (counted when calls have ended)", "shadow": " (never refused)"}


def warnings(config: Config) -> tuple[Diagnostic, ...]:
    """All warnings about a valid file, sorted by line."""
    findings = [
        *_groups_without_effect(config),
        *_users_without_quota(config),
        *_limits_too_small(config),
        *_quotas_that_never_refuse(config),
        *_aliases_without_quota(config),
        *_models_without_maximum(config),
        *_link_local_upstreams(config.catalog),
        *_secrets_in_plain_text(config),
    ]
    located = (config.document.locate(finding) for finding in findings)
    return tuple(sorted([*config.document.warnings, *located]))


def sentences(config: Config) -> tuple[str, ...]:
    """What each group may use, in one sentence each, in the policy's order."""
    members = _members(config)
    return tuple(_sentence(group, len(members[group.name])) for group in config.policy.groups.values())


# ------------------------------------------------------------------------------------------------- groups and users


def _members(config: Config) -> dict[str, list[FileUser]]:
    """The users in each group. All users are in `everyone` and `default`."""
    members: dict[str, list[FileUser]] = {name: [] for name in config.policy.groups}
    for user in config.users:
        for group in user.groups:
            members[group].append(user)
    return members | {name: list(config.users) for name in (EVERYONE, DEFAULT) if name in members}


def _groups_without_effect(config: Config) -> Warnings:
    policy, members = config.policy, _members(config)
    for group in policy.groups.values():
        path: KeyPath = ("groups", group.name)
        if not members[group.name] and group.name not in (EVERYONE, DEFAULT):
            yield Finding(path, f'group "{group.name}" has no members in this file')
        if not group.quotas and not group.unlimited and group.models is None:
            yield Finding(
                path, f'group "{group.name}" has no effect: it has no quotas and no models, and is not unlimited'
            )
        if group.models and not _may_match_both(config.catalog, group.models, None):
            text = f'the models of group "{group.name}" match none of those listed under models'
            yield Finding((*path, "models"), text)
    default = policy.groups.get(DEFAULT)
    if default and config.users and all(_has_quota_for_every_model(policy, user) for user in config.users):
        text = "default applies to no user: each user has a group with a quota for every model"
        yield Finding(("groups", DEFAULT), text)


def _has_quota_for_every_model(policy: Policy, user: FileUser) -> bool:
    """Whether one of the user's groups has a quota for every model, or is unlimited for every model."""
    groups = (policy.groups[name] for name in user.groups)
    return any(
        _matches_all(group.models)
        and (group.unlimited or any(_matches_all(quota.models) for quota in enforced(group.quotas)))
        for group in groups
    )


def _matches_all(globs: Globs | None) -> bool:
    return globs is None or "*" in globs.texts


def _users_without_quota(config: Config) -> Warnings:
    """Users whose every call is refused. One warning names the first five."""
    policy = config.policy
    if policy.unmatched == "allow" or any(_admits_any_call(policy, name) for name in (EVERYONE, DEFAULT)):
        return
    refused = [user.name for user in config.users if not any(_admits_any_call(policy, name) for name in user.groups)]
    if refused:
        shown = ", ".join(refused[:_NAMES_SHOWN])
        more = f" and {len(refused) - _NAMES_SHOWN} more" if len(refused) > _NAMES_SHOWN else ""
        text = "no quota covers them, so every call is refused; put them in a group, or add a group called default"
        yield Finding(("users", refused[0]), f"{shown}{more}: {text}")


def _admits_any_call(policy: Policy, name: str) -> bool:
    """Whether this group has a quota for some model, or is unlimited."""
    group = policy.groups.get(name)
    return group is not None and bool(group.quotas or group.unlimited)


# ----------------------------------------------------------------------------------------------------------- quotas


def _quotas(policy: Policy) -> Iterator[tuple[KeyPath, Group, Quota]]:
    for group in policy.groups.values():
        for quota in group.quotas:
            yield ("groups", group.name, "quotas", quota.name), group, quota


def _limits_too_small(config: Config) -> Warnings:
    for path, group, quota in _quotas(config.policy):
        for limit in quota.limits:
            if limit.maximum == 0:
                text = f"a limit of {_limit_text(limit)} refuses every call that it applies to"
                yield Finding((*path, limit.measure), f"{quota.id}: {text}")
            elif (
                quota.enforce == "exact"
                and limit.measure.counts_output
                and limit.maximum < _smallest_answer(config.catalog, group, quota)
            ):
                text = f"calls that ask for a longer answer than {limit.maximum:,} tokens are never admitted"
                yield Finding((*path, limit.measure), f"{quota.id}: {text}")


def _smallest_answer(catalog: Catalog, group: Group, quota: Quota) -> int:
    """The least `smallest_answer` of the models that this quota applies to, in tokens."""
    models = [model for name, model in (catalog.models or {}).items() if quota in group.quotas_for(name)]
    return min((model.smallest_answer or SMALLEST_ANSWER for model in models), default=SMALLEST_ANSWER)


def _quotas_that_never_refuse(config: Config) -> Warnings:
    """Quotas without effect. Not those with `enforce: shadow`, which are meant to refuse nothing."""
    policy, members = config.policy, _members(config)
    for path, group, quota in _quotas(policy):
        if quota.enforce == "shadow":
            continue
        if not _may_match_both(config.catalog, quota.models, group.models):
            reason = "it matches no model that its group may use"
        elif unlimited := _unlimited_group_of_all(policy, group, members[group.name]):
            reason = f"all its members are also in {unlimited}, which is unlimited"
        elif tighter := _tighter_quota(policy, group, quota, members[group.name]):
            reason = f"{tighter.id} is used up first"
        else:
            continue
        yield Finding(path, f"{quota.id} can never refuse a call: {reason}")


def _may_match_both(catalog: Catalog, globs: Globs, within: Globs | None) -> bool:
    """Whether some model may match `globs` and `within` (None: every model does).

    A closed list of models decides it. Without one, whole names decide it. Two patterns, `gpt-*` and `o*`, always may
    match both, because a name that the file does not have can match them.
    """
    if catalog.models is not None and "*" not in catalog.models:
        return any(globs.match(model) and (within is None or within.match(model)) for model in catalog.models)
    if within is None:
        return True
    if _are_whole_names(globs):
        return any(within.match(name) for name in globs.texts)
    return not _are_whole_names(within) or any(globs.match(name) for name in within.texts)


def _are_whole_names(globs: Globs) -> bool:
    return not any(sign in text for text in globs.texts for sign in "*?[")


def _unlimited_group_of_all(policy: Policy, group: Group, members: list[FileUser]) -> str | None:
    """An unlimited group that has all members of `group`, and so admits every call that `group` would refuse."""
    if policy.combine == "every_group" or group.name in (EVERYONE, DEFAULT) or not members:
        return None
    unlimited = [name for name, other in policy.groups.items() if other.unlimited and _matches_all(other.models)]
    return next((name for name in unlimited if all(name in user.groups for user in members)), None)


def _tighter_quota(policy: Policy, group: Group, quota: Quota, members: list[FileUser]) -> Quota | None:
    """A quota of the same group that is used up before this one, whatever the calls are."""
    # A call that is admitted through another group is also charged to each per-member quota here that has capacity
    # for it. Example: tight has 100 tokens a day, loose 120, both are at 80. A call of 40 does not fit into tight, is
    # admitted through another group, and takes loose to 120. Now loose refuses a call of 10, which tight admits.
    same_calls = (
        quota.shared
        or policy.combine == "every_group"
        or group.name in (EVERYONE, DEFAULT)
        or all(user.groups == (group.name,) for user in members)
    )
    if not same_calls:
        return None
    position = group.quotas.index(quota)
    for index, other in enumerate(group.quotas):
        # Of two equal quotas only the second gets a warning, since without it the first would have an effect.
        is_equal = (other.limits, other.models, other.per) == (quota.limits, quota.models, quota.per)
        if index != position and not (is_equal and index > position) and _is_used_up_before(other, quota):
            return other
    return None


def _is_used_up_before(tight: Quota, loose: Quota) -> bool:
    maxima = {limit.measure: limit.maximum for limit in tight.limits}
    return (
        tight.enforce == "exact"
        and tight.shared == loose.shared
        and set(tight.models.texts) in ({"*"}, set(loose.models.texts))
        and _windows_contain(tight, loose)
        # A measure that `tight` does not limit can have any amount.
        and all(maxima.get(limit.measure, limit.maximum + 1) <= limit.maximum for limit in loose.limits)
    )


def _windows_contain(longer: Quota, shorter: Quota) -> bool:
    """Whether each window of the one quota lies as a whole in a window of the other."""
    if isinstance(longer.per, Calendar) and isinstance(shorter.per, Calendar):
        return longer.per.text in _CONTAINING[shorter.per.text]
    # Two windows that begin with their first call begin together only if both quotas count the same calls.
    same_calls = {limit.measure for limit in longer.limits} == {limit.measure for limit in shorter.limits}
    return longer.per == shorter.per and same_calls and longer.models == shorter.models


# --------------------------------------------------------------------------------------------- models and upstreams


def _aliases_without_quota(config: Config) -> Warnings:
    """Names under which a member can use a model without the quota that was written for it.

    With `smart: {model: gpt-4o}` and a quota on gpt-4o, a call for "smart" reaches the same model, and the quota does
    not match. There is no warning if the group has a quota of its own for the alias, or if no member may use it.
    """
    policy, members = config.policy, _members(config)
    for path, group, quota in _quotas(policy):
        for alias, known in _aliases(config.catalog, quota):
            has_its_own = any(other.models.match(alias) and not other.models.match(known) for other in group.quotas)
            users = (user for user in members[group.name] if _applies_to(policy, user, known, quota))
            if not has_its_own and any(policy.serves(user.groups, alias, config.catalog) for user in users):
                text = f'it matches "{known}" but not "{alias}", which is the same model; add "{alias}" to its models'
                yield Finding(path, f"{quota.id}: {text}")


def _applies_to(policy: Policy, user: FileUser, model: str, quota: Quota) -> bool:
    binding = policy.binding(user.groups, model)
    return binding is not None and quota in binding.quotas


def _aliases(catalog: Catalog, quota: Quota) -> Iterator[tuple[str, str]]:
    """Names that the quota does not match, each with a name of the same model that it matches."""
    targets = [target for model in _models_by_name(catalog).values() for target in model.targets]
    matched = {_served(target): target.name for target in targets if quota.models.match(target.name)}
    found: dict[tuple[str, str], None] = {}  # a set in order: a model with two upstreams has its alias twice
    for target in targets:
        known = matched.get(_served(target))
        if known and quota.models.match(target.upstream_model) and not quota.models.match(target.name):
            found[target.name, known] = None
    yield from found


def _models_by_name(catalog: Catalog) -> dict[str, Model]:
    """The models by every name that a client can use. With an open list, these include the upstreams' own names."""
    listed = {name: model for name, model in (catalog.models or {}).items() if name != "*"}
    served_names = {target.upstream_model for model in listed.values() for target in model.targets}
    served = {name: catalog.model(name) for name in sorted(served_names)}
    return listed | {name: model for name, model in served.items() if model is not None}


def _served(model: Model) -> tuple[str, str]:
    return model.upstream.name, model.upstream_model


def _models_without_maximum(config: Config) -> Warnings:
    """Models whose longest answer is unknown, so that one answer may take an exact quota over its limit."""
    for name, model in (config.catalog.models or {}).items():
        # Anthropic requires a maximum in every call; the simulator's answers have a maximum of their own.
        is_bounded = all(kind_of(target.upstream.kind).bounds_answers for target in model.targets)
        is_known = model.max_output_tokens is not None or is_bounded
        # Embedding models have no output. The name is all that tells them apart.
        if name == "*" or is_known or "embed" in model.upstream_model:
            continue
        if quota := _exact_output_quota(config, name):
            text = f"a whole answer may take {quota.id} over its limit if its call states no maximum"
            yield Finding(("models", name), f"{text}; write max_output_tokens")


def _exact_output_quota(config: Config, model: str) -> Quota | None:
    """The first exact quota on this model's output that applies to a user."""
    members = _members(config)
    quotas = (
        quota for group in config.policy.groups.values() if members[group.name] for quota in group.quotas_for(model)
    )
    return next(
        (
            quota
            for quota in quotas
            if quota.enforce == "exact" and any(limit.measure.counts_output for limit in quota.limits)
        ),
        None,
    )


def _link_local_upstreams(catalog: Catalog) -> Warnings:
    """Upstreams such as 169.254.169.254, where cloud machines serve their own credentials to any local process."""
    for name, upstream in catalog.upstreams.items():
        host = urlsplit(upstream.base_url).hostname or ""
        try:
            is_link_local = ip_address(host).is_link_local
        except ValueError:  # a host name
            continue
        if is_link_local:
            text = f"{host} is a link-local address, where cloud machines serve their credentials; write another one"
            yield Finding(("upstreams", name, "base_url"), text)


def _secrets_in_plain_text(config: Config) -> Warnings:
    for path, node in config.document.walk():
        if not node.is_interpolated and _is_plain_secret(path, node.value):
            yield finding_at(path, "this secret is in plain text; write ${NAME} or ${file:/path} for it")


def _is_plain_secret(path: KeyPath, value: object) -> bool:
    match path:
        case ("admin_keys", _) | ("users", _, "keys", _):
            return not str(value).startswith("sha256:")
        case ("upstreams", _, "api_key"):
            return True
        case ("database",):
            url = urlsplit(str(value))
            return url.password is not None or "password" in dict(parse_qsl(url.query))
    return False


# -------------------------------------------------------------------------------------------------------- sentences


def _sentence(group: Group, members: int) -> str:
    if group.unlimited:
        models = ", ".join(group.models.texts) if group.models else "any model"
        return f"{group.name}: {_each_member(group, members)} may use {models} without limit."
    models = f"; only models {', '.join(group.models.texts)}" if group.models else ""
    per_member = [_quota_text(quota) for quota in group.quotas if not quota.shared]
    shared = [_quota_text(quota) for quota in group.quotas if quota.shared]
    parts = [f"{_each_member(group, members)} may use {', and '.join(per_member)}"] if per_member else []
    parts += [f"{_all_members(group, members)} may use {', and '.join(shared)}"] if shared else []
    return f"{group.name}: {'; '.join(parts) or 'no quotas'}{models}."


def _each_member(group: Group, members: int) -> str:
    if group.name in _RESERVED_GROUPS:
        return f"every user{_RESERVED_GROUPS[group.name]}"
    return _FEW_MEMBERS.get(members, f"each of {members:,} members")


def _all_members(group: Group, members: int) -> str:
    if group.name in _RESERVED_GROUPS:
        return f"all users{_RESERVED_GROUPS[group.name]} together"
    return _FEW_MEMBERS.get(members, f"all {members:,} members together")


def _quota_text(quota: Quota) -> str:
    *others, last = [_limit_text(limit) for limit in quota.limits]
    limits = f"{', '.join(others)} and {last}" if others else last
    amount = f"{limits} {_window_text(quota)}{_ENFORCE_NOTES[quota.enforce]}"
    return f"{amount} of any model" if _matches_all(quota.models) else f"on {', '.join(quota.models.texts)}: {amount}"


def _limit_text(limit: Limit) -> str:
    return f"{limit.maximum:,} {limit.measure.singular if limit.maximum == 1 else limit.measure.unit}"


def _window_text(quota: Quota) -> str:
    if isinstance(quota.per, Calendar):
        return "an hour" if quota.per.text == "hour" else f"a {quota.per.text}"
    number, unit = quota.per.text[:-1], _UNITS[quota.per.text[-1]]
    return f"in {number} {unit}{'' if number == '1' else 's'} from the first call"
