"""What can be a key in a text such as a log or a diff."""

import re
from collections.abc import Iterator

from proxy.config import values

# What can be a key in a text: what stands between spaces, also between quotes or brackets, or signs of assignment.
_WORDS = tuple(
    re.compile(rf"[^\s{signs}]{{{values.KEY_CHARACTERS_MIN},}}")
    for signs in ("", r"\"'`,;<>()\[\]{}\\", r"\"'`,;<>()\[\]{}\\=")
)
# The usual characters of keys, between any others, as in an address. Those that are escaped count as others.
_USUAL_WORD = re.compile(rf"[A-Za-z0-9_~+-]{{{values.KEY_CHARACTERS_MIN},}}")
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}|\\[nrt]")


def words(text: str) -> Iterator[str]:
    """What can be a key in a text. The characters of a key are not known, so the text is divided in several ways."""
    for word in _WORDS:
        yield from word.findall(text)
    yield from _USUAL_WORD.findall(_ESCAPE.sub(" ", text))
