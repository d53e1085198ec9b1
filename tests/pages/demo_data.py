"""A company whose use of the proxy looks real: forty people, six groups, and a month of usage.

    async with demo(folder) as on:           # a stage, on the real clock
        ...                                  # at on.admin_url and on.url; calls are made all the time

It is written in two steps. What lies in the past is inserted into the tables before the server starts: usage,
counters that have crossed 80 %, refusals of the last hour, the audit log. What an administrator does, and what users
do now, is done through the APIs: groups and quotas beside those of the file, users and keys, grants, refused calls,
slow streams. Until the end one upstream fails every call and so stays in cooldown. The seed is the same each
time, so the numbers are too.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from proxy.ledger import schema
from proxy.policy.policy import EVERYONE
from proxy.policy.quota import Quota
from proxy.policy.windows import Window
from proxy.server import store_of, wall_clock_ms
from tests.admin import ADMINS, ask, change, make_quota
from tests.builders import DAY, HOUR, MINUTE
from tests.sqlite import write_migrated
from tests.stage import Stage, config_of, key_of, sqlite_in, stage

_SEED = 17
_DAYS = 30
_MODELS = {"gpt-4o-mini": 50, "gpt-4o": 25, "llama-3.3-70b": 15, "o4-mini": 10}  # by their share of the calls

PEOPLE = {
    "engineering": "alice ben chloe daniel elena farid greta hannah ivan jonas katja liam".split(),
    "research": "maya nils olivia pavel quentin rosa samir tove".split(),
    "support": "ulrike victor wanda xavier yara zoe anton bea".split(),
    "marketing": "carlos dana emil fatima".split(),
    "contractors": "gustav helena igor".split(),
}
# These are made at run time, in the database.
HIRED = {
    "judith": "pilots",
    "kenji": "pilots",
    "lara": "engineering",
    "mateo": "support",
    "build-server": "engineering",
}
# How much of which quota they have used. Of whom nothing is said, it is between 5 % and 70 %.
_USED = {
    ("alice", "engineering/daily"): 0.86,
    ("farid", "engineering/daily"): 1,
    ("hannah", "engineering/frontier"): 0.93,
    ("liam", "engineering/frontier"): 1,
    ("pavel", "research/weekly"): 0.81,
    ("zoe", "support/hourly"): 1,
    ("victor", "support/hourly"): 0.97,
    ("igor", "contractors/daily"): 0.9,
}
_FILE_USERS = "".join(
    f'  {user}: {{groups: [{group}], keys: [{{key: "{key_of(user)}", label: laptop}}]}}\n'
    for group, users in PEOPLE.items()
    for user in users
)
# The first lines belong to `upstreams` of the stage's file. Nothing listens on that port.
POLICY = f"""
  gpu-room: {{base_url: "http://127.0.0.1:9/v1", kind: vllm}}
timezone: Europe/Berlin
wait: 1s
help: "https://llm.example/usage · #llm-help"
models:
  gpt-4o-mini: {{upstream: simulated, max_output_tokens: 4000}}
  gpt-4o: {{upstream: simulated, max_output_tokens: 4000}}
  o4-mini: {{upstream: simulated, max_output_tokens: 4000}}
  llama-3.3-70b:
    upstreams: [{{upstream: gpu-room, weight: 4}}, {{upstream: simulated, model: gpt-4o-mini, weight: 1}}]
    max_output_tokens: 4000
groups:
  everyone: {{quotas: {{calls: {{requests: 5000, per: day}}}}}}
  engineering:
    quotas:
      daily: {{tokens: 500k, per: day}}
      frontier: {{models: [gpt-4o, o4-mini], input_tokens: 400k, output_tokens: 100k, requests: 200, per: 6h}}
  research:
    quotas:
      weekly: {{tokens: 5M, per: week}}
      planned: {{tokens: 200k, per: day, enforce: shadow}}
  support: {{quotas: {{hourly: {{tokens: 50k, per: 1h}}}}}}
  marketing:
    quotas:
      pot: {{tokens: 20M, per: month, shared: true}}
      campaign: {{models: [gpt-4o], requests: 300, per: 7d, shared: true}}
  contractors: {{models: [gpt-4o-mini], quotas: {{daily: {{tokens: 20k, requests: 100, per: day}}}}}}
users:
{_FILE_USERS}{ADMINS}"""

Row = dict[str, object]


@asynccontextmanager
async def demo(folder: Path) -> AsyncIterator[Stage]:
    """A stage with the company at work. It takes a few seconds to start."""
    write_migrated(folder / "quotas.db")
    await _write_past(folder, wall_clock_ms())
    async with stage(POLICY, folder=folder, clock=wall_clock_ms) as on:
        keys = await _administer(on)
        await _call_now(on)
        loop = asyncio.get_running_loop()
        working = [loop.create_task(_work(on, keys)), loop.create_task(_fail(on))]
        try:
            yield on
        finally:
            for task in working:
                task.cancel()
            await asyncio.wait(working)


# ---------------------------------------------------------------------------------------------------------- the past


async def _write_past(folder: Path, now: int) -> None:
    chance = random.Random(_SEED)
    config = config_of(POLICY, folder=folder, upstream="http://127.0.0.1:9/v1")
    quotas = config.policy.quotas
    calls = [*_calls(chance, now)]
    counters = [*_counters(chance, quotas, now)]
    tables = (
        (schema.calls, calls),
        (schema.usage_by_day, [*_days(chance, calls, now)]),
        (schema.counters, counters),
        (schema.crossings, [*_crossings(quotas, counters, now)]),
        (schema.refusals, [*_refusals(chance, quotas, counters, now)]),
        (schema.audit, [*_audit(now)]),
    )
    store = store_of(sqlite_in(folder))
    await store.open()
    async with store.transaction(writes=True) as connection:
        for table, rows in tables:
            await connection.execute(sa.insert(table), rows)
        # Ids in the audit log are made of the version, which each change raises.
        await connection.execute(sa.update(schema.directory).values(version=len(_CHANGES)))
    await store.close()


def _everybody() -> Iterator[tuple[str, str]]:
    """Each user of the file, with the group."""
    return ((user, group) for group, users in PEOPLE.items() for user in users)


def _calls(chance: random.Random, now: int) -> Iterator[Row]:
    """Calls of the last two days, more of them in working hours."""
    numbers = count()
    for user, group in _everybody():
        for _ in range(chance.randint(10, 60)):
            at = now - chance.randint(HOUR, 2 * DAY)
            if not 7 <= at % DAY // HOUR <= 18 and chance.random() < 0.85:
                continue
            model = "gpt-4o-mini" if group == "contractors" else _model(chance)
            input_tokens, output_tokens = chance.randint(200, 9000), chance.randint(50, 1500)
            yield {
                **{"id": f"req_{at:012x}{next(numbers):020x}", "owner": "proxy-gone", "state": "settled"},
                **{"user_name": user, "model": model, "endpoint": "chat", "upstream": "simulated"},
                **{"through": group, "reserved_at": at, "ended_at": at + chance.randint(500, 20_000)},
                **{"hold_input": input_tokens, "hold_output": 4000, "lines": "[]", "would_refuse": "[]"},
                **{"input_tokens": input_tokens, "output_tokens": output_tokens, "requests": 1},
                **{"cached_tokens": input_tokens // 3, "reasoning_tokens": 0, "outcome": "complete"},
                **{"provenance": "exactly", "counted_as": "settled", "key_id": f"of-{user}", "tag": ""},
            }


def _model(chance: random.Random) -> str:
    [model] = chance.choices([*_MODELS], [*_MODELS.values()])
    return model


def _days(chance: random.Random, calls: list[Row], now: int) -> Iterator[Row]:
    """The sums of the last days: of the recorded calls, and before them of calls whose records were deleted."""
    sums: dict[tuple[int, str, str, str], list[int]] = defaultdict(lambda: [0] * 5)
    for call in calls:
        at, user, group, model = (call[name] for name in ("reserved_at", "user_name", "through", "model"))
        used = [1, *(call[name] for name in ("requests", "input_tokens", "output_tokens", "cached_tokens"))]
        key = (at // DAY * DAY, user, group, model)
        sums[key] = [a + b for a, b in zip(sums[key], used, strict=True)]
    for age in range(3, _DAYS):
        day = (now // DAY - age) * DAY
        is_weekend = (day // DAY + 3) % 7 >= 5
        for user, group in _everybody():
            if chance.random() < (0.85 if is_weekend else 0.25):
                continue
            for model in {"gpt-4o-mini"} if group == "contractors" else {_model(chance): 0, _model(chance): 0}:
                number = round(chance.randint(3, 40) * (1.5 - age / _DAYS))
                input_tokens = number * chance.randint(1000, 5000)
                output_tokens = number * chance.randint(150, 700)
                sums[(day, user, group, model)] = [number, number, input_tokens, output_tokens, input_tokens // 3]
    names = ("calls", "requests", "input_tokens", "output_tokens", "cached_tokens")
    for (day, user, group, model), used in sums.items():
        row: Row = {"day": day, "user_name": user, "through": group, "model": model}
        yield row | dict(zip(names, used, strict=True)) | {"reasoning_tokens": 0, "estimated": 0}


def _window(quota: Quota, now: int) -> Window:
    """The window that is open now. One that begins with a call began some time ago."""
    opened = quota.per.opening(now)
    if opened.opened_at != now:
        return opened
    return quota.per.opening(now - (opened.resets_at - now) // 3)


def _counters(chance: random.Random, quotas: Mapping[str, Quota], now: int) -> Iterator[Row]:
    for quota in quotas.values():
        users = [user for user, group in _everybody() if quota.group in (group, EVERYONE)]
        for user in [""] if quota.shared else users:
            part = _USED.get((user, quota.id), chance.uniform(0.05, 0.7))
            yield _counter(quota, user, _pace(quota, now) if quota.shared else part, now)


def _pace(quota: Quota, now: int) -> float:
    """So large a part that the pot runs out before its reset."""
    window = _window(quota, now)
    return max(0.3, min(0.96, 1.35 * (now - window.opened_at) / (window.resets_at - window.opened_at)))


def _counter(quota: Quota, user: str, part: float, now: int) -> Row:
    window, (subject, quota_id) = _window(quota, now), quota.key_for(user)
    maxima = {limit.measure.value: limit.maximum for limit in quota.window_limits}
    tokens = maxima.get("tokens", 0)
    is_of_requests = set(maxima) == {"requests"}
    used_input = round(part * (tokens * 0.75 or maxima.get("input_tokens", 0) * 0.8))
    used_output = round(part * tokens) - used_input if tokens else round(part * maxima.get("output_tokens", 0))
    return {
        **{"subject": subject, "quota_id": quota_id, "opened_at": window.opened_at, "resets_at": window.resets_at},
        **{"used_input": used_input, "used_output": used_output},
        "used_requests": round(part * (1 if is_of_requests else 0.6) * maxima.get("requests", 130)),
        **{"held_input": 0, "held_output": 0, "held_requests": 0},
    }


def _crossings(quotas: Mapping[str, Quota], counters: list[Row], now: int) -> Iterator[Row]:
    """Of the counters that have crossed 80 %."""
    crossed = {quotas[id].key_for(user): part for (user, id), part in _USED.items()}
    crossed |= {quota.key_for(""): _pace(quota, now) for quota in quotas.values() if quota.shared}
    for row in counters:
        part = crossed.get((row["subject"], row["quota_id"]), 0)
        if part >= 0.8:
            kept = {name: row[name] for name in ("subject", "quota_id", "opened_at", "resets_at")}
            yield kept | {"level": 100 if part >= 1 else 80, "crossed_at": now - 40 * MINUTE}


def _refusals(chance: random.Random, quotas: Mapping[str, Quota], counters: list[Row], now: int) -> Iterator[Row]:
    """Of the last hour, those of everybody whose quota is used up."""
    by_key = {(row["subject"], row["quota_id"]): row for row in counters}
    numbers = count()
    for user, quota in ((user, quotas[id]) for (user, id), part in _USED.items() if part >= 1):
        counter, limit = by_key[quota.key_for(user)], quota.window_limits[0]
        for _ in range(chance.randint(3, 12)):
            at = now - chance.randint(2 * MINUTE, 55 * MINUTE)
            yield {
                **{"request_id": f"req_{at:012x}{next(numbers):020x}", "at": at, "user_name": user},
                **{"quota_id": quota.id, "model": "gpt-4o", "endpoint": "chat", "verdict": "exhausted"},
                **{"measure": limit.measure.value, "maximum": limit.maximum, "used": limit.maximum, "held": 0},
                **{"needed": chance.randint(100, 5000), "resets_at": counter["resets_at"]},
                **{"admissible_at": counter["resets_at"], "count": chance.randint(1, 4)},
            }


_CHANGES = (
    (26, "ops", "quota.set", "engineering/daily", '{"tokens": "300k"}', '{"tokens": "500k"}'),
    (19, "ops", "admin_key.create", "max", None, '{"role": "manager", "groups": ["staff"]}'),
    (12, "max", "counters.reset", "quentin", '{"research/weekly": {"tokens": 4980211}}', '{"research/weekly": {}}'),
    (6, "ops", "quota.set", "support/hourly", '{"tokens": "40k", "per": "1h"}', '{"tokens": "50k", "per": "1h"}'),
    (2, "max", "counters.reset", "tove", '{"research/weekly": {"tokens": 5000000}}', '{"research/weekly": {}}'),
)


def _audit(now: int) -> Iterator[Row]:
    for number, (days, actor, action, target, before, after) in enumerate(_CHANGES):
        row: Row = {"id": f"aud_{number:016x}", "at": now - days * DAY - 3 * HOUR, "actor": f"admin:{actor}"}
        row |= {"action": action, "target": target, "before": before, "after": after}
        yield row | {"address": "192.0.2.14", "request_id": f"req_{now - days * DAY:012x}{number:020x}"}


# -------------------------------------------------------------------------------------------------------- the present


async def _administer(on: Stage) -> dict[str, str]:
    """What administrators have made beside the file. Returns the keys of who was hired."""
    await _make(on, "/groups", name="pilots")
    await make_quota(on, "pilots/trial", requests=200, tokens="100k", per="day")
    await make_quota(on, "engineering/weekend", models=["llama-*"], tokens="2M", per="week")
    await make_quota(on, "support/next-year", tokens="30k", per="1h", enforce="shadow")
    keys = {}
    for user, group in HIRED.items():
        is_service = user == "build-server"
        more = {} if is_service else {"email": f"{user}@example.org"}
        await _make(on, "/users", id=user, groups=[group], is_service=is_service, **more)
        for label in ("CI", "release") if is_service else ("laptop",):
            keys[user] = (await _make(on, f"/users/database:{user}/keys", label=label))["key"]
    old = await _make(on, "/users/file:alice/keys", label="old notebook")
    await change(on, "POST", f"/keys/{old['id']}/revoke", {}, of=f"/keys/{old['id']}")
    await _make(on, "/users/file:alice/keys", label="notebook", expires_at=wall_clock_ms() + 60 * DAY)
    await change(on, "POST", "/users/database:mateo/disable", {}, of="/users/database:mateo")
    until = wall_clock_ms() + DAY
    await _make(
        on, "/grants", **_grant("research/weekly", "pavel", "tokens", 500_000, until, "a paper is due on Friday")
    )
    await _make(
        on, "/grants", **_grant("engineering/daily", "greta", "tokens", 250_000, until, "migration of the shop")
    )
    await _make(on, "/grants", **_grant("contractors/daily", None, "tokens", 10_000, until, "the trade fair"))
    return keys


def _grant(quota: str, user: str | None, measure: str, amount: int, until: int, reason: str) -> dict[str, Any]:
    return {"quota": quota, "user": user, "measure": measure, "amount": amount, "until": until, "reason": reason}


async def _make(on: Stage, path: str, **body: object) -> dict[str, Any]:
    reply = await ask(on, "POST", path, json=body)
    assert reply.status in (200, 201), reply.body
    made: dict[str, Any] = reply.json()
    return made


async def _call_now(on: Stage) -> None:
    """Streams that last for minutes, and calls that are refused."""
    for number, user in enumerate(("alice", "ben", "elena", "maya", "rosa", "wanda", "dana", "helena")):
        model = "gpt-4o-mini" if number % 3 else ("o4-mini", "gpt-4o")[number % 2]
        model = "gpt-4o-mini" if user == "helena" else model
        response = await on.http.post(
            f"{on.url}/v1/chat/completions",
            json=_body(model, f"tokens=3900 speed={3 + number}", stream=True),
            headers={"authorization": f"Bearer {key_of(user)}"},
        )
        on.streams.append(response)
        assert response.status == 200, await response.text()
    for user, model, times in (("farid", "gpt-4o-mini", 4), ("liam", "gpt-4o", 2), ("zoe", "gpt-4o-mini", 7)):
        for _ in range(times):
            assert (await _call(on, user, model)) == 429, user


def _body(model: str, simulate: str, **more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": "Summarize the minutes of the meeting."}]
    return {"model": model, "messages": messages, "metadata": {"simulate": simulate}, **more}


async def _call(on: Stage, user: str, model: str, *, key: str = "", tokens: int = 20) -> int:
    headers = {"authorization": f"Bearer {key or key_of(user)}"}
    return (
        await on.post("/v1/chat/completions", _body(model, f"tokens={tokens}"), headers=headers, user=None)
    ).status


async def _work(on: Stage, keys: Mapping[str, str]) -> None:
    """Call as one of the people, some times a second, until the end."""
    chance = random.Random(_SEED)
    people = [(user, "", group) for user, group in _everybody()]
    people += [(user, key, HIRED[user]) for user, key in keys.items() if user != "mateo"]
    while True:
        user, key, group = chance.choice(people)
        model = "gpt-4o-mini" if group == "contractors" else _model(chance)
        await _call(on, user, model, key=key, tokens=chance.randint(10, 200))
        await asyncio.sleep(0.3)


async def _fail(on: Stage) -> None:
    """Call often enough that the upstream on which nothing listens is in cooldown."""
    while True:
        await _call(on, "olivia", "llama-3.3-70b", tokens=1)
        await asyncio.sleep(0.5)
