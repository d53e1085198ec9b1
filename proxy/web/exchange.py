"""Exchanges what happens with the other processes of the database, through tables, while somebody watches.

`run` is called every EXCHANGE_S seconds, and each run does what is due:

    every 5 s               write the status of this process, with until when somebody watches here
    every 1 s               see whether somebody watches another process
    while somebody does     write what happened here, at most twice a second
    while one watches here  read what the others wrote
    after a change          read what the audit log says of it, if somebody watches here

With a tick every 0.2 s, what happens in one process is shown by the others within a second.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import orjson
import structlog

from proxy.calls.activity import Batch, CounterState, Details
from proxy.ledger.replicas import Replicas
from proxy.ledger.store import StoreUnavailable
from proxy.policy.amounts import NO_AMOUNT, Amount
from proxy.policy.quota import CounterKey
from proxy.web.events import Events

EXCHANGE_S = 0.25
_STATUS_EVERY_MS = 5_000
_LOOK_EVERY_MS = 1_000
_WRITE_EVERY_MS = 500
# For how long the others go on writing for a process that died while somebody watched there.
_WATCHING_MS = 15_000
# How many counters are written at a time: about 300 kB.
_COUNTERS_AT_ONCE = 1_000
# How many changed counters wait to be written. If there are more, streams get a snapshot.
_WAITING_MAX = 20_000
_OWNERS_MAX = 256
_KINDS = ("begun", "ended", "refused")

log = structlog.get_logger("exchange")


class Exchange:
    """Connects the events of this process with those of the others.

    `now` gives ms since 1970 by the ledger's clock, and `status` the status of this process, as JSON values.
    """

    def __init__(
        self,
        events: Events,
        replicas: Replicas,
        *,
        now: Callable[[], int],
        status: Callable[[], Mapping[str, object]],
    ) -> None:
        self._events = events
        self._replicas = replicas
        self._now = now
        self._status = status
        self._status_at = self._looked_at = self._wrote_at = 0
        self._was_watched = False
        self._positions: OrderedDict[str, int] | None = None
        self._outgoing = Batch()
        self._versions: tuple[int, int] | None = None
        self._is_away = False
        events.on_batch = self._collect
        events.on_watching = self._look_again

    def note_change(self, old: int, new: int) -> None:
        """The directory has another version: what was changed is read by the next run."""
        self._versions = (self._versions[0] if self._versions else old, new)

    async def run(self) -> None:
        """Do what is due. An outage of the database is logged once, and ends by itself."""
        try:
            await self._write_status()
            await self._look_for_watchers()
            await self._write_feed()
            await self._read_feed()
            await self._read_changes()
        except StoreUnavailable as error:
            if not self._is_away:
                log.warning("what happens can't be exchanged with other processes", reason=str(error))
            self._is_away = True
        else:
            self._is_away = False

    async def _write_status(self) -> None:
        now, is_watched = self._now(), self._events.is_watched
        if now - self._status_at < _STATUS_EVERY_MS and is_watched == self._was_watched:
            return
        until = now + _WATCHING_MS if is_watched else 0
        await self._replicas.write_status(orjson.dumps(self._status()).decode(), watching_until=until)
        self._status_at, self._was_watched = now, is_watched

    async def _look_for_watchers(self) -> None:
        if self._now() - self._looked_at < _LOOK_EVERY_MS:
            return
        self._looked_at = self._now()
        self._events.is_watched_elsewhere = await self._replicas.is_watched()
        if not self._events.is_watched_elsewhere:
            self._outgoing = Batch()

    async def _write_feed(self) -> None:
        if not self._outgoing or self._now() - self._wrote_at < _WRITE_EVERY_MS:
            return
        batch, rest = _split(self._outgoing)
        self._outgoing, self._wrote_at = rest, self._now()
        try:
            await self._replicas.publish(_body_of(batch))
        except StoreUnavailable:
            _add(batch, self._outgoing)  # what happened meanwhile comes after it
            self._outgoing = batch
            raise

    async def _read_feed(self) -> None:
        if not self._events.is_watched:
            self._positions = None
            return
        if self._positions is None:
            self._positions = OrderedDict(await self._replicas.positions())
            return
        for owner, seq, body in await self._replicas.read(self._positions):
            self._positions[owner] = seq
            self._positions.move_to_end(owner)
            if len(self._positions) > _OWNERS_MAX:
                self._positions.popitem(last=False)
            try:
                self._events.receive(owner, _batch_of(body))
            except (KeyError, TypeError, ValueError) as error:
                log.warning("another process has written what this release can't read", owner=owner, exc_info=error)

    async def _read_changes(self) -> None:
        if self._versions is None:
            return
        if self._events.is_watched:
            old, new = self._versions
            self._events.changed(await self._replicas.changes(old, new))
            if (old, new) != self._versions:
                self._versions = (new, self._versions[1])
                return
        self._versions = None

    def _collect(self, batch: Batch) -> None:
        _add(self._outgoing, batch)

    def _look_again(self) -> None:
        """Write at once that somebody watches here."""
        self._status_at = 0


def _add(batch: Batch, later: Batch) -> None:
    """Add what happened later to a batch. The newest states of counters stay, up to _WAITING_MAX."""
    for kind in _KINDS:
        getattr(batch, kind).extend(getattr(later, kind))
    if batch.tokens is not None and later.tokens is not None:
        batch.tokens = {
            group: batch.tokens.get(group, NO_AMOUNT) + later.tokens.get(group, NO_AMOUNT)
            for group in batch.tokens.keys() | later.tokens.keys()
        }
    batch.counters |= later.counters
    batch.is_incomplete |= later.is_incomplete
    for key in list(islice(batch.counters, max(0, len(batch.counters) - _WAITING_MAX))):
        del batch.counters[key]
        batch.is_incomplete = True


def _split(batch: Batch) -> tuple[Batch, Batch]:
    """What is written now, and the counters that are written later."""
    counters = iter(batch.counters.items())
    batch.counters = dict(islice(counters, _COUNTERS_AT_ONCE))
    return batch, Batch(counters=dict(counters))


def _body_of(batch: Batch) -> str:
    body: dict[str, Any] = {
        kind: {"items": [(group, orjson.Fragment(data)) for group, data in details.items], "more": details.more}
        for kind in _KINDS
        if (details := getattr(batch, kind))
    }
    if batch.tokens is not None:
        body["tokens"] = {group: (used.input, used.output) for group, used in batch.tokens.items()}
    body["counters"] = [(*key, state.at, orjson.Fragment(state.data)) for key, state in batch.counters.items()]
    body["is_incomplete"] = batch.is_incomplete
    return orjson.dumps(body).decode()


def _batch_of(body: str) -> Batch:
    """The batch in a body. Raises KeyError, TypeError or ValueError for one of another form."""
    content = orjson.loads(body)
    batch = Batch(is_incomplete=bool(content["is_incomplete"]))
    for kind in _KINDS:
        if kind in content:
            items = [(str(group), orjson.dumps(shown)) for group, shown in content[kind]["items"]]
            setattr(batch, kind, Details(items, {str(group): int(n) for group, n in content[kind]["more"].items()}))
    used = content.get("tokens")  # an older release does not write it
    batch.tokens = used and {str(group): Amount(int(read), int(made)) for group, (read, made) in used.items()}
    for subject, quota_id, at, shown in content["counters"]:
        key: CounterKey = (str(subject), str(quota_id))
        batch.counters[key] = CounterState(int(at), orjson.dumps(shown))
    return batch
