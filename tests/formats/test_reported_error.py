"""Errors that an upstream reports inside a successful answer are found, and other answers are none."""

import json
from typing import Any

import pytest

from proxy.formats.reported_error import may_report_error, reports_error, status_of_error
from proxy.formats.texts import read_object

KEY = b"sk-secret-0123456789"

ERRORS: list[dict[str, Any]] = [
    {"error": {"message": "m"}},
    {"error": "text"},
    {"error": {"message": "m"}, "choices": [{"delta": {}, "finish_reason": "error"}]},
    {"errors": [{"message": "m"}]},
    {"type": "error", "code": None, "message": "m"},
    {"type": "response.failed", "response": {"error": {"code": "x"}}},
    {"type": "transcript.text.error", "text": "m"},
    {"type": "response.completed", "response": {"error": None, "output": [{"error": "m"}]}},
    {"choices": [{"error": {"message": "m"}}]},
    {"choices": [{"delta": {"content": "m"}, "finish_reason": "stop"}, {"finish_reason": "error"}]},
    {"object": "error", "message": "m"},
    {"detail": [{"msg": "m"}]},
    {"message": "m"},
    {"Error": {"message": "m"}},
    {"type": "bad_request", "msg": "m"},
    {"code": 1, "msg": "m"},
    {"error_code": 17, "error_msg": "m"},
    {"object": "chat.completion", "choices": None, "base_resp": {"status_code": 1008, "status_msg": "m"}},
    {"object": "chat.completion.chunk", "choices": [], "errorMessage": "m"},
    {"success": False, "result": "m"},
    {"status": 500, "reason": "m"},
    {"fault": {"faultstring": "m"}},
]
NO_ERRORS: list[dict[str, Any]] = [
    {"choices": [{"delta": {"content": 'the "error": 5'}}]},
    {"choices": [{"delta": {"content": "error"}}], "error": None},
    {"type": "response.created", "response": {"error": None, "errors": []}},
    {"type": "message_start", "message": {"content": []}},
    {"error": None, "output": [{"error": None}]},
    {"type": "response.output_text.delta", "delta": "error"},
    {"choices": ["odd"]},
    {"choices": []},
    {"object": "chat.completion.chunk", "choices": [], "usage": {"prompt_tokens": 1}, "error": None, "msg": ""},
    {"object": "list", "data": [{"embedding": [1]}], "model": "m"},
    {"type": "ping"},
    {"created": 1, "data": [{"b64_json": "x"}]},
    {"text": "a transcript"},
    {"type": "message", "content": [], "usage": {}},
    {"id": "resp_1", "object": "response", "output": [], "error": None},
    {"id": "modr-1", "model": "m", "results": []},
    {"input_tokens": 5},
]


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,", " : ")], ids=["compact", "spaces", "more"])
def test_an_error_is_found_in_every_form(separators: tuple[str, str]) -> None:
    """As the data of an event and as a whole body."""
    for error in ERRORS:
        assert reports_error(json.dumps(error, separators=separators).encode(), error), error
    for answer in NO_ERRORS:
        assert not reports_error(json.dumps(answer, separators=separators).encode(), answer), answer


def test_what_is_no_object_may_be_an_error() -> None:
    """Plain text and lists. `[DONE]` is none, and neither is an event of another name."""
    assert reports_error(b"Incorrect API key", None)
    assert reports_error(b'[{"error": {}}]', None)
    assert reports_error(b'{"code": 1}', {"code": 1}, name="error")
    assert reports_error(b'{"code": 1}', {"code": 1}, name="Error")
    assert not reports_error(b'{"type": "x"}', {"type": "x"}, name="ping")
    assert not reports_error(b"[DONE]", None)
    assert reports_error(b"[DONE] " + KEY, None)
    assert reports_error(b'{"\\u0065rror": "m"}', read_object(b'{"\\u0065rror": "m"}'))


@pytest.mark.parametrize(
    "sign", [b'{"error": ', b"\n\nevent: error\ndata: ", b"\nevent:Error", b'"type": "response.failed"']
)
def test_a_piece_may_report_an_error(sign: bytes) -> None:
    """It is searched for signs, as it can't be parsed."""
    assert may_report_error(b"x" + sign + b'"m"')
    assert not may_report_error(b"x" + sign[:5] + b'"m"')


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"error": {"message": "m", "code": 429, "metadata": {}}, "user_id": "u"}', 429),
        (b'{"error": {"message": "m", "code": "503"}}', 503),
        (b'{"error": {"message": "m", "code": 400}}', 400),
        (b'{"error": {"message": "m", "code": "rate_limited"}}', None),
        (b'{"error": {"message": "m", "code": 1008}}', None),
        (b'{"error": {"message": "m", "code": 200}}', None),
        (b'{"error": {"message": "m", "code": true}}', None),
        (b'{"error": {"message": "m", "code": 502.0}}', None),
        (b'{"error": {"message": "m"}}', None),
        (b'{"error": "m"}', None),
        (b'{"error": {"code": 429}, "choices": []}', None),
        (b'{"error": {"code": 429}, "usage": {"prompt_tokens": 5}}', None),
        (b'{"error": null}', None),
        (b'[{"error": {"code": 429}}]', None),
        (b'{"error": {"code": 429}', None),
        (b"", None),
    ],
)
def test_an_error_with_a_status_and_nothing_of_an_answer_states_it(body: bytes, status: int | None) -> None:
    """What has a part of an answer has run, and what states no status of HTTP may have."""
    assert status_of_error(body) == status
