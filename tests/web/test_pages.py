"""The files of the pages over HTTP: their headers, what is not served, and that they work below a path."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
from aiohttp import ClientSession
from structlog.testing import capture_logs
from yarl import URL

from proxy.web import pages
from tests.admin import ADMINS, ask
from tests.reverse_proxy import below
from tests.stage import STAFF, Reply, Stage, stage

FOLDER = Path(pages.__file__).parent
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
ROOTS = {"admin": "/admin", "usage": "/usage"}
DOCUMENTS = {"admin": "/admin/", "usage": "/usage"}
PREFIX = "/llm/"
# Below the path of a page.
NO_FILES = [
    "/common/missing.js",
    "/common/",
    "/shared",
    "/__init__.py",
    "/files.py",
    "/common/../files.py",
    "/common/%2e%2e/files.py",
    "/common/..%2ffiles.py",
    "/common/..%5cfiles.py",
    "/..%2f..%2f..%2f..%2fetc/passwd",
    "/../../../../etc/passwd",
    "//etc/passwd",
    "/common/render.js/",
    "/common/render.js%00.css",
    "/Shared/render.js",
]


@asynccontextmanager
async def pages_on(folder: Path, more: str = "", **settings: Any) -> AsyncIterator[Stage]:
    """A stage with both pages."""
    async with stage(f"{more}{STAFF}{ADMINS}", folder=folder, **settings) as on:
        yield on


def listener_of(on: Stage, page: str) -> str:
    """The URL of the listener that serves this page."""
    return on.admin_url if page == "admin" else on.url


def paths_of(page: str) -> dict[str, Path]:
    """The files of a page, by their paths."""
    files = [path for part in ("common", page) for path in (FOLDER / part).iterdir() if path.suffix in TYPES]
    of_folders = {f"{ROOTS[page]}/{path.parent.name}/{path.name}": path for path in files}
    return {DOCUMENTS[page]: FOLDER / f"{page}.html", **of_folders}


async def fetch(
    http: ClientSession, url: str, *, method: str = "GET", headers: dict[str, str] | None = None, follow: bool = False
) -> Reply:
    """A request whose path is sent as it is: nothing in it is resolved or encoded."""
    target = URL(url, encoded=True)
    async with http.request(method, target, headers=headers, allow_redirects=follow) as reply:
        return Reply(reply.status, reply.headers.copy(), await reply.read())


# ------------------------------------------------------------------------------------------------------------ headers


@pytest.mark.parametrize("page", ["admin", "usage"])
async def test_every_file_has_its_type_and_the_headers_that_protect_it(page: str, tmp_path: Path) -> None:
    """T85: neither framed nor sniffed, no referrer, and a policy that lets it load nothing from elsewhere."""
    paths = paths_of(page)
    assert {path.suffix for path in paths.values()} == set(TYPES)
    async with pages_on(tmp_path) as on:
        for path, file in paths.items():
            url = listener_of(on, page) + path
            reply = await fetch(on.http, url)
            assert (reply.status, reply.body) == (200, file.read_bytes()), path
            assert {name: reply.headers[name] for name in HEADERS} == HEADERS, path
            assert reply.headers["content-type"] == f"{TYPES[file.suffix]}; charset=utf-8"
            assert "set-cookie" not in reply.headers
            head = await fetch(on.http, url, method="HEAD")
            assert (head.status, head.body) == (200, b"")
            assert head.headers["content-length"] == str(len(reply.body))


@pytest.mark.parametrize("page", ROOTS)
def test_all_modules_are_requested_at_once(page: str) -> None:
    """Otherwise the browser would request each when it has read the one that imports it, in three rounds."""
    document = (FOLDER / f"{page}.html").read_text(encoding="utf-8")
    named = re.findall(r'<link rel="modulepreload" href="(?:usage/)?([^"]+)">|src="(?:usage/)?([^"]+)"', document)
    modules = {f"{folder}/{module.name}" for folder in ("common", page) for module in (FOLDER / folder).glob("*.js")}
    assert {link or script for link, script in named} == modules


@pytest.mark.parametrize("page", ["admin", "usage"])
async def test_a_browser_that_has_a_file_gets_it_again_only_if_it_is_another(page: str, tmp_path: Path) -> None:
    """It asks each time, so that a new release never meets a file of an old one."""
    async with pages_on(tmp_path) as on:
        for path in paths_of(page):
            url = listener_of(on, page) + path
            etag = (await fetch(on.http, url)).headers["etag"]
            same = await fetch(on.http, url, headers={"if-none-match": etag})
            assert (same.status, same.body, same.headers["etag"]) == (304, b"", etag)
            assert same.headers["content-security-policy"] == CSP
            assert (await fetch(on.http, url, headers={"if-none-match": '"old"'})).status == 200


async def test_answers_of_the_apis_are_not_kept_by_a_browser(tmp_path: Path) -> None:
    """T85: they are about people. A page of the admin API, which is JSON, may load nothing at all."""
    async with pages_on(tmp_path) as on:
        for path in ("/session", "/users", "/openapi.json", "/usage?format=csv", "/missing"):
            reply = await ask(on, "GET", path)
            assert reply.headers["cache-control"] == "no-store"
            assert reply.headers["x-frame-options"] == "DENY"
            assert reply.headers["referrer-policy"] == "no-referrer"
            assert reply.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"


# ------------------------------------------------------------------------------------------------- what is not served


@pytest.mark.parametrize("page", ["admin", "usage"])
async def test_nothing_but_the_files_is_served(page: str, tmp_path: Path) -> None:
    """Neither another file of the folder nor one of the disk: no path of a request is opened."""
    async with pages_on(tmp_path) as on:
        for path in NO_FILES:
            reply = await fetch(on.http, listener_of(on, page) + ROOTS[page] + path)
            assert reply.status == 404, path
            assert b"import" not in reply.body and b"root:" not in reply.body


@pytest.mark.parametrize("page", ["admin", "usage"])
async def test_a_page_can_only_be_read(page: str, tmp_path: Path) -> None:
    async with pages_on(tmp_path) as on:
        for method in ("POST", "PUT", "DELETE"):
            reply = await fetch(on.http, listener_of(on, page) + DOCUMENTS[page], method=method)
            assert reply.status in (404, 405)


async def test_each_listener_has_its_own_page_alone(tmp_path: Path) -> None:
    """So that whoever can reach the API, and nothing else, sees nothing of the administration."""
    async with pages_on(tmp_path) as on:
        for path in ("/", "/admin", *paths_of("admin")):
            assert (await fetch(on.http, on.url + path)).status == 404, path
        for path in paths_of("usage"):
            assert (await fetch(on.http, on.admin_url + path)).status == 404, path


async def test_addresses_that_people_type_lead_to_the_page(tmp_path: Path) -> None:
    async with pages_on(tmp_path) as on:
        for path in ("/", "/admin"):
            reply = await fetch(on.http, on.admin_url + path)
            assert (reply.status, reply.headers["location"]) == (302, "admin/")
            page = await fetch(on.http, on.admin_url + path, follow=True)
            assert page.body == paths_of("admin")["/admin/"].read_bytes()


async def test_a_name_that_is_not_ours_gets_no_page(tmp_path: Path) -> None:
    """T82: a site whose name leads here by DNS rebinding could otherwise read the page as its own."""
    async with pages_on(tmp_path, admin_url="https://quotas.example") as on:
        for path in ("/", "/admin", *paths_of("admin")):
            assert (await fetch(on.http, on.admin_url + path, headers={"host": "evil.example"})).status == 421
        own = await fetch(on.http, f"{on.admin_url}/admin/", headers={"host": "quotas.example"})
        assert own.status == 200


async def test_without_self_service_users_have_no_page(tmp_path: Path) -> None:
    """The page of administrators is there all the same."""
    async with pages_on(tmp_path, "self_service: false\n") as on:
        for path in paths_of("usage"):
            reply = await fetch(on.http, on.url + path)
            assert (reply.status, reply.error["type"]) == (404, "invalid_request_error"), path
        assert (await fetch(on.http, f"{on.admin_url}/admin/")).status == 200


# ---------------------------------------------------------------------------------------------------------------- log


@pytest.mark.parametrize("page", ["admin", "usage"])
async def test_a_page_that_is_opened_fills_no_log(page: str, tmp_path: Path) -> None:
    """A file that is not there has a line, without what the client asked for."""
    async with pages_on(tmp_path) as on:
        with capture_logs() as logs:
            for path in paths_of(page):
                reply = await fetch(on.http, listener_of(on, page) + path)
                etag = reply.headers["etag"]
                await fetch(on.http, listener_of(on, page) + path, headers={"if-none-match": etag})
            assert [line for line in logs if line["event"] == "request"] == []
            await fetch(on.http, f"{listener_of(on, page)}{ROOTS[page]}/common/secret-name.js?key=secret-value")
        [line] = [line for line in logs if line["event"] == "request"]
    assert line["status"] == 404
    assert "secret" not in str(line)


# ------------------------------------------------------------------------------------------------------- below a path


def references(url: str, text: str) -> set[str]:
    """What a document or a module of JavaScript loads."""
    if url.endswith(".js"):
        return {urljoin(url, name) for name in re.findall(r'(?:^|[^\w])(?:from|import)\s+"([./][^"]*)"', text)}
    return {urljoin(url, name) for name in re.findall(r'(?:src|href)="([^"]+)"', text)}


@pytest.mark.parametrize("page", ["admin", "usage"])
async def test_a_page_works_below_a_path_of_another_server(page: str, tmp_path: Path) -> None:
    """Redirects and links are relative, also those of modules, and no file is left that no other loads."""
    async with pages_on(tmp_path) as on, below(listener_of(on, page), PREFIX) as origin:
        first = f"{origin}{PREFIX}{DOCUMENTS[page].lstrip('/')}"
        if page == "admin":
            for path in (PREFIX, f"{PREFIX}admin"):
                reply = await fetch(on.http, origin + path)
                assert urljoin(origin + path, reply.headers["location"]) == first
        found, waiting = set[str](), [first]
        while waiting:
            url = waiting.pop()
            found.add(url)
            reply = await fetch(on.http, url)
            assert reply.status == 200, url
            assert reply.headers["content-security-policy"] == CSP
            waiting += references(url, reply.body.decode()) - found - set(waiting)
    assert found == {f"{origin}{PREFIX}{path.lstrip('/')}" for path in paths_of(page)}
