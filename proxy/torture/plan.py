"""What the clients of a torture run ask, and when they hang up: sizes and kinds of every sort, all from the seed.

Every call has a mark of its own, so that what a client saw, what the upstream gave and what the books say can be laid
side by side. It is a part of its model's name, which stands in the proxy's books; where the model is given, it is the
first word of the prompt, which arrives whatever proxy stands between.

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
Farewell = Literal["after_a_time", "after_some_chunks", "before_the_end"]

_PATHS: Mapping[Kind, str] = {
    "chat": "/chat/completions",
    "completions": "/completions",
    "embeddings": "/embeddings",
    "responses": "/responses",
}
_KINDS: tuple[Kind, ...] = ("chat", "completions", "embeddings", "responses")
_KINDS_WEIGHTS = (6, 1, 1, 2)
_MAXIMUM_FIELDS: Mapping[Kind, tuple[str, ...]] = {
    "chat": ("max_tokens", "max_completion_tokens"),
    "completions": ("max_tokens",),
    "responses": ("max_output_tokens",),
}
# The smallest answer worth starting for one choice, and what is wanted where nothing is said: as the README says it.
_SMALLEST_ANSWER, _WANTED = 1024, 4096
# So that the tokenizer is known.
MODEL_PREFIX = "gpt-4o-"
_INSTRUCTIONS = "You answer in plain words"
_UNCOUNTED: Mapping[Kind, int] = {"chat": TOKENS_PER_MESSAGE + 2, "responses": 2 * TOKENS_PER_MESSAGE}
_WORDS_LEAST, _WORDS_MOST = 100, 2500
_TOKENS_LEAST, _TOKENS_MOST = 10, 600
# One stream in so many is long, so that its hold has to grow, and comes fast, so that it doesn't last.
_LONG_AMONG, _LONG_LEAST, _LONG_MOST, _LONG_TOKENS_PER_S = 15, 1500, 4000, 2000
_SCROLL_WORDS = 2 * _WORDS_MOST
_MARK_TOKENS = 7
_MARK = re.compile(r"call-([0-9]+)-[0-9]+")
# With these sizes and the upstream's pace a client takes about 2,500 tokens a second, if it may. By default it may
# take less than half of that, so that every window is used up and many calls still go well.
_TOKENS_PER_CLIENT_S = 1000
# Of several replicas one stands still for much of the time, its clients too, and as many more share the machine: with
# the whole of it nothing was used up, and so "never over" was not put to the test.
_REPLICAS_PART = 0.5
# Longer than a replica that stops in the middle of a transaction can hold others up, which would look dead as well.
_LEASE_S = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. `limit` is the tokens of one quota: each user's own, or, `shared`, the one pot of all.

    `tokens_per_s` is the upstream's pace. Of several replicas one is killed at a time, and one paused.
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
    seed: int = 0
    tokens_per_s: float = 400.0

    def __post_init__(self) -> None:
        if not 0 < self.users <= self.clients:
            raise ValueError(f"{self.users} users need as many clients or more, and there are {self.clients}")
        parse_per(self.per, ZoneInfo("UTC"))

    @property
    def window_s(self) -> float:
        """How long a window of the quota is."""
        window = parse_per(self.per, ZoneInfo("UTC")).opening(0)
        return (window.resets_at - window.opened_at) / 1000

    @property
    def pots(self) -> int:
        """How many counters there are."""
        return 1 if self.shared else self.users

    @property
    def tokens(self) -> int:
        """The limit in force."""
        used_s = min(self.window_s, self.seconds) * (_REPLICAS_PART if self.replicas > 1 else 1)
        return self.limit or round(_TOKENS_PER_CLIENT_S * self.clients * used_s / self.pots)

    @property
    def wait_s(self) -> int:
        """How long a call may wait for others: as by default, but for a short run."""
        return max(10, min(30, round(self.seconds / 2)))

    @property
    def kills_at_s(self) -> list[float]:
        """When the proxy is killed, in seconds from the start."""
        return self._every(self.kill_every_s, before_s=self.seconds)

    @property
    def lease_s(self) -> float:
        """How long a replica is taken to be alive without a sign of it: so short that pauses beyond it fit in."""
        return max(1.0, min(_LEASE_S, self.seconds / 12))

    @property
    def pause_s(self) -> float:
        """How long a replica stands still: long enough that the others take it for dead."""
        return 3 * self.lease_s

    @property
    def pauses_at_s(self) -> list[float]:
        """When a replica is paused; each is over before the end, and before the next one. One alone never is."""
        every_s = max(self.pause_every_s, self.pause_s) if self.pause_every_s and self.replicas > 1 else 0.0
        return self._every(every_s, before_s=self.seconds - self.pause_s)

    @property
    def restart_at_s(self) -> float:
        """When the database is restarted, if it is to be."""
        return self.seconds / 2

    @staticmethod
    def _every(every_s: float, *, before_s: float) -> list[float]:
        count = int(before_s / every_s) if every_s else 0
        return [at for number in range(1, count + 1) if (at := number * every_s) < before_s]


@dataclass(frozen=True, slots=True)
class Leave:
    """When a client hangs up, if the call lasts until then."""

    when: Farewell
    after_s: float = 0.0
    chunks: int = 0


@dataclass(frozen=True, slots=True)
class Wish:
    """What a call asks for. `tokens` is how long its answer would be, `maximum` the most that it asks for."""

    kind: Kind
    text: str
    tokens: int
    maximum: int | None
    maximum_field: str
    choices: int
    stream: bool
    usage: bool
    leave: Leave | None


@dataclass(frozen=True, slots=True)
class Ask:
    """One call that is to be made."""

    mark: str
    user: int
    wish: Wish
    model: str | None = None

    @property
    def path(self) -> str:
        """Where it goes, below `/v1`."""
        return _PATHS[self.wish.kind]

    @property
    def needed(self) -> int:
        """The least that it truly takes: its input by OpenAI's published rules, and the smallest answer.

        The simulated upstream counts up to six tokens less: not the beginning of the answer, nor the roles of
        messages, nor the message that a bare text stands for; and a mark is one word, but seven tokens. No proxy
        could know that before it asks.
        """
        mark = _MARK_TOKENS - 1 if self.model else 0
        return self.input_tokens + mark + _UNCOUNTED.get(self.wish.kind, 0) + self._smallest_answer

    @property
    def input_tokens(self) -> int:
        """Its input as the upstream counts it."""
        words = len(self._prompt.split())
        return words + (2 * TOKENS_PER_MESSAGE + len(_INSTRUCTIONS.split()) if self.wish.kind == "chat" else 0)

    @property
    def _prompt(self) -> str:
        return f"{self.mark} {self.wish.text}" if self.model else self.wish.text

    @property
    def _smallest_answer(self) -> int:
        wish = self.wish
        if wish.kind == "embeddings":
            return 0
        default = COMPLETIONS_MAXIMUM if wish.kind == "completions" else _WANTED
        return wish.choices * min(wish.maximum or default, _SMALLEST_ANSWER)

    def body(self) -> dict[str, Any]:
        """The request's JSON."""
        wish, prompt = self.wish, self._prompt
        body: dict[str, Any] = {"model": self.model or MODEL_PREFIX + self.mark}
        match wish.kind:
            case "chat":
                system = {"role": "system", "content": _INSTRUCTIONS}
                body["messages"] = [system, {"role": "user", "content": prompt}]
            case "completions":
                body["prompt"] = prompt
            case _:
                body["input"] = prompt
        if wish.kind == "embeddings":
            return body
        pace = f" speed={_LONG_TOKENS_PER_S}" if wish.tokens >= _LONG_LEAST else ""
        body["metadata"] = {"simulate": f"tokens={wish.tokens}{pace}"}
        if wish.maximum is not None:
            body[wish.maximum_field] = wish.maximum
        if wish.choices > 1:
            body["n"] = wish.choices
        if wish.stream:
            body["stream"] = True
            if wish.usage:
                body["stream_options"] = {"include_usage": True}
        return body


class Asker:
    """Thinks of one client's calls, one after the other; the same ones for the same seed.

    Without a `model` each call has one of its own name.
    """

    def __init__(self, plan: Plan, client: int, model: str | None = None) -> None:
        self.chance = random.Random(f"{plan.seed}/{client}")
        self._plan = plan
        self._client = client
        self._model = model
        self._asked = 0
        words = random.Random(plan.seed).choices([word.decode() for word in VOCABULARY], k=_SCROLL_WORDS)
        self._scroll = words

    def next(self) -> Ask:
        """Another call."""
        return self._ask(self._wish())

    def again(self, ask: Ask) -> Ask:
        """The same call once more, this time to its end."""
        return self._ask(replace(ask.wish, leave=None))

    def _ask(self, wish: Wish) -> Ask:
        self._asked += 1
        return Ask(f"call-{self._client}-{self._asked}", self._client % self._plan.users, wish, self._model)

    def _wish(self) -> Wish:
        chance = self.chance
        kind = chance.choices(_KINDS, _KINDS_WEIGHTS)[0]
        is_generating = kind != "embeddings"
        stream = is_generating and chance.random() < 0.5
        is_long = stream and chance.randrange(_LONG_AMONG) == 0
        tokens = self._size(_LONG_LEAST, _LONG_MOST) if is_long else self._size(_TOKENS_LEAST, _TOKENS_MOST)
        may_be_several = kind in ("chat", "completions") and not is_long
        return Wish(
            kind=kind,
            text=self._text(),
            tokens=tokens if is_generating else 0,
            maximum=self._maximum(tokens, stream=stream) if is_generating else None,
            maximum_field=chance.choice(_MAXIMUM_FIELDS.get(kind, ("",))),
            choices=chance.randint(2, 3) if may_be_several and chance.random() < 0.15 else 1,
            stream=stream,
            usage=kind != "responses" and chance.random() < 0.5,
            leave=self._leave() if chance.random() < self._plan.disconnects else None,
        )

    def _size(self, least: int, most: int) -> int:
        """A size of any order between the two: as many small ones as large ones."""
        return round(math.exp(self.chance.uniform(math.log(least), math.log(most))))

    def _text(self) -> str:
        words = self._size(_WORDS_LEAST, _WORDS_MOST)
        start = self.chance.randrange(_SCROLL_WORDS - words)
        # Without a blank before it many a word has two tokens; this one has one.
        return " ".join(["the", *self._scroll[start + 1 : start + words]])

    def _maximum(self, tokens: int, *, stream: bool) -> int | None:
        """None, one that cuts the answer short, one that is just enough, and such as agents ask for."""
        cut, enough = max(1, tokens // 2), tokens + self.chance.randint(0, 50)
        return self.chance.choice([None, cut, enough, enough, 4096, 32_000 if stream else 4096])

    def _leave(self) -> Leave:
        chance = self.chance
        return chance.choice(
            [
                Leave("after_a_time", after_s=self._size(1, 2000) / 1000),
                Leave("after_some_chunks", chunks=chance.randint(1, 50)),
                Leave("before_the_end"),
            ]
        )


def mark_of(asked: Mapping[str, Any]) -> str:
    """The mark in a request as it arrived at the upstream; empty where it has none."""
    model = str(asked.get("model"))
    if model.startswith(MODEL_PREFIX) and client_of(mark := model.removeprefix(MODEL_PREFIX)) is not None:
        return mark
    messages = asked.get("messages")
    prompt = messages[-1].get("content") if messages else asked.get("prompt", asked.get("input"))
    if isinstance(prompt, list):
        prompt = prompt[0]
    return prompt.partition(" ")[0] if isinstance(prompt, str) else ""


def client_of(mark: str) -> int | None:
    """Whose call it is, by its mark; None where the mark is none of ours."""
    match = _MARK.fullmatch(mark)
    return int(match[1]) if match else None
