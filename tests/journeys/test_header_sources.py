"""Users of a UI or a proxy in front: 300 behind one key, each with quotas of their own, and all who pretend."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from structlog.testing import capture_logs

from tests.bare_client import GOOD, bare_client, post
from tests.builders import NOON
from tests.stage import Stage, config_of, key_of, stage

pytestmark = pytest.mark.journey

CHAT = "/v1/chat/completions"
WEBUI_KEY, SSO_KEY = key_of("webui"), key_of("sso")
SECRET = "a-secret-of-32-characters-to-sign"
# The UI connects from 127.0.0.2, the single sign-on from 127.0.0.3, and everybody else from 127.0.0.1.
WEBUI, SSO = "127.0.0.2", "127.0.0.3"
NOW_S = NOON // 1000
USERS = [f"user-{number:03}" for number in range(300)]

PLAIN = """
    - name: webui
      key: "key-of-webui-0123456789abcdef"
      from: [127.0.0.2]
      user: X-OpenWebUI-User-Id
      email: X-OpenWebUI-User-Email
      groups: X-OpenWebUI-Groups
      map: {"7f3c": staff}
      unmapped: guests
"""
SIGNED = """
    - name: webui
      key: "key-of-webui-0123456789abcdef"
      from: [127.0.0.2]
      signed: {header: X-OpenWebUI-User-Jwt, secret: "a-secret-of-32-characters-to-sign", issuer: open-webui}
      unmapped: guests
"""
SINGLE_SIGN_ON = """
    - name: sso
      key: "key-of-sso-0123456789abcdef"
      from: [127.0.0.3]
      user: X-Forwarded-User
      email: X-Forwarded-Email
      groups: X-Forwarded-Groups
      map: {/staff: staff, "/platform": {group: admins, allow_unlimited: true}}
      users_max: 2
"""
POLICY = """
models:
  fast: {upstream: simulated, max_output_tokens: 100}
groups:
  staff: {quotas: {daily: {requests: 3, per: day}}}
  guests: {quotas: {daily: {requests: 1, per: day}}}
  admins: {unlimited: true}
users:
  alice: {groups: [admins], keys: ["key-of-alice-0123456789abcdef"], identities: [{source: webui, id: uuid-of-alice}]}
  user-001: {groups: [admins], keys: ["key-of-bob-0123456789abcdef"]}
identity:
  headers:
"""


def webui_headers(user: str, source: str, **claims: object) -> dict[str, str]:
    """What Open WebUI sends for a user: its plain headers, or in place of them the signed one."""
    if source == PLAIN:
        return {"X-OpenWebUI-User-Id": user, "X-OpenWebUI-User-Email": f"{user}@x.example"}
    said = {"sub": user, "email": f"{user}@x.example", "name": "N", "role": "user", "iss": "open-webui"}
    times = {"iat": NOW_S, "exp": NOW_S + 300}
    return {"X-OpenWebUI-User-Jwt": jwt.encode({**said, **times, **claims}, SECRET, algorithm="HS256")}


@asynccontextmanager
async def connecting_from(address: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A client with this address."""
    connector = aiohttp.TCPConnector(local_addr=(address, 0), limit=50)
    async with aiohttp.ClientSession(connector=connector) as session:
        yield session


async def call(
    on: Stage, client: aiohttp.ClientSession, headers: Mapping[str, str], *, key: str = WEBUI_KEY
) -> tuple[int, dict[str, Any]]:
    """The status and the body of one call."""
    sent = {"authorization": f"Bearer {key}", **headers}
    async with client.post(on.url + CHAT, headers=sent, json=GOOD) as response:
        return response.status, await response.json()


async def used(on: Stage) -> dict[str, int]:
    """Requests that are charged, by the user and the quota of the counter."""
    rows = await on.rows("counters")
    return {f"{row['subject']} {row['quota_id']}": row["used_requests"] for row in rows}


@pytest.mark.slow
@pytest.mark.every_engine
@pytest.mark.parametrize("source", [PLAIN, SIGNED], ids=["plain", "signed"])
async def test_300_users_behind_one_key_have_quotas_of_their_own(source: str, tmp_path: Path) -> None:
    """Each has one call a day. One of them is named as a user of the file, who is another; one is linked to alice."""
    async with stage(POLICY + source, folder=tmp_path) as on, connecting_from(WEBUI) as client:
        calls = [call(on, client, webui_headers(user, source)) for user in USERS for _ in range(2)]
        found = await asyncio.gather(*calls)
        assert [sorted((found[n][0], found[n + 1][0])) for n in range(0, 600, 2)] == [[200, 429]] * 300
        refused = next(body for status, body in found if status == 429)
        assert refused["error"]["quotas"][0]["id"] == "guests/daily"
        assert (await call(on, client, webui_headers("uuid-of-alice", source)))[0] == 200
        await on.all_settled()
        assert await used(on) == {f"user:webui:{user} guests/daily": 1 for user in USERS}
        rows = {row["id"]: row for row in await on.rows("users")}
        assert rows.keys() == set(USERS)
        assert all(row["source"] == row["created_by"] == "webui" for row in rows.values())
        assert rows["user-001"]["email"] == "user-001@x.example"
        recorded = await on.rows("calls")
        assert {row["user_name"] for row in recorded} == {"alice", *(f"webui:{user}" for user in USERS)}
        assert {row["key_id"] for row in recorded} == {"webui"}
        await on.audit()


async def test_mapped_groups_count_and_others_do_not(tmp_path: Path) -> None:
    """T137: Open WebUI sends the ids of groups. The name of a group of the policy is none of them."""
    async with stage(POLICY + PLAIN, folder=tmp_path) as on, connecting_from(WEBUI) as client:
        statuses = {}
        for user, groups in (("a", "7f3c"), ("b", "staff,admins"), ("c", "other,7f3c"), ("d", "")):
            headers = {**webui_headers(user, PLAIN), "X-OpenWebUI-Groups": groups}
            statuses[user] = [(await call(on, client, headers))[0] for _ in range(4)]
        assert statuses["a"] == statuses["c"] == [200, 200, 200, 429]
        assert statuses["b"] == statuses["d"] == [200, 429, 429, 429]


FORGED: dict[str, dict[str, str]] = {
    "missing": {},
    "plain": {"X-OpenWebUI-User-Id": "user-001"},
    "unsigned": {"X-OpenWebUI-User-Jwt": jwt.encode({"sub": "alice"}, None, algorithm="none")},
    "another secret": {"X-OpenWebUI-User-Jwt": jwt.encode({"sub": "a"}, "x" * 32, algorithm="HS256")},
    "another algorithm": {"X-OpenWebUI-User-Jwt": jwt.encode({"sub": "a"}, "x" * 64, algorithm="HS512")},
    "expired": webui_headers("user-001", SIGNED, exp=NOW_S - 30, iat=NOW_S - 330),
    "of the future": webui_headers("user-001", SIGNED, iat=NOW_S + 31),
    "for ever": webui_headers("user-001", SIGNED, exp=NOW_S + 10**7),
    "another issuer": webui_headers("user-001", SIGNED, iss="me"),
    "no user": webui_headers("", SIGNED),
    "garbage": {"X-OpenWebUI-User-Jwt": "x.y.z"},
    "long": {"X-OpenWebUI-User-Jwt": "x" * 8190},
}


async def test_a_forged_header_is_a_401(tmp_path: Path) -> None:
    """T134, T135: all get the same answer, the log says why, and neither the upstream nor the ledger has them."""
    async with stage(POLICY + SIGNED, folder=tmp_path) as on, connecting_from(WEBUI) as client:
        with capture_logs() as logged:
            found = {name: await call(on, client, headers) for name, headers in FORGED.items()}
        assert {status for status, _ in found.values()} == {401}
        assert len({str(body) for _, body in found.values()}) == 1
        assert found["expired"][1]["error"]["code"] == "invalid_api_key"
        reasons = [line["reason"] for line in logged if line["event"] == "request"]
        assert (
            reasons[:3] == ["signed header missing", "signed header missing", "signed header: malformed"] or reasons
        )
        assert {"signed header: expired", "signed header: wrong signature", "signed header: wrong issuer"} <= {
            *reasons
        }
        assert not any("eyJ" in str(line) for line in logged)
        assert (on.simulator.received, await on.rows("calls"), await on.rows("users")) == (0, [], [])


async def test_damaged_headers_on_the_wire_are_refused(tmp_path: Path) -> None:
    """T134: sent twice, with bytes that are not UTF-8, with a line end that the HTTP parser may see or not."""
    name = "X-OpenWebUI-User-Id"
    sent: list[tuple[bytes, set[int]]] = [
        (f"{name}: user-001\r\n{name}: user-001".encode(), {401}),
        (f"{name}: user-001\r\n{name.lower()}: user-002".encode(), {401}),
        (f"{name}: ".encode(), {401}),
        (f"{name}: ".encode() + b"\xff\xfe", {401}),
        (f"{name}: ".encode() + "é".encode("latin-1"), {401}),
        (f"{name}: {'u' * 257}".encode(), {401}),
        (f"{name}: user-001\r\n user-002".encode(), {400}),
        (f"{name}: user-001\n{name}: user-002".encode(), {400, 401}),
        (f"{name}: user-001\x00".encode(), {400, 401}),
        (f"{name} : user-001".encode(), {400}),
        (f"{name}: {'é' * 256}".encode(), {200}),
        (f"{name}: a/b:c,d 'e\"".encode(), {200}),
    ]
    source = PLAIN.replace("from: [127.0.0.2]", "from: [127.0.0.1]")
    async with stage(POLICY + source, folder=tmp_path) as on:
        for lines, statuses in sent:
            async with bare_client(on.url) as client:
                head, _, body = post(CHAT, f"Authorization: Bearer {WEBUI_KEY}", "X-Here: x").partition(b"\r\n\r\n")
                client.send(head.replace(b"X-Here: x", lines) + b"\r\n\r\n" + body)
                assert (await client.reply()).status in statuses, lines
        await on.all_settled()
        assert {row["user_name"] for row in await on.rows("calls")} == {f"webui:{'é' * 256}", "webui:a/b:c,d 'e\""}


async def test_with_a_users_own_key_or_from_elsewhere_headers_are_ignored(tmp_path: Path) -> None:
    """T133: never somebody else. X-Forwarded-For does not move a source; the requests are counted."""
    everybody = {**webui_headers("user-001", PLAIN), "X-Forwarded-User": "user-001", "X-Forwarded-For": WEBUI}
    async with (
        stage(POLICY + PLAIN + SINGLE_SIGN_ON, folder=tmp_path, trusted_proxies=(ip_network("127.0.0.1/32"),)) as on,
        connecting_from("127.0.0.1") as outside,
        connecting_from(WEBUI) as webui,
    ):
        assert (await call(on, outside, everybody, key=key_of("alice")))[0] == 200
        assert (await call(on, webui, everybody, key=key_of("alice")))[0] == 200
        for client, key in ((outside, WEBUI_KEY), (outside, SSO_KEY), (webui, SSO_KEY), (webui, "x" * 30)):
            status, body = await call(on, client, everybody, key=key)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert "not known here" in body["error"]["message"]
        assert (await call(on, webui, {**everybody, "api-key": key_of("alice")}))[0] == 401
        await on.all_settled()
        assert {row["user_name"] for row in await on.rows("calls")} == {"alice"}
        assert await on.rows("users") == []
        seen = str([list(request.headers.items()) for request in on.simulator.requests])
        assert "user-001" not in seen and WEBUI not in seen
        async with outside.get(f"{on.admin_url}/metrics") as response:
            metrics = await response.text()
        assert 'llm_quota_ignored_identity_headers_total{reason="other_key"} 3.0' in metrics
        assert 'llm_quota_ignored_identity_headers_total{reason="other_address"} 3.0' in metrics


async def test_oauth2_proxy_by_the_same_plain_headers(tmp_path: Path) -> None:
    """X-Forwarded-User, -Email and -Groups. At most `users_max` users are added, and only those who may call."""
    async with stage(POLICY + PLAIN + SINGLE_SIGN_ON, folder=tmp_path) as on, connecting_from(SSO) as client:

        async def sent(user: str, groups: str) -> list[int]:
            headers = {"X-Forwarded-User": user, "X-Forwarded-Email": f"{user}@x", "X-Forwarded-Groups": groups}
            calls = [call(on, client, headers, key=SSO_KEY) for _ in range(4)]
            return sorted(status for status, _ in await asyncio.gather(*calls))

        assert await sent("nobody", "staff,/other") == [401] * 4
        assert await sent("ann", "/other,/staff") == [200, 200, 200, 429]
        assert await sent("root", "/platform") == [200] * 4
        with capture_logs() as logged:
            assert await sent("one-more", "/staff") == [401] * 4
        assert logged[0]["reason"] == "the source has users_max users"
        assert {row["id"] for row in await on.rows("users")} == {"ann", "root"}


async def test_a_reload_changes_sources(tmp_path: Path) -> None:
    """The next request is of the new file: another secret, other groups, or no source any more."""
    async with stage(POLICY + SIGNED, folder=tmp_path) as on, connecting_from(WEBUI) as client:
        headers = webui_headers("ann", SIGNED)
        assert (await call(on, client, headers))[0] == 200

        async def reload(policy: str) -> int:
            new = config_of(policy, folder=tmp_path, upstream="http://127.0.0.1:1/v1")
            on.config = replace(new, settings=on.config.settings, catalog=on.config.catalog)
            assert await on.server.policies.reload()
            return (await call(on, client, headers))[0]

        assert await reload(POLICY + SIGNED.replace("unmapped: guests", "unmapped: staff")) == 200
        assert await reload(POLICY + SIGNED.replace(SECRET, "y" * 32)) == 401
        assert (
            await reload(
                POLICY.replace("identities: [{source: webui, id: uuid-of-alice}]", "").rsplit("identity:")[0]
            )
            == 401
        )
        assert await reload(POLICY + SIGNED) == 429


async def test_a_key_is_for_networks_of_clients_behind_a_trusted_proxy(tmp_path: Path) -> None:
    """T132: the load balancer says who the client is, and nobody else can. The log has the client's address."""
    policy = POLICY.replace(
        '"key-of-bob-0123456789abcdef"', '{key: "key-of-bob-0123456789abcdef", from: [192.0.2.0/24]}'
    )
    trusted = (ip_network("127.0.0.2/32"), ip_network("10.0.0.0/8"))
    async with (
        stage(policy + SINGLE_SIGN_ON + PLAIN, folder=tmp_path, trusted_proxies=trusted) as on,
        connecting_from("127.0.0.1") as direct,
        connecting_from("127.0.0.2") as balancer,
    ):

        async def status(client: aiohttp.ClientSession, *forwarded: str) -> int:
            headers = {"X-Forwarded-For": ", ".join(forwarded)} if forwarded else {}
            return (await call(on, client, headers, key=key_of("bob")))[0]

        assert await status(balancer, "192.0.2.7") == 200
        assert await status(balancer, "203.0.113.9", "192.0.2.7", "10.1.1.1") == 200
        assert await status(balancer, "::ffff:192.0.2.7") == 200
        with capture_logs() as logged:
            assert await status(direct, "192.0.2.7") == 401
            assert await status(direct) == 401
            assert await status(balancer) == 401
            assert await status(balancer, "192.0.2.7", "203.0.113.9") == 401
            assert await status(balancer, "192.0.2.7", "unknown") == 401
            assert await status(balancer, "unknown") == 401
        lines = [(line["address"], line["reason"]) for line in logged if line["event"] == "request"]
        assert lines == [
            ("127.0.0.1", "wrong network"),
            ("127.0.0.1", "wrong network"),
            ("127.0.0.2", "wrong network"),
            ("203.0.113.9", "wrong network"),
            ("127.0.0.2", "wrong network"),
            ("127.0.0.2", "wrong network"),
        ]
