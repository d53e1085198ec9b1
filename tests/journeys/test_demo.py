"""The first five minutes: what the demo prints works as printed, up to the 429."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.journey

GUIDE_ENDS = "Stop with Ctrl-C"


@asynccontextmanager
async def _demo() -> AsyncIterator[str]:
    """A running demo on free ports; gives what it printed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "demo", "--port", "0", "--admin-port", "0"),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout
    try:
        printed = ""
        while GUIDE_ENDS not in printed:
            line = (await process.stdout.readline()).decode()
            assert line, "the demo ended before it served"
            printed += line
        yield printed
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    return said.decode()


async def test_what_the_demo_prints_works_as_printed(tmp_path: Path) -> None:
    """The curl line answers; the SDK snippet runs until the quota is up, and says which and until when."""
    async with _demo() as printed:
        curl = re.search(r"(curl .*?\}'\n)", printed, re.DOTALL)
        assert curl
        assert '"object":"chat.completion"' in await _run("sh", "-c", curl[1])
        lines = printed[printed.index("    from openai") : printed.index("  Alice's group")]
        snippet = tmp_path / "snippet.py"
        snippet.write_text("\n".join(line[4:] for line in lines.splitlines()))
        said = await _run(sys.executable, str(snippet))
        assert re.search(r"^0 \d+ \w+", said, re.MULTILINE)
        assert re.search(r'Error code: 429 - Quota "staff/hourly" .* Resets at .* \(in 5\dm \d+s\)', said)
        asked = re.search(r"(curl \S+/quota .*)\n", printed)
        assert asked
        assert '"id":"staff/hourly"' in await _run("sh", "-c", asked[1])
