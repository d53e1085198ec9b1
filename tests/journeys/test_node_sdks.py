"""People's clients in JavaScript, each unchanged in its own process: their answers, their exceptions, and the books.

`make test` installs them where there is npm. Without Node they are skipped, which the summary says.
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
def _is_there_node() -> None:
    """Where CI has Node they are played, come what may: what isn't installed fails."""
    if NODE is None:
        missing = "there is no Node here"
    elif not (FOLDER / "node_modules").is_dir() and not os.environ.get("CI"):
        missing = "`make test` installs them where there is npm"
    else:
        return
    pytest.skip(f"NOT ONE SDK OF NODE WAS TRIED: {missing}")


TEXT = ("chat", "stream", "stream_unasked", "tools", "tools_stream")
PICTURES = ("embeddings", "images")
AI = {
    "unknown_key": Raised("AI_APICallError", 401, "invalid_api_key"),
    "unknown_model": Raised("AI_APICallError", 404, "model_not_found"),
    "used_up": Raised("AI_APICallError", 429, "insufficient_quota"),
    "failing": Raised("AI_APICallError", 500),
    "broken_stream": Raised("AI_StreamProviderError", None, "server_error"),
    "cut_stream": Raised("AI_StreamProviderError", None, "upstream_error"),
}
# Hands out what it finds in a stream as it came.
AI_6 = AI | {
    "broken_stream": Raised("Object", None, "server_error"),
    "cut_stream": Raised("Object", None, "upstream_error"),
}


def _client(name: str, steps: tuple[str, ...], raises: dict[str, Raised]) -> Client:
    return Client(name, (NODE or "node", FOLDER / f"{name}.mjs"), steps, raises)


ALL = (*TEXT, "responses", "responses_stream", *PICTURES, "speech", "transcription")
SDKS = [
    _client("openai-6", ALL, OPENAI),
    _client("openai-7", ALL, OPENAI),
    _client("ai-6", (*TEXT, *PICTURES), AI_6),
    _client("ai-7", (*TEXT, *PICTURES), AI),
]


@pytest.mark.parametrize("client", SDKS, ids=str)
async def test_a_client_works_unchanged_and_is_told_what_the_books_have(client: Client, tmp_path: Path) -> None:
    """Whole and streamed, tools, vectors, pictures and sound as far as it has them, its own exception for each error.

    A stream that breaks never seems whole.
    """
    async with session(client, tmp_path) as on:
        await check(on, client)
