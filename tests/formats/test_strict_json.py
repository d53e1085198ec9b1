"""Ambiguous JSON is refused with a message that helps; every other body is read and written back unchanged.

Threats T26 (bodies that are not a JSON object), T27 (equal keys), T37 (unknown fields), T120 (too many values).
"""

import codecs
import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import InvalidRequest
from proxy.formats.strict_json import (
    INTEGERS_MAX,
    VALUES_MAX,
    dump,
    parse_exactly,
    parse_object,
    reading_cost,
    refuse_equal_keys,
    walk,
)

KNOWN = frozenset(("model", "max_tokens", "stream", "messages"))


def refusal(body: bytes) -> str:
    """The message with which this body is refused."""
    with pytest.raises(InvalidRequest) as caught:
        parse_object(body, KNOWN)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    return caught.value.message


# ----------------------------------------------------------------------------------------------------- refused bodies


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "is empty"),
        (b" \r\n\t ", "is empty"),
        (b"null", "must be a JSON object"),
        (b"[]", "must be a JSON object"),
        (b'[{"model":"m"}]', "must be a JSON object"),
        (b"7", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"true", "must be a JSON object"),
        (b"{", "not valid JSON"),
        (b'{"model":"m"', "not valid JSON"),
        (b'{"model":"m"} x', "Extra data at line 1, column 15"),
        (b'{"model":"m"}{"model":"m"}', "Extra data"),
        (b'{"model":"m",}', "not valid JSON"),
        (b"{'model':'m'}", "not valid JSON"),
        (b'{"model":\n"m', "Unterminated string starting at line 2, column 1"),
        (b'{"model":"a\nb"}', "Invalid control character at line 1, column 12"),
        (b'{"model":"a\x00b"}', "Invalid control character at line 1, column 12"),
        (b'{"model":01}', "not valid JSON"),
        (b'{"model":+1}', "not valid JSON"),
        (b'{"model":"\\x"}', "Invalid \\escape"),
        (b"model=m&stream=true", "not valid JSON"),
        (b"\x1f\x8b\x08\x00", "not valid UTF-8 (byte 1)"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark (the bytes EF BB BF)"),
        (b"\xef\xbb\xbf" + b'{"model":"m"}' * 2, "begins with a byte order mark"),
        ('{"model":"m"}'.encode("utf-16"), "is in UTF-16. Send the JSON in UTF-8."),
        (codecs.BOM_UTF16_BE + '{"model":"m"}'.encode("utf-16-be"), "is in UTF-16."),
        ('{"model":"m"}'.encode("utf-16-le"), "is in UTF-16 or UTF-32."),
        ('{"model":"m"}'.encode("utf-16-be"), "is in UTF-16 or UTF-32."),
        ('{"model":"m"}'.encode("utf-32"), "is in UTF-32."),
        ('{"model":"m"}'.encode("utf-32-be"), "is in UTF-16 or UTF-32."),
        (b'{"model":"\xff"}', "not valid UTF-8 (byte 10)"),
        (b'{"model":"\xed\xa0\x80"}', "not valid UTF-8"),
        (b'{"model":"\xc0\xaf"}', "not valid UTF-8"),
    ],
)
def test_a_body_that_is_not_a_json_object_is_a_400_that_says_why(body: bytes, words: str) -> None:
    """Any bytes (T26) get an error in OpenAI's shape, with line and column if the parser states them."""
    assert words in refusal(body)


@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"-Infinity"])
@pytest.mark.parametrize("body", [b'{"max_tokens":%b}', b'{"a":[{"b":%b}]}', b"%b"])
def test_nan_and_infinity_are_refused(text: bytes, body: bytes) -> None:
    """Python's parser would accept them, other servers don't. They are refused at any depth."""
    assert f"{text.decode()} is not a JSON number" in refusal(body % text)


@pytest.mark.parametrize("text", [b"1e999", b"-1e999", b"1E+400", b"1" + b"0" * 400 + b".5"])
def test_fractions_beyond_the_range_of_a_double_are_refused(text: bytes) -> None:
    """They would be read as infinity, which cannot be written as JSON again."""
    words = refusal(b'{"temperature":%b}' % text)
    assert "beyond the range of numbers" in words
    assert len(words) < 150


@pytest.mark.parametrize("body", [b'{"a":%b}', b"%b", b'{"a":[-%b]}'])
def test_an_integer_of_200_000_digits_is_refused(body: bytes) -> None:
    """int() takes time quadratic in the number of digits."""
    assert "a number has too many digits" in refusal(body % (b"1" * 200_000))


@pytest.mark.parametrize("body", [b'{"%b":1,"%b":2}', b'{"messages":[{"c":{"%b":1,"x":0,"%b":2}}]}'])
@pytest.mark.parametrize("key", [b"model", b"digits", b"", b"\\u00e9", b"\\ud800", b"a\\nb"])
def test_of_equal_keys_the_last_counts_and_is_written(body: bytes, key: bytes) -> None:
    """One server takes the first, another the last (T27). What is decided on is what is sent: each key once."""
    both = body % (key, key)
    value = parse_object(both, KNOWN)
    assert value == parse_exactly(both) == json.loads(both)
    assert dump(value).count(b'":2') == 1
    assert b'":1' not in dump(value)


@pytest.mark.parametrize("body", [b'{"%b":1,"%b":2}', b'{"messages":[{"c":{"%b":1,"x":0,"%b":1}}]}'])
@pytest.mark.parametrize("key", [b"model", b"digits", b"", b"\\u00e9", b"\\ud800", b"a\\nb"])
def test_the_administration_refuses_equal_keys_at_any_depth(body: bytes, key: bytes) -> None:
    """Also with equal values. The same key may be in two objects."""
    with pytest.raises(InvalidRequest, match="appears twice"):
        refuse_equal_keys(body % (key, key))
    with pytest.raises(InvalidRequest, match="appears twice") as caught:
        refuse_equal_keys(b'{"model":"a","\\u006dodel":"b"}')
    assert caught.value.code == "invalid_json"
    refuse_equal_keys(b'{"model":"m","messages":[{"role":"user"},{"role":"user"}],"tools":{"model":{"model":1}}}')


def test_equal_keys_are_found_behind_an_escape() -> None:
    """Escapes are decoded before keys are compared, as in every parser."""
    assert dump(parse_object(b'{"model":"a","\\u006dodel":"b"}', KNOWN)) == b'{"model":"b"}'


@pytest.mark.parametrize(
    ("body", "first", "second"),
    [
        (b'{"model":"a","MODEL":"b"}', "model", "MODEL"),
        (b'{"MODEL":"b","model":"a"}', "model", "MODEL"),
        (b'{"MODEL":"b"}', "model", "MODEL"),
        (b'{"Max_Tokens":1}', "max_tokens", "Max_Tokens"),
        (b'{"model":"a","max_tokens":1,"max_to\xe2\x84\xaaens":9}', "max_tokens", "max_to\u212aens"),
        (b'{"model":"a","max_tokens":1,"max_token\xc5\xbf":9}', "max_tokens", "max_token\u017f"),
        (b'{"\xc5\xbftream":true}', "stream", "\u017ftream"),
        (b'{"\\u004dodel":"b"}', "model", "Model"),
        (b'{"own":1,"Own":2}', "own", "Own"),
        (b'{"OWN":1,"own":2}', "OWN", "own"),
    ],
)
def test_keys_that_differ_only_in_case_are_refused(body: bytes, first: str, second: str) -> None:
    """Go's decoder treats them as equal, by a case folding that includes the long s and the Kelvin sign.

    For a field that the proxy decides on, one other spelling alone is refused, because the upstream may read it.
    """
    assert f'"{first}" and "{second}" differ only in case' in refusal(body)


def test_unknown_and_nested_keys_may_have_any_case() -> None:
    """Nothing is decided on an unknown field, nor on keys below the outermost object."""
    body = b'{"model":"m","X-Own":1,"metadata":{"a":1,"A":2,"MODEL":3}}'
    assert parse_object(body, KNOWN) == json.loads(body)


def test_error_messages_are_short() -> None:
    """A key of 200 kB does not produce an error of 200 kB."""
    key = b"k" * 200_000
    assert len(refusal(b'{"%b":1,"%b":2}' % (key, key.upper()))) < 300


# ------------------------------------------------------------------------------------------------ reading and writing


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b' \n{"model" : "m" }\n',
        b'{"a":[],"b":{},"c":"","d":null,"e":false,"f":0,"":1}',
        b'{"seed":18446744073709551615,"low":-9223372036854775808}',
        b'{"t":0.1,"u":-0.0,"v":1.0,"w":5e-324,"x":1.7976931348623157e308,"y":1E5,"z":1e-999}',
        b'{"text":"\\ud83d\\ude00 \xf0\x9f\x98\x80 \\u0000 \\/ \\" \\u2028"}',
        b'{"text":"\\ud800","\\udfff":"\\udc00\\ud800"}',
        b'{"text":"<|endoftext|>","unknown":{"deep":[[[{"x":[null]}]]]}}',
    ],
)
def test_a_value_survives_reading_and_writing(body: bytes) -> None:
    """Integers of any size do, and so does half of a surrogate pair (T37, T67)."""
    value = parse_object(body, KNOWN)
    again = parse_object(dump(value), KNOWN)
    assert again == value == json.loads(body)
    assert repr(again) == repr(value)  # 1 is not 1.0, and -0.0 is not 0.0


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**39, 10**20 + 1])
def test_an_integer_beyond_64_bits_survives_where_floats_are_large(number: int) -> None:
    """orjson makes a float of it, which shows that the body has to be read exactly."""
    body = b'{"seed":%d,"messages":[{"n":[%d,1e300]}]}' % (number, number)
    assert abs(parse_object(body, KNOWN)["seed"]) >= INTEGERS_MAX
    value = parse_exactly(body)
    assert value == parse_exactly(dump(value)) == {"seed": number, "messages": [{"n": [number, 1e300]}]}


def test_json_is_written_compactly_in_utf8() -> None:
    """The length of the body bounds its tokens, so it contains neither blanks nor needless escapes."""
    assert dump({"a": [1, "é😀"], "b": None}) == '{"a":[1,"é😀"],"b":null}'.encode()
    assert dump({"a": [2**64, "\ud800"]}) == b'{"a":[18446744073709551616,"\\ud800"]}'


def has_large_floats(value: object) -> bool:
    """Whether a number of this value may have been an integer that was rounded."""
    return any(isinstance(inner, float) and abs(inner) >= INTEGERS_MAX for inner in walk(value))


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=()), max_size=9)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)
documents = st.dictionaries(st.text(max_size=5), values, max_size=5)


@given(document=documents, spaced=st.booleans(), escaped=st.booleans())
def test_any_document_is_read_as_json_reads_it_or_refused(document: dict, spaced: bool, escaped: bool) -> None:
    """Blanks and escapes make no difference; only keys that differ in case are refused."""
    separators = (" , ", " : ") if spaced else (",", ":")
    try:
        body = json.dumps(document, ensure_ascii=escaped, separators=separators).encode()
    except UnicodeEncodeError:
        return  # half of a surrogate pair can only be written as an escape
    if len({key.casefold() for key in document.keys() | KNOWN}) < len(document.keys() | KNOWN):
        assert "differ only in case" in refusal(body)
        return
    assert repr(parse_exactly(body)) == repr(document)
    value = parse_object(body, KNOWN)
    if not has_large_floats(value):
        assert repr(value) == repr(document)
        assert repr(parse_object(dump(value), KNOWN)) == repr(document)


@given(body=st.binary(max_size=40) | st.text('{}[]",:0123456789eE+-.truefalsn\\ \n', max_size=40).map(str.encode))
def test_any_bytes_give_an_object_or_a_400(body: bytes) -> None:
    """No bytes raise another exception than InvalidRequest."""
    try:
        value = parse_object(body, KNOWN)
    except InvalidRequest as error:
        assert error.code == "invalid_json"
        assert json.loads(dump(error.body())) == error.body()
    else:
        assert isinstance(value, dict)


# Values, each with a comma after it; and how many values each of them is.
VALUES = {
    b"{},": 1,
    b"{ },": 1,
    b"[],": 1,
    b"[\n],": 1,
    b"1,": 1,
    b'"",': 1,
    b'"[{,",': 1,
    b'"\\"[{,\\\\",': 1,
    b'"\\\\","a\\"",': 2,
    b'[""],': 2,
    b'{"":[]},': 2,
    b'{"a":1,"b":["c",{}]},': 5,
}


@pytest.mark.parametrize("value", VALUES)
def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(value: bytes) -> None:
    """Parsing, checking and reading it would take seconds. The object, its array and the values in it count."""
    most = (VALUES_MAX - 3) // VALUES[value]
    rest = VALUES_MAX - 3 - most * VALUES[value]
    padding = b" " * (2 * VALUES_MAX)  # a body that is too short for so many values is not counted
    fits = b'{"a":[' + value * most + b"1," * rest + b"1]" + padding + b"}"
    assert len(parse_object(fits, frozenset())["a"]) >= most
    with pytest.raises(InvalidRequest, match="100000 JSON values"):
        parse_object(fits.replace(b"1]", b"1,1]"), frozenset())


@pytest.mark.parametrize("text", [",", "[{", "\\,", '",', "\n,é"])
def test_a_long_text_is_one_value(text: str) -> None:
    """Commas, brackets and escaped quotes inside of texts are not counted."""
    document = {"a": [text * VALUES_MAX, text * VALUES_MAX]}
    for body in (json.dumps(document).encode(), orjson.dumps(document)):
        assert parse_object(body, frozenset()) == document


def test_more_quotes_than_values_can_have_are_too_many_values() -> None:
    """They are not split first, because that would make millions of pieces."""
    with pytest.raises(InvalidRequest, match="100000 JSON values"):
        parse_object(b'{"a":[' + b'"",' * 1_000_000 + b"1]}", frozenset())


def test_a_body_of_too_many_keys_is_refused() -> None:
    """Each outermost key is casefolded and looked up among all others."""
    many = b"{" + b",".join(b'"k%d":1' % number for number in range(1001)) + b"}"
    with pytest.raises(InvalidRequest, match="1000 keys"):
        parse_object(many, frozenset())


# Values at which parsers differ: out of range, written in another form than orjson's, not UTF-8.
pieces = st.sampled_from(
    [
        *b"0 -0 1 -0.0 1.0 1e5 1E5 1e16 1e+16 0.1 5e-324 1e400 01 NaN Infinity true null 9007199254740993".split(),
        *b"18446744073709551615 18446744073709551616 -9223372036854775809 1.8446744073709552e19".split(),
        *rb"""  "" "a" "\u0061" "\n" "\u000a" "\/" "\u007f" "\u00e9" "\ud800" "\ud83d\ude00" """.split(),
        *(b'"\n"', b'"\x7f"', b'"\xc3\xa9"', b'"\xf0\x9f\x98\x80"', b'"\xff"', b'"\xed\xa0\x80"'),
        *(b" 1", b"1\n", b"\xef\xbb\xbf1", b"9" * 41),
    ]
)
keys = st.sampled_from([b'"a"', b'"b"', b'"\\u0061"', b'"model"', b'""', b'"\xc3\xa9"', b'"\\u00e9"'])
written = st.recursive(
    pieces,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: b"[%b]" % b",".join(items))
        | st.lists(st.tuples(keys, inner).map(b":".join), max_size=4).map(lambda items: b"{%b}" % b",".join(items))
    ),
    max_leaves=8,
)


@given(body=written | st.binary(max_size=20) | st.floats().map(lambda number: b"[%b]" % repr(number).encode()))
def test_what_is_parsed_fast_is_what_the_exact_parser_reads(body: bytes) -> None:
    """Also numbers in any form, escapes and equal keys. What the exact parser refuses, the fast one refuses.

    Except for a number of too many digits whose key comes again: the last value counts.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return
    if has_large_floats(value):
        return
    try:
        exact = parse_exactly(body)
    except InvalidRequest:
        assert b"9" * 41 in body
    else:
        assert repr(value) == repr(exact)


# --------------------------------------------------------------------------------------------------------------- walk


def test_walk_yields_the_value_and_all_values_below_it_in_document_order() -> None:
    """Depth first: a value comes before the values inside it, and these before its next sibling."""
    inner = {"b": 2}
    items = [1, inner]
    value = {"a": items, "c": None}
    assert list(walk(value)) == [value, items, 1, inner, 2, None]
    assert list(walk("text")) == ["text"]
    assert list(walk([])) == [[]]


def test_walk_goes_only_into_the_chosen_members() -> None:
    """The choice is made at every level, and may replace a value."""
    value = {"skip": {"a": 1}, "b": [{"skip": 2, "c": 3}]}
    found = walk(value, lambda members: [inner for name, inner in members.items() if name != "skip"])
    assert list(found) == [value, value["b"], {"skip": 2, "c": 3}, 3]
    assert list(walk({"a": [1]}, lambda members: map(json.dumps, members.values()))) == [{"a": [1]}, "[1]"]


def test_walk_is_not_recursive() -> None:
    """100,000 levels don't overflow the stack."""
    value: object = "deep"
    for level in range(100_000):
        value = [value] if level % 2 else {"a": value}
    *_, last = walk(value)
    assert last == "deep"


# --------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize(
    ("body", "cost"),
    [
        (b"[" + b"1," * 100 + b"1]", 203),  # a short body has few values
        (b"[" + b"1," * 10_000 + b"1]", 32 * 10_001),  # its length is a tenth of that
        (b'["' + b"a" * 400_000 + b'"]', 400_004),
        (b"[" + b"1," * 2_000_000 + b"1]", 4_000_003),  # not counted: no body may have more than 100,000 values
    ],
)
def test_the_cost_of_a_body_is_its_length_or_that_of_its_values(body: bytes, cost: int) -> None:
    """It decides whether the body is read on the event loop or in a thread (T120)."""
    assert reading_cost(body) == cost
