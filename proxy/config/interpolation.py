"""`${…}` in a value: where it comes from, and which values came from outside the file.

    ${NAME}             from the environment; unset is a mistake
    ${NAME:-default}    the same, or the default where it is unset or empty
    ${file:/path}       a file's content without the line end after it
    $${                 the two signs themselves

The environment and the reader of files are handed in. What came from outside is remembered, so that it can be
hidden wherever a sentence might show it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_FILE_BYTES_MAX = 65_536
# A secret of fewer characters is refused anyway; hiding every "a" would only make sentences unreadable.
_HIDDEN_FROM = 4

ReadFile = Callable[[str], bytes]

_REFERENCE = re.compile(r"(\$?)\$\{([^}]*)(\}?)")
_NAMED = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:(:-)(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Interpolated:
    """A text after substitution, whether anything was put in, and what is wrong with its references."""

    text: str
    is_interpolated: bool
    wrong: tuple[str, ...]


class Interpolator:
    """What references are looked up in."""

    def __init__(self, environ: Mapping[str, str], read_file: ReadFile) -> None:
        self._environ = environ
        self._read_file = read_file
        self._outside: set[str] = set()
        self._lengths: set[int] = set()

    def interpolate(self, text: str) -> Interpolated:
        """The text with its references replaced; one that is wrong stays as it is written."""
        wrong: list[str] = []
        looked_up = 0

        def replace(match: re.Match[str]) -> str:
            nonlocal looked_up
            if match[1]:
                return match[0][1:]
            looked_up += 1
            try:
                return self._look_up(match[2], is_closed=bool(match[3]))
            except ValueError as error:
                wrong.append(str(error))
                return match[0]

        return Interpolated(_REFERENCE.sub(replace, text), looked_up > 0, tuple(wrong))

    def redact(self, text: str) -> str:
        """The text without any value that came from outside, the longest first."""
        # By pieces of the text instead of value by value: there may be a key for each of 50,000 users.
        for length in sorted(self._lengths, reverse=True):
            shown, start, here = "", 0, 0
            while here + length <= len(text):
                if text[here : here + length] in self._outside:
                    shown += f"{text[start:here]}…"
                    start = here = here + length
                else:
                    here += 1
            text = shown + text[start:]
        return text

    def _look_up(self, inside: str, *, is_closed: bool) -> str:
        if not is_closed or "${" in inside:
            raise ValueError("a ${ has no } of its own; write ${NAME}, or $${ where you mean the signs themselves")
        if inside.startswith("file:"):
            return self._remember(self._content(inside.removeprefix("file:")))
        match = _NAMED.fullmatch(inside)
        if not match:
            # Not shown: it may be a key that was pasted where its name belongs.
            raise ValueError("this ${…} names nothing; write ${NAME}, ${NAME:-default} or ${file:/path}")
        name, has_default, default = match.groups()
        value = self._environ.get(name)
        if has_default and not value:
            return str(default)
        if value is None:
            raise ValueError(f"{name} is not set in the environment; set it, or write ${{{name}:-default}}")
        return self._remember(value)

    def _content(self, path: str) -> str:
        if not path.startswith("/"):
            raise ValueError(f'"{path}" is no whole path; write one from the root, as in ${{file:/run/secrets/name}}')
        try:
            content = self._read_file(path)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "no such name"
            raise ValueError(
                f'the file "{path}" can\'t be read ({why}); check its name and who may read it'
            ) from None
        if len(content) > _FILE_BYTES_MAX:
            raise ValueError(
                f'the file "{path}" is larger than {_FILE_BYTES_MAX} bytes; name one with a single value'
            )
        try:
            return content.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise ValueError(f'the file "{path}" is not UTF-8 text; save it as text') from None

    def _remember(self, value: str) -> str:
        if len(value) >= _HIDDEN_FROM:
            self._outside.add(value)
            self._lengths.add(len(value))
        return value
