"""`${…}` in values: what it is replaced with, its mistakes, and the redaction of what was put in."""

import errno

import pytest

from proxy.config.interpolation import Interpolator

FILES = {
    "/run/secrets/key": b"from-a-file\n",
    "/run/secrets/windows": b"from-windows\r\n",
    "/run/secrets/two-lines": b"one\ntwo\n\n",
    "/run/secrets/empty": b"",
    "/run/secrets/picture": b"\xff\xd8\xff",
    "/run/secrets/film": b"x" * 65_537,
}


def read_bytes(path: str) -> bytes:
    if "\0" in path:
        raise ValueError("embedded null byte")
    if path not in FILES:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")
    return FILES[path]


def interpolator() -> Interpolator:
    return Interpolator({"NAME": "value", "EMPTY": "", "LONG": "value-and-more", "SHORT": "abc"}, read_bytes)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("${NAME}", "value"),
        ("http://${NAME}:${SHORT}/v1", "http://value:abc/v1"),
        ("${NAME:-default}", "value"),
        ("${EMPTY}", ""),
        ("${EMPTY:-default}", "default"),
        ("${UNSET:-default}", "default"),
        ("${UNSET:-}", ""),
        ("${UNSET:-a:-b}", "a:-b"),
        ("${file:/run/secrets/key}", "from-a-file"),
        ("${file:/run/secrets/windows}", "from-windows"),
        ("${file:/run/secrets/two-lines}", "one\ntwo\n"),
        ("${file:/run/secrets/empty}", ""),
    ],
)
def test_an_interpolation_is_replaced_with_its_value(written, read):
    """From the environment, from the default, or from a file without the line end after it."""
    found = interpolator().interpolate(written)
    assert (found.text, found.is_interpolated, found.mistakes) == (read, True, ())


@pytest.mark.parametrize(
    ("written", "read"),
    [("$${NAME}", "${NAME}"), ("5 $", "5 $"), ("$NAME", "$NAME"), ("$$", "$$"), ("{NAME}", "{NAME}")],
)
def test_other_dollar_signs_stay_as_they_are(written, read):
    """Only `$${` changes: it is the escape for a literal `${`."""
    found = interpolator().interpolate(written)
    assert (found.text, found.is_interpolated, found.mistakes) == (read, False, ())


@pytest.mark.parametrize(
    ("written", "mistake"),
    [
        ("${UNSET}", "UNSET is not set in the environment; set it, or write ${UNSET:-default}"),
        ("${NAME", "a ${ is not closed by its own }; write ${NAME}, or $${ for a literal ${"),
        ("${UNSET:-${NAME}}", "a ${ is not closed by its own }; write ${NAME}, or $${ for a literal ${"),
        ("${}", "this ${…} is not a name; write ${NAME}, ${NAME:-default} or ${file:/path}"),
        ("${sk-pasted-here}", "this ${…} is not a name; write ${NAME}, ${NAME:-default} or ${file:/path}"),
        ("${NAME-x}", "this ${…} is not a name; write ${NAME}, ${NAME:-default} or ${file:/path}"),
        (
            "${file:key}",
            '"key" is not an absolute path; write one that begins with /, as in ${file:/run/secrets/name}',
        ),
        (
            "${file:/nowhere}",
            'the file "/nowhere" can\'t be read (No such file or directory); check its path and its permissions',
        ),
        ("${file:/a\0b}", 'the file "/a\0b" can\'t be read (not a valid path); check its path and its permissions'),
        ("${file:/run/secrets/picture}", 'the file "/run/secrets/picture" is not UTF-8 text; save it as UTF-8'),
        (
            "${file:/run/secrets/film}",
            'the file "/run/secrets/film" is larger than 65536 bytes; use a file with a single value',
        ),
    ],
)
def test_a_failed_interpolation_is_a_mistake_and_stays_as_written(written, mistake):
    """T81: it never becomes an empty text. A key that was pasted between the braces is not quoted."""
    found = interpolator().interpolate(written)
    assert found.mistakes == (mistake,)
    assert found.text.startswith("${")


def test_every_failed_interpolation_of_a_value_is_reported():
    """One report names both, so the operator need not run the check twice."""
    assert len(interpolator().interpolate("${A}${NAME}${B}").mistakes) == 2


def test_interpolated_values_are_redacted():
    """Longer values first, so no rest of one remains. Defaults from the file and short values are not redacted."""
    used = interpolator()
    for written in ("${NAME}", "${LONG}", "${SHORT}", "${UNSET:-default}"):
        used.interpolate(written)
    assert used.redact("value, value-and-more, abc, default") == "…, …, abc, default"


def test_redaction_is_fast_with_many_values():
    """T95: a file may have a key for each of 50,000 users and many mistakes."""
    many = Interpolator({f"K{number}": f"key-{number:08}" for number in range(50_000)}, read_bytes)
    for number in range(50_000):
        many.interpolate(f"${{K{number}}}")
    texts = [many.redact(f"user {number} has key-{number:08}key-00000001, twice") for number in range(1000)]
    assert texts[999] == "user 999 has ……, twice"
