"""What administrators could do in the page of the first version, over the admin API, and what that did wrong, right.

A running proxy on real sockets and the official SDK as its client. Each test is one row of the first version's
README: how often and how many tokens a group may use a model, windows, several groups, editing, the refusal, the log.
"""

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.admin import ADMINS, ask, change, make_quota, problem, write_notices
from tests.builders import DAY, HOUR, NOON
from tests.stage import Reply, Stage, key_of, stage

pytestmark = [pytest.mark.every_engine, pytest.mark.journey]

POLICY = (
    """
models:
  gpt-4o-mini: {upstream: simulated}
  fast: {upstream: simulated, model: gpt-4o-mini}
groups:
  staff: {}
  lab: {}
users:
  alice: {groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}
  bob: {groups: [staff, lab], keys: ["key-of-bob-0123456789abcdef"]}
"""
    + ADMINS
)
HELLO: Any = [{"role": "user", "content": "Hello"}]
NEW = {"if-none-match": "*"}
PRESETS = [("1h", HOUR), ("6h", 6 * HOUR), ("24h", DAY), ("7d", 7 * DAY), ("90s", 90_000), ("36h", 36 * HOUR)]


async def call(on: Stage, user: str = "alice", *, model: str = "fast", tokens: int = 10) -> int:
    """A call with the SDK that is answered with so many tokens. Returns what it used."""
    answer = await on.sdk(user).chat.completions.create(
        model=model, messages=HELLO, max_tokens=tokens, metadata={"simulate": f"tokens={tokens}"}
    )
    assert answer.usage is not None
    return answer.usage.total_tokens


async def refusal(on: Stage, user: str = "alice", *, model: str = "fast", tokens: int = 10) -> openai.RateLimitError:
    """The error of a call that is refused."""
    with pytest.raises(openai.RateLimitError) as caught:
        await call(on, user, model=model, tokens=tokens)
    return caught.value


async def explained(on: Stage, error: openai.RateLimitError) -> dict[str, Any]:
    """The refusal as administrators find it by the id of its request."""
    await write_notices(on)
    reply = await ask(on, "GET", f"/refusals/{error.response.headers['x-request-id']}")
    assert reply.status == 200, reply.body
    found: dict[str, Any] = reply.json()["refusal"]
    return found


# ------------------------------------------------------------------------------------------ quotas by group and model


@pytest.mark.parametrize(
    ("limits", "calls"), [({"requests": 2}, 2), ({"tokens": 32}, 2), ({"requests": 3, "tokens": 32}, 2)]
)
async def test_a_group_has_a_quota_of_tokens_of_uses_or_of_both_for_a_model(
    limits: dict[str, int], calls: int, tmp_path: Path
) -> None:
    """The one that is used up first refuses. The quota is for that model alone."""
    async with stage(POLICY, folder=tmp_path) as on:
        with pytest.raises(openai.NotFoundError):  # no quota covers it yet
            await call(on)
        await make_quota(on, "staff/fast", models=["fast"], per="6h", **limits)
        for _ in range(calls):
            assert await call(on) == 14
        error = await refusal(on, tokens=10)
        assert error.code == "insufficient_quota"
        with pytest.raises(openai.NotFoundError):
            await call(on, model="gpt-4o-mini")
        await make_quota(on, "staff/mini", models=["gpt-4o-mini"], per="6h", **limits)
        await call(on, model="gpt-4o-mini")


@pytest.mark.parametrize("fields", [{}, {"tokens": None, "requests": None}])
async def test_at_least_one_limit_is_required(fields: dict[str, None], tmp_path: Path) -> None:
    """The error names the field, and says what may be written there."""
    async with stage(POLICY, folder=tmp_path) as on:
        path = "/groups/staff/quotas/fast"
        reply = await ask(on, "PUT", path, admin="ops", headers=NEW, json={"per": "6h", **fields})
        assert (problem(reply), reply.json()["field"]) == ((422, "validation"), "tokens")
        reply = await ask(on, "PUT", path, admin="ops", headers=NEW, json={"requests": 5})
        assert (problem(reply), reply.json()["field"]) == ((422, "validation"), "per")
        assert await on.rows("quotas") == []


@pytest.mark.parametrize(("per", "length"), PRESETS)
async def test_windows_are_the_presets_or_custom(per: str, length: int, tmp_path: Path) -> None:
    """1 h, 6 h, 24 h, 7 d or any other: as `per`. A window begins with the first call in it."""
    async with stage(POLICY, folder=tmp_path) as on:
        reply = await make_quota(on, "staff/fast", requests=1, per=per)
        assert reply.json()["quota"]["fields"]["per"] == per
        assert f"per: {per}" in reply.json()["quota"]["yaml"]
        assert (await on.quota("staff/fast"))["window"]["resets_at"] is None
        on.clock.ms += 1234
        await call(on)
        window = (await on.quota("staff/fast"))["window"]
        assert (window["per"], window["kind"]) == (per, "first_call")
        [counter] = (await ask(on, "GET", "/counters?quota=staff/fast")).json()["data"]
        assert (counter["opened_at"], counter["resets_at"]) == (NOON + 1234, NOON + 1234 + length)
        await refusal(on)
        on.clock.ms = NOON + 1234 + length
        await call(on)


async def test_remaining_and_percent_are_shown(tmp_path: Path) -> None:
    """To the user and to administrators the same; also of what nobody has used yet."""
    async with stage(POLICY, folder=tmp_path) as on:
        await make_quota(on, "staff/fast", tokens=56, requests=8, per="6h")
        before = (await ask(on, "GET", "/counters?user=alice")).json()["data"]
        assert [[level["remaining"], level["percent"]] for level in before[0]["limits"]] == [[56, 0.0], [8, 0.0]]
        await call(on)
        for used in (await on.quota("staff/fast"), _levels(await ask(on, "GET", "/counters?user=alice"))):
            shown = [
                [used[name][key] for key in ("limit", "used", "remaining", "percent")]
                for name in ("tokens", "requests")
            ]
            assert shown == [[56, 14, 42, 25.0], [8, 1, 7, 12.5]]


def _levels(reply: Reply) -> dict[str, Any]:
    [counter] = reply.json()["data"]
    return {level["measure"]: level for level in counter["limits"]}


async def test_of_several_groups_the_most_generous_counts(tmp_path: Path) -> None:
    """Bob is in both groups, and has the larger quota of them and not the sum. The reset is the earlier one."""
    async with stage(POLICY, folder=tmp_path) as on:
        await make_quota(on, "staff/fast", requests=1, per="6h")
        await make_quota(on, "lab/fast", requests=3, per="1h")
        for _ in range(3):
            await call(on, "bob")
        error = await refusal(on, "bob")
        assert (await explained(on, error))["admissible_at"] == NOON + HOUR
        await call(on)
        await refusal(on)


# --------------------------------------------------------------------------------------------- changing what is there


async def test_an_edit_keeps_the_usage(tmp_path: Path) -> None:
    """And acts with the next call: raised, and lowered below what is used, when nothing remains until the reset."""
    async with stage(POLICY, folder=tmp_path) as on:
        await make_quota(on, "staff/fast", requests=1, per="6h")
        await call(on)
        await refusal(on)
        path = "/groups/staff/quotas/fast"
        assert (await change(on, "PUT", path, {"requests": 3, "per": "6h"})).status == 200
        await call(on)
        reply = await change(on, "PUT", path, {"requests": 1, "per": "6h"})
        assert reply.json()["effects"] == {"members": 2, "members_over": 1, "warnings": []}
        await refusal(on)
        level = (await on.quota("staff/fast"))["requests"]
        assert level == {"limit": 1, "used": 2, "held": 0, "remaining": 0, "percent": 200.0}


async def test_a_blank_limit_is_cleared(tmp_path: Path) -> None:
    """The first version kept the old limit. Null and a missing field mean the same."""
    async with stage(POLICY, folder=tmp_path) as on:
        await make_quota(on, "staff/fast", requests=1, tokens=1000, per="6h")
        await call(on)
        await refusal(on)
        path = "/groups/staff/quotas/fast"
        assert (await change(on, "PUT", path, {"requests": None, "tokens": 1000, "per": "6h"})).status == 200
        await call(on)
        assert (await on.quota("staff/fast"))["requests"] is None
        reply = await change(on, "PUT", path, {"requests": 2, "per": "6h"})
        assert reply.json()["quota"]["fields"]["tokens"] is None
        await refusal(on)


@pytest.mark.parametrize("unmatched", ["allow", "refuse"])
async def test_a_deleted_quota_lets_calls_pass_as_unmatched_says(unmatched: str, tmp_path: Path) -> None:
    """If nothing else covers the model. What is in flight ends as it began."""
    async with stage(f"unmatched: {unmatched}\n{POLICY}", folder=tmp_path) as on:
        await make_quota(on, "staff/fast", requests=2, per="6h")
        await call(on)
        body = {"model": "fast", "messages": HELLO, "metadata": {"simulate": "tokens=20 speed=100"}}
        in_flight = on.begin("/v1/chat/completions", body)
        while (await on.quota("staff/fast"))["requests"]["held"] == 0:
            pass
        await refusal(on)
        assert (await change(on, "DELETE", "/groups/staff/quotas/fast")).status == 200
        assert (await in_flight).status == 200
        if unmatched == "allow":
            for _ in range(3):
                await call(on)
        else:
            with pytest.raises(openai.NotFoundError):
                await call(on)
        await on.all_settled()
        await on.audit()


async def test_a_quota_that_is_made_again_within_its_window_goes_on_counting(tmp_path: Path) -> None:
    """Only a reset empties it. So nobody gets a fresh quota by accident."""
    async with stage(POLICY, folder=tmp_path) as on:
        await make_quota(on, "staff/fast", requests=1, per="6h")
        await call(on)
        assert (await change(on, "DELETE", "/groups/staff/quotas/fast")).status == 200
        await make_quota(on, "staff/fast", requests=1, per="6h")
        await refusal(on)
        reply = await ask(on, "POST", "/counters/reset", json={"quota": "staff/fast", "user": "alice"})
        assert reply.json()["quotas"][0]["used"]["requests"] == 1
        await call(on)
        [counter] = (await ask(on, "GET", "/counters?quota=staff/fast")).json()["data"]
        assert counter["resets_at"] == NOON + 6 * HOUR
        assert (await change(on, "DELETE", "/groups/staff/quotas/fast")).status == 200
        on.clock.ms += 6 * HOUR
        await make_quota(on, "staff/fast", requests=1, per="6h")
        await call(on)


@pytest.mark.parametrize("order", [["kept", "changed"], ["changed", "kept"]])
async def test_the_whole_set_of_a_group_is_saved_at_once(order: list[str], tmp_path: Path) -> None:
    """One changed, one dropped, one added and one kept: one transaction and one entry in the audit log."""
    async with stage(POLICY, folder=tmp_path) as on:
        for name in (*order, "dropped"):
            await make_quota(on, f"staff/{name}", requests=5, per="6h", models=[f"{name}-*"])
        before = len(await on.rows("audit"))
        wanted = [
            {"name": "changed", "requests": 6, "per": "1h"},
            {"name": "kept", "requests": 5, "per": "6h", "models": ["kept-*"]},
            {"name": "added", "tokens": 100, "per": "7d"},
        ]
        stale = (await ask(on, "GET", "/groups/staff/quotas")).headers["etag"]
        reply = await change(on, "PUT", "/groups/staff/quotas", {"quotas": wanted})
        assert sorted(each["name"] for each in reply.json()["data"]) == ["added", "changed", "kept"]
        [row] = (await on.rows("audit"))[before:]
        [record] = (await ask(on, "GET", "/audit?action=quotas.set")).json()["data"]
        assert (row["id"], row["target"]) == (record["id"], "staff")
        assert record["before"].keys() == {"staff/changed", "staff/kept", "staff/dropped"}
        assert record["after"]["staff/changed"] == {"requests": 6, "per": "1h"}
        assert record["after"].keys() == {"staff/changed", "staff/kept", "staff/added"}
        reply = await ask(
            on, "PUT", "/groups/staff/quotas", admin="ops", headers={"if-match": stale}, json={"quotas": []}
        )
        assert problem(reply) == (412, "precondition-failed")
        assert len((await ask(on, "GET", "/groups/staff/quotas")).json()["data"]) == 3


async def test_the_quotas_of_a_model_over_all_groups_are_saved_at_once(tmp_path: Path) -> None:
    """As the form of the first version saved them: a model, and a line for each group."""
    async with stage(POLICY, folder=tmp_path) as on:
        first = {"model": "fast", "quotas": [{"group": "staff", "requests": 1, "per": "6h"}]}
        assert (await _put_model(on, first)).status == 200
        await call(on)
        await refusal(on)
        before = len(await on.rows("audit"))
        second = {
            "model": "fast",
            "quotas": [
                {"group": "staff", "requests": 2, "per": "6h"},
                {"group": "lab", "tokens": 100, "per": "24h"},
            ],
        }
        reply = await _put_model(on, second)
        assert [(each["group"], each["fields"]["models"]) for each in reply.json()["data"]] == [
            ("staff", ["fast"]),
            ("lab", ["fast"]),
        ]
        assert len(await on.rows("audit")) == before + 1
        await call(on)
        reply = await _put_model(on, {"model": "fast", "quotas": [second["quotas"][1]]})  # type: ignore[index]
        assert [each["group"] for each in reply.json()["data"]] == ["lab"]
        with pytest.raises(openai.NotFoundError):
            await call(on)
        await call(on, "bob")
        wrong = {"model": "fast", "quotas": [{"group": "lab", "per": "6h"}]}
        assert (await _put_model(on, wrong)).status == 422
        assert [each["group"] for each in (await ask(on, "GET", "/quotas?model=fast")).json()["data"]] == ["lab"]


async def _put_model(on: Stage, body: dict[str, Any]) -> Reply:
    return await change(on, "PUT", "/quotas", body, of=f"/quotas?model={body['model']}")


# ------------------------------------------------------------------------------------------ the refusal and its time


async def test_a_refusal_says_when(tmp_path: Path) -> None:
    """In words, as an instant, and as Retry-After; and administrators find it by the id of the request."""
    async with stage(POLICY, folder=tmp_path) as on:
        await make_quota(on, "staff/fast", requests=1, per="6h")
        await call(on)
        on.clock.ms += HOUR
        error = await refusal(on)
        assert "used up: 1 of 1 requests" in error.message
        assert "(in 5h)" in error.message
        assert error.response.headers["retry-after"] == str(5 * 3600)
        body: Any = error.body
        assert (body["reset_at"], body["resets_at"]) == ("2026-11-24T18:00:00+00:00", (NOON + 6 * HOUR) // 1000)
        found = await explained(on, error)
        assert (found["user"], found["quota"], found["model"], found["at"]) == (
            "alice",
            "staff/fast",
            "fast",
            NOON + HOUR,
        )
        assert (found["used"], found["limit"], found["resets_at"]) == (1, 1, NOON + 6 * HOUR)


@pytest.mark.parametrize(
    ("quotas", "opened", "admissible"),
    [
        ({"staff/a": {"requests": 1, "per": "6h"}}, 0, 6 * HOUR),
        # Both of a group have to admit the call.
        ({"staff/a": {"requests": 1, "per": "6h"}, "staff/b": {"requests": 1, "per": "24h"}}, 0, DAY),
        # A calendar window ends at midnight, the other one 24 hours after its first call.
        ({"staff/a": {"requests": 1, "per": "day"}}, 0, 12 * HOUR),
        ({"staff/a": {"requests": 1, "per": "day"}, "staff/b": {"requests": 1, "per": "1h"}}, 0, 12 * HOUR),
        # One group is enough: the earlier one.
        ({"staff/a": {"requests": 1, "per": "6h"}, "lab/a": {"requests": 1, "per": "1h"}}, 0, HOUR),
        # The limit that is not used up does not count.
        ({"staff/a": {"tokens": 18, "requests": 100, "per": "90s"}}, 777, 777 + 90_000),
    ],
)
async def test_the_reset_told_is_the_earliest_instant_at_which_the_call_is_admitted(
    quotas: dict[str, Any], opened: int, admissible: int, tmp_path: Path
) -> None:
    """A millisecond before it the call is refused."""
    async with stage(POLICY, folder=tmp_path) as on:
        for id, fields in quotas.items():
            await make_quota(on, id, **fields)
        on.clock.ms += opened
        await call(on, "bob")
        on.clock.ms += 1000
        error = await refusal(on, "bob")
        told = (await explained(on, error))["admissible_at"]
        assert told == NOON + admissible
        asked = (await ask(on, "GET", "/explain?user=bob&model=fast")).json()
        if "tokens" not in str(quotas):  # it asks about the smallest call, for which some are left
            assert (asked["admitted"], asked["admissible_at"]) == (False, told)
        # In whole seconds, rounded up, for clients.
        body: Any = error.body
        assert 0 <= body["resets_at"] * 1000 - told < 1000
        assert int(error.response.headers["retry-after"]) == -(-(told - on.clock.ms) // 1000)
        on.clock.ms = told - 1
        await refusal(on, "bob")
        on.clock.ms = told
        assert (await ask(on, "GET", "/explain?user=bob&model=fast")).json()["admitted"] is True
        await call(on, "bob")


# ----------------------------------------------------------------------------------------------- the log of the staff


async def test_each_action_is_in_the_log_of_the_staff(tmp_path: Path) -> None:
    """Who did what when, before and after, from which address, with which request."""
    async with stage(POLICY, folder=tmp_path) as on:
        replies = [await make_quota(on, "staff/fast", requests=1, per="6h")]
        on.clock.ms += 5
        path = "/groups/staff/quotas/fast"
        replies.append(await change(on, "PUT", path, {"requests": 2, "per": "1h"}))
        replies.append(await change(on, "DELETE", path))
        found = (await ask(on, "GET", "/audit", admin="eve")).json()["data"]
        first, second = {"requests": 1, "per": "6h"}, {"requests": 2, "per": "1h"}
        assert [(row["action"], row["before"], row["after"], row["at"]) for row in found[::-1]] == [
            ("quota.set", None, first, NOON),
            ("quota.set", first, second, NOON + 5),
            ("quota.delete", second, None, NOON + 5),
        ]
        assert [row["request_id"] for row in found[::-1]] == [reply.headers["x-request-id"] for reply in replies]
        assert {(row["actor"], row["target"], row["address"]) for row in found} == {
            ("admin:ops", "staff/fast", "127.0.0.1")
        }


# --------------------------------------------------------------------------------- what the first version did wrong


@pytest.mark.parametrize("measure", ["requests", "tokens"])
async def test_at_the_limit_is_out(measure: str, tmp_path: Path) -> None:
    """The first version let one more call in when exactly the limit was used."""
    async with stage(POLICY, folder=tmp_path) as on:
        await make_quota(on, "staff/fast", per="6h", **{measure: 1000})
        used = [await call(on) for _ in range(2)]
        limit = len(used) if measure == "requests" else sum(used)
        reply = await change(on, "PUT", "/groups/staff/quotas/fast", {measure: limit, "per": "6h"})
        assert reply.json()["effects"]["members_over"] == 1
        [counter] = (await ask(on, "GET", "/counters?quota=staff/fast")).json()["data"]
        assert [(level["used"], level["remaining"]) for level in counter["limits"]] == [(limit, 0)]
        await refusal(on, tokens=1)


async def test_parallel_calls_are_exact(tmp_path: Path) -> None:
    """40 at once of which 10 fit: exactly 10, and neither more nor fewer tokens than were used."""
    async with stage(f"wait: 0s\n{POLICY}", folder=tmp_path) as on:
        await make_quota(on, "staff/fast", requests=10, per="6h")
        sdk = on.sdk()
        found = await asyncio.gather(
            *(sdk.chat.completions.create(model="fast", messages=HELLO, max_tokens=5) for _ in range(40)),
            return_exceptions=True,
        )
        assert sum(isinstance(each, openai.RateLimitError) for each in found) == 30
        assert sum(not isinstance(each, BaseException) for each in found) == 10
        await on.all_settled()
        assert (await on.quota("staff/fast"))["requests"]["used"] == 10
        await on.audit()


async def test_a_deleted_group_leaves_nothing_broken(tmp_path: Path) -> None:
    """A call in flight ends and is charged; usage, refusals, counters, lists and the log still answer."""
    async with stage(POLICY, folder=tmp_path) as on:
        assert (await ask(on, "POST", "/groups", json={"name": "art"})).status == 201
        await make_quota(on, "art/fast", requests=2, per="6h")
        assert (await ask(on, "PUT", "/groups/art/members/alice")).status == 200
        grant = {"quota": "art/fast", "measure": "requests", "amount": 1, "until": NOON + DAY, "reason": "exam"}
        assert (await ask(on, "POST", "/grants", json=grant)).status == 201
        for _ in range(2):
            await call(on)
        body = {"model": "fast", "messages": HELLO, "metadata": {"simulate": "tokens=20 speed=100"}}
        in_flight = on.begin("/v1/chat/completions", body)
        while (await on.quota("art/fast"))["requests"]["held"] == 0:
            pass
        error = await refusal(on)
        assert (await change(on, "DELETE", "/groups/art")).status == 200
        assert (await in_flight).status == 200
        await on.all_settled()
        with pytest.raises(openai.NotFoundError):
            await call(on)
        assert (await explained(on, error))["quota"] == "art/fast"
        await _nothing_is_broken(on, "art")
        usage = (await ask(on, "GET", "/usage?by=group")).json()["data"]
        assert [(row["value"], row["calls"]) for row in usage] == [("art", 3)]
        # Made again it has no members, so nobody is in it by accident.
        assert (await ask(on, "POST", "/groups", json={"name": "art"})).status == 201
        assert (await ask(on, "GET", "/groups/art/members")).json()["data"] == []
        with pytest.raises(openai.NotFoundError):
            await call(on)
        await on.audit()


async def test_a_deleted_user_leaves_nothing_broken(tmp_path: Path) -> None:
    """A call in flight ends, and what was used stays in the sums, under another name."""
    async with stage(POLICY, folder=tmp_path) as on:
        await make_quota(on, "staff/fast", requests=2, per="6h")
        assert (await ask(on, "POST", "/users", json={"id": "dora", "groups": ["staff"]})).status == 201
        key = (await ask(on, "POST", "/users/dora/keys", json={})).json()["key"]
        sdk = on.sdk(api_key=key)
        await sdk.chat.completions.create(model="fast", messages=HELLO, max_tokens=5)
        simulate = {"simulate": "tokens=20 speed=100"}
        in_flight = asyncio.ensure_future(
            sdk.chat.completions.create(model="fast", messages=HELLO, metadata=simulate)
        )
        while not (await ask(on, "GET", "/calls")).json()["data"]:
            pass
        with pytest.raises(openai.RateLimitError):
            await sdk.chat.completions.create(model="fast", messages=HELLO)
        reply = await _forget(on, "dora")
        assert reply.status == 200, reply.body
        await in_flight
        await on.all_settled()
        with pytest.raises(openai.AuthenticationError):
            await sdk.chat.completions.create(model="fast", messages=HELLO)
        await _nothing_is_broken(on, "staff")
        usage = (await ask(on, "GET", "/usage?by=user")).json()["data"]
        assert sum(row["calls"] for row in usage) == 2
        assert "dora" not in str(usage)
        await on.audit()


async def _forget(on: Stage, user: str) -> Reply:
    return await change(on, "POST", f"/users/{user}/forget", of=f"/users/{user}")


async def _nothing_is_broken(on: Stage, group: str) -> None:
    """Every list and report answers, also with the group's name as a filter."""
    for path in (
        "/groups",
        "/quotas",
        f"/quotas?group={group}",
        "/grants?ended=true",
        "/counters",
        f"/counters?group={group}",
        "/counters?user=alice",
        "/attention",
        "/refusals",
        "/calls",
        "/usage?by=user",
        f"/usage?by=model&group={group}",
        "/usage?by=key&format=csv",
        "/users",
        "/keys",
        "/audit",
        "/policy",
        "/explain?user=alice&model=fast",
    ):
        reply = await ask(on, "GET", path)
        is_gone = reply.status == 404 and group == "art" and f"={group}" in path
        assert reply.status == 200 or is_gone, (path, reply.status, reply.body)
    assert (await on.get("/v1/quota")).status == 200
    assert key_of("alice") not in str(await on.rows("audit"))
