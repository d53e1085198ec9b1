"""The proxy that is tortured: a process, so that killing it is real, on a database and a port that it keeps.

Whether a client that leaves is drained or stopped changes with every start, so that one run meets both.
"""

import asyncio
import random
import signal
import socket
import sys
from pathlib import Path

from proxy.torture.plan import Plan

_POLICY = """
server: {{api: "127.0.0.1:{port}", admin: null}}
database: "{database}"
wait: {wait_s}s
upstreams:
  simulated: {{base_url: "{upstream}", api_key: "{upstream_key}", kind: simulator, on_disconnect: {on_disconnect}}}
groups:
  clients: {{quotas: {{tokens: {{tokens: {tokens}, per: {per}, shared: {shared}}}}}}}
users:
{users}
"""
_START_S = 30.0
_STOP_S = 45.0
_ANSWER_S = 1.0
_LOOK_EVERY_S = 0.02
# Below the ports that systems hand out by themselves (Linux from 32768, others from 49152): while the proxy is down,
# a client that tries to reach such a port may be given that very one and so be connected to itself, and then the
# proxy could not come back.
_PORTS = range(15_000, 30_000)


class NotStarted(Exception):
    """The proxy did not come up; says what it said last."""


class Proxy:
    """The process. `era` is odd while it is down or paused on purpose, and changes each time.

    `database` is a URL; without one it has a file of its own.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        *,
        upstream: str,
        upstream_key: str,
        keys: tuple[str, ...],
        database: str | None = None,
    ) -> None:
        self.keys = keys
        self.database = database or f"sqlite:///{folder / 'quotas.db'}"
        self.era = 0
        self.kills = 0
        self.pauses = 0
        self.crashes = 0
        self.port = _free_port(random.Random())
        self._config = folder / "quotas.yaml"
        self._log = folder / "proxy.log"
        self._process: asyncio.subprocess.Process | None = None
        self._starts = 0
        self._plan = plan
        self._upstream = (upstream, upstream_key)

    async def start(self) -> None:
        """Start it and wait until it serves; raises NotStarted."""
        self._config.write_text(self._policy("stop" if self._starts % 2 else "drain"))
        self._starts += 1
        command = [sys.executable, "-m", "proxy", "serve", "--config", str(self._config)]
        command += ["--lease", str(self._plan.lease_s)]
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        try:
            async with asyncio.timeout(_START_S):
                while not await self._is_ready():
                    if self._process.returncode is not None:
                        raise NotStarted(self._said())
                    await asyncio.sleep(_LOOK_EVERY_S)
        except TimeoutError:
            raise NotStarted(f"It was not ready after {_START_S:.0f} s. {self._said()}") from None

    async def kill_and_restart(self) -> None:
        """`kill -9`, and at once a start on the same file and port."""
        process = self._process
        assert process is not None, "start() first"
        self.crashes += process.returncode is not None
        self.kills += 1
        self.era += 1
        await self.end()
        await self.start()
        self.era += 1

    async def pause(self, seconds: float) -> None:
        """Let it stand still for so long: no connection breaks, and nothing is answered."""
        process = self._process
        assert process is not None, "start() first"
        self.pauses += 1
        self.era += 1
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            process.send_signal(signal.SIGCONT)
        self.era += 1

    async def stop(self) -> None:
        """Stop it as an operator does; one that won't is killed, and was a crash."""
        process = self._process
        assert process is not None, "start() first"
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(_STOP_S):
                    await process.wait()
            except TimeoutError:
                await self.end()
        self.crashes += process.returncode != 0

    async def end(self) -> None:
        """Kill it, if it still runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def _policy(self, on_disconnect: str) -> str:
        plan, (upstream, upstream_key) = self._plan, self._upstream
        return _POLICY.format(
            port=self.port,
            database=self.database,
            wait_s=plan.wait_s,
            upstream=upstream,
            upstream_key=upstream_key,
            on_disconnect=on_disconnect,
            tokens=plan.tokens,
            per=plan.per,
            shared=str(plan.shared).lower(),
            users="\n".join(
                f'  user-{number}: {{groups: [clients], keys: ["{key}"]}}' for number, key in enumerate(self.keys)
            ),
        )

    async def _is_ready(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        try:
            async with asyncio.timeout(_ANSWER_S):
                writer.write(b"GET /readyz HTTP/1.0\r\n\r\n")
                return b" 200 " in await reader.readline()
        except OSError:  # a connection that broke, or a time-out
            return False
        finally:
            writer.close()

    def _said(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-10:])


def _free_port(chance: random.Random) -> int:
    """A port that nobody has, outside of those that are handed out."""
    while True:
        port = chance.choice(_PORTS)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
