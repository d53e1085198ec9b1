"""Serves the files of the pages, with headers that let them load nothing from elsewhere and be framed by nobody."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import hdrs, web

from proxy.web.middleware import not_served

_FOLDER = Path(__file__).parent
_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
# What an answer to a browser has, whatever it is: nobody frames it, guesses its type, or learns its address.
SAFE_HEADERS = {"referrer-policy": "no-referrer", "x-content-type-options": "nosniff", "x-frame-options": "DENY"}
# The browser asks for each file again and gets a 304 if it is the same, so a new release never meets an old file.
_HEADERS = {
    **SAFE_HEADERS,
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    headers: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> "_File":
        content = path.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
        content_type = f"{_TYPES[path.suffix]}; charset=utf-8"
        return cls(content, {**_HEADERS, "content-type": content_type, "etag": etag})


class Page:
    """One page. `name` is admin or usage, `path` that of its document, and `files` that of its files.

    All files are read now, so a request reads no disk and can name no other file. If `is_served` says no, its paths
    are not served.
    """

    def __init__(self, name: str, *, path: str, files: str, is_served: Callable[[], bool] = lambda: True) -> None:
        self._is_served = is_served
        self._files = {path: _File.read(_FOLDER / f"{name}.html")}
        for folder in ("common", name):
            for source in sorted((_FOLDER / folder).iterdir()):
                if source.suffix in _TYPES:
                    self._files[f"{files}/{folder}/{source.name}"] = _File.read(source)

    def routes(self) -> list[web.RouteDef]:
        """The routes, for an application's router."""
        return [web.get(path, self._serve) for path in self._files]

    def has_served(self, request: web.Request, status: int | None) -> bool:
        """Whether this was a request for one of its files, which need no line in the log."""
        return status in (200, 304) and request.path in self._files

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if not self._is_served():
            return await not_served(request)
        file = self._files[request.path]
        # A server in front that compresses makes the tag a weak one: W/"…".
        if file.headers["etag"] in request.headers.get(hdrs.IF_NONE_MATCH, ""):
            return web.Response(status=304, headers=file.headers)
        return web.Response(body=file.content, headers=file.headers)
