"""How a request to the admin API becomes a call of a handler, and what is refused before that."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from proxy.web.admin.operations import ADMINISTRATORS, ANYBODY, READERS
from proxy.web.admin.problems import PROBLEMS
from tests.admin import ADMINS, SAME_ORIGIN, admin_key, ask, log_in, problem
from tests.stage import STAFF, key_of, stage

POLICY = STAFF + ADMINS
JSON = {"content-type": "application/json"}


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("method", "path", "sent", "expected"),
    [
        ("GET", "/nothing", {}, (404, "not-found")),
        ("GET", "", {}, (404, "not-found")),
        ("GET", "/users/", {}, (404, "not-found")),
        ("PUT", "/users", {}, (405, "method-not-allowed")),
        ("HEAD", "/users", {}, (405, "")),
        ("GET", "/users/alice/disable", {}, (405, "method-not-allowed")),
        ("GET", "/users?nope=1", {}, (400, "bad-request")),
        ("GET", "/users?limit=5&limit=6", {}, (400, "bad-request")),
        ("GET", "/users?limit=1001", {}, (400, "bad-request")),
        ("GET", "/users?limit=ten", {}, (400, "bad-request")),
        ("GET", "/users?after=nonsense", {}, (422, "validation")),
        ("POST", "/users?dry_run=maybe", {"json": {"id": "dora"}}, (400, "bad-request")),
        ("POST", "/users", {"data": b"{", "headers": JSON}, (400, "bad-request")),
        ("POST", "/users", {"data": b"[]", "headers": JSON}, (400, "bad-request")),
        ("POST", "/users", {"data": b'{"id": "a", "id": "b"}', "headers": JSON}, (400, "bad-request")),
        ("POST", "/users", {"data": b'{"id": "\xff"}', "headers": JSON}, (400, "bad-request")),
        ("POST", "/users", {"json": {"id": "a", "mail": "x"}}, (422, "validation")),
        ("POST", "/users", {"json": {"id": 7}}, (422, "validation")),
        ("POST", "/users", {"json": {"id": "\ud800"}}, (400, "bad-request")),
        ("POST", "/users", {"json": {"id": "a", "is_service": "true"}}, (422, "validation")),
        ("POST", "/users", {}, (422, "validation")),
        ("POST", "/users", {"data": b"id=a", "headers": {"content-type": "text/plain"}}, (415, "unsupported-type")),
        ("POST", "/users", {"data": io.BytesIO(b" " * (2**20 + 1)), "headers": JSON}, (413, "too-large")),
        ("POST", "/users", {"json": {"id": "a"}, "headers": {"idempotency-key": "a b"}}, (400, "bad-request")),
        ("GET", "/users", {"data": b"{}", "headers": JSON}, (400, "bad-request")),
        ("PATCH", "/users/alice", {"json": {}}, (428, "precondition-required")),
        ("PATCH", "/users/alice", {"json": {}, "headers": {"if-match": "abc"}}, (400, "bad-request")),
    ],
)
async def test_each_wrong_request_is_a_problem(
    method: str, path: str, sent: dict[str, Any], expected: tuple[int, str], tmp_path: Path
) -> None:
    """With the status and type that its kind has, and never a 500."""
    async with stage(POLICY, folder=tmp_path) as on:
        if method == "HEAD":
            head = {"authorization": f"Bearer {admin_key('ops')}"}
            async with on.http.head(f"{on.admin_url}/admin/api{path}", headers=head) as response:
                assert response.status == 405
            return
        reply = await ask(on, method, path, admin="ops", **sent)
        assert problem(reply) == expected
        assert reply.json()["title"] == PROBLEMS[expected[1]][1]


async def test_a_problem_names_the_wrong_fields(tmp_path: Path) -> None:
    """The first one in `field`, and all of them in `errors` if there are several. No value is repeated."""
    async with stage(POLICY, folder=tmp_path) as on:
        body = {"id": "a", "groups": ["staff", 7], "mail": "secret-value", "is_service": "secret-value"}
        reply = await ask(on, "POST", "/users", json=body)
        assert reply.json()["field"] == "groups.1"
        assert [each["field"] for each in reply.json()["errors"]] == ["groups.1", "is_service", "mail"]
        assert reply.json()["errors"][2]["detail"] == "there is no such field"
        assert b"secret-value" not in reply.body
        reply = await ask(on, "POST", "/users", json={"id": "a", "groups": ["stuff"]})
        assert (reply.json()["field"], reply.json()["errors"]) == ("groups", [])
        assert reply.json()["detail"] == 'There is no group "stuff"; did you mean "staff"?'
        reply = await ask(on, "GET", "/users?limit=0")
        assert reply.json()["field"] == "limit"
        reply = await ask(on, "PUT", "/users/alice")
        assert reply.headers["allow"] == "GET, PATCH"


async def test_an_unreachable_database_is_a_503(tmp_path: Path) -> None:
    """With Retry-After, and nothing about the database."""
    async with stage(POLICY, folder=tmp_path) as on:
        await on.server._users._store.close()
        reply = await ask(on, "GET", "/users")
        assert problem(reply) == (503, "unavailable")
        assert reply.headers["retry-after"] == "5"


async def test_a_fault_is_a_500_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log has the exception, and the answer the id of the request."""

    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a secret")

    async with stage(POLICY, folder=tmp_path) as on:
        monkeypatch.setattr("proxy.administration.directory.DirectoryAdministration.users", fail)
        with capture_logs() as logs:
            reply = await ask(on, "GET", "/users")
        assert problem(reply) == (500, "internal")
        assert b"secret" not in reply.body
        [failed] = [line for line in logs if line["event"] == "a request failed"]
        assert failed["request"] == reply.json()["request_id"]


@pytest.mark.every_engine
async def test_strange_texts_find_nothing_and_break_nothing(tmp_path: Path) -> None:
    """T88: signs of patterns are ordinary characters, and what the database can't store is the client's fault."""
    async with stage(POLICY, folder=tmp_path) as on:
        assert (await ask(on, "POST", "/users", json={"id": "a%b_c/d:e ü"})).status == 201
        assert (await ask(on, "POST", "/users", json={"id": "axbyc"})).status == 201
        for text, count in (("%25b_", 1), ("%25%25%25%25", 0), ("_", 1), ("'%20OR%20''='", 0), ("AXB", 1)):
            reply = await ask(on, "GET", f"/users?text={text}")
            assert len(reply.json()["data"]) == count
        reply = await ask(on, "GET", "/users/database:a%25b_c%2Fd:e%20%C3%BC")
        assert reply.json()["id"] == "a%b_c/d:e ü"
        for path in ("/users?text=%00", "/users/%00", "/keys/%00", "/users/database:%F0%9F%98%80%00"):
            assert (await ask(on, "GET", path)).status in (200, 404, 422)
        assert problem(await ask(on, "POST", "/users", json={"id": "a\x00"})) == (422, "validation")


# -------------------------------------------------------------------------------------------------------------- roles


def rows(on: Any) -> list[Any]:
    return on.server._admin._rows


async def test_each_role_may_do_what_its_rows_say(tmp_path: Path) -> None:
    """A viewer changes nothing, a manager sees no members and no keys. The request is refused before it is read."""
    async with stage(POLICY, folder=tmp_path) as on:
        for each in rows(on):
            path = re.sub(r"\{[a-z]+\}", "nobody", each.path)
            for admin, role in (("ops", "administrator"), ("eve", "viewer"), ("max", "manager")):
                is_endless = each.content_type == "text/event-stream" and role in each.roles
                if each.roles == ANYBODY or is_endless:
                    continue
                reply = await ask(on, each.method, path, admin=admin, json=None)
                is_refused = reply.status == 403
                assert is_refused == (role not in each.roles), (each.id, admin)
                if is_refused:
                    assert problem(reply) == (403, "forbidden")


async def test_only_administrators_change_users_and_keys(tmp_path: Path) -> None:
    """The rows say so; this says what the rows must say."""
    async with stage(POLICY, folder=tmp_path) as on:
        for each in rows(on):
            if each.is_change and each.path.startswith(("/users", "/keys", "/identities", "/admin-keys")):
                assert each.roles == ADMINISTRATORS, each.id
            if each.path.startswith(("/users", "/keys", "/admin-keys")):
                assert each.roles <= READERS, each.id
            assert not (each.is_change and "viewer" in each.roles), each.id
            assert each.method != "GET" or not each.is_change, each.id


# ------------------------------------------------------------------------------------------------------------ the log


async def test_a_request_has_a_line_with_the_admins_name_and_no_secret(tmp_path: Path) -> None:
    """As every request to the API. Scrapes and health checks have none."""
    async with stage(POLICY, folder=tmp_path) as on:
        with capture_logs() as logs:
            cookie = await log_in(on, "eve")
            await ask(on, "GET", "/users/secret-in-the-path?text=secret", headers=cookie)
            await ask(on, "GET", "/secret-path")
            for path in ("/metrics", "/healthz"):
                await (await on.http.get(on.admin_url + path)).read()
        lines = [line for line in logs if line["event"] == "request"]
        assert [(line["endpoint"], line["status"], line["admin"]) for line in lines] == [
            ("POST /admin/api/session", 201, "eve"),
            ("GET /admin/api/users/{user}", 400, "eve"),
            ("GET /admin/api/{path}", 404, "ops"),
        ]
        shown = str(logs)
        for secret in (admin_key("eve"), admin_key("ops"), cookie["cookie"].partition("=")[2], "secret"):
            assert secret not in shown


# ------------------------------------------------------------------------------------------------------ the document


def references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "$ref":
                yield each
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


async def test_the_document_is_whole(tmp_path: Path) -> None:
    """Every row is there, with its parameters, answers and problems, and every reference leads to something."""
    async with stage(POLICY, folder=tmp_path) as on:
        assert problem(await ask(on, "GET", "/openapi.json", headers={"accept": "*/*"})) == (401, "unauthenticated")
        document = (await ask(on, "GET", "/openapi.json", admin="max")).json()
        assert document["openapi"] == "3.1.0"
        assert {"title", "version"} <= document["info"].keys()
        ids = []
        for each in rows(on):
            made = document["paths"][f"/admin/api{each.path}"][each.method.lower()]
            ids.append(made["operationId"])
            assert made["summary"].endswith(".")
            in_path = [found["name"] for found in made["parameters"] if found["in"] == "path"]
            assert in_path == re.findall(r"\{(\w+)\}", each.path)
            assert str(each.status) in made["responses"]
            assert {"400", "421", "500", "503"} <= made["responses"].keys()
            assert ("428" in made["responses"]) == each.needs_match
            assert ("requestBody" in made) == (each.body is not None)
            names = {found["name"] for found in made["parameters"]}
            assert ("dry_run" in names) == each.is_change
            assert ("Idempotency-Key" in names) == each.is_repeatable
        assert len(ids) == len(set(ids)) == sum(len(methods) for methods in document["paths"].values())
        for reference in references(document):
            found: Any = document
            for step in reference.removeprefix("#/").split("/"):
                found = found[step]
        schemas = document["components"]["schemas"]
        assert schemas["NewUser"]["additionalProperties"] is False
        assert schemas["ProblemDetails"]["required"]
        assert orjson.dumps(document)


async def test_each_answer_is_as_the_document_says(tmp_path: Path) -> None:
    """The members that a schema requires are those that answers have."""
    async with stage(POLICY, folder=tmp_path) as on:
        document = (await ask(on, "GET", "/openapi.json")).json()
        user = (await ask(on, "POST", "/users", json={"id": "dora"})).json()
        assert user.keys() == document["components"]["schemas"]["UserAnswer"]["properties"].keys()
        new = (await ask(on, "POST", "/users/dora/keys", json={})).json()
        key = (await ask(on, "GET", f"/keys/{new['id']}")).json()
        assert key.keys() == document["components"]["schemas"]["KeyAnswer"]["properties"].keys()


async def test_the_api_listener_has_no_document(tmp_path: Path) -> None:
    """T91: neither with a user's key nor with an admin's."""
    async with stage(POLICY, folder=tmp_path) as on:
        for key in (key_of("alice"), admin_key("ops")):
            head = {"authorization": f"Bearer {key}", **SAME_ORIGIN}
            async with on.http.get(f"{on.url}/admin/api/openapi.json", headers=head) as response:
                assert response.status == 404
