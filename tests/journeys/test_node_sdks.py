"""Client SDKs in JavaScript, each unchanged in a process of its own: answers, exceptions, and the charges.

`make test` installs the SDKs if there is npm. Without Node these tests are skipped, and the summary says so.
"""

import os
import shutil
from pathlib import Path

import pytest

from tests.clients.sessions import CLIENTS, OPENAI, Client, Raised, check, session

NODE = shutil.which("node")
FOLDER = CLIENTS / "node"
pytestmark = pytest.mark.journey


@pytest.fixture(autouse=True)
def _skip_without_node() -> None:
    """Skip these tests without Node or the SDKs. In CI with Node they run, and fail if the SDKs are not installed."""
    if NODE is None:
        reason = "Node is not installed"
    elif not (FOLDER / "node_modules").is_dir() and not os.environ.get("CI"):
        reason = "the SDKs are not installed; `make test` installs them if there is npm"
    else:
        return
    pytest.skip(f"NO SDK FOR NODE WAS TESTED: {reason}")


TEXT = ("chat", "stream", "stream_without_usage", "tools", "tools_stream")
MEDIA = ("embeddings", "images")
AI = {
    "unknown_key": Raised("AI_APICallError", 401, "invalid_api_key"),
    "unknown_model": Raised("AI_APICallError", 404, "model_not_found"),
    "used_up": Raised("AI_APICallError", 429, "insufficient_quota"),
    "failing": Raised("AI_APICallError", 500),
    "broken_stream": Raised("AI_StreamProviderError", None, "server_error"),
    "cut_stream": Raised("AI_StreamProviderError", None, "upstream_error"),
}
# Version 6 throws the error object of a stream unchanged.
AI_6 = AI | {
    "broken_stream": Raised("Object", None, "server_error"),
    "cut_stream": Raised("Object", None, "upstream_error"),
}


def _client(name: str, steps: tuple[str, ...], raises: dict[str, Raised]) -> Client:
    return Client(name, (NODE or "node", FOLDER / f"{name}.mjs"), steps, raises)


ALL = (*TEXT, "responses", "responses_stream", *MEDIA, "speech", "transcription")
SDKS = [
    _client("openai-6", ALL, OPENAI),
    _client("openai-7", ALL, OPENAI),
    _client("ai-6", (*TEXT, *MEDIA), AI_6),
    _client("ai-7", (*TEXT, *MEDIA), AI),
]


@pytest.mark.parametrize("client", SDKS, ids=str)
async def test_an_sdk_works_unchanged_and_reports_the_usage_that_is_charged(client: Client, tmp_path: Path) -> None:
    """Chats, streams, tools, embeddings, images and audio, as far as the SDK has them, and its exception per error.

    A stream that breaks raises an exception; it never looks complete.
    """
    async with session(client, tmp_path) as on:
        await check(on, client)
