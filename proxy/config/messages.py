"""Validates the shape of quotas.yaml with pydantic, and writes each mistake in the proxy's own words.

A finding says at which key path what is wrong and what to write instead. None of pydantic's own texts is used: they
quote the input, which may be a secret, and name Python's types instead of YAML's.
"""

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from proxy.config.document import Finding, KeyPath
from proxy.config.schema import EMPTY, IS_MAPPING, IS_TEXT, File, Quota, section_at

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


def read_file(data: Mapping[str, object]) -> tuple[File | None, tuple[Finding, ...]]:
    """The validated file, or None and a finding for each mistake in its shape."""
    try:
        return File.model_validate(data), ()
    except ValidationError as error:
        return None, tuple(_finding(detail) for detail in error.errors(include_url=False)[:_FINDINGS_MAX])


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
    """The text with its key path in front: `users.alice.keys[1]: …`.

    Names of admin keys are left out. An operator who writes `{key: name}` instead of `{name: key}` has a key there.
    """
    shown = (*path[:1], *path[2:]) if path[:1] == ("admin_keys",) else path
    prefix = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in shown).removeprefix(".")
    return f"{prefix}: {text}" if prefix else text


def finding_at(path: KeyPath, text: str) -> Finding:
    """A finding whose text begins with its key path."""
    return Finding(path, with_path(path, text))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean "…"?` with the most similar known word, or an empty text if none is similar."""
    # 50 characters, because the comparison takes quadratic time and a word may be megabytes long.
    matches = get_close_matches(word[:50], list(known), n=1)
    return f'did you mean "{matches[0]}"?' if matches else ""


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
        text = f"this is not an allowed value; write {context['expected'].replace(chr(39), '')}"
    else:
        text = str(context["error"]) if kind == "value_error" else _TEXTS[kind]
    return finding_at(path, text)


def _unknown_key(path: KeyPath) -> str:
    section = section_at(path)
    keys = section.named_fields()
    hint = did_you_mean(str(path[-1]), keys) or f"write one of {', '.join(keys)}"
    return f'"{path[-1]}" is not a key of {section.display_name}; {hint}'


def _missing_key(path: KeyPath) -> str:
    key = str(path[-1])
    example = (section_at(path).named_fields()[key].examples or [""])[0]
    return f'"{key}" is missing; write {key}: {example if isinstance(example, str) else json.dumps(example)}'
