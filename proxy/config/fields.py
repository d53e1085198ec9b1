"""What may stand in a field of quotas.yaml: the rule of its value, and what the JSON Schema says of it."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from proxy.config import values as scalars
from proxy.policy.policy import Secret

# What a value may always be instead: a reference, of which the schema can't know what it stands for.
REFERENCE = r".*\$\{.+\}.*"

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
    text = rf"^([0-9]+(_[0-9]+)*[kM]?|{REFERENCE})$"
    return WithJsonSchema({"anyOf": [{"type": "integer", "minimum": least}, {"type": "string", "pattern": text}]})


_AsWritten = BeforeValidator(_written)
_NAMED = WithJsonSchema({"type": ["string", "integer"], "pattern": scalars.NAME.pattern})
Text = Annotated[str, _AsWritten, AfterValidator(scalars.sentence)]
Name = Annotated[str, _AsWritten, AfterValidator(scalars.name), _NAMED]
GroupName = Annotated[str, _AsWritten, AfterValidator(scalars.group_name), _NAMED]
UserName = Annotated[str, _AsWritten, AfterValidator(scalars.user_name), _string(minLength=1, maxLength=254)]
ModelName = Annotated[str, _AsWritten, AfterValidator(scalars.model_name), _string(minLength=1)]
ServedName = Annotated[str, _AsWritten, AfterValidator(scalars.served_name), _string(minLength=1)]
Glob = Annotated[str, _AsWritten, AfterValidator(scalars.glob), _string(minLength=1)]
Globs = Annotated[list[Glob], Field(min_length=1)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Count = Annotated[int, BeforeValidator(scalars.count), _number(0)]
Positive = Annotated[int, BeforeValidator(scalars.positive), _number(1)]
Wait = Annotated[int, BeforeValidator(scalars.wait), _string()]
LedgerWait = Annotated[int, BeforeValidator(scalars.ledger_wait), _string()]
KeepFor = Annotated[int, BeforeValidator(scalars.keep), _string()]
Per = Annotated[str, _AsWritten, AfterValidator(scalars.per)]
Address = Annotated[str, _AsWritten, AfterValidator(scalars.address)]
Origin = Annotated[str, AfterValidator(scalars.origin)]
Zone = Annotated[str, AfterValidator(scalars.zone)]
ApiVersion = Annotated[str, AfterValidator(scalars.api_version)]
BaseUrl = Annotated[str, AfterValidator(scalars.base_url)]
Database = Annotated[str, AfterValidator(scalars.database)]
# A user's or admin's key: what is kept of it is its digest only.
KeyDigest = Annotated[str, _AsWritten, AfterValidator(scalars.key_digest), _string(minLength=1)]
ApiKey = Annotated[Secret, BeforeValidator(scalars.secret), _string(minLength=1)]
