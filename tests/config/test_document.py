"""YAML to plain data with places: what is read, on which line it stands, and what is refused."""

from string import printable

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import document
from proxy.config.document import DEPTH_MAX, NODES_MAX, Diagnostic, Document, read_document
from proxy.config.interpolation import Interpolator

ENVIRON = {"KEY": "from-outside", "NUMBER": "0123"}


def no_files(path: str) -> bytes:
    raise FileNotFoundError(path)


def read(source: str | bytes, **environ: str) -> Document:
    source = source if isinstance(source, bytes) else source.encode()
    return read_document(source, "f.yaml", Interpolator(ENVIRON | environ, no_files))


def data(source: str | bytes) -> object:
    found = read(source)
    assert found.mistakes == ()
    return found.data


def mistakes(source: str | bytes) -> list[tuple[int, str]]:
    return [(mistake.line, mistake.text) for mistake in read(source).mistakes]


def test_a_mistake_reads_like_a_compilers():
    """file:line: text, which editors jump to."""
    assert str(Diagnostic("quotas.yaml", 7, "no; write yes")) == "quotas.yaml:7: no; write yes"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("text", "text"),
        ("two words", "two words"),
        ("'no'", "no"),
        ('"010"', "010"),
        ("''", ""),
        ("5", 5),
        ("-5", -5),
        ("0", 0),
        ("999999999999999999", 999999999999999999),
        ("9999999999999999999", "9999999999999999999"),
        ("200_000", "200_000"),
        ("200k", "200k"),
        ("+5", "+5"),
        ("1.5", "1.5"),
        ("1e3", "1e3"),
        ("2026-11-24", "2026-11-24"),
        ("127.0.0.1:8080", "127.0.0.1:8080"),
        ("true", True),
        ("False", False),
        ("", None),
        ("~", None),
        ("null", None),
        ("[a, 1]", ["a", 1]),
        ("{b: c}", {"b": "c"}),
        ("|\n  one\n  two\n", "one\ntwo\n"),
    ],
)
def test_values_mean_what_they_look_like(written, value):
    """Whole numbers as they are usually written, true, false, null; everything else is text as it stands."""
    assert data(f"a: {written}") == {"a": value}


def test_keys_are_text():
    """A user called 1001 or 4.10 is called that, not 1001 or 4.1."""
    assert data("1001: a\n4.10: b\n1_000: c\n") == {"1001": "a", "4.10": "b", "1_000": "c"}


KEY = 'this key is no name; write a word, in quotes if it is one like "null" or "true"'
WORD = "means true or false to some readers; write true or false, or "


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("a: 1\nb: no", [(2, f'"no" {WORD}"no" in quotes for the word')]),
        ("a: [x,\n  Yes]", [(2, f'"Yes" {WORD}"Yes" in quotes for the word')]),
        ("on: 1", [(1, f'"on" {WORD}"on" in quotes for the word')]),
        ("a: 12:30", [(1, '"12:30" is a number in sixties to some readers; write it in quotes')]),
        ("a: 1:30:00.5", [(1, '"1:30:00.5" is a number in sixties to some readers; write it in quotes')]),
        (
            "a: 010",
            [(1, '"010" is not counted in tens by all readers; write it without the 0 in front, or in quotes')],
        ),
        (
            "a: 0o7",
            [(1, '"0o7" is not counted in tens by all readers; write it without the 0 in front, or in quotes')],
        ),
        (
            "a: 0x1F",
            [(1, '"0x1F" is not counted in tens by all readers; write it without the 0 in front, or in quotes')],
        ),
        (
            "a: 0b11",
            [(1, '"0b11" is not counted in tens by all readers; write it without the 0 in front, or in quotes')],
        ),
        ("b: &b {c: d}\na:\n  <<: *b", [(3, "merge keys (<<) are not read; write the keys out")]),
        ("a: !!int '5'", [(1, "tags (!…) are not read; leave it out")]),
        ("a: !!python/object:os.system x", [(1, "tags (!…) are not read; leave it out")]),
        ("a: !!set {b}", [(1, "tags (!…) are not read; leave it out")]),
        ("a: 1\nb: 2\na: 3", [(3, '"a" is already there on line 1; merge the two')]),
        ("a: {b: 1, 'b': 2}", [(1, '"b" is already there on line 1; merge the two')]),
        ("true: 1", [(1, KEY)]),
        ("null: 1\n'': 2", [(1, KEY), (2, KEY)]),
        ("? [a]\n: b", [(1, KEY)]),
        (
            "a: ${NOPE}\nb: x",
            [(1, "NOPE is not set in the environment; set it, or write ${NOPE:-default}")],
        ),
    ],
)
def test_what_readers_disagree_on_is_a_mistake(source, found):
    """No guess is made where YAML 1.1 reads something else than a person does; the rest of the file is read on."""
    assert mistakes(source) == found
    assert read(source).data is not None


@pytest.mark.parametrize(
    ("source", "line", "text"),
    [
        ("", 1, "the file is empty; write at least upstreams, groups and users"),
        ("# only this\n", 1, "the file is empty; write at least upstreams, groups and users"),
        ("---\n", 1, "the file is empty; write at least upstreams, groups and users"),
        ("- a\n", 1, 'the file has to be a mapping; write lines such as "groups:" at its left'),
        ("a", 1, 'the file has to be a mapping; write lines such as "groups:" at its left'),
        ("a: 1\n---\nb: 2", 2, "a second document begins here; keep one and remove the ---"),
        ("---\n---\nb: 2", 2, "a second document begins here; keep one and remove the ---"),
        ("a:\n\tb: 1", 2, "this line is indented with a tab; write spaces"),
        (
            "a:\n  - b\n  -\tc",
            3,
            "this is not YAML (found character that cannot start any token); write spaces for the tab",
        ),
        ("a: 1\nb: \x07", 2, "there is a control character (U+0007) here; remove it"),
        ("a: 1\nb: \xe9".encode("latin-1"), 2, "this is not UTF-8; save the file as UTF-8"),
        ("a: 1".encode("utf-16"), 1, "this is not UTF-8; save the file as UTF-8"),
        ("a: 1\nb: *c", 2, "*c is used before &c is complete; write &c first"),
        ("a: &a [*a]", 1, "*a is used before &a is complete; write &a first"),
        ("*a", 1, "*a is used before &a is complete; write &a first"),
        (b"a" * 5_000_001, 1, "the file is larger than 5 MB; write a smaller one"),
        ("a: " + "[" * 100_000, 1, "this is nested deeper than 32 levels; write it flatter"),
    ],
)
def test_what_can_not_be_read_says_where_it_ends(source, line, text):
    """Bad bytes, bad YAML and what is too much give one sentence with its line, and no data."""
    assert mistakes(source) == [(line, text)]
    assert read(source).data is None


@pytest.mark.parametrize(
    ("source", "line", "advice"),
    [
        ("a: b: c", 1, "check the indentation, and put text with : # or brackets in quotes"),
        ("a: [b", 2, "check the indentation, and put text with : # or brackets in quotes"),
        ("x: 1\na: [${KEY}]", 2, "inside [ ] and { } put ${…} in quotes"),
        ("a: %b", 1, "check the indentation, and put text with : # or brackets in quotes"),
    ],
)
def test_bad_yaml_is_explained_by_what_its_line_shows(source, line, advice):
    """The parser's own reason, with the likeliest remedy after it."""
    [(found_line, text)] = mistakes(source)
    assert found_line == line
    assert text.startswith("this is not YAML (") and text.endswith(f"); {advice}")


def test_mistakes_before_the_end_are_kept():
    """A trap on line 1 is not forgotten because line 2 can't be read."""
    assert [line for line, _ in mistakes("a: no\nb: c: d")] == [1, 2]


def test_a_byte_order_mark_is_no_mistake():
    """Editors on Windows write one."""
    assert data(b"\xef\xbb\xbfa: 1") == {"a": 1}


def test_tabs_that_do_no_harm_may_stay():
    """After text, before a comment."""
    assert data("a:\n  b: c\t# why\n") == {"a": {"b": "c"}}


def test_every_value_has_its_line():
    """Of a key the line of the key, of an item its own; of what is missing the nearest thing around it."""
    found = read("a:\n  b:\n    - x\n    - y: 1\n      z: 2\nc: {d: 3}\n")
    assert found.line(()) == 1
    assert found.line(("a",)) == 1
    assert found.line(("a", "b")) == 2
    assert found.line(("a", "b", 0)) == 3
    assert found.line(("a", "b", 1, "z")) == 5
    assert found.line(("c", "d")) == 6
    assert found.line(("c", "nothing", "below")) == 6
    assert found.line(("a", "b", 9)) == 2
    assert found.line(("a", "b", "word")) == 2
    assert found.line(("a", 0)) == 1


def test_aliases_stand_for_what_they_name():
    """Also as a key, and with the line of what they name."""
    found = read("keys: &k\n  - a\nmine: *k\n? &name who\n: 1\nyours: {*name : 2}\n")
    assert found.mistakes == ()
    assert found.data == {"keys": ["a"], "mine": ["a"], "who": 1, "yours": {"who": 2}}
    assert (found.line(("mine",)), found.line(("mine", 0))) == (3, 2)


def test_a_bomb_of_aliases_does_not_go_off():
    """Ten of ten of ten …: counted as often as it is used, and refused while it is small."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert mistakes("\n".join(lines)) == [
        (6, f"there are more than {NODES_MAX:,} values, aliases written out; write fewer")
    ]


def test_a_ladder_of_aliases_is_nested_as_deep_as_it_is_written_out():
    """Each rung is shallow; together they would be too deep for whoever walks them."""
    rungs = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 60)]
    [(line, text)] = mistakes("\n".join(rungs))
    assert text == f"aliases nest this deeper than {DEPTH_MAX} levels; write it flatter"
    assert line <= DEPTH_MAX


def test_the_deepest_that_is_read_has_no_alias():
    """One level less than what is refused."""
    assert mistakes("a: " + "[" * (DEPTH_MAX - 2) + "]" * (DEPTH_MAX - 2)) == []


def test_references_are_put_in_after_parsing():
    """A value can't change the file's structure, and is always text."""
    found = read("a: ${KEY}\nb: ${NUMBER}\nc: '${OTHER}'\nd: $${KEY}\n", OTHER="x: {y: z}")
    assert found.data == {"a": "from-outside", "b": "0123", "c": "x: {y: z}", "d": "${KEY}"}
    assert [found.is_interpolated((key,)) for key in "abcd"] == [True, True, True, False]


def test_keys_have_no_references():
    """A name is what stands there."""
    assert data("${KEY}: 1") == {"${KEY}": 1}


def test_what_was_put_in_never_shows():
    """Also not when a sentence about it would quote it; line ends and control signs don't show either."""
    found = read("a: ${KEY}\nb: ${TWO}\n", TWO="line\nline")
    assert (
        found.mistake(("b",), 'the value "from-outside" or "line\nline" is bad\n').text
        == 'the value "…" or "…" is bad?'
    )


def test_a_sentence_has_an_end():
    """A key of five megabytes is not printed whole."""
    assert len(read("a: 1").mistake((), "x" * 1_000_000).text) == 501


def test_a_place_with_a_mistake_is_known():
    """So that nobody reports the same thing twice."""
    found = read("a: no\nb: 1\nc: ${NOPE}")
    assert [found.is_bad((key,)) for key in "abc"] == [True, False, True]


def test_all_single_values_can_be_walked():
    """Each with its place."""
    found = read("a: {b: [x, 1]}\nc: null")
    assert list(found.scalars()) == [(("a", "b", 0), "x"), (("a", "b", 1), 1), (("c",), None)]


_PIECES = [*"abn:,-[]{}&*!|>'\"#%@`?$ \n\t0127.", "no", "${", "}", "- ", ": ", "<<"]
YAMLISH = st.lists(st.sampled_from(_PIECES)).map("".join)


@pytest.mark.parametrize("parser", [yaml.SafeLoader, document._PARSER])
@given(text=YAMLISH | st.text() | st.text(alphabet=printable))
def test_any_text_is_read_or_refused(parser, text):
    """Never another exception, with the parser in C and with the one in Python."""
    before, document._PARSER = document._PARSER, parser
    try:
        found = read(text)
    finally:
        document._PARSER = before
    assert found.data is not None or found.mistakes
    assert all(1 <= mistake.line <= text.count("\n") + len(text) + 1 for mistake in found.mistakes)


@given(st.binary())
def test_any_bytes_are_read_or_refused(source):
    """A file may be anything."""
    found = read(source)
    assert found.data is not None or found.mistakes
