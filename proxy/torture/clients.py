"""The clients of a torture run: each calls without a pause, reads what it gets, and hangs up when it is to.

A client that is refused either waits for the reset that it was told and sends the very same call again at that
instant, or goes on with another call after a moment; one that finds nobody there tries again at once. Where there are
several replicas each call goes to one of those that are known to be well, as a load balancer would have it.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp
import orjson

from proxy.torture.answers import Reading, Refusal, is_near_the_end, read_refusal, read_stream, read_whole
from proxy.torture.evidence import Seen
from proxy.torture.plan import Ask, Asker, Plan

# A call that takes longer than this, beyond what it may wait for others, is broken.
_CALL_S = 60.0
_NOBODY_THERE_S = 0.1
_AFTER_REFUSAL_S = (0.1, 0.5)


@dataclass(frozen=True, slots=True)
class Door:
    """One address, which ends in `/v1`. `era` changes when the proxy there goes and comes, and is odd in between."""

    url: str
    era: Callable[[], int] = lambda: 0

    @property
    def is_open(self) -> bool:
        """Whether somebody is to be expected there."""
        return self.era() % 2 == 0


@dataclass(frozen=True, slots=True)
class Target:
    """Where to call: the doors, a key for each user, and a model; None: one named for each call.

    `database_era` is for the database of all as `era` is for a door. `free_of` says what is left for a user where a
    refusal does not say it.
    """

    doors: Sequence[Door]
    keys: tuple[str, ...]
    model: str | None = None
    database_era: Callable[[], int] = lambda: 0
    free_of: Callable[[int], int | None] = lambda user: None


class Clients:
    """All of them. `now` gives milliseconds since 1970, which resets are told in."""

    def __init__(self, target: Target, plan: Plan, *, now: Callable[[], int]) -> None:
        self._target = target
        self._plan = plan
        self._now = now
        self._seen: list[Seen] = []
        self._until = 0.0
        self._chance = random.Random(f"{plan.seed}/doors")

    async def run(self) -> list[Seen]:
        """Call for as long as the plan says, let the last calls end, and return what was seen."""
        self._until = asyncio.get_running_loop().time() + self._plan.seconds
        timeout = aiohttp.ClientTimeout(total=_CALL_S + self._plan.wait_s)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as http:
            await asyncio.gather(*(self._client(http, number) for number in range(self._plan.clients)))
        return self._seen

    def _left_s(self) -> float:
        return self._until - asyncio.get_running_loop().time()

    async def _client(self, http: aiohttp.ClientSession, number: int) -> None:
        asker = Asker(self._plan, number, self._target.model)
        while self._left_s() > 0:
            ask = asker.next()
            seen = await self._call(http, ask)
            if seen.refusal is not None and asker.chance.random() < 0.5 and await self._wait_for_reset(seen):
                await self._call(http, asker.again(ask), retries=seen.refusal)
            elif seen.refusal is not None:
                await self._pause(asker.chance.uniform(*_AFTER_REFUSAL_S))
            elif seen.end == "unreached":
                await self._pause(_NOBODY_THERE_S)

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, min(seconds, self._left_s())))

    async def _wait_for_reset(self, seen: Seen) -> bool:
        """Wait until the instant that was named; not where none was, or where it lies behind the end of the run."""
        resets_at = seen.refusal.resets_at if seen.refusal else None
        if resets_at is None or seen.had_room or resets_at - self._now() / 1000 >= self._left_s():
            return False
        left_ms = resets_at * 1000 - self._now()
        await asyncio.sleep((left_ms + 1) / 1000)  # timers may be early by their own resolution
        return True

    async def _call(self, http: aiohttp.ClientSession, ask: Ask, *, retries: Refusal | None = None) -> Seen:
        """Make one call and note what was seen of it."""
        seen = Seen(ask.mark, ask.user, ask.needed, retries=retries)
        self._seen.append(seen)
        door, leave, received = self._door(), ask.wish.leave, bytearray()
        era, database_era = door.era(), self._target.database_era()
        try:
            async with asyncio.timeout(leave.after_s if leave and leave.when == "after_a_time" else None) as leaving:
                await self._converse(http, door.url, ask, seen=seen, received=received)
        except aiohttp.ClientConnectorError:
            seen.end = "unreached"
        except (aiohttp.ClientError, ConnectionError):
            seen.end = "broken"
        except TimeoutError:
            seen.end = "hung_up" if leaving.expired() else "broken"
        seen.disturbed = _is_changed(era, door.era())
        if seen.status == 503:
            seen.disturbed |= _is_changed(database_era, self._target.database_era())
        if seen.status == 200:
            self._read(ask, seen, bytes(received))
        return seen

    def _door(self) -> Door:
        """Any that is open, or else any."""
        doors = self._target.doors
        return self._chance.choice([door for door in doors if door.is_open] or doors)

    async def _converse(
        self, http: aiohttp.ClientSession, url: str, ask: Ask, *, seen: Seen, received: bytearray
    ) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        headers = {"authorization": f"Bearer {self._target.keys[ask.user]}", "content-type": "application/json"}
        body = orjson.dumps(ask.body())
        async with http.post(url + ask.path, data=body, headers=headers) as response:
            seen.status, seen.id = response.status, response.headers.get("x-request-id")
            async for chunk in response.content.iter_any():
                if seen.answered_s is None and ask.wish.stream:
                    seen.answered_s = loop.time() - begun
                received += chunk
                if _leaves(ask, chunk, len(received)):
                    response.close()
                    seen.end = "hung_up"
                    return
        seen.end = "complete" if seen.status == 200 else "failed"
        if seen.status != 200 and (refusal := self._refusal(seen, bytes(received))):
            seen.end, seen.refusal, seen.answered_s = "refused", refusal, loop.time() - begun

    def _refusal(self, seen: Seen, body: bytes) -> Refusal | None:
        if seen.status == 400 and b'"context_length_exceeded"' in body:
            return Refusal(free=self._plan.tokens)  # it can never fit, not even into a fresh window
        if seen.status != 429:
            return None
        refusal = read_refusal(body)
        return refusal if refusal.free is not None else Refusal(free=self._target.free_of(seen.user))

    @staticmethod
    def _read(ask: Ask, seen: Seen, received: bytes) -> None:
        reading: Reading = read_stream(received) if ask.wish.stream else read_whole(received)
        seen.words, seen.usage = reading.words, reading.usage
        if reading.is_whole:
            seen.end = "complete"  # also where it hung up, or was cut off, after the last byte
        elif seen.end == "complete":
            seen.end = "broken"


def _is_changed(era: int, now: int) -> bool:
    """Whether it was down at the beginning, or was at any time since."""
    return era % 2 == 1 or era != now


def _leaves(ask: Ask, chunk: bytes, received: int) -> bool:
    """Whether now is when the client hangs up."""
    leave = ask.wish.leave
    if leave is None or not ask.wish.stream:
        return False
    if leave.when == "after_some_chunks":
        return received >= leave.chunks * 200
    return leave.when == "before_the_end" and is_near_the_end(chunk)
