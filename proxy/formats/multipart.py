"""Read a form (`multipart/form-data`) while it is spooled: its fields, the sizes of its files, and where values are.

The form is read piece by piece, and the content of its files is not kept. The proxy forwards the original bytes, so a
form must mean the same to every parser. A form that two parsers could read differently is refused: with bytes before
its first part, with a boundary inside a part, with a field that appears twice, with an encoded value.
Sources: RFC 7578; RFC 2046 §5.1 for the delimiters. Pure.
"""

import re
from dataclasses import dataclass

from proxy.errors import InvalidRequest, UnsupportedEncoding

# All fields together. The longest that OpenAI accepts is a prompt of 32,000 characters.
_FIELDS_BYTES_MAX = 2**20
_PARTS_MAX = 256
_HEADER_BYTES_MAX = 4096
# The characters of a boundary are those of RFC 2046 §5.1.1, except blanks. A second parameter is refused, because
# parsers choose differently between two boundaries.
_CONTENT_TYPE = re.compile(
    r'multipart/form-data[ \t]*;[ \t]*boundary=(?:"([0-9A-Za-z\'()+_,./:=?-]{1,70})"|([0-9A-Za-z\'+_.-]{1,70}))',
    re.IGNORECASE,
)
# After the name of the field comes only the file's name, in one or both notations (`filename`, `filename*`). A second
# `name` is refused, because some parsers take the last.
_FILENAME = r' *; *filename\*?=(?:"(?:[^"\\]|\\.)*"|[^";\s]*)'
# The name may lack quotes, as .NET writes it.
_DISPOSITION = re.compile(
    rf'form-data; *name=(?:"([^"\\\r\n]{{1,200}})"|([\w.\[\]-]{{1,200}}))((?:{_FILENAME}){{1,2}})?',
    re.IGNORECASE | re.ASCII,
)
# In the headers of a part: many parsers end a line here as well.
_BARE_LINE_END = re.compile(rb"\r(?!\n)|(?<!\r)\n|\0")
_HEADERS = ("content-disposition", "content-type", "content-length", "content-transfer-encoding")
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
    """A complete form. `content_type` is the header that it came with and is forwarded with."""

    content_type: str
    boundary: str
    fields: tuple[Field, ...]
    files: tuple[File, ...]

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
        self._content_type = content_type.strip()
        self._boundary = match[1] or match[2]
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
        self._is_file = False
        self._start = 0

    def feed(self, chunk: bytes) -> None:
        """Parse the next bytes. Raises InvalidRequest if they make the form invalid or ambiguous."""
        self._buffer += chunk
        while self._step():
            pass

    def end(self) -> Form:
        """Return the form after its last bytes. Raises InvalidRequest if it is incomplete."""
        if self._step != self._end:
            raise _unreadable("it ends before its last boundary")
        return Form(self._content_type, self._boundary, tuple(self._fields), tuple(self._files))

    # Each step returns whether the next step may be able to go on with the bytes in the buffer.

    def _begin(self) -> bool:
        if len(self._buffer) < len(self._delimiter):
            return False
        if not self._buffer.startswith(self._delimiter):
            raise _unreadable("there are bytes before its first part")
        self._drop(len(self._delimiter))
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
        self._name, self._is_file = _read_headers(bytes(self._buffer[:length]))
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
        self._fields.append(Field(self._name, value, self._start, self._offset))

    def _drop(self, length: int) -> None:
        del self._buffer[:length]
        self._offset += length


def _read_headers(headers: bytes) -> tuple[str, bool]:
    """The name in the headers of a part, and whether the part is a file."""
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
    is_file, kind = disposition[3] is not None, fields.get("content-type", "").lower()
    if "charset" in kind and "utf-8" not in kind and not is_file:
        raise _unreadable("a field is not in UTF-8")
    return disposition[1] or disposition[2], is_file


def _unreadable(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The form can't be read: {reason}.", code="invalid_form")
