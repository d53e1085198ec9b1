"""Our key is masked in everything that passes to a client, and our account in errors (T9)."""

import json
from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.endpoints import CHAT, MESSAGES, RESPONSES, Endpoint
from proxy.formats.mask import Mask, PieceMask
from proxy.formats.sse import EVENT_BYTES_MAX
from proxy.formats.stream import Stream
from proxy.formats.surfaces import meter_of
from proxy.policy.amounts import Tokens
from tests.formats.streams import request

KEY = b"sk-secret_0123456789"
MASK = Mask(KEY.decode())
ACCOUNT = b"org-AbCdEf0123456789"
ALL = 10**12


def nested(key: bytes, depth: int) -> bytes:
    """The key with its punctuation escaped, in so many levels of JSON in strings of JSON."""
    backslashes = b"\\" * 2**depth
    return key.replace(b"-", backslashes + b"u002d").replace(b"_", backslashes + b"u005F")


SPELLINGS = {
    "plain": KEY,
    "escaped": nested(KEY, 0),
    "nested": nested(KEY, 1),
    "nested twice": nested(KEY, 2),
    "backslash by its number": KEY.replace(b"-", b"\\u005cu002d"),
    "all of it": b"".join(b"\\u%04x" % byte for byte in KEY),
    "all of it, nested": b"".join(b"\\\\u%04X" % byte for byte in KEY),
    "in a URL": KEY.replace(b"-", b"%2D").replace(b"_", b"%5f"),
    "in HTML": KEY.replace(b"-", b"&#45;").replace(b"_", b"&#x5F;"),
    "in HTML, with zeros": KEY.replace(b"-", b"&#045;").replace(b"_", b"&#X005f;"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_key_is_masked_however_it_is_spelled(spelling: str) -> None:
    """The rest stays as it is, escapes included."""
    for before, after in ((b"", b""), (b"a\\n\\u0041 ", b' \\"b\\u002d'), (b"\\\\", b"\\\\")):
        data = before + SPELLINGS[spelling] + after + b"," + KEY
        if before != b"\\\\" or not spelling.startswith("all of it"):
            assert MASK.anywhere(data) == MASK.in_error(data) == before + b"***" + after + b",***"
        else:  # backslashes before an escape are a part of it
            assert MASK.anywhere(data) == b"***" + after + b",***"


@given(st.binary(max_size=60) | st.text("\\\\u005c2d-sk_", max_size=60).map(str.encode))
def test_data_without_the_key_is_unchanged(data: bytes) -> None:
    """Whatever it is."""
    assert MASK.anywhere(data) == data


def test_a_masked_string_of_json_stays_one() -> None:
    """As an answer of a tool, which is JSON in a string of JSON."""
    for depth in range(3):
        value = "a\\b\n" + KEY.decode() + 'c"'
        for _ in range(depth + 1):
            value = json.dumps(value).replace("-", "\\u002d" if depth == 0 else "-")
        shown = MASK.anywhere(value.encode())
        assert KEY not in shown
        for _ in range(depth + 1):
            shown = json.loads(shown)
        assert shown == 'a\\b\n***c"'


def test_a_key_with_slashes_is_masked() -> None:
    """PHP and others escape a slash."""
    mask = Mask("ab/cd/0123456789")
    urls = b"ab%2Fcd%2f0123456789", b"ab&#x2F;cd&#47;0123456789"
    for spelled in (b"ab/cd/0123456789", b"ab\\/cd\\/0123456789", b"ab\\\\/cd\\u002f0123456789", *urls):
        assert mask.anywhere(b"x" + spelled) == b"x***"


def test_a_key_without_a_long_part_is_masked() -> None:
    """No part of it is searched for, so all of it is."""
    assert Mask("a-b-c-d-e-f").anywhere(b"x a-b-c-d-e-f a\\u002db-c-d-e-f") == b"x *** ***"
    assert Mask("--------").anywhere(b"x -------- \\u002d-------") == b"x *** ***"


@pytest.mark.parametrize("key", ["none", "ollama", "sk-x", "1234567"])
def test_a_short_key_is_masked_only_in_errors(key: str) -> None:
    """It may be an ordinary word."""
    data = b"this is " + key.encode()
    assert Mask(key).anywhere(data, is_cut=True) == data
    assert Mask(key).in_error(data) == b"this is ***"
    pieces = PieceMask(Mask(key))
    assert pieces.feed(data) == data


@pytest.mark.parametrize("key", [None, ""])
def test_without_a_key_nothing_is_masked_but_the_account(key: str | None) -> None:
    """An empty key is a part of every text."""
    mask = Mask(key)
    assert mask.anywhere(b"abc", is_cut=True) == mask.in_error(b"abc", is_cut=True) == b"abc"
    assert mask.in_error(ACCOUNT) == b"***"
    pieces = PieceMask(mask)
    assert pieces.feed(b"abc") == b"abc"
    assert pieces.end() == b""


def test_the_account_is_masked_only_in_errors() -> None:
    """An ordinary text may look like one."""
    assert MASK.in_error(b"of " + ACCOUNT) == b"of ***"
    assert MASK.anywhere(b"of " + ACCOUNT) == b"of " + ACCOUNT


UUID = b"12345678-90ab-cdef-1234-567890abcdef"
ACCOUNTS = [
    b"org-AbCdEf0123456789",
    b"proj_AbCdEf0123456789",
    b"org_01jabcdefghijklmnopqrstuv",  # Groq
    b"user_2abcDEFghiJKLmnoPQRstuVWXyz",  # OpenRouter
    b"ak-f8abcdefghijklmnopqr",  # Moonshot
    b"arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.x-v1:0",
    b"arn:aws-us-gov:iam::123456789012:user/x",
    b"projects/my-project-123456",  # Google
    b"projects/123456789012",
    b"wrkspc_01abcdefgh",
    b"acct_1AbCdEfGhIjKlMnO",
    b"team " + UUID,  # xAI
    b"organization (" + UUID,
    b"account id: " + UUID,
    b"Subscription " + UUID,
    b"tenant '" + UUID,
]


@pytest.mark.parametrize("account", ACCOUNTS, ids=lambda account: account[:12].decode())
def test_accounts_of_other_vendors_are_masked(account: bytes) -> None:
    """As their errors name them."""
    assert MASK.in_error(b'{"error": "of ' + account + b'"}') == b'{"error": "of ***"}'


@pytest.mark.parametrize("quote", ['"', '\\"'], ids=["json", "json-in-json"])
@pytest.mark.parametrize("separator", [":", ": "])
def test_an_account_in_a_member_of_its_own_is_masked(quote: str, separator: str) -> None:
    """The name of the member stays: without it the error would be no JSON."""
    member = f"{quote}organization_id{quote}{separator}{quote}%b{quote}".encode()
    body = b'{"error": {"message": "{%b}", "code": null}}' if quote != '"' else b'{"error": {%b, "code": null}}'
    shown = MASK.in_error(body % (member % UUID))
    assert shown == body % (member % b"***")
    assert json.loads(shown)


@pytest.mark.parametrize("text", [b"user_name", b"user_id", b"projects/", b"team 12", b"speak-abcdefghijklmno", UUID])
def test_what_only_looks_like_an_account_is_shown(text: bytes) -> None:
    """Names of fields, and ids of requests."""
    assert MASK.in_error(b"of " + text + b".") == b"of " + text + b"."


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_key_that_breaks_off_is_masked(spelling: str) -> None:
    """Its beginning is a secret too, if it is long enough to be one."""
    spelled = SPELLINGS[spelling]
    assert MASK.anywhere(b"x" + KEY[:7], is_cut=True) == b"x" + KEY[:7]
    for end in range(len(spelled) * 3 // 4, len(spelled)):
        for mask in (MASK.anywhere, MASK.in_error):
            assert mask(b"x " + spelled[:end], is_cut=True) == b"x ***"
    assert MASK.anywhere(KEY[:-1]) == KEY[:-1]


def test_a_secret_that_is_a_part_of_another_is_masked() -> None:
    """If the shorter one were masked first, the rest of the longer one would be shown."""
    short = "tenant-secret-0123456789"
    mask = Mask(f"sk-{short}-of-ours", short, f"{short}-admin-9f8e7d")
    for masked in (mask.anywhere, mask.in_error):
        assert masked(f"a {short}-admin-9f8e7d b {short} c sk-{short}-of-ours".encode()) == b"a *** b *** c ***"


def test_a_header_is_masked() -> None:
    """Also if its value is not UTF-8."""
    assert MASK.in_header(f"a {KEY.decode()}") == "a ***"
    assert MASK.in_header("\udce9") == "\udce9"


# ------------------------------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, MESSAGES], ids=lambda endpoint: endpoint.name)
def test_all_events_are_masked(endpoint: Endpoint) -> None:
    """Data, comments, names, and lines that are no part of any event."""
    stream = Stream(meter_of(request(endpoint), count=len), mask=MASK)
    for line in (b'data: {"k": "%b"}', b"data: %b", b": %b", b"error: {%b}", b"<p>%b</p>", b"event: %b\ndata: {}"):
        assert stream.feed(line % KEY + b"\n\n", covered=ALL) == line % b"***" + b"\n\n"
    assert stream.feed(b'data: {"error": "%b"}\n\n' % ACCOUNT, covered=ALL) == b'data: {"error": "***"}\n\n'
    for text in (b'data: {"k": "%b"}\n\n', b'data: {"choices": null, "base_resp": {"status_msg": "%b"}}\n\n'):
        assert stream.feed(text % ACCOUNT, covered=ALL) == text % b"***"
    text = b'data: {"type": "k", "k": "%b"}\n\n' % ACCOUNT
    assert stream.feed(text, covered=ALL) == text


def test_an_event_that_breaks_off_is_masked_too() -> None:
    """The data may end within the key."""
    for event in (b'data: {"error": {"message": "', b'data: {"k": "'):
        stream = Stream(meter_of(request(), count=len), mask=MASK)
        passed = stream.feed(event + KEY[:-3], covered=ALL)
        stream.close(covered=ALL)
        assert passed + stream.end() == event + b"***"


def test_the_end_at_a_limit_is_masked() -> None:
    """It repeats the id and the model of the events as they came."""
    stream = Stream(meter_of(request(), count=len), mask=MASK)
    stream.feed(b'data: {"id":"%b","choices":[{"index":0,"delta":{"content":"x"}}]}\n\n' % KEY, covered=ALL)
    end = stream.end_at_limit(Tokens(1, 1))
    assert b'"***"' in end
    assert KEY not in end


@pytest.mark.parametrize("step", [1 << 20, EVENT_BYTES_MAX + 5000])
@pytest.mark.parametrize("head", [b'data: {"error": {"message": "', b'data: {"image": {"k": "'])
def test_an_event_that_is_too_large_to_parse_is_masked(step: int, head: bytes) -> None:
    """Also if a piece of it ends within the key."""
    for at in (100, EVENT_BYTES_MAX - 20, EVENT_BYTES_MAX - 5, EVENT_BYTES_MAX + 4000):
        body = bytearray(head + b"x" * (EVENT_BYTES_MAX + 5000) + b'"}}\n\n')
        body[at : at + len(KEY)] = KEY
        stream = Stream(meter_of(request(), count=len), mask=MASK)
        chunks = [bytes(body[start : start + step]) for start in range(0, len(body), step)]
        passed = b"".join(stream.feed(chunk, covered=ALL) for chunk in chunks)
        assert passed == bytes(body).replace(KEY, b"***")
        assert stream.feed(b"data: 1\n\n", covered=ALL) == b"data: 1\n\n"


def test_a_large_error_that_breaks_off_is_complete_up_to_there() -> None:
    """What was kept back of it is sent with the end."""
    body = b'data: {"error": "' + b"x" * EVENT_BYTES_MAX + KEY + b"yz"
    stream = Stream(meter_of(request(), count=len), mask=MASK)
    passed = stream.feed(body, covered=ALL)
    assert len(passed) < len(body) - 4000
    assert passed + stream.end() == body.replace(KEY, b"***")


# ------------------------------------------------------------------------------------------------------------- pieces


@given(
    st.lists(st.integers(0, 600), max_size=20),
    st.sampled_from(sorted(SPELLINGS)),
    st.sampled_from((b"", b'{"error": ', b"\n\nevent: error\ndata: ", b'{"type": "response.failed", ')),
)
def test_a_body_in_pieces_is_masked_wherever_it_is_cut(cuts: list[int], spelling: str, sign: bytes) -> None:
    """Before an error and in it."""
    body = b"x" * 90 + b" " + SPELLINGS[spelling] + b"y" * 60 + sign + b"z" * 90 + KEY + b"z" * 50
    offsets = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    pieces = PieceMask(MASK)
    passed = b"".join(pieces.feed(body[start:end]) for start, end in pairwise(offsets)) + pieces.end()
    assert passed == body.replace(SPELLINGS[spelling], b"***").replace(KEY, b"***")


def test_what_cannot_be_the_key_passes_at_once() -> None:
    """Nothing is kept back of a stream that is read while it is written."""
    pieces = PieceMask(MASK)
    assert pieces.feed(b"data: 1\n\n") == b"data: 1\n\n"
    assert pieces.feed(b"as") == b"a"
    assert pieces.feed(b"k me\n\n") == b"sk me\n\n"


KEYS = ("sk-first-0123456789", "sk-second-0123456789", "eyJ0eXAi." + "abc_123-" * 300)


@given(st.permutations(KEYS), st.lists(st.integers(0, 3000), max_size=10), st.booleans())
def test_several_keys_are_masked_wherever_a_body_is_cut(keys: list[str], cuts: list[int], is_escaped: bool) -> None:
    """Also if one has thousands of characters, as an access token does."""
    shown = [key.replace("-", "\\u002d") if is_escaped else key for key in keys]
    body = " \n ".join(shown).encode()
    mask = Mask(*KEYS)
    assert mask.anywhere(body) == mask.in_error(body) == b"*** \n *** \n ***"
    offsets = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    pieces = PieceMask(mask)
    passed = b"".join(pieces.feed(body[start:end]) for start, end in pairwise(offsets)) + pieces.end()
    assert passed == b"*** \n *** \n ***"


def test_a_key_that_is_a_part_of_another_is_masked_with_it() -> None:
    """The longer one is looked for first."""
    for keys in permutations(("sk-0123456789", "sk-0123456789-and-more", "x-sk-0123456789")):
        assert Mask(*keys).anywhere(b"sk-0123456789-and-more x-sk-0123456789 sk-0123456789") == b"*** *** ***"


def test_an_account_that_is_cut_in_two_is_masked() -> None:
    """In an error."""
    pieces = PieceMask(MASK)
    passed = pieces.feed(b'{"error": "of ' + ACCOUNT[:3]) + pieces.feed(ACCOUNT[3:] + b'"}') + pieces.end()
    assert passed == b'{"error": "of ***"}'
