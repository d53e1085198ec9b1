"""The command `python -m benchmarks.screenshots [FOLDER] [--only NAME]`: an image of each view of the pages.

Each view is shown light and dark, 1280 and 360 pixels wide, in front of the company of tests/pages/demo_data.py,
which uses the proxy meanwhile. All images are written to `build/screenshots`, and those of the README
(`attention.png` and `quotas.png`) to FOLDER, by default `docs/images`. An image shows the whole page, also what is
below the fold. The command also prints what was noticed in a window and must not be: errors, violations of the CSP,
requests elsewhere. It takes two minutes and needs Debian's package chromium.
"""

import argparse
import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import structlog
from playwright.async_api import Page

from tests.pages.browser import ColorScheme, Findings, OpenWindow, log_in, open_browser, open_windows, show_my_usage
from tests.pages.demo_data import demo
from tests.stage import Stage

_ROOT = Path(__file__).parent.parent
_ALL = _ROOT / "build" / "screenshots"
_SCHEMES: tuple[ColorScheme, ...] = ("light", "dark")
_WIDTHS = (1280, 360)
# How long a view may go on changing after it has everything: bars grow, and the first events arrive.
_SETTLED_MS = 1500

Open = Callable[[Page], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class View:
    """A view: what its images are called, what opens it, and whether the API listener serves it."""

    name: str
    open: Open
    of_users: bool = False
    for_readme: bool = False


def _admin(name: str, fragment: str, *, for_readme: bool = False) -> View:
    return View(name, lambda page: log_in(page, at=f"/admin/{fragment}"), for_readme=for_readme)


VIEWS = (
    View("login", lambda page: page.goto("/admin/")),
    _admin("attention", "#/", for_readme=True),
    _admin("now", "#/now"),
    _admin("quotas", "#/quotas", for_readme=True),
    _admin("quotas-by-model", "#/quotas/by-model?model=gpt-4o"),
    _admin("users", "#/users"),
    _admin("user", "#/users?user=alice"),
    _admin("usage", "#/usage"),
    _admin("explain", "#/explain?user=farid&model=gpt-4o"),
    _admin("log", "#/log"),
    View("my-usage-key", lambda page: page.goto("/usage"), of_users=True),
    View("my-usage", lambda page: show_my_usage(page), of_users=True),
)


def main() -> None:
    """Make the images, and print the path of each and what was noticed in its window."""
    parser = argparse.ArgumentParser(description="Make an image of each view of the pages.")
    parser.add_argument("folder", nargs="?", type=Path, default=_ROOT / "docs" / "images")
    parser.add_argument("--only", metavar="NAME", choices=[view.name for view in VIEWS], help="only this view")
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    views = [view for view in VIEWS if given.only in (None, view.name)]
    for folder in (given.folder, _ALL):
        folder.mkdir(parents=True, exist_ok=True)
    asyncio.run(_make(views, given.folder))


async def _make(views: list[View], readme: Path) -> None:
    with TemporaryDirectory() as folder:
        async with demo(Path(folder)) as on, open_browser() as browser:
            for view, width, scheme in product(views, _WIDTHS, _SCHEMES):
                findings = Findings()
                async with open_windows(browser, findings) as open_window:
                    image = await _image(open_window, on, view, width=width, scheme=scheme)
                paths = [_ALL / f"{view.name}-{scheme}-{width}.png"]
                if view.for_readme and (width, scheme) == (_WIDTHS[0], _SCHEMES[0]):
                    paths.append(readme / f"{view.name}.png")
                for path in paths:
                    path.write_bytes(image)
                    print(path, flush=True)
                for noticed in findings.noticed:
                    print(f"    {noticed}")


async def _image(open_window: OpenWindow, on: Stage, view: View, *, width: int, scheme: ColorScheme) -> bytes:
    page = await open_window(
        on.url if view.of_users else on.admin_url,
        width=width,
        color_scheme=scheme,
        reduced_motion="reduce",
        timezone="Europe/Berlin",
    )
    await view.open(page)
    await page.wait_for_timeout(_SETTLED_MS)
    return await page.screenshot(full_page=True)


if __name__ == "__main__":
    main()
