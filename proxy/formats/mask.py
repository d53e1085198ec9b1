"""Masks the key of an upstream, and in errors its account too, in everything that passes to a client.

An upstream may repeat our key: in an error inside a successful answer, which has no fixed form, in a page of HTML, in
a header, in a text of the model. So everything is searched for the key, whatever it is. The account is searched for
only in what reports an error (see `reported_error`), because an ordinary text may look like one. The same holds for
a key that is so short that it may be an ordinary word.

    sk-key-0123456789                    →  ***
    sk\\u002dkey\\u002d0123456789        →  ***     escaped in JSON, which is what most of this module is about
    sk\\\\u002dkey-0123456789            →  ***     JSON in a string of JSON

The search of an ordinary event costs two searches for a short string, 0.1 to 0.5 µs, which is less than its parsing:
one for a part of the key without punctuation, and one for the beginning of an escape by number. Only if one of them
is there, the escapes are undone. An upstream without a key costs nothing. Pure.
"""

import re
from functools import cached_property

from proxy.formats.reported_error import may_report_error

# A shorter key may be an ordinary word, such as "none" or "ollama".
_KEY_BYTES_MIN = 8
# A shorter part of a key is found in too many texts, and the search for a longer one takes longer.
_PART_BYTES_MIN = 6
_PART_BYTES_MAX = 16
_PARTS = re.compile(rb"[A-Za-z0-9]+")
# So many characters of a key at the end of a text that breaks off are taken for its beginning.
_BEGINNING_MIN = 8
# The most bytes in which one character of a key is looked for, where only the end of a text is searched.
_SPELLED_BYTES_MAX = 24
# How many bytes of an error are kept back if its body passes in pieces. No account is longer.
_OVERLAP = 4096

# OpenAI names the organisation or project in the message of a 429, and Anthropic the organisation by its UUID.
# Letters in either case are written out: with re.IGNORECASE the search takes a hundred times as long.
_ACCOUNT = re.compile(
    rb"(?<!\w)(?:"
    rb"(?:[oO][rR][gG]|[pP][rR][oO][jJ])[-_][A-Za-z0-9]{6,}|[wW][rR][kK][sS][pP][cC]_[A-Za-z0-9]{6,}"
    rb'|[oO][rR][gG](?:[aA][nN][iI][zZ][aA][tT][iI][oO][nN])?(?: [iI][dD])?[ :=(\\"]{1,5}'
    rb"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4,12}){4})"
)
# An escape in a JSON string: a character by its number, a slash, or any other, which stays as it is.
_ESCAPE = re.compile(rb"\\(?:u00([2-7][0-9a-fA-F])|(/)|.)", re.DOTALL)
# An escape of ASCII. Some upstreams escape all other characters, and these are not searched further.
_ASCII_ESCAPE = re.compile(rb"\\u00[2-7]")
# All backslashes before an escape: each JSON in a string of JSON doubles them, or writes them as \u005c. The text
# before decides that this is the first one, else a search would take time quadratic in their number.
_BACKSLASHES = rb"(?<!\\)(?:\\(?:u005[cC])?)++"
_NESTED_ESCAPE = re.compile(_BACKSLASHES + rb"(?:u00([2-7][0-9a-fA-F])|/)")
# An escape of which only the beginning has arrived.
_CUT_ESCAPE = re.compile(_BACKSLASHES + rb"(?:u[0-9a-fA-F]{0,3})?\Z")


class Mask:
    """Writes `***` in the place of a key of an upstream and of its account. `key` is None or "" if it has none.

    `is_cut` says that the data may break off within the key. Then its beginning, if it is long enough to be one, is
    masked too. Data without anything to mask is returned unchanged.
    """

    def __init__(self, key: str | None) -> None:
        self._key = (key or "").encode()
        # The part that is looked for first; None if ordinary data is not searched, b"" if every part is too short.
        self._part: bytes | None = None
        if len(self._key) >= _KEY_BYTES_MIN:
            part = max(_PARTS.findall(self._key), key=len, default=b"")
            self._part = part[-_PART_BYTES_MAX:] if len(part) >= _PART_BYTES_MIN else b""

    def anywhere(self, data: bytes, *, is_cut: bool = False) -> bytes:
        """Mask the key in data of any kind."""
        if self._part is None:
            return data
        if self._part in data or (b"\\u00" in data and _ASCII_ESCAPE.search(data)):
            data = self._without_key(data)
        return self._without_beginning(data) if is_cut else data

    def in_error(self, data: bytes, *, is_cut: bool = False) -> bytes:
        """Mask the key, however short, and the account."""
        shown = self._without_key(data)
        plain = _ESCAPE.sub(_unescaped, shown) if b"\\" in shown else shown
        masked = _ACCOUNT.sub(b"***", plain)
        shown = shown if masked == plain else masked
        return self._without_beginning(shown) if is_cut else shown

    def in_header(self, value: str) -> str:
        """Mask the key in the value of a header."""
        return self.anywhere(value.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")

    def beginning_at_end(self, data: bytes, *, least: int = 1) -> int:
        """How many bytes at the end of `data` may be the beginning of the key: at least `least` characters, else 0.

        With 1, this includes an escape of which only the beginning is there.
        """
        key = self._key
        if self._part is None:
            return 0
        tail = data[-len(key) * _SPELLED_BYTES_MAX :]
        end = text = tail
        if b"\\" in tail:
            end = _CUT_ESCAPE.sub(b"", tail)
            text = _NESTED_ESCAPE.sub(_character, end)
        length = next((length for length in range(len(key) - 1, least - 1, -1) if text.endswith(key[:length])), 0)
        begin = re.search(_spelled(key[:length]) + rb"\Z", end) if length else None
        if begin is None:
            return len(tail) - len(end) if least == 1 else 0
        return len(tail) - begin.start()

    def _without_key(self, data: bytes) -> bytes:
        if not self._key:
            return data
        data = data.replace(self._key, b"***")
        if b"\\" in data and self._key in _NESTED_ESCAPE.sub(_character, data):
            data = self._spellings.sub(b"***", data)
        return data

    def _without_beginning(self, data: bytes) -> bytes:
        beginning = self.beginning_at_end(data, least=_BEGINNING_MIN)
        return data[:-beginning] + b"***" if beginning else data

    @cached_property
    def _spellings(self) -> re.Pattern[bytes]:
        return re.compile(_spelled(self._key))


class PieceMask:
    """Masks a body that passes in pieces.

    What may be the beginning of the key at the end of a piece is kept back until the next one. From the piece on in
    which the body reports an error, its last 4 kB are kept back, because the name of an account may be cut in two.
    """

    def __init__(self, mask: Mask) -> None:
        self._mask = mask
        self._seen = b"\n"  # the end of what came, because a sign of an error may be cut in two
        self._kept = b""
        self._has_error = False

    def feed(self, piece: bytes) -> bytes:
        """Take the next piece, and return what may pass."""
        if not self._has_error:
            seen = self._seen + piece
            self._has_error = may_report_error(seen)
            self._seen = seen[-64:]  # no sign is longer
        if self._has_error:
            data = self._mask.in_error(self._kept + piece)
            kept = _OVERLAP
        else:
            data = self._mask.anywhere(self._kept + piece)
            kept = self._mask.beginning_at_end(data)
        passing = max(0, len(data) - kept)
        self._kept = data[passing:]
        return data[:passing]

    def end(self) -> bytes:
        """Return the rest."""
        kept, self._kept = self._kept, b""
        return (self._mask.in_error if self._has_error else self._mask.anywhere)(kept, is_cut=True)


def _unescaped(escape: re.Match[bytes]) -> bytes:
    """The character that an escape stands for, if a JSON string may have it without one; else the escape itself."""
    character = bytes.fromhex(escape[1].decode()) if escape[1] else escape[2]
    return escape[0] if character in (None, b'"', b"\\", b"\x7f") else character


def _character(escape: re.Match[bytes]) -> bytes:
    return bytes.fromhex(escape[1].decode()) if escape[1] else b"/"


def _spelled(text: bytes) -> bytes:
    """The regular expression of a text in which any character may be escaped."""
    return b"".join(map(_spelled_character, text))


def _spelled_character(number: int) -> bytes:
    plain = re.escape(bytes((number,)))
    if plain == b"/":
        plain = b"(?:" + _BACKSLASHES + b")?/"
    return b"(?:%b|%bu00(?i:%02x))" % (plain, _BACKSLASHES, number)
