"""What the metrics say of a running proxy, and that the dashboard and the alerts ask for nothing else."""

import asyncio
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.audit import connected
from tests.exposition import NAME, Metrics, scrape
from tests.stage import Stage, config_of, stage, until

CONFIG = Path(__file__).parents[2] / "config"
DASHBOARD = CONFIG / "grafana" / "llm-quota-proxy.json"
ALERTS = CONFIG / "prometheus" / "alerts.yml"
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
CHAT = "/v1/chat/completions"

pytestmark = pytest.mark.journey

# The server behind `box` is down. The interns have two calls a day.
POLICY = """
  box: {{base_url: "http://127.0.0.1:1/v1"}}
  vault: {{base_url: "http://127.0.0.1:1/v1", api_key: {{command: ["false"]}}}}
retry_for: 0s
models:
  small: {{upstream: simulated, model: gpt-4o-mini, max_output_tokens: 50, smallest_answer: 40}}
  big: {{upstream: box, max_output_tokens: 50}}
groups:
  staff:
    quotas:
      daily: {{tokens: 1M, per: day}}
      {pot}
  interns: {{quotas: {{daily: {{requests: 2, per: day}}}}}}
users:
  alice: {{groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}}
  bob: {{groups: [interns], keys: ["key-of-bob-0123456789abcdef"]}}
"""
POT = "pot: {shared: true, tokens: 10k, per: month}"


def _ask(model: str = "small", simulate: str = "tokens=5", **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "Hello"}
    return {"model": model, "messages": [message], "metadata": {"simulate": simulate}, **more}


async def _measured(on: Stage) -> Metrics:
    """The metrics after the jobs have run that measure what nothing else counts."""
    await on.all_settled()
    await on.server.gauges.measure_process()
    await on.server.gauges.measure_quotas()
    return await scrape(on)


async def test_the_metrics_say_why_half_of_the_calls_fail(tmp_path: Path) -> None:
    """Which endpoint, status, group, model, upstream and quota, without the log. It is the example of the docs."""
    async with stage(POLICY.format(pot=POT), folder=tmp_path) as on:
        statuses = [
            (await on.post(CHAT, _ask(model), user=user)).status
            for user, model, times in (("alice", "small", 2), ("alice", "big", 4), ("bob", "small", 6))
            for _ in range(times)
        ]
        assert statuses == [200] * 2 + [502] * 4 + [200] * 2 + [429] * 4
        found = await _measured(on)
    assert found.by("llm_quota_requests_total", "endpoint", "status") == {
        ("chat", "200"): 4,
        ("chat", "502"): 4,
        ("chat", "429"): 4,
    }
    assert found.by("llm_quota_tries_total", "upstream", "outcome") == {
        ("box", "unreachable"): 4,
        ("simulated", "answered"): 4,
    }
    assert found.by("llm_quota_group_calls_total", "group", "model", "outcome") == {
        ("staff", "small", "complete"): 2,
        ("staff", "big", "upstream_failed"): 4,
        ("interns", "small", "complete"): 2,
    }
    assert found.by("llm_quota_group_refusals_total", "group", "model", "quota", "verdict") == {
        ("interns", "small", "interns/daily", "exhausted"): 4
    }
    assert found.by("llm_quota_members_near_limit", "quota", "percent") == {
        ("interns/daily", "80"): 1,
        ("interns/daily", "100"): 1,
    }


async def _everything(on: Stage) -> Metrics:
    """Do at least once whatever the dashboard and the alerts ask for, as far as it can be done on purpose."""
    assert (await on.post(CHAT, _ask(stream=True))).status == 200
    assert (await on.post(CHAT, _ask(simulate="tokens=5 no_usage", stream=True))).status == 200
    for _ in range(5):
        assert (await on.post(CHAT, _ask("big"))).status == 502
    assert (await on.post(CHAT, _ask("nothing"))).status == 404
    assert (await on.post(CHAT, _ask(), user=None)).status == 401
    assert [(await on.post(CHAT, _ask(), user="bob")).status for _ in range(3)] == [200, 200, 429]
    return await _measured(on)


def _asked_by_dashboard() -> list[str]:
    """The expressions of its panels."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


async def test_the_dashboard_and_the_alerts_ask_for_metrics_that_exist(tmp_path: Path) -> None:
    """Each name in an expression is that of a series of a run, with the suffix of its type."""
    async with stage(POLICY.format(pot=POT), folder=tmp_path) as on:
        found = await _everything(on)
    asked = _asked_by_dashboard()
    asked += re.findall(r"expr:.*?(?=\n +(?:for|labels):)", ALERTS.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(asked) > 40
    assert all(NAME.search(each) for each in asked)
    assert {name for each in asked for name in NAME.findall(each)} - found.names == set()


def test_the_dashboard_can_be_imported_anywhere() -> None:
    """It names no data source of ours, and its panels have ids of their own."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {panel["datasource"]["uid"] for panel in panels if panel["type"] != "row"} == {"${datasource}"}
    assert [each["name"] for each in dashboard["templating"]["list"]] == ["datasource", "job"]


def test_promtool_accepts_the_alerts_and_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    """It is in Debian's package `prometheus`."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("NO PROMTOOL HERE: the files in config/prometheus were not checked")
    # The expressions of the dashboard as rules, with values for its variables.
    asked = (each.replace("$__rate_interval", "5m").replace("$job", "x") for each in _asked_by_dashboard())
    rules = [{"record": f"asked:{number}", "expr": each} for number, each in enumerate(asked)]
    dashboard = tmp_path / "dashboard.yml"
    dashboard.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    for command in (
        ["check", "rules", str(ALERTS), str(dashboard)],
        ["check", "config", str(ALERTS.with_name("prometheus.yml"))],
    ):
        done = subprocess.run([promtool, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


async def test_each_series_has_the_labels_of_the_docs(tmp_path: Path) -> None:
    """Dashboards of operators rely on them, so they are only added with a new name."""
    async with stage(POLICY.format(pot=POT), folder=tmp_path) as on:
        found = await _everything(on)
    rows = re.findall(r"^\| (`[a-z`_, ]+`) \| \w+ \| ([a-z`_, ]*) ?\|", DOCS.read_text(encoding="utf-8"), flags=re.M)
    documented = {
        name: set(re.findall(r"`(\w+)`", labels)) for names, labels in rows for name in re.findall(r"`(\w+)`", names)
    }
    for name, labels in found.series:
        base = re.sub(r"_(?:bucket|sum|count)$", "", name)
        assert {label for label, _ in labels} - {"le"} == documented[base if base in documented else name], name


async def test_times_of_calls_are_measured(tmp_path: Path) -> None:
    """To the first byte, in all and the proxy's own part. Errors of an upstream have only the latter."""
    async with stage(POLICY.format(pot=POT), folder=tmp_path) as on:
        found = await _everything(on)
    for name in ("first_byte", "duration"):
        assert found.by(f"llm_quota_{name}_seconds_count", "endpoint", "upstream") == {("chat", "simulated"): 4}
    first, whole = (
        found.value(f"llm_quota_{name}_seconds_sum", endpoint="chat", upstream="simulated")
        for name in ("first_byte", "duration")
    )
    own = found.value("llm_quota_own_seconds_sum", endpoint="chat")
    assert 0 < first < whole
    assert own > 0
    # Admitted calls, and the one that was refused. The 404 was no call yet.
    assert found.by("llm_quota_own_seconds_count", "endpoint") == {"chat": 10}
    assert found.value("llm_quota_ledger_commit_seconds_count") == found.value(
        "llm_quota_ledger_batch_operations_count"
    )
    assert found.value("llm_quota_ledger_batch_operations_sum") >= 2 * 9 + 1


async def test_an_upstream_that_fails_is_in_cooldown(tmp_path: Path) -> None:
    """1 for the one that calls avoid, 0 for the others."""
    async with stage(POLICY.format(pot=POT), folder=tmp_path) as on:
        found = await _everything(on)
    states = [found.value("llm_quota_upstream_cooldown", upstream=name) for name in ("box", "simulated")]
    assert states == [1, 0]


async def test_answers_say_how_well_they_are_counted(tmp_path: Path) -> None:
    """A stream without a usage is counted by the proxy alone, one with a usage by both."""
    async with stage(POLICY.format(pot=POT), folder=tmp_path) as on:
        found = await _everything(on)
    assert found.by("llm_quota_answers_without_usage_total", "upstream", "model") == {("simulated", "small"): 1}
    assert found.by("llm_quota_compared_tokens_total", "model", "source") == {
        ("small", "proxy"): 5,
        ("small", "upstream"): 5,
    }


async def test_a_reload_replaces_what_is_stated_of_the_policy(tmp_path: Path) -> None:
    """The hash is the new one alone. A pot that is gone has no series any more."""
    async with stage(POLICY.format(pot=POT), folder=tmp_path) as on:
        before = await _everything(on)
        used = before.value("llm_quota_pot_used", quota="staff/pot", measure="tokens")
        assert used == (await on.quota("staff/pot"))["tokens"]["used"] > 0
        assert before.value("llm_quota_pot_limit", quota="staff/pot", measure="tokens") == 10_000
        policy = config_of(POLICY.format(pot=""), folder=tmp_path, upstream="http://127.0.0.1:1/v1")
        on.config = replace(policy, settings=on.config.settings)
        assert await on.server.policies.reload()
        after = await _measured(on)
        assert after.by("llm_quota_policy_info", "hash") == {on.server.policies.current.policy.hash: 1}
        assert after.by("llm_quota_policy_info", "hash") != before.by("llm_quota_policy_info", "hash")
        assert "llm_quota_pot_used" not in after.names


async def test_calls_that_wait_and_hold_are_seen(tmp_path: Path) -> None:
    """A call that holds all of a pot, and one that waits for it."""
    pot = "pot: {shared: true, tokens: 70, per: month}"
    async with stage(POLICY.format(pot=pot), folder=tmp_path, on_disconnect="stop") as on:
        first = on.begin(CHAT, _ask(simulate="hang", stream=True))
        await until(lambda: on.simulator.received == 1)
        second = on.begin(CHAT, _ask(simulate="hang", stream=True))
        await until(lambda: len(on.server.queue) == 1)
        await on.server.gauges.measure_process()
        await on.server.gauges.measure_quotas()
        found = await scrape(on)
        assert found.value("llm_quota_calls_in_flight") == 1
        assert found.value("llm_quota_calls_waiting") == 1
        assert found.value("llm_quota_pot_held", quota="staff/pot", measure="tokens") > 35
        await asyncio.gather(on.hang_up(first), on.hang_up(second))
        found = await _measured(on)
        assert found.value("llm_quota_calls_waiting") == 0
        assert found.by("llm_quota_group_calls_total", "outcome") == {"client_left": 1}
        assert found.by("llm_quota_requests_total", "status") == {"499": 2}


async def test_what_cannot_be_read_is_not_stated(tmp_path: Path) -> None:
    """A gauge that stays as it was would look as if nothing had been used since."""
    async with stage(POLICY.format(pot=POT), folder=tmp_path) as on:
        assert "llm_quota_pot_used" in (await _measured(on)).names
        with connected(tmp_path / "quotas.db") as other:
            other.execute("ALTER TABLE counters RENAME TO aside")
            found = await _measured(on)
            assert not {"llm_quota_pot_used", "llm_quota_members_near_limit"} & found.names
            other.execute("ALTER TABLE aside RENAME TO counters")
        assert "llm_quota_pot_used" in (await _measured(on)).names


async def test_the_jobs_measure_by_themselves(tmp_path: Path) -> None:
    """The event loop is measured four times a second."""
    async with stage(POLICY.format(pot=POT), folder=tmp_path) as on:
        await until(lambda: b"event_loop_lag_seconds_count 0.0" not in on.server.metrics.exposition())
        found = await scrape(on)
    assert found.value("llm_quota_ledger_healthy") == 1
