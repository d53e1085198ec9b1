"""The command `events`: what happens in a running proxy, from the stream of its admin listener.

The stream is read again after a break, from the last id on. The events of a batch are printed when the last one,
which has the id, has come. So a break within a batch prints nothing twice.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import aiohttp
import click
import uvloop

from proxy.commands.context import NO, WRONG, admin_key, command_options, give_up, load, show
from proxy.config.loader import Config
from proxy.formats.sse import Event, Splitter

_PATH = "/admin/api/events"
# The stream has a comment every 15 s, so a connection without any data for longer is broken.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=45)
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.5, 30.0
_ID = re.compile(rb"^id: ?(.*)$", re.MULTILINE)
_ERROR_BYTES_MAX = 64 * 1024
# Where a listener is that listens on all addresses.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}

Batch = list[Event]


@click.command("events")
@click.option("--follow", is_flag=True, help="Go on until stopped. Without it, print how things stand now.")
@click.option(
    "--url", help="The admin listener, as in https://quotas.example. Default: `server.admin` of the config."
)
@click.option("--since-id", metavar="ID", help="Begin with the event after this one, if it is still kept.")
@command_options
def events(follow: bool, url: str | None, since_id: str | None, path: str, as_json: bool) -> None:
    """Print what happens in a running proxy, one line for each event.

    The admin key is in the environment variable LLM_QUOTA_ADMIN_KEY, or comes on standard input.
    """
    if since_id is not None and not (since_id.isascii() and since_id.isprintable()):
        raise click.BadParameter("this is no id of an event", param_hint="--since-id")
    config = None if url is not None else load(path)
    stream = Stream(_address(config, url), admin_key())
    printer = Printer(as_json=as_json, zone=None if config is None else config.policy.zone)
    try:
        uvloop.run(watch(stream, printer, since_id=since_id, is_followed=follow))
    except KeyboardInterrupt:
        pass
    except NotWatchable as error:
        give_up(str(error), error.code)


def _address(config: Config | None, url: str | None) -> str:
    """The URL of the stream, from the option or the config."""
    if config is not None:
        admin = config.settings.admin
        if admin is None or admin.port == 0:
            raise click.UsageError("the config does not say where the admin listener is; give its address with --url")
        return f"http://{replace(admin, host=_LOOPBACK.get(admin.host, admin.host))}{_PATH}"
    try:
        parts = urlsplit(url or "")
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        is_valid = False
    if not is_valid or parts.username is not None or parts.query or parts.fragment:
        raise click.BadParameter("write a URL such as http://127.0.0.1:8081, without a key", param_hint="--url")
    return f"{(url or '').rstrip('/')}{_PATH}"


# ------------------------------------------------------------------------------------------------------------ reading


class NotWatchable(Exception):
    """The stream can't be read, and trying again does not help. `code` is the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class _Unavailable(Exception):
    """The listener answers that it can't serve the stream now."""


# What trying again can help against.
_BREAKS = (aiohttp.ClientError, OSError, _Unavailable)


@dataclass(frozen=True)
class Stream:
    """The stream of events at a URL, which an admin key opens."""

    url: str
    key: str

    async def batches(self, last_id: str | None, on_open: Callable[[], object]) -> AsyncIterator[Batch]:
        """Open the stream once, and give what comes, in batches of which the last event has the id.

        `on_open` is called when the listener has accepted. Raises NotWatchable, and one of `_BREAKS` if there is no
        connection or it breaks. Ends when the listener ends the stream.
        """
        headers = {"authorization": f"Bearer {self.key}", "accept": "text/event-stream"}
        if last_id is not None:
            headers["last-event-id"] = last_id
        async with (
            aiohttp.ClientSession(timeout=_TIMEOUT, read_bufsize=2**20) as http,
            http.get(self.url, headers=headers, allow_redirects=False) as response,
        ):
            await self._check(response)
            on_open()
            splitter, batch = Splitter(), Batch()
            async for chunk in response.content.iter_any():
                for event in splitter.feed(chunk):
                    if event.data is not None:
                        batch.append(event)
                    if id_of(event) is not None:
                        yield batch
                        batch = []

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        if response.status == 200 and response.content_type == "text/event-stream":
            return
        detail = _detail(await response.content.read(_ERROR_BYTES_MAX))
        if response.status in (429, 500, 502, 503, 504):
            raise _Unavailable(detail or f"it answers {response.status}")
        what = detail or f"it answers {response.status} {response.content_type}, so it is no admin listener"
        raise NotWatchable(f"{self.url}: {what}", NO)


def id_of(event: Event) -> str | None:
    """The id of an event, by which a stream is resumed; None if it has none."""
    found = _ID.search(event.raw)
    return found[1].strip().decode("ascii", "replace") if found else None


def _detail(body: bytes) -> str:
    """What the problem details of an answer say; empty if it has none."""
    try:
        found = json.loads(body)
    except ValueError:
        return ""
    return _printable(str(found.get("detail", ""))) if isinstance(found, dict) else ""


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientPayloadError):  # its text is about the coding of the transfer
        return "the stream was cut off"
    return _printable(str(error)) or type(error).__name__


async def watch(
    stream: Stream,
    printer: "Printer",
    *,
    since_id: str | None,
    is_followed: bool,
    pause: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> None:
    """Print the batches of a stream, and connect again after a break, with growing pauses (in seconds).

    Ends after the first batch unless it is followed. Raises NotWatchable, also if the first connection fails.
    """
    last_id, pause_s = since_id, _FIRST_PAUSE_S
    is_open = was_open = False

    def opened() -> None:
        nonlocal is_open
        is_open = True
        if was_open:
            click.echo("Connected again.", err=True)

    while True:
        reason = "the listener has ended the stream"
        try:
            async for batch in stream.batches(last_id, opened):
                if last_id is not None and batch[0].name == "snapshot":
                    click.echo("Some events are lost. This is how things stand now:", err=True)
                printer.print(batch)
                last_id, pause_s = id_of(batch[-1]), _FIRST_PAUSE_S
                if not is_followed:
                    return
        except _BREAKS as error:
            reason = _reason(error)
        was_open = was_open or is_open
        if not was_open:
            raise NotWatchable(f"{stream.url} can't be read: {reason}", WRONG)
        lost = "The connection is lost" if is_open else "There is still no connection"
        click.echo(f"{lost} ({reason}). Connecting again in {pause_s:g} s.", err=True)
        is_open = False
        await pause(pause_s)
        pause_s = min(_LAST_PAUSE_S, 2 * pause_s)


# ----------------------------------------------------------------------------------------------------------- printing


@dataclass(frozen=True)
class Printer:
    """Prints events: as JSON, a line each, or for people, with times in this zone (None: that of the machine)."""

    as_json: bool
    zone: ZoneInfo | None = None

    def print(self, batch: Batch) -> None:
        """Print the events of a batch."""
        for event in batch:
            name, data = event.name or "message", json.loads(event.data or b"null")
            if self.as_json:
                show(json.dumps({"id": id_of(event), "event": name, "data": data}, ensure_ascii=False))
            else:
                for line in self._known(name, data):
                    show(_printable(line))

    def _known(self, name: str, data: Mapping[str, Any]) -> Iterable[str]:
        try:
            return list(self._lines(name, data))
        except (KeyError, TypeError):  # of a release whose events have other members
            return [f"{'':8} {name} {json.dumps(data, ensure_ascii=False)}"]

    def _lines(self, name: str, data: Mapping[str, Any]) -> Iterable[str]:
        match name:
            case "calls":
                return self._calls(data)
            case "counters":
                return map(self._counter, data["counters"])
            case "refusals":
                return self._refusals(data)
            case "change":
                return [f"{self._time(data['at'])} {data['actor']}: {data['action']} {data['target']}"]
            case "health":
                return [f"{'':8} {_health(data)}"]
            case "snapshot":
                return self._snapshot(data)
        raise KeyError(name)

    def _time(self, at: int) -> str:
        return datetime.fromtimestamp(at / 1000, self.zone).strftime("%H:%M:%S")

    def _calls(self, data: Mapping[str, Any]) -> Iterator[str]:
        for call in data["begun"]:
            yield self._begun(call)
        for call in data["ended"]:
            tokens = f"{call['input_tokens']} + {call['output_tokens']} tokens"
            what = f"{call['user']} {call['model']} {call['outcome']}, {tokens}"
            yield f"{self._time(call['ended_at'])} ended {call['id']}: {what}"
        for name in ("begun", "ended"):
            if data[f"{name}_more"]:
                yield f"{'':8} {data[f'{name}_more']} more calls have {name}"

    def _begun(self, call: Mapping[str, Any]) -> str:
        held = f"holds {call['held_input']} + {call['held_output']} tokens"
        who = f"{call['user']} ({call['group']}) {call['model']}"
        return f"{self._time(call['began_at'])} begun {call['id']}: {who}, {held}"

    def _counter(self, counter: Mapping[str, Any]) -> str:
        levels = ", ".join(
            f"{level['used']} of {level['limit']} {level['measure'].replace('_', ' ')}"
            + (f" ({level['held']} held)" if level["held"] else "")
            for level in counter["limits"]
        )
        return f"{self._time(counter['at'])} {counter['quota']} {counter['user'] or '(all)'}: {levels}"

    def _refusals(self, data: Mapping[str, Any]) -> Iterator[str]:
        for each in data["refusals"]:
            levels = f"{each['used']} used and {each['held']} held of {each['limit']} {each['measure']}"
            what = f"{each['user']} {each['model']} by {each['quota']} ({each['verdict']}): {levels}"
            yield f"{self._time(each['at'])} refused {each['request_id']}: {what}, {each['needed']} needed"
        if data["more"]:
            yield f"{'':8} {data['more']} more calls were refused"

    def _snapshot(self, data: Mapping[str, Any]) -> Iterator[str]:
        yield f"{'':8} {_health(data['health'])}, {len(data['calls'])} calls in flight"
        yield from map(self._begun, data["calls"])
        yield from map(self._counter, data["counters"])


def _health(data: Mapping[str, Any]) -> str:
    mistakes = f", {data['reload_mistakes']} mistakes in the file" if data["reload_mistakes"] else ""
    return f"{data['replica']}: ledger {data['ledger']}, policy {data['policy']}{mistakes}"


def _printable(text: str) -> str:
    """The text without what would control a terminal."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)
