"""The JSON Schema of quotas.yaml, as editors and other checkers read it."""

import json
from typing import Any

from proxy.config.schema import File


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
