"""The policy in force: swapped whole, or kept with a report; calls in flight keep theirs."""

from pathlib import Path
from typing import Any

from structlog.testing import capture_logs

from proxy.config.document import Diagnostic
from proxy.config.loader import BadConfig, Config
from proxy.config.reload import Fingerprint, Policies
from proxy.metrics import Metrics
from tests.builders import NOON
from tests.stage import STAFF, config_of, stage

UP = "http://127.0.0.1:1/v1"


class Disk:
    """A file that the test writes: what it holds, and what it looks like from outside."""

    def __init__(self, config: Config) -> None:
        self.config: Config | None = config
        self.fingerprint: Fingerprint = (1,)

    def load(self) -> Config:
        """Read it; a file that holds nothing good has a mistake in line 3."""
        if self.config is None:
            raise BadConfig([Diagnostic("quotas.yaml", 3, "wrong")])
        return self.config


def _policies(disk: Disk, metrics: Metrics) -> Policies:
    return Policies(
        disk.load(), load=disk.load, fingerprint=lambda: disk.fingerprint, metrics=metrics, now=lambda: NOON
    )


def _config(folder: Path, policy: str = STAFF) -> Config:
    return config_of(policy, folder=folder, upstream=UP)


async def test_a_changed_file_is_taken_once(tmp_path: Path) -> None:
    """Only when it looks different, and the same at two looks: a file half written is no policy."""
    disk = Disk(_config(tmp_path))
    policies = _policies(disk, Metrics())
    first = policies.current
    disk.config = _config(tmp_path, STAFF.replace("1M", "2M"))
    await policies.reload_if_changed()
    assert policies.current is first
    for fingerprint in ((2,), (3,)):  # it is being written
        disk.fingerprint = fingerprint
        await policies.reload_if_changed()
        assert policies.current is first
    await policies.reload_if_changed()
    assert policies.current is disk.config.policy


async def test_a_bad_file_never_replaces_a_good_policy(tmp_path: Path) -> None:
    """The old one stays in force, the metric says so, and the next good file mends it."""
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


async def test_sections_that_need_a_restart_are_named(tmp_path: Path) -> None:
    """A new port or database in the file is reported, not silently ignored; and so are quotas that start at 0."""
    disk = Disk(_config(tmp_path))
    policies = _policies(disk, Metrics())
    disk.config = config_of(STAFF.replace("daily:", "weekly:"), folder=tmp_path / "other", upstream=UP)
    with capture_logs() as logged:
        assert await policies.reload() is True
    said = str(logged)
    assert "change only with a restart" in said
    assert "database" in said
    assert "staff/weekly" in said


async def test_a_call_in_flight_keeps_its_policy(tmp_path: Path) -> None:
    """A reload that takes the model away lets the running stream end, and is a 404 for the next call."""
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
        on.files.config = config_of(without, folder=tmp_path, upstream=UP)
        assert await on.server.policies.reload()
        assert (await call).body.endswith(b"data: [DONE]\n\n")
        assert (await on.post("/v1/chat/completions", body)).status == 404
        await on.at_rest()
        assert (await on.used())[0] >= 30
