"""Random quotas, bindings, counters and calls for hypothesis. The numbers are small, so limits are often met."""

from dataclasses import replace

from hypothesis import strategies as st

from proxy.policy.amounts import TOKENS_MAX, Amount, Measure, Uses
from proxy.policy.binding import Binding, GroupQuotas
from proxy.policy.quota import Counter, CounterKey, Demand, Grant, Quota
from proxy.policy.windows import Window
from tests.builders import DAY, HOUR, MINUTE, NOON, quota

PERS = ("10s", "90s", "minute", "hour", "day", "6h", "month")

# Most quotas are exact, because the promises are about those.
ENFORCED = ("exact", "exact", "after")


@st.composite
def quota_lists(
    draw: st.DrawFn,
    group: str,
    *,
    least: int = 0,
    most: int = 3,
    enforce: tuple[str, ...] = ENFORCED,
    pers: tuple[str, ...] = PERS,
) -> tuple[Quota, ...]:
    """Quotas of one group. Each has one or more limits, sometimes 0; some of the exact ones have an overdraft."""
    found = []
    for number in range(draw(st.integers(least, most))):
        enforced = draw(st.sampled_from(enforce))
        found.append(
            quota(
                f"{group}/q{number}",
                per=draw(st.sampled_from(pers)),
                shared=draw(st.booleans()),
                enforce=enforced,
                overdraft=draw(st.sampled_from([0, 0, 1, 10])) if enforced == "exact" else 0,
                **draw(st.dictionaries(st.sampled_from(Measure), st.integers(0, 50), min_size=1)),
            )
        )
    return tuple(found)


@st.composite
def bindings(draw: st.DrawFn, *, grants: bool = False) -> Binding:
    """Quotas of everyone, up to three groups of which some are unlimited, and a few quotas in shadow.

    With `grants` some quotas have grants, of which some have ended and some end soon.
    """
    groups = [
        GroupQuotas(group, () if draw(st.sampled_from([False] * 5 + [True])) else draw(quota_lists(group, least=1)))
        for group in ("a", "b", "c")[: draw(st.integers(0, 3))]
    ]
    who = Binding(
        user="ann",
        always=draw(quota_lists("everyone")),
        groups=tuple(groups),
        shadows=draw(quota_lists("watch", enforce=("shadow",))),
        combine=draw(st.sampled_from(["any_group", "every_group"])),
    )
    given = [draw(grants_on(each)) for each in who.quotas if grants and draw(st.booleans())]
    return replace(who, grants={each.quota_id: (each,) for each in given})


@st.composite
def grants_on(draw: st.DrawFn, on: Quota) -> Grant:
    """A grant on this quota, mostly on one of its limits."""
    measure = draw(st.sampled_from([limit.measure for limit in on.limits] * 3 + [*Measure]))
    until = NOON + draw(st.sampled_from([-1, 0, 1, 10_000, MINUTE, HOUR, DAY, 40 * DAY]))
    return Grant("g", on.id, None, measure, draw(st.integers(1, 50)), until)


amounts = st.builds(Amount, st.integers(0, 30), st.integers(0, 30), st.integers(0, 5))


@st.composite
def counters_of(draw: st.DrawFn, who: Binding, *, held: bool = True) -> dict[CounterKey, Counter]:
    """Counters of some of a binding's quotas with any usage; with `held=False` no call is in flight."""
    found: dict[CounterKey, Counter] = {}
    for each in who.quotas:
        if draw(st.sampled_from([True, True, True, False])):
            opened_at = NOON - draw(st.integers(0, 90_000))
            # Some windows have another length than `per` gives: `per` may have changed while a window was open. They
            # end as the first transaction after that has stored.
            mine = each.per.opening(opened_at)
            ends_at = opened_at + draw(st.sampled_from([10_000, MINUTE, HOUR, 31 * DAY]))
            other = Window(opened_at, min(ends_at, each.per.opening(NOON).resets_at))
            window = draw(st.sampled_from([mine, mine, other]))
            holding = draw(amounts) if held and draw(st.booleans()) else Amount()
            found[each.key_for(who.user)] = Counter(window, draw(amounts), holding)
    return found


@st.composite
def demands(draw: st.DrawFn, most: int = 60, *, hidden_input: bool = True, lowered: bool = True) -> Demand:
    """Calls from an empty one to one that is larger than any limit.

    Some generate nothing, some cost only a request or nothing at all, and some are streams that begin with a part of
    their answer. Some read input that they do not show, unless `hidden_input=False`. The smallest answer of some is
    lowered in small quotas, unless `lowered=False`.
    """
    uses = draw(st.sampled_from([Uses.INPUT_AND_OUTPUT] * 5 + list(Uses)))
    has_input, has_output = (quantity in uses.value for quantity in ("input", "output"))
    output_maximum = draw(st.sampled_from([0, 1, most // 2]) | st.integers(0, most)) if has_output else 0
    smallest = min(output_maximum, draw(st.sampled_from([1, 1, most // 5, most])))
    return Demand(
        draw(st.integers(0, most // 2) | st.integers(0, most)) if has_input else 0,
        output_maximum,
        smallest,
        initial_hold=draw(st.sampled_from([TOKENS_MAX, smallest]) | st.integers(0, most)),
        is_unbounded=draw(st.booleans()),
        hidden_input=draw(st.sampled_from([0, 0, 0, most // 3, 2 * most])) if hidden_input and has_input else 0,
        uses=uses,
        grows=draw(st.booleans()),
        fixed=draw(st.sampled_from([TOKENS_MAX, 0, smallest // 2])) if lowered else TOKENS_MAX,
        floor=draw(st.integers(0, 3)),
    )
