"""The shape of quotas.yaml: every key with its type, its default and its description.

`File` is the whole file, and each other `Section` is one of its mappings; those of upstreams and models are in
`catalog`. `json_schema` renders the JSON Schema, in which the descriptions below are what an editor shows.

Other modules hold the texts of mistakes (`messages`) and the check that a name refers to something (`loader`).
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Tag, model_validator

from proxy.config.catalog import Allow, FetchedKey, Model, OAuth, Target, Upstream
from proxy.config.section import (
    IS_MAPPING,
    IS_TEXT,
    Address,
    BodyMemory,
    CallTag,
    Count,
    Database,
    Expiry,
    Flag,
    Globs,
    GroupName,
    HeaderName,
    HostName,
    KeepFor,
    KeyDigest,
    Label,
    LedgerWait,
    ModelName,
    Name,
    Networks,
    Origin,
    OutsideId,
    PathPrefix,
    Per,
    Percentage,
    Positive,
    Section,
    ServerUrl,
    SigningSecret,
    SourceName,
    Text,
    UserName,
    Wait,
    Zone,
    text_or_mapping,
)
from proxy.logs import LogFormat, LoggedCalls
from proxy.policy.admin import Role
from proxy.policy.amounts import MEASURES, Measure
from proxy.policy.binding import Combine
from proxy.policy.quota import Enforce, Limit

Weekday = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]


class Server(Section):
    """The two listeners. A change takes effect at a restart."""

    display_name = "server"
    nullable = frozenset({"admin", "connections_per_address"})

    api: Address = Field("127.0.0.1:8080", description="host:port of the API that users call, and of health checks.")
    admin: Address | None = Field(
        "127.0.0.1:8081",
        description="host:port of the admin API, /metrics and health checks; null turns this listener off.",
    )
    prefix: PathPrefix | None = Field(
        None,
        description="What all paths of the API begin with, if it shares its host with others: with /llm the base_url "
        "of SDKs ends in /llm/v1. Other paths are a 404, except for health checks. Default: nothing.",
        examples=["/llm"],
    )
    api_url: ServerUrl | None = Field(
        None,
        description="The address at which users reach the API, if a proxy is in front of it. The admin page shows it "
        "to whoever makes a key. Default: the host of the admin page, with the port of `api`.",
        examples=["https://llm.example"],
    )
    admin_url: ServerUrl | None = Field(
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
        "256M",
        validate_default=True,
        description="How many bytes the bodies above 256 KiB of all calls in flight may have together, as in 256M; "
        "further ones wait up to 10 s and then get a 503. A call takes two to three times its body.",
    )
    shutdown_delay: Wait = Field(
        "5s",
        validate_default=True,
        description="How long new calls are still taken after SIGTERM, while /readyz is 503, as in 5s or 0s, at most "
        "10m. Make it longer than the load balancer takes to notice that.",
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
        "90d",
        validate_default=True,
        description="The records of single calls, as in 90d; null keeps them forever.",
    )
    days: KeepFor | None = Field(
        "1100d",
        validate_default=True,
        description="The daily sums by user, group and model; null keeps them forever.",
    )
    audit: KeepFor | None = Field(
        "1100d",
        validate_default=True,
        description="What administrators did, in the audit log; null keeps it forever.",
    )

    @model_validator(mode="after")
    def _keeps_sums_longer(self) -> "Keep":
        # Otherwise a call that is corrected late would bring back the sum of a day that was already deleted.
        if self.days is not None and (self.calls is None or self.days < self.calls):
            raise ValueError("days is shorter than calls; keep the sums at least as long as the calls in them")
        return self


def _mark_measures(schema: dict[str, Any]) -> None:
    """Mark the fields that are limits, so that a form needs no list of them."""
    for name, field in schema["properties"].items():
        if name in MEASURES:
            field["x-measure"] = name


class Quota(Section):
    """One rule: how much of these models in each window."""

    model_config = ConfigDict(json_schema_extra=_mark_measures)
    display_name = "a quota"

    models: Globs = Field(default=["*"], description="The models that it limits: names or patterns (*, ?, […]).")
    tokens: Count | None = Field(
        None,
        description="Input and output tokens together: 200000, 200_000, 200k or 5M. A token is about four characters "
        "of English text.",
    )
    input_tokens: Count | None = Field(None, description="Input tokens alone.")
    output_tokens: Count | None = Field(None, description="Output tokens alone.")
    requests: Count | None = Field(None, description="Calls.")
    per: Per = Field(
        description="The window: a duration that begins with the first call (90s, 15m, 6h, 7d, 2w), or an interval "
        "of the calendar (minute, hour, day, week, month, quarter, year).",
        examples=["day", "6h"],
    )
    shared: Flag = Field(
        False,
        description="One counter for the whole group. The default is a counter for each member, not shared.",
    )
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
        Annotated[Annotated[KeyDigest, Tag(IS_TEXT)] | Annotated[UserKey, Tag(IS_MAPPING)], text_or_mapping]
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
        Annotated[Annotated[Name, Tag(IS_TEXT)] | Annotated[MappedGroup, Tag(IS_MAPPING)], text_or_mapping],
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

    server: Server = Field(default_factory=Server, description="The two listeners.")
    admin_keys: dict[
        Name, Annotated[Annotated[KeyDigest, Tag(IS_TEXT)] | Annotated[AdminKey, Tag(IS_MAPPING)], text_or_mapping]
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
    log: Log = Field(default_factory=Log, description="The log.")
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
        "30s",
        validate_default=True,
        description="How long a call may wait for capacity that calls in flight hold before it is refused as busy, "
        "as in 30s.",
    )
    smallest_answer: Positive | None = Field(
        None,
        description="No call starts if its answer might have to be shorter than this, in tokens, unless the call "
        "asks for a shorter one. Default: 1024, but at most a tenth of the smallest limit on tokens or output_tokens "
        "among the quotas of the group that admits the call.",
    )
    ledger_wait: LedgerWait = Field(
        "10s",
        validate_default=True,
        description="How long a call may wait for an unavailable database before it gets a 503, as in 10s.",
    )
    retry_for: Wait = Field(
        "30s",
        validate_default=True,
        description="How long after a call was first sent it may be sent again, if an upstream fails and nothing was "
        "sent to the client, as in 30s; 0s for never.",
    )
    keep: Keep = Field(default_factory=Keep, description="How long usage records are kept.")
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
        default_factory=IdentitySources, description="Sources that say who the user is, besides the keys of users."
    )


# Where each section is: the keys that lead to it, with None for any name or index.
SECTIONS: dict[tuple[str | None, ...], type[Section]] = {
    (): File,
    ("server",): Server,
    ("log",): Log,
    ("keep",): Keep,
    ("admin_keys", None): AdminKey,
    ("upstreams", None): Upstream,
    ("upstreams", None, "allow"): Allow,
    ("upstreams", None, "api_key"): FetchedKey,
    ("upstreams", None, "api_key", "oauth"): OAuth,
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


def sections_with(key: str) -> tuple[type[Section], ...]:
    """The sections that have this key, other than the file."""
    return tuple(
        dict.fromkeys(section for path, section in SECTIONS.items() if path and key in section.named_fields())
    )


def section_at(path: tuple[str | int, ...]) -> type[Section]:
    """The section that contains the last key of this path."""
    for pattern, section in SECTIONS.items():
        if len(pattern) == len(path) - 1 and all(
            each is None or each == step for each, step in zip(pattern, path, strict=False)
        ):
            return section
    return File
