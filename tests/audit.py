"""An auditor of a ledger. It reads the tables with plain SQL and uses no code of the program that wrote them.

audit(path)                 checks a SQLite file: it is intact, and its counters are the sums of its calls
balance(calls, counters)    checks the same for rows that were read elsewhere

Of counters that were reset, only what is held is such a sum.
contents(path)              the whole file as SQL
"""

import json
import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

Key = tuple[str, str, int]
Row = Mapping[str, Any]


@contextmanager
def connected(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection of our own. It begins and commits only if told to, and waits for no lock."""
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
        yield connection


def rows(path: Path, table: str) -> list[dict[str, Any]]:
    """The committed rows of a table, sorted by their first two columns."""
    with connected(path) as connection:
        connection.row_factory = sqlite3.Row
        found = connection.execute(f"SELECT * FROM {table}").fetchall()
    return [dict(row) for row in sorted(found, key=lambda row: tuple(row)[:2])]


def contents(path: Path) -> list[str]:
    """The whole file as SQL: schema and rows."""
    with connected(path) as connection:
        return list(connection.iterdump())


def states(path: Path) -> dict[str, str]:
    """The state of each call, by id."""
    return {row["id"]: row["state"] for row in rows(path, "calls")}


def audit(path: Path, *, reset: Collection[tuple[str, str]] = ()) -> None:
    """Check that the file is intact, and that its counters are the sums of its calls.

    `reset` has the keys of the counters that were reset. It does not check limits, because limits change.
    """
    with connected(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    balance(rows(path, "calls"), rows(path, "counters"), reset=reset)


def balance(calls: Iterable[Row], counters: Iterable[Row], *, reset: Collection[tuple[str, str]] = ()) -> None:
    """Check that each counter holds what its open calls hold, and has used what its ended calls are charged."""
    used: dict[Key, list[int]] = defaultdict(lambda: [0, 0, 0])
    held: dict[Key, list[int]] = defaultdict(lambda: [0, 0, 0])
    for call in calls:
        charged = [call["input_tokens"] or 0, call["output_tokens"] or 0, call["requests"] or 0]
        is_open = call["state"] == "open"
        assert is_open == (call["ended_at"] is None)
        assert charged == [0, 0, 0] or not is_open
        held_amounts = [((*key, opened_at), amount) for key, opened_at, amount in json.loads(call["lines"])]
        windows = {window for window, _ in held_amounts}
        assert len(windows) == len(held_amounts), f"{call['id']} has two held amounts in one window"
        parts = [amount for _, amount in held_amounts] if is_open else _split(held_amounts, charged)
        for (window, _), part in zip(held_amounts, parts, strict=True):
            level = (held if is_open else used)[window]
            level[:] = [total + amount for total, amount in zip(level, part, strict=True)]
    for counter in counters:
        window = (counter["subject"], counter["quota_id"], counter["opened_at"])
        for side, sums in (("used", used), ("held", held)):
            levels = [counter[f"{side}_{measure}"] for measure in ("input", "output", "requests")]
            is_a_sum = side == "held" or window[:2] not in reset
            assert levels == sums.get(window, [0, 0, 0]) or not is_a_sum, f"{side} of {window}"
            assert min(levels) >= 0, f"{side} of {window}"


def _split(held_amounts: list[tuple[Key, list[int]]], charged: list[int]) -> list[list[int]]:
    """What each held amount is charged. Of several of one counter: each what it holds, and the last one the rest."""
    rests: dict[tuple[str, str], list[int]] = {}
    parts = []
    for index, ((subject, quota_id, _), amount) in enumerate(held_amounts):
        rest = rests.setdefault((subject, quota_id), charged)
        is_last = all(window[:2] != (subject, quota_id) for window, _ in held_amounts[index + 1 :])
        part = rest if is_last else [min(one, other) for one, other in zip(rest, amount, strict=True)]
        rests[subject, quota_id] = [one - other for one, other in zip(rest, part, strict=True)]
        parts.append(part)
    return parts
