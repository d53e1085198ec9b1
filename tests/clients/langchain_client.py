"""LangChain's chat models and embeddings for OpenAI, as agents use them."""

from typing import Any

from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from tests.clients.openai_client import describe as describe
from tests.clients.steps import QUESTION, TOOL, used


class Session:
    """Its calls, each as its documentation shows it."""

    def __init__(self, url: str, key: str, **retries: int) -> None:
        self._where: Any = {"base_url": f"{url}/v1", "api_key": key, **retries}

    def _model(self, name: str, **more: Any) -> ChatOpenAI:
        # At an address that is not OpenAI's it asks a stream for no usage unless told to.
        return ChatOpenAI(model=name, stream_usage=True, **self._where, **more)

    def chat(self, model: str) -> dict[str, Any]:
        """Whole."""
        return _said(self._model(model).invoke(QUESTION))

    def stream(self, model: str) -> dict[str, Any]:
        """Chunks, which add up to a message."""
        return _said(_sum(self._model(model).stream(QUESTION)))

    def tools(self, model: str) -> dict[str, Any]:
        """What it calls, whole."""
        return _called(self._model(model).bind_tools([TOOL]).invoke(QUESTION))

    def tools_stream(self, model: str) -> dict[str, Any]:
        """The same, added up."""
        return _called(_sum(self._model(model).bind_tools([TOOL]).stream(QUESTION)))

    def responses(self, model: str) -> dict[str, Any]:
        """By the newer way to ask."""
        return _said(self._model(model, use_responses_api=True).invoke(QUESTION))

    def responses_stream(self, model: str) -> dict[str, Any]:
        """The same, added up."""
        return _said(_sum(self._model(model, use_responses_api=True).stream(QUESTION)))

    def embeddings(self, model: str) -> dict[str, Any]:
        """A vector; the usage it keeps to itself. It would fetch a tokenizer for OpenAI's own models."""
        vectors = OpenAIEmbeddings(model=model, check_embedding_ctx_length=False, **self._where)
        return {"dimensions": len(vectors.embed_query("a river"))}


def _sum(chunks: Any) -> Any:
    first, *others = chunks
    for chunk in others:
        first += chunk
    return first


def _said(message: Any) -> dict[str, Any]:
    return {"text": message.text, "usage": _used(message)}


def _called(message: Any) -> dict[str, Any]:
    [called] = message.tool_calls
    return {"name": called["name"], "arguments": called["args"], "usage": _used(message)}


def _used(message: Any) -> dict[str, int] | None:
    usage = message.usage_metadata
    return used(usage["input_tokens"], usage["output_tokens"]) if usage else None
