"""LiteLLM, which has one OpenAI-like interface for many vendors; here it calls an OpenAI-compatible server."""

import json
from typing import Any

import litellm

from tests.clients.openai_client import describe as describe
from tests.clients.steps import AUDIO, MESSAGES, QUESTION, TOOL, size_of, usage_of

TOOLS: Any = [{"type": "function", "function": TOOL}]
# Otherwise it prints advice to standard output, between our lines.
litellm.suppress_debug_info = True


class Session:
    """Its calls, each as its documentation shows it."""

    def __init__(self, url: str, key: str, **retries: int) -> None:
        self._settings: Any = {"api_base": f"{url}/v1", "api_key": key, **retries}

    def _complete(self, model: str, **more: Any) -> Any:
        return litellm.completion(model=f"openai/{model}", messages=MESSAGES, **self._settings, **more)

    def _stream(self, model: str, **more: Any) -> Any:
        chunks = list(self._complete(model, stream=True, stream_options={"include_usage": True}, **more))
        return litellm.stream_chunk_builder(chunks, messages=MESSAGES)

    def chat(self, model: str) -> dict[str, Any]:
        """A chat, not streamed."""
        return _text_result(self._complete(model))

    def stream(self, model: str) -> dict[str, Any]:
        """A streamed chat, assembled by LiteLLM."""
        return _text_result(self._stream(model))

    def tools(self, model: str) -> dict[str, Any]:
        """A tool call, not streamed."""
        return _tool_result(self._complete(model, tools=TOOLS))

    def tools_stream(self, model: str) -> dict[str, Any]:
        """A streamed tool call, assembled by LiteLLM."""
        return _tool_result(self._stream(model, tools=TOOLS))

    def responses(self, model: str) -> dict[str, Any]:
        """A response of the Responses API, not streamed."""
        answer: Any = litellm.responses(model=f"openai/{model}", input=QUESTION, **self._settings)
        return {"text": answer.output_text, "usage": _usage(answer.usage)}

    def embeddings(self, model: str) -> dict[str, Any]:
        """A vector."""
        answer = litellm.embedding(model=f"openai/{model}", input=["a river"], **self._settings)
        return {"dimensions": len(answer.data[0]["embedding"]), "usage": usage_of(answer.usage.prompt_tokens)}

    def images(self, model: str) -> dict[str, Any]:
        """One image."""
        answer = litellm.image_generation(model=f"openai/{model}", prompt="a river", **self._settings)
        return {"bytes": size_of(answer.data[0].b64_json), "usage": _usage(answer.usage)}

    def speech(self, model: str) -> dict[str, Any]:
        """Speech, as bytes."""
        answer = litellm.speech(model=f"openai/{model}", voice="alloy", input="a river", **self._settings)
        return {"bytes": len(answer.content)}

    def transcription(self, model: str) -> dict[str, Any]:
        """A transcription: a multipart request with a file."""
        answer = litellm.transcription(model=f"openai/{model}", file=AUDIO, **self._settings)
        return {"text": answer.text, "usage": _usage(answer.usage)}


def _text_result(answer: Any) -> dict[str, Any]:
    return {"text": answer.choices[0].message.content, "usage": _usage(answer.usage)}


def _tool_result(answer: Any) -> dict[str, Any]:
    [call] = answer.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    return {"name": call.function.name, "arguments": arguments, "usage": _usage(answer.usage)}


def _usage(usage: Any) -> dict[str, int]:
    if hasattr(usage, "prompt_tokens"):
        return usage_of(usage.prompt_tokens, usage.completion_tokens)
    return usage_of(usage.input_tokens, usage.output_tokens)
