"""Near the end of a quota: the maximum that the proxy writes, and upstreams that reject one that is too large."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.bare_upstream import connections
from tests.rejections import INPUT, REJECTIONS, Rejection
from tests.stage import STAFF, Stage, stage

pytestmark = pytest.mark.journey

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
HELLO = [{"role": "user", "content": "Hello"}]  # eight tokens, with those of the template
_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


class PickyUpstream:
    """An upstream that accepts a maximum of up to `allowed` tokens. It rejects others with `rejection`.

    `bodies` are the requests. It lists one model, with its `context` if it has one.
    """

    def __init__(self, allowed: int, rejection: Rejection | None = None, *, context: int | None = None) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self._allowed = allowed
        self._rejection = rejection
        self._context = context

    @property
    def maxima(self) -> list[int | None]:
        """The maximum in each of the requests."""
        return [next((body[name] for name in _FIELDS if name in body), None) for body in self.bodies]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET "):
            entry = {"id": "gpt-4o-mini", **({"max_model_len": self._context} if self._context else {})}
            return self._send(writer, 200, json.dumps({"data": [entry]}).encode())
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        self.bodies.append(json.loads(await reader.readexactly(length)))
        maximum = self.maxima[-1]
        if maximum is None or maximum <= self._allowed:
            is_message = b"POST /v1/messages" in head
            return self._send(writer, 200, json.dumps(_message() if is_message else _completion()).encode())
        if self._rejection is None:
            error = {
                "message": "max_tokens is too large",
                "type": "invalid_request_error",
                "param": None,
                "code": None,
            }
            return self._send(writer, 400, json.dumps({"error": error}).encode())
        return self._send(writer, self._rejection.status, self._rejection.body(maximum))

    @staticmethod
    def _send(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)


def _completion() -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}
    usage = {"prompt_tokens": INPUT, "completion_tokens": 2, "total_tokens": INPUT + 2}
    return {"id": "c", "object": "chat.completion", "choices": [choice], "usage": usage}


def _message() -> dict[str, Any]:
    usage = {"input_tokens": INPUT, "output_tokens": 2}
    content = [{"type": "text", "text": "Hi"}]
    return {"id": "m", "type": "message", "role": "assistant", "content": content, "usage": usage}


@asynccontextmanager
async def _picky(
    folder: Path,
    limit: str,
    allowed: int,
    rejection: Rejection | None = None,
    *,
    context: int | None = None,
    kind: str = "openai",
    model: str = "",
) -> AsyncIterator[tuple[Stage, PickyUpstream]]:
    """A proxy with this quota of one day, in front of such an upstream."""
    picky = PickyUpstream(allowed, rejection, context=context)
    policy = STAFF.replace("tokens: 1M", limit).replace("{upstream: simulated}", f"{{upstream: simulated{model}}}")
    async with connections(picky.serve) as port:
        picky.url = f"http://127.0.0.1:{port}/v1"
        async with stage(policy, folder=folder, upstream=picky.url, kind=kind) as on:
            yield on, picky


def _ask(**more: Any) -> dict[str, Any]:
    return {"model": "gpt-4o-mini", "messages": HELLO, **more}


async def _requests(on: Stage) -> int:
    """The requests that the quota has counted, after all calls are settled."""
    await on.all_settled()
    await on.audit()
    used: int = (await on.quota("staff/daily"))["requests"]["used"]
    return used


@pytest.mark.parametrize("rejection", REJECTIONS, ids=lambda each: each.vendor)
async def test_a_maximum_of_ours_that_is_rejected_is_sent_once_more_as_the_message_says(
    rejection: Rejection, tmp_path: Path
) -> None:
    """The client gets the answer, and the header tells the number that was sent. Only the answer is charged."""
    is_message = '"type": "error"' in rejection.text
    path, kind = (MESSAGES, "anthropic") if is_message else (CHAT, "openai")
    fields = {"max_tokens": 10_000} if is_message else {}
    limit = f"tokens: {rejection.sent + INPUT}"
    async with _picky(tmp_path, limit, rejection.allowed, rejection, kind=kind) as (on, picky):
        reply = await on.post(path, _ask(**fields))
        assert reply.status == 200, reply.body
        assert picky.maxima == [rejection.sent, rejection.allowed]
        assert reply.headers["x-quota-capped"] == f'{rejection.allowed}; quota="staff/daily"'
        assert await on.used() == (INPUT + 2, 0)
        assert await _requests(on) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_rejection_without_a_number_says_whose_maximum_it_was(stream: bool, tmp_path: Path) -> None:
    """It is sent once, never without a maximum, and charged as a rejected call."""
    async with _picky(tmp_path, "tokens: 3500", 2040) as (on, picky):
        reply = await on.post(CHAT, _ask(stream=stream))
        assert (reply.status, picky.maxima) == (400, [3492])
        assert reply.error["message"] == (
            "max_tokens is too large. The maximum of 3492 tokens was written by this proxy, because quota "
            '"staff/daily" has no more left for this answer.'
        )
        assert await on.used() == (0, 0)
        assert await _requests(on) == 1


async def test_a_maximum_that_is_rejected_twice_is_not_sent_again(tmp_path: Path) -> None:
    """An upstream that accepts less than it says gets two requests, and its answer says whose maximum it was."""
    rejection = next(each for each in REJECTIONS if each.vendor == "DeepSeek")
    async with _picky(tmp_path, "tokens: 3500", 100, rejection) as (on, picky):
        reply = await on.post(CHAT, _ask())
        assert (reply.status, picky.maxima) == (400, [3492, 2000])
        assert "The maximum of 2000 tokens was written by this proxy" in reply.error["message"]
        assert await _requests(on) == 1


async def test_a_client_s_own_maximum_that_is_too_large_gets_the_answer_of_the_upstream(tmp_path: Path) -> None:
    """It fits into the quota, so it is the client's mistake, and the message is unchanged."""
    rejection = next(each for each in REJECTIONS if each.vendor == "vLLM 0.11")
    async with _picky(tmp_path, "tokens: 3500", 2040, rejection) as (on, picky):
        reply = await on.post(CHAT, _ask(max_tokens=3000))
        assert (reply.status, picky.maxima) == (400, [3000])
        assert reply.body == rejection.body(3000)
        assert "x-quota-capped" not in reply.headers


async def test_a_lowered_maximum_that_is_still_too_large_is_lowered_further(tmp_path: Path) -> None:
    """The client's 10,000 do not fit into the quota; the 3,492 that fit are more than the model can answer."""
    rejection = next(each for each in REJECTIONS if each.vendor == "vLLM 0.11")
    async with _picky(tmp_path, "tokens: 3500", 2040, rejection) as (on, picky):
        reply = await on.post(CHAT, _ask(max_tokens=10_000, max_completion_tokens=5000))
        assert (reply.status, picky.maxima) == (200, [3492, 2040])
        assert picky.bodies[1]["max_tokens"] == picky.bodies[1]["max_completion_tokens"] == 2040


@pytest.mark.parametrize(
    ("limit", "listed", "model", "expected"),
    [
        ("tokens: 3500", None, ", context: 2048", None),
        ("tokens: 3500", 2048, "", None),
        ("tokens: 2047", 2048, "", 2039),
        ("tokens: 2048", 2048, "", None),
        ("output_tokens: 2047", 2048, "", None),
        ("output_tokens: 2046", 2048, "", 2040),  # rejected first, and then as the message says
        ("tokens: 3500", None, ", max_output_tokens: 2000", None),
    ],
)
async def test_a_known_context_makes_a_maximum_needless(
    limit: str, listed: int | None, model: str, expected: int | None, tmp_path: Path
) -> None:
    """The context of the file, or the one that the upstream lists. The first request is accepted."""
    rejection = next(each for each in REJECTIONS if each.vendor == "vLLM 0.11")
    opened = _picky(tmp_path, limit, 2040, rejection, context=listed, kind="vllm", model=model)
    async with opened as (on, picky):
        reply = await on.post(CHAT, _ask())
        assert (reply.status, picky.maxima[-1]) == (200, expected)
        assert len(picky.maxima) == (2 if expected == 2040 else 1)
        assert ("x-quota-capped" in reply.headers) == (expected is not None)


@pytest.mark.parametrize("kind", ["ollama", "llamacpp"])
async def test_a_context_does_not_bound_the_answers_of_servers_that_can_go_on_after_it(
    kind: str, tmp_path: Path
) -> None:
    """They accept any maximum, so it is always written."""
    async with _picky(tmp_path, "tokens: 3500", 10_000, context=2048, kind=kind) as (on, picky):
        reply = await on.post(CHAT, _ask())
        assert reply.status == 200
        [body] = picky.bodies
        assert body["n_predict" if kind == "llamacpp" else "max_tokens"] == 3492


# ------------------------------------------------------------------------------------------------------- small quotas

_REQUESTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 900},
    "/v1/responses": {"input": "Hello"},
    MESSAGES: {"messages": HELLO, "max_tokens": 900},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", _REQUESTS)
async def test_a_small_quota_admits_calls_until_a_tenth_of_it_is_left(
    path: str, stream: bool, tmp_path: Path
) -> None:
    """On 100 tokens: two answers of 40, perhaps a shorter one, and then a refusal. No call states a maximum of 10."""
    policy = STAFF.replace("tokens: 1M", "tokens: 100")
    async with stage(policy, folder=tmp_path) as on:
        body = {"model": "gpt-4o-mini", "metadata": {"simulate": "tokens=40"}, "stream": stream, **_REQUESTS[path]}
        answers = 0
        while (reply := await on.post(path, body)).status == 200:
            answers += 1
        assert (reply.status, answers in (2, 3)) == (429, True)
        assert b"left and this call may need" in reply.body or b"is used up: 100 of 100 tokens" in reply.body
        assert 80 < (await on.used())[0] <= 100


@pytest.mark.parametrize(
    ("path", "fields", "code", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "word " * 100}]}, "context_length_exceeded", None),
        (CHAT, {"messages": HELLO, "n": 100}, "exceeds_quota", "n"),
        (CHAT, {"messages": HELLO, "reasoning": {"max_tokens": 500}}, "exceeds_quota", "reasoning.max_tokens"),
        ("/v1/completions", {"prompt": ["Hello"] * 60}, "exceeds_quota", "prompt"),
        ("/v1/responses", {"input": "word " * 100}, "context_length_exceeded", None),
        ("/v1/embeddings", {"input": "word " * 101}, "context_length_exceeded", None),
        ("/v1/images/generations", {"prompt": "a fox"}, "exceeds_quota", "model"),
        ("/v1/audio/speech", {"input": "hello", "voice": "alloy", "stream_format": "sse"}, "exceeds_quota", "model"),
    ],
)
async def test_what_can_never_fit_says_which_field_is_too_large(
    path: str, fields: dict[str, Any], code: str, param: str | None, tmp_path: Path
) -> None:
    """Agents shorten their input at one code only: where that helps."""
    names = {"/v1/images/generations": "gpt-image-1", "/v1/audio/speech": "gpt-4o-mini-tts"}
    model = names.get(path, "gpt-4o-mini")
    policy = STAFF.replace("tokens: 1M", "tokens: 100")
    if path in names:
        policy = policy.replace("  fast:", f"  {model}: {{upstream: simulated}}\n  fast:")
    async with stage(policy, folder=tmp_path) as on:
        reply = await on.post(path, {"model": model, **fields})
        assert (reply.status, reply.error["code"], reply.error["param"]) == (400, code, param), reply.body
        assert reply.error["message"].startswith("This call can never fit: ")
        assert ("image" in reply.error["message"]) == ("images" in path)
        assert on.simulator.received == 0


async def test_smallest_answer_at_the_top_of_the_file_is_for_quotas_of_every_size(tmp_path: Path) -> None:
    """With 1024 a quota of 500 refuses a call without a maximum, and says which field to set."""
    policy = "smallest_answer: 1024\n" + STAFF.replace("tokens: 1M", "tokens: 500")
    async with stage(policy, folder=tmp_path) as on:
        reply = await on.post(CHAT, _ask())
        assert (reply.status, reply.error["code"], reply.error["param"]) == (
            400,
            "exceeds_quota",
            "max_completion_tokens",
        )
        assert (await on.post(CHAT, _ask(max_completion_tokens=100))).status == 200
