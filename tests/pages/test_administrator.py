"""What an administrator sees happen and does on the page, while calls are made all the time.

The other half is in `test_administrator_users.py`.
"""

import re
import time
from typing import Any
from urllib.parse import urlencode

import pytest
from openai import APIConnectionError
from playwright.async_api import Locator, Page, Request, expect

from tests.admin import ask, make_quota
from tests.pages.browser import OpenWindow, log_in
from tests.pages.load import call, refused, slow_stream, text_of
from tests.stage import Stage

TRIAL = "guests/trial"  # a quota that is made here; carol is the only guest
CLIPBOARD = ["clipboard-read", "clipboard-write"]


def row_of(page: Page, table: str, text: str | re.Pattern[str]) -> Locator:
    """The row of a table that has this text."""
    return page.get_by_role("table", name=table).get_by_role("row").filter(has_text=text)


def button_in(where: Locator, name: str) -> Locator:
    """A button or link whose whole name this is."""
    return where.get_by_role("button", name=name, exact=True).or_(where.get_by_role("link", name=name, exact=True))


async def dialog_of(page: Page, title: str) -> Locator:
    """The dialog that has this title. It must be open."""
    dialog = page.get_by_role("dialog", name=title)
    await expect(dialog).to_be_visible()
    return dialog


async def new_user(on: Stage, user: str, group: str = "staff", **key: Any) -> dict[str, Any]:
    """Make a user of the database with a key. Returns the key and its id."""
    assert (await ask(on, "POST", "/users", json={"id": user, "groups": [group]})).status == 201
    made: dict[str, Any] = (await ask(on, "POST", f"/users/database:{user}/keys", json=key)).json()
    return made


async def test_attention_finds_people_keys_and_requests_and_helps_who_is_blocked(
    busy: Stage, open_window: OpenWindow
) -> None:
    """T89: a key that is pasted into the search is cut to its id before anything is sent.

    Nobody is blocked at first. Then a call is refused: the user appears with Grant and Explain, and after a grant the
    next call is admitted.
    """
    made = await new_user(busy, "erin", label="notebook")
    await make_quota(busy, TRIAL, requests=2, per="24h")
    page = await open_window(busy.admin_url)
    requests: list[Request] = []
    page.on("request", lambda request: requests.append(request))
    await log_in(page)
    search = page.get_by_role("searchbox", name="Find a user, a key or a request")
    await expect(search).to_be_focused()
    await expect(page.get_by_text("Nobody is blocked.")).to_be_visible()
    health = page.get_by_role("region", name="Health")
    await expect(health).to_have_text("All is well: the database answers, and no upstream is in cooldown.")

    await search.fill("eri")
    await search.press("Enter")
    await expect(row_of(page, "Users", "database:erin")).to_be_visible()
    await page.go_back()
    await search.fill(made["key"])
    await expect(search).to_have_value(made["id"])
    await search.press("Enter")
    await expect(page.get_by_text(f"The key {made['id']} belongs to database:erin")).to_be_visible()
    await expect(page).to_have_url(re.compile(made["id"]))
    await page.go_back()
    await expect(search).to_be_visible()
    for request in requests:
        sent = [request.url, request.post_data or "", *(await request.all_headers()).values()]
        assert not any(made["key"] in text for text in sent)

    await call(busy, "carol")
    await call(busy, "carol")
    request_id = await refused(busy, "carol")
    blocked = row_of(page, "The last refusal of each user by each quota", "carol")
    await expect(blocked).to_be_visible(timeout=10_000)
    for text in (TRIAL, "2 of 2 requests", "in 23h 59m", "1 time"):
        await expect(blocked).to_contain_text(text)
    await button_in(blocked, "Explain").click()
    await expect(page.get_by_role("heading", name="The refused request")).to_be_visible()
    await expect(page).to_have_url(re.compile(request_id))
    await page.go_back()
    await search.fill(request_id)
    await search.press("Enter")
    await expect(page.get_by_role("heading", name="The refused request")).to_be_visible()
    await page.go_back()

    await button_in(blocked, "Grant").click()
    dialog = await dialog_of(page, "Grant more")
    await dialog.get_by_label("How much more in each window").fill("3")
    await dialog.get_by_label("Reason").fill("A demo")
    await button_in(dialog, "Grant").click()
    await expect(dialog).to_be_hidden()
    await expect(page.get_by_role("status")).to_contain_text("Granted")
    await call(busy, "carol")


async def test_now_shows_calls_as_they_happen(busy: Stage, open_window: OpenWindow) -> None:
    """A call moves its bar within a second, without a reload. Resets count down, and a stream can be ended."""
    await make_quota(busy, TRIAL, requests=15, per="15m")
    page = await open_window(busy.admin_url, reduced_motion="reduce")
    await log_in(page, at="/admin/#/now")
    loads: list[Page] = []
    page.on("load", lambda page: loads.append(page))
    await expect(page.get_by_text("Nobody has used 80 % of a limit.")).to_be_visible()
    for _ in range(12):
        await call(busy, "carol")
    near = row_of(page, "Counters near or at a limit", "carol")
    await expect(near).to_contain_text("12 of 15 requests")
    bar = near.locator("[aria-hidden=true]").locator("*").first
    before = await bar.bounding_box()
    resets = near.get_by_text(re.compile("in 14m [0-9]+s"))
    left = await resets.inner_text()

    delays = []
    for used in (13, 14, 15):
        await call(busy, "carol")
        ended = time.monotonic()
        await expect(near).to_contain_text(f"{used} of 15 requests")
        delays.append(time.monotonic() - ended)
    assert min(delays) < 1, "the fastest of three, as other tests run at the same time"
    after = await bar.bounding_box()
    assert before
    assert after
    assert after["width"] > before["width"] > 0
    await expect(resets).not_to_have_text(left)
    await expect(near).to_contain_text("used up")
    await refused(busy, "carol")
    await expect(page.get_by_text(re.compile("^Refusals a minute *1$"))).to_be_visible()

    stream = await slow_stream(busy, "alice")
    in_flight = row_of(page, "Calls in flight", "alice")
    await expect(in_flight).to_contain_text("gpt-4o-mini")
    await in_flight.get_by_role("button", name="End the call of alice").click()
    dialog = await dialog_of(page, "End this call?")
    await button_in(dialog, "End the call").click()
    with pytest.raises(APIConnectionError):
        await text_of(stream)
    await expect(in_flight).to_be_hidden()

    replica = row_of(page, "Replicas", "simulated")
    policy = (await ask(busy, "GET", "/policy")).json()["hash"]
    for text in (policy, "available", "ms"):
        await expect(replica).to_contain_text(text)
    assert not loads


async def test_quotas_are_made_changed_and_deleted(busy: Stage, open_window: OpenWindow) -> None:
    """A quota made by a preset says what it does before it is saved, and an error is at its field.

    A changed quota refuses the next call. A quota of the file can't be changed, but its YAML can be copied.
    """
    key = (await new_user(busy, "erin", "team-x"))["key"]
    page = await open_window(busy.admin_url)
    await page.context.grant_permissions(CLIPBOARD)
    await log_in(page, at="/admin/#/quotas")
    group = page.get_by_role("region", name="team-x", exact=True)
    await button_in(group, "New quota").click()
    dialog = await dialog_of(page, "New quota of team-x")
    await dialog.get_by_label("Name").fill("burst")
    await dialog.get_by_label("Window").select_option("24 hours")
    tokens = dialog.get_by_label("Tokens", exact=True)
    await tokens.fill("many")
    await expect(tokens).to_have_attribute("aria-invalid", "true")
    await expect(tokens).to_have_accessible_description(re.compile("many"))
    await tokens.fill("150k")
    await expect(dialog).to_contain_text(
        re.compile(r"Each of 2 members may use 150,000 tokens .*24 hours.* of any model")
    )
    await expect(tokens).not_to_have_attribute("aria-invalid", "true")
    await dialog.get_by_label("Requests").fill("50")
    await button_in(dialog, "Save").click()
    await expect(dialog).to_be_hidden()
    row = group.get_by_role("row").filter(has_text="burst")
    for text in ("150,000 tokens", "50 requests", "24 hours", "each member", "made here"):
        await expect(row).to_contain_text(text)

    await call(busy, "erin", key=key)
    await button_in(row, "Edit").click()
    dialog = await dialog_of(page, "Quota team-x/burst")
    await dialog.get_by_label("Requests").fill("1")
    await expect(dialog).to_contain_text("1 of them would be over now")
    await button_in(dialog, "Save").click()
    await expect(row).to_contain_text("1 requests")
    await refused(busy, "erin", key=key)

    await row.get_by_role("button", name="Delete").click()
    dialog = await dialog_of(page, "Delete the quota team-x/burst?")
    await expect(dialog).to_contain_text("This touches 2 users.")
    await button_in(dialog, "Delete").click()
    await expect(row).to_be_hidden()
    await call(busy, "erin", key=key)

    of_file = group.get_by_role("row").filter(has_text="pot")
    await expect(of_file).to_contain_text("file")
    await expect(of_file.get_by_role("link")).to_have_count(0)
    await expect(of_file.get_by_role("button")).to_have_text(["Copy YAML"])
    await button_in(of_file, "Copy YAML").click()
    await expect(page.get_by_role("status")).to_have_text("Copied.")
    copied = await page.evaluate("navigator.clipboard.readText()")
    [yaml] = [each["yaml"] for each in await quotas(busy) if each["id"] == "team-x/pot"]
    assert copied == yaml


async def quotas(on: Stage, **query: str) -> list[dict[str, Any]]:
    """The quotas, as the API has them."""
    found: list[dict[str, Any]] = (await ask(on, "GET", f"/quotas?{urlencode(query)}")).json()["data"]
    return found


async def test_the_quotas_for_one_model_are_saved_as_a_whole(busy: Stage, open_window: OpenWindow) -> None:
    """A row for each group; what is wrong is at its field, and nothing is saved before all is right."""
    page = await open_window(busy.admin_url)
    await log_in(page, at="/admin/#/quotas")
    await page.get_by_role("link", name="By model").click()
    model = page.get_by_label("Model, or a pattern of names")
    await model.fill("gpt-4o-mini")
    await model.press("Enter")
    help = re.compile("^Each limit is for each member, not shared.*A token is about four characters")
    await expect(page.get_by_text(help)).to_be_visible()
    guests, lab = (row_of(page, "Quotas of the groups", group) for group in ("guests", "lab"))
    await expect(lab.get_by_label("Window")).to_have_value("24h")
    await guests.get_by_label("Uses").fill("1")
    tokens = lab.get_by_label("Tokens", exact=True)
    await tokens.fill("many")
    await expect(tokens).to_have_attribute("aria-invalid", "true")
    await page.get_by_role("button", name="Save all").click()
    await expect(tokens).to_have_accessible_description(re.compile("many"))
    assert not await quotas(busy, model="gpt-4o-mini")

    await tokens.fill("5000")
    await lab.get_by_label("One pot").check()
    await expect(page.get_by_text(re.compile("may use 1 request in 24 hours"))).to_be_visible()
    await page.get_by_role("button", name="Save all").click()
    await expect(page.get_by_role("status")).to_have_text("Saved.")
    made = await quotas(busy, model="gpt-4o-mini")
    assert [(each["group"], each["fields"]["shared"]) for each in made] == [("guests", False), ("lab", True)]
    await call(busy, "carol")
    await refused(busy, "carol")


async def test_two_administrators_see_each_others_change(busy: Stage, open_window: OpenWindow) -> None:
    """What one saves is on the other's page at once. Who changes the same is told, and overwrites nothing."""
    await make_quota(busy, "guests/burst", requests=50, per="24h")
    key = (await ask(busy, "POST", "/admin-keys", json={"name": "ann", "role": "administrator"})).json()["key"]
    mine, theirs = await open_window(busy.admin_url), await open_window(busy.admin_url)
    await log_in(mine, at="/admin/#/quotas")
    await log_in(theirs, at="/admin/#/quotas", key=key)
    dialogs = []
    for page in (mine, theirs):
        row = page.get_by_role("row").filter(has_text="burst")
        await expect(row).to_contain_text("50 requests")
        await button_in(row, "Edit").click()
        dialogs.append(await dialog_of(page, "Quota guests/burst"))
    await dialogs[0].get_by_label("Requests").fill("30")
    await dialogs[1].get_by_label("Requests").fill("20")
    await button_in(dialogs[1], "Save").click()
    await expect(dialogs[0]).to_contain_text(re.compile("ann changed this .*while you were editing it"))
    await expect(dialogs[0].get_by_role("deletion")).to_have_text("20")
    await expect(dialogs[0].get_by_role("insertion")).to_have_text("30")
    assert [each["fields"]["requests"] for each in await quotas(busy) if each["id"] == "guests/burst"] == [20]

    await button_in(dialogs[0], "Keep mine").click()
    await expect(dialogs[0].get_by_label("Requests")).to_have_value("30")
    await button_in(dialogs[0], "Save").click()
    await expect(dialogs[0]).to_be_hidden()
    for page in (mine, theirs):
        await expect(page.get_by_role("row").filter(has_text="burst")).to_contain_text("30 requests")
    await make_quota(busy, "lab/new", requests=7, per="24h")
    for page in (mine, theirs):
        await expect(page.get_by_role("row").filter(has_text="7 requests")).to_be_visible()
