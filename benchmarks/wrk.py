"""Load of short calls, which wrk makes."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import orjson

from benchmarks.servers import KEY

_CALL = Path(__file__).with_name("call.lua")


@dataclass(frozen=True, slots=True)
class Load:
    """The result of one run of wrk."""

    calls: int
    failed: int
    p50_us: int
    p99_us: int


def short_calls(port: int, *, connections: int, seconds: int) -> Load:
    """Make short calls, one after the other on each connection; exit with an error if one fails."""
    command = ["wrk", "--threads=1", f"--connections={connections}", f"--duration={seconds}s", f"--script={_CALL}"]
    printed = subprocess.run(
        [*command, f"http://127.0.0.1:{port}/v1/chat/completions"],
        env={**os.environ, "BENCH_KEY": KEY},
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    load = Load(**orjson.loads(printed.splitlines()[-1]))
    if load.failed or not load.calls:
        raise SystemExit(f"{load.failed} of {load.calls} short calls failed, so the figures would be wrong.")
    return load
