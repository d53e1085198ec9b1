"""The official SDK of OpenAI."""

import json
from typing import Any

import openai

from tests.clients.steps import AUDIO, MESSAGES, QUESTION, TOOL, size_of, usage_of


class Session:
    """Its calls, each as its documentation shows it."""

    def __init__(self, url: str, key: str, **retries: int) -> None:
        self._sdk = self._connect(url, key, **retries)

    def _connect(self, url: str, key: str, **retries: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{url}/v1", api_key=key, **retries)

    def chat(self, model: str) -> dict[str, Any]:
        """A chat, not streamed."""
        answer = self._sdk.chat.completions.create(model=model, messages=MESSAGES)
        return {"text": answer.choices[0].message.content, "usage": _usage(answer.usage)}

    def stream(self, model: str) -> dict[str, Any]:
        """A streamed chat that asks for its usage, which is in the last chunk."""
        chunks = self._chunks(model, stream_options={"include_usage": True})
        return {"text": _text(chunks), "usage": _usage(chunks[-1].usage)}

    def stream_without_usage(self, model: str) -> dict[str, Any]:
        """A streamed chat that asks for no usage. Most programs expect a choice in each of its chunks."""
        chunks = self._chunks(model)
        usage = next((_usage(chunk.usage) for chunk in chunks if chunk.usage), None)
        without_choices = sum(not chunk.choices for chunk in chunks)
        return {"text": _text(chunks), "usage": usage, "without_choices": without_choices}

    def _chunks(self, model: str, **more: Any) -> list[Any]:
        return list(self._sdk.chat.completions.create(model=model, messages=MESSAGES, stream=True, **more))

    def tools(self, model: str) -> dict[str, Any]:
        """A tool call, not streamed."""
        answer = self._sdk.chat.completions.create(
            model=model, messages=MESSAGES, tools=[{"type": "function", "function": TOOL}]
        )
        return _tool_result(answer)

    def tools_stream(self, model: str) -> dict[str, Any]:
        """A streamed tool call, assembled by the SDK."""
        with self._sdk.chat.completions.stream(
            model=model,
            messages=MESSAGES,
            tools=[{"type": "function", "function": TOOL}],
            stream_options={"include_usage": True},
        ) as stream:
            return _tool_result(stream.get_final_completion())

    def responses(self, model: str) -> dict[str, Any]:
        """A response of the Responses API, not streamed."""
        answer = self._sdk.responses.create(model=model, input=QUESTION)
        return {"text": answer.output_text, "usage": _usage(answer.usage)}

    def responses_stream(self, model: str) -> dict[str, Any]:
        """A streamed response, assembled by the SDK."""
        with self._sdk.responses.stream(model=model, input=QUESTION) as stream:
            answer = stream.get_final_response()
        return {"text": answer.output_text, "usage": _usage(answer.usage)}

    def embeddings(self, model: str) -> dict[str, Any]:
        """A vector, which the SDK requests in base64."""
        answer = self._sdk.embeddings.create(model=model, input="a river")
        return {"dimensions": len(answer.data[0].embedding), "usage": usage_of(answer.usage.prompt_tokens)}

    def images(self, model: str) -> dict[str, Any]:
        """One image."""
        answer = self._sdk.images.generate(model=model, prompt="a river")
        return {"bytes": size_of(answer.data[0].b64_json), "usage": _usage(answer.usage)}

    def speech(self, model: str) -> dict[str, Any]:
        """Speech, as bytes."""
        return {"bytes": len(self._sdk.audio.speech.create(model=model, voice="alloy", input="a river").content)}

    def transcription(self, model: str) -> dict[str, Any]:
        """A transcription: a multipart request with a file."""
        answer = self._sdk.audio.transcriptions.create(model=model, file=AUDIO)
        return {"text": answer.text, "usage": _usage(answer.usage)}


def _text(chunks: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def _tool_result(answer: Any) -> dict[str, Any]:
    function = answer.choices[0].message.tool_calls[0].function
    return {"name": function.name, "arguments": json.loads(function.arguments), "usage": _usage(answer.usage)}


def _usage(usage: Any) -> dict[str, int]:
    if hasattr(usage, "prompt_tokens"):
        return usage_of(usage.prompt_tokens, usage.completion_tokens)
    return usage_of(usage.input_tokens, usage.output_tokens)


def describe(error: Any) -> dict[str, Any]:
    """The public attributes of its exceptions."""
    response = getattr(error, "response", None)
    shown = {"status": getattr(error, "status_code", None), "code": getattr(error, "code", None)}
    return shown | ({"retry_after": response.headers.get("retry-after")} if response is not None else {})
