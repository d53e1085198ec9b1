"""Readers of the streams of events, and those of a stage.

async with stage(f"{STAFF}{ADMINS}", folder=tmp_path) as on:
    reader = await watch(on)                                     # with the key of ops
    assert (await reader.next())[0] == "snapshot"
    reader = await watch_own(on, "alice")                        # the user's own counters
"""

import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from tests.admin import admin_key
from tests.stage import Stage, key_of


class Reader:
    """A client that reads a stream with `fetch`."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.last_id = ""

    async def next(self) -> tuple[str, Any]:
        """The name and the data of the next event. Comments are left out."""
        name, data = "", ""
        while True:
            line = (await self.response.content.readline()).decode()
            if not line:
                raise EOFError
            field, _, value = line.rstrip("\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                data = value
            elif field == "id":
                self.last_id = value
            elif not field and name:
                return name, json.loads(data)

    async def until(self, wanted: str) -> Any:
        """The data of the next event with this name."""
        while True:
            name, data = await self.next()
            if name == wanted:
                return data

    async def to_end(self) -> None:
        """Read to the end of the stream."""
        try:
            while True:
                await self.next()
        except (EOFError, aiohttp.ClientPayloadError):  # the latter if the connection was cut
            pass


async def watch(
    on: Stage, admin: str = "ops", *, key: str | None = None, headers: Mapping[str, str] | None = None
) -> Reader:
    """Open a stream of the admin API, with the key of an admin in ADMINS or with another one."""
    return await _open(on, f"{on.admin_url}/admin/api/events", key or admin_key(admin), headers)


async def watch_own(
    on: Stage,
    user: str = "alice",
    *,
    key: str | None = None,
    headers: Mapping[str, str] | None = None,
    path: str = "/v1/quota/events",
) -> Reader:
    """Open a stream of the own counters, with the key of a user in STAFF or with another one."""
    return await _open(on, on.url + path, key or key_of(user), headers)


async def _open(on: Stage, url: str, key: str, headers: Mapping[str, str] | None) -> Reader:
    response = await on.http.get(url, headers={"authorization": f"Bearer {key}", **(headers or {})})
    on.streams.append(response)
    assert response.status == 200, await response.read()
    return Reader(response)
