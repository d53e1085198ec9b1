"""The JSON Schema of quotas.yaml, with which an editor checks the file and shows the description of each key."""

import json
from typing import Any

from proxy.config.schema import File, Section


def json_schema() -> str:
    """The JSON Schema of the whole file (draft 2020-12), indented, with a line end after it."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **_tidy(File.model_json_schema())}
    # `_tidy` removes null everywhere; these keys do take it.
    for section, name in (("Server", "admin"), ("Keep", "audit"), ("Keep", "calls"), ("Keep", "days")):
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


def field_schemas(section: type[Section]) -> dict[str, dict[str, Any]]:
    """The JSON Schema of each field of a section, by its key."""
    properties: dict[str, dict[str, Any]] = _tidy(section.model_json_schema())["properties"]
    return properties
