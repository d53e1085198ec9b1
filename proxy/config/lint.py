"""Warnings about a valid policy that probably does not do what it seems to.

A warning is never wrong. It is given only if the file alone decides it (a quota that can never refuse a call, a group
without members), and left out if it depends on the calls.

An example of what is left out: a quota of 60k in 6h beside one of 50k in 7d looks as if it could never refuse. But
both windows open with their first call, so 6 hours can overlap two of those weeks: from a 6h window that opened on
Sunday at 21:00, 50k may be used before a 7d window ends at midnight and 10k after it, and the quota of 60k refuses.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from math import inf
from shutil import which
from urllib.parse import parse_qsl, urlsplit

from proxy.config.document import Diagnostic, Finding, KeyPath
from proxy.config.loader import Config, FileUser, HeaderSource
from proxy.config.messages import finding_at
from proxy.config.sentences import limit_text, matches_all, members_of, shown
from proxy.config.suggestions import did_you_mean
from proxy.formats.kinds import kind_of
from proxy.formats.pieces import endpoint_by_piece
from proxy.policy.amounts import Measure, Uses
from proxy.policy.binding import BoundQuotas
from proxy.policy.catalog import Catalog, KeyCommand, Model
from proxy.policy.policy import DEFAULT, EVERYONE, Group, Policy, enforced
from proxy.policy.quota import Globs, Limit, Quota, sample_name
from proxy.policy.windows import Calendar

Warnings = Iterator[Finding]

# Well-known models whose answers report no tokens: an open list of models accepts them without naming them.
_WITHOUT_TOKENS = ("dall-e-3", "tts-1", "whisper-1")

# Names of headers whose values are secrets.
_NAME_OF_SECRET = re.compile("auth|cookie|key|secret|token|password", re.IGNORECASE)
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
# Their usual lengths in seconds, to compare numbers.
_CALENDAR_S = {
    "minute": 60,
    "hour": 3600,
    "day": 86_400,
    "week": 7 * 86_400,
    "month": 30 * 86_400,
    "quarter": 91 * 86_400,
    "year": 365 * 86_400,
}


def warnings(config: Config, now: int) -> tuple[Diagnostic, ...]:
    """All warnings about a valid file, sorted by line. `now` is in ms since 1970."""
    findings = [
        *_expired_keys(config, now),
        *_managers_of_other_groups(config),
        *_header_sources(config),
        *_secrets_in_plain_text(config),
        *_of_policy(config),
        *_link_local_upstreams(config.catalog),
        *_network_settings_without_effect(config),
    ]
    located = (config.document.locate(finding) for finding in findings)
    return tuple(sorted([*config.document.warnings, *located]))


def policy_warnings(config: Config) -> tuple[str, ...]:
    """The warnings about the groups and quotas of a policy, as sentences without lines."""
    return tuple(dict.fromkeys(finding.text for finding in _of_policy(config)))


def _of_policy(config: Config) -> Warnings:
    # The users of header sources are in its groups too, so what is said of all members must be true of them.
    config = replace(config, users=(*config.users, *_users_of_sources(config)))
    yield from _groups_without_effect(config)
    yield from _users_without_quota(config)
    yield from _limits_too_small(config)
    yield from _quotas_that_never_refuse(config)
    yield from _aliases_without_quota(config)
    yield from _quotas_on_names_of_an_open_list(config)
    yield from _models_without_maximum(config)
    yield from _unlisted_models(config)
    yield from _models_without_tokens(config)


# ------------------------------------------------------------------------------------------------- groups and users


def _groups_without_effect(config: Config) -> Warnings:
    policy, members = config.policy, members_of(config)
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
    if default and config.users and not any(_default_may_apply(policy, default, user) for user in config.users):
        text = "default applies to no user: each user has a group with a quota for every model"
        yield Finding(("groups", DEFAULT), text)


def _managers_of_other_groups(config: Config) -> Warnings:
    """Managers of groups that the file does not have. Such a group may have been made at run time."""
    for path, node in config.document.walk():
        match path:
            case ("admin_keys", str(), "groups", int()) if str(node.value) not in config.policy.groups:
                hint = did_you_mean(str(node.value), config.policy.groups) or "it must have been made at run time"
                yield finding_at(path, f'the file has no group "{node.value}"; {hint}')


def _default_may_apply(policy: Policy, default: Group, user: FileUser) -> bool:
    """Whether there may be calls that `default` can count and that no quota of the user's own groups can."""
    can_count = [Uses.INPUT_AND_OUTPUT] + [
        uses
        for uses in (Uses.REQUEST, Uses.OUTPUT)
        if default.unlimited or any(quota.counts(uses) for quota in enforced(default.quotas))
    ]
    return not all(_has_quota_for_every_model(policy, user, uses) for uses in can_count)


def _has_quota_for_every_model(policy: Policy, user: FileUser, certain: Uses) -> bool:
    """Whether one of the user's groups has a quota for every model that counts this, or is unlimited for them."""
    groups = (policy.groups[name] for name in user.groups)
    return any(
        matches_all(group.models)
        and (
            group.unlimited
            or any(matches_all(quota.models) and quota.counts(certain) for quota in enforced(group.quotas))
        )
        for group in groups
    )


def _users_without_quota(config: Config) -> Warnings:
    """Users whose every call is refused. One warning names the first five."""
    policy = config.policy
    if policy.unmatched == "allow" or any(_admits_any_call(policy, name) for name in (EVERYONE, DEFAULT)):
        return
    refused = [user.name for user in config.users if not any(_admits_any_call(policy, name) for name in user.groups)]
    if refused:
        text = "no quota covers them, so every call is refused; put them in a group, or add a group called default"
        yield Finding(("users", refused[0]), f"{shown(refused)}: {text}")


def _admits_any_call(policy: Policy, name: str) -> bool:
    """Whether this group has a quota for some model, or is unlimited."""
    group = policy.groups.get(name)
    return group is not None and bool(group.quotas or group.unlimited)


def _users_of_sources(config: Config) -> Iterator[FileUser]:
    """Users as header sources can make them: one in each group that a source gives, and one in all of them."""
    for source in config.header_sources:
        groups = tuple(name for name in config.policy.groups if name in source.mapped_groups)
        for some in dict.fromkeys([*((name,) for name in groups), groups]):
            if some:
                yield FileUser(f"users of {source.name} in {' and '.join(some)}", some)


def _expired_keys(config: Config, now: int) -> Warnings:
    for user in config.users:
        for number, key in enumerate(user.keys.values()):
            if key.expires_at is not None and key.expires_at <= now:
                path: KeyPath = ("users", user.name, "keys", number, "expires")
                yield finding_at(path, "this key has expired; remove it, or write a later day")


def _header_sources(config: Config) -> Warnings:
    for number, source in enumerate(config.header_sources):
        path: KeyPath = ("identity", "headers", number)
        if not source.networks:
            text = "whoever has this key can be any of its users, from any address; write from with its networks"
            yield finding_at(path, text)
        if source.signed and len(source.header_names) > 1:
            text = "beside signed, the headers user, email and groups count for nothing; remove them"
            yield finding_at(path, text)
        if source.unmapped is None and not source.map:
            text = (
                "it puts nobody in a group, so only those may call to whom an administrator gave one, or who are in "
                "identities of a user; write map, or unmapped with a group"
            )
            yield finding_at(path, text)
        if source.map and not _sends_groups(source):
            text = "nothing that it sends is looked up here; write groups with the name of a header or claim"
            yield finding_at((*path, "map"), text)


def _sends_groups(source: HeaderSource) -> bool:
    """Whether it can send what its map has: groups, or verified e-mail addresses."""
    if source.signed:
        return source.signed.groups is not None or source.emails_verified
    return source.groups is not None or (source.emails_verified and source.email is not None)


# ----------------------------------------------------------------------------------------------------------- quotas


def _quotas(policy: Policy) -> Iterator[tuple[KeyPath, Group, Quota]]:
    for group in policy.groups.values():
        for quota in group.quotas:
            yield ("groups", group.name, "quotas", quota.name), group, quota


def _limits_too_small(config: Config) -> Warnings:
    for path, group, quota in _quotas(config.policy):
        for limit in quota.limits:
            if limit.maximum == 0:
                text = f"a limit of {limit_text(limit)} refuses every call that it applies to"
                yield Finding((*path, limit.measure), f"{quota.id}: {text}")
            elif (
                quota.enforce == "exact"
                and limit.measure.counts_output
                and limit.maximum < _smallest_answer(config.catalog, group, quota)
            ):
                text = (
                    f"calls that ask for a longer answer than {limit.maximum:,} tokens are never admitted, because "
                    "smallest_answer is larger"
                )
                yield Finding((*path, limit.measure), f"{quota.id}: {text}")


def _smallest_answer(catalog: Catalog, group: Group, quota: Quota) -> int:
    """The least `smallest_answer` of the models that this quota applies to, in tokens.

    0 if one of them has none: then the smallest answer is at most a tenth of the limit.
    """
    models = [model for name, model in (catalog.models or {}).items() if quota in group.quotas_for(name)]
    return min((model.smallest_answer or 0 for model in models), default=catalog.smallest_answer or 0)


def _quotas_that_never_refuse(config: Config) -> Warnings:
    """Quotas without effect. Not those with `enforce: shadow`, which are meant to refuse nothing."""
    policy, members = config.policy, members_of(config)
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
    unlimited = [name for name, other in policy.groups.items() if other.unlimited and matches_all(other.models)]
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
    policy, members = config.policy, members_of(config)
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
    matched = {_served(target): target.name for target in targets if quota.models.match(target.matched_name)}
    found: dict[tuple[str, str], None] = {}  # a set in order: a model with two upstreams has its alias twice
    for target in targets:
        known = matched.get(_served(target))
        if known and quota.models.match(target.upstream_model) and not quota.models.match(target.matched_name):
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


def _quotas_on_names_of_an_open_list(config: Config) -> Warnings:
    """Quotas on names that are tighter than what binds all other names, if clients may use any name.

    The same model has names that the file does not have: `gpt-4o-2024-08-06` is `gpt-4o` for OpenAI, and other
    servers ignore case or know aliases. A call by such a name is bound only by what binds all names.
    """
    policy, members = config.policy, members_of(config)
    if config.catalog.models is not None and "*" not in config.catalog.models:
        return
    for path, group, quota in _quotas(policy):
        own = () if group.name in (EVERYONE, DEFAULT) else (group.name,)
        users = {user.groups for user in members[group.name]} or {own}
        if quota.enforce != "shadow" and any(_is_avoidable(policy, quota, groups) for groups in users):
            text = (
                "any model name is accepted, and a call by another name of these models is bound by less; list the "
                'models under models (without "*"), or write the limit for all names'
            )
            yield Finding(path, f"{quota.id}: {text}")


def _is_avoidable(policy: Policy, quota: Quota, groups: tuple[str, ...]) -> bool:
    """Whether users in these groups are bound by less on some name that the quota does not match."""
    names = [name for text in quota.models.texts if quota.models.match(name := sample_name(text))]
    bindings = [binding for name in names if (binding := policy.binding(groups, name)) and quota in binding.quotas]
    other_names = [
        name
        for name in map(sample_name, _patterns_of_other_names(policy, groups))
        if not quota.models.match(name) and policy.may_use(groups, name)
    ]
    others = [other for name in other_names if (other := policy.binding(groups, name))]
    return any(_is_bound_by_less(other, binding, quota) for binding in bindings for other in others)


def _patterns_of_other_names(policy: Policy, groups: tuple[str, ...]) -> Iterator[str]:
    """The patterns for any number of names that users in these groups may use."""
    yield "*"
    for name in (EVERYONE, *(groups or (DEFAULT,))):
        globs = policy.groups[name].models if name in policy.groups else None
        yield from (text for text in (globs.texts if globs else ()) if "*" in text)


def _is_bound_by_less(other: BoundQuotas, binding: BoundQuotas, quota: Quota) -> bool:
    """Whether a call can be admitted by less on the name of `other` than on that of `binding`, which has the quota.

    It cannot if one of the groups is unlimited: then the quota binds neither.
    """
    alternatives = binding.alternatives()
    if any(quota not in each.quotas and each.quotas == binding.always for each in alternatives):
        return False
    return any(each not in alternatives and not _is_as_tight(each.quotas, quota) for each in other.alternatives())


def _is_as_tight(others: tuple[Quota, ...], quota: Quota) -> bool:
    """Whether each limit of a quota has one among the others that allows no more in the same time."""
    return all(any(_allowed_by(other, limit, quota) <= limit.maximum for other in others) for limit in quota.limits)


def _allowed_by(other: Quota, limit: Limit, quota: Quota) -> float:
    """How much of a limit's measure another quota allows in one window of `quota`.

    20k a day are 600k in a month. Windows that begin at other times may allow more, so this compares the numbers as
    they read.
    """
    if (quota.shared and not other.shared) or (quota.enforce == "exact" and other.enforce != "exact"):
        return inf
    windows = -(-_length_s(quota) // _length_s(other))
    maxima = [mine.maximum for mine in other.limits if _includes(mine.measure, limit.measure)]
    return windows * min(maxima, default=inf)


def _includes(measure: Measure, part: Measure) -> bool:
    return measure == part or (measure == "tokens" and part in ("input_tokens", "output_tokens"))


def _length_s(quota: Quota) -> int:
    per = quota.per
    return _CALENDAR_S[per.text] if isinstance(per, Calendar) else per.length_ms // 1000


def _models_without_maximum(config: Config) -> Warnings:
    """Models whose longest answer is unknown, so that one answer may take an exact quota over its limit."""
    for name, model in (config.catalog.models or {}).items():
        # Anthropic requires a maximum in every call; the simulator's answers have a maximum of their own.
        is_bounded = all(kind_of(target.upstream.kind).bounds_answers for target in model.targets)
        is_known = model.max_output_tokens is not None or is_bounded
        # Models that embed or rerank have no output, and others no output in tokens. Only the names tell them apart.
        has_no_output = any(word in model.upstream_model for word in ("embed", "rerank"))
        has_no_tokens = has_no_output or endpoint_by_piece(model.upstream_model) is not None
        if name == "*" or is_known or has_no_tokens:
            continue
        if quota := _exact_output_quota(config, name):
            text = f"a whole answer may take {quota.id} over its limit if its call states no maximum"
            yield Finding(("models", name), f"{text}; write max_output_tokens")


def _unlisted_models(config: Config) -> Warnings:
    """An open list of models, of whose other models nothing is known: an exact quota may end over its limit.

    One warning names the first such quota.
    """
    catalog, members = config.catalog, members_of(config)
    if all(kind_of(upstream.kind).bounds_answers for upstream in catalog.open_upstreams):
        return  # also for a closed list, which has no such upstreams
    for _, group, quota in _quotas(config.policy):
        if not members[group.name] or not _counts_output_exactly(quota):
            continue
        names = [sample_name(text) for globs in (quota.models, group.models or quota.models) for text in globs.texts]
        if any(quota in group.quotas_for(name) and not catalog.lists(name) for name in names):
            text = (
                "any model name is accepted, and the file states neither max_output_tokens nor context of models "
                "that are not listed: a whole answer whose call states no maximum, or input that a request does not "
                f"show, may take {quota.id} over its limit; list the models under models, with both"
            )
            listed = catalog.models is not None
            yield Finding(("models", "*") if listed else ("upstreams", catalog.open_upstreams[0].name), text)
            return


def _models_without_tokens(config: Config) -> Warnings:
    """Models whose answers report no tokens, for users whose quotas count only tokens.

    With an open list of models, and `unmatched: allow`, one warning is about all such models that are not listed.
    """
    policy = replace(config.policy, unmatched="refuse")
    for name, model in (config.catalog.models or {}).items():
        endpoint = next(filter(None, (endpoint_by_piece(each.upstream_model) for each in model.targets)), None)
        if endpoint is None:
            continue
        is_of_images = endpoint.name == "images"
        has_price = bool(model.tokens_per_request or (is_of_images and model.tokens_per_image))
        users = _users_not_counted(config, policy, name, Uses.OUTPUT if has_price else Uses.REQUEST)
        if not users:
            continue
        key = "tokens_per_image" if is_of_images else "tokens_per_request"
        remedy = "write tokens or requests" if has_price else f"write {key} here, or requests"
        result = "are free" if config.policy.unmatched == "allow" else "are refused"
        text = f"its answers on /v1{endpoint.path} report no tokens, which no quota of {shown(users)} counts"
        yield Finding(("models", name), f"{text}, so they {result}; {remedy} in one of the quotas")
    if config.policy.unmatched != "allow":
        return
    unlisted = [name for name in _WITHOUT_TOKENS if name not in (config.catalog.models or {})]
    found = (user for name in unlisted for user in _users_not_counted(config, policy, name, Uses.REQUEST))
    if users := list(dict.fromkeys(found)):
        text = (
            f"images, speech and transcripts of models that report no tokens ({', '.join(unlisted)} and others) are "
            f"free for {shown(users)}, whose quotas count only tokens; write requests in one of the quotas"
        )
        yield Finding(("unmatched",), text)


def _users_not_counted(config: Config, policy: Policy, model: str, certain: Uses) -> list[str]:
    """The users who can call this model, and whose quotas for it count nothing of a call that uses `certain`.

    `policy` is that of the file with `unmatched: refuse`. Thousands of users have few different sets of groups, so
    each set is looked at once.
    """
    not_counted = {
        groups
        for groups in {user.groups for user in config.users}
        if policy.serves(groups, model, config.catalog) and policy.binding(groups, model, certain) is None
    }
    return [user.name for user in config.users if user.groups in not_counted]


def _exact_output_quota(config: Config, model: str) -> Quota | None:
    """The first exact quota on this model's output that applies to a user."""
    members = members_of(config)
    quotas = (
        quota for group in config.policy.groups.values() if members[group.name] for quota in group.quotas_for(model)
    )
    return next(filter(_counts_output_exactly, quotas), None)


def _counts_output_exactly(quota: Quota) -> bool:
    return quota.enforce == "exact" and any(limit.measure.counts_output for limit in quota.limits)


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


def missing_programs(config: Config) -> tuple[Diagnostic, ...]:
    """Warnings about commands of keys whose programs this machine does not have.

    Apart from the others, because those are also given to administrators who send a text: it must not be able to look
    for files here.
    """
    findings = (
        finding_at(
            ("upstreams", name, "api_key", "command", 0),
            "this machine has no such program; install it, or write its whole path",
        )
        for name, upstream in config.catalog.upstreams.items()
        if isinstance(upstream.api_key, KeyCommand) and which(upstream.api_key.program) is None
    )
    return tuple(sorted(map(config.document.locate, findings)))


def _network_settings_without_effect(config: Config) -> Warnings:
    several = {
        target.upstream.name
        for model in (config.catalog.models or {}).values()
        for target in model.targets
        if model.others
    }
    for name, upstream in config.catalog.upstreams.items():
        transport, path = upstream.transport, ("upstreams", name)
        first_byte_ms = transport.first_byte_timeout_ms
        if transport.ca is not None and upstream.base_url.startswith("http:"):
            yield finding_at((*path, "ca"), "base_url has http://, so there is no certificate to check; remove this")
        if first_byte_ms is None:
            continue
        if first_byte_ms >= transport.idle_timeout_ms:
            text = "idle_timeout ends the call before this time; write a shorter one"
        elif name not in several:
            text = (
                "no model has another upstream beside this one, so a call fails after this time instead of being "
                "moved; add one to upstreams of a model, or remove this"
            )
        elif first_byte_ms >= config.policy.retry_for_ms:
            text = "retry_for is over by then, so a call fails instead of being moved; write a shorter one"
        else:
            continue
        yield finding_at((*path, "first_byte_timeout"), text)


def _secrets_in_plain_text(config: Config) -> Warnings:
    for path, node in config.document.walk():
        if not node.is_interpolated and _is_plain_secret(path, node.value):
            yield finding_at(path, "this secret is in plain text; write ${NAME} or ${file:/path} for it")


def _is_plain_secret(path: KeyPath, value: object) -> bool:
    match path:
        case ("admin_keys", _) | ("users", _, "keys", _):
            return not isinstance(value, dict) and not str(value).startswith("sha256:")
        case ("admin_keys", _, "key") | ("users", _, "keys", _, "key") | ("identity", "headers", _, "key"):
            return not str(value).startswith("sha256:")
        case ("upstreams", _, "api_key"):
            return not isinstance(value, dict)
        case ("upstreams", _, "api_key", "oauth", "client_secret") | ("identity", "headers", _, "signed", "secret"):
            return True
        case ("upstreams", _, "headers", name):
            return _NAME_OF_SECRET.search(str(name)) is not None
        case ("upstreams", _, "proxy"):
            return urlsplit(str(value)).password is not None
        case ("database",):
            url = urlsplit(str(value))
            return url.password is not None or "password" in dict(parse_qsl(url.query))
    return False
