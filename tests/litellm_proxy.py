"""LiteLLM's own proxy as an upstream, with a simulated upstream of its own.

with litellm_proxy(config, folder) as gateway:         # its config.yaml, as docs/gateways.md prints it
    async with gateway.upstream() as simulator: ...    # what it forwards to, the simulator of OpenAI
    gateway.url                                        # its base URL, with /v1

`make test` installs it into `.venv-clients`. It runs without a database and takes its list of prices from the
package. Its master key is UPSTREAM_KEY. Its start takes 20 s of processor time, because it imports all of itself.
"""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from proxy.simulator.server import Simulator, serve
from tests.clients.sessions import CLIENTS_PYTHON
from tests.stage import UPSTREAM_KEY

PROGRAM = CLIENTS_PYTHON.with_name("litellm")
OPENAI = "https://api.openai.com"
OPENAI_KEY = "sk-openai-0123456789abcdef"
_START_S = 400  # on a machine that does much else
_ENVIRON = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_MASTER_KEY": UPSTREAM_KEY,
    "OPENAI_API_KEY": OPENAI_KEY,
    "PATH": "/usr/bin:/bin",
}


class Gateway:
    """The running proxy."""

    def __init__(self, port: int, upstream_port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.upstream_port = upstream_port

    @asynccontextmanager
    async def upstream(self) -> AsyncIterator[Simulator]:
        """Serve the upstream that it forwards to."""
        simulator = Simulator(OPENAI_KEY)
        runner, _ = await serve(simulator, port=self.upstream_port)
        try:
            yield simulator
        finally:
            await runner.cleanup()


@contextmanager
def litellm_proxy(config: str, folder: Path, *, files: Mapping[str, str] | None = None) -> Iterator[Gateway]:
    """Start it with this `config.yaml`, in which OpenAI's address is replaced, and further files beside it.

    If it is not installed, the test is skipped, and in CI it fails.
    """
    if not PROGRAM.exists():
        reason = "no LiteLLM: `make test` installs it into .venv-clients"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    port, upstream_port = _free_ports(2)
    # It puts the folder two levels up on its import path.
    home = folder / "a" / "b"
    home.mkdir(parents=True)
    for name, text in {"config.yaml": config, **(files or {})}.items():
        (home / name).write_text(text.replace(OPENAI, f"http://127.0.0.1:{upstream_port}"))
    command = [PROGRAM, "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "litellm.log"
    with (
        log.open("wb") as out,
        subprocess.Popen(command, cwd=home, env={**_ENVIRON, "HOME": str(home)}, stdout=out, stderr=out) as process,
    ):
        try:
            _wait_until_alive(port, process, log)
            yield Gateway(port, upstream_port)
        finally:
            process.kill()


def _wait_until_alive(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveliness", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"LiteLLM did not start within {_START_S} s.\n{log.read_text()}")


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
