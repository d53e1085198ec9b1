"""Whatever happens in whatever order, the books agree with books that are kept another way: on every engine.

Each history is one of two users, of quotas that change while calls are in flight, of a clock that goes both ways, of
processes that die and of batches that are done twice. The other books (`Ghost`) give each opening of a counter's
window an object of its own and note in which of them each call holds what, so they can't take one window for another;
and they add up everything anew each time. What they don't do is decide: whether a call is let in, and how far it may
grow, they are told, and see whether that was within the limits.

To try another database, write one more `Kept` and three lines at the end.
"""

import asyncio
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from proxy.policy.amounts import NOTHING, Amount, AtLeast, Exactly, Measure, Tokens, Unspent, charge_of
from proxy.policy.quota import Binding, Combine, Counter, CounterKey, Enforce, GroupQuotas, Quota
from proxy.policy.windows import Window
from tests.audit import audit, balance, connected, rows
from tests.breakage import writers
from tests.builders import DAY, HOUR, exactly, instant, quota, reserve
from tests.postgres import shared, url_name
from tests.random_rules import demands

pytestmark = pytest.mark.journey

# ------------------------------------------------------------------------------------------------ where they are kept


@dataclass(frozen=True)
class Record:
    """What must be the same of a call wherever it is kept."""

    state: str
    hold: Amount
    charge: Amount


class Kept(Protocol):
    """The books as they are kept somewhere."""

    def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        """Do one batch."""

    def counters(self) -> dict[CounterKey, Counter]:
        """How all counters stand."""

    def calls(self) -> dict[str, Record]:
        """All calls."""

    def everything(self) -> object:
        """To the last field: equal before and after something that changes nothing."""

    def orphans(self, owner: str) -> list[str]:
        """The open calls of other processes than this one."""

    def put(self, key: CounterKey, counter: Counter) -> None:
        """Set a counter, behind the back of the books."""

    def crash(self) -> None:
        """Die, and be opened by another process."""

    def close(self) -> None:
        """Leave nothing behind."""


class InMemory:
    """As the ledger's rules see them: each batch writes back only what it says it changed."""

    def __init__(self) -> None:
        self._counters: dict[CounterKey, Counter] = {}
        self._entries: dict[str, Entry] = {}

    def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        books = Book(self._counters, self._entries, now)
        replies = [books.apply(operation) for operation in operations]
        self._counters |= {key: books.counters[key] for key in books.counters_changed}
        self._entries |= {entry_id: books.entries[entry_id] for entry_id in books.entries_changed}
        assert (books.counters, books.entries) == (self._counters, self._entries)
        return replies

    def counters(self) -> dict[CounterKey, Counter]:
        return dict(self._counters)

    def calls(self) -> dict[str, Record]:
        return {
            entry.id: Record(entry.state, entry.hold, charge_of(entry.usage) if entry.usage else NOTHING)
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

    def close(self) -> None:
        pass


class OnSqlite:
    """In a file, written by a store and read with plain SQL. To crash is to go on with a copy of what is there."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory()
        self._runner = asyncio.Runner()
        self._lives = count()
        self._path = self._next_path()
        self._path.write_bytes(_empty_file())
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
            connection.execute("REPLACE INTO counters VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", _row(key, counter))

    def crash(self) -> None:
        path = self._next_path()
        for suffix in ("", "-wal"):
            shutil.copy(f"{self._path}{suffix}", f"{path}{suffix}")
        self._runner.run(self._store.close())
        self._path = path
        self._store = self._opened()

    def close(self) -> None:
        self._runner.run(self._store.close())
        self._runner.close()
        audit(self._path)
        self._folder.cleanup()

    def _next_path(self) -> Path:
        return Path(self._folder.name) / f"{next(self._lives)}.db"

    def _opened(self) -> SqliteStore:
        store = SqliteStore(self._path)
        with writers() as made:
            self._runner.run(store.open())
        # No history here loses power, and so many commits need not wait for a disk.
        made[0].execute("PRAGMA synchronous=OFF")
        return store


class OnPostgres:
    """In a database of its own whose clock shows the history's time, written by a store and read with plain SQL."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._show: Callable[[int], None] = lambda ms: None
        self._url = self._runner.run(shared().timed(self._follow))
        self._reader = self._runner.run(asyncpg.connect(self._url))
        self._store = PostgresStore(self._url)

    def apply(self, operations: Sequence[Operation], now: int) -> list[Reply]:
        self._show(now)
        return self._runner.run(self._store.apply(operations, now))

    def counters(self) -> dict[CounterKey, Counter]:
        return _counters(row for row in self._rows("counters") if row["resets_at"])

    def calls(self) -> dict[str, Record]:
        return _records(self._rows("calls"))

    def everything(self) -> object:
        return self._rows("counters"), self._rows("calls")

    def orphans(self, owner: str) -> list[str]:
        return self._runner.run(self._store.orphans(owner, 0, limit=1000))

    def put(self, key: CounterKey, counter: Counter) -> None:
        columns = ", ".join(f"${place}" for place in range(1, 11))
        put = f"INSERT INTO llm_quota_proxy.counters VALUES ({columns})"
        drop = "DELETE FROM llm_quota_proxy.counters WHERE subject = $1 AND quota_id = $2"
        self._runner.run(self._reader.execute(drop, *key))
        self._runner.run(self._reader.execute(put, *_row(key, counter)))

    def crash(self) -> None:
        self._runner.run(self._store.close())
        self._store = PostgresStore(self._url)

    def close(self) -> None:
        self._runner.run(self._store.close())
        balance(self._rows("calls"), self._rows("counters"))
        self._runner.run(self._reader.close())
        self._runner.run(shared().run(f"DROP DATABASE {url_name(self._url)}"))
        self._runner.close()

    def _rows(self, table: str) -> list[dict[str, Any]]:
        found = self._runner.run(self._reader.fetch(f"SELECT * FROM llm_quota_proxy.{table} ORDER BY 1, 2"))
        return [dict(row) for row in found]

    def _follow(self, show: Callable[[int], None]) -> None:
        self._show = show
        show(0)


@cache
def _empty_file() -> bytes:
    """A database with its schema: making one takes longer than a history."""
    with TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "empty.db")
        with asyncio.Runner() as runner:
            runner.run(store.open())
            runner.run(store.close())
        return (Path(folder) / "empty.db").read_bytes()


def _row(key: CounterKey, counter: Counter) -> list[Any]:
    window, levels = counter.window, (counter.used, counter.held)
    numbers = [number for each in levels for number in (each.input, each.output, each.requests)]
    return [*key, window.opened_at, window.resets_at, *numbers]


def _counters(found: Iterable[Mapping[str, Any]]) -> dict[CounterKey, Counter]:
    return {
        (row["subject"], row["quota_id"]): Counter(
            Window(row["opened_at"], row["resets_at"]), *(_amount(row, f"{side}_") for side in ("used", "held"))
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


# ---------------------------------------------------------------------------------------------------- the other books


@dataclass(eq=False)
class Opening:
    """One opening of a counter's window. `ceilings` are the highest up to which anything was held in it."""

    resets_at: int
    ceilings: dict[Measure, int] = field(default_factory=dict)


@dataclass(eq=False)
class Share:
    """What a call holds in one opening."""

    key: CounterKey
    opening: Opening
    amount: Amount


@dataclass(eq=False)
class Call:
    """A call that was let in, by the quotas that were in force then."""

    who: Binding
    hold: Amount
    state: str = "open"
    charge: Amount = NOTHING
    shares: dict[tuple[CounterKey, int], Share] = field(default_factory=dict)

    def parts(self) -> list[tuple[Share, Amount]]:
        """What each share is charged: of one counter each as much as it holds, and the last one the rest."""
        left = {share.key: self.charge for share in self.shares.values()}
        last = {share.key: share for share in self.shares.values()}
        parts = []
        for share in self.shares.values():
            rest = left[share.key]
            part = rest if share is last[share.key] else rest.at_most(share.amount)
            left[share.key] = rest - part
            parts.append((share, part))
        return parts


def _end(operation: Settle | Release | Expire, call: Call) -> None:
    """A call ends once; but that it was given up for lost is taken back, once, by the truth."""
    match operation:
        case Settle() if call.state in ("open", "expired"):
            call.state, call.charge = "settled", charge_of(operation.usage)
        case Release() if call.state == "open":
            call.state = "released"
        case Expire() if call.state == "open":
            call.state, call.charge = "expired", call.hold


class Ghost:
    """Books that know of each call where it holds what, and of each counter which opening is its last."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}
        self.last: dict[CounterKey, Opening] = {}

    def note(self, operation: Operation, reply: Reply, now: int) -> None:
        """What an act has done, by what was answered; and whether it may have done that."""
        known = self.calls.get(operation.id)
        if isinstance(operation, Reserve) and known is None:
            if isinstance(reply, Accepted):
                known = self.calls[operation.id] = Call(operation.binding, reply.entry.hold)
                self._hold(known, reply, now)
        elif known is None:
            assert reply == Unknown(operation.id)
            return
        elif isinstance(operation, Extend) and known.state == "open":
            self._grown(operation, known, reply, now)
        elif isinstance(operation, Settle | Release | Expire):
            _end(operation, known)
        assert isinstance(reply, Accepted | Refused)
        assert isinstance(reply, Accepted) is (known is not None)
        if isinstance(reply, Accepted) and known is not None:
            assert (reply.entry.state, reply.entry.hold) == (known.state, known.hold)
        for key, counter in reply.counters.items():
            self.last[key].resets_at = counter.window.resets_at

    def _grown(self, operation: Extend, call: Call, reply: Reply, now: int) -> None:
        assert isinstance(reply, Accepted)
        hold = reply.entry.hold
        assert hold.input == min(call.hold.input, operation.input)
        assert call.hold.output <= hold.output <= max(call.hold.output, operation.output)
        assert (reply.verdict is Verdict.ALLOW) is (hold.output >= operation.least)
        call.hold = hold
        self._hold(call, reply, now)

    def _hold(self, call: Call, reply: Accepted, now: int) -> None:
        """Take over how much is held where, and see that it is no more than there is room for."""
        held_amounts = {
            (held_amount.key, held_amount.opened_at): held_amount.amount for held_amount in reply.entry.held_amounts
        }
        assert len(held_amounts) == len(reply.entry.held_amounts)
        new = [held_amount for held_amount in held_amounts if held_amount not in call.shares]
        opened = {key: self._opening(key, now, reply.counters[key].window.resets_at) for key, _ in new}
        call.shares = {
            held_amount: Share(
                held_amount[0],
                call.shares[held_amount].opening if held_amount in call.shares else opened[held_amount[0]],
                amount,
            )
            for held_amount, amount in held_amounts.items()
        }
        quotas = {each.key_for(call.who.user): each for each in call.who.quotas if each.enforce == "exact"}
        for key, _ in new:
            if key in quotas:
                self._within(quotas[key], reply.counters[key], opened[key])

    def _within(self, each: Quota, counter: Counter, opening: Opening) -> None:
        for limit in each.limits:
            ceiling = each.ceiling(limit)
            taken = (counter.used + counter.held).of(limit.measure)
            assert taken <= ceiling or limit.measure == "output_tokens"  # which calls without an answer don't meet
            opening.ceilings[limit.measure] = max(ceiling, opening.ceilings.get(limit.measure, 0))

    def _opening(self, key: CounterKey, now: int, resets_at: int) -> Opening:
        """The last one while it goes on and anything is used or held in it, else a new one."""
        last = self.last.get(key)
        if last is None or last.resets_at <= now or not any(map(bool, self.levels(key))):
            self.last[key] = Opening(resets_at)
        return self.last[key]

    def levels(self, key: CounterKey) -> tuple[Amount, Amount]:
        """What is used and held in a counter's last opening."""
        used, held = NOTHING, NOTHING
        for call in self.calls.values():
            for share, part in call.parts():
                if share.opening is self.last[key]:
                    used, held = used + part, held + (share.amount if call.state == "open" else NOTHING)
        return used, held

    def hidden(self, key: CounterKey, measure: Measure) -> int:
        """What calls used in a counter's last opening beyond what they held there."""
        return sum(
            max(0, part.of(measure) - share.amount.of(measure))
            for call in self.calls.values()
            for share, part in call.parts()
            if share.opening is self.last[key]
        )


# ------------------------------------------------------------------------------------------------------ the histories

# Few quotas, and calls that are small beside them: what is refused leaves nothing to go wrong. So few windows that a
# history comes back to the same one now and then.
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
    """All that a quota may be at the beginning. Most are exact, since those have the promises."""
    enforced: list[tuple[Enforce, int]] = [("exact", 0), ("exact", 5), ("after", 0)]
    watched: list[tuple[Enforce, int]] = [("shadow", 0)]
    return [
        quota(name, per=per, shared=shared, enforce=enforce, overdraft=overdraft, **limits)
        for limits in LIMITS
        for per in PERS
        for shared in (False, True)
        for enforce, overdraft in (watched if name.startswith("watch") else enforced)
    ]


USERS = {"ann": "ab", "bob": "b"}
STEPS = st.sampled_from([1, HOUR, HOUR, DAY, -1, -HOUR, -DAY])


def _has_calls(histories: "Histories") -> bool:
    return bool(histories.ghost.calls)


def _may_crash(histories: "Histories") -> bool:
    """Not as soon as there is anything to be lost, or nothing ever grows."""
    return sum(call.state == "open" for call in histories.ghost.calls.values()) > 2


class Histories(RuleBasedStateMachine):
    """Each begins when hour, day and month have just begun together: so windows are easily taken for one another."""

    kept: type[Kept]

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.books, self.ghost = self.kept(), Ghost()
        self.now = instant("2026-12-01 00:00") + 5000
        self.ids, self.lives = count(), 0
        self.done: list[Operation] = []
        some = [name for name in NAMES if name in ALWAYS or data.draw(st.booleans())]
        self.quotas = {each.id: each for name in some for each in [data.draw(st.sampled_from(_quotas_named(name)))]}
        self.combine: Combine = data.draw(st.sampled_from(["any_group", "every_group"]))
        self.arrive(data, 3)

    def binding_of(self, user: str) -> Binding:
        def of(group: str) -> tuple[Quota, ...]:
            return tuple(each for each in self.quotas.values() if each.group == group)

        routes = tuple(GroupQuotas(group, of(group)) for group in USERS[user])
        return Binding(of("everyone"), routes, of("watch"), self.combine, user=user)

    # What becomes of calls. Each may come again, or late, and is then to change nothing.

    @rule(data=st.data(), number=st.sampled_from([1, 2, 4]))
    def arrive(self, data: st.DataObject, number: int) -> None:
        self.book(*(self.reserving(data, f"{next(self.ids)}") for _ in range(number)))

    @precondition(_has_calls)
    @rule(data=st.data(), number=st.sampled_from([1, 2, 4]), later=st.sampled_from([0, 0, HOUR, DAY]))
    def grow(self, data: st.DataObject, number: int, later: int) -> None:
        self.now += later
        self.book(*(self.growing(data, self.one_of_them(data)) for _ in range(number)))

    @precondition(_has_calls)
    @rule(data=st.data(), is_known=st.booleans())
    def settle(self, data: st.DataObject, is_known: bool) -> None:
        """By at most as much as it holds."""
        call_id = self.one_of_them(data)
        hold = self.ghost.calls[call_id].hold
        tokens = Tokens(
            *(data.draw(st.sampled_from([most, most, most // 2, 0])) for most in (hold.input, hold.output))
        )
        self.book(Settle(call_id, Exactly(tokens) if is_known else AtLeast(tokens), "complete"))

    @precondition(_has_calls)
    @rule(data=st.data(), tokens=st.builds(Tokens, st.integers(0, 50), st.integers(0, 50)))
    def settle_anyhow(self, data: st.DataObject, tokens: Tokens) -> None:
        """Possibly above its hold: the upstream charges what the request didn't show."""
        self.book(Settle(self.one_of_them(data), Exactly(tokens), "complete"))

    @precondition(_has_calls)
    @rule(data=st.data())
    def come_to_nothing(self, data: st.DataObject) -> None:
        """A bad request, an upstream that failed, or a process that was taken for dead, and may yet settle."""
        call_id = self.one_of_them(data)
        operations: list[Operation] = [Settle(call_id, Unspent(requests), "rejected") for requests in (0, 1)]
        operations += [Release(call_id), Expire(call_id), Expire(call_id)]
        self.book(data.draw(st.sampled_from(operations)))

    @precondition(_has_calls)
    @rule(data=st.data())
    def come_again(self, data: st.DataObject) -> None:
        """With the same id, and whatever else."""
        self.book(self.reserving(data, self.one_of_them(data)))

    @precondition(_has_calls)
    @rule(data=st.data(), number=st.sampled_from([2, 3, 5]))
    def happen_at_once(self, data: st.DataObject, number: int) -> None:
        """In one batch, also to the same call, and to one that is only being let in, or refused."""
        new = self.reserving(data, str(next(self.ids)))
        some = st.sampled_from([new.id, self.one_of_them(data), self.one_of_them(data)])
        self.book(new, *(self.something(data, data.draw(some), new) for _ in range(number)))

    def one_of_them(self, data: st.DataObject) -> str:
        """Most often one that is in flight."""
        every = list(self.ghost.calls)
        in_flight = [call_id for call_id in every if self.ghost.calls[call_id].state == "open"] or every
        among: list[str] = data.draw(st.sampled_from([in_flight, in_flight, in_flight, every]))
        return data.draw(st.sampled_from(among))

    def something(self, data: st.DataObject, call_id: str, new: Reserve) -> Operation:
        kinds: list[Callable[[], Operation]] = [
            lambda: self.growing(data, call_id, new),
            lambda: Settle(call_id, exactly(data.draw(st.integers(0, 9)), 5), "complete"),
            lambda: Release(call_id),
            lambda: Expire(call_id),
            lambda: new if call_id == new.id else self.reserving(data, call_id),
        ]
        return data.draw(st.sampled_from(kinds))()

    def reserving(self, data: st.DataObject, call_id: str) -> Reserve:
        user = data.draw(st.sampled_from(sorted(USERS)))
        operation = reserve(call_id, self.binding_of(user), data.draw(demands(most=9)))
        return replace(operation, owner=f"process-{self.lives}")

    def growing(self, data: st.DataObject, call_id: str, new: Reserve | None = None) -> Extend:
        """By the quotas with which it was let in, whatever has become of them."""
        call = self.ghost.calls[call_id] if new is None or new.id != call_id else Call(new.binding, NOTHING)
        output = call.hold.output + data.draw(st.integers(0, 12))
        held = call.hold.input // data.draw(st.sampled_from([1, 1, 2]))
        return Extend(call_id, call.who, held, output, data.draw(st.integers(0, output)))

    def book(self, *operations: Operation) -> None:
        replies = self.books.apply(operations, self.now)
        for operation, reply in zip(operations, replies, strict=True):
            self.ghost.note(operation, reply, self.now)
        self.done = [
            operation for operation, reply in zip(operations, replies, strict=True) if _is_done(operation, reply)
        ]

    @precondition(lambda self: self.done)
    @rule()
    def replay(self) -> None:
        """Nobody knows whether the batch was committed, so it is done once more."""
        before = self.books.everything()
        replies = self.books.apply(self.done, self.now)
        assert all(isinstance(reply, Accepted) for reply in replies)
        assert self.books.everything() == before

    # What happens around it.

    @rule(step=STEPS)
    def clock(self, step: int) -> None:
        self.now += step

    @rule(data=st.data(), maximum=st.integers(0, 80), overdraft=st.sampled_from([0, 0, 5]), per=st.sampled_from(PERS))
    def reload(self, data: st.DataObject, maximum: int, overdraft: int, per: str) -> None:
        """Of one quota a limit, or how long it counts, is another from now on."""
        each = self.quotas[data.draw(st.sampled_from(sorted(self.quotas)))]
        first, *rest = each.limits
        limited = replace(each, limits=(replace(first, maximum=maximum), *rest), overdraft=overdraft)
        changed = replace(each, per=quota("x/y", per=per).per)
        self.quotas[each.id] = data.draw(st.sampled_from([limited, changed]))

    @precondition(lambda self: self.ghost.last)
    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        """An operator sets a counter back to nothing, as a window that opens anew: calls in flight are of the old."""
        key = data.draw(st.sampled_from(sorted(self.ghost.last)))
        last = self.books.counters()[key].window
        window = Window(max(self.now, last.opened_at + 1), last.resets_at)
        self.books.put(key, Counter(window))
        self.ghost.last[key] = Opening(window.resets_at)
        self.done = []

    @precondition(_may_crash)
    @rule()
    def crash(self) -> None:
        """The process dies, and the next one charges what it left behind."""
        self.books.crash()
        self.lives += 1
        orphans = self.books.orphans(f"process-{self.lives}")
        assert set(orphans) == {call_id for call_id, call in self.ghost.calls.items() if call.state == "open"}
        self.book(*(Expire(call_id) for call_id in orphans))

    # What holds after each of these.

    @invariant()
    def the_books_say_what_the_ghost_says(self) -> None:
        """Held: what open calls hold in this window. Used: what ended ones are charged. Each ended but once.

        And promise 1: but for what calls used beyond their hold, no exact quota is over its limit and overdraft.
        """
        counters = self.books.counters()
        assert counters.keys() == self.ghost.last.keys()
        for key, counter in counters.items():
            assert (counter.used, counter.held) == self.ghost.levels(key)
            for level in (counter.used, counter.held):
                assert min(level.input, level.output, level.requests) >= 0
            for measure, ceiling in self.ghost.last[key].ceilings.items():
                taken = (counter.used + counter.held).of(measure)
                assert taken - self.ghost.hidden(key, measure) <= ceiling
        expected = {call_id: Record(call.state, call.hold, call.charge) for call_id, call in self.ghost.calls.items()}
        assert self.books.calls() == expected

    def teardown(self) -> None:
        if hasattr(self, "books"):
            self.books.close()


def _is_done(operation: Operation, reply: Reply) -> bool:
    """Whether an act did all that it can, so that it finds itself done when it comes again."""
    return isinstance(reply, Accepted) and not (
        isinstance(operation, Extend) and reply.entry.hold.output < operation.output
    )


class InMemoryHistories(Histories):
    kept = InMemory


class SqliteHistories(Histories):
    kept = OnSqlite


class PostgresHistories(Histories):
    kept = OnPostgres


InMemoryHistories.TestCase.settings = settings(max_examples=250, stateful_step_count=15)
SqliteHistories.TestCase.settings = settings(max_examples=50, stateful_step_count=15)
PostgresHistories.TestCase.settings = settings(max_examples=30, stateful_step_count=15)
TestInMemory = InMemoryHistories.TestCase
TestOnSqlite = SqliteHistories.TestCase
TestOnPostgres = PostgresHistories.TestCase
