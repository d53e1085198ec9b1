"""YAML to plain data with lines: the values, their lines, and every input that is rejected."""

from string import printable

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import document
from proxy.config.document import DEPTH_MAX, NODES_MAX, Diagnostic, Document, Finding, read_document
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


def test_a_diagnostic_has_the_format_of_a_compiler():
    """Editors and terminals turn `file:line: text` into a link."""
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
def test_plain_scalars_are_integers_booleans_null_or_text(written, value):
    """T78: only the usual notation is an integer. Dates, floats, numbers with a sign or an underscore stay text."""
    assert data(f"a: {written}") == {"a": value}


def test_keys_are_text_as_written():
    """A user called 4.10 keeps that name; as a float it would become 4.1."""
    assert data("1001: a\n4.10: b\n1_000: c\n") == {"1001": "a", "4.10": "b", "1_000": "c"}


KEY = 'this key is not a name; write a word, and quote words such as "null" or "true"'
TAG = "YAML tags (!…) are not supported; remove the tag"


def alias(name: str) -> str:
    return (
        f"the alias *{name} is used before its anchor &{name} is complete; define &{name} first, or put "
        f'"*{name}" in quotes if it is a pattern'
    )


def boolean(word: str) -> str:
    return (
        f'some YAML parsers read "{word}" as true or false; '
        f'write true or false, or put "{word}" in quotes to keep the word'
    )


def base_60(number: str) -> str:
    return f'some YAML parsers read "{number}" as a base-60 number; put it in quotes'


def not_decimal(number: str) -> str:
    return (
        f'some YAML parsers do not read "{number}" as a decimal number; '
        "write it in decimal without a 0 in front, or put it in quotes"
    )


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("a: 1\nb: no", [(2, boolean("no"))]),
        ("a: [x,\n  Yes]", [(2, boolean("Yes"))]),
        ("on: 1", [(1, boolean("on"))]),
        ("a: 12:30", [(1, base_60("12:30"))]),
        ("a: 1:30:00.5", [(1, base_60("1:30:00.5"))]),
        ("a: 010", [(1, not_decimal("010"))]),
        ("a: 0o7", [(1, not_decimal("0o7"))]),
        ("a: 0x1F", [(1, not_decimal("0x1F"))]),
        ("a: 0b11", [(1, not_decimal("0b11"))]),
        ("b: &b {c: d}\na:\n  <<: *b", [(3, "merge keys (<<) are not supported; write the keys out")]),
        ("a: !!int '5'", [(1, TAG)]),
        ("a: !!python/object:os.system x", [(1, TAG)]),
        ("a: !!set {b}", [(1, TAG)]),
        ("a: 1\nb: 2\na: 3", [(3, '"a" is already on line 1; merge the two')]),
        ("a: {b: 1, 'b': 2}", [(1, '"b" is already on line 1; merge the two')]),
        ("true: 1", [(1, KEY)]),
        ("null: 1\n'': 2", [(1, KEY), (2, KEY)]),
        ("? [a]\n: b", [(1, KEY)]),
        (
            "a: ${NOPE}\nb: x",
            [(1, "NOPE is not set in the environment; set it, or write ${NOPE:-default}")],
        ),
    ],
)
def test_an_ambiguous_value_is_a_mistake_and_the_rest_is_still_read(source, found):
    """The proxy does not guess whether `no` is a word or false; the mistake says what to write instead."""
    assert mistakes(source) == found
    assert read(source).data is not None


@pytest.mark.parametrize(
    ("source", "line", "text"),
    [
        ("", 1, "the file is empty; write at least upstreams, groups and users"),
        ("# only this\n", 1, "the file is empty; write at least upstreams, groups and users"),
        ("---\n", 1, "the file is empty; write at least upstreams, groups and users"),
        ("- a\n", 1, 'the file must be a mapping; start lines such as "groups:" at the left margin'),
        ("a", 1, 'the file must be a mapping; start lines such as "groups:" at the left margin'),
        ("a: 1\n---\nb: 2", 2, "a second YAML document begins here; keep one document and remove the ---"),
        ("---\n---\nb: 2", 2, "a second YAML document begins here; keep one document and remove the ---"),
        ("a:\n\tb: 1", 2, "this line is indented with a tab; use spaces"),
        (
            "a:\n  - b\n  -\tc",
            3,
            "this is not YAML (found character that cannot start any token); replace the tab with spaces",
        ),
        ("a: 1\nb: \x07", 2, "this line has a control character (U+0007); remove it"),
        ("a: 1\nb: \xe9".encode("latin-1"), 2, "this is not UTF-8; save the file as UTF-8"),
        ("a: 1".encode("utf-16"), 1, "this is not UTF-8; save the file as UTF-8"),
        ("a: 1\nb: *c", 2, alias("c")),
        ("a: &a [*a]", 1, alias("a")),
        ("*a", 1, alias("a")),
        (b"a" * 5_000_001, 1, "the file is larger than 5 MB; make it smaller"),
        ("a: " + "[" * 100_000, 1, "this is nested deeper than 32 levels; flatten it"),
    ],
)
def test_an_unreadable_file_gives_one_mistake_and_no_data(source, line, text):
    """Invalid bytes, invalid YAML, and files above a limit of size or depth."""
    assert mistakes(source) == [(line, text)]
    assert read(source).data is None


@pytest.mark.parametrize(
    ("source", "line", "advice"),
    [
        ("a: b: c", 1, "check the indentation, and quote text that contains : # or brackets"),
        ("a: [b", 2, "check the indentation, and quote text that contains : # or brackets"),
        ("x: 1\na: [${KEY}]", 2, "inside [ ] and { }, put ${…} in quotes"),
        ("a: %b", 1, "check the indentation, and quote text that contains : # or brackets"),
        ("a: ${KEY}: b", 1, "check the indentation, and quote text that contains : # or brackets"),
        ('a: [x]\nb: "${KEY}": c', 2, "check the indentation, and quote text that contains : # or brackets"),
        ("a: b\n  c: ${KEY} # [", 2, "check the indentation, and quote text that contains : # or brackets"),
        ("a: {b: 1,\n  c: ${KEY}}", 2, "inside [ ] and { }, put ${…} in quotes"),
        ("a: ['b', ${KEY}]", 1, "inside [ ] and { }, put ${…} in quotes"),
        ("a: [*]", 1, "put a pattern that begins with * in quotes"),
        ("a: *\nb: 1", 1, "put a pattern that begins with * in quotes"),
    ],
)
def test_a_syntax_error_has_the_remedy_for_its_likeliest_cause(source, line, advice):
    """The parser's reason in parentheses, then what to change on this line."""
    [(found_line, text)] = mistakes(source)
    assert found_line == line
    assert text.startswith("this is not YAML (") and text.endswith(f"); {advice}")


NOT_YAML = (
    "this is not YAML: it begins with [name] or name = value; write name: value, and indent what is in a section"
)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ('# policy\n\n[server]\napi = "127.0.0.1:8080"\n', NOT_YAML),
        ('api = "127.0.0.1:8080"\n[groups.staff]\n', NOT_YAML),
        ("OPENAI_API_KEY=sk-1\n", NOT_YAML),
        ("export OPENAI_API_KEY=sk-1\nexport B=2\n", NOT_YAML),
        (
            "<!doctype html>\n<html></html>\n",
            "this is a page or XML, and not YAML; give the path of the file with the policy",
        ),
    ],
)
def test_a_file_in_another_format_is_named(source, text):
    """TOML, a file of variables, a page of a browser."""
    assert [found for _, found in mistakes(source)] == [text]


def test_mistakes_before_a_syntax_error_are_kept():
    """A mistake on line 1 is reported although line 2 can't be parsed."""
    assert [line for line, _ in mistakes("a: no\nb: c: d")] == [1, 2]


def test_a_byte_order_mark_is_accepted():
    """Editors on Windows write one at the beginning of a file."""
    assert data(b"\xef\xbb\xbfa: 1") == {"a": 1}


def test_a_tab_before_a_comment_is_accepted():
    """Only tabs for indentation are a mistake."""
    assert data("a:\n  b: c\t# why\n") == {"a": {"b": "c"}}


def test_every_value_has_its_line():
    """A mapping's value has the line of its key, a list's item its own; a missing one the closest enclosing line."""
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


def test_an_alias_has_the_value_and_the_lines_of_its_anchor():
    """The items below `mine: *k` have the lines on which the anchor wrote them. An alias may also be a key."""
    found = read("keys: &k\n  - a\nmine: *k\n? &name who\n: 1\nyours: {*name : 2}\n")
    assert found.mistakes == ()
    assert found.data == {"keys": ["a"], "mine": ["a"], "who": 1, "yours": {"who": 2}}
    assert (found.line(("mine",)), found.line(("mine", 0))) == (3, 2)


def test_an_alias_bomb_is_rejected_before_it_expands():
    """T78: each line has ten aliases to the line above. An alias counts in full at every use."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert mistakes("\n".join(lines)) == [
        (6, f"there are more than {NODES_MAX:,} values, each alias counted in full; use fewer")
    ]


def test_the_depth_of_a_chain_of_aliases_is_limited():
    """Each line nests one level around the line above; a recursive walk over 60 of them would go too deep."""
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 60)]
    [(line, text)] = mistakes("\n".join(lines))
    assert text == f"aliases nest this deeper than {DEPTH_MAX} levels; flatten it"
    assert line <= DEPTH_MAX


def test_the_greatest_depth_is_accepted():
    """One level less than what is rejected."""
    assert mistakes("a: " + "[" * (DEPTH_MAX - 2) + "]" * (DEPTH_MAX - 2)) == []


def test_values_are_interpolated_after_parsing():
    """An interpolated value can't change the file's structure, and is always text."""
    found = read("a: ${KEY}\nb: ${NUMBER}\nc: '${OTHER}'\nd: $${KEY}\n", OTHER="x: {y: z}")
    assert found.data == {"a": "from-outside", "b": "0123", "c": "x: {y: z}", "d": "${KEY}"}
    assert [found.is_interpolated((key,)) for key in "abcd"] == [True, True, True, False]


def test_keys_are_not_interpolated():
    """A name in the file is the name in force."""
    assert data("${KEY}: 1") == {"${KEY}": 1}


def test_interpolated_values_are_redacted_in_diagnostics():
    """Line ends and control characters are replaced too, so a diagnostic is one line."""
    found = read("a: ${KEY}\nb: ${TWO}\n", TWO="line\nline")
    assert (
        found.locate(Finding(("b",), 'the value "from-outside" or "line\nline" is bad\n')).text
        == 'the value "…" or "…" is bad?'
    )


def test_the_text_of_a_diagnostic_is_cut():
    """A key of five megabytes is not printed in full."""
    assert len(read("a: 1").locate(Finding((), "x" * 1_000_000)).text) == 501


def test_a_value_with_a_mistake_is_marked():
    """Later checks skip it, so the same error is not reported twice."""
    found = read("a: no\nb: 1\nc: ${NOPE}")
    assert [found.is_bad((key,)) for key in "abc"] == [True, False, True]


def test_a_walk_yields_every_value_with_its_path():
    """Mappings and lists come before their content."""
    found = read("a: {b: [x, 1]}\nc: null")
    assert [(path, node.plain()) for path, node in found.walk()] == [
        ((), {"a": {"b": ["x", 1]}, "c": None}),
        (("a",), {"b": ["x", 1]}),
        (("a", "b"), ["x", 1]),
        (("a", "b", 0), "x"),
        (("a", "b", 1), 1),
        (("c",), None),
    ]


_PIECES = [*"abn:,-[]{}&*!|>'\"#%@`?$ \n\t0127.", "no", "${", "}", "- ", ": ", "<<"]
YAMLISH = st.lists(st.sampled_from(_PIECES)).map("".join)


@pytest.mark.parametrize("parser", [yaml.SafeLoader, document._PARSER])
@given(text=YAMLISH | st.text() | st.text(alphabet=printable))
def test_any_text_gives_data_or_mistakes(parser, text):
    """No exception leaves `read_document`, with PyYAML's C parser and with its Python parser."""
    before, document._PARSER = document._PARSER, parser
    try:
        found = read(text)
    finally:
        document._PARSER = before
    assert found.data is not None or found.mistakes
    assert all(1 <= mistake.line <= text.count("\n") + len(text) + 1 for mistake in found.mistakes)


@given(st.binary())
def test_any_bytes_give_data_or_mistakes(source):
    """The file may be binary."""
    found = read(source)
    assert found.data is not None or found.mistakes
