"""All views: what they are for somebody with a keyboard, a screen reader, a phone, or a dark room."""

import asyncio
import re
from pathlib import Path

import pytest
from playwright.async_api import Browser, Locator, Page, expect

from proxy.web import pages
from tests.admin import admin_key, ask, make_quota
from tests.pages.browser import ColorScheme, OpenWindow, axe, log_in, show_my_usage
from tests.pages.demo_data import demo
from tests.stage import Reply, Stage, until

NARROW, WIDE = 360, 1280
# Each view is looked at in both schemes and both widths. Every other one has them the other way around.
LOOKS: tuple[tuple[tuple[ColorScheme, int], ...], ...] = (
    (("light", WIDE), ("dark", NARROW)),
    (("dark", WIDE), ("light", NARROW)),
)

# Each view: the part of the address after #/, and the button or link that opens a dialog in it. `{refused}` is the id
# of a refused request.
VIEWS = (
    ("attention", None),
    ("attention", "Grant"),
    ("now", None),
    ("now", "End the call of alice"),
    ("quotas", None),
    ("quotas", "New group"),
    ("quotas", "Edit group"),
    ("quotas", "New quota"),
    ("quotas", "Edit"),
    ("quotas", "Delete pilots/trial"),
    ("quotas/by-model", None),
    ("quotas/by-model?model=llama-*", None),
    ("quotas/by-model?model=gpt-4o", None),
    ("users", None),
    ("users?text=zoe", None),
    ("users?text=nobody", None),
    ("users", "New user"),
    ("users?user=file:alice", None),
    ("users?user=file:alice", "New key"),
    ("users?user=file:alice", "Reset"),
    ("users?user=database:judith", "Rotate"),
    ("users?user=database:judith", "Revoke"),
    ("users?user=database:judith", "Disable"),
    ("users?user=database:judith", "Forget"),
    ("usage", None),
    ("usage?by=hour&days=1", None),
    ("usage?by=model", None),
    ("explain", None),
    ("explain?user=alice&model=gpt-4o", None),
    ("explain?user=alice", "Grant"),
    ("explain?request={refused}", None),
    ("log", None),
)


class Looks:
    """Looks at views, and remembers what is wrong with them."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self._seen = 0

    async def at(self, page: Page, view: str) -> None:
        """Look at a view in both color schemes and both widths: what axe finds, and what is too wide."""
        for scheme, width in LOOKS[self._seen % 2]:
            await page.set_viewport_size({"width": width, "height": 800})
            await page.emulate_media(color_scheme=scheme)
            found = await axe(page)
            if too_wide := await page.evaluate(_TOO_WIDE):
                found.append(f"wider than the window: {too_wide}")
            self.wrong += [f"{view}, {scheme}, {width} px: {each}" for each in found]
        self._seen += 1


# What makes the document, or the open dialog, scroll to the side.
_TOO_WIDE = """() => {
    const whole = document.documentElement, dialog = document.querySelector("dialog[open]");
    const scrolls = [whole, dialog].filter((each) => each && each.scrollWidth > each.clientWidth);
    const isWide = (each) => each.getBoundingClientRect().right > innerWidth + 0.5;
    return scrolls.length && [...document.querySelectorAll("*")].filter(isWide).slice(0, 5).map((each) =>
        each.outerHTML.slice(0, 100)).concat(scrolls.map((each) => each.tagName + each.scrollWidth)).join("\\n");
}"""


async def show(page: Page, address: str, opener: str | None = None) -> None:
    """Go to a view, open its dialog, and wait until all is read."""
    await page.goto("/admin/#/attention")
    await page.goto(f"/admin/#/{address}")
    await expect(page.get_by_role("main").get_by_role("heading", level=1)).to_be_visible()
    await expect(page.get_by_text(re.compile("(Loading|Searching) …"))).to_have_count(0)
    if opener:
        main = page.get_by_role("main")
        link = main.get_by_role("link", name=opener, exact=True)
        await main.get_by_role("button", name=opener, exact=True).or_(link).first.click()
    dialog = page.get_by_role("dialog")
    if opener:
        await expect(dialog).to_be_visible()
        await expect(dialog.get_by_text("Loading …")).to_have_count(0)
    else:
        await expect(dialog).to_have_count(0)


@pytest.mark.timeout(240)
async def test_axe_finds_nothing_and_nothing_is_wider_than_a_phone(tmp_path: Path, open_window: OpenWindow) -> None:
    """In each view and dialog, light and dark, wide and narrow. Nobody has to scroll to the side."""
    looks = Looks()
    async with demo(tmp_path) as on:
        page = await open_window(on.url)
        await page.goto("/usage")
        await expect(page.get_by_label("Your API key")).to_be_visible()
        await looks.at(page, "usage without a key")
        await page.get_by_label("Your API key").fill("wrong")
        await page.get_by_role("button", name="Show my usage").click()
        await expect(page.get_by_role("alert")).to_be_visible()
        await looks.at(page, "usage with a wrong key")
        await show_my_usage(page, "hannah")
        await expect(page.get_by_text("Loading …")).to_have_count(0)
        for summary in ("As a table", "Codex", "Claude Code"):
            await page.get_by_text(summary, exact=True).click()
        await looks.at(page, "usage")
        await page.context.close()

        page = await open_window(on.admin_url)
        await page.goto("/admin/")
        await expect(page.get_by_label("Admin key")).to_be_visible()
        await looks.at(page, "login")
        await page.get_by_label("Admin key").fill("wrong")
        await page.get_by_role("button", name="Log in").click()
        await expect(page.get_by_role("alert")).to_be_visible()
        await looks.at(page, "login with a wrong key")
        await log_in(page)
        await expect(page.get_by_role("table", name=re.compile("The last refusal"))).to_be_visible(timeout=10_000)
        [refusal, *_] = (await ask(on, "GET", "/attention")).json()["refused"]
        for address, opener in VIEWS:
            await show(page, address.format(refused=refusal["request_id"]), opener)
            await looks.at(page, f"{address} {opener or ''}")
        await page.context.close()
    assert not looks.wrong, "\n".join(looks.wrong)


# ----------------------------------------------------------------------------------------------------------- keyboard


async def tab_to(page: Page, wanted: Locator, *, back: bool = False) -> None:
    """Press Tab until this has the focus."""
    await expect(wanted).to_be_visible()
    for _ in range(60):
        if await wanted.evaluate("(each) => each === document.activeElement"):
            return
        await page.keyboard.press("Shift+Tab" if back else "Tab")
    raise AssertionError(f"Tab does not lead to {wanted}")


async def go_by_keyboard(page: Page, view: str) -> None:
    """Go to a view from anywhere in the page, by its link."""
    link = page.get_by_role("navigation", name="Views").get_by_role("link", name=view)
    await tab_to(page, link, back=True)
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", level=1)).to_have_text(view)
    await expect(link).to_have_attribute("aria-current", "page")


async def test_everything_is_done_with_the_keyboard_alone(on: Stage, open_window: OpenWindow) -> None:
    """Log in, go to a view, open a dialog, close it, save, log out. The focus is always where one goes on."""
    page = await open_window(on.admin_url)
    await page.goto("/admin/")
    await tab_to(page, page.get_by_label("Admin key"))
    await page.keyboard.type(admin_key("ops"))
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("searchbox")).to_be_focused()

    await go_by_keyboard(page, "Users and keys")
    await expect(page.get_by_label("Search")).to_be_focused()
    opener = page.get_by_role("button", name="New user")
    dialog = page.get_by_role("dialog", name="New user")
    for close in ("Escape", "Close", "Cancel"):
        await tab_to(page, opener)
        await page.keyboard.press("Enter")
        await expect(dialog.locator(":focus")).to_have_count(1)
        if close != "Escape":
            await tab_to(page, dialog.get_by_role("button", name=close))
        await page.keyboard.press("Enter" if close != "Escape" else "Escape")
        await expect(dialog).to_have_count(0)
        await expect(opener).to_be_focused()
    await page.keyboard.press("Enter")
    await tab_to(page, dialog.get_by_label("Name"))
    await page.keyboard.type("erin")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name="database:erin")).to_be_visible()
    await expect(page.get_by_role("main").locator(":focus")).to_have_count(1)

    await go_by_keyboard(page, "Quotas")
    opener = page.get_by_role("button", name="New quota").or_(page.get_by_role("link", name="New quota")).first
    dialog = page.get_by_role("dialog", name="New quota of everyone")
    await tab_to(page, opener)
    await page.keyboard.press("Enter")
    await expect(dialog.get_by_label("Name")).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(dialog).to_have_count(0)
    await expect(page).to_have_url(re.compile("#/quotas$"))
    await expect(opener).to_be_focused()

    await tab_to(page, page.get_by_role("button", name="Log out"), back=True)
    await page.keyboard.press("Enter")
    await expect(page.get_by_label("Admin key")).to_be_visible()
    await page.reload()
    await expect(page.get_by_label("Admin key")).to_be_visible()


async def test_updates_leave_the_focus_and_what_was_typed(on: Stage, open_window: OpenWindow) -> None:
    """While calls begin and end above and below the row, and somebody else changes quotas."""
    page = await open_window(on.admin_url)
    await log_in(page, at="/admin/#/now")
    stream = await _stream(on, "bob")
    end = page.get_by_role("button", name="End the call of bob")
    await tab_to(page, end)
    others = [await _stream(on, user) for user in ("alice", "dave", "alice")]
    await expect(page.get_by_role("button", name=re.compile("End the call"))).to_have_count(4)
    await expect(end).to_be_focused()
    for each in others:
        await on.hang_up(each)
    for call in (await ask(on, "GET", "/calls")).json()["data"]:
        if call["user"] != "bob":
            assert (await ask(on, "POST", f"/calls/{call['id']}/end")).status == 200
    await expect(page.get_by_role("button", name=re.compile("End the call"))).to_have_count(1)
    await expect(end).to_be_focused()
    await page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    await expect(dialog).to_contain_text("bob")
    await page.keyboard.press("Escape")
    await expect(end).to_be_focused()

    await page.goto("/admin/#/quotas")
    await page.get_by_role("button", name="New quota").first.click()
    name = page.get_by_role("dialog").get_by_label("Name")
    await name.fill("wee")
    await make_quota(on, "team-x/other", tokens="5k", per="day")
    await expect(page.get_by_text(re.compile("^(team-x/)?other$")).first).to_be_attached()  # behind the dialog
    await expect(name).to_be_focused()
    await page.keyboard.type("kly")
    await expect(name).to_have_value("weekly")
    await on.hang_up(stream)


async def _stream(on: Stage, user: str) -> "asyncio.Task[Reply]":
    """A call whose answer stops in the middle. It is in flight when this returns."""
    body = {"model": "gpt-4o-mini", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    before = len(on.simulator.requests)
    call = on.begin("/v1/chat/completions", {**body, "metadata": {"simulate": "stall=2"}}, user=user)
    await until(lambda: len(on.simulator.requests) > before)
    return call


# --------------------------------------------------------------------------------------------------- motion and theme


async def test_nothing_moves_if_the_viewer_wants_it_so(on: Stage, open_window: OpenWindow) -> None:
    """Bars jump then, and otherwise grow."""
    moving = "() => [...document.querySelectorAll('*')].some((each) => [getComputedStyle(each)].some((style) => "
    moving += "parseFloat(style.transitionDuration) > 0 || parseFloat(style.animationDuration) > 0))"
    for reduced_motion, moves in (("reduce", False), ("no-preference", True)):
        page = await open_window(on.url, reduced_motion=reduced_motion)
        await show_my_usage(page)
        await expect(page.get_by_text("of 200,000 tokens")).to_be_visible()
        assert await page.evaluate(moving) == moves


@pytest.mark.parametrize("name", ["admin", "usage"])
async def test_the_page_is_light_or_dark_as_the_system_is_from_the_first_paint_on(
    name: str, on: Stage, browser: Browser, open_window: OpenWindow
) -> None:
    """Without a script, which would come after the first paint. It follows when the system changes."""
    origin, path = (on.admin_url, "/admin/") if name == "admin" else (on.url, "/usage")
    page = await open_window(origin)
    await (log_in(page) if name == "admin" else show_my_usage(page))
    seen = {}
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)
        seen[scheme] = await _background(page)
        context = await browser.new_context(color_scheme=scheme, java_script_enabled=False)
        without_script = await context.new_page()
        await without_script.goto(origin + path)
        await expect(without_script.locator("noscript")).to_be_visible()
        assert await _background(without_script) == seen[scheme]
        await context.close()
    assert _brightness(seen["dark"]) < 80 < 200 < _brightness(seen["light"])


async def _background(page: Page) -> str:
    color: str = await page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    return color


def _brightness(color: str) -> float:
    values = [float(each) for each in re.findall(r"[\d.]+", color)[:3]]
    return sum(values) / 3


# --------------------------------------------------------------------------------------------------------------- size


def test_all_javascript_can_be_read_in_one_sitting() -> None:
    """Less than 2,500 lines of at most 118 characters, and 100,000 bytes, as the browser gets it."""
    files = [path.read_text(encoding="utf-8") for path in Path(pages.__file__).parent.rglob("*.js")]
    lines = [line for text in files for line in text.splitlines()]
    assert max(map(len, lines)) <= 118
    assert len(lines) < 2500
    assert sum(len(text.encode()) for text in files) < 100_000
