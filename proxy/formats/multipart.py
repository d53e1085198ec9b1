"""A form (`multipart/form-data`) on its way: its fields, the sizes of its files, and where each value stands.

A form is read as it passes, piece by piece, and none of its files is kept. It is sent on as it came, so it has to be
plain: what two readers could read in two ways (a preamble, a boundary that goes on or stands where no part ends, a
field that comes twice, an encoded value) is refused. RFC 7578, and RFC 2046 §5.1 for the delimiters. Pure.
"""

import re
from dataclasses import dataclass

from proxy.errors import InvalidRequest, UnsupportedEncoding

# Fields are short: a prompt of 32,000 characters is the longest that OpenAI takes.
_FIELDS_BYTES_MAX = 2**20
_PARTS_MAX = 256
_HEAD_BYTES_MAX = 4096
# RFC 2046 §5.1.1, without blanks.
_CONTENT_TYPE = re.compile(
    r'multipart/form-data[ \t]*;[ \t]*boundary=(?:"([0-9A-Za-z\'()+_,./:=?-]{1,70})"|([0-9A-Za-z\'+_.-]{1,70}))',
    re.IGNORECASE,
)
# Behind the name that of a file, in both notations, and nothing else: of two names some readers take the last.
_FILENAME = r' *; *filename\*?=(?:"(?:[^"\\]|\\.)*"|[^";\s]*)'
# .NET writes the name without quotes.
_NAMED = re.compile(
    rf'form-data; *name=(?:"([^"\\\r\n]{{1,200}})"|([\w.\[\]-]{{1,200}}))((?:{_FILENAME}){{1,2}})?',
    re.IGNORECASE | re.ASCII,
)
# In a head: many readers end a line there too.
_ENDS_A_LINE = re.compile(rb"\r(?!\n)|(?<!\r)\n|\0")
_HEADS = ("content-disposition", "content-type", "content-length", "content-transfer-encoding")
_PLAIN = ("binary", "8bit", "7bit")


@dataclass(frozen=True, slots=True)
class Field:
    """One field that is no file, and from where to where in the body its value stands."""

    name: str
    value: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class File:
    """One file, which is not kept."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Form:
    """A whole form: its fields, and the sizes of its files. `content_type` is the header that it is sent with."""

    content_type: str
    boundary: str
    fields: tuple[Field, ...]
    files: tuple[File, ...]

    def field(self, name: str) -> Field | None:
        """The field of this name."""
        return next((field for field in self.fields if field.name == name), None)


class FormReader:
    """Reads one form. Raises UnsupportedEncoding where `content_type` is none of a form."""

    def __init__(self, content_type: str) -> None:
        match = _CONTENT_TYPE.fullmatch(content_type.strip())
        if match is None:
            raise UnsupportedEncoding(
                "This endpoint takes a form: send `Content-Type: multipart/form-data` with a plain boundary."
            )
        self._content_type = content_type.strip()
        self._boundary = match[1] or match[2]
        self._dashed = b"--" + self._boundary.encode()
        self._delimiter = b"\r\n" + self._dashed
        # As if a line had ended before it, so that the first delimiter is like the others.
        self._buffer = bytearray(b"\r\n")
        self._at = -2  # where in the body the buffer begins
        self._step = self._begin
        self._fields: list[Field] = []
        self._files: list[File] = []
        self._value = bytearray()
        self._name = ""
        self._is_file = False
        self._start = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes; raises InvalidRequest where they are no part of a plain form."""
        self._buffer += chunk
        while self._step():
            pass

    def end(self) -> Form:
        """The form, when all of it has come; raises InvalidRequest where it breaks off."""
        if self._step != self._over:
            raise _not_plain("it breaks off")
        return Form(self._content_type, self._boundary, tuple(self._fields), tuple(self._files))

    # Each step returns whether there may be more to do with the bytes that are there.

    def _begin(self) -> bool:
        if len(self._buffer) < len(self._delimiter):
            return False
        if not self._buffer.startswith(self._delimiter):
            raise _not_plain("something stands before its first part")
        self._drop(len(self._delimiter))
        self._step = self._after_delimiter
        return True

    def _after_delimiter(self) -> bool:
        if len(self._buffer) < 2:
            return False
        following = bytes(self._buffer[:2])
        if following not in (b"\r\n", b"--"):
            raise _not_plain("its boundary stands where no part ends")
        self._drop(2)
        self._step = self._head if following == b"\r\n" else self._over
        return True

    def _head(self) -> bool:
        length = self._buffer.find(b"\r\n\r\n")
        if length > _HEAD_BYTES_MAX or (length < 0 and len(self._buffer) > _HEAD_BYTES_MAX):
            raise _not_plain("a part's head is too long")
        if length < 0:
            return False
        if len(self._fields) + len(self._files) >= _PARTS_MAX:
            raise _not_plain(f"it has more than {_PARTS_MAX} parts")
        self._name, self._is_file = _read_head(bytes(self._buffer[:length]))
        self._drop(length + 4)
        self._start = self._at
        self._value.clear()
        self._step = self._content
        return True

    def _content(self) -> bool:
        dashes = self._buffer.find(self._dashed)
        # There are readers that take it for a delimiter at the beginning of a part too, or after half a line end.
        if dashes >= 0 and not self._buffer.startswith(self._delimiter, max(0, dashes - 2)):
            raise _not_plain("its boundary stands where no part ends")
        place = max(-1, dashes - 2)
        # What may be the beginning of a delimiter stays until more has come.
        length = place if place >= 0 else max(0, len(self._buffer) - len(self._delimiter) + 1)
        if not self._is_file:
            self._value += self._buffer[:length]
            if len(self._value) + sum(len(field.value) for field in self._fields) > _FIELDS_BYTES_MAX:
                raise _not_plain(f"its fields have more than {_FIELDS_BYTES_MAX} bytes")
        self._drop(length)
        if place < 0:
            return False
        self._take_part()
        self._drop(len(self._delimiter))
        self._step = self._after_delimiter
        return True

    def _over(self) -> bool:
        if bytes(self._buffer) not in (b"", b"\r", b"\r\n"):
            raise _not_plain("something follows its last part")
        return False

    def _take_part(self) -> None:
        if self._is_file:
            self._files.append(File(self._name, self._at - self._start))
            return
        # Only of a name that says so there may be several.
        if not self._name.endswith("[]") and any(field.name == self._name for field in self._fields):
            raise InvalidRequest(f'The field "{self._name}" comes twice.', param=self._name)
        try:
            value = self._value.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(f'The field "{self._name}" is not valid UTF-8.', param=self._name) from None
        self._fields.append(Field(self._name, value, self._start, self._at))

    def _drop(self, length: int) -> None:
        del self._buffer[:length]
        self._at += length


def _read_head(head: bytes) -> tuple[str, bool]:
    """The name in a part's head, and whether the part is a file."""
    if _ENDS_A_LINE.search(head):
        raise _not_plain("a part has a head that is not understood")
    fields: dict[str, str] = {}
    for line in head.decode("utf-8", "replace").split("\r\n"):
        name, _, value = line.partition(":")
        if name.lower() not in _HEADS or name.lower() in fields:
            raise _not_plain("a part has a head that is not understood")
        fields[name.lower()] = value.strip(" \t")
    named = _NAMED.fullmatch(fields.get("content-disposition", ""))
    if named is None:
        raise _not_plain("a part has no plain name")
    if fields.get("content-transfer-encoding", "binary").lower() not in _PLAIN:
        raise _not_plain("a part is encoded")
    is_file, kind = named[3] is not None, fields.get("content-type", "").lower()
    if "charset" in kind and "utf-8" not in kind and not is_file:
        raise _not_plain("a field is not in UTF-8")
    return named[1] or named[2], is_file


def _not_plain(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The form can't be read: {reason}.", code="invalid_form")
