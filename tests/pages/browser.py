"""Debian's Chromium, and what it notices while a page is open.

    async with open_browser() as browser, open_windows(browser, findings := Findings()) as open_window:
        page = await open_window(on.admin_url, width=360, color_scheme="dark")
        await log_in(page)
        assert await axe(page) == []
        findings.check()

A page is from playwright, whose `expect(locator)` waits until what it asks for is true. So no test sleeps.
"""

import os
import shutil
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import pytest
from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Request,
    ViewportSize,
    async_playwright,
    expect,
)

from tests.admin import admin_key
from tests.stage import key_of

AXE = Path(__file__).parent.parent / "clients" / "node" / "node_modules" / "axe-core" / "axe.min.js"

ColorScheme = Literal["light", "dark"]

# Schemes whose content is a part of the page.
_OF_THE_PAGE = ("data", "blob", "about")
# An answer of an API that refuses something is no fault of the page. Chromium writes it to the console all the same.
_REFUSED = "the server responded with a status of 4"
_APIS = ("/admin/api/", "/v1/")


def chromium() -> str:
    """The path of Chromium. Without it the test is skipped, but in CI it fails."""
    found = shutil.which("chromium")
    return found or _missing("no Chromium: install the Debian package chromium")


def _missing(reason: str) -> Any:
    assert not os.environ.get("CI_BROWSER"), reason  # .ci/run sets it
    pytest.skip(reason)


class Findings:
    """What was noticed that no page may do, each as one line.

    console:   the page wrote an error to the console, or Chromium did
    error:     an exception that nobody caught
    csp:       the Content-Security-Policy forbade something
    elsewhere: a request to another origin than that of the page
    """

    def __init__(self) -> None:
        self.noticed: list[str] = []
        self._allowed: list[str] = []
        self._certain: list[str] = []

    def allow(self, text: str, *, is_certain: bool = True) -> None:
        """Allow findings that contain this text. There must be one, see `check`, unless it is not certain.

        While a server is stopped, a page may try to reach it: `allow("net::ERR_", is_certain=False)`.
        """
        self._allowed.append(text)
        if is_certain:
            self._certain.append(text)

    def check(self) -> None:
        """Fail if something was noticed that is not allowed, or if something is certain that was not noticed."""
        unexpected = [each for each in self.noticed if not any(text in each for text in self._allowed)]
        missing = [text for text in self._certain if not any(text in each for each in self.noticed)]
        assert not unexpected, "\n".join(["The page did what it must not:", *unexpected])
        assert not missing, "\n".join(["This was allowed and did not happen:", *missing])

    def watch(self, context: BrowserContext, origin: str) -> None:
        """Notice what the pages of this context do, from now on."""
        context.on("console", self._console)
        context.on("weberror", lambda error: self._add("error", str(error.error)))
        context.on("request", lambda request: self._request(request, origin))

    def _console(self, message: ConsoleMessage) -> None:
        if message.type != "error":
            return
        url = message.location.get("url", "")
        if _REFUSED in message.text and urlsplit(url).path.startswith(_APIS):
            return
        self._add("csp" if "Content Security Policy" in message.text else "console", f"{message.text} ({url})")

    def _request(self, request: Request, origin: str) -> None:
        url = urlsplit(request.url)
        if url.scheme not in _OF_THE_PAGE and f"{url.scheme}://{url.netloc}" != origin:
            self._add("elsewhere", request.url)

    def _add(self, kind: str, text: str) -> None:
        self.noticed.append(f"{kind}: {text}")


class OpenWindow(Protocol):
    """Open a window of a browser that was never used before: no cookies, nothing stored.

    Paths that the page goes to are below `origin`, as `http://127.0.0.1:8081`. Further tabs with the same cookies are
    `page.context.new_page()`.
    """

    def __call__(
        self,
        origin: str,
        *,
        width: int = 1280,
        color_scheme: ColorScheme = "light",
        reduced_motion: Literal["reduce", "no-preference"] = "no-preference",
        locale: str = "en-US",
        timezone: str = "UTC",
    ) -> Awaitable[Page]: ...


@asynccontextmanager
async def open_browser() -> AsyncIterator[Browser]:
    """Start Chromium without a window on the screen, and close it at the end."""
    executable = chromium()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def open_windows(browser: Browser, findings: Findings) -> AsyncIterator[OpenWindow]:
    """What opens windows whose findings are noted. They are closed at the end."""
    contexts: list[BrowserContext] = []

    async def open_window(
        origin: str, *, width: int = 1280, timezone: str = "UTC", locale: str = "en-US", **more: Any
    ) -> Page:
        viewport: ViewportSize = {"width": width, "height": 800}
        context = await browser.new_context(
            base_url=origin, viewport=viewport, timezone_id=timezone, locale=locale, **more
        )
        contexts.append(context)
        findings.watch(context, origin)
        return await context.new_page()

    try:
        yield open_window
    finally:
        for context in contexts:
            await context.close()


async def log_in(page: Page, admin: str = "ops", *, at: str = "/admin/", key: str | None = None) -> None:
    """Go to this view of the admin page and log in with the key of an admin in ADMINS, or another one."""
    await page.goto(at)
    field = page.get_by_label("Admin key", exact=True)
    await field.fill(key or admin_key(admin))
    await page.get_by_role("button", name="Log in").click()
    await expect(field).to_be_hidden()


async def show_my_usage(page: Page, user: str = "alice", *, key: str | None = None) -> None:
    """Go to the page for users and enter the key of a user in STAFF, or another one."""
    await page.goto("/usage")
    field = page.get_by_label("Your API key")
    await field.fill(key or key_of(user))
    await page.get_by_role("button", name="Show my usage").click()
    await expect(field).to_be_hidden()


@cache
def _axe_source() -> str:
    if not AXE.exists():
        _missing("no axe: `make test` installs it if there is npm")
    return AXE.read_text(encoding="utf-8")


async def axe(page: Page) -> list[str]:
    """The violations of rules of accessibility that axe finds in the page as it is now, each with its elements.

    What is evaluated from outside is not subject to the page's Content-Security-Policy.
    """
    await page.evaluate(_axe_source())
    result = await page.evaluate("() => axe.run({resultTypes: ['violations']})")
    return [
        f"{rule['id']} ({rule['impact']}): {rule['help']}\n" + "\n".join(map(_element, rule["nodes"]))
        for rule in result["violations"]
    ]


def _element(node: dict[str, Any]) -> str:
    summary = node["failureSummary"].replace("\n", "\n    ")
    return f"  {' '.join(map(str, node['target']))}\n    {node['html'][:200]}\n    {summary}"
