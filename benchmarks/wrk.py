"""Load of short calls, made by wrk."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import orjson

from benchmarks.servers import KEY

_CALL = Path(__file__).with_name("call.lua")


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of wrk saw."""

    calls: int
    failed: int
    p50_us: int
    p99_us: int


def short_calls(port: int, *, connections: int, seconds: int) -> Load:
    """Send short calls, one after another on each connection; every one of them has to succeed."""
    command = ["wrk", "--threads=1", f"--connections={connections}", f"--duration={seconds}s", f"--script={_CALL}"]
    said = subprocess.run(
        [*command, f"http://127.0.0.1:{port}/v1/chat/completions"],
        env={**os.environ, "BENCH_KEY": KEY},
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    load = Load(**orjson.loads(said.splitlines()[-1]))
    if load.failed or not load.calls:
        raise SystemExit(f"{load.failed} of {load.calls} short calls failed: the figures would mean nothing.")
    return load
