"""The clients of a torture run: each makes one call after the other, reads the answer, and disconnects as planned.

A client that is refused either waits until the reset that the refusal named and repeats the same call at that
instant, or makes another call after a moment. A client that can't connect, or whose key is refused, tries again after
a moment. With several replicas each call goes to one that is up, as behind a load balancer.
"""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import aiohttp
import orjson

from proxy.torture.answers import Refusal, is_between_text_and_end, read_refusal, read_stream, read_whole
from proxy.torture.evidence import ClientRecord
from proxy.torture.plan import CallGenerator, Plan, PlannedCall

# A call that takes longer than this, plus the time that it may wait for other calls, counts as broken.
_CALL_S = 60.0
_AFTER_FAILURE_S = 0.1
_AFTER_REFUSAL_S = (0.1, 0.5)
_BYTES_PER_CHUNK = 200  # about one event of a chat stream


@dataclass(frozen=True, slots=True)
class Address:
    """A base URL, which ends in `/v1`. `epoch` increases when the proxy there goes down or comes up; odd is down."""

    url: str
    epoch: Callable[[], int] = lambda: 0

    @property
    def is_up(self) -> bool:
        """Whether the proxy there is meant to answer."""
        return self.epoch() % 2 == 0


@dataclass(frozen=True, slots=True)
class ProxyUnderTest:
    """The proxy that is called: its addresses, the headers by which it knows each user, and a model.

    Without a model, one is named for each call.

    `database_epoch` is to the replicas' database what `Address.epoch` is to a proxy. `free_tokens` returns how many
    tokens a user has left, for refusals that don't say it.
    """

    addresses: Sequence[Address]
    credentials: Sequence[Mapping[str, str]]
    model: str | None = None
    database_epoch: Callable[[], int] = lambda: 0
    free_tokens: Callable[[int], int | None] = lambda user: None


def bearer(key: str) -> dict[str, str]:
    """The header of a request with this key."""
    return {"authorization": f"Bearer {key}"}


class Clients:
    """All clients of a run. `now` returns ms since 1970: the proxy names resets by the wall clock."""

    def __init__(self, proxy: ProxyUnderTest, plan: Plan, *, now: Callable[[], int]) -> None:
        self._proxy = proxy
        self._plan = plan
        self._now = now
        self._records: list[ClientRecord] = []
        self._until = 0.0
        self._rng = random.Random(f"{plan.seed}/addresses")

    async def run(self) -> list[ClientRecord]:
        """Make calls for as long as the plan says, wait for the last ones, and return a record of each."""
        self._until = asyncio.get_running_loop().time() + self._plan.seconds
        timeout = aiohttp.ClientTimeout(total=_CALL_S + self._plan.wait_s)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as http:
            await asyncio.gather(*(self._client(http, number) for number in range(self._plan.clients)))
        return self._records

    def _left_s(self) -> float:
        return self._until - asyncio.get_running_loop().time()

    async def _client(self, http: aiohttp.ClientSession, number: int) -> None:
        generator = CallGenerator(self._plan, number, self._proxy.model)
        while self._left_s() > 0:
            call = generator.next()
            record = await self._call(http, call)
            if record.refusal is not None and generator.rng.random() < 0.5 and await self._wait_for_reset(record):
                await self._call(http, generator.repeat(call), retry_of=record.refusal)
            elif record.refusal is not None:
                await self._pause(generator.rng.uniform(*_AFTER_REFUSAL_S))
            elif record.result == "unreachable" or record.status == 401:
                await self._pause(_AFTER_FAILURE_S)

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, min(seconds, self._left_s())))

    async def _wait_for_reset(self, record: ClientRecord) -> bool:
        """Wait until the reset that the refusal named; return False at once if there is none before the run ends."""
        resets_at = record.refusal.resets_at if record.refusal else None
        if resets_at is None or record.is_falsely_refused or resets_at - self._now() / 1000 >= self._left_s():
            return False
        left_ms = resets_at * 1000 - self._now()
        # One ms more, because a timer of the event loop may fire early by its own resolution.
        await asyncio.sleep((left_ms + 1) / 1000)
        return True

    async def _call(
        self, http: aiohttp.ClientSession, call: PlannedCall, *, retry_of: Refusal | None = None
    ) -> ClientRecord:
        """Make one call and record what the client saw."""
        record = ClientRecord(call.tag, call.user, call.tokens_needed, retry_of=retry_of, began_at=self._now())
        self._records.append(record)
        address, disconnect, received = self._address(), call.spec.disconnect, bytearray()
        epoch, database_epoch = address.epoch(), self._proxy.database_epoch()
        disconnect_after_s = disconnect.after_s if disconnect and disconnect.when == "after_time" else None
        try:
            async with asyncio.timeout(disconnect_after_s) as disconnecting:
                await self._exchange(http, address.url, call, record=record, received=received)
        except aiohttp.ClientConnectorError:
            record.result = "unreachable"
        except (aiohttp.ClientError, ConnectionError):
            record.result = "broken"
        except TimeoutError:
            record.result = "disconnected" if disconnecting.expired() else "broken"
        record.ended_at = self._now()
        record.disturbed = was_down(epoch, address.epoch())
        if record.status == 503:
            # Only a 503 is excused by the database being down: any other failure is the proxy's own.
            record.disturbed |= was_down(database_epoch, self._proxy.database_epoch())
        if record.status == 200:
            self._read(call, record, bytes(received))
        return record

    def _address(self) -> Address:
        """Return a random address that is up, or any if all are down."""
        addresses = self._proxy.addresses
        return self._rng.choice([address for address in addresses if address.is_up] or addresses)

    async def _exchange(
        self, http: aiohttp.ClientSession, url: str, call: PlannedCall, *, record: ClientRecord, received: bytearray
    ) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        headers = {**self._proxy.credentials[call.user], "x-quota-tag": call.tag, "content-type": "application/json"}
        body = orjson.dumps(call.body())
        async with http.post(url + call.path, data=body, headers=headers) as response:
            record.status, record.request_id = response.status, response.headers.get("x-request-id")
            async for chunk in response.content.iter_any():
                if record.answered_s is None and call.spec.stream:
                    record.answered_s = loop.time() - started
                received += chunk
                if _disconnects(call, chunk, len(received)):
                    response.close()
                    record.result = "disconnected"
                    return
        record.result = "complete" if record.status == 200 else "failed"
        if record.status != 200 and (refusal := self._refusal(record, bytes(received))):
            record.result, record.refusal, record.answered_s = "refused", refusal, loop.time() - started

    def _refusal(self, record: ClientRecord, body: bytes) -> Refusal | None:
        if record.status == 400 and (b'"context_length_exceeded"' in body or b'"exceeds_quota"' in body):
            # The proxy says that the call does not fit into a whole window. That is false if the limit is enough.
            return Refusal(free_tokens=self._plan.tokens)
        if record.status != 429:
            return None
        refusal = read_refusal(body)
        if refusal.free_tokens is not None:
            return refusal
        return Refusal(free_tokens=self._proxy.free_tokens(record.user))

    @staticmethod
    def _read(call: PlannedCall, record: ClientRecord, received: bytes) -> None:
        answer = read_stream(received) if call.spec.stream else read_whole(received)
        record.words, record.usage = answer.words, answer.usage
        if answer.is_complete:
            record.result = "complete"  # even if the connection ended, or the client closed it, after the last byte
        elif record.result == "complete":
            record.result = "broken"


def was_down(epoch_before: int, epoch_after: int) -> bool:
    """Whether the proxy was down when the call began (odd), or went down since: 2 and 4 is one restart between."""
    return epoch_before % 2 == 1 or epoch_before != epoch_after


def _disconnects(call: PlannedCall, chunk: bytes, received: int) -> bool:
    """Whether the client disconnects from a stream now."""
    disconnect = call.spec.disconnect
    if disconnect is None or not call.spec.stream:
        return False
    if disconnect.when == "after_chunks":
        return received >= disconnect.chunks * _BYTES_PER_CHUNK
    return disconnect.when == "after_text" and is_between_text_and_end(chunk)
