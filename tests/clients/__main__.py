"""Runs one Python client: `python -m tests.clients openai chat stream …`; `sessions` documents the output.

This process contains no other code of ours. A client's module has a class `Session`, created with the proxy's
address, a key and perhaps `max_retries`. It has one method for each step, which takes the name of the model and
returns the result. The module also has `describe`, which returns the public attributes of an exception.
"""

import json
import os
import sys
from importlib import import_module
from typing import Any

UNKNOWN_KEY = "no-key-of-anyone-0123456789"
LOOPBACK = ("127.0.0.1", "::1", "localhost", None)
# Steps for which the SDK keeps its default number of retries. It must not retry, because our answer tells it so.
WITH_RETRIES = ("used_up",)
# The method for each step that must fail.
METHODS = {
    "unknown_key": "chat",
    "unknown_model": "chat",
    "used_up": "chat",
    "failing": "chat",
    "broken_stream": "stream",
    "cut_stream": "stream",
}


def main(name: str, steps: list[str]) -> None:
    """Run the steps in this order, and print one line for each."""
    sys.addaudithook(_refuse_other_hosts)  # before the SDK is imported: some send requests during the import
    client = import_module(f"tests.clients.{name}_client")
    for step in steps:
        key = UNKNOWN_KEY if step == "unknown_key" else os.environ["API_KEY"]
        retries = {} if step in WITH_RETRIES else {"max_retries": 0}
        try:
            session = client.Session(os.environ["BASE_URL"], key, **retries)
            result = getattr(session, METHODS.get(step, step))(step)
        except Exception as error:  # noqa: BLE001 - the test checks every exception that an SDK raises
            result = {"error": {"class": type(error).__name__, "message": str(error), **client.describe(error)}}
        sys.stdout.write(json.dumps({"step": step, **result}) + "\n")


def _refuse_other_hosts(event: str, details: tuple[Any, ...]) -> None:
    """End the process if an SDK connects to another machine, for example for telemetry or a list of prices."""
    if event == "socket.getaddrinfo":
        host = details[0]
    elif event == "socket.connect" and isinstance(details[1], tuple):
        host = details[1][0]
    else:
        return
    if host not in LOOPBACK:
        sys.stderr.write(f"The SDK tried to connect to {host}.\n")
        sys.stderr.flush()
        os._exit(3)  # the SDK would catch an exception


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
