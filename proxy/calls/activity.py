"""What the calls of this process do right now, for whoever watches, and what has to be noted for attention.

Calls tell it that they began, ended or were refused, and the ledger tells it the states of the counters. That takes
some microseconds, because nothing is written and no text is made here: `take` does that, five times a second. If
nobody watches, only the calls in flight, the changed counters and the refusals for the database are kept.

All of it is bounded. Of what calls did since the last `take`, `DETAILS_MAX` of each kind are kept and the others
counted. Of a counter only the newest state is kept. If more counters than `_CHANGED_MAX` wait, the oldest are left
out, and the batch says that it `is_incomplete`: who watches then has to read the counters again.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

import orjson

from proxy.calls.log_line import LogLine
from proxy.formats.refusal import named_block
from proxy.ledger.book import Accepted, Refused, Reply
from proxy.ledger.entry import Entry
from proxy.ledger.notices import Crossing, RefusalRow
from proxy.policy.amounts import NO_AMOUNT, Amount
from proxy.policy.binding import Binding
from proxy.policy.quota import Counter, CounterKey, Quota, counter_at, user_of
from proxy.policy.status import NEAR_PERCENT, QuotaStatus, quota_statuses
from proxy.policy.windows import Window

# How many calls that began, ended or were refused one batch has in full.
DETAILS_MAX = 100
# How many counters wait to be taken, and how many are taken at a time. While somebody watches, each takes 15 µs.
_CHANGED_MAX = 50_000
COUNTERS_AT_ONCE = 500
# How many refusals of different users, quotas and seconds wait to be noted. Each takes about 2 kB.
_REFUSALS_MAX = 5_000
REFUSALS_AT_ONCE = 500
# Of how many counters it is remembered which level was noted.
_LEVELS_MAX = 50_000
# The parts of a limit at which a counter is noted, in percent, highest first.
LEVELS = (100, NEAR_PERCENT)
# How many quotas the details of one refusal have. Those that refused it come first.
_QUOTAS_MAX = 40

T = TypeVar("T")


@dataclass(slots=True)
class Details(Generic[T]):
    """Some of what happened, each with the group that admitted the call or whose quota refused it.

    `more` is how many others there were, by group.
    """

    items: list[tuple[str, T]] = field(default_factory=list)
    more: dict[str, int] = field(default_factory=dict)

    def add(self, group: str, item: T) -> None:
        """Keep one more, or count it."""
        if len(self.items) < DETAILS_MAX:
            self.items.append((group, item))
        else:
            self.more[group] = self.more.get(group, 0) + 1

    def extend(self, later: "Details[T]") -> None:
        """Add what happened later."""
        for group, item in later.items:
            self.add(group, item)
        for group, count in later.more.items():
            self.more[group] = self.more.get(group, 0) + count

    def __bool__(self) -> bool:
        return bool(self.items or self.more)


class CounterState(NamedTuple):
    """The state of a counter at an instant (ms, by the ledger's clock), as JSON."""

    at: int
    data: bytes


@dataclass(slots=True)
class Batch:
    """What happened in some time, as JSON: calls that began, ended or were refused, and the newest counters.

    `tokens` is what all calls that ended used, by group; None: not known, because an older release wrote the rest.
    `is_incomplete`: there were other counters, whose states are lost.
    """

    begun: Details[bytes] = field(default_factory=Details)
    ended: Details[bytes] = field(default_factory=Details)
    refused: Details[bytes] = field(default_factory=Details)
    tokens: dict[str, Amount] | None = field(default_factory=dict)
    counters: dict[CounterKey, CounterState] = field(default_factory=dict)
    is_incomplete: bool = False

    def __bool__(self) -> bool:
        return bool(self.begun or self.ended or self.refused or self.counters or self.is_incomplete)


@dataclass(slots=True)
class _RefusedCall:
    """A refused call, and how many more the same quota refused of the same user in that second.

    The binding and the counters are those of the decision. What is written of them is made from them later.
    """

    id: str
    user: str
    key_id: str
    model: str
    endpoint: str
    refused: Refused
    binding: Binding
    count: int = 1

    def as_json(self) -> dict[str, object]:
        """The refusal as it is shown: a row without its details."""
        shown = asdict(self._row(""))
        renamed = {"user": shown.pop("user_name"), "quota": shown.pop("quota_id"), "limit": shown.pop("maximum")}
        return {name: value for name, value in {**shown, **renamed}.items() if name not in ("count", "details")}

    def row(self) -> RefusalRow:
        """The row for the database."""
        return self._row(orjson.dumps(self._details()).decode())

    def _row(self, details: str) -> RefusalRow:
        decision = self.refused.decision
        block = named_block(decision.blocks)
        measure = block.limit.measure
        return RefusalRow(
            request_id=self.id,
            at=self.refused.decided_at,
            user_name=self.user,
            quota_id=block.quota.id,
            model=self.model,
            endpoint=self.endpoint,
            verdict=decision.verdict.word,
            measure=measure.value,
            maximum=block.limit.maximum,
            used=block.counter.used.of(measure),
            held=block.counter.held.of(measure),
            needed=block.needed,
            resets_at=block.counter.window.resets_at,
            admissible_at=decision.admissible_at,
            key_id=self.key_id or None,
            count=self.count,
            details=details,
        )

    def _details(self) -> dict[str, object]:
        """The quotas that the decision read, what was used of them, and which of their limits refused the call.

        Enough must be left of all quotas of one of the `alternatives`.
        """
        decision, binding = self.refused.decision, self.binding
        statuses = quota_statuses(binding, self.refused.counters, self.refused.decided_at)
        shown = list(dict.fromkeys((*decision.refused_by, *statuses)))[:_QUOTAS_MAX]
        return {
            "refused_by": decision.refused_by[:_QUOTAS_MAX],
            "blocks": [
                {"quota": block.quota.id, "measure": block.limit.measure.value, "needed": block.needed}
                for block in decision.blocks[:_QUOTAS_MAX]
            ],
            "alternatives": [
                [quota.id for quota in each.quotas if quota.id in shown]
                for each in binding.alternatives()[:_QUOTAS_MAX]
            ],
            "quotas": [_quota_shown(statuses[quota_id], binding.user) for quota_id in shown],
        }


class Activity:
    """What the calls of this process do. `now` gives ms since 1970, by the ledger's clock.

    `quota_of` gives the quota of a counter at an instant (ms), with the limits that are in force then; None if the
    policy has none with this id. `is_watched` is set while somebody watches. `not_noted` counts refusals and
    crossings that there was no room for.
    """

    def __init__(
        self,
        *,
        now: Callable[[], int],
        quota_of: Callable[[CounterKey, int], Quota | None],
        changed_max: int = _CHANGED_MAX,
        levels_max: int = _LEVELS_MAX,
    ) -> None:
        self.is_watched = False
        self.calls: dict[str, LogLine] = {}  # those in flight
        self.not_noted = 0
        self._now = now
        self._quota_of = quota_of
        self._changed_max = changed_max
        self._levels_max = levels_max
        self._begun: Details[LogLine] = Details()
        self._ended: Details[tuple[LogLine, int]] = Details()  # each with the time of its end
        self._refused: Details[_RefusedCall] = Details()
        self._tokens: dict[str, Amount] = {}
        # The counters as the ledger last reported them, and when it decided that (ms). They are in the order in which
        # they first changed since they were taken, so each is taken in its turn.
        self._changed: OrderedDict[CounterKey, tuple[Counter, int]] = OrderedDict()
        self._is_incomplete = False
        # The highest level of each counter, and the window in which it reached that.
        self._levels: OrderedDict[CounterKey, tuple[Window, int]] = OrderedDict()
        self._crossings: list[Crossing] = []
        self._refusals: dict[tuple[str, str, int], _RefusedCall] = {}

    # What happens

    def began(self, line: LogLine) -> None:
        """The call of this line was admitted."""
        self.calls[line.request_id] = line
        if self.is_watched:
            self._begun.add(_group(line), line)

    def ended(self, line: LogLine) -> None:
        """A call that began has ended, with the outcome and the usage that its line has."""
        del self.calls[line.request_id]
        if self.is_watched:
            group, usage = _group(line), line.usage
            self._ended.add(group, (line, self._now()))
            if usage is not None:
                used = Amount(usage.tokens.input, usage.tokens.output)
                self._tokens[group] = self._tokens.get(group, NO_AMOUNT) + used

    def refused(self, line: LogLine, refused: Refused, binding: Binding) -> None:
        """The call of this line was refused. `binding` are the quotas that were asked."""
        assert line.caller is not None, "only the call of a known caller is refused by quotas"
        quota = named_block(refused.decision.blocks).quota
        second = (line.caller.user, quota.id, refused.decided_at // 1000)
        noted = self._refusals.get(second)
        if noted is not None and not self.is_watched:
            noted.count += 1
            return
        call = _RefusedCall(
            line.request_id,
            line.caller.user,
            line.caller.key.id,
            line.model or "other",
            line.endpoint,
            refused,
            binding,
        )
        if noted is not None:
            noted.count += 1
        elif len(self._refusals) < _REFUSALS_MAX:
            self._refusals[second] = call
        else:
            self.not_noted += 1
        if self.is_watched:
            self._refused.add(quota.group, call)

    def replied(self, replies: Sequence[Reply]) -> None:
        """The ledger has decided this, in this order."""
        for reply in replies:
            if isinstance(reply, Accepted):
                line = self.calls.get(reply.entry.id)
                if line is not None:
                    line.entry = reply.entry
            elif not isinstance(reply, Refused):
                continue
            self.counters_changed(reply.counters, reply.decided_at)

    def counters_changed(self, counters: Mapping[CounterKey, Counter], at: int) -> None:
        """These are the states of counters at this instant (ms), except of those of which a later one is known."""
        changed = self._changed
        for key, counter in counters.items():
            known = changed.get(key)
            if known is None or known[1] <= at:
                changed[key] = counter, at
        while len(changed) > self._changed_max:
            changed.popitem(last=False)
            self._is_incomplete = True

    def note_incomplete(self) -> None:
        """More counters have changed than are told of: who watches has to read them again."""
        self._is_incomplete = True

    # What is made of it

    def take(self) -> Batch:
        """What happened since the last call of this: at most DETAILS_MAX details of each kind, the others as counts.

        It has the newest states of up to COUNTERS_AT_ONCE counters; the next batch has the others. Crossings are
        found here too. If nobody watches, the batch is empty.
        """
        batch = Batch(is_incomplete=self._is_incomplete and self.is_watched)
        self._is_incomplete = False
        for _ in range(min(COUNTERS_AT_ONCE, len(self._changed))):
            key, (counter, at) = self._changed.popitem(last=False)
            quota = self._quota_of(key, at)
            if quota is None:
                continue
            if not counter.window.opened_at <= at < counter.window.resets_at:
                counter = counter_at(at, quota, counter)
            self._note_level(key, QuotaStatus(quota, counter), at)
            if self.is_watched:
                # With the end that the next call finds, which is earlier than the stored one after a change of `per`.
                status = QuotaStatus(quota, counter_at(at, quota, counter))
                batch.counters[key] = CounterState(at, orjson.dumps({"at": at, **_counter_shown(key, status)}))
        batch.begun, self._begun = _encoded(self._begun, _call_shown), Details()
        batch.ended, self._ended = _encoded(self._ended, _end_shown), Details()
        batch.refused, self._refused = _encoded(self._refused, _RefusedCall.as_json), Details()
        batch.tokens, self._tokens = self._tokens, {}
        return batch

    def take_notices(self, *, is_last: bool = False) -> tuple[list[RefusalRow], list[Crossing]]:
        """What has to be noted in the database: refusals of seconds that are over, and crossings.

        A second is over one second after its end, because calls are told of their refusals a little later. If this
        `is_last`, the refusals of the running second are returned too.
        """
        until = self._now() // 1000 - 1
        over = (second for second in self._refusals if is_last or second[2] < until)
        rows = [self._refusals.pop(second).row() for second in list(islice(over, REFUSALS_AT_ONCE))]
        crossings, self._crossings = self._crossings, []
        return rows, crossings

    def calls_in_flight(self, is_shown: Callable[[str], bool]) -> Iterator[bytes]:
        """The calls in flight whose groups are shown, as JSON, in the order in which they were admitted."""
        return (orjson.dumps(_call_shown(line)) for line in self.calls.values() if is_shown(_group(line)))

    def _note_level(self, key: CounterKey, status: QuotaStatus, at: int) -> None:
        level, window = _level(status), status.counter.window
        last, noted = self._levels.get(key, (window, 0))
        if last.opened_at != window.opened_at:
            noted = 0
        # Also noted anew is a window that was shortened: otherwise it would be shown until its old end.
        if level > noted or (level and window.resets_at < last.resets_at):
            if len(self._crossings) < _REFUSALS_MAX:
                self._crossings.append(Crossing(*key, window.opened_at, window.resets_at, level, at))
            else:
                self.not_noted += 1
                return
        if level:
            self._levels[key] = (window, level)
            self._levels.move_to_end(key)
            if len(self._levels) > self._levels_max:
                self._levels.popitem(last=False)
        else:
            # Reset, or a new window: when it reaches a level again, that is noted again.
            self._levels.pop(key, None)


def _entry(line: LogLine) -> Entry:
    assert line.entry is not None, "it is that of an admitted call"
    return line.entry


def _group(line: LogLine) -> str:
    return _entry(line).admitted_via


def _call_shown(line: LogLine) -> dict[str, object]:
    """A call in flight as it is shown."""
    assert line.caller is not None, "only the call of a known caller is admitted"
    entry, key = _entry(line), line.caller.key
    return {
        **_names(line),
        "key_id": key.id,
        "key": key.label,
        "endpoint": entry.labels.endpoint,
        "address": line.address,
        "began_at": entry.reserved_at,
        "held_input": entry.hold.input,
        "held_output": entry.hold.output,
    }


def _end_shown(ended: tuple[LogLine, int]) -> dict[str, object]:
    """The end of a call as it is shown, with the time of its end. Without a usage nothing was charged."""
    line, ended_at = ended
    usage = line.usage
    return {
        **_names(line),
        "outcome": line.outcome,
        "input_tokens": usage.tokens.input if usage else 0,
        "output_tokens": usage.tokens.output if usage else 0,
        "provenance": usage.provenance if usage else None,
        "ended_at": ended_at,
    }


def _names(line: LogLine) -> dict[str, object]:
    entry = _entry(line)
    return {
        "id": entry.id,
        "user": entry.labels.user,
        "group": entry.admitted_via,
        "model": line.model or entry.labels.model,
    }


def _level(status: QuotaStatus) -> int:
    """The highest of LEVELS that a limit of the quota has reached; 0: none. A limit of 0 is a switch."""
    percent = max((100 * use.used // use.limit.maximum for use in status.uses if use.limit.maximum), default=0)
    return next((level for level in LEVELS if percent >= level), 0)


def _counter_shown(key: CounterKey, status: QuotaStatus) -> dict[str, object]:
    """A counter as it is shown. Without a `user` it is that of all members of the group."""
    quota, window = status.quota, status.window
    return {
        "user": None if quota.shared else user_of(key[0]),
        "group": quota.group,
        "quota": quota.id,
        "shared": quota.shared,
        "opened_at": None if window is None else window.opened_at,
        "resets_at": None if window is None else window.resets_at,
        "limits": [{"measure": limit.measure.value, **status.use_of(limit)} for limit in quota.limits],
    }


def _quota_shown(status: QuotaStatus, user: str) -> dict[str, object]:
    """A quota and its counter for a user."""
    quota = status.quota
    return {
        **_counter_shown(quota.key_for(user), status),
        "models": list(quota.models.texts),
        "enforce": quota.enforce,
        "per": quota.per.text,
    }


def _encoded(raw: Details[T], shown: Callable[[T], Mapping[str, object]]) -> Details[bytes]:
    return Details([(group, orjson.dumps(shown(item))) for group, item in raw.items], raw.more)
