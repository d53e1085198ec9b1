"""What is known of the calls of a process: the newest state of everything, in bounded memory."""

import json
from typing import Any

from proxy.calls import activity as module
from proxy.calls.activity import COUNTERS_AT_ONCE, DETAILS_MAX, Activity, Batch
from proxy.calls.log_line import LogLine
from proxy.identity.authentication import Caller
from proxy.ledger.book import Accepted, Book, Refused, Release, Settle, Unknown
from proxy.ledger.entry import Outcome
from proxy.ledger.notices import Crossing
from proxy.policy.amounts import Amount, Usage
from proxy.policy.binding import Binding
from proxy.policy.key import Key
from proxy.policy.quota import Counter, CounterKey, Quota
from proxy.policy.windows import Window
from tests.builders import (
    HOUR,
    MINUTE,
    NOON,
    amount,
    binding,
    call,
    counters,
    exactly,
    extend,
    log_line,
    quota,
    reserve,
)

DAILY = quota("staff/daily", tokens=1000, requests=10)
POT = quota("staff/pot", tokens=1000, shared=True)


class Process:
    """An activity with a clock and quotas that tests change, and a book of real counters."""

    def __init__(self, *quotas: Quota, **more: Any) -> None:
        self.now = NOON
        self.quotas = {each.id: each for each in quotas}
        self.activity = Activity(now=lambda: self.now, quota_of=lambda key, at: self.quotas.get(key[1]), **more)
        self.counters: dict[CounterKey, Counter | None] = {}
        self.entries: dict[str, Any] = {}
        self.lines: dict[str, LogLine] = {}

    def apply(self, operation: Any) -> Any:
        """Have the book decide, and tell the activity, as the ledger does."""
        book = Book(self.counters, self.entries, self.now)
        reply = book.apply(operation)
        self.counters, self.entries = book.counters, book.entries
        self.activity.replied([reply])
        return reply

    def begin(self, request_id: str, who: Binding, input_tokens: int = 100, output: int = 0) -> Accepted | Refused:
        """A call that asks for admission, as the relay reports it."""
        reply = self.apply(reserve(request_id, who, call(input_tokens, output)))
        if isinstance(reply, Accepted):
            line = self.lines[request_id] = line_of(request_id, who.user)
            line.mark_admitted(reply.entry)
            self.activity.began(line)
        else:
            self.activity.refused(line_of(request_id, who.user), reply, who)
        return reply

    def end(self, request_id: str, tokens: int) -> None:
        """The end of a call that used so many tokens."""
        self.apply(Settle(request_id, exactly(tokens), "complete"))
        self.ended(request_id, "complete", exactly(tokens))

    def ended(self, request_id: str, outcome: Outcome, usage: Usage | None) -> None:
        """The end of a call, as the relay reports it."""
        line = self.lines[request_id]
        line.outcome, line.usage = outcome, usage
        self.activity.ended(line)


def line_of(request_id: str, user: str) -> LogLine:
    line = log_line(request_id)
    line.caller = Caller(user, ("staff",), Key("key_1", label="laptop"), "file")
    line.model, line.endpoint = "gpt-4o-mini", "chat"
    return line


def watched(*quotas: Quota, **more: Any) -> Process:
    process = Process(*quotas, **more)
    process.activity.is_watched = True
    return process


def shown(items: list[tuple[str, bytes]]) -> list[Any]:
    return [json.loads(data) for _, data in items]


def states(batch: Batch) -> dict[CounterKey, Any]:
    return {key: json.loads(state.data) for key, state in batch.counters.items()}


ANN = binding([DAILY, POT])


def test_a_call_is_shown_from_its_beginning_to_its_end():
    """Who, which key and model, from where, what it holds, and what it was charged."""
    process = watched(DAILY, POT)
    process.begin("req_1", ANN, 100, 400)
    batch = process.activity.take()
    [begun] = shown(batch.begun.items)
    assert begun == {
        **{"id": "req_1", "user": "ann", "group": "staff", "model": "gpt-4o-mini", "endpoint": "chat"},
        **{"key_id": "key_1", "key": "laptop", "address": "192.0.2.1", "began_at": NOON},
        **{"held_input": 100, "held_output": 400},
    }
    assert [json.loads(each) for each in process.activity.calls_in_flight(lambda group: True)] == [begun]
    assert not list(process.activity.calls_in_flight(lambda group: False))
    process.now += MINUTE
    process.end("req_1", 70)
    [ended] = shown(process.activity.take().ended.items)
    assert ended["id"] == "req_1"
    assert (ended["outcome"], ended["input_tokens"], ended["output_tokens"]) == ("complete", 70, 0)
    assert ended["ended_at"] == NOON + MINUTE
    assert not process.activity.calls


def test_a_call_that_was_charged_nothing_is_shown_without_usage():
    """Its upstream failed."""
    process = watched(DAILY)
    process.begin("req_1", binding([DAILY]))
    process.apply(Release("req_1"))
    process.ended("req_1", "upstream_failed", None)
    [ended] = shown(process.activity.take().ended.items)
    assert (ended["outcome"], ended["input_tokens"], ended["provenance"]) == ("upstream_failed", 0, None)


def test_the_tokens_of_all_calls_that_ended_are_added_up_by_group():
    """Also of those without details. A call that was charged nothing adds none."""
    process = watched(quota("staff/daily", tokens=10**9), quota("lab/daily", tokens=10**9))
    for group, calls in (("staff", DETAILS_MAX + 20), ("lab", 3)):
        who = binding([quota(f"{group}/daily", tokens=10**9)])
        for number in range(calls):
            process.begin(f"{group}-{number}", who, 10, 10)
            process.end(f"{group}-{number}", 7)
    process.begin("failed", who)
    process.apply(Release("failed"))
    process.ended("failed", "upstream_failed", None)
    batch = process.activity.take()
    assert (len(batch.ended.items), batch.ended.more) == (DETAILS_MAX, {"staff": 20, "lab": 4})
    assert batch.tokens == {"staff": Amount(7 * (DETAILS_MAX + 20)), "lab": Amount(21)}
    assert not process.activity.take().tokens


def test_all_refusals_are_counted():
    process = watched(DAILY, POT)
    for number in range(DETAILS_MAX + 20):
        refuse(process, f"req_{number}")
    refused = process.activity.take().refused
    assert (len(refused.items), refused.more) == (DETAILS_MAX, {"staff": 20})


def test_what_a_call_holds_is_the_newest():
    """A stream holds more while its answer grows."""
    process = watched(DAILY)
    process.begin("req_1", binding([DAILY]), 100, 100)
    process.apply(extend("req_1", binding([DAILY]), 300))
    [running] = process.activity.calls_in_flight(lambda group: True)
    assert json.loads(running)["held_output"] == 300


def test_a_counter_is_shown_with_its_limits():
    """That of one user, and that of all members."""
    process = watched(DAILY, POT)
    process.begin("req_1", ANN, 100, 400)
    found = states(process.activity.take())
    own = found["user:ann", "staff/daily"]
    assert (own["user"], own["group"], own["quota"], own["shared"]) == ("ann", "staff", "staff/daily", False)
    assert own["at"] == NOON
    assert own["resets_at"] == NOON + 12 * HOUR
    assert own["limits"] == [
        {"measure": "tokens", "limit": 1000, "used": 0, "held": 500, "remaining": 500, "percent": 0.0},
        {"measure": "requests", "limit": 10, "used": 0, "held": 1, "remaining": 9, "percent": 0.0},
    ]
    assert found["~staff", "staff/pot"]["user"] is None
    assert not process.activity.take()


def test_only_the_newest_state_of_a_counter_is_kept():
    """However often it changes before the next batch."""
    process = watched(DAILY)
    for number in range(9):
        process.begin(f"req_{number}", binding([DAILY]), 10)
        process.end(f"req_{number}", 10)
    [state] = states(process.activity.take()).values()
    assert state["limits"][0]["used"] == 90


def test_a_window_of_a_duration_has_no_times_before_a_call_opens_it():
    """Its end would be later each time. A limit of 0 is used up."""
    process = watched(quota("staff/burst", tokens=0, per="6h"))
    process.activity.counters_changed({("user:ann", "staff/burst"): Counter(Window(NOON - HOUR, NOON))}, NOON)
    [state] = states(process.activity.take()).values()
    assert (state["opened_at"], state["resets_at"], state["limits"][0]["percent"]) == (None, None, 100.0)


def test_counters_of_quotas_that_are_gone_and_unknown_calls_are_left_out():
    """The policy has changed meanwhile, or the record was deleted."""
    process = watched()
    process.begin("req_1", ANN)
    process.activity.replied([Unknown("req_2")])
    assert not process.activity.take().counters


def test_of_many_calls_only_some_are_shown_and_all_are_counted():
    """By group, so that who sees one group knows how many are not shown."""
    lab = binding([quota("lab/daily", tokens=10**9)], user="zoe")
    staff = binding([quota("staff/daily", tokens=10**9)])
    process = watched()
    for number in range(DETAILS_MAX + 30):
        process.begin(f"req_{number}", lab if number % 3 == 0 else staff)
    for number in range(DETAILS_MAX + 30):
        process.end(f"req_{number}", 1)
    batch = process.activity.take()
    for details in (batch.begun, batch.ended):
        assert len(details.items) == DETAILS_MAX
        assert details.more == {"lab": 10, "staff": 20}


def test_if_nobody_watches_only_what_is_needed_later_is_kept():
    """The calls in flight, and no list of what they did."""
    process = Process(DAILY)
    for number in range(3):
        process.begin(f"req_{number}", binding([DAILY]), 10)
        process.end(f"req_{number}", 10)
    process.begin("req_9", binding([DAILY]), 2000)
    assert not process.activity.take()
    assert not process.activity._begun.items and not process.activity._ended.items
    assert not process.activity._refused.items and not process.activity._changed


def test_counters_that_do_not_fit_into_a_batch_are_in_the_next():
    """In their turn: one that changes all the time does not displace the others."""
    process = watched(DAILY)
    keys = [(f"user:{number}", "staff/daily") for number in range(COUNTERS_AT_ONCE + 5)]
    for key in keys:
        process.activity.counters_changed({key: Counter(Window(NOON, NOON + HOUR), amount(1))}, NOON)
    process.activity.counters_changed({keys[0]: Counter(Window(NOON, NOON + HOUR), amount(2))}, NOON)
    first = process.activity.take()
    process.activity.counters_changed({keys[0]: Counter(Window(NOON, NOON + HOUR), amount(3))}, NOON)
    second = process.activity.take()
    assert list(first.counters) == keys[:COUNTERS_AT_ONCE]
    assert list(second.counters) == [*keys[COUNTERS_AT_ONCE:], keys[0]]
    assert states(second)[keys[0]]["limits"][0]["used"] == 3


def test_too_many_counters_are_left_out_and_the_batch_says_so():
    """The memory is bounded; who watches reads them again."""
    process = watched(DAILY, changed_max=10)
    for number in range(11):
        key = (f"user:{number}", "staff/daily")
        process.activity.counters_changed({key: Counter(Window(NOON, NOON + HOUR), amount(1))}, NOON)
    batch = process.activity.take()
    assert batch.is_incomplete
    assert ("user:0", "staff/daily") not in batch.counters
    assert len(batch.counters) == 10
    assert not process.activity.take().is_incomplete


def test_a_state_that_was_read_before_the_last_reply_is_older():
    """A reset is read from the database, and a call can end meanwhile."""
    process = watched(DAILY)
    key, window = ("user:ann", "staff/daily"), Window(NOON, NOON + HOUR)
    process.activity.counters_changed({key: Counter(window, amount(7))}, NOON + 2)
    process.activity.counters_changed({key: Counter(window, amount(0))}, NOON + 1)
    [state] = states(process.activity.take()).values()
    assert state["limits"][0]["used"] == 7


def test_counters_that_are_not_told_of_make_the_batch_incomplete():
    process = watched(DAILY)
    process.activity.note_incomplete()
    assert process.activity.take().is_incomplete
    assert not process.activity.take().is_incomplete


# ----------------------------------------------------------------------------------------------------------- refusals


def refuse(process: Process, request_id: str, who: Binding = ANN, tokens: int = 2000) -> None:
    assert isinstance(process.begin(request_id, who, tokens), Refused)


def test_a_refusal_is_shown_with_the_limit_that_the_error_names():
    """What was used and held of it, and what the call needed."""
    process = watched(DAILY, POT)
    process.begin("req_1", ANN, 100)
    refuse(process, "req_2")
    [refused] = shown(process.activity.take().refused.items)
    assert refused == {
        **{"request_id": "req_2", "at": NOON, "user": "ann", "key_id": "key_1", "quota": "staff/daily"},
        **{"model": "gpt-4o-mini", "endpoint": "chat", "verdict": "never", "measure": "tokens", "limit": 1000},
        **{"used": 0, "held": 100, "needed": 2000, "resets_at": NOON + 12 * HOUR, "admissible_at": None},
    }


def test_one_row_for_each_user_quota_and_second_counts_the_others():
    """Also while somebody watches, to whom all are shown."""
    for is_watched in (False, True):
        process = Process(DAILY, POT)
        process.activity.is_watched = is_watched
        for number in range(5):
            refuse(process, f"req_{number}")
        refuse(process, "req_of_zoe", binding([DAILY], user="zoe"))
        process.now += 1000
        refuse(process, "req_next")
        assert process.activity.take_notices() == ([], [])  # a call may be told of its refusal a little later
        process.now += 1000
        assert len(process.activity.take().refused.items) == (7 if is_watched else 0)
        rows, _ = process.activity.take_notices()
        assert [(row.request_id, row.user_name, row.count) for row in rows] == [
            ("req_0", "ann", 5),
            ("req_of_zoe", "zoe", 1),
        ]
        assert [row.request_id for row in process.activity.take_notices(is_last=True)[0]] == ["req_next"]
        assert process.activity.take_notices(is_last=True) == ([], [])


def test_the_details_of_a_refusal_explain_it_later():
    """All quotas that were read, those of another group that might have admitted it too."""
    lab = quota("lab/hourly", tokens=100, requests=5, per="hour", models=["gpt-*"])
    who = binding([DAILY, POT], [lab])
    process = Process(DAILY, POT, lab)
    process.counters = counters(who, used={"staff/daily": 1000, "lab/hourly": 100})
    refuse(process, "req_1", who, 10)
    process.now += 3000
    [row] = process.activity.take_notices()[0]
    assert (row.quota_id, row.verdict, row.maximum, row.used) == ("lab/hourly", "exhausted", 100, 100)
    assert row.admissible_at == NOON + HOUR
    details = json.loads(row.details)
    assert details["refused_by"] == ["lab/hourly"]
    assert details["blocks"] == [{"quota": "lab/hourly", "measure": "tokens", "needed": 10}]
    assert details["alternatives"] == [["staff/daily", "staff/pot"], ["lab/hourly"]]
    assert [each["quota"] for each in details["quotas"]] == ["lab/hourly", "staff/daily", "staff/pot"]
    first = details["quotas"][0]
    assert (first["models"], first["enforce"], first["per"]) == (["gpt-*"], "exact", "hour")
    assert first["limits"][0]["used"] == 100


def test_a_refusal_without_a_model_or_key_id_can_be_stored():
    """Its body was not read; and its key has no id."""
    process = Process(DAILY)
    line = line_of("req_1", "ann")
    assert line.caller is not None
    line.model, line.caller = None, Caller("ann", (), Key(""), "file")
    reply = process.apply(reserve("req_1", binding([DAILY]), call(2000)))
    process.activity.refused(line, reply, binding([DAILY]))
    [row] = process.activity.take_notices(is_last=True)[0]
    assert (row.model, row.key_id) == ("other", None)


def test_refusals_that_wait_are_bounded(monkeypatch):
    """What does not fit is counted."""
    monkeypatch.setattr(module, "_REFUSALS_MAX", 3)
    process = Process(DAILY)
    for number in range(5):
        refuse(process, f"req_{number}", binding([DAILY], user=f"user-{number}"))
    assert process.activity.not_noted == 2
    assert len(process.activity.take_notices(is_last=True)[0]) == 3


# ---------------------------------------------------------------------------------------------------------- crossings


def crossed(process: Process) -> list[tuple[str, int]]:
    process.activity.take()
    return [(each.quota_id, each.level) for each in process.activity.take_notices()[1]]


def test_a_counter_that_reaches_a_level_is_noted_once():
    """At 80 % and at 100 %, by its tightest limit; also if nobody watches."""
    process = Process(DAILY)
    who = binding([DAILY])
    process.counters = counters(who, used={"staff/daily": 700})
    process.begin("req_1", who, 100)
    assert crossed(process) == []  # what is held is not used
    process.end("req_1", 100)
    process.activity.take()
    assert process.activity.take_notices()[1] == [
        Crossing("user:ann", "staff/daily", NOON - 12 * HOUR, NOON + 12 * HOUR, 80, NOON)
    ]
    process.begin("req_2", who, 10)
    process.end("req_2", 10)
    assert crossed(process) == []
    process.begin("req_3", who, 190)
    process.end("req_3", 190)
    assert crossed(process) == [("staff/daily", 100)]
    refuse(process, "req_4", who, 1)
    assert crossed(process) == []


def test_a_level_is_noted_again_after_a_reset_and_in_the_next_window():
    """An administrator has set it to 0, or a day has passed."""
    process, key = Process(DAILY), ("user:ann", "staff/daily")
    today, tomorrow = (Window(NOON + day * 24 * HOUR, NOON + (day + 1) * 24 * HOUR) for day in (0, 1))

    def change(window: Window, used: int) -> list[tuple[str, int]]:
        process.activity.counters_changed({key: Counter(window, amount(used))}, window.opened_at)
        return crossed(process)

    assert change(today, 1000) == [("staff/daily", 100)]
    assert change(today, 850) == []
    assert change(today, 1000) == [("staff/daily", 100)]
    assert change(today, 0) == []
    assert change(today, 800) == [("staff/daily", 80)]
    assert change(tomorrow, 800) == [("staff/daily", 80)]
    assert change(tomorrow, 800) == []


def test_a_level_is_noted_again_when_its_window_is_shortened():
    """`per` was changed. Until the first call after that is admitted or refused, the window is stored as it was."""
    process, key = Process(quota("staff/daily", tokens=1000, per="minute")), ("user:ann", "staff/daily")
    day, minute = (Window(NOON, NOON + length) for length in (24 * HOUR, 60_000))
    noted = []
    for window, seconds in ((day, 1), (minute, 2), (minute, 3)):
        process.activity.counters_changed({key: Counter(window, amount(900))}, NOON + seconds * 1000)
        process.activity.take()
        noted.append([(each.level, each.resets_at) for each in process.activity.take_notices()[1]])
    assert noted == [[(80, day.resets_at)], [(80, minute.resets_at)], []]


def test_a_limit_of_zero_is_no_level():
    """It is a switch."""
    process = Process(quota("staff/daily", tokens=0))
    process.activity.counters_changed({("user:ann", "staff/daily"): Counter(Window(NOON, NOON + HOUR))}, NOON)
    assert crossed(process) == []


def test_what_is_remembered_of_levels_is_bounded(monkeypatch):
    """A forgotten one is noted again, which changes nothing in the database. Too many are noted later."""
    monkeypatch.setattr(module, "_REFUSALS_MAX", 3)
    process = Process(DAILY, levels_max=2)

    def use_up(*users: int) -> list[tuple[str, int]]:
        for user in users:
            window = Window(NOON, NOON + HOUR)
            process.activity.counters_changed({(f"user:{user}", "staff/daily"): Counter(window, amount(1000))}, NOON)
        return crossed(process)

    assert use_up(1, 2, 3, 4) == [("staff/daily", 100)] * 3
    assert process.activity.not_noted == 1
    assert use_up(3, 4) == [("staff/daily", 100)]
    assert use_up(1) == [("staff/daily", 100)]
