"""The policy in force: who there is, which upstreams and models, and which quotas bind this user on this model.

A policy is a value. It is built whole from the file, swapped whole, and one call uses one policy to its end.
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

# Model names come from clients: with an open list there is no end of them, so what is remembered is bounded.
_BINDINGS_KEPT = 4096


class Secret:
    """A value that does not show itself in logs, tracebacks or dumps; `reveal()` is the one way to it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself, for the one place that sends it."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)


def digest(key: str) -> str:
    """SHA-256 of a key, in hex: keys are long and random, so a plain hash can't be searched back."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Allow:
    """What requests may use that costs, or reaches, beyond what quotas see.

    `tools` are types of tools of the upstream's own, `service_tiers` what `service_tier` may say beside the usual,
    `betas` those of Anthropic's that users may ask for, `store` whether the upstream may keep answers.
    """

    tools: frozenset[str] = frozenset()
    service_tiers: frozenset[str] = frozenset()
    betas: frozenset[str] = frozenset()
    store: bool = True


@dataclass(frozen=True, slots=True)
class Upstream:
    """A server that calls are forwarded to. `base_url` has no slash at its end and includes `/v1`.

    `api_version` is Azure's, for calls that name none.
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

    `reasoning` says whether it thinks in tokens that its answer doesn't show (None: as its name lets one expect).
    `smallest_answer` is the least that is worth starting for (None: 1024), `allow` goes before its upstream's.
    `others` are the same model elsewhere; of those that can be asked each gets its share by `weight`, and one of
    weight 0 only what nobody else takes.
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
        """What its requests may use there: as is said of it, else as of its upstream."""
        return self.upstream.allow if self.allow is None else self.allow

    def named(self, name: str) -> "Model":
        """What an open list makes of itself for a name that is not listed: at the same upstreams, by this name."""
        others = tuple(other.named(name) for other in self.others)
        return Model(name, self.upstream, name, weight=self.weight, others=others)


@dataclass(frozen=True, slots=True)
class Group:
    """A named set of users with quotas. `models` is what its members may use (None: it states nothing)."""

    name: str
    quotas: tuple[Quota, ...] = ()
    models: Globs | None = None
    unlimited: bool = False

    def quotas_for(self, model: str) -> tuple[Quota, ...]:
        """Its quotas that reach this model: their models within its own."""
        if self.models is not None and not self.models.match(model):
            return ()
        return tuple(quota for quota in self.quotas if quota.models.match(model))

    def is_unlimited_for(self, model: str) -> bool:
        """Whether it lets any number of calls to this model in."""
        return self.unlimited and (self.models is None or self.models.match(model))


@dataclass(frozen=True, slots=True)
class User:
    """Who is calling; `groups` in the policy's order, without `everyone` and `default`."""

    name: str
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Keep:
    """How long what was used is kept, in milliseconds; None for ever: each call, and the sums of each day."""

    calls_ms: int | None = 90 * 86_400_000
    days_ms: int | None = 1100 * 86_400_000


@dataclass(frozen=True)
class Policy:
    """Everything that decides about a call. `models` is a closed list unless it is None or has "*"."""

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

    # Remembered for as long as the policy lives, so a reload can't leave a stale one behind.
    _bindings: dict[tuple[str, str], Binding | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def binding(self, user: User, model: str) -> Binding | None:
        """Which quotas bind this user on this model; None where none does and `unmatched` is `refuse`."""
        key = (user.name, model)
        if key not in self._bindings:
            if len(self._bindings) >= _BINDINGS_KEPT:
                self._bindings.clear()
            self._bindings[key] = self._bind(user, model)
        return self._bindings[key]

    def model(self, name: str) -> Model | None:
        """The model that a client means by `name`; None where the list is closed and does not have it."""
        listed = (self.models or {}).get(name)
        if listed is not None and name != "*":
            return listed
        anything = (self.models or {}).get("*")
        if anything is not None:
            return anything.named(name)
        upstream = self.default_upstream if self.models is None else None
        return Model(name, upstream, name) if upstream else None

    def may_use(self, user: User, model: str) -> bool:
        """Whether the model lists of the user's groups allow it: their union; all, where none has a list."""
        lists = [group.models for group in self._groups_of(user) if group.models is not None]
        return not lists or any(globs.match(model) for globs in lists)

    def serves(self, user: User, model: str) -> bool:
        """Whether this user may call this model: it is there, allowed, and covered."""
        return self.model(model) is not None and self.may_use(user, model) and self.binding(user, model) is not None

    def all_quotas(self, user: User) -> Binding:
        """Every quota that can bind this user on some model, to be shown."""
        groups = [self.groups[name] for name in user.groups]
        stated = {text for group in self._groups_of(user) if group.models is not None for text in group.models.texts}
        if not any(_covers(group, stated) for group in groups) and DEFAULT in self.groups:
            groups.append(self.groups[DEFAULT])
        everyone = self.groups.get(EVERYONE, Group(EVERYONE))
        return Binding(user.name, everyone.quotas, tuple(GroupQuotas(group.name, group.quotas) for group in groups))

    def _groups_of(self, user: User) -> list[Group]:
        """The groups whose model lists count, `default` only for users in no other group."""
        names = (EVERYONE, *(user.groups or (DEFAULT,)))
        return [self.groups[name] for name in names if name in self.groups]

    def _bind(self, user: User, model: str) -> Binding | None:
        always = self._quotas(EVERYONE, model)
        own = [self.groups[name] for name in user.groups]
        if DEFAULT in self.groups and not any(self._has_a_say(group, model) for group in own):
            own.append(self.groups[DEFAULT])
        everything = (*always, *(quota for group in own for quota in group.quotas_for(model)))
        groups = tuple(
            GroupQuotas(group.name, enforced(group.quotas_for(model)))
            for group in own
            if self._has_a_say(group, model)
        )
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

    @staticmethod
    def _has_a_say(group: Group, model: str) -> bool:
        # A group whose quotas only watch must not open a way past those that bind.
        return group.is_unlimited_for(model) or bool(enforced(group.quotas_for(model)))


def enforced(quotas: tuple[Quota, ...]) -> tuple[Quota, ...]:
    """Those that may refuse: shadows only watch."""
    return tuple(quota for quota in quotas if quota.enforce != "shadow")


def _covers(group: Group, stated: set[str]) -> bool:
    """Whether a group has a say about each model that these lists allow (none of them: about any)."""
    says_all = group.unlimited or any(quota.models == ALL_MODELS for quota in enforced(group.quotas))
    return says_all and (group.models is None or (bool(stated) and stated <= set(group.models.texts)))
