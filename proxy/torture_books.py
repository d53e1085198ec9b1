"""The books of a tortured proxy, read from its SQLite file with plain SQL.

Nothing of the proxy's own code stands between the file and the verdict: what is judged may not be its own witness.
"""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from proxy.torture_plan import MODEL_PREFIX
from proxy.torture_records import Books, Level, Line, Row

_ROWS = "SELECT id, model, state, outcome, input_tokens, output_tokens, requests, lines FROM calls"
_LEVELS = (
    "SELECT subject, quota_id, opened_at, used_input, used_output, used_requests, held_input, held_output, "
    "held_requests FROM counters"
)
_WAIT_S = 5.0


def read_books(path: Path) -> Books:
    """What is committed, at one instant; the file may be in use."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=_WAIT_S, isolation_level=None)) as file:
        file.execute("BEGIN")  # so that calls and counters are those of one moment
        rows = [
            Row(id, _mark(model), state, outcome, (taken or 0, made or 0, requests or 0), _lines(lines))
            for id, model, state, outcome, taken, made, requests, lines in file.execute(_ROWS)
        ]
        levels = [
            Level(
                (subject, quota, opened_at), used=(found[0], found[1], found[2]), held=(found[3], found[4], found[5])
            )
            for subject, quota, opened_at, *found in file.execute(_LEVELS)
        ]
    return Books(rows, levels)


def count_open(path: Path) -> int:
    """How many calls are in flight by the books."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=_WAIT_S)) as file:
        (count,) = file.execute("SELECT count(*) FROM calls WHERE state = 'open'").fetchone()
    return int(count)


def _mark(model: str) -> str:
    return model.removeprefix(MODEL_PREFIX)


def _lines(text: str) -> tuple[Line, ...]:
    return tuple(
        Line((key[0], key[1]), opened_at, (amount[0], amount[1], amount[2]))
        for key, opened_at, *_, amount in json.loads(text)
    )
