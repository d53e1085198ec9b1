"""The sections of upstreams and models, and the catalog that they become."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, Tag, ValidationInfo, ValidatorFunctionWrapHandler, field_validator, model_validator

from proxy.config.environment_proxy import environment_proxy
from proxy.config.interpolation import Outside
from proxy.config.section import (
    IS_MAPPING,
    IS_TEXT,
    ApiKey,
    ApiVersion,
    BaseUrl,
    Certificates,
    ClientSecret,
    CommandWord,
    Count,
    Flag,
    HeaderValue,
    Heartbeat,
    KeyEvery,
    Name,
    Positive,
    ProxyUrl,
    RefusedField,
    Section,
    ServedName,
    Text,
    Timeout,
    TokenUrl,
    UpstreamHeader,
    UsageField,
    text_or_mapping,
)
from proxy.config.values import proxy_url
from proxy.formats.kinds import KINDS, kind_of
from proxy.policy import catalog as policy
from proxy.policy.catalog import OnDisconnect, Secret

Encoding = Literal["o200k_base", "o200k_harmony", "cl100k_base", "p50k_base", "p50k_edit", "r50k_base", "gpt2"]

# The names in `KINDS`, so that a new kind needs no change here. A type checker can't evaluate that, and sees a text.
if TYPE_CHECKING:
    KindName = str
else:
    KindName = Literal[tuple(KINDS)]


def _kinds_that(on_disconnect: OnDisconnect) -> str:
    """The kinds of upstream with this default, for a description."""
    return ", ".join(name for name, kind in KINDS.items() if kind.on_disconnect == on_disconnect)


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


class OAuth(Section):
    """A client of an OAuth 2.0 server, which gets access tokens by the client credentials grant."""

    display_name = "oauth"

    token_url: TokenUrl = Field(
        description="The address at which the server issues tokens: https://, or http:// to this machine.",
        examples=["https://login.microsoftonline.com/TENANT/oauth2/v2.0/token"],
    )
    client_id: Text = Field(min_length=1, description="The id of the client.", examples=["${AZURE_CLIENT_ID}"])
    client_secret: ClientSecret = Field(
        repr=False, description="The secret of the client.", examples=["${AZURE_CLIENT_SECRET}"]
    )
    scope: Text | None = Field(
        None,
        min_length=1,
        description="What the token is for. Default: none is asked for.",
        examples=["https://cognitiveservices.azure.com/.default"],
    )


class FetchedKey(Section):
    """Where a key that is not fixed is fetched, again and again."""

    display_name = "api_key"

    command: Annotated[list[CommandWord], Field(min_length=1)] | None = Field(
        None,
        repr=False,
        description="A program and its arguments. The first line that it prints is the key. It is started without a "
        "shell, and may take 10 s.",
        examples=[["gcloud", "auth", "print-access-token"]],
    )
    every: KeyEvery = Field(
        "45m",  # access tokens are usually valid for an hour
        validate_default=True,
        description="For command: how often it is run, as in 45m; shorter than its key is valid.",
    )
    oauth: OAuth | None = Field(
        None, description="A client of an OAuth 2.0 server. Its tokens are replaced before they end."
    )

    @model_validator(mode="after")
    def _has_one_source(self) -> "FetchedKey":
        if self.command is None and self.oauth is None:
            raise ValueError("this does not say where the key is; write command: [program, argument], or oauth")
        if self.command is not None and self.oauth is not None:
            raise ValueError("command and oauth are two sources of one key; remove one of them")
        if self.command is not None and not self.command[0].strip():
            raise ValueError("command has no program; write it first, as in [gcloud, auth, print-access-token]")
        if self.command is None and "every" in self.model_fields_set:
            raise ValueError("every is only for command, since tokens say when they end; remove it")
        return self

    def source(self) -> policy.KeyCommand | policy.OAuthClient:
        """The source of the key."""
        if self.oauth is not None:
            oauth = self.oauth
            return policy.OAuthClient(oauth.token_url, oauth.client_id, oauth.client_secret, oauth.scope)
        return policy.KeyCommand(tuple(self.command or ()), self.every)


class Upstream(Section):
    """A server that calls are forwarded to."""

    display_name = "an upstream"

    base_url: BaseUrl = Field(
        description="The server's http:// or https:// address, with /v1 if the server has it.",
        examples=["https://api.openai.com/v1"],
    )
    api_key: (
        Annotated[Annotated[ApiKey, Tag(IS_TEXT)] | Annotated[FetchedKey, Tag(IS_MAPPING)], text_or_mapping] | None
    ) = Field(
        None,
        repr=False,
        description="The key that is sent to this server, as in ${OPENAI_API_KEY}; or a mapping with command or "
        "oauth that says where it is fetched. Default: no key is sent.",
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
    allow: Allow = Field(
        default_factory=Allow, description="Features that requests may use although quotas do not count them."
    )
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
    max_in_flight: Positive | None = Field(
        None,
        description="How many calls each process of the proxy sends to this server at a time. Further ones go to "
        "another upstream of their model, or wait for up to `wait`, where users take turns. Default: any number.",
        examples=[16],
    )
    heartbeat: Heartbeat | None = Field(
        None,
        description="After so long without an answer of this server, the client of a stream gets the head of its "
        "answer and then a comment, and another one each time that so long has passed. An error after that is an "
        "event of the stream. Default: the client gets nothing before the server answers.",
        examples=["15s"],
    )

    connect_timeout: Timeout = Field(
        "5s",
        validate_default=True,
        description="How long it may take to make a connection: name, proxy and TLS together, as in 5s.",
    )
    idle_timeout: Timeout = Field(
        "10m",
        validate_default=True,
        description="How long the server may take to begin its answer, and be silent in the middle of it, as in 10m.",
    )
    first_byte_timeout: Timeout | None = Field(
        None,
        description="How long the server may send nothing of its answer after it has the request. Then the call goes "
        "to another upstream of its model, or fails if there is none. A whole answer sends nothing before it is "
        "complete. Default: no limit beside idle_timeout.",
        examples=["20s"],
    )
    headers: dict[UpstreamHeader, HeaderValue] = Field(
        default={},
        repr=False,
        description="Headers that are sent to this server with each request, in place of the client's; for "
        "gateways that want more than a key.",
        examples=[{"X-Tenant": "${TENANT}"}],
    )
    proxy: ProxyUrl | None = Field(
        None,
        repr=False,
        description="The http:// address of the proxy to this server, with its user and password if it wants them. "
        "none: no proxy. Default: what HTTPS_PROXY, HTTP_PROXY and NO_PROXY in the environment say.",
        examples=["http://user:${PROXY_PASSWORD}@proxy.example:3128"],
    )
    ca: Certificates | None = Field(
        None,
        repr=False,
        description="A PEM file with certificates of authorities that are trusted for this server, in addition to "
        "those of the system.",
        examples=["/etc/ssl/corporate-ca.pem"],
    )

    @field_validator("headers", mode="wrap")
    @classmethod
    def _has_each_header_once(cls, value: object, validate: ValidatorFunctionWrapHandler) -> object:
        found = validate(value)  # a mapping by names in lower case
        if isinstance(value, dict) and len(found) < len(value):
            raise ValueError(
                "a name is there twice, in different cases, which are the same header; remove one of them"
            )
        return found

    @model_validator(mode="after")
    def _sends_one_key(self) -> "Upstream":
        names = {
            kind_of(self.kind).key_header[0],
            *(["authorization"] if isinstance(self.api_key, FetchedKey) else []),
        }
        for name in names if self.api_key is not None else ():
            if name in self.headers:
                raise ValueError(
                    f"api_key is sent in the header {name}, which headers has too; remove one of the two"
                )
        return self

    @model_validator(mode="after")
    def _has_proxy_in_http(self, info: ValidationInfo) -> "Upstream":
        """Check the proxy that the environment names."""
        self.effective_proxy(info.context)
        return self

    @model_validator(mode="after")
    def _has_api_version_only_for_azure(self) -> "Upstream":
        if self.api_version and not kind_of(self.kind).has_api_version:
            raise ValueError("api_version is only for upstreams of kind azure; remove it from this one")
        return self

    def effective_on_disconnect(self) -> OnDisconnect:
        """`on_disconnect`, or the default of this kind."""
        return self.on_disconnect or kind_of(self.kind).on_disconnect

    def effective_proxy(self, outside: Outside | None) -> Secret | None:
        """`proxy`, or the one that the environment names for this server.

        Raises ValueError if the environment names something else.
        """
        if isinstance(self.proxy, Secret):
            return self.proxy
        found = None if self.proxy or outside is None else environment_proxy(self.base_url, outside.environ)
        if found is None:
            return None
        variable, url = found
        try:
            proxy = proxy_url(url)
        except ValueError as error:
            raise ValueError(f"{variable} in the environment: {error}; or write proxy: none here") from None
        return proxy if isinstance(proxy, Secret) else None

    def transport(self, outside: Outside | None) -> policy.Transport:
        """How requests get there."""
        return policy.Transport(
            connect_timeout_ms=self.connect_timeout,
            idle_timeout_ms=self.idle_timeout,
            first_byte_timeout_ms=self.first_byte_timeout,
            headers=tuple(self.headers.items()),
            proxy=self.effective_proxy(outside),
            ca=self.ca,
        )


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
        "shorter one. Default: smallest_answer at the top of the file.",
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


def catalog_of(
    upstream_sections: Mapping[str, Upstream],
    model_sections: Mapping[str, Model] | None,
    default_upstream: str | None,
    *,
    smallest_answer: int | None,
    outside: Outside | None,
) -> policy.Catalog:
    """The catalog of these sections of a valid file.

    `smallest_answer` is that of models which state none. Without `outside` the environment names no proxies.
    """
    upstreams = {
        name: policy.Upstream(
            name,
            section.base_url,
            section.api_key.source() if isinstance(section.api_key, FetchedKey) else section.api_key,
            kind=section.kind,
            on_disconnect=section.effective_on_disconnect(),
            api_version=section.api_version,
            allow=_allow(section.allow),
            extra_usage=tuple(dict.fromkeys(section.extra_usage)),
            refuse=frozenset(section.refuse),
            naming=kind_of(section.kind).naming,
            transport=section.transport(outside),
            max_in_flight=section.max_in_flight,
            heartbeat_s=None if section.heartbeat is None else section.heartbeat / 1000,
        )
        for name, section in upstream_sections.items()
    }
    default = default_upstream or (next(iter(upstreams)) if len(upstreams) == 1 else "")
    models = None
    if model_sections is not None:
        models = {
            name: _model(name, section, upstreams=upstreams, default=default, smallest_answer=smallest_answer)
            for name, section in model_sections.items()
        }
    return policy.Catalog(upstreams, models, upstreams.get(default), smallest_answer)


def _model(
    name: str,
    section: Model,
    *,
    upstreams: Mapping[str, policy.Upstream],
    default: str,
    smallest_answer: int | None,
) -> policy.Model:
    single = (section.upstream or default, section.model, 1)
    targets = [(target.upstream, target.model, target.weight) for target in section.upstreams or ()] or [single]
    first, *others = (
        policy.Model(
            name=name,
            upstream=upstreams[upstream],
            upstream_model=served_name or name,
            max_output_tokens=section.max_output_tokens,
            context=section.context,
            encoding=section.encoding,
            reasoning=section.reasoning,
            smallest_answer=section.smallest_answer or smallest_answer,
            tokens_per_request=section.tokens_per_request,
            tokens_per_image=section.tokens_per_image,
            weight=weight,
            allow=None if section.allow is None else _allow(section.allow),
        )
        for upstream, served_name, weight in targets
    )
    return replace(first, others=tuple(others))


def _allow(section: Allow) -> policy.Allow:
    tools, tiers, betas = (frozenset(names) for names in (section.tools, section.service_tiers, section.betas))
    return policy.Allow(tools, tiers, betas, section.store)
