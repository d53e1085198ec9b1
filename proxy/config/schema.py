"""The shape of quotas.yaml: every key once, with its type, its default and a sentence.

The sentences are the descriptions of the JSON Schema too. Unknown keys are refused, and so is a key left empty,
which would otherwise be a limit that silently isn't there. What a single value may look like is said in `scalars`,
what is wrong in our own words in `faults`, and whether names fit that point at each other in `config`.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from proxy.config import values
from proxy.policy.amounts import MEASURES
from proxy.policy.policy import Kind, OnDisconnect, Secret
from proxy.policy.quota import Combine, Enforce, Limit

# What a value may always be instead: a reference, of which the schema can't know what it stands for.
INTERPOLATION_PATTERN = r".*\$\{.+\}.*"

Weekday = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
Encoding = Literal["o200k_base", "o200k_harmony", "cl100k_base", "p50k_base", "p50k_edit", "r50k_base", "gpt2"]


def _written(value: object) -> object:
    """Text as it was written, also where it looks like a number (a user called 1001)."""
    return str(value) if type(value) is int else value


def _flag(value: object) -> object:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _string(**more: object) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", **more})


def _number(least: int) -> WithJsonSchema:
    text = rf"^([0-9]+(_[0-9]+)*[kM]?|{INTERPOLATION_PATTERN})$"
    return WithJsonSchema({"anyOf": [{"type": "integer", "minimum": least}, {"type": "string", "pattern": text}]})


_AsWritten = BeforeValidator(_written)
_NAMED = WithJsonSchema({"type": ["string", "integer"], "pattern": values.NAME.pattern})
Text = Annotated[str, _AsWritten, AfterValidator(values.one_line)]
Name = Annotated[str, _AsWritten, AfterValidator(values.name), _NAMED]
GroupName = Annotated[str, _AsWritten, AfterValidator(values.group_name), _NAMED]
UserName = Annotated[str, _AsWritten, AfterValidator(values.user_name), _string(minLength=1, maxLength=254)]
ModelName = Annotated[str, _AsWritten, AfterValidator(values.model_name), _string(minLength=1)]
ServedName = Annotated[str, _AsWritten, AfterValidator(values.served_name), _string(minLength=1)]
Glob = Annotated[str, _AsWritten, AfterValidator(values.glob), _string(minLength=1)]
Globs = Annotated[list[Glob], Field(min_length=1)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Count = Annotated[int, BeforeValidator(values.count), _number(0)]
Positive = Annotated[int, BeforeValidator(values.positive), _number(1)]
Wait = Annotated[int, BeforeValidator(values.wait_ms), _string()]
LedgerWait = Annotated[int, BeforeValidator(values.ledger_wait_ms), _string()]
KeepFor = Annotated[int, BeforeValidator(values.keep_ms), _string()]
Per = Annotated[str, _AsWritten, AfterValidator(values.per)]
Address = Annotated[str, _AsWritten, AfterValidator(values.address)]
Origin = Annotated[str, AfterValidator(values.origin)]
Zone = Annotated[str, AfterValidator(values.zone)]
ApiVersion = Annotated[str, AfterValidator(values.api_version)]
BaseUrl = Annotated[str, AfterValidator(values.base_url)]
Database = Annotated[str, AfterValidator(values.database)]
# A user's or admin's key: what is kept of it is its digest only.
KeyDigest = Annotated[str, _AsWritten, AfterValidator(values.key_digest), _string(minLength=1)]
ApiKey = Annotated[Secret, BeforeValidator(values.secret), _string(minLength=1)]

EMPTY = "this is empty; give it a value or leave it out"


class Section(BaseModel):
    """One mapping of the file. `called` is how a sentence names it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True, hide_input_in_errors=True
    )
    called: ClassVar[str]
    may_be_null: ClassVar[frozenset[str]] = frozenset()

    @field_validator("*", mode="before")
    @classmethod
    def _is_not_left_empty(cls, value: object, info: ValidationInfo) -> object:
        if value is None and info.field_name not in cls.may_be_null:
            raise ValueError(EMPTY)
        return value


class Server(Section):
    """Where the proxy listens. A change needs a restart."""

    called = "server"
    may_be_null = frozenset({"admin"})

    api: Address = Field("127.0.0.1:8080", description="host:port of what users call, and health.")
    admin: Address | None = Field(
        "127.0.0.1:8081",
        description="host:port of /metrics and health; null turns this listener off.",
    )
    cors: list[Origin] = Field(
        default=[],
        description="The origins of web pages whose scripts may call the API, as in https://app.example; "
        '"*" lets in all. Left out: none.',
        examples=[["https://app.example"]],
    )
    connections: Positive = Field(
        4000, description="How many connections each listener holds at once; the next gets a 503."
    )


class Keep(Section):
    """How long records are kept; what counts toward the quotas is kept apart from them."""

    called = "keep"
    may_be_null = frozenset({"calls", "days"})

    calls: KeepFor | None = Field(
        90 * 86_400_000, description="The records of single calls, as in 90d; null keeps them for ever."
    )
    days: KeepFor | None = Field(
        1100 * 86_400_000, description="The sums of each day, user, group and model; null keeps them for ever."
    )

    @model_validator(mode="after")
    def _keeps_sums_longer(self) -> "Keep":
        if self.days is not None and (self.calls is None or self.days < self.calls):
            raise ValueError("days is shorter than calls; keep the sums at least as long as what they are sums of")
        return self


class Allow(Section):
    """What requests may use that costs, or reaches, beyond what quotas see."""

    called = "allow"

    tools: list[ServedName] = Field(
        default=[],
        description="Types of tools of the upstream's own, on /responses and /messages; web_search also opens "
        "web_search_options of chat. What such a tool fetches or does is not bounded by any quota.",
        examples=[["web_search", "mcp"]],
    )
    service_tiers: list[ServedName] = Field(
        default=[],
        description="What service_tier may say beside auto, default and standard_only; others have other prices.",
        examples=[["flex"]],
    )
    betas: list[ServedName] = Field(
        default=[],
        description="Of kind anthropic: the betas that users may ask for with the header anthropic-beta, beside "
        "those that change neither price nor reach. Others are left out of what is sent.",
        examples=[["context-1m-2025-08-07"]],
    )
    store: Flag = Field(
        True,
        description="Whether the upstream may keep answers, in the account that all users share; each user reaches "
        "only their own. If not, /responses is sent with store: false.",
    )


class Upstream(Section):
    """A server that calls are forwarded to."""

    called = "an upstream"

    base_url: BaseUrl = Field(
        description="http:// or https:// address, with /v1 where the server has it.",
        examples=["https://api.openai.com/v1"],
    )
    api_key: ApiKey | None = Field(
        None,
        repr=False,
        description="The key sent to this server, by reference: ${OPENAI_API_KEY}. None: none is sent.",
    )
    kind: Kind = Field(
        "openai",
        description="Whose habits the server has: its auth header, its paths and its fields. OpenRouter, LiteLLM and "
        "most others have those of openai.",
    )
    api_version: ApiVersion | None = Field(
        None,
        description="For azure: the api-version of calls that name none, or one from before 2024-09-01. Left out: "
        "2024-10-21; at /openai/v1 none.",
        examples=["2024-10-21"],
    )
    on_disconnect: OnDisconnect | None = Field(
        None,
        description="When a client leaves a running answer: drain reads on and charges the truth (the default for "
        "openai, azure, anthropic, simulator), stop ends it at the upstream (for vllm, ollama, llamacpp).",
    )
    allow: Allow = Field(Allow(), description="What requests may use beyond what quotas see.")

    @model_validator(mode="after")
    def _has_versions(self) -> "Upstream":
        if self.api_version and self.kind != "azure":
            raise ValueError("api_version is for upstreams of kind: azure; leave it out of this one")
        return self

    def when_client_leaves(self) -> OnDisconnect:
        """`on_disconnect`, or what suits this kind: hosted servers bill an answer that was left, our own stop."""
        return self.on_disconnect or ("stop" if self.kind in ("vllm", "ollama", "llamacpp") else "drain")


class Target(Section):
    """One of the upstreams that serve a model."""

    called = "one of a model's upstreams"

    upstream: Name = Field(description="Which upstream.")
    model: ServedName | None = Field(None, description="What it calls the model; the same name where left out.")
    weight: Count = Field(
        1, description="Its share of the calls; at 0 it is asked only where none of the others can be."
    )


class Model(Section):
    """A model as clients name it."""

    called = "a model"

    upstream: Name | None = Field(None, description="Which upstream serves it; default_upstream, or the only one.")
    upstreams: Annotated[list[Target], Field(min_length=1)] | None = Field(
        None, description="Several that serve it; where one can't, another is asked before the client hears of it."
    )
    model: ServedName | None = Field(None, description="What the upstream calls it; the same name where left out.")
    max_output_tokens: Positive | None = Field(None, description="The longest answer it gives, in tokens.")
    context: Positive | None = Field(None, description="Input and answer together at most, in tokens.")
    encoding: Encoding | None = Field(None, description="Its tokenizer; guessed from the name where left out.")
    reasoning: Flag | None = Field(
        None,
        description="Whether it thinks in tokens that its answer doesn't show. Left out: at openai and azure all but "
        "the gpt-4 and gpt-3.5 models do, elsewhere none.",
    )
    smallest_answer: Positive | None = Field(
        None, description="No answer is started that could be shorter, unless it is asked for. Left out: 1024 tokens."
    )
    allow: Allow | None = Field(None, description="The same as of an upstream, in its place. Left out: as there.")

    @model_validator(mode="after")
    def _fits_itself(self) -> "Model":
        if self.max_output_tokens and self.context and self.max_output_tokens > self.context:
            raise ValueError("max_output_tokens is larger than context; write the smaller number there")
        if self.upstreams and (self.upstream or self.model):
            raise ValueError("upstreams says already where it is served; write upstream and model below upstreams")
        if self.upstreams and len({(place.upstream, place.model) for place in self.upstreams}) < len(self.upstreams):
            raise ValueError("two of its upstreams are the same; write one of them, with the sum of their weights")
        return self


class Quota(Section):
    """One rule: for these models so much, in each such window."""

    called = "a quota"

    models: Globs = Field(default=["*"], description="Which models it limits: names or patterns (*, ?, […]).")
    tokens: Count | None = Field(None, description="Input and output tokens together: 200000, 200_000, 200k or 5M.")
    input_tokens: Count | None = Field(None, description="Input tokens alone.")
    output_tokens: Count | None = Field(None, description="Output tokens alone.")
    requests: Count | None = Field(None, description="Calls.")
    per: Per = Field(
        description="The window: a duration from the first call on (90s, 15m, 6h, 7d, 2w) or an interval of the "
        "calendar (minute, hour, day, week, month, quarter, year).",
        examples=["day", "6h"],
    )
    shared: Flag = Field(False, description="One pot for the whole group, instead of the same for each member.")
    enforce: Enforce = Field(
        "exact",
        description="exact: never over. after: counts when a call has ended, so it may end over. shadow: refuses "
        "nobody, only reports what it would have refused.",
    )
    overdraft: Count = Field(
        0,
        description="How far an answer that has begun may go over this quota's limit, in tokens, before it is ended.",
    )

    @model_validator(mode="after")
    def _has_a_limit(self) -> "Quota":
        if not self.limits():
            raise ValueError(
                "this quota limits nothing; write at least one of tokens, input_tokens, output_tokens, requests"
            )
        return self

    @model_validator(mode="after")
    def _may_be_overdrawn(self) -> "Quota":
        if self.overdraft and (self.enforce != "exact" or (self.tokens is None and self.output_tokens is None)):
            raise ValueError(
                "overdraft is for answers at an exact limit of tokens or output_tokens; leave it out of this quota"
            )
        return self

    def limits(self) -> tuple[Limit, ...]:
        """Its numbers, in one order."""
        stated = ((measure, getattr(self, measure)) for measure in MEASURES)
        return tuple(Limit(measure, maximum) for measure, maximum in stated if maximum is not None)


class Group(Section):
    """A named set of users with quotas. everyone and default are reserved."""

    called = "a group"

    quotas: dict[Name, Quota] = Field(
        default={}, description="Its quotas by name; all that cover a model must have room."
    )
    models: Globs | None = Field(None, description="Which models its members may use. Left out: it says nothing.")
    unlimited: Flag = Field(False, description="Its members are let in without limit (but for those of everyone).")

    @model_validator(mode="after")
    def _is_unlimited_or_not(self) -> "Group":
        if self.unlimited and self.quotas:
            raise ValueError("unlimited and quotas contradict each other; write one of them, or two groups")
        return self


class User(Section):
    """Who may call, with which keys."""

    called = "a user"

    groups: list[Name] = Field(default=[], description="The groups; everyone and default need not be named.")
    keys: list[KeyDigest] = Field(
        default=[],
        repr=False,
        description="sha256: and the digest in hex, or a reference: ${ALICE_KEY}. In plain: 24 characters or more.",
    )


class File(Section):
    """Who may use how much of which model."""

    called = "the file"

    server: Server = Field(default=Server(), description="The two listeners.")
    admin_keys: dict[Name, KeyDigest] = Field(
        default={},
        repr=False,
        description="Keys for the admin API, which is not there yet: they open nothing.",
    )
    database: Database = Field(
        "sqlite:///quotas.db",
        repr=False,
        description="Where the books are kept: sqlite:///file for one machine, or "
        "postgresql://user:password@host/name for as many as share it. A change needs a restart.",
    )
    timezone: Zone = Field("UTC", description="Where the calendar windows begin, as in Europe/Berlin.")
    week_starts: Weekday = Field("monday", description="On which day a week begins.")
    combine: Combine = Field(
        "any_group",
        description="any_group: room in one of the user's groups lets a call in. every_group: all need room.",
    )
    unmatched: Literal["refuse", "allow"] = Field(
        "refuse", description="What becomes of a model that no quota of the user covers."
    )
    wait: Wait = Field(
        30_000, description="How long a call may wait for calls in flight before it is refused as busy, as in 30s."
    )
    ledger_wait: LedgerWait = Field(
        10_000,
        description="How long a call may wait for a database that is away before it is answered 503, as in 10s.",
    )
    retry_for: Wait = Field(
        30_000,
        description="How long after a call was sent it may still be sent again, if an upstream can't take it and "
        "nothing has gone to its client, as in 30s; 0s for not at all.",
    )
    keep: Keep = Field(default=Keep(), description="How long records of what was used are kept.")
    help: Text = Field("", max_length=1000, description="A link or a sentence at the end of every refusal.")
    upstreams: Annotated[dict[Name, Upstream], Field(min_length=1)] = Field(
        description="The servers that calls are forwarded to, by name.",
        examples=[{"openai": {"base_url": "https://api.openai.com/v1", "api_key": "${OPENAI_API_KEY}"}}],
    )
    models: Annotated[dict[ModelName, Model], Field(min_length=1)] | None = Field(
        None,
        description='The models there are: a closed list, which "*" opens. '
        "Left out: every name goes to the default upstream.",
    )
    default_upstream: Name | None = Field(
        None, description="Where models go that name no upstream; the only one by itself."
    )
    groups: dict[GroupName, Group] = Field(
        default={},
        description="In order: a call is let in through the first of the user's groups with room. everyone binds all "
        "users in addition; default binds those none of whose groups has a quota for the model.",
    )
    users: dict[UserName, User] = Field(default={}, description="Who may call.")


def section_at(path: tuple[str | int, ...]) -> type[Section]:
    """The section that the key at the end of this path stands in."""
    match path:
        case ("server", _):
            return Server
        case ("keep", _):
            return Keep
        case ("upstreams" | "models", _, "allow", _):
            return Allow
        case ("upstreams", _, _):
            return Upstream
        case ("models", _, "upstreams", _, _):
            return Target
        case ("models", _, _):
            return Model
        case ("groups", _, _):
            return Group
        case ("groups", _, "quotas", _, _):
            return Quota
        case ("users", _, _):
            return User
    return File


def json_schema() -> str:
    """The schema of the whole file."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **_tidied(File.model_json_schema())}
    for section, name in (("Server", "admin"), ("Keep", "calls"), ("Keep", "days")):
        schema["$defs"][section]["properties"][name]["type"] = ["string", "null"]
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _tidied(schema: dict[str, Any]) -> dict[str, Any]:
    """Without titles that only repeat keys, without null for what is left out, and with names held to their rule."""
    tidy: dict[str, Any] = {
        key: _tidied(value) if isinstance(value, dict) else value for key, value in schema.items()
    }
    if isinstance(tidy.get("title"), str):
        del tidy["title"]
    if "anyOf" in tidy:
        left = [_tidied(option) for option in tidy.pop("anyOf") if option != {"type": "null"}]
        tidy |= left[0] if len(left) == 1 else {"anyOf": left}
    if "default" in tidy and tidy["default"] is None:
        del tidy["default"]
    if "patternProperties" in tidy:
        tidy["additionalProperties"] = False
    return tidy
