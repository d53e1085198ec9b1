"""The page of users: the own quotas and use, live, and how to point programs at the proxy."""

import asyncio
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

from playwright.async_api import BrowserContext, Locator, Page, Request, Route, expect
from structlog.testing import capture_logs

from proxy.config.loader import Config
from proxy.server import wall_clock_ms
from tests.pages.browser import Findings, OpenWindow, show_my_usage
from tests.pages.policy import IN_FRONT, POLICY, ROGUE
from tests.reverse_proxy import below
from tests.stage import Stage, key_of, stage

HELLO = [{"role": "user", "content": "Hello"}]
LIVE_MS = 1000  # what is called live is in the page within a second
LOST = "The connection to the proxy is lost"
KEY = "Your API key"
KEPT = "Object.values(sessionStorage).join('')"
CALL = """import openai
messages = [{"role": "user", "content": "Hello"}]
print(openai.OpenAI().chat.completions.create(model="gpt-4o", messages=messages).choices[0].message.content)"""
UNLIMITED = POLICY.replace("  lab:\n", "  staff-of-it: {unlimited: true}\n  lab:\n", 1).replace(
    "dave: {groups: [lab]", "dave: {groups: [staff-of-it]", 1
)


class Sent:
    """The requests of a window: their URLs, and the keys in their headers."""

    def __init__(self, context: BrowserContext) -> None:
        self.urls: list[str] = []
        self.keys: dict[str, set[str]] = {}
        context.on("request", self._note)

    def _note(self, request: Request) -> None:
        url, headers = request.url, request.headers
        self.urls.append(url)
        path = url.partition("?")[0]
        self.keys.setdefault(path, set()).add(headers.get("authorization", ""))


def quota(page: Page, name: str) -> Locator:
    """The card of a quota."""
    return page.get_by_role("listitem").filter(has=page.get_by_role("heading", name=name, exact=True))


async def filled(card: Locator) -> float:
    """The part of the bar that is filled. It is a picture, so screen readers have the numbers instead."""
    bar = card.locator("[aria-hidden=true]").first
    whole, used = await bar.bounding_box(), await bar.locator("> *").first.bounding_box()
    assert whole and used
    return used["width"] / whole["width"]


async def call(on: Stage, user: str, model: str = "gpt-4o-mini", *, simulate: str = "tokens=500") -> None:
    """A call of the SDK."""
    await on.sdk(user).chat.completions.create(model=model, messages=HELLO, metadata={"simulate": simulate})


async def kept(page: Page) -> str:
    """All that the browser keeps for the page, but for what is in sessionStorage."""
    cookies = await page.context.cookies()
    return str(cookies) + await page.evaluate("JSON.stringify(localStorage) + document.cookie")


# --------------------------------------------------------------------------------------------------------- with a key


async def test_a_user_sees_quotas_and_use_with_the_own_key(on: Stage, open_window: OpenWindow) -> None:
    """A wrong key is refused with a reason; with the right one there are quotas, use and snippets.

    The key is only in sessionStorage and in a header, never in a URL, a cookie, the page or the log.
    """
    key = key_of("alice")
    with capture_logs() as logs:
        await call(on, "alice", "gpt-4o")
        page = await open_window(on.url)
        sent = Sent(page.context)
        await page.goto("/usage")
        field = page.get_by_label(KEY)
        await field.fill(f"{key}x")
        await page.get_by_role("button", name="Show my usage").click()
        await expect(page.get_by_role("alert")).to_contain_text("API key")
        await expect(field).to_be_focused()
        await expect(field).to_have_value("")
        assert await page.evaluate(KEPT) == ""
        await show_my_usage(page)
        main = page.get_by_role("main")
        await expect(main).to_contain_text("alice")
        daily, frontier = quota(page, "staff/daily"), quota(page, "staff/frontier")
        await expect(daily).to_contain_text("of 200,000 tokens")
        await expect(daily).to_contain_text(re.compile(r"[\d,]+ tokens remaining"))
        await expect(daily).to_contain_text(re.compile(r"Resets:? in (\d+[hms] ?)+"))
        await expect(daily).to_contain_text(re.compile(r"Europe/Berlin: .*12:00\sAM"))
        await expect(frontier).to_contain_text("1 of 50 requests")
        await expect(frontier).to_contain_text("Models: gpt-4o")
        by_model = page.get_by_role("table", name="Use by model")
        await expect(by_model.get_by_role("row", name="gpt-4o 1")).to_be_visible()
        await expect(page.get_by_role("img", name="Tokens by day")).to_be_visible()
        await page.get_by_text("As a table").click()
        await expect(page.get_by_role("table", name="Use by day").get_by_role("row")).to_have_count(2)

        assert await page.evaluate(KEPT) == key
        assert key not in await kept(page) + await page.content()
        await page.reload()
        await expect(daily).to_be_visible()
        other = await page.context.new_page()
        await other.goto("/usage")
        await expect(other.get_by_label(KEY)).to_be_focused()

        await page.get_by_role("button", name="Forget this key").click()
        await expect(page.get_by_label(KEY)).to_be_focused()
        await expect(main).not_to_contain_text("alice")
        assert await page.evaluate(KEPT) == ""
    assert not [url for url in sent.urls if "key-of-alice" in url]
    api = f"{on.url}/v1/quota"
    assert all(f"Bearer {key}" in keys for path, keys in sent.keys.items() if path.startswith(api))
    assert {path for path in sent.keys if path.startswith(api)} == {api, f"{api}/usage", f"{api}/events"}
    assert all(keys == {""} for path, keys in sent.keys.items() if not path.startswith(api))
    assert key not in str(logs)


async def test_a_call_of_an_sdk_moves_the_bar_within_a_second(on: Stage, open_window: OpenWindow) -> None:
    """Without a reload, also while an answer still streams. What is focused and open stays so."""
    page = await open_window(on.url)
    await show_my_usage(page, "bob")
    daily, pot = quota(page, "staff/daily"), quota(page, "team-x/pot")
    await expect(daily).to_contain_text("0 of 200,000 tokens")
    await expect(quota(page, "staff/frontier")).to_contain_text("begins with the next call")
    await expect(pot).to_contain_text("shared by the group")
    assert await filled(daily) == 0
    summary = page.get_by_text("Claude Code", exact=True)
    await summary.click()
    await page.evaluate("window.isSame = true")

    await call(on, "bob", simulate="tokens=900")
    used = (await on.used("staff/daily", "bob"))[0]
    await expect(daily).to_contain_text(f"{used:,} of 200,000 tokens", timeout=LIVE_MS)
    await expect(daily).to_contain_text(f"{200_000 - used:,} tokens remaining")
    await expect(pot).to_contain_text("0 of 1,000,000 tokens")  # staff had enough left, so it admitted the call
    await expect(daily).to_contain_text(re.compile("Resets:? in"))
    while abs(await filled(daily) - used / 200_000) >= 0.002:
        pass  # its width changes in a moment, not at once

    stream = await on.sdk("bob").chat.completions.create(
        model="gpt-4o-mini", messages=HELLO, stream=True, metadata={"simulate": "tokens=100 speed=50"}
    )
    await anext(stream)
    await expect(daily).to_contain_text("held by calls in flight", timeout=LIVE_MS)
    async for _ in stream:
        pass
    await expect(daily).not_to_contain_text("held by calls in flight")

    # A set of programs that is open and focused is not touched, and the tables follow.
    await expect(page.get_by_role("table", name="Use by model").get_by_role("row")).to_have_count(2, timeout=15_000)
    await expect(summary.locator("..")).to_have_attribute("open", "")
    await expect(page.get_by_role("button", name="Copy for Claude Code")).to_be_visible()
    await expect(summary).to_be_focused()
    assert await page.evaluate("window.isSame")


async def test_the_snippets_have_the_right_url_and_work(on: Stage, open_window: OpenWindow) -> None:
    """The one for SDKs is copied and run. None has the key: programs read it from the environment."""
    page = await open_window(on.url)
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await show_my_usage(page)
    copied = {}
    for program in ("Python, Node and others", "Codex", "Claude Code"):
        await page.get_by_text(program, exact=True).click()
        button = page.get_by_role("button", name=f"Copy for {program}")
        await button.click()
        await expect(page.get_by_role("status")).to_have_text("Copied.")
        copied[program] = text = await page.evaluate("navigator.clipboard.readText()")
        assert "LLM_KEY" in text
        assert "key-of-" not in text
        assert f"{on.url}/v1" in text or program == "Claude Code"
    assert f"ANTHROPIC_BASE_URL={on.url} " in copied["Claude Code"]
    environment = {**os.environ, "LLM_KEY": key_of("alice")}
    script = f"{copied['Python, Node and others']}\nexec {sys.executable} -c '{CALL}'"
    program = await asyncio.create_subprocess_exec(
        "sh", "-c", script, env=environment, stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await program.communicate()
    assert (program.returncode, bool(printed.strip())) == (0, True)
    await expect(quota(page, "staff/frontier")).to_contain_text("1 of 50 requests")


async def test_a_user_sees_nothing_about_others(on: Stage, open_window: OpenWindow) -> None:
    """Neither names of others nor their groups, quotas and models, in the page and in what it gets."""
    for user in ("alice", "bob", "dave"):
        await call(on, user)
    page = await open_window(on.url)
    answers: list[str] = []
    await page.route("**/v1/quota*", lambda route: _note_answer(route, answers))
    await page.route("**/v1/quota/usage*", lambda route: _note_answer(route, answers))
    await show_my_usage(page, "carol")
    await expect(quota(page, "guests/hourly")).to_contain_text("0 of 20 requests")
    await expect(page.get_by_role("main")).to_contain_text("You have made no calls in the last 30 days")
    await call(on, "alice")
    await call(on, "carol")
    await expect(quota(page, "guests/hourly")).to_contain_text("1 of 20 requests", timeout=LIVE_MS)
    await expect(page.get_by_role("table", name="Use by model").get_by_role("row")).to_have_count(2, timeout=15_000)
    assert len(answers) >= 3
    shown = await page.get_by_role("main").inner_text()
    for name in ("alice", "bob", "dave", "staff", "team-x", "lab/"):
        assert name not in shown
        assert name not in "".join(answers)


async def _note_answer(route: Route, answers: list[str]) -> None:
    response = await route.fetch()
    answers.append(await response.text())
    await route.fulfill(response=response)


# ------------------------------------------------------------------------------------------------------ without a key


async def test_a_user_whom_a_server_in_front_names_needs_no_key(
    on: Stage, findings: Findings, open_window: OpenWindow
) -> None:
    """Also below a path, which the snippets then have. Numbers are grouped as in the viewer's language.

    T83: the name of the user is markup, and is shown as text.
    """
    async with below(on.url, "/llm/", IN_FRONT) as origin:
        page = await open_window(origin, locale="de-DE", timezone="Europe/Berlin")
        sent = Sent(page.context)
        await page.goto("/llm/usage")
        main = page.get_by_role("main")
        await expect(main).to_contain_text(f"sso:{ROGUE}")
        await expect(page.get_by_label(KEY)).to_have_count(0)
        await expect(page.get_by_role("button", name="Forget this key")).to_have_count(0)
        daily = quota(page, "staff/daily")
        await expect(daily).to_contain_text("0 of 200.000 tokens")
        chat = {"model": "gpt-4o", "messages": HELLO, "metadata": {"simulate": "tokens=900"}}
        assert (await on.post("/v1/chat/completions", chat, user=None, headers=IN_FRONT)).status == 200
        await expect(quota(page, "staff/frontier")).to_contain_text("1 of 50 requests", timeout=LIVE_MS)
        await expect(daily).not_to_contain_text("Europe/Berlin")  # it is the viewer's own zone
        await page.get_by_text("Claude Code", exact=True).click()
        await expect(main).to_contain_text(f"ANTHROPIC_BASE_URL={origin}/llm ")
        await page.get_by_text("Codex", exact=True).click()
        await expect(main).to_contain_text(f'base_url = "{origin}/llm/v1"')
        assert await page.evaluate(KEPT) == ""
        assert {key for keys in sent.keys.values() for key in keys} == {""}
        await page.close()


async def test_an_unlimited_user_is_told_so(tmp_path: Path, open_window: OpenWindow) -> None:
    """The use is shown all the same, and what binds everyone."""
    async with stage(UNLIMITED, folder=tmp_path, clock=wall_clock_ms) as on:
        await call(on, "dave")
        page = await open_window(on.url)
        await show_my_usage(page, "dave")
        await expect(page.get_by_role("main")).to_contain_text("unlimited")
        await expect(quota(page, "everyone/calls")).to_contain_text("1 of 5,000 requests")
        await expect(page.get_by_role("table", name="Use by model").get_by_role("row")).to_have_count(2)
        await page.close()


async def test_without_self_service_there_is_no_page(
    tmp_path: Path, findings: Findings, open_window: OpenWindow
) -> None:
    """Who has it open while it is turned off is told that, and has it again when it is turned on."""
    async with stage(POLICY, folder=tmp_path, clock=wall_clock_ms) as on:
        page = await open_window(on.url)
        await show_my_usage(page)
        main = page.get_by_role("main")
        await expect(quota(page, "staff/daily")).to_be_visible()
        served = on.config
        on.config = _without_self_service(on)
        assert await on.server.policies.reload()
        await expect(page.get_by_role("alert")).to_be_visible(timeout=15_000)
        on.config = served
        assert await on.server.policies.reload()
        await main.get_by_role("button", name="Try again").click()
        await expect(page.get_by_role("alert")).to_have_count(0)

        on.config = _without_self_service(on)
        assert await on.server.policies.reload()
        other = await page.context.new_page()
        findings.allow("404 (Not Found)")
        answer = await other.goto("/usage")
        assert answer is not None and answer.status == 404
        await page.context.close()


def _without_self_service(on: Stage) -> Config:
    return replace(on.config, policy=replace(on.config.policy, self_service=False))


# ----------------------------------------------------------------------------------------------------- the connection


async def test_the_page_says_that_the_connection_is_lost_and_catches_up(
    on: Stage, findings: Findings, open_window: OpenWindow
) -> None:
    """What was known stays. What happened meanwhile is shown without a reload when the server is back."""
    page = await open_window(on.url)
    await show_my_usage(page)
    daily = quota(page, "staff/daily")
    await call(on, "alice")
    used = (await on.used())[0]
    await expect(daily).to_contain_text(f"{used:,} of 200,000")
    findings.allow("net::ERR_", is_certain=False)
    async with on.stopped():
        await expect(page.get_by_role("main")).to_contain_text(LOST)
        await expect(page.get_by_role("alert")).to_contain_text("Trying again")
        await expect(daily).to_contain_text(f"{used:,} of 200,000")
    await call(on, "alice")
    used = (await on.used())[0]
    await expect(daily).to_contain_text(f"{used:,} of 200,000", timeout=15_000)
    await expect(page.get_by_role("main")).not_to_contain_text(LOST)
    await call(on, "alice")
    used = (await on.used())[0]
    await expect(daily).to_contain_text(f"{used:,} of 200,000", timeout=LIVE_MS)
