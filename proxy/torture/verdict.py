"""The verdict of a torture run: what the upstream gave, what the clients saw and what the books say, side by side.

    overshoot         tokens beyond the limit, in each window of each counter
    lost              answers that a client saw, wholly or in part, and that are not charged, or not in full
    overcharged       answers that are charged more than the upstream said, or twice
    leaked            what is still held, or in flight, when all is quiet
    unbalanced        counters that are not the sum of their calls
    false refusals    of calls for which there was room: what they truly needed was free
    false resets      calls that came back at the instant that was named, and found the same window

The sums are made here, from the rows as they stand in the database, by a rule that is written down once more: a call
is charged to the lines of its row. Where a counter has several of them, because its window ended while the answer
grew, each but the last takes at most its own amount, and the last what is left.

Pure: records in, a report out. What can be asked of a proxy that nobody can look into is less: `judge_from_outside`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from proxy.torture.answers import Tokens
from proxy.torture.evidence import CounterKey, Evidence, Given, Levels, Line, Row, Seen, WindowKey
from proxy.torture.report import Figure, Report

# This part of all refusals may be false: one in a hundred.
_FALSE_AMONG = 100
_NONE: Levels = (0, 0, 0)


def judge(evidence: Evidence) -> Report:
    """Judge our own proxy, whose books we can read."""
    sums = _Sums(evidence)
    counters = len(evidence.books.levels)
    return Report(
        (
            *_counts(evidence),
            Figure(
                "made in vain", sums.made_in_vain(), "tokens that the upstream made ahead of answers that were cut"
            ),
            _promise("overshoot", sums.overshoot(), f"tokens beyond {evidence.limit:,}; windows: {sums.fullness()}"),
            _promise("overshoot given", sums.overshoot_given(), "the same by the upstream's own count"),
            _promise("lost", len(sums.lost()), "answers that a client saw complete and that are not charged in full"),
            _promise("lost in part", len(sums.lost_in_part()), "answers of which a client saw more than is charged"),
            _promise("overcharged", len(sums.overcharged()), "answers charged more than the upstream said, or twice"),
            _leaked(evidence),
            _promise("unbalanced", sums.unbalanced(), f"of {counters} counters: not the sum of their calls"),
            _promise("broken off", *_broken_off(evidence)),
            _promise("crashes", evidence.crashes, "times that the proxy ended by itself, or would not stop"),
            *_refusals(evidence),
            *_times(evidence),
        )
    )


def judge_from_outside(evidence: Evidence, *, windows: int, pots: int, counted: int | None) -> Report:
    """Judge any proxy: by the upstream's own count, and by what its own counter says it counted, where one is given.

    `windows` is how many the run can have touched of each of the `pots`: one for each user, or one for all.
    """
    user_of = {seen.mark: seen.user for seen in evidence.seen}
    given = dict.fromkeys(range(pots), 0)
    for each in evidence.given:
        if each.mark in user_of:
            given[user_of[each.mark] % pots] += each.taken + each.made
    allowed = evidence.limit * windows
    overshoot = sum(max(0, tokens - allowed) for tokens in given.values())
    note = f"tokens beyond {windows} × {evidence.limit:,} for each of {pots}, by the upstream's own count"
    known = {each.mark for each in evidence.given}
    strange = sum(seen.end == "complete" and seen.mark not in known for seen in evidence.seen)
    figures = [
        *_counts(evidence),
        _promise(
            "strange answers",
            strange,
            "complete ones that our upstream knows nothing of: nothing can be said of them",
        ),
        _promise("overshoot given", overshoot, note),
    ]
    if counted is not None:
        seen = sum(sum(each.usage or ()) for each in evidence.seen if each.end == "complete")
        note = f"tokens of complete answers that say {seen:,}; counted {counted:,}, given {sum(given.values()):,}"
        figures.append(_promise("lost", max(0, seen - counted), note))
    figures += [Figure("broken off", *_broken_off(evidence)), *_refusals(evidence), *_times(evidence)]
    return Report(tuple(figures))


def shares(lines: Sequence[Line], charge: Levels) -> Iterator[tuple[WindowKey, Levels]]:
    """What each line of a call is charged; see the module's text. The request counts on a counter's first line."""
    left: dict[CounterKey, Tokens] = {}
    for place, line in enumerate(lines):
        requests = 0 if line.counter in left else charge[2]
        taken, made = left.setdefault(line.counter, charge[:2])
        if any(later.counter == line.counter for later in lines[place + 1 :]):
            share = (min(taken, line.amount[0]), min(made, line.amount[1]), requests)
        else:
            share = (taken, made, requests)
        left[line.counter] = (taken - share[0], made - share[1])
        yield line.window, share


class _Sums:
    """The evidence, laid side by side by the marks of the calls."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._seen = {seen.mark: seen for seen in evidence.seen}
        self._given: dict[str, list[Given]] = defaultdict(list)
        for given in evidence.given:
            self._given[given.mark].append(given)
        self._rows: dict[str, list[Row]] = defaultdict(list)
        for row in evidence.books.rows:
            self._rows[row.mark].append(row)
        rows = evidence.books.rows
        self.used = _sum(share for row in rows if row.state != "open" for share in shares(row.lines, row.charge))
        self._held = _sum((line.window, line.amount) for row in rows if row.state == "open" for line in row.lines)

    def overshoot(self) -> int:
        """Tokens beyond the limit in all windows, by the rows' own charges."""
        return self._beyond(self.used)

    def fullness(self) -> str:
        """How many windows there were, and how much was used of the fullest."""
        fullest = max((taken + made for taken, made, _ in self.used.values()), default=0)
        return f"{len(self.used)}, in the fullest {fullest:,}"

    def overshoot_given(self) -> int:
        """The same by what the upstream took and made for each call.

        Of an answer that was cut, by whomever, it may have made more than ever arrived (see `made_in_vain`): that
        counts up to the call's charge.
        """
        return self._beyond(_sum(share for row in self._evidence.books.rows for share in self._truth(row)))

    def made_in_vain(self) -> int:
        """Tokens of answers that were cut, which the upstream had made and nobody took or was charged."""
        rows = [row for row in self._evidence.books.rows if not self._is_whole(row)]
        return sum(max(0, sum(given.made for given in self._given[row.mark]) - row.charge[1]) for row in rows)

    def lost(self) -> list[str]:
        """Marks of the answers that a client saw complete and that are not charged in full."""
        return [seen.mark for seen in self._evidence.seen if seen.end == "complete" and self._is_lost(seen)]

    def lost_in_part(self) -> list[str]:
        """Marks of the answers that broke off, or that their client left, and are charged less than it had seen."""
        left = [seen for seen in self._evidence.seen if seen.end in ("hung_up", "broken") and seen.words]
        return [seen.mark for seen in left if self._is_lost(seen)]

    def overcharged(self) -> list[str]:
        """Marks of the calls that are charged more than was said at their end, or that stand in the books twice."""
        return [mark for mark, rows in self._rows.items() if len(rows) > 1 or self._is_overcharged(rows[0])]

    def unbalanced(self) -> int:
        """How many counters are not the sum of the calls of their window."""
        return sum(
            level.used != self.used.get(level.window, _NONE) or level.held != self._held.get(level.window, _NONE)
            for level in self._evidence.books.levels
        )

    def _beyond(self, used: Mapping[WindowKey, Levels]) -> int:
        return sum(max(0, taken + made - self._evidence.limit) for taken, made, _ in used.values())

    def _is_lost(self, seen: Seen) -> bool:
        row = next((row for row in self._rows.get(seen.mark, ()) if row.id == seen.id), None)
        if row is None:
            return True
        said = self._said(row, seen) if seen.end == "complete" else None
        taken, made = said or (self._taken(seen), seen.words)
        if row.state == "expired" and seen.end != "complete":
            made = 0  # charged is how far it had got a while before the proxy died
        return row.charge[0] < taken or row.charge[1] < made

    def _is_overcharged(self, row: Row) -> bool:
        seen = self._seen.get(row.mark)
        if seen is None or row.state == "expired" or (row.outcome != "complete" and seen.end != "complete"):
            return False
        said = self._said(row, seen)
        return said is not None and (row.charge[0] > said[0] or row.charge[1] > said[1])

    def _is_whole(self, row: Row) -> bool:
        """Whether all that the upstream made for it came through."""
        seen = self._seen.get(row.mark)
        return row.outcome != "at_limit" and (
            row.outcome == "complete" or (seen is not None and seen.end == "complete")
        )

    def _said(self, row: Row, seen: Seen) -> Tokens | None:
        """The usage that the client was told, or else what the upstream told the proxy at the end of the answer."""
        told = (given.reported for given in self._given[seen.mark] if given.reported and row.outcome != "at_limit")
        return seen.usage or next(told, None)

    def _taken(self, seen: Seen) -> int:
        return sum(given.taken for given in self._given[seen.mark])

    def _truth(self, row: Row) -> Iterator[tuple[WindowKey, Levels]]:
        given = self._given[row.mark]
        taken, made = sum(each.taken for each in given), sum(each.made for each in given)
        if not self._is_whole(row):
            taken, made = min(taken, row.charge[0]), min(made, row.charge[1])
        return shares(row.lines, (taken, made, 0))


def _sum(shared: Iterable[tuple[WindowKey, Levels]]) -> dict[WindowKey, Levels]:
    sums: dict[WindowKey, Levels] = {}
    for window, (taken, made, requests) in shared:
        before = sums.get(window, _NONE)
        sums[window] = (before[0] + taken, before[1] + made, before[2] + requests)
    return sums


def _promise(name: str, value: int, note: str) -> Figure:
    """A figure that must be 0."""
    return Figure(name, value, note, value == 0)


def _counts(evidence: Evidence) -> list[Figure]:
    """What there was, before anything is judged."""
    ends = Counter(seen.end for seen in evidence.seen)
    told = ", ".join(f"{count:,} {end.replace('_', ' ')}" for end, count in ends.most_common())
    unsaid = sum(each.made for each in evidence.given if each.reported is None)
    lost = sum(row.state == "expired" for row in evidence.books.rows)
    befell = (
        Figure("kills", evidence.kills, f"{lost:,} calls were charged as lost"),
        Figure("pauses", evidence.pauses, "of a replica, three leases long"),
        Figure("restarts", evidence.restarts, "of the database"),
    )
    return [
        Figure("calls", len(evidence.seen), told, None if ends["complete"] else False),
        Figure(
            "tokens given",
            sum(each.taken + each.made for each in evidence.given),
            f"by the upstream, in {len(evidence.given):,} calls; {unsaid:,} of them for answers that were cut",
        ),
        *(figure for figure in befell if figure.value),
    ]


def _leaked(evidence: Evidence) -> Figure:
    """What was in flight though all was quiet, or is still held after the stop."""
    open_rows = sum(row.state == "open" for books in (evidence.at_rest, evidence.books) for row in books.rows)
    held = sum(sum(level.held) for books in (evidence.at_rest, evidence.books) for level in books.levels)
    return _promise("leaked", open_rows + held, f"{open_rows} calls in flight and {held} held, when all was quiet")


def _broken_off(evidence: Evidence) -> tuple[int, str]:
    """The calls that went wrong though nobody was to blame: neither their client, nor the upstream, nor we."""
    wrong = [seen for seen in evidence.seen if seen.end in ("broken", "failed", "unreached") and not seen.disturbed]
    how = Counter(f"{seen.end} ({seen.status})" for seen in wrong)
    return len(wrong), "calls that failed though nothing befell the proxy" + "".join(
        f", {count} {end}" for end, count in how.items()
    )


def _refusals(evidence: Evidence) -> list[Figure]:
    """How many there were, and whether they told the truth."""
    refused = [seen for seen in evidence.seen if seen.refusal]
    told = sum(seen.refusal is not None and seen.refusal.free is not None for seen in refused)
    false = sum(seen.had_room for seen in refused)
    retries = [seen for seen in evidence.seen if seen.retries and not seen.disturbed]
    early = sum(_is_same_window(seen) for seen in retries)
    return [
        Figure("refusals", len(refused)),
        Figure(
            "false refusals",
            false if told else None,
            f"{100 * false / max(1, told):.2f} % of {told:,}: what the call truly needed was free",
            false * _FALSE_AMONG < told if told else None,
        ),
        Figure(
            "false resets",
            early if retries else None,
            f"of {len(retries):,} calls that came back at the instant that was named: still the same window",
            early == 0 if retries else None,
        ),
    ]


def _is_same_window(seen: Seen) -> bool:
    refusal, before = seen.refusal, seen.retries
    if refusal is None or before is None or seen.had_room:
        return False
    return refusal.window is not None and refusal.window == before.window


def _times(evidence: Evidence) -> list[Figure]:
    """How long the two things took that a user waits for."""
    refused = [seen for seen in evidence.seen if seen.refusal and not seen.had_room]
    streams = [seen for seen in evidence.seen if seen.status == 200]
    return [
        figure
        for what, calls in (("refusal", refused), ("first byte", streams))
        for figure in _percentiles(what, [seen.answered_s for seen in calls if seen.answered_s is not None])
    ]


def _percentiles(what: str, seconds: list[float]) -> list[Figure]:
    shown = sorted(seconds)
    return [
        Figure(f"{what} p{part}", 1000 * shown[len(shown) * part // 100] if shown else None, f"ms, of {len(shown):,}")
        for part in (50, 99)
    ]
