"""A form is read while it is spooled, and a form that two parsers could read differently is refused.

RFC 7578, RFC 2046 §5.1; threats T27, T28.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import InvalidRequest, UnsupportedEncoding
from proxy.formats.multipart import Field, File, Form, FormReader

PLAIN = "multipart/form-data; boundary=xYz"


def part(name: str, content: bytes = b"v", more: str = "", *, is_file: bool = False) -> bytes:
    """One part, with the delimiter before it."""
    filename = '; filename="f"' if is_file else ""
    return (
        f'--xYz\r\nContent-Disposition: form-data; name="{name}"{filename}{more}\r\n\r\n'.encode() + content + b"\r\n"
    )


def form(*parts: bytes) -> bytes:
    """A complete form of these parts."""
    return b"".join(parts) + b"--xYz--\r\n"


def read(body: bytes, content_type: str = PLAIN, *, step: int = 2**16) -> Form:
    """The form in a body that arrives in chunks of `step` bytes."""
    reader = FormReader(content_type)
    for start in range(0, len(body), step):
        reader.feed(body[start : start + step])
    return reader.end()


def refused(body: bytes, content_type: str = PLAIN) -> str:
    """The message with which a body is refused, which is the same for one chunk and for single bytes."""
    with pytest.raises(InvalidRequest) as whole:
        read(body, content_type)
    with pytest.raises(InvalidRequest) as pieces:
        read(body, content_type, step=1)
    assert whole.value.message == pieces.value.message
    return whole.value.message


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_a_form_is_the_same_in_chunks_of_any_size(step: int) -> None:
    """The position of each value is found, and the size of each file."""
    tricky = b"\r\n--xY\r\n--\r\n\r\n--xY z"
    body = form(part("file", tricky, is_file=True), part("model", b"m\r\n-"), part("file[]", b"", is_file=True))
    found = read(body, step=step)
    assert found.files == (File("file", len(tricky)), File("file[]", 0))
    (field,) = found.fields
    assert (field.name, field.value) == ("model", "m\r\n-")
    assert body[field.start : field.end] == b"m\r\n-"
    assert found.field("model") == field
    assert found.field("n") is None
    assert (found.content_type, found.boundary) == (PLAIN, "xYz")


@given(
    parts=st.lists(st.tuples(st.sampled_from(["a[]", "b[]"]), st.binary(max_size=60), st.booleans()), max_size=6),
    step=st.integers(1, 80),
)
def test_parts_with_any_bytes_are_found(parts: list[tuple[str, bytes, bool]], step: int) -> None:
    """Any bytes except the boundary."""
    contents = [(name, content if is_file else content.hex().encode(), is_file) for name, content, is_file in parts]
    body = form(*(part(name, content, is_file=is_file) for name, content, is_file in contents))
    if not parts:
        return
    found = read(body, step=step)
    assert [file.size for file in found.files] == [len(content) for _, content, is_file in contents if is_file]
    values = [content.decode() for _, content, is_file in contents if not is_file]
    assert [field.value for field in found.fields] == values
    assert [body[field.start : field.end].decode() for field in found.fields] == values


@pytest.mark.parametrize(
    "content_type",
    [
        PLAIN,
        f"  {PLAIN}  ",
        "Multipart/Form-Data;boundary=xYz",
        'multipart/form-data; Boundary="xYz"',
        "multipart/form-data; charset=ISO-8859-1; boundary=xYz",
        "multipart/form-data; boundary=xYz; charset=UTF-8",
        'multipart/form-data;charset="utf-8";boundary=xYz',
    ],
)
def test_a_boundary_may_be_quoted(content_type: str) -> None:
    """The header is forwarded as it came."""
    found = read(form(part("a")), content_type)
    assert (found.boundary, found.content_type) == ("xYz", content_type.strip())


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "application/json",
        "multipart/form-data",
        "multipart/mixed; boundary=xYz",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=x y",
        "multipart/form-data; boundary=a; boundary=b",
        "multipart/form-data; charset=utf-16; boundary=xYz",
        "multipart/form-data; boundary=xYz; charset=utf-7",
        "multipart/form-data; charset=utf-8; boundary=a; boundary=b",
        "multipart/form-data; boundary=xYz; type=x",
        "multipart/form-data; boundary=" + "-" * 71,
        "multipart/form-data; boundary=x\r\ny",
    ],
)
def test_a_content_type_other_than_a_form_with_one_boundary_is_a_415(content_type: str) -> None:
    """With two boundaries, two parsers would see two forms."""
    with pytest.raises(UnsupportedEncoding):
        FormReader(content_type)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "ends before its last boundary"),
        (b"--xYz", "ends before its last boundary"),
        (part("a"), "ends before its last boundary"),
        (part("a") + b"--xYz-", "ends before its last boundary"),
        (b"Hello\r\n" + form(part("a")), "before its first part"),
        (b"\r\n\r\n" + form(part("a")), "before its first part"),
        (b"\n" + form(part("a")), "before its first part"),
        (form(part("a")) + b"more", "after its last part"),
        (part("a") + b"--xYzz\r\n", "boundary appears where no part ends"),
        (form(part("a", b"1"), part("a", b"2")), '"a" appears twice'),
        (form(part("a", b"\xff")), "not valid UTF-8"),
        (form(b"--xYz\r\n\r\n\r\nx\r\n"), "headers that are not accepted"),
        (form(b"--xYz\r\nContent-Type: text/plain\r\n\r\nx\r\n"), "has no name, or one that is not clear"),
        (
            form(b'--xYz\r\nContent-Disposition: attachment; name="a"\r\n\r\nx\r\n'),
            "has no name, or one that is not clear",
        ),
        (form(part('a"; name="b')), "has no name, or one that is not clear"),
        (form(part("a", more="; name*=utf-8''b")), "has no name, or one that is not clear"),
        (form(part("a\\")), "has no name, or one that is not clear"),
        (form(part("a", more='\r\nContent-Disposition: form-data; name="b"')), "headers that are not accepted"),
        (form(part("a", more='\r\nContent-Disposition: x; name="b"')), "headers that are not accepted"),
        (
            form(part("a", more="\r\nContent-Type: text/plain\r\ncontent-type: text/html")),
            "headers that are not accepted",
        ),
        (form(part("a", more="\u2028")), "has no name, or one that is not clear"),
        (form(part("a", more="\r\nContent-Transfer-Encoding: base64")), "transfer encoding"),
        (form(part("a", more="\r\nContent-Type: text/plain; charset=utf-7")), "not in UTF-8"),
        (form(part("a", more="\r\nContent-Type: text/plain; charset=utf-7; x=utf-8")), "not in UTF-8"),
        (form(part("a", more="\r\nContent-Type: text/plain; charset=utf-8; charset=utf-16")), "not in UTF-8"),
        (form(part("a", more="\r\nContent-Type: text/plain; x-charset=utf-8")), "not in UTF-8"),
        (form(part("a", b"\xc3\xa4", more="\r\nContent-Type: text/plain; charset=latin1")), "other characters than"),
        (form(part("_charset_", b"utf-16")), "not in UTF-8"),
        (form(part("a", more="\r\nX-Other: 1")), "headers that are not accepted"),
        (form(part("a", more="\r\n folded")), "headers that are not accepted"),
        (form(part("a", more="\r\nContent-Type: " + "x" * 5000)), "too long"),
        (form(*[part("a[]")] * 257), "more than 256 parts"),
        # Go's parser accepts a delimiter at the very beginning of a part, and Werkzeug's one after a bare LF or CR.
        (form(part("f", part("model", b"other")[:-2], is_file=True)), "boundary appears where no part ends"),
        (form(part("f", b"x\n" + part("model", b"other")[:-2], is_file=True)), "boundary appears where no part ends"),
        (form(part("f", b"x\r--xYz--", is_file=True)), "boundary appears where no part ends"),
        (form(part("a", b"--xYz")), "boundary appears where no part ends"),
        # Of two names some parsers take the last, and for many a bare LF ends a line.
        (form(part("f", more='; name="model"', is_file=True)), "has no name, or one that is not clear"),
        (form(part("f", more="; x=y", is_file=True)), "has no name, or one that is not clear"),
        (
            form(part("f", more="\r\nContent-Type: a\nContent-Disposition: b", is_file=True)),
            "headers that are not accepted",
        ),
        (
            form(part("f", more="\r\nContent-Type: a\rContent-Disposition: b", is_file=True)),
            "headers that are not accepted",
        ),
        (form(part("f", more="\r\nContent-Type: a\0", is_file=True)), "headers that are not accepted"),
    ],
)
def test_an_incomplete_or_ambiguous_form_is_refused(body: bytes, says: str) -> None:
    """In one chunk and byte by byte."""
    assert says in refused(body)


def test_headers_of_a_part_that_never_end_are_refused() -> None:
    """Before they fill the memory."""
    with pytest.raises(InvalidRequest, match="too long"):
        FormReader(PLAIN).feed(b"--xYz\r\n" + b"x" * 5000)


def test_fields_are_limited_to_a_megabyte_and_files_are_not() -> None:
    """Only the values of fields are kept in memory."""
    long = b"x" * 600_000
    assert read(form(part("f", long, is_file=True), part("g", long, is_file=True))).files[1] == File("g", 600_000)
    with pytest.raises(InvalidRequest, match="more than"):
        read(form(part("a", long), part("b", long)))


def test_headers_that_change_nothing_are_accepted() -> None:
    """The SDKs and curl send them."""
    more = "\r\nContent-Type: text/plain; charset=UTF-8\r\ncontent-transfer-encoding: 8bit\r\nContent-Length: 1"
    body = form(part("a", more=more), part("b", more="\r\nContent-Type: audio/x; charset=latin-1", is_file=True))
    found = read(body)
    assert found.fields == (Field("a", "v", body.index(b"v\r\n"), body.index(b"v\r\n") + 1),)
    assert found.files == (File("b", 1),)


def test_a_boundary_of_dashes_is_parsed_in_linear_time() -> None:
    """Such a form blocked a server (CVE-2024-8984)."""
    dashes = "-" * 70
    body = (
        f'--{dashes}\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n'.encode() + b"\r\n-" * 200_000
    )
    reader = FormReader(f"multipart/form-data; boundary={dashes}")
    for start in range(0, len(body), 1000):
        reader.feed(body[start : start + 1000])
    reader.feed(f"\r\n--{dashes}--".encode())
    assert reader.end().files == (File("f", 600_000),)


@pytest.mark.parametrize(
    "filename",
    [
        '; filename="a;b.mp3"',
        '; filename="a\\"b.mp3"',
        '; filename="C:\\sounds\\x.mp3"',
        "; filename=a.mp3",
        "; filename=\"a.mp3\"; filename*=UTF-8''%e4.mp3",
        "; filename*=utf-8''%e4.mp3",
        '; filename=""',
        '; filename="Grüße.mp3"',
    ],
)
def test_the_file_names_of_all_clients_are_accepted(filename: str) -> None:
    """With quotes and semicolons, and in both notations."""
    assert read(form(part("f", more=filename))).files == (File("f", 1),)


# What Java's clients write, except for the boundary: the content type, and a form with the model and a file of three
# bytes.
_SPRING = (
    "multipart/form-data;charset=UTF-8;boundary=xYz",
    b'--xYz\r\nContent-Disposition: form-data; name="model"\r\nContent-Type: text/plain;charset=UTF-8\r\n'
    b"Content-Length: 9\r\n\r\nwhisper-1\r\n"
    b'--xYz\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\nContent-Type: audio/mpeg\r\n'
    b"Content-Length: 3\r\n\r\nabc\r\n--xYz--\r\n",
)
OF_JAVA: dict[str, tuple[str, bytes]] = {
    "Apache HttpClient 4, strict, with a charset": (
        "multipart/form-data; boundary=xYz; charset=UTF-8",
        b'--xYz\r\nContent-Disposition: form-data; name="model"\r\n'
        b"Content-Type: text/plain; charset=ISO-8859-1\r\nContent-Transfer-Encoding: 8bit\r\n\r\nwhisper-1\r\n"
        b'--xYz\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\n'
        b"Content-Type: application/octet-stream\r\nContent-Transfer-Encoding: binary\r\n\r\nabc\r\n--xYz--\r\n",
    ),
    "Apache HttpClient 4, compatible with browsers": (
        "multipart/form-data; boundary=xYz",
        b'--xYz\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
        b'--xYz\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\n'
        b"Content-Type: audio/mpeg\r\n\r\nabc\r\n--xYz--\r\n",
    ),
    "Apache HttpClient 5": (
        "multipart/form-data; charset=ISO-8859-1; boundary=xYz",
        b'--xYz\r\nContent-Disposition: form-data; name="model"\r\n'
        b"Content-Type: text/plain; charset=ISO-8859-1\r\n\r\nwhisper-1\r\n"
        b'--xYz\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"; filename*=UTF-8\'\'a.mp3\r\n'
        b"Content-Type: audio/mpeg\r\n\r\nabc\r\n--xYz--\r\n",
    ),
    "OkHttp": (
        "multipart/form-data; boundary=xYz",
        b'--xYz\r\nContent-Disposition: form-data; name="model"\r\nContent-Length: 9\r\n\r\nwhisper-1\r\n'
        b'--xYz\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\nContent-Type: audio/mpeg\r\n'
        b"Content-Length: 3\r\n\r\nabc\r\n--xYz--\r\n",
    ),
    "Retrofit": (
        "multipart/form-data; boundary=xYz",
        b'--xYz\r\nContent-Disposition: form-data; name="model"\r\nContent-Transfer-Encoding: binary\r\n'
        b"Content-Type: text/plain; charset=UTF-8\r\nContent-Length: 9\r\n\r\nwhisper-1\r\n"
        b'--xYz\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\n'
        b"Content-Transfer-Encoding: binary\r\nContent-Type: audio/mpeg\r\nContent-Length: 3\r\n\r\nabc\r\n"
        b"--xYz--\r\n",
    ),
    "Spring RestTemplate": _SPRING,
    "Spring 4 RestTemplate": (
        "multipart/form-data;boundary=xYz",
        _SPRING[1].replace(b"text/plain;charset=UTF-8", b"text/plain;charset=ISO-8859-1"),
    ),
    "Spring WebClient": (
        "multipart/form-data;boundary=xYz",
        b"--xYz\r\nContent-Type: text/plain;charset=UTF-8\r\n"
        b'Content-Disposition: form-data; name="model"\r\nContent-Length: 9\r\n\r\nwhisper-1\r\n'
        b'--xYz\r\nContent-Type: audio/mpeg\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\n'
        b"Content-Length: 3\r\n\r\nabc\r\n--xYz--\r\n",
    ),
    "Netty, Vert.x": (
        "multipart/form-data; boundary=xYz",
        b'--xYz\r\ncontent-disposition: form-data; name="model"\r\ncontent-length: 9\r\n'
        b"content-type: text/plain; charset=UTF-8\r\n\r\nwhisper-1\r\n"
        b'--xYz\r\ncontent-disposition: form-data; name="file"; filename="a.mp3"\r\ncontent-length: 3\r\n'
        b"content-type: audio/mpeg\r\ncontent-transfer-encoding: binary\r\n\r\nabc\r\n--xYz--\r\n",
    ),
    "Jersey": (
        "multipart/form-data;boundary=xYz",
        b'--xYz\r\nContent-Type: text/plain\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
        b'--xYz\r\nContent-Type: audio/mpeg\r\nContent-Disposition: form-data; filename="a.mp3"; '
        b'modification-date="Thu, 01 Jan 2026 00:00:00 GMT"; size=3; name="file"\r\n\r\nabc\r\n--xYz--\r\n',
    ),
    "CXF": (
        'multipart/form-data; boundary="xYz"',
        b"--xYz\r\nContent-Type: text/plain\r\nContent-Transfer-Encoding: binary\r\nContent-ID: <model>\r\n"
        b'Content-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
        b"--xYz\r\nContent-Type: audio/mpeg\r\nContent-Transfer-Encoding: binary\r\nContent-ID: <file>\r\n"
        b"Content-Disposition: form-data;name=file;filename=a.mp3\r\n\r\nabc\r\n--xYz--",
    ),
    "java.net.http, with a publisher by hand": (
        "multipart/form-data; boundary=xYz",
        b'\r\n--xYz\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
        b'--xYz\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\n'
        b"Content-Type: audio/mpeg\r\n\r\nabc\r\n--xYz--",
    ),
}


@pytest.mark.parametrize("client", OF_JAVA)
@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_the_forms_of_java_s_clients_are_read(client: str, step: int) -> None:
    """A charset beside the boundary and in the parts, parameters in another order, and an empty line at the start."""
    content_type, body = OF_JAVA[client]
    found = read(body, content_type, step=step)
    assert found.files == (File("file", 3),)
    (field,) = found.fields
    assert (field.name, field.value, body[field.start : field.end]) == ("model", "whisper-1", b"whisper-1")
    assert found.content_type == content_type
    assert body[found.start :].startswith(b"--xYz\r\n")


def test_text_in_a_charset_other_than_utf_8_must_be_ascii() -> None:
    """Some parsers obey the charset of the form or of the part, and others read UTF-8."""
    latin = "\r\nContent-Type: text/plain; charset=ISO-8859-1"
    content_type = "multipart/form-data; charset=ISO-8859-1; boundary=xYz"
    assert read(form(part("a", b"ok", latin))).fields[0].value == "ok"
    assert read(form(part("a", b"ok")), content_type).fields[0].value == "ok"
    assert read(form(part("a", "Gr\u00fc\u00dfe".encode()))).fields[0].value == "Gr\u00fc\u00dfe"
    for body, header in ((form(part("a", b"\xc3\xa4", latin)), PLAIN), (form(part("a", b"\xc3\xa4")), content_type)):
        assert "other characters than ASCII" in refused(body, header)
    assert read(form(part("f", b"\xff", latin, is_file=True)), content_type).files == (File("f", 1),)


@pytest.mark.parametrize(
    "disposition",
    [
        'filename="a\\"; name=\\"x"; name="file"',
        'filename="a; name=x"; name="file"',
        'name="x"; filename="a"; name="file"',
        'filename="a"; other="b"; name="file"',
        'size=1; size="; name=x"; name="file"',
        'filename="a"',
    ],
)
def test_a_file_name_before_the_name_must_be_clear(disposition: str) -> None:
    """A parser that knows no escapes, or that looks for `name=` anywhere, would find another name."""
    body = f"--xYz\r\nContent-Disposition: form-data; {disposition}\r\n\r\nv\r\n".encode()
    assert "has no name, or one that is not clear" in refused(form(body))


@pytest.mark.parametrize(
    "name",
    [b"model\xff", b"mod\xe9l", b"model\xe2\x80\x8b", b"\xef\xbb\xbfmodel", b"model\x01", b"x;name=model", b"a=b"],
)
def test_a_name_that_parsers_read_differently_is_refused(name: bytes) -> None:
    """One parser leaves out what is not UTF-8 or can't be seen, another splits at semicolons: both find `model`."""
    body = form(part("model"), b'--xYz\r\nContent-Disposition: form-data; name="%b"\r\n\r\nv\r\n' % name)
    assert "has no name, or one that is not clear" in refused(body)
    in_latin_1 = FormReader("multipart/form-data; boundary=xYz; charset=ISO-8859-1")
    with pytest.raises(InvalidRequest, match="not clear"):
        in_latin_1.feed(body)


@pytest.mark.parametrize("filename", ["", "; filename=a.mp3; filename*=utf-8''a.mp3"])
def test_names_without_quotes_are_accepted(filename: str) -> None:
    """.NET writes them so."""
    body = f"--xYz\r\nContent-Disposition: form-data; name=model{filename}\r\n\r\nv\r\n".encode()
    found = read(form(body))
    assert [each.name for each in (*found.fields, *found.files)] == ["model"]
    assert bool(found.files) == bool(filename)
    for other in ("name=", "name=a b", "name=a; name=b", 'name="a; name=b', "name='a\"; filename=b"):
        assert "has no name, or one that is not clear" in refused(form(body.replace(b"name=model", other.encode())))
