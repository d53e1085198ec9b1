"""config/systemd: systemd accepts the unit, and what it starts works as systemd starts it."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from proxy.cli import main
from proxy.config.loader import load_text
from proxy.server import CLEANUP_S, GRACE_S
from tests.dockerfile import Dockerfile
from tests.printed import blocks, run

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "config" / "systemd"
UNIT = (FOLDER / "llm-quota-proxy.service").read_text(encoding="utf-8")
PROGRAM = Path(sys.executable).with_name("llm-quota-proxy")
# What systemd gives a service, and the source tree, which may be another one than that of the environment.
ENVIRON = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/nonexistent", "PYTHONPATH": str(ROOT)}
# Of 100: what `systemd-analyze security` says of a service that may do everything is 96.
EXPOSURE_MAX = 15
# prctl(2): refuse memory that is writable and executable, as MemoryDenyWriteExecute does. Linux 6.3 has it.
_PR_SET_MDWE, _REFUSE_EXEC_GAIN = 65, 1


def settings(name: str) -> list[str]:
    """The values of a setting of the unit, in their order."""
    return re.findall(rf"^{name}=(.*)$", UNIT, flags=re.MULTILINE)


@pytest.fixture
def analyze(tmp_path: Path):
    """Runs `systemd-analyze` on the unit, with a program that is on this machine."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("NO SYSTEMD HERE: config/systemd is not checked; install the Debian package systemd")
    unit = tmp_path / "llm-quota-proxy.service"
    unit.write_text(UNIT.replace("/opt/llm-quota-proxy/bin/llm-quota-proxy", str(PROGRAM)))
    return lambda *words: subprocess.run(
        ["systemd-analyze", *words, str(unit)], capture_output=True, text=True, check=False
    )


def test_systemd_accepts_the_unit(analyze) -> None:
    """Without a warning, such as for a setting that it does not know."""
    done = analyze("verify", "--man=no", "--recursive-errors=no")
    about_the_unit = [line for line in done.stderr.splitlines() if "llm-quota-proxy" in line]
    assert (done.returncode, about_the_unit) == (0, [])


def test_a_mistake_in_the_unit_would_be_seen(analyze, tmp_path: Path) -> None:
    """The check above can fail."""
    unit = tmp_path / "llm-quota-proxy.service"
    unit.write_text(unit.read_text().replace("ProtectSystem=", "ProtectSistem="))
    assert "ProtectSistem" in analyze("verify", "--man=no", "--recursive-errors=no").stderr


def test_the_service_may_do_little(analyze) -> None:
    """As systemd counts it."""
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE_MAX}", "--no-pager")
    assert done.returncode == 0, done.stdout


def test_the_settings_of_the_unit_agree_with_each_other_and_with_quotas_yaml() -> None:
    """A folder or secret of another name would be noticed only on the machine where it is installed."""
    quotas = (FOLDER / "quotas.yaml").read_text(encoding="utf-8")
    delay_s = load_text(quotas, read_bytes=lambda path: b"secret-0123456789-0123456789").settings.shutdown_delay_s
    (state,), (stop,) = settings("StateDirectory"), settings("TimeoutStopSec")
    assert settings("WorkingDirectory") == [f"/var/lib/{state}"]
    assert f"database: sqlite:////var/lib/{state}/" in quotas
    secrets = {each.partition(":")[0] for each in settings("LoadCredential")}
    assert set(re.findall(r"\$\{file:/run/credentials/llm-quota-proxy\.service/(\w+)\}", quotas)) == secrets
    assert int(stop.removesuffix("s")) >= delay_s + GRACE_S + CLEANUP_S
    assert settings("KillMode") == ["mixed"], "workers must not get SIGTERM before their parent"
    assert settings("User") == settings("Group") == ["llm-quota-proxy"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "workers"), [("path", 1), ("abstract", 2)])
def test_the_service_starts_tells_that_it_is_ready_reloads_and_stops(tmp_path: Path, kind: str, workers: int) -> None:
    """With the unit's command, environment, umask and folders; without memory that is writable and executable."""
    quotas = install(tmp_path)
    name = str(tmp_path / "notify") if kind == "path" else f"@{tmp_path}/notify"
    (command,) = settings("ExecStart")
    words = [mapped(word, tmp_path) for word in shlex.split(command)]
    assert words[0] == str(tmp_path / "opt/llm-quota-proxy/bin/llm-quota-proxy")
    strict = f"import ctypes, os, sys; ctypes.CDLL(None).prctl({_PR_SET_MDWE}, {_REFUSE_EXEC_GAIN}, 0, 0, 0); "
    words = [sys.executable, "-c", f"{strict}os.execv(sys.argv[1], sys.argv[1:])", *words]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(name.replace("@", "\0", 1))
        systemd.settimeout(200)
        process = subprocess.Popen(
            [*words, "--port=0", "--admin-port=0", f"--workers={workers}"],
            cwd=tmp_path / "var/lib/llm-quota-proxy",
            env={**ENVIRON, "NOTIFY_SOCKET": name},
            umask=int(settings("UMask")[0], 8),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        with ended(process):
            assert systemd.recv(100) == b"READY=1"
            lines = map(json.loads, process.stderr or ())
            serving = next(line for line in lines if line["event"] == "serving")
            with urllib.request.urlopen(f"{serving['api']}/readyz", timeout=30) as answer:
                assert answer.status == 200
            quotas.write_text(quotas.read_text().replace("200k", "300k"))
            assert settings("ExecReload") == ["/bin/kill -HUP $MAINPID"]
            process.send_signal(signal.SIGHUP)
            assert any(line["event"] == "policy reloaded" for line in lines)
            process.send_signal(signal.SIGTERM)
            events = [line["event"] for line in lines]
            assert process.wait() == 0, events
    database = tmp_path / "var/lib/llm-quota-proxy/quotas.db"
    assert database.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_a_service_whose_systemd_is_gone_serves_all_the_same(tmp_path: Path) -> None:
    """A warning in its log says what systemd will do then."""
    install(tmp_path)
    process = subprocess.Popen(
        [PROGRAM, "serve", "--port=0", "--admin-port=0", "--config", tmp_path / "etc/llm-quota-proxy/quotas.yaml"],
        env={**ENVIRON, "NOTIFY_SOCKET": str(tmp_path / "nobody")},
        stderr=subprocess.PIPE,
        text=True,
    )
    with ended(process):
        lines = map(json.loads, process.stderr or ())
        warning = next(line for line in lines if "systemd" in line["event"])
        assert (warning["level"], "No such file" in warning["reason"]) == ("warning", True)
        process.send_signal(signal.SIGTERM)
        assert [line["event"] for line in lines][-1] == "stopped"
        assert process.wait() == 0


def test_the_database_is_restored_while_the_service_is_stopped(tmp_path: Path) -> None:
    """systemd has removed the credentials then. A warning names them, and `check` and `serve` need them."""
    (tmp_path / "var/lib/llm-quota-proxy").mkdir(parents=True)
    quotas, copy = tmp_path / "quotas.yaml", tmp_path / "b.db"
    quotas.write_text(mapped((FOLDER / "quotas.yaml").read_text(), tmp_path))
    gone = [f"{tmp_path}/run/credentials/llm-quota-proxy.service/{name}" for name in ("admin_key", "openai_api_key")]

    def play(*words: object, code: int = 0) -> Result:
        done = CliRunner().invoke(main, [*map(str, words), "--config", str(quotas)])
        assert done.exit_code == code, done.stderr
        return done

    def works(*words: object) -> str:
        done = play(*words)
        warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
        assert warnings == [f"warning: not read: {', '.join(gone)}; this command does not need them"]
        return done.stdout

    works("migrate")
    works("users", "add", "bob")
    key = json.loads(play("keys", "create", "bob", "--json").stdout)
    works("backup", copy)
    works("keys", "revoke", key["id"])
    works("restore", copy)
    assert json.loads(works("keys", "list", "--json"))[0]["revoked_at"] is None
    works("keys", "revoke", key["id"])
    assert "database:bob" in works("users", "list")
    works("quotas", "list")
    works("audit")
    works("admin-keys", "list")
    assert works("explain", "bob", "gpt-4o")
    assert f'the file "{gone[0]}" can\'t be read' in play("check", code=1).stderr
    assert f'the file \\"{gone[0]}\\" can\'t be read' in play("serve", code=2).stderr


@contextmanager
def ended(process: "subprocess.Popen[str]") -> Iterator[None]:
    """Whatever happens, the process ends with the block."""
    try:
        yield
    finally:
        process.kill()
        process.communicate()


def install(folder: Path) -> Path:
    """Play the commands of the page on a machine whose root is this folder. Returns its quotas.yaml.

    What needs the right to change this machine is replaced by programs that only note how they were called. pip is
    one of them, because tests/test_image.py plays the same commands.
    """
    programs = folder / "programs"
    programs.mkdir()
    for name in ("useradd", "systemctl", "python3"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/called\n')
        (programs / name).chmod(0o755)
    pip = folder / "opt/llm-quota-proxy/bin/pip"
    pip.parent.mkdir(parents=True)
    shutil.copy(programs / "python3", pip)
    (pip.parent / "llm-quota-proxy").symlink_to(PROGRAM)
    for name in ("etc/systemd/system", "var/lib/llm-quota-proxy"):
        (folder / name).mkdir(parents=True)
    for name in ("config", "requirements-run.lock", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    block, _ = blocks("systemd.md", "Install")
    path = f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run(
        f"PATH={shlex.quote(path)}\n{mapped(block, folder)}",
        folder=folder,
        environ={"OPENAI_API_KEY": "sk-" + 24 * "0"},
    )
    secrets = folder / "etc/llm-quota-proxy/secrets"
    assert secrets.stat().st_mode & 0o777 == 0o700
    quotas = folder / "etc/llm-quota-proxy/quotas.yaml"
    text = mapped(quotas.read_text(), folder).replace(
        f"{folder}/run/credentials/llm-quota-proxy.service", str(secrets)
    )
    assert str(secrets) in text
    quotas.write_text(text)
    done = subprocess.run(
        [PROGRAM, "check", "--strict", "--config", quotas], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return quotas


def mapped(text: str, folder: Path) -> str:
    """The text with the paths of the machine in a folder."""
    return re.sub(r"(?<![\w.])/(?=(opt|etc|var|run)/)", f"{folder}/", text)


def test_the_page_installs_as_the_image_does(tmp_path: Path) -> None:
    """The same commands of pip, and the calls of systemd in their order."""
    install(tmp_path)
    called = (tmp_path / "called").read_text().splitlines()
    assert [line.split()[0] for line in called] == [
        "useradd",
        "python3",
        "python3",
        "python3",
        "systemctl",
        "systemctl",
    ]
    commands = " ".join(Dockerfile.parsed((ROOT / "Dockerfile").read_text()).all("RUN"))
    for line in called[2:4]:
        assert f"pip {line.removeprefix('python3 ')}" in commands
    assert called[-1] == "systemctl enable --now llm-quota-proxy"
