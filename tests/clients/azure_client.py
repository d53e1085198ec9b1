"""OpenAI's official SDK for Azure, which has other paths and sends the key in another header."""

from typing import Any

import openai

from tests.clients import openai_client
from tests.clients.openai_client import describe as describe


class Session(openai_client.Session):
    """The same calls."""

    def _connect(self, url: str, key: str, **retries: Any) -> openai.OpenAI:
        return openai.AzureOpenAI(azure_endpoint=url, api_key=key, api_version="2024-10-21", **retries)
