"""A client's session: a program with one SDK beside a stage, what it must get, what it must raise, and the books.

A program (`python -m tests.clients <client>`, or one in another language) is run with the steps on its command line,
and in its environment

    BASE_URL   http://127.0.0.1:port, to which it adds what its SDK wants (/v1 for OpenAI's)
    API_KEY    alice's; the step `unknown_key` uses another one, that nobody has

For each step it asks the model *of the step's name* and prints one line of JSON. Its SDK is told not to retry, but
for `used_up`, where our answer should tell it.

    chat, stream, responses, responses_stream   {"step": …, "text": …, "usage": …}
    stream_unasked                              the same of a stream that asks for no usage, with the number of the
                                                chunks that have no choice: {…, "usage": null, "without_choices": 0}
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
import base64
import json
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxy.simulator.media import HEARD, PICTURE, SOUND
from proxy.simulator.text import DIMENSIONS
from tests.stage import STAFF, Stage, key_of, stage

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ROOT / "tests" / "clients"
ITS_OWN = ROOT / ".venv-clients" / "bin" / "python"  # has what should not settle the versions of ours
SECONDS_MAX = 55  # for all steps; a test has sixty

POLICY = """
models:
  chat: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}
  stream: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}
  stream_unasked: {upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}
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
WORDS_BEFORE = 3  # of a stream that breaks
SECONDS_TO_RESET = "43200"

FAULTS = ("unknown_key", "unknown_model", "used_up", "failing", "broken_stream", "cut_stream")
# What must be in the message that an exception shows.
WORDS = {
    "unknown_key": "not known here",
    "unknown_model": "does not exist here",
    "used_up": 'Quota "staff/scarce" is used up: 1 of 1 requests. Resets at 2026-11-25T00:00:00+00:00 (in 12h).',
    "cut_stream": "broke off",
}


@dataclass(frozen=True, slots=True)
class Raised:
    """What a client raises: its class by name, and the status and the code that it shows, where it shows one."""

    name: str
    status: int | None = None
    code: str | None = None


# What OpenAI's own SDKs raise, in either language.
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
    assert client.command[0] != ITS_OWN or ITS_OWN.exists(), "Its environment is missing: make .venv"
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


async def check(on: Stage, client: Client) -> None:
    """Play all there is: each step gives what the upstream said or raises as it should, and the books agree."""
    await _use_up(on, client)
    lines = {line.step: line for line in await play(on, client, [*client.steps, *FAULTS])}
    await on.all_settled()
    rows = {row["model"]: row for row in await on.rows("calls")}
    for step in client.steps:
        _check_answer(lines[step], rows[step])
    _check_errors({step: lines[step].said.get("error", {}) for step in FAULTS}, client)
    _check_costs(rows, client)
    assert 'quota="staff/scarce",verdict="exhausted"} 1.0' in await _metrics(on)  # refused once, so not asked again
    given = on.simulator.given  # and nothing of the streams that it broke off
    broken = sum(_tokens(rows[step]) for step in ("broken_stream", "cut_stream"))
    assert await on.used() == (given.input_tokens + given.output_tokens + broken, 0)
    await on.audit()


async def _use_up(on: Stage, client: Client) -> None:
    """Take the one request there is of this model."""
    path = "/v1/messages" if client.kind == "anthropic" else "/v1/chat/completions"
    body = {"model": "used_up", "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]}
    assert (await on.post(path, body)).status == 200


async def _metrics(on: Stage) -> str:
    async with on.http.get(f"{on.admin_url}/metrics") as response:
        return await response.text()


def _check_answer(line: Line, row: Mapping[str, Any]) -> None:
    """It is what the upstream said, and its usage what the books have."""
    assert "error" not in line.said, line
    assert row["outcome"] == "complete", line
    if line.usage is not None:
        assert line.usage == (row["input_tokens"], row["output_tokens"]), line
        assert row["provenance"] == "exactly", line
    match line.step:
        case "embeddings":
            assert line.said["dimensions"] == DIMENSIONS, line
        case "images":
            assert line.said["bytes"] == len(base64.b64decode(PICTURE)), line
        case "speech":
            assert line.said["bytes"] == len(SOUND), line
        case "transcription":
            assert line.said["text"] == HEARD, line
        case "tools" | "tools_stream":
            assert line.said["name"] == "look_up", line
            assert len(line.said["arguments"]["term"].split()) == row["output_tokens"] > 0, line
        case "stream_unasked":
            assert (line.usage, line.said["without_choices"]) == (None, 0), line
            assert len(line.said["text"].split()) == row["output_tokens"] > 0, line
        case _:
            assert len(line.said["text"].split()) == row["output_tokens"] > 0, line


def _check_errors(errors: Mapping[str, Mapping[str, Any]], client: Client) -> None:
    """The right class, status and code, in our words."""
    raised = {
        step: Raised(error.get("class", "nothing"), error.get("status"), error.get("code"))
        for step, error in errors.items()
    }
    assert raised == client.raises
    for step, words in WORDS.items():
        assert words in errors[step]["message"]
    # Not every exception has the response with it.
    assert errors["used_up"].get("retry_after", SECONDS_TO_RESET) == SECONDS_TO_RESET


def _check_costs(rows: Mapping[str, Mapping[str, Any]], client: Client) -> None:
    """What we refused has no row of its own, what failed is free, and what broke is charged what passed."""
    assert rows.keys() == {*client.steps, "used_up", "failing", "broken_stream", "cut_stream"}
    assert rows["used_up"]["outcome"] == "complete"
    assert _tokens(rows["failing"]) == 0
    for step in ("broken_stream", "cut_stream"):
        assert rows[step]["provenance"] == "at_least"
        assert rows[step]["output_tokens"] >= WORDS_BEFORE


def _tokens(row: Mapping[str, Any]) -> int:
    return (row["input_tokens"] or 0) + (row["output_tokens"] or 0)


def in_python(name: str, *, python: str | Path = sys.executable) -> tuple[str | Path, ...]:
    """The command for `<name>_client.py` beside this file, by a Python that has its SDK: this one's, or ITS_OWN."""
    return (python, "-m", "tests.clients", name)
