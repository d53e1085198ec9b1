"""Reports are the sums of the calls, whatever of them the roll-up has counted, on both engines."""

import random
from dataclasses import astuple

import pytest
import sqlalchemy as sa

from proxy.ledger import schema
from proxy.ledger.book import Expire, Release, Reserve, Settle
from proxy.ledger.entry import CallLabels, call_id_prefix
from proxy.ledger.queries import (
    DIMENSIONS,
    Asked,
    Used,
    by_time_or_tokens,
    ledger_now,
    oldest_call,
    read_counters,
    usage,
    used_of,
)
from proxy.ledger.schema import calls
from proxy.policy.amounts import AtLeast, Exactly, Measure, Tokens, Unspent
from tests.builders import DAY, HOUR, NOON, binding, call, counters, group_quotas, quota

LARGE = quota("staff/daily", tokens=10**9)
MIDNIGHT = NOON - DAY // 2
SUMS = "requests input_tokens output_tokens cached_tokens reasoning_tokens".split()
COLUMNS = {"user": "user_name", "group": "through", "model": "model", "key": "key_id", "tag": "tag"}


def reserve(number: int, at: int, *, user="ann", model="small", key="", tag="") -> Reserve:
    """A call of this user that arrives at this instant."""
    labels, who = CallLabels(user, model, "chat", "openai", key, tag), binding([LARGE], user=user)
    return Reserve(f"{call_id_prefix(at)}{number:020x}", "process-1", labels, who, call(100, 400))


async def ended_calls(store) -> list[dict]:
    """The rows of all calls that have ended."""
    async with store.transaction() as connection:
        rows = (await connection.execute(calls.select().where(calls.c.state != "open"))).mappings().all()
    return [dict(row) for row in rows]


def expected(rows, by, where) -> dict:
    """The sums, call by call."""
    sums: dict = {}
    for row in rows:
        of = {name: row[column] or "" for name, column in COLUMNS.items()}
        of |= {"day": row["reserved_at"] // DAY * DAY, "hour": row["reserved_at"] // HOUR * HOUR}
        if all(of[name] == value for name, value in where.items()):
            one = Used(1, *(row[name] or 0 for name in SUMS), int(row["provenance"] == "at_least"))
            sums[of[by]] = sums.get(of[by], Used()) + one
    return sums


async def report(store, by, where=None, since=0, **more) -> dict:
    async with store.transaction() as connection:
        return await usage(connection, by, Asked(since, where=where or {}, **more))


@pytest.mark.parametrize("seed", range(3))
async def test_every_report_is_the_sum_of_its_calls(store, seed):
    """Calls that are counted, not counted yet, and counted with their hold before they were settled."""
    rng = random.Random(seed)
    for round_number in range(6):
        at = NOON - rng.randrange(3) * DAY
        reserved = []
        for number in range(12):
            names = {"user": rng.choice("ab"), "model": rng.choice("xyz"), "key": rng.choice(["", "k1", "k2"])}
            one = reserve(100 * round_number + number, at, tag=rng.choice(["", "ci"]), **names)
            reserved.append(one)
        await store.apply(reserved, at)
        tokens = Tokens(rng.randrange(90), rng.randrange(60), 3, 2)
        ends = [Settle(each.id, Exactly(tokens), "complete") for each in reserved[:4]]
        ends += [Settle(each.id, AtLeast(tokens), "client_left") for each in reserved[4:6]]
        ends += [Settle(reserved[6].id, Unspent(1), "rejected"), Release(reserved[7].id)]
        await store.apply([*ends, *(Expire(each.id) for each in reserved[8:11])], at)
        if rng.random() < 0.7:
            await store.roll_up(rng.choice([5, 1000]), None)
        await store.apply([Settle(reserved[8].id, Exactly(tokens), "complete")], at)
    rows = await ended_calls(store)
    for by in DIMENSIONS:
        for where in ({}, {"user": "a"}, {"model": "x", "group": "staff"}, {"key": "k1"}, {"tag": ""}):
            found = {value: used for value, used in (await report(store, by, where)).items() if any(astuple(used))}
            assert found == expected(rows, by, where), (by, where)


# PostgreSQL goes by its own clock, so these two set the time of SQLite.
@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
async def test_a_report_begins_with_a_day(store):
    """Sums of days can't be divided, so the day in which the period begins is in it as a whole."""
    for number, at in enumerate((MIDNIGHT - 1, MIDNIGHT, NOON)):
        one = reserve(number, at, key="k1")
        await store.apply([one, Settle(one.id, Exactly(Tokens(1, 1)), "complete")], at)
    for by in ("model", "key"):
        assert [used.calls for used in (await report(store, by, since=NOON)).values()] == [2]
    await store.roll_up(1000, None)
    assert [used.calls for used in (await report(store, "model", since=NOON)).values()] == [2]


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
async def test_a_report_ends_with_a_day_and_by_hour_with_an_hour(store):
    """Sums of days and calls that are not counted yet end at the same instant."""
    for number, at in enumerate((NOON, NOON + HOUR - 1, NOON + HOUR, MIDNIGHT + DAY - 1, MIDNIGHT + DAY)):
        one = reserve(number, at)
        await store.apply([one, Settle(one.id, Exactly(Tokens(1, 1)), "complete")], at)
    for _ in range(2):
        assert [used.calls for used in (await report(store, "user", until=NOON)).values()] == [4]
        assert [used.calls for used in (await report(store, "user", until=MIDNIGHT)).values()] == []
        by_hour = await report(store, "hour", since=NOON + 1, until=NOON + HOUR + 1)
        assert {hour: used.calls for hour, used in by_hour.items()} == {NOON: 2, NOON + HOUR: 1}
        await store.roll_up(1000, None)


async def test_a_report_of_some_groups_has_what_they_admitted_alone_or_together(store):
    """With `every_group` a call is admitted by several; one whose name contains another is not meant."""
    lab = quota("lab/daily", tokens=10**9)
    staff2, many = (group_quotas(name, quota(f"{name}/daily", tokens=10**9)) for name in ("staff2", "my_staff"))
    for number, who in enumerate(
        [binding([LARGE]), binding([lab], [LARGE], combine="every_group"), binding([lab]), binding(staff2, many)]
    ):
        labels = CallLabels("ann", "small", "chat", "openai")
        one = Reserve(f"{call_id_prefix(NOON)}{number:020x}", "process-1", labels, who, call(100, 400))
        await store.apply([one, Settle(one.id, Exactly(Tokens(1, 1)), "complete")], NOON)
    for groups, expected_calls in ((["staff"], 2), (["staff", "lab"], 3), ([], 0), (None, 4), (["st_ff"], 0)):
        found = await report(store, "model", groups=groups)
        assert sum(used.calls for used in found.values()) == expected_calls, groups
        await store.roll_up(1, None)


async def test_the_clock_of_the_ledger_is_that_of_the_database(store):
    """On SQLite it is that of the process."""
    async with store.transaction() as connection:
        now = await ledger_now(connection, lambda: NOON)
        is_sqlite = connection.dialect.name == "sqlite"
    assert (now == NOON) is is_sqlite
    if not is_sqlite:
        assert now == pytest.approx(await store.renew("process-1", 0, lease_ms=1), abs=5000)


async def test_counters_are_read_by_their_keys(store):
    """Those that are not there are not in the result."""
    one, other = reserve(1, NOON), reserve(2, NOON, user="bob")
    await store.apply([one, other], NOON)
    async with store.transaction() as connection:
        found = await read_counters(connection, [LARGE.key_for("ann"), LARGE.key_for("zoe")])
        assert await read_counters(connection, []) == {}
    assert found == await store.read_counters([LARGE.key_for("ann")])
    assert found.keys() == counters(binding([LARGE]), used={LARGE.id: 1}).keys()


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
async def test_the_oldest_call_says_how_far_back_keys_can_be_asked_for(store):
    """None without calls."""
    async with store.transaction() as connection:
        assert await oldest_call(connection) is None
    await store.apply([reserve(2, NOON), reserve(1, MIDNIGHT)], NOON)
    async with store.transaction() as connection:
        assert await oldest_call(connection) == NOON


def test_reports_are_sorted_by_time_or_by_tokens():
    """Days come in their order whatever was used; of users with equal tokens the names decide."""
    days = [(NOON + DAY, Used(input_tokens=5)), (NOON, Used())]
    users = [("zoe", Used(input_tokens=2)), ("bob", Used(output_tokens=3)), ("ann", Used(1, 1, 1, 1))]
    assert [value for value, _ in sorted(days, key=by_time_or_tokens)] == [NOON, NOON + DAY]
    assert [value for value, _ in sorted(users, key=by_time_or_tokens)] == ["bob", "ann", "zoe"]


async def test_what_a_counter_has_used_is_read_by_measure(store):
    """Tokens are the sum of input and output."""
    used = {"used_input": 100, "used_output": 20, "used_requests": 3}
    held = dict.fromkeys(("held_input", "held_output", "held_requests"), 7)
    row = {"subject": "user:ann", "quota_id": "staff/daily", "opened_at": NOON, "resets_at": NOON + DAY}
    async with store.transaction() as connection:
        await connection.execute(schema.counters.insert().values(**row, **used, **held))
        found = (await connection.execute(sa.select(*map(used_of, Measure)))).one()
    assert dict(zip(Measure, found, strict=True)) == {
        Measure.TOKENS: 120,
        Measure.INPUT_TOKENS: 100,
        Measure.OUTPUT_TOKENS: 20,
        Measure.REQUESTS: 3,
    }
