"""A container of a manifest in config/kubernetes as a process: its arguments, its environment and its volumes.

async with running(BUNDLES["sqlite"], folder=tmp_path, replaced={...}) as pod:
    pod.mounts.update_secret({...})               # as the kubelet does
    await pod.logged("policy reloaded")

What is mounted at /data in a container is a folder of the test here, so paths are replaced wherever the manifest has
them. Nothing else is changed but what `replaced` says: ports, and addresses of other servers.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
KUBERNETES = ROOT / "config" / "kubernetes"
IMAGE = "llm-quota-proxy"

Manifest = dict[str, Any]
Bundle = list[Manifest]


def read_manifests(path: Path) -> Bundle:
    """The manifests of a file."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


# What is applied together.
BUNDLES: dict[str, Bundle] = {
    "sqlite": read_manifests(KUBERNETES / "sidecar" / "sqlite.yaml"),
    "postgresql": read_manifests(KUBERNETES / "sidecar" / "postgresql.yaml"),
    "service": [each for path in sorted((KUBERNETES / "service").glob("*.yaml")) for each in read_manifests(path)],
}

# Keys for all of them. Those of users and of administrators have 24 characters or more.
SECRETS = {
    "openai-api-key": "sk-of-the-upstream-0123456789",
    "app-key": "key-of-the-app-0123456789abcdef",
    "database-password": "p@ss/word: 100%",
    "admin-key": "key-of-ops-0123456789abcdef",
    "alice-key": "key-of-alice-0123456789abcdef",
}

# Makes everything read-only but the folders in front of the --, and runs the command behind it without capabilities.
# The kernel's own file systems stay as they are; a container has them too.
_CONFINE = r"""
mount --make-rprivate /
others=$(findmnt --raw --noheadings --output TARGET | grep -vE '^/(proc|sys|dev)(/|$)')
while [ "$1" != -- ]; do mount --bind "$1" "$1"; shift; done
shift
for each in $others; do mount -o remount,ro,bind "$each"; done
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all -- "$@"
"""


def confined(command: Sequence[str], *, writable: Sequence[Path]) -> list[str]:
    """The command with a read-only root and without capabilities; only these folders can be written."""
    return ["unshare", "--mount", "--", "sh", "-euc", _CONFINE, "sh", *map(str, writable), "--", *command]


def why_not_confined() -> str | None:
    """Why this machine can't run a command with a read-only root; None if it can."""
    try:
        tried = subprocess.run(confined(["true"], writable=[]), capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return tried.stderr.strip() or None if tried.returncode else None


class ProjectedVolume:
    """A mounted ConfigMap or Secret: files that are links into a folder, which the kubelet replaces as a whole."""

    def __init__(self, folder: Path, files: Mapping[str, str]) -> None:
        self.folder = folder
        self._numbers = iter(range(1_000_000))
        folder.mkdir()
        self.update(files)

    def update(self, files: Mapping[str, str]) -> None:
        """Replace all files in one step: a new folder, and a new link `..data` to it."""
        new = self.folder / f"..2026_{next(self._numbers)}"
        new.mkdir()
        for name, text in files.items():
            (new / name).write_text(text)
        (self.folder / "..data_tmp").symlink_to(new.name)
        (self.folder / "..data_tmp").rename(self.folder / "..data")
        for name in files:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")


class Mounts:
    """The volumes of a container as folders of the test. `config` is a mounted ConfigMap, `secrets` a mounted Secret.

    `replaced` has texts of the ConfigMap and what stands in their place. Each must be there.
    """

    def __init__(
        self,
        bundle: Bundle,
        container: Manifest,
        *,
        folder: Path,
        secrets: Mapping[str, str] = SECRETS,
        replaced: Mapping[str, str] | None = None,
    ) -> None:
        (volumes,) = (
            {volume["name"]: volume for volume in each["spec"]["template"]["spec"]["volumes"]}
            for each in bundle
            if container in containers(each)
        )
        self._paths = {mount["mountPath"]: folder / mount["name"] for mount in container["volumeMounts"]}
        self._secrets = secrets
        self._container = container
        self.writable: list[Path] = []
        for path in self._paths.values():
            match volumes.get(path.name, {"claim": path.name}):
                case {"configMap": _}:
                    (data,) = (each["data"] for each in bundle if each["kind"] == "ConfigMap")
                    texts = {name: _replace(self.local(text), replaced or {}) for name, text in data.items()}
                    self.config = ProjectedVolume(path, texts)
                case {"secret": secret}:
                    self._keys = [item["key"] for item in secret.get("items", ())] or [*secrets]
                    self.secrets = ProjectedVolume(path, {key: secrets[key] for key in self._keys})
                case _:
                    path.mkdir()
                    self.writable.append(path)

    def update_secret(self, secrets: Mapping[str, str]) -> None:
        """Mount another version of the Secret, as the kubelet does. The environment stays as it is."""
        self.secrets.update({key: secrets[key] for key in self._keys})

    def local(self, text: str) -> str:
        """The text with the folders of the test in place of the paths of the container."""
        pattern = "|".join(map(re.escape, self._paths))
        return re.sub(rf"(?:{pattern})(?=/|$)", lambda found: str(self._paths[found[0]]), text)

    @property
    def environ(self) -> dict[str, str]:
        """The environment of the container, and what the program needs here to be found."""
        given = {
            each["name"]: self.local(each["value"])
            if "value" in each
            else self._secrets[each["valueFrom"]["secretKeyRef"]["key"]]
            for each in self._container["env"]
        }
        return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **given}

    @property
    def command(self) -> list[str]:
        """What the container runs."""
        return [sys.executable, "-m", "proxy", *map(self.local, self._container["args"])]


def _replace(text: str, replaced: Mapping[str, str]) -> str:
    for old, new in replaced.items():
        assert old in text, f"the manifest does not have {old!r}"
        text = text.replace(old, new)
    return text


def containers(manifest: Manifest) -> Iterator[Manifest]:
    """The containers of a workload, those that are started first at first; none for other manifests."""
    pod = manifest.get("spec", {}).get("template", {}).get("spec", {})
    yield from [*pod.get("initContainers", ()), *pod.get("containers", ())]


def serving_container(bundle: Bundle) -> Manifest:
    """The container that serves."""
    (found,) = (
        each
        for manifest in bundle
        for each in containers(manifest)
        if each["image"].startswith(IMAGE) and each["args"][0] == "serve"
    )
    return found


class Pod:
    """The running process. `api` and `admin` are the URLs of its listeners."""

    def __init__(self, process: asyncio.subprocess.Process, mounts: Mounts) -> None:
        self.process = process
        self.mounts = mounts
        self.api = self.admin = ""
        self._lines: list[dict[str, Any]] = []
        self._more = asyncio.Event()

    async def read_log(self) -> None:
        """Read the log to its end. `logged` waits for its lines."""
        assert self.process.stderr
        async for line in self.process.stderr:
            self._lines.append(json.loads(line))
            self._more.set()
        self._lines.append({"event": "the log has ended"})
        self._more.set()

    async def logged(self, event: str, *, times: int = 1) -> dict[str, Any]:
        """Wait until the log has had a line with this event so many times. Fails if the process ends before that."""
        while True:
            found = [line for line in self._lines if line["event"] == event]
            if len(found) >= times:
                return found[times - 1]
            assert self._lines[-1:] != [{"event": "the log has ended"}], self._lines
            self._more.clear()
            await self._more.wait()

    def url_of(self, port: int) -> str:
        """Where a port of the container is here: 8080 is that of the API, 8081 that of administrators."""
        return {8080: self.api, 8081: self.admin}[port]


@asynccontextmanager
async def running(
    bundle: Bundle,
    *,
    folder: Path,
    secrets: Mapping[str, str] = SECRETS,
    replaced: Mapping[str, str],
    is_confined: bool = False,
) -> AsyncIterator[Pod]:
    """Start the container that serves, and wait until it does so; at the end, stop it as Kubernetes does."""
    mounts = Mounts(bundle, serving_container(bundle), folder=folder, secrets=secrets, replaced=replaced)
    async with started(mounts, is_confined=is_confined) as pod:
        yield pod


@asynccontextmanager
async def started(mounts: Mounts, *, is_confined: bool = False) -> AsyncIterator[Pod]:
    """The same with these volumes, which may be those of a container that has ended."""
    command = mounts.command
    process = await asyncio.create_subprocess_exec(
        *(confined(command, writable=mounts.writable) if is_confined else command),
        cwd=mounts.writable[0],
        env=mounts.environ,
        stderr=asyncio.subprocess.PIPE,
    )
    pod = Pod(process, mounts)
    reader = asyncio.get_running_loop().create_task(pod.read_log())
    try:
        serving = await pod.logged("serving")
        pod.api, pod.admin = serving["api"], serving["admin"]
        yield pod
        if process.returncode is None:
            process.terminate()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await reader
