"""The log of a real process: each request id is in it, each line is JSON, and no key, prompt or answer is in it."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from proxy.simulator.server import Simulator
from proxy.simulator.server import serve as serve_simulator

pytestmark = pytest.mark.journey

ALICE, BOB, UPSTREAM_KEY = "sk-alice-0123456789abcdefghij", "sk-bob-0123456789abcdefghijkl", "sk-upstream-9876543210"
PROMPT = "the words of a secret prompt"
POLICY = """
server: {{api: "127.0.0.1:0", admin: "127.0.0.1:0", shutdown_delay: 0s}}
database: sqlite:///{folder}/quotas.db
retry_for: 0s
upstreams:
  simulated: {{base_url: "http://127.0.0.1:{port}/v1", api_key: "{upstream_key}", kind: simulator}}
  nowhere: {{base_url: "http://127.0.0.1:1/v1"}}
models:
  fast: {{upstream: simulated, max_output_tokens: 50}}
  gone: {{upstream: nowhere}}
groups:
  staff: {{quotas: {{daily: {{tokens: 10M, per: day}}}}}}
  empty: {{quotas: {{none: {{tokens: 0, per: day}}}}}}
users:
  alice: {{groups: [staff], keys: ["{alice}"]}}
  bob: {{groups: [empty], keys: ["{bob}"]}}
{log}
"""


@dataclass
class Running:
    """A process that serves, and the file to which its log is written."""

    url: str
    process: asyncio.subprocess.Process
    file: Path
    config: Path

    def text(self) -> str:
        """The log so far."""
        return self.file.read_text()

    def lines(self) -> list[dict[str, Any]]:
        """The lines of the log so far. Fails if one is no JSON."""
        return [json.loads(line) for line in self.text().splitlines()]

    async def line_of(self, request: str, event: str = "request") -> dict[str, Any]:
        """The line of this request. The log is written by a thread, a moment after the answer."""
        while True:
            found = [line for line in self.lines() if line.get("request") == request and line["event"] == event]
            if found:
                assert len(found) == 1, "one line for each request"
                return found[0]
            await asyncio.sleep(0.01)

    async def has(self, text: str) -> None:
        """Wait until the log has this text."""
        while text not in self.text():  # noqa: ASYNC110 - another process sets no event
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Stop it in order."""
        self.process.send_signal(signal.SIGTERM)
        assert await self.process.wait() == 0


@asynccontextmanager
async def _running(folder: Path, log: str = "", *options: str) -> AsyncIterator[Running]:
    runner, port = await serve_simulator(Simulator(UPSTREAM_KEY))
    config, file = folder / "quotas.yaml", folder / "log"
    text = POLICY.format(folder=folder, port=port, upstream_key=UPSTREAM_KEY, alice=ALICE, bob=BOB, log=log)
    config.write_text(text)
    with file.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", *options, "serve", "--config", str(config)),
            stderr=stderr,
            env={**os.environ, "COLUMNS": "80"},
        )
    try:
        while "serving" not in file.read_text():
            assert process.returncode is None, file.read_text()
            await asyncio.sleep(0.02)
        url = re.search(r'api"?[=:] ?"?(http://[0-9.:]+)', file.read_text())
        assert url
        yield Running(url[1], process, file, config)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await runner.cleanup()


@contextmanager
def _full_pipe() -> Iterator[int]:
    """The end for writing of a pipe without space, which nobody reads."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for size in (4096, 1):
        with suppress(BlockingIOError):
            while True:
                os.write(writing, b"\n" * size)
    os.set_blocking(writing, True)
    try:
        yield writing
    finally:
        os.close(writing)
        os.close(reading)


async def _accepts(port: int) -> None:
    """Wait until somebody listens at this port."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.02)
        else:
            writer.close()
            await writer.wait_closed()
            return


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["serve", "--port", "{port}"], 0),
        (["serve", "--port", "{port}", "--workers", "2"], 0),
        (["serve", "--invalid-config"], 2),
        (["serve", "--workers", "2", "--invalid-config"], 2),
        (["demo", "--port", "{port}", "--admin-port", "0"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
async def test_a_process_ends_though_nobody_reads_what_it_prints(
    arguments: list[str], code: int, tmp_path: Path
) -> None:
    """T93: its standard output and error are full from the start. It serves, and ends on SIGTERM or by itself."""
    port = _free_port()
    config = tmp_path / "quotas.yaml"
    config.write_text(POLICY.format(folder=tmp_path, port=1, upstream_key=UPSTREAM_KEY, alice=ALICE, bob=BOB, log=""))
    if "--invalid-config" in arguments:
        arguments.remove("--invalid-config")
        config.write_text("groups: {staff: {}}\n")
    if arguments[0] == "serve":
        arguments = [*arguments, "--config", str(config)]
    with _full_pipe() as full:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", *(word.format(port=port) for word in arguments)),
            stdout=full,
            stderr=full,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(30):
                if code == 0:
                    await _accepts(port)
                    process.send_signal(signal.SIGTERM)
                assert await process.wait() == code
        finally:
            if process.returncode is None:
                process.kill()  # its workers notice it
                await process.wait()


def _chat(model: str = "fast", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": PROMPT}], **more}


async def _post(
    http: aiohttp.ClientSession, url: str, body: Any, key: str | None = ALICE, path: str = "/v1/chat/completions"
) -> tuple[int, str]:
    """Send a request; the status and the request's id."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with http.post(url + path, json=body, headers=headers) as response:
        await response.read()
        return response.status, response.headers["x-request-id"]


async def test_the_id_of_an_answer_finds_what_happened(tmp_path: Path) -> None:
    """For a 200, a stream, a 429, a 401, a 400, a 404 and a 502, with nothing but the log."""
    async with _running(tmp_path) as on, aiohttp.ClientSession() as http:
        status, id = await _post(http, on.url, _chat())
        line = await on.line_of(id)
        assert (status, line["status"], line["user"], line["group"], line["model"]) == (
            200,
            200,
            "alice",
            "staff",
            "fast",
        )
        assert (line["endpoint"], line["upstream"], line["outcome"]) == ("chat", "simulated", "complete")
        assert line["provenance"] == "exactly"
        assert line["input_tokens"] > 0 < line["output_tokens"]
        assert 0 < line["own_ms"] < line["total_ms"] >= line["first_byte_ms"]
        _, id = await _post(http, on.url, _chat(stream=True))
        assert (await on.line_of(id))["outcome"] == "complete"
        status, id = await _post(http, on.url, _chat(), BOB)
        line = await on.line_of(id)
        assert (status, line["status"], line["refused_by"], line["verdict"]) == (
            429,
            429,
            ["empty/none"],
            "exhausted",
        )
        status, id = await _post(http, on.url, _chat(), "sk-of-nobody-0123456789abcdef")
        line = await on.line_of(id)
        assert (status, line["status"], line["code"], line["address"]) == (401, 401, "invalid_api_key", "127.0.0.1")
        status, id = await _post(http, on.url, _chat(stream="maybe"))
        line = await on.line_of(id)
        assert (status, line["code"], line["param"], line["user"]) == (400, "invalid_type", "stream", "alice")
        status, id = await _post(http, on.url, _chat("unknown"))
        assert (await on.line_of(id))["code"] == "model_not_found"
        status, id = await _post(http, on.url, {}, path="/v1/v1/chat/completions")
        line = await on.line_of(id)
        assert (line["status"], line["endpoint"], line["user"]) == (404, "POST /v1/v1/chat/completions", "alice")
        status, id = await _post(http, on.url, _chat("gone"))
        line = await on.line_of(id)
        assert (status, line["code"], line["outcome"], line["upstream"]) == (
            502,
            "upstream_error",
            "upstream_failed",
            "nowhere",
        )
        async with http.get(f"{on.url}/v1/quota", headers={"authorization": f"Bearer {ALICE}"}) as response:
            line = await on.line_of(response.headers["x-request-id"])
            assert (line["endpoint"], line["status"], line["user"]) == ("GET /v1/quota", 200, "alice")


async def test_a_thousand_calls_leave_no_key_prompt_or_answer_in_the_log(tmp_path: Path) -> None:
    """Each line is JSON, from the first to the last; start and stop are in it."""
    async with _running(tmp_path, "", "--verbose") as on, aiohttp.ClientSession() as http:
        answers = set()
        kinds: list[tuple[Any, str | None, str]] = [
            (_chat(), ALICE, "/v1/chat/completions"),
            (_chat(stream=True), ALICE, "/v1/chat/completions"),
            (_chat("gone"), ALICE, "/v1/chat/completions"),
            (_chat(tools=PROMPT), ALICE, "/v1/chat/completions"),
            (_chat(service_tier=PROMPT), ALICE, "/v1/chat/completions"),
            (_chat(), BOB, "/v1/chat/completions"),
            (_chat(), None, "/v1/chat/completions"),
            (_chat(), UPSTREAM_KEY, "/v1/chat/completions"),
            ({"model": "fast", "input": PROMPT}, ALICE, "/v1/responses"),
            ({"model": "fast", "input": PROMPT}, ALICE, f"/v1/unknown/{ALICE}?key={ALICE}"),
        ]
        for body, key, path in kinds * 100:
            answers.add((await _post(http, on.url, body, key, path))[0])
        assert answers >= {200, 400, 401, 404, 429, 502}
        async with http.post(
            f"{on.url}/v1/chat/completions", json=_chat(), headers={"authorization": f"Bearer {ALICE}"}
        ) as response:
            answer = (await response.json())["choices"][0]["message"]["content"]
        await on.stop()
        lines, text = on.lines(), on.text()
        assert lines[0]["event"] == "starting"
        assert [line["event"] for line in lines[1:3]] == [
            "a new database was made, in which all quotas are unused",
            "serving",
        ]
        assert (lines[0]["users"], lines[0]["database"]) == (2, f"sqlite:///{tmp_path}/quotas.db")
        assert [line["event"] for line in lines[-3:]] == ["stopping", "accepting no more calls", "stopped"]
        assert any(line["event"] == "attempt" and line["level"] == "debug" for line in lines)
        for secret in (ALICE, BOB, UPSTREAM_KEY, "secret prompt", answer):
            assert secret not in text


async def test_a_thousand_requests_with_a_secret_in_every_place_leave_none_in_the_log(tmp_path: Path) -> None:
    """A key or a prompt in the path, the query, a header, the model, a field, and in all else that it writes."""
    secrets = ("sk-verysecretkeyofsomebody", "s3cret-9f", "secretwordsofaprompt", "two secret words")
    log = "unmatched: allow"
    async with _running(tmp_path, log, "--verbose") as on, aiohttp.ClientSession() as http:
        on.config.write_text(on.config.read_text().replace("models:\n", 'models:\n  "*": {upstream: simulated}\n', 1))
        on.process.send_signal(signal.SIGHUP)
        await on.has('"policy reloaded"')
        for _ in range(9):
            for secret in secrets:
                for key in (ALICE, BOB, None):
                    for method, path, headers, body in _with_secret(secret):
                        auth = {} if key is None else {"authorization": f"Bearer {key}"}
                        async with http.request(
                            method,
                            URL(on.url + path.replace(" ", "%20"), encoded=True),
                            json=body,
                            headers={**headers, **auth},
                        ) as response:
                            await response.read()
                await _send_bare(on.url, f"{secret} / HTTP/1.1\r\n\r\n")
                await _send_bare(on.url, f"GET / HTTP/1.1\r\nHost: {secret}/\r\nX: 1\r\n\r\n")
                await _send_bare(on.url, f"GET /{secret} HTTP/1.1\r\n{secret}\r\n\r\n")
        await on.stop()
        text = on.text()
        assert sum(line["event"] == "request" for line in on.lines()) > 800
        for secret in (*secrets, "secret%20words"):
            assert secret not in text
            assert secret[:14] not in text


def _with_secret(secret: str) -> list[tuple[str, str, dict[str, str], Any]]:
    """Requests with this text in each place that a client chooses: method, path, headers, body."""
    chat = "/v1/chat/completions"
    return [
        ("POST", chat, {}, _chat(secret)),
        ("POST", chat, {}, _chat(f"gpt-{secret}")),
        ("POST", chat, {}, _chat(user=secret, stream=True)),
        ("POST", chat, {}, _chat(**{secret: "x", "stream": secret})),
        ("POST", chat, {}, _chat(**{f"mock_{secret}": "x"})),
        ("POST", chat, {}, _chat(tools=[{"type": secret}])),
        ("POST", chat, {}, {"model": "fast", "messages": [{"role": secret, "content": secret}]}),
        ("POST", f"{chat}?{secret}={secret}&api-version={secret}", {}, _chat()),
        ("POST", chat, {"X-Request-Id": secret, "Idempotency-Key": secret, "User-Agent": secret}, _chat()),
        ("POST", chat, {"traceparent": secret, "tracestate": f"a={secret}"}, _chat()),
        ("POST", chat, {"X-Quota-Max-Wait": secret, "Origin": secret, "X-Forwarded-For": secret}, _chat()),
        ("POST", chat, {"Content-Encoding": secret}, _chat()),
        ("POST", chat, {"x-api-key": secret}, _chat()),
        ("POST", f"/openai/deployments/{secret}/chat/completions", {}, _chat()),
        ("POST", "/v1/responses", {}, {"model": "fast", "input": secret, "previous_response_id": secret}),
        ("POST", f"/v1/responses/{secret}/cancel", {}, None),
        ("GET", f"/v1/responses/{secret}/input_items?after={secret}", {}, None),
        ("GET", f"/v1/models/{secret}", {}, None),
        ("GET", f"/v1/{secret}", {}, None),
        ("PATCH", f"/v1/files/{secret}/{secret}", {}, None),
        ("OPTIONS", f"/{secret}/v1/chat/completions", {}, None),
    ]


async def _send_bare(url: str, text: str) -> None:
    """Send bytes that are no valid request, and read what comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", URL(url).port)
    writer.write(text.encode())
    await reader.read(1000)
    writer.close()


async def test_the_log_can_be_text_and_can_leave_out_requests(tmp_path: Path) -> None:
    """And a reload changes both at once."""
    async with _running(tmp_path, "log: {format: console, calls: refusals}") as on, aiohttp.ClientSession() as http:
        _, fine = await _post(http, on.url, _chat())
        _, refused = await _post(http, on.url, _chat(), BOB)
        await on.has(refused)
        assert "status=429" in on.text()
        assert fine not in on.text()
        on.config.write_text(on.config.read_text().replace("format: console, calls: refusals", "calls: all"))
        on.process.send_signal(signal.SIGHUP)
        await on.has('"policy reloaded"')
        _, fine = await _post(http, on.url, _chat())
        await on.has(f'"request":"{fine}"')
        on.config.write_text(on.config.read_text().replace("calls: all", "calls: none"))
        on.process.send_signal(signal.SIGHUP)
        while on.text().count('"policy reloaded"') < 2:  # noqa: ASYNC110 - another process sets no event
            await asyncio.sleep(0.01)
        _, fine = await _post(http, on.url, _chat())
        _, refused = await _post(http, on.url, _chat(), BOB)
        await on.stop()
        assert fine not in on.text()
        assert refused not in on.text()
