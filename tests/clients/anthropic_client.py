"""The official SDK of Anthropic. It has messages, and none of OpenAI's other endpoints."""

from typing import Any

import anthropic

from tests.clients.steps import MESSAGES, TOOL, usage_of

TOOLS: Any = [
    {"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["parameters"]},
]


class Session:
    """Its calls, each as its documentation shows it."""

    def __init__(self, url: str, key: str, **retries: int) -> None:
        self._sdk = anthropic.Anthropic(base_url=url, api_key=key, **retries)

    def chat(self, model: str) -> dict[str, Any]:
        """A message, not streamed."""
        return _text_result(self._sdk.messages.create(model=model, max_tokens=100, messages=MESSAGES))

    def stream(self, model: str) -> dict[str, Any]:
        """A streamed message, assembled by the SDK."""
        with self._sdk.messages.stream(model=model, max_tokens=100, messages=MESSAGES) as stream:
            return _text_result(stream.get_final_message())

    def tools(self, model: str) -> dict[str, Any]:
        """A tool call, not streamed."""
        return _tool_result(self._sdk.messages.create(model=model, max_tokens=100, messages=MESSAGES, tools=TOOLS))

    def tools_stream(self, model: str) -> dict[str, Any]:
        """A streamed tool call, assembled by the SDK."""
        with self._sdk.messages.stream(model=model, max_tokens=100, messages=MESSAGES, tools=TOOLS) as stream:
            return _tool_result(stream.get_final_message())


def _text_result(message: Any) -> dict[str, Any]:
    return {"text": message.content[0].text, "usage": _usage(message.usage)}


def _tool_result(message: Any) -> dict[str, Any]:
    block = message.content[0]
    return {"name": block.name, "arguments": block.input, "usage": _usage(message.usage)}


def _usage(usage: Any) -> dict[str, int]:
    written, read = usage.cache_creation_input_tokens or 0, usage.cache_read_input_tokens or 0
    return usage_of(usage.input_tokens + written + read, usage.output_tokens)


def describe(error: Any) -> dict[str, Any]:
    """The public attributes of its exceptions. The code is the error type in Anthropic's body."""
    response = getattr(error, "response", None)
    body = getattr(error, "body", None)
    details = body.get("error", {}) if isinstance(body, dict) else {}
    shown = {"status": getattr(error, "status_code", None), "code": details.get("type")}
    return shown | ({"retry_after": response.headers.get("retry-after")} if response is not None else {})
