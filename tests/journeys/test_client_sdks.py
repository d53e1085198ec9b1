"""People's clients in Python, each unchanged in its own process: their answers, their exceptions, and the books."""

from pathlib import Path

import pytest

from tests.clients.sessions import ITS_OWN, OPENAI, Client, Raised, check, in_python, session

pytestmark = pytest.mark.journey

TEXT = ("chat", "stream", "tools", "tools_stream")
RESPONSES = ("responses", "responses_stream")
MEDIA = ("embeddings", "images", "speech", "transcription")
ANTHROPIC = {
    "unknown_key": Raised("AuthenticationError", 401, "authentication_error"),
    "unknown_model": Raised("NotFoundError", 404, "not_found_error"),
    "used_up": Raised("RateLimitError", 429, "rate_limit_error"),
    "failing": Raised("InternalServerError", 500, "api_error"),
    "broken_stream": Raised("APIStatusError", 200, "overloaded_error"),
    "cut_stream": Raised("APIStatusError", 200, "api_error"),
}
LANGCHAIN = OPENAI | {
    "unknown_key": Raised("OpenAIAuthenticationError", 401, "invalid_api_key"),
    "unknown_model": Raised("OpenAIModelNotFoundError", 404, "model_not_found"),
    "used_up": Raised("OpenAIRateLimitError", 429, "insufficient_quota"),
    "failing": Raised("OpenAIAPIError", 500),
}
# Its exceptions are made after OpenAI's, with the code left out or the status in its place.
LITELLM = {
    "unknown_key": Raised("AuthenticationError", 401),
    "unknown_model": Raised("NotFoundError", 404),
    "used_up": Raised("RateLimitError", 429, "429"),
    "failing": Raised("InternalServerError", 500),
    "broken_stream": Raised("MidStreamFallbackError", 500),
    "cut_stream": Raised("MidStreamFallbackError", 500),
}
# Neither traces what was said, nor looks for prices.
QUIET = {"LANGSMITH_TRACING": "false", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
CLIENTS = [
    Client("openai", in_python("openai"), (*TEXT, "stream_unasked", *RESPONSES, *MEDIA), OPENAI),
    Client("azure", in_python("azure"), (*TEXT, "stream_unasked", *RESPONSES, *MEDIA), OPENAI),
    Client("anthropic", in_python("anthropic"), TEXT, ANTHROPIC, kind="anthropic"),
    Client(
        "langchain", in_python("langchain", python=ITS_OWN), (*TEXT, *RESPONSES, "embeddings"), LANGCHAIN, env=QUIET
    ),
    Client("litellm", in_python("litellm", python=ITS_OWN), (*TEXT, "responses", *MEDIA), LITELLM, env=QUIET),
]


@pytest.mark.parametrize("client", CLIENTS, ids=str)
async def test_a_client_works_unchanged_and_is_told_what_the_books_have(client: Client, tmp_path: Path) -> None:
    """Whole and streamed, tools, vectors, pictures and sound as far as it has them, its own exception for each error.

    A stream that breaks never seems whole.
    """
    async with session(client, tmp_path) as on:
        await check(on, client)
