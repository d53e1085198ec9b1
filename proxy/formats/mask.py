"""Masks the key of an upstream, and in errors its account too, in everything that passes to a client.

An upstream may repeat our key: in an error inside a successful answer, which has no fixed form, in a page of HTML, in
a header, in a text of the model. So everything is searched for the key, whatever it is. The account is searched for
only in what reports an error (see `reported_error`), because an ordinary text may look like one. The same holds for
a key that is so short that it may be an ordinary word.

    sk-key-0123456789                    →  ***
    sk\\u002dkey\\u002d0123456789        →  ***     escaped in JSON, which is what most of this module is about
    sk\\\\u002dkey-0123456789            →  ***     JSON in a string of JSON
    sk%2Dkey%2D0123456789               →  ***     in a URL
    sk&#45;key&#x2D;0123456789          →  ***     in HTML

The search of an ordinary event costs two searches for a short string, 0.1 to 0.5 µs, which is less than its parsing:
one for a part of the key without punctuation, and one for the beginning of an escape by number. Only if one of them
is there, the escapes are undone. An upstream without a key costs nothing. Pure.
"""

import re

from proxy.formats.reported_error import may_report_error

# A shorter key may be an ordinary word, such as "none" or "ollama".
_KEY_BYTES_MIN = 8
# A shorter part of a key is found in too many texts, and the search for a longer one takes longer.
_PART_BYTES_MIN = 6
_PART_BYTES_MAX = 16
_PARTS = re.compile(rb"[A-Za-z0-9]+")
# So many characters of a key at the end of a text that breaks off are taken for its beginning.
_BEGINNING_MIN = 8
# The most bytes in which one character of a key is looked for, where only the end of a text is searched, and the most
# bytes of that end: to undo the escapes in it takes time.
_SPELLED_BYTES_MAX = 24
_TAIL_BYTES_MAX = 16 * 1024
# How many bytes of an error are kept back if its body passes in pieces. No account is longer.
_OVERLAP = 4096

# OpenAI and Groq name the organisation or project in the message of a 429, OpenRouter the user who owns our key,
# Moonshot the id of the key, Amazon and Google the account in the name of a resource, Anthropic and xAI the
# organisation or team by its UUID. Letters in either case are written out: with re.IGNORECASE the search takes a
# hundred times as long.
_ACCOUNT = re.compile(
    rb"(?<!\w)(?:"
    rb"(?:[oO][rR][gG]|[pP][rR][oO][jJ])[-_][A-Za-z0-9]{6,}|[wW][rR][kK][sS][pP][cC]_[A-Za-z0-9]{6,}"
    rb"|(?:user|team|acct|ak)[-_][A-Za-z0-9]{16,}|arn:aws[-a-z]*:[-\w:/.]+|projects/[-a-z0-9]{6,}"
    rb"|(?P<name>(?:[oO][rR][gG](?:[aA][nN][iI][zZ][aA][tT][iI][oO][nN])?|[tT]eam|[wW]orkspace|[aA]ccount|[tT]enant"
    rb"""|[sS]ubscription|[pP]roject)(?:[ _-]?[iI][dD])?[ :=('\\"]{1,8})"""
    rb"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4,12}){4})"
)
# An escape in a JSON string: a character by its number, a slash, or any other, which stays as it is.
_ESCAPE = re.compile(rb"\\(?:u00([2-7][0-9a-fA-F])|(/)|.)", re.DOTALL)
# An escape of ASCII. Some upstreams escape all other characters, and these are not searched further.
_ASCII_ESCAPE = re.compile(rb"\\u00[2-7]")
# All backslashes before an escape: each JSON in a string of JSON doubles them, or writes them as \u005c. The text
# before decides that this is the first one, else a search would take time quadratic in their number.
_BACKSLASHES = rb"(?<!\\)(?:\\(?:u005[cC])?)++"
# The same character in a URL, and in HTML: by its number in hexadecimal, or in decimal.
_NESTED_ESCAPE = re.compile(
    _BACKSLASHES + rb"(?:u00([2-7][0-9a-fA-F])|/)|%([2-7][0-9a-fA-F])|&#(?:[xX]0*([2-7][0-9a-fA-F])|0*([0-9]{2,3}));"
)
# An escape of which only the beginning has arrived.
_CUT_ESCAPE = re.compile(
    rb"(?:" + _BACKSLASHES + rb"(?:u[0-9a-fA-F]{0,3})?|%[2-7]?|&(?:#(?:[xX]?[0-9a-fA-F]{0,8})?)?)\Z"
)


class Mask:
    """Writes `***` in the place of the keys of an upstream and of its account. A key is None or "" if it has none.

    It has several while its key is replaced, and if its headers have secrets. `is_cut` says that the data may break
    off within a key. Then its beginning, if it is long enough to be one, is masked too. Data without anything to mask
    is returned unchanged.
    """

    def __init__(self, *keys: str | None) -> None:
        # A longer key is masked first, because a shorter one may be a part of it.
        shortest, *longer = sorted({key for key in keys if key}, key=len) or [""]
        self._key = shortest.encode()
        self._longer = tuple(Mask(key) for key in reversed(longer))
        # The part that is looked for first; None if ordinary data is not searched, b"" if every part is too short.
        self._part: bytes | None = None
        if len(self._key) >= _KEY_BYTES_MIN:
            part = max(_PARTS.findall(self._key), key=len, default=b"")
            self._part = part[-_PART_BYTES_MAX:] if len(part) >= _PART_BYTES_MIN else b""

    def anywhere(self, data: bytes, *, is_cut: bool = False) -> bytes:
        """Mask the key in data of any kind."""
        for mask in self._longer:
            data = mask.anywhere(data, is_cut=is_cut)
        if self._part is None:
            return data
        if self._part in data or (b"\\" in data and _ASCII_ESCAPE.search(data)):
            data = self._without_key(data)
        return self._without_beginning(data) if is_cut else data

    def in_error(self, data: bytes, *, is_cut: bool = False) -> bytes:
        """Mask the key, however short, and the account."""
        for mask in self._longer:
            data = mask.in_error(data, is_cut=is_cut)
        shown = self._without_key(data)
        plain = _ESCAPE.sub(_unescaped, shown) if b"\\" in shown else shown
        masked = _ACCOUNT.sub(_masked_account, plain)
        shown = shown if masked == plain else masked
        return self._without_beginning(shown) if is_cut else shown

    def in_header(self, value: str) -> str:
        """Mask the key in the value of a header."""
        return self.anywhere(value.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")

    def beginning_at_end(self, data: bytes, *, least: int = 1) -> int:
        """How many bytes at the end of `data` may be the beginning of the key: at least `least` characters, else 0.

        With 1, this includes an escape of which only the beginning is there.
        """
        of_longer = max((mask.beginning_at_end(data, least=least) for mask in self._longer), default=0)
        return max(of_longer, self._own_beginning_at_end(data, least))

    def _own_beginning_at_end(self, data: bytes, least: int) -> int:
        key = self._key
        if self._part is None:
            return 0
        tail = data[-min(len(key) * _SPELLED_BYTES_MAX, _TAIL_BYTES_MAX) :]
        end = text = tail
        if b"\\" in tail or b"%" in tail or b"&" in tail:
            end = _CUT_ESCAPE.sub(b"", tail)
            text = _NESTED_ESCAPE.sub(_character, end)
        # An access token has thousands of characters, so the text is not compared with each beginning of the key.
        begin = text.find(key[:least], max(0, len(text) - len(key) + 1))
        while begin != -1 and not key.startswith(text[begin:]):
            begin = text.find(key[:least], begin + 1)
        if begin == -1:
            return len(tail) - len(end) if least == 1 else 0
        return len(tail) - (begin if text is tail else _places(end, [begin])[0])

    def _without_key(self, data: bytes) -> bytes:
        if not self._key:
            return data
        data = data.replace(self._key, b"***")
        # In URLs and HTML only punctuation is escaped, so the longest part is there as it is.
        has_escapes = b"\\" in data or (self._part and self._part in data and (b"%" in data or b"&#" in data))
        if has_escapes and self._key in (undone := _NESTED_ESCAPE.sub(_character, data)):
            data = _without_spellings(data, undone, self._key)
        return data

    def _without_beginning(self, data: bytes) -> bytes:
        beginning = self.beginning_at_end(data, least=_BEGINNING_MIN)
        return data[:-beginning] + b"***" if beginning else data


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


def _masked_account(account: re.Match[bytes]) -> bytes:
    """`***`; for a member of an object, `"org_id": "…"`, after its name, because the rest has to stay JSON."""
    name = account["name"] or b""
    return name + b"***" if b'"' in name else b"***"


def _unescaped(escape: re.Match[bytes]) -> bytes:
    """The character that an escape stands for, if a JSON string may have it without one; else the escape itself."""
    character = bytes.fromhex(escape[1].decode()) if escape[1] else escape[2]
    return escape[0] if character in (None, b'"', b"\\", b"\x7f") else character


def _character(escape: re.Match[bytes]) -> bytes:
    """The character that an escape of any kind stands for."""
    by_number = escape[1] or escape[2] or escape[3]
    if by_number:
        return bytes.fromhex(by_number.decode())
    number = int(escape[4]) if escape[4] else 0x2F
    return bytes((number,)) if number < 0x80 else escape[0]


def _without_spellings(data: bytes, undone: bytes, key: bytes) -> bytes:
    """The data without a key that is escaped in it. `undone` is the data with its escapes undone.

    A regular expression with all spellings of an access token would take a second to compile.
    """
    edges: list[int] = []
    begin = undone.find(key)
    while begin != -1:
        edges += (begin, begin + len(key))
        begin = undone.find(key, begin + len(key))
    places = [0, *_places(data, edges), len(data)]
    return b"***".join(data[start:end] for start, end in zip(places[::2], places[1::2], strict=True))


def _places(data: bytes, positions: list[int]) -> list[int]:
    """Where the characters in `data` begin that are at these positions, in order, when the escapes are undone."""
    places: list[int] = []
    shift = 0  # how much shorter the text has become by the escapes so far
    for escape in _NESTED_ESCAPE.finditer(data):
        while len(places) < len(positions) and positions[len(places)] + shift <= escape.start():
            places.append(positions[len(places)] + shift)
        if len(places) == len(positions):
            return places
        shift += len(escape[0]) - len(_character(escape))
    return places + [position + shift for position in positions[len(places) :]]
