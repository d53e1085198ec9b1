"""Reloads: a valid file replaces the policy, an invalid one changes nothing, and running calls keep their policy."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from proxy.config.document import Diagnostic
from proxy.config.loader import BadConfig, Config, ConfigFile, Fingerprint
from proxy.config.reload import Changes, Policies
from proxy.config.values import digest
from proxy.identity.authentication import Authentication, Caller
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
        self.loads = 0
        self._loaded: Fingerprint = None

    def changes(self) -> Changes:
        """The file, if it has another fingerprint than in the last load."""
        return {} if self.fingerprint == self._loaded else {"quotas.yaml": self.fingerprint}

    def load(self) -> Config:
        """The config. An invalid file has a mistake on line 3."""
        self.loads, self._loaded = self.loads + 1, self.fingerprint
        if self.config is None:
            raise BadConfig([Diagnostic("quotas.yaml", 3, "wrong")])
        return self.config


def _policies(disk: Disk, metrics: Metrics) -> Policies[Policy]:
    return Policies(
        disk.load(),
        load=disk.load,
        build=lambda config: config.policy,
        changes=disk.changes,
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
    """T78: the old policy stays in force and a metric reports it, until a valid file is loaded. The log has a line
    for each mistake.
    """
    metrics = Metrics()
    disk = Disk(_config(tmp_path))
    policies = _policies(disk, metrics)
    first, disk.config = policies.current, None
    with capture_logs() as logged:
        assert await policies.reload() is False
    assert logged == [
        {
            "log_level": "error",
            "event": "a mistake in the policy file",
            "path": "quotas.yaml",
            "line": 3,
            "message": "wrong",
        },
        {
            "log_level": "error",
            "event": "the policy file can't be taken, the old policy stays in force",
            "mistakes": 1,
        },
    ]
    assert policies.current is first
    assert b"llm_quota_reload_failed 1.0" in metrics.exposition()
    disk.config = _config(tmp_path)
    assert await policies.reload() is True
    assert b"llm_quota_reload_failed 0.0" in metrics.exposition()


async def test_an_invalid_file_is_loaded_once_until_it_changes_again(tmp_path: Path) -> None:
    """Otherwise its mistakes would be in the log every second."""
    disk = Disk(_config(tmp_path))
    policies = _policies(disk, Metrics())
    disk.config, disk.fingerprint = None, (2,)
    for _ in range(5):
        await policies.reload_if_changed()
    assert disk.loads == 2
    disk.fingerprint = (3,)
    for _ in range(5):
        await policies.reload_if_changed()
    assert disk.loads == 3


OLD_KEY, NEW_KEY = "the-old-key-0123456789abcdef", "the-new-key-0123456789abcdef"
WITH_FILES = """
upstreams: {{up: {{base_url: "http://127.0.0.1:1/v1", api_key: "${{file:{folder}/up}}"}}}}
groups: {{staff: {{quotas: {{daily: {{tokens: 5, per: day}}}}}}}}
users: {{alice: {{groups: [staff], keys: ["${{file:{folder}/alice}}"]}}}}
"""


def _write_in_place(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


def _rename(folder: Path, name: str, text: str) -> None:
    (folder / "new").write_text(text)
    (folder / "new").replace(folder / name)


def _rename_an_old_file(folder: Path, name: str, text: str) -> None:
    """A file of the same size and with the same time of modification, as a tool for backups restores it."""
    before = (folder / name).stat()
    (folder / "new").write_text(text)
    os.utime(folder / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder / "new").replace(folder / name)


def _write_and_set_the_time_back(folder: Path, name: str, text: str) -> None:
    before = (folder / name).stat()
    (folder / name).write_text(text)
    os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns))


def _swap_the_folder(folder: Path, name: str, text: str) -> None:
    """As Kubernetes does: `..data` is a symbolic link to a folder, and each file one to `..data/name`."""
    generation = folder / f"..{text}"
    generation.mkdir()
    for each in ("up", "alice"):
        (generation / each).write_text(text if each == name else (folder / each).read_text())
    (folder / "..data_tmp").symlink_to(generation.name)
    (folder / "..data_tmp").replace(folder / "..data")
    for each in ("up", "alice"):
        if not (folder / each).is_symlink():
            (folder / each).unlink()
            (folder / each).symlink_to(f"..data/{each}")


ROTATIONS = [_write_in_place, _rename, _rename_an_old_file, _write_and_set_the_time_back, _swap_the_folder]


def _file_with_secrets(folder: Path) -> ConfigFile:
    for name in ("up", "alice"):
        (folder / name).write_text(f"{OLD_KEY}\n")
    (folder / "quotas.yaml").write_text(WITH_FILES.format(folder=folder))
    return ConfigFile(str(folder / "quotas.yaml"), {})


def _policies_of(file: ConfigFile) -> Policies[Config]:
    return Policies(
        file.load(),
        load=file.load,
        build=lambda config: config,
        changes=file.changes,
        metrics=Metrics(),
        now=lambda: NOON,
    )


def _keys(config: Config) -> tuple[str, tuple[str, ...]]:
    key = config.catalog.upstreams["up"].api_key
    assert key is not None
    return key.reveal(), tuple(config.users[0].keys)


@pytest.mark.parametrize("rotate", ROTATIONS)
async def test_a_rotated_key_in_a_file_is_in_force_after_two_checks(
    tmp_path: Path, rotate: Callable[[Path, str, str], None]
) -> None:
    """And the old one is not any more: the upstream's key and a user's. However the file is replaced."""
    policies = _policies_of(_file_with_secrets(tmp_path))
    for new in (NEW_KEY, f"{NEW_KEY}-2", f"{NEW_KEY}-3"):
        for name in ("up", "alice"):
            rotate(tmp_path, name, f"{new}{name}")
            await policies.reload_if_changed()
            await policies.reload_if_changed()
        assert _keys(policies.current) == (f"{new}up", (digest(f"{new}alice"),))
    current = policies.current
    await policies.reload_if_changed()
    await policies.reload_if_changed()
    assert policies.current is current


async def test_a_missing_file_keeps_the_policy_until_it_is_there(tmp_path: Path) -> None:
    """It is watched although the load that missed it failed; so is one that the file names only since then."""
    policies = _policies_of(_file_with_secrets(tmp_path))
    first = policies.current
    (tmp_path / "up").unlink()
    for _ in range(3):
        await policies.reload_if_changed()
    assert policies.current is first
    (tmp_path / "up").write_text(NEW_KEY)
    for _ in range(2):
        await policies.reload_if_changed()
    assert _keys(policies.current)[0] == NEW_KEY
    text = (tmp_path / "quotas.yaml").read_text().replace("/up}", "/other}")
    (tmp_path / "quotas.yaml").write_text(text)
    for _ in range(3):
        await policies.reload_if_changed()
    (tmp_path / "other").write_text(OLD_KEY)
    for _ in range(2):
        await policies.reload_if_changed()
    assert _keys(policies.current)[0] == OLD_KEY


async def test_a_change_between_the_load_and_the_first_check_is_found(tmp_path: Path) -> None:
    """The config is loaded at the start, and the first check is a second later."""
    file = _file_with_secrets(tmp_path)
    config = file.load()
    (tmp_path / "up").write_text(NEW_KEY)
    policies = Policies(
        config,
        load=file.load,
        build=lambda config: config,
        changes=file.changes,
        metrics=Metrics(),
        now=lambda: NOON,
    )
    for _ in range(2):
        await policies.reload_if_changed()
    assert _keys(policies.current)[0] == NEW_KEY


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


async def test_the_report_names_the_counters_that_start_at_0(tmp_path: Path) -> None:
    """Those of a new or renamed quota, and of one whose `shared` is switched. A changed `per` or limit keeps them."""
    own, shared = "{tokens: 1, per: day}", "{tokens: 1, per: day, shared: true}"
    quotas = f"{{a: {own}, b: {own}, c: {shared}}}"
    changed = f"{{a: {{tokens: 2, per: hour}}, b: {shared}, c: {own}, d: {own}}}"
    disk = Disk(_config(tmp_path, f"groups: {{staff: {{quotas: {quotas}}}}}"))
    policies = _policies(disk, Metrics())
    disk.config = _config(tmp_path, f"groups: {{staff: {{quotas: {changed}}}}}")
    with capture_logs() as logged:
        assert await policies.reload() is True
    names = ("staff/b", "staff/c", "staff/d")
    assert policies.last_reload.counters_start_at_0 == names
    assert [tuple(line["counters_start_at_0"]) for line in logged if line["event"] == "policy reloaded"] == [names]


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
    is_looked_up, go_on, look_up = asyncio.Event(), asyncio.Event(), Authentication.identify

    async def slowly(self: Authentication, *request: Any) -> Caller:
        is_looked_up.set()
        await go_on.wait()
        return await look_up(self, *request)

    monkeypatch.setattr(Authentication, "identify", slowly)
    async with stage(folder=tmp_path) as on, asyncio.TaskGroup() as tasks:
        old = tasks.create_task(on.get("/v1/quota"))
        await is_looked_up.wait()
        moved = STAFF.replace("staff: {", "lab: {").replace("[staff]", "[lab]")
        on.config = config_of(moved, folder=tmp_path, upstream=UP)
        assert await on.server.policies.reload()
        go_on.set()
        assert [each["id"] for each in (await old).json()["data"]] == ["staff/daily"]
        assert [each["id"] for each in (await on.get("/v1/quota")).json()["data"]] == ["lab/daily"]
