"""A real model server as an upstream: llama.cpp's, with a small model that is written when it starts.

with model_server(folder) as server:
    await server.ask(http, "/v1/chat/completions", body)     # its answer without the proxy
    await server.generated(http)                             # the number of tokens generated since its start

`make test` installs it from tests/model_server.lock into a folder of its own. Only the server's process has that
folder on its path.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.stage import UPSTREAM_KEY
from tests.tiny_model import write_model

INSTALLED = Path(sys.prefix) / "model-server"
PROGRAM = Path(__file__).with_name("llama_server.py")
_METRIC = re.compile(r"^llamacpp:(\w+) (\d+)$", re.MULTILINE)


class ModelServer:
    """A running server. `url` generates and `embeddings_url` embeds; both end with `/v1`."""

    def __init__(self, root: str, embeddings_root: str) -> None:
        self.url = f"{root}/v1"
        self.embeddings_url = f"{embeddings_root}/v1"
        self._root = root
        self._embeddings_root = embeddings_root

    async def ask(
        self, http: aiohttp.ClientSession, path: str, body: Mapping[str, Any], *, embeds: bool = False
    ) -> bytes:
        """Its answer to a direct request, without the proxy."""
        # It closes the connection after a stream although it announces that it keeps it open.
        headers = {"authorization": f"Bearer {UPSTREAM_KEY}", "connection": "close"}
        async with http.post(
            (self._embeddings_root if embeds else self._root) + path, json=body, headers=headers
        ) as response:
            return await response.read()

    async def generated(self, http: aiohttp.ClientSession) -> int:
        """Wait until it is idle; return how many tokens it has generated since its start, by its own metrics.

        Tokens of answers whose client disconnected are included.
        """
        headers = {"authorization": f"Bearer {UPSTREAM_KEY}"}
        # It notices a disconnect only when it writes, so it may be busy for a while. The test's timeout bounds the
        # loop.
        while True:
            async with http.get(f"{self._root}/metrics", headers=headers) as response:
                metrics = dict(_METRIC.findall(await response.text()))
            if metrics["requests_processing"] == metrics["requests_deferred"] == "0":
                return int(metrics["tokens_predicted_total"])


@contextmanager
def model_server(folder: Path) -> Iterator[ModelServer]:
    """Start it. If it is not installed, the test is skipped, and in CI it fails."""
    if not (INSTALLED / "xllamacpp").exists():
        reason = "no model server: `make test` installs it if there is a wheel of xllamacpp"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    write_model(folder / "tiny.gguf")
    with (
        (folder / "model-server.log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder / "tiny.gguf"), UPSTREAM_KEY],
            env={**os.environ, "PYTHONPATH": str(INSTALLED)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            roots = process.stdout.readline().decode().split()  # empty if it has ended by its own timeout
            assert len(roots) == 2, (folder / "model-server.log").read_text()
            yield ModelServer(*roots)
        finally:
            process.kill()
