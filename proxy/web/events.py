"""What happens in the proxy, live: one stream of Server-Sent Events for each who watches.

Five times a second `tick` makes one batch of what happened and puts it into a ring, which all streams share. A stream
has only a position in the ring. If it reads too slowly and its position has left the ring, it gets one `snapshot` and
goes on from there: it loses what happened meanwhile, but not the state after it. So a reader that does not read holds
no memory, and after a while it is disconnected.

    calls      calls that began and ended, of one process, how many more did, and the tokens of all that ended
    counters   the newest states of counters that have changed
    refusals   calls that a quota refused, and how many more were
    change     an administrator has changed something
    health     the state of this process has changed
    snapshot   the state now; read again what was read before it

The id of a batch is `owner:number`. The number counts the ticks, so it says nothing about how much others do. A batch
may have several events. Only the last one has the id, so that a client that was cut off within a batch and resumes by
`Last-Event-ID` gets that batch again.

What happens in other processes comes by `web.exchange`.
"""

import asyncio
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import orjson
from aiohttp import web

from proxy.administration.audit import ACTIONS_ON_GROUPS
from proxy.calls.activity import Activity, Batch, CounterState, Details
from proxy.errors import TooManyStreams
from proxy.ledger.replicas import AuditedChange
from proxy.policy.amounts import NO_AMOUNT
from proxy.policy.policy import EVERYONE
from proxy.policy.quota import CounterKey, group_of, shared_subject, user_subject
from proxy.web.middleware import LOG_LINE
from proxy.web.response import HEARTBEAT

TICK_S = 0.2
# Events are collected for so long after the last stream has ended, so that it can be resumed.
LINGER_MS = 30_000
# Of how many counters the newest state is remembered, while somebody watches. One takes about 500 bytes.
KNOWN_MAX = 20_000
# How many calls and counters a snapshot has at most.
SNAPSHOT_CALLS_MAX = 200
SNAPSHOT_COUNTERS_MAX = 500
# How many changes, and batches of other processes, wait for the next tick.
WAITING_MAX = 100
# How often it is asked whether a client may still read the stream.
_CHECK_S = 15.0
# How much is written at a time: what waits in the connection of a slow client is a little more than its buffer.
_PIECE_BYTES = 32 * 1024
# What an entry of the ring takes beside its texts, and a text beside its bytes.
_ENTRY_BYTES, _ITEM_BYTES = 2_000, 150

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx would collect the events
}


@dataclass(frozen=True, slots=True)
class Bounds:
    """How large the ring may become, how many streams may be open, and how long a client may take.

    The ring has 200 s of five batches a second, but no more than 8 MiB. `streams` may show more than one user's
    counters, `own_streams` show only these, `streams_of_user` those of one. A client that takes no data for `write_s`
    seconds is disconnected. One that gets none for `heartbeat_s` seconds gets a comment.
    """

    entries: int = 1_000
    bytes: int = 8 * 1024 * 1024
    streams: int = 100
    own_streams: int = 200
    streams_of_user: int = 4
    write_s: float = 30.0
    heartbeat_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Filter:
    """What a stream shows: everything, what belongs to some groups, or the counters of one user.

    With `user`, `groups` are those whose shared counters the user sees, and nothing but counters is shown.
    """

    groups: frozenset[str] | None = None
    user: str | None = None

    @classmethod
    def of_groups(cls, groups: Iterable[str] | None) -> "Filter":
        """What a manager of these groups sees; None: what an admin sees who manages all."""
        return cls(None if groups is None else frozenset(groups))

    @classmethod
    def of_user(cls, user: str, groups: Iterable[str]) -> "Filter":
        """What a user (a subject) sees: the own counters, and those that these groups and `everyone` share.

        `groups` are those of `Policy.all_quotas`, so that `default` is among them where it applies.
        """
        return cls(frozenset((*groups, EVERYONE)), user)

    @property
    def subjects(self) -> tuple[str, ...]:
        """With a user, the subjects of the counters that are shown."""
        return (user_subject(self.user or ""), *map(shared_subject, sorted(self.groups or ())))

    def shows_group(self, group: str) -> bool:
        """Whether calls that this group admitted, or that its quotas refused, are shown.

        With `combine: every_group` several groups admit a call together (`staff+lab`).
        """
        return self.groups is None or (self.user is None and not self.groups.isdisjoint(group.split("+")))

    def shows_counter(self, key: CounterKey) -> bool:
        """Whether this counter is shown."""
        if self.groups is None:
            return True
        if self.user is None:
            return group_of(key[1]) in self.groups
        return key[0] in self.subjects

    def shows_change(self, change: AuditedChange) -> bool:
        """Whether this change is shown. A manager sees those of the groups' quotas (`staff/daily`)."""
        if self.groups is None:
            return True
        is_of_quota = change.action in ACTIONS_ON_GROUPS and "/" in change.target
        return self.user is None and is_of_quota and group_of(change.target) in self.groups


# Says what the client of a stream may see now; None: nothing more.
Check = Callable[[], Awaitable[Filter | None]]


class Part(NamedTuple):
    """What happened in one process."""

    replica: str
    batch: Batch


@dataclass(slots=True)
class _Entry:
    """One batch of the ring. `whole` are its events as a stream without a filter gets them."""

    number: int
    parts: list[Part]
    changes: list[AuditedChange]
    health: bytes | None
    whole: bytes = b""
    size: int = 0
    by_subject: dict[str, list[bytes]] | None = None

    def seal(self, whole: bytes) -> None:
        """Note what a stream without a filter gets, and about how many bytes of memory all of it takes."""
        texts = [
            text
            for _, batch in self.parts
            for each in (batch.begun, batch.ended, batch.refused)
            for _, text in each.items
        ]
        texts += [state.data for _, batch in self.parts for state in batch.counters.values()]
        self.whole = whole
        self.size = _ENTRY_BYTES + len(whole) + sum(map(len, texts)) + _ITEM_BYTES * len(texts)

    def counters_of(self, subjects: Iterable[str]) -> list[bytes]:
        """The counters of these subjects. The first call makes an index, because many users may watch."""
        if self.by_subject is None:
            self.by_subject = {}
            for _, batch in self.parts:
                for (subject, _), state in batch.counters.items():
                    self.by_subject.setdefault(subject, []).append(state.data)
        return [data for subject in subjects for data in self.by_subject.get(subject, ())]


class Events:
    """The streams of one process, and the ring that they read. `owner` is the name of the process.

    `now` gives ms since 1970, and `health` the state of this process as JSON values. `on_watching` is called when the
    first stream opens. `is_watched` says whether events are collected: a stream is open, or was until a moment ago.
    """

    def __init__(
        self,
        activity: Activity,
        *,
        owner: str,
        now: Callable[[], int],
        health: Callable[[], Mapping[str, object]],
        bounds: Bounds | None = None,
    ) -> None:
        self.is_watched_elsewhere = False
        self.on_batch: Callable[[Batch], object] = lambda batch: None
        self.on_watching: Callable[[], object] = lambda: None
        self._activity = activity
        self._owner = owner
        self._now = now
        self._health = health
        self._bounds = bounds or Bounds()
        self._number = 0
        self._ring: list[_Entry] = []
        self._bytes = 0
        # The number of the newest batch that is no longer in the ring: who has seen it has missed nothing.
        self._floor = 0
        # How many are open, by the user whose counters they show; None: those of administrators.
        self._streams: Counter[str | None] = Counter()
        self._lingers_until = 0
        self.is_watched = False
        self._is_closing = False
        self._published = asyncio.Event()
        self._known: OrderedDict[CounterKey, CounterState] = OrderedDict()
        # The ids of the quotas of each subject in `_known`: many users may watch, and each sees only few counters.
        self._known_of: dict[str, set[str]] = {}
        self._incoming: list[Part] = []
        self._changes: list[AuditedChange] = []
        self._shown_health = b""

    @property
    def streams(self) -> int:
        """How many streams are open."""
        return self._streams.total()

    # What happens

    def tick(self) -> None:
        """Make one batch of what happened since the last call. To be called every TICK_S."""
        self._number += 1
        if self.is_watched and not self.streams and self._now() >= self._lingers_until:
            self._stop_collecting()
        self._activity.is_watched = self.is_watched or self.is_watched_elsewhere
        batch = self._activity.take()
        if self.is_watched_elsewhere and batch:
            self.on_batch(batch)
        if self.is_watched:
            parts = [Part(self._owner, batch), *self._incoming]
            changes, self._incoming, self._changes = self._changes, [], []
            health = orjson.dumps(self._health())
            is_changed, self._shown_health = health != self._shown_health, health
            self._publish(parts, changes, health if is_changed else None)

    def receive(self, replica: str, batch: Batch) -> None:
        """This happened in another process. It is in the next batch."""
        if len(self._incoming) < WAITING_MAX:
            self._incoming.append(Part(replica, batch))
        else:
            self._incoming[-1].batch.is_incomplete = True

    def changed(self, changes: Iterable[AuditedChange]) -> None:
        """Administrators have changed this. It is in the next batch."""
        self._changes = [*self._changes, *changes][-WAITING_MAX:]

    def close(self) -> None:
        """End all streams, and open no more."""
        self._is_closing = True
        self._published.set()

    def _publish(self, parts: list[Part], changes: list[AuditedChange], health: bytes | None) -> None:
        is_incomplete = False
        for part in parts:
            is_incomplete |= part.batch.is_incomplete
            part.batch.counters = {
                key: state for key, state in part.batch.counters.items() if self._note_counter(key, state)
            }
        entry = _Entry(self._number, [part for part in parts if part.batch], changes, health)
        if entry.parts or changes or health:
            entry.seal(self._with_id(_events(entry, Filter()), self._number))
            self._ring.append(entry)
            self._bytes += entry.size
        while self._ring and (len(self._ring) > self._bounds.entries or self._bytes > self._bounds.bytes):
            oldest = self._ring.pop(0)
            self._bytes -= oldest.size
            self._floor = oldest.number
        if is_incomplete:
            self._empty_ring()  # so that each stream gets a snapshot
        self._published.set()
        self._published = asyncio.Event()

    def _note_counter(self, key: CounterKey, state: CounterState) -> bool:
        """Remember the state of a counter. False if a newer one is known: another process had decided later."""
        known = self._known.get(key)
        if known is not None and known.at > state.at:
            return False
        self._known[key] = state
        self._known.move_to_end(key)
        self._known_of.setdefault(key[0], set()).add(key[1])
        if len(self._known) > KNOWN_MAX:
            (subject, quota_id), _ = self._known.popitem(last=False)
            self._known_of[subject].discard(quota_id)
            if not self._known_of[subject]:
                del self._known_of[subject]
        return True

    def _known_to(self, sees: Filter) -> Iterator[bytes]:
        """The newest states of counters that are shown."""
        if sees.user is None:
            return (state.data for key, state in reversed(self._known.items()) if sees.shows_counter(key))
        return (
            self._known[subject, quota_id].data
            for subject in sees.subjects
            for quota_id in sorted(self._known_of.get(subject, ()))
        )

    # Who watches

    async def stream(self, request: web.Request, sees: Filter, *, check: Check) -> web.StreamResponse:
        """Answer a request with a stream of events, from the one after its `Last-Event-ID`, as far as `sees` shows.

        `check` is asked every few seconds; None ends the stream. Returns when the client
        has left or no longer reads, or when the server stops. Raises TooManyStreams.
        """
        if self._is_closing or not self._has_room_for(sees.user):
            raise TooManyStreams
        response = web.StreamResponse(headers={**_HEADERS, "x-request-id": request[LOG_LINE].request_id})
        self._streams[sees.user] += 1
        self._begin_collecting()
        try:
            await self._in_time(response.prepare(request))
            await self._follow(request, response, sees, check)
        except (ConnectionError, TimeoutError):
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._streams -= Counter([sees.user])  # which forgets who has none
            self._lingers_until = self._now() + LINGER_MS
        return response

    def _has_room_for(self, user: str | None) -> bool:
        """Whether one more stream may be open. Users, however many watch, do not shut out administrators."""
        if user is None:
            return self._streams[None] < self._bounds.streams
        own = self.streams - self._streams[None]
        return own < self._bounds.own_streams and self._streams[user] < self._bounds.streams_of_user

    async def _follow(self, request: web.Request, response: web.StreamResponse, sees: Filter, check: Check) -> None:
        position = self._position_of(request.headers.get("last-event-id", ""))
        loop = asyncio.get_running_loop()
        checked_s = written_s = loop.time()
        while not self._is_closing:
            if loop.time() - checked_s >= _CHECK_S:
                now_sees, checked_s = await check(), loop.time()
                if now_sees is None:
                    return
                sees = now_sees
            published = self._published
            data, position = self._next(position, sees)
            if not data:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._bounds.heartbeat_s - (loop.time() - written_s)):
                        await published.wait()
                        continue
                data = HEARTBEAT
            written_s = loop.time()
            for first in range(0, len(data), _PIECE_BYTES):
                await self._in_time(response.write(data[first : first + _PIECE_BYTES]))

    async def _in_time(self, write: Awaitable[object]) -> None:
        async with asyncio.timeout(self._bounds.write_s):
            await write

    def _position_of(self, last_id: str) -> int | None:
        """The number in an id of this process; None if a snapshot is needed."""
        owner, _, number = last_id.rpartition(":")
        is_ours = owner == self._owner and number.isascii() and number.isdigit() and len(number) < 16
        return int(number) if is_ours and int(number) <= self._number else None

    def _next(self, position: int | None, sees: Filter) -> tuple[bytes, int]:
        """The events after a position, and the position after them; nothing if there are none yet."""
        if position is None or position < self._floor:
            return self._snapshot(sees), self._number
        for entry in islice(self._ring, bisect_right(self._ring, position, key=lambda each: each.number), None):
            if sees.groups is None:
                return entry.whole, entry.number
            data = self._with_id(_events(entry, sees), entry.number)
            if data:
                return data, entry.number
            position = entry.number
        return b"", position

    def _snapshot(self, sees: Filter) -> bytes:
        """The state now: the calls in flight of this process, the newest counters, and its health."""
        newest = islice(self._known_to(sees), SNAPSHOT_COUNTERS_MAX)
        content: dict[str, object] = {"counters": _fragments(newest)}
        if sees.user is None:
            calls = _fragments(islice(self._activity.calls_in_flight(sees.shows_group), SNAPSHOT_CALLS_MAX))
            health = orjson.Fragment(orjson.dumps(self._health()))
            content = {"replica": self._owner, "calls": calls, **content, "health": health}
        return self._with_id([_event("snapshot", orjson.dumps(content))], self._number)

    def _begin_collecting(self) -> None:
        if self.is_watched:
            return
        self.is_watched = self._activity.is_watched = True
        self._lingers_until = self._now() + LINGER_MS
        self._floor = self._number  # nothing was collected before
        self._shown_health = orjson.dumps(self._health())
        self.on_watching()

    def _stop_collecting(self) -> None:
        self.is_watched = False
        self._empty_ring()
        self._known.clear()
        self._known_of.clear()
        self._incoming, self._changes = [], []

    def _empty_ring(self) -> None:
        self._ring, self._bytes, self._floor = [], 0, self._number

    def _with_id(self, events: list[bytes], number: int) -> bytes:
        """These events as one text. The last one has the id of this batch."""
        if not events:
            return b""
        return b"".join((*events[:-1], b"id: %b:%d\n" % (self._owner.encode(), number), events[-1]))


def _events(entry: _Entry, sees: Filter) -> list[bytes]:
    """The events of a batch, as far as they are shown, without an id."""
    if sees.user is not None:
        counters = entry.counters_of(sees.subjects)
        return [_event("counters", orjson.dumps({"counters": _fragments(counters)}))] if counters else []
    return [
        *chain.from_iterable(_events_of(part, sees) for part in entry.parts),
        *(_event("change", orjson.dumps(change._asdict())) for change in entry.changes if sees.shows_change(change)),
        *([] if entry.health is None else [_event("health", entry.health)]),
    ]


def _events_of(part: Part, sees: Filter) -> Iterable[bytes]:
    """The events about calls, counters and refusals of one process."""
    replica, batch = part
    shown = {name: _shown(getattr(batch, name), sees) for name in ("begun", "ended", "refused")}
    content: dict[str, Any] = {"replica": replica}
    if any(items or more for items, more in (shown["begun"], shown["ended"])):
        for name in ("begun", "ended"):
            content[name], content[f"{name}_more"] = shown[name]
        if batch.tokens is not None:
            used = sum((each for group, each in batch.tokens.items() if sees.shows_group(group)), NO_AMOUNT)
            content["tokens"] = {"input": used.input, "output": used.output}
        yield _event("calls", orjson.dumps(content))
    counters = [state.data for key, state in batch.counters.items() if sees.shows_counter(key)]
    if counters:
        yield _event("counters", orjson.dumps({"replica": replica, "counters": _fragments(counters)}))
    items, more = shown["refused"]
    if items or more:
        yield _event("refusals", orjson.dumps({"replica": replica, "refusals": items, "more": more}))


def _shown(details: Details[bytes], sees: Filter) -> tuple[list[orjson.Fragment], int]:
    """Those that are shown, and how many more of them there were."""
    items = _fragments(data for group, data in details.items if sees.shows_group(group))
    return items, sum(count for group, count in details.more.items() if sees.shows_group(group))


def _fragments(texts: Iterable[bytes]) -> list[orjson.Fragment]:
    return [orjson.Fragment(text) for text in texts]


def _event(name: str, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)
