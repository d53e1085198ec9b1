"""The command `python -m benchmarks.reading`: how long reading a request blocks the event loop, in microseconds.

Each row is one body: parse it, check it against the table of refusals and against a policy that allows nothing, and
find what the model reads of it. All of that happens on the event loop, before admission. The times are processor
times of one thread, the least of many rounds. `compact` is the JSON that the SDKs of OpenAI and Anthropic write;
`spaced` is what Python's `json.dumps` writes by default.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from proxy.formats.allowance import check_allowance
from proxy.formats.content import read_prompt
from proxy.formats.endpoints import CHAT
from proxy.formats.request import parse_request
from proxy.policy.catalog import Allow

# 400 short messages must take less than this.
AIM_US = 200
_ROUNDS = 300
_NOTHING_ALLOWED = Allow()


def _messages(count: int, text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant" if at % 2 else "user", "content": text} for at in range(count)]


def _with_tools() -> dict[str, Any]:
    """40 rounds of an agent, each a message in parts, a call of a tool and its output; and 20 tools."""
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"path":"README.md"}'}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Please look into that file. " * 8}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It has five lines. " * 12},
    ]
    parameters = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    tool = {"type": "function", "function": {"name": "look", "description": "Reads. " * 30, "parameters": parameters}}
    return {"messages": turns * 40, "tools": [tool] * 20}


BODIES: Mapping[str, dict[str, Any]] = {
    "a short call": {"messages": _messages(1, "Say hello."), "max_tokens": 100},
    "400 short messages": {
        "messages": _messages(
            400, "One short message of a long conversation, like most of them. " + "Go on. " * 5 + "Yes."
        )
    },
    "75 messages of 100 kB": {"messages": _messages(75, "The ship's cook went on peeling potatoes. " * 32)},
    "40 rounds of an agent": _with_tools(),
}


def main() -> None:
    """Print the times of each body."""
    print(
        f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f} before; "
        f"Python {platform.python_version()}; one line is the least of {_ROUNDS} rounds"
    )
    print(_line("", "bytes", "compact", "spaced", "orjson alone"))
    for name, fields in BODIES.items():
        document = {"model": "gpt-4o", "stream": True, **fields}
        compact, spaced = orjson.dumps(document), json.dumps(document).encode()
        times = (_least_us(_read, compact), _least_us(_read, spaced), _least_us(orjson.loads, compact))
        print(_line(name, f"{len(compact):,}", *(f"{least:.0f} µs" for least in times)))
    print(f"400 short messages should take less than {AIM_US} µs (compact).")


def _read(body: bytes) -> None:
    """What the proxy does with a body on the event loop, before admission."""
    request = parse_request(CHAT, body)
    check_allowance(request.endpoint, request.body, _NOTHING_ALLOWED)
    read_prompt(request.body, is_chat=True)


def _least_us(work: Callable[[bytes], object], body: bytes) -> float:
    least = float("inf")
    for _ in range(_ROUNDS):
        began = time.thread_time_ns()
        work(body)
        least = min(least, time.thread_time_ns() - began)
    return least / 1000


def _line(*cells: str) -> str:
    widths = (26, 10, 12, 12, 14)
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


if __name__ == "__main__":
    main()
