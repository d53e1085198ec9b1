"""The one place that turns an error into a response."""

import json
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from structlog.testing import capture_logs

from proxy.errors import BodyTooLarge, LedgerUnavailable, ProxyError
from proxy.web.middleware import REQUEST_ID, answer_errors


async def _answer(error: Exception) -> tuple[web.StreamResponse, dict[str, Any]]:
    async def handler(request: web.Request) -> web.StreamResponse:
        raise error

    request = make_mocked_request("POST", "/v1/x")
    request[REQUEST_ID] = "req_1"
    response = await answer_errors(request, handler)
    assert isinstance(response, web.Response)
    assert isinstance(response.body, bytes)
    return response, json.loads(response.body)["error"]


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (LedgerUnavailable(), 503, "ledger"),
        (web.HTTPNotFound(), 404, "Invalid URL (POST /v1/x)"),
        (web.HTTPMethodNotAllowed("POST", ["GET"]), 404, "Invalid URL"),
        (BodyTooLarge("larger than 1000 bytes"), 413, "larger than 1000 bytes"),
    ],
)
async def test_every_error_has_openai_s_shape(error: Exception, status: int, says: str) -> None:
    """Ours, and what the server library says no to."""
    response, told = await _answer(error)
    assert response.status == status
    assert says in told["message"]
    assert told.keys() >= {"message", "type", "param", "code"}
    assert response.headers["x-request-id"] == "req_1"


async def test_a_mistake_of_ours_is_logged_and_tells_nothing() -> None:
    """What went wrong inside stays inside: it could hold anything."""
    with capture_logs() as logged:
        response, told = await _answer(RuntimeError("secret detail"))
    assert response.status == 500
    assert "secret" not in json.dumps(told)
    assert "secret detail" in str(logged)


async def test_a_good_answer_passes() -> None:
    """Nothing is changed where nothing is wrong; and an error without an id has none."""

    async def good(request: web.Request) -> web.StreamResponse:
        return web.Response(text="ok")

    async def bad(request: web.Request) -> web.StreamResponse:
        raise ProxyError("no")

    request = make_mocked_request("GET", "/x")
    assert (await answer_errors(request, good)).status == 200
    assert "x-request-id" not in (await answer_errors(request, bad)).headers


async def test_errors_on_anthropic_s_paths_have_its_shape() -> None:
    """Whatever it is that is wrong; the id stands where its SDK looks for it, and in the body."""

    async def bad(request: web.Request) -> web.StreamResponse:
        raise LedgerUnavailable

    request = make_mocked_request("POST", "/v1/messages/x")
    nameless = await answer_errors(request, bad)
    request[REQUEST_ID] = "req_1"
    response = await answer_errors(request, bad)
    assert isinstance(response, web.Response)
    assert isinstance(response.body, bytes)
    told = json.loads(response.body)
    assert (told["type"], told["error"]["type"], told["request_id"]) == ("error", "overloaded_error", "req_1")
    assert (response.headers["request-id"], response.headers["retry-after"]) == ("req_1", "5")
    assert "request-id" not in nameless.headers
