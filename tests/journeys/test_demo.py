"""The demo, as a new user sees it: the commands that it prints work as printed, up to the 429."""

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

LAST_LINE = "Stop with Ctrl-C"
# The demo with a fast upstream: at its 40 tokens per second the snippet would take 12 s to use up the 500 tokens.
DEMO = "from proxy import cli, demo; demo._TOKENS_PER_S = 4000.0; cli.main()"


@asynccontextmanager
async def _demo() -> AsyncIterator[str]:
    """Run the demo on free ports; yield the text that it printed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", DEMO, "demo", "--port", "0", "--admin-port", "0"),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout
    try:
        printed = ""
        while LAST_LINE not in printed:
            line = (await process.stdout.readline()).decode()
            assert line, "the demo ended before it had printed everything"
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
    output, _ = await process.communicate()
    return output.decode()


async def test_the_commands_that_the_demo_prints_work(tmp_path: Path) -> None:
    """The curl line gets an answer. The SDK snippet runs until the 429, which names the quota and its reset."""
    async with _demo() as printed:
        curl = re.search(r"(curl .*?\}'\n)", printed, re.DOTALL)
        assert curl
        assert '"object":"chat.completion"' in await _run("sh", "-c", curl[1])
        lines = printed[printed.index("    from openai") : printed.index("  Alice's group")]
        snippet = tmp_path / "snippet.py"
        snippet.write_text("\n".join(line[4:] for line in lines.splitlines()))
        output = await _run(sys.executable, str(snippet))
        assert re.search(r"^0 \d+ \w+", output, re.MULTILINE)
        assert re.search(r'Error code: 429 - Quota "staff/hourly" .* Resets at .* \(in (1h|5\dm( \d+s)?)\)', output)
        curl = re.search(r"(curl \S+/quota .*)\n", printed)
        assert curl
        assert '"id":"staff/hourly"' in await _run("sh", "-c", curl[1])
