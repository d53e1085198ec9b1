"""Which quotas bind a user on a model, how they are combined, and the flat rules that decisions read of them.

Rules are made once for the quotas that bind together, and are shared by all users whom these bind. Pure: no clock, no
SQL.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

from proxy.policy.amounts import TOKENS_MAX, Uses
from proxy.policy.quota import CounterKey, Grant, Grants, Limit, Quota, grants_of_user, user_subject

Combine = Literal["any_group", "every_group"]
# For how many sets of groups the same quotas are narrowed once, for keys that are limited to them.
_NARROWED_MAX = 64


@dataclass(frozen=True, slots=True)
class GroupQuotas:
    """The quotas of one of a user's groups for one model. No quotas: the group is unlimited for it."""

    group: str
    quotas: tuple[Quota, ...]


class BoundLimit(NamedTuple):
    """A limit in a decision. `measure` is the position of its number in `totals_of`."""

    limit: Limit
    measure: int
    maximum: int
    ceiling: int
    counts_input: bool
    counts_output: bool


class Rule(NamedTuple):
    """A quota in a decision.

    `position` is that of the quota in `CombinedQuotas.quotas`, and of its counter. `limits` are those that bind the
    call: they count something that it can use. `input_limits` are all that count input.
    """

    quota: Quota
    position: int
    is_after: bool
    limits: tuple[BoundLimit, ...]
    input_limits: tuple[BoundLimit, ...]


class OutputLimit(NamedTuple):
    """A limit that bounds the answer of a call: the fields are those of its rule and of its `BoundLimit`."""

    quota: Quota
    position: int
    measure: int
    ceiling: int
    counts_input: bool


class Alternative(NamedTuple):
    """Rules that must all have room.

    The `additional` rules are those of other groups, which count the call if they can. `output_limits` are the limits
    of `rules` that bound the answer, and `answer_limit` is the smallest limit that an answer must fit into.
    """

    group: str
    rules: tuple[Rule, ...]
    additional: tuple[Rule, ...]
    output_limits: tuple[OutputLimit, ...]
    answer_limit: int


class Rules:
    """All that decisions on calls of one kind read of the quotas that bind them: it is made once, and is flat.

    `exact` are the quotas with `enforce: exact`, and each of `shadows` is a quota in shadow by itself.
    """

    __slots__ = ("alternatives", "exact", "shadows")

    def __init__(self, quotas: "Combination", uses: Uses) -> None:
        rules = [_rule(quota, position, uses) for position, quota in enumerate(quotas.quotas)]
        rule_of = {id(rule.quota): rule for rule in rules}
        in_groups = [rule_of[id(quota)] for group in quotas.groups for quota in group.quotas]
        self.alternatives = tuple(
            _alternative(each.group, [rule_of[id(quota)] for quota in each.quotas], in_groups)
            for each in quotas.alternatives
        )
        self.exact = tuple(rule for rule in rules if rule.quota.enforce == "exact")
        self.shadows = tuple(_alternative(quota.group, [rule_of[id(quota)]], ()) for quota in quotas.shadows)


def _rule(quota: Quota, position: int, uses: Uses) -> Rule:
    limits = [
        BoundLimit(
            limit,
            limit.measure.position,
            limit.maximum,
            quota.ceiling(limit),
            limit.measure.counts_input,
            limit.measure.counts_output,
        )
        for limit in quota.limits
    ]
    return Rule(
        quota,
        position,
        quota.enforce == "after",
        tuple(each for each in limits if each.limit.measure in uses.measures),
        tuple(each for each in limits if each.counts_input),
    )


def _alternative(group: str, rules: Sequence[Rule], in_groups: Iterable[Rule]) -> Alternative:
    # Shared quotas are never additional. `team` shares 5M tokens among its members: a member whom `staff` can serve
    # does not use them up for the others.
    own = {rule.quota.id for rule in rules}
    additional = tuple(rule for rule in in_groups if rule.quota.id not in own and not rule.quota.shared)
    output_limits = tuple(
        OutputLimit(rule.quota, rule.position, limit.measure, limit.ceiling, limit.counts_input)
        for rule in rules
        if not rule.is_after
        for limit in rule.limits
        if limit.counts_output
    )
    answer_limit = min((rule.quota.answer_limit for rule in rules), default=TOKENS_MAX)
    return Alternative(group, tuple(rules), additional, output_limits, answer_limit)


class Combination:
    """What is computed once for quotas that bind together, and is the same for all users whom they bind."""

    __slots__ = ("alternatives", "groups", "narrowed", "quotas", "rules_by_use", "shadows")

    def __init__(self, of: "CombinedQuotas") -> None:
        in_groups = tuple(quota for group in of.groups for quota in group.quotas)
        self.groups, self.shadows = of.groups, of.shadows
        self.quotas = of.always + in_groups + of.shadows
        if of.combine == "every_group" and of.groups:
            together = GroupQuotas("+".join(group.group for group in of.groups), of.always + in_groups)
            self.alternatives: tuple[GroupQuotas, ...] = (together,)
        else:
            own = tuple(GroupQuotas(group.group, of.always + group.quotas) for group in of.groups)
            self.alternatives = own or (GroupQuotas("everyone", of.always),)
        self.rules_by_use: dict[Uses, Rules] = {}
        self.narrowed: dict[tuple[str, ...], Any] = {}  # by the names of the groups

    def rules(self, uses: Uses) -> Rules:
        """What decisions on calls that use this read of these quotas."""
        rules = self.rules_by_use.get(uses)
        if rules is None:
            rules = self.rules_by_use[uses] = Rules(self, uses)
        return rules


@dataclass(slots=True)
class CombinedQuotas:
    """Quotas that bind on one model, and how they are combined. It is a value, and never changed.

    `always` are the quotas of everyone. `groups` are the users' groups that have an enforced quota for the model or
    are unlimited for it, in the policy's order. `shadows` are the quotas in shadow: they only count, and never
    refuse.
    """

    always: tuple[Quota, ...] = ()
    groups: tuple[GroupQuotas, ...] = ()
    shadows: tuple[Quota, ...] = ()
    combine: Combine = "any_group"
    shared: InitVar["Combination | None"] = field(default=None, kw_only=True)
    # What is the same for all users whom these quotas bind.
    common: Combination = field(init=False, repr=False, compare=False)
    # All of its quotas, each once.
    quotas: tuple[Quota, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self, shared: "Combination | None") -> None:
        self.common = shared or Combination(self)
        self.quotas = self.common.quotas

    def narrowed(self, groups: Collection[str]) -> Self | None:
        """The same with these groups alone: what a key binds that is limited to them. None if none of them applies.

        With `every_group` all groups still bind, because a group that is left out would take a limit away.
        """
        kept = tuple([group for group in self.groups if group.group in groups])
        if not kept:
            return None
        if self.combine == "every_group":
            return self
        narrowed, names = self.common.narrowed, tuple([group.group for group in kept])
        if names not in narrowed:
            if len(narrowed) >= _NARROWED_MAX:
                narrowed.clear()
            narrowed[names] = replace(self, groups=kept)
        found: Self = narrowed[names]
        return found

    def alternatives(self) -> tuple[GroupQuotas, ...]:
        """The sets of quotas of which one must have room as a whole.

        A user of `staff` (100k a day) and `lab` (200k a day), with a quota of everyone (1M a month):

            any_group      {everyone, staff} or {everyone, lab}     room in one of the two is enough
            every_group    {everyone, staff, lab}, "staff+lab"      all three must have room

        An unlimited group is a set with the quotas of everyone alone. With `any_group` it admits what the others
        cannot; with `every_group` it adds nothing, and the other groups still bind.
        """
        return self.common.alternatives


@dataclass(slots=True)
class BoundQuotas(CombinedQuotas):
    """Which quotas bind the users who are in the same groups, on one model.

    `grants` has the grants on these quotas for any user. A policy has none for most quotas, and then it is empty.
    """

    grants: Grants = field(default_factory=dict)

    def for_user(self, name: str) -> "Binding":
        """The binding of one of these users."""
        grants = grants_of_user(self.grants, name) if self.grants else {}
        return Binding(
            self.always, self.groups, self.shadows, self.combine, user=name, grants=grants, shared=self.common
        )

    def closing(self, is_closed: Callable[[Quota], bool]) -> tuple[Quota, ...]:
        """The quotas of which `is_closed` says that they refuse every call of a kind, because of limits of 0.

        None if an alternative may admit one.
        """
        closed = [[quota for quota in each.quotas if is_closed(quota)] for each in self.alternatives()]
        return tuple(quota for quotas in closed for quota in quotas) if all(closed) else ()


@dataclass(slots=True)
class Binding(CombinedQuotas):
    """Which quotas bind one user on one model: the quotas of the user's groups, and whose counters they are.

    All users of the same groups share the tuples of quotas. Only the name and the grants are each user's own, because
    a quota counts each member separately unless it is shared. `grants` are by the id of their quota.

    The quotas have the limits of the policy. Decisions and displays go by `at`, which adds the grants.
    """

    user: str = field(kw_only=True)
    grants: Mapping[str, tuple[Grant, ...]] = field(default_factory=dict, kw_only=True)
    _keys: tuple[CounterKey, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def keys(self) -> tuple[CounterKey, ...]:
        """The keys of the counters that a decision reads, in the order of `quotas`."""
        if self._keys is None:
            subject = user_subject(self.user)
            self._keys = tuple([quota.shared_key or (subject, quota.id) for quota in self.quotas])
        return self._keys

    def at(self, now: int) -> "Binding":
        """The binding with the limits that are in force at `now` (ms): raised by the grants that run then.

        It has no grants any more, so `at` of it is itself. That of a binding without grants is itself too.
        """
        if not self.grants:
            return self
        return Binding(
            self._raised(self.always, now),
            tuple(GroupQuotas(group.group, self._raised(group.quotas, now)) for group in self.groups),
            self._raised(self.shadows, now),
            self.combine,
            user=self.user,
        )

    def _raised(self, quotas: tuple[Quota, ...], now: int) -> tuple[Quota, ...]:
        return tuple(quota.raised(self.grants.get(quota.id, ()), now) for quota in quotas)
