"""Runs a client program with one SDK against a stage, and checks its results, its exceptions and the charges.

A program (`python -m tests.clients <client>`, or one in another language) gets the steps on its command line, and in
its environment

    BASE_URL   http://127.0.0.1:port, to which it appends what its SDK expects (/v1 for OpenAI's)
    API_KEY    alice's key; the step `unknown_key` uses a key that belongs to no user

For each step it calls the model *with the step's name* and prints one line of JSON. Retries of its SDK are switched
off, except in the step `used_up`, in which the proxy's answer must prevent them.

    chat, stream, responses, responses_stream   {"step": …, "text": …, "usage": …}
    stream_without_usage                        the same for a stream that asks for no usage, with the number of
                                                chunks that have no choice: {…, "usage": null, "without_choices": 0}
    tools, tools_stream                         {"step": …, "name": …, "arguments": {"term": …}, "usage": …}
                                                for a tool `look_up` with the parameter `term`
    embeddings                                  {"step": …, "dimensions": …, "usage": …}
    images                                      {"step": …, "bytes": …, "usage": …}: the size of the decoded image
    speech                                      {"step": …, "bytes": …}
    transcription                               {"step": …, "text": …, "usage": …}
    unknown_key, unknown_model, used_up,        called like chat
    failing
    broken_stream, cut_stream                   called like stream

A failed step prints {"step": …, "error": {"class": …, "message": …, "status": …, "code": …, "retry_after": …}}: the
class of the exception and its attributes. `status` and `code` are null, and `retry_after` is missing, if it has none.

`usage` is {"input": …, "output": …}; it is null or missing if the SDK reports none. A step that fails unexpectedly is
printed in the same way, so the test's report shows the exception.
"""

import asyncio
import base64
import json
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxy.simulator.media import AUDIO, IMAGE, TRANSCRIPT
from proxy.simulator.text import DIMENSIONS
from tests.stage import STAFF, Stage, key_of, stage

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ROOT / "tests" / "clients"
# A Python with the SDKs whose dependencies would restrict the versions of the proxy's own.
CLIENTS_PYTHON = ROOT / ".venv-clients" / "bin" / "python"
SECONDS_MAX = 110  # for all steps; a test may take 120

POLICY = """
models:
  chat: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}
  stream: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}
  stream_without_usage: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}
  tools: {upstream: simulated, model: gpt-4o-mini+tool, max_output_tokens: 100}
  tools_stream: {upstream: simulated, model: gpt-4o-mini+tool, max_output_tokens: 100}
  responses: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}
  responses_stream: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}
  embeddings: {upstream: simulated, model: text-embedding-3-small}
  images: {upstream: simulated, model: gpt-image-2}
  speech: {upstream: simulated, model: tts-1}
  transcription: {upstream: simulated, model: gpt-4o-transcribe}
  used_up: {upstream: simulated, model: gpt-4o-mini}
  failing: {upstream: simulated, model: gpt-4o-mini+status=500}
  broken_stream: {upstream: simulated, model: gpt-4o-mini+tokens=50+error=3}
  cut_stream: {upstream: simulated, model: gpt-4o-mini+tokens=50+cut=3}
""" + STAFF[STAFF.index("groups:") :].replace(
    "quotas: {", "quotas: {scarce: {models: [used_up], requests: 1, per: day}, "
)
WORDS_BEFORE_BREAK = 3
SECONDS_TO_RESET = "43200"

FAULTS = ("unknown_key", "unknown_model", "used_up", "failing", "broken_stream", "cut_stream")
# Text that the message of the exception must contain.
MESSAGES = {
    "unknown_key": "not known here",
    "unknown_model": "does not exist here",
    "used_up": 'Quota "staff/scarce" is used up: 1 of 1 requests. Resets at 2026-11-25T00:00:00+00:00 (in 12h).',
    "cut_stream": "broke off",
}


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception of a client: the name of its class, and its status and code, if it has them."""

    name: str
    status: int | None = None
    code: str | None = None


# The exceptions of OpenAI's own SDKs, in both languages.
OPENAI = {
    "unknown_key": Raised("AuthenticationError", 401, "invalid_api_key"),
    "unknown_model": Raised("NotFoundError", 404, "model_not_found"),
    "used_up": Raised("RateLimitError", 429, "insufficient_quota"),
    "failing": Raised("InternalServerError", 500),
    "broken_stream": Raised("APIError", None, "server_error"),
    "cut_stream": Raised("APIError", None, "upstream_error"),
}


@dataclass(frozen=True, slots=True)
class Client:
    """A program: its command, its steps, and its exception for each of the FAULTS."""

    name: str
    command: Sequence[str | Path]
    steps: Sequence[str]
    raises: Mapping[str, Raised]
    kind: str = "openai"  # the kind of the upstream
    env: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a step."""

    step: str
    fields: Mapping[str, Any]

    @property
    def usage(self) -> tuple[int, int] | None:
        """The input and output tokens that the SDK reports, if it reports any."""
        usage = self.fields.get("usage")
        return (usage["input"], usage["output"]) if usage else None


@asynccontextmanager
async def session(client: Client, folder: Path) -> AsyncIterator[Stage]:
    """A stage with a model for each step, and an upstream of the client's kind."""
    async with stage(POLICY, folder=folder, kind=client.kind) as on:
        yield on


async def run(on: Stage, client: Client, steps: Sequence[str]) -> list[Result]:
    """Run the program, and return a result for each of these steps."""
    assert client.command[0] != CLIENTS_PYTHON or CLIENTS_PYTHON.exists(), "Its environment is missing: make .venv"
    # Only these variables, so that the developer's settings, keys and proxies have no effect.
    env = {"BASE_URL": on.url, "API_KEY": key_of("alice"), "HOME": str(folder_of(on)), "PATH": "/usr/bin:/bin"}
    pipe = asyncio.subprocess.PIPE
    program = await asyncio.create_subprocess_exec(
        *client.command, *steps, cwd=ROOT, env={**env, **client.env}, stdout=pipe, stderr=pipe
    )
    try:
        async with asyncio.timeout(SECONDS_MAX):
            output, errors = await program.communicate()
    finally:
        if program.returncode is None:
            program.kill()
            await program.wait()
    assert program.returncode == 0, f"{client} ended with {program.returncode}:\n{errors.decode(errors='replace')}"
    documents = [json.loads(line) for line in output.splitlines()]
    results = [Result(document.pop("step"), document) for document in documents]
    assert [result.step for result in results] == list(steps)
    return results


def folder_of(on: Stage) -> Path:
    """The folder of the stage's database."""
    return Path(on.database.removeprefix("sqlite:///")).parent


async def check(on: Stage, client: Client) -> None:
    """Run all steps: each returns the upstream's answer or raises the expected exception, and is charged exactly."""
    await _use_up(on, client)
    results = {result.step: result for result in await run(on, client, [*client.steps, *FAULTS])}
    await on.all_settled()
    rows = {row["model"]: row for row in await on.rows("calls")}
    for step in client.steps:
        _check_answer(results[step], rows[step])
    _check_errors({step: results[step].fields.get("error", {}) for step in FAULTS}, client)
    _check_charges(rows, client)
    # Refused once, so the SDK did not retry.
    assert 'quota="staff/scarce",verdict="exhausted"} 1.0' in await _metrics(on)
    given = on.simulator.reported_usage  # without the streams that broke
    broken = sum(_tokens(rows[step]) for step in ("broken_stream", "cut_stream"))
    assert await on.used() == (given.input_tokens + given.output_tokens + broken, 0)
    await on.audit()


async def _use_up(on: Stage, client: Client) -> None:
    """Use the only request that the quota of the model `used_up` allows."""
    path = "/v1/messages" if client.kind == "anthropic" else "/v1/chat/completions"
    body = {"model": "used_up", "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]}
    assert (await on.post(path, body)).status == 200


async def _metrics(on: Stage) -> str:
    async with on.http.get(f"{on.admin_url}/metrics") as response:
        return await response.text()


def _check_answer(result: Result, row: Mapping[str, Any]) -> None:
    """The result is the upstream's answer, and the reported usage is what was charged."""
    fields = result.fields
    assert "error" not in fields, result
    assert row["outcome"] == "complete", result
    if result.usage is not None:
        assert result.usage == (row["input_tokens"], row["output_tokens"]), result
        assert row["provenance"] == "exactly", result
    match result.step:
        case "embeddings":
            assert fields["dimensions"] == DIMENSIONS, result
        case "images":
            assert fields["bytes"] == len(base64.b64decode(IMAGE)), result
        case "speech":
            assert fields["bytes"] == len(AUDIO), result
        case "transcription":
            assert fields["text"] == TRANSCRIPT, result
        case "tools" | "tools_stream":
            assert fields["name"] == "look_up", result
            assert len(fields["arguments"]["term"].split()) == row["output_tokens"] > 0, result
        case "stream_without_usage":
            assert (result.usage, fields["without_choices"]) == (None, 0), result
            assert len(fields["text"].split()) == row["output_tokens"] > 0, result
        case _:
            assert len(fields["text"].split()) == row["output_tokens"] > 0, result


def _check_errors(errors: Mapping[str, Mapping[str, Any]], client: Client) -> None:
    """Each exception has the expected class, status and code, and the proxy's message."""
    raised = {
        step: Raised(error.get("class", "nothing"), error.get("status"), error.get("code"))
        for step, error in errors.items()
    }
    assert raised == client.raises
    for step, message in MESSAGES.items():
        assert message in errors[step]["message"]
    # Not every exception has the response's headers.
    assert errors["used_up"].get("retry_after", SECONDS_TO_RESET) == SECONDS_TO_RESET


def _check_charges(rows: Mapping[str, Mapping[str, Any]], client: Client) -> None:
    """Calls that the proxy refused have no row, failed calls cost nothing, broken streams cost what passed."""
    assert rows.keys() == {*client.steps, "used_up", "failing", "broken_stream", "cut_stream"}
    assert rows["used_up"]["outcome"] == "complete"
    assert _tokens(rows["failing"]) == 0
    for step in ("broken_stream", "cut_stream"):
        assert rows[step]["provenance"] == "at_least"
        assert rows[step]["output_tokens"] >= WORDS_BEFORE_BREAK


def _tokens(row: Mapping[str, Any]) -> int:
    return (row["input_tokens"] or 0) + (row["output_tokens"] or 0)


def in_python(name: str, *, python: str | Path = sys.executable) -> tuple[str | Path, ...]:
    """The command for `<name>_client.py` beside this file, with a Python that has its SDK."""
    return (python, "-m", "tests.clients", name)
