"""The upstream of a torture run: the simulator, and its own account of what it gave to whom."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

from proxy.simulator.server import Served, Simulator, serve
from proxy.torture.evidence import Given
from proxy.torture.plan import client_of, mark_of


class Accountant:
    """Serves, and notes of each call what it took and made. `given` is complete when all is at rest."""

    def __init__(self, key: str, seed: int, *, tokens_per_s: float) -> None:
        self.key = key
        self.given: list[Given] = []
        self.url = ""
        self._tokens: Counter[int] = Counter()
        self._simulator = Simulator(key, seed, tokens_per_s, on_served=self._note)
        self._stop: Callable[[], Awaitable[None]] | None = None

    async def start(self, port: int = 0) -> None:
        """Serve; raises OSError where the port is taken."""
        runner, port = await serve(self._simulator, port=port)
        self._stop = runner.cleanup
        self.url = f"http://127.0.0.1:{port}/v1"

    async def stop(self) -> None:
        """Serve no more."""
        if self._stop is not None:
            await self._stop()

    async def at_rest(self, patience_s: float) -> None:
        """Wait until no call is open here, or until that takes too long."""
        try:
            async with asyncio.timeout(patience_s):
                await self._simulator.until(lambda: self._simulator.open_calls == 0)
        except TimeoutError:
            pass  # what keeps them open is judged by what is on the books

    def tokens_of(self, pot: int, pots: int) -> int:
        """What was given so far from one of so many pots, for calls that have ended."""
        return sum(tokens for client, tokens in self._tokens.items() if client % pots == pot)

    def _note(self, served: Served) -> None:
        answer, mark = served.answer, mark_of(served.answer.params)
        self.given.append(Given(mark, answer.input_tokens, served.generated, served.reported))
        if (client := client_of(mark)) is not None:
            self._tokens[client] += answer.input_tokens + served.generated
