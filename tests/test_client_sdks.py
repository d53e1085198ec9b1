"""People's clients in Python, each unchanged in its own process: their answers, their exceptions, and the books."""

from pathlib import Path

import pytest

from tests.clients.sessions import Client, Raised, check_answers, check_faults, in_python, session

pytestmark = pytest.mark.journey

TEXT = ("chat", "stream", "tools", "tools_stream")
RESPONSES = ("responses", "responses_stream")
MEDIA = ("embeddings", "images", "speech", "transcription")
OPENAI = {
    "unknown_key": Raised("AuthenticationError", 401, "invalid_api_key"),
    "unknown_model": Raised("NotFoundError", 404, "model_not_found"),
    "used_up": Raised("RateLimitError", 429, "insufficient_quota"),
    "failing": Raised("InternalServerError", 500),
    "broken_stream": Raised("APIError", None, "server_error"),
    "cut_stream": Raised("APIError", None, "upstream_error"),
}
ANTHROPIC = {
    "unknown_key": Raised("AuthenticationError", 401, "authentication_error"),
    "unknown_model": Raised("NotFoundError", 404, "not_found_error"),
    "used_up": Raised("RateLimitError", 429, "rate_limit_error"),
    "failing": Raised("InternalServerError", 500, "api_error"),
    "broken_stream": Raised("APIStatusError", 200, "overloaded_error"),
    "cut_stream": Raised("APIStatusError", 200, "api_error"),
}
CLIENTS = [
    Client("openai", in_python("openai"), (*TEXT, *RESPONSES, *MEDIA), OPENAI),
    Client("azure", in_python("azure"), (*TEXT, *RESPONSES, *MEDIA), OPENAI),
    Client("anthropic", in_python("anthropic"), TEXT, ANTHROPIC, kind="anthropic"),
]


@pytest.mark.parametrize("client", CLIENTS, ids=str)
async def test_a_client_gets_what_the_upstream_said_and_is_told_what_the_books_have(
    client: Client, tmp_path: Path
) -> None:
    """Whole and streamed, tools, vectors, pictures and sound, as far as it has them; to the token."""
    async with session(client, tmp_path) as on:
        await check_answers(on, client)


@pytest.mark.parametrize("client", CLIENTS, ids=str)
async def test_a_client_raises_what_it_should(client: Client, tmp_path: Path) -> None:
    """Its own exception for each of our errors, with our words; a stream that breaks never seems whole."""
    async with session(client, tmp_path) as on:
        await check_faults(on, client)
