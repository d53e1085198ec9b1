"""The values that decisions are made of: a quota, its grants, its counter at an instant, and a call's demand.

`binding` says which quotas bind a user, and `admission` decides with them. Pure: no clock, no SQL. Everything here is
a value; nothing is changed in place.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import translate
from typing import Literal

from proxy.policy.amounts import NO_AMOUNT, TOKENS_MAX, Amount, Measure, Uses
from proxy.policy.catalog import MatchedName
from proxy.policy.windows import Per, Window

Enforce = Literal["exact", "after", "shadow"]
CounterKey = tuple[str, str]
# The smallest answer is at most the smallest limit divided by this. Otherwise a quota of 1,000 tokens would refuse
# every call that states no maximum.
SMALLEST_PART = 10
# What the subject of a user's own counters begins with.
_USER = "user:"


class Globs:
    """Patterns for model names: `*`, `?` and `[…]`. They match the whole name, and are case-sensitive for a text."""

    __slots__ = ("_pattern", "texts")

    def __init__(self, texts: Iterable[str] = ("*",)) -> None:
        self.texts = tuple(texts)
        self._pattern = re.compile("|".join(translate(text) for text in self.texts))

    def match(self, model: MatchedName) -> bool:
        """Whether any of the patterns matches this model name; no patterns match none.

        Of a model with several spellings one is enough, in any case: the pattern `GPT-4*` matches ("gpt-4o",).
        """
        if not self.texts:
            return False
        if isinstance(model, str):
            return self._pattern.match(model) is not None
        return any(re.match(self._pattern.pattern, spelling, re.IGNORECASE) for spelling in model)

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the patterns that are plain names."""
        return tuple(text for text in self.texts if not any(character in text for character in "*?["))

    @property
    def patterns(self) -> tuple[str, ...]:
        """The others."""
        return tuple(text for text in self.texts if text not in self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Globs) and self.texts == other.texts

    def __hash__(self) -> int:
        return hash(self.texts)

    def __repr__(self) -> str:
        return f"Globs({self.texts!r})"


ALL_MODELS = Globs()


def sample_name(pattern: str) -> str:
    """A name that the pattern matches, and that patterns for other names do not: `gpt-~other~` of `gpt-*`."""
    without_sets = re.sub(r"\[(!?)(.)[^\]]*\]", lambda found: "~" if found[1] else found[2], pattern)
    return without_sets.replace("*", "~other~").replace("?", "~")


@dataclass(frozen=True, slots=True)
class Limit:
    """One number of a quota: at most `maximum` of `measure` in each window."""

    measure: Measure
    maximum: int


@dataclass(frozen=True, slots=True)
class Grant:
    """So much on top of a quota: it raises the limit on `measure` by `amount` in every window, before `until` (ms).

    `user` is whose calls it is for. None: it is for each member of the quota's group, or for all of them together if
    the quota is shared. If the quota has no limit on the measure, the grant has no effect.
    """

    id: str
    quota_id: str
    user: str | None
    measure: Measure
    amount: int
    until: int


# The grants of a policy: by the id of their quota, then by `Grant.user`.
Grants = Mapping[str, Mapping[str | None, tuple[Grant, ...]]]


def grants_by_quota(grants: Iterable[Grant]) -> Grants:
    """The grants in the form in which a policy has them."""
    found: dict[str, dict[str | None, tuple[Grant, ...]]] = {}
    for grant in grants:
        of_quota = found.setdefault(grant.quota_id, {})
        of_quota[grant.user] = (*of_quota.get(grant.user, ()), grant)
    return found


def grants_of_user(grants: Grants, user: str) -> dict[str, tuple[Grant, ...]]:
    """The grants that count for the calls of one user, by quota id: those for all, then the user's own."""
    found = ((quota_id, of_quota.get(None, ()) + of_quota.get(user, ())) for quota_id, of_quota in grants.items())
    return {quota_id: mine for quota_id, mine in found if mine}


def user_subject(user: str) -> str:
    """The subject of the counters that a user has alone."""
    return f"{_USER}{user}"


def shared_subject(group: str) -> str:
    """The subject of the counters that all members of a group share."""
    return f"~{group}"


def user_of(subject: str) -> str:
    """The user whose counters these are. The subject must be that of a user."""
    return subject.removeprefix(_USER)


def group_of(quota_id: str) -> str:
    """The group of a quota, by its id `group/name`. The names of groups have no slash."""
    return quota_id.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Quota:
    """One named rule of a group. Its counters belong to its id, `group/name`, so a new limit keeps their usage."""

    group: str
    name: str
    limits: tuple[Limit, ...]
    per: Per
    models: Globs = ALL_MODELS
    shared: bool = False
    enforce: Enforce = "exact"
    # By how many tokens an answer that has begun may exceed the limit. No call is admitted when the limit is reached.
    overdraft: int = 0
    # Each decision reads the id about a dozen times, so it is built once.
    id: str = field(init=False, repr=False, compare=False)
    # The limits of which more remains after a reset. Those on concurrent measures are not among them.
    window_limits: tuple[Limit, ...] = field(init=False, repr=False, compare=False)
    # The smallest of its limits that an answer must fit into; TOKENS_MAX if it bounds no answer. Grants do not raise
    # it: a call that is refused while a grant runs would otherwise be admitted when the grant ends.
    answer_limit: int = field(init=False, repr=False, compare=False)
    # The key of its one counter if it is shared.
    shared_key: CounterKey | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.group}/{self.name}")
        object.__setattr__(self, "shared_key", (shared_subject(self.group), self.id) if self.shared else None)
        window_limits = tuple(limit for limit in self.limits if not limit.measure.is_concurrent)
        object.__setattr__(self, "window_limits", window_limits)
        of_answers = [limit.maximum for limit in self.limits if limit.measure.counts_output]
        bounds_answers = self.enforce != "after" and bool(of_answers)
        object.__setattr__(self, "answer_limit", min(of_answers) if bounds_answers else TOKENS_MAX)

    def counts(self, uses: Uses) -> bool:
        """Whether one of its limits counts something of a call that uses this."""
        return any(limit.measure in uses.measures for limit in self.limits)

    def is_closed_for(self, uses: Uses) -> bool:
        """Whether a limit of 0 makes it refuse every call that uses this, whatever else the call asks for."""
        return self.enforce != "shadow" and any(
            limit.maximum == 0 and limit.measure in uses.measures for limit in self.limits
        )

    def running(self, grants: Iterable[Grant], now: int) -> tuple[Grant, ...]:
        """Those of its grants that raise one of its limits at `now` (ms)."""
        measures = {limit.measure for limit in self.limits}
        return tuple(grant for grant in grants if now < grant.until and grant.measure in measures)

    def raised(self, grants: Iterable[Grant], now: int) -> "Quota":
        """The same quota with its limits at `now` (ms), raised by those of its grants that run then."""
        running = self.running(grants, now)
        if not running:
            return self
        limits = (
            replace(
                limit,
                maximum=limit.maximum + sum(grant.amount for grant in running if grant.measure is limit.measure),
            )
            for limit in self.limits
        )
        raised = replace(self, limits=tuple(limits))
        object.__setattr__(raised, "answer_limit", self.answer_limit)
        return raised

    def ceiling(self, limit: Limit) -> int:
        """How far admitted calls may take a limit.

        The overdraft lets an answer end, so it adds nothing to limits on input or on requests. With `tokens: 1000`,
        `requests: 10` and `overdraft: 200`, calls may reach 1,200 tokens and 10 requests.
        """
        return limit.maximum + (self.overdraft if limit.measure.counts_output else 0)

    def key_for(self, user: str) -> CounterKey:
        """The key of the user's counter, or of the group's one counter if the quota is shared: (subject, quota id).

        Rows are locked in the order of their keys. The subject comes first, and "~" sorts after "user:", so shared
        counters, which all members need, are locked last and for the shortest time:

            ("user:ann", "staff/daily")  <  ("user:zoe", "staff/daily")  <  ("~art", "art/monthly")

        The prefixes also keep subjects apart: a user called "~art" is "user:~art".
        """
        return self.shared_key or (user_subject(user), self.id)


@dataclass(slots=True)
class Counter:
    """What one subject (a user, or a group with a shared quota) has used and holds of one quota in its window.

    It is a value, and never changed; it is not declared frozen, because that takes longer.
    `reset_at` is when an administrator last set what is used to 0 (ms); 0: never.
    """

    window: Window
    used: Amount = NO_AMOUNT
    held: Amount = NO_AMOUNT
    reset_at: int = 0

    @property
    def is_open(self) -> bool:
        """Whether anything was used or is held in this window. Otherwise it has not been opened by a call.

        What is held of concurrent quantities does not count, because a call of an earlier window may hold it. A
        window that was reset stays open until its end, although nothing is used in it.
        """
        return (
            self.used != NO_AMOUNT
            or (self.held != NO_AMOUNT and self.held != self.held.concurrent_part())
            or self.was_reset_since(self.window.opened_at)
        )

    def was_reset_since(self, instant: int) -> bool:
        """Whether an administrator has reset it at this instant (ms) or later."""
        return bool(self.reset_at) and self.reset_at >= instant


def counter_at(now: int, quota: Quota, counter: Counter | None) -> Counter:
    """The counter at `now`: `counter` while its window is open, shortened if need be, else a new one at 0.

    An open window ends no later than one that opens now. Of the same rule it never does, so this shortens only
    - a window of an earlier `per`, time zone or first day of the week. With `per: year`, a window runs until January.
      When `per` becomes `minute`, it ends with the minute of the first access after that, and its usage counts until
      then. If the new window is longer, the end stays: headers and refusals have announced it;
    - a window that a clock opened which was ahead. With `per: 6h`, a clock that was a day ahead opened a window from
      12:00 to 18:00 tomorrow. At 12:00 today that window ends at 18:00 today.
    `Book` stores the new end. Later accesses would compute later ends, so the stored one stays.

    A window is identified by the instant at which it opened. So a new window never opens before, or at the same
    instant as, an earlier one that calls in flight may still belong to.

    A new window begins with what calls in flight hold of concurrent quantities. With `per: hour` and a limit of two
    calls at once, a call from 11:59 to 12:03 takes one of the two places until 12:03.
    """
    if counter is None:
        return Counter(quota.per.opening(now))
    last = counter.window
    if now < last.resets_at and (counter.is_open or now < last.opened_at):
        end = quota.per.opening(now).resets_at
        if last.resets_at <= end:
            return counter
        return Counter(Window(last.opened_at, end), counter.used, counter.held, counter.reset_at)
    opening = quota.per.opening(now)
    # A new window opens, but not before
    # - the opening of the last window, if that has not ended but nothing is used or held in it;
    # - the end of the last window, if that has passed. Example: `per: hour` becomes `day` at 12:00, and the hour from
    #   00:00 to 01:00 was used. The day opens at 01:00; if it opened at 00:00, a call of that hour that is still in
    #   flight would be settled into the day;
    # - 1 ms after the opening of the last window, which after a jump of the clock (above) may have ended before that.
    not_before = last.opened_at if last.is_open(now) else max(last.resets_at, last.opened_at + 1)
    window = Window(max(opening.opened_at, not_before), opening.resets_at)
    return Counter(window, held=counter.held.concurrent_part())


@dataclass(slots=True)
class Demand:
    """What a call asks for, in tokens: an upper bound of its input, its longest answer, and the least worth starting.

    It is a value, and never changed; it is not declared frozen, because that takes longer.
    `output_maximum`, `smallest`, `initial_hold`, `fixed` and `floor` are totals over all choices.

    - `uses`: what the call can use at all. It decides which limits bind the call, not the numbers: a chat with
      `max_tokens: 0` is bound by a limit on output, because its upstream may generate all the same. An embedding is
      not.
    - `initial_hold`: at most this much of the answer is held at first. A stream whose tokens can be counted as they
      pass begins with a part, and increases it as the answer grows.
    - `grows`: that is the case, so `initial_hold` is lowered together with the smallest answer if more is asked for.
    - `fixed`: the part of `smallest` that is needed in every quota: the reasoning budget, or all of it if the
      configuration says how long the smallest answer is. The rest is at most a tenth of a small limit, but not less
      than `floor`, which is the least maximum that can be sent. See `smallest_within`.
    - `is_unbounded`: neither the request nor the configuration says how long the answer can become, so
      `output_maximum` is only what is usual.
    - `is_estimated`: `input` is the number of bytes of the input, of which about four make a token in prose.
    - `hidden_input`: the most that the call may read beyond `input` without showing it (stored files, earlier
      answers). As much of it is held as is free, because the real number is not known.
    """

    input: int
    output_maximum: int
    smallest: int
    initial_hold: int = TOKENS_MAX
    is_unbounded: bool = False
    is_estimated: bool = False
    hidden_input: int = 0
    uses: Uses = Uses.INPUT_AND_OUTPUT
    grows: bool = False
    fixed: int = TOKENS_MAX
    floor: int = 0

    def smallest_within(self, limit: int) -> int:
        """The smallest answer if an answer must fit into `limit` tokens at most.

        Example: a call that states no maximum needs 1,024 tokens for its answer if the limit is 1M, and 50 if it is
        500.
        """
        return min(self.smallest, self.fixed + max(self.floor, limit // SMALLEST_PART))
