"""The official SDK of Anthropic, which has messages and nothing of OpenAI's surface."""

from typing import Any

import anthropic

from tests.clients.steps import MESSAGES, TOOL, used

TOOLS: Any = [
    {"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["parameters"]},
]


class Session:
    """Its calls, each as its documentation shows it."""

    def __init__(self, url: str, key: str, **retries: int) -> None:
        self._sdk = anthropic.Anthropic(base_url=url, api_key=key, **retries)

    def chat(self, model: str) -> dict[str, Any]:
        """Whole."""
        return _said(self._sdk.messages.create(model=model, max_tokens=100, messages=MESSAGES))

    def stream(self, model: str) -> dict[str, Any]:
        """Put together by the SDK."""
        with self._sdk.messages.stream(model=model, max_tokens=100, messages=MESSAGES) as stream:
            return _said(stream.get_final_message())

    def tools(self, model: str) -> dict[str, Any]:
        """What it calls, whole."""
        return _called(self._sdk.messages.create(model=model, max_tokens=100, messages=MESSAGES, tools=TOOLS))

    def tools_stream(self, model: str) -> dict[str, Any]:
        """The same, put together by the SDK."""
        with self._sdk.messages.stream(model=model, max_tokens=100, messages=MESSAGES, tools=TOOLS) as stream:
            return _called(stream.get_final_message())


def _said(message: Any) -> dict[str, Any]:
    return {"text": message.content[0].text, "usage": _used(message.usage)}


def _called(message: Any) -> dict[str, Any]:
    block = message.content[0]
    return {"name": block.name, "arguments": block.input, "usage": _used(message.usage)}


def _used(usage: Any) -> dict[str, int]:
    written, read = usage.cache_creation_input_tokens or 0, usage.cache_read_input_tokens or 0
    return used(usage.input_tokens + written + read, usage.output_tokens)


def describe(error: Any) -> dict[str, Any]:
    """What its exceptions show; the code is the type that Anthropic puts into the body."""
    response = getattr(error, "response", None)
    body = getattr(error, "body", None)
    said = body.get("error", {}) if isinstance(body, dict) else {}
    shown = {"status": getattr(error, "status_code", None), "code": said.get("type")}
    return shown | ({"retry_after": response.headers.get("retry-after")} if response is not None else {})
