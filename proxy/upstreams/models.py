"""The models that the upstreams list themselves, with the contexts that they state.

A list is fetched when it is needed for the first time, and again in the background when it is five minutes old. While
it cannot be fetched, the old one stays in use. It is needed for two things: to list the models of an open policy, and
to bound input that a request does not show, if the configuration states no `context` for its model.

Sources: the vendors' published API descriptions, and the source code of vLLM, SGLang and llama.cpp. OpenAI's shape is
`{"data": [{"id": …}]}`, which Anthropic's has too; Together sends the list alone.
"""

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import orjson
import structlog

from proxy.errors import InvalidRequest, UpstreamError
from proxy.formats.kinds import kind_of
from proxy.formats.model_names import check_model_name, check_name_form
from proxy.policy.catalog import Model, Upstream
from proxy.tasks import Tasks
from proxy.upstreams.client import Upstreams
from proxy.upstreams.headers import NO_HEADERS, to_upstream

# How long a list is used before it is fetched again, and after how long a fetch that failed is repeated.
REFRESH_MS = 300_000
RETRY_MS = 30_000
# How long a caller waits for the first list of an upstream, in seconds. LibreChat gives up after 5.
WAIT_S = 2.0
_FETCH_S = 20.0
# OpenRouter's list has 700 kB and 400 models.
_LIST_BYTES_MAX = 2 * 2**20
_MODELS_MAX = 1000

# Where an entry states the context of its model, in tokens. An entry with several of them states the context in use
# before that of the training. vLLM, SGLang: max_model_len. LM Studio: loaded_context_length. OpenRouter, Together,
# Fireworks: context_length. Groq: context_window. Mistral: max_context_length. TabbyAPI: parameters.max_seq_len.
# llama.cpp: meta.n_ctx, meta.n_ctx_train. Anthropic: max_input_tokens.
_CONTEXT_MEMBERS = (
    "max_model_len loaded_context_length context_length context_window max_context_length context_size max_seq_len "
    "max_sequence_length n_ctx n_ctx_train max_input_tokens"
).split()
_CONTEXT_HOLDERS = ("meta", "metadata", "parameters", "top_provider", "limits")
_CONTEXT_MAX = 10**9

# Names that tell the account: ft:gpt-4o:acme::x (OpenAI, Mistral; with the vendor before it at gateways),
# davinci:ft-acme-2023-01-31 (OpenAI until 2023), arn:aws:… (Amazon), projects/… (Google), and accounts/… (Fireworks,
# whose own models are in accounts/fireworks).
_OF_ACCOUNT = re.compile(
    r"(?:^|[/:])ft:|:ft(?:-|:|$)|(?:^|[/.])arn(?::|%3a)|(?:^|/)projects/|(?:^|/)accounts/(?!fireworks/)",
    re.IGNORECASE,
)

# The listed models by their names; the values are their contexts, None if none is stated.
Listed = Mapping[str, int | None]

log = structlog.get_logger("models")


@dataclass(slots=True)
class _List:
    """What is known of one upstream's list.

    `due_at` (ms) is when it is to be fetched next. Callers wait for a first list until `waits_until`, by the clock of
    the event loop.
    """

    upstream: Upstream
    models: Listed = field(default_factory=dict)
    is_known: bool = False
    due_at: int = 0
    waits_until: float = 0.0
    fetch: "asyncio.Task[None] | None" = None


class NotListed(ValueError):
    """The upstream answered with another status than 200."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"the upstream answered with {reason}")
        self.status = status


class ModelLists:
    """The lists of all upstreams, by the upstream's name. `now` gives milliseconds since 1970.

    The list of an upstream whose configuration has changed is fetched anew: it may be another account's.
    """

    def __init__(self, upstreams: Upstreams, *, now: Callable[[], int], wait_s: float = WAIT_S) -> None:
        self._upstreams = upstreams
        self._now = now
        self._wait_s = wait_s
        self._lists: dict[str, _List] = {}
        self._fetches = Tasks()

    async def of(self, upstream: Upstream) -> Listed:
        """The models that this upstream lists. Empty if it lists none, or if its first list takes too long."""
        known = self.refresh(upstream)
        if known is None:
            return {}
        if known.fetch is not None and not known.is_known:
            loop = asyncio.get_running_loop()
            await asyncio.wait([known.fetch], timeout=max(0, known.waits_until - loop.time()))
        return known.models

    def known(self, upstream: Upstream) -> Listed:
        """The models that this upstream listed when it was last asked. Nothing is fetched for it."""
        known = self._lists.get(upstream.name)
        return {} if known is None or known.upstream != upstream else known.models

    def refresh(self, upstream: Upstream) -> _List | None:
        """What is known of an upstream's list, which is fetched in the background if it is due. None: it has none."""
        path = kind_of(upstream.kind).models_path
        if path is None:
            return None
        known = self._lists.get(upstream.name)
        if known is None or known.upstream != upstream:
            known = self._lists[upstream.name] = _List(upstream)
        # A clock that was set back must not keep an old list for as long.
        if known.fetch is None and not known.due_at - REFRESH_MS <= self._now() < known.due_at:
            known.fetch = self._fetches.start("fetch models", self._fetch(known, path))
            known.waits_until = asyncio.get_running_loop().time() + self._wait_s
        return known

    async def context(self, model: Model) -> int | None:
        """The context that its upstream states for this model, in tokens; None if it states none."""
        listed = await self.of(model.upstream)
        if len(listed) == 1 and kind_of(model.upstream.kind).ignores_model_names:
            return next(iter(listed.values()))
        return listed.get(model.upstream_model)

    async def close(self) -> None:
        """End the fetches that are running."""
        await self._fetches.finish(0)

    async def _fetch(self, known: _List, path: str) -> None:
        """Fetch a list, and keep the old one if that fails."""
        pause_ms = RETRY_MS  # also after an error that nobody expects, which the caller's task logs
        try:
            async with asyncio.timeout(_FETCH_S):
                known.models = read_list(await self.read(known.upstream, path))
        except (UpstreamError, TimeoutError, ValueError) as error:
            reason = str(error) or "the upstream did not answer in time"
            log.warning("the models of an upstream could not be listed", upstream=known.upstream.name, reason=reason)
        else:
            known.is_known = True
            pause_ms = REFRESH_MS
        finally:
            known.fetch = None
            known.due_at = self._now() + pause_ms

    async def read(self, upstream: Upstream, path: str) -> bytes:
        """The body of the list. Raises UpstreamError, NotListed, and ValueError if it is no list of a usual size."""
        headers = to_upstream(NO_HEADERS, kind=upstream.kind)
        address = kind_of(upstream.kind).address(upstream, path)
        async with await self._upstreams.send(upstream, address, b"", headers, method="GET") as answer:
            if answer.status != 200:
                raise NotListed(answer.status, answer.status_reason)
            body = bytearray()
            async for chunk in answer.chunks():
                body += chunk
                if len(body) > _LIST_BYTES_MAX:
                    raise ValueError(f"the list has more than {_LIST_BYTES_MAX} bytes")
            return bytes(body)


def read_list(body: bytes) -> Listed:
    """The models in an upstream's list, at most 1,000. Entries that no call could name are left out.

    Raises ValueError if it is no list.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise ValueError("the list is no JSON") from None
    entries = value.get("data") if isinstance(value, dict) else value
    if not isinstance(entries, list):
        raise ValueError("the answer is no list of models")
    models: dict[str, int | None] = {}
    for entry in entries:
        name = entry.get("id") if isinstance(entry, dict) else entry
        if isinstance(name, str) and _is_name(name):
            models.setdefault(name, _context(entry) if isinstance(entry, dict) else None)
        if len(models) == _MODELS_MAX:
            break
    return models


def shows_account(name: str) -> bool:
    """Whether a model's name tells whose account it is in, as those of fine-tuned models do."""
    return _OF_ACCOUNT.search(name) is not None


def _is_name(name: str) -> bool:
    try:
        check_name_form(name)
        check_model_name(name)
    except InvalidRequest:
        return False
    return True


def _context(entry: Mapping[str, object]) -> int | None:
    holders = [entry, *(entry.get(name) for name in _CONTEXT_HOLDERS)]
    values = [holder.get(name) for holder in holders if isinstance(holder, dict) for name in _CONTEXT_MEMBERS]
    numbers = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    return next((number for number in numbers if 0 < number <= _CONTEXT_MAX), None)
