"""LangChain's chat models and embeddings for OpenAI, as agents use them."""

from typing import Any

from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from tests.clients.openai_client import describe as describe
from tests.clients.steps import QUESTION, TOOL, usage_of


class Session:
    """Its calls, each as its documentation shows it."""

    def __init__(self, url: str, key: str, **retries: int) -> None:
        self._settings: Any = {"base_url": f"{url}/v1", "api_key": key, **retries}

    def _model(self, name: str, **more: Any) -> ChatOpenAI:
        # At an address that is not OpenAI's it does not ask a stream for its usage by default.
        return ChatOpenAI(model=name, stream_usage=True, **self._settings, **more)

    def chat(self, model: str) -> dict[str, Any]:
        """A chat, not streamed."""
        return _text_result(self._model(model).invoke(QUESTION))

    def stream(self, model: str) -> dict[str, Any]:
        """A streamed chat, whose chunks add up to a message."""
        return _text_result(_sum(self._model(model).stream(QUESTION)))

    def tools(self, model: str) -> dict[str, Any]:
        """A tool call, not streamed."""
        return _tool_result(self._model(model).bind_tools([TOOL]).invoke(QUESTION))

    def tools_stream(self, model: str) -> dict[str, Any]:
        """A streamed tool call, whose chunks add up to a message."""
        return _tool_result(_sum(self._model(model).bind_tools([TOOL]).stream(QUESTION)))

    def responses(self, model: str) -> dict[str, Any]:
        """A response of the Responses API, not streamed."""
        return _text_result(self._model(model, use_responses_api=True).invoke(QUESTION))

    def responses_stream(self, model: str) -> dict[str, Any]:
        """A streamed response, whose chunks add up to a message."""
        return _text_result(_sum(self._model(model, use_responses_api=True).stream(QUESTION)))

    def embeddings(self, model: str) -> dict[str, Any]:
        """A vector; the usage is not available. The length check is off because it would download a tokenizer."""
        vectors = OpenAIEmbeddings(model=model, check_embedding_ctx_length=False, **self._settings)
        return {"dimensions": len(vectors.embed_query("a river"))}


def _sum(chunks: Any) -> Any:
    first, *others = chunks
    for chunk in others:
        first += chunk
    return first


def _text_result(message: Any) -> dict[str, Any]:
    return {"text": message.text, "usage": _usage(message)}


def _tool_result(message: Any) -> dict[str, Any]:
    [call] = message.tool_calls
    return {"name": call["name"], "arguments": call["args"], "usage": _usage(message)}


def _usage(message: Any) -> dict[str, int] | None:
    usage = message.usage_metadata
    return usage_of(usage["input_tokens"], usage["output_tokens"]) if usage else None
