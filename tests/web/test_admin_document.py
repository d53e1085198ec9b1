"""The admin API does what its OpenAPI document says, for requests that are made from the document."""

import json
import random
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from yarl import URL

from proxy.policy.amounts import Measure
from proxy.web.admin.operations import Operation
from tests.admin import ADMINS, SAME_ORIGIN, admin_key, ask
from tests.openapi import Document
from tests.stage import STAFF, Reply, Stage, key_of, stage
from tests.web.test_admin_changes import CHANGES, Asked, all_reads, filled, finish, operation_of, refuse, send

POLICY = STAFF + ADMINS
JSON = "application/json"
# Of each operation. Half of them have something that the document does not allow.
REQUESTS = 12


@pytest.mark.every_engine
@pytest.mark.slow
async def test_no_answer_is_outside_of_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is sent: no 500, no status, content type or member that the document lacks."""
    monkeypatch.setattr("proxy.web.admin.failures.FAILURES_MAX", 10**6)
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    async with stage(POLICY, folder=tmp_path) as on:
        words = ["alice", "database:dora", "dora", "staff", "gpt-4o-mini", "staff/daily", "day", "sso:x"]
        document = Document((await ask(on, "GET", "/openapi.json")).json(), words=words)
        await ask(on, "POST", "/users", json={"id": "dora", "groups": ["staff"]})
        todo = [each for each in document.operations() for _ in range(REQUESTS)]
        draw.shuffle(todo)
        succeeded = set()
        for path, method, operation in todo:
            if "text/event-stream" in str(operation["responses"]):
                continue
            request = _request(document, path, operation, draw)
            status, found = await _send(on, method, request)
            shown = f"seed {seed}: {method} {request}: {status} {found!r}"
            response = operation["responses"].get(str(status))
            assert status < 500, shown
            assert response is not None, shown
            content = document.resolve(response).get("content")
            if content is None:
                assert found == (None, b""), shown
                continue
            type, body = found
            assert type in content, shown
            if type.endswith("json"):
                value = orjson.loads(body)
                assert not document.mistakes(value, content[type]["schema"]), shown
                if isinstance(value, dict) and status == 201 and "id" in value:
                    words.append(value["id"])
            if status < 300:
                succeeded.add(operation["operationId"])
        # Else the requests would be refused before they reach anything.
        assert len(succeeded) >= len({each[2]["operationId"] for each in todo}) // 2


async def test_every_operation_succeeds_as_the_document_says(tmp_path: Path) -> None:
    """A valid request to each: its body, its status and each member of its answer are those of the document."""
    async with filled(tmp_path) as (on, ids):
        document = Document((await ask(on, "GET", "/openapi.json")).json(), words=[])
        operations = {each["operationId"]: each for _, _, each in document.operations()}
        done = set()

        def check(operation: Operation, reply: Reply, body: Any = None) -> None:
            said = operations[operation.id]
            assert reply.status == operation.status, (operation.id, reply.body)
            if body is not None:
                schema = said["requestBody"]["content"][JSON]["schema"]
                assert not document.mistakes(body, schema), operation.id
            content = document.resolve(said["responses"][str(reply.status)]).get("content")
            if content is None:
                assert reply.body == b"", operation.id
            else:
                assert reply.headers["content-type"] == JSON
                assert not document.mistakes(reply.json(), content[JSON]["schema"]), operation.id
            done.add(operation.id)

        ids["refusal"] = await refuse(on)
        for asked in CHANGES:
            for query in ("?dry_run=true", ""):
                reply = await send(on, asked, ids, query=query)
                check(operation_of(on, asked), reply, asked.body)
            await finish(on, asked, reply, ids)
        for operation, path in all_reads(on, ids):
            check(operation, await ask(on, "GET", path))
        for method, path, body in (
            ("POST", "/session", {"key": admin_key("eve")}),
            ("DELETE", "/session", None),
            ("POST", "/keys/find", {"text": f"{key_of('alice')} and nothing"}),
            ("POST", "/policy/check", {"yaml": "upstreams: {}"}),
        ):
            headers = {} if body is None else SAME_ORIGIN
            admin = None if path == "/session" and method == "POST" else "ops"
            reply = await ask(on, method, path, admin=admin, headers=headers, json=body)
            check(operation_of(on, Asked(method, path)), reply, body)
        assert operations.keys() - done == {"get_events"}


def _request(document: Document, path: str, operation: Any, draw: random.Random) -> dict[str, Any]:
    """The parts of a request for an operation."""
    is_wild = draw.random() < 0.5
    query, headers = {}, {"authorization": f"Bearer {admin_key('ops')}"}
    for parameter in operation["parameters"]:
        name, schema = parameter["name"], parameter["schema"]
        if not parameter["required"] and draw.random() < 0.7:
            continue
        if parameter["in"] == "path":
            text = document.text(schema, draw).replace(".", "") or "x"  # a client resolves dots before it sends
            path = path.replace(f"{{{name}}}", quote(text, safe=""))
        elif parameter["in"] == "query":
            value = document.value(schema, draw, is_wild=is_wild)
            if value is not None:
                query[name] = str(value).lower() if isinstance(value, bool) else str(value)
        elif not (is_wild and draw.random() < 0.3):
            headers[name] = "*" if name.startswith("If-") else draw.choice(["one", "two"])
    made: dict[str, Any] = {"path": path, "query": query, "headers": headers}
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"][JSON]["schema"]
        made["body"] = json.dumps(document.value(schema, draw, is_wild=is_wild)).encode()
    return made


async def _send(on: Stage, method: str, request: dict[str, Any]) -> tuple[int, tuple[str | None, bytes]]:
    query = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in request["query"].items())
    url = URL(f"{on.admin_url}{request['path']}?{query}", encoded=True)
    headers = {**request["headers"], **({"content-type": JSON} if "body" in request else {})}
    async with on.http.request(method, url, headers=headers, data=request.get("body")) as response:
        body = await response.read()
        return response.status, (response.content_type if body else None, body)


async def test_the_document_says_what_a_form_has_to_know(tmp_path: Path) -> None:
    """Which fields are limits, and which are instants."""
    async with stage(POLICY, folder=tmp_path) as on:
        schemas = (await ask(on, "GET", "/openapi.json")).json()["components"]["schemas"]
    for name in ("Quota", "QuotaFields", "SetQuota", "SetModelQuota"):
        fields = schemas[name]["properties"]
        assert [each for each in fields if fields[each].get("x-measure") == each] == list(Measure), name
    assert schemas["NewGrantFields"]["properties"]["until"]["format"] == "epoch-ms"
    assert schemas["NewKeyFields"]["properties"]["expires_at"]["anyOf"][0]["format"] == "epoch-ms"
