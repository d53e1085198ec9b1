"""What the page of administrators says and sends in states that are rare: it must be true there too."""

from dataclasses import replace
from pathlib import Path

import pytest
from playwright.async_api import Request, Route, expect

from tests.admin import make_quota
from tests.pages.browser import Findings, OpenWindow, log_in
from tests.pages.policy import POLICY
from tests.stage import Stage, config_of, stage, until

_PASTED = f"lqp_23456789ab_{'A' * 38}"
_OF_THE_FILE = "a-key-that-somebody-chose-for-the-file"


@pytest.mark.parametrize(
    ("at", "label", "text", "is_sent_as"),
    [
        ("usage", "Key id", _PASTED, "key=23456789ab"),
        ("usage", "Key id", _OF_THE_FILE, None),
        ("log", "What was changed", _PASTED, "target=23456789ab"),
        ("users", "Group", _PASTED, None),
        ("quotas/by-model", "Model, or a pattern of names", _PASTED, None),
    ],
)
async def test_a_key_in_a_field_gets_into_no_address(
    on: Stage, open_window: OpenWindow, at: str, label: str, text: str, is_sent_as: str | None
) -> None:
    """A key that was made here is cut to its id where an id is of use. Anything else is not sent."""
    page = await open_window(on.admin_url)
    await log_in(page, at=f"/admin/#/{at}")
    addresses: list[str] = []

    def note(request: Request) -> None:
        addresses.append(request.url)

    page.on("request", note)
    field = page.get_by_label(label, exact=True)
    await field.fill(text)
    await field.press("Tab")
    if is_sent_as is None:
        await expect(page.get_by_role("status")).to_contain_text("looks like a key")
    else:
        await until(lambda: any(is_sent_as in address for address in addresses))
    for address in (*addresses, page.url):
        assert text not in address


async def test_a_pot_that_is_not_in_use_can_be_raised(on: Stage, open_window: OpenWindow) -> None:
    """No list of counters has it before its first call."""
    await make_quota(on, "staff/pot", tokens="1M", per="7d", shared=True)
    page = await open_window(on.admin_url)
    await log_in(page, at="/admin/#/users?user=file:alice")
    await page.get_by_role("row", name="staff/pot").get_by_role("button", name="Grant").click()
    dialog = page.get_by_role("dialog")
    await expect(dialog).to_contain_text("More of staff/pot for the whole group, which shares it.")
    await dialog.get_by_label("Reason").fill("a fair")
    await dialog.get_by_role("button", name="Grant").click()
    await expect(page.get_by_role("row", name="staff/pot")).to_contain_text("with a grant")


async def test_a_logout_that_failed_is_not_said_to_be_done(
    on: Stage, open_window: OpenWindow, findings: Findings
) -> None:
    """The cookie is still valid, so the page stays."""
    findings.allow("net::ERR_")
    page = await open_window(on.admin_url)
    await log_in(page)

    async def fail(route: Route) -> None:
        await (route.abort() if route.request.method == "DELETE" else route.continue_())

    await page.route("**/admin/api/session", fail)
    await page.get_by_role("button", name="Log out").click()
    await expect(page.get_by_role("status")).to_contain_text("can't be reached")
    await expect(page.get_by_role("button", name="Log out")).to_be_visible()


async def test_a_stream_that_is_refused_while_the_login_is_valid_comes_back(
    on: Stage, open_window: OpenWindow, findings: Findings
) -> None:
    """As by a server in front that has no way to this one for a moment."""
    page = await open_window(on.admin_url)
    await page.route("**/admin/api/events", lambda route: route.fulfill(status=404))
    await log_in(page, at="/admin/#/quotas")
    lost = page.get_by_text("Trying again")
    await expect(lost).to_be_visible()
    await page.unroute("**/admin/api/events")
    await expect(lost).to_be_hidden(timeout=15_000)


async def test_a_changed_file_is_shown_without_a_reload(on: Stage, tmp_path: Path, open_window: OpenWindow) -> None:
    """It is no change of an administrator, so the stream says only that the process has another policy."""
    page = await open_window(on.admin_url)
    await log_in(page, at="/admin/#/quotas")
    await expect(page.get_by_text("200,000 tokens")).to_be_visible()
    changed = config_of(
        POLICY.replace("tokens: 200k", "tokens: 300k"), folder=tmp_path, upstream="http://127.0.0.1:9"
    )
    on.config = replace(on.config, policy=changed.policy)
    assert await on.server.policies.reload()
    await expect(page.get_by_text("300,000 tokens")).to_be_visible()


async def test_an_unlimited_user_is_not_told_to_have_something_left(tmp_path: Path, open_window: OpenWindow) -> None:
    """No quota binds, so nothing has to be left of any."""
    policy = POLICY.replace("users:\n", "  free: {unlimited: true}\nusers:\n  root: {groups: [free]}\n", 1)
    async with stage(policy, folder=tmp_path) as on:
        page = await open_window(on.admin_url)
        await log_in(page, at="/admin/#/explain?user=root&model=fast")
        await expect(page.get_by_text("is admitted now")).to_be_visible()
        await expect(page.get_by_text("no quota")).to_be_hidden()
