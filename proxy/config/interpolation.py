"""Replaces `${…}` in values, and redacts in diagnostics what it put in.

    ${NAME}             the environment variable; a mistake if it is not set
    ${NAME:-default}    the same, or the default if the variable is unset or empty
    ${file:/path}       the content of a file, without the line end after it
    $${                 a literal ${

The environment and the function that reads files come through the constructor. An `Interpolator` remembers every
value that it put in, because such a value may be a secret: `redact` removes all of them from a text.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_FILE_BYTES_MAX = 65_536
# Shorter values are not redacted: keys of users and admins have at least 24 characters, and to redact a value such as
# "a" would make every diagnostic unreadable.
_REDACTED_FROM = 4

ReadFile = Callable[[str], bytes]

# Three groups: a second $ in front, what is between the braces, the closing brace if there is one.
_INTERPOLATION = re.compile(r"(\$?)\$\{([^}]*)(\}?)")
_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:(:-)(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Interpolated:
    """A text after interpolation, whether it contained any `${…}`, and a mistake for each that failed."""

    text: str
    is_interpolated: bool
    mistakes: tuple[str, ...]


class Interpolator:
    """Interpolates from `environ` and from files. `read_file` may raise OSError, or ValueError for a bad path."""

    def __init__(self, environ: Mapping[str, str], read_file: ReadFile) -> None:
        self._environ = environ
        self._read_file = read_file
        self._inserted: set[str] = set()
        self._lengths: set[int] = set()

    def interpolate(self, text: str) -> Interpolated:
        """Replace every `${…}` in the text. One that fails stays as it is and adds a mistake."""
        mistakes: list[str] = []
        count = 0

        def replace(match: re.Match[str]) -> str:
            nonlocal count
            if match[1]:  # $${ is an escape
                return match[0][1:]
            count += 1
            try:
                return self._look_up(match[2], is_closed=bool(match[3]))
            except ValueError as error:
                mistakes.append(str(error))
                return match[0]

        return Interpolated(_INTERPOLATION.sub(replace, text), count > 0, tuple(mistakes))

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
        value = self._environ.get(name)
        if has_default and not value:
            return str(default)  # written in the file itself, so it is not redacted
        if value is None:
            raise ValueError(f"{name} is not set in the environment; set it, or write ${{{name}:-default}}")
        return self._remember(value)

    def _file_content(self, path: str) -> str:
        if not path.startswith("/"):
            raise ValueError(
                f'"{path}" is not an absolute path; write one that begins with /, as in ${{file:/run/secrets/name}}'
            )
        try:
            content = self._read_file(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a valid path"
            raise ValueError(
                f'the file "{path}" can\'t be read ({reason}); check its path and its permissions'
            ) from None
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
