"""The command `python -m benchmarks.compare A B`: two commits in turns, beside the relay.

A and B are what git knows as commits. The folder of this benchmark is `.` (also what is not committed). Both run with
the packages of this environment. In each round the relay, A and B are measured once, so other load on the machine
affects all of them.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks import figures, servers
from benchmarks.servers import HERE, Server, leave_first_core


def main(commits: list[str]) -> None:
    """Measure both and print a row for each kind of call."""
    if len(commits) != 2:
        raise SystemExit(__doc__)
    leave_first_core()
    with ExitStack() as stack:
        sources = [stack.enter_context(_source(commit)) for commit in commits]
        print("".join(f"{cell:<24}" for cell in ("CPU, µs", "relay", *commits)))
        for name, kind in figures.KINDS.items():
            with kind.upstream() as upstream, servers.relay(upstream) as relay, ExitStack() as running:
                both = [running.enter_context(figures.proxy_of(upstream, source=source)) for source in sources]
                _measure(name, kind, relay, both)


def _measure(name: str, kind: figures.Kind, relay: Server, both: list[Server]) -> None:
    found = figures.in_turn(kind.cost, {"relay": relay, "A": both[0], "B": both[1]})
    base = median(found["relay"])
    cells = [f"{base:.0f}"]
    cells += [f"{median(found[each]):.0f} ({median(found[each]) / base:.2f} ×)" for each in "AB"]
    print("".join(f"{cell:<24}" for cell in (name, *cells, f"B / A {_ratio(found):.3f}")), flush=True)


def _ratio(found: dict[str, list[float]]) -> float:
    """The median of the ratios of the rounds: load that lasts longer than a round affects both."""
    return median(b / a for a, b in zip(found["A"], found["B"], strict=True))


@contextmanager
def _source(commit: str) -> Iterator[Path]:
    """A folder with the source of this commit."""
    if commit == ".":
        yield HERE
        return
    with TemporaryDirectory(prefix="llm-quota-proxy-bench-") as name:
        archive = subprocess.run(["git", "archive", commit, "proxy"], cwd=HERE, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", name], input=archive.stdout, check=True)
        yield Path(name)


if __name__ == "__main__":
    main(sys.argv[1:])
