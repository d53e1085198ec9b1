"""Every error has OpenAI's shape, its own code, and the status that SDKs expect."""

import json
import re
from collections import Counter

import pytest

from proxy import errors
from proxy.errors import (
    BadFraming,
    BodiesWaitTooLong,
    BodyMemoryFull,
    BodyTooLarge,
    ClientLeft,
    DirectoryUnavailable,
    ExceedsQuota,
    InternalError,
    InvalidKey,
    InvalidRequest,
    LedgerUnavailable,
    ModelNotFound,
    NeverFits,
    NoSpace,
    NotAllowed,
    NotServed,
    NoUpgrade,
    PreviousNotFound,
    ProxyError,
    Refusal,
    RequestError,
    ResponseNotFound,
    TooManyConnections,
    TooManyReads,
    TooManyStreams,
    TooSlow,
    Unavailable,
    UnsupportedEncoding,
    UpstreamBusy,
    UpstreamError,
    UpstreamExhausted,
    UpstreamFull,
    UpstreamTimeout,
    UpstreamUnreadable,
    UpstreamWithoutKey,
    drop_frames,
)

# What clients see of each: status, type, code.
TABLE = {
    InvalidRequest: (400, "invalid_request_error", None),
    BadFraming: (400, "invalid_request_error", "bad_framing"),
    NeverFits: (400, "invalid_request_error", "context_length_exceeded"),
    ExceedsQuota: (400, "invalid_request_error", "exceeds_quota"),
    InvalidKey: (401, "invalid_request_error", "invalid_api_key"),
    ResponseNotFound: (404, "invalid_request_error", None),
    PreviousNotFound: (404, "invalid_request_error", "previous_response_not_found"),
    ModelNotFound: (404, "invalid_request_error", "model_not_found"),
    NotServed: (404, "invalid_request_error", None),
    TooSlow: (408, "invalid_request_error", "request_timeout"),
    NotAllowed: (404, "invalid_request_error", "endpoint_not_allowed"),
    NoUpgrade: (426, "invalid_request_error", "upgrade_not_supported"),
    BodyTooLarge: (413, "invalid_request_error", "request_too_large"),
    UnsupportedEncoding: (415, "invalid_request_error", None),
    ClientLeft: (499, "api_error", "client_left"),
    Refusal: (429, "insufficient_quota", "insufficient_quota"),
    TooManyReads: (429, "requests", "rate_limit_exceeded"),
    UpstreamError: (502, "upstream_error", "upstream_error"),
    UpstreamBusy: (429, "rate_limit_error", "upstream_rate_limited"),
    UpstreamExhausted: (503, "upstream_error", "upstream_unavailable"),
    UpstreamWithoutKey: (503, "upstream_error", "upstream_key_unavailable"),
    UpstreamFull: (503, "upstream_error", "upstream_full"),
    UpstreamTimeout: (504, "upstream_error", "upstream_timeout"),
    UpstreamUnreadable: (502, "upstream_error", "upstream_unreadable"),
    InternalError: (500, "api_error", None),
    TooManyConnections: (503, "server_error", "too_many_connections"),
    TooManyStreams: (503, "server_error", "too_many_streams"),
    NoSpace: (503, "server_error", "out_of_space"),
    BodyMemoryFull: (503, "server_error", "out_of_memory"),
    BodiesWaitTooLong: (503, "server_error", "too_many_large_bodies"),
    LedgerUnavailable: (503, "server_error", "ledger_unavailable"),
    DirectoryUnavailable: (503, "server_error", "directory_unavailable"),
}
# Base classes that are never raised themselves.
ROOTS = {ProxyError, RequestError, Unavailable}


def all_below(cls: type[ProxyError]) -> set[type[ProxyError]]:
    """A class and all its subclasses."""
    return {cls}.union(*(all_below(child) for child in cls.__subclasses__()))


def raised(cls: type[ProxyError]) -> ProxyError:
    """An instance of the class as it would be raised."""
    if cls is Refusal:
        return Refusal("No.", type="insufficient_quota", code="insufficient_quota", headers={}, members={})
    return cls("No.")


def test_the_table_contains_every_error():
    """A new class must be added here, with what clients see of it. The admin API has a table of its own."""
    assert {cls for cls in all_below(ProxyError) if cls.__module__ == "proxy.errors"} == ROOTS | TABLE.keys()


@pytest.mark.parametrize("cls", TABLE, ids=lambda cls: cls.__name__)
def test_each_error_has_its_status_and_code(cls):
    """SDKs choose the exception by the status, and programs decide by type and code."""
    error = raised(cls)
    assert (error.status, error.type, error.code) == TABLE[cls]


@pytest.mark.parametrize("cls", [*TABLE, *ROOTS], ids=lambda cls: cls.__name__)
def test_the_body_has_the_four_members_of_openai(cls):
    """`message`, `type`, `param` and `code` are always present, because SDKs read them; null without a value."""
    error = raised(cls)
    assert error.body() == {"error": {"message": "No.", "type": error.type, "param": None, "code": error.code}}
    assert str(error) == error.message == "No."
    assert json.loads(json.dumps(error.body())) == error.body()


def test_status_and_code_tell_the_errors_apart():
    """No two have both in common, except a path and a response that do not exist: OpenAI has no code for them."""
    pairs = Counter((status, code) for status, _, code in TABLE.values())
    assert pairs.pop((404, None)) == 2
    assert all(count == 1 for count in pairs.values())
    codes = Counter(code for _, _, code in TABLE.values() if code is not None)
    assert all(count == 1 for count in codes.values())


@pytest.mark.parametrize("cls", TABLE, ids=lambda cls: cls.__name__)
def test_the_status_says_whose_fault_it_is(cls):
    """4xx: request or quota; 5xx: upstream or ledger. Only the upstream's own 429 keeps its status."""
    at_fault = 4 if issubclass(cls, RequestError | Refusal) or cls in (TooManyReads, UpstreamBusy, ClientLeft) else 5
    assert cls.status // 100 == at_fault


def test_the_tree_in_the_docstring_is_the_tree_in_the_code():
    """The module's docstring lists each class once, below its parent, with its status."""
    tree = dict(re.findall(r"^[\s│├└─]*(\w+)(?: +(\d{3}))?", errors.__doc__.split("\n\n")[1], flags=re.MULTILINE))
    assert tree == {cls.__name__: str(cls.status) if cls in TABLE else "" for cls in TABLE.keys() | ROOTS}
    for cls in all_below(ProxyError):
        assert cls.__doc__, cls


def test_param_names_the_field():
    """A client can show which field is wrong."""
    error = InvalidRequest('"n" must be a whole number.', param="n", code="invalid_value")
    assert error.body()["error"] == {
        "message": '"n" must be a whole number.',
        "type": "invalid_request_error",
        "param": "n",
        "code": "invalid_value",
    }
    assert ModelNotFound("No such model.", param="model").body()["error"]["param"] == "model"


def test_a_code_given_to_one_error_is_not_the_code_of_the_next():
    """A type and a code given to an instance do not change the class."""
    InvalidRequest("One.", code="invalid_value")
    Refusal("One.", type="tokens", code="rate_limit_exceeded", headers={}, members={})
    assert InvalidRequest("Two.").code is None
    assert (Refusal.type, Refusal.code) == ("insufficient_quota", "insufficient_quota")


def test_a_refusal_carries_its_headers_and_members():
    """They say when to try again: headers for SDKs, members of `error` for programs."""
    headers, members = {"retry-after": "18"}, {"retry_after": 18, "help_url": None}
    refusal = Refusal("Busy.", type="tokens", code="rate_limit_exceeded", headers=headers, members=members)
    headers.clear()
    members.clear()
    assert refusal.headers == {"retry-after": "18"}
    assert refusal.body() == {
        "error": {
            "message": "Busy.",
            "type": "tokens",
            "param": None,
            "code": "rate_limit_exceeded",
            "retry_after": 18,
            "help_url": None,
        }
    }


def test_an_unreachable_ledger_says_when_to_try_again():
    """While the ledger cannot be written no call is admitted: a 503 with `Retry-After: 5`."""
    error = LedgerUnavailable()
    assert error.headers == {"retry-after": "5"}
    assert "quota ledger" in error.message


@pytest.mark.parametrize(
    "cls", [cls for cls in TABLE if issubclass(cls, UpstreamError)], ids=lambda cls: cls.__name__
)
def test_an_upstream_error_counts_as_sent_unless_it_says_otherwise(cls):
    """A call that was sent may have cost something. Charging depends on it, so that is the default."""
    assert cls("No.").was_sent is True
    assert cls("No.", was_sent=False).was_sent is False


@pytest.mark.parametrize("cls", [NeverFits, UpstreamError, UpstreamBusy], ids=lambda cls: cls.__name__)
def test_other_errors_have_headers_only_if_given(cls):
    """An upstream's `Retry-After` can be passed on. An error adds no headers by itself."""
    assert cls("No.").headers == {}
    assert cls("No.", headers={"retry-after": "7"}).headers == {"retry-after": "7"}


def _raise_with(size: int) -> None:
    body = bytearray(size)
    try:
        raise ConnectionError(OSError(len(body)))
    except ConnectionError as error:
        cause = error
        raise UpstreamError("No.") from cause


def test_an_error_without_its_frames_keeps_nothing_alive():
    """The frames of an error, and of those that led to it, have variables such as a request's body."""
    error: BaseException
    try:
        _raise_with(8)
    except UpstreamError as raised:
        error = raised
    cause = error.__cause__
    assert cause is not None
    drop_frames(error)
    for each in (error, cause, *cause.args):
        assert (each.__traceback__, each.__cause__, each.__context__) == (None, None, None)


def test_an_error_that_led_to_itself_is_no_endless_loop():
    """Libraries re-raise an error inside of its own handler."""
    error = UpstreamError("No.")
    error.__cause__ = ConnectionError(error)
    drop_frames(error)
    assert error.__cause__ is None
