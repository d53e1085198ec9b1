"""Loads a file without resolving its references, for a check of a text that somebody has sent.

`${NAME}` and `${file:…}` stay text, so nothing of the environment or of the disk can be read through them. A text is
not what every value may be. Where it is not, a value of the right kind stands in its place, and the place is named.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from proxy.config.document import Finding, KeyPath, read_document
from proxy.config.interpolation import Interpolated, Interpolator
from proxy.config.loader import BadConfig, Config, checked, config_of, read_capped
from proxy.config.messages import finding_at, with_path

# Tried in this order until the value is accepted. The first one is a text that is long enough for a key.
_STAND_INS: tuple[Any, ...] = (
    "https://reference.invalid/v1",
    "sqlite:///reference.db",
    1,
    "1d",
    "127.0.0.1:0",
    "UTC",
    True,
)
_UNKNOWN = "this has a reference, whose value is not known here: write the value to have it checked"


class _Unresolved(Interpolator):
    """Leaves references as they are."""

    def interpolate(self, text: str) -> Interpolated:
        """The text itself."""
        return Interpolated(text, "${" in text)


def load_unresolved(text: str, name: str = "quotas.yaml") -> tuple[Config, tuple[str, ...]]:
    """The config of this text, and the key paths of values that could not be checked. Raises BadConfig."""
    document = read_document(text.encode("utf-8", "surrogatepass"), name, _Unresolved({}, read_capped))
    if document.data is None or document.mistakes:
        raise BadConfig(document.mistakes)
    data = dict(document.data)
    tried: dict[KeyPath, int] = {}
    while True:
        file, findings = checked(document, data)
        open_ones = [path for finding in findings if (path := _reference_at(document.data, finding.path)) is not None]
        again = {path for path in open_ones if tried.get(path, 0) <= len(_STAND_INS)}
        if not again:
            break
        for path in again:
            _put(data, path, _stand_in(path, tried.get(path, 0)))
            tried[path] = tried.get(path, 0) + 1
    if file is None or findings:
        raise BadConfig(document.locate(_shown(document.data, finding)) for finding in findings)
    places = tuple(with_path(path, "").removesuffix(": ") for path in sorted(tried, key=str))
    return config_of(file, document, data), places


def _stand_in(path: KeyPath, number: int) -> Any:
    text = f"reference-{hashlib.sha256(repr(path).encode()).hexdigest()[:40]}"
    return (text, *_STAND_INS)[number]


def _reference_at(data: Mapping[str, object], path: KeyPath) -> KeyPath | None:
    """The path of the value with a reference in which this place is; None if there is none."""
    for end, value in _values(data, path):
        if isinstance(value, str) and "${" in value:
            return path[:end]
    return None


def _values(data: Any, path: KeyPath) -> Iterator[tuple[int, object]]:
    for end, step in enumerate(path, start=1):
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return
        yield end, data


def _put(data: dict[str, Any], path: KeyPath, value: object) -> None:
    """Put a value at a path. Mappings and lists on the way are copied, because the document has them too."""
    at: Any = data
    for step in path[:-1]:
        at[step] = at[step].copy()
        at = at[step]
    at[path[-1]] = value


def _shown(data: Mapping[str, object], finding: Finding) -> Finding:
    path = _reference_at(data, finding.path)
    return finding if path is None else finding_at(path, _UNKNOWN)
