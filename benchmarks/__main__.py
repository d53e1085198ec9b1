"""The command `python -m benchmarks`: measure all figures, print them, and save them in `build/bench.json`."""

import os
import platform
import resource
import shutil
import sqlite3
import subprocess
import time
from importlib.metadata import version
from math import inf

import orjson

from benchmarks import figures
from benchmarks.figures import Figure
from benchmarks.servers import HERE, leave_first_core, nginx_command

# 1,000 streams need two connections each in the proxy, one to the client and one to the upstream.
_FILES_MIN = 4096


def main() -> None:
    """Print the figures, or what is missing to measure them."""
    missing = [name for name, found in (("nginx", nginx_command()), ("wrk", shutil.which("wrk"))) if not found]
    if missing:
        print(f"Skipped: needs {' and '.join(missing)} (Debian: apt-get install nginx-light wrk).")
        return
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < _FILES_MIN:
        print(f"Skipped: needs {_FILES_MIN} open files, and this shell allows {files} (ulimit -Hn).")
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # inherited by the servers
    leave_first_core()
    print(_machine())
    print(_line("", "proxy", "rounds", "relay", "nginx", "× relay", "× nginx", "aim", "met"))
    began, found = time.monotonic(), []
    for measure in figures.ALL:
        for figure in measure():
            found.append(figure)
            print(_row(figure), flush=True)
    print(f"Medians of {figures.ROUNDS} rounds (memory: one), in {time.monotonic() - began:.0f} s.")
    saved = HERE / "build" / "bench.json"
    saved.parent.mkdir(exist_ok=True)
    saved.write_bytes(orjson.dumps({"machine": _machine(), "figures": found}, option=orjson.OPT_INDENT_2))


def _machine() -> str:
    printed = subprocess.run([nginx_command() or "", "-v"], capture_output=True, text=True, check=True).stderr
    libraries = ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "uvloop", "sqlalchemy"))
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f} before; "
        f"Python {platform.python_version()}, {libraries}, SQLite {sqlite3.sqlite_version}; "
        f"nginx {printed.strip().rpartition('/')[2]}"
    )


def _row(figure: Figure) -> str:
    unit, aim, ours = figure.unit, figure.aim, figure.values["proxy"]
    return _line(
        figure.name,
        _amount(figure.median("proxy"), unit),
        f"{_number(min(ours))}–{_number(max(ours))}" if len(ours) > 1 else "",
        *(_amount(figure.median(server), unit) for server in (figure.beside, "nginx")),
        *(_times(figure.ratio(server)) for server in (figure.beside, "nginx")),
        "" if aim is None else f"≤ {aim.under:g} {f'× {figure.beside}' if aim.is_ratio else unit}",
        {True: "yes", False: "no", None: ""}[figure.is_met],
    )


def _amount(value: float | None, unit: str) -> str:
    return "" if value is None else f"{_number(value)} {unit}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else "–" if ratio == inf else f"{ratio:.2f} ×"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _line(*cells: str) -> str:
    widths = (38, 11, 13, 11, 10, 9, 9, 13, 5)
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


if __name__ == "__main__":
    main()
