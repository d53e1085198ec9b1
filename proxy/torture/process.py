"""The proxy under test as a process of its own, so that `kill -9` is real, with a database and a port that it keeps.

Each start changes `on_disconnect` from `drain` to `stop` or back, so one run tests both.
"""

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.torture.plan import Plan

_POLICY = """
server: {{api: "127.0.0.1:{port}", admin: {admin}, shutdown_delay: 0s}}
database: "{database}"
admin_keys: {{torture: "{admin_key}"}}
wait: {wait_s}s
smallest_answer: 1024
upstreams:
  simulated: {{base_url: "{upstream}", api_key: "{upstream_key}", kind: {kind}, on_disconnect: {on_disconnect}}}
groups:
  clients: {{quotas: {{tokens: {{tokens: {tokens}, per: {per}, shared: {shared}}}}}}}
identity:
  headers: [{{name: front, key: "{front_key}", from: [127.0.0.1], user: {user_header}, unmapped: clients,
    tag_header: true}}]
users:
{users}
"""
# A user interface in front has this key, and says in this header who the user is. Only the test's own clients can
# reach the proxy's port, and the upstream is a fake.
FRONT_KEY = "key-of-the-user-interface-in-front"
USER_HEADER = "X-Torture-User"
ADMIN_NAME, ADMIN_KEY = "torture", "key-of-the-administrator-of-torture"
_START_S = 90.0
_STOP_S = 45.0
_READY_ANSWER_S = 1.0
_READY_EVERY_S = 0.02
# Below the ephemeral ports (Linux: from 32768, other systems: from 49152). A client that connects to an ephemeral
# port while the proxy is down may get that very port as its source port. TCP then connects it to itself, and the
# proxy can't listen there again.
_PORTS = range(15_000, 30_000)


class NotStarted(Exception):
    """The proxy did not start; the message is the end of its log."""


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """The upstream of the proxy under test: its base URL, the key for it, and its kind."""

    url: str
    key: str
    kind: str = "simulator"


class ProxyProcess:
    """The process. `epoch` increases when it goes down or is paused, and when it is up again; odd is down.

    `keys` are those of the users of its file. `database` is a URL; without one it has an SQLite file in its folder.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        *,
        upstream: UpstreamSettings,
        keys: tuple[str, ...],
        database: str | None = None,
    ) -> None:
        self.keys = keys
        self.database = database or f"sqlite:///{folder / 'quotas.db'}"
        self.epoch = 0
        self.kills = 0
        self.pauses = 0
        self.crashes = 0
        self.port = _free_port(random.Random())
        self.admin_port = _free_port(random.Random()) if plan.administrator else None
        self._config = folder / "quotas.yaml"
        self._log = folder / "proxy.log"
        self._process: asyncio.subprocess.Process | None = None
        self._starts = 0
        self._plan = plan
        self._upstream = upstream

    async def start(self) -> None:
        """Start it and wait until it is ready. Raises NotStarted."""
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
                        raise NotStarted(self._log_tail())
                    await asyncio.sleep(_READY_EVERY_S)
        except TimeoutError:
            raise NotStarted(f"It was not ready after {_START_S:.0f} s. {self._log_tail()}") from None

    async def add_users(self, number: int) -> tuple[str, ...]:
        """Make this many users in its database, as an operator does, and return their keys. Raises NotStarted."""
        file = self._config.with_name("users.csv")
        names = [f"database:user-{each}" for each in range(number)]
        file.write_text("id,groups\n" + "".join(f"user-{each},clients\n" for each in range(number)))
        await self._command("users", "import", str(file))
        return tuple([(await self._command("keys", "create", name, "--tag-header"))["key"] for name in names])

    async def _command(self, *arguments: str) -> Any:
        """What a command of the proxy prints as JSON. Raises NotStarted."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", *arguments, "--config", str(self._config), "--json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = await process.communicate()
        if process.returncode != 0:
            raise NotStarted(f"`{' '.join(arguments[:2])}` failed. {err.decode(errors='replace')}")
        return json.loads(out)

    async def kill_and_restart(self) -> None:
        """Send SIGKILL, and start it again at once with the same database and port."""
        process = self._process
        assert process is not None, "start() first"
        self.crashes += process.returncode is not None
        self.kills += 1
        self.epoch += 1
        await self.kill()
        await self.start()
        self.epoch += 1

    async def pause(self, seconds: float) -> None:
        """Send SIGSTOP, and SIGCONT after this time: connections stay open, and nothing is answered meanwhile."""
        process = self._process
        assert process is not None, "start() first"
        self.pauses += 1
        self.epoch += 1
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            process.send_signal(signal.SIGCONT)
        self.epoch += 1

    async def stop(self) -> None:
        """Send SIGTERM, as an operator does, and wait. A process that does not stop is killed; that is a crash."""
        process = self._process
        assert process is not None, "start() first"
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(_STOP_S):
                    await process.wait()
            except TimeoutError:
                await self.kill()
        self.crashes += process.returncode != 0

    async def kill(self) -> None:
        """Send SIGKILL if it is running."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def _policy(self, on_disconnect: str) -> str:
        plan, upstream = self._plan, self._upstream
        return _POLICY.format(
            port=self.port,
            admin=f'"127.0.0.1:{self.admin_port}"' if self.admin_port else "null",
            admin_key=ADMIN_KEY,
            database=self.database,
            wait_s=plan.wait_s,
            upstream=upstream.url,
            upstream_key=upstream.key,
            kind=upstream.kind,
            on_disconnect=on_disconnect,
            tokens=plan.tokens,
            per=plan.per,
            shared=str(plan.shared).lower(),
            front_key=FRONT_KEY,
            user_header=USER_HEADER,
            users="\n".join(
                f'  user-{number}: {{groups: [clients], keys: [{{key: "{key}", tag_header: true}}]}}'
                for number, key in enumerate(self.keys)
            ),
        )

    async def _is_ready(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        try:
            async with asyncio.timeout(_READY_ANSWER_S):
                writer.write(b"GET /readyz HTTP/1.0\r\n\r\n")
                return b" 200 " in await reader.readline()
        except OSError:  # the connection broke; a TimeoutError is an OSError too
            return False
        finally:
            writer.close()

    def _log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-10:])


def _free_port(rng: random.Random) -> int:
    """Return a port below the ephemeral ones on which nothing listens."""
    while True:
        port = rng.choice(_PORTS)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
