"""The command `python -m benchmarks.stalls`: how long counting hostile text blocks the event loop.

A task sleeps for a millisecond again and again and measures how late it wakes up. Nothing else runs on the loop, so
its longest delay is the delay that streams of other users would have. The first row, in which nothing is counted,
shows the delay that the machine itself causes.
"""

import asyncio
import base64
import os
import platform
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version

import orjson
import uvloop

from proxy.calls.tokenizer import Tokenizers, table_folders
from proxy.formats.body import RequestBody
from proxy.formats.content import read_prompt
from proxy.formats.strict_json import parse_object

AIM_MS = 50
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


def main() -> None:
    """Print the longest stall and the time of each text."""
    tokens = Tokenizers(table_folders(os.environ))
    tokens.load([_ENCODING])
    if not tokens.is_loaded(_ENCODING):
        print(f"Skipped: there is no table for {_ENCODING} (pip install 'llm-quota-proxy[offline]').")
        return
    libraries = ", ".join(f"{name} {version(name)}" for name in ("tiktoken", "uvloop"))
    print(
        f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f} before; "
        f"Python {platform.python_version()}, {libraries}; {_ENCODING}"
    )
    print(_line("", "longest stall", "time", "tokens", f"< {AIM_MS} ms"))
    try:
        uvloop.run(_measure_all(tokens))
    finally:
        tokens.close()
    print(f"Each row is the worst of {_ROUNDS} rounds.")


async def _measure_all(tokens: Tokenizers) -> None:
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
        await _measure(f"reading {images} images of {kilobytes} kB", partial(_read, body))
    for count in (100, 10_000):
        text = TEXTS["prose"][: _MB // count]
        body = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": text}] * count})
        await _measure(f"reading {count:,} messages, 1 MB", partial(_read, body))


async def _at_once(tokens: Tokenizers, texts: list[str]) -> int:
    return sum(count or 0 for count in await asyncio.gather(*(tokens.count_all([text], _ENCODING) for text in texts)))


async def _read(body: bytes) -> None:
    """Parse a body and read its prompt, which the proxy does on the event loop before admission."""
    document = parse_object(body, frozenset(("model", "messages")))
    read_prompt(RequestBody(document), is_chat=True)


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
