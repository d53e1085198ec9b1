"""Requests that are made from an OpenAPI document, right and wrong ones, and the check that answers are as it says.

It knows the keywords of JSON Schema that our documents use, and fails at others.
"""

import math
import random
import re
import string
from collections.abc import Iterator, Mapping
from typing import Any

# They say nothing about which values are valid.
_NOTES = {"title", "description", "default", "examples", "format", "deprecated", "x-measure"}
_ABOUT_PARTS = {"properties", "required", "additionalProperties", "items"}
_TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
    "array": list,
    "object": dict,
}
# Texts that break programs: patterns, other characters, what looks like a number, a path or SQL.
STRANGE = (
    "",
    "0",
    "-1",
    "%",
    "_",
    "a b",
    "ü",
    "\U0001f600",
    "\x00",
    "\u202e",
    "'; --",
    "${K}",
    "../x",
    "a/b",
    "null",
)


class Document:
    """An OpenAPI document. `words` are values that may mean something, such as names of users."""

    def __init__(self, document: Mapping[str, Any], *, words: list[str]) -> None:
        self._document = document
        self._words = words

    def operations(self) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        """Each operation: its path, its method, and what the document says of it."""
        for path, methods in self._document["paths"].items():
            for method, operation in methods.items():
                yield path, method.upper(), operation

    def resolve(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """The schema or response that a reference leads to."""
        while "$ref" in schema:
            found: Any = self._document
            for step in schema["$ref"].removeprefix("#/").split("/"):
                found = found[step]
            schema = found
        return schema

    # What is wrong with a value

    def mistakes(self, value: Any, schema: Mapping[str, Any], at: str = "") -> list[str]:
        """Where a value is not as the schema says, and why."""
        schema = self.resolve(schema)
        found = [
            f"{at}: {keyword} is {rule}" for keyword, rule in schema.items() if not self._holds(keyword, rule, value)
        ]
        if isinstance(value, dict):
            known = schema.get("properties", {})
            found += [f"{at}.{name} is missing" for name in schema.get("required", ()) if name not in value]
            for name, each in value.items():
                rule = known.get(name, schema.get("additionalProperties", True))
                if rule is False:
                    found.append(f"{at}.{name} is not known")
                elif rule is not True:
                    found += self.mistakes(each, rule, f"{at}.{name}")
        if isinstance(value, list) and "items" in schema:
            for index, each in enumerate(value):
                found += self.mistakes(each, schema["items"], f"{at}[{index}]")
        return found

    def _holds(self, keyword: str, rule: Any, value: Any) -> bool:
        """Whether a value satisfies one keyword. Those about members and items are looked at by `mistakes`."""
        match keyword:
            case "type":
                return any(_is_type(value, name) for name in (rule if isinstance(rule, list) else [rule]))
            case "anyOf" | "oneOf":
                return any(not self.mistakes(value, each) for each in rule)
            case "enum":
                return value in rule
            case "const":
                return bool(value == rule)
        assert keyword in _NOTES | _ABOUT_PARTS | _BOUNDS.keys(), f"{keyword} is not known here"
        return keyword not in _BOUNDS or bool(_BOUNDS[keyword](value, rule))

    # Values

    def value(self, schema: Mapping[str, Any], draw: random.Random, *, is_wild: bool) -> Any:
        """A value as the schema says; with `is_wild` sometimes another one."""
        schema = self.resolve(schema)
        if is_wild and draw.random() < 0.1:
            return draw.choice([None, True, -1, 1.5, 2**70, "x" * 5000, [], {}, [[]], *STRANGE])
        if "anyOf" in schema:
            return self.value(draw.choice(schema["anyOf"]), draw, is_wild=is_wild)
        if "enum" in schema or "const" in schema:
            return draw.choice(schema.get("enum") or [schema["const"]])
        match schema.get("type"):
            case "object":
                return self._object(schema, draw, is_wild=is_wild)
            case "array":
                count = draw.randint(schema.get("minItems", 0), 3)
                return [self.value(schema.get("items", {}), draw, is_wild=is_wild) for _ in range(count)]
            case "integer" | "number":
                low, high = schema.get("minimum", -10), schema.get("maximum", 10**12)
                return draw.choice([low, high, draw.randint(low, high)])
            case "boolean":
                return draw.random() < 0.5
            case "null":
                return None
        return self.text(schema, draw)

    def text(self, schema: Mapping[str, Any], draw: random.Random) -> str:
        """A text: one that may mean something, a strange one, or any letters."""
        letters = "".join(draw.choices(string.ascii_letters, k=draw.randint(1, 12)))
        return draw.choice([draw.choice(self._words), draw.choice(STRANGE), letters])[: schema.get("maxLength", 1000)]

    def _object(self, schema: Mapping[str, Any], draw: random.Random, *, is_wild: bool) -> dict[str, Any]:
        made = {
            name: self.value(each, draw, is_wild=is_wild)
            for name, each in schema.get("properties", {}).items()
            if (name in schema.get("required", ()) and not (is_wild and draw.random() < 0.1)) or draw.random() < 0.5
        }
        return {**made, "made_up": 1} if is_wild and draw.random() < 0.1 else made


def _is_type(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


_BOUNDS: dict[str, Any] = {
    "minimum": lambda value, rule: not isinstance(value, int | float) or value >= rule,
    "maximum": lambda value, rule: not isinstance(value, int | float) or value <= rule,
    "minLength": lambda value, rule: not isinstance(value, str) or len(value) >= rule,
    "maxLength": lambda value, rule: not isinstance(value, str) or len(value) <= rule,
    "minItems": lambda value, rule: not isinstance(value, list) or len(value) >= rule,
    "maxItems": lambda value, rule: not isinstance(value, list) or len(value) <= rule,
    "pattern": lambda value, rule: not isinstance(value, str) or re.search(rule, value),
    "exclusiveMinimum": lambda value, rule: not isinstance(value, int | float) or (value > rule or math.isnan(value)),
}
