"""`${…}` in values: what it stands for, and that what came from outside stays hidden."""

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


def sources() -> Interpolator:
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
def test_a_reference_stands_for_its_value(written, read):
    """The environment, a default, or a file without the line end after it."""
    found = sources().interpolate(written)
    assert (found.text, found.is_interpolated, found.wrong) == (read, True, ())


@pytest.mark.parametrize(
    ("written", "read"),
    [("$${NAME}", "${NAME}"), ("5 $", "5 $"), ("$NAME", "$NAME"), ("$$", "$$"), ("{NAME}", "{NAME}")],
)
def test_what_is_no_reference_stays_as_it_is(written, read):
    """A dollar sign alone means itself; the two signs together are written with one more."""
    found = sources().interpolate(written)
    assert (found.text, found.is_interpolated, found.wrong) == (read, False, ())


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("${UNSET}", "UNSET is not set in the environment; set it, or write ${UNSET:-default}"),
        ("${NAME", "a ${ has no } of its own; write ${NAME}, or $${ where you mean the signs themselves"),
        ("${UNSET:-${NAME}}", "a ${ has no } of its own; write ${NAME}, or $${ where you mean the signs themselves"),
        ("${}", "this ${…} names nothing; write ${NAME}, ${NAME:-default} or ${file:/path}"),
        ("${sk-pasted-here}", "this ${…} names nothing; write ${NAME}, ${NAME:-default} or ${file:/path}"),
        ("${NAME-x}", "this ${…} names nothing; write ${NAME}, ${NAME:-default} or ${file:/path}"),
        ("${file:key}", '"key" is no whole path; write one from the root, as in ${file:/run/secrets/name}'),
        (
            "${file:/nowhere}",
            'the file "/nowhere" can\'t be read (No such file or directory); check its name and who may read it',
        ),
        ("${file:/a\0b}", 'the file "/a\0b" can\'t be read (no such name); check its name and who may read it'),
        ("${file:/run/secrets/picture}", 'the file "/run/secrets/picture" is not UTF-8 text; save it as text'),
        (
            "${file:/run/secrets/film}",
            'the file "/run/secrets/film" is larger than 65536 bytes; name one with a single value',
        ),
    ],
)
def test_a_reference_to_nothing_is_a_mistake(written, sentence):
    """Nothing is put in silently, and what was pasted between the braces is not repeated."""
    found = sources().interpolate(written)
    assert found.wrong == (sentence,)
    assert found.text.startswith("${")


def test_every_wrong_reference_of_a_value_is_named():
    """One report, not one mistake after the other."""
    assert len(sources().interpolate("${A}${NAME}${B}").wrong) == 2


def test_what_came_from_outside_is_hidden():
    """Longest first, so that no tail of a value is left; what the file itself says, and trifles, may be shown."""
    from_outside = sources()
    for written in ("${NAME}", "${LONG}", "${SHORT}", "${UNSET:-default}"):
        from_outside.interpolate(written)
    assert from_outside.redact("value, value-and-more, abc, default") == "…, …, abc, default"


def test_hiding_is_not_slowed_by_many_values():
    """A file may have a key for each of fifty thousand users, and a mistake for each."""
    many = Interpolator({f"K{number}": f"key-{number:08}" for number in range(50_000)}, read_bytes)
    for number in range(50_000):
        many.interpolate(f"${{K{number}}}")
    texts = [many.redact(f"user {number} has key-{number:08}key-00000001, twice") for number in range(1000)]
    assert texts[999] == "user 999 has ……, twice"
