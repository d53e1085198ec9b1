"""Who gets into the admin API, and what keeps everybody else out, on real sockets."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from proxy.config.loader import load_text
from proxy.config.values import digest
from proxy.identity.keys import make_key
from proxy.web.admin.failures import FAILURES_MAX, Failures
from tests.admin import ADMINS, SAME_ORIGIN, admin_key, ask, log_in, problem
from tests.builders import NOON
from tests.stage import STAFF, UPSTREAM_KEY, Stage, key_of, stage, text_of

POLICY = STAFF + ADMINS
HOUR = 3_600_000


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def without_key() -> dict[str, str]:
    return {"accept": "*/*"}


async def make_admin_key(on: Stage, **more: Any) -> str:
    """A key in the table of admin keys, as one that was made at run time."""
    key = make_key()
    row = {"id": key.id, "digest": key.digest, "name": "ann", "role": "administrator", "created_at": NOON}
    await insert(on, "admin_keys", {**row, "created_by": "cli:root", **more})
    return key.text


async def insert(on: Stage, table: str, values: dict[str, Any]) -> None:
    from sqlalchemy import insert as insert_into

    from proxy.ledger.schema import metadata

    async with on.server._users.change() as (connection, _):
        await connection.execute(insert_into(metadata.tables[table]), values)


async def set_admin_key(on: Stage, **values: Any) -> None:
    from sqlalchemy import update

    from proxy.ledger.schema import admin_keys

    async with on.server._users.change() as (connection, _):
        await connection.execute(update(admin_keys).values(**values))


async def reload(on: Stage, policy: str) -> None:
    """Reload with another policy on the same database."""
    text = text_of(policy, database=on.database, upstream="http://127.0.0.1:1/v1")
    on.config = replace(load_text(text), settings=on.config.settings)
    assert await on.server.policies.reload()


# --------------------------------------------------------------------------------------------------------------- keys


async def test_a_key_says_who_one_is(tmp_path: Path) -> None:
    """In either header. A manager also sees its groups."""
    async with stage(POLICY, folder=tmp_path) as on:
        assert on.server.api is not None
        of_the_proxy = {"timezone": "UTC", "api_url": None, "api_port": on.server.api.port}
        reply = await ask(on, "GET", "/session")
        assert reply.json() == {
            "name": "ops",
            "role": "administrator",
            "groups": None,
            "grant_up_to": None,
            "expires_at": None,
            **of_the_proxy,
        }
        reply = await ask(on, "GET", "/session", headers={"x-api-key": admin_key("max")})
        assert reply.json() == {
            "name": "max",
            "role": "manager",
            "groups": ["staff"],
            "grant_up_to": 50,
            "expires_at": None,
            **of_the_proxy,
        }


@pytest.mark.parametrize(
    "headers",
    [
        without_key(),
        bearer(""),
        bearer(key_of("alice")),
        bearer(f"{admin_key('ops')}x"),
        bearer(digest(admin_key("ops"))),
        bearer(f"sha256:{digest(admin_key('ops'))}"),
        bearer("ops"),
        bearer(UPSTREAM_KEY),
        bearer(make_key().text),
        {**bearer(admin_key("ops")), "x-api-key": key_of("alice")},
        {"cookie": f"lqp_admin={admin_key('ops')}"},
        {"cookie": f"lqp_admin=lqps_{'x' * 43}"},
        {"x-forwarded-user": "ops", "x-forwarded-for": "127.0.0.1"},
    ],
    ids=lambda headers: next(iter(headers)),
)
async def test_nothing_else_is_a_key(headers: dict[str, str], tmp_path: Path) -> None:
    """T84: a user's key is a 401 like any other; and T91: a path that there is not answers the same."""
    async with stage(POLICY, folder=tmp_path) as on:
        for path in ("/session", "/nothing", ""):
            reply = await ask(on, "GET", path, headers=headers)
            assert problem(reply) == (401, "unauthenticated")
            assert reply.headers["www-authenticate"] == "Bearer"
            assert "ops" not in reply.json()["detail"]


async def test_an_admins_key_is_no_key_of_the_api(tmp_path: Path) -> None:
    """An admin who wants to call needs a user's key."""
    async with stage(POLICY, folder=tmp_path) as on:
        response = await on.http.get(f"{on.url}/v1/models", headers=bearer(admin_key("ops")))
        assert response.status == 401


async def test_a_header_source_makes_nobody_an_admin(tmp_path: Path) -> None:
    """Not with its own key and the name of an admin, which it may send for users."""
    source = (
        "identity: {headers: [{name: sso, key: key-of-the-source-0123456789, user: X-Remote-User, unmapped: staff}]}"
    )
    async with stage(f"{POLICY}\n{source}\n", folder=tmp_path) as on:
        sent = {**bearer("key-of-the-source-0123456789"), "x-remote-user": "ops"}
        async with on.http.get(f"{on.url}/v1/models", headers=sent) as response:
            assert response.status == 200
        assert problem(await ask(on, "GET", "/session", headers=sent)) == (401, "unauthenticated")


@pytest.mark.every_engine
async def test_a_key_that_was_made_at_run_time_ends_when_it_says(tmp_path: Path) -> None:
    """It is looked up with each request: revoked or expired, it is refused at once. So are logins with it."""
    async with stage(STAFF, folder=tmp_path) as on:
        key = await make_admin_key(on, role="manager", groups='["lab"]', grant_up_to=20, expires_at=NOON + HOUR)
        reply = await ask(on, "GET", "/session", headers=bearer(key))
        assert (reply.json()["role"], reply.json()["groups"], reply.json()["grant_up_to"]) == ("manager", ["lab"], 20)
        reply = await ask(on, "POST", "/session", headers=bearer(key))
        assert reply.json()["expires_at"] == NOON + HOUR  # not later than its key
        assert "Max-Age=3600" in reply.headers["set-cookie"]
        cookie = {"cookie": reply.headers["set-cookie"].partition(";")[0]}
        assert (await ask(on, "GET", "/session", headers=cookie)).json()["name"] == "ann"
        other = await make_admin_key(on, name="bea")
        await set_admin_key(on, revoked_at=NOON)
        for headers in (bearer(key), cookie):
            assert problem(await ask(on, "GET", "/session", headers=headers)) == (403, "closed")
        await set_admin_key(on, revoked_at=None)
        assert (await ask(on, "GET", "/session", headers=cookie)).status == 200
        on.clock.ms += HOUR
        for headers in (bearer(key), cookie):
            assert problem(await ask(on, "GET", "/session", headers=headers)) == (401, "unauthenticated")
        assert (await ask(on, "GET", "/session", headers=bearer(other))).status == 200


@pytest.mark.parametrize("policy", [STAFF, f"{STAFF}\nadmin_keys: {{}}\n"])
async def test_without_any_key_the_api_is_closed_and_says_how_to_open_it(policy: str, tmp_path: Path) -> None:
    """T7: no key is also not an empty key. Health and metrics are open."""
    async with stage(policy, folder=tmp_path) as on:
        for headers in (without_key(), bearer(""), bearer(key_of("alice"))):
            for method, path in (("GET", "/session"), ("POST", "/session"), ("GET", "/nothing"), ("PUT", "")):
                reply = await ask(on, method, path, headers=headers)
                assert problem(reply) == (403, "closed")
                assert "admin_keys:" in reply.json()["detail"]
        for path in ("/healthz", "/readyz", "/metrics"):
            async with on.http.get(on.admin_url + path) as response:
                assert response.status == 200
        await reload(on, POLICY)
        assert (await ask(on, "GET", "/session")).status == 200


# ------------------------------------------------------------------------------------------------------- keys in URLs


async def test_a_key_in_the_url_is_refused(tmp_path: Path) -> None:
    """By its name, by its form, or because it is a key: it would be in the logs of every server on the way."""
    async with stage(POLICY, folder=tmp_path) as on:
        made = make_key().text
        some = "any-text-of-24-characters"
        for query in (f"key={some}", f"Access_Token={some}", f"text={made}", f"{made}=1", f"text=a%20{made}"):
            for headers in (without_key(), bearer(admin_key("ops"))):
                assert problem(await ask(on, "GET", f"/session?{query}", headers=headers)) == (400, "key-in-url")
        assert problem(await ask(on, "GET", f"/keys/{made}")) == (400, "key-in-url")
        assert problem(await ask(on, "GET", "/session?key=7k2mq9xw4b")) == (400, "bad-request")  # an id is no key
        for key in (admin_key("ops"), key_of("alice")):
            assert problem(await ask(on, "GET", f"/session?text={key}")) == (400, "key-in-url")
            # Without a valid key the answer does not tell whether this one is.
            reply = await ask(on, "GET", f"/session?text={key}", headers=bearer("wrong"))
            assert problem(reply) == (401, "unauthenticated")


# ---------------------------------------------------------------------------------------------------- slowed failures


async def test_wrong_keys_are_slowed_down(tmp_path: Path) -> None:
    """T87: after five of an address each further one gets a 429, also the right one. Logins go on."""
    async with stage(POLICY, folder=tmp_path) as on:
        cookie = await log_in(on)
        with capture_logs() as logs:
            for _ in range(FAILURES_MAX):
                assert problem(await ask(on, "GET", "/session", headers=bearer("wrong")))[0] == 401
            for headers in (bearer("wrong"), bearer(admin_key("ops"))):
                reply = await ask(on, "GET", "/session", headers=headers)
                assert problem(reply) == (429, "too-many-failures")
                assert 0 < int(reply.headers["retry-after"]) <= 60
            body = {"key": admin_key("ops")}
            assert problem(await ask(on, "POST", "/session", headers=SAME_ORIGIN, json=body))[0] == 429
        assert (await ask(on, "GET", "/session", headers=cookie)).status == 200
        lines = [line for line in logs if line["event"] == "request"]
        assert [line["status"] for line in lines] == [401] * FAILURES_MAX + [429] * 3
        assert {line["address"] for line in lines} == {"127.0.0.1"}
        assert {line.get("reason") for line in lines[:FAILURES_MAX]} == {"no admin key"}
        assert admin_key("ops") not in str(logs)


@pytest.mark.every_engine
async def test_a_thousand_wrong_keys_at_once_cost_few_queries(tmp_path: Path) -> None:
    """Those with the form of our keys too: most of them are refused before they are looked up."""
    async with stage(POLICY, folder=tmp_path) as on:
        wrong = [bearer(make_key().text) for _ in range(1000)]
        database, asked = on.server._admin._access._database, []
        find_key = database.find_key

        async def counting(digest: str) -> Any:
            asked.append(digest)
            return await find_key(digest)

        database.find_key = counting  # type: ignore[method-assign]
        replies = await asyncio.gather(*(ask(on, "GET", "/session", headers=each) for each in wrong))
        assert {reply.status for reply in replies} == {401, 429}
        assert len(asked) <= FAILURES_MAX + 1
        assert len(on.server._admin._access._failures) == 1


def test_failures_are_forgotten_after_a_minute_and_their_number_is_bounded() -> None:
    """Another address does not wait. An IPv6 client has a whole network of addresses."""
    now = [1000.0]
    failures = Failures(lambda: now[0])
    for second in range(FAILURES_MAX):
        now[0] = 1000.0 + second
        assert failures.wait_s("192.0.2.1") == 0
        failures.note("192.0.2.1")
    assert failures.wait_s("192.0.2.1") == 56
    assert failures.wait_s("192.0.2.2") == 0
    now[0] = 1060.0
    assert failures.wait_s("192.0.2.1") == 0
    failures.note("192.0.2.1")  # the second of the five is still not a minute ago
    assert failures.wait_s("192.0.2.1") == 1
    for number in range(FAILURES_MAX):
        failures.note(f"2001:db8::{number}")
    assert failures.wait_s("2001:db8::ffff") > 0
    assert failures.wait_s("2001:db8:0:1::1") == 0
    for number in range(3000):
        failures.note(f"10.0.{number // 256}.{number % 256}")
    assert len(failures) == 1024


# ------------------------------------------------------------------------------------------------------------- logins


@pytest.mark.every_engine
async def test_a_login_lasts_twelve_hours_and_its_cookie_is_locked_up(tmp_path: Path) -> None:
    """T86: scripts can't read it, other sites and other paths don't get it, and the database has only its digest."""
    async with stage(POLICY, folder=tmp_path) as on:
        reply = await ask(on, "POST", "/session", headers=SAME_ORIGIN, json={"key": admin_key("eve")})
        assert reply.status == 201
        assert reply.json()["expires_at"] == NOON + 12 * HOUR
        value, *attributes = reply.headers["set-cookie"].split("; ")
        assert attributes == ["Path=/admin", "Max-Age=43200", "HttpOnly", "SameSite=Strict"]
        assert admin_key("eve") not in str(reply.headers) + reply.body.decode()
        [row] = await on.rows("admin_sessions")
        assert row["digest"] == digest(value.removeprefix("lqp_admin="))
        cookie = {"cookie": value}
        assert (await ask(on, "GET", "/session", headers=cookie)).json()["name"] == "eve"
        on.clock.ms += 12 * HOUR - 1
        assert (await ask(on, "GET", "/session", headers=cookie)).status == 200
        on.clock.ms += 1
        assert problem(await ask(on, "GET", "/session", headers=cookie)) == (401, "unauthenticated")
        await log_in(on)  # which deletes what has ended
        assert len(await on.rows("admin_sessions")) == 1


async def test_each_login_has_a_cookie_of_its_own_and_can_be_ended(tmp_path: Path) -> None:
    """T86: nobody can prepare a login for somebody else, and after logging out the old cookie is worthless."""
    async with stage(POLICY, folder=tmp_path) as on:
        first, second = await log_in(on), await log_in(on)
        assert first != second
        reply = await ask(on, "DELETE", "/session", headers={**first, **SAME_ORIGIN})
        assert reply.status == 204
        assert reply.headers["set-cookie"].startswith("lqp_admin=; Path=/admin; Max-Age=0")
        assert (await ask(on, "GET", "/session", headers=first)).status == 401
        assert (await ask(on, "GET", "/session", headers=second)).status == 200
        planted = {"cookie": f"{first['cookie']}; {second['cookie']}"}
        assert (await ask(on, "GET", "/session", headers=planted)).status == 401


async def test_a_login_ends_when_its_key_leaves_the_file(tmp_path: Path) -> None:
    """A reload is enough, and a changed role holds for logins too."""
    async with stage(POLICY, folder=tmp_path) as on:
        ops, eve = await log_in(on, "ops"), await log_in(on, "eve")
        await reload(on, f"{STAFF}\nadmin_keys: {{ops: {{key: {admin_key('ops')}, role: viewer}}}}\n")
        assert (await ask(on, "GET", "/session", headers=ops)).json()["role"] == "viewer"
        assert problem(await ask(on, "GET", "/session", headers=eve)) == (401, "unauthenticated")


async def test_over_tls_the_cookie_is_secure(tmp_path: Path) -> None:
    """The listener itself speaks no TLS, so the setting has to say it."""
    async with stage(POLICY, folder=tmp_path, admin_url="https://quotas.example") as on:
        reply = await ask(on, "POST", "/session", headers=bearer(admin_key("ops")))
        assert reply.headers["set-cookie"].endswith("; Secure")


# -------------------------------------------------------------------------------------------------------- other pages


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "none", "origin": "https://evil.example"},
        {"sec-fetch-site": "same-origin, cross-site"},
        {"sec-fetch-site": "same-site", "origin": "{own}"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "{own}.evil.example"},
        {"referer": "{own}/admin/"},
    ],
)
async def test_another_page_changes_nothing_with_the_cookie(headers: dict[str, str], tmp_path: Path) -> None:
    """T82: neither one of another site nor one of another port. The login itself is protected alike."""
    async with stage(POLICY, folder=tmp_path) as on:
        cookie = await log_in(on)
        sent = {name: value.format(own=on.admin_url) for name, value in headers.items()}
        reply = await ask(on, "DELETE", "/session", headers={**cookie, **sent})
        assert problem(reply) == (403, "cross-site")
        reply = await ask(on, "POST", "/session", headers=sent, json={"key": admin_key("ops")})
        assert problem(reply) == (403, "cross-site")
        assert (await ask(on, "GET", "/session", headers=cookie)).status == 200


async def test_a_form_of_another_site_can_not_log_in(tmp_path: Path) -> None:
    """T82: a form can send text/plain that is JSON, without a preflight. It is refused by its type too."""
    async with stage(POLICY, folder=tmp_path) as on:
        body = f'{{"key": "{admin_key("ops")}"}}'.encode()
        for type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            sent = {"content-type": type, **SAME_ORIGIN}
            reply = await ask(on, "POST", "/session", headers=sent, data=body)
            assert problem(reply) == (415, "unsupported-type")


@pytest.mark.parametrize("headers", [SAME_ORIGIN, {"origin": "{own}"}, {"origin": "https://Quotas.example"}])
async def test_the_own_page_may_change_things(headers: dict[str, str], tmp_path: Path) -> None:
    """By either header. The origin is that of the request, or the one that the file names."""
    async with stage(POLICY, folder=tmp_path, admin_url="https://quotas.example") as on:
        sent = {name: value.format(own=on.admin_url) for name, value in headers.items()}
        cookie = await log_in(on)
        assert (await ask(on, "DELETE", "/session", headers={**cookie, **sent})).status == 204


async def test_a_key_in_the_header_needs_no_origin(tmp_path: Path) -> None:
    """A page can't send one to another origin. So programs need nothing more."""
    async with stage(POLICY, folder=tmp_path) as on:
        sent = {**bearer(admin_key("ops")), "origin": "https://evil.example", "sec-fetch-site": "cross-site"}
        assert (await ask(on, "POST", "/session", headers=sent)).status == 201
        assert (await ask(on, "DELETE", "/session", headers=sent)).status == 204


# -------------------------------------------------------------------------------------------------------------- hosts


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:8081", True),
        ("[::1]:8081", True),
        ("192.0.2.7", True),
        ("localhost:8081", True),
        ("LOCALHOST.", True),
        ("quotas.example", True),
        ("Quota-Proxy:8081", True),
        ("evil.example", False),
        ("evil.example:8081", False),
        ("127.0.0.1.evil.example", False),
        ("quotas.example.evil.example", False),
        ("localhost.evil.example", False),
        ("0x7f000001", False),
        ("127.1", False),
        ("", False),
    ],
)
async def test_a_name_that_leads_here_by_dns_rebinding_is_refused(host: str, is_ours: bool, tmp_path: Path) -> None:
    """T82: also with the right key. Health checks come with any name, metrics only with those of the listener."""
    names: Any = {"admin_url": "https://quotas.example", "admin_hosts": ("quota-proxy",)}
    async with stage(POLICY, folder=tmp_path, **names) as on:
        reply = await ask(on, "GET", "/session", admin="ops", headers={"host": host})
        assert reply.status == 200 if is_ours else problem(reply) == (421, "wrong-host")
        for path, status in (("/healthz", 200), ("/readyz", 200), ("/metrics", 200 if is_ours else 421)):
            async with on.http.get(on.admin_url + path, headers={"host": host}) as response:
                assert response.status == status


# ------------------------------------------------------------------------------------------------ the other listener


async def test_the_api_listener_knows_no_cookie_and_no_admin_path(tmp_path: Path) -> None:
    """T63: cookies know no ports, so a browser sends it there too. It identifies nobody, and reaches no upstream."""
    async with stage(POLICY, folder=tmp_path) as on:
        cookie = await log_in(on)
        for path in ("/v1/models", "/admin/api/session", "/admin/", "/admin"):
            async with on.http.get(on.url + path, headers=cookie) as response:
                assert response.status in (401, 404)
        async with on.http.get(f"{on.url}/admin/api/session", headers=bearer(admin_key("ops"))) as response:
            assert response.status == 404
        body = {"model": "fast", "messages": [{"role": "user", "content": "Hello"}]}
        reply = await on.post("/v1/chat/completions", body, headers=cookie)
        assert reply.status == 200
        assert "set-cookie" not in reply.headers
        assert "cookie" not in {name.lower() for name in on.simulator.requests[-1].headers}
