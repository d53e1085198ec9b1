"""What the pages do if servers in between, slow networks and ended logins are in the way."""

import pytest
from playwright.async_api import Page, Route, expect

from tests.admin import ask
from tests.pages.browser import Findings, OpenWindow, log_in, show_my_usage
from tests.stage import Stage, until

_HIDE = """(isHidden) => {
    Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("text/html", "<h1>Log in to the network</h1>"),
        ("application/json", '{"group": {"na'),
        ("application/json", "null"),
    ],
    ids=["a-page", "cut-off", "null"],
)
async def test_an_answer_of_another_server_is_an_error_and_the_dialog_goes_on(
    on: Stage, open_window: OpenWindow, content_type: str, body: str
) -> None:
    """Nothing is said to be done, what was typed stays, and a second try works."""
    page = await open_window(on.admin_url)
    await log_in(page, at="/admin/#/quotas")

    async def answer_a_change(route: Route) -> None:
        if route.request.method == "POST":
            await route.fulfill(status=200, content_type=content_type, body=body)
        else:
            await route.continue_()

    await page.route("**/admin/api/groups", answer_a_change)
    await page.get_by_role("button", name="New group").click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_label("Name").fill("made-late")
    await dialog.get_by_role("button", name="Save").click()
    await expect(dialog.get_by_role("alert")).to_contain_text("can't be reached")
    await page.unroute("**/admin/api/groups")
    await dialog.get_by_role("button", name="Save").click()
    await expect(dialog).to_be_hidden()
    await expect(page.get_by_role("heading", name="made-late")).to_be_visible()


async def test_a_login_that_has_ended_is_asked_for_by_whatever_notices_it(on: Stage, open_window: OpenWindow) -> None:
    """Logged out in one tab, the other one asks for the key at its next request, not when its stream is checked."""
    page = await open_window(on.admin_url)
    await log_in(page)
    other = await page.context.new_page()
    await other.goto("/admin/#/log")
    await expect(other.get_by_role("heading", level=1)).to_have_text("Log")
    await page.get_by_role("button", name="Log out").click()
    await expect(page.get_by_label("Admin key")).to_be_visible()
    await other.evaluate("location.hash = '#/users'")
    await expect(other.get_by_label("Admin key")).to_be_visible()
    await expect(other.get_by_role("alert")).to_be_visible()


async def test_a_wrong_key_is_said_to_be_wrong(on: Stage, open_window: OpenWindow) -> None:
    """The form stays, empty."""
    page = await open_window(on.admin_url)
    await page.goto("/admin/")
    await page.get_by_label("Admin key").fill("wrong")
    await page.get_by_label("Admin key").press("Enter")
    await expect(page.get_by_role("alert")).to_be_visible()
    await expect(page.get_by_label("Admin key")).to_have_value("")


async def test_a_slow_network_shows_what_is_read_again_and_again(on: Stage, open_window: OpenWindow) -> None:
    """Explain reads every two seconds. An answer that takes longer is shown, although a newer one is on its way."""
    page = await open_window(on.admin_url)
    await log_in(page)
    asked: list[Route] = []

    async def answer_the_one_before(route: Route) -> None:
        asked.append(route)
        if len(asked) > 1:
            await asked[-2].continue_()

    await page.route("**/admin/api/explain?*", answer_the_one_before)
    await page.goto("/admin/#/explain?user=alice&model=fast")
    await expect(page.get_by_text("is admitted now")).to_be_visible(timeout=12_000)
    await page.unroute_all(behavior="ignoreErrors")


async def until_used(on: Stage) -> None:
    """A call is in the usage a moment after its end."""
    while not (await ask(on, "GET", "/usage?by=day")).json()["data"]:
        pass


async def _hide(page: Page, *, is_hidden: bool) -> None:
    await page.evaluate(_HIDE, is_hidden)


async def test_a_hidden_page_has_no_connection(on: Stage, open_window: OpenWindow) -> None:
    """A browser has six connections to a host for all its tabs, so the seventh tab would show nothing."""
    streams = on.server.live.events
    page = await open_window(on.admin_url)
    await log_in(page, at="/admin/#/quotas")
    mine = await open_window(on.url)
    await show_my_usage(mine)
    await until(lambda: streams.streams == 2)
    for each in (page, mine):
        await _hide(each, is_hidden=True)
    await until(lambda: streams.streams == 0)
    made = await ask(on, "POST", "/groups", json={"name": "made-meanwhile"})
    assert made.status == 201
    for each in (page, mine):
        await _hide(each, is_hidden=False)
    await expect(page.get_by_role("heading", name="made-meanwhile")).to_be_visible()
    await until(lambda: streams.streams == 2)
    await expect(page.get_by_text("connection")).to_be_hidden()


async def test_a_number_of_too_many_digits_is_refused(on: Stage, open_window: OpenWindow) -> None:
    """It is sent as it is typed. As a number it would be infinite, which JSON has not, and would mean no limit."""
    page = await open_window(on.admin_url)
    await log_in(page, at="/admin/#/quotas")
    await page.get_by_label("team-x").get_by_role("button", name="New quota").click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_label("Name").fill("huge")
    await dialog.get_by_label("Requests").fill("5")
    await dialog.get_by_label("Tokens", exact=True).fill("9" * 400)
    await dialog.get_by_role("button", name="Save").click()
    await expect(dialog.get_by_role("alert").first).to_contain_text("999")
    await expect(dialog).to_be_visible()


@pytest.mark.parametrize("at", ["usage?days=abc", "usage?days=0", "usage?by=hour&days=1e9"])
async def test_a_period_that_is_none_shows_the_view(on: Stage, open_window: OpenWindow, at: str) -> None:
    """An address can have anything. The chart has the bars of another period."""
    await on.sdk("alice").chat.completions.create(model="fast", messages=[{"role": "user", "content": "Hi"}])
    await on.all_settled()
    page = await open_window(on.admin_url)
    await log_in(page)
    await until_used(on)
    await page.goto(f"/admin/#/{at}")
    await expect(page.get_by_text("tokens in 1 call")).to_be_visible()
    await expect(page.get_by_role("img", name="Tokens by")).to_be_visible()


async def test_a_file_of_a_page_names_no_version_of_a_library(on: Stage) -> None:
    """As all other answers do not."""
    for url in (f"{on.admin_url}/admin/", f"{on.admin_url}/metrics", f"{on.url}/usage"):
        async with on.http.get(url) as response:
            assert response.headers.getall("server") == ["llm-quota-proxy"]


async def test_a_save_that_ends_late_closes_no_other_dialog(on: Stage, open_window: OpenWindow) -> None:
    """Escape does not take it back. Meanwhile something else may be typed, which must stay."""
    page = await open_window(on.admin_url)
    await log_in(page, at="/admin/#/quotas")
    saves: list[Route] = []

    async def hold(route: Route) -> None:
        if "dry_run" in route.request.url:
            await route.continue_()
        else:
            saves.append(route)

    await page.route("**/admin/api/groups/team-x/quotas/*", hold)
    new = page.get_by_label("team-x").get_by_role("button", name="New quota")
    dialog = page.get_by_role("dialog")
    await new.click()
    await dialog.get_by_label("Name").fill("late")
    await dialog.get_by_label("Requests").fill("7")
    async with page.expect_response("**/quotas/late") as saved:
        await dialog.get_by_role("button", name="Save").click()
        await page.keyboard.press("Escape")
        await new.click()
        await dialog.get_by_label("Name").fill("other")
        await saves.pop().continue_()
    assert (await saved.value).ok
    await expect(page.get_by_role("cell", name="team-x/late", exact=True)).to_be_attached()
    await expect(dialog.get_by_label("Name")).to_have_value("other")


async def test_a_user_may_have_more_windows_than_streams(
    on: Stage, open_window: OpenWindow, findings: Findings
) -> None:
    """One whose stream is refused reads the quotas again and again, and does not say that the connection is lost."""
    findings.allow("status of 503")
    page = await open_window(on.url)
    await page.route("**/v1/quota/events", lambda route: route.fulfill(status=503))
    await show_my_usage(page)
    used = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name="staff/daily", exact=True))
    await expect(used).to_contain_text("200,000 tokens remaining")
    await on.sdk("alice").chat.completions.create(model="fast", messages=[{"role": "user", "content": "Hi"}])
    await expect(used).not_to_contain_text("200,000 tokens remaining", timeout=15_000)
    await expect(page.get_by_text("connection")).to_be_hidden()
