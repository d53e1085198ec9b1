"""What the administrator of a torture run changes, and what may be in force at an instant after that.

A change is in force from some instant between its request and its answer on, and everywhere 2 s after its answer. In
between the value before it or the new one applies. So at each instant there is a set of values that may be in force,
and it has one member when nothing has changed for a while:

    10.0 s  a request to lower a limit from 500 to 200     500
    10.1 s  its answer                                     500 or 200
    12.1 s                                                 200

A change whose answer did not arrive may have been made or not, until the next change of the same thing is answered.
A replica that is paused hears of nothing, nor does any while the database restarts: then the 2 s begin after that.

The quotas that are changed count calls by the last digit of their tag, so the quota of the file has calls of its own.

Pure: takes records, returns sets of values.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

IN_FORCE_MS = 2000
GROUP = "clients"
# The last digits of the tags of the calls that each quota counts. Each user has a counter of its own of `changing`,
# and all share `pot`. `passing` is made and deleted.
CHANGING, POT, PASSING = f"{GROUP}/changing", f"{GROUP}/pot", f"{GROUP}/passing"
DIGITS = {CHANGING: "0123", POT: "45", PASSING: "67"}

_Interval = tuple[float, float]
_NEVER, _ALWAYS = float("inf"), float("-inf")


@dataclass(frozen=True, slots=True)
class SetLimit:
    """A quota allows so many tokens; None: there is no such quota."""

    quota: str
    tokens: int | None


@dataclass(frozen=True, slots=True)
class GiveGrant:
    """So many tokens on top of a quota, for one user or (None) for each or the pot, until an instant (ms)."""

    quota: str
    user: str | None
    tokens: int
    until: int


@dataclass(frozen=True, slots=True)
class EndGrant:
    """The end of a grant before its instant."""

    grant: GiveGrant


@dataclass(frozen=True, slots=True)
class ResetCounters:
    """What is used of a quota becomes 0, for one user or (None) for all. `used`: the tokens that the answer names."""

    quota: str
    user: str | None
    used: int | None = None


@dataclass(frozen=True, slots=True)
class SetUser:
    """A user may call or not. With `cut` the calls in flight end."""

    user: str
    is_enabled: bool
    cut: bool = False


@dataclass(frozen=True, slots=True)
class CutKey:
    """A key of a user is refused, and its calls in flight end."""

    user: str


@dataclass(frozen=True, slots=True)
class EndCall:
    """A call in flight ends."""

    request_id: str


Effect = SetLimit | GiveGrant | EndGrant | ResetCounters | SetUser | CutKey | EndCall


@dataclass(frozen=True, slots=True)
class ChangeRecord:
    """A change as the administrator saw it: when it was sent and when it ended (ms), and its answer.

    `status` is None if no answer arrived. `disturbed`: the proxy was down or paused meanwhile. `effect` is None for
    a change that no call notices, such as a new key.
    """

    action: str
    effect: Effect | None
    sent_at: int
    ended_at: int
    status: int | None = None
    request_id: str | None = None
    disturbed: bool = False

    @property
    def is_made(self) -> bool:
        """Whether it was made for certain."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def may_be_made(self) -> bool:
        """Whether it may have been made. A 503 can come after the commit."""
        return self.is_made or self.status in (None, 503)


@dataclass(frozen=True, slots=True)
class AuditRow:
    """A row of the audit log of this administrator. `at` is in ms."""

    action: str
    request_id: str | None
    at: int


@dataclass(frozen=True, slots=True)
class Administration:
    """All that the administrator did. `outages`: when a replica was paused or the database restarted (ms)."""

    changes: Sequence[ChangeRecord] = ()
    audit: Sequence[AuditRow] = ()
    outages: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True, slots=True)
class _Value:
    """A value that may be in force in this interval, both ends included."""

    value: int | bool | None
    begin: float
    end: float


@dataclass
class Timeline:
    """What may be in force when. All instants are in ms since 1970."""

    administration: Administration
    _limits: dict[str, list[_Value]] = field(init=False)
    _users: dict[str, list[_Value]] = field(init=False)
    _grants: list[tuple[GiveGrant, _Interval, _Interval | None]] = field(init=False)

    def __post_init__(self) -> None:
        made = [each for each in self.administration.changes if each.may_be_made]
        limits: dict[str, list[ChangeRecord]] = defaultdict(list)
        users: dict[str, list[ChangeRecord]] = defaultdict(list)
        for each in made:
            if isinstance(each.effect, SetLimit):
                limits[each.effect.quota].append(each)
            elif isinstance(each.effect, SetUser):
                users[each.effect.user].append(each)
        self._limits = {quota: list(self._values(None, of)) for quota, of in limits.items()}
        self._users = {user: list(self._values(True, of)) for user, of in users.items()}
        self._grants = list(self._intervals(made))

    def in_force_by(self, answered_at: int) -> int:
        """When a change that was answered at this instant must be in force everywhere."""
        by = answered_at + IN_FORCE_MS
        for begin, end in sorted(self.administration.outages):
            if begin < by and end > answered_at:
                by = max(by, end + IN_FORCE_MS)
        return by

    def limits(self, quota: str, user: str, begin: int, end: int) -> set[int | None]:
        """The tokens that a quota may have allowed this user in this interval; None: there may have been none."""
        extras = {0}
        for grant, possible, certain in self._grants:
            if grant.quota != quota or grant.user not in (None, user) or not _overlap(possible, (begin, end)):
                continue
            with_it = {extra + grant.tokens for extra in extras}
            is_certain = certain is not None and certain[0] <= begin and end <= certain[1]
            extras = with_it if is_certain else extras | with_it
        values = _possible(self._limits.get(quota, ()), begin, end) or {None}
        return {None if value is None else value + extra for value in values for extra in extras}

    def may_be_enabled(self, user: str, begin: int, end: int) -> bool:
        """Whether the user may have been enabled at some instant of this interval."""
        return user not in self._users or True in _possible(self._users[user], begin, end)

    def may_be_refused(self, user: str, begin: int, end: int) -> bool:
        """Whether the user's key may have been refused: the user disabled, or the key cut."""
        return False in _possible(self._users.get(user, ()), begin, end) or self._is_in(begin, end, CutKey(user))

    def may_be_cut(self, user: str, request_id: str | None, begin: int, end: int) -> bool:
        """Whether a call of this user that ran in this interval may have been ended by the administrator."""
        ends: set[Effect] = {SetUser(user, is_enabled=False, cut=True), CutKey(user)}
        if request_id is not None:
            ends.add(EndCall(request_id))
        return any(self._is_in(begin, end, each) for each in ends)

    def _is_in(self, begin: int, end: int, effect: Effect) -> bool:
        """Whether a change with this effect came into force in this interval, or may have."""
        return any(
            each.effect == effect
            and each.may_be_made
            and each.sent_at <= end
            and begin <= self.in_force_by(each.ended_at)
            for each in self.administration.changes
        )

    def _values(self, first: int | bool | None, changes: Sequence[ChangeRecord]) -> Iterator[_Value]:
        values: list[tuple[int | bool | None, float]] = [(first, _ALWAYS)]
        for each in changes:
            assert isinstance(each.effect, SetLimit | SetUser)
            value = each.effect.tokens if isinstance(each.effect, SetLimit) else each.effect.is_enabled
            values.append((value, each.sent_at))
        for position, (value, begin) in enumerate(values):
            later = (each for each in changes[position:] if each.is_made)
            ended = next(later, None)
            yield _Value(value, begin, _NEVER if ended is None else self.in_force_by(ended.ended_at))

    def _intervals(self, made: Iterable[ChangeRecord]) -> Iterator[tuple[GiveGrant, _Interval, _Interval | None]]:
        """Each grant, when it may be in force, and when it is for certain."""
        changes = list(made)
        ends = {each.effect.grant: each for each in changes if isinstance(each.effect, EndGrant)}
        for each in changes:
            if not isinstance(each.effect, GiveGrant):
                continue
            # It ends by the clock: at its instant it does not count any more.
            last = possible_end = certain_end = each.effect.until - 1
            end = ends.get(each.effect)
            if end is not None:
                certain_end = min(last, end.sent_at)
                possible_end = min(last, self.in_force_by(end.ended_at)) if end.is_made else last
            certain = (self.in_force_by(each.ended_at), certain_end) if each.is_made else None
            yield each.effect, (each.sent_at, possible_end), certain


def _possible(values: Iterable[_Value], begin: int, end: int) -> set[int | bool | None]:
    return {each.value for each in values if _overlap((each.begin, each.end), (begin, end))}


def _overlap(one: _Interval, other: tuple[int, int]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]
