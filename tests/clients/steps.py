"""What the clients in Python ask, and in what form they print it."""

import base64
from typing import Any

QUESTION = "Which river is the longest?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
TOOL: Any = {
    "name": "look_up",
    "description": "Look a term up.",
    "parameters": {"type": "object", "properties": {"term": {"type": "string"}}, "required": ["term"]},
}
SOUND = ("speech.mp3", b"ID3\x04" + bytes(4000), "audio/mpeg")


def used(taken: int, given: int = 0) -> dict[str, int]:
    """What an SDK says that a call has used."""
    return {"input": taken, "output": given}


def size_of(picture: str) -> int:
    """The bytes of a picture in base64."""
    return len(base64.b64decode(picture, validate=True))
