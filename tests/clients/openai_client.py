"""The official SDK of OpenAI."""

import json
from typing import Any

import openai

from tests.clients.steps import MESSAGES, QUESTION, SOUND, TOOL, size_of, used


class Session:
    """Its calls, each as its documentation shows it."""

    def __init__(self, url: str, key: str, **retries: int) -> None:
        self._sdk = self._connect(url, key, **retries)

    def _connect(self, url: str, key: str, **retries: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{url}/v1", api_key=key, **retries)

    def chat(self, model: str) -> dict[str, Any]:
        """Whole."""
        answer = self._sdk.chat.completions.create(model=model, messages=MESSAGES)
        return {"text": answer.choices[0].message.content, "usage": _used(answer.usage)}

    def stream(self, model: str) -> dict[str, Any]:
        """Chunk by chunk, with the usage in the last."""
        chunks = self._chunks(model, stream_options={"include_usage": True})
        return {"text": _text(chunks), "usage": _used(chunks[-1].usage)}

    def stream_unasked(self, model: str) -> dict[str, Any]:
        """Chunk by chunk, as most programs read them: each has a choice."""
        chunks = self._chunks(model)
        usage = next((_used(chunk.usage) for chunk in chunks if chunk.usage), None)
        without = sum(not chunk.choices for chunk in chunks)
        return {"text": _text(chunks), "usage": usage, "without_choices": without}

    def _chunks(self, model: str, **more: Any) -> list[Any]:
        return list(self._sdk.chat.completions.create(model=model, messages=MESSAGES, stream=True, **more))

    def tools(self, model: str) -> dict[str, Any]:
        """What it calls, whole."""
        answer = self._sdk.chat.completions.create(
            model=model, messages=MESSAGES, tools=[{"type": "function", "function": TOOL}]
        )
        return _called(answer)

    def tools_stream(self, model: str) -> dict[str, Any]:
        """The same, put together by the SDK."""
        with self._sdk.chat.completions.stream(
            model=model,
            messages=MESSAGES,
            tools=[{"type": "function", "function": TOOL}],
            stream_options={"include_usage": True},
        ) as stream:
            return _called(stream.get_final_completion())

    def responses(self, model: str) -> dict[str, Any]:
        """By the newer way to ask."""
        answer = self._sdk.responses.create(model=model, input=QUESTION)
        return {"text": answer.output_text, "usage": _used(answer.usage)}

    def responses_stream(self, model: str) -> dict[str, Any]:
        """The same, put together by the SDK."""
        with self._sdk.responses.stream(model=model, input=QUESTION) as stream:
            answer = stream.get_final_response()
        return {"text": answer.output_text, "usage": _used(answer.usage)}

    def embeddings(self, model: str) -> dict[str, Any]:
        """A vector, which it asks for in base64."""
        answer = self._sdk.embeddings.create(model=model, input="a river")
        return {"dimensions": len(answer.data[0].embedding), "usage": used(answer.usage.prompt_tokens)}

    def images(self, model: str) -> dict[str, Any]:
        """One picture."""
        answer = self._sdk.images.generate(model=model, prompt="a river")
        return {"bytes": size_of(answer.data[0].b64_json), "usage": _used(answer.usage)}

    def speech(self, model: str) -> dict[str, Any]:
        """Bytes."""
        return {"bytes": len(self._sdk.audio.speech.create(model=model, voice="alloy", input="a river").content)}

    def transcription(self, model: str) -> dict[str, Any]:
        """A form with a file."""
        answer = self._sdk.audio.transcriptions.create(model=model, file=SOUND)
        return {"text": answer.text, "usage": _used(answer.usage)}


def _text(chunks: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def _called(answer: Any) -> dict[str, Any]:
    called = answer.choices[0].message.tool_calls[0].function
    return {"name": called.name, "arguments": json.loads(called.arguments), "usage": _used(answer.usage)}


def _used(usage: Any) -> dict[str, int]:
    if hasattr(usage, "prompt_tokens"):
        return used(usage.prompt_tokens, usage.completion_tokens)
    return used(usage.input_tokens, usage.output_tokens)


def describe(error: Any) -> dict[str, Any]:
    """What its exceptions show."""
    response = getattr(error, "response", None)
    shown = {"status": getattr(error, "status_code", None), "code": getattr(error, "code", None)}
    return shown | ({"retry_after": response.headers.get("retry-after")} if response is not None else {})
