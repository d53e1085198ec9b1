"""Plays a client in Python: `python -m tests.clients openai chat stream …`; `sessions` says what it prints.

Nothing else of ours is in this process. A client's module has a `Session`, made of the proxy's address, a key and
perhaps `max_retries`, with a method for each step, which takes the name of the model and returns what came of it; and
`describe`, which says what an exception shows to whoever catches it.
"""

import json
import os
import sys
from importlib import import_module
from typing import Any

WRONG_KEY = "no-key-of-anyone-0123456789"
HERE = ("127.0.0.1", "::1", "localhost", None)
RETRIED = ("used_up",)  # as often as the SDK thinks right by itself: not at all, since our answer says so
# What goes wrong is asked for in one of two ways.
ASKED_AS = {
    "unknown_key": "chat",
    "unknown_model": "chat",
    "used_up": "chat",
    "failing": "chat",
    "broken_stream": "stream",
    "cut_stream": "stream",
}


def main(name: str, steps: list[str]) -> None:
    """Play them in this order, and print a line for each."""
    sys.addaudithook(_stay_here)  # before its SDK is imported: some look things up even then
    client = import_module(f"tests.clients.{name}_client")
    for step in steps:
        key = WRONG_KEY if step == "unknown_key" else os.environ["API_KEY"]
        try:
            session = client.Session(os.environ["BASE_URL"], key, **({} if step in RETRIED else {"max_retries": 0}))
            said = getattr(session, ASKED_AS.get(step, step))(step)
        except Exception as error:  # noqa: BLE001 - whatever an SDK raises is what we want to know
            said = {"error": {"class": type(error).__name__, "message": str(error), **client.describe(error)}}
        sys.stdout.write(json.dumps({"step": step, **said}) + "\n")


def _stay_here(event: str, details: tuple[Any, ...]) -> None:
    """No SDK gets beyond this machine, whatever it would report or look up at home."""
    if event == "socket.getaddrinfo":
        host = details[0]
    elif event == "socket.connect" and isinstance(details[1], tuple):
        host = details[1][0]
    else:
        return
    if host not in HERE:
        sys.stderr.write(f"It wants to talk to {host}.\n")
        sys.stderr.flush()
        os._exit(3)  # an exception would be caught


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
