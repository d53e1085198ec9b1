"""What the sections of quotas.yaml are made of: `Section`, and the types of single values.

Each type combines a rule of `values` with what the JSON Schema says about it. `schema` and `catalog` have the
sections.

An unknown key is a mistake. So is a key without a value: YAML reads `tokens:` as null, which would be a limit that
silently does not exist.
"""

from collections.abc import Mapping
from datetime import date, datetime
from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic.fields import FieldInfo

from proxy.config import values
from proxy.policy.catalog import Secret
from proxy.policy.key import Network

# An editor can't know the value of `${LIMIT}`, so the JSON Schema accepts it in place of a number.
INTERPOLATION_PATTERN = r".*\$\{.+\}.*"


def _int_to_text(value: object) -> object:
    """A name may look like a number (a user called 1001), which YAML reads as an integer."""
    return str(value) if type(value) is int else value  # not isinstance: a bool is an int too


def _text_to_bool(value: object) -> object:
    """An interpolated `${FLAG}` is always text."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _certificates_at(path: str, info: ValidationInfo) -> str:
    """The certificates in the PEM file at this path. `info.context` is `interpolation.Outside`, or None."""
    if info.context is None:
        return ""
    if not path.startswith("/"):
        raise ValueError(
            "this is not an absolute path; write one that begins with /, as in /etc/ssl/corporate-ca.pem"
        )
    return values.certificates(info.context.content(path))


def _string_schema(**more: object) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", **more})


def _number_schema(minimum: int) -> WithJsonSchema:
    text = rf"^([0-9]+(_[0-9]+)*((\.[0-9]+)?[kM])?|{INTERPOLATION_PATTERN})$"
    return WithJsonSchema({"anyOf": [{"type": "integer", "minimum": minimum}, {"type": "string", "pattern": text}]})


_IntToText = BeforeValidator(_int_to_text)
_HEADER_VALUE_SCHEMA = WithJsonSchema({"type": ["string", "integer"]})
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
Timeout = Annotated[int, BeforeValidator(values.timeout_ms), _string_schema()]
Wait = Annotated[int, BeforeValidator(values.wait_ms), _string_schema()]
Heartbeat = Annotated[int, BeforeValidator(values.heartbeat_ms), _string_schema()]
LedgerWait = Annotated[int, BeforeValidator(values.ledger_wait_ms), _string_schema()]
KeepFor = Annotated[int, BeforeValidator(values.keep_ms), _string_schema()]
Per = Annotated[str, _IntToText, AfterValidator(values.per)]
Address = Annotated[str, _IntToText, AfterValidator(values.address)]
Origin = Annotated[str, AfterValidator(values.origin)]
ServerUrl = Annotated[str, AfterValidator(values.server_url)]
HostName = Annotated[str, AfterValidator(values.host_name)]
PathPrefix = Annotated[str, AfterValidator(values.path_prefix)]
Zone = Annotated[str, AfterValidator(values.zone)]
UsageField = Annotated[str, AfterValidator(values.usage_field), _string_schema(minLength=1)]
ApiVersion = Annotated[str, AfterValidator(values.api_version)]
BaseUrl = Annotated[str, AfterValidator(values.base_url)]
Database = Annotated[str, AfterValidator(values.database)]
# A user's or admin's key. The validated file has only its digest.
KeyDigest = Annotated[str, _IntToText, AfterValidator(values.key_digest), _string_schema(minLength=1)]
ApiKey = Annotated[Secret, BeforeValidator(values.secret), _string_schema(minLength=1)]
UpstreamHeader = Annotated[str, AfterValidator(values.upstream_header), _string_schema(minLength=1)]
HeaderValue = Annotated[Secret, BeforeValidator(values.header_value), _HEADER_VALUE_SCHEMA]
ProxyUrl = Annotated[Secret | Literal["none"], BeforeValidator(values.proxy_url), _string_schema(minLength=1)]
# The path of a PEM file. The validated file has its certificates, or "" if files are not read.
Certificates = Annotated[str, AfterValidator(_certificates_at), _string_schema(minLength=1)]

# Where a key is fetched: a program and its arguments, or a client of an OAuth 2.0 server.
CommandWord = Annotated[str, _IntToText, AfterValidator(values.command_word), _string_schema()]
KeyEvery = Annotated[int, BeforeValidator(values.every_s), _string_schema()]
TokenUrl = Annotated[str, AfterValidator(values.token_url)]
ClientSecret = Annotated[Secret, BeforeValidator(values.client_secret), _string_schema(minLength=1)]

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
text_or_mapping = Discriminator(lambda value: IS_MAPPING if isinstance(value, Mapping) else IS_TEXT)

EMPTY = "this has no value; write one, or remove the key"


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
