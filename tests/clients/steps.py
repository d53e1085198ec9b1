"""What the Python clients send, and the form of their results."""

import base64
from typing import Any

QUESTION = "Which river is the longest?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
TOOL: Any = {
    "name": "look_up",
    "description": "Look a term up.",
    "parameters": {"type": "object", "properties": {"term": {"type": "string"}}, "required": ["term"]},
}
AUDIO = ("speech.mp3", b"ID3\x04" + bytes(4000), "audio/mpeg")


def usage_of(input_tokens: int, output_tokens: int = 0) -> dict[str, int]:
    """The usage that an SDK reports for a call, in the form in which it is printed."""
    return {"input": input_tokens, "output": output_tokens}


def size_of(image: str) -> int:
    """The number of bytes of an image in base64."""
    return len(base64.b64decode(image, validate=True))
