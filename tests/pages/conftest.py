"""A browser, and a proxy that it looks at.

All tests of this folder that run in the same process share one browser. A browser belongs to the event loop in which
it was started, so these tests and their fixtures run in one loop. A fixture that awaits needs
`@pytest_asyncio.fixture(loop_scope="session")`.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect
from pytest_asyncio import is_async_test

from proxy.server import wall_clock_ms
from tests.pages.browser import Findings, OpenWindow, open_browser, open_windows
from tests.pages.load import load
from tests.pages.policy import POLICY
from tests.stage import Stage, stage

FOLDER = Path(__file__).parent
EXPECT_MS = 10_000  # how long a test waits for what must come at once: other tests run at the same time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and let them run in one event loop."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker("browser")
            if is_async_test(item):
                item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """Chromium, started with the first test that needs it."""
    expect.set_options(timeout=EXPECT_MS)
    async with open_browser() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="session")
async def findings() -> AsyncIterator[Findings]:
    """What all windows of the test have noticed. The test fails at its end if that is not allowed."""
    findings = Findings()
    yield findings
    findings.check()


@pytest_asyncio.fixture(loop_scope="session")
async def open_window(browser: Browser, findings: Findings) -> AsyncIterator[OpenWindow]:
    """What opens a window; `page = await open_window(on.admin_url)`."""
    async with open_windows(browser, findings) as open_window:
        yield open_window


@pytest_asyncio.fixture(loop_scope="session")
async def on(tmp_path: Path) -> AsyncIterator[Stage]:
    """A running proxy with POLICY, on the real clock, which is the browser's too."""
    async with stage(POLICY, folder=tmp_path, clock=wall_clock_ms) as on:
        yield on


@pytest_asyncio.fixture(loop_scope="session")
async def busy(on: Stage) -> AsyncIterator[Stage]:
    """The same, and calls are made all the time."""
    async with load(on):
        yield on
