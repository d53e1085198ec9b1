"""Rows of the database and values of the books: what is written here is read back as it was.

The same for every engine. A row has its values in the order of the table's columns.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import orjson

from proxy.ledger.book import Book, Extend, Operation, Reserve
from proxy.ledger.entry import CallLabels, Entry, HeldAmount
from proxy.policy.amounts import (
    QUANTITIES,
    Amount,
    AtLeast,
    Exactly,
    Tokens,
    Unspent,
    Usage,
    call_amount,
    charge_of,
)
from proxy.policy.quota import Counter, CounterKey
from proxy.policy.windows import Window

# What changes in the row of a call after it was let in, in the table's order.
CHANGING = (
    "state upstream ended_at hold_input hold_output lines "
    "input_tokens output_tokens cached_tokens reasoning_tokens requests provenance outcome response_id"
).split()

Row = Sequence[Any]
# How many numbers an amount has, in the columns of `counters` and in `calls.lines`.
_WIDTH = len(QUANTITIES)


@dataclass(frozen=True, slots=True)
class Changes:
    """The rows that a batch leaves to be written, each list in one order.

    `counters` and `opened` have all columns; `changed` has those of CHANGING, and then the call's id.
    """

    counters: list[Row]
    opened: list[Row]
    changed: list[Row]


def changes_of(books: Book, known: Iterable[str]) -> Changes:
    """What a batch has changed; `known` are the calls that were in the database before it."""
    entries, before, changed = books.entries, set(known), sorted(books.entries_changed)
    return Changes(
        counters=[_counter_row(key, books.counters[key]) for key in sorted(books.counters_changed)],
        opened=[_call_row(entries[entry_id]) for entry_id in changed if entry_id not in before],
        changed=[(*_changing(entries[entry_id]), entry_id) for entry_id in changed if entry_id in before],
    )


def keys_of(operations: Iterable[Operation]) -> set[CounterKey]:
    """The counters that acts may look at, beside those that their calls hold something of already."""
    return set(
        chain.from_iterable(
            operation.binding.keys() for operation in operations if isinstance(operation, Reserve | Extend)
        )
    )


def counters_of(rows: Iterable[Row]) -> dict[CounterKey, Counter]:
    """The counters that have a window; a row that was only made to be locked has none."""
    return {
        (subject, quota_id): Counter(Window(opened_at, resets_at), Amount(*levels[:_WIDTH]), Amount(*levels[_WIDTH:]))
        for subject, quota_id, opened_at, resets_at, *levels in rows
        if resets_at
    }


def _counter_row(key: CounterKey, counter: Counter) -> Row:
    return (*key, counter.window.opened_at, counter.window.resets_at, *counter.used, *counter.held)


def entry_of(row: Row) -> Entry:
    """One call."""
    entry_id, owner, state, user, model, endpoint, upstream, admitted_via, reserved_at, ended_at, *rest = row
    hold_input, hold_output, maximum, held_amounts, capped_by, would_refuse, *used, outcome, _, response_id = rest
    return Entry(
        id=entry_id,
        owner=owner,
        labels=CallLabels(user=user, model=model, endpoint=endpoint, upstream=upstream),
        admitted_via=admitted_via,
        reserved_at=reserved_at,
        hold=call_amount(hold_input, hold_output),
        maximum=maximum,
        held_amounts=tuple(
            HeldAmount((key[0], key[1]), at, _amount_of(numbers)) for key, at, numbers in orjson.loads(held_amounts)
        ),
        capped_by=capped_by,
        would_refuse=tuple(orjson.loads(would_refuse)),
        state=state,
        ended_at=ended_at,
        usage=_usage(*used),
        outcome=outcome,
        response_id=response_id,
    )


def _amount_of(numbers: Sequence[int]) -> Amount:
    """An amount as `lines` stores it.

    A release with fewer quantities wrote fewer numbers: the missing ones are 0. One with more, which shares the
    database while replicas are replaced, wrote more: those are of quantities that this release does not count.
    """
    return Amount(*numbers[:_WIDTH])


def _call_row(entry: Entry) -> Row:
    labels = entry.labels
    state, upstream, ended_at, hold_input, hold_output, held_amounts, *used, response_id = _changing(entry)
    return (
        *(entry.id, entry.owner, state, labels.user, labels.model, labels.endpoint, upstream, entry.admitted_via),
        *(entry.reserved_at, ended_at, hold_input, hold_output, entry.maximum),
        *(held_amounts, entry.capped_by, orjson.dumps(entry.would_refuse).decode()),
        *used,
        *(None, response_id),  # not counted into its day
    )


def _changing(entry: Entry) -> Row:
    held_amounts = [
        (held_amount.key, held_amount.opened_at, tuple(held_amount.amount)) for held_amount in entry.held_amounts
    ]
    return (
        *(entry.state, entry.labels.upstream, entry.ended_at),
        *(entry.hold.input, entry.hold.output, orjson.dumps(held_amounts).decode()),
        *(*_used(entry.usage), entry.outcome, entry.response_id),
    )


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


def _used(usage: Usage | None) -> Row:
    if usage is None:
        return (None,) * 6
    tokens, requests = usage.tokens, charge_of(usage).requests
    return (tokens.input, tokens.output, tokens.cached, tokens.reasoning, requests, usage.provenance)
