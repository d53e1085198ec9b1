"""Every change and every answer of the admin API: dry runs, versions, roles, repetitions, and no secrets.

`CHANGES` has a request that succeeds for each operation that changes something, in an order in which all of them do.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from proxy.config.values import digest
from proxy.ledger.schema import metadata
from proxy.web.admin.operations import Operation
from tests.admin import ADMINS, admin_key, ask, log_in, make_quota, problem, write_notices
from tests.builders import HOUR, NOON
from tests.events import watch
from tests.stage import STAFF, UPSTREAM_KEY, Reply, Stage, key_of, stage

SOURCE_KEY = "key-of-the-source-0123456789"
POLICY = (
    STAFF.replace("users:\n", "  lab: {quotas: {daily: {tokens: 1M, per: day}}}\nusers:\n")
    + ADMINS
    + f"identity: {{headers: [{{name: sso, key: {SOURCE_KEY}, user: X-User, unmapped: staff}}]}}\n"
)
HANGS: Any = {"model": "fast", "messages": [{"role": "user", "content": "Hi"}], "metadata": {"simulate": "hang"}}
GOOD: Any = {"model": "fast", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
# What processes write about themselves, whatever administrators do.
OF_PROCESSES = {"owners", "replicas", "feed"}


@dataclass(frozen=True)
class Asked:
    """A request that changes something. Its path may have ids of earlier answers; `read_at` has the version."""

    method: str
    path: str
    body: Any = None
    read_at: str | None = None
    named: str | None = None


GRANT = {"quota": "staff/daily", "measure": "tokens", "amount": 5, "until": NOON + HOUR, "reason": "exam"}
CHANGES = [
    Asked("POST", "/users", {"id": "dora", "groups": ["staff"]}),
    Asked("POST", "/users/import", {"users": [{"id": "emil", "groups": ["lab"]}]}),
    Asked("PATCH", "/users/dora", {"groups": ["lab"]}, "/users/dora"),
    Asked("POST", "/users/dora/keys", {"label": "ci"}, named="key"),
    Asked("PATCH", "/keys/{key}", {"label": "build"}, "/keys/{key}"),
    Asked("POST", "/keys/{key}/rotate", {"overlap_ms": 0}, "/keys/{key}", named="rotated"),
    Asked("POST", "/keys/{rotated}/revoke", {}, "/keys/{rotated}"),
    Asked("POST", "/users/dora/disable", {}, "/users/dora"),
    Asked("POST", "/users/dora/enable", None, "/users/dora"),
    Asked("POST", "/users/dora/identities", {"source": "sso", "id": "d"}, "/users/dora"),
    Asked("DELETE", "/identities/sso:d"),
    Asked("POST", "/admin-keys", {"name": "ann"}, named="admin"),
    Asked("POST", "/admin-keys/{admin}/revoke", None, "/admin-keys/{admin}"),
    Asked("POST", "/groups", {"name": "art"}),
    Asked("POST", "/groups", {"name": "bio", "models": ["fast"]}),
    Asked("PUT", "/groups", {"names": ["bio", "art"]}, "/groups"),
    Asked("PUT", "/groups/art", {"models": ["fast", "gpt-*"]}, "/groups/art"),
    Asked("PUT", "/groups/art/members/alice"),
    Asked("PUT", "/groups/art/quotas/hourly", {"requests": 5, "per": "1h"}),
    Asked("PUT", "/groups/art/quotas/hourly", {"requests": 6, "per": "1h"}, "/groups/art/quotas/hourly"),
    Asked("PUT", "/groups/art/quotas", {"quotas": [{"name": "b", "tokens": 9, "per": "7d"}]}, "/groups/art/quotas"),
    Asked(
        "PUT",
        "/quotas",
        {"model": "fast", "quotas": [{"group": "art", "requests": 3, "per": "6h"}]},
        "/quotas?model=fast",
    ),
    Asked("DELETE", "/groups/art/quotas/b", None, "/groups/art/quotas/b"),
    Asked("POST", "/grants", GRANT, named="grant"),
    Asked("DELETE", "/grants/{grant}"),
    Asked("POST", "/counters/reset", {"user": "alice"}),
    Asked("POST", "/calls/{call}/end"),
    Asked("DELETE", "/groups/art/members/alice"),
    Asked("DELETE", "/groups/art", None, "/groups/art"),
    Asked("POST", "/users/dora/forget", None, "/users/dora"),
]


async def content(on: Stage) -> dict[str, list[str]]:
    """All rows of all tables, but of those that processes write about themselves."""
    tables = [table.name for table in metadata.sorted_tables if table.name not in OF_PROCESSES]
    return {name: sorted(map(repr, await on.rows(name))) for name in tables}


def operation_of(on: Stage, asked: Asked) -> Operation:
    """The row of this request."""
    path = "/admin/api" + asked.path.replace("{", "x").replace("}", "x")
    fixed = [each for each in on.server._admin._rows if each.method == asked.method and each.has_path(path)]
    return min(fixed, key=lambda each: len(each.parameters))


@asynccontextmanager
async def filled(tmp_path: Path) -> AsyncIterator[tuple[Stage, dict[str, str]]]:
    """A stage with a call that has ended and one in flight, and the ids of what is there."""
    async with stage(POLICY, folder=tmp_path) as on:
        assert (await on.post("/v1/chat/completions", GOOD)).status == 200
        in_flight = on.begin("/v1/chat/completions", HANGS)
        calls: list[Any] = []
        while not calls:
            calls = (await ask(on, "GET", "/calls")).json()["data"]
        await on.server.rollup.run()  # else it would run at some moment
        yield on, {"call": calls[0]["id"]}
        in_flight.cancel()
        await asyncio.wait([in_flight])


def all_reads(on: Stage, ids: Mapping[str, str]) -> Iterator[tuple[Operation, str]]:
    """Each GET but the stream of events, and a path at which it finds something."""
    named = {"user": "alice", "group": "staff", "name": "daily", "request": ids["refusal"]}
    of_resource = {"keys": ids["key"], "admin-keys": ids["admin"], "grants": ids["grant"]}
    queries = {"/explain": "?user=alice&model=fast", "/usage": "?by=key"}
    for each in on.server._admin._rows:
        if each.method == "GET" and "event-stream" not in each.content_type:
            known = {**named, "id": of_resource.get(each.path.split("/")[1], "")}
            path = each.path
            for name in each.parameters:
                path = path.replace(f"{{{name}}}", known[name])
            yield each, path + queries.get(each.path, "")


async def refuse(on: Stage) -> str:
    """Have a call refused and noted. Returns the id of its request."""
    await make_quota(on, "staff/none", requests=0, per="day", models=["gpt-4o-mini"])
    refused = await on.post("/v1/chat/completions", {**GOOD, "model": "gpt-4o-mini"})
    assert refused.status == 429
    await write_notices(on)
    return refused.headers["x-request-id"]


async def send(
    on: Stage, asked: Asked, ids: dict[str, str], *, query: str = "", admin: str = "ops", headers: Any = None
) -> Reply:
    """Send this request on the version of now, unless `headers` say otherwise."""
    if headers is None:
        headers = {}
        if asked.read_at is not None:
            headers = {"if-match": (await ask(on, "GET", asked.read_at.format(**ids))).headers["etag"]}
        elif operation_of(on, asked).may_create:
            headers = {"if-none-match": "*"}
    path = asked.path.format(**ids) + query
    return await ask(on, asked.method, path, admin=admin, headers=headers, json=asked.body)


async def finish(on: Stage, asked: Asked, reply: Reply, ids: dict[str, str]) -> None:
    """Note the id of what was made, and wait until what goes on after the answer is done."""
    if asked.named is not None:
        ids[asked.named] = reply.json()["id"]
    if asked.path.endswith("/end"):
        await on.all_settled()


@pytest.mark.every_engine
async def test_a_dry_run_of_each_change_leaves_every_row_as_it_was(tmp_path: Path) -> None:
    """Then the change itself is made, and is one entry in the audit log."""
    async with filled(tmp_path) as (on, ids):
        rows = {each.id for each in on.server._admin._rows if each.is_change}
        assert {operation_of(on, asked).id for asked in CHANGES} == rows, "CHANGES has to have every operation"
        for asked in CHANGES:
            before = await content(on)
            trial = await send(on, asked, ids, query="?dry_run=true")
            assert trial.status == operation_of(on, asked).status, (asked, trial.body)
            assert await content(on) == before, asked
            made = await send(on, asked, ids)
            assert made.status == trial.status, (asked, made.body)
            assert len(await on.rows("audit")) == len(before["audit"]) + 1, asked
            await finish(on, asked, made, ids)


async def test_who_may_not_make_a_change_changes_nothing(tmp_path: Path) -> None:
    """A viewer no change at all, a manager only those of counters and grants. Nor is one made on another version."""
    async with filled(tmp_path) as (on, ids):
        for asked in CHANGES:
            before, operation = await content(on), operation_of(on, asked)
            assert problem(await send(on, asked, ids, admin="eve")) == (403, "forbidden"), asked
            if "manager" not in operation.roles:
                assert problem(await send(on, asked, ids, admin="max")) == (403, "forbidden"), asked
            if operation.needs_match:
                assert problem(await send(on, asked, ids, headers={})) == (428, "precondition-required"), asked
                reply = await send(on, asked, ids, headers={"if-match": '"0"'})
                assert problem(reply) == (412, "precondition-failed"), asked
            if operation.may_create and asked.read_at is not None:
                reply = await send(on, asked, ids, headers={"if-none-match": "*"})
                assert problem(reply) == (412, "precondition-failed"), asked
            assert await content(on) == before, asked
            await finish(on, asked, await send(on, asked, ids), ids)
        kinds = {operation_of(on, asked).path for asked in CHANGES if "manager" in operation_of(on, asked).roles}
        assert kinds == {"/grants", "/grants/{id}", "/counters/reset"}


@pytest.mark.every_engine
async def test_a_repeated_creation_does_nothing_again(tmp_path: Path) -> None:
    """It answers with the same id, and never with a secret. With another content it is a conflict."""
    async with filled(tmp_path) as (on, ids):
        for number, asked in enumerate(CHANGES):
            if not operation_of(on, asked).is_repeatable:
                await finish(on, asked, await send(on, asked, ids), ids)
                continue
            once = {"idempotency-key": f"key-{number}"}
            if asked.read_at is not None:
                once["if-match"] = (await ask(on, "GET", asked.read_at.format(**ids))).headers["etag"]
            first = await send(on, asked, ids, headers=once)
            assert first.status == 201, (asked, first.body)
            before = await content(on)
            again = await send(on, asked, ids, headers=once)
            assert again.status == 201, (asked, again.body)
            assert await content(on) == before, asked
            left_out = {"effects": None, "key": None}
            assert {**first.json(), **left_out} == {**again.json(), **left_out}, asked
            assert again.json().get("key") is None
            other = {name: value for name, value in asked.body.items() if name != "models"}
            other |= {"label": "x"} if "label" in asked.body else {}
            if other != asked.body:
                reply = await ask(on, "POST", asked.path.format(**ids), admin="ops", headers=once, json=other)
                assert (problem(reply), reply.json()["field"]) == ((409, "conflict"), "idempotency-key"), asked
            await finish(on, asked, first, ids)


# ------------------------------------------------------------------------------------------------------------ secrets


@pytest.mark.every_engine
async def test_no_answer_has_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of upstreams, admins, users, sources and the database, nor their digests: in no answer to a GET."""
    monkeypatch.setenv("CANARY", "canary-of-the-environment")
    async with filled(tmp_path) as (on, ids):
        secrets = [UPSTREAM_KEY, SOURCE_KEY, *map(admin_key, ("ops", "eve", "max")), *map(key_of, ("alice", "bob"))]
        reply = await ask(on, "POST", "/users", json={"id": "dora", "groups": ["staff"], "email": "d@example.org"})
        for path, body in (("/users/dora/keys", {"label": "ci"}), ("/admin-keys", {"name": "ann"})):
            reply = await ask(on, "POST", path, json=body)
            secrets.append(reply.json()["key"])
            ids["admin" if "name" in body else "key"] = reply.json()["id"]
        secrets.append((await log_in(on, "ops"))["cookie"].partition("=")[2])
        ids["grant"] = (await ask(on, "POST", "/grants", json=GRANT)).json()["id"]
        ids["refusal"] = await refuse(on)
        secrets += [*map(digest, secrets), "canary-of-the-environment", on.database]
        secrets += [each.rpartition("_")[2] for each in secrets if each.startswith("lqp_")]
        seen = 0
        for _, path in all_reads(on, ids):
            reply = await ask(on, "GET", path)
            assert reply.status == 200, path
            seen += 1
            for secret in secrets:
                assert secret not in reply.body.decode(), (path, secret)
        assert seen >= 25
        reader = await watch(on)
        shown = str(await reader.next())
        await on.post("/v1/chat/completions", GOOD)
        shown += str(await reader.until("calls")) + str(await reader.until("counters"))
        assert not [secret for secret in secrets if secret in shown]


CHECKED = """
upstreams:
  simulated: {base_url: "${CANARY}", api_key: "${file:CANARY_FILE}"}
groups:
  "${CANARY}": {quotas: {daily: {tokens: 5, per: "${CANARY}"}}}
  staff: {quotas: {daily: {tokens: "${CANARY:-5}", per: day}, "${CANARY_NAME}": {requests: 1, per: day}}}
users:
  "${CANARY_NAME}": {groups: [staff], keys: ["${file:CANARY_FILE}"]}
help: "${CANARY}"
timezone: "${file:CANARY_FILE}"
database: "${CANARY}"
admin_keys: {ops: "${CANARY}"}
"""


@pytest.mark.parametrize("line", [None, *range(1, len(CHECKED.splitlines()))])
async def test_a_check_of_a_file_reads_no_reference(
    line: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the file is right or has mistakes in any line: no answer has what a reference stands for."""
    monkeypatch.setenv("CANARY", "canary-of-the-environment-0123456789")
    monkeypatch.setenv("CANARY_NAME", "canaryname")
    file = tmp_path / "canary"
    file.write_text("canary-of-a-file-0123456789\n")
    lines = CHECKED.replace("CANARY_FILE", str(file)).splitlines()
    if line is not None:
        lines[line] = f"{lines[line]} made_up: [" if line % 2 else lines[line].replace("${", "$ {", 1)
    async with stage(POLICY, folder=tmp_path) as on:
        before = await content(on)
        for text in ("\n".join(lines), "\n".join(lines[: line or 5])):
            reply = await ask(on, "POST", "/policy/check", json={"yaml": text})
            assert reply.status == 200
            for canary in ("canary-of", "canaryname"):
                assert canary not in reply.body.decode()
        assert await content(on) == before
        for admin in ("eve", "max"):
            reply = await ask(on, "POST", "/policy/check", admin=admin, json={"yaml": ""})
            assert problem(reply) == (403, "forbidden")
