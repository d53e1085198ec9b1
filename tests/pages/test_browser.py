"""What the tests of the pages rely on: the browser notices each thing that a page must not do."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import ClientConnectionError, web
from playwright.async_api import Browser, expect

from tests.admin import ask
from tests.pages.browser import AXE, Findings, OpenWindow, axe, open_windows
from tests.pages.policy import FAILING_MODEL, IN_FRONT, ROGUE, ROGUE_LABEL, ROGUE_MODEL
from tests.stage import Stage

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
GOOD = '<h1>Page</h1><img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=" alt="A dot"><output></output>'
SAY = "document.querySelector('output').textContent = 'done';"
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "metadata": {"simulate": "tokens=5"}}


class Site:
    """A server with one page, whose content and script a test sets. It has the CSP of our pages."""

    def __init__(self) -> None:
        self.origin = ""
        self.content = GOOD
        self.script = SAY

    async def page(self, request: web.Request) -> web.Response:
        """The page."""
        html = f"""<!doctype html><html lang="en"><head><title>Page</title><link rel="icon" href="data:,">
            <script type="module" src="/script.js"></script></head><body><main>{self.content}</main></body></html>"""
        return web.Response(text=html, content_type="text/html", headers={"Content-Security-Policy": CSP})

    async def serve_script(self, request: web.Request) -> web.Response:
        """Its script."""
        return web.Response(text=self.script, content_type="text/javascript")


@pytest_asyncio.fixture(loop_scope="session")
async def site() -> AsyncIterator[Site]:
    """The server, running."""
    site, application = Site(), web.Application()
    application.router.add_get("/", site.page)
    application.router.add_get("/script.js", site.serve_script)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    site.origin = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield site
    await runner.cleanup()


async def noticed(browser: Browser, site: Site) -> list[str]:
    """What is noticed on the page, until its script is at its end."""
    findings = Findings()
    async with open_windows(browser, findings) as open_window:
        page = await open_window(site.origin)
        await page.goto("/")
        await expect(page.locator("output")).to_have_text("done")
    return findings.noticed


async def test_a_page_that_does_nothing_wrong_has_no_findings(site: Site, open_window: OpenWindow) -> None:
    """No violation and no request elsewhere; an image in the page is no request."""
    page = await open_window(site.origin)
    await page.goto("/")
    await expect(page.locator("output")).to_have_text("done")
    assert await axe(page) == []


async def test_axe_finds_what_is_not_accessible_and_names_the_element(site: Site, open_window: OpenWindow) -> None:
    """Although the page's CSP allows no script but its own."""
    site.content += '<input id="nameless">'
    page = await open_window(site.origin)
    await page.goto("/")
    [found] = await axe(page)
    assert found.startswith("label (critical): Form elements must have labels\n  #nameless\n")


@pytest.mark.parametrize(
    ("content", "script", "wanted"),
    [
        ("", "console.error('oh');", "console: oh "),
        ("", "fetch('/missing').catch(() => 0).finally(() => {%s});", "console: Failed to load resource: .* 404 "),
        ("", "setTimeout(() => { %s throw new Error('late'); });", "error: .*late"),
        ("<script>1</script>", "", "csp: Executing inline script violates "),
        (
            '<p onclick="1" id="p"></p>',
            "document.querySelector('#p').click();",
            "csp: Executing inline event handler ",
        ),
        ('<p style="color: red"></p>', "", "csp: Applying inline style violates "),
        (
            '<img alt="" src="http://elsewhere.test/">',
            "",
            "csp: Loading the image 'http://elsewhere.test/' violates ",
        ),
        (
            "",
            "fetch('http://elsewhere.test/').catch(() => 0);",
            "csp: Connecting to 'http://elsewhere.test/' violates ",
        ),
        ('<iframe src="/" title="Frame"></iframe>', "", "csp: Framing "),
    ],
    ids="console missing error script handler style image fetch frame".split(),
)
async def test_what_a_page_must_not_do_is_noticed(
    site: Site, browser: Browser, content: str, script: str, wanted: str
) -> None:
    """Errors in the console, exceptions, and each kind of violation of the Content-Security-Policy."""
    site.content += content
    site.script = script % SAY if "%s" in script else script + SAY
    found = await noticed(browser, site)
    assert any(re.match(wanted, each) for each in found), found


async def test_a_request_to_another_origin_is_noticed(site: Site, browser: Browser) -> None:
    """A link that leads away is enough, whatever becomes of the request. The port is a part of the origin."""
    elsewhere = "http://127.0.0.1:1/page"
    site.content += f'<a href="{elsewhere}">away</a>'
    findings = Findings()
    async with open_windows(browser, findings) as open_window:
        page = await open_window(site.origin)
        await page.goto("/")
        async with page.expect_event("requestfailed"):
            await page.get_by_text("away").click(no_wait_after=True)
    assert f"elsewhere: {elsewhere}" in findings.noticed


def test_a_finding_fails_unless_it_is_allowed_and_must_happen_if_it_is() -> None:
    """So what a test allows is never more than what happens."""
    findings = Findings()
    findings.check()
    findings.noticed.append("console: the connection is lost")
    with pytest.raises(AssertionError, match="the connection is lost"):
        findings.check()
    findings.allow("connection is lost")
    findings.allow("connection is slow", is_certain=False)
    findings.check()
    findings.allow("connection is back")
    with pytest.raises(AssertionError, match="did not happen"):
        findings.check()


async def test_a_window_is_as_asked_for(site: Site, open_window: OpenWindow) -> None:
    """Width, color scheme, reduced motion, locale and time zone."""
    page = await open_window(
        site.origin,
        width=360,
        color_scheme="dark",
        reduced_motion="reduce",
        locale="de-DE",
        timezone="Asia/Kolkata",
    )
    await page.goto("/")
    asked = """() => [
        innerWidth, matchMedia('(prefers-color-scheme: dark)').matches,
        matchMedia('(prefers-reduced-motion: reduce)').matches, (1234.5).toLocaleString(),
        new Date(0).getHours(),
    ]"""
    assert await page.evaluate(asked) == [360, True, True, "1.234,5", 5]


async def test_the_stage_serves_both_listeners_and_comes_back_on_its_ports(on: Stage) -> None:
    """Calls of an SDK count, names that are markup are names, and the server can be stopped and started."""
    await on.sdk("bob").chat.completions.create(model="fast", **CHAT)
    reply = await on.post("/v1/chat/completions", {"model": ROGUE_MODEL, **CHAT}, user=None, headers=IN_FRONT)
    assert reply.status == 200
    failing = {"model": FAILING_MODEL, "messages": CHAT["messages"]}
    assert (await on.post("/v1/chat/completions", failing)).status == 502
    used = (await on.used("staff/daily", "bob"))[0]
    url, admin_url = on.url, on.admin_url
    async with on.stopped():
        with pytest.raises(ClientConnectionError):
            await on.get("/v1/quota")
    assert (on.url, on.admin_url) == (url, admin_url)
    assert (await on.used("staff/daily", "bob"))[0] == used > 0
    counters = (await ask(on, "GET", "/counters?quota=staff/daily")).json()["data"]
    assert {each["user"] for each in counters} >= {"bob", f"sso:{ROGUE}"}


async def test_a_key_may_have_a_label_that_is_markup(on: Stage) -> None:
    """So that the pages can be tested with one."""
    assert (await ask(on, "POST", "/users", json={"id": "erin", "groups": ["staff"]})).status == 201
    made = await ask(on, "POST", "/users/database:erin/keys", json={"label": ROGUE_LABEL})
    assert made.status == 201, made.body
    reply = await on.http.get(f"{on.url}/v1/quota", headers={"authorization": f"Bearer {made.json()['key']}"})
    assert reply.status == 200


@pytest.mark.skipif(not AXE.exists(), reason="axe is not installed")
def test_axe_is_the_one_of_the_lock_file() -> None:
    """Its first line says the version."""
    lock = (Path(__file__).parent.parent / "clients" / "node" / "package.json").read_text(encoding="utf-8")
    [version] = re.findall(r'"axe-core": "(.*)"', lock)
    assert f"axe v{version}" in AXE.read_text(encoding="utf-8")[:100]
