"""What the clients of a torture run call and when they disconnect: sizes and kinds of calls, all from the seed.

Each call has a tag of its own, with which its records of client, upstream and database are matched. The tag is part
of the model's name (`gpt-4o-call-3-17` is call 17 of client 3), because the proxy stores that name. Another proxy may
know only one model; then the tag is the first word of the prompt, which any proxy passes on.

Pure: no sockets, no clock.
"""

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal
from zoneinfo import ZoneInfo

from proxy.policy.windows import parse_per
from proxy.simulator.text import COMPLETIONS_MAXIMUM, TOKENS_PER_MESSAGE, VOCABULARY

Kind = Literal["chat", "completions", "embeddings", "responses"]
DisconnectWhen = Literal["after_time", "after_chunks", "after_text"]

_PATHS: Mapping[Kind, str] = {
    "chat": "/chat/completions",
    "completions": "/completions",
    "embeddings": "/embeddings",
    "responses": "/responses",
}
_KINDS: tuple[Kind, ...] = ("chat", "completions", "embeddings", "responses")
_KIND_WEIGHTS = (6, 1, 1, 2)
_MAXIMUM_FIELDS: Mapping[Kind, tuple[str, ...]] = {
    "chat": ("max_tokens", "max_completion_tokens"),
    "completions": ("max_tokens",),
    "responses": ("max_output_tokens",),
}
# A call is refused only if not even its smallest answer fits. The policy of a run says that it is 1024 tokens for
# each choice; it is the output maximum if that is smaller. A call that states no maximum gets 4096.
SMALLEST_ANSWER, _DEFAULT_MAXIMUM = 1024, 4096
MODEL_PREFIX = "gpt-4o-"  # the proxy finds the tokenizer by it
_INSTRUCTIONS = "You answer in plain words"
# Input tokens by OpenAI's published rules that the simulator does not count. Chat: 3 that begin the answer, and 1 for
# each of the two roles. Responses: the same 3, and 3 for the message that a plain text stands for.
_UNCOUNTED: Mapping[Kind, int] = {"chat": TOKENS_PER_MESSAGE + 2, "responses": 2 * TOKENS_PER_MESSAGE}
_PROMPT_WORDS_MIN, _PROMPT_WORDS_MAX = 100, 2500
_ANSWER_TOKENS_MIN, _ANSWER_TOKENS_MAX = 10, 600
# One stream in 15 is so long that its hold has to be extended. It is fast, so that it takes at most 2 s.
_LONG_ONE_IN, _LONG_TOKENS_MIN, _LONG_TOKENS_MAX, _LONG_TOKENS_PER_S = 15, 1500, 4000, 2000
_CORPUS_WORDS = 2 * _PROMPT_WORDS_MAX
_TAG_TOKENS = 7  # of a tag such as `call-999-99999`, at most
_TAG = re.compile(r"call-([0-9]+)-[0-9]+")
# With these sizes and the upstream's speed a client uses about 2,500 tokens per second if no quota stops it. The
# default limit allows less than half of that, so every window is used up and many calls still succeed. 64 clients of
# 8 users for 60 s: 1000 * 64 * 60 / 8 = 480,000 tokens for each user.
_TOKENS_PER_CLIENT_S = 1000
# With several replicas one is paused for much of the time, with its clients, and all of them share the machine. With
# the full limit no quota was used up, so the promise never to exceed it was not tested.
_REPLICAS_PART = 0.5
# Longer than a replica that is paused in the middle of a transaction can block the others. With a shorter lease the
# blocked replicas would be taken for dead too.
_LEASE_S = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One run.

    `limit` is the tokens of one quota: each user's own, or, if `shared`, of all users together; None is computed.
    `disconnects` is the share of calls whose client disconnects. `tokens_per_s` is the upstream's speed. Of several
    replicas at most one is killed and one paused at a time. With an `administrator` quotas, grants, counters, users
    and keys change all the time.
    """

    clients: int = 64
    seconds: float = 60.0
    users: int = 8
    limit: int | None = None
    per: str = "1h"
    shared: bool = False
    disconnects: float = 0.2
    kill_every_s: float = 10.0
    replicas: int = 1
    pause_every_s: float = 20.0
    administrator: bool = False
    seed: int = 0
    tokens_per_s: float = 400.0

    def __post_init__(self) -> None:
        if not 0 < self.users <= self.clients:
            raise ValueError(f"{self.users} users need as many clients or more, and there are {self.clients}")
        parse_per(self.per, ZoneInfo("UTC"))

    @property
    def window_s(self) -> float:
        """The length of the quota's window."""
        window = parse_per(self.per, ZoneInfo("UTC")).opening(0)
        return (window.resets_at - window.opened_at) / 1000

    @property
    def counters(self) -> int:
        """The number of counters: one for each user, or one for all."""
        return 1 if self.shared else self.users

    @property
    def tokens(self) -> int:
        """The limit of the quota: the one given, or one that is used up in about half of a window."""
        used_s = min(self.window_s, self.seconds) * (_REPLICAS_PART if self.replicas > 1 else 1)
        return self.limit or round(_TOKENS_PER_CLIENT_S * self.clients * used_s / self.counters)

    @property
    def wait_s(self) -> int:
        """How long a call may wait for tokens that others hold: the proxy's default of 30 s, less in a short run."""
        return max(10, min(30, round(self.seconds / 2)))

    @property
    def kills_at_s(self) -> list[float]:
        """When a proxy is killed, in seconds from the start."""
        return self._every(self.kill_every_s, before_s=self.seconds)

    @property
    def lease_s(self) -> float:
        """How long a replica counts as alive without renewing its lease; a pause of three leases must fit the run."""
        return max(1.0, min(_LEASE_S, self.seconds / 12))

    @property
    def pause_s(self) -> float:
        """How long a replica is paused: so long that the others take it for dead."""
        return 3 * self.lease_s

    @property
    def pauses_at_s(self) -> list[float]:
        """When a replica is paused, in seconds from the start.

        Each pause ends before the run and before the next pause. A single replica is not paused: no other one could
        take it for dead.
        """
        every_s = max(self.pause_every_s, self.pause_s) if self.pause_every_s and self.replicas > 1 else 0.0
        return self._every(every_s, before_s=self.seconds - self.pause_s)

    @property
    def restart_at_s(self) -> float:
        """When the database is restarted, if it is, in seconds from the start."""
        return self.seconds / 2

    @staticmethod
    def _every(every_s: float, *, before_s: float) -> list[float]:
        count = int(before_s / every_s) if every_s else 0
        return [at for number in range(1, count + 1) if (at := number * every_s) < before_s]


@dataclass(frozen=True, slots=True)
class Disconnect:
    """When a client disconnects, if the call is still running: after a time, some chunks, or the end of the text."""

    when: DisconnectWhen
    after_s: float = 0.0
    chunks: int = 0


@dataclass(frozen=True, slots=True)
class CallSpec:
    """The parameters of a call.

    `answer_tokens` is the length of an answer that no maximum cuts short, `maximum` the output maximum in the
    request.
    """

    kind: Kind
    text: str
    answer_tokens: int
    maximum: int | None
    maximum_field: str
    choices: int
    stream: bool
    include_usage: bool
    disconnect: Disconnect | None


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """One call to make. Without a `model` the tag is part of the model's name, with one it is part of the prompt."""

    tag: str
    user: int
    spec: CallSpec
    model: str | None = None

    @property
    def path(self) -> str:
        """The path below `/v1`."""
        return _PATHS[self.spec.kind]

    @property
    def tokens_needed(self) -> int:
        """The fewest tokens that it can be charged: its input by OpenAI's published rules, and the smallest answer.

        The simulated upstream counts fewer: it omits the tokens in `_UNCOUNTED`, and it counts a tag in the prompt as
        one word, which is up to seven tokens. A proxy can't know that before the call, so a refusal is false only if
        this number of tokens was free.
        """
        tag = _TAG_TOKENS - 1 if self.model else 0
        return self.input_tokens + tag + _UNCOUNTED.get(self.spec.kind, 0) + self._smallest_answer

    @property
    def input_tokens(self) -> int:
        """The input tokens as the simulated upstream counts them."""
        words = len(self._prompt.split())
        return words + (2 * TOKENS_PER_MESSAGE + len(_INSTRUCTIONS.split()) if self.spec.kind == "chat" else 0)

    @property
    def _prompt(self) -> str:
        return f"{self.tag} {self.spec.text}" if self.model else self.spec.text

    @property
    def _smallest_answer(self) -> int:
        spec = self.spec
        if spec.kind == "embeddings":
            return 0
        default = COMPLETIONS_MAXIMUM if spec.kind == "completions" else _DEFAULT_MAXIMUM
        return spec.choices * min(spec.maximum or default, SMALLEST_ANSWER)

    def body(self) -> dict[str, Any]:
        """The JSON of the request."""
        spec, prompt = self.spec, self._prompt
        body: dict[str, Any] = {"model": self.model or MODEL_PREFIX + self.tag}
        match spec.kind:
            case "chat":
                system = {"role": "system", "content": _INSTRUCTIONS}
                body["messages"] = [system, {"role": "user", "content": prompt}]
            case "completions":
                body["prompt"] = prompt
            case _:
                body["input"] = prompt
        if spec.kind == "embeddings":
            return body
        speed = f" speed={_LONG_TOKENS_PER_S}" if spec.answer_tokens >= _LONG_TOKENS_MIN else ""
        body["metadata"] = {"simulate": f"tokens={spec.answer_tokens}{speed}"}
        if spec.maximum is not None:
            body[spec.maximum_field] = spec.maximum
        if spec.choices > 1:
            body["n"] = spec.choices
        if spec.stream:
            body["stream"] = True
            if spec.include_usage:
                body["stream_options"] = {"include_usage": True}
        return body


class CallGenerator:
    """Generates the calls of one client, the same ones for the same seed.

    Without a `model` each call names a model of its own.
    """

    def __init__(self, plan: Plan, client: int, model: str | None = None) -> None:
        self.rng = random.Random(f"{plan.seed}/{client}")
        self._plan = plan
        self._client = client
        self._model = model
        self._calls = 0
        words = [word.decode() for word in VOCABULARY]
        self._corpus = random.Random(plan.seed).choices(words, k=_CORPUS_WORDS)

    def next(self) -> PlannedCall:
        """Return another call."""
        return self._call(self._spec())

    def repeat(self, call: PlannedCall) -> PlannedCall:
        """Return the same call with another tag and without its disconnect."""
        return self._call(replace(call.spec, disconnect=None))

    def _call(self, spec: CallSpec) -> PlannedCall:
        self._calls += 1
        return PlannedCall(f"call-{self._client}-{self._calls}", self._client % self._plan.users, spec, self._model)

    def _spec(self) -> CallSpec:
        rng = self.rng
        kind = rng.choices(_KINDS, _KIND_WEIGHTS)[0]
        is_generating = kind != "embeddings"
        stream = is_generating and rng.random() < 0.5
        is_long = stream and rng.randrange(_LONG_ONE_IN) == 0
        if is_long:
            tokens = self._size(_LONG_TOKENS_MIN, _LONG_TOKENS_MAX)
        else:
            tokens = self._size(_ANSWER_TOKENS_MIN, _ANSWER_TOKENS_MAX)
        may_have_choices = kind in ("chat", "completions") and not is_long
        return CallSpec(
            kind=kind,
            text=self._text(),
            answer_tokens=tokens if is_generating else 0,
            maximum=self._maximum(tokens, stream=stream) if is_generating else None,
            maximum_field=rng.choice(_MAXIMUM_FIELDS.get(kind, ("",))),
            choices=rng.randint(2, 3) if may_have_choices and rng.random() < 0.15 else 1,
            stream=stream,
            include_usage=kind != "responses" and rng.random() < 0.5,
            disconnect=self._disconnect() if rng.random() < self._plan.disconnects else None,
        )

    def _size(self, least: int, most: int) -> int:
        """Return a size between the two whose logarithm is uniform: 10 to 77 is as likely as 78 to 600."""
        return round(math.exp(self.rng.uniform(math.log(least), math.log(most))))

    def _text(self) -> str:
        words = self._size(_PROMPT_WORDS_MIN, _PROMPT_WORDS_MAX)
        start = self.rng.randrange(_CORPUS_WORDS - words)
        # The first word has no space before it. Some words of the vocabulary are then two tokens; "the" is one.
        return " ".join(["the", *self._corpus[start + 1 : start + words]])

    def _maximum(self, tokens: int, *, stream: bool) -> int | None:
        """Return no maximum, one that cuts the answer short, one that is just enough, or one that agents send."""
        cut_short, enough = max(1, tokens // 2), tokens + self.rng.randint(0, 50)
        return self.rng.choice([None, cut_short, enough, enough, 4096, 32_000 if stream else 4096])

    def _disconnect(self) -> Disconnect:
        rng = self.rng
        return rng.choice(
            [
                Disconnect("after_time", after_s=self._size(1, 2000) / 1000),
                Disconnect("after_chunks", chunks=rng.randint(1, 50)),
                Disconnect("after_text"),
            ]
        )


def tag_of(params: Mapping[str, Any]) -> str:
    """Return the tag in a request that arrived at the upstream, or another string if it has none."""
    model = str(params.get("model"))
    if model.startswith(MODEL_PREFIX) and client_of(tag := model.removeprefix(MODEL_PREFIX)) is not None:
        return tag
    messages = params.get("messages")
    prompt = messages[-1].get("content") if messages else params.get("prompt", params.get("input"))
    if isinstance(prompt, list):  # a proxy may send a list with one prompt
        prompt = prompt[0]
    return prompt.partition(" ")[0] if isinstance(prompt, str) else ""


def client_of(tag: str) -> int | None:
    """Return the number of the client that made the call, None if this is no tag of a torture run."""
    match = _TAG.fullmatch(tag)
    return int(match[1]) if match else None
