"""The command `python -m benchmarks`: measure all figures and print them."""

import os
import platform
import resource
import shutil
import sqlite3
import subprocess
import time
from importlib.metadata import version
from math import inf
from statistics import median

from benchmarks import figures
from benchmarks.figures import Figure
from benchmarks.servers import nginx_command

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
    print(_machine())
    print(_line("", "proxy", "rounds", "nginx", "ratio", "aim", "met"))
    began = time.monotonic()
    for measure in figures.ALL:
        for figure in measure():
            print(_row(figure), flush=True)
    print(f"Medians of {figures.ROUNDS} rounds (memory: one), in {time.monotonic() - began:.0f} s.")


def _machine() -> str:
    printed = subprocess.run([nginx_command() or "", "-v"], capture_output=True, text=True, check=True).stderr
    libraries = ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "uvloop", "sqlalchemy"))
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f} before; "
        f"Python {platform.python_version()}, {libraries}, SQLite {sqlite3.sqlite_version}; "
        f"nginx {printed.strip().rpartition('/')[2]}"
    )


def _row(figure: Figure) -> str:
    unit, aim = figure.unit, figure.aim
    aim_text = "" if aim is None else f"< {aim.under:g} {'×' if aim.is_ratio else unit}"
    met = {True: "yes", False: "no", None: ""}[figure.is_met]
    rounds = f"{_number(min(figure.proxy))}–{_number(max(figure.proxy))}" if len(figure.proxy) > 1 else ""
    proxy, nginx = (f"{_number(median(values))} {unit}" for values in (figure.proxy, figure.nginx))
    ratio = "–" if figure.ratio == inf else f"{figure.ratio:.1f} ×"
    return _line(figure.name, proxy, rounds, nginx, ratio, aim_text, met)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _line(*cells: str) -> str:
    widths = (38, 12, 14, 12, 10, 11, 5)
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


if __name__ == "__main__":
    main()
