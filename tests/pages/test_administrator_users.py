"""Users, keys, usage, explanations and the log on the administrator's page, who may see what, and its addresses.

The other half is in `test_administrator.py`.
"""

import csv
import re
from pathlib import Path

import pytest
from openai import APIConnectionError, AuthenticationError
from playwright.async_api import Locator, Page, expect

from tests.admin import ask, change, make_quota
from tests.pages.browser import Findings, OpenWindow, log_in
from tests.pages.load import call, load, refused, slow_stream, text_of
from tests.pages.policy import ROGUE, ROGUE_LABEL
from tests.pages.test_administrator import CLIPBOARD, TRIAL, button_in, dialog_of, new_user, row_of
from tests.stage import Stage

VIEWS = {
    "Attention": "attention",
    "Now": "now",
    "Quotas": "quotas",
    "Users and keys": "users",
    "Usage": "usage",
    "Explain": "explain",
    "Log": "log",
}
CHANGES = re.compile(
    r"^(Grant|Reset|New |Edit|Delete|Revoke|Rotate|Change|Disable|Enable|Forget|End( |$)|Save|Add row|Remove)"
)


async def copied_key(page: Page, dialog: Locator) -> str:
    """The new key that a dialog shows, copied with its button. The dialog is closed."""
    await expect(dialog).to_contain_text("It is not shown again.")
    await button_in(dialog, "Copy the key").click()
    await expect(page.get_by_role("status")).to_have_text("Copied.")
    key: str = await page.evaluate("navigator.clipboard.readText()")
    await expect(dialog).to_contain_text(f"OPENAI_API_KEY={key}")
    await button_in(dialog, "Close").click()
    await expect(dialog).to_be_hidden()
    assert key not in await page.content()
    return key


async def test_users_and_keys_from_their_creation_to_their_end(busy: Stage, open_window: OpenWindow) -> None:
    """T83, T89: a label that is markup is a text, and a new key is shown once.

    The SDK works with the new key at once. The key gets an expiry, is rotated, and is revoked, which ends its running
    stream. The user is disabled and forgotten.
    """
    page = await open_window(busy.admin_url)
    await page.context.grant_permissions(CLIPBOARD)
    await log_in(page, at="/admin/#/users")
    await page.get_by_role("button", name="New user").click()
    dialog = await dialog_of(page, "New user")
    await dialog.get_by_label("Name").fill("erin")
    await dialog.get_by_label("E-mail").fill("erin@example.org")
    await dialog.get_by_label("Groups").fill("staff")
    await button_in(dialog, "Create").click()
    await expect(page.get_by_role("heading", name="database:erin")).to_be_visible()

    await page.get_by_role("button", name="New key").click()
    dialog = await dialog_of(page, "New key for database:erin")
    await dialog.get_by_label("Label").fill(ROGUE_LABEL)
    await button_in(dialog, "Create").click()
    dialog = await dialog_of(page, "New key ")
    await expect(dialog).to_contain_text(f"OPENAI_BASE_URL={busy.url}/v1")
    first = await copied_key(page, dialog)
    await call(busy, "erin", key=first)
    row = row_of(page, "Keys", first[4:14])
    await expect(row).to_contain_text(ROGUE_LABEL)
    await expect(row).to_contain_text("until revoked")

    await button_in(row, "Change").click()
    dialog = await dialog_of(page, "Change key")
    await dialog.get_by_label("Label").fill("notebook")
    await dialog.get_by_label("Expires at").fill("2100-01-31T12:00")
    await button_in(dialog, "Save").click()
    await expect(row).to_contain_text("notebook")
    await expect(row).to_contain_text(re.compile("until .*2100"))
    await button_in(row, "Rotate").click()
    dialog = await dialog_of(page, "Rotate key")
    await dialog.get_by_label("The old key ends").select_option("after an hour")
    await button_in(dialog, "Rotate").click()
    second = await copied_key(page, await dialog_of(page, "New key "))
    for key in (first, second):
        await call(busy, "erin", key=key)
    await busy.server.directory.write_used()  # which it does twice a minute
    await page.reload()
    await expect(row_of(page, "Keys", re.compile(f"^{second[4:14]}"))).to_contain_text("from 127.0.0.1")

    stream = await slow_stream(busy, "erin", key=second)
    await button_in(row_of(page, "Keys", re.compile(f"^{second[4:14]}")), "Revoke").click()
    dialog = await dialog_of(page, f"Revoke key {second[4:14]}")
    await dialog.get_by_label("End calls in flight at once").check()
    await button_in(dialog, "Revoke").click()
    with pytest.raises(APIConnectionError):
        await text_of(stream)
    with pytest.raises(AuthenticationError):
        await call(busy, "erin", key=second)

    search = page.get_by_role("searchbox", name="Search")
    await page.get_by_role("link", name="All users").click()
    await search.fill("ERIN@example")
    await expect(page).to_have_url(re.compile("text=ERIN"))
    await expect(page.get_by_role("table", name="Users").get_by_role("row")).to_have_count(2)
    await page.get_by_role("link", name="database:erin").click()
    await page.get_by_role("link", name="All users").click()
    await search.fill(first)
    await expect(search).to_have_value(first[4:14])
    await expect(page.get_by_text(re.compile(f"key {first[4:14]} belongs to"))).to_be_visible()
    await page.get_by_role("link", name="database:erin").click()
    await page.get_by_role("button", name="Disable").click()
    await button_in(await dialog_of(page, "Disable database:erin"), "Disable").click()
    await expect(page.get_by_role("button", name="Enable")).to_be_visible()
    with pytest.raises(AuthenticationError):
        await call(busy, "erin", key=first)
    await page.get_by_role("button", name="Enable").click()
    await button_in(await dialog_of(page, "Enable database:erin"), "Enable").click()
    await expect(page.get_by_role("button", name="Disable")).to_be_visible()
    await call(busy, "erin", key=first)
    await page.get_by_role("button", name="Forget").click()
    await button_in(await dialog_of(page, "Forget database:erin"), "Forget for ever").click()
    await expect(page.get_by_role("status")).to_contain_text("The records now have the name ")
    await expect(row_of(page, "Users", "database:erin")).to_contain_text("forgotten")
    with pytest.raises(AuthenticationError):
        await call(busy, "erin", key=first)


async def test_usage_has_charts_tables_csv_and_forecasts(
    busy: Stage, open_window: OpenWindow, tmp_path: Path
) -> None:
    """T89: a tag that a spreadsheet would take for a formula is guarded in the CSV.

    Usage is there by day, user, model and tag, and a pot says when it is empty at this pace.
    """
    key = (await new_user(busy, "erin", "team-x", tag="=1+1"))["key"]
    await make_quota(busy, "team-x/campaign", requests="100k", per="7d", shared=True)
    for _ in range(3):
        await call(busy, "erin", key=key)
    while not (await ask(busy, "GET", "/usage?by=tag&user=database:erin")).json()["data"]:
        pass  # usage is written in a moment
    page = await open_window(busy.admin_url)
    await log_in(page, at="/admin/#/usage")
    await expect(page.get_by_role("img", name="Tokens by day")).to_be_visible()
    await expect(page.get_by_role("table", name="Usage by day").get_by_role("row")).to_have_count(2)
    pot = page.get_by_role("listitem").filter(has_text="team-x/campaign")
    await expect(pot).to_contain_text("3 of 100,000 requests")
    await expect(pot).to_contain_text(re.compile(r"Empty in \d+.* at this pace"))
    by = page.get_by_label("By", exact=True)
    for dimension, value in (("User", f"sso:{ROGUE}"), ("Model", "gpt-4o-mini"), ("Key", "="), ("Tag", "=1+1")):
        await by.select_option(dimension)
        if dimension == "Key":
            value = key[4:14]
        await expect(row_of(page, f"Usage by {dimension.lower()}", value)).to_be_visible()
    async with page.expect_download() as download:
        await page.get_by_role("link", name="Download as CSV").click()
    await (await download.value).save_as(tmp_path / "usage.csv")
    with (tmp_path / "usage.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["tag"]: row["calls"] for row in csv.DictReader(file)}
    assert rows["'=1+1"] == "3"
    assert "=1+1" not in rows


async def test_explain_says_why_and_the_log_who_changed_what(busy: Stage, open_window: OpenWindow) -> None:
    """A user and a model: admitted or not, by which quotas, and Reset is beside it. The log has before and after."""
    await make_quota(busy, TRIAL, requests=2, per="24h")
    page = await open_window(busy.admin_url)
    await log_in(page, at="/admin/#/explain")
    await page.get_by_label("User").fill("carol")
    await page.get_by_label("Model").fill("fast")
    await page.get_by_role("button", name="Explain").click()
    await expect(page.get_by_text(re.compile("A call of carol to fast is admitted now"))).to_be_visible()
    await call(busy, "carol")
    await call(busy, "carol")
    await expect(
        page.get_by_text(
            re.compile(f"A call of carol to fast is refused now: not enough left of {TRIAL}.*in 23h 59m")
        )
    ).to_be_visible()
    row = row_of(page, "Quotas now", TRIAL)
    for text in ("2 of 2 requests", "0 left", "refuses"):
        await expect(row).to_contain_text(text)
    await button_in(row, "Reset").click()
    dialog = await dialog_of(page, "Reset what is used")
    await expect(dialog).to_contain_text(TRIAL)
    await dialog.get_by_label("Reason").fill("A demo")
    await button_in(dialog, "Reset").click()
    await expect(row).to_contain_text("0 of 2 requests")
    await call(busy, "carol")

    await page.get_by_role("link", name="Log", exact=True).click()
    entries = page.get_by_role("list").get_by_role("listitem").filter(has_text="admin:ops")
    await expect(entries.filter(has_text="Counters reset")).to_contain_text("A demo")
    path = "/groups/guests/quotas/trial"
    await change(busy, "PUT", path, {"requests": 5, "per": "24h"})
    changed = entries.filter(has_text=TRIAL).first  # the newest
    await expect(changed.get_by_role("deletion")).to_contain_text(["2"])
    await expect(changed.get_by_role("insertion")).to_contain_text(["5"])
    await page.get_by_label("Kind of change").fill("counters.reset")
    await page.get_by_label("Kind of change").press("Enter")
    await expect(entries).to_have_count(1)


async def test_viewers_and_managers_see_no_more_than_they_may(busy: Stage, open_window: OpenWindow) -> None:
    """T83: a viewer sees all, also names that are markup, and no button that would be refused.

    A manager sees its groups, and grants up to its share.
    """
    await make_quota(busy, TRIAL, requests=2, per="24h")
    await make_quota(busy, "staff/alone", models=["gpt-4o"], requests=10, per="24h")
    for _ in range(2):
        await call(busy, "carol")
    for _ in range(10):
        await call(busy, "alice", "gpt-4o", tokens=1)
    await refused(busy, "carol")
    await refused(busy, "alice", "gpt-4o")
    await slow_stream(busy, "alice")
    await new_user(busy, "erin")

    page = await open_window(busy.admin_url)
    await log_in(page, "eve")
    await expect(row_of(page, "The last refusal", "carol")).to_be_visible()
    for title, path in VIEWS.items():
        await page.get_by_role("link", name=title, exact=True).click()
        await expect(page.get_by_role("heading", name=title, level=1)).to_be_visible()
        await expect(page.get_by_text("Loading …")).to_have_count(0)
        await expect(page).to_have_url(re.compile(path))
        await expect(page.get_by_role("main").get_by_role("button", name=CHANGES)).to_have_count(0)
        await expect(page.get_by_role("main").get_by_role("link", name=CHANGES)).to_have_count(0)
    await page.goto("/admin/#/users?user=database:erin")
    await expect(page.get_by_role("heading", name="database:erin")).to_be_visible()
    await expect(page.get_by_role("button", name=CHANGES)).to_have_count(0)
    await page.goto("/admin/#/quotas/by-model?model=gpt-4o")
    await expect(page.get_by_role("table").filter(has_text="staff/frontier")).to_be_visible()
    await expect(page.get_by_role("button", name=CHANGES)).to_have_count(0)
    await page.goto("/admin/#/quotas?new=staff")
    await expect(page.get_by_role("region", name="guests")).to_be_visible()
    await expect(page.get_by_role("dialog")).to_be_hidden()

    page = await open_window(busy.admin_url)
    await log_in(page, "max")
    row = row_of(page, "The last refusal", "alice")
    await expect(row).to_be_visible()
    await expect(page.get_by_text("carol")).to_have_count(0)
    await expect(page.get_by_role("link", name="Users and keys")).to_have_count(0)
    await button_in(row, "Grant").click()
    dialog = await dialog_of(page, "Grant more")
    more = dialog.get_by_label("How much more in each window")
    await more.fill("6")
    await dialog.get_by_label("Reason").fill("A thesis")
    await button_in(dialog, "Grant").click()
    await expect(more).to_have_accessible_description(re.compile("50"))
    await more.fill("5")
    await button_in(dialog, "Grant").click()
    await expect(dialog).to_be_hidden()
    await call(busy, "alice", "gpt-4o", tokens=1)
    await page.get_by_role("link", name="Quotas", exact=True).click()
    await expect(page.get_by_role("region", name="staff")).to_be_visible()
    await expect(page.get_by_role("region", name=re.compile("guests|lab|team-x"))).to_have_count(0)
    await expect(page.get_by_role("main").get_by_role("button", name=CHANGES)).to_have_count(0)
    await page.get_by_role("link", name="Now", exact=True).click()
    await expect(row_of(page, "Calls in flight", "alice")).to_be_visible()


async def test_the_page_catches_up_after_the_server_has_restarted(
    on: Stage, open_window: OpenWindow, findings: Findings
) -> None:
    """It says that the connection is lost, goes on trying, and then shows what happened meanwhile. No reload."""
    findings.allow("net::ERR_", is_certain=False)
    await make_quota(on, TRIAL, requests=10, per="24h")
    for _ in range(8):
        await call(on, "carol")
    page = await open_window(on.admin_url)
    await log_in(page, at="/admin/#/now")
    loads: list[Page] = []
    page.on("load", lambda page: loads.append(page))
    row = row_of(page, "Counters near or at a limit", "carol")
    await expect(row).to_contain_text("8 of 10 requests")
    lost = page.get_by_text("The connection to the proxy is lost")
    async with on.stopped():
        await expect(lost).to_be_visible()
    async with load(on):
        await call(on, "carol")
        await expect(lost).to_be_hidden(timeout=15_000)
        await expect(row).to_contain_text("9 of 10 requests")
        await call(on, "carol")
        await expect(row).to_contain_text("10 of 10 requests")
    assert not loads


async def test_addresses_keep_the_view(busy: Stage, open_window: OpenWindow) -> None:
    """A link leads to a view with what it shows, before and after the login; Back and a reload keep it."""
    page = await open_window(busy.admin_url)
    await log_in(page, at="/admin/#/explain?user=carol&model=fast")
    explained = page.get_by_text(re.compile("A call of carol to fast is admitted now"))
    await expect(explained).to_be_visible()
    await page.reload()
    await expect(explained).to_be_visible()
    await page.get_by_role("link", name="Quotas", exact=True).click()
    await button_in(page.get_by_role("region", name="guests"), "New quota").click()
    dialog = await dialog_of(page, "New quota of guests")
    await page.keyboard.press("Escape")
    await expect(dialog).to_be_hidden()
    await page.get_by_role("link", name="By model").click()
    await page.get_by_label("Model, or a pattern of names").fill("fast")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name="Quotas for fast alone")).to_be_visible()
    await page.reload()
    await expect(page.get_by_role("heading", name="Quotas for fast alone")).to_be_visible()
    for _ in range(3):
        await page.go_back()
    await expect(explained).to_be_visible()

    await page.get_by_role("link", name="Usage", exact=True).click()
    by = page.get_by_label("By", exact=True)
    await by.select_option("Model")
    await page.get_by_label("Period").select_option("7 days")
    await page.reload()
    await expect(by).to_have_value("model")
    await expect(page.get_by_label("Period")).to_have_value("7")
    await page.go_back()
    await expect(page.get_by_label("Period")).to_have_value("30")
    await page.go_back()
    await expect(by).to_have_value("day")
