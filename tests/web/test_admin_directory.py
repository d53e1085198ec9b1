"""Users, keys and admin keys over the admin API, in force at once, on real sockets and both engines."""

import asyncio
import csv
import io
import json
from pathlib import Path

import pytest

from proxy.identity.keys import id_of
from tests.admin import ADMINS, SAME_ORIGIN, ask, log_in, problem
from tests.builders import NOON
from tests.stage import STAFF, Stage, key_of, stage

LAB = "  lab: {quotas: {daily: {tokens: 1M, per: day}}}\n"
POLICY = STAFF.replace("users:\n", f"{LAB}users:\n") + ADMINS
HOUR = 3_600_000


async def status_with(on: Stage, key: str) -> int:
    """The status of a request of this key to the API listener."""
    async with on.http.get(f"{on.url}/v1/models", headers={"authorization": f"Bearer {key}"}) as response:
        return response.status


async def etag_of(on: Stage, path: str) -> dict[str, str]:
    """The header for a change of the resource as it is now."""
    return {"if-match": (await ask(on, "GET", path)).headers["etag"]}


# -------------------------------------------------------------------------------------------------------------- users


@pytest.mark.every_engine
async def test_a_user_is_added_changed_cut_off_and_let_in_again(tmp_path: Path) -> None:
    """Each change is in force in this process before its answer."""
    async with stage(POLICY, folder=tmp_path) as on:
        body = {"id": "dora", "groups": ["staff"], "email": "dora@example.org"}
        reply = await ask(on, "POST", "/users", json=body)
        assert reply.status == 201
        assert reply.json() == {
            "user": "database:dora",
            "source": "database",
            "id": "dora",
            "groups": ["staff"],
            "email": "dora@example.org",
            "is_service": False,
            "created_at": NOON,
            "created_by": "admin:ops",
            "disabled_at": None,
            "forgotten_at": None,
            "linked": [],
        }
        assert reply.headers["etag"] == (await etag_of(on, "/users/dora"))["if-match"]
        key = (await ask(on, "POST", "/users/dora/keys", json={})).json()["key"]
        assert await status_with(on, key) == 200
        match = await etag_of(on, "/users/dora")
        reply = await ask(on, "PATCH", "/users/database:dora", admin="ops", headers=match, json={"groups": ["lab"]})
        assert (reply.json()["groups"], reply.json()["email"]) == (["lab"], "dora@example.org")
        match = {"if-match": reply.headers["etag"]}
        reply = await ask(on, "POST", "/users/dora/disable", admin="ops", headers=match, json={"cut": True})
        assert reply.json()["disabled_at"] == NOON
        assert await status_with(on, key) == 401
        match = {"if-match": reply.headers["etag"]}
        assert (await ask(on, "POST", "/users/dora/enable", admin="ops", headers=match)).status == 200
        assert await status_with(on, key) == 200
        match = await etag_of(on, "/users/dora")
        reply = await ask(on, "POST", "/users/dora/forget", admin="ops", headers=match)
        assert reply.json()["pseudonym"].startswith("forgotten:")
        assert await status_with(on, key) == 401
        rows = [(row["actor"], row["action"], row["address"]) for row in await on.rows("audit")]
        assert rows == [
            ("admin:ops", action, "127.0.0.1")
            for action in "user.add key.create user.set user.disable user.enable user.forget".split()
        ]
        assert all(row["request_id"].startswith("req_") for row in await on.rows("audit"))


async def test_what_is_not_possible_is_a_problem_with_its_field(tmp_path: Path) -> None:
    async with stage(POLICY, folder=tmp_path) as on:
        assert problem(await ask(on, "GET", "/users/nobody")) == (404, "not-found")
        assert problem(await ask(on, "GET", "/keys/nothing")) == (404, "not-found")
        await ask(on, "POST", "/users", json={"id": "dora"})
        reply = await ask(on, "POST", "/users", json={"id": "dora"})
        assert (problem(reply), reply.json()["field"]) == ((409, "conflict"), "id")
        any_version = {"if-match": "*"}
        reply = await ask(on, "PATCH", "/users/alice", admin="ops", headers=any_version, json={"groups": []})
        assert (problem(reply), reply.json()["field"]) == ((422, "validation"), "user")
        assert "change the file" in reply.json()["detail"]


async def test_users_are_listed_in_pages(tmp_path: Path) -> None:
    """The cursor is that of the last page; a text is looked for in ids and addresses."""
    async with stage(POLICY, folder=tmp_path) as on:
        users = [{"id": f"u{number}", "email": f"{number}@lab.example"} for number in range(5)]
        reply = await ask(on, "POST", "/users/import?dry_run=true", json={"users": users})
        assert reply.json()["added"] == [f"u{number}" for number in range(5)]
        page = (await ask(on, "GET", "/users")).json()
        assert ([user["user"] for user in page["data"]], page["next"]) == (["alice", "bob"], None)
        await ask(on, "POST", "/users/import", json={"users": users})
        found, next = [], ""
        for count in (2, 2, 2, 1):
            page = (await ask(on, "GET", f"/users?limit=2{next}")).json()
            assert len(page["data"]) == count
            found += [user["user"] for user in page["data"]]
            next = f"&after={page['next']}"
        assert page["next"] is None
        assert found == ["alice", "bob", *(f"database:u{number}" for number in range(5))]
        page = (await ask(on, "GET", "/users?text=3@LAB")).json()
        assert [user["id"] for user in page["data"]] == ["u3"]


async def test_a_user_of_a_header_source_is_linked_and_unlinked(tmp_path: Path) -> None:
    source = "identity: {headers: [{name: sso, key: key-of-the-source-0123456789, user: X-User, unmapped: staff}]}"
    async with stage(f"{POLICY}\n{source}\n", folder=tmp_path) as on:
        match = await etag_of(on, "/users/alice")
        body = {"source": "sso", "id": "al ice"}
        reply = await ask(on, "POST", "/users/alice/identities", admin="ops", headers=match, json=body)
        assert reply.json()["linked"] == ["sso:al ice"]
        assert (await ask(on, "DELETE", "/identities/sso:al%20ice")).status == 204
        assert problem(await ask(on, "DELETE", "/identities/sso:al%20ice")) == (404, "not-found")


# ---------------------------------------------------------------------------------------------- conditions of changes


@pytest.mark.every_engine
async def test_of_two_administrators_who_edit_a_user_the_second_hears_it(tmp_path: Path) -> None:
    """T90: also if both send their changes at the same moment. Without a version nothing is changed."""
    async with stage(POLICY, folder=tmp_path) as on:
        await ask(on, "POST", "/users", json={"id": "dora"})
        match = await etag_of(on, "/users/dora")
        replies = await asyncio.gather(
            *(
                ask(on, "PATCH", "/users/dora", admin="ops", headers=match, json={"groups": [g]})
                for g in ("staff", "lab")
            )
        )
        assert sorted(reply.status for reply in replies) == [200, 412]
        groups = (await ask(on, "GET", "/users/dora")).json()["groups"]
        assert groups == next(reply.json()["groups"] for reply in replies if reply.status == 200)
        assert problem(await ask(on, "PATCH", "/users/dora", json={"groups": []})) == (428, "precondition-required")


@pytest.mark.every_engine
async def test_a_repeated_creation_makes_one_key(tmp_path: Path) -> None:
    """The second answer has the same id and not the key. The same Idempotency-Key for another key is a conflict."""
    async with stage(POLICY, folder=tmp_path) as on:
        once = {"idempotency-key": "7f3c"}
        sent = [
            ask(on, "POST", "/users/alice/keys", admin="ops", headers=once, json={"label": "ci"}) for _ in range(4)
        ]
        replies = [reply.json() for reply in await asyncio.gather(*sent)]
        assert len({reply["id"] for reply in replies}) == 1
        assert sorted(reply["key"] is None for reply in replies) == [False, True, True, True]
        assert len(await on.rows("api_keys")) == 1
        reply = await ask(on, "POST", "/users/alice/keys", admin="ops", headers=once, json={"label": "other"})
        assert (problem(reply), reply.json()["field"]) == ((409, "conflict"), "idempotency-key")


@pytest.mark.every_engine
async def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path: Path) -> None:
    """Not even an entry in the audit log, and no key that would be shown."""
    async with stage(POLICY, folder=tmp_path) as on:
        reply = await ask(on, "POST", "/users?dry_run=true", json={"id": "dora", "groups": ["lab"]})
        assert (reply.status, reply.json()["groups"]) == (201, ["lab"])
        assert (await ask(on, "POST", "/users/alice/keys?dry_run=true", json={})).json()["key"] is None
        assert problem(await ask(on, "POST", "/users?dry_run=true", json={"id": ""})) == (422, "validation")
        for table in ("users", "api_keys", "audit"):
            assert await on.rows(table) == []


# --------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.every_engine
async def test_a_key_is_shown_once_labelled_rotated_and_revoked(tmp_path: Path) -> None:
    """No later answer has its text, and the database has its digest alone."""
    async with stage(POLICY, folder=tmp_path) as on:
        body = {"label": "ci", "models": ["fast"], "networks": ["127.0.0.0/8"], "expires_at": NOON + HOUR}
        reply = await ask(on, "POST", "/users/alice/keys", json=body)
        assert reply.status == 201
        id, key = reply.json()["id"], reply.json()["key"]
        assert id_of(key) == id
        assert await status_with(on, key) == 200
        found = (await ask(on, "GET", "/keys?user=alice")).json()["data"]
        assert [(each["id"], each["label"], each["models"]) for each in found] == [(id, "ci", ["fast"])]
        before = await etag_of(on, f"/keys/{id}")
        await on.server.directory.write_used()
        shown = (await ask(on, "GET", f"/keys/{id}")).json()
        assert (shown["used_at"], shown["used_from"]) == (NOON, "127.0.0.1")
        assert await etag_of(on, f"/keys/{id}") == before  # nobody has changed it
        found = (await ask(on, "POST", "/keys/find", json={"text": f"log: {key}, {key_of('bob')}"})).json()["data"]
        assert [(each["user"], each["label"]) for each in found] == [("alice", "ci"), ("bob", "")]
        match = await etag_of(on, f"/keys/{id}")
        reply = await ask(on, "PATCH", f"/keys/{id}", admin="ops", headers=match, json={"label": "build"})
        assert (reply.json()["label"], reply.json()["expires_at"]) == ("build", NOON + HOUR)
        match = {"if-match": reply.headers["etag"]}
        reply = await ask(on, "PATCH", f"/keys/{id}", admin="ops", headers=match, json={"expires_at": None})
        assert (reply.json()["label"], reply.json()["expires_at"]) == ("build", None)
        match = {"if-match": reply.headers["etag"]}
        new = await ask(on, "POST", f"/keys/{id}/rotate", admin="ops", headers=match, json={"overlap_ms": 0})
        assert await status_with(on, new.json()["key"]) == 200
        assert await status_with(on, key) == 401
        other = new.json()["id"]
        match = await etag_of(on, f"/keys/{other}")
        reply = await ask(on, "POST", f"/keys/{other}/revoke", admin="ops", headers=match, json={"cut": True})
        assert reply.json()["revoked_at"] == NOON
        assert await status_with(on, new.json()["key"]) == 401
        stored = str([await on.rows(table) for table in ("api_keys", "audit")])
        assert key.rpartition("_")[2] not in stored


# --------------------------------------------------------------------------------------------------------- admin keys


@pytest.mark.every_engine
async def test_an_admin_key_that_is_made_here_gives_its_role_until_it_is_revoked(tmp_path: Path) -> None:
    """Also to logins. What its owner does is in the audit log under its name."""
    async with stage(POLICY, folder=tmp_path) as on:
        cookie = await log_in(on, "ops")
        body = {"name": "mia", "role": "manager", "groups": ["lab"], "grant_up_to": 20}
        reply = await ask(on, "POST", "/admin-keys", headers={**cookie, **SAME_ORIGIN}, json=body)
        assert reply.status == 201
        id, sent = reply.json()["id"], {"x-api-key": reply.json()["key"]}
        assert on.server.api is not None
        of_the_proxy = {"timezone": "UTC", "api_url": None, "api_port": on.server.api.port}
        assert (await ask(on, "GET", "/session", headers=sent)).json() == {
            "name": "mia",
            "role": "manager",
            "groups": ["lab"],
            "grant_up_to": 20,
            "expires_at": None,
            **of_the_proxy,
        }
        assert problem(await ask(on, "GET", "/users", headers=sent)) == (403, "forbidden")
        login = (await ask(on, "POST", "/session", headers=sent)).headers["set-cookie"].partition(";")[0]
        listed = (await ask(on, "GET", "/admin-keys", admin="eve")).json()
        assert [(each["id"], each["name"], each["groups"]) for each in listed["data"]] == [(id, "mia", ["lab"])]
        assert [(each["name"], each["role"]) for each in listed["file"]] == [
            ("ops", "administrator"),
            ("eve", "viewer"),
            ("max", "manager"),
        ]
        match = await etag_of(on, f"/admin-keys/{id}")
        assert problem(await ask(on, "POST", f"/admin-keys/{id}/revoke"))[0] == 428
        assert (await ask(on, "POST", f"/admin-keys/{id}/revoke", admin="ops", headers=match)).status == 200
        for headers in (sent, {"cookie": login}):
            assert problem(await ask(on, "GET", "/session", headers=headers)) == (401, "unauthenticated")
        assert [row["action"] for row in await on.rows("audit")] == ["admin_key.create", "admin_key.revoke"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "a b"}, "name"),
        ({"name": "ops"}, "name"),
        ({"name": "x", "role": "manager"}, "groups"),
        ({"name": "x", "role": "viewer", "groups": ["lab"]}, "groups"),
        ({"name": "x", "role": "manager", "groups": ["lob"]}, "groups"),
        ({"name": "x", "grant_up_to": 50}, "grant_up_to"),
        ({"name": "x", "role": "root"}, "role"),
    ],
)
async def test_an_admin_key_has_the_rules_of_the_file(body: dict[str, object], field: str, tmp_path: Path) -> None:
    async with stage(POLICY, folder=tmp_path) as on:
        reply = await ask(on, "POST", "/admin-keys", json=body)
        assert reply.status in (409, 422)
        assert reply.json()["field"] == field
        assert await on.rows("admin_keys") == []


async def test_a_name_is_free_again_when_its_key_has_ended(tmp_path: Path) -> None:
    """So that a lost key can be replaced under the same name."""
    async with stage(POLICY, folder=tmp_path) as on:
        assert (await ask(on, "POST", "/admin-keys", json={"name": "ann", "expires_at": NOON + HOUR})).status == 201
        assert problem(await ask(on, "POST", "/admin-keys", json={"name": "ann"})) == (409, "conflict")
        on.clock.ms += HOUR
        assert (await ask(on, "POST", "/admin-keys", json={"name": "ann"})).status == 201
        assert problem(await ask(on, "GET", "/admin-keys/nothing")) == (404, "not-found")


async def test_the_audit_log_is_exported_as_csv(tmp_path: Path) -> None:
    """A cell with several members is JSON, so a program can read it."""
    async with stage(POLICY, folder=tmp_path) as on:
        await ask(on, "POST", "/users", json={"id": "dora", "groups": ["staff"]})
        [row] = csv.DictReader(io.StringIO((await ask(on, "GET", "/audit?format=csv")).body.decode()))
        assert (row["action"], row["target"], row["before"]) == ("user.add", "database:dora", "")
        assert json.loads(row["after"]) == {"groups": ["staff"], "is_service": False}


@pytest.mark.every_engine
async def test_an_export_that_is_not_possible_is_a_problem(tmp_path: Path) -> None:
    """PostgreSQL refuses a zero byte. The answer must not have begun then, because it would be cut off."""
    async with stage(POLICY, folder=tmp_path) as on:
        reply = await ask(on, "GET", "/audit?format=csv&actor=%00")
        assert (reply.status, reply.headers["content-type"].partition(";")[0]) in (
            (422, "application/problem+json"),
            (200, "text/csv"),
        )
