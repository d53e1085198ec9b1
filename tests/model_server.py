"""A real model server that is none of ours: llama.cpp's, with a model that is written when it starts.

with model_server(folder) as server:
    await server.ask(http, "/v1/chat/completions", body)     # what it says without us
    await server.generated(http)                             # how many tokens it made since it started

It is installed by `make test` from tests/model_server.lock into a folder of its own, which is on the path of its
process alone.
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
    """It runs; `url` is where it generates, and `embeddings_url` where it embeds, each with `/v1`."""

    def __init__(self, root: str, embeddings_root: str) -> None:
        self.url = f"{root}/v1"
        self.embeddings_url = f"{embeddings_root}/v1"
        self._root = root
        self._embeddings_root = embeddings_root

    async def ask(
        self, http: aiohttp.ClientSession, path: str, body: Mapping[str, Any], *, embeds: bool = False
    ) -> bytes:
        """Its answer without us between."""
        # It closes the connection after a stream, and promises the contrary.
        headers = {"authorization": f"Bearer {UPSTREAM_KEY}", "connection": "close"}
        async with http.post(
            (self._embeddings_root if embeds else self._root) + path, json=body, headers=headers
        ) as response:
            return await response.read()

    async def generated(self, http: aiohttp.ClientSession) -> int:
        """All the tokens that it ever generated, by its own count, also those that nobody read; once it is idle."""
        headers = {"authorization": f"Bearer {UPSTREAM_KEY}"}
        while True:  # it notices that a client has gone when it writes; the test's time limit bounds it
            async with http.get(f"{self._root}/metrics", headers=headers) as response:
                said = dict(_METRIC.findall(await response.text()))
            if said["requests_processing"] == said["requests_deferred"] == "0":
                return int(said["tokens_predicted_total"])


@contextmanager
def model_server(folder: Path) -> Iterator[ModelServer]:
    """Start it; skips the test, loudly, where it is not installed."""
    if not (INSTALLED / "xllamacpp").exists():
        missing = "no model server: make test installs it, where there is a wheel of xllamacpp"
        assert not os.environ.get("CI"), missing
        pytest.skip(missing)
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
            roots = process.stdout.readline().decode().split()  # it gives up by itself, which ends this too
            assert len(roots) == 2, (folder / "model-server.log").read_text()
            yield ModelServer(*roots)
        finally:
            process.kill()
