"""Short calls, and the load of many, which wrk makes."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import orjson

from benchmarks.servers import KEY

_CALL = Path(__file__).with_name("call.lua")


@dataclass(frozen=True, slots=True)
class Load:
    """The result of one run of wrk. A refused call was answered with an error, a failed one not at all."""

    calls: int
    failed: int
    refused: int
    p50_us: int
    p99_us: int


def short_calls(  # noqa: PLR0913 - what differs between loads
    port: int,
    *,
    connections: int,
    seconds: int,
    keys: Path | None = None,
    first: int = 0,
    prompt_bytes: int = 0,
    refused_key: str | None = None,
) -> Load:
    """Make calls with a short answer, one after the other on each connection; exit with an error if one fails.

    The prompt is short too, or a conversation of about `prompt_bytes` bytes.

    Each call has the next key of the file `keys`, which has one in each line, and after the last one again the first.
    `first` is the number of the first call's key. Without the file all calls have the same key. If that is
    `refused_key`, every call must be refused.
    """
    # An answer that takes longer than the timeout counts as failed. The default of 2 s is short on a busy machine.
    command = ["wrk", "--threads=1", "--timeout=20s", f"--script={_CALL}"]
    command += [f"--connections={connections}", f"--duration={seconds}s"]
    printed = subprocess.run(
        [*command, f"http://127.0.0.1:{port}/v1/chat/completions"],
        env={
            **os.environ,
            "BENCH_KEY": refused_key or KEY,
            "BENCH_PROMPT_BYTES": str(prompt_bytes),
            **({"BENCH_KEYS": str(keys), "BENCH_FIRST": str(first)} if keys else {}),
        },
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    load = Load(**orjson.loads(printed.splitlines()[-1]))
    if load.failed or load.refused != (load.calls if refused_key else 0) or not load.calls:
        text = f"{load.failed} of {load.calls} short calls failed and {load.refused} were refused"
        raise SystemExit(f"{text}, so the figures would be wrong.")
    return load


def call_once(port: int, key: str) -> None:
    """Make one short call."""
    body = {"model": "short", "max_tokens": 50, "messages": [{"role": "user", "content": "Hello."}]}
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    request = Request(f"http://127.0.0.1:{port}/v1/chat/completions", orjson.dumps(body), headers)
    with urlopen(request, timeout=20) as answer:
        answer.read()
