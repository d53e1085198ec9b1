"""The upstream of a torture run: the simulator, with a record of each call that it served."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

from proxy.simulator.server import Served, Simulator, serve
from proxy.torture.evidence import UpstreamRecord
from proxy.torture.plan import client_of, tag_of


class RecordingUpstream:
    """Serves, and records the tokens of each call. `records` is complete once no call is open."""

    def __init__(self, key: str, seed: int, *, tokens_per_s: float) -> None:
        self.key = key
        self.records: list[UpstreamRecord] = []
        self.url = ""
        self._tokens_by_client: Counter[int] = Counter()
        self._simulator = Simulator(key, seed, tokens_per_s, on_served=self._record)
        self._stop: Callable[[], Awaitable[None]] | None = None

    async def start(self, port: int = 0) -> None:
        """Start serving. Raises OSError if the port is taken."""
        runner, port = await serve(self._simulator, port=port)
        self._stop = runner.cleanup
        self.url = f"http://127.0.0.1:{port}/v1"

    async def stop(self) -> None:
        """Stop serving."""
        if self._stop is not None:
            await self._stop()

    async def wait_until_idle(self, timeout_s: float) -> None:
        """Wait until no call is open, or until the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._simulator.until(lambda: self._simulator.open_calls == 0)
        except TimeoutError:
            pass  # a call that stays open for ever shows as `leaked` in the verdict

    def tokens_of(self, counter: int, counters: int) -> int:
        """Return the tokens of all calls that have ended and that one of `counters` counters counts."""
        return sum(tokens for client, tokens in self._tokens_by_client.items() if client % counters == counter)

    def _record(self, served: Served) -> None:
        answer, tag = served.answer, tag_of(served.answer.params)
        self.records.append(UpstreamRecord(tag, answer.input_tokens, served.generated, served.reported))
        if (client := client_of(tag)) is not None:
            self._tokens_by_client[client] += answer.input_tokens + served.generated
