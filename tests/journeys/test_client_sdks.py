"""Client SDKs in Python, each unchanged in a process of its own: their answers, their exceptions, and the charges."""

from pathlib import Path

import pytest

from tests.clients.sessions import CLIENTS_PYTHON, OPENAI, Client, Raised, check, in_python, session

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
# Its exceptions resemble OpenAI's, but have no code, or the status in its place.
LITELLM = {
    "unknown_key": Raised("AuthenticationError", 401),
    "unknown_model": Raised("NotFoundError", 404),
    "used_up": Raised("RateLimitError", 429, "429"),
    "failing": Raised("InternalServerError", 500),
    "broken_stream": Raised("MidStreamFallbackError", 500),
    "cut_stream": Raised("MidStreamFallbackError", 500),
}
# Without telemetry, and without the download of LiteLLM's list of prices.
QUIET = {"LANGSMITH_TRACING": "false", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
CLIENTS = [
    Client("openai", in_python("openai"), (*TEXT, "stream_without_usage", *RESPONSES, *MEDIA), OPENAI),
    Client("azure", in_python("azure"), (*TEXT, "stream_without_usage", *RESPONSES, *MEDIA), OPENAI),
    Client("anthropic", in_python("anthropic"), TEXT, ANTHROPIC, kind="anthropic"),
    Client(
        "langchain",
        in_python("langchain", python=CLIENTS_PYTHON),
        (*TEXT, *RESPONSES, "embeddings"),
        LANGCHAIN,
        env=QUIET,
    ),
    Client("litellm", in_python("litellm", python=CLIENTS_PYTHON), (*TEXT, "responses", *MEDIA), LITELLM, env=QUIET),
]


@pytest.mark.parametrize("client", CLIENTS, ids=str)
async def test_an_sdk_works_unchanged_and_reports_the_usage_that_is_charged(client: Client, tmp_path: Path) -> None:
    """Chats, streams, tools, embeddings, images and audio, as far as the SDK has them, and its exception per error.

    A stream that breaks raises an exception; it never looks complete.
    """
    async with session(client, tmp_path) as on:
        await check(on, client)
