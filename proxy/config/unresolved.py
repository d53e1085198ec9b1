"""Loads a file without the values of all its references.

`load_unresolved` checks a text that somebody has sent. `${NAME}` and `${file:…}` stay text, so nothing of the
environment or of the disk can be read through them. A text is not what every value may be. Where it is not, a value
of the right kind stands in its place, and the place is named.

`load_without_secrets` is for the commands that use the database and the policy and send nothing to an upstream. Where
a secret can't be read, a random text stands in its place: systemd removes the credentials of a service when it stops,
and a backup is restored while it is stopped.
"""

import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from proxy.config.document import Document, Finding, KeyPath, read_document
from proxy.config.interpolation import Interpolated, Interpolator
from proxy.config.loader import BadConfig, Config, checked, config_of, read_capped, read_source
from proxy.config.messages import finding_at, foreign_file, with_path

# Tried in this order until the value is accepted. The first one is a text that is long enough for a key.
_STAND_INS: tuple[Any, ...] = (
    "https://reference.invalid/v1",
    "http://reference.invalid:3128",
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

    @property
    def outside(self) -> None:
        """Nothing: neither the environment nor a file is read."""
        return None

    def interpolate(self, text: str) -> Interpolated:
        """The text itself."""
        return Interpolated(text, "${" in text)


def load_unresolved(text: str, name: str = "quotas.yaml") -> tuple[Config, tuple[str, ...]]:
    """The config of this text, and the key paths of values that could not be checked. Raises BadConfig."""
    document = read_document(text.encode("utf-8", "surrogatepass"), name, _Unresolved({}, read_capped))
    if document.data is None or document.mistakes:
        raise BadConfig(document.mistakes)
    config, tried = _with_stand_ins(document, document.data, lambda value: _UNKNOWN if "${" in value else None)
    return config, tuple(with_path(path, "").removesuffix(": ") for path in sorted(tried, key=str))


class _WithoutUnread(Interpolator):
    """Puts a text that nobody can guess in place of a value that can't be read. `unread` has what each stands for."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__(environ, read_capped)
        self.unread: dict[str, Interpolated] = {}

    @property
    def outside(self) -> None:
        """Nothing: the certificates and the proxies of upstreams are not needed either."""
        return None

    def interpolate(self, text: str) -> Interpolated:
        """The text with its values, or a stand-in if some can't be read and nothing else is wrong with it."""
        found = super().interpolate(text)
        if not found.unread or len(found.mistakes) > len(found.unread):
            return found
        stand_in = self._remember(secrets.token_hex(20))  # long enough for a key
        self.unread[stand_in] = found
        return Interpolated(stand_in, True)


def load_without_secrets(path: str, environ: Mapping[str, str]) -> tuple[Config, Mapping[KeyPath, tuple[str, ...]]]:
    """The config of the file at `path`, and the variables and files that could not be read for values of it.

    Those values are keys of users, admins and header sources, or belong to an upstream. Raises BadConfig, also if
    another value can't be read.
    """
    interpolator = _WithoutUnread(environ)
    document = read_document(read_source(path, read_capped), path, interpolator)
    if document.data is None:
        raise BadConfig(document.mistakes)
    if foreign := foreign_file(document.data):
        raise BadConfig([document.locate(foreign)])
    unread: dict[KeyPath, tuple[str, ...]] = {}
    of_upstreams: dict[str, str] = {}  # what could not be read, by the stand-ins
    mistakes = list(document.mistakes)
    for at, node in document.walk():
        found = interpolator.unread.get(node.value) if isinstance(node.value, str) else None
        if found is None:
            continue
        if _is_only_for_calls(at):
            unread[at] = found.unread
            if at[0] == "upstreams":
                of_upstreams[str(node.value)] = "; ".join(found.mistakes)
        else:
            node.is_bad = True
            mistakes += [document.locate(Finding(at, text)) for text in found.mistakes]
    config, _ = _with_stand_ins(replace(document, mistakes=tuple(mistakes)), document.data, of_upstreams.get)
    return config, unread


def _is_only_for_calls(path: KeyPath) -> bool:
    """Whether the value at this path is a secret of somebody who calls, or what an upstream is called with."""
    match path:
        case ("upstreams", *_) | ("admin_keys", str()) | ("admin_keys", str(), "key"):
            return True
        case ("users", str(), "keys", int()) | ("users", str(), "keys", int(), "key"):
            return True
        case ("identity", "headers", int(), "key") | ("identity", "headers", int(), "signed", "secret"):
            return True
    return False


# What is to be said of a value that is not known and for which nothing can stand in; None for a value that is known.
_Unknown = Callable[[str], str | None]


def _with_stand_ins(
    document: Document, plain: Mapping[str, object], unknown: _Unknown
) -> tuple[Config, Mapping[KeyPath, int]]:
    """The config of a document, and the paths of the values in whose place another one stands. Raises BadConfig."""
    data = dict(plain)
    tried: dict[KeyPath, int] = {}
    while True:
        file, findings = checked(document, data)
        open_ones = [found.path for finding in findings if (found := _unknown_at(plain, finding.path, unknown))]
        again = {path for path in open_ones if tried.get(path, 0) <= len(_STAND_INS)}
        if not again:
            break
        for path in again:
            _put(data, path, _stand_in(path, tried.get(path, 0)))
            tried[path] = tried.get(path, 0) + 1
    mistakes = [
        document.locate(_unknown_at(plain, finding.path, unknown) or finding)
        for finding in findings
        if not document.is_bad(finding.path)
    ]
    if file is None or mistakes or document.mistakes:
        raise BadConfig([*document.mistakes, *mistakes])
    return config_of(file, document, data), tried


def _stand_in(path: KeyPath, number: int) -> Any:
    text = f"reference-{hashlib.sha256(repr(path).encode()).hexdigest()[:40]}"
    return (text, *_STAND_INS)[number]


def _unknown_at(data: Mapping[str, object], path: KeyPath, unknown: _Unknown) -> Finding | None:
    """What is to be said of the unknown value in which this place is; None if there is none."""
    for end, value in _values(data, path):
        if isinstance(value, str) and (text := unknown(value)) is not None:
            return finding_at(path[:end], text)
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
