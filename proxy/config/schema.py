"""The shape of quotas.yaml: every key with its type, its default and its description.

`File` is the whole file, and each other `Section` is one of its mappings. The types of single values come first: each
combines a rule of `values` with what the JSON Schema says about it. `json_schema()` renders the JSON Schema, in which
the descriptions below are what an editor shows.

An unknown key is a mistake. So is a key without a value: YAML reads `tokens:` as null, which would be a limit that
silently does not exist.

Other modules hold the texts of mistakes (`messages`) and the check that a name refers to something (`loader`).
"""

import json
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

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
from proxy.formats.kinds import KINDS, kind_of
from proxy.logs import LogFormat, LoggedCalls
from proxy.policy.amounts import Measure
from proxy.policy.catalog import OnDisconnect, Secret
from proxy.policy.quota import Combine, Enforce, Limit

# ----------------------------------------------------------------------------------------- the types of single values

# An editor can't know the value of `${LIMIT}`, so the JSON Schema accepts it in place of a number.
INTERPOLATION_PATTERN = r".*\$\{.+\}.*"

Weekday = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
Encoding = Literal["o200k_base", "o200k_harmony", "cl100k_base", "p50k_base", "p50k_edit", "r50k_base", "gpt2"]

# The names in `KINDS`, so that a new kind needs no change here. A type checker can't evaluate that, and sees a text.
if TYPE_CHECKING:
    KindName = str
else:
    KindName = Literal[tuple(KINDS)]


def _kinds_that(on_disconnect: OnDisconnect) -> str:
    """The kinds of upstream with this default, for a description."""
    return ", ".join(name for name, kind in KINDS.items() if kind.on_disconnect == on_disconnect)


def _int_to_text(value: object) -> object:
    """A name may look like a number (a user called 1001), which YAML reads as an integer."""
    return str(value) if type(value) is int else value  # not isinstance: a bool is an int too


def _text_to_bool(value: object) -> object:
    """An interpolated `${FLAG}` is always text."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _string_schema(**more: object) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", **more})


def _number_schema(minimum: int) -> WithJsonSchema:
    text = rf"^([0-9]+(_[0-9]+)*[kM]?|{INTERPOLATION_PATTERN})$"
    return WithJsonSchema({"anyOf": [{"type": "integer", "minimum": minimum}, {"type": "string", "pattern": text}]})


_IntToText = BeforeValidator(_int_to_text)
_NAME_SCHEMA = WithJsonSchema({"type": ["string", "integer"], "pattern": values.NAME.pattern})
Text = Annotated[str, _IntToText, AfterValidator(values.one_line)]
Name = Annotated[str, _IntToText, AfterValidator(values.name), _NAME_SCHEMA]
GroupName = Annotated[str, _IntToText, AfterValidator(values.group_name), _NAME_SCHEMA]
UserName = Annotated[str, _IntToText, AfterValidator(values.user_name), _string_schema(minLength=1, maxLength=254)]
ModelName = Annotated[str, _IntToText, AfterValidator(values.model_name), _string_schema(minLength=1)]
ServedName = Annotated[str, _IntToText, AfterValidator(values.served_name), _string_schema(minLength=1)]
RefusedField = Annotated[str, AfterValidator(values.field_name), _string_schema(minLength=1)]
Glob = Annotated[str, _IntToText, AfterValidator(values.glob), _string_schema(minLength=1)]
Globs = Annotated[list[Glob], Field(min_length=1)]
Flag = Annotated[bool, BeforeValidator(_text_to_bool)]
Count = Annotated[int, BeforeValidator(values.count), _number_schema(0)]
Positive = Annotated[int, BeforeValidator(values.positive), _number_schema(1)]
BodyMemory = Annotated[int, BeforeValidator(values.body_memory), _number_schema(values.BODY_MEMORY_MIN)]
Wait = Annotated[int, BeforeValidator(values.wait_ms), _string_schema()]
LedgerWait = Annotated[int, BeforeValidator(values.ledger_wait_ms), _string_schema()]
KeepFor = Annotated[int, BeforeValidator(values.keep_ms), _string_schema()]
Per = Annotated[str, _IntToText, AfterValidator(values.per)]
Address = Annotated[str, _IntToText, AfterValidator(values.address)]
Origin = Annotated[str, AfterValidator(values.origin)]
Zone = Annotated[str, AfterValidator(values.zone)]
UsageField = Annotated[str, AfterValidator(values.usage_field), _string_schema(minLength=1)]
ApiVersion = Annotated[str, AfterValidator(values.api_version)]
BaseUrl = Annotated[str, AfterValidator(values.base_url)]
Database = Annotated[str, AfterValidator(values.database)]
# A user's or admin's key. The validated file has only its digest.
KeyDigest = Annotated[str, _IntToText, AfterValidator(values.key_digest), _string_schema(minLength=1)]
ApiKey = Annotated[Secret, BeforeValidator(values.secret), _string_schema(minLength=1)]

EMPTY = "this has no value; write one, or remove the key"

# ------------------------------------------------------------------------------------------------------- the sections


class Section(BaseModel):
    """One mapping of the file. `display_name` is what a mistake calls it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True, hide_input_in_errors=True
    )
    display_name: ClassVar[str]
    nullable: ClassVar[frozenset[str]] = frozenset()

    @field_validator("*", mode="before")
    @classmethod
    def _has_a_value(cls, value: object, info: ValidationInfo) -> object:
        if value is None and info.field_name not in cls.nullable:
            raise ValueError(EMPTY)
        return value


class Server(Section):
    """The two listeners. A change takes effect at a restart."""

    display_name = "server"
    nullable = frozenset({"admin", "connections_per_address"})

    api: Address = Field("127.0.0.1:8080", description="host:port of the API that users call, and of health checks.")
    admin: Address | None = Field(
        "127.0.0.1:8081",
        description="host:port of /metrics and health checks; null turns this listener off.",
    )
    cors: list[Origin] = Field(
        default=[],
        description="The origins of web pages whose scripts may call the API, as in https://app.example; "
        '"*" allows all. Default: none.',
        examples=[["https://app.example"]],
    )
    connections: Positive = Field(
        4000,
        description="The most connections that each listener keeps open. For a further one, the connection that has "
        "been idle longest is closed; if none is idle, the further one gets a 503.",
    )
    connections_per_address: Positive | None = Field(
        None,
        description="The most connections of one client address (IPv6: of one /64 network) to each listener, by the "
        "same rule. Default: null, no limit, because all users behind a load balancer have one address.",
    )
    body_memory: BodyMemory = Field(
        256_000_000,
        description="How many bytes the bodies above 256 KiB of all calls in flight may have together, as in 256M; "
        "further ones wait up to 10 s and then get a 503. A call takes two to three times its body.",
    )


class Log(Section):
    """The log of `serve`, on standard error."""

    display_name = "log"

    format: LogFormat = Field("json", description="json: one JSON object per line. console: text for people.")
    calls: LoggedCalls = Field(
        "all",
        description="Which requests get a line. all: each one. refusals: those that the proxy itself answers with "
        "an error. none: no request. No line has a key, a prompt or an answer.",
    )


class Keep(Section):
    """How long usage records are kept. The counters of quotas are separate and not affected."""

    display_name = "keep"
    nullable = frozenset({"calls", "days"})

    calls: KeepFor | None = Field(
        90 * 86_400_000, description="The records of single calls, as in 90d; null keeps them forever."
    )
    days: KeepFor | None = Field(
        1100 * 86_400_000, description="The daily sums by user, group and model; null keeps them forever."
    )

    @model_validator(mode="after")
    def _keeps_sums_longer(self) -> "Keep":
        # Otherwise a call that is corrected late would bring back the sum of a day that was already deleted.
        if self.days is not None and (self.calls is None or self.days < self.calls):
            raise ValueError("days is shorter than calls; keep the sums at least as long as the calls in them")
        return self


class Allow(Section):
    """Features with a cost, or with access to other systems, that quotas do not count."""

    display_name = "allow"

    tools: list[ServedName] = Field(
        default=[],
        description="Types of the upstream's own tools that requests may use on /responses and /messages; web_search "
        "also allows web_search_options in chat completions. No quota limits what such a tool fetches or does.",
        examples=[["web_search", "mcp"]],
    )
    service_tiers: list[ServedName] = Field(
        default=[],
        description="Values of service_tier that requests may use besides auto, default and standard_only; others "
        "have other prices.",
        examples=[["flex"]],
    )
    betas: list[ServedName] = Field(
        default=[],
        description="For kind anthropic: values of the header anthropic-beta that requests may use, besides those "
        "that change neither price nor access. Others are removed from the forwarded request.",
        examples=[["context-1m-2025-08-07"]],
    )
    store: Flag = Field(
        True,
        description="Whether the upstream may store answers, in the account that all users share; each user can "
        "access only their own. If false, /responses is sent with store: false.",
    )


class Upstream(Section):
    """A server that calls are forwarded to."""

    display_name = "an upstream"

    base_url: BaseUrl = Field(
        description="The server's http:// or https:// address, with /v1 if the server has it.",
        examples=["https://api.openai.com/v1"],
    )
    api_key: ApiKey | None = Field(
        None,
        repr=False,
        description="The key that is sent to this server, as in ${OPENAI_API_KEY}. Default: no key is sent.",
    )
    kind: KindName = Field(
        "openai",
        description="The vendor or server software, which decides the auth header, the paths and the fields of "
        "requests. openai is right for OpenRouter, LiteLLM and most others.",
    )
    api_version: ApiVersion | None = Field(
        None,
        description="For kind azure: the api-version of calls that name none, or one before 2024-09-01. "
        "Default: 2024-10-21; none at /openai/v1.",
        examples=["2024-10-21"],
    )
    on_disconnect: OnDisconnect | None = Field(
        None,
        description="What to do when a client disconnects during an answer. drain: read the rest and charge the "
        f"exact usage (default for {_kinds_that('drain')}). stop: close the connection to the upstream "
        f"(default for {_kinds_that('stop')}).",
    )
    allow: Allow = Field(Allow(), description="Features that requests may use although quotas do not count them.")
    extra_usage: list[UsageField] = Field(
        default=[],
        description="Members of the usage that this server writes beside total_tokens and does not include in it; "
        "their tokens are charged as output. Perplexity has reasoning_tokens and citation_tokens.",
        examples=[["reasoning_tokens", "citation_tokens"]],
    )
    refuse: list[RefusedField] = Field(
        default=[],
        description="Fields that no request for a model of this upstream may use, besides those that the proxy "
        "always refuses. A field is used unless it is null, false or [].",
        examples=[["provider"]],
    )

    @model_validator(mode="after")
    def _has_api_version_only_for_azure(self) -> "Upstream":
        if self.api_version and not kind_of(self.kind).has_api_version:
            raise ValueError("api_version is only for upstreams of kind azure; remove it from this one")
        return self

    def effective_on_disconnect(self) -> OnDisconnect:
        """`on_disconnect`, or the default of this kind."""
        return self.on_disconnect or kind_of(self.kind).on_disconnect


class Target(Section):
    """One of several upstreams that serve a model."""

    display_name = "an entry of a model's upstreams"

    upstream: Name = Field(description="The name of the upstream.")
    model: ServedName | None = Field(
        None, description="The model's name at this upstream. Default: the name that clients use."
    )
    weight: Count = Field(
        1, description="Its share of the calls; an upstream with 0 gets a call only if none of the others can."
    )


class Model(Section):
    """A model, by the name that clients use."""

    display_name = "a model"

    upstream: Name | None = Field(
        None, description="The upstream that serves it. Default: default_upstream, or the only upstream."
    )
    upstreams: Annotated[list[Target], Field(min_length=1)] | None = Field(
        None,
        description="Several upstreams that serve it. If one fails, another is tried before the client gets an "
        "error.",
    )
    model: ServedName | None = Field(
        None, description="The model's name at the upstream. Default: the name that clients use."
    )
    max_output_tokens: Positive | None = Field(None, description="The longest answer that it can give, in tokens.")
    context: Positive | None = Field(None, description="The most input and output together, in tokens.")
    encoding: Encoding | None = Field(None, description="Its tokenizer. Default: guessed from the model's name.")
    reasoning: Flag | None = Field(
        None,
        description="Whether it uses reasoning tokens that its answer does not show. Default: at openai and azure "
        "true for all but the gpt-4 and gpt-3.5 models, elsewhere false.",
    )
    smallest_answer: Positive | None = Field(
        None,
        description="No call starts if its answer might have to be shorter than this, unless the call asks for a "
        "shorter one. Default: 1024 tokens.",
    )
    tokens_per_request: Positive | None = Field(
        None,
        description="What an image, speech or transcript costs if its answer reports no tokens, in tokens that are "
        "charged as output. Default: it counts as a request alone, so a quota of tokens does not cover it.",
    )
    tokens_per_image: Positive | None = Field(None, description="The same for each image of an answer; both add up.")
    allow: Allow | None = Field(None, description="Replaces the upstream's allow. Default: the upstream's.")

    @model_validator(mode="after")
    def _is_consistent(self) -> "Model":
        if self.max_output_tokens and self.context and self.max_output_tokens > self.context:
            raise ValueError("max_output_tokens is larger than context; write a smaller max_output_tokens")
        if self.upstreams and (self.upstream or self.model):
            raise ValueError(
                "upstreams can't be combined with upstream or model; write those in the entries of upstreams"
            )
        targets = self.upstreams or ()
        if len({(target.upstream, target.model) for target in targets}) < len(targets):
            raise ValueError("two entries of upstreams are the same; keep one, with the sum of their weights")
        return self


class Quota(Section):
    """One rule: how much of these models in each window."""

    display_name = "a quota"

    models: Globs = Field(default=["*"], description="The models that it limits: names or patterns (*, ?, […]).")
    tokens: Count | None = Field(None, description="Input and output tokens together: 200000, 200_000, 200k or 5M.")
    input_tokens: Count | None = Field(None, description="Input tokens alone.")
    output_tokens: Count | None = Field(None, description="Output tokens alone.")
    requests: Count | None = Field(None, description="Calls.")
    per: Per = Field(
        description="The window: a duration that begins with the first call (90s, 15m, 6h, 7d, 2w), or an interval "
        "of the calendar (minute, hour, day, week, month, quarter, year).",
        examples=["day", "6h"],
    )
    shared: Flag = Field(False, description="One counter for the whole group, instead of one for each member.")
    enforce: Enforce = Field(
        "exact",
        description="exact: never over the limit. after: counts a call when it has ended, so it may end over the "
        "limit. shadow: refuses no call, and only reports what it would have refused.",
    )
    overdraft: Count = Field(
        0,
        description="How many tokens an answer that has begun may go over this quota's limit before it is ended.",
    )

    @model_validator(mode="after")
    def _has_a_limit(self) -> "Quota":
        if not self.limits():
            raise ValueError(f"this quota limits nothing; write at least one of {', '.join(Measure)}")
        return self

    @model_validator(mode="after")
    def _may_be_overdrawn(self) -> "Quota":
        # The other kinds of quota end no answer, so there is nothing for an overdraft to delay.
        has_effect = self.enforce == "exact" and any(limit.measure.counts_output for limit in self.limits())
        if self.overdraft and not has_effect:
            measures = " or ".join(measure for measure in Measure if measure.counts_output)
            raise ValueError(f"overdraft needs enforce: exact and a limit of {measures}; remove it from this quota")
        return self

    def limits(self) -> tuple[Limit, ...]:
        """The limits that are set, in the order of the table of measures."""
        stated = ((measure, getattr(self, measure)) for measure in Measure)
        return tuple(Limit(measure, maximum) for measure, maximum in stated if maximum is not None)


class Group(Section):
    """A named set of users with quotas. The names everyone and default are reserved."""

    display_name = "a group"

    quotas: dict[Name, Quota] = Field(
        default={}, description="Its quotas by name. A call needs capacity in all that cover its model."
    )
    models: Globs | None = Field(
        None,
        description="The models that its members may use. A user may use those of all their groups' lists, or every "
        "model if none of their groups has a list.",
    )
    unlimited: Flag = Field(False, description="Its members have no limits, except those of everyone.")

    @model_validator(mode="after")
    def _is_unlimited_or_not(self) -> "Group":
        if self.unlimited and self.quotas:
            raise ValueError("unlimited and quotas contradict each other; remove one of them, or write two groups")
        return self


class User(Section):
    """A user who may call, with their keys."""

    display_name = "a user"

    groups: list[Name] = Field(
        default=[], description="The user's groups. everyone and default apply without being listed."
    )
    keys: list[KeyDigest] = Field(
        default=[],
        repr=False,
        description="sha256: and the digest in hex, or a key as in ${ALICE_KEY}, with 24 characters or more.",
    )


class File(Section):
    """Who may use how much of which model."""

    display_name = "the file"

    server: Server = Field(default=Server(), description="The two listeners.")
    admin_keys: dict[Name, KeyDigest] = Field(
        default={},
        repr=False,
        description="Keys of the admin API by name. There is no admin API yet, so they give access to nothing.",
    )
    database: Database = Field(
        "sqlite:///quotas.db",
        repr=False,
        description="The database of the ledger: sqlite:///file for one machine, or "
        "postgresql://user:password@host/name for any number of replicas. A change takes effect at a restart.",
    )
    log: Log = Field(default=Log(), description="The log.")
    timezone: Zone = Field("UTC", description="The time zone of calendar windows, as in Europe/Berlin.")
    week_starts: Weekday = Field("monday", description="The first day of a week.")
    combine: Combine = Field(
        "any_group",
        description="any_group: a call needs capacity in one of the user's groups. every_group: in all of them.",
    )
    unmatched: Literal["refuse", "allow"] = Field(
        "refuse", description="What happens to a call for a model that no quota of the user covers."
    )
    wait: Wait = Field(
        30_000,
        description="How long a call may wait for capacity that calls in flight hold before it is refused as busy, "
        "as in 30s.",
    )
    ledger_wait: LedgerWait = Field(
        10_000,
        description="How long a call may wait for an unavailable database before it gets a 503, as in 10s.",
    )
    retry_for: Wait = Field(
        30_000,
        description="How long after a call was first sent it may be sent again, if an upstream fails and nothing was "
        "sent to the client, as in 30s; 0s for never.",
    )
    keep: Keep = Field(default=Keep(), description="How long usage records are kept.")
    help: Text = Field("", max_length=1000, description="A link or a sentence at the end of every refusal.")
    upstreams: Annotated[dict[Name, Upstream], Field(min_length=1)] = Field(
        description="The servers that calls are forwarded to, by name.",
        examples=[{"openai": {"base_url": "https://api.openai.com/v1", "api_key": "${OPENAI_API_KEY}"}}],
    )
    models: Annotated[dict[ModelName, Model], Field(min_length=1)] | None = Field(
        None,
        description='The models that clients can name. The list is closed unless it has "*". '
        "Default: every name goes to the default upstream.",
    )
    default_upstream: Name | None = Field(
        None, description="The upstream of models that name none. Default: the only upstream."
    )
    groups: dict[GroupName, Group] = Field(
        default={},
        description="In order: a call is admitted through the first of the user's groups with capacity. everyone "
        "applies to all users in addition; default applies to users none of whose groups has a quota for the model.",
    )
    users: dict[UserName, User] = Field(default={}, description="The users who may call, by name.")


# The sections at the top that have no names of their own in them.
_TOP_SECTIONS: dict[str | int, type[Section]] = {"server": Server, "log": Log, "keep": Keep}


def section_at(path: tuple[str | int, ...]) -> type[Section]:
    """The section that contains the last key of this path."""
    match path:
        case (name, _) if name in _TOP_SECTIONS:
            return _TOP_SECTIONS[name]
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


# -------------------------------------------------------------------------------------------------- the JSON Schema


def json_schema() -> str:
    """The JSON Schema of the whole file (draft 2020-12), indented, with a line end after it."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **_tidy(File.model_json_schema())}
    # `_tidy` removes null everywhere; these three keys do take it.
    for section, name in (("Server", "admin"), ("Keep", "calls"), ("Keep", "days")):
        schema["$defs"][section]["properties"][name]["type"] = ["string", "null"]
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _tidy(schema: dict[str, Any]) -> dict[str, Any]:
    """pydantic's schema, made as strict as the file and easier to read.

    Removed: titles, which only repeat the keys, and null for optional keys, since an empty key is a mistake. Added:
    `additionalProperties: false` for mappings whose keys are names, so a name that breaks the rule is an error.
    """
    tidy: dict[str, Any] = {key: _tidy(value) if isinstance(value, dict) else value for key, value in schema.items()}
    if isinstance(tidy.get("title"), str):
        del tidy["title"]
    if "anyOf" in tidy:
        options = [_tidy(option) for option in tidy.pop("anyOf") if option != {"type": "null"}]
        tidy |= options[0] if len(options) == 1 else {"anyOf": options}
    if "default" in tidy and tidy["default"] is None:
        del tidy["default"]
    if "patternProperties" in tidy:
        tidy["additionalProperties"] = False
    return tidy
