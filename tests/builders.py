"""Builders of the values that many tests need: quotas, bindings, counters, calls and instants.

Example:

    staff = quota("staff/daily", tokens=1000)
    who = binding([staff], always=[quota("everyone/calls", requests=10)])
    decide(call(100, 400), who, counters(who, used={"staff/daily": 300}), NOON)
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa

from proxy.calls.log_line import LogLine
from proxy.config.loader import Config
from proxy.identity.authentication import Snapshot
from proxy.identity.directory import Cuts, Directory, KeyUse, OwnedKey, User, UserId
from proxy.ledger.book import Extend, Reserve
from proxy.ledger.entry import CallLabels, Entry
from proxy.ledger.ledger import Ledger
from proxy.ledger.rows import entry_of
from proxy.ledger.schema import calls
from proxy.ledger.store import Store, StoreUnavailable
from proxy.policy import amounts
from proxy.policy.amounts import TOKENS_MAX, Amount, Exactly, Measure, Tokens, Uses
from proxy.policy.binding import Binding, Combine, GroupQuotas
from proxy.policy.policy import Group, Policy
from proxy.policy.quota import (
    Counter,
    CounterKey,
    Demand,
    Enforce,
    Globs,
    Grant,
    Limit,
    Quota,
    grants_by_quota,
    grants_of_user,
)
from proxy.policy.windows import parse_per

MINUTE = 60_000
HOUR = 60 * MINUTE
DAY = 24 * HOUR


def instant(text: str) -> int:
    """An instant such as `2026-11-24 12:00` in UTC, as milliseconds since 1970."""
    return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1000


NOON = instant("2026-11-24 12:00")  # a Tuesday


def log_line(request_id: str = "req_1", *, clock: Callable[[], float] = lambda: 0.0) -> LogLine:
    """The line of a request that began now and that has not been identified yet."""
    return LogLine(request_id=request_id, endpoint="GET /", address="192.0.2.1", clock=clock, began_s=clock())


def snapshot_of(config: Config) -> Snapshot:
    """What requests use of a config, with nobody in the database."""
    return Snapshot.of(config, directory_of(), lambda: NOON)


def directory_of(
    *users: User, keys: Mapping[str, OwnedKey] | None = None, clock: Callable[[], float] = lambda: 0.0
) -> Directory:
    """A directory over a database with these users, and with keys by their digests. By default it has none."""
    return Directory(DirectoryStoreOf(users, keys or {}), clock=clock, now=lambda: NOON)


class DirectoryStoreOf:
    """The part of the directory that is in a database, from values. `fails` makes every method fail."""

    def __init__(self, users: Iterable[User] = (), keys: Mapping[str, OwnedKey] | None = None) -> None:
        self.users = {user.identity: user for user in users}
        self.keys = dict(keys or {})
        self.number = 1
        self.cuts = Cuts()
        self.used: dict[str, int] = {}
        self.asked: list[object] = []
        self.fails = False

    async def version(self) -> int:
        """The number that a test raises."""
        self._fail()
        return self.number

    async def find_key(self, digest: str) -> OwnedKey | None:
        """The key with this digest."""
        self._fail()
        self.asked.append(digest)
        return self.keys.get(digest)

    async def find_user(self, identity: UserId) -> User | None:
        """This user."""
        self._fail()
        self.asked.append(identity)
        return self.users.get(identity)

    async def add_seen_user(self, identity: UserId, email: str | None, *, users_max: int) -> User | None:
        """A new user of a header source."""
        self._fail()
        if len(self.users) >= users_max:
            return None
        return self.users.setdefault(identity, User(identity, email=email))

    async def cuts_since(self, version: int) -> Cuts:
        """What a test has set."""
        self._fail()
        return self.cuts

    async def note_used(self, used: Mapping[str, KeyUse]) -> None:
        """Remember it for the test."""
        self._fail()
        self.used |= used

    def _fail(self) -> None:
        if self.fails:
            raise StoreUnavailable("the database is away")


def quota(
    quota_id: str,
    *,
    per: str = "day",
    models: Iterable[str] = ("*",),
    shared: bool = False,
    enforce: Enforce = "exact",
    zone: str = "UTC",
    overdraft: int = 0,
    **limits: int,
) -> Quota:
    """`quota("staff/daily", tokens=1000, per="day")`; each limit is a keyword with the name of its measure."""
    group, name = quota_id.split("/")
    return Quota(
        group,
        name,
        limits=tuple(Limit(Measure(measure), maximum) for measure, maximum in limits.items()),
        per=parse_per(per, ZoneInfo(zone)),
        models=Globs(models),
        shared=shared,
        enforce=enforce,
        overdraft=overdraft,
    )


def grant(quota_id: str, *, until: int, user: str | None = None, id: str = "g1", **amount: int) -> Grant:
    """`grant("staff/daily", tokens=500, until=NOON)`, for one user or for all; the amount is that of one measure."""
    [(measure, number)] = amount.items()
    return Grant(id, quota_id, user, Measure(measure), number, until)


def group_quotas(group: str, *quotas: Quota) -> GroupQuotas:
    """One group's quotas for a model; without quotas the group is unlimited."""
    return GroupQuotas(group, quotas)


def binding(
    *groups: GroupQuotas | Iterable[Quota],
    always: Iterable[Quota] = (),
    shadows: Iterable[Quota] = (),
    combine: Combine = "any_group",
    user: str = "ann",
    grants: Iterable[Grant] = (),
) -> Binding:
    """A binding of a user of these groups: each is a list of its quotas, or `group_quotas(name)` for one without."""
    listed = [each if isinstance(each, GroupQuotas) else _group_of(each) for each in groups]
    mine = grants_of_user(grants_by_quota(grants), user)
    return Binding(tuple(always), tuple(listed), tuple(shadows), combine, user=user, grants=mine)


def _group_of(quotas: Iterable[Quota]) -> GroupQuotas:
    listed = tuple(quotas)
    return GroupQuotas(listed[0].group, listed)


def make_requests_concurrent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let requests be a concurrent quantity, as calls at once would be: held while a call is in flight.

    No quantity of this release is concurrent, so there is no other way to test how the rules treat one. Build the
    quotas after it.
    """
    monkeypatch.setattr(amounts, "CONCURRENT", frozenset({"requests"}))
    monkeypatch.setattr(Measure.REQUESTS, "is_concurrent", True)


def amount(given: Amount | int) -> Amount:
    """A bare number means that many input tokens and one request; 0 means nothing at all."""
    return given if isinstance(given, Amount) else Amount(given, 0, 1 if given else 0)


def counters(
    who: Binding,
    *,
    used: Mapping[str, Amount | int] | None = None,
    held: Mapping[str, Amount | int] | None = None,
    opened: int = NOON,
) -> dict[CounterKey, Counter]:
    """The counters of a binding's quotas that are named in `used` or `held`, in windows opened at `opened`."""
    return {
        quota.key_for(who.user): Counter(
            quota.per.opening(opened), amount((used or {}).get(quota.id, 0)), amount((held or {}).get(quota.id, 0))
        )
        for quota in who.quotas
        if quota.id in (used or {}) or quota.id in (held or {})
    }


def call(
    input_tokens: int = 0,
    output_maximum: int = 0,
    smallest: int | None = None,
    *,
    initial_hold: int = TOKENS_MAX,
    hidden_input: int = 0,
    is_unbounded: bool = False,
    uses: Uses = Uses.INPUT_AND_OUTPUT,
) -> Demand:
    """The demand of a call. Its smallest answer is `min(output_maximum, 1024)`, as for a call with one choice.

    The call holds its whole answer at once; with `initial_hold` it is a stream that begins with less.
    """
    least = min(output_maximum, 1024) if smallest is None else smallest
    return Demand(
        input_tokens,
        output_maximum,
        least,
        initial_hold=initial_hold,
        hidden_input=hidden_input,
        is_unbounded=is_unbounded,
        uses=uses,
    )


def estimated(demand: Demand) -> Demand:
    """The same call before its input is counted, when only the number of its bytes is known."""
    return replace(demand, is_estimated=True)


def reserve(entry_id: str, who: Binding, demand: Demand) -> Reserve:
    """The operation that admits a call."""
    return Reserve(entry_id, "process-1", CallLabels(who.user, "gpt-4o-mini", "chat", "openai"), who, demand)


def extend(entry_id: str, who: Binding, output: int, *, least: int = 0, input_tokens: int = TOKENS_MAX) -> Extend:
    """The operation that increases the output held by a call in flight to `output` tokens in all.

    The input that the call holds does not change unless `input_tokens` is given.
    """
    return Extend(entry_id, who, input=input_tokens, output=output, least=least)


def exactly(input_tokens: int, output_tokens: int = 0) -> Exactly:
    """A usage that the upstream reported."""
    return Exactly(Tokens(input_tokens, output_tokens))


def group(name: str, *quotas: Quota, models: Iterable[str] | None = None, unlimited: bool = False) -> Group:
    """A group of a policy with these quotas."""
    return Group(name, quotas, None if models is None else Globs(models), unlimited)


def policy(*groups: Group, **settings: object) -> Policy:
    """A policy with these groups in this order."""
    return Policy(groups={each.name: each for each in groups}, **settings)  # type: ignore[arg-type]


async def entry_in(database: Ledger | Store, call_id: str) -> Entry | None:
    """The entry of one call, as it is stored."""
    async with database.read() if isinstance(database, Ledger) else database.transaction() as connection:
        row = (await connection.execute(sa.select(calls).where(calls.c.id == call_id))).first()
    return None if row is None else entry_of(row)
