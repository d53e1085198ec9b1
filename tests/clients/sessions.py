"""A client's session: a program with one SDK beside a stage, what it must get, what it must raise, and the books.

`tests/clients/<client>_client.*` is run with the steps on its command line, and in its environment

    BASE_URL   http://127.0.0.1:port, to which it adds what its SDK wants (/v1 for OpenAI's)
    API_KEY    alice's; the step `unknown_key` uses another one, that nobody has

For each step it asks the model *of the step's name* and prints one line of JSON. Its SDK doesn't retry.

    chat, stream, responses, responses_stream   {"step": …, "text": …, "usage": …}
    tools, tools_stream                         {"step": …, "name": …, "arguments": {"term": …}, "usage": …}
                                                of a tool `look_up` with the parameter `term`
    embeddings                                  {"step": …, "dimensions": …, "usage": …}
    images                                      {"step": …, "bytes": …, "usage": …} of the one picture, unpacked
    speech                                      {"step": …, "bytes": …}
    transcription                               {"step": …, "text": …, "usage": …}
    unknown_key, unknown_model, used_up,        asked as chat
    failing
    broken_stream, cut_stream                   asked as stream

What goes wrong is {"step": …, "error": {"class": …, "message": …, "status": …, "code": …, "retry_after": …}}: the
class of the exception, and of the rest what it shows (`status` and `code` null otherwise, `retry_after` left out).

`usage` is {"input": …, "output": …}, and null or left out where the SDK shows none. A call that fails where it should
not is printed in the same way, so that the test's report shows it.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxy.simulated_media import HEARD, SOUND
from tests.stage import STAFF, Stage, key_of, stage

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ROOT / "tests" / "clients"
SECONDS_MAX = 45  # for all steps of a session; a test has sixty

POLICY = """
models:
  chat: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}
  stream: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}
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
RESET = "2026-11-25T00:00:00+00:00"
SECONDS_TO_RESET = 12 * 3600

FAULTS = ("unknown_key", "unknown_model", "used_up", "failing", "broken_stream", "cut_stream")


@dataclass(frozen=True, slots=True)
class Raised:
    """What a client raises: its class by name, and the status and the code that it shows, where it shows one."""

    name: str
    status: int | None = None
    code: str | None = None


@dataclass(frozen=True, slots=True)
class Client:
    """A program: how it is started, which steps it has, and what it raises at each of the FAULTS."""

    name: str
    command: Sequence[str | Path]
    steps: Sequence[str]
    raises: Mapping[str, Raised]
    kind: str = "openai"  # of the upstream that it is for
    env: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Line:
    """What came of a step."""

    step: str
    said: Mapping[str, Any]

    @property
    def usage(self) -> tuple[int, int] | None:
        """The tokens that the SDK says, if it says any."""
        usage = self.said.get("usage")
        return (usage["input"], usage["output"]) if usage else None


@asynccontextmanager
async def session(client: Client, folder: Path) -> AsyncIterator[Stage]:
    """A stage with all that the steps ask for, before an upstream of the client's kind."""
    async with stage(POLICY, folder=folder, kind=client.kind) as on:
        yield on


async def play(on: Stage, client: Client, steps: Sequence[str]) -> list[Line]:
    """Run the program, and return a line for each of these steps."""
    # No more than it needs: nothing of the developer's own settings, keys and proxies.
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
    lines = [Line(document.pop("step"), document) for document in documents]
    assert [line.step for line in lines] == list(steps)
    return lines


def folder_of(on: Stage) -> Path:
    """Where the stage has its files."""
    return Path(on.database.removeprefix("sqlite:///")).parent


async def check_answers(on: Stage, client: Client) -> None:
    """Play all steps: each gives what the upstream said, and the books have what the SDK was told."""
    lines = await play(on, client, client.steps)
    await on.at_rest()
    rows = {row["model"]: row for row in await on.rows("calls")}
    assert len(rows) == len(lines)
    for line in lines:
        row = rows[line.step]
        assert "error" not in line.said, line
        assert row["outcome"] == "complete", line
        _check_answer(line, row)
    given = on.simulator.given
    assert await on.used() == (given.input_tokens + given.output_tokens, 0)
    said = [line.usage for line in lines if line.usage is not None]
    unsaid = [rows[line.step] for line in lines if line.usage is None]
    assert sum(map(sum, said)) + sum(map(_tokens, unsaid)) == given.input_tokens + given.output_tokens
    await on.audit()


def _check_answer(line: Line, row: Mapping[str, Any]) -> None:
    if line.usage is not None:
        assert line.usage == (row["input_tokens"], row["output_tokens"]), line
    match line.step:
        case "embeddings":
            assert line.said["dimensions"] == 1536, line
        case "images":
            assert line.said["bytes"] == 72, line
        case "speech":
            assert line.said["bytes"] == len(SOUND), line
        case "transcription":
            assert line.said["text"] == HEARD, line
        case "tools" | "tools_stream":
            assert line.said["name"] == "look_up", line
            assert len(line.said["arguments"]["term"].split()) == row["output_tokens"] > 0, line
        case _:
            assert len(line.said["text"].split()) == row["output_tokens"] > 0, line


async def check_faults(on: Stage, client: Client) -> None:
    """Play all that goes wrong: each raises as it should, and costs what it should."""
    await _use_up(on, client)
    lines = await play(on, client, FAULTS)
    await on.at_rest()
    errors = {line.step: line.said["error"] for line in lines}
    raised = {step: Raised(error["class"], error.get("status"), error.get("code")) for step, error in errors.items()}
    assert raised == client.raises
    for step, words in {
        "unknown_key": "not known here",
        "unknown_model": "does not exist here",
        "used_up": f'Quota "staff/scarce" is used up: 1 of 1 requests. Resets at {RESET}',
        "cut_stream": "broke off",
    }.items():
        assert words in errors[step]["message"]
    # Not every exception has the response with it.
    assert errors["used_up"].get("retry_after", str(SECONDS_TO_RESET)) == str(SECONDS_TO_RESET)
    rows = {row["model"]: row for row in await on.rows("calls")}
    assert sorted(rows) == ["broken_stream", "cut_stream", "failing", "used_up"]
    assert rows["used_up"]["outcome"] == "complete"
    assert _tokens(rows["failing"]) == 0
    for step in ("broken_stream", "cut_stream"):
        assert rows[step]["provenance"] == "at_least"
        assert rows[step]["output_tokens"] >= 3
    assert await on.used() == (sum(map(_tokens, rows.values())), 0)
    await on.audit()


async def _use_up(on: Stage, client: Client) -> None:
    """Take the one request there is of this model."""
    path = "/v1/messages" if client.kind == "anthropic" else "/v1/chat/completions"
    body = {"model": "used_up", "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]}
    assert (await on.post(path, body)).status == 200


def _tokens(row: Mapping[str, Any]) -> int:
    return (row["input_tokens"] or 0) + (row["output_tokens"] or 0)


def in_python(name: str, *, python: str | Path = sys.executable) -> tuple[str | Path, ...]:
    """The command of a program beside this file, in an environment that has its SDK."""
    return (python, "-m", f"tests.clients.{name}_client")
