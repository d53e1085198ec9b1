"""An auditor of a ledger's file, who reads it with plain SQL and trusts nothing of the program that wrote it.

audit(path)                 the file is sound, and its counters are the sums of its calls
balance(calls, counters)    the same of rows from elsewhere
contents(path)              all that stands in it
"""

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

Key = tuple[str, str, int]
Row = Mapping[str, Any]


@contextmanager
def connected(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection of one's own, that begins and commits only when told, and waits for nobody."""
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
        yield connection


def rows(path: Path, table: str) -> list[dict[str, Any]]:
    """What is committed in a table, by its first columns."""
    with connected(path) as connection:
        connection.row_factory = sqlite3.Row
        found = connection.execute(f"SELECT * FROM {table}").fetchall()
    return [dict(row) for row in sorted(found, key=lambda row: tuple(row)[:2])]


def contents(path: Path) -> list[str]:
    """The whole file as SQL: schema and rows."""
    with connected(path) as connection:
        return list(connection.iterdump())


def states(path: Path) -> dict[str, str]:
    """id → state, of all calls."""
    return {row["id"]: row["state"] for row in rows(path, "calls")}


def audit(path: Path) -> None:
    """The file is sound; each counter holds what its open calls hold and has used what its ended ones are charged.

    Whether that is within the limits is not its matter: limits change.
    """
    with connected(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    balance(rows(path, "calls"), rows(path, "counters"))


def balance(calls: Iterable[Row], counters: Iterable[Row]) -> None:
    """The same of rows that were read from elsewhere."""
    used: dict[Key, list[int]] = defaultdict(lambda: [0, 0, 0])
    held: dict[Key, list[int]] = defaultdict(lambda: [0, 0, 0])
    for call in calls:
        charged = [call["input_tokens"] or 0, call["output_tokens"] or 0, call["requests"] or 0]
        is_open = call["state"] == "open"
        assert is_open == (call["ended_at"] is None)
        assert charged == [0, 0, 0] or not is_open
        lines = [((*key, opened_at), amount) for key, opened_at, amount in json.loads(call["lines"])]
        assert len({key for key, _ in lines}) == len(lines), f"two lines of {call['id']} for one window"
        parts = [amount for _, amount in lines] if is_open else _parts(lines, charged)
        for (key, _), part in zip(lines, parts, strict=True):
            level = (held if is_open else used)[key]
            level[:] = [total + amount for total, amount in zip(level, part, strict=True)]
    for counter in counters:
        key = (counter["subject"], counter["quota_id"], counter["opened_at"])
        for side, sums in (("used", used), ("held", held)):
            levels = [counter[f"{side}_{measure}"] for measure in ("input", "output", "requests")]
            assert levels == sums.get(key, [0, 0, 0]), f"{side} of {key}"
            assert min(levels) >= 0, f"{side} of {key}"


def _parts(lines: list[tuple[Key, list[int]]], charged: list[int]) -> list[list[int]]:
    """What each line is charged: of several for one counter each takes what it held, and the last one the rest."""
    left: dict[tuple[str, str], list[int]] = {}
    parts = []
    for place, ((subject, quota_id, _), amount) in enumerate(lines):
        rest = left.setdefault((subject, quota_id), charged)
        is_last = all(key[:2] != (subject, quota_id) for key, _ in lines[place + 1 :])
        part = rest if is_last else [min(one, other) for one, other in zip(rest, amount, strict=True)]
        left[subject, quota_id] = [one - other for one, other in zip(rest, part, strict=True)]
        parts.append(part)
    return parts
