"""A client of the admin API of a stage.

async with stage(f"{STAFF}{ADMINS}", folder=tmp_path) as on:
    reply = await ask(on, "GET", "/session")                     # with the key of ops
    cookie = await log_in(on, "eve")
    reply = await ask(on, "DELETE", "/session", headers=cookie | SAME_ORIGIN)
"""

import io
import json as jsons
from collections.abc import Mapping
from typing import Any

from tests.stage import Reply, Stage

ADMINS = """
admin_keys:
  ops: admin-key-of-ops-0123456789
  eve: {key: admin-key-of-eve-0123456789, role: viewer}
  max: {key: admin-key-of-max-0123456789, role: manager, groups: [staff], grant_up_to: 50%}
"""
SAME_ORIGIN = {"sec-fetch-site": "same-origin"}


def admin_key(name: str) -> str:
    """The key of an admin in ADMINS."""
    return f"admin-key-of-{name}-0123456789"


async def ask(
    on: Stage,
    method: str,
    path: str,
    *,
    admin: str | None = None,
    headers: Mapping[str, str] | None = None,
    json: Any = None,
    data: bytes | io.IOBase | None = None,
) -> Reply:
    """A request to a path below `/admin/api`. It has the key of ops unless it has another one, or headers."""
    if admin is None and headers is None:
        admin = "ops"
    sent = {} if admin is None else {"authorization": f"Bearer {admin_key(admin)}"}
    if json is not None:
        data, sent = jsons.dumps(json).encode(), {**sent, "content-type": "application/json"}
    url = f"{on.admin_url}/admin/api{path}"
    async with on.http.request(method, url, headers={**sent, **(headers or {})}, data=data) as response:
        reply = Reply(response.status, response.headers.copy(), await response.read())
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["server"] == "llm-quota-proxy"
    if reply.status >= 400:
        problem = reply.json()
        assert reply.headers["content-type"] == "application/problem+json"
        assert problem["status"] == reply.status
        assert problem["request_id"] == reply.headers["x-request-id"]
    return reply


def problem(reply: Reply) -> tuple[int, str]:
    """The status of a problem and the end of its type."""
    return reply.status, reply.json()["type"].removeprefix("/admin/api/problems/")


async def log_in(on: Stage, admin: str = "ops") -> dict[str, str]:
    """Log in, and return the header with the cookie."""
    reply = await ask(on, "POST", "/session", headers=SAME_ORIGIN, json={"key": admin_key(admin)})
    assert reply.status == 201
    return {"cookie": reply.headers["set-cookie"].partition(";")[0]}


async def change(on: Stage, method: str, path: str, json: Any = None, *, admin: str = "ops", of: str = "") -> Reply:
    """A change of a resource on its version of now. `of` is the path at which it is read, if that is another one."""
    etag = (await ask(on, "GET", of or path, admin=admin)).headers["etag"]
    return await ask(on, method, path, admin=admin, headers={"if-match": etag}, json=json)


async def make_quota(on: Stage, id: str, **fields: Any) -> Reply:
    """Make a quota that is not there yet."""
    group, name = id.split("/")
    path = f"/groups/{group}/quotas/{name}"
    reply = await ask(on, "PUT", path, admin="ops", headers={"if-none-match": "*"}, json=fields)
    assert reply.status == 200, reply.body
    return reply


async def write_notices(on: Stage) -> None:
    """Write the refusals and crossings of now, which the process would write in a moment."""
    live = on.server.live
    live.events.tick()  # which finds the crossings
    live.notices.add(*live.activity.take_notices(is_last=True))
    await live.notices.write()
