"""The command `python -m benchmarks.stalls`: how long hostile bodies and texts block the event loop.

The first part reads bodies of random shapes, as the proxy does: parse, check, read the prompt and write the body, in
the threads of `calls.body_threads`. `--seed N` chooses other shapes. The second part counts hostile texts.

A task sleeps for a millisecond again and again and measures how late it wakes up. Nothing else runs on the loop, so
its longest delay is the delay that streams of other users would have. The first row, in which nothing is counted,
shows the delay that the machine itself causes.
"""

import argparse
import asyncio
import base64
import itertools
import json
import os
import platform
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import orjson
import uvloop

from proxy.calls.body_threads import BodyThreads
from proxy.calls.token_count import TokenCount, prompt_of
from proxy.calls.tokenizer import Tokenizers, table_folders
from proxy.errors import InvalidRequest
from proxy.formats.allowance import check_allowance
from proxy.formats.endpoints import CHAT, RESPONSES, Endpoint
from proxy.formats.request import Request, forwarded_body, parse_request
from proxy.formats.strict_json import VALUES_MAX, reading_cost
from proxy.policy.catalog import Allow, Model, Upstream
from proxy.server import set_up_collector

AIM_MS = 50
# For bodies above 4 MB, of which the proxy reads one at a time.
LARGE_AIM_MS = 250
_ROUNDS = 3
_TICK_S = 0.001
_AT_ONCE = 8
_ENCODING = "o200k_base"

_MB = 1_000_000
_PROSE = "The ship's cook, who had seen worse, went on peeling potatoes. "
TEXTS = {
    "prose": _PROSE * (_MB // len(_PROSE)),
    "spaces": " " * _MB,
    "one letter": "a" * _MB,
    "<|endoftext|>": "<|endoftext|>" * (_MB // 13),
    "half surrogates": "\ud800" * _MB,
    "emoji": "👩‍👩‍👧‍👦" * (_MB // 25),  # 25 bytes each
    "base64": base64.b64encode(random.Random(1).randbytes(_MB * 3 // 4)).decode(),
    "U+3000": "\u3000" * _MB,
}

Work = Callable[[], Awaitable[object]]


# -------------------------------------------------------------------------------------------- bodies of random shapes

# A shape makes a field of the request of about `size` bytes with at most `values` values.
Shape = Callable[[random.Random, int, int], object]

_CHARACTERS = ("a", "é", "漢", "😀", '"', "\\", "\n", "\x01", ",", "[{", "\ud800")


def _text(rng: random.Random, size: int) -> str:
    """A long text of a few characters, which are long or have to be escaped."""
    unit = "".join(rng.choices(_CHARACTERS, k=rng.randint(1, 6)))
    return unit * (size // len(json.dumps(unit)) + 1)


def _list_of(rng: random.Random, size: int, values: int, one: object) -> list[object]:
    """As many of a value as fit. The more values, the shorter each of them: `one` is repeated and not copied."""
    own = len(json.dumps(one)) + 1
    return [one] * max(1, min(size // own, values // _values_in(one)))


def _values_in(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_values_in, inner))


def _part(rng: random.Random, size: int) -> dict[str, object]:
    text = _text(rng, rng.choice((1, 20, size // 20)))
    return rng.choice(
        (
            {},
            {"type": "text", "text": text},
            {"type": "input_text", "text": text},
            {"text": text},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
            {"type": "file", "file": {"file_data": text}},
            {"type": "tool_result", "content": [{"type": "text", "text": text}]},
            {"type": rng.choice(("x", "video_url")), "y": [text]},
        )
    )


def _messages(content: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}]}


def _parts(rng: random.Random, size: int, values: int) -> object:
    return _messages(_list_of(rng, size, values, _part(rng, size)))


def _deep(rng: random.Random, size: int, values: int) -> object:
    one: Any = rng.choice((1, "", {}))
    for _ in range(rng.randint(30, 55)):
        one = rng.choice(([one], {"a": one}, {"content": [one]}))
    return _messages(_list_of(rng, size, values, one))


def _keys(rng: random.Random, size: int, values: int) -> object:
    count = values - 10
    padding = "k" * rng.choice((0, 30, max(0, size // count - 20)))
    members = dict.fromkeys((f"{padding}{number}" for number in range(min(count, size // (len(padding) + 12)))), 1)
    return rng.choice((_messages([members]), {"metadata": members}, {"unknown": members}))


def _numbers(rng: random.Random, size: int, values: int) -> object:
    one = rng.choice((1, -0.0, 1.2345678901234567e-100, 10**30, True))
    return {rng.choice(("input", "prompt", "unknown")): _list_of(rng, size, values, one)}


def _turns(rng: random.Random, size: int, values: int) -> object:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": rng.choice(("{}", {"a": [1]}))}}
    one = rng.choice(
        (
            {"role": "user", "content": _text(rng, 20)},
            {"role": "user", "content": "a", "name": "n"},
            {"role": "assistant", "tool_calls": [call] * rng.randint(1, 9)},
            {"type": "function_call_output", "call_id": "c", "output": _text(rng, 20)},
            [1, 2, 3],
            "text",
        )
    )
    return {rng.choice(("messages", "input")): _list_of(rng, size, values, one)}


def _tools(rng: random.Random, size: int, values: int) -> object:
    one = {"type": "function", "name": "f", "parameters": _part(rng, size)}
    group = {"type": "namespace", "tools": [one] * rng.randint(1, 9)}
    return {**_messages("Hi"), "tools": _list_of(rng, size, values, rng.choice((one, group, {"type": "function"})))}


def _one_text(rng: random.Random, size: int, values: int) -> object:
    text = _text(rng, size)
    return rng.choice((_messages(text), {"input": text}, {**_messages("Hi"), "unknown": [text]}))


def _base64(rng: random.Random, size: int, values: int) -> object:
    data = base64.b64encode(rng.randbytes(1000)).decode() * (size // 1400)
    part = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
    return _messages([part, {"type": "input_audio", "input_audio": {"data": data[:1000], "format": "mp3"}}])


SHAPES: Mapping[str, Shape] = {
    "parts": _parts,
    "deep parts": _deep,
    "many keys": _keys,
    "numbers": _numbers,
    "messages and items": _turns,
    "tools": _tools,
    "one long text": _one_text,
    "base64": _base64,
}


def random_body(shape: str, seed: int, size: int) -> bytes:
    """A body of this shape of at most about `size` bytes, as compact JSON or spaced, sometimes not quite JSON."""
    rng = random.Random(f"{shape} {seed}")
    fields = SHAPES[shape](rng, size * 9 // 10, rng.choice((VALUES_MAX - 10, VALUES_MAX * 5)))
    document = {"model": "m", **(fields if isinstance(fields, dict) else {})}
    separators = rng.choice(((",", ":"), (", ", ": ")))
    body = json.dumps(document, separators=separators, ensure_ascii=rng.random() < 0.3)
    end = rng.choice(("", "", "", " " * max(0, size - len(body)), "}", "\x00"))
    return (body + end).encode("utf-8", "replace")[:size]


async def _read_as_proxy(threads: BodyThreads, tokens: Tokenizers, endpoint: Endpoint, body: bytes) -> None:
    """What the proxy does with a body before it is sent, in the same threads. A body that is refused ends it."""

    cost = reading_cost(body)

    def prepare() -> Request:
        request = parse_request(endpoint, body, cost=cost)
        check_allowance(endpoint, request.body, Allow())
        return request

    def candidates() -> list[TokenCount]:
        prompt = prompt_of(request)
        return [
            TokenCount(tokens, request, _MODEL, prompt=prompt, body_bytes=len(forwarded_body(request, _MODEL)))
            for _ in range(2)
        ]

    try:
        request = await threads.run(prepare, cost=cost)
        await threads.run(candidates, cost=cost)
        request.body.free()
    except InvalidRequest:
        pass


_MODEL = Model("m", Upstream("u", "http://upstream.example/v1", None), "gpt-4o")


async def _measure_bodies(tokens: Tokenizers, *, seed: int, rounds: int) -> None:
    threads = BodyThreads()
    set_up_collector()
    for size, aim_ms in ((256 * 1024, AIM_MS), (4 * _MB, AIM_MS), (32 * _MB, LARGE_AIM_MS)):
        for shape in SHAPES:
            stalls = []
            for number, endpoint in zip(range(seed, seed + rounds), itertools.cycle((CHAT, RESPONSES)), strict=False):
                body = random_body(shape, number, size)
                read = partial(_read_as_proxy, threads, tokens, endpoint, body)
                # Other programs on the machine only add to a stall, so the least of a few is the body's own.
                stalls.append((min([(await _longest_stall(read))[0] for _ in range(_ROUNDS)]), number))
            stall, worst = max(stalls)
            name = f"{size / _MB:.2g} MB, {shape}"
            print(
                _body_line(name, f"{stall * 1000:.1f} ms", f"seed {worst}", "yes" if stall * 1000 < aim_ms else "no")
            )
    bodies = [random_body(shape, seed, 32 * _MB) for shape in ("one long text", "parts", "base64")] * 2
    read_all: Work = lambda: asyncio.gather(*(_read_as_proxy(threads, tokens, CHAT, body) for body in bodies))  # noqa: E731
    stall = min([(await _longest_stall(read_all))[0] for _ in range(_ROUNDS)])
    print(_body_line("six of 32 MB at once", f"{stall * 1000:.1f} ms", "", "yes" if stall < 0.25 else "no"))
    threads.close()


def _body_line(*cells: str) -> str:
    widths = (34, 16, 16, 8)
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


# ------------------------------------------------------------------------------------------------------ hostile texts


def main() -> None:
    """Print the longest stall of each shape of bodies, and the longest stall and the time of each text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stalls")
    parser.add_argument("--seed", type=int, default=1, help="the first random body of each shape")
    parser.add_argument("--bodies", type=int, default=8, help="how many bodies of each shape and size")
    options = parser.parse_args()
    tokens = Tokenizers(table_folders(os.environ))
    tokens.load([_ENCODING])
    if not tokens.is_loaded(_ENCODING):
        print(f"Skipped: there is no table for {_ENCODING} (pip install '.[offline]').")
        return
    libraries = ", ".join(f"{name} {version(name)}" for name in ("tiktoken", "uvloop"))
    print(
        f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f} before; "
        f"Python {platform.python_version()}, {libraries}; {_ENCODING}"
    )
    try:
        print(_body_line("", "longest stall", "of", f"< {AIM_MS} ms, and < {LARGE_AIM_MS} ms for 32 MB"))
        uvloop.run(_measure_bodies(tokens, seed=options.seed, rounds=options.bodies))
        print(_line("", "longest stall", "time", "tokens", f"< {AIM_MS} ms"))
        uvloop.run(_measure_all(tokens))
    finally:
        tokens.close()
    print(f"Each row is the worst of {_ROUNDS} rounds.")


async def _measure_all(tokens: Tokenizers) -> None:
    threads = BodyThreads()
    await _measure("nothing", partial(asyncio.sleep, 0.5))
    for name, text in TEXTS.items():
        await _measure(f"1 MB of {name}", partial(tokens.count_all, [text], _ENCODING))
    for name, text in TEXTS.items():
        await _measure(f"{_AT_ONCE} × 1 MB of {name}", partial(_at_once, tokens, [text] * _AT_ONCE))
    await _measure(f"{len(TEXTS)} × 1 MB, one of each", partial(_at_once, tokens, list(TEXTS.values())))
    words = ["user"] * 100_000
    await _measure("100,000 texts of one word", partial(tokens.count_all, words, _ENCODING))
    for images, kilobytes in ((200, 5), (200, 100)):
        body = _body_with_images(images, base64_bytes=kilobytes * 1000)
        await _measure(
            f"reading {images} images of {kilobytes} kB", partial(_read_as_proxy, threads, tokens, CHAT, body)
        )
    for count in (100, 10_000):
        text = TEXTS["prose"][: _MB // count]
        body = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": text}] * count})
        await _measure(f"reading {count:,} messages, 1 MB", partial(_read_as_proxy, threads, tokens, CHAT, body))
    threads.close()


async def _at_once(tokens: Tokenizers, texts: list[str]) -> int:
    return sum(count or 0 for count in await asyncio.gather(*(tokens.count_all([text], _ENCODING) for text in texts)))


def _body_with_images(count: int, *, base64_bytes: int) -> bytes:
    """Return a message with JPEGs whose size comes after an embedded preview, so it takes longest to find."""
    preview = b"\xff\xe1" + (base64_bytes // 2).to_bytes(2) + bytes(base64_bytes // 2 - 2)
    data = b"\xff\xd8" + preview + b"\xff\xc0\x00\x11\x08\x04\x00\x04\x00\x03" + bytes(base64_bytes // 4)
    part = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"}}
    return orjson.dumps({"model": "m", "messages": [{"role": "user", "content": [part] * count}]})


async def _measure(name: str, work: Work) -> None:
    stalls, times, result = [], [], None
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        stall, result = await _longest_stall(work)
        stalls.append(stall)
        times.append(time.perf_counter() - began)
    stall_ms = max(stalls) * 1000
    counted = f"{result:,}" if isinstance(result, int) else "–"
    met = "yes" if stall_ms < AIM_MS else "no"
    print(_line(name, f"{stall_ms:.1f} ms", f"{max(times) * 1000:.0f} ms", counted, met), flush=True)


async def _longest_stall(work: Work) -> tuple[float, object]:
    """Return the longest delay of the ticking task while the work runs, in seconds, and the result of the work."""
    late = [0.0]
    is_over = False

    async def tick() -> None:
        while not is_over:
            began = time.perf_counter()
            await asyncio.sleep(_TICK_S)
            late.append(time.perf_counter() - began - _TICK_S)

    async with asyncio.TaskGroup() as group:
        group.create_task(tick())
        await asyncio.sleep(_TICK_S)
        result = await work()
        is_over = True
    return max(late), result


def _line(*cells: str) -> str:
    widths = (34, 16, 11, 12, 8)
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


if __name__ == "__main__":
    main()
