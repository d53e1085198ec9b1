"""Texts that are markup or scripts, and other pages that would use an administrator's login or frame ours."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from aiohttp import web
from playwright.async_api import Browser, BrowserContext, Page, expect

from proxy.server import wall_clock_ms
from tests.admin import admin_key, ask, make_quota
from tests.pages.browser import OpenWindow, log_in, show_my_usage
from tests.pages.policy import FAILING_MODEL, IN_FRONT, POLICY, ROGUE, ROGUE_LABEL, ROGUE_MODEL
from tests.reverse_proxy import below
from tests.stage import Stage, stage

URL = "javascript:alert('url')"
SVG = "\"'><svg/onload=alert(2)>"
REVERSED = "\u202eeman"  # what follows would be shown from right to left
# A refusal names the rogue user and the rogue model, and the help is no address.
RULES = POLICY.replace("requests: 50,", "requests: 1,").replace('"https://llm.example/usage"', f'"{URL}"')
RULES = RULES.replace("models: [gpt-4o],", f"models: [gpt-4o, '{ROGUE_MODEL}'],")
NAME = f"sso:{ROGUE}"


class Noticed:
    """What no hostile text may bring about: a dialog of a script, a link that is one, a key in a URL."""

    def __init__(self, context: BrowserContext) -> None:
        self.dialogs: list[str] = []
        self.urls: list[str] = []
        context.on("dialog", lambda dialog: self.dialogs.append(dialog.message))
        context.on("request", lambda request: self.urls.append(unquote(request.url)))

    async def check(self, page: Page) -> None:
        """Nothing has run, and no element was made of a text."""
        assert self.dialogs == []
        links = await page.evaluate("[...document.querySelectorAll('[href]')].map((each) => each.protocol)")
        assert set(links) <= {"http:", None}
        made = "main :is(script, img, b, iframe, object, [onload], [onerror], [onclick]), dialog :is(script, img, b)"
        await expect(page.locator(made)).to_have_count(0)
        assert not [
            url for url in [*self.urls, page.url] if "admin-key-of" in url or "key-of-" in url or "lqp_" in url
        ]


async def use_hostile_texts(on: Stage) -> str:
    """Everything that somebody else than the administrator chooses is hostile. Returns the id of a refusal."""
    agent = {"user-agent": ROGUE_LABEL}
    for user in (SVG, URL):
        assert (await ask(on, "POST", "/users", json={"id": user, "groups": ["staff"]})).status == 201, user
    made = {"label": ROGUE_LABEL, "tag": ROGUE}
    key = (await ask(on, "POST", f"/users/{quote(f'database:{SVG}', safe='')}/keys", json=made)).json()["key"]
    chat = {"model": ROGUE_MODEL, "messages": [{"role": "user", "content": ROGUE}]}
    for status in (200, 429):
        reply = await on.post("/v1/chat/completions", chat, user=None, headers=IN_FRONT | agent)
        assert reply.status == status, reply.body
    refused = str(reply.headers["x-request-id"])
    headers = agent | {"authorization": f"Bearer {key}"}
    assert (await on.post("/v1/chat/completions", chat, user=None, headers=headers)).status == 200
    failing = {"model": FAILING_MODEL, "messages": chat["messages"]}
    assert (await on.post("/v1/chat/completions", failing)).status == 502
    grant = {"quota": "staff/daily", "user": NAME, "measure": "tokens", "amount": 100}
    for reason in (ROGUE_LABEL, URL):
        body = {**grant, "until": wall_clock_ms() + 3_600_000, "reason": reason}
        assert (await ask(on, "POST", "/grants", admin="max", json=body)).status == 201
    await make_quota(on, "staff/rogue", models=[ROGUE_MODEL], requests=5, per="day")
    return refused


async def test_hostile_texts_are_texts_in_every_view(tmp_path: Path, open_window: OpenWindow) -> None:
    """T83: names of users and models, labels, tags, reasons, errors and help are shown as they are written.

    No script runs, nothing violates the Content-Security-Policy, and no request leaves the origin or has a key in its
    address. These are checked in each view, also by the fixtures.
    """
    async with stage(RULES, folder=tmp_path, clock=wall_clock_ms) as on:
        refused = await use_hostile_texts(on)
        page = await open_window(on.admin_url)
        noticed = Noticed(page.context)
        await page.goto("/admin/")
        await page.get_by_label("Admin key").fill(ROGUE_LABEL)
        await page.get_by_role("button", name="Log in").click()
        await expect(page.get_by_role("alert")).to_be_visible()
        await log_in(page)
        user = quote(f"database:{SVG}", safe="")
        views: dict[str, tuple[str, ...]] = {
            "attention": (NAME, ROGUE_MODEL),
            "now": (NAME,),
            "quotas": (ROGUE_MODEL,),
            f"quotas/by-model?model={quote(ROGUE_MODEL)}": (ROGUE_MODEL,),
            "users": (SVG, URL),
            f"users?text={quote(SVG)}": (SVG,),
            f"users?text={quote(ROGUE)}&group={quote(SVG)}": (),
            f"users?user={user}": (SVG, ROGUE_LABEL, ROGUE),
            f"users?user={quote(NAME, safe='')}": (NAME,),
            f"users?user={quote(f'database:{URL}', safe='')}": (URL,),
            "usage?by=user": (NAME, f"database:{SVG}"),
            "usage?by=model": (ROGUE_MODEL,),
            "usage?by=tag": (ROGUE,),
            f"explain?user={quote(NAME)}&model={quote(ROGUE_MODEL)}": (NAME, ROGUE_MODEL),
            f"explain?user={quote(NAME)}&model={quote(ROGUE)}": (NAME, ROGUE),
            f"explain?request={refused}": (NAME, ROGUE_MODEL),
            f"explain?request={quote(SVG)}": (),
            "log": (ROGUE_LABEL, SVG, URL),
            f"log?actor={quote(ROGUE)}&target={quote(SVG)}": (),
            f"{quote(ROGUE)}/{quote(SVG)}?{quote(SVG)}={quote(ROGUE)}": (),
        }
        for view, texts in views.items():
            await page.goto(f"/admin/#/{view}")
            await expect(page.get_by_role("heading", level=1)).to_be_visible()
            await expect(page.get_by_text(re.compile("(Loading|Searching) …"))).to_have_count(0)
            for text in texts:
                shown = page.get_by_role("main").get_by_text(text)
                await expect(shown.first).to_be_visible(timeout=12_000)  # a call is in the usage after a few seconds
            await noticed.check(page)

        # Dialogs about the rogue user, with a rogue reason.
        await page.goto("/admin/#/attention")
        row = page.get_by_role("row").filter(has_text=NAME).first
        await row.get_by_role("button", name="Grant").click()
        dialog = page.get_by_role("dialog")
        await expect(dialog.get_by_text(NAME)).to_be_visible()
        await dialog.get_by_label("Reason").fill(SVG)
        await noticed.check(page)
        await dialog.get_by_role("button", name="Grant").click()
        await expect(dialog).to_have_count(0)
        await page.goto(f"/admin/#/users?user={user}")
        await page.get_by_role("button", name="New key").click()
        await dialog.get_by_label("Label").fill(REVERSED)
        await dialog.get_by_role("button", name="Create").click()
        await expect(dialog.get_by_role("alert")).to_contain_text("can't be printed")
        await dialog.get_by_label("Label").fill(ROGUE)
        await dialog.get_by_role("button", name="Create").click()
        await expect(dialog.get_by_text("It is not shown again")).to_be_visible()
        await noticed.check(page)
        await page.context.close()


async def test_an_address_that_is_none_leads_to_a_view(on: Stage, open_window: OpenWindow) -> None:
    """Whatever a link has behind #, there is a page with its navigation, and no error."""
    page = await open_window(on.admin_url)
    await log_in(page)
    for address in (
        "%",
        "users/%E0%A4%A",
        "constructor",
        "toString/x",
        "__proto__",
        "quotas/%",
        "?=",
        "quotas?edit=/",
    ):
        await page.goto(f"/admin/#/{address}")
        await page.reload()
        await expect(page.get_by_role("heading", level=1)).to_be_visible()
        await page.keyboard.press("Escape")
        await page.get_by_role("navigation", name="Views").get_by_role("link", name="Log").click()
        await expect(page.get_by_role("heading", level=1)).to_have_text("Log")


async def test_texts_of_a_header_are_texts_on_the_page_of_users(tmp_path: Path, open_window: OpenWindow) -> None:
    """T83: the name of the user, names of models, and what is wrong with a key."""
    async with stage(RULES, folder=tmp_path, clock=wall_clock_ms) as on:
        await use_hostile_texts(on)
        async with below(on.url, "/", IN_FRONT) as origin:
            page = await open_window(origin)
            noticed = Noticed(page.context)
            await page.goto("/usage")
            await expect(page.get_by_text(NAME)).to_be_visible()
            models = page.get_by_role("table", name="Use by model")
            await expect(models.get_by_text(ROGUE_MODEL)).to_be_visible(timeout=12_000)
            for program in ("Python, Node and others", "Codex", "Claude Code"):
                await page.get_by_text(program, exact=True).click()
            await noticed.check(page)
            await page.context.close()
        page = await open_window(on.url)
        noticed = Noticed(page.context)
        await page.goto("/usage")
        await page.get_by_label("Your API key").fill("<img/src=x/onerror=alert(1)>")
        await page.get_by_role("button", name="Show my usage").click()
        await expect(page.get_by_role("alert")).to_be_visible()
        await noticed.check(page)
        await show_my_usage(page)
        await noticed.check(page)
        await page.context.close()


# -------------------------------------------------------------------------------------------------------- other pages

# A form can send JSON as text/plain, without asking the server first. What is after the name gets a "=" in between.
FORM = """<form method="post" enctype="text/plain" action="{admin}/admin/api/groups">
    <input name='{{"name": "evil", "x' value='": 1}}'><button>Win</button></form>"""
FETCH = """<output></output><script>
    const own = (method, options) => ({{ method, credentials: "include", ...options }});
    const send = (method, path, options) => fetch("{admin}/admin/api" + path, own(method, options)).then(
        (reply) => reply.type + reply.status, (error) => error.name);
    const json = {{headers: {{"content-type": "application/json"}}, body: '{{"name": "evil"}}'}};
    Promise.all([
        send("POST", "/groups", {{mode: "no-cors", body: '{{"name": "evil"}}'}}),
        send("POST", "/groups", json),
        send("DELETE", "/session", {{}}),
        send("GET", "/users", {{}}),
    ]).then((all) => document.querySelector("output").textContent = all.join(" "));
</script>"""
FRAMES = """<h1>Win</h1>
    <iframe src="{admin}/admin/"></iframe><iframe src="{api}/usage"></iframe>
    <iframe src="{admin}/admin/api/session"></iframe>
    <object data="{admin}/admin/"></object><embed src="{api}/usage">"""


@asynccontextmanager
async def another_site(on: Stage, host: str) -> AsyncIterator[str]:
    """A server of somebody else: of the same host on another port (the same site), or of another host."""

    async def page(request: web.Request) -> web.Response:
        body = {"form": FORM, "fetch": FETCH, "frames": FRAMES}[request.match_info["name"]]
        html = f"<!doctype html><title>Win</title>{body.format(admin=on.admin_url, api=on.url)}"
        return web.Response(text=html, content_type="text/html")

    application = web.Application()
    application.router.add_get("/{name}", page)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://{host}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"], ids=["another-port", "another-site"])
async def test_another_page_can_do_nothing_with_the_login(host: str, on: Stage, browser: Browser) -> None:
    """T82, T85: its form is refused, its scripts read and change nothing, and its frames of our pages are empty."""
    context = await browser.new_context(base_url=on.admin_url)
    async with another_site(on, host) as evil:
        page = await context.new_page()
        await log_in(page)
        logged = (await ask(on, "GET", "/audit")).json()["data"]

        other = await context.new_page()
        await other.goto(f"{evil}/form")
        async with other.expect_response(f"{on.admin_url}/**") as waiting:
            await other.get_by_role("button", name="Win").click()
        answer = await waiting.value
        # Of another port the browser sends the cookie; of another site it does not.
        has_cookie = "lqp_admin" in (await answer.request.all_headers()).get("cookie", "")
        assert has_cookie == (host == "127.0.0.1")
        assert answer.status == (403 if has_cookie else 401)

        await other.goto(f"{evil}/fetch")
        await expect(other.get_by_role("status")).to_have_text("opaque0 TypeError TypeError TypeError")

        await other.goto(f"{evil}/frames")
        await expect(other.get_by_role("heading", name="Win")).to_be_visible()
        frames = [each for each in other.frames if each is not other.main_frame]
        assert len(frames) >= 3
        for frame in frames:
            assert frame.url.startswith("chrome-error:"), frame.url

        # Nothing has changed, and the administrator is still logged in.
        assert (await ask(on, "GET", "/audit")).json()["data"] == logged
        assert "evil" not in str((await ask(on, "GET", "/groups")).json())
        await page.reload()
        await expect(page.get_by_role("heading", level=1)).to_have_text("Attention")
        assert admin_key("ops") not in str(await context.storage_state())
    await context.close()
