"""What a policy that was taken will do: warnings for what can't do what it seems to, and a plain sentence per group.

A warning is never wrong: it is given only where the file alone decides (a quota that can never refuse anybody, a
group that nobody is in), and left out where it depends on what is called. Windows that open with the first call are
the example: 60k in 6h can refuse although 50k in 7d stands beside it, since 6 hours may span two of those weeks.
"""

from collections.abc import Iterator
from ipaddress import ip_address
from urllib.parse import urlsplit

from proxy.config.document import Diagnostic, KeyPath
from proxy.config.loader import Config
from proxy.config.messages import placed
from proxy.formats.estimate import SMALLEST_ANSWER
from proxy.policy.policy import DEFAULT, EVERYONE, Group, Model, Policy, User, enforced
from proxy.policy.quota import Globs, Limit, Quota
from proxy.policy.windows import Calendar

Warnings = Iterator[tuple[KeyPath, str]]

_NAMES_SHOWN = 5

# Which calendar windows lie wholly inside which: a week does not lie inside a month.
_INSIDE = {
    "minute": ("minute", "hour", "day", "week", "month", "quarter", "year"),
    "hour": ("hour", "day", "week", "month", "quarter", "year"),
    "day": ("day", "week", "month", "quarter", "year"),
    "week": ("week",),
    "month": ("month", "quarter", "year"),
    "quarter": ("quarter", "year"),
    "year": ("year",),
}
_SUFFIXES = {"s": "second", "m": "minute", "h": "hour", "d": "day", "w": "week"}
_ALL_USERS = {EVERYONE: ", whatever the group,", DEFAULT: " whose own groups have no quota for the model"}
_MEMBERS = {0: "its members (nobody in this file)", 1: "its one member"}
_MANNER = {"exact": "", "after": " (counted when calls have ended)", "shadow": " (only watched)"}


def warnings(config: Config) -> tuple[Diagnostic, ...]:
    """What is allowed but probably not meant, each with its line."""
    policy = config.policy
    found = [
        *_of_groups(policy),
        *_of_users(policy),
        *_of_limits(policy),
        *_idle_quotas(policy),
        *_escaping_models(policy),
        *_endless_models(policy),
        *_of_upstreams(policy),
        *_plain_secrets(config),
    ]
    return tuple(sorted(config.document.mistake(path, text) for path, text in found))


def sentences(policy: Policy) -> tuple[str, ...]:
    """What each group may do, in one plain sentence, in the policy's order."""
    members = _members(policy)
    return tuple(_sentence(group, len(members[group.name])) for group in policy.groups.values())


# ------------------------------------------------------------------------------------------------- groups and users


def _members(policy: Policy) -> dict[str, list[User]]:
    """Who is in which group; `everyone` and `default` are for all users."""
    members: dict[str, list[User]] = {name: [] for name in policy.groups}
    for user in policy.users.values():
        for group in user.groups:
            members[group].append(user)
    return members | {name: list(policy.users.values()) for name in (EVERYONE, DEFAULT) if name in members}


def _of_groups(policy: Policy) -> Warnings:
    members = _members(policy)
    for group in policy.groups.values():
        path: KeyPath = ("groups", group.name)
        if not members[group.name] and group.name not in (EVERYONE, DEFAULT):
            yield path, f'nobody in this file is in group "{group.name}"'
        if not group.quotas and not group.unlimited and group.models is None:
            yield path, f'group "{group.name}" states nothing: no quotas, no models, not unlimited'
        if group.models and not _meet(policy, group.models, None):
            yield (*path, "models"), f'the models of group "{group.name}" match none of those listed under models'
    default = policy.groups.get(DEFAULT)
    if default and policy.users and all(_always_has_a_say(policy, user) for user in policy.users.values()):
        yield ("groups", DEFAULT), "default binds nobody: each user has a group with a quota for every model"


def _always_has_a_say(policy: Policy, user: User) -> bool:
    """Whether one of this user's groups says something about any model whatever."""
    groups = (policy.groups[name] for name in user.groups)
    return any(
        _is_for_all(group.models)
        and (group.unlimited or any(_is_for_all(quota.models) for quota in enforced(group.quotas)))
        for group in groups
    )


def _is_for_all(globs: Globs | None) -> bool:
    return globs is None or "*" in globs.texts


def _of_users(policy: Policy) -> Warnings:
    if policy.unmatched == "allow" or any(_speaks(policy, name) for name in (EVERYONE, DEFAULT)):
        return
    refused = [user.name for user in policy.users.values() if not any(_speaks(policy, name) for name in user.groups)]
    if refused:
        shown = ", ".join(refused[:_NAMES_SHOWN])
        more = f" and {len(refused) - _NAMES_SHOWN} more" if len(refused) > _NAMES_SHOWN else ""
        text = "no quota covers them, so every call is refused: put them in a group, or add a group called default"
        yield ("users", refused[0]), f"{shown}{more}: {text}"


def _speaks(policy: Policy, name: str) -> bool:
    """Whether this group has a quota for anything, or lets everything in."""
    group = policy.groups.get(name)
    return group is not None and bool(group.quotas or group.unlimited)


# ----------------------------------------------------------------------------------------------------------- quotas


def _quotas(policy: Policy) -> Iterator[tuple[KeyPath, Group, Quota]]:
    for group in policy.groups.values():
        for quota in group.quotas:
            yield ("groups", group.name, "quotas", quota.name), group, quota


def _of_limits(policy: Policy) -> Warnings:
    for path, group, quota in _quotas(policy):
        for limit in quota.limits:
            if limit.maximum == 0:
                yield (*path, limit.measure), f"{quota.id}: {_words(limit)} refuse every call that it binds"
            elif quota.enforce == "exact" and _is_of_answers(limit) and limit.maximum < _least(policy, group, quota):
                text = f"calls that ask for a longer answer than {limit.maximum:,} tokens are never let in"
                yield (*path, limit.measure), f"{quota.id}: {text}"


def _is_of_answers(limit: Limit) -> bool:
    return limit.measure in ("tokens", "output_tokens")


def _least(policy: Policy, group: Group, quota: Quota) -> int:
    """The smallest answer that is started, of any model that this quota reaches."""
    reached = [model for name, model in (policy.models or {}).items() if quota in group.quotas_for(name)]
    return min((model.smallest_answer or SMALLEST_ANSWER for model in reached), default=SMALLEST_ANSWER)


def _idle_quotas(policy: Policy) -> Warnings:
    """Quotas that can never refuse anybody. Those that only watch are meant not to."""
    members = _members(policy)
    for path, group, quota in _quotas(policy):
        if quota.enforce == "shadow":
            continue
        if not _meet(policy, quota.models, group.models):
            yield path, f"{quota.id} can never refuse anybody: it matches no model that its group can use"
        elif way := _way_around(policy, group, members[group.name]):
            yield path, f"{quota.id} can never refuse anybody: all its members are also in {way}, which is unlimited"
        elif tighter := _tighter(policy, group, quota, members[group.name]):
            yield path, f"{quota.id} can never refuse anybody: {tighter.id} is used up first"


def _meet(policy: Policy, globs: Globs, within: Globs | None) -> bool:
    """Whether some model may match both. Two patterns may always meet in a name that stands nowhere."""
    if policy.models is not None and "*" not in policy.models:
        return any(globs.match(model) and (within is None or within.match(model)) for model in policy.models)
    if within is None:
        return True
    if _are_names(globs):
        return any(within.match(name) for name in globs.texts)
    return not _are_names(within) or any(globs.match(name) for name in within.texts)


def _are_names(globs: Globs) -> bool:
    return not any(sign in text for text in globs.texts for sign in "*?[")


def _way_around(policy: Policy, group: Group, members: list[User]) -> str | None:
    """An unlimited group that lets in whoever this group would refuse."""
    if policy.combine == "every_group" or group.name in (EVERYONE, DEFAULT) or not members:
        return None
    unlimited = [name for name, other in policy.groups.items() if other.unlimited and _is_for_all(other.models)]
    return next((name for name in unlimited if all(name in user.groups for user in members)), None)


def _tighter(policy: Policy, group: Group, quota: Quota, members: list[User]) -> Quota | None:
    """A quota of the same group that is used up before this one, whatever is called."""
    together = (
        quota.shared
        or policy.combine == "every_group"
        or group.name in (EVERYONE, DEFAULT)
        or all(user.groups == (group.name,) for user in members)
    )
    if not together:  # calls through another group are charged to each quota by itself, if it has room
        return None
    place = group.quotas.index(quota)
    for index, other in enumerate(group.quotas):
        is_twin = (other.limits, other.models, other.per) == (quota.limits, quota.models, quota.per)
        if index != place and not (is_twin and index > place) and _is_used_up_before(other, quota):
            return other
    return None


def _is_used_up_before(tight: Quota, loose: Quota) -> bool:
    maxima = {limit.measure: limit.maximum for limit in tight.limits}
    return (
        tight.enforce == "exact"
        and tight.shared == loose.shared
        and set(tight.models.texts) in ({"*"}, set(loose.models.texts))
        and _spans(tight, loose)
        and all(maxima.get(limit.measure, limit.maximum + 1) <= limit.maximum for limit in loose.limits)
    )


def _spans(long: Quota, short: Quota) -> bool:
    """Whether each window of the one lies inside a window of the other."""
    if isinstance(long.per, Calendar) and isinstance(short.per, Calendar):
        return long.per.text in _INSIDE[short.per.text]
    # Both open with the same call only if both count the same.
    same_calls = {limit.measure for limit in long.limits} == {limit.measure for limit in short.limits}
    return long.per == short.per and same_calls and long.models == short.models


# --------------------------------------------------------------------------------------------- models and upstreams


def _escaping_models(policy: Policy) -> Warnings:
    """Other names of a model that a quota doesn't match, though it matches the model under its own name."""
    members = _members(policy)
    for path, group, quota in _quotas(policy):
        for alias, known in _aliases(policy, quota):
            has_its_own = any(other.models.match(alias) and not other.models.match(known) for other in group.quotas)
            bound = (user for user in members[group.name] if _is_bound(policy, user, known, quota))
            if not has_its_own and any(policy.serves(user, alias) for user in bound):
                text = f'it matches "{known}" but not "{alias}", which is the same model; add "{alias}" to its models'
                yield path, f"{quota.id}: {text}"


def _is_bound(policy: Policy, user: User, model: str, quota: Quota) -> bool:
    binding = policy.binding(user, model)
    return binding is not None and quota in binding.quotas


def _aliases(policy: Policy, quota: Quota) -> Iterator[tuple[str, str]]:
    """Names that the quota doesn't match, each with a name of the same model that it does."""
    models = [place for model in _named(policy).values() for place in model.everywhere]
    matched = {_served(model): model.name for model in models if quota.models.match(model.name)}
    found: dict[tuple[str, str], None] = {}  # each once, however many upstreams show it
    for model in models:
        known = matched.get(_served(model))
        if known and quota.models.match(model.upstream_model) and not quota.models.match(model.name):
            found[model.name, known] = None
    yield from found


def _named(policy: Policy) -> dict[str, Model]:
    """The models by each name that clients can call: with an open list also by the upstream's own."""
    listed = {name: model for name, model in (policy.models or {}).items() if name != "*"}
    served = {place.upstream_model for model in listed.values() for place in model.everywhere}
    own = {name: policy.model(name) for name in sorted(served)}
    return listed | {name: model for name, model in own.items() if model is not None}


def _served(model: Model) -> tuple[str, str]:
    return model.upstream.name, model.upstream_model


def _endless_models(policy: Policy) -> Warnings:
    """Models of which nobody says how long an answer may become, so that one may take a quota over its limit."""
    for name, model in (policy.models or {}).items():
        # Anthropic takes no call without a maximum.
        is_bounded = all(place.upstream.kind in ("simulator", "anthropic") for place in model.everywhere)
        is_known = model.max_output_tokens is not None or is_bounded
        # What makes embeddings writes no answers. It is known by its name alone.
        if name == "*" or is_known or "embed" in model.upstream_model:
            continue
        if quota := _exact_quota_of_answers(policy, name):
            text = f"a whole answer may take {quota.id} over its limit if its call states no maximum"
            yield ("models", name), f"{text}; write max_output_tokens"


def _exact_quota_of_answers(policy: Policy, model: str) -> Quota | None:
    """The first quota that promises never to be over, on what this model writes for somebody."""
    members = _members(policy)
    quotas = (quota for group in policy.groups.values() if members[group.name] for quota in group.quotas_for(model))
    return next(
        (quota for quota in quotas if quota.enforce == "exact" and any(map(_is_of_answers, quota.limits))), None
    )


def _of_upstreams(policy: Policy) -> Warnings:
    for name, upstream in policy.upstreams.items():
        host = urlsplit(upstream.base_url).hostname or ""
        try:
            is_link_local = ip_address(host).is_link_local
        except ValueError:
            continue
        if is_link_local:
            yield (
                ("upstreams", name, "base_url"),
                f"{host} is link-local: cloud machines give out their credentials there",
            )


def _plain_secrets(config: Config) -> Warnings:
    for path, value in config.document.scalars():
        if not config.document.is_interpolated(path) and _is_plain_secret(path, str(value)):
            yield path, placed(path, "a secret stands here in plain; write ${NAME} or ${file:/path} for it")


def _is_plain_secret(path: KeyPath, value: str) -> bool:
    match path:
        case ("admin_keys", _) | ("users", _, "keys", _):
            return not value.startswith("sha256:")
        case ("upstreams", _, "api_key"):
            return True
        case ("database",):
            return urlsplit(value).password is not None
    return False


# -------------------------------------------------------------------------------------------------------- sentences


def _sentence(group: Group, members: int) -> str:
    within = f"; of models only {', '.join(group.models.texts)}" if group.models else ""
    if group.unlimited:
        return f"{group.name}: {_each(group, members)} may use any model without limit{within}."
    own = [_allowance(quota) for quota in group.quotas if not quota.shared]
    pots = [_allowance(quota) for quota in group.quotas if quota.shared]
    parts = [f"{_each(group, members)} may use {', and '.join(own)}"] if own else []
    parts += [f"{_all(group, members)} may use {', and '.join(pots)}"] if pots else []
    return f"{group.name}: {'; '.join(parts) or 'no quotas'}{within}."


def _each(group: Group, members: int) -> str:
    if group.name in _ALL_USERS:
        return f"every user{_ALL_USERS[group.name]}"
    return _MEMBERS.get(members, f"each of {members:,} members")


def _all(group: Group, members: int) -> str:
    if group.name in _ALL_USERS:
        return f"all users{_ALL_USERS[group.name]} together"
    return _MEMBERS.get(members, f"all {members:,} members together")


def _allowance(quota: Quota) -> str:
    *others, last = [_words(limit) for limit in quota.limits]
    words = f"{', '.join(others)} and {last}" if others else last
    amount = f"{words} {_window(quota)}{_MANNER[quota.enforce]}"
    return f"{amount} of any model" if _is_for_all(quota.models) else f"on {', '.join(quota.models.texts)}: {amount}"


def _words(limit: Limit) -> str:
    words = limit.measure.replace("_", " ")
    return f"{limit.maximum:,} {words if limit.maximum != 1 else words.removesuffix('s')}"


def _window(quota: Quota) -> str:
    if isinstance(quota.per, Calendar):
        return "an hour" if quota.per.text == "hour" else f"a {quota.per.text}"
    number, unit = quota.per.text[:-1], _SUFFIXES[quota.per.text[-1]]
    return f"in {number} {unit}{'' if number == '1' else 's'} from the first call"
