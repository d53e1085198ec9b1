"""Random histories: after each step, the ledger agrees with a model that computes its state in another way.

In a history two users make calls, quotas change while calls are in flight, grants are given and end, counters are
reset, the clock goes forward and back, processes die, and batches are applied twice. Each runs in memory, on SQLite
and on PostgreSQL.

The model (`Model`) has an object for each window that was opened, and records which call holds how much in which of
them. So it cannot take one window for another. It adds up all sums anew each time. It does not decide: it takes from
the replies whether a call was admitted and how much it may hold, and checks that this was within the limits.

To test another database, write one more class like `OnSqlite` and add three lines at the end.
"""

import asyncio
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import asyncpg
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from proxy.ledger.book import (
    Accepted,
    Book,
    Expire,
    Extend,
    Operation,
    Refused,
    Release,
    Reply,
    Reserve,
    Settle,
    Unknown,
)
from proxy.ledger.entry import Entry
from proxy.ledger.postgres import PostgresStore
from proxy.ledger.sqlite import SqliteStore
from proxy.policy.admission import Verdict
from proxy.policy.amounts import NO_AMOUNT, Amount, AtLeast, Exactly, Measure, Tokens, Unspent, charge_of
from proxy.policy.binding import Binding, Combine, GroupQuotas
from proxy.policy.quota import Counter, CounterKey, Enforce, Grant, Quota, grants_by_quota, grants_of_user
from proxy.policy.windows import Window
from tests.audit import audit, balance, connected, rows
from tests.breakage import writers
from tests.builders import DAY, HOUR, exactly, instant, quota, reserve
from tests.postgres import shared
from tests.random_rules import demands
from tests.sqlite import write_migrated

pytestmark = pytest.mark.journey

# -------------------------------------------------------------------------------------------------------- the ledgers


@dataclass(frozen=True)
class Record:
    """What must be the same of a call in every ledger and in the model."""

    state: str
    hold: Amount
    charge: Amount


class LedgerUnderTest(Protocol):
    """A ledger, in memory or in a database."""

    def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        """Apply one batch."""

    def counters(self) -> dict[CounterKey, Counter]:
        """All counters."""

    def calls(self) -> dict[str, Record]:
        """All calls, by id."""

    def everything(self) -> object:
        """All data, to compare before and after an operation that must change nothing."""

    def orphans(self, owner: str) -> list[str]:
        """The open calls of other processes than this one."""

    def put(self, key: CounterKey, counter: Counter) -> None:
        """Set a counter, as an operator does in the database."""

    def crash(self) -> None:
        """Kill the process, and open the ledger in another one."""

    def close(self, *, reset: Collection[CounterKey]) -> None:
        """Close it and delete its data, after an audit. The counters in `reset` were reset."""


class InMemory:
    """Counters and entries in memory. Of each batch only what its book says it changed is written back."""

    def __init__(self) -> None:
        self._counters: dict[CounterKey, Counter] = {}
        self._entries: dict[str, Entry] = {}

    def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        book = Book(dict(self._counters), dict(self._entries), now)
        replies = [book.apply(operation) for operation in operations]
        self._counters |= {key: book.counters[key] for key in book.counters_changed}
        self._entries |= {entry_id: book.entries[entry_id] for entry_id in book.entries_changed}
        assert (book.counters, book.entries) == (self._counters, self._entries)
        return replies

    def counters(self) -> dict[CounterKey, Counter]:
        return dict(self._counters)

    def calls(self) -> dict[str, Record]:
        return {
            entry.id: Record(entry.state, entry.hold, charge_of(entry.usage) if entry.usage else NO_AMOUNT)
            for entry in self._entries.values()
        }

    def everything(self) -> object:
        return dict(self._counters), dict(self._entries)

    def orphans(self, owner: str) -> list[str]:
        return [entry.id for entry in self._entries.values() if entry.state == "open" and entry.owner != owner]

    def put(self, key: CounterKey, counter: Counter) -> None:
        self._counters[key] = counter

    def crash(self) -> None:
        pass

    def close(self, *, reset: Collection[CounterKey]) -> None:
        pass


class OnSqlite:
    """A SQLite file, written by a store and read with plain SQL. After a crash a copy of the file is opened."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory()
        self._runner = asyncio.Runner()
        self._numbers = count()
        self._path = self._next_path()
        write_migrated(self._path)
        self._store = self._opened()

    def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        return self._runner.run(self._store.apply(operations, now))

    def counters(self) -> dict[CounterKey, Counter]:
        return _counters(rows(self._path, "counters"))

    def calls(self) -> dict[str, Record]:
        return _records(rows(self._path, "calls"))

    def everything(self) -> object:
        return rows(self._path, "counters"), rows(self._path, "calls")

    def orphans(self, owner: str) -> list[str]:
        return self._runner.run(self._store.orphans(owner, 0, limit=1000))

    def put(self, key: CounterKey, counter: Counter) -> None:
        with connected(self._path) as connection:
            connection.execute("REPLACE INTO counters VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", _row(key, counter))

    def crash(self) -> None:
        path = self._next_path()
        for suffix in ("", "-wal"):
            shutil.copy(f"{self._path}{suffix}", f"{path}{suffix}")
        self._runner.run(self._store.close())
        self._path = path
        self._store = self._opened()

    def close(self, *, reset: Collection[CounterKey]) -> None:
        self._runner.run(self._store.close())
        self._runner.close()
        audit(self._path, reset=reset)
        self._folder.cleanup()

    def _next_path(self) -> Path:
        return Path(self._folder.name) / f"{next(self._numbers)}.db"

    def _opened(self) -> SqliteStore:
        store = SqliteStore(self._path)
        with writers() as opened:
            self._runner.run(store.open())
        # No history has a power failure, so its many commits need not wait for a disk.
        opened[0].execute("PRAGMA synchronous=OFF")
        return store


@dataclass(frozen=True)
class PostgresDatabase:
    """The PostgreSQL database of all histories: making one takes longer than a history."""

    runner: asyncio.Runner
    url: str
    set_clock: Callable[[int], None]
    auditor: Any  # a connection that reads with plain SQL


@pytest.fixture(scope="module")
def _postgres() -> Iterator[None]:
    clocks: list[Callable[[int], None]] = []
    with asyncio.Runner() as runner:
        url = runner.run(shared().timed(clocks.append))
        OnPostgres.database = PostgresDatabase(runner, url, clocks[0], runner.run(asyncpg.connect(url)))
        try:
            yield
        finally:
            runner.run(OnPostgres.database.auditor.close())


class OnPostgres:
    """A PostgreSQL database with the clock of the history, written by a store and read with plain SQL."""

    database: PostgresDatabase

    def __init__(self) -> None:
        self._run = self.database.runner.run
        self._auditor = self.database.auditor
        self._run(self._auditor.execute("TRUNCATE llm_quota_proxy.counters, llm_quota_proxy.calls"))
        self._store = PostgresStore(self.database.url)

    def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        self.database.set_clock(now)
        return self._run(self._store.apply(operations, now))

    def counters(self) -> dict[CounterKey, Counter]:
        return _counters(row for row in self._rows("counters") if row["resets_at"])

    def calls(self) -> dict[str, Record]:
        return _records(self._rows("calls"))

    def everything(self) -> object:
        return self._rows("counters"), self._rows("calls")

    def orphans(self, owner: str) -> list[str]:
        return self._run(self._store.orphans(owner, 0, limit=1000))

    def put(self, key: CounterKey, counter: Counter) -> None:
        columns = ", ".join(f"${number}" for number in range(1, 12))
        insert = f"INSERT INTO llm_quota_proxy.counters VALUES ({columns})"
        delete = "DELETE FROM llm_quota_proxy.counters WHERE subject = $1 AND quota_id = $2"
        self._run(self._auditor.execute(delete, *key))
        self._run(self._auditor.execute(insert, *_row(key, counter)))

    def crash(self) -> None:
        self._run(self._store.close())
        self._store = PostgresStore(self.database.url)

    def close(self, *, reset: Collection[CounterKey]) -> None:
        self._run(self._store.close())
        balance(self._rows("calls"), self._rows("counters"), reset=reset)

    def _rows(self, table: str) -> list[dict[str, Any]]:
        found = self._run(self._auditor.fetch(f"SELECT * FROM llm_quota_proxy.{table} ORDER BY 1, 2"))
        return [dict(row) for row in found]


def _row(key: CounterKey, counter: Counter) -> list[Any]:
    window, levels = counter.window, (counter.used, counter.held)
    numbers = [number for each in levels for number in (each.input, each.output, each.requests)]
    return [*key, window.opened_at, window.resets_at, *numbers, counter.reset_at]


def _counters(found: Iterable[Mapping[str, Any]]) -> dict[CounterKey, Counter]:
    return {
        (row["subject"], row["quota_id"]): Counter(
            Window(row["opened_at"], row["resets_at"]),
            *(_amount(row, f"{side}_") for side in ("used", "held")),
            row["reset_at"],
        )
        for row in found
    }


def _records(found: Iterable[Mapping[str, Any]]) -> dict[str, Record]:
    return {
        row["id"]: Record(
            row["state"],
            Amount(row["hold_input"], row["hold_output"], 1),
            Amount(row["input_tokens"] or 0, row["output_tokens"] or 0, row["requests"] or 0),
        )
        for row in found
    }


def _amount(row: Mapping[str, int], prefix: str) -> Amount:
    return Amount(row[f"{prefix}input"], row[f"{prefix}output"], row[f"{prefix}requests"])


# ---------------------------------------------------------------------------------------------------------- the model


@dataclass(eq=False)
class OpenedWindow:
    """One window of a counter. `ceilings` are the highest limits (with overdraft) up to which it was held.

    `reset_at` is when it was last reset, 0 if never. `forgiven` is what that would have made negative.
    """

    resets_at: int
    opened_at: int
    ceilings: dict[Measure, int] = field(default_factory=dict)
    reset_at: int = 0
    forgiven: Amount = NO_AMOUNT


@dataclass(eq=False)
class Held:
    """What a call holds in one window. `forgiven` is what of its charge was reset there."""

    key: CounterKey
    window: OpenedWindow
    amount: Amount
    forgiven: Amount = NO_AMOUNT


@dataclass(eq=False)
class Call:
    """A call that was admitted, with the quotas that were in force then."""

    who: Binding
    hold: Amount
    state: str = "open"
    charge: Amount = NO_AMOUNT
    ended_at: int = 0
    held: dict[tuple[CounterKey, int], Held] = field(default_factory=dict)

    def parts(self) -> list[tuple[Held, Amount]]:
        """What each held amount is charged. Of several of one counter: each its amount, and the last the rest."""
        rests = {held.key: self.charge for held in self.held.values()}
        last = {held.key: held for held in self.held.values()}
        parts = []
        for held in self.held.values():
            rest = rests[held.key]
            part = rest if held is last[held.key] else rest.at_most(held.amount)
            rests[held.key] = rest - part
            parts.append((held, part))
        return parts


def _end(operation: Settle | Release | Expire, call: Call, now: int) -> None:
    """A call ends once. Only a call that has expired may still be settled, once."""
    if call.state != "open" and not (call.state == "expired" and isinstance(operation, Settle)):
        return
    before = call.parts()
    match operation:
        case Settle():
            state, call.charge = "settled", charge_of(operation.usage)
        case Release():
            state = "released"
        case _:
            state, call.charge = "expired", call.hold
    if call.state == "expired":
        for (held, part), (_, corrected) in zip(before, call.parts(), strict=True):
            if held.window.reset_at >= call.ended_at:  # the reset has forgiven the whole charge
                held.forgiven += corrected - part
    call.state, call.ended_at = state, now


def _end_of_window(per: str, now: int) -> int:
    """When a window ends that opens now; those of the calendar are in UTC."""
    if per == "6h":
        return now + 6 * HOUR
    length = HOUR if per == "hour" else DAY
    return (now // length + 1) * length


class Model:
    """All calls with what they hold in which window, and the last window of each counter."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}
        self.last: dict[CounterKey, OpenedWindow] = {}

    def record(self, operation: Operation, reply: Reply, now: int) -> None:
        """Record what an operation did, by its reply, and check that the reply is possible."""
        known = self.calls.get(operation.id)
        if isinstance(operation, Reserve) and known is None:
            self._shorten(operation.binding, now)
            if isinstance(reply, Accepted):
                known = self.calls[operation.id] = Call(operation.binding, reply.entry.hold)
                self._hold(known, reply, now)
        elif known is None:
            assert reply == Unknown(operation.id)
            return
        elif isinstance(operation, Extend) and known.state == "open":
            self._extend(operation, known, reply, now)
        elif isinstance(operation, Settle | Release | Expire):
            was_expired = known.state == "expired"
            _end(operation, known, now)
            if was_expired:
                self._forgive_no_more_than_charged()
        assert isinstance(reply, Accepted | Refused)
        assert isinstance(reply, Accepted) is (known is not None)
        if isinstance(reply, Accepted) and known is not None:
            assert (reply.entry.state, reply.entry.hold) == (known.state, known.hold)
        for key, counter in reply.counters.items():
            assert self.last[key].resets_at == counter.window.resets_at

    def _shorten(self, who: Binding, now: int) -> None:
        """A new call, also one that is refused, ends open windows when one would end that opens now."""
        for each in who.quotas:
            key = each.key_for(who.user)
            if key in self.last and now < self.last[key].resets_at and self._is_used(key):
                self.last[key].resets_at = min(self.last[key].resets_at, _end_of_window(each.per.text, now))

    def _is_used(self, key: CounterKey) -> bool:
        """Whether anything is used or held in the last window of a counter, or it was reset."""
        last = self.last[key]
        return any(map(bool, self.levels(key))) or last.reset_at >= last.opened_at

    def reset(self, key: CounterKey, now: int) -> None:
        """Forgive what is used."""
        window = self.last[key]
        window.reset_at, window.forgiven = now, NO_AMOUNT
        for call in self.calls.values():
            for held, part in call.parts():
                if held.window is window:
                    held.forgiven = part

    def _forgive_no_more_than_charged(self) -> None:
        """If a clock that went back dates a reset before an expiry, a late settle may correct what was forgiven."""
        for key, window in self.last.items():
            used, _ = self.levels(key)
            window.forgiven += Amount(*(min(0, number) for number in used))

    def _extend(self, operation: Extend, call: Call, reply: Reply, now: int) -> None:
        assert isinstance(reply, Accepted)
        hold = reply.entry.hold
        assert hold.input == min(call.hold.input, operation.input)
        assert call.hold.output <= hold.output <= max(call.hold.output, operation.output)
        assert (reply.verdict is Verdict.ALLOW) is (hold.output >= operation.least)
        call.hold = hold
        self._hold(call, reply, now)

    def _hold(self, call: Call, reply: Accepted, now: int) -> None:
        """Record what the call holds now, and check that it is no more than there is room for."""
        amounts = {(held.key, held.opened_at): held.amount for held in reply.entry.held_amounts}
        assert len(amounts) == len(reply.entry.held_amounts)
        new = [window for window in amounts if window not in call.held]
        opened = {key: self._window(key, now, reply.counters[key].window) for key, _ in new}
        call.held = {
            (key, opened_at): Held(
                key,
                call.held[key, opened_at].window if (key, opened_at) in call.held else opened[key],
                amount,
            )
            for (key, opened_at), amount in amounts.items()
        }
        quotas = {each.key_for(call.who.user): each for each in call.who.at(now).quotas if each.enforce == "exact"}
        for key, opened_at in new:
            if key in quotas:
                self._check_limits(quotas[key], reply.counters[key], opened[key], added=amounts[key, opened_at])

    def _check_limits(self, each: Quota, counter: Counter, window: OpenedWindow, *, added: Amount) -> None:
        for limit in each.limits:
            ceiling = each.ceiling(limit)
            taken = (counter.used + counter.held).of(limit.measure)
            # A limit does not bind a call that uses nothing of its measure.
            assert taken <= ceiling or not added.of(limit.measure)
            window.ceilings[limit.measure] = max(ceiling, window.ceilings.get(limit.measure, 0))

    def _window(self, key: CounterKey, now: int, window: Window) -> OpenedWindow:
        """The last window if it has not ended and anything is used or held in it, or it was reset; else a new one."""
        last = self.last.get(key)
        if last is None:
            self.last[key] = OpenedWindow(window.resets_at, window.opened_at)
            return self.last[key]
        if last.resets_at <= now or not self._is_used(key):
            if last.reset_at and last.opened_at == window.opened_at:
                # By its clock it was reset before it had opened. It is still the same day, to which a call that had
                # expired before may be settled late.
                last.resets_at, last.reset_at = window.resets_at, 0
            else:
                self.last[key] = OpenedWindow(window.resets_at, window.opened_at)
        return self.last[key]

    def levels(self, key: CounterKey) -> tuple[Amount, Amount]:
        """What is used and what is held in the last window of a counter."""
        used, held = NO_AMOUNT, NO_AMOUNT
        for call in self.calls.values():
            for each, part in call.parts():
                if each.window is self.last[key]:
                    used, held = (
                        used + part - each.forgiven,
                        held + (each.amount if call.state == "open" else NO_AMOUNT),
                    )
        return used - self.last[key].forgiven, held

    def hidden(self, key: CounterKey, measure: Measure) -> int:
        """What calls used in the last window of a counter beyond what they held in it."""
        return sum(
            max(0, part.of(measure) - held.amount.of(measure))
            for call in self.calls.values()
            for held, part in call.parts()
            if held.window is self.last[key]
        )


# ------------------------------------------------------------------------------------------------------ the histories

# Few quotas, and calls that are small compared with them, because a refused call tests little. Few windows, so that a
# history often comes back to the same one.
NAMES = ("everyone/q", "a/q", "a/r", "b/q", "watch/q")
ALWAYS = ("a/q", "b/q")
PERS = ("hour", "day", "6h")
LIMITS: tuple[dict[str, Any], ...] = (
    {"tokens": 30},
    {"tokens": 60, "requests": 9},
    {"tokens": 45, "output_tokens": 20},
    {"input_tokens": 25, "output_tokens": 25},
    {"output_tokens": 15},
    {"requests": 4},
    {"tokens": 0},
)


@cache
def _quotas_named(name: str) -> list[Quota]:
    """All variants of a quota at the beginning. Most are exact, because the promises are about those."""
    enforced: list[tuple[Enforce, int]] = [("exact", 0), ("exact", 5), ("after", 0)]
    shadow: list[tuple[Enforce, int]] = [("shadow", 0)]
    return [
        quota(name, per=per, shared=shared, enforce=enforce, overdraft=overdraft, **limits)
        for limits in LIMITS
        for per in PERS
        for shared in (False, True)
        for enforce, overdraft in (shadow if name.startswith("watch") else enforced)
    ]


USERS = {"ann": "ab", "bob": "b"}
STEPS = st.sampled_from([1, HOUR, HOUR, DAY, -1, -HOUR, -DAY])


def _has_calls(histories: "Histories") -> bool:
    return bool(histories.model.calls)


def _may_crash(histories: "Histories") -> bool:
    """With three open calls at least: after more frequent crashes hardly any call would be extended."""
    return sum(call.state == "open" for call in histories.model.calls.values()) > 2


class Histories(RuleBasedStateMachine):
    """Each begins when an hour, a day and a month have begun together, so that windows are easily confused."""

    ledger_type: type[LedgerUnderTest]

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.ledger, self.model = self.ledger_type(), Model()
        self.now = instant("2026-12-01 00:00") + 5000
        self.ids, self.crashes = count(), 0
        self.grants: list[Grant] = []
        self.reset_keys: set[CounterKey] = set()
        self.done: list[Operation] = []  # the operations of the last batch that did all they can
        some = [name for name in NAMES if name in ALWAYS or data.draw(st.booleans())]
        self.quotas = {each.id: each for name in some for each in [data.draw(st.sampled_from(_quotas_named(name)))]}
        self.combine: Combine = data.draw(st.sampled_from(["any_group", "every_group"]))
        self.arrive(data, 3)

    def binding_of(self, user: str) -> Binding:
        def of(group: str) -> tuple[Quota, ...]:
            return tuple(each for each in self.quotas.values() if each.group == group)

        routes = tuple(GroupQuotas(group, of(group)) for group in USERS[user])
        grants = grants_of_user(grants_by_quota(self.grants), user)
        return Binding(of("everyone"), routes, of("watch"), self.combine, user=user, grants=grants)

    # Operations. Each may be repeated or come late, and must then change nothing.

    @rule(data=st.data(), number=st.sampled_from([1, 2, 4]))
    def arrive(self, data: st.DataObject, number: int) -> None:
        """New calls are reserved."""
        self.apply(*(self.a_reserve(data, f"{next(self.ids)}") for _ in range(number)))

    @precondition(_has_calls)
    @rule(data=st.data(), number=st.sampled_from([1, 2, 4]), later=st.sampled_from([0, 0, HOUR, DAY]))
    def extend(self, data: st.DataObject, number: int, later: int) -> None:
        """Calls are extended, at once or in a later window."""
        self.now += later
        self.apply(*(self.an_extend(data, self.a_call(data)) for _ in range(number)))

    @precondition(_has_calls)
    @rule(data=st.data(), is_known=st.booleans())
    def settle(self, data: st.DataObject, is_known: bool) -> None:
        """A call is settled with at most what it holds."""
        call_id = self.a_call(data)
        hold = self.model.calls[call_id].hold
        tokens = Tokens(
            *(data.draw(st.sampled_from([most, most, most // 2, 0])) for most in (hold.input, hold.output))
        )
        self.apply(Settle(call_id, Exactly(tokens) if is_known else AtLeast(tokens), "complete"))

    @precondition(_has_calls)
    @rule(data=st.data(), tokens=st.builds(Tokens, st.integers(0, 50), st.integers(0, 50)))
    def settle_with_any_usage(self, data: st.DataObject, tokens: Tokens) -> None:
        """A call may be settled above its hold: the upstream charges input that the request did not show."""
        self.apply(Settle(self.a_call(data), Exactly(tokens), "complete"))

    @precondition(_has_calls)
    @rule(data=st.data())
    def end_without_an_answer(self, data: st.DataObject) -> None:
        """The upstream rejects the request or fails, or the process is taken for dead and may still settle."""
        call_id = self.a_call(data)
        operations: list[Operation] = [Settle(call_id, Unspent(requests), "rejected") for requests in (0, 1)]
        operations += [Release(call_id), Expire(call_id), Expire(call_id)]
        self.apply(data.draw(st.sampled_from(operations)))

    @precondition(_has_calls)
    @rule(data=st.data())
    def reserve_again(self, data: st.DataObject) -> None:
        """A call is reserved with the id of another, and with any other values."""
        self.apply(self.a_reserve(data, self.a_call(data)))

    @precondition(_has_calls)
    @rule(data=st.data(), number=st.sampled_from([2, 3, 5]))
    def apply_several(self, data: st.DataObject, number: int) -> None:
        """One batch has several operations, also on the same call, and on one that it admits or refuses."""
        new = self.a_reserve(data, str(next(self.ids)))
        some = st.sampled_from([new.id, self.a_call(data), self.a_call(data)])
        self.apply(new, *(self.an_operation(data, data.draw(some), new) for _ in range(number)))

    def a_call(self, data: st.DataObject) -> str:
        """The id of a call, most often of one that is in flight."""
        every = list(self.model.calls)
        in_flight = [call_id for call_id in every if self.model.calls[call_id].state == "open"] or every
        among: list[str] = data.draw(st.sampled_from([in_flight, in_flight, in_flight, every]))
        return data.draw(st.sampled_from(among))

    def an_operation(self, data: st.DataObject, call_id: str, new: Reserve) -> Operation:
        kinds: list[Callable[[], Operation]] = [
            lambda: self.an_extend(data, call_id, new),
            lambda: Settle(call_id, exactly(data.draw(st.integers(0, 9)), 5), "complete"),
            lambda: Release(call_id),
            lambda: Expire(call_id),
            lambda: new if call_id == new.id else self.a_reserve(data, call_id),
        ]
        return data.draw(st.sampled_from(kinds))()

    def a_reserve(self, data: st.DataObject, call_id: str) -> Reserve:
        user = data.draw(st.sampled_from(sorted(USERS)))
        operation = reserve(call_id, self.binding_of(user), data.draw(demands(most=9)))
        return replace(operation, owner=f"process-{self.crashes}")

    def an_extend(self, data: st.DataObject, call_id: str, new: Reserve | None = None) -> Extend:
        """An extend with the quotas with which the call was admitted, even if they have changed."""
        call = self.model.calls[call_id] if new is None or new.id != call_id else Call(new.binding, NO_AMOUNT)
        output = call.hold.output + data.draw(st.integers(0, 12))
        held = call.hold.input // data.draw(st.sampled_from([1, 1, 2]))
        return Extend(call_id, call.who, held, output, data.draw(st.integers(0, output)))

    def apply(self, *operations: Operation) -> None:
        replies = self.ledger.apply(operations, self.now)
        for operation, reply in zip(operations, replies, strict=True):
            self.model.record(operation, reply, self.now)
        self.done = [
            operation for operation, reply in zip(operations, replies, strict=True) if _is_done(operation, reply)
        ]

    @precondition(lambda self: self.done)
    @rule()
    def replay(self) -> None:
        """The last batch is repeated, as after an uncertain commit."""
        before = self.ledger.everything()
        replies = self.ledger.apply(self.done, self.now)
        assert all(isinstance(reply, Accepted) for reply in replies)
        assert self.ledger.everything() == before

    # Other events.

    @rule(step=STEPS)
    def move_clock(self, step: int) -> None:
        """The clock goes forward or back."""
        self.now += step

    @rule(data=st.data(), maximum=st.integers(0, 80), overdraft=st.sampled_from([0, 0, 5]), per=st.sampled_from(PERS))
    def reload(self, data: st.DataObject, maximum: int, overdraft: int, per: str) -> None:
        """A limit or the window of one quota is changed."""
        each = self.quotas[data.draw(st.sampled_from(sorted(self.quotas)))]
        first, *rest = each.limits
        limited = replace(each, limits=(replace(first, maximum=maximum), *rest), overdraft=overdraft)
        changed = replace(each, per=quota("x/y", per=per).per)
        self.quotas[each.id] = data.draw(st.sampled_from([limited, changed]))

    @rule(
        data=st.data(),
        user=st.sampled_from([None, *USERS]),
        amount=st.integers(1, 40),
        lasts=st.sampled_from([1, HOUR, HOUR + 1, 2 * DAY]),
    )
    def grant(self, data: st.DataObject, user: str | None, amount: int, lasts: int) -> None:
        """A limit is raised for a user or for all. Calls that are admitted from now on have it, until it ends."""
        each = self.quotas[data.draw(st.sampled_from(sorted(self.quotas)))]
        measure = data.draw(st.sampled_from([limit.measure for limit in each.limits]))
        self.grants.append(Grant(f"{len(self.grants)}", each.id, user, measure, amount, self.now + lasts))

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def end_a_grant(self, data: st.DataObject) -> None:
        """An administrator ends a grant before its time."""
        self.grants.remove(data.draw(st.sampled_from(self.grants)))

    @precondition(lambda self: self.model.last)
    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        """An administrator resets a counter. Calls in flight are settled into it."""
        key = data.draw(st.sampled_from(sorted(self.model.last)))
        self.ledger.put(key, replace(self.ledger.counters()[key], used=NO_AMOUNT, reset_at=self.now))
        self.model.reset(key, self.now)
        self.reset_keys.add(key)
        self.done = []

    @precondition(lambda self: self.model.last)
    @rule(data=st.data())
    def replace_counter(self, data: st.DataObject) -> None:
        """An operator writes a counter with a new window. Calls in flight belong to the old window."""
        key = data.draw(st.sampled_from(sorted(self.model.last)))
        last = self.ledger.counters()[key].window
        window = Window(max(self.now, last.opened_at + 1), last.resets_at)
        self.ledger.put(key, Counter(window))
        self.model.last[key] = OpenedWindow(window.resets_at, window.opened_at)
        self.done = []

    @precondition(_may_crash)
    @rule()
    def crash(self) -> None:
        """The process dies, and the next one expires its open calls."""
        self.ledger.crash()
        self.crashes += 1
        orphans = self.ledger.orphans(f"process-{self.crashes}")
        assert set(orphans) == {call_id for call_id, call in self.model.calls.items() if call.state == "open"}
        self.apply(*(Expire(call_id) for call_id in orphans))

    # What must be true after each step.

    @invariant()
    def the_ledger_agrees_with_the_model(self) -> None:
        """Each counter holds what its open calls hold in this window, and has used what its ended calls are charged.

        And no quota that is enforced exactly is above its limit and overdraft, except by what calls used beyond their
        holds.
        """
        counters = self.ledger.counters()
        assert counters.keys() == self.model.last.keys()
        for key, counter in counters.items():
            assert (counter.used, counter.held) == self.model.levels(key)
            for level in (counter.used, counter.held):
                assert min(level.input, level.output, level.requests) >= 0
            for measure, ceiling in self.model.last[key].ceilings.items():
                taken = (counter.used + counter.held).of(measure)
                assert taken - self.model.hidden(key, measure) <= ceiling
        expected = {call_id: Record(call.state, call.hold, call.charge) for call_id, call in self.model.calls.items()}
        assert self.ledger.calls() == expected

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close(reset=self.reset_keys)


def _is_done(operation: Operation, reply: Reply) -> bool:
    """Whether an operation did all it can, so that repeating it changes nothing."""
    return isinstance(reply, Accepted) and not (
        isinstance(operation, Extend) and reply.entry.hold.output < operation.output
    )


class InMemoryHistories(Histories):
    ledger_type = InMemory


class SqliteHistories(Histories):
    ledger_type = OnSqlite


class PostgresHistories(Histories):
    ledger_type = OnPostgres


InMemoryHistories.TestCase.settings = settings(max_examples=250, stateful_step_count=15)
SqliteHistories.TestCase.settings = settings(max_examples=50, stateful_step_count=15)
PostgresHistories.TestCase.settings = settings(max_examples=30, stateful_step_count=15)
TestInMemory = InMemoryHistories.TestCase
TestOnSqlite = SqliteHistories.TestCase
TestOnPostgres = pytest.mark.usefixtures("_postgres")(PostgresHistories.TestCase)
