"""The official SDK of OpenAI in its form for Azure, which has other addresses and sends its key otherwise."""

import openai

from tests.clients import openai_client
from tests.clients.steps import play


class Session(openai_client.Session):
    """The same calls."""

    def _connect(self, url: str, key: str) -> openai.OpenAI:
        return openai.AzureOpenAI(azure_endpoint=url, api_key=key, api_version="2024-10-21", max_retries=0)


if __name__ == "__main__":
    play(Session, openai_client.describe)
