"""Makes a release in dist/ from the commit that is checked out. `make release` runs it; it needs no network.

    llm_quota_proxy-V-py3-none-any.whl     the program
    llm_quota_proxy-V.tar.gz               its source, with the tests
    llm-quota-proxy-V-image.tar.gz         what the image is built from: docker build - < FILE
    llm-quota-proxy-V.cdx.json             the packages of requirements-run.lock (SBOM, CycloneDX)
    SHA256SUMS                             of these four

The same commit gives the same bytes, in any folder and for any user, if Python and the packages of the lock file are
the same. Everything is made from `git archive`. Files are sorted, belong to nobody, have one of two modes, and have
the time of the commit (SOURCE_DATE_EPOCH, as reproducible-builds.org specifies it).
"""

import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Make the release. Exits with a text that says what to do if it cannot."""
    if changed := git("status", "--porcelain").decode().splitlines():
        sys.exit(f"A release is made of a commit. Commit or remove these first:\n{chr(10).join(changed)}")
    time_s = int(git("log", "-1", "--format=%ct"))
    with tempfile.TemporaryDirectory() as folder:
        tree, made = Path(folder) / "tree", Path(folder) / "dist"
        extract(git("-c", "core.autocrlf=false", "archive", "HEAD"), tree)
        python(
            "hatchling",
            "build",
            "--directory",
            str(made),
            "--target",
            "sdist",
            "--target",
            "wheel",
            cwd=tree,
            at=time_s,
        )
        (wheel,) = made.glob("*.whl")
        name = f"llm-quota-proxy-{wheel.name.split('-')[1]}"
        (made / f"{name}-image.tar.gz").write_bytes(packed(tree, context_of(tree), time_s))
        (made / f"{name}.cdx.json").write_text(sbom(tree, name.rpartition("-")[2], time_s), encoding="utf-8")
        sums = "".join(
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(made.iterdir())
        )
        (made / "SHA256SUMS").write_text(sums, encoding="utf-8")
        shutil.rmtree(ROOT / "dist", ignore_errors=True)
        shutil.copytree(made, ROOT / "dist", copy_function=shutil.copyfile)
    sys.stdout.write(sums)


def git(*arguments: str) -> bytes:
    """What git prints."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout


def python(module: str, *arguments: str, cwd: Path, at: int) -> bytes:
    """What a module prints that is run as a program. Its environment has nothing but the time of the commit.

    Warnings are off: cyclonedx_py warns that a lock file does not say which package requires which.
    """
    environ = {"SOURCE_DATE_EPOCH": str(at), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=cwd, env=environ, check=True, stdout=subprocess.PIPE).stdout


def extract(archive: bytes, tree: Path) -> None:
    """Lay the files of a commit into a folder. Their modes depend neither on the umask nor on git's settings."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(tree, filter="data")
        for member in tar.getmembers():
            (tree / member.name).chmod(mode_of(member.mode))


def mode_of(mode: int) -> int:
    """0755 for folders and programs, 0644 for other files."""
    return 0o755 if mode & 0o100 else 0o644


def context_of(tree: Path) -> Iterator[str]:
    """The files that the image is built from: those that .dockerignore lets in, and these two themselves."""
    yield from (".dockerignore", "Dockerfile")
    for line in (tree / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line.startswith("!"):
            path = tree / line[1:]
            found = path.rglob("*") if path.is_dir() else [path]
            yield from (str(each.relative_to(tree)) for each in found if each.is_file())


def packed(tree: Path, names: Iterator[str], time_s: int) -> bytes:
    """A tar of these files, compressed."""
    data = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=data, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for name in sorted(names):
            content = (tree / name).read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = len(content), time_s, mode_of((tree / name).stat().st_mode)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def sbom(tree: Path, version: str, time_s: int) -> str:
    """The bill of materials, as JSON.

    Packages that are used to build the image and are then removed from it have the scope `excluded`.
    """
    options = ["--pyproject", "pyproject.toml", "--output-reproducible", "--spec-version", "1.6"]
    printed = python("cyclonedx_py", "requirements", "requirements-run.lock", *options, cwd=tree, at=time_s)
    bom: dict[str, Any] = json.loads(printed)
    product = bom["metadata"]["component"]
    # The version is not in pyproject.toml.
    product |= {"version": version, "purl": f"pkg:pypi/{product['name']}@{version}"}
    removed = re.search(
        r"pip uninstall --yes \\\n +(.+) setuptools pip", (tree / "Dockerfile").read_text(encoding="utf-8")
    )
    assert removed, "the Dockerfile has a line with the packages that only a build uses"
    for component in bom["components"]:
        component["scope"] = "excluded" if component["name"] in removed[1].split() else "required"
        del component["description"]  # the whole line of the lock file
    return json.dumps(bom, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    main()
