"""The upstreams, the models that they serve, and what requests may use there.

Quotas do not depend on it: they match the name of a model that a client asks for, whether the catalog has it or not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

OnDisconnect = Literal["drain", "stop"]
# A model's name as the patterns of quotas match it: a text exactly as it is, or all spellings of a name that its
# server takes in any case.
MatchedName = str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Naming:
    """Which names a server takes for one and the same model.

    The defaults are what it adds to a name that lacks them:

        any_case                                    GPT-4O is gpt-4o
        default_tag ":latest"                       llama3 is llama3:latest
        default_namespace "library/"                llama3 is library/llama3
        default_host "registry.ollama.ai/"          mine/llama3 is registry.ollama.ai/mine/llama3
    """

    any_case: bool = False
    default_tag: str = ""
    default_namespace: str = ""
    default_host: str = ""

    def spellings(self, name: str) -> tuple[str, ...]:
        """All names of this model in lower case, the shortest first; none if its name has no other spelling."""
        if not self.any_case:
            return ()
        plain = name.casefold().removeprefix(self.default_host).removeprefix(self.default_namespace)
        plain = plain.removesuffix(self.default_tag)
        names = [plain]
        if self.default_tag and ":" not in plain.rpartition("/")[2]:
            names.append(plain + self.default_tag)
        with_namespace = names
        if self.default_namespace and "/" not in plain:
            with_namespace = [self.default_namespace + each for each in names]
            names = names + with_namespace
        if self.default_host:
            names = names + [self.default_host + each for each in with_namespace]
        return tuple(names)


class Secret:
    """A string whose `repr` hides it from logs, tracebacks and dumps. Only `reveal()` returns it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The string itself, for the code that sends it."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)


@dataclass(frozen=True, slots=True)
class KeyCommand:
    """A program that prints the key of an upstream, with its arguments, which may contain secrets.

    It runs every `every_s` seconds.
    """

    words: tuple[str, ...] = field(repr=False)
    every_s: int

    @property
    def program(self) -> str:
        """The program, as the configuration names it."""
        return self.words[0]


@dataclass(frozen=True, slots=True)
class OAuthClient:
    """How to get an access token for an upstream by the client credentials grant (RFC 6749 §4.4)."""

    token_url: str
    client_id: str
    client_secret: Secret
    scope: str | None = None


# A key that has to be fetched, again and again. As a tuple for `isinstance`, which takes longer for a union.
FETCHED_KEYS = (KeyCommand, OAuthClient)


@dataclass(frozen=True, slots=True)
class Allow:
    """Features that requests may use although they cost, or reach, more than quotas can count.

    - `tools`: types of tools that the upstream runs itself.
    - `service_tiers`: values of `service_tier` beside the usual ones.
    - `betas`: Anthropic's betas that users may ask for.
    - `store`: whether the upstream may keep answers.
    """

    tools: frozenset[str] = frozenset()
    service_tiers: frozenset[str] = frozenset()
    betas: frozenset[str] = frozenset()
    store: bool = True


@dataclass(frozen=True, slots=True)
class Transport:
    """How requests get to an upstream, and how long it may take.

    - `connect_timeout_ms`: for the name, the connection, the proxy and TLS together.
    - `idle_timeout_ms`: how long it may take for the head of its answer, and be silent in the middle of it.
    - `first_byte_timeout_ms`: how long it may send nothing of its answer after it has the request. None: no limit.
    - `headers`: sent with each request; names in lower case, each once.
    - `proxy`: the http:// URL of the proxy that connections are made through, with its user and password.
    - `ca`: certificates in PEM that are trusted in addition to those of the system.
    """

    connect_timeout_ms: int = 5_000
    # SDKs wait ten minutes for an answer, and a retry is billed again. Giving up earlier would only cost more.
    idle_timeout_ms: int = 600_000
    first_byte_timeout_ms: int | None = None
    headers: tuple[tuple[str, Secret], ...] = ()
    proxy: Secret | None = None
    ca: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Upstream:
    """A server that calls are forwarded to.

    `base_url` includes `/v1` and does not end with a slash. `api_version` is Azure's, for calls that name none.
    `api_key` is the key itself, or where it is fetched.
    `kind` is plain text here: `config` checks that it names one of the kinds in `formats.kinds`, and takes `naming`
    from there. `extra_usage` are the members of its usage that it writes in addition to the output. `refuse` are
    fields that no request for one of its models may use. Each process sends it at most `max_in_flight` calls at a
    time (None: any number). While it is silent, the client of a stream gets a comment every `heartbeat_s` seconds
    (None: none).
    """

    name: str
    base_url: str
    api_key: Secret | KeyCommand | OAuthClient | None
    kind: str = "openai"
    on_disconnect: OnDisconnect = "drain"
    api_version: str | None = None
    allow: Allow = Allow()
    extra_usage: tuple[str, ...] = ()
    refuse: frozenset[str] = frozenset()
    naming: Naming = Naming()
    transport: Transport = Transport()
    max_in_flight: int | None = None
    heartbeat_s: float | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A model as clients name it, where it is served, and what is known about it (in tokens).

    - `reasoning`: whether it generates reasoning tokens that its answer does not show. None: its name decides.
    - `smallest_answer`: the shortest answer that is worth starting. None: 1,024, and less where quotas are small.
    - `tokens_per_request`, `tokens_per_image`: the price of an answer that states no tokens, on the endpoints that
      are billed by the piece (see `formats.pieces`). Both add up. None: it has no such price.
    - `allow`: what its requests may use. None: what its upstream allows.
    - `others`: the same model at other upstreams. Calls are distributed over those that are available in proportion
      to `weight`. One with weight 0 gets a call only if no other takes it.
    - `spellings`: all names of an unlisted model, if its server takes names in any case.
    """

    name: str
    upstream: Upstream
    upstream_model: str
    max_output_tokens: int | None = None
    context: int | None = None
    encoding: str | None = None
    reasoning: bool | None = None
    smallest_answer: int | None = None
    tokens_per_request: int | None = None
    tokens_per_image: int | None = None
    weight: int = 1
    others: tuple["Model", ...] = ()
    allow: Allow | None = None
    spellings: tuple[str, ...] = ()

    @property
    def matched_name(self) -> MatchedName:
        """Its name as quotas match it."""
        return self.spellings or self.name

    @property
    def targets(self) -> tuple["Model", ...]:
        """The model at each upstream that serves it, in the order of the file."""
        return (self, *self.others)

    @property
    def allows(self) -> Allow:
        """What its requests may use there: its own `allow` as a whole if it has one, else that of its upstream."""
        return self.upstream.allow if self.allow is None else self.allow

    def named(self, name: str) -> "Model":
        """This model under another name, at the same upstreams: what the entry "*" gives for an unlisted name."""
        others = tuple(other.named(name) for other in self.others)
        smallest = self.smallest_answer
        return Model(name, self.upstream, name, smallest_answer=smallest, weight=self.weight, others=others)


@dataclass(frozen=True, slots=True)
class Catalog:
    """All upstreams and models.

    `models` is a closed list, unless it is None (any name goes to `default_upstream`) or has an entry "*".
    `smallest_answer` is that of names which go to `default_upstream`; each of `models` has its own.
    """

    upstreams: Mapping[str, Upstream]
    models: Mapping[str, Model] | None = None
    default_upstream: Upstream | None = None
    smallest_answer: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the listed models, in the order of the file."""
        return tuple(name for name in self.models or {} if name != "*")

    @property
    def open_upstreams(self) -> tuple[Upstream, ...]:
        """The upstreams that get the calls for unlisted names; empty if the list is closed."""
        anything = (self.models or {}).get("*")
        if anything is not None:
            return tuple(target.upstream for target in anything.targets)
        return () if self.models is not None or self.default_upstream is None else (self.default_upstream,)

    def model(self, name: str) -> Model | None:
        """The model that a client means by `name`; None if the list is closed and does not contain it."""
        listed = (self.models or {}).get(name)
        if listed is not None and name != "*":
            return listed
        # A client may ask for a model that is called "*". It gets what any unlisted name gets, not the entry itself.
        anything = (self.models or {}).get("*")
        if anything is not None:
            return self._in_one_spelling(anything.named(name))
        upstream = self.default_upstream if self.models is None else None
        if upstream is None:
            return None
        return self._in_one_spelling(Model(name, upstream, name, smallest_answer=self.smallest_answer))

    def lists(self, name: str) -> bool:
        """Whether a model is listed by this very name."""
        return name != "*" and name in (self.models or {})

    def _in_one_spelling(self, model: Model) -> Model:
        """An unlisted model by the name that all its spellings share: the listed model if that has the same name.

        With `gpt-4o` listed at an upstream of Azure, an open list and a call for `GPT-4O`, it is the listed `gpt-4o`.
        """
        targets = model.targets
        spellings = tuple(
            dict.fromkeys(name for target in targets for name in target.upstream.naming.spellings(target.name))
        )
        if not spellings:
            return model
        upstreams = {target.upstream.name for target in targets}
        for name, listed in (self.models or {}).items():
            if name.casefold() in spellings and any(
                target.upstream.name in upstreams and target.upstream_model.casefold() in spellings
                for target in listed.targets
            ):
                return listed
        first, *others = (replace(target, name=spellings[0], spellings=spellings, others=()) for target in targets)
        return replace(first, others=tuple(others))
