"""Replaces `${…}` in values, and redacts in diagnostics what it put in.

    ${NAME}             the environment variable; a mistake if it is not set
    ${NAME:-default}    the same, or the default if the variable is unset or empty
    ${file:/path}       the content of a file, without the line end after it
    $${                 a literal ${

A value that is one `${…}` as a whole is taken as it is. Within a URL, what is put in cannot end its part of the URL
and begin another one:

- In the user and the password it is taken literally and percent-encoded. With PW = p@ss, `postgresql://u:${PW}@host`
  becomes `postgresql://u:p%40ss@host`, and the driver decodes that to p@ss.
- Elsewhere it must be what that part may be (RFC 3986 §3): a host, or host:port; digits after the colon; a path.

The environment and the function that reads files come through the constructor. An `Interpolator` remembers every
value that it put in, because such a value may be a secret: `redact` removes all of them from a text.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from proxy.config.values import is_unicode

_FILE_BYTES_MAX = 65_536
# Shorter values are not redacted: keys of users and admins have at least 24 characters, and to redact a value such as
# "a" would make every diagnostic unreadable.
_REDACTED_FROM = 4

ReadFile = Callable[[str], bytes]

# Three groups: a second $ in front, what is between the braces, the closing brace if there is one.
_INTERPOLATION = re.compile(r"(\$?)\$\{([^}]*)(\}?)")
_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:(:-)(.*))?", re.DOTALL)
_PERCENT_ENCODED = re.compile(r"%[0-9A-Fa-f]{2}")

# ------------------------------------------------------------------------------------------------- the parts of a URL

# Stands for a `${…}` while the parts of a URL are told apart.
_HOLE = "\0"
# A text with a space is a sentence with a URL in it.
_URL = re.compile(rf"[A-Za-z{_HOLE}][A-Za-z0-9+.{_HOLE}-]*://\S*")
# RFC 3986, appendix B: scheme, authority, path, query, fragment.
_PARTS = re.compile(r"([^:/?#]+)://([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?", re.DOTALL)
# Settings in the query of a PostgreSQL URL that are credentials too.
_CREDENTIAL_SETTINGS = ("user", "password", "sslpassword")

# RFC 3986 §3.2.2. Names of hosts in container networks have underscores; commas separate the hosts of PostgreSQL.
_HOST = r"(?:[A-Za-z0-9._,-]*|\[[0-9A-Fa-f:.]+\])"
_PORT = r"[0-9]{1,5}"
# `pchar` of RFC 3986 §3.3 without & = and +, which separate in queries.
_LETTER = r"(?:[A-Za-z0-9._~!$'()*,;:@-]|%[0-9A-Fa-f]{2})"
_PATH = rf"(?:{_LETTER}|[/&=+])*"
# The segments . and .. would remove what the file has before them.
_DOTS = r"(?:.*/)?(?:\.|%2[Ee]){1,2}(?:/.*)?"


@dataclass(frozen=True, slots=True)
class _Part:
    """What may be put into a part of a URL."""

    description: str
    pattern: re.Pattern[str]


def _part(description: str, pattern: str) -> _Part:
    return _Part(description, re.compile(pattern))


_CREDENTIAL = _part("text", r"(?s).*")
_SCHEME = _part("a scheme such as https", r"[A-Za-z][A-Za-z0-9+.-]*")
_HOST_ONLY = _part("a host", _HOST)
_HOST_PORT = _part("a host, or host:port", f"{_HOST}(?::{_PORT})?")
# Behind a host, as in https://${HOST}${PREFIX}/v1.
_REST = _part("the rest of a host, a port or a path", f"{_HOST}(?::{_PORT})?(?:/{_PATH})?")
_IPV6 = _part("an IPv6 address", r"[0-9A-Fa-f:.]+")
_PORT_ONLY = _part("a port", _PORT)
_FILE_PATH = _part("a path", _PATH)
_URL_PATH = _part("a path without the segments . and ..", f"(?!{_DOTS}$){_PATH}")
_QUERY = _part("a query", f"(?:{_LETTER}|[/?&=+])*")
_QUERY_VALUE = _part("a name or value of a query, percent-encoded", f"(?:{_LETTER}|[/?])*")
_FRAGMENT = _part("a fragment", f"(?:{_LETTER}|[/?&=+])*")
# As in ${BASE}/v1. Nobody could say what in it is a user or a password, so that has to be encoded already.
_BEGINNING = _part(
    "the beginning of a URL, up to its path and percent-encoded",
    rf"[A-Za-z][A-Za-z0-9+.-]*://(?:(?:{_LETTER}|[&=+])*@)?{_HOST}(?::{_PORT})?(?:/{_PATH})?",
)


def _parts_of(literals: Sequence[str], values: Sequence[str | None]) -> list[_Part | None]:
    """The part of a URL into which each value is put; None where it may be anything.

    `literals` is the text of the file before, between and behind the values.
    """
    template = _HOLE.join(literal.replace(_HOLE, " ") for literal in literals)
    first = values[0]
    if template == _HOLE:
        return [None]
    if _URL.fullmatch(template):
        return [*_parts_of_url(template)]
    if template[0] == _HOLE and first is not None and "://" in first and not re.search(r"\s", template):
        if not _BEGINNING.pattern.fullmatch(first):
            return [_BEGINNING, *[None] * (len(values) - 1)]
        return [None, *_parts_of_url(first + template[1:])]
    return [None] * len(values)


def _parts_of_url(template: str) -> Iterator[_Part]:
    found = _PARTS.fullmatch(template)
    assert found, "a text with :// has all these parts, of which all but the scheme may be empty"
    scheme, authority, path, query, fragment = found.groups(default="")
    userinfo, _, host = authority.rpartition("@")
    yield from [_SCHEME] * scheme.count(_HOLE)
    yield from [_CREDENTIAL] * userinfo.count(_HOLE)
    for hole in _holes(host):
        yield _host_part(host[:hole], host[hole + 1 :])
    yield from [_FILE_PATH if scheme == "sqlite" else _URL_PATH] * path.count(_HOLE)
    for hole in _holes(query):
        yield _query_part(query, hole)
    yield from [_FRAGMENT] * fragment.count(_HOLE)


def _holes(text: str) -> list[int]:
    return [index for index, letter in enumerate(text) if letter == _HOLE]


def _host_part(before: str, after: str) -> _Part:
    """The part between these two texts: in `host:port`, in `[IPv6]:port`, or in several of them with commas."""
    _, bracket, behind = before.rpartition("[")
    if bracket and "]" not in behind:
        return _IPV6
    if ":" in before.rpartition(",")[2].rpartition("]")[2]:
        return _PORT_ONLY
    if ":" in after:
        return _HOST_ONLY
    return _REST if before and not after else _HOST_PORT


def _query_part(query: str, hole: int) -> _Part:
    name, is_value, _ = query[1:hole].rpartition("&")[2].partition("=")
    if is_value and name in _CREDENTIAL_SETTINGS:
        return _CREDENTIAL
    return _QUERY if query == f"?{_HOLE}" else _QUERY_VALUE


# ------------------------------------------------------------------------------------------------------ interpolation


@dataclass(frozen=True, slots=True)
class Interpolated:
    """A text after interpolation, whether it contained any `${…}`, a mistake for each that failed, and warnings.

    `unread` names the variables that are not set and the files that can't be read. Each is one of the mistakes.
    """

    text: str
    is_interpolated: bool
    mistakes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


class Unread(ValueError):
    """A variable is not set, or a file can't be read. `name` is that of the variable, or the path."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


@dataclass(frozen=True, slots=True)
class Outside:
    """What is outside of quotas.yaml. `read_file` may raise OSError, or ValueError for a bad path."""

    environ: Mapping[str, str]
    read_file: ReadFile

    def content(self, path: str) -> bytes:
        """The content of a file. Raises Unread with the text of a mistake."""
        try:
            return self.read_file(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a valid path"
            text = f'the file "{path}" can\'t be read ({reason}); check its path and its permissions'
            raise Unread(path, text) from None


class Interpolator:
    """Interpolates from `environ` and from files. `read_file` may raise OSError, or ValueError for a bad path."""

    def __init__(self, environ: Mapping[str, str], read_file: ReadFile) -> None:
        self._outside = Outside(environ, read_file)
        self._inserted: set[str] = set()
        self._lengths: set[int] = set()

    @property
    def outside(self) -> Outside | None:
        """Where it interpolates from; None if nothing outside of the text is to be read."""
        return self._outside

    def interpolate(self, text: str) -> Interpolated:
        """Replace every `${…}` in the text. One that fails stays as it is and adds a mistake."""
        literals, references = _split(text)
        if not references:
            return Interpolated(literals[0], False)
        mistakes: list[str] = []
        warnings: list[str] = []
        unread: list[str] = []
        values = [self._value(reference, mistakes, unread) for reference in references]
        for index, part in enumerate(_parts_of(literals, values)):
            value, shown = values[index], f"${{{references[index][2].partition(':-')[0]}}}"
            if part is None or value is None:
                continue
            if not part.pattern.fullmatch(value) or not is_unicode(value):
                mistakes.append(f"the value of {shown} is not {part.description}, which its place in the URL needs")
                values[index] = None
            elif part is _CREDENTIAL:
                warnings += _credential_warnings(shown, value)
                values[index] = self._remember(quote(value, safe=""))
        for index, (reference, value) in enumerate(zip(references, values, strict=True)):
            literals[index] += reference[0] if value is None else value
        return Interpolated("".join(literals), True, tuple(mistakes), tuple(warnings), tuple(unread))

    def _value(self, reference: re.Match[str], mistakes: list[str], unread: list[str]) -> str | None:
        """What to put in for this `${…}`. None if it fails, which adds a mistake."""
        try:
            return self._look_up(reference[2], is_closed=bool(reference[3]))
        except ValueError as error:
            mistakes.append(str(error))
            if isinstance(error, Unread):
                unread.append(error.name)
            return None

    def redact(self, text: str) -> str:
        """The text with `…` in place of every value that was put in.

        Longer values go first: with "value" and "value-and-more", redacting "value" first would leave "…-and-more".
        """
        # Every slice of the text is looked up in a set. The obvious way, a search for each value, would need 50
        # million searches for a file with a key for each of 50,000 users and 1,000 mistakes.
        for length in sorted(self._lengths, reverse=True):
            redacted, start, position = "", 0, 0
            while position + length <= len(text):
                if text[position : position + length] in self._inserted:
                    redacted += f"{text[start:position]}…"
                    start = position = position + length
                else:
                    position += 1
            text = redacted + text[start:]
        return text

    def _look_up(self, inside: str, *, is_closed: bool) -> str:
        """The value for what is between `${` and `}`. Raises ValueError with the mistake's text."""
        # "${" inside means nesting, as in ${A:-${B}}, which is not supported: the first } would end it.
        if not is_closed or "${" in inside:
            raise ValueError("a ${ is not closed by its own }; write ${NAME}, or $${ for a literal ${")
        if inside.startswith("file:"):
            return self._remember(self._file_content(inside.removeprefix("file:")))
        match = _VARIABLE.fullmatch(inside)
        if not match:
            # The text is not quoted: it may be a key that was pasted in place of its variable's name.
            raise ValueError("this ${…} is not a name; write ${NAME}, ${NAME:-default} or ${file:/path}")
        name, has_default, default = match.groups()
        value = self._outside.environ.get(name)
        if has_default and not value:
            return str(default)  # written in the file itself, so it is not redacted
        if value is None:
            raise Unread(name, f"{name} is not set in the environment; set it, or write ${{{name}:-default}}")
        return self._remember(value)

    def _file_content(self, path: str) -> str:
        if not path.startswith("/"):
            raise ValueError(
                f'"{path}" is not an absolute path; write one that begins with /, as in ${{file:/run/secrets/name}}'
            )
        content = self._outside.content(path)
        if len(content) > _FILE_BYTES_MAX:
            raise ValueError(
                f'the file "{path}" is larger than {_FILE_BYTES_MAX} bytes; use a file with a single value'
            )
        try:
            return content.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise ValueError(f'the file "{path}" is not UTF-8 text; save it as UTF-8') from None

    def _remember(self, value: str) -> str:
        if len(value) >= _REDACTED_FROM:
            self._inserted.add(value)
            self._lengths.add(len(value))
        return value


def _split(text: str) -> tuple[list[str], list[re.Match[str]]]:
    """The text before, between and behind the references, with its escapes replaced, and the references."""
    literals, references, end = [""], [], 0
    for match in _INTERPOLATION.finditer(text):
        literals[-1] += text[end : match.start()]
        end = match.end()
        if match[1]:  # $${ is an escape
            literals[-1] += match[0][1:]
        else:
            references.append(match)
            literals.append("")
    literals[-1] += text[end:]
    return literals, references


def _credential_warnings(shown: str, value: str) -> Iterator[str]:
    if _PERCENT_ENCODED.search(value):
        yield (
            f"the value of {shown} has a %XX, which is taken literally and not decoded; "
            "if it was encoded for the URL, write the password itself"
        )
