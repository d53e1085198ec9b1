"""The verdict of a torture run: the records of clients, upstream and database, compared call by call.

    overshoot            tokens charged beyond the limit, in each window of each counter
    upstream overshoot   the same by the upstream's own count
    lost                 answers that a client received in full and that are not charged in full
    lost in part         answers that a client received in part and that are charged less than it received
    overcharged          answers that are charged more than the upstream reported, or twice
    leaked               calls in flight, or amounts held, after the last call has ended
    unbalanced           counters that differ from the sum of their calls
    false refusals       refused calls that would have fitted: the tokens that they needed were free
    false resets         calls that were repeated at the reset that was named, and found the same window

The sums are computed here from the rows of the database, with a second implementation of the rule for a call whose
window ends while its answer grows. Such a call holds amounts in several windows of one counter. It is charged to them
in order: each but the last takes at most the amount held there, and the last takes the rest.

    held 150 (opened 10:00) and 30 (opened 11:00), charged 160: 150 to the first window and 10 to the second

Pure: takes records, returns a report. `judge_external` judges less, because another proxy's rows can't be read.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from proxy.torture.answers import Tokens
from proxy.torture.changes import DIGITS, Timeline
from proxy.torture.evidence import (
    Amounts,
    CallRow,
    ClientRecord,
    CounterKey,
    Evidence,
    HeldAmount,
    UpstreamRecord,
    WindowKey,
)
from proxy.torture.report import Figure, Report

# Fewer than one refusal in this many may be false. Calls in flight hold more than they are charged in the end, so a
# refusal can be right by what was held and false by what was used.
_ONE_FALSE_IN = 100
_ZERO: Amounts = (0, 0, 0)


def judge(evidence: Evidence) -> Report:
    """Judge this proxy, whose database was read."""
    matched = _Matched(evidence)
    counters = len(matched.counters)
    return Report(
        (
            *_totals(evidence),
            Figure("wasted tokens", matched.wasted_tokens(), "generated for answers that were cut, and not charged"),
            promise("overshoot", matched.overshoot(), f"tokens beyond {evidence.limit:,}; {matched.windows_note()}"),
            promise("upstream overshoot", matched.upstream_overshoot(), "the same by the upstream's own count"),
            promise("lost", len(matched.lost()), "answers that a client received in full, not charged in full"),
            promise("lost in part", len(matched.lost_in_part()), "answers charged less than their client received"),
            promise("overcharged", len(matched.overcharged()), "answers charged more than reported, or twice"),
            _leaked(evidence),
            promise("unbalanced", matched.unbalanced(), f"of {counters} counters: not the sum of their calls"),
            promise("unexplained failures", *_unexplained_failures(evidence)),
            promise("crashes", evidence.crashes, "the proxy exited by itself, or did not stop"),
            *_refusals(evidence),
            *_times(evidence),
        )
    )


def judge_external(evidence: Evidence, *, windows: int, counters: int, counted: int | None) -> Report:
    """Judge any proxy by the upstream's own count, and by the proxy's counter if it can be read.

    `windows` is how many windows of each counter the run can have touched, `counters` one for each user or one for
    all, `counted` how many tokens the proxy's counter added during the run.
    """
    user_of = {record.tag: record.user for record in evidence.clients}
    by_counter = dict.fromkeys(range(counters), 0)
    for each in evidence.upstream:
        if each.tag in user_of:
            by_counter[user_of[each.tag] % counters] += each.input_tokens + each.output_tokens
    allowed = evidence.limit * windows
    overshoot = sum(max(0, tokens - allowed) for tokens in by_counter.values())
    note = f"tokens beyond {windows} × {evidence.limit:,} for each of {counters}, by the upstream's own count"
    known = {each.tag for each in evidence.upstream}
    foreign = sum(record.result == "complete" and record.tag not in known for record in evidence.clients)
    reported = sum(sum(record.usage or ()) for record in evidence.clients if record.result == "complete")
    figures = [
        Figure("limit", allowed * counters, f"tokens in {windows} windows of {counters} counters"),
        *_totals(evidence),
        Figure("upstream calls", len(evidence.upstream), "that the upstream saw"),
        Figure("reported tokens", reported, "in complete answers"),
        promise("foreign answers", foreign, "complete answers that this upstream did not give, so can't be judged"),
        promise("upstream overshoot", overshoot, note),
    ]
    if counted is not None:
        given = sum(by_counter.values())
        note = f"of {reported:,} tokens reported in complete answers; {counted:,} counted, {given:,} by the upstream"
        figures.append(promise("lost", max(0, reported - counted), note))
    # Not a promise: an external proxy may fail for reasons that its operator knows and this test does not.
    figures += [Figure("unexplained failures", *_unexplained_failures(evidence))]
    figures += [*_refusals(evidence), *_times(evidence)]
    return Report(tuple(figures))


def charges_by_window(held: Sequence[HeldAmount], charge: Amounts) -> Iterator[tuple[WindowKey, Amounts]]:
    """Yield what each held amount's window is charged, by the rule in the module's docstring.

    The request counts in the first window of each counter. Each counter is charged the whole call: a user's own quota
    and a shared one beside it don't divide the charge.
    """
    remaining: dict[CounterKey, Tokens] = {}
    for position, each in enumerate(held):
        requests = 0 if each.counter in remaining else charge[2]
        input_tokens, output_tokens = remaining.setdefault(each.counter, charge[:2])
        if any(later.counter == each.counter for later in held[position + 1 :]):
            share = (min(input_tokens, each.amount[0]), min(output_tokens, each.amount[1]), requests)
        else:
            share = (input_tokens, output_tokens, requests)
        remaining[each.counter] = (input_tokens - share[0], output_tokens - share[1])
        yield each.window, share


class _Matched:
    """The records of a run, matched by the calls' tags."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._client = {record.tag: record for record in evidence.clients}
        # Lists, because the proxy may retry at the upstream, and because a call that is stored twice must be found.
        self._upstream: dict[str, list[UpstreamRecord]] = defaultdict(list)
        for record in evidence.upstream:
            self._upstream[record.tag].append(record)
        calls = evidence.stopped.calls
        self._rows: dict[str, list[CallRow]] = defaultdict(list)
        for row in calls:
            self._rows[row.tag].append(row)
        ended = [row for row in calls if row.state != "open"]
        shares = _sum(share for row in ended for share in charges_by_window(row.held, row.charge))
        self._used = {window: amounts for window, amounts in shares.items() if self._is_fixed(window)}
        self.counters = [row for row in evidence.stopped.counters if self._is_fixed(row.window)]
        self._held = _sum((each.window, each.amount) for row in calls if row.state == "open" for each in row.held)

    def overshoot(self) -> int:
        """Return the tokens charged beyond the limit, in all windows."""
        return self._beyond_limit(self._used)

    def windows_note(self) -> str:
        """Return how many windows there were, and how much was used in the fullest."""
        fullest = max((tokens[0] + tokens[1] for tokens in self._used.values()), default=0)
        return f"windows: {len(self._used)}, in the fullest {fullest:,}"

    def upstream_overshoot(self) -> int:
        """Return the tokens beyond the limit by the upstream's count.

        An answer that was cut, by its client or by the proxy, counts up to its charge: the upstream may have
        generated more than ever arrived (see `wasted_tokens`).
        """
        calls = self._evidence.stopped.calls
        return self._beyond_limit(_sum(share for row in calls for share in self._true_charges(row)))

    def wasted_tokens(self) -> int:
        """Return the tokens that the upstream generated for answers that were cut, beyond what was charged."""
        cut = [row for row in self._evidence.stopped.calls if not self._is_whole(row)]
        return sum(
            max(0, sum(record.output_tokens for record in self._upstream[row.tag]) - row.charge[1]) for row in cut
        )

    def lost(self) -> list[str]:
        """Return the tags of answers that a client received in full and that are not charged in full."""
        complete = [record for record in self._evidence.clients if record.result == "complete"]
        return [record.tag for record in complete if self._is_lost(record)]

    def lost_in_part(self) -> list[str]:
        """Return the tags of answers that ended early and are charged less than their client received."""
        cut = [record for record in self._evidence.clients if record.result in ("disconnected", "broken")]
        return [record.tag for record in cut if record.words and self._is_lost(record)]

    def overcharged(self) -> list[str]:
        """Return the tags of calls that are charged more than their usage, or that are stored twice."""
        return [tag for tag, rows in self._rows.items() if len(rows) > 1 or self._is_overcharged(rows[0])]

    def unbalanced(self) -> int:
        """Return the number of counters that differ from the sum of their window's calls."""
        return sum(
            row.used != self._used.get(row.window, _ZERO) or row.held != self._held.get(row.window, _ZERO)
            for row in self.counters
        )

    def _is_fixed(self, window: WindowKey) -> bool:
        """Whether it is of the quota that nobody changes. `administration` judges the others."""
        return self._evidence.administration is None or window[1] not in DIGITS

    def _beyond_limit(self, used: Mapping[WindowKey, Amounts]) -> int:
        fixed = (tokens for window, tokens in used.items() if self._is_fixed(window))
        return sum(max(0, tokens[0] + tokens[1] - self._evidence.limit) for tokens in fixed)

    def _is_lost(self, record: ClientRecord) -> bool:
        rows = self._rows.get(record.tag, ())
        row = next((row for row in rows if row.request_id == record.request_id), None)
        if row is None:
            return True
        usage = self._true_usage(row, record) if record.result == "complete" else None
        input_tokens, output_tokens = usage or (self._upstream_input(record), record.words)
        if row.state == "expired" and record.result != "complete":
            # The proxy was killed. It charges what it had stored of the answer's progress, which may be a while old,
            # so a client may have received more words.
            output_tokens = 0
        return row.charge[0] < input_tokens or row.charge[1] < output_tokens

    def _is_overcharged(self, row: CallRow) -> bool:
        record = self._client.get(row.tag)
        if record is None or row.state == "expired":
            return False  # a call that was lost with the proxy is charged what it held
        if row.outcome != "complete" and record.result != "complete":
            return False  # an answer that was cut is charged by an estimate
        usage = self._true_usage(row, record)
        return usage is not None and (row.charge[0] > usage[0] or row.charge[1] > usage[1])

    def _is_whole(self, row: CallRow) -> bool:
        """Whether everything that the upstream generated for the call was passed on."""
        record = self._client.get(row.tag)
        return row.outcome != "at_limit" and (
            row.outcome == "complete" or (record is not None and record.result == "complete")
        )

    def _true_usage(self, row: CallRow, record: ClientRecord) -> Tokens | None:
        """Return the usage that the client received, or else the one that the upstream sent to the proxy.

        The upstream's usage is not true of an answer that the proxy ended at the limit: it may report 5,000 tokens of
        which the proxy passed on 40.
        """
        if row.outcome == "at_limit":
            return record.usage
        return record.usage or next((each.reported for each in self._upstream[record.tag] if each.reported), None)

    def _upstream_input(self, record: ClientRecord) -> int:
        return sum(each.input_tokens for each in self._upstream[record.tag])

    def _true_charges(self, row: CallRow) -> Iterator[tuple[WindowKey, Amounts]]:
        records = self._upstream[row.tag]
        input_tokens = sum(record.input_tokens for record in records)
        output_tokens = sum(record.output_tokens for record in records)
        if not self._is_whole(row):
            input_tokens, output_tokens = min(input_tokens, row.charge[0]), min(output_tokens, row.charge[1])
        return charges_by_window(row.held, (input_tokens, output_tokens, 0))


def _sum(shares: Iterable[tuple[WindowKey, Amounts]]) -> dict[WindowKey, Amounts]:
    sums: dict[WindowKey, Amounts] = {}
    for window, amounts in shares:
        before = sums.get(window, _ZERO)
        sums[window] = (before[0] + amounts[0], before[1] + amounts[1], before[2] + amounts[2])
    return sums


def promise(name: str, value: int, note: str) -> Figure:
    """Return a figure that must be 0."""
    return Figure(name, value, note, value == 0)


def _totals(evidence: Evidence) -> list[Figure]:
    """Return how many calls, tokens and faults there were."""
    results = Counter(record.result for record in evidence.clients)
    note = ", ".join(f"{count:,} {result}" for result, count in results.most_common())
    without_usage = sum(each.output_tokens for each in evidence.upstream if each.reported is None)
    lost = sum(row.state == "expired" for row in evidence.stopped.calls)
    faults = (
        Figure("kills", evidence.kills, f"{lost:,} calls were lost with a process"),
        Figure("pauses", evidence.pauses, "of a replica, for three leases"),
        Figure("restarts", evidence.restarts, "of the database"),
    )
    return [
        # No complete answer at all: the promises would be kept because nothing was tested.
        Figure("calls", len(evidence.clients), note, None if results["complete"] else False),
        Figure(
            "upstream tokens",
            sum(each.input_tokens + each.output_tokens for each in evidence.upstream),
            f"in {len(evidence.upstream):,} calls; {without_usage:,} of them in answers that were cut",
        ),
        *(figure for figure in faults if figure.value),
    ]


def _leaked(evidence: Evidence) -> Figure:
    """Return what was open or held after the last call had ended, before and after the stop."""
    snapshots = (evidence.idle, evidence.stopped)
    open_calls = sum(row.state == "open" for snapshot in snapshots for row in snapshot.calls)
    held = sum(sum(row.held) for snapshot in snapshots for row in snapshot.counters)
    return promise("leaked", open_calls + held, f"{open_calls} calls in flight and {held} held after the last call")


def _unexplained_failures(evidence: Evidence) -> tuple[int, str]:
    """Return the calls that failed although no fault was injected, and a note with their results and statuses."""
    failed = [
        record
        for record in evidence.clients
        if record.result in ("broken", "failed", "unreachable") and not record.disturbed
    ]
    if evidence.administration is not None:
        administered = _Administered(evidence, Timeline(evidence.administration))
        failed = [record for record in failed if not administered.explains(record)]
    kinds = Counter(f"{record.result} ({record.status})" for record in failed)
    return len(failed), "calls that failed although no fault was injected" + "".join(
        f", {count} {kind}" for kind, count in kinds.items()
    )


class _Administered:
    """Which failures the administrator is the reason of: the user was disabled, or the key or the call was cut."""

    def __init__(self, evidence: Evidence, timeline: Timeline) -> None:
        self._users = evidence.users
        self._timeline = timeline
        # A client whose connection is closed before the headers never learns the id of its request.
        self._ids = {row.tag: row.request_id for row in evidence.stopped.calls}

    def explains(self, record: ClientRecord) -> bool:
        user, began_at, ended_at = self._users[record.user], record.began_at, record.ended_at
        if record.result == "failed" and record.status == 401:
            return self._timeline.may_be_refused(user, began_at, ended_at)
        if record.result == "unreachable" or (record.status or 0) >= 500:
            return False
        request_id = record.request_id or self._ids.get(record.tag)
        return self._timeline.may_be_cut(user, request_id, began_at, ended_at)


def _refusals(evidence: Evidence) -> list[Figure]:
    """Return the number of refusals, and how many of them, and of the resets that they named, were false."""
    refused = [record for record in evidence.clients if record.refusal]
    judged = sum(record.refusal is not None and record.refusal.free_tokens is not None for record in refused)
    false = sum(record.is_falsely_refused for record in refused)
    retries = [record for record in evidence.clients if record.retry_of and not record.disturbed]
    early = sum(_is_same_window(record) for record in retries)
    return [
        Figure("refusals", len(refused)),
        Figure(
            "false refusals",
            false if judged else None,
            f"{100 * false / max(1, judged):.2f} % of {judged:,}: the tokens that the call needed were free",
            false * _ONE_FALSE_IN < judged if judged else None,
        ),
        Figure(
            "false resets",
            early if retries else None,
            f"of {len(retries):,} calls repeated at the reset that was named: still the same window",
            early == 0 if retries else None,
        ),
    ]


def _is_same_window(record: ClientRecord) -> bool:
    """Whether a repeated call was refused for lack of tokens, in the same window as before."""
    refusal, before = record.refusal, record.retry_of
    if refusal is None or before is None or record.is_falsely_refused:
        return False
    is_same = (refusal.quota, refusal.window_opened_at) == (before.quota, before.window_opened_at)
    return refusal.window_opened_at is not None and is_same


def _times(evidence: Evidence) -> list[Figure]:
    """Return the times that a user notices: until a refusal, and until the first byte of a stream."""
    refused = [record for record in evidence.clients if record.refusal and not record.is_falsely_refused]
    streams = [record for record in evidence.clients if record.status == 200]
    return [
        figure
        for name, records in (("refusal", refused), ("first byte", streams))
        for figure in percentiles(name, [each.answered_s for each in records if each.answered_s is not None])
    ]


def percentiles(name: str, seconds: list[float]) -> list[Figure]:
    """Return the median of these times and their 99th percentile, in ms."""
    ordered = sorted(seconds)
    return [
        Figure(
            f"{name} p{part}",
            1000 * ordered[len(ordered) * part // 100] if ordered else None,
            f"ms, of {len(ordered):,}",
        )
        for part in (50, 99)
    ]
