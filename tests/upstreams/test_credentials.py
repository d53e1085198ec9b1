"""Keys that are fetched: when, from where, and what happens if that fails. The programs and the issuer are real."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from proxy.errors import UpstreamWithoutKey
from proxy.policy.catalog import Allow, KeyCommand, OAuthClient, Secret, Transport, Upstream
from proxy.upstreams.client import Upstreams
from proxy.upstreams.credentials import REJECTED_PAUSE_S, RETRY_MAX_S, Credentials
from tests.bare_upstream import connections
from tests.stage import fast_timers, until

CLIENT_SECRET = "s3cret of the client&=ä"


class Seconds:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


class Issuer:
    """Answers each request with the next of `answers`, and repeats the last.

    A text is a token of an hour, a number a status, bytes a body, a mapping its JSON, None no answer at all.
    """

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.heads: list[str] = []
        self.forms: list[dict[str, list[str]]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, once the gate is open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length:")[2].split("\r\n")[0])
        self.heads.append(head)
        self.forms.append(parse_qs((await reader.readexactly(length)).decode(), strict_parsing=True))
        await self.gate.wait()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            await reader.read()
        status = answer if isinstance(answer, int) else 200
        if isinstance(answer, str):
            answer = {"access_token": answer, "token_type": "Bearer", "expires_in": 3600}
        elif isinstance(answer, int):
            answer = {"error": "invalid_client", "error_description": f"Bad {CLIENT_SECRET}."}
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        head = f"HTTP/1.1 {status} X\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + body)
        writer.close()


@dataclass
class Fetching:
    """The keys of one upstream, its issuer, and a clock."""

    issuer: Issuer
    credentials: Credentials
    upstream: Upstream
    clock: Seconds
    outcomes: list[tuple[str, str]]

    async def current(self) -> str:
        """The key that a call would be sent with."""
        return (await self.credentials.keys(self.upstream)).current.reveal()

    async def fetched(self) -> None:
        """Fetch what is due, and wait for it."""
        self.credentials.refresh([self.upstream])
        await self.credentials._fetches.all_ended()

    async def passes(self, seconds: float) -> None:
        """Let time pass, and do what the server's job does then."""
        self.clock.s += seconds
        await self.fetched()


@asynccontextmanager
async def fetching(*answers: Any, command: KeyCommand | None = None) -> AsyncIterator[Fetching]:
    """An upstream whose key comes from such an issuer, or from a command."""
    issuer, clock, http = Issuer(*answers or ("t1",)), Seconds(), Upstreams()
    http.open()
    credentials = Credentials(http._post_form, clock=clock)
    outcomes: list[tuple[str, str]] = []
    credentials.when_fetched(lambda upstream, outcome: outcomes.append((upstream, outcome)))
    async with connections(issuer.serve) as port:
        client = OAuthClient(f"http://127.0.0.1:{port}/token?x=1", "me", Secret(CLIENT_SECRET), "a/.default b")
        try:
            upstream = Upstream("up", "http://upstream.example/v1", command or client)
            yield Fetching(issuer, credentials, upstream, clock, outcomes)
        finally:
            await credentials.close()
            await http.close()


# ----------------------------------------------------------------------------------------------------- when it is due


async def test_a_token_is_asked_for_by_the_client_credentials_grant() -> None:
    """RFC 6749 §4.4.2, with id and secret in the form. Nobody waits for it at the start."""
    async with fetching("t1") as on:
        on.credentials.refresh([on.upstream])
        assert on.issuer.forms == []
        keys = await on.credentials.keys(on.upstream)
        assert (keys.current, keys.previous, keys.is_access_token) == (Secret("t1"), None, True)
        assert on.issuer.forms == [
            {
                "grant_type": ["client_credentials"],
                "client_id": ["me"],
                "client_secret": [CLIENT_SECRET],
                "scope": ["a/.default b"],
            }
        ]
        [head] = on.issuer.heads
        assert head.startswith("POST /token?x=1 HTTP/1.1\r\n")
        assert "content-type: application/x-www-form-urlencoded\r\n" in head.lower()
        assert "authorization" not in head.lower()
        assert on.outcomes == [("up", "fetched")]


async def test_a_token_is_fetched_again_when_four_fifths_of_its_time_are_over() -> None:
    """In the background: calls have the old one meanwhile. It is remembered as the previous one."""
    async with fetching("t1", "t2") as on:
        await on.fetched()
        await on.passes(2879)
        assert len(on.issuer.forms) == 1
        on.issuer.gate.clear()
        on.clock.s += 1
        for _ in range(3):
            on.credentials.refresh([on.upstream])
        assert await on.current() == "t1"
        on.issuer.gate.set()
        await on.fetched()
        keys = await on.credentials.keys(on.upstream)
        assert keys.all == (Secret("t2"), Secret("t1"))
        assert len(on.issuer.forms) == 2


@pytest.mark.parametrize(
    ("expires_in", "due_s"),
    [
        (3600, 2880),
        ("3599", 2879.2),
        (3599.5, 2879.6),
        (1, 5),
        (10**9, 12 * 3600),
        *((strange, 2880) for strange in (None, 0, -1, "soon", "", True, [], "1e5")),
    ],
)
async def test_the_time_of_a_token_has_bounds(expires_in: object, due_s: float) -> None:
    """Without a number that makes sense it counts as an hour. Azure's older endpoint writes a text."""
    async with fetching({"access_token": "t1", "expires_in": expires_in}, "t2") as on:
        await on.fetched()
        await on.passes(due_s - 0.6)
        assert await on.current() == "t1"
        await on.passes(0.7)
        assert await on.current() == "t2"


async def test_the_same_token_again_is_no_other_key() -> None:
    """An issuer may give it as long as it is valid. The one before it stays known."""
    async with fetching("t1", "t2", "t2") as on:
        await on.fetched()
        await on.passes(2880)
        await on.passes(2880)
        assert (await on.credentials.keys(on.upstream)).all == (Secret("t2"), Secret("t1"))
        assert len(on.issuer.forms) == 3


async def test_a_reload_keeps_the_key_unless_its_source_changes() -> None:
    """Two upstreams have two keys, also from the same source. What is gone is forgotten."""
    async with fetching("t1", "t2", "t3") as on:
        await on.fetched()
        on.upstream = replace(on.upstream, allow=Allow(store=False))
        await on.fetched()
        assert await on.current() == "t1"
        assert isinstance(on.upstream.api_key, OAuthClient)
        other = replace(on.upstream, api_key=replace(on.upstream.api_key, client_id="you"))
        assert (await on.credentials.keys(other)).current == Secret("t2")
        assert (await on.credentials.keys(replace(on.upstream, name="two"))).current == Secret("t3")
        on.credentials.refresh([other, Upstream("fixed", "http://fixed.example", Secret("sk-1"))])
        assert len(on.credentials._states) == 1


# ---------------------------------------------------------------------------------------------------------- an outage


async def test_the_old_token_stays_in_use_while_the_issuer_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """Also after its end. The fetch is repeated after 1 s, 2 s, 4 s and so on, and at last each minute."""
    async with fetching("t1", 503) as on:
        await on.fetched()
        await on.passes(2880)
        pauses = [1, 2, 4, 8, 16, 32, RETRY_MAX_S, RETRY_MAX_S]
        for number, pause_s in enumerate(pauses, start=2):
            assert len(on.issuer.forms) == number
            await on.passes(pause_s - 0.5)
            assert len(on.issuer.forms) == number
            assert await on.current() == "t1"
            await on.passes(0.5)
        await on.passes(7 * 24 * 3600)
        assert await on.current() == "t1"
        on.issuer.answers = ["t2", 503]
        await on.passes(RETRY_MAX_S)
        assert await on.current() == "t2"
        await on.passes(2880)  # the pauses begin anew
        requests = len(on.issuer.forms)
        await on.passes(1)
        assert len(on.issuer.forms) == requests + 1
    logged = capsys.readouterr().out
    assert "has_old_key=True" in logged and "the issuer answered with status 503, invalid_client" in logged
    assert CLIENT_SECRET not in logged and "t1" not in logged
    assert {outcome for _, outcome in on.outcomes} == {"fetched", "failed"}


async def test_without_a_first_token_calls_are_told_when_to_come_again() -> None:
    """They wait for a fetch that is running, and not for the pause after one that has failed."""
    async with fetching(503, 503, "t1") as on:
        for _ in range(3):
            with pytest.raises(UpstreamWithoutKey) as failed:
                await on.current()
            assert (failed.value.status, failed.value.was_sent) == (503, False)
            assert failed.value.headers == {"retry-after": "1"}
            assert "issuer answered with status 503" in failed.value.reason
            assert "503" not in failed.value.message and "issuer" not in failed.value.message
        assert len(on.issuer.forms) == 1
        await on.passes(1)
        with pytest.raises(UpstreamWithoutKey) as failed:
            await on.current()
        assert failed.value.headers == {"retry-after": "2"}
        on.clock.s += 2
        assert await asyncio.gather(*(on.current() for _ in range(20))) == ["t1"] * 20
        assert len(on.issuer.forms) == 3


async def test_a_call_waits_five_seconds_for_a_first_token_and_a_fetch_takes_ten() -> None:
    """An issuer that hangs keeps nobody for longer, and a fetch of its own."""
    async with fetching(None) as on:
        with fast_timers(20):
            loop = asyncio.get_running_loop()
            begun = loop.time()
            with pytest.raises(UpstreamWithoutKey):
                await on.current()
            assert 5 <= loop.time() - begun < 9
            await on.credentials._fetches.all_ended()
            assert 10 <= loop.time() - begun < 15
        with pytest.raises(UpstreamWithoutKey) as failed:
            await on.current()
        assert failed.value.reason == "its key could not be fetched: it took more than 10 s"
        assert len(on.issuer.forms) == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (400, "the issuer answered with status 400, invalid_client"),
        (302, "the issuer answered with status 302, invalid_client"),
        (b"<html>", "the issuer's answer has no access_token that can be sent in a header"),
        *(
            (body, "the issuer's answer has no access_token that can be sent in a header")
            for body in (
                {},
                [],
                {"access_token": None},
                {"access_token": ""},
                {"access_token": "a\nb"},
                {"access_token": "ä"},
                {"access_token": ["x"]},
            )
        ),
        (b"x" * (2 * 2**20), "the issuer's answer has no access_token that can be sent in a header"),
    ],
)
async def test_an_answer_without_a_token_is_a_failure(answer: Any, reason: str) -> None:
    """Redirects are not followed: the secret would go there. Texts of an issuer are not repeated."""
    async with fetching(answer) as on:
        with pytest.raises(UpstreamWithoutKey) as failed:
            await on.current()
        assert failed.value.reason == f"its key could not be fetched: {reason}"
        assert on.outcomes == [("up", "failed")]


async def test_an_issuer_gets_none_of_the_headers_of_the_upstream() -> None:
    """On this machine it is not reached through a proxy either. Its answer has no limit for its first byte."""
    async with fetching() as on:
        transport = Transport(
            headers=(("x-gateway-token", Secret("of-the-gateway")),),
            proxy=Secret("http://127.0.0.1:1"),
            first_byte_timeout_ms=1,
        )
        on.upstream = replace(on.upstream, transport=transport)
        assert await on.current() == "t1"
    assert "x-gateway-token" not in on.issuer.heads[0].lower()


async def test_an_issuer_with_https_is_reached_through_the_proxy_of_the_upstream() -> None:
    """Which is asked for a tunnel."""
    heads = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    async with fetching() as on, connections(refuse) as port:
        assert isinstance(on.upstream.api_key, OAuthClient)
        far = replace(on.upstream.api_key, token_url="https://issuer.example/token")
        transport = Transport(proxy=Secret(f"http://me:pass-word@127.0.0.1:{port}"))
        with pytest.raises(UpstreamWithoutKey) as failed:
            await on.credentials.keys(replace(on.upstream, api_key=far, transport=transport))
    assert heads[0].startswith("CONNECT issuer.example:443 ")
    assert f"the proxy 127.0.0.1:{port}: it makes no connection (status 403)" in failed.value.reason
    assert "pass-word" not in failed.value.reason


async def test_an_issuer_that_cannot_be_reached_is_named_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    """With its address, and not with the path of its tenant."""
    async with fetching() as on:
        assert isinstance(on.upstream.api_key, OAuthClient)
        nobody = replace(on.upstream.api_key, token_url="http://127.0.0.1:1/tenant/token")
        with pytest.raises(UpstreamWithoutKey):
            await on.credentials.keys(replace(on.upstream, api_key=nobody))
    logged = capsys.readouterr().out
    assert "127.0.0.1:1: Connection refused" in logged and "tenant" not in logged


# -------------------------------------------------------------------------------------------------------------- a 401


async def test_all_calls_with_the_same_rejected_key_share_one_fetch() -> None:
    """Also those whose 401 comes when the new key is there already."""
    async with fetching("t1", "t2") as on:
        await on.fetched()

        async def is_replaced() -> bool:
            on.credentials.note_rejected(on.upstream, Secret("t1"))
            return await on.credentials.is_replaced(on.upstream, Secret("t1"))

        assert all(await asyncio.gather(*(is_replaced() for _ in range(200))))
        assert await is_replaced()
        assert len(on.issuer.forms) == 2
        assert not await on.credentials.is_replaced(on.upstream, Secret("t2"))


async def test_a_key_that_stays_rejected_is_fetched_every_ten_seconds_at_most() -> None:
    """It may lack a permission, and then each call gets a 401."""
    async with fetching("t1", "t2", "t2") as on:
        await on.fetched()

        async def is_replaced() -> bool:
            key = (await on.credentials.keys(on.upstream)).current
            on.credentials.note_rejected(on.upstream, key)
            return await on.credentials.is_replaced(on.upstream, key)

        assert await is_replaced()
        assert [await is_replaced() for _ in range(100)] == [False] * 100
        assert len(on.issuer.forms) == 2
        on.clock.s += REJECTED_PAUSE_S - 1
        assert not await is_replaced()
        assert len(on.issuer.forms) == 2
        on.clock.s += 1
        assert not await is_replaced()  # the same key again
        assert len(on.issuer.forms) == 3


async def test_a_rejected_key_does_not_shorten_the_pauses_of_an_outage() -> None:
    """After its end each call gets a 401, while the issuer is down."""
    async with fetching("t1", 503) as on:
        await on.fetched()
        on.clock.s += 2880
        for _ in range(8):
            await on.fetched()
            on.clock.s += 0.9
            on.credentials.note_rejected(on.upstream, Secret("t1"))
            assert not await on.credentials.is_replaced(on.upstream, Secret("t1"))
        assert len(on.issuer.forms) < 6


# --------------------------------------------------------------------------------------------------------- a command


def python(code: str, *arguments: str, every_s: int = 2700) -> KeyCommand:
    """A command that runs this Python code."""
    return KeyCommand((sys.executable, "-c", code, *arguments), every_s)


async def test_a_command_prints_the_key_without_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments arrive as they are, with our environment and no input. Empty lines do not count."""
    monkeypatch.setenv("OF_THE_PROXY", "inherited")
    code = (
        "import os, sys; print('\\n  ', file=sys.stdout); "
        "print('  ' + os.environ['OF_THE_PROXY'] + sys.argv[1] + repr(sys.stdin.read()) + '  \\nsecond')"
    )
    async with fetching(command=python(code, "$HOME;`id`")) as on:
        keys = await on.credentials.keys(on.upstream)
        assert (keys.current.reveal(), keys.is_access_token) == ("inherited$HOME;`id`''", False)


async def test_a_command_runs_again_when_its_time_is_over(tmp_path: Path) -> None:
    """What it prints may be a JWT, which is an access token."""
    code = "import sys; f = open(sys.argv[1], 'a+'); f.write('x'); print('eyJ.' + str(f.tell()) + '.z')"
    async with fetching(command=python(code, str(tmp_path / "runs"), every_s=60)) as on:
        keys = await on.credentials.keys(on.upstream)
        assert (keys.current.reveal(), keys.is_access_token) == ("eyJ.1.z", True)
        await on.passes(59)
        assert await on.current() == "eyJ.1.z"
        await on.passes(1)
        assert await on.current() == "eyJ.2.z"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; print('s3cret'); print('s3cret', file=sys.stderr); sys.exit(3)", "ended with status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "ended with status -15"),
        ("print('  \\n\\n')", "printed nothing"),
        ("print('s3cret with spaces')", "printed a line that can't be sent in a header"),
        ("print('\\u00e4')", "printed a line that can't be sent in a header"),
        ("while True: print('s3cret' * 1000)", "printed more than 65536 bytes"),
    ],
)
async def test_a_command_that_fails_is_named_and_nothing_that_it_prints(
    code: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its output may be a key, and its errors may quote one. Its arguments are not in the log either."""
    async with fetching(command=python(code, "s3cret-argument")) as on:
        with pytest.raises(UpstreamWithoutKey) as failed:
            await on.current()
        assert failed.value.reason == f"its key could not be fetched: {sys.executable} {reason}"
        assert on.outcomes == [("up", "failed")]
    shown = capfd.readouterr()
    assert reason in shown.out and "s3cret" not in shown.out + shown.err


async def test_a_program_that_is_not_there_is_a_failure() -> None:
    """The reason is the system's."""
    async with fetching(command=KeyCommand(("/no/such/program",), 60)) as on:
        with pytest.raises(UpstreamWithoutKey) as failed:
            await on.current()
        assert failed.value.reason.endswith("/no/such/program can't be started: No such file or directory")


HANGS = (
    "import os, subprocess, sys, time; "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "f = open(sys.argv[1] + '.new', 'w'); f.write(f'{os.getpid()} {child.pid}'); f.close(); "
    "os.rename(sys.argv[1] + '.new', sys.argv[1]); time.sleep(600)"
)


def runs(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped by init does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="it looks for processes in /proc")
@pytest.mark.parametrize("is_stopped", [False, True])
async def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path, is_stopped: bool) -> None:
    """After 10 s, or when the proxy stops. The event loop goes on meanwhile."""
    pids = tmp_path / "pids"
    async with fetching(command=python(HANGS, str(pids))) as on:
        on.credentials.refresh([on.upstream])
        while not pids.exists():  # noqa: ASYNC110 - nothing would set an event
            await asyncio.sleep(0.01)
        found = [int(pid) for pid in pids.read_text().split()]
        assert all(map(runs, found))
        if is_stopped:
            await on.credentials.close()
        else:
            with fast_timers(20):
                await on.credentials._fetches.all_ended()
            assert on.outcomes == [("up", "failed")]
        await until(lambda: not any(map(runs, found)))
