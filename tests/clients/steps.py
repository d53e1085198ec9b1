"""How a program in Python plays its steps: `play(Session, describe)`, and nothing else of ours is in its process.

A `Session` is made of the proxy's address and a key, and has a method for each step, which takes the name of the
model and returns what came of it. `describe` says what an exception shows to whoever catches it. See `sessions`.
"""

import base64
import json
import os
import sys
from collections.abc import Callable
from typing import Any

WRONG_KEY = "no-key-of-anyone-0123456789"
# What goes wrong is asked for in one of two ways.
ASKED_AS = {
    "unknown_key": "chat",
    "unknown_model": "chat",
    "used_up": "chat",
    "failing": "chat",
    "broken_stream": "stream",
    "cut_stream": "stream",
}
MESSAGES: Any = [{"role": "user", "content": "Which river is the longest?"}]
TOOL: Any = {
    "name": "look_up",
    "description": "Look a term up.",
    "parameters": {"type": "object", "properties": {"term": {"type": "string"}}, "required": ["term"]},
}
SOUND = ("speech.mp3", b"ID3\x04" + bytes(4000), "audio/mpeg")


def play(session_of: Callable[[str, str], Any], describe: Callable[[Any], dict[str, Any]]) -> None:
    """Play what the command line names, in its order, and print a line for each."""
    sys.addaudithook(_stay_here)
    for step in sys.argv[1:]:
        key = WRONG_KEY if step == "unknown_key" else os.environ["API_KEY"]
        try:
            session = session_of(os.environ["BASE_URL"], key)
            said = getattr(session, ASKED_AS.get(step, step))(step)
        except Exception as error:  # noqa: BLE001 - whatever an SDK raises is what we want to know
            said = {"error": {"class": type(error).__name__, "message": str(error), **describe(error)}}
        sys.stdout.write(json.dumps({"step": step, **said}) + "\n")


def used(taken: int, given: int = 0) -> dict[str, int]:
    """What an SDK says that a call has used."""
    return {"input": taken, "output": given}


def size_of(picture: str) -> int:
    """The bytes of a picture in base64."""
    return len(base64.b64decode(picture, validate=True))


def _stay_here(event: str, details: tuple[Any, ...]) -> None:
    """No SDK gets beyond this machine, whatever it would report or look up at home."""
    if event == "socket.connect" and isinstance(details[1], tuple) and details[1][0] not in ("127.0.0.1", "::1"):
        sys.stderr.write(f"wanted to connect to {details[1]}\n")
        os._exit(3)
    if event == "socket.getaddrinfo" and details[0] not in ("127.0.0.1", "localhost", None):
        sys.stderr.write(f"asked for the address of {details[0]}\n")
        os._exit(3)
