"""Wrong requests at the API listener get a clear error in OpenAI's shape, and nothing is charged."""

import asyncio
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from proxy.web.body_memory import REQUEST_BYTES_MAX
from tests.stage import STAFF, Reply, Stage, key_of, stage, until

HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
GOOD = {"model": "fast", "messages": HELLO}


async def _refused(on: Stage, reply: Reply, status: int, code: str | None) -> str:
    """Check that the reply is this error, and that neither the upstream nor the ledger has the call."""
    assert reply.status == status
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["server"] == "llm-quota-proxy"
    assert reply.headers["x-request-id"].startswith("req_")
    assert reply.error["code"] == code
    assert on.simulator.received == 0
    assert await on.used() == (0, 0)
    return str(reply.error["message"])


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong-key-0123456789abcdef"},
        {"authorization": f"Basic {key_of('alice')}"},
        {"authorization": f"Bearer {key_of('alice')}", "x-api-key": key_of("bob")},
        {"authorization": f"Bearer {key_of('alice').upper()}"},
    ],
    ids=["none", "wrong", "basic", "two", "upper case"],
)
async def test_no_key_or_a_wrong_one_is_a_401(headers: dict[str, str], tmp_path: Path) -> None:
    """T1: a call needs exactly one known key, spelled exactly."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, GOOD, user=None, headers=headers)
        await _refused(on, reply, 401, "invalid_api_key")


async def test_wrong_keys_ask_no_database(tmp_path: Path) -> None:
    """T5: they are looked up in memory, so a flood of them delays no call. Here the database is gone."""
    async with stage(folder=tmp_path) as on:
        (tmp_path / "quotas.db").rename(tmp_path / "aside.db")
        for number in range(200):
            reply = await on.post("/v1/chat/completions", {}, user=None, headers={"api-key": f"wrong-{number}"})
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        (tmp_path / "aside.db").rename(tmp_path / "quotas.db")


@pytest.mark.parametrize("name", ["authorization", "api-key", "x-api-key"])
async def test_the_key_may_be_in_any_of_three_headers(name: str, tmp_path: Path) -> None:
    """Those that OpenAI's, Azure's and Anthropic's clients send."""
    async with stage(folder=tmp_path) as on:
        value = key_of("alice") if name != "authorization" else f"Bearer {key_of('alice')}"
        assert (await on.post(CHAT, GOOD, user=None, headers={name: value})).status == 200


async def test_a_key_in_the_query_is_ignored(tmp_path: Path) -> None:
    """Query strings end up in logs, so a key there is not accepted."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(f"{CHAT}?api-key={key_of('alice')}", GOOD, user=None)
        await _refused(on, reply, 401, "invalid_api_key")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"not json", "not valid JSON"),
        (b"", "empty"),
        (b"[1]", "must be a JSON object"),
        (b'{"model": "fast", "MODEL": "gpt-4o", "messages": []}', "differ only in case"),
        (b'{"model": "fast", "temperature": NaN, "messages": []}', "NaN is not a JSON number"),
        (b'{"model": "fast", "messages": "\xff"}', "not valid UTF-8"),
        (b"[" * 100_000, "nested"),
    ],
)
async def test_a_body_that_is_not_unambiguous_json_is_a_400(body: bytes, message: str, tmp_path: Path) -> None:
    """The upstream has to read the same values that the quotas were checked for."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, body)
        assert message in await _refused(on, reply, 400, "invalid_json")


async def test_an_unknown_model_is_a_404_that_says_how_to_list_the_models(tmp_path: Path) -> None:
    """The list of models is closed; the message says how to get it."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, {**GOOD, "model": "gpt-9"})
        assert "GET /v1/models" in await _refused(on, reply, 404, "model_not_found")
        listed = await on.get("/v1/models/gpt-9")
        assert (listed.status, listed.error["code"]) == (404, "model_not_found")


async def test_a_model_without_a_quota_is_a_404_that_says_what_to_configure(tmp_path: Path) -> None:
    """With `unmatched: refuse`, the message names the setting that is missing."""
    policy = STAFF.replace("daily: {", "daily: {models: [gpt-4o-mini], ")
    async with stage(policy, folder=tmp_path) as on:
        reply = await on.post(CHAT, GOOD)
        assert "unmatched: allow" in await _refused(on, reply, 404, "model_not_found")
        assert [model["id"] for model in (await on.get("/v1/models")).json()["data"]] == ["gpt-4o-mini"]


async def test_a_body_over_the_limit_is_a_413(tmp_path: Path) -> None:
    """By its announced length, or only after decompression. The answer comes before the whole body."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, io.BytesIO(b" " * (REQUEST_BYTES_MAX + 1)))
        await _refused(on, reply, 413, "request_too_large")
        bomb = gzip.compress(b" " * (REQUEST_BYTES_MAX + 1))
        reply = await on.post(CHAT, bomb, headers={"content-encoding": "gzip"})
        await _refused(on, reply, 413, "request_too_large")


async def test_unsupported_content_encodings_and_types_are_a_415(tmp_path: Path) -> None:
    """T28: an unknown encoding, and a form where JSON is expected. gzip is accepted."""
    async with stage(folder=tmp_path) as on:
        compressed = gzip.compress(json.dumps(GOOD).encode())
        assert (await on.post(CHAT, b"x", headers={"content-encoding": "x-snappy"})).status == 415
        assert (await on.post(CHAT, b"x", headers={"content-type": "multipart/form-data; boundary=b"})).status == 415
        assert on.simulator.received == 0
        assert (await on.post(CHAT, compressed, headers={"content-encoding": "gzip"})).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/tomorrow"),
        ("PUT", CHAT),
        ("POST", "/v1/../admin"),
        ("POST", "/v1//chat/completions"),
        ("POST", "/v1/chat/completions/"),
        ("GET", "/metrics"),
        ("GET", "/admin/"),
    ],
)
async def test_every_other_path_is_a_404_in_openai_shape(method: str, path: str, tmp_path: Path) -> None:
    """The list of endpoints is closed, and the paths of the admin listener are not in it."""
    async with stage(folder=tmp_path) as on:
        url = on.url + path
        async with on.http.request(method, url, headers={"authorization": f"Bearer {key_of('alice')}"}) as response:
            reply = Reply(response.status, response.headers.copy(), await response.read())
        assert "Invalid URL" in await _refused(on, reply, 404, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("background", True),
        ("conversation", "conv_1"),
        ("prompt", {"id": "pmpt_1"}),
        ("tools", [{"type": "web_search"}]),
    ],
)
async def test_unsupported_fields_of_responses_are_a_400(field: str, value: Any, tmp_path: Path) -> None:
    """They cause tokens that the request does not show, or that are generated later."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post("/v1/responses", {"model": "fast", "input": "Hi", field: value})
        assert reply.error["param"] == field
        await _refused(on, reply, 400, "unsupported_parameter")


async def test_quota_lists_every_quota_of_the_caller(tmp_path: Path) -> None:
    """Those of their groups, of `everyone`, and of `default` if it can apply; no usage of other users."""
    policy = STAFF.replace("staff: {", "everyone: {quotas: {calls: {requests: 50, per: 1h}}}\n  staff: {")
    async with stage(policy, folder=tmp_path) as on:
        await on.post(CHAT, GOOD)
        assert [item["id"] for item in (await on.get("/v1/quota")).json()["data"]] == [
            "everyone/calls",
            "staff/daily",
        ]
        assert (await on.used("staff/daily", "bob")) == (0, 0)
        assert (await on.quota("everyone/calls"))["window"]["kind"] == "first_call"
        assert (await on.quota("everyone/calls", "bob"))["window"]["opened_at"] is None


async def test_an_incomplete_body_is_no_call(tmp_path: Path) -> None:
    """A client that disconnects while it sends its body does no harm; the next call is served. The log says 499."""
    async with stage(folder=tmp_path) as on:
        assert on.server.api
        reader, writer = await asyncio.open_connection("127.0.0.1", on.server.api.port)
        head = ("POST /v1/chat/completions HTTP/1.1", "Host: x", f"api-key: {key_of('alice')}", "Content-Length: 99")
        writer.write("\r\n".join((*head, "", "{")).encode())
        await writer.drain()
        with capture_logs() as logged:
            writer.close()
            await writer.wait_closed()
            del reader
            await until(lambda: bool(logged))
        assert [(line["event"], line["status"], line["user"]) for line in logged] == [("request", 499, "alice")]
        assert (await on.post(CHAT, GOOD)).status == 200
        assert on.simulator.received == 1


async def test_a_corrupt_gzip_body_is_a_400(tmp_path: Path) -> None:
    """It can't be decompressed."""
    async with stage(folder=tmp_path) as on:
        broken = gzip.compress(json.dumps(GOOD).encode())[:-12] + b"000000000000"
        reply = await on.post(CHAT, broken, headers={"content-encoding": "gzip"})
        assert reply.status == 400


async def test_refusals_of_a_user_have_a_line_on_every_path(tmp_path: Path) -> None:
    """Also where no key is needed to refuse: each has its line, and it names the user."""
    async with stage(folder=tmp_path) as on:
        with capture_logs() as logged:
            for number in range(30):
                await on.post(f"/v1/files/file-{number}", {})
                await on.post("/v1/unknown", {}, user=None)
        lines = [line for line in logged if line["event"] == "request"]
        of_alice = [line for line in lines if line.get("user") == "alice"]
        assert [line["endpoint"] for line in of_alice] == ["POST /v1/files/…"] * 30
        assert not any("address" in line for line in of_alice)
        assert len(lines) - len(of_alice) == 10
        assert {line["endpoint"] for line in lines[-1:]} <= {"POST /v1/files/…", "POST /v1/…"}
