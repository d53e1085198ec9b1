"""quotas.yaml for others: its JSON Schema, with which editors check it, and the page of documentation of its keys."""

import json
from collections.abc import Mapping
from typing import Any

from proxy.config.schema import SECTIONS, File
from proxy.config.section import Section


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


def settings_page() -> str:
    """A page of Markdown with a table for each section: each key, what it takes, its default and its meaning."""
    parts = [_INTRODUCTION]
    for path, section in SECTIONS.items():
        name = ".".join("*" if step is None else step for step in path) or "The file"
        required = section.model_json_schema().get("required", ())
        rows = [
            f"| `{key}` | {_taken(field)} | {_default(field, is_required=key in required)} | {_meaning(field)} |"
            for key, field in field_schemas(section).items()
        ]
        head = f"## {name}\n\n{section.__doc__}\n\n| key | takes | default | meaning |\n| --- | --- | --- | --- |\n"
        parts.append(head + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """# Settings

Every key of `quotas.yaml`, section by section; `*` stands for a name or for an entry of a list. The command
`llm-quota-proxy schema --markdown` prints this page."""


def _taken(field: Mapping[str, Any]) -> str:
    """What a value may be, in a few words."""
    if "enum" in field:
        return ", ".join(f"`{word}`" for word in field["enum"])
    if options := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(_taken(option) for option in options))
    types = field.get("type", "object")
    return " or ".join(_TYPES.get(each, each) for each in ([types] if isinstance(types, str) else types))


_TYPES = {"string": "text", "integer": "number", "boolean": "`true`, `false`", "object": "mapping", "array": "list"}


def _default(field: Mapping[str, Any], *, is_required: bool) -> str:
    default = field.get("default")
    if is_required:
        return "required"
    return (
        "" if default in (None, "", [], {}) else f"`{default if isinstance(default, str) else json.dumps(default)}`"
    )


def _meaning(field: Mapping[str, Any]) -> str:
    """The description, with an example if it has one. A bar would end the cell of the table."""
    examples = field.get("examples", ())
    example = f" Example: `{json.dumps(examples[0], ensure_ascii=False)}`." if examples else ""
    return f"{field.get('description', '')}{example}".replace("|", "\\|")
