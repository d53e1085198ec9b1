"""What is wrong with the shape of quotas.yaml, in our own words.

pydantic finds it, and none of its own sentences get out: a fault says at which place what is wrong and what to write
instead, and shows no value that could be a secret.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from proxy.config.document import KeyPath
from proxy.config.schema import EMPTY, File, section_at

_FAULTS_MAX = 1000
_WRONG_TYPES = {
    "string_type": "this has to be one piece of text; write it in quotes",
    "list_type": 'this has to be a list; write [ … ], or lines that begin with "- "',
    "dict_type": 'this has to be a mapping; write "name: …" lines below it',
    "model_type": 'this has to be a mapping; write "key: value" lines below it',
    "bool_type": "this has to be true or false",
    "too_short": "this names nothing; name at least one",
    "string_too_long": "this is too long; write at most 1000 characters",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong at which place of the data."""

    path: KeyPath
    text: str


def read_file(data: Mapping[str, object]) -> tuple[File | None, tuple[Finding, ...]]:
    """The file's sections, or what is wrong with their shapes."""
    try:
        return File.model_validate(data), ()
    except ValidationError as error:
        return None, tuple(_fault(detail) for detail in error.errors(include_url=False)[:_FAULTS_MAX])


def placed(path: KeyPath, text: str) -> str:
    """A sentence with the place it is about before it.

    Names of admin keys are not shown: who writes `{key: name}` for `{name: key}` has a key there.
    """
    shown = path[:1] if path[:1] == ("admin_keys",) else path
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in shown).removeprefix(".")
    return f"{where}: {text}" if where else text


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A question for what may have been meant; empty where nothing is near."""
    near = get_close_matches(word[:50], list(words), n=1)
    return f'did you mean "{near[0]}"?' if near else ""


def _fault(detail: ErrorDetails) -> Finding:
    path = detail["loc"][:-1] if detail["loc"][-1:] == ("[key]",) else detail["loc"]
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return Finding(path, placed(path[:-1], _unknown_key(path)))
    if kind == "missing":
        return Finding(path, placed(path[:-1], _missing_key(path)))
    if detail["input"] is None:
        text = EMPTY
    elif kind == "literal_error":
        text = f"this has to be one of {context['expected'].replace(chr(39), '')}"
    else:
        text = str(context["error"]) if kind == "value_error" else _WRONG_TYPES[kind]
    return Finding(path, placed(path, text))


def _unknown_key(path: KeyPath) -> str:
    section = section_at(path)
    keys = section.model_fields
    hint = did_you_mean(str(path[-1]), keys) or f"write one of {', '.join(keys)}"
    return f'"{path[-1]}" is no key of {section.called}; {hint}'


def _missing_key(path: KeyPath) -> str:
    key = str(path[-1])
    example = (section_at(path).model_fields[key].examples or [""])[0]
    return f'"{key}" is missing; write {key}: {example if isinstance(example, str) else json.dumps(example)}'
