"""What the documentation prints: tests run its commands as they stand on the page, and check its files.

backup, restore = blocks("backup.md", "Back up")          # the blocks of a section, in their order
run(backup, folder=tmp_path)                              # its commands, by a shell that stops at the first failure
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
# Commands that run longer than this hang. To start Python takes half a minute if the machine has much other work.
_SECONDS_MAX = 200


def blocks(page: str, heading: str) -> list[str]:
    """The indented blocks of the section with this heading, without their indentation.

    Raises LookupError if the page has no such section, so that a test fails when a section gets another name.
    """
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    found = [number for number, line in enumerate(lines) if re.fullmatch(rf"#+ {re.escape(heading)}", line)]
    if len(found) != 1:
        raise LookupError(f"docs/{page} has {len(found)} sections called {heading!r}")
    section: list[str] = []
    for line in lines[found[0] + 1 :]:
        if line.startswith("#"):
            break
        section.append(line)
    parts = re.split(r"\n(?!    |\n)", "\n" + "\n".join(section) + "\n")
    texts = [re.sub(r"(?m)^    ", "", part[part.find("\n    ") :]).strip("\n") for part in parts if "\n    " in part]
    return [f"{text}\n" for text in texts]


def run(block: str, *, folder: Path, environ: Mapping[str, str] | None = None) -> str:
    """Run the commands of a block in a folder, and return what they print on standard output.

    `llm-quota-proxy` and `python` are those of the tests. The shell has no variables but PATH, HOME (the folder) and
    those of `environ`. Raises AssertionError with the output if a command fails.
    """
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env={"PATH": path, "HOME": str(folder), **(environ or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_SECONDS_MAX,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout
