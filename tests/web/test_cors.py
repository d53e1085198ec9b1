"""CORS: the pages that may call from a browser, and the headers that their scripts may read. docs/wire.md §6.6."""

from pathlib import Path

import pytest

from tests.bare_client import GOOD
from tests.stage import STAFF, Reply, Stage, key_of, stage

CHAT = "/v1/chat/completions"
PAGE = "https://app.example"
STAINLESS = "x-stainless-lang, X-Stainless-Package-Version, x-stainless-retry-count"


async def _preflight(on: Stage, origin: str, requested: str = "authorization, content-type") -> Reply:
    sent = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": requested,
    }
    async with on.http.options(on.url + CHAT, headers=sent) as response:
        return Reply(response.status, response.headers.copy(), await response.read())


def _names(reply: Reply, header: str) -> set[str]:
    return set(reply.headers[header].split(", "))


async def test_a_preflight_of_a_listed_page_lists_what_it_may_send(tmp_path: Path) -> None:
    """A browser sends it without a key. The headers that it asks for are echoed one by one, if they are names."""
    async with stage(folder=tmp_path, cors=(PAGE, "app://notes")) as on:
        asked = f"authorization,{STAINLESS}, X-My_Own.header, *, x-a b, x-\u00e4, {'x' * 90}"
        reply = await _preflight(on, PAGE, asked)
        assert (reply.status, reply.body) == (204, b"")
        assert reply.headers["access-control-allow-origin"] == PAGE
        assert reply.headers["vary"] == "Origin"
        assert _names(reply, "access-control-allow-methods") == {"GET", "POST", "DELETE", "OPTIONS"}
        allowed = _names(reply, "access-control-allow-headers")
        assert allowed == {"authorization", "x-my_own.header", *STAINLESS.lower().split(", ")}
        assert reply.headers["server"] == "llm-quota-proxy"
        assert int(reply.headers["access-control-max-age"]) > 600
        assert (await _preflight(on, "app://notes")).headers["access-control-allow-origin"] == "app://notes"


async def test_a_preflight_has_a_bound_and_may_ask_for_no_header(tmp_path: Path) -> None:
    """A browser that asks for none needs none."""
    async with stage(folder=tmp_path, cors=(PAGE,)) as on:
        reply = await _preflight(on, PAGE, ",".join(f"x-{number}" for number in range(500)))
        assert len(_names(reply, "access-control-allow-headers")) == 100
        assert "access-control-allow-headers" not in (await _preflight(on, PAGE, "")).headers


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://app.example", f"{PAGE}:444", f"{PAGE}.evil", "null"]
)
async def test_another_page_gets_no_cors_headers(origin: str, tmp_path: Path) -> None:
    """So its browser blocks it. `Vary: Origin` keeps a cache from giving the answer to another page."""
    async with stage(folder=tmp_path, cors=(PAGE,)) as on:
        for reply in (await _preflight(on, origin), await on.post(CHAT, GOOD, headers={"origin": origin})):
            assert reply.headers["vary"] == "Origin"
            assert not [name for name in reply.headers if name.lower().startswith("access-control")]
        assert (await _preflight(on, origin)).status == 404


async def test_without_a_list_no_page_is_allowed(tmp_path: Path) -> None:
    """The default: no answer has CORS headers."""
    async with stage(folder=tmp_path) as on:
        reply = await on.post(CHAT, GOOD, headers={"origin": PAGE})
        assert reply.status == 200
        assert not [name for name in reply.headers if name.lower() in ("vary", "access-control-allow-origin")]
        assert (await _preflight(on, PAGE)).status == 404


async def test_all_pages_may_be_allowed(tmp_path: Path) -> None:
    """With `"*"` the answer is the same for every page, so it needs no Vary."""
    async with stage(folder=tmp_path, cors=("*",)) as on:
        assert (await _preflight(on, PAGE)).headers["access-control-allow-origin"] == "*"
        reply = await on.post(CHAT, GOOD, headers={"origin": "null"})
        assert reply.headers["access-control-allow-origin"] == "*"
        assert "vary" not in reply.headers


async def test_a_script_may_read_every_header_that_the_proxy_sets(tmp_path: Path) -> None:
    """On an answer, a stream, a 429, a 401 and a 404. An SDK in a browser can't obey headers that it can't read."""
    policy = STAFF.replace("requests: 100k", "requests: 2")
    page = {"origin": PAGE}
    async with stage(policy, folder=tmp_path, cors=(PAGE,)) as on:
        replies = [
            await on.post(CHAT, GOOD, headers=page),
            await on.post(CHAT, {**GOOD, "stream": True}, headers=page),
            await on.post(CHAT, GOOD, headers=page),
            await on.post(CHAT, GOOD, user=None, headers=page),
            await on.post("/v1/nothing", GOOD, headers=page),
        ]
        assert [reply.status for reply in replies] == [200, 200, 429, 401, 404]
        for reply in replies:
            assert reply.headers["access-control-allow-origin"] == PAGE
            assert reply.headers["vary"] == "Origin"
            ours = {name.lower() for name in reply.headers if name.lower().startswith(("x-", "ratelimit", "retry"))}
            assert ours - {"x-accel-buffering"} <= _names(reply, "access-control-expose-headers")
        assert {"retry-after", "x-should-retry", "ratelimit"} & {name.lower() for name in replies[2].headers}


async def test_an_options_request_that_is_no_preflight_is_a_404(tmp_path: Path) -> None:
    """Preflight requests have Access-Control-Request-Method. The 404 has the CORS headers too."""
    sent = {"origin": PAGE, "api-key": key_of("alice")}
    async with stage(folder=tmp_path, cors=(PAGE,)) as on, on.http.options(on.url + CHAT, headers=sent) as response:
        assert response.status == 404
        assert response.headers["access-control-allow-origin"] == PAGE
