"""LiteLLM, which speaks to everybody in OpenAI's words, and here to a server like OpenAI's."""

import json
from typing import Any

import litellm

from tests.clients.openai_client import describe as describe
from tests.clients.steps import MESSAGES, QUESTION, SOUND, TOOL, size_of, used

TOOLS: Any = [{"type": "function", "function": TOOL}]
# It would print advice among our lines.
litellm.suppress_debug_info = True


class Session:
    """Its calls, each as its documentation shows it."""

    def __init__(self, url: str, key: str, **retries: int) -> None:
        self._where: Any = {"api_base": f"{url}/v1", "api_key": key, **retries}

    def _complete(self, model: str, **more: Any) -> Any:
        return litellm.completion(model=f"openai/{model}", messages=MESSAGES, **self._where, **more)

    def _stream(self, model: str, **more: Any) -> Any:
        chunks = list(self._complete(model, stream=True, stream_options={"include_usage": True}, **more))
        return litellm.stream_chunk_builder(chunks, messages=MESSAGES)

    def chat(self, model: str) -> dict[str, Any]:
        """Whole."""
        return _said(self._complete(model))

    def stream(self, model: str) -> dict[str, Any]:
        """Chunks, from which it builds the answer."""
        return _said(self._stream(model))

    def tools(self, model: str) -> dict[str, Any]:
        """What it calls, whole."""
        return _called(self._complete(model, tools=TOOLS))

    def tools_stream(self, model: str) -> dict[str, Any]:
        """The same, built from chunks."""
        return _called(self._stream(model, tools=TOOLS))

    def responses(self, model: str) -> dict[str, Any]:
        """By the newer way to ask."""
        answer: Any = litellm.responses(model=f"openai/{model}", input=QUESTION, **self._where)
        return {"text": answer.output_text, "usage": _used(answer.usage)}

    def embeddings(self, model: str) -> dict[str, Any]:
        """A vector."""
        answer = litellm.embedding(model=f"openai/{model}", input=["a river"], **self._where)
        return {"dimensions": len(answer.data[0]["embedding"]), "usage": used(answer.usage.prompt_tokens)}

    def images(self, model: str) -> dict[str, Any]:
        """One picture."""
        answer = litellm.image_generation(model=f"openai/{model}", prompt="a river", **self._where)
        return {"bytes": size_of(answer.data[0].b64_json), "usage": _used(answer.usage)}

    def speech(self, model: str) -> dict[str, Any]:
        """Bytes."""
        answer = litellm.speech(model=f"openai/{model}", voice="alloy", input="a river", **self._where)
        return {"bytes": len(answer.content)}

    def transcription(self, model: str) -> dict[str, Any]:
        """A form with a file."""
        answer = litellm.transcription(model=f"openai/{model}", file=SOUND, **self._where)
        return {"text": answer.text, "usage": _used(answer.usage)}


def _said(answer: Any) -> dict[str, Any]:
    return {"text": answer.choices[0].message.content, "usage": _used(answer.usage)}


def _called(answer: Any) -> dict[str, Any]:
    [called] = answer.choices[0].message.tool_calls
    arguments = json.loads(called.function.arguments)
    return {"name": called.function.name, "arguments": arguments, "usage": _used(answer.usage)}


def _used(usage: Any) -> dict[str, int]:
    if hasattr(usage, "prompt_tokens"):
        return used(usage.prompt_tokens, usage.completion_tokens)
    return used(usage.input_tokens, usage.output_tokens)
