"""Everything that the file says, as one value: users, groups, upstreams, models, and which quotas bind whom.

A policy is built from a whole file and never changed. A reload replaces it as a whole; a call keeps the policy with
which it began.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from zoneinfo import ZoneInfo

from proxy.policy.quota import ALL_MODELS, Binding, Combine, Globs, GroupQuotas, Quota

OnDisconnect = Literal["drain", "stop"]

EVERYONE = "everyone"
DEFAULT = "default"

# Model names come from clients. An open list of models accepts any name, so the cache of bindings is bounded.
_BINDINGS_MAX = 4096


class Secret:
    """A string whose `repr` hides it from logs, tracebacks and dumps. Only `reveal()` returns it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The string itself, for the code that sends it."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)


def digest(key: str) -> str:
    """SHA-256 of a key, in hex. Keys are long and random, so a plain hash cannot be reversed by trying keys."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Allow:
    """Features that requests may use although they cost, or reach, more than quotas can count.

    - `tools`: types of tools that the upstream runs itself.
    - `service_tiers`: values of `service_tier` beside the usual ones.
    - `betas`: Anthropic's betas that users may ask for.
    - `store`: whether the upstream may keep answers.
    """

    tools: frozenset[str] = frozenset()
    service_tiers: frozenset[str] = frozenset()
    betas: frozenset[str] = frozenset()
    store: bool = True


@dataclass(frozen=True, slots=True)
class Upstream:
    """A server that calls are forwarded to.

    `base_url` includes `/v1` and does not end with a slash. `api_version` is Azure's, for calls that name none.
    """

    name: str
    base_url: str
    api_key: Secret | None
    kind: str = "openai"
    on_disconnect: OnDisconnect = "drain"
    api_version: str | None = None
    allow: Allow = Allow()


@dataclass(frozen=True, slots=True)
class Model:
    """A model as clients name it, where it is served, and what is known about it (in tokens).

    - `reasoning`: whether it generates reasoning tokens that its answer does not show. None: its name decides.
    - `smallest_answer`: the shortest answer that is worth starting. None: 1,024.
    - `allow`: what its requests may use. None: what its upstream allows.
    - `others`: the same model at other upstreams. Calls are distributed over those that are available in proportion
      to `weight`. One with weight 0 gets a call only if no other takes it.
    """

    name: str
    upstream: Upstream
    upstream_model: str
    max_output_tokens: int | None = None
    context: int | None = None
    encoding: str | None = None
    reasoning: bool | None = None
    smallest_answer: int | None = None
    weight: int = 1
    others: tuple["Model", ...] = ()
    allow: Allow | None = None

    @property
    def targets(self) -> tuple["Model", ...]:
        """The model at each upstream that serves it, in the order of the file."""
        return (self, *self.others)

    @property
    def allows(self) -> Allow:
        """What its requests may use there: its own `allow` as a whole if it has one, else that of its upstream."""
        return self.upstream.allow if self.allow is None else self.allow

    def named(self, name: str) -> "Model":
        """This model under another name, at the same upstreams: what the entry "*" gives for an unlisted name."""
        others = tuple(other.named(name) for other in self.others)
        return Model(name, self.upstream, name, weight=self.weight, others=others)


@dataclass(frozen=True, slots=True)
class Group:
    """A named set of users with quotas. `models` are those that its members may use; None: it has no list."""

    name: str
    quotas: tuple[Quota, ...] = ()
    models: Globs | None = None
    unlimited: bool = False

    def quotas_for(self, model: str) -> tuple[Quota, ...]:
        """Its quotas that match this model. If the group has a list of models, the model must be on that too."""
        if self.models is not None and not self.models.match(model):
            return ()
        return tuple(quota for quota in self.quotas if quota.models.match(model))

    def is_unlimited_for(self, model: str) -> bool:
        """Whether it admits any number of calls to this model."""
        return self.unlimited and (self.models is None or self.models.match(model))


@dataclass(frozen=True, slots=True)
class User:
    """A user. `groups` are in the policy's order, without `everyone` and `default`."""

    name: str
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Keep:
    """How long usage records are kept, in ms (None: for ever): those of calls, and the sums of each day."""

    calls_ms: int | None = 90 * 86_400_000
    days_ms: int | None = 1100 * 86_400_000


@dataclass(frozen=True)
class Policy:
    """Everything that decides about a call.

    `models` is a closed list, unless it is None (any name goes to `default_upstream`) or has an entry "*".
    """

    groups: Mapping[str, Group]
    users: Mapping[str, User]
    key_digests: Mapping[str, str] = field(repr=False)
    upstreams: Mapping[str, Upstream] = field(default_factory=dict)
    models: Mapping[str, Model] | None = None
    default_upstream: Upstream | None = None
    combine: Combine = "any_group"
    unmatched: Literal["refuse", "allow"] = "refuse"
    wait_s: float = 30.0
    ledger_wait_s: float = 10.0
    retry_for_ms: int = 30_000
    keep: Keep = Keep()
    zone: ZoneInfo = field(default_factory=lambda: ZoneInfo("UTC"))
    help: str = ""
    admin_digests: Mapping[str, str] = field(default_factory=dict, repr=False)
    hash: str = ""

    # A cache that lives as long as the policy, so a reload cannot leave a stale binding behind.
    _bindings: dict[tuple[str, str], Binding | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def binding(self, user: User, model: str) -> Binding | None:
        """The quotas that bind this user on this model; None if there are none and `unmatched` is `refuse`."""
        key = (user.name, model)
        if key not in self._bindings:
            if len(self._bindings) >= _BINDINGS_MAX:
                self._bindings.clear()
            self._bindings[key] = self._bind(user, model)
        return self._bindings[key]

    def model(self, name: str) -> Model | None:
        """The model that a client means by `name`; None if the list is closed and does not contain it."""
        listed = (self.models or {}).get(name)
        if listed is not None and name != "*":
            return listed
        # A client may ask for a model that is called "*". It gets what any unlisted name gets, not the entry itself.
        anything = (self.models or {}).get("*")
        if anything is not None:
            return anything.named(name)
        upstream = self.default_upstream if self.models is None else None
        return Model(name, upstream, name) if upstream else None

    def may_use(self, user: User, model: str) -> bool:
        """Whether the user may use this model: the union of the lists of the user's groups, or all without a list."""
        lists = [group.models for group in self._groups_of(user) if group.models is not None]
        return not lists or any(globs.match(model) for globs in lists)

    def serves(self, user: User, model: str) -> bool:
        """Whether this user can call this model: it exists, the user may use it, and a binding covers it."""
        return self.model(model) is not None and self.may_use(user, model) and self.binding(user, model) is not None

    def all_quotas(self, user: User) -> Binding:
        """Every quota that can bind this user on some model, for `/v1/quota`, which is asked without a model."""
        groups = [self.groups[name] for name in user.groups]
        stated = {text for group in self._groups_of(user) if group.models is not None for text in group.models.texts}
        # `default` is left out only if one group of the user applies to every model that the user may use.
        if not any(_applies_to_all(group, stated) for group in groups) and DEFAULT in self.groups:
            groups.append(self.groups[DEFAULT])
        everyone = self.groups.get(EVERYONE, Group(EVERYONE))
        return Binding(user.name, everyone.quotas, tuple(GroupQuotas(group.name, group.quotas) for group in groups))

    def _groups_of(self, user: User) -> list[Group]:
        """The groups whose lists of models count: `everyone` and the user's own, or `default` without own ones."""
        names = (EVERYONE, *(user.groups or (DEFAULT,)))
        return [self.groups[name] for name in names if name in self.groups]

    def _bind(self, user: User, model: str) -> Binding | None:
        always = self._quotas(EVERYONE, model)
        own = [self.groups[name] for name in user.groups]
        # `default` is for models that the user's own groups do not cover. If `staff` only has a quota for "gpt-*",
        # its members are bound by `staff` on "gpt-4o" and by `default` on "o3".
        if DEFAULT in self.groups and not any(_applies_to(group, model) for group in own):
            own.append(self.groups[DEFAULT])
        everything = (*always, *(quota for group in own for quota in group.quotas_for(model)))
        groups = tuple(
            GroupQuotas(group.name, enforced(group.quotas_for(model))) for group in own if _applies_to(group, model)
        )
        # Quotas in shadow alone make a binding without any quota that refuses: the model is covered, and the call
        # admitted.
        if not everything and not groups and self.unmatched == "refuse":
            return None
        return Binding(
            user=user.name,
            always=enforced(always),
            groups=groups,
            shadows=tuple(quota for quota in everything if quota.enforce == "shadow"),
            combine=self.combine,
        )

    def _quotas(self, group: str, model: str) -> tuple[Quota, ...]:
        return self.groups[group].quotas_for(model) if group in self.groups else ()


def enforced(quotas: tuple[Quota, ...]) -> tuple[Quota, ...]:
    """The quotas that can refuse a call: all but those in shadow."""
    return tuple(quota for quota in quotas if quota.enforce != "shadow")


def _applies_to(group: Group, model: str) -> bool:
    """Whether a group is unlimited for this model or has an enforced quota for it.

    A group with nothing but quotas in shadow does not apply. It would have no quota that can refuse, so in
    `any_group` it would admit what the user's other groups, or `default`, refuse.
    """
    return group.is_unlimited_for(model) or bool(enforced(group.quotas_for(model)))


def _applies_to_all(group: Group, stated: set[str]) -> bool:
    """Whether a group applies to every model that the patterns in `stated` allow; no patterns allow every model.

    Patterns are compared as text: `models: ["gpt-*"]` is not seen to contain "gpt-4o". So the quotas of `default` can
    be shown to a user whom they never bind, but a quota that can bind is never left out.
    """
    has_all = group.unlimited or any(quota.models == ALL_MODELS for quota in enforced(group.quotas))
    return has_all and (group.models is None or (bool(stated) and stated <= set(group.models.texts)))
