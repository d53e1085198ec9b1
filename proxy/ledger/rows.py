"""Converts counters and entries to rows of the database and back, the same for every engine.

What is written here is read back equal, to the last field. The values of a row are in the order of its table's
columns.
"""

from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple

import orjson

from proxy.ledger.book import Book, Extend, Operation, Reserve, Restore
from proxy.ledger.entry import CallLabels, Entry, HeldAmount
from proxy.policy.amounts import QUANTITIES, Amount, AtLeast, Exactly, Tokens, Unspent, Usage, call_amount
from proxy.policy.quota import Counter, CounterKey
from proxy.policy.windows import Window

# The columns of a call that change after its admission, in the order of the table.
CHANGING = (
    "state upstream ended_at hold_input hold_output lines "
    "input_tokens output_tokens cached_tokens reasoning_tokens requests provenance outcome response_id address"
).split()

Row = Sequence[Any]
# How many numbers an amount has, in the columns of `counters` and in `calls.lines`.
_WIDTH = len(QUANTITIES)


class Changes(NamedTuple):
    """The rows that a batch has to write, sorted by their keys, so that all processes write them in the same order.

    `counters` and `opened` have all columns. `changed` has those of CHANGING, and then the id of the call.
    """

    counters: list[Row]
    opened: list[Row]
    changed: list[Row]


def changes_of(book: Book, known: Container[str]) -> Changes:
    """What a batch has changed. `known` are the ids of the calls that were in the database before it."""
    changes = Changes([], [], [])
    for key in sorted(book.counters_changed):
        counter = book.counters_changed[key]
        window = counter.window
        changes.counters.append(
            (*key, window.opened_at, window.resets_at, *counter.used, *counter.held, counter.reset_at)
        )
    for call_id in sorted(book.entries_changed):
        entry = book.entries[call_id]
        if call_id in known:
            changes.changed.append(_changed_row(entry))
        else:
            changes.opened.append(_opened_row(entry))
    return changes


def keys_of(operations: Iterable[Operation]) -> set[CounterKey]:
    """The counters that operations name. The counters that their calls hold already are found in the entries."""
    keys: set[CounterKey] = set()
    for operation in operations:
        if isinstance(operation, Reserve | Extend):
            keys.update(operation.binding.keys())
        elif isinstance(operation, Restore):
            keys.update(held.key for held in operation.entry.held_amounts)
    return keys


def counters_of(rows: Iterable[Row]) -> dict[CounterKey, Counter]:
    """The counters in these rows.

    A row whose `resets_at` is 0 was only made so that it could be locked; it is not a counter yet.
    """
    return {
        (subject, quota_id): Counter(
            Window(opened_at, resets_at), Amount(*levels[:_WIDTH]), Amount(*levels[_WIDTH:]), reset_at
        )
        for subject, quota_id, opened_at, resets_at, *levels, reset_at in rows
        if resets_at
    }


def names_of(text: str | None) -> tuple[str, ...] | None:
    """The names in a column that has a list of them as JSON; None if it is NULL."""
    return None if text is None else tuple(orjson.loads(text))


def entry_of(row: Row) -> Entry:
    """The entry in a row of `calls`."""
    entry_id, owner, state, user, model, endpoint, upstream, admitted_via, reserved_at, ended_at = row[:10]
    hold_input, hold_output, maximum, held_amounts, capped_by, would_refuse = row[10:16]
    outcome, _, response_id, key_id, tag, address = row[22:]
    return Entry(
        id=entry_id,
        owner=owner,
        labels=CallLabels(user, model, endpoint, upstream, key_id or "", tag or "", address or ""),
        admitted_via=admitted_via,
        reserved_at=reserved_at,
        hold=call_amount(hold_input, hold_output),
        maximum=maximum,
        # A release with fewer quantities wrote fewer numbers: the missing ones are 0. One with more, which shares the
        # database while replicas are replaced, wrote more: those are of quantities that this release does not count.
        held_amounts=tuple(
            [
                HeldAmount((subject, quota_id), opened_at, Amount(*numbers[:_WIDTH]))
                for (subject, quota_id), opened_at, numbers in orjson.loads(held_amounts)
            ]
        ),
        capped_by=capped_by,
        would_refuse=tuple(orjson.loads(would_refuse)),
        state=state,
        ended_at=ended_at,
        usage=_usage(*row[16:22]),
        outcome=outcome,
        response_id=response_id,
    )


def _opened_row(entry: Entry) -> Row:
    labels, hold = entry.labels, entry.hold
    return (
        *(entry.id, entry.owner, entry.state, labels.user, labels.model, labels.endpoint, labels.upstream),
        *(entry.admitted_via, entry.reserved_at, entry.ended_at, hold.input, hold.output, entry.maximum),
        *(as_json(entry.held_amounts), entry.capped_by, as_json(entry.would_refuse)),
        *(*_usage_columns(entry.usage), entry.outcome),
        None,  # `counted_as`: the roll-up has not counted it yet
        *(entry.response_id, labels.key_id or None, labels.tag or None, labels.address or None),
    )


def _changed_row(entry: Entry) -> Row:
    labels, hold = entry.labels, entry.hold
    return (
        *(entry.state, labels.upstream, entry.ended_at, hold.input, hold.output, as_json(entry.held_amounts)),
        *(*_usage_columns(entry.usage), entry.outcome, entry.response_id, labels.address or None, entry.id),
    )


def as_json(values: Sequence[object]) -> str:
    """These values as one JSON array."""
    return orjson.dumps(values, default=tuple).decode()


def _usage(
    input_tokens: int, output_tokens: int, cached: int, reasoning: int, requests: int, provenance: str | None
) -> Usage | None:
    match provenance:
        case "exactly":
            return Exactly(Tokens(input_tokens, output_tokens, cached, reasoning))
        case "at_least":
            return AtLeast(Tokens(input_tokens, output_tokens, cached, reasoning))
        case "unspent":
            return Unspent(requests)
    return None


def _usage_columns(usage: Usage | None) -> Row:
    if usage is None:
        return (None,) * 6
    tokens, requests = usage.tokens, usage.requests if isinstance(usage, Unspent) else 1
    return (tokens.input, tokens.output, tokens.cached, tokens.reasoning, requests, usage.provenance)
