"""The command `events`: what it prints, and what it does when the connection breaks or the key is refused."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from click.testing import CliRunner, Result

from proxy.cli import main
from proxy.commands.events import NotWatchable, Printer, Stream, watch
from tests.stage import STAFF, stage, until

KEY = "admin-key-of-ops-0123456789abcdef"
HELLO: Any = {"model": "fast", "messages": [{"role": "user", "content": "Hello"}]}

HEALTH = {"replica": "one", "ledger": "ok", "policy": "abc", "reloaded_at": 0, "reload_mistakes": 0}
LEVEL = {"measure": "input_tokens", "limit": 100, "used": 83, "held": 5, "remaining": 12, "percent": 83.0}
COUNTER = {"at": 0, "user": None, "group": "staff", "quota": "staff/pot", "shared": True, "limits": [LEVEL]}
BEGUN = {
    **{"id": "c1", "user": "ann", "group": "staff", "model": "fast", "key_id": "", "key": "", "endpoint": "/v1/x"},
    **{"address": "::1", "began_at": 1000, "held_input": 3, "held_output": 100},
}
ENDED = {
    **{"id": "c1", "user": "ann\x1b[31m", "group": "staff", "model": "fast", "outcome": "completed"},
    **{"input_tokens": 3, "output_tokens": 9, "provenance": "reported", "ended_at": 2000},
}
REFUSED = {
    **{"request_id": "req_1", "at": 3000, "user": "ann", "quota": "staff/daily", "model": "fast", "needed": 30},
    **{"verdict": "exhausted", "measure": "tokens", "limit": 100, "used": 95, "held": 0},
}
SNAPSHOT = {"replica": "one", "calls": [BEGUN], "counters": [COUNTER], "health": HEALTH}
CALLS = {"replica": "one", "begun": [BEGUN], "begun_more": 7, "ended": [ENDED], "ended_more": 0}


def sent(name: str, data: object, id: str | None = None) -> bytes:
    """An event as the listener sends it."""
    line = f"id: {id}\n" if id else ""
    return f"{line}event: {name}\ndata: {json.dumps(data)}\n\n".encode()


class Listener:
    """Answers each request with the next of its answers: bytes of a stream, or a whole response."""

    def __init__(self, *answers: bytes | web.Response) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[str | None, str | None]] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        headers = request.headers
        self.requests.append((headers.get("last-event-id"), headers.get("authorization")))
        answer = self.answers.pop(0)
        if isinstance(answer, web.Response):
            return answer
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        await response.write(answer)
        if answer.endswith(b"\n\n"):
            return response
        assert request.transport is not None
        request.transport.abort()  # within an event
        return response


@asynccontextmanager
async def listening(*answers: bytes | web.Response) -> AsyncIterator[Listener]:
    """A listener on a real socket."""
    listener = Listener(*answers)
    application = web.Application()
    application.router.add_get("/admin/api/events", listener.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    listener.url = f"http://127.0.0.1:{runner.addresses[0][1]}/admin/api/events"
    try:
        yield listener
    finally:
        await runner.cleanup()


class Stopped(Exception):
    """Ends a `watch` that would connect once more."""


def pauses(noted: list[float], stop_after: int) -> Callable[[float], Any]:
    """A pause that takes no time, is noted, and stops the watching after so many."""

    async def pause(seconds: float) -> None:
        noted.append(seconds)
        if len(noted) == stop_after:
            raise Stopped

    return pause


def events_of(text: str) -> list[tuple[str | None, str]]:
    """The ids and names of printed events."""
    lines = [json.loads(line) for line in text.splitlines()]
    return [(line["id"], line["event"]) for line in lines]


async def test_a_broken_stream_is_resumed_without_printing_anything_twice(capsys: pytest.CaptureFixture[str]) -> None:
    """A batch that was cut off comes again as a whole. Pauses grow until there is a connection that gives events."""
    whole = sent("calls", CALLS) + sent("counters", {"counters": []}, "one:2")
    full = [web.json_response({"detail": "There are too many open streams."}, status=503) for _ in range(2)]
    noted: list[float] = []
    async with listening(
        sent("snapshot", SNAPSHOT, "one:1") + whole[:-20],
        *full,
        whole + sent("health", HEALTH, "one:3"),
        sent("snapshot", SNAPSHOT, "two:9"),
    ) as listener:
        watching = watch(
            *(Stream(listener.url, KEY), Printer(as_json=True)),
            since_id=None,
            is_followed=True,
            pause=pauses(noted, 5),
        )
        with pytest.raises(Stopped):
            await watching
    said = capsys.readouterr()
    assert events_of(said.out) == [
        *[("one:1", "snapshot"), (None, "calls"), ("one:2", "counters"), ("one:3", "health"), ("two:9", "snapshot")]
    ]
    assert [id for id, _ in listener.requests] == [None, "one:1", "one:1", "one:1", "one:3"]
    assert {key for _, key in listener.requests} == {f"Bearer {KEY}"}
    assert noted == [0.5, 1, 2, 0.5, 0.5]
    assert said.err.count("The connection is lost") == 3
    assert said.err.count("There is still no connection (There are too many open streams.)") == 2
    assert said.err.count("Connected again.") == 2
    assert said.err.count("Some events are lost") == 1


async def test_without_follow_it_ends_after_how_things_stand(capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each thing, in the zone of the machine, and nothing in it that would control a terminal."""
    everything = b"".join(
        (
            *(sent("snapshot", SNAPSHOT), sent("calls", CALLS), sent("refusals", {"refusals": [REFUSED], "more": 2})),
            sent("change", {"at": 0, "actor": "cli:eve", "action": "quota.set", "target": "staff/daily"}),
            *(sent("calls", {"of": "another release"}), sent("weather", {"is": "fine"}, "one:1")),
        )
    )
    async with listening(everything) as listener:
        await watch(Stream(listener.url, KEY), Printer(as_json=False), since_id="one:0", is_followed=False)
    said = capsys.readouterr()
    lines = [line[9:] for line in said.out.splitlines()]
    begun = "begun c1: ann (staff) fast, holds 3 + 100 tokens"
    pot = "staff/pot (all): 83 of 100 input tokens (5 held)"
    assert lines == [
        *("one: ledger ok, policy abc, 1 calls in flight", begun, pot, begun),
        *("ended c1: ann?[31m fast completed, 3 + 9 tokens", "7 more calls have begun"),
        "refused req_1: ann fast by staff/daily (exhausted): 95 used and 0 held of 100 tokens, 30 needed",
        *("2 more calls were refused", "cli:eve: quota.set staff/daily"),
        *('calls {"of": "another release"}', 'weather {"is": "fine"}'),
    ]
    assert "Some events are lost" in said.err


@pytest.mark.parametrize(
    ("answer", "code", "text"),
    [
        (web.json_response({"detail": "This is no admin key."}, status=401), 1, "This is no admin key."),
        (web.Response(text="<html>", content_type="text/html"), 1, "no admin listener"),
        (web.Response(status=307, headers={"location": "http://127.0.0.1:1/"}), 1, "answers 307"),
        (web.Response(status=503), 2, "answers 503"),
        (b"data: cut off", 2, "can't be read"),
    ],
)
async def test_what_does_not_help_to_repeat_ends_it(answer: Any, code: int, text: str) -> None:
    """A refused key, another kind of server, and a first connection that gives nothing."""
    async with listening(answer) as listener:
        watching = watch(
            *(Stream(listener.url, KEY), Printer(as_json=True)),
            since_id=None,
            is_followed=True,
            pause=pauses([], 1),
        )
        with pytest.raises((NotWatchable, Stopped)) as raised:
            await watching
    if answer != b"data: cut off":
        assert isinstance(raised.value, NotWatchable)
        assert (raised.value.code, text in str(raised.value)) == (code, True)


def _run(*arguments: str, key: str = KEY, input: str | None = None) -> Result:
    return CliRunner().invoke(main, ["events", *arguments], env={"LLM_QUOTA_ADMIN_KEY": key}, input=input)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--url", "ftp://x"), "write a URL"),
        (("--url", "http://ann:key@x"), "without a key"),
        (("--url", "http://[::1"), "write a URL"),
        (("--url", "http://127.0.0.1:1"), "can't be read"),
        (("--url", "http://127.0.0.1:1", "--since-id", "é"), "no id of an event"),
        (("--config", "{folder}/null.yaml"), "--url"),
        (("--config", "{folder}/127.0.0.1:0.yaml"), "--url"),
        (("--config", "{folder}/0.0.0.0:1.yaml"), "http://127.0.0.1:1/admin/api/events can't be read"),
        (("--config", "{folder}/[::]:1.yaml"), "http://[::1]:1/admin/api/events can't be read"),
    ],
)
def test_a_wrong_address_says_what_to_do(arguments: tuple[str, ...], text: str, tmp_path: Path) -> None:
    """With exit code 2."""
    for address in ("null", "127.0.0.1:0", "0.0.0.0:1", "[::]:1"):
        (tmp_path / f"{address}.yaml").write_text(
            f"server: {{admin: {'null' if address == 'null' else json.dumps(address)}}}\n"
            "upstreams: {up: {base_url: 'http://127.0.0.1:1/v1', kind: simulator}}\nmodels: {fast: {upstream: up}}\n"
        )
    result = _run(*(each.replace("{folder}", str(tmp_path)) for each in arguments))
    assert (result.exit_code, text in result.stderr, result.stdout) == (2, True, ""), result.stderr


def test_the_key_comes_from_standard_input_too() -> None:
    """An empty one is refused, and one that could be no header."""
    for text in ("", "a\nb"):
        result = _run("--url", "http://127.0.0.1:1", key="", input=text)
        assert (result.exit_code, "no admin key" in result.stderr) == (2, True)
    assert "can't be read" in _run("--url", "http://127.0.0.1:1", key="", input=f"{KEY}\n").stderr


async def test_it_follows_a_running_proxy_until_it_is_interrupted(tmp_path: Path) -> None:
    """As a process, with the key in its environment. SIGINT ends it with exit code 0 and no word."""
    async with stage(f"{STAFF}admin_keys: {{ops: {KEY}}}\n", folder=tmp_path) as on:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "events", "--follow", "--json", "--url", on.admin_url),
            env={**os.environ, "LLM_QUOTA_ADMIN_KEY": KEY},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            first = json.loads(await process.stdout.readline())
            assert first["event"] == "snapshot"
            assert (await on.post("/v1/chat/completions", HELLO)).status == 200
            ended: list[dict[str, Any]] = []
            while not ended:
                event = json.loads(await process.stdout.readline())
                ended = event["data"]["ended"] if event["event"] == "calls" else []
            assert ended[0]["user"] == "alice"
            process.send_signal(signal.SIGINT)
            assert (await process.stderr.read(), await process.wait()) == (b"", 0)
        finally:
            if process.returncode is None:
                process.kill()


async def test_events_of_a_running_proxy_are_printed_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A call, its counter, a refusal and a change: each in words, and not as JSON."""
    policy = STAFF.replace("requests: 100k", "requests: 1")
    async with stage(f"{policy}admin_keys: {{ops: {KEY}}}\n", folder=tmp_path) as on:
        stream = Stream(f"{on.admin_url}/admin/api/events", KEY)
        watching = asyncio.get_running_loop().create_task(
            watch(stream, Printer(as_json=False), since_id=None, is_followed=True)
        )
        await until(lambda: on.server.live.events.streams == 1)
        for status in (200, 429):
            assert (await on.post("/v1/chat/completions", HELLO)).status == status
        headers = {"authorization": f"Bearer {KEY}"}
        async with on.http.post(f"{on.admin_url}/admin/api/users", json={"id": "bob"}, headers=headers) as made:
            assert made.status == 201
        printed = ""
        while "user.add" not in printed:
            await asyncio.sleep(0)
            printed += capsys.readouterr().out
        watching.cancel()
        await asyncio.wait([watching])
    for text in ("begun ", "ended ", "staff/daily alice: ", "1 of 1 requests", "refused req_", "admin:ops: user.add"):
        assert text in printed, printed
    assert "{" not in printed


async def test_a_closed_pipe_ends_it(tmp_path: Path) -> None:
    """As behind `head -1`: at the next event, with exit code 0 and no word."""
    async with stage(f"{STAFF}admin_keys: {{ops: {KEY}}}\n", folder=tmp_path) as on:
        reading, writing = os.pipe()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "events", "--follow", "--url", on.admin_url),
            env={**os.environ, "LLM_QUOTA_ADMIN_KEY": KEY},
            stdout=writing,
            stderr=asyncio.subprocess.PIPE,
        )
        os.close(writing)
        try:
            assert await asyncio.to_thread(os.read, reading, 10)
            os.close(reading)
            assert (await on.post("/v1/chat/completions", HELLO)).status == 200
            assert process.stderr is not None
            assert (await process.stderr.read(), await process.wait()) == (b"", 0)
        finally:
            if process.returncode is None:
                process.kill()
