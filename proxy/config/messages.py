"""Validates the shape of quotas.yaml with pydantic, and writes each mistake in the proxy's own words.

A finding says at which key path what is wrong and what to write instead. None of pydantic's own texts is used: they
quote the input, which may be a secret, and name Python's types instead of YAML's.
"""

import json
import re
from collections.abc import Mapping

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from proxy.config.document import Finding, KeyPath, path_text
from proxy.config.interpolation import Outside
from proxy.config.schema import File, Group, Quota, section_at, sections_with
from proxy.config.section import EMPTY, IS_MAPPING, IS_TEXT
from proxy.config.suggestions import did_you_mean, similar_word

# A report shows 100 mistakes; this only bounds the work for a file with a hundred thousand.
_FINDINGS_MAX = 1000
# pydantic's error type → the text. The values' own rules raise ValueError with the text (see `values`).
_TEXTS = {
    "string_type": "this must be text; put it in quotes",
    "list_type": 'this must be a list; write [ … ], or lines that begin with "- "',
    "dict_type": 'this must be a mapping; write "name: …" lines below it',
    "model_type": 'this must be a mapping; write "key: value" lines below it',
    "bool_type": "this is neither true nor false; write one of the two",
    "too_short": "this has no entries; add at least one",
    "string_too_short": "this is empty; write at least one character, or remove the key",
    "string_too_long": "this is too long; write at most 1000 characters",
}
_LIST = 'this must be a mapping and not a list; write "name:" in place of each "- ", and the rest indented below it'
_UNNAMED_QUOTA = "each quota has a name: write quotas: {daily: {tokens: 200k, per: day}}"
# Sections at the top of files of other programs, and what to do with such a file.
_FOREIGN = {
    **dict.fromkeys(
        ("model_list", "litellm_settings", "general_settings", "router_settings"),
        ("LiteLLM", "docs/litellm.md of this project says what its settings are called here"),
    ),
    "services": ("Docker Compose", "give the path of the file with the policy, as in --config quotas.yaml"),
    "apiVersion": ("Kubernetes", "write the policy alone into a file, as the data of a ConfigMap is mounted"),
}
# What else to say of values that are not allowed, by their keys.
_NOTES: Mapping[str | int, str] = {"kind": "openai is right for OpenRouter, LiteLLM and most others"}


def read_file(data: Mapping[str, object], outside: Outside | None = None) -> tuple[File | None, tuple[Finding, ...]]:
    """The validated file, or None and a finding for each mistake in its shape.

    Without `outside`, the files that it names are not read.
    """
    try:
        return File.model_validate(data, context=outside), ()
    except ValidationError as error:
        details = error.errors(include_url=False)[:_FINDINGS_MAX]
        misspelled = {_meant_key(detail["loc"]) for detail in details if detail["type"] == "extra_forbidden"}
        return None, tuple(
            _finding(detail) for detail in details if detail["type"] != "missing" or detail["loc"] not in misspelled
        )


def _meant_key(path: KeyPath) -> KeyPath:
    """The path of the key that was probably meant by an unknown one: that is not missing too."""
    meant = similar_word(str(path[-1]), section_at(path).named_fields())
    return path if meant is None else (*path[:-1], meant)


def foreign_file(data: Mapping[str, object]) -> Finding | None:
    """That this is a file of another program, if it is one."""
    key = next((key for key in _FOREIGN if key in data), None)
    if key is None or "upstreams" in data:
        return None
    program, remedy = _FOREIGN[key]
    return Finding((key,), f'this is a file for {program}, because it has "{key}"; {remedy}')


def read_quota(document: Mapping[str, object]) -> tuple[Quota | None, tuple[Finding, ...]]:
    """The quota of these fields, as the file would have them, or None and a finding for each mistake.

    The path of a finding is that of the field. Its text does not begin with it.
    """
    try:
        return Quota.model_validate(document), ()
    except ValidationError as error:
        details = error.errors(include_url=False)[:_FINDINGS_MAX]
        return None, tuple(_in_quota(detail) for detail in details)


def _in_quota(detail: ErrorDetails) -> Finding:
    """A finding in a quota, with the text that it would have in the file."""
    above: KeyPath = ("groups", "", "quotas", "")
    found = _finding({**detail, "loc": (*above, *detail["loc"])})
    prefixes = (f"{with_path(path, '')}" for path in (found.path, found.path[:-1]))
    text = next((found.text.removeprefix(each) for each in prefixes if found.text.startswith(each)), found.text)
    return Finding(found.path[len(above) :], text)


def with_path(path: KeyPath, text: str) -> str:
    """The text with its key path in front: `users.alice.keys[1]: …`."""
    prefix = path_text(path)
    return f"{prefix}: {text}" if prefix else text


def finding_at(path: KeyPath, text: str) -> Finding:
    """A finding whose text begins with its key path."""
    return Finding(path, with_path(path, text))


def _finding(detail: ErrorDetails) -> Finding:
    # For a bad key of a mapping pydantic adds the step "[key]" behind the key itself.
    path = detail["loc"][:-1] if detail["loc"][-1:] == ("[key]",) else detail["loc"]
    path = tuple(step for step in path if step not in (IS_TEXT, IS_MAPPING))
    kind, context = detail["type"], detail.get("ctx", {})
    # An unknown or missing key has the line of its own path, but its text is about the section that contains it.
    if kind == "extra_forbidden":
        return Finding(path, with_path(path[:-1], _unknown_key(path)))
    if kind == "missing":
        return Finding(path, with_path(path[:-1], _missing_key(path)))
    if detail["input"] is None:
        text = EMPTY
    elif kind == "literal_error":
        text = _not_allowed(path, detail["input"], context["expected"])
    elif kind in ("dict_type", "model_type"):
        text = _no_mapping(path, detail["input"], kind)
    else:
        text = str(context["error"]) if kind == "value_error" else _TEXTS[kind]
    return finding_at(path, text)


def _not_allowed(path: KeyPath, value: object, expected: str) -> str:
    """`expected` is pydantic's list of the allowed words: `'exact', 'after' or 'shadow'`."""
    allowed = re.findall(r"'([^']*)'", expected)
    hint = did_you_mean(value, allowed) if isinstance(value, str) else ""
    text = f"this is not an allowed value; {hint or f'write {expected.replace(chr(39), str())}'}"
    return f"{text}; {_NOTES[path[-1]]}" if path and path[-1] in _NOTES and not hint else text


def _no_mapping(path: KeyPath, value: object, kind: str) -> str:
    match path:
        case ("groups", _, "quotas", str() as key) if key in Quota.named_fields():
            return _UNNAMED_QUOTA
    if isinstance(value, list):
        return _LIST
    return _TEXTS[kind]


def _unknown_key(path: KeyPath) -> str:
    section, key = section_at(path), str(path[-1])
    keys = section.named_fields()
    if section is Group and key in Quota.named_fields() and key != "models":
        return f'"{key}" is not a key of a group, but of a quota; {_UNNAMED_QUOTA}'
    if re.fullmatch("[0-9]{3}.*", key):
        return f'"{key}" is not a key of {section.display_name}; write a number without commas, as in 200_000'
    hint = did_you_mean(key, keys) or _elsewhere(path, key) or f"write one of {', '.join(keys)}"
    return f'"{key}" is not a key of {section.display_name}; {hint}'


def _elsewhere(path: KeyPath, key: str) -> str:
    """What to do about a key that other sections have, or that is below the name of a section of the file."""
    if len(path) == 1 and key in _FOREIGN:
        program, remedy = _FOREIGN[key]
        return f"it is a section of {program}: {remedy}"
    if len(path) > 2 and path[-2] in File.named_fields():
        return f'if "{path[-2]}" is meant to be the section of the file, begin its line at the left margin'
    if others := sections_with(key):
        names = " or ".join(other.display_name for other in others)
        return f"it is a key of {names}: check the indentation of this line"
    return ""


def _missing_key(path: KeyPath) -> str:
    key = str(path[-1])
    example = (section_at(path).named_fields()[key].examples or [""])[0]
    return f'"{key}" is missing; write {key}: {example if isinstance(example, str) else json.dumps(example)}'
