"""Reloads: a valid file replaces the policy, an invalid one changes nothing, and running calls keep their policy."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from proxy.config.document import Diagnostic
from proxy.config.loader import BadConfig, Config
from proxy.config.reload import Fingerprint, Policies
from proxy.identity.directory import FileDirectory, User
from proxy.metrics import Metrics
from proxy.policy.policy import Policy
from tests.builders import NOON
from tests.stage import STAFF, config_of, stage

UP = "http://127.0.0.1:1/v1"


class Disk:
    """A stand-in for the file: the config that a load returns (None: the file is invalid), and its fingerprint."""

    def __init__(self, config: Config) -> None:
        self.config: Config | None = config
        self.fingerprint: Fingerprint = (1,)

    def load(self) -> Config:
        """The config. An invalid file has a mistake on line 3."""
        if self.config is None:
            raise BadConfig([Diagnostic("quotas.yaml", 3, "wrong")])
        return self.config


def _policies(disk: Disk, metrics: Metrics) -> Policies[Policy]:
    return Policies(
        disk.load(),
        load=disk.load,
        build=lambda config: config.policy,
        fingerprint=lambda: disk.fingerprint,
        metrics=metrics,
        now=lambda: NOON,
    )


def _config(folder: Path, policy: str = STAFF) -> Config:
    return config_of(policy, folder=folder, upstream=UP)


async def test_a_changed_file_is_loaded_when_it_has_stopped_changing(tmp_path: Path) -> None:
    """T79: only if two checks see the same new fingerprint: half of a file is not a policy."""
    disk = Disk(_config(tmp_path))
    policies = _policies(disk, Metrics())
    first = policies.current
    disk.config = _config(tmp_path, STAFF.replace("1M", "2M"))
    await policies.reload_if_changed()
    assert policies.current is first
    for fingerprint in ((2,), (3,)):  # the file is being written
        disk.fingerprint = fingerprint
        await policies.reload_if_changed()
        assert policies.current is first
    await policies.reload_if_changed()
    assert policies.current is disk.config.policy


async def test_an_invalid_file_never_replaces_the_policy(tmp_path: Path) -> None:
    """T78: the old policy stays in force and a metric reports it, until a valid file is loaded."""
    metrics = Metrics()
    disk = Disk(_config(tmp_path))
    policies = _policies(disk, metrics)
    first, disk.config = policies.current, None
    assert await policies.reload() is False
    assert policies.current is first
    assert b"llm_quota_reload_failed 1.0" in metrics.exposition()
    disk.config = _config(tmp_path)
    assert await policies.reload() is True
    assert b"llm_quota_reload_failed 0.0" in metrics.exposition()


async def test_the_log_names_sections_that_need_a_restart(tmp_path: Path) -> None:
    """A new database in the file is ignored, and logged; so are quotas whose counters start at 0."""
    disk = Disk(_config(tmp_path))
    policies = _policies(disk, Metrics())
    disk.config = config_of(STAFF.replace("daily:", "weekly:"), folder=tmp_path / "other", upstream=UP)
    with capture_logs() as logged:
        assert await policies.reload() is True
    text = str(logged)
    assert "change only with a restart" in text
    assert "database" in text
    assert "staff/weekly" in text


async def test_a_running_call_keeps_its_policy(tmp_path: Path) -> None:
    """T79: after a reload that removes the model, the running stream ends normally and the next call gets a 404."""
    body: dict[str, Any] = {
        "model": "fast",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "metadata": {"simulate": "tokens=30 speed=400"},
    }
    async with stage(folder=tmp_path) as on:
        call = on.begin("/v1/chat/completions", body)
        await on.simulator.until(lambda: on.simulator.chunks_sent > 2)
        without = "\n".join(line for line in STAFF.splitlines() if "fast:" not in line)
        on.config = config_of(without, folder=tmp_path, upstream=UP)
        assert await on.server.policies.reload()
        assert (await call).body.endswith(b"data: [DONE]\n\n")
        assert (await on.post("/v1/chat/completions", body)).status == 404
        await on.all_settled()
        assert (await on.used())[0] >= 30


async def test_a_reload_during_authentication_changes_nothing_for_that_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user and the policy are of the same file. The new policy does not have the old user's group."""
    is_looked_up, go_on, look_up = asyncio.Event(), asyncio.Event(), FileDirectory.user

    async def slowly(self: FileDirectory, name: str) -> User | None:
        is_looked_up.set()
        await go_on.wait()
        return await look_up(self, name)

    monkeypatch.setattr(FileDirectory, "user", slowly)
    async with stage(folder=tmp_path) as on, asyncio.TaskGroup() as tasks:
        old = tasks.create_task(on.get("/v1/quota"))
        await is_looked_up.wait()
        moved = STAFF.replace("staff: {", "lab: {").replace("[staff]", "[lab]")
        on.config = config_of(moved, folder=tmp_path, upstream=UP)
        assert await on.server.policies.reload()
        go_on.set()
        assert [each["id"] for each in (await old).json()["data"]] == ["staff/daily"]
        assert [each["id"] for each in (await on.get("/v1/quota")).json()["data"]] == ["lab/daily"]
