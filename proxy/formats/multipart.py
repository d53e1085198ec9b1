"""Read a form (`multipart/form-data`) while it is spooled: its fields, the sizes of its files, and where values are.

The form is read piece by piece, and the content of its files is not kept. The proxy forwards the original bytes, so a
form must mean the same to every parser. A form that two parsers could read differently is refused: with bytes before
its first part, with a boundary inside a part, with a field that appears twice, with an encoded value.
Sources: RFC 7578; RFC 2046 §5.1 for the delimiters. Pure.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from proxy.errors import InvalidRequest, UnsupportedEncoding

# All fields together. The longest that OpenAI accepts is a prompt of 32,000 characters.
_FIELDS_BYTES_MAX = 2**20
_PARTS_MAX = 256
_HEADER_BYTES_MAX = 4096
# The charset of a form or of a part. Java's clients write one beside the boundary.
_CHARSET = r'charset="?([A-Za-z0-9_.:-]{1,40})"?'
# The characters of a boundary are those of RFC 2046 §5.1.1, except blanks. A second boundary is refused, because
# parsers choose differently between two.
_CONTENT_TYPE = re.compile(
    rf"multipart/form-data(?:[ \t]*;[ \t]*{_CHARSET})?"
    r'[ \t]*;[ \t]*boundary=(?:"([0-9A-Za-z\'()+_,./:=?-]{1,70})"|([0-9A-Za-z\'+_.-]{1,70}))'
    rf"(?:[ \t]*;[ \t]*{_CHARSET})?",
    re.IGNORECASE,
)
_PART_CHARSET = re.compile(rf"(?:^|;)[ \t]*{_CHARSET}[ \t]*(?=;|$)", re.IGNORECASE)
# Charsets in which ASCII is what it is in UTF-8. Java's clients write them because they are its defaults. Parsers
# that obey them and parsers that ignore them read the same text only if it is ASCII.
_LIKE_ASCII = ("us-ascii", "ascii", "iso-8859-1", "iso-8859-15", "latin1", "windows-1252")
_UTF_8 = ("utf-8", "utf8")
# A second `name` is refused, because some parsers take the last. The name may lack quotes, as .NET writes it. It is
# printable ASCII: parsers decode other bytes in different ways, or leave them out, so that `model` and a byte more
# would be a second `model`. For parsers that know no quotes it has no `;` and `=` either.
_NAME = r'name=(?:"(?P<quoted{0}>[ !#-:<>-\[\]-~]{{1,200}})"|(?P<plain{0}>[\w.\[\]-]{{1,200}}))'
# The file's name, in one or both notations (`filename`, `filename*`).
_FILENAME = r' *; *filename\*?=(?:"(?:[^"\\]|\\.)*"|[^";\s]*)'
# Before the name of the field, as Jersey writes it, the file's name must be one that no parser can take for more: a
# parser that knows no escapes ends `"a\"; name=\"b"` in its middle. So must the parameters of RFC 2183 be.
_CLEAR_PARAMETER = (
    r' *(?:filename\*?=(?:"[^"\\;=]*"|[^"\\;=\s]*)'
    r'|(?:creation-date|modification-date|read-date)="[A-Za-z0-9 ,:+-]*"|size=[0-9]{1,20}) *;'
)
_DISPOSITION = re.compile(
    rf"form-data;(?: *{_NAME.format(1)}(?P<file>(?:{_FILENAME}){{1,2}})?"
    rf"|(?P<clear>(?:{_CLEAR_PARAMETER}){{1,6}}) *{_NAME.format(2)})",
    re.IGNORECASE | re.ASCII,
)
_NAME_GROUPS = ("quoted1", "plain1", "quoted2", "plain2")
# In the headers of a part: many parsers end a line here as well.
_BARE_LINE_END = re.compile(rb"\r(?!\n)|(?<!\r)\n|\0")
# CXF writes `Content-ID`. RFC 7578 §4.8: parsers ignore all but the first three.
_HEADERS = ("content-disposition", "content-type", "content-transfer-encoding", "content-length", "content-id")
# The other transfer encodings, base64 and quoted-printable, are decoded by some parsers and not by others.
_IDENTITY_ENCODINGS = ("binary", "8bit", "7bit")


@dataclass(frozen=True, slots=True)
class Field:
    """One field that is not a file. Its value is the bytes `start` to `end` of the body."""

    name: str
    value: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class File:
    """The field name of one file, and its size in bytes. Its content is not kept."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Form:
    """A complete form. `content_type` is the header that it came with and is forwarded with.

    `start` is where its first boundary is: 2 if there is an empty line before it.
    """

    content_type: str
    boundary: str
    fields: tuple[Field, ...]
    files: tuple[File, ...]
    start: int = 0

    def field(self, name: str) -> Field | None:
        """The field of this name, or None."""
        return next((field for field in self.fields if field.name == name), None)


class FormReader:
    """Parses one form from chunks of any size. Raises UnsupportedEncoding if `content_type` is not that of a form.

    A state machine: `_step` is the method for what is expected next.

        _begin → _after_delimiter → _headers → _content ─▶ _after_delimiter → _end
    """

    def __init__(self, content_type: str) -> None:
        match = _CONTENT_TYPE.fullmatch(content_type.strip())
        if match is None:
            raise UnsupportedEncoding(
                "This endpoint takes a form: send `Content-Type: multipart/form-data` with one boundary."
            )
        charsets = [charset for charset in (match[1], match[4]) if charset]
        self._is_ascii = _must_be_ascii(charsets)
        self._content_type = content_type.strip()
        self._boundary = match[2] or match[3]
        self._dashed = b"--" + self._boundary.encode()
        self._delimiter = b"\r\n" + self._dashed
        # The first delimiter has no line end before it. With one added here, it is like all others.
        self._buffer = bytearray(b"\r\n")
        self._offset = -2  # where the buffer begins in the body
        self._step = self._begin
        self._fields: list[Field] = []
        self._files: list[File] = []
        self._value = bytearray()
        self._name = ""
        self._is_file = self._is_ascii_part = False
        self._start = self._first = 0

    def feed(self, chunk: bytes) -> None:
        """Parse the next bytes. Raises InvalidRequest if they make the form invalid or ambiguous."""
        self._buffer += chunk
        while self._step():
            pass

    def end(self) -> Form:
        """Return the form after its last bytes. Raises InvalidRequest if it is incomplete."""
        if self._step != self._end:
            raise _unreadable("it ends before its last boundary")
        return Form(self._content_type, self._boundary, tuple(self._fields), tuple(self._files), self._first)

    # Each step returns whether the next step may be able to go on with the bytes in the buffer.

    def _begin(self) -> bool:
        if len(self._buffer) < len(b"\r\n" + self._delimiter):
            return False
        # Programs that write their forms by hand begin each part with a line end, also the first.
        self._first = 2 if self._buffer.startswith(b"\r\n" * 2) else 0
        if not self._buffer.startswith(self._delimiter, self._first):
            raise _unreadable("there are bytes before its first part")
        self._drop(self._first + len(self._delimiter))
        self._step = self._after_delimiter
        return True

    def _after_delimiter(self) -> bool:
        if len(self._buffer) < 2:
            return False
        following = bytes(self._buffer[:2])  # a line end before the next part, or "--" at the end of the form
        if following not in (b"\r\n", b"--"):
            raise _unreadable("its boundary appears where no part ends")
        self._drop(2)
        self._step = self._headers if following == b"\r\n" else self._end
        return True

    def _headers(self) -> bool:
        length = self._buffer.find(b"\r\n\r\n")
        if length > _HEADER_BYTES_MAX or (length < 0 and len(self._buffer) > _HEADER_BYTES_MAX):
            raise _unreadable("the headers of a part are too long")
        if length < 0:
            return False
        if len(self._fields) + len(self._files) >= _PARTS_MAX:
            raise _unreadable(f"it has more than {_PARTS_MAX} parts")
        self._name, self._is_file, is_ascii = _read_headers(bytes(self._buffer[:length]))
        self._is_ascii_part = is_ascii or self._is_ascii
        self._drop(length + 4)
        self._start = self._offset
        self._value.clear()
        self._step = self._content
        return True

    def _content(self) -> bool:
        dashes = self._buffer.find(self._dashed)
        # The boundary is a delimiter only after CRLF. Some parsers also accept it at the very beginning of a part
        # (Go) or after a bare CR or LF (Werkzeug), so there it is refused.
        if dashes >= 0 and not self._buffer.startswith(self._delimiter, max(0, dashes - 2)):
            raise _unreadable("its boundary appears where no part ends")
        end = max(-1, dashes - 2)
        # The last bytes stay in the buffer: they may begin a delimiter whose rest is in the next chunk.
        length = end if end >= 0 else max(0, len(self._buffer) - len(self._delimiter) + 1)
        if not self._is_file:
            self._value += self._buffer[:length]
            if len(self._value) + sum(len(field.value) for field in self._fields) > _FIELDS_BYTES_MAX:
                raise _unreadable(f"its fields have more than {_FIELDS_BYTES_MAX} bytes")
        self._drop(length)
        if end < 0:
            return False
        self._add_part()
        self._drop(len(self._delimiter))
        self._step = self._after_delimiter
        return True

    def _end(self) -> bool:
        # RFC 2046 §5.1.1 allows any text after the last part (an epilogue). Only a line end is accepted here.
        if bytes(self._buffer) not in (b"", b"\r", b"\r\n"):
            raise _unreadable("there are bytes after its last part")
        return False

    def _add_part(self) -> None:
        if self._is_file:
            self._files.append(File(self._name, self._offset - self._start))
            return
        # Parsers take the first, the last or both of two equal names. They all read a name that ends in [] as a list.
        if not self._name.endswith("[]") and any(field.name == self._name for field in self._fields):
            raise InvalidRequest(f'The field "{self._name}" appears twice.', param=self._name)
        try:
            value = self._value.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(f'The field "{self._name}" is not valid UTF-8.', param=self._name) from None
        # RFC 7578 §4.6: the charset of all fields, for parsers that know this rule.
        if self._name == "_charset_" and value.lower() not in _UTF_8:
            raise _unreadable("a field is not in UTF-8")
        if self._is_ascii_part and not value.isascii():
            raise InvalidRequest(
                f'The field "{self._name}" has other characters than ASCII, and a charset other than UTF-8. '
                "Send it in UTF-8, with `charset=UTF-8` or without a charset.",
                param=self._name,
            )
        self._fields.append(Field(self._name, value, self._start, self._offset))

    def _drop(self, length: int) -> None:
        del self._buffer[:length]
        self._offset += length


def _must_be_ascii(charsets: Iterable[str]) -> bool:
    """Whether text in these charsets must be ASCII to be clear. Raises UnsupportedEncoding for charsets unlike it."""
    others = [charset.lower() for charset in charsets if charset.lower() not in _UTF_8]
    if not all(charset in _LIKE_ASCII for charset in others):
        raise UnsupportedEncoding(f"The form's charset {others[0]!r} is not supported: send the form in UTF-8.")
    return bool(others)


def _read_headers(headers: bytes) -> tuple[str, bool, bool]:
    """The name in the headers of a part, whether the part is a file, and whether its text must be ASCII."""
    if _BARE_LINE_END.search(headers):
        raise _unreadable("a part has headers that are not accepted here")
    fields: dict[str, str] = {}
    for line in headers.decode("utf-8", "replace").split("\r\n"):
        name, _, value = line.partition(":")
        if name.lower() not in _HEADERS or name.lower() in fields:
            raise _unreadable("a part has headers that are not accepted here")
        fields[name.lower()] = value.strip(" \t")
    disposition = _DISPOSITION.fullmatch(fields.get("content-disposition", ""))
    if disposition is None:
        raise _unreadable("a part has no name, or one that is not clear")
    if fields.get("content-transfer-encoding", "binary").lower() not in _IDENTITY_ENCODINGS:
        raise _unreadable("a part has a transfer encoding")
    name = next(name for group in _NAME_GROUPS if (name := disposition[group]))
    kind = fields.get("content-type", "").lower()
    if disposition["file"] is not None or "filename" in (disposition["clear"] or "").lower():
        return name, True, False
    charsets = _PART_CHARSET.findall(kind)
    if kind.count("charset") != len(charsets) or not {*charsets} <= {*_UTF_8, *_LIKE_ASCII}:
        raise _unreadable("a field is not in UTF-8")
    return name, False, _must_be_ascii(charsets)


def _unreadable(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The form can't be read: {reason}.", code="invalid_form")
