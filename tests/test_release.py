"""`make release`: its files have what they should, and the same commit gives the same bytes."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

import proxy
from tests.dockerfile import Dockerfile
from tests.test_house import locked

ROOT = Path(__file__).resolve().parents[1]
VERSION = proxy.__version__
WHEEL, SDIST = f"llm_quota_proxy-{VERSION}-py3-none-any.whl", f"llm_quota_proxy-{VERSION}.tar.gz"
IMAGE, SBOM = f"llm-quota-proxy-{VERSION}-image.tar.gz", f"llm-quota-proxy-{VERSION}.cdx.json"
GIT = {
    **{f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    **{f"GIT_{who}_DATE": "2026-03-01T12:00:00+01:00" for who in ("AUTHOR", "COMMITTER")},
    "GIT_CONFIG_GLOBAL": os.devnull,
}


def git(*arguments: str, folder: Path) -> str:
    environ = os.environ if folder == ROOT else {**os.environ, **GIT}
    return subprocess.run(
        ["git", *arguments], cwd=folder, env=environ, check=True, capture_output=True, text=True
    ).stdout


def release(folder: Path, *, umask: int = 0o022, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run what `make release` runs, in this clone."""
    (line,) = re.findall(r"^release: .*\n\t\$\(BIN\)/python (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return subprocess.run(
        [sys.executable, *shlex.split(line)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", **environ},
        umask=umask,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A clone whose last commit has the files as they are now, and its release."""
    if not (ROOT / ".git").exists():
        pytest.skip("NO GIT CLONE HERE: a release is made of a commit")
    folder = tmp_path_factory.mktemp("release") / "one"
    folder.mkdir()
    for name in git("ls-files", "--cached", "--others", "--exclude-standard", "-z", folder=ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git("init", "--quiet", folder=folder)
    git("add", "--all", folder=folder)
    git("commit", "--quiet", "--message", "all", folder=folder)
    made = release(folder)
    assert made.returncode == 0, made.stderr
    yield folder
    shutil.rmtree(folder)


def tracked(folder: Path) -> set[str]:
    return set(git("ls-files", "-z", folder=folder).split("\0")) - {""}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_same_commit_gives_the_same_bytes(clone: Path) -> None:
    """In another folder, with another umask, time zone and language, and with files that git ignores."""
    other = clone.parent / "another folder"
    git("clone", "--quiet", str(clone), str(other), folder=clone)
    git("config", "core.autocrlf", "true", folder=other)
    git("config", "tar.umask", "0077", folder=other)
    (other / "proxy" / "quotas.db").write_text("ignored by git")
    made = release(other, umask=0o077, TZ="Asia/Tokyo", LC_ALL="C", PYTHONHASHSEED="7", SOURCE_DATE_EPOCH="1")
    assert made.returncode == 0, made.stderr
    assert sorted(path.name for path in (clone / "dist").iterdir()) == sorted(
        [WHEEL, SDIST, IMAGE, SBOM, "SHA256SUMS"]
    )
    for path in (clone / "dist").iterdir():
        assert path.read_bytes() == (other / "dist" / path.name).read_bytes(), path.name
    shutil.rmtree(other)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_tree_that_is_no_commit_is_not_released(clone: Path) -> None:
    """Whether a file has changed or is new. The files of the last release stay."""
    new = clone / "new.txt"
    new.write_text("not in git")
    refused = release(clone)
    new.unlink()
    assert refused.returncode == 1
    assert refused.stderr.splitlines() == [
        "A release is made of a commit. Commit or remove these first:",
        "?? new.txt",
    ]
    assert (clone / "dist" / "SHA256SUMS").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_sums_are_those_of_the_files(clone: Path) -> None:
    """In the form that `sha256sum --check` reads."""
    lines = (clone / "dist" / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert sums == {
        name: hashlib.sha256((clone / "dist" / name).read_bytes()).hexdigest() for name in (WHEEL, SDIST, IMAGE, SBOM)
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_sdist_has_what_git_has_and_gives_the_same_wheel(clone: Path, tmp_path: Path) -> None:
    """So the tests, the image and the manifests are in it; and nothing that is not text of ours."""
    with tarfile.open(clone / "dist" / SDIST) as tar:
        members = [member for member in tar.getmembers() if not member.isdir()]
        assert all(member.isreg() and member.mode in (0o644, 0o755) for member in members)
        assert {member.uid for member in members} == {0}
        names = {member.name.partition("/")[2] for member in members}
        tar.extractall(tmp_path, filter="data")
    assert names == tracked(clone) | {"PKG-INFO"}
    assert not any("node_modules" in name for name in names)
    (tree,) = tmp_path.iterdir()
    epoch = git("log", "-1", "--format=%ct", folder=clone).strip()
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel"],
        cwd=tree,
        env={**os.environ, "SOURCE_DATE_EPOCH": epoch, "PYTHONPATH": ""},
        check=True,
        capture_output=True,
    )
    assert (tree / "dist" / WHEEL).read_bytes() == (clone / "dist" / WHEEL).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_wheel_has_the_package_and_nothing_else(clone: Path) -> None:
    """Its version is that of the program, and its command is there."""
    with zipfile.ZipFile(clone / "dist" / WHEEL) as wheel:
        information = f"llm_quota_proxy-{VERSION}.dist-info"
        names = {name for name in wheel.namelist() if not name.startswith(information)}
        assert names == {name for name in tracked(clone) if name.startswith("proxy/")}
        metadata = Parser().parsestr(wheel.read(f"{information}/METADATA").decode())
        assert (metadata["Name"], metadata["Version"]) == ("llm-quota-proxy", VERSION)
        assert "llm-quota-proxy = proxy.cli:main" in wheel.read(f"{information}/entry_points.txt").decode()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_image_can_be_built_from_its_context(clone: Path) -> None:
    """It has each file that the Dockerfile copies, and only those."""
    with tarfile.open(clone / "dist" / IMAGE) as tar:
        names = tar.getnames()
        file = tar.extractfile("Dockerfile")
        assert file is not None
        sources = set(Dockerfile.parsed(file.read().decode()).sources())
        assert {(each.uid, each.gid, each.uname) for each in tar.getmembers()} == {(0, 0, "")}
    copied = {name for name in tracked(clone) if name in sources or name.partition("/")[0] in sources}
    assert names == sorted(copied | {"Dockerfile", ".dockerignore"})


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_sbom_has_each_package_of_the_lock_file_once(clone: Path) -> None:
    """With its version and hashes; those that the image does not have are marked."""
    text = (clone / "dist" / SBOM).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom = json.loads(text)
    product = bom["metadata"]["component"]
    assert (product["name"], product["version"]) == ("llm-quota-proxy", VERSION)
    assert product["licenses"][0]["license"]["id"] == "MIT"
    assert [(each["name"], each["version"]) for each in bom["components"]] == sorted(
        locked("requirements-run.lock").items()
    )
    lock = (ROOT / "requirements-run.lock").read_text()
    hashes = re.findall(r'"content": "([0-9a-f]{64})"', text)
    assert sorted(hashes) == sorted(re.findall(r"--hash=sha256:([0-9a-f]{64})", lock))
    excluded = {each["name"] for each in bom["components"] if each["scope"] == "excluded"}
    assert {"hatchling", "editables", "tomlkit"} <= excluded
    assert not excluded & {"aiohttp", "asyncpg", "bpe-openai"}
    assert str(clone) not in text


def test_the_version_is_stated_in_one_place() -> None:
    """`proxy/__init__.py`. Other files have to repeat it in the tag of the image, and all say the same."""
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    stated = re.compile(
        r"\bllm-quota-proxy:v?(\d[\w.-]*)|image\.version=\"([^\"]+)|llm[-_]quota[-_]proxy-(\d+\.\d+\.\d+)"
    )
    tags: dict[str, set[str]] = {}
    for path in (ROOT / "Dockerfile", *(ROOT / "config").rglob("*.y*ml"), *(ROOT / "docs").glob("*.md")):
        if found := {"".join(each) for each in stated.findall(path.read_text(encoding="utf-8"))}:
            tags[str(path.relative_to(ROOT))] = found
    assert {
        "Dockerfile",
        "config/compose/sqlite/compose.yaml",
        "config/compose/postgresql/compose.yaml",
    } <= tags.keys()
    assert set.union(*tags.values()) == {VERSION}, f"change these with proxy/__init__.py: {tags}"
