"""The groups and their quotas, and which of them bind the members of groups on a model.

A policy is told a user's groups and never looks a user up (see `identity`). It is built as a whole and never changed.
A reload, or a change by an administrator, replaces it as a whole; a call that was admitted keeps the policy that
admitted it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal
from zoneinfo import ZoneInfo

from proxy.policy.amounts import Uses
from proxy.policy.binding import BoundQuotas, Combine, GroupQuotas
from proxy.policy.catalog import Catalog, MatchedName
from proxy.policy.quota import ALL_MODELS, Globs, Grants, Quota, grants_of_user

EVERYONE = "everyone"
DEFAULT = "default"

# Model names come from clients. An open list of models accepts any name, so the cache of bindings is bounded.
_BINDINGS_MAX = 4096


# Whether a quota refuses every call of a kind.
_IsClosed = Callable[[Quota], bool]


@dataclass(frozen=True, slots=True)
class Group:
    """A named set of users with quotas. `models` are those that its members may use; None: it has no list."""

    name: str
    quotas: tuple[Quota, ...] = ()
    models: Globs | None = None
    unlimited: bool = False

    def quotas_for(self, model: MatchedName) -> tuple[Quota, ...]:
        """Its quotas that match this model. If the group has a list of models, the model must be on that too."""
        if self.models is not None and not self.models.match(model):
            return ()
        return tuple(quota for quota in self.quotas if quota.models.match(model))

    def closing(self, is_closed: _IsClosed) -> tuple[Quota, ...]:
        """Its quotas that refuse every call of a kind to every one of its models, because of limits of 0."""
        return tuple(quota for quota in self.quotas if quota.models == ALL_MODELS and is_closed(quota))

    def is_unlimited_for(self, model: MatchedName) -> bool:
        """Whether it admits any number of calls to this model."""
        return self.unlimited and (self.models is None or self.models.match(model))


@dataclass(frozen=True, slots=True)
class Keep:
    """How long records are kept, in ms (None: for ever): those of calls, the sums of each day, and the audit log."""

    calls_ms: int | None = 90 * 86_400_000
    days_ms: int | None = 1100 * 86_400_000
    audit_ms: int | None = 1100 * 86_400_000


@dataclass(frozen=True)
class Policy:
    """Everything that decides whether a call is admitted.

    Methods take the `groups` of a user: names of groups of this policy, in its order, without `everyone` and
    `default`. `grants` may have some that have ended: each counts by the clock.
    """

    groups: Mapping[str, Group]
    combine: Combine = "any_group"
    unmatched: Literal["refuse", "allow"] = "refuse"
    wait_s: float = 30.0
    ledger_wait_s: float = 10.0
    retry_for_ms: int = 30_000
    keep: Keep = Keep()
    grants: Grants = field(default_factory=dict)
    zone: ZoneInfo = field(default_factory=lambda: ZoneInfo("UTC"))
    help: str = ""
    self_service: bool = True  # whether users can see their own quotas and usage
    hash: str = ""

    # A cache that lives as long as the policy, so a reload cannot leave a stale result behind. It does not know the
    # names of users: if ann is in `staff` today and in `lab` tomorrow, another entry is found for her.
    _bound: dict[tuple[tuple[str, ...], MatchedName, Uses], BoundQuotas | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def binding(
        self, groups: tuple[str, ...], model: MatchedName, certain: Uses = Uses.INPUT_AND_OUTPUT
    ) -> BoundQuotas | None:
        """The quotas that bind on this model; None if there are none and `unmatched` is `refuse`.

        `certain` is what a call is certain to be counted by. Less than the default is for calls that are billed by
        the piece: a group whose quotas count nothing of them is treated like a group with quotas for other models.
        Otherwise a group with a quota of tokens would admit any number of images that cost no tokens.
        """
        key = (groups, model, certain)
        if key not in self._bound:
            if len(self._bound) >= _BINDINGS_MAX:
                self._bound.clear()
            self._bound[key] = self._bind(*key)
        return self._bound[key]

    def may_use(self, groups: tuple[str, ...], model: MatchedName) -> bool:
        """Whether users may use this model: the union of the lists of their groups, or all models without a list."""
        lists = [group.models for group in self._groups_of(groups) if group.models is not None]
        return not lists or any(globs.match(model) for globs in lists)

    def serves(self, groups: tuple[str, ...], model: str, catalog: Catalog) -> bool:
        """Whether users can call this model: it exists, they may use it, and a binding covers it."""
        found = catalog.model(model)
        if found is None or not self.may_use(groups, found.matched_name):
            return False
        return self.binding(groups, found.matched_name) is not None

    def closing(
        self,
        groups: tuple[str, ...],
        catalog: Catalog,
        uses: Uses,
        *,
        user: str,
        now: int,
        by_piece: bool = False,
    ) -> tuple[Quota, ...]:
        """The quotas whose limits of 0 admit calls of this user that use this to no model at all, at `now` (ms).

        None if one may be admitted, because no limit is 0 or a grant raises it. The body of a user whom they refuse
        need not be read. If the list of models is open, this is decided only where it is certain for every name: by
        quotas for all models, in groups without a list of models.

        A call that is billed `by_piece` may use no tokens. Then a limit of 0 tokens does not refuse it, unless
        nothing covers such calls of this user.
        """
        if by_piece and self._may_cover_pieces(groups):
            uses = Uses.REQUEST
        grants = grants_of_user(self.grants, user)

        def is_closed(quota: Quota) -> bool:
            return quota.raised(grants.get(quota.id, ()), now).is_closed_for(uses)

        if catalog.models is None or "*" in catalog.models:
            found = [self._closing_on_any_model(groups, is_closed)]
        else:
            names = [name for name in catalog.names if self.may_use(groups, name)]
            bound = [self.binding(groups, name) for name in names]
            found = [each.closing(is_closed) for each in bound if each is not None]
        return tuple(dict.fromkeys(quota for quotas in found for quota in quotas)) if all(found) else ()

    def _may_cover_pieces(self, groups: tuple[str, ...]) -> bool:
        """Whether a call that uses no tokens may be admitted on some model."""
        names = (EVERYONE, DEFAULT, *groups)
        covering = (self.groups[name] for name in names if name in self.groups)
        return self.unmatched == "allow" or any(
            group.unlimited or any(quota.counts(Uses.REQUEST) for quota in enforced(group.quotas))
            for group in covering
        )

    def _closing_on_any_model(self, groups: tuple[str, ...], is_closed: _IsClosed) -> tuple[Quota, ...]:
        everyone = self.groups.get(EVERYONE, Group(EVERYONE))
        if everyone.models is None and (closing := everyone.closing(is_closed)):
            return closing
        own = [group for group in map(self.groups.__getitem__, groups) if group.unlimited or enforced(group.quotas)]
        if not own and DEFAULT in self.groups:  # `default` is for users none of whose groups has a say
            own = [self.groups[DEFAULT]]
        # One that applies to every model, so that `default` or `unmatched` never decides.
        if not any(group.models is None and group.closing(is_closed) for group in own):
            return ()
        if self.combine == "any_group" and not all(group.closing(is_closed) for group in own):
            return ()
        return tuple(quota for group in own for quota in group.closing(is_closed))

    def model_names(self, groups: tuple[str, ...]) -> tuple[str, ...]:
        """The plain names in the quotas and lists of models of these groups, `everyone` and `default`.

        Whether the users may call them is not checked.
        """
        return tuple(dict.fromkeys(name for globs in self._globs_of(groups) for name in globs.names))

    def model_patterns(self, groups: tuple[str, ...]) -> tuple[str, ...]:
        """The patterns there that are no plain names, with `*` before all others. Nothing is checked either."""
        patterns = (text for globs in self._globs_of(groups) for text in globs.patterns)
        return tuple(dict.fromkeys(("*", *patterns)))

    def _globs_of(self, groups: tuple[str, ...]) -> list[Globs]:
        found = [self.groups[name] for name in (EVERYONE, *groups, DEFAULT) if name in self.groups]
        lists = [group.models for group in found if group.models is not None]
        return lists + [quota.models for group in found for quota in group.quotas]

    def all_quotas(self, groups: tuple[str, ...]) -> BoundQuotas:
        """Every quota that can bind on some model, for `/v1/quota`, which is asked without a model."""
        own = [self.groups[name] for name in groups]
        stated = {
            text for group in self._groups_of(groups) if group.models is not None for text in group.models.texts
        }
        default = self.groups.get(DEFAULT)
        if default is not None and _default_may_apply(default, own, stated):
            own.append(default)
        everyone = self.groups.get(EVERYONE, Group(EVERYONE))
        bound = tuple(GroupQuotas(group.name, group.quotas) for group in own)
        return BoundQuotas(
            everyone.quotas,
            bound,
            grants=self._grants_on(quota for group in (everyone, *own) for quota in group.quotas),
        )

    @cached_property
    def quotas(self) -> Mapping[str, Quota]:
        """The quotas of all groups by their ids, in the order of the groups."""
        return {quota.id: quota for group in self.groups.values() for quota in group.quotas}

    def bound(self, *quotas: Quota) -> BoundQuotas:
        """These quotas alone, all of which must have room, with their grants."""
        return BoundQuotas(quotas, grants=self._grants_on(quotas))

    def _grants_on(self, quotas: Iterable[Quota]) -> Grants:
        return {quota.id: found for quota in quotas if (found := self.grants.get(quota.id))} if self.grants else {}

    def _groups_of(self, groups: tuple[str, ...]) -> list[Group]:
        """The groups whose lists of models count: `everyone` and the user's own, or `default` without own ones."""
        names = (EVERYONE, *(groups or (DEFAULT,)))
        return [self.groups[name] for name in names if name in self.groups]

    def _bind(self, groups: tuple[str, ...], model: MatchedName, certain: Uses) -> BoundQuotas | None:
        always = self._quotas(EVERYONE, model)
        own = [self.groups[name] for name in groups]
        # `default` is for models that the user's own groups do not cover. If `staff` only has a quota for "gpt-*",
        # its members are bound by `staff` on "gpt-4o" and by `default` on "o3".
        if DEFAULT in self.groups and not any(_applies_to(group, model, certain) for group in own):
            own.append(self.groups[DEFAULT])
        applying = self._applying_groups(own, model, certain)
        needs_no_other = self.unmatched == "allow" or any(quota.counts(certain) for quota in enforced(always))
        if not applying and certain is not Uses.INPUT_AND_OUTPUT and needs_no_other:
            # Whichever group admits the call, the quotas of everyone count it, or it need not be counted.
            return self.binding(groups, model)
        everything = (*always, *(quota for group in own for quota in group.quotas_for(model)))
        # Quotas in shadow alone make a binding without any quota that refuses: the model is covered, and the call
        # admitted. But a call that some quotas cannot count must be counted by one that is enforced.
        is_covered = bool(applying or (everything and certain is Uses.INPUT_AND_OUTPUT))
        if not is_covered and self.unmatched == "refuse":
            return None
        return BoundQuotas(
            always=enforced(always),
            groups=tuple(GroupQuotas(group.name, enforced(group.quotas_for(model))) for group in applying),
            shadows=tuple(quota for quota in everything if quota.enforce == "shadow"),
            combine=self.combine,
            grants=self._grants_on(everything),
        )

    def _applying_groups(self, own: list[Group], model: MatchedName, certain: Uses) -> list[Group]:
        """The groups of which one, or with `every_group` each, must have room; none if none counts the call."""
        applying = [group for group in own if _applies_to(group, model, certain)]
        if applying and self.combine == "every_group":
            return [group for group in own if _applies_to(group, model)]  # one of them counts the call
        return applying

    def _quotas(self, group: str, model: MatchedName) -> tuple[Quota, ...]:
        return self.groups[group].quotas_for(model) if group in self.groups else ()


def enforced(quotas: tuple[Quota, ...]) -> tuple[Quota, ...]:
    """The quotas that can refuse a call: all but those in shadow."""
    return tuple(quota for quota in quotas if quota.enforce != "shadow")


def _applies_to(group: Group, model: MatchedName, certain: Uses = Uses.INPUT_AND_OUTPUT) -> bool:
    """Whether a group is unlimited for this model or has an enforced quota for it that counts some of `certain`.

    A group with nothing but quotas in shadow does not apply. It would have no quota that can refuse, so in
    `any_group` it would admit what the user's other groups, or `default`, refuse.
    """
    return group.is_unlimited_for(model) or any(quota.counts(certain) for quota in enforced(group.quotas_for(model)))


def _default_may_apply(default: Group, own: list[Group], stated: set[str]) -> bool:
    """Whether there may be a call that `default` can count, and to which none of the user's own groups applies.

    A group that counts only tokens does not apply to calls that are billed by the piece.
    """
    return any(
        any(quota.counts(certain) for quota in default.quotas)
        and not any(_applies_to_all(group, stated, certain) for group in own)
        for certain in (Uses.REQUEST, Uses.OUTPUT, Uses.INPUT_AND_OUTPUT)
    )


def _applies_to_all(group: Group, stated: set[str], certain: Uses) -> bool:
    """Whether a group applies to every model that the patterns in `stated` allow; no patterns allow every model.

    Patterns are compared as text: `models: ["gpt-*"]` is not seen to contain "gpt-4o". So the quotas of `default` can
    be shown to a user whom they never bind, but a quota that can bind is never left out.
    """
    has_all = group.unlimited or any(
        quota.models == ALL_MODELS and quota.counts(certain) for quota in enforced(group.quotas)
    )
    return has_all and (group.models is None or (bool(stated) and stated <= set(group.models.texts)))
