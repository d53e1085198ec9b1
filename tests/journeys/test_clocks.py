"""The clock of a replica differs from the database's: what a client is told goes by the clock that decided.

T75 clocks of replicas that differ · I12 jumps of a clock

The stage's clock is the process's. On PostgreSQL the database's clock is ahead of it by what each test says, or
behind it, and decides. On SQLite the process's clock decides, so nothing may change there.
"""

import asyncio
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from proxy.policy.windows import rfc3339
from tests import stage as stages
from tests.builders import DAY, HOUR, MINUTE, NOON
from tests.stage import Clock, stage

MODELS = """
models:
  fast: {upstream: simulated, max_output_tokens: 100}
users:
  alice: {groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}
groups:
"""
CALL = {"model": "fast", "messages": [{"role": "user", "content": "Hello"}]}
OFFSETS = [-300_000, 0, 300_000]
PATH = "/v1/chat/completions"


def policy(per: str) -> str:
    """One request in each of these windows."""
    return MODELS + f"  staff: {{quotas: {{calls: {{requests: 1, per: {per}}}}}}}\n"


def at(decider: int, ahead_ms: int) -> Clock:
    """A clock of a process whose deciding clock shows `decider`, on either engine."""
    is_postgres = stages.ENGINE == "postgresql"
    return Clock(decider - ahead_ms, database_ahead_ms=ahead_ms) if is_postgres else Clock(decider)


@pytest.mark.every_engine
@pytest.mark.parametrize("ahead_ms", OFFSETS)
async def test_a_rate_limit_says_when_to_come_back_by_the_clock_that_decided(tmp_path: Path, ahead_ms: int) -> None:
    """T75: 20 s before the end of a minute: 20 s, and not 1 or 320. After that time the call is admitted."""
    clock = at(NOON + 40_000, ahead_ms)
    async with stage(policy("minute"), folder=tmp_path, clock=clock) as on:
        assert (await on.post(PATH, CALL)).status == 200
        reply = await on.post(PATH, CALL)
        assert (reply.status, reply.headers["retry-after"]) == (429, "20")
        assert "x-should-retry" not in reply.headers
        assert reply.error["retry_after"] == 20
        assert reply.error["resets_at"] == (NOON + MINUTE) // 1000
        assert reply.error["code"] == "rate_limit_exceeded"
        assert "(in 20s)" in reply.error["message"]
        assert reply.headers["x-ratelimit-reset-requests"] == "20s"
        assert reply.headers["ratelimit"] == '"staff/calls";r=0;t=20'
        clock.ms += 20_000
        assert (await on.post(PATH, CALL)).status == 200


@pytest.mark.every_engine
@pytest.mark.parametrize("ahead_ms", OFFSETS)
async def test_a_long_wait_is_told_by_the_clock_that_decided(tmp_path: Path, ahead_ms: int) -> None:
    """T75: two minutes before midnight: 120 s and no retry, and not a rate limit of 1 s."""
    decider = NOON + 12 * HOUR - 2 * MINUTE
    async with stage(policy("day"), folder=tmp_path, clock=at(decider, ahead_ms)) as on:
        await on.post(PATH, CALL)
        reply = await on.post(PATH, CALL)
        assert (reply.headers["retry-after"], reply.headers["x-should-retry"]) == ("120", "false")
        assert reply.error["reset_at"] == rfc3339(NOON + 12 * HOUR, on.config.policy.zone)


@pytest.mark.every_engine
@pytest.mark.parametrize("ahead_ms", OFFSETS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_the_headers_of_an_answer_go_by_the_clock_that_decided(
    tmp_path: Path, ahead_ms: int, stream: bool
) -> None:
    """T75: an answer that is admitted 20 s before the window's end says 20 s."""
    async with stage(policy("minute"), folder=tmp_path, clock=at(NOON + 40_000, ahead_ms)) as on:
        reply = await on.post(PATH, {**CALL, "stream": stream})
        assert reply.status == 200
        assert reply.headers["x-ratelimit-reset-requests"] == "20s"
        assert reply.headers["x-ratelimit-remaining-requests"] == str(int(stream))  # without its own hold
        assert reply.headers["ratelimit"] == f'"staff/calls";r={int(stream)};t=20'


@pytest.mark.every_engine
@pytest.mark.parametrize("ahead_ms", OFFSETS)
async def test_the_list_of_quotas_goes_by_the_clock_that_decides(tmp_path: Path, ahead_ms: int) -> None:
    """T75: before a call, in its window, and after the window's end. Records have its time, and so has their id."""
    clock = at(NOON + 40_000, ahead_ms)
    async with stage(policy("minute"), folder=tmp_path, clock=clock) as on:
        window = (await on.quota("staff/calls"))["window"]
        assert (window["opened_at"], window["resets_at"]) == (NOON // 1000, (NOON + MINUTE) // 1000)
        reply = await on.post(PATH, CALL)
        assert int(reply.headers["x-request-id"][4:16], 16) == NOON + 40_000
        [row] = await on.rows("calls")
        assert row["reserved_at"] == NOON + 40_000
        assert (await on.quota("staff/calls"))["requests"]["used"] == 1
        clock.ms += 20_000
        shown = await on.quota("staff/calls")
        assert (shown["requests"]["used"], shown["window"]["opened_at"]) == (0, (NOON + MINUTE) // 1000)


async def test_old_records_are_deleted_by_the_clock_that_stamped_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T75: a replica that is 40 days ahead deletes no call of today, with `keep: {calls: 30d}`."""
    monkeypatch.setattr("tests.stage.ENGINE", "postgresql")
    keep = "keep: {calls: 30d, days: 90d}\n"
    async with stage(keep + policy("day"), folder=tmp_path, clock=at(NOON, -40 * DAY)) as on:
        await on.post(PATH, CALL)
        await on.all_settled()
        await on.server.rollup.run()
        assert len(await on.rows("calls")) == 1


@pytest.mark.parametrize("ahead_ms", OFFSETS)
async def test_the_offset_is_a_metric_and_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_ms: int
) -> None:
    """T75: with its sign, however many calls are made. Nothing is logged if the clocks agree."""
    monkeypatch.setattr("tests.stage.ENGINE", "postgresql")
    with capture_logs() as logged:
        async with stage(policy("minute"), folder=tmp_path, clock=at(NOON, ahead_ms)) as on:
            await asyncio.gather(*(on.post(PATH, CALL) for _ in range(5)))
            await on.server.ledger.renew_lease()
            async with on.http.get(f"{on.admin_url}/metrics") as response:
                text = await response.text()
    assert f"\nllm_quota_ledger_clock_offset_seconds {ahead_ms / 1000:.1f}\n" in text
    warnings = [line for line in logged if line["log_level"] == "warning" and "clock" in line["event"]]
    assert [line["database_ahead_s"] for line in warnings] == ([ahead_ms / 1000] if ahead_ms else [])
