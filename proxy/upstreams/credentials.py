"""The keys of upstreams that have no fixed one. A command prints them, or an OAuth 2.0 server issues them.

A key is fetched when the process starts, or when a reload brings it in, and again in the background before it ends.
Each process fetches its own, and has one fetch at a time for each upstream. An example with a token of an hour:

    12:00  the process starts and fetches the key; calls that need it wait for it, for 5 s at most
    12:48  80 % of the hour are over: the next key is fetched
    12:48  the issuer does not answer: the old key stays in use, and the fetch is repeated after 1 s, 2 s, 4 s, … 60 s
    13:00  the old key ends and stays in use: whether it is still accepted is for the upstream to say
    13:01  the upstream answers 401: the key is fetched at once, and the call is sent once more with the new one

That refetch is shared by all calls that got a 401 with the same key, and there is at most one in 10 s: a key that is
rejected because it lacks a permission must not become a request to the issuer with every call.

Neither a key nor what it is fetched with is in an error or in the log. What a command writes to its standard error is
not read, because it may contain either.
"""

import asyncio
import os
import re
import signal
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Literal
from urllib.parse import urlencode

import orjson
import structlog

from proxy.errors import UpstreamError, UpstreamWithoutKey
from proxy.policy.catalog import FETCHED_KEYS, KeyCommand, OAuthClient, Secret, Upstream
from proxy.tasks import Tasks

# How long a call waits for a key, and how long a fetch may take.
WAIT_S = 5.0
FETCH_S = 10.0
# The pause after a first failed fetch, which doubles with each further one, and the longest.
RETRY_S, RETRY_MAX_S = 1.0, 60.0
# How long after a refetch because of a 401 there is no other one.
REJECTED_PAUSE_S = 10.0
# An access token is fetched again when so much of its time is over, but within these bounds.
_USED_SHARE = 0.8
_LASTS_MIN_S, _LASTS_MAX_S = 5.0, 12 * 3600.0
# The time of a token whose answer states none, in seconds.
_EXPIRES_IN = 3600.0
_OUTPUT_BYTES_MAX = 64 * 1024
# How long a killed program is waited for.
_KILLED_S = 1.0

_VISIBLE_ASCII = re.compile(r"[!-~]+")
# RFC 6749 §5.2. Any other value may be a text with a secret in it.
_ISSUER_ERRORS = frozenset(
    "invalid_request invalid_client invalid_grant unauthorized_client unsupported_grant_type invalid_scope".split()
)

# The result of a fetch, as a label of the metric `llm_quota_token_fetches`.
FetchOutcome = Literal["fetched", "failed"]
# Sends a form to a server with the connection settings of an upstream, and returns the answer's status and body.
Post = Callable[[Upstream, bytes], Awaitable[tuple[int, bytes]]]

log = structlog.get_logger("credentials")


@dataclass(frozen=True, slots=True)
class Keys:
    """The key to send now, and the one before it, which the upstream may still repeat in an answer.

    `is_access_token` says that it is to be sent as a bearer token, whatever header the upstream has for other keys.
    """

    current: Secret
    previous: Secret | None = None
    is_access_token: bool = False

    @property
    def all(self) -> tuple[Secret, ...]:
        """Both keys."""
        return (self.current,) if self.previous is None else (self.current, self.previous)


@dataclass(slots=True)
class _State:
    """What is known of one key. Times are in seconds by `clock`, and `reason` is that of the last failure."""

    upstream: Upstream
    keys: Keys | None = None
    due_s: float = -inf
    failures: int = 0  # since the last success
    rejected_s: float = -inf  # when it was last fetched because of a 401
    reason: str = "no fetch has ended yet"
    fetch: "asyncio.Task[None] | None" = None


class _NotFetched(Exception):
    """A fetch failed. The text is for the log and has no secret."""


class Credentials:
    """The fetched keys of all upstreams. `clock` gives seconds that only grow."""

    def __init__(self, post: Post, *, clock: Callable[[], float]) -> None:
        self._post = post
        self._clock = clock
        # By the name of the upstream and what its key is fetched with: a reload that changes neither keeps the key.
        self._states: dict[tuple[str, KeyCommand | OAuthClient], _State] = {}
        self._fetches = Tasks()
        self._notify: Callable[[str, FetchOutcome], object] = lambda upstream, outcome: None

    def when_fetched(self, notify: Callable[[str, FetchOutcome], object]) -> None:
        """Call this after each fetch, with the name of the upstream."""
        self._notify = notify

    def refresh(self, upstreams: Iterable[Upstream]) -> None:
        """Begin to fetch the keys of these upstreams that are due, and forget those of all others."""
        present = set()
        for upstream in upstreams:
            if isinstance(upstream.api_key, FETCHED_KEYS):
                present.add((upstream.name, upstream.api_key))
                state = self._state_of(upstream)
                state.upstream = upstream  # a reload may have changed how its servers are reached
                self._begin_if_due(state)
        for gone in self._states.keys() - present:
            del self._states[gone]

    async def keys(self, upstream: Upstream) -> Keys:
        """The keys of an upstream that has no fixed one. Waits for a first key.

        Raises UpstreamWithoutKey if there is none within WAIT_S, or if the last attempt to fetch it has failed.
        """
        state = self._state_of(upstream)
        if state.keys is None:
            self._begin_if_due(state)
            await _wait_for_fetch(state)
        if state.keys is None:
            raise UpstreamWithoutKey(
                f'The proxy has no key for the upstream "{upstream.name}" yet. Try again in a few seconds.',
                was_sent=False,
                headers={"retry-after": str(ceil(max(1.0, state.due_s - self._clock())))},
                reason=f"its key could not be fetched: {state.reason}",
            )
        return state.keys

    def note_rejected(self, upstream: Upstream, key: Secret) -> None:
        """Begin to fetch another key, if the upstream has rejected this one with a 401 and it is still in use."""
        state, now = self._state_of(upstream), self._clock()
        # After a failed fetch the next one comes in its time.
        may_fetch = now - state.rejected_s >= REJECTED_PAUSE_S and (not state.failures or now >= state.due_s)
        if state.keys is not None and state.keys.current == key and state.fetch is None and may_fetch:
            state.rejected_s = now
            self._begin(state)

    async def is_replaced(self, upstream: Upstream, key: Secret) -> bool:
        """Whether there is another key than this one. Waits for a fetch that is running, for at most WAIT_S."""
        state = self._state_of(upstream)
        if state.keys is not None and state.keys.current == key:
            await _wait_for_fetch(state)
        return state.keys is not None and state.keys.current != key

    async def close(self) -> None:
        """End the fetches that are running, and the programs that they have started."""
        await self._fetches.finish(0)

    def _state_of(self, upstream: Upstream) -> _State:
        assert isinstance(upstream.api_key, FETCHED_KEYS), "a fixed key has no state"
        state = self._states.get((upstream.name, upstream.api_key))
        if state is None:
            state = self._states[upstream.name, upstream.api_key] = _State(upstream)
        return state

    def _begin_if_due(self, state: _State) -> None:
        if state.fetch is None and self._clock() >= state.due_s:
            self._begin(state)

    def _begin(self, state: _State) -> None:
        state.fetch = self._fetches.start("fetch key", self._fetch(state))

    async def _fetch(self, state: _State) -> None:
        """Fetch a key, and keep the old one if that fails."""
        state.failures += 1
        pause_s = min(RETRY_S * 2 ** (state.failures - 1), RETRY_MAX_S)
        outcome: FetchOutcome = "failed"
        try:
            async with asyncio.timeout(FETCH_S):
                key, lasts_s, is_access_token = await self._fetched(state.upstream)
        except (_NotFetched, UpstreamError) as error:
            state.reason = error.reason if isinstance(error, UpstreamError) else str(error)
        except TimeoutError:
            state.reason = f"it took more than {FETCH_S:.0f} s"
        else:
            pause_s, outcome = lasts_s, "fetched"
            _replace(state, key, is_access_token=is_access_token)
        finally:
            state.fetch = None
            state.due_s = self._clock() + pause_s
            self._notify(state.upstream.name, outcome)
        if outcome == "failed":
            log.warning(
                "the key of an upstream could not be fetched",
                upstream=state.upstream.name,
                reason=state.reason,
                has_old_key=state.keys is not None,
                retry_s=pause_s,
            )

    async def _fetched(self, upstream: Upstream) -> tuple[str, float, bool]:
        """A new key, in how many seconds it is to be fetched again, and whether it is an access token."""
        if isinstance(upstream.api_key, OAuthClient):
            return *await self._issued(upstream, upstream.api_key), True
        assert isinstance(upstream.api_key, KeyCommand)
        key = _key_in(await _output_of(upstream.api_key.words), upstream.api_key.program)
        # What a command prints may also be a key, from a vault. Access tokens of Entra are JWTs.
        return key, upstream.api_key.every_s, key.startswith("eyJ") and key.count(".") >= 2

    async def _issued(self, upstream: Upstream, client: OAuthClient) -> tuple[str, float]:
        """An access token of the client credentials grant, and in how many seconds it is to be fetched again."""
        form = {
            "grant_type": "client_credentials",
            "client_id": client.client_id,
            "client_secret": client.client_secret.reveal(),
            **({} if client.scope is None else {"scope": client.scope}),
        }
        # The issuer is reached as the upstream is, but gets nothing that is the upstream's. With http it is on this
        # machine, to which there is no way through a proxy.
        transport = replace(
            upstream.transport,
            first_byte_timeout_ms=None,
            headers=(),
            proxy=None if client.token_url.startswith("http:") else upstream.transport.proxy,
        )
        issuer = replace(
            upstream,
            name=f"issuer of {upstream.name}",
            base_url=client.token_url,
            api_key=None,
            transport=transport,
        )
        return _token_in(*await self._post(issuer, urlencode(form).encode()))


async def _wait_for_fetch(state: _State) -> None:
    if state.fetch is not None:
        await asyncio.wait([state.fetch], timeout=WAIT_S)


def _replace(state: _State, key: str, *, is_access_token: bool) -> None:
    """Take a key that was fetched. An issuer may give the same one again while it is valid."""
    if state.keys is None or state.failures > 1:
        log.info("the key of an upstream was fetched", upstream=state.upstream.name)
    if state.keys is None or state.keys.current.reveal() != key:
        previous = None if state.keys is None else state.keys.current
        state.keys = Keys(Secret(key), previous, is_access_token)
    state.failures = 0


def _token_in(status: int, body: bytes) -> tuple[str, float]:
    """The token in the answer of an issuer (RFC 6749 §5.1), and in how many seconds the next one is to be fetched."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    members = answer if isinstance(answer, dict) else {}
    if status != 200:
        code = members.get("error")
        known = f", {code}" if isinstance(code, str) and code in _ISSUER_ERRORS else ""
        raise _NotFetched(f"the issuer answered with status {status}{known}")
    token = members.get("access_token")
    if not isinstance(token, str) or not _VISIBLE_ASCII.fullmatch(token):
        raise _NotFetched("the issuer's answer has no access_token that can be sent in a header")
    return token, min(max(_USED_SHARE * _expires_in(members.get("expires_in")), _LASTS_MIN_S), _LASTS_MAX_S)


def _expires_in(value: object) -> float:
    """Some issuers write the number as a text."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        return _EXPIRES_IN
    return float(value)


def _key_in(output: bytes, program: str) -> str:
    """The first line that is not empty."""
    lines = output.decode("ascii", "replace").splitlines()
    key = next((line for line in map(str.strip, lines) if line), "")
    if not key:
        raise _NotFetched(f"{program} printed nothing")
    if not _VISIBLE_ASCII.fullmatch(key):
        raise _NotFetched(f"{program} printed a line that can't be sent in a header")
    return key


async def _output_of(words: tuple[str, ...]) -> bytes:
    """What a program prints. It is started without a shell, and killed with its children if this is cancelled."""
    try:
        process = await asyncio.create_subprocess_exec(
            *words, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, start_new_session=True
        )
    except OSError as error:
        raise _NotFetched(f"{words[0]} can't be started: {error.strerror}") from None
    try:
        assert process.stdout is not None, "it is a pipe"
        try:
            await process.stdout.readexactly(_OUTPUT_BYTES_MAX + 1)
            raise _NotFetched(f"{words[0]} printed more than {_OUTPUT_BYTES_MAX} bytes")
        except asyncio.IncompleteReadError as end:
            output = end.partial
        status = await process.wait()
    except BaseException:
        with suppress(ProcessLookupError, PermissionError, TimeoutError):
            os.killpg(process.pid, signal.SIGKILL)
            async with asyncio.timeout(_KILLED_S):
                await process.wait()
        raise
    if status:
        raise _NotFetched(f"{words[0]} ended with status {status}")
    return output
