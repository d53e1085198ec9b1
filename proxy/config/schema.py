"""The shape of quotas.yaml: every key with its type, its default and its description.

`File` is the whole file, and each other `Section` is one of its mappings. The types of single values come first: each
combines a rule of `values` with what the JSON Schema says about it. `json_schema` renders the JSON Schema, in which
the descriptions below are what an editor shows.

An unknown key is a mistake. So is a key without a value: YAML reads `tokens:` as null, which would be a limit that
silently does not exist.

Other modules hold the texts of mistakes (`messages`) and the check that a name refers to something (`loader`).
"""

from collections.abc import Mapping
from datetime import date, datetime
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from proxy.config import values
from proxy.formats.kinds import KINDS, kind_of
from proxy.logs import LogFormat, LoggedCalls
from proxy.policy.admin import Role
from proxy.policy.amounts import Measure
from proxy.policy.catalog import OnDisconnect, Secret
from proxy.policy.key import Network
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
AdminUrl = Annotated[str, AfterValidator(values.admin_url)]
HostName = Annotated[str, AfterValidator(values.host_name)]
Zone = Annotated[str, AfterValidator(values.zone)]
UsageField = Annotated[str, AfterValidator(values.usage_field), _string_schema(minLength=1)]
ApiVersion = Annotated[str, AfterValidator(values.api_version)]
BaseUrl = Annotated[str, AfterValidator(values.base_url)]
Database = Annotated[str, AfterValidator(values.database)]
# A user's or admin's key. The validated file has only its digest.
KeyDigest = Annotated[str, _IntToText, AfterValidator(values.key_digest), _string_schema(minLength=1)]
ApiKey = Annotated[Secret, BeforeValidator(values.secret), _string_schema(minLength=1)]

Label = Annotated[str, _IntToText, AfterValidator(values.label), _string_schema(minLength=1, maxLength=100)]
CallTag = Annotated[str, _IntToText, AfterValidator(values.tag), _string_schema(minLength=1, maxLength=64)]
Expiry = Annotated[date | datetime, BeforeValidator(values.expiry), _string_schema()]
Networks = Annotated[list[Annotated[Network, BeforeValidator(values.network), _string_schema()]], Field(min_length=1)]
SourceName = Annotated[str, _IntToText, AfterValidator(values.source_name), _NAME_SCHEMA]
HeaderName = Annotated[str, AfterValidator(values.header_name), _string_schema(minLength=1)]
Percentage = Annotated[int, BeforeValidator(values.percentage), _string_schema(pattern="^[0-9]+%$")]
OutsideId = Annotated[str, _IntToText, AfterValidator(values.outside_id), _string_schema(minLength=1, maxLength=256)]
SigningSecret = Annotated[Secret, BeforeValidator(values.signing_secret), _string_schema(minLength=32)]

# A value that is one text or a mapping is checked by the rule of what it is. pydantic adds these tags to the paths of
# its errors, where `messages` removes them. No key of a file can be one of them.
IS_TEXT, IS_MAPPING = "\0text", "\0mapping"
_text_or_mapping = Discriminator(lambda value: IS_MAPPING if isinstance(value, Mapping) else IS_TEXT)

EMPTY = "this has no value; write one, or remove the key"

# ------------------------------------------------------------------------------------------------------- the sections


class Section(BaseModel):
    """One mapping of the file. `display_name` is what a mistake calls it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True, hide_input_in_errors=True
    )
    display_name: ClassVar[str]
    nullable: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def named_fields(cls) -> dict[str, FieldInfo]:
        """Its fields by their keys in the file; `from` is a word of Python, so its field has another name."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}

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
        description="host:port of the admin API, /metrics and health checks; null turns this listener off.",
    )
    admin_url: AdminUrl | None = Field(
        None,
        description="The address at which browsers reach the admin listener, if a proxy is in front of it. With "
        "https:// the cookie of a login is sent over TLS only.",
        examples=["https://quotas.example"],
    )
    admin_hosts: list[HostName] = Field(
        default=[],
        description="Further names by which the admin listener is addressed. Requests with another name in Host are "
        "refused, except for health checks; IP addresses, localhost and the name in admin_url are always allowed.",
        examples=[["quota-proxy"]],
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
    trusted_proxies: Networks = Field(
        default=[],
        description="Networks of proxies in front whose X-Forwarded-For is believed. The client's address is the "
        "rightmost one there that is in none of these networks; it serves the networks of keys, and the log. "
        "Default: none, the client is who connects.",
        examples=[["10.0.0.0/8"]],
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
    nullable = frozenset({"audit", "calls", "days"})

    calls: KeepFor | None = Field(
        90 * 86_400_000, description="The records of single calls, as in 90d; null keeps them forever."
    )
    days: KeepFor | None = Field(
        1100 * 86_400_000, description="The daily sums by user, group and model; null keeps them forever."
    )
    audit: KeepFor | None = Field(
        1100 * 86_400_000, description="What administrators did, in the audit log; null keeps it forever."
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


class UserKey(Section):
    """A key of a user, and what it is limited to. It never allows more than the user may."""

    display_name = "a key"

    key: KeyDigest = Field(
        repr=False,
        description="sha256: and the digest in hex, or a key as in ${ALICE_KEY}, with 24 characters or more.",
        examples=["${ALICE_KEY}"],
    )
    label: Label = Field("", description="Its name in the log and in lists. Default: the beginning of its digest.")
    expires: Expiry | None = Field(
        None,
        description="When it expires: a day, as in 2027-01-01, at whose beginning in the policy's timezone it ends, "
        "or an instant with its offset, as in 2027-01-01T12:00Z. Default: never.",
        examples=["2027-01-01"],
    )
    groups: Annotated[list[Name], Field(min_length=1)] | None = Field(
        None, description="Those of the user's groups that may admit its calls. Default: all of them."
    )
    networks: Networks = Field(
        default=[],
        alias="from",
        description="The networks that its requests may come from, as in 10.0.0.0/8. Default: all.",
    )
    models: Globs | None = Field(None, description="The models that it may call: names or patterns. Default: all.")
    tag: CallTag = Field("", description="A text that is recorded with its calls, for reports.")
    tag_header: Flag = Field(False, description="Whether requests may send another tag in X-Quota-Tag.")


class Identity(Section):
    """A user of another source who is the same person."""

    display_name = "an identity"

    source: Name = Field(description="The name of a source in identity.headers.", examples=["open-webui"])
    id: OutsideId = Field(
        description="The user's id there, exactly as the source sends it. An e-mail address is allowed only if the "
        "source has emails_verified.",
        examples=["7f3c0d1e-5a52-4a8b-9a77-0c7a2c2b1f10"],
    )


class User(Section):
    """A user who may call, with their keys."""

    display_name = "a user"

    groups: list[Name] = Field(
        default=[], description="The user's groups. everyone and default apply without being listed."
    )
    keys: list[
        Annotated[Annotated[KeyDigest, Tag(IS_TEXT)] | Annotated[UserKey, Tag(IS_MAPPING)], _text_or_mapping]
    ] = Field(
        default=[],
        repr=False,
        description="sha256: and the digest in hex, or a key as in ${ALICE_KEY}, with 24 characters or more; or a "
        "mapping with key and what it is limited to.",
    )
    identities: list[Identity] = Field(
        default=[],
        description="Users of header sources who are this user: they have this user's groups and quotas.",
    )


class AdminKey(Section):
    """A key of the admin API, and what it may do."""

    display_name = "an admin key"

    key: KeyDigest = Field(
        repr=False,
        description="sha256: and the digest in hex, or a key as in ${ADMIN_KEY}, with 24 characters or more.",
        examples=["${ADMIN_KEY}"],
    )
    role: Role = Field(
        "administrator",
        description="administrator: sees and changes everything. viewer: sees everything. manager: sees the quotas, "
        "counters and calls of its groups, resets counters and gives grants there.",
    )
    groups: Annotated[list[GroupName], Field(min_length=1)] | None = Field(
        None, description="For a manager: the groups that it is for, in this file or made at run time."
    )
    grant_up_to: Percentage | None = Field(
        None,
        description="For a manager: how much all grants that run at a time may add to a limit, in percent of it. "
        "Default: 100%.",
        examples=["50%"],
    )

    @model_validator(mode="after")
    def _has_groups_only_for_a_manager(self) -> "AdminKey":
        if self.role == "manager" and self.groups is None:
            raise ValueError("a manager needs groups; write the groups that it is for, as in groups: [staff]")
        for name in ("groups", "grant_up_to"):
            if self.role != "manager" and getattr(self, name) is not None:
                raise ValueError(f"{name} is only for role: manager; remove it, or write that role")
        return self


class SignedHeader(Section):
    """A header with a signed token (JSON Web Token, HS256) that says who the user is."""

    display_name = "signed"

    header: HeaderName = Field(description="The header's name.", examples=["X-OpenWebUI-User-Jwt"])
    secret: SigningSecret = Field(
        repr=False,
        description="The secret with which the source signs, with 32 characters or more.",
        examples=["${WEBUI_JWT_SECRET}"],
    )
    issuer: Text = Field(min_length=1, description="What its claim iss must be.", examples=["open-webui"])
    user: Text = Field("sub", min_length=1, description="The claim with the user's id.")
    email: Text = Field("email", min_length=1, description="The claim with the user's e-mail address.")
    groups: Text | None = Field(
        None, min_length=1, description="The claim with the list of the user's groups. Default: there is none."
    )


class MappedGroup(Section):
    """The group of the policy that a group of a source stands for."""

    display_name = "an entry of map"

    group: Name = Field(description="The group of the policy.", examples=["staff"])
    allow_unlimited: Flag = Field(False, description="Required for a group that is unlimited.")


class HeaderSource(Section):
    """A user interface or proxy in front that says in headers who the user is, with a key of its own."""

    display_name = "a header source"

    name: SourceName = Field(
        description="Its name. Users are name:id in records and in the log.", examples=["open-webui"]
    )
    key: KeyDigest = Field(
        repr=False,
        description="Its own key. A request with any other key is of that key's user, whatever its headers say.",
        examples=["${WEBUI_KEY}"],
    )
    networks: Networks = Field(
        default=[],
        alias="from",
        description="The networks that it connects from itself, as in 10.0.3.0/24; X-Forwarded-For does not count. "
        "Default: all.",
    )
    user: HeaderName | None = Field(
        None, description="The header with the user's id.", examples=["X-OpenWebUI-User-Id"]
    )
    email: HeaderName | None = Field(None, description="The header with the user's e-mail address.")
    groups: HeaderName | None = Field(
        None, description="The header with the user's groups there, separated by commas."
    )
    map: dict[
        OutsideId,
        Annotated[Annotated[Name, Tag(IS_TEXT)] | Annotated[MappedGroup, Tag(IS_MAPPING)], _text_or_mapping],
    ] = Field(
        default={},
        description="Groups there, or with emails_verified e-mail addresses, and the group of the policy that each "
        "stands for. Other groups there count for nothing, also if the policy has one of that name.",
    )
    unmapped: Name = Field(
        "refuse",
        description="The group of users none of whose groups is in map; refuse: they may not call.",
    )
    users_max: Positive = Field(1000, description="How many users it may add to the database.")
    emails_verified: Flag = Field(
        False,
        description="Whether the source has verified that each e-mail address is the user's. If not, no address may "
        "be in map or in a user's identities.",
    )
    tag: CallTag = Field("", description="A text that is recorded with its calls, for reports.")
    tag_header: Flag = Field(False, description="Whether requests may send another tag in X-Quota-Tag.")
    signed: SignedHeader | None = Field(
        None, description="The signed header. If it is set, the headers user, email and groups count for nothing."
    )

    @model_validator(mode="after")
    def _says_who_the_user_is(self) -> "HeaderSource":
        if self.user is None and self.signed is None:
            raise ValueError("no header says who the user is; write user, as in user: X-Forwarded-User, or signed")
        return self


class IdentitySources(Section):
    """Who says who the user is, besides the keys of users."""

    display_name = "identity"

    headers: list[HeaderSource] = Field(
        default=[], description="User interfaces and proxies in front that send the user in headers."
    )


class File(Section):
    """Who may use how much of which model."""

    display_name = "the file"

    server: Server = Field(default=Server(), description="The two listeners.")
    admin_keys: dict[
        Name, Annotated[Annotated[KeyDigest, Tag(IS_TEXT)] | Annotated[AdminKey, Tag(IS_MAPPING)], _text_or_mapping]
    ] = Field(
        default={},
        repr=False,
        description="Keys of the admin API by name: the key of an administrator, or a mapping with key and what it "
        "may do. Without any, and none made at run time, the admin API is closed.",
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
    self_service: Flag = Field(
        True,
        description="Whether users can read their own quotas and usage with their keys (/v1/quota, /usage), and get "
        "the header x-quota-warning from 80 % of a limit on.",
    )
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
    identity: IdentitySources = Field(
        default=IdentitySources(), description="Who says who the user is, besides the keys of users."
    )


# Where each section is: the keys that lead to it, with None for any name or index.
_SECTIONS: dict[tuple[str | None, ...], type[Section]] = {
    ("server",): Server,
    ("log",): Log,
    ("keep",): Keep,
    ("admin_keys", None): AdminKey,
    ("upstreams", None): Upstream,
    ("upstreams", None, "allow"): Allow,
    ("models", None): Model,
    ("models", None, "allow"): Allow,
    ("models", None, "upstreams", None): Target,
    ("groups", None): Group,
    ("groups", None, "quotas", None): Quota,
    ("users", None): User,
    ("users", None, "keys", None): UserKey,
    ("users", None, "identities", None): Identity,
    ("identity",): IdentitySources,
    ("identity", "headers", None): HeaderSource,
    ("identity", "headers", None, "map", None): MappedGroup,
    ("identity", "headers", None, "signed"): SignedHeader,
}


def section_at(path: tuple[str | int, ...]) -> type[Section]:
    """The section that contains the last key of this path."""
    for pattern, section in _SECTIONS.items():
        if len(pattern) == len(path) - 1 and all(
            each is None or each == step for each, step in zip(pattern, path, strict=False)
        ):
            return section
    return File
