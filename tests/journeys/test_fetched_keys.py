"""Calls to an upstream whose key is fetched from an issuer, with both on real sockets."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from proxy.upstreams.credentials import RETRY_MAX_S
from tests.bare_upstream import connections
from tests.stage import Stage, config_of, fast_timers, stage, until
from tests.upstreams.test_credentials import Issuer

pytestmark = pytest.mark.journey

CHAT = "/v1/chat/completions"
CLIENT_SECRET = "s3cret-of-the-client"
RESPONSE = "resp_0123456789abcdef"
FIRST, SECOND = (f"eyJ0eXAiOiJKV1QiLCJhbGciOiJSUzI1NiJ9.{name * 40}.sign-{name}" for name in ("one", "two"))

POLICY = """
  guarded: {{base_url: "{guarded}", kind: {kind}, api_key: {api_key}}}
models:
  guarded: {{upstream: guarded, max_output_tokens: 100}}
  fast:
    upstreams: [{{upstream: guarded}}, {{upstream: simulated, model: gpt-4o-mini, weight: 0}}]
    max_output_tokens: 100
groups:
  staff: {{quotas: {{daily: {{tokens: 1M, requests: 100k, per: day}}}}}}
users:
  alice: {{groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}}
"""


class Guarded:
    """An upstream that answers requests with one of the `accepted` keys, and all others with a 401.

    It repeats the key in a header and in the text of its answer, and in its errors too.
    """

    def __init__(self, *accepted: str) -> None:
        self.accepted = set(accepted)
        self.requests: list[str] = []  # the first line of each, and its key

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length:")[2].split("\r\n")[0])
        await reader.readexactly(length)
        key = next(line for line in head.split("\r\n") if line.lower().startswith("authorization: ")).split()[2]
        self.requests.append(f"{head.split(' HTTP')[0]} {key}")
        status, body = 200, self._answer(head, key)
        if key not in self.accepted:
            status, body = 401, {"error": {"message": f"Bad token {key}", "type": "x", "param": None, "code": None}}
        data = json.dumps(body).encode()
        top = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nOpenAI-Version: {key}\r\n"
        writer.write(f"{top}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        writer.close()

    def _answer(self, head: str, key: str) -> Any:
        if "/responses" in head.split("\r\n")[0]:
            usage = {"input_tokens": 3, "output_tokens": 5, "total_tokens": 8}
            more = {"status": "completed", "model": "m", "output": [], "usage": usage, "metadata": {"key": key}}
            return {"id": RESPONSE, "object": "response", **more}
        if head.startswith("GET"):
            return {"object": "list", "data": [{"id": "listed"}]}
        message = {"role": "assistant", "content": f"Your key is {key}."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        return {"id": "c1", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}

    @property
    def keys(self) -> list[str]:
        """The keys of the requests."""
        return [request.split()[-1] for request in self.requests]


@dataclass
class Journey:
    """The stage, the issuer and the upstream."""

    on: Stage
    issuer: Issuer
    guarded: Guarded

    async def ask(self, model: str = "guarded") -> tuple[int, dict[str, str], str]:
        """Send a call. Returns its status, headers and body."""
        reply = await self.on.post(CHAT, {"model": model, "messages": [{"role": "user", "content": "Hi"}]})
        return reply.status, {name.lower(): value for name, value in reply.headers.items()}, reply.body.decode()

    async def metrics(self) -> str:
        """What `/metrics` shows."""
        async with self.on.http.get(f"{self.on.admin_url}/metrics") as response:
            return await response.text()


@asynccontextmanager
async def journey(
    folder: Path, *answers: Any, accepted: tuple[str, ...] = (FIRST,), kind: str = "openai", policy: str = POLICY
) -> AsyncIterator[Journey]:
    """An upstream with a key from an issuer that gives these answers."""
    issuer, guarded = Issuer(*answers), Guarded(*accepted)
    async with connections(issuer.serve) as issuer_port, connections(guarded.serve) as port:
        url = f"http://127.0.0.1:{issuer_port}/token"
        api_key = f'{{oauth: {{token_url: "{url}", client_id: me, client_secret: {CLIENT_SECRET}}}}}'
        text = policy.format(guarded=f"http://127.0.0.1:{port}/v1", kind=kind, api_key=api_key)
        async with stage(text, folder=folder) as on:
            yield Journey(on, issuer, guarded)


@pytest.mark.parametrize("kind", ["openai", "azure"])
async def test_a_call_is_sent_with_the_token_and_shows_nothing_of_it(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The token is fetched at the start. At Azure it is a bearer token too. What repeats it is masked."""
    async with journey(tmp_path, FIRST, kind=kind) as run:
        await until(lambda: len(run.issuer.forms) == 1)
        status, headers, body = await run.ask()
        assert status == 200
        assert run.guarded.keys == [FIRST]
        assert headers["openai-version"] == "***"
        assert "Your key is ***." in body
        assert await run.on.used() == (8, 0)
        assert 'llm_quota_token_fetches_total{outcome="fetched",upstream="guarded"} 1.0' in await run.metrics()
    shown = capfd.readouterr()
    assert "the key of an upstream was fetched" in shown.out
    assert FIRST not in shown.out + shown.err and CLIENT_SECRET not in shown.out + shown.err


async def test_two_hundred_calls_with_a_rejected_token_share_one_refetch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each is sent once more and answered. It is charged once, and the old token is masked as well as the new one."""
    async with journey(tmp_path, FIRST, SECOND) as run:
        assert (await run.ask())[0] == 200
        run.guarded.accepted = {SECOND}
        found = await asyncio.gather(*(run.ask() for _ in range(200)))
        assert [status for status, _, _ in found] == [200] * 200
        assert len(run.issuer.forms) == 2
        assert run.guarded.keys.count(SECOND) == 200
        assert await run.on.used() == (201 * 8, 0)
        assert not any(key in f"{headers}{body}" for _, headers, body in found for key in (FIRST, SECOND))
        assert 'llm_quota_tries_total{outcome="answered",upstream="guarded"} 201.0' in await run.metrics()
        await run.on.audit()
    shown = capfd.readouterr()
    assert not any(secret in shown.out + shown.err for secret in (FIRST, SECOND, CLIENT_SECRET))


@pytest.mark.parametrize("answers", [(FIRST, SECOND), (FIRST, FIRST), (FIRST, 503)], ids=["new", "same", "none"])
async def test_a_call_that_stays_rejected_is_a_502_and_the_issuer_is_left_alone(
    answers: tuple[Any, ...], tmp_path: Path
) -> None:
    """It is sent twice at most, with another key the second time. Nothing is charged, and no key is shown."""
    async with journey(tmp_path, *answers, accepted=()) as run:
        found = [await run.ask() for _ in range(10)]
        assert [status for status, _, _ in found] == [502] * 10
        # A failed fetch is repeated in its time, in which the ten calls may not end on a busy machine.
        assert len(run.issuer.forms) == 2 or 503 in answers
        second = [SECOND] if SECOND in answers else []
        assert run.guarded.keys[: 1 + len(second)] == [FIRST, *second]
        assert len(run.guarded.requests) == 10 + len(second)
        assert all("eyJ" not in body and "the proxy's key" in body for _, _, body in found)
        assert await run.on.used() == (0, 0)


async def test_the_process_starts_without_the_issuer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Calls get a 503 that says when to come again, until the issuer works. Nothing is charged for them."""
    async with journey(tmp_path, 503) as run:
        await until(lambda: len(run.issuer.forms) == 1)
        status, headers, body = await run.ask()
        error = json.loads(body)["error"]
        assert (status, error["code"], error["type"]) == (503, "upstream_key_unavailable", "upstream_error")
        assert int(headers["retry-after"]) >= 1
        assert run.guarded.requests == []
        # One attempt: a second one would wait for the key once more.
        assert 'llm_quota_tries_total{outcome="unreachable",upstream="guarded"} 1.0' in await run.metrics()
        assert await run.on.used() == (0, 0)
        assert (await run.ask("fast"))[0] == 200  # another upstream of its model answers
        run.issuer.answers = [FIRST]
        with fast_timers(20):
            loop = asyncio.get_running_loop()
            end = loop.time() + RETRY_MAX_S
            while (await run.ask())[0] != 200:
                assert loop.time() < end
        assert run.guarded.keys == [FIRST]
        assert 'llm_quota_token_fetches_total{outcome="failed",upstream="guarded"}' in await run.metrics()
    logged = capfd.readouterr().out
    assert "the issuer answered with status 503, invalid_client" in logged
    assert CLIENT_SECRET not in logged


async def test_calls_wait_for_the_first_token(tmp_path: Path) -> None:
    """They are sent as soon as it is there, and one fetch is enough for all of them."""
    async with journey(tmp_path, FIRST) as run:
        run.issuer.gate.clear()
        run.on.server.upstreams.credentials._states.clear()  # as if the process had just started
        asked = [asyncio.ensure_future(run.ask()) for _ in range(20)]
        await until(lambda: len(run.issuer.forms) == 2)
        assert run.guarded.requests == []
        run.issuer.gate.set()
        assert [status for status, _, _ in await asyncio.gather(*asked)] == [200] * 20
        assert len(run.issuer.forms) == 2


async def test_a_client_that_leaves_while_its_call_waits_for_the_first_token_is_charged_nothing(
    tmp_path: Path,
) -> None:
    """Nothing was sent."""
    async with journey(tmp_path, FIRST) as run:
        await until(lambda: len(run.issuer.forms) == 1)
        run.issuer.gate.clear()
        run.on.server.upstreams.credentials._states.clear()
        call = run.on.begin(CHAT, {"model": "guarded", "messages": [{"role": "user", "content": "Hi"}]})
        await until(lambda: len(run.issuer.forms) == 2)
        await run.on.hang_up(call)
        await run.on.all_settled()
        run.issuer.gate.set()
        assert await run.on.used() == (0, 0)
        assert run.guarded.requests == []


async def test_a_list_of_models_is_fetched_with_the_token(tmp_path: Path) -> None:
    """A 401 for it leads to another key, with which the next request is sent."""
    policy = POLICY.replace("models:\n  guarded", 'models:\n  "*": {{upstream: guarded}}\n  guarded')
    async with journey(tmp_path, FIRST, SECOND, accepted=(SECOND,), policy=policy) as run:
        await run.on.get("/v1/models")
        assert run.guarded.requests == [f"GET /v1/models {FIRST}"]
        await until(lambda: len(run.issuer.forms) == 2)
        run.on.clock.ms += 60_000
        await run.on.get("/v1/models")
        await until(lambda: len(run.guarded.requests) == 2)
        assert run.guarded.requests[1:] == [f"GET /v1/models {SECOND}"]


async def test_a_stored_response_is_read_with_the_token(tmp_path: Path) -> None:
    """With the one that is current then. It is masked in what the upstream has stored."""
    async with journey(tmp_path, FIRST, SECOND) as run:
        made = await run.on.post("/v1/responses", {"model": "guarded", "input": "Hi"})
        assert (made.status, made.json()["metadata"]) == (200, {"key": "***"})
        run.guarded.accepted = {SECOND}
        rejected = await run.on.get(f"/v1/responses/{RESPONSE}")
        assert rejected.status == 502 and b"eyJ" not in rejected.body
        await until(lambda: len(run.issuer.forms) == 2)
        await run.on.server.upstreams.credentials._fetches.all_ended()
        read = await run.on.get(f"/v1/responses/{RESPONSE}")
        assert (read.status, read.json()["metadata"]) == (200, {"key": "***"})
        assert run.guarded.keys == [FIRST, FIRST, SECOND]


async def test_without_a_key_a_call_of_anthropic_s_api_gets_an_error_in_its_shape(tmp_path: Path) -> None:
    """With `Retry-After`, as OpenAI's has."""
    async with journey(tmp_path, 503, kind="anthropic") as run:
        await until(lambda: len(run.issuer.forms) == 1)
        message = {"role": "user", "content": "Hi"}
        reply = await run.on.post("/v1/messages", {"model": "guarded", "max_tokens": 9, "messages": [message]})
        assert (reply.status, reply.json()["type"]) == (503, "error")
        assert "has no key for the upstream" in reply.json()["error"]["message"]
        assert int(reply.headers["Retry-After"]) >= 1


async def test_a_reload_brings_a_command_in(tmp_path: Path) -> None:
    """Its key is fetched without a call, and the next call is sent with it."""
    async with journey(tmp_path, FIRST) as run:
        assert (await run.ask())[0] == 200
        upstream = run.on.config.catalog.upstreams["guarded"]
        code = f"print({SECOND!r}); open({str(tmp_path / 'ran')!r}, 'w')"
        text = POLICY.format(
            guarded=upstream.base_url, kind="openai", api_key=json.dumps({"command": [sys.executable, "-c", code]})
        )
        on = run.on
        simulated = on.config.catalog.upstreams["simulated"].base_url
        on.config = config_of(text, folder=tmp_path, upstream=simulated, database=on.database)
        await on.server.policies.reload()
        while not (tmp_path / "ran").exists():  # noqa: ASYNC110 - the server's job fetches it within a second
            await asyncio.sleep(0.01)
        run.guarded.accepted = {SECOND}
        assert (await run.ask())[0] == 200
        assert run.guarded.keys == [FIRST, SECOND]
